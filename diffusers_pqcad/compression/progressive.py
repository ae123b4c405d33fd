"""PQ, progressive quantization: two stages of bit transitions, chosen by a momentum of their prices.

Inspired by the abstract of PQCAD-DM (arXiv:2506.16776); the design is ours. Per round: measure what each layer's next
transition does to the model's output (price), let the controller choose the cheap ones, and carry them out with
block reconstruction.
"""

import copy
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_pqcad.compression.calibration import CalibrationSet, check_float32
from diffusers_pqcad.compression.checkpoint import (
    check_request,
    clone_state,
    copy_state_,
    load_checkpoint,
    save_checkpoint,
    write_text,
)
from diffusers_pqcad.compression.fake_quant import (
    RANGE_TRAJECTORIES,
    at_bits,
    bits_by_module,
    calibrate_activations_,
    fake_quant_layers,
    fake_quant_state,
    freeze_,
    latent_weight,
    load_fake_quant_state_,
    prepare_,
    set_bits_,
    weight_quantizer,
)
from diffusers_pqcad.compression.optimization import check_minimum
from diffusers_pqcad.compression.reconstruction import (
    ReconstructionConfig,
    UnitResult,
    capture_io,
    correct_biases_,
    execution_order,
    find_units,
    reconstruct,
)
from diffusers_pqcad.compression.sampling import denoise
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.loading.convert import match_modules, relative_weight_error, with_model_exemptions
from diffusers_pqcad.numerics.allocation import BitController, Move, stage_budgets
from diffusers_pqcad.numerics.qparams import WeightSpec

logger = logging.getLogger(__name__)

MIN_RECONSTRUCTION_SAMPLES = 8
WEIGHT_BITS = 4.0  # the average that PQ is meant for; loading without data needs more for the same images


@dataclass(frozen=True)
class ProgressiveConfig:
    """Settings of PQ; `beta=0` is PQ without momentum."""

    signal: Literal["output", "weight"] = "output"  # "weight" is the abstract's wording, and weaker
    beta: float = 0.9  # momentum of the prices
    trust: float = 1.0  # a round may at most double the perturbation (plus the floor)
    perturbation_floor: float = 1e-4  # of the output's power: what 8 bits cost anyway
    # A round's move may cost up to 1 + this times its prediction, or is rolled back, and other layers move in its
    # place. On digits with epsilon prediction 0.5 cost 1 dB (one seed, simulated: examples/results/method.md). With
    # infinity only a NaN is rolled back.
    roll_back_tolerance: float = math.inf
    cooldown: int = 2
    rounds_per_stage: int = 2  # planned; the trust region and roll-backs may take as many again
    price_batch_size: int = 16  # images of a round's prices
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    reconstruction_samples: int = 256
    round_share: float = 0.25  # of iterations and samples, where the bits will change again
    seed: int = 0

    def __post_init__(self) -> None:
        if self.signal not in ("output", "weight"):
            raise ValueError(f"signal: expected 'output' or 'weight', got {self.signal!r}.")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta: expected 0 (no momentum) to below 1, got {self.beta}.")
        check_minimum(self, trust=0, perturbation_floor=0, cooldown=0)
        check_minimum(self, rounds_per_stage=1, price_batch_size=1)
        check_minimum(self, reconstruction_samples=MIN_RECONSTRUCTION_SAMPLES)
        if not 0 < self.round_share <= 1:
            raise ValueError(f"round_share: expected a share above 0 and up to 1, got {self.round_share}.")

    def allowed(self, moves: Iterable[Move]) -> float:
        """Return how much the output's error may grow by `moves` before they are rolled back."""
        if math.isinf(self.roll_back_tolerance):  # also where a prediction is 0
            return self.roll_back_tolerance
        return (1 + self.roll_back_tolerance) * sum(move.predicted for move in moves)


@dataclass
class History:
    """What PQ did: `rounds` (bits, prices, momenta, moves, roll-backs of each), `units`, `summary`."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    units: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the history as JSON."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


Batch = tuple[Tensor, Tensor, Tensor, Tensor]  # states, timesteps, full-precision outputs, squared gains


@dataclass(frozen=True)
class Batches:
    """Seeded access to the batches of a calibration set."""

    calibration: CalibrationSet

    def draw(self, count: int, seed: int) -> Batch:
        """Return `count` random tuples: samples (n, C, H, W), timesteps (n,), outputs (n, C, H, W), weights (n,)."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randint(0, len(self.calibration), (count,), generator=generator)
        steps = torch.randint(0, self.calibration.num_inference_steps, (count,), generator=generator)
        return (
            self.calibration.trajectory[rows, steps],
            self.calibration.timestep[steps],
            self.calibration.model_output[rows, steps],
            self.calibration.gains()[steps].square(),
        )


def weighted_error(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the gain-weighted mean squared error: how far the errors move the samples."""
    return ((output - target).square().flatten(1).mean(dim=1) * weight).mean()


@torch.no_grad()
def output_error(model: nn.Module, batch: Batch, batch_size: int = 64) -> float:
    """Return the weighted error of `model` on a drawn batch."""
    sample, timestep, target, weight = batch
    outputs = [
        model(sample[start : start + batch_size], timestep[start : start + batch_size]).sample
        for start in range(0, len(sample), batch_size)
    ]
    return weighted_error(torch.cat(outputs), target, weight).item()


@torch.no_grad()
def sample_errors(model: nn.Module, calibration: CalibrationSet, num_inference_steps: int) -> Tensor:
    """Return ||z - z_fp||^2 / ||z_fp||^2 of each trajectory from its recorded noise, (steps, trajectories).

    At the ends of those steps of the model's grid that the recorded one shares; the last is the image.
    """
    stride = calibration.num_inference_steps // num_inference_steps
    reference = calibration.trajectory[:, ::stride]
    steps = denoise(model, calibration.scheduler(), calibration.trajectory[:, 0], num_inference_steps)
    errors = [
        (step.sample - reference[:, index]).flatten(1).square().sum(1) / reference[:, index].flatten(1).square().sum(1)
        for index, step in enumerate(steps)
    ]
    return torch.stack(errors[1:])


def geometric_mean(errors: Tensor) -> float:
    """Return the geometric mean of the `errors` (n,) of trajectories.

    A single one that ends in another image would decide an arithmetic mean alone, and so whether a state is kept that
    is worse everywhere else.
    """
    return errors.clamp(min=1e-30).log().mean().exp().item()


def trajectory_error(model: nn.Module, calibration: CalibrationSet, num_inference_steps: int) -> float:
    """Return the error of the held-out trajectories over all their steps: what decides which state is kept."""
    return geometric_mean(sample_errors(model, calibration, num_inference_steps).mean(0))


def image_error(model: nn.Module, calibration: CalibrationSet, num_inference_steps: int) -> float:
    """Return the error of the images in which the held-out trajectories end."""
    return geometric_mean(sample_errors(model, calibration, num_inference_steps)[-1])


@torch.no_grad()
def transition_prices(
    model: nn.Module, frozen: nn.Module, controller: BitController, batch: Batch
) -> dict[str, float]:
    """Return how far each layer's next transition moves the model's output (weighted squared distance).

    `frozen` is a copy of `model` with rounded weights (`freeze_`): a price takes one pass over the batch, and
    rounding all the other layers again in each would double its time.
    """
    sample, timestep, _, weight = batch
    layers = fake_quant_layers(model)
    before = frozen(sample, timestep).sample
    prices = {}
    for name in controller.movable(ignore_frozen=True):
        narrower = controller.narrower(name)
        assert narrower is not None
        rounded = frozen.get_parameter(f"{name}.weight")
        kept = rounded.clone()
        with at_bits(layers[name], narrower):
            rounded.copy_(layers[name].weight)
        after = frozen(sample, timestep).sample
        prices[name] = weighted_error(after, before, weight).item()
        rounded.copy_(kept)
    return prices


def weight_prices(reference: nn.Module, controller: BitController, group_size: int | None = None) -> dict[str, float]:
    """Return each layer's added relative weight error in its next transition: the abstract's signal."""
    prices = {}
    for name in controller.movable(ignore_frozen=True):
        layer, narrower = reference.get_submodule(name), controller.narrower(name)
        assert narrower is not None
        groups = group_size if isinstance(layer, nn.Linear) else None
        weight = reference.get_parameter(f"{name}.weight")
        after, before = (
            relative_weight_error(weight, WeightSpec(bits, groups)) for bits in (narrower, controller.bits[name])
        )
        prices[name] = after - before
    return prices


class ProgressiveQuantizer:
    """The run of one PQ: the model under quantization, its full-precision reference, the controller, the history."""

    def __init__(
        self, model: nn.Module, calibration: CalibrationSet, config: PQCADConfig, settings: ProgressiveConfig
    ) -> None:
        check_float32(model)
        calibration.check(model)
        config = with_model_exemptions(model, config)
        searched = match_modules(model, config)
        if not searched:
            raise ValueError(f"{type(model).__name__} has nothing to quantize.")
        if config.method == "fixed":  # one width everywhere; reconstruction as with any other
            config = replace(config, method="progressive", bit_choices=(int(config.weight_bits),))
        num_weights = {name: layer.weight.numel() for name, layer in searched.items()}
        self.controller = BitController(
            num_weights, config.bit_choices, settings.beta, settings.trust, settings.cooldown
        )
        self.controller.check_budget(config.weight_bits)
        self.model, self.config, self.settings = model, config, settings
        # A copy, because the latents move away from the original weights, which the targets need.
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        device = next(model.parameters()).device
        self.calibration = calibration.to(device)
        self.train_set, self.held_out = self.calibration.split()
        self.train, self.check = Batches(self.train_set), Batches(self.held_out)
        sample, timestep, *_ = self.train.draw(1, 0)
        unused = sorted(set(searched) - set(execution_order(model, searched, sample, timestep)))
        if unused:
            raise ValueError(f"{unused[0]}: the model never calls this layer; name it in modules_to_not_convert.")
        self.history = History()
        # Of each layer's next transition, as last measured: what it does to the output, and that for each bit saved.
        self.perturbations: dict[str, float] = {}
        self.prices: dict[str, float] = {}
        self.progress = {"stage": 0, "round": 0}
        self.request: dict[str, Any] = {}  # what a resume file must have been begun with
        prepare_(model, config, self.controller.bits)
        model.pqcad_source_hash = calibration.manifest["model_hash"]  # distill compares it
        model.eval()
        self.units = find_units(model)
        self.order = execution_order(model, self.units, sample, timestep)

    @property
    def budgets(self) -> tuple[float, ...]:
        """Average bits of the stages."""
        return stage_budgets(self.config.weight_bits, self.controller.bit_choices[0])

    def seed(self, *position: int) -> int:
        """Return a seed for one place of the run, so that a resumed run draws what an uninterrupted one would."""
        value = self.settings.seed
        for part in position:
            value = (value * 1_000_003 + part + 1) % (2**62)
        return value

    def unit_of(self, layer: str) -> str:
        """Return the unit that holds `layer`."""
        return next(unit for unit in self.order if layer == unit or layer.startswith(f"{unit}."))

    @property
    def num_check_samples(self) -> int:
        """Images that a whole-model measurement takes: it is made for every unit, a reconstruction's are used once."""
        return max(self.settings.reconstruction_samples // 8, 2)

    def held_out_batch(self, stage: int) -> Batch:
        """Return what the output error is measured on: the same batch throughout a stage, before and after a move."""
        return self.check.draw(self.num_check_samples, self.seed(2, stage))

    def observe(self, stage: int, round_index: int) -> None:
        """Update the momentum of every layer's price with this round's images."""
        if self.settings.signal == "weight":
            self.perturbations = weight_prices(self.reference, self.controller, self.config.group_size)
        else:
            frozen = freeze_(copy.deepcopy(self.model))
            batch = self.train.draw(self.settings.price_batch_size, self.seed(1, stage, round_index))
            self.perturbations = transition_prices(self.model, frozen, self.controller, batch)
        self.controller.observe(self.perturbations)
        saved = {name: self.controller.saved_bits(name) for name in self.perturbations}
        self.prices = {name: perturbation / saved[name] for name, perturbation in self.perturbations.items()}

    def move_units(
        self,
        moves: Iterable[Move],
        stage: int,
        round_index: int,
        *,
        may_roll_back: bool,
        share: float,
        units: Iterable[str] = (),
    ) -> list[str]:
        """Carry out `moves` unit by unit, in execution order, with reconstruction; return what was rolled back.

        `share` is that of the reconstruction's iterations and samples; `units` names further units to reconstruct
        although none of their layers moves.
        """
        settings = self.settings.reconstruction
        settings = replace(settings, iterations=math.ceil(share * settings.iterations))
        num_samples = max(MIN_RECONSTRUCTION_SAMPLES, round(share * self.settings.reconstruction_samples))
        by_unit: dict[str, list[Move]] = {name: [] for name in units}
        for move in moves:
            by_unit.setdefault(self.unit_of(move.layer), []).append(move)
        layers = fake_quant_layers(self.model)
        held_out = self.held_out_batch(stage)
        samples = self.train.draw(num_samples, self.seed(3, stage, round_index))
        error = output_error(self.model, held_out)
        rolled_back = []
        for name in sorted(by_unit, key=self.order.index):
            unit, unit_moves = self.units[name], by_unit[name]
            before, before_bits = clone_state(unit), {move.layer: move.from_bits for move in unit_moves}
            for move in unit_moves:
                set_bits_(layers[move.layer], move.to_bits)
            if settings.iterations:
                io = capture_io(self.model, self.reference, name, samples[0], samples[1], samples[3])
                seed = self.seed(4, stage, round_index)
                result = reconstruct(unit, io, settings, name=name, seed=seed)
                self.history.units.append(asdict(result) | {"stage": stage, "round": round_index})
            if not unit_moves:
                continue
            after = output_error(self.model, held_out)
            # "not <=": a NaN is rolled back too.
            if may_roll_back and not after - error <= self.settings.allowed(unit_moves):
                for move in unit_moves:
                    quantizer = weight_quantizer(layers[move.layer])
                    quantizer.spec = WeightSpec(before_bits[move.layer], quantizer.spec.group_size)
                    self.controller.roll_back(move, (after - error) / len(unit_moves))
                    rolled_back.append(move.layer)
                copy_state_(unit, before)
            else:
                error = after
        return rolled_back

    def record(self, stage: int, round_index: int, kind: str, moves: list[Move], rolled_back: list[str]) -> None:
        """Append one round to the history."""
        controller = self.controller
        error = output_error(self.model, self.held_out_batch(stage))
        self.history.rounds.append(
            {
                "stage": stage,
                "round": round_index,
                "kind": kind,
                "budget": self.budgets[stage],
                "average_bits": controller.average_bits(),
                "held_out_error": error,
                "moves": [asdict(move) for move in moves],
                "rolled_back": rolled_back,
                "bits": dict(controller.bits),
                "perturbation": self.perturbations,
                "price": self.prices,
                "momentum": {name: controller.priority(name) for name in controller.num_weights},
            }
        )

    def round(self, stage: int, round_index: int) -> bool:
        """Run one round; return whether the stage goes on."""
        controller, budget = self.controller, self.budgets[stage]
        if not controller.over(budget) or not controller.movable():
            return False
        self.observe(stage, round_index)
        held_out = self.held_out_batch(stage)
        power = (held_out[2].square().flatten(1).mean(dim=1) * held_out[3]).mean().item()
        perturbation = output_error(self.model, held_out) + self.settings.perturbation_floor * power
        if self.settings.signal == "weight":
            perturbation = math.inf  # another unit of measure; the trust region is the output's
        left = max(self.settings.rounds_per_stage - round_index, 1)
        moves = controller.propose(budget, rounds_left=left, perturbation=perturbation)
        controller.commit(moves)
        may_roll_back, share = self.settings.signal == "output", self.settings.round_share
        rolled_back = self.move_units(moves, stage, round_index, may_roll_back=may_roll_back, share=share)
        controller.end_round()
        self.record(stage, round_index, "round", moves, rolled_back)
        return True

    def force(self, stage: int) -> None:
        """Meet the stage's budget, whatever is frozen; in the last stage spend what is left of it."""
        controller, last = self.controller, stage == len(self.budgets) - 1
        if controller.over(self.budgets[stage]):
            self.observe(stage, 1_000)
        controller.forced_moves(self.budgets[stage])
        if last:
            controller.polish_moves(self.budgets[stage])
        before = bits_by_module(self.model)
        net = [
            Move(name, before[name], bits, controller.num_weights[name] * (before[name] - bits), 0.0)
            for name, bits in controller.bits.items()
            if bits != before[name]
        ]
        # Bits are final after the last stage: every unit is reconstructed once more, on the inputs it will see.
        units, share = (self.order, 1.0) if last else ((), self.settings.round_share)
        self.move_units(net, stage, 1_000, may_roll_back=False, share=share, units=units)
        self.record(stage, len(self.history.rounds), "forced", net, [])

    def correct_biases(self, stage: int) -> None:
        """Correct the layers' mean outputs; kept only if the held-out output error falls."""
        layers = fake_quant_layers(self.model)
        sample, timestep, *_ = self.train.draw(self.num_check_samples, self.seed(6, stage))
        held_out = self.held_out_batch(stage)
        before, error = clone_state(self.model), output_error(self.model, held_out)
        order = execution_order(self.model, layers, sample[:1], timestep[:1])
        correct_biases_(self.model, self.reference, order, sample, timestep)
        after = output_error(self.model, held_out)
        if not after < error:
            copy_state_(self.model, before)
        self.history.units.append(
            asdict(UnitResult("bias correction", error, after, after < error)) | {"stage": stage, "round": -1}
        )

    def calibrate_activations(self) -> None:
        """Set static activation ranges on the training trajectories; nothing to do for float activations."""
        trajectory = self.train_set.trajectory[:RANGE_TRAJECTORIES]
        steps = ((int(t), trajectory[:, index]) for index, t in enumerate(self.train_set.timestep))
        calibrate_activations_(self.model, steps)

    def save(self, path: Path | None) -> None:
        """Write the resume file."""
        if path is not None:
            state = {
                "model": fake_quant_state(self.model),
                "controller": self.controller.state_dict(),
                "history": asdict(self.history),
                "progress": self.progress,
                "perturbations": self.perturbations,
                "prices": self.prices,
                "request": json.dumps(self.request),
            }
            save_checkpoint(path, state)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the contents of a resume file."""
        load_fake_quant_state_(self.model, state["model"])
        self.controller.load_state_dict(state["controller"])
        self.history = History(**state["history"])
        self.progress, self.perturbations, self.prices = (
            state[key] for key in ("progress", "perturbations", "prices")
        )

    def run(self, path: Path | None = None, *, progress: bool = True) -> History:
        """Run all stages; `path` is where to write a resume file."""
        settings = self.settings
        total = len(self.budgets) * (settings.rounds_per_stage + 1)
        with tqdm(total=total, desc="PQ", disable=not progress) as bar:
            for stage in range(self.progress["stage"], len(self.budgets)):
                # A round that was rolled back whole changes nothing but the momentum, so rounds are bounded.
                for round_index in range(self.progress["round"], 2 * settings.rounds_per_stage):
                    if not self.round(stage, round_index):
                        break
                    bar.update()
                    bar.set_postfix(bits=f"{self.controller.average_bits():.2f}")
                    self.progress["round"] = round_index + 1
                    self.save(path)
                self.force(stage)
                self.correct_biases(stage)
                if stage + 1 == len(self.budgets):
                    self.calibrate_activations()
                bar.update()
                self.progress = {"stage": stage + 1, "round": 0}
                self.save(path)
        return self.history


def progressive_quantize(
    model: nn.Module,
    calibration: CalibrationSet,
    config: PQCADConfig | None = None,
    progressive: ProgressiveConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Quantize the full-precision `model` in place and return the history.

    `config` defaults to an average of WEIGHT_BITS bits: fewer than loading without data takes.
    Leaves the fake-quantized model with its latent weights: `distill` trains them, `convert_` turns a copy into packed
    layers. `checkpoint` names a resume file: the same call after a kill goes on from it. Deterministic under
    `progressive.seed`. Raises ValueError, with the model unchanged, for a calibration set of another model, a budget
    that cannot be met, weights that are not finite or not float32, a layer that the model never calls, or a resume
    file that was begun with other settings.
    """
    path = None if checkpoint is None else Path(checkpoint)
    state = load_checkpoint(path) if path is not None and path.exists() else None  # damaged: before the model changes
    settings = progressive or ProgressiveConfig()
    config = config or PQCADConfig(weight_bits=WEIGHT_BITS)
    request = {
        "config": with_model_exemptions(model, config).to_dict(),  # older versions searched other layers
        "settings": asdict(settings),
        "calibration": calibration.manifest | {"num_trajectories": len(calibration)},
        "num_inference_steps": calibration.num_inference_steps,
    }
    if path is not None and state is not None:
        check_request(path, state, request)
    run = ProgressiveQuantizer(model, calibration, config, settings)
    run.request = request
    if state is not None:
        run.load(state)
    history = run.run(path, progress=progress)
    originals = {name: run.reference.get_parameter(f"{name}.weight") for name in fake_quant_layers(model)}
    history.summary = {
        "average_bits": run.controller.average_bits(),
        "bits": dict(run.controller.bits),
        "trajectory_error": trajectory_error(model, run.held_out, calibration.num_inference_steps),
        "latent_shift": {
            name: ((latent_weight(layer) - originals[name]).norm() / originals[name].norm()).item()
            for name, layer in fake_quant_layers(model).items()
        },
    }
    return history
