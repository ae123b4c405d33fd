"""Timestep groups: which static activation range a model call uses, decided by the timestep's value."""

import inspect
import threading
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
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
    calibrated at some steps serves any number of steps. The model reads the `timestep` argument of each call (never a
    call counter, which a retry or another step count would desynchronize); its layers share this object. `current` is
    an int, a (B,) int64 tensor for a batch of several groups, or `None` outside of a call; `index` is the same as an
    int64 tensor, () or (B,), on the CPU: what a compiled graph reads.

    The group belongs to the thread. A call runs in one thread from its start to its end; a context variable would also
    go to the tasks that were made meanwhile and outlive the call, and `torch.compile` cannot trace one.
    """

    def __init__(self, boundaries: Sequence[int | float]) -> None:
        self.boundaries = checked_boundaries(boundaries)
        self._edges = torch.tensor(self.boundaries, dtype=torch.float64, device="cpu")
        self._call = threading.local()  # not of a subclass with defaults: dynamo loses what is set on one

    def __len__(self) -> int:
        return len(self.boundaries) + 1

    def __reduce__(self) -> Any:
        return type(self), (self.boundaries,)  # a call in progress is neither copied nor pickled

    def of_call(self, name: str) -> int | Tensor:
        """Return the group of this thread's call: an int, or (B,) int64; in a graph that is being made, `index`.

        There a number would be a constant, and each group of timesteps would need a graph of its own. Raises
        ValueError, with `name`, that of the layer that asks, outside of a call.
        """
        compiling = torch.compiler.is_compiling()
        group = getattr(self._call, "index" if compiling else "current", None)
        if group is not None:
            return group
        if self.index is not None:
            if torch.jit.is_tracing():
                return self.index
            self.select(self.index)  # a compiled call, and this layer outside of the graph
            group = self.current
        if group is None and not self.boundaries:  # any timestep is in the only group
            return torch.zeros((), dtype=torch.int64, device="cpu") if is_traced() else 0
        if group is None:
            raise ValueError(
                f"{name}: its activation ranges depend on the timestep, but no timestep was seen. Call the whole "
                "model (which reads it), not the layer alone; checkpoint blocks by enable_gradient_checkpointing()."
            )
        return group

    @property
    def current(self) -> int | Tensor | None:
        """The group of this thread's call, looked at."""
        return getattr(self._call, "current", None)

    @property
    def index(self) -> Tensor | None:
        """The group of this thread's call, as a tensor."""
        return getattr(self._call, "index", None)

    def index_of(self, timestep: Any) -> Tensor:
        """Return the group of `timestep` (number or tensor) as an int64 tensor, () or (B,); no value is looked at."""
        if not isinstance(timestep, Tensor):
            # Not `tensor(timestep)`: a graph would hold the number as a constant.
            timestep = torch.full((), timestep, dtype=torch.float64, device="cpu")
        # In float64, whatever the timestep's dtype: 500 is not exact in bf16, and 0.25 is no integer. On the CPU: some
        # accelerators have no float64.
        index = torch.bucketize(timestep.cpu().double(), self._edges, right=True)
        # TorchScript would take the size for a number of the graph: (1,) serves any batch there as well.
        return index.reshape(()) if not torch.jit.is_tracing() and index.numel() == 1 else index

    def select(self, index: Tensor | None) -> None:
        """Make `index`, as `index_of` returns it, the group of this thread's calls; `None`: of no call."""
        self._call.index = index
        if index is None or is_traced():
            self._call.current = None  # what needs a number reads the index itself
        elif index.numel() == 1:  # at once: compiled graphs ask for every operator
            self._call.current = int(index)
        else:
            first = int(index.flatten()[0])
            self._call.current = first if bool((index == first).all()) else index

    def run(self, index: Tensor, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Return `function(*args, **kwargs)`, computed in the group `index`, as `index_of` returns it."""
        # A graph is guarded by what it looked at, so it does not ask for the call around it: there is none.
        before = (None, None) if torch.compiler.is_compiling() else (self.index, self.current)
        self.select(index)
        try:
            return function(*args, **kwargs)
        finally:
            self._call.index, self._call.current = before


def is_traced() -> bool:
    """Return whether a graph for other inputs is made of this call, so that no number may be looked at."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


class Checkpointed:
    """What checkpoints modules, `function(module, *inputs)`, each of which takes the group of its call along.

    They are computed again in the backward, outside of the model's call, when others may have followed.
    """

    def __init__(self, function: Callable[..., Any], groups: TimestepGroups) -> None:
        self.function, self.groups = function, groups

    def __call__(self, module: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Any:
        """Return what the function returns."""
        index = self.groups.index
        if torch.compiler.is_compiling() or index is None:  # a graph takes the group along as it does any tensor
            return self.function(module, *inputs, **kwargs)
        return self.function(partial(self.groups.run, index, module), *inputs, **kwargs)


def checkpoint_in_groups_(model: nn.Module) -> None:
    """Let the modules of `model` that checkpoint others do so in its groups, or plainly where it has none."""
    groups = groups_of(model)
    for module in model.modules():
        function: Any = module.__dict__.get("_gradient_checkpointing_func")
        plain = function.function if isinstance(function, Checkpointed) else function
        if function is not None:
            module.__dict__["_gradient_checkpointing_func"] = plain if groups is None else Checkpointed(plain, groups)


def groups_of(model: nn.Module) -> TimestepGroups | None:
    """Return the groups that `install_timestep_groups` gave `model`, or `None`."""
    return model.__dict__.get("_timestep_groups")


@cache
def place_of_timestep(kind: Any) -> int | None:
    """Return the place of `timestep` among the positional arguments of a model of class `kind`, if it has one."""
    names = list(inspect.signature(kind.forward).parameters)
    return names.index("timestep") - 1 if "timestep" in names else None


def given_timestep(place: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the timestep of a call, by its place or its name; None where there is none."""
    return args[place] if place is not None and place < len(args) else kwargs.get("timestep")


@cache
def class_in_groups(base: Any) -> Any:
    """Return the subclass of `base` whose instances compute each call in the group of its `timestep`.

    A class, and no hook or attribute of the instance: a direct `forward` is a call, too, what others put in the place
    of the instance's `forward` changes nothing, and a replica computes with its own weights. It has the name of
    `base`, which configs and messages hold.
    """
    place = place_of_timestep(base)

    def run(model: nn.Module, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        groups = groups_of(model)
        if groups is None:  # made by this class, as by from_config(), or of its own class again
            return function(*args, **kwargs)
        timestep = given_timestep(place, args, kwargs)
        if timestep is None and groups.boundaries:
            raise ValueError(f"{base.__name__} was called without `timestep`, but its activation ranges depend on it.")
        index = groups.index_of(timestep) if groups.boundaries else torch.zeros((), dtype=torch.int64, device="cpu")
        return groups.run(index, function, *args, **kwargs)

    class InGroups(base):
        plain_class = base

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            if "forward" not in self.__dict__:
                return super().__call__(*args, **kwargs)
            return run(self, super().__call__, args, kwargs)  # hooks of before may lead past the method below

        @wraps(base.forward)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            # Not `super()`: hooks may keep this method longer than the model is of this class.
            return run(self, partial(base.forward, self), args, kwargs)

        def _set_gradient_checkpointing(self, *args: Any, **kwargs: Any) -> None:
            super()._set_gradient_checkpointing(*args, **kwargs)
            checkpoint_in_groups_(self)

        def __reduce_ex__(self, protocol: Any) -> Any:
            return new_in_groups, (base,), self.__getstate__()

    for name in ("__module__", "__name__", "__qualname__", "__doc__"):
        setattr(InGroups, name, getattr(base, name))
    return InGroups


def new_in_groups(base: Any) -> nn.Module:
    """Return an empty instance of `class_in_groups(base)`, for a copy or a pickle to fill."""
    kind = class_in_groups(base)
    return kind.__new__(kind)


def install_timestep_groups(model: nn.Module, boundaries: Sequence[int | float]) -> TimestepGroups:
    """Replace the timestep groups of `model` by those of `boundaries` and return them."""
    remove_timestep_groups(model)
    groups = TimestepGroups(boundaries)
    model._timestep_groups = groups  # type: ignore[assignment]
    base: Any = type(model)  # mypy takes a class of modules for unhashable
    model.__class__ = class_in_groups(base)
    checkpoint_in_groups_(model)
    return groups


def remove_timestep_groups(model: nn.Module) -> None:
    """Undo `install_timestep_groups`, if `model` has groups."""
    if groups_of(model) is None:
        return
    del model._timestep_groups
    kind: Any = type(model)
    if "plain_class" in vars(kind):  # else another library made a class of it since, which computes plainly now
        model.__class__ = kind.plain_class
    checkpoint_in_groups_(model)
