"""The weights of a layer as csrc/layers.c reads them: blocks of outputs, and windows of sums that cannot overflow.

The blocks are int8 copies of the weights. Where there shall be none, each call unpacks its blocks from the stored
bits, into memory of one block for each thread (csrc/panel.h). Windows, sums and scales are kept in either case, a few
per cent of the copies, so that the numbers that come out are the same.
"""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_pqcad.kernels.native import residency
from diffusers_pqcad.kernels.operation import Operation
from diffusers_pqcad.kernels.x86.library import DEPTH, TILE_SIZE, compiled
from diffusers_pqcad.kernels.x86.recent import Recent
from diffusers_pqcad.kernels.x86.structs import Filters, Packed, Weights
from diffusers_pqcad.numerics.qparams import ScalarQParams, WeightSpec, activation_qmax

MAX_NARROW_BITS = 6  # two steps of the largest levels still fit 16 bits, and sums of three 8
MIN_WINOGRAD_INPUTS = 48  # of a column: with fewer, the transforms cost more than the products that they save
SUM_MAX = 2**15 - 1  # of 16 bits
LEVEL_MAX = 127  # of 8 bits
SLICED_WEIGHTS = 2**22  # copied at once where no copies are kept


class PackedWeights(NamedTuple):
    """The weights of a layer; B blocks of O outputs, S steps of 4 inputs, V windows.

    `weight` int8 (B, S, O, 4), or `None` where calls unpack it from what `packed` points to; `windows` int32 (V, 3)
    and `window_starts` int32 (B + 1,); `level_sum` int32 and `scale` fp32, both (B O,); `weights` points to them, and
    says whether they take signed codes. With `is_winograd`, four blocks are for the same outputs; with `is_doubled`,
    three, once for even and once for odd rows of the output. `keeps` is what else is pointed to.
    """

    weight: Tensor | None
    windows: Tensor
    window_starts: Tensor
    level_sum: Tensor
    scale: Tensor
    weights: Weights
    is_winograd: bool
    is_doubled: bool
    packed: Packed | None = None
    keeps: tuple[Tensor, ...] = ()


class PackedLayer:
    """What does not change from call to call.

    `ranges` are the static activation ranges, `None` where each call chooses its own. `sizes` remembers the latest
    shapes of inputs, and the ranges they came with; `plans`, those of a block that starts with this layer
    (runtime/fusion.py). The weights are packed when they are first needed: few layers take both kinds of images. They
    are copied where it `keeps_copies`.
    """

    def __init__(self, ranges: list[ScalarQParams] | None, *, keeps_copies: bool = True) -> None:
        self.ranges, self.keeps_copies = ranges, keeps_copies
        self.sizes = Recent()  # to (Geometry, a Layer by group)
        self.plans = Recent()
        self.of_kind: dict[bool, PackedWeights] = {}  # by whether their images are doubled
        self.adapter: tuple[Any, Any] | None = None  # what it is for, and what lies beside (runtime/adapters.py)

    def weights_of(self, operation: Operation, *, is_doubled: bool = False) -> PackedWeights:
        """Return the weights of `operation`, whose layer this is, for an image that is doubled (nearest) or not."""
        found = self.of_kind.get(is_doubled)
        if found is None:  # of threads that pack at once, all take the first one's: calls point to it
            packed = (pack_weights if self.keeps_copies else describe_weights)(operation, is_doubled=is_doubled)
            found = self.of_kind.setdefault(is_doubled, packed)
            residency.HEAP.grew(operation.shape.numel())
            if self.keeps_copies:
                residency.give_back_(operation.qweight)
        return found


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not below `number`."""
    return -(-number // multiple) * multiple


def uses_winograd(operation: Operation) -> bool:
    """Return whether two neighbouring pixels of `operation` are computed from four products, not six: F(2, 3)."""
    geometry = operation.geometry
    if geometry is None or operation.shape[3] != 3 or geometry.stride[1] != 1 or geometry.dilation[1] != 1:
        return False
    return operation.shape[1:3].numel() >= MIN_WINOGRAD_INPUTS and bool(compiled().has_vnni())


def can_double(operation: Operation) -> bool:
    """Return whether `operation` can be packed for the doubled image of nearest upsampling: a 3x3 kernel, padded."""
    geometry = operation.geometry
    if geometry is None or geometry.padding_mode != "zeros" or geometry.groups != 1 or operation.shape[2:] != (3, 3):
        return False
    return geometry[:3] == ((1, 1), (1, 1), (1, 1)) and uses_winograd(operation)


def pack_filters(
    levels: Tensor, scale: Tensor, *, is_winograd: bool, is_doubled: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return weight, level sums and scales, as `PackedWeights` has them, of `levels` int8 (O, C, H, W), `scale` (O,).

    The last tensor, fp32 and of the scales' shape, is what the transformed filters were divided by to fit 8 bits.
    `is_winograd`: as the transformed filters of F(2, 3); `is_doubled`: as those for a doubled image, too, of which two
    rows add up. What overflows 8 bits is rounded to them (`pack_output` in the C file).
    """
    size, outputs = levels.shape, compiled().block_outputs()
    levels, scale = levels.contiguous(), scale.float().contiguous()
    padded = round_up(size[1], DEPTH)
    filters = Filters(levels.data_ptr(), scale.data_ptr(), *size, padded, is_winograd, is_doubled)
    blocks = round_up(size[0], outputs) // outputs * blocks_for_outputs(is_winograd=is_winograd, is_doubled=is_doubled)
    steps = (2 if is_doubled else size[2]) * (1 if is_winograd else size[3]) * padded // DEPTH
    weight = residency.empty((blocks, steps, outputs, DEPTH), torch.int8)
    level_sum = torch.empty(blocks * outputs, dtype=torch.int32, device="cpu")
    scales, divisors = torch.empty(2, blocks * outputs, dtype=torch.float32, device="cpu")
    targets = (weight, level_sum, scales, divisors)
    compiled().pack_filters(filters, *(target.data_ptr() for target in targets))
    return targets


def elements_of(*, is_doubled: bool) -> int:
    """Return the elements of a Winograd tile."""
    return TILE_SIZE - is_doubled


def blocks_for_outputs(*, is_winograd: bool, is_doubled: bool) -> int:
    """Return how many blocks are for the same outputs: those of all elements, for both phases of a doubled image."""
    return elements_of(is_doubled=is_doubled) * (2 if is_doubled else 1) if is_winograd else 1


def pack(operation: Operation) -> PackedLayer:
    """Return what a call needs of a layer: the static activation ranges as plain numbers, no weights yet."""
    return PackedLayer(operation.static_ranges(), keeps_copies=operation.keeps_copies)


def pack_weights(operation: Operation, *, is_doubled: bool) -> PackedWeights:
    """Return the weights in blocks and their windows."""
    is_winograd = uses_winograd(operation)
    weight, windows, window_starts, level_sum, scale, _ = blocks_of(
        operation, is_winograd=is_winograd, is_doubled=is_doubled
    )
    shift_windows_(windows, window_starts, operation, is_winograd=is_winograd, is_doubled=is_doubled)
    tensors = (weight, windows, window_starts, level_sum, scale)
    weights = Weights(*(tensor.data_ptr() for tensor in tensors), weight.shape[1], is_signed(operation), None)
    return PackedWeights(*tensors, weights, is_winograd, is_doubled)


def describe_weights(operation: Operation, *, is_doubled: bool) -> PackedWeights:
    """Return what `pack_weights` does but the blocks, which calls unpack from the packed weights, to the same bytes.

    They are made here some outputs at a time, for their windows and sums.
    """
    is_winograd, rows = uses_winograd(operation), len(operation.qweight)
    outputs, length = compiled().block_outputs(), operation.shape[1:].numel()
    # Of a doubled image, the blocks of all outputs come before those of the second phase.
    sliced = rows if is_doubled else max(1, SLICED_WEIGHTS // (length * outputs)) * outputs
    found = [
        blocks_of(rows_of(operation, start, start + sliced), is_winograd=is_winograd, is_doubled=is_doubled)[1:]
        for start in range(0, rows, sliced)
    ]
    windows, counts, level_sum, scale, divisors = (
        torch.cat(parts) for parts in zip(*((w, starts.diff(), *rest) for w, starts, *rest in found), strict=True)
    )
    window_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0, dtype=torch.int32)])
    shift_windows_(windows, window_starts, operation, is_winograd=is_winograd, is_doubled=is_doubled)
    packed, keeps = packed_of(operation, divisors, is_winograd=is_winograd, is_doubled=is_doubled)
    tensors = (windows, window_starts, level_sum, scale)
    filters = packed.filters
    steps = (2 if is_doubled else filters.height) * (1 if is_winograd else filters.width) * filters.padded_channels
    addresses = (None, *(tensor.data_ptr() for tensor in tensors))
    weights = Weights(*addresses, steps // DEPTH, is_signed(operation), ctypes.addressof(packed))
    return PackedWeights(None, *tensors, weights, is_winograd, is_doubled, packed, keeps)


def blocks_of(
    operation: Operation, *, is_winograd: bool, is_doubled: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return weight, windows, window starts, level sums, scales, and what `pack_filters` returns last.

    They are as `PackedWeights` has them, but the windows of elements do not follow each other yet.
    """
    assert operation.activation_bits is not None  # refused
    levels, scale = operation.channel_levels()
    levels = levels.view(*levels.shape, 1, 1) if levels.dim() == 2 else levels
    dilation = (1, 1) if operation.geometry is None else operation.geometry.dilation
    channels = round_up(levels.shape[1], DEPTH)
    weight, level_sum, scale, divisors = pack_filters(levels, scale, is_winograd=is_winograd, is_doubled=is_doubled)
    fits = bool(compiled().has_vnni()) or is_signed(operation)
    limit = torch.iinfo(torch.int32).max if fits else SUM_MAX // activation_qmax(operation.activation_bits)
    height, width = levels.shape[2:]
    segments = segment_starts(2 if is_doubled else height, 1 if is_winograd else width, channels, dilation)
    windows, window_starts = plan_windows(weight, segments, limit)
    return weight, windows, window_starts, level_sum, scale, divisors


def is_signed(operation: Operation) -> bool:
    """Return whether the products of `operation` take signed codes: without VNNI, at 8 bits."""
    return operation.channel_bits() > MAX_NARROW_BITS and not compiled().has_vnni()


def shift_windows_(
    windows: Tensor, window_starts: Tensor, operation: Operation, *, is_winograd: bool, is_doubled: bool
) -> None:
    """Let the windows of each element of a Winograd tile start where its codes do."""
    if not is_winograd:
        return
    block, counts = torch.arange(len(window_starts) - 1, dtype=torch.int32, device="cpu"), window_starts.diff()
    element = block % elements_of(is_doubled=is_doubled)
    channels = round_up(operation.shape[1], DEPTH)
    windows[:, 1] += (element * channels).repeat_interleave(counts)  # its codes follow the others'
    if is_doubled:  # odd rows of the output start at the next row of codes
        windows[:, 0] += (block >= len(block) // 2).int().repeat_interleave(counts)


def rows_of(operation: Operation, start: int, stop: int) -> Operation:
    """Return `operation` with the outputs from `start` to `stop` alone."""
    qweight, scale = operation.qweight[start:stop], operation.weight_scale[start:stop]
    return operation._replace(
        shape=torch.Size((len(qweight), *operation.shape[1:])), qweight=qweight, weight_scale=scale
    )


def channel_scale(operation: Operation) -> Tensor:
    """Return the scales (O,) of `channel_levels`, of which there are some at a time."""
    if operation.weight_scale.shape[1] == 1:
        return operation.weight_scale.detach().float().flatten().contiguous()
    rows = max(1, SLICED_WEIGHTS // operation.shape[1:].numel())
    starts = range(0, len(operation.qweight), rows)
    return torch.cat([rows_of(operation, start, start + rows).channel_levels()[1] for start in starts])


def packed_of(
    operation: Operation, divisors: Tensor, *, is_winograd: bool, is_doubled: bool
) -> tuple[Packed, tuple[Tensor, ...]]:
    """Return the stored weights of `operation` for C to unpack, and the tensors that it points to."""
    outputs, channels, *kernel = operation.shape
    height, width = kernel or (1, 1)
    qweight = operation.qweight.detach().contiguous()
    group_scale = operation.weight_scale.detach().float().contiguous()
    scale = channel_scale(operation)
    sizes = (outputs, channels, height, width, round_up(channels, DEPTH), is_winograd, is_doubled)
    addends = 3 * (2 if is_doubled else 1) if is_winograd else 1  # levels that an element adds up
    level_max = WeightSpec(operation.channel_bits()).level_max
    packed = Packed(
        qweight.data_ptr(),
        group_scale.data_ptr(),
        divisors.data_ptr(),
        Filters(None, scale.data_ptr(), *sizes),
        qweight.shape[1],
        operation.spec.bits,
        group_scale.shape[1],
        addends * level_max > LEVEL_MAX,
    )
    return packed, (qweight, group_scale, scale, divisors)


def num_bytes(operation: Operation, packed: PackedLayer) -> int:
    """Return the bytes of the int8 copies of the weights: one a weight, and 4/3 where filters are transformed.

    What is padded, and some numbers for each output, are not counted.
    """
    if not packed.keeps_copies:
        return 0
    kinds = packed.of_kind.copy().values()  # at once: another thread may pack the weights for another kind of image
    return sum(operation.shape.numel() * (TILE_SIZE if weights.is_winograd else 3) // 3 for weights in kinds)


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
