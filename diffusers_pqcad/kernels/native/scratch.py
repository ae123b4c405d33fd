"""Memory in which the kernels keep what lies between the steps of one call.

The C library gives large blocks back to the system when they are freed, and the next call touches new pages: many in a
step, or none, as the heap happens to lie, and its time has two values.
"""

from collections import deque

import torch
from torch import Tensor

from diffusers_pqcad.kernels.native import pages

KEPT_BYTES = 2**28  # of address space for all threads, of which the calls touch a part; larger calls are on their own

_free: deque[Tensor] = deque()  # the one used last comes last; each operation is whole, so that no thread needs a lock


def buffer(num_bytes: int) -> Tensor:
    """Return at least `num_bytes` uint8 on the CPU, with any values, for this call alone until it gives them back."""
    if num_bytes <= KEPT_BYTES:
        try:
            found = _free.pop()
        except IndexError:
            pass
        else:
            if found.numel() >= num_bytes:
                return found
    return pages.empty((num_bytes,), dtype=torch.uint8)


def give_back(found: Tensor) -> None:
    """Keep what `buffer` returned for the next call, of any thread; one that is not given back is freed as others."""
    if found.numel() > KEPT_BYTES:
        return
    _free.append(found)
    while len(_free) > 1 and sum(map(Tensor.numel, tuple(_free))) > KEPT_BYTES:
        try:
            _free.popleft()
        except IndexError:  # other threads took the rest
            return
