"""Specification of the pictures: they are written, and show something."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch
from PIL import Image

from diffusers_pqcad.numerics.qparams import WEIGHT_BITS
from diffusers_pqcad.publishing.plots import BIT_COLOURS, plot_bits, plot_curves, plot_samples


def assert_picture(path: Path) -> None:
    assert path.read_bytes().startswith(b"\x89PNG")
    with Image.open(path) as image:
        assert min(image.size) > 50
        assert len(image.convert("RGB").getcolors(2**24)) > 5  # not a blank page
    assert plt.get_fignums() == []  # nothing stays open


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("count", [1, 4])
def test_samples(tmp_path: Path, channels: int, count: int) -> None:
    images = torch.randint(0, 256, (count, channels, 8, 8)).to(torch.uint8)
    plot_samples(tmp_path / "samples.png", {"teacher, 20": images, "PQ, 20": images.flip(0)})
    assert_picture(tmp_path / "samples.png")


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 3, 8, 8)])
def test_titles_are_shown_as_they_are(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Two dollars would be a formula, and one that cannot be read ends hours of work; of videos, the first frame."""
    images = torch.randint(0, 256, (3, *shape)).to(torch.uint8)
    plot_samples(tmp_path / "samples.png", {"PQ, 20": images}, ["$ \\frac $", "", "without any space" * 9])
    assert_picture(tmp_path / "samples.png")


def test_every_width_has_a_colour() -> None:
    assert set(BIT_COLOURS) == set(WEIGHT_BITS)


def test_bits(tmp_path: Path) -> None:
    rounds = [
        {"bits": {"a": 8, "b": 6}, "average_bits": 7.0},
        {"bits": {"a": 2, "b": 3}, "average_bits": 2.5},
    ]
    plot_bits(tmp_path / "bits.png", rounds)
    assert_picture(tmp_path / "bits.png")


def test_curves(tmp_path: Path) -> None:
    stats = [{"step": step, "held_out_error": None if step % 2 else 0.1 * step} for step in range(6)]
    plot_curves(tmp_path / "curves.png", {"pq_cad": stats, "fp": stats})
    assert_picture(tmp_path / "curves.png")


def test_curves_without_distillation(tmp_path: Path) -> None:
    plot_curves(tmp_path / "empty.png", {})
    assert_picture(tmp_path / "empty.png")


def test_pictures_of_a_real_run(tmp_path: Path, pq_run) -> None:
    history = pq_run[1]
    plot_bits(tmp_path / "bits.png", history.rounds)
    assert_picture(tmp_path / "bits.png")
