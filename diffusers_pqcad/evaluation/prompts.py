"""Whether pictures show what their prompts say, as a classifier sees it."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from diffusers_pqcad.compression.processes import each
from diffusers_pqcad.evaluation.features import ClassifierExtractor


def prompts_met(
    extractor: ClassifierExtractor,
    images: Tensor,
    wanted: Sequence[Mapping[str, str]],
    *,
    batch_size: int = 256,
) -> Tensor:
    """Return for each of `images` (N, C, H, W) uint8 whether it shows what its prompt says, (N,) bool.

    `wanted[i]` is what prompt i says, a label of one attribute or of more: {"emoji": "red apple", "colour": "blue"}.
    The classifier has to find all of it; other attributes do not count. The mean is the prompt accuracy; models with
    the same prompts and seeds can be compared image by image.

    Raises ValueError for another number of prompts than of images, and for a label that `extractor` does not know.
    """
    if len(wanted) != len(images):
        raise ValueError(f"wanted: expected one for each of the {len(images)} images, got {len(wanted)}.")
    check_wanted(extractor, wanted)
    found = [shown for batch in each(images.split(batch_size), extractor.recognize) for shown in batch]
    return torch.tensor([wish.items() <= shown.items() for wish, shown in zip(wanted, found, strict=True)])


def check_wanted(extractor: ClassifierExtractor, wanted: Sequence[Mapping[str, str]]) -> None:
    """Raise ValueError for a label, of what prompts say, that `extractor` does not know."""
    for attribute, label in {item for entry in wanted for item in entry.items()}:
        if label not in extractor.labels.get(attribute, ()):
            raise ValueError(
                f"wanted: {extractor.name} knows no {attribute} {label!r}. Expected labels of its config.json, of "
                f"{tuple(extractor.labels)}."
            )
