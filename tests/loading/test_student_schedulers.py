"""Specification of a student's schedulers: a pipeline's default number of steps is the student's."""

import copy
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders

import diffusers_pqcad
from diffusers_pqcad.loading import coverage
from diffusers_pqcad.loading.schedulers import StudentSteps, student_scheduler

pytestmark = pytest.mark.fast

SIGMAS = [1.0, 0.5, 0.125]
DDIM = DDIMScheduler(timestep_spacing="trailing", clip_sample=False, beta_schedule="scaled_linear")
FLOW = FlowMatchEulerDiscreteScheduler(shift=3.0)


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    coverage.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog


def student_of(scheduler: Any, folder: Path, sigmas: list[float] | None = None) -> Any:
    """A student's scheduler of five or three steps, saved and loaded."""
    steps = StudentSteps(len(sigmas or range(5)), 50, sigmas)
    student_scheduler(scheduler, steps).save_pretrained(folder)
    name = json.loads((folder / "scheduler_config.json").read_text())["_class_name"]
    return getattr(diffusers_pqcad, name).from_pretrained(folder)


def timesteps(scheduler: Any, *args: Any, **kwargs: Any) -> list[float]:
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(*args, **kwargs)
    return scheduler.timesteps.tolist()


def test_the_default_number_of_steps_is_the_students(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    student = student_of(DDIM, tmp_path)
    assert isinstance(student, DDIMScheduler)
    assert timesteps(student, 50) == timesteps(student, 5) == timesteps(DDIM, 5)
    assert warnings.text == ""
    assert timesteps(student, 10) == timesteps(DDIM, 10)
    assert "distilled to 5 steps, and is called in 10: call its pipeline with num_inference_steps=5." in warnings.text
    assert student.betas.equal(DDIM.betas)


def test_a_student_of_flow_matching_takes_its_own_sigmas(tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    student, wanted = student_of(FLOW, tmp_path, SIGMAS), timesteps(FLOW, sigmas=SIGMAS)
    assert timesteps(student, 50) == timesteps(student, 3) == timesteps(student, sigmas=SIGMAS) == wanted
    for count in (50, 3):  # as Flux asks
        evenly = [1 - index / count for index in range(count)]
        assert timesteps(student, sigmas=evenly) == wanted
    assert timesteps(student, sigmas=[0.9, 0.3]) == timesteps(FLOW, sigmas=[0.9, 0.3])
    assert warnings.text == ""
    assert timesteps(student, 10) == timesteps(FLOW, 10) != wanted
    assert "call its pipeline with num_inference_steps=3" in warnings.text


def test_a_student_of_all_steps_of_flow_matching_has_the_schedulers_own(tmp_path: Path) -> None:
    student = student_of(FLOW, tmp_path)
    assert timesteps(student, 50) == timesteps(FLOW, 5)
    evenly = [1 - index / 50 for index in range(50)]
    torch.testing.assert_close(timesteps(student, sigmas=evenly), timesteps(FLOW, sigmas=[1.0, 0.8, 0.6, 0.4, 0.2]))


def test_the_scheduler_of_a_size_dependent_shift_is_handed_it_on(tmp_path: Path) -> None:
    dynamic = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    student = student_of(dynamic, tmp_path, SIGMAS)
    assert timesteps(student, 50, mu=0.7) == timesteps(dynamic, sigmas=SIGMAS, mu=0.7)


@pytest.mark.parametrize(("scheduler", "sigmas"), [(DDIM, None), (FLOW, SIGMAS)], ids=["ddim", "flow"])
def test_a_pipeline_that_leaves_out_a_share_of_other_steps_is_told(
    scheduler: Any, sigmas: Any, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    """Image-to-image pipelines leave out a share of the number that they ask for."""
    student = student_of(scheduler, tmp_path, sigmas)
    steps = len(sigmas or range(5))
    student.set_timesteps(steps)
    student.set_begin_index(steps - 1)
    student.set_timesteps(50)
    student.set_begin_index(0)
    assert warnings.text == ""
    text = f"This student takes {steps} steps, .* first 10, counted in 50 steps, .* num_inference_steps={steps}\\)"
    with pytest.raises(ValueError, match=text):
        student.set_begin_index(10)
    student.set_begin_index(1)
    assert "leaves out its first 1, counted in 50 steps, its default" in warnings.text
    assert f"pipe(prompt, image, strength=0.6, num_inference_steps={steps})" in warnings.text


def test_a_pipeline_that_counts_its_sigmas_leaves_out_a_share_of_the_students_steps(
    tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    """Flux hands over sigmas, and counts the timesteps that it finds."""
    student = student_of(FLOW, tmp_path, SIGMAS)
    student.set_timesteps(sigmas=[1 - index / 50 for index in range(50)])
    student.set_begin_index(1)
    assert warnings.text == ""


def test_a_user_may_put_another_scheduler_in_its_place(tmp_path: Path) -> None:
    plain = DDIMScheduler.from_config(student_of(DDIM, tmp_path).config)
    assert timesteps(plain, 50) == timesteps(DDIM, 50)


def test_diffusers_loads_the_schedulers_from_the_hub_too() -> None:
    index = {"scheduler": ["diffusers_pqcad", "StudentDDIMScheduler"]}
    custom, folders = _get_custom_components_and_folders("me/my-model", index, ["scheduler/scheduler_config.json"])
    assert (custom, folders) == ({}, ["scheduler"])
