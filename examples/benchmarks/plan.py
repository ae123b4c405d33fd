"""How close does the plan of a run come to the run: its seconds and its memory, stage by stage?

    python examples/benchmarks/plan.py --json outputs/plan.json
    python examples/benchmarks/plan.py --clock cpu --flags "--pretrained_model_name_or_path my/pipeline --preset smoke"

The run comes first, in a temporary folder; the plan is made after it, in the same process, as `pqcad compress
--dry_run` makes it. A stage's peak is the most that was resident since it began, less what Python and its libraries
took before the run (Linux). `--clock cpu` compares seconds of this process's work: on a computer that others use, too.
"""

import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import harness
import psutil
from memory import peak_bytes
from method_cost import CLEAR
from transformers import HfArgumentParser

from diffusers_pqcad.loading.saved import saved_models
from diffusers_pqcad.publishing.compress import compress
from diffusers_pqcad.publishing.footprint import footprints
from diffusers_pqcad.publishing.outline import outline_of
from diffusers_pqcad.publishing.run_folder import Site
from diffusers_pqcad.publishing.settings import Settings as RunSettings
from diffusers_pqcad.publishing.settings import parse_settings
from diffusers_pqcad.publishing.stages import stages_of_run
from diffusers_pqcad.publishing.timing import Stopwatch

TEACHER = Path(__file__).resolve().parents[1] / "models" / "fashion-mnist"
FLAGS = (
    "--num_images 64 --num_trajectories 32 --num_inference_steps 10 --max_train_steps 30 --evaluation_steps 15 "
    "--reconstruction_iterations 10 --reconstruction_samples 64 --measure_memory False --sampling_batch_size 16"
)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
# The headings with which stages begin; a heading of none of them ends the one before.
HEADINGS = (
    "calibration set",
    "progressive quantization",
    "distillation",
    "PQ without",
    "fixed-bit",
    "measuring, row 1 ",
)


@dataclass
class Settings(harness.Settings):
    """Settings of one comparison."""

    flags: str = FLAGS  # of a run, as on a command line; without a pipeline, the bundled one
    clock: str = "wall"  # or "cpu", seconds of this process alone


@dataclass
class Seen:
    """What a stage took: seconds, and the most that was resident, with the libraries."""

    heading: str
    seconds: float
    peak_bytes: int


def run_settings(settings: Settings, folder: str) -> RunSettings:
    """Return the settings of the run in `folder`."""
    found = parse_settings(shlex.split(settings.flags))
    path = found.run.pretrained_model_name_or_path or str(TEACHER)
    run = replace(
        found.run,
        pretrained_model_name_or_path=path,
        output_dir=str(Path(folder) / "run"),
        num_threads=settings.num_threads,
        seed=settings.seed,
    )
    return found._replace(run=run)


@contextmanager
def watched(clock: Any) -> Iterator[list[Seen]]:
    """Give what the stages of a run inside the block took."""
    seen: list[Seen] = []
    begun: list[tuple[str, float]] = []

    def end() -> None:
        if begun:
            heading, started = begun.pop()
            seen.append(Seen(heading, clock() - started, peak_bytes()))

    def say(site: Site, text: str) -> None:
        if text.startswith("measuring, row") and not text.startswith(HEADINGS[-1]):
            return
        end()
        print(f"== {text}", file=sys.stderr, flush=True)
        if CLEAR.exists():
            CLEAR.write_text("5")  # the peak starts from now
        if text.startswith(HEADINGS):
            begun.append((text, clock()))

    with patch.object(Site, "say", say):
        yield seen
    end()


def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances, and what each stage was planned to take and took."""
    if settings.clock not in CLOCKS:
        raise ValueError(f"clock: expected one of {list(CLOCKS)}, got {settings.clock!r}.")
    clock, machine = CLOCKS[settings.clock], harness.circumstances()
    before = psutil.Process().memory_info().rss
    with tempfile.TemporaryDirectory() as folder:
        run = run_settings(settings, folder)
        with watched(clock) as seen:
            compress(*run, progress=False)
    started = clock()
    path = str(run.run.pretrained_model_name_or_path)
    models = saved_models(path)
    outline = outline_of(run, path, models)
    stages = stages_of_run(run, outline)
    peaks = footprints(run, outline, models, stages)
    stopwatch = Stopwatch(run, outline, clock)
    rows = [
        {
            "stage": stage.key,
            "planned_seconds": stopwatch.of_stage(stage),
            "seconds": took.seconds,
            "planned_bytes": peak.total("cpu"),
            "peak_bytes": took.peak_bytes - before,
        }
        for stage, peak, took in zip(stages, peaks, seen, strict=True)
    ]
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key not in ("json", "model")},
        "environment": machine,
        "rows": rows,
        "planning_seconds": clock() - started,
        "seconds": sum(row["seconds"] for row in rows),
        "planned_seconds": sum(row["planned_seconds"] for row in rows),
    }


def percent_off(planned: float, found: float) -> str:
    """Return by how much of what was found the plan is off, such as +10 %."""
    return f"{100 * (planned / found - 1):+.0f} %"


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a comparison."""
    text = (
        f"A run with `{result['settings']['flags']}`, seed {result['settings']['seed']}, once; seconds of the "
        f"{result['settings']['clock']} clock. The plan took {result['planning_seconds']:.0f} s."
    )
    lines = [
        "| stage | planned s | s | off | planned MB | MB | off |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['stage']} | {row['planned_seconds']:.1f} | {row['seconds']:.1f} "
        f"| {percent_off(row['planned_seconds'], row['seconds'])} | {row['planned_bytes'] / 1e6:.0f} "
        f"| {row['peak_bytes'] / 1e6:.0f} | {percent_off(row['planned_bytes'], row['peak_bytes'])} |"
        for row in result["rows"]
    ]
    planned, found = result["planned_seconds"], result["seconds"]
    lines.append(f"| all | {planned:.1f} | {found:.1f} | {percent_off(planned, found)} | | | |")
    return "\n".join([*harness.caption(text, result), *lines])


main = partial(harness.run, benchmark, markdown)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
