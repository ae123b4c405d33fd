"""C source of this package, compiled on first use by the computer's own compiler and kept in the user's cache folder.

No build step is forced on anybody: without a compiler, the kernels that need one refuse their layers and say so.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fno-fast-math", "-fopenmp", "-shared", "-fPIC")
FLAGS_VARIABLE = "CFLAGS"  # of the user, before ours: an older CPU or fast mathematics there must not reach our code
CACHE_VARIABLE = "PQCAD_CACHE"
NOT_HERE = "it is for Linux on a CPU with AVX2"
NO_COMPILER = "no C compiler was found (CC, cc, gcc or clang)"


def compiler() -> str | None:
    """Return the C compiler: the one that CC names, else the first on the path."""
    return next((path for name in (os.environ.get("CC"), *COMPILERS) if name and (path := shutil.which(name))), None)


def cache_folder() -> Path:
    """Return where compiled code is kept: PQCAD_CACHE, else diffusers-pqcad in the user's cache folder."""
    if folder := os.environ.get(CACHE_VARIABLE):
        return Path(folder).expanduser().resolve()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusers-pqcad"


def open_private(folder: Path) -> None:
    """Create `folder`; raise OSError where another user could put code into it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid != os.getuid() or status.st_mode & 0o022:
        raise OSError(f"{folder} is open to other users, and code is loaded from it; {CACHE_VARIABLE} names another")


def text_beside(source: Path) -> bytes:
    """Return the text of all C files and headers in the folder of `source`: what it may include is among them."""
    return b"".join(path.read_bytes() for path in sorted(source.parent.glob("*.[ch]")))


@cache
def library(source: Path) -> ctypes.CDLL | str:
    """Return the C file `source` as a loaded library, or why there is none on this computer."""
    if sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return NOT_HERE
    program = compiler()
    if program is None:
        return NO_COMPILER
    try:
        command = [program, *shlex.split(os.environ.get(FLAGS_VARIABLE, "")), *FLAGS]
        # Version, CPU and most flags show in the macros: a home folder may be shared by several computers.
        macros = subprocess.run([*command, "-dM", "-E", "-xc", os.devnull], capture_output=True, check=True).stdout
        key = sha256(text_beside(source) + macros + " ".join(command).encode()).hexdigest()[:16]
        path = cache_folder() / f"{source.stem}-{key}.so"
        open_private(path.parent)
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # not there yet, or broken
            compile_to(path, command, source)
        return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        return f"{program} failed: {error.stderr.decode(errors='replace').strip()[-500:]}"
    except (OSError, RuntimeError, ValueError) as error:  # of files; of a user without a home; of odd CFLAGS
        return f"its code could not be compiled or loaded: {error}"


def compile_to(path: Path, command: list[str], source: Path) -> None:
    """Compile `source` to `path`, which appears whole: several processes may do so at once."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run([*command, str(source), "-o", str(built)], capture_output=True, check=True)
        built.replace(path)
