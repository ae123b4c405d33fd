"""What a student takes on the disk and in memory while it samples, beside its teacher in float32 and in bfloat16."""

import copy
import logging
import tempfile
from pathlib import Path
from typing import Any

import torch

from diffusers_pqcad.evaluation.resident import Sampling, resident_while_sampling
from diffusers_pqcad.evaluation.speed import directory_size_bytes

logger = logging.getLogger(__name__)
FLOAT32, BFLOAT16, STUDENT = "full precision, float32", "full precision, bfloat16", "this model"


def memory_rows(
    teacher: Sampling, student: Sampling, denoiser: torch.nn.Module, sizes: tuple[int, int], folder: Path
) -> list[dict[str, Any]]:
    """Return a row each of the `teacher` in float32 and bfloat16, and of the `student`, as JSON values.

    `sizes` are the bytes of the denoisers' files, in float32 and of the student; those in bfloat16 are measured on a
    copy of the float `denoiser`, which is saved in `folder` for a moment. A row whose process failed has the `error`
    in the place of its bytes in memory, and a warning tells of it.
    """
    samplings = {FLOAT32: teacher, BFLOAT16: half(teacher), STUDENT: student}
    bytes_of = {FLOAT32: sizes[0], BFLOAT16: bytes_in_bfloat16(denoiser, folder), STUDENT: sizes[1]}
    return [memory_row(name, bytes_of[name], sampling) for name, sampling in samplings.items()]


def half(sampling: Sampling) -> Sampling:
    """Return the same call of the same pipeline in bfloat16."""
    return Sampling(**vars(sampling) | {"dtype": "bfloat16"})


def memory_row(name: str, size_bytes: int, sampling: Sampling) -> dict[str, Any]:
    """Return one row: the bytes of the file, and those in memory."""
    try:
        found = resident_while_sampling(sampling)._asdict()
    except RuntimeError as error:
        logger.warning("Memory of %s is not measured: %s", name, error)
        found = {"error": str(error)}
    return {"name": name, "size_bytes": size_bytes, "num_threads": sampling.num_threads} | found


def bytes_in_bfloat16(denoiser: torch.nn.Module, folder: Path) -> int:
    """Return the bytes of the files of the float `denoiser` in bfloat16."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        halved: Any = copy.deepcopy(denoiser).to(torch.bfloat16)
        halved.save_pretrained(place)
        return directory_size_bytes(place)


def memory_table(rows: list[dict[str, Any]] | None) -> str:
    """Return the rows as Markdown, with what they mean; None: they were not measured, which is said."""
    if rows is None:
        return "Memory while sampling was not measured."
    lines = ["| | file MB | memory MB |", "| --- | ---: | ---: |"]
    lines += [f"| {row['name']} | {row['size_bytes'] / 1e6:.2f} | {in_memory(row)} |" for row in rows]
    failed = [f"{row['name']}: not measured, as its process failed ({plain_line(row['error'])})" for row in rows
              if "error" in row]  # fmt: skip
    notes = [
        "File: of the denoiser. Memory: the most that was resident while a process of its own made one image, beyond "
        f"what Python and its libraries took before; {rows[0]['num_threads']} threads.",
        *(f"{text}." for text in failed),
    ]
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def in_memory(row: dict[str, Any]) -> str:
    """Return the cell of a row's memory."""
    return "" if "error" in row else f"{(row['peak_bytes'] - row['before_bytes']) / 1e6:.0f}"


def plain_line(text: str) -> str:
    """Return the beginning of an error without what Markdown would take for its own."""
    return " ".join(text.replace("<", "&lt;").replace("`", "'").split())[:200]
