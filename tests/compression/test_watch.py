"""Specification of what a caller of `distill` does in between: when, and that the student does not notice."""

import copy
import dataclasses
import shutil
from pathlib import Path

import pytest
from diffusers import UNet2DModel

from diffusers_pqcad import CalibrationSet, DistillConfig
from diffusers_pqcad.compression.checkpoint import load_checkpoint, model_hash
from diffusers_pqcad.compression.distillation import distill
from diffusers_pqcad.compression.watch import Watch


@pytest.mark.fast
def test_without_steps_of_its_own_a_resume_file_is_due_at_each_measurement():
    assert [Watch().saves(3, measured=measured, is_last=False) for measured in (True, False)] == [True, False]
    every = Watch(checkpointing_steps=2)
    assert [every.saves(step, measured=True, is_last=step == 5) for step in range(1, 6)] == [0, 1, 0, 1, 1]


@pytest.mark.fast
def test_pictures_are_due_each_so_many_updates_or_never():
    assert [Watch(validation_steps=2).shows(step) for step in (1, 2, 3, 4)] == [False, True, False, True]
    assert not any(Watch().shows(step) for step in range(1, 200))


def test_a_watched_training_ends_in_the_same_bits_also_from_each_file_that_is_kept(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, tmp_path: Path
) -> None:
    config = DistillConfig(max_train_steps=3, train_batch_size=4, evaluation_steps=3)
    teacher, straight, student = (copy.deepcopy(tiny_quantized) for _ in range(3))
    list(distill(straight, teacher, tiny_calibration_set, config))
    path, kept, shown = tmp_path / "cad", [], []

    def keep(step: int) -> None:
        kept.append(step)
        shutil.copy(path, tmp_path / f"kept-{step}")

    watch = Watch(2, keep, 1, lambda step: shown.append((step, model_hash(student))))
    hashes = []
    for _ in distill(student, teacher, tiny_calibration_set, config, checkpoint=path, watch=watch):
        hashes.append(model_hash(student))
    assert model_hash(student) == model_hash(straight)
    assert kept == [2, 3]
    assert [step for step, _ in shown] == [1, 2, 3]
    assert not {found for _, found in shown[1:]} & set(hashes)  # averaged weights, which are not those that train
    assert load_checkpoint(tmp_path / "kept-2")["step"] == 2
    resumed = copy.deepcopy(tiny_quantized)
    again = distill(resumed, teacher, tiny_calibration_set, config, checkpoint=tmp_path / "kept-2")
    assert [entry.step for entry in again] == [3]
    assert model_hash(resumed) == model_hash(straight)


def test_a_file_from_before_there_were_schedules_has_the_default_one(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    from diffusers_pqcad.compression.distillation import request_of

    config = DistillConfig(teacher="none")
    request = request_of(tiny_quantized, None, tiny_calibration_set, config, None, 2)
    assert not {"lr_scheduler", "lr_warmup_steps"} & set(request["config"])
    other = dataclasses.replace(config, lr_scheduler="cosine", lr_warmup_steps=3)
    request = request_of(tiny_quantized, None, tiny_calibration_set, other, None, 2)
    assert (request["config"]["lr_scheduler"], request["config"]["lr_warmup_steps"]) == ("cosine", 3)
