"""What do several processes bring, each on a core of its own, beside one process with as many threads?

    python examples/benchmarks/processes.py --json outputs/processes.json

The parts of `compress` on the bundled teacher, in one process with `num_threads` threads and in as many processes with
one thread each, in turns, each time in fresh processes. Both make the same images: CAD's batch is shared out.
"""

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from subprocess import run as run_command
from typing import Any

import harness
import models
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from transformers import HfArgumentParser

from diffusers_pqcad import DistillConfig, PQCADConfig, ProgressiveConfig, collect_calibration_set
from diffusers_pqcad.compression.distillation import distill
from diffusers_pqcad.compression.fake_quant import freeze_
from diffusers_pqcad.compression.processes import accelerator_on, on_main
from diffusers_pqcad.compression.progressive import WEIGHT_BITS, ProgressiveQuantizer
from diffusers_pqcad.evaluation import generate_samples

LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--num_machines", "1", "--mixed_precision", "no")


@dataclass
class Settings(harness.Settings):
    """Settings of one run."""

    model: str = "fashion-mnist"
    num_threads: int = 2  # of the one process; and so many processes
    num_rounds: int = 3
    num_inference_steps: int = 10
    num_images: int = 64  # recorded, and sampled
    batch_size: int = 8  # images of one call of the pipeline
    num_units: int = 4  # that are reconstructed
    reconstruction_samples: int = 256
    iterations: int = 50  # of their reconstruction
    max_train_steps: int = 20  # updates of CAD
    train_batch_size: int = 32  # images of one of them, of all processes together
    result: str | None = None  # file for the times of one run, made here: a child process


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long the block takes in all processes, from when the last of them begins."""
    started = on_main(time.perf_counter)
    yield
    seconds[name] = on_main(time.perf_counter) - started


def pipeline_of(settings: Settings) -> DDIMPipeline:
    """Return the pipeline of the model."""
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    return DDIMPipeline(models.build(settings.model, settings.seed), scheduler)


def work(settings: Settings) -> dict[str, float]:
    """Return the seconds of each part, run here and in whatever other processes there are."""
    accelerator = accelerator_on("cpu")
    torch.set_num_threads(settings.num_threads // accelerator.num_processes)
    pipeline = pipeline_of(settings)
    seconds: dict[str, float] = {}
    calls: dict[str, Any] = {
        "num_inference_steps": settings.num_inference_steps,
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "progress": False,
    }
    with timed(seconds, "recording"):
        calibration = collect_calibration_set(pipeline, num_trajectories=settings.num_images, **calls)
    model = copy.deepcopy(pipeline.unet)
    progressive = ProgressiveConfig(reconstruction_samples=settings.reconstruction_samples)
    run = ProgressiveQuantizer(model, calibration, PQCADConfig(weight_bits=WEIGHT_BITS), progressive)
    with timed(seconds, "prices of a round"):
        run.observe(0, 0)
    share = settings.iterations / progressive.reconstruction.iterations
    with timed(seconds, "reconstruction"):
        run.move_units([], 0, 0, share=share, units=run.order[: settings.num_units])
    config = DistillConfig(
        max_train_steps=settings.max_train_steps,
        evaluation_steps=settings.max_train_steps,
        train_batch_size=settings.train_batch_size // accelerator.num_processes,
    )
    with timed(seconds, "CAD"):
        list(distill(model, freeze_(copy.deepcopy(model)), calibration, config))
    with timed(seconds, "sampling"):
        generate_samples(pipeline, num_images=settings.num_images, **calls)
    return seconds


def command(settings: Settings, num_processes: int) -> list[str]:
    """Return the command that runs all parts in `num_processes`, and writes their times to the file of `settings`."""
    flags = [f"--{name}={value}" for name, value in asdict(settings).items() if value is not None and name != "json"]
    several = ("--multi_gpu",) if num_processes > 1 else ()
    launch = (*LAUNCH, "--dynamo_backend", "no", *several, "--num_processes", str(num_processes))
    return [*launch, __file__, *flags]


def in_processes(settings: Settings, num_processes: int) -> dict[str, float]:
    """Return `work` of fresh processes."""
    environment = os.environ | {"OMP_NUM_THREADS": str(settings.num_threads // num_processes)}
    with tempfile.TemporaryDirectory() as folder:
        settings = replace(settings, result=f"{folder}/times.json")
        done = run_command(command(settings, num_processes), env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{num_processes} processes: {done.stderr[-2000:]}")
        return json.loads(Path(settings.result or "").read_text())


def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances, and the seconds of each part in one process and in several."""
    torch.set_num_threads(settings.num_threads)
    machine = harness.circumstances()
    kinds = {"one process": 1, "several processes": settings.num_threads}
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    for number in range(settings.num_rounds):
        for name, num_processes in kinds.items():
            print(f"round {number + 1} of {settings.num_rounds}: {name}", flush=True)
            runs[name].append(in_processes(settings, num_processes))
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key not in ("json", "result")},
        "environment": machine,
        "num_parameters": models.build(settings.model, settings.seed).num_parameters(),
        "rows": [
            {"name": part, "seconds": {name: [times[part] for times in runs[name]] for name in kinds}}
            for part in runs["one process"][0]
        ],
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a run."""
    chosen = result["settings"]
    count = chosen["num_threads"]
    text = (
        f"{harness.model_line(result)}: seconds, medians of {chosen['num_rounds']} rounds in turns. Recording and "
        f"sampling of {chosen['num_images']} images in {chosen['num_inference_steps']} steps, reconstruction of "
        f"{chosen['num_units']} units, {chosen['max_train_steps']} updates of CAD of {chosen['train_batch_size']} "
        "images a term."
    )
    lines = [
        f"| part | one process, {count} threads | {count} processes | times faster |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in result["rows"]:
        one, several = (statistics.median(values) for values in row["seconds"].values())
        lines.append(f"| {row['name']} | {one:.1f} | {several:.1f} | {one / several:.2f} |")
    return "\n".join([*harness.caption(text, result), *lines])


def main(settings: Settings) -> dict[str, Any]:
    """Run the benchmark, print its table and write its JSON file; in a child process, one run of all parts."""
    if settings.result is None:
        return harness.run(benchmark, markdown, settings)
    seconds = work(settings)
    on_main(partial(Path(settings.result).write_text, json.dumps(seconds)))
    return dict(seconds)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
