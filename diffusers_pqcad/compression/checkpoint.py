"""Resume files: nested dictionaries of tensors and plain values, in one safetensors file, written atomically."""

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

STRUCTURE_KEY = "structure"
DIGEST_KEY = "sha256"
TENSOR_KEY = "__tensor__"


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON, with every tensor moved to `tensors` and replaced by its name there."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{path}"  # numbered: {"a/b": x, "a": {"b": y}} are two tensors
        tensors[name] = value.detach()
        return {TENSOR_KEY: name}
    if isinstance(value, dict):
        return {"keys": [[key, _split(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(
        f"{path}: a checkpoint holds tensors, numbers, strings, lists and dictionaries; got {type(value)}."
    )


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `tensors` as a file takes them: contiguous, and each with memory of its own; only others are copied."""
    seen: set[int] = set()
    apart = {}
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        is_whole = tensor.is_contiguous() and storage.nbytes() == tensor.numel() * tensor.element_size()
        apart[name] = tensor if is_whole and storage.data_ptr() not in seen else tensor.clone().contiguous()
        seen.add(storage.data_ptr())
    return apart


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if TENSOR_KEY in value:
        return tensors[value[TENSOR_KEY]]
    if "keys" in value:
        return {key: _join(item, tensors) for key, item in value["keys"]}
    return value["value"]


# What a file system says of a file that does not fit: the disk is full, or the user's part of it, or the file's size.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class NotWrittenError(OSError):
    """A file could not be written, for want of room or of the folder around it; the message says what to do."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Give a path to write to, which takes the place of `path` at the end of the block; a kill leaves the old file.

    Raises NotWrittenError, the old file being as it was and nothing beside it, for a full disk or a folder that is
    gone.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".partial")
    try:
        with room_for(path):
            yield temporary
            os.replace(temporary, path)
    except Exception:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Raise NotWrittenError for what goes wrong inside the block where the disk or the folder of `path` is why."""
    try:
        yield
    except NotWrittenError:  # of a file in it
        raise
    except (OSError, SafetensorError) as error:
        if not path.parent.is_dir():
            raise NotWrittenError(
                f"{path}: cannot be written, as the folder {path.parent} is gone. Bring it back (a disk that is no "
                "longer mounted?), and the same call goes on from what it holds."
            ) from error
        if number_of(error) not in FULL:
            raise
        kept = "What was there is as it was." if path.exists() else "There was none before."
        raise NotWrittenError(
            f"{path}: cannot be written, as the disk is full ({os.strerror(number_of(error) or 0)}). {kept} Make "
            "room, and the same call goes on."
        ) from error


def number_of(error: Exception) -> int | None:
    """Return the `errno` of an error; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno
    return next((number for number in FULL if f"(os error {number})" in str(error)), None)


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state`, a nesting of dictionaries and lists over tensors and plain values; a kill leaves the old file.

    Raises NotWrittenError as `replacing` does: the folder has to be there.
    """
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_split(state, "", tensors))
    tensors = _apart(tensors)
    metadata = {STRUCTURE_KEY: structure, DIGEST_KEY: tensors_hash(tensors, structure)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what `save_checkpoint` wrote. Raises ValueError, naming the file, if it is damaged or of another kind."""
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            # Clones: tensors mapped from the file are not aligned as fresh ones are, and kernels then take other
            # paths, whose results differ in the last bit. A resumed run must not.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: this file is damaged ({error}). Delete it to start over.") from None
    if STRUCTURE_KEY not in metadata:
        raise ValueError(f"{path}: not a file of this package: its metadata has no {STRUCTURE_KEY!r}.")
    structure = metadata[STRUCTURE_KEY]
    found = tensors_hash(tensors, structure)
    if metadata.get(DIGEST_KEY) != found:
        raise ValueError(f"{path}: this file is damaged (its contents have another SHA-256). Delete it to start over.")
    return _join(json.loads(structure), tensors)


def plain_settings(settings: Any, later: Sequence[str]) -> dict[str, Any]:
    """Return the fields of a dataclass for a request, those that came `later` only where they are no defaults.

    A resume file that was begun before there were such fields has the defaults.
    """
    defaults = {item.name: item.default for item in fields(settings)}
    return {key: value for key, value in asdict(settings).items() if key not in later or value != defaults[key]}


def check_request(path: str | Path, saved: dict[str, Any], request: dict[str, Any]) -> None:
    """Raise ValueError unless a resume file was `saved` for this `request` (plain values): another one is no start."""
    theirs, mine = json.loads(saved.get("request", "{}")), json.loads(json.dumps(request))
    changed = {key: (theirs.get(key), mine.get(key)) for key in theirs | mine if theirs.get(key) != mine.get(key)}
    if changed:
        raise ValueError(
            f"{path} was begun with other settings; (there, now): {changed}. Delete it to start over, or name another."
        )


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically: a kill leaves the old one. Raises NotWrittenError as `replacing` does."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@torch.no_grad()
def copy_state_(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into the parameters and buffers of `model` (which keep their memory); keys must agree."""
    model.load_state_dict(state, strict=True)


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict of `model`."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def model_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of the state of `model`."""
    return tensors_hash(model.state_dict())


def tensors_hash(tensors: dict[str, Tensor], text: str = "") -> str:
    """Return the SHA-256 of `text` and of the names, dtypes, shapes and bytes of `tensors`, in any order."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
