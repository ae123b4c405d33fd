"""What a quantized layer computes: all that a kernel is told of it. No kernel knows a module."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_pqcad.kernels.native import weights
from diffusers_pqcad.numerics.packing import unpack_levels
from diffusers_pqcad.numerics.qparams import (
    ActivationQParams,
    ScalarQParams,
    WeightSpec,
    dequantize_weight,
    dynamic_activation_qparams,
    min_max_weight_scale,
    quantize_weight,
)

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


class ConvGeometry(NamedTuple):
    """How a convolution of one, two or three dimensions moves, a number for each of them, as PyTorch has it.

    `ends` are what `F.pad` takes for a padding mode other than "zeros": both ends of each dimension, the last first.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    ends: tuple[int, ...]


class Operation(NamedTuple):
    """A matrix product (`geometry` is `None`) or a convolution with packed weights, and how its inputs are rounded.

    `shape` is that of the float weight, (C_out, ...); `qweight` uint8 (C_out, packed_row_bytes) and `weight_scale`
    fp32 (C_out, G) stand for it on the grid `spec`. `bias` is (C_out,) or `None`. Inputs are rounded to
    `activation_bits`, or stay in floating point. Their ranges are static where there are `input_scale` fp32 and
    `input_zero_point` int32, both (T,), of T timestep groups. `group` is that of the call: an int, (B,) int64 for a
    batch of several, or `None` for dynamic ranges and outside of a call. `name` is for messages. `keeps_copies`:
    whether a kernel may keep a copy of the weights, in int8, for the next call.
    """

    name: str
    spec: WeightSpec
    shape: torch.Size
    geometry: ConvGeometry | None
    qweight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    activation_bits: int | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    group: int | Tensor | None = None
    keeps_copies: bool = True

    def levels(self) -> Tensor:
        """Return the int8 levels, in the shape of the float weight."""
        return unpack_levels(self.qweight, self.spec, self.shape)

    def weight(self) -> Tensor:
        """Return the fp32 weight that the packed integers stand for."""
        return dequantize_weight(self.levels(), self.weight_scale)

    def channel_levels(self) -> tuple[Tensor, Tensor]:
        """Return int8 levels in the shape of the float weight, and fp32 scales (C_out,): what int8 products take.

        Scales per output channel keep the stored levels as they are, at any bit-width. Rows of several scales (groups)
        are re-quantized to 8 bits per channel, an error of at most 1/254 of a row's range.
        """
        try:
            levels = weights.unpack(self.qweight, self.spec, self.shape)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        scale = self.weight_scale
        if scale.shape[1] > 1:
            weight, spec = dequantize_weight(levels, scale), WeightSpec(8)
            scale = min_max_weight_scale(weight, spec)
            levels = quantize_weight(weight, scale, spec)
        return levels, scale.flatten().contiguous()

    def channel_bits(self) -> int:
        """Return the bits of `channel_levels`."""
        return self.spec.bits if self.weight_scale.shape[1] == 1 else 8

    def input_qparams(self, x: Tensor) -> ActivationQParams | None:
        """Return the qparams of this call: 0-dim, or (B, 1, ...) for a batch of several timestep groups."""
        if self.activation_bits is None:
            return None
        if self.group is None or self.input_scale is None or self.input_zero_point is None:
            return dynamic_activation_qparams(x, self.activation_bits)
        return qparams_of_group(ActivationQParams(self.input_scale, self.input_zero_point), self.group, x, self.name)

    def static_ranges(self) -> list[ScalarQParams] | None:
        """Return the static ranges as plain numbers, one a timestep group; `None` where calls choose their own."""
        if self.input_scale is None or self.input_zero_point is None:
            return None
        return list(map(ScalarQParams, self.input_scale.tolist(), self.input_zero_point.tolist()))

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the float operation with this `weight` and `bias`, in any padding mode."""
        geometry = self.geometry
        if geometry is None:
            return F.linear(x, weight, bias)
        convolve, padding = CONVOLUTIONS[len(geometry.stride)], geometry.padding
        if geometry.padding_mode != "zeros":
            x, padding = F.pad(x, geometry.ends, mode=geometry.padding_mode), (0,) * len(geometry.stride)
        return convolve(x, weight, bias, geometry.stride, padding, geometry.dilation, geometry.groups)


def is_in_memory(x: Tensor) -> bool:
    """Return whether the numbers of `x` lie in the CPU's memory: not in a graph's, nor in a subclass of tensors."""
    return type(x) in (Tensor, nn.Parameter) and x.is_cpu and not torch.jit.is_tracing()


def qparams_of_group(qparams: ActivationQParams, group: int | Tensor, x: Tensor, name: str) -> ActivationQParams:
    """Return those of `qparams` (G,) that belong to `group`: 0-dim, or of a (B,) `group`, to broadcast against `x`."""
    if isinstance(group, int):
        return ActivationQParams(*(values[group] for values in qparams))
    # Not `values[group]`: a graph would look at the number in a 0-dim tensor.
    chosen = [values.index_select(0, group.flatten().to(values.device)) for values in qparams]
    return ActivationQParams(
        *(per_sample(values, x, name) if group.dim() else values.reshape(()) for values in chosen)
    )


def per_sample(values: Tensor, x: Tensor, name: str) -> Tensor:
    """Return `values` (B,), one for each timestep of the batch, so that they broadcast against `x` (k * B, ...)."""
    samples, timesteps = x.shape[0], values.shape[0]  # not len(): TorchScript would keep it as a number
    if not torch.jit.is_tracing() and samples % timesteps:
        raise ValueError(
            f"{name}: a batch of {samples} cannot be matched with {timesteps} timesteps of several activation "
            "ranges. Call the model with one timestep per sample, or with a single timestep."
        )
    return values.repeat_interleave(samples // timesteps).view(-1, *[1] * (x.dim() - 1))
