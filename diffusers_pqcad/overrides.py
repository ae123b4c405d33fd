"""Methods that a quantized model has of its own, where those of its class would be wrong or fail.

They sit on the instance, so the class and other models keep theirs, and `dequantize()` takes them off again.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from diffusers_pqcad.layers import packed_layers


def num_parameters(model: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """Return the number of parameters of the float model that this quantized model stands for."""
    count = type(model).num_parameters(model, only_trainable, exclude_embeddings)
    if only_trainable:
        return count
    return count + sum(layer.weight_shape.numel() for layer in packed_layers(model).values())


def to(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Move the model. `dtype=None` means no dtype: diffusers takes the bare word for a cast and refuses it.

    Its own `save_lora_adapter` calls `to(dtype=None)`, and so fails on every quantized model.
    """
    if kwargs.get("dtype", ...) is None:
        kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
        if not args and not kwargs:
            return model
    return type(model).to(model, *args, **kwargs)


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


# With the method whose presence in the class makes each of them necessary.
OVERRIDES: dict[Callable[..., Any], str] = {
    num_parameters: "num_parameters",
    to: "enable_layerwise_casting",  # that is, a diffusers model; other modules know that no dtype is no cast
    enable_layerwise_casting: "enable_layerwise_casting",
    fuse_qkv_projections: "fuse_qkv_projections",
    save_motion_modules: "save_motion_modules",
}


def override_methods_(model: nn.Module) -> None:
    """Give the quantized `model` those of `OVERRIDES` that its class makes necessary."""
    for function, method in OVERRIDES.items():
        if hasattr(type(model), method):
            # Not a bound method: pickle looks those up by name, and would bring back the class's own.
            setattr(model, function.__name__, partial(function, model))


def restore_methods_(model: nn.Module) -> None:
    """Undo `override_methods_`."""
    for function in OVERRIDES:
        model.__dict__.pop(function.__name__, None)
