"""Seeded noise: a function of the seed and the image alone."""

from typing import Any

import torch
from torch import Tensor, nn


def image_generator(seed: int, index: int) -> torch.Generator:
    """Return the generator of image `index` of `seed`.

    Each image has one of its own, so image i is the same in any batch size and on any number of processes.
    """
    return torch.Generator().manual_seed((seed * 1_000_003 + index) % 2**63)


def initial_noise(shape: tuple[int, ...], *, seed: int, start: int, count: int) -> Tensor:
    """Return the (count, *shape) fp32 noise of images `start` to `start + count` of `seed` (`image_generator`)."""
    return torch.stack(
        [torch.randn(shape, generator=image_generator(seed, index)) for index in range(start, start + count)]
    )


def sample_shape(model: nn.Module) -> tuple[int, int, int]:
    """Return (C, H, W) of the samples that an unconditional diffusers `model` denoises."""
    config: Any = model.config
    size = config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    return config.in_channels, height, width
