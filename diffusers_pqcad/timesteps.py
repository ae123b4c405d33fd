"""Timestep groups: which static activation range a model call uses, decided by the timestep's value."""

import inspect
from collections.abc import Sequence
from math import isfinite
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn


def checked_boundaries(boundaries: Any) -> tuple[int | float, ...]:
    """Return `boundaries` as ints and floats; ValueError for anything but increasing finite numbers in a sequence.

    They must increase as float64, in which timesteps are compared with them.
    """
    is_sequence = isinstance(boundaries, list | tuple)
    numbers = [value for value in boundaries if is_finite_number(value)] if is_sequence else []
    as_floats = [float(number) for number in numbers]
    if not is_sequence or len(numbers) < len(boundaries) or as_floats != sorted(set(as_floats)):
        given = list(boundaries) if is_sequence else boundaries
        raise ValueError(f"timestep_boundaries: expected a list of increasing numbers, got {given!r}.")
    return tuple(int(number) if isinstance(number, Integral) else float(number) for number in numbers)


def is_finite_number(value: Any) -> bool:
    """Return whether `value` is a number that float64 holds; a bool is none."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
    except OverflowError:  # an integer beyond the largest float
        return False


class TimestepGroups:
    """Half-open intervals of the timestep value that cover every t, and the group of the call in progress.

    `boundaries` [b1, ..., bk], increasing, make k + 1 groups: t < b1, b1 <= t < b2, ..., t >= bk. So a model
    calibrated at some steps serves any number of steps. Registered as a forward-pre-hook of the model, it reads the
    `timestep` argument of each call (never a call counter, which a retry or another step count would desynchronize);
    the layers share this object. `current` is an int, a (B,) int64 tensor for a batch of several groups, or `None`
    before a call; `index` is the same as an int64 tensor, () or (B,), on the CPU: what a compiled graph reads. Threads
    that call one model at once would read each other's group: give each a copy of the model.
    """

    def __init__(self, boundaries: Sequence[int | float]) -> None:
        self.boundaries = checked_boundaries(boundaries)
        self.current: int | Tensor | None = None
        self.index: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boundaries) + 1

    def index_of(self, timestep: Any) -> Tensor:
        """Return the group of `timestep` (number or tensor) as an int64 tensor, () or (B,); no value is looked at."""
        if not isinstance(timestep, Tensor):
            # Not `tensor(timestep)`: a graph would hold the number as a constant.
            timestep = torch.full((), timestep, dtype=torch.float64)
        # In float64, whatever the timestep's dtype: 500 is not exact in bf16, and 0.25 is no integer. On the CPU: some
        # accelerators have no float64.
        edges = torch.tensor(self.boundaries, dtype=torch.float64, device="cpu")
        index = torch.bucketize(timestep.cpu().double(), edges, right=True)
        return index.reshape(()) if index.numel() == 1 else index

    def select(self, index: Tensor) -> None:
        """Make `index`, as `index_of` returns it, the group of the call in progress."""
        self.index = index
        if index.numel() == 1:  # at once: compiled graphs ask for every operator
            self.current = int(index)
        else:
            first = int(index.flatten()[0])
            self.current = first if bool((index == first).all()) else index

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward-pre-hook: remember the group of the `timestep` argument."""
        if not self.boundaries:
            self.current, self.index = 0, torch.zeros((), dtype=torch.int64)
            return
        if "timestep" in kwargs:
            timestep = kwargs["timestep"]
        else:
            timestep = inspect.signature(model.forward).bind_partial(*args).arguments.get("timestep")
        if timestep is None:
            raise ValueError(
                f"{type(model).__name__} was called without `timestep`, but its activation ranges depend on it."
            )
        index = self.index_of(timestep)
        if torch.compiler.is_compiling():
            self.index, self.current = index, None  # whoever needs a number looks at the index itself
        else:
            self.select(index)


def install_timestep_groups(model: nn.Module, boundaries: Sequence[int | float]) -> TimestepGroups:
    """Replace the timestep groups of `model` by those of `boundaries` and return them."""
    remove_timestep_groups(model)
    groups = TimestepGroups(boundaries)
    model.register_forward_pre_hook(groups, with_kwargs=True)
    return groups


def remove_timestep_groups(model: nn.Module) -> None:
    """Take the hook of `install_timestep_groups` off `model`, if it has one."""
    for key, hook in list(model._forward_pre_hooks.items()):
        if isinstance(hook, TimestepGroups):
            del model._forward_pre_hooks[key]
            model._forward_pre_hooks_with_kwargs.pop(key, None)
