"""Whether kernels may keep int8 copies of the weights: never saved; chosen by the user, else by the computer's memory.

The copies are what a kernel multiplies by: a byte a weight and more, beside the packed weights of 2 to 8 bits. Without
them ("low"), each call unpacks the packed weights in pieces that fit the cache. The results are the same, bit for bit.
"""

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, get_args

from diffusers_pqcad.kernels.operation import Operation

Memory = Literal["low", "normal"]
ENVIRONMENT_VARIABLE = "PQCAD_MEMORY"
COPY_BYTES = 4 / 3  # of a weight, as convolutions three pixels wide have them
FREE_SHARE = 0.5  # of the memory that is available now may be taken by copies: activations and other models need some
MEMINFO = Path("/proc/meminfo")
CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")

logger = logging.getLogger(__name__)
_warned: set[int] = set()  # bytes of copies that were said to be too many


def checked(memory: str, setting: str) -> Memory:
    """Return `memory`; raise ValueError, naming the `setting` that says so, for anything but "low" and "normal"."""
    if memory not in get_args(Memory):
        raise ValueError(
            f"{setting}: expected one of {get_args(Memory)}, got {memory!r}. 'low' keeps no int8 copies of the "
            "weights, 'normal' does, whatever memory there is; leave it out to let the memory decide."
        )
    return memory  # type: ignore[return-value]


def wanted() -> Memory | None:
    """Return what the environment variable PQCAD_MEMORY asks for, or `None`; raises ValueError for other words."""
    found = os.environ.get(ENVIRONMENT_VARIABLE)
    return checked(found, ENVIRONMENT_VARIABLE) if found else None


def available_bytes() -> int | None:
    """Return the bytes that this process can still take without swapping, by Linux and by its control group.

    `None` where neither can be asked.
    """
    found = [free for free in (free_bytes(), *left_in_cgroups()) if free is not None]
    return min(found, default=None)


def free_bytes() -> int | None:
    """Return MemAvailable: what is free, and what caches would give back."""
    try:
        lines = MEMINFO.read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)


def left_in_cgroups() -> list[int]:
    """Return what is left below each limit of this process's control groups, version 1 or 2: containers have them."""
    return [left for folder in cgroup_folders() if (left := left_in(folder)) is not None]


def cgroup_folders() -> list[Path]:
    """Return the folders that may hold this process's memory limits: its own groups and those around them."""
    try:
        lines = OWN_CGROUP.read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "" or "memory" in controllers.split(","):
            root = CGROUPS / "memory" if controllers else CGROUPS
            own = root / path.lstrip("/")
            found += [folder for folder in (own, *own.parents) if folder == root or root in folder.parents]
    return found


def left_in(folder: Path) -> int | None:
    """Return the bytes left below the limit of a control group; `None` where there is no limit.

    What files have in its cache can be given back, and does not count as taken.
    """
    for limit, used, cached in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most = int((folder / limit).read_text())  # "max", where there is none, is no number
            taken = int((folder / used).read_text())
            stat = (folder / "memory.stat").read_text().splitlines()
        except (OSError, ValueError):
            continue
        caches = next((int(line.split()[1]) for line in stat if line.split()[:1] == [cached]), 0)
        return max(0, most - taken + caches)
    return None


def is_short(operations: Iterable[Operation]) -> bool:
    """Return whether int8 copies of the weights of `operations`, a model's, would take too much of what is left.

    Said in the log, once for each model's size.
    """
    copies, left = int(COPY_BYTES * sum(operation.shape.numel() for operation in operations)), available_bytes()
    if left is None or copies <= FREE_SHARE * left:
        return False
    if copies not in _warned:
        _warned.add(copies)
        logger.warning(
            "Memory is short: int8 copies of the weights would take up to %d MB of %d MB that are left. They are not "
            "kept; layers unpack their weights in each call, with the same results, in somewhat more time. "
            "%s=normal keeps them.",
            copies // 10**6,
            left // 10**6,
            ENVIRONMENT_VARIABLE,
        )
    return True
