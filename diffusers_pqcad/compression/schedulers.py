"""A scheduler that a `Grid` describes, from the one that a user's pipeline came with.

What a model was trained for is in its scheduler's config: a table of noise levels and a prediction type, or the shift
of flow matching. How to step through it is the scheduler's class. The first is kept here, the second becomes DDIM with
eta = 0 on a trailing grid, or Euler of flow matching.
"""

import inspect
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusers_pqcad.compression.grid import PREDICTION_TYPES, check_flow

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")  # those that DDIMScheduler knows by name
OTHER_STEPS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
NOISE_LEVELS_TOLERANCE = 1e-6  # of alphas_cumprod; schedulers that divide by its last write 2**-24 (6e-8) for 0

# Their configs look like those of schedulers that can be replaced; their steps, or their models, are others.
FEW_STEPS = (
    "its model was distilled to a few steps of its own, and makes other images in those of DDIM or Euler. "
    "Use the model that it was distilled from, with that model's scheduler"
)
BACKWARDS = "it takes images to noise. Use the scheduler that takes noise to images"
REFUSED = {
    "DDIMInverseScheduler": BACKWARDS,
    "DPMSolverMultistepInverseScheduler": BACKWARDS,
    "FlowMapEulerDiscreteScheduler": FEW_STEPS,
    "FlowMatchLCMScheduler": FEW_STEPS,
    "LCMScheduler": FEW_STEPS,
    "TCDScheduler": FEW_STEPS,
}
# `num_train_timesteps` and `shift` are all that is in its config, as in those of other schedulers.
FLOW_MATCHING = ("FlowMatchHeunDiscreteScheduler",)


def deterministic_scheduler(scheduler: Any) -> tuple[Any, str | None]:
    """Return the scheduler to record and sample with in place of `scheduler`, and a line that says what changed.

    A trailing DDIMScheduler that does not clip, and a FlowMatchEulerDiscreteScheduler, come back as they are, with
    None. Any other becomes one of the two with the noise levels and the prediction type, or the shift, of the first.
    That a model was distilled to few steps is seen by the scheduler's class alone: SDXL-Turbo and FLUX.1-schnell come
    with schedulers of undistilled models.

    Raises ValueError for a scheduler whose model was trained in another way (EDM, consistency, score SDEs, discrete
    diffusion) or to few steps (LCM, TCD); for one whose model gets other inputs (`timestep_type="continuous"`) or
    gives other outputs (a learned variance); for one whose table of noise levels its config does not give; and for the
    noise of `stochastic_sampling` and the direction of `invert_sigmas`.
    """
    name = type(scheduler).__name__
    if name in REFUSED:
        raise ValueError(f"{_unusable(scheduler)}: {REFUSED[name]}.")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        check_flow(scheduler)
        return scheduler, None
    entries = _entries(scheduler)
    prediction_type = entries.get("prediction_type")
    if name in FLOW_MATCHING or (
        prediction_type == "flow_prediction" and entries.get("use_flow_sigmas") and "flow_shift" in entries
    ):
        return _flow_matching_euler(scheduler)
    if (
        prediction_type in PREDICTION_TYPES
        and {"beta_schedule", "trained_betas"} <= entries.keys()
        and not entries.get("use_flow_sigmas")
    ):
        return _trailing_ddim(scheduler)
    raise ValueError(
        f"{_unusable(scheduler)} with prediction_type={prediction_type!r} and use_flow_sigmas="
        f"{entries.get('use_flow_sigmas', False)}. Expected one of a model that was trained as DDPM is (beta_schedule "
        f"and trained_betas in its config, and a prediction_type of {PREDICTION_TYPES}), or by flow matching "
        "(FlowMatchEulerDiscreteScheduler, or prediction_type='flow_prediction' with use_flow_sigmas=True). Give the "
        "pipeline such a scheduler if its model was trained so; if not, quantize without trajectories "
        "(PQCADConfig, quantize_)."
    )


def _trailing_ddim(scheduler: Any) -> tuple[Any, str | None]:
    """Return the DDIMScheduler of the model of `scheduler`, trailing and without clipping, and what changed.

    Not by `from_config`, which leaves out what `scheduler` has by default, and so takes DDIM's defaults: other betas
    than Heun's, a last step to alpha = 1 where PNDM's goes to the table's first.
    """
    entries = _entries(scheduler)
    if entries.get("variance_type") in ("learned", "learned_range"):
        raise ValueError(
            f"{_unusable(scheduler)} with variance_type={entries['variance_type']!r}: its model gives a variance too, "
            "in channels of its own, which DDIM has no use for. Set variance_type to None if the pipeline drops them."
        )
    if entries.get("timestep_type") == "continuous":
        raise ValueError(
            f"{_unusable(scheduler)} with timestep_type='continuous': its model is called with logarithms of sigma, "
            "and DDIM would call it with timesteps. Quantize without trajectories (PQCADConfig, quantize_)."
        )
    wanted = {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}
    if isinstance(scheduler, DDIMScheduler) and all(entries[entry] == wanted[entry] for entry in wanted):
        return scheduler, None
    kept = {entry: value for entry, value in entries.items() if entry in inspect.signature(DDIMScheduler).parameters}
    if entries["beta_schedule"] not in BETA_SCHEDULES:
        # The table is all that is left of the name; it is rescaled already.
        kept |= {"trained_betas": scheduler.betas.tolist(), "beta_schedule": "linear", "rescale_betas_zero_snr": False}
    # Where the class does not read it, it is what the model came with. Where it is missing, the last sigma tells.
    to_one = scheduler.config.get("set_alpha_to_one", entries.get("final_sigmas_type", "zero") == "zero")
    ddim = DDIMScheduler(**kept | wanted | {"set_alpha_to_one": to_one})
    levels, expected = ddim.alphas_cumprod, scheduler.alphas_cumprod.cpu().float()
    if levels.shape != expected.shape or not torch.allclose(levels, expected, rtol=0, atol=NOISE_LEVELS_TOLERANCE):
        raise ValueError(
            f"{_unusable(scheduler)}: DDIM's noise levels (alphas_cumprod) would be others than its own, which its "
            "betas alone do not give. Quantize without trajectories (PQCADConfig, quantize_)."
        )
    return ddim, _replaced(scheduler, ddim, "the same noise levels and prediction type", wanted)


def _flow_matching_euler(scheduler: Any) -> tuple[Any, str]:
    """Return the FlowMatchEulerDiscreteScheduler of the model of `scheduler`, and what changed.

    The shift is the same. The steps are not: Euler's own N go from sigma 1 to the least of the training, those of
    other classes to 1 / N or thereabouts. The model is called with fp32 timesteps, where others round down.
    """
    entries = _entries(scheduler)
    names = ("num_train_timesteps", "use_dynamic_shifting", "time_shift_type", "shift_terminal")
    kept = {name: entries[name] for name in names if name in entries}
    # No class but Euler's reads these: pipelines do, for the mu that they hand to it.
    names = ("base_shift", "max_shift", "base_image_seq_len", "max_image_seq_len")
    kept |= {name: scheduler.config[name] for name in names if name in scheduler.config}
    euler = FlowMatchEulerDiscreteScheduler(shift=entries.get("shift", entries.get("flow_shift")), **kept)
    return euler, _replaced(scheduler, euler, "the same shift", {})


def _entries(scheduler: Any) -> dict[str, Any]:
    """Return the config entries that the class of `scheduler` reads; `from_config` leaves others' beside them."""
    names = inspect.signature(type(scheduler)).parameters
    return {name: scheduler.config[name] for name in names if name in scheduler.config}


def _unusable(scheduler: Any) -> str:
    """Return how an error begins."""
    return f"scheduler: PQ and CAD cannot record or distill the steps of a {type(scheduler).__name__}"


def _replaced(scheduler: Any, by: Any, kept: str, wanted: dict[str, Any]) -> str:
    """Return a line for the user: which scheduler takes the place of which, what is kept and which entries changed."""
    entries = _entries(scheduler)
    wanted = wanted | {entry: False for entry in OTHER_STEPS}
    changed = [f"{entry}={entries[entry]!r}" for entry in wanted if entries.get(entry, wanted[entry]) != wanted[entry]]
    without = f", without its {', '.join(changed)}" if changed else ""
    return f"{type(scheduler).__name__} is replaced by a {type(by).__name__} with {kept}{without}: other steps."
