"""CRC-32 of tensors, as zlib computes it: several times as fast in C, where there is a compiler."""

import ctypes
import zlib
from functools import cache

import torch
from torch import Tensor

from diffusers_pqcad.kernels import native

SOURCE = native.CSRC / "crc32.c"
FOLDED_BYTES = 64
ALL_BITS = 0xFFFFFFFF  # zlib's numbers are the register's bits, each one turned


@cache
def library() -> ctypes.CDLL | str:
    """Return the compiled C file, or why there is none on this computer."""
    loaded = native.library(SOURCE)
    if not isinstance(loaded, str):
        loaded.fold.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_uint32, ctypes.c_void_p]
    return loaded


def crc32(tensor: Tensor, value: int = 0) -> int:
    """Return `zlib.crc32` of the bytes of `tensor`, in row-major order, after other bytes whose CRC-32 is `value`."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    loaded, folded = library(), (ctypes.c_uint8 * FOLDED_BYTES)()
    size = data.numel() // FOLDED_BYTES * FOLDED_BYTES
    if size and not isinstance(loaded, str) and loaded.fold(data.data_ptr(), size, value ^ ALL_BITS, folded):
        value, data = zlib.crc32(folded, ALL_BITS), data[size:]  # the register was folded in: it starts empty
    return zlib.crc32(data.numpy().data, value)
