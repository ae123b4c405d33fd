"""PQ, progressive quantization: two stages of bit transitions, chosen by a momentum of their prices.

Inspired by the abstract of PQCAD-DM (arXiv:2506.16776); the design is ours. Per round: measure what each layer's next
transition does to the model's output (price), let the controller choose the cheap ones, and carry them out with
block reconstruction.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import IntEnum
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_pqcad.compression.calibration import CalibrationSet, Calls, check_float32
from diffusers_pqcad.compression.checkpoint import (
    check_request,
    load_checkpoint,
    plain_settings,
    save_checkpoint,
    write_text,
)
from diffusers_pqcad.compression.denoiser import Denoiser, states_of
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
)
from diffusers_pqcad.compression.offload import (
    Store,
    offloaded,
    release_,
    sharing_copy,
    store_in,
    waiting_copy,
)
from diffusers_pqcad.compression.optimization import check_minimum
from diffusers_pqcad.compression.precision import DTYPES, MixedPrecision, check_mixed_precision
from diffusers_pqcad.compression.processes import agreed, copy_from_main_, divided, each, on_main, read_together
from diffusers_pqcad.compression.reconstruction import (
    Pass,
    ReconstructionConfig,
    UnitResult,
    capture_io,
    correct_biases_,
    execution_order,
    find_units,
    reconstruct,
)
from diffusers_pqcad.compression.stopping import asked_to_stop, stop_where_asked
from diffusers_pqcad.layers.find import layer_of
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.loading.convert import match_modules, relative_weight_error, with_model_exemptions
from diffusers_pqcad.numerics.allocation import BitController, Move, SensitivityController, stage_budgets
from diffusers_pqcad.numerics.qparams import WeightSpec, fake_quantize_weight, min_max_weight_scale

MIN_RECONSTRUCTION_SAMPLES = 8
BATCH_SIZE = 64  # images of one pass, where nothing is trained; as many rows again for each branch of guidance
WEIGHT_BITS = 4.0  # the average that PQ is meant for; loading without data needs more for the same images
END_OF_STAGE = 1_000  # the round of what follows a stage's own rounds


class Stream(IntEnum):
    """What a run draws at random; each has seeds of its own. A resumed run depends on the numbers."""

    PRICES = 1
    HELD_OUT = 2
    SAMPLES = 3
    RECONSTRUCTION = 4
    BIASES = 6
    PRICED_LAYERS = 7


@dataclass(frozen=True)
class ProgressiveConfig:
    """Settings of PQ; `beta=0` is PQ without momentum.

    What they are worth, in the median image of two small models at 4 bits, three seeds each, simulated
    (examples/results/method.md): adaptive widths 4.0 and 4.6 dB against one width; two stages nothing against one with
    as many rounds; `signal="weight"` costs 10 dB. The momentum is worth 0.7 and 0.9 dB where a price is measured from
    one image or two (eight seeds of two smaller models, nothing reconstructed); from this class's 16, and after the
    reconstruction, nothing that could be measured, or less: 1.7 dB of one model's mean against a momentum of prices.
    """

    signal: Literal["output", "weight"] = field(
        default="output",
        metadata={"help": "what a transition's price is measured by; 'weight' is the abstract's wording, and weaker"},
    )
    beta: float = field(
        default=0.9, metadata={"help": "momentum of the layers' sensitivities; 0: PQ without momentum"}
    )
    trust: float = field(
        default=1.0,
        metadata={"help": "how much a round may add to the perturbation (plus the floor); 1: it may double it"},
    )
    perturbation_floor: float = field(
        default=1e-4,
        metadata={
            "help": "added to the perturbation that `trust` doubles; of the output's power: what 8 bits cost anyway"
        },
    )
    rounds_per_stage: int = field(
        default=2,
        metadata={"help": "planned rounds of each stage; the trust region may take as many again"},
    )
    price_share: float = field(
        default=1.0,
        metadata={
            "help": "share of the layers whose prices a round measures, one pass each over price_batch_size images; "
            "the others keep their momentum's; those never measured are measured first"
        },
    )
    price_batch_size: int = field(default=16, metadata={"help": "images of a round's price measurements"})
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    reconstruction_samples: int = field(
        default=256,
        metadata={"help": "images that a unit's reconstruction draws; the whole model's checks take an eighth"},
    )
    round_share: float = field(
        default=0.25,
        metadata={"help": "share of a reconstruction's iterations and samples where the bits will change again"},
    )
    mixed_precision: MixedPrecision = "no"
    seed: int = field(default=42, metadata={"help": "seed of all draws"})

    def __post_init__(self) -> None:
        if self.signal not in ("output", "weight"):
            raise ValueError(f"signal: expected 'output' or 'weight', got {self.signal!r}.")
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta: expected 0 (no momentum) to below 1, got {self.beta}.")
        check_mixed_precision(self.mixed_precision)
        check_minimum(self, trust=0, perturbation_floor=0)
        check_minimum(self, rounds_per_stage=1, price_batch_size=1)
        check_minimum(self, reconstruction_samples=MIN_RECONSTRUCTION_SAMPLES)
        for name in ("round_share", "price_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected a share above 0 and up to 1, got {getattr(self, name)}.")


@dataclass
class History:
    """What PQ did: `rounds` (bits, prices, momenta, moves of each), `units`, `summary`."""

    rounds: list[dict[str, Any]] = field(default_factory=list)
    units: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | Path) -> None:
        """Write the history as JSON."""
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def weighted_error(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the gain-weighted mean squared error: how far the errors move the samples."""
    return ((output - target).square().flatten(1).mean(dim=1) * weight).mean()


@torch.no_grad()
def output_error(denoiser: Denoiser, calls: Calls, batch_size: int = BATCH_SIZE) -> float:
    """Return the weighted error of `denoiser` on drawn calls."""

    def output(rows: Tensor) -> Tensor:
        part = calls.rows(rows)
        return denoiser(part.state, part.timestep, part.condition)

    outputs = each(torch.arange(len(calls.step)).split(batch_size), output, calls.output.device)
    return agreed(weighted_error(torch.cat(outputs), calls.output, calls.weight).item())


@torch.no_grad()
def sample_errors(
    model: nn.Module, calibration: CalibrationSet, num_inference_steps: int, batch_size: int = BATCH_SIZE
) -> Tensor:
    """Return ||z - z_fp||^2 / ||z_fp||^2 of each trajectory from its recorded noise, (steps, trajectories).

    At the ends of those steps of the model's grid that the recorded one shares; the last is the image.
    """
    stride = calibration.num_inference_steps // num_inference_steps
    denoiser, grid = calibration.denoiser(model), calibration.grid().every(stride)

    def errors(start: int) -> Tensor:
        part = calibration.select(slice(start, start + batch_size))
        reference = part.trajectory[:, ::stride]
        states = states_of(denoiser, grid, reference[:, 0], part.condition_at(stride))
        found = torch.stack(states[1:], dim=1)
        wanted = reference[:, 1:]
        return (found - wanted).flatten(2).square().sum(2) / wanted.flatten(2).square().sum(2)

    return torch.cat(each(range(0, len(calibration), batch_size), errors, calibration.device)).T


def geometric_mean(errors: Tensor) -> float:
    """Return the geometric mean of the `errors` (n,) of trajectories.

    A single one that ends in another image would decide an arithmetic mean alone, and so whether a state is kept that
    is worse everywhere else.
    """
    return errors.clamp(min=1e-30).log().mean().exp().item()


def trajectory_error(model: nn.Module, calibration: CalibrationSet, num_inference_steps: int) -> float:
    """Return the error of the held-out trajectories over all their steps: what decides which state is kept."""
    return agreed(geometric_mean(sample_errors(model, calibration, num_inference_steps).mean(0)))


def image_error(model: nn.Module, calibration: CalibrationSet, num_inference_steps: int) -> float:
    """Return the error of the images in which the held-out trajectories end."""
    return agreed(geometric_mean(sample_errors(model, calibration, num_inference_steps)[-1]))


@torch.no_grad()
def transition_prices(
    model: nn.Module, frozen: Denoiser, controller: BitController, calls: Calls, names: Iterable[str] | None = None
) -> dict[str, float]:
    """Return how far each layer's next transition moves the model's output (weighted squared distance).

    Of the layers `names`, by default of all that can move.

    `frozen` calls a copy of `model` with rounded weights (`freeze_`): a price takes one pass over the calls, and
    rounding all the other layers again in each would double its time.
    """
    layers = fake_quant_layers(model)
    before = frozen(calls.state, calls.timestep, calls.condition)
    prices = {}
    for name in controller.movable() if names is None else names:
        narrower = controller.narrower(name)
        assert narrower is not None
        rounded = layer_of(frozen.model, name).get_parameter("weight")
        kept = rounded.clone()
        with at_bits(layers[name], narrower):
            rounded.copy_(layers[name].weight)
        after = frozen(calls.state, calls.timestep, calls.condition)
        prices[name] = weighted_error(after, before, calls.weight).item()
        rounded.copy_(kept)
    return prices


def weight_prices(reference: nn.Module, controller: BitController, group_size: int | None = None) -> dict[str, float]:
    """Return each layer's added relative weight error in its next transition: the abstract's signal."""
    prices = {}
    for name in controller.movable():
        layer, narrower = layer_of(reference, name), controller.narrower(name)
        assert narrower is not None
        groups = group_size if isinstance(layer, nn.Linear) else None
        weight = layer.get_parameter("weight")
        after, before = (
            relative_weight_error(weight, WeightSpec(bits, groups)) for bits in (narrower, controller.bits[name])
        )
        prices[name] = after - before
    return prices


@torch.no_grad()
def weight_changes(
    layers: Mapping[str, nn.Module], bit_choices: Sequence[int], group_size: int | None = None
) -> dict[tuple[str, int], float]:
    """Return ||Q_b'(W) - Q_b(W)||^2 of each layer's transition from b to the next narrower b', by (layer, b).

    Min-max scales, as transitions have; `group_size` is that of Linear layers. Raises ValueError, naming the layer,
    for weights that are not finite.
    """
    changes, widths = {}, sorted(bit_choices, reverse=True)
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        specs = [WeightSpec(bits, group_size if isinstance(layer, nn.Linear) else None) for bits in widths]
        try:
            rounded = [fake_quantize_weight(weight, min_max_weight_scale(weight, spec), spec) for spec in specs]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        for wide, (before, after) in zip(widths, pairwise(rounded), strict=False):
            changes[name, wide] = (after - before).square().sum().item()
    return changes


def passes_of(denoiser: Denoiser, calls: Calls) -> list[Pass]:
    """Return the model calls of a step with drawn `calls`, for any model that `denoiser` could call."""

    def run(index: int, model: nn.Module, rows: Tensor) -> Any:
        part = calls.rows(rows)
        return replace(denoiser, model=model).call(index, part.state, part.timestep, part.condition)

    return [Pass(partial(run, index), branches) for index, branches in enumerate(denoiser.plan.branches)]


class ProgressiveQuantizer:
    """The run of one PQ: the model under quantization, its full-precision reference, the controller, the history.

    With a `store`, the reference, the copy that prices are measured with and the captured inputs lie there.
    """

    def __init__(
        self,
        model: nn.Module,
        calibration: CalibrationSet,
        config: PQCADConfig,
        settings: ProgressiveConfig,
        store: Store | None = None,
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
        self.controller = SensitivityController(
            num_weights,
            config.bit_choices,
            settings.trust,
            changes=weight_changes(searched, config.bit_choices, config.group_size),
            beta=settings.beta,
        )
        self.controller.check_budget(config.weight_bits)
        self.model, self.config, self.settings, self.store = model, config, settings, store
        # A copy, because the latents move away from the original weights, which the targets need.
        self.reference = waiting_copy(model, store, DTYPES[settings.mixed_precision])
        device = next(model.parameters()).device
        self.calibration = calibration.to(device)
        self.train_set, self.held_out = self.calibration.split()
        self.denoiser = self.calibration.denoiser(model)
        unused = sorted(set(searched) - set(self.execution_order(searched)))
        if unused:
            raise ValueError(f"{unused[0]}: the model never calls this layer; name it in modules_to_not_convert.")
        self.history = History()
        # Of each layer's next transition, as last measured: what it does to the output, and that for each bit saved.
        self.perturbations: dict[str, float] = {}
        self.prices: dict[str, float] = {}
        self.progress = {"stage": 0, "round": 0}
        # Of a round that was stopped half-way: its kind, its moves, and the units that have been through them.
        self.begun: dict[str, Any] | None = None
        self.path: Path | None = None  # of the resume file
        self.shows_progress = False
        self.on_round: Callable[[int, dict[str, Any]], None] = lambda count, entry: None
        self.request: dict[str, Any] = {}  # what a resume file must have been begun with
        prepare_(model, config, self.controller.bits)
        model.pqcad_source_hash = calibration.manifest["model_hash"]  # distill compares it
        model.eval()
        self.units = find_units(model)
        self.order = self.execution_order(self.units)

    @property
    def budgets(self) -> tuple[float, ...]:
        """Average bits of the stages."""
        return stage_budgets(self.config.weight_bits, self.controller.bit_choices[0])

    def seed(self, stream: Stream, *position: int) -> int:
        """Return a seed for one place of the run, so that a resumed run draws what an uninterrupted one would."""
        value = self.settings.seed
        for part in (stream, *position):
            value = (value * 1_000_003 + part + 1) % (2**62)
        return value

    def unit_of(self, layer: str) -> str:
        """Return the unit that holds `layer`."""
        return next(unit for unit in self.order if layer == unit or layer.startswith(f"{unit}."))

    def execution_order(self, modules: Mapping[str, nn.Module]) -> list[str]:
        """Return the names of `modules`, parts of the model, as one of its steps calls them."""
        calls = self.train_set.draw(1, 0)
        return execution_order(modules, lambda: self.denoiser(calls.state, calls.timestep, calls.condition))

    @property
    def num_check_samples(self) -> int:
        """Images that a whole-model measurement takes: it is made for every unit, a reconstruction's are used once."""
        return max(self.settings.reconstruction_samples // 8, 2)

    def held_out_calls(self, stage: int) -> Calls:
        """Return what the output error is measured on: the same calls throughout a stage, before and after a move."""
        return self.held_out.draw(self.num_check_samples, self.seed(Stream.HELD_OUT, stage))

    def observe(self, stage: int, round_index: int) -> None:
        """Update the momentum of every layer's price with this round's images."""
        if self.settings.signal == "weight":
            self.perturbations = weight_prices(self.reference, self.controller, self.config.group_size)
        else:
            frozen = self.calibration.denoiser(self.frozen())
            calls = self.train_set.draw(self.settings.price_batch_size, self.seed(Stream.PRICES, stage, round_index))
            layers = self.priced_layers(stage, round_index)

            def prices(names: Iterable[str]) -> Iterable[float]:
                shown = self.bar(list(names), "prices", "layer")
                return transition_prices(self.model, frozen, self.controller, calls, shown).values()

            self.perturbations = dict(zip(layers, divided(layers, prices), strict=True))
        self.controller.observe(self.perturbations)
        saved = {name: self.controller.saved_bits(name) for name in self.perturbations}
        self.prices = {name: perturbation / saved[name] for name, perturbation in self.perturbations.items()}

    def frozen(self) -> nn.Module:
        """Return a copy of the model with rounded weights; all else of it is in the model's memory."""
        frozen = freeze_(sharing_copy(self.model), self.store)
        release_(list(self.model.parameters()))
        return frozen

    def bar(self, names: list[str], description: str, unit: str) -> tqdm:
        """Return `names`, with a progress bar that goes when they end: each takes a pass of the model, or many."""
        return tqdm(names, desc=description, unit=unit, leave=False, disable=not self.shows_progress)

    def priced_layers(self, stage: int, round_index: int) -> list[str]:
        """Return the layers whose prices a round measures: all of which none is known, and a share of the others."""
        movable = self.controller.movable()
        known = [name for name in movable if self.controller.price(name, self.controller.bits[name]) > 0]
        count = math.ceil(self.settings.price_share * len(movable)) - (len(movable) - len(known))
        generator = torch.Generator().manual_seed(self.seed(Stream.PRICED_LAYERS, stage, round_index))
        order = torch.randperm(len(known), generator=generator).tolist()
        skipped = {known[index] for index in order[max(count, 0) :]}
        return [name for name in movable if name not in skipped]

    def move_units(
        self,
        moves: Sequence[Move],
        stage: int,
        round_index: int,
        *,
        kind: str = "round",
        share: float,
        units: Iterable[str] = (),
    ) -> None:
        """Carry out the `moves` of a `kind` of round, unit by unit in execution order, with reconstruction.

        `share` is that of the reconstruction's iterations and samples; `units` names further units to reconstruct
        although none of their layers moves. Where the process is asked to stop, the resume file is written after a
        unit, and Stopped raised; those that were done are left out then.
        """
        done = [] if self.begun is None else self.begun["units"]
        begun, self.begun = {"kind": kind, "moves": [asdict(move) for move in moves], "units": done}, None
        settings = self.settings.reconstruction
        settings = replace(settings, iterations=math.ceil(share * settings.iterations))
        num_samples = max(MIN_RECONSTRUCTION_SAMPLES, round(share * self.settings.reconstruction_samples))
        by_unit: dict[str, list[Move]] = {name: [] for name in units}
        for move in moves:
            by_unit.setdefault(self.unit_of(move.layer), []).append(move)
        layers = fake_quant_layers(self.model)
        samples = self.train_set.draw(num_samples, self.seed(Stream.SAMPLES, stage, round_index))
        passes = passes_of(self.denoiser, samples)
        left = [name for name in sorted(by_unit, key=self.order.index) if name not in done]
        bar = self.bar(left, "reconstruction", "unit")
        for name in bar:
            unit = self.units[name]
            for move in by_unit[name]:
                set_bits_(layers[move.layer], move.to_bits)
            if settings.iterations:
                io = capture_io(self.model, self.reference, name, passes, samples.weight, store=self.store)
                seed = self.seed(Stream.RECONSTRUCTION, stage, round_index)
                precision = self.settings.mixed_precision
                result = reconstruct(unit, io, settings, name=name, seed=seed, mixed_precision=precision)
                bar.set_postfix(loss=f"{result.loss_before:.1e} to {result.loss_after:.1e}")
                self.history.units.append(asdict(result) | {"stage": stage, "round": round_index})
            done.append(name)
            if asked_to_stop() is not None:
                self.begun = begun
                self.save(self.path)
                stop_where_asked()

    def begun_moves(self, kind: str) -> list[Move] | None:
        """Return the moves of a round that was stopped half-way; None where there is none of this `kind`."""
        if self.begun is None or self.begun["kind"] != kind:
            return None
        return [Move(**move) for move in self.begun["moves"]]

    def record(self, stage: int, round_index: int, kind: str, moves: list[Move]) -> None:
        """Append one round to the history, and tell of it."""
        controller = self.controller
        error = output_error(self.denoiser, self.held_out_calls(stage))
        self.history.rounds.append(
            {
                "stage": stage,
                "round": round_index,
                "kind": kind,
                "budget": self.budgets[stage],
                "average_bits": controller.average_bits(),
                "held_out_error": error,
                "moves": [asdict(move) for move in moves],
                "bits": dict(controller.bits),
                "perturbation": self.perturbations,
                "price": self.prices,
                "momentum": {name: controller.priority(name) for name in controller.num_weights},
            }
        )
        self.on_round(len(self.history.rounds), self.history.rounds[-1])

    def chosen_moves(self, stage: int, round_index: int) -> list[Move] | None:
        """Return the moves of a round, which the controller has made; None where the stage is over."""
        controller, budget = self.controller, self.budgets[stage]
        if not controller.over(budget) or not controller.movable():
            return None
        self.observe(stage, round_index)
        held_out = self.held_out_calls(stage)
        power = (held_out.output.square().flatten(1).mean(dim=1) * held_out.weight).mean().item()
        perturbation = output_error(self.denoiser, held_out) + self.settings.perturbation_floor * power
        if self.settings.signal == "weight":
            perturbation = math.inf  # another unit of measure; the trust region is the output's
        left = max(self.settings.rounds_per_stage - round_index, 1)
        moves = controller.propose(budget, rounds_left=left, perturbation=perturbation)
        controller.commit(moves)
        return moves

    def round(self, stage: int, round_index: int) -> bool:
        """Run one round, or what is left of it; return whether the stage goes on."""
        moves = self.begun_moves("round")
        if self.begun is None:
            moves = self.chosen_moves(stage, round_index)
        if moves is None:
            return False
        self.move_units(moves, stage, round_index, kind="round", share=self.settings.round_share)
        self.record(stage, round_index, "round", moves)
        return True

    def final_moves(self, stage: int) -> list[Move]:
        """Return the moves that meet the stage's budget, whatever they cost, and in the last stage spend all of it."""
        controller = self.controller
        if controller.over(self.budgets[stage]):
            self.observe(stage, END_OF_STAGE)
        controller.forced_moves(self.budgets[stage])
        if stage == len(self.budgets) - 1:
            controller.polish_moves(self.budgets[stage])
        before = bits_by_module(self.model)
        return [
            Move(name, before[name], bits, controller.num_weights[name] * (before[name] - bits), 0.0)
            for name, bits in controller.bits.items()
            if bits != before[name]
        ]

    def force(self, stage: int) -> None:
        """Meet the stage's budget, whatever a move costs; in the last stage spend what is left of it."""
        moves = self.begun_moves("forced")
        if moves is None:
            moves = self.final_moves(stage)
        # Bits are final after the last stage: every unit is reconstructed once more, on the inputs it will see.
        last = stage == len(self.budgets) - 1
        units, share = (self.order, 1.0) if last else ((), self.settings.round_share)
        self.move_units(moves, stage, END_OF_STAGE, kind="forced", share=share, units=units)
        self.record(stage, len(self.history.rounds), "forced", moves)

    def correct_biases(self, stage: int) -> None:
        """Correct the layers' mean outputs; kept only if the held-out output error falls."""
        layers = fake_quant_layers(self.model)
        calls = self.train_set.draw(self.num_check_samples, self.seed(Stream.BIASES, stage))
        held_out = self.held_out_calls(stage)
        biases = [layer.get_parameter("bias") for layer in layers.values() if layer.bias is not None]
        before, error = [bias.detach().clone() for bias in biases], output_error(self.denoiser, held_out)
        first = passes_of(self.denoiser, calls)[0]  # a step's other calls, where there are any, differ by the prompt
        rows = torch.arange(len(calls.step))
        order = self.execution_order(layers)
        correct_biases_(self.model, self.reference, order, lambda model: first.run(model, rows))
        after = output_error(self.denoiser, held_out)
        if not after < error:
            for bias, value in zip(biases, before, strict=True):
                bias.data.copy_(value)
        self.history.units.append(
            asdict(UnitResult("bias correction", error, after, after < error))
            | {"stage": stage, "round": END_OF_STAGE}
        )

    def calibrate_activations(self) -> None:
        """Set static activation ranges on the training trajectories; nothing to do for float activations."""
        train = self.train_set.select(slice(0, RANGE_TRAJECTORIES))
        rows = torch.arange(len(train))

        def run(step: int) -> Any:
            calls = train.calls(rows, torch.full_like(rows, step))
            return self.denoiser(calls.state, calls.timestep, calls.condition)

        steps = ((t, partial(run, step)) for step, t in enumerate(train.timestep.tolist()))
        calibrate_activations_(self.model, steps)

    def save(self, path: Path | None) -> None:
        """Write the resume file; in all processes, the model is that of the main one from then on."""
        copy_from_main_(self.model)
        if path is not None:
            state = {
                "model": fake_quant_state(self.model),
                "controller": self.controller.state_dict(),
                "history": asdict(self.history),
                "progress": self.progress,
                "perturbations": self.perturbations,
                "prices": self.prices,
                "begun": self.begun,
                "request": json.dumps(self.request),
            }
            on_main(save_checkpoint, path, state)
            release_(list(self.model.parameters()))

    def load(self, state: dict[str, Any]) -> None:
        """Go on from the contents of a resume file."""
        load_fake_quant_state_(self.model, state["model"])
        self.controller.load_state_dict(state["controller"])
        self.history = History(**state["history"])
        self.progress, self.perturbations, self.prices = (
            state[key] for key in ("progress", "perturbations", "prices")
        )
        self.begun = state.get("begun")  # older versions have whole rounds alone

    def show(self, bar: tqdm, position: int) -> None:
        """Move the bar of the stages, and show the bits so far and what they cost on held-out trajectories."""
        error = self.history.rounds[-1]["held_out_error"] if self.history.rounds else 0.0
        bar.set_postfix(bits=f"{self.controller.average_bits():.2f}", error=f"{error:.1e}", refresh=False)
        bar.update(position - bar.n)

    def run(self, path: Path | None = None, *, progress: bool = True) -> History:
        """Run all stages; `path` is where to write a resume file."""
        settings, self.shows_progress, self.path = self.settings, progress, path
        each, stages = settings.rounds_per_stage + 1, len(self.budgets)  # its rounds, if it takes all, and its end
        begun = min(self.progress["round"], each - 1)
        with tqdm(
            desc="PQ", total=stages * each, initial=self.progress["stage"] * each + begun, unit="round",
            disable=not progress,
        ) as bar:  # fmt: skip
            for stage in range(self.progress["stage"], stages):
                bar.set_description(f"PQ, stage {stage + 1} of {stages}")
                for round_index in range(self.progress["round"], 2 * settings.rounds_per_stage):
                    if not self.round(stage, round_index):
                        break
                    self.show(bar, stage * each + min(round_index + 1, each - 1))
                    self.progress["round"] = round_index + 1
                    self.save(path)
                    stop_where_asked()
                self.force(stage)
                self.correct_biases(stage)
                if stage + 1 == stages:
                    self.calibrate_activations()
                self.show(bar, (stage + 1) * each)
                self.progress = {"stage": stage + 1, "round": 0}
                self.save(path)
                stop_where_asked()
        return self.history


def progressive_quantize(
    model: nn.Module,
    calibration: CalibrationSet,
    config: PQCADConfig | None = None,
    progressive: ProgressiveConfig | None = None,
    *,
    checkpoint: str | Path | None = None,
    offload_folder: str | Path | None = None,
    progress: bool = True,
    on_round: Callable[[int, dict[str, Any]], None] | None = None,
) -> History:
    """Quantize the full-precision `model` in place and return the history.

    `config` defaults to an average of WEIGHT_BITS bits: fewer than loading without data takes.
    Leaves the fake-quantized model with its latent weights: `distill` trains them, `convert_` turns a copy into packed
    layers. `checkpoint` names a resume file: the same call after a kill goes on from it. It is written after each
    round, and inside `stopping_at_checkpoints` after a unit, before Stopped is raised. `offload_folder` is
    where unnamed files take what would otherwise be in memory, on a CPU also the model itself: in memory are the unit
    under reconstruction and what a pass needs, and the results are the same to the last bit. `on_round(count, entry)`
    hears of each round after it: how many there are so far, and its entry in the history. Deterministic under
    `progressive.seed`; several processes share the work, and all end with the same model.

    Raises ValueError, with the model unchanged, for a calibration set of another model, a budget that cannot be met,
    weights that are not finite or not float32, a layer that the model never calls, or a resume file that was begun
    with other settings.
    """
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        on_main(path.parent.mkdir, parents=True, exist_ok=True)
    # Before the model changes: the file may be damaged.
    state = None if path is None else read_together(partial(load_checkpoint, path), path.exists)
    settings = progressive or ProgressiveConfig()
    config = config or PQCADConfig(weight_bits=WEIGHT_BITS)
    request = {
        "config": with_model_exemptions(model, config).to_dict(),  # older versions searched other layers
        "settings": plain_settings(settings, later=("mixed_precision",)),
        "controller": SensitivityController.__name__,  # older versions kept a momentum of prices
        "calibration": calibration.identity(),
        "num_inference_steps": calibration.num_inference_steps,
    }
    if path is not None and state is not None:
        check_request(path, state, request)
    store = store_in(offload_folder)
    run = ProgressiveQuantizer(model, calibration, config, settings, store)
    run.request = request
    if on_round is not None:
        run.on_round = on_round
    if state is not None:
        run.load(state)
        state.clear()  # as large as the model
    with offloaded(model, store):
        history = run.run(path, progress=progress)
        history.summary = {
            "average_bits": run.controller.average_bits(),
            "bits": dict(run.controller.bits),
            "trajectory_error": trajectory_error(model, run.held_out, calibration.num_inference_steps),
            "latent_shift": {
                name: latent_shift(layer, layer_of(run.reference, name))
                for name, layer in fake_quant_layers(model).items()
            },
        }
    return history


@torch.no_grad()
def latent_shift(layer: nn.Module, original: nn.Module) -> float:
    """Return ||W - W_fp|| / ||W_fp|| of the latent weights of a layer and those of the `original` one.

    Against the reference's weights, which are rounded with `mixed_precision`.
    """
    latent, weight = latent_weight(layer), original.get_parameter("weight")
    shift = ((latent - weight).norm() / weight.norm()).item()
    release_([latent, weight])
    return shift
