"""What trackers are told while a run trains: numbers of each round and update, and grids of pictures.

Through Accelerate's trackers, by the main process alone.
"""

import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.tracking import GeneralTracker
from accelerate.utils import ProjectConfiguration
from PIL import Image

from diffusers_pqcad.compression.distillation import StepStats
from diffusers_pqcad.compression.extras import require
from diffusers_pqcad.compression.processes import accelerator_on, is_main
from diffusers_pqcad.publishing.run_folder import LOCAL_SETTINGS, PROMPT_SETTINGS, load_json, save_json
from diffusers_pqcad.publishing.settings import CompressConfig, Settings, flat

RUN_FILE = "tracker.json"  # in the folder of the state: a run that goes on is the same run of the tracker


@dataclass(frozen=True)
class Journal:
    """The trackers that a run tells how it goes; none, unless it asks for some.

    Steps are rounds of PQ, and then updates of CAD, which count on over the students: wandb takes no step twice.
    """

    trackers: tuple[GeneralTracker, ...] = ()

    def log_numbers(self, values: Mapping[str, float], step: int) -> None:
        """Tell the trackers `values` by name, after `step` rounds and updates."""
        for tracker in self.trackers:
            tracker.log(dict(values), step=step)

    def log_picture(self, name: str, path: Path, step: int) -> None:
        """Show the trackers the picture in the file `path`, after `step` rounds and updates."""
        for tracker in self.trackers:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
            if tracker.name == "tensorboard":
                tracker.tracker.add_image(name, pixels, step, dataformats="HWC")
            elif tracker.name == "trackio":
                tracker.log({name: trackio_image(path)}, step=step)
            else:
                tracker.log_images({name: [Image.fromarray(pixels)]}, step=step)


def trackio_image(path: Path) -> Any:
    """Return what trackio keeps of a picture."""
    require("track", "trackio")
    import trackio

    return trackio.Image(str(path))


def numbers_of(key: str, entry: StepStats) -> dict[str, float]:
    """Return what trackers are told of an update of the student `key`, by diffusers' names where it has them."""
    values = {
        "train_loss": entry.loss,
        **{f"loss_{name}": value for name, value in entry.losses.items()},
        "lr": entry.step_rate,
        "images_per_second": entry.images_per_second,
    }
    if entry.held_out_error is not None:
        values |= {"held_out_error": entry.held_out_error, "best_error": entry.best_error}
    return {f"{key}/{name}": value for name, value in values.items()}


def numbers_of_round(key: str, entry: Mapping[str, Any]) -> dict[str, float]:
    """Return what trackers are told of a round of the PQ `key`, by its entry in the history."""
    values = {name: entry[name] for name in ("stage", "budget", "average_bits", "held_out_error")}
    return {f"{key}/{name}": value for name, value in (values | {"num_moves": len(entry["moves"])}).items()}


def check_tracker(run: CompressConfig) -> None:
    """Raise MissingExtraError, before the work, where a tracker that Accelerate imports is not installed."""
    if run.report_to == "tensorboard":
        require("track", "tensorboard")
    elif run.report_to == "wandb":
        require("track", "wandb")


@contextmanager
def journal_of(settings: Settings, state: Path) -> Iterator[Journal]:
    """Give the journal of a run whose state is in the folder `state`, and close it at the end of the block."""
    run = settings.run
    if run.report_to is None or not is_main():
        yield Journal()
        return
    logs = Path(run.output_dir, run.logging_dir)
    accelerator = accelerator_on(
        run.train_device,
        log_with=run.report_to,
        project_config=ProjectConfiguration(run.output_dir, logging_dir=str(logs)),
    )
    name = run_name(state)
    accelerator.init_trackers(
        run.tracker_project_name,
        config=told_settings(settings),
        init_kwargs={
            "trackio": {"name": name, "resume": "allow"},
            "wandb": {"name": name, "id": name, "resume": "allow", "dir": run.output_dir},
        },
    )
    try:
        yield Journal(tuple(accelerator.trackers))
    finally:
        for tracker in accelerator.trackers:  # not end_training, which ends the processes' group
            tracker.finish()


def run_name(state: Path) -> str:
    """Return the name of the run in its tracker, which is kept in the folder `state`: that of its folder, and more."""
    path = state / RUN_FILE
    if not path.exists():
        save_json(path, {"name": f"{state.parent.name}-{uuid.uuid4().hex[:8]}"})
    return load_json(path)["name"]


def told_settings(settings: Settings) -> dict[str, bool | int | float | str | None]:
    """Return the settings that trackers are told: none that names a place of this computer; lists as texts."""
    values = {name: value for name, value in flat(settings).items() if name not in (*LOCAL_SETTINGS, *PROMPT_SETTINGS)}
    return {name: str(value) if isinstance(value, list | tuple) else value for name, value in values.items()}
