"""Every script in examples/benchmarks runs, and what it prints and writes is what was measured."""

import copy
import importlib.util
import json
import mmap
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from diffusers_pqcad.kernels import native, x86
from diffusers_pqcad.kernels.native import variants
from diffusers_pqcad.kernels.x86.library import library
from diffusers_pqcad.layers.find import kernel_cache_bytes, packed_layers
from diffusers_pqcad.layers.quantized import PQCADLinear
from diffusers_pqcad.loading.coverage import average_bits
from diffusers_pqcad.numerics.qparams import WeightSpec
from diffusers_pqcad.runtime import residual

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
def contestants(unet_step: ModuleType) -> ModuleType:
    return sys.modules["contestants"]  # as the script imported it


@pytest.fixture(scope="module")
def pipeline() -> Iterator[ModuleType]:
    yield from import_script("pipeline")


@pytest.fixture(scope="module")
def profile_step() -> Iterator[ModuleType]:
    yield from import_script("profile_step")


@pytest.fixture(scope="module")
def bounds() -> Iterator[ModuleType]:
    yield from import_script("bounds")


@pytest.fixture(scope="module")
def image() -> Iterator[ModuleType]:
    yield from import_script("image")


@pytest.fixture(scope="module")
def turns(unet_step: ModuleType) -> ModuleType:
    return sys.modules["turns"]


@pytest.fixture(scope="module")
def scaling() -> Iterator[ModuleType]:
    yield from import_script("scaling")


@pytest.fixture(scope="module")
def load() -> Iterator[ModuleType]:
    yield from import_script("load")


@pytest.fixture(scope="module")
def shipped_library() -> Iterator[ModuleType]:
    yield from import_script("shipped_library")


@pytest.fixture(scope="module")
def method_cost() -> Iterator[ModuleType]:
    yield from import_script("method_cost")


@pytest.fixture(scope="module")
def processes() -> Iterator[ModuleType]:
    yield from import_script("processes")


@pytest.fixture(scope="module")
def reduction() -> Iterator[ModuleType]:
    yield from import_script("reduction")


@pytest.fixture(scope="module")
def adapters() -> Iterator[ModuleType]:
    yield from import_script("adapters")


@pytest.fixture(scope="module")
def resident() -> Iterator[ModuleType]:
    yield from import_script("resident")


@pytest.fixture(autouse=True)
def same_number_of_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


class Operators(TorchDispatchMode):
    """Counts the calls of PyTorch's operators, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def tiny_settings(script: ModuleType, **changes: object) -> object:
    busy = {"max_waiting": 1e6} if hasattr(script.Settings, "max_waiting") else {}  # tests run beside each other
    return script.Settings(**{"model": "tiny", "batch_size": 1, "num_rounds": 2} | busy | changes)


def rows_of(result: dict) -> dict[str, dict]:
    return {row["name"]: row for row in result["contestants"]}


class TestModels:
    @pytest.mark.parametrize(
        ("name", "num_parameters"),
        [("ddpm-cifar10", 35_746_307), ("sd15", 859_520_964), ("fashion-mnist", 1_112_801)],
        ids=["google/ddpm-cifar10-32", "SD-1.5", "bundled"],
    )
    def test_shapes_are_those_of_the_models_they_are_named_after(self, unet_step, name, num_parameters):
        with torch.device("meta") if name != "fashion-mnist" else nullcontext():
            assert unet_step.harness.models.build(name).num_parameters() == num_parameters

    def test_an_unknown_one_is_refused(self, unet_step):
        with pytest.raises(ValueError, match="model: expected one of .*'ddpm-cifar10'.*, got 'sd16'"):
            unet_step.harness.models.build("sd16")


class TestUNetStep:
    def test_table_and_file_hold_every_contestant(self, unet_step, tmp_path, capsys):
        file = tmp_path / "new folder" / "result.json"
        result = unet_step.main(tiny_settings(unet_step, json=str(file)))

        assert json.loads(file.read_text()) == json.loads(json.dumps(result))
        assert str(tmp_path) not in file.read_text()
        rows = rows_of(result)
        assert list(rows) == [
            "stock diffusers, fp32",
            "fp32, channels_last",
            "W8A8",
            "W8A7",
            "W4A8",
            "W4A7",
            "W4A8, dynamic ranges",
            "W4A8, no int8 copies",
            "W4A8, low memory",
        ]
        table = capsys.readouterr().out
        for name, row in rows.items():
            assert f"| {name} | {row['median_ms']:.1f} |" in table
            assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
            assert len(row["rounds_ms"]) == 2
            assert row["first_seconds"] > 0
            assert row["ratio"] == rows["stock diffusers, fp32"]["median_ms"] / row["median_ms"]
        for fact in ("16x16", "seed 0", "threads: 1 ", "VNNI: ", "load before the run", f"torch {torch.__version__}"):
            assert fact in table
        assert result["settings"]["num_threads"] == result["environment"]["num_threads"] == 1

    def test_flags_of_the_compiler_are_a_circumstance(self, unet_step, monkeypatch, capsys):
        for flags in ("-DVEX=", None):
            monkeypatch.setenv("CFLAGS", flags) if flags else monkeypatch.delenv("CFLAGS", raising=False)
            result = unet_step.main(tiny_settings(unet_step, num_rounds=1, contestants=["fp32, channels_last"]))
            assert result["environment"]["CFLAGS"] == flags
            assert (", CFLAGS=-DVEX=.\n" in capsys.readouterr().out) == bool(flags)

    def test_errors_and_sizes_are_those_of_the_formats(self, unet_step, contestants):
        result = unet_step.benchmark(
            tiny_settings(unet_step, num_rounds=1, contestants=[*contestants.QUICK, "bf16, channels_last"])
        )
        stock, channels_last, w8a8, w8a7, w4a8, w4a7, dynamic, no_copies, low, bf16 = result["contestants"]
        assert stock["relative_error"] == 0
        assert channels_last["relative_error"] < 1e-5
        assert 1e-4 < bf16["relative_error"] < 0.05
        assert 1e-4 < w8a8["relative_error"] < w8a7["relative_error"] < 0.1
        for row in (w4a8, w4a7, dynamic, no_copies, low):
            assert w8a7["relative_error"] < row["relative_error"] < 0.5

        assert bf16["weight_bytes"] == stock["weight_bytes"] / 2
        assert w4a8["weight_bytes"] < w8a8["weight_bytes"] < bf16["weight_bytes"]
        assert stock["kernel_cache_bytes"] == no_copies["kernel_cache_bytes"] == 0
        if not isinstance(library(), str):  # which unpacks, to the same numbers
            assert low["relative_error"] == w4a8["relative_error"]
        assert low["kernel_cache_bytes"] == 0
        assert w4a8["kernel_cache_bytes"] > 0  # the kernel computes with 8 bits a weight
        assert w4a7["kernel_cache_bytes"] == w8a7["kernel_cache_bytes"] == w4a8["kernel_cache_bytes"]
        has_w8a8 = result["environment"]["vnni"] or not isinstance(library(), str)
        assert w8a8["kernel_cache_bytes"] == (w4a8["kernel_cache_bytes"] if has_w8a8 else 0)

    def test_static_ranges_are_the_extremes_of_the_calibration_inputs(self, unet_step, contestants):
        unet = unet_step.harness.models.build("tiny")
        generator = torch.Generator().manual_seed(0)
        calibration = [unet_step.harness.models.draw_inputs(unet, 1, None, generator) for _ in range(2)]
        with torch.no_grad():
            # Ranges are those of attention in fp32, which is what modules that are watched compute.
            build = partial(contestants.pqcad, kernel="reference")
            dynamic = build(unet, [], weight_bits=4, static=False)
            alone, both = (build(unet, calibration[:n], weight_bits=4) for n in (1, 2))
            expected, output = dynamic.step(calibration[0]), alone.step(calibration[0])
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-6)
        assert all(layer.input_scale is None for layer in packed_layers(dynamic.unet).values())
        narrow, wide = (packed_layers(contestant.unet) for contestant in (alone, both))
        assert all(wide[name].input_scale >= narrow[name].input_scale for name in wide)

    def test_quantizes_every_layer_but_the_exempt_ones(self, unet_step, contestants):
        with torch.inference_mode():
            unet = contestants.pqcad(unet_step.harness.models.build("tiny"), [], weight_bits=4, static=False).unet
        floats = [name for name, module in unet.named_modules() if type(module) in (nn.Linear, nn.Conv2d)]
        assert floats == [
            *("conv_in", "time_embedding.linear_1", "time_embedding.linear_2"),
            *(f"up_blocks.3.resnets.{index}.conv_shortcut" for index in range(3)),
            "conv_out",
        ]
        bits = average_bits(unet)
        assert bits is not None
        assert bits[0] == 4

    def test_conditional_models_take_part(self, unet_step):
        result = unet_step.benchmark(
            tiny_settings(unet_step, model="tiny-conditional", sample_size=16, num_rounds=1, contestants=["W8A8"])
        )
        assert result["sample_size"] == [16, 16]
        rows = rows_of(result)
        assert list(rows) == ["stock diffusers, fp32", "W8A8"]
        assert rows["W8A8"]["relative_error"] < 0.1
        assert result["skipped"] == {}

    def test_peers_take_part_and_those_that_cannot_are_named(self, unet_step, contestants, monkeypatch, capsys):
        def absent(unet, calibration):
            raise ImportError("No module named 'nonsense'")

        def plain(unet, calibration):
            assert len(calibration) == unet_step.harness.NUM_CALIBRATION_INPUTS
            return contestants.eager(unet)._replace(unet=None)

        stock = {"stock diffusers, fp32": contestants.CONTESTANTS["stock diffusers, fp32"]}
        monkeypatch.setattr(
            unet_step.harness, "CONTESTANTS", stock | {"a copy": plain, "an absent one": absent, "not asked": absent}
        )
        result = unet_step.main(tiny_settings(unet_step, contestants=["a*"]))
        rows = rows_of(result)
        assert list(rows) == ["stock diffusers, fp32", "a copy"]
        assert rows["a copy"]["relative_error"] == 0
        assert rows["a copy"]["weight_bytes"] is None
        assert result["skipped"] == {"an absent one": "ImportError: No module named 'nonsense'"}
        assert "Skipped: an absent one (ImportError: No module named 'nonsense')." in capsys.readouterr().out

    def test_a_pattern_that_matches_nothing_is_refused(self, unet_step):
        with pytest.raises(ValueError, match=r"contestants: \['OpenVimo\*'\] match none of .*'OpenVINO fp32'"):
            unet_step.harness.chosen(["W4A8", "OpenVimo*"])

    def test_an_output_that_is_not_finite_stops_the_run(self, unet_step):
        output = torch.tensor([1.0, float("nan")])
        with pytest.raises(ValueError, match="a NaN or an infinity"):
            unet_step.relative_error(output, torch.ones(2))


class TestTurns:
    def settings(self, turns: ModuleType, **changes: object) -> Any:
        return turns.TurnSettings(**{"num_rounds": 2, "warmup_rounds": 0, "extra_rounds": 2} | changes)

    def candidates(self, turns: ModuleType, taken: list[str], waits: dict[str, list[float | None]]) -> Any:
        """Candidates whose samples of one second waited for `waits`, in this order; `taken` is who had a turn."""

        def take(name: str, values: Iterator[float | None]) -> Any:
            taken.append(name)
            return turns.Sample(1.0, next(values), len(taken))

        return {name: partial(take, name, iter(values)) for name, values in waits.items()}

    def test_samples_that_waited_are_counted_and_taken_again_in_a_later_round(self, turns):
        taken: list[str] = []
        waits = {"a": [0.5, 0.02, 0.0], "b": [0.021, 0.0, 0.3, 0.01], "c": [0.0, 0.0]}
        kept = turns.take_turns(self.candidates(turns, taken, waits), self.settings(turns))
        assert taken == [*"abc", *"abc", *"ab", "b"]
        assert {name: each.num_waited for name, each in kept.items()} == {"a": 1, "b": 2, "c": 0}
        assert [sample.waited_seconds for sample in kept["b"].samples] == [0.0, 0.01]
        assert kept["a"].latency().rounds_ms == (1000.0, 1000.0)

    def test_rounds_to_warm_up_are_not_counted(self, turns):
        taken: list[str] = []
        candidates = self.candidates(turns, taken, {"a": [0.0] * 4, "b": [0.9, 0.0, 0.0]})
        kept = turns.take_turns(candidates, self.settings(turns, warmup_rounds=1))
        assert taken == [*"ababab"]
        assert kept["b"].num_waited == 0

    def test_who_only_waited_is_skipped_and_without_stock_there_is_no_table(self, turns, unet_step):
        waits = {"stock": [0.0, 0.0], "b": [0.5] * 4}
        skipped: dict[str, str] = {}
        kept = unet_step.harness.in_turns(self.candidates(turns, [], waits), self.settings(turns), skipped)
        assert list(kept) == ["stock"]
        assert skipped == {"b": "waited for a core in all of 4 samples"}
        candidates = self.candidates(turns, [], {"stock": [0.5] * 4})
        with pytest.raises(ValueError, match=r"stock: waited for a core in all of 4 .* idle cores .*--max_waiting"):
            unet_step.harness.in_turns(candidates, self.settings(turns), {})

    def test_where_waiting_is_unknown_all_samples_count_and_the_table_says_so(self, turns, unet_step):
        kept = turns.take_turns(self.candidates(turns, [], {"a": [None, None]}), self.settings(turns))["a"]
        assert len(kept.samples) == 2
        rows = [unet_step.harness.kept_entries(kept)]
        assert "is not known here" in turns.waited_line(rows, {"max_waiting": 0.02})[0]
        rows = [{"num_waited": 2, "knows_waiting": True}, {"num_waited": 3, "knows_waiting": True}]
        (line,) = turns.waited_line(rows, {"max_waiting": 0.02})
        assert "for more than 2% of the time: 5 samples, at most 3 of a contestant." in line
        assert turns.waited_line([{"name": "an older run"}], {}) == []

    def test_nothing_to_measure_is_refused(self, turns):
        with pytest.raises(ValueError, match="expected at least one name"):
            turns.take_turns({}, self.settings(turns))
        with pytest.raises(ValueError, match="num_rounds=0, .* expected at least 1"):
            turns.take_turns({"a": lambda: None}, self.settings(turns, num_rounds=0))

    def test_threads_that_began_in_between_are_counted(self, turns):
        before, after = {"1": 10**9, "ended": 5}, {"1": 3 * 10**9, "2": 10**9}
        assert turns.waited_seconds(before, after) == 3.0
        assert turns.waited_seconds(None, after) is None

    @pytest.mark.skipif(not Path("/proc/self/schedstat").exists(), reason="nobody counts here how long threads wait")
    def test_sharing_a_core_is_seen(self, turns):
        allowed = os.sched_getaffinity(0)
        core = {min(allowed)}
        spin = f"import os; os.sched_setaffinity(0, {core}); print(flush=True)\nwhile True: pass"
        with subprocess.Popen([sys.executable, "-c", spin], stdout=subprocess.PIPE) as other:
            try:
                other.stdout.readline()  # it spins
                os.sched_setaffinity(0, core)
                taken = turns.sample(lambda: sum(range(10_000_000)))
            finally:
                os.sched_setaffinity(0, allowed)
                other.kill()
        assert taken.result == sum(range(10_000_000))
        assert not turns.counts(taken, 0.02)


class TestMemory:
    def test_own_pages_and_mapped_files_are_told_apart(self, image, tmp_path):
        if image.memory.resident() is None:
            pytest.skip("no smaps_rollup here")
        size = 32 * 2**20
        path = tmp_path / "file"
        path.write_bytes(bytes(size))
        before = image.memory.resident()
        own = np.ones(size, np.uint8)
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            total = int(np.frombuffer(mapped, np.uint8).sum())
            after = image.memory.resident()
        assert (total, own[-1]) == (0, 1)
        assert after.own_bytes - before.own_bytes == pytest.approx(size, rel=0.1)
        assert after.mapped_bytes - before.mapped_bytes == pytest.approx(size, rel=0.1)

    def test_what_is_not_known_is_none(self, image):
        assert image.memory.resident(pid=2**31 - 1) is None
        assert image.memory.larger(None, None) is None
        assert image.memory.larger(None, image.memory.Resident(1, 5)) == (1, 5)


class TestFootnotes:
    def row(self, name: str) -> dict[str, Any]:
        return {"name": name, "median_ms": 2.0, "min_ms": 1.0, "max_ms": 3.0, "ratio": 4.0, "relative_error": 0.5}

    def test_the_default_preset_is_below_where_the_documented_one_was_measured(self, unet_step):
        names = ["W8A8", "OpenVINO + NNCF int8, bf16"]
        for beside, below in (([], []), (["OpenVINO int8, transformer preset"], names[1:])):
            rows = [self.row(name) for name in [*names, *beside]]
            above, under = unet_step.harness.with_footnotes(rows)
            assert [row["name"] for row in under] == below
            assert len(above) + len(under) == len(rows)
            lines = unet_step.harness.footnote_lines(under)
            assert all("OpenVINO + NNCF int8, bf16, 2.0 ms (1.0 to 3.0), 4.00 times faster" in line for line in lines)

    def test_quanto_is_below_always(self, unet_step):
        assert unet_step.harness.with_footnotes([self.row("quanto W8A8")]) == ([], [self.row("quanto W8A8")])


class TestProfileStep:
    def test_shares_of_a_step(self, profile_step, tmp_path, capsys):
        file = tmp_path / "profile.json"
        settings = profile_step.Settings(
            model="tiny", batch_size=1, num_steps=2, num_operators=50, contestants=["W4A8"], json=str(file)
        )
        result = profile_step.main(settings)
        assert json.loads(file.read_text()) == result
        assert "| W4A8, " in capsys.readouterr().out
        layer = PQCADLinear(8, 8)
        layer.pack_(WeightSpec(4), activation_bits=8)
        uses_x86 = layer.kernel_name() == x86.NAME
        for name, operator in (
            ("stock diffusers, fp32", "aten::convolution"),
            ("W4A8", "x86: products" if uses_x86 else "onednn::qconv2d_point"),
        ):
            profiled = rows_of(result)[name]
            assert profiled["ms"] > 0
            assert 5 < len(profiled["operators"]) <= 50
            assert any(row["name"].startswith(operator) for row in profiled["operators"])
            assert 0 < sum(row["share"] for row in profiled["operators"]) < 1


class TestBounds:
    def test_table_and_file_hold_every_part(self, bounds, tmp_path, capsys):
        file = tmp_path / "bounds.json"
        result = bounds.main(tiny_settings(bounds, contestants=["W4A8", "W8A7"], json=str(file)))
        assert json.loads(file.read_text()) == json.loads(json.dumps(result))
        table = capsys.readouterr().out
        for name, contestant in zip(("W8A7", "W4A8"), result["contestants"], strict=True):
            assert contestant["name"] == name
            assert f"| {name} without | ms |" in table
            assert [row["part"] for row in contestant["parts"]] == list(bounds.PARTS)
            whole = contestant["parts"][0]
            for row in contestant["parts"]:
                pairs = zip(whole["rounds_ms"], row["rounds_ms"], strict=True)
                less = row["less_ms"]
                assert less == pytest.approx(np.median([before - after for before, after in pairs]))
                assert f"| {row['part']} | {row['median_ms']:.1f} |" in table
                assert f"| {less:.1f} | {less / whole['median_ms']:.1%} |" in table

    @pytest.mark.parametrize("model", ["tiny", "tiny-conditional"])
    @torch.no_grad()
    def test_what_is_repeated_is_right_and_what_is_left_out_is_gone(self, bounds, model):
        field = bounds.harness.prepare(tiny_settings(bounds, model=model, contestants=["W8A8"]), 1)
        contestant = field.contestants["W8A8"]
        wanted, concatenate = contestant.step(field.inputs), torch.cat
        with Operators() as whole:
            contestant.step(field.inputs)
        for part, leave_out in bounds.PARTS.items():
            unet = copy.deepcopy(contestant.unet)
            step = leave_out(unet, field.inputs)
            for _ in range(2):
                with Operators() as used:
                    output = step()
                assert torch.equal(output, wanted) or leave_out is bounds.without_time, part
                missing = {name: number - used.calls[name] for name, number in whole.calls.items()}
                if leave_out is not bounds.without_time:  # whose own embedding is made by concatenation
                    assert missing["cat"] == (whole.calls["cat"] if leave_out is bounds.without_joins else 0), part
                assert missing["convolution"] == (2 if leave_out is bounds.without_float_convolutions else 0), part
            assert torch.cat is concatenate, part
            assert not any(module._forward_hooks for module in unet.modules()), part

    @torch.no_grad()
    def test_without_time_the_rest_is_the_same_blocks_at_once(self, bounds, monkeypatch):
        field = bounds.harness.prepare(tiny_settings(bounds, contestants=["W8A8"]), 1)
        unet = field.contestants["W8A8"].unet
        calls: list[object] = []
        run_block = residual.run_block
        monkeypatch.setattr(
            residual, "run_block", lambda plan, x, time, *more: calls.append(time) or run_block(plan, x, time, *more)
        )
        field.contestants["W8A8"].step(field.inputs)
        times, calls[:] = list(calls), []
        output = bounds.without_time(unet, field.inputs)()
        assert output.isfinite().all()
        assert not any(name.endswith("time_emb_proj") for name in packed_layers(unet))
        del calls[: len(times)]  # of the step in which outputs are kept
        assert all(time is not None for time in times)
        assert calls == [None] * len(times)

    def test_a_contestant_of_another_runtime_is_refused(self, bounds, contestants, monkeypatch):
        monkeypatch.setitem(
            contestants.CONTESTANTS, "W8A8", lambda unet, calibration: bounds.eager(unet)._replace(unet=None)
        )
        for name in ("W8A8", "W4A8, no int8 copies"):  # a forced kernel is that of one model alone
            with pytest.raises(ValueError, match=f"{name!r} is not a model of PyTorch as it was built"):
                bounds.benchmark(tiny_settings(bounds, contestants=[name]))


class TestPipeline:
    def test_ours_at_half_the_steps_beside_stock(self, pipeline, tmp_path, capsys):
        file = tmp_path / "pipeline.json"
        settings = tiny_settings(pipeline, num_inference_steps=4, contestants=["W4A8"], json=str(file))
        result = pipeline.main(settings)
        assert json.loads(file.read_text()) == json.loads(json.dumps(result))
        rows = rows_of(result)
        assert list(rows) == ["stock diffusers, fp32, 4 steps", "stock diffusers, fp32, 2 steps", "W4A8, 2 steps"]
        for row in rows.values():
            expected = rows["stock diffusers, fp32, 4 steps"]["median_ms"] / row["median_ms"]
            assert row["ratio"] == pytest.approx(expected)
        assert "| W4A8, 2 steps |" in capsys.readouterr().out

    def test_who_cannot_take_part_is_named(self, pipeline, contestants, monkeypatch):
        def opaque(unet, calibration):
            return contestants.eager(unet)._replace(unet=None)

        chosen = {name: contestants.CONTESTANTS[name] for name in ("stock diffusers, fp32", "bf16, channels_last")}
        monkeypatch.setattr(pipeline.harness, "CONTESTANTS", chosen | {"opaque": opaque})
        result = pipeline.main(tiny_settings(pipeline, num_inference_steps=2, contestants=["*"]))
        assert list(rows_of(result)) == ["stock diffusers, fp32, 2 steps", "stock diffusers, fp32, 1 steps"]
        assert result["skipped"]["opaque"] == "not a model that a pipeline of diffusers can hold"
        assert "BFloat16" in result["skipped"]["bf16, channels_last"]  # numpy has none

    def test_a_forced_kernel_is_that_of_the_pipeline_too(self, pipeline, contestants):
        with torch.no_grad():
            unet = pipeline.harness.models.build("tiny")
            unet = contestants.pqcad(unet, [], weight_bits=4, static=False, kernel="reference").unet
            pipeline.timed(unet, tiny_settings(pipeline), 2)()
        assert kernel_cache_bytes(unet) == 0

    def test_calls_the_model_once_a_step(self, pipeline, monkeypatch):
        unet = pipeline.harness.models.build("tiny")
        timesteps = []
        unet.register_forward_pre_hook(lambda module, args: timesteps.append(int(args[1])))
        with torch.no_grad():
            pipeline.timed(unet, tiny_settings(pipeline), 4)()
        assert timesteps == [999, 749, 499, 249]

    def test_an_odd_number_of_steps_is_refused(self, pipeline):
        with pytest.raises(ValueError, match="expected an even number, got 5"):
            pipeline.benchmark(tiny_settings(pipeline, num_inference_steps=5))


class TestImage:
    """From prompt to picture, at tiny size."""

    def case(self, image: ModuleType, folder: Path, model: str = "tiny", **changes: Any) -> tuple[Any, Any]:
        chosen = {"model": model, "size": 64, "num_inference_steps": 2, "num_rounds": 2, "max_waiting": 1e6} | changes
        settings = image.Settings(**chosen)
        case = image.case_of(settings, folder)
        image.text_to_image.save(model, case.folder)
        return settings, case

    @pytest.mark.parametrize(("model", "num_parameters"), [("sd15", 859_520_964), ("sdxl", 2_567_463_684)])
    def test_shapes_are_those_of_the_pipelines_they_are_named_after(self, image, model, num_parameters):
        with torch.device("meta"):
            pipeline = image.text_to_image.build(model)
        assert pipeline.unet.num_parameters() == num_parameters
        assert pipeline.text_encoder.num_parameters() == 123_060_480
        assert pipeline.vae.num_parameters() == 83_653_863
        if model == "sdxl":
            assert pipeline.text_encoder_2.num_parameters() == 694_659_840
        ids = pipeline.tokenizer(image.text_to_image.PROMPT, padding="max_length").input_ids
        assert len(ids) == 77
        assert len(set(ids)) == 9  # seven words, and the two special ones

    @pytest.mark.parametrize(("model", "vae", "guidance"), [("tiny", "tiny", 7.5), ("tiny-xl", "kl", 1.0)])
    @torch.no_grad()
    def test_parts_that_others_compute_make_the_same_image(self, image, tmp_path, model, vae, guidance):
        _, case = self.case(image, tmp_path, model, vae=vae, guidance_scale=guidance)
        parts = image.image_contestants
        stock = parts.load_floats(case, torch.float32)
        calls = parts.record_calls(stock, case)
        assert len(calls.denoiser) == 2 * parts.NUM_CALIBRATION_IMAGES
        assert [len(each[0]) for each in calls.denoiser] == [2 if guidance > 1 else 1] * len(calls.denoiser)
        assert len(calls.denoiser[0]) == (5 if model == "tiny-xl" else 3)
        hidden = model == "tiny-xl"

        def encoded(name: str) -> Any:
            encode = parts.Encode(getattr(stock, name), hidden=hidden)
            outputs = lambda inputs: encode(*inputs) if hidden else [encode(*inputs)]  # noqa: E731
            return parts.TextEncoder(outputs, getattr(stock, name).config)

        decode = parts.Decoder(lambda inputs: parts.Decode(stock.vae)(*inputs), parts.vae_config(case))
        texts = {name: encoded(name) for name in calls.texts}
        unet = parts.Plain(stock.unet)
        pipeline = parts.assembled(case, lambda inputs: unet(*inputs), decode, texts)
        wanted = parts.call(stock, case, seed=0)
        assert wanted.shape == (64, 64, 3)
        np.testing.assert_allclose(parts.call(pipeline, case, seed=0), wanted, atol=1e-5)

    def test_tables_hold_every_contestant_with_its_parts_and_its_memory(self, image, tmp_path, monkeypatch, capsys):
        started = []

        def in_this_process(script: str, flags: dict[str, Any]) -> Any:
            started.append((flags["contestant"], flags.get("prepare", False)))
            row = json.loads(json.dumps(image.main(image.Settings(**flags))))
            assert not row or sum(row["parts"].values()) == pytest.approx(row["image_seconds"])
            return row

        monkeypatch.setattr(image.harness, "in_a_process", in_this_process)
        names = ["stock diffusers, fp32", "stock diffusers, bf16", "W8A8 UNet, VAE, text"]
        file = tmp_path / "image.json"
        settings, _ = self.case(
            image, tmp_path, contestants=names[1:], directory=str(tmp_path), json=str(file), num_rounds=2
        )
        result = image.main(settings)
        assert json.loads(file.read_text()) == json.loads(json.dumps(result))
        assert str(tmp_path) not in file.read_text()
        assert started == [(name, prepare) for name in names for prepare in (True, False)] + 2 * [
            (name, False) for name in names
        ]
        rows = rows_of(result)
        assert list(rows) == names
        table = capsys.readouterr().out
        for name, row in rows.items():
            assert f"| {name} | {row['median_ms'] / 1000:.2f} |" in table
            assert row["num_waited"] == 0
            assert all(row["parts"][part] > 0 for part in image.PARTS)
            assert row["load_seconds"] > 0
            assert row["first_seconds"] > 0
            assert row["peak_bytes"] > 1e8
        assert rows["stock diffusers, fp32"]["relative_error"] == 0
        assert 0 < rows["stock diffusers, bf16"]["relative_error"] < 0.1
        assert 0 < rows["W8A8 UNet, VAE, text"]["relative_error"] < 0.1
        if image.memory.resident() is not None:
            assert all(min(held) > 0 for row in rows.values() for held in row["memory"].values())
        assert "From prompt to picture, tiny, AutoencoderKL, 64x64, 2 steps, no guidance" in table
        assert "| resident MB, own + mapped from files |" in table

    @torch.no_grad()
    def test_without_copies_of_the_weights_the_image_is_the_same(self, image, tmp_path):
        _, case = self.case(image, tmp_path)
        parts, name = image.image_contestants, "W4A8 UNet, VAE, text"
        image.CONTESTANTS[name].prepare(case)
        pipelines = [image.CONTESTANTS[each].load(case) for each in (name, f"{name}, low memory")]
        for pipeline, is_low in zip(pipelines, (False, True), strict=True):
            layers = [*packed_layers(pipeline.unet).values(), *packed_layers(pipeline.text_encoder).values()]
            assert {layer.is_memory_short for layer in layers} == {is_low}
        normal, low = (parts.call(pipeline, case, seed=0) for pipeline in pipelines)
        np.testing.assert_array_equal(low, normal)

    def test_who_is_absent_or_fails_is_named(self, image, tmp_path, monkeypatch, capsys):
        def in_a_process(script: str, flags: dict[str, Any]) -> Any:
            raise RuntimeError("ImportError: No module named 'nonsense'\nand where")

        monkeypatch.setattr(image.harness, "in_a_process", in_a_process)
        monkeypatch.setenv("PATH", "")
        settings, _ = self.case(image, tmp_path)
        skipped = image.absent(list(image.OTHERS))
        assert skipped == dict.fromkeys(image.OTHERS, "not installed: sd-cli")
        image.make_files(settings, tmp_path, ["W8A8 UNet", *image.OTHERS], skipped)
        assert skipped["W8A8 UNet"] == "RuntimeError: ImportError: No module named 'nonsense'"
        assert "skipped: stable-diffusion.cpp, f16: not installed: sd-cli" in capsys.readouterr().out

    def test_a_child_gets_the_settings(self, image, tmp_path):
        settings = image.Settings(guidance_scale=7.5, vae="tiny", num_inference_steps=8)
        flags = image.flags_of(settings, tmp_path, "W8A8 UNet, VAE") | {"prepare": True}
        command = [f"--{name}={value}" for name, value in flags.items()]
        (parsed,) = image.HfArgumentParser(image.Settings).parse_args_into_dataclasses(command)
        assert parsed.prepare
        assert (parsed.contestant, parsed.directory) == ("W8A8 UNet, VAE", str(tmp_path))
        assert image.case_of(parsed, tmp_path) == image.case_of(settings, tmp_path)

    def test_what_no_pipeline_makes_is_refused(self, image, tmp_path):
        with pytest.raises(ValueError, match="vae: expected one of .*'tiny'.*, got 'small'"):
            image.case_of(image.Settings(vae="small"), tmp_path)
        with pytest.raises(ValueError, match="size: expected a multiple of 8, got 100"):
            image.case_of(image.Settings(size=100), tmp_path)
        with pytest.raises(ValueError, match="model: expected one of .*'sdxl'.*, got 'sd16'"):
            image.text_to_image.shape_of("sd16")

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["OpenVINO int8, transformer preset", "PT2E X86 Inductor int8, bf16"])
    def test_other_runtimes_make_almost_the_same_image(self, image, tmp_path, name):
        pytest.importorskip("torchao" if name.startswith("PT2E") else "nncf")
        settings, case = self.case(image, tmp_path)
        image.measure(settings, "stock diffusers, fp32", case)
        image.CONTESTANTS[name].prepare(case)
        image.measure(settings, name, case)
        assert image.relative_error(case, name) < 0.1


class TestStableDiffusionCpp:
    LOG = (
        "[INFO ] model.cpp:999  - loading tensors completed, taking 1.39s (process: 0.23s, read: 0.49s)\n"
        "[INFO ] stable-diffusion.cpp:1147 - get_learned_condition completed, taking 250 ms\n"
        "[INFO ] stable-diffusion.cpp:3432 - sampling completed, taking 2.50s\n"
        "[INFO ] stable-diffusion.cpp:2 - decode_first_stage completed, taking 1.00s\n"
        "[INFO ] stable-diffusion.cpp:3615 - generate_image completed in 4.00s\n"
    )

    def test_its_own_times_are_read(self, image):
        seconds = image.stable_diffusion_cpp.seconds_in(self.LOG)
        assert seconds == {"load": 1.39, "text": 0.25, "denoiser": 2.5, "vae": 1.0, "image": 4.0}
        row = image.stable_diffusion_cpp.row_of(seconds, 6.0, {})
        assert row["load_seconds"] == 2.0
        assert row["parts"] == {"text": 0.25, "denoiser": 2.5, "vae": 1.0, "rest": 0.25}
        with pytest.raises(RuntimeError, match="made no image: .*no such file"):
            image.stable_diffusion_cpp.seconds_in("no such file")

    @pytest.mark.skipif(os.name == "nt", reason="a shell script stands for the program")
    def test_a_run_is_watched(self, image, tmp_path, monkeypatch):
        program = tmp_path / "sd-cli"
        program.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/called\nsleep 0.3\ncat <<END\n{self.LOG}END\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        assert image.stable_diffusion_cpp.is_installed()
        case = image.case_of(image.Settings(size=64, vae="tiny"), tmp_path)
        taken = image.stable_diffusion_cpp.sample(case, "q8_0", seed=3)
        called = (tmp_path / "called").read_text()
        for words in ("--type q8_0", "-W 64", "--steps 4", "--cfg-scale 1.0", "-s 3", "--taesd", f"-m {case.folder}"):
            assert words in called
        assert taken.seconds > 0.3
        assert taken.result["image_seconds"] == 4.0
        assert (taken.result["memory"]["load"] is None) == (image.memory.resident() is None)


class TestScaling:
    def test_both_series_and_their_lines(self, scaling, tmp_path, capsys):
        file = tmp_path / "scaling.json"
        settings = scaling.Settings(
            model="tiny", batch_sizes=[1, 2, 3], sample_sizes=[16, 32], num_rounds=1, contestants=["W4A8"],
            json=str(file),
        )  # fmt: skip
        result = scaling.main(settings)
        assert json.loads(file.read_text()) == result
        batch, pixels = result["series"]["batch"], result["series"]["pixels"]
        assert list(batch) == list(pixels) == ["stock diffusers, fp32", "W4A8"]
        assert list(batch["W4A8"]["median_ms"]) == ["1", "2", "3"]
        assert list(pixels["W4A8"]["median_ms"]) == ["256", "1024"]
        printed = capsys.readouterr().out
        assert "| batch | 1 | 2 | 3 | slope |" in printed
        assert "| pixels | 16² | 32² | slope |" in printed

    def test_one_point_is_no_line(self, scaling):
        with pytest.raises(ValueError, match="at least two different sizes each"):
            scaling.benchmark(scaling.Settings(model="tiny", batch_sizes=[1, 1]))

    def test_the_line_is_that_of_numpy(self, scaling):
        amounts, times = [1, 2, 4, 8], [3.0, 5.5, 9.0, 18.0]
        slope, intercept = np.polyfit(amounts, times, 1)
        fitted = scaling.line(dict(zip(amounts, times, strict=True)))
        assert fitted["slope_ms"] == pytest.approx(slope)
        assert fitted["intercept_ms"] == pytest.approx(intercept)
        assert fitted["r_squared"] == pytest.approx(np.corrcoef(amounts, times)[0, 1] ** 2)


class TestLoad:
    @pytest.mark.slow
    def test_every_contestant_is_measured_in_a_process_of_its_own(self, load, tmp_path, capsys, monkeypatch):
        # Each takes as long as importing diffusers does.
        chosen = ("plain load, fp32", "W4 fixed", "W4 saved packed", "W4 saved packed, no checksums")
        monkeypatch.setattr(load, "CONFIGS", {name: load.CONFIGS[name] for name in chosen})
        file = tmp_path / "load.json"
        settings = load.Settings(model="tiny-conditional", num_rounds=1, json=str(file), directory=str(tmp_path))
        result = load.main(settings)
        assert json.loads(file.read_text()) == result
        assert [path.name for path in tmp_path.iterdir()] == ["load.json"]  # the model's files are gone
        assert str(tmp_path) not in file.read_text()
        rows = {row["name"]: row for row in result["contestants"]}
        assert list(rows) == list(load.CONFIGS)
        assert rows["W4 fixed"]["footprint_bytes"] < rows["plain load, fp32"]["footprint_bytes"]
        assert rows["W4 saved packed"]["footprint_bytes"] == rows["W4 fixed"]["footprint_bytes"]
        assert rows["W4 saved packed"]["file_bytes"] == pytest.approx(rows["W4 fixed"]["file_bytes"], abs=2000)
        assert rows["W4 saved packed, no checksums"]["file_bytes"] < rows["W4 saved packed"]["file_bytes"]
        assert all(row["seconds"] > 0 for row in rows.values())
        assert all(row["disk_seconds"] > 0 for row in rows.values()) or not hasattr(os, "posix_fadvise")
        printed = capsys.readouterr().out
        assert all(f"| {name} |" in printed for name in rows)

    def test_a_row_is_the_medians_of_all_rounds_and_the_largest_peak(self, load, tmp_path, monkeypatch):
        taken = {
            name: iter([(5.0, 50), (1.0, 30), (9.0, 10), (2.0, 70), (7.0, 20), (4.0, 60)]) for name in load.CONFIGS
        }

        def in_a_process(settings: Any, name: str, directory: Path) -> dict[str, float]:
            return dict(zip(("seconds", "peak_bytes"), next(taken[name]), strict=True))

        monkeypatch.setattr(load, "in_a_process", in_a_process)
        monkeypatch.setattr(load, "leave_memory", lambda folder: True)
        rows = load.measure(load.Settings(num_rounds=3), tmp_path)
        assert [row["name"] for row in rows] == list(load.CONFIGS)
        assert all((row["disk_seconds"], row["seconds"], row["peak_bytes"]) == (7.0, 2.0, 70) for row in rows)

    @pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="no way to forget files here")
    def test_the_weights_are_forgotten_once_they_are_on_the_disk(self, load, tmp_path, monkeypatch):
        sizes, calls = {"a.safetensors": 3, "b.safetensors": 5, "config.json": 7}, []
        for name, size in sizes.items():
            (tmp_path / name).write_bytes(bytes(size))
        monkeypatch.setattr(os, "fsync", lambda file: calls.append(("on disk", os.fstat(file.fileno()).st_size)))
        monkeypatch.setattr(os, "posix_fadvise", lambda file, *advice: calls.append((advice, os.fstat(file).st_size)))
        assert load.leave_memory(tmp_path)
        assert [what for what, _ in calls] == 2 * ["on disk", (0, 0, os.POSIX_FADV_DONTNEED)]
        assert calls[0][1] == calls[1][1]
        assert calls[2][1] == calls[3][1]
        assert {size for _, size in calls} == {3, 5}

    def test_without_a_way_to_forget_files_there_is_nothing_from_the_disk(self, load, tmp_path, monkeypatch):
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
        monkeypatch.setattr(load, "in_a_process", lambda *args: {"seconds": 1.0, "peak_bytes": 1})
        rows = load.measure(load.Settings(num_rounds=1), tmp_path)
        assert {row["disk_seconds"] for row in rows} == {None}
        assert load.seconds_beside(rows[0], rows[0], "disk_seconds") == "- | -"


class TestShippedLibrary:
    @pytest.fixture(autouse=True)
    def without_flags(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if isinstance(library(), str):
            pytest.skip(library())
        monkeypatch.delenv(native.FLAGS_VARIABLE, raising=False)

    def test_both_libraries_compute_the_same_in_turns(self, shipped_library, tmp_path, capsys):
        file = tmp_path / "shipped.json"
        settings = shipped_library.Settings(model="tiny", batch_size=1, num_rounds=2, json=str(file))
        result = shipped_library.main(settings)
        assert json.loads(file.read_text()) == json.loads(json.dumps(result))
        compiled, shipped = result["libraries"]
        assert (compiled["name"], shipped["name"]) == ("compiled here", "shipped")
        assert (compiled["ratio"], compiled["difference"]) == (1, 0)
        assert len(shipped["rounds_ms"]) == 2
        assert shipped["ratio"] == pytest.approx(shipped["median_ms"] / compiled["median_ms"])
        assert shipped["difference"] < 1e-2  # a sum that is rounded otherwise may move a code
        names = [variants.file_name(variants.CSRC / "layers.c", name) for name in variants.LIBRARIES["layers.c"]]
        assert shipped["library"] in names
        assert compiled["library"] not in names
        printed = capsys.readouterr().out
        assert f"| shipped | {shipped['library']} |" in printed
        assert "W8A8: medians of 2 interleaved rounds" in printed

    def test_a_cpu_that_wheels_have_nothing_for_is_refused(self, shipped_library, tmp_path, monkeypatch):
        monkeypatch.setattr(shipped_library.cpu, "flags", lambda: frozenset(("sse2",)))
        with pytest.raises(ValueError, match="nothing for this CPU: the least is .*'avx2'"):
            shipped_library.build_for_this_cpu(tmp_path)


class TestMethodCost:
    @pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory peaks are those of Linux")
    def test_every_part_is_measured_and_the_whole_run_follows(self, method_cost, tmp_path, capsys):
        settings = method_cost.Settings(
            model="tiny-conditional", sample_size=8, price_layers=3, json=str(tmp_path / "cost.json")
        )
        result = method_cost.main(settings)
        assert json.loads((tmp_path / "cost.json").read_text()) == result
        rows = {row["name"]: row for row in result["rows"]}
        assert list(rows) == ["recording", "preparation", "prices", "capture", "reconstruction"]
        assert all(row["seconds"] > 0 and row["peak_bytes"] > 1e8 for row in rows.values())
        assert result["num_prices"] == 3
        seconds = rows["prices"]["seconds"] / 3 * result["num_layers"]
        assert result["hours"]["prices_of_a_round"] == pytest.approx(seconds / 3600)
        assert result["hours"]["prices"] == pytest.approx(5 * seconds / 3600)  # two stages of two rounds, and a last
        assert result["hours"]["reconstruction"] == pytest.approx(
            result["num_units"] * 125 * (16 / 8) * rows["reconstruction"]["seconds"] / 2 / 3600
        )
        printed = capsys.readouterr().out
        assert all(f"| {name} |" in printed for name in rows)

    def test_layers_are_spread_over_the_model(self, method_cost):
        names = [str(index) for index in range(10)]
        assert method_cost.spread(names, 3) == ["0", "3", "6"]
        assert method_cost.spread(names, 0) == method_cost.spread(names, 99) == names


class TestProcesses:
    def test_a_child_times_every_part(self, processes, tmp_path):
        path = tmp_path / "times.json"
        settings = processes.Settings(
            model="tiny", num_threads=1, num_inference_steps=4, num_images=4, batch_size=2, num_units=1,
            reconstruction_samples=8, iterations=1, max_train_steps=1, train_batch_size=2, result=str(path),
        )  # fmt: skip
        seconds = processes.main(settings)
        assert list(seconds) == ["recording", "prices of a round", "reconstruction", "CAD", "sampling"]
        assert all(value > 0 for value in seconds.values())
        assert json.loads(path.read_text()) == seconds

    def test_children_take_turns_and_medians_are_compared(self, processes, tmp_path, monkeypatch, capsys):
        times, turns = iter([3.0, 2.0, 9.0, 1.0, 3.0, 1.0]), []

        def in_processes(settings: Any, num_processes: int) -> dict[str, float]:
            turns.append(num_processes)
            return {"recording": next(times)}

        monkeypatch.setattr(processes, "in_processes", in_processes)
        result = processes.main(processes.Settings(model="tiny", json=str(tmp_path / "result.json")))
        assert turns == [1, 2, 1, 2, 1, 2]
        assert json.loads((tmp_path / "result.json").read_text()) == result
        assert "| recording | 3.0 | 1.0 | 3.00 |" in capsys.readouterr().out

    @pytest.mark.parametrize("count", [1, 2])
    def test_a_child_gets_the_settings_through_accelerate(self, processes, count):
        command = processes.command(processes.Settings(num_units=7, result="times.json"), count)
        assert ("--multi_gpu" in command) == (count > 1)
        assert command[command.index("--num_processes") + 1] == str(count)
        flags = command[command.index(processes.__file__) + 1 :]
        (parsed,) = processes.HfArgumentParser(processes.Settings).parse_args_into_dataclasses(flags)
        assert parsed == processes.Settings(num_units=7, result="times.json")


class TestAdapters:
    def test_all_take_part_and_the_file_has_them(self, adapters, tmp_path, capsys):
        path = tmp_path / "adapters.json"
        settings = adapters.Settings(model="tiny-conditional", sample_size=8, num_rounds=2, json=str(path))
        adapters.main(settings)
        result = json.loads(path.read_text())
        assert [row["name"] for row in result["rows"]] == [adapters.NONE, *adapters.ADAPTERS]
        assert result["rows"][0]["ratio"] == 1
        assert all(0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"] for row in result["rows"])
        assert all(row["relative_to_parts"] < 0.2 for row in result["rows"])
        assert f"| {adapters.NONE} |" in capsys.readouterr().out

    def test_an_adapter_lies_on_the_layers_that_it_names(self, adapters):
        model = adapters.models.build("tiny-conditional")
        for rank, targets in adapters.ADAPTERS.values():
            names = [
                name.removesuffix(".base_layer")
                for name, _ in adapters.adapted(model, rank, targets).named_modules()
                if name.endswith(".base_layer")
            ]
            assert {target for target in targets for name in names if name.endswith(f".{target}")} == set(targets)


class TestReduction:
    def test_a_ring_sends_each_gradient_almost_twice(self, reduction):
        assert reduction.sent_bytes(10, 1) == 0
        assert reduction.sent_bytes(10, 2) == 40
        assert reduction.sent_bytes(10, 8) == 70

    def test_what_is_sent_takes_from_the_speed_up(self, reduction):
        assert reduction.speed_up(2.0, 0.0, 8) == 8
        assert reduction.speed_up(2.0, 2.0, 8) == 4

    def test_operations_are_counted_without_memory(self, reduction, monkeypatch):
        """A convolution of 3 by 3: 9 products for each of 4 x 2 pairs of channels, in each of 8 x 8 places, twice."""
        model = nn.Conv2d(4, 2, 3, padding=1, device="meta")
        monkeypatch.setattr(reduction.models, "draw_inputs", lambda *_: (torch.empty(1, 4, 8, 8, device="meta"),))
        assert reduction.forward_flops(model) == 2 * 9 * 8 * 64

    def test_the_committed_numbers_are_those_of_the_script(self, reduction):
        path = SCRIPTS.parent / "results" / "reduction-sd15.json"
        result = reduction.benchmark(reduction.Settings())
        assert json.loads(path.read_text()) == result
        assert result["num_parameters"] == 859_520_964
        cad, units = (result["rows"][index]["teraflop"] * 1e12 for index in (0, 3))
        assert cad == pytest.approx(10 * 32 * result["forward_flops"])
        assert units == pytest.approx(3 * 16 * result["forward_flops"] / 8)


@pytest.fixture(scope="module")
def training_memory() -> Iterator[ModuleType]:
    yield from import_script("training_memory")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory peaks are those of Linux")
class TestTrainingMemory:
    TINY: dict[str, Any] = {
        "model": "tiny-conditional",
        "sample_size": 8,
        "block": "mid_block.resnets.0",
        "price_layers": 1,
    }

    def test_every_stage_is_measured_with_all_its_levers(self, training_memory, tmp_path):
        settings = training_memory.Settings(**self.TINY)
        for stage, (_, levers) in training_memory.STAGES.items():
            row = training_memory.measure(settings, stage, list(levers)[-1], tmp_path)
            assert row["seconds"] > 0
            assert row["peak_bytes"] > 1e8

    @pytest.mark.slow
    def test_a_run_has_a_row_of_each_process(self, training_memory, tmp_path, capsys):
        settings = training_memory.Settings(
            **self.TINY, stages=["prices"], levers=["none"], json=str(tmp_path / "memory.json")
        )
        result = training_memory.main(settings)
        assert json.loads((tmp_path / "memory.json").read_text()) == result
        assert [(row["stage"], row["lever"]) for row in result["rows"]] == [("recording", "none"), ("prices", "none")]
        assert "| prices | none |" in capsys.readouterr().out

    def test_a_row_is_counted_in_weights(self, training_memory):
        row = {"stage": "prices", "lever": "none", "seconds": 2.0, "peak_bytes": 88e9, "libraries_bytes": 4e8}
        machine = sys.modules["harness"].circumstances()
        result = {
            "settings": vars(training_memory.Settings()),
            "environment": machine,
            "num_parameters": 10**10,
            "rows": [row],
        }
        assert "| prices | none | 88.0 | 2.2 | 2.0 |" in training_memory.markdown(result)

    def test_what_is_no_stage_is_refused(self, training_memory):
        with pytest.raises(ValueError, match=r"stages: expected some of .* got \['price'\]"):
            training_memory.benchmark(training_memory.Settings(stages=["price"]))
        with pytest.raises(ValueError, match="num_updates=2: expected at least 3"):
            training_memory.benchmark(training_memory.Settings(num_updates=2))


@pytest.fixture(scope="module")
def plan() -> Iterator[ModuleType]:
    yield from import_script("plan")


class TestPlan:
    def test_a_run_is_compared_with_its_plan_stage_by_stage(self, plan, tmp_path, capsys):
        from conftest import build_tiny_scheduler, build_tiny_unet
        from diffusers import DDIMPipeline

        DDIMPipeline(build_tiny_unet(), build_tiny_scheduler()).save_pretrained(tmp_path / "teacher")
        flags = (
            f"--preset smoke --pretrained_model_name_or_path {tmp_path / 'teacher'} --num_images 2 --bit_choices 8 4 "
            "--num_trajectories 4 --max_train_steps 2 --modules_to_not_convert up_blocks down_blocks attentions"
        )
        settings = plan.Settings(flags=flags, clock="cpu", json=str(tmp_path / "plan.json"))
        result = plan.main(settings)
        assert json.loads((tmp_path / "plan.json").read_text()) == result
        assert [row["stage"] for row in result["rows"]] == ["recording", "pq", "pq_cad", "rows"]
        assert all(row["planned_seconds"] > 0 and row["seconds"] > 0 for row in result["rows"])
        assert all(row["planned_bytes"] > 0 for row in result["rows"])
        assert "| pq_cad |" in capsys.readouterr().out

    def test_how_far_a_plan_is_off(self, plan):
        assert [plan.percent_off(*pair) for pair in ((110.0, 100.0), (75.0, 100.0))] == ["+10 %", "-25 %"]

    def test_what_is_no_clock_is_refused(self, plan):
        with pytest.raises(ValueError, match="clock: expected one of .* got 'sun'"):
            plan.benchmark(plan.Settings(clock="sun"))


class TestResident:
    def test_each_contestant_holds_what_it_holds_in_a_process_of_its_own(
        self, resident, tmp_path, monkeypatch, capsys
    ):
        started = []

        def in_this_process(script: str, flags: dict[str, Any]) -> Any:
            started.append(flags["contestant"])
            return json.loads(json.dumps(resident.main(resident.Settings(**flags))))

        monkeypatch.setattr(resident.harness, "in_a_process", in_this_process)
        file = tmp_path / "resident.json"
        settings = resident.Settings(
            model="tiny-conditional", sample_size=8, num_steps=2, batch_size=1, contestants=["W4A8*"], json=str(file),
            directory=str(tmp_path),
        )  # fmt: skip
        result = resident.main(settings)
        assert json.loads(file.read_text()) == json.loads(json.dumps(result))
        assert str(tmp_path) not in file.read_text()
        assert started == list(rows_of(result)) == ["stock diffusers, fp32", "W4A8", "W4A8, low memory"]
        assert {folder.name for folder in tmp_path.iterdir() if folder.is_dir()} == {"float32", "W4"}
        for row in rows_of(result).values():
            assert list(row["memory"]) == list(resident.MOMENTS)
            if resident.memory.resident() is not None:
                assert all(min(held) > 1e6 for held in row["memory"].values())
            assert row["peak_bytes"] > 1e8
        assert "| W4A8, low memory |" in capsys.readouterr().out

    def test_a_model_is_saved_once_in_its_own_dtype(self, resident, tmp_path):
        settings = resident.Settings(model="tiny-conditional", directory=str(tmp_path))
        kind = resident.CONTESTANTS["stock diffusers, bf16"]
        resident.save(settings, kind, tmp_path)
        (file,) = (tmp_path / "bfloat16").glob("*.safetensors")
        with safe_open(file, "pt") as saved:
            assert {saved.get_tensor(name).dtype for name in saved.keys()} == {torch.bfloat16}
        written = file.stat().st_mtime_ns
        resident.save(settings, kind, tmp_path)
        assert file.stat().st_mtime_ns == written
