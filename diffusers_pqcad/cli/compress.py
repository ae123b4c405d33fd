"""`pqcad compress`: PQ, then CAD, with a table, a card and pictures: the library's `compress`."""

from typing import Any, NamedTuple

from diffusers_pqcad.cli.command import TRIAL, Command, Outcome, Trial
from diffusers_pqcad.cli.inspect import described, plans_of
from diffusers_pqcad.cli.saved_source import models_of
from diffusers_pqcad.publishing.compress import arms_of, compress
from diffusers_pqcad.publishing.hub import results_table, student_call, table_notes
from diffusers_pqcad.publishing.pipelines import strides_of
from diffusers_pqcad.publishing.settings import PARTS, PRESETS, Settings, config_of, flat, settings_of


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
    folder = job.settings.run.output_dir
    return Outcome(metrics, summary(metrics, folder))


def summary(metrics: dict[str, Any], folder: str) -> str:
    """Return what a finished run says: its table, where the pipeline is, and how it is called."""
    load = f"pipe = DiffusionPipeline.from_pretrained({folder!r})"
    if metrics["adapter"]:
        load += f"; pipe.load_lora_weights({folder!r})"
    return (
        f"{results_table(metrics)}\n\n{table_notes(metrics)}\n\nSaved in {folder}. Load it: {load}; "
        f"it was distilled for pipe({student_call(metrics)})\nPublish it: pqcad push {folder} user/name"
    )


def planned(settings: Settings) -> Outcome:
    """Return what would be done: the layers by headers, the stages by the settings."""
    run, quantization, _, distillation = settings
    plans = plans_of(models_of(str(run.pretrained_model_name_or_path)), quantization)
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
