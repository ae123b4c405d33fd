"""torchao's integer product for Linear layers, on the CPU: on an accelerator the arithmetic is the same."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels import reference, torchao
from diffusers_pqcad.layers import PQCADConv2d, PQCADLinear
from diffusers_pqcad.qparams import ACTIVATION_BITS, WEIGHT_BITS, ActivationQParams, WeightSpec
from diffusers_pqcad.timesteps import TimestepGroups


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    assert a.dtype == b.dtype == torch.int8
    return torch.matmul(a.to(torch.int32), b.to(torch.int32))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchao 0.18's `safe_int_mm` computes on a CPU, so that the tests need no torchao."""
    import sys
    import types

    module = types.ModuleType("torchao.kernel.intmm")
    module.safe_int_mm = product  # type: ignore[attr-defined]
    for name in ("torchao", "torchao.kernel"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchao.kernel.intmm", module)


def packed(bits: int, group_size: int | None = None, *, bias: bool = True, activation_bits: int = 8) -> PQCADLinear:
    layer = PQCADLinear(12, 5, bias=bias)
    layer.pack_(WeightSpec(bits, group_size), activation_bits=activation_bits)
    return layer


@torch.no_grad()
@given(bits=st.sampled_from(WEIGHT_BITS), shape=st.sampled_from([(12,), (3, 12), (2, 3, 12)]), bias=st.booleans())
def test_it_computes_what_the_reference_does(bits: int, shape: tuple[int, ...], bias: bool) -> None:
    layer, x = packed(bits, bias=bias), torch.randn(shape) * 3 + 1
    actual = torchao.run(layer, torchao.pack(layer), x)
    torch.testing.assert_close(actual, reference.run(layer, None, x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("activation_bits", ACTIVATION_BITS)
def test_static_ranges_and_dtypes(activation_bits: int) -> None:
    layer, groups = packed(8, activation_bits=activation_bits), TimestepGroups([500])
    # The first range is too narrow for the inputs: they are clipped.
    layer.set_input_qparams_(ActivationQParams(torch.tensor([0.004, 0.1]), torch.tensor([3, 64])), groups)
    for timestep in (10, 700):
        groups.select(groups.index_of(timestep))
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
            x = torch.randn(4, 12, dtype=dtype)
            actual = torchao.run(layer, torchao.pack(layer), x)
            assert actual.dtype == dtype
            torch.testing.assert_close(actual, reference.run(layer, None, x), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_groups_are_widened_to_eight_bits() -> None:
    layer, x = packed(4, 4), torch.randn(6, 12)
    actual, expected = torchao.run(layer, torchao.pack(layer), x), reference.run(layer, None, x)
    assert 0 < (actual - expected).norm() / expected.norm() < 0.02


def test_what_it_refuses() -> None:
    assert "no integer convolution" in str(torchao.refusal(_conv()))
    assert "for accelerators" in str(torchao.refusal(packed(8)))
    floats = PQCADLinear(12, 5)
    floats.pack_(WeightSpec(8), activation_bits=None)
    assert "floating point" in str(torchao.refusal(floats))


def _conv() -> PQCADConv2d:
    layer = PQCADConv2d(3, 4, 1)
    layer.pack_(WeightSpec(8), activation_bits=8)
    return layer


def test_forcing_it_on_a_cpu_says_why_not() -> None:
    layer = packed(8)
    layer.name = "block.layer"
    with (
        kernels.use("torchao"),
        torch.no_grad(),
        pytest.raises(ValueError, match=r"block\.layer: .* for accelerators"),
    ):
        layer(torch.randn(2, 12))


def test_on_an_accelerator_it_is_the_choice_for_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rule, with a device that only claims to be one: nothing here has run on a GPU."""
    monkeypatch.setattr(torchao, "available", lambda: True)
    for layer, expected in ((packed(8), "torchao"), (_conv(), "reference")):
        layer._buffers["qweight"] = layer.qweight.to("meta")
        monkeypatch.setattr(torch.Tensor, "device", property(lambda self: torch.device("cuda", 0)))
        assert layer.kernel_name() == expected
        monkeypatch.undo()
        monkeypatch.setattr(torchao, "available", lambda: True)
