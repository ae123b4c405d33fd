"""The bit controllers: prices decide which layers move to fewer bits, with data those of a momentum. Pure: no model.

The abstract of PQCAD-DM (arXiv:2506.16776) asks for "adaptive bit-width transitions guided by a momentum-based
mechanism, reducing excessive weight perturbations in low-precision". Inspired by it, and our own design: every layer
starts at the widest choice; a transition of layer l from b to the next narrower width b' costs a *perturbation* (of
the weights, or of the model's output) and saves n_l (b - b') bits; its price is the cost per bit saved, and cheap
layers move first. Measured from few images, a price is noisy. How far a transition moves the *weights* is known, so
what has to be measured is the layer's sensitivity alone, perturbation over that change; an exponential moving average
of it serves all rounds and all widths (`SensitivityController`). Its worth is in examples/results/method.md.
A trust region bounds the perturbation of one round, and a forced phase makes sure that the budget is met.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Move:
    """The transition of one layer between neighbouring widths; `saved_bits` is negative for a move up."""

    layer: str
    from_bits: int
    to_bits: int
    saved_bits: int
    predicted: float  # perturbation that the momentum expects of it


@dataclass
class Momentum:
    """Bias-corrected moving average of a price."""

    count: int = 0
    average: float = 0.0

    def update(self, price: float, beta: float) -> None:
        """Take in one measured price."""
        self.count += 1
        self.average = beta * self.average + (1 - beta) * price

    def mean(self, beta: float) -> float:
        """Return the bias-corrected average (Kingma & Ba 2015, arXiv:1412.6980, section 3)."""
        return self.average / (1 - beta**self.count) if self.count else 0.0


@dataclass
class BitController:
    """Bits of every layer under a budget of average bits; a price is the one that was measured last.

    Args:
        num_weights: weights of every searched layer.
        bit_choices: widths, any order; every layer starts at the widest.
        trust: a round's predicted perturbation may be at most `trust` times (what is there already + the floor).

    Raises ValueError for an empty model or a budget (`check_budget`) that no allocation meets.
    """

    num_weights: Mapping[str, int]
    bit_choices: tuple[int, ...]
    trust: float = 1.0
    bits: dict[str, int] = field(default_factory=dict)
    prices: dict[tuple[str, int], float] = field(default_factory=dict)  # by layer and the width that it leaves

    def __post_init__(self) -> None:
        if not self.num_weights:
            raise ValueError("there is no layer to allocate bits to.")
        self.bit_choices = tuple(sorted(self.bit_choices, reverse=True))
        self.bits = self.bits or dict.fromkeys(self.num_weights, self.bit_choices[0])

    def total_bits(self) -> int:
        """Return the bits of all searched weights together."""
        return sum(self.num_weights[layer] * bits for layer, bits in self.bits.items())

    def average_bits(self) -> float:
        """Return the average bits of a weight."""
        return self.total_bits() / sum(self.num_weights.values())

    def excess_bits(self, budget: float) -> float:
        """Return by how many bits the allocation is over an average of `budget`; zero or negative when it fits."""
        return self.total_bits() - budget * sum(self.num_weights.values())

    def over(self, budget: float) -> bool:
        """Return whether the allocation takes more than an average of `budget` bits."""
        return self.excess_bits(budget) > 0

    def check_budget(self, budget: float) -> None:
        """Raise ValueError for an average that the widths cannot reach."""
        low, high = self.bit_choices[-1], self.bit_choices[0]
        if not low <= budget <= high:
            raise ValueError(f"an average of {budget} bits cannot be met with the widths {list(self.bit_choices)}.")

    def narrower(self, layer: str) -> int | None:
        """Return the next width below the layer's, or `None` at the narrowest."""
        position = self.bit_choices.index(self.bits[layer])
        return self.bit_choices[position + 1] if position + 1 < len(self.bit_choices) else None

    def movable(self) -> list[str]:
        """Return the layers that can move down, in the order given."""
        return [layer for layer in self.num_weights if self.narrower(layer) is not None]

    def observe(self, perturbations: Mapping[str, float]) -> None:
        """Take in the measured perturbation (>= 0) of each layer's next transition."""
        for layer, perturbation in perturbations.items():
            if self.narrower(layer) is not None:
                self.prices[layer, self.bits[layer]] = max(perturbation, 0.0) / self.saved_bits(layer)

    def saved_bits(self, layer: str) -> int:
        """Return the bits that the layer's next transition saves, over all its weights; 0 at the narrowest width."""
        return self.num_weights[layer] * (self.bits[layer] - (self.narrower(layer) or self.bits[layer]))

    def price(self, layer: str, bits: int) -> float:
        """Return the expected price of the layer's transition down from `bits`.

        Where it was not measured yet, that of the next wider one stands in, scaled as rounding noise is: four times
        the variance for each bit less. 0 where none was.
        """
        known = [width for width in self.bit_choices[::-1] if width >= bits and (layer, width) in self.prices]
        return self.prices[layer, known[0]] * 4.0 ** (known[0] - bits) if known else 0.0

    def priority(self, layer: str) -> float:
        """Return the expected price of the layer's next transition; the smallest moves first."""
        return self.price(layer, self.bits[layer])

    def _move(self, layer: str) -> Move:
        from_bits, to_bits, saved = self.bits[layer], self.narrower(layer), self.saved_bits(layer)
        assert to_bits is not None
        return Move(layer, from_bits, to_bits, saved, self.price(layer, from_bits) * saved)

    def propose(self, budget: float, *, rounds_left: int = 1, perturbation: float = math.inf) -> list[Move]:
        """Return this round's moves: the cheapest layers, within the round's share of the budget and the trust region.

        `perturbation` is what the allocation costs already (plus the floor). At least one move is returned unless
        every layer is at the narrowest width.
        """
        share = self.excess_bits(budget) / max(rounds_left, 1)
        moves: list[Move] = []
        saved, predicted = 0, 0.0
        for layer in sorted(self.movable(), key=self.priority):
            move = self._move(layer)
            if moves and (saved >= share or predicted + move.predicted > self.trust * perturbation):
                break
            moves.append(move)
            saved += move.saved_bits
            predicted += move.predicted
        return moves

    def commit(self, moves: Iterable[Move]) -> None:
        """Carry out `moves`."""
        for move in moves:
            self.bits[move.layer] = move.to_bits

    def forced_moves(self, budget: float) -> list[Move]:
        """Carry out, and return, the cheapest transitions that bring the average down to `budget`."""
        moves: list[Move] = []
        while self.over(budget):
            move = self._move(min(self.movable(), key=self.priority))
            self.commit([move])
            moves.append(move)
        return moves

    def polish_moves(self, budget: float) -> list[Move]:
        """Carry out, and return, moves up that spend what is left of the budget where a bit is worth most."""
        moves: list[Move] = []
        while True:
            affordable = [move for layer in self.num_weights if (move := self._move_up(layer)) is not None]
            affordable = [move for move in affordable if -move.saved_bits <= -self.excess_bits(budget)]
            if not affordable:
                return moves
            best = max(affordable, key=lambda move: move.predicted / move.saved_bits)  # both negative: gain per bit
            self.commit([best])
            moves.append(best)

    def _move_up(self, layer: str) -> Move | None:
        position = self.bit_choices.index(self.bits[layer])
        if position == 0:
            return None
        to_bits = self.bit_choices[position - 1]
        saved = self.num_weights[layer] * (self.bits[layer] - to_bits)
        return Move(layer, self.bits[layer], to_bits, saved, self.price(layer, to_bits) * saved)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes, as plain JSON values."""
        return {
            "bits": dict(self.bits),
            "prices": [[*key, price] for key, price in self.prices.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.bits = dict(state["bits"])
        self.prices = {(layer, bits): price for layer, bits, price in state["prices"]}


@dataclass
class SensitivityController(BitController):
    """A price is the known change of the layer's weights times its sensitivity, of which a momentum is kept.

    Args:
        changes: ||Q_b'(W) - Q_b(W)||^2 of each layer's transition from b to the next narrower b', by (layer, b).
        beta: momentum of the sensitivities; with 0 a price is the one that was measured last.

    The change may be of any unit: only its ratio between the widths of one layer counts.
    """

    changes: Mapping[tuple[str, int], float] = field(default_factory=dict)
    beta: float = 0.9
    momenta: dict[str, Momentum] = field(default_factory=dict)

    def observe(self, perturbations: Mapping[str, float]) -> None:
        """Update each layer's sensitivity with the measured perturbation (>= 0) of its next transition.

        A transition that changes no weight says nothing of the sensitivity.
        """
        for layer, perturbation in perturbations.items():
            change = self.changes.get((layer, self.bits[layer]), 0.0)
            if self.narrower(layer) is not None and change > 0:
                self.momenta.setdefault(layer, Momentum()).update(max(perturbation, 0.0) / change, self.beta)

    def price(self, layer: str, bits: int) -> float:
        """Return the expected price of the layer's transition down from `bits`; 0 where nothing was measured."""
        position = self.bit_choices.index(bits)
        if layer not in self.momenta or position + 1 == len(self.bit_choices):
            return 0.0
        saved = self.num_weights[layer] * (bits - self.bit_choices[position + 1])
        return self.momenta[layer].mean(self.beta) * self.changes[layer, bits] / saved

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes, as plain JSON values."""
        momenta = [[layer, momentum.count, momentum.average] for layer, momentum in self.momenta.items()]
        return {"bits": dict(self.bits), "sensitivities": momenta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.bits = dict(state["bits"])
        self.momenta = {layer: Momentum(*rest) for layer, *rest in state["sensitivities"]}


def stage_budgets(target: float, widest: int) -> tuple[float, ...]:
    """Return the two stages' average bits: half-way from the widest, rounded to half a bit, and the target."""
    intermediate = round(widest + target) / 2  # half of the sum, to the nearest half
    return (intermediate, target) if target < intermediate < widest else (target,)


def allocate(
    num_weights: Mapping[str, int],
    perturbation: Callable[[str, int], float],
    *,
    budget: float,
    bit_choices: tuple[int, ...],
    rounds_per_stage: int = 6,
) -> dict[str, int]:
    """Return bits per layer for an average of `budget`, from a perturbation that needs no data.

    `perturbation(layer, bits)` is the layer's cost at a width, such as its relative weight error. The same rounds in
    the same two stages as with data; such a cost has no noise, so the controller keeps no momentum.
    """
    controller = BitController(num_weights, bit_choices)
    controller.check_budget(budget)
    for stage_budget in stage_budgets(budget, controller.bit_choices[0]):
        for round_index in range(rounds_per_stage):
            if not controller.over(stage_budget):
                break
            narrower = {layer: controller.narrower(layer) for layer in controller.movable()}
            controller.observe(
                {
                    layer: perturbation(layer, bits) - perturbation(layer, controller.bits[layer])
                    for layer, bits in narrower.items()
                    if bits is not None
                }
            )
            controller.commit(controller.propose(stage_budget, rounds_left=rounds_per_stage - round_index))
        controller.forced_moves(stage_budget)
    controller.polish_moves(budget)
    return controller.bits
