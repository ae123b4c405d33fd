"""Specification of the memory of a pipeline while it samples: of a process of its own, beyond what came before it."""

import json
from pathlib import Path

import pytest
import torch
from conftest import build_tiny_scheduler, build_tiny_unet
from diffusers import DDIMPipeline

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.evaluation import resident
from diffusers_pqcad.evaluation.resident import (
    Resident,
    Sampling,
    peak_bytes_during,
    resident_bytes,
    resident_here,
    resident_while_sampling,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    DDIMPipeline(quantize_(build_tiny_unet(), PQCADConfig()), build_tiny_scheduler()).save_pretrained(folder)
    return folder


def sampling(path: Path, **changes) -> Sampling:
    return Sampling(str(path), **{"num_inference_steps": 2, "inputs": None, "arguments": {}} | changes)


def test_the_peak_holds_what_was_given_back_before_the_end():
    def work() -> None:
        torch.ones(40_000_000, dtype=torch.uint8).sum()  # summed in int64, so that it takes a while

    before = resident_bytes()
    assert peak_bytes_during(work) >= before + 40_000_000


def test_the_peak_is_that_of_the_work_also_where_it_fails():
    with pytest.raises(KeyError):
        peak_bytes_during(lambda: {}["nothing"])


def test_a_quantized_pipeline_samples_in_a_process_of_its_own(folder):
    found = resident_while_sampling(sampling(folder))
    assert 0 < found.before_bytes < found.peak_bytes < 20 * found.before_bytes


def test_a_process_that_fails_tells_why(folder, monkeypatch, capfd):
    def run(command: list[str], **others) -> object:
        assert json.loads(command[-1])["path"] == str(folder)
        return type("Done", (), {"returncode": 1, "stderr": "Traceback\nValueError: no such pipeline\n"})

    monkeypatch.setattr(resident.subprocess, "run", run)
    with pytest.raises(RuntimeError, match=r"no image was made of it .*: ValueError: no such pipeline$"):
        resident_while_sampling(sampling(folder))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pipelines_of_pixels_sample_in_both_dtypes(tmp_path, dtype):
    """diffusers cannot make a NumPy array of bfloat16: what is sampled ends before that."""
    DDIMPipeline(build_tiny_unet(), build_tiny_scheduler()).save_pretrained(tmp_path)
    found = resident_here(sampling(tmp_path, dtype=dtype, num_threads=torch.get_num_threads()))
    assert isinstance(found, Resident)
    assert 0 < found.before_bytes <= found.peak_bytes
