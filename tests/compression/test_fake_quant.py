"""Specification of fake quantization: trainable latents, exact restores, static ranges, and an exact conversion."""

import copy
import itertools
import threading
from bisect import bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, convert_
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.fake_quant import (
    InputFakeQuantize,
    at_bits,
    bits_by_module,
    calibrate_activations_,
    enable_activations_,
    fake_quant_layers,
    fake_quant_state,
    freeze_,
    half_way,
    input_quantizers,
    latent_weight,
    load_fake_quant_state_,
    prepare_,
    segment_timesteps,
    set_bits_,
    timestep_boundaries,
    weight_quantizer,
)
from diffusers_pqcad.kernels import use
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.loading.convert import match_modules
from diffusers_pqcad.numerics.packing import unpack_levels
from diffusers_pqcad.numerics.qparams import quantize_weight

pytestmark = pytest.mark.fast
WIDTHS = (8, 6, 4, 3, 2)


def mixed_bits(model: nn.Module, config: PQCADConfig) -> dict[str, int]:
    return dict(zip(match_modules(model, config), itertools.cycle(WIDTHS), strict=False))


@pytest.fixture
def prepared(tiny_unet: UNet2DModel) -> UNet2DModel:
    """`tiny_unet`, fake-quantized at all widths, activations still in floating point."""
    config = PQCADConfig()
    return prepare_(tiny_unet, config, mixed_bits(tiny_unet, config))


@pytest.fixture
def calibrated(prepared: UNet2DModel, tiny_calibration_set: CalibrationSet) -> UNet2DModel:
    """`prepared` with static activation ranges in two groups."""
    calibrate_activations_(prepared, running(prepared, steps_of(tiny_calibration_set)), num_groups=2)
    return prepared


def steps_of(calibration: CalibrationSet) -> list[tuple[int, Tensor]]:
    return [(int(t), calibration.trajectory[:, index]) for index, t in enumerate(calibration.timestep)]


def running(model: nn.Module, steps: Sequence[tuple[int | float, Tensor]]) -> list[Any]:
    """Each timestep, and what runs `model` there."""
    return [(timestep, partial(model, sample, timestep)) for timestep, sample in steps]


def call(model: nn.Module, sample: Tensor, timestep: Tensor | int) -> Tensor:
    with torch.no_grad():
        return model(sample, timestep).sample


def test_layers_stay_what_they_are(tiny_unet: UNet2DModel) -> None:
    config = PQCADConfig()
    before = {name: type(layer) for name, layer in match_modules(tiny_unet, config).items()}
    prepare_(tiny_unet, config, mixed_bits(tiny_unet, config))
    layers = fake_quant_layers(tiny_unet)
    assert list(layers) == list(before)
    assert all(isinstance(layer, before[name]) for name, layer in layers.items())
    assert bits_by_module(tiny_unet) == dict(zip(before, itertools.cycle(WIDTHS), strict=False))
    assert type(tiny_unet.conv_in) is nn.Conv2d  # exempt
    assert type(tiny_unet.conv_out) is nn.Conv2d


def test_weights_are_the_levels_times_the_scales(prepared: UNet2DModel) -> None:
    for layer in fake_quant_layers(prepared).values():
        quantizer = weight_quantizer(layer)
        latent, scale = latent_weight(layer).detach().double(), quantizer.scale.detach().double()
        absmax = latent.flatten(1).abs().amax(dim=1, keepdim=True)
        largest = 3 if quantizer.spec.bits == 2 else 2 ** (quantizer.spec.bits - 1) - 1
        torch.testing.assert_close(scale, absmax / largest, rtol=1e-6, atol=0)
        levels = layer.weight.detach().double().flatten(1) / scale
        torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-4)
        assert levels.abs().max() <= largest + 1e-4
        step = 2 if quantizer.spec.bits == 2 else 1
        assert ((layer.weight - latent).abs().flatten(1) <= step * scale / 2 * (1 + 1e-5)).all()


def test_gradients_reach_latents_and_scales(prepared: UNet2DModel) -> None:
    prepared(torch.randn(2, 1, 8, 8), torch.tensor([10, 500])).sample.square().mean().backward()
    for name, layer in fake_quant_layers(prepared).items():
        for parameter in (latent_weight(layer), weight_quantizer(layer).scale):
            assert parameter.grad is not None, name
            assert torch.isfinite(parameter.grad).all(), name
    reached = [latent_weight(layer).grad.abs().sum() > 0 for layer in fake_quant_layers(prepared).values()]
    assert all(reached)


def test_gradients_pass_rounded_activations(calibrated: UNet2DModel) -> None:
    calibrated(torch.randn(2, 1, 8, 8), torch.tensor([10, 900])).sample.square().mean().backward()
    assert calibrated.conv_in.weight.grad.abs().sum() > 0


def test_copies_are_independent(calibrated: UNet2DModel) -> None:
    sample, timestep = torch.randn(2, 1, 8, 8), torch.tensor([900, 100])
    expected, state = call(calibrated, sample, timestep), fake_quant_state(calibrated)
    state = {name: tensor.clone() for name, tensor in state["tensors"].items()}
    converted, frozen, trained = (copy.deepcopy(calibrated) for _ in range(3))
    convert_(converted)
    freeze_(frozen)
    with torch.no_grad():
        for layer in fake_quant_layers(trained).values():
            latent_weight(layer).add_(1)
            set_bits_(layer, 2)
    calibrate_activations_(trained, running(trained, [(999, sample), (499, sample)]))
    assert torch.equal(call(calibrated, sample, timestep), expected)
    assert all(torch.equal(tensor, state[name]) for name, tensor in calibrated.state_dict().items())
    again = copy.deepcopy(calibrated)  # and the original can still be copied and converted
    assert torch.equal(call(again, sample, timestep), expected)
    convert_(again)
    assert packed_layers(again).keys() == packed_layers(converted).keys()


def watch_groups(model: UNet2DModel, seen: list) -> list:
    """Let each call of `model` write its timestep group into `seen`."""
    groups = input_quantizers(model)[0].groups
    model.mid_block.register_forward_hook(lambda *_: seen.append(groups.current))
    return seen


def test_a_copy_follows_its_own_timesteps(calibrated: UNet2DModel) -> None:
    twin, seen = copy.deepcopy(calibrated), []
    for model in (calibrated, twin):
        watch_groups(model, seen)

    def call_the_other(*_: object) -> None:
        call(calibrated, torch.randn(1, 1, 8, 8), 999)

    twin.conv_in.register_forward_hook(call_the_other)
    call(twin, torch.randn(1, 1, 8, 8), 0)
    assert seen == [1, 0]


def test_threads_have_groups_of_their_own(calibrated: UNet2DModel) -> None:
    """Each thread waits in its call until the other one has begun its own."""
    sample, barrier = torch.randn(1, 1, 8, 8), threading.Barrier(2)
    expected = {timestep: call(calibrated, sample, timestep) for timestep in (0, 999)}

    def wait(*_: object) -> None:
        barrier.wait()

    calibrated.conv_in.register_forward_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        outputs = pool.map(lambda timestep: call(calibrated, sample, timestep), expected)
    assert all(map(torch.equal, outputs, expected.values()))


def test_a_compiled_model_takes_the_range_of_each_call(calibrated: UNet2DModel) -> None:
    sample = torch.randn(1, 1, 8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(calibrated, backend="eager", fullgraph=True)
    for timestep in (torch.tensor(0), torch.tensor(999)):
        torch.testing.assert_close(call(compiled, sample, timestep), call(calibrated, sample, timestep))
    torch._dynamo.reset()


def test_freezing_keeps_the_outputs(calibrated: UNet2DModel) -> None:
    sample, timestep = torch.randn(2, 1, 8, 8), torch.tensor([900, 100])
    expected = call(calibrated, sample, timestep)
    freeze_(calibrated)
    assert torch.equal(call(calibrated, sample, timestep), expected)
    assert not fake_quant_layers(calibrated)
    assert not any(parameter.requires_grad for parameter in calibrated.parameters())


@pytest.mark.parametrize("bits", WIDTHS)
def test_at_bits_computes_at_these_bits_and_restores_exactly(prepared: UNet2DModel, bits: int) -> None:
    layer = fake_quant_layers(prepared)["mid_block.resnets.0.conv1"]
    quantizer = weight_quantizer(layer)
    with torch.no_grad():
        quantizer.scale.mul_(1.37)  # a learned scale, which min-max would not find again
    spec, scale, weight = quantizer.spec, quantizer.scale.detach().clone(), layer.weight.detach().clone()
    twin = copy.deepcopy(layer)
    set_bits_(twin, bits)
    with at_bits(layer, bits):
        assert quantizer.spec.bits == bits
        assert torch.equal(layer.weight, twin.weight)
    assert quantizer.spec == spec
    assert torch.equal(quantizer.scale, scale)
    assert torch.equal(layer.weight, weight)
    with pytest.raises(KeyError), at_bits(layer, bits):
        raise KeyError
    assert quantizer.spec == spec
    assert torch.equal(quantizer.scale, scale)


def test_set_bits_starts_from_the_latent_weight(prepared: UNet2DModel) -> None:
    layer = fake_quant_layers(prepared)["mid_block.resnets.0.conv1"]
    latent, address = latent_weight(layer).detach().clone(), weight_quantizer(layer).scale.data_ptr()
    set_bits_(layer, 2)
    coarse = (layer.weight - latent).square().sum()
    set_bits_(layer, 8)
    assert torch.equal(latent_weight(layer), latent)
    assert (layer.weight - latent).square().sum() < coarse / 1000
    assert weight_quantizer(layer).scale.data_ptr() == address  # optimizers hold the parameter


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_leave_the_model_unchanged(tiny_unet: UNet2DModel, value: float) -> None:
    config = PQCADConfig()
    with torch.no_grad():
        tiny_unet.mid_block.resnets[1].conv2.weight[0, 0, 0, 0] = value
    with pytest.raises(ValueError, match="mid_block.resnets.1.conv2: .*NaN or an infinity"):
        prepare_(tiny_unet, config, mixed_bits(tiny_unet, config))
    assert not any(hasattr(module, "parametrizations") for module in tiny_unet.modules())
    assert not hasattr(tiny_unet, "pqcad_config")
    assert not any(module._forward_pre_hooks for module in tiny_unet.modules())


def test_without_activation_bits_inputs_are_left_alone(tiny_unet: UNet2DModel) -> None:
    config = PQCADConfig(activation_bits=None)
    prepare_(tiny_unet, config, mixed_bits(tiny_unet, config))
    assert input_quantizers(tiny_unet) == []
    assert calibrate_activations_(tiny_unet, []) == []
    assert timestep_boundaries(tiny_unet) is None


def test_groups_of_linear_inputs_have_scales_of_their_own(tiny_unet: UNet2DModel) -> None:
    config = PQCADConfig(group_size=8)
    prepare_(tiny_unet, config, mixed_bits(tiny_unet, config))
    layers = fake_quant_layers(tiny_unet)
    assert weight_quantizer(layers["mid_block.attentions.0.to_q"]).scale.shape == (32, 4)
    assert weight_quantizer(layers["mid_block.resnets.0.conv1"]).scale.shape == (32, 1)


def test_rounding_of_activations_is_off_until_enabled(prepared: UNet2DModel) -> None:
    sample = torch.randn(2, 1, 8, 8)
    exact = call(prepared, sample, 500)
    enable_activations_(prepared, True)
    rounded = call(prepared, sample, 500)
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.1)
    enable_activations_(prepared, False)
    assert torch.equal(call(prepared, sample, 500), exact)


def test_dynamic_rounding_of_an_input_by_hand() -> None:
    quantizer = InputFakeQuantize("layer", 8)
    quantizer.enabled = True
    rounded = quantizer(torch.tensor([-1.0, 0.0, 0.5, 4.1]))
    scale = 5.1 / 255
    expected = torch.tensor([-50 * scale, 0.0, 25 * scale, 205 * scale])
    torch.testing.assert_close(rounded, expected)


def test_seven_bits_of_activations_end_at_127(tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet) -> None:
    """Half the codes at twice the scale, simulated, packed and run alike."""
    config = PQCADConfig(activation_bits=7)
    coarse = prepare_(copy.deepcopy(tiny_unet), config, mixed_bits(tiny_unet, config))
    fine = prepare_(copy.deepcopy(tiny_unet), PQCADConfig(), mixed_bits(tiny_unet, config))
    for model in (coarse, fine):
        calibrate_activations_(model, running(model, steps_of(tiny_calibration_set)))
    for ours, others in zip(input_quantizers(coarse), input_quantizers(fine), strict=True):
        torch.testing.assert_close(ours.scale, others.scale * 255 / 127)
        assert ours.zero_point.max() <= 127
    sample = torch.randn(2, 1, 8, 8)
    expected = call(coarse, sample, 500)
    packed = convert_(coarse)
    with use("reference"):
        torch.testing.assert_close(call(packed, sample, 500), expected, rtol=0, atol=1e-5)
    assert {layer.activation_bits for layer in packed_layers(packed).values()} == {7}


def test_static_ranges_are_the_extremes_of_each_group(
    prepared: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    inputs: dict[tuple[str, int], Tensor] = {}
    current = 0
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__((name, current), args[0].double())
        )
        for name, layer in fake_quant_layers(prepared).items()
    ]
    for current, sample in steps_of(tiny_calibration_set):
        call(prepared, sample, current)
    for hook in hooks:
        hook.remove()
    boundaries = calibrate_activations_(prepared, running(prepared, steps_of(tiny_calibration_set)), num_groups=2)
    assert len(boundaries) == 1
    for name, layer in fake_quant_layers(prepared).items():
        quantizer = layer.input_fake_quantize
        for group in range(2):
            seen = [
                x
                for (layer_name, t), x in inputs.items()
                if layer_name == name and (t >= boundaries[0]) == bool(group)
            ]
            low, high = min(0.0, *(x.min().item() for x in seen)), max(0.0, *(x.max().item() for x in seen))
            assert quantizer.scale[group].item() == pytest.approx((high - low) / 255, rel=1e-6), name
            assert quantizer.zero_point[group].item() == round(-low / ((high - low) / 255)), name
    assert all(quantizer.enabled for quantizer in input_quantizers(prepared))


def test_boundaries_are_half_way_and_half_open(prepared: UNet2DModel, tiny_calibration_set: CalibrationSet) -> None:
    boundaries = calibrate_activations_(prepared, running(prepared, steps_of(tiny_calibration_set)))
    assert boundaries == [374, 624, 874]  # one group for each step of (999, 749, 499, 249)
    assert timestep_boundaries(prepared) == boundaries
    seen = watch_groups(prepared, [])
    for timestep, group in ((0, 0), (249, 0), (373, 0), (374, 1), (499, 1), (624, 2), (873, 2), (874, 3), (999, 3)):
        call(prepared, torch.randn(1, 1, 8, 8), timestep)
        assert seen.pop() == group, timestep


def test_neighbouring_timesteps_fall_on_their_own_sides(prepared: UNet2DModel) -> None:
    assert calibrate_activations_(prepared, running(prepared, [(t, torch.randn(1, 1, 8, 8)) for t in (5, 4, 2)])) == [
        3,
        5,
    ]


def test_flow_matching_has_boundaries_between_its_own_timesteps(prepared: UNet2DModel) -> None:
    steps = [(t, torch.randn(1, 1, 8, 8)) for t in (1000.0, 857.25, 600.5)]
    boundaries = calibrate_activations_(prepared, running(prepared, steps))
    assert boundaries == [(857.25 + 600.5) / 2, (1000 + 857.25) / 2]
    seen = watch_groups(prepared, [])
    for timestep, group in ((600.5, 0), (728.8, 0), (728.9, 1), (857.25, 1), (1000.0, 2)):
        call(prepared, torch.randn(1, 1, 8, 8), torch.tensor(timestep))
        assert seen.pop() == group, timestep


def test_the_order_of_the_timesteps_changes_nothing(prepared: UNet2DModel) -> None:
    steps = [(t, size * torch.randn(1, 1, 8, 8)) for t, size in ((0.9, 9.0), (0.5, 3.0), (0.1, 1.0))]
    other = copy.deepcopy(prepared)
    assert calibrate_activations_(prepared, running(prepared, steps)) == calibrate_activations_(
        other, running(other, steps[::-1])
    )
    for one, two in zip(input_quantizers(prepared), input_quantizers(other), strict=True):
        assert torch.equal(one.scale, two.scale)
        assert torch.equal(one.zero_point, two.zero_point)


@pytest.mark.parametrize(
    ("one", "other", "middle"), [(4, 2, 3), (5, 4, 5), (999, 749, 874), (5.0, 4, 4.5), (0.5, 0.25, 0.375)]
)
def test_the_middle_of_two_timesteps(one: float, other: float, middle: float) -> None:
    assert half_way(one, other) == half_way(other, one) == middle
    assert type(half_way(one, other)) is type(middle)


def test_one_step_makes_one_group(prepared: UNet2DModel) -> None:
    assert calibrate_activations_(prepared, running(prepared, [(999, torch.randn(1, 1, 8, 8))])) == []
    assert timestep_boundaries(prepared) == []
    assert input_quantizers(prepared)[0].scale.shape == (1,)


def test_calibrating_again_replaces_the_ranges(calibrated: UNet2DModel) -> None:
    sample = torch.randn(4, 1, 8, 8)
    calibrate_activations_(calibrated, running(calibrated, [(999, sample), (499, 10 * sample), (249, sample)]))
    first = {name: tensor.clone() for name, tensor in calibrated.state_dict().items()}
    calibrate_activations_(calibrated, running(calibrated, [(999, sample), (499, 10 * sample), (249, sample)]))
    assert all(torch.equal(tensor, first[name]) for name, tensor in calibrated.state_dict().items())
    assert type(calibrated).__bases__ == (UNet2DModel,)


def test_a_layer_that_is_never_called_is_named(prepared: UNet2DModel) -> None:
    prepared.mid_block.attentions[0] = None
    attention = copy.deepcopy(prepared.up_blocks[0].attentions[0])
    prepared.spare = attention
    with pytest.raises(ValueError, match="never calls this layer"):
        calibrate_activations_(prepared, running(prepared, [(999, torch.randn(1, 1, 8, 8))]))


@given(
    ranges=st.lists(st.lists(st.floats(-4, 4), min_size=2, max_size=2), min_size=1, max_size=7),
    num_groups=st.integers(1, 8),
)
def test_segmentation_is_optimal(ranges: list[list[float]], num_groups: int) -> None:
    logs = torch.tensor(ranges)
    firsts = segment_timesteps(logs, num_groups)
    assert firsts == sorted(set(firsts))
    assert firsts[0] == 0
    assert len(firsts) == min(num_groups, len(logs))

    def cost(starts: list[int]) -> float:
        pieces = [logs[a:b].double() for a, b in itertools.pairwise([*starts, len(logs)])]
        return sum((piece.amax(dim=0) - piece).sum().item() for piece in pieces)

    inner = itertools.combinations(range(1, len(logs)), len(firsts) - 1)
    assert cost(firsts) == pytest.approx(min(cost([0, *starts]) for starts in inner), abs=1e-9)


def test_segmentation_by_hand() -> None:
    assert segment_timesteps(torch.tensor([[0.0], [0.1], [3.0], [3.1], [3.2]]), 2) == [0, 2]


def test_a_batch_of_mixed_timesteps_is_the_calls_one_by_one(calibrated: UNet2DModel) -> None:
    sample, timestep = torch.randn(4, 1, 8, 8), torch.tensor([999, 100, 600, 0])
    seen = watch_groups(calibrated, [])
    together = call(calibrated, sample, timestep)
    groups = input_quantizers(calibrated)[0].groups
    assert seen.pop().tolist() == [bisect_right(groups.boundaries, int(t)) for t in timestep]
    # Each in a batch of the same size: sums of another size may round differently, and then codes differ.
    alone = torch.stack([call(calibrated, sample, timestep[i].repeat(4))[i] for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)


def test_wrong_ranges_of_a_mixed_batch_would_be_seen(calibrated: UNet2DModel) -> None:
    sample, timestep = torch.randn(2, 1, 8, 8), torch.tensor([999, 0])
    for quantizer in input_quantizers(calibrated):
        quantizer.scale[1] *= 40  # the ranges of large timesteps only
    together, small = call(calibrated, sample, timestep), call(calibrated, sample, torch.tensor([0, 0]))
    torch.testing.assert_close(together[1], small[1], rtol=0, atol=1e-6)
    assert (together[0] - small[0]).abs().max() > 2e-2


def test_state_restores_bits_ranges_and_weights(calibrated: UNet2DModel, tiny_unet: UNet2DModel) -> None:
    sample, timestep = torch.randn(2, 1, 8, 8), torch.tensor([900, 100])
    expected, state = call(calibrated, sample, timestep), copy.deepcopy(fake_quant_state(calibrated))
    twin = copy.deepcopy(calibrated)
    for layer in fake_quant_layers(twin).values():
        set_bits_(layer, 8)
    calibrate_activations_(twin, running(twin, [(999, 3 * sample), (700, sample), (499, sample), (1, sample)]))
    load_fake_quant_state_(twin, state)
    assert torch.equal(call(twin, sample, timestep), expected)
    assert bits_by_module(twin) == bits_by_module(calibrated)
    assert timestep_boundaries(twin) == timestep_boundaries(calibrated)


def test_state_restores_dynamic_ranges_too(prepared: UNet2DModel, tiny_calibration_set: CalibrationSet) -> None:
    state = copy.deepcopy(fake_quant_state(prepared))
    sample = torch.randn(2, 1, 8, 8)
    expected = call(prepared, sample, 500)
    calibrate_activations_(prepared, running(prepared, steps_of(tiny_calibration_set)))
    load_fake_quant_state_(prepared, state)
    assert torch.equal(call(prepared, sample, 500), expected)
    assert timestep_boundaries(prepared) is None


@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
def test_packed_layers_compute_the_same(
    prepared: UNet2DModel, tiny_calibration_set: CalibrationSet, static: bool
) -> None:
    with torch.no_grad():
        for layer in fake_quant_layers(prepared).values():  # as training leaves it: latents and scales have moved
            latent_weight(layer).mul_(1.01)
            weight_quantizer(layer).scale.mul_(0.9)
    if static:
        calibrate_activations_(prepared, running(prepared, steps_of(tiny_calibration_set)), num_groups=2)
    enable_activations_(prepared, True)
    packed = convert_(copy.deepcopy(prepared))
    layers = fake_quant_layers(prepared)
    assert packed_layers(packed).keys() == layers.keys()
    for name, layer in packed_layers(packed).items():
        quantizer = weight_quantizer(layers[name])
        scale = quantizer.scale.detach()
        assert torch.equal(layer.weight_scale, scale)
        levels = unpack_levels(layer.qweight, layer.spec, layer.weight_shape)
        assert torch.equal(levels, quantize_weight(latent_weight(layers[name]), scale, quantizer.spec))
        assert torch.equal(layer.weight, layers[name].weight)
        if static:
            assert torch.equal(layer.input_scale, layers[name].input_fake_quantize.scale)
            assert torch.equal(layer.input_zero_point, layers[name].input_fake_quantize.zero_point)
    with use("reference"):
        for timestep in (torch.tensor([900, 900]), torch.tensor([900, 100]) if static else torch.tensor([100, 100])):
            sample = torch.randn(2, 1, 8, 8)
            difference = (call(packed, sample, timestep) - call(prepared, sample, timestep)).abs().max()
            assert difference < 1e-5


def test_a_converted_model_survives_saving(calibrated: UNet2DModel, tmp_path: Path) -> None:
    packed = convert_(copy.deepcopy(calibrated), num_inference_steps=2)
    packed.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert packed.state_dict().keys() == loaded.state_dict().keys()
    for name, tensor in packed.state_dict().items():
        assert tensor.dtype == loaded.state_dict()[name].dtype
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    config = loaded.config.quantization_config
    config = config if isinstance(config, dict) else config.to_dict()
    assert config["weight_bits_by_module"] == bits_by_module(calibrated)
    assert config["timestep_boundaries"] == timestep_boundaries(calibrated)
    assert config["num_inference_steps"] == 2
    sample, timestep = torch.randn(2, 1, 8, 8), torch.tensor([900, 100])
    assert torch.equal(call(packed, sample, timestep), call(loaded, sample, timestep))


def test_a_converted_model_has_no_trace_of_training(calibrated: UNet2DModel) -> None:
    packed = convert_(calibrated)
    assert not any(hasattr(module, "parametrizations") for module in packed.modules())
    assert not any(isinstance(module, InputFakeQuantize) for module in packed.modules())
    assert not hasattr(packed, "pqcad_config")
    assert packed.is_quantized
    assert not any(layer._forward_pre_hooks for layer in packed_layers(packed).values())


def test_a_float_model_cannot_be_converted(tiny_unet: UNet2DModel) -> None:
    with pytest.raises(ValueError, match="no fake-quantized layer; call progressive_quantize first"):
        convert_(tiny_unet)
