"""The families of denoisers and their companions: real diffusers classes at tiny size, random weights, one seed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from diffusers import (
    AutoencoderKL,
    ControlNetModel,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import Tensor, nn

SIZE, TOKENS = 8, 3


class Family(NamedTuple):
    """How to build a model, and what to call it with: `inputs(model, batch, size)`; its timestep goes by keyword."""

    build: Callable[[], Any]
    inputs: Callable[[int, int], dict[str, Any]]
    has_convs: bool = True
    has_timestep: bool = True
    lora_targets: tuple[str, ...] = ("to_q", "to_v")


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def unet() -> UNet2DModel:
    return UNet2DModel(
        sample_size=SIZE,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=4,
    )


BLOCKS = {
    "sample_size": SIZE,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "cross_attention_dim": 8,
    "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}
SD2 = {"use_linear_projection": True, "attention_head_dim": (2, 4)}
SDXL = SD2 | {
    "transformer_layers_per_block": (1, 2),
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 8,
}


def sd15() -> UNet2DConditionModel:
    return UNet2DConditionModel(attention_head_dim=4, **BLOCKS)


def sd2() -> UNet2DConditionModel:
    return UNet2DConditionModel(**BLOCKS, **SD2)


def sdxl() -> UNet2DConditionModel:
    return UNet2DConditionModel(**BLOCKS, **SDXL)


def controlnet() -> ControlNetModel:
    blocks = {key: value for key, value in BLOCKS.items() if key not in ("sample_size", "up_block_types")}
    model = ControlNetModel(attention_head_dim=4, conditioning_embedding_out_channels=(4, 8), **blocks)
    for layer in [*model.controlnet_down_blocks, model.controlnet_mid_block]:
        nn.init.normal_(layer.weight)  # they start at zero, and nothing could be told from the outputs
    return model


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=SIZE,
    )


def dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=SIZE,
        patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip


def pixart() -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, sample_size=SIZE,
        patch_size=2, cross_attention_dim=16, caption_channels=8, use_additional_conditions=False,
    )  # fmt: skip


def sd3() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=SIZE, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=8, caption_projection_dim=16, pooled_projection_dim=8,
        pos_embed_max_size=32,
    )  # fmt: skip


def flux() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip


def latents(batch: int, size: int) -> Tensor:
    return noise(batch, 4, size, size)


def text(batch: int) -> Tensor:
    return noise(batch, TOKENS, 8)


def added(batch: int) -> dict[str, Any]:
    return {"added_cond_kwargs": {"text_embeds": noise(batch, 8), "time_ids": torch.ones(batch, 6)}}


def flux_inputs(batch: int, size: int) -> dict[str, Any]:
    image_ids = torch.cartesian_prod(torch.arange(1), torch.arange(size), torch.arange(size)).float()
    return {
        "hidden_states": noise(batch, size * size, 4),
        "encoder_hidden_states": text(batch),
        "pooled_projections": noise(batch, 8),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(TOKENS, 3),
    }


def text_unet_inputs(batch: int, size: int) -> dict[str, Any]:
    return {"sample": latents(batch, size), "encoder_hidden_states": text(batch)}


CONV_LORA = ("to_q", "to_v", "conv1", "ff.net.2")
FAMILIES = {
    "UNet2DModel": Family(
        unet, lambda batch, size: {"sample": latents(batch, size)}, lora_targets=("to_q", "to_v", "conv1")
    ),
    "SD-1.5 UNet": Family(sd15, text_unet_inputs, lora_targets=CONV_LORA),
    "SD-2 UNet": Family(sd2, text_unet_inputs, lora_targets=CONV_LORA),
    "SDXL UNet": Family(
        sdxl, lambda batch, size: text_unet_inputs(batch, size) | added(batch), lora_targets=CONV_LORA
    ),
    "ControlNet": Family(
        controlnet,
        lambda batch, size: text_unet_inputs(batch, size) | {"controlnet_cond": noise(batch, 3, 2 * size, 2 * size)},
        lora_targets=CONV_LORA,
    ),
    "AutoencoderKL": Family(
        vae,
        lambda batch, size: {"sample": noise(batch, 3, size, size)},
        has_timestep=False,
        lora_targets=("to_q", "to_v", "conv1"),
    ),
    "DiT": Family(
        dit,
        lambda batch, size: {
            "hidden_states": latents(batch, size),
            "class_labels": torch.arange(batch) % 10,
        },
        has_convs=False,
    ),
    "PixArt": Family(
        pixart,
        lambda batch, size: {
            "hidden_states": latents(batch, size),
            "encoder_hidden_states": text(batch),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
        has_convs=False,
    ),
    "SD3": Family(
        sd3,
        lambda batch, size: {
            "hidden_states": latents(batch, size),
            "encoder_hidden_states": text(batch),
            "pooled_projections": noise(batch, 8),
        },
        has_convs=False,
    ),
    "Flux": Family(flux, flux_inputs, has_convs=False),
}


def build(family: str) -> Any:
    """Return the model of `family` in eval mode, the same weights each time."""
    torch.manual_seed(0)
    model = FAMILIES[family].build().eval()
    for name, parameter in model.named_parameters():
        # Some layers start at zero (adaLN, last projections), which would hide whatever happens before them.
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
        assert parameter.isfinite().all(), name
    return model


def inputs_of(family: str, *, batch: int = 2, size: int = SIZE, timestep: Any = 500, dtype: Any = None) -> dict:
    """Return the keyword arguments of a call; floats in `dtype`."""
    values = dict(FAMILIES[family].inputs(batch, size))
    if FAMILIES[family].has_timestep:
        if isinstance(timestep, list):  # a number, as it is
            values["timestep"] = timestep[0]
        else:
            values["timestep"] = torch.full((batch,), timestep) if isinstance(timestep, int) else timestep

    def cast(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cast(item) for key, item in value.items()}
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if dtype is not None and is_float else value

    return {key: cast(value) if key != "timestep" else value for key, value in values.items()}


def output_of(model: Any, inputs: dict) -> Tensor:
    """Return the first output tensor of a call; gradients as the caller has them."""
    output = model(**inputs, return_dict=False)
    while not isinstance(output, Tensor):
        output = output[-1] if isinstance(output[0], (list, tuple)) else output[0]
    return output


@torch.no_grad()
def call(model: Any, family: str, **options: Any) -> Tensor:
    """Return the output of `model` for the inputs of its family, without gradients."""
    return output_of(model, inputs_of(family, **options))
