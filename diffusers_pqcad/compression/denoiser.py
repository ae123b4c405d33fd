"""A model as one step of a pipeline calls it: all that PQ, CAD and evaluation know of conditions and guidance.

A step may call its model once or several times, with one or several branches in a batch (with a prompt and without).
What the sampler takes is a weighted sum of the branches' outputs: (1 - g, g) is classifier-free guidance at scale g
(Ho & Salimans 2022, arXiv:2207.12598, eq. 6). Everything that a pipeline hands to its model beside the state and the
timestep is data here: it is recorded once, and handed to the model again.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from diffusers_pqcad.compression.grid import Grid

# Tensors of n images by the names of columns, (n, rows, ...): the rows of one image in the model's batch.
Condition = dict[str, Tensor]
DENOISERS = ("unet", "transformer")  # components of a pipeline, by name
STEP_ARGUMENTS = ("model_output", "timestep", "sample")  # of every scheduler's `step`
WEIGHTS_TOLERANCE = 1e-3  # of the branches' weights, which are fitted and rounded to four places


class Column(NamedTuple):
    """The place of a tensor with a batch axis in the arguments of a call: `rows` of its batch belong to an image.

    They are the recorded ones from `start` on: a folded plan has those of one branch.
    """

    name: str
    rows: int
    start: int = 0


class Repeated(NamedTuple):
    """The place of a list with the same `item` for each row of the batch."""

    item: Any
    rows: int


@dataclass(frozen=True)
class StepPlan:
    """How one step calls its model.

    Each call of the step has `branches` rows for an image; `weights` has one for each branch of all calls, in order.
    `arguments`, of each call: what the model gets beside state and timestep, nested as it takes it, with Columns in
    the place of tensors that have a batch axis. Everything else is the same for all images and steps.
    """

    state_name: str = "sample"
    branches: tuple[int, ...] = (1,)
    weights: tuple[float, ...] = (1.0,)
    arguments: tuple[dict[str, Any], ...] = ({},)

    @property
    def is_guided(self) -> bool:
        """Whether two branches are combined by (1 - g, g), in any order, with a guidance scale g above 1."""
        return len(self.weights) == 2 and max(self.weights) > 1 and abs(sum(self.weights) - 1) < WEIGHTS_TOLERANCE

    def folded(self) -> "StepPlan":
        """Return the plan of a model that answers in one call for one branch what this one gives in two.

        The branch is the conditional one, that of the weight g. Raises ValueError where there is no such branch, and
        for an argument whose rows cannot be shared out among the branches.
        """
        if not self.is_guided:
            raise ValueError(
                f"fold_guidance: expected a model that is guided by two branches of weights (1 - g, g), g above 1, "
                f"got weights {self.weights}. There is nothing to fold: leave fold_guidance out, or record with a "
                "guidance_scale above 1."
            )
        branch = self.weights.index(max(self.weights))
        call, place = (0, branch) if len(self.branches) == 1 else (branch, 0)
        arguments = _of_branch(self.arguments[call], place, self.branches[call])
        return StepPlan(self.state_name, (1,), (1.0,), (arguments,))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as dictionaries and lists over tensors and plain values."""
        return {
            "state_name": self.state_name,
            "branches": list(self.branches),
            "weights": list(self.weights),
            "arguments": [_plain(call) for call in self.arguments],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "StepPlan":
        """Return the plan that `to_dict` wrote."""
        arguments = tuple(_unplain(call) for call in values["arguments"])
        return cls(values["state_name"], tuple(values["branches"]), tuple(values["weights"]), arguments)


def _plain(node: Any) -> Any:
    """Return a node of a plan's arguments as dictionaries and lists; one key says what a dictionary stands for."""
    if isinstance(node, Column):
        return {"column": [*node]}
    if isinstance(node, Repeated):
        return {"repeated": [_plain(node.item), node.rows]}
    if isinstance(node, dict):
        return {"dict": {key: _plain(item) for key, item in node.items()}}
    return [_plain(item) for item in node] if isinstance(node, list) else node


def _unplain(node: Any) -> Any:
    if isinstance(node, list):
        return [_unplain(item) for item in node]
    if not isinstance(node, dict):
        return node
    ((kind, value),) = node.items()
    if kind == "column":
        return Column(*value)
    if kind == "repeated":
        return Repeated(_unplain(value[0]), value[1])
    return {key: _unplain(item) for key, item in value.items()}


def _of_branch(node: Any, branch: int, branches: int) -> Any:
    """Return a node of a plan's arguments for one of the `branches` of a call, which follow each other in its rows."""
    if isinstance(node, dict):
        return {key: _of_branch(item, branch, branches) for key, item in node.items()}
    if isinstance(node, list):
        return [_of_branch(item, branch, branches) for item in node]
    if not isinstance(node, Column | Repeated):
        return node
    rows, rest = divmod(node.rows, branches)
    if rest:
        name = node.name if isinstance(node, Column) else "a list"
        raise ValueError(
            f"fold_guidance: {name} has {node.rows} rows for each image, which {branches} branches cannot share. Set "
            "fold_guidance to False: the student keeps both branches then."
        )
    if isinstance(node, Repeated):
        return Repeated(node.item, rows)
    return Column(node.name, rows, node.start + branch * rows)


def _filled(node: Any, condition: Condition, like: Tensor) -> Any:
    """Return a node of a plan's arguments for the images of `like` (n, ...), branch by branch as pipelines do it."""
    if isinstance(node, Column):
        return condition[node.name][:, node.start : node.start + node.rows].transpose(0, 1).flatten(0, 1)
    if isinstance(node, Repeated):
        return [_filled(node.item, condition, like)] * (node.rows * len(like))
    if isinstance(node, dict):
        return {key: _filled(item, condition, like) for key, item in node.items()}
    if isinstance(node, list):
        return [_filled(item, condition, like) for item in node]
    return node.to(like.device) if isinstance(node, Tensor) else node


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """Return the dtype of the parameters of `model`; None where it has none."""
    return getattr(next(model.parameters(), None), "dtype", None)


@dataclass(frozen=True)
class Denoiser:
    """A model, and how a step calls it; called with states, timesteps and conditions, it returns guided outputs.

    A model in bf16 gets its arguments so; outputs have the dtype of the states.
    """

    model: nn.Module
    plan: StepPlan = StepPlan()

    def call(self, index: int, state: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Return the output of call `index` of a step, (branches * n, *S'), for `state` (n, *S), `timestep` (n,)."""
        plan, copies = self.plan, self.plan.branches[index]
        arguments = {plan.state_name: torch.cat([state] * copies)} | _filled(plan.arguments[index], condition, state)
        timestep = torch.cat([timestep] * copies)
        if dtype_of(self.model) != torch.bfloat16:
            return self.model(**arguments, timestep=timestep)[0].to(state.dtype)
        # As pipelines call a model in half precision. Not the timestep, of which bf16 has few.
        arguments = tree_map_only(Tensor, lambda x: x.bfloat16() if x.is_floating_point() else x, arguments)
        return self.model(**arguments, timestep=timestep)[0].to(state.dtype)

    def __call__(self, state: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Return the weighted sum of the branches' outputs, (n, *S).

        Channels beyond those of the state are a predicted variance, which no deterministic step takes.
        """
        parts: list[Tensor] = []
        for index, branches in enumerate(self.plan.branches):
            parts += self.call(index, state, timestep, condition)[:, : state.shape[1]].chunk(branches)
        if self.plan.weights == (1.0,):
            return parts[0]
        return torch.stack([w * part for w, part in zip(self.plan.weights, parts, strict=True)]).sum(0)


@torch.no_grad()
def states_of(denoiser: Denoiser, grid: Grid, state: Tensor, condition_at: Callable[[int], Condition]) -> list[Tensor]:
    """Return the states (n, *S) before each step of `grid`, and the final ones: N + 1 of them, from noise `state`.

    `condition_at(k)` is the condition of step k.
    """
    states = [state]
    for index in range(len(grid)):
        k = torch.full((len(state),), index)
        timestep = grid.timestep[k].to(state.device)
        states.append(grid.step(k, states[-1], denoiser(states[-1], timestep, condition_at(index))))
    return states


def denoiser_name(pipeline: Any) -> str:
    """Return the name of the component of `pipeline` that denoises: "unet" or "transformer".

    Raises ValueError where there is none, or where two share the steps among them.
    """
    found = [name for name in DENOISERS if getattr(pipeline, name, None) is not None]
    others = [name for name in ("transformer_2", "unet_2") if getattr(pipeline, name, None) is not None]
    if len(found) != 1 or others:
        raise ValueError(
            f"{type(pipeline).__name__}: expected one component that denoises, {' or '.join(DENOISERS)}, found "
            f"{[*found, *others]}."
        )
    return found[0]


def pipeline_with(pipeline: Any, model: nn.Module) -> Any:
    """Return a pipeline like `pipeline`, with the same components but for its denoiser, which is `model`."""
    return with_components(pipeline, **{denoiser_name(pipeline): model})


def with_components(pipeline: Any, **components: Any) -> Any:
    """Return a copy of `pipeline` with other `components`; what else its config says stays as it is."""
    copied = copy.copy(pipeline)  # not by its class: settings that are no components would be the class's own again
    copied.register_modules(**components)
    return copied


class ModelCall(NamedTuple):
    """One call of a model: all its arguments by name, and its first output."""

    arguments: dict[str, Any]
    output: Tensor


class TappedStep(NamedTuple):
    """What a pipeline did in one step: its model calls, and what its scheduler was called with and gave."""

    calls: list[ModelCall]
    timestep: Any
    state: Tensor
    output: Tensor
    next_state: Tensor


class Stop(Exception):
    """Ends a pipeline's call: everything wanted of it has been seen."""


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call of `model` by name; those of `**kwargs` among them."""
    signature = inspect.signature(getattr(model, "_orig_mod", model).forward)  # that of a compiled model is (*args)
    bound = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound |= bound.pop(name, {})
    return bound


class SchedulerStep(NamedTuple):
    """One call of a scheduler's `step`: what it was called with, and the state that it gave."""

    timestep: Any
    state: Tensor
    output: Tensor
    next_state: Tensor


def run_stepped(pipeline: Any, on_step: Callable[[SchedulerStep], None], **arguments: Any) -> Any:
    """Call `pipeline(**arguments)`, hand each SchedulerStep to `on_step`, and return what the call returns.

    `on_step` may raise Stop: the call ends there (no decoding), and None is returned. The pipeline is left as it was;
    its models are not touched, so that a compiled one runs as it is.
    """
    scheduler = pipeline.scheduler
    original, own = scheduler.step, vars(scheduler).get("step")  # `own`: somebody else's wrapper

    @functools.wraps(original)  # pipelines look at its signature: does it take eta, or a generator?
    def step(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        given = dict(zip(STEP_ARGUMENTS, args, strict=False)) | kwargs  # some pipelines give them by name
        output, timestep, sample = (given[name] for name in STEP_ARGUMENTS)
        on_step(SchedulerStep(timestep, sample, output, result[0]))
        return result

    model = getattr(pipeline, denoiser_name(pipeline))
    processors = dict(getattr(model, "attn_processors", {}))  # some pipelines take theirs out at their end
    scheduler.step = step
    try:
        return pipeline(**arguments)
    except Stop:
        if hasattr(pipeline, "maybe_free_model_hooks"):
            pipeline.maybe_free_model_hooks()  # as the pipeline itself does at its end
        return None
    finally:
        del scheduler.step
        if own is not None:
            scheduler.step = own
        if dict(getattr(model, "attn_processors", {})) != processors:
            model.set_attn_processor(processors)


def run_tapped(pipeline: Any, on_step: Callable[[TappedStep], None], **arguments: Any) -> Any:
    """Call `pipeline` as `run_stepped` does, and hand each step to `on_step` with the calls of the model in it."""
    calls: list[ModelCall] = []

    def seen(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append(ModelCall(named_arguments(module, args, kwargs), output[0]))

    def step(seen_step: SchedulerStep) -> None:
        made = list(calls)
        calls.clear()
        on_step(TappedStep(made, *seen_step))

    hook = getattr(pipeline, denoiser_name(pipeline)).register_forward_hook(seen, with_kwargs=True)
    try:
        return run_stepped(pipeline, step, **arguments)
    finally:
        hook.remove()
