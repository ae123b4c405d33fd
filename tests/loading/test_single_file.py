"""Specification of pipelines from one file: what it holds is found by the names of its tensors."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from pipelines import PIPELINES
from safetensors.torch import load_file, save_file

from diffusers_pqcad.loading.single_file import check_single_file, holds_pipeline, is_single_file, load_single_file

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("single")
    PIPELINES["sd"].build().save_pretrained(folder / "sd")
    PIPELINES["sd3"].build().save_pretrained(folder / "sd3")
    return folder


@pytest.mark.parametrize(("kind", "part"), [("sd", "unet"), ("sd3", "transformer")])
def test_a_file_of_the_denoiser_takes_the_other_parts_from_its_pipeline(folder, tmp_path, kind, part):
    tensors = {name: tensor + 0.5 for name, tensor in load_file(folder / kind / part / WEIGHTS).items()}
    save_file(tensors, tmp_path / "mine.safetensors")
    assert is_single_file(tmp_path / "mine.safetensors")
    pipeline = load_single_file(tmp_path / "mine.safetensors", str(folder / kind))
    found = getattr(pipeline, part).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert pipeline.vae is not None


def test_a_file_of_a_whole_pipeline_is_loaded_by_its_class(folder, tmp_path, monkeypatch):
    """By diffusers' own loader, which converts the names that the first Stable Diffusion had."""
    path = tmp_path / "whole.safetensors"
    save_file({"model.diffusion_model.x": torch.zeros(1), "first_stage_model.y": torch.zeros(1)}, path)
    asked = {}

    def from_single_file(file: str, **options: object) -> str:
        asked.update(options, file=file)
        return "a pipeline"

    monkeypatch.setattr(StableDiffusionPipeline, "from_single_file", from_single_file)
    assert load_single_file(path, str(folder / "sd"), torch_dtype=torch.float16) == "a pipeline"
    assert asked == {"file": str(path), "config": str(folder / "sd"), "torch_dtype": torch.float16}


def test_names_tell_a_pipeline_from_a_model(folder):
    assert holds_pipeline(["model.diffusion_model.a", "first_stage_model.b"])
    assert not holds_pipeline(["model.diffusion_model.a", "model.diffusion_model.b"])
    assert not holds_pipeline(load_file(folder / "sd" / "unet" / WEIGHTS))
    assert not is_single_file(folder)


def test_a_model_without_a_pipeline_and_another_kind_of_file_are_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"it holds one model, of \d+ tensors. Say with --pipeline"):
        check_single_file(folder / "sd" / "unet" / WEIGHTS, None)
    (tmp_path / "x.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match="expected a .safetensors file"):
        check_single_file(tmp_path / "x.ckpt", None)


def test_a_pipeline_without_a_denoiser_is_refused(folder, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "X", "vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(ValueError, match="expected a pipeline with one of"):
        load_single_file(folder / "sd" / "unet" / WEIGHTS, str(tmp_path))


def test_a_model_of_another_class_is_refused(folder, tmp_path):
    save_file({"something.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="it is no UNet2DConditionModel as"):
        load_single_file(tmp_path / "other.safetensors", str(folder / "sd"))
