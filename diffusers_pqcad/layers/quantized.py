"""Quantized layers: float layers whose weights are stored as packed integers."""

from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels.native import weights
from diffusers_pqcad.kernels.operation import ConvGeometry, Operation
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.layers.checksums import CHECKSUM, PACKED_BUFFERS
from diffusers_pqcad.layers.computed_weight import ComputedWeight
from diffusers_pqcad.layers.stored_state import DTYPE_MARKER, StoredState
from diffusers_pqcad.layers.timesteps import TimestepGroups
from diffusers_pqcad.numerics.packing import packed_row_bytes
from diffusers_pqcad.numerics.qparams import ActivationQParams, WeightSpec, relative

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


class QuantizedLayer(StoredState):
    """What all quantized layers share. A plain float layer until `pack_` or `allocate_packed_`.

    A packed layer has the buffers of `StoredState`, and its `weight` is computed from them.
    """

    perturbation: float | None = None  # ||Q(W) - W||^2 / ||W||^2 when it was packed; not saved
    is_memory_short: bool = False  # for int8 copies of the model's weights, as found when it was packed or loaded
    _cache: tuple[tuple[Any, ...], Any] | None = None  # what it is for, and what a kernel has packed
    handle: Tensor  # names this layer in a graph
    bias: nn.Parameter | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
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
        # Each call asks, and a tensor costs twenty times as much as an attribute of a module.
        buffers, parameters = cast(Any, self._buffers), self._parameters
        return Operation(
            self.name,
            self.spec,
            self.weight_shape,
            self.geometry(),
            buffers["qweight"],
            buffers["weight_scale"],
            parameters["bias"] if "bias" in parameters else self.bias,  # as pruning and replicas have it
            self.activation_bits,
            buffers["input_scale"],
            buffers["input_zero_point"],
            group,
            kernels.keeps_copies(self.is_memory_short),
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

    def replace_packed_(self, qweight: Tensor, weight_scale: Tensor) -> None:
        """Let this packed layer stand for other weights on its grid: `qweight` and `weight_scale` as it has them."""
        device = self.qweight.device
        self._buffers |= {"qweight": qweight.to(device), "weight_scale": weight_scale.to(device)}
        self._cache = None

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
            return None if self._buffers["input_scale"] is None else 0
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
        packed = None if kernel.NAME == kernels.reference.NAME else self.packed_as(operation, kernel.NAME)
        return kernel.run(operation, packed, x)

    def packed_for(self, name: str) -> Any:
        """Return what the kernel `name` keeps of this layer: made once, and again when it is lost."""
        return self.packed_as(self.operation(), name)

    def packed_as(self, operation: Operation, name: str) -> Any:
        """Return what the kernel `name` keeps of this layer, which is `operation` in this call."""
        cache = self._cache  # read once: another thread may move the layer
        # What may be set on this layer, and what the caller of the model may ask for.
        key = (name, operation.keeps_copies, operation.activation_bits, operation.geometry)
        if cache is None or cache[0] != key:
            cache = self._cache = (key, kernels.KERNELS[name].pack(operation))
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

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._cache = None

    def __getstate__(self) -> dict[str, Any]:
        # oneDNN's packed tensors can be neither copied nor pickled; they are rebuilt on the next call.
        return self.__dict__ | {"_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = graph_ops.register(self)  # a copy is a layer of its own

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
