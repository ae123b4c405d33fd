"""Specification of convolutions after nearest upsampling: of the small image, by half of the products."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels.x86.calls import call_of, run_call
from diffusers_pqcad.kernels.x86.library import compiled, library
from diffusers_pqcad.kernels.x86.packing import can_double, num_bytes, pack, pack_filters
from diffusers_pqcad.layers.quantized import PQCADConv2d
from diffusers_pqcad.numerics.qparams import WEIGHT_BITS, ActivationQParams, WeightSpec

pytestmark = pytest.mark.skipif(
    isinstance(library(), str) or not compiled().has_vnni(), reason="tiles of doubled images are for VNNI"
)
EXACT_BITS = [bits for bits in WEIGHT_BITS if 6 * WeightSpec(bits).level_max <= 127]  # six levels add up


def packed_conv(bits: int, channels: tuple[int, int], activation_bits: int = 8) -> PQCADConv2d:
    layer = PQCADConv2d(*channels, 3, padding=1).requires_grad_(False)
    layer.pack_(WeightSpec(bits), activation_bits=activation_bits)
    return layer


def doubled(layer: PQCADConv2d, x: Tensor) -> Tensor:
    """What the kernel computes of `x`, upsampled by itself."""
    operation = layer.operation(layer.input_group())
    packed, x = pack(operation), x.contiguous(memory_format=torch.channels_last)
    call = call_of(operation, packed, x.shape, is_doubled=True)
    return run_call(call, x, memory_format=torch.channels_last)


def upsampled_first(layer: PQCADConv2d, x: Tensor) -> Tensor:
    """The same in float64: upsampling, and the convolution with the weight that the levels stand for."""
    large = F.interpolate(x.double(), scale_factor=2.0, mode="nearest")
    weight, bias = layer.dequantized_weight().double(), layer.bias.double()
    return F.conv2d(large, weight, bias, padding=1)


@torch.no_grad()
@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(EXACT_BITS),
    activation_bits=st.sampled_from([7, 8]),
    zero_point=st.integers(0, 127),
    share=st.sampled_from([0.01, 0.1, 1.0]),
    channels=st.tuples(st.integers(16, 70), st.integers(1, 70)),
    size=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 21)),
)
@settings(max_examples=80, deadline=None)
def test_narrow_levels_are_exact_for_codes_anywhere_in_their_range(
    seed: int, bits: int, activation_bits: int, zero_point: int, share: float, channels, size
) -> None:
    """Whose differences overflow 8 bits in many places, in a few, or nowhere; borders are zeros."""
    torch.manual_seed(seed)
    layer = packed_conv(bits, channels, activation_bits)
    layer.set_input_qparams_(ActivationQParams(torch.ones(1), torch.tensor([zero_point], dtype=torch.int32)), None)
    shape = size[0], channels[0], *size[1:]
    codes = torch.randint(0, 2**activation_bits, shape)
    x = torch.where(torch.rand(shape) < share, codes - zero_point, 0).float()
    found, wanted = doubled(layer, x), upsampled_first(layer, x)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 2e-6 * wanted.abs().max().clamp(min=1)


@torch.no_grad()
@given(seed=st.integers(0, 2**31), bits=st.sampled_from(WEIGHT_BITS), channels=st.integers(16, 40))
@settings(max_examples=40, deadline=None)
def test_two_rows_of_levels_and_three_elements_are_in_blocks(seed: int, bits: int, channels: int) -> None:
    """g0, g0 + g1 + g2 and g2 of each row, rounded to 8 bits where they have more, by one step for an output."""
    generator, outputs = np.random.default_rng(seed), 5
    largest = WeightSpec(bits).level_max
    levels = generator.integers(-largest, largest + 1, (outputs, channels, 3, 3))
    scale = generator.random(outputs, dtype=np.float32)
    weight, level_sum, scales, _ = pack_filters(
        torch.from_numpy(levels).to(torch.int8), torch.from_numpy(scale), is_winograd=True, is_doubled=True
    )
    padded = -(-channels // 4) * 4
    found = weight.view(2, 3, *weight.shape[1:]).permute(0, 1, 3, 2, 4)  # phases, elements, outputs, steps, 4
    found = found.reshape(2, 3, -1, 2, padded).numpy()[:, :, :outputs, :, :channels]
    rows = levels.transpose(2, 0, 3, 1)  # (3, O, W, C)
    phases = [(rows[0], rows[1] + rows[2]), (rows[0] + rows[1], rows[2])]
    sums = np.stack([np.stack([(g[:, 0], g.sum(1), g[:, 2]) for g in phase], axis=2) for phase in phases])
    step = np.maximum(np.abs(sums).max((3, 4)).astype(np.float32) / np.float32(127), 1)  # (2, 3, O)
    assert np.array_equal(found, np.rint(sums.astype(np.float32) / step[..., None, None]))
    assert np.array_equal(scales.view(2, 3, -1)[..., :outputs].numpy(), scale * step)
    assert np.array_equal(level_sum.view(2, 3, -1)[..., :outputs].numpy(), found.sum((3, 4)))


@torch.no_grad()
@pytest.mark.parametrize("activation_bits", [7, 8])
@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_wide_levels_are_rounded_once_more(bits: int, activation_bits: int) -> None:
    torch.manual_seed(0)
    layer, x = packed_conv(bits, (64, 64), activation_bits), torch.randn(2, 64, 9, 8)
    with kernels.use("reference"):
        wanted = layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    error = float((doubled(layer, x) - wanted).norm() / wanted.norm())
    # Of 8 bits, as rounding weights to 8 bits again: 1/127 of a row's largest, over sqrt(12).
    assert error < 1e-6 if bits in EXACT_BITS else 1e-3 < error < 1.2e-2


@torch.no_grad()
def test_ranges_of_the_small_image_are_those_of_the_large_one() -> None:
    """Dynamic ranges: a pixel more often is no other pixel."""
    torch.manual_seed(0)
    layer, x = packed_conv(4, (32, 24)), torch.randn(2, 32, 5, 7)
    with kernels.use("x86"):
        wanted = layer(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    assert torch.equal(doubled(layer, x), wanted)


def test_only_what_is_padded_and_dense_can_be_doubled() -> None:
    def of(**others: object) -> PQCADConv2d:
        layer = PQCADConv2d(**{"in_channels": 16, "out_channels": 16, "kernel_size": 3, "padding": 1} | others)
        layer.pack_(WeightSpec(4), activation_bits=8)
        return layer

    assert can_double(of().operation())
    for others in (
        {"padding": 0}, {"padding": 2}, {"stride": 2}, {"kernel_size": 1}, {"kernel_size": (1, 3)}, {"groups": 2},
        {"dilation": 2}, {"padding_mode": "circular"}, {"padding": "same"}, {"in_channels": 15},
    ):  # fmt: skip
        assert not can_double(of(**others).operation()), others


@torch.no_grad()
def test_weights_are_packed_for_the_images_that_come() -> None:
    layer, x = packed_conv(4, (48, 32)), torch.randn(1, 48, 6, 6).contiguous(memory_format=torch.channels_last)
    operation, packed = layer.operation(), pack(layer.operation())
    assert num_bytes(operation, packed) == 0
    for is_doubled, so_far in ((True, 1), (False, 2)):
        for _ in range(2):
            run_call(call_of(operation, packed, x.shape, is_doubled=is_doubled), x, memory_format=torch.channels_last)
        assert packed.of_kind[is_doubled].weight.numel() == 48 * 32 * 3 * 4
        assert num_bytes(operation, packed) == so_far * 48 * 32 * 3 * 4
