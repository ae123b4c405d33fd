"""The front matter of cards, by huggingface_hub's own classes: what the Hub filters, links and shows models by."""

import inspect
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from diffusers_pqcad.publishing.pushing import CARD, is_repo_id

logger = logging.getLogger(__name__)

LICENSE_KEYS = ("license", "license_name", "license_link")
UNNAMED_TASK = "image-generation"  # in a model index, of pipelines for which the Hub has no task
# Figures of a table's row that others print, too: the field, the Hub's name of the metric, and what it is.
FIGURES = (
    ("sqnr_db", "sqnr", "SQNR in dB, against full precision from the same noise"),
    ("image_psnr_db", "psnr", "PSNR in dB of the pictures, against full precision from the same noise"),
    ("image_ssim", "ssim", "SSIM of the pictures, against full precision from the same noise"),
    ("lpips", "lpips", "LPIPS of the pictures, against full precision from the same noise"),
    ("clip_score", "clip_score", "CLIP score of the pictures and their prompts"),
    ("frechet_distance", "frechet_distance", None),  # the row has the name of it
    ("prompt_accuracy", "prompt_accuracy", "Share of the pictures that show what their prompts say"),
)


class Facts(NamedTuple):
    """What the Hub is told of a model: its name there, task and base model, where there are some, licence and more."""

    repo: str
    task: str | None
    base_model: str | None
    license: Mapping[str, str]
    datasets: Sequence[str]
    tags: Sequence[str]


def front_matter(facts: Facts, row: Mapping[str, Any] | None, inputs: str) -> str:
    """Return the front matter of a card, with its rules; `row` is the table's row of the model, if it was measured.

    `inputs` says what the images of the row were made from.
    """
    results = [] if row is None else eval_results(row, facts, inputs)
    related: dict[str, Any] = {} if facts.base_model is None else {"base_model_relation": "quantized"}
    related |= facts.license
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=facts.task,
        base_model=facts.base_model,
        datasets=list(facts.datasets) or None,
        tags=list(facts.tags),
        model_name=facts.repo if results else None,
        eval_results=results or None,
        **related,
    )
    return f"---\n{data.to_yaml()}\n---\n"


def eval_results(row: Mapping[str, Any], facts: Facts, inputs: str) -> list[EvalResult]:
    """Return the figures of a table's `row` that were measured and are finite, with n, seed and steps beside them."""
    arguments = {
        "num_images": row["num_images"],
        "seed": row["seed"],
        "num_inference_steps": row["num_inference_steps"],
        "reference_num_inference_steps": row["reference_num_inference_steps"],
    }
    found = []
    for name, kind, text in FIGURES:
        value = row.get(name)
        if value is None or not math.isfinite(float(value)):
            continue
        found.append(
            EvalResult(
                task_type=facts.task or UNNAMED_TASK,
                dataset_type=next(iter(facts.datasets), "generated"),
                dataset_name=inputs,
                metric_type=kind,
                metric_value=float(f"{float(value):.6g}"),
                metric_name=text or row["metric_name"],
                metric_args=arguments,
            )
        )
    return found


def task_of(kind: type) -> str | None:
    """Return the Hub's task of a class of pipelines, by what it is called with; None where the Hub has none for it."""
    names = inspect.signature(kind.__call__).parameters
    takes_image = "image" in names and ("strength" in names or "prompt" not in names)
    if "class_labels" in names:
        return None
    if "num_frames" in names:
        return "image-to-video" if "image" in names else "text-to-video"
    if takes_image:
        return "image-to-image"
    return "text-to-image" if "prompt" in names else "unconditional-image-generation"


def license_of(base: str) -> dict[str, str]:
    """Return what the card of a `base` pipeline, a folder or a repository, says of its licence; nothing is guessed.

    Where it cannot be read, or says nothing, that is logged.
    """
    card = Path(base) / CARD
    try:
        if Path(base).is_dir() and not card.is_file():
            found: dict[str, Any] = {}
        else:
            found = ModelCard.load(card if card.is_file() else base, ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # of the network, or of a card that is none
        logger.warning("license: the card of %s cannot be read (%s).", base, type(error).__name__)
        return {}
    values = {key: str(found[key]) for key in LICENSE_KEYS if isinstance(found.get(key), str)}
    if "license" not in values:
        logger.warning("license: the card of %s names none. Give --license, if you know it.", base)
    return values if "license" in values else {}


def base_model_of(name: str, *, is_on_hub: bool) -> str | None:
    """Return the repository `name` of a base model; None for a local one, with which the Hub would refuse the card."""
    return name if is_on_hub and is_repo_id(name) else None
