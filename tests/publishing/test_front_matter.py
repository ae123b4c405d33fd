"""Specification of what the Hub is told of a pipeline: its task and the licence of its base, from what there is."""

import logging
from pathlib import Path
from types import SimpleNamespace

import diffusers
import pytest

from diffusers_pqcad.publishing import front_matter as module
from diffusers_pqcad.publishing.front_matter import base_model_of, license_of, task_of

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("DDIMPipeline", "unconditional-image-generation"),
        ("DiTPipeline", None),
        ("StableDiffusionPipeline", "text-to-image"),
        ("StableDiffusionImg2ImgPipeline", "image-to-image"),
        ("StableDiffusionInpaintPipeline", "image-to-image"),
        ("StableDiffusionControlNetPipeline", "text-to-image"),
        ("FluxPipeline", "text-to-image"),
        ("LDMSuperResolutionPipeline", "image-to-image"),
        ("WanPipeline", "text-to-video"),
        ("WanImageToVideoPipeline", "image-to-video"),
    ],
)
def test_the_task_of_a_pipeline_is_what_it_is_called_with(name: str, task: str | None) -> None:
    assert task_of(getattr(diffusers, name)) == task


def test_the_licence_is_read_from_the_card_of_a_folder(tmp_path: Path, caplog) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: its-own\ntags: [a]\n---\ntext\n")
    assert license_of(str(tmp_path)) == {"license": "other", "license_name": "its-own"}
    assert caplog.messages == []


@pytest.mark.parametrize("card", [None, "no front matter", "---\ntags: [a]\n---\n", "---\nlicense: [mit]\n---\n"])
def test_a_licence_that_no_card_names_is_not_guessed(tmp_path: Path, caplog, card: str | None) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    with caplog.at_level(logging.WARNING):
        assert license_of(str(tmp_path)) == {}
    assert "names none. Give --license" in caplog.text


def test_the_licence_of_a_repository_comes_from_the_hub_or_not_at_all(monkeypatch, caplog) -> None:
    card = SimpleNamespace(data=SimpleNamespace(to_dict=lambda: {"license": "mit"}))
    monkeypatch.setattr(module, "ModelCard", SimpleNamespace(load=lambda path, **_: card))
    assert license_of("someone/some-model") == {"license": "mit"}

    def fail(path: str, **others: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(module, "ModelCard", SimpleNamespace(load=fail))
    assert license_of("someone/some-model") == {}
    assert "the card of someone/some-model cannot be read (ConnectionError)" in caplog.text


def test_only_a_repository_is_a_base_model() -> None:
    assert base_model_of("someone/some-model", is_on_hub=True) == "someone/some-model"
    assert base_model_of("someone/some-model", is_on_hub=False) is None
    assert base_model_of("./models/teacher", is_on_hub=True) is None
