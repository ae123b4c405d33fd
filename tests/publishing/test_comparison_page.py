"""Specification of the report of a comparison, seen by a real browser: a slider, differences, figures, no network."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import dom_of, screenshot
from PIL import Image
from torch import Tensor

from diffusers_pqcad.evaluation.comparison import Comparison, ImagePair, Side
from diffusers_pqcad.evaluation.report import Cost, Fidelity, Speed
from diffusers_pqcad.evaluation.speed import Latency
from diffusers_pqcad.loading.inspection import LayerInfo
from diffusers_pqcad.publishing.comparison_page import (
    amplification,
    comparison_page,
    data_uri,
    difference,
    save_comparison,
)

RED, BLUE = (230, 0, 0), (0, 0, 230)
EVIL = '<script>document.title = "broken"</script> & "quotes" $notes'


def plain(colour: tuple[int, int, int], count: int, size: int = 160) -> Tensor:
    return torch.tensor(colour, dtype=torch.uint8).view(1, 3, 1, 1).expand(count, 3, size, size).contiguous()


def layer(name: str, bits: int, kernel: str | None) -> LayerInfo:
    return LayerInfo(name, (4, 4), bits, None, "8-bit dynamic" if kernel else "float", kernel, 16, None)


def comparison(a: Tensor, b: Tensor, **changes: Any) -> Comparison:
    """A comparison of pictures, with figures of which each is another."""
    count = len(a)
    prompts = [EVIL, *(f"prompt {index}" for index in range(1, count))]
    pairs = [
        ImagePair(index, {"prompt": prompt}, 20.0 + (3 * index) % count, 30.0 + index, 0.9 - index / 100)
        for index, prompt in enumerate(prompts)
    ]
    latencies = Latency(10.0, 9, 11, (10,)), Latency(40.0, 39, 41, (40,))
    cost = {"size_bytes": 4_470_000, "tensor_bytes": 1, "average_bits": 32.0, "average_bits_all": 32.0,
            "packed_share": 0.0, "kernel_cache_bytes": 0, "kernels": {}, "model_evaluations": 40}  # fmt: skip
    small = cost | {"size_bytes": 710_000, "average_bits": 4.0, "kernels": {"x86": 2}, "model_evaluations": 5}
    found: dict[str, Any] = {
        "sides": (Side("teacher & co", None, 20, {}), Side("student", None, 5, {"guidance_scale": 1})),
        "seed": 42,
        "call_arguments": {"guidance_scale": 3.0},
        "pairs": pairs,
        "pictures": (a, b),
        "fidelity": Fidelity(21.5, (20.25, 22.75), 24.0, 30.0, "latents", 30.5, 0.85),
        "costs": (Cost(**cost), Cost(**small)),
        "speed": Speed(*latencies, 1, {"cpu": "a <fast> one", "gpu": None}),
        "layers": ([layer("conv_in", 32, None), layer("mid", 32, None)], [layer("mid", 4, "x86")]),
    }  # fmt: skip
    return Comparison(**found | changes)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "report.html"
    save_comparison(comparison(plain(RED, 7), plain(BLUE, 7)), path)
    return path


def amounts(picture: Path) -> tuple[int, int]:
    """How many pixels of a screenshot are A's red, and how many B's blue."""
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(int)
    red, blue = (int((abs(pixels - np.array(colour)).max(axis=-1) < 20).sum()) for colour in (RED, BLUE))
    return red, blue


def test_a_browser_runs_the_script_and_the_slider_uncovers_a(page: Path, tmp_path: Path) -> None:
    dom = dom_of(page, "position=25")
    assert 'data-script="ran"' in dom
    assert dom.count("clip-path: inset(0px 0px 0px 25%)") == 7
    assert len(re.findall(r'class="edge" style="left: 25%', dom)) == 7
    all_a = amounts(screenshot(page, "position=100", tmp_path / "a.png"))
    quarter = amounts(screenshot(page, "position=25", tmp_path / "quarter.png"))
    assert all_a[0] > 100_000
    assert all_a[1] < 0.02 * all_a[0]
    assert quarter[0] / sum(quarter) == pytest.approx(0.25, abs=0.03)


def test_blinking_switches_whole_pictures(page: Path) -> None:
    dom = dom_of(page, "blink")
    assert '<body class="blinking"' in dom
    assert 'aria-pressed="true"' in dom
    shown = set(re.findall(r"clip-path: inset\(0px 0px 0px (\d+)", dom))
    assert shown in ({"0"}, {"100"})


def test_prompts_are_shown_and_do_nothing(page: Path) -> None:
    dom = dom_of(page, "")
    assert "<title>student against teacher &amp; co</title>" in dom
    assert "&lt;script&gt;document.title" in dom
    assert dom.count("<script") == 1
    assert "$notes" in dom
    assert "a &lt;fast&gt; one" in dom


def test_it_needs_no_network_and_says_so_to_the_browser(page: Path) -> None:
    text = page.read_text()
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(", text)
    assert {source[:22] for source in re.findall(r'src="([^"]*)"', text)} == {"data:image/png;base64,"}


def test_the_worst_five_come_first_and_each_image_once(page: Path) -> None:
    text = page.read_text()
    order = [int(index) for index in re.findall(r'<figure id="image-(\d+)">', text)]
    assert order == [0, 5, 3, 1, 6, 4, 2]
    assert text.index("The 5 that differ most") < text.index("image-0") < text.index("<h2>The others</h2>")
    assert text.index('"image-6"') < text.index("<h2>The others</h2>") < text.index('"image-4"')
    few = comparison_page(comparison(plain(RED, 2), plain(BLUE, 2)))
    assert "The 2 that differ most" in few
    assert "The others" not in few


def test_the_figures_of_both(page: Path) -> None:
    text = re.sub(r"<[^>]+>", " ", page.read_text().partition("<script>")[0])
    for figure in ("4&#8239;470&#8239;000", "710&#8239;000", "32.00", "4.00", "40.00", "10.00", "23.00 dB"):
        assert figure in text, figure
    assert "21.50 dB [20.25 dB, 22.75 dB]" in text
    assert "33.00 dB" in text  # the median PSNR
    assert "0.8700" in text
    assert "7 images, seed 42, the same noise for both; guidance_scale 3.0, B alone: guidance_scale 1." in text
    assert "Kernels of A: it is in floating point." in text
    assert "Kernels of B: int8 kernels in C: 2 of 2 layers." in text
    assert 'title="mid: 4 bits" style="height: 50%' in page.read_text()


def test_equal_images_are_called_equal() -> None:
    pictures = plain(RED, 2)
    pairs = [ImagePair(index, {}, float("inf"), float("inf"), 1.0) for index in range(2)]
    fidelity = Fidelity(float("inf"), (float("inf"),) * 2, float("inf"), float("inf"), "images", None, None)
    text = comparison_page(comparison(pictures, pictures, pairs=pairs, fidelity=fidelity))
    assert "SQNR equal, PSNR equal, SSIM 1.0000" in text
    assert "image 1" in text


def test_differences_are_shown_as_large_as_fits() -> None:
    a, b = plain((100, 0, 0), 2), plain((90, 0, 3), 2)
    assert amplification(comparison(a, b)) == 16
    assert difference(a, b, 16)[0, :, 0, 0].tolist() == [160, 0, 48]
    assert amplification(comparison(plain(RED, 2), plain(BLUE, 2))) == 1
    assert amplification(comparison(a, a)) == 16
    b[0, 0, 0, 0] = 255  # one number of many decides nothing
    assert amplification(comparison(a, b)) == 16


def test_pictures_of_one_channel_and_of_three_are_png(tmp_path: Path) -> None:
    for channels, mode in ((1, "L"), (3, "RGB")):
        pixels = torch.arange(channels * 4, dtype=torch.uint8).view(channels, 2, 2)
        uri = data_uri(pixels)
        image = Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,"))))
        assert image.mode == mode
        assert torch.equal(torch.from_numpy(np.array(image)).reshape(2, 2, channels).movedim(-1, 0), pixels)


def test_the_picture_beside_it(page: Path) -> None:
    with Image.open(page.with_suffix(".png")) as image:
        assert image.size[0] > 500
        assert np.asarray(image.convert("RGB")).std() > 5
