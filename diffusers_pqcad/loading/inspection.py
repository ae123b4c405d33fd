"""`inspect`: what a quantized model consists of, layer by layer."""

from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from typing import overload

import torch
from torch import Tensor, nn

from diffusers_pqcad.layers.find import refuse_other_than_model
from diffusers_pqcad.layers.quantized import FloatLayer, QuantizedLayer
from diffusers_pqcad.loading.coverage import Coverage, coverage
from diffusers_pqcad.numerics import qparams

DECIMALS = "{:.1e}"


@dataclass(frozen=True)
class LayerInfo:
    """One Linear or convolution layer, packed or in floating point.

    `shape` is that of the float weight, `bits` are those of one weight. `group_size` inputs share a scale, all of an
    output channel where it is `None`. `activations`: "float", "8-bit dynamic", or "8-bit static xG" for G timestep
    groups. `kernel` is what a call without gradient takes here, `None` for a float layer. `bytes` are stored (weights,
    scales, biases; not the kernel's cache). `perturbation`: ||Q(W) - W||^2 / ||W||^2, `None` if unknown.
    """

    name: str
    shape: tuple[int, ...]
    bits: int
    group_size: int | None
    activations: str
    kernel: str | None
    bytes: int
    perturbation: float | None

    def cells(self) -> list[str]:
        """Return the row of a table."""
        perturbation = None if self.perturbation is None else DECIMALS.format(self.perturbation)
        values = [*astuple(self)[:-1], perturbation]
        return ["-" if value is None else "x".join(map(str, value)) if isinstance(value, tuple) else str(value)
                for value in values]  # fmt: skip


class Inspection(Sequence[LayerInfo]):
    """The layers of a model in registration order; printed, a table with a line of totals.

    `coverage` counts the weights of the whole model, those of other kinds of modules, too.
    """

    def __init__(self, layers: Sequence[LayerInfo], coverage: Coverage) -> None:
        self.layers, self.coverage = list(layers), coverage

    @overload
    def __getitem__(self, index: int) -> LayerInfo: ...
    @overload
    def __getitem__(self, index: slice) -> list[LayerInfo]: ...
    def __getitem__(self, index: int | slice) -> LayerInfo | list[LayerInfo]:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[LayerInfo]:
        return iter(self.layers)

    def __str__(self) -> str:
        header = [item.name for item in fields(LayerInfo)]
        rows = [header, *(layer.cells() for layer in self)]
        lines = table(rows)
        num_packed = sum(layer.kernel is not None for layer in self)
        total = f"{num_packed} of {len(self)} layers packed, {sum(layer.bytes for layer in self) / 1e6:.2f} MB"
        bits = self.coverage.average_bits()
        if bits is not None:
            total += f", {bits[0]:.2f} bits a packed weight on average, {bits[1]:.2f} over all weights"
        return "\n".join([*lines, f"{total}, {self.coverage}"])

    __repr__ = __str__


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table whose columns are as wide as their longest cell."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def inspect(model: nn.Module, reference: nn.Module | None = None) -> Inspection:
    """Return a table of the Linear and convolution layers of `model`.

    The perturbation of a layer is known from its packing (after PQ: to the latent weights), and lost when the model is
    saved. With `reference`, the float model, it is measured to its weights of the same names. Raises ValueError where
    those do not fit, and for a pipeline.
    """
    refuse_other_than_model(model)
    floats = None if reference is None else dict(reference.named_modules())
    return Inspection(
        [layer_info(name, module, floats) for name, module in model.named_modules() if isinstance(module, FloatLayer)],
        coverage(model),
    )


def layer_info(name: str, layer: FloatLayer, floats: dict[str, nn.Module] | None) -> LayerInfo:
    """Return the row of `layer`; `floats` are the modules of the float model, if there is one to compare with."""
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if not isinstance(layer, QuantizedLayer) or not layer.packed:
        bits = layer.weight.element_size() * 8
        return LayerInfo(name, tuple(layer.weight.shape), bits, None, "float", None, stored, None)
    perturbation = layer.perturbation
    if floats is not None:
        weight = float_weight(floats, name, layer.weight_shape)
        perturbation = qparams.relative(qparams.perturbation(weight, layer.levels(), layer.weight_scale))
    return LayerInfo(
        name=name,
        shape=tuple(layer.weight_shape),
        bits=layer.spec.bits,
        group_size=layer.spec.group_size,
        activations=layer.activation_scheme(),
        kernel=layer.kernel_name(),
        bytes=stored,
        perturbation=perturbation,
    )


def float_weight(modules: dict[str, nn.Module], name: str, shape: torch.Size) -> Tensor:
    """Return the weight of the module `name`; raises ValueError where there is none of that shape."""
    weight = getattr(modules.get(name.removesuffix(".base_layer")), "weight", None)  # the name before an adapter came
    if weight is None or weight.shape != shape:
        found = None if weight is None else tuple(weight.shape)
        raise ValueError(
            f"reference: {name} has shape {found}, expected {tuple(shape)}. Give the float model that was quantized."
        )
    return weight.detach()
