"""Specification of the build of wheels: libraries where GCC is there, else a pure wheel and a warning."""

import logging
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="70.1")

from diffusers_pqcad.kernels.native import build, variants  # noqa: E402

ROOT = Path(__file__).parents[2]
NUM_LIBRARIES = sum(map(len, variants.LIBRARIES.values()))
# Notes how it is called, and writes what is asked for: what GCC makes of our files is tested in test_variants.py.
PRETENDER = """#!/bin/sh
echo "$@" >> "$CALLS"
while [ $# -gt 0 ]; do [ "$1" = "-o" ] && echo library > "$2"; shift; done
exit 0
"""
needs_linux = pytest.mark.skipif(not build.is_for_this_platform(), reason="the libraries are for x86-64 Linux")


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "pretender"
    path.write_text(PRETENDER)
    path.chmod(0o700)
    monkeypatch.setenv("CC", str(path))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    return path


@needs_linux
def test_every_library_is_built_and_sealed_and_older_ones_go(compiler: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shipped"
    folder.mkdir()
    (folder / "layers-avx2-0123456789abcdef.so").write_bytes(b"of an older source")
    assert build.build_into(folder)
    assert {path.name for path in folder.iterdir()} == {
        variants.file_name(variants.CSRC / file, name) for file, names in variants.LIBRARIES.items() for name in names
    }
    for path in folder.iterdir():
        assert len(path.read_bytes()) == len("library\n") + variants.DIGEST_BYTES


@needs_linux
def test_flags_of_the_computer_that_builds_do_not_reach_a_wheel(
    compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CFLAGS", "-march=native -Ofast")
    build.build_into(tmp_path / "shipped")
    calls = (tmp_path / "calls").read_text()
    assert "native" not in calls
    assert "-Ofast" not in calls
    linked = [line for line in calls.splitlines() if "-shared" in line]
    assert len(linked) == NUM_LIBRARIES
    assert not [line for line in linked if "openmp" in line]  # PyTorch's is there when it is loaded


FAILURES = {
    "no compiler": ("#!/bin/sh\nexit 0\n", 0o600, "no C compiler was found"),
    "clang": ('#!/bin/sh\necho "#define __clang__ 1"\n', 0o700, "is clang, and the libraries need GCC"),
    "no headers": ('#!/bin/sh\n[ "$2" = -E ] || { echo "omp.h: no such file" >&2; exit 1; }\n', 0o700, "omp.h"),
}


@needs_linux
@pytest.mark.parametrize(("text", "mode", "reason"), FAILURES.values(), ids=FAILURES)
def test_what_fails_is_a_warning_and_leaves_nothing(
    text: str, mode: int, reason: str, compiler: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler.write_text(text)
    compiler.chmod(mode)
    if mode == 0o600 and shutil.which(compiler):
        pytest.skip("to this user every file is a program")
    assert not build.build_into(tmp_path / "shipped")
    assert not (tmp_path / "shipped").exists()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()
    assert "It works" in record.getMessage()


@pytest.mark.parametrize(
    ("system", "machine"), [("win32", "AMD64"), ("darwin", "arm64"), ("darwin", "x86_64"), ("linux", "aarch64")]
)
def test_elsewhere_wheels_are_pure_and_nothing_is_said(
    system: str, machine: str, compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    assert not build.build_into(tmp_path / "shipped")
    assert not caplog.records
    assert not (tmp_path / "calls").exists()


def built_wheel(folder: Path) -> zipfile.ZipFile:
    """The wheel of a copy of this checkout, as a front end of builds makes it, in a process without our package."""
    for name in ("README.md", "LICENSE", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "diffusers_pqcad", folder / "diffusers_pqcad", ignore=shutil.ignore_patterns("__pycache__"))
    program = (
        "import setuptools.build_meta as backend, sys; backend.build_wheel('.'); sys.exit('torch' in sys.modules)"
    )
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def shipped_in(wheel: zipfile.ZipFile) -> list[str]:
    return [name for name in wheel.namelist() if name.startswith("diffusers_pqcad/kernels/shipped/")]


@needs_linux
def test_a_wheel_with_libraries_is_for_this_platform_and_every_python(compiler: Path, tmp_path: Path) -> None:
    (tmp_path / "project").mkdir()
    wheel = built_wheel(tmp_path / "project")
    assert str(wheel.filename).endswith("-py3-none-linux_x86_64.whl")
    assert len(shipped_in(wheel)) == NUM_LIBRARIES
    (about,) = [wheel.read(name).decode() for name in wheel.namelist() if name.endswith(".dist-info/WHEEL")]
    assert "Root-Is-Purelib: false" in about


def test_a_wheel_without_is_for_every_platform(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    (tmp_path / "project").mkdir()
    wheel = built_wheel(tmp_path / "project")
    assert str(wheel.filename).endswith("-py3-none-any.whl")
    assert not shipped_in(wheel)
    assert "diffusers_pqcad/kernels/csrc/layers.c" in wheel.namelist()
