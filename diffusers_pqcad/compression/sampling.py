"""Seeded sampling: noise that depends on the seed and the image alone, and the steps of a scheduler from there."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class SamplingStep(NamedTuple):
    """One denoising step: `timestep` (int), `sample` z_t and `model_output`, both (B, C, H, W)."""

    timestep: int
    sample: Tensor
    model_output: Tensor


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
