"""Operators for the graphs of `torch.compile`, one for a packed layer or a fused block: nothing in them breaks a graph
or asks to recompile. Those of blocks are beside the blocks.

An operator computes as the eager module does, so a compiled model takes the same kernels. The module is named by a
tensor: a number would be a constant of the graph, and every block would be compiled anew.
"""

from collections.abc import Callable
from functools import wraps
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

MODULES: WeakValueDictionary[int, Any] = WeakValueDictionary()
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_numbers = count()


def register(module: nn.Module) -> Tensor:
    """Return the handle of `module`, an int64 scalar; it stays valid as long as the module lives."""
    number = next(_numbers)
    MODULES[number] = module
    return torch.tensor(number, device="cpu")  # named, or a loader's "build on meta" would apply to it


def takes_operators() -> bool:
    """Return whether this call is compiled for this process. An operator names its module by a number of it.

    What is exported may be saved and run anywhere: the reference kernel is traced there, with the weights.
    """
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def call(layer: Any, x: Tensor) -> Tensor:
    """Return what `layer(x)` returns, by an operator. `layer` is traced: its shapes become part of the graph."""
    group = group_of(layer)
    if isinstance(layer, nn.Linear):
        return packed_linear(x, group, layer.handle, layer.out_features)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if isinstance(layer.padding, str) or layer.padding_mode != "zeros":
        ends = layer._reversed_padding_repeated_twice[::-1]  # numbers, where `padding` may be a word
        padding = [before + after for before, after in zip(ends[::2], ends[1::2], strict=True)]
    else:
        padding = [2 * number for number in layer.padding]
    geometry = (list(layer.kernel_size), padding, list(layer.dilation), list(layer.stride))
    return packed_conv(x, group, layer.handle, layer.out_channels, *geometry)


def group_of(layer: Any) -> Tensor:
    """Return this call's activation ranges, () or (B,) int64; zero where there is one group, or none."""
    group = layer.input_group()
    return group if isinstance(group, Tensor) else torch.zeros((), dtype=torch.int64, device="cpu")


def compute(handle: Tensor, group: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return what the layer or block named by `handle` computes of `inputs` in the `group`, () or (B,) int64."""
    module = MODULES[int(handle)]
    layer: Any = module if isinstance(module, LAYERS) else module.first_layer(module)
    if layer.timestep_groups is None:
        return module.compute(*inputs)
    return layer.timestep_groups.run(group, module.compute, *inputs)


def operator(fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], Any]:
    """Return a decorator that makes a function the operator of its name; `fake` returns an output of its shape.

    `custom_op` would also make it ready for autograd, at a cost in each call; this one refuses inputs that ask for a
    gradient, which an exported graph may get. Layers and blocks that are traced with such inputs are not operators.
    """

    def register_operator(function: Callable[..., Tensor]) -> Any:
        name = f"pqcad::{function.__name__}"

        @wraps(function)
        def run(*args: Any) -> Tensor:
            if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
                raise RuntimeError(
                    f"{name} has no gradient, but an input asks for one. Call the graph under torch.no_grad(), or "
                    "trace it with inputs that ask for a gradient."
                )
            return function(*args)

        schema = torch.library.infer_schema(function, mutates_args=())
        torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(name, "CompositeExplicitAutograd", run)
        torch.library.register_fake(name, fake)
        return getattr(torch.ops.pqcad, function.__name__).default

    return register_operator


def linear_output(x: Tensor, group: Tensor, handle: Tensor, out_features: int) -> Tensor:
    """Return an empty output (..., out_features) of a matrix product."""
    return x.new_empty(*x.shape[:-1], out_features)


def conv_output(
    x: Tensor,
    group: Tensor,
    handle: Tensor,
    out_channels: int,
    kernel_size: list[int],
    padding: list[int],
    dilation: list[int],
    stride: list[int],
) -> Tensor:
    """Return an empty output of a convolution, of images channels_last."""
    dimensions = len(kernel_size)
    size = [
        (x.shape[axis - dimensions] + padding[axis] - dilation[axis] * (kernel_size[axis] - 1) - 1) // stride[axis] + 1
        for axis in range(dimensions)
    ]
    shape = (*x.shape[: -dimensions - 1], out_channels, *size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=conv_memory_format(x, kernel_size))


def conv_memory_format(x: Tensor, kernel_size: list[int]) -> torch.memory_format:
    """Return the memory format of a convolution's output: channels_last for a batch of images."""
    is_batch_of_images = len(kernel_size) == 2 and x.dim() == 4
    return torch.channels_last if is_batch_of_images else torch.contiguous_format


@operator(fake=linear_output)
def packed_linear(x: Tensor, group: Tensor, handle: Tensor, out_features: int) -> Tensor:
    """Return the output (..., out_features) of a `PQCADLinear`."""
    return compute(handle, group, x).contiguous()  # hooks were traced before


@operator(fake=conv_output)
def packed_conv(
    x: Tensor,
    group: Tensor,
    handle: Tensor,
    out_channels: int,
    kernel_size: list[int],
    padding: list[int],
    dilation: list[int],
    stride: list[int],
) -> Tensor:
    """Return the output of a packed convolution, of images channels_last.

    The lists have a number for each of its dimensions; `padding` is the sum of both sides.
    """
    output = compute(handle, group, x)  # hooks were traced before
    return output.contiguous(memory_format=conv_memory_format(x, kernel_size))
