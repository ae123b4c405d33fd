"""int8 convolution and linear on x86 CPUs, in C (csrc/): exact sums, faster than oneDNN's.

With VNNI, one instruction multiplies 64 codes by 64 levels (AVX-512) or 32 by 32 (AVX, as in laptops) and adds them up
in 32 bits. With AVX2 alone, one multiplies 32 and adds neighbours in 16 bits, another widens the sums. There levels of
up to 6 bits let several products add up in 16 bits before they are widened: 9 where all are as large as 4 bits allow,
and more for the levels that layers have. The windows are cut from the levels themselves, so that no input can overflow
them. Levels of 8 bits take signed codes, which fit as single products.

With VNNI, convolutions three pixels wide take two thirds of the products, by Winograd's minimal filtering (Lavin and
Gray 2016, arXiv:1509.09308), which adds and subtracts neighbouring codes. Few sums and differences overflow 8 bits, as
activations are large in few places: the overflow is listed, and its products are added. Codes of 7 bits have none.
This is exact for levels of up to 6 bits with a scale for each output; filters of 8 bits are rounded once more. After
nearest upsampling, where each pixel is there four times, three of its four products are left, and two rows of three
(filters of 6 bits are rounded, too): half of the products, and a quarter of the codes.
"""

import torch
from torch import Tensor

from diffusers_pqcad.kernels import native, onednn
from diffusers_pqcad.kernels.operation import Operation, is_in_memory
from diffusers_pqcad.kernels.refusal import Refusal, int8_refusal
from diffusers_pqcad.kernels.x86 import library
from diffusers_pqcad.kernels.x86.calls import call_of, run_call
from diffusers_pqcad.kernels.x86.packing import PackedLayer, num_bytes, pack

__all__ = ["FUSES", "MEMORY_FORMAT", "NAME", "absence", "accepts", "num_bytes", "pack", "refusal", "run"]

NAME = "x86"
BLOCKS = ("residual", "attention", "feed_forward", "transformer", "upsampling", "tiny autoencoder")
FUSES = frozenset(BLOCKS)  # as the runtime names them
MEMORY_FORMAT = torch.channels_last  # of its convolutions
NO_VNNI = (
    "oneDNN has VNNI here, and this kernel was compiled without (a compiler that does not know the CPU, or CFLAGS)"
)


def accepts(x: Tensor) -> bool:
    """Return whether this kernel can read the numbers of `x`; see `is_in_memory`."""
    return is_in_memory(x)


def absence() -> str | None:
    """Return why a computer that could have this kernel lacks it, or `None`."""
    found = library.library()
    return found if isinstance(found, str) and found != native.NOT_HERE else None


def refusal(operation: Operation) -> Refusal | None:
    """Return why this kernel cannot run `operation` on this computer, or `None`."""
    refused = int8_refusal(operation)
    if refused is not None:
        return refused
    if operation.geometry is not None and operation.geometry.groups > 1:
        return Refusal("it is a convolution in groups")
    loaded = library.library()
    if isinstance(loaded, str):
        return Refusal(loaded)
    if not loaded.has_vnni() and onednn.available() and not onednn.saturates():
        return Refusal(native.missing(NO_VNNI, native.INSTALL_COMPILER))  # oneDNN takes its place
    return None


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
