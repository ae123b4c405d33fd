"""scikit-learn's digits as tensors: 1 797 grey images of 8x8, in the package itself, so nothing is downloaded."""

import torch
from torch import Tensor

from diffusers_pqcad.compression.extras import require

SKLEARN_ID = "uci-digits"  # the test set of "Optical Recognition of Handwritten Digits"
DIGITS_NOTICE = """\
The weights were computed from the test set of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
1998, UCI Machine Learning Repository, https://doi.org/10.24432/C50P49, CC BY 4.0), as scikit-learn has it.
"""
LARGEST_VALUE = 16  # a pixel counts the set pixels of a 4x4 square


def load_digits() -> Tensor:
    """Return the images (1797, 1, 8, 8) uint8, 255 for the brightest; MissingExtraError without scikit-learn."""
    require("experiments", "sklearn")
    from sklearn import datasets

    images = torch.from_numpy(datasets.load_digits().images)
    return (images * (255 / LARGEST_VALUE)).round().to(torch.uint8).unsqueeze(1)
