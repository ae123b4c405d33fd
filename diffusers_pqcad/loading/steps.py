"""Students called in other steps than theirs: a warning before the first of them.

A student's scheduler knows its steps, but `DDIMPipeline` makes a plain one of any, and users put others in its place.
What the model sees of the steps is its timestep: pipelines hand over a view of one of their scheduler's timesteps, and
its storage is that of all of them.
"""

from typing import Any

from torch import Tensor

from diffusers_pqcad.loading.coverage import warn_once


def warn_of_steps(mine: int, asked: int) -> None:
    """Warn, once, that a student of `mine` steps is called in `asked` steps, where these are others."""
    if asked != mine:
        warn_once(
            f"This student was distilled to {mine} steps, and is called in {asked}: call its pipeline with "
            f"num_inference_steps={mine}."
        )


def number_of_timesteps(timestep: Any) -> int | None:
    """Return how many timesteps there are where `timestep` is one of several; None where it stands for itself.

    It may be repeated for each image of a batch, as `expand` does it.
    """
    if not isinstance(timestep, Tensor) or not (timestep.numel() == 1 or not any(timestep.stride())):
        return None
    count = timestep.untyped_storage().nbytes() // timestep.element_size()
    return count if count > 1 else None
