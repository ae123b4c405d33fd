"""What a student's model sees of its calls: it warns before the first step of one that is not as it was distilled.

Not every pipeline takes its steps from a student's scheduler, or leaves guidance out where it is folded in.
"""

from typing import Any

from torch import nn

from diffusers_pqcad.layers.timesteps import given_timestep, is_traced, place_of_timestep
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.loading.coverage import warn_once
from diffusers_pqcad.loading.folding import SeenCall, has_two_branches, is_other_branch, seen_call
from diffusers_pqcad.loading.steps import number_of_timesteps, warn_of_steps


class WatchedCalls:
    """Forward-pre-hook of a student: warns, once each, of other steps than its own, and of a second branch.

    `num_inference_steps` are those of the student, if they are known. `guidance_folded`: there is to be one branch.
    """

    def __init__(self, num_inference_steps: int | None, guidance_folded: bool) -> None:
        self.num_inference_steps, self.guidance_folded = num_inference_steps, guidance_folded
        self.last: SeenCall | None = None

    def __reduce__(self) -> Any:
        return type(self), (self.num_inference_steps, self.guidance_folded)  # calls are neither copied nor pickled

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at a call; at nothing where a graph is made of it."""
        if is_traced():
            return
        kind: Any = type(model)
        timestep = given_timestep(place_of_timestep(kind), args, kwargs)
        if self.num_inference_steps is not None:
            warn_of_steps(self.num_inference_steps, number_of_timesteps(timestep) or self.num_inference_steps)
        if self.guidance_folded:
            before, self.last = self.last, seen_call(timestep, args, kwargs)
            if is_guided(before, self.last):
                warn_of_guidance(kind.__name__, self.num_inference_steps)


def is_guided(before: SeenCall | None, now: SeenCall | None) -> bool:
    """Return whether a call has two branches, or is another one than that of the call before."""
    if now is None:
        return False
    return has_two_branches(now) or (before is not None and is_other_branch(before, now))


def warn_of_guidance(name: str, num_inference_steps: int | None) -> None:
    """Warn, once, that the model `name` with folded guidance is guided."""
    steps = "" if num_inference_steps is None else f", num_inference_steps={num_inference_steps}"
    warn_once(
        f"{name}: guidance is folded into this model, and it is called with two branches, as with a guidance_scale "
        "above 1: its images are guided twice, and take twice as long. Call its pipeline with "
        f"guidance_scale=1{steps}."
    )


def watch_calls_(model: Any, config: PQCADConfig) -> None:
    """Let a `model` that is a student by its `config` look at its calls; one that is none, or no longer, does not.

    diffusers makes no second branch where a UNet's config has `time_cond_proj_dim`.
    """
    unwatch_calls_(model)
    switch = getattr(getattr(model, "config", None), "time_cond_proj_dim", None)
    watched = WatchedCalls(config.num_inference_steps, config.guidance_folded and switch is None)
    if watched.num_inference_steps is not None or watched.guidance_folded:
        model.register_forward_pre_hook(watched, with_kwargs=True)


def unwatch_calls_(model: nn.Module) -> None:
    """Undo `watch_calls_`."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, WatchedCalls):
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]
