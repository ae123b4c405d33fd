"""int8 convolution and linear on CPUs with AVX2 and no VNNI: exact, and faster than oneDNN.

Without VNNI, one instruction multiplies 32 codes by 32 levels and adds neighbours in 16 bits, another widens the sums.
Levels of up to 6 bits let several products add up in 16 bits before they are widened: 9 where all are as large as 4
bits allow, and 20 to 60 for the levels that layers have. The windows are cut from the levels themselves, so that no
input can overflow them. Levels of 8 bits take signed codes, which fit as single products. The code is C (avx2.c),
compiled on first use.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_pqcad.kernels import native, onednn, ranges
from diffusers_pqcad.pending import PendingActivation
from diffusers_pqcad.qparams import ScalarQParams, activation_qmax, scalar_qparams

if TYPE_CHECKING:
    from diffusers_pqcad.layers import QuantizedLayer

NAME = "avx2"
SOURCE = Path(__file__).with_name("avx2.c")
OUTPUTS, DEPTH = 16, 4  # of a block of weights, as in the C file
MAX_NARROW_BITS = 6  # two steps of the largest levels still fit 16 bits
SUM_MAX = 2**15 - 1  # of 16 bits
SIGNED_OFFSET = 128  # what signed codes are less
HAS_VNNI = "this CPU has VNNI, which needs no 16-bit sums"


class Pointer(ctypes.c_void_p):
    """Where the numbers of a tensor lie, or NULL for `None`."""

    @classmethod
    def from_param(cls, tensor: Tensor | None) -> ctypes.c_void_p:  # type: ignore[override]
        """Return the address for a call."""
        return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


class Image(ctypes.Structure):
    """The input: as `Image` in the C file."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("images", "height", "width", "channels", "border_y", "border_x", "padded_channels")
    ]

    def num_codes(self) -> int:
        """Return the number of codes, with the border and the padded channels."""
        height, width = self.height + 2 * self.border_y, self.width + 2 * self.border_x
        return self.images * height * width * self.padded_channels


class Output(ctypes.Structure):
    """The output: as `Output` in the C file."""

    _fields_ = [(name, ctypes.c_int64) for name in ("out_height", "out_width", "out_channels", "stride_y", "stride_x")]


class Affine(ctypes.Structure):
    """A map before SiLU and rounding: as `Affine` in the C file; NULL where there is none."""

    _fields_ = [("gain", ctypes.c_void_p), ("shift", ctypes.c_void_p)]


class PackedLayer(NamedTuple):
    """What does not change from call to call; B blocks of 16 outputs, S steps of 4 inputs, V windows.

    `weight` int8 (B, S, 16, 4); `is_signed`: whether it takes signed codes; `windows` int32 (V, 3) and `window_starts`
    int32 (B + 1,); `level_sum` int32 and `scale` fp32, both (16 B,); `ranges` are the static activation ranges, `None`
    where each call chooses its own.
    """

    weight: Tensor
    is_signed: bool
    windows: Tensor
    window_starts: Tensor
    level_sum: Tensor
    scale: Tensor
    ranges: list[ScalarQParams] | None


@cache
def library() -> ctypes.CDLL | str:
    """Return the compiled C file, or why there is none on this computer."""
    loaded = native.library(SOURCE)
    if isinstance(loaded, str):
        return loaded
    integer, long, number = ctypes.c_int, ctypes.c_int64, ctypes.c_float
    loaded.normalize.argtypes = [Pointer, Image, long, Pointer, Pointer, ctypes.c_double, Pointer, Pointer]
    loaded.find_range.argtypes = [Pointer, Image, Affine, ctypes.POINTER(number), ctypes.POINTER(number)]
    loaded.quantize.argtypes = [Pointer, Image, Affine, number, integer, integer, integer, Pointer]
    loaded.normalize.restype = loaded.find_range.restype = loaded.quantize.restype = None
    loaded.multiply.argtypes = [Pointer, integer, Image, Output, Pointer, long, Pointer, Pointer, number, integer]
    loaded.multiply.argtypes += [Pointer] * 4
    loaded.multiply.restype = None
    loaded.plan_windows.argtypes = [Pointer, long, long, long, Pointer, integer, Pointer, Pointer]
    loaded.plan_windows.restype = long
    return loaded


def compiled() -> ctypes.CDLL:
    """Return the compiled C file, where `refusal` found it."""
    found = library()
    assert not isinstance(found, str)
    return found


def refusal(layer: "QuantizedLayer") -> str | None:
    """Return why this kernel cannot run `layer` on this computer, or `None`."""
    if layer.qweight.device.type != "cpu":
        return f"its weights are on {layer.qweight.device.type}, and this kernel is for CPUs"
    if layer.activation_bits is None:
        return "its activations stay in floating point"
    if isinstance(layer, nn.Conv2d):
        if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
            return f"padding {layer.padding!r} in mode {layer.padding_mode!r} is not supported"
        if layer.groups > 1:
            return "it is a convolution in groups"
    if onednn.available() and not onednn.saturates():
        return HAS_VNNI
    loaded = library()
    return loaded if isinstance(loaded, str) else None


def is_wide(layer: "QuantizedLayer") -> bool:
    """Return whether the levels of `layer` have 8 bits; rows of several scales are re-quantized to so many."""
    return layer.spec.bits > MAX_NARROW_BITS or layer.weight_scale.shape[1] > 1


def round_up(number: int, multiple: int) -> int:
    """Return the smallest multiple that is not below `number`."""
    return -(-number // multiple) * multiple


def pack(layer: "QuantizedLayer") -> PackedLayer:
    """Return the weights in blocks and their windows, and the static activation ranges as plain numbers."""
    assert layer.activation_bits is not None  # refused
    levels, scale = layer.channel_levels()
    dilation = layer.dilation if isinstance(layer, nn.Conv2d) else (1, 1)
    rows = levels.view(*levels.shape, 1, 1) if levels.dim() == 2 else levels
    rows = rows.permute(0, 2, 3, 1)  # as the inputs lie: height, width, C
    channels = round_up(rows.shape[-1], DEPTH)
    surplus = round_up(len(rows), OUTPUTS) - len(rows)
    rows = F.pad(rows, (0, channels - rows.shape[-1], 0, 0, 0, 0, 0, surplus))
    weight = rows.reshape(-1, OUTPUTS, rows[0].numel() // DEPTH, DEPTH).transpose(1, 2).contiguous()
    is_signed = is_wide(layer)
    limit = torch.iinfo(torch.int32).max if is_signed else SUM_MAX // activation_qmax(layer.activation_bits)
    segments = segment_starts(rows.shape[1:], dilation)
    windows, window_starts = plan_windows(weight, segments, limit)
    level_sum = rows.sum((1, 2, 3), dtype=torch.int32)
    static = ranges.static_ranges(layer)
    return PackedLayer(weight, is_signed, windows, window_starts, level_sum, F.pad(scale, (0, surplus)), static)


def segment_starts(shape: torch.Size, dilation: tuple[int, ...]) -> Tensor:
    """Return int32 (K, 3): from which row and byte of a receptive field (height, width, C) on it is consecutive."""
    height, width, channels = shape
    columns = range(1) if dilation[1] == 1 else range(width)
    starts = [(y * dilation[0], x * dilation[1] * channels, 0) for y in range(height) for x in columns]
    return torch.tensor(starts, dtype=torch.int32)


def plan_windows(weight: Tensor, segments: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return windows int32 (V, 3) and their starts int32 (B + 1,) for `weight` int8 (B, S, 16, 4).

    A window is (row, byte, steps); it does not cross a segment, of which each has S / K steps. In no window do the
    positive or the negative levels of a 16-bit sum add up to more than `limit`; a single step must fit it.
    """
    blocks, steps = weight.shape[:2]
    windows = torch.empty(blocks * steps, 3, dtype=torch.int32)
    starts = torch.empty(blocks + 1, dtype=torch.int32)
    count = compiled().plan_windows(weight, blocks, steps, steps // len(segments), segments, limit, windows, starts)
    return windows[:count].clone(), starts


def conv_geometry(layer: nn.Conv2d, x: Tensor) -> tuple[Image, Output]:
    """Return the geometry of a convolution of `x` (N, C, H, W)."""
    assert not isinstance(layer.padding, str)  # refused
    height, width = (
        (x.shape[axis + 2] + 2 * layer.padding[axis] - layer.dilation[axis] * (layer.kernel_size[axis] - 1) - 1)
        // layer.stride[axis]
        + 1
        for axis in range(2)
    )
    image = Image(len(x), *x.shape[2:], layer.in_channels, *layer.padding, round_up(layer.in_channels, DEPTH))
    return image, Output(height, width, layer.out_channels, *layer.stride)


def linear_geometry(layer: nn.Linear, x: Tensor) -> tuple[Image, Output]:
    """Return the geometry of a matrix product with `x` (..., K): each row is an image of one pixel."""
    rows = x.numel() // layer.in_features
    image = Image(rows, 1, 1, layer.in_features, 0, 0, round_up(layer.in_features, DEPTH))
    return image, Output(1, 1, layer.out_features, 1, 1)


def normalization(norm: nn.GroupNorm, x: Tensor, image: Image) -> tuple[Tensor, Tensor]:
    """Return the gain and the shift fp32 (B, C) that are the group norm of `x`."""
    gain, shift = torch.empty(2, image.images, image.channels)
    compiled().normalize(x, image, norm.num_groups, norm.weight, norm.bias, norm.eps, gain, shift)
    return gain, shift


def dynamic_range(x: Tensor, image: Image, affine: Affine, bits: int) -> ScalarQParams:
    """Return the qparams of the range of `x`, after `affine` and SiLU."""
    least, largest = ctypes.c_float(), ctypes.c_float()
    compiled().find_range(x, image, affine, least, largest)
    return scalar_qparams(least.value, largest.value, bits)


def run(layer: "QuantizedLayer", packed: PackedLayer, x: Tensor) -> Tensor:
    """Return the int8 operation's output in the dtype of `x`; convolutions return channels_last."""
    pending = x if isinstance(x, PendingActivation) else None
    if pending is not None:
        x = pending.source if pending.has_silu and pending.computed is None else pending.value()
    if isinstance(layer, nn.Conv2d):
        dense = (x if x.dim() == 4 else x.unsqueeze(0)).float().contiguous(memory_format=torch.channels_last)
        image, shape = conv_geometry(layer, dense)
        size = (len(dense), layer.out_channels, shape.out_height, shape.out_width)
        output = torch.empty(size, memory_format=torch.channels_last)
    else:
        assert isinstance(layer, nn.Linear)
        dense = x.float().contiguous()
        image, shape = linear_geometry(layer, dense)
        output = torch.empty(*x.shape[:-1], layer.out_features)
    affine = Affine()
    if pending is not None and x is pending.source:
        gain, shift = normalization(pending.norm, dense, image)
        affine = Affine(gain.data_ptr(), shift.data_ptr())
    multiply(layer, packed, dense, image, affine, shape, output)
    return (output if output.dim() == x.dim() else output.squeeze(0)).to(x.dtype)


def multiply(
    layer: "QuantizedLayer",
    packed: PackedLayer,
    x: Tensor,
    image: Image,
    affine: Affine,
    shape: Output,
    output: Tensor,
) -> None:
    """Write to `output` what `layer` makes of `x`, after `affine` and SiLU where there is a map."""
    assert layer.activation_bits is not None  # refused
    if packed.ranges is None:
        qparams = dynamic_range(x, image, affine, layer.activation_bits)
    else:
        qparams = ranges.current_range(layer, packed.ranges)
    codes = torch.empty(image.num_codes(), dtype=torch.uint8)
    qmax = activation_qmax(layer.activation_bits)
    compiled().quantize(x, image, affine, 1.0 / qparams.scale, qparams.zero_point, qmax, packed.is_signed, codes)
    zero_point = qparams.zero_point - SIGNED_OFFSET * packed.is_signed
    bias = None if layer.bias is None else layer.bias.float()
    compiled().multiply(
        codes, packed.is_signed, image, shape, packed.weight, packed.weight.shape[1], packed.windows,
        packed.window_starts, qparams.scale, zero_point, packed.level_sum, packed.scale, bias, output,
    )  # fmt: skip
