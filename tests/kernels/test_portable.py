"""The C code is C11 without a warning, for GCC and clang and for every kind of CPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

from diffusers_pqcad.kernels.native import variants

ANY_CPU = ("-march=x86-64",)  # neither AVX nor carry-less multiplication
CASES = [
    (compiler, file, name)
    for compiler in ("gcc", "clang")
    for file, names in variants.LIBRARIES.items()
    for name in (*names, *(() if file == "layers.c" else ("any",)))
]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("openmp") / "program.c"
    path.write_text("#include <omp.h>\n#include <immintrin.h>\n")
    return path


def complaints(compiler: str, source: Path, *flags: str) -> str:
    command = [compiler, *flags, "-std=c11", "-Wall", "-Wextra", "-Werror", "-fopenmp", "-fsyntax-only", str(source)]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.parametrize(("compiler", "file", "name"), CASES)
def test_it_is_plain_c11(compiler: str, file: str, name: str, program: Path) -> None:
    flags = ANY_CPU if name == "any" else variants.VARIANTS[name].flags
    if shutil.which(compiler) is None or complaints(compiler, program, *flags):
        pytest.skip(f"no {compiler} with OpenMP that knows {flags}")
    assert not complaints(compiler, variants.CSRC / file, *flags)
