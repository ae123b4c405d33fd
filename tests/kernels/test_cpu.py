"""Specification of what is known of the CPU."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusers_pqcad.kernels import cpu

CPUINFO = "processor\t: 0\nmodel name\t: {name}\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: other\n"


@pytest.fixture(autouse=True)
def read_anew() -> Iterator[None]:
    cpu.flags.cache_clear()
    yield
    cpu.flags.cache_clear()


@pytest.mark.parametrize(
    ("flags", "has_amx"),
    [("avx2 amx_bf16 amx_tile amx_int8", True), ("avx2 avx512_vnni", False), ("amx_tile amx_bf16", False)],
)
def test_flags_are_those_that_linux_names(flags: str, has_amx: bool, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    cpu.CPUINFO.write_text(CPUINFO.format(name="A CPU of flags : 2", flags=flags))
    assert cpu.flags() == set(flags.split())
    assert cpu.has_amx() == has_amx


@pytest.mark.parametrize("content", [None, "", "Processor\t: AArch64\nFeatures\t: fp asimd\n"])
def test_without_any_there_are_none(content: str | None, tmp_path: Path, monkeypatch) -> None:
    """On macOS, Windows and ARM."""
    monkeypatch.setattr(cpu, "CPUINFO", tmp_path / "cpuinfo")
    if content is not None:
        cpu.CPUINFO.write_text(content)
    assert cpu.flags() == frozenset()
    assert not cpu.has_amx()
