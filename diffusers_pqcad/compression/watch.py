"""What a caller of `distill` does in between: at updates of its choice, in all processes alike."""

from collections.abc import Callable
from dataclasses import dataclass


def nothing(step: int) -> None:
    """Do nothing after `step` updates."""


@dataclass(frozen=True)
class Watch:
    """When a resume file is written, and when pictures are made, counted in updates of the student from 1.

    `checkpointing_steps`: updates between two resume files, None: one at each measurement; after the last update there
    is one in any case. `kept(step)` is called once the file is there. `show(step)` is called each `validation_steps`
    (None: never), while the student has its averaged weights, which it must leave as they are.
    """

    checkpointing_steps: int | None = None
    kept: Callable[[int], None] = nothing
    validation_steps: int | None = None
    show: Callable[[int], None] = nothing

    def saves(self, step: int, *, measured: bool, is_last: bool) -> bool:
        """Return whether a resume file is due after `step` updates."""
        if self.checkpointing_steps is None:
            return measured
        return is_last or step % self.checkpointing_steps == 0

    def shows(self, step: int) -> bool:
        """Return whether pictures are due after `step` updates."""
        return self.validation_steps is not None and step % self.validation_steps == 0
