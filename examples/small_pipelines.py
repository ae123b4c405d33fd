"""Text-to-image pipelines small enough to be trained on one core, and what each of their networks learns.

Real diffusers and transformers classes throughout: a StableDiffusionPipeline as SD-1.5 is one, and a
StableDiffusion3Pipeline without T5.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_density_for_timestep_sampling
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

MAX_TOKENS = 16  # of a prompt, with its two special ones
WORD_END = "</w>"  # of a word's last token
TEXT_WIDTH = 128
LATENT_CHANNELS = 4
KL_WEIGHT = 1e-4  # of a latent's mean divergence, beside a pixel's mean squared error
SD15_BETAS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
FLOW_SHIFT = 2.0
MAX_T5_TOKENS = 256  # of StableDiffusion3Pipeline by default; here they are zeros


# Texts


def build_tokenizer(prompts: Iterable[str]) -> CLIPTokenizer:
    """Return a byte-level BPE tokenizer in which each word of `prompts` is one token, and others are taken apart.

    `prompts` are of lower-case letters. The vocabulary has CLIP's order: bytes, bytes that end a word, merges, and the
    two special tokens.
    """
    merges = merges_of({word for prompt in prompts for word in prompt.split()})
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ends = [letter + WORD_END for letter in letters]
    tokens = [*letters, *ends, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: place for place, token in enumerate(dict.fromkeys(tokens))}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)


def merges_of(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return the merges that make one token of each of `words`: the most frequent pair first, the first of several.

    The trainer of tokenizers numbers its letters differently in each process, and a resumed run would mix them up.
    Source: Sennrich et al. 2016, arXiv:1508.07909, algorithm 1.
    """
    pieces = [[*word[:-1], word[-1] + WORD_END] for word in sorted(words)]
    merges = []
    while counts := Counter(pair for parts in pieces for pair in itertools.pairwise(parts)):
        pair = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(pair)
        for parts in pieces:
            for place in range(len(parts)):
                if tuple(parts[place : place + 2]) == pair:
                    parts[place : place + 2] = ["".join(pair)]
    return merges


def token_ids(tokenizer: CLIPTokenizer, prompts: Iterable[str]) -> Tensor:
    """Return the tokens of `prompts` as the pipelines make them, (N, MAX_TOKENS) int64."""
    return tokenizer(list(prompts), padding="max_length", truncation=True, return_tensors="pt").input_ids


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


# Latents


def build_vae(num_channels: int, size: int) -> AutoencoderKL:
    """Return an untrained autoencoder of `size` x `size` pixels, with latents of half the size and four channels."""
    return AutoencoderKL(
        in_channels=num_channels,
        out_channels=num_channels,
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(24, 48),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=size,
        mid_block_add_attention=False,
    )


class Reconstruction(nn.Module):
    """What an autoencoder learns: to give back its pixels, with latents that stay near a normal distribution."""

    def __init__(self, vae: AutoencoderKL) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, pixels: Tensor, draws: torch.Generator) -> Tensor:
        """Return the loss of `pixels` (B, C, H, W) in [-1, 1]."""
        posterior = self.vae.encode(pixels).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=draws).to(pixels.device)
        decoded = self.vae.decode(posterior.mean + posterior.std * noise).sample
        divergence = posterior.kl().mean() / posterior.mean[0].numel()
        return functional.mse_loss(decoded.float(), pixels) + KL_WEIGHT * divergence.float()


@torch.no_grad()
def latents_of(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Return the latents of `pixels` (B, C, H, W) in [-1, 1], neither shifted nor scaled."""
    return vae.encode(pixels).latent_dist.mode()


def normalized(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return `latents_of` as a denoiser sees them: what its pipeline undoes before it decodes."""
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor


# Denoisers


class StableDiffusion(nn.Module):
    """A UNet with cross attention that learns the noise in latents (epsilon), at the noise levels of SD-1.5."""

    shifts_latents = False  # its pipeline knows no shift_factor

    def __init__(self, tokenizer: CLIPTokenizer, latent_size: int) -> None:
        super().__init__()
        self.unet = UNet2DConditionModel(
            sample_size=latent_size,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            block_out_channels=(48, 96, 96),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=TEXT_WIDTH,
            attention_head_dim=3,  # the number of heads, in UNets of SD-1.5's kind
            norm_num_groups=16,
        )
        self.text_encoder = CLIPTextModel(text_config(tokenizer))
        self.scheduler = DDIMScheduler(
            **SD15_BETAS, timestep_spacing="trailing", clip_sample=False, set_alpha_to_one=False, steps_offset=1
        )

    def forward(self, latents: Tensor, tokens: Tensor, draws: torch.Generator) -> Tensor:
        """Return the loss of clean `latents` (B, C, H, W) with the prompts `tokens` (B, MAX_TOKENS)."""
        noise = torch.randn(latents.shape, generator=draws).to(latents.device)
        timesteps = torch.randint(0, len(self.scheduler.betas), (len(latents),), generator=draws).to(latents.device)
        noisy = self.scheduler.add_noise(latents, noise, timesteps)
        texts = self.text_encoder(tokens).last_hidden_state
        return functional.mse_loss(self.unet(noisy, timesteps, texts).sample.float(), noise)

    def pipeline(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> DiffusionPipeline:
        """Return the pipeline of this denoiser, which shares its weights."""
        return StableDiffusionPipeline(
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


class StableDiffusion3(nn.Module):
    """An MMDiT that learns the way from latents to noise (flow matching), with two CLIP encoders and a silent T5."""

    shifts_latents = True

    def __init__(self, tokenizer: CLIPTokenizer, latent_size: int) -> None:
        super().__init__()
        self.transformer = SD3Transformer2DModel(
            sample_size=latent_size,
            patch_size=2,
            in_channels=LATENT_CHANNELS,
            out_channels=LATENT_CHANNELS,
            num_layers=4,
            attention_head_dim=32,
            num_attention_heads=4,
            joint_attention_dim=2 * TEXT_WIDTH,
            caption_projection_dim=128,
            pooled_projection_dim=2 * TEXT_WIDTH,
            pos_embed_max_size=latent_size // 2,
        )
        self.text_encoder = CLIPTextModelWithProjection(text_config(tokenizer))
        self.text_encoder_2 = CLIPTextModelWithProjection(text_config(tokenizer))
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=FLOW_SHIFT)

    def forward(self, latents: Tensor, tokens: Tensor, draws: torch.Generator) -> Tensor:
        """Return the loss of clean `latents` (B, C, H, W) with the prompts `tokens` (B, MAX_TOKENS)."""
        noise = torch.randn(latents.shape, generator=draws).to(latents.device)
        sigmas = compute_density_for_timestep_sampling("logit_normal", len(latents), 0.0, 1.0, generator=draws)
        sigmas = FLOW_SHIFT * sigmas / (1 + (FLOW_SHIFT - 1) * sigmas)  # Esser et al. 2024, arXiv:2403.03206, eq. 23
        # Few or many, 0 to 256, so that `max_sequence_length` does not matter.
        num_zeros = round((MAX_T5_TOKENS + 1) ** torch.rand((), generator=draws).item()) - 1
        sigmas = sigmas.to(latents.device)
        level = sigmas[:, None, None, None]
        texts, pooled = self.encode(tokens)
        with repeated_last_key(num_zeros):
            velocity = self.transformer(
                hidden_states=(1 - level) * latents + level * noise,
                timestep=self.scheduler.config.num_train_timesteps * sigmas,
                encoder_hidden_states=functional.pad(texts, (0, 0, 0, 1)),
                pooled_projections=pooled,
            ).sample
        return functional.mse_loss(velocity.float(), noise - latents)

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the pipeline makes of `tokens`: a vector for each token, and one for each text."""
        outputs = [encoder(tokens, output_hidden_states=True) for encoder in (self.text_encoder, self.text_encoder_2)]
        texts = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return texts, torch.cat([output.text_embeds for output in outputs], dim=-1)

    def pipeline(self, vae: AutoencoderKL, tokenizer: CLIPTokenizer) -> DiffusionPipeline:
        """Return the pipeline of this denoiser, which shares its weights."""
        return StableDiffusion3Pipeline(
            transformer=self.transformer,
            scheduler=self.scheduler,
            vae=vae,
            text_encoder=self.text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=self.text_encoder_2,
            tokenizer_2=tokenizer,
            text_encoder_3=silent_t5(),
            tokenizer_3=T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0),
        )


def silent_t5() -> T5EncoderModel:
    """Return a T5 of 13 thousand weights whose vectors are all zero: what the pipeline takes where it has no T5.

    Without one its folder could not be loaded, unless by a call that says text_encoder_3=None.
    """
    encoder = T5EncoderModel(T5Config(vocab_size=3, d_model=2 * TEXT_WIDTH, d_kv=8, d_ff=8, num_layers=1, num_heads=1))
    nn.init.zeros_(encoder.encoder.final_layer_norm.weight)
    return encoder


class repeated_last_key(TorchFunctionMode):  # noqa: N801 (used as a function)
    """Inside the block, attention counts its last key `count` times.

    A silent T5 gives `max_sequence_length` vectors of zeros, 256 by default. Equal tokens stay equal in all layers, so
    n of them are one whose logit is log(n) higher: exactly, and five times faster.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.bias = math.log(count) if count else -math.inf

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention:
            query, key = args[:2]
            mask = query.new_zeros(1, 1, 1, key.shape[2])
            mask[..., -1] = self.bias
            kwargs = kwargs | {"attn_mask": mask.expand(*query.shape[:3], -1)}
        return function(*args, **kwargs)
