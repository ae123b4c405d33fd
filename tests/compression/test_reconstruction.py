"""Specification of block reconstruction: which units, in which order, on what data, and when it is kept."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from families import build
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.compression.checkpoint import clone_state
from diffusers_pqcad.compression.fake_quant import fake_quant_layers, prepare_
from diffusers_pqcad.compression.reconstruction import (
    Pass,
    ReconstructionConfig,
    UnitIO,
    capture_io,
    correct_biases_,
    execution_order,
    find_units,
    output_loss,
    random_mask,
    reconstruct,
    take_rows,
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


def passes(sample: Tensor, timestep: Tensor, weight: Tensor) -> tuple[list[Pass], Tensor]:
    """One pass of a model with these samples, and their weights."""
    return [Pass(lambda network, rows: network(sample[rows], timestep[rows]))], weight


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
    order = execution_order(units, lambda: model(sample, timestep))
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
    io = capture_io(model, reference, name, *passes(sample, timestep, weight), batch_size=3)
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
    io = capture_io(model, reference, name, *passes(*batch()))
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
    io, before = capture_io(model, reference, name, *passes(*batch())), clone_state(model)
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
    io, before = capture_io(model, reference, name, *passes(*batch(16))), clone_state(model)
    result = reconstruct(model.get_submodule(name), io, dataclasses.replace(CONFIG, iterations=0))
    assert not result.accepted
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_the_result_is_a_function_of_the_seed(model: UNet2DModel, reference: UNet2DModel) -> None:
    name = "mid_block.attentions.0"
    io = capture_io(model, reference, name, *passes(*batch(32)))
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
    order = execution_order(layers, lambda: model(sample[:1], timestep[:1]))

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
    correct_biases_(model, reference, order, lambda network: network(sample, timestep))
    after = means(model)
    for name in order:
        if layers[name] is without_bias:
            continue
        torch.testing.assert_close(after[name], wanted[name], rtol=0, atol=1e-5)
    assert max((before[name] - wanted[name]).abs().max() for name in order) > 1e-3
    assert without_bias.bias is None
    assert all(torch.equal(layer.weight, weights[name]) for name, layer in layers.items())
    assert not any(module._forward_hooks for network in (model, reference) for module in network.modules())


def quantized(model: Any, bits: int = 3) -> Any:
    config = PQCADConfig()
    return prepare_(model, config, dict.fromkeys(match_modules(model, config), bits))


def kinds(model: nn.Module) -> dict[str, str]:
    return {name: type(unit).__name__ for name, unit in find_units(model).items()}


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        (
            "SD3",
            {
                "transformer_blocks.0": "JointTransformerBlock",
                "transformer_blocks.1": "JointTransformerBlock",
            },
        ),
        (
            "Flux",
            {
                "transformer_blocks.0": "FluxTransformerBlock",
                "single_transformer_blocks.0": "FluxSingleTransformerBlock",
            },
        ),
        ("DiT", {f"transformer_blocks.{index}": "BasicTransformerBlock" for index in range(2)}),
        ("PixArt", {f"transformer_blocks.{index}": "BasicTransformerBlock" for index in range(2)}),
    ],
)
def test_the_units_of_a_transformer_are_its_blocks(family: str, expected: dict[str, str]) -> None:
    assert kinds(quantized(build(family))) == expected


def units_of_a_stage(
    resnets: int, *, attentions: int = 0, project: bool = False, resample: str = ""
) -> dict[str, str]:
    units = {f"resnets.{index}": "ResnetBlock2D" for index in range(resnets)}
    for index in range(attentions):
        if project:
            units |= {f"attentions.{index}.{layer}": "ParametrizedConv2d" for layer in ("proj_in", "proj_out")}
            units[f"attentions.{index}.transformer_blocks.0"] = "BasicTransformerBlock"
        else:
            units[f"attentions.{index}"] = "Attention"
    return units | ({f"{resample}samplers.0": f"{resample.title()}sample2D"} if resample else {})


@pytest.mark.parametrize(("family", "project"), [("UNet2DModel", False), ("SD-1.5 UNet", True)])
def test_the_units_of_a_unet_are_not_its_stages(family: str, project: bool) -> None:
    stages = {
        "down_blocks.0": units_of_a_stage(1, resample="down"),
        "down_blocks.1": units_of_a_stage(1, attentions=1, project=project),
        "mid_block": units_of_a_stage(2, attentions=1, project=project),
        "up_blocks.0": units_of_a_stage(2, attentions=2, project=project, resample="up"),
        "up_blocks.1": units_of_a_stage(2),
    }
    expected = {f"{stage}.{name}": kind for stage, units in stages.items() for name, kind in units.items()}
    assert kinds(quantized(build(family))) == expected


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.block = nn.Linear(4, 4), nn.Linear(4, 4)


class Named(nn.Module):
    _no_split_modules = ("Inner",)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner = nn.Linear(4, 4), Inner()


def test_a_model_names_blocks_of_its_own() -> None:
    model = prepare_(Named(), PQCADConfig(), dict.fromkeys(("first", "inner.layer", "inner.block"), 4))
    assert kinds(model) == {"first": "ParametrizedLinear", "inner": "Inner"}
    model = prepare_(Named(), PQCADConfig(modules_to_not_convert=["inner"]), {"first": 4})
    assert list(find_units(model)) == ["first"]


class Denoiser(nn.Module):
    """A transformer called as the reconstruction does; its text is part of the `sample`, so that rows go together."""

    def __init__(self, family: str) -> None:
        super().__init__()
        self.net = build(family).requires_grad_(False)
        self.is_flux = family == "Flux"

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        text, size = sample.flatten(1)[:, :24].unflatten(1, (3, 8)), sample.shape[-1]
        ids = torch.cartesian_prod(torch.arange(1), torch.arange(size), torch.arange(size)).float()
        flux = {"img_ids": ids, "txt_ids": torch.zeros(3, 3)} if self.is_flux else {}
        return self.net(
            hidden_states=sample.flatten(2).mT if self.is_flux else sample,
            encoder_hidden_states=text,
            pooled_projections=sample.flatten(1)[:, :8],
            timestep=timestep,
            **flux,
        )


def transformers(family: str, bits: int = 3) -> tuple[nn.Module, nn.Module]:
    """Return a fake-quantized transformer and its full-precision reference."""
    reference, model = Denoiser(family), Denoiser(family)
    model.load_state_dict(reference.state_dict())
    quantized(model.requires_grad_(True).net, bits)
    return model, reference


def states(count: int) -> tuple[Tensor, Tensor, Tensor]:
    _, timestep, weight = batch(count)
    return torch.randn(count, 4, 8, 8, generator=torch.Generator().manual_seed(7)), timestep, weight


def call_with(unit: nn.Module, io: UnitIO, rows: slice) -> Any:
    arguments = take_rows(io.inputs, rows, io.shared)
    num_positional = len(arguments) - len(io.keywords)
    keywords = dict(zip(io.keywords, arguments[num_positional:], strict=True))
    with torch.no_grad():
        return unit(*arguments[:num_positional], **keywords)


@pytest.mark.parametrize(
    ("family", "block"),
    [("SD3", "transformer_blocks.0"), ("Flux", "transformer_blocks.0"), ("Flux", "single_transformer_blocks.0")],
)
def test_both_streams_of_a_block_are_reconstructed(family: str, block: str) -> None:
    model, reference = transformers(family)
    name = f"net.{block}"
    assert name in find_units(model)
    io = capture_io(model, reference, name, *passes(*states(64)))
    unit, held_out = model.get_submodule(name), slice(56, 64)

    def errors() -> list[float]:
        outputs = call_with(unit, io, held_out)
        return [
            (output - target[held_out]).square().mean().item()
            for output, target in zip(outputs, io.target, strict=True)
        ]

    before = errors()
    result = reconstruct(unit, io, dataclasses.replace(CONFIG, iterations=60), name=name)
    assert result.accepted
    assert len(before) == 2
    for now, then in zip(errors(), before, strict=True):
        assert now < 0.8 * then


def test_a_block_without_a_second_stream_is_compared_on_the_other() -> None:
    model, reference = transformers("SD3")
    name = "net.transformer_blocks.1"  # the last: its text goes nowhere
    io = capture_io(model, reference, name, *passes(*states(32)))
    assert io.target[0] is None
    assert io.target[1].shape == (32, 16, 16)
    assert reconstruct(model.get_submodule(name), io, CONFIG).accepted


# Flux's 64 image tokens and 3 of the text: the rotary embeddings have 67 rows, none of them a sample.
@pytest.mark.parametrize(("count", "batch_size"), [(67, 67), (134, 67), (70, 67), (7, 3), (3, 1)])
def test_tensors_without_a_batch_axis_are_not_cut(count: int, batch_size: int) -> None:
    model, reference = transformers("Flux")
    name, arguments = "net.transformer_blocks.0", states(count)
    seen: dict[str, Any] = {}
    hook = model.get_submodule(name).register_forward_hook(
        lambda _, args, kwargs, output: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad():
        model(*arguments[:2])
    hook.remove()
    io = capture_io(model, reference, name, *passes(*arguments), batch_size=batch_size)
    captured = dict(zip(io.keywords, io.inputs, strict=True))
    for key in ("hidden_states", "encoder_hidden_states", "temb"):
        torch.testing.assert_close(captured[key], seen[key], rtol=1e-4, atol=1e-5)
    for value, expected in zip(captured["image_rotary_emb"], seen["image_rotary_emb"], strict=True):
        assert expected.shape == (67, 8)
        assert torch.equal(value, expected)
    cut = dict(zip(io.keywords, take_rows(io.inputs, slice(0, 2), io.shared), strict=True))
    assert len(cut["hidden_states"]) == len(cut["temb"]) == 2
    assert all(len(value) == 67 for value in cut["image_rotary_emb"])
    assert [tuple(target.shape) for target in io.target] == [(count, 3, 16), (count, 64, 16)]


class Options(nn.Module):
    """A unit with nested arguments and outputs of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, options: dict[str, Any], *, scale: float = 1.0) -> dict[str, Any]:
        x = self.layer(options["x"]) * scale
        pair = (x.sum(dim=-1), [options["more"][0] * options["more"][1]["table"]])
        return {"pair": pair, "none": None, "word": "text", "index": torch.arange(len(x)), "table": torch.ones(5)}


class Caller(nn.Module):
    """Calls its unit with what `shared` makes of the samples."""

    def __init__(self, shared: Any = lambda sample: torch.arange(4.0), scale: Any = lambda sample: 2.0) -> None:
        super().__init__()
        self.unit, self.shared, self.scale = Options(), shared, scale

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        nested = (sample * timestep[:, None], {"table": self.shared(sample), "names": ["one", None]})
        return self.unit({"x": sample, "more": nested}, scale=self.scale(sample))


def vectors(count: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(count, 4, generator=generator), torch.arange(count), torch.ones(count)


def test_nested_arguments_and_outputs() -> None:
    reference, (sample, timestep, weight) = Caller(), vectors(10)
    model = copy.deepcopy(reference)
    prepare_(model, PQCADConfig(activation_bits=None), {"unit.layer": 3})
    io = capture_io(model, reference, "unit", *passes(sample, timestep, weight), batch_size=4)
    options, scale = io.inputs
    assert (io.keywords, scale) == (("scale",), 2.0)
    assert torch.equal(options["x"], sample)
    assert torch.equal(options["more"][0], sample * timestep[:, None])
    assert torch.equal(options["more"][1]["table"], torch.arange(4.0))
    assert options["more"][1]["names"] == ["one", None]
    assert (io.target["none"], io.target["word"], io.target["index"], io.target["table"]) == (None,) * 4
    with torch.no_grad():
        torch.testing.assert_close(io.target["pair"][0], (reference.unit.layer(sample) * 2).sum(dim=-1))
    assert torch.equal(io.target["pair"][1][0], sample * timestep[:, None] * torch.arange(4.0))
    assert reconstruct(model.unit, io, CONFIG, name="unit").accepted


@pytest.mark.parametrize("batch_size", [4, 5, 10])
@pytest.mark.parametrize(
    ("caller", "where"),
    [
        (Caller(shared=lambda sample: sample.sum(dim=0)), r"unit: args\[0\]\['more'\]\[1\]\['table'\]"),
        (
            Caller(shared=lambda sample: torch.ones(2 * len(sample), 1, 4)),
            r"unit: args\[0\]\['more'\]\[1\]\['table'\]",
        ),
        (Caller(shared=lambda sample: [0] * len(sample)), r"unit: args\[0\] is nested differently"),
        (Caller(scale=len), "unit: scale has no batch axis"),
    ],
)
def test_what_has_no_batch_axis_must_not_depend_on_the_batch(caller: Caller, where: str, batch_size: int) -> None:
    caller.unit.forward = lambda options, *, scale=1.0: options["x"]  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=where):
        capture_io(caller, caller, "unit", *passes(*vectors(10)), batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 3, 10])
def test_a_tensor_of_one_row_has_no_batch_axis(batch_size: int) -> None:
    caller = Caller(shared=lambda sample: torch.arange(4.0)[None])
    io = capture_io(caller, caller, "unit", *passes(*vectors(10)), batch_size=batch_size)
    assert torch.equal(io.inputs[0]["more"][1]["table"], torch.arange(4.0)[None])


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_all_branches_of_all_calls_are_captured_side_by_side(batch_size: int) -> None:
    """A step of two calls, the first of two branches: three rows a sample, in the order of the samples."""
    caller, (sample, timestep, _) = Caller(), vectors(7)
    weight = torch.rand(7) + 0.5

    def twice(network: nn.Module, rows: Tensor) -> Any:
        return network(torch.cat([sample[rows], 10 + sample[rows]]), torch.cat([timestep[rows]] * 2))

    calls = [Pass(twice, 2), Pass(lambda network, rows: network(20 + sample[rows], timestep[rows]))]
    io = capture_io(caller, caller, "unit", calls, weight, batch_size=batch_size)
    wanted = torch.stack([sample, 10 + sample, 20 + sample], dim=1).flatten(0, 1)
    assert torch.equal(io.inputs[0]["x"], wanted)
    assert torch.equal(io.float_inputs[0]["x"], wanted)
    times = timestep.repeat_interleave(3)[:, None]
    assert torch.equal(io.inputs[0]["more"][0], wanted * times)
    assert torch.equal(io.inputs[0]["more"][1]["table"], torch.arange(4.0))
    assert torch.equal(io.target["pair"][1][0], wanted * times * torch.arange(4.0))
    assert torch.equal(io.weight, weight.repeat_interleave(3))


def test_a_unit_that_returns_nothing_to_compare_is_refused() -> None:
    caller = Caller()
    caller.unit.forward = lambda options, *, scale=1.0: {"none": None}  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="unit: it returns no tensor"):
        capture_io(caller, caller, "unit", *passes(*vectors(10)))


def test_the_loss_of_two_outputs_is_the_sum_of_theirs() -> None:
    rng = np.random.default_rng(0)
    shapes = [(5, 3, 4), (5, 2, 50)]
    outputs, targets = ([rng.normal(size=shape) for shape in shapes] for _ in range(2))
    weight = rng.uniform(0.5, 1.5, size=5)
    expected = 0.0
    for row in range(5):
        for output, target in zip(outputs, targets, strict=True):
            deviations = [(a - b) ** 2 for a, b in zip(output[row].flat, target[row].flat, strict=True)]
            expected += weight[row] * sum(deviations) / len(deviations) / 5
    text, image = (torch.from_numpy(output) for output in outputs)
    wanted_text, wanted_image = (torch.from_numpy(target) for target in targets)
    loss = output_loss(
        (text, None, {"image": image}), (wanted_text, None, {"image": wanted_image}), torch.tensor(weight)
    )
    assert loss.item() == pytest.approx(expected, rel=1e-12)
    single = [
        output_loss(own, wanted, torch.tensor(weight)) for own, wanted in ((text, wanted_text), (image, wanted_image))
    ]
    assert sum(single).item() == pytest.approx(expected, rel=1e-12)
