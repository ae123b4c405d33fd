"""Feature extractors for distribution metrics, stored with their reference statistics and checked when loaded.

A distance between feature distributions means nothing without the extractor and the reference set behind it, so both
live in one folder under one name, and both files are verified by SHA-256. The format is read and written only here:

    config.json             name, SHA-256 of both files, sizes and labels of the classifier, origin of the numbers
    model.safetensors       weights of the classifier
    reference.safetensors   mean (D,) and covariance (D, D) float64, features (M, D) float16
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusers_pqcad.compression.processes import each

CONFIG_FILE, WEIGHTS_FILE, REFERENCE_FILE = "config.json", "model.safetensors", "reference.safetensors"


class FeatureExtractor(nn.Module):
    """Base of all extractors: `forward` maps images (N, C, H, W) uint8 in [0, 255] to features (N, D) float32.

    `name` is the metric's name as a report prints it, `sha256` the hex digest of the weights file and
    `reference_sha256` that of the statistics. `reference_mean` (D,) and `reference_covariance` (D, D) are float64 over
    the reference images, `reference_features` (M, D) float32 is a random part of them, for kernel distances.
    Subclass this and implement `forward` to use another network.
    """

    def __init__(
        self,
        *,
        name: str,
        sha256: str,
        reference_sha256: str,
        reference_mean: Tensor,
        reference_covariance: Tensor,
        reference_features: Tensor,
    ) -> None:
        super().__init__()
        self.name = name
        self.sha256 = sha256
        self.reference_sha256 = reference_sha256
        # Plain attributes, not buffers: module.to(dtype) must not round the statistics.
        self.reference_mean = reference_mean
        self.reference_covariance = reference_covariance
        self.reference_features = reference_features

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (N, D) float32 of `images` (N, C, H, W) uint8."""
        raise NotImplementedError(f"{type(self).__name__} must implement forward(images uint8) -> features float32.")


class SmallClassifier(nn.Module):
    """Three convolutions and two linear layers for small images; the first linear layer's output are the features.

    `image_size` is the height and width (at least 8; 28 for the MNIST family), `in_channels` 1 for grey images and 3
    for colour, `channels` the widths of the three convolutions. Each is followed by batch norm, ReLU and max-pooling
    by 2.
    """

    def __init__(
        self,
        *,
        image_size: int = 28,
        in_channels: int = 1,
        channels: tuple[int, int, int] = (32, 64, 128),
        num_features: int = 128,
        num_classes: int = 10,
    ) -> None:
        super().__init__()
        self.architecture = {
            "image_size": image_size,
            "in_channels": in_channels,
            "channels": list(channels),
            "num_features": num_features,
            "num_classes": num_classes,
        }
        self.image_shape = (in_channels, image_size, image_size)
        stages: list[nn.Module] = []
        for out_channels in channels:
            stages += [
                nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
            in_channels = out_channels
        self.convolutions = nn.Sequential(*stages)
        self.penultimate = nn.Linear(in_channels * (image_size // 8) ** 2, num_features)
        self.head = nn.Linear(num_features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Return the features (N, num_features), >= 0, of `images` (N, in_channels, H, W) uint8.

        Raises ValueError for another dtype or shape.
        """
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.image_shape:
            raise ValueError(
                f"images: expected uint8 of shape (N, {', '.join(map(str, self.image_shape))}), got {images.dtype} of "
                f"shape {tuple(images.shape)}. Convert samples in [-1, 1] with diffusers_pqcad.evaluation.to_uint8."
            )
        x = images.to(self.head.weight.device).float() / 127.5 - 1
        return self.penultimate(self.convolutions(x).flatten(1)).relu()

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (N, num_classes) of `images`; input and errors as in `features`."""
        return self.head(self.features(images))


class ClassifierExtractor(FeatureExtractor):
    """The extractor whose features are the penultimate activations of a `SmallClassifier`.

    `labels` are the names that its logits stand for, by attribute and in order: {"emoji": [...], "colour": [...]} of
    one that tells both. Without them nothing can be recognized.
    """

    def __init__(
        self, classifier: SmallClassifier, labels: Mapping[str, Sequence[str]] | None = None, **reference: Any
    ) -> None:
        super().__init__(**reference)
        self.classifier = classifier.eval().requires_grad_(False)
        self.labels = {attribute: list(names) for attribute, names in (labels or {}).items()}

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (N, D) float32, on the CPU, of `images` (N, C, H, W) uint8."""
        with torch.no_grad():
            return self.classifier.features(images).float().cpu()

    def recognize(self, images: Tensor) -> list[dict[str, str]]:
        """Return the most likely label of each attribute, for each of `images` (N, C, H, W) uint8.

        Raises ValueError where the extractor was stored without `labels`.
        """
        if not self.labels:
            raise ValueError(
                f"{self.name}: expected an extractor with labels in its {CONFIG_FILE}, which say what the classifier "
                "finds; this one has none. Store it with save_extractor(..., labels=...)."
            )
        with torch.no_grad():
            logits = self.classifier(images)
        parts = split_logits(logits, self.labels).items()
        found = [[self.labels[key][place] for place in part.argmax(dim=1).tolist()] for key, part in parts]
        return [dict(zip(self.labels, row, strict=True)) for row in zip(*found, strict=True)]


def split_logits(logits: Tensor, labels: Mapping[str, Sequence[str]]) -> dict[str, Tensor]:
    """Return the part of `logits` (N, num_classes) for each attribute of `labels`, in their order."""
    parts = logits.split([len(names) for names in labels.values()], dim=1)
    return dict(zip(labels, parts, strict=True))


def save_extractor(
    folder: str | Path,
    classifier: SmallClassifier,
    *,
    name: str,
    mean: Tensor,
    covariance: Tensor,
    features: Tensor,
    facts: Mapping[str, Any],
    labels: Mapping[str, Sequence[str]] | None = None,
) -> None:
    """Write `classifier` and its reference statistics to `folder`, for `load_extractor`.

    `mean` (D,) and `covariance` (D, D) are stored as float64, `features` (M, D) as float16. `facts` are further
    entries of config.json: JSON values that say where the numbers come from (data, accuracy, seeds). `labels` are
    those of `ClassifierExtractor`.

    Raises ValueError for another number of labels than of logits, and if `name` calls the metric FID: that name
    belongs to Inception-v3 features.
    """
    if "fid" in name.lower():
        raise ValueError(
            f"name={name!r}: FID is the distance on Inception-v3 features. Name the extractor, for example "
            "'FMNIST-classifier Frechet distance (d=128)'."
        )
    folder = Path(folder)
    check_labels(labels or {}, classifier, folder / CONFIG_FILE)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.detach().cpu().contiguous() for key, value in classifier.state_dict().items()}
    save_file(weights, folder / WEIGHTS_FILE)
    reference = {"mean": mean.double(), "covariance": covariance.double(), "features": features.half()}
    save_file({key: value.cpu().contiguous() for key, value in reference.items()}, folder / REFERENCE_FILE)
    config = {
        "name": name,
        "sha256": file_sha256(folder / WEIGHTS_FILE),
        "reference_sha256": file_sha256(folder / REFERENCE_FILE),
        "architecture": classifier.architecture,
        **({"labels": {attribute: list(names) for attribute, names in labels.items()}} if labels else {}),
        **facts,
    }
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")


def load_extractor(folder: str | Path) -> ClassifierExtractor:
    """Return the extractor stored in `folder`, in eval mode on the CPU, with its reference statistics.

    Raises FileNotFoundError if one of the three files is missing, and ValueError, naming the file, if config.json
    cannot be read or a tensor file is not the one it was written with (edited, truncated, mixed up).
    """
    folder = Path(folder)
    for file in (CONFIG_FILE, WEIGHTS_FILE, REFERENCE_FILE):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder / file}: not found. Expected a folder written by examples/train_classifier.py."
            )
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
        name, architecture = config["name"], config["architecture"]
        expected = {WEIGHTS_FILE: config["sha256"], REFERENCE_FILE: config["reference_sha256"]}
        classifier = SmallClassifier(**(architecture | {"channels": tuple(architecture["channels"])}))
        labels = config.get("labels", {})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder / CONFIG_FILE}: expected JSON with name, sha256, reference_sha256 and architecture, but reading "
            f"it failed with {type(error).__name__}: {error}. Restore it or run examples/train_classifier.py again."
        ) from error
    check_labels(labels, classifier, folder / CONFIG_FILE)
    for file, digest in expected.items():
        arrived = file_sha256(folder / file)
        if arrived != digest:
            raise ValueError(
                f"{folder / file}: its SHA-256 is {arrived}, but {CONFIG_FILE} says {digest}. The file was edited, "
                "truncated or mixed up with another extractor's, so its distances would not be comparable. Restore it."
            )
    classifier.load_state_dict(load_file(folder / WEIGHTS_FILE))
    reference = load_file(folder / REFERENCE_FILE)
    return ClassifierExtractor(
        classifier,
        labels,
        name=name,
        sha256=expected[WEIGHTS_FILE],
        reference_sha256=expected[REFERENCE_FILE],
        reference_mean=reference["mean"],
        reference_covariance=reference["covariance"],
        reference_features=reference["features"].float(),
    )


def check_labels(labels: Mapping[str, Sequence[str]], classifier: SmallClassifier, path: Path) -> None:
    """Raise ValueError, naming the file, where there are `labels`, and not as many as `classifier` has logits."""
    num_labels, num_classes = sum(map(len, labels.values())), classifier.architecture["num_classes"]
    if labels and num_labels != num_classes:
        raise ValueError(f"{path}: labels: expected {num_classes} in all, one for each logit, got {num_labels}.")


def extract_features(extractor: Callable[[Tensor], Tensor], images: Tensor, batch_size: int = 256) -> Tensor:
    """Return the features (N, D) of `images` (N, C, H, W) uint8, computed `batch_size` images at a time.

    Several processes take turns with the batches, and all return all features.
    """
    return torch.cat(each(images.split(batch_size), extractor))


def file_sha256(path: Path) -> str:
    """Return the hex SHA-256 digest of the bytes of `path`."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
