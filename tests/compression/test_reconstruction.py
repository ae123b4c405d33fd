"""Specification of block reconstruction: which units, in which order, on what data, and when it is kept."""

import copy
import dataclasses

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.compression.checkpoint import clone_state
from diffusers_pqcad.compression.fake_quant import fake_quant_layers, prepare_
from diffusers_pqcad.compression.reconstruction import (
    ReconstructionConfig,
    UnitIO,
    capture_io,
    correct_biases_,
    execution_order,
    find_units,
    random_mask,
    reconstruct,
    unit_loss,
)
from diffusers_pqcad.loading.convert import match_modules

pytestmark = pytest.mark.fast
CONFIG = ReconstructionConfig(iterations=30, batch_size=16, step_rate=1e-2, float_rate=1e-2)


@pytest.fixture
def reference(tiny_unet: UNet2DModel) -> UNet2DModel:
    return copy.deepcopy(tiny_unet).requires_grad_(False)


@pytest.fixture
def model(tiny_unet: UNet2DModel, reference: UNet2DModel) -> UNet2DModel:
    """`tiny_unet`, fake-quantized to 3 bits; `reference` is what it was."""
    config = PQCADConfig()
    return prepare_(tiny_unet, config, dict.fromkeys(match_modules(tiny_unet, config), 3))


def batch(count: int = 64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    sample = torch.randn(count, 1, 8, 8, generator=generator)
    return sample, torch.randint(0, 1000, (count,), generator=generator), torch.rand(count, generator=generator) + 0.5


def test_every_searched_layer_is_in_exactly_one_unit(model: UNet2DModel) -> None:
    units = find_units(model)
    for layer in fake_quant_layers(model):
        holders = [unit for unit in units if layer == unit or layer.startswith(f"{unit}.")]
        assert len(holders) == 1, layer
    assert {type(unit).__name__ for unit in units.values()} == {
        "ResnetBlock2D",
        "Attention",
        "Downsample2D",
        "Upsample2D",
    }


def test_layers_outside_blocks_are_units_of_their_own(reference: UNet2DModel) -> None:
    config = PQCADConfig(search_all_modules=True)
    prepare_(reference, config, dict.fromkeys(match_modules(reference, config), 4))
    units = find_units(reference)
    assert {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"} < set(units)


def test_units_without_quantized_layers_are_left_out(reference: UNet2DModel) -> None:
    config = PQCADConfig(modules_to_not_convert=["attentions", "down_blocks"])
    prepare_(reference, config, dict.fromkeys(match_modules(reference, config), 4))
    assert not any("attentions" in name or "down_blocks" in name for name in find_units(reference))


def test_units_come_in_the_order_of_execution(model: UNet2DModel) -> None:
    units = find_units(model)
    sample, timestep, _ = batch(1)
    order = execution_order(model, units, sample, timestep)
    assert sorted(order) == sorted(units)
    assert [name.split("_")[0] for name in order] == sorted(
        (name.split("_")[0] for name in order), key=["down", "mid", "up"].index
    )
    assert [name for name in order if name.startswith("mid")] == [
        "mid_block.resnets.0",
        "mid_block.attentions.0",
        "mid_block.resnets.1",
    ]
    assert [name for name in order if name.startswith("up_blocks.0")] == [
        "up_blocks.0.resnets.0",
        "up_blocks.0.attentions.0",
        "up_blocks.0.resnets.1",
        "up_blocks.0.attentions.1",
        "up_blocks.0.upsamplers.0",
    ]
    assert list(units) != order  # registration order has the middle block last
    assert not any(unit._forward_pre_hooks for unit in units.values())


@pytest.mark.parametrize("name", ["up_blocks.0.resnets.1", "mid_block.attentions.0", "down_blocks.0.downsamplers.0"])
def test_captured_inputs_and_targets_are_those_of_a_whole_pass(
    model: UNet2DModel, reference: UNet2DModel, name: str
) -> None:
    sample, timestep, weight = batch(7)
    seen: dict[nn.Module, tuple[tuple, dict, Tensor]] = {}
    for network in (model, reference):
        hook = network.get_submodule(name).register_forward_hook(
            lambda _, args, kwargs, output, network=network: seen.__setitem__(network, (args, kwargs, output)),
            with_kwargs=True,
        )
        with torch.no_grad():
            network(sample, timestep)
        hook.remove()
    io = capture_io(model, reference, name, sample, timestep, weight, batch_size=3)
    for network, captured in ((model, io.inputs), (reference, io.float_inputs)):
        args, kwargs, _ = seen[network]
        assert io.keywords == tuple(kwargs)
        for expected, value in zip((*args, *kwargs.values()), captured, strict=True):
            if isinstance(expected, Tensor):
                torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
            else:
                assert value is expected
    torch.testing.assert_close(io.target, seen[reference][2], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(io.inputs[0], io.float_inputs[0], atol=1e-4)
    assert torch.equal(io.weight, weight)
    assert not any(network.get_submodule(name)._forward_hooks for network in (model, reference))


def test_unit_loss_is_the_weighted_mean_square() -> None:
    layer = nn.Linear(3, 2)
    x, target, weight = torch.randn(5, 3), torch.randn(5, 2), torch.rand(5)
    output = x.double() @ layer.weight.double().T + layer.bias.double()
    expected = sum(w * e for w, e in zip(weight.double(), (output - target).square().mean(dim=1), strict=True)) / 5
    assert unit_loss(layer, (x,), (), target, weight).item() == pytest.approx(expected.item(), rel=1e-5)
    assert unit_loss(layer, (x,), ("input",), target, weight).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["mid_block.resnets.0", "mid_block.attentions.0", "up_blocks.0.upsamplers.0"])
def test_training_a_unit_lowers_its_held_out_loss(model: UNet2DModel, reference: UNet2DModel, name: str) -> None:
    io = capture_io(model, reference, name, *batch())
    unit = model.get_submodule(name)
    elsewhere = {key: value for key, value in clone_state(model).items() if not key.startswith(name)}
    held_out = slice(56, 64)  # the last eighth

    def held_out_loss() -> float:
        arguments = tuple(value[held_out] if isinstance(value, Tensor) else value for value in io.inputs)
        with torch.no_grad():
            return unit_loss(unit, arguments, io.keywords, io.target[held_out], io.weight[held_out]).item()

    before = held_out_loss()
    result = reconstruct(unit, io, CONFIG, name=name, seed=3)
    assert (result.name, result.accepted) == (name, True)
    assert result.loss_before == pytest.approx(before)
    assert result.loss_after == pytest.approx(held_out_loss())
    assert result.loss_after < before
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in elsewhere.items())
    assert all(parameter.grad is None for parameter in unit.parameters())


def test_a_single_layer_is_a_unit_too() -> None:
    model = nn.Sequential(nn.Linear(16, 4))
    original = copy.deepcopy(model[0])
    prepare_(model, PQCADConfig(activation_bits=None), {"0": 3})
    x = torch.randn(256, 16) @ torch.randn(16, 16)  # correlated inputs: rounding to nearest is not the best
    io = UnitIO((x,), (x,), (), original(x).detach(), torch.ones(256))
    assert reconstruct(model[0], io, dataclasses.replace(CONFIG, iterations=100)).accepted


@pytest.mark.parametrize("harm", ["rates", "target"])
def test_training_that_does_not_help_is_undone_exactly(model: UNet2DModel, reference: UNet2DModel, harm: str) -> None:
    name = "mid_block.resnets.0"
    io, before = capture_io(model, reference, name, *batch()), clone_state(model)
    config = dataclasses.replace(CONFIG, iterations=3)
    if harm == "rates":
        config = dataclasses.replace(config, step_rate=1e4, float_rate=1e4)
    else:
        io = dataclasses.replace(io, target=io.target.clone().index_fill_(0, torch.arange(40), float("nan")))
    result = reconstruct(model.get_submodule(name), io, config)
    assert not result.accepted
    assert not result.loss_after < result.loss_before
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_no_iterations_change_nothing(model: UNet2DModel, reference: UNet2DModel) -> None:
    name = "mid_block.resnets.0"
    io, before = capture_io(model, reference, name, *batch(16)), clone_state(model)
    result = reconstruct(model.get_submodule(name), io, dataclasses.replace(CONFIG, iterations=0))
    assert not result.accepted
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_result_is_a_function_of_the_seed(model: UNet2DModel, reference: UNet2DModel) -> None:
    name = "mid_block.attentions.0"
    io = capture_io(model, reference, name, *batch(32))
    weights = []
    for seed in (1, 1, 2):
        unit = copy.deepcopy(model.get_submodule(name))
        torch.rand(seed)  # the global generator plays no part
        reconstruct(unit, io, dataclasses.replace(CONFIG, iterations=5), seed=seed)
        weights.append(torch.cat([value.flatten() for value in unit.state_dict().values()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.fast
@pytest.mark.parametrize("share", [0.0, 0.001, 0.25, 0.5, 0.75, 1.0])
def test_a_random_mask_has_its_share(share: float) -> None:
    mask = random_mask(torch.Size((101, 203, 7)), share, torch.Generator().manual_seed(0))  # not a multiple of four
    assert (mask.dtype, mask.shape) == (torch.bool, (101, 203, 7))
    spread = (share * (1 - share) / mask.numel()) ** 0.5
    assert mask.float().mean().item() == pytest.approx(round(256 * share) / 256, abs=5 * spread)
    assert torch.equal(mask, random_mask(mask.shape, share, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(("input_mix", "expected"), [(0.0, 0.0), (1.0, 1.0), (0.5, 0.5)])
def test_inputs_are_mixed_elementwise(input_mix: float, expected: float) -> None:
    seen: list[Tensor] = []
    model = nn.Sequential(nn.Linear(50, 4))
    prepare_(model, PQCADConfig(activation_bits=None), {"0": 4})
    model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    io = UnitIO((torch.zeros(64, 50),), (torch.ones(64, 50),), (), torch.randn(64, 4), torch.ones(64))
    reconstruct(model[0], io, dataclasses.replace(CONFIG, iterations=1, input_mix=input_mix))
    assert [len(x) for x in seen] == [8, 16, 8]  # held out, training, held out
    assert seen[1].mean().item() == pytest.approx(expected, abs=0.06)
    assert set(seen[1].unique().tolist()) <= {0.0, 1.0}
    assert seen[0].sum() == seen[2].sum() == 0  # decided on what the quantized model sees


def test_corrected_biases_make_the_mean_outputs_those_of_full_precision(
    model: UNet2DModel, reference: UNet2DModel
) -> None:
    sample, timestep, _ = batch(16)
    layers = fake_quant_layers(model)
    without_bias = layers["mid_block.attentions.0.to_q"]
    without_bias.bias = None
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    order = execution_order(model, layers, sample[:1], timestep[:1])

    def means(network: UNet2DModel) -> dict[str, Tensor]:
        found = {}
        hooks = [
            network.get_submodule(name).register_forward_hook(
                lambda layer, _, output, name=name: found.__setitem__(
                    name, output.double().movedim(1 if isinstance(layer, nn.Conv2d) else -1, 0).flatten(1).mean(dim=1)
                )
            )
            for name in order
        ]
        with torch.no_grad():
            network(sample, timestep)
        for hook in hooks:
            hook.remove()
        return found

    wanted, before = means(reference), means(model)
    correct_biases_(model, reference, order, sample, timestep)
    after = means(model)
    for name in order:
        if layers[name] is without_bias:
            continue
        torch.testing.assert_close(after[name], wanted[name], rtol=0, atol=1e-5)
    assert max((before[name] - wanted[name]).abs().max() for name in order) > 1e-3
    assert without_bias.bias is None
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in layers.items())
    assert not any(module._forward_hooks for network in (model, reference) for module in network.modules())
