"""Specification of `examples/demo.py`: what a click in a real browser shows, and what is refused before it."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import opened
from conftest import build_tiny_scheduler, build_tiny_unet
from diffusers import DDIMPipeline
from PIL import Image
from pipelines import PIPELINES

from diffusers_pqcad import PQCADConfig, quantize_

ROOT = Path(__file__).parents[1]
# Python runs this first: it notes the hosts, but for this computer, that the demo looks up or connects to.
GUARD = """
import sys

def note(event, arguments):
    if event not in ("socket.getaddrinfo", "socket.connect"):
        return
    host = arguments[0] if event == "socket.getaddrinfo" else arguments[1]
    host = host[0] if isinstance(host, tuple) else host
    if host not in ("127.0.0.1", "localhost"):
        with open({path!r}, "a") as file:
            print(event, host, file=file)

sys.addaudithook(note)
"""


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The address of the demo as it is first typed, but for fewer steps; and the file of the hosts that it asked."""
    hosts = tmp_path / "hosts"
    (tmp_path / "sitecustomize.py").write_text(GUARD.format(path=str(hosts)))
    command = [sys.executable, ROOT / "examples" / "demo.py", "--num_inference_steps", "3", "--num_threads", "1"]
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert process.stdout is not None
        try:
            said = next((line for line in process.stdout if line.startswith("Open ")), "")
            found = re.fullmatch(r"Open (http://127\.0\.0\.1:\d+/) in a browser\. Ctrl-C ends it\.\n", said)
            assert found, (said, (tmp_path / "log").read_text())
            yield found[1], hosts
        finally:
            process.terminate()
            process.wait(timeout=60)


def pictures(page: Any, screenshot: Path) -> list[np.ndarray]:
    """The pixels (H, W, 3) of what a screenshot shows where the teacher's picture is, and where the student's."""
    boxes = [page.locator(f"#{role} img").bounding_box() for role in ("teacher", "student")]
    page.screenshot(path=screenshot, full_page=True)
    whole = Image.open(screenshot).convert("RGB")
    return [
        np.asarray(whole.crop((box["x"], box["y"], box["x"] + box["width"], box["y"] + box["height"]))).astype(float)
        for box in boxes
    ]


def figures(page: Any) -> dict[str, list[str]]:
    """The table's rows by name."""
    cells = [cell.strip() for cell in page.get_by_role("gridcell").all_inner_texts()]
    return {cells[row]: cells[row + 1 : row + 3] for row in range(0, len(cells), 3)}


def test_a_click_shows_two_pictures_and_what_they_took_and_nothing_leaves_the_computer(served, tmp_path):
    url, hosts = served
    with opened(url) as (page, asked):
        assert page.get_by_label("prompt").input_value() == "a monkey face on red"
        page.get_by_role("button", name="Make both").click()
        student = page.locator("#student img")
        student.wait_for(timeout=200_000)
        page.wait_for_function(
            "() => [...document.querySelectorAll('#teacher img, #student img')].every(i => i.complete)"
        )
        teacher_pixels, student_pixels = pictures(page, tmp_path / "first.png")
        for pixels in (teacher_pixels, student_pixels):
            assert min(pixels.shape[:2]) > 300
            assert pixels.std() > 20  # it shows something
            red, green, blue = np.median(pixels, axis=(0, 1))
            assert red > 100 + max(green, blue)  # what the prompt asks for
        difference = abs(teacher_pixels - student_pixels).mean()
        assert 0.2 < difference < 40, difference  # another picture, of the same thing
        table = figures(page)
        assert table["steps"] == ["3", "3"]
        assert all(float(seconds) > 0 for seconds in table["seconds"])
        weights = [float(value) for value in table["of it weights MB"]]
        assert weights[0] > 5 * weights[1] > 0
        memory = [float(value) for value in table["denoiser in memory MB"]]
        assert memory[0] == weights[0]
        assert memory[1] >= weights[1]

        first = student.get_attribute("src")
        page.get_by_label("seed").fill("1")
        page.get_by_role("button", name="Make both").click()
        page.wait_for_function(f"() => document.querySelector('#student img')?.src != {first!r}", timeout=200_000)
        assert [address for address in asked if not address.startswith((url, "data:", "blob:"))] == []
    assert not hosts.exists(), hosts.read_text()


# Without a browser


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import demo

    return demo


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folders of pixels, the second a student of two steps; one that takes a prompt, one that takes classes."""
    folder = tmp_path_factory.mktemp("pipelines")
    DDIMPipeline(build_tiny_unet(), build_tiny_scheduler()).save_pretrained(folder / "float")
    small = quantize_(build_tiny_unet(), PQCADConfig(weight_bits=3, num_inference_steps=2))
    DDIMPipeline(small, build_tiny_scheduler()).save_pretrained(folder / "student")
    for name in ("sd", "dit"):
        PIPELINES[name].build().save_pretrained(folder / name)
    return folder


def test_two_folders_each_in_its_own_steps(demo, folder):
    settings = demo.Settings(str(folder / "float"), str(folder / "student"), num_inference_steps=4)
    pair = demo.pair_of(settings)
    assert [side.name for side in pair.sides] == ["float", "student"]
    assert [side.num_inference_steps for side in pair.sides] == [4, 2]
    assert not pair.takes_prompt
    half, whole = demo.make_both(pair, "", 0, None, 4, 2)
    assert half[1] is None
    assert half[2][0] == ["steps", "4", ""]
    assert {picture.size for picture in whole[:2]} == {(384, 384)}
    assert whole[2][0] == ["steps", "4", "2"]
    again = list(demo.make_both(pair, "", 0, None, 4, 2))[-1]
    assert again[0].tobytes() == whole[0].tobytes()  # a seed says all
    other = list(demo.make_both(pair, "", 1, None, 4, 2))[-1]
    assert other[0].tobytes() != whole[0].tobytes()


def test_a_student_with_guidance_folded_in_is_called_without_a_scale(demo):
    called = {}

    class Pipeline(DDIMPipeline):
        def __call__(self, **arguments: Any) -> Any:
            called.update(arguments)
            return super().__call__(num_inference_steps=1)

    side = demo.Side("it", Pipeline(build_tiny_unet(), build_tiny_scheduler()), 5, {"guidance_scale": 1})
    demo.made(side, 5, 0, {"guidance_scale": 3.0, "prompt": "a cat"})
    assert (called["guidance_scale"], called["prompt"], called["num_inference_steps"]) == (1, "a cat", 5)


@pytest.mark.parametrize(
    ("teacher", "student", "message"),
    [
        ("sd", "float", "student: expected a pipeline that takes a prompt"),
        ("dit", None, "teacher: DiTPipeline needs class_labels"),
        ("float", "nowhere", "student: .*nowhere': no such folder"),
    ],
)
def test_what_the_page_cannot_call_is_refused_before_it_opens(demo, folder, teacher, student, message):
    settings = demo.Settings(str(folder / teacher), student and str(folder / student))
    with pytest.raises(ValueError, match=message):
        demo.pair_of(settings)


def test_an_empty_field_and_a_wrong_flag_are_named(demo, folder):
    pair = demo.pair_of(demo.Settings(str(folder / "float"), str(folder / "student")))
    with pytest.raises(ValueError, match="seed and steps: expected whole numbers, got an empty field"):
        next(demo.make_both(pair, "", None, None, 4, 2))
    with pytest.raises(ValueError, match="port: expected at least 1, got 0"):
        demo.Settings(port=0)
