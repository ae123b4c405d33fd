"""What of a layer's weights stays in memory: int8 copies in pages of their own, and of the file's bytes nothing.

A copy is made by way of tensors that are short-lived. On the C library's heap these leave holes between what stays,
which are given back now and then. And the packed weights that it was made from, which are mapped from a file where a
model was loaded, are read no more: their pages are given back. They come from the file again where something reads
them after all, as saving does.
"""

import ctypes
import math
import mmap
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from diffusers_pqcad.kernels.native.pages import madvise

OWN_BYTES = 2**16  # what is smaller may lie on the heap: whole pages for it would cost more than the holes
TRIMMED_BYTES = 2**26  # of packed weights, after which the heap is looked through: that takes milliseconds
PAGEMAP = Path("/proc/self/pagemap")
PRESENT, SWAPPED, IN_FILE = 63, 62, 61  # bits of an entry of PAGEMAP (Linux, Documentation/admin-guide/mm/pagemap.rst)
ENTRY_BYTES = 8


def empty(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return an empty tensor on the CPU for what stays, in pages of its own where it is large, and there are any."""
    num_bytes = math.prod(size) * dtype.itemsize
    if num_bytes < OWN_BYTES or not hasattr(mmap, "MAP_ANONYMOUS"):
        return torch.empty(size, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(size)  # which keeps the memory


def give_back_(tensor: Tensor) -> int:
    """Give the memory of `tensor` back where a file has the same bytes, and return how many; its values stay.

    Pages that were written since they were mapped are in no file: with one of them, nothing is given back. Nor is
    anything on systems that cannot say where a page is.
    """
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    advise = madvise()
    if advise is None or start >= stop or not is_in_file(start, stop):
        return 0
    return 0 if advise(start, stop - start, mmap.MADV_DONTNEED) else stop - start


def is_in_file(start: int, stop: int) -> bool:
    """Return whether all pages in memory from address `start` to `stop` are those of a file; False if unknown."""
    try:
        with PAGEMAP.open("rb", buffering=0) as file:
            file.seek(start // mmap.PAGESIZE * ENTRY_BYTES)
            found = file.read((stop - start) // mmap.PAGESIZE * ENTRY_BYTES)
    except OSError:
        return False
    if len(found) != (stop - start) // mmap.PAGESIZE * ENTRY_BYTES:
        return False
    entries = torch.frombuffer(bytearray(found), dtype=torch.int64)
    anywhere, in_file = (entries >> PRESENT | entries >> SWAPPED) & 1, entries >> IN_FILE & 1
    return bool((in_file >= anywhere).all())


class Heap:
    """What weights that were packed have left on the heap: it is trimmed for every TRIMMED_BYTES of them."""

    def __init__(self) -> None:
        self.untrimmed_bytes = 0

    def grew(self, num_bytes: int) -> None:
        """Take note of packed weights of `num_bytes`, and give free memory back to the system where these add up."""
        self.untrimmed_bytes += num_bytes
        trim = malloc_trim()
        if trim is not None and self.untrimmed_bytes >= TRIMMED_BYTES:
            self.untrimmed_bytes = 0
            trim(0)


HEAP = Heap()


@cache
def malloc_trim() -> Callable[[int], int] | None:
    """Return glibc's malloc_trim(3), or `None` where there is another C library."""
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if hasattr(mmap, "MADV_HUGEPAGE") else None
