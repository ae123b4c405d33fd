"""What tells, of a model's calls, that guidance makes two branches: in one batch, or in a call for each."""

from collections.abc import Iterator
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor


class SeenCall(NamedTuple):
    """A call of a model, by references that keep none of its states and conditions: what is gone is compared no more.

    `conditions` are all other tensors, in order.
    """

    state: "ref[Tensor]"
    timestep: Any
    conditions: "list[ref[Tensor]]"


def seen_call(timestep: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> SeenCall | None:
    """Return what is to be remembered of a call; None where its state is no tensor."""
    state = args[0] if args else kwargs.get("hidden_states", kwargs.get("sample"))
    if not isinstance(state, Tensor):
        return None
    others = [tensor for tensor in tensors_in([args, kwargs]) if tensor is not state and tensor is not timestep]
    return SeenCall(ref(state), timestep, [ref(tensor) for tensor in others])


def tensors_in(node: Any) -> Iterator[Tensor]:
    """Yield the tensors of nested arguments."""
    if isinstance(node, Tensor):
        yield node
    elif isinstance(node, dict | list | tuple):
        for item in node.values() if isinstance(node, dict) else node:
            yield from tensors_in(item)


def has_two_branches(call: SeenCall) -> bool:
    """Return whether the batch of a call holds each state twice, as that of most pipelines with guidance does."""
    state = call.state()
    return state is not None and len(state) % 2 == 0 and torch.equal(*state.chunk(2))


def is_other_branch(before: SeenCall, now: SeenCall) -> bool:
    """Return whether two calls have one state and timestep, and other conditions: guidance of a call for each branch.

    The same call again is none. Nor is one with a state or conditions of which those of before are gone.
    """
    if not same(before.timestep, now.timestep) or not same(before.state(), now.state()):
        return False
    if len(before.conditions) != len(now.conditions):
        return True
    pairs = [(old(), new()) for old, new in zip(before.conditions, now.conditions, strict=True)]
    return any(old is not None and not same(old, new) for old, new in pairs)


def same(a: Any, b: Any) -> bool:
    """Return whether two numbers or tensors are the same; None, which is gone, is like nothing."""
    if a is None or b is None:
        return False
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and a.device == b.device and torch.equal(a, b))
    return not isinstance(a, Tensor) and not isinstance(b, Tensor) and bool(a == b)
