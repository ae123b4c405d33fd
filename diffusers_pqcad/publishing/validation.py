"""Validation while students train: grids of their pictures beside the teacher's, of the same prompts and noise."""

from pathlib import Path
from typing import Any

from torch import Tensor

from diffusers_pqcad.compression.calling import call_arguments_of, distinct_inputs
from diffusers_pqcad.compression.processes import on_main
from diffusers_pqcad.publishing.pipelines import Row, call_arguments, inputs_of_run, sample_images
from diffusers_pqcad.publishing.plots import plot_samples
from diffusers_pqcad.publishing.settings import CompressConfig

FOLDER = "validation"  # in the folder of the run
MAX_IMAGES = 12  # of a grid, where no prompts are given
DEFAULT_STEPS = 100  # between two grids


def validation_steps(run: CompressConfig) -> int | None:
    """Return the updates between two grids of `run`; None: it has none."""
    return run.validation_steps or (DEFAULT_STEPS if run.validation_prompts else None)


def validation_inputs(run: CompressConfig) -> list[Any] | None:
    """Return the inputs of a grid: the validation prompts, else those that are measured; None: it takes none."""
    if not run.validation_prompts:
        return inputs_of_run(run).measured
    others = {} if run.negative_prompt is None else {"negative_prompt": run.negative_prompt}
    return [{"prompt": prompt} | others for prompt in run.validation_prompts]


def check_validation(teacher: Any, run: CompressConfig) -> None:
    """Raise ValueError for validation prompts that the teacher's pipeline does not take."""
    if not run.validation_prompts:
        return
    try:
        call_arguments_of(teacher, distinct_inputs(validation_inputs(run)), call_arguments(run))
    except ValueError as error:
        raise ValueError(f"validation_prompts: {error}") from error


class Grids:
    """The grids of a run: the teacher's pictures, made once, and below them a student's, of the same noise.

    The pictures are made on the CPU, of the packed student, as it will be used; several processes share them.
    """

    def __init__(self, teacher: Row, run: CompressConfig, folder: Path) -> None:
        self.teacher, self.run, self.folder = teacher, run, folder / FOLDER
        self.inputs = validation_inputs(run)
        self.count = len(run.validation_prompts or ()) or min(MAX_IMAGES, run.num_images)
        self.wanted: Tensor | None = None

    def draw_grid(self, student: Row, step: int) -> Path:
        """Return the file of a grid with the `student` after `step` updates of the run; the main process draws it."""
        if self.wanted is None:
            self.wanted = sample_images(self.teacher, self.run, self.inputs, count=self.count)
        found = sample_images(student, self.run, self.inputs, count=self.count)
        rows = {
            f"{row.name}, {row.num_inference_steps} steps": images
            for row, images in ((self.teacher, self.wanted), (student, found))
        }
        path = self.folder / f"{student.key}-{step:06d}.png"
        on_main(self.save_grid, path, rows)
        return path

    def save_grid(self, path: Path, rows: dict[str, Tensor]) -> None:
        """Write a grid to `path`."""
        path.parent.mkdir(exist_ok=True)
        plot_samples(path, rows, self.run.validation_prompts or ())
