"""Resume files: nested dictionaries of tensors and plain values, in one safetensors file, written atomically."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

STRUCTURE_KEY = "structure"
TENSOR_KEY = "__tensor__"


def _split(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return `value` as JSON, with every tensor moved to `tensors` and replaced by its name there."""
    if isinstance(value, Tensor):
        tensors[path] = value.detach().clone().contiguous()
        return {TENSOR_KEY: path}
    if isinstance(value, dict):
        return {"keys": [[key, _split(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_split(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise TypeError(f"{path}: a checkpoint holds tensors, numbers, strings, lists and dictionaries; got {type(value)}.")


def _join(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_join(item, tensors) for item in value]
    if TENSOR_KEY in value:
        return tensors[value[TENSOR_KEY]]
    if "keys" in value:
        return {key: _join(item, tensors) for key, item in value["keys"]}
    return value["value"]


def save_checkpoint(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state`, any nesting of dictionaries and lists over tensors and plain values; a kill leaves the old file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    structure = json.dumps(_split(state, "", tensors))
    temporary = path.with_name(path.name + ".partial")
    save_file(tensors, temporary, metadata={STRUCTURE_KEY: structure})
    os.replace(temporary, path)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Return what `save_checkpoint` wrote. Raises ValueError, naming the file, if it is damaged or of another kind."""
    try:
        with safe_open(str(path), framework="pt") as file:
            structure = (file.metadata() or {}).get(STRUCTURE_KEY)
            # Clones: tensors mapped from the file are not aligned as fresh ones are, and kernels then take other
            # paths, whose results differ in the last bit. A resumed run must not.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path}: this file is damaged ({error}). Delete it to start over.") from None
    if structure is None:
        raise ValueError(f"{path}: not a file of this package: its metadata has no {STRUCTURE_KEY!r}.")
    return _join(json.loads(structure), tensors)


@torch.no_grad()
def copy_state_(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Copy `state` into the parameters and buffers of `model` (which keep their memory); keys must agree."""
    model.load_state_dict(state, strict=True)


def clone_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the state dict of `model`."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def model_hash(model: nn.Module) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bytes of the state of `model`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()
