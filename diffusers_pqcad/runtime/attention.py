"""Attention blocks in few calls of the int8 kernel, their softmax products in bf16 where the CPU has them."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from diffusers_pqcad.kernels.x86.attention import attention
from diffusers_pqcad.kernels.x86.calls import Call, run_call, run_calls
from diffusers_pqcad.kernels.x86.norms import Norm, group_norm_of, normalization
from diffusers_pqcad.kernels.x86.packing import PackedLayer
from diffusers_pqcad.kernels.x86.structs import NO_AFFINE, Affine, GroupNorm
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.runtime import fusion

# Who follows the maps of attention puts something in the place of these.
PROCESS, PRODUCT = AttnProcessor2_0.__call__, F.scaled_dot_product_attention
ABSENT = ("spatial_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj")  # from the common kind


def is_patched() -> bool:
    """Return whether what all attention is computed by was replaced."""
    return AttnProcessor2_0.__call__ is not PROCESS or F.scaled_dot_product_attention is not PRODUCT


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


def plan_attention(
    x_size: torch.Size,
    context_size: torch.Size | None,
    norm: Norm | None,
    layers: tuple[nn.Module, nn.Module, nn.Module, nn.Module],
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
    calls = [fusion.plan_call(query, x_size, packed), fusion.plan_call(key, others), fusion.plan_call(value, others)]
    calls.append(fusion.plan_call(last, torch.Size(calls[0].size)))
    name = fusion.layer_below(last).name
    if norm is not None and not norm.weight.shape == norm.bias.shape == x_size[2:]:
        raise ValueError(
            f"{name}: group norm of its block: expected {x_size[2]} channels, got a weight of "
            f"{tuple(norm.weight.shape)} and a bias of {tuple(norm.bias.shape)}."
        )
    sizes = [call.size for call in calls[:3]]
    if sizes[0][::2] != sizes[1][::2] or sizes[1] != sizes[2] or sizes[0][2] % heads:
        raise ValueError(
            f"{name}: attention of its block: expected queries (B, Q, C), keys and values (B, K, C) with C "
            f"divisible by {heads} heads, got {sizes}."
        )
    if adds_input and tuple(calls[3].size) != tuple(x_size):
        raise ValueError(f"{name}: an input of {tuple(x_size)} cannot be added to its output of {calls[3].size}.")
    group_norm = None if norm is None else group_norm_of(norm)
    return AttentionPlan(group_norm, tuple(calls), heads, adds_input, context_size is not None, norm)


def run_attention(plan: AttentionPlan, x: Tensor, context: Tensor | None) -> Tensor:
    """Return what the block makes of `x` fp32 (B, L, C) and `context` fp32 (B, K, D), of the plan's sizes."""
    x = x.contiguous()
    query, key, value, last = plan.calls
    affine = plan.affine
    if plan.norm is not None:
        gain, shift = normalization(plan.norm, x, query.layer.image)
        affine = Affine(gain.data_ptr(), shift.data_ptr(), 0)
    if context is None:
        queries, keys, values = run_calls((query, key, value), x, affine)
    else:
        queries = run_call(query, x, affine)
        keys, values = run_calls((key, value), context.contiguous())
    attended = attention(queries, keys, values, plan.heads)
    return run_call(last, attended, addend=fusion.addend_of(x, adds_input=plan.adds_input))


def attention_output(x: Tensor, context: Tensor | None, group: Tensor, handle: Tensor, out_channels: int) -> Tensor:
    """Return an empty output: (B, L, out_channels), or as large as `x` (B, C, H, W)."""
    if x.dim() == 4:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return x.new_empty(*x.shape[:2], out_channels)


@graph_ops.operator(fake=attention_output)
def attention_block(x: Tensor, context: Tensor | None, group: Tensor, handle: Tensor, out_channels: int) -> Tensor:
    """Return the output of a `FusedAttention`: (B, L, out_channels), or as large as `x` (B, C, H, W)."""
    output = graph_ops.compute(handle, group, x, context)
    return output.contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


class FusedAttention(fusion.FusedBlock, Attention):
    """A fused `Attention` of the common kind, by the default processor."""

    plain = Attention
    name = "attention"
    attributes = ("heads", "residual_connection", "rescale_output_factor")

    @staticmethod
    def first_layer(block: Any) -> Any:
        """Return the layer of the queries."""
        return fusion.layer_below(block.to_q)

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Return what `Attention` returns."""
        inputs = hidden_states, encoder_hidden_states
        if type(self) is not FusedAttention:  # hooks may keep this method longer than the block is of this class
            return Attention.forward(self, *inputs, attention_mask, **cross_attention_kwargs)
        # Residual blocks of UNets name their time embedding, for a norm that the common kind does not have.
        others = attention_mask is not None or not set(cross_attention_kwargs) <= {"temb"}
        if others or not self.is_common(*inputs):
            return super().forward(*inputs, attention_mask, **cross_attention_kwargs)
        if graph_ops.takes_operators():
            outputs = self.to_out[0].out_features
            return attention_block(*inputs, graph_ops.group_of(self.first_layer(self)), self.handle, outputs)
        return self.compute(hidden_states, encoder_hidden_states)

    def compute(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the output of a common call: fused, unless modules have hooks or were changed."""
        inputs = [x] if context is None else [x, context]
        packed = plan = None
        sequence = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        if not is_patched():
            sizes = sequence.shape, *(tensor.shape for tensor in inputs[1:])
            key = (x.dim(), *sizes, self.heads, self.residual_connection)
            packed, plan = self.plan_of(inputs, key, lambda packed: self.build_plan(packed, x.dim(), *sizes))
        if packed is None or plan is None:
            return super().forward(x, context)
        y = run_attention(plan, sequence, context)
        y = y.transpose(1, 2).unflatten(2, x.shape[2:]) if x.dim() == 4 else y
        return y if self.rescale_output_factor == 1 else y / self.rescale_output_factor

    def is_common(self, x: Any, context: Any) -> bool:
        """Return whether this is a call of the common kind, for inference in fp32 on a CPU: no number is looked at."""
        if type(self.processor) is not AttnProcessor2_0 or not fusion.is_inference(self, x, context):
            return False
        if any(getattr(self, name, None) is not None for name in ABSENT):
            return False
        return fusion.is_packed(self.to_q) and x.dim() in (3, 4) and (context is None or context.dim() == 3)

    def build_plan(
        self, packed: PackedLayer | None, dim: int, x_size: torch.Size, context_size: torch.Size | None = None
    ) -> AttentionPlan | None:
        """Return the plan for these sizes; `None` where a module is not as it was built, or has hooks."""
        if len(self.to_out) != 2 or not fusion.drops_nothing(self.to_out[1]):
            return None
        norm = None if self.group_norm is None else fusion.plain_norm(self.group_norm)
        layers = self.to_q, self.to_k, self.to_v, self.to_out[0]
        if (norm is None) != (self.group_norm is None) or not all(map(fusion.takes_kernel, layers)):
            return None
        if dim == 4 and self.to_out[0].out_features != x_size[2]:  # which cannot be an image of that size again
            return None
        return plan_attention(
            x_size, context_size, norm, layers, packed, self.heads, adds_input=self.residual_connection
        )
