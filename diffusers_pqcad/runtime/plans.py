"""Blocks of several layers as the kernel x86 computes them: a plan for each size of input, then a few calls of C."""

import ctypes
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusers_pqcad.kernels import x86
from diffusers_pqcad.kernels.native import scratch
from diffusers_pqcad.kernels.x86 import (
    NAME,
    NO_AFFINE,
    Addend,
    Affine,
    Call,
    GroupNorm,
    Norm,
    PackedLayer,
    ResidualBlock,
    attention,
)
from diffusers_pqcad.layers.quantized import QuantizedLayer


class BlockPlan(NamedTuple):
    """A residual block at one size of its input and one activation range of each layer; `keeps` lives as long.

    The packed weights of the first convolution hold the plan, and not the plan them: its caller does.
    """

    block: ResidualBlock
    size: tuple[int, ...]
    num_bytes: int
    keeps: tuple[Any, ...]


class AttentionPlan(NamedTuple):
    """An attention block at one size of its inputs and one activation range of each layer; `keeps` lives as long.

    `calls` are those of queries, keys, values and output; a layer norm before them is in `affine`. The packed weights
    of the queries hold the plan, and not the plan them: its caller does. As a part of a transformer it holds all.
    """

    norm: GroupNorm | None
    calls: tuple[Call, ...]
    heads: int
    adds_input: bool
    takes_context: bool
    keeps: Any
    affine: Affine = NO_AFFINE


class FeedForwardPlan(NamedTuple):
    """A gated feed-forward block at one size of its input and one activation range of each layer.

    `calls` are those of the gated layer and the last one; a layer norm before them is in `affine`, and `keeps` holds
    it. With `adds_input`, the input is added to the output. The packed weights of the first hold the plan, and not the
    plan them: its caller does. As a part of a transformer it holds all.
    """

    calls: tuple[Call, ...]
    adds_input: bool = False
    keeps: Any = None
    affine: Affine = NO_AFFINE


class LayerNorm(NamedTuple):
    """What a layer norm over the channels is: weight and bias fp32 (C,)."""

    weight: Tensor
    bias: Tensor
    eps: float


class TransformerPlan(NamedTuple):
    """A transformer over the pixels of images at one size of its inputs and one activation range of each layer.

    `calls` are those of the first and the last projection; `parts` are what lies between them, in order. The packed
    weights of the first projection hold the plan, and not the plan them: its caller does.
    """

    norm: GroupNorm
    calls: tuple[Call, Call]
    parts: tuple[AttentionPlan | FeedForwardPlan, ...]
    keeps: Norm


def plan_call(layer: QuantizedLayer, size: torch.Size, packed: PackedLayer | None = None) -> Call:
    """Return the call of `layer` for an input of `size`, for a plan: other calls of the layer leave it as it is.

    It keeps what the layer has packed, unless that is `packed`, which keeps the plan.
    """
    own = layer.packed_for(NAME) if packed is None else packed  # once: another thread may pack the layer anew
    call = x86.call_of(layer.operation(layer.input_group()), own, size)
    return call._replace(keeps=(call.keeps, own if packed is None else None))


def plan_block(
    x_size: torch.Size,
    time_size: torch.Size | None,
    norms: tuple[Norm, Norm],
    layers: tuple[QuantizedLayer | None, QuantizedLayer, QuantizedLayer, QuantizedLayer | None],
    packed: PackedLayer,
    *,
    embeds_silu: bool,
) -> BlockPlan:
    """Return the plan of a residual block for images of `x_size` (B, C, H, W) and time vectors of `time_size` (B, E).

    `layers` are those of the time embedding, both convolutions, and the shortcut; `packed` is the first convolution's;
    `embeds_silu` says whether a SiLU comes before the first layer. Raises ValueError for parts whose sizes do not fit:
    C would read beyond them.
    """
    embedding, conv1, conv2, shortcut = layers
    first = plan_call(conv1, x_size, packed)
    hidden = torch.Size(first.size)
    second = plan_call(conv2, hidden)
    embedded = None if embedding is None or time_size is None else plan_call(embedding, time_size)
    shortened = None if shortcut is None else plan_call(shortcut, x_size)
    sizes = {
        "norm1": (norms[0].weight.shape, norms[0].bias.shape, x_size[1:2]),
        "norm2": (norms[1].weight.shape, norms[1].bias.shape, hidden[1:2]),
        "time embedding": (hidden[:2] if embedded is None else embedded.size, hidden[:2]),
        "residual": (x_size if shortened is None else shortened.size, second.size),
    }
    for name, (*found, wanted) in sizes.items():
        if any(tuple(size) != tuple(wanted) for size in found):
            raise ValueError(
                f"{conv1.name}: {name} of its block: expected a size of {tuple(wanted)}, got {[*map(tuple, found)]}. "
                "Parts of a residual block can only be replaced by others of their sizes."
            )
    calls = (embedded, first, second, shortened)
    addresses = (None if call is None else ctypes.addressof(call.layer) for call in calls)
    block = ResidualBlock(*map(x86.group_norm_of, norms), *addresses, embeds_silu)
    return BlockPlan(block, second.size, x86.compiled().block_bytes(block), (calls, norms))


def run_block(plan: BlockPlan, x: Tensor, time: Tensor | None) -> Tensor:
    """Return what the block makes of `x` fp32 (B, C, H, W) and `time` fp32 (B, E), both of the plan's sizes."""
    x = x.contiguous(memory_format=torch.channels_last)
    time = None if time is None else time.contiguous()
    output = torch.empty(plan.size, dtype=torch.float32, device="cpu", memory_format=torch.channels_last)
    memory = scratch.buffer(plan.num_bytes)
    time_at = None if time is None else time.data_ptr()
    x86.compiled().run_block(x.data_ptr(), time_at, plan.block, memory.data_ptr(), output.data_ptr())
    scratch.give_back(memory)
    return output


def plan_attention(
    x_size: torch.Size,
    context_size: torch.Size | None,
    norm: Norm | None,
    layers: tuple[QuantizedLayer, QuantizedLayer, QuantizedLayer, QuantizedLayer],
    packed: PackedLayer | None,
    heads: int,
    *,
    adds_input: bool,
) -> AttentionPlan:
    """Return the plan of an attention block from `x_size` (B, L, C) to `context_size` (B, K, D), `None` for the same.

    `layers` are those of queries, keys, values and output; `packed` is as in `plan_call`; `norm` is a group norm
    before them, and `adds_input` adds the input to the output. Raises ValueError for parts whose sizes do not fit: C
    would read beyond them.
    """
    query, key, value, last = layers
    others = x_size if context_size is None else context_size
    calls = [plan_call(query, x_size, packed), plan_call(key, others), plan_call(value, others)]
    calls.append(plan_call(last, torch.Size(calls[0].size)))
    if norm is not None and not norm.weight.shape == norm.bias.shape == x_size[2:]:
        raise ValueError(
            f"{last.name}: group norm of its block: expected {x_size[2]} channels, got a weight of "
            f"{tuple(norm.weight.shape)} and a bias of {tuple(norm.bias.shape)}."
        )
    sizes = [call.size for call in calls[:3]]
    if sizes[0][::2] != sizes[1][::2] or sizes[1] != sizes[2] or sizes[0][2] % heads:
        raise ValueError(
            f"{last.name}: attention of its block: expected queries (B, Q, C), keys and values (B, K, C) with C "
            f"divisible by {heads} heads, got {sizes}."
        )
    if adds_input and tuple(calls[3].size) != tuple(x_size):
        raise ValueError(f"{last.name}: an input of {tuple(x_size)} cannot be added to its output of {calls[3].size}.")
    group_norm = None if norm is None else x86.group_norm_of(norm)
    return AttentionPlan(group_norm, tuple(calls), heads, adds_input, context_size is not None, norm)


def run_attention(plan: AttentionPlan, x: Tensor, context: Tensor | None) -> Tensor:
    """Return what the block makes of `x` fp32 (B, L, C) and `context` fp32 (B, K, D), of the plan's sizes."""
    x = x.contiguous()
    query, key, value, last = plan.calls
    affine = plan.affine
    if plan.norm is not None:
        gain, shift = x86.normalization(plan.norm, x, query.layer.image)
        affine = Affine(gain.data_ptr(), shift.data_ptr(), 0)
    if context is None:
        queries, keys, values = x86.run_calls((query, key, value), x, affine)
    else:
        queries = x86.run_call(query, x, affine)
        keys, values = x86.run_calls((key, value), context.contiguous())
    attended = attention.attention(queries, keys, values, plan.heads)
    return x86.run_call(last, attended, addend=addend_of(plan, x))


def addend_of(plan: AttentionPlan | FeedForwardPlan, x: Tensor) -> Addend:
    """Return what is added to the output of `plan` for `x`."""
    return Addend(x.data_ptr() if plan.adds_input else None, 0)


def plan_feed_forward(
    size: torch.Size, first: QuantizedLayer, second: QuantizedLayer, packed: PackedLayer | None
) -> FeedForwardPlan | None:
    """Return the plan of `second` after a GEGLU (Shazeer 2020, arXiv:2002.05202) of `first`, for inputs of `size`.

    `packed` is as in `plan_call`. `None` where the kernel cannot gate outputs: they must fill its blocks. Raises
    ValueError for layers that do not fit to each other: C would read beyond them.
    """
    call = plan_call(first, size, packed)
    outputs = call.layer.output.out_channels
    if outputs % (2 * x86.compiled().block_outputs()):
        return None
    call.layer.output.out_channels, call.layer.output.is_gated = outputs // 2, 1
    gated = call._replace(size=(*call.size[:-1], outputs // 2))
    return FeedForwardPlan((gated, plan_call(second, torch.Size(gated.size))))


def run_feed_forward(plan: FeedForwardPlan, x: Tensor) -> Tensor:
    """Return what the block makes of `x` fp32, of the plan's size."""
    gated, last = plan.calls
    x = x.contiguous()
    return x86.run_call(last, x86.run_call(gated, x, plan.affine), addend=addend_of(plan, x))


def plan_projection(layer: QuantizedLayer, size: torch.Size, packed: PackedLayer | None = None) -> Call:
    """Return the call of `layer`, a convolution or linear, for the pixels of images of `size` (B, C, H, W).

    Both lie in memory alike, images in channels_last. `packed` is as in `plan_call`.
    """
    batch, channels, height, width = size
    is_linear = isinstance(layer, nn.Linear)
    return plan_call(layer, torch.Size((batch, height * width, channels)) if is_linear else size, packed)


def plan_transformer(
    x_size: torch.Size,
    norm: Norm,
    projections: tuple[Call, Call],
    parts: list[tuple[LayerNorm, AttentionPlan | FeedForwardPlan]],
) -> TransformerPlan | None:
    """Return the plan of a transformer over images of `x_size` (B, C, H, W), between two `projections`.

    Each of `parts` comes after its layer norm, and its input is added to its output. `None` where sizes do not fit: C
    would read beyond them.
    """
    batch, channels, height, width = x_size
    first, last = projections
    inner = first.layer.output.out_channels
    sequence = (batch, height * width, inner)
    for call, outputs in ((first, inner), (last, channels)):
        if call.size not in ((batch, outputs, height, width), (batch, height * width, outputs)):
            return None
    if not norm.weight.shape == norm.bias.shape == (channels,):
        return None
    for layer_norm, part in parts:
        if not layer_norm.weight.shape == layer_norm.bias.shape == (inner,) or tuple(part.calls[-1].size) != sequence:
            return None
    normed = tuple(
        part._replace(
            affine=Affine(layer_norm.weight.data_ptr(), layer_norm.bias.data_ptr(), 0, 1, layer_norm.eps),
            adds_input=True,
            keeps=(part.keeps, layer_norm),
        )
        for layer_norm, part in parts
    )
    calls = first._replace(size=sequence), last._replace(size=tuple(x_size))
    return TransformerPlan(x86.group_norm_of(norm), calls, normed, norm)


def run_transformer(plan: TransformerPlan, x: Tensor, context: Tensor | None) -> Tensor:
    """Return what the transformer makes of `x` fp32 (B, C, H, W) and `context` fp32 (B, K, D), of the plan's sizes."""
    x = x.contiguous(memory_format=torch.channels_last)
    context = None if context is None else context.contiguous()
    first, last = plan.calls
    gain, shift = x86.normalization(plan.norm, x, first.layer.image)
    hidden = x86.run_call(first, x, Affine(gain.data_ptr(), shift.data_ptr()))
    for part in plan.parts:
        if isinstance(part, FeedForwardPlan):
            hidden = run_feed_forward(part, hidden)
        else:
            hidden = run_attention(part, hidden, context if part.takes_context else None)
    return x86.run_call(last, hidden, addend=Addend(x.data_ptr(), 0), memory_format=torch.channels_last)
