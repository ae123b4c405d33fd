"""int8 Linear layers on an accelerator, by torchao's integer product. Not run on one: tested on the CPU only."""

from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from diffusers_pqcad.qparams import activation_qmax

if TYPE_CHECKING:
    from diffusers_pqcad.layers import QuantizedLayer

NAME = "torchao"
MIDDLE = 128  # uint8 codes, less this, fit int8


class PackedLinear(NamedTuple):
    """int8 levels (in_features, out_features), fp32 scales and int32 sums of levels, both (out_features,)."""

    levels: Tensor
    scale: Tensor
    level_sum: Tensor


@cache
def available() -> bool:
    """Return whether torchao is installed."""
    return find_spec("torchao") is not None


def refusal(layer: "QuantizedLayer") -> str | None:
    """Return why torchao's product cannot run `layer` on this computer, or `None`."""
    if not isinstance(layer, nn.Linear):
        return "torchao has no integer convolution"
    if layer.activation_bits is None:
        return "its activations stay in floating point"
    if layer.qweight.device.type in ("cpu", "meta"):
        return f"its weights are on {layer.qweight.device.type}, and the product is for accelerators"
    if not available():
        return "torchao is not installed"
    return None


def pack(layer: "QuantizedLayer") -> PackedLinear:
    """Return the weight as torchao multiplies it."""
    levels, scale = layer.channel_levels()
    return PackedLinear(levels.t().contiguous(), scale, levels.sum(1, dtype=torch.int32))


def run(layer: "QuantizedLayer", packed: PackedLinear, x: Tensor) -> Tensor:
    """Return the output of the int8 product in the dtype of `x`; no value leaves the device."""
    from torchao.kernel.intmm import safe_int_mm

    qparams = layer.input_qparams(x)
    assert qparams is not None  # refused without
    assert layer.activation_bits is not None
    qmax = activation_qmax(layer.activation_bits)
    codes = (x.float() * qparams.scale.reciprocal()).round_().add_(qparams.zero_point).clamp_(0, qmax)
    products = safe_int_mm(codes.sub_(MIDDLE).to(torch.int8).reshape(-1, x.shape[-1]), packed.levels)
    products = products + (MIDDLE - qparams.zero_point) * packed.level_sum
    output = products.float() * (qparams.scale * packed.scale)
    if layer.bias is not None:
        output = output + layer.bias.float()
    return output.to(x.dtype).reshape(*x.shape[:-1], -1)
