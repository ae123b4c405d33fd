"""What the commands that run pipelines share: flags of `CompressConfig`, threads, and loading."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from diffusers_pqcad.cli.saved_source import models_of
from diffusers_pqcad.publishing.pipelines import inputs_of_run, prompts_of
from diffusers_pqcad.publishing.run_folder import PROMPTS_FILE
from diffusers_pqcad.publishing.settings import CompressConfig, Part, config_of

# Of a run of `compress`: what its pipelines are called with.
INPUTS = (
    "prompts_file",
    "dataset_name",
    "dataset_config_name",
    "prompt_column",
    "negative_prompt",
    "class_labels",
    "guidance_scale",
    "height",
    "width",
    "max_sequence_length",
)
CALLS = ("num_inference_steps", *INPUTS, "sampling_batch_size", "num_threads", "seed")


HELPS = {
    "num_inference_steps": "steps of a pipeline that was not distilled for fewer",
    "prompts_file": "text file with a prompt in each line, for text-to-image pipelines. None: prompts.txt in the "
    "first pipeline's folder",
    "dataset_name": "data set with prompts, in the place of prompts_file: a repository of the Hub or a folder",
    "num_images": "images that are made by each pipeline; of more than there are prompts, these start over",
}


def run_part(title: str, names: tuple[str, ...], defaults: Mapping[str, Any]) -> Part:
    """Return those of the flags of `CompressConfig` that a command takes."""
    return Part(title, CompressConfig, names, defaults=defaults, helps=HELPS)


def run_of(part: Part, values: Mapping[str, Any]) -> CompressConfig:
    """Return a run of the flags `values`, in which nothing is distilled; raises ValueError for one that cannot be."""
    return config_of(part, values, num_halvings=0)


def with_prompts(run: CompressConfig, path: str) -> CompressConfig:
    """Return `run` with the prompts that lie in the folder of its pipeline, `path`, where it names no others."""
    beside = Path(path) / PROMPTS_FILE
    takes_others = run.prompts_file is not None or run.dataset_name is not None or bool(run.class_labels)
    return run if takes_others or not beside.is_file() else replace(run, prompts_file=str(beside))


def inputs_of(run: CompressConfig) -> list[dict[str, Any]] | None:
    """Return the inputs of all prompts or classes of `run`, in their order; None for a pipeline without."""
    prompts = prompts_of(run)
    whole = replace(run, num_trajectories=max(4, len(prompts)))
    return inputs_of_run(whole, prompts).recorded


def planned_calls(
    paths: Sequence[str], run: CompressConfig, inputs: Sequence[Any] | None, **output: Any
) -> dict[str, Any]:
    """Return which pipelines would make how many images of how many prompts, from headers, as JSON values.

    `output` is where the result would go.
    """
    return {
        "dry_run": True,
        "models": {path: sorted(models_of(path)) for path in paths},
        "num_images": run.num_images,
        "num_prompts": 0 if inputs is None else len(inputs),
        **output,
    }


def load_pipeline(path: str, flag: str) -> Any:
    """Return the pipeline of a folder or repository, with the LoRA that `compress` saved beside it, if any.

    Raises ValueError, naming the `flag`, for one that cannot be loaded.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(path)
    except (OSError, ValueError) as error:
        where = "cannot be loaded" if Path(path).is_dir() else "no such folder, and not to be had from the Hub"
        raise ValueError(f"{flag}: {path!r}: {where}. {error}") from error
    if (Path(path) / "pytorch_lora_weights.safetensors").is_file() and (Path(path) / "metrics.json").is_file():
        pipeline.load_lora_weights(path)
    return pipeline
