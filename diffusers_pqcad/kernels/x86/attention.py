"""Attention in bf16 products and fp32 sums on x86 CPUs, in C (csrc/attention.c).

No less exact than 8-bit rounding around it asks: bf16 has 8 bits itself.
"""

import ctypes
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from diffusers_pqcad.kernels import native
from diffusers_pqcad.kernels.native import scratch
from diffusers_pqcad.kernels.native.layout import check_layout

SOURCE = native.CSRC / "attention.c"
NO_BF16 = "the CPU has no AVX-512 BF16"


class Shape(ctypes.Structure):
    """Sizes of an attention: as `Shape` in the C file."""

    _fields_ = [(name, ctypes.c_int64) for name in ("batch", "heads", "queries", "keys", "channels")]


@cache
def library() -> ctypes.CDLL | str:
    """Return the compiled C file, or why there is none on this computer."""
    loaded = native.library(SOURCE)
    if isinstance(loaded, str):
        return loaded
    if not loaded.has_bf16():
        return NO_BF16
    check_layout(loaded, (Shape,))
    address, shape = ctypes.c_void_p, ctypes.POINTER(Shape)
    loaded.attention_bytes.argtypes, loaded.attention_bytes.restype = [shape], ctypes.c_int64
    loaded.attend.argtypes = [address, address, address, shape, ctypes.c_float, address, address]
    return loaded


def available() -> bool:
    """Return whether `attention` multiplies in bf16 on this computer."""
    return not isinstance(library(), str)


def attention(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """Return softmax(q k^T / sqrt(channels)) v of each head, fp32 (B, Q, heads channels).

    `query` is fp32 (B, Q, heads channels), `key` and `value` (B, K, heads channels), on the CPU: in bf16 products
    where the CPU has them, else as PyTorch does. Raises ValueError for other shapes, and MemoryError where there
    is none for the scores of eight queries.
    """
    batch, queries, width = query.shape
    if key.shape != value.shape or key.shape[::2] != (batch, width) or width % heads or not key.shape[1]:
        raise ValueError(
            f"attention: expected queries (B, Q, C), keys and values (B, K, C) with C divisible by {heads} heads; got "
            f"{tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}."
        )
    loaded = library()
    if isinstance(loaded, str):
        by_head = (tensor.unflatten(2, (heads, -1)).transpose(1, 2) for tensor in (query, key, value))
        return F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2)
    query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
    shape = Shape(batch, heads, queries, key.shape[1], width // heads)
    output = torch.empty(query.shape, dtype=torch.float32, device="cpu")
    memory = scratch.buffer(loaded.attention_bytes(shape))
    pointers = (tensor.data_ptr() for tensor in (query, key, value))
    has_memory = loaded.attend(*pointers, shape, shape.channels**-0.5, memory.data_ptr(), output.data_ptr())
    scratch.give_back(memory)
    if not has_memory:
        raise MemoryError(f"attention: no memory for the scores of eight queries on {shape.keys} keys.")
    return output
