"""Specification of a plan: what quantizing would do, before it is done."""

from dataclasses import asdict

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from diffusers_pqcad import PQCADConfig, inspect, quantize_
from diffusers_pqcad.loading.plan import PlannedLayer, plan


def rows(model: nn.Module, config: PQCADConfig) -> dict[str, PlannedLayer]:
    return {layer.name: layer for layer in plan(model, config)}


@pytest.mark.parametrize(
    "settings", [{"weight_bits": 3}, {"weight_bits": 4, "group_size": 8}, {"weight_bits": 8, "activation_bits": None}]
)
def test_each_layer_is_what_quantizing_makes_of_it(tiny_unet: UNet2DModel, settings):
    config = PQCADConfig(method="fixed", **settings)
    found = plan(tiny_unet, config)
    quantized = inspect(quantize_(tiny_unet, config))
    assert found.is_exact
    for planned, layer in zip(found, quantized, strict=True):
        assert (planned.name, planned.shape, planned.kernel) == (layer.name, layer.shape, layer.kernel)
        assert (planned.group_size, planned.activations) == (layer.group_size, layer.activations)
        assert planned.becomes == str(layer.bits) or planned.becomes.startswith("stays: ")
        assert planned.bytes_after == layer.bytes + (32 if layer.kernel else 0)  # a file has checksums, too


def test_inspect_shows_the_layers_before_quantizing_too(tiny_unet: UNet2DModel):
    config = PQCADConfig(method="fixed")
    with torch.device("meta"):
        on_meta = UNet2DModel.from_config(tiny_unet.config)
    found = inspect(on_meta, config)
    assert [asdict(layer) for layer in found] == [asdict(layer) for layer in plan(tiny_unet, config)]
    assert str(found) == str(plan(tiny_unet, config))
    quantized = quantize_(tiny_unet, config)
    assert inspect(quantized)[5].kernel is not None
    with pytest.raises(ValueError, match="config: expected a model in floating point .*leave it out"):
        inspect(quantized, config)
    with pytest.raises(ValueError, match="config: expected a PQCADConfig, got UNet2DModel. Give .* as reference="):
        inspect(quantized, tiny_unet)
    with pytest.raises(ValueError, match="reference: it is compared with a quantized model"):
        inspect(on_meta, config, reference=tiny_unet)


def test_bits_that_the_weights_decide_are_an_average(tiny_unet: UNet2DModel):
    config = PQCADConfig(weight_bits=4)
    found = plan(tiny_unet, config)
    assert not found.is_exact
    assert {layer.becomes for layer in found.packed} == {"4 on average"}
    quantized = inspect(quantize_(tiny_unet, config))
    packed = [layer for layer in quantized if layer.kernel is not None]
    assert [layer.name for layer in found.packed] == [layer.name for layer in packed]
    stored = sum(layer.bytes + 32 for layer in packed)
    assert sum(layer.bytes_after for layer in found.packed) == pytest.approx(stored, rel=0.05)
    assert "become about" in str(found)


def test_bits_that_were_decided_are_taken(tiny_unet: UNet2DModel):
    decided = quantize_(tiny_unet, PQCADConfig(weight_bits=4)).config.quantization_config
    again = plan(tiny_unet.dequantize(), decided)
    assert again.is_exact
    assert {layer.name: int(layer.becomes) for layer in again.packed} == decided.weight_bits_by_module


def test_each_layer_that_stays_has_its_reason(tiny_unet: UNet2DModel):
    found = rows(tiny_unet, PQCADConfig(modules_to_not_convert=["mid_block"]))
    assert found["conv_in"].becomes == "stays: by default"
    assert found["up_blocks.1.resnets.0.conv_shortcut"].becomes == "stays: by its kind of model"
    assert found["mid_block.resnets.0.conv1"].becomes == "stays: modules_to_not_convert"
    assert rows(tiny_unet, PQCADConfig(search_all_modules=True))["conv_in"].kernel is not None
    normed = nn.Sequential(nn.Linear(8, 8), nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)))
    assert rows(normed, PQCADConfig())["1"].becomes == "stays: no quantizer"


def test_what_stays_has_the_dtype_that_is_loaded(tiny_unet: UNet2DModel):
    config = PQCADConfig(method="fixed")
    full, half = (plan(tiny_unet, config, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.num_bytes == full.num_bytes
    assert half.num_bytes_after < full.num_bytes_after
    conv_in = (next(layer for layer in found if layer.name == "conv_in") for found in (full, half))
    assert [layer.bytes_after / layer.bytes for layer in conv_in] == [1, 0.5]


def test_nothing_of_the_model_changes(tiny_unet: UNet2DModel):
    before = {name: tensor.clone() for name, tensor in tiny_unet.state_dict().items()}
    plan(tiny_unet, PQCADConfig())
    assert not getattr(tiny_unet, "is_quantized", False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_unet.state_dict().items())


def test_it_is_printed_as_a_table_with_totals(tiny_unet: UNet2DModel):
    found = plan(tiny_unet, PQCADConfig(method="fixed"))
    lines = str(found).splitlines()
    assert lines[0].split() == [
        "name", "shape", "bits", "becomes", "group_size", "activations", "kernel", "bytes", "bytes_after",
    ]  # fmt: skip
    assert len(lines) == len(found) + 2
    assert lines[-1].startswith(f"{len(found.packed)} of {len(found)} layers would be packed, ")
    assert found[0] == list(found)[0]


@pytest.mark.parametrize(
    ("settings", "message"), [({"group_size": 7}, "must divide"), ({"modules_to_not_convert": ["x"]}, "matches none")]
)
def test_a_config_that_does_not_fit_is_refused_as_by_quantizing(tiny_unet: UNet2DModel, settings, message):
    with pytest.raises(ValueError, match=message):
        plan(tiny_unet, PQCADConfig(**settings))
