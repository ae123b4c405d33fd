"""Calls of packed layers: what csrc/layers.c is told of one, and how one or several are run on an input."""

import ctypes
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


class Call(NamedTuple):
    """What a call of a layer does, as C takes it, and the sizes of what it writes; `keeps` lives as long."""

    layer: Layer
    size: tuple[int, ...]
    code_bytes: int
    keeps: Any


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
    """Return the output of each of `calls` for `x`, which is rounded once where neighbours take the same codes."""
    outputs = [pages.empty(call.size, dtype=torch.float32, memory_format=memory_format) for call in calls]
    codes, pointers = scratch.buffer(max(call.code_bytes for call in calls)), ctypes.c_void_p * len(calls)
    layers = pointers(*(ctypes.addressof(call.layer) for call in calls))
    targets = pointers(*(output.data_ptr() for output in outputs))
    compiled().run_layers(x.data_ptr(), affine, len(calls), layers, addend, codes.data_ptr(), targets)
    scratch.give_back(codes)
    return outputs
