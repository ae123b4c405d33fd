"""A pipeline from one .safetensors file, of the denoiser or of everything, and another that says what is missing."""

from pathlib import Path
from typing import Any

import diffusers
from diffusers import DiffusionPipeline
from diffusers.loaders.single_file_utils import (
    SingleFileComponentError,
    fetch_diffusers_config,
    load_single_file_checkpoint,
)

from diffusers_pqcad.loading.config import DENOISER_COMPONENTS
from diffusers_pqcad.loading.saved import headers_of, is_model

WHOLE_PIPELINES = ("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.")


def is_single_file(path: str | Path) -> bool:
    """Return whether `path` is one file of weights, and no folder or repository."""
    return Path(path).is_file()


def check_single_file(path: str | Path, pipeline: str | None) -> None:
    """Raise ValueError for a file that is no safetensors file, or whose other parts nobody could know."""
    if Path(path).suffix != ".safetensors":
        raise ValueError(
            f"{path}: expected a .safetensors file, a folder, or a repository of the Hub, got another file."
        )
    names = headers_of(Path(path))
    if pipeline is None and not holds_pipeline(names):
        raise ValueError(
            f"{path}: it holds one model, of {len(names)} tensors. Say with --pipeline, a folder or a repository of "
            "the Hub, which pipeline it belongs to: its config and the other parts come from there."
        )


def holds_pipeline(names: Any) -> bool:
    """Return whether the tensors `names` are those of a whole pipeline, as the first Stable Diffusion was saved."""
    return sum(any(name.startswith(prefix) for name in names) for prefix in WHOLE_PIPELINES) > 1


def load_single_file(path: str | Path, pipeline: str | None, **options: Any) -> Any:
    """Return the float pipeline of a file; `pipeline`, a folder or repository, says what the file does not.

    `options` are those of `from_pretrained`. Raises ValueError, as `check_single_file`, and for a file that does not
    fit the pipeline.
    """
    check_single_file(path, pipeline)
    if pipeline is None:
        pipeline = fetch_diffusers_config(load_single_file_checkpoint(str(path)))["pretrained_model_name_or_path"]
    index = DiffusionPipeline.load_config(pipeline)
    if holds_pipeline(headers_of(Path(path))):
        kind: Any = getattr(diffusers, index["_class_name"])
        return kind.from_single_file(str(path), config=pipeline, **options)
    name = next((part for part in DENOISER_COMPONENTS if is_model(index.get(part))), None)
    if name is None:
        raise ValueError(f"{pipeline}: expected a pipeline with one of {DENOISER_COMPONENTS}, got {sorted(index)}.")
    model_kind: Any = getattr(diffusers, index[name][1])
    try:
        model = model_kind.from_single_file(str(path), config=pipeline, subfolder=name, **options)
    except (KeyError, RuntimeError, TypeError, SingleFileComponentError) as error:
        raise ValueError(f"{path}: it is no {model_kind.__name__} as {pipeline} has it ({error}).") from error
    return DiffusionPipeline.from_pretrained(pipeline, **{name: model}, **options)
