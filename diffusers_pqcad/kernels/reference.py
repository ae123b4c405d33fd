"""The reference kernel: dequantize, then the float operation. Correct everywhere, differentiable, the oracle."""

import torch
from torch import Tensor

from diffusers_pqcad.kernels.operation import Operation
from diffusers_pqcad.kernels.refusal import Refusal
from diffusers_pqcad.numerics.qparams import fake_quantize_activation

NAME = "reference"
FUSES: frozenset[str] = frozenset()
MEMORY_FORMAT = torch.contiguous_format


def accepts(x: Tensor) -> bool:
    """Return whether this kernel can read `x`, wherever it is: it can."""
    return True


def refusal(operation: Operation) -> Refusal | None:
    """Return `None`: this kernel runs every operation on every device."""
    return None


def absence() -> str | None:
    """Return `None`: every computer has this kernel."""
    return None


def pack(operation: Operation) -> None:
    """Return nothing: weights are dequantized in every call, so no memory is held."""


def num_bytes(operation: Operation, packed: None) -> int:
    """Return 0."""
    return 0


def run(operation: Operation, packed: None, x: Tensor) -> Tensor:
    """Return the float operation on the dequantized weights and the fake-quantized `x`, in the dtype of `x`."""
    qparams = operation.input_qparams(x)
    if qparams is not None and operation.activation_bits is not None:
        x = fake_quantize_activation(x, qparams, operation.activation_bits)
    bias = None if operation.bias is None else operation.bias.to(x.dtype)
    return operation.compute(x, operation.weight().to(x.dtype), bias).to(x.dtype)  # under autocast it is another one
