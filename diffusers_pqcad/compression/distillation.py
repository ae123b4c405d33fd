"""CAD, calibration-assisted distillation: half the steps, a quantized teacher, full-precision calibration.

The student learns to land in one DDIM step where the teacher lands in two (Salimans & Ho 2022, arXiv:2202.00512), and,
of a guided model, to answer in one branch what the teacher gives in two (Meng et al. 2023, arXiv:2210.03142, at one
guidance scale). A quantized teacher's landing points are biased, and more data do not help; recorded full-precision
trajectories are not. Inspired by the abstract of PQCAD-DM (arXiv:2506.16776): both terms together.
"""

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusers_pqcad.compression.adapters import add_adapter_, carries_adapter
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.checkpoint import (
    check_request,
    load_checkpoint,
    model_hash,
    plain_settings,
    save_checkpoint,
    tensors_hash,
)
from diffusers_pqcad.compression.denoiser import Condition, Denoiser, StepPlan, states_of
from diffusers_pqcad.compression.fake_quant import (
    RANGE_TRAJECTORIES,
    bits_by_module,
    calibrate_activations_,
    fake_quant_layers,
    fake_quant_state,
    load_fake_quant_state_,
    timestep_boundaries,
)
from diffusers_pqcad.compression.grid import Grid
from diffusers_pqcad.compression.offload import Store, release_, store_in, waiting_copy
from diffusers_pqcad.compression.optimization import (
    WARMUP_STEPS,
    AveragedAdam,
    BestState,
    LrScheduler,
    Trainable,
    check_minimum,
    trained_alone,
    trained_groups,
)
from diffusers_pqcad.compression.optimizers import OptimizerName, check_installed, check_optimizer
from diffusers_pqcad.compression.precision import DTYPES, MixedPrecision, check_mixed_precision, computed_in
from diffusers_pqcad.compression.processes import (
    Place,
    accelerator_on,
    check_whole,
    everywhere,
    on_main,
    prepared,
    read_together,
    rows_of,
)
from diffusers_pqcad.compression.progressive import image_error, trajectory_error, weighted_error
from diffusers_pqcad.compression.stopping import asked_to_stop, stop_where_asked
from diffusers_pqcad.compression.watch import Watch


@dataclass(frozen=True)
class DistillConfig:
    """Settings of CAD; the two switches make the ablations.

    What they are worth, in the median image of two small models at 4 bits, three seeds each, simulated
    (examples/results/method.md): CAD 6.6 and 4.8 dB against the same model in half the steps, undistilled; a
    full-precision teacher 7.0 and 5.2 dB, the calibration term alone 5.9 and 3.8 dB.
    """

    # `distill` is given the model itself: here for labels and checks only.
    teacher: Literal["quantized", "fp", "none"] = field(
        default="quantized",
        metadata={
            "help": "whose landing points CAD learns: those of PQ's model, of the full-precision one, or of none"
        },
    )
    calibration: bool = field(default=True, metadata={"help": "whether CAD has its full-precision calibration term"})
    trainable: Trainable = field(
        default="all",
        metadata={
            "help": "what CAD trains: all; scales, biases and norms alone; or a LoRA alone (needs peft): the one that "
            "the pipeline came with, else a new one"
        },
    )
    rank: int = field(default=16, metadata={"help": "rank of a new adapter"})
    lora_alpha: int | None = field(
        default=None,
        metadata={"help": "alpha of a new adapter, whose output counts alpha / rank times; None: its rank"},
    )
    target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "layers of a new adapter, by their names or the last parts of these; None: those of attention, "
            "feed-forward and residual blocks"
        },
    )
    lora_rate: float = field(default=1e-3, metadata={"help": "rate of CAD for an adapter, Adam's own"})
    max_train_steps: int = field(
        default=320,
        metadata={
            "help": "updates of CAD for each student: what a step is wherever steps of the training are counted, here "
            "and for validation and checkpoints"
        },
    )
    train_batch_size: int = field(default=32, metadata={"help": "images of an update of CAD, per term and process"})
    gradient_accumulation_steps: int = field(
        default=1,
        metadata={
            "help": "batches of train_batch_size in an update of CAD, one after the other: as many times the images, "
            "in the memory of one batch"
        },
    )
    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "whether CAD computes the student's blocks again in the backward pass, instead of keeping what "
            "they computed: less memory, the same numbers"
        },
    )
    optimizer: OptimizerName = field(
        default="adam",
        metadata={
            "help": "CAD's optimizer; its state for a weight: of adam two more, of adafactor a row and a column"
        },
    )
    use_8bit_adam: bool = field(
        default=False, metadata={"help": "whether Adam keeps its state in 8 bits (needs bitsandbytes)"}
    )
    mixed_precision: MixedPrecision = "no"
    step_rate: float = field(default=1e-3, metadata={"help": "rate of CAD, in rounding steps of each layer; Adam"})
    float_rate: float = field(
        default=1e-3,
        metadata={
            "help": "rate of CAD, in sizes of each tensor in floating point: biases, norms, layers not quantized"
        },
    )
    lr_scheduler: LrScheduler | None = field(
        default=None,
        metadata={
            "help": "schedule of CAD's rates, by diffusers' names; None: a warm-up that starts above 0, times a "
            "linear decay to 0 over all updates"
        },
    )
    lr_warmup_steps: int = field(
        default=WARMUP_STEPS, metadata={"help": "updates of CAD's warm-up; constant has none, as in diffusers"}
    )
    max_grad_norm: float = field(default=1.0, metadata={"help": "norm to which CAD clips the gradients"})
    fold_guidance: bool | None = field(
        default=None,
        metadata={
            "help": "whether CAD's student answers in one branch what guidance makes of its teacher's two, to be "
            "sampled with guidance_scale=1; None: where the model is guided so"
        },
    )
    calibration_weight: float = field(
        default=1.0, metadata={"help": "weight of CAD's calibration term; the teacher's is 1"}
    )
    ema_decay: float = field(default=0.99, metadata={"help": "decay of the moving average of CAD's weights"})
    evaluation_steps: int = field(
        default=40, metadata={"help": "updates between two measurements on the held-out trajectories"}
    )
    seed: int = field(default=42, metadata={"help": "seed of all draws"})

    def __post_init__(self) -> None:
        if self.teacher not in ("quantized", "fp", "none"):
            raise ValueError(f"teacher: expected 'quantized', 'fp' or 'none', got {self.teacher!r}.")
        if self.trainable not in ("all", "scales", "lora"):
            raise ValueError(f"trainable: expected 'all', 'scales' or 'lora', got {self.trainable!r}.")
        check_optimizer(self.optimizer, use_8bit_adam=self.use_8bit_adam)
        check_mixed_precision(self.mixed_precision)
        if self.lr_scheduler is not None and self.lr_scheduler not in get_args(LrScheduler):
            raise ValueError(f"lr_scheduler: expected one of {get_args(LrScheduler)}, got {self.lr_scheduler!r}.")
        check_minimum(self, max_train_steps=1, train_batch_size=1, evaluation_steps=1, rank=1, lr_warmup_steps=0)
        check_minimum(self, gradient_accumulation_steps=1)
        check_minimum(self, step_rate=0, float_rate=0, lora_rate=0, calibration_weight=0)
        check_minimum(self, **({} if self.lora_alpha is None else {"lora_alpha": 1}))
        if not self.max_grad_norm > 0:
            raise ValueError(f"max_grad_norm: expected more than 0, inf for no limit, got {self.max_grad_norm}.")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay: expected 0 to below 1, got {self.ema_decay}.")
        if not any(term.weight(self) for term in TERMS.values()):
            raise ValueError(
                f"teacher={self.teacher!r} with calibration={self.calibration} and calibration_weight="
                f"{self.calibration_weight} leaves nothing to learn from."
            )

    def folds(self, plan: StepPlan) -> bool:
        """Return whether the student of a model that is called by `plan` answers in one branch.

        Raises ValueError where it is asked to, and cannot.
        """
        if self.fold_guidance:
            plan.folded()
        return plan.is_guided if self.fold_guidance is None else self.fold_guidance


@dataclass(frozen=True)
class StepStats:
    """One update: losses, rate, speed; at evaluations the held-out trajectory error."""

    step: int
    loss: float
    losses: dict[str, float]  # of the terms, by name
    step_rate: float
    images_per_second: float
    held_out_error: float | None = None
    best_step: int = 0  # 0: the undistilled start is the best so far
    best_error: float = field(default=float("nan"))


@torch.no_grad()
def landing_of(teacher: Denoiser, grid: Grid, k: Tensor, state: Tensor, conditions: Sequence[Condition]) -> Tensor:
    """Return where `teacher` takes `state` (B, *S) from steps `k` (B,) of its `grid`: a step for each condition."""
    for index, condition in enumerate(conditions):
        timestep = grid.timestep[k + index].to(state.device)
        state = grid.step(k + index, state, teacher(state, timestep, condition))
    return state


class Distillation:
    """One run of CAD: draws batches, computes the two terms, measures errors on the held-out trajectories.

    A jump is a step of the student: `stride` steps of `calibration`, which are the teacher's. `place` says which of an
    update's images are drawn here.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module | None,
        calibration: CalibrationSet,
        config: DistillConfig,
        data: Tensor | None = None,
        *,
        stride: int = 2,
    ) -> None:
        self.num_steps = calibration.check_student_steps(stride)
        if config.trainable != "lora" and not fake_quant_layers(student):
            raise ValueError(
                "student: expected a fake-quantized model, as progressive_quantize leaves it; only an adapter, "
                "trainable='lora', is trained on one in full precision, too."
            )
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
        if data is not None and calibration.condition(torch.arange(1), torch.zeros(1, dtype=torch.long)):
            raise ValueError("data: fresh inputs of a model with conditions need theirs; leave data out.")
        self.config, self.data, self.stride = config, data, stride
        self.student, self.teacher = student.eval(), teacher
        # An adapter is for a base that stays as it is, activation ranges included: other adapters may share it.
        self.keeps_ranges = config.trainable == "lora" and timestep_boundaries(student) is not None
        self.teacher_plan = calibration.plan
        self.calibration = calibration.folded() if config.folds(calibration.plan) else calibration  # of the student
        self.train_set, self.held_out = self.calibration.split()
        self.grid = calibration.grid()
        self.student_grid = self.grid.every(stride)
        self.weight = calibration.gains(self.num_steps).square()
        self.terms = {name: term for name, term in TERMS.items() if term.weight(config)}
        self.place = Place()
        self.watch = Watch()

    def mine(self, count: int) -> slice:
        """Return this process's rows of `count` images."""
        return rows_of(count, self.place)

    def outputs(self, model: nn.Module, jump: Tensor, state: Tensor, condition: Condition) -> Tensor:
        """Return the outputs of `model`, called as the student is, for states (B, *S) before the jumps (B,)."""
        timestep = self.student_grid.timestep[jump.to(self.student_grid.timestep.device)]
        return self.calibration.denoiser(model)(state, timestep, condition)

    def recorded(self, data: CalibrationSet, trajectory: Tensor, jump: Tensor) -> tuple[Tensor, Tensor]:
        """Return full-precision states before the jumps, and the outputs that land on the recorded states."""
        state, landing = (data.states(trajectory, self.stride * index) for index in (jump, jump + 1))
        return state, self.student_grid.output_to(jump, state, landing)

    def drawn_jumps(self, generator: torch.Generator) -> Tensor:
        """Return random jumps for the images of one update, of all processes."""
        count = self.config.train_batch_size * self.place.num_processes
        return torch.randint(0, len(self.student_grid), (count,), generator=generator)

    def fresh_states(self, jump: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the trajectories (B,) whose conditions hold, and re-noised data at the start of the jumps, (B, *S).

        Of this process's part of the jumps; the draws are made for all. The data are the trajectories' end points, so
        no data set is needed. Where conditions change with the step (a ControlNet's), they hold for the recorded
        states alone, and those are what is returned.
        """
        of_set = self.data is None
        count = len(self.train_set) if self.data is None else len(self.data)
        mine = self.mine(len(jump))
        picked = torch.randint(0, count, (len(jump),), generator=generator)[mine]
        if self.calibration.varies:
            return picked, self.train_set.states(picked, self.stride * jump[mine])
        if self.data is None:
            clean = self.train_set.states(picked, torch.full_like(picked, len(self.grid)))
        else:
            clean = self.data[picked].to(self.weight.device)
        noise = torch.randn((len(jump), *clean.shape[1:]), generator=generator)[mine].to(clean.device)
        jump = jump[mine]
        return picked if of_set else torch.zeros_like(picked), self.student_grid.state(jump, clean, noise)

    def teacher_target(
        self, model: nn.Module, data: CalibrationSet, trajectory: Tensor, jump: Tensor, state: Tensor
    ) -> Tensor:
        """Return the outputs that land where the steps of the teacher `model` do, from `state` before the jumps."""
        first = self.stride * jump
        conditions = [data.condition(trajectory, first + index) for index in range(self.stride)]
        landing = landing_of(Denoiser(model, self.teacher_plan), self.grid, first, state, conditions)
        return self.student_grid.output_to(jump, state, landing)

    def trajectory_error(self) -> float:
        """Return the student's held-out trajectory error in its steps: what the best state is chosen by."""
        return trajectory_error(self.student, self.held_out, self.num_steps)

    def image_error(self) -> float:
        """Return the error of the student's held-out images in its steps."""
        return image_error(self.student, self.held_out, self.num_steps)

    def calibrate_activations(self) -> None:
        """Set the activation ranges on the student's own trajectories, in its steps; below an adapter they stay."""
        if self.keeps_ranges:
            return
        train = self.train_set.select(slice(0, RANGE_TRAJECTORIES))
        rows, condition_at = torch.arange(len(train)), train.condition_at(self.stride)
        noise = train.states(rows, torch.zeros_like(rows))
        states = states_of(self.calibration.denoiser(self.student), self.student_grid, noise, condition_at)

        def run(index: int) -> Any:
            return self.outputs(self.student, torch.full_like(rows, index), states[index], condition_at(index))

        timesteps = self.student_grid.timestep.tolist()
        calibrate_activations_(self.student, ((t, partial(run, index)) for index, t in enumerate(timesteps)))

    def losses(self, model: nn.Module, step: int, rank: int) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of one update and its terms, of the images of part `rank`.

        An update has as many parts as there are processes, times the batches that each of them accumulates. The draws
        are a function of (seed, step, image): as many parts with smaller batches draw the same.
        """
        self.place = self.place._replace(process_index=rank)
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + step) * 8191 % 2**63)
        drawn = {name: term.draw(self, generator) for name, term in self.terms.items()}
        # One call for all terms: a larger batch costs less than two, and the weights are rounded once.
        trajectory, jump, state, target, weight = map(torch.cat, zip(*drawn.values(), strict=True))
        with computed_in(self.config.mixed_precision, state.device):
            output = self.outputs(model, jump, state, self.train_set.condition(trajectory, self.stride * jump))
        sizes = [len(draw.jump) for draw in drawn.values()]
        errors = map(weighted_error, output.split(sizes), target.split(sizes), weight.split(sizes))
        terms = dict(zip(drawn, errors, strict=True))
        total = torch.stack([self.terms[name].weight(self.config) * error for name, error in terms.items()]).sum()
        return total, terms


class Draw(NamedTuple):
    """What a term learns from in one update: trajectories (whose conditions hold) and jumps (B,), states and target
    outputs (B, *S), weights (B,)."""

    trajectory: Tensor
    jump: Tensor
    state: Tensor
    target: Tensor
    weight: Tensor


def teacher_draw(run: Distillation, generator: torch.Generator) -> Draw:
    """Return fresh states and where the teacher takes them."""
    assert run.teacher is not None
    jump = run.drawn_jumps(generator)
    trajectory, state = run.fresh_states(jump, generator)
    jump = jump[run.mine(len(jump))]
    target = run.teacher_target(run.teacher, run.train_set, trajectory, jump, state)
    return Draw(trajectory, jump, state, target, run.weight[jump])


def calibration_draw(run: Distillation, generator: torch.Generator) -> Draw:
    """Return recorded states, and the outputs that land on the recorded states a jump later."""
    jump = run.drawn_jumps(generator)
    trajectory = torch.randint(0, len(run.train_set), jump.shape, generator=generator)
    mine = run.mine(len(jump))
    trajectory, jump = trajectory[mine], jump[mine]
    return Draw(trajectory, jump, *run.recorded(run.train_set, trajectory, jump), run.weight[jump])


class Term(NamedTuple):
    """A term of CAD's loss: its weight under a config (0: it is left out), and what it learns from in an update."""

    weight: Callable[[DistillConfig], float]
    draw: Callable[[Distillation, torch.Generator], Draw]


# Not in files of older versions.
LATER_SETTINGS = (
    "lr_scheduler",
    "lr_warmup_steps",
    "gradient_accumulation_steps",
    "gradient_checkpointing",
    "optimizer",
    "use_8bit_adam",
    "mixed_precision",
)


TERMS = {
    "teacher": Term(lambda config: float(config.teacher != "none"), teacher_draw),
    "calibration": Term(lambda config: config.calibration * config.calibration_weight, calibration_draw),
}


def adapted_(student: nn.Module, config: DistillConfig) -> nn.Module:
    """Return `student` with what `config` trains in it: with trainable="lora", a new adapter unless it carries one."""
    if config.trainable != "lora" or carries_adapter(student):
        return student
    return add_adapter_(
        student,
        rank=config.rank,
        lora_alpha=config.lora_alpha,
        target_modules=config.target_modules,
        seed=config.seed,
    )


def request_of(
    student: nn.Module,
    teacher: nn.Module | None,
    calibration: CalibrationSet,
    config: DistillConfig,
    data: Tensor | None,
    stride: int,
) -> dict[str, Any]:
    """Return what a resume file must have been begun with, as plain values."""
    return {
        "stride": stride,
        "teacher_branches": calibration.plan.branches,
        "folds": config.folds(calibration.plan),
        # What a student learns is the same with checkpointing.
        "config": plain_settings(replace(config, gradient_checkpointing=False), later=LATER_SETTINGS),
        "calibration": calibration.identity(),
        "num_inference_steps": calibration.num_inference_steps,
        "bits": bits_by_module(student),
        "student": model_hash(student),
        "teacher": None if teacher is None else model_hash(teacher),
        "data": None if data is None else tensors_hash({"data": data}),
    }


def distill(
    student: nn.Module,
    teacher: nn.Module | None,
    calibration: CalibrationSet,
    config: DistillConfig | None = None,
    *,
    data: Tensor | None = None,
    stride: int = 2,
    accelerator: Accelerator | None = None,
    checkpoint: str | Path | None = None,
    watch: Watch | None = None,
    offload_folder: str | Path | None = None,
) -> Iterator[StepStats]:
    """Train `student` in place to sample in half the steps of `calibration`, yielding each update's statistics.

    `student` is a fake-quantized model (`progressive_quantize`); `teacher` any frozen model of the same kind, or
    `None` with `teacher="none"`. `stride` steps of `calibration`, which the teacher takes, are one of the student's;
    with 1 it takes as many. To halve again, hand over `calibration.every(2)`, `folded()` where the first student is,
    with that student as the teacher. Fresh inputs are re-noised `data` (n, C, H, W), by default the end points of the
    calibration trajectories. When the generator is exhausted or closed, the student is in its best state by held-out
    trajectory error in its steps; the undistilled start competes (`best_step` 0 means that it won). `checkpoint`
    names a resume file; inside `stopping_at_checkpoints` it is also written, and Stopped raised, when the process is
    asked to stop. `watch` says what else happens in between, and when that file is written. `offload_folder` is where
    unnamed files take what would otherwise be in memory: the averaged weights and the best state, and on a CPU a copy
    of the teacher and what is not trained of the student; results are the same to the last bit. `accelerator` defaults
    to fp32 on the student's device. Several processes draw as many images each, and all have the same student
    throughout.

    With `trainable="scales"` no weight moves, with "lora" nothing but an adapter: that of the student, else a new one,
    which the student has from then on. It may be one in full precision then, and learns fewer steps alone.

    Raises ValueError for an N that `stride` does not divide, guidance that cannot be folded, a calibration set of
    another model, switches that leave nothing to learn from, an optimizer that is not installed, a model that cannot
    checkpoint gradients, or a resume file that was begun with other settings.
    """
    config = config or DistillConfig()
    check_installed(use_8bit_adam=config.use_8bit_adam)
    device = next(student.parameters()).device
    run = Distillation(student, teacher, calibration.to(device), config, data, stride=stride)
    adapted_(student, config)
    groups = trained_groups(
        student,
        config.trainable,
        step_rate=config.step_rate,
        float_rate=config.float_rate,
        lora_rate=config.lora_rate,
    )
    accelerator = accelerator or accelerator_on(device.type)
    check_whole(accelerator)
    run.place = Place(0, accelerator.num_processes * config.gradient_accumulation_steps)  # see `losses`
    run.watch = watch or Watch()
    path = None if checkpoint is None else Path(checkpoint)
    if path is not None:
        on_main(path.parent.mkdir, parents=True, exist_ok=True)
    state = None if path is None else read_together(partial(load_checkpoint, path), path.exists)
    request = request_of(student, teacher, calibration, config, data, stride)
    if accelerator.num_processes > 1:  # as many times the images
        request["num_processes"] = accelerator.num_processes
    if path is not None and state is not None:
        check_request(path, state, request)
    store = store_in(offload_folder)
    if teacher is not None and (store is not None or config.mixed_precision != "no"):
        run.teacher = teacher = waiting_copy(teacher, store, DTYPES[config.mixed_precision])
    with checkpointed(student, enabled=config.gradient_checkpointing), trained_alone(student, groups, store):
        yield from updates(run, groups, accelerator, path, request, state, store)


@contextmanager
def checkpointed(model: Any, *, enabled: bool) -> Iterator[None]:
    """Let the blocks of `model` be computed again in backward passes of the block, if `enabled`.

    Raises ValueError for a model that cannot, as diffusers says it.
    """
    if not enabled or model.is_gradient_checkpointing:
        yield
        return
    model.enable_gradient_checkpointing()
    try:
        yield
    finally:
        model.disable_gradient_checkpointing()


class Losses(NamedTuple):
    """The loss of a batch, and its terms by name."""

    total: float
    terms: dict[str, float]


def backward(run: Distillation, model: nn.Module, step: int, accelerator: Accelerator) -> list[Losses]:
    """Add the gradients of an update to the parameters of `model`, and return the losses of its batches, in order."""
    count, found = run.config.gradient_accumulation_steps, []
    for index in range(count):
        is_last = index + 1 == count  # which brings the gradients of all processes together
        with nullcontext() if is_last else accelerator.no_sync(model):
            loss, terms = run.losses(model, step, accelerator.process_index * count + index)
            accelerator.backward(loss / count)
        found.append(Losses(loss.item(), {name: term.item() for name, term in terms.items()}))
    return found


def reported(losses: list[Losses]) -> Losses:
    """Return the means over batches and processes of an update's losses."""
    found = [one for process in everywhere(losses) for one in process]
    means = {name: statistics.fmean(one.terms[name] for one in found) for name in losses[0].terms}
    return Losses(statistics.fmean(one.total for one in found), means)


def updates(
    run: Distillation,
    groups: list[dict[str, Any]],
    accelerator: Accelerator,
    path: Path | None,
    request: dict[str, Any],
    state: dict[str, Any] | None,
    store: Store | None = None,
) -> Iterator[StepStats]:
    """Train Adam's `groups` of the student of `run`, yielding each update's statistics; see `distill`.

    `path` is that of a resume file for `request`, or None; `state` is what an earlier call left there, or None, and
    is emptied. What waits lies in the `store`, if there is one.
    """
    config, student = run.config, run.student
    run.calibrate_activations()
    adam = AveragedAdam(
        groups,
        num_steps=config.max_train_steps,
        ema_decay=config.ema_decay,
        max_grad_norm=config.max_grad_norm,
        lr_scheduler=config.lr_scheduler,
        warmup_steps=config.lr_warmup_steps,
        optimizer=config.optimizer,
        use_8bit_adam=config.use_8bit_adam,
        store=store,
    )
    best, first = BestState(student, run.trajectory_error(), store), 0
    if state is not None:
        load_fake_quant_state_(student, state["model"])
        adam.load_state_dict(state["adam"])
        best.load_state_dict(state["best"])
        first = state["step"]
        state.clear()  # several times as large as the model
    model, adam.optimizer = prepared(accelerator, student, adam.optimizer)
    images_per_update = config.train_batch_size * run.place.num_processes

    try:
        for step in range(first, config.max_train_steps):
            started = time.perf_counter()
            parts = backward(run, model, step, accelerator)
            adam.update(step)

            done, error = step + 1, None
            if done % config.evaluation_steps == 0 or done == config.max_train_steps:
                with adam.averaged():
                    error = run.trajectory_error()
                    best.offer(student, done, error)
            total, losses = reported(parts)
            yield StepStats(
                step=done,
                loss=total,
                losses=losses,
                step_rate=config.step_rate * adam.rate_factor(step),
                images_per_second=images_per_update / (time.perf_counter() - started),
                held_out_error=error,
                best_step=best.step,
                best_error=best.error,
            )
            # Saved after it was reported: a kill in between repeats some updates, and loses no entry of a log.
            stops = asked_to_stop() is not None  # asked once: a signal in between would stop without a checkpoint
            if run.watch.shows(done) and not stops:
                with adam.averaged():
                    run.watch.show(done)
            is_due = run.watch.saves(done, measured=error is not None, is_last=done == config.max_train_steps)
            if path is not None and (stops or is_due):
                state = {
                    "model": fake_quant_state(student),
                    "adam": adam.state_dict(),
                    "best": best.state_dict(),
                    "step": done,
                    "request": json.dumps(request),
                }
                on_main(save_checkpoint, path, state)
                release_([list(student.parameters()), adam.average.shadow_params, best.state])
                run.watch.kept(done)
            if stops:
                stop_where_asked()
    except GeneratorExit:
        pass  # stopped early: the best state so far is the student
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    best.restore_(student)
    if run.keeps_ranges:
        return
    before, error = fake_quant_state(student), run.image_error()  # of ranges, new ones take the place: no copies
    run.calibrate_activations()
    if not run.image_error() < error:  # new ranges may help on the way, and not the images
        load_fake_quant_state_(student, before)
