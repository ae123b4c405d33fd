"""Methods that a quantized model has of its own, where those of its class would be wrong or fail.

They sit on the instance, so the class and other models keep theirs, and `dequantize()` takes them off again.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.runtime.merging import fuse_lora


def num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Return the number of parameters of the float model that this quantized model stands for."""
    count = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    if only_trainable:
        return count
    return count + sum(layer.weight_shape.numel() for layer in packed_layers(model).values())


@contextmanager
def as_float(model: Any) -> Iterator[None]:
    """Let `model` say that it is not quantized: both libraries refuse to cast what is, even to the dtype that it has.

    Packed layers compute in any dtype, and a cast leaves their integers and scales as they are.
    """
    mark = model.__dict__.pop("is_quantized", None)
    try:
        yield
    finally:
        if mark is not None:
            model.is_quantized = mark


def to(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Move the model, or cast what stays in floating point, as the class does with a float model."""
    with as_float(model):
        return type(model).to(model, *args, **kwargs)


def half(model: Any, *args: Any) -> Any:
    """Cast what stays in floating point to fp16, as the class does with a float model."""
    with as_float(model):
        return type(model).half(model, *args)


def float_(model: Any, *args: Any) -> Any:
    """Cast what stays in floating point to fp32, as the class does with a float model."""
    with as_float(model):
        return type(model).float(model, *args)


def enable_layerwise_casting(model: Any, *args: Any, **kwargs: Any) -> None:
    """Raise ValueError: the casting would round scales and biases, and has little left to save."""
    raise ValueError(
        f"{type(model).__name__}.enable_layerwise_casting: the weights are packed to a few bits already, and casting "
        "would only round their scales and biases. Leave it out, or call dequantize() first."
    )


def fuse_qkv_projections(model: Any) -> None:
    """Raise ValueError: diffusers would build a float layer out of the packed ones."""
    raise ValueError(
        f"{type(model).__name__}.fuse_qkv_projections: fused projections would be float copies of the packed ones. "
        "Fuse the float model, then quantize it with diffusers_pqcad.quantize_()."
    )


def save_motion_modules(model: Any, *args: Any, **kwargs: Any) -> None:
    """Save the motion modules; raise ValueError where they are packed: the file is that of a float `MotionAdapter`."""
    packed = [name for name in packed_layers(model) if "motion_modules" in name]
    if packed:
        raise ValueError(
            f"{type(model).__name__}.save_motion_modules: {packed[0]} is quantized, and a MotionAdapter is not. Call "
            "dequantize() on a copy of the model first, or save the whole model with save_pretrained()."
        )
    type(model).save_motion_modules(model, *args, **kwargs)


OVERRIDES: dict[str, Callable[..., Any]] = {
    "num_parameters": num_parameters,
    "to": to,
    "half": half,
    "float": float_,
    "enable_layerwise_casting": enable_layerwise_casting,
    "fuse_qkv_projections": fuse_qkv_projections,
    "fuse_lora": fuse_lora,
    "save_motion_modules": save_motion_modules,
}


def override_methods_(model: nn.Module) -> None:
    """Give the quantized `model` those of `OVERRIDES` that its class has beside, or instead of, a module's own."""
    for name, function in OVERRIDES.items():
        if getattr(type(model), name, None) is not getattr(nn.Module, name, None):
            # Not a bound method: pickle looks those up by name, and would bring back the class's own.
            setattr(model, name, partial(function, model))


def restore_methods_(model: nn.Module) -> None:
    """Undo `override_methods_`."""
    for name in OVERRIDES:
        model.__dict__.pop(name, None)
