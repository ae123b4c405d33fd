"""CAD, calibration-assisted distillation: half the steps, a quantized teacher, full-precision calibration.

The student learns to land in one DDIM step where the teacher lands in two (Salimans & Ho 2022, arXiv:2202.00512). A
quantized teacher's landing points are biased, and more data do not help; recorded full-precision trajectories are
not. Inspired by the abstract of PQCAD-DM (arXiv:2506.16776): both terms together, and a momentum of the two errors
that lets the teacher speak only while it is better than the student.
"""

import copy
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.checkpoint import (
    check_request,
    load_checkpoint,
    model_hash,
    save_checkpoint,
    tensors_hash,
)
from diffusers_pqcad.compression.fake_quant import (
    RANGE_TRAJECTORIES,
    bits_by_module,
    calibrate_activations_,
    fake_quant_layers,
    fake_quant_state,
    load_fake_quant_state_,
)
from diffusers_pqcad.compression.grid import Grid
from diffusers_pqcad.compression.optimization import (
    AveragedAdam,
    BestState,
    check_minimum,
    parameter_groups,
    rate_factor,
)
from diffusers_pqcad.compression.progressive import image_error, trajectory_error, weighted_error
from diffusers_pqcad.compression.sampling import denoise

GATE_TRAJECTORIES = 16  # of the held-out ones: the gate is measured often, and smoothed by its momentum
START_RATIO = 2.0  # the student's error counts as twice the teacher's until it has been measured


@dataclass(frozen=True)
class DistillConfig:
    """Settings of CAD; the three switches make the ablations."""

    teacher: Literal["quantized", "fp", "none"] = "quantized"  # which model speaks: for labels and checks only
    calibration: bool = True  # the full-precision calibration term
    gate: bool = True  # let the teacher speak only while it is better than the student
    max_train_steps: int = 320
    train_batch_size: int = 32  # per term and process
    step_rate: float = 1e-3  # of each layer's rounding step; Adam, with warm-up and linear decay
    float_rate: float = 1e-3  # of the size of each tensor in floating point: biases, norms, layers not quantized
    max_grad_norm: float = 1.0
    calibration_weight: float = 1.0
    gate_momentum: float = 0.7
    gate_steps: int = 10  # updates between two measurements of the gate
    ema_decay: float = 0.99
    evaluation_steps: int = 40  # updates between two measurements on the held-out trajectories
    seed: int = 0

    def __post_init__(self) -> None:
        if self.teacher not in ("quantized", "fp", "none"):
            raise ValueError(f"teacher: expected 'quantized', 'fp' or 'none', got {self.teacher!r}.")
        check_minimum(self, max_train_steps=1, train_batch_size=1, gate_steps=1, evaluation_steps=1)
        check_minimum(self, step_rate=0, float_rate=0, calibration_weight=0)
        if self.teacher == "none" and not self.calibration:
            raise ValueError("teacher='none' with calibration=False leaves nothing to learn from.")


@dataclass(frozen=True)
class StepStats:
    """One update: losses, mean gate, rate, speed; at evaluations the held-out trajectory error."""

    step: int
    loss: float
    teacher_loss: float | None
    calibration_loss: float | None
    gate: float | None
    step_rate: float
    images_per_second: float
    held_out_error: float | None = None
    best_step: int = 0  # 0: the undistilled start is the best so far
    best_error: float = field(default=float("nan"))


@torch.no_grad()
def two_step_landing(teacher: nn.Module, grid: Grid, k: Tensor, sample: Tensor) -> Tensor:
    """Return where two steps of `teacher` take `sample` (B, C, H, W), from the steps `k` (B,) of its `grid`."""
    half_way = grid.step(k, sample, teacher(sample, grid.timestep[k]).sample)
    return grid.step(k + 1, half_way, teacher(half_way, grid.timestep[k + 1]).sample)


class Gate:
    """Momentum of the student's held-out error per jump against the teacher's: how far the teacher is trusted.

    g_k = clip((e_student,k - e_teacher,k) / e_student,k, 0, 1), with e_student an exponential moving average.
    """

    def __init__(self, teacher_error: Tensor, momentum: float) -> None:
        self.teacher_error, self.momentum = teacher_error, momentum
        self.student_error = START_RATIO * teacher_error

    def update(self, student_error: Tensor) -> None:
        """Take in the student's measured error per jump (K,)."""
        self.student_error = self.momentum * self.student_error + (1 - self.momentum) * student_error

    def value(self) -> Tensor:
        """Return the gate of each jump, (K,), in [0, 1]."""
        return ((self.student_error - self.teacher_error) / self.student_error.clamp(min=1e-20)).clamp(0, 1)


class Distillation:
    """One run of CAD: draws batches, computes the two terms, measures errors on the held-out trajectories."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, calibration: CalibrationSet, config: DistillConfig
    ) -> None:
        self.num_steps = calibration.check_student_steps()
        if not fake_quant_layers(student):
            raise ValueError("student: expected a fake-quantized model, as progressive_quantize leaves it.")
        if (teacher is None) != (config.teacher == "none"):
            found = "missing" if teacher is None else "given"
            raise ValueError(f"teacher={config.teacher!r}, but teacher is {found}.")
        recorded = calibration.manifest["model_hash"]
        if getattr(student, "pqcad_source_hash", recorded) != recorded:
            raise ValueError(
                "student: it was quantized from another model than the one that the calibration set was recorded with."
            )
        if teacher is not None and config.teacher == "fp" and model_hash(teacher) != recorded:
            raise ValueError("teacher='fp': this is not the model that the calibration set was recorded with.")
        self.config, self.calibration = config, calibration
        self.student, self.teacher = student.eval(), teacher
        self.train_set, self.held_out = calibration.split()
        self.scheduler = calibration.scheduler()
        self.grid = calibration.grid()
        self.student_grid = self.grid.every(2)  # a jump is a step of the student: two of the teacher
        self.weight = calibration.gains(self.num_steps).square()

    def calibration_batch(self, data: CalibrationSet, trajectories: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return full-precision states before the jumps `rows` and the outputs that land on the recorded states."""
        sample, landing = data.trajectory[trajectories, 2 * rows], data.trajectory[trajectories, 2 * rows + 2]
        return sample, self.student_grid.output_to(rows, sample, landing)

    def fresh_batch(self, rows: Tensor, generator: torch.Generator, data: Tensor) -> Tensor:
        """Return re-noised data at the start of the jumps `rows`: no data set needed, end points are the data."""
        clean = data[torch.randint(0, len(data), (len(rows),), generator=generator)]
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        return self.student_grid.state(rows, clean, noise)

    def teacher_target(self, sample: Tensor, rows: Tensor) -> Tensor:
        """Return the output that lands where two steps of the teacher do."""
        assert self.teacher is not None
        landing = two_step_landing(self.teacher, self.grid, 2 * rows, sample)
        return self.student_grid.output_to(rows, sample, landing)

    @torch.no_grad()
    def held_out_error_per_jump(self, model: nn.Module, *, two_steps: bool) -> Tensor:
        """Return the mean squared output error on the held-out trajectories for each jump, (K,)."""
        trajectories = torch.arange(min(len(self.held_out), GATE_TRAJECTORIES))
        errors = []
        for jump in range(len(self.student_grid)):
            rows = torch.full_like(trajectories, jump)
            sample, target = self.calibration_batch(self.held_out, trajectories, rows)
            if two_steps:
                output = self.teacher_target(sample, rows)
            else:
                output = model(sample, self.student_grid.timestep[rows]).sample
            errors.append((output - target).square().mean())
        return torch.stack(errors)

    def trajectory_error(self) -> float:
        """Return the student's held-out trajectory error at N / 2 steps: what the best state is chosen by."""
        return trajectory_error(self.student, self.held_out, self.num_steps)

    def image_error(self) -> float:
        """Return the error of the student's held-out images at N / 2 steps."""
        return image_error(self.student, self.held_out, self.num_steps)

    def calibrate_activations(self) -> None:
        """Set the activation ranges on the student's own trajectories at N / 2 steps."""
        noise = self.train_set.trajectory[:RANGE_TRAJECTORIES, 0]
        steps = list(denoise(self.student, self.scheduler, noise, self.num_steps))[:-1]
        calibrate_activations_(self.student, ((step.timestep, step.sample) for step in steps))

    def losses(
        self, model: nn.Module, step: int, rank: int, gate: Tensor, data: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the loss of one update and its two terms; the draws are a function of (seed, step, rank)."""
        config = self.config
        generator = torch.Generator().manual_seed(((config.seed * 1_000_003 + step) * 8191 + rank) % 2**63)
        num_jumps, size = len(self.student_grid), config.train_batch_size
        batches: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]] = {}  # rows, samples, targets, weights
        if self.teacher is not None:
            rows = torch.randint(0, num_jumps, (size,), generator=generator)
            sample = self.fresh_batch(rows, generator, data)
            spoken = (gate[rows] > 0).cpu()  # the others add nothing to the mean, and need not be computed
            if bool(spoken.any()):
                rows, sample = rows[spoken], sample[spoken]
                target = self.teacher_target(sample, rows)
                batches["teacher"] = rows, sample, target, self.weight[rows] * gate[rows] * len(rows) / size
        if config.calibration:
            rows = torch.randint(0, num_jumps, (size,), generator=generator)
            trajectories = torch.randint(0, len(self.train_set), (size,), generator=generator)
            batches["calibration"] = (
                rows,
                *self.calibration_batch(self.train_set, trajectories, rows),
                self.weight[rows],
            )
        if not batches:
            return self.weight.new_zeros(()), None, None
        # One call for both terms: a larger batch costs less than two, and the weights are rounded once.
        rows, sample, target, weight = map(torch.cat, zip(*batches.values(), strict=True))
        output = model(sample, self.student_grid.timestep[rows]).sample
        sizes = [len(batch[0]) for batch in batches.values()]
        errors = map(weighted_error, output.split(sizes), target.split(sizes), weight.split(sizes))
        terms = dict(zip(batches, errors, strict=True))
        teacher_loss, calibration_loss = terms.get("teacher"), terms.get("calibration")
        total = self.weight.new_zeros(()) if teacher_loss is None else teacher_loss
        if calibration_loss is not None:
            total = total + config.calibration_weight * calibration_loss
        return total, teacher_loss, calibration_loss


def request_of(
    student: nn.Module, teacher: nn.Module | None, calibration: CalibrationSet, config: DistillConfig, data: Tensor
) -> dict[str, Any]:
    """Return what a resume file must have been begun with, as plain values."""
    return {
        "config": asdict(config),
        "calibration": calibration.manifest | {"num_trajectories": len(calibration)},
        "num_inference_steps": calibration.num_inference_steps,
        "bits": bits_by_module(student),
        "student": model_hash(student),
        "teacher": None if teacher is None else model_hash(teacher),
        "data": tensors_hash({"data": data}),
    }


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    calibration: CalibrationSet,
    config: DistillConfig | None = None,
    *,
    data: Tensor | None = None,
    accelerator: Accelerator | None = None,
    checkpoint: str | Path | None = None,
) -> Iterator[StepStats]:
    """Train `student` in place to sample in half the steps of `calibration`, yielding each update's statistics.

    `student` is a fake-quantized model (`progressive_quantize`); `teacher` any frozen model of the same kind, or
    `None` with `teacher="none"`. Fresh inputs are re-noised `data` (n, C, H, W), by default the end points of the
    calibration trajectories. When the generator is exhausted or closed, the student is in its best state by held-out
    trajectory error at N / 2 steps; the undistilled start competes (`best_step` 0 means that it won). `checkpoint`
    names a resume file. `accelerator` defaults to fp32 on the student's device.

    Raises ValueError for an odd N, a calibration set of another model, switches that leave nothing to learn from, or a
    resume file that was begun with other settings.
    """
    config = config or DistillConfig()
    device = next(student.parameters()).device
    run = Distillation(student, teacher, calibration.to(device), config)
    # Rounded weights trained under autocast would be other weights than those that are packed.
    accelerator = accelerator or Accelerator(cpu=device.type == "cpu", mixed_precision="no")
    path = None if checkpoint is None else Path(checkpoint)
    data = run.train_set.trajectory[:, -1] if data is None else data
    state = load_checkpoint(path) if path is not None and path.exists() else None
    request = request_of(student, teacher, calibration, config, data)
    if path is not None and state is not None:
        check_request(path, state, request)

    run.calibrate_activations()
    adam = AveragedAdam(
        parameter_groups(student, config.step_rate, config.float_rate),
        num_steps=config.max_train_steps,
        ema_decay=config.ema_decay,
        max_grad_norm=config.max_grad_norm,
    )
    gate = None
    if teacher is not None and config.gate:
        gate = Gate(run.held_out_error_per_jump(teacher, two_steps=True), config.gate_momentum)
    best, first = BestState(student, run.trajectory_error()), 0
    if state is not None:
        load_fake_quant_state_(student, state["model"])
        adam.load_state_dict(state["adam"])
        best.load_state_dict(state["best"])
        if gate is not None:
            gate.student_error = state["student_error"].to(device)
        first = state["step"]
    model, adam.optimizer = accelerator.prepare(student, adam.optimizer)
    images_per_update = config.train_batch_size * accelerator.num_processes

    try:
        for step in range(first, config.max_train_steps):
            started = time.perf_counter()
            if gate is not None and step % config.gate_steps == 0:
                gate.update(run.held_out_error_per_jump(student, two_steps=False))
            open_by = torch.ones_like(run.weight) if gate is None else gate.value()
            loss, teacher_loss, calibration_loss = run.losses(model, step, accelerator.process_index, open_by, data)
            if loss.requires_grad:  # a closed gate without a calibration term leaves nothing to learn from this time
                accelerator.backward(loss)
                adam.update(step)

            done, error = step + 1, None
            if done % config.evaluation_steps == 0 or done == config.max_train_steps:
                with adam.averaged():
                    error = run.trajectory_error()
                    best.offer(student, done, error)
            yield StepStats(
                step=done,
                loss=loss.item(),
                teacher_loss=None if teacher_loss is None else teacher_loss.item(),
                calibration_loss=None if calibration_loss is None else calibration_loss.item(),
                gate=None if teacher is None else open_by.mean().item(),
                step_rate=config.step_rate * rate_factor(step, adam.num_steps, adam.warmup_steps),
                images_per_second=images_per_update / (time.perf_counter() - started),
                held_out_error=error,
                best_step=best.step,
                best_error=best.error,
            )
            # Saved after it was reported: a kill in between repeats some updates, and loses no entry of a log.
            if error is not None and path is not None and accelerator.is_main_process:
                state = {
                    "model": fake_quant_state(student),
                    "adam": adam.state_dict(),
                    "best": best.state_dict(),
                    "student_error": None if gate is None else gate.student_error,
                    "step": done,
                    "request": json.dumps(request),
                }
                save_checkpoint(path, state)
    except GeneratorExit:
        pass  # stopped early: the best state so far is the student
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    best.restore_(student)
    before, error = copy.deepcopy(fake_quant_state(student)), run.image_error()
    run.calibrate_activations()
    if not run.image_error() < error:  # new ranges may help on the way, and not the images
        load_fake_quant_state_(student, before)
