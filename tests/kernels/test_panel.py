"""Specification of weights that are unpacked in each call: the same blocks, and the same numbers, without copies."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels.operation import Operation
from diffusers_pqcad.kernels.x86.library import compiled, library
from diffusers_pqcad.kernels.x86.packing import blocks_of, packed_of
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear, QuantizedLayer
from diffusers_pqcad.numerics.qparams import ACTIVATION_BITS, WEIGHT_BITS, WeightSpec

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason=str(library()))
KERNELS = [(1, 1), (3, 3), (1, 3), (3, 1), (5, 5), (2, 3)]


@contextmanager
def part_bytes_of(num_bytes: int) -> Iterator[None]:
    """Codes of so many bytes at once."""
    part_bytes = ctypes.c_int64.in_dll(compiled(), "part_bytes")
    before, part_bytes.value = part_bytes.value, num_bytes
    try:
        yield
    finally:
        part_bytes.value = before


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def convolution(bits: int, activation_bits: int, shape: tuple[int, ...], **settings: Any) -> PQCADConv2d:
    layer = PQCADConv2d(shape[1], shape[0], shape[2:], **settings)
    layer.pack_(WeightSpec(bits), activation_bits=activation_bits)
    return layer


def linear(bits: int, activation_bits: int, shape: tuple[int, int], group_size: int | None) -> PQCADLinear:
    layer = PQCADLinear(shape[1], shape[0])
    with torch.no_grad():  # groups that are not alike
        layer.weight.mul_(torch.linspace(0.2, 3, shape[1]))
    layer.pack_(WeightSpec(bits, group_size), activation_bits=activation_bits)
    return layer


def assert_same(layer: QuantizedLayer, x: Tensor) -> None:
    """The output without copies is, bit for bit, that with copies."""
    with kernels.use("x86", memory="normal"):
        expected = layer(x)
        assert layer.cached_bytes() > 0
    with kernels.use("x86", memory="low"):
        found = layer(x)
        assert layer.cached_bytes() == 0
    assert torch.equal(found, expected)


@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(WEIGHT_BITS),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 75)),
    kernel=st.sampled_from(KERNELS),
    kind=st.sampled_from(["plain", "winograd", "doubled"]),
)
@settings(max_examples=150, deadline=None)
@torch.no_grad()
def test_a_panel_holds_the_bytes_that_would_be_kept(
    seed: int, bits: int, shape: tuple[int, int], kernel: tuple[int, int], kind: str
) -> None:
    """Winograd's blocks are made on any CPU, though only those with VNNI multiply by them."""
    torch.manual_seed(seed)
    kernel = (3, 3) if kind == "doubled" else (kernel[0], 3) if kind == "winograd" else kernel
    operation = convolution(bits, 8, (*shape, *kernel)).operation()
    kinds = {"is_winograd": kind != "plain", "is_doubled": kind == "doubled"}
    weight, *_, divisors = blocks_of(operation, **kinds)
    assert_panels_are(operation, weight, divisors, **kinds)


@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(WEIGHT_BITS),
    outputs=st.integers(1, 40),
    group_size=st.sampled_from([1, 3, 8, 40]),
    num_groups=st.integers(1, 9),
)
@settings(max_examples=60, deadline=None)
@torch.no_grad()
def test_rows_of_several_scales_are_rounded_to_the_same_bytes(
    seed: int, bits: int, outputs: int, group_size: int, num_groups: int
) -> None:
    torch.manual_seed(seed)
    operation = linear(bits, 8, (outputs, group_size * num_groups), group_size).operation()
    weight, *_, divisors = blocks_of(operation, is_winograd=False, is_doubled=False)
    assert_panels_are(operation, weight, divisors, is_winograd=False, is_doubled=False)


def assert_panels_are(
    operation: Operation, weight: Tensor, divisors: Tensor, *, is_winograd: bool, is_doubled: bool
) -> None:
    packed, _ = packed_of(operation, divisors, is_winograd=is_winograd, is_doubled=is_doubled)
    steps, outputs = weight.shape[1:3]
    elements = 1 if not is_winograd else 3 if is_doubled else 4
    panels = weight.view(2 if is_doubled else 1, -1, elements, *weight.shape[1:])
    panel = torch.empty(compiled().bytes_of_panel(packed, steps), dtype=torch.int8)
    for phase, of_phase in enumerate(panels):
        for block, expected in enumerate(of_phase):
            panel.fill_(99)
            index = (phase * len(of_phase) + block) * elements
            compiled().unpack_panel(packed, phase, block * outputs, index, steps, panel.data_ptr())
            assert torch.equal(panel[: expected.numel()].view(expected.shape), expected)


@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(WEIGHT_BITS),
    activation_bits=st.sampled_from(ACTIVATION_BITS),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 70)),
    kernel=st.sampled_from(KERNELS),
    size=st.tuples(st.integers(1, 2), st.integers(5, 24), st.integers(5, 19)),
    moves=st.tuples(st.integers(1, 2), st.integers(0, 2), st.integers(1, 2)),
    num_bytes=st.sampled_from([3000, 1 << 23]),
    num_threads=st.integers(1, 3),
)
@settings(max_examples=120, deadline=None)
@torch.no_grad()
def test_a_convolution_without_copies_is_that_with_them(
    seed: int, bits: int, activation_bits: int, channels, kernel, size, moves, num_bytes: int, num_threads: int
) -> None:
    torch.manual_seed(seed)
    stride, padding, dilation = moves
    if any(extent + 2 * padding <= dilation * (taps - 1) for extent, taps in zip(size[1:], kernel, strict=True)):
        padding = 2 * dilation
    layer = convolution(bits, activation_bits, (*channels, *kernel), stride=stride, padding=padding, dilation=dilation)
    x = torch.randn(size[0], channels[1], *size[1:])
    with part_bytes_of(num_bytes), threads_of(num_threads):
        assert_same(layer, x)


@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(WEIGHT_BITS),
    activation_bits=st.sampled_from(ACTIVATION_BITS),
    outputs=st.integers(1, 70),
    group_size=st.sampled_from([None, 4, 20]),
    inputs=st.integers(1, 20),
    rows=st.sampled_from([1, 2, 7, 100, 900]),
    num_threads=st.integers(1, 3),
)
@settings(max_examples=120, deadline=None)
@torch.no_grad()
def test_a_matrix_product_without_copies_is_that_with_them(
    seed: int, bits: int, activation_bits: int, outputs: int, group_size: int | None, inputs: int, rows: int,
    num_threads: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    layer = linear(bits, activation_bits, (outputs, 20 * inputs), group_size)
    with threads_of(num_threads):
        assert_same(layer, torch.randn(rows, 20 * inputs))


@torch.no_grad()
def test_a_plan_for_few_threads_is_run_by_no_more() -> None:
    """The memory for blocks is that of as many threads as there were when the call was planned."""
    from diffusers_pqcad.kernels.x86.calls import call_of, run_call

    layer, x = linear(4, 8, (640, 320), None), torch.randn(300, 320)
    with kernels.use("x86", memory="low"):
        expected = layer(x)
        operation = layer.operation()
        with threads_of(1):
            call = call_of(operation, layer.packed_as(operation, "x86"), x.shape)
        assert call.layer.threads == 1
        with threads_of(3):
            assert torch.equal(run_call(call, x), expected)


@torch.no_grad()
def test_the_weights_are_described_a_few_outputs_at_a_time(monkeypatch: Any) -> None:
    layer, x = convolution(3, 8, (70, 33, 3, 3), padding=1), torch.randn(1, 33, 9, 9)
    monkeypatch.setattr("diffusers_pqcad.kernels.x86.packing.SLICED_WEIGHTS", 1)
    assert_same(layer, x)
    assert_same(linear(4, 8, (70, 40), 8), torch.randn(3, 40))


@torch.no_grad()
def test_float_layers_are_near() -> None:
    """Bit-exactness to the mode with copies would not see a defect of both."""
    torch.manual_seed(0)
    layer = nn.Linear(320, 64)
    packed = PQCADLinear.from_float(layer, "layer")
    x = torch.randn(40, 320)
    expected = layer(x)
    packed.pack_(WeightSpec(8), activation_bits=8)
    with kernels.use("x86", memory="low"):
        assert (packed(x) - expected).norm() < 0.02 * expected.norm()
