"""Write the table of whole pipelines from the outcomes and figures of tests/test_compressed_pipelines.py.

    python examples/results/update_pipelines.py

Runs those tests, then writes `pipelines.json` and `pipelines.md` beside this file. A test checks that the committed
table has the pipelines of the tests and names no failure.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusers_pqcad.evaluation.speed import environment

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests" / "test_compressed_pipelines.py"
WORDS = {"passed": "yes", "failed": "**fails**", "skipped": "skipped"}


class Recorder:
    """A pytest plugin that keeps the outcome and the properties of each pipeline's test."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and "[" in report.nodeid:
            name = report.nodeid.split("[", 1)[1].rstrip("]")
            self.rows[name] = {"outcome": report.outcome} | dict(report.user_properties)


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """Return a pipeline's line of the table."""
    before, after = row["calibration_losses"]
    kept, units = row["units"]
    return [
        name,
        row["scheduler"].split(" is replaced")[0] + " (replaced)" if "replaced" in row["scheduler"] else "as it is",
        ", ".join(f"{weight:g}" for weight in row["weights"]),
        f"{row['replay_error']:.0e}",
        f"{row['nearest_error']:.1e}",
        f"{row['pq_error']:.1e}",
        f"{kept} of {units}",
        f"x{after / before:.2f}",
        "sampled" if row["student"] == "sampled" else "refused: " + row["student"],
        f"{row['student_error']:.2f}",
        WORDS[row["outcome"]],
    ]


def markdown(result: dict[str, Any]) -> str:
    """Return the table: a line for each pipeline."""
    header = [
        "pipeline",
        "scheduler",
        "weights of the branches",
        "replay",
        "rounded to nearest",
        "PQ",
        "units kept",
        "CAD's calibration loss",
        "student in another process",
        "its error",
        "works",
    ]
    lines = [header, ["---"] * len(header), *(cells(name, row) for name, row in result["pipelines"].items())]
    shown = ("torch", "diffusers", "diffusers_pqcad", "commit", "python", "cpu")
    versions = ", ".join(f"{key} {result['environment'][key]}" for key in shown)
    return (
        "# What PQ and CAD do with whole pipelines\n\n"
        "Written by `python examples/results/update_pipelines.py` from the outcomes of "
        "[tests/test_compressed_pipelines.py](../../tests/test_compressed_pipelines.py): each line is a test of a "
        "tiny pipeline of the real classes with random weights, so the figures say that the code works, and nothing "
        "about quality. Recorded with guidance, quantized to an average of 4 bits in two stages, distilled for a few "
        "updates, saved, loaded in another process and sampled there. *Replay*: how far the recorded outputs are from "
        "those of the model called by what was recorded, relative to their size. *Rounded to nearest*, *PQ*: error of "
        "the held-out trajectories (simulated). *Units kept*: reconstructions that lowered their held-out loss. "
        "*Calibration loss*: after the training, of what it was before. *Its error*: of the student's final states to "
        "those of full precision at all steps, relative to their size; of PQ's at all steps where a student was "
        "refused.\n\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + f"\n\n{versions}.\n"
    )


def main() -> int:
    """Run the tests and write both files; return pytest's exit code."""
    recorder = Recorder()
    options = ["-q", "-n", "0", "--no-header", "-p", "no:cacheprovider"]
    code = pytest.main([str(TESTS), *options], plugins=[recorder])
    result = {"environment": environment(), "pipelines": recorder.rows}
    (HERE / "pipelines.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "pipelines.md").write_text(markdown(result))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
