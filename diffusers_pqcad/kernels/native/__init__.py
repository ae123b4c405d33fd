"""C source of this package as loaded libraries: those that the wheel carries, or compiled on first use.

In an editable checkout, with flags of the user, or from a wheel without libraries, the computer's own compiler is
used, and what it compiles is kept in the user's cache folder. No build step is forced on anybody: without a compiler,
the kernels that need one refuse their layers and say so, and a warning says what would help.
"""

import ctypes
import logging
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch

from diffusers_pqcad.kernels import cpu
from diffusers_pqcad.kernels.native import openmp, variants
from diffusers_pqcad.kernels.native.variants import CSRC, DIGEST_BYTES

__all__ = ["CSRC", "cache_folder", "compiler", "library", "missing"]

COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-march=native", *variants.FLAGS, "-shared")
FLAGS_VARIABLE = "CFLAGS"  # of the user, before ours: an older CPU or fast mathematics there must not reach our code
CACHE_VARIABLE = "PQCAD_CACHE"
NOT_HERE = "it is for Linux on a CPU with AVX2"
NO_COMPILER = "no C compiler was found (CC, cc, gcc or clang)"
INSTALL_COMPILER = (
    "Install GCC with the headers of C (`apt-get install gcc libc6-dev`, `dnf install gcc`), or name a compiler in CC"
)

logger = logging.getLogger(__name__)
_has_warned = threading.Event()


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


@cache
def library(source: Path) -> ctypes.CDLL | str:
    """Return the C file `source` as a loaded library, or why there is none on this computer.

    It is the one that the wheel carries, unless CFLAGS asks for flags. The first time that something could be done
    about a missing one, a warning says what.
    """
    if sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return NOT_HERE
    flags = os.environ.get(FLAGS_VARIABLE, "")
    loaded: ctypes.CDLL | str | None = None if flags.strip() else load_shipped(source)
    if loaded is None:
        loaded = load_compiled(source, flags)
    if not isinstance(loaded, str):
        openmp.keep_forks_alive(loaded)
    return loaded


def load_shipped(source: Path) -> ctypes.CDLL | None:
    """Return the library that the wheel carries of `source` for this CPU; `None` where none can be used."""
    path = variants.shipped_for(source, cpu.flags())
    if path is None:
        return None
    try:
        openmp.share()
        return load(path)
    except OSError as error:
        logger.warning("%s. Install diffusers-pqcad again; it is compiled here where there is a compiler.", error)
        return None


def load_compiled(source: Path, flags: str) -> ctypes.CDLL | str:
    """Return `source` as the compiler of this computer compiles it with `flags`, now or before, or why it cannot."""
    program = compiler()
    if program is None:
        return missing(NO_COMPILER, INSTALL_COMPILER)
    try:
        command = [program, *shlex.split(flags), *FLAGS]
        # Version, CPU and most flags show in the macros: a home folder may be shared by several computers.
        macros = subprocess.run([*command, "-dM", "-E", "-xc", os.devnull], capture_output=True, check=True).stdout
        # The number of bytes that end the file is part of its name: files of versions without are none of ours.
        told = macros + f"{' '.join(command)} {DIGEST_BYTES}".encode()
        key = sha256(variants.text_beside(source) + told).hexdigest()[:16]
        path = cache_folder() / f"{source.stem}-{key}.so"
        open_private(path.parent)
        try:
            return load(path)
        except OSError:  # not there yet, or broken
            compile_to(path, command, source)
            return load(path)
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode(errors="replace").strip()[-500:] or f"exit status {error.returncode}"
        return missing(f"{program} failed: {words}", f"{INSTALL_COMPILER}; it must know the flags in {FLAGS_VARIABLE}")
    except ValueError as error:
        return missing(f"{FLAGS_VARIABLE} cannot be read: {error}", f"Correct {FLAGS_VARIABLE}")
    except (OSError, RuntimeError) as error:  # of files; of a user without a home
        reason = f"its code could not be compiled or loaded: {error}"
        return missing(reason, f"Let {CACHE_VARIABLE} name a folder that only you can write to")


def missing(reason: str, remedy: str) -> str:
    """Return `reason`. The first one in a process is a warning, with its `remedy`: all C files miss the same."""
    if not _has_warned.is_set():
        _has_warned.set()
        logger.warning(
            "Quantized models load and run slower here than they could, without the compiled kernels of "
            "diffusers_pqcad: %s. %s.",
            reason,
            remedy,
        )
    return reason


def compile_to(path: Path, command: list[str], source: Path) -> None:
    """Compile `source` to `path`, which appears whole: several processes may do so at once. A digest of it ends it."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run([*command, str(source), "-o", str(built)], capture_output=True, check=True)
        variants.seal_(built)
        built.replace(path)


def load(path: Path) -> ctypes.CDLL:
    """Return the library at `path`; raise OSError where it is not there, or not whole: as `variants.seal_` left it.

    The loader maps a file without a look at its length: where the end is missing, it ends the process.
    """
    content = path.read_bytes()
    if sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        raise OSError(f"{path} is damaged")
    return ctypes.CDLL(str(path))
