"""Specification of the sizes in a card: file and memory, beside full precision in float32 and bfloat16."""

import logging
from typing import Any

import pytest
import torch
from conftest import build_tiny_unet

from diffusers_pqcad.evaluation.resident import Resident, Sampling
from diffusers_pqcad.evaluation.speed import directory_size_bytes
from diffusers_pqcad.publishing import sizes
from diffusers_pqcad.publishing.sizes import BFLOAT16, FLOAT32, STUDENT, memory_rows, memory_table

CALL: dict[str, Any] = {"num_inference_steps": 2, "inputs": [{"prompt": "a cat"}], "arguments": {}, "num_threads": 3}
MEGABYTE = 1_000_000


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[Sampling]:
    """What was sampled, in the place of processes that take 100 MB, then 60, then 30, beyond 200."""
    asked: list[Sampling] = []

    def resident(sampling: Sampling) -> Resident:
        asked.append(sampling)
        return Resident((200 + [100, 60, 30][len(asked) - 1]) * MEGABYTE, 200 * MEGABYTE)

    monkeypatch.setattr(sizes, "resident_while_sampling", resident)
    return asked


def rows_in(folder: Any) -> list[dict[str, Any]]:
    teacher, student = Sampling("teacher", **CALL), Sampling("student", **CALL)
    return memory_rows(teacher, student, build_tiny_unet(), (8 * MEGABYTE, MEGABYTE), folder)


def test_the_teacher_runs_in_both_dtypes_and_the_student_once(sampled, tmp_path):
    rows = rows_in(tmp_path)
    assert [(each.path, each.dtype) for each in sampled] == [
        ("teacher", "float32"),
        ("teacher", "bfloat16"),
        ("student", "float32"),
    ]
    assert [row["name"] for row in rows] == [FLOAT32, BFLOAT16, STUDENT]
    assert list(tmp_path.iterdir()) == []  # the copy in bfloat16 was for a moment
    build_tiny_unet().to(torch.bfloat16).save_pretrained(tmp_path)
    assert [row["size_bytes"] for row in rows] == [8 * MEGABYTE, directory_size_bytes(tmp_path), MEGABYTE]


def test_the_table_by_hand(sampled, tmp_path):
    lines = memory_table(rows_in(tmp_path)).splitlines()
    assert lines[0] == "| | file MB | memory MB |"
    assert lines[2] == "| full precision, float32 | 8.00 | 100 |"
    assert lines[3].startswith("| full precision, bfloat16 | ")
    assert lines[3].endswith(" | 60 |")
    assert lines[4] == "| this model | 1.00 | 30 |"
    assert lines[-1].endswith("beyond what Python and its libraries took before; 3 threads.")


def test_what_failed_is_said_and_no_figure_is_made_up(monkeypatch, tmp_path, caplog):
    def fail(sampling: Sampling) -> Resident:
        if sampling.dtype == "bfloat16":
            raise RuntimeError("TypeError: Got unsupported <BFloat16>")
        return Resident(3 * MEGABYTE, MEGABYTE)

    monkeypatch.setattr(sizes, "resident_while_sampling", fail)
    with caplog.at_level(logging.WARNING):
        text = memory_table(rows_in(tmp_path))
    assert "| full precision, float32 | 8.00 | 2 |" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| full precision, bfloat16")]
    assert line.endswith(" |  |")
    assert "full precision, bfloat16: not measured, as its process failed (TypeError: Got unsupported &lt;BF" in text
    assert "Memory of full precision, bfloat16 is not measured: TypeError" in caplog.text


def test_a_card_says_that_memory_was_not_measured():
    assert memory_table(None) == "Memory while sampling was not measured."
