"""What a config would do with a float model, before its weights are there: which layers, and about how many bytes."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels.operation import Operation
from diffusers_pqcad.layers.checksums import NUM_HEADERS
from diffusers_pqcad.layers.derived import quantized_type
from diffusers_pqcad.layers.find import packed_layers, refuse_other_than_model
from diffusers_pqcad.layers.quantized import FloatLayer, QuantizedLayer
from diffusers_pqcad.loading import inspection
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.loading.convert import decide_bits, match_modules, quantizable_layers, with_model_exemptions
from diffusers_pqcad.loading.coverage import coverage, percent
from diffusers_pqcad.loading.inspection import Inspection, LayerInfo, table
from diffusers_pqcad.numerics.packing import packed_row_bytes
from diffusers_pqcad.numerics.qparams import WeightSpec

CHECKSUM_BYTES = 8 * (NUM_HEADERS + 2)  # beside the packed weight and its scales
HEADER = ("name", "shape", "bits", "becomes", "group_size", "activations", "kernel", "bytes", "bytes_after")


@dataclass(frozen=True)
class PlannedLayer:
    """A Linear or convolution layer, and what a config would make of it.

    `bits` are those of one weight now, `becomes` those after ("5 on average" where the weights decide), or why the
    layer stays in floating point. `kernel` is what it would take on this computer, `None` where it stays.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    becomes: str
    group_size: int | None
    activations: str
    kernel: str | None
    bytes: int
    bytes_after: int

    def cells(self) -> list[str]:
        """Return the row of a table."""
        values = [*asdict(self).values()]
        return ["-" if value is None else "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
                for value in values]  # fmt: skip


class Plan(Sequence[PlannedLayer]):
    """The layers of a float model in registration order, and what becomes of them; printed, a table with its totals.

    `num_bytes` and `num_bytes_after` are those of all tensors of the model; `is_exact`: the bytes after are the final
    ones, as the weights have nothing to decide.
    """

    def __init__(
        self, layers: Sequence[PlannedLayer], num_bytes: int, num_bytes_after: int, num_weights: int, is_exact: bool
    ) -> None:
        self.layers, self.num_weights, self.is_exact = list(layers), num_weights, is_exact
        self.num_bytes, self.num_bytes_after = num_bytes, num_bytes_after

    def __getitem__(self, index: Any) -> Any:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[PlannedLayer]:
        return iter(self.layers)

    @property
    def packed(self) -> list[PlannedLayer]:
        """The layers that would be packed."""
        return [layer for layer in self if layer.kernel is not None]

    def totals(self) -> str:
        """Return what the layers add up to, on a line."""
        weights = sum(torch.Size(layer.shape).numel() for layer in self.packed)
        about = "" if self.is_exact else "about "
        return (
            f"{len(self.packed)} of {len(self)} layers would be packed, {percent(weights / max(1, self.num_weights))} "
            f"of the weights; {self.num_bytes / 1e6:.2f} MB become {about}{self.num_bytes_after / 1e6:.2f} MB"
        )

    def __str__(self) -> str:
        return "\n".join([*table([list(HEADER), *(layer.cells() for layer in self)]), self.totals()])

    __repr__ = __str__


def inspect(model: nn.Module, config: PQCADConfig | None = None, *, reference: nn.Module | None = None) -> Any:
    """Return a table of the Linear and convolution layers of `model`; with a `config`, of what that would make of it.

    Of a quantized model, an `Inspection`: bits, activations, kernel and bytes of each layer, and the perturbation of
    its weights, to those of the float model `reference` where that is given. Of a model in floating point with a
    `config`, a `Plan`: the same before it is quantized, and why a layer stays in floating point; its tensors may be on
    meta. Raises ValueError for a `config` that does not fit, or of a model that is quantized already, for a
    `reference` with other weights, and for a pipeline.
    """
    if config is None:
        return inspection.inspect(model, reference)
    refuse_other_than_model(model)
    if not isinstance(config, PQCADConfig):
        raise ValueError(
            f"config: expected a PQCADConfig, got {type(config).__name__}. Give the float model as reference=."
        )
    if reference is not None:
        raise ValueError("reference: it is compared with a quantized model; leave it out, or the config.")
    if packed_layers(model):
        raise ValueError(
            "config: expected a model in floating point with it, got one that is quantized; leave it out."
        )
    return plan(model, config)


def plan(model: nn.Module, config: PQCADConfig, dtype: torch.dtype = torch.float32) -> Plan:
    """Return what `config` would do with the float `model`, whose tensors may be on meta.

    `dtype` is that of everything that stays in floating point, as it is loaded. Raises ValueError where the config
    does not fit the model, as quantizing it would.
    """
    asked, config = config, with_model_exemptions(model, config)
    searched = match_modules(model, config)
    decided = config.method == "fixed" or bool(config.weight_bits_by_module)
    bits = decide_bits(searched, config) if decided else {}
    candidates = quantizable_layers(model)
    layers = []
    for name, layer in model.named_modules():
        if not isinstance(layer, FloatLayer):
            continue
        if name in searched:
            layers.append(packed_layer(name, layer, config, bits.get(name), dtype))
        else:
            layers.append(left_layer(name, layer, stays_because(name, candidates, asked, config), dtype))
    tensors = list(model.state_dict().values())
    in_layers = [tensor for layer in model.modules() if isinstance(layer, FloatLayer) for tensor in tensors_of(layer)]
    others = sum(bytes_in(dtype, tensor) for tensor in tensors) - sum(bytes_in(dtype, tensor) for tensor in in_layers)
    after = others + sum(layer.bytes_after for layer in layers)
    return Plan(layers, num_bytes(tensors), after, coverage(model).total, decided)


def stays_because(name: str, candidates: dict[str, FloatLayer], asked: PQCADConfig, config: PQCADConfig) -> str:
    """Return why the layer `name` stays in floating point."""
    if name not in candidates:
        return "stays: no quantizer"
    if PQCADConfig().is_exempt(name) and not config.search_all_modules:
        return "stays: by default"
    return "stays: modules_to_not_convert" if asked.is_exempt(name) else "stays: by its kind of model"


def tensors_of(layer: nn.Module) -> list[Tensor]:
    """Return the tensors that are a layer's own."""
    return [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of `tensors`."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def bytes_in(dtype: torch.dtype, tensor: Tensor) -> int:
    """Return the bytes of `tensor` once it is loaded in `dtype`, which integers are not."""
    return tensor.numel() * (dtype.itemsize if tensor.is_floating_point() else tensor.element_size())


def left_layer(name: str, layer: Any, reason: str, dtype: torch.dtype) -> PlannedLayer:
    """Return the row of a layer that stays in floating point."""
    tensors = tensors_of(layer)
    after = sum(bytes_in(dtype, tensor) for tensor in tensors)
    bits = 8 * layer.weight.element_size()
    return PlannedLayer(name, tuple(layer.weight.shape), bits, reason, None, "float", None, num_bytes(tensors), after)


def packed_layer(name: str, layer: Any, config: PQCADConfig, bits: int | None, dtype: torch.dtype) -> PlannedLayer:
    """Return the row of a layer that would be packed, with `bits` a weight; `None`: the weights decide."""
    group_size = config.group_size if isinstance(layer, nn.Linear) else None
    choices = (bits,) if bits is not None else config.bit_choices
    rows, row_length = layer.weight.shape[0], layer.weight.shape[1:].numel()
    scales = 4 * rows * WeightSpec(choices[0], group_size).num_groups(row_length)
    size = (
        rows * packed_row_bytes(row_length, bits)
        if bits is not None
        else layer.weight.numel() * config.weight_bits / 8
    )
    others = sum(bytes_in(dtype, tensor) for tensor in tensors_of(layer) if tensor is not layer.weight)
    names = dict.fromkeys(
        kernels.fastest(operation_of(layer, WeightSpec(choice, group_size), config.activation_bits))
        for choice in choices
    )
    return PlannedLayer(
        name=name,
        shape=tuple(layer.weight.shape),
        bits=8 * layer.weight.element_size(),
        becomes=f"{bits}" if bits is not None else f"{config.weight_bits:g} on average",
        group_size=group_size,
        activations="float" if config.activation_bits is None else f"{config.activation_bits}-bit dynamic",
        kernel=" or ".join(names),
        bytes=num_bytes(tensors_of(layer)),
        bytes_after=int(size) + scales + others + CHECKSUM_BYTES,
    )


def operation_of(layer: Any, spec: WeightSpec, activation_bits: int | None) -> Operation:
    """Return what a kernel would be told of the float `layer` once it is packed, on the CPU, without weights."""
    kind = quantized_type(type(layer))
    assert kind is not None  # of a layer that is searched
    quantized = layer if isinstance(layer, QuantizedLayer) else kind.blank(layer)
    quantized.allocate_packed_(spec, activation_bits=activation_bits, timestep_groups=None)
    return on_cpu(quantized.operation())


def on_cpu(operation: Operation) -> Operation:
    """Return an operation on meta as one on the CPU, for kernels to be asked of: they do not look at weights then."""
    return operation._replace(qweight=torch.empty(0, dtype=torch.uint8))


def inspect_skeleton(model: nn.Module) -> Inspection:
    """Return `inspect` of a packed `model` on meta, with the kernels that its layers would take on the CPU."""
    modules, found = dict(model.named_modules()), inspection.inspect(model)
    layers = [with_kernel(info, modules[info.name]) for info in found]
    return Inspection(layers, found.coverage)


def with_kernel(info: LayerInfo, layer: Any) -> LayerInfo:
    """Return the row of `layer` with its kernel on the CPU."""
    if info.kernel is None:
        return info
    return LayerInfo(**asdict(info) | {"kernel": kernels.fastest(on_cpu(layer.operation()))})
