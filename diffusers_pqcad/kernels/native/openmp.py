"""The OpenMP that PyTorch runs on: shared with compiled code, so that nobody starts threads twice; and forks."""

import ctypes
import os
from functools import cache, partial

import torch

PAUSE_HARD = 2  # `omp_pause_hard` in omp.h


class Place(ctypes.Structure):
    """`Dl_info` in dlfcn.h."""

    _fields_ = [
        *(("file", ctypes.c_char_p), ("start", ctypes.c_void_p)),
        *(("symbol", ctypes.c_char_p), ("address", ctypes.c_void_p)),
    ]


@cache
def share() -> str:
    """Let libraries that are loaded from now on find PyTorch's OpenMP, and return its file.

    They name none, as it has a name of its own in some releases: `libgomp.so.1`, `libgomp-a34b3233.so.1`,
    `libiomp5.so`. Raises OSError where PyTorch was built without.
    """
    user, place = ctypes.CDLL(torch._C.__file__), Place()
    if not hasattr(user, "omp_get_max_threads"):
        raise OSError("this PyTorch has no OpenMP")
    address = ctypes.cast(user.omp_get_max_threads, ctypes.c_void_p)
    if not ctypes.CDLL(None).dladdr(address, ctypes.byref(place)):
        raise OSError("PyTorch's OpenMP is in no file")
    ctypes.CDLL(place.file.decode(), mode=ctypes.RTLD_GLOBAL)
    return place.file.decode()


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
