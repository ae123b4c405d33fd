"""What each part of PQ is worth: stages, momentum, signal, reconstruction, activations, arm by arm.

    python examples/experiments/parts.py --subjects digits digits-epsilon --seeds 0 1 2

Every arm is a whole run of PQ with the settings of `distill.py`, but for what its name says, measured at N steps.
Simulated: weights and activations are fake-quantized, as in training. Every row is a JSON of its own in --output_dir;
a killed run goes on from there.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal
from unittest import mock

import torch
from controller import LogController, PriceController
from rates import one_rate
from subjects import (
    NUM_STEPS,
    cached,
    calibration_set,
    counted_evaluations,
    fidelity,
    file_name,
    parser_of,
    samples,
    teacher,
    trajectories,
)
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_pqcad import PQCADConfig, ProgressiveConfig, progressive_quantize
from diffusers_pqcad.compression import progressive, reconstruction
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.fake_quant import (
    RANGE_TRAJECTORIES,
    calibrate_activations_,
    enable_activations_,
    freeze_,
    input_quantizers,
)
from diffusers_pqcad.compression.reconstruction import ReconstructionConfig
from diffusers_pqcad.evaluation.metrics import reference_variance

DEPARTURE = 10.0
RECONSTRUCTION: dict[str, Any] = {"iterations": 100, "batch_size": 16}  # of `distill.py`


@contextmanager
def one_stage() -> Iterator[None]:
    """Let PQ go straight to its budget."""
    with mock.patch.object(progressive, "stage_budgets", lambda budget, start: (budget,)):
        yield


@contextmanager
def one_learning_rate() -> Iterator[None]:
    """Let the reconstruction train all tensors at 3e-4, scales at a tenth of it, whatever their size."""
    with mock.patch.object(reconstruction, "parameter_groups", lambda unit, *rates: one_rate(unit, 3e-4)):
        yield


@contextmanager
def third_quarter_counts_double() -> Iterator[None]:
    """Let an error in the third quarter of the steps, where images leave for another picture, count twice."""
    gains = CalibrationSet.gains

    def heavier(calibration: CalibrationSet, num_inference_steps: int | None = None) -> Tensor:
        found = gains(calibration, num_inference_steps).clone()
        found[len(found) // 2 : 3 * len(found) // 4] *= math.sqrt(2)  # weights are squared gains
        return found

    with mock.patch.object(CalibrationSet, "gains", heavier):
        yield


@contextmanager
def momentum_of(kind: type[PriceController]) -> Iterator[None]:
    """Let PQ keep a momentum of prices, of a layer and width each, in the place of one of a layer's sensitivity."""

    def made(num_weights: Any, bit_choices: Any, trust: float, *, changes: Any, beta: float) -> PriceController:
        return kind(num_weights, bit_choices, trust, beta=beta)

    with mock.patch.object(progressive, "SensitivityController", made):
        yield


@contextmanager
def as_it_is() -> Iterator[None]:
    """Change nothing."""
    yield


@dataclass(frozen=True)
class Arm:
    """One way to run PQ: what changes in its settings, and what replaces a function of it meanwhile."""

    progressive: dict[str, Any] = field(default_factory=dict)
    reconstruction: dict[str, Any] = field(default_factory=dict)
    method: Literal["progressive", "fixed"] = "progressive"
    context: Callable[[], Any] = as_it_is


ROUNDS = ProgressiveConfig.rounds_per_stage
ARMS = {
    "PQ": Arm(),
    "one width": Arm(method="fixed"),
    "one stage": Arm({"rounds_per_stage": 2 * ROUNDS}, context=one_stage),
    "no momentum": Arm({"beta": 0.0}),
    "momentum of prices": Arm(context=partial(momentum_of, PriceController)),
    "momentum of logarithms": Arm(context=partial(momentum_of, LogController)),
    "4 images a round": Arm({"price_batch_size": 4}),
    "4 images a round, no momentum": Arm({"price_batch_size": 4, "beta": 0.0}),
    "4 images a round, momentum of prices": Arm(
        {"price_batch_size": 4}, context=partial(momentum_of, PriceController)
    ),
    "weight signal": Arm({"signal": "weight"}),
    "no trust region": Arm({"trust": math.inf}),
    "no reconstruction": Arm(reconstruction={"iterations": 0}),
    "reconstruction at 3e-4": Arm(context=one_learning_rate),
    "reconstruction at 3e-2": Arm(reconstruction={"step_rate": 3e-2}),
    "reconstruction at 3e-3": Arm(reconstruction={"step_rate": 3e-3}),
    "300 iterations": Arm(reconstruction={"iterations": 300}),
    "steps 11 to 15 double": Arm(context=third_quarter_counts_double),
    "no mixed inputs": Arm(reconstruction={"input_mix": 0.0}),
}
# What is done to the activations of the state that the arm "PQ" leaves.
# A number is that of the timestep groups of new static ranges.
ACTIVATIONS: dict[str, int | Literal["as left", "off", "of each call"]] = {
    "static": "as left",
    "float": "off",
    "of each call": "of each call",
    "static, 1 group": 1,
    "static, 20 groups": NUM_STEPS,
}


def quantized(subject_arm: Arm, bits: float, seed: int, pipeline: Any, calibration: CalibrationSet) -> tuple[Any, ...]:
    """Return the fake-quantized model of one arm, its history, and the seconds and model evaluations that it took."""
    model, started = copy.deepcopy(pipeline.unet), time.perf_counter()
    settings = {"seed": seed} | subject_arm.progressive
    with subject_arm.context(), counted_evaluations() as evaluations:
        history = progressive_quantize(
            model,
            calibration,
            PQCADConfig(weight_bits=bits, method=subject_arm.method, activation_bits=8),
            ProgressiveConfig(
                reconstruction=ReconstructionConfig(**RECONSTRUCTION | subject_arm.reconstruction), **settings
            ),
            progress=False,
        )
    return model, history, {"seconds": time.perf_counter() - started, "evaluations": evaluations()}


def with_activations(model: nn.Module, kind: str, calibration: CalibrationSet) -> nn.Module:
    """Return a copy of a fake-quantized `model` with other activation ranges."""
    model, groups = copy.deepcopy(model), ACTIVATIONS[kind]
    if groups == "off":
        enable_activations_(model, False)
    elif groups == "of each call":
        for quantizer in input_quantizers(model):
            quantizer.scale = quantizer.zero_point = quantizer.groups = None
    elif isinstance(groups, int):
        train = calibration.split()[0].select(slice(0, RANGE_TRAJECTORIES))
        rows, denoiser = torch.arange(len(train)), train.denoiser(model)

        def run(step: int) -> Any:
            calls = train.calls(rows, torch.full_like(rows, step))
            return denoiser(calls.state, calls.timestep, calls.condition)

        steps = ((t, partial(run, step)) for step, t in enumerate(train.timestep.tolist()))
        calibrate_activations_(model, steps, num_groups=groups)
    return model


def steps_of_departure(wanted: Tensor, found: Tensor) -> list[int]:
    """Return the step in which each image left that ended in another picture (below 15 dB), counted from 0.

    `wanted` and `found` are states after each step, (steps, images, C, H, W). An image has left in the first step from
    which on its squared error stays above DEPARTURE times that of the median image.
    """
    errors = (found - wanted).flatten(2).square().mean(2)  # (steps, images)
    lost = 10 * (reference_variance(wanted[-1]) / errors[-1].clamp(min=1e-12)).log10() < 15
    away = (errors > DEPARTURE * errors.median(1, keepdim=True).values)[:, lost]
    stays = away.flip(0).cummin(0).values.flip(0)
    return [int(column.int().argmax()) if column.any() else len(errors) - 1 for column in stays.T]


def row(name: str, seed: int, bits: float, context: dict[str, Any]) -> dict[str, Any]:
    """Return what one arm came to, and for the arm "PQ" what each kind of activations makes of it."""
    pipeline, calibration, wanted = context["pipeline"], context["calibration"], context["wanted"]
    model, history, cost = quantized(ARMS[name], bits, seed, pipeline, calibration)

    def measured(model: nn.Module) -> dict[str, Any]:
        return fidelity(wanted, samples(freeze_(model), pipeline.scheduler, len(wanted), NUM_STEPS, seed))

    kinds, departures = {}, []
    if name == "PQ":
        states = trajectories(freeze_(copy.deepcopy(model)), pipeline.scheduler, len(wanted), NUM_STEPS, seed)
        teacher_states = trajectories(pipeline.unet, pipeline.scheduler, len(wanted), NUM_STEPS, seed)
        departures = steps_of_departure(teacher_states, states)
        kinds = {
            kind: measured(with_activations(model, kind, calibration)) for kind in ACTIVATIONS if kind != "static"
        }
        kinds = {kind: {key: found[key] for key in ("mean", "median")} for kind, found in kinds.items()}
    about = {"subject": context["subject"], "arm": name, "bits": bits, "seed": seed} | cost
    about |= {"activations": kinds, "trajectory_error": history.summary["trajectory_error"]}
    about |= {"stages": len({entry["stage"] for entry in history.rounds})}
    about |= {"departures": departures, "rounds": len(history.rounds)}
    return about | measured(model)


def main(arguments: list[str] | None = None) -> None:
    """Measure every arm that is not there yet."""
    parser = parser_of(__doc__, "parts")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--bits", nargs="+", type=float, default=[4.0])
    parser.add_argument("--arms", nargs="+", default=None, help="default: all")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    for subject in args.subjects:
        for seed in args.seeds:
            pipeline = teacher(subject, seed)
            calibration = calibration_set(pipeline, seed)
            wanted = samples(pipeline.unet, pipeline.scheduler, args.num_images, NUM_STEPS, seed)
            context = {"subject": subject, "pipeline": pipeline, "calibration": calibration, "wanted": wanted}
            runs = [(name, bits) for bits in args.bits for name in ARMS if args.arms is None or name in args.arms]
            for name, bits in tqdm(runs, desc=f"{subject}, seed {seed}", unit="arm"):
                cached(args.output_dir / file_name(subject, seed, f"{bits:g}", name), row, name, seed, bits, context)


if __name__ == "__main__":
    main()
