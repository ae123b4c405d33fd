"""What this computer's CPU can do, as Linux says it."""

from functools import cache
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")


@cache
def flags() -> frozenset[str]:
    """Return the flags of the CPU, by the names of /proc/cpuinfo; none where there is no such file."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), ()))


def has_amx() -> bool:
    """Return whether the CPU multiplies tiles of 8-bit integers (AMX), as oneDNN's operators do there."""
    return {"amx_tile", "amx_int8"} <= flags()
