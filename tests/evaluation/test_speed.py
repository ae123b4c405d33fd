"""Specification of `diffusers_pqcad.evaluation.speed`."""

import json
import time

import pytest
import torch
from torch import nn

from diffusers_pqcad.evaluation.speed import (
    Latency,
    directory_size_bytes,
    environment,
    interleaved_latency,
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
    assert {"diffusers", "diffusers_pqcad", "cpu", "load_average"} <= found.keys()
