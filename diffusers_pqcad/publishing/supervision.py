"""What a run does beside the training of its students: it tells trackers, draws grids, and keeps checkpoints."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.distillation import StepStats
from diffusers_pqcad.compression.processes import on_main
from diffusers_pqcad.compression.watch import Watch
from diffusers_pqcad.publishing.kept_checkpoints import keep_checkpoint
from diffusers_pqcad.publishing.pipelines import Row, row_of
from diffusers_pqcad.publishing.settings import CompressConfig
from diffusers_pqcad.publishing.students import student_arguments, student_pipeline
from diffusers_pqcad.publishing.tracking import Journal, numbers_of, numbers_of_round
from diffusers_pqcad.publishing.validation import Grids, validation_steps


@dataclass(frozen=True)
class Watcher:
    """What is done beside one training: `tell` hears of each update, `watch` says of its student what else."""

    tell: Callable[[StepStats], None] = lambda entry: None
    watch: Callable[[nn.Module], Watch] = lambda student: Watch()


def tell_of_round(journal: Journal, key: str, before: int, count: int, entry: Mapping[str, Any]) -> None:
    """Tell the trackers of round `count` of the PQ `key`, with so many rounds and updates `before` it."""
    journal.log_numbers(numbers_of_round(key, entry), before + count)


class Supervision:
    """What is done beside the trainings of a run in `folder`; the updates of its students are counted on.

    `first_updates` are those before each student, by its key; `num_rounds` those of PQ, which trackers count before.
    """

    def __init__(
        self,
        run: CompressConfig,
        folder: Path,
        teacher: Any,
        calibration: CalibrationSet,
        first_updates: Mapping[str, int],
        journal: Journal,
        num_rounds: int = 0,
    ) -> None:
        self.run, self.folder, self.teacher, self.calibration = run, folder, teacher, calibration
        self.first_updates, self.journal, self.num_rounds = first_updates, journal, num_rounds
        self.grids = Grids(Row("teacher", "teacher", teacher, run.num_inference_steps), run, folder)

    def of(self, key: str, stride: int, *, folded: bool) -> Watcher:
        """Return what is done beside the training of the student `key`, of every `stride`-th of the recorded steps."""
        return Watcher(partial(self.tell_of_update, key), partial(self.watch_student, key, stride, folded))

    def tell_of_update(self, key: str, entry: StepStats) -> None:
        """Tell the trackers of an update."""
        step = self.num_rounds + self.first_updates[key] + entry.step
        self.journal.log_numbers(numbers_of(key, entry), step)

    def watch_student(self, key: str, stride: int, folded: bool, student: nn.Module) -> Watch:
        """Return what else is done while `student` trains."""
        return Watch(
            checkpointing_steps=self.run.checkpointing_steps,
            kept=partial(self.keep_if_due, key),
            validation_steps=validation_steps(self.run),
            show=partial(self.show_student, key, stride, folded, student),
        )

    def keep_if_due(self, key: str, step: int) -> None:
        """Keep a checkpoint, where one is due: a run that was asked to stop saves at any update."""
        every = self.run.checkpointing_steps
        if every is not None and step % every == 0:
            total = self.first_updates[key] + step
            on_main(keep_checkpoint, self.folder, key, total, self.run.checkpoints_total_limit)

    def show_student(self, key: str, stride: int, folded: bool, student: nn.Module, step: int) -> None:
        """Draw a grid of the student as it is now, packed, and show it to the trackers."""
        total = self.first_updates[key] + step
        packed = copy.deepcopy(student).to("cpu")
        pipeline = student_pipeline(self.teacher, packed, self.calibration, stride, folded=folded)
        arguments = student_arguments(self.teacher, self.calibration, stride, folded=folded)
        path = self.grids.draw_grid(row_of(key, "student", pipeline, arguments), total)
        self.journal.log_picture(f"{key}/validation", path, self.num_rounds + total)
