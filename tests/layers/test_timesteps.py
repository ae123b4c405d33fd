"""Specification of the timestep groups: which group a call belongs to, whatever form its timestep has."""

import asyncio
import copy
import inspect
import pickle
from typing import Any

import accelerate
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusers_pqcad.layers.timesteps import TimestepGroups, install_timestep_groups, remove_timestep_groups

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("timestep", "group"), [(0, 0), (99, 0), (99.9, 0), (100, 1), (399, 1), (400, 2), (999, 2), (10**6, 2), (-1, 0)]
)
def test_intervals_are_half_open(timestep: float, group: int) -> None:
    groups = TimestepGroups([100, 400])
    assert len(groups) == 3
    forms = (timestep, torch.tensor(timestep), torch.tensor([timestep]), torch.tensor([timestep] * 3))
    for form in forms:
        assert (groups.index_of(form) == group).all()
        groups.select(groups.index_of(form))
        assert groups.current == group
        assert isinstance(groups.current, int)


@pytest.mark.parametrize(
    ("timestep", "group"),
    [
        (torch.tensor(0), 0),
        (torch.tensor(1), 2),
        (torch.tensor(0.25), 1),
        (torch.tensor(0.2498), 0),
        (torch.tensor(0.25, dtype=torch.bfloat16), 1),
        (torch.tensor([0, 1], dtype=torch.int32), [0, 2]),
        (0.7, 1),
    ],
    ids=str,
)
def test_boundaries_may_lie_between_integers(timestep: float | torch.Tensor, group: int | list[int]) -> None:
    """As of models that are called with t / 1000; an integer timestep is compared with the fraction itself."""
    assert TimestepGroups([0.25, 0.75]).index_of(timestep).tolist() == group


@given(timestep=st.integers(0, 2**53), boundary=st.integers(0, 2**53) | st.floats(0, 2.0**53))
def test_numbers_are_compared_as_float64(timestep: int, boundary: float) -> None:
    assert TimestepGroups([boundary]).index_of(torch.tensor(timestep)).item() == (boundary <= timestep)


@given(
    boundaries=st.lists(st.integers(0, 999), unique=True, max_size=6).map(sorted),
    timesteps=st.lists(st.integers(0, 999), min_size=2, max_size=8),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.float32]),
)
def test_a_batch_gets_the_groups_of_its_samples(
    boundaries: list[int], timesteps: list[int], dtype: torch.dtype
) -> None:
    groups = TimestepGroups(boundaries)
    expected = [sum(boundary <= timestep for boundary in boundaries) for timestep in timesteps]
    index = groups.index_of(torch.tensor(timesteps, dtype=dtype))
    assert index.tolist() == expected
    groups.select(index)
    actual = groups.current
    if len(set(expected)) == 1:
        assert isinstance(actual, int)
        assert actual == expected[0]
    else:
        assert isinstance(actual, torch.Tensor)
        assert actual.dtype == torch.int64
        assert actual.tolist() == expected


@pytest.mark.parametrize("boundaries", [[400, 100], [100, 100]])
def test_boundaries_must_increase(boundaries: list[int]) -> None:
    with pytest.raises(ValueError, match="increasing"):
        TimestepGroups(boundaries)


def watch(model: nn.Module, groups: TimestepGroups) -> list[Any]:
    """Return the groups that a module in `model` sees, a list that each call adds to."""
    seen: list[Any] = []
    next(model.children()).register_forward_hook(lambda *_: seen.append(groups.current))
    return seen


@torch.no_grad()
def test_a_call_has_the_group_of_its_timestep(tiny_unet: UNet2DModel) -> None:
    groups = install_timestep_groups(tiny_unet, [500])
    seen, x = watch(tiny_unet, groups), torch.zeros(2, 1, 8, 8)
    for function in (tiny_unet, tiny_unet.forward):
        function(x, 10)
        function(x, timestep=torch.tensor(700))
        function(sample=x, timestep=torch.tensor([3, 4]))
        function(x, torch.tensor([3, 999]), return_dict=False)
        assert seen[:3] == [0, 1, 0]
        assert seen[3].tolist() == [0, 1]
        assert (groups.current, groups.index) == (None, None)
        seen.clear()


class Denoiser(nn.Module):
    """The smallest model of timesteps."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Identity()

    def forward(self, sample: Tensor, timestep: Any = None) -> Tensor:
        return self.part(sample)


@pytest.mark.parametrize("kind", [Denoiser, lambda: nn.Sequential(nn.Identity())])
def test_a_call_without_timestep_is_refused_unless_there_is_one_group(kind: Any) -> None:
    model = kind()
    install_timestep_groups(model, [500])
    for function in (model, model.forward):
        with pytest.raises(ValueError, match=f"{type(model).__name__} was called without `timestep`"):
            function(torch.zeros(1))
    seen = watch(model, install_timestep_groups(model, []))
    model(torch.zeros(1))
    assert seen == [0]


def test_installing_replaces_and_removing_removes() -> None:
    model = Denoiser()
    first = watch(model, install_timestep_groups(model, [1]))
    second = watch(model, install_timestep_groups(model, [2]))
    model(torch.zeros(1), 5)
    assert (first, second) == ([None], [1])
    assert type(model) is not Denoiser
    remove_timestep_groups(model)
    model(torch.zeros(1), 0)
    assert second == [1, None]
    assert type(model) is Denoiser
    assert not [name for name in vars(model) if "group" in name]
    remove_timestep_groups(model)  # there are none


def test_an_exception_leaves_no_group_behind() -> None:
    model = Denoiser()
    groups = install_timestep_groups(model, [500])
    model.part.register_forward_hook(lambda *_: 1 / 0)
    for function in (model, model.forward):
        with pytest.raises(ZeroDivisionError):
            function(torch.zeros(1), 700)
        assert (groups.current, groups.index) == (None, None)


def test_calls_within_calls_do_not_disturb_each_other() -> None:
    """A model of its own, such as a ControlNet, and the same one again."""
    outer, inner = Denoiser(), Denoiser()
    outer.inner = inner
    groups = [install_timestep_groups(model, [500]) for model in (outer, inner)]
    seen: list[tuple[Any, Any]] = []

    def note(*_: Any) -> None:
        seen.append(tuple(group.current for group in groups))

    def call_others(*_: Any) -> None:
        note()
        if len(seen) == 1:
            inner(torch.zeros(1), 10)
            note()
            outer(torch.zeros(1), 20)
            note()

    outer.part.register_forward_hook(call_others)
    inner.part.register_forward_hook(note)
    outer(torch.zeros(1), 700)
    assert seen == [(1, None), (1, 0), (1, None), (0, None), (1, None)]


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_a_copy_made_in_a_call_has_groups_of_its_own(duplicate: Any) -> None:
    model, copies = Denoiser(), []
    groups = install_timestep_groups(model, [500])
    handle = model.part.register_forward_hook(lambda *_: copies.append(duplicate(groups)))
    model(torch.zeros(1), 700)
    handle.remove()
    assert (copies[0].boundaries, copies[0].current) == ((500,), None)
    copied = duplicate(model)
    assert type(copied) is type(model)
    seen = watch(copied, copied._timestep_groups)
    copied(torch.zeros(1), 700)
    assert seen == [1]
    assert groups.current is None


def test_hooks_of_accelerate_may_come_before_or_after() -> None:
    """They put a function in the place of the instance's `forward`, and keep the one of before."""
    for first in (False, True):
        model = Denoiser()
        if first:
            accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
        seen = watch(model, install_timestep_groups(model, [500]))
        if not first:
            accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
        model(torch.zeros(1), 700)
        accelerate.hooks.remove_hook_from_module(model)
        model(torch.zeros(1), torch.tensor(10))
        assert seen == [1, 0]
        accelerate.hooks.add_hook_to_module(model, accelerate.hooks.ModelHook())
        remove_timestep_groups(model)
        model(torch.zeros(1))  # the kept method is one of a class that the model no longer has
        assert seen == [1, 0, None]


def test_the_class_in_groups_passes_for_the_one_it_stands_for(tiny_unet: UNet2DModel) -> None:
    install_timestep_groups(tiny_unet, [500])
    kind = type(tiny_unet)
    assert (kind.__name__, kind.__module__, kind.__qualname__) == (
        UNet2DModel.__name__,
        UNet2DModel.__module__,
        UNet2DModel.__qualname__,
    )
    assert inspect.signature(kind.forward) == inspect.signature(UNet2DModel.forward)
    assert kind.from_config(tiny_unet.config)(torch.zeros(1, 1, 8, 8), 0).sample.shape == (1, 1, 8, 8)


def test_tasks_that_outlive_a_call_are_outside_of_it() -> None:
    """A server's task that is made in a call inherits its context, but runs when the call is over."""
    model = Denoiser()
    seen = watch(model, groups := install_timestep_groups(model, [500]))

    async def late() -> Any:
        return groups.current

    async def serve() -> None:
        tasks: list[Any] = []
        model.part.register_forward_hook(lambda *_: tasks.append(asyncio.create_task(late())))
        model(torch.zeros(1), 700)
        assert [await task for task in tasks] == [None]

    asyncio.run(serve())
    assert seen == [1]


def test_a_single_range_is_that_of_any_call_and_of_none() -> None:
    """As of an autoencoder's `decode`, which is no `forward`."""
    groups = TimestepGroups([])
    assert groups.of_call("decoder.conv") == 0


def test_a_class_that_another_library_made_of_a_model_with_groups_stays() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    install_timestep_groups(model, [])
    kind = type("Sharded", (type(model),), {})
    model.__class__ = kind
    remove_timestep_groups(model)
    assert type(model) is kind
    assert model(torch.ones(1, 2)).shape == (1, 2)
    assert not hasattr(model, "_timestep_groups")
