"""Quantized layers: float layers whose weights are stored as packed integers."""

from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusers_pqcad import graph_ops, kernels
from diffusers_pqcad.kernels import weights
from diffusers_pqcad.packing import packed_row_bytes, unpack_levels
from diffusers_pqcad.pending import PendingActivation
from diffusers_pqcad.qparams import (
    ActivationQParams,
    WeightSpec,
    dequantize_weight,
    dynamic_activation_qparams,
    min_max_weight_scale,
    quantize_weight,
    relative,
)
from diffusers_pqcad.timesteps import TimestepGroups

HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
)
SCALE_BUFFERS = ("weight_scale", "input_scale")  # always fp32, whatever the model's dtype
DTYPE_MARKER = "dtype_marker"
WRITING_OPERATORS = ("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__")


class ComputedWeight(Tensor):
    """The float weight of a packed layer: a temporary that refuses to be written to, as the write would be lost.

    peft fuses an adapter by `weight.data += delta`. What is computed from this tensor is a plain tensor again.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    layer_name = ""
    _is_hf_initialized = True  # transformers writes random numbers into weights that it takes for missing

    def refuse(self, *args: Any, **kwargs: Any) -> Any:
        """Raise ValueError."""
        raise ValueError(
            f"{self.layer_name}: the weight of a packed layer is computed from its integers and cannot be written to, "
            "so no adapter can be fused or merged into it. Use the adapter unfused, or call dequantize() first."
        )

    data = property(lambda self: self, refuse)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone()


for _name in (*WRITING_OPERATORS, *(name for name in dir(Tensor) if name[0] != "_" and name.endswith("_"))):
    if _name != "requires_grad_":
        setattr(ComputedWeight, _name, ComputedWeight.refuse)


class QuantizedLayer(nn.Module):
    """What `PQCADLinear` and `PQCADConv2d` share. A plain float layer until `pack_` or `allocate_packed_`.

    Buffers once packed: `qweight` uint8 (C_out, packed_row_bytes); `weight_scale` fp32 (C_out, G); where calibrated,
    `input_scale` fp32 and `input_zero_point` int32, both (number of timestep groups,). `weight` is then computed, with
    the dtype of `dtype_marker`: an empty buffer that is never saved, and that diffusers finds before the fp32 scales
    when it asks a layer without bias for its dtype.
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
        for buffer in ("qweight", "weight_scale", "input_scale", "input_zero_point"):
            self.register_buffer(buffer, None)
        self.handle = graph_ops.register(self)

    @property
    def weight(self) -> Tensor:
        """The float weight: the parameter of an unpacked layer, else dequantized from `qweight` at each access."""
        parameters = self.__dict__.get("_parameters", {})
        if "weight" not in parameters:
            raise AttributeError("weight")
        if parameters["weight"] is not None:
            return parameters["weight"]
        weight = self.dequantized_weight().to(self.weight_dtype).as_subclass(ComputedWeight)
        weight.layer_name = self.name
        return weight

    @property
    def weight_dtype(self) -> torch.dtype:
        """Dtype of `weight`."""
        marker = self._buffers[DTYPE_MARKER]
        return self.weight.dtype if marker is None else marker.dtype

    @property
    def weight_shape(self) -> torch.Size:
        """Shape of the float weight, (C_out, ...)."""
        raise NotImplementedError

    def float_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the float operation of this layer with the given weight and bias."""
        raise NotImplementedError

    def levels(self) -> Tensor:
        """Return the int8 levels, in the shape of the float weight."""
        return unpack_levels(self.qweight, self.spec, self.weight_shape)

    def channel_levels(self) -> tuple[Tensor, Tensor]:
        """Return int8 levels in the shape of the float weight, and fp32 scales (C_out,): what int8 products take.

        Scales per output channel keep the stored levels as they are, at any bit-width. Rows of several scales (groups)
        are re-quantized to 8 bits per channel, an error of at most 1/254 of a row's range.
        """
        try:
            levels = weights.unpack(self.qweight, self.spec, self.weight_shape)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from None
        scale = self.weight_scale
        if scale.shape[1] > 1:
            weight, spec = dequantize_weight(levels, scale), WeightSpec(8)
            scale = min_max_weight_scale(weight, spec)
            levels = quantize_weight(weight, scale, spec)
        return levels, scale.flatten().contiguous()

    def dequantized_weight(self) -> Tensor:
        """Return the fp32 weight that the packed integers stand for."""
        return dequantize_weight(self.levels(), self.weight_scale)

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
        weight = self.weight.detach().as_subclass(Tensor).clone()
        for buffer in (DTYPE_MARKER, "qweight", "weight_scale", "input_scale", "input_zero_point"):
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

        While `torch.compile` traces, an int64 tensor also for a single range.
        """
        if self.activation_bits is None:
            return None
        if self.timestep_groups is None:  # asked first: a graph is guarded by all tensors that were looked at
            return None if self.input_scale is None else 0
        # In a graph a number would be a constant, and each group of timesteps would be compiled anew.
        groups = self.timestep_groups
        group = groups.index if torch.compiler.is_compiling() else groups.current
        if group is None and groups.index is not None:  # a compiled hook, and this layer outside of the graph
            groups.select(groups.index)
            group = groups.current
        if group is None:
            raise ValueError(
                f"{self.name}: its activation ranges depend on the timestep, but no timestep was seen. Call the whole "
                "model (which records it), not the layer alone."
            )
        return group

    def input_qparams(self, x: Tensor) -> ActivationQParams | None:
        """Return the qparams for this call: 0-dim, or (B, 1, ...) for a batch of several timestep groups."""
        if self.activation_bits is None:
            return None
        group = self.input_group()
        if group is None or self.input_scale is None or self.input_zero_point is None:
            return dynamic_activation_qparams(x, self.activation_bits)
        qparams = ActivationQParams(self.input_scale[group], self.input_zero_point[group])
        if isinstance(group, int) or group.dim() == 0:
            return qparams
        return ActivationQParams(*(per_sample(values, x, self.name) for values in qparams))

    def refusal(self, kernel: str) -> str | None:
        """Return why `kernel` cannot run this layer here, or `None`."""
        return kernels.KERNELS[kernel].refusal(self)

    def kernel_name(self) -> str:
        """Return the name of the fastest kernel that can run this layer here without a gradient."""
        return next(name for name, kernel in kernels.KERNELS.items() if kernel.refusal(self) is None)

    def forward(self, x: Tensor) -> Tensor:
        """Return the layer's output in the dtype of `x`."""
        if not self.packed:
            return super().forward(x)
        if not torch.compiler.is_compiling():
            return self.compute(x)
        if kernels.needs_gradient(self, x):  # the operator has none; the reference kernel can be traced
            return kernels.reference.run(self, None, x)
        return graph_ops.call(self, x)

    def compute(self, x: Tensor) -> Tensor:
        """Return the output of the packed layer by the kernel that this call takes, without hooks."""
        kernel = kernels.select_kernel(self, x)
        if isinstance(x, PendingActivation) and not kernels.fuses(kernel):
            x = x.value()
        packed = None if kernel.NAME == kernels.reference.NAME else self.packed_for(kernel.NAME)
        return kernel.run(self, packed, x)

    def packed_for(self, name: str) -> Any:
        """Return what the kernel `name` keeps of this layer: made once, and again when it is lost."""
        cache = self._cache  # read once: another thread may move the layer
        key = (name, *self.packed_arguments())
        if cache is None or cache[0] != key:
            cache = self._cache = (key, kernels.KERNELS[name].pack(self))
        return cache[1]

    def packed_arguments(self) -> tuple[Any, ...]:
        """Return what kernels pack the weights for, beside the weights, that somebody may set on this layer."""
        return (self.activation_bits,)

    def cached_bytes(self) -> int:
        """Return the bytes of a kernel's int8 copy: one a weight, and 4/3 of a Winograd kernel's."""
        cache = self._cache  # read once: another thread may move the layer
        if cache is None:
            return 0
        is_winograd = isinstance(cache[1], kernels.x86.PackedLayer) and cache[1].is_winograd
        return self.weight_shape.numel() * (kernels.x86.TILE_SIZE if is_winograd else 3) // 3

    def to_float(self) -> nn.Module:
        """Return the plain float layer with this layer's dequantized weight, and the same bias and hooks."""
        layer = self.float_type(**self.arguments(self), device="meta")
        layer.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=self.weight_dtype.is_floating_point)
        layer.register_parameter("bias", self.bias)
        for hooks in HOOKS:
            setattr(layer, hooks, getattr(self, hooks))
        return layer.train(self.training)

    @classmethod
    def from_float(cls, layer: nn.Module, name: str) -> Self:
        """Return an unpacked quantized layer that shares the parameters and hooks of the float `layer`."""
        quantized = cls(**cls.arguments(layer), device="meta")
        quantized._parameters.update(layer._parameters)
        for hooks in HOOKS:  # the same dictionaries, so that a handle still removes its hook
            setattr(quantized, hooks, getattr(layer, hooks))
        quantized.name = name
        return quantized.train(layer.training)

    float_type: type[nn.Module]

    @staticmethod
    def arguments(layer: Any) -> dict[str, Any]:
        """Return the constructor arguments that describe `layer`."""
        raise NotImplementedError

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        scales = {name: self._buffers.get(name) for name in SCALE_BUFFERS}
        super()._apply(fn, recurse)
        for name, before in scales.items():
            after = self._buffers.get(name)
            if before is not None and after is not None and after.dtype != torch.float32:
                self._buffers[name] = before.to(after.device)
        self._cache = None
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._cache = None

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

    def float_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return `F.linear`."""
        return F.linear(x, weight, bias)

    @staticmethod
    def arguments(layer: Any) -> dict[str, Any]:
        """Return the constructor arguments of a linear layer."""
        return {
            "in_features": layer.in_features,
            "out_features": layer.out_features,
            "bias": layer.bias is not None,
        }


class PQCADConv2d(QuantizedLayer, nn.Conv2d):  # type: ignore[misc,override]
    """`nn.Conv2d` with packed weights of 2, 3, 4, 6 or 8 bits; one scale per output channel."""

    float_type = nn.Conv2d

    @property
    def weight_shape(self) -> torch.Size:
        """(out_channels, in_channels / groups, kernel height, kernel width)."""
        return torch.Size((self.out_channels, self.in_channels // self.groups, *self.kernel_size))

    def float_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the convolution of `nn.Conv2d`, any padding mode."""
        return self._conv_forward(x, weight, bias)

    def packed_arguments(self) -> tuple[Any, ...]:
        """Return also how the kernel moves over the image."""
        return self.activation_bits, self.stride, self.padding, self.dilation

    @staticmethod
    def arguments(layer: Any) -> dict[str, Any]:
        """Return the constructor arguments of a convolution."""
        names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode".split()
        return {name: getattr(layer, name) for name in names} | {"bias": layer.bias is not None}


FloatLayer = nn.Linear | nn.Conv2d | QuantizedLayer  # the last one while it is not packed: a layer to quantize
QUANTIZED_LAYERS: dict[type[nn.Module], type[QuantizedLayer]] = {nn.Linear: PQCADLinear, nn.Conv2d: PQCADConv2d}


def per_sample(values: Tensor, x: Tensor, name: str) -> Tensor:
    """Return `values` (B,), one for each timestep of the batch, so that they broadcast against `x` (k * B, ...)."""
    if x.shape[0] % len(values):
        raise ValueError(
            f"{name}: a batch of {x.shape[0]} cannot be matched with {len(values)} timesteps of several activation "
            "ranges. Call the model with one timestep per sample, or with a single timestep."
        )
    return values.repeat_interleave(x.shape[0] // len(values)).view(-1, *[1] * (x.dim() - 1))


def refuse_other_than_model(model: Any) -> None:
    """Raise ValueError for a pipeline, or anything else that is no module."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"expected a model, got {type(model).__name__}. Give its parts one by one, such as `pipe.unet`, or load "
            "the pipeline by from_pretrained(..., quantization_config=...)."
        )


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of `model`, packed or not yet, by name, in registration order."""
    refuse_other_than_model(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def packed_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the packed layers of `model` by name, in registration order."""
    return {name: layer for name, layer in quantized_layers(model).items() if layer.packed}


def average_bits(model: nn.Module) -> tuple[float, float] | None:
    """Return the average bits over the packed weights, and over all weights of `model` (floats at their own width).

    Scales, zero points and biases are not counted. `None` for a model without packed layers.
    """
    layers = packed_layers(model)
    if not layers:
        return None
    packed = sum(layer.weight_shape.numel() for layer in layers.values())
    packed_bits = sum(layer.weight_shape.numel() * layer.spec.bits for layer in layers.values())
    floats = [
        parameter
        for module in model.modules()
        for name, parameter in module._parameters.items()
        if parameter is not None and name == "weight" and parameter.dim() > 1
    ]
    num_floats = sum(parameter.numel() for parameter in floats)
    float_bits = sum(parameter.numel() * parameter.element_size() * 8 for parameter in floats)
    return packed_bits / packed, (packed_bits + float_bits) / (packed + num_floats)


def kernel_cache_bytes(model: nn.Module) -> int:
    """Return the bytes of the int8 copies that kernels hold beside the packed weights, built on first use.

    What they pad, and some numbers for each output, are not counted.
    """
    return sum(layer.cached_bytes() for layer in packed_layers(model).values())
