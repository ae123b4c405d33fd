# /// script
# dependencies = ["diffusers-pqcad[train]"]
# ///
"""Compress a diffusers pipeline with one denoiser: progressive quantization, then distillation to fewer steps.

    python examples/distill.py                                  # a bundled teacher of Fashion-MNIST
    python examples/distill.py --pretrained_model_name_or_path examples/models/emoji
    python examples/distill.py --pretrained_model_name_or_path my/pipeline --weight_bits 3 --dry_run
    python examples/distill.py --pretrained_model_name_or_path my/text-to-image \\
        --prompts_file prompts.txt --guidance_scale 7.5 --num_halvings 2 --output_dir outputs/text-to-image

Flags are named as in diffusers' training scripts: examples/guides/runs.md says how they are meant for a run of stages.
Several processes, which `accelerate launch` starts, share the work: examples/guides/scale.md has the commands, from a
laptop to several computers. One process needs no launcher, and no notice of the launcher's defaults then.

The command line of `diffusers_pqcad.publishing.compress`. Every stage leaves its result in `output_dir`; the same
command goes on after a kill and ends with the same weights. The output folder is a loadable pipeline with a card.
"""

import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers_pqcad.cli.command import TRIAL
from diffusers_pqcad.cli.compress import BILL, Job, affordable, job_of, planned, summary
from diffusers_pqcad.compression.extras import MissingExtraError
from diffusers_pqcad.compression.processes import failed_elsewhere, is_main
from diffusers_pqcad.publishing.compress import compress
from diffusers_pqcad.publishing.pipelines import TeacherSource, bundled_source
from diffusers_pqcad.publishing.settings import PARTS, parse_values

MODELS = Path(__file__).resolve().parent / "models"


def bundled(folder: str, features: str, license: str, **defaults: Any) -> TeacherSource:
    """Return a teacher in examples/models, measured with a folder of `features` there."""
    extractor = MODELS / features
    found = str(extractor) if extractor.exists() else None
    return TeacherSource(str(MODELS / folder), f"{folder} (bundled)", found, license, defaults)


# The first is that of a run that names none. Guidance is that of the teachers' cards; with it, half of 20 steps are
# still close to all of them, so these are halved twice. Such a student costs about what two or four guided steps cost.
# Folding is learned prompt by prompt: it takes more of them than quantizing does.
GUIDED: dict[str, Any] = {"guidance_scale": 3.0, "num_halvings": 2, "float_steps": [4, 2], "num_trajectories": 512}
BUNDLED = (
    bundled("fashion-mnist", "fashion-mnist-features", "mit"),
    bundled("fashion-mnist-epsilon", "fashion-mnist-features", "mit"),
    bundled("emoji", "emoji-features", "ofl-1.1", **GUIDED),
    # Its T5 is silent: 256 tokens of it, the pipeline's default, cost several times the time and say nothing.
    bundled("fashion-flow", "fashion-mnist-features", "mit", **GUIDED, max_sequence_length=8),
)


def defaults_of(path: str | None) -> Mapping[str, Any]:
    """Return the settings that suit the bundled teacher in `path`; none for another pipeline."""
    source = bundled_source(path, BUNDLED)
    return {} if source is None else source.defaults


def job_of_command(arguments: list[str]) -> Job:
    """Return what a command line asks for."""
    description = (__doc__ or "").split("\n\n")[0]
    return job_of(parse_values(arguments, description, defaults_of, (*PARTS, BILL, TRIAL)))


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the whole script and return its metrics; of a dry run, its plan."""
    job = job_of_command(sys.argv[1:] if arguments is None else arguments)
    teacher = job.settings.run.pretrained_model_name_or_path or BUNDLED[0].path
    if job.trial.dry_run:
        plan = planned(job.settings, job.bill, teacher)
        if is_main():
            print(plan.text)
        return plan.document
    try:
        settings = affordable(job.settings, job.bill, teacher)
        metrics = compress(*settings, bundled=BUNDLED)
    except KeyboardInterrupt as stopped:
        if is_main():
            print(stopped_text(job.settings.run.output_dir), file=sys.stderr)
        raise SystemExit(getattr(stopped, "exit_code", 130)) from None  # that of SIGTERM, once work has begun
    if is_main():
        print(f"\n{summary(metrics, replace(settings.run, pretrained_model_name_or_path=teacher))}")
    return metrics


def stopped_text(folder: str) -> str:
    """Return what a run that was stopped says."""
    return (
        f"\ndistill.py: stopped. What is finished is kept in {folder}, with a checkpoint of a training that was under "
        f"way. The same command goes on from there: {shlex.join(sys.argv)}"
    )


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, MissingExtraError) as error:
        sys.exit(1 if failed_elsewhere(error) else f"distill.py: {error}")
