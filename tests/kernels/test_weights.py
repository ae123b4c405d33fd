"""Specification of the kernel for weights: what qparams.py and packing.py give, to the last bit."""

from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_pqcad.kernels.native import weights
from diffusers_pqcad.layers.quantized import PQCADLinear
from diffusers_pqcad.numerics.packing import pack_codes, pack_levels, packed_row_bytes, unpack_levels
from diffusers_pqcad.numerics.qparams import WEIGHT_BITS, WeightSpec, as_groups, min_max_weight_scale, quantize_weight

needs_compiler = pytest.mark.skipif(isinstance(weights.library(), str), reason=str(weights.library()))


def expected(weight: Tensor, scale: Tensor, spec: WeightSpec) -> tuple[Tensor, Tensor]:
    """The packed weights by PyTorch, and ||Q(W) - W||^2 and ||W||^2 in float64."""
    levels, groups = quantize_weight(weight, scale, spec), as_groups(weight.double(), scale.shape[1])
    rest = as_groups(levels.double(), scale.shape[1]) * scale.double().unsqueeze(-1) - groups
    return pack_levels(levels, spec), torch.stack([rest.square().sum(), groups.square().sum()])


@needs_compiler
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(WEIGHT_BITS),
    rows=st.integers(1, 9),
    groups=st.integers(1, 4),
    size=st.integers(1, 50),
    clip=st.sampled_from([0.3, 1.0, 1.7]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
@settings(max_examples=150)
def test_codes_are_those_of_pytorch(seed, bits, rows, groups, size, clip, dtype) -> None:
    torch.manual_seed(seed)
    weight, spec = torch.randn(rows, groups * size).to(dtype), WeightSpec(bits, size if groups > 1 else None)
    least = min_max_weight_scale(weight, spec)
    for asked, scale in ((None, least), ((least * clip).clamp(min=1e-12),) * 2):
        packed, used, errors = weights.quantize(weight, spec, asked)
        exact_packed, exact_errors = expected(weight, scale, spec)
        assert torch.equal(used, scale)
        assert torch.equal(packed, exact_packed)
        assert packed.dtype == torch.uint8
        # Of a weight and its near level, fp32 knows the difference to 6e-8 of the weight.
        torch.testing.assert_close(errors.double(), exact_errors, rtol=1e-5, atol=2e-7 * exact_errors[1].item())


@needs_compiler
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(WEIGHT_BITS),
    shape=st.lists(st.integers(1, 9), min_size=2, max_size=4),
)
@settings(max_examples=100)
def test_levels_are_those_of_pytorch(seed: int, bits: int, shape: list[int]) -> None:
    """Of any bytes: a file may hold codes that no weight has."""
    torch.manual_seed(seed)
    size, spec = torch.Size(shape), WeightSpec(bits)
    packed = torch.randint(0, 256, (2 * size[0], packed_row_bytes(size[1:].numel(), bits)), dtype=torch.uint8)[::2]
    levels = weights.unpack(packed, spec, size)
    assert levels.dtype == torch.int8
    assert torch.equal(levels, unpack_levels(packed, spec, size))


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
@pytest.mark.parametrize("bits", sorted({*range(1, 17)} - {*WEIGHT_BITS}))
def test_another_width_is_refused(bits: int, compiled: bool, monkeypatch) -> None:
    if not compiled:
        monkeypatch.setattr(weights, "library", lambda: "no C compiler was found")
    spec = WeightSpec(4)
    object.__setattr__(spec, "bits", bits)  # which refuses it itself, when it is made
    packed = torch.zeros(2, 40, dtype=torch.uint8)
    for call in (
        lambda: weights.quantize(torch.randn(2, 40), spec),
        lambda: weights.unpack(packed, spec, torch.Size((2, 40))),
        lambda: weights.highest_code(packed, bits),
    ):
        with pytest.raises(ValueError, match=f"bits: expected one of .* got {bits}"):
            call()


@needs_compiler
@pytest.mark.parametrize("bits", sorted({*range(-1, 17)} - {*WEIGHT_BITS}))
def test_the_compiled_code_reports_another_width_and_writes_nothing(bits: int) -> None:
    loaded = weights.library()
    weight, scale, errors = torch.randn(2, 40), torch.ones(2, 1), torch.full((2, 2), 7.0, dtype=torch.float64)
    packed, levels, room = (torch.full((2, 80), 7, dtype=torch.uint8) for _ in range(3))
    assert loaded.unpack_rows(packed.data_ptr(), 2, 40, bits, levels.data_ptr()) < 0
    assert loaded.highest_code(packed.data_ptr(), 80, bits) < 0
    addresses = (room.data_ptr(), packed.data_ptr(), errors.data_ptr())
    assert loaded.quantize_rows(weight.data_ptr(), scale.data_ptr(), 2, 1, 40, 1, bits, 40, 1, *addresses) < 0
    assert all(bool((tensor == 7).all()) for tensor in (packed, levels, room, errors))
    assert bool((scale == 1).all())


@needs_compiler
@pytest.mark.parametrize("size", [(2, 9), (3, 7), (2, 17)])
def test_rows_of_another_length_are_not_unpacked(size: tuple[int, int]) -> None:
    """C would read or write beyond them."""
    with pytest.raises(ValueError, match=r"expected \(\d, \d\) bytes for .* weights of 4 bits, got \(2, 4\)"):
        weights.unpack(torch.zeros(2, 4, dtype=torch.uint8), WeightSpec(4), torch.Size(size))


@needs_compiler
def test_the_layer_whose_weights_have_another_length_is_named() -> None:
    layer = PQCADLinear(8, 2)
    layer.name = "mid_block.proj"
    layer.pack_(WeightSpec(4), activation_bits=8)
    layer.qweight = layer.qweight[:, :3]
    with pytest.raises(ValueError, match=r"mid_block.proj: packed weights: expected \(2, 4\) .*, got \(2, 3\)"):
        layer.operation().channel_levels()


@needs_compiler
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_ties_are_rounded_to_even_and_zeros_stay(bits: int) -> None:
    spec = WeightSpec(bits)
    weight = torch.arange(-300, 301).div(4).repeat(2, 1)  # quarters of a level, within and beyond
    weight[1] = 0
    scale = torch.tensor([[1.0], [0.5]])
    packed, _, errors = weights.quantize(weight, spec, scale)
    exact_packed, exact_errors = expected(weight, scale, spec)
    assert torch.equal(packed, exact_packed)
    torch.testing.assert_close(errors.double(), exact_errors, rtol=1e-5, atol=0)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_scales_of_zeros_and_of_tiny_weights(bits: int, compiled: bool, monkeypatch) -> None:
    if not compiled:
        monkeypatch.setattr(weights, "library", lambda: "no C compiler was found")
    weight = torch.tensor([[0.0, -0.0], [1e-40, 0.0], [1e-30, -1e-20], [3e38, -1.0]])
    packed, scale, _ = weights.quantize(weight, WeightSpec(bits))
    assert torch.equal(scale, min_max_weight_scale(weight, WeightSpec(bits)))
    assert torch.equal(packed, expected(weight, scale, WeightSpec(bits))[0])


def test_a_convolution_and_views_are_taken_as_they_are() -> None:
    weight, spec = torch.randn(3, 3, 10, 12).permute(3, 2, 1, 0), WeightSpec(3)
    packed, scale, errors = weights.quantize(weight, spec)
    assert torch.equal(scale, min_max_weight_scale(weight, spec))
    assert torch.equal(packed, expected(weight, scale, spec)[0])
    assert torch.equal(weights.quantize(weight.contiguous(), spec, scale)[2], errors)
    room = torch.rand(24, 1)
    assert torch.equal(weights.quantize(weight, spec, room[::2])[0], expected(weight, room[::2], spec)[0])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_a_weight_in_pieces_is_the_whole_one(bits: int, compiled: bool, monkeypatch) -> None:
    if not compiled:
        monkeypatch.setattr(weights, "library", lambda: "no C compiler was found")
    weight, spec = torch.randn(11, 40).bfloat16(), WeightSpec(bits, 20)
    monkeypatch.setattr(weights, "CACHED_WEIGHTS", 130)  # three rows, and two at the end
    least = min_max_weight_scale(weight, spec)
    for scale in (None, least * 0.7):
        packed, used, errors = weights.quantize(weight, spec, scale)
        assert torch.equal(used, least if scale is None else scale)
        exact_packed, exact_errors = expected(weight, used, spec)
        assert torch.equal(packed, exact_packed)
        torch.testing.assert_close(errors.double(), exact_errors, rtol=1e-5, atol=0)
    weight[10, 39] = torch.nan
    for scale in (None, least):
        with pytest.raises(ValueError, match="hold a NaN or an infinity"):
            weights.quantize(weight, spec, scale)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight = torch.randn(4, 40)
    weight[2, 33] = value
    assert weights.largest_magnitudes(weight).isfinite().flatten().tolist() == [True, True, False, True]
    for scale in (None, torch.ones(4, 1)):
        with pytest.raises(ValueError, match="hold a NaN or an infinity"):
            weights.quantize(weight, WeightSpec(4), scale)


@needs_compiler
def test_threads_change_nothing() -> None:
    weight, spec = torch.randn(50, 70), WeightSpec(4)
    one = weights.quantize(weight, spec)
    torch.set_num_threads(3)
    try:
        three = weights.quantize(weight, spec)
    finally:
        torch.set_num_threads(1)
    for alone, together in zip(one, three, strict=True):
        assert torch.equal(alone, together)


@pytest.fixture
def no_compiler() -> Iterator[None]:
    with mock.patch.object(weights, "library", return_value="no C compiler was found"):
        yield


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_without_a_compiler_pytorch_computes_it(no_compiler: None, bits: int) -> None:
    weight, spec = torch.randn(6, 40), WeightSpec(bits, 20)
    packed, scale, errors = weights.quantize(weight, spec)
    assert torch.equal(scale, min_max_weight_scale(weight, spec))
    exact_packed, exact_errors = expected(weight, scale, spec)
    assert torch.equal(packed, exact_packed)
    torch.testing.assert_close(errors.double(), exact_errors, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(5, 1), (6, 3), (1, 1), (6,)])
def test_scales_of_other_shapes_are_refused(shape) -> None:
    """C would read beyond them."""
    with pytest.raises(ValueError, match="scale: expected"):
        weights.quantize(torch.randn(6, 40), WeightSpec(8), torch.ones(shape))
    layer = PQCADLinear(40, 6)
    layer.name = "proj"
    with pytest.raises(ValueError, match="proj: scale: expected a shape of"):
        layer.pack_(WeightSpec(8), activation_bits=8, scale=torch.ones(shape))
    assert not layer.packed


def test_scales_of_another_dtype_are_taken_as_numbers() -> None:
    weight, spec = torch.randn(6, 40), WeightSpec(4)
    scale = min_max_weight_scale(weight, spec).half()
    expected_codes = weights.quantize(weight, spec, scale.float())[0]
    assert torch.equal(weights.quantize(weight, spec, scale.double())[0], expected_codes)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("row_length", [1, 7, 24])
def test_the_highest_code_is_found_anywhere(bits: int, row_length: int, compiled: bool) -> None:
    if not compiled:
        with mock.patch.object(weights, "library", return_value="no C compiler was found"):
            find_highest(bits, row_length)
    else:
        find_highest(bits, row_length)


def find_highest(bits: int, row_length: int) -> None:
    for place in range(row_length):
        codes = torch.randint(0, 2**bits - 1, (3, row_length))
        packed = pack_codes(codes, bits)
        assert weights.highest_code(packed, bits) == codes.max()
        codes[1, place] = 2**bits - 1
        assert weights.highest_code(pack_codes(codes, bits), bits) == 2**bits - 1
        assert weights.highest_code(packed[::2], bits) == codes[::2].max()
