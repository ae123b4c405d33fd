"""Specification of the grids that a run draws while a student trains: of the same noise, and without a trace in it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import PIPELINES

from diffusers_pqcad.compression.fake_quant import fake_quant_state
from diffusers_pqcad.publishing import supervision as module
from diffusers_pqcad.publishing.settings import CompressConfig
from diffusers_pqcad.publishing.supervision import Supervision
from diffusers_pqcad.publishing.tracking import Journal
from diffusers_pqcad.publishing.validation import Grids, check_validation, validation_inputs, validation_steps


def test_there_are_grids_where_prompts_or_steps_are_given():
    assert validation_steps(CompressConfig()) is None
    assert validation_steps(CompressConfig(validation_prompts=["a cat"])) == 100
    assert validation_steps(CompressConfig(validation_steps=7)) == 7


def test_a_grid_is_of_the_validation_prompts_else_of_what_is_measured(tmp_path):
    (tmp_path / "prompts.txt").write_text("one\ntwo\nthree\nfour\nfive\n")
    run = {"prompts_file": str(tmp_path / "prompts.txt"), "num_trajectories": 4, "negative_prompt": "blurred"}
    asked = CompressConfig(**run, validation_prompts=["a cat"])
    assert validation_inputs(asked) == [{"prompt": "a cat", "negative_prompt": "blurred"}]
    assert validation_inputs(CompressConfig(**run)) == [{"prompt": "five", "negative_prompt": "blurred"}]
    assert validation_inputs(CompressConfig(class_labels=[3])) == [{"class_labels": 3}]
    assert validation_inputs(CompressConfig()) is None


def test_prompts_that_a_pipeline_does_not_take_are_refused(tiny_pipeline):
    check_validation(tiny_pipeline, CompressConfig())
    check_validation(PIPELINES["sd"].build(), CompressConfig(validation_prompts=["red cat"]))
    with pytest.raises(ValueError, match="^validation_prompts: prompt: DDIMPipeline does not take it"):
        check_validation(tiny_pipeline, CompressConfig(validation_prompts=["red cat"]))


def supervision_of(tmp_path, teacher: Any, calibration: Any, **changes: Any) -> Supervision:
    run = CompressConfig(num_images=2, num_inference_steps=4, validation_steps=1, **changes)
    return Supervision(run, tmp_path, teacher, calibration, {"a": 0, "b": 4}, Journal())


def test_a_grid_leaves_the_student_as_it_is_and_draws_the_teacher_once(
    tmp_path, tiny_pipeline, tiny_quantized, tiny_calibration_set, monkeypatch
):
    shown, drawn = [], []
    watched = supervision_of(tmp_path, tiny_pipeline, tiny_calibration_set)
    monkeypatch.setattr(watched.grids, "save_grid", lambda path, rows: drawn.append(rows))
    before = {name: value.clone() for name, value in fake_quant_state(tiny_quantized)["tensors"].items()}
    torch.manual_seed(0)
    expected = torch.get_rng_state()
    watch = watched.of("b", 2, folded=False).watch(tiny_quantized)
    assert watch.shows(1)
    monkeypatch.setattr(Journal, "log_picture", lambda self, name, path, step: shown.append((name, path.name, step)))
    watch.show(1)
    watch.show(2)
    assert torch.equal(torch.get_rng_state(), expected)
    after = fake_quant_state(tiny_quantized)["tensors"]
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert shown == [("b/validation", "b-000005.png", 5), ("b/validation", "b-000006.png", 6)]
    first, second = drawn
    assert list(first) == ["teacher, 4 steps", "student, 2 steps"]
    assert first["teacher, 4 steps"] is second["teacher, 4 steps"]
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["student, 2 steps"].shape == first["teacher, 4 steps"].shape == (2, 1, 8, 8)


def test_a_grid_is_a_picture_with_prompts_above_it(tmp_path, tiny_pipeline):
    grids = Grids(SimpleNamespace(), CompressConfig(validation_prompts=["a cat", "a dog"]), tmp_path)
    assert grids.count == 2
    rows = {name: torch.zeros(2, 3, 8, 8, dtype=torch.uint8) for name in ("teacher", "student")}
    grids.save_grid(tmp_path / "validation" / "x.png", rows)
    assert np.asarray(Image.open(tmp_path / "validation" / "x.png")).std() > 0


def test_checkpoints_are_kept_at_their_steps(tmp_path, tiny_pipeline, tiny_calibration_set, monkeypatch):
    kept = []
    monkeypatch.setattr(module, "keep_checkpoint", lambda folder, key, step, limit: kept.append((key, step, limit)))
    changes = {"checkpointing_steps": 2, "checkpoints_total_limit": 3}
    watched = supervision_of(tmp_path, tiny_pipeline, tiny_calibration_set, **changes)
    for step in (1, 2, 3, 4):
        watched.of("b", 2, folded=False).watch(None).kept(step)
    assert kept == [("b", 6, 3), ("b", 8, 3)]
    plain = supervision_of(tmp_path, tiny_pipeline, tiny_calibration_set)
    plain.of("a", 2, folded=False).watch(None).kept(2)
    assert len(kept) == 2
