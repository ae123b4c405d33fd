"""Attention blocks in few calls of the int8 kernel, their softmax products in bf16 where the CPU has them."""

from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from diffusers_pqcad.kernels import x86
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.runtime import fusion, plans

# Who follows the maps of attention puts something in the place of these.
PROCESS, PRODUCT = AttnProcessor2_0.__call__, F.scaled_dot_product_attention
ABSENT = ("spatial_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj")  # from the common kind


def is_patched() -> bool:
    """Return whether somebody put something in the place of what all attention is computed by."""
    return AttnProcessor2_0.__call__ is not PROCESS or F.scaled_dot_product_attention is not PRODUCT


class FusedAttention(fusion.FusedBlock, Attention):
    """An `Attention` of the common kind, by the default processor: it computes at once what that does."""

    plain = Attention

    @staticmethod
    def first_layer(block: Any) -> Any:
        """Return the layer of the queries."""
        return block.to_q

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **cross_attention_kwargs: Any,
    ) -> Tensor:
        """Return what `Attention` returns."""
        inputs = hidden_states, encoder_hidden_states
        if type(self) is not FusedAttention:  # somebody kept this method, as hooks do, longer than it was there
            return Attention.forward(self, *inputs, attention_mask, **cross_attention_kwargs)
        # Residual blocks of UNets name their time embedding, for a norm that the common kind does not have.
        others = attention_mask is not None or not set(cross_attention_kwargs) <= {"temb"}
        if others or not self.is_common(*inputs):
            return super().forward(*inputs, attention_mask, **cross_attention_kwargs)
        if graph_ops.takes_operators():
            return graph_ops.call_attention(self, hidden_states, encoder_hidden_states)
        return self.compute(hidden_states, encoder_hidden_states)

    def compute(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return the output of a common call: at once, unless somebody looks at the modules or changed them."""
        inputs = [x] if context is None else [x, context]
        packed = plan = None
        sequence = x.flatten(2).transpose(1, 2) if x.dim() == 4 else x
        if not is_patched():
            sizes = sequence.shape, *(tensor.shape for tensor in inputs[1:])
            key = (x.dim(), *sizes, self.heads, self.residual_connection)
            packed, plan = self.plan_of(inputs, key, lambda packed: self.build_plan(packed, x.dim(), *sizes))
        if packed is None or plan is None:
            return super().forward(x, context)
        y = plans.run_attention(plan, sequence, context)
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
        self, packed: x86.PackedLayer | None, dim: int, x_size: torch.Size, context_size: torch.Size | None = None
    ) -> plans.AttentionPlan | None:
        """Return the plan for these sizes; `None` where a module is not as it was built, or somebody looks at it."""
        if len(self.to_out) != 2 or not fusion.drops_nothing(self.to_out[1]):
            return None
        norm = None if self.group_norm is None else fusion.plain_norm(self.group_norm)
        layers = self.to_q, self.to_k, self.to_v, self.to_out[0]
        if (norm is None) != (self.group_norm is None) or not all(map(fusion.takes_kernel, layers)):
            return None
        if dim == 4 and self.to_out[0].out_features != x_size[2]:  # which cannot be an image of that size again
            return None
        return plans.plan_attention(
            x_size, context_size, norm, layers, packed, self.heads, adds_input=self.residual_connection
        )


fusion.VALUES[FusedAttention] = ("heads", "residual_connection", "rescale_output_factor")
