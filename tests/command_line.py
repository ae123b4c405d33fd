"""The command line in this process: its exit code, and what it says on stdout and on stderr."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from diffusers_pqcad.cli.main import main

ROOT = Path(__file__).parents[1]


class Answer(NamedTuple):
    """What a command line comes to."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """What `--json` put on stdout: one strict JSON document and nothing else."""
        return json.loads(self.out, parse_constant=pytest.fail)

    @property
    def reason(self) -> str:
        """The last line on stderr."""
        return self.err.rstrip().rpartition("\n")[2]


def answer(capsys: pytest.CaptureFixture[str], *arguments: Any) -> Answer:
    """Return what `pqcad` with these arguments comes to."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return Answer(code, *capsys.readouterr())


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file in `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
