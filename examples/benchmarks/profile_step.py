"""Where does the time of a step go?

    python examples/benchmarks/profile_step.py --contestants W4A8 --json outputs/profile_step.json

PyTorch's profiler over a few steps: the time of each operator itself, without those that it calls, as a share of the
step. What is left is Python, dispatch and operators too small to be listed.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import models
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import HfArgumentParser
from unet_step import NUM_CALIBRATION_INPUTS, build_contestants, chosen, circumstances, machine_line, report


@dataclass
class Settings:
    """Settings of one run."""

    model: str = "ddpm-cifar10"
    batch_size: int = 2
    sample_size: int | None = None  # height and width of the input; default: the model's own
    num_threads: int = 1
    num_steps: int = 5
    num_operators: int = 12  # listed for each contestant
    seed: int = 0
    contestants: list[str] = field(default_factory=lambda: ["W4A8"])  # names or globs
    json: str | None = None  # file for everything that was measured


def operators(step: Callable[[], Any], num_steps: int) -> tuple[float, list[dict[str, Any]]]:
    """Return the milliseconds of a step without the profiler, and each operator's share of a step under it."""
    for _ in range(2):
        step()
    started = time.perf_counter()
    for _ in range(num_steps):
        step()
    milliseconds = 1000 * (time.perf_counter() - started) / num_steps
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
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
    torch.set_num_threads(settings.num_threads)
    unet = models.build(settings.model, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    inputs, *calibration = (
        models.draw_inputs(unet, settings.batch_size, settings.sample_size, generator)
        for _ in range(1 + NUM_CALIBRATION_INPUTS)
    )
    contestants, skipped, _ = build_contestants(chosen(settings.contestants), unet, calibration)
    machine = circumstances()
    profiles = []
    for name, contestant in contestants.items():
        milliseconds, rows = operators(partial(contestant.step, inputs), settings.num_steps)
        profiles.append({"name": name, "ms": milliseconds, "operators": rows[: settings.num_operators]})
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key != "json"},
        "environment": machine,
        "num_parameters": unet.num_parameters(),
        "contestants": profiles,
        "skipped": skipped,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as a Markdown table for each contestant, with its circumstances above them."""
    settings = result["settings"]
    lines = [
        f"One step of the UNet {settings['model']}, {result['num_parameters'] / 1e6:.1f} M parameters, batch "
        f"{settings['batch_size']}, under PyTorch's profiler: mean of {settings['num_steps']} steps, seed "
        f"{settings['seed']}.",
        "",
        machine_line(result["environment"]),
    ]
    for contestant in result["contestants"]:
        lines += ["", f"| {contestant['name']}, {contestant['ms']:.0f} ms | share | calls |", "|---|---|---|"]
        rows = contestant["operators"]
        lines += [f"| {row['name']} | {row['share']:.1%} | {row['calls']:g} |" for row in rows]
        lines.append(f"| everything else | {1 - sum(row['share'] for row in rows):.1%} | |")
    return "\n".join(lines)


def main(settings: Settings) -> dict[str, Any]:
    """Profile, print the tables and write the JSON file."""
    result = benchmark(settings)
    report(result, markdown(result), settings.json)
    return result


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
