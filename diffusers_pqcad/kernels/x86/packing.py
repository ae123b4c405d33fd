"""The weights of a layer as csrc/layers.c reads them: blocks of outputs, and windows of sums that cannot overflow."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_pqcad.kernels.operation import Operation
from diffusers_pqcad.kernels.x86.library import DEPTH, TILE_SIZE, compiled
from diffusers_pqcad.kernels.x86.recent import Recent
from diffusers_pqcad.kernels.x86.structs import Filters, Weights
from diffusers_pqcad.numerics.qparams import ScalarQParams, activation_qmax

MAX_NARROW_BITS = 6  # two steps of the largest levels still fit 16 bits, and sums of three 8
MIN_WINOGRAD_INPUTS = 48  # of a column: with fewer, the transforms cost more than the products that they save
SUM_MAX = 2**15 - 1  # of 16 bits


class PackedLayer(NamedTuple):
    """What does not change from call to call; B blocks of O outputs, S steps of 4 inputs, V windows.

    `weight` int8 (B, S, O, 4); `windows` int32 (V, 3) and `window_starts` int32 (B + 1,); `level_sum` int32 and
    `scale` fp32, both (B O,); `weights` points to them, and says whether they take signed codes. With `is_winograd`,
    four blocks are for the same outputs. `ranges` are the static activation ranges, `None` where each call chooses its
    own. `sizes` remembers the latest shapes of inputs, and the ranges they came with; `plans`, those of a block that
    starts with this layer (runtime/fusion.py).
    """

    weight: Tensor
    windows: Tensor
    window_starts: Tensor
    level_sum: Tensor
    scale: Tensor
    weights: Weights
    is_winograd: bool
    ranges: list[ScalarQParams] | None
    sizes: Recent  # to (Geometry, a Layer by group)
    plans: Recent


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not below `number`."""
    return -(-number // multiple) * multiple


def uses_winograd(operation: Operation) -> bool:
    """Return whether two neighbouring pixels of `operation` are computed from four products, not six: F(2, 3)."""
    geometry = operation.geometry
    if geometry is None or operation.shape[3] != 3 or geometry.stride[1] != 1 or geometry.dilation[1] != 1:
        return False
    return operation.shape[1:3].numel() >= MIN_WINOGRAD_INPUTS and bool(compiled().has_vnni())


def pack_filters(levels: Tensor, scale: Tensor, *, is_winograd: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return weight, level sums and scales, as `PackedLayer` has them, of `levels` int8 (O, C, H, W) and `scale` (O,).

    `is_winograd`: as the transformed filters of F(2, 3), of which those that overflow 8 bits are rounded to them
    (`transform_filter` in the C file).
    """
    size, outputs = levels.shape, compiled().block_outputs()
    levels, scale = levels.contiguous(), scale.float().contiguous()
    filters = Filters(levels.data_ptr(), scale.data_ptr(), *size, round_up(size[1], DEPTH), is_winograd)
    blocks = round_up(size[0], outputs) // outputs * (TILE_SIZE if is_winograd else 1)
    steps = size[2] * (1 if is_winograd else size[3]) * filters.padded_channels // DEPTH
    weight = torch.empty(blocks, steps, outputs, DEPTH, dtype=torch.int8, device="cpu")
    level_sum = torch.empty(blocks * outputs, dtype=torch.int32, device="cpu")
    scales = torch.empty(blocks * outputs, dtype=torch.float32, device="cpu")
    compiled().pack_filters(filters, weight.data_ptr(), level_sum.data_ptr(), scales.data_ptr())
    return weight, level_sum, scales


def pack(operation: Operation) -> PackedLayer:
    """Return the weights in blocks and their windows, and the static activation ranges as plain numbers."""
    assert operation.activation_bits is not None  # refused
    levels, scale = operation.channel_levels()
    levels = levels.view(*levels.shape, 1, 1) if levels.dim() == 2 else levels
    dilation = (1, 1) if operation.geometry is None else operation.geometry.dilation
    is_winograd, channels = uses_winograd(operation), round_up(levels.shape[1], DEPTH)
    weight, level_sum, scale = pack_filters(levels, scale, is_winograd=is_winograd)
    has_vnni = bool(compiled().has_vnni())
    is_signed = operation.channel_bits() > MAX_NARROW_BITS and not has_vnni
    fits = has_vnni or is_signed
    limit = torch.iinfo(torch.int32).max if fits else SUM_MAX // activation_qmax(operation.activation_bits)
    height, width = levels.shape[2:]
    segments = segment_starts(height, 1 if is_winograd else width, channels, dilation)
    windows, window_starts = plan_windows(weight, segments, limit)
    if is_winograd:
        element = torch.arange(len(weight), dtype=torch.int32, device="cpu") % TILE_SIZE
        windows[:, 1] += (element * channels).repeat_interleave(window_starts.diff())  # its codes follow the others'
    tensors = (weight, windows, window_starts, level_sum, scale)
    weights = Weights(*(tensor.data_ptr() for tensor in tensors), weight.shape[1], is_signed)
    return PackedLayer(*tensors, weights, is_winograd, operation.static_ranges(), Recent(), Recent())


def num_bytes(operation: Operation, packed: PackedLayer) -> int:
    """Return the bytes of the int8 copy of the weights: one a weight, and 4/3 where filters are transformed.

    What is padded, and some numbers for each output, are not counted.
    """
    return operation.shape.numel() * (TILE_SIZE if packed.is_winograd else 3) // 3


def segment_starts(height: int, width: int, channels: int, dilation: tuple[int, ...]) -> Tensor:
    """Return int32 (K, 3): from which row and byte of a receptive field (height, width, C) on it is consecutive."""
    columns = range(1) if dilation[1] == 1 else range(width)
    starts = [(y * dilation[0], x * dilation[1] * channels, 0) for y in range(height) for x in columns]
    return torch.tensor(starts, dtype=torch.int32, device="cpu")


def plan_windows(weight: Tensor, segments: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return windows int32 (V, 3) and their starts int32 (B + 1,) for `weight` int8 (B, S, O, 4).

    A window is (row, byte, steps); it does not cross a segment, of which each has S / K steps. In no window do the
    positive or the negative levels of a 16-bit sum add up to more than `limit`; a single step must fit it.
    """
    blocks, steps = weight.shape[:2]
    windows = torch.empty(blocks * steps, 3, dtype=torch.int32, device="cpu")
    starts = torch.empty(blocks + 1, dtype=torch.int32, device="cpu")
    count = compiled().plan_windows(
        weight.data_ptr(), blocks, steps, steps // len(segments), segments.data_ptr(), limit, windows.data_ptr(),
        starts.data_ptr(),
    )  # fmt: skip
    return windows[:count].clone(), starts
