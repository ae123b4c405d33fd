"""Specification of the packed format: a byte layout written down here a second time, in plain Python."""

from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_pqcad.numerics.packing import (
    block_shape,
    pack_codes,
    pack_levels,
    packed_row_bytes,
    unpack_codes,
    unpack_levels,
)
from diffusers_pqcad.numerics.qparams import WEIGHT_BITS, WeightSpec

pytestmark = pytest.mark.fast
# Codes of a row of 9 weights take these bytes: whole blocks, the last one padded.
BYTES_OF_NINE = {2: 3, 3: 6, 4: 5, 6: 9, 8: 9}


def bit_stream(codes: list[int], bits: int) -> bytes:
    """Least significant bit first, one code after the other; zeros up to the next whole block."""
    stream = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    block = next(length for length in range(8, 65, 8) if length % bits == 0)  # shortest run of whole bytes
    stream = stream.ljust(ceil(len(stream) / block) * block, "0")
    return bytes(int(stream[start : start + 8][::-1], 2) for start in range(0, len(stream), 8))


def codes_of(bits: int) -> st.SearchStrategy[list[list[int]]]:
    code = st.integers(0, 2**bits - 1)
    return st.integers(1, 40).flatmap(
        lambda length: st.lists(st.lists(code, min_size=length, max_size=length), min_size=1, max_size=3)
    )


def test_three_bits_by_hand() -> None:
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0]])
    # 001, 010, 011, 100, 101, 110, 111, 000 from the right: 0b000_111_110_101_100_011_010_001
    assert pack_codes(codes, 3).tolist() == [[0b11010001, 0b01011000, 0b00011111]]


@pytest.mark.parametrize("bits", sorted({*range(-1, 17)} - {*WEIGHT_BITS}))
def test_another_width_is_refused(bits: int) -> None:
    """Of 5 or 7 bits, a block would be longer than a word, and lose its end."""
    codes = torch.zeros(2, 40, dtype=torch.int64)
    for call in (
        lambda: pack_codes(codes, bits),
        lambda: unpack_codes(codes.to(torch.uint8), bits, 8),
        lambda: packed_row_bytes(8, bits),
        lambda: WeightSpec(bits),
    ):
        with pytest.raises(ValueError, match=f"bits: expected one of .* got {bits}"):
            call()


def test_blocks_and_bytes() -> None:
    assert {bits: block_shape(bits) for bits in WEIGHT_BITS} == {2: (4, 1), 3: (8, 3), 4: (2, 1), 6: (4, 3), 8: (1, 1)}
    assert {bits: packed_row_bytes(9, bits) for bits in WEIGHT_BITS} == BYTES_OF_NINE


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@given(data=st.data())
def test_layout_is_the_little_endian_bit_stream(bits: int, data: st.DataObject) -> None:
    rows = data.draw(codes_of(bits))
    packed = pack_codes(torch.tensor(rows), bits)
    assert packed.dtype == torch.uint8
    assert [bytes(row) for row in packed.tolist()] == [bit_stream(row, bits) for row in rows]
    unpacked = unpack_codes(packed, bits, len(rows[0]))
    assert unpacked.dtype == torch.uint8
    assert unpacked.tolist() == rows


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@given(length=st.integers(1, 200), rows=st.integers(1, 4))
def test_size_is_the_bits_of_a_row_in_whole_blocks(bits: int, length: int, rows: int) -> None:
    num_bytes = packed_row_bytes(length, bits)
    assert pack_codes(torch.zeros(rows, length, dtype=torch.int64), bits).shape == (rows, num_bytes)
    assert Fraction(length * bits, 8) <= num_bytes < Fraction(length * bits, 8) + block_shape(bits)[1]
    assert num_bytes == len(bit_stream([0] * length, bits))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@given(seed=st.integers(0, 2**31), channels=st.integers(1, 5), kernel=st.sampled_from([(), (1, 1), (3, 3), (2, 5)]))
def test_levels_come_back(bits: int, seed: int, channels: int, kernel: tuple[int, ...]) -> None:
    spec = WeightSpec(bits)
    grid = torch.arange(-spec.level_max, spec.level_max + 1, spec.level_step, dtype=torch.int8)
    assert len(grid) == (4 if bits == 2 else 2**bits - 1)
    shape = torch.Size((channels, 7, *kernel))
    levels = grid[torch.randint(len(grid), shape, generator=torch.Generator().manual_seed(seed))]
    restored = unpack_levels(pack_levels(levels, spec), spec, shape)
    assert restored.dtype == torch.int8
    assert torch.equal(restored, levels)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_code_zero_is_the_smallest_level(bits: int) -> None:
    spec = WeightSpec(bits)
    lowest, highest = torch.full((1, 8), -spec.level_max), torch.full((1, 8), spec.level_max)
    assert pack_levels(lowest.to(torch.int8), spec).unique().tolist() == [0]
    top_code = 3 if bits == 2 else 2**bits - 2
    assert bytes(pack_levels(highest.to(torch.int8), spec)[0].tolist()) == bit_stream([top_code] * 8, bits)
