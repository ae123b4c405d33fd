"""Specification of the whole job in Python: stages that are kept, in their order, on a tiny teacher."""

import errno
import importlib
import json
import math
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, UNet2DModel
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import diffusers_pqcad
from diffusers_pqcad import DistillConfig, PQCADConfig
from diffusers_pqcad.compression import distillation
from diffusers_pqcad.compression.checkpoint import NotWrittenError, load_checkpoint, model_hash, save_checkpoint
from diffusers_pqcad.compression.denoiser import StepPlan
from diffusers_pqcad.compression.fake_quant import fake_quant_layers
from diffusers_pqcad.compression.stopping import Stopped
from diffusers_pqcad.publishing.compress import (
    arms_of,
    cad_teacher,
    check_is_shared,
    compress,
    fixed_bits,
    lesson_of,
    prepare_process,
    stages_of,
    variants_of,
)
from diffusers_pqcad.publishing.run_folder import save_json
from diffusers_pqcad.publishing.settings import ABLATIONS, PRESETS, CompressConfig, Settings, settings_of

module = importlib.import_module("diffusers_pqcad.publishing.compress")


def settings_for(teacher: Path, output: Path, **changes: Any) -> Settings:
    paths = {"pretrained_model_name_or_path": str(teacher), "output_dir": str(output), "num_threads": 1}
    return settings_of(PRESETS["smoke"] | paths | changes)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    from conftest import build_tiny_scheduler, build_tiny_unet

    folder = tmp_path_factory.mktemp("teacher")
    DDIMPipeline(build_tiny_unet(), build_tiny_scheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The folder of a run, and its metrics."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, compress(*settings_for(teacher, folder, max_grad_norm=math.inf), progress=False)


def refuse(*arguments: Any, **keywords: Any) -> Any:
    raise AssertionError("it was made again")


def test_compress_is_a_name_of_the_package():
    assert diffusers_pqcad.compress is compress
    assert diffusers_pqcad.CompressConfig is CompressConfig


def test_metrics_are_what_the_folder_says(finished):
    folder, metrics = finished
    # Strict: JSON has no infinity, and other languages refuse Python's.
    text = (folder / "metrics.json").read_text()
    assert json.loads(text, parse_constant=refuse) == metrics
    assert metrics["settings"]["max_grad_norm"] == "inf"
    assert metrics["settings"]["reconstruction_iterations"] == 2
    keys = ["float", "float_half", "fixed", "pq", "pq_half", "pq_cad"]
    assert [row["key"] for row in metrics["rows"]] == keys
    assert metrics["rows"][-1]["num_inference_steps"] == 2
    assert metrics["cad"]["steps"] == 4
    card = (folder / "README.md").read_text()
    assert "quantized teacher, full-precision calibration" in card
    assert "license:" not in card


def test_memory_is_measured_on_what_was_saved_called_as_it_was_distilled(teacher, finished, monkeypatch, tmp_path):
    folder, metrics = finished
    assert metrics["memory"] is None  # of the preset "smoke"
    assert "Memory while sampling was not measured." in (folder / "README.md").read_text()
    asked = []

    def rows(*arguments: Any) -> list[dict[str, Any]]:
        asked.append(arguments)
        return [{"name": "x", "size_bytes": 1, "num_threads": 1, "peak_bytes": 3, "before_bytes": 2}]

    monkeypatch.setattr(module, "memory_rows", rows)
    copy_of_run = shutil.copytree(folder, tmp_path / "whole")
    settings = settings_for(teacher, copy_of_run, max_grad_norm=math.inf, measure_memory=True)
    for _ in range(2):  # the second one reads it back
        found = compress(*settings, progress=False)
    ((whole, student, denoiser, sizes, _),) = asked
    assert (whole.path, student.path) == (str(teacher), str(copy_of_run))
    assert whole.num_inference_steps == student.num_inference_steps == 2
    assert not hasattr(denoiser, "quantization_config")
    assert sizes == (metrics["rows"][0]["size_bytes"], metrics["rows"][-1]["size_bytes"])
    assert json.loads((copy_of_run / "metrics.json").read_text())["memory"] == found["memory"]
    assert "| x | 0.00 | 0 |" in (copy_of_run / "README.md").read_text()


def test_a_finished_run_makes_nothing_again_and_says_the_same(teacher, finished, monkeypatch, capfd):
    folder, metrics = finished
    weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    for name in ("record", "distill", "measure", "reference_samples", "note_training"):
        monkeypatch.setattr(module, name, refuse)
    again = compress(*settings_for(teacher, folder, max_grad_norm=math.inf), progress=False)
    assert {**again, "environment": None} == {**metrics, "environment": None}
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes() == weights
    assert capfd.readouterr().out == ""


def test_all_is_trained_before_anything_is_measured(teacher, tmp_path, monkeypatch):
    def stop(*arguments: Any, **keywords: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "reference_samples", stop)
    with pytest.raises(KeyboardInterrupt):
        compress(*settings_for(teacher, tmp_path / "out", ablations=True, reconstruction_iterations=0), progress=False)
    state = tmp_path / "out" / "state"
    trained = {arm.key for arm in arms_of(DistillConfig(), ABLATIONS)}
    trained |= {"pq", *(variant.key for variant in variants_of(settings_of({"ablations": True})))}
    assert trained <= {path.stem for path in state.glob("*.safetensors")}
    assert (state / "calibration" / "data.arrow").exists()
    assert not (state / "rows").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_inference_steps": 6}, "divide"),
        ({"modules_to_not_convert": ["nowhere"]}, "modules_to_not_convert"),
        ({"train_device": "abacus"}, "train_device: expected 'cpu' or the kind .* got 'abacus'"),
        ({"validation_prompts": ["red cat"]}, "^validation_prompts: prompt: DDIMPipeline does not take it"),
        ({"resume_from_checkpoint": "checkpoint-2"}, r"^resume_from_checkpoint: expected 'latest' or .*\(none\)"),
        ({"revision": "v2"}, "^revision: expected a repository of the Hub with it, got the folder"),
        ({"extractor": "nowhere"}, "^extractor: nowhere/config.json: not found"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(teacher, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        compress(*settings_for(teacher, tmp_path / "out", **changes), progress=False)
    assert not (tmp_path / "out").exists()


def test_tf32_is_what_the_settings_say(monkeypatch):
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for allowed in (True, False):
        prepare_process(CompressConfig(allow_tf32=allowed))
        assert [backend.allow_tf32 for backend in backends] == [allowed] * 2
    for backend, value in zip(backends, before, strict=True):
        backend.allow_tf32 = value


def test_processes_that_do_not_know_of_each_other_are_refused(monkeypatch):
    prepare_process(CompressConfig())  # from here on, this is the first process of one
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, and each believes to be one of 1"):
        prepare_process(CompressConfig())


def test_a_folder_that_a_process_does_not_see_is_refused(tmp_path):
    with pytest.raises(ValueError, match="output_dir: .* is another folder on this computer"):
        check_is_shared(tmp_path)


def test_processes_of_one_computer_share_its_cores(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    for here, threads in (("1", cores), (str(cores), 1), ("999", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
        prepare_process(CompressConfig())
        assert torch.get_num_threads() == threads


class Killed(BaseException):
    """What nothing in the package catches."""


def test_each_halving_is_kept_and_a_killed_one_goes_on_to_the_same_bits(teacher, tmp_path, monkeypatch):
    def stop(*arguments: Any, **keywords: Any) -> Any:
        raise Killed

    monkeypatch.setattr(module, "reference_samples", stop)
    changes = {"num_inference_steps": 8, "num_halvings": 2, "reconstruction_iterations": 0}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    with pytest.raises(Killed):
        compress(*settings_for(teacher, whole, **changes), progress=False)

    saves = []

    def save_then_die(path: Path, state: dict[str, Any]) -> None:
        save_checkpoint(path, state)
        saves.append(Path(path).name)
        if saves[-1] == "pq_cad-resume.safetensors":
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distillation, "save_checkpoint", save_then_die)
        with pytest.raises(Killed):
            compress(*settings_for(teacher, killed, **changes), progress=False)
    assert saves == ["pq_cad_4-resume.safetensors"] * 2 + ["pq_cad-resume.safetensors"]
    first = (killed / "state" / "pq_cad_4.safetensors").stat().st_mtime_ns
    with pytest.raises(Killed):
        compress(*settings_for(teacher, killed, **changes), progress=False)
    assert (killed / "state" / "pq_cad_4.safetensors").stat().st_mtime_ns == first
    weights = {}
    for key in ("pq", "pq_cad_4", "pq_cad"):
        found, wanted = (load_file(folder / "state" / f"{key}.safetensors") for folder in (killed, whole))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        weights[key] = next(value for name, value in wanted.items() if name.endswith("conv_in.weight"))
    assert not torch.equal(weights["pq_cad_4"], weights["pq_cad"])


def test_a_run_that_gets_sigterm_writes_a_checkpoint_and_goes_on_to_the_same_bits(
    teacher, finished, tmp_path, monkeypatch
):
    settings = settings_for(teacher, tmp_path / "out", max_grad_norm=math.inf)
    resume, steps = tmp_path / "out" / "state" / "pq_cad-resume.safetensors", []

    def distill_and_send(*arguments: Any, **keywords: Any) -> Any:
        for entry in distillation.distill(*arguments, **keywords):
            yield entry
            steps.append(entry.step)
            if steps == [1]:
                os.kill(os.getpid(), signal.SIGTERM)

    def stop(*arguments: Any, **keywords: Any) -> Any:
        raise Killed

    monkeypatch.setattr(module, "distill", distill_and_send)
    with pytest.raises(Stopped) as stopped:
        compress(*settings, progress=False)
    assert stopped.value.exit_code == 143
    assert load_checkpoint(resume)["step"] == 1
    monkeypatch.setattr(module, "reference_samples", stop)
    with pytest.raises(Killed):
        compress(*settings, progress=False)
    assert steps == [1, 2, 3, 4]
    found, wanted = (load_file(folder / "state" / "pq_cad.safetensors") for folder in (tmp_path / "out", finished[0]))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_watched_stopped_and_gone_back_a_run_ends_with_the_same_bits(teacher, finished, tmp_path, monkeypatch):
    folder, steps = tmp_path / "out", []
    habits = {
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
        "validation_steps": 2,
        "report_to": "tensorboard",
    }
    changes = habits | {"report_to": "tensorboard", "max_grad_norm": math.inf}

    def distill_until_killed(*arguments: Any, **keywords: Any) -> Any:
        for entry in distillation.distill(*arguments, **keywords):
            yield entry
            steps.append(entry.step)
            if steps == [1, 2, 3, 4]:
                raise Killed

    def stop(*arguments: Any, **keywords: Any) -> Any:
        raise Killed

    monkeypatch.setattr(module, "distill", distill_until_killed)
    with pytest.raises(Killed):
        compress(*settings_for(teacher, folder, **changes), progress=False)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    with pytest.raises(ValueError, match=r"resume_from_checkpoint: .*checkpoint-2, checkpoint-3.*'checkpoint-1'"):
        compress(*settings_for(teacher, folder, resume_from_checkpoint="checkpoint-1", **changes), progress=False)
    monkeypatch.setattr(module, "reference_samples", stop)
    with pytest.raises(Killed):
        compress(*settings_for(teacher, folder, resume_from_checkpoint="checkpoint-2", **changes), progress=False)
    assert steps == [1, 2, 3, 4, 3, 4]
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert sorted(path.name for path in (folder / "validation").iterdir()) == [
        "pq_cad-000002.png",
        "pq_cad-000004.png",
    ]
    told = EventAccumulator(str(folder / "logs" / "pqcad-compress"))
    told.Reload()
    rounds = json.loads((finished[0] / "history.json").read_text())["rounds"]
    bits = [(event.step, event.value) for event in told.Scalars("pq/average_bits")]
    assert bits == [(index, pytest.approx(entry["average_bits"])) for index, entry in enumerate(rounds, start=1)]
    # Updates count on after them; those after a kill were told again.
    updates = [event.step - len(rounds) for event in told.Scalars("pq_cad/train_loss")]
    assert sorted(set(updates)) == [1, 2, 3, 4]
    found, wanted = (load_file(path / "state" / "pq_cad.safetensors") for path in (folder, finished[0]))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_a_full_disk_and_a_folder_that_is_gone_are_told_of(teacher, tmp_path, monkeypatch):
    folder = tmp_path / "out"

    def fill(*arguments: Any, **keywords: Any) -> Any:
        raise OSError(errno.ENOSPC, "Error writing bytes to file")

    def delete(*arguments: Any, **keywords: Any) -> Any:
        shutil.rmtree(folder)
        save_json(folder / "state" / "pq-training.json", {})

    monkeypatch.setattr(module, "record", fill)
    with pytest.raises(NotWrittenError, match=r"out/state: .*the disk is full .*goes on"):
        compress(*settings_for(teacher, folder), progress=False)
    monkeypatch.setattr(module, "record", delete)
    with pytest.raises(NotWrittenError, match=r"the folder .*out/state is gone"):
        compress(*settings_for(teacher, folder), progress=False)
    assert not folder.exists()


def test_the_stages_of_an_arm():
    arm = arms_of(DistillConfig(), ())[0]

    def stages(num_halvings: int) -> list[tuple[str, int]]:
        return [tuple(stage) for stage in stages_of(arm, CompressConfig(num_halvings=num_halvings))]

    assert stages(0) == [("pq_cad", 1)]
    assert stages(1) == [("pq_cad", 2)]
    assert stages(2) == [("pq_cad_10", 2), ("pq_cad", 4)]


def test_a_student_learns_from_the_student_before_it_or_from_the_full_precision_model(tiny_calibration_set):
    config = DistillConfig()
    for stride in (1, 2):
        assert lesson_of(config, tiny_calibration_set, stride) == (tiny_calibration_set, stride, config)
    view, stride, changed = lesson_of(config, tiny_calibration_set, 4)
    assert (view.num_inference_steps, stride) == (2, 2)
    assert changed == DistillConfig(fold_guidance=False)
    of_float = DistillConfig(teacher="fp")
    assert lesson_of(of_float, tiny_calibration_set, 4) == (tiny_calibration_set, 4, of_float)
    plan = StepPlan(branches=(2,), weights=(-1.0, 2.0))
    guided = tiny_calibration_set._with(plan=plan)
    assert lesson_of(config, guided, 2).calibration.plan == plan
    assert lesson_of(config, guided, 4).calibration.plan == plan.folded()
    assert lesson_of(DistillConfig(fold_guidance=False), guided, 4).calibration.plan == plan


def test_each_student_begins_as_the_one_before_it(tiny_calibration_set, tmp_path, monkeypatch):
    seen = []

    def trained(site: Any, key: str, lesson: Any, teacher: Any, before: Any, watcher: Any) -> Any:
        seen.append((key, lesson.stride, before))
        return module.Trained(f"student of {key}", [])

    monkeypatch.setattr(module, "distilled_student", trained)
    site, arm = module.Site(tmp_path, "cpu", False), arms_of(DistillConfig(), ())[0]
    run = CompressConfig(num_halvings=2)
    supervision = SimpleNamespace(of=lambda *place, folded: None)
    found = module.distilled_students(site, arm, run, None, tiny_calibration_set, "PQ", supervision)
    assert list(found) == ["pq_cad_10", "pq_cad"]
    assert seen == [("pq_cad_10", 2, "PQ"), ("pq_cad", 2, "student of pq_cad_10")]


def test_a_student_of_an_older_version_is_refused_where_it_would_be_called_otherwise(tmp_path):
    site = module.Site(tmp_path, "cpu", False)
    save_checkpoint(tmp_path / "pq_cad.safetensors", {"student": {}, "stats": []})
    plan = StepPlan(branches=(2,), weights=(-1.0, 2.0))
    lesson = module.Lesson(SimpleNamespace(plan=plan), 2, DistillConfig())
    with pytest.raises(ValueError, match=r"pq_cad\.safetensors: this student was trained with both branches"):
        module.distilled_student(site, "pq_cad", lesson, None, None, module.Watcher())


def test_ablations_change_one_part_of_the_whole_method_each():
    config = DistillConfig(max_train_steps=7)
    assert [(arm.key, arm.config) for arm in arms_of(config, ())] == [("pq_cad", config)]
    changes = {
        "pq_cad": {},
        "cad_calibration_only": {"teacher": "none"},
        "cad_float_teacher": {"teacher": "fp"},
        "cad_no_calibration": {"calibration": False},
    }
    found = {arm.key: arm.config for arm in arms_of(config, ABLATIONS)}
    assert found == {key: DistillConfig(max_train_steps=7, **change) for key, change in changes.items()}
    # The run's own switches are those of its student alone.
    found = {arm.key: arm.config for arm in arms_of(DistillConfig(max_train_steps=7, teacher="none"), ABLATIONS)}
    assert found.pop("pq_cad").teacher == "none"
    assert found == {key: DistillConfig(max_train_steps=7, **change) for key, change in changes.items() if change}


@pytest.mark.parametrize(
    ("folded", "key", "name"),
    [(True, "cad_guided", "CAD: both branches of guidance"), (False, "cad_folded", "CAD: guidance folded")],
)
def test_an_arm_treats_guidance_the_other_way_round(folded, key, name):
    config = DistillConfig(max_train_steps=7, teacher="none", fold_guidance=None if folded else False)
    *others, arm = arms_of(config, ABLATIONS, fold_otherwise=not folded)
    assert arm == (key, name, DistillConfig(max_train_steps=7, fold_guidance=not folded))
    assert others == arms_of(config, ABLATIONS)
    plan = StepPlan(branches=(2,), weights=(-1.0, 2.0))
    assert [item.config.folds(plan) for item in (*others, arm)] == [*[folded] * len(others), not folded]


def costs_of(rows: list[Any]) -> dict[str, tuple[int, dict[str, Any]]]:
    return {row.key: (row.num_inference_steps, row.arguments) for row in rows}


def test_the_rows_of_what_a_student_costs(tiny_pipeline, tiny_calibration_set):
    def costs(stride: int, folded: bool) -> dict[str, tuple[int, dict[str, Any]]]:
        return costs_of(module.guidance_rows(tiny_pipeline, tiny_calibration_set, stride, folded=folded))

    off = {"guidance_scale": 1}
    assert costs(2, True) == {"float_unguided_2": (2, off)}
    assert costs(4, True) == {"float_unguided_1": (1, off)}
    assert costs(2, False) == {"float_unguided_4": (4, off), "float_unguided_2": (2, off)}
    assert costs(1, False) == {"float_unguided_4": (4, off)}
    assert costs(1, True) == {"float_unguided_4": (4, off)}


def test_full_precision_has_a_row_for_each_number_of_steps(tiny_pipeline):
    settings = settings_of({"num_inference_steps": 8, "float_steps": [3, 4, 1, 3]})
    rows = module.untrained_rows(tiny_pipeline, None, settings, {2: {"num_inference_steps": 4}})
    found = {row.key: row.num_inference_steps for row in rows if row.name == "full precision"}
    assert found == {"float": 8, "float_half": 4, "float_3": 3, "float_1": 1}


def test_variants_of_pq():
    settings = settings_of({"ablations": True, "weight_bits": 3.5, "beta": 0.5})
    plain, one_width = variants_of(settings)
    assert (plain.progressive.beta, plain.quantization) == (0.0, settings.quantization)
    assert one_width.progressive == settings.progressive
    assert one_width.quantization == PQCADConfig(weight_bits=3, bit_choices=(3,))
    assert variants_of(settings_of({})) == []
    assert fixed_bits(PQCADConfig(weight_bits=7, bit_choices=(8, 4))) == 4


def test_of_the_ablations_those_that_are_named():
    """So that a long run can be cut into pieces."""
    settings = settings_of({"ablations": True, "only_ablations": ["teacher", "width"]})
    assert [variant.key for variant in variants_of(settings)] == ["fixed_reconstructed"]
    arms = arms_of(DistillConfig(), settings.run.wanted_ablations(), fold_otherwise=True)
    assert [arm.key for arm in arms] == ["pq_cad", "cad_calibration_only"]
    everything = settings_of({"ablations": True}).run.wanted_ablations()
    assert everything == ABLATIONS
    arms = arms_of(DistillConfig(), everything, fold_otherwise=True)
    assert len(arms) + len(variants_of(settings_of({"ablations": True}))) == len(ABLATIONS) + 1 - len(["load_time"])
    for values in ({"ablations": True, "only_ablations": ["gate"]}, {"only_ablations": ["teacher"]}):
        with pytest.raises(ValueError, match="only_ablations: expected some of momentum, width, teacher"):
            settings_of(values)


def test_the_teacher_of_a_student(tiny_pipeline: DDIMPipeline, tiny_quantized: UNet2DModel):
    assert cad_teacher(DistillConfig(teacher="none"), tiny_pipeline, tiny_quantized) is None
    whole = cad_teacher(DistillConfig(teacher="fp"), tiny_pipeline, tiny_quantized)
    assert whole is not tiny_pipeline.unet
    assert model_hash(whole) == model_hash(tiny_pipeline.unet)
    rounded = cad_teacher(DistillConfig(), tiny_pipeline, tiny_quantized)
    assert fake_quant_layers(tiny_quantized)
    sample = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(rounded(sample, 3).sample, tiny_quantized(sample, 3).sample)
