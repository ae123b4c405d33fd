"""Specification of a comparison: image by image what the metrics say of each pair, and kept while it is made."""

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from pipelines import PIPELINES

from diffusers_pqcad import PQCADConfig, inspect, quantize_
from diffusers_pqcad.evaluation import comparison as module
from diffusers_pqcad.evaluation.comparison import Comparison, Side, compare
from diffusers_pqcad.evaluation.generate import generate_images
from diffusers_pqcad.evaluation.metrics import (
    image_mse,
    median_sqnr_db,
    picture_psnr_db,
    reference_variance,
    sqnr_db,
    structural_similarity,
)

INPUTS = [{"prompt": "red cat"}, {"prompt": "blue dog"}]


def sides() -> tuple[Side, Side]:
    teacher, small = PIPELINES["sd"].build(), PIPELINES["sd"].build()
    quantize_(small.unet, PQCADConfig(weight_bits=3))
    return Side("teacher", teacher, 3, {}), Side("small", small, 2, {"guidance_scale": 1})


@pytest.fixture(scope="module")
def found() -> Comparison:
    size, calls = {"height": 16, "width": 16}, {"num_images": 3, "seed": 7, "batch_size": 2}
    return compare(*sides(), INPUTS, **calls, num_latency_rounds=1, progress=False, **size)


def test_pairs_are_what_the_metrics_say_of_the_pipelines_own_images(found):
    a, b = sides()
    calls = {"num_images": 3, "seed": 7, "batch_size": 2, "progress": False, "height": 16, "width": 16}
    wanted = generate_images(a.pipeline, INPUTS, num_inference_steps=3, **calls)
    shown = generate_images(b.pipeline, INPUTS, num_inference_steps=2, guidance_scale=1, **calls)
    assert torch.equal(found.pictures[0], wanted.images)
    variance = reference_variance(wanted.latents)
    for index, pair in enumerate(found.pairs):
        assert (pair.index, pair.inputs) == (index, INPUTS[index % 2])
        error = image_mse(wanted.latents, shown.latents)[index].item()
        assert pair.sqnr_db == pytest.approx(10 * math.log10(variance / error), abs=1e-3)
        one = slice(index, index + 1)
        assert pair.psnr_db == pytest.approx(picture_psnr_db(wanted.images[one], shown.images[one]), abs=1e-3)
        assert pair.ssim == pytest.approx(structural_similarity(wanted.images[one], shown.images[one]), abs=1e-4)
    assert found.medians()["sqnr_db"] == pytest.approx(median_sqnr_db(wanted.latents, shown.latents), abs=1e-3)
    assert found.fidelity.sqnr_db == pytest.approx(sqnr_db(wanted.latents, shown.latents), abs=1e-3)
    assert [pair.sqnr_db for pair in found.worst_first()] == sorted(pair.sqnr_db for pair in found.pairs)


def test_costs_are_counted_for_each(found):
    assert [cost.model_evaluations for cost in found.costs] == [6, 2]  # guidance doubles A's
    assert found.costs[1].average_bits <= 3
    assert found.layers[1] == list(inspect(found.sides[1].pipeline.unet))
    assert found.speed.latency_ms.median_ms > 0


def test_it_is_json_without_pictures(found):
    document = found.to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["b"]["arguments"] == {"guidance_scale": 1}
    assert len(document["images"]) == document["num_images"] == 3


def test_what_was_made_is_kept_and_not_made_again(tiny_pipeline: DDIMPipeline, tmp_path: Path, monkeypatch):
    side, sampled, made = Side("it", tiny_pipeline, 2, {}), module.sampled, []

    def stop_at_second(*arguments, **options):
        made.append(options["description"])
        if len(made) == 2:
            raise KeyboardInterrupt
        return sampled(*arguments, **options)

    monkeypatch.setattr(module, "sampled", stop_at_second)
    calls = {"num_images": 2, "seed": 0, "num_latency_rounds": 1, "progress": False, "state": tmp_path}
    with pytest.raises(KeyboardInterrupt):
        compare(side, side, **calls)
    found = compare(side, side, **calls)
    assert made == ["A: it", "B: it", "B: it"]
    assert [pair.sqnr_db for pair in found.pairs] == [math.inf, math.inf]
    assert found.to_dict()["medians"]["sqnr_db"] == "inf"


def test_too_few_images_are_refused(tiny_pipeline: DDIMPipeline):
    side = Side("it", tiny_pipeline, 2, {})
    with pytest.raises(ValueError, match="num_images=1: expected at least 2"):
        compare(side, side, num_images=1, seed=0)


def test_pipelines_of_other_sizes_are_refused(tiny_pipeline: DDIMPipeline):
    other = Side("other", PIPELINES["ddim"].build(), 1, {})
    with pytest.raises(ValueError, match="expected samples of shape"):
        compare(Side("it", tiny_pipeline, 1, {}), other, num_images=2, seed=0, progress=False)
