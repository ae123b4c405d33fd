"""Checksums of packed layers: what a file of format version 2 holds beside their tensors, to find damage and edits.

The checksum of a layer is an int64 tensor of CRC-32 numbers: of its name, of its settings, then of each of its packed
tensors, in the order of PACKED_BUFFERS; `examples/guides/format.md` defines them. It is computed when a state dict is
made, and not kept: it cannot grow old.
"""

import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffusers_pqcad.kernels.native.crc32 import crc32

CHECKSUM = "checksum"
PACKED_BUFFERS = ("qweight", "weight_scale", "input_scale", "input_zero_point")
NUM_HEADERS = 2  # name and settings


def crc32_of_json(value: Any) -> int:
    """Return the CRC-32 of `value` as JSON text."""
    return zlib.crc32(json.dumps(value).encode())


def tensor_checksum(name: str, tensor: Tensor) -> int:
    """Return the CRC-32 of the JSON of [name, dtype, shape] followed by the bytes of `tensor`."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return crc32(tensor, crc32_of_json([name, dtype, list(tensor.shape)]))


def layer_checksum(name: str, settings: Sequence[Any], tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the checksum, int64 (2 + len(tensors),), of the layer `name`.

    `settings` are its bits, group size, activation bits and timestep boundaries; `tensors` its packed ones, in order.
    """
    numbers = [tensor_checksum(tensor_name, tensor) for tensor_name, tensor in tensors.items()]
    return torch.tensor([crc32_of_json(name), crc32_of_json(settings), *numbers], dtype=torch.int64, device="cpu")


def empty_checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return an uninitialized checksum of a layer with `tensors`, on their device."""
    device = next(iter(tensors.values())).device
    return torch.empty(NUM_HEADERS + len(tensors), dtype=torch.int64, device=device)


def names_by_number(names: Iterable[str]) -> dict[int, str]:
    """Return the `names` of layers by the number that stands for them in a checksum."""
    return {crc32_of_json(name): name for name in names}


def refuse_other_checksum(name: str, stored: Tensor, found: Tensor, owners: Mapping[int, str]) -> None:
    """Raise ValueError where `stored`, from a file, is not what was `found` for the layer `name`.

    A layer that was saved under another name is refused where that is one of `owners`, the layers of its model: two
    changed places. Else the whole model was renamed, as a part of a larger one is.
    """
    header, settings, *numbers = stored.tolist()
    own_header, own_settings, *own_numbers = found.tolist()
    for tensor_name, number, own_number in zip(PACKED_BUFFERS, numbers, own_numbers, strict=False):
        if number != own_number:
            raise ValueError(
                f"{name}.{tensor_name}: its checksum is {own_number:08x}, not {number:08x}. The file was damaged or "
                "edited: download it, or save the model, again."
            )
    if settings != own_settings:
        raise ValueError(
            f"{name}: it was saved with other settings. The bits, group_size, activation_bits or timestep_boundaries "
            "in the quantization_config of config.json were edited, or belong to another file."
        )
    if header != own_header and header in owners:
        raise ValueError(
            f"{name}.{CHECKSUM}: the tensors of this layer are those of {owners[header]}. The file was edited."
        )
