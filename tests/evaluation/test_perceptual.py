"""Specification of LPIPS and the CLIP score: by networks of the real shapes, with weights that mean nothing."""

import logging
import os
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from pipelines import PIPELINES, clip_tokenizer
from torch import nn

from diffusers_pqcad.compression.extras import MissingExtraError
from diffusers_pqcad.evaluation import evaluate, perceptual
from diffusers_pqcad.evaluation.perceptual import (
    Judges,
    clip_score_of,
    enlarged,
    frames_of,
    load_clip,
    load_judges,
    load_lpips,
    lpips_distance,
)


def alexnet_features() -> nn.Sequential:
    """The layers of torchvision's AlexNet up to the last one that LPIPS looks at, with random weights."""
    torch.manual_seed(0)
    sizes = [(3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1)]
    layers: list[nn.Module] = []
    for index, (inputs, outputs, kernel, stride, padding) in enumerate(sizes):
        layers += [nn.Conv2d(inputs, outputs, kernel, stride, padding), nn.ReLU()]
        layers += [nn.MaxPool2d(3, 2)] if index < 2 else []
    return nn.Sequential(*layers)


@pytest.fixture
def torchvision(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """torchvision as LPIPS uses it; the names of the networks that were asked for."""
    import torchmetrics.functional.image.lpips as functional
    import torchmetrics.image.lpip as modular

    asked = []

    def features(net: str, pretrained: bool = False) -> nn.Sequential:
        assert pretrained
        assert os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] == "1"  # no pickle is opened
        asked.append(net)
        return alexnet_features()

    monkeypatch.setattr(functional, "_get_tv_model_features", features)
    monkeypatch.setattr(modular, "_TORCHVISION_AVAILABLE", True)
    monkeypatch.setattr(perceptual, "require", lambda *names: None)
    return asked


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP model of tiny size, with the vocabulary of the tests' pipelines."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    torch.manual_seed(0)
    tokenizer = clip_tokenizer()
    layers = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 16, **ends}
    config = CLIPConfig(
        text_config=layers | text, vision_config=layers | {"image_size": 32, "patch_size": 8}, projection_dim=8
    )
    folder = tmp_path_factory.mktemp("clip")
    CLIPModel(config).save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(pictures, tokenizer).save_pretrained(folder)
    return folder


def pictures(count: int, channels: int = 3, size: int = 28) -> torch.Tensor:
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8)


# LPIPS


def test_lpips_of_equal_pictures_is_zero_and_grows_with_the_error(torchvision):
    lpips = load_lpips("alex")
    assert torchvision == ["alexnet"]
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ
    wanted = pictures(10)
    near, far = (wanted.float() + scale * torch.randn(10, 3, 28, 28) for scale in (5, 50))
    near, far = (each.round().clamp(0, 255).to(torch.uint8) for each in (near, far))
    assert lpips_distance(lpips, wanted, wanted) == 0
    assert 0 < lpips_distance(lpips, wanted, near) < lpips_distance(lpips, wanted, far)


def test_lpips_is_the_mean_over_pictures_also_in_chunks(torchvision):
    lpips, wanted, found = load_lpips("alex"), pictures(11), pictures(11)
    each = [lpips_distance(lpips, wanted[k : k + 1], found[k : k + 1]) for k in range(11)]
    assert lpips_distance(lpips, wanted, found) == pytest.approx(sum(each) / 11, rel=1e-5)


def test_grey_pictures_and_videos_are_frames_of_three_channels():
    grey = pictures(2, channels=1)
    assert torch.equal(frames_of(grey), grey.expand(-1, 3, -1, -1))
    assert frames_of(torch.zeros(2, 5, 3, 8, 8)).shape == (10, 3, 8, 8)


def test_small_pictures_are_enlarged_in_proportion():
    assert enlarged(torch.zeros(1, 3, 28, 56)).shape == (1, 3, 64, 128)
    large = torch.zeros(1, 3, 64, 100)
    assert enlarged(large) is large


def test_without_weights_lpips_is_not_measured_and_a_line_says_why(torchvision, monkeypatch, caplog):
    import torchmetrics.functional.image.lpips as functional

    def fail(net: str, pretrained: bool = False) -> None:
        raise URLError("no network")

    monkeypatch.setattr(functional, "_get_tv_model_features", fail)
    with caplog.at_level(logging.WARNING):
        assert load_judges("alex") == Judges()
    assert "LPIPS is not measured: the weights of alex cannot be had (URLError:" in caplog.text


def test_a_missing_package_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "torchvision", None)
    with pytest.raises(MissingExtraError, match=r"torchvision: .*diffusers-pqcad\[metrics\]"):
        load_judges("alex")


# CLIP score


def test_the_clip_score_is_the_mean_cosine_of_the_models_features(clip_folder):
    from transformers import CLIPModel, CLIPProcessor

    seen, prompts = pictures(9, size=40), ["red cat", "a dog"] * 4 + ["red cat"]
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        inputs = processor(text=prompts, images=list(seen), return_tensors="pt", padding=True)
        answer = model(**inputs)
    expected = 100 * (answer.image_embeds * answer.text_embeds).sum(-1).mean().item()
    found = clip_score_of(load_clip(str(clip_folder)), seen, prompts)
    assert found == pytest.approx(max(expected, 0), abs=1e-3)


def test_without_weights_the_clip_score_is_not_measured_and_a_line_says_why(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert load_judges(clip_model=str(tmp_path)) == Judges()
    assert f"The CLIP score is not measured: {tmp_path} cannot be had (OSError:" in caplog.text


# In reports


def test_a_report_has_both_beside_the_others(torchvision, clip_folder):
    judges = load_judges("alex", str(clip_folder))
    reference, other = PIPELINES["sd"].build(), PIPELINES["sd"].build()
    with torch.no_grad():
        other.unet.conv_out.bias += 0.5
    arguments: dict[str, Any] = {"num_latency_rounds": 1, "latency_batch_size": 1, "progress": False}
    arguments |= PIPELINES["sd"].arguments | {"num_images": 2, "num_inference_steps": 2, "seed": 0, "judges": judges}
    report = evaluate(other, reference, PIPELINES["sd"].inputs, **arguments)
    assert report.lpips > 0
    assert (report.lpips_network, report.clip_model) == ("alex", clip_folder.name)
    assert 0 <= report.clip_score <= 100
    bare = evaluate(other, reference, PIPELINES["sd"].inputs, **arguments | {"decode": False})
    assert bare.lpips is bare.lpips_network is bare.clip_score is bare.clip_model is None
