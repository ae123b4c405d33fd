"""How much faster is one int8 UNet step than stock fp32, and than other runtimes?

    python examples/benchmarks/unet_step.py --num_threads 1 --json outputs/unet_step.json
    python examples/benchmarks/unet_step.py --contestants "*"      # beside the peers of `pip install -e ".[bench]"`
    python examples/benchmarks/unet_step.py --model sd15 --sample_size 32 --contestants "W*" "OpenVINO*"

All contestants take turns in one process (A B C A B C), stock fp32 first; name those that fit the memory together. One
that is not installed, or fails, is skipped by name. The error column guards against a contestant that is fast because
it is wrong; weights are random, so it is no measure of quality. First s: from the float model to a first output, with
all that is converted, calibrated and compiled. Only runs on idle, pinned cores count (`taskset -c 0`): load slows fp32
more than int8.
"""

import json
import subprocess
import time
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import contestants as field_of
import models
import torch
from contestants import QUICK, STOCK, Contestant
from torch import Tensor
from transformers import HfArgumentParser

from diffusers_pqcad.evaluation.speed import environment, interleaved_latency, tensor_bytes
from diffusers_pqcad.kernels import onednn
from diffusers_pqcad.layers import kernel_cache_bytes

NUM_CALIBRATION_INPUTS = 4


@dataclass
class Settings:
    """Settings of one run; the defaults are the model and the batch of the README's table."""

    model: str = "ddpm-cifar10"
    batch_size: int = 2
    sample_size: int | None = None  # height and width of the input; default: the model's own
    num_threads: int = 1
    num_rounds: int = 9
    warmup_rounds: int = 2
    seed: int = 0
    contestants: list[str] = field(default_factory=lambda: list(QUICK))  # names or globs
    json: str | None = None  # file for everything that was measured


def chosen(patterns: list[str]) -> list[str]:
    """Return the names of the contestants that match `patterns`, and stock fp32; raises ValueError where none does."""
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(n, pattern) for n in field_of.CONTESTANTS)]
    if unknown:
        raise ValueError(f"contestants: {unknown} match none of {list(field_of.CONTESTANTS)}.")
    return [
        name
        for name in field_of.CONTESTANTS
        if name == STOCK or any(fnmatchcase(name, pattern) for pattern in patterns)
    ]


def build_contestants(
    names: list[str], unet: Any, calibration: list[models.Inputs]
) -> tuple[dict[str, Contestant], dict[str, str], dict[str, float]]:
    """Return those of `names` that are installed and run, why the others do not, and seconds to a first output."""
    contestants: dict[str, Contestant] = {}
    seconds: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name in names:
        print(f"building: {name}", flush=True)
        started = time.perf_counter()
        try:
            contestant = field_of.CONTESTANTS[name](unet, calibration)
            contestant.step(calibration[0])
        except Exception as error:  # a peer may fail in any way; the table says which did
            if name == STOCK:
                raise
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
            print(f"skipped: {name}: {skipped[name]}", flush=True)
        else:
            contestants[name], seconds[name] = contestant, time.perf_counter() - started
    return contestants, skipped, seconds


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Return ||output - reference|| / ||reference||; raises ValueError for an output that is not finite."""
    if not output.isfinite().all():
        raise ValueError("a contestant's output holds a NaN or an infinity: its time means nothing.")
    return ((output.float() - reference).norm() / reference.norm()).item()


def commit() -> str | None:
    """Return the commit of the source tree, with "-dirty" after local changes, or `None` outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() or None


def circumstances() -> dict[str, Any]:
    """Return what a time depends on beside the contestant, before it is measured."""
    return environment() | {"vnni": onednn.available() and not onednn.saturates(), "commit": commit()}


@torch.no_grad()  # not inference mode: its tensors cannot be exported
def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances of the run and one row per contestant."""
    torch.set_num_threads(settings.num_threads)
    names = chosen(settings.contestants)
    unet = models.build(settings.model, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    inputs, *calibration = (
        models.draw_inputs(unet, settings.batch_size, settings.sample_size, generator)
        for _ in range(1 + NUM_CALIBRATION_INPUTS)
    )
    contestants, skipped, seconds = build_contestants(names, unet, calibration)
    reference = contestants[STOCK].step(inputs)
    # The outputs are checked before the clock starts; this also builds the kernels' copies of the weights.
    errors = {name: relative_error(contestant.step(inputs), reference) for name, contestant in contestants.items()}

    machine = circumstances()
    latencies = interleaved_latency(
        {name: partial(contestant.step, inputs) for name, contestant in contestants.items()},
        num_rounds=settings.num_rounds,
        warmup_rounds=settings.warmup_rounds,
    )
    rows = [
        {
            "name": name,
            **latencies[name]._asdict(),
            "ratio": latencies[STOCK].median_ms / latencies[name].median_ms,
            "relative_error": errors[name],
            "first_seconds": seconds[name],
            "weight_bytes": None if contestant.unet is None else tensor_bytes(contestant.unet),
            "kernel_cache_bytes": None if contestant.unet is None else kernel_cache_bytes(contestant.unet),
        }
        for name, contestant in contestants.items()
    ]
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key != "json"},
        "environment": machine,
        "num_parameters": unet.num_parameters(),
        "sample_size": list(inputs[0].shape[2:]),
        "contestants": rows,
        "skipped": skipped,
    }


def machine_line(machine: dict[str, Any]) -> str:
    """Return the circumstances of a run in one paragraph."""
    load = ", ".join(f"{average:.2f}" for average in machine["load_average"] or ()) or "unknown"
    return (
        f"{machine['cpu']}, {machine['cpu_capability']}, VNNI: {'yes' if machine['vnni'] else 'no'}, threads: "
        f"{machine['num_threads']} of {machine['num_cpus']} cores, load before the run (1, 5, 15 min): {load}; "
        f"torch {machine['torch']}, diffusers {machine['diffusers']}, commit {machine['commit']}."
    )


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as a Markdown table with its circumstances above it."""
    settings = result["settings"]
    height, width = result["sample_size"]
    lines = [
        f"One step of the UNet {settings['model']}, {result['num_parameters'] / 1e6:.1f} M parameters, batch "
        f"{settings['batch_size']}, {height}x{width}: medians of {settings['num_rounds']} interleaved rounds after "
        f"{settings['warmup_rounds']} to warm up, seed {settings['seed']}.",
        "",
        machine_line(result["environment"]),
        "",
        "| contestant | ms | min to max | times faster | relative error | first s | weights MB | int8 copies MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in result["contestants"]:
        lines.append(
            f"| {row['name']} | {row['median_ms']:.1f} | {row['min_ms']:.1f} to {row['max_ms']:.1f} "
            f"| {row['ratio']:.2f} | {row['relative_error']:.1e} | {row['first_seconds']:.1f} "
            f"| {megabytes(row['weight_bytes'])} | {megabytes(row['kernel_cache_bytes'])} |"
        )
    lines += [f"\nSkipped: {name} ({reason})." for name, reason in result["skipped"].items()]
    return "\n".join(lines)


def megabytes(num_bytes: int | None) -> str:
    """Return a table's cell; the memory of other runtimes is not ours to know."""
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.1f}"


def report(result: dict[str, Any], text: str, path: str | None) -> None:
    """Print `text`, and write `result` to the JSON file `path`."""
    print(text)
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(json.dumps(result, indent=2) + "\n")


def main(settings: Settings) -> dict[str, Any]:
    """Run the benchmark, print its table and write its JSON file."""
    result = benchmark(settings)
    report(result, markdown(result), settings.json)
    return result


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
