"""The quantized layers of a model, and what its layers are called."""

from typing import Any

from torch import nn

from diffusers_pqcad.layers.quantized import QuantizedLayer


def refuse_other_than_model(model: Any) -> None:
    """Raise ValueError for a pipeline, or anything else that is no module."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"expected a model, got {type(model).__name__}. Give its parts one by one, such as `pipe.unet`, or load "
            "the pipeline by from_pretrained(..., quantization_config=...)."
        )


def layer_name(name: str) -> str:
    """Return what the layer of the module `name` is called: an adapted one by its own name, not by peft's for it."""
    return name.removesuffix(".base_layer")


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """Return the layer of `model` that is called `name`; of an adapted one, the layer below its adapter."""
    module = model.get_submodule(name)
    return getattr(module, "base_layer", module)


def is_of_adapter(name: str) -> bool:
    """Return whether the module or parameter `name` belongs to a LoRA of peft."""
    return ".lora_" in name


def quantized_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the quantized layers of `model`, packed or not yet, by name, in registration order."""
    refuse_other_than_model(model)
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}


def packed_layers(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Return the packed layers of `model` by name, in registration order."""
    return {name: layer for name, layer in quantized_layers(model).items() if layer.packed}


def kernel_cache_bytes(model: nn.Module) -> int:
    """Return the bytes of the int8 copies that kernels hold beside the packed weights, built on first use.

    What they pad, and some numbers for each output, are not counted.
    """
    return sum(layer.cached_bytes() for layer in packed_layers(model).values())
