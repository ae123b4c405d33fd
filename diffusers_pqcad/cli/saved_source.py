"""What a command is given as MODEL: a folder, or a repository of the Hub, whose weights are not downloaded."""

import json
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.utils import HfHubHTTPError

from diffusers_pqcad.loading.saved import (
    INDEX_FILE,
    WEIGHTS,
    SavedModel,
    TensorHeader,
    header_of,
    is_model,
    saved_models,
)

CONFIGS = ["*.json", "*/*.json"]


def models_of(path: str, revision: str | None = None) -> dict[str, SavedModel]:
    """Return the models of a pipeline or a model by name, with their headers alone; raises ValueError for neither."""
    if Path(path).is_dir():
        return saved_models(path)
    if Path(path).exists():
        raise ValueError(f"{path}: expected a folder or a repository of the Hub, got a file.")
    try:
        return models_on_hub(path, revision)
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise ValueError(f"{path}: no such folder, and not to be had from the Hub: {error}") from error


def models_on_hub(repo: str, revision: str | None = None) -> dict[str, SavedModel]:
    """Return the models of a repository: its small files, and the headers of its weights."""
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=CONFIGS))
    if list(folder.glob("**/*.safetensors")):  # it was downloaded before
        return saved_models(folder)
    files = HfApi().list_repo_files(repo, revision=revision)
    if not (folder / INDEX_FILE).is_file():
        return {repo.rpartition("/")[2]: model_on_hub(repo, files, folder, "", revision)}
    parts = json.loads((folder / INDEX_FILE).read_text())
    names = [name for name, value in parts.items() if is_model(value) and (folder / name / "config.json").is_file()]
    return {name: model_on_hub(repo, files, folder / name, f"{name}/", revision) for name in names}


def model_on_hub(repo: str, files: list[str], folder: Path, prefix: str, revision: str | None = None) -> SavedModel:
    """Return the model below `prefix` of a repository, whose small files are in `folder`."""
    here = [name for name in files if name.startswith(prefix) and "/" not in name.removeprefix(prefix)]
    plain = [f"{prefix}{stem}.safetensors" for stem in WEIGHTS if f"{prefix}{stem}.safetensors" in here]
    shards = [name for name in here if name.endswith(".safetensors") and "-of-" in name]
    tensors: dict[str, TensorHeader] = {}
    for name in plain or shards:
        for tensor, found in HfApi().parse_safetensors_file_metadata(repo, name, revision=revision).tensors.items():
            tensors[tensor] = header_of(tensor, found.dtype, found.shape)
    if not tensors:
        raise ValueError(f"{prefix or repo}: expected weights in .safetensors files, got {here}.")
    return SavedModel(folder.name, json.loads((folder / "config.json").read_text()), tensors)
