"""How much faster is one int8 UNet step than stock fp32, and than other runtimes?

    python examples/benchmarks/unet_step.py --num_threads 1 --json outputs/unet_step.json
    python examples/benchmarks/unet_step.py --contestants "*"      # beside the peers of `pip install -e ".[bench]"`
    python examples/benchmarks/unet_step.py --batch_size 1         # a step without guidance
    python examples/benchmarks/unet_step.py --model sd15 --sample_size 32 --contestants "W*" "OpenVINO*"

All contestants take turns in one process (A B C A B C), stock fp32 first; name those that fit the memory together. One
that is not installed, or fails, is skipped by name. The error column guards against a contestant that is fast because
it is wrong; weights are random, so it is no measure of quality. First s: from the float model to a first output, with
all that is converted, calibrated and compiled. Only runs on idle, pinned cores count (`taskset -c 0`): load slows fp32
more than int8. Steps that waited for a core are thrown away and counted (`turns.py`).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import harness
import torch
import turns
from contestants import STOCK
from torch import Tensor
from transformers import HfArgumentParser

from diffusers_pqcad.evaluation.speed import tensor_bytes
from diffusers_pqcad.layers.find import kernel_cache_bytes


@dataclass
class Settings(turns.TurnSettings, harness.FieldSettings):
    """Settings of one run; the defaults are the model and the batch of the README's table."""

    batch_size: int = 2
    sample_size: int | None = None  # height and width of the input; default: the model's own
    num_rounds: int = 9
    warmup_rounds: int = 2


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Return ||output - reference|| / ||reference||; raises ValueError for an output that is not finite."""
    if not output.isfinite().all():
        raise ValueError("a contestant's output holds a NaN or an infinity: its time means nothing.")
    return ((output.float() - reference).norm() / reference.norm()).item()


@torch.no_grad()  # not inference mode: its tensors cannot be exported
def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances of the run and one row per contestant."""
    field = harness.prepare(settings, settings.batch_size, settings.sample_size)
    steps = {name: partial(contestant.step, field.inputs) for name, contestant in field.contestants.items()}
    reference = steps[STOCK]()
    # The outputs are checked before the clock starts; this also builds the kernels' copies of the weights.
    errors = {name: relative_error(step(), reference) for name, step in steps.items()}
    machine = harness.circumstances()
    samples = {name: partial(turns.sample, step) for name, step in steps.items()}
    taken = harness.in_turns(samples, settings, field.skipped)
    latencies = {name: kept.latency() for name, kept in taken.items()}
    rows = [
        {
            "name": name,
            **latencies[name]._asdict(),
            **harness.kept_entries(taken[name]),
            "ratio": latencies[STOCK].median_ms / latencies[name].median_ms,
            "relative_error": errors[name],
            "first_seconds": field.first_seconds[name],
            "weight_bytes": None if contestant.unet is None else tensor_bytes(contestant.unet),
            "kernel_cache_bytes": None if contestant.unet is None else kernel_cache_bytes(contestant.unet),
        }
        for name, contestant in field.contestants.items()
        if name in taken
    ]
    size = list(field.inputs[0].shape[2:])
    return harness.result_of(settings, field, machine, sample_size=size, contestants=rows)


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as a Markdown table with its circumstances above it."""
    settings, (height, width) = result["settings"], result["sample_size"]
    text = (
        f"One step, {harness.model_line(result)}, {height}x{width}: medians of {settings['num_rounds']} interleaved "
        f"rounds after {settings['warmup_rounds']} to warm up, seed {settings['seed']}."
    )
    lines = [
        *harness.caption(text, result),
        "| contestant | ms | min to max | times faster | relative error | first s | weights MB | int8 copies MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows, below = harness.with_footnotes(result["contestants"])
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['median_ms']:.1f} | {row['min_ms']:.1f} to {row['max_ms']:.1f} "
            f"| {row['ratio']:.2f} | {row['relative_error']:.1e} | {row['first_seconds']:.1f} "
            f"| {megabytes(row['weight_bytes'])} | {megabytes(row['kernel_cache_bytes'])} |"
        )
    lines += harness.footnote_lines(below) + turns.waited_line(result["contestants"], settings)
    return "\n".join(lines + harness.skipped_lines(result))


def megabytes(num_bytes: int | None) -> str:
    """Return a table's cell; the memory of other runtimes is not ours to know."""
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.1f}"


main = partial(harness.run, benchmark, markdown)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
