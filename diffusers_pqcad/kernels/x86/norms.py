"""Group norms as csrc/layers.c takes them: a gain and a shift for each channel of each image."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from diffusers_pqcad.kernels.x86.library import compiled
from diffusers_pqcad.kernels.x86.structs import GroupNorm, Image


class Norm(NamedTuple):
    """What a group norm was when it was called: a module that is offloaded loses its parameters afterwards."""

    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.GroupNorm) -> "Norm":
        """Return the norm that `module` computes now."""
        weight, bias = module.weight.detach().contiguous(), module.bias.detach().contiguous()
        return cls(module.num_groups, weight, bias, module.eps)


def group_norm_of(norm: Norm) -> GroupNorm:
    """Return `norm` as C takes it."""
    return GroupNorm(norm.weight.data_ptr(), norm.bias.data_ptr(), norm.num_groups, norm.eps)


def normalization(norm: GroupNorm, source: Tensor, image: Image) -> tuple[Tensor, Tensor]:
    """Return the gain and the shift fp32 (B, C) that are the group norm of `source`, an `image`."""
    gain, shift = torch.empty(2, image.images, image.channels, dtype=torch.float32, device="cpu")
    compiled().normalize(source.data_ptr(), image, norm, gain.data_ptr(), shift.data_ptr())
    return gain, shift
