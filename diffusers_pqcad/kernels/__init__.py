"""Kernels: how a quantized layer computes on this computer. Never saved; chosen per layer and call.

A kernel is a module with what `Kernel` names. `KERNELS` lists them, fastest first; `reference`, the last, can run
everything and is the oracle for the others. A kernel is told an `Operation`, and knows no layer.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusers_pqcad.kernels import cpu, measured, onednn, reference, x86
from diffusers_pqcad.kernels.memory import Memory, checked, wanted
from diffusers_pqcad.kernels.operation import Operation
from diffusers_pqcad.kernels.refusal import Refusal

ENVIRONMENT_VARIABLE = "PQCAD_KERNEL"

logger = logging.getLogger(__name__)


class Kernel(Protocol):
    """What a kernel module offers.

    `FUSES` are the names of the blocks in runtime/ that it computes whole (those there are written for x86), and
    `MEMORY_FORMAT` is that of its convolutions' inputs and outputs.
    """

    NAME: str
    FUSES: frozenset[str]
    MEMORY_FORMAT: torch.memory_format

    def accepts(self, x: Tensor) -> bool:
        """Return whether this kernel can read the numbers of `x`: their device, and whether there are any yet."""

    def refusal(self, operation: Operation) -> Refusal | None:
        """Return why this kernel cannot run `operation` on this computer, or `None`."""

    def absence(self) -> str | None:
        """Return why a computer that could have this kernel lacks it, or `None`."""

    def pack(self, operation: Operation) -> Any:
        """Return the kernel's own form of the weights and static ranges: a cache, rebuilt when lost."""

    def num_bytes(self, operation: Operation, packed: Any) -> int:
        """Return the bytes of `packed`, which `pack` returned."""

    def run(self, operation: Operation, packed: Any, x: Tensor) -> Tensor:
        """Return the output of `operation` for `x`; `packed` is what `pack` returned."""


KERNELS: dict[str, Kernel] = {kernel.NAME: kernel for kernel in (x86, onednn, reference)}
_forced: str | None = None
_memory: Memory | None = None


def _checked(name: str) -> str:
    if name not in KERNELS:
        raise ValueError(f"kernel: expected one of {tuple(KERNELS)}, got {name!r}.")
    return name


@contextmanager
def use(name: str | None = None, *, memory: Memory | None = None) -> Iterator[None]:
    """Force the kernel `name`, and how it takes memory, for every quantized layer called inside the block.

    With `memory="low"`, no int8 copies of the weights are kept: each call unpacks them, with the same results, in more
    time. With "normal" they are kept, however little memory there is. `None` leaves either as it is outside. A layer
    that the kernel cannot run raises ValueError when it is called, with the layer's reason; so does another word here.
    """
    global _forced, _memory
    before = _forced, _memory
    chosen = _forced if name is None else _checked(name), _memory if memory is None else checked(memory, "memory")
    _forced, _memory = chosen
    try:
        yield
    finally:
        _forced, _memory = before


def keeps_copies(is_short: bool) -> bool:
    """Return whether kernels may keep int8 copies of the weights now, where memory `is_short` or not.

    What `use` forces comes first, then the environment variable PQCAD_MEMORY.
    """
    asked = wanted() if _memory is None else _memory
    return not is_short if asked is None else asked == "normal"


def forced() -> str | None:
    """Return the kernel forced by `use` or by the environment variable PQCAD_KERNEL, or `None`."""
    if _forced is not None:
        return _forced
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _checked(name) if name else None


def needs_gradient(bias: Tensor | None, x: Tensor) -> bool:
    """Return whether autograd will ask this call for a gradient: only the reference kernel has one."""
    if torch.autograd.forward_ad._current_level >= 0:  # inside forward_ad.dual_level(): any tensor may have a tangent
        return True
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


@cache
def warn_of_device(kind: str) -> None:
    """Warn, once for each `kind` of device, that layers are slow there."""
    logger.warning(
        "Quantized layers run on %s, and the int8 kernels are for CPUs. Weights are unpacked in each call there, and "
        "multiplied in floating point: that saves memory, and is slower than full precision. dequantize() gives a "
        "model its speed back.",
        kind,
    )


def by_speed(operation: Operation) -> list[Kernel]:
    """Return all kernels, fastest first: in the order of `KERNELS`, unless another one was measured (on AMX)."""
    found = list(KERNELS.values())
    if measured.is_needed():
        first = measured.fastest(operation)
        found.sort(key=lambda kernel: kernel.NAME != first)
    return found


def fastest(operation: Operation) -> str:
    """Return the name of the fastest kernel that can run `operation` here without a gradient."""
    return next(kernel.NAME for kernel in by_speed(operation) if kernel.refusal(operation) is None)


def refusals(operation: Operation) -> dict[str, Refusal]:
    """Return why each kernel that would be faster than the one for `operation` cannot run it, by the kernel's name."""
    chosen = list(KERNELS).index(fastest(operation))
    found = {name: kernel.refusal(operation) for name, kernel in list(KERNELS.items())[:chosen]}
    return {name: refused for name, refused in found.items() if refused is not None}


def objection(kernel: Kernel, operation: Operation, x: Tensor) -> Refusal | None:
    """Return why `kernel`, which is not the reference, cannot take this call; what it says of the operation apart."""
    if not kernel.accepts(x):
        return Refusal("its input is on another device, traced, or of a class that may keep its numbers elsewhere")
    if needs_gradient(operation.bias, x):
        return Refusal("it has no backward, and this call needs a gradient")
    if isinstance(operation.group, Tensor):  # one scale per call is all that such a kernel takes
        return Refusal("the batch mixes timesteps of several activation ranges")
    return None


def select_kernel(operation: Operation, x: Tensor) -> Kernel:
    """Return the kernel for this call of `operation`: the forced one, else the first that can run it."""
    name, fallback = forced(), KERNELS[reference.NAME]
    if name is None:
        fast = [kernel for kernel in by_speed(operation) if kernel is not fallback and kernel.accepts(x)]
        if not fast and x.device.type not in ("cpu", "meta"):
            warn_of_device(x.device.type)
        if not fast or x.numel() == 0:  # nothing to compute, and float operations know the shape of nothing
            return fallback
        if isinstance(operation.group, Tensor) or needs_gradient(operation.bias, x):
            return fallback
        return next((kernel for kernel in fast if kernel.refusal(operation) is None), fallback)
    kernel = KERNELS[name]
    if kernel is fallback or x.numel() == 0:
        return fallback
    refused = objection(kernel, operation, x) or kernel.refusal(operation)
    if refused is not None:
        raise ValueError(
            f"{operation.name}: the kernel {name!r} was forced, but {refused.reason}. Use 'reference' here."
        )
    return kernel


def summary(operations: list[Operation]) -> str:
    """Return one line that counts the operations by kernel, and says why where a faster one is missing."""
    chosen = Counter(map(fastest, operations))
    refusals = Counter(filter(None, map(reason_to_be_slow, operations)))
    parts = [f"{chosen[name]} of {len(operations)} layers: {name}" for name in KERNELS if chosen[name]]
    parts += [f"{count} on {reference.NAME}: {refusal.reason}" for refusal, count in refusals.items()]
    if any(operation.qweight.is_cpu for operation in operations):
        if not all(operation.keeps_copies for operation in operations):
            parts.append("no int8 copies of the weights are kept, as memory is short or was asked to be saved")
        missing = {name: kernel.absence() for name, kernel in KERNELS.items()}
        parts += [f"{name} would be faster here, but {reason}" for name, reason in missing.items() if reason]
        if cpu.has_amx():
            parts.append(f"this CPU has AMX, {measured.report()}")
    return "; ".join(parts)


def reason_to_be_slow(operation: Operation) -> Refusal | None:
    """Return why `operation` takes the reference kernel; `None` if it does not.

    Of several reasons, one that lies in the computer, as another would run the operation; else the most common one.
    """
    if fastest(operation) != reference.NAME:
        return None
    refusals = Counter(filter(None, (kernel.refusal(operation) for kernel in KERNELS.values())))
    return max(refusals, key=lambda refusal: (refusal.is_of_computer, refusals[refusal]))


def lacks_fast_kernel(operations: list[Operation]) -> bool:
    """Return whether this computer, not the model, is why some of `operations` take the slow kernel."""
    return any(refusal.is_of_computer for refusal in filter(None, map(reason_to_be_slow, operations)))
