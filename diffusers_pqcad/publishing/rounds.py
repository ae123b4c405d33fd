"""How many rounds PQ is likely to take, and what moves in each: by its own controller, with prices that are made up.

Which layers are cheap is known after a measurement alone. Here sensitivities are log-normal with the spread of the
bundled teachers' (examples/results/*/history.json): stages and rounds come out as theirs did. What PQ does whatever it
measures is in the last of these rounds.
"""

import math
import random
from collections.abc import Mapping
from typing import NamedTuple

from diffusers_pqcad.compression.progressive import ProgressiveConfig
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.numerics.allocation import BitController, stage_budgets

SPREAD = 2.0  # of the logarithm of a layer's sensitivity


class Round(NamedTuple):
    """A round of PQ: how many layers' prices it measures (0: none), and which layers move, in a stage from 0 on.

    `is_forced`: it ends its stage, whatever its moves cost.
    """

    stage: int
    priced: int
    moved: tuple[str, ...]
    is_forced: bool = False


def controller_of(num_weights: Mapping[str, int], quantization: PQCADConfig) -> BitController:
    """Return the controller of a PQ of layers with `num_weights`; ValueError for a budget that cannot be met."""
    choices = (int(quantization.weight_bits),) if quantization.method == "fixed" else quantization.bit_choices
    controller = BitController(num_weights, choices)
    controller.check_budget(quantization.weight_bits)
    return controller


def expected_rounds(
    num_weights: Mapping[str, int], quantization: PQCADConfig, settings: ProgressiveConfig
) -> list[Round]:
    """Return the rounds of a PQ of layers with `num_weights`, by name, in their order."""
    controller = controller_of(num_weights, quantization)
    draws = random.Random(settings.seed)
    sensitivity = {name: math.exp(draws.gauss(0, SPREAD)) for name in num_weights}
    known: set[str] = set()

    def cost(name: str, bits: int) -> float:
        return sensitivity[name] * 4.0**-bits

    def observe() -> int:
        """Take in the prices of a round, and return how many it measures."""
        movable = controller.movable()
        fresh = [name for name in movable if name not in known]
        count = max(math.ceil(settings.price_share * len(movable)), len(fresh))
        known.update(movable)
        controller.observe(
            {
                name: cost(name, narrower) - cost(name, controller.bits[name])
                for name in movable
                if (narrower := controller.narrower(name)) is not None
            }
        )
        return 0 if settings.signal == "weight" else count

    floor = sum(cost(name, controller.bit_choices[0]) for name in num_weights)
    rounds: list[Round] = []
    budgets = stage_budgets(quantization.weight_bits, controller.bit_choices[0])
    for stage, budget in enumerate(budgets):
        for index in range(2 * settings.rounds_per_stage):
            if not controller.over(budget) or not controller.movable():
                break
            priced = observe()
            perturbation = floor + sum(cost(name, bits) for name, bits in controller.bits.items())
            left = max(settings.rounds_per_stage - index, 1)
            moves = controller.propose(budget, rounds_left=left, perturbation=perturbation)
            controller.commit(moves)
            rounds.append(Round(stage, priced, tuple(move.layer for move in moves)))
        before, priced = dict(controller.bits), observe() if controller.over(budget) else 0
        controller.forced_moves(budget)
        if stage == len(budgets) - 1:
            controller.polish_moves(budget)
        moved = tuple(name for name, bits in controller.bits.items() if bits != before[name])
        rounds.append(Round(stage, priced, moved, is_forced=True))
    return rounds
