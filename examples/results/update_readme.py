"""Write the tables of the READMEs and of end_to_end.md from the committed results in this folder.

    python examples/results/update_readme.py

`NAME/metrics.json` is a run of `examples/distill.py`, `results:NAME` its table, `quality:NAME` the same without times;
`SCRIPT.json` and `SCRIPT-WHICH.json` are runs of `examples/benchmarks/SCRIPT.py`. A test runs `render` and compares,
so a table that was edited by hand, or left behind by a new run, fails.
"""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

from diffusers_pqcad.publishing.hub import results_table, table_notes

HERE = Path(__file__).resolve().parent
READMES = (
    HERE.parents[1] / "README.md",
    HERE.parent / "benchmarks" / "README.md",
    HERE.parent / "guides" / "scale.md",
    HERE / "end_to_end.md",
)


def run_block(metrics: dict, *, times: bool) -> str:
    """Return the README's text for a run of `examples/distill.py`: its table and its notes."""
    return f"{results_table(metrics, times=times)}\n\n{table_notes(metrics, times=times)}"


def benchmark_block(script: str, result: dict) -> str:
    """Return the README's text for a run of `examples/benchmarks/SCRIPT.py`."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    return import_module(script).markdown(result)


def block(name: str, *, times: bool) -> str:
    """Return the README's text for the results `name`."""
    folder = HERE / name
    if folder.is_dir():
        return run_block(json.loads((folder / "metrics.json").read_text()), times=times)
    return benchmark_block(name.partition("-")[0], json.loads((HERE / f"{name}.json").read_text()))


def render(text: str) -> str:
    """Return the README `text` with every `<!-- results:NAME -->` and `<!-- quality:NAME -->` block up to date."""

    def replace(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        return f"<!-- {kind}:{name} -->\n{block(name, times=kind == 'results')}\n<!-- {kind}:end -->"

    return re.sub(r"<!-- (results|quality):(?!end)(\S+) -->\n.*?<!-- \1:end -->", replace, text, flags=re.DOTALL)


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(render(readme.read_text()))
