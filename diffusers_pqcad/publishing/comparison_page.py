"""A comparison as one HTML file, which needs no network, and as one picture."""

import base64
import io
from collections.abc import Sequence
from html import escape
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffusers_pqcad.evaluation.comparison import Comparison, ImagePair
from diffusers_pqcad.loading.inspection import LayerInfo
from diffusers_pqcad.publishing.hub import kernels_that_ran
from diffusers_pqcad.publishing.plots import BIT_COLOURS, plot_samples

NUM_WORST = 5
MAX_COLUMNS = 8  # of the picture
SMALL = 128  # pixels: what is smaller is shown with its pixels as squares
FLOAT_COLOUR = "#999999"
FULL_BITS = 8  # the height of a strip; floating point is as high


def comparison_page(comparison: Comparison) -> str:
    """Return the HTML file of a comparison: all that it needs is in it. Prompts are shown, and do nothing."""
    a, b = comparison.sides
    worst_first, factor = comparison.worst_first(), amplification(comparison)
    others = worst_first[NUM_WORST:]
    parts = {
        "title": escape(f"{b.name} against {a.name}"),
        "name_a": escape(a.name),
        "name_b": escape(b.name),
        "figures": figures_table(comparison),
        "notes": escape(notes(comparison)),
        "amplified": f"shown {factor} times as large" if factor > 1 else "shown as they are",
        "rendering": "image-rendering: pixelated;" if max(comparison.pictures[0].shape[-2:]) < SMALL else "",
        "num_worst": str(min(NUM_WORST, len(worst_first))),
        "worst": figures_of(comparison, worst_first[:NUM_WORST], factor),
        "others": f'<h2>The others</h2>\n<div class="pairs">{figures_of(comparison, others, factor)}</div>'
        if others
        else "",
        "bits": bits_by_layer(comparison),
        "environment": environment_list(comparison.speed.environment),
    }
    template = files("diffusers_pqcad.publishing").joinpath("comparison.html").read_text(encoding="utf-8")
    return Template(template).substitute(parts)


def save_comparison(comparison: Comparison, path: Path) -> Path:
    """Write the page to `path`, and the picture of the worst pairs beside it, whose path is returned."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(comparison_page(comparison), encoding="utf-8")
    picture = path.with_suffix(".png")
    shown = [pair.index for pair in comparison.worst_first()[:MAX_COLUMNS]]
    first, second = (pictures[shown] for pictures in comparison.pictures)
    factor = amplification(comparison)
    rows = {"A": first, "B": second, f"difference x{factor}": difference(first, second, factor)}
    plot_samples(picture, rows, [caption(pair) for pair in comparison.worst_first()[:MAX_COLUMNS]])
    return picture


def difference(first: Tensor, second: Tensor, factor: int) -> Tensor:
    """Return |first - second| of uint8 pictures, `factor` times as large, clamped."""
    return (factor * (first.int() - second.int()).abs()).clamp(max=255).to(torch.uint8)


def amplification(comparison: Comparison) -> int:
    """Return how many times as large differences are shown: one number in a hundred reaches white, or 16 times do."""
    first, second = comparison.pictures
    large = int(np.percentile((first.int() - second.int()).abs().numpy(), 99))
    return max(1, min(16, 255 // max(1, large)))


def data_uri(picture: Tensor) -> str:
    """Return a picture (C, H, W) uint8, of one or three channels, as a PNG in a data URI."""
    pixels = picture[0] if len(picture) != 3 else picture.permute(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def caption(pair: ImagePair) -> str:
    """Return what a pair was made from: its prompt, or all of its inputs, or its number."""
    inputs = pair.inputs
    if "prompt" in inputs:
        return str(inputs["prompt"])
    return ", ".join(f"{name} {value}" for name, value in inputs.items()) or f"image {pair.index}"


def figures_of(comparison: Comparison, pairs: Sequence[ImagePair], factor: int) -> str:
    """Return the figures of some pairs: A and B with a slider, their difference, what they were made from."""
    first, second = comparison.pictures
    return "\n".join(figure(pair, first[pair.index], second[pair.index], factor) for pair in pairs)


def figure(pair: ImagePair, first: Tensor, second: Tensor, factor: int) -> str:
    """Return the figure of one pair."""
    text = escape(caption(pair))
    ratios = f"SQNR {decibel(pair.sqnr_db)}, PSNR {decibel(pair.psnr_db)}, SSIM {pair.ssim:.4f}"
    return (
        f'<figure id="image-{pair.index}"><div class="views"><div><div class="stack">'
        f'<img alt="A: {text}" src="{data_uri(first)}"><img class="over" alt="B: {text}" src="{data_uri(second)}">'
        '<div class="edge"></div></div><input type="range" min="0" max="100" value="50" aria-label="A left, B '
        'right"><div class="labels"><span class="a">A</span><span class="b">B</span></div></div>'
        f'<div><img alt="difference" src="{data_uri(difference(first, second, factor))}">'
        f'<div class="labels"><span>difference</span></div></div></div>'
        f"<figcaption>{text}<br><small>image {pair.index}: {ratios}</small></figcaption></figure>"
    )


def decibel(value: float) -> str:
    """Return a ratio as text."""
    return "equal" if value == float("inf") else f"{value:.2f} dB"


def figures_table(comparison: Comparison) -> str:
    """Return the table of both sides: what they cost, and how close B comes."""
    medians, fidelity, speed = comparison.medians(), comparison.fidelity, comparison.speed
    header = ["", "bytes of the denoiser", "bits a weight", "steps", "model evaluations", "ms an image", "speed-up"]
    header += ["median SQNR", "SQNR of the mean (95 %)", "median PSNR", "median SSIM"]
    latencies = speed.reference_latency_ms.median_ms, speed.latency_ms.median_ms
    rows = []
    for letter, side, cost, latency in zip("AB", comparison.sides, comparison.costs, latencies, strict=True):
        size = cost.tensor_bytes if cost.size_bytes is None else cost.size_bytes
        rows.append(
            [
                f"<span class={letter.lower()}>{letter}</span> {escape(side.name)}",
                f"{size:,}".replace(",", "&#8239;"),
                f"{cost.average_bits:.2f}",
                str(side.num_inference_steps),
                str(cost.model_evaluations),
                f"{latency:.2f}",
                f"{latencies[0] / latency:.2f}",
            ]
        )
    low, high = map(decibel, fidelity.sqnr_interval_db)
    rows[0] += ["(reference)", "", "", ""]
    rows[1] += [
        decibel(medians["sqnr_db"]),
        f"{decibel(fidelity.sqnr_db)} [{low}, {high}]" if low != "equal" else "equal",
        decibel(medians["psnr_db"]),
        f"{medians['ssim']:.4f}",
    ]
    head = "".join(f"<th>{cell}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def notes(comparison: Comparison) -> str:
    """Return what a reader must know to read the table."""
    settings = [f"{name} {value}" for name, value in comparison.call_arguments.items()]
    settings += [
        f"{letter} alone: {name} {value}"
        for letter, side in zip("AB", comparison.sides, strict=True)
        for name, value in side.arguments.items()
    ]
    kernels = [
        f"Kernels of {letter}: {kernels_that_ran(cost.kernels) if cost.kernels else 'it is in floating point'}."
        for letter, cost in zip("AB", comparison.costs, strict=True)
    ]
    of = comparison.fidelity.fidelity_of
    return " ".join(
        [
            f"{len(comparison.pairs)} images, seed {comparison.seed}, the same noise for both"
            f"{'; ' + ', '.join(settings) if settings else ''}.",
            f"SQNR: of the final {of}. PSNR and SSIM: of the pictures, 8 bits a channel.",
            "ms an image: median of rounds in which both take turns, batch "
            f"{comparison.speed.latency_batch_size}, without decoding.",
            *kernels,
        ]
    )


def bits_by_layer(comparison: Comparison) -> str:
    """Return a strip of all layers for each side, as high as their bits, and the table of those that differ."""
    strips = [
        f'<p><span class="{letter.lower()}">{letter}</span> {escape(side.name)}</p>{strip(layers)}'
        for letter, side, layers in zip("AB", comparison.sides, comparison.layers, strict=True)
    ]
    colours = {f"{bits} bits": colour for bits, colour in BIT_COLOURS.items()} | {"floating point": FLOAT_COLOUR}
    key = "".join(f'<span style="background: {colour}"></span>{name}' for name, colour in colours.items())
    theirs = {layer.name: layer for layer in comparison.layers[0]}
    rows = "".join(
        f"<tr><td>{escape(layer.name)}</td><td>{'x'.join(map(str, layer.shape))}</td>"
        f"<td>{theirs[layer.name].bits if layer.name in theirs else '-'}</td><td>{layer.bits}</td>"
        f"<td>{escape(layer.activations)}</td><td>{escape(layer.kernel or '-')}</td></tr>"
        for layer in comparison.layers[1]
    )
    head = "".join(
        f"<th>{name}</th>" for name in ("layer", "shape", "bits of A", "bits of B", "activations", "kernel")
    )
    return (
        f'{"".join(strips)}<p class="key note">{key}</p><details><summary>All layers of B</summary><div class="wide">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div></details>"
    )


def strip(layers: Sequence[LayerInfo]) -> str:
    """Return the layers of a model in their order as bars, as high as their bits."""
    bars = "".join(
        f'<span title="{escape(layer.name)}: {layer.bits} bits" '
        f'style="height: {min(100, 100 * layer.bits // FULL_BITS)}%; '
        f'background: {FLOAT_COLOUR if layer.kernel is None else BIT_COLOURS[layer.bits]}"></span>'
        for layer in layers
    )
    return f'<div class="strip">{bars}</div>'


def environment_list(environment: dict[str, Any]) -> str:
    """Return the circumstances of the times as a list."""
    return "".join(f"<dt>{escape(name)}</dt><dd>{escape(shown(value))}</dd>" for name, value in environment.items())


def shown(value: Any) -> str:
    """Return a value of the environment as text."""
    if isinstance(value, list):
        return ", ".join(f"{item:.2f}" if isinstance(item, float) else str(item) for item in value)
    return "none" if value is None else str(value)
