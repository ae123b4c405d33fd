"""Pictures that have prompts, as a text-to-image model is trained on them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class PromptedPictures:
    """A finite set of pictures, drawn when they are asked for.

    `draw(rows)` gives the pictures with these numbers, (B, C, H, W) uint8, each always the same. `choices` (N, K)
    int64 are the K prompts of each of the N pictures, places in `prompts`. `held_out_prompts` are prompts of the same
    kind of which there is no picture here. `wanted(prompt)` is what a picture of it has to show: a label of each
    attribute that the prompt names, one of `labels`.
    """

    draw: Callable[[Tensor], Tensor]
    prompts: Sequence[str]
    choices: Tensor
    held_out_prompts: Sequence[str]
    labels: Mapping[str, Sequence[str]]
    wanted: Callable[[str], dict[str, str]]

    def __len__(self) -> int:
        return len(self.choices)
