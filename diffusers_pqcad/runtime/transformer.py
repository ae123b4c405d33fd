"""Transformers over images, as UNets have them, in few calls of the int8 kernel: norms and sums are part of them."""

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from diffusers_pqcad.kernels import x86
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.runtime import fusion, plans
from diffusers_pqcad.runtime.attention import FusedAttention, is_patched
from diffusers_pqcad.runtime.feed_forward import FusedFeedForward

FORWARD = BasicTransformerBlock.forward  # somebody may put another one in its place


class FusedTransformer2DModel(fusion.FusedBlock, Transformer2DModel):
    """A `Transformer2DModel` over images, of the common kind: it computes at once what its modules would.

    Those would also pass over memory for three layer norms and three sums a block, and copy the image to another
    layout and back.
    """

    plain = Transformer2DModel

    @staticmethod
    def first_layer(block: Any) -> Any:
        """Return the projection of the image."""
        return getattr(block, "proj_in", None)

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
        # Of another type, where somebody kept this method, as hooks do, longer than it was there.
        is_fused = type(self) is FusedTransformer2DModel
        if says_more or not is_fused or not self.is_common(hidden_states, encoder_hidden_states):
            return Transformer2DModel.forward(self, hidden_states, encoder_hidden_states, *others, return_dict)
        compute = graph_ops.call_transformer if graph_ops.takes_operators() else FusedTransformer2DModel.compute
        output = compute(self, hidden_states, encoder_hidden_states)
        return Transformer2DModelOutput(sample=output) if return_dict else (output,)

    def compute(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the output of a common call: at once, unless somebody looks at the modules or changed them."""
        inputs = [x] if context is None else [x, context]
        packed = plan = None
        if BasicTransformerBlock.forward is FORWARD and not is_patched():
            sizes = tuple(tensor.shape for tensor in inputs)
            packed, plan = self.plan_of(inputs, sizes, lambda packed: self.build_plan(packed, *sizes))
        if packed is None or plan is None:
            return Transformer2DModel.forward(self, x, context, return_dict=False)[0]
        return plans.run_transformer(plan, x, context)

    def is_common(self, x: Any, context: Any) -> bool:
        """Return whether this is a call of the common kind, for inference in fp32 on a CPU: no number is looked at."""
        if not fusion.is_inference(self, x, context) or not self.is_input_continuous or x.dim() != 4:
            return False
        return fusion.is_packed(self.proj_in) and all(
            is_common_block(block, x, context) for block in self.transformer_blocks
        )

    def build_plan(
        self, packed: x86.PackedLayer, x_size: torch.Size, context_size: torch.Size | None = None
    ) -> plans.TransformerPlan | None:
        """Return the plan for these sizes; `None` where a module is not as it was built, or somebody looks at it."""
        norm = fusion.plain_norm(self.norm)
        if norm is None or not all(map(fusion.takes_kernel, (self.proj_in, self.proj_out))):
            return None
        if any(map(fusion.is_changed, fusion.parts_of(self))):
            return None
        first = plans.plan_projection(self.proj_in, x_size, packed)
        inner = first.layer.output.out_channels
        last = plans.plan_projection(self.proj_out, torch.Size((x_size[0], inner, *x_size[2:])))
        sequence = torch.Size((x_size[0], x_size[2:].numel(), inner))
        parts: list[tuple[plans.LayerNorm, plans.AttentionPlan | plans.FeedForwardPlan]] = []
        for layer_norm, part, takes_context in self.parts_in_order():
            size = context_size if takes_context else None
            found, plan = plain_layer_norm(layer_norm), plan_part(part, sequence, size)
            if found is None or plan is None:
                return None
            parts.append((found, plan))
        return plans.plan_transformer(x_size, norm, (first, last), parts)

    def parts_in_order(self) -> Iterator[tuple[nn.Module, FusedAttention | FusedFeedForward, bool]]:
        """Yield each part of the blocks after its layer norm, and whether it takes the context."""
        for block in self.transformer_blocks:
            yield block.norm1, block.attn1, False
            if block.attn2 is not None:
                yield block.norm2, block.attn2, True
            yield block.norm3, block.ff, False


def plan_part(
    part: FusedAttention | FusedFeedForward, sequence: torch.Size, context_size: torch.Size | None
) -> plans.AttentionPlan | plans.FeedForwardPlan | None:
    """Return the plan of `part` for inputs of size `sequence` (B, L, C); `None` where it cannot be one of a block."""
    if isinstance(part, FusedFeedForward):
        return part.build_plan(None, sequence)
    plan = part.build_plan(None, len(sequence), sequence, context_size)
    if plan is None or plan.norm is not None or plan.adds_input or part.rescale_output_factor != 1:
        return None
    return plan


def plain_layer_norm(module: nn.Module) -> plans.LayerNorm | None:
    """Return the layer norm that `module` computes, or `None` where the kernel cannot take it."""
    if type(module) is not nn.LayerNorm or len(module.normalized_shape) != 1:
        return None
    if not fusion.is_plain(module.weight) or not fusion.is_plain(module.bias):
        return None
    return plans.LayerNorm(module.weight.detach(), module.bias.detach(), module.eps)


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
