"""DDIM arithmetic and seeded sampling: the one place that knows how a model's output moves a sample.

Notation (Song et al. 2021, arXiv:2010.02502; Salimans & Ho 2022, arXiv:2202.00512): a sample at timestep t is
`z_t = alpha_t x + sigma_t eps` with `alpha_t = sqrt(alphas_cumprod[t])`, `sigma_t = sqrt(1 - alphas_cumprod[t])`.
A deterministic DDIM step from t to u keeps (x, eps) and changes the coefficients.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
MAX_STEP_GAIN = 50.0  # a linear schedule starts at 2 to 3, a cosine one (no signal at t = T - 1) at 1500 and more


class SamplingStep(NamedTuple):
    """One denoising step: `timestep` (int), `sample` z_t and `model_output`, both (B, C, H, W)."""

    timestep: int
    sample: Tensor
    model_output: Tensor


def alpha_sigma(scheduler: Any, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """Return alpha_t and sigma_t, fp32, shaped like `timestep`; a negative timestep means data (the final step)."""
    table = scheduler.alphas_cumprod.to(timestep.device, torch.float64)
    final = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=torch.float64, device=timestep.device)
    alphas_cumprod = torch.where(timestep >= 0, table[timestep.clamp(min=0)], final)
    return alphas_cumprod.sqrt().float(), (1 - alphas_cumprod).sqrt().float()


def to_x_and_eps(
    model_output: Tensor, sample: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Return the predicted data x and noise eps of `model_output`; all broadcast against `sample` (B, C, H, W)."""
    if prediction_type == "epsilon":
        return (sample - sigma * model_output) / alpha, model_output
    if prediction_type == "v_prediction":
        return alpha * sample - sigma * model_output, sigma * sample + alpha * model_output
    if prediction_type == "sample":
        return model_output, (sample - alpha * model_output) / sigma
    raise ValueError(f"prediction_type: expected one of {PREDICTION_TYPES}, got {prediction_type!r}.")


def from_x_and_eps(x: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """Return the model output that stands for data `x` and noise `eps`: the inverse of `to_x_and_eps`."""
    if prediction_type == "epsilon":
        return eps
    if prediction_type == "v_prediction":
        return alpha * eps - sigma * x
    if prediction_type == "sample":
        return x
    raise ValueError(f"prediction_type: expected one of {PREDICTION_TYPES}, got {prediction_type!r}.")


def step_gain(scheduler: Any, timestep: Tensor, previous_timestep: Tensor) -> Tensor:
    """Return |d z_u / d model_output| of the DDIM step from t to u: how much an output error moves the sample.

    epsilon: |sigma_u - alpha_u sigma_t / alpha_t|; v: |alpha_t sigma_u - alpha_u sigma_t|;
    sample: |alpha_u - sigma_u alpha_t / sigma_t|. Same shape as `timestep`, fp32.
    """
    alpha_t, sigma_t = alpha_sigma(scheduler, timestep)
    alpha_u, sigma_u = alpha_sigma(scheduler, previous_timestep)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return (sigma_u - alpha_u * sigma_t / alpha_t).abs()
    if prediction_type == "v_prediction":
        return (alpha_t * sigma_u - alpha_u * sigma_t).abs()
    return (alpha_u - sigma_u * alpha_t / sigma_t).abs()


def previous_timesteps(scheduler: Any, timesteps: Tensor, num_inference_steps: int) -> Tensor:
    """Return the timestep that a step from each of `timesteps` lands on; -1 stands for data."""
    return (timesteps - scheduler.config.num_train_timesteps // num_inference_steps).clamp(min=-1)


def timestep_grid(scheduler: Any, num_inference_steps: int) -> Tensor:
    """Return the (N,) int64 timesteps of a trailing DDIM grid, largest first, after checking that it is usable.

    Raises ValueError where N does not divide `num_train_timesteps` (DDIM's own step would leave the grid), where the
    spacing is not "trailing" (the grids of N and N/2 would not nest), or where the first step would amplify an
    epsilon model's error without bound because the start has no signal.
    """
    config = scheduler.config
    if not isinstance(scheduler, DDIMScheduler):
        raise ValueError(
            f"scheduler: expected a DDIMScheduler, got {type(scheduler).__name__}. Use "
            "DDIMScheduler.from_config(scheduler.config, timestep_spacing='trailing')."
        )
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type: expected one of {PREDICTION_TYPES}, got {config.prediction_type!r}.")
    if num_inference_steps < 1 or config.num_train_timesteps % num_inference_steps:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} must divide num_train_timesteps={config.num_train_timesteps}; "
            "take a divisor such as 10, 20, 40 or 50 of 1000."
        )
    if config.timestep_spacing != "trailing":
        raise ValueError(
            f"timestep_spacing: expected 'trailing', got {config.timestep_spacing!r}, whose grids of N and N/2 steps "
            "do not nest. Use DDIMScheduler.from_config(scheduler.config, timestep_spacing='trailing')."
        )
    stride = config.num_train_timesteps // num_inference_steps
    timesteps = torch.arange(config.num_train_timesteps - 1, -1, -stride)
    first = timesteps[:1]
    gain = step_gain(scheduler, first, previous_timesteps(scheduler, first, num_inference_steps)).item()
    if config.prediction_type == "epsilon" and not gain <= MAX_STEP_GAIN:
        raise ValueError(
            f"an epsilon-prediction model cannot start at timestep {first.item()}: there is no signal left there, and "
            f"the first DDIM step multiplies the model's error by {gain:.0f} (limit {MAX_STEP_GAIN:.0f}). Use a v- or "
            "sample-prediction model, or a schedule that ends with some signal (linear betas)."
        )
    return timesteps


def initial_noise(shape: tuple[int, ...], *, seed: int, start: int, count: int) -> Tensor:
    """Return the (count, *shape) fp32 noise of images `start` to `start + count` of `seed`.

    Each image has a generator of its own, so image i is the same in any batch size and on any number of processes.
    """
    draws = [
        torch.randn(shape, generator=torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63))
        for index in range(start, start + count)
    ]
    return torch.stack(draws)


def sample_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return (C, H, W) of the samples that an unconditional diffusers `model` denoises."""
    config: Any = model.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width


@torch.no_grad()  # a decorator, for `with` around a yield would switch off the caller's gradients too
def denoise(
    model: nn.Module, scheduler: Any, noise: Tensor, num_inference_steps: int, **conditioning: Tensor
) -> Iterator[SamplingStep]:
    """Yield every step of the deterministic sampler, then one with timestep -1 that holds the final sample.

    Runs `scheduler.step` itself (eta = 0), so a sample is what a diffusers pipeline would make from the same noise.
    """
    scheduler.set_timesteps(num_inference_steps)
    sample = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        output = model(sample, timestep, **conditioning, return_dict=False)[0]
        yield SamplingStep(int(timestep), sample, output)
        sample = scheduler.step(output, timestep, sample).prev_sample
    yield SamplingStep(-1, sample, torch.zeros_like(sample))


def generate(
    model: nn.Module, scheduler: Any, noise: Tensor, num_inference_steps: int, **conditioning: Tensor
) -> Tensor:
    """Return the final samples (B, C, H, W), in the model's range (about [-1, 1]), from `noise`."""
    *_, last = denoise(model, scheduler, noise, num_inference_steps, **conditioning)
    return last.sample
