"""Specification of what is a second branch of guidance: another call for the same state and timestep."""

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusers_pqcad.loading.folding import SeenCall, has_two_branches, is_other_branch, seen_call, tensors_in

pytestmark = pytest.mark.fast

STATE, PROMPT, OTHER = torch.ones(1, 4), torch.zeros(1, 3), torch.ones(1, 3)


def seen(state: Tensor, timestep: Any, *conditions: Any) -> SeenCall:
    """What is remembered of a call with the state by position, and everything else by name."""
    call = seen_call(timestep, (state,), {"timestep": timestep, "conditions": conditions})
    assert call is not None
    return call


@pytest.mark.parametrize(
    ("state", "timestep", "conditions", "is_branch"),
    [
        (STATE, torch.tensor(5.0), [OTHER], True),
        (STATE.clone(), torch.tensor(5.0), [{"text": [OTHER]}], True),
        (STATE, torch.tensor(5.0), [PROMPT, OTHER], True),
        (STATE, torch.tensor(5.0), [], True),
        (STATE, torch.tensor(5.0), [PROMPT], False),
        (STATE, torch.tensor(5.0), [PROMPT.clone()], False),
        (STATE, torch.tensor(4.0), [OTHER], False),
        (STATE, 5, [OTHER], False),
        (STATE + 1, torch.tensor(5.0), [OTHER], False),
        (STATE[:, :2], torch.tensor(5.0), [OTHER], False),
    ],
)
def test_another_branch_is_another_condition_of_the_same_state_and_timestep(
    state: Tensor, timestep: Any, conditions: list[Any], is_branch: bool
) -> None:
    assert is_other_branch(seen(STATE, torch.tensor(5.0), PROMPT), seen(state, timestep, *conditions)) == is_branch


def test_timesteps_may_be_numbers() -> None:
    assert is_other_branch(seen(STATE, 5, PROMPT), seen(STATE, 5, OTHER))
    assert not is_other_branch(seen(STATE, 5, PROMPT), seen(STATE, 4, OTHER))


def test_what_is_gone_is_kept_by_nobody_and_is_no_branch() -> None:
    state, prompt = STATE.clone(), PROMPT.clone()
    before = seen(state, 5, prompt)
    del prompt
    gc.collect()
    assert before.conditions[0]() is None
    assert not is_other_branch(before, seen(state, 5, OTHER))
    del state
    gc.collect()
    assert before.state() is None
    assert not is_other_branch(before, seen(STATE, 5, PROMPT, OTHER))


def test_a_batch_with_each_state_twice() -> None:
    a, b = torch.ones(1, 2), torch.zeros(1, 2)
    twos, others = ([a, a], [a, b, a, b]), ([a], [a, b, a], [a, a, b, b])
    for states, twice in [*((states, True) for states in twos), *((states, False) for states in others)]:
        batch = torch.cat(states)
        assert has_two_branches(seen(batch, 5)) == twice


def test_the_state_is_the_first_argument_or_goes_by_its_name() -> None:
    for name in ("sample", "hidden_states"):
        call = seen_call(5, (), {name: STATE, "text": PROMPT})
        assert call is not None
        assert call.state() is STATE
        assert [condition() is PROMPT for condition in call.conditions] == [True]
    assert seen_call(5, ([STATE],), {}) is None
    assert [tensor.shape for tensor in tensors_in([STATE, {"a": (PROMPT, 3)}, None])] == [STATE.shape, PROMPT.shape]
