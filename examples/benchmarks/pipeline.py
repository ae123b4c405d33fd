"""How much faster does a pipeline make an image, with quantized weights and half the steps?

    python examples/benchmarks/pipeline.py --num_threads 1 --json outputs/pipeline.json

Stock fp32 at N steps against the same and ours at N / 2, from one call of `DDIMPipeline` to its images, interleaved.
Weights are random or those of the bundled teacher: what half the steps cost in quality is for `examples/distill.py`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import models
import torch
from contestants import QUICK, STOCK
from diffusers import DDIMPipeline, DDIMScheduler
from transformers import HfArgumentParser
from unet_step import NUM_CALIBRATION_INPUTS, build_contestants, chosen, circumstances, machine_line, report

from diffusers_pqcad.evaluation.speed import interleaved_latency


@dataclass
class Settings:
    """Settings of one run."""

    model: str = "ddpm-cifar10"  # an unconditional one
    batch_size: int = 2
    num_inference_steps: int = 20  # of stock fp32; the others take half
    num_threads: int = 1
    num_rounds: int = 3
    warmup_rounds: int = 1
    seed: int = 0
    contestants: list[str] = field(default_factory=lambda: list(QUICK))  # names or globs; PyTorch models only
    json: str | None = None  # file for everything that was measured


def timed(unet: Any, settings: Settings, num_inference_steps: int) -> Callable[[], None]:
    """Return a function that makes a batch of images by a pipeline around `unet`."""
    pipeline = DDIMPipeline(unet=unet, scheduler=DDIMScheduler(timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)

    def run() -> None:
        generator = torch.Generator().manual_seed(settings.seed)
        pipeline(settings.batch_size, generator, num_inference_steps=num_inference_steps, output_type="np")

    return run


def row_name(name: str, num_inference_steps: int) -> str:
    """Return a row's name."""
    return f"{name}, {num_inference_steps} steps"


@torch.no_grad()
def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances of the run and one row per contestant; raises ValueError for an odd number of steps."""
    steps = settings.num_inference_steps
    if steps < 2 or steps % 2:
        raise ValueError(f"num_inference_steps: expected an even number, got {steps}; a student takes half.")
    torch.set_num_threads(settings.num_threads)
    unet = models.build(settings.model, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    calibration = [
        models.draw_inputs(unet, settings.batch_size, None, generator) for _ in range(NUM_CALIBRATION_INPUTS)
    ]
    contestants, skipped, _ = build_contestants(chosen(settings.contestants), unet, calibration)
    candidates = {row_name(STOCK, steps): timed(unet, settings, steps)}
    for name, contestant in contestants.items():
        if contestant.unet is None:
            skipped[name] = "not a model that a pipeline of diffusers can hold"
        else:
            candidates[row_name(name, steps // 2)] = timed(contestant.unet, settings, steps // 2)
    machine = circumstances()
    latencies = interleaved_latency(candidates, num_rounds=settings.num_rounds, warmup_rounds=settings.warmup_rounds)
    stock_ms = latencies[row_name(STOCK, steps)].median_ms
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key != "json"},
        "environment": machine,
        "num_parameters": unet.num_parameters(),
        "contestants": [
            {"name": name, **latency.scaled(1 / settings.batch_size)._asdict(), "ratio": stock_ms / latency.median_ms}
            for name, latency in latencies.items()
        ],
        "skipped": skipped,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as a Markdown table with its circumstances above it."""
    settings = result["settings"]
    lines = [
        f"From noise to an image by `DDIMPipeline`, UNet {settings['model']}, {result['num_parameters'] / 1e6:.1f} M "
        f"parameters, batch {settings['batch_size']}: medians of {settings['num_rounds']} interleaved rounds after "
        f"{settings['warmup_rounds']} to warm up, seed {settings['seed']}.",
        "",
        machine_line(result["environment"]),
        "",
        "| contestant | ms an image | min to max | times faster |",
        "|---|---|---|---|",
    ]
    for row in result["contestants"]:
        lines.append(
            f"| {row['name']} | {row['median_ms']:.1f} | {row['min_ms']:.1f} to {row['max_ms']:.1f} "
            f"| {row['ratio']:.2f} |"
        )
    lines += [f"\nSkipped: {name} ({reason})." for name, reason in result["skipped"].items()]
    return "\n".join(lines)


def main(settings: Settings) -> dict[str, Any]:
    """Run the benchmark, print its table and write its JSON file."""
    result = benchmark(settings)
    report(result, markdown(result), settings.json)
    return result


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
