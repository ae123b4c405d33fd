"""A pipeline without its weights: what it is called with, and how it calls its denoiser, from configs and headers.

The denoiser is on meta, where operators know shapes and no numbers. In its place the pipeline has a stand-in that
answers with noise of the right shapes: steps, branches and guidance are seen as in a recording, at no cost.
"""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from diffusers_pqcad.compression.calibration import input_text, split_by_input
from diffusers_pqcad.compression.calling import distinct_inputs, inputs_of
from diffusers_pqcad.compression.denoiser import DENOISERS, Denoiser, StepPlan
from diffusers_pqcad.compression.recording import Recorder, columns_of_step, plan_of, restored, run_steps
from diffusers_pqcad.loading.saved import SavedModel, class_of, skeleton
from diffusers_pqcad.publishing.pipelines import (
    CALIBRATION_SEED_OFFSET,
    Teacher,
    as_recorded,
    call_arguments,
    check_adapter,
    check_folding,
    check_teacher,
    denoiser_of,
    inputs_of_run,
    loading_arguments,
    prompts_of,
)
from diffusers_pqcad.publishing.settings import CompressConfig, Settings
from diffusers_pqcad.publishing.validation import check_validation

FEW_LAYERS = 2  # of a text encoder: as many hidden states as pipelines take, and no more work than that


@dataclass(frozen=True, eq=False)
class Outline:
    """A teacher without weights, and how a run would record it.

    `model` is its denoiser, on meta, in float32. `plan` says how a step calls it; `state` (1, *S), `timestep` (1,) and
    `condition` are those of one image, on meta. `num_steps` are recorded of each trajectory, `num_train` and
    `num_held_out` of the trajectories are trained and measured on. `folding_error` says why a student cannot answer in
    one branch; None where it can.
    """

    teacher: Teacher
    model: nn.Module
    plan: StepPlan
    num_steps: int
    num_train: int
    num_held_out: int
    state: Tensor
    timestep: Tensor
    condition: dict[str, Tensor]
    prompts: list[str]
    folding_error: ValueError | None = None

    @property
    def branches(self) -> int:
        """Rows that a step of the teacher computes for an image."""
        return sum(self.plan.branches)

    def call(self, model: nn.Module, num_images: int, *, branches: int | None = None, device: str = "cpu") -> Tensor:
        """Return what a step of `model` gives for `num_images` images, (n, *S).

        It is called as the teacher is, by default, or by one of its branches, with guidance folded.
        """
        plan = self.plan if branches in (None, self.branches) else self.plan.folded()
        state, condition = (
            tree_map_only(Tensor, lambda one: repeated(one, num_images, device), tree)
            for tree in (self.state, self.condition)
        )
        return Denoiser(model, plan)(state, repeated(self.timestep, num_images, device), condition)


def calls_of_parts(
    outline: Outline, model: nn.Module, names: Sequence[str], device: str = "cpu"
) -> dict[str, tuple[Any, Any, Any]]:
    """Return the arguments, those by name, and the output of each part of `model` in a step for one image."""
    seen: dict[str, tuple[Any, Any, Any]] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen[name] = args, kwargs, output

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(keep(name), with_kwargs=True) for name in names]
    with torch.no_grad():
        outline.call(model, 1, device=device)
    for hook in hooks:
        hook.remove()
    return seen


def repeated(one: Tensor, count: int, device: str) -> Tensor:
    """Return `count` rows like the one of `one` (1, ...), on `device`: of ones where there are numbers."""
    return torch.ones((count, *one.shape[1:]), dtype=one.dtype, device=device)


def outline_of(settings: Settings, path: str, models: Mapping[str, SavedModel]) -> Outline:
    """Return the outline of the pipeline in `path`, a folder or a repository, with the `models` of that.

    Raises ValueError where the run would be refused.
    """
    run = settings.run
    prompts = prompts_of(run, path)
    pipeline = outlined_pipeline(path, models, **loading_arguments(run))
    stand_in = denoiser_of(pipeline)
    check_adapter(pipeline, run, settings.distillation)
    check_teacher(pipeline, run, settings.quantization, prompts)
    check_validation(pipeline, run)
    teacher = as_recorded(pipeline)
    inputs, common = inputs_of(inputs_of_run(run, prompts).recorded, run.num_trajectories), call_arguments(run)
    with restored(teacher.pipeline.scheduler), torch.no_grad():
        plan = plan_of(teacher.pipeline, inputs[0], run.seed, run.num_inference_steps, common)
        seed = run.seed + CALIBRATION_SEED_OFFSET
        steps = run_steps(teacher.pipeline, inputs[:1], 0, seed, run.num_inference_steps, common, 0)
        recorder = Recorder(teacher.pipeline, plan, steps, 1)
    train, held_out = split_by_input([input_text(item) for item in inputs])
    condition = columns_of_step(recorder.plan, steps[0], 1)
    return Outline(
        teacher,
        stand_in.real,
        recorder.plan,
        len(recorder.grid),
        len(train),
        len(held_out),
        steps[0].state[:1].to("meta", torch.float32),
        recorder.grid.timestep[:1].to("meta"),
        tree_map_only(Tensor, lambda value: value.to("meta"), condition),
        prompts,
        folding_error_of(teacher.pipeline, run, recorder.plan, prompts),
    )


def folding_error_of(teacher: Any, run: CompressConfig, plan: StepPlan, prompts: Sequence[str]) -> ValueError | None:
    """Return why no student can answer in one branch what the teacher gives by `plan`; None where one can."""
    try:
        check_folding(teacher, run, plan.folded(), prompts)
    except ValueError as error:
        return error
    return None


def example_of(outline: Outline, settings: Settings) -> dict[str, Any]:
    """Return the first of the inputs that are recorded."""
    return distinct_inputs(inputs_of_run(settings.run, outline.prompts).recorded)[0]


def outlined_pipeline(path: str, models: Mapping[str, SavedModel], **loading: Any) -> Any:
    """Return the pipeline in `path` without weights: its denoiser is a stand-in, other models are small or on meta."""
    parts = {name: outlined_part(name, saved) for name, saved in models.items()}
    return DiffusionPipeline.from_pretrained(path, **parts, **loading)


def outlined_part(name: str, saved: SavedModel) -> nn.Module | None:
    """Return what stands for a model of a pipeline; None for one of no library, such as a safety checker."""
    try:
        kind: Any = class_of(saved.config)
    except ValueError:
        return None
    if "_class_name" in saved.config:
        model = skeleton(saved).to("meta").float()
        return stand_in_for(model) if name in DENOISERS else as_if_on_cpu(model)
    config = kind.config_class.from_dict(dict(saved.config))
    for part in {id(one): one for one in (config, getattr(config, "text_config", config))}.values():
        if hasattr(part, "num_hidden_layers"):
            part.num_hidden_layers = min(FEW_LAYERS, part.num_hidden_layers)
    return kind(config).eval()


def derived(model: nn.Module, **attributes: Any) -> nn.Module:
    """Return `model` as one of a class derived from its own, by the same name, that has other `attributes`."""
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"__module__": kind.__module__, **attributes})
    return model


def as_if_on_cpu(model: nn.Module) -> nn.Module:
    """Return `model`, on meta, which says that it is on the CPU: pipelines make their inputs there."""
    return derived(model, device=property(lambda self: torch.device("cpu")))


def stand_in_for(model: nn.Module) -> nn.Module:
    """Return a module like `model`, on meta, that takes inputs on the CPU and answers with noise of the right shapes.

    `model` itself is its attribute `real`.
    """
    generator = torch.Generator().manual_seed(0)
    forward = type(model).forward

    @functools.wraps(forward)
    def answer(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        on_meta = tree_map_only(Tensor, lambda value: value.to("meta"), (args, kwargs))
        shaped = forward(vars(self)["real"], *on_meta[0], **on_meta[1])
        return tree_map_only(Tensor, lambda one: torch.randn(one.shape, generator=generator).to(one.dtype), shaped)

    found = as_if_on_cpu(derived(copy.copy(model), forward=answer))
    vars(found)["real"] = model  # not a part of it
    return found
