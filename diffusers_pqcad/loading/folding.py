"""Models with folded guidance, called otherwise: a warning before the first step.

The pipelines of most transformers have no switch that a folded model could turn, and no scheduler learns of guidance.
What the model sees of it is a batch with two branches.
"""

from typing import Any

import torch
from torch import Tensor, nn

from diffusers_pqcad.layers.timesteps import is_traced
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.loading.coverage import warn_once


def install_folded_warning_(model: nn.Module, config: PQCADConfig) -> None:
    """Let a `model` with folded guidance warn of calls with two branches, where its pipeline has no switch for them.

    diffusers makes no second branch where a UNet's config has `time_cond_proj_dim`.
    """
    switch = getattr(getattr(model, "config", None), "time_cond_proj_dim", None)
    if config.guidance_folded and switch is None:
        model.register_forward_pre_hook(warn_if_guided, with_kwargs=True)


def remove_folded_warning_(model: nn.Module) -> None:
    """Undo `install_folded_warning_`."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if hook is warn_if_guided:
            del model._forward_pre_hooks[key], model._forward_pre_hooks_with_kwargs[key]


def warn_if_guided(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward-pre-hook: warn, once, of a call in which each state stands twice, as guidance does it."""
    if is_traced():
        return
    state = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
    if not isinstance(state, Tensor) or len(state) % 2 or not torch.equal(*state.chunk(2)):
        return
    config = model.config.quantization_config
    found = config if isinstance(config, dict) else vars(config)
    steps = "" if found["num_inference_steps"] is None else f", num_inference_steps={found['num_inference_steps']}"
    warn_once(
        f"{type(model).__name__}: guidance is folded into this model, and it is called with two branches, as with a "
        "guidance_scale above 1: its images are guided twice, and take twice as long. Call its pipeline with "
        f"guidance_scale=1{steps}."
    )
