"""Integer grids: what a bit-width means, how scales are chosen, how tensors are rounded onto a grid and back.

Weights are symmetric and narrow. For b of 3 to 8 bits the levels are the integers -(2^(b-1) - 1) to 2^(b-1) - 1, so
the most negative code is never used and zero is exact. Two bits would leave three levels that way; there the
half-integer grid (-3/2, -1/2, 1/2, 3/2) is used, stored as the odd integers -3, -1, 1, 3 at half its scale. So
everywhere `weight = level * scale` with an int8 level, whatever the width.

Activations are asymmetric uint8: `x = (code - zero_point) * scale`, with a range that always includes zero. Of 7 bits,
the codes end at 127: 8-bit products that a CPU without VNNI can add up exactly.
"""

from collections.abc import Callable, Iterator
from ctypes import c_float
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor

WEIGHT_BITS = (2, 3, 4, 6, 8)
ACTIVATION_BITS = (8, 7)
MIN_SCALE = 1e-12  # keeps 1 / scale finite in fp32


@dataclass(frozen=True)
class WeightSpec:
    """The integer grid of one layer's weights: `bits`, and how many inputs share a scale (`None`: a whole row)."""

    bits: int
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in WEIGHT_BITS:
            raise ValueError(f"bits: expected one of {WEIGHT_BITS}, got {self.bits}.")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size: expected a positive integer or None, got {self.group_size}.")

    @property
    def level_step(self) -> int:
        """Distance between neighbouring levels: 2 on the half-integer grid of 2 bits, else 1."""
        return 2 if self.bits == 2 else 1

    @property
    def level_max(self) -> int:
        """Largest level; the smallest is its negative."""
        return 3 if self.bits == 2 else 2 ** (self.bits - 1) - 1

    def num_groups(self, row_length: int) -> int:
        """Return how many scales a row of `row_length` weights has; raises ValueError where groups do not fit."""
        if self.group_size is None:
            return 1
        if row_length % self.group_size:
            raise ValueError(f"group_size={self.group_size} must divide {row_length}, the number of inputs of a row.")
        return row_length // self.group_size


def activation_qmax(bits: int) -> int:
    """Return the largest activation code of `bits`; the smallest is 0."""
    return 2**bits - 1


class ActivationQParams(NamedTuple):
    """`scale` fp32 > 0 and `zero_point` int32 in [0, qmax]: 0-dim, or (G,) for G timestep groups."""

    scale: Tensor
    zero_point: Tensor


class ScalarQParams(NamedTuple):
    """One activation range as Python numbers, for kernels that take one a call; `scale` is an fp32 number."""

    scale: float
    zero_point: int


def round_ste(x: Tensor) -> Tensor:
    """Return `x` rounded half to even, with the gradient of the identity (Bengio et al. 2013, arXiv:1308.3432)."""
    return x + (x.round() - x).detach()


def scale_gradient(x: Tensor, factor: float) -> Tensor:
    """Return `x` unchanged, with its gradient multiplied by `factor` (LSQ, Esser et al. 2020, arXiv:1902.08153)."""
    return x.detach() + (x - x.detach()) * factor  # the bracket is exactly zero, so the value is exactly x


def as_groups(weight: Tensor, num_groups: int) -> Tensor:
    """Return `weight` (C_out, ...) as (C_out, G, K / G): the view in which unsqueezed scales (C_out, G) broadcast."""
    return weight.reshape(weight.shape[0], num_groups, -1)


def min_max_weight_scale(weight: Tensor, spec: WeightSpec) -> Tensor:
    """Return the (C_out, G) fp32 scales that map each group's largest magnitude onto the largest level.

    An all-zero group gets scale 1 where zero is a level, and the smallest scale at 2 bits, where it is not. Raises
    ValueError if `weight` (C_out, ...) holds a NaN or an infinity.
    """
    groups = as_groups(weight.detach().float(), spec.num_groups(weight[0].numel()))
    absmax = torch.linalg.vector_norm(groups, torch.inf, dim=-1)
    refuse_not_finite(absmax)
    scale_of_zeros = MIN_SCALE if spec.bits == 2 else 1.0  # the 2-bit grid rounds 0 to +-scale
    return torch.where(absmax > 0, (absmax / spec.level_max).clamp(min=MIN_SCALE), scale_of_zeros)


def refuse_not_finite(absmax: Tensor) -> None:
    """Raise ValueError where the largest magnitudes of weights, or the scales made of them, are not finite."""
    if not torch.isfinite(absmax).all():
        raise ValueError("the weights hold a NaN or an infinity; a scale cannot be chosen for them.")


def round_to_levels(x: Tensor, spec: WeightSpec, rounding: Callable[[Tensor], Tensor] = round_ste) -> Tensor:
    """Return `x` (weights over scale) rounded and clamped to the levels of `spec`, as floats, by default with STE."""
    clamped = x.clamp(-spec.level_max, spec.level_max)
    if spec.level_step == 1:
        return rounding(clamped)
    # Odd integers: shift by one, round to the nearest even number, shift back; -3 and 3 stay inside.
    return (rounding((clamped - 1) / 2) * 2 + 1).clamp(-spec.level_max, spec.level_max)


def quantize_weight(weight: Tensor, scale: Tensor, spec: WeightSpec) -> Tensor:
    """Return the int8 levels of `weight` (C_out, ...), same shape; `scale` is (C_out, G) fp32."""
    groups = as_groups(weight.detach().float(), scale.shape[1])
    return round_to_levels(groups / scale.unsqueeze(-1), spec, torch.round).to(torch.int8).reshape(weight.shape)


def row_chunks(weight: Tensor, num_weights: int = 2**18) -> Iterator[slice]:
    """Yield slices over the rows of `weight` of about `num_weights` weights.

    Passes over so few stay in the cache, and large layers need no large temporaries.
    """
    rows = max(1, num_weights // max(1, weight[0].numel()))
    for start in range(0, len(weight), rows):
        yield slice(start, start + rows)


def dequantize_weight(levels: Tensor, scale: Tensor) -> Tensor:
    """Return the fp32 weights of int8 `levels` (C_out, ...) and `scale` (C_out, G)."""
    return (as_groups(levels.float(), scale.shape[1]) * scale.unsqueeze(-1)).reshape(levels.shape)


def perturbation(weight: Tensor, levels: Tensor, scale: Tensor) -> Tensor:
    """Return ||Q(W) - W||^2 and ||W||^2 as one fp32 tensor (2,); sums over chunks of rows add up."""
    weight = weight.detach().float()
    return torch.stack([(dequantize_weight(levels, scale) - weight).square_().sum(), weight.square().sum()])


def relative(errors: Tensor) -> float:
    """Return ||Q(W) - W||^2 / ||W||^2 of what `perturbation` returns."""
    return (errors[0] / errors[1].clamp(min=1e-30)).item()


def fake_quantize_weight(weight: Tensor, scale: Tensor, spec: WeightSpec) -> Tensor:
    """Return `weight` rounded onto its grid, differentiable in the weight (STE, clipped) and in `scale` (LSQ).

    `weight` is (C_out, ...), `scale` (C_out, G); equals dequantize(quantize(weight)) exactly. The gradient to the
    scale is divided by sqrt(weights per scale * largest level), as in LSQ (arXiv:1902.08153, section 2.2).
    """
    groups = as_groups(weight, scale.shape[1])
    scale = scale_gradient(scale, (groups.shape[-1] * spec.level_max) ** -0.5).clamp(min=MIN_SCALE).unsqueeze(-1)
    return (round_to_levels(groups / scale, spec) * scale).reshape(weight.shape)


def activation_qparams(minimum: Tensor, maximum: Tensor, bits: int) -> ActivationQParams:
    """Return the asymmetric qparams of the range [minimum, maximum], widened to include zero; any shape.

    Raises ValueError where a bound is not finite.
    """
    minimum, maximum = minimum.float().clamp(max=0), maximum.float().clamp(min=0)
    if not (torch.isfinite(minimum).all() and torch.isfinite(maximum).all()):
        raise ValueError("the activations hold a NaN or an infinity; a range cannot be chosen for them.")
    return unchecked_activation_qparams(minimum, maximum, bits)


def unchecked_activation_qparams(minimum: Tensor, maximum: Tensor, bits: int) -> ActivationQParams:
    """`activation_qparams` for minimum <= 0 <= maximum, unchecked: no host synchronization.

    Where a bound is not finite, neither is the scale, and so the layer's output.
    """
    span, qmax = maximum - minimum, activation_qmax(bits)
    scale = torch.where(span == 0, 1.0, (span / qmax).clamp(min=MIN_SCALE))
    # A NaN has no integer form; as 0 it stays a valid zero point, and the scale carries the NaN to the output.
    quotient = -minimum / scale
    zero_point = torch.where(quotient.isnan(), 0.0, quotient).round().clamp(0, qmax).to(torch.int32)
    return ActivationQParams(scale, zero_point)


def dynamic_activation_qparams(x: Tensor, bits: int) -> ActivationQParams:
    """Return the 0-dim qparams of the range of `x`, per tensor and call; those of zeros where `x` is empty."""
    if not torch.jit.is_tracing() and x.numel() == 0:  # a traced graph is of inputs like those it was traced with
        x = x.new_zeros(1)
    # amin and amax apart: on channels_last tensors they are 20 times faster than aminmax.
    x, axes = x.detach(), tuple(range(x.dim()))  # named: ONNX asks for them
    minimum, maximum = x.amin(axes).float().clamp(max=0), x.amax(axes).float().clamp(min=0)
    return unchecked_activation_qparams(minimum, maximum, bits)


def dynamic_scalar_qparams(x: Tensor, bits: int) -> ScalarQParams:
    """Return `dynamic_activation_qparams` of a non-empty `x` as Python numbers, the same ones to the last bit."""
    return scalar_qparams(x.amin().item(), x.amax().item(), bits)


def scalar_qparams(least: float, largest: float, bits: int) -> ScalarQParams:
    """Return the asymmetric qparams of fp32 bounds, widened to include zero.

    A dozen operators on 0-dim tensors take longer than a small layer. Each fp32 operation is done in double precision
    and rounded once more, which is exact for sums and quotients: 53 bits >= 2 * 24 + 2 (Figueroa 1995).
    """
    minimum, maximum = min(_fp32(least), 0.0), max(_fp32(largest), 0.0)  # in this order, NaN stays
    span, qmax = _fp32(maximum - minimum), activation_qmax(bits)
    scale = 1.0 if span == 0 else max(_fp32(span / qmax), _fp32(MIN_SCALE))
    quotient = _fp32(-minimum / scale)
    return ScalarQParams(scale, min(round(quotient), qmax) if isfinite(quotient) else 0)


def _fp32(value: float) -> float:
    return c_float(value).value


class _FakeQuantizeActivation(torch.autograd.Function):
    """Rounds onto the grid of codes 0 to `qmax`; one mask is all that the backward needs.

    Element-wise passes weigh as much as convolutions when a small model is trained on a CPU: in place, this is faster
    than the same operators under autograd, and than torch's own operator.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, qmax: int) -> Tensor:
        codes = (x * scale.reciprocal()).round_().add_(zero_point)
        ctx.save_for_backward((codes >= 0) & (codes <= qmax))
        return codes.clamp_(0, qmax).sub_(zero_point).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradient * inside, None, None, None


def fake_quantize_activation(x: Tensor, qparams: ActivationQParams, bits: int) -> Tensor:
    """Return `x` rounded to codes of `bits` and back; qparams broadcast against `x`.

    Straight-through inside the range, no gradient outside it; the scale gets none. Computed in fp32: in half precision
    the codes themselves would be off by one.
    """
    qmax = activation_qmax(bits)
    if is_exported():  # no format but Python's holds a function of autograd
        codes = (round_ste(x.float() * qparams.scale.reciprocal()) + qparams.zero_point).clamp(0, qmax)
        return ((codes - qparams.zero_point) * qparams.scale).to(x.dtype)
    return _FakeQuantizeActivation.apply(x.float(), *qparams, qmax).to(x.dtype)


def is_exported() -> bool:
    """Return whether a graph for another process is made of this call: by torch.export, TorchScript or ONNX."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()
