"""Specification of `diffusers_pqcad.evaluation.speed`."""

import json
import subprocess
import time

import pytest
import torch
from torch import nn

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.evaluation.speed import (
    Latency,
    commit,
    directory_size_bytes,
    environment,
    interleaved_latency,
    layers_by_kernel,
    tensor_bytes,
)


class TestInterleavedLatency:
    def test_candidates_take_turns(self):
        calls: list[str] = []
        candidates = {name: (lambda name=name: calls.append(name)) for name in "ABC"}
        latencies = interleaved_latency(candidates, num_rounds=2, warmup_rounds=1)
        assert calls == list("ABCABCABC")
        assert list(latencies) == list("ABC")
        assert all(len(latency.rounds_ms) == 2 for latency in latencies.values())

    def test_measures_milliseconds_and_drops_the_warm_up(self):
        pauses = iter([0.2, 0.01, 0.03, 0.02])  # the warm-up is by far the longest
        latency = interleaved_latency({"sleep": lambda: time.sleep(next(pauses))}, num_rounds=3)["sleep"]
        assert 10 <= latency.min_ms <= latency.median_ms <= latency.max_ms < 200
        assert 20 <= latency.median_ms
        assert 30 <= latency.max_ms
        assert sorted(latency.rounds_ms) == [latency.min_ms, latency.median_ms, latency.max_ms]
        assert latency.rounds_ms[0] == latency.min_ms  # in the order they were measured

    def test_scaled(self):
        assert Latency(2.0, 1.0, 4.0, (1.0, 2.0, 4.0)).scaled(0.5) == Latency(1.0, 0.5, 2.0, (0.5, 1.0, 2.0))

    @pytest.mark.parametrize(
        ("candidates", "arguments", "message"),
        [
            ({}, {}, "at least one name"),
            ({"A": print}, {"num_rounds": 0}, "num_rounds=0"),
            ({"A": print}, {"warmup_rounds": -1}, "warmup_rounds=-1"),
        ],
        ids=["no candidate", "no round", "negative warm-up"],
    )
    def test_refuses(self, candidates, arguments, message):
        with pytest.raises(ValueError, match=message):
            interleaved_latency(candidates, **arguments)


class TestSizes:
    def test_directory_and_file(self, tmp_path):
        (tmp_path / "unet").mkdir()
        (tmp_path / "a.bin").write_bytes(b"12345")
        (tmp_path / "unet" / "b.bin").write_bytes(b"123")
        (tmp_path / "link").symlink_to(tmp_path / "a.bin")  # as in the Hub's cache
        assert directory_size_bytes(tmp_path) == 5 + 3 + 5
        assert directory_size_bytes(tmp_path / "a.bin") == 5

    def test_missing_path(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="not found"):
            directory_size_bytes(tmp_path / "nowhere")

    def test_tensor_bytes(self):
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))  # 12 fp32 parameters; 4 fp32, 1 int64 buffers
        assert tensor_bytes(module) == 12 * 4 + 4 * 4 + 8
        assert tensor_bytes(module.half()) == 12 * 2 + 4 * 2 + 8

    def test_shared_weights_count_once(self):
        shared = nn.Linear(3, 2)
        assert tensor_bytes(nn.ModuleList([shared, shared])) == tensor_bytes(shared)


def test_environment_is_json():
    found = json.loads(json.dumps(environment()))
    assert found["torch"] == torch.__version__
    assert found["num_threads"] == torch.get_num_threads()
    assert {"diffusers", "diffusers_pqcad", "commit", "cpu", "load_average"} <= found.keys()


def test_the_kernel_of_a_layer_elsewhere_is_the_reference():
    model = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
    quantize_(model, PQCADConfig(method="fixed"))
    assert layers_by_kernel(model) == {model[0].kernel_name(): 2}
    assert layers_by_kernel(model.to("meta")) == {"reference": 2}
    assert layers_by_kernel(nn.Linear(2, 2)) == {}


def test_the_commit_is_that_of_a_checkout_which_tracks_the_file(tmp_path, monkeypatch):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True)

    file = tmp_path / "module.py"
    file.write_text("")
    assert commit(file) is None  # no checkout
    git("init")
    git("commit", "--allow-empty", "-m", "before it")
    assert commit(file) is None  # a file that only lies in one, as an environment in a project's folder does
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "HEAD").stdout.strip()
    assert commit(file) == head
    file.write_text("changed")
    assert commit(file) == f"{head}-dirty"
    monkeypatch.setenv("PATH", "")
    assert commit(file) is None  # no git
