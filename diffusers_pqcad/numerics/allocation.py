"""The bit controller: prices with momentum decide which layers move to fewer bits. Pure: no model.

The abstract of PQCAD-DM (arXiv:2506.16776) asks for "adaptive bit-width transitions guided by a momentum-based
mechanism, reducing excessive weight perturbations in low-precision". Inspired by it, and our own design: every layer
starts at the widest choice; a transition of layer l from b to the next narrower width b' costs a *perturbation* (of
the weights, or of the model's output) and saves n_l (b - b') bits; its price is the cost per bit saved. An exponential
moving average of the price is the layer's priority: cheap layers move first. What that momentum is worth was measured
(examples/results/method.md): at 2, 8 and 32 images a price, the median image of two small models differs by less than
1 dB from that without it, in either direction. The noise of prices is no bottleneck there.
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
    """Bits of every layer under a budget of average bits.

    Args:
        num_weights: weights of every searched layer.
        bit_choices: widths, any order; every layer starts at the widest.
        beta: momentum of the prices; 0 switches it off.
        trust: a round's predicted perturbation may be at most `trust` times (what is there already + the floor).

    Raises ValueError for an empty model or a budget (`check_budget`) that no allocation meets.
    """

    num_weights: Mapping[str, int]
    bit_choices: tuple[int, ...]
    beta: float = 0.9
    trust: float = 1.0
    bits: dict[str, int] = field(default_factory=dict)
    momenta: dict[tuple[str, int], Momentum] = field(default_factory=dict)  # keyed by layer and the width it leaves

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
        """Update the momentum of each layer's next transition with its measured perturbation (>= 0)."""
        for layer, perturbation in perturbations.items():
            if self.narrower(layer) is None:
                continue
            price = max(perturbation, 0.0) / self.saved_bits(layer)
            self.momenta.setdefault((layer, self.bits[layer]), Momentum()).update(price, self.beta)

    def saved_bits(self, layer: str) -> int:
        """Return the bits that the layer's next transition saves, over all its weights; 0 at the narrowest width."""
        return self.num_weights[layer] * (self.bits[layer] - (self.narrower(layer) or self.bits[layer]))

    def price(self, layer: str, bits: int) -> float:
        """Return the expected price of the layer's transition down from `bits`."""
        return self.momentum(layer, bits).mean(self.beta)

    def momentum(self, layer: str, bits: int) -> Momentum:
        """Return the momentum of the layer's transition down from `bits`.

        Where it was not measured yet, the last measured one stands in, scaled as rounding noise is: four times the
        variance for each bit less.
        """
        if (layer, bits) in self.momenta:
            return self.momenta[layer, bits]
        wider = [width for width in self.bit_choices[::-1] if width > bits and (layer, width) in self.momenta]
        if not wider:
            return Momentum()
        known = self.momenta[layer, wider[0]]
        factor = 4.0 ** (wider[0] - bits)
        return Momentum(known.count, known.average * factor)

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
            "momenta": [[*key, value.count, value.average] for key, value in self.momenta.items()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.bits = dict(state["bits"])
        self.momenta = {(layer, bits): Momentum(*rest) for layer, bits, *rest in state["momenta"]}


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

    `perturbation(layer, bits)` is the layer's cost at a width, such as its relative weight error. The same controller
    and the same two stages as with data; rounds take the place of calibration batches.
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
