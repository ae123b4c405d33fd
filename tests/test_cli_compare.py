"""Specification of `pqcad compare`: from two folders to a report that a browser opens."""

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from browser import dom_of
from command_line import answer
from conftest import build_tiny_scheduler, build_tiny_unet
from diffusers import DDIMPipeline
from pipelines import PIPELINES, PROMPTS

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.cli.sides import names_of, side_of

FLAGS = ("--num_inference_steps", "2", "--num_latency_rounds", "1", "--num_threads", "1")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A text-to-image pipeline, the same quantized, and prompts, of which one is none of HTML's friends."""
    folder = tmp_path_factory.mktemp("pipelines")
    pipeline = PIPELINES["sd"].build()
    pipeline.save_pretrained(folder / "float")
    quantize_(pipeline.unet, PQCADConfig(weight_bits=3))
    pipeline.save_pretrained(folder / "small")
    (folder / "prompts.txt").write_text("\n".join(["<b>red</b> & blue", *PROMPTS]) + "\n")
    return folder


def test_a_report_of_two_folders_that_a_browser_opens(capsys, folder, tmp_path):
    output = tmp_path / "new" / "report.html"
    flags = (*FLAGS, "--prompts_file", folder / "prompts.txt", "--num_images", "3", "--guidance_scale", "5")
    size = ("--height", "16", "--width", "16")
    found = answer(capsys, "compare", folder / "float", folder / "small", *flags, *size, "-o", output, "--json")
    assert found.code == 0, found.err
    document = found.document
    assert sorted(path.name for path in output.parent.iterdir()) == ["report.html", "report.png"]
    assert (document["output"], document["picture"]) == (str(output), str(output.with_suffix(".png")))
    assert [image["inputs"] for image in document["images"]] == [
        {"prompt": prompt} for prompt in ("<b>red</b> & blue", *PROMPTS[:2])
    ]
    assert (document["a"]["model_evaluations"], document["b"]["model_evaluations"]) == (4, 4)
    size_of_small = sum(path.stat().st_size for path in (folder / "small" / "unet").iterdir())
    assert document["b"]["size_bytes"] == size_of_small
    dom = dom_of(output, "position=10")
    assert 'data-script="ran"' in dom
    assert dom.count("clip-path: inset(0px 0px 0px 10%)") == 3
    assert "&lt;b&gt;red&lt;/b&gt; &amp; blue" in dom
    worst = min(document["images"], key=lambda image: image["sqnr_db"])
    assert re.findall(r'<figure id="image-(\d+)">', dom)[0] == str(worst["index"])
    assert f"SQNR {worst['sqnr_db']:.2f} dB" in dom


@pytest.fixture(scope="module")
def pixels(tmp_path_factory) -> Path:
    """An unconditional pipeline, and a student of two steps."""
    folder = tmp_path_factory.mktemp("pixels")
    DDIMPipeline(build_tiny_unet(), build_tiny_scheduler()).save_pretrained(folder / "float")
    small = quantize_(build_tiny_unet(), PQCADConfig(weight_bits=4, num_inference_steps=2))
    DDIMPipeline(small, build_tiny_scheduler()).save_pretrained(folder / "student")
    return folder


def test_ctrl_c_keeps_what_is_made_and_the_same_command_goes_on(capsys, pixels, tmp_path, monkeypatch):
    module: Any = importlib.import_module("diffusers_pqcad.evaluation.comparison")
    sampled, made = module.sampled, []

    def stop_at_second(*arguments: Any, **options: Any) -> Any:
        made.append(options["description"])
        if len(made) == 2:
            raise KeyboardInterrupt
        return sampled(*arguments, **options)

    monkeypatch.setattr(module, "sampled", stop_at_second)
    flags = ("compare", pixels / "float", pixels / "student", "--num_images", "2", "-o", tmp_path / "r.html")
    steps = ("--num_inference_steps", "4", *FLAGS[2:])
    found = answer(capsys, *flags, *steps)
    assert found.code == 130
    assert (
        f"The images that were finished are in {tmp_path / 'r.html.partial'}. To go on: pqcad compare" in found.reason
    )
    found = answer(capsys, *flags, *steps)
    assert found.code == 0, found.err
    assert made == ["A: float", "B: student", "B: student"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.png"]
    assert "2 images, seed 42. Median of B to A: SQNR" in found.out
    assert "Model evaluations: 4 and 2." in found.out  # a student takes its own steps
    assert f"Open {tmp_path / 'r.html'} in a browser" in found.out


def test_it_says_what_it_would_do(capsys, folder, tmp_path):
    flags = ("--prompts_file", folder / "prompts.txt", "-o", tmp_path / "r.html", "--dry_run")
    found = answer(capsys, "compare", folder / "float", folder / "small", *flags, "--json")
    assert found.document["num_prompts"] == 9
    assert found.document["num_images"] == 8
    assert not list(tmp_path.iterdir())
    assert "Nothing was written." in answer(capsys, "compare", folder / "float", folder / "small", *flags).out


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [("nowhere", "student", "compare: A: "), ("student", "nowhere", "compare: B: ")],
)
def test_a_pipeline_that_is_not_there_is_named(capsys, pixels, tmp_path, a, b, message):
    found = answer(capsys, "compare", pixels / a, pixels / b, "-o", tmp_path / "r.html", *FLAGS)
    assert found.code == 1
    assert message in found.reason
    assert "nowhere': no such folder, and not to be had from the Hub" in found.reason
    assert not list(tmp_path.iterdir())


def test_how_each_side_is_called(pixels):
    student = DDIMPipeline.from_pretrained(pixels / "student")
    folder = str(pixels / "student")
    side = side_of(student, folder, "it", None, 20)
    assert (side.num_inference_steps, side.arguments, side.weights_path) == (2, {}, pixels / "student" / "unet")
    assert side_of(student, folder, "it", 7, 20).num_inference_steps == 7
    student.unet.config.quantization_config.guidance_folded = True
    assert side_of(student, "user/name", "it", None, 20).arguments == {"guidance_scale": 1}
    assert side_of(DDIMPipeline.from_pretrained(pixels / "float"), "x", "it", None, 20).num_inference_steps == 20


def test_sides_of_one_name_are_told_apart_by_their_paths(tmp_path):
    for name in ("one/unet", "two/unet", "three"):
        (tmp_path / name).mkdir(parents=True)
    one, two, three = (str(tmp_path / name) for name in ("one/unet", "two/unet", "three"))
    assert names_of(one, two) == (one, two)
    assert names_of(one, three) == ("unet", "three")
    assert names_of("user/name", three) == ("user/name", "three")
