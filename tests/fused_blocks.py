"""What the tests of blocks that the kernel computes at once share."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn

from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.timesteps import TimestepGroups
from diffusers_pqcad.numerics.qparams import activation_qparams
from diffusers_pqcad.runtime import attention, feed_forward, residual, transformer

Block = TypeVar("Block", bound=nn.Module)


@contextmanager
def counted(name: str) -> Iterator[list[Tensor]]:
    """The first inputs of the calls of the function `name`, which runs a plan."""
    inputs: list[Tensor] = []
    module = next(module for module in (residual, attention, feed_forward, transformer) if hasattr(module, name))
    function = getattr(module, name)

    def run(plan: Any, x: Tensor, *others: Tensor | None) -> Tensor:
        inputs.append(x)
        return function(plan, x, *others)

    with mock.patch.object(module, name, run):
        yield inputs


def static(block: Block, boundaries: list[int]) -> Block:
    """Give the layers of `block` static ranges, of another size in each group."""
    groups = TimestepGroups(boundaries)
    for layer in packed_layers(block).values():
        ends = 2.0 + torch.arange(len(groups))
        layer.set_input_qparams_(activation_qparams(-ends, 2 * ends, 8), groups)
    return block


def copy_of(block: Block) -> Block:
    """Return a deep copy of `block`, in the timestep group that it is in: a copy has groups of its own."""
    other = copy.deepcopy(block)
    for layer, copied in zip(packed_layers(block).values(), packed_layers(other).values(), strict=True):
        if layer.timestep_groups is not None:
            copied.timestep_groups.select(layer.timestep_groups.index)
    return other
