"""How much memory does each stage of training take at the size of a real model, and what do its levers save and cost?

    python examples/benchmarks/training_memory.py --model sd15 --json outputs/training_memory.json
    python examples/benchmarks/training_memory.py --stages "CAD, all" --levers none all      # a part of the table

Each stage runs in a process of its own for each of its levers, one after the other: a text-to-image pipeline with
random weights and guidance on, of which little is recorded, and a few updates. The peak is the most that the process
had resident from when the float model was built; the libraries, which were there before, are counted apart. Needs the
memory of CAD without levers, about eleven times the weights, and as much disk.
"""

import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import models
import psutil
import torch
from memory import peak_bytes
from method_cost import CLEAR, PROMPTS, pipeline_of, spread
from transformers import HfArgumentParser

from diffusers_pqcad import DistillConfig, PQCADConfig, ProgressiveConfig, collect_calibration_set
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.distillation import distill
from diffusers_pqcad.compression.extras import missing
from diffusers_pqcad.compression.fake_quant import freeze_, prepare_
from diffusers_pqcad.compression.offload import offloaded, sharing_copy, store_in
from diffusers_pqcad.compression.progressive import (
    MIN_RECONSTRUCTION_SAMPLES,
    WEIGHT_BITS,
    ProgressiveQuantizer,
    passes_of,
    transition_prices,
)
from diffusers_pqcad.compression.reconstruction import capture_io, reconstruct
from diffusers_pqcad.loading.convert import match_modules

NONE, ALL = "none", "all"
OFFLOAD, PRECISION = {"offload_to_disk": True}, {"mixed_precision": "bf16"}
FOR_PQ: dict[str, dict[str, Any]] = {
    NONE: {},
    "mixed_precision": PRECISION,
    "offload_to_disk": OFFLOAD,
    ALL: OFFLOAD | PRECISION,
}
CHECKPOINTING, ACCUMULATION = {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2}
ADAFACTOR, ADAM_8BIT = {"optimizer": "adafactor"}, {"use_8bit_adam": True}
FOR_CAD: dict[str, dict[str, Any]] = {
    NONE: {},
    "gradient_checkpointing": CHECKPOINTING,
    "gradient_accumulation_steps": ACCUMULATION,
    "mixed_precision": PRECISION,
    "optimizer": ADAFACTOR,
    "use_8bit_adam": ADAM_8BIT,
    "offload_to_disk": OFFLOAD,
    ALL: CHECKPOINTING | ACCUMULATION | PRECISION | ADAFACTOR | OFFLOAD,
}


@dataclass
class Settings(harness.Settings):
    """Settings of one run; the defaults are SD-1.5 at a quarter of its usual pixels."""

    model: str = "sd15"  # a conditional one
    sample_size: int = 32  # height and width of the latents
    num_inference_steps: int = 4
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    levers: list[str] = field(default_factory=lambda: list(FOR_CAD))
    block: str = "up_blocks.0.resnets.0"  # whose reconstruction is measured: SD-1.5's largest
    price_layers: int = 4  # layers whose prices are measured, evenly spread
    num_updates: int = 3  # of a reconstruction, and of CAD; the first is not timed
    train_batch_size: int = 2  # of an update, in all
    directory: str | None = None  # for the recorded set and what is offloaded; default: a temporary folder
    stage: str | None = None  # measure only this one, with the only one of `levers`, here: a child process


@dataclass
class Bench:
    """What a stage works with: settings, the float UNet, a folder, and the switches of its levers."""

    settings: Settings
    unet: Any
    directory: Path
    levers: dict[str, Any]

    @property
    def offload_folder(self) -> Path | None:
        """Where this process keeps what waits; None: in memory."""
        return self.directory / "offload" if self.levers.get("offload_to_disk") else None

    @property
    def precision(self) -> Any:
        """The mixed precision of the levers."""
        return self.levers.get("mixed_precision", "no")

    def calibration(self) -> CalibrationSet:
        """Return the set that the stage "recording" wrote."""
        return CalibrationSet.load(self.directory / "calibration")


def record(bench: Bench) -> float:
    """Record the set that the other stages read; return the seconds."""
    settings, started = bench.settings, time.perf_counter()
    pipeline = pipeline_of(bench.unet, settings.sample_size)
    pixels = settings.sample_size * pipeline.vae_scale_factor
    collect_calibration_set(
        pipeline,
        list(PROMPTS),
        num_trajectories=4,
        num_inference_steps=settings.num_inference_steps,
        seed=settings.seed,
        batch_size=1,
        output_dir=bench.directory / "calibration",
        height=pixels,
        width=pixels,
        guidance_scale=5.0,
        progress=False,
    )
    return time.perf_counter() - started


def run_of(bench: Bench) -> ProgressiveQuantizer:
    """Return a run of PQ before its first round."""
    settings = ProgressiveConfig(mixed_precision=bench.precision)
    config, store = PQCADConfig(weight_bits=WEIGHT_BITS), store_in(bench.offload_folder)
    return ProgressiveQuantizer(bench.unet, bench.calibration(), config, settings, store)


def price(bench: Bench) -> float:
    """Measure the prices of a few layers; return the seconds of each, without what is made once a round."""
    run = run_of(bench)
    with offloaded(bench.unet, run.store):
        names = spread(run.controller.movable(), bench.settings.price_layers)
        frozen = run.calibration.denoiser(run.frozen())
        started = time.perf_counter()
        transition_prices(bench.unet, frozen, run.controller, run.train_set.draw(1, bench.settings.seed), names)
        return (time.perf_counter() - started) / len(names)


def reconstruct_block(bench: Bench) -> float:
    """Capture what a block sees, and train it; return the seconds of an update."""
    settings, run = bench.settings, run_of(bench)
    config = replace(
        run.settings.reconstruction, iterations=settings.num_updates, batch_size=settings.train_batch_size
    )
    with offloaded(bench.unet, run.store):
        samples = run.train_set.draw(MIN_RECONSTRUCTION_SAMPLES, settings.seed)
        passes = passes_of(run.denoiser, samples)
        io = capture_io(bench.unet, run.reference, settings.block, passes, samples.weight, store=run.store)
        started = time.perf_counter()
        reconstruct(run.units[settings.block], io, config, name=settings.block, mixed_precision=bench.precision)
        return (time.perf_counter() - started) / settings.num_updates


def distill_student(bench: Bench, trainable: Any) -> float:
    """Train a student of 4-bit weights, rounded to nearest; return the seconds of an update, without the first."""
    settings, calibration, student = bench.settings, bench.calibration(), bench.unet
    config = PQCADConfig(weight_bits=4)
    prepare_(student, config, dict.fromkeys(match_modules(student, config), 4))
    student.pqcad_source_hash = calibration.manifest["model_hash"]
    switches = {key: value for key, value in bench.levers.items() if key != "offload_to_disk"}
    settings_of_cad = DistillConfig(
        trainable=trainable,
        max_train_steps=settings.num_updates,
        evaluation_steps=settings.num_updates,
        train_batch_size=max(1, settings.train_batch_size // switches.get("gradient_accumulation_steps", 1)),
        **switches,
    )
    with tempfile.TemporaryDirectory(dir=bench.directory) as folder:  # no other lever's resume file
        entries = distill(
            student,
            freeze_(sharing_copy(student), store_in(bench.offload_folder)),
            calibration,
            settings_of_cad,
            checkpoint=Path(folder) / "resume.safetensors",
            offload_folder=bench.offload_folder,
        )
        return min(settings.train_batch_size / entry.images_per_second for entry in list(entries)[1:-1])


STAGES: dict[str, tuple[Callable[[Bench], float], dict[str, dict[str, Any]]]] = {
    "recording": (record, {NONE: {}}),
    "prices": (price, FOR_PQ),
    "reconstruction": (reconstruct_block, FOR_PQ),
    "CAD, all": (partial(distill_student, trainable="all"), FOR_CAD),
    "CAD, lora": (partial(distill_student, trainable="lora"), FOR_CAD),
}


def measure(settings: Settings, stage: str, lever: str, directory: Path) -> dict[str, Any]:
    """Run one stage with one lever in this process; return its peak, and the seconds of an update."""
    torch.set_num_threads(settings.num_threads)
    run, levers = STAGES[stage]
    before = psutil.Process().memory_info().rss  # the libraries
    bench = Bench(settings, models.build(settings.model, settings.seed), directory, levers[lever])
    num_parameters = bench.unet.num_parameters()
    CLEAR.write_text("5")  # the peak starts from now
    seconds = run(bench)
    return {
        "stage": stage,
        "lever": lever,
        "seconds": seconds,
        "peak_bytes": peak_bytes(),
        "libraries_bytes": before,
        "num_parameters": num_parameters,
    }


def in_a_process(settings: Settings, stage: str, lever: str, directory: Path) -> dict[str, Any]:
    """Return `measure` of a fresh process."""
    print(f"{stage}: {lever}", flush=True)
    values = asdict(settings) | {"stage": stage, "levers": [lever], "directory": str(directory)}
    values = {key: value for key, value in values.items() if key not in ("json", "stages")}
    command = [sys.executable, __file__]
    for key, value in values.items():
        command += [f"--{key}", *map(str, value if isinstance(value, list) else [value])]
    result = subprocess.run(command, capture_output=True, text=True)
    found = re.search(r"^measured: (.*)$", result.stdout, re.MULTILINE)
    if result.returncode or found is None:
        raise RuntimeError(f"{stage} with {lever} failed:\n{result.stdout}\n{result.stderr}")
    return json.loads(found[1])


def wanted(settings: Settings) -> list[tuple[str, str]]:
    """Return the stages and levers of a run, recording first; ValueError for a name that is none."""
    for name, known in (("stages", STAGES), ("levers", FOR_CAD)):
        unknown = sorted(set(getattr(settings, name)) - set(known))
        if unknown:
            raise ValueError(f"{name}: expected some of {list(known)}, got {unknown}.")
    chosen = [
        (stage, lever)
        for stage, (_, levers) in STAGES.items()
        for lever in levers
        if stage == "recording" or (stage in settings.stages and lever in settings.levers)
    ]
    return [(stage, lever) for stage, lever in chosen if lever != "use_8bit_adam" or not missing("bitsandbytes")]


def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances, and the peak and the seconds of an update of each stage with each lever."""
    if settings.stage is not None:
        assert settings.directory is not None
        row = measure(settings, settings.stage, settings.levers[0], Path(settings.directory))
        print(f"measured: {json.dumps(row)}")
        return row
    if settings.num_updates < 3:
        raise ValueError(f"num_updates={settings.num_updates}: expected at least 3; the first and last are not timed.")
    machine = harness.circumstances()
    with tempfile.TemporaryDirectory(dir=settings.directory) as directory:
        rows = [in_a_process(settings, stage, lever, Path(directory)) for stage, lever in wanted(settings)]
    left_out = ("json", "directory", "stage")
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key not in left_out},
        "environment": machine,
        "num_parameters": rows[0].pop("num_parameters"),
        "rows": [{key: value for key, value in row.items() if key != "num_parameters"} for row in rows],
    }


def times_the_weights(result: dict[str, Any], row: dict[str, Any]) -> float:
    """Return the peak of a row in sizes of the fp32 weights, libraries included."""
    return row["peak_bytes"] / (4 * result["num_parameters"])


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a run; that of a child process is empty."""
    if "rows" not in result:
        return ""
    settings = result["settings"]
    libraries = max(row["libraries_bytes"] for row in result["rows"])
    text = (
        f"{harness.model_line(result)}, latents {settings['sample_size']}x{settings['sample_size']}, guidance on, "
        f"{settings['train_batch_size']} images an update, {settings['num_updates']} updates; reconstruction of "
        f"{settings['block']}; seed {settings['seed']}, one run. Peaks are those of a process for each row, with the "
        f"libraries' {libraries / 1e9:.1f} GB; the weights are {4 * result['num_parameters'] / 1e9:.1f} GB. Seconds: "
        "of a whole recording of 4 trajectories, of one price, of an update."
    )
    lines = ["| stage | lever | peak, GB | times the weights | seconds |", "| --- | --- | ---: | ---: | ---: |"]
    lines += [
        f"| {row['stage']} | {row['lever']} | {row['peak_bytes'] / 1e9:.1f} | {times_the_weights(result, row):.1f} "
        f"| {row['seconds']:.1f} |"
        for row in result["rows"]
    ]
    return "\n".join([*harness.caption(text, result), *lines])


main = partial(harness.run, benchmark, markdown)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
