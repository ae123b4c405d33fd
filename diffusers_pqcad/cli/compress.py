"""`pqcad compress`: PQ, then CAD, with a table, a card and pictures: the library's `compress`."""

import shlex
import sys
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from huggingface_hub import constants

from diffusers_pqcad.cli.command import TRIAL, Command, Outcome, Trial
from diffusers_pqcad.cli.inspect import described, plans_of
from diffusers_pqcad.cli.saved_source import models_of
from diffusers_pqcad.compression.processes import is_main
from diffusers_pqcad.loading.inspection import table
from diffusers_pqcad.loading.plan import Plan
from diffusers_pqcad.loading.saved import SavedModel
from diffusers_pqcad.publishing.compress import arms_of, compress, set_threads
from diffusers_pqcad.publishing.footprint import Footprint, footprints
from diffusers_pqcad.publishing.hub import input_kind, results_table, student_call, table_notes
from diffusers_pqcad.publishing.levers import bytes_of, within
from diffusers_pqcad.publishing.outline import Outline, outline_of
from diffusers_pqcad.publishing.pipelines import loading_arguments, strides_of
from diffusers_pqcad.publishing.run_folder import PROMPTS_FILE
from diffusers_pqcad.publishing.settings import (
    PARTS,
    PRESETS,
    CompressConfig,
    Part,
    Settings,
    config_of,
    flat,
    settings_of,
)
from diffusers_pqcad.publishing.stages import Stage, stages_of_run
from diffusers_pqcad.publishing.timing import Stopwatch


@dataclass(frozen=True)
class Bill:
    """What a run may cost, and whether a trial looks at its time."""

    max_memory: str | None = field(
        default=None,
        metadata={
            "help": "most memory of the device that trains, such as 16GB or 16GiB, beside Python and its libraries: "
            "flags that save memory are chosen, and named, until the plan stays below it; None: as the flags say"
        },
    )
    measure_time: bool = field(
        default=True,
        metadata={"help": "with dry_run: time a few calls of models of these shapes, for the seconds of each stage"},
    )


BILL = Part("bill", Bill, ("max_memory", "measure_time"))


class Job(NamedTuple):
    """What `pqcad compress` takes."""

    settings: Settings
    trial: Trial
    bill: Bill = Bill()


def job_of(values: dict[str, Any]) -> Job:
    """Return the settings of the flags `values`."""
    others = (*TRIAL.names, *BILL.names, "json", "traceback")
    settings = settings_of({name: value for name, value in values.items() if name not in others})
    bill = config_of(BILL, values)
    if bill.max_memory is not None:
        bytes_of(bill.max_memory)  # refused before anything is loaded
    return Job(settings, config_of(TRIAL, values), bill)


def run(job: Job) -> Outcome:
    """Return the metrics of the run, and its table."""
    path = str(job.settings.run.pretrained_model_name_or_path)
    if job.trial.dry_run:
        return planned(job.settings, job.bill, path)
    settings = affordable(job.settings, job.bill, path)
    metrics = compress(*settings)
    return Outcome(metrics, summary(metrics, settings.run))


def affordable(settings: Settings, bill: Bill, path: str) -> Settings:
    """Return `settings` with the flags that keep them within the memory of `bill`, and say which these are.

    `path` is where the teacher is.
    """
    if bill.max_memory is None:
        return settings
    models = models_of_run(settings, path)
    settings, flags = within(settings, outline_of(settings, path, models), models, bytes_of(bill.max_memory))
    if is_main():
        print(within_line(bill, flags), file=sys.stderr)
    return settings


def models_of_run(settings: Settings, path: str) -> dict[str, SavedModel]:
    """Return the models of the pipeline in `path`, by their headers."""
    return models_of(path, loading_arguments(settings.run).get("revision"))


def within_line(bill: Bill, flags: dict[str, object]) -> str:
    """Return which `flags` were chosen for a limit of memory."""
    return f"To stay within {bill.max_memory} where it trains: {written(flags) or 'no further flag is needed'}."


def written(flags: dict[str, object]) -> str:
    """Return `flags` as they are written on a command line."""
    return shlex.join(word for name, value in flags.items() for word in (f"--{name}", str(value)))


def summary(metrics: dict[str, Any], run: CompressConfig) -> str:
    """Return what a finished run says: its table, before and after, where the pipeline is, and what to do next."""
    return (
        f"{results_table(metrics)}\n\n{table_notes(metrics)}\n\n{before_and_after(metrics)}\n\n{ending(metrics, run)}"
    )


def before_and_after(metrics: dict[str, Any]) -> str:
    """Return the sizes, work, times and closeness of the teacher and of the student, a line each."""
    rows = {row["key"]: row for row in metrics["rows"]}
    before, after = rows["float"], rows["pq_cad"]
    sizes = [row["size_bytes"] / 1e6 for row in (before, after)]
    times = [after[name]["median_ms"] for name in ("reference_latency_ms", "latency_ms")]
    half = rows.get("float_half")
    lines = [
        f"Size of the {metrics['component']}: {sizes[0]:.2f} MB before, {sizes[1]:.2f} MB after: "
        f"{sizes[0] / sizes[1]:.1f} times smaller.",
        f"Evaluations of it for an image: {before['model_evaluations']} before, {after['model_evaluations']} after.",
        f"Time of an image: {times[0]:.2f} ms before, {times[1]:.2f} ms after: {times[0] / times[1]:.1f} times as "
        "fast.",
        f"Closeness to before, SQNR of the median image: {median_db(after)}"
        + (f"; full precision in {half['num_inference_steps']} steps: {median_db(half)}." if half else "."),
    ]
    return "\n".join(lines)


def median_db(row: dict[str, Any]) -> str:
    """Return the SQNR of the median image of a row."""
    return f"{float(row['sqnr_median_db']):.2f} dB"


def ending(metrics: dict[str, Any], run: CompressConfig) -> str:
    """Return where the pipeline is, how it is called, and the commands that may come next."""
    folder = run.output_dir
    load = f"pipe = DiffusionPipeline.from_pretrained({folder!r})"
    if metrics["adapter"]:
        load += f"; pipe.load_lora_weights({folder!r})"
    lines = [
        f"Saved in {folder}. Load it: {load}; it was distilled for pipe({student_call(metrics)})",
    ]
    if run.push_to_hub:
        lines.append(f"Published: {constants.ENDPOINT}/{run.hub_model_id}")
    else:
        lines.append(f"Publish it: {shlex.join(['pqcad', 'push', folder])} user/name")
    lines.append(f"See it: {compare_command(metrics, run)}")
    return "\n".join(lines)


def compare_command(metrics: dict[str, Any], run: CompressConfig) -> str:
    """Return the command that shows the teacher and the student side by side, as both were called."""
    teacher, folder = str(run.pretrained_model_name_or_path), run.output_dir
    words = ["pqcad", "compare", teacher, folder, "--num_inference_steps", str(run.num_inference_steps)]
    if input_kind(metrics) == "prompt":
        words += ["--prompts_file", f"{folder}/{PROMPTS_FILE}"]
    elif run.class_labels:
        words += ["--class_labels", *map(str, run.class_labels)]
    for name, value in metrics["call_arguments"].items():
        words += [f"--{name}", str(value)]
    return shlex.join([*words, "-o", f"{folder}.html"])


def planned(settings: Settings, bill: Bill, path: str) -> Outcome:
    """Return what would be done: layers and bytes by headers, stages by the settings, seconds by a few calls.

    `path` is where the teacher is.
    """
    models = models_of_run(settings, path)
    plans = plans_of(models, settings.quantization)
    outline = outline_of(settings, path, models)
    flags: dict[str, object] = {}
    if bill.max_memory is not None:
        settings, flags = within(settings, outline, models, bytes_of(bill.max_memory))
    stages = stages_of_run(settings, outline)
    peaks = footprints(settings, outline, models, stages)
    seconds = seconds_of(settings, outline, stages, bill)
    run, distillation = settings.run, settings.distillation
    document = {
        "dry_run": True,
        "components": {name: described(found) for name, found in plans.items()},
        "student_steps": [run.num_inference_steps // stride for stride in strides_of(run)],
        "arms": [arm.name for arm in arms_of(distillation, run.wanted_ablations())],
        "branches": outline.branches,
        "stages": [stage_document(*found) for found in zip(stages, peaks, seconds, strict=True)],
        "flags_for_memory": flags,
        "settings": {name: str(value) if value == float("inf") else value for name, value in flat(settings).items()},
    }
    lines = [line for name, found in plans.items() for line in (f"{name}: {found.totals()}", *left_lines(found))]
    lines += ["", *stage_lines(stages, peaks, seconds), "", *notes(stages, bill, run, outline)]
    if bill.max_memory is not None:
        lines.append(within_line(bill, flags))
    lines.append(f"Would be saved in {run.output_dir}. Nothing was written.")
    return Outcome(document, "\n".join(lines))


def seconds_of(settings: Settings, outline: Outline, stages: list[Stage], bill: Bill) -> list[float | None]:
    """Return the seconds of each stage on this computer, measured on models with random weights, if `bill` asks."""
    if not bill.measure_time:
        return [None for _ in stages]
    set_threads(settings.run)
    stopwatch = Stopwatch(settings, outline)
    return [stopwatch.of_stage(stage) for stage in stages]


def stage_document(stage: Stage, footprint: Footprint, seconds: float | None) -> dict[str, Any]:
    """Return what is said of a stage, as JSON values."""
    return {
        "key": stage.key,
        "title": stage.title,
        "updates": stage.num_updates,
        "model_evaluations": stage.evaluations,
        "trained_rows": stage.trained_rows,
        "is_exact": not stage.is_expected,
        "peak_bytes": {device: footprint.total(device) for device in footprint.parts},
        "peak_bytes_of": footprint.parts,
        "seconds": seconds,
    }


def stage_lines(stages: list[Stage], peaks: list[Footprint], seconds: list[float | None]) -> list[str]:
    """Return the table of the stages."""
    devices = list(dict.fromkeys(device for peak in peaks for device in peak.parts))
    header = ["stage", "updates", "model evaluations", *(f"most memory, {device}" for device in devices), "time"]
    rows = [
        [
            stage.title,
            f"{'about ' if stage.is_expected else ''}{stage.num_updates}",
            f"{'about ' if stage.is_expected else ''}{stage.evaluations + stage.trained_rows}",
            *(size(peak.total(device)) if device in peak.parts else "-" for device in devices),
            "-" if taken is None else duration(taken),
        ]
        for stage, peak, taken in zip(stages, peaks, seconds, strict=True)
    ]
    return table([header, *rows])


def size(num_bytes: int) -> str:
    """Return bytes as a reader says them: megabytes or gigabytes."""
    return f"{num_bytes / 1e6:.1f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"


def duration(seconds: float) -> str:
    """Return a time as a reader says it: seconds, minutes or hours."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def left_lines(found: Plan) -> list[str]:
    """Return a line for each reason why layers stay in floating point, with their names."""
    reasons: dict[str, list[str]] = {}
    for layer in found:
        if layer.kernel is None:
            reasons.setdefault(layer.becomes, []).append(layer.name)
    return [f"  {reason}: {', '.join(names)}" for reason, names in reasons.items()]


def notes(stages: list[Stage], bill: Bill, run: CompressConfig, outline: Outline) -> list[str]:
    """Return what a reader needs to know of the numbers of a plan."""
    lines = [f"A model evaluation is a row of the denoiser's batch; a step of the teacher has {outline.branches}."]
    if any(stage.is_expected for stage in stages):
        lines.append("About: PQ's rounds depend on what it measures. All else is exact.")
    lines.append("Memory is beside what Python and its libraries take.")
    if bill.measure_time:
        lines.append(f"Times are of {run.num_threads or 'all'} threads here, without loading and writing.")
    return lines


COMMAND = Command(
    name="compress",
    summary="a pipeline to fewer bits and half the steps, trained on its own trajectories",
    description="Compress a pipeline: progressive quantization (PQ), then distillation to half the steps (CAD). The "
    "result is a folder with the pipeline, its card, figures and pictures. A run that was stopped goes on with the "
    "same command. `--preset smoke` tries all of it; `pqcad quantize` needs seconds, and no training.",
    example="pqcad compress my/text-to-image --weight_bits 4 --prompts_file prompts.txt -o outputs/small",
    parts=(*PARTS, BILL, TRIAL),
    operands={"pretrained_model_name_or_path": "MODEL"},
    settings=job_of,
    run=run,
    kept=lambda job: f"What is finished is kept in {job.settings.run.output_dir}. To go on:",
    presets=PRESETS,
    shares_work=True,
)
