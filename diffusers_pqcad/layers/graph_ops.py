"""Operators for the graphs of `torch.compile`, one for a packed layer or a block of such: nothing in them breaks a
graph or asks to recompile.

An operator computes as the eager module does, so a compiled model takes the same kernels. The module is named by a
tensor: a number would be a constant of the graph, and every block would be compiled anew.
"""

from collections.abc import Callable
from functools import wraps
from itertools import count
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers_pqcad.layers.quantized import QuantizedLayer
    from diffusers_pqcad.runtime.attention import FusedAttention
    from diffusers_pqcad.runtime.feed_forward import FusedFeedForward
    from diffusers_pqcad.runtime.residual import FusedResnetBlock2D
    from diffusers_pqcad.runtime.transformer import FusedTransformer2DModel

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


def call(layer: "QuantizedLayer", x: Tensor) -> Tensor:
    """Return what `layer(x)` returns, by an operator. `layer` is traced: its shapes become part of the graph."""
    group = group_of(layer)
    if isinstance(layer, nn.Linear):
        return packed_linear(x, group, layer.handle, layer.out_features)
    assert isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    ends = layer._reversed_padding_repeated_twice[::-1]  # numbers, where `padding` may be a word
    padding = [before + after for before, after in zip(ends[::2], ends[1::2], strict=True)]
    geometry = (list(layer.kernel_size), padding, list(layer.dilation), list(layer.stride))
    return packed_conv(x, group, layer.handle, layer.out_channels, *geometry)


def call_block(block: "FusedResnetBlock2D", x: Tensor, temb: Tensor | None) -> Tensor:
    """Return what `block(x, temb)` returns, by an operator: a call that is common (`is_common`)."""
    return residual_block(x, temb, group_of(block.first_layer(block)), block.handle, block.out_channels)


def call_attention(block: "FusedAttention", x: Tensor, context: Tensor | None) -> Tensor:
    """Return what `block(x, context)` returns, by an operator: a call that is common (`is_common`)."""
    return attention_block(x, context, group_of(block.first_layer(block)), block.handle, block.to_out[0].out_features)


def call_feed_forward(block: "FusedFeedForward", x: Tensor) -> Tensor:
    """Return what `block(x)` returns, by an operator: a call that is common (`is_common`)."""
    return feed_forward(x, group_of(block.first_layer(block)), block.handle, block.net[2].out_features)


def call_transformer(block: "FusedTransformer2DModel", x: Tensor, context: Tensor | None) -> Tensor:
    """Return the output of `block` for `x` and `context`, by an operator: a call that is common (`is_common`)."""
    return transformer(x, context, group_of(block.first_layer(block)), block.handle)


def group_of(layer: "QuantizedLayer") -> Tensor:
    """Return this call's activation ranges, () or (B,) int64; zero where there is one group, or none."""
    group = layer.input_group()
    return group if isinstance(group, Tensor) else torch.zeros((), dtype=torch.int64)


def compute(handle: Tensor, group: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return what the layer or block named by `handle` computes of `inputs` in the `group`, () or (B,) int64."""
    module = MODULES[int(handle)]
    layer: Any = module if isinstance(module, LAYERS) else module.first_layer(module)
    if layer.timestep_groups is None:
        return module.compute(*inputs)
    return layer.timestep_groups.run(group, module.compute, *inputs)


def operator(function: Callable[..., Tensor]) -> Any:
    """Make `function` the operator of its name.

    `custom_op` would also make it ready for autograd, at a cost in each call; this one refuses inputs that ask for a
    gradient, which an exported graph may get. Layers and blocks that are traced with such inputs are not operators.
    """
    name = f"pqcad::{function.__name__}"

    @wraps(function)
    def run(*args: Any) -> Tensor:
        if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args):
            raise RuntimeError(
                f"{name} has no gradient, but an input asks for one. Call the graph under torch.no_grad(), or trace "
                "it with inputs that ask for a gradient."
            )
        return function(*args)

    schema = torch.library.infer_schema(function, mutates_args=())
    torch.library.define(name, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(name, "CompositeExplicitAutograd", run)
    return getattr(torch.ops.pqcad, function.__name__).default


@operator
def packed_linear(x: Tensor, group: Tensor, handle: Tensor, out_features: int) -> Tensor:
    """Return the output (..., out_features) of a `PQCADLinear`."""
    return compute(handle, group, x).contiguous()  # hooks were traced before


@torch.library.register_fake("pqcad::packed_linear")
def _(x: Tensor, group: Tensor, handle: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@operator
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


def conv_memory_format(x: Tensor, kernel_size: list[int]) -> torch.memory_format:
    """Return the memory format of a convolution's output: channels_last for a batch of images."""
    is_batch_of_images = len(kernel_size) == 2 and x.dim() == 4
    return torch.channels_last if is_batch_of_images else torch.contiguous_format


@torch.library.register_fake("pqcad::packed_conv")
def _(
    x: Tensor,
    group: Tensor,
    handle: Tensor,
    out_channels: int,
    kernel_size: list[int],
    padding: list[int],
    dilation: list[int],
    stride: list[int],
) -> Tensor:
    dimensions = len(kernel_size)
    size = [
        (x.shape[axis - dimensions] + padding[axis] - dilation[axis] * (kernel_size[axis] - 1) - 1) // stride[axis] + 1
        for axis in range(dimensions)
    ]
    shape = (*x.shape[: -dimensions - 1], out_channels, *size)
    memory_format = conv_memory_format(x, kernel_size)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=memory_format)


@operator
def residual_block(x: Tensor, temb: Tensor | None, group: Tensor, handle: Tensor, out_channels: int) -> Tensor:
    """Return the output (B, out_channels, H, W) of a `FusedResnetBlock2D`, channels_last."""
    return compute(handle, group, x, temb).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("pqcad::residual_block")
def _(x: Tensor, temb: Tensor | None, group: Tensor, handle: Tensor, out_channels: int) -> Tensor:
    shape = (x.shape[0], out_channels, *x.shape[2:])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@operator
def attention_block(x: Tensor, context: Tensor | None, group: Tensor, handle: Tensor, out_channels: int) -> Tensor:
    """Return the output of a `FusedAttention`: (B, L, out_channels), or as large as `x` (B, C, H, W)."""
    output = compute(handle, group, x, context)
    return output.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


@torch.library.register_fake("pqcad::attention_block")
def _(x: Tensor, context: Tensor | None, group: Tensor, handle: Tensor, out_channels: int) -> Tensor:
    if x.dim() == 4:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return x.new_empty(*x.shape[:2], out_channels)


@operator
def feed_forward(x: Tensor, group: Tensor, handle: Tensor, out_features: int) -> Tensor:
    """Return the output (..., out_features) of a `FusedFeedForward`."""
    return compute(handle, group, x).contiguous()


@torch.library.register_fake("pqcad::feed_forward")
def _(x: Tensor, group: Tensor, handle: Tensor, out_features: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


@operator
def transformer(x: Tensor, context: Tensor | None, group: Tensor, handle: Tensor) -> Tensor:
    """Return the output of a `FusedTransformer2DModel`, as large as `x` (B, C, H, W), channels_last."""
    return compute(handle, group, x, context).contiguous(memory_format=torch.channels_last)


@torch.library.register_fake("pqcad::transformer")
def _(x: Tensor, context: Tensor | None, group: Tensor, handle: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
