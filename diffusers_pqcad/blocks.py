"""Residual blocks as one call of the int8 kernel: norms, activations and sums are part of its convolutions."""

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from diffusers_pqcad import graph_ops, kernels
from diffusers_pqcad.kernels import x86
from diffusers_pqcad.layers import PQCADConv2d, PQCADLinear, QuantizedLayer
from diffusers_pqcad.pending import Norm, PendingGroupNorm, PendingSiLU


class FusedResnetBlock2D(ResnetBlock2D):
    """A `ResnetBlock2D` of the common kind: it computes at once what its modules would, where nobody looks at them."""

    handle: Tensor

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Return what `ResnetBlock2D` returns."""
        if args or kwargs or not self.is_common(input_tensor, temb):
            return super().forward(input_tensor, temb, *args, **kwargs)
        if torch.compiler.is_compiling():
            return graph_ops.call_block(self, input_tensor, temb)
        return self.compute(input_tensor, temb)

    def compute(self, x: Tensor, temb: Tensor | None) -> Tensor:
        """Return the output of a common call: at once, unless somebody looks at the modules or changed them."""
        if not self.can_fuse(x, temb):
            return super().forward(x, temb)
        norms = Norm.of(self.norm1), Norm.of(self.norm2)
        layers = self.time_emb_proj, self.conv1, self.conv2, self.conv_shortcut
        return x86.run_block(x, temb, norms, layers, embeds_silu=not self.skip_time_act)

    def is_common(self, x: Tensor, temb: Tensor | None) -> bool:
        """Return whether this is a call of the common kind, for inference in fp32 on a CPU: no number is looked at."""
        if self.training or self.upsample or self.downsample or self.output_scale_factor != 1:
            return False
        if self.time_embedding_norm != "default" or (temb is None) != (self.time_emb_proj is None):
            return False
        if type(self.conv1) is not PQCADConv2d or not self.conv1.packed:
            return False
        inputs = [tensor for tensor in (x, temb) if tensor is not None]
        if x.dim() != 4 or any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in inputs):
            return False
        if torch.autograd.forward_ad._current_level >= 0:
            return False
        return not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (*inputs, *self.parameters()))

    def can_fuse(self, x: Tensor, temb: Tensor | None) -> bool:
        """Return whether all that a common call passes by is as it was built, and the kernel can take it."""
        if kernels.forced() not in (None, x86.NAME) or _global_forward_hooks or _global_forward_pre_hooks:
            return False
        if not kernels.has_numbers(x) or not x.numel() or x.shape[1] != self.in_channels:
            return False
        layers = [self.conv1, self.conv2, *filter(None, (self.time_emb_proj, self.conv_shortcut))]
        if not all(map(takes_kernel, layers)):
            return False
        if temb is not None:
            if not kernels.has_numbers(temb) or temb.shape != (len(x), self.time_emb_proj.in_features):
                return False
        norms = self.norm1, self.norm2
        if type(self.nonlinearity) not in (nn.SiLU, PendingSiLU) or type(self.dropout) is not nn.Dropout:
            return False
        if any(type(norm) not in (nn.GroupNorm, PendingGroupNorm) or not norm.affine for norm in norms):
            return False
        if any(is_changed(module) for module in (*norms, *layers, self.nonlinearity, self.dropout)):
            return False
        return all(is_plain(tensor) for norm in norms for tensor in (norm.weight, norm.bias))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.handle = graph_ops.register(self)  # a copy is a block of its own


# What libraries look for: blocks that must stay on one device, for instance.
FusedResnetBlock2D.__name__ = ResnetBlock2D.__name__


def is_changed(module: nn.Module) -> bool:
    """Return whether somebody looks at what `module` takes and returns, or computes it in another way."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def is_plain(tensor: Tensor) -> bool:
    """Return whether the numbers of `tensor` are fp32 in the CPU's memory."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def takes_kernel(layer: nn.Module) -> bool:
    """Return whether this call of `layer` is one for the kernel x86."""
    if type(layer) not in (PQCADConv2d, PQCADLinear):
        return False
    assert isinstance(layer, QuantizedLayer)
    if not layer.packed or layer.kernel_name() != x86.NAME or isinstance(layer.input_group(), Tensor):
        return False
    return layer.bias is None or is_plain(layer.bias)


def install_blocks_(model: nn.Module) -> None:
    """Let the residual blocks of `model` compute at once where the kernel can; they change their class."""
    for block in model.modules():
        if type(block) is ResnetBlock2D and isinstance(block.conv1, PQCADConv2d) and block.conv1.packed:
            if block.conv1.kernel_name() == x86.NAME:
                block.__class__ = FusedResnetBlock2D
                block.handle = graph_ops.register(block)


def remove_blocks_(model: nn.Module) -> None:
    """Undo `install_blocks_`."""
    for block in model.modules():
        if type(block) is FusedResnetBlock2D:
            block.__class__ = ResnetBlock2D
            del block.handle
