"""Recording: run a pipeline as its user does, and keep what it hands to its denoiser and to its scheduler.

What was seen is checked by number before it is kept: the grid must give the recorded next state, and the denoiser the
recorded guided output. So a pipeline that works in a way that this package does not know is refused by a measurement.
"""

import hashlib
import inspect
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import pyarrow as pa
import torch
from datasets import Dataset
from torch import Tensor
from tqdm.auto import tqdm

from diffusers_pqcad.compression.calibration import (
    OUTPUT,
    STATE,
    CalibrationSet,
    ColumnShape,
    about_of,
    check_float32,
    check_replaceable,
    input_text,
    record_batch,
    scheduler_settings,
    write_set,
)
from diffusers_pqcad.compression.calling import Inputs, call_arguments_of, check_positive, inputs_of, quiet
from diffusers_pqcad.compression.checkpoint import model_hash
from diffusers_pqcad.compression.denoiser import (
    Column,
    ModelCall,
    Repeated,
    StepPlan,
    Stop,
    TappedStep,
    denoiser_name,
    run_tapped,
)
from diffusers_pqcad.compression.fake_quant import fake_quant_layers
from diffusers_pqcad.compression.grid import grid_in_use
from diffusers_pqcad.compression.processes import each, in_turns, is_main, on_main, place, share, together
from diffusers_pqcad.compression.sampling import image_generator

SINGULAR = 1e-10  # of the largest eigenvalue: branches whose difference is lost in fp32
TOLERANCE = 1e-5  # relative; fp32 has 1e-6 to 1e-7 here, a formula that does not hold 1e-2 and more
NOT_ARGUMENTS = ("timestep", "return_dict")  # of a model's call: what the denoiser gives itself


def run_steps(
    pipeline: Any, batch: Inputs, first: int, seed: int, num_inference_steps: int, common: dict[str, Any], last: int
) -> list[TappedStep]:
    """Return the first `last` steps (0: all) of one call of `pipeline` for images `first` and following of `seed`."""
    steps: list[TappedStep] = []

    def keep(step: TappedStep) -> None:
        steps.append(step)
        if len(steps) == last or float(step.timestep) == float(pipeline.scheduler.timesteps[-1]):
            raise Stop  # before anything is decoded

    generators = [image_generator(seed, first + index) for index in range(len(batch))]
    arguments = call_arguments_of(pipeline, batch, common)
    with quiet(pipeline):
        run_tapped(pipeline, keep, num_inference_steps=num_inference_steps, generator=generators, **arguments)
    if not steps or not steps[0].calls:
        raise ValueError(f"{type(pipeline).__name__}: it ran without a call of its denoiser or of its scheduler.")
    if not all(bool(step.next_state.isfinite().all()) for step in steps):
        raise ValueError("the trajectories hold a NaN or an infinity; check the weights and the scheduler.")
    return steps


@contextmanager
def noted_settings(scheduler: Any) -> Iterator[dict[str, Any]]:
    """Keep the keywords with which `set_timesteps` of `scheduler` is called inside the block."""
    settings: dict[str, Any] = {}
    original, own = scheduler.set_timesteps, vars(scheduler).get("set_timesteps")

    @wraps(original)  # pipelines look at its signature: whether it takes sigmas
    def set_timesteps(*args: Any, **kwargs: Any) -> Any:
        settings.update(kwargs)
        return original(*args, **kwargs)

    scheduler.set_timesteps = set_timesteps
    try:
        yield settings
    finally:
        del scheduler.set_timesteps
        if own is not None:
            scheduler.set_timesteps = own


@contextmanager
def restored(scheduler: Any) -> Iterator[None]:
    """Leave `scheduler` as it was before the block: its timesteps, and where it stands in them."""
    before = dict(vars(scheduler))
    try:
        yield
    finally:
        vars(scheduler).clear()
        vars(scheduler).update(before)


def state_name_of(model: Any) -> str:
    """Return the name of the argument that the model's states go by."""
    return next(iter(inspect.signature(getattr(model, "_orig_mod", model).forward).parameters))


def others_of(call: ModelCall, state_name: str) -> dict[str, Any]:
    """Return the arguments of a call beside state and timestep."""
    return {name: value for name, value in call.arguments.items() if name not in (state_name, *NOT_ARGUMENTS)}


def template_of(one: Any, two: Any, path: str) -> Any:
    """Return what an argument is made of, from its values in a call for one image and in one for two of the same.

    A tensor with twice the rows in the second has a batch axis: a Column. A list twice as long with equal items is
    Repeated. Anything else must be the same in both: ValueError with the argument's name, `path`.
    """
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        if one.dim() and one.shape[1:] == two.shape[1:] and len(two) == 2 * len(one):
            return Column(path, len(one))
        if one.shape == two.shape and torch.equal(one, two):
            return one
    elif isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return {key: template_of(one[key], two[key], f"{path}.{key}") for key in one}
    elif isinstance(one, list | tuple) and isinstance(two, list | tuple):
        if len(one) == len(two):
            return [template_of(a, b, f"{path}.{i}") for i, (a, b) in enumerate(zip(one, two, strict=True))]
        if one and len(two) == 2 * len(one) and all(item == one[0] for item in (*one, *two)):
            return Repeated(template_of(one[0], two[0], path), len(one))
    elif (one is None or isinstance(one, bool | int | float | str)) and one == two:
        return one
    raise ValueError(
        f"{path}: the pipeline hands it to its denoiser in a way that does not follow the number of images "
        f"({_shape(one)} for one, {_shape(two)} for two of the same)."
    )


def _shape(value: Any) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"


def values_of(template: Any, value: Any, path: str, count: int) -> dict[str, Tensor]:
    """Return the columns, (count, rows, ...), in an argument's `value` for `count` images.

    Raises ValueError where the rest of it is not that of the `template`.
    """
    if isinstance(template, Column):
        if not isinstance(value, Tensor) or len(value) != template.rows * count:
            raise ValueError(f"{path}: expected {template.rows * count} rows for {count} images, got {_shape(value)}.")
        return {path: value.detach().unflatten(0, (template.rows, count)).transpose(0, 1)}
    if isinstance(template, dict):
        return _merged(values_of(item, value[key], f"{path}.{key}", count) for key, item in template.items())
    if isinstance(template, list):
        return _merged(values_of(item, value[i], f"{path}.{i}", count) for i, item in enumerate(template))
    if isinstance(template, Repeated):
        return _merged(values_of(template.item, item, path, count) for item in value)
    same = torch.equal(template, value) if isinstance(template, Tensor) else template == value
    if not same:
        raise ValueError(
            f"{path}: it has no batch axis, and differs from one input to another ({template!r}, {value!r}). Record "
            "inputs that share it, of one size and with the same settings."
        )
    return {}


def _merged(parts: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: values for part in parts for name, values in part.items()}


def path_of(call: int, num_calls: int, name: str) -> str:
    """Return the name of an argument's column: with the number of the call where a step makes several."""
    return name if num_calls == 1 else f"{call}.{name}"


def plan_of(pipeline: Any, example: dict[str, Any], seed: int, num_inference_steps: int, common: Any) -> StepPlan:
    """Return how `pipeline` calls its denoiser, without weights: seen in the first step of one image, and of two."""
    state_name = state_name_of(getattr(pipeline, denoiser_name(pipeline)))
    one, two = (
        run_steps(pipeline, [example] * count, 0, seed, num_inference_steps, common, 1)[0].calls for count in (1, 2)
    )
    if len(one) != len(two):
        raise ValueError(
            f"{type(pipeline).__name__}: it calls its denoiser {len(one)} times a step for one image and {len(two)} "
            "times for two; expected the same number of calls for any number of images."
        )
    branches = tuple(len(call.arguments[state_name]) for call in one)
    arguments = tuple(
        {
            name: template_of(value, others_of(b, state_name).get(name), path_of(index, len(one), name))
            for name, value in others_of(a, state_name).items()
        }
        for index, (a, b) in enumerate(zip(one, two, strict=True))
    )
    return StepPlan(state_name, branches, (1.0,) * sum(branches), arguments)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Return ||found - wanted|| / ||wanted||."""
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30)).item()


def parts_of(plan: StepPlan, step: TappedStep, count: int) -> Tensor:
    """Return the outputs of the branches of one step, (branches, count, *S)."""
    channels = step.state.shape[1]
    parts = [
        part
        for call, branches in zip(step.calls, plan.branches, strict=True)
        for part in call.output[:, :channels].chunk(branches)
    ]
    return torch.stack([part[:count] for part in parts])


def fitted_weights(plan: StepPlan, steps: list[TappedStep], count: int) -> tuple[tuple[float, ...], bool]:
    """Return the weights of the branches that give the guided outputs of `steps`, and whether they are the only ones.

    Least squares, in float64, rounded to four places, which no guidance scale needs more of; what is not such a sum is
    found by the check. Equal branches (of an empty prompt and an empty negative one) have many solutions.
    """
    if sum(plan.branches) == 1:
        return (1.0,), True
    parts = [parts_of(plan, step, count).double().flatten(1) for step in steps]
    outputs = [step.output[:count].double().flatten() for step in steps]
    gram = torch.stack([part @ part.T for part in parts]).sum(0).cpu()
    moment = torch.stack([part @ output for part, output in zip(parts, outputs, strict=True)]).sum(0).cpu()
    eigenvalues = torch.linalg.eigvalsh(gram)
    solution = torch.linalg.lstsq(gram, moment[:, None], driver="gelsd").solution[:, 0]
    is_unique = bool(eigenvalues[0] > SINGULAR * eigenvalues[-1])
    return tuple(round(value, 4) for value in solution.tolist()), is_unique


def tolerance_of(plan: StepPlan) -> float:
    """Return how far guided outputs may be from the recorded ones: guidance multiplies what rounding does to them."""
    return TOLERANCE * max(1.0, sum(map(abs, plan.weights)))


def check_calls(plan: StepPlan, step: TappedStep) -> None:
    """Raise ValueError unless a step makes as many calls as the first one did."""
    if len(step.calls) != len(plan.branches):
        raise ValueError(
            f"a step makes {len(step.calls)} calls of the denoiser, and the first one {len(plan.branches)}; expected "
            "the same calls in each step (no guidance interval, no skipped layers)."
        )


def check_step(plan: StepPlan, step: TappedStep, count: int) -> None:
    """Raise ValueError unless a step's calls got its states, and its branches' weighted sum is the guided output."""
    copies = len(step.state) // count
    states = step.state.unflatten(0, (copies, count))
    if not torch.equal(states, states[:1].expand_as(states)):
        raise ValueError(f"the scheduler steps {len(step.state)} states for {count} images, and they differ.")
    check_calls(plan, step)
    for call, branches in zip(step.calls, plan.branches, strict=True):
        given = call.arguments[plan.state_name]
        wanted = torch.cat([states[0]] * branches)
        if given.shape != wanted.shape or not torch.equal(given.to(wanted.dtype), wanted):
            raise ValueError(
                f"{plan.state_name}: the denoiser is called with another tensor, {_shape(given)}, than the state that "
                f"the scheduler steps, {_shape(states[0])}: scaled, or with further channels. Such pipelines (in-"
                "painting, editing by channels) are not supported so far."
            )
    weights = torch.tensor(plan.weights, dtype=torch.float64).to(step.output.device, step.output.dtype)
    guided = torch.tensordot(weights, parts_of(plan, step, count), dims=1)
    error = distance(guided, step.output[:count])
    if error > tolerance_of(plan):
        raise ValueError(
            f"this pipeline does not combine its {len(weights)} branches in a weighted sum: the best one, "
            f"{plan.weights}, misses the guided output by {error:.1e} of its size (limit "
            f"{tolerance_of(plan):.0e}). Switch off what changes it (guidance_rescale, guidance intervals), or record "
            "without guidance."
        )


def timestep_of(call: ModelCall) -> Tensor:
    """Return the timestep of a call, (); raises ValueError where the rows of its batch have different ones."""
    timestep = torch.as_tensor(call.arguments["timestep"]).flatten()
    if not bool((timestep == timestep[0]).all()):
        raise ValueError("timestep: the denoiser is called with several timesteps at once; not supported so far.")
    return timestep[0].cpu()


def columns_of_step(plan: StepPlan, step: TappedStep, count: int) -> dict[str, Tensor]:
    """Return the condition of one step, (count, rows, ...) by column."""
    return _merged(
        values_of(template[name], value, path_of(index, len(plan.branches), name), count)
        for index, (template, call) in enumerate(zip(plan.arguments, step.calls, strict=True))
        for name, value in others_of(call, plan.state_name).items()
    )


def trajectories_of(plan: StepPlan, steps: list[TappedStep], count: int) -> tuple[dict[str, Tensor], set[str]]:
    """Return the columns of `count` trajectories, (count, ...), and the names of those that change with the step."""
    states = [*(step.state[:count] for step in steps), steps[-1].next_state[:count]]
    conditions = [columns_of_step(plan, step, count) for step in steps]
    varying = {
        name
        for name, first in conditions[0].items()
        if not all(first is other[name] or torch.equal(first, other[name]) for other in conditions[1:])
    }
    columns = {
        STATE: torch.stack(states, dim=1).float(),
        OUTPUT: torch.stack([step.output[:count] for step in steps], dim=1).float(),
    }
    for name, first in conditions[0].items():
        columns[name] = torch.stack([c[name] for c in conditions], dim=1) if name in varying else first
    return columns, varying


class Recorder:
    """What the first batch settles for all others: plan, grid and columns."""

    def __init__(self, pipeline: Any, plan: StepPlan, steps: list[TappedStep], count: int) -> None:
        for step in steps:
            check_calls(plan, step)
        weights, self.has_weights = fitted_weights(plan, steps, count)
        self.plan = replace(plan, weights=weights)
        grid = grid_in_use(pipeline.scheduler, [step.timestep for step in steps])
        self.grid = replace(grid, timestep=torch.stack([timestep_of(step.calls[0]) for step in steps]))
        values, self.varying = trajectories_of(self.plan, steps, count)
        self.columns = {
            name: ColumnShape(tuple(value.shape[1:]), value.dtype, name in self.varying)
            for name, value in values.items()
        }

    def take(self, steps: list[TappedStep], inputs: Inputs) -> pa.RecordBatch:
        """Return the rows of one batch, once its steps are those that plan and grid describe."""
        count = len(inputs)
        if len(steps) != len(self.grid):
            raise ValueError(f"expected {len(self.grid)} steps as in the first batch, got {len(steps)}.")
        if not self.has_weights:  # those so far would do with any
            weights, self.has_weights = fitted_weights(self.plan, steps, count)
            self.plan = replace(self.plan, weights=weights)
        for index, step in enumerate(steps):
            check_step(self.plan, step, count)
            if index and distance(step.state[:count], steps[index - 1].next_state[:count]) > TOLERANCE:
                raise ValueError(
                    f"step {index}: it starts from another state than the scheduler gave in the step before. "
                    "Pipelines that change the state between steps (in-painting with a mask) are not supported so far."
                )
            k = torch.full((count,), index)
            error = distance(self.grid.step(k, step.state[:count], step.output[:count]), step.next_state[:count])
            if error > TOLERANCE:
                raise ValueError(
                    f"step {index}: the scheduler's next state is {error:.1e} of its size away from that of the "
                    f"deterministic formula (limit {TOLERANCE:.0e}). Expected no added noise (eta=0) and no clipping "
                    "(clip_sample=False, thresholding=False)."
                )
        values, varying = trajectories_of(self.plan, steps, count)
        if not varying <= self.varying:
            raise ValueError(f"{sorted(varying - self.varying)[0]}: it changes with the step for some inputs only.")
        for name in self.varying - varying:
            values[name] = values[name][:, None].expand(-1, len(steps), *values[name].shape[1:])
        for name, column in self.columns.items():
            if tuple(values[name].shape[1:]) != column.shape:
                raise ValueError(
                    f"{name}: expected shape {column.shape} for each image, as of the first ones, got "
                    f"{tuple(values[name].shape[1:])}. Record inputs of one size, with prompts padded to one length."
                )
        return record_batch(self.columns, values, [input_text(item) for item in inputs])

    def agree(self, plans: Iterable[StepPlan | None]) -> None:
        """Go on with the first of `plans` whose weights were told apart, of those that processes found in a round."""
        for plan in plans:
            if plan is not None:
                self.plan, self.has_weights = plan, True
                return


@torch.no_grad()
def collect_calibration_set(
    pipeline: Any,
    inputs: Any = None,
    *,
    num_inference_steps: int,
    seed: int,
    num_trajectories: int | None = None,
    batch_size: int = 8,
    output_dir: str | Path | None = None,
    progress: bool = True,
    **call_arguments: Any,
) -> CalibrationSet:
    """Record deterministic trajectories of the full-precision `pipeline`, called as its user calls it.

    `inputs`: a prompt for each trajectory, or a dictionary of the pipeline's own arguments of one image (prompt,
    negative_prompt, class_labels, image ...), in a list or a column of a data set; or the `Path` of a text file; None
    for an unconditional pipeline. `call_arguments` are the same for all (guidance_scale, height, strength ...).
    `num_trajectories` defaults to the number of inputs; where it is more, they start over with other noise. Image i
    has a generator of its own, a function of `seed` and i. With `output_dir` the rows are written there as they come,
    and only a batch of them is in memory. Several processes record a batch each, and all return the whole set; the
    main one writes.

    Raises ValueError for a quantized model, one in half precision, fewer than 4 trajectories, a scheduler that no grid
    describes, and a pipeline whose steps, guidance or conditions are not what could be replayed: with the measured
    error, or the name of the argument.
    """
    name = denoiser_name(pipeline)
    model = getattr(pipeline, name)
    if getattr(model, "is_quantized", False) or fake_quant_layers(model):
        raise ValueError("the calibration set must come from the full-precision model, but this one is quantized.")
    check_float32(model)
    wanted = inputs_of(inputs, num_trajectories)
    check_positive(num_inference_steps=num_inference_steps, batch_size=batch_size)
    call_arguments_of(pipeline, wanted, call_arguments)  # refused before anything runs
    if output_dir is not None:
        check_replaceable(Path(output_dir))
    with restored(pipeline.scheduler):
        plan = plan_of(pipeline, wanted[0], seed, num_inference_steps, call_arguments)
    recorder: Recorder | None = None

    def batch_at(first: int) -> Inputs:
        return wanted[first : first + batch_size]

    def steps_of(first: int) -> list[TappedStep]:
        with noted_settings(pipeline.scheduler) as settings:
            steps = run_steps(pipeline, batch_at(first), first, seed, num_inference_steps, call_arguments, 0)
        manifest["mu"] = settings.get("mu")
        return steps

    def settled(steps: dict[int, list[TappedStep]]) -> tuple[Recorder, Any]:
        return Recorder(pipeline, plan, steps[0], len(batch_at(0))), manifest["mu"]

    def round_of(firsts: list[int]) -> list[pa.RecordBatch]:
        nonlocal recorder
        with together():
            steps = {first: steps_of(first) for first in share(firsts, place())}
        if recorder is None:
            recorder, manifest["mu"] = on_main(settled, steps)

        def taken(first: int) -> tuple[pa.RecordBatch, StepPlan | None]:
            return recorder.take(steps[first], batch_at(first)), recorder.plan if recorder.has_weights else None

        rows, plans = zip(*each(firsts, taken), strict=True)
        recorder.agree(plans)
        if not firsts[0]:  # what cannot be replayed is not recorded to its end
            on_main(check_replay, CalibrationSet(Dataset(pa.Table.from_batches([rows[0]])), *parts()), model)
        return list(rows)

    def batches() -> Iterator[pa.RecordBatch]:
        with tqdm(total=len(wanted), desc="calibration set", unit="image", disable=not progress) as bar:
            for firsts in in_turns(range(0, len(wanted), batch_size)):
                for rows in round_of(firsts):
                    yield rows
                    bar.update(rows.num_rows)

    manifest = {
        "model_hash": model_hash(model),
        "model_class": type(model).__name__,
        "pipeline_class": type(pipeline).__name__,
        "component": name,
        "scheduler": scheduler_settings(pipeline.scheduler),
        "scheduler_class": type(pipeline.scheduler).__name__,
        "num_inference_steps": num_inference_steps,  # as asked for; an image-to-image pipeline takes fewer
        "seed": seed,
        "inputs_sha256": hashlib.sha256("\n".join(map(input_text, wanted)).encode()).hexdigest(),
        "call_arguments": input_text(call_arguments),
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }

    def parts() -> tuple[Any, ...]:
        assert recorder is not None  # once a batch is there
        return recorder.columns, recorder.grid, recorder.plan, manifest

    with restored(pipeline.scheduler), together():
        if output_dir is None:
            return CalibrationSet(Dataset(pa.Table.from_batches(list(batches()))), *parts())
        if is_main():
            write_set(Path(output_dir), batches(), lambda: about_of(*parts()))
        else:
            deque(batches(), maxlen=0)
    return CalibrationSet.load(output_dir)


def check_replay(calibration: CalibrationSet, model: Any) -> float:
    """Return how far the recorded outputs are from those of `model`, called by what was recorded, in three steps.

    Relative to their size, of the first two trajectories. Raises ValueError above `tolerance_of` its plan.
    """
    denoiser, last = calibration.denoiser(model), calibration.num_inference_steps - 1
    rows = torch.arange(min(2, len(calibration)))
    worst = 0.0
    for step in sorted({0, last // 2, last}):
        calls = calibration.to(model.device).calls(rows, torch.full_like(rows, step))
        worst = max(worst, distance(denoiser(calls.state, calls.timestep, calls.condition), calls.output))
    limit = tolerance_of(calibration.plan)
    if worst > limit:
        raise ValueError(
            f"{type(model).__name__}: called again with what was recorded, its outputs are {worst:.1e} of their "
            f"size away from the recorded ones (limit {limit:.0e}). Something else acts on it: "
            "dropout, a hook, a cache, or TF32 on a GPU (torch.backends.cudnn.allow_tf32 = False)."
        )
    return worst
