"""Specification of `pqcad inspect`: the layers of a saved model, before and after quantizing, without its weights."""

import importlib
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from command_line import answer
from diffusers import DDIMPipeline, DiffusionPipeline
from pipelines import PIPELINES

from diffusers_pqcad import PQCADConfig, inspect, quantize_

module = importlib.import_module("diffusers_pqcad.cli.inspect")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The same pipeline in floating point and quantized, its text encoder too."""
    folder = tmp_path_factory.mktemp("inspected")
    pipeline = PIPELINES["sd"].build()
    pipeline.save_pretrained(folder / "float")
    quantize_(pipeline.unet, PQCADConfig(weight_bits=4))
    quantize_(pipeline.text_encoder, PQCADConfig(method="fixed", weight_bits=6, group_size=4))
    pipeline.save_pretrained(folder / "quantized")
    return folder


def as_json(value):
    """What becomes of a value in a JSON document."""
    return list(value) if isinstance(value, tuple) else value


def test_a_quantized_model_has_the_table_of_the_loaded_one(capsys, folder):
    found = answer(capsys, "inspect", folder / "quantized", "--json")
    assert found.code == 0, found.err
    document = found.document
    assert document["is_quantized"]
    assert set(document["components"]) == {"unet", "text_encoder"}
    pipeline = DiffusionPipeline.from_pretrained(folder / "quantized")
    for name, component in document["components"].items():
        loaded = inspect(getattr(pipeline, name))
        rows = [{key: as_json(value) for key, value in asdict(layer).items()} for layer in loaded]
        for row in rows:
            row["perturbation"] = None  # known where it was packed
        assert component["layers"] == rows
        assert component["average_bits"] == loaded.coverage.average_bits()[0]
        assert component["packed_share"] == loaded.coverage.share(loaded.coverage.packed)
    assert document["components"]["text_encoder"]["quantization_config"]["group_size"] == 4


def test_the_text_is_a_table_with_its_totals(capsys, folder):
    found = answer(capsys, "inspect", folder / "quantized")
    assert found.out.startswith("text_encoder: CLIPTextModel, ") or "\ntext_encoder: CLIPTextModel, " in found.out
    assert "unet: UNet2DConditionModel, " in found.out
    assert "layers packed, " in found.out
    assert "In floating point, as they are: vae." in found.out


def test_before_quantizing_it_says_what_would_be_done(capsys, folder):
    found = answer(capsys, "inspect", folder / "float", "--weight_bits", "4", "--json")
    assert not found.document["is_quantized"]
    (unet,) = found.document["components"].values()
    loaded = DiffusionPipeline.from_pretrained(folder / "quantized").unet.config.quantization_config
    would = [layer["name"] for layer in unet["layers"] if layer["kernel"] is not None]
    assert sorted(would) == sorted(loaded.weight_bits_by_module)
    assert {layer["becomes"] for layer in unet["layers"] if layer["name"] in would} == {"4 on average"}
    text = answer(capsys, "inspect", folder / "float", "--modules_to_not_convert", "attn2").out
    assert "stays: modules_to_not_convert" in text
    assert "stays: by its kind of model" in text  # the shortcuts at the output
    assert "Nothing was quantized: this is what `pqcad quantize` would do" in text


def test_no_weights_are_read(capsys, folder, tmp_path, monkeypatch):
    """Neither by diffusers nor by safetensors."""
    shutil.copytree(folder / "quantized", tmp_path / "copy")
    expected = answer(capsys, "inspect", folder / "quantized").out

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", refuse)
    assert answer(capsys, "inspect", tmp_path / "copy").out == expected


@pytest.mark.parametrize("which", ["float", "quantized"])
def test_a_model_of_its_own_is_inspected_too(capsys, folder, which):
    found = answer(capsys, "inspect", folder / which / "unet", "--json")
    assert list(found.document["components"]) == ["unet"]
    assert found.document["is_quantized"] is (which == "quantized")


def test_an_unconditional_pipeline(capsys, tiny_pipeline: DDIMPipeline, tmp_path):
    tiny_pipeline.save_pretrained(tmp_path)
    assert answer(capsys, "inspect", tmp_path, "--method", "fixed", "--weight_bits", "2").code == 0


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", "expected the folder of a pipeline (model_index.json) or of a model (config.json), got neither."),
        ("file", "expected a folder or a repository of the Hub, got a file."),
    ],
)
def test_what_is_no_model_is_refused(capsys, tmp_path, path, message):
    (tmp_path / "file").write_text("x")
    found = answer(capsys, "inspect", tmp_path / path)
    assert found.code == 1
    assert message in found.reason


def test_a_model_without_safetensors_is_refused(capsys, folder, tmp_path):
    shutil.copytree(folder / "float", tmp_path / "copy")
    for file in (tmp_path / "copy").rglob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    found = answer(capsys, "inspect", tmp_path / "copy")
    assert found.code == 1
    assert "expected weights in .safetensors files" in found.reason


def test_no_network_is_a_reason(capsys, monkeypatch):
    def fail(*arguments: object, **options: object) -> None:
        raise OSError("the Hub does not answer")

    monkeypatch.setattr("diffusers_pqcad.cli.saved_source.snapshot_download", fail)
    found = answer(capsys, "inspect", "user/name")
    assert found.code == 1
    assert "user/name: no such folder, and not to be had from the Hub: the Hub does not answer." in found.reason
