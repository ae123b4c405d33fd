"""Specification of when kernels keep no int8 copies of the weights: asked for, or as memory is short; never saved."""

import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.kernels import memory, onednn
from diffusers_pqcad.kernels.x86.library import library
from diffusers_pqcad.layers.find import kernel_cache_bytes, packed_layers
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear
from diffusers_pqcad.numerics.qparams import WeightSpec

needs_x86 = pytest.mark.skipif(isinstance(library(), str), reason=str(library()))
GB = 10**9


@pytest.fixture(autouse=True)
def unasked(monkeypatch: Any) -> None:
    monkeypatch.delenv(memory.ENVIRONMENT_VARIABLE, raising=False)
    memory._warned.clear()


def linear(features: int = 64) -> PQCADLinear:
    layer = PQCADLinear(features, features)
    layer.pack_(WeightSpec(4), activation_bits=8)
    return layer


# ---- who decides


def test_the_caller_comes_before_the_environment_and_that_before_the_memory(monkeypatch: Any) -> None:
    assert kernels.keeps_copies(is_short=False)
    assert not kernels.keeps_copies(is_short=True)
    for word, keeps in (("low", False), ("normal", True)):
        monkeypatch.setenv("PQCAD_MEMORY", word)
        assert kernels.keeps_copies(True) == kernels.keeps_copies(False) == keeps
        for other, keeps_other in (("low", False), ("normal", True)):
            with kernels.use(memory=other):
                assert kernels.keeps_copies(True) == kernels.keeps_copies(False) == keeps_other
                with kernels.use("reference"):  # the kernel alone
                    assert kernels.keeps_copies(True) == keeps_other
            assert kernels.keeps_copies(True) == keeps


def test_kernel_and_memory_are_forced_together_and_given_back_after_an_error() -> None:
    with suppress(KeyError), kernels.use("reference", memory="low"):
        assert (kernels.forced(), kernels.keeps_copies(is_short=False)) == ("reference", False)
        raise KeyError
    assert (kernels.forced(), kernels.keeps_copies(is_short=False)) == (None, True)


def test_other_words_are_refused(monkeypatch: Any) -> None:
    with pytest.raises(ValueError, match=r"memory: expected one of \('low', 'normal'\), got 'tiny'"):
        kernels.use("reference", memory="tiny").__enter__()  # type: ignore[arg-type]
    assert kernels.forced() is None
    monkeypatch.setenv("PQCAD_MEMORY", "Low")
    with pytest.raises(ValueError, match="PQCAD_MEMORY: expected one of .*leave it out"):
        linear()(torch.randn(1, 64))


@needs_x86
@torch.no_grad()
def test_a_layer_packs_anew_when_the_wish_changes() -> None:
    layer, x = linear(), torch.randn(3, 64)
    held = []
    for wish in ("normal", "low", "normal"):
        with kernels.use("x86", memory=wish):
            layer(x)
            held.append(layer.cached_bytes())
            layer(x)
            assert layer.cached_bytes() == held[-1]
    assert held == [64 * 64, 0, 64 * 64]


# ---- when memory is short


def operations(*sizes: int) -> list[Any]:
    return [linear(size).operation() for size in sizes]


@pytest.mark.parametrize(("left", "is_short"), [(100_000, False), (20_000, True), (None, False)])
def test_copies_may_take_half_of_what_is_left(monkeypatch: Any, caplog: Any, left: int | None, is_short: bool) -> None:
    """Of 64 x 64 and 32 x 32 weights they are up to 6827 bytes; of twice as many layers, 13653."""
    monkeypatch.setattr(memory, "available_bytes", lambda: left)
    assert not memory.is_short(operations(64, 32))
    assert not caplog.records
    assert [memory.is_short(operations(64, 32) * 2) for _ in range(2)] == [is_short] * 2
    assert len(caplog.records) == is_short  # said once
    if is_short:
        assert "PQCAD_MEMORY=normal keeps them" in caplog.records[0].getMessage()


def test_a_model_that_is_loaded_where_memory_is_short_has_no_copies(
    tiny_unet: UNet2DModel, tmp_path: Path, monkeypatch: Any, caplog: Any
) -> None:
    quantize_(copy.deepcopy(tiny_unet), PQCADConfig()).save_pretrained(tmp_path / "normal")
    monkeypatch.setattr(memory, "available_bytes", lambda: 1000)
    short = UNet2DModel.from_pretrained(tmp_path / "normal")
    assert "Memory is short" in caplog.text
    layers = packed_layers(short).values()
    assert not any(layer.operation().keeps_copies for layer in layers)
    assert not any(layer.operation().keeps_copies for layer in packed_layers(copy.deepcopy(short)).values())
    with kernels.use(memory="normal"):
        assert all(layer.operation().keeps_copies for layer in layers)

    short.save_pretrained(tmp_path / "short")  # which says nothing of it
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("short", "normal")]
    for config in configs:
        config.pop("_name_or_path", None)
    assert configs[0] == configs[1]
    weights = [(tmp_path / name / "diffusion_pytorch_model.safetensors").read_bytes() for name in ("short", "normal")]
    assert weights[0] == weights[1]

    monkeypatch.setattr(memory, "available_bytes", lambda: GB)
    again = UNet2DModel.from_pretrained(tmp_path / "short")
    assert all(layer.operation().keeps_copies for layer in packed_layers(again).values())


@needs_x86
@torch.no_grad()
def test_a_whole_model_without_copies_gives_the_same_numbers(tiny_unet: UNet2DModel) -> None:
    model, x = quantize_(tiny_unet, PQCADConfig(weight_bits=4)), torch.randn(2, 1, 8, 8)
    with kernels.use(memory="normal"):
        expected = model(x, 5).sample
        assert kernel_cache_bytes(model) > 0
    with kernels.use(memory="low"):  # plans of blocks that were made with copies are not run
        found = model(x, 5).sample
        assert kernel_cache_bytes(model) == 0
        assert torch.equal(model(x, 5).sample, found)
        assert kernel_cache_bytes(model) == 0
    assert torch.equal(found, expected)


# ---- other kernels


def test_onednn_is_not_asked_for_what_it_would_copy(monkeypatch: Any) -> None:
    monkeypatch.setattr(onednn, "available", lambda: True)
    monkeypatch.setattr(onednn, "saturates", lambda: False)
    depthwise = PQCADConv2d(8, 8, 3, groups=8)
    depthwise.pack_(WeightSpec(4), activation_bits=8)
    assert onednn.refusal(linear().operation()) is None
    with kernels.use(memory="low"):
        refused = onednn.refusal(linear().operation())
        assert refused is not None
        assert refused == (onednn.KEEPS_COPIES, True)
        assert onednn.refusal(depthwise.operation()) is None  # no other int8 kernel takes it, and it has few weights


def test_the_line_about_kernels_says_that_no_copies_are_kept(tiny_unet: UNet2DModel) -> None:
    layers = packed_layers(quantize_(tiny_unet, PQCADConfig())).values()
    assert "no int8 copies" not in kernels.summary([layer.operation() for layer in layers])
    with kernels.use(memory="low"):
        assert "no int8 copies of the weights are kept" in kernels.summary([layer.operation() for layer in layers])


# ---- what is left of the memory


def test_linux_says_what_is_available(tmp_path: Path, monkeypatch: Any) -> None:
    meminfo = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "MEMINFO", meminfo)
    monkeypatch.setattr(memory, "OWN_CGROUP", tmp_path / "none")
    assert memory.available_bytes() is None  # another system
    meminfo.write_text("MemTotal:       4000 kB\nMemFree:         100 kB\nMemAvailable:    3000 kB\n")
    assert memory.available_bytes() == 3000 * 1024


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts_and_so_does_that_of_one_around_it(
    tmp_path: Path, monkeypatch: Any, version: int
) -> None:
    own = tmp_path / "cgroup"
    own.write_text("4:memory:/outer/inner\n2:cpu:/low\n" if version == 1 else "0::/outer/inner\n")
    monkeypatch.setattr(memory, "OWN_CGROUP", own)
    monkeypatch.setattr(memory, "CGROUPS", tmp_path / "fs")
    monkeypatch.setattr(memory, "MEMINFO", tmp_path / "none")
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    root = tmp_path / "fs" / "memory" if version == 1 else tmp_path / "fs"

    def limit(folder: Path, most: str, used: int, cached: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / names[0]).write_text(f"{most}\n")
        (folder / names[1]).write_text(f"{used}\n")
        (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {cached}\n")

    assert memory.available_bytes() is None
    limit(root / "outer" / "inner", "max" if version == 2 else str(2**63 - 4096), 700, 0)
    assert memory.available_bytes() in (None, 2**63 - 4096 - 700)  # no limit
    limit(root / "outer", "1000", 700, 250)
    assert memory.available_bytes() == 550
    limit(root / "outer" / "inner", "300", 200, 0)
    assert memory.available_bytes() == 100
    limit(root / "outer" / "inner", "300", 400, 0)
    assert memory.available_bytes() == 0


def test_this_computer_can_be_asked() -> None:
    found = memory.available_bytes()
    assert found is None or found > 0


def test_layers_of_no_model_keep_copies() -> None:
    assert nn.Sequential(linear())[0].operation().keeps_copies
