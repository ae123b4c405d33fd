"""Whole pipelines whose denoiser, text encoders and VAE are quantized: loaded, saved, and loaded again."""

import logging
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import PIPELINES, together
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.layers.find import packed_layers

PARTS = {
    "sd": ("unet", {"text_encoder", "vae"}),
    "sdxl": ("unet", {"text_encoder", "text_encoder_2", "vae"}),
    "sd3": ("transformer", {"text_encoder", "text_encoder_2", "text_encoder_3", "vae"}),
}


def widths(pipeline: Any) -> dict[str, dict[str, int]]:
    """Return the bits of each packed layer of each model of `pipeline`."""
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    return {
        name: {layer: packed.spec.bits for layer, packed in packed_layers(model).items()}
        for name, model in models.items()
    }


def draw(pipeline: Any, kind: str) -> Tensor:
    """Return a picture, decoded."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        **together(PIPELINES[kind].inputs[:1]) | PIPELINES[kind].arguments,
        num_inference_steps=1,
        generator=torch.Generator().manual_seed(0),
        output_type="pt",
        return_dict=False,
    )[0]
    return torch.as_tensor(images)


@pytest.mark.parametrize("kind", PARTS)
def test_a_pipeline_is_loaded_saved_and_loaded_again(kind: str, tmp_path: Any, caplog: Any) -> None:
    denoiser, others = PARTS[kind]
    pipeline = PIPELINES[kind].build()
    expected = draw(pipeline, kind)
    pipeline.save_pretrained(tmp_path / "float")
    config = PQCADConfig(weight_bits=4, components="all")
    with caplog.at_level(logging.WARNING, "diffusers"):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / "float", quantization_config=config)
    assert "will be ignored" not in caplog.text

    found = widths(loaded)
    assert set(found) == {denoiser, *others}
    assert all(set(found[name].values()) == {8} for name in others)
    sizes = {name: layer.weight_shape.numel() for name, layer in packed_layers(getattr(loaded, denoiser)).items()}
    assert sum(sizes[name] * bits for name, bits in found[denoiser].items()) <= 4 * sum(sizes.values())
    assert set(found[denoiser].values()) != {8}
    image = draw(loaded, kind)
    assert (image - expected).norm() < 0.5 * expected.norm()

    loaded.save_pretrained(tmp_path / "packed")
    again = DiffusionPipeline.from_pretrained(tmp_path / "packed")
    assert widths(again) == found
    assert torch.equal(draw(again, kind), image)


def test_models_that_are_no_part_of_it_stay_as_they_are(tmp_path: Any) -> None:
    PIPELINES["sd_controlnet"].build().save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=PQCADConfig(components="all"))
    assert {name for name, found in widths(loaded).items() if found} == {"unet", "text_encoder", "vae"}


def test_a_pipeline_of_a_denoiser_alone_is_quantized_too(tmp_path: Any) -> None:
    PIPELINES["ddim"].build().save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path, quantization_config=PQCADConfig(components="all"))
    assert all(widths(loaded).values())
