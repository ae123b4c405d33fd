"""What a student is, in its folder: `pipe(prompt)`, without further arguments, calls it as it was distilled.

Steps follow by the student's scheduler. Guidance that is folded in is left out where diffusers has a switch, an entry
of the UNet's config that latent consistency models have; elsewhere the call says so, and the model warns.
"""

import copy
import inspect
from functools import partial
from typing import Any

from diffusers import DDIMScheduler
from torch import nn

from diffusers_pqcad.compression.adapters import below_adapter_
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.denoiser import denoiser_name, pipeline_with, with_components
from diffusers_pqcad.compression.fake_quant import convert_
from diffusers_pqcad.compression.grid import sigmas_for
from diffusers_pqcad.loading.convert import replace_config_
from diffusers_pqcad.loading.schedulers import StudentSteps, student_scheduler

FOLDED_CALL = {"guidance_scale": 1}  # what a student with folded guidance is called with
SWITCH = "time_cond_proj_dim"  # the entry of a UNet's config where SD and SDXL leave guidance out
SWITCH_SIZE = 4  # numbers that the pipeline makes of its guidance scale then: an even number above 2


def student_arguments(pipeline: Any, calibration: CalibrationSet, stride: int, *, folded: bool) -> dict[str, Any]:
    """Return what to call a student's `pipeline` with, which takes every `stride`-th of the recorded steps."""
    arguments = calibration.student_arguments(pipeline, stride)
    if calibration.takes_all_steps:
        arguments.pop("sigmas", None)  # its scheduler knows them
    return arguments | (FOLDED_CALL if folded else {})


def student_pipeline(
    teacher: Any, student: nn.Module, calibration: CalibrationSet, stride: int, *, folded: bool
) -> Any:
    """Return a pipeline like the teacher's with the fake-quantized `student`, which is packed in place.

    The student takes every `stride`-th of the recorded steps; `folded`: it answers in one branch.
    """
    pipeline = pipeline_with(teacher, student.eval())
    if folded:
        leave_out_guidance_(pipeline)
    steps = calibration.student_arguments(teacher, stride)["num_inference_steps"]
    below_adapter_(student, partial(convert_, num_inference_steps=steps, guidance_folded=folded))
    if not calibration.takes_all_steps:  # by another number of steps than is asked for; see `student_arguments`
        return pipeline
    default = inspect.signature(type(teacher).__call__).parameters["num_inference_steps"].default
    scheduler = student_scheduler(
        teacher.scheduler, StudentSteps(steps, default, student_sigmas(teacher.scheduler, calibration, stride))
    )
    return with_components(pipeline, scheduler=scheduler)


def student_sigmas(scheduler: Any, calibration: CalibrationSet, stride: int) -> list[float] | None:
    """Return what a flow-matching scheduler is handed for a student's steps; None where its own are right."""
    if isinstance(scheduler, DDIMScheduler) or stride == 1:
        return None
    return sigmas_for(scheduler, calibration.grid().every(stride).sigma, mu=calibration.manifest["mu"])


def leave_out_guidance_(pipeline: Any) -> bool:
    """Let `pipeline` make no second branch, whatever its guidance scale; return whether diffusers has a switch for it.

    The denoiser gets what the switch is: a projection of the guidance scale, added to the time embedding, of zeros. It
    stays in floating point, as the time embedding does, and changes no output.
    """
    model = getattr(pipeline, denoiser_name(pipeline))
    embedding = getattr(model, "time_embedding", None)
    if model.config.get(SWITCH, ...) is not None or getattr(embedding, "cond_proj", ...) is not None:
        return False
    before = dict(model.config)
    replace_config_(model, before | {SWITCH: SWITCH_SIZE})
    if makes_two_branches(pipeline):
        replace_config_(model, before)
        return False
    first: Any = embedding.linear_1  # type: ignore[union-attr]
    projection = nn.Linear(SWITCH_SIZE, first.in_features, bias=False)
    nn.init.zeros_(projection.weight)
    embedding.cond_proj = projection.to(first.weight.device, first.weight.dtype)  # type: ignore[union-attr]
    return True


def makes_two_branches(pipeline: Any) -> bool:
    """Return whether `pipeline` would make two branches with a guidance scale of 2, as far as it says."""
    asked = copy.copy(pipeline)
    asked._guidance_scale = 2.0
    return bool(getattr(asked, "do_classifier_free_guidance", True))
