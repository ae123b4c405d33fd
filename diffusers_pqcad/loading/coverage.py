"""How much of a model is packed, counted over all of its weights, and what the others belong to."""

import logging
from collections import Counter
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from diffusers_pqcad.layers.derived import is_quantizable
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.quantized import FloatLayer
from diffusers_pqcad.loading.config import PQCADConfig

logger = logging.getLogger(__name__)
LARGE_SHARE = 0.1  # of the weights: a kind that holds more, and has no quantizer, is warned about


class FloatWeight(NamedTuple):
    """A parameter that is no vector and not packed: its name, the module that holds it, and what kind of weight it is.

    `kind` is the class of a module that holds a `weight`, else that class and the parameter's own name.
    """

    name: str
    module: nn.Module
    kind: str
    parameter: nn.Parameter


def float_weights(model: nn.Module) -> Iterator[FloatWeight]:
    """Yield the weights of `model` that are not packed: parameters of two or more dimensions; tied ones once.

    Vectors are none, such as biases and the scales of norms, also where dimensions of size 1 let them broadcast.
    """
    seen = set()
    for prefix, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is None or id(parameter) in seen or not is_weight(module, name, parameter):
                continue
            seen.add(id(parameter))
            kind = type(module).__name__ if name == "weight" else f"{type(module).__name__}.{name}"
            if isinstance(module, ParametrizationList):
                kind = type(model.get_submodule(prefix.rpartition(".parametrizations.")[0])).__name__
            yield FloatWeight(f"{prefix}.{name}" if prefix else name, module, kind, parameter)


def is_weight(module: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Return whether the `parameter` of `module` is a weight, and no vector."""
    if name == "weight" and isinstance(module, FloatLayer):
        return parameter.dim() > 1  # of one output or one input, too
    return sum(size > 1 for size in parameter.shape) > 1


class Coverage(NamedTuple):
    """Numbers of weights: packed, and in floating point by kind; bits of both. Scales and biases are not counted.

    `without_quantizer` are those of the floats that this package cannot pack and the user did not exclude, but for
    embeddings.
    """

    packed: int
    packed_bits: int
    floats: dict[str, int]
    float_bits: int
    without_quantizer: dict[str, int]

    @property
    def total(self) -> int:
        """All weights of the model."""
        return self.packed + sum(self.floats.values())

    def average_bits(self) -> tuple[float, float] | None:
        """Return the average bits over the packed weights, and over all; `None` where none is packed."""
        if not self.packed:
            return None
        return self.packed_bits / self.packed, (self.packed_bits + self.float_bits) / self.total

    def share(self, count: int) -> float:
        """Return `count` as a share of all weights, 0 to 1."""
        return count / max(1, self.total)

    def __str__(self) -> str:
        text = f"{percent(self.share(self.packed))} of the weights packed"
        return f"{text}; in floating point: {self.shares(self.floats)}" if self.floats else text

    def shares(self, counts: dict[str, int]) -> str:
        """Return the kinds of `counts` with their share of all weights, the largest first."""
        ordered = sorted(counts.items(), key=lambda item: -item[1])
        return ", ".join(f"{kind} {percent(self.share(count))}" for kind, count in ordered)

    def warning(self) -> str | None:
        """Return what to tell a user of large kinds of weights that cannot be packed; `None` where there are none."""
        large = {kind: n for kind, n in self.without_quantizer.items() if self.share(n) > LARGE_SHARE}
        if not large:
            return None
        return (
            f"{percent(self.share(self.packed))} of the weights are packed. There is no quantizer for "
            f"{self.shares(large)}: they stay in floating point, and the files stay as much larger."
        )


def percent(share: float) -> str:
    """Return `share` (0 to 1) in whole percent; what is little is not called nothing, nor what is nearly all, all."""
    if 0 < share < 0.01:
        return "< 1 %"
    return "> 99 %" if 0.99 < share < 1 else f"{100 * share:.0f} %"


def coverage(model: nn.Module, config: PQCADConfig | None = None) -> Coverage:
    """Return how much of `model` is packed; what `config` exempts is not looked for in quantizers."""
    layers = packed_layers(model).values()
    sizes = [layer.weight_shape.numel() for layer in layers]
    floats: Counter[str] = Counter()
    without_quantizer: Counter[str] = Counter()
    float_bits = 0
    for name, module, kind, parameter in float_weights(model):
        floats[kind] += parameter.numel()
        float_bits += parameter.numel() * parameter.element_size() * 8
        is_left = isinstance(module, nn.Embedding) or is_quantizable(module)
        if not is_left and not (config is not None and config.is_exempt(name.removesuffix(".weight"))):
            without_quantizer[kind] += parameter.numel()
    packed_bits = sum(size * layer.spec.bits for size, layer in zip(sizes, layers, strict=True))
    return Coverage(sum(sizes), packed_bits, dict(floats), float_bits, dict(without_quantizer))


def average_bits(model: nn.Module) -> tuple[float, float] | None:
    """Return the average bits over the packed weights, and over all weights of `model` (floats at their own width).

    Scales, zero points and biases are not counted. `None` for a model without packed layers.
    """
    return coverage(model).average_bits()


@cache
def warn_once(text: str) -> None:
    """Log `text` as a warning, the first time in this process."""
    logger.warning(text)


def report(model: nn.Module, config: PQCADConfig) -> Coverage:
    """Return the coverage of a quantized `model`; large kinds of weights without a quantizer are warned about once."""
    found = coverage(model, config)
    text = found.warning()
    if text is not None:
        warn_once(f"{type(model).__name__}: {text}")
    return found
