"""Mixed precision: what is no weight under training is in bf16, and so takes half the memory.

The teacher and the reference hold bf16 numbers, and a training student or unit computes in bf16 (autocast). Latents,
scales and the rounded weights made of them stay in fp32: those that are packed are those that were trained.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

MixedPrecision = Literal["no", "bf16"]
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16}  # of models that are not trained


def check_mixed_precision(name: Any) -> None:
    """Raise ValueError for anything but "no" and "bf16"."""
    if name not in DTYPES:
        raise ValueError(
            f"mixed_precision: expected 'no' or 'bf16', got {name!r}. fp16 has too small a range for losses without "
            "scaling."
        )


def computed_in(mixed_precision: MixedPrecision, device: torch.device | str) -> AbstractContextManager[None]:
    """Let convolutions and matrix products in the block, on `device`, be in bf16, if `mixed_precision` says so."""
    if mixed_precision == "no":
        return nullcontext()
    # Without a cache: of rounded weights, which are made anew in each call, it would keep copies and reuse none.
    return torch.autocast(torch.device(device).type, torch.bfloat16, cache_enabled=False)
