"""Memory in which the kernels keep what lies between the steps of one call.

The C library gives large blocks back to the system when they are freed, and the next call touches new pages: many in a
step, or none, as the heap happens to lie, and its time has two values.
"""

import threading

import torch
from torch import Tensor

KEPT_BYTES = 2**27  # of address space for a thread, of which the calls touch a part; larger calls are on their own

_kept = threading.local()


def buffer(num_bytes: int) -> Tensor:
    """Return at least `num_bytes` uint8 on the CPU, with any values, until this thread asks again."""
    found = getattr(_kept, "buffer", None)
    if found is None or found.numel() < num_bytes:
        found = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        if num_bytes <= KEPT_BYTES:
            _kept.buffer = found
    return found
