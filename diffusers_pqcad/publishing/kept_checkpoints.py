"""Checkpoints that a run keeps, as diffusers' training scripts do: folders `checkpoint-STEP` of its output folder.

A run goes on by itself from what its `state` holds, the latest of each training. These are copies of that, to go back
to. STEP counts the updates of all of the run's students.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path

from diffusers_pqcad.compression.checkpoint import load_checkpoint, replacing, room_for

PREFIX, SUFFIX = "checkpoint-", ".safetensors"
LATEST = "latest"


def checkpoint_files(folder: Path) -> dict[int, Path]:
    """Return the file of each checkpoint that is kept in `folder`, by its step, in their order."""
    found = {}
    for path in folder.glob(f"{PREFIX}*/*{SUFFIX}"):
        step = path.parent.name.removeprefix(PREFIX)
        if step.isdecimal():
            found[int(step)] = path
    return dict(sorted(found.items()))


def resume_file(state: Path, key: str) -> Path:
    """Return the file from which the training of the student `key` goes on."""
    return state / f"{key}-resume{SUFFIX}"


def keep_checkpoint(folder: Path, key: str, step: int, limit: int | None) -> None:
    """Keep what the training of the student `key` goes on from as `checkpoint-STEP`, and `limit` of these at most.

    The oldest go, once the new one is there. It is the same file under a second name, where the disk has such.
    """
    path = folder / f"{PREFIX}{step}" / f"{key}{SUFFIX}"
    with room_for(path.parent):
        path.parent.mkdir(exist_ok=True)
    copy_file(resume_file(folder / "state", key), path)
    files = checkpoint_files(folder)
    for old in list(files)[: -limit if limit else 0]:
        files[old].unlink()
        with suppress(OSError):  # something else is in it
            files[old].parent.rmdir()


def copy_file(source: Path, path: Path) -> None:
    """Let `path` be what `source` is now: a second name of the file, which is never written to; else a copy."""
    if path.exists() and path.samefile(source):
        return
    with replacing(path) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def checkpoint_named(folder: Path, name: str) -> Path | None:
    """Return the file of the checkpoint `name` of the run in `folder`; None for "latest", which is what it has anyway.

    Of a path, the last part counts, as in diffusers' scripts. Raises ValueError for a checkpoint that is not there, is
    damaged, or whose training is finished: later stages were made of its result.
    """
    if name == LATEST:
        return None
    files = {f"{PREFIX}{step}": path for step, path in checkpoint_files(folder).items()}
    path = files.get(Path(name).name)
    if path is None:
        raise ValueError(
            f"resume_from_checkpoint: expected {LATEST!r} or a checkpoint in {folder} ({', '.join(files) or 'none'}), "
            f"got {name!r}."
        )
    result = folder / "state" / path.name
    if result.exists():
        raise ValueError(
            f"resume_from_checkpoint: the training of {name!r} is finished, and what follows was made of its result, "
            f"{result}. Leave the flag out to go on with that, or give another output_dir to train again."
        )
    load_checkpoint(path)
    return path


def go_back_(folder: Path, checkpoint: Path) -> None:
    """Let the training of a kept `checkpoint` go on from there."""
    copy_file(checkpoint, resume_file(folder / "state", checkpoint.stem))
