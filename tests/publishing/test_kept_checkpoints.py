"""Specification of the checkpoints that a run keeps: names and limits of diffusers' scripts, and the way back."""

import os
from pathlib import Path

import pytest

from diffusers_pqcad.compression.checkpoint import NotWrittenError, load_checkpoint, save_checkpoint
from diffusers_pqcad.publishing.kept_checkpoints import (
    checkpoint_files,
    checkpoint_named,
    go_back_,
    keep_checkpoint,
    resume_file,
)

pytestmark = pytest.mark.fast


@pytest.fixture
def folder(tmp_path) -> Path:
    """The folder of a run."""
    (tmp_path / "state").mkdir()
    return tmp_path


def keep(folder: Path, step: int, limit: int | None = None, key: str = "pq_cad") -> None:
    save_checkpoint(resume_file(folder / "state", key), {"step": step})
    keep_checkpoint(folder, key, step, limit)


def test_a_checkpoint_stays_as_the_training_goes_on(folder):
    keep(folder, 90)
    keep(folder, 100)
    keep_checkpoint(folder, "pq_cad", 100, None)  # once more, after a kill
    assert {step: load_checkpoint(path) for step, path in checkpoint_files(folder).items()} == {
        90: {"step": 90},
        100: {"step": 100},
    }
    assert sorted(path.name for path in (folder / "checkpoint-100").iterdir()) == ["pq_cad.safetensors"]


def test_a_checkpoint_is_copied_where_a_file_has_one_name_only(folder, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", refuse)
    keep(folder, 1)
    assert load_checkpoint(checkpoint_files(folder)[1]) == {"step": 1}


def test_the_last_ones_are_kept_by_number_and_nothing_of_others_is_touched(folder):
    for name in ("checkpoint-7", "checkpoint-mine", "assets"):
        (folder / name).mkdir()
    (folder / "checkpoint-mine" / "x.safetensors").write_text("")
    for step in (8, 9, 10, 100):
        keep(folder, step, limit=2)
        (folder / f"checkpoint-{step}" / "notes.txt").write_text("my own")
    assert list(checkpoint_files(folder)) == [10, 100]
    assert (folder / "checkpoint-8" / "notes.txt").exists()
    assert (folder / "checkpoint-mine" / "x.safetensors").exists()


def test_the_oldest_goes_once_the_new_one_is_there(folder, monkeypatch):
    keep(folder, 1)

    def fail(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(KeyboardInterrupt):
        keep_checkpoint(folder, "pq_cad", 2, 1)
    assert list(checkpoint_files(folder)) == [1]


def test_a_run_whose_folder_is_gone_is_told_so(tmp_path):
    with pytest.raises(NotWrittenError, match="is gone"):
        keep_checkpoint(tmp_path / "run", "pq_cad", 1, None)


def test_a_run_goes_on_from_the_latest_by_itself(folder):
    assert checkpoint_named(folder, "latest") is None
    assert checkpoint_named(folder / "new", "latest") is None


@pytest.mark.parametrize("name", ["checkpoint-2", "elsewhere/checkpoint-2"])
def test_a_run_goes_back_to_a_checkpoint(folder, name):
    keep(folder, 2)
    keep(folder, 4)
    go_back_(folder, checkpoint_named(folder, name))
    assert load_checkpoint(resume_file(folder / "state", "pq_cad")) == {"step": 2}
    keep(folder, 3)  # and on: the checkpoint stays what it was
    assert load_checkpoint(checkpoint_files(folder)[2]) == {"step": 2}


def test_a_checkpoint_that_cannot_be_gone_back_to_is_refused(folder):
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: .*\(none\), got 'checkpoint-2'"):
        checkpoint_named(folder, "checkpoint-2")
    keep(folder, 2)
    with pytest.raises(ValueError, match=r"\(checkpoint-2\), got 'checkpoint-4'"):
        checkpoint_named(folder, "checkpoint-4")
    save_checkpoint(folder / "state" / "pq_cad.safetensors", {})
    with pytest.raises(ValueError, match="the training of 'checkpoint-2' is finished"):
        checkpoint_named(folder, "checkpoint-2")
    (folder / "state" / "pq_cad.safetensors").unlink()
    path = checkpoint_files(folder)[2]
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"checkpoint-2/pq_cad\.safetensors: .*damaged"):
        checkpoint_named(folder, "checkpoint-2")
