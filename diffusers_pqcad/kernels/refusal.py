"""Why a kernel cannot run an operation, and what all int8 kernels refuse."""

from typing import NamedTuple

from diffusers_pqcad.kernels.operation import Operation


class Refusal(NamedTuple):
    """Why a kernel cannot run an operation: a `reason`, as a clause of a sentence.

    `is_of_computer`: this computer lacks something for the operation, and the model is not at fault. That a whole
    kernel is missing is none of an operation's reasons: the kernel's `absence` says it once.
    """

    reason: str
    is_of_computer: bool = False


def int8_refusal(operation: Operation) -> Refusal | None:
    """Return why no int8 kernel can run `operation`, or `None`."""
    if not operation.qweight.is_cpu:
        device = operation.qweight.device.type
        return Refusal(f"its weights are on {device}, and the int8 operators are for CPUs")
    if operation.activation_bits is None:
        return Refusal("its activations stay in floating point")
    geometry = operation.geometry
    if geometry is None:
        return None
    if len(geometry.stride) != 2:
        return Refusal("it is a convolution in one or three dimensions, and int8 kernels are for two")
    if geometry.padding_mode != "zeros" or isinstance(geometry.padding, str):
        return Refusal(f"padding {geometry.padding!r} in mode {geometry.padding_mode!r} is not supported")
    return None
