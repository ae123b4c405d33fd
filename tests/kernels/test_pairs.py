"""Specification of F(2, 3): pairs of pixels from four products, exact up to 6 bits, and close to that with 8."""

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.blocks import FusedResnetBlock2D
from diffusers_pqcad.kernels import x86
from diffusers_pqcad.layers import PQCADConv2d, kernel_cache_bytes, packed_layers
from diffusers_pqcad.qparams import ACTIVATION_BITS, WEIGHT_BITS, ActivationQParams, WeightSpec, activation_qmax

HAS_VNNI = not isinstance(x86.library(), str) and bool(x86.compiled().has_vnni())
needs_vnni = pytest.mark.skipif(not HAS_VNNI, reason="pairs are for AVX-512 VNNI")
NARROW_BITS = [bits for bits in WEIGHT_BITS if bits <= 6]


def draw_levels(generator: np.random.Generator, bits: int, shape: tuple[int, ...]) -> np.ndarray:
    largest = WeightSpec(bits).level_max
    return generator.integers(-largest, largest + 1, shape)


def outputs_of(codes: np.ndarray, filters: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Both outputs (2, O) of `codes` (H, 4, C), by the formula in the docstring of `pair_filters`, in float64."""
    d0, d1, d2, d3 = codes.transpose(1, 0, 2)
    terms = [d0 - d2, d1 + d2, d2 - d1, d1 - d3]
    products = [
        np.einsum("hc,ohc->o", term, each[:, :, 0].astype(np.int64)) * factor
        for term, each, factor in zip(terms, filters, scale.astype(np.float64), strict=True)
    ]
    return np.stack([products[0] + products[1] + products[2], products[1] - products[2] - products[3]])


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
    filters, scale = x86.pair_filters(torch.from_numpy(levels).to(torch.int8), torch.ones(outputs))
    found = outputs_of(codes, filters.numpy(), scale.numpy())
    wanted = np.stack([np.einsum("hkc,ohkc->o", codes[:, k : k + 3], levels) for k in (0, 1)])
    if bits in NARROW_BITS:
        assert np.array_equal(found, wanted)
    else:  # two filters are off by up to 0.75 of a level, and meet d1 + d2 and d2 - d1
        assert np.all(np.abs(found - wanted) <= 0.75 * 2 * 255 * height * channels)


def test_filters_of_8_bits_are_rounded_only_where_their_sums_are_larger() -> None:
    rows = torch.tensor([[[[40], [40], [47]]], [[[100], [100], [54]]]], dtype=torch.int8)  # (2, 1, 3, 1)
    filters, scale = x86.pair_filters(rows, torch.tensor([1.0, 10.0]))
    assert filters.flatten(1).tolist() == [[40, 100], [127, 127], [47, 54], [47, 54]]  # 254 = 127 * 2 in the second
    assert scale.tolist() == [[1, 10], [0.5, 10], [0.5, 5], [1, 10]]


def list_excesses(x: Tensor, bits: int, zero_point: int) -> list[list[tuple[int, int, int, list[int]]]]:
    """Of each row of the codes of `x` (1, C, H, W), whose values are codes less the zero point, what exceeds 8 bits.

    That is (pair, term, first channel, four excesses) each, as `Excesses` in the C file holds them.
    """
    _, channels, height, width = x.shape
    pairs, terms = width // 2 - 1, 4
    image = x86.Image(1, height, width, channels, 0, 0, channels, pairs)
    codes = torch.empty(image.code_bytes(), dtype=torch.uint8)
    dense = x.contiguous(memory_format=torch.channels_last)
    qmax = activation_qmax(bits)
    x86.compiled().quantize(dense.data_ptr(), image, x86.NO_AFFINE, 1.0, zero_point, qmax, 0, codes.data_ptr())
    start_of_sums = max(0, min(2 * zero_point - 128, 2 * qmax - 255))
    rows = []
    for row in codes.view(height, -1).numpy():
        starts, entries = np.split(
            row[4 * pairs * channels :].view(np.int32)[: pairs + 1 + 3 * pairs * channels], [pairs + 1]
        )
        listed = []
        for excess, place, weights in entries.reshape(-1, 3)[: starts[-1]]:
            bias = start_of_sums if place % terms == 1 else 128
            channel = int(weights) // x86.compiled().block_outputs()
            four = [int(each) - bias for each in excess[None].view(np.uint8)]
            listed.append((int(place) // terms, int(place) % terms, channel, four))
        assert [pair for pair, *_ in listed] == np.repeat(np.arange(pairs), np.diff(starts)).tolist()
        rows.append(listed)
    return rows


@needs_vnni
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(ACTIVATION_BITS),
    zero_point=st.sampled_from([0, 15, 64, 100, 128, 191, 255]),
    shape=st.tuples(st.sampled_from([4, 12, 32, 44, 100]), st.integers(1, 2), st.sampled_from([4, 6, 10])),
    share=st.sampled_from([0.01, 1.0]),
)
@settings(max_examples=50)
def test_what_8_bits_do_not_hold_is_listed(
    seed: int, bits: int, zero_point: int, shape: tuple[int, int, int], share: float
) -> None:
    generator = np.random.default_rng(seed)
    qmax = activation_qmax(bits)
    zero_point = min(zero_point, qmax)
    channels, height, width = shape
    codes = np.where(generator.random(shape) < share, generator.integers(0, qmax + 1, shape), zero_point)
    rows = list_excesses(torch.from_numpy(codes - zero_point).float().unsqueeze(0), bits, zero_point)
    for y in range(height):
        d = [codes[:, y, k : k + width - 3 : 2] for k in range(4)]
        terms = np.stack([d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]])
        first = np.array([-127, max(0, min(2 * zero_point - 128, 2 * qmax - 255)), -127, -127])[:, None, None]
        excess = terms - terms.clip(first, first + 255)
        assert rows[y] == [
            (pair, term, channel, group.tolist())
            for pair in range(width // 2 - 1)
            for block in range(0, channels, 32)
            for term in range(4)
            for channel in range(block, min(block + 32, channels), 4)
            if (group := excess[term, channel : channel + 4, pair]).any()
        ]


@needs_vnni
@pytest.mark.parametrize("has_silu", [True, False])
def test_few_terms_of_a_norm_exceed_8_bits_and_none_with_codes_of_7(has_silu: bool) -> None:
    """This is what makes them cheap. The more inputs, the farther out is their largest, and the fewer they are."""
    x = torch.randn(1, 64, 16, 34)
    x = torch.nn.functional.silu(x) if has_silu else x
    for bits in ACTIVATION_BITS:
        scale = (x.max() - x.min()) / activation_qmax(bits)
        rows = list_excesses((x / scale).round(), bits, round((-x.min() / scale).item()))
        share = sum(map(len, rows)) / (16 * 16 * 4 * 64 / 4)
        assert 0 < share < 0.12 if bits == 8 else share == 0


def error_of(bits: int, x: Tensor, activation_bits: int) -> float:
    """Relative error of a layer in pairs to the reference kernel's output for `x`."""
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
    channels=st.tuples(st.integers(16, 70), st.integers(1, 70)),
    geometry=st.tuples(st.integers(1, 3), st.integers(1, 2), st.integers(1, 2), st.integers(0, 2), st.integers(0, 3)),
    size=st.tuples(st.integers(1, 3), st.integers(5, 9), st.integers(3, 21)),
)
@settings(max_examples=40)
def test_codes_anywhere_in_8_bits_are_exact(seed: int, zero_point: int, channels, geometry, size) -> None:
    """Codes over the whole static range, of which many exceed 8 bits; borders in the code of zero."""
    torch.manual_seed(seed)
    height, stride, dilation, *padding = geometry
    layer = PQCADConv2d(
        channels[0], channels[1], (max(height, -(-48 // channels[0])), 3),
        stride=(stride, 1), dilation=(dilation, 1), padding=tuple(padding), bias=False,
    ).requires_grad_(False)  # fmt: skip
    layer.pack_(WeightSpec(6), activation_bits=8)
    assert x86.takes_pairs(layer)
    layer.set_input_qparams_(ActivationQParams(torch.ones(1), torch.tensor([zero_point], dtype=torch.int32)), None)
    x = (torch.randint(0, 256, (size[0], channels[0], *size[1:])) - zero_point).float()
    with kernels.use("x86"):
        found = layer(x)
    wanted = torch.nn.functional.conv2d(
        x.double(), layer.levels().double(), None, layer.stride, layer.padding, layer.dilation
    ) * layer.weight_scale.double().view(-1, 1, 1)
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max()


@needs_vnni
@torch.no_grad()
def test_only_rows_of_three_pixels_side_by_side_are_in_pairs_and_cost_a_third_more_memory() -> None:
    sizes = {3: 4 * 3, (1, 3): 4, (3, 1): 3, 1: 1}  # levels for each pair of an input and an output
    for kernel_size, size in sizes.items():
        layer = PQCADConv2d(48, 32, kernel_size).requires_grad_(False)
        layer.pack_(WeightSpec(4), activation_bits=7)
        with kernels.use("x86"):
            layer(torch.randn(1, 48, 6, 6))
        assert layer.packed_for("x86").weight.numel() == kernel_cache_bytes(layer) == 48 * 32 * size
    for settings_ in ({"stride": (1, 2)}, {"dilation": (1, 2)}):
        layer = PQCADConv2d(48, 8, 3, **settings_)
        assert not x86.takes_pairs(layer)
    for inputs in (15, 16):  # too few products to save in the first
        assert x86.takes_pairs(PQCADConv2d(inputs, 8, 3)) == (inputs == 16)


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
def test_a_residual_block_in_pairs_is_what_its_modules_compute(width: int, activation_bits: int) -> None:
    """Time embeddings are added to both pixels of a pair, residuals to each its own."""
    block = ResnetBlock2D(in_channels=32, out_channels=32, temb_channels=16, groups=8).eval().requires_grad_(False)
    config = PQCADConfig(method="fixed", weight_bits=4, activation_bits=activation_bits)
    model = quantize_(nn.ModuleDict({"block": block}), config)
    assert type(model["block"]) is FusedResnetBlock2D
    assert x86.takes_pairs(model["block"].conv2)
    x, time = torch.randn(2, 32, 5, width), torch.randn(2, 16)
    found = model["block"](x, time)
    wanted = ResnetBlock2D.forward(model["block"], x, time)
    assert (found - wanted).abs().max() < 2e-2 * wanted.abs().max()  # a code on the other side of a tie
    assert (found - wanted).norm() < 2e-3 * wanted.norm()


@needs_vnni
@torch.no_grad()
@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_in_pairs_is_as_near_to_the_float_model_as_by_the_reference(
    tiny_unet, bits: int, activation_bits: int
) -> None:
    """Blocks at once, their norms, their time embeddings and residuals among them."""
    size = tiny_unet.config.sample_size
    inputs = torch.randn(4, tiny_unet.config.in_channels, size, size), torch.tensor(7)
    wanted = tiny_unet(*inputs).sample
    quantize_(tiny_unet, PQCADConfig(method="fixed", weight_bits=bits, activation_bits=activation_bits))
    assert sum(map(x86.takes_pairs, packed_layers(tiny_unet).values())) > 5
    error = (tiny_unet(*inputs).sample - wanted).norm().item()
    with kernels.use("reference"):
        reference = (tiny_unet(*inputs).sample - wanted).norm().item()
    assert error == pytest.approx(reference, rel=0.15 if bits in NARROW_BITS else 0.5)  # filters of 8 bits are rounded
