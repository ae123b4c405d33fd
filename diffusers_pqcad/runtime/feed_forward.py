"""Feed-forward blocks with gated activations (GEGLU) at once: gates are applied as the first product is written."""

from typing import Any

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from torch import Tensor

from diffusers_pqcad.kernels import x86
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.runtime import fusion, plans


class FusedFeedForward(fusion.FusedBlock, FeedForward):
    """A `FeedForward` of GEGLU, dropout and a linear layer: it computes at once what its modules would."""

    plain = FeedForward

    @staticmethod
    def first_layer(block: Any) -> Any:
        """Return the layer of the gates and of what they are applied to."""
        return block.net[0].proj if type(block.net[0]) is GEGLU else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return what `FeedForward` returns."""
        if type(self) is not FusedFeedForward:  # somebody kept this method, as hooks do, longer than it was there
            return FeedForward.forward(self, hidden_states, *args, **kwargs)
        if args or kwargs or not self.is_common(hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        if graph_ops.takes_operators():
            return graph_ops.call_feed_forward(self, hidden_states)
        return self.compute(hidden_states)

    def compute(self, x: Tensor) -> Tensor:
        """Return the output of a common call: at once, unless somebody looks at the modules or changed them."""
        packed, plan = self.plan_of([x], (x.shape,), lambda packed: self.build_plan(packed, x.shape))
        return super().forward(x) if packed is None or plan is None else plans.run_feed_forward(plan, x)

    def is_common(self, x: Any) -> bool:
        """Return whether this is a call of the common kind, for inference in fp32 on a CPU: no number is looked at."""
        if len(self.net) not in (3, 4) or not fusion.is_packed(self.first_layer(self)):
            return False
        if not fusion.is_packed(self.net[2]):
            return False
        return fusion.is_inference(self, x)

    def build_plan(self, packed: x86.PackedLayer | None, size: torch.Size) -> plans.FeedForwardPlan | None:
        """Return the plan for this size; `None` where a module is not as it was built, or somebody looks at it."""
        gated, *others = self.net
        layers, dropouts = (gated.proj, others[1]), (others[0], *others[2:])
        if not all(map(fusion.drops_nothing, dropouts)):
            return None
        if fusion.is_changed(gated) or "gelu" in gated.__dict__ or not all(map(fusion.takes_kernel, layers)):
            return None
        return plans.plan_feed_forward(size, *layers, packed)


fusion.VALUES[GEGLU] = ("gelu",)  # absent, unless somebody put another one in its place
