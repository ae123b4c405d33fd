"""Every script in examples/benchmarks runs, and what it prints and writes is what was measured."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from diffusers_pqcad.layers import average_bits, packed_layers

SCRIPTS = Path(__file__).parents[1] / "examples" / "benchmarks"


def import_script(name: str) -> Iterator[ModuleType]:
    sys.path.insert(0, str(SCRIPTS))  # as a script's own folder is
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]
    sys.path.remove(str(SCRIPTS))


@pytest.fixture(scope="module")
def unet_step() -> Iterator[ModuleType]:
    yield from import_script("unet_step")


@pytest.fixture(scope="module")
def load() -> Iterator[ModuleType]:
    yield from import_script("load")


@pytest.fixture(autouse=True)
def same_number_of_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def tiny_settings(unet_step: ModuleType, **changes: object) -> object:
    small = {"batch_size": 1, "num_rounds": 2, "warmup_rounds": 0, "sample_size": 16, "block_out_channels": [32] * 4}
    return unet_step.Settings(**small | changes)


class TestUNetStep:
    def test_default_model_has_the_shape_of_ddpm_cifar10(self, unet_step):
        with torch.device("meta"):
            unet = unet_step.build_unet(unet_step.Settings())
        assert unet.num_parameters() == 35_746_307  # google/ddpm-cifar10-32

    def test_table_and_file_hold_every_contestant(self, unet_step, tmp_path, capsys):
        file = tmp_path / "new folder" / "result.json"
        result = unet_step.main(tiny_settings(unet_step, json=str(file)))

        assert json.loads(file.read_text()) == json.loads(json.dumps(result))
        assert str(tmp_path) not in file.read_text()
        rows = {row["name"]: row for row in result["contestants"]}
        assert list(rows) == [
            "stock diffusers, fp32",
            "fp32, channels_last",
            "bf16, channels_last",
            "W8A8, dynamic ranges",
            "W4A8, dynamic ranges",
            "W8A8, static ranges",
        ]
        table = capsys.readouterr().out
        for name, row in rows.items():
            assert f"| {name} | {row['median_ms']:.1f} |" in table
            assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
            assert len(row["rounds_ms"]) == 2
            assert row["ratio"] == rows["stock diffusers, fp32"]["median_ms"] / row["median_ms"]
        for fact in ("seed 0", "threads: 1 ", "VNNI: ", "load before the run", f"torch {torch.__version__}"):
            assert fact in table
        assert result["settings"]["num_threads"] == result["environment"]["num_threads"] == 1

    def test_errors_and_sizes_are_those_of_the_formats(self, unet_step):
        result = unet_step.benchmark(tiny_settings(unet_step, num_rounds=1))
        stock, channels_last, bf16, w8a8, w4a8, static = result["contestants"]
        assert stock["relative_error"] == 0
        assert channels_last["relative_error"] < 1e-5
        assert 1e-4 < bf16["relative_error"] < 0.05
        for row in (w8a8, static):
            assert 1e-4 < row["relative_error"] < 0.1
        assert w8a8["relative_error"] < w4a8["relative_error"] < 0.5

        assert bf16["weight_bytes"] == stock["weight_bytes"] / 2
        assert w4a8["weight_bytes"] < w8a8["weight_bytes"] < bf16["weight_bytes"]
        assert stock["kernel_cache_bytes"] == 0
        if result["environment"]["vnni"]:  # the kernel computes with 8 bits a weight, whatever is stored
            assert w4a8["kernel_cache_bytes"] == w8a8["kernel_cache_bytes"] > 0

    def test_static_ranges_on_the_observed_input_give_the_dynamic_output(self, unet_step):
        settings = tiny_settings(unet_step)
        sample = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            dynamic = unet_step.quantized(unet_step.build_unet(settings), 8)
            static = unet_step.with_static_ranges(dynamic, sample)
            expected, output = dynamic(sample, 500).sample, static(sample, 500).sample
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
        assert all(layer.input_scale is None for layer in packed_layers(dynamic).values())
        assert all(layer.input_scale is not None for layer in packed_layers(static).values())

    def test_quantizes_every_layer_but_the_exempt_ones(self, unet_step):
        with torch.inference_mode():
            unet = unet_step.quantized(unet_step.build_unet(tiny_settings(unet_step)), 4)
        floats = [name for name, module in unet.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
        assert floats == ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out"]
        bits = average_bits(unet)
        assert bits is not None
        assert bits[0] == 4

    def test_peers_take_part_and_those_that_cannot_are_named(self, unet_step, monkeypatch, capsys):
        def absent(unet, samples, timestep):
            raise ImportError("No module named 'nonsense'")

        def plain(unet, samples, timestep):
            assert len(samples) == unet_step.NUM_CALIBRATION_SAMPLES
            return unet_step.peers.eager(unet)

        monkeypatch.setattr(unet_step.peers, "PEERS", {"a copy": plain, "an absent one": absent})
        monkeypatch.setattr(torch, "compile", lambda model, **options: model)  # minutes, and not what is tested
        result = unet_step.main(tiny_settings(unet_step, peers=True))
        rows = {row["name"]: row for row in result["contestants"]}
        assert rows["a copy"]["relative_error"] == 0
        assert rows["a copy"]["weight_bytes"] is None
        assert {"W8A8, static ranges, torch.compile", "W4A8, dynamic ranges, torch.compile"} < set(rows)
        assert result["skipped"] == {"an absent one": "ImportError: No module named 'nonsense'"}
        assert "Skipped: an absent one (ImportError: No module named 'nonsense')." in capsys.readouterr().out

    def test_an_output_that_is_not_finite_stops_the_run(self, unet_step):
        output = torch.tensor([1.0, float("nan")])
        with pytest.raises(ValueError, match="a NaN or an infinity"):
            unet_step.relative_error(output, torch.ones(2))


class TestLoad:
    def test_the_default_model_has_the_shape_of_sd_15(self, load):
        with torch.device("meta"):
            assert load.build(load.Settings()).num_parameters() == 859_520_964

    def test_every_contestant_is_measured_in_a_process_of_its_own(self, load, tmp_path, capsys, monkeypatch):
        chosen = ("plain load, fp32", "W4 fixed", "W4 saved packed")  # each takes as long as importing diffusers does
        monkeypatch.setattr(load, "CONFIGS", {name: load.CONFIGS[name] for name in chosen})
        file = tmp_path / "load.json"
        result = load.main(load.Settings(shape="tiny", json=str(file), directory=str(tmp_path)))
        assert json.loads(file.read_text()) == result
        assert [path.name for path in tmp_path.iterdir()] == ["load.json"]  # the model's files are gone
        assert str(tmp_path) not in file.read_text()
        rows = {row["name"]: row for row in result["contestants"]}
        assert list(rows) == list(load.CONFIGS)
        assert rows["W4 fixed"]["footprint_bytes"] < rows["plain load, fp32"]["footprint_bytes"]
        assert rows["W4 saved packed"]["footprint_bytes"] == rows["W4 fixed"]["footprint_bytes"]
        assert rows["W4 saved packed"]["file_bytes"] == pytest.approx(rows["W4 fixed"]["file_bytes"], abs=2000)
        assert all(row["seconds"] > 0 for row in rows.values())
        printed = capsys.readouterr().out
        assert all(f"| {name} |" in printed for name in rows)
