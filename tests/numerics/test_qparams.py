"""Specification of the integer grids: levels, scales, rounding, and the gradients of both."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusers_pqcad.numerics.qparams import (
    ACTIVATION_BITS,
    MIN_SCALE,
    WEIGHT_BITS,
    ActivationQParams,
    WeightSpec,
    activation_qmax,
    activation_qparams,
    dequantize_weight,
    dynamic_activation_qparams,
    dynamic_scalar_qparams,
    fake_quantize_activation,
    fake_quantize_weight,
    min_max_weight_scale,
    quantize_weight,
    round_ste,
    scale_gradient,
)

pytestmark = pytest.mark.fast
INTEGER_GRIDS = (3, 4, 6, 8)  # 2 bits has the half-integer grid, which torch's own operators do not know
# Row, levels and scale by hand; the largest magnitude is the largest level.
WORKED_EXAMPLES = {
    2: ([-3.0, -1.0, 0.5, 3.0, 2.5], [-3, -1, 1, 3, 3], 1.0),
    3: ([-6.0, -2.9, 0.0, 1.1, 6.0], [-3, -1, 0, 1, 3], 2.0),
    4: ([3.5, -3.5, 0.2, -0.9, 1.6], [7, -7, 0, -2, 3], 0.5),
    6: ([31.0, -30.6, 0.4, 0.6, -1.5], [31, -31, 0, 1, -2], 1.0),
    8: ([-63.5, 63.5, 0.2, 0.3, 0.75], [-127, 127, 0, 1, 2], 0.5),
}


def random_weight(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_worked_examples(bits: int) -> None:
    row, levels, scale = WORKED_EXAMPLES[bits]
    spec = WeightSpec(bits)
    weight = torch.tensor([row])
    chosen = min_max_weight_scale(weight, spec)
    assert chosen.tolist() == [[scale]]
    assert quantize_weight(weight, chosen, spec).tolist() == [levels]
    restored = dequantize_weight(torch.tensor([levels], dtype=torch.int8), chosen)
    assert restored.tolist() == [[level * scale for level in levels]]


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_levels_are_symmetric_evenly_spaced_and_all_reached(bits: int) -> None:
    spec = WeightSpec(bits)
    weight = torch.linspace(-2 * spec.level_max, 2 * spec.level_max, 4001).unsqueeze(0)  # reaches outside the range
    levels = quantize_weight(weight, torch.ones(1, 1), spec)
    assert levels.dtype == torch.int8
    expected = [-3, -1, 1, 3] if bits == 2 else list(range(-(2 ** (bits - 1) - 1), 2 ** (bits - 1)))
    assert levels.unique().tolist() == expected


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-8, 8))
def test_round_trip_is_the_nearest_level(bits: int, seed: int, exponent: int) -> None:
    spec = WeightSpec(bits)
    weight = random_weight(seed, 3, 50) * 2.0**exponent
    scale = min_max_weight_scale(weight, spec)
    error = (dequantize_weight(quantize_weight(weight, scale, spec), scale) - weight).abs().double()
    # Half the distance between levels; 1e-6 for the fp32 division and product.
    assert (error <= scale.double() * spec.level_step / 2 * (1 + 1e-6)).all()


@pytest.mark.parametrize("bits", INTEGER_GRIDS)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-8, 0))
def test_fake_quantize_equals_torch(bits: int, seed: int, exponent: int) -> None:
    spec = WeightSpec(bits)
    weight = random_weight(seed, 4, 33)
    scale = 2.0 ** (exponent + torch.arange(4.0)).unsqueeze(1)  # powers of two: x / s and x * (1 / s) are the same
    expected = torch.fake_quantize_per_channel_affine(
        weight, scale.flatten(), torch.zeros(4, dtype=torch.int32), 0, -spec.level_max, spec.level_max
    )
    assert torch.equal(fake_quantize_weight(weight, scale, spec), expected)


@pytest.mark.parametrize("bits", INTEGER_GRIDS)
def test_min_max_scale_equals_torch(bits: int) -> None:
    spec = WeightSpec(bits)
    weight = random_weight(1, 8, 4, 3, 3)
    scale = min_max_weight_scale(weight, spec)
    expected = torch.fake_quantize_per_channel_affine(
        weight, scale.flatten(), torch.zeros(8, dtype=torch.int32), 0, -spec.level_max, spec.level_max
    )
    assert torch.equal(fake_quantize_weight(weight, scale, spec), expected)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@given(seed=st.integers(0, 2**31), group_size=st.sampled_from([None, 2, 3, 12]), factor=st.floats(0.1, 2.0))
def test_fake_quantize_is_dequantize_of_quantize(bits: int, seed: int, group_size: int | None, factor: float) -> None:
    spec = WeightSpec(bits, group_size)
    weight = random_weight(seed, 5, 12)
    scale = min_max_weight_scale(weight, spec) * factor  # below 1, some weights are clipped
    assert torch.equal(
        fake_quantize_weight(weight, scale, spec), dequantize_weight(quantize_weight(weight, scale, spec), scale)
    )


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_groups_are_rows_of_their_own(bits: int) -> None:
    weight = random_weight(2, 3, 12)
    scale = min_max_weight_scale(weight, WeightSpec(bits, 4))
    assert scale.shape == (3, 3)
    separate = weight.reshape(9, 4)
    expected = fake_quantize_weight(separate, min_max_weight_scale(separate, WeightSpec(bits)), WeightSpec(bits))
    assert torch.equal(fake_quantize_weight(weight, scale, WeightSpec(bits, 4)), expected.reshape(3, 12))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_a_channel_of_zeros_stays_zero(bits: int) -> None:
    weight = torch.stack([torch.zeros(6), torch.ones(6)])
    spec = WeightSpec(bits)
    scale = min_max_weight_scale(weight, spec)
    assert (scale > 0).all()
    restored = dequantize_weight(quantize_weight(weight, scale, spec), scale)
    assert restored[0].abs().max() <= (MIN_SCALE if bits == 2 else 0)  # the 2-bit grid has no zero
    assert torch.equal(restored[1], torch.ones(6)) or bits not in (2, 3)  # 3 * (1 / 3) is exact


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(bits: int, bad: float) -> None:
    weight = torch.ones(2, 3)
    weight[1, 2] = bad
    with pytest.raises(ValueError, match="NaN or an infinity"):
        min_max_weight_scale(weight, WeightSpec(bits))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((5,), "bits"), ((1,), "bits"), ((16,), "bits"), ((4, 0), "group_size"), ((4, -2), "group_size")],
)
def test_impossible_specs_are_refused(arguments: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WeightSpec(*arguments)


def test_groups_must_fit_the_row() -> None:
    assert WeightSpec(4, 5).num_groups(15) == 3
    assert WeightSpec(4).num_groups(15) == 1
    with pytest.raises(ValueError, match="group_size=4 must divide 15"):
        min_max_weight_scale(torch.ones(2, 15), WeightSpec(4, 4))


def test_round_ste_rounds_half_to_even_with_gradient_one() -> None:
    x = torch.tensor([-2.5, -0.5, 0.49999997, 0.5, 1.5, 2.4, 126.5], requires_grad=True)
    rounded = round_ste(x)
    rounded.sum().backward()
    assert rounded.tolist() == [-2, 0, 0, 0, 2, 2, 126]
    assert x.grad is not None
    assert x.grad.tolist() == [1.0] * 7


def test_scale_gradient_changes_the_gradient_only() -> None:
    x = torch.tensor([0.1, 3e7], requires_grad=True)
    scaled = scale_gradient(x, 0.3)
    scaled.sum().backward()
    assert torch.equal(scaled, x)
    torch.testing.assert_close(x.grad, torch.full((2,), 0.3))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_weight_gradient_is_one_inside_and_zero_outside(bits: int) -> None:
    spec = WeightSpec(bits)
    weight = (random_weight(3, 4, 100) * spec.level_max).requires_grad_()
    fake_quantize_weight(weight, torch.ones(4, 1), spec).sum().backward()
    inside = weight.detach().abs() <= spec.level_max
    assert 0 < inside.sum() < inside.numel()
    assert weight.grad is not None
    assert torch.equal(weight.grad, inside.float())


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("group_size", [None, 5])
def test_scale_gradient_is_that_of_lsq(bits: int, group_size: int | None) -> None:
    """Esser et al. 2020, eq. 3 and section 2.2: sum of g (q - w/s), or g (+-Q) outside, over sqrt(N Q)."""
    spec = WeightSpec(bits, group_size)
    weight = random_weight(4, 3, 20)
    scale = (min_max_weight_scale(weight, spec) * 0.6).requires_grad_()
    upstream = random_weight(5, 3, 20)
    fake_quantize_weight(weight, scale, spec).backward(upstream)

    num_groups = 1 if group_size is None else 20 // group_size
    ratio = weight.double().numpy().reshape(3, num_groups, -1) / scale.detach().double().numpy()[..., None]
    maximum = {2: 3, 3: 3, 4: 7, 6: 31, 8: 127}[bits]
    nearest = 2 * np.rint((ratio - 1) / 2) + 1 if bits == 2 else np.rint(ratio)
    slope = np.where(np.abs(ratio) <= maximum, nearest - ratio, np.sign(ratio) * maximum)
    expected = (upstream.double().numpy().reshape(slope.shape) * slope).sum(-1) / np.sqrt(slope.shape[-1] * maximum)
    assert (np.abs(ratio) > maximum).any()
    assert scale.grad is not None
    np.testing.assert_allclose(scale.grad.numpy(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "scale", "zero_point"),
    [
        (0.0, 255.0, 1.0, 0),
        (-255.0, 0.0, 1.0, 255),
        (-1.0, 254.0, 1.0, 1),
        (51.0, 255.0, 1.0, 0),  # widened to include zero
        (-127.5, -12.75, 0.5, 255),
        (0.0, 0.0, 1.0, 0),
    ],
)
def test_activation_qparams_by_hand(low: float, high: float, scale: float, zero_point: int) -> None:
    qparams = activation_qparams(torch.tensor(low), torch.tensor(high), 8)
    assert qparams.scale.dtype == torch.float32
    assert qparams.zero_point.dtype == torch.int32
    assert (qparams.scale.item(), qparams.zero_point.item()) == (scale, zero_point)


@given(low=st.floats(-1e4, 1e4, width=32), width=st.floats(0, 1e4, width=32), bits=st.sampled_from(ACTIVATION_BITS))
def test_zero_is_exact_and_the_range_is_covered(low: float, width: float, bits: int) -> None:
    minimum, maximum = torch.tensor(low), torch.tensor(low) + width
    qparams = activation_qparams(minimum, maximum, bits)
    assert 0 <= qparams.zero_point <= activation_qmax(bits)
    assert fake_quantize_activation(torch.zeros(1), qparams, bits).item() == 0.0
    x = torch.linspace(0, 1, 301) * (maximum - minimum) + minimum
    error = (fake_quantize_activation(x, qparams, bits) - x).abs()
    assert (error <= qparams.scale * 0.5 * (1 + 1e-3)).all()  # 1e-3: rounding of x itself, 256 codes from zero


@pytest.mark.parametrize("bits", ACTIVATION_BITS)
@pytest.mark.parametrize("seed", range(20))
def test_activation_rounding_equals_torch(seed: int, bits: int) -> None:
    """Values and gradients, with an eighth of the inputs outside the range."""
    x = random_weight(seed, 4, 100).requires_grad_()
    qparams = activation_qparams(torch.tensor(-1.0 - seed / 10), torch.tensor(1.2), bits)
    expected = torch.fake_quantize_per_tensor_affine(x, qparams.scale, qparams.zero_point, 0, 2**bits - 1)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), x)
    actual = fake_quantize_activation(x, qparams, bits)
    (gradient,) = torch.autograd.grad(actual.sum(), x)
    assert torch.equal(actual, expected)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-6)  # scale * (1 / scale), not 1
    assert 0 < gradient.sum() < gradient.numel()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_dynamic_qparams_are_those_of_the_range(memory_format: torch.memory_format) -> None:
    x = random_weight(6, 2, 3, 4, 5).contiguous(memory_format=memory_format)
    for shifted in (x, x + 10, x - 10, x * 0):
        expected = activation_qparams(shifted.min(), shifted.max(), 8)
        assert dynamic_activation_qparams(shifted, 8) == expected


# Bounds where rounding, clamping or the special numbers of fp32 could go another way in double precision.
BOUNDS = [0.0, -0.0, 1e-45, -3e-39, 1e-12, -1e-12, 1.0, 255.0, 3.4e38, -3.4e38, np.inf, -np.inf, np.nan]


@given(
    low=st.one_of(st.floats(width=32), st.sampled_from(BOUNDS)),
    high=st.one_of(st.floats(width=32), st.sampled_from(BOUNDS)),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]),
    bits=st.sampled_from(ACTIVATION_BITS),
)
def test_scalar_qparams_are_the_same_numbers(low: float, high: float, dtype: torch.dtype, bits: int) -> None:
    x = torch.tensor([low, high], dtype=dtype)
    scale, zero_point = dynamic_scalar_qparams(x, bits)
    expected = dynamic_activation_qparams(x, bits)
    np.testing.assert_array_equal(np.float64(scale), expected.scale.double().numpy())  # a NaN equals a NaN
    assert zero_point == expected.zero_point


def test_scalar_qparams_beyond_fp32() -> None:
    x = torch.tensor([-1.0, 1e300], dtype=torch.float64)
    scale, zero_point = dynamic_scalar_qparams(x, 8)
    assert (
        (scale, zero_point) == tuple(value.item() for value in dynamic_activation_qparams(x, 8)) == (float("inf"), 0)
    )


def test_an_empty_input_has_the_range_of_zeros() -> None:
    assert dynamic_activation_qparams(torch.empty(0, 3), 8) == dynamic_activation_qparams(torch.zeros(1), 8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_get_the_codes_of_fp32(dtype: torch.dtype) -> None:
    x = (random_weight(7, 1000) * 3).to(dtype)
    qparams = dynamic_activation_qparams(x, 8)
    rounded = fake_quantize_activation(x, qparams, 8)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, fake_quantize_activation(x.float(), qparams, 8).to(dtype))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_ranges_that_are_not_finite(bad: float) -> None:
    """Refused where a range is stored; where it is measured in each call, they come out as they went in."""
    with pytest.raises(ValueError, match="NaN or an infinity"):
        activation_qparams(torch.tensor([0.0, bad]).amin(), torch.tensor([0.0, bad]).amax(), 8)
    qparams = dynamic_activation_qparams(torch.tensor([1.0, bad]), 8)
    assert not qparams.scale.isfinite()
    assert 0 <= qparams.zero_point <= 255


def test_qparams_broadcast_over_timestep_groups() -> None:
    qparams = activation_qparams(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 5.1]), 8)
    x = random_weight(8, 2, 7)
    rows = ActivationQParams(qparams.scale.unsqueeze(1), qparams.zero_point.unsqueeze(1))
    expected = [
        fake_quantize_activation(row, ActivationQParams(*values), 8)
        for row, *values in zip(x, qparams.scale, qparams.zero_point, strict=True)
    ]
    assert torch.equal(fake_quantize_activation(x, rows, 8), torch.stack(expected))
