"""Specification of calibration sets on the Hub: pushed by the real client, loaded whole, and streamed in part."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PIPELINES
from stub_hub import StubHub

from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.recording import collect_calibration_set

ROOT = Path(__file__).parents[2]
PUSH = """
import sys
from diffusers_pqcad import CalibrationSet
CalibrationSet.load(sys.argv[1]).push_to_hub("me/set", private=True)
"""
LOAD = """
import sys
from diffusers_pqcad import CalibrationSet
count = int(sys.argv[2]) or None
CalibrationSet.from_hub("me/set", num_trajectories=count).save(sys.argv[1])
"""


@pytest.fixture
def hub() -> Iterator[StubHub]:
    with StubHub() as hub:
        yield hub
    assert not hub.unexpected, "\n".join(hub.unexpected)


@pytest.fixture
def client(hub: StubHub, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs code as a user of a Hub does: the client reads its settings when it is imported, so in a new process."""

    def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
        others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": StubHub.token,
            "HF_HOME": tempfile.mkdtemp(dir=tmp_path),  # nothing comes from an earlier process's cache
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", code, *map(str, arguments)]
        return subprocess.run(command, env=others | settings, capture_output=True, text=True, check=False, timeout=300)

    return run


def recorded() -> CalibrationSet:
    kind = PIPELINES["sd_controlnet"]
    pipeline: Any = kind.build()
    return collect_calibration_set(
        pipeline, kind.inputs[:6], num_inference_steps=2, seed=0, progress=False, **kind.arguments
    )


def assert_same(found: CalibrationSet, wanted: CalibrationSet) -> None:
    assert torch.equal(found.trajectory, wanted.trajectory)
    assert torch.equal(found.model_output, wanted.model_output)
    assert torch.equal(found.timestep, wanted.timestep)
    assert (found.columns, found.manifest) == (wanted.columns, wanted.manifest)
    assert found.inputs() == wanted.inputs()
    assert found.plan.weights == wanted.plan.weights
    rows = torch.arange(len(wanted))
    conditions = wanted.condition(rows, rows % 2)
    assert conditions.keys() == found.condition(rows, rows % 2).keys()
    assert all(torch.equal(found.condition(rows, rows % 2)[name], values) for name, values in conditions.items())


def test_a_set_comes_back_from_the_hub_whole_and_in_part(
    hub: StubHub, client: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    one = recorded()
    part = one.select([5, 4, 1, 0, 2])  # what is pushed is the part, not the rows that it was taken from
    part.save(tmp_path / "set")
    result = client(PUSH, tmp_path / "set")
    assert result.returncode == 0, result.stderr
    files = hub.files("datasets/me/set")
    assert {"README.md", "calibration.safetensors", "data/train-00000-of-00001.parquet"} <= set(files)
    assert hub.repos["datasets/me/set"].private
    for count, wanted in ((0, part), (3, part.select(slice(0, 3)))):
        result = client(LOAD, tmp_path / f"loaded{count}", count)
        assert result.returncode == 0, result.stderr
        assert_same(CalibrationSet.load(tmp_path / f"loaded{count}"), wanted)
