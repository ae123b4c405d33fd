"""Where does the time of a step go?

    python examples/benchmarks/profile_step.py --contestants W4A8 --json outputs/profile_step.json

PyTorch's profiler over a few steps: the time of each operator itself, without those that it calls, as a share of the
step. What is left is Python, dispatch and operators too small to be listed.
"""

import ctypes
import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import harness
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import HfArgumentParser

from diffusers_pqcad.kernels import x86


@dataclass
class Settings(harness.FieldSettings):
    """Settings of one run."""

    batch_size: int = 2
    sample_size: int | None = None  # height and width of the input; default: the model's own
    num_steps: int = 5
    num_operators: int = 12  # listed for each contestant
    contestants: list[str] = dataclasses.field(default_factory=lambda: ["W4A8"])  # names or globs


class Recorded:
    """The compiled C functions of a kernel, each with a name of its own in a profile."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)

        def call(*args: Any) -> Any:
            with record_function(f"{x86.NAME}::{name}"):
                return function(*args)

        return call


def operators(step: Callable[[], Any], num_steps: int) -> tuple[float, list[dict[str, Any]]]:
    """Return the milliseconds of a step without the profiler, and each operator's share of a step under it."""
    for _ in range(2):
        step()
    started = time.perf_counter()
    for _ in range(num_steps):
        step()
    milliseconds = 1000 * (time.perf_counter() - started) / num_steps
    found = x86.library()
    recorded = mock.patch.object(x86, "library", return_value=found if isinstance(found, str) else Recorded(found))
    with recorded, profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        for _ in range(num_steps):
            step()
        total_us = 1e6 * (time.perf_counter() - started)
    events = [event for event in profiled.key_averages() if event.device_type == DeviceType.CPU]
    rows = [
        {"name": event.key, "share": event.self_cpu_time_total / total_us, "calls": event.count / num_steps}
        for event in events
    ]
    return milliseconds, sorted(rows, key=lambda row: -row["share"])


@torch.no_grad()
def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances of the run, and each contestant's operators."""
    field = harness.prepare(settings, settings.batch_size, settings.sample_size)
    machine = harness.circumstances()
    profiles = []
    for name, contestant in field.contestants.items():
        milliseconds, rows = operators(partial(contestant.step, field.inputs), settings.num_steps)
        profiles.append({"name": name, "ms": milliseconds, "operators": rows[: settings.num_operators]})
    return harness.result_of(settings, field, machine, contestants=profiles)


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as a Markdown table for each contestant, with its circumstances above them."""
    settings = result["settings"]
    text = (
        f"One step, {harness.model_line(result)}: mean of {settings['num_steps']} steps, shares under PyTorch's "
        f"profiler, milliseconds without it; seed {settings['seed']}."
    )
    lines = harness.caption(text, result)
    for contestant in result["contestants"]:
        lines += [f"| {contestant['name']}, {contestant['ms']:.0f} ms | share | calls |", "|---|---|---|"]
        rows = contestant["operators"]
        lines += [f"| {row['name']} | {row['share']:.1%} | {row['calls']:g} |" for row in rows]
        lines += [f"| everything else | {1 - sum(row['share'] for row in rows):.1%} | |", ""]
    return "\n".join(lines + harness.skipped_lines(result)).rstrip()


main = partial(harness.run, benchmark, markdown)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
