"""Schedulers that know a student's steps: a pipeline that is called without a number of them takes the student's.

It asks its scheduler for as many as its class has by default, and gets the student's. Importing this module lets
diffusers save them as components of `diffusers_pqcad`; that it loads them as such is seen to by the package itself.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines import pipeline_loading_utils

from diffusers_pqcad.loading.coverage import warn_once
from diffusers_pqcad.loading.steps import warn_of_steps

# In a scheduler's config. diffusers keeps what a class does not know, and warns of it where there is no underscore.
ENTRY = "_student"


class StudentSteps(NamedTuple):
    """The steps of a student: their number, the number that its pipeline asks for by default, and flow's sigmas.

    Whoever asks for just that default number gets the student's, too: a scheduler cannot tell. `sigmas` are those
    before the scheduler's shift; None: those that it takes by itself.
    """

    num_inference_steps: int
    default_num_inference_steps: int
    sigmas: Sequence[float] | None = None

    def asked(self, num_inference_steps: int) -> int:
        """Return the steps to take where a pipeline asks for `num_inference_steps`; warns where they are others."""
        if num_inference_steps == self.default_num_inference_steps:
            return self.num_inference_steps
        warn_of_steps(self.num_inference_steps, num_inference_steps)
        return num_inference_steps


def steps_of(scheduler: Any) -> StudentSteps | None:
    """Return what the config of a student's scheduler says of its steps, if anything."""
    found = scheduler.config.get(ENTRY)
    return None if found is None else StudentSteps(**found)


def check_begin(scheduler: Any, begin_index: int) -> None:
    """Look at where a pipeline begins that leaves out its first steps, as image-to-image does.

    It leaves out a share of the steps that it asked for, and knows nothing of those that its scheduler took in their
    place. Raises ValueError where no step of a student would be left; warns where its share is another one.
    """
    taken, asked = len(scheduler.timesteps), scheduler.num_asked
    if begin_index == 0 or asked in (taken, None):
        return
    text = (
        f"This student takes {taken} steps, and the pipeline leaves out its first {begin_index}, counted in "
        f"{asked} steps, its default. Call it with num_inference_steps={taken}, as in pipe(prompt, image, "
        f"strength=0.6, num_inference_steps={taken}): strength is a share of the student's steps then."
    )
    if begin_index >= taken:
        raise ValueError(text)
    warn_once(text)


class StudentDDIMScheduler(DDIMScheduler):
    """DDIM that takes a student's steps where its pipeline asks for its default number of steps."""

    num_asked: int | None = None  # the steps by which the pipeline counts

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Set the timesteps: as many as asked for, or as the student takes."""
        student, self.num_asked = steps_of(self), num_inference_steps
        super().set_timesteps(num_inference_steps if student is None else student.asked(num_inference_steps), device)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Look at where an image-to-image pipeline begins; see `check_begin`."""
        check_begin(self, begin_index)


class StudentFlowMatchEulerDiscreteScheduler(FlowMatchEulerDiscreteScheduler):
    """Euler of flow matching that takes a student's steps where its pipeline asks for its default number of steps.

    Also by evenly spaced sigmas, as Flux does it. The student's own number of steps are its own steps, too.
    """

    num_asked: int | None = None  # the steps by which the pipeline counts; None: by those that are taken

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: list[float] | None = None,
        mu: float | None = None,
        timesteps: list[float] | None = None,
    ) -> None:
        """Set the timesteps and sigmas: those asked for, or those of the student."""
        student, self.num_asked = steps_of(self), num_inference_steps if sigmas is None else None
        if student is not None and timesteps is None and (sigmas is None or is_evenly_spaced(sigmas)):
            num_asked = num_inference_steps if sigmas is None else len(sigmas)
            steps = student.asked(num_asked or 0)
            if steps == student.num_inference_steps and student.sigmas is not None:
                num_inference_steps, sigmas = None, list(student.sigmas)
            elif steps != num_asked:
                num_inference_steps, sigmas = steps, None if sigmas is None else evenly_spaced(steps)
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at step `begin_index`; see `check_begin`."""
        check_begin(self, begin_index)
        super().set_begin_index(begin_index)


def evenly_spaced(num_inference_steps: int) -> list[float]:
    """Return the sigmas that pipelines such as Flux's hand to their scheduler."""
    return np.linspace(1.0, 1 / num_inference_steps, num_inference_steps).tolist()


def is_evenly_spaced(sigmas: Sequence[float]) -> bool:
    """Return whether `sigmas` are a pipeline's own, and not a user's."""
    return np.allclose(sigmas, evenly_spaced(len(sigmas)), rtol=0, atol=1e-6)


def student_scheduler(scheduler: Any, steps: StudentSteps) -> Any:
    """Return a scheduler like `scheduler` that takes a student's `steps` where its pipeline names no number.

    `scheduler`: a DDIMScheduler or a FlowMatchEulerDiscreteScheduler.
    """
    is_ddim = isinstance(scheduler, DDIMScheduler)
    kind = StudentDDIMScheduler if is_ddim else StudentFlowMatchEulerDiscreteScheduler
    student = kind.from_config({key: value for key, value in scheduler.config.items() if key != "_class_name"})
    student.register_to_config(**{ENTRY: steps._asdict()})
    return student


SCHEDULERS = (StudentDDIMScheduler, StudentFlowMatchEulerDiscreteScheduler)
pipeline_loading_utils.LOADABLE_CLASSES["diffusers_pqcad"] = {
    kind.__name__: ["save_pretrained", "from_pretrained"] for kind in SCHEDULERS
}
