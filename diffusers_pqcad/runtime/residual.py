"""Residual blocks as one call of the int8 kernel: norms, activations and sums are part of its convolutions."""

import ctypes
from typing import Any, NamedTuple

import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from diffusers_pqcad.kernels.native import pages, scratch
from diffusers_pqcad.kernels.x86.calls import Call, run_call
from diffusers_pqcad.kernels.x86.library import compiled
from diffusers_pqcad.kernels.x86.norms import Norm, group_norm_of, normalization
from diffusers_pqcad.kernels.x86.packing import PackedLayer
from diffusers_pqcad.kernels.x86.structs import NO_ADDEND, Addend, Affine, ResidualBlock
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.runtime import fusion


class BlockPlan(NamedTuple):
    """A residual block at one size of its input and one activation range of each layer; `keeps` lives as long.

    `calls` are those of the time embedding, both convolutions, and the shortcut; with adapters they are run one by
    one, and without as a `block`. The packed weights of the first convolution hold the plan, and not the plan them:
    its caller does.
    """

    block: ResidualBlock
    size: tuple[int, ...]
    num_bytes: int
    calls: tuple[Call | None, Call, Call, Call | None]
    has_adapters: bool
    keeps: tuple[Any, ...]


def plan_block(
    x_size: torch.Size,
    time_size: torch.Size | None,
    norms: tuple[Norm, Norm],
    layers: tuple[nn.Module | None, nn.Module, nn.Module, nn.Module | None],
    packed: PackedLayer,
    *,
    embeds_silu: bool,
    adds_residual: bool = False,
) -> BlockPlan:
    """Return the plan of a residual block for images of `x_size` (B, C, H, W) and time vectors of `time_size` (B, E).

    `layers` are those of the time embedding, both convolutions, and the shortcut, where they are packed; `packed` is
    the first convolution's; `embeds_silu` says whether a SiLU comes before the first layer; with `adds_residual`, what
    a shortcut in floating point gives is handed in at each call. Raises ValueError for parts whose sizes do not fit: C
    would read beyond them.
    """
    embedding, conv1, conv2, shortcut = layers
    first = fusion.plan_call(conv1, x_size, packed)
    hidden = torch.Size(first.size)
    second = fusion.plan_call(conv2, hidden)
    embedded = None if embedding is None or time_size is None else fusion.plan_call(embedding, time_size)
    shortened = None if shortcut is None else fusion.plan_call(shortcut, x_size)
    residual = second.size if adds_residual else x_size if shortened is None else shortened.size
    sizes = {
        "norm1": (norms[0].weight.shape, norms[0].bias.shape, x_size[1:2]),
        "norm2": (norms[1].weight.shape, norms[1].bias.shape, hidden[1:2]),
        "time embedding": (hidden[:2] if embedded is None else embedded.size, hidden[:2]),
        "residual": (residual, second.size),
    }
    for name, (*found, wanted) in sizes.items():
        if any(tuple(size) != tuple(wanted) for size in found):
            raise ValueError(
                f"{fusion.layer_below(conv1).name}: {name} of its block: expected a size of {tuple(wanted)}, got "
                f"{[*map(tuple, found)]}. Parts of a residual block can only be replaced by others of their sizes."
            )
    calls = (embedded, first, second, shortened)
    addresses = (None if call is None else ctypes.addressof(call.layer) for call in calls)
    block = ResidualBlock(*map(group_norm_of, norms), *addresses, embeds_silu)
    has_adapters = any(call is not None and call.beside is not None for call in calls)
    return BlockPlan(block, second.size, compiled().block_bytes(block), calls, has_adapters, norms)


def run_block(plan: BlockPlan, x: Tensor, time: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """Return what the block makes of `x` fp32 (B, C, H, W) and `time` fp32 (B, E), both of the plan's sizes.

    `residual` fp32, of the output's size, is added in the place of `x` or what the packed shortcut makes of it.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    time = None if time is None else time.contiguous()
    if plan.has_adapters:
        return run_calls_of_block(plan, x, time, residual)
    output = pages.empty(plan.size, dtype=torch.float32, memory_format=torch.channels_last)
    memory = scratch.buffer(plan.num_bytes)
    time_at = None if time is None else time.data_ptr()
    residual_at = None if residual is None else residual.data_ptr()
    compiled().run_block(x.data_ptr(), time_at, residual_at, plan.block, memory.data_ptr(), output.data_ptr())
    scratch.give_back(memory)
    return output


def run_calls_of_block(plan: BlockPlan, x: Tensor, time: Tensor | None, residual: Tensor | None) -> Tensor:
    """Return what `run_block` does, call by call: what lies beside a call is added to its output, between."""
    block, (embedding, first, second, shortcut) = plan.block, plan.calls
    image = torch.channels_last
    embedded = None
    if embedding is not None and time is not None:
        embedded = run_call(embedding, time, Affine(None, None, block.embeds_silu))
    gain, shift = normalization(block.norm1, x, first.layer.image)
    added = NO_ADDEND if embedded is None else Addend(embedded.data_ptr(), 1)
    hidden = run_call(first, x, Affine(gain.data_ptr(), shift.data_ptr(), 1), added, image)
    gain, shift = normalization(block.norm2, hidden, second.layer.image)
    if residual is None:
        residual = x if shortcut is None else run_call(shortcut, x, memory_format=image)
    affine = Affine(gain.data_ptr(), shift.data_ptr(), 1)
    return run_call(second, hidden, affine, Addend(residual.data_ptr(), 0), image)


def residual_output(x: Tensor, temb: Tensor | None, group: Tensor, handle: Tensor, out_channels: int) -> Tensor:
    """Return an empty output (B, out_channels, H, W), channels_last."""
    return fusion.empty_image(x, out_channels)


@graph_ops.operator(fake=residual_output)
def residual_block(x: Tensor, temb: Tensor | None, group: Tensor, handle: Tensor, out_channels: int) -> Tensor:
    """Return the output (B, out_channels, H, W) of a `FusedResnetBlock2D`, channels_last."""
    return graph_ops.compute(handle, group, x, temb).contiguous(memory_format=torch.channels_last)


class FusedResnetBlock2D(fusion.FusedBlock, ResnetBlock2D):
    """A `ResnetBlock2D` of the common kind, fused where its modules have no hooks."""

    plain = ResnetBlock2D
    name = "residual"

    @staticmethod
    def first_layer(block: Any) -> Any:
        """Return the first convolution."""
        return fusion.layer_below(block.conv1)

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Return what `ResnetBlock2D` returns."""
        if type(self) is not FusedResnetBlock2D:  # hooks may keep this method longer than the block is of this class
            return ResnetBlock2D.forward(self, input_tensor, temb, *args, **kwargs)
        if args or kwargs or not self.is_common(input_tensor, temb):
            return super().forward(input_tensor, temb, *args, **kwargs)
        if graph_ops.takes_operators():
            group = graph_ops.group_of(self.first_layer(self))
            return residual_block(input_tensor, temb, group, self.handle, self.out_channels)
        return self.compute(input_tensor, temb)

    def compute(self, x: Tensor, temb: Tensor | None) -> Tensor:
        """Return the output of a common call: fused, unless modules have hooks or were changed."""
        inputs = [x] if temb is None else [x, temb]
        sizes = tuple(tensor.shape for tensor in inputs)
        key = (*sizes, self.in_channels, self.skip_time_act)
        packed, plan = self.plan_of(inputs, key, lambda packed: self.build_plan(packed, *sizes))
        if packed is None or plan is None:
            return super().forward(x, temb)
        residual = self.conv_shortcut(x) if self.has_float_shortcut() else None
        if residual is not None and not (
            residual.shape == plan.size and residual.dtype == x.dtype and residual.is_cpu
        ):
            return super().forward(x, temb)  # a changed shortcut: C would read something else, or beyond it
        return run_block(plan, x, temb, residual)

    def has_float_shortcut(self) -> bool:
        """Return whether the shortcut is a convolution that was left in floating point."""
        return type(fusion.layer_below(self.conv_shortcut)) is nn.Conv2d

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
        self, packed: PackedLayer, x_size: torch.Size, time_size: torch.Size | None = None
    ) -> BlockPlan | None:
        """Return the plan for these sizes; `None` where a module is not as it was built, or has hooks."""
        shortcut = None if self.has_float_shortcut() else self.conv_shortcut
        layers = [self.conv1, self.conv2, *filter(None, (self.time_emb_proj, shortcut))]
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
        quantized = self.time_emb_proj, self.conv1, self.conv2, shortcut
        embeds_silu, adds_residual = not self.skip_time_act, self.has_float_shortcut()
        return plan_block(
            x_size,
            time_size,
            (first, second),
            quantized,
            packed,
            embeds_silu=embeds_silu,
            adds_residual=adds_residual,
        )
