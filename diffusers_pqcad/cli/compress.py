"""`pqcad compress`: PQ, then CAD, with a table, a card and pictures: the library's `compress`."""

import shlex
from typing import Any, NamedTuple

from huggingface_hub import constants

from diffusers_pqcad.cli.command import TRIAL, Command, Outcome, Trial
from diffusers_pqcad.cli.inspect import described, plans_of
from diffusers_pqcad.cli.saved_source import models_of
from diffusers_pqcad.publishing.compress import arms_of, compress
from diffusers_pqcad.publishing.hub import input_kind, results_table, student_call, table_notes
from diffusers_pqcad.publishing.pipelines import loading_arguments, strides_of
from diffusers_pqcad.publishing.run_folder import PROMPTS_FILE
from diffusers_pqcad.publishing.settings import PARTS, PRESETS, CompressConfig, Settings, config_of, flat, settings_of


class Job(NamedTuple):
    """What `pqcad compress` takes."""

    settings: Settings
    trial: Trial


def job_of(values: dict[str, Any]) -> Job:
    """Return the settings of the flags `values`."""
    trial, output = TRIAL.names, ("json", "traceback")
    settings = settings_of({name: value for name, value in values.items() if name not in (*trial, *output)})
    return Job(settings, config_of(TRIAL, values))


def run(job: Job) -> Outcome:
    """Return the metrics of the run, and its table."""
    if job.trial.dry_run:
        return planned(job.settings)
    metrics = compress(*job.settings)
    return Outcome(metrics, summary(metrics, job.settings.run))


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


def planned(settings: Settings) -> Outcome:
    """Return what would be done: the layers by headers, the stages by the settings."""
    run, quantization, _, distillation = settings
    plans = plans_of(
        models_of(str(run.pretrained_model_name_or_path), loading_arguments(run).get("revision")), quantization
    )
    students = [run.num_inference_steps // stride for stride in strides_of(run)]
    arms = [arm.name for arm in arms_of(distillation, run.wanted_ablations())]
    lines = [f"{name}: {found.totals()}" for name, found in plans.items()]
    lines += [
        f"{'recorded' if run.calibration_set is None else f'read from {run.calibration_set}'}: "
        f"{run.num_trajectories} trajectories of {run.num_inference_steps} steps",
        f"PQ: to {quantization.weight_bits:g} bits a weight on average, rounds of each stage: "
        f"{settings.progressive.rounds_per_stage}",
        f"CAD: {distillation.max_train_steps} updates for each of {', '.join(arms)}, in {students} steps",
        f"measured: {run.num_images} images a row",
        f"Would be saved in {run.output_dir}. Nothing was written.",
    ]
    document = {
        "dry_run": True,
        "components": {name: described(found) for name, found in plans.items()},
        "student_steps": students,
        "arms": arms,
        "settings": {name: str(value) if value == float("inf") else value for name, value in flat(settings).items()},
    }
    return Outcome(document, "\n".join(lines))


COMMAND = Command(
    name="compress",
    summary="a pipeline to fewer bits and half the steps, trained on its own trajectories",
    description="Compress a pipeline: progressive quantization (PQ), then distillation to half the steps (CAD). The "
    "result is a folder with the pipeline, its card, figures and pictures. A run that was stopped goes on with the "
    "same command. `--preset smoke` tries all of it; `pqcad quantize` needs seconds, and no training.",
    example="pqcad compress my/text-to-image --weight_bits 4 --prompts_file prompts.txt -o outputs/small",
    parts=(*PARTS, TRIAL),
    operands={"pretrained_model_name_or_path": "MODEL"},
    settings=job_of,
    run=run,
    kept=lambda job: f"What is finished is kept in {job.settings.run.output_dir}. To go on:",
    presets=PRESETS,
    shares_work=True,
)
