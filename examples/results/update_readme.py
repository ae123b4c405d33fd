"""Write the tables of the README from the committed `metrics.json` of each run in this folder.

    python examples/results/update_readme.py

A test runs `render` and compares, so a table that was edited by hand, or left behind by a new run, fails.
"""

import json
import re
from pathlib import Path

from diffusers_pqcad.hub import results_table, table_notes

HERE = Path(__file__).resolve().parent
README = HERE.parents[1] / "README.md"


def block(name: str) -> str:
    """Return the README's text for the run `name`: its table and its notes."""
    metrics = json.loads((HERE / name / "metrics.json").read_text())
    return f"{results_table(metrics)}\n\n{table_notes(metrics)}"


def render(text: str) -> str:
    """Return the README `text` with every `<!-- results:NAME -->` block brought up to date."""

    def replace(match: re.Match[str]) -> str:
        return f"<!-- results:{match[1]} -->\n{block(match[1])}\n<!-- results:end -->"

    return re.sub(r"<!-- results:(?!end)(\S+) -->\n.*?<!-- results:end -->", replace, text, flags=re.DOTALL)


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
