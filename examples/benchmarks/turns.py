"""Contestants in turns (A B C A B C), without the samples that had to wait for a core.

Linux counts for each thread how long it was ready to run and did not: the second number of
`/proc/PID/task/TID/schedstat`, in nanoseconds. A sample of which that is more than `max_waiting` says how busy the
computer was, so it is thrown away, counted, and taken again in a later round. Where there are no such numbers, as on
macOS, all samples count, and the table says so.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from diffusers_pqcad.evaluation.speed import Latency


@dataclass
class TurnSettings:
    """Settings of a benchmark that takes samples in turns."""

    num_rounds: int = 3
    warmup_rounds: int = 1
    max_waiting: float = 0.02  # share of a sample's time that its threads may have waited for a core, all together
    extra_rounds: int = 9  # at most, in place of samples that waited for longer


class Sample(NamedTuple):
    """Seconds that something took, those that its threads waited for a core (None: unknown), and what came out."""

    seconds: float
    waited_seconds: float | None
    result: Any = None


class Kept(NamedTuple):
    """The samples of a contestant that count, in order, and how many were thrown away."""

    samples: list[Sample]
    num_waited: int

    def latency(self) -> Latency:
        """Return the samples' times in milliseconds."""
        values = tuple(1000 * sample.seconds for sample in self.samples)
        return Latency(median(values), min(values), max(values), values)


def waited_ns(pid: int | str = "self") -> dict[str, int] | None:
    """Return for each thread of a process how long it has waited for a core so far; None where that is not known."""
    waited = {}
    for task in Path(f"/proc/{pid}/task").glob("*"):
        try:
            waited[task.name] = int((task / "schedstat").read_text().split()[1])
        except (OSError, IndexError):  # a thread that has ended, or a system that does not count
            continue
    return waited or None


def waited_seconds(before: dict[str, int] | None, after: dict[str, int] | None) -> float | None:
    """Return how long threads waited between two answers of `waited_ns`, those that began in between included."""
    if before is None or after is None:
        return None
    return sum(value - before.get(thread, 0) for thread, value in after.items()) / 1e9


def sample(run: Callable[[], Any]) -> Sample:
    """Return how long `run` takes, how long it waits, and what it returns."""
    before = waited_ns()
    started = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - started
    return Sample(seconds, waited_seconds(before, waited_ns()), result)


def counts(sample: Sample, max_waiting: float) -> bool:
    """Return whether `sample` waited for no more than `max_waiting` of its time."""
    return sample.waited_seconds is None or sample.waited_seconds <= max_waiting * sample.seconds


def take_turns(candidates: Mapping[str, Callable[[], Sample]], settings: TurnSettings) -> dict[str, Kept]:
    """Return the samples of each candidate, taken in turns until each has `num_rounds` that count.

    The first `warmup_rounds` rounds are run and not counted. After `extra_rounds` more than `num_rounds` it ends, and
    a candidate may have fewer samples, or none. Raises ValueError where there is nothing to measure.
    """
    if not candidates:
        raise ValueError("candidates: expected at least one name with a function to call, got none.")
    if settings.num_rounds < 1 or settings.warmup_rounds < 0 or settings.extra_rounds < 0:
        raise ValueError(
            f"num_rounds={settings.num_rounds}, warmup_rounds={settings.warmup_rounds}, "
            f"extra_rounds={settings.extra_rounds}: expected at least 1, 0 and 0."
        )
    for _ in range(settings.warmup_rounds):
        for take in candidates.values():
            take()
    samples: dict[str, list[Sample]] = {name: [] for name in candidates}
    num_waited = dict.fromkeys(candidates, 0)
    for _ in range(settings.num_rounds + settings.extra_rounds):
        waiting = [name for name in candidates if len(samples[name]) < settings.num_rounds]
        for name in waiting:
            taken = candidates[name]()
            if counts(taken, settings.max_waiting):
                samples[name].append(taken)
            else:
                num_waited[name] += 1
        if not waiting:
            break
    return {name: Kept(samples[name], num_waited[name]) for name in candidates}


def waited_line(rows: list[dict[str, Any]], settings: dict[str, Any]) -> list[str]:
    """Return what a table says below itself of samples that waited; nothing for a run that did not count them."""
    counted = [row["num_waited"] for row in rows if "num_waited" in row]
    if not counted:
        return []
    if not all(row["knows_waiting"] for row in rows):
        return ["\nHow long threads waited for a core is not known here, so that no sample was thrown away."]
    return [
        f"\nThrown away, as their threads waited for a core for more than {settings['max_waiting']:.0%} of the time: "
        f"{sum(counted)} samples, at most {max(counted)} of a contestant."
    ]
