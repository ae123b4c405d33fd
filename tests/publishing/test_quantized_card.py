"""Specification of the card of a quantized pipeline without a run: what its files say, and no figure beside that."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import yaml
from huggingface_hub.errors import EntryNotFoundError
from pipelines import PIPELINES

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.loading.saved import saved_models
from diffusers_pqcad.publishing.pipeline_push import (
    has_same_weights,
    is_generated,
    refresh_card,
    take_figures,
)
from diffusers_pqcad.publishing.quantized_card import (
    note_source,
    quantized_card,
    quantized_parts,
    shown_call,
    take_evaluation,
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A text-to-image pipeline, quantized by a budget."""
    folder = tmp_path_factory.mktemp("quantized") / "small"
    pipeline = PIPELINES["sd"].build()
    quantize_(pipeline.unet, PQCADConfig(weight_bits=4))
    pipeline.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return shutil.copytree(saved, tmp_path / "small")


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_the_figures_are_those_of_the_files(folder: Path) -> None:
    card = quantized_card(folder, repo="me/small")
    unet = saved_models(folder)["unet"]
    (row,) = [line.strip("| ").split(" | ") for line in card.splitlines() if line.startswith("| unet")]
    packed = [name for name in unet.tensors if name.endswith(".qweight")]
    layers = quantized_parts(folder)["unet"].layers
    assert row[:2] == ["unet", f"{len(packed)} of {len(layers)}"]
    assert row[4] == f"{unet.num_bytes / 1e6:.2f}"
    parameters = PIPELINES["sd"].build().unet.num_parameters()
    assert row[5:] == [f"{2 * parameters / 1e6:.2f}", f"{4 * parameters / 1e6:.2f}"]
    widths = re.search(r"by the width of their weights: (.*?)\. Activations: 8-bit dynamic\.", card)[1]
    assert sum(int(item.split(": ")[1]) for item in widths.split(", ")) == len(packed)
    assert "`conv_in`" in card  # which stays in floating point
    assert "As in the original, in floating point: `text_encoder`, `vae`." in card


def test_nothing_is_said_that_nobody_knows(folder: Path) -> None:
    card = quantized_card(folder, repo="me/small")
    assert front_matter(card) == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["pqcad", "quantized", "w4a8"],
    }
    assert "Neither its images nor its times and its memory were measured." in card
    assert "a pipeline that its files do not name" in card
    assert "nothing was trained" not in card
    assert not re.search(r"TODO|\$\{?\w|None|nan\b|SQNR|distill", card)


def test_what_was_noted_of_the_source_is_in_the_card(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text("---\nlicense: mit\n---\n")
    note_source(folder, str(tmp_path / "base"), made_by="pqcad quantize")
    card = quantized_card(folder, repo="me/small")
    assert front_matter(card)["license"] == "mit"
    assert "base_model" not in front_matter(card)  # a folder's name is somebody's on the Hub
    assert str(tmp_path) not in card + (folder / "quantization.json").read_text()
    assert "# base, its unet in W4A8\n" in card
    assert "by `pqcad quantize`, from its weights alone: nothing was trained." in card
    noted = json.loads((folder / "quantization.json").read_text())
    noted |= {"source": "someone/some-model", "source_from": "hub"}
    (folder / "quantization.json").write_text(json.dumps(noted))
    matter = front_matter(quantized_card(folder, repo="me/small", license_id="apache-2.0"))
    assert (matter["base_model"], matter["base_model_relation"]) == ("someone/some-model", "quantized")
    assert matter["license"] == "apache-2.0"


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("DDIMPipeline", "pipe().images[0]"),
        ("DiTPipeline", "pipe(class_labels=[0]).images[0]"),
        ("StableDiffusionPipeline", 'pipe("a photo of a cat").images[0]'),
        ("StableDiffusionImg2ImgPipeline", 'pipe("a photo of a cat", image=load_image("picture.png")).images[0]'),
        ("StableDiffusionControlNetPipeline", 'pipe("a photo of a cat", image=load_image("picture.png")).images[0]'),
        ("WanPipeline", 'pipe("a photo of a cat").frames[0]'),
    ],
)
def test_the_call_is_one_that_the_pipeline_takes(name: str, call: str) -> None:
    found = shown_call(getattr(diffusers, name), {})
    assert found.text == call
    assert bool(found.imports) == ("load_image" in call)


def test_a_student_is_called_as_it_was_distilled(tmp_path: Path) -> None:
    pipeline = PIPELINES["sd"].build()
    quantize_(pipeline.unet, PQCADConfig(weight_bits=4, num_inference_steps=7, guidance_folded=True))
    pipeline.save_pretrained(tmp_path)
    card = quantized_card(tmp_path, repo="me/small")
    assert 'image = pipe("a photo of a cat", num_inference_steps=7, guidance_scale=1).images[0]' in card
    code = card.split("```python\n")[1].split("```")[0].splitlines()
    assert code[0].startswith("import diffusers_pqcad")


# The figures of `pqcad evaluate`


def evaluation_of(folder: Path, place: Path, size_bytes: int) -> Path:
    """The folder of an evaluation whose last row is that of `folder`."""
    place.mkdir()
    metrics = json.loads(Path("examples/results/emoji-w4a8/metrics.json").read_text())
    rows = [metrics["rows"][0], metrics["rows"][-1] | {"size_bytes": size_bytes}]
    (place / "metrics.json").write_text(json.dumps({"rows": rows}))
    (place / "settings.json").write_text(json.dumps({"pretrained_model_name_or_path": str(folder)}))
    return place


def test_what_was_measured_is_in_the_card_and_its_model_index(folder: Path, tmp_path: Path) -> None:
    size = sum(file.stat().st_size for file in (folder / "unet").iterdir())
    evaluation = evaluation_of(folder, tmp_path / "evaluation", size)
    row = json.loads((evaluation / "metrics.json").read_text())["rows"][-1]
    take_evaluation(folder, evaluation)
    card = quantized_card(folder, repo="me/small")
    assert "n = 1000 images, seed 42" in card
    low, high = row["sqnr_interval_db"]
    assert f"{row['sqnr_db']:.2f} [{low:.2f}, {high:.2f}]" in card
    (index,) = front_matter(card)["model-index"]
    found = {metric["type"]: metric["value"] for metric in index["results"][0]["metrics"]}
    assert found["psnr"] == pytest.approx(row["image_psnr_db"], rel=1e-5)  # six digits are shown
    assert found["ssim"] == pytest.approx(row["image_ssim"], rel=1e-5)
    assert "were measured." not in card


def test_an_evaluation_of_something_else_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected the output folder of a finished `pqcad evaluate`"):
        take_evaluation(folder, tmp_path)
    other = evaluation_of(tmp_path, tmp_path / "other", 1)
    with pytest.raises(ValueError, match=f"is that of {tmp_path}, not of {folder}"):
        take_evaluation(folder, other)
    older = evaluation_of(folder, tmp_path / "older", 1)
    with pytest.raises(ValueError, match="when the denoiser had 1 bytes, and now it has"):
        take_evaluation(folder, older)
    assert not (folder / "quantization.json").exists()


# Of pushes


def test_a_refreshed_card_keeps_what_was_written_in_it(folder: Path) -> None:
    (folder / "README.md").write_text("My own words.\n")
    assert refresh_card(folder, "me/small", on_hub="---\ntags: [a]\n---\nWords on the Hub.\n")
    first = (folder / "README.md").read_text()
    assert first.endswith("My own words.\n")
    assert refresh_card(folder, "me/small")
    assert (folder / "README.md").read_text() == first
    (folder / "README.md").unlink()
    assert refresh_card(folder, "me/small", on_hub=first.replace("My own words.", "Words on the Hub."))
    assert (folder / "README.md").read_text() == first.replace("My own words.", "Words on the Hub.")


def test_a_pipeline_in_floating_point_gets_no_card(tmp_path: Path) -> None:
    PIPELINES["sd"].build().save_pretrained(tmp_path)
    assert not refresh_card(tmp_path, "me/float")
    assert not (tmp_path / "README.md").exists()
    with pytest.raises(ValueError, match="expected a pipeline with a quantized model, got one in floating point"):
        quantized_card(tmp_path, repo="me/float")


def test_figures_go_with_the_same_weights_and_no_others(saved: Path, folder: Path, tmp_path: Path) -> None:
    assert has_same_weights(saved, folder)
    for name in ("metrics.json", "assets/bits.png", "state/x.json"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(name)
    target = shutil.copytree(saved, tmp_path / "target")
    take_figures(folder, target)
    assert (target / "metrics.json").read_text() == "metrics.json"
    assert (target / "assets" / "bits.png").is_file()
    assert not (target / "state").exists()
    file = target / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\0" if file.read_bytes()[-1] else file.read_bytes()[:-1] + b"\1")
    assert not has_same_weights(saved, target)
    assert not has_same_weights(tmp_path, target)


@pytest.mark.parametrize("is_pipeline", [True, False])
def test_only_a_card_that_nobody_touched_is_a_generated_one(monkeypatch, is_pipeline: bool) -> None:
    from diffusers.utils import hub_utils

    def load(*arguments: object, **others: object) -> None:
        raise EntryNotFoundError("there is none")

    monkeypatch.setattr(hub_utils.ModelCard, "load", load)
    made = hub_utils.populate_model_card(hub_utils.load_or_create_model_card("me/new", is_pipeline=is_pipeline))
    assert is_generated(str(made))
    assert not is_generated(f"{made}\nMy own words.\n")
    assert not is_generated("My own words.\n")
