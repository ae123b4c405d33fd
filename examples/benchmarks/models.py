"""The models of the benchmarks: shapes that users know, with random weights (time does not depend on their values)."""

from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch import Tensor

Inputs = tuple[Tensor, ...]  # sample, timestep, and for a conditional model the text's hidden states

TIMESTEP = 500
NUM_TEXT_TOKENS = 77
BUNDLED = Path(__file__).resolve().parents[1] / "models" / "fashion-mnist"
DDPM_CIFAR10 = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "norm_eps": 1e-6,
    "attention_head_dim": None,  # one head
}
SD15 = {"sample_size": 64, "cross_attention_dim": 768}  # diffusers' defaults are SD-1.5's for all else
HALF = {"block_out_channels": (160, 320, 640, 640)}  # of SD-1.5's channels: a quarter of its time
SMALL = {"block_out_channels": (32, 32, 32, 32), "norm_num_groups": 8}
SHAPES: dict[str, tuple[type, dict[str, Any]]] = {
    "ddpm-cifar10": (UNet2DModel, DDPM_CIFAR10),
    "sd15": (UNet2DConditionModel, SD15),
    "sd-half": (UNet2DConditionModel, SD15 | HALF),
    "tiny": (UNet2DModel, DDPM_CIFAR10 | SMALL | {"sample_size": 16}),
    "tiny-conditional": (UNet2DConditionModel, SD15 | SMALL | {"sample_size": 8, "cross_attention_dim": 8}),
}
NAMES = (*SHAPES, "fashion-mnist")


def build(name: str, seed: int = 0) -> Any:
    """Return the float UNet `name` in fp32: random weights under `seed`, or the bundled teacher."""
    if name == "fashion-mnist":
        return UNet2DModel.from_pretrained(BUNDLED, subfolder="unet").eval()
    if name not in SHAPES:
        raise ValueError(f"model: expected one of {NAMES}, got {name!r}.")
    model_class, config = SHAPES[name]
    torch.manual_seed(seed)
    return model_class(**config).eval()


def draw_inputs(unet: Any, batch_size: int, sample_size: int | None, generator: torch.Generator) -> Inputs:
    """Return random inputs of `unet`; `sample_size` (height and width) defaults to the model's own."""
    size = sample_size or unet.config.sample_size
    sample = torch.randn(batch_size, unet.config.in_channels, size, size, generator=generator)
    if isinstance(unet, UNet2DModel):
        return sample, torch.tensor(TIMESTEP)
    context = torch.randn(batch_size, NUM_TEXT_TOKENS, unet.config.cross_attention_dim, generator=generator)
    return sample, torch.tensor(TIMESTEP), context
