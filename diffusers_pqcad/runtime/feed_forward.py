"""Fused feed-forward blocks with gated activations (GEGLU): gates are applied as the first product is written."""

from typing import Any, NamedTuple

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from torch import Tensor, nn

from diffusers_pqcad.kernels.x86.calls import Call, run_call
from diffusers_pqcad.kernels.x86.library import compiled
from diffusers_pqcad.kernels.x86.packing import PackedLayer
from diffusers_pqcad.kernels.x86.structs import NO_AFFINE, Affine
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.runtime import fusion


class FeedForwardPlan(NamedTuple):
    """A gated feed-forward block at one size of its input and one activation range of each layer.

    `calls` are those of the gated layer and the last one; a layer norm before them is in `affine`, and `keeps` holds
    it. With `adds_input`, the input is added to the output. The packed weights of the first hold the plan, and not the
    plan them: its caller does. As a part of a transformer it holds all.
    """

    calls: tuple[Call, ...]
    adds_input: bool = False
    keeps: Any = None
    affine: Affine = NO_AFFINE


def plan_feed_forward(
    size: torch.Size, first: nn.Module, second: nn.Module, packed: PackedLayer | None
) -> FeedForwardPlan | None:
    """Return the plan of `second` after a GEGLU (Shazeer 2020, arXiv:2002.05202) of `first`, for inputs of `size`.

    `packed` is as in `plan_call`. `None` where the kernel cannot gate outputs: they must fill its blocks. Raises
    ValueError for layers that do not fit to each other: C would read beyond them.
    """
    call = fusion.plan_call(first, size, packed)
    outputs = call.layer.output.out_channels
    if outputs % (2 * compiled().block_outputs()):
        return None
    call.layer.output.out_channels, call.layer.output.is_gated = outputs // 2, 1
    gated = call._replace(size=(*call.size[:-1], outputs // 2))
    return FeedForwardPlan((gated, fusion.plan_call(second, torch.Size(gated.size))))


def run_feed_forward(plan: FeedForwardPlan, x: Tensor) -> Tensor:
    """Return what the block makes of `x` fp32, of the plan's size."""
    gated, last = plan.calls
    x = x.contiguous()
    return run_call(last, run_call(gated, x, plan.affine), addend=fusion.addend_of(x, adds_input=plan.adds_input))


@graph_ops.operator(fake=graph_ops.linear_output)
def feed_forward(x: Tensor, group: Tensor, handle: Tensor, out_features: int) -> Tensor:
    """Return the output (..., out_features) of a `FusedFeedForward`."""
    return graph_ops.compute(handle, group, x).contiguous()


class FusedFeedForward(fusion.FusedBlock, FeedForward):
    """A fused `FeedForward` of GEGLU, dropout and a linear layer."""

    plain = FeedForward
    name = "feed_forward"
    parts = {GEGLU: ("gelu",)}  # absent, unless it was replaced

    @staticmethod
    def first_layer(block: Any) -> Any:
        """Return the layer of the gates and of what they are applied to."""
        return fusion.layer_below(block.net[0].proj) if type(block.net[0]) is GEGLU else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what `FeedForward` returns."""
        if type(self) is not FusedFeedForward:  # hooks may keep this method longer than the block is of this class
            return FeedForward.forward(self, hidden_states, *args, **kwargs)
        if args or kwargs or not self.is_common(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        if graph_ops.takes_operators():
            group = graph_ops.group_of(self.first_layer(self))
            return feed_forward(hidden_states, group, self.handle, self.net[2].out_features)
        return self.compute(hidden_states)

    def compute(self, x: Tensor) -> Tensor:
        """Return the output of a common call: fused, unless modules have hooks or were changed."""
        packed, plan = self.plan_of([x], (x.shape,), lambda packed: self.build_plan(packed, x.shape))
        return super().forward(x) if packed is None or plan is None else run_feed_forward(plan, x)

    def is_common(self, x: Any) -> bool:
        """Return whether this is a call of the common kind, for inference in fp32 on a CPU: no number is looked at."""
        if len(self.net) not in (3, 4) or not fusion.is_packed(self.first_layer(self)):
            return False
        if not fusion.is_packed(self.net[2]):
            return False
        return fusion.is_inference(self, x)

    def build_plan(self, packed: PackedLayer | None, size: torch.Size) -> FeedForwardPlan | None:
        """Return the plan for this size; `None` where a module is not as it was built, or has hooks."""
        gated, *others = self.net
        layers, dropouts = (gated.proj, others[1]), (others[0], *others[2:])
        if not all(map(fusion.drops_nothing, dropouts)):
            return None
        if fusion.is_changed(gated) or "gelu" in gated.__dict__ or not all(map(fusion.takes_kernel, layers)):
            return None
        return plan_feed_forward(size, *layers, packed)
