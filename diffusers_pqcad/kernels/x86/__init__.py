"""int8 convolution and linear on x86 CPUs, in C (csrc/), compiled on first use: exact sums, faster than oneDNN's.

With VNNI, one instruction multiplies 64 codes by 64 levels (AVX-512) or 32 by 32 (AVX, as in laptops) and adds them up
in 32 bits. With AVX2 alone, one multiplies 32 and adds neighbours in 16 bits, another widens the sums. There levels of
up to 6 bits let several products add up in 16 bits before they are widened: 9 where all are as large as 4 bits allow,
and more for the levels that layers have. The windows are cut from the levels themselves, so that no input can overflow
them. Levels of 8 bits take signed codes, which fit as single products.

With VNNI, convolutions three pixels wide take two thirds of the products, by Winograd's minimal filtering (Lavin and
Gray 2016, arXiv:1509.09308), which adds and subtracts neighbouring codes. Few sums and differences overflow 8 bits, as
activations are large in few places: the overflow is listed, and its products are added. Codes of 7 bits have none.
This is exact for levels of up to 6 bits with a scale for each output; filters of 8 bits are rounded once more.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusers_pqcad.kernels import native, onednn
from diffusers_pqcad.kernels.native import scratch
from diffusers_pqcad.kernels.native.layout import check_layout
from diffusers_pqcad.kernels.operation import ConvGeometry, Operation, is_in_memory
from diffusers_pqcad.kernels.x86.recent import Recent
from diffusers_pqcad.numerics.qparams import MIN_SCALE, ScalarQParams, activation_qmax

NAME = "x86"
FUSES = frozenset(("residual", "attention", "feed_forward", "transformer"))  # blocks, as the runtime names them
MEMORY_FORMAT = torch.channels_last  # of its convolutions
SOURCE = native.CSRC / "layers.c"
DEPTH = 4  # inputs of a step, as in the C file
TILE_SIZE = 4  # elements of a Winograd tile, as in the C file
MAX_NARROW_BITS = 6  # two steps of the largest levels still fit 16 bits, and sums of three 8
MIN_WINOGRAD_INPUTS = 48  # of a column: with fewer, the transforms cost more than the products that they save
SUM_MAX = 2**15 - 1  # of 16 bits
MAX_LINE = 32  # pixels
NO_RANGE = ScalarQParams(0.0, 0)  # asks for the range of each input
NO_VNNI = (
    "oneDNN has VNNI here, and this kernel was compiled without (a compiler that does not know the CPU, or CFLAGS)"
)


class Image(ctypes.Structure):
    """The input: as `Image` in the C file."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("images", "height", "width", "channels", "border_y", "border_x", "padded_channels", "tiles")
    ]

    def code_bytes(self) -> int:
        """Return the bytes of its codes, with the border and the padded channels."""
        return compiled().code_bytes(self)


class Output(ctypes.Structure):
    """The output: as `Output` in the C file."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("out_height", "out_width", "out_channels", "stride_y", "stride_x", "is_gated")
    ]


class Affine(ctypes.Structure):
    """A map before rounding: as `Affine` in the C file; NULL where there is none."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gain", "shift")),
        *((name, ctypes.c_int64) for name in ("has_silu", "is_layer_norm")),
        *((name, ctypes.c_float) for name in ("eps", "mean", "inverse_deviation")),
    ]


class Weights(ctypes.Structure):
    """What does not change from call to call: as `Weights` in the C file."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "windows", "window_starts", "level_sum", "scale")),
        ("steps", ctypes.c_int64),
        ("is_signed", ctypes.c_int64),
    ]


class Filters(ctypes.Structure):
    """Levels and scales as PyTorch has them: as `Filters` in the C file."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("levels", "scale")),
        *(
            (name, ctypes.c_int64)
            for name in ("outputs", "channels", "height", "width", "padded_channels", "is_winograd")
        ),
    ]


class Addend(ctypes.Structure):
    """What is added to the output: as `Addend` in the C file; NULL where there is none."""

    _fields_ = [("numbers", ctypes.c_void_p), ("is_per_image", ctypes.c_int64)]


class Layer(ctypes.Structure):
    """A layer at one size of its input and one activation range: as `Layer` in the C file."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "bias")),
        ("image", Image),
        ("output", Output),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("zero_point", "qmax")),
    ]


class GroupNorm(ctypes.Structure):
    """The parameters of a group norm: as `GroupNorm` in the C file."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        ("groups", ctypes.c_int64),
        ("eps", ctypes.c_double),
    ]


class ResidualBlock(ctypes.Structure):
    """A residual block: as `ResidualBlock` in the C file."""

    _fields_ = [
        *((name, GroupNorm) for name in ("norm1", "norm2")),
        *((name, ctypes.c_void_p) for name in ("embedding", "conv1", "conv2", "shortcut")),
        ("embeds_silu", ctypes.c_int64),
    ]


STRUCTS = (Image, Output, Affine, Weights, Filters, Addend, Layer, GroupNorm, ResidualBlock)
NO_AFFINE, NO_ADDEND = Affine(), Addend()


class Norm(NamedTuple):
    """What a group norm was when it was called: a module that is offloaded loses its parameters afterwards."""

    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.GroupNorm) -> "Norm":
        """Return the norm that `module` computes now."""
        weight, bias = module.weight.detach().contiguous(), module.bias.detach().contiguous()
        return cls(module.num_groups, weight, bias, module.eps)


class Geometry(NamedTuple):
    """What follows from the shape of an input: its image, and the size of the output as C and as PyTorch know it."""

    image: Image
    output: Output
    size: tuple[int, ...]


class Call(NamedTuple):
    """What a call of a layer does, as C takes it, and the sizes of what it writes; `keeps` lives as long."""

    layer: Layer
    size: tuple[int, ...]
    code_bytes: int
    keeps: Any


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


@cache
def library() -> ctypes.CDLL | str:
    """Return the compiled C file, or why there is none on this computer."""
    loaded = native.library(SOURCE)
    if isinstance(loaded, str):
        return loaded
    constants = {"DEPTH": DEPTH, "TILE_SIZE": TILE_SIZE, "MIN_SCALE": ctypes.c_float(MIN_SCALE).value}
    check_layout(loaded, STRUCTS, constants)
    address, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.code_bytes.argtypes, loaded.code_bytes.restype = [ctypes.POINTER(Image)], long
    loaded.normalize.argtypes = [address, Image, GroupNorm, address, address]
    loaded.run_layers.argtypes = [address, Affine, long, address, Addend, address, address]
    loaded.block_bytes.argtypes = [ctypes.POINTER(ResidualBlock)]
    loaded.run_block.argtypes = [address, address, ctypes.POINTER(ResidualBlock), address, address]
    loaded.read_seconds.argtypes = [address]
    loaded.pack_filters.argtypes = [ctypes.POINTER(Filters), address, address, address]
    # The next two are parts of `run_layers`, for tests.
    loaded.choose_range.argtypes = [address, Image, Affine, integer, address, address]
    loaded.quantize.argtypes = [address, Image, Affine, ctypes.c_float, integer, integer, integer, address]
    loaded.choose_range.restype = None
    loaded.pack_filters.restype = None
    loaded.normalize.restype = loaded.run_layers.restype = loaded.run_block.restype = None
    loaded.read_seconds.restype, loaded.block_bytes.restype = None, long
    loaded.plan_windows.argtypes = [address, long, long, long, address, integer, address, address]
    loaded.plan_windows.restype = long
    return loaded


def compiled() -> ctypes.CDLL:
    """Return the compiled C file, where `refusal` found it."""
    found = library()
    assert not isinstance(found, str)
    return found


def accepts(x: Tensor) -> bool:
    """Return whether this kernel can read the numbers of `x`; see `is_in_memory`."""
    return is_in_memory(x)


def absence() -> str | None:
    """Return why a computer that could have this kernel lacks it, or `None`."""
    found = library()
    return found if isinstance(found, str) and found != native.NOT_HERE else None


def refusal(operation: Operation) -> str | None:
    """Return why this kernel cannot run `operation` on this computer, or `None`."""
    if operation.qweight.device.type != "cpu":
        return f"its weights are on {operation.qweight.device.type}, and this kernel is for CPUs"
    if operation.activation_bits is None:
        return "its activations stay in floating point"
    geometry = operation.geometry
    if geometry is not None:
        if len(geometry.stride) != 2:
            return onednn.NOT_TWO_DIMENSIONS
        if not onednn.pads_with_numbers(geometry):
            return onednn.other_padding(geometry)
        if geometry.groups > 1:
            return "it is a convolution in groups"
    loaded = library()
    if isinstance(loaded, str):
        return loaded
    if not loaded.has_vnni() and onednn.available() and not onednn.saturates():
        return native.missing(NO_VNNI, native.INSTALL_COMPILER)
    return None


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


def geometry_of(operation: Operation, size: torch.Size, *, is_winograd: bool) -> Geometry:
    """Return the geometry of `operation` for an input of `size`, of a convolution with a batch.

    With `is_winograd`, a convolution is packed for F(2, 3). Raises ValueError for a size that it cannot take: C would
    read beyond the input.
    """
    channels = operation.shape[1]
    if operation.geometry is None:
        if not size or size[-1] != channels:
            raise ValueError(f"{operation.name}: expected (..., {channels}), got an input of {tuple(size)}.")
        return linear_geometry(operation.shape, size)
    if len(size) != 4 or size[1] != channels:
        raise ValueError(f"{operation.name}: expected (N, {channels}, H, W), got an input of {tuple(size)}.")
    geometry = conv_geometry(operation.geometry, operation.shape, size, is_winograd=is_winograd)
    if min(geometry.size) < 1:
        raise ValueError(f"{operation.name}: an input of {tuple(size)}, padded, is smaller than the kernel.")
    return geometry


def conv_geometry(conv: ConvGeometry, weight: torch.Size, size: torch.Size, *, is_winograd: bool) -> Geometry:
    """Return the geometry of a convolution with a `weight` (O, C, KH, KW) of an input of `size` (N, C, H, W)."""
    assert not isinstance(conv.padding, str)  # refused
    outputs, channels, *kernel = weight
    height, width = (
        (size[axis + 2] + 2 * conv.padding[axis] - conv.dilation[axis] * (kernel[axis] - 1) - 1) // conv.stride[axis]
        + 1
        for axis in range(2)
    )
    tiles = round_up(width, 2) // 2 if is_winograd else 0
    image = Image(size[0], *size[2:], channels, *conv.padding, round_up(channels, DEPTH), tiles)
    return Geometry(image, Output(height, width, outputs, *conv.stride, 0), (size[0], outputs, height, width))


def linear_geometry(weight: torch.Size, size: torch.Size) -> Geometry:
    """Return the geometry of a matrix product with a `weight` (O, K), of an input of `size` (B, ..., K) as B images.

    Threads share lines, and sums over a line are short enough for fp32: they have up to 32 pixels.
    """
    outputs, channels = weight
    images, pixels = (size[0], size[1:-1].numel()) if len(size) > 1 else (1, 1)
    width = math.gcd(pixels, MAX_LINE)
    image = Image(images, pixels // width, width, channels, 0, 0, round_up(channels, DEPTH))
    return Geometry(image, Output(pixels // width, width, outputs, 1, 1, 0), (*size[:-1], outputs))


def call_of(operation: Operation, packed: PackedLayer, size: torch.Size) -> Call:
    """Return the call of `operation` for an input of `size`, in its timestep group."""
    assert operation.activation_bits is not None  # refused
    group = None if packed.ranges is None else operation.group
    of_size = packed.sizes.get(size)
    if of_size is None:
        of_size = packed.sizes[size] = geometry_of(operation, size, is_winograd=packed.is_winograd), {}
    geometry, by_group = of_size
    known = by_group.get(group)
    if known is None:
        qparams = NO_RANGE
        if packed.ranges is not None:
            assert isinstance(group, int)  # a batch of several groups goes to the reference kernel
            qparams = packed.ranges[group]
        known = by_group[group] = Layer(
            ctypes.addressof(packed.weights),
            None,
            geometry.image,
            geometry.output,
            *qparams,
            activation_qmax(operation.activation_bits),
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
    return Call(own, geometry.size, geometry.image.code_bytes(), bias)


def group_norm_of(norm: Norm) -> GroupNorm:
    """Return `norm` as C takes it."""
    return GroupNorm(norm.weight.data_ptr(), norm.bias.data_ptr(), norm.num_groups, norm.eps)


def normalization(norm: GroupNorm, source: Tensor, image: Image) -> tuple[Tensor, Tensor]:
    """Return the gain and the shift fp32 (B, C) that are the group norm of `source`, an `image`."""
    gain, shift = torch.empty(2, image.images, image.channels, dtype=torch.float32, device="cpu")
    compiled().normalize(source.data_ptr(), image, norm, gain.data_ptr(), shift.data_ptr())
    return gain, shift


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
    outputs = [
        torch.empty(call.size, dtype=torch.float32, device="cpu", memory_format=memory_format) for call in calls
    ]
    codes, pointers = scratch.buffer(max(call.code_bytes for call in calls)), ctypes.c_void_p * len(calls)
    layers = pointers(*(ctypes.addressof(call.layer) for call in calls))
    targets = pointers(*(output.data_ptr() for output in outputs))
    compiled().run_layers(x.data_ptr(), affine, len(calls), layers, addend, codes.data_ptr(), targets)
    scratch.give_back(codes)
    return outputs


def run(operation: Operation, packed: PackedLayer, x: Tensor) -> Tensor:
    """Return the int8 operation's output in the dtype of `x`; convolutions return channels_last."""
    is_conv = operation.geometry is not None
    memory_format = torch.channels_last if is_conv else torch.contiguous_format
    dense = x.unsqueeze(0) if is_conv and x.dim() != 4 else x
    if dense.dim() == 4 or not is_conv:  # others are refused below
        dense = dense.float().contiguous(memory_format=memory_format)
    call = call_of(operation, packed, dense.shape)
    output = run_call(call, dense, memory_format=memory_format)
    return (output if output.dim() == x.dim() else output.squeeze(0)).to(x.dtype)
