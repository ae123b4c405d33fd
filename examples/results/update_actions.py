"""Write the table of actions by model family from the outcomes of tests/test_actions.py.

    python examples/results/update_actions.py

Runs those tests, then writes `actions.json` and `actions.md` beside this file. A test checks that the committed table
has the cells of the tests and names no failure.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusers_pqcad.evaluation.speed import environment

HERE = Path(__file__).resolve().parent
TESTS = HERE.parents[1] / "tests" / "test_actions.py"
WORDS = {"passed": "yes", "refused": "refused", "skipped": "skipped", "failed": "**fails**"}


class Recorder:
    """A pytest plugin that keeps the worst outcome of each (action, family)."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, str]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item: pytest.Item, call: Any) -> Any:
        report = yield
        marker = item.get_closest_marker("action")
        if marker is None or (report.when != "call" and report.passed):
            return report
        outcome = "refused" if report.passed and marker.kwargs["refused"] else report.outcome
        row = self.cells.setdefault(marker.args[0], {})
        family = item.callspec.params["family"]  # type: ignore[attr-defined]
        if row.get(family) != "failed":
            row[family] = outcome
        return report


def markdown(result: dict[str, Any]) -> str:
    """Return the table: actions down, families across; "-": no such method in the class, or not tested."""
    families = list(dict.fromkeys(family for row in result["actions"].values() for family in row))
    lines = [
        f"| action | {' | '.join(families)} |",
        f"| --- |{' :---: |' * len(families)}",
        *(
            f"| {action} | {' | '.join(WORDS[row[family]] if family in row else '-' for family in families)} |"
            for action, row in result["actions"].items()
        ),
    ]
    shown = ("torch", "diffusers", "diffusers_pqcad", "python", "cpu", "cpu_capability")
    versions = ", ".join(f"{key} {result['environment'][key]}" for key in shown)
    return (
        "# What works with a quantized model\n\n"
        "Written by `python examples/results/update_actions.py` from the outcomes of "
        "[tests/test_actions.py](../../tests/test_actions.py): each cell is a test of a tiny model of the real class. "
        '"refused": it cannot work, and raises with the reason; "-": not tested, or the class has no such method.\n\n'
        + "\n".join(lines)
        + f"\n\n{versions}.\n"
    )


def main() -> int:
    """Run the tests and write both files; return pytest's exit code."""
    recorder = Recorder()
    options = ["-q", "-n", "0", "--no-header", "-p", "no:cacheprovider", "-m", "slow or not slow"]
    code = pytest.main([str(TESTS), *options], plugins=[recorder])
    result = {"environment": environment(), "actions": recorder.cells}
    (HERE / "actions.json").write_text(json.dumps(result, indent=1) + "\n")
    (HERE / "actions.md").write_text(markdown(result))
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
