"""Specification of quantized convolutions of classes derived from torch's, as video autoencoders have them."""

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_cogvideox import CogVideoXSafeConv3d
from diffusers.models.autoencoders.autoencoder_kl_cosmos import CosmosCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_magvit import EasyAnimateCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_minimax_h3 import MiniMaxH3VideoCausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_qwenimage21 import QwenImage21CausalConv3d
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from diffusers.models.autoencoders.autoencoder_mmaudio import MMAudioMPConv1d
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, inspect, quantize_
from diffusers_pqcad.compression.fake_quant import convert_, prepare_
from diffusers_pqcad.layers.derived import quantized_type
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADConv3d, QuantizedLayer
from diffusers_pqcad.loading.coverage import average_bits, coverage
from diffusers_pqcad.numerics.qparams import WeightSpec

VIDEO = (2, 4, 3, 6, 6)
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Wan": (lambda: WanCausalConv3d(4, 5, 3, padding=1), VIDEO),
    "Wan, strided": (lambda: WanCausalConv3d(4, 5, (3, 1, 1), stride=(2, 1, 1)), VIDEO),
    "CogVideoX": (lambda: CogVideoXSafeConv3d(4, 5, 3, padding=1), VIDEO),
    "Cosmos": (lambda: CosmosCausalConv3d(4, 5, (3, 3, 3)), VIDEO),
    "EasyAnimate": (lambda: EasyAnimateCausalConv3d(4, 5, 3), VIDEO),
    "QwenImage 2.1": (lambda: QwenImage21CausalConv3d(4, 5, 3, padding=1), (2, 4, 1, 6, 6)),
}


def packed(name: str, *, activation_bits: int | None = None) -> QuantizedLayer:
    layer = LAYERS[name][0]().requires_grad_(False).eval()
    kind = quantized_type(type(layer))
    assert kind is not None
    quantized = kind.from_float(layer, "block.layer")
    quantized.pack_(WeightSpec(4), activation_bits=activation_bits)
    return quantized


@pytest.mark.parametrize("name", LAYERS)
def test_the_forward_of_the_class_stays(name: str) -> None:
    """So the padding of the class, its caches and its arguments do; the weight is the rounded one."""
    layer, x = packed(name), torch.randn(LAYERS[name][1])
    plain = LAYERS[name][0]().requires_grad_(False)
    plain.weight.copy_(layer.weight)
    plain.bias.copy_(layer.bias)
    assert isinstance(layer, type(plain))
    assert isinstance(layer, (PQCADConv2d, PQCADConv3d))
    assert torch.equal(layer(x), plain(x))
    floats = layer.to_float()
    assert type(floats) is type(plain)
    assert set(vars(floats)) == set(vars(plain))
    assert floats.extra_repr() == plain.extra_repr()


def test_what_the_convolution_gets_is_rounded_after_the_padding_of_the_class() -> None:
    layer, x, cache = packed("Wan", activation_bits=8), torch.randn(VIDEO), 3 * torch.randn(2, 4, 2, 6, 6)
    padded = F.pad(torch.cat([cache, x], dim=2), (1, 1, 1, 1))
    qparams = layer.operation(layer.input_group()).input_qparams(padded)
    rounded = torch.fake_quantize_per_tensor_affine(padded, qparams.scale, qparams.zero_point, 0, 255)
    torch.testing.assert_close(layer(x, cache_x=cache), F.conv3d(rounded, layer.weight, layer.bias))


@torch.no_grad()
@pytest.mark.parametrize("name", ["Wan", "QwenImage 2.1"])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(name: str, duplicate: Callable[[Any], Any]) -> None:
    layer, x = packed(name, activation_bits=8), torch.randn(LAYERS[name][1])
    expected = layer(x)
    twin = duplicate(layer)
    assert type(twin) is type(layer)
    assert torch.equal(twin(x), expected)
    assert twin.handle is not layer.handle
    assert not torch.equal(twin.handle, layer.handle)


@torch.no_grad()
@pytest.mark.parametrize("name", ["Wan", "Cosmos", "QwenImage 2.1"])
def test_a_compiled_layer(name: str) -> None:
    torch._dynamo.reset()
    layer, x = packed(name, activation_bits=8), torch.randn(LAYERS[name][1])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()


@torch.no_grad()
def test_a_hook_of_accelerate_stays_with_the_float_layer() -> None:
    """It replaces the layer's forward by one that calls the float layer."""
    model, x = nn.Sequential(LAYERS["Wan"][0](), nn.Identity()), torch.randn(VIDEO)
    add_hook_to_module(model[0], ModelHook())
    quantize_(model, PQCADConfig(method="fixed", weight_bits=2))
    assert not hasattr(model[0], "_hf_hook")
    assert torch.equal(model(x), type(model[0]).forward(model[0], x))


class Changed(nn.Conv1d):
    """Reads its weight itself, where a quantized layer would not round what it is multiplied with."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.weight * 2)


class Both(nn.Conv1d):
    """Calls `super().forward`, and reads its weight beside."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / self.weight.norm()


class OtherConvolution(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


class WithMore(WanCausalConv3d):
    """Has a parameter more."""

    def __init__(self) -> None:
        super().__init__(4, 5, 3)
        self.gain = nn.Parameter(torch.ones(1))


class Router(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).softmax(-1)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Changed(4, 4, 1),
        lambda: Both(4, 4, 1),
        lambda: OtherConvolution(4, 4, 1),
        WithMore,
        lambda: Router(4, 4),
        lambda: nn.LazyConv3d(4, 1),
        lambda: MiniMaxH3VideoCausalConv3d(4, 5, 3),
        lambda: MMAudioMPConv1d(4, 4, 3),
        lambda: nn.MultiheadAttention(4, 1).out_proj,
    ],
)
def test_classes_that_cannot_be_quantized_stay_as_they_are(build: Callable[[], nn.Module]) -> None:
    layer = build()
    model = nn.Sequential(layer, nn.Conv3d(4, 4, 1))
    if isinstance(layer, nn.LazyConv3d):
        layer(torch.randn(1, 2, 1, 1, 1))
        layer.__class__ = nn.LazyConv3d
    quantize_(model, PQCADConfig(weight_bits=4))
    assert model[0] is layer
    assert list(packed_layers(model)) == ["1"]
    assert type(layer).__name__ in coverage(model, PQCADConfig()).without_quantizer


def wan() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


def qwen_image() -> AutoencoderKLQwenImage:
    torch.manual_seed(0)
    return AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("build", [wan, qwen_image])
def test_a_video_autoencoder_is_really_packed(build: Callable[[], Any], tmp_path: Path) -> None:
    """Five frames, so that the caches between chunks of frames are in use, too."""
    model, x = build(), torch.randn(1, 3, 5, 16, 16)
    expected = model(x).sample
    model.save_pretrained(tmp_path / "float")
    eight = quantize_(build(), PQCADConfig(method="fixed", weight_bits=8))
    assert 0 < (eight(x).sample - expected).norm() / expected.norm() < 0.05
    quantize_(model, PQCADConfig(weight_bits=4))
    assert all(row.kernel for row in inspect(model) if row.name.split(".")[-1] in ("conv1", "conv2", "time_conv"))
    share = coverage(model).share(coverage(model).packed)
    assert share > 0.9
    assert average_bits(model)[0] <= 4
    assert average_bits(model)[1] == pytest.approx(average_bits(model)[0] * share + 32 * (1 - share))
    output = model(x).sample
    model.save_pretrained(tmp_path / "quantized")
    for loaded in (
        type(model).from_pretrained(tmp_path / "quantized"),
        type(model).from_pretrained(tmp_path / "float", quantization_config=PQCADConfig(weight_bits=4)),
    ):
        assert loaded.state_dict().keys() == model.state_dict().keys()
        assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
        assert torch.equal(loaded(x).sample, output)
    weights = {name: layer.dequantized_weight() for name, layer in packed_layers(model).items()}
    model.dequantize()
    assert [type(module) for module in model.modules()] == [type(module) for module in build().modules()]
    assert all(torch.equal(model.get_submodule(name).weight, weight) for name, weight in weights.items())


def test_fake_quantized_weights_become_the_packed_ones() -> None:
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.Unflatten(1, (4, 1)), nn.Conv2d(4, 4, 1), nn.Unflatten(1, (4, 1)))
    model.append(WanCausalConv3d(4, 4, (1, 1, 3)))
    model.append(nn.Conv3d(4, 4, 1))
    x = torch.randn(2, 4, 9)
    prepare_(model, PQCADConfig(activation_bits=None), {"0": 4, "2": 3, "4": 6, "5": 8})
    expected = model(x)
    convert_(model)
    assert len(packed_layers(model)) == 4
    torch.testing.assert_close(model(x), expected)
