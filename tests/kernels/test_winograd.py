"""Specification of Winograd's F(2, 3): two pixels from four products, exact up to 6 bits, and close to that with 8."""

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.kernels.x86.library import compiled, library
from diffusers_pqcad.kernels.x86.packing import pack_filters, uses_winograd
from diffusers_pqcad.kernels.x86.structs import NO_AFFINE, Image, Layer, Output, Rows
from diffusers_pqcad.layers.find import kernel_cache_bytes, packed_layers
from diffusers_pqcad.layers.quantized import PQCADConv2d
from diffusers_pqcad.numerics.qparams import (
    ACTIVATION_BITS,
    WEIGHT_BITS,
    ActivationQParams,
    WeightSpec,
    activation_qmax,
)
from diffusers_pqcad.runtime.residual import FusedResnetBlock2D

HAS_VNNI = not isinstance(library(), str) and bool(compiled().has_vnni())
needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="Winograd tiles are for VNNI")
needs_x86 = pytest.mark.skipif(isinstance(library(), str), reason=str(library()))
NARROW_BITS = [bits for bits in WEIGHT_BITS if bits <= 6]


def draw_levels(generator: np.random.Generator, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    largest = WeightSpec(bits).level_max
    return generator.integers(-largest, largest + 1, shape)


def filters_of(levels: np.ndarray, scale: np.ndarray, *, is_winograd: bool) -> tuple[np.ndarray, np.ndarray]:
    """The filters (elements, O, H, W, C) and scales (elements, O) in the blocks made of `levels` (O, H, W, C).

    There are 1 or 4 elements. What fills up a block, or four channels, is zero, and the sums of levels are those.
    """
    outputs, height, width, channels = levels.shape
    weight, level_sum, scales, _ = pack_filters(
        torch.from_numpy(levels).to(torch.int8).permute(0, 3, 1, 2),
        torch.from_numpy(scale).float(),
        is_winograd=is_winograd,
    )
    size = 4 if is_winograd else 1
    columns, padded = 1 if is_winograd else width, -(-channels // 4) * 4
    in_blocks = weight.view(-1, size, *weight.shape[1:]).permute(1, 0, 3, 2, 4)  # elements, blocks, outputs, steps, 4
    filters = in_blocks.reshape(size, -1, height, columns, padded)
    sums, scales = (each.view(-1, size, weight.shape[2]).transpose(0, 1).flatten(1) for each in (level_sum, scales))
    assert filters.shape[1] == scales.shape[1] == -(-outputs // weight.shape[2]) * weight.shape[2]
    assert torch.equal(sums, filters.sum((2, 3, 4), dtype=torch.int32))
    assert not filters[:, outputs:].any()
    assert not filters[..., channels:].any()
    assert not scales[:, outputs:].any()
    return filters[:, :outputs, ..., :channels].numpy(), scales[:, :outputs].numpy()


def transformed_filters(rows: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What `filters_of` should find for `rows` (O, H, 3, C), in fp32 as the C file computes."""
    first, middle, last = np.moveaxis(rows, 2, 0)
    sums = np.stack([first + middle + last, first - middle + last]).astype(np.float32)
    step = np.maximum(np.abs(sums).max((2, 3)) / np.float32(127), 1)
    filters = np.stack([first, *np.rint(sums / step[..., None, None]), last])
    return filters[:, :, :, None], np.stack([scale, *(scale * step / 2), scale])


def outputs_of(codes: np.ndarray, filters: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Both outputs (2, O) of `codes` (H, 4, C), by the formula in csrc/winograd.h, in float64."""
    d0, d1, d2, d3 = codes.transpose(1, 0, 2)
    elements = [d0 - d2, d1 + d2, d2 - d1, d1 - d3]
    products = [
        np.einsum("hc,ohc->o", element, each[:, :, 0].astype(np.int64)) * factor
        for element, each, factor in zip(elements, filters, scale.astype(np.float64), strict=True)
    ]
    return np.stack([products[0] + products[1] + products[2], products[1] - products[2] - products[3]])


@needs_x86
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(WEIGHT_BITS),
    shape=st.tuples(st.integers(1, 70), st.integers(1, 3), st.integers(1, 4), st.integers(1, 70)),
    is_winograd=st.booleans(),
)
@settings(max_examples=100)
def test_levels_are_in_blocks(seed: int, bits: int, shape: tuple[int, int, int, int], is_winograd: bool) -> None:
    generator = np.random.default_rng(seed)
    outputs, height, width, channels = shape
    levels = draw_levels(generator, bits, (outputs, height, 3 if is_winograd else width, channels))
    scale = generator.random(outputs, dtype=np.float32)
    filters, scales = filters_of(levels, scale, is_winograd=is_winograd)
    wanted, wanted_scales = transformed_filters(levels, scale) if is_winograd else (levels[None], scale[None])
    assert np.array_equal(filters, wanted)
    assert np.array_equal(scales, wanted_scales)


@needs_x86
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(WEIGHT_BITS),
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 9)),
)
@settings(max_examples=50)
def test_four_products_make_the_outputs_of_six(seed: int, bits: int, shape: tuple[int, int, int]) -> None:
    generator = np.random.default_rng(seed)
    outputs, height, channels = shape
    levels = draw_levels(generator, bits, (outputs, height, 3, channels))
    codes = generator.integers(0, 256, (height, 4, channels))
    found = outputs_of(codes, *filters_of(levels, np.ones(outputs), is_winograd=True))
    wanted = np.stack([np.einsum("hkc,ohkc->o", codes[:, k : k + 3], levels) for k in (0, 1)])
    if bits in NARROW_BITS:
        assert np.array_equal(found, wanted)
    else:  # two filters are off by up to 0.75 of a level, and meet d1 + d2 and d2 - d1
        assert np.all(np.abs(found - wanted) <= 0.75 * 2 * 255 * height * channels)


@needs_x86
def test_filters_of_8_bits_are_rounded_only_where_their_sums_are_larger() -> None:
    rows = np.array([[[[40], [40], [47]]], [[[100], [100], [54]]]])  # (2, 1, 3, 1)
    filters, scale = filters_of(rows, np.array([1.0, 10.0]), is_winograd=True)
    assert filters.reshape(4, 2).tolist() == [[40, 100], [127, 127], [47, 54], [47, 54]]  # 254 = 127 * 2 in the second
    assert scale.tolist() == [[1, 10], [0.5, 10], [0.5, 5], [1, 10]]


def first_kept(qmax: int, zero_point: int) -> np.ndarray:
    """The first of the 256 values of each element that are kept."""
    return np.array([-128, 128 if qmax == 255 and zero_point >= 96 else 0, -128, -128])[:, None]


def read_overflow(x: Tensor, bits: int, zero_point: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """What is kept of the transformed tiles of `x` (1, C, H, W), codes less the zero point, and their overflow.

    Both are (H, tiles, elements, C), from what `RowOverflow` in the C file holds, less offset and bias. The flag says
    if the overflow is dense; else it is listed.
    """
    _, channels, height, width = x.shape
    tiles, qmax = width // 2 - 1, activation_qmax(bits)
    image = Image(1, height, width, channels, 0, 0, channels, tiles, 0)
    layer = Layer(image=image, output=Output(out_height=height, stride_y=1))
    codes = torch.empty(compiled().code_bytes(layer), dtype=torch.uint8)
    source = x.contiguous(memory_format=torch.channels_last)
    arguments = image, Rows(0, 1, 0, height), NO_AFFINE, 1.0, zero_point, qmax, 0
    is_dense = bool(compiled().quantize(source.data_ptr(), *arguments, codes.data_ptr()))
    first, bias = first_kept(qmax, zero_point), -1 - first_kept(qmax, zero_point)
    bias[1] = first[1]  # of sums
    rows = codes.view(height, -1).numpy()
    size = 4 * tiles * channels
    kept, dense = (rows[:, at : at + size].reshape(height, tiles, 4, channels).astype(int) for at in (0, size))
    if is_dense:
        return kept + first, dense - bias, True
    overflow = np.zeros_like(kept)
    for y, row in enumerate(rows[:, 2 * size :]):
        starts, numbers = np.split(row.view(np.int32), [tiles + 1])
        entries = numbers[: 3 * starts[-1]].reshape(-1, 3)
        assert (entries[:, 1] // 4).tolist() == np.repeat(np.arange(tiles), np.diff(starts)).tolist()
        for four, place, weights in entries:
            channel = int(weights) // compiled().block_outputs()
            found = overflow[y, place // 4, place % 4, channel : channel + 4]
            assert not found.any()  # listed once
            found[:] = four[None].view(np.uint8) - bias[place % 4]
            assert found.any()
    return kept + first, overflow, False


@needs_vnni
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(ACTIVATION_BITS),
    zero_point=st.sampled_from([0, 15, 64, 100, 128, 191, 255]),
    shape=st.tuples(st.sampled_from([4, 12, 32, 44, 100]), st.integers(1, 3), st.sampled_from([4, 6, 10, 40])),
    shares=st.tuples(st.sampled_from([0.0, 0.01, 0.1, 1.0]), st.sampled_from([0.01, 0.1, 1.0])),
)
@settings(max_examples=100)
def test_what_8_bits_do_not_hold_is_listed_or_dense(
    seed: int, bits: int, zero_point: int, shape: tuple[int, int, int], shares: tuple[float, float]
) -> None:
    """Rows of different shares: where one list is too short for its overflow, that of all rows is dense."""
    generator = np.random.default_rng(seed)
    qmax = activation_qmax(bits)
    zero_point = min(zero_point, qmax)
    channels, height, width = shape
    share = np.array([shares[y % 2] for y in range(height)])[:, None]
    codes = np.where(generator.random(shape) < share, generator.integers(0, qmax + 1, shape), zero_point)
    kept, overflow, is_dense = read_overflow(torch.from_numpy(codes - zero_point).float()[None], bits, zero_point)
    d = [codes[:, :, k : k + width - 3 : 2] for k in range(4)]
    elements = np.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]])  # (elements, C, H, tiles)
    elements = elements.transpose(2, 3, 0, 1)
    assert np.array_equal(kept + overflow, elements)
    first = first_kept(qmax, zero_point)
    assert np.array_equal(kept, elements.clip(first, first + 255))
    steps = np.count_nonzero((overflow.reshape(height, -1, 4) != 0).any(2), axis=1)
    capacity = kept[0].size // 32 + 16
    assert is_dense >= (steps.max() > capacity)
    assert is_dense <= (steps.max() > capacity - 16)


@needs_vnni
@pytest.mark.parametrize("has_silu", [True, False])
def test_few_elements_of_a_norm_overflow_8_bits_and_none_with_codes_of_7(has_silu: bool) -> None:
    """This is what makes them cheap. The more inputs, the farther out is their largest, and the fewer they are."""
    x = torch.randn(1, 64, 16, 34)
    x = torch.nn.functional.silu(x) if has_silu else x
    for bits in ACTIVATION_BITS:
        scale = (x.max() - x.min()) / activation_qmax(bits)
        _, overflow, is_dense = read_overflow((x / scale).round(), bits, round((-x.min() / scale).item()))
        share = (overflow.reshape(-1, 4) != 0).any(1).mean()
        assert not is_dense
        assert 0 < share < 0.12 if bits == 8 else share == 0


def error_of(bits: int, x: Tensor, activation_bits: int) -> float:
    """Relative error of a layer in tiles to the reference kernel's output for `x`."""
    torch.manual_seed(0)
    layer = PQCADConv2d(64, 48, 3, padding=1).requires_grad_(False)
    layer.pack_(WeightSpec(bits), activation_bits=activation_bits)
    with kernels.use("x86"):
        found = layer(x)
    with kernels.use("reference"):
        wanted = layer(x)
    return ((found - wanted).norm() / wanted.norm()).item()


@needs_vnni
@torch.no_grad()
@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
def test_the_error_beside_the_reference_is_that_of_8_bits_or_none(activation_bits: int) -> None:
    x = torch.nn.functional.silu(torch.randn(2, 64, 12, 12))
    for bits in NARROW_BITS:
        assert error_of(bits, x, activation_bits) < 2e-6
    # As rounding weights to 8 bits: 1/127 of a row's largest, over sqrt(12).
    assert 1e-3 < error_of(8, x, activation_bits) < 1.2e-2


@needs_vnni
@torch.no_grad()
@given(
    seed=st.integers(0, 2**31),
    zero_point=st.integers(0, 255),
    share=st.sampled_from([0.01, 0.1, 1.0]),
    channels=st.tuples(st.integers(16, 70), st.integers(1, 70)),
    geometry=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2), st.integers(0, 3)),
    size=st.tuples(st.integers(1, 3), st.integers(5, 9), st.integers(3, 21)),
)
@settings(max_examples=40)
def test_codes_anywhere_in_8_bits_are_exact(
    seed: int, zero_point: int, share: float, channels: tuple[int, int], geometry, size: tuple[int, int, int]
) -> None:
    """Codes over the whole static range, whose elements overflow 8 bits in many places, or few; borders of zeros."""
    torch.manual_seed(seed)
    height, stride, dilation, *padding = geometry
    layer = PQCADConv2d(
        channels[0], channels[1], (max(height, -(-48 // channels[0])), 3),
        stride=(stride, 1), dilation=(dilation, 1), padding=tuple(padding), bias=False,
    ).requires_grad_(False)  # fmt: skip
    layer.pack_(WeightSpec(6), activation_bits=8)
    assert uses_winograd(layer.operation())
    layer.set_input_qparams_(ActivationQParams(torch.ones(1), torch.tensor([zero_point], dtype=torch.int32)), None)
    shape = size[0], channels[0], *size[1:]
    x = torch.where(torch.rand(shape) < share, torch.randint(0, 256, shape) - zero_point, 0).float()
    with kernels.use("x86"):
        found = layer(x)
    wanted = torch.nn.functional.conv2d(
        x.double(), layer.levels().double(), None, layer.stride, layer.padding, layer.dilation
    ) * layer.weight_scale.double().view(-1, 1, 1)
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max().clamp(min=1)


@needs_vnni
@torch.no_grad()
def test_only_rows_of_three_pixels_side_by_side_are_transformed_and_cost_a_third_more_memory() -> None:
    sizes = {3: 4 * 3, (1, 3): 4, (3, 1): 3, 1: 1}  # levels for each pair of an input and an output
    for kernel_size, size in sizes.items():
        layer = PQCADConv2d(48, 32, kernel_size).requires_grad_(False)
        layer.pack_(WeightSpec(4), activation_bits=7)
        with kernels.use("x86"):
            layer(torch.randn(1, 48, 6, 6))
        assert layer.packed_for("x86").of_kind[False].weight.numel() == kernel_cache_bytes(layer) == 48 * 32 * size
    for settings_ in ({"stride": (1, 2)}, {"dilation": (1, 2)}):
        layer = PQCADConv2d(48, 8, 3, **settings_)
        layer.pack_(WeightSpec(4), activation_bits=8)
        assert not uses_winograd(layer.operation())
    for inputs in (15, 16):  # too few products to save in the first
        layer = PQCADConv2d(inputs, 8, 3)
        layer.pack_(WeightSpec(4), activation_bits=8)
        assert uses_winograd(layer.operation()) == (inputs == 16)


@needs_vnni
@torch.no_grad()
@pytest.mark.parametrize(("before", "after"), [(7, 8), (8, 7)])
@pytest.mark.parametrize("width", [8, 9])
def test_bits_of_activations_may_change(before: int, after: int, width: int) -> None:
    """At the size of the first call and at another: C would read beyond the weights."""
    layer = PQCADConv2d(32, 32, 3).requires_grad_(False)
    layer.pack_(WeightSpec(4), activation_bits=before)
    with kernels.use("x86"):
        layer(torch.randn(1, 32, 8, 8))
    layer.activation_bits = after
    x = torch.randn(1, 32, 8, width)
    with kernels.use("reference"):
        wanted = layer(x)
    with kernels.use("x86"):
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)


@needs_vnni
@torch.no_grad()
@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize("width", [7, 8])
def test_a_residual_block_in_tiles_is_what_its_modules_compute(width: int, activation_bits: int) -> None:
    """Time embeddings are added to both pixels of a tile, residuals to each its own."""
    block = ResnetBlock2D(in_channels=32, out_channels=32, temb_channels=16, groups=8).eval().requires_grad_(False)
    config = PQCADConfig(method="fixed", weight_bits=4, activation_bits=activation_bits)
    model = quantize_(nn.ModuleDict({"block": block}), config)
    assert type(model["block"]) is FusedResnetBlock2D
    assert uses_winograd(model["block"].conv2.operation())
    x, time = torch.randn(2, 32, 5, width), torch.randn(2, 16)
    found = model["block"](x, time)
    wanted = ResnetBlock2D.forward(model["block"], x, time)
    assert (found - wanted).abs().max() < 2e-2 * wanted.abs().max()  # a code on the other side of a tie
    assert (found - wanted).norm() < 2e-3 * wanted.norm()


@needs_vnni
@torch.no_grad()
@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_in_tiles_is_as_near_to_the_float_model_as_by_the_reference(
    tiny_unet, bits: int, activation_bits: int
) -> None:
    """Fused blocks, their norms, their time embeddings and residuals among them."""
    size = tiny_unet.config.sample_size
    inputs = torch.randn(4, tiny_unet.config.in_channels, size, size), torch.tensor(7)
    wanted = tiny_unet(*inputs).sample
    quantize_(tiny_unet, PQCADConfig(method="fixed", weight_bits=bits, activation_bits=activation_bits))
    assert sum(uses_winograd(layer.operation()) for layer in packed_layers(tiny_unet).values()) > 5
    error = (tiny_unet(*inputs).sample - wanted).norm().item()
    with kernels.use("reference"):
        reference = (tiny_unet(*inputs).sample - wanted).norm().item()
    assert error == pytest.approx(reference, rel=0.15 if bits in NARROW_BITS else 0.5)  # filters of 8 bits are rounded
