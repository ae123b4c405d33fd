"""Whole pipelines that can be called, saved and loaded: real classes at tiny size, random weights, one seed, offline.

Images have 16 pixels a side, latents 4 x 8 x 8 numbers (Wan: 4 x 2 x 8 x 8), texts 16 tokens.
"""

import functools
from collections.abc import Callable, Sequence
from string import ascii_lowercase
from typing import Any, NamedTuple

import families
import numpy as np
import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderKLWan,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from PIL import Image
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

PIXELS, TOKENS = 16, 16
SD_BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PROMPTS = ("red cat", "blue dog", "old house", "a river", "green hat", "two boats", "night", "snow in may")


class Kind(NamedTuple):
    """How to build a pipeline, and what to call it with: `inputs` are those of one image each."""

    build: Callable[[], DiffusionPipeline]
    denoiser: str
    inputs: list[dict[str, Any]]
    arguments: dict[str, Any]


def prepared(build: Callable[[], DiffusionPipeline]) -> Callable[[], DiffusionPipeline]:
    """Return `build`, whose pipeline has the same weights each time, is in eval mode and shows no progress."""

    @functools.wraps(build)
    def build_prepared() -> DiffusionPipeline:
        torch.manual_seed(0)
        pipeline = build()
        for model in pipeline.components.values():
            if isinstance(model, nn.Module):
                model.eval()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return build_prepared


def changed(model: Any, **settings: Any) -> Any:
    """Return a new model of the class and with the config of `model`, except for `settings`."""
    return type(model).from_config(model.config, **settings)


def clip_tokenizer() -> CLIPTokenizer:
    """Return a tokenizer of letters: inside of words, at their ends, and the two special tokens."""
    letters = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase)]
    tokens = [*letters, "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TOKENS)


def t5_tokenizer() -> T5Tokenizer:
    """Return a tokenizer of letters and spaces."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -2.0) for letter in ("▁", *ascii_lowercase)]
    return T5Tokenizer(vocab=special + letters, extra_ids=0, model_max_length=TOKENS)


def clip_config() -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54, bos_token_id=52, eos_token_id=53, pad_token_id=53, hidden_size=8, intermediate_size=16,
        projection_dim=8, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=TOKENS,
        initializer_factor=2.0,  # with 1, texts that no norm ends are too faint
    )  # fmt: skip


def t5_settings(width: int) -> dict[str, Any]:
    return {"vocab_size": 32, "d_model": width, "d_kv": 8, "d_ff": 16, "num_layers": 2, "num_heads": 2}


def vae() -> Any:
    return changed(families.vae(), shift_factor=0.1)  # Flux asks for it


def ddim_scheduler(**settings: Any) -> DDIMScheduler:
    return DDIMScheduler(timestep_spacing="trailing", clip_sample=False, steps_offset=1, **SD_BETAS, **settings)


def sd_parts() -> dict[str, Any]:
    return {
        "unet": families.sd15(),
        "text_encoder": CLIPTextModel(clip_config()),
        "tokenizer": clip_tokenizer(),
        "vae": vae(),
        "scheduler": ddim_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
        "requires_safety_checker": False,
    }


@prepared
def ddim() -> DDIMPipeline:
    return DDIMPipeline(families.unet(), ddim_scheduler(prediction_type="v_prediction"))


@prepared
def ddpm() -> DDPMPipeline:
    return DDPMPipeline(families.unet(), DDPMScheduler(beta_schedule="linear"))


@prepared
def sd() -> StableDiffusionPipeline:
    return StableDiffusionPipeline(**sd_parts())


@prepared
def sd_img2img() -> StableDiffusionImg2ImgPipeline:
    return StableDiffusionImg2ImgPipeline(**sd_parts())


@prepared
def sd_controlnet() -> StableDiffusionControlNetPipeline:
    controlnet = families.controlnet()
    nn.init.normal_(controlnet.controlnet_cond_embedding.conv_out.weight)  # or all images would look the same
    return StableDiffusionControlNetPipeline(**sd_parts(), controlnet=controlnet)


@prepared
def sdxl() -> StableDiffusionXLPipeline:
    return StableDiffusionXLPipeline(
        unet=changed(families.sdxl(), cross_attention_dim=8 + 8),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        vae=vae(),
        scheduler=EulerDiscreteScheduler(**SD_BETAS, steps_offset=1),
        add_watermarker=False,
    )


@prepared
def sd3() -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline(
        transformer=changed(families.sd3(), joint_attention_dim=16, pooled_projection_dim=8 + 8),
        text_encoder=CLIPTextModelWithProjection(clip_config()),
        text_encoder_2=CLIPTextModelWithProjection(clip_config()),
        text_encoder_3=T5EncoderModel(T5Config(**t5_settings(16))),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        tokenizer_3=t5_tokenizer(),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


@prepared
def aura() -> AuraFlowPipeline:
    transformer = AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, caption_projection_dim=16, pos_embed_max_size=64,
    )  # fmt: skip
    with torch.no_grad():
        for name, layer in transformer.named_modules():  # gates of times in [0, 1] let too little of a text through
            if name.endswith(("norm1.linear", "norm1_context.linear")):
                layer.weight.mul_(30)
    return AuraFlowPipeline(
        transformer=transformer,
        text_encoder=UMT5EncoderModel(UMT5Config(**t5_settings(16))),
        tokenizer=t5_tokenizer(),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


@prepared
def flux() -> FluxPipeline:
    return FluxPipeline(
        transformer=changed(families.flux(), in_channels=4 * 2 * 2, guidance_embeds=True),
        text_encoder=CLIPTextModel(clip_config()),
        text_encoder_2=T5EncoderModel(T5Config(**t5_settings(8))),
        tokenizer=clip_tokenizer(),
        tokenizer_2=t5_tokenizer(),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )


@prepared
def dit() -> DiTPipeline:
    labels = {index: f"class {index}" for index in range(10)}
    pipeline = DiTPipeline(
        transformer=changed(families.dit(), num_embeds_ada_norm=1000),  # the pipeline's class without a label is 1000
        vae=vae(),
        scheduler=ddim_scheduler(),
        id2label=labels,
    )
    pipeline.register_to_config(id2label=labels)  # as in the published ones; its constructor does not
    return pipeline


@prepared
def pixart() -> PixArtAlphaPipeline:
    return PixArtAlphaPipeline(
        transformer=families.pixart(),
        text_encoder=T5EncoderModel(T5Config(**t5_settings(8))),
        tokenizer=t5_tokenizer(),
        vae=vae(),
        scheduler=ddim_scheduler(),
    )


@prepared
def wan() -> WanPipeline:
    return WanPipeline(
        transformer=WanTransformer3DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, text_dim=8, freq_dim=32,
            ffn_dim=32, num_layers=2, rope_max_seq_len=32,
        ),
        text_encoder=UMT5EncoderModel(UMT5Config(**t5_settings(8))),
        tokenizer=t5_tokenizer(),
        vae=AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4, scale_factor_temporal=2, scale_factor_spatial=2,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )  # fmt: skip


def picture(seed: int) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)
    return Image.fromarray(values)


SQUARE = {"height": PIXELS, "width": PIXELS}
NONE: list[dict[str, Any]] = [{} for _ in PROMPTS]
TEXTS = [
    {"prompt": prompt, "negative_prompt": other} for prompt, other in zip(PROMPTS, reversed(PROMPTS), strict=True)
]
PICTURES = [text | {"image": picture(seed)} for seed, text in enumerate(TEXTS)]
SHORT = SQUARE | {"max_sequence_length": TOKENS}
PIPELINES = {
    "ddim": Kind(ddim, "unet", NONE, {}),
    "ddpm": Kind(ddpm, "unet", NONE, {}),
    "sd": Kind(sd, "unet", TEXTS, SQUARE | {"guidance_scale": 5.0}),
    "sd_img2img": Kind(sd_img2img, "unet", PICTURES, {"guidance_scale": 5.0, "strength": 0.5}),
    "sd_controlnet": Kind(
        sd_controlnet, "unet", PICTURES, SQUARE | {"guidance_scale": 5.0, "controlnet_conditioning_scale": 0.3}
    ),
    "sdxl": Kind(sdxl, "unet", TEXTS, SQUARE | {"guidance_scale": 5.0}),
    "sd3": Kind(sd3, "transformer", TEXTS, SHORT | {"guidance_scale": 4.0}),
    "aura": Kind(aura, "transformer", TEXTS, SHORT | {"guidance_scale": 3.5}),
    "flux": Kind(flux, "transformer", [{"prompt": prompt} for prompt in PROMPTS], SHORT | {"guidance_scale": 3.5}),
    "dit": Kind(dit, "transformer", [{"class_labels": label} for label in range(8)], {"guidance_scale": 4.0}),
    "pixart": Kind(
        pixart,
        "transformer",
        TEXTS,
        SHORT | {"guidance_scale": 4.5, "clean_caption": False, "use_resolution_binning": False},
    ),
    "wan": Kind(wan, "transformer", TEXTS, SHORT | {"guidance_scale": 5.0, "num_frames": 3}),
}


def together(inputs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the arguments of one call for all of `inputs`: lists, or their number where they are empty."""
    if not any(inputs):
        return {"batch_size": len(inputs)}
    return {key: [each[key] for each in inputs] for key in inputs[0]}
