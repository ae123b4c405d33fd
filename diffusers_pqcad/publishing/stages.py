"""What a run of `compress` would do, before it is done: its stages, counted as the code of each stage counts.

All but PQ's rounds follows from the settings and from how a step calls its denoiser. Rounds depend on what they
measure; `rounds.py` says which are likely, and everything that they ask for is counted from them here.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from diffusers_pqcad.compression.distillation import TERMS, DistillConfig
from diffusers_pqcad.compression.fake_quant import RANGE_TRAJECTORIES
from diffusers_pqcad.compression.progressive import (
    BATCH_SIZE,
    MIN_RECONSTRUCTION_SAMPLES,
    ProgressiveConfig,
)
from diffusers_pqcad.compression.reconstruction import CAPTURE_BATCH_SIZE, execution_order, units_holding
from diffusers_pqcad.evaluation.report import MAX_TRAJECTORY_IMAGES
from diffusers_pqcad.layers.quantized import FloatLayer
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.loading.convert import match_modules, with_model_exemptions
from diffusers_pqcad.publishing.compress import MAX_SHOWN_IMAGES, arms_of, stages_of, variants_of
from diffusers_pqcad.publishing.outline import Outline
from diffusers_pqcad.publishing.pipelines import (
    LATENCY_BATCH_SIZE,
    own_num_inference_steps,
    sampling_batch_size,
    strides_of,
)
from diffusers_pqcad.publishing.rounds import Round, expected_rounds
from diffusers_pqcad.publishing.settings import CompressConfig, Settings
from diffusers_pqcad.publishing.validation import MAX_IMAGES, validation_steps

# What computes: the float model; one whose weights are rounded in each call; one that holds rounded weights; a packed
# one; and a student with its gradients.
FLOAT, ROUNDED, FROZEN, PACKED, TRAINED = "float", "rounded", "frozen", "packed", "trained"


class Passes(NamedTuple):
    """As many `times` a step of a model of some kind, each for `images` images with `branches` rows of its batch.

    `until` names the part of the model that ends each of them early.
    """

    model: str
    times: int
    images: int
    branches: int
    until: str | None = None

    @property
    def rows(self) -> int:
        """Rows of the model's batches in all of them."""
        return self.times * self.images * self.branches


class Reconstruction(NamedTuple):
    """The training of a unit of PQ: updates, and rows of each."""

    unit: str
    updates: int
    rows: int


@dataclass(frozen=True)
class Stage:
    """A stage of a run: what it calls models for, and what it trains.

    `updates` are those of CAD; PQ's are those of its `reconstructions`. `pictures` are made of latents, if there are
    latents. `is_expected`: rounds of PQ are among it.
    """

    key: str
    title: str
    passes: tuple[Passes, ...]
    reconstructions: tuple[Reconstruction, ...] = ()
    updates: int = 0
    pictures: int = 0
    is_expected: bool = False

    @property
    def evaluations(self) -> int:
        """Rows of the denoiser's batches that no gradient is asked of; captures, which end early, among them."""
        return sum(part.rows for part in self.passes if part.model != TRAINED)

    @property
    def trained_rows(self) -> int:
        """Rows of the batches of CAD's updates."""
        return sum(part.rows for part in self.passes if part.model == TRAINED)

    @property
    def num_updates(self) -> int:
        """Updates of CAD, or of all of PQ's units."""
        return self.updates + sum(part.updates for part in self.reconstructions)


class Search(NamedTuple):
    """The layers that PQ searches, with their numbers of weights, and the units that it trains, in execution order.

    `biased` are those of the layers that have a bias, in execution order.
    """

    num_weights: dict[str, int]
    units: list[str]
    biased: list[str]

    def unit_of(self, layer: str) -> str:
        """Return the unit that holds `layer`."""
        return next(unit for unit in self.units if layer == unit or layer.startswith(f"{unit}."))


def search_of(outline: Outline, quantization: PQCADConfig) -> Search:
    """Return what PQ by `quantization` searches of the model of an outline."""
    model = outline.model
    layers = match_modules(model, with_model_exemptions(model, quantization))
    units = units_holding(model, layers)
    met = met_in_a_step(outline, (*layers, *units))
    biased = [name for name in met if name in layers and has_bias(layers[name])]
    num_weights = {name: layer.weight.numel() for name, layer in layers.items()}
    return Search(num_weights, [name for name in met if name in units], biased)


@cache
def met_in_a_step(outline: Outline, names: tuple[str, ...]) -> tuple[str, ...]:
    """Return those of the modules `names` of an outline's model that a step calls, in execution order."""
    model = outline.model
    modules = {name: model.get_submodule(name) for name in names}
    return tuple(execution_order(modules, lambda: outline.call(model, 1, device="meta")))


def has_bias(layer: FloatLayer) -> bool:
    """Return whether a layer has a bias."""
    return layer.bias is not None


def stages_of_run(settings: Settings, outline: Outline) -> list[Stage]:
    """Return the stages of a run, in their order; ValueError where guidance that is to be folded cannot be."""
    run, quantization, progressive, distillation = settings
    folds, is_guidance_varied = distillation.folds(outline.plan), "guidance" in run.wanted_ablations()
    teacher = outline.teacher.pipeline
    if folds and outline.folding_error is not None:
        raise outline.folding_error
    has_both_ways = is_guidance_varied and outline.folding_error is None
    num_checks = folds + (is_guidance_varied and outline.plan.is_guided)
    stages = [
        recording(run, outline, num_checks, sampling_batch_size(teacher, run)),
        quantizing("pq", "PQ", outline, quantization, progressive),
    ]
    for arm in arms_of(distillation, run.wanted_ablations(), fold_otherwise=not folds if has_both_ways else None):
        is_first = arm.key == "pq_cad"
        for key, stride in stages_of(arm, run):
            title = f"{arm.name}, {outline.num_steps // stride} steps"
            has_grids = is_first and key == stages_of(arm, run)[0].key
            stages.append(
                distilling(key, title, outline, arm.config, stride, quantization, run, draws_teacher=has_grids)
            )
    stages += [
        quantizing(variant.key, variant.name, outline, variant.quantization, variant.progressive)
        for variant in variants_of(settings)
    ]
    return [*stages, measuring(settings, outline, folds=folds, has_both_ways=has_both_ways)]


# Counting


def batched(model: str, steps: int, images: int, branches: int, batch_size: int) -> list[Passes]:
    """Return the `steps` that a model takes for `images` images, at most `batch_size` at once."""
    whole, rest = divmod(images, batch_size)
    parts = [Passes(model, whole * steps, batch_size, branches), Passes(model, steps if rest else 0, rest, branches)]
    return [part for part in parts if part.times]


def looks(branches: int) -> list[Passes]:
    """Return the steps that show how a pipeline calls its denoiser: of one image, and of two."""
    return [Passes(FLOAT, 1, 1, branches), Passes(FLOAT, 1, 2, branches)]


def recording(run: CompressConfig, outline: Outline, num_checks: int, batch_size: int) -> Stage:
    """Return the recording of the calibration set, and the `num_checks` looks at the teacher without guidance."""
    steps, branches = outline.num_steps, outline.branches
    checks = [part for _ in range(num_checks) for part in looks(1)]
    if run.calibration_set is not None:
        title = f"read from {run.calibration_set}: {run.num_trajectories} trajectories of {steps} steps"
        return Stage("recording", title, tuple(checks))
    num_replayed = len({0, (steps - 1) // 2, steps - 1})
    passes = [
        *looks(branches),
        *batched(FLOAT, steps, run.num_trajectories, branches, batch_size),
        Passes(FLOAT, num_replayed, min(2, batch_size, run.num_trajectories), branches),
        *checks,
    ]
    return Stage("recording", f"recording, {run.num_trajectories} trajectories of {steps} steps", tuple(passes))


def quantizing(
    key: str,
    title: str,
    outline: Outline,
    quantization: PQCADConfig,
    progressive: ProgressiveConfig,
    rounds: Sequence[Round] | None = None,
) -> Stage:
    """Return a PQ with `rounds`, by default those that are expected."""
    search = search_of(outline, quantization)
    if rounds is None:
        rounds = expected_rounds(search.num_weights, quantization, progressive)
    branches, last = outline.branches, rounds[-1].stage
    check = batched(ROUNDED, 1, checked_samples(progressive), branches, BATCH_SIZE)
    passes = [Passes(FLOAT, 1, 1, branches), Passes(ROUNDED, 1, 1, branches)]  # the order of layers, and of units
    reconstructions: list[Reconstruction] = []
    for item in rounds:
        if item.priced:
            passes.append(Passes(FROZEN, 1 + item.priced, progressive.price_batch_size, branches))
        passes += check if item.is_forced else [*check, *check]  # the trust region is by one; both are recorded
        is_final = item.is_forced and item.stage == last
        moved = {search.unit_of(layer) for layer in item.moved}
        units = search.units if is_final else [unit for unit in search.units if unit in moved]
        share = 1.0 if is_final else progressive.round_share
        found = reconstructing(units, branches, progressive, share)
        passes, reconstructions = passes + found[0], reconstructions + found[1]
        if item.is_forced:
            passes += correcting(search, outline, progressive, check)
    if quantization.activation_bits is not None:
        num_ranged = min(RANGE_TRAJECTORIES, outline.num_train)
        passes.append(Passes(ROUNDED, outline.num_steps, num_ranged, branches))
    passes += batched(ROUNDED, outline.num_steps, outline.num_held_out, branches, BATCH_SIZE)
    title = f"{title} to {quantization.weight_bits:g} bits, {len(rounds)} rounds in {last + 1} stages"
    # A single width leaves nothing to choose.
    return Stage(key, title, tuple(passes), tuple(reconstructions), is_expected=len(rounds) > last + 1)


def checked_samples(progressive: ProgressiveConfig) -> int:
    """Return the images that a measurement of the whole model takes."""
    return max(progressive.reconstruction_samples // 8, 2)


def reconstructed_samples(progressive: ProgressiveConfig, share: float) -> int:
    """Return the images that a unit's reconstruction draws."""
    return max(MIN_RECONSTRUCTION_SAMPLES, round(share * progressive.reconstruction_samples))


def reconstructing(
    units: Sequence[str], branches: int, progressive: ProgressiveConfig, share: float
) -> tuple[list[Passes], list[Reconstruction]]:
    """Return the passes that capture what `units` see, of the model and its reference, and the updates of each."""
    config = progressive.reconstruction
    updates = math.ceil(share * config.iterations)
    if not updates:
        return [], []
    whole, rest = divmod(reconstructed_samples(progressive, share), CAPTURE_BATCH_SIZE)
    # Two sizes of a call tell a batch axis: where all are of one, another call is made.
    sizes = [*[CAPTURE_BATCH_SIZE] * whole, *([rest] if rest else [])]
    probe = [] if len(set(sizes)) > 1 else [2 if sizes[0] == 1 else 1]
    passes = [
        Passes(model, 1, size, branches, unit)
        for unit in units
        for size in (*sizes, *probe)
        for model in (ROUNDED, FLOAT)
    ]
    return passes, [Reconstruction(unit, updates, config.batch_size) for unit in units]


def correcting(
    search: Search, outline: Outline, progressive: ProgressiveConfig, check: Sequence[Passes]
) -> list[Passes]:
    """Return the passes that correct biases at the end of a stage, each up to its layer, and tell whether it helps."""
    images, branches = checked_samples(progressive), outline.plan.branches[0]
    upto = [Passes(ROUNDED, 1, images, branches, name) for name in search.biased]
    order = Passes(ROUNDED, 1, 1, outline.branches)
    return [*check, order, Passes(FLOAT, 1, images, branches), *upto, *check]


def distilling(
    key: str,
    title: str,
    outline: Outline,
    config: DistillConfig,
    stride: int,
    quantization: PQCADConfig,
    run: CompressConfig,
    *,
    draws_teacher: bool,
) -> Stage:
    """Return the training of a student of every `stride`-th of the recorded steps.

    `draws_teacher`: it is the first one with grids, which also draws the teacher's pictures.
    """
    folds = config.folds(outline.plan)
    own = 1 if folds else outline.branches
    is_halved_again = stride > 2 and config.teacher == "quantized"  # its teacher is the student before it
    theirs, teacher_steps = (own, 2) if is_halved_again else (outline.branches, stride)
    steps, batches = outline.num_steps // stride, config.max_train_steps * config.gradient_accumulation_steps
    terms = [name for name, term in TERMS.items() if term.weight(config)]
    measured = batched(ROUNDED, steps, outline.num_held_out, own, BATCH_SIZE)
    num_measured = 1 + math.ceil(config.max_train_steps / config.evaluation_steps)
    ranges: list[Passes] = []
    if not (config.trainable == "lora" and quantization.activation_bits is not None):  # below an adapter they stay
        num_ranged = min(RANGE_TRAJECTORIES, outline.num_train)
        once = Passes(ROUNDED, steps, num_ranged, own)  # the student's own states
        ranges = [once] if quantization.activation_bits is None else [once, once]
        num_measured += 2  # whether the last ranges help
    drawn = grids(run, outline, config, steps, own, draws_teacher=draws_teacher)
    passes = [
        *(ranges * 2),
        *(measured * num_measured),
        *([Passes(FROZEN, batches * teacher_steps, config.train_batch_size, theirs)] if "teacher" in terms else []),
        Passes(TRAINED, batches, len(terms) * config.train_batch_size, own),
        *(part for parts in drawn for part in parts),
    ]
    pictures = grid_images(run) * len(drawn)
    return Stage(key, title, tuple(passes), updates=config.max_train_steps, pictures=pictures)


def grid_images(run: CompressConfig) -> int:
    """Return the pictures of a row of a grid."""
    return len(run.validation_prompts or ()) or min(MAX_IMAGES, run.num_images)


def grids(
    run: CompressConfig, outline: Outline, config: DistillConfig, steps: int, own: int, *, draws_teacher: bool
) -> list[list[Passes]]:
    """Return what each row of the grids of a student's training takes: the teacher's, once, and the student's."""
    every = validation_steps(run)
    count = 0 if every is None else config.max_train_steps // every
    if not count:
        return []
    images, batch_size = grid_images(run), sampling_batch_size(outline.teacher.pipeline, run)
    teacher = batched(FLOAT, run.num_inference_steps, images, outline.branches, batch_size)
    return [*([teacher] if draws_teacher else []), *[batched(PACKED, steps, images, own, batch_size)] * count]


class TableRow(NamedTuple):
    """A row of the table: which kind of model, its steps, and the rows of its batch for an image."""

    key: str
    model: str
    steps: int
    branches: int


def table_rows(settings: Settings, outline: Outline, *, folds: bool, has_both_ways: bool) -> list[TableRow]:
    """Return the rows of a run's table, in their order."""
    run, branches, steps = settings.run, outline.branches, settings.run.num_inference_steps
    strides = strides_of(run)
    fewer = [steps // stride for stride in strides if stride > 1]
    rows = [TableRow("float", FLOAT, count, branches) for count in (steps, *fewer)]
    others = dict.fromkeys(count for count in run.float_steps or () if count not in (steps, *fewer))
    rows += [TableRow("float", FLOAT, count, branches) for count in others]
    own = outline.teacher.as_you_run_it
    if own is not None:
        scheduler = copy.deepcopy(own.scheduler)
        scheduler.set_timesteps(own_num_inference_steps(own, run))
        rows.append(TableRow("as_you_run_it", FLOAT, len(scheduler.timesteps), branches))
    rows.append(TableRow("fixed", PACKED, steps, branches))
    if "load_time" in run.wanted_ablations():
        rows.append(TableRow("load_time", PACKED, steps, branches))
    if has_both_ways:
        last = strides[-1]
        unguided = [last] if folds or last == 1 else [last // 2, last]
        rows += [TableRow("float_unguided", FLOAT, steps // stride, 1) for stride in unguided]
    rows += [TableRow("pq", PACKED, count, branches) for count in (steps, *fewer)]
    fold_otherwise = not folds if has_both_ways else None
    for arm in arms_of(settings.distillation, run.wanted_ablations(), fold_otherwise=fold_otherwise):
        own_branches = 1 if arm.config.folds(outline.plan) else branches
        rows += [TableRow(key, PACKED, steps // stride, own_branches) for key, stride in stages_of(arm, run)]
    return [*rows, *(TableRow(variant.key, PACKED, steps, branches) for variant in variants_of(settings))]


def measuring(settings: Settings, outline: Outline, *, folds: bool, has_both_ways: bool) -> Stage:
    """Return the measuring of the table: samples, times and counts of each row, and the pictures of the card."""
    run, branches, steps = settings.run, outline.branches, settings.run.num_inference_steps
    batch_size = sampling_batch_size(outline.teacher.pipeline, run)
    rows = table_rows(settings, outline, folds=folds, has_both_ways=has_both_ways)
    passes = batched(FLOAT, steps, run.num_images, branches, batch_size)  # what all rows are compared with
    for index, row in enumerate(rows):
        passes += batched(FLOAT, steps, min(run.num_images, MAX_TRAJECTORY_IMAGES), branches, batch_size)
        if index:  # the first is the reference itself
            passes += batched(row.model, row.steps, run.num_images, row.branches, batch_size)
        timed, rounds = min(LATENCY_BATCH_SIZE, batch_size), 1 + run.num_latency_rounds
        passes += [
            Passes(row.model, row.steps, 1, row.branches),  # evaluations of an image, counted
            Passes(row.model, rounds * row.steps, timed, row.branches),
            Passes(FLOAT, rounds * steps, timed, branches),
        ]
    first, pq, student = (next(row for row in rows if row.key == key) for key in ("float", "pq", "pq_cad"))
    for row in (first, pq, student):
        passes += batched(row.model, row.steps, min(MAX_SHOWN_IMAGES, run.num_images), row.branches, batch_size)
    if run.measure_memory:  # in processes of their own: full precision in two dtypes, and the student
        passes += [Passes(FLOAT, 2 * steps, 1, branches), Passes(PACKED, student.steps, 1, student.branches)]
    pictures = len(rows) * run.num_images + 3 * (min(MAX_SHOWN_IMAGES, run.num_images) + run.measure_memory)
    title = f"measuring {len(rows)} rows of {run.num_images} images"
    return Stage("rows", title, tuple(passes), pictures=pictures)
