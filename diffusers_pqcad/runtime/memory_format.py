"""channels_last from the first convolution on: the layout of the int8 convolutions, and none of its copies between."""

from typing import Any

import torch
from torch import Tensor, nn

from diffusers_pqcad.numerics.qparams import is_exported


def channels_last_input(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Forward-pre-hook of a float convolution: give it a channels_last input, and its output follows.

    At a model's first convolution it is an image or a latent, and small; what would be copied in its place are the
    later activations that meet the output of an int8 convolution, in sums and concatenations.
    """
    if is_exported() or not args or not isinstance(args[0], Tensor):  # float convolutions follow, of any layout
        return None
    x = args[0]
    if x.dim() != 4 or x.device.type != "cpu":
        return None
    # A single channel fits either layout, and its strides must say which.
    if x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last):
        return None
    return (x.to(memory_format=torch.channels_last, copy=True), *args[1:])


def install_channels_last_(model: nn.Module) -> None:
    """Let the float convolutions of `model` compute in channels_last."""
    remove_channels_last_(model)
    for module in model.modules():
        if type(module) is nn.Conv2d:
            module.register_forward_pre_hook(channels_last_input)


def remove_channels_last_(model: nn.Module) -> None:
    """Undo `install_channels_last_`."""
    for module in model.modules():
        for key, hook in list(module._forward_pre_hooks.items()):
            if hook is channels_last_input:
                del module._forward_pre_hooks[key]
