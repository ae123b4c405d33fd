"""Attention blocks between int8 layers: their softmax products in bf16, where the CPU has them."""

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from diffusers_pqcad import graph_ops, kernels
from diffusers_pqcad.kernels import attention, x86
from diffusers_pqcad.layers import PQCADLinear

ABSENT = ("spatial_norm", "norm_cross", "norm_q", "norm_k", "add_k_proj")  # of the common kind


class Bf16Attention(Attention):
    """An `Attention` of the common kind, by the default processor, that computes what this does."""

    def forward(
        self,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Return what `Attention` returns."""
        # Residual blocks of UNets name their time embedding, for a norm that the common kind does not have.
        others = attention_mask is not None or not set(kwargs) <= {"temb"}
        if others or not self.is_common(hidden_states, encoder_hidden_states):
            return super().forward(hidden_states, encoder_hidden_states, attention_mask, **kwargs)
        is_image = hidden_states.dim() == 4
        x = hidden_states.flatten(2).transpose(1, 2) if is_image else hidden_states
        if self.group_norm is not None:
            x = self.group_norm(x.transpose(1, 2)).transpose(1, 2)
        context = x if encoder_hidden_states is None else encoder_hidden_states
        projections = self.to_q(x), self.to_k(context), self.to_v(context)
        attended = graph_ops.attention if torch.compiler.is_compiling() else attention.attention
        y = attended(*projections, self.heads)
        for module in self.to_out:
            y = module(y)
        if is_image:
            y = y.transpose(1, 2).reshape(hidden_states.shape)
        if self.residual_connection:
            y = y + hidden_states
        return y / self.rescale_output_factor

    def is_common(self, x: Tensor, context: Tensor | None) -> bool:
        """Return whether this is a call of the common kind, for inference in fp32 on a CPU."""
        if type(self.processor) is not AttnProcessor2_0 or self.training:
            return False
        if any(getattr(self, name, None) is not None for name in ABSENT) or type(self.to_q) is not PQCADLinear:
            return False
        if not torch.compiler.is_compiling():
            if kernels.forced() not in (None, x86.NAME) or not attention.available():
                return False
        tensors = [tensor for tensor in (x, context) if tensor is not None]
        if any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
            return False
        if not torch.compiler.is_compiling() and not all(kernels.has_numbers(t) and t.numel() for t in tensors):
            return False
        if torch.autograd.forward_ad._current_level >= 0:
            return False
        return not torch.is_grad_enabled() or not any(t.requires_grad for t in (*tensors, *self.parameters()))


Bf16Attention.__name__ = Attention.__name__


def install_attention_(model: torch.nn.Module, consumers: set[torch.nn.Module]) -> None:
    """Let the attention of `model` whose queries are of `consumers` multiply in bf16; it changes its class."""
    if attention.available():
        for block in model.modules():
            if type(block) is Attention and block.to_q in consumers:
                block.__class__ = Bf16Attention


def remove_attention_(model: torch.nn.Module) -> None:
    """Undo `install_attention_`."""
    for block in model.modules():
        if type(block) is Bf16Attention:
            block.__class__ = Attention
