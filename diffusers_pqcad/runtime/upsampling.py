"""Nearest upsampling and the convolution after it as one call of the int8 kernel: no large image lies between them."""

from typing import Any

import torch
from diffusers.models.upsampling import Upsample2D
from torch import Tensor

from diffusers_pqcad.kernels.x86.calls import Call, run_call
from diffusers_pqcad.kernels.x86.packing import PackedLayer, can_double
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.runtime import fusion


def upsampled(x: Tensor, group: Tensor, handle: Tensor, out_channels: int) -> Tensor:
    """Return an empty output (B, out_channels, 2 H, 2 W), channels_last, for `x` (B, C, H, W)."""
    return fusion.empty_image(x, out_channels, factor=2)


@graph_ops.operator(fake=upsampled)
def upsampling_block(x: Tensor, group: Tensor, handle: Tensor, out_channels: int) -> Tensor:
    """Return the output (B, out_channels, 2 H, 2 W) of a `FusedUpsample2D`, channels_last."""
    return graph_ops.compute(handle, group, x).contiguous(memory_format=torch.channels_last)


class FusedUpsample2D(fusion.FusedBlock, Upsample2D):
    """A fused `Upsample2D` of nearest neighbours to twice the size, with a 3x3 convolution."""

    plain = Upsample2D
    name = "upsampling"

    @staticmethod
    def first_layer(block: Any) -> Any:
        """Return the convolution; `None` where there is none, or the block has another name for it."""
        return fusion.layer_below(getattr(block, "conv", None))

    @classmethod
    def can_take(cls, block: Any) -> bool:
        """Return whether the convolution can be packed for it: tiles need VNNI."""
        return can_double(cls.first_layer(block).operation())

    def forward(self, hidden_states: Tensor, output_size: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        """Return what `Upsample2D` returns."""
        if type(self) is not FusedUpsample2D:  # hooks may keep this method longer than the block is of this class
            return Upsample2D.forward(self, hidden_states, output_size, *args, **kwargs)
        # Another size than the double is asked for where the skips of a UNet have odd ones.
        if output_size is not None or args or kwargs or not self.is_common(hidden_states):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        if graph_ops.takes_operators():
            layer = self.first_layer(self)
            return upsampling_block(hidden_states, graph_ops.group_of(layer), self.handle, layer.out_channels)
        return self.compute(hidden_states)

    def compute(self, x: Tensor) -> Tensor:
        """Return the output of a common call: fused, unless modules have hooks or were changed."""
        packed, plan = self.plan_of([x], (x.shape,), lambda packed: self.build_plan(packed, x.shape))
        if packed is None or plan is None:
            return super().forward(x)
        x = x.contiguous(memory_format=torch.channels_last)
        return run_call(plan, x, memory_format=torch.channels_last)

    def is_common(self, x: Any) -> bool:
        """Return whether this is a call of the common kind, for inference in fp32 on a CPU: no number is looked at."""
        if not fusion.is_inference(self, x) or x.dim() != 4:
            return False
        if self.norm is not None or self.use_conv_transpose or not self.interpolate or not self.use_conv:
            return False
        return fusion.is_packed(self.first_layer(self))

    def build_plan(self, packed: PackedLayer, size: torch.Size) -> Call | None:
        """Return the call for an input of `size`; `None` where the kernel cannot take it, or the layer has hooks."""
        if (
            not fusion.takes_kernel(self.conv)
            or size[1] != self.channels
            or not can_double(self.first_layer(self).operation())
        ):
            return None
        return fusion.plan_call(self.conv, size, packed, is_doubled=True)
