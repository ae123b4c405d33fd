"""Specification of seeded sampling, against diffusers' own scheduler and pipeline."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from diffusers_pqcad.compression.sampling import denoise, generate, initial_noise, sample_shape

pytestmark = pytest.mark.fast


def test_noise_does_not_depend_on_the_batches() -> None:
    whole = initial_noise((1, 8, 8), seed=3, start=0, count=7)
    assert whole.shape == (7, 1, 8, 8)
    assert whole.dtype == torch.float32
    parts = [initial_noise((1, 8, 8), seed=3, start=start, count=count) for start, count in ((0, 2), (2, 1), (3, 4))]
    assert torch.equal(torch.cat(parts), whole)
    torch.randn(5)  # the global generator plays no part
    assert torch.equal(initial_noise((1, 8, 8), seed=3, start=4, count=1), whole[4:5])
    assert not torch.equal(initial_noise((1, 8, 8), seed=4, start=0, count=7), whole)
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 7


def test_noise_is_standard_normal() -> None:
    noise = initial_noise((1, 16, 16), seed=0, start=0, count=64)
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert abs(noise.std().item() - 1) < 4 / (2 * noise.numel()) ** 0.5


def test_samples_are_those_of_the_pipeline(tiny_pipeline: DDIMPipeline) -> None:
    shape = sample_shape(tiny_pipeline.unet)
    assert shape == (1, 8, 8)
    noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(7))
    expected = tiny_pipeline(
        batch_size=3, generator=torch.Generator().manual_seed(7), num_inference_steps=10, output_type="np"
    ).images  # (3, 8, 8, 1) in [0, 1]
    samples = generate(tiny_pipeline.unet, tiny_pipeline.scheduler, noise, 10)
    assert np.array_equal((samples / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), expected)


def test_denoise_yields_every_step(tiny_unet: UNet2DModel, tiny_scheduler: DDIMScheduler) -> None:
    noise = initial_noise(sample_shape(tiny_unet), seed=0, start=0, count=2)
    steps = list(denoise(tiny_unet, tiny_scheduler, noise, 5))
    assert [step.timestep for step in steps] == [999, 799, 599, 399, 199, -1]
    assert torch.equal(steps[0].sample, noise)
    for step, following in zip(steps, steps[1:], strict=False):
        with torch.no_grad():
            assert torch.equal(step.model_output, tiny_unet(step.sample, step.timestep).sample)
        moved = tiny_scheduler.step(step.model_output, step.timestep, step.sample).prev_sample
        assert torch.equal(moved, following.sample)
    assert torch.equal(steps[-1].sample, generate(tiny_unet, tiny_scheduler, noise, 5))
    assert steps[-1].model_output.count_nonzero() == 0


def test_denoise_leaves_the_callers_gradients_on(tiny_unet: UNet2DModel, tiny_scheduler: DDIMScheduler) -> None:
    noise = initial_noise(sample_shape(tiny_unet), seed=0, start=0, count=1)
    for step in denoise(tiny_unet, tiny_scheduler, noise, 2):
        assert torch.is_grad_enabled()
        assert not step.sample.requires_grad
        assert not step.model_output.requires_grad
