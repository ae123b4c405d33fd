"""Kernels: how a quantized layer computes on this computer. Never saved; chosen per layer and call.

A kernel is a module with `NAME`, `refusal(layer)` (why it cannot run this layer here, or `None`), `pack(layer)` (what
it keeps beside the packed weights, until they or the activation ranges change) and `run(layer, packed, x)`. `KERNELS`
lists them, fastest first; `reference` can run everything and is the oracle for the others. `x86` also computes whole
blocks (fused.py); weights.py is for all.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from diffusers_pqcad.kernels import native, onednn, reference, x86

if TYPE_CHECKING:
    from diffusers_pqcad.layers.quantized import QuantizedLayer

ENVIRONMENT_VARIABLE = "PQCAD_KERNEL"

logger = logging.getLogger(__name__)


class Kernel(Protocol):
    """What a kernel module offers; see the docstring of this file."""

    NAME: str

    def refusal(self, layer: "QuantizedLayer") -> str | None:
        """Return why this kernel cannot run `layer` on this computer, or `None`."""

    def pack(self, layer: "QuantizedLayer") -> Any:
        """Return the kernel's own form of the weights and static ranges of `layer`: a cache, rebuilt when lost."""

    def run(self, layer: "QuantizedLayer", packed: Any, x: Tensor) -> Tensor:
        """Return the output of `layer` for `x`; `packed` is what `pack` returned."""


KERNELS: dict[str, Kernel] = {kernel.NAME: kernel for kernel in (x86, onednn, reference)}
_forced: str | None = None


def _checked(name: str) -> str:
    if name not in KERNELS:
        raise ValueError(f"kernel: expected one of {tuple(KERNELS)}, got {name!r}.")
    return name


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force the kernel `name` for every quantized layer called inside the block.

    A layer that the kernel cannot run raises ValueError when it is called, with the layer's reason.
    """
    global _forced
    before, _forced = _forced, _checked(name)
    try:
        yield
    finally:
        _forced = before


def forced() -> str | None:
    """Return the kernel forced by `use` or by the environment variable PQCAD_KERNEL, or `None`."""
    if _forced is not None:
        return _forced
    name = os.environ.get(ENVIRONMENT_VARIABLE)
    return _checked(name) if name else None


def needs_gradient(layer: "QuantizedLayer", x: Tensor) -> bool:
    """Return whether autograd will ask this call for a gradient: only the reference kernel has one."""
    if torch.autograd.forward_ad._current_level >= 0:  # inside forward_ad.dual_level(): any tensor may have a tangent
        return True
    bias = layer.bias
    return torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))


def has_numbers(x: Tensor) -> bool:
    """Return whether the numbers of `x` lie in the CPU's memory: not in a graph's, nor in a subclass of tensors."""
    return type(x) in (Tensor, nn.Parameter) and x.is_cpu and not torch.jit.is_tracing()


@cache
def warn_of_device(kind: str) -> None:
    """Warn, once for each `kind` of device, that layers are slow there."""
    logger.warning(
        "Quantized layers run on %s, and the int8 kernels are for CPUs. Weights are unpacked in each call there, and "
        "multiplied in floating point: that saves memory, and is slower than full precision. dequantize() gives a "
        "model its speed back.",
        kind,
    )


def select_kernel(layer: "QuantizedLayer", x: Tensor) -> Kernel:
    """Return the kernel for this call of `layer`: the forced one, else the first that can run it."""
    name = forced()
    if name is None and not has_numbers(x):
        if x.device.type not in ("cpu", "meta"):
            warn_of_device(x.device.type)
        return KERNELS[reference.NAME]
    if x.numel() == 0:
        return KERNELS[reference.NAME]  # nothing to compute, and float operations know the shape of nothing
    mixed_timesteps = isinstance(layer.input_group(), Tensor)
    if name is None:
        # One scale per call is all that an int8 kernel takes, and none of them has a backward.
        if mixed_timesteps or needs_gradient(layer, x):
            return KERNELS[reference.NAME]
        return KERNELS[layer.kernel_name()]
    if name != reference.NAME:
        reason = layer.refusal(name)
        if needs_gradient(layer, x):
            reason = "it has no backward, and this call needs a gradient"
        elif mixed_timesteps:
            reason = "the batch mixes timesteps of several activation ranges"
        elif not has_numbers(x):
            reason = "its input is on another device, traced, or of a class that may keep its numbers elsewhere"
        if reason is not None:
            raise ValueError(f"{layer.name}: the kernel {name!r} was forced, but {reason}. Use 'reference' here.")
    return KERNELS[name]


def summary(layers: "list[QuantizedLayer]") -> str:
    """Return one line that counts the layers by kernel, and says why where a faster one is missing."""
    chosen = Counter(layer.kernel_name() for layer in layers)
    slow = [layer for layer in layers if layer.kernel_name() == reference.NAME]
    reasons = Counter(reason for layer in slow if (reason := layer.refusal(onednn.NAME)) is not None)
    parts = [f"{chosen[name]} of {len(layers)} layers: {name}" for name in KERNELS if chosen[name]]
    parts += [f"{count} on {reference.NAME}: {reason}" for reason, count in reasons.items()]
    missing = x86.library() if any(layer.qweight.is_cpu for layer in layers) else None
    if isinstance(missing, str) and missing != native.NOT_HERE:
        parts.append(f"{x86.NAME} would be faster here, but {missing}")
    return "; ".join(parts)


def lacks_fast_kernel(layers: "list[QuantizedLayer]") -> bool:
    """Return whether this computer, not the model, is why some of `layers` take the slow kernel."""
    slow = [layer for layer in layers if layer.kernel_name() == reference.NAME]
    return any(layer.refusal(onednn.NAME) in (onednn.NO_OPERATORS, onednn.NO_VNNI) for layer in slow)
