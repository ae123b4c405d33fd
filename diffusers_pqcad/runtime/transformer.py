"""Transformers over images, as UNets have them, in few calls of the int8 kernel: norms and sums are part of them."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from diffusers_pqcad.kernels.x86.calls import Call, run_call
from diffusers_pqcad.kernels.x86.norms import Norm, group_norm_of, normalization
from diffusers_pqcad.kernels.x86.packing import PackedLayer
from diffusers_pqcad.kernels.x86.structs import Addend, Affine, GroupNorm
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.runtime import attention, feed_forward, fusion
from diffusers_pqcad.runtime.attention import AttentionPlan, FusedAttention, is_patched
from diffusers_pqcad.runtime.feed_forward import FeedForwardPlan, FusedFeedForward

FORWARD = BasicTransformerBlock.forward  # it may be replaced


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


def plan_projection(layer: nn.Module, size: torch.Size, packed: PackedLayer | None = None) -> Call:
    """Return the call of `layer`, a convolution or linear, for the pixels of images of `size` (B, C, H, W).

    Both lie in memory alike, images in channels_last. `packed` is as in `plan_call`.
    """
    batch, channels, height, width = size
    is_linear = isinstance(fusion.layer_below(layer), nn.Linear)
    return fusion.plan_call(layer, torch.Size((batch, height * width, channels)) if is_linear else size, packed)


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
    return TransformerPlan(group_norm_of(norm), calls, normed, norm)


def run_transformer(plan: TransformerPlan, x: Tensor, context: Tensor | None) -> Tensor:
    """Return what the transformer makes of `x` fp32 (B, C, H, W) and `context` fp32 (B, K, D), of the plan's sizes."""
    x = x.contiguous(memory_format=torch.channels_last)
    context = None if context is None else context.contiguous()
    first, last = plan.calls
    gain, shift = normalization(plan.norm, x, first.layer.image)
    hidden = run_call(first, x, Affine(gain.data_ptr(), shift.data_ptr()))
    for part in plan.parts:
        if isinstance(part, FeedForwardPlan):
            hidden = feed_forward.run_feed_forward(part, hidden)
        else:
            hidden = attention.run_attention(part, hidden, context if part.takes_context else None)
    return run_call(last, hidden, addend=Addend(x.data_ptr(), 0), memory_format=torch.channels_last)


def transformer_output(x: Tensor, context: Tensor | None, group: Tensor, handle: Tensor) -> Tensor:
    """Return an empty output as large as `x` (B, C, H, W), channels_last."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@graph_ops.operator(fake=transformer_output)
def transformer(x: Tensor, context: Tensor | None, group: Tensor, handle: Tensor) -> Tensor:
    """Return the output of a `FusedTransformer2DModel`, as large as `x` (B, C, H, W), channels_last."""
    return graph_ops.compute(handle, group, x, context).contiguous(memory_format=torch.channels_last)


class FusedTransformer2DModel(fusion.FusedBlock, Transformer2DModel):
    """A fused `Transformer2DModel` over images, of the common kind.

    Its modules would also pass over memory for three layer norms and three sums a block, and copy the image to another
    layout and back.
    """

    plain = Transformer2DModel
    name = "transformer"
    parts = FusedAttention.guarded | FusedFeedForward.guarded

    @staticmethod
    def first_layer(block: Any) -> Any:
        """Return the projection of the image."""
        return fusion.layer_below(getattr(block, "proj_in", None))

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        timestep: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
        class_labels: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[Tensor]:
        """Return what `Transformer2DModel` returns."""
        others = (
            timestep,
            added_cond_kwargs,
            class_labels,
            cross_attention_kwargs,
            attention_mask,
            encoder_attention_mask,
        )
        says_more = any(value is not None and value != {} for value in others)
        # Of another type, where hooks kept this method longer than the block was of this class.
        is_fused = type(self) is FusedTransformer2DModel
        if says_more or not is_fused or not self.is_common(hidden_states, encoder_hidden_states):
            return Transformer2DModel.forward(self, hidden_states, encoder_hidden_states, *others, return_dict)
        if graph_ops.takes_operators():
            output = transformer(
                hidden_states, encoder_hidden_states, graph_ops.group_of(self.first_layer(self)), self.handle
            )
        else:
            output = self.compute(hidden_states, encoder_hidden_states)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def compute(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the output of a common call: fused, unless modules have hooks or were changed."""
        inputs = [x] if context is None else [x, context]
        packed = plan = None
        if BasicTransformerBlock.forward is FORWARD and not is_patched():
            sizes = tuple(tensor.shape for tensor in inputs)
            packed, plan = self.plan_of(inputs, sizes, lambda packed: self.build_plan(packed, *sizes))
        if packed is None or plan is None:
            return Transformer2DModel.forward(self, x, context, return_dict=False)[0]
        return run_transformer(plan, x, context)

    def is_common(self, x: Any, context: Any) -> bool:
        """Return whether this is a call of the common kind, for inference in fp32 on a CPU: no number is looked at."""
        if not fusion.is_inference(self, x, context) or not self.is_input_continuous or x.dim() != 4:
            return False
        return fusion.is_packed(self.proj_in) and all(
            is_common_block(block, x, context) for block in self.transformer_blocks
        )

    def build_plan(
        self, packed: PackedLayer, x_size: torch.Size, context_size: torch.Size | None = None
    ) -> TransformerPlan | None:
        """Return the plan for these sizes; `None` where a module is not as it was built, or has hooks."""
        norm = fusion.plain_norm(self.norm)
        if norm is None or not all(map(fusion.takes_kernel, (self.proj_in, self.proj_out))):
            return None
        if any(map(fusion.is_changed, fusion.parts_of(self))):
            return None
        first = plan_projection(self.proj_in, x_size, packed)
        inner = first.layer.output.out_channels
        last = plan_projection(self.proj_out, torch.Size((x_size[0], inner, *x_size[2:])))
        sequence = torch.Size((x_size[0], x_size[2:].numel(), inner))
        parts: list[tuple[LayerNorm, AttentionPlan | FeedForwardPlan]] = []
        for layer_norm, part, takes_context in self.parts_in_order():
            size = context_size if takes_context else None
            found, plan = plain_layer_norm(layer_norm), plan_part(part, sequence, size)
            if found is None or plan is None:
                return None
            parts.append((found, plan))
        return plan_transformer(x_size, norm, (first, last), parts)

    def parts_in_order(self) -> Iterator[tuple[nn.Module, FusedAttention | FusedFeedForward, bool]]:
        """Yield each part of the blocks after its layer norm, and whether it takes the context."""
        for block in self.transformer_blocks:
            yield block.norm1, block.attn1, False
            if block.attn2 is not None:
                yield block.norm2, block.attn2, True
            yield block.norm3, block.ff, False


def plan_part(
    part: FusedAttention | FusedFeedForward, sequence: torch.Size, context_size: torch.Size | None
) -> AttentionPlan | FeedForwardPlan | None:
    """Return the plan of `part` for inputs of size `sequence` (B, L, C); `None` where it cannot be one of a block."""
    if isinstance(part, FusedFeedForward):
        return part.build_plan(None, sequence)
    plan = part.build_plan(None, len(sequence), sequence, context_size)
    if plan is None or plan.norm is not None or plan.adds_input or part.rescale_output_factor != 1:
        return None
    return plan


def plain_layer_norm(module: nn.Module) -> LayerNorm | None:
    """Return the layer norm that `module` computes, or `None` where the kernel cannot take it."""
    if type(module) is not nn.LayerNorm or len(module.normalized_shape) != 1:
        return None
    if not fusion.is_plain(module.weight) or not fusion.is_plain(module.bias):
        return None
    return LayerNorm(module.weight.detach(), module.bias.detach(), module.eps)


def is_common_block(block: nn.Module, x: Tensor, context: Tensor | None) -> bool:
    """Return whether `block` of a transformer is of the common kind, and this call of it."""
    if type(block) is not BasicTransformerBlock or block.norm_type != "layer_norm" or block.only_cross_attention:
        return False
    if block.pos_embed is not None or block._chunk_size is not None:
        return False
    if type(block.attn1) is not FusedAttention or not block.attn1.is_common(x, None):
        return False
    if block.attn2 is not None and (type(block.attn2) is not FusedAttention or not block.attn2.is_common(x, context)):
        return False
    return type(block.ff) is FusedFeedForward and block.ff.is_common(x)
