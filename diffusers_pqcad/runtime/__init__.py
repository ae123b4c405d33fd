"""What a packed model does on this computer: fused blocks, memory format, methods of its own."""

from typing import Any

import torch
from torch import nn

from diffusers_pqcad import kernels
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.runtime.fusion import FusedBlock, install_fused_, remove_fused_
from diffusers_pqcad.runtime.memory_format import install_channels_last_, remove_channels_last_
from diffusers_pqcad.runtime.overrides import override_methods_, restore_methods_


def fused_blocks() -> tuple[type[FusedBlock], ...]:
    """Return the classes of blocks that kernels can fuse: a line each."""
    from diffusers_pqcad.runtime.attention import FusedAttention  # these import diffusers' models
    from diffusers_pqcad.runtime.feed_forward import FusedFeedForward
    from diffusers_pqcad.runtime.residual import FusedResnetBlock2D
    from diffusers_pqcad.runtime.tiny_autoencoder import FusedAutoencoderTinyBlock, FusedDecoderTiny
    from diffusers_pqcad.runtime.transformer import FusedTransformer2DModel
    from diffusers_pqcad.runtime.upsampling import FusedUpsample2D

    blocks = FusedAttention, FusedFeedForward, FusedResnetBlock2D, FusedTransformer2DModel, FusedUpsample2D
    return *blocks, FusedAutoencoderTinyBlock, FusedDecoderTiny


def install_(model: nn.Module) -> None:
    """Let `model`, whose layers are packed, compute as their kernels like it, and have right methods of its own."""
    chosen = [(layer, kernels.KERNELS[layer.kernel_name()]) for layer in packed_layers(model).values()]
    if not chosen:
        return
    override_methods_(model)
    # Without such convolutions, weights would be reordered in every call.
    if any(isinstance(layer, nn.Conv2d) and kernel.MEMORY_FORMAT == torch.channels_last for layer, kernel in chosen):
        install_channels_last_(model)
    if any(kernel.FUSES for _, kernel in chosen):
        install_fused_(model, fused_blocks())


def remove_(model: Any) -> None:
    """Undo `install_`."""
    remove_channels_last_(model)
    remove_fused_(model)
    restore_methods_(model)
