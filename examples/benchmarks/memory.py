"""What a process holds in memory now: its own pages, and mapped files, which the system can drop and read again."""

import re
import resource
import sys
from pathlib import Path
from typing import NamedTuple


class Resident(NamedTuple):
    """Bytes in memory: of this process alone, and of mapped files (weights that were not copied, and libraries)."""

    own_bytes: int
    mapped_bytes: int


def resident(pid: int | str = "self") -> Resident | None:
    """Return what process `pid` holds, None where there is no `smaps_rollup` (not Linux), or no such process."""
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:
        return None
    kilobytes = {name: int(value) for name, value in re.findall(r"(\w+): +(\d+) kB", text)}
    if "Pss_Anon" not in kilobytes:  # Linux before 5.4
        return None
    own = kilobytes["Pss_Anon"]
    return Resident(1024 * own, 1024 * (kilobytes["Rss"] - own))


def text_of(held: Resident | None) -> str:
    """Return megabytes, own + mapped, for a table; a dash for what could not be asked."""
    return "-" if held is None else f"{held[0] / 1e6:.0f} + {held[1] / 1e6:.0f}"


def larger(first: Resident | None, second: Resident | None) -> Resident | None:
    """Return the one with more pages of its own; None is less than any."""
    known = [each for each in (first, second) if each is not None]
    return max(known, default=None)


def peak_bytes(pid: int | str = "self") -> int:
    """Return the most that process `pid` has held so far, own and mapped; 0 for one that has ended."""
    if Path("/proc/self/status").exists():  # getrusage would count what the parent held when it forked
        try:
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        except OSError:
            return 0
        return int(found[1]) * 1024 if found else 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
