"""Specification of the int8 kernels: exact integer arithmetic, checked in float64, under several instruction sets."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels import onednn, x86
from diffusers_pqcad.kernels.x86.library import compiled
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear, QuantizedLayer
from diffusers_pqcad.layers.timesteps import TimestepGroups
from diffusers_pqcad.numerics.qparams import (
    ACTIVATION_BITS,
    WEIGHT_BITS,
    ActivationQParams,
    ScalarQParams,
    WeightSpec,
    activation_qmax,
    activation_qparams,
    dynamic_activation_qparams,
    dynamic_scalar_qparams,
    fake_quantize_activation,
)

pytestmark = pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no oneDNN int8 operators")
ROOT = Path(__file__).parents[2]
ISA = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL")


def linear(in_features: int, out_features: int, **settings) -> Callable[[], QuantizedLayer]:
    return lambda: PQCADLinear(in_features, out_features, **settings)


def conv(in_channels: int, out_channels: int, *args, **settings) -> Callable[[], QuantizedLayer]:
    return lambda: PQCADConv2d(in_channels, out_channels, *args, **settings)


# What a diffusion model contains, and what it might: the shapes are small and odd on purpose.
CASES = {
    "linear": (linear(16, 8), (4, 16)),
    "linear_odd": (linear(37, 5), (3, 37)),
    "linear_batch_1": (linear(64, 48), (1, 64)),
    "linear_1d": (linear(7, 3), (7,)),
    "linear_3d": (linear(33, 17), (2, 5, 33)),
    "linear_4d": (linear(33, 17), (2, 3, 5, 33)),
    "linear_one_input": (linear(1, 1), (2, 1)),
    "linear_no_bias": (linear(20, 12, bias=False), (4, 20)),
    "conv_3x3": (conv(16, 24, 3, padding=1), (2, 16, 8, 8)),
    "conv_no_padding": (conv(5, 7, 3), (2, 5, 9, 6)),
    "conv_1x1": (conv(13, 9, 1), (2, 13, 5, 7)),
    "conv_stride": (conv(8, 8, 3, stride=2, padding=1), (2, 8, 9, 9)),
    "conv_uneven": (conv(3, 5, (3, 1), stride=(1, 2), padding=(2, 0)), (1, 3, 6, 7)),
    "conv_dilation": (conv(4, 6, 3, padding=2, dilation=2), (2, 4, 8, 8)),
    "conv_groups": (conv(12, 8, 3, padding=1, groups=4), (2, 12, 6, 6)),
    "conv_depthwise": (conv(16, 16, 3, padding=1, groups=16), (2, 16, 6, 6)),
    "conv_one_channel": (conv(1, 16, 3, padding=1), (2, 1, 8, 8)),
    "conv_to_one_channel": (conv(16, 1, 3, padding=1), (1, 16, 8, 8)),
    "conv_large_kernel": (conv(3, 8, 7, stride=2, padding=3), (1, 3, 15, 15)),
    "conv_no_bias": (conv(8, 8, 3, padding=1, bias=False), (2, 8, 6, 6)),
    "conv_unbatched": (conv(4, 6, 3, padding=1), (4, 6, 5)),
    "conv_one_column": (conv(24, 33, 3), (3, 24, 5, 3)),
    "conv_odd_columns": (conv(33, 40, (2, 3), stride=(2, 1), padding=(0, 2)), (2, 33, 7, 5)),
}


def packed(
    make: Callable[[], QuantizedLayer], bits: int, group_size: int | None = None, activation_bits: int = 8
) -> QuantizedLayer:
    layer = make().requires_grad_(False)
    layer.name = "block.layer"
    layer.pack_(WeightSpec(bits, group_size), activation_bits=activation_bits)
    return layer


def codes_of(x: Tensor, bits: int = 8) -> tuple[np.ndarray, np.float32, int]:
    """Codes, scale and zero point of `x`, computed anew with numpy in the precision of the kernels, fp32."""
    values = x.float().numpy()
    low, high = min(values.min(), np.float32(0)), max(values.max(), np.float32(0))
    qmax = 2**bits - 1
    scale = np.float32(high - low) / np.float32(qmax) if high > low else np.float32(1)
    zero_point = int(np.clip(np.rint(-low / scale), 0, qmax))
    return np.clip(np.rint(values * (np.float32(1) / scale)) + zero_point, 0, qmax), scale, zero_point


def fused_codes(x: Tensor, bits: int = 8) -> np.ndarray:
    """The codes of PyTorch's fused pass, which rounds ties after adding the zero point; see their own test below."""
    return onednn.quantize_to_uint8(x.float().contiguous(), dynamic_scalar_qparams(x, bits), bits).numpy()


def int8_kernels(layer: QuantizedLayer) -> list[str]:
    """The kernels of this computer that compute `layer` in integers."""
    return [name for name in (x86.NAME, onednn.NAME) if kernels.KERNELS[name].refusal(layer.operation()) is None]


def oracle(layer: QuantizedLayer, x: Tensor, *, kernel: str = "") -> Tensor:
    """The output of `kernel` (the layer's own by default) in float64, from integer codes and integer levels."""
    codes, scale, zero_point = codes_of(x, layer.activation_bits)
    if (kernel or layer.kernel_name()) == "onednn":
        codes = fused_codes(x, layer.activation_bits)
    centred = torch.from_numpy(codes.astype(np.float64) - zero_point)
    weight = layer.levels().double()
    if isinstance(layer, nn.Linear):
        sums, shape = nn.functional.linear(centred, weight), (-1,)
    else:
        geometry = (layer.stride, layer.padding, layer.dilation, layer.groups)
        is_transformed = (kernel or layer.kernel_name()) == "x86" and uses_winograd(layer)
        even, odd = winograd_weights(weight) if is_transformed else (weight, weight)
        sums, shape = nn.functional.conv2d(centred, even, None, *geometry), (-1, 1, 1)
        sums[..., 1::2] = nn.functional.conv2d(centred, odd, None, *geometry)[..., 1::2]
    output = sums * (layer.weight_scale.double() * float(scale)).view(shape)
    return output if layer.bias is None else output + layer.bias.double().view(shape)


def uses_winograd(layer: nn.Conv2d) -> bool:
    """Whether the kernel x86 computes `layer` by F(2, 3)."""
    row = (layer.kernel_size[1], layer.stride[1], layer.dilation[1], layer.groups)
    return row == (3, 1, 1, 1) and layer.in_channels * layer.kernel_size[0] >= 48 and compiled().has_vnni()


def winograd_weights(levels: Tensor) -> tuple[Tensor, Tensor]:
    """The levels (O, C, H, 3) that pixels of even and of odd columns see, where sums beyond 8 bits were rounded."""
    first, middle, last = levels.numpy().astype(np.float32).transpose(3, 0, 1, 2)
    halves = []
    for sums in (first + middle + last, first - middle + last):
        step = np.maximum(np.abs(sums).max((1, 2), keepdims=True) / np.float32(127), np.float32(1))
        halves.append(np.rint(sums / step).astype(np.float64) * step / 2)
    both, apart = halves[0] + halves[1], halves[0] - halves[1]
    even, odd = (first, apart, both - first), (both - last, apart, last)
    return torch.from_numpy(np.stack(even, 3)), torch.from_numpy(np.stack(odd, 3).astype(np.float64))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """`tolerance` is relative to the largest output, which is what rounding errors of long sums go with."""
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs().max().item()
    assert error <= tolerance * expected.abs().max().item(), error


@pytest.mark.fast
@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("case", CASES)
def test_all_kernels_agree_with_float64(case: str, bits: int, activation_bits: int) -> None:
    make, shape = CASES[case]
    layer = packed(make, bits, activation_bits=activation_bits)
    x = torch.randn(shape) * 3 + 0.5
    int8 = int8_kernels(layer)
    assert int8 or (bits, activation_bits) == (8, 8)  # the only ones for which a computer may have none
    assert layer.kernel_name() == [*int8, "reference"][0]
    for name in [*int8, "reference"]:
        with torch.no_grad(), kernels.use(name):
            output = layer(x)
        assert output.dtype == torch.float32
        # Integer sums: what is left are a few fp32 products.
        assert_near(output, oracle(layer, x, kernel=name), 1e-6 if name in int8 else 3e-6)


@given(
    seed=st.integers(0, 2**31),
    channels=st.tuples(st.one_of(st.integers(1, 20), st.integers(16, 40)), st.integers(1, 20)),
    groups=st.sampled_from([1, 1, 2, 3]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bits=st.sampled_from(WEIGHT_BITS),
    activation_bits=st.sampled_from(ACTIVATION_BITS),
    shift=st.sampled_from([-5.0, 0.0, 5.0]),
    width=st.integers(7, 10),
)
@settings(max_examples=25)
def test_any_convolution(
    seed, channels, groups, kernel, stride, padding, dilation, bits, activation_bits, shift, width
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    in_channels, out_channels = channels[0] * groups, channels[1] * groups
    make = conv(in_channels, out_channels, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups)
    layer = packed(make, bits, activation_bits=activation_bits)
    x = torch.randn(2, in_channels, 9, width) + shift  # all positive or all negative, too: padding stands for zero
    for name in [*int8_kernels(layer), "reference"]:
        with torch.no_grad(), kernels.use(name):
            assert_near(layer(x), oracle(layer, x, kernel=name), 3e-6)


@given(
    seed=st.integers(0, 2**31),
    sizes=st.tuples(st.integers(1, 130), st.integers(1, 70)),
    batch=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    bits=st.sampled_from(WEIGHT_BITS),
    activation_bits=st.sampled_from(ACTIVATION_BITS),
)
@settings(max_examples=40)
def test_any_linear_layer(seed, sizes, batch, bits, activation_bits) -> None:
    torch.manual_seed(seed)
    layer = packed(linear(*sizes), bits, activation_bits=activation_bits)
    x = torch.randn(*batch, sizes[0])
    for name in [*int8_kernels(layer), "reference"]:
        with torch.no_grad(), kernels.use(name):
            assert_near(layer(x), oracle(layer, x, kernel=name), 3e-6)


@pytest.mark.fast
@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (linear(512, 16), (4, 512)),
        (linear(512, 16), (1, 512)),
        (linear(33, 7), (3, 33)),
        (conv(48, 48, 3), (1, 48, 8, 8)),
        (conv(64, 32, 1), (1, 64, 8, 8)),
        (conv(57, 65, 3), (1, 57, 5, 5)),
        (conv(16, 16, 3, groups=16), (1, 16, 8, 8)),
        (conv(64, 64, 3, groups=2), (1, 64, 5, 5)),
        (conv(3, 16, 3), (1, 3, 8, 8)),
    ],
    ids=lambda value: "x".join(map(str, value)) if isinstance(value, tuple) else "",
)
@pytest.mark.parametrize("sign", [1, -1])
def test_the_worst_case_is_exact(make, shape: tuple[int, ...], bits: int, activation_bits: int, sign: int) -> None:
    """The largest code times the largest level, everywhere: the largest sums there are, without a rounding error."""
    layer = make().requires_grad_(False)
    layer.weight.fill_(sign * WeightSpec(bits).level_max)
    layer.bias.zero_()
    layer.pack_(WeightSpec(bits), activation_bits=activation_bits)
    assert layer.levels().unique().tolist() == [sign * WeightSpec(bits).level_max]
    qmax = activation_qmax(activation_bits)
    sums = sign * qmax * WeightSpec(bits).level_max * layer.weight_shape[1:].numel()
    assert abs(sums) < 2**24  # an fp32 integer
    for name in [*int8_kernels(layer), "reference"]:
        with torch.no_grad(), kernels.use(name):
            output = layer(torch.full(shape, float(qmax)))
        assert output.unique().tolist() == [float(sums)]


@pytest.mark.fast
def test_the_probe_for_saturation_is_right() -> None:
    """Where it finds nothing, no 8-bit layer is wrong; where it does, a linear layer saturates too."""
    if ISA in ("AVX2", "AVX512_CORE"):
        assert onednn.saturates()
    if ISA == "AVX2_VNNI":
        assert not onednn.saturates()
    levels = torch.full((16, 512), 127, dtype=torch.int8)
    weight = torch.ops.onednn.qlinear_prepack(levels, None)
    codes, zero_point = torch.full((4, 512), 255, dtype=torch.uint8), torch.zeros(16, dtype=torch.int32)
    output = torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, 0, weight, torch.ones(16), zero_point, None, 1.0, 0, torch.float32, "none", [], ""
    )
    assert onednn.saturates() == (output.unique().tolist() != [255.0 * 127 * 512])


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["AVX2", "AVX512_CORE"])
def test_under_other_instruction_sets(isa: str) -> None:
    """oneDNN reads ONEDNN_MAX_CPU_ISA once a process, so the kernel tests run again in another one."""
    if ISA != "ALL":
        pytest.skip("this is the other process")
    fewer = ["-k", "worst_case or probe or wide_layers"] if isa == "AVX512_CORE" else ["-k", "not warning"]
    options = ["-q", "-n", "0", "-p", "no:cacheprovider", "--no-header"]
    command = [sys.executable, "-m", "pytest", *options, *fewer, "tests/kernels"]
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": isa, "CFLAGS": "-mno-avx512f -mno-avxvnni"}  # no VNNI
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout


@pytest.mark.fast
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", ["linear_3d", "conv_3x3", "conv_depthwise"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 2**-8), (torch.float16, 2**-10)],  # one rounding of the output; the bias is of that dtype itself
)
def test_half_precision(case: str, bits: int, dtype: torch.dtype, tolerance: float) -> None:
    make, shape = CASES[case]
    layer = packed(make, bits).to(dtype)
    x = torch.randn(shape).to(dtype)
    for name in [*int8_kernels(layer), "reference"]:
        with torch.no_grad(), kernels.use(name):
            output = layer(x)
        assert output.dtype == dtype
        # Inputs and weights are rounded to `dtype` in the reference.
        assert_near(output, oracle(layer, x, kernel=name), 3 * tolerance if name == "reference" else tolerance)


@pytest.mark.fast
@given(seed=st.integers(0, 2**31), exponent=st.integers(-20, 20), shift=st.floats(-3, 3))
def test_codes_are_the_nearest_integers(seed: int, exponent: int, shift: float) -> None:
    """In both kernels. They may differ at a tie, by one, as the fused pass adds the zero point before it rounds."""
    x = (torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(seed)) + shift) * 2.0**exponent
    codes, scale, zero_point = codes_of(x)
    qparams = dynamic_activation_qparams(x, 8)
    assert (qparams.scale.item(), qparams.zero_point.item()) == (scale, zero_point)
    real = (x.double().numpy() / np.float64(scale) + zero_point).clip(0, 255)
    for memory_format in (torch.contiguous_format, torch.channels_last):
        dense = x.contiguous(memory_format=memory_format)
        actual = onednn.quantize_to_uint8(dense, dynamic_scalar_qparams(x, 8), 8)
        assert actual.is_contiguous(memory_format=memory_format)
        for rounded in (actual.numpy(), codes):
            assert np.abs(rounded - real).max() <= 0.5 + 5e-5  # three fp32 roundings of numbers up to 255
        restored = fake_quantize_activation(dense, qparams, 8).numpy()
        assert np.array_equal(np.rint(restored / scale) + zero_point, codes)


@pytest.mark.fast
@pytest.mark.parametrize("bits", ACTIVATION_BITS)
def test_codes_without_the_fused_pass(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    """PyTorch has announced the end of `quantize_per_tensor`; the codes are the same without it."""
    x = torch.cat([torch.randn(1000), torch.tensor([-9.0, 9.0])])  # reaches outside the static range
    qparams = ScalarQParams(
        *(value.item() for value in activation_qparams(torch.tensor(-2.0), torch.tensor(2.5), bits))
    )
    fused = onednn.quantize_to_uint8(x, qparams, bits)
    monkeypatch.setattr(onednn, "has_fused_quantize", lambda: False)
    plain = onednn.quantize_to_uint8(x, qparams, bits)
    assert plain.dtype == fused.dtype == torch.uint8
    assert torch.equal(plain, fused)
    assert (fused.min(), fused.max()) == (0, activation_qmax(bits))


@pytest.mark.fast
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("case", ["linear", "conv_3x3"])
def test_inputs_that_are_not_finite_do_not_vanish(case: str, bad: float) -> None:
    """The integers have no NaN; the output must not look like one of a good input."""
    make, shape = CASES[case]
    layer, x = packed(make, 4), torch.randn(shape)
    x.view(-1)[3] = bad
    for name in [*int8_kernels(layer), "reference"]:
        with torch.no_grad(), kernels.use(name):
            assert not layer(x).isfinite().all()


@pytest.mark.fast
@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("group_size", [4, 8, 16])
def test_groups_are_exact_in_reference_and_within_half_a_step_elsewhere(bits: int, group_size: int) -> None:
    """Rows of several scales are re-quantized to 8 bits for int8 products: at most absmax / 254 per weight."""
    layer = packed(linear(32, 6, bias=False), bits, group_size)
    weight = layer.dequantized_weight()
    groups = layer.levels().float().view(6, -1, group_size) * layer.weight_scale.unsqueeze(-1)
    assert torch.equal(weight, groups.view(6, 32))
    rows = torch.eye(32) * 255  # codes 0 and 255 at scale 1: the output is the weight times 255
    with torch.no_grad(), kernels.use("reference"):
        assert_near(layer(rows).T / 255, weight.double(), 1e-6)
    for name in int8_kernels(layer):
        with torch.no_grad(), kernels.use(name):
            output = layer(rows).T / 255
        assert ((output - weight).abs() <= weight.abs().amax(1, keepdim=True) / 254 * (1 + 1e-4)).all()
        assert not torch.allclose(output, weight, rtol=1e-6)


@pytest.mark.fast
def test_one_group_per_row_needs_no_requantization() -> None:
    layer = packed(linear(32, 6), 4, 32)
    x = torch.randn(5, 32)
    with torch.no_grad():
        assert_near(layer(x), oracle(layer, x), 1e-6)
    assert layer.kernel_name() in int8_kernels(layer)


@pytest.mark.fast
@pytest.mark.parametrize("bits", ACTIVATION_BITS)
def test_static_ranges_clip(bits: int) -> None:
    layer = packed(linear(4, 3, bias=False), 4, activation_bits=bits)
    qparams = activation_qparams(torch.tensor(-1.0), torch.tensor(1.0), bits)
    groups = TimestepGroups([])
    groups.select(torch.tensor(0))
    layer.set_input_qparams_(ActivationQParams(qparams.scale.view(1), qparams.zero_point.view(1)), groups)
    x = torch.tensor([[-50.0, 50.0, 0.3, -0.2]])
    clipped = torch.fake_quantize_per_tensor_affine(x, qparams.scale, qparams.zero_point, 0, activation_qmax(bits))
    for name in int8_kernels(layer):
        kernel = kernels.KERNELS[name]
        actual = kernel.run(layer.operation(0), kernel.pack(layer.operation()), x)
        assert_near(actual, (clipped.double() @ layer.dequantized_weight().double().T), 1e-6)


@pytest.mark.fast
def test_static_ranges_are_those_of_the_timestep_and_follow_every_change() -> None:
    """The kernel keeps them as plain numbers; whatever changes the buffers must drop those."""
    layer, x, groups = packed(linear(16, 8), 4), torch.randn(5, 16) * 3, TimestepGroups([500])
    with torch.no_grad():
        layer(x)  # the kernel has seen the layer without static ranges
        layer.set_input_qparams_(activation_qparams(torch.tensor([-1.0, -4.0]), torch.tensor([2.0, 4.0]), 8), groups)
        other = packed(linear(16, 8), 4)
        other.set_input_qparams_(activation_qparams(torch.tensor([-0.5, -3.0]), torch.tensor([0.1, 3.0]), 8), groups)
        for change in (lambda: None, lambda: layer.load_state_dict(other.state_dict()), layer.float):
            change()
            outputs = []
            for group in (0, 1):
                groups.select(torch.tensor(group))
                outputs.append(layer(x))
                with kernels.use("reference"):
                    assert_near(outputs[-1], layer(x).double(), 1e-2)  # a code may differ at a tie
                assert layer._cache[1].ranges[layer.input_group()] == (
                    layer.input_scale[group].item(),
                    layer.input_zero_point[group].item(),
                )
            assert (outputs[0] - outputs[1]).abs().max() > 0.1 * outputs[1].abs().max()


@pytest.mark.fast
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@pytest.mark.parametrize(
    ("make", "shape"),
    [(linear(8, 6), (0, 8)), (linear(8, 6), (2, 0, 8)), (conv(4, 6, 3), (0, 4, 5, 5))],
    ids=["linear", "linear_3d", "conv"],
)
def test_an_empty_batch_gives_an_empty_output(make, shape: tuple[int, ...], static: bool) -> None:
    layer = packed(make, 4)
    if static:
        layer.set_input_qparams_(activation_qparams(torch.tensor([-1.0]), torch.tensor([1.0]), 8), TimestepGroups([]))
        layer.timestep_groups.select(torch.tensor(0))
    x = torch.empty(shape)
    with torch.no_grad():
        assert layer(x).shape == layer.to_float()(x).shape
        for name in int8_kernels(layer):
            with kernels.use(name):
                assert layer(x).shape == layer.to_float()(x).shape


@pytest.mark.fast
@pytest.mark.parametrize(
    ("make", "activation_bits", "reason"),
    [
        (linear(8, 8), None, "its activations stay in floating point"),
        (conv(4, 4, 3, padding="same"), 8, "padding 'same'"),
        (conv(4, 4, 3, padding=1, padding_mode="circular"), 8, "in mode 'circular'"),
        (conv(4, 4, 3, padding=1, padding_mode="reflect"), 8, "in mode 'reflect'"),
    ],
    ids=["float_activations", "same", "circular", "reflect"],
)
def test_layers_that_both_refuse(make, activation_bits: int | None, reason: str) -> None:
    layer = make().requires_grad_(False)
    layer.pack_(WeightSpec(4), activation_bits=activation_bits)
    for name in (x86.NAME, onednn.NAME):
        assert reason in kernels.KERNELS[name].refusal(layer.operation()).reason
    assert layer.kernel_name() == "reference"
    x = torch.randn(2, 8) if isinstance(layer, nn.Linear) else torch.randn(2, 4, 6, 6)
    floats = layer.to_float()
    rounded = x if activation_bits is None else fake_quantized(x)
    torch.testing.assert_close(layer(x), floats(rounded), rtol=1e-6, atol=1e-6)


def fake_quantized(x: Tensor) -> Tensor:
    codes, scale, zero_point = codes_of(x)
    return torch.from_numpy((codes.astype(np.float32) - zero_point) * scale)


@pytest.mark.fast
def test_layers_on_another_device_are_refused() -> None:
    layer = packed(linear(8, 8), 4).to("meta")
    for name in (x86.NAME, onednn.NAME):
        assert "weights are on meta" in kernels.KERNELS[name].refusal(layer.operation()).reason
    with torch.no_grad():
        assert layer(torch.empty(2, 8, device="meta")).shape == (2, 8)


@pytest.mark.fast
def test_onednn_refuses_wide_layers_exactly_where_products_saturate() -> None:
    for bits in WEIGHT_BITS:
        refusal = onednn.refusal(packed(linear(8, 8), bits).operation())
        if bits == 8 and onednn.saturates():
            assert "no VNNI" in refusal.reason
            assert refusal.is_of_computer
        else:
            assert refusal is None
        assert onednn.refusal(packed(linear(8, 8), bits, activation_bits=7).operation()) is None


def test_no_warning_reaches_the_user() -> None:
    """The fused quantize pass warns once a process that it is deprecated; another process, so that it has not yet."""
    code = (
        "import torch; from diffusers_pqcad.layers.quantized import PQCADLinear, PQCADConv2d; "
        "from diffusers_pqcad.numerics.qparams import WeightSpec; torch.set_grad_enabled(False)\n"
        "for layer, x in ((PQCADLinear(8, 8), torch.randn(2, 8)), (PQCADConv2d(4, 4, 3), torch.randn(1, 4, 5, 5))):\n"
        "    layer.pack_(WeightSpec(4), activation_bits=8); layer(x); assert layer._cache[0][0] != 'reference'\n"
    )
    # Only around the calls: importing diffusers has warnings of its own.
    code = code.replace("\nfor", "\nimport warnings; warnings.simplefilter('error')\nfor")
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "deprecat" not in result.stderr.lower()
