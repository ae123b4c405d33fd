"""`quantize_` and `dequantize_` in memory: which layers, which bits, and what a refusal leaves behind."""

import copy
import gc
import logging
import pickle
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from torch import nn

from diffusers_pqcad import PQCADConfig, inspect, kernels, quantize_, requantize_
from diffusers_pqcad.compression.fake_quant import prepare_
from diffusers_pqcad.kernels import native, onednn, x86
from diffusers_pqcad.kernels.x86 import library
from diffusers_pqcad.kernels.x86.packing import uses_winograd
from diffusers_pqcad.layers.find import kernel_cache_bytes, packed_layers
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear, QuantizedLayer
from diffusers_pqcad.loading.convert import (
    decide_bits,
    dequantize_,
    log_once,
    match_modules,
    quantization_config_of,
    relative_weight_error,
    with_model_exemptions,
)
from diffusers_pqcad.loading.coverage import average_bits
from diffusers_pqcad.numerics.qparams import WeightSpec

EXEMPT = {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"}
SHORTCUTS = ["up_blocks.1.resnets.0.conv_shortcut", "up_blocks.1.resnets.1.conv_shortcut"]  # exempt, too
FLOAT_LAYERS = (nn.Linear, nn.Conv2d)


def float_layer_names(model):
    return {name for name, module in model.named_modules() if type(module) in FLOAT_LAYERS}


def snapshot(model):
    """Everything a refused quantization must leave as it was: modules by identity, tensors by value, the config."""
    modules = {name: (id(module), type(module)) for name, module in model.named_modules()}
    tensors = {name: (id(tensor), tensor.detach().clone()) for name, tensor in model.named_parameters()}
    return modules, tensors, dict(getattr(model, "config", {})), set(vars(model))


def assert_unchanged(model, before):
    modules, tensors, config, attributes = snapshot(model)
    assert modules == before[0]
    assert tensors.keys() == before[1].keys()
    for name, (identity, tensor) in tensors.items():
        assert identity == before[1][name][0]
        torch.testing.assert_close(tensor, before[1][name][1], rtol=0, atol=0, equal_nan=True)
    assert config == before[2]
    assert attributes == before[3]


def plain_model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.GroupNorm(2, 8),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(32, 5, bias=False),
    ).eval()


def reference_weight(weight, bits):
    """torch's own symmetric fake quantization per output channel, with the narrow range."""
    level_max = 2 ** (bits - 1) - 1
    scale = weight.detach().flatten(1).abs().amax(dim=1) / level_max
    zero_point = torch.zeros(len(scale), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight.detach(), scale, zero_point, 0, -level_max, level_max)


# ---- which layers


@pytest.mark.fast
@pytest.mark.parametrize("config", [PQCADConfig(), PQCADConfig(method="fixed")], ids=["progressive", "fixed"])
def test_by_default_the_first_and_last_layers_and_last_shortcuts_stay_in_floating_point(tiny_unet, config):
    names = float_layer_names(tiny_unet)
    exempt = EXEMPT.union(SHORTCUTS)
    assert exempt < names
    quantize_(tiny_unet, config)
    assert float_layer_names(tiny_unet) == exempt
    assert set(packed_layers(tiny_unet)) == names - exempt


@pytest.mark.parametrize("config", [PQCADConfig(), PQCADConfig(method="fixed")], ids=["progressive", "fixed"])
def test_the_switch_quantizes_every_layer(tiny_unet, config):
    names = float_layer_names(tiny_unet)
    config.search_all_modules = True
    quantize_(tiny_unet, config)
    assert float_layer_names(tiny_unet) == set()
    assert set(packed_layers(tiny_unet)) == names


def test_excluded_layers_stay_in_floating_point_with_their_weights(tiny_unet):
    before = {name: tensor.clone() for name, tensor in tiny_unet.state_dict().items()}
    quantize_(tiny_unet, PQCADConfig(modules_to_not_convert=["to_q", "mid_block.resnets.0", "*.conv_shortcut"]))
    kept = float_layer_names(tiny_unet) - EXEMPT
    assert kept == {
        name.removesuffix(".weight")
        for name in before
        if name.endswith(".weight")
        and before[name].dim() > 1
        and (".to_q" in name or name.startswith("mid_block.resnets.0.") or "conv_shortcut" in name)
    }
    for name in kept:
        assert torch.equal(tiny_unet.state_dict()[f"{name}.weight"], before[f"{name}.weight"])


def test_subclasses_of_float_layers_are_not_ours_to_replace():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Scaled(8, 8), nn.Linear(8, 8))
    quantize_(model, PQCADConfig())
    assert [type(module) for module in model] == [Scaled, PQCADLinear]


# ---- the numbers


@pytest.mark.fast
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_fixed_is_round_to_nearest(bits):
    model = plain_model()
    expected = [reference_weight(model[index].weight, bits) for index in (0, 4)]
    quantize_(model, PQCADConfig(method="fixed", weight_bits=bits))
    assert [type(module).__name__ for module in model] == [
        "PQCADConv2d",
        "GroupNorm",
        "SiLU",
        "Flatten",
        "PQCADLinear",
    ]
    for index, weight in zip((0, 4), expected, strict=True):
        # A weight exactly between two levels may go either way, as 1 / scale is rounded in torch's version.
        difference = (model[index].weight - weight).abs() / model[index].weight_scale.view(
            -1, *[1] * (weight.dim() - 1)
        )
        assert (difference > 1e-3).float().mean() < 0.01
        assert difference.max() < 1.001


def test_a_plain_module_computes_as_its_dequantized_weights_do():
    model = plain_model()
    expected = copy.deepcopy(model)
    quantize_(model, PQCADConfig(method="fixed", weight_bits=4, activation_bits=None))
    for index in (0, 4):
        expected[index].weight.data = model[index].dequantized_weight()
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x), rtol=1e-5, atol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_trap_01_scales_stay_fp32_when_a_plain_module_is_cast(dtype):
    model = quantize_(plain_model(), PQCADConfig(method="fixed", weight_bits=4))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.to(dtype)
    for index in (0, 4):
        assert torch.equal(model[index].weight_scale, before[f"{index}.weight_scale"])
        assert model[index].weight_scale.dtype == torch.float32
        assert model[index].weight.dtype == dtype
    assert model[0].bias.dtype == dtype


def test_the_state_dict_of_a_plain_module_round_trips():
    model, twin = plain_model(), plain_model()
    config = PQCADConfig(method="fixed", weight_bits=3)
    quantize_(model, config)
    quantize_(twin, config)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 4, 4)
    with torch.no_grad():
        assert torch.equal(model(x), twin(x))


@pytest.mark.fast
@pytest.mark.parametrize("budget", [2.0, 2.75, 4.0, 5.3, 8.0])
def test_the_average_over_the_searched_weights_meets_the_budget(tiny_unet, budget):
    quantize_(tiny_unet, PQCADConfig(weight_bits=budget))
    layers = packed_layers(tiny_unet)
    total = sum(layer.weight_shape.numel() for layer in layers.values())
    average = sum(layer.weight_shape.numel() * layer.spec.bits for layer in layers.values()) / total
    assert average_bits(tiny_unet)[0] == average <= budget
    # No layer could still be widened: what is left of the budget is less than the cheapest step up.
    wider = {2: 3, 3: 4, 4: 6, 6: 8}
    steps = [
        layer.weight_shape.numel() * (wider[layer.spec.bits] - layer.spec.bits)
        for layer in layers.values()
        if layer.spec.bits < 8
    ]
    assert not steps or (budget - average) * total < min(steps)


def test_widths_come_from_bit_choices_and_are_recorded(tiny_unet):
    quantize_(tiny_unet, PQCADConfig(weight_bits=5, bit_choices=(8, 3)))
    decided = tiny_unet.config["quantization_config"].weight_bits_by_module
    assert decided == {name: layer.spec.bits for name, layer in packed_layers(tiny_unet).items()}
    assert set(decided.values()) == {8, 3}


def test_a_decision_in_the_config_is_carried_out(tiny_unet):
    names = list(match_modules(tiny_unet, PQCADConfig()))
    wanted = {name: (8, 6, 4, 3, 2)[index % 5] for index, name in enumerate(names)}
    quantize_(tiny_unet, PQCADConfig(weight_bits_by_module=wanted))
    assert {name: layer.spec.bits for name, layer in packed_layers(tiny_unet).items()} == wanted


def test_groups_apply_to_linear_layers_only(tiny_unet):
    quantize_(tiny_unet, PQCADConfig(group_size=8))
    for layer in packed_layers(tiny_unet).values():
        groups = layer.in_features // 8 if isinstance(layer, PQCADLinear) else 1
        assert layer.weight_scale.shape == (layer.weight_shape[0], groups)


def test_the_relative_weight_error_is_that_of_torchs_fake_quantization():
    weight = torch.randn(6, 4, 3, 3)
    rounded = reference_weight(weight, 4).double()
    expected = ((rounded - weight) ** 2).sum() / (weight.double() ** 2).sum()
    assert relative_weight_error(weight, WeightSpec(4)) == pytest.approx(expected.item(), rel=1e-4)


def test_bits_are_decided_without_touching_the_layers():
    model = plain_model()
    before = snapshot(model)
    decide_bits(match_modules(model, PQCADConfig()), PQCADConfig(weight_bits=4))
    assert_unchanged(model, before)


def test_float_weights_are_dropped_layer_by_layer(tiny_unet, monkeypatch):
    config = with_model_exemptions(tiny_unet, PQCADConfig())
    weights = [weakref.ref(layer.weight) for layer in match_modules(tiny_unet, config).values()]
    alive = []
    pack = QuantizedLayer.pack_

    def counting_pack(self, *args, **kwargs):
        alive.append(sum(weight() is not None for weight in weights))
        pack(self, *args, **kwargs)

    monkeypatch.setattr(QuantizedLayer, "pack_", counting_pack)
    quantize_(tiny_unet, PQCADConfig())
    gc.collect()
    assert alive == list(range(len(weights), 0, -1))
    assert [weight for weight in weights if weight() is not None] == []


def test_hooks_of_the_float_layers_stay(tiny_unet):
    seen = []
    layer = tiny_unet.mid_block.resnets[0].conv1
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(("pre", kwargs)), with_kwargs=True)
    handle = layer.register_forward_hook(lambda module, args, output: seen.append("post"))

    def call():
        seen.clear()
        with torch.no_grad():
            tiny_unet(torch.zeros(1, 1, 8, 8), 1)
        return list(seen)

    quantize_(tiny_unet, PQCADConfig())
    assert call() == [("pre", {}), "post"]
    tiny_unet.dequantize()
    assert call() == [("pre", {}), "post"]
    handle.remove()
    assert call() == [("pre", {})]


def test_training_mode_and_frozen_biases_stay(tiny_unet):
    tiny_unet.train()
    tiny_unet.mid_block.eval()
    tiny_unet.mid_block.requires_grad_(False)
    modes = {name: module.training for name, module in tiny_unet.named_modules()}
    quantize_(tiny_unet, PQCADConfig())
    assert {name: module.training for name, module in tiny_unet.named_modules() if name in modes} == modes
    assert not tiny_unet.mid_block.resnets[0].conv1.bias.requires_grad
    assert tiny_unet.down_blocks[0].resnets[0].conv1.bias.requires_grad


# ---- refusals


def poison(value):
    def prepare(model):
        model.up_blocks[0].resnets[0].conv1.weight.data[0, 0, 0, 0] = value

    return prepare


REFUSALS = {
    "group size that does not divide": (PQCADConfig(group_size=24), None, r"group_size=24 must divide \d+"),
    "pattern that matches nothing": (PQCADConfig(modules_to_not_convert=["typo"]), None, "'typo' matches none of the"),
    "NaN weights": (PQCADConfig(), poison(float("nan")), r"up_blocks.0.resnets.0.conv1: .* NaN"),
    "infinite weights": (PQCADConfig(), poison(float("inf")), r"up_blocks.0.resnets.0.conv1: .* infinity"),
    "NaN weights, fixed": (PQCADConfig(method="fixed"), poison(float("nan")), r"up_blocks.0.resnets.0.conv1: .* NaN"),
    "bits for some layers only": (
        PQCADConfig(weight_bits_by_module={"mid_block.resnets.0.conv1": 4}),
        None,
        r"weight_bits_by_module lacks \d+ layers, such as",
    ),
    "fake-quantized weights": (
        PQCADConfig(),
        lambda model: prepare_(model, PQCADConfig(), decide_bits(match_modules(model, PQCADConfig()), PQCADConfig())),
        "has the fake-quantized weights of progressive_quantize. Call convert_",
    ),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_leaves_the_model_unchanged(tiny_unet, case):
    config, prepare, message = REFUSALS[case]
    if prepare is not None:
        prepare(tiny_unet)
    before = snapshot(tiny_unet)
    with pytest.raises(ValueError, match=message):
        quantize_(tiny_unet, config)
    assert_unchanged(tiny_unet, before)
    if prepare is None:
        quantize_(tiny_unet, PQCADConfig())  # and it can still be quantized


def test_bits_for_an_unknown_layer_are_refused(tiny_unet):
    bits = quantize_(copy.deepcopy(tiny_unet), PQCADConfig()).config.quantization_config.weight_bits_by_module
    with pytest.raises(ValueError, match="weight_bits_by_module: 'typo' is not a layer"):
        quantize_(tiny_unet, PQCADConfig(weight_bits_by_module=bits | {"typo": 4}))


@pytest.mark.parametrize(
    ("saturates", "has_compiler", "kernel", "level"),
    [
        (True, False, "reference", logging.WARNING),
        (True, True, "x86", logging.INFO),
        (False, False, "onednn", logging.INFO),
        (False, True, "onednn", logging.INFO),  # only oneDNN has VNNI
    ],
)
def test_kernels_are_logged_once_and_a_slow_computer_warns(
    tiny_unet, monkeypatch, caplog, saturates, has_compiler, kernel, level
):
    monkeypatch.setattr(onednn, "available", lambda: True)
    monkeypatch.setattr(onednn, "saturates", lambda: saturates)
    monkeypatch.setattr(
        library, "library", lambda: SimpleNamespace(has_vnni=lambda: 0) if has_compiler else native.NO_COMPILER
    )
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="diffusers_pqcad.loading.convert"):
        for _ in range(2):
            quantize_(copy.deepcopy(tiny_unet), PQCADConfig(method="fixed", weight_bits=8))
    (record,) = [record for record in caplog.records if record.name == "diffusers_pqcad.loading.convert"]
    count = len(packed_layers(quantize_(tiny_unet, PQCADConfig(method="fixed", weight_bits=8))))
    assert record.levelno == level
    assert f"{count} of {count} layers: {kernel}" in record.getMessage()
    assert (native.NO_COMPILER in record.getMessage()) == (not has_compiler)


@torch.no_grad()
def test_without_the_int8_operators_models_are_right_and_a_warning_says_why_slow(tiny_unet, monkeypatch, caplog):
    """As on a CPU that is not x86."""
    x, model = torch.randn(1, 1, 8, 8), quantize_(copy.deepcopy(tiny_unet), PQCADConfig())
    with kernels.use("reference"):
        expected = model(x, 5).sample
    monkeypatch.setattr(onednn, "available", lambda: False)
    monkeypatch.setattr(library, "library", lambda: "it is for Linux on a CPU with AVX2")
    log_once.cache_clear()
    model = quantize_(tiny_unet, PQCADConfig())
    assert {layer.kernel_name() for layer in packed_layers(model).values()} == {"reference"}
    # In another memory format, sums are taken in another order.
    torch.testing.assert_close(model(x, 5).sample, expected, rtol=0, atol=1e-5)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert onednn.NO_OPERATORS in record.getMessage()


def test_floating_point_activations_are_the_users_choice_and_no_warning(tiny_unet, caplog):
    log_once.cache_clear()
    with caplog.at_level(logging.INFO, logger="diffusers_pqcad"):
        quantize_(tiny_unet, PQCADConfig(activation_bits=None))
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert "its activations stay in floating point" in record.getMessage()


def test_requantizing_is_quantizing_the_dequantized_model_without_holding_it(tiny_unet, monkeypatch):
    quantize_(tiny_unet, PQCADConfig(method="fixed", weight_bits=8, modules_to_not_convert=["conv1"]))
    expected = quantize_(copy.deepcopy(tiny_unet).dequantize(), PQCADConfig(modules_to_not_convert=["conv1"]))
    alive, weights, pack = [], [], QuantizedLayer.pack_

    def counting_pack(self, *args, **kwargs):
        weights.append(weakref.ref(self.weight))
        alive.append(sum(weight() is not None for weight in weights))
        pack(self, *args, **kwargs)

    monkeypatch.setattr(QuantizedLayer, "pack_", counting_pack)
    assert requantize_(tiny_unet, PQCADConfig()) is tiny_unet
    assert set(alive) == {1}
    actual, wanted = tiny_unet.state_dict(), expected.state_dict()
    assert actual.keys() == wanted.keys()
    assert all(torch.equal(actual[name], wanted[name]) for name in wanted)
    assert tiny_unet.config.quantization_config == expected.config.quantization_config


@pytest.mark.parametrize("setting", ["asked for", "stored"])
def test_requantizing_takes_the_exemptions_that_the_model_was_quantized_with(tiny_unet, setting):
    """As the user gave them, and as the model's config has them: with the model's own."""
    quantize_(tiny_unet, PQCADConfig(modules_to_not_convert=["to_q"]))
    stored = copy.deepcopy(tiny_unet.config["quantization_config"].modules_to_not_convert)
    given = {"asked for": ["to_q"], "stored": stored}[setting]
    layers = packed_layers(tiny_unet).keys()
    requantize_(tiny_unet, PQCADConfig(weight_bits=4, modules_to_not_convert=given))
    assert packed_layers(tiny_unet).keys() == layers
    assert tiny_unet.config["quantization_config"].modules_to_not_convert == stored == ["to_q", *SHORTCUTS]
    assert average_bits(tiny_unet)[0] <= 4


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (PQCADConfig(group_size=5), "group_size=5 must divide"),
        (PQCADConfig(search_all_modules=True), "search_all_modules: the layers of a quantized model stay the same"),
        (PQCADConfig(modules_to_not_convert=["to_q"]), "modules_to_not_convert: the layers"),
        (PQCADConfig(weight_bits=6), "weight_bits: expected at most 5.0, those of this model, got 6"),
    ],
    ids=["group_size", "search_all_modules", "modules_to_not_convert", "weight_bits"],
)
def test_a_refused_requantization_leaves_the_model_unchanged(tiny_unet, config, message):
    with pytest.raises(ValueError, match=r"UNet2DModel is not quantized; call quantize_\(\)"):
        requantize_(tiny_unet, config)
    before = copy.deepcopy(quantize_(tiny_unet, PQCADConfig()).state_dict())
    with pytest.raises(ValueError, match=message):
        requantize_(tiny_unet, config)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_unet.state_dict().items())


@pytest.mark.parametrize(
    "function", [lambda it: quantize_(it, PQCADConfig()), lambda it: requantize_(it, PQCADConfig()), inspect]
)
def test_a_pipeline_is_not_a_model(tiny_unet, function):
    pipeline = DDIMPipeline(unet=tiny_unet, scheduler=DDIMScheduler())
    with pytest.raises(ValueError, match="expected a model, got DDIMPipeline. Give its parts one by one"):
        function(pipeline)


def test_quantizing_twice_is_refused(tiny_unet):
    quantize_(tiny_unet, PQCADConfig(weight_bits=8))
    before = {name: tensor.clone() for name, tensor in tiny_unet.state_dict().items()}
    with pytest.raises(ValueError, match=r"UNet2DModel is quantized already. requantize_\(\) changes its bits"):
        quantize_(tiny_unet, PQCADConfig(weight_bits=4))
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_unet.state_dict().items())


@pytest.mark.parametrize(
    ("model", "config"),
    [
        (nn.Sequential(nn.GroupNorm(1, 4), nn.ConvTranspose1d(4, 4, 3)), PQCADConfig()),
        (nn.Sequential(nn.Linear(4, 4)), PQCADConfig(modules_to_not_convert=["*"])),
        (nn.Sequential(nn.Linear(4, 4)), PQCADConfig(method="fixed", modules_to_not_convert=["0"])),
    ],
    ids=["no such layer", "all excluded", "all excluded, fixed"],
)
def test_nothing_to_quantize_is_a_warning(model, config):
    before = snapshot(model)
    with pytest.warns(UserWarning, match="Sequential has nothing to quantize: . Linear and convolution layers"):
        quantize_(model, config)
    assert_unchanged(model, before)


def test_a_lone_layer_is_refused_with_the_way_out():
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"Linear is a single layer; wrap it, as in nn.Sequential\(layer\)"):
        quantize_(layer, PQCADConfig())
    assert type(layer) is nn.Linear


def test_quantizing_warns_of_nothing(tiny_unet):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_(tiny_unet, PQCADConfig())


# ---- the config of the user and of the model


@pytest.mark.fast
def test_the_users_config_is_neither_changed_nor_kept(tiny_unet):
    config = PQCADConfig(modules_to_not_convert=["to_q"])
    before = copy.deepcopy(config)
    quantize_(tiny_unet, config)
    assert config == before
    config.modules_to_not_convert.append("to_k")
    assert tiny_unet.config["quantization_config"].modules_to_not_convert == ["to_q", *SHORTCUTS]


@pytest.mark.fast
def test_the_config_of_a_model_lists_an_exempt_layer_once(tiny_unet):
    twin = quantize_(copy.deepcopy(tiny_unet), PQCADConfig(modules_to_not_convert=["*.conv_shortcut"]))
    found = twin.config["quantization_config"]
    assert found.modules_to_not_convert == ["*.conv_shortcut"]
    quantize_(tiny_unet, PQCADConfig())
    found = copy.deepcopy(tiny_unet.config["quantization_config"])
    assert found.modules_to_not_convert == SHORTCUTS
    quantize_(tiny_unet.dequantize(), found)
    assert tiny_unet.config["quantization_config"].modules_to_not_convert == SHORTCUTS


def test_ranges_of_timesteps_are_not_promised_without_data(tiny_unet, tmp_path):
    """The config of a calibrated model, used on a float one: the saved model must not ask for ranges it lacks."""
    quantize_(tiny_unet, PQCADConfig(timestep_boundaries=[250, 500]))
    tiny_unet.save_pretrained(tmp_path)
    loaded = type(tiny_unet).from_pretrained(tmp_path)
    x = torch.randn(1, 1, 8, 8)
    kept = tiny_unet.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in loaded.state_dict().items())
    # A file's weights may lie in memory as no sum of floats is vectorized: a last bit can change a code of an input.
    with torch.no_grad():
        torch.testing.assert_close(loaded(x, 300).sample, tiny_unet(x, 300).sample, rtol=0, atol=5e-3)


def test_what_others_set_on_the_config_stays(tiny_unet):
    """As an attribute, which is no entry: `unet.config.encoder_hid_dim_type = "ip_image_proj"` of an IP-Adapter."""
    entries, class_of_config = dict(tiny_unet.config), type(tiny_unet.config)
    tiny_unet.config.encoder_hid_dim_type = "ip_image_proj"
    tiny_unet.config.sample_size = 99  # an entry, too
    for change in (
        lambda: quantize_(tiny_unet, PQCADConfig(method="fixed", weight_bits=8)),
        lambda: requantize_(tiny_unet, PQCADConfig(method="fixed", weight_bits=4)),
        tiny_unet.dequantize,
    ):
        change()
        assert type(tiny_unet.config) is class_of_config
        assert tiny_unet.config.encoder_hid_dim_type == "ip_image_proj"
        assert (tiny_unet.config.sample_size, tiny_unet.config["sample_size"]) == (99, 8)
        found = getattr(tiny_unet.config, "quantization_config", None)
        assert found is tiny_unet.config.get("quantization_config")
        assert (found is None) == (change == tiny_unet.dequantize)
    assert dict(tiny_unet.config) == entries
    assert not hasattr(tiny_unet.config, "quantization_config")


def test_a_model_quantized_in_memory_says_so(tiny_unet):
    quantize_(tiny_unet, PQCADConfig(method="fixed"))
    assert tiny_unet.is_quantized
    assert tiny_unet.quantization_method.value == "diffusers_pqcad"
    config = tiny_unet.config["quantization_config"]
    layers = packed_layers(tiny_unet)
    assert config.weight_bits_by_module == dict.fromkeys(layers, 8)
    assert 0.9 < config.packed_share < 1
    config.weight_bits_by_module, config.packed_share = {}, None
    assert config == PQCADConfig(method="fixed", modules_to_not_convert=SHORTCUTS)
    for cast in (tiny_unet.half, tiny_unet.float, lambda: tiny_unet.to(torch.float16)):
        assert cast().is_quantized  # casts are those of a float model, and the mark stays


# ---- counting


@pytest.mark.fast
def test_trap_26_parameters_are_counted_as_in_the_float_model(tiny_unet):
    expected = tiny_unet.num_parameters()
    quantize_(tiny_unet, PQCADConfig())
    assert tiny_unet.num_parameters() == expected
    assert tiny_unet.num_parameters(exclude_embeddings=True) == expected
    trainable = sum(parameter.numel() for parameter in tiny_unet.parameters() if parameter.requires_grad)
    assert tiny_unet.num_parameters(only_trainable=True) == trainable < expected
    tiny_unet.dequantize()
    assert tiny_unet.num_parameters() == expected
    assert "num_parameters" not in vars(tiny_unet)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_trap_26_copies_count_their_own_parameters(tiny_unet, duplicate):
    quantize_(tiny_unet, PQCADConfig())
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        expected = tiny_unet(x, 1).sample
    twin = duplicate(tiny_unet)
    assert twin.num_parameters() == tiny_unet.num_parameters()
    with torch.no_grad():
        assert torch.equal(twin(x, 1).sample, expected)
    twin.dequantize()
    assert packed_layers(tiny_unet)
    assert tiny_unet.num_parameters() == twin.num_parameters()


@pytest.mark.fast
def test_trap_26_the_footprint_is_what_the_tensors_take(tiny_unet):
    before = tiny_unet.get_memory_footprint()
    quantize_(tiny_unet, PQCADConfig(weight_bits=4))
    tensors = [*tiny_unet.parameters(), *tiny_unet.buffers()]
    assert tiny_unet.get_memory_footprint() == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    layers = packed_layers(tiny_unet).values()
    packed = sum(layer.qweight.numel() + 4 * layer.weight_scale.numel() for layer in layers)
    assert (
        tiny_unet.get_memory_footprint() == before - 4 * sum(layer.weight_shape.numel() for layer in layers) + packed
    )
    assert packed < 4 * sum(layer.weight_shape.numel() for layer in layers) / 6


def test_the_cache_of_the_kernels_is_reported_beside_the_footprint(tiny_unet):
    quantize_(tiny_unet, PQCADConfig(weight_bits=4))
    before = tiny_unet.get_memory_footprint()
    assert kernel_cache_bytes(tiny_unet) == 0
    with torch.no_grad():
        tiny_unet(torch.randn(1, 1, 8, 8), 1)
    fast = [layer for layer in packed_layers(tiny_unet).values() if layer.kernel_name() != "reference"]
    transformed = [layer for layer in fast if layer.kernel_name() == x86.NAME and uses_winograd(layer.operation())]
    levels = sum(layer.weight_shape.numel() for layer in fast)
    assert kernel_cache_bytes(tiny_unet) == levels + sum(layer.weight_shape.numel() for layer in transformed) // 3
    assert tiny_unet.get_memory_footprint() == before


# ---- back to floating point


@pytest.mark.fast
def test_dequantized_layers_are_plain_and_hold_the_dequantized_weights(tiny_unet):
    types = {name: type(module) for name, module in tiny_unet.named_modules()}
    footprint = tiny_unet.get_memory_footprint()
    quantize_(tiny_unet, PQCADConfig())
    weights = {name: layer.dequantized_weight() for name, layer in packed_layers(tiny_unet).items()}
    biases = {name: layer.bias for name, layer in packed_layers(tiny_unet).items()}
    tiny_unet.dequantize()
    assert {name: type(module) for name, module in tiny_unet.named_modules()} == types
    for name, weight in weights.items():
        layer = tiny_unet.get_submodule(name)
        assert torch.equal(layer.weight, weight)
        assert layer.bias is biases[name]
    assert tiny_unet.get_memory_footprint() == footprint
    assert not tiny_unet.is_quantized
    assert not hasattr(tiny_unet, "hf_quantizer")
    assert "quantization_config" not in tiny_unet.config
    with pytest.raises(ValueError, match="need to first quantize"):
        tiny_unet.dequantize()


def test_a_dequantized_plain_module_is_the_float_one_again():
    model = plain_model()
    quantize_(model, PQCADConfig())
    dequantize_(model)
    assert [type(module) for module in model] == [nn.Conv2d, nn.GroupNorm, nn.SiLU, nn.Flatten, nn.Linear]
    model.half()


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_quantizing_again_at_the_same_bits_finds_the_same_integers(bits):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(32, 5))
    config = PQCADConfig(method="fixed", weight_bits=bits)
    quantize_(model, config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize_(dequantize_(model), config)
    after = model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if name.endswith("qweight"):
            assert torch.equal(after[name], tensor)
        else:
            torch.testing.assert_close(after[name], tensor, rtol=1e-6, atol=0)


def test_a_convolution_keeps_all_its_arguments():
    conv = nn.Conv2d(8, 4, (3, 1), stride=(1, 2), padding=(2, 0), dilation=(2, 1), groups=2, padding_mode="reflect")
    model = nn.Sequential(conv)
    x = torch.randn(2, 8, 9, 7)
    quantize_(model, PQCADConfig(method="fixed", weight_bits=8, activation_bits=None))
    assert isinstance(model[0], PQCADConv2d)
    dequantize_(model)
    assert {name: getattr(model[0], name) for name in conv.__constants__} == {
        name: getattr(conv, name) for name in conv.__constants__
    }
    with torch.no_grad():
        torch.testing.assert_close(model(x), conv(x), rtol=0.05, atol=0.05)


def through_a_save(model: UNet2DModel, folder: Path) -> None:
    model.save_pretrained(folder)


def through_json(model: UNet2DModel, folder: Path) -> None:
    model.to_json_string()


@pytest.mark.parametrize("written", [through_a_save, through_json])
def test_a_config_that_was_written_out_once_is_replaced_like_any_other(tiny_unet, tmp_path, written):
    """diffusers turns the entry into a dict as it writes it, and keeps the object as an attribute."""
    quantize_(tiny_unet, PQCADConfig(weight_bits=6))
    written(tiny_unet, tmp_path / "six")
    requantize_(tiny_unet, PQCADConfig(weight_bits=3))
    tiny_unet.save_pretrained(tmp_path / "three")
    loaded = UNet2DModel.from_pretrained(tmp_path / "three")
    for model in (tiny_unet, loaded):
        assert quantization_config_of(model).weight_bits == 3
    assert average_bits(loaded)[0] <= 3
    written(tiny_unet, tmp_path / "again")
    tiny_unet.dequantize()
    assert not hasattr(tiny_unet.config, "quantization_config")
    quantize_(tiny_unet, PQCADConfig(method="fixed", weight_bits=8)).save_pretrained(tmp_path / "eight")
    assert average_bits(UNet2DModel.from_pretrained(tmp_path / "eight"))[0] == 8
