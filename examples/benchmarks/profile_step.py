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

import harness
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import HfArgumentParser

from diffusers_pqcad.kernels import x86
from diffusers_pqcad.kernels.x86.library import library


@dataclass
class Settings(harness.FieldSettings):
    """Settings of one run."""

    batch_size: int = 2
    sample_size: int | None = None  # height and width of the input; default: the model's own
    num_steps: int = 5
    num_operators: int = 12  # listed for each contestant
    contestants: list[str] = dataclasses.field(default_factory=lambda: ["W4A8"])  # names or globs


PHASES = ("rounding", "products", "norms")  # in the order of the C file


def phase_seconds() -> list[float]:
    """Return the seconds that the C kernel has spent in each of its phases, in this thread; nothing without it."""
    found = library()
    if isinstance(found, str):
        return []
    seconds = (ctypes.c_double * len(PHASES))()
    found.read_seconds(seconds)
    return list(seconds)


def operators(step: Callable[[], Any], num_steps: int) -> tuple[float, list[dict[str, Any]]]:
    """Return the milliseconds of a step without the profiler, and each operator's share of a step under it."""
    for _ in range(2):
        step()
    started = time.perf_counter()
    for _ in range(num_steps):
        step()
    milliseconds = 1000 * (time.perf_counter() - started) / num_steps
    before = phase_seconds()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        started = time.perf_counter()
        for _ in range(num_steps):
            step()
        total_us = 1e6 * (time.perf_counter() - started)
    spent = [1e6 * (after - start) for after, start in zip(phase_seconds(), before, strict=True)]
    rows = [
        {"name": event.key, "share": event.self_cpu_time_total / total_us, "calls": event.count / num_steps}
        for event in profiled.key_averages()
        if event.device_type == DeviceType.CPU
    ]
    # PyTorch knows nothing of C functions.
    rows += [
        {"name": f"{x86.NAME}: {name}", "share": microseconds / total_us, "calls": None}
        for name, microseconds in zip(PHASES, spent, strict=False)
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
        lines += [
            f"| {row['name']} | {row['share']:.1%} | {'' if row['calls'] is None else format(row['calls'], 'g')} |"
            for row in rows
        ]
        lines += [f"| everything else | {1 - sum(row['share'] for row in rows):.1%} | |", ""]
    return "\n".join(lines + harness.skipped_lines(result)).rstrip()


main = partial(harness.run, benchmark, markdown)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
