"""Run a pipeline as its user does, with one generator an image, and keep what comes out: latents, pictures, states."""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_pqcad.compression.calling import Inputs, call_arguments_of, check_positive, distinct_inputs, quiet
from diffusers_pqcad.compression.denoiser import SchedulerStep, Stop, run_stepped
from diffusers_pqcad.compression.processes import each, in_turns
from diffusers_pqcad.compression.sampling import image_generator, sample_shape

DECODERS = ("vae", "vqvae", "movq", "vqgan")  # components that make pictures of latents, by name
MAX_STATE_BYTES = 2**30  # of one run's trajectories in memory, beyond its first batch: videos are large


class Samples(NamedTuple):
    """What a pipeline made of n images.

    `latents` (n, *S) float32: what its last scheduler step gave, in the model's range. `images` uint8, (n, C, H, W) or
    of videos (n, frames, C, H, W): the pipeline's own output; None where nothing was decoded.
    """

    latents: Tensor
    images: Tensor | None


class Trajectories(NamedTuple):
    """The N `timesteps` of a run, and its N + 1 `states`, (N + 1, n, *S) float32: before each step, and the last."""

    timesteps: tuple[float, ...]
    states: Tensor


@dataclass(frozen=True)
class PipelineRun:
    """A pipeline and how it is called. Image i gets input i, or of more images, they start over, and generator i.

    `decodes`: whether a call goes on after its last step, to the pictures.
    """

    pipeline: Any
    inputs: Inputs
    num_inference_steps: int
    seed: int
    arguments: dict[str, Any]
    decodes: bool = False


def run_of(
    pipeline: Any,
    inputs: Any,
    num_inference_steps: int,
    seed: int,
    arguments: dict[str, Any],
    *,
    decodes: bool = False,
) -> PipelineRun:
    """Return the run of `pipeline` for `inputs` as in `collect_calibration_set`; `decodes` only where it has pictures.

    Raises ValueError, before anything runs, for no inputs, arguments that the pipeline does not take, those that are
    given to each call in any case, and a number of steps that is not positive.
    """
    check_positive(num_inference_steps=num_inference_steps)
    found = distinct_inputs(inputs)
    if not found:
        raise ValueError("inputs: expected at least one, got none; leave them out for an unconditional pipeline.")
    call_arguments_of(pipeline, found, arguments)
    return PipelineRun(pipeline, found, num_inference_steps, seed, arguments, decodes and not makes_pixels(pipeline))


def makes_pixels(pipeline: Any) -> bool:
    """Return whether the states of `pipeline` are its images: no component decodes them."""
    return all(getattr(pipeline, name, None) is None for name in DECODERS)


def known_shape(run: PipelineRun) -> tuple[int, ...] | None:
    """Return (C, H, W) of the latents where they are known before the run: of unconditional pipelines of pixels."""
    takes_numbers_only = "batch_size" in inspect.signature(type(run.pipeline).__call__).parameters
    return sample_shape(run.pipeline.unet) if makes_pixels(run.pipeline) and takes_numbers_only else None


def generate_samples(
    pipeline: Any,
    inputs: Any = None,
    *,
    num_images: int,
    num_inference_steps: int,
    seed: int,
    batch_size: int = 8,
    progress: bool = True,
    description: str = "samples",
    **call_arguments: Any,
) -> Tensor:
    """Return final latents (num_images, *S) float32 on the CPU: what the last step of `pipeline`'s scheduler gave.

    Those of a pipeline of pixels are its images, about in [-1, 1] (`to_uint8`). Nothing is decoded. `pipeline` is any
    diffusers pipeline with one denoiser, called as its user calls it, in eval mode; it is not changed. `inputs` and
    `call_arguments` are those of `collect_calibration_set`; of more images than inputs, the inputs start over. Image i
    depends on its input, `seed` and i alone, also where steps draw noise: not on `batch_size`, beyond float rounding,
    and not on `num_images`. Several processes make a batch each, and all return all samples.

    Raises ValueError if `num_images`, `num_inference_steps` or `batch_size` is not positive, and for arguments that
    the pipeline does not take.
    """
    check_positive(num_images=num_images, batch_size=batch_size)
    run = run_of(pipeline, inputs, num_inference_steps, seed, call_arguments)
    return sampled(run, num_images, batch_size=batch_size, progress=progress, description=description)[0].latents


def generate_images(
    pipeline: Any,
    inputs: Any = None,
    *,
    num_images: int,
    num_inference_steps: int,
    seed: int,
    batch_size: int = 8,
    progress: bool = True,
    description: str = "images",
    **call_arguments: Any,
) -> Samples:
    """Return latents as `generate_samples` does, and the pictures that `pipeline` makes of them, as `Samples`.

    Raises ValueError as there, and for a pipeline whose output is neither pictures nor videos.
    """
    check_positive(num_images=num_images, batch_size=batch_size)
    run = run_of(pipeline, inputs, num_inference_steps, seed, call_arguments, decodes=True)
    samples, _ = sampled(run, num_images, batch_size=batch_size, progress=progress, description=description)
    return samples if run.decodes else Samples(samples.latents, to_uint8(samples.latents))


def sampled(
    run: PipelineRun,
    num_images: int,
    *,
    batch_size: int,
    progress: bool,
    description: str,
    max_trajectories: int = 0,
    check: Callable[[Samples], None] | None = None,
) -> tuple[Samples, Trajectories | None]:
    """Return the samples of `run`, and the trajectories of its first images, `max_trajectories` at most (0: None).

    `check` gets the first batch: what it raises ends the run there.
    """
    batches: list[Samples] = []
    trajectories: list[Trajectories] = []
    bar = tqdm(total=num_images, desc=description, unit="image", disable=not progress)

    def batch_at(first: int) -> tuple[Samples, Trajectories | None]:
        count = min(batch_size, num_images - first)
        return batch_of(run, first, count, max(0, min(count, max_trajectories - first)))

    with untouched(run.pipeline), bar:
        for firsts in in_turns(range(0, num_images, batch_size)):
            for first, (samples, states) in zip(firsts, each(firsts, batch_at), strict=True):
                count = len(samples.latents)
                if check is not None and first == 0:
                    check(samples)
                batches.append(samples)
                wanted = max(0, min(count, max_trajectories - first))  # fewer than were kept, after the first batch
                if states is not None and wanted:
                    trajectories.append(states._replace(states=states.states[:, :wanted]))
                    room = MAX_STATE_BYTES // (4 * states.states[:, 0].numel())
                    max_trajectories = min(max_trajectories, max(count, room))
                bar.update(count)
    pictures = [batch.images for batch in batches if batch.images is not None]
    samples = Samples(torch.cat([batch.latents for batch in batches]), torch.cat(pictures) if pictures else None)
    if not trajectories:
        return samples, None
    return samples, Trajectories(trajectories[0].timesteps, torch.cat([item.states for item in trajectories], dim=1))


def batch_of(run: PipelineRun, first: int, count: int, num_trajectories: int) -> tuple[Samples, Trajectories | None]:
    """Return what one call of `run` for images `first` and following makes, and the states of `num_trajectories`."""
    timesteps: list[float] = []
    states: list[Tensor] = []
    latents = torch.empty(0)

    def on_step(step: SchedulerStep) -> None:
        nonlocal latents
        timesteps.append(number(step.timestep))
        if num_trajectories:
            states.append(kept(step.state, num_trajectories))
        latents = kept(step.next_state, count)  # the first copy, where guidance has two
        if not run.decodes and is_last(run.pipeline.scheduler, timesteps):
            raise Stop

    output = call(run, first, count, on_step)
    if not timesteps:
        raise ValueError(f"{type(run.pipeline).__name__}: it ran without a step of its scheduler.")
    samples = Samples(latents, pictures_of(output, count) if run.decodes else None)
    if not num_trajectories:
        return samples, None
    return samples, Trajectories(tuple(timesteps), torch.stack([*states, latents[:num_trajectories]]))


def call(run: PipelineRun, first: int, count: int, on_step: Callable[[SchedulerStep], None]) -> Any:
    """Call the pipeline of `run` for `count` images from `first`, and return its output; None after a Stop."""
    batch = [run.inputs[index % len(run.inputs)] for index in range(first, first + count)]
    # Of the CPU, so that every device starts from the same noise; half precision rounds it.
    arguments = call_arguments_of(run.pipeline, batch, run.arguments) | {
        "generator": [image_generator(run.seed, index) for index in range(first, first + count)],
        "num_inference_steps": run.num_inference_steps,
    }
    if run.decodes:
        arguments["output_type"] = "pt"
    with torch.no_grad():
        return run_stepped(run.pipeline, on_step, **arguments)


def kept(state: Tensor, count: int) -> Tensor:
    """Return a copy of the first `count` images of `state`, float32 on the CPU."""
    return state[:count].detach().to("cpu", torch.float32, copy=True)


def number(timestep: Any) -> float:
    """Return a timestep as a Python number: an int where it is an integer."""
    return timestep.item() if isinstance(timestep, Tensor) else timestep


def is_last(scheduler: Any, timesteps: list[float]) -> bool:
    """Return whether `timesteps`, taken so far, end with the scheduler's last; some take it twice (Heun)."""
    grid = [float(timestep) for timestep in scheduler.timesteps]
    return [float(timestep) for timestep in timesteps].count(grid[-1]) == grid.count(grid[-1])


def pictures_of(output: Any, count: int) -> Tensor:
    """Return the pictures in a pipeline's `output` as uint8: (n, C, H, W), or of videos (n, frames, C, H, W).

    Raises ValueError where it does not hold `count` pictures or videos, and for a NaN.
    """
    found = output[0]
    if isinstance(found, np.ndarray) and found.ndim > 2:  # some know no "pt"; channels are last
        found = torch.from_numpy(found).movedim(-1, -3)
    if not isinstance(found, Tensor) or found.ndim not in (4, 5) or len(found) != count:
        arrived = f"shape {tuple(found.shape)}" if isinstance(found, Tensor | np.ndarray) else type(found).__name__
        raise ValueError(
            f"output: expected pictures or videos of {count} images, got {arrived}. Measure the latents alone: "
            "decode=False in evaluate, or generate_samples."
        )
    return _levels(255 * found.float(), "pictures")


def to_uint8(samples: Tensor) -> Tensor:
    """Return `samples` (float, [-1, 1] is the full range) as uint8 in [0, 255], rounded and clamped, in their shape.

    Raises ValueError for a NaN, which no integer stands for.
    """
    return _levels((samples.float() + 1) * 127.5, "samples")


def _levels(values: Tensor, name: str) -> Tensor:
    if values.isnan().any():
        raise ValueError(f"{name}: expected numbers, got a NaN. Find the layer or step that made it before measuring.")
    return values.round().clamp(0, 255).to("cpu", torch.uint8)


@contextmanager
def untouched(pipeline: Any) -> Iterator[None]:
    """Run the body with models in eval mode (no dropout), a copy of the scheduler and no bars; then restore all."""
    models = [model for model in pipeline.components.values() if isinstance(model, nn.Module)]
    modes = {module: module.training for model in models for module in model.modules()}
    scheduler = pipeline.scheduler
    for model in models:
        model.eval()
    pipeline.scheduler = copy.deepcopy(scheduler)
    try:
        with quiet(pipeline):
            yield
    finally:
        pipeline.scheduler = scheduler
        for module, mode in modes.items():
            module.training = mode
