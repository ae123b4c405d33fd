"""How does a step's time grow with the batch and with the image?

    python examples/benchmarks/scaling.py --num_threads 1 --json outputs/scaling.json

Every contestant at batches of 1 to 32 and at 32 to 128 pixels squared, interleaved at each point; a straight line is
fitted to each series. A slope below fp32's is work saved; an intercept is what a call costs whatever it computes.
"""

import dataclasses
from dataclasses import dataclass
from functools import partial
from statistics import correlation, linear_regression
from typing import Any

import harness
import models
import torch
from contestants import STOCK
from transformers import HfArgumentParser

from diffusers_pqcad.evaluation.speed import interleaved_latency


@dataclass
class Settings(harness.FieldSettings):
    """Settings of one run."""

    batch_sizes: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    sample_sizes: list[int] = dataclasses.field(default_factory=lambda: [32, 64, 96, 128])  # at batch 1
    num_rounds: int = 3  # after one to warm up
    contestants: list[str] = dataclasses.field(default_factory=lambda: ["fp32, channels_last", "W4A8", "W8A7"])


@torch.no_grad()
def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances of the run, the median times of both series and their lines.

    Raises ValueError for a series of one point, which makes no line.
    """
    if min(len(set(settings.batch_sizes)), len(set(settings.sample_sizes))) < 2:
        raise ValueError("batch_sizes and sample_sizes: expected at least two different sizes each, for a line.")
    field = harness.prepare(settings, batch_size=1)
    for name in [name for name, contestant in field.contestants.items() if contestant.unet is None]:
        del field.contestants[name]
        field.skipped[name] = "traced at one shape"
    machine = harness.circumstances()
    generator = torch.Generator().manual_seed(settings.seed)

    def measure(batch_size: int, sample_size: int | None) -> dict[str, float]:
        inputs = models.draw_inputs(field.unet, batch_size, sample_size, generator)
        steps = {name: partial(contestant.step, inputs) for name, contestant in field.contestants.items()}
        latencies = interleaved_latency(steps, num_rounds=settings.num_rounds)
        return {name: latency.median_ms for name, latency in latencies.items()}

    points = {
        "batch": {batch: measure(batch, None) for batch in settings.batch_sizes},
        "pixels": {size * size: measure(1, size) for size in settings.sample_sizes},
    }
    series = {
        axis: {name: line({amount: times[name] for amount, times in measured.items()}) for name in field.contestants}
        for axis, measured in points.items()
    }
    return harness.result_of(settings, field, machine, series=series)


def line(times_ms: dict[int, float]) -> dict[str, Any]:
    """Return times by amount and their least-squares line: slope (ms for each unit), intercept (ms) and R squared."""
    amounts, times = list(times_ms), list(times_ms.values())
    slope, intercept = linear_regression(amounts, times)
    return {
        "median_ms": {str(amount): time for amount, time in times_ms.items()},
        "slope_ms": slope,
        "intercept_ms": intercept,
        "r_squared": correlation(amounts, times) ** 2,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as one Markdown table for each axis, with its circumstances above them."""
    settings = result["settings"]
    text = (
        f"Milliseconds a step, {harness.model_line(result)}: medians of {settings['num_rounds']} interleaved rounds "
        f"after one to warm up, seed {settings['seed']}. Slope: for each further image of the batch, or each 1024 "
        "pixels at batch 1."
    )
    lines = harness.caption(text, result)
    for axis, unit in (("batch", 1), ("pixels", 1024)):
        rows = result["series"][axis]
        amounts = list(rows[STOCK]["median_ms"])
        heads = amounts if axis == "batch" else [f"{round(int(amount) ** 0.5)}²" for amount in amounts]
        lines += [
            f"| {axis} | {' | '.join(heads)} | slope | of stock | intercept | R² |",
            "|---" * (len(amounts) + 5) + "|",
        ]
        for name, row in rows.items():
            times = " | ".join(f"{row['median_ms'][amount]:.0f}" for amount in amounts)
            lines.append(
                f"| {name} | {times} | {row['slope_ms'] * unit:.1f} | {row['slope_ms'] / rows[STOCK]['slope_ms']:.2f} "
                f"| {row['intercept_ms']:.1f} | {row['r_squared']:.4f} |"
            )
        lines.append("")
    return "\n".join(lines + harness.skipped_lines(result)).rstrip()


main = partial(harness.run, benchmark, markdown)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
