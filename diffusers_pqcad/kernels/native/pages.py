"""Memory of large tensors in large pages.

The system hands out memory by the page when it is first touched, and glibc maps what is larger than `MAPPED_BYTES`
anew for each tensor: 8192 faults for an output of 32 MiB, as a VAE has them by the dozen, which can take longer than
what is computed there. Pages of 2 MiB are 512 times fewer. Where the system gives none (other systems, or `never` in
/sys/kernel/mm/transparent_hugepage/enabled), all stays as it is.
"""

import ctypes
import mmap
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

MAPPED_BYTES = 2**25  # DEFAULT_MMAP_THRESHOLD_MAX of glibc: what is smaller often was touched before
PAGE_BYTES = 2**21


def empty(size: tuple[int, ...], **options: Any) -> Tensor:
    """Return what `torch.empty` returns for the CPU, a large one in large pages where the system has them."""
    tensor = torch.empty(size, device="cpu", **options)
    if tensor.nbytes >= MAPPED_BYTES:
        ask_for_large_pages(tensor.data_ptr(), tensor.nbytes)
    return tensor


def ask_for_large_pages(address: int, num_bytes: int) -> None:
    """Ask for large pages in the memory of `num_bytes` bytes from `address` on: a hint, which changes no number."""
    advise = madvise()
    start = -(-address // PAGE_BYTES) * PAGE_BYTES
    stop = (address + num_bytes) // PAGE_BYTES * PAGE_BYTES
    if advise is not None and start < stop:
        advise(start, stop - start, mmap.MADV_HUGEPAGE)


@cache
def madvise() -> Callable[..., int] | None:
    """Return madvise(2), or `None` on systems that have no large pages to ask for: others than Linux."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
