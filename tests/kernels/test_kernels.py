"""Specification of the choice of a kernel: automatic, forced, and never at the price of a gradient."""

import logging

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels import onednn, reference
from diffusers_pqcad.kernels.operation import Operation
from diffusers_pqcad.kernels.refusal import Refusal
from diffusers_pqcad.kernels.x86 import library
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear, QuantizedLayer
from diffusers_pqcad.layers.timesteps import TimestepGroups
from diffusers_pqcad.numerics.qparams import WeightSpec, activation_qparams

pytestmark = [
    pytest.mark.fast,
    pytest.mark.skipif(not onednn.available(), reason="this PyTorch has no oneDNN int8 operators"),
]


# What this computer takes first: our own code where there is a compiler, unless only oneDNN knows VNNI.
COMPILED = library.library()
FAST = "onednn" if isinstance(COMPILED, str) or not (COMPILED.has_vnni() or onednn.saturates()) else "x86"


@pytest.fixture(autouse=True)
def no_forced_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE, raising=False)


@pytest.fixture
def layer() -> QuantizedLayer:
    layer = PQCADLinear(16, 8)
    layer.name = "mid_block.proj"
    layer.pack_(WeightSpec(4), activation_bits=8)
    return layer


def kernel_of(layer: QuantizedLayer, x: Tensor) -> str:
    return kernels.select_kernel(layer.operation(layer.input_group()), x).NAME


def test_int8_is_used_only_where_no_gradient_is_needed(layer: QuantizedLayer) -> None:
    x = torch.randn(2, 16)
    assert kernel_of(layer, x) == "reference"  # the bias could be trained
    with torch.no_grad():
        assert kernel_of(layer, x) == FAST
        assert kernel_of(layer, x.clone().requires_grad_()) == FAST
    layer.bias.requires_grad_(False)
    assert kernel_of(layer, x) == FAST
    assert kernel_of(layer, x.requires_grad_()) == "reference"


def test_a_forced_kernel_is_used_and_restored(layer: QuantizedLayer) -> None:
    x = torch.randn(2, 16)
    with torch.no_grad():
        with kernels.use("reference"):
            assert (kernels.forced(), kernel_of(layer, x)) == ("reference", "reference")
            with kernels.use("onednn"):
                assert kernel_of(layer, x) == "onednn"
            assert kernel_of(layer, x) == "reference"
            with pytest.raises(RuntimeError, match="inside"), kernels.use("onednn"):
                raise RuntimeError("inside")
            assert kernels.forced() == "reference"
        assert kernels.forced() is None
        assert kernel_of(layer, x) == FAST


def test_the_environment_forces_and_the_block_overrides_it(
    layer: QuantizedLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PQCAD_KERNEL", "reference")
    with torch.no_grad():
        assert kernel_of(layer, torch.randn(2, 16)) == "reference"
        with kernels.use("onednn"):
            assert kernel_of(layer, torch.randn(2, 16)) == "onednn"
    monkeypatch.setenv("PQCAD_KERNEL", "")
    assert kernels.forced() is None
    monkeypatch.setenv("PQCAD_KERNEL", "cutlass")
    with pytest.raises(ValueError, match="kernel: expected one of .*'x86', 'onednn', 'reference'.*got 'cutlass'"):
        layer(torch.randn(2, 16))


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="got 'cutlass'"), kernels.use("cutlass"):
        pass


def test_a_forced_kernel_that_cannot_run_raises_with_the_layers_name() -> None:
    layer = PQCADConv2d(4, 4, 3, padding=1, padding_mode="circular")
    layer.name = "down_blocks.0.conv"
    layer.pack_(WeightSpec(4), activation_bits=8)
    with (
        torch.no_grad(),
        kernels.use("onednn"),
        pytest.raises(ValueError, match=r"down_blocks\.0\.conv: the kernel 'onednn' was forced, but padding"),
    ):
        layer(torch.randn(1, 4, 6, 6))


def test_a_forced_int8_kernel_refuses_gradients_and_mixed_timesteps(layer: QuantizedLayer) -> None:
    x = torch.randn(2, 16)
    with kernels.use("onednn"), pytest.raises(ValueError, match=r"mid_block\.proj: .* no backward"):
        layer(x)
    groups = TimestepGroups([500])
    layer.set_input_qparams_(activation_qparams(torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 2.0]), 8), groups)
    with torch.no_grad(), kernels.use("onednn"):
        groups.select(torch.tensor(1))
        layer(x)
        groups.select(torch.tensor([0, 1]))
        with pytest.raises(ValueError, match=r"mid_block\.proj: .* mixes timesteps"):
            layer(x)


def test_forced_8_bit_raises_where_products_saturate() -> None:
    layer = PQCADLinear(16, 8)
    layer.pack_(WeightSpec(8), activation_bits=8)
    x = torch.randn(2, 16)
    with torch.no_grad(), kernels.use("onednn"):
        if onednn.saturates():
            with pytest.raises(ValueError, match="no VNNI"):
                layer(x)
        else:
            layer(x)


@pytest.mark.parametrize("activation_bits", [8, None])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_the_gradient_is_that_of_the_float_operation(bits: int, activation_bits: int | None) -> None:
    """With respect to input and bias; PyTorch's own fake quantization stands for the rounding of the input."""
    layer = PQCADConv2d(6, 5, 3, stride=2, padding=1)
    layer.pack_(WeightSpec(bits), activation_bits=activation_bits)
    x = torch.randn(2, 6, 7, 7, requires_grad=True)
    upstream = torch.randn(2, 5, 4, 4)
    qparams = layer.operation(layer.input_group()).input_qparams(x)
    rounded = x
    if qparams is not None:
        rounded = torch.fake_quantize_per_tensor_affine(x, qparams.scale, qparams.zero_point, 0, 255)
    expected = torch.nn.functional.conv2d(rounded, layer.dequantized_weight(), layer.bias, 2, 1)
    expected_gradients = torch.autograd.grad(expected, (x, layer.bias), upstream)
    actual = layer(x)
    gradients = torch.autograd.grad(actual, (x, layer.bias), upstream)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_a_kernel_that_was_forced_once_is_not_kept(layer: QuantizedLayer) -> None:
    x = torch.randn(2, 16)
    with kernels.use("onednn"):
        layer(x)
    assert kernel_of(layer, x) == FAST


@torch.no_grad()
def test_what_a_kernel_refuses_after_a_first_call_is_refused() -> None:
    """Making every convolution circular is a known way to seamless images."""
    layer, x = PQCADConv2d(4, 6, 3, padding=1).requires_grad_(False), torch.randn(1, 4, 6, 6)
    layer.pack_(WeightSpec(4), activation_bits=8)
    layer(x)
    layer.padding_mode = "circular"
    assert kernel_of(layer, x) == "reference"


def test_an_input_on_another_device_is_not_for_a_cpu_kernel(layer: QuantizedLayer) -> None:
    with torch.no_grad():
        assert kernel_of(layer, torch.empty(2, 16, device="meta")) == "reference"


@torch.no_grad()
def test_layers_that_run_on_a_gpu_say_once_that_they_are_slow(layer: QuantizedLayer, caplog) -> None:
    """On an imagined one; shapes alone, as of `meta`, are computed nowhere."""
    kernels.warn_of_device.cache_clear()
    kernel_of(layer, torch.empty(2, 16, device="meta"))
    kernel_of(layer, torch.empty(2, 16))
    assert not caplog.records
    with FakeTensorMode():
        x = torch.empty(2, 16, device="cuda")
    for _ in range(2):
        assert kernel_of(layer, x) == "reference"
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "run on cuda" in record.getMessage()
    assert "dequantize()" in record.getMessage()


def test_forward_mode_differentiation_is_not_lost(layer: QuantizedLayer) -> None:
    x = torch.randn(2, 16)
    layer.requires_grad_(False)
    assert kernel_of(layer, x) == FAST
    with torch.autograd.forward_ad.dual_level():
        assert kernel_of(layer, torch.autograd.forward_ad.make_dual(x, x)) == "reference"


def test_summary_says_why_code_could_not_be_compiled(layer: QuantizedLayer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library", lambda: "gcc failed: no such thing")
    assert "x86 would be faster here, but gcc failed: no such thing" in kernels.summary([layer.operation()])


def test_summary_counts_layers_and_gives_reasons() -> None:
    layers: list[QuantizedLayer] = [PQCADLinear(8, 8), PQCADLinear(8, 8), PQCADConv2d(4, 4, 3, padding="same")]
    for layer in layers:
        layer.pack_(WeightSpec(4), activation_bits=8)
    assert kernels.summary([layer.operation() for layer in layers]) == (
        f"2 of 3 layers: {FAST}; 1 of 3 layers: reference; "
        "1 on reference: padding 'same' in mode 'zeros' is not supported"
    )


def test_a_reason_that_lies_in_the_computer_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel x86 refuses groups on any computer; oneDNN would take them."""
    layer = PQCADConv2d(4, 4, 3, groups=2)
    layer.pack_(WeightSpec(4), activation_bits=8)
    monkeypatch.setattr(onednn, "available", lambda: False)
    for names in (["x86", "onednn", "reference"], ["onednn", "x86", "reference"]):
        monkeypatch.setattr(kernels, "KERNELS", {name: kernels.KERNELS[name] for name in names})
        assert f"1 on reference: {onednn.NO_OPERATORS}" in kernels.summary([layer.operation()])
        assert kernels.lacks_fast_kernel([layer.operation()])


def test_reference_runs_everything_and_holds_nothing(layer: QuantizedLayer) -> None:
    assert reference.refusal(layer.operation()) is None
    assert kernels.KERNELS["reference"].pack(layer.operation()) is None
    assert list(kernels.KERNELS) == [
        "x86",
        "onednn",
        "reference",
    ]  # fastest first, the last one always runs


class Elsewhere:
    """A kernel for the device "meta", which computes nothing and notes its calls."""

    NAME = "elsewhere"
    FUSES: frozenset[str] = frozenset()
    MEMORY_FORMAT = torch.contiguous_format

    def __init__(self) -> None:
        self.calls: list[tuple[Operation, str]] = []

    def accepts(self, x: Tensor) -> bool:
        return x.device.type == "meta"

    def refusal(self, operation: Operation) -> Refusal | None:
        return None if operation.qweight.is_meta else Refusal("it is for another device")

    def absence(self) -> None:
        return None

    def pack(self, operation: Operation) -> str:
        return f"packed {operation.name}"

    def num_bytes(self, operation: Operation, packed: str) -> int:
        return operation.shape.numel() // 2

    def run(self, operation: Operation, packed: str, x: Tensor) -> Tensor:
        self.calls.append((operation, packed))
        return x.new_empty(*x.shape[:-1], operation.shape[0])


@torch.no_grad()
def test_a_kernel_for_another_device_is_a_module_and_its_place_in_the_list(
    layer: QuantizedLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = Elsewhere()
    monkeypatch.setattr(kernels, "KERNELS", {kernel.NAME: kernel, **kernels.KERNELS})
    here, x = layer(torch.ones(2, 16)), torch.ones(2, 16, device="meta")
    assert (here.device.type, kernel.calls) == ("cpu", [])
    padded = PQCADConv2d(4, 4, 3, padding="same")
    padded.pack_(WeightSpec(4), activation_bits=8)
    assert "1 on reference: padding 'same'" in kernels.summary([padded.operation()])  # what the others say
    layer.to("meta")
    assert layer.kernel_name() == "elsewhere"
    assert layer(x).shape == (2, 8)
    [(operation, packed)] = kernel.calls
    assert packed == "packed mid_block.proj"
    assert (operation.spec, operation.shape, operation.activation_bits) == (WeightSpec(4), (8, 16), 8)
    assert operation.qweight is layer.qweight
    assert layer.cached_bytes() == 64
    assert kernels.summary([layer.operation()]) == "1 of 1 layers: elsewhere"
    with kernels.use("elsewhere"), pytest.raises(ValueError, match="its input is on another device"):
        layer(torch.ones(2, 16))
