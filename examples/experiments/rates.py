"""How a quantized network is trained: rates, warm-up, Adam's settings, averaging, updates and losses, arm by arm.

    python examples/experiments/rates.py --subjects digits digits-epsilon --seeds 0 1 2

Every arm trains the same PQ state: a recovery of the whole network at N steps, which the library does not have, or the
distillation to N / 2. Arms differ from the library's defaults in what their name says. Simulated: weights and
activations are fake-quantized, as in training. Every row is a JSON of its own in --output_dir; a killed run goes on
from there.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from subjects import (
    NUM_STEPS,
    NUM_TRAJECTORIES,
    TEACHERS,
    cached,
    calibration_set,
    counted_evaluations,
    fidelity,
    file_name,
    parser_of,
    samples,
    teacher,
)
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm.auto import tqdm

from diffusers_pqcad import DistillConfig, PQCADConfig, ProgressiveConfig, progressive_quantize
from diffusers_pqcad.compression import distillation
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.distillation import Distillation
from diffusers_pqcad.compression.fake_quant import fake_quant_layers, freeze_, latent_weight, weight_quantizer
from diffusers_pqcad.compression.optimization import (
    AveragedAdam,
    BestState,
    float_groups,
    parameter_groups,
)
from diffusers_pqcad.compression.progressive import trajectory_error, weighted_error
from diffusers_pqcad.compression.reconstruction import ReconstructionConfig

NUM_UPDATES, BATCH_SIZE, EVALUATION_STEPS = 160, 32, 20
RECOVERY_UPDATES = 40
FRESH_SEED, NUM_FRESH = 500_000, 64  # trajectories that neither train nor choose
HUBER_DELTA = 0.1  # outputs have a variance of about 1
RATE = 3e-3  # of the distillation in most arms, for both units; the library takes 1e-3

Groups = list[dict[str, Any]]


def one_rate(model: nn.Module, rate: float) -> Groups:
    """Return Adam's groups at one `rate` for all parameters, and a tenth of it for scales."""
    scales = [weight_quantizer(layer).scale for layer in fake_quant_layers(model).values()]
    ids = {id(scale) for scale in scales}
    others = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    return [{"params": others, "lr": rate}, {"params": scales, "lr": rate / 10}]


def both(model: nn.Module, rate: float) -> Groups:
    """Return the library's groups at the same rate in both units."""
    return parameter_groups(model, rate, rate)


def without_scales(model: nn.Module, rate: float) -> Groups:
    """Return the library's groups with the scales at rest."""
    scales = {id(weight_quantizer(layer).scale) for layer in fake_quant_layers(model).values()}
    return [group for group in both(model, rate) if id(group["params"][0]) not in scales]


def quantized_alone(model: nn.Module, rate: float) -> Groups:
    """Return the library's groups with what is in floating point at rest."""
    return [group for group in parameter_groups(model, rate, 0.0) if group["lr"]]


def quantized_and_others_at(other_rate: float) -> Callable[[nn.Module, float], Groups]:
    """Return what makes groups with all that is in floating point at one `other_rate`, whatever its size."""

    def groups(model: nn.Module, rate: float) -> Groups:
        others = [parameter for group in float_groups(model, 0.0) for parameter in group["params"]]
        return [*quantized_alone(model, rate), {"params": others, "lr": other_rate}]

    return groups


@dataclass(frozen=True)
class Arm:
    """One way to train: Adam's groups at a rate, its other settings, the number of updates."""

    rate: float
    groups: Callable[[nn.Module, float], Groups] = both
    updates: int = NUM_UPDATES
    batch_size: int = BATCH_SIZE
    adam: dict[str, Any] = field(default_factory=dict)
    ema_decay: float = 0.99
    teacher: str = "quantized"
    calibration: bool = True
    weight: str = "gain"
    num_trajectories: int = NUM_TRAJECTORIES
    evaluation_steps: int = EVALUATION_STEPS


def recovery_arm(rate: float, groups: Callable[[nn.Module, float], Groups] = float_groups, **changes: Any) -> Arm:
    """Return an arm of the recovery: fewer updates, and a shorter average."""
    return Arm(rate, groups, **{"updates": RECOVERY_UPDATES, "ema_decay": 0.98} | changes)


RECOVERY = {
    "none": Arm(0.0, updates=0),
    "floats 1e-3": recovery_arm(1e-3),
    "floats 3e-4": recovery_arm(3e-4),
    "floats 3e-3": recovery_arm(3e-3),
    "floats 1e-3, 160 updates": recovery_arm(1e-3, updates=160),
    "all 1e-3": recovery_arm(1e-3, both),
    "all 1e-3, 160 updates": recovery_arm(1e-3, both, updates=160),
    "floats 1e-3, batch 128": recovery_arm(1e-3, batch_size=128),
}
DISTILLATION = {
    "none": Arm(0.0, updates=0),
    "3e-3": Arm(RATE),
    "1e-3": Arm(1e-3),
    "1e-2": Arm(1e-2),
    "quantized weights alone": Arm(RATE, quantized_alone),
    "floats alone": Arm(RATE, float_groups),
    "scales at rest": Arm(RATE, without_scales),
    "floats at 1e-5, as before": Arm(1e-3, quantized_and_others_at(1e-5)),
    "floats at 1e-3": Arm(RATE, quantized_and_others_at(1e-3)),
    "flat 1e-4": Arm(1e-4, one_rate),
    "no warm-up": Arm(RATE, adam={"warmup_steps": 0}),
    "beta2 0.99": Arm(RATE, adam={"betas": (0.9, 0.99)}),
    "no average": Arm(RATE, ema_decay=0.0),
    "40 updates": Arm(RATE, updates=40),
    "480 updates": Arm(RATE, updates=480),
    "even weights": Arm(RATE, weight="even"),
    "early jumps double": Arm(RATE, weight="early"),
    "SNR-truncated": Arm(RATE, weight="snr"),
    "Huber": Arm(RATE, weight="huber"),
    "calibration alone": Arm(RATE, teacher="none"),
    "full-precision teacher": Arm(RATE, teacher="fp"),
    "no calibration": Arm(RATE, calibration=False),
    "16 trajectories": Arm(RATE, num_trajectories=16),
    "16 trajectories, calibration alone": Arm(RATE, teacher="none", num_trajectories=16),
}


def cad_arm(**changes: Any) -> Arm:
    """Return CAD at the library's defaults, but for `changes`."""
    defaults: dict[str, Any] = {
        "updates": DistillConfig.max_train_steps,
        "evaluation_steps": DistillConfig.evaluation_steps,
    }
    return Arm(DistillConfig.step_rate, **defaults | changes)


CAD = {
    "none": Arm(0.0, updates=0),
    "CAD": cad_arm(),
    "calibration alone": cad_arm(teacher="none"),
    "full-precision teacher": cad_arm(teacher="fp"),
    "no calibration": cad_arm(calibration=False),
    "twice the updates": cad_arm(updates=2 * DistillConfig.max_train_steps),
    "16 trajectories": cad_arm(num_trajectories=16),
    "16 trajectories, calibration alone": cad_arm(teacher="none", num_trajectories=16),
}
# "distillation" looks for the settings, "cad" says what CAD is worth at those that became the defaults.
ARMS = {"recovery": RECOVERY, "distillation": DISTILLATION, "cad": CAD}


@contextmanager
def weights_at_rest(module: nn.Module) -> Iterator[None]:
    """Keep the quantized weights of `module` as they are inside the block: they are rounded once, and not trained.

    Only what `float_groups` returns has gradients then.
    """
    resting = [
        parameter
        for layer in fake_quant_layers(module).values()
        for parameter in (latent_weight(layer), weight_quantizer(layer).scale)
    ]
    for parameter in resting:
        parameter.requires_grad_(False)
    try:
        with parametrize.cached():
            yield
    finally:
        for parameter in resting:
            parameter.requires_grad_(True)


def train(
    model: nn.Module,
    arm: Arm,
    loss_of: Callable[[int], Tensor],
    error_of: Callable[[], float],
) -> dict[str, Any]:
    """Train `model` in place, leave the best state of the average in it, and say which that was."""
    best = BestState(model, error_of())
    start, errors = best.error, [best.error]
    if arm.updates:
        adam = AveragedAdam(arm.groups(model, arm.rate), num_steps=arm.updates, ema_decay=arm.ema_decay, **arm.adam)
        with weights_at_rest(model) if arm.groups is float_groups else nullcontext():
            for step in range(arm.updates):
                loss = loss_of(step)
                if loss.requires_grad:
                    loss.backward()
                    adam.update(step)
                if (step + 1) % arm.evaluation_steps == 0 or step + 1 == arm.updates:
                    with adam.averaged():
                        errors.append(error_of())
                        best.offer(model, step + 1, errors[-1])
        best.restore_(model)
    return {"best_step": best.step, "error_before": start, "error_after": best.error, "errors": errors}


def recover(model: nn.Module, arm: Arm, calibration: CalibrationSet, seed: int) -> dict[str, Any]:
    """Train `model` on full-precision outputs at N steps."""
    train_set, held_out = calibration.split()
    denoiser = calibration.denoiser(model)

    def loss_of(step: int) -> Tensor:
        calls = train_set.draw(arm.batch_size, seed * 1_000_003 + step)
        return weighted_error(denoiser(calls.state, calls.timestep, calls.condition), calls.output, calls.weight)

    return train(model, arm, loss_of, lambda: trajectory_error(model, held_out, NUM_STEPS))


def huber_error(output: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Return the gain-weighted Huber loss, in units of squared errors: linear beyond HUBER_DELTA."""
    errors = 2 * torch.nn.functional.huber_loss(output, target, reduction="none", delta=HUBER_DELTA)
    return (errors.flatten(1).mean(dim=1) * weight).mean()


def jump_weights(run: Distillation, kind: str) -> Tensor:
    """Return the weight of each jump's output error, (K,): squared gains, or another loss's."""
    if kind in ("gain", "huber"):
        return run.weight
    if kind == "even":
        return torch.ones_like(run.weight)
    if kind == "early":
        return run.weight * torch.linspace(2, 1, len(run.weight))
    # SNR-truncated x-space loss (Salimans & Ho 2022, section 4) in output space, up to a factor
    signal, noise = run.student_grid.alpha[:-1].square(), run.student_grid.sigma[:-1].square()
    weight = torch.maximum(signal, noise)
    if run.calibration.manifest["scheduler"]["prediction_type"] == "epsilon":
        weight = weight / signal
    return (weight / weight.mean()).clamp(0.01, 100).to(run.weight)


def distil(
    model: nn.Module, arm: Arm, calibration: CalibrationSet, seed: int, float_model: nn.Module
) -> dict[str, Any]:
    """Train `model` to take half the steps; the teacher is what it was when it started, or `float_model`."""
    config = DistillConfig(
        teacher=arm.teacher, calibration=arm.calibration, train_batch_size=arm.batch_size, seed=seed
    )  # type: ignore[arg-type]
    speaker = {"none": None, "fp": float_model, "quantized": None}[arm.teacher]
    if arm.teacher == "quantized":
        speaker = freeze_(copy.deepcopy(model))
    few = (
        calibration.select(slice(0, arm.num_trajectories)) if arm.num_trajectories < len(calibration) else calibration
    )
    run = Distillation(model, speaker, few, config)
    run.held_out = calibration.split()[1]  # all arms are judged by the same
    run.weight = jump_weights(run, arm.weight)
    run.calibrate_activations()

    def loss_of(step: int) -> Tensor:
        return run.losses(model, step, 0)[0]

    error_of = huber_error if arm.weight == "huber" else distillation.weighted_error
    with mock.patch.object(distillation, "weighted_error", error_of):
        return train(model, arm, loss_of, run.trajectory_error)


# The defaults of `distill.py`.
PQ: dict[str, Any] = {"reconstruction": ReconstructionConfig(iterations=100, batch_size=16)}


def pq_state(subject: str, seed: int, bits: float, pipeline: Any, calibration: CalibrationSet) -> nn.Module:
    """Return the PQ state that all arms start from, kept in outputs/."""
    model = copy.deepcopy(pipeline.unet)
    progressive_quantize(
        model,
        calibration,
        PQCADConfig(weight_bits=bits, activation_bits=8),
        ProgressiveConfig(seed=seed, **PQ),
        checkpoint=TEACHERS / f"pq-{subject}-{seed}-{bits:g}.safetensors",
        progress=False,
    )
    return model


def fresh_error(model: nn.Module, context: dict[str, Any], num_steps: int) -> float:
    """Return the trajectory error of `model` from noise that neither trained nor chose it."""
    return trajectory_error(model, context["fresh"], num_steps)


def reference_row(task: str, seed: int, context: dict[str, Any]) -> dict[str, Any]:
    """Return what the full-precision model comes to at half the steps: what a student has to beat."""
    pipeline, wanted = context["pipeline"], context["wanted"]
    found = samples(pipeline.unet, pipeline.scheduler, len(wanted), NUM_STEPS // 2, seed)
    about = {"subject": context["subject"], "bits": context["bits"], "task": task, "seed": seed}
    nothing = {
        "arm": "full precision, half the steps",
        "seconds": 0.0,
        "evaluations": 0,
        "best_step": 0,
        "error_before": 1.0,
        "error_after": 1.0,
        "fresh_before": 1.0,
        "fresh_after": 1.0,
    }
    return about | nothing | fidelity(wanted, found)


def row(task: str, name: str, seed: int, context: dict[str, Any]) -> dict[str, Any]:
    """Return what one arm came to."""
    pipeline, calibration = context["pipeline"], context["calibration"]
    model, arm = copy.deepcopy(context["start"]), ARMS[task][name]
    steps = NUM_STEPS if task == "recovery" else NUM_STEPS // 2
    before, started = fresh_error(model, context, steps), time.perf_counter()
    with counted_evaluations() as evaluations:
        if task == "recovery":
            result = recover(model, arm, calibration, seed)
        else:
            result = distil(model, arm, calibration, seed, pipeline.unet)
    cost = {"seconds": time.perf_counter() - started, "evaluations": evaluations()}
    result |= {"fresh_before": before, "fresh_after": fresh_error(model, context, steps)}
    found = samples(freeze_(model), pipeline.scheduler, len(context["wanted"]), steps, seed)
    about = {"subject": context["subject"], "bits": context["bits"], "task": task, "arm": name, "seed": seed}
    return about | cost | result | fidelity(context["wanted"], found)


def main(arguments: list[str] | None = None) -> None:
    """Measure every arm that is not there yet."""
    parser = parser_of(__doc__, "rates")
    parser.add_argument("--tasks", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--bits", nargs="+", type=float, default=[4.0])
    parser.add_argument("--arms", nargs="+", default=None)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    for subject in args.subjects:
        for seed in args.seeds:
            pipeline = teacher(subject, seed)
            calibration = calibration_set(pipeline, seed)
            fresh = calibration_set(pipeline, seed + FRESH_SEED).select(slice(0, NUM_FRESH))
            wanted = samples(pipeline.unet, pipeline.scheduler, args.num_images, NUM_STEPS, seed)
            for bits in args.bits:
                start = pq_state(subject, seed, bits, pipeline, calibration)
                context = {
                    "subject": subject,
                    "bits": bits,
                    "pipeline": pipeline,
                    "calibration": calibration,
                    "wanted": wanted,
                    "fresh": fresh,
                    "start": start,
                }
                for task in args.tasks:
                    if task != "recovery":
                        path = args.output_dir / file_name(subject, seed, f"{bits:g}", task, "full-precision")
                        cached(path, reference_row, task, seed, context)
                    names = [name for name in ARMS[task] if args.arms is None or name in args.arms]
                    for name in tqdm(names, desc=f"{subject}, seed {seed}, {task}", unit="arm"):
                        path = args.output_dir / file_name(subject, seed, f"{bits:g}", task, name)
                        cached(path, row, task, name, seed, context)


if __name__ == "__main__":
    main()
