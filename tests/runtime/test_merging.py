"""Specification of adapters that are merged into packed layers: rounded once, and put back bit by bit."""

import copy
import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.kernels.native import weights
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear
from diffusers_pqcad.loading.convert import dequantize_
from diffusers_pqcad.numerics.packing import unpack_levels
from diffusers_pqcad.numerics.qparams import WeightSpec
from diffusers_pqcad.runtime.merging import fuse_lora

TARGETS = ["to_q", "to_out.0", "conv1", "proj_in"]
W8 = PQCADConfig(method="fixed", weight_bits=8)


class Parts(nn.Module):
    """Layers of each kind that adapters lie on, and `last`, which stays in floating point."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv, self.last = nn.Linear(12, 20), nn.Conv2d(6, 10, 3), nn.Linear(8, 4)


def model_of(config: PQCADConfig = W8, **options: Any) -> Any:
    """A quantized `Parts` with an adapter on each layer."""
    torch.manual_seed(0)
    model = Parts().eval().requires_grad_(False)
    quantize_(model, PQCADConfig(**config.to_dict() | {"modules_to_not_convert": ["last"]}))
    add(model, **options)
    return model


def add(
    model: Any, name: str = "default", *, targets: tuple[str, ...] = ("linear", "conv", "last"), **options: Any
) -> None:
    config = LoraConfig(r=3, lora_alpha=2, target_modules=list(targets), init_lora_weights=False, **options)
    inject_adapter_in_model(config, model, name)


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """All numbers of `model`, but for checksums, which are computed when asked."""
    tensors = dict(model.named_buffers()) | dict(model.named_parameters())
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in actual.items())


def scaling(model: Any) -> list[float]:
    return [module.scaling["default"] for module in (model.linear, model.conv, model.last)]


def exact(module: Any, name: str = "default") -> Tensor:
    """The weight below `module` of peft, plus what the adapter adds to it, in fp64."""
    down, up = (part[name].weight.double().flatten(1) for part in (module.lora_A, module.lora_B))
    weight = module.get_base_layer().weight
    return weight.double() + (module.scaling[name] * up @ down).view(weight.shape)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_weights_are_the_sum_rounded_once(scale: float) -> None:
    model = model_of()
    before = scaling(model)
    fuse_lora(copy.deepcopy(model))  # of which this one knows nothing
    for module in (model.linear, model.conv, model.last):
        module.scaling["default"] *= scale
    expected = {name: exact(model.get_submodule(name)) for name in ("linear", "conv", "last")}
    for module in (model.linear, model.conv, model.last):
        module.scaling["default"] /= scale
    fuse_lora(model, scale)
    for name in ("linear", "conv"):
        layer, wanted = model.get_submodule(name).get_base_layer(), expected[name]
        step = wanted.flatten(1).abs().amax(dim=1) / 127
        torch.testing.assert_close(layer.weight_scale[:, 0].double(), step, rtol=1e-6, atol=0)
        error = (layer.dequantized_weight() - wanted).flatten(1).abs().amax(dim=1)
        assert (error <= 0.5001 * step).all()
    torch.testing.assert_close(model.last.get_base_layer().weight.double(), expected["last"])
    assert scaling(model) == [scale * value for value in before]
    assert all(module.merged_adapters == ["default"] for module in (model.linear, model.conv, model.last))


@torch.no_grad()
def test_a_merged_layer_computes_with_it() -> None:
    """And no cached copy of the kernel's is left from before."""
    model, x = model_of(), torch.randn(5, 12)
    layer = model.linear.get_base_layer()
    layer(x)
    beside = model.linear(x)
    fuse_lora(model)
    assert torch.equal(model.linear(x), layer(x))
    assert (layer(x) - beside).norm() < 0.02 * beside.norm()


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@torch.no_grad()
def test_unfusing_puts_every_bit_back(dora: bool) -> None:
    model = model_of(use_dora=dora)
    before, x = tensors_of(model), torch.randn(5, 12)
    expected = model.linear(x)
    fuse_lora(model)
    assert not torch.equal(tensors_of(model)["linear.base_layer.qweight"], before["linear.base_layer.qweight"])
    for module in (model.linear, model.conv):
        module.unmerge()
        assert not module.merged
    model.last.unmerge()
    after = tensors_of(model)
    torch.testing.assert_close(after.pop("last.base_layer.weight"), before.pop("last.base_layer.weight"))
    assert_same(after, before)
    assert torch.equal(model.linear(x), expected)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.linear.unmerge()


def test_several_are_merged_in_turn_and_undone_at_once() -> None:
    model = model_of()
    add(model, "other", targets=("linear",))
    before = tensors_of(model)
    fuse_lora(model, adapter_names=["default"])
    assert model.linear.merged_adapters == ["default"]
    wanted = exact(model.linear, "other")
    with pytest.warns(UserWarning, match="additionally merging other"):
        fuse_lora(model, adapter_names=["default", "other"])
    assert model.linear.merged_adapters == ["default", "other"]
    assert model.conv.merged_adapters == ["default"]
    error = (model.linear.get_base_layer().dequantized_weight() - wanted).abs().flatten(1).amax(dim=1)
    assert (error <= 0.5001 * wanted.abs().amax(dim=1) / 127).all()
    model.linear.unmerge()
    assert torch.equal(model.linear.get_base_layer().qweight, before["linear.base_layer.qweight"])


def test_a_switch_that_turns_adapters_off_takes_them_out() -> None:
    """peft unmerges in the next call."""
    model, x = model_of(), torch.randn(2, 12)
    before = model.linear.get_base_layer()(x)
    fuse_lora(model)
    model.linear.enable_adapters(False)
    with torch.no_grad():
        assert torch.equal(model.linear(x), before)
    assert not model.linear.merged


def test_biases_of_adapters_are_merged() -> None:
    model = model_of(lora_bias=True)
    nn.init.normal_(model.linear.lora_B["default"].bias)
    layer = model.linear.get_base_layer()
    before = layer.bias.clone()
    fuse_lora(model)
    expected = before + model.linear.scaling["default"] * model.linear.lora_B["default"].bias
    torch.testing.assert_close(layer.bias, expected)
    model.linear.unmerge()
    assert torch.equal(layer.bias, before)


def test_after_dequantizing_peft_takes_off_what_is_there() -> None:
    model = model_of()
    before = model.linear.get_base_layer().dequantized_weight()
    fuse_lora(model)
    dequantize_(model)
    assert type(model.linear.get_base_layer()) is nn.Linear
    model.linear.unmerge()
    torch.testing.assert_close(model.linear.get_base_layer().weight, before, rtol=0, atol=0.02)
    assert not model.linear.merged


def test_what_rounding_loses_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model = model_of()
    layers = [model.get_submodule(name) for name in ("linear", "conv")]
    expected, before = (
        [exact(layer) for layer in layers],
        [layer.get_base_layer().dequantized_weight() for layer in layers],
    )
    fuse_lora(model)
    after = [layer.get_base_layer().dequantized_weight() for layer in layers]

    def norm(numbers: list[Tensor], others: list[Tensor]) -> float:
        return sum((a - b).square().sum().item() for a, b in zip(numbers, others, strict=True)) ** 0.5

    lost, size = norm(after, expected), norm(expected, [torch.zeros(())] * 2)
    assert (
        "2 layers of 8 bits hold the adapter now, and were rounded anew. That changes their weights by " in caplog.text
    )
    said = [float(number) for number in re.findall(r"([\d.]+) %", caplog.text)]
    assert said == pytest.approx([100 * lost / size, 100 * lost / norm(expected, before)], rel=0.06)


def few_bits(model: Any) -> str:
    model.linear.get_base_layer().unpack_()
    model.linear.get_base_layer().pack_(WeightSpec(4), activation_bits=8)
    return (
        r"linear: adapters are merged into layers of 8 bits, and this one has 4 \(1 of 2 adapted layers have fewer\)"
    )


def not_finite(model: Any) -> str:
    model.conv.lora_B["default"].weight.data[0, 0] = torch.inf  # the second layer: the first was computed
    return r"conv: its weights cannot be rounded with the adapter in them: .* Load the adapter again"


def no_bias(model: Any) -> str:
    model.conv.get_base_layer().bias, model.conv.lora_bias["default"] = None, True
    return "base layer has no bias"


@pytest.mark.parametrize("change", [few_bits, not_finite, no_bias])
def test_what_is_refused_changes_nothing(change: Callable[[Any], str]) -> None:
    model = model_of()
    reason = change(model)
    before, factors = tensors_of(model), scaling(model)
    with pytest.raises((ValueError, RuntimeError), match=reason):
        fuse_lora(model, 0.5)
    assert_same(tensors_of(model), before)
    assert scaling(model) == factors
    assert not any(module.merged for module in (model.linear, model.conv, model.last))
    assert type(model.conv.get_base_layer()) is PQCADConv2d


def test_float_layers_are_put_back_too() -> None:
    """The last layer is merged last: here another float one lies before a layer that fails."""
    model = model_of()
    model.conv, model.last = model.last, model.conv  # in the order of registration, linear, last, conv
    model.last.lora_B["default"].weight.data[0, 0] = torch.inf
    before = tensors_of(model)
    with pytest.raises(ValueError, match="with the adapter in them"):
        fuse_lora(model)
    assert_same(tensors_of(model), before)


def test_an_adapter_on_few_bits_that_is_not_asked_for_is_no_reason_to_refuse() -> None:
    model = model_of(targets=("conv",))
    model.linear.unpack_()
    model.linear.pack_(WeightSpec(4), activation_bits=8)
    add(model, "other", targets=("linear",))
    fuse_lora(model, adapter_names=["default"])
    assert model.conv.merged
    assert not model.linear.merged


def test_dora_is_not_merged_on_top_of_another() -> None:
    model = model_of()
    add(model, "other", targets=("linear",), use_dora=True)
    fuse_lora(model, adapter_names=["default"])
    with pytest.raises(ValueError, match=r"linear: it holds the merged adapters \['default'\].* unfuse_lora\(\)"):
        fuse_lora(model, adapter_names=["other"])


def test_it_is_called_as_the_method_of_diffusers() -> None:
    ours, theirs = (inspect.signature(function).parameters for function in (fuse_lora, PeftAdapterMixin.fuse_lora))
    assert [(p.name, p.default) for p in ours.values()][1:] == [(p.name, p.default) for p in theirs.values()][1:]


# ---- through diffusers' own calls


def quantized_pipeline(kind: str, folder: Path, config: PQCADConfig = W8) -> Any:
    """A tiny pipeline whose denoiser is quantized, and a file of an adapter of it in `folder`."""
    pipeline: Any = pipelines.PIPELINES[kind].build()
    name = pipelines.PIPELINES[kind].denoiser
    trained = copy.deepcopy(getattr(pipeline, name))
    trained.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    tensors = get_peft_model_state_dict(trained)
    type(pipeline).save_lora_weights(folder, **{f"{'unet' if name == 'unet' else 'transformer'}_lora_layers": tensors})
    quantize_(getattr(pipeline, name), config)
    return pipeline


def picture_of(pipeline: Any, kind: str) -> Tensor:
    inputs = pipelines.together(pipelines.PIPELINES[kind].inputs[:1]) | pipelines.PIPELINES[kind].arguments
    with torch.no_grad():
        images = pipeline(
            **inputs, num_inference_steps=2, generator=torch.Generator().manual_seed(1), output_type="pt"
        )
    return images.images


KINDS = {"sd": {PQCADLinear, PQCADConv2d}, "sd3": {PQCADLinear}}


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_fuses_saves_and_unfuses(kind: str, tmp_path: Path) -> None:
    pipeline = quantized_pipeline(kind, tmp_path)
    denoiser = getattr(pipeline, pipelines.PIPELINES[kind].denoiser)
    plain = picture_of(pipeline, kind)
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    beside = picture_of(pipeline, kind)
    adapted = [module for module in denoiser.modules() if hasattr(module, "base_layer")]
    assert {type(module.base_layer) for module in adapted} == KINDS[kind]
    pipeline.fuse_lora()
    assert pipeline.num_fused_loras == 1
    fused = picture_of(pipeline, kind)
    assert (fused - beside).norm() < 0.3 * (plain - beside).norm()
    pipeline.unfuse_lora()
    assert pipeline.num_fused_loras == 0
    assert torch.equal(picture_of(pipeline, kind), beside)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert (picture_of(pipeline, kind) - fused).norm() < 0.3 * (plain - beside).norm()
    denoiser.save_pretrained(tmp_path / "merged")
    loaded = type(denoiser).from_pretrained(tmp_path / "merged")
    before, after = packed_layers(denoiser), packed_layers(loaded)
    assert all(torch.equal(after[name].qweight, layer.qweight) for name, layer in before.items())


def test_a_pipeline_below_8_bits_is_refused_and_stays_as_it_was(tmp_path: Path) -> None:
    pipeline = quantized_pipeline("sd", tmp_path, PQCADConfig(method="fixed", weight_bits=6))
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    before, beside = tensors_of(pipeline.unet), picture_of(pipeline, "sd")
    with pytest.raises(ValueError, match=r"this one has 6 .* call fuse_lora\(\) in full precision, then quantize"):
        pipeline.fuse_lora(lora_scale=0.7)
    assert_same(tensors_of(pipeline.unet), before)
    assert torch.equal(picture_of(pipeline, "sd"), beside)
    assert pipeline.num_fused_loras == 0


def test_fusing_in_full_precision_and_then_quantizing_rounds_once(tmp_path: Path) -> None:
    """The recipe of the guide, for any bits: the packed layers are those of the weights with the adapter in them."""
    pipeline = quantized_pipeline("sd", tmp_path)
    pipeline.unet.dequantize()
    pipeline.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    adapted = {name: module for name, module in pipeline.unet.named_modules() if hasattr(module, "base_layer")}
    expected = {name: exact(module, "default_0").float() for name, module in adapted.items()}
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    quantize_(pipeline.unet, PQCADConfig(method="fixed", weight_bits=4))
    layers = packed_layers(pipeline.unet)
    assert len(expected) > 10
    for name, weight in expected.items():
        packed, scale, _ = weights.quantize(weight, WeightSpec(4))
        torch.testing.assert_close(layers[name].weight_scale, scale)
        other = (unpack_levels(packed, WeightSpec(4), weight.shape) != layers[name].levels()).float().mean()
        assert other < 0.01  # ties, as sums differ in their last digits
    pipeline.unet.save_pretrained(tmp_path / "small")
    type(pipeline.unet).from_pretrained(tmp_path / "small")
