"""Specification of the commands that run pipelines, `calibrate`, `compress` and `evaluate`, and of `push`."""

import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from command_line import answer, contents
from conftest import build_tiny_scheduler, build_tiny_unet
from diffusers import DDIMPipeline
from pipelines import PIPELINES, PROMPTS
from safetensors.torch import load_file

from diffusers_pqcad import CalibrationSet, PQCADConfig, quantize_
from diffusers_pqcad.cli.main import main
from diffusers_pqcad.publishing import pushing
from diffusers_pqcad.publishing.given_set import differences
from diffusers_pqcad.publishing.hub import END, START
from diffusers_pqcad.publishing.settings import CompressConfig
from diffusers_pqcad.publishing.sizes import in_memory

SMALL = ("--num_threads", "1", "--sampling_batch_size", "4")
SMOKE = ("--preset", "smoke", "--num_threads", "1", "--num_images", "3", "--max_train_steps", "2")
SD = (*SMALL, "--height", "16", "--width", "16", "--guidance_scale", "5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An unconditional pipeline, and the same quantized; a text-to-image pipeline with prompts."""
    folder = tmp_path_factory.mktemp("pipelines")
    DDIMPipeline(build_tiny_unet(), build_tiny_scheduler()).save_pretrained(folder / "float")
    small = quantize_(build_tiny_unet(), PQCADConfig(weight_bits=4))
    DDIMPipeline(small, build_tiny_scheduler()).save_pretrained(folder / "small")
    PIPELINES["sd"].build().save_pretrained(folder / "sd")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


# calibrate


def test_calibrate_records_the_set_that_python_reads(capsys, folder, tmp_path):
    flags = ("--num_trajectories", "5", "--num_inference_steps", "4", "-o", tmp_path / "set", "--json")
    found = answer(capsys, "calibrate", folder / "float", *flags, *SMALL)
    assert found.code == 0, found.err
    calibration = CalibrationSet.load(tmp_path / "set")
    assert (len(calibration), calibration.num_inference_steps) == (5, 4)
    calibration.check(build_tiny_unet(), build_tiny_scheduler())
    document = found.document
    assert document["num_trajectories"] == 5
    assert document["manifest"]["seed"] == calibration.manifest["seed"]
    assert document["size_bytes"] == sum(map(len, contents(tmp_path / "set").values()))


def test_calibrate_takes_prompts_of_a_file_and_of_the_pipelines_folder(capsys, folder, tmp_path):
    flags = ("--num_trajectories", "4", "--num_inference_steps", "2", *SD)
    trial = answer(capsys, "calibrate", folder / "sd", "--prompts_file", folder / "prompts.txt", *flags, "--dry_run")
    assert "4 trajectories of 2 steps of the unet would be recorded, with 8 prompts" in trial.out
    shutil.copytree(folder / "sd", tmp_path / "sd")
    shutil.copy(folder / "prompts.txt", tmp_path / "sd" / "prompts.txt")
    found = answer(capsys, "calibrate", tmp_path / "sd", *flags, "-o", tmp_path / "set")
    assert found.code == 0, found.err
    assert f"4 trajectories of 2 steps in {tmp_path / 'set'}" in found.out
    assert CalibrationSet.load(tmp_path / "set").num_inference_steps == 2


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("sd", (), "what is it called with? Give prompts_file or dataset_name"),
        ("small", (), "expected a pipeline in full precision, got one whose unet is quantized."),
        ("float", ("--prompts_file", "nowhere"), "prompts_file: there is no file 'nowhere'."),
        ("nowhere", (), "no such folder, and not to be had from the Hub"),
    ],
)
def test_what_cannot_be_recorded_is_refused(capsys, folder, tmp_path, model, flags, message):
    steps = ("--num_trajectories", "4", "--num_inference_steps", "2")
    found = answer(capsys, "calibrate", folder / model, *flags, *steps, "-o", tmp_path / "set", *SMALL)
    assert (found.code, found.out) == (1, "")
    assert message in found.reason
    assert not (tmp_path / "set").exists()


def test_calibrate_refuses_a_folder_that_holds_something(capsys, folder, tmp_path):
    (tmp_path / "mine").write_text("mine")
    found = answer(capsys, "calibrate", folder / "float", "-o", tmp_path)
    assert found.code == 1
    assert "output_dir: expected a folder that is new or empty" in found.reason


# compress


@pytest.fixture(scope="module")
def recorded(folder, tmp_path_factory) -> Path:
    """A set that `pqcad calibrate` recorded for the preset "smoke"."""
    path = tmp_path_factory.mktemp("sets") / "set"
    flags = ("--num_trajectories", "8", "--num_inference_steps", "4", "-o", str(path), *SMALL)
    assert main(["calibrate", str(folder / "float"), *flags]) == 0
    return path


def test_compress_starts_from_a_set_that_calibrate_recorded(capsys, folder, recorded, tmp_path, monkeypatch):
    module: Any = importlib.import_module("diffusers_pqcad.publishing.compress")
    learned = []

    def quantized_model(site: Any, key: str, teacher: Any, calibration: CalibrationSet, *others: Any) -> Any:
        learned.append(calibration.identity())
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "quantized_model", quantized_model)
    monkeypatch.setattr(module, "record", pytest.fail)
    flags = ("compress", folder / "float", *SMOKE, "--calibration_set", recorded, "-o", tmp_path / "out")
    assert answer(capsys, *flags).code == 130
    assert learned == [CalibrationSet.load(recorded).identity()]
    assert not (tmp_path / "out" / "state" / "calibration").exists()
    recipe = (tmp_path / "out" / "recipe.yaml").read_text()
    assert str(recorded) not in recipe
    assert f"read from {recorded}: 8 trajectories of 4 steps" in answer(capsys, *flags, "--dry_run").out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_inference_steps", "8"), "num_inference_steps 4 there, 8 here"),
        (("--num_trajectories", "6"), "num_trajectories 8 there, 6 here"),
        (("--seed", "1000042"), "was recorded with the noise of seed 1000042"),
        (("--calibration_set", "nowhere"), "expected a folder that `pqcad calibrate` wrote, got nowhere: not found."),
        (("--calibration_set", "tests"), "calibration_set: tests: "),
    ],
)
def test_a_set_of_another_run_is_refused_before_anything_is_written(
    capsys, folder, recorded, tmp_path, flags, message
):
    output = tmp_path / "out"
    found = answer(capsys, "compress", folder / "float", *SMOKE, "--calibration_set", recorded, "-o", output, *flags)
    assert found.code == 1
    assert message in found.reason
    assert not output.exists()


def test_a_set_of_another_model_is_refused(capsys, folder, recorded, tmp_path):
    pipeline = DDIMPipeline(build_tiny_unet(), build_tiny_scheduler())
    pipeline.unet.conv_out.bias.data += 1
    pipeline.save_pretrained(tmp_path / "other")
    flags = (*SMOKE, "--calibration_set", recorded, "-o", tmp_path / "out")
    found = answer(capsys, "compress", tmp_path / "other", *flags)
    assert found.code == 1
    assert "this calibration set was recorded with another model" in found.reason


class MadeFor(list):
    """What a set of four trajectories says that it was recorded with."""

    asked_steps = 4

    def __init__(self, call_arguments: str) -> None:
        super().__init__(range(4))
        self.manifest = {"call_arguments": call_arguments}

    def inputs(self) -> list[str]:
        return ["{}"] * 4


def test_what_a_set_was_called_with_is_that_of_the_run():
    run = CompressConfig(guidance_scale=7.5, height=16, num_inference_steps=4, num_trajectories=4)
    there = {"guidance_scale": 3.0, "height": 16, "width": 8}
    made_for = MadeFor(json.dumps(there))
    assert differences(made_for, run, []) == {"guidance_scale": (3.0, 7.5), "width": (8, "the pipeline's own")}
    made_for.manifest = {"call_arguments": json.dumps({"guidance_scale": 7.5, "height": 16})}
    assert differences(made_for, run, []) == {}
    assert list(differences(made_for, run, ["a cat", "a dog", "a fig", "a bus"])) == ["inputs"]
    made_for.manifest = {}
    assert list(differences(made_for, run, [])) == ["call_arguments"]


def test_compress_is_the_librarys_with_the_scripts_settings(capsys, folder, tmp_path, monkeypatch):
    """A run that Ctrl-C stops in the middle goes on by the same command, and ends as an uninterrupted one."""
    module: Any = importlib.import_module("diffusers_pqcad.publishing.compress")
    measured = module.measured_rows

    def stop(*arguments: Any) -> Any:
        raise KeyboardInterrupt

    output = tmp_path / "out"
    flags = ("compress", folder / "float", "-o", output, *SMOKE, "--json")
    monkeypatch.setattr(module, "measured_rows", stop)
    found = answer(capsys, *flags)
    assert (found.code, found.out) == (130, "")
    assert f"What is finished is kept in {output}. To go on: pqcad compress {folder / 'float'} -o" in found.reason
    for shown in ("PQ, stage 2 of 2: 100%", "CAD to 2 steps: 100%", "bits=4.00, error=", "first="):  # the bars
        assert shown in found.err, shown
    student = (output / "state" / "pq_cad.safetensors").read_bytes()

    monkeypatch.setattr(module, "measured_rows", measured)
    found = answer(capsys, *flags)
    assert found.code == 0, found.err
    assert (output / "state" / "pq_cad.safetensors").read_bytes() == student
    assert found.document == json.loads((output / "metrics.json").read_text())
    assert "== saving" in found.err  # the library's headings
    assert "== measuring, row 1 of " in found.err
    found = answer(capsys, *flags[:-1])
    assert "| PQ + CAD | " in found.out
    assert f"Publish it: pqcad push {output} user/name" in found.out
    assert "Size of the unet: " in found.out
    check_evaluate_and_push(capsys, folder / "float", output)


def check_evaluate_and_push(capsys: pytest.CaptureFixture[str], teacher: Path, student: Path) -> None:
    """The student's folder is measured in its own steps, and published with its card."""
    flags = ("--reference", teacher, "--num_images", "2", "--num_inference_steps", "4", "--num_latency_rounds", "1")
    flags = (*flags, "--no_measure_memory")
    rows = answer(capsys, "evaluate", student, *flags, *SMALL, "--json").document["rows"]
    assert [row["num_inference_steps"] for row in rows] == [4, 2]
    found = answer(capsys, "push", student, "me/student", "--dry_run", "--json").document
    assert {"README.md", "metrics.json", "unet/config.json"} <= set(found["files"])
    assert not any(name.startswith("state/") for name in found["files"])


def test_compress_says_what_it_would_do(capsys, folder, tmp_path):
    flags = ("-o", tmp_path / "out", "--preset", "smoke", "--num_halvings", "2", "--ablations", "--dry_run")
    flags = (*flags, "--measure_time", "False", "--max_memory", "1GB")
    found = answer(capsys, "compress", folder / "float", *flags, "--json")
    assert (found.code, (tmp_path / "out").exists()) == (0, False)
    assert found.document["student_steps"] == [2, 1]
    assert len(found.document["arms"]) == 4
    assert set(found.document["components"]) == {"unet"}
    assert found.document["settings"]["num_trajectories"] == 8
    text = answer(capsys, "compress", folder / "float", *flags).out
    assert "recording, 8 trajectories of 4 steps" in text
    assert "stays: by default: conv_in, " in text
    assert "To stay within 1GB where it trains: no further flag is needed." in text
    assert "Nothing was written." in text
    stages = {stage["key"]: stage for stage in found.document["stages"]}
    assert list(stages)[:3] == ["recording", "pq", "pq_cad_2"]
    assert stages["pq_cad"]["updates"] == 4
    assert [stage["is_exact"] for stage in stages.values()].count(False) == 2  # PQ, and PQ without momentum
    assert all(stage["seconds"] is None and stage["peak_bytes"]["cpu"] > 0 for stage in stages.values())
    assert found.document["flags_for_memory"] == {}


def test_a_plan_loads_no_weights(capsys, folder, tmp_path):
    """A file of which nothing but its header is there is enough."""
    copy = shutil.copytree(folder / "float", tmp_path / "headers")
    (file,) = (copy / "unet").glob("*.safetensors")
    size = file.stat().st_size
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    file.write_bytes(file.read_bytes()[:header] + bytes(size - header))
    flags = ("-o", tmp_path / "out", "--preset", "smoke", "--measure_time", "False", "--dry_run", "--json")
    whole, found = (answer(capsys, "compress", path, *flags).document for path in (folder / "float", copy))
    assert found["stages"] == whole["stages"]
    assert found["components"] == whole["components"]
    refused = answer(capsys, "compress", copy, *flags, "--max_memory", "much")
    assert "max_memory: expected a number with its unit" in refused.reason


# evaluate


def test_evaluate_measures_a_row_of_each_and_goes_on_where_it_was(capsys, folder, tmp_path, monkeypatch):
    module: Any = importlib.import_module("diffusers_pqcad.cli.evaluate")
    row_of, asked = module.row_of, []

    def stop_at_second(key: str, *arguments: Any) -> Any:
        asked.append(key)
        if asked == ["reference", "pipeline"]:
            raise KeyboardInterrupt
        return row_of(key, *arguments)

    monkeypatch.setattr(module, "row_of", stop_at_second)
    output = tmp_path / "out"
    flags = ("evaluate", folder / "small", "--reference", folder / "float", "--num_images", "3", "-o", output)
    flags = (*flags, "--num_inference_steps", "2", "--num_latency_rounds", "1", "--no_measure_memory", *SMALL)
    found = answer(capsys, *flags)
    assert found.code == 130
    assert f"Rows that were finished are in {output}. To go on:" in found.reason
    found = answer(capsys, *flags, "--json")
    assert found.code == 0, found.err
    assert asked == ["reference", "pipeline", "pipeline"]
    assert found.document == json.loads((output / "metrics.json").read_text())
    reference, row = found.document["rows"]
    assert (reference["name"], reference["sqnr_db"], row["name"]) == ("float", "inf", "small")
    assert row["average_bits"] <= 4
    assert row["sqnr_db"] < 60
    assert row["size_bytes"] == sum(map(len, contents(folder / "small" / "unet").values()))
    text = answer(capsys, *flags).out
    assert "| small | " in text
    assert "- n = 3 images, seed 42." in text
    assert "Memory while sampling was not measured." in text
    other = answer(capsys, *flags, "--seed", "1")
    assert other.code == 1
    assert "holds another evaluation" in other.reason


def test_evaluate_says_what_it_would_do(capsys, folder):
    flags = ("--reference", folder / "sd", "--prompts_file", folder / "prompts.txt", "--num_images", "5")
    found = answer(capsys, "evaluate", folder / "sd", *flags, "--dry_run", "--json")
    assert found.document["num_prompts"] == 8
    assert found.document["num_images"] == 5
    assert "Nothing was written." in answer(capsys, "evaluate", folder / "sd", *flags, "--dry_run").out
    found = answer(capsys, "evaluate", folder / "nowhere", "--reference", folder / "sd", "--dry_run")
    assert found.code == 1


def test_the_prompts_of_a_file_are_measured_from_its_first_line(folder):
    """`compress` records the first ones; here there is nothing to record."""
    from diffusers_pqcad.cli.calling import inputs_of

    run = CompressConfig(prompts_file=str(folder / "prompts.txt"), negative_prompt="dull")
    assert inputs_of(run) == [{"prompt": prompt, "negative_prompt": "dull"} for prompt in PROMPTS]
    assert inputs_of(CompressConfig(class_labels=[3, 1])) == [{"class_labels": 3}, {"class_labels": 1}]
    assert inputs_of(CompressConfig()) is None


# push


def test_push_says_what_would_leave_and_sends_nothing(capsys, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(pushing, "push", pytest.fail)
    shutil.copytree(folder / "small", tmp_path / "small")
    (tmp_path / "small" / ".env").write_text("HF_TOKEN=secret")
    (tmp_path / "small" / "state").mkdir()
    (tmp_path / "small" / "state" / "config.json").write_text("{}")
    found = answer(capsys, "push", tmp_path / "small", "me/small", "--dry_run", "--json").document
    assert set(found["files"]) == set(contents(folder / "small"))
    assert found["num_bytes"] == sum(map(len, contents(folder / "small").values()))
    text = answer(capsys, "push", tmp_path / "small", "me/small", "--dry_run").out
    assert f"{len(found['files'])} files, {found['num_bytes']} bytes, would go to me/small. Nothing was sent." in text


def test_push_without_access_says_what_to_do(capsys, folder, monkeypatch):
    def fail(self: object) -> None:
        raise OSError("401 Unauthorized")

    monkeypatch.setattr("huggingface_hub.HfApi.whoami", fail)
    found = answer(capsys, "push", folder / "small", "me/small")
    assert found.code == 1
    assert "401 Unauthorized" in found.reason
    assert "hf auth login" in found.reason


def test_push_writes_the_card_of_a_run_and_keeps_what_was_written_in_it(capsys, folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "small", tmp_path / "small")
    metrics = json.loads(Path("examples/results/fashion-mnist-w4a8/metrics.json").read_text())
    (tmp_path / "small" / "metrics.json").write_text(json.dumps(metrics))
    (tmp_path / "small" / "README.md").write_text(f"---\na: b\n---\n{START}\nold figures\n{END}\nMy own words.\n")
    monkeypatch.setattr(pushing, "check_access", lambda: None)
    monkeypatch.setattr(pushing, "card_on_hub", lambda repo: None)
    monkeypatch.setattr(pushing, "push", lambda folder, repo, private: f"https://hub/{repo}?{private}")
    flags = ("--hub_private_repo", "--license", "mit", "--json")
    found = answer(capsys, "push", tmp_path / "small", "me/small", *flags)
    assert found.document["url"] == "https://hub/me/small?True"
    card = (tmp_path / "small" / "README.md").read_text()
    assert "My own words." in card
    assert "old figures" not in card
    assert "license: mit" in card
    assert 'from_pretrained("me/small")' in card


def test_push_puts_what_was_measured_into_the_card(capsys, folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "small", tmp_path / "small")
    flags = ("--num_images", "2", "--num_inference_steps", "2", "--num_latency_rounds", "1", *SMALL)
    measured = ("evaluate", tmp_path / "small", "--reference", folder / "float", "-o", tmp_path / "figures")
    assert answer(capsys, *measured, *flags).code == 0
    monkeypatch.setattr(pushing, "check_access", lambda: None)
    monkeypatch.setattr(pushing, "card_on_hub", lambda repo: "My own words.\n")
    monkeypatch.setattr(pushing, "push", lambda folder, repo, private: "https://hub")
    for more in (("--evaluation", tmp_path / "figures"), ()):  # the figures stay
        found = answer(capsys, "push", tmp_path / "small", "me/small", *more, "--json")
        assert {"README.md", "quantization.json"} <= set(found.document["files"])
        card = (tmp_path / "small" / "README.md").read_text()
        assert "- n = 2 images, seed 42." in card
        for row in json.loads((tmp_path / "figures" / "metrics.json").read_text())["memory"]:
            assert f"| {row['name']} | {row['size_bytes'] / 1e6:.2f} | {in_memory(row)} |" in card
            assert row["peak_bytes"] > row["before_bytes"] > 0
        assert card.count("My own words.") == 1
        assert "model-index:" in card
    again = answer(capsys, *measured, *flags, "--no_measure_memory", "--json")  # its rows are there
    assert again.document["memory"] is None
    of_packed = ("evaluate", tmp_path / "small", "--reference", folder / "small")  # memory is set against floats
    assert answer(capsys, *of_packed, *flags, "--json").document["memory"] is None
    wrong = answer(capsys, "push", tmp_path / "small", "me/small", "--evaluation", tmp_path)
    assert wrong.code == 1
    assert "evaluation: expected the output folder" in wrong.reason


def test_push_refuses_a_folder_that_is_no_pipeline(capsys, tmp_path):
    found = answer(capsys, "push", tmp_path, "me/small")
    assert found.code == 1
    assert "expected the folder of a pipeline, with model_index.json" in found.reason


def test_loading_says_which_pipeline_cannot_be_loaded(capsys, folder, tmp_path):
    shutil.copytree(folder / "float", tmp_path / "broken")
    (tmp_path / "broken" / "unet" / "config.json").unlink()
    found = answer(capsys, "evaluate", folder / "small", "--reference", tmp_path / "broken")
    assert found.code == 1
    assert found.reason.startswith("pqcad evaluate: reference: ")
    assert "cannot be loaded" in found.reason
    assert load_file(folder / "small" / "unet" / "diffusion_pytorch_model.safetensors")
