"""Specification of `diffusers_pqcad.evaluation.prompts`, with a classifier whose answers are known."""

import pytest
import torch

from diffusers_pqcad.evaluation.features import ClassifierExtractor, SmallClassifier
from diffusers_pqcad.evaluation.prompts import prompts_met

LABELS = {"thing": ["apple", "pear", "fig"], "colour": ["dark", "light"]}


class KnownAnswers(SmallClassifier):
    """Finds thing i in an image whose first pixel is i, and light where its last pixel is."""

    def __init__(self):
        super().__init__(image_size=8, channels=(4, 4, 4), num_features=4, num_classes=5)

    def forward(self, images):
        logits = torch.zeros(len(images), 5)
        logits[torch.arange(len(images)), images[:, 0, 0, 0].long()] = 1
        logits[torch.arange(len(images)), 3 + (images[:, 0, -1, -1] > 127).long()] = 1
        return logits


@pytest.fixture
def extractor():
    empty = torch.zeros(0)
    reference = {"reference_mean": empty, "reference_covariance": empty, "reference_features": empty}
    return ClassifierExtractor(KnownAnswers(), LABELS, name="known", sha256="", reference_sha256="", **reference)


@pytest.fixture
def images():
    """A dark apple, a light pear, a light fig."""
    images = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.tensor([0, 1, 2])
    images[1:, 0, -1, -1] = 255
    return images


def test_all_that_a_prompt_says_has_to_be_found(extractor, images):
    wanted = [
        {"thing": "apple", "colour": "dark"},
        {"thing": "pear", "colour": "dark"},
        {"thing": "apple", "colour": "light"},
    ]
    assert prompts_met(extractor, images, wanted).tolist() == [True, False, False]


def test_what_a_prompt_does_not_say_does_not_count(extractor, images):
    assert prompts_met(extractor, images, [{"thing": "apple"}, {"colour": "light"}, {}]).tolist() == [True] * 3


def test_batches_do_not_matter(extractor, images):
    wanted = [{"thing": "apple"}, {"thing": "apple"}, {"thing": "fig"}]
    assert prompts_met(extractor, images, wanted, batch_size=2).tolist() == [True, False, True]


@pytest.mark.parametrize("wish", [{"thing": "plum"}, {"size": "large"}])
def test_an_unknown_label_is_refused(extractor, images, wish):
    with pytest.raises(ValueError, match=r"wanted: known knows no (thing 'plum'|size 'large')"):
        prompts_met(extractor, images, [wish] * 3)


def test_another_number_of_prompts_is_refused(extractor, images):
    with pytest.raises(ValueError, match="expected one for each of the 3 images, got 2"):
        prompts_met(extractor, images, [{}, {}])
