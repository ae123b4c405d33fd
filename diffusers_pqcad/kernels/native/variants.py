"""The compiled libraries that a wheel carries: for which CPUs, under which names, and how they are built.

Needs nothing but the standard library: a build (build.py) imports this file alone, without PyTorch. None of them is
for one computer, and none is linked with an OpenMP of its own: PyTorch's is there when they are loaded (openmp.py).
"""

import subprocess
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

CSRC = Path(__file__).parents[1] / "csrc"
SHIPPED = Path(__file__).parents[1] / "shipped"
FLAGS = ("-O3", "-fno-fast-math", "-fopenmp", "-fPIC")  # of every library, also of one compiled on first use
DIGEST_BYTES = sha256().digest_size


class Variant(NamedTuple):
    """What the compiler is told of a CPU, and what Linux calls that (the flags of /proc/cpuinfo)."""

    flags: tuple[str, ...]
    cpu_flags: frozenset[str]


AVX2 = Variant(
    ("-march=x86-64-v3", "-mpclmul"),
    frozenset(("avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "pclmulqdq")),
)
AVX_VNNI = Variant((*AVX2.flags, "-mavxvnni"), AVX2.cpu_flags | {"avx_vnni"})
AVX512_VNNI = Variant(
    ("-march=x86-64-v4", "-mpclmul", "-mavx512vnni"),
    AVX2.cpu_flags | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl", "avx512_vnni"},
)
AVX512_BF16 = Variant((*AVX512_VNNI.flags, "-mavx512bf16"), AVX512_VNNI.cpu_flags | {"avx512_bf16"})
VARIANTS = {"avx512bf16": AVX512_BF16, "avx512vnni": AVX512_VNNI, "avxvnni": AVX_VNNI, "avx2": AVX2}
# Of each C file those in which it differs, best first.
LIBRARIES = {
    "attention.c": ("avx512bf16", "avx2"),  # the last one says that there is no bf16
    "crc32.c": ("avx2",),
    "layers.c": ("avx512vnni", "avxvnni", "avx2"),
    "weights.c": ("avx512vnni", "avx2"),
}


def text_beside(source: Path) -> bytes:
    """Return the text of all C files and headers in the folder of `source`: what it may include is among them."""
    return b"".join(path.read_bytes() for path in sorted(source.parent.glob("*.[ch]")))


def file_name(source: Path, name: str) -> str:
    """Return the name of the file that holds the variant `name` of the C file `source` as it is now.

    Of another text, or with other flags, it is another file, so that no library outlives its source.
    """
    told = " ".join((*VARIANTS[name].flags, *FLAGS, str(DIGEST_BYTES)))
    return f"{source.stem}-{name}-{sha256(text_beside(source) + told.encode()).hexdigest()[:16]}.so"


def shipped_for(source: Path, cpu_flags: frozenset[str]) -> Path | None:
    """Return the file that was shipped of `source` for the best of a CPU with `cpu_flags`, or `None`."""
    for name in LIBRARIES.get(source.name, ()) if source.parent == CSRC else ():
        if VARIANTS[name].cpu_flags <= cpu_flags:
            path = SHIPPED / file_name(source, name)
            return path if path.exists() else None
    return None


def seal_(path: Path) -> None:
    """Let a digest of the file at `path` end it, so that one that was cut short or changed is known."""
    content = path.read_bytes()
    path.write_bytes(content + sha256(content).digest())


def build(compiler: str, folder: Path) -> Iterator[Path]:
    """Yield the path of each library in `folder`, once `compiler` has built it; CalledProcessError where it fails."""
    for file, names in LIBRARIES.items():
        for name in names:
            path = folder / file_name(CSRC / file, name)
            build_variant(compiler, CSRC / file, VARIANTS[name], path)
            yield path


def build_variant(compiler: str, source: Path, variant: Variant, path: Path) -> None:
    """Compile `source` for `variant` to `path`, not linked with OpenMP, and whole."""
    with tempfile.TemporaryDirectory() as room:
        compiled = str(Path(room) / "compiled.o")
        command = [compiler, *variant.flags, *FLAGS, "-c", str(source), "-o", compiled]
        subprocess.run(command, capture_output=True, check=True)
        subprocess.run([compiler, "-shared", compiled, "-lm", "-o", str(path)], capture_output=True, check=True)
    seal_(path)
