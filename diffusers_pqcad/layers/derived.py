"""Quantized layers of classes that are derived from a plain one, and keep their own forward."""

import inspect
from typing import Any, Self

from torch import nn

from diffusers_pqcad.layers.quantized import QUANTIZED_LAYERS, QuantizedLayer

# What accelerate and diffusers set on a layer that they hook: it calls the layer that is replaced.
REPLACED_FORWARD = ("forward", "_old_forward", "_hf_hook", "_diffusers_hook")
DERIVED_LAYERS: dict[type[nn.Module], type[QuantizedLayer] | None] = {}  # one class each, as layers are compared by it


def quantized_type(float_type: type[nn.Module]) -> type[QuantizedLayer] | None:
    """Return the quantized class of a float layer's class, or `None` where there is none."""
    if float_type in QUANTIZED_LAYERS:
        return QUANTIZED_LAYERS[float_type]
    if float_type not in DERIVED_LAYERS:
        DERIVED_LAYERS[float_type] = derived_type(float_type)
    return DERIVED_LAYERS[float_type]


def derived_type(float_type: type[nn.Module]) -> type[QuantizedLayer] | None:
    """Return a new quantized class for a class that is derived from a layer's, or `None` where there can be none.

    A class derived from a convolution, such as the causal ones of video autoencoders, keeps its own forward, which
    must leave the weight to the `super().forward` that it calls. Those derived from `nn.Linear` have none: they are
    routers of experts, layers of other quantizers, or the output of torch's attention, whose forward is never called.
    """
    base = next((kind for kind in float_type.__mro__ if kind in QUANTIZED_LAYERS), nn.Linear)
    if base is nn.Linear or issubclass(float_type, QuantizedLayer):
        return None
    derived = float_type.__mro__[: float_type.__mro__.index(base)]
    if not all(leaves_weight_to_base(kind) for kind in derived):
        return None
    bases = (DerivedLayer, float_type, QUANTIZED_LAYERS[base])
    return type(f"PQCAD{float_type.__name__}", bases, {"float_type": float_type, "plain_type": base})


def leaves_weight_to_base(kind: type) -> bool:
    """Return whether what `kind` itself defines of a layer touches the weight by `super().forward` only.

    Not so torch's own classes, of layers that are lazy or parametrized.
    """
    if kind.__module__.startswith("torch.") or not {"weight", "_conv_forward", "__call__"}.isdisjoint(vars(kind)):
        return False
    forward = vars(kind).get("forward")
    if forward is None:
        return True
    code = getattr(inspect.unwrap(forward), "__code__", None)
    return code is not None and "__class__" in code.co_freevars and "weight" not in code.co_names


class DerivedLayer(QuantizedLayer):
    """A quantized layer of a class that is derived from a plain one: it is made without the constructor of that class.

    What that class sets on its layers, beyond what the plain one does, is taken over.
    """

    plain_type: type[nn.Module]
    own_attributes: tuple[str, ...] = ()

    @classmethod
    def blank(cls, layer: Any) -> Self:
        """Return an unpacked layer like the float `layer`, its parameters on meta."""
        quantized = cls.__new__(cls)
        QUANTIZED_LAYERS[cls.plain_type].__init__(quantized, **cls.arguments(layer), device="meta")
        known = {*vars(quantized), *REPLACED_FORWARD}
        quantized.own_attributes = tuple(name for name in vars(layer) if name not in known)
        return copy_attributes_(quantized, layer, quantized.own_attributes)

    def blank_float(self) -> nn.Module:
        """Return a float layer like this one, its parameters on meta."""
        layer = self.float_type.__new__(self.float_type)
        self.plain_type.__init__(layer, **self.arguments(self), device="meta")
        return copy_attributes_(layer, self, self.own_attributes)

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is found by that of the float layer: it was made here, and no import has its name.
        return new_layer, (self.float_type,), self.__getstate__()


def copy_attributes_(target: Any, source: Any, names: tuple[str, ...]) -> Any:
    """Set the attributes `names` of `source` on `target`, and return that."""
    for name in names:
        target.__dict__[name] = source.__dict__[name]
    return target


def new_layer(float_type: type[nn.Module]) -> QuantizedLayer:
    """Return an instance of the quantized class of `float_type`, for pickle to fill."""
    kind = quantized_type(float_type)
    assert kind is not None
    return kind.__new__(kind)


def is_quantizable(module: nn.Module) -> bool:
    """Return whether `module` is a float layer with a quantized class, and holds its weight and its bias only.

    With a weight norm, for instance, it holds two parameters that its weight is computed from.
    """
    holds = [*module._parameters, *module._buffers, *module._modules]
    return quantized_type(type(module)) is not None and set(holds) == {"weight", "bias"}
