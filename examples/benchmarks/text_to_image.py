"""The text-to-image pipelines of the benchmarks: diffusers' classes, shapes that users know, random weights."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import models
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PROMPT = "a photograph of an astronaut riding a horse"
VAES = ("kl", "tiny")
TINY_VAE = "tiny_vae"  # its folder, beside those of the pipeline
LATENT_CHANNELS = 4
CLIP_L = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": models.NUM_TEXT_TOKENS,
}
BIG_G = CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),  # the number of heads
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
TINY_CLIP = CLIP_L | {
    "vocab_size": 2048, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
}  # fmt: skip
TINY_VAE_SHAPE = VAE | {"block_out_channels": (16, 16, 16, 16), "layers_per_block": 1, "norm_num_groups": 8}


class Shape(NamedTuple):
    """The configs of a pipeline: its UNet, its text encoders (the second: of SDXL), its autoencoder."""

    unet: dict[str, Any]
    texts: tuple[dict[str, Any], ...]
    vae: dict[str, Any]
    tiny_vae: dict[str, Any]


SHAPES = {
    "sd15": Shape(models.SD15, (CLIP_L,), VAE, {}),
    "sdxl": Shape(SDXL, (CLIP_L, BIG_G), VAE | {"scaling_factor": 0.13025}, {}),
    "tiny": Shape(
        models.SD15 | models.SMALL | {"cross_attention_dim": 8},
        (TINY_CLIP,),
        TINY_VAE_SHAPE,
        {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4},
    ),
    "tiny-xl": Shape(
        SDXL
        | {
            "block_out_channels": (32, 32, 32), "attention_head_dim": 2, "transformer_layers_per_block": 1,
            "norm_num_groups": 8, "cross_attention_dim": 16, "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 6 * 8 + 8,
        },
        (TINY_CLIP, TINY_CLIP | {"projection_dim": 8}),
        TINY_VAE_SHAPE,
        {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4},
    ),
}  # fmt: skip


def shape_of(name: str) -> Shape:
    """Return the shape `name`; ValueError for an unknown one."""
    if name not in SHAPES:
        raise ValueError(f"model: expected one of {tuple(SHAPES)}, got {name!r}.")
    return SHAPES[name]


def tokenizer() -> CLIPTokenizer:
    """Return a tokenizer in which each word of the prompt is one token, and a prompt as long as CLIP's."""
    examples = str(Path(__file__).resolve().parents[1])
    if examples not in sys.path:
        sys.path.append(examples)
    built = import_module("small_pipelines").build_tokenizer([PROMPT])
    built.model_max_length = models.NUM_TEXT_TOKENS
    return built


def build(name: str, seed: int = 0) -> Any:
    """Return the pipeline `name` in fp32, with AutoencoderKL and random weights under `seed`."""
    shape, words = shape_of(name), tokenizer()
    torch.manual_seed(seed)
    ends = {key: getattr(words, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    configs = [CLIPTextConfig(**(text | ends)) for text in shape.texts]
    parts = {
        "vae": AutoencoderKL(**shape.vae),
        "text_encoder": CLIPTextModel(configs[0]),
        "tokenizer": words,
        "unet": UNet2DConditionModel(**shape.unet),
        "scheduler": scheduler(),
    }
    if len(configs) == 1:
        return StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    second = CLIPTextModelWithProjection(configs[1])
    return StableDiffusionXLPipeline(**parts, text_encoder_2=second, tokenizer_2=words, add_watermarker=False)


def scheduler() -> DDIMScheduler:
    """Return the scheduler of all contestants, with the noise levels of SD-1.5."""
    return DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, timestep_spacing="trailing",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip


def save(name: str, folder: Path, seed: int = 0) -> None:
    """Write the pipeline `name` to `folder`, and an AutoencoderTiny beside it, unless they are there."""
    if (folder / "model_index.json").exists():
        return
    pipeline = build(name, seed)
    torch.manual_seed(seed)
    AutoencoderTiny(**shape_of(name).tiny_vae).save_pretrained(folder / TINY_VAE)
    pipeline.save_pretrained(folder)


def pipeline_class(folder: Path) -> Any:
    """Return the class of the pipeline in `folder`."""
    return StableDiffusionXLPipeline if (folder / "text_encoder_2").exists() else StableDiffusionPipeline


def load(folder: Path, vae: str, dtype: torch.dtype = torch.float32) -> Any:
    """Return the pipeline in `folder`, with the tiny autoencoder where `vae` says so."""
    parts: dict[str, Any] = {}
    if vae == "tiny":
        parts["vae"] = AutoencoderTiny.from_pretrained(folder / TINY_VAE, dtype=dtype)
    return pipeline_class(folder).from_pretrained(folder, dtype=dtype, **parts)


def draw_latents(size: int, seed: int) -> Tensor:
    """Return the noise that an image of `size` x `size` pixels begins with."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1, LATENT_CHANNELS, size // 8, size // 8, generator=generator)
