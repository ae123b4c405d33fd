"""Pictures of a run: samples on the same seeds, bits by layer, and what was learned when."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from diffusers_pqcad.compression.extras import require

BIT_COLOURS = {2: "#7b3294", 3: "#c2a5cf", 4: "#5aae61", 6: "#4393c3", 8: "#2166ac"}
MAX_TITLE = 36  # characters


def _pyplot() -> Any:
    """Return matplotlib's pyplot, which draws into files; MissingExtraError where there is none."""
    require("eval", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")  # the backend comes first
    import matplotlib.pyplot

    return matplotlib.pyplot


def plot_samples(path: str | Path, samples: dict[str, Tensor], titles: Sequence[str] = ()) -> None:
    """Write a grid: one row for each named set of images (n, C, H, W) uint8, the same seed in each column.

    Of videos (n, frames, C, H, W) the first frame. `titles`, of the columns, are prompts: their first words are shown.
    """
    plt = _pyplot()
    columns = len(next(iter(samples.values())))
    size = (columns * 0.8 + 2.2, len(samples) * 0.95 + (0.4 if titles else 0))
    figure, axes = plt.subplots(len(samples), columns, figsize=size, squeeze=False)
    for row, (name, images) in zip(axes, samples.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            pixels = (image if image.ndim == 3 else image[0]).permute(1, 2, 0).numpy()
            axis.imshow(pixels if pixels.shape[-1] == 3 else pixels[..., 0], cmap="gray", vmin=0, vmax=255)
            axis.set_xticks([])
            axis.set_yticks([])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    for axis, title in zip(axes[0], titles, strict=False):
        words = title if len(title) <= MAX_TITLE else f"{title[: MAX_TITLE - 3]}..."
        axis.set_title(textwrap.fill(words, 13), fontsize=6, parse_math=False)  # dollars are dollars
    figure.tight_layout(pad=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_bits(path: str | Path, rounds: list[dict[str, Any]]) -> None:
    """Write the bits of every layer (rows) over the rounds (columns), with the average on top."""
    plt = _pyplot()
    layers = list(rounds[-1]["bits"])
    figure, (top, axis) = plt.subplots(
        2, 1, figsize=(9, 2 + 0.16 * len(layers)), sharex=True, gridspec_kw={"height_ratios": [1, 0.13 * len(layers)]}
    )
    top.plot(range(len(rounds)), [entry["average_bits"] for entry in rounds], "k.-")
    top.set_ylabel("average bits")
    for column, entry in enumerate(rounds):
        for line, layer in enumerate(layers):
            axis.barh(line, 0.96, left=column - 0.48, color=BIT_COLOURS[entry["bits"][layer]], height=0.9)
    axis.set_yticks(range(len(layers)), layers, fontsize=5)
    axis.invert_yaxis()
    axis.set_xlabel("round")
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in BIT_COLOURS.values()]
    top.legend(handles, [f"{bits} bits" for bits in BIT_COLOURS], ncol=5, fontsize=7, loc="upper right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_curves(path: str | Path, distillation: dict[str, list[dict[str, Any]]]) -> None:
    """Write the held-out trajectory errors of every distillation arm."""
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(5, 3.2))
    for name, stats in distillation.items():
        entries = [entry for entry in stats if entry["held_out_error"] is not None]
        errors = [entry["held_out_error"] for entry in entries]
        axis.plot([entry["step"] for entry in entries], errors, ".-", label=name)
    axis.set_title("CAD", fontsize=10)
    axis.set_xlabel("updates")
    axis.set_ylabel("held-out trajectory error")
    axis.set_yscale("log")
    if axis.lines:
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
