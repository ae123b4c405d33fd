"""What `pipe.push_to_hub` and `pqcad push` do alike: the card of a pipeline's folder, with what figures there are."""

import hashlib
import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, snapshot_download

from diffusers_pqcad.loading.saved import INDEX_FILE, saved_models, weight_files
from diffusers_pqcad.publishing.hub import model_card, write_card
from diffusers_pqcad.publishing.pushing import CARD, published_files, without_places
from diffusers_pqcad.publishing.quantized_card import SOURCE_FILE, note_source, quantized_card
from diffusers_pqcad.publishing.run_folder import load_json

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.json"
# What a run leaves beside a pipeline's parts.
FIGURES = (SOURCE_FILE, METRICS_FILE, "history.json", "recipe.yaml", "prompts.txt", CARD)
SMALL_FILES = (*FIGURES, INDEX_FILE, "assets/*.png", "*/config.json", "*/*.safetensors.index.json")
# As diffusers begins a card that nobody wrote: by `save_pretrained(push_to_hub=True)`, and by `push_to_hub`.
GENERATED = tuple(
    f"This is the model card of a 🧨 diffusers {kind} that has been pushed on the Hub. This model card has been "
    "automatically generated."
    for kind in ("pipeline", "model")
)


def refresh_card(folder: Path, repo: str, license_id: str | None = None, on_hub: str | None = None) -> bool:
    """Write the card of the pipeline in `folder` for `repo`; return whether there is anything quantized to write of.

    That of a run of `compress` has the run's figures. What others wrote in the card stays.
    """
    if (folder / METRICS_FILE).is_file():
        metrics = load_json(folder / METRICS_FILE)
        license_id = license_id or metrics["settings"].get("license")
        card = model_card(metrics, repo=repo, license_id=license_id)
    elif any(model.quantization is not None for model in saved_models(folder).values()):
        card = quantized_card(folder, repo=repo, license_id=license_id)
    else:
        return False
    write_card(folder, card, on_hub=on_hub)
    return True


def add_card(pipeline: Any, folder: str | Path, repo: str) -> None:
    """Write the card of a quantized `pipeline`, which was saved in `folder` to be uploaded to `repo`.

    Where it is what it was loaded from, to the last bit, the figures that lie there go with it. Places of this
    computer are taken out of the configs.
    """
    folder, origin = Path(folder), str(getattr(pipeline.config, "_name_or_path", None) or "")
    card = folder / CARD
    if card.is_file() and is_generated(card.read_text(encoding="utf-8")):
        card.unlink()
    before = place_of(origin) if origin else None
    if before is not None and has_same_weights(before, folder):
        take_figures(before, folder)
    elif origin:
        note_source(folder, origin)
    refresh_card(folder, repo)
    for name in published_files(folder):
        content = without_places(folder / name)
        if isinstance(content, bytes):
            (folder / name).write_bytes(content)


def place_of(origin: str) -> Path | None:
    """Return the folder of a pipeline that was loaded from `origin`; of a repository, what is kept of it here.

    Its small files are fetched where they are not here yet; None where they cannot be.
    """
    if Path(origin).is_dir():
        return Path(origin)
    try:
        return Path(snapshot_download(origin, allow_patterns=list(SMALL_FILES)))
    except Exception as error:  # of the network, or of a repository that is gone
        logger.warning(
            "Figures that lie in %s are not in the card: it cannot be reached (%s).", origin, type(error).__name__
        )
        return None


def is_generated(card: str) -> bool:
    """Return whether `card` is the one that diffusers makes where there is none, and nobody wrote in it."""
    made = [ModelCard.from_template(ModelCardData(), model_description=text).text.strip() for text in GENERATED]
    return ModelCard(card, ignore_metadata_errors=True).text.strip() in made


def has_same_weights(origin: Path, folder: Path) -> bool:
    """Return whether the models of two pipelines' folders have the same files of weights."""
    try:
        names = (set(saved_models(origin)), set(saved_models(folder)))
        pairs = [(origin / name, folder / name) for name in names[0]]
        return names[0] == names[1] and all(
            told(one) == told(other) for told in (sizes_of, hashes_of) for one, other in pairs
        )
    except (OSError, ValueError):  # one is no pipeline's
        return False


def sizes_of(folder: Path) -> dict[str, int]:
    """Return the bytes of each file of a model's weights by name."""
    return {name: (folder / name).stat().st_size for name in weight_files(folder)}


def hashes_of(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a model's weights by name."""
    found = {}
    for name in weight_files(folder):
        with (folder / name).open("rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def take_figures(origin: Path, folder: Path) -> None:
    """Copy what a run left beside the pipeline in `origin` to `folder`; a card that is there stays."""
    for name in FIGURES:
        if (origin / name).is_file() and not (folder / name).exists():
            shutil.copyfile(origin / name, folder / name)
    for picture in sorted((origin / "assets").glob("*.png")):
        (folder / "assets").mkdir(exist_ok=True)
        shutil.copyfile(picture, folder / "assets" / picture.name)
