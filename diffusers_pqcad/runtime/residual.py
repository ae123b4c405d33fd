"""Residual blocks as one call of the int8 kernel: norms, activations and sums are part of its convolutions."""

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from diffusers_pqcad.kernels import x86
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.runtime import fusion, plans


class FusedResnetBlock2D(fusion.FusedBlock, ResnetBlock2D):
    """A `ResnetBlock2D` of the common kind: it computes at once what its modules would, where nobody looks at them."""

    plain = ResnetBlock2D

    @staticmethod
    def first_layer(block: Any) -> Any:
        """Return the first convolution."""
        return block.conv1

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Return what `ResnetBlock2D` returns."""
        if type(self) is not FusedResnetBlock2D:  # somebody kept this method, as hooks do, longer than it was there
            return ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)
        if args or kwargs or not self.is_common(input_tensor, temb):
            return super().forward(input_tensor, temb, *args, **kwargs)
        if graph_ops.takes_operators():
            return graph_ops.call_block(self, input_tensor, temb)
        return self.compute(input_tensor, temb)

    def compute(self, x: Tensor, temb: Tensor | None) -> Tensor:
        """Return the output of a common call: at once, unless somebody looks at the modules or changed them."""
        inputs = [x] if temb is None else [x, temb]
        sizes = tuple(tensor.shape for tensor in inputs)
        key = (*sizes, self.in_channels, self.skip_time_act)
        packed, plan = self.plan_of(inputs, key, lambda packed: self.build_plan(packed, *sizes))
        return super().forward(x, temb) if packed is None or plan is None else plans.run_block(plan, x, temb)

    def is_common(self, x: Any, temb: Any) -> bool:
        """Return whether this is a call of the common kind, for inference in fp32 on a CPU: no number is looked at."""
        if not fusion.is_inference(self, x, temb):
            return False
        if self.upsample or self.downsample or self.output_scale_factor != 1 or x.dim() != 4:
            return False
        if (temb is None) != (self.time_emb_proj is None):
            return False
        # "group", as autoencoders have it, is "default" without an embedding.
        if self.time_embedding_norm != "default" and (self.time_embedding_norm != "group" or temb is not None):
            return False
        return fusion.is_packed(self.conv1)

    def build_plan(
        self, packed: x86.PackedLayer, x_size: torch.Size, time_size: torch.Size | None = None
    ) -> plans.BlockPlan | None:
        """Return the plan for these sizes; `None` where a module is not as it was built, or somebody looks at it."""
        layers = [self.conv1, self.conv2, *filter(None, (self.time_emb_proj, self.conv_shortcut))]
        if x_size[1] != self.in_channels or not all(map(fusion.takes_kernel, layers)):
            return None
        if time_size is not None and time_size != (x_size[0], self.time_emb_proj.in_features):
            return None
        if type(self.nonlinearity) is not nn.SiLU or fusion.is_changed(self.nonlinearity):
            return None
        if not fusion.drops_nothing(self.dropout):
            return None
        first, second = fusion.plain_norm(self.norm1), fusion.plain_norm(self.norm2)
        if first is None or second is None:
            return None
        quantized = self.time_emb_proj, self.conv1, self.conv2, self.conv_shortcut
        embeds_silu = not self.skip_time_act
        return plans.plan_block(x_size, time_size, (first, second), quantized, packed, embeds_silu=embeds_silu)
