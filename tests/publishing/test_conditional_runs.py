"""The whole job for pipelines with prompts, through the script's `main`: files, table, card, going on after a kill."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DiffusionPipeline, PNDMScheduler
from PIL import Image
from pipelines import PIPELINES, PROMPTS, SD_BETAS, TOKENS
from safetensors.torch import load_file

from diffusers_pqcad.compression import distillation, progressive
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.layers.find import packed_layers

ROOT = Path(__file__).parents[2]
FILES = ("README.md", "prompts.txt", "metrics.json", "history.json", "recipe.yaml", "model_index.json")
LATENCY = {"median_ms", "min_ms", "max_ms", "rounds_ms"}
NUM_RECORDED = 6


class Killed(BaseException):
    """What nothing in the package catches."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text-to-image pipeline with a scheduler that is replaced, a flow-matching one, and prompts."""
    folder = tmp_path_factory.mktemp("teachers")
    sd = PIPELINES["sd"].build()
    sd.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SD_BETAS)
    sd.save_pretrained(folder / "sd")
    PIPELINES["sd3"].build().save_pretrained(folder / "sd3")
    (folder / "prompts.txt").write_text("\n".join((*PROMPTS[:-1], "snow | in `may`")) + "\n")
    return folder


def arguments(folder: Path, name: str, output: Path, *flags: str) -> list[str]:
    """Return a command line of a run with few layers, and little of everything."""
    settings = {
        "preset": "smoke", "pretrained_model_name_or_path": folder / name, "prompts_file": folder / "prompts.txt",
        "output_dir": output, "num_threads": 1, "guidance_scale": 5.0, "height": 16, "width": 16, "num_images": 3,
        "num_trajectories": NUM_RECORDED, "max_train_steps": 2, "evaluation_steps": 1, "reconstruction_iterations": 1,
    }  # fmt: skip
    of_kind = {
        "sd": ("--own_num_inference_steps", "3", "--negative_prompt", "dull", "--step_rate", "0.02"),
        "sd3": ("--max_sequence_length", str(TOKENS)),
    }
    left = {"sd": ("down_blocks", "up_blocks"), "sd3": ("transformer_blocks.1",)}
    given = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    return [*given, *of_kind[name], "--bit_choices", "8", "4", "--modules_to_not_convert", *left[name], *flags]


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        import distill
    return distill.main


@pytest.fixture(scope="module")
def finished(folder: Path, main: Callable[[list[str]], Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole run of the text-to-image pipeline."""
    output = tmp_path_factory.mktemp("runs") / "sd"
    main(arguments(folder, "sd", output))
    return output


def metrics_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "metrics.json").read_text())


def called_as_the_card_says(output: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, str]:
    """Return the pipeline and the image of the card's code, and its call."""
    code = (output / "README.md").read_text().split("```python\n")[1].split("\n```")[0]
    monkeypatch.chdir(output.parent)
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(code, names)
    assert np.asarray(names["image"]).shape == (16, 16, 3)
    return names["pipe"], code.splitlines()[-1]


def test_everything_is_in_the_folder(finished: Path) -> None:
    assert all((finished / name).stat().st_size for name in FILES)
    assert (finished / "prompts.txt").read_text() == "\n".join((*PROMPTS[:-1], "snow | in `may`")) + "\n"
    for name in ("samples", "bits", "curves"):
        assert (finished / "assets" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with Image.open(finished / "assets" / "samples.png") as grid:
        assert len(grid.convert("RGB").getcolors(2**24)) > 50
    for name in ("README.md", "metrics.json", "history.json", "recipe.yaml"):
        assert str(finished.parents[1]) not in (finished / name).read_text()
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert not {"prompts_file", "dataset_name", "prompt_column"} & recipe.keys()


def test_the_rows_are_those_of_a_pipeline_with_latents(finished: Path) -> None:
    metrics = metrics_of(finished)
    rows = {row["key"]: row for row in metrics["rows"]}
    assert list(rows) == ["float", "float_half", "as_you_run_it", "fixed", "pq", "pq_half", "pq_cad"]
    assert {key: row["num_inference_steps"] for key, row in rows.items()} == {
        "float": 4, "float_half": 2, "as_you_run_it": 3, "fixed": 4, "pq": 4, "pq_half": 2, "pq_cad": 2,
    }  # fmt: skip
    for key, row in rows.items():
        assert row["fidelity_of"] == "latents"
        assert set(row["latency_ms"]) == set(row["reference_latency_ms"]) == LATENCY
        assert (row["image_ssim"] == 1) == (key == "float")
    assert {key: row["model_evaluations"] for key, row in rows.items()} == {
        "float": 8, "float_half": 4, "as_you_run_it": 8, "fixed": 8, "pq": 8, "pq_half": 4, "pq_cad": 2,
    }  # fmt: skip
    assert rows["as_you_run_it"]["kernels"] == {}
    assert "PNDMScheduler" in rows["as_you_run_it"]["name"]
    assert metrics["inputs"] == {
        "kind": "prompt", "num_recorded": 6, "num_measured": 2, "num_shared": 0, "negative_prompt": "dull",
    }  # fmt: skip
    assert metrics["shown_inputs"] == ["night", "snow | in `may`", "night"]
    assert metrics["other_models"] == ["vae", "text_encoder"]
    student = DiffusionPipeline.from_pretrained(finished).unet
    packed = packed_layers(student)
    assert packed.keys() == metrics["pq"]["bits"].keys()
    assert not packed.keys() & set(metrics["float_layers"])
    assert {"conv_in", "down_blocks.0.resnets.0.conv1"} <= set(metrics["float_layers"])


def test_the_calibration_set_is_that_of_the_first_prompts(finished: Path) -> None:
    calibration = CalibrationSet.load(finished / "state" / "calibration")
    inputs = [json.loads(text) for text in calibration.inputs()]
    assert inputs == [{"prompt": prompt, "negative_prompt": "dull"} for prompt in PROMPTS[:NUM_RECORDED]]
    assert metrics_of(finished)["num_held_out"] == len(calibration.split()[1])


def test_the_card_says_what_was_done_and_its_code_runs(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (finished / "README.md").read_text()
    for text in (
        "pipeline_tag: text-to-image\n",
        "SQNR: of the final latents",
        "Inputs: 2 prompts, none of which the calibration set was recorded with; guidance_scale 5.0, height 16, "
        'width 16, negative prompt "dull".',
        'From left to right, prompts "night"; "snow \\| in \\`may\\`"; "night".',
        f"{metrics_of(finished)['rows'][2]['image_psnr_db']:.2f}",
        "--config recipe.yaml --prompts_file prompts.txt`",
        "by a DDIMScheduler in the place of its PNDMScheduler",
        "3. CAD: 2 updates, guidance folded into one branch, quantized teacher",
        "called with `guidance_scale=1`",
        "- Prompts: of a file.",
        "| PQ + CAD | ",
    ):
        assert text in card
    assert "base_model" not in card
    pipeline, call = called_as_the_card_says(finished, monkeypatch)
    assert call == ("image = pipe('night', num_inference_steps=2, guidance_scale=1, height=16, width=16).images[0]")
    assert packed_layers(pipeline.unet)
    assert isinstance(pipeline.scheduler, DDIMScheduler)  # the student's steps are of this one
    assert pipeline("night", height=16, width=16)
    assert len(pipeline.scheduler.timesteps) == 2  # and they follow by themselves


def test_killed_in_pq_and_in_cad_it_ends_with_the_same_bits(
    folder: Path, main: Callable[[list[str]], Any], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "killed"
    saves: list[str] = []

    def killed_after(module: Any, count: int) -> pytest.MonkeyPatch:
        save, patch = module.save_checkpoint, pytest.MonkeyPatch()

        def save_then_die(path: Path, state: dict[str, Any]) -> None:
            save(path, state)
            saves.append(Path(path).name)
            if len(saves) == count:
                raise Killed

        patch.setattr(module, "save_checkpoint", save_then_die)
        return patch

    for module, name in ((progressive, "pq"), (distillation, "pq_cad")):
        saves.clear()
        patch = killed_after(module, 1)
        with pytest.raises(Killed):
            main(arguments(folder, "sd", output))
        patch.undo()
        assert saves[0].startswith(name)
        assert not (output / "state" / "pq_cad.safetensors").exists()
        assert not (output / "model_index.json").exists()

    # Measuring takes most of the time, and changes nothing of what was trained.
    def stop(teacher: Any, run: Any, **keywords: Any) -> Any:
        assert run.prompts_file == str(output / "prompts.txt")  # not one that may change meanwhile
        raise Killed

    monkeypatch.setattr("diffusers_pqcad.publishing.compress.reference_samples", stop)
    copied = tmp_path / "copy.txt"
    copied.write_bytes((folder / "prompts.txt").read_bytes())  # the same prompts from another place
    with pytest.raises(Killed):
        main(arguments(folder, "sd", output, "--prompts_file", str(copied)))
    (folder / "sd" / "prompts.txt").write_bytes(copied.read_bytes())  # and from a place that is not named
    given = arguments(folder, "sd", output)
    place = given.index("--prompts_file")
    with pytest.raises(Killed):
        main(given[:place] + given[place + 2 :])
    (folder / "sd" / "prompts.txt").unlink()
    for name in ("pq", "pq_cad"):
        resumed, whole = (load_file(path / "state" / f"{name}.safetensors") for path in (output, finished))
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[key], whole[key]) for key in whole)
    logs = [json.loads((path / "state" / "pq_cad-log.json").read_text()) for path in (output, finished)]
    resumed_errors, errors = ([entry["held_out_error"] for entry in log] for log in logs)
    assert resumed_errors == errors
    assert len(set(errors)) == len(errors) > 1  # it trained
    assert (output / "state" / "calibration" / "data.arrow").read_bytes() == (
        finished / "state" / "calibration" / "data.arrow"
    ).read_bytes()


def test_other_prompts_are_refused(
    folder: Path, main: Callable[[list[str]], Any], finished: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    (tmp_path / "prompts.txt").write_text("something else\n")
    with pytest.raises(ValueError, match=r"^prompts_file: .*sd was begun with the prompts in .*sd/prompts\.txt"):
        main(arguments(folder, "sd", finished, "--prompts_file", str(tmp_path / "prompts.txt")))
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_flow_matching_pipeline_is_halved_twice(
    folder: Path, main: Callable[[list[str]], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "sd3"
    main(arguments(folder, "sd3", output, "--num_halvings", "2"))
    metrics = metrics_of(output)
    rows = {row["key"]: (row["num_inference_steps"], row["model_evaluations"]) for row in metrics["rows"]}
    assert rows == {
        "float": (4, 8), "float_half": (2, 4), "float_1": (1, 2), "fixed": (4, 8), "pq": (4, 8), "pq_half": (2, 4),
        "pq_1": (1, 2), "pq_cad_2": (2, 2), "pq_cad": (1, 1),
    }  # fmt: skip
    assert metrics["component"] == "transformer"
    assert metrics["cad"]["best_steps"].keys() == {"pq_cad_2", "pq_cad"}
    assert "2 updates in each of 2 halvings, guidance folded into one branch" in (output / "README.md").read_text()
    pipeline, call = called_as_the_card_says(output, monkeypatch)
    assert packed_layers(pipeline.transformer)
    assert "num_inference_steps=1, guidance_scale=1, height=16" in call
    assert len(pipeline.scheduler.timesteps) == 1
    recorded = CalibrationSet.load(output / "state" / "calibration").timestep
    torch.testing.assert_close(pipeline.scheduler.timesteps, recorded[::4], rtol=0, atol=1e-3)


def test_the_ablations_of_a_guided_pipeline_that_is_halved_twice(
    folder: Path, main: Callable[[list[str]], Any], tmp_path: Path
) -> None:
    """Each arm has its two students, one of the arms keeps both branches, and full precision has rows of its cost."""
    output = tmp_path / "ablations"
    flags = ("--ablations", "--num_halvings", "2", "--num_inference_steps", "8", "--max_train_steps", "1")
    flags += ("--float_steps", "1")
    main(arguments(folder, "sd3", output, *flags, "--num_images", "2", "--reconstruction_iterations", "0"))
    metrics = metrics_of(output)
    rows = {row["key"]: (row["num_inference_steps"], row["model_evaluations"]) for row in metrics["rows"]}
    assert {key: cost for key, cost in rows.items() if key.startswith("float")} == {
        "float": (8, 16), "float_half": (4, 8), "float_2": (2, 4), "float_unguided_2": (2, 2), "float_1": (1, 2),
    }  # fmt: skip
    arms = ("pq_cad", "cad_calibration_only", "cad_float_teacher", "cad_no_calibration")
    assert {key: cost for key, cost in rows.items() if "cad" in key} == {
        **{f"{arm}_4": (4, 4) for arm in arms}, **dict.fromkeys(arms, (2, 2)),
        "cad_guided_4": (4, 8), "cad_guided": (2, 4),
    }  # fmt: skip
    card = (output / "README.md").read_text()
    for name in ("CAD: both branches of guidance", "full precision, guidance off"):
        assert f"| {name}" in card


def test_a_run_that_keeps_both_branches_is_called_with_its_guidance(
    folder: Path, main: Callable[[list[str]], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prompts are those of a data set, which the card says."""
    output, data_set = tmp_path / "guided", tmp_path / "set"
    data_set.mkdir()
    (data_set / "train.jsonl").write_text("".join(json.dumps({"caption": prompt}) + "\n" for prompt in PROMPTS))
    given = arguments(folder, "sd3", output, "--fold_guidance", "False", "--num_halvings", "0")
    place = given.index("--prompts_file")
    main([*given[:place], "--dataset_name", str(data_set), "--prompt_column", "caption", *given[place + 2 :]])
    metrics = metrics_of(output)
    note = '- Prompts: a sample of the column "caption" of a data set in a folder.'
    assert note in (output / "README.md").read_text().splitlines()
    assert str(data_set) not in (output / "metrics.json").read_text()
    rows = {row["key"]: (row["num_inference_steps"], row["model_evaluations"]) for row in metrics["rows"]}
    assert rows == {"float": (4, 8), "fixed": (4, 8), "pq": (4, 8), "pq_cad": (4, 8)}
    pipeline, call = called_as_the_card_says(output, monkeypatch)
    assert "num_inference_steps=4, guidance_scale=5.0, height=16" in call
    assert not pipeline.transformer.config.quantization_config.guidance_folded
