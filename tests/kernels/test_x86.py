"""Specification of the windows in which 16-bit sums add up, safe for every input, and of what the compiler makes."""

import re
import subprocess
from functools import cache
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels import native
from diffusers_pqcad.kernels.native import variants
from diffusers_pqcad.kernels.x86.library import SOURCE, compiled, library
from diffusers_pqcad.kernels.x86.packing import SUM_MAX, plan_windows
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear
from diffusers_pqcad.layers.timesteps import TimestepGroups
from diffusers_pqcad.numerics.qparams import (
    ACTIVATION_BITS,
    WEIGHT_BITS,
    WeightSpec,
    activation_qmax,
    activation_qparams,
)

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason=str(library()))
SEGMENTS = torch.tensor([[0, 0, 0], [1, 8, 0], [3, 0, 0]], dtype=torch.int32)


OUTPUTS = 16 if isinstance(library(), str) else compiled().block_outputs()


def blocks_of_levels(largest: int, num_blocks: int = 2, steps: int = 60) -> Tensor:
    return torch.randint(-largest, largest + 1, (num_blocks, steps, OUTPUTS, 4), dtype=torch.int8)


@given(largest=st.sampled_from([1, 3, 7, 31]), qmax=st.sampled_from([127, 255]), seed=st.integers(0, 2**31))
@settings(max_examples=30)
def test_windows_cover_every_step_and_cannot_overflow(largest: int, qmax: int, seed: int) -> None:
    torch.manual_seed(seed)
    weight = blocks_of_levels(largest)
    windows, starts = plan_windows(weight, SEGMENTS, SUM_MAX // qmax)
    assert starts.tolist() == [0, starts[1].item(), len(windows)]
    for block, levels in enumerate(weight):
        step = 0
        for y, x, steps in windows[starts[block] : starts[block + 1]].tolist():
            segment = SEGMENTS[step // 20].tolist()
            assert (y, x) == (segment[0], segment[1] + step % 20 * 4)
            assert step % 20 + steps <= 20  # ends with its segment
            lanes = levels[step : step + steps].int().view(steps, -1, 2)
            assert lanes.clamp(min=0).sum((0, 2)).max() * qmax < 2**15
            assert lanes.clamp(max=0).sum((0, 2)).min() * qmax > -(2**15)
            step += steps
        assert step == len(levels)


def test_windows_are_as_long_as_they_can_be() -> None:
    windows, _ = plan_windows(torch.full((1, 60, OUTPUTS, 4), 7, dtype=torch.int8), SEGMENTS, SUM_MAX // 255)
    assert windows[:, 2].tolist() == [9, 9, 2] * 3  # 9 * 2 * 7 * 255 <= 32767 < 10 * 2 * 7 * 255
    windows, _ = plan_windows(blocks_of_levels(1, 1), SEGMENTS, SUM_MAX // 255)
    assert windows[:, 2].tolist() == [20, 20, 20]


@given(
    seed=st.integers(0, 2**31),
    bits=st.sampled_from(WEIGHT_BITS),
    activation_bits=st.sampled_from(ACTIVATION_BITS),
    features=st.tuples(st.integers(1, 400), st.integers(1, 40)),
)
@settings(max_examples=40)
def test_inputs_that_are_made_to_overflow_are_exact(seed, bits, activation_bits, features) -> None:
    """The largest code wherever one output has a positive level, or a negative one: its largest sums at every step."""
    torch.manual_seed(seed)
    layer = PQCADLinear(*features, bias=False).requires_grad_(False)
    layer.pack_(WeightSpec(bits), activation_bits=activation_bits)
    layer.weight_scale.fill_(1.0)
    levels = layer.levels().double()
    codes = torch.cat([levels > 0, levels < 0]).double() * activation_qmax(activation_bits)
    codes[:, :1] = activation_qmax(activation_bits)  # so that the scale is 1
    with torch.no_grad(), kernels.use("x86"):
        assert torch.equal(layer(codes.float()).double(), codes @ levels.T)


@pytest.mark.parametrize(("bits", "activation_bits"), [(4, 8), (8, 8), (4, 7)])
@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_threads_share_the_work_and_change_nothing(bits: int, activation_bits: int, num_threads: int) -> None:
    layer = PQCADConv2d(20, 37, 3, padding=1).requires_grad_(False)
    layer.pack_(WeightSpec(bits), activation_bits=activation_bits)
    x, before = torch.randn(3, 20, 9, 7), torch.get_num_threads()
    with torch.no_grad(), kernels.use("x86"):
        expected = layer(x)
        try:
            torch.set_num_threads(num_threads)
            assert torch.equal(layer(x), expected)
        finally:
            torch.set_num_threads(before)


@torch.no_grad()
@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (PQCADLinear(24, 8), (2, 5, 20), r"block\.layer: expected \(\.\.\., 24\), got an input of \(2, 5, 20\)"),
        (PQCADLinear(24, 8), (), r"expected \(\.\.\., 24\)"),
        (PQCADConv2d(8, 8, 3), (1, 7, 5, 5), r"expected \(N, 8, H, W\), got an input of \(1, 7, 5, 5\)"),
        (PQCADConv2d(8, 8, 3), (8, 5), r"expected \(N, 8, H, W\)"),
        (PQCADConv2d(8, 8, 3), (1, 8, 2, 5), "smaller than the kernel"),
    ],
)
def test_inputs_of_another_size_are_refused(layer, shape: tuple[int, ...], message: str) -> None:
    layer.requires_grad_(False).pack_(WeightSpec(4), activation_bits=8)
    layer.name = "block.layer"
    with kernels.use("x86"), pytest.raises(ValueError, match=message):
        layer(torch.randn(shape))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_and_device_are_not_ours(dtype: torch.dtype) -> None:
    layer, x = PQCADConv2d(8, 24, 3), torch.randn(2, 8, 6, 5)
    layer.requires_grad_(False).pack_(WeightSpec(4), activation_bits=8)
    with kernels.use("x86"):
        expected = layer(x)
        layer._cache = None
        torch.set_default_dtype(dtype)
        try:
            with torch.device("meta"):
                assert torch.equal(layer(x), expected)
        finally:
            torch.set_default_dtype(torch.float32)


@torch.no_grad()
@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
def test_a_bias_may_lie_anywhere_and_how_the_kernel_moves_may_change(activation_bits: int) -> None:
    layer, x = PQCADConv2d(16, 8, 3), torch.randn(1, 16, 9, 9)
    layer.requires_grad_(False).pack_(WeightSpec(4), activation_bits=activation_bits)
    layer.bias = torch.nn.Parameter(torch.randn(16)[::2], requires_grad=False)
    for stride, padding, dilation in ((1, 0, 1), (2, 0, 1), (1, 2, 2), (1, 0, 1)):
        layer.stride, layer.padding, layer.dilation = (stride, stride), (0, padding), (dilation, dilation)
        with kernels.use("reference"):
            expected = layer(x)
        with kernels.use("x86"):
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_the_outputs_of_large_inputs_are_clamped() -> None:
    """Beyond what an int32 can hold, too."""
    layer = PQCADLinear(8, 2, bias=False).requires_grad_(False)
    layer.pack_(WeightSpec(4), activation_bits=8)
    groups = TimestepGroups([])
    groups.select(torch.tensor(0))
    layer.set_input_qparams_(activation_qparams(torch.tensor([-1.0]), torch.tensor([1.0]), 8), groups)
    with torch.no_grad(), kernels.use("x86"):
        for sign in (1, -1):
            expected = layer(torch.full((1, 8), sign * 1.5))
            for large in (1e3, 1e12, float("inf")):
                assert torch.equal(layer(torch.full((1, 8), sign * large)), expected)


@cache
def assembly(*flags: str) -> str:
    """The C file as the compiler makes it for the CPU that `flags` name; other tests are for the computer's own."""
    common = [flag for flag in native.FLAGS if not flag.startswith("-march")]
    command = [str(native.compiler()), *common, *flags, "-S", str(SOURCE), "-o", "-"]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        pytest.skip(f"this compiler does not know {flags}")
    return result.stdout


def test_the_vnni_of_avx_is_told_from_that_of_avx512() -> None:
    """CPUs of laptops have it; assemblers would take the encoding of AVX-512, which is no instruction there."""
    lines = [line for line in assembly("-march=alderlake").splitlines() if "vpdpbusd" in line]
    assert lines
    assert all(re.match(r"\s*\{vex\}\s+vpdpbusd\s+\S*%ymm\d+", line) for line in lines)


SHIPPED = {name: variants.VARIANTS[name].flags for name in variants.LIBRARIES[SOURCE.name]}
CPUS = {cpu: (f"-march={cpu}",) for cpu in ("alderlake", "icelake-client", "sapphirerapids", "znver4", "native")}


@pytest.mark.parametrize("flags", [SHIPPED["avx2"], SHIPPED["avxvnni"], CPUS["alderlake"]])
def test_what_other_cpus_lack_is_not_in_their_code(flags: tuple[str, ...]) -> None:
    assert not re.search(r"%zmm|%k[0-7]", assembly(*flags))


@pytest.mark.parametrize("flags", (CPUS | SHIPPED).values(), ids=CPUS | SHIPPED)
def test_sums_stay_in_registers(flags: tuple[str, ...]) -> None:
    """Between the products of a tile nothing is moved to the stack or back: it would take longer than they do."""
    text = assembly(*flags)
    lines = [line.strip() for line in text.splitlines()]
    lines = [line for line in lines if not line.startswith(("#", "."))]  # instructions
    places = [i for i, line in enumerate(lines) if "vpdpbusd" in line]
    if not places:
        pytest.skip("no VNNI")
    near = [lines[before:after] for before, after in pairwise(places) if after - before < 8]
    assert len(near) > 12  # as many as a tile has sums, but one
    assert not [line for between in near for line in between if re.match(r"vmov\S+\s.*\(%r[sb]p\)", line)]


@pytest.mark.parametrize("bias", [torch.ones(3), torch.ones(8, device="meta")], ids=["short", "elsewhere"])
@torch.no_grad()
def test_a_bias_that_c_cannot_read_is_refused(bias: Tensor) -> None:
    layer = PQCADLinear(16, 8)
    layer.name = "block.proj"
    layer.pack_(WeightSpec(4), activation_bits=8)
    layer.bias = nn.Parameter(bias)
    with kernels.use("x86"), pytest.raises(ValueError, match=r"block.proj: expected a bias of \(8,\) on the CPU, got"):
        layer(torch.ones(2, 16))
