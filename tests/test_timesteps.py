"""Specification of the timestep groups: which group a call belongs to, whatever form its timestep has."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given
from hypothesis import strategies as st

from diffusers_pqcad.timesteps import TimestepGroups, install_timestep_groups, remove_timestep_groups

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


def test_the_hook_reads_the_timestep_of_each_call(tiny_unet: UNet2DModel) -> None:
    groups = install_timestep_groups(tiny_unet, [500])
    assert groups.current is None
    x = torch.zeros(2, 1, 8, 8)
    with torch.no_grad():
        tiny_unet(x, 10)
        assert groups.current == 0
        tiny_unet(x, timestep=torch.tensor(700))
        assert groups.current == 1
        tiny_unet(sample=x, timestep=torch.tensor([3, 4]))
        assert groups.current == 0
        tiny_unet(x, torch.tensor([3, 999]), return_dict=False)
        assert torch.equal(groups.current, torch.tensor([0, 1]))


def test_a_call_without_timestep_is_refused_unless_there_is_one_group() -> None:
    model = torch.nn.Linear(1, 1)
    install_timestep_groups(model, [500])
    with pytest.raises(ValueError, match="Linear was called without `timestep`"):
        model(torch.zeros(1))
    groups = install_timestep_groups(model, [])
    model(torch.zeros(1))
    assert groups.current == 0


def test_installing_replaces_and_removing_removes(tiny_unet: UNet2DModel) -> None:
    seen: list[str] = []
    tiny_unet.register_forward_pre_hook(lambda module, args: seen.append("kept"))
    first = install_timestep_groups(tiny_unet, [1])
    second = install_timestep_groups(tiny_unet, [2])
    tiny_unet(torch.zeros(1, 1, 8, 8), 5)
    assert (first.current, second.current) == (None, 1)
    remove_timestep_groups(tiny_unet)
    tiny_unet(torch.zeros(1, 1, 8, 8), 0)
    assert second.current == 1
    assert seen == ["kept", "kept"]


def test_a_copied_model_has_groups_of_its_own(tiny_unet: UNet2DModel) -> None:
    groups = install_timestep_groups(tiny_unet, [500])
    copied = copy.deepcopy(tiny_unet)
    copied(torch.zeros(1, 1, 8, 8), 700)
    assert groups.current is None
    (hook,) = copied._forward_pre_hooks.values()
    assert (hook.boundaries, hook.current) == ((500,), 1)
