"""Quantized layers: float layers whose weights are stored as packed integers."""

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels.native import weights
from diffusers_pqcad.kernels.operation import ConvGeometry, Operation
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.layers.checksums import (
    CHECKSUM,
    PACKED_BUFFERS,
    empty_checksum,
    layer_checksum,
    refuse_other_checksum,
)
from diffusers_pqcad.layers.computed_weight import ComputedWeight, PackedMetadata
from diffusers_pqcad.layers.timesteps import TimestepGroups
from diffusers_pqcad.numerics.packing import packed_row_bytes
from diffusers_pqcad.numerics.qparams import (
    ActivationQParams,
    WeightSpec,
    relative,
)

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
SCALE_BUFFERS = ("weight_scale", "input_scale")  # always fp32, whatever the model's dtype
DTYPE_MARKER = "dtype_marker"


class QuantizedLayer(nn.Module):
    """What all quantized layers share. A plain float layer until `pack_` or `allocate_packed_`.

    Buffers once packed: `qweight` uint8 (C_out, packed_row_bytes); `weight_scale` fp32 (C_out, G); where calibrated,
    `input_scale` fp32 and `input_zero_point` int32, both (number of timestep groups,). `weight` is then computed, with
    the dtype of `dtype_marker`: an empty buffer that is never saved, and that diffusers finds before the fp32 scales
    when it asks a layer without bias for its dtype. State dicts also hold a `checksum`, as checksums.py has it: a
    buffer only while a file is being loaded, and computed anew for each state dict.
    """

    # Class-level defaults: peft builds adapters with `type(base_layer)(...)`, and those must be plain float layers.
    spec: WeightSpec
    packed: bool = False
    activation_bits: int | None = None
    timestep_groups: TimestepGroups | None = None
    name: str = ""
    perturbation: float | None = None  # ||Q(W) - W||^2 / ||W||^2 when it was packed; not saved
    _cache: tuple[tuple[Any, ...], Any] | None = None  # what it is for, and what a kernel has packed
    handle: Tensor  # names this layer in a graph
    qweight: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    bias: nn.Parameter | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Registered as None from the start: a parallel loader walks the buffers while others are being filled.
        self.register_buffer(DTYPE_MARKER, None, persistent=False)
        for buffer in (*PACKED_BUFFERS, CHECKSUM):
            self.register_buffer(buffer, None)
        self.handle = graph_ops.register(self)

    @property
    def weight(self) -> Tensor:
        """The float weight: the parameter of an unpacked layer, else a `ComputedWeight` (a plain one in a graph)."""
        parameters = self.__dict__.get("_parameters", {})
        if "weight" not in parameters:
            raise AttributeError("weight")
        if parameters["weight"] is not None:
            return parameters["weight"]
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # a graph drops what nothing is computed from
            return self.dequantized_weight().to(self.weight_dtype)
        return ComputedWeight.of_packed(
            dict(self._buffers),
            self.spec,
            shape=self.weight_shape,
            dtype=self.weight_dtype,
            layer_name=self.name,
        )

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of `weight`."""
        marker = self._buffers[DTYPE_MARKER]
        return self.weight.dtype if marker is None else marker.dtype

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the float weight, (C_out, ...)."""
        raise NotImplementedError

    def geometry(self) -> ConvGeometry | None:
        """Return how this layer moves over its input; `None` for a matrix product."""
        return None

    def operation(self, group: int | Tensor | None = None) -> Operation:
        """Return what a kernel is told of this packed layer, in the timestep group `group`."""
        return Operation(
            self.name,
            self.spec,
            self.weight_shape,
            self.geometry(),
            self.qweight,
            self.weight_scale,
            self.bias,
            self.activation_bits,
            self.input_scale,
            self.input_zero_point,
            group,
        )

    def levels(self) -> Tensor:
        """Return the int8 levels, in the shape of the float weight."""
        return self.operation().levels()

    def dequantized_weight(self) -> Tensor:
        """Return the fp32 weight that the packed integers stand for."""
        return self.operation().weight()

    def allocate_packed_(
        self,
        spec: WeightSpec,
        *,
        activation_bits: int | None,
        timestep_groups: TimestepGroups | None,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Turn this layer into a packed one with empty buffers of the right shapes, for a checkpoint to fill.

        `compute_dtype` is that of the computed weight; `None`: as before.
        """
        rows, row_length = self.weight_shape[0], self.weight_shape[1:].numel()
        device, dtype = self.weight.device, compute_dtype or self.weight.dtype
        on = "cpu" if device.type == "meta" else device  # no checkpoint fills this one
        self._buffers[DTYPE_MARKER] = torch.empty(0, dtype=dtype, device=on)
        self.spec, self.activation_bits, self.timestep_groups = spec, activation_bits, timestep_groups
        self._buffers["qweight"] = torch.empty(
            rows, packed_row_bytes(row_length, spec.bits), dtype=torch.uint8, device=device
        )
        self._buffers["weight_scale"] = torch.empty(
            rows, spec.num_groups(row_length), dtype=torch.float32, device=device
        )
        if timestep_groups is not None:
            self._buffers["input_scale"] = torch.empty(len(timestep_groups), dtype=torch.float32, device=device)
            self._buffers["input_zero_point"] = torch.empty(len(timestep_groups), dtype=torch.int32, device=device)
        self._parameters["weight"] = None
        self.packed, self._cache = True, None

    @torch.no_grad()
    def pack_(self, spec: WeightSpec, *, activation_bits: int | None, scale: Tensor | None = None) -> None:
        """Quantize the float weight to `spec` and drop it; `scale` (C_out, G) defaults to min-max.

        Raises ValueError, naming the layer, for weights that are not finite or groups that do not fit; the layer is
        unchanged then.
        """
        try:
            qweight, scale, errors = weights.quantize(self.weight, spec, scale)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        self.allocate_packed_(spec, activation_bits=activation_bits, timestep_groups=None)
        self._buffers |= {"qweight": qweight, "weight_scale": scale}
        self.perturbation = relative(errors)

    @torch.no_grad()
    def unpack_(self) -> None:
        """Undo `pack_`: this layer holds its dequantized weight as a parameter again, and nothing else."""
        weight = self.weight.clone()
        for buffer in (DTYPE_MARKER, *PACKED_BUFFERS, CHECKSUM):
            self._buffers[buffer] = None
        self._parameters["weight"] = nn.Parameter(weight)
        self.packed, self.activation_bits, self.timestep_groups, self._cache = False, None, None, None

    def set_input_qparams_(self, qparams: ActivationQParams, groups: TimestepGroups) -> None:
        """Make the activation ranges static: `qparams` (len(groups),), one range per timestep group."""
        self._buffers["input_scale"] = qparams.scale.detach().float().clone()
        self._buffers["input_zero_point"] = qparams.zero_point.detach().to(torch.int32).clone()
        self.timestep_groups, self._cache = groups, None

    def input_group(self) -> int | Tensor | None:
        """Return this call's static range: an int, (B,) int64 where there are several, `None` for dynamic ranges.

        While a graph is made of the call, an int64 tensor also for a single range.
        """
        if self.activation_bits is None:
            return None
        if self.timestep_groups is None:  # asked first: a graph is guarded by all tensors that were looked at
            return None if self.input_scale is None else 0
        return self.timestep_groups.of_call(self.name)

    def kernel_name(self) -> str:
        """Return the name of the fastest kernel that can run this layer here without a gradient."""
        return kernels.fastest(self.operation())

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer's output in the dtype of `input`, which has the name that callers of a float layer use."""
        if not self.packed:
            return super().forward(input)
        if not torch.compiler.is_compiling():
            return self.compute(input)
        # An operator has no gradient, and no meaning in another process; the reference kernel can be traced.
        if not graph_ops.takes_operators() or kernels.needs_gradient(self.bias, input):
            return kernels.reference.run(self.operation(self.input_group()), None, input)
        return graph_ops.call(self, input)

    def compute(self, x: Tensor) -> Tensor:
        """Return the output of the packed layer by the kernel that this call takes, without hooks."""
        operation = self.operation(self.input_group())
        kernel = kernels.select_kernel(operation, x)
        packed = None if kernel.NAME == kernels.reference.NAME else self.packed_for(kernel.NAME)
        return kernel.run(operation, packed, x)

    def packed_for(self, name: str) -> Any:
        """Return what the kernel `name` keeps of this layer: made once, and again when it is lost."""
        cache = self._cache  # read once: another thread may move the layer
        key = (name, self.activation_bits, self.geometry())  # which may be set on this layer
        if cache is None or cache[0] != key:
            cache = self._cache = (key, kernels.KERNELS[name].pack(self.operation()))
        return cache[1]

    def cached_bytes(self) -> int:
        """Return the bytes of a kernel's own copy of the weights."""
        cache = self._cache  # read once: another thread may move the layer
        if cache is None:
            return 0
        (name, *_), packed = cache
        return kernels.KERNELS[name].num_bytes(self.operation(), packed)

    def __prepare_scriptable__(self) -> nn.Module:
        raise ValueError(
            f"{self.name}: torch.jit.script compiles source text, and cannot compile that of packed layers. Use "
            "torch.jit.trace or torch.export, or call dequantize() first."
        )

    def to_float(self) -> nn.Module:
        """Return the plain float layer with this layer's dequantized weight, and the same bias and hooks."""
        layer = self.blank_float()
        layer.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=self.weight_dtype.is_floating_point)
        layer.register_parameter("bias", self.bias)
        for hooks in HOOKS:
            setattr(layer, hooks, getattr(self, hooks))
        return layer.train(self.training)

    @classmethod
    def from_float(cls, layer: nn.Module, name: str) -> Self:
        """Return an unpacked quantized layer that shares the parameters and hooks of the float `layer`."""
        quantized = cls.blank(layer)
        quantized._parameters.update(layer._parameters)
        for hooks in HOOKS:  # the same dictionaries, so that a handle still removes its hook
            setattr(quantized, hooks, getattr(layer, hooks))
        quantized.name = name
        return quantized.train(layer.training)

    float_type: type[nn.Module]

    @classmethod
    def blank(cls, layer: nn.Module) -> Self:
        """Return an unpacked layer like the float `layer`, its parameters on meta."""
        return cls(**cls.arguments(layer), device="meta")

    def blank_float(self) -> nn.Module:
        """Return a float layer like this one, its parameters on meta."""
        return self.float_type(**self.arguments(self), device="meta")

    @staticmethod
    def arguments(layer: Any) -> dict[str, Any]:
        """Return the constructor arguments that describe `layer`."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        packed = {name: self._buffers.get(name) for name in PACKED_BUFFERS}
        super()._apply(fn, recurse)
        for name, before in packed.items():
            after = self._buffers.get(name)
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        if any(self._buffers.get(name) is not before for name, before in packed.items()):
            self._cache = None  # moved; a cast alone leaves what kernels have packed
        return self

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
        self._cache = None
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

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's packed tensors can be neither copied nor pickled; they are rebuilt on the next call.
        return self.__dict__ | {"_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = graph_ops.register(self)  # a copy is a layer of its own

    def activation_scheme(self) -> str:
        """Return "float", "8-bit dynamic" or "8-bit static xG" with G timestep groups."""
        if self.activation_bits is None:
            return "float"
        ranges = "dynamic" if self.input_scale is None else f"static x{len(self.input_scale)}"
        return f"{self.activation_bits}-bit {ranges}"

    def extra_repr(self) -> str:
        """Add bits, activation scheme and kernel to the float layer's description."""
        if not self.packed:
            return super().extra_repr()
        groups = f", group_size={self.spec.group_size}" if self.spec.group_size else ""
        details = f"bits={self.spec.bits}{groups}, activations={self.activation_scheme()}, kernel={self.kernel_name()}"
        return f"{super().extra_repr()}, {details}"


# The ignores below: `weight` is a property here, and `bias` may be None, where torch declares plain attributes.
class PQCADLinear(QuantizedLayer, nn.Linear):  # type: ignore[misc,override]
    """`nn.Linear` with packed weights of 2, 3, 4, 6 or 8 bits; scales per output or per `group_size` inputs."""

    float_type = nn.Linear

    @property
    def weight_shape(self) -> torch.Size:
        """(out_features, in_features)."""
        return torch.Size((self.out_features, self.in_features))

    @staticmethod
    def arguments(layer: Any) -> dict[str, Any]:
        """Return the constructor arguments of a linear layer."""
        return {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
        }


class QuantizedConvolution(QuantizedLayer):
    """What the convolutions of one, two and three dimensions share; one scale per output channel."""

    in_channels: int
    out_channels: int
    groups: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...] | str
    dilation: tuple[int, ...]
    padding_mode: str

    @property
    def weight_shape(self) -> torch.Size:
        """(out_channels, in_channels / groups, and the kernel's size: depth, height, width or the last of these)."""
        return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))

    def geometry(self) -> ConvGeometry:
        """Return how this convolution moves over its input."""
        ends = tuple(self._reversed_padding_repeated_twice)  # type: ignore[arg-type]
        return ConvGeometry(self.stride, self.padding, self.dilation, self.groups, self.padding_mode, ends)

    @staticmethod
    def arguments(layer: Any) -> dict[str, Any]:
        """Return the constructor arguments of a convolution."""
        names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode".split()
        return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


class PQCADConv1d(QuantizedConvolution, nn.Conv1d):  # type: ignore[misc,override]
    """`nn.Conv1d` with packed weights of 2, 3, 4, 6 or 8 bits; one scale per output channel."""

    float_type = nn.Conv1d


class PQCADConv2d(QuantizedConvolution, nn.Conv2d):  # type: ignore[misc,override]
    """`nn.Conv2d` with packed weights of 2, 3, 4, 6 or 8 bits; one scale per output channel."""

    float_type = nn.Conv2d


class PQCADConv3d(QuantizedConvolution, nn.Conv3d):  # type: ignore[misc,override]
    """`nn.Conv3d` with packed weights of 2, 3, 4, 6 or 8 bits; one scale per output channel."""

    float_type = nn.Conv3d


FloatLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | QuantizedLayer  # the last one while it is not packed
QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {
    kind.float_type: kind for kind in (PQCADLinear, PQCADConv1d, PQCADConv2d, PQCADConv3d)
}
