"""`pqcad calibrate`: record a calibration set, the full-precision trajectories that PQ and CAD learn from."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from diffusers_pqcad.cli.calling import CALLS, run_of, run_part, with_prompts
from diffusers_pqcad.cli.command import TRIAL, Command, Outcome, Trial
from diffusers_pqcad.cli.saved_source import models_of
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.denoiser import denoiser_name
from diffusers_pqcad.evaluation.speed import directory_size_bytes
from diffusers_pqcad.loading.config import DENOISER_COMPONENTS, PQCADConfig
from diffusers_pqcad.publishing.compress import set_threads
from diffusers_pqcad.publishing.pipelines import check_teacher, denoiser_of, load_teacher, prompts_of, record
from diffusers_pqcad.publishing.settings import CompressConfig, Part, config_of


@dataclass(frozen=True)
class CalibrateConfig:
    """Where the set goes."""

    output_dir: str = field(
        default="outputs/calibration", metadata={"help": "folder of the set, new or empty", "aliases": ["-o"]}
    )


OUTPUT_DIR = Part("output folder", CalibrateConfig, ("output_dir",))
RUN = run_part("recording", ("pretrained_model_name_or_path", "num_trajectories", *CALLS), {})


class Settings(NamedTuple):
    """What `pqcad calibrate` takes."""

    output_dir: str
    run: CompressConfig
    trial: Trial


def settings_of(values: dict[str, Any]) -> Settings:
    """Return the settings of the flags `values`."""
    output = config_of(OUTPUT_DIR, values)
    return Settings(output.output_dir, run_of(RUN, values), config_of(TRIAL, values))


def run(settings: Settings) -> Outcome:
    """Return what was recorded, and where it is."""
    teacher_path, path = str(settings.run.pretrained_model_name_or_path), Path(settings.output_dir)
    run = with_prompts(settings.run, teacher_path)
    if path.exists() and any(path.iterdir()):
        raise ValueError(
            f"output_dir: expected a folder that is new or empty, got {path}. Give another, or delete it."
        )
    prompts = prompts_of(run)
    if settings.trial.dry_run:
        return planned(run, prompts, settings.output_dir)
    set_threads(run)
    teacher, _ = load_teacher(teacher_path)
    if getattr(denoiser_of(teacher), "is_quantized", False):
        name = denoiser_name(teacher)
        raise ValueError(f"MODEL: expected a pipeline in full precision, got one whose {name} is quantized.")
    check_teacher(teacher, run, PQCADConfig(), prompts)
    calibration = record(teacher, run, path, progress=True)
    return Outcome(document_of(calibration, path), text_of(calibration, path))


def document_of(calibration: CalibrationSet, path: Path) -> dict[str, Any]:
    """Return what was recorded, as JSON values."""
    manifest = {key: value for key, value in calibration.manifest.items() if key != "scheduler"}
    held_out = len(calibration.split()[1])
    return {
        "output_dir": str(path),
        "num_trajectories": len(calibration),
        "num_held_out": held_out,
        "size_bytes": directory_size_bytes(path),
        "manifest": manifest,
    }


def text_of(calibration: CalibrationSet, path: Path) -> str:
    """Return what was recorded, for readers."""
    steps = calibration.num_inference_steps
    compress_it = "pqcad compress MODEL --calibration_set"
    return (
        f"{len(calibration)} trajectories of {steps} steps in {path}, {directory_size_bytes(path) / 1e6:.2f} MB; "
        f"{len(calibration.split()[1])} are held out.\nRead it: diffusers_pqcad.CalibrationSet.load({str(path)!r})\n"
        f"Learn from it, with the same flags: {compress_it} {path}"
    )


def planned(run: CompressConfig, prompts: list[str], output_dir: str) -> Outcome:
    """Return what would be recorded."""
    models = models_of(str(run.pretrained_model_name_or_path))
    (name,) = [name for name in models if name in DENOISER_COMPONENTS][:1] or [next(iter(models))]
    document = {
        "dry_run": True,
        "output_dir": output_dir,
        "component": name,
        "num_trajectories": run.num_trajectories,
        "num_inference_steps": run.num_inference_steps,
        "num_prompts": len(prompts),
    }
    text = (
        f"{run.num_trajectories} trajectories of {run.num_inference_steps} steps of the {name} would be recorded, "
        f"with {len(prompts)} prompts, in {output_dir}. Nothing was written."
    )
    return Outcome(document, text)


COMMAND = Command(
    name="calibrate",
    summary="record a calibration set: full-precision trajectories of a pipeline",
    description="Record a calibration set: the full-precision trajectories of a pipeline, called as you call it, "
    "which PQ and CAD learn from: in Python (`progressive_quantize`, `distill`), or by `pqcad compress "
    "--calibration_set`, which otherwise records its own.",
    example="pqcad calibrate my/text-to-image --prompts_file prompts.txt -o outputs/calibration",
    parts=(OUTPUT_DIR, RUN, TRIAL),
    operands={"pretrained_model_name_or_path": "MODEL"},
    settings=settings_of,
    run=run,
    kept=lambda settings: "A calibration set is written whole or not at all. To start over:",
)
