"""The reference kernel: dequantize, then the float operation. Correct everywhere, differentiable, the oracle."""

from typing import TYPE_CHECKING

from torch import Tensor

from diffusers_pqcad.numerics.qparams import fake_quantize_activation

if TYPE_CHECKING:
    from diffusers_pqcad.layers.quantized import QuantizedLayer

NAME = "reference"


def refusal(layer: "QuantizedLayer") -> str | None:
    """Return `None`: this kernel runs every layer on every device."""
    return None


def pack(layer: "QuantizedLayer") -> None:
    """Return nothing: weights are dequantized in every call, so no memory is held."""


def run(layer: "QuantizedLayer", packed: None, x: Tensor) -> Tensor:
    """Return the float operation on the dequantized weights and the fake-quantized `x`, in the dtype of `x`."""
    qparams = layer.input_qparams(x)
    if qparams is not None and layer.activation_bits is not None:
        x = fake_quantize_activation(x, qparams, layer.activation_bits)
    weight = layer.dequantized_weight().to(x.dtype)
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return layer.float_forward(x, weight, bias).to(x.dtype)  # under autocast it is another one
