"""The blocks of small autoencoders (TAESD) in few calls of the int8 kernel: ReLU and sums are part of them."""

from typing import Any, NamedTuple

import torch
from diffusers.models.autoencoders.vae import DecoderTiny
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from torch import Tensor, nn

from diffusers_pqcad.kernels import x86
from diffusers_pqcad.kernels.x86.calls import Call, run_call
from diffusers_pqcad.kernels.x86.packing import PackedLayer, can_double
from diffusers_pqcad.kernels.x86.structs import NO_AFFINE, Addend
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.runtime import fusion


class TinyPlan(NamedTuple):
    """A block at one size of its input: the calls of its convolutions, and of the skip where that is a convolution."""

    calls: tuple[Call, Call, Call]
    skip: Call | None


def with_relu(call: Call) -> Call:
    """Return `call`, which is its caller's own, with a ReLU after what is added."""
    call.layer.output.has_relu = 1
    return call


def run_tiny_block(plan: TinyPlan, x: Tensor) -> Tensor:
    """Return what the block makes of `x` fp32 (B, C, H, W), of the plan's size, channels_last."""
    x = hidden = x.contiguous(memory_format=torch.channels_last)
    for call in plan.calls[:2]:
        hidden = run_call(call, hidden, memory_format=torch.channels_last)
    residual = x if plan.skip is None else run_call(plan.skip, x, memory_format=torch.channels_last)
    addend = Addend(residual.data_ptr(), 0)
    return run_call(plan.calls[2], hidden, NO_AFFINE, addend, memory_format=torch.channels_last)


def tiny_output(x: Tensor, group: Tensor, handle: Tensor, out_channels: int) -> Tensor:
    """Return an empty output (B, out_channels, H, W), channels_last."""
    return fusion.empty_image(x, out_channels)


@graph_ops.operator(fake=tiny_output)
def tiny_block(x: Tensor, group: Tensor, handle: Tensor, out_channels: int) -> Tensor:
    """Return the output (B, out_channels, H, W) of a `FusedAutoencoderTinyBlock`, channels_last."""
    return graph_ops.compute(handle, group, x).contiguous(memory_format=torch.channels_last)


class FusedAutoencoderTinyBlock(fusion.FusedBlock, AutoencoderTinyBlock):
    """A fused `AutoencoderTinyBlock` with ReLU: three convolutions and a sum."""

    plain = AutoencoderTinyBlock
    name = "tiny autoencoder"

    @staticmethod
    def first_layer(block: Any) -> Any:
        """Return the first convolution."""
        return fusion.layer_below(block.conv[0])

    def forward(self, x: Tensor) -> Tensor:
        """Return what `AutoencoderTinyBlock` returns."""
        if type(self) is not FusedAutoencoderTinyBlock:  # hooks may keep this method longer than the block its class
            return AutoencoderTinyBlock.forward(self, x)
        if not fusion.is_inference(self, x) or x.dim() != 4 or not fusion.is_packed(self.first_layer(self)):
            return super().forward(x)
        if graph_ops.takes_operators():
            return tiny_block(
                x,
                graph_ops.group_of(self.first_layer(self)),
                self.handle,
                fusion.layer_below(self.conv[4]).out_channels,
            )
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """Return the output of a common call: fused, unless modules have hooks or were changed."""
        packed, plan = self.plan_of([x], (x.shape,), lambda packed: self.build_plan(packed, x.shape))
        return super().forward(x) if packed is None or plan is None else run_tiny_block(plan, x)

    def build_plan(self, packed: PackedLayer, size: torch.Size) -> TinyPlan | None:
        """Return the plan for an input of `size`; `None` where a module is not as it was built, or has hooks.

        Raises ValueError for parts whose sizes do not fit: C would read beyond them.
        """
        if type(self.conv) is not nn.Sequential or len(self.conv) != 5 or fusion.is_changed(self.conv):
            return None
        activations: list[Any] = [self.conv[1], self.conv[3], self.fuse]
        if not all(type(each) is nn.ReLU and not fusion.is_changed(each) for each in activations):
            return None
        layers: list[Any] = [self.conv[0], self.conv[2], self.conv[4]]
        has_skip = type(self.skip) is not nn.Identity
        if not all(map(fusion.takes_kernel, [*layers, *([self.skip] if has_skip else [])])):
            return None
        if fusion.is_changed(self.skip) or any(map(fusion.is_adapted, layers)):  # ReLUs come after adapters
            return None
        first = fusion.plan_call(layers[0], size, packed)
        second = fusion.plan_call(layers[1], torch.Size(first.size))
        third = fusion.plan_call(layers[2], torch.Size(second.size))
        skip = fusion.plan_call(self.skip, size) if has_skip else None
        added = size if skip is None else skip.size
        if tuple(added) != tuple(third.size):
            raise ValueError(
                f"{layers[2].name}: expected a skip of {tuple(third.size)}, got {tuple(added)}. Parts of an "
                "AutoencoderTinyBlock can only be replaced by others of their sizes."
            )
        return TinyPlan((with_relu(first), with_relu(second), with_relu(third)), skip)


def doubling_call(upsample: Any, layer: Any, x: Tensor) -> Call | None:
    """Return the call of `layer` for what `upsample` makes of `x`, or `None` where the kernel cannot take both."""
    if type(upsample) is not nn.Upsample or fusion.is_changed(upsample) or upsample.size is not None:
        return None
    if upsample.mode != "nearest" or upsample.scale_factor != 2 or not fusion.takes_kernel(layer):
        return None
    if not x86.accepts(x) or not x.numel() or not can_double(fusion.layer_below(layer).operation()):
        return None
    return fusion.plan_call(layer, x.shape, is_doubled=True)


class FusedDecoderTiny(fusion.FusedBlock, DecoderTiny):
    """A `DecoderTiny` whose convolutions after nearest upsampling are computed of the small image."""

    plain = DecoderTiny
    name = "tiny autoencoder"

    @staticmethod
    def first_layer(block: Any) -> Any:
        """Return the first convolution after an upsampling; `None` where there is none."""
        layers = list(block.layers)
        pairs = zip(layers, layers[1:], strict=False)
        layer = next((layer for upsample, layer in pairs if type(upsample) is nn.Upsample), None)
        return fusion.layer_below(layer)

    @classmethod
    def can_take(cls, block: Any) -> bool:
        """Return whether the convolutions can be packed for it: tiles need VNNI."""
        return can_double(cls.first_layer(block).operation())

    def forward(self, x: Tensor) -> Tensor:
        """Return what `DecoderTiny` returns."""
        if type(self) is not FusedDecoderTiny:  # hooks may keep this method longer than the block its class
            return DecoderTiny.forward(self, x)
        others = graph_ops.takes_operators() or fusion.is_watched() or fusion.is_changed(self.layers)
        if others or not fusion.is_inference(self, x) or type(self.layers) is not nn.Sequential:
            return super().forward(x)
        x = torch.tanh(x / 3) * 3
        layers = iter(self.layers)
        for module in layers:
            following = next(layers) if type(module) is nn.Upsample else None
            call = None if following is None else doubling_call(module, following, x)
            if call is not None:
                x = run_call(call, x.contiguous(memory_format=torch.channels_last), memory_format=torch.channels_last)
            else:
                x = module(x) if following is None else following(module(x))
        return x.mul(2).sub(1)
