"""Specification of compiled code: found or refused with a reason, kept whole, never built twice."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusers_pqcad.kernels import attention, native, weights, x86

SOURCE = "int answer(void) { return 42; }\n"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or native.compiler() is None, reason="needs Linux and a C compiler"
)


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv(native.CACHE_VARIABLE, str(tmp_path / "cache"))
    path = tmp_path / "answer.c"
    path.write_text(SOURCE)
    native.library.cache_clear()
    yield path
    native.library.cache_clear()


def test_code_is_compiled_once_and_kept(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.library(source).answer() == 42
    (kept,) = native.cache_folder().iterdir()
    assert kept.suffix == ".so"
    native.library.cache_clear()
    monkeypatch.setattr(native, "compile_to", None)  # not called again
    assert native.library(source).answer() == 42


def test_another_source_is_another_library(source: Path) -> None:
    assert native.library(source).answer() == 42
    source.write_text(SOURCE.replace("42", "43"))
    native.library.cache_clear()
    assert native.library(source).answer() == 43


def test_another_header_is_another_library(source: Path) -> None:
    source.write_text('#include "answer.h"\nint answer(void) { return ANSWER; }\n')
    header = source.with_name("answer.h")
    for answer in (42, 43):
        header.write_text(f"#define ANSWER {answer}\n")
        native.library.cache_clear()
        assert native.library(source).answer() == answer
    assert len(list(native.cache_folder().iterdir())) == 2


@pytest.mark.parametrize("source", [attention.SOURCE, weights.SOURCE, x86.SOURCE], ids=lambda source: source.name)
def test_our_code_includes_headers_of_its_own_folder_only(source: Path) -> None:
    """Beside those of the system: a library's name changes with the files of the folder."""
    command = [str(native.compiler()), *native.FLAGS, "-MM", str(source)]
    rule = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    _, *found = rule.replace("\\\n", " ").split()
    assert len(found) > 1
    assert {Path(path).parent for path in found} == {source.parent}


def test_without_a_compiler_the_reason_is_given(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)
    assert native.library(source) == native.NO_COMPILER


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(source: Path) -> None:
    source.write_text("this is not C\n")
    assert "answer.c:1" in str(native.library(source))
    assert list(native.cache_folder().iterdir()) == []


def test_a_cache_that_cannot_be_written_is_a_reason(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.CACHE_VARIABLE, str(source / "below-a-file"))
    assert "could not be compiled or loaded" in str(native.library(source))


def test_cc_names_the_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = native.compiler()
    monkeypatch.setenv("CC", "gcc-that-does-not-exist")
    assert native.compiler() == compiler
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("PATH", "")
    assert native.compiler() == compiler


def test_a_folder_that_others_can_write_to_is_refused(source: Path) -> None:
    native.cache_folder().mkdir()
    native.cache_folder().chmod(0o777)
    assert "open to other users" in str(native.library(source))
    assert list(native.cache_folder().iterdir()) == []


def test_a_broken_library_is_built_again(source: Path) -> None:
    assert native.library(source).answer() == 42
    (kept,) = native.cache_folder().iterdir()
    kept.unlink()
    kept.write_bytes(b"not a library")
    native.library.cache_clear()
    assert native.library(source).answer() == 42


def test_a_user_without_a_home_and_odd_flags_are_reasons(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CFLAGS", "'-O2")
    assert "No closing quotation" in str(native.library(source))
    monkeypatch.delenv("CFLAGS")
    monkeypatch.delenv(native.CACHE_VARIABLE)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    native.library.cache_clear()
    assert "home directory" in str(native.library(source))


def test_flags_for_an_older_cpu_or_fast_mathematics_do_not_reach_our_code() -> None:
    command = [str(native.compiler()), "-march=nocona", "-Ofast", *native.FLAGS, "-dM", "-E", "-xc", "/dev/null"]
    macros = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert "__FAST_MATH__" not in macros
    assert "__AVX2__" in macros


def test_cflags_make_another_library(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source.write_text("int answer(void) { return ANSWER; }\n")
    for answer in ("1", "2"):
        monkeypatch.setenv("CFLAGS", f"-DANSWER={answer} -O0")
        native.library.cache_clear()
        assert native.library(source).answer() == int(answer)
    assert len(list(native.cache_folder().iterdir())) == 2


def test_another_cpu_is_another_library(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder may be shared by computers: the same command, and a compiler that finds another CPU."""
    elsewhere = source.with_name("cc")
    elsewhere.write_text(f'#!/bin/sh\nexec {native.compiler()} "$@" $OTHER_CPU\n')
    elsewhere.chmod(0o700)
    monkeypatch.setenv("CC", str(elsewhere))
    for cpu in ("", "-mno-avx2"):
        monkeypatch.setenv("OTHER_CPU", cpu)
        native.library.cache_clear()
        assert native.library(source).answer() == 42
    assert len(list(native.cache_folder().iterdir())) == 2


def test_several_processes_may_compile_at_once(source: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from diffusers_pqcad.kernels import native\n"
        "assert native.library(Path(sys.argv[1])).answer() == 42\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code, str(source)]) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    assert len(list(native.cache_folder().iterdir())) == 1
