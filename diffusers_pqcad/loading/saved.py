"""Saved models by their configs and the headers of their files: everything but the weights."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffusers_pqcad.layers.checksums import CHECKSUM
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.loading.config import METHOD_NAMES, PQCADConfig
from diffusers_pqcad.loading.convert import is_transformers_model
from diffusers_pqcad.loading.placeholders import placeholders, refuse_misfit, refuse_missing, swap_in_placeholders_

INDEX_FILE = "model_index.json"
WEIGHTS = ("diffusion_pytorch_model", "model")  # of diffusers and transformers
# The names that safetensors has for dtypes.
DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


class TensorHeader(NamedTuple):
    """What a file says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its bytes in the file."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class SavedModel:
    """A model of a pipeline's folder, or one of its own: its config.json, and the headers of its files."""

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorHeader]

    @property
    def num_bytes(self) -> int:
        """The bytes of its tensors."""
        return sum(tensor.num_bytes for tensor in self.tensors.values())

    @property
    def quantization(self) -> PQCADConfig | None:
        """What it says of its quantization; None for one that is not quantized by this package, or says so falsely."""
        found = self.config.get("quantization_config")
        if not isinstance(found, Mapping) or found.get("quant_method") not in METHOD_NAMES:
            return None
        if not any(name.endswith(".qweight") for name in self.tensors):
            return None
        return PQCADConfig.from_dict(dict(found))


def saved_models(folder: str | Path) -> dict[str, SavedModel]:
    """Return the models in the folder of a pipeline, by their components' names; one of a model's own folder.

    Raises ValueError for a folder that is neither, and for weights in another format than safetensors.
    """
    folder = Path(folder)
    if (folder / INDEX_FILE).is_file():
        parts = json.loads((folder / INDEX_FILE).read_text())
        names = [
            name for name, value in parts.items() if is_model(value) and (folder / name / "config.json").is_file()
        ]
        return {name: saved_model(folder / name) for name in names}
    if (folder / "config.json").is_file():
        return {folder.name: saved_model(folder)}
    raise ValueError(
        f"{folder}: expected the folder of a pipeline ({INDEX_FILE}) or of a model (config.json), got neither."
    )


def is_model(entry: Any) -> bool:
    """Return whether an entry of a pipeline's index is a component that is there, such as ["diffusers", "UNet"]."""
    return isinstance(entry, list) and len(entry) == 2 and None not in entry


def saved_model(folder: Path) -> SavedModel:
    """Return the model that is saved in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    if not any((folder / name).exists() for name in weight_files(folder)):
        raise ValueError(
            f"{folder}: expected weights in .safetensors files, got {sorted(p.name for p in folder.iterdir())}."
        )
    tensors = {name: header for file in weight_files(folder) for name, header in headers_of(folder / file).items()}
    return SavedModel(folder.name, config, tensors)


def weight_files(folder: Path) -> list[str]:
    """Return the names of the files of a model's weights, those of its shards where there are several."""
    for stem in WEIGHTS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.is_file():
            return sorted(set(json.loads(index.read_text())["weight_map"].values()))
    found = [f"{stem}.safetensors" for stem in WEIGHTS if (folder / f"{stem}.safetensors").is_file()]
    return found or sorted(path.name for path in folder.glob("*.safetensors"))[:1]  # of one variant, such as fp16


def headers_of(path: Path) -> dict[str, TensorHeader]:
    """Return what the header of a safetensors file says of its tensors; raises ValueError for another kind of file."""
    try:
        with safe_open(str(path), framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no dictionary
            return {name: header_of(name, found.get_dtype(), found.get_shape()) for name, found in slices.items()}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: expected a safetensors file, which this is not, or not all of it ({error})."
        ) from None


def header_of(name: str, dtype: str, shape: Sequence[int]) -> TensorHeader:
    """Return the header of the tensor `name`; raises ValueError for a `dtype` that is none of DTYPES."""
    if dtype not in DTYPES:
        raise ValueError(f"{name}: expected a dtype out of {sorted(DTYPES)}, got {dtype}.")
    return TensorHeader(DTYPES[dtype], tuple(shape))


def class_of(config: Mapping[str, Any]) -> type:
    """Return the class of a saved model of diffusers or transformers; raises ValueError for one of neither."""
    name = str(config.get("_class_name") or next(iter(config.get("architectures") or []), None))
    library = diffusers if "_class_name" in config else transformers
    with suppress(AttributeError, TypeError):
        return getattr(library, name)
    raise ValueError(
        f"expected a model of diffusers or transformers, got {name!r}, which {library.__name__} does not have."
    )


def skeleton(saved: SavedModel) -> nn.Module:
    """Return the saved model without its weights: packed layers as its config says, tensors on meta as in its file.

    Raises ValueError for tensors that are missing, or are others than the config says.
    """
    config = {key: value for key, value in saved.config.items() if key != "quantization_config"}
    kind: Any = class_of(config)
    with init_empty_weights():
        if "_class_name" in config:
            model = kind.from_config(config)
        else:
            model = kind(kind.config_class.from_dict(config))
    quantization = saved.quantization
    if quantization is not None:
        swap_in_placeholders_(model, quantization, pre_quantized=True, dtype=torch.float32)
    fill_(model, saved.tensors)
    for layer in packed_layers(model).values():
        layer._buffers[CHECKSUM] = None  # as loading drops it
    return model.eval()


def fill_(model: nn.Module, tensors: Mapping[str, TensorHeader]) -> None:
    """Give the parameters and buffers of `model`, on meta, the dtypes that they have in a file."""
    for name, expected in placeholders(model).items():
        if name in tensors:
            refuse_misfit(name, *tensors[name], expected)
    if not is_transformers_model(model):  # which ties weights, and renames those of older files
        refuse_missing(sorted(name for name, _ in model.named_parameters() if name not in tensors))
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            header = tensors.get(f"{prefix}.{name}" if prefix else name)
            if parameter is not None and header is not None:
                refuse_shape(f"{prefix}.{name}", parameter, header)
                empty = torch.empty(header.shape, dtype=header.dtype, device="meta")
                module._parameters[name] = nn.Parameter(empty, requires_grad=False)


def refuse_shape(name: str, parameter: Tensor, header: TensorHeader) -> None:
    """Raise ValueError for a tensor of a file that has not the shape which the config gives it."""
    if tuple(parameter.shape) != header.shape:
        raise ValueError(
            f"{name}: expected shape {tuple(parameter.shape)}, by config.json, got {header.shape} in the file."
        )
