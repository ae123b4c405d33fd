"""Specification of the measured choice of a kernel: on CPUs with AMX alone, once, and x86 unless it is behind."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels import cpu, measured, native, onednn, x86
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear, QuantizedLayer
from diffusers_pqcad.numerics.qparams import WeightSpec

ONE_DNN_FOR_PRODUCTS = {
    "matrix products": "onednn", "1x1 convolutions": "x86", "other convolutions": "x86"
}  # fmt: skip
pytestmark = pytest.mark.skipif(
    isinstance(x86.library.library(), str) or not onednn.available() or onednn.saturates(),
    reason="needs both int8 kernels, at 8 bits",
)


@pytest.fixture(autouse=True)
def measured_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.delenv(kernels.ENVIRONMENT_VARIABLE, raising=False)
    measured.choices.cache_clear()
    yield
    measured.choices.cache_clear()


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_amx", lambda: True)


def packed(layer: QuantizedLayer) -> QuantizedLayer:
    layer.pack_(WeightSpec(8), activation_bits=8)
    return layer.requires_grad_(False)


def layers() -> dict[str, QuantizedLayer]:
    return {
        "matrix products": packed(PQCADLinear(16, 8)),
        "1x1 convolutions": packed(PQCADConv2d(16, 8, 1)),
        "other convolutions": packed(PQCADConv2d(16, 8, 3)),
    }


@pytest.mark.parametrize(
    ("x86_ms", "onednn_ms", "expected"),
    [
        ([4, 4, 4], [2, 2, 2], "onednn"),
        ([2, 2, 2], [4, 4, 4], "x86"),
        ([4, 4, 4], [4, 4, 4], "x86"),
        ([10.5, 10.5, 10.5], [10, 10, 10], "x86"),  # a little faster: a block at once is worth more
        ([4, 4, 40], [5, 5, 5], "x86"),  # medians: one sample waited for the core
        ([4], [2], "onednn"),
    ],
)
def test_another_kernel_is_taken_where_it_is_well_ahead(x86_ms, onednn_ms, expected: str) -> None:
    assert measured.decide({"x86": x86_ms, "onednn": onednn_ms}) == expected


def test_every_kind_of_layer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {measured.kind_of(layer.operation()) for layer in layers().values()} == measured.KINDS.keys()
    assert [measured.kind_of(layer.operation()) for layer in layers().values()] == list(layers())


def test_nothing_is_measured_without_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_amx", lambda: False)
    monkeypatch.setattr(measured, "seconds_of", None)  # not called
    assert {layer.kernel_name() for layer in layers().values()} == {"x86"}
    assert "AMX" not in kernels.summary([layer.operation() for layer in layers().values()])


def test_with_amx_layers_take_the_kernel_that_was_faster_for_their_kind(amx, monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {kind: {"x86": [2.0], "onednn": [1.0 if name == "onednn" else 3.0]} for kind, name in zip(
        measured.KINDS.values(), ONE_DNN_FOR_PRODUCTS.values(), strict=True
    )}  # fmt: skip
    monkeypatch.setattr(measured, "seconds_of", seconds.__getitem__)
    found = layers()
    assert {kind: layer.kernel_name() for kind, layer in found.items()} == ONE_DNN_FOR_PRODUCTS
    linear, x = found["matrix products"], torch.randn(2, 16)
    called = linear.operation(linear.input_group())
    assert kernels.select_kernel(called, x).NAME == "onednn"
    with kernels.use("x86"):
        assert kernels.select_kernel(called, x).NAME == "x86"
    said = kernels.summary([layer.operation() for layer in found.values()])
    assert "1 of 3 layers: onednn" in said
    assert "this CPU has AMX, and measured as faster were onednn for matrix products, x86 for 1x1 conv" in said


def test_a_layer_that_one_kernel_refuses_takes_the_other(amx, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "seconds_of", None)  # not called
    grouped = packed(PQCADConv2d(16, 8, 3, groups=2))
    assert grouped.kernel_name() == "onednn"
    in_floating_point = PQCADLinear(16, 8)
    in_floating_point.pack_(WeightSpec(8), activation_bits=None)
    assert in_floating_point.kernel_name() == "reference"


def test_a_choice_is_kept_beside_the_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "seconds_of", lambda kind: {"x86": [2.0], "onednn": [1.0]})
    assert set(measured.choices().values()) == {"onednn"}
    (kept,) = native.cache_folder().iterdir()
    assert json.loads(kept.read_text()) == measured.choices()
    measured.choices.cache_clear()
    monkeypatch.setattr(measured, "seconds_of", None)  # not called
    assert set(measured.choices().values()) == {"onednn"}


@pytest.mark.parametrize("content", ["", "{", "[]", '{"matrix products": "x86"}', '{"a": {}}'])
def test_a_damaged_file_is_written_anew(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "seconds_of", lambda kind: {"x86": [1.0], "onednn": [1.0]})
    expected = measured.choices()
    (kept,) = native.cache_folder().iterdir()
    kept.write_text(content)
    measured.choices.cache_clear()
    assert measured.choices() == expected
    assert json.loads(kept.read_text()) == expected


def test_other_circumstances_are_measured_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {measured.circumstances()}
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    known.add(measured.circumstances())
    monkeypatch.setattr(cpu, "flags", lambda: frozenset(("amx_int8",)))
    known.add(measured.circumstances())
    torch.set_num_threads(2)
    known.add(measured.circumstances())
    assert len(known) == 4


def test_without_a_folder_it_is_measured_by_every_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CACHE_VARIABLE, "/proc/diffusers-pqcad")
    monkeypatch.setattr(measured, "seconds_of", lambda kind: {"x86": [2.0], "onednn": [1.0]})
    assert set(measured.choices().values()) == {"onednn"}


@pytest.mark.parametrize("kind", measured.KINDS.values(), ids=measured.KINDS)
def test_both_kernels_are_called_in_turns_for_a_moment(kind: measured.Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MEASURED_SECONDS", 0.0)  # one round
    with torch.device("meta"):  # as models are built while they load
        seconds = measured.seconds_of(kind)
    assert {name: len(values) for name, values in seconds.items()} == {"x86": 1, "onednn": 1}
    operation, x = measured.sample(kind)
    ours, others = (kernel.run(operation, kernel.pack(operation), x) for kernel in (x86, onednn))
    assert (ours - others).norm() < 0.02 * others.norm()


def test_random_numbers_of_the_caller_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "MEASURED_SECONDS", 0.0)
    before = torch.get_rng_state()
    measured.choices()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_kind_takes_at_most_the_time_that_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a clock that passes a tenth of a second at each look says."""
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock) / 10)
    seconds = measured.seconds_of(measured.KINDS["matrix products"])
    assert [len(values) for values in seconds.values()] == [1, 1]
