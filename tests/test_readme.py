"""The README's code runs and its tables are those of the committed runs."""

import json
import re
from pathlib import Path

from diffusers_pqcad.loading.coverage import average_bits

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_tables_come_from_the_committed_metrics(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "results"))
    import update_readme

    assert update_readme.READMES[0].read_text() == README
    for readme in update_readme.READMES:
        text = readme.read_text()
        assert update_readme.render(text) == text, readme
        assert len(re.findall(r"<!-- (?:results|quality|summary):(?!end)", text)) >= 1


def test_the_table_of_pipelines_has_those_of_the_tests_and_no_failure():
    import test_compressed_pipelines

    rows = json.loads((ROOT / "examples" / "results" / "pipelines.json").read_text())["pipelines"]
    expected = dict.fromkeys(test_compressed_pipelines.PIPELINES, "passed")
    assert {name: row["outcome"] for name, row in rows.items()} == expected, "run examples/results/update_pipelines.py"
    table = (ROOT / "examples" / "results" / "pipelines.md").read_text()
    assert all(f"| {name} |" in table for name in rows)


def test_the_table_of_actions_has_the_cells_of_the_tests_and_no_failure():
    import test_actions

    cells = {}
    for name, function in vars(test_actions).items():
        marks = {mark.name: mark for mark in getattr(function, "pytestmark", [])} if name.startswith("test_") else {}
        if "action" in marks:
            families = [parameters.values[0] for parameters in marks["parametrize"].args[1]]
            outcome = "refused" if marks["action"].kwargs["refused"] else "passed"
            cells.setdefault(marks["action"].args[0], {}).update(dict.fromkeys(families, outcome))
    result = json.loads((ROOT / "examples" / "results" / "actions.json").read_text())
    assert result["actions"] == cells, "run examples/results/update_actions.py"
    table = (ROOT / "examples" / "results" / "actions.md").read_text()
    assert all(f"| {action} |" in table for action in cells)


def test_the_quick_start_runs(monkeypatch, tmp_path):
    code = re.search(r"## Quick start\n\n```python\n(.*?)```", README, re.DOTALL).group(1)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["image"].size == (32, 32)
    assert average_bits(names["pipe"].unet)[0] <= 6  # the loaded one is packed
