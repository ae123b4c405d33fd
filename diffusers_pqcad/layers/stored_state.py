"""What a quantized layer stores: its packed tensors, as buffers and as entries of a state dict, and their checksum."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from diffusers_pqcad.layers.checksums import (
    CHECKSUM,
    PACKED_BUFFERS,
    empty_checksum,
    layer_checksum,
    refuse_other_checksum,
)
from diffusers_pqcad.layers.computed_weight import PackedMetadata
from diffusers_pqcad.layers.timesteps import TimestepGroups
from diffusers_pqcad.numerics.qparams import WeightSpec

SCALE_BUFFERS = ("weight_scale", "input_scale")  # always fp32, whatever the model's dtype
DTYPE_MARKER = "dtype_marker"


class StoredState(nn.Module):
    """The stored part of a quantized layer; a layer that is not packed stores what a float layer does.

    Buffers once packed: `qweight` uint8 (C_out, packed_row_bytes); `weight_scale` fp32 (C_out, G); where calibrated,
    `input_scale` fp32 and `input_zero_point` int32, both (number of timestep groups,). `dtype_marker` has the dtype of
    the computed weight: an empty buffer that is never saved, and that diffusers finds before the fp32 scales when it
    asks a layer without bias for its dtype. State dicts also hold a `checksum`, as checksums.py has it: a buffer only
    while a file is being loaded, and computed anew for each state dict.
    """

    # Class-level defaults: peft builds adapters with `type(base_layer)(...)`, and those must be plain float layers.
    spec: WeightSpec
    packed: bool = False
    activation_bits: int | None = None
    timestep_groups: TimestepGroups | None = None
    name: str = ""
    qweight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Registered as None from the start: a parallel loader walks the buffers while others are being filled.
        self.register_buffer(DTYPE_MARKER, None, persistent=False)
        for buffer in (*PACKED_BUFFERS, CHECKSUM):
            self.register_buffer(buffer, None)

    def packed_tensors(self) -> dict[str, Tensor]:
        """Return the packed tensors of this layer by name, in the order of PACKED_BUFFERS."""
        return {name: tensor for name in PACKED_BUFFERS if (tensor := self._buffers[name]) is not None}

    def is_here(self) -> bool:
        """Return whether the packed tensors of this layer have numbers: they are not on meta."""
        return all(tensor.device.type != "meta" for tensor in self.packed_tensors().values())

    def checksum_of(self, name: str) -> Tensor:
        """Return the checksum of this packed layer as the layer `name` of a file."""
        groups = self.timestep_groups
        boundaries = None if groups is None else [float(boundary) for boundary in groups.boundaries]
        settings = [self.spec.bits, self.spec.group_size, self.activation_bits, boundaries]
        return layer_checksum(name, settings, self.packed_tensors())

    def allocate_checksum_(self) -> None:
        """Make room for the checksum of a file that is about to be loaded; see `verify_`."""
        self._buffers[CHECKSUM] = empty_checksum(self.packed_tensors())

    def verify_(self, name: str, owners: Mapping[int, str]) -> None:
        """Compare the loaded tensors with the file's checksum, if there is one, and drop that.

        Raises ValueError as `refuse_other_checksum`.
        """
        stored = self._buffers[CHECKSUM]
        if stored is not None:
            refuse_other_checksum(name, stored, self.checksum_of(name), owners)
            self._buffers[CHECKSUM] = None

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Add the packed tensors and their checksum, or, of a part of the model, the float weight in their place.

        The parts of a model are read by others, such as `ControlNetModel.from_unet`, as float weights. `prefix` is
        then shorter than this layer's name.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not self.packed:
            return
        if self.name and prefix.count(".") <= self.name.count("."):
            for name in self._buffers:
                destination.pop(prefix + name, None)
            destination[prefix + "weight"] = self.weight
            return
        if hasattr(destination, "_metadata"):
            destination._metadata[prefix[:-1]] = PackedMetadata(version=self._version, name=self.name)
        if self.is_here() and self._buffers[CHECKSUM] is None:
            destination[prefix + CHECKSUM] = self.checksum_of(prefix.removesuffix("."))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        stored = None
        if self.packed:
            local_metadata = dict(local_metadata)  # of a packed layer, readable to this one
            if prefix + "weight" in state_dict:
                state_dict |= self.packed_tensors_of(state_dict.pop(prefix + "weight"), prefix)
            stored = state_dict.get(prefix + CHECKSUM)
            if stored is not None and self._buffers[CHECKSUM] is None:  # torch would not expect it
                state_dict = {name: value for name, value in state_dict.items() if name != prefix + CHECKSUM}
        error_messages = args[-1]
        num_errors = len(error_messages)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)
        is_whole = all(prefix + name in state_dict for name in self.packed_tensors())
        if stored is not None and is_whole and self.is_here() and len(error_messages) == num_errors:
            name = prefix.removesuffix(".")
            try:
                refuse_other_checksum(name, stored, self.checksum_of(name), {})
            except ValueError as error:
                error_messages.append(str(error))

    def packed_tensors_of(self, weight: Tensor, prefix: str) -> dict[str, Tensor]:
        """Return what the packed layer was read from as `weight`, as entries of a state dict.

        Raises ValueError for the weight of a float layer, or of one with another grid or other activation ranges.
        """
        buffers = {name for name, buffer in self._buffers.items() if buffer is not None}
        packed = getattr(weight, "packed", None)
        found = {name: buffer for name, buffer in (packed or {}).items() if buffer is not None}
        if not found or weight.spec != self.spec or found.keys() != buffers:  # type: ignore[attr-defined]
            raise ValueError(
                f"{self.name}: a packed layer ({self.spec.bits} bits, activations {self.activation_scheme()}) cannot "
                f"take {'weights of another grid' if found else 'a float weight'}. Call dequantize() on its model, "
                "load the weights, and quantize it again."
            )
        return {prefix + name: buffer for name, buffer in found.items() if name != DTYPE_MARKER}

    def activation_scheme(self) -> str:
        """Return "float", "8-bit dynamic" or "8-bit static xG" with G timestep groups."""
        if self.activation_bits is None:
            return "float"
        ranges = "dynamic" if self.input_scale is None else f"static x{len(self.input_scale)}"
        return f"{self.activation_bits}-bit {ranges}"
