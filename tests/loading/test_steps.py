"""Specification of how many steps a timestep tells of."""

import pytest
import torch

from diffusers_pqcad.loading.steps import number_of_timesteps

pytestmark = pytest.mark.fast

TIMESTEPS = torch.arange(10)


@pytest.mark.parametrize(
    ("timestep", "number"),
    [
        (TIMESTEPS[0], 10),
        (TIMESTEPS[9].expand(3), 10),
        (TIMESTEPS[4:][0][None], 10),
        (next(iter(TIMESTEPS[4:].float())), 6),  # a tensor of its own, of the six that are left
        (TIMESTEPS[4] / 1000, None),
        (torch.tensor(7), None),
        (torch.tensor([7, 3]), None),
        (torch.full((4,), 7), None),
        (torch.tensor([7]).expand(4), None),
        (TIMESTEPS, None),
        (7, None),
        (None, None),
    ],
)
def test_the_number_of_timesteps(timestep: object, number: int | None) -> None:
    assert number_of_timesteps(timestep) == number
