"""Two pipelines that are run against each other: what each is called with, and where it is saved."""

from pathlib import Path
from typing import Any

from diffusers_pqcad.compression.denoiser import denoiser_name
from diffusers_pqcad.evaluation.comparison import Side
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.publishing.students import FOLDED_CALL


def side_of(pipeline: Any, path: str, name: str, steps: int | None, otherwise: int) -> Side:
    """Return how `pipeline` is called: in `steps`; None: in those that it was distilled for, or `otherwise`.

    A student with guidance folded in is called without guidance. `path` is where the pipeline is saved.
    """
    component = denoiser_name(pipeline)
    config = own_config(getattr(pipeline, component))
    own = None if config is None else config.num_inference_steps
    folder = Path(path) / component
    return Side(
        name=name,
        pipeline=pipeline,
        num_inference_steps=steps or own or otherwise,
        arguments=dict(FOLDED_CALL) if config is not None and config.guidance_folded else {},
        weights_path=folder if folder.is_dir() else None,
    )


def own_config(model: Any) -> PQCADConfig | None:
    """Return what a quantized model says of itself; None for one in floating point."""
    found = model.config.get("quantization_config")
    if isinstance(found, dict):
        return PQCADConfig.from_dict(found)
    return found if isinstance(found, PQCADConfig) else None


def names_of(first: str, second: str) -> tuple[str, str]:
    """Return what two paths are called: the last part of each, or all of it where these are the same."""
    names = tuple(Path(path).resolve().name if Path(path).exists() else path for path in (first, second))
    return (first, second) if names[0] == names[1] else (names[0], names[1])
