"""Specification of `diffusers_pqcad.evaluation.features`: what is stored is what is measured with."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from diffusers_pqcad.evaluation.features import (
    CONFIG_FILE,
    REFERENCE_FILE,
    WEIGHTS_FILE,
    FeatureExtractor,
    SmallClassifier,
    extract_features,
    load_extractor,
    save_extractor,
)
from diffusers_pqcad.evaluation.metrics import feature_statistics, frechet_distance

NAME = "tiny-classifier Frechet distance (d=12)"


def tiny_classifier() -> SmallClassifier:
    torch.manual_seed(0)
    return SmallClassifier(image_size=8, channels=(4, 6, 8), num_features=12, num_classes=3).eval()


def uint8_images(num_images: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_images, 1, 8, 8), generator=generator, dtype=torch.uint8)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    classifier = tiny_classifier()
    with torch.no_grad():
        reference = classifier.features(uint8_images(60))
    mean, covariance = feature_statistics(reference)
    path = tmp_path / "extractor"
    facts = {"test_accuracy": 0.5}
    save_extractor(path, classifier, name=NAME, mean=mean, covariance=covariance, features=reference[:20], facts=facts)
    return path


class TestSmallClassifier:
    def test_shapes(self):
        classifier = tiny_classifier()
        assert classifier.features(uint8_images(5)).shape == (5, 12)
        assert classifier(uint8_images(5)).shape == (5, 3)

    def test_colour_images(self):
        classifier = SmallClassifier(image_size=8, in_channels=3, channels=(4, 6, 8), num_features=12, num_classes=3)
        assert classifier(torch.zeros(5, 3, 8, 8, dtype=torch.uint8)).shape == (5, 3)
        with pytest.raises(ValueError, match=r"expected uint8 of shape \(N, 3, 8, 8\)"):
            classifier(uint8_images(5))

    def test_defaults_are_for_the_mnist_family(self):
        images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
        assert SmallClassifier().features(images).shape == (2, 128)

    def test_logits_are_the_head_of_the_features(self):
        classifier = tiny_classifier()
        torch.testing.assert_close(classifier(uint8_images(5)), classifier.head(classifier.features(uint8_images(5))))

    @pytest.mark.parametrize(
        "images",
        [
            torch.zeros(2, 1, 8, 8),
            torch.zeros(2, 3, 8, 8, dtype=torch.uint8),
            torch.zeros(2, 1, 9, 8, dtype=torch.uint8),
        ],
        ids=["float", "colour", "size"],
    )
    def test_refuses(self, images):
        with pytest.raises(ValueError, match="expected uint8 of shape"):
            tiny_classifier().features(images)


class TestLoadExtractor:
    def test_round_trip(self, folder):
        extractor = load_extractor(folder)
        with torch.no_grad():
            expected = tiny_classifier().features(uint8_images(60))
        mean, covariance = feature_statistics(expected)
        assert isinstance(extractor, FeatureExtractor)
        assert extractor.name == NAME
        assert extractor.sha256 == hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest()
        assert extractor.reference_sha256 == hashlib.sha256((folder / REFERENCE_FILE).read_bytes()).hexdigest()
        assert torch.equal(extractor(uint8_images(60)), expected)
        assert torch.equal(extractor.reference_mean, mean)
        assert torch.equal(extractor.reference_covariance, covariance)
        assert extractor.reference_mean.dtype == extractor.reference_covariance.dtype == torch.float64
        assert torch.equal(extractor.reference_features, expected[:20].half().float())
        assert json.loads((folder / CONFIG_FILE).read_text())["test_accuracy"] == 0.5

    def test_labels_are_found_by_attribute(self, tmp_path):
        classifier = tiny_classifier()
        statistics = {"mean": torch.zeros(12), "covariance": torch.eye(12), "features": torch.zeros(2, 12)}
        labels = {"kind": ["a"], "size": ["small", "large"]}
        save_extractor(tmp_path, classifier, name=NAME, facts={}, labels=labels, **statistics)
        extractor = load_extractor(tmp_path)
        assert extractor.labels == labels
        with torch.no_grad():
            is_large = classifier(uint8_images(9))[:, 1:].argmax(dim=1)
        expected = [{"kind": "a", "size": labels["size"][place]} for place in is_large.tolist()]
        assert extractor.recognize(uint8_images(9)) == expected

    def test_without_labels_nothing_is_recognized(self, folder):
        with pytest.raises(ValueError, match="expected an extractor with labels"):
            load_extractor(folder).recognize(uint8_images(2))

    def test_refuses_labels_of_another_classifier(self, folder):
        config = json.loads((folder / CONFIG_FILE).read_text())
        (folder / CONFIG_FILE).write_text(json.dumps(config | {"labels": {"kind": ["a", "b"]}}))
        with pytest.raises(ValueError, match=r"config\.json: labels: expected 3 in all, one for each logit, got 2"):
            load_extractor(folder)

    def test_its_own_reference_is_at_distance_zero(self, folder):
        extractor = load_extractor(folder)
        statistics = feature_statistics(extractor(uint8_images(60)))
        assert frechet_distance(*statistics, extractor.reference_mean, extractor.reference_covariance) < 1e-9

    def test_is_frozen_float32_and_deterministic(self, folder):
        extractor = load_extractor(folder)
        first = extractor(uint8_images(7))
        assert first.dtype == torch.float32
        assert not first.requires_grad
        assert not any(parameter.requires_grad for parameter in extractor.parameters())
        assert torch.equal(first, load_extractor(folder)(uint8_images(7)))

    def test_an_image_does_not_depend_on_its_batch(self, folder):
        # Batch statistics of a batch norm in train mode would break this.
        extractor = load_extractor(folder)
        whole, parts = extractor(uint8_images(7)), extract_features(extractor, uint8_images(7), batch_size=2)
        torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("file", [WEIGHTS_FILE, REFERENCE_FILE])
    @pytest.mark.parametrize(
        "damage",
        [
            lambda data: data[:-1] + bytes([data[-1] ^ 1]),
            lambda data: data[:-8],
            lambda data: data + b"\0",
            lambda data: b"",
        ],
        ids=["one bit", "truncated", "longer", "empty"],
    )
    def test_refuses_a_changed_file(self, folder, file, damage):
        (folder / file).write_bytes(damage((folder / file).read_bytes()))
        with pytest.raises(ValueError, match=rf"{file}: its SHA-256 is .* but config.json says"):
            load_extractor(folder)

    @pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE, REFERENCE_FILE])
    def test_names_a_missing_file(self, folder, file):
        (folder / file).unlink()
        with pytest.raises(FileNotFoundError, match=rf"{file}: not found"):
            load_extractor(folder)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda text: text[:40],
            lambda text: text.replace('"sha256"', '"sha"'),
            lambda text: text.replace("num_classes", "classes"),
            lambda text: "[]",
        ],
        ids=["truncated", "no digest", "unknown size", "list"],
    )
    def test_refuses_an_unreadable_config(self, folder, damage):
        (folder / CONFIG_FILE).write_text(damage((folder / CONFIG_FILE).read_text()))
        with pytest.raises(ValueError, match=r"config.json: expected JSON with name"):
            load_extractor(folder)

    def test_refuses_the_name_fid(self, tmp_path):
        mean, covariance = feature_statistics(torch.rand(5, 12))
        with pytest.raises(ValueError, match="FID is the distance on Inception-v3 features"):
            save_extractor(
                tmp_path,
                tiny_classifier(),
                name="FMNIST FID",
                mean=mean,
                covariance=covariance,
                features=torch.rand(5, 12),
                facts={},
            )


def test_the_base_class_says_what_is_missing():
    reference = {"reference_mean": torch.zeros(1), "reference_covariance": torch.ones(1, 1)}
    extractor = FeatureExtractor(
        name="x", sha256="", reference_sha256="", reference_features=torch.zeros(2, 1), **reference
    )
    with pytest.raises(NotImplementedError, match="must implement forward"):
        extractor(uint8_images(1))
