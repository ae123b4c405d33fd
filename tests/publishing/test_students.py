"""A student's folder, to somebody who knows nothing of it: `pipe(prompt)` is the right call, or says which is."""

import copy
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
)
from pipelines import PIPELINES, PROMPTS, SQUARE, picture
from torch import nn

from diffusers_pqcad import PQCADConfig, collect_calibration_set, convert_
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.denoiser import pipeline_with, with_components
from diffusers_pqcad.compression.fake_quant import prepare_
from diffusers_pqcad.compression.schedulers import deterministic_scheduler
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.loading import coverage
from diffusers_pqcad.loading.convert import match_modules
from diffusers_pqcad.publishing.students import leave_out_guidance_, student_arguments, student_pipeline

ARGUMENTS = {"sd": {}, "sdxl": {}, "sd3": {"max_sequence_length": 16}}


class Made(NamedTuple):
    """A student's folder, the pipeline before it was saved, and what it was made from."""

    folder: Path
    pipeline: Any
    teacher: Any
    student: nn.Module
    calibration: CalibrationSet


@pytest.fixture(scope="module", params=ARGUMENTS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def made(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A student with folded guidance."""
    return make(kind, tmp_path_factory.mktemp(kind), folded=True)


def make(kind: str, folder: Path, *, folded: bool) -> Made:
    """A student of two steps, in a folder, that was not trained: what it answers says how it was called."""
    about, teacher = PIPELINES[kind], PIPELINES[kind].build()
    teacher.scheduler = deterministic_scheduler(teacher.scheduler)[0]
    calibration = collect_calibration_set(
        teacher, about.inputs[:4], num_inference_steps=4, seed=0, progress=False, **about.arguments
    )
    model = getattr(teacher, about.denoiser)
    student = prepare_(copy.deepcopy(model), PQCADConfig(), dict.fromkeys(match_modules(model, PQCADConfig()), 4))
    pipeline = student_pipeline(teacher, copy.deepcopy(student), calibration, 2, folded=folded)
    pipeline.save_pretrained(folder)
    return Made(folder, pipeline, teacher, student, calibration)


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    coverage.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog


def loaded(made: Made) -> Any:
    pipeline = DiffusionPipeline.from_pretrained(made.folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def image_of(pipeline: Any, kind: str, **arguments: Any) -> tuple[np.ndarray, list[int]]:
    """The picture of a prompt, and the rows of each call of the denoiser."""
    rows: list[int] = []
    model = getattr(pipeline, PIPELINES[kind].denoiser)
    hook = model.register_forward_hook(lambda module, inputs, output: rows.append(len(output[0])))
    try:
        generator = torch.Generator().manual_seed(3)
        image = pipeline(PROMPTS[0], generator=generator, output_type="np", **ARGUMENTS[kind] | arguments).images[0]
    finally:
        hook.remove()
    return image, rows


def test_a_folder_called_without_arguments_gives_the_students_images(
    kind: str, made: Made, warnings: pytest.LogCaptureFixture
) -> None:
    pipeline = loaded(made)
    assert packed_layers(getattr(pipeline, PIPELINES[kind].denoiser))
    arguments = student_arguments(made.teacher, made.calibration, 2, folded=True)
    assert arguments == {"num_inference_steps": 2, "guidance_scale": 1}
    wanted, rows = image_of(pipeline, kind, **arguments)
    assert rows == [1, 1]
    assert warnings.text == ""
    before, _ = image_of(made.pipeline, kind, **arguments)
    np.testing.assert_allclose(wanted, before, rtol=0, atol=1e-5)  # tensors of a file lie elsewhere in memory

    found, rows = image_of(pipeline, kind)
    if kind == "sd3":  # diffusers has no switch there
        assert rows == [2, 2]
        assert "Call its pipeline with guidance_scale=1, num_inference_steps=2." in warnings.text
        assert np.abs(found - wanted).max() > 1e-3
        found, rows = image_of(pipeline, kind, guidance_scale=1)
    else:
        assert warnings.text == ""
    assert rows == [1, 1]
    np.testing.assert_array_equal(found, wanted)


def test_the_steps_are_those_of_the_recording(kind: str, made: Made) -> None:
    pipeline = loaded(made)
    image_of(pipeline, kind, guidance_scale=1)
    torch.testing.assert_close(pipeline.scheduler.timesteps, made.calibration.timestep[::2], rtol=0, atol=1e-3)
    index = json.loads((made.folder / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers_pqcad", type(pipeline.scheduler).__name__]
    config = getattr(pipeline, PIPELINES[kind].denoiser).config.quantization_config
    assert (config.num_inference_steps, config.guidance_folded) == (2, True)


# In a process that has loaded and made no student yet: what the Hub's client asks first, and what is saved again.
FRESH = """
import json, sys
import diffusers_pqcad
from diffusers import DiffusionPipeline
from diffusers.pipelines.pipeline_loading_utils import _get_custom_components_and_folders
folder = sys.argv[1]
index = json.load(open(f"{folder}/model_index.json"))
custom, _ = _get_custom_components_and_folders("me/my-model", index, [])
pipeline = DiffusionPipeline.from_pretrained(folder)
pipeline.save_pretrained(f"{folder}/again")
again = json.load(open(f"{folder}/again/model_index.json"))
print(json.dumps([custom, type(pipeline.scheduler).__name__, again["scheduler"]]))
"""


@pytest.mark.parametrize("kind", ["sd3"], indirect=True)
def test_a_process_that_has_imported_the_package_alone_loads_it(kind: str, made: Made) -> None:
    run = subprocess.run([sys.executable, "-c", FRESH, str(made.folder)], capture_output=True, text=True, check=True)
    name = "StudentFlowMatchEulerDiscreteScheduler"
    assert json.loads(run.stdout.splitlines()[-1]) == [{}, name, ["diffusers_pqcad", name]]
    assert "Expected types" not in run.stderr
    assert "not expected" not in run.stderr


def test_the_switch_changes_no_bit(kind: str, made: Made) -> None:
    plain = pipeline_with(made.teacher, convert_(copy.deepcopy(made.student)))
    arguments = {"guidance_scale": 1} | made.calibration.student_arguments(made.teacher)
    wanted, rows = image_of(plain, kind, **arguments)
    assert rows == [1, 1]
    found, _ = image_of(loaded(made), kind)
    if kind != "sd3":
        np.testing.assert_array_equal(found, wanted)


def test_a_student_of_two_branches_keeps_its_guidance(kind: str, made: Made, tmp_path: Path) -> None:
    pipeline = student_pipeline(made.teacher, copy.deepcopy(made.student), made.calibration, 2, folded=False)
    pipeline.save_pretrained(tmp_path)
    found, rows = image_of(DiffusionPipeline.from_pretrained(tmp_path), kind, guidance_scale=5.0)
    assert rows == [2, 2]
    wanted, _ = image_of(pipeline, kind, guidance_scale=5.0, num_inference_steps=2)
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
    assert student_arguments(made.teacher, made.calibration, 2, folded=False) == {"num_inference_steps": 2}


@pytest.mark.parametrize(
    ("name", "has_switch"), [("sd", True), ("sd_controlnet", True), ("dit", False), ("sd3", False)]
)
def test_the_switch_is_found_by_what_it_does(name: str, has_switch: bool) -> None:
    pipeline = PIPELINES[name].build()
    model = getattr(pipeline, PIPELINES[name].denoiser)
    before, state = dict(model.config), list(model.state_dict())
    assert leave_out_guidance_(pipeline) == has_switch
    assert (dict(model.config) == before) == (not has_switch)
    assert [key for key in model.state_dict() if key not in state] == ["time_embedding.cond_proj.weight"] * has_switch
    assert not leave_out_guidance_(pipeline)  # twice, it is there already


class Guiding(StableDiffusionPipeline):
    """A pipeline that guides whatever the config of its UNet says, as that of upscaling does."""

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1


def test_a_pipeline_that_does_not_look_at_the_switch_has_none() -> None:
    pipeline = Guiding(**PIPELINES["sd"].build().components, requires_safety_checker=False)
    before = dict(pipeline.unet.config)
    assert not leave_out_guidance_(pipeline)
    assert dict(pipeline.unet.config) == before
    assert pipeline.unet.time_embedding.cond_proj is None


def test_a_pipeline_that_left_out_its_first_steps_keeps_its_scheduler() -> None:
    about, teacher = PIPELINES["sd_img2img"], PIPELINES["sd_img2img"].build()
    calibration = collect_calibration_set(
        teacher, about.inputs[:4], num_inference_steps=4, seed=0, progress=False, **about.arguments
    )
    student = copy.deepcopy(teacher.unet)
    prepare_(student, PQCADConfig(), dict.fromkeys(match_modules(student, PQCADConfig()), 4))
    assert student_arguments(teacher, calibration, 2, folded=True) == {"num_inference_steps": 2, "guidance_scale": 1}
    assert student_pipeline(teacher, student, calibration, 2, folded=True).scheduler is teacher.scheduler


@pytest.mark.parametrize(("name", "scheduler"), [("ddim", "DDIMScheduler"), ("ddpm", "StudentDDIMScheduler")])
def test_an_unconditional_student_takes_its_steps_or_warns_before_the_first_other(
    name: str, scheduler: str, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    """`DDIMPipeline` makes a plain scheduler of the student's."""
    pipeline = loaded(make(name, tmp_path, folded=False))
    assert type(pipeline.scheduler).__name__ == scheduler
    pipeline(num_inference_steps=2, output_type="np")
    assert warnings.text == ""
    told: list[bool] = []
    pipeline.unet.register_forward_pre_hook(lambda module, inputs: told.append("distilled" in warnings.text))
    pipeline(output_type="np")
    if name == "ddpm":
        assert told == [False, False]
    else:
        assert told == [True] * 50
        assert "distilled to 2 steps, and is called in 50: call its pipeline with num_inference_steps=2." in (
            warnings.text
        )


def of_pictures(made: Made, **components: Any) -> Any:
    """The image-to-image pipeline of a student's folder, with other components."""
    pipeline = AutoPipelineForImage2Image.from_pipe(with_components(loaded(made), **components))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_image_to_image_takes_its_share_of_the_students_steps(
    kind: str, made: Made, warnings: pytest.LogCaptureFixture
) -> None:
    """As with a plain scheduler that is told the steps: from the same noise level, in the same steps."""
    own = dict(made.pipeline.scheduler.config)["_student"]["sigmas"]
    plain = (FlowMatchEulerDiscreteScheduler if own else DDIMScheduler).from_config(made.teacher.scheduler.config)
    steps = {"sigmas": own} if own else {"num_inference_steps": 2}
    shared = {"image": picture(0), "strength": 0.5, "guidance_scale": 1} | (SQUARE if kind == "sd3" else {})
    wanted, rows = image_of(of_pictures(made, scheduler=plain), kind, **shared, **steps)
    assert rows == [1]
    found, rows = image_of(of_pictures(made), kind, **shared, num_inference_steps=2)
    assert rows == [1]
    np.testing.assert_array_equal(found, wanted)
    other, _ = image_of(of_pictures(made), kind, **shared | {"strength": 1.0}, num_inference_steps=2)
    assert np.abs(other - wanted).max() > 1e-3
    assert "This student" not in warnings.text


def test_image_to_image_without_the_steps_is_told_the_call_before_the_first_of_them(
    kind: str, made: Made, warnings: pytest.LogCaptureFixture
) -> None:
    pipeline, told = of_pictures(made), []
    model = getattr(pipeline, PIPELINES[kind].denoiser)
    model.register_forward_pre_hook(lambda module, inputs: told.append(warnings.text.partition("This student")[2]))
    call = {"image": picture(0), "strength": 0.6, "guidance_scale": 1, "output_type": "latent"} | ARGUMENTS[kind]
    if kind == "sd3":  # its default number is another than that of text-to-image, so it is taken
        pipeline(PROMPTS[0], **call, **SQUARE)
        assert "call its pipeline with num_inference_steps=2." in told[0]
        return
    text = r"takes 2 steps, .* first 20, counted in 50 .*pipe\(prompt, image, strength=0\.6, num_inference_steps=2\)"
    with pytest.raises(ValueError, match=text):
        pipeline(PROMPTS[0], **call)
    assert told == []
    assert pipeline(PROMPTS[0], **call, num_inference_steps=2).images is not None
    assert told == [""]
