"""Figures that need somebody's trained network, LPIPS and the CLIP score: measured where its weights can be had.

Where they cannot, the figure is not measured, and a warning says why.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from diffusers_pqcad.compression.extras import require

logger = logging.getLogger(__name__)

LPIPSNetwork = Literal["alex", "vgg", "squeeze"]
MIN_LPIPS_SIZE = 64  # pixels: smaller pictures vanish in the networks' poolings
CHUNK = 8  # pictures at once


class Judges(NamedTuple):
    """Networks that judge pictures, each with the name that its figures go by; None where there is none."""

    lpips: Any | None = None
    lpips_network: str | None = None
    clip: Any | None = None
    clip_model: str | None = None


class PooledFeatures(nn.Module):
    """A CLIP model as torchmetrics calls it: features are tensors, which newer transformers put into an output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config

    def get_image_features(self, *arguments: Tensor) -> Tensor:
        """Return the projected features of pictures."""
        return pooled(self.model.get_image_features(*arguments))

    def get_text_features(self, *arguments: Tensor) -> Tensor:
        """Return the projected features of texts."""
        return pooled(self.model.get_text_features(*arguments))


def pooled(found: Any) -> Tensor:
    """Return the features in what a model of transformers answers."""
    return found if isinstance(found, Tensor) else found.pooler_output


def load_judges(lpips_network: LPIPSNetwork | None = None, clip_model: str | None = None) -> Judges:
    """Return the networks that were asked for, and could be loaded; a warning says which could not, and why.

    `lpips_network` is the one that LPIPS compares by, with torchvision's weights; `clip_model` a repository or folder
    of a CLIP model in safetensors. Raises MissingExtraError where a package of the extra "metrics" is missing.
    """
    lpips = None if lpips_network is None else load_lpips(lpips_network)
    clip = None if clip_model is None else load_clip(clip_model)
    return Judges(
        lpips,
        None if lpips is None else lpips_network,
        clip,
        None if clip is None or clip_model is None else name_of(clip_model),
    )


def name_of(path: str) -> str:
    """Return a repository's name as it is, of a folder its last part."""
    return Path(path).resolve().name if Path(path).exists() else path


def load_lpips(network: LPIPSNetwork) -> Any | None:
    """Return LPIPS by `network`, for pictures in [0, 1]; None, with a warning, where its weights cannot be had."""
    require("metrics", "torchmetrics", "torchvision")
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    try:
        with no_pickles():
            return LearnedPerceptualImagePatchSimilarity(net_type=network, normalize=True).eval()
    except (OSError, RuntimeError) as error:  # no network; a file that is damaged
        logger.warning("LPIPS is not measured: the weights of %s cannot be had (%s).", network, one_line(error))
        return None


def load_clip(name: str) -> Any | None:
    """Return the CLIP score by the model `name`; None, with a warning, where its weights cannot be had."""
    require("metrics", "torchmetrics")
    from torchmetrics.multimodal.clip_score import CLIPScore
    from transformers import CLIPModel, CLIPProcessor  # here: they take long to import

    try:
        model = CLIPModel.from_pretrained(name, use_safetensors=True)
        processor = CLIPProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        logger.warning("The CLIP score is not measured: %s cannot be had (%s).", name, one_line(error))
        return None
    return CLIPScore(lambda: (PooledFeatures(model), processor)).eval()


def one_line(error: Exception) -> str:
    """Return the beginning of what an error says."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


@contextmanager
def no_pickles() -> Iterator[None]:
    """Let torch read tensors alone inside the block, whatever a library asks for."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        os.environ.pop(name)
        if before is not None:
            os.environ[name] = before


@torch.no_grad()
def lpips_distance(lpips: Any, wanted: Tensor, found: Tensor) -> float:
    """Return the mean LPIPS between pictures (n, C, H, W) or videos (n, frames, C, H, W) uint8; equal ones have 0.

    Grey pictures are three equal channels. Those below MIN_LPIPS_SIZE pixels are enlarged to it, bilinearly.
    Source: Zhang et al. 2018, The Unreasonable Effectiveness of Deep Features as a Perceptual Metric.
    """
    lpips.reset()
    for one, other in zip(frames_of(wanted).split(CHUNK), frames_of(found).split(CHUNK), strict=True):
        lpips.update(enlarged(other.float() / 255), enlarged(one.float() / 255))
    return lpips.compute().item()


@torch.no_grad()
def clip_score_of(clip: Any, pictures: Tensor, prompts: Sequence[str]) -> float:
    """Return 100 times the mean cosine between the pictures (n, C, H, W) uint8 and their n prompts, at least 0.

    Source: Hessel et al. 2021, CLIPScore, without its factor of 2.5, as torchmetrics has it.
    """
    clip.reset()
    frames = frames_of(pictures)
    for first in range(0, len(frames), CHUNK):
        clip.update(frames[first : first + CHUNK], list(prompts[first : first + CHUNK]))
    return clip.compute().item()


def frames_of(pictures: Tensor) -> Tensor:
    """Return all frames (N, 3, H, W) of pictures or videos, the channel of grey ones three times."""
    frames = pictures.flatten(0, -4)
    return frames if frames.shape[1] == 3 else frames[:, :1].expand(-1, 3, -1, -1)


def enlarged(pictures: Tensor) -> Tensor:
    """Return pictures (n, 3, H, W) of at least MIN_LPIPS_SIZE pixels a side, in proportion."""
    factor = MIN_LPIPS_SIZE / min(pictures.shape[-2:])
    if factor <= 1:
        return pictures
    size = [max(MIN_LPIPS_SIZE, round(factor * side)) for side in pictures.shape[-2:]]
    return interpolate(pictures, size=size, mode="bilinear", antialias=False)
