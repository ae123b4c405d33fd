"""Specification of seeded sampling, against diffusers' own scheduler and pipeline."""

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline

from diffusers_pqcad.compression.denoiser import Denoiser, states_of
from diffusers_pqcad.compression.grid import grid_of
from diffusers_pqcad.compression.sampling import image_generator, initial_noise, sample_shape

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


def test_the_shape_of_samples(tiny_pipeline: DDIMPipeline) -> None:
    assert sample_shape(tiny_pipeline.unet) == (1, 8, 8)


def test_the_noise_is_what_a_pipeline_draws_from_the_generators(tiny_pipeline: DDIMPipeline) -> None:
    generators = [image_generator(7, index) for index in range(3)]
    noise = initial_noise((1, 8, 8), seed=7, start=0, count=3)
    images = tiny_pipeline(
        batch_size=3, generator=generators, num_inference_steps=10, output_type="np"
    ).images  # (3, 8, 8, 1) in [0, 1]
    grid = grid_of(tiny_pipeline.scheduler, 10)
    samples = states_of(Denoiser(tiny_pipeline.unet), grid, noise, lambda step: {})[-1]
    expected = (samples / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, expected, atol=1e-5)
