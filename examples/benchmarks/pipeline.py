"""How much faster does a pipeline make an image, with quantized weights and half the steps?

    python examples/benchmarks/pipeline.py --num_threads 1 --json outputs/pipeline.json

Stock fp32 at N steps against the same and ours at N / 2, from one call of `DDIMPipeline` to its images, interleaved.
Weights are random or those of the bundled teacher: what half the steps cost in quality is for `examples/distill.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import torch
import turns
from contestants import STOCK
from diffusers import DDIMPipeline, DDIMScheduler
from transformers import HfArgumentParser


@dataclass
class Settings(turns.TurnSettings, harness.FieldSettings):
    """Settings of one run; the model is an unconditional one."""

    batch_size: int = 2
    num_inference_steps: int = 20  # of stock fp32; the others take half


def timed(unet: Any, settings: Settings, num_inference_steps: int) -> Callable[[], Any]:
    """Return a function that makes a batch of images by a pipeline around `unet`."""
    pipeline = DDIMPipeline(unet=unet, scheduler=DDIMScheduler(timestep_spacing="trailing"))
    pipeline.set_progress_bar_config(disable=True)

    def run() -> Any:
        generator = torch.Generator().manual_seed(settings.seed)
        return pipeline(settings.batch_size, generator, num_inference_steps=num_inference_steps, output_type="np")

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
    field = harness.prepare(settings, settings.batch_size)
    candidates = {row_name(STOCK, steps): timed(field.unet, settings, steps)}
    for name, contestant in field.contestants.items():
        if contestant.unet is None:
            field.skipped[name] = "not a model that a pipeline of diffusers can hold"
            continue
        candidate = timed(contestant.unet, settings, steps // 2)
        if harness.try_out(name, candidate, field.skipped) is not None:
            candidates[row_name(name, steps // 2)] = candidate
    machine = harness.circumstances()
    samples = {name: partial(turns.sample, candidate) for name, candidate in candidates.items()}
    taken = harness.in_turns(samples, settings, field.skipped)
    stock_ms = taken[row_name(STOCK, steps)].latency().median_ms
    rows = [
        {
            "name": name,
            **kept.latency().scaled(1 / settings.batch_size)._asdict(),
            **harness.kept_entries(kept),
            "ratio": stock_ms / kept.latency().median_ms,
        }
        for name, kept in taken.items()
    ]
    return harness.result_of(settings, field, machine, contestants=rows)


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as a Markdown table with its circumstances above it."""
    settings = result["settings"]
    text = (
        f"From noise to images by `DDIMPipeline`, {harness.model_line(result)}: medians of {settings['num_rounds']} "
        f"interleaved rounds after one to warm up, seed {settings['seed']}."
    )
    lines = [
        *harness.caption(text, result),
        "| contestant | ms an image | min to max | times faster |",
        "|---|---|---|---|",
    ]
    for row in result["contestants"]:
        lines.append(
            f"| {row['name']} | {row['median_ms']:.1f} | {row['min_ms']:.1f} to {row['max_ms']:.1f} "
            f"| {row['ratio']:.2f} |"
        )
    lines += turns.waited_line(result["contestants"], settings)
    return "\n".join(lines + harness.skipped_lines(result))


main = partial(harness.run, benchmark, markdown)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
