"""Specification of compiled code: found or refused with a reason, kept whole, never built twice."""

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from diffusers_pqcad.kernels import native
from diffusers_pqcad.kernels.native import weights
from diffusers_pqcad.kernels.x86 import attention, library

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


@pytest.mark.parametrize("source", [attention.SOURCE, weights.SOURCE, library.SOURCE], ids=lambda source: source.name)
def test_our_code_includes_headers_of_its_own_folder_only(source: Path) -> None:
    """Beside those of the system: a library's name changes with the files of the folder."""
    all_parts = ("-mavx512f", "-mavx512bf16")  # whatever this CPU has: nothing is compiled
    command = [str(native.compiler()), *native.FLAGS, *all_parts, "-MM", str(source)]
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


def flip(path: Path, at: float) -> None:
    """Change one bit of the file, a share `at` of it from its start."""
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def link_to_itself(path: Path) -> None:
    """Nobody can read it, the superuser neither."""
    path.unlink()
    path.symlink_to(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a page is left": lambda path: os.truncate(path, 4096),
    "half is left": lambda path: os.truncate(path, path.stat().st_size // 2),
    "a byte is missing": lambda path: os.truncate(path, path.stat().st_size - 1),
    "empty": lambda path: os.truncate(path, 0),
    "garbage": lambda path: path.write_bytes(b"not a library"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "a bit of the head": lambda path: flip(path, 0.0),
    "a bit of the middle": lambda path: flip(path, 0.5),
    "a bit of the end": lambda path: flip(path, 1.0),
    "cannot be read": link_to_itself,
}
LOAD = """
import sys
from pathlib import Path
from diffusers_pqcad.kernels import native
for source in sys.argv[1:]:
    found = native.library(Path(source))
    assert not isinstance(found, str), (source, found)
"""


def test_damaged_libraries_are_built_again(source: Path, tmp_path: Path) -> None:
    """By a crash, a full disk, a copy that was cut short; loaded in a process of its own, for they may end it."""
    sources = [library.SOURCE, attention.SOURCE, weights.SOURCE]
    damages: dict[str, Callable[[Path], object]] = {source.stem: DAMAGES["half is left"] for source in sources}
    for number, damage in enumerate(DAMAGES.values()):
        sources.append(source.with_stem(f"answer{number}"))
        sources[-1].write_text(SOURCE)
        damages[sources[-1].stem] = damage
    for each in sources:
        assert not isinstance(native.library(each), str)
    whole = {path.name: path.read_bytes() for path in native.cache_folder().iterdir()}
    assert len(whole) == len(damages)
    other = tmp_path / "other"  # this process has the first files in its memory
    shutil.copytree(native.cache_folder(), other)
    for path in other.iterdir():
        damages[path.stem.split("-")[0]](path)
    command, environment = [sys.executable, "-c", LOAD, *map(str, sources)], {native.CACHE_VARIABLE: str(other)}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr  # -7: a bus error
    assert {path.name: path.read_bytes() for path in other.iterdir()} == whole


def test_files_of_another_version_are_left_alone(source: Path) -> None:
    native.cache_folder().mkdir()
    other = native.cache_folder() / "answer-0123456789abcdef.so"
    other.write_bytes(b"of another version")
    assert native.library(source).answer() == 42
    assert other.read_bytes() == b"of another version"
    assert len(list(native.cache_folder().iterdir())) == 2


def test_a_library_that_stays_damaged_is_a_reason(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that loses what is written to it."""
    monkeypatch.setattr(native, "compile_to", lambda path, command, source: path.write_bytes(b"not a library"))
    assert "is damaged" in str(native.library(source))


def read_only(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the superuser, too."""
    monkeypatch.setenv(native.CACHE_VARIABLE, "/proc/diffusers-pqcad")


def open_to_others(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    native.cache_folder().mkdir()
    native.cache_folder().chmod(0o777)


def no_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CC", raising=False)


def failing_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "false")


def broken_compiler(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As GCC without the headers of C."""
    for path in source.parent.glob("*.c"):
        path.write_text("#include <missing.h>\n")


def unknown_flag(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.FLAGS_VARIABLE, "-fnonsense")


def odd_flags(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.FLAGS_VARIABLE, "'-O2")


FAILURES = {
    no_compiler: "apt-get install gcc",
    failing_compiler: "apt-get install gcc",
    broken_compiler: "libc6-dev",
    unknown_flag: native.FLAGS_VARIABLE,
    odd_flags: f"Correct {native.FLAGS_VARIABLE}",
    read_only: f"Let {native.CACHE_VARIABLE} name",
    open_to_others: f"Let {native.CACHE_VARIABLE} name",
}


@pytest.mark.parametrize(("fail", "remedy"), FAILURES.items())
def test_what_can_be_done_about_a_failure_is_said_once(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fail, remedy: str
) -> None:
    native._has_warned.clear()
    other = source.with_stem("other")
    other.write_text(SOURCE)
    fail(source, monkeypatch)
    reason = native.library(source)
    assert isinstance(reason, str)
    assert isinstance(native.library(other), str)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert reason in record.getMessage()
    assert remedy in record.getMessage()
    assert "run slower" in record.getMessage()


def test_nothing_is_said_where_code_is_compiled_or_cannot_be(
    source: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On macOS, Windows and ARM no compiler would help."""
    native._has_warned.clear()
    assert native.library(source).answer() == 42
    native.library.cache_clear()
    no_compiler(source, monkeypatch)
    monkeypatch.setattr(sys, "platform", "darwin")
    assert native.library(source) == native.NOT_HERE
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")
    native.library.cache_clear()
    assert native.library(source) == native.NOT_HERE
    assert not caplog.records


def test_a_user_without_a_compiler_is_told_once(tmp_path: Path) -> None:
    program = (
        "import torch; from diffusers_pqcad import PQCADConfig, quantize_\n"
        "for _ in range(2): quantize_(torch.nn.Sequential(torch.nn.Linear(64, 64)), PQCADConfig(weight_bits=4))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "CC"} | {"PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr.count("apt-get install gcc") == 1
    assert native.NO_COMPILER in done.stderr


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
    """Here they find a damaged file."""
    assert native.library(source).answer() == 42
    (kept,) = native.cache_folder().iterdir()
    content = kept.read_bytes()
    kept.unlink()  # this process has it in its memory
    kept.write_bytes(content[:-1])
    command = [sys.executable, "-c", LOAD, str(source)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(timeout=300) for process in processes] == [0, 0, 0]
    assert [path.read_bytes() for path in native.cache_folder().iterdir()] == [content]
