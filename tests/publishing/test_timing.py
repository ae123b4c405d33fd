"""Specification of the times of a plan: what is measured, times the counts; by a clock that counts rows."""

import functools
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from test_footprint import outline_of_unet

from diffusers_pqcad.publishing import timing
from diffusers_pqcad.publishing.settings import settings_of
from diffusers_pqcad.publishing.stages import FLOAT, PACKED, ROUNDED, TRAINED, Passes, Reconstruction, Stage
from diffusers_pqcad.publishing.timing import Stopwatch, random_model

SETTINGS = settings_of(
    {"modules_to_not_convert": ["up_blocks", "down_blocks", "attentions"], "reconstruction_batch_size": 2}
)


@pytest.fixture
def stopwatch(tiny_unet: UNet2DModel, monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    """One whose seconds are the rows that models were called for."""
    forward, rows = UNet2DModel.forward, [0]

    @functools.wraps(forward)
    def counted(self: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        rows[0] += len(sample)
        return forward(self, sample, *args, **kwargs)

    monkeypatch.setattr(UNet2DModel, "forward", counted)
    return Stopwatch(SETTINGS, outline_of_unet(tiny_unet), clock=lambda: float(rows[0]))


def test_a_part_takes_the_seconds_of_its_calls_whatever_is_called_of_them(stopwatch: Stopwatch) -> None:
    passes = (Passes(FLOAT, 3, 5, 1), Passes(ROUNDED, 2, 4, 1), Passes(PACKED, 7, 2, 1), Passes(TRAINED, 4, 8, 1))
    assert timing.CALL_SECONDS == 2  # of a clock by which an image takes one
    assert [stopwatch.of_passes(part, "cpu") for part in passes] == [15, 8, 14, 32]
    assert stopwatch.of_stage(Stage("recording", "", passes)) == 69


def test_a_capture_ends_where_its_unit_does(tiny_unet: UNet2DModel) -> None:
    stopwatch = Stopwatch(SETTINGS, outline_of_unet(tiny_unet))
    shares = [stopwatch.share_of(name) for name in stopwatch.search.units]
    assert 0 < shares[0] < shares[-1] < 1
    stage = Stage("pq", "", (), tuple(Reconstruction(unit, 2, 2) for unit in stopwatch.search.units))
    assert stopwatch.of_stage(stage) > 0


def test_random_weights_are_of_the_right_size_and_none_is_of_the_model(tiny_unet: UNet2DModel) -> None:
    found = random_model(outline_of_unet(tiny_unet).model)
    with torch.no_grad():
        output = found(torch.randn(2, 1, 8, 8), torch.tensor([3, 7])).sample
    assert output.isfinite().all()
    weight = found.mid_block.resnets[0].conv1.weight
    assert weight.std().item() == pytest.approx(weight[0].numel() ** -0.5, rel=0.1)


def test_models_that_do_not_fit_are_not_made(tiny_unet: UNet2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "available_bytes", lambda: 1000)
    with pytest.raises(ValueError, match="measure_time: expected .* of free memory .* Give --measure_time False"):
        Stopwatch(SETTINGS, outline_of_unet(tiny_unet))
