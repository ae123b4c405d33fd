"""Specification of the memory of a plan: close to what real stages hold, and brought below a limit by named flags."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from peak import Peak
from pipelines import PIPELINES
from torch import nn

from diffusers_pqcad import DistillConfig, distill
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.denoiser import StepPlan
from diffusers_pqcad.compression.fake_quant import fake_quant_layers, freeze_
from diffusers_pqcad.loading.saved import saved_models
from diffusers_pqcad.publishing import levers
from diffusers_pqcad.publishing.footprint import Footprint, footprints
from diffusers_pqcad.publishing.levers import bytes_of, levers_of, within
from diffusers_pqcad.publishing.outline import Outline, outline_of
from diffusers_pqcad.publishing.pipelines import Teacher
from diffusers_pqcad.publishing.settings import Settings, settings_of
from diffusers_pqcad.publishing.stages import stages_of_run
from diffusers_pqcad.publishing.weightless import Update, backward_bytes, trained_bytes

TOLERANCE = 0.15  # of what tensors take at most
QUICK = DistillConfig(max_train_steps=2, train_batch_size=8, evaluation_steps=2)


def outline_of_unet(model: nn.Module) -> Outline:
    """The outline of an unconditional model of 1x8x8 images, with nothing of its pipeline."""
    state, timestep = torch.empty(1, 1, 8, 8, device="meta"), torch.empty(1, dtype=torch.long, device="meta")
    weightless = copy.deepcopy(model).to("meta")
    return Outline(Teacher(None, None), weightless, StepPlan(), 4, 14, 2, state, timestep, {}, [])


@pytest.mark.parametrize(
    ("changes", "is_offloaded"),
    [
        ({}, False),
        ({"gradient_checkpointing": True}, False),
        ({"mixed_precision": "bf16"}, True),
        ({"optimizer": "adafactor"}, True),
    ],
    ids=str,
)
def test_what_cad_holds_beside_its_models_is_what_a_training_makes(
    tiny_unet: UNet2DModel, tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, tmp_path: Path,
    changes: dict[str, Any], is_offloaded: bool,
) -> None:  # fmt: skip
    config = dataclasses.replace(QUICK, **changes)
    layers, outline = tuple(fake_quant_layers(tiny_quantized)), outline_of_unet(tiny_unet)
    update = Update(2, config.train_batch_size, 2, 1, 1)
    weights, state = trained_bytes(outline, layers, None, config)
    found = state + backward_bytes(
        outline, layers, None, update, "all", config.mixed_precision,
        gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    folder = tmp_path if is_offloaded else None
    teacher = freeze_(copy.deepcopy(tiny_quantized))
    with Peak() as peak:
        list(distill(tiny_quantized, teacher, tiny_calibration_set, config, offload_folder=folder))
    found += 0 if is_offloaded else 2 * weights
    if config.mixed_precision == "bf16" and not is_offloaded:
        found += weights // 2
    assert found == pytest.approx(peak.bytes, rel=TOLERANCE)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Settings, Outline, dict[str, Any]]:
    """The settings, the outline and the headers of a tiny text-to-image pipeline."""
    folder = tmp_path_factory.mktemp("teacher")
    PIPELINES["sd"].build().save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("a cat\na dog\na hat\na boat\na house\n")
    settings = settings_of(
        {
            "pretrained_model_name_or_path": str(folder / "sd"), "prompts_file": str(folder / "prompts.txt"),
            "num_trajectories": 5, "num_inference_steps": 2, "height": 16, "width": 16, "guidance_scale": 5.0,
            "train_batch_size": 4, "modules_to_not_convert": ["up_blocks", "down_blocks"],
        }
    )  # fmt: skip
    models = saved_models(folder / "sd")
    return settings, outline_of(settings, str(folder / "sd"), models), models


def test_each_stage_has_its_parts_on_its_device(planned: tuple[Settings, Outline, dict[str, Any]]) -> None:
    settings, outline, models = planned
    found = {item.key: item for item in footprints(*planned, stages_of_run(settings, outline))}
    assert list(found) == ["recording", "pq", "pq_cad", "rows"]
    pipeline = sum(model.num_bytes for model in models.values())
    weights = models["unet"].num_bytes
    assert found["recording"].parts["cpu"]["pipeline"] == pipeline
    assert found["pq"].parts["cpu"]["latents"] == found["pq"].parts["cpu"]["reference"] == weights
    assert found["pq_cad"].parts["cpu"]["models before"] == weights
    on_gpu = settings._replace(run=dataclasses.replace(settings.run, train_device="cuda"))
    found = {item.key: item for item in footprints(on_gpu, outline, models, stages_of_run(settings, outline))}
    assert list(found["pq_cad"].parts) == ["cpu", "cuda"]
    assert "student" not in found["pq_cad"].parts["cpu"]
    assert found["rows"].total("cuda") == 0


def test_levers_are_tried_from_those_that_change_nothing() -> None:
    names = [list(lever) for lever in levers_of(settings_of({"train_batch_size": 4}))]
    assert names[:2] == [["offload_to_disk"], ["gradient_checkpointing"]]
    assert names[2:4] == [["train_batch_size", "gradient_accumulation_steps"]] * 2
    assert names[4:] == [["sampling_batch_size"], ["mixed_precision"], ["optimizer"]]
    given = {"train_batch_size": 1, "offload_to_disk": True, "optimizer": "adafactor", "mixed_precision": "bf16"}
    assert levers_of(settings_of(given)) == [{"gradient_checkpointing": True}, {"sampling_batch_size": 1}]


def test_a_limit_is_met_by_the_first_levers_that_help(
    planned: tuple[Settings, Outline, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many images in an update as before, and no lever that saves nothing at the peak."""

    def of(settings: Settings, *others: Any) -> list[Footprint]:
        config = settings.distillation
        size = 10 * config.train_batch_size + (0 if settings.run.offload_to_disk else 5)
        return [Footprint("pq_cad", {"cpu": {"all": size}})]

    monkeypatch.setattr(levers, "footprints", of)
    assert within(*planned, 45).flags == {}
    assert within(*planned, 44).flags == {"offload_to_disk": True}
    chosen = within(*planned, 20)
    assert chosen.flags == {"offload_to_disk": True, "train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert chosen.settings.distillation.gradient_accumulation_steps == 2
    with pytest.raises(ValueError, match="max_memory: expected at least .* the stage pq_cad takes .*--trainable lora"):
        within(*planned, 9)


def test_sizes_have_units() -> None:
    assert [bytes_of(text) for text in ("16GB", "16 GB", "1GiB", "500MB")] == [16e9, 16e9, 2**30, 500e6]
    with pytest.raises(ValueError, match="max_memory: expected a number with its unit, .* got 'much'"):
        bytes_of("much")
