"""Specification of examples/metrics: a module of evaluate that loads by its path, and says what our tables say."""

import shutil
from pathlib import Path
from typing import Any

import evaluate
import numpy as np
import pytest
import torch
import yaml
from scipy.linalg import sqrtm
from two_processes import Running

from diffusers_pqcad.evaluation import load_extractor
from diffusers_pqcad.evaluation.metrics import feature_statistics, frechet_distance

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "metrics" / "classifier_distance"
EXTRACTOR = ROOT / "examples" / "models" / "fashion-mnist-features"
D = 5


def features_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) * torch.arange(1, D + 1)


@pytest.fixture(scope="module")
def reference() -> dict[str, Any]:
    mean, covariance = feature_statistics(features_of(100, seed=1) + 0.5)
    return {"mean": mean, "covariance": covariance, "name": "five numbers"}


@pytest.fixture(scope="module")
def metric() -> Any:
    """The module, loaded as a user does; the tests run without a network."""
    return evaluate.load(str(FOLDER))


def test_it_is_the_distance_by_the_textbook(metric, reference):
    found = metric.compute(predictions=features_of(40), reference=reference)
    values = features_of(40).double().numpy()
    wanted, covariance = reference["covariance"].numpy(), np.cov(values, rowvar=False)
    expected = ((values.mean(0) - reference["mean"].numpy()) ** 2).sum()
    expected += np.trace(covariance + wanted - 2 * sqrtm(covariance @ wanted).real)
    assert found["frechet_distance"] == pytest.approx(expected, rel=1e-6)
    assert (found["n"], found["name"]) == (40, "five numbers")


def test_batches_are_one_set(metric, reference):
    whole = metric.compute(predictions=features_of(40), reference=reference)
    for part in features_of(40).split(7):
        metric.add_batch(predictions=part.numpy())
    assert metric.compute(reference=reference) == whole


def test_the_spread_is_that_of_drawing_the_pictures_anew(metric, reference):
    def spread(count: int, **options: Any) -> Any:
        found = metric.compute(predictions=features_of(count), reference=reference, **options)
        return found["frechet_distance_sd"]

    assert spread(40) == spread(40) != spread(40, seed=1)
    assert spread(640) < 0.6 * spread(40)
    assert spread(40, num_resamples=0) is None


def test_a_folder_of_an_extractor_is_a_reference_of_its_name(metric):
    extractor = load_extractor(EXTRACTOR)
    features = extractor.reference_features[:50]
    found = metric.compute(predictions=features, reference=EXTRACTOR, num_resamples=2)
    statistics = feature_statistics(features)
    expected = frechet_distance(*statistics, extractor.reference_mean, extractor.reference_covariance)
    assert found["frechet_distance"] == pytest.approx(expected)
    assert found["name"] == extractor.name


@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        ([[1.0] * 4] * 3, {}, "expected features of 5 numbers, as those of 'five numbers' are, got 4"),
        ([[1.0], [1.0, 2.0]], {}, r"expected features of one length, got \[1, 2\]"),
        ([[1.0] * 5], {}, "features"),
        ([[1.0] * 5] * 3, {"name": ...}, r"missing: \['name'\]"),
    ],
)
def test_what_cannot_be_compared_is_refused(metric, reference, rows, changes, message):
    given = {key: value for key, value in (reference | changes).items() if value is not ...}
    with pytest.raises(ValueError, match=message):
        metric.compute(predictions=rows, reference=given)


def distance_of_share(cache: Path, reference: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a process of two gets for its half of 40 features."""
    import os

    rank = int(os.environ["RANK"])
    metric = evaluate.load(str(FOLDER), num_process=2, process_id=rank, experiment_id="halves", cache_dir=str(cache))
    return metric.compute(predictions=features_of(40).split(20)[rank], reference=reference)


def test_two_processes_compute_as_one(metric, reference, tmp_path):
    found, other = Running(tmp_path / "processes", distance_of_share, tmp_path / "cache", reference).results()
    assert other is None
    assert found == metric.compute(predictions=features_of(40), reference=reference)


def test_the_folder_is_a_space(tmp_path, monkeypatch, reference):
    from safetensors.torch import save_file

    _, front, _ = (FOLDER / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    card = yaml.safe_load(front)
    assert card["sdk"] == "gradio"
    assert card["tags"] == ["evaluate", "metric"]
    assert (FOLDER / "requirements.txt").read_text() == "diffusers-pqcad[eval]\n"
    space = shutil.copytree(FOLDER, tmp_path / "space")
    monkeypatch.chdir(space)
    monkeypatch.syspath_prepend(str(space))
    save_file({"features": features_of(40)}, "features.safetensors")
    save_file({key: reference[key] for key in ("mean", "covariance")}, "reference.safetensors")
    import app

    found = app.distance("features.safetensors", "reference.safetensors", "five numbers")
    assert found["n"] == 40
    assert (space / card["app_file"]).is_file()
