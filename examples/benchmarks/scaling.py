"""How does a step's time grow with the batch and with the image?

    python examples/benchmarks/scaling.py --num_threads 1 --json outputs/scaling.json

Every contestant at batches of 1 to 32 and at 32 to 128 pixels squared, interleaved at each point; a straight line is
fitted to each series. A slope below fp32's is work saved; an intercept is what a call costs whatever it computes.
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from statistics import linear_regression
from typing import Any

import models
import torch
from contestants import STOCK
from transformers import HfArgumentParser
from unet_step import NUM_CALIBRATION_INPUTS, build_contestants, chosen, circumstances, machine_line, report

from diffusers_pqcad.evaluation.speed import interleaved_latency


@dataclass
class Settings:
    """Settings of one run."""

    model: str = "ddpm-cifar10"
    batch_sizes: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16, 32])
    sample_sizes: list[int] = field(default_factory=lambda: [32, 64, 96, 128])  # at batch 1
    num_threads: int = 1
    num_rounds: int = 3
    warmup_rounds: int = 1
    seed: int = 0
    contestants: list[str] = field(default_factory=lambda: ["fp32, channels_last", "W4A8", "W8A7"])
    json: str | None = None  # file for everything that was measured


@torch.no_grad()
def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances of the run, the median times of both series and their lines."""
    torch.set_num_threads(settings.num_threads)
    unet = models.build(settings.model, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    calibration = [models.draw_inputs(unet, 1, None, generator) for _ in range(NUM_CALIBRATION_INPUTS)]
    contestants, skipped, _ = build_contestants(chosen(settings.contestants), unet, calibration)
    machine = circumstances()

    def measure(batch_size: int, sample_size: int) -> dict[str, float]:
        inputs = models.draw_inputs(unet, batch_size, sample_size, generator)
        latencies = interleaved_latency(
            {name: partial(contestant.step, inputs) for name, contestant in contestants.items()},
            num_rounds=settings.num_rounds,
            warmup_rounds=settings.warmup_rounds,
        )
        return {name: latency.median_ms for name, latency in latencies.items()}

    own_size = unet.config.sample_size
    series = {
        "batch": [(batch, measure(batch, own_size)) for batch in settings.batch_sizes],
        "pixels": [(size * size, measure(1, size)) for size in settings.sample_sizes],
    }
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key != "json"},
        "environment": machine,
        "num_parameters": unet.num_parameters(),
        "series": {
            axis: {
                name: {
                    "median_ms": {str(amount): times[name] for amount, times in points},
                    **line([amount for amount, _ in points], [times[name] for _, times in points]),
                }
                for name in contestants
            }
            for axis, points in series.items()
        },
        "skipped": skipped,
    }


def line(amounts: list[int], times_ms: list[float]) -> dict[str, float]:
    """Return the least-squares line through the points: slope (ms for each unit), intercept (ms) and R squared."""
    slope, intercept = linear_regression(amounts, times_ms)
    mean = sum(times_ms) / len(times_ms)
    left = sum((time - slope * amount - intercept) ** 2 for amount, time in zip(amounts, times_ms, strict=True))
    total = sum((time - mean) ** 2 for time in times_ms)
    return {"slope_ms": slope, "intercept_ms": intercept, "r_squared": 1 - left / total if total else 1.0}


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as one Markdown table for each axis, with its circumstances above them."""
    settings = result["settings"]
    lines = [
        f"Milliseconds a step, UNet {settings['model']}, {result['num_parameters'] / 1e6:.1f} M parameters: medians "
        f"of {settings['num_rounds']} interleaved rounds after {settings['warmup_rounds']} to warm up, seed "
        f"{settings['seed']}. Slope: for each further image of the batch, or each 1024 pixels at batch 1.",
        "",
        machine_line(result["environment"]),
    ]
    for axis, unit in (("batch", 1), ("pixels", 1024)):
        rows = result["series"][axis]
        amounts = list(rows[STOCK]["median_ms"])
        heads = amounts if axis == "batch" else [f"{round(int(amount) ** 0.5)}²" for amount in amounts]
        lines += [
            "",
            f"| {axis} | {' | '.join(heads)} | slope | of stock | intercept | R² |",
            "|---" * (len(amounts) + 5) + "|",
        ]
        for name, row in rows.items():
            times = " | ".join(f"{row['median_ms'][amount]:.0f}" for amount in amounts)
            lines.append(
                f"| {name} | {times} | {row['slope_ms'] * unit:.1f} | {row['slope_ms'] / rows[STOCK]['slope_ms']:.2f} "
                f"| {row['intercept_ms']:.1f} | {row['r_squared']:.4f} |"
            )
    return "\n".join(lines)


def main(settings: Settings) -> dict[str, Any]:
    """Run the benchmark, print its tables and write its JSON file."""
    result = benchmark(settings)
    report(result, markdown(result), settings.json)
    return result


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
