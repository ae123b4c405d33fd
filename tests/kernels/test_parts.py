"""Specification of large images: computed in parts, whose codes fit the cache, with the numbers of the whole."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.kernels.x86.calls import call_of, run_call, run_calls
from diffusers_pqcad.kernels.x86.library import compiled, library
from diffusers_pqcad.kernels.x86.packing import can_double, pack
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear
from diffusers_pqcad.numerics.qparams import WeightSpec

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason=str(library()))
WHOLE = 1 << 23


@contextmanager
def parts_of(num_bytes: int) -> Iterator[None]:
    """Codes of so many bytes at once, or of one line of the output where that is more."""
    part_bytes = ctypes.c_int64.in_dll(compiled(), "part_bytes")
    assert part_bytes.value == WHOLE
    part_bytes.value = num_bytes
    try:
        yield
    finally:
        part_bytes.value = WHOLE


def output_of(layer: PQCADConv2d | PQCADLinear, x: Tensor, *, is_doubled: bool = False) -> tuple[Tensor, int]:
    """The output of a call that was planned just now, and the bytes of its codes."""
    operation, memory_format = layer.operation(), torch.contiguous_format
    if operation.geometry is not None:
        memory_format = torch.channels_last
    packed, x = pack(operation), x.contiguous(memory_format=memory_format)
    call = call_of(operation, packed, x.shape, is_doubled=is_doubled)
    return run_call(call, x, memory_format=memory_format), call.code_bytes


@torch.no_grad()
@given(
    seed=st.integers(0, 2**31),
    num_bytes=st.sampled_from([1, 3000, 10_000, 40_000]),
    bits=st.sampled_from([4, 8]),
    channels=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    size=st.tuples(st.integers(1, 4), st.integers(5, 17), st.integers(5, 12)),
    geometry=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(0, 2), st.integers(1, 2)),
    is_doubled=st.booleans(),
)
@settings(max_examples=120, deadline=None)
def test_a_convolution_in_parts_is_the_whole_one(
    seed: int, num_bytes: int, bits: int, channels, size, geometry, is_doubled: bool
) -> None:
    torch.manual_seed(seed)
    kernel_size, stride, padding, dilation = (3, 1, 1, 1) if is_doubled else geometry
    layer = PQCADConv2d(*channels, kernel_size, stride, padding, dilation).requires_grad_(False)
    layer.pack_(WeightSpec(bits), activation_bits=8)
    is_doubled = is_doubled and can_double(layer.operation())
    x = torch.randn(size[0], channels[0], *size[1:])
    whole, most = output_of(layer, x, is_doubled=is_doubled)
    with parts_of(num_bytes):
        in_parts, fewer = output_of(layer, x, is_doubled=is_doubled)
    assert torch.equal(in_parts, whole)
    assert fewer <= most


@torch.no_grad()
@pytest.mark.parametrize("num_bytes", [1, 100, 1000, WHOLE])
def test_matrix_products_in_parts_are_the_whole_ones(num_bytes: int) -> None:
    torch.manual_seed(0)
    layer = PQCADLinear(20, 12).requires_grad_(False)
    layer.pack_(WeightSpec(4), activation_bits=8)
    for shape in ((3, 20), (2, 70, 20), (2, 3, 64, 20), (20,)):
        x = torch.randn(shape)
        whole, _ = output_of(layer, x)
        with parts_of(num_bytes):
            in_parts, code_bytes = output_of(layer, x)
        assert torch.equal(in_parts, whole)
        assert code_bytes <= max(num_bytes, 32 * 20)


@torch.no_grad()
def test_layers_that_share_codes_share_those_of_each_part() -> None:
    torch.manual_seed(0)
    layers = [PQCADLinear(20, outputs).requires_grad_(False) for outputs in (8, 40, 12)]
    for layer in layers:
        layer.pack_(WeightSpec(4), activation_bits=8)
    x = torch.randn(2, 96, 20)
    wanted = [output_of(layer, x)[0] for layer in layers]
    with parts_of(700):
        packed = [pack(layer.operation()) for layer in layers]
        calls = [call_of(layer.operation(), each, x.shape) for layer, each in zip(layers, packed, strict=True)]
        found = run_calls(calls, x)
    assert all(map(torch.equal, found, wanted))


@torch.no_grad()
def test_a_residual_block_in_parts_is_the_whole_one() -> None:
    torch.manual_seed(0)
    block = nn.ModuleList([ResnetBlock2D(in_channels=16, out_channels=24, temb_channels=12, groups=4)])
    block = quantize_(block.eval().requires_grad_(False), PQCADConfig(method="fixed", weight_bits=8))[0]
    x, time = torch.randn(3, 16, 9, 10), torch.randn(3, 12)
    whole = block(x, time)
    for layer in block.modules():
        layer._cache = None  # with the plan for the whole
    with parts_of(2000):
        assert torch.equal(block(x, time), whole)


@torch.no_grad()
def test_codes_of_a_large_image_take_a_part_of_its_memory() -> None:
    layer = PQCADConv2d(32, 8, 3, padding=1).requires_grad_(False)
    layer.pack_(WeightSpec(4), activation_bits=8)
    with kernels.use("x86"):
        small, large = (
            call_of(layer.operation(), pack(layer.operation()), torch.Size((1, 32, size, size))).code_bytes
            for size in (64, 1024)
        )
    assert small < WHOLE / 4
    assert WHOLE / 2 < large <= WHOLE
