"""Classes and methods that take the place of others are called as those are: by position or by name."""

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, ModelMixin, UNetMotionModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.compression.fake_quant import convert_, enable_activations_, input_quantizers, prepare_
from diffusers_pqcad.layers.quantized import QUANTIZED_LAYERS
from diffusers_pqcad.loading.convert import match_modules
from diffusers_pqcad.runtime.attention import FusedAttention
from diffusers_pqcad.runtime.feed_forward import FusedFeedForward
from diffusers_pqcad.runtime.fusion import FusedBlock
from diffusers_pqcad.runtime.overrides import OVERRIDES
from diffusers_pqcad.runtime.residual import FusedResnetBlock2D
from diffusers_pqcad.runtime.tiny_autoencoder import FusedAutoencoderTinyBlock, FusedDecoderTiny
from diffusers_pqcad.runtime.transformer import FusedTransformer2DModel
from diffusers_pqcad.runtime.upsampling import FusedUpsample2D

FUSED = (
    *(FusedAttention, FusedFeedForward, FusedResnetBlock2D, FusedTransformer2DModel, FusedUpsample2D),
    *(FusedAutoencoderTinyBlock, FusedDecoderTiny),
)
REPLACED: dict[type[nn.Module], type[nn.Module]] = {
    **{ours: plain for plain, ours in QUANTIZED_LAYERS.items()},
    **{ours: ours.plain for ours in FUSED},  # type: ignore[dict-item]
}
REFUSED = ("enable_layerwise_casting", "fuse_qkv_projections")  # whatever they are called with
PASSED_ON = ("save_motion_modules",)  # with whatever it is called with
OF_PEFT = ("fuse_lora",)  # which no base class has; tests/runtime/test_merging.py compares it
W8 = PQCADConfig(method="fixed", weight_bits=8)


def parameters_of(function: Callable[..., Any]) -> list[tuple[str, Any, Any]]:
    """Name, kind and default of each parameter."""
    parameters = inspect.signature(function, follow_wrapped=False).parameters.values()
    return [(parameter.name, parameter.kind, parameter.default) for parameter in parameters]


def test_no_class_is_forgotten() -> None:
    assert set(FusedBlock.__subclasses__()) == set(FUSED)


@pytest.mark.parametrize("ours", REPLACED, ids=lambda ours: f"{ours.__module__}.{ours.__qualname__}")
def test_forward_takes_what_the_replaced_class_takes(ours: type[nn.Module]) -> None:
    assert parameters_of(ours.forward) == parameters_of(REPLACED[ours].forward)


@pytest.mark.parametrize("base", [ModelMixin, PreTrainedModel])
@pytest.mark.parametrize("name", [name for name in OVERRIDES if name not in (*REFUSED, *PASSED_ON, *OF_PEFT)])
def test_methods_of_the_model_take_what_those_of_its_class_take(base: type, name: str) -> None:
    model, *ours = parameters_of(OVERRIDES[name])
    assert ours == parameters_of(getattr(base, name))[1:]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_refused_whatever_it_is_called_with(name: str) -> None:
    theirs = parameters_of(getattr(AutoencoderKL, name))[1:]
    values = {key: None for key, kind, default in theirs if kind is not inspect.Parameter.VAR_KEYWORD}
    with pytest.raises(ValueError, match=name):
        OVERRIDES[name](nn.Module(), **values)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layer", [nn.Linear(3, 5), nn.Conv2d(3, 5, 1)], ids=["linear", "conv"])
def test_the_input_of_a_layer_can_be_named(layer: nn.Module, packed: bool) -> None:
    x = torch.randn(2, 3) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 4, 4)
    ours = QUANTIZED_LAYERS[type(layer)].from_float(layer, "layer")
    if packed:
        ours = quantize_(nn.Sequential(ours), W8)[0]
    assert torch.equal(ours(input=x), ours(x))


def motion_model() -> UNetMotionModel:
    """The UNet of AnimateDiff, whose motion modules name the input of their projections."""
    torch.manual_seed(0)
    model = UNetMotionModel(
        sample_size=8, block_out_channels=(16, 32), norm_num_groups=4, cross_attention_dim=16, num_attention_heads=2,
        motion_num_attention_heads=2, layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    ).eval()  # fmt: skip
    for name, parameter in model.named_parameters():
        if "motion_modules" in name and parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)  # they start at zero
    return model


@torch.no_grad()
def test_fake_quantization_sees_inputs_that_are_named() -> None:
    """With 8 bits for each, and its packed form computes as it does."""

    def call(model: nn.Module) -> Tensor:
        noise = torch.Generator().manual_seed(1)
        sample = torch.randn(1, 4, 2, 8, 8, generator=noise)
        return model(sample, 10, encoder_hidden_states=torch.randn(2, 4, 16, generator=noise)).sample

    model = motion_model()
    expected = call(model)
    names = [name for name, layer in model.named_modules() if name.endswith("motion_modules.0.proj_in")]
    assert names
    prepare_(model, W8, dict.fromkeys(match_modules(model, W8), 8))
    enable_activations_(model, True)
    rounded: list[str] = []
    for quantizer in input_quantizers(model):
        quantizer.register_forward_hook(lambda module, args, output: rounded.append(module.name))
    fake = call(model)
    assert set(names) <= set(rounded)
    assert 0 < (fake - expected).norm() < 0.1 * expected.norm()
    for quantizer in input_quantizers(model):
        quantizer._forward_hooks.clear()
    packed = call(convert_(model))
    assert (packed - fake).norm() < 0.05 * fake.norm()
