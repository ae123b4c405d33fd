"""C source of this package, compiled on first use by the computer's own compiler and kept in the user's cache folder.

No build step is forced on anybody: without a compiler, the kernels that need one refuse their layers and say so, and a
warning says what would help.
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
from functools import cache, partial
from hashlib import sha256
from pathlib import Path

import torch

CSRC = Path(__file__).parents[1] / "csrc"
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-march=native", "-fno-fast-math", "-fopenmp", "-shared", "-fPIC")
FLAGS_VARIABLE = "CFLAGS"  # of the user, before ours: an older CPU or fast mathematics there must not reach our code
CACHE_VARIABLE = "PQCAD_CACHE"
NOT_HERE = "it is for Linux on a CPU with AVX2"
NO_COMPILER = "no C compiler was found (CC, cc, gcc or clang)"
INSTALL_COMPILER = (
    "Install GCC with the headers of C (`apt-get install gcc libc6-dev`, `dnf install gcc`), or name a compiler in CC"
)
DIGEST_BYTES = sha256().digest_size
PAUSE_HARD = 2  # `omp_pause_hard` in omp.h

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


def text_beside(source: Path) -> bytes:
    """Return the text of all C files and headers in the folder of `source`: what it may include is among them."""
    return b"".join(path.read_bytes() for path in sorted(source.parent.glob("*.[ch]")))


@cache
def library(source: Path) -> ctypes.CDLL | str:
    """Return the C file `source` as a loaded library, or why there is none on this computer.

    The first time that something could be done about it, a warning says what.
    """
    if sys.platform != "linux" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return NOT_HERE
    program = compiler()
    if program is None:
        return missing(NO_COMPILER, INSTALL_COMPILER)
    try:
        command = [program, *shlex.split(os.environ.get(FLAGS_VARIABLE, "")), *FLAGS]
        # Version, CPU and most flags show in the macros: a home folder may be shared by several computers.
        macros = subprocess.run([*command, "-dM", "-E", "-xc", os.devnull], capture_output=True, check=True).stdout
        # The number of bytes that end the file is part of its name: files of versions without are none of ours.
        key = sha256(text_beside(source) + macros + f"{' '.join(command)} {DIGEST_BYTES}".encode()).hexdigest()[:16]
        path = cache_folder() / f"{source.stem}-{key}.so"
        open_private(path.parent)
        try:
            loaded = load(path)
        except OSError:  # not there yet, or broken
            compile_to(path, command, source)
            loaded = load(path)
    except subprocess.CalledProcessError as error:
        words = error.stderr.decode(errors="replace").strip()[-500:] or f"exit status {error.returncode}"
        return missing(f"{program} failed: {words}", f"{INSTALL_COMPILER}; it must know the flags in {FLAGS_VARIABLE}")
    except ValueError as error:
        return missing(f"{FLAGS_VARIABLE} cannot be read: {error}", f"Correct {FLAGS_VARIABLE}")
    except (OSError, RuntimeError) as error:  # of files; of a user without a home
        reason = f"its code could not be compiled or loaded: {error}"
        return missing(reason, f"Let {CACHE_VARIABLE} name a folder that only you can write to")
    keep_forks_alive(loaded)
    return loaded


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
        content = built.read_bytes()
        built.write_bytes(content + sha256(content).digest())
        built.replace(path)


def load(path: Path) -> ctypes.CDLL:
    """Return the library at `path`; raise OSError where it is not there, or not as `compile_to` left it.

    The loader maps a file without a look at its length: where the end is missing, it ends the process.
    """
    content = path.read_bytes()
    if sha256(content[:-DIGEST_BYTES]).digest() != content[-DIGEST_BYTES:]:
        raise OSError(f"{path} is damaged")
    return ctypes.CDLL(str(path))


def keep_forks_alive(loaded: ctypes.CDLL) -> None:
    """Let processes forked from now on use `loaded` and PyTorch, whatever ran before."""
    for user in (loaded, ctypes.CDLL(torch._C.__file__)):  # they may have copies of OpenMP of their own
        if hasattr(user, "omp_pause_resource_all") and not hasattr(user, "__kmpc_fork_call"):  # that of clang is fine
            end_threads_before_forks(ctypes.cast(user.omp_pause_resource_all, ctypes.c_void_p).value)


@cache
def end_threads_before_forks(pause: int) -> None:
    """Have every `os.fork` call OpenMP's `omp_pause_resource_all`, which lies at the address `pause`, first.

    GNU's OpenMP (5.0; GCC 9) keeps the threads of a loop for the next one. They are not in a forked process, which
    would wait for them forever. So the thread that forks ends its own; its next loop starts others, in both processes.
    """
    os.register_at_fork(before=partial(ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(pause), PAUSE_HARD))
