"""The Frechet distance of pictures' features to a reference set, as a module of Hugging Face's evaluate."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import datasets
import evaluate
import torch

from diffusers_pqcad.evaluation.features import load_extractor
from diffusers_pqcad.evaluation.metrics import feature_statistics, frechet_distance

DESCRIPTION = """
The Frechet distance of the features of generated pictures to those of a reference set: of two Gaussians with their
means and covariances, |mean_a - mean_b|^2 + Tr(A + B - 2 (A B)^(1/2)). The features are those of any network, such as
the small classifiers that diffusers-pqcad comes with. It is FID only where they are those of Inception-v3, so the
result has the extractor's name. It falls with the number of pictures: compare at the same number alone.
"""
CITATION = """
@inproceedings{heusel2017gans,
  title={GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium},
  author={Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and Hochreiter, Sepp},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}
"""
INPUTS = """
Args:
    predictions: features (n, D), float32: a row for each picture, at least two. Not the pictures: they would pass
        through a file of evaluate's.
    reference: the folder of an extractor of diffusers-pqcad, whose features these have to be; or a mapping with "mean"
        (D,), "covariance" (D, D) and "name", what the features are.
    num_resamples: how often the rows are drawn anew, with replacement, for the spread; 0: no spread.
    seed: that of these draws.

Returns:
    frechet_distance: the distance, at least 0, in squared units of the features.
    frechet_distance_sd: standard deviation of the distance over the draws, or None. It says how the pictures' choice
        moves the number, and not how far it is from that of more pictures.
    n: the number of pictures.
    name: that of the features.

Examples:
    >>> metric = evaluate.load("examples/metrics/classifier_distance")
    >>> metric.compute(predictions=features, reference="examples/models/fashion-mnist-features")
"""


@evaluate.utils.file_utils.add_start_docstrings(DESCRIPTION, INPUTS)
class ClassifierDistance(evaluate.Metric):
    """The module: features come in batches, and from several processes; the first of these computes the distance."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
            reference_urls=["https://arxiv.org/abs/1706.08500"],
        )

    def _compute(
        self, predictions: Any, reference: str | Path | Mapping[str, Any], num_resamples: int = 50, seed: int = 0
    ) -> dict[str, Any]:
        features = as_matrix(predictions)
        mean, covariance, name = reference_of(reference)
        if features.shape[1] != len(mean):
            raise ValueError(
                f"predictions: expected features of {len(mean)} numbers, as those of {name!r} are, got "
                f"{features.shape[1]}. Both sides must come from the same extractor."
            )
        spread = [
            frechet_distance(*feature_statistics(features[rows]), mean, covariance)
            for rows in draws(len(features), num_resamples, seed)
        ]
        return {
            "frechet_distance": frechet_distance(*feature_statistics(features), mean, covariance),
            "frechet_distance_sd": torch.tensor(spread).std().item() if len(spread) > 1 else None,
            "n": len(features),
            "name": name,
        }


def as_matrix(predictions: Any) -> torch.Tensor:
    """Return features (n, D) float32; ValueError for rows of different lengths."""
    lengths = sorted({len(row) for row in predictions})
    if len(lengths) != 1:
        raise ValueError(f"predictions: expected features of one length, got {lengths}.")
    return torch.stack([torch.as_tensor(row, dtype=torch.float32) for row in predictions])


def reference_of(reference: str | Path | Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor, str]:
    """Return the mean (D,) and the covariance (D, D) of a reference set, float64, and what its features are called."""
    if not isinstance(reference, Mapping):
        extractor = load_extractor(reference)
        return extractor.reference_mean, extractor.reference_covariance, extractor.name
    missing = {"mean", "covariance", "name"} - set(reference)
    if missing:
        raise ValueError(f"reference: expected mean, covariance and name, or a folder; missing: {sorted(missing)}.")
    mean, covariance = (torch.as_tensor(reference[key], dtype=torch.float64) for key in ("mean", "covariance"))
    return mean, covariance, str(reference["name"])


def draws(count: int, num_resamples: int, seed: int) -> list[torch.Tensor]:
    """Return the rows of each draw of `count` from as many, with replacement."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, count, (count,), generator=generator) for _ in range(num_resamples)]
