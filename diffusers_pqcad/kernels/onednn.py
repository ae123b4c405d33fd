"""int8 convolution and linear on x86 CPUs by `torch.ops.onednn`: uint8 activations, int8 weights, float output."""

import warnings
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_pqcad.kernels.operation import Operation, is_in_memory
from diffusers_pqcad.kernels.refusal import Refusal, int8_refusal
from diffusers_pqcad.numerics.qparams import ScalarQParams, activation_qmax, dynamic_scalar_qparams

NAME = "onednn"
FUSES: frozenset[str] = frozenset()
MEMORY_FORMAT = torch.channels_last  # of its convolutions
OUTPUT_DTYPES = (torch.float32, torch.bfloat16)
# Without VNNI two neighbouring products are added in 16 bits, which hold 2 * 255 * 31 and 2 * 127 * 127 at most.
MAX_WEIGHT_BITS_WITHOUT_VNNI = {8: 6, 7: 8}  # by activation bits
NO_OPERATORS = "this PyTorch has no oneDNN int8 operators"
KEEPS_COPIES = "memory is short, or was asked to be saved, and oneDNN's operators keep an int8 copy of the weights"
NO_VNNI = "this CPU has no VNNI, where products of 8 bits saturate silently; activation_bits=7 avoids it"


class PackedLayer(NamedTuple):
    """What does not change from call to call.

    `weight` is oneDNN's opaque weight tensor, with its fp32 scales and int32 zero points, both (C_out,). `geometry` is
    a convolution's (stride, padding, dilation, groups). `ranges` are the static activation ranges, one per timestep
    group, or `None` where each call chooses its own.
    """

    weight: tuple[Tensor, Tensor, Tensor]
    geometry: tuple[list[int], list[int], list[int], int] | None
    ranges: list[ScalarQParams] | None


@cache
def available() -> bool:
    """Return whether this build of PyTorch has oneDNN's int8 operators (x86 builds do)."""
    return hasattr(torch.ops.onednn, "qconv2d_pointwise") and torch.backends.mkldnn.is_available()


@cache
def has_fused_quantize() -> bool:
    """Return whether PyTorch still has its fused quantize pass: deprecated in 2.13, announced to go."""
    if not hasattr(torch, "quantize_per_tensor"):
        return False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns once a process; we have a replacement, so users need not read it
        torch.quantize_per_tensor(torch.zeros(1), 1.0, 0, torch.quint8)
    return True


@cache
def saturates() -> bool:
    """Return whether int8 products saturate here, as they do silently without VNNI (up to 49 % error).

    Found by running the worst case, all codes 255 times all levels 127: a flag of the CPU would not know of
    ONEDNN_MAX_CPU_ISA or of a virtual machine that hides instructions.
    """
    channels = 64
    x = torch.full((1, channels, 8, 8), 255, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    weight = torch.full((channels, channels, 3, 3), 127, dtype=torch.int8)
    scale, zero_point = torch.ones(channels), torch.zeros(channels, dtype=torch.int32)
    packed = torch.ops.onednn.qconv_prepack(weight, scale, 1.0, 0, [1, 1], [0, 0], [1, 1], 1, None)
    output = torch.ops.onednn.qconv2d_pointwise(
        x, 1.0, 0, packed, scale, zero_point, None, [1, 1], [0, 0], [1, 1], 1, 1.0, 0, torch.float32, "none", [], ""
    )
    return not torch.equal(output, torch.full_like(output, float(255 * 127 * channels * 9)))


def accepts(x: Tensor) -> bool:
    """Return whether this kernel can read the numbers of `x`; see `is_in_memory`."""
    return is_in_memory(x)


def absence() -> str | None:
    """Return why a computer that could have this kernel lacks it: `refusal` says it, layer by layer."""
    return None


def refusal(operation: Operation) -> Refusal | None:
    """Return why the int8 operators cannot run `operation` on this computer, or `None`."""
    refused = int8_refusal(operation)
    if refused is not None:
        return refused
    if not available():
        return Refusal(NO_OPERATORS, is_of_computer=True)
    is_grouped = operation.geometry is not None and operation.geometry.groups > 1  # no other kernel's; few weights
    if not operation.keeps_copies and not is_grouped:
        return Refusal(KEEPS_COPIES, is_of_computer=True)
    assert operation.activation_bits is not None  # refused
    if operation.channel_bits() > MAX_WEIGHT_BITS_WITHOUT_VNNI[operation.activation_bits] and saturates():
        return Refusal(NO_VNNI, is_of_computer=True)
    return None


def pack(operation: Operation) -> PackedLayer:
    """Return oneDNN's form of the weights, and the static activation ranges as plain numbers."""
    levels, scale = operation.channel_levels()
    zero_point = torch.zeros(len(scale), dtype=torch.int32)
    static, geometry = operation.static_ranges(), operation.geometry
    if geometry is None:
        weight = torch.ops.onednn.qlinear_prepack(levels.contiguous(), None)
        return PackedLayer((weight, scale, zero_point), None, static)
    assert not isinstance(geometry.padding, str)  # refused
    moves = (list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups)
    weight = torch.ops.onednn.qconv_prepack(levels, scale, 1.0, 0, *moves, None)
    return PackedLayer((weight, scale, zero_point), moves, static)


def num_bytes(operation: Operation, packed: PackedLayer) -> int:
    """Return the bytes of the int8 copy of the weights: one a weight."""
    return operation.shape.numel()


def quantize_to_uint8(x: Tensor, qparams: ScalarQParams, bits: int) -> Tensor:
    """Return the codes, uint8 below 2**bits, of dense fp32 `x`, in its memory format."""
    # aten's fused pass is 10 times faster than the same arithmetic in separate operators; reading its storage avoids
    # the copy of int_repr().
    if not has_fused_quantize():
        codes = (x * (1.0 / qparams.scale)).round_().add_(qparams.zero_point)
        return codes.clamp_(0, activation_qmax(bits)).to(torch.uint8)
    quantized = torch.quantize_per_tensor(x, qparams.scale, qparams.zero_point, torch.quint8)
    codes = torch.empty(0, dtype=torch.uint8)
    codes.set_(quantized.untyped_storage(), 0, quantized.size(), quantized.stride())
    return codes if bits == 8 else codes.clamp_(max=activation_qmax(bits))


def run(operation: Operation, packed: PackedLayer, x: Tensor) -> Tensor:
    """Return the int8 operation's output in the dtype of `x`; convolutions return channels_last."""
    assert operation.activation_bits is not None  # refused
    bits, dtype = operation.activation_bits, x.dtype if x.dtype in OUTPUT_DTYPES else torch.float32
    bias = None if operation.bias is None else operation.bias.float()
    if packed.ranges is None:
        qparams = dynamic_scalar_qparams(x, bits)
    else:
        assert isinstance(operation.group, int)  # a batch of several groups goes to the reference kernel
        qparams = packed.ranges[operation.group]
    if packed.geometry is None:
        codes = quantize_to_uint8(x.float().contiguous(), qparams, bits)
        output = torch.ops.onednn.qlinear_pointwise.default(
            codes, *qparams, *packed.weight, bias, 1.0, 0, dtype, "none", [], ""
        )
        return output.to(x.dtype)
    batched = x.dim() == 4
    x_nchw = x if batched else x.unsqueeze(0)
    codes = quantize_to_uint8(x_nchw.float().contiguous(memory_format=torch.channels_last), qparams, bits)
    output = torch.ops.onednn.qconv2d_pointwise.default(
        codes, *qparams, *packed.weight, bias, *packed.geometry, 1.0, 0, dtype, "none", [], ""
    )
    return (output if batched else output.squeeze(0)).to(x.dtype)
