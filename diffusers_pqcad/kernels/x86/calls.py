"""Calls of packed layers: what csrc/layers.c is told of one, and how one or several are run on an input."""

import ctypes
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_pqcad.kernels.native import pages, scratch
from diffusers_pqcad.kernels.operation import Operation
from diffusers_pqcad.kernels.x86.geometry import geometry_of
from diffusers_pqcad.kernels.x86.library import compiled
from diffusers_pqcad.kernels.x86.packing import PackedLayer
from diffusers_pqcad.kernels.x86.structs import NO_ADDEND, NO_AFFINE, Addend, Affine, Layer
from diffusers_pqcad.numerics.qparams import ScalarQParams, activation_qmax

NO_RANGE = ScalarQParams(0.0, 0)  # asks for the range of each input


class Up(NamedTuple):
    """The second product of an adapter: `weight` fp32 (C_out, r), of numbers `start` to `stop` of the first ones."""

    weight: Tensor
    scaling: float
    start: int
    stop: int


class Beside(NamedTuple):
    """Products of low rank beside a call, of the same input: `down` gives R numbers a pixel, which `ups` take."""

    down: "Call"
    ups: tuple[Up, ...]


class Call(NamedTuple):
    """What a call of a layer does, as C takes it, and the sizes of what it writes; `keeps` lives as long.

    What lies `beside` it is added to its output, before gates are applied.
    """

    layer: Layer
    size: tuple[int, ...]
    code_bytes: int
    keeps: Any
    beside: Beside | None = None


def call_of(operation: Operation, packed: PackedLayer, size: torch.Size, *, is_doubled: bool = False) -> Call:
    """Return the call of `operation` for an input of `size`, in its timestep group.

    With `is_doubled`, it is a convolution of what nearest upsampling makes of that input (`packing.can_double`).
    """
    assert operation.activation_bits is not None  # refused
    group = None if packed.ranges is None else operation.group
    weights = packed.weights_of(operation, is_doubled=is_doubled)
    of_size = packed.sizes.get((size, is_doubled))
    if of_size is None:
        geometry = geometry_of(operation, size, is_winograd=weights.is_winograd, is_doubled=is_doubled)
        of_size = packed.sizes[size, is_doubled] = geometry, {}
    geometry, by_group = of_size
    known = by_group.get(group)
    if known is None:
        qparams = NO_RANGE
        if packed.ranges is not None:
            assert isinstance(group, int)  # a batch of several groups goes to the reference kernel
            qparams = packed.ranges[group]
        known = by_group[group] = Layer(
            ctypes.addressof(weights.weights),
            None,
            geometry.image,
            geometry.output,
            *qparams,
            activation_qmax(operation.activation_bits),
            0,
        )
    # Detached: it holds the memory, of which a parameter lets go when another thread casts or moves the layer.
    bias = None if operation.bias is None else operation.bias.detach().float().contiguous()
    if bias is not None and (bias.shape != operation.shape[:1] or not bias.is_cpu):  # C would read beyond it
        raise ValueError(
            f"{operation.name}: expected a bias of {tuple(operation.shape[:1])} on the CPU, got one of "
            f"{tuple(bias.shape)} on {bias.device}. It was replaced; give the layer a number for each output."
        )
    own = Layer.from_buffer_copy(known)  # another call, in another thread, may have converted the bias for itself
    own.bias = None if bias is None else bias.data_ptr()
    own.threads = 0 if weights.packed is None else compiled().max_threads()
    return Call(own, geometry.size, compiled().code_bytes(own), bias)


def run_call(
    call: Call,
    x: Tensor,
    affine: Affine = NO_AFFINE,
    addend: Addend = NO_ADDEND,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Return the output of `call` for `x`, fp32 numbers that lie as its image does."""
    return run_calls((call,), x, affine, addend, memory_format)[0]


def run_calls(
    calls: Sequence[Call],
    x: Tensor,
    affine: Affine = NO_AFFINE,
    addend: Addend = NO_ADDEND,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> list[Tensor]:
    """Return the output of each of `calls` for `x`, which is rounded once where neighbours take the same codes.

    Gated ones take no `addend`.
    """
    outputs = [pages.empty(call.size, dtype=torch.float32, memory_format=memory_format) for call in calls]
    adapted = [(call.beside, call, output) for call, output in zip(calls, outputs, strict=True) if call.beside]
    if not adapted:
        write_outputs(calls, x, affine, [addend] * len(calls), outputs)
        return outputs
    downs = [beside.down for beside, _, _ in adapted]
    hidden = [empty_rows(down) for down in downs]
    nothing = [NO_ADDEND] * len(downs)
    if any(call.layer.output.is_gated for call in calls):
        write_outputs(downs, x, affine, nothing, hidden)
        added = [before_gates(beside, rows) for (beside, _, _), rows in zip(adapted, hidden, strict=True)]
        assert len(calls) == len(added)  # the only one of a feed-forward block
        write_outputs(calls, x, affine, [Addend(rows.data_ptr(), 0) for rows in added], outputs)
        return outputs
    write_outputs([*calls, *downs], x, affine, [*[addend] * len(calls), *nothing], [*outputs, *hidden])
    for (beside, _, output), rows in zip(adapted, hidden, strict=True):
        add_products_(rows_of(output), beside, rows)
    return outputs


def write_outputs(
    calls: Sequence[Call], x: Tensor, affine: Affine, addends: Sequence[Addend], outputs: Sequence[Tensor]
) -> None:
    """Write to each of `outputs` what a call makes of `x`, without what lies beside it."""
    count = len(calls)
    codes, pointers = scratch.buffer(max(call.code_bytes for call in calls)), ctypes.c_void_p * count
    layers = pointers(*(ctypes.addressof(call.layer) for call in calls))
    targets = pointers(*(output.data_ptr() for output in outputs))
    added = (Addend * count)(*addends)
    compiled().run_layers(x.data_ptr(), affine, count, layers, added, codes.data_ptr(), targets)
    scratch.give_back(codes)


def empty_rows(call: Call) -> Tensor:
    """Return an empty output of `call`, fp32 (pixels, channels)."""
    channels = call.layer.output.out_channels
    return pages.empty((math.prod(call.size) // channels, channels), dtype=torch.float32)


def rows_of(output: Tensor) -> Tensor:
    """Return a view (pixels, channels) of `output` (..., channels), or of an image (B, channels, H, W), channels_last.

    Raises RuntimeError where it lies in memory in another way: what is added to a copy would be lost.
    """
    pixels = output.permute(0, 2, 3, 1) if output.dim() == 4 else output
    return pixels.view(-1, pixels.shape[-1])


def add_products_(rows: Tensor, beside: Beside, hidden: Tensor) -> None:
    """Add to `rows` fp32 (pixels, C_out) the second products of `beside`, of the first ones, `hidden` (pixels, R)."""
    for up in beside.ups:
        rows.addmm_(hidden[:, up.start : up.stop], up.weight.t(), alpha=up.scaling)


def before_gates(beside: Beside, hidden: Tensor) -> Tensor:
    """Return the second products of `beside`, fp32 (pixels, C_out), of the first ones, `hidden` (pixels, R)."""
    rows = pages.empty((len(hidden), len(beside.ups[0].weight)), dtype=torch.float32).zero_()
    add_products_(rows, beside, hidden)
    return rows
