"""What the momentum of prices is worth: fidelity of the allocation against the model evaluations that prices cost.

    python examples/experiments/controller.py --subjects digits digits-epsilon --seeds 0 1 2 3 4 5 6 7

The rounds of PQ without its training: weights are rounded to nearest, nothing is reconstructed or rolled back. So the
SQNR says how good the allocation is, and nothing else. Simulated: weights are fake-quantized, activations float.
Every row is a JSON of its own in --output_dir; a killed run goes on from there.
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from subjects import NUM_STEPS, TRAINED, cached, calibration_set, fidelity, file_name, parser_of, samples, teacher
from tqdm.auto import tqdm

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.fake_quant import at_bits, fake_quant_layers, freeze_, prepare_, set_bits_
from diffusers_pqcad.compression.progressive import output_error, transition_prices, weight_changes
from diffusers_pqcad.loading.convert import match_modules, with_model_exemptions
from diffusers_pqcad.numerics.allocation import BitController, Momentum, SensitivityController, stage_budgets

ROUNDS_PER_STAGE, PRICE_BATCHES = 2, 2
IMAGES_PER_PRICE = (1, 2, 4, 8, 32)


@dataclass
class PriceController(BitController):
    """A moving average of a transition's price: one for each layer and width, as the library had it."""

    beta: float = 0.9
    momenta: dict[tuple[str, int], Momentum] = field(default_factory=dict)

    def observe(self, perturbations: Mapping[str, float]) -> None:
        for layer, perturbation in perturbations.items():
            if self.narrower(layer) is not None:
                self.average(layer, max(perturbation, 0.0) / self.saved_bits(layer))

    def average(self, layer: str, price: float) -> None:
        key = layer, self.bits[layer]
        momentum = self.momenta.setdefault(key, Momentum())
        momentum.update(price, self.beta)
        self.prices[key] = momentum.mean(self.beta)


@dataclass
class LogSensitivityController(SensitivityController):
    """A moving average of the logarithm of a layer's sensitivity."""

    logs: dict[str, Momentum] = field(default_factory=dict)

    def observe(self, perturbations: Mapping[str, float]) -> None:
        for layer, perturbation in perturbations.items():
            if self.narrower(layer) is None:
                continue
            value = math.log(max(perturbation, 1e-20) / max(self.changes[layer, self.bits[layer]], 1e-30))
            momentum = self.logs.setdefault(layer, Momentum())
            momentum.update(value, self.beta)
            self.momenta[layer] = Momentum(1, (1 - self.beta) * math.exp(momentum.mean(self.beta)))


@dataclass
class LogController(PriceController):
    """A moving average of the logarithm of a transition's price."""

    def average(self, layer: str, price: float) -> None:
        key = layer, self.bits[layer]
        momentum = self.momenta.setdefault(key, Momentum())
        momentum.update(math.log(max(price, 1e-30)), self.beta)
        self.prices[key] = math.exp(momentum.mean(self.beta))


@dataclass
class DispersionController(PriceController):
    """A layer's priority is its average price plus `kappa` standard deviations of it: a noisy layer waits."""

    kappa: float = 1.0
    relative: bool = False  # the deviation as a share of the price: what a noisy layer's price is multiplied by
    deviations: dict[tuple[str, int], Momentum] = field(default_factory=dict)

    def observe(self, perturbations: Mapping[str, float]) -> None:
        super().observe(perturbations)
        for layer, perturbation in perturbations.items():
            if self.narrower(layer) is None:
                continue
            key, price = (layer, self.bits[layer]), max(perturbation, 0.0) / self.saved_bits(layer)
            squared = (price - self.price(layer, self.bits[layer])) ** 2
            self.deviations.setdefault(key, Momentum()).update(squared, self.beta)

    def priority(self, layer: str) -> float:
        key = layer, self.bits[layer]
        deviation = math.sqrt(self.deviations[key].mean(self.beta)) if key in self.deviations else 0.0
        price = super().priority(layer)
        return (
            price * (1 + self.kappa * min(deviation / max(price, 1e-30), 1))
            if self.relative
            else (price + self.kappa * deviation)
        )


@dataclass
class Solver(BitController):
    """No rounds: the error of each layer at each width is measured alone, and an integer program shares out the bits.

    The smallest sum of errors under the budget, an upper bound for any order of moves as long as errors add up.
    """

    def solve(self, errors: Mapping[tuple[str, int], float], budget: float) -> None:
        """Set the bits that `errors` (by layer and width) and the `budget` of average bits ask for."""
        keys = list(errors)
        sizes = np.array([self.num_weights[layer] * bits for layer, bits in keys], dtype=float)
        once = np.array([[float(layer == name) for layer, _ in keys] for name in self.num_weights])
        total = sum(self.num_weights.values())
        # In units of the largest error and of all weights: the solver's tolerances are absolute.
        cost = np.array([errors[key] for key in keys])
        found = milp(
            cost / cost.max(),
            constraints=[LinearConstraint(once, 1, 1), LinearConstraint(sizes / total, ub=budget)],
            integrality=np.ones(len(keys)),
            bounds=Bounds(0, 1),
        )
        if found.x is None:
            raise ValueError(f"no allocation meets an average of {budget} bits: {found.message}")
        self.bits = {layer: bits for (layer, bits), chosen in zip(keys, found.x, strict=True) if chosen > 0.5}


# Arms: the class, its settings, and whether a round's batches are one price (no memory) or an observation each.
ARMS: dict[str, tuple[type[BitController], dict[str, Any], bool]] = {
    "no momentum": (BitController, {}, True),
    "momentum": (PriceController, {"beta": 0.9}, False),
    "momentum, dispersion 1": (DispersionController, {"beta": 0.9, "kappa": 1.0}, False),
    "momentum, dispersion 0.3": (DispersionController, {"beta": 0.9, "kappa": 0.3}, False),
    "momentum of logarithms": (LogController, {"beta": 0.9}, False),
    "sensitivity, no momentum": (SensitivityController, {"beta": 0.0}, True),
    "sensitivity, momentum": (SensitivityController, {"beta": 0.9}, False),
    "sensitivity, momentum of logarithms": (LogSensitivityController, {"beta": 0.9}, False),
    "average of all rounds": (PriceController, {"beta": 0.999}, False),
    "momentum, relative dispersion": (DispersionController, {"beta": 0.9, "relative": True}, False),
    "solver": (Solver, {}, True),
}


def solve(
    model: torch.nn.Module, calibration: CalibrationSet, controller: Solver, budget: float, images: int, seed: int
) -> int:
    """Share out the bits of a prepared `model` by `Solver`, in place; return the model evaluations (images)."""
    layers = fake_quant_layers(model)
    calls = calibration.draw(PRICE_BATCHES * images, seed * 1_000)
    frozen, errors = freeze_(copy.deepcopy(model)), {}
    denoiser = calibration.denoiser(frozen)
    for name, layer in layers.items():
        rounded = frozen.get_parameter(f"{name}.weight")
        kept = rounded.clone()
        for bits in controller.bit_choices:
            with at_bits(layer, bits):
                rounded.copy_(layer.weight)
            errors[name, bits] = output_error(denoiser, calls)
        rounded.copy_(kept)
    controller.solve(errors, budget)
    for name, bits in controller.bits.items():
        set_bits_(layers[name], bits)
    return len(calls.step) * len(errors)


def allocation(
    model: torch.nn.Module,
    calibration: CalibrationSet,
    controller: BitController,
    budget: float,
    images: int,
    seed: int,
    one: bool,
) -> int:
    """Run the rounds of PQ on a prepared `model`, in place; return the model evaluations that prices cost (images)."""
    layers, evaluations, draws = fake_quant_layers(model), 0, seed * 1_000
    for stage_budget in stage_budgets(budget, controller.bit_choices[0]):
        for round_index in range(ROUNDS_PER_STAGE + 1):
            last = round_index == ROUNDS_PER_STAGE
            if not controller.over(stage_budget):
                break
            sizes = [PRICE_BATCHES * images] if one else [images] * PRICE_BATCHES
            batches = [calibration.draw(size, draws + index) for index, size in enumerate(sizes)]
            draws += PRICE_BATCHES
            evaluations += sum(sizes) * (1 + len(controller.movable()))
            frozen = calibration.denoiser(freeze_(copy.deepcopy(model)))
            for batch in batches:
                controller.observe(transition_prices(model, frozen, controller, batch))
            if last:
                controller.forced_moves(stage_budget)
            else:
                controller.commit(controller.propose(stage_budget, rounds_left=ROUNDS_PER_STAGE - round_index))
            for name, bits in controller.bits.items():
                set_bits_(layers[name], bits)
    controller.polish_moves(budget)
    for name, bits in controller.bits.items():
        set_bits_(layers[name], bits)
    return evaluations


def row(subject: str, seed: int, arm: str, images: int, budget: float, context: dict[str, Any]) -> dict[str, Any]:
    """Return what one arm came to: evaluations, bits, SQNR of the images."""
    pipeline, calibration, wanted = context["pipeline"], context["calibration"], context["wanted"]
    kind, settings, one = ARMS[arm]
    config = with_model_exemptions(pipeline.unet, PQCADConfig(weight_bits=budget, activation_bits=None))
    searched = match_modules(pipeline.unet, config)
    if issubclass(kind, SensitivityController):
        settings = settings | {"changes": context["changes"]}
    controller = kind({name: layer.weight.numel() for name, layer in searched.items()}, config.bit_choices, **settings)
    model = prepare_(copy.deepcopy(pipeline.unet), config, controller.bits).eval()
    with torch.no_grad():
        if isinstance(controller, Solver):
            cost = solve(model, calibration, controller, budget, images, seed)
        else:
            cost = allocation(model, calibration, controller, budget, images, seed, one)
    found = samples(freeze_(model), pipeline.scheduler, len(wanted), NUM_STEPS, seed)
    quality = fidelity(wanted, found)
    quality.pop("images")
    return {
        "subject": subject, "seed": seed, "arm": arm, "images_per_price": images, "budget": budget,
        "evaluations": cost, "average_bits": controller.average_bits(), **quality,
    }  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Measure every row that is not there yet."""
    parser = parser_of(__doc__, "controller")
    parser.set_defaults(subjects=list(TRAINED))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(range(8)))
    parser.add_argument("--budgets", nargs="+", type=float, default=[4.0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--images", nargs="+", type=int, default=list(IMAGES_PER_PRICE))
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    keys = [
        (subject, seed, arm, images, budget)
        for seed in args.seeds
        for subject in args.subjects
        for budget in args.budgets
        for images in args.images
        for arm in args.arms
    ]
    context: dict[str, Any] = {}
    for subject, seed, arm, images, budget in tqdm(keys, desc="controller", unit="run"):
        path = args.output_dir / file_name(subject, seed, arm, images, f"{budget:g}")
        if not path.exists() and context.get("key") != (subject, seed):
            pipeline = teacher(subject, seed)
            context = {
                "key": (subject, seed),
                "pipeline": pipeline,
                "calibration": calibration_set(pipeline, seed),
                "wanted": samples(pipeline.unet, pipeline.scheduler, args.num_images, NUM_STEPS, seed),
                "changes": weight_changes(match_modules(pipeline.unet, PQCADConfig()), PQCADConfig().bit_choices),
            }
        cached(path, row, subject, seed, arm, images, budget, context)


if __name__ == "__main__":
    main()
