"""Specification of what trackers are told: numbers by name and step, pictures, and by the main process alone."""

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusers_pqcad.compression.distillation import StepStats
from diffusers_pqcad.compression.extras import MissingExtraError
from diffusers_pqcad.publishing import tracking
from diffusers_pqcad.publishing.settings import CompressConfig, Settings, settings_of
from diffusers_pqcad.publishing.supervision import tell_of_round
from diffusers_pqcad.publishing.tracking import (
    Journal,
    check_tracker,
    journal_of,
    numbers_of,
    numbers_of_round,
    run_name,
    told_settings,
)

NAMES_OF_ROUND = ("stage", "budget", "average_bits", "held_out_error", "num_moves")
ENTRY = StepStats(3, 0.5, {"teacher": 0.4, "calibration": 0.1}, 1e-3, 12.0)


@pytest.fixture
def picture(tmp_path) -> Path:
    """A file with a picture of two rows and three columns, in which each pixel has a number of its own."""
    path = tmp_path / "grid.png"
    Image.fromarray(np.arange(18, dtype=np.uint8).reshape(2, 3, 3)).save(path)
    return path


def settings(tmp_path: Path, tracker: str | None, **changes: Any) -> Settings:
    (tmp_path / "run" / "state").mkdir(parents=True)
    return settings_of({"output_dir": str(tmp_path / "run"), "report_to": tracker, "class_labels": [1, 2]} | changes)


def told(given: Settings, picture: Path) -> None:
    """Tell the tracker of `given` two steps, in two runs of the process."""
    state = Path(given.run.output_dir) / "state"
    for step in (3, 4):
        with journal_of(given, state) as journal:
            journal.log_numbers(numbers_of("pq_cad", ENTRY), step)
            journal.log_picture("pq_cad/validation", picture, step)


def test_an_update_has_the_names_of_diffusers_and_its_student():
    assert numbers_of("pq_cad", ENTRY) == {
        "pq_cad/train_loss": 0.5,
        "pq_cad/loss_teacher": 0.4,
        "pq_cad/loss_calibration": 0.1,
        "pq_cad/lr": 1e-3,
        "pq_cad/images_per_second": 12.0,
    }
    measured = StepStats(4, 0.5, {}, 1e-3, 12.0, held_out_error=0.2, best_error=0.1)
    assert numbers_of("x", measured).items() >= {"x/held_out_error": 0.2, "x/best_error": 0.1}.items()


def test_a_round_of_pq_is_told_by_its_stage_its_bits_and_its_error():
    entry = {"stage": 1, "budget": 4.0, "average_bits": 4.5, "held_out_error": 0.25, "moves": [{}, {}], "bits": {}}
    assert numbers_of_round("pq", entry) == {
        "pq/stage": 1, "pq/budget": 4.0, "pq/average_bits": 4.5, "pq/held_out_error": 0.25, "pq/num_moves": 2,
    }  # fmt: skip


def test_rounds_of_a_later_pq_count_on_after_what_was_before_it():
    """wandb takes no step twice."""
    steps: list[int] = []

    class Tracker:
        def log(self, values: dict[str, float], step: int) -> None:
            assert set(values) == {f"pq_other/{name}" for name in NAMES_OF_ROUND}
            steps.append(step)

    entry = dict.fromkeys(("stage", "budget", "average_bits", "held_out_error"), 1.0) | {"moves": []}
    for count in (1, 2):
        tell_of_round(Journal((Tracker(),)), "pq_other", 10, count, entry)
    assert steps == [11, 12]


def test_tensorboard_has_the_numbers_and_the_pictures_in_the_folder(tmp_path, picture):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told(settings(tmp_path, "tensorboard", tracker_project_name="mine", max_grad_norm=math.inf), picture)
    found = EventAccumulator(str(tmp_path / "run" / "logs" / "mine"))
    found.Reload()
    assert [(event.step, event.value) for event in found.Scalars("pq_cad/train_loss")] == [(3, 0.5), (4, 0.5)]
    events = found.Images("pq_cad/validation")
    assert [(event.step, event.height, event.width) for event in events] == [(3, 2, 3), (4, 2, 3)]


def test_trackio_has_the_numbers_and_the_pictures_in_one_run(tmp_path, picture, monkeypatch):
    assert "trackio" not in sys.modules  # it reads the variable when it is imported
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    given = settings(tmp_path, "trackio")
    told(given, picture)
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("pqcad-compress")
    assert name == run_name(tmp_path / "run" / "state")
    logs = [entry for entry in SQLiteStorage.get_logs("pqcad-compress", name) if "pq_cad/train_loss" in entry]
    assert [(entry["step"], entry["pq_cad/train_loss"]) for entry in logs] == [(3, 0.5), (4, 0.5)]
    assert len(list((tmp_path / "trackio").rglob("*.png"))) == 2


def test_others_get_pictures_as_accelerate_has_it(picture):
    shown: list[tuple[Any, ...]] = []

    class Wandb:
        name = "wandb"

        def log_images(self, values: dict[str, Any], step: int) -> None:
            shown.append((step, *((name, image.size) for name, (image,) in values.items())))

    Journal((Wandb(),)).log_picture("x/validation", picture, 7)
    assert shown == [(7, ("x/validation", (3, 2)))]


@pytest.mark.parametrize(("tracker", "is_main"), [(None, True), ("tensorboard", False)])
def test_without_a_tracker_and_in_other_processes_nothing_is_written(tmp_path, picture, monkeypatch, tracker, is_main):
    monkeypatch.setattr(tracking, "is_main", lambda: is_main)
    told(settings(tmp_path, tracker), picture)
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["state"]


def test_trackers_are_told_no_place_of_this_computer(tmp_path):
    values = told_settings(settings(tmp_path, None, pretrained_model_name_or_path=str(tmp_path / "teacher")))
    assert values["class_labels"] == "[1, 2]"
    assert all(value is None or isinstance(value, bool | int | float | str) for value in values.values())
    assert not any(str(tmp_path) in str(value) for value in values.values())


@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_before_the_work(monkeypatch, tracker):
    monkeypatch.setitem(sys.modules, tracker, None)
    with pytest.raises(MissingExtraError, match=rf"{tracker}: .*diffusers-pqcad\[track\]"):
        check_tracker(CompressConfig(report_to=tracker))
    check_tracker(CompressConfig())
