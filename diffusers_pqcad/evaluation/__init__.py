"""Compare a pipeline with a reference pipeline: fidelity for the same seeds, distribution, size and speed."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from math import isinf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_pqcad.compression.fake_quant import fake_quant_layers
from diffusers_pqcad.compression.grid import ddim_grid
from diffusers_pqcad.compression.sampling import denoise, generate, initial_noise, sample_shape
from diffusers_pqcad.evaluation.extras import require
from diffusers_pqcad.evaluation.features import FeatureExtractor, extract_features, load_extractor
from diffusers_pqcad.evaluation.metrics import (
    bootstrap_interval,
    feature_statistics,
    frechet_distance,
    image_mse,
    kernel_distance,
    median_sqnr_db,
    psnr_db,
    reference_variance,
    sqnr_db,
    trajectory_error,
)
from diffusers_pqcad.evaluation.speed import (
    Latency,
    directory_size_bytes,
    environment,
    interleaved_latency,
    layers_by_kernel,
    tensor_bytes,
)
from diffusers_pqcad.layers.find import kernel_cache_bytes
from diffusers_pqcad.loading.coverage import average_bits, coverage

__all__ = ["EvaluationReport", "evaluate", "generate_samples", "load_extractor", "to_uint8"]

MAX_TRAJECTORY_IMAGES = 16  # enough for a mean curve; a trajectory costs as much as its samples
MAX_KERNEL_SUBSET = 1000  # Binkowski et al. 2018


@dataclass(frozen=True)
class EvaluationReport:
    """What `evaluate` measured; a field that was not measured is None.

    Sample i of both pipelines starts from the same noise. Ratios are in dB, sizes in bytes, latencies in milliseconds
    per image. `sqnr_interval_db` is the 95 % bootstrap interval over images, `sqnr_median_db` the SQNR of the median
    image. `trajectory_error[k]` is the relative squared error of z at `trajectory_timesteps[k]`; timestep -1 is the
    final image. The distances carry the name `metric_name` of their extractor and compare only at equal `num_images`.
    """

    num_images: int
    num_inference_steps: int
    reference_num_inference_steps: int
    seed: int
    sqnr_db: float
    sqnr_interval_db: tuple[float, float]
    sqnr_median_db: float
    psnr_db: float
    trajectory_timesteps: tuple[int, ...] | None
    trajectory_error: tuple[float, ...] | None
    trajectory_num_images: int | None
    metric_name: str | None
    frechet_distance: float | None
    kernel_distance: float | None
    kernel_distance_sd: float | None
    kernel_subset_size: int | None
    extractor_sha256: str | None
    extractor_reference_sha256: str | None
    size_bytes: int | None  # on disk
    tensor_bytes: int  # of the denoiser, in memory
    average_bits: float  # over the quantized weights, 32 for a float32 model
    average_bits_all: float  # over all weights
    packed_share: float  # of all weights
    kernel_cache_bytes: int  # int8 copies that kernels held in memory beside the packed weights
    kernels: dict[str, int]  # quantized layers by the kernel that computes them, in these times
    latency_ms: Latency
    reference_latency_ms: Latency
    latency_batch_size: int
    environment: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; an infinite ratio (an exact copy) becomes the string "inf"."""
        latencies = {name: getattr(self, name)._asdict() for name in ("latency_ms", "reference_latency_ms")}
        return {name: _jsonable(value) for name, value in (asdict(self) | latencies).items()}


def to_uint8(samples: Tensor) -> Tensor:
    """Return `samples` (float, [-1, 1] is the full range) as uint8 in [0, 255], rounded and clamped, in their shape.

    Raises ValueError for a NaN, which no integer stands for.
    """
    if samples.isnan().any():
        raise ValueError("samples: expected numbers, got a NaN. Find the layer or step that made it before measuring.")
    return ((samples.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def generate_samples(
    pipeline: Any,
    *,
    num_images: int,
    num_inference_steps: int,
    seed: int,
    batch_size: int = 64,
    progress: bool = True,
    description: str = "samples",
) -> Tensor:
    """Return final samples (num_images, C, H, W) float32 on the CPU, in the model's range (about [-1, 1]).

    `pipeline` is an unconditional diffusers pipeline with `unet` and a DDIM `scheduler`; neither is changed. Image i
    depends on `seed` and i alone: not on `batch_size`, beyond float rounding, and not on `num_images`.

    Raises ValueError if `num_images` or `batch_size` is not positive, or where the scheduler cannot run
    `num_inference_steps` (see `diffusers_pqcad.compression.grid.ddim_grid`).
    """
    _check_positive(num_images=num_images, batch_size=batch_size)
    ddim_grid(pipeline.scheduler, num_inference_steps)
    samples = []
    bar = tqdm(total=num_images, desc=description, unit="image", disable=not progress)
    with _eval_mode(pipeline.unet), bar:
        for start in range(0, num_images, batch_size):
            noise = _noise(pipeline.unet, seed=seed, start=start, count=min(batch_size, num_images - start))
            final = generate(pipeline.unet, copy.deepcopy(pipeline.scheduler), noise, num_inference_steps)
            samples.append(final.float().cpu())
            bar.update(len(noise))
    return torch.cat(samples)


def evaluate(
    pipeline: Any,
    reference: Any,
    *,
    num_images: int,
    num_inference_steps: int,
    seed: int,
    extractor: FeatureExtractor | None = None,
    reference_num_inference_steps: int | None = None,
    batch_size: int = 64,
    num_latency_rounds: int = 3,
    latency_batch_size: int = 8,
    progress: bool = True,
    reference_samples: Tensor | None = None,
    weights_path: str | Path | None = None,
) -> EvaluationReport:
    """Return how close `pipeline` comes to `reference` for the same noise, and what it costs.

    Both are unconditional diffusers pipelines with `unet` and a DDIM `scheduler`; `reference` runs
    `reference_num_inference_steps` (default: as many as `pipeline`). `extractor` adds the Frechet and the kernel
    distance to its reference set. `weights_path` is the saved model, a file or folder, whose bytes are reported.
    `reference_samples`, from `generate_samples(reference, ...)` with the same seed and the reference's steps, saves
    generating them again for every model; further images in it are not used.

    The error along the trajectory is measured where the two timestep grids nest, at their common timesteps, on
    the first MAX_TRAJECTORY_IMAGES images.

    Raises ValueError for fewer than two images, too few or misshapen `reference_samples`, models whose samples
    differ in shape, or step counts that a scheduler cannot run; MissingExtraError, before any sample, where a package
    of the extra "eval" that is needed later is not installed.
    """
    require("eval", "scipy")
    if extractor is not None:
        require("eval", "torchmetrics")
    if num_images < 2:
        raise ValueError(f"num_images={num_images}: expected at least 2, for a spread over images.")
    _check_positive(batch_size=batch_size)
    _check_positive(num_latency_rounds=num_latency_rounds, latency_batch_size=latency_batch_size)
    reference_steps = num_inference_steps if reference_num_inference_steps is None else reference_num_inference_steps
    shape, reference_shape = sample_shape(pipeline.unet), sample_shape(reference.unet)
    if shape != reference_shape:
        raise ValueError(
            f"pipeline: expected samples of shape {reference_shape} as the reference makes, got {shape}. Compare with "
            "the model that this one was made from."
        )
    if fake_quant_layers(pipeline.unet):
        raise ValueError(
            "pipeline: its weights are only rounded in simulation, so its size and time would mean nothing. Measure "
            "convert_(copy.deepcopy(unet)) in its place."
        )
    timesteps = _common_timesteps(pipeline.scheduler, num_inference_steps, reference.scheduler, reference_steps)

    seeding: dict[str, Any] = {"num_images": num_images, "seed": seed, "batch_size": batch_size, "progress": progress}
    if reference_samples is None:
        reference_samples = generate_samples(
            reference, num_inference_steps=reference_steps, description="reference samples", **seeding
        )
    elif len(reference_samples) < num_images or tuple(reference_samples.shape[1:]) != shape:
        raise ValueError(
            f"reference_samples: expected at least {num_images} images of shape {shape}, got shape "
            f"{tuple(reference_samples.shape)}. Make them with generate_samples(reference, num_images={num_images}, "
            f"num_inference_steps={reference_steps}, seed={seed})."
        )
    wanted = reference_samples[:num_images].float()
    is_reference = (pipeline.unet, pipeline.scheduler) == (reference.unet, reference.scheduler)
    if is_reference and num_inference_steps == reference_steps:
        samples = wanted
    else:
        samples = generate_samples(pipeline, num_inference_steps=num_inference_steps, **seeding)

    error_curve: tuple[float, ...] | None = None
    if timesteps is not None:
        counting = seeding | {"num_images": min(num_images, MAX_TRAJECTORY_IMAGES)}
        error_curve = tuple(
            _mean_trajectory_error(
                (pipeline, num_inference_steps), (reference, reference_steps), timesteps, **counting
            ).tolist()
        )
    average_bits, average_bits_all = _average_bits(pipeline.unet)
    covered = coverage(pipeline.unet)
    latency, reference_latency = _latencies(
        (pipeline, num_inference_steps), (reference, reference_steps), seed, latency_batch_size, num_latency_rounds
    )
    return EvaluationReport(
        num_images=num_images,
        num_inference_steps=num_inference_steps,
        reference_num_inference_steps=reference_steps,
        seed=seed,
        sqnr_db=sqnr_db(wanted, samples),
        sqnr_interval_db=bootstrap_interval(image_mse(wanted, samples), reference_variance(wanted), seed=seed),
        sqnr_median_db=median_sqnr_db(wanted, samples),
        psnr_db=psnr_db(wanted, samples),
        trajectory_timesteps=timesteps,
        trajectory_error=error_curve,
        trajectory_num_images=None if timesteps is None else min(num_images, MAX_TRAJECTORY_IMAGES),
        **_distances(extractor, samples, seed),
        size_bytes=None if weights_path is None else directory_size_bytes(weights_path),
        tensor_bytes=tensor_bytes(pipeline.unet),
        average_bits=average_bits,
        average_bits_all=average_bits_all,
        packed_share=covered.share(covered.packed),
        kernel_cache_bytes=kernel_cache_bytes(pipeline.unet),
        kernels=layers_by_kernel(pipeline.unet),
        latency_ms=latency,
        reference_latency_ms=reference_latency,
        latency_batch_size=latency_batch_size,
        environment=environment(),
    )


def _common_timesteps(
    scheduler: Any, num_inference_steps: int, reference_scheduler: Any, reference_steps: int
) -> tuple[int, ...] | None:
    """Return the timesteps of both grids, largest first and -1 last; None where neither grid holds the other."""
    grid = set(ddim_grid(scheduler, num_inference_steps).timestep.tolist())
    reference_grid = set(ddim_grid(reference_scheduler, reference_steps).timestep.tolist())
    if not (grid <= reference_grid or reference_grid <= grid):
        return None
    return (*sorted(grid & reference_grid, reverse=True), -1)


def _mean_trajectory_error(
    run: tuple[Any, int],
    reference_run: tuple[Any, int],
    timesteps: tuple[int, ...],
    *,
    num_images: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> Tensor:
    """Return `trajectory_error` (len(timesteps),) over `num_images`, with one batch of trajectories in memory."""
    total_error = torch.zeros(len(timesteps), dtype=torch.float64)
    total_power = torch.zeros(len(timesteps), dtype=torch.float64)
    with tqdm(total=num_images, desc="trajectories", unit="image", disable=not progress) as bar:
        for start in range(0, num_images, batch_size):
            count = min(batch_size, num_images - start)
            batch, wanted = (
                _states_at(timesteps, pipeline, num_steps, seed=seed, start=start, count=count)
                for pipeline, num_steps in (run, reference_run)
            )
            # Sums of squares add up over batches, their ratios do not.
            power = wanted.double().flatten(1).square().sum(dim=1)
            total_error += trajectory_error(wanted, batch) * power
            total_power += power
            bar.update(count)
    return total_error / total_power


def _states_at(
    timesteps: tuple[int, ...], pipeline: Any, num_inference_steps: int, *, seed: int, start: int, count: int
) -> Tensor:
    """Return the samples z (len(timesteps), count, C, H, W) float32 of one batch of trajectories."""
    noise = _noise(pipeline.unet, seed=seed, start=start, count=count)
    with _eval_mode(pipeline.unet):
        steps = denoise(pipeline.unet, copy.deepcopy(pipeline.scheduler), noise, num_inference_steps)
        return torch.stack([step.sample.float().cpu() for step in steps if step.timestep in timesteps])


def _distances(extractor: FeatureExtractor | None, samples: Tensor, seed: int) -> dict[str, Any]:
    """Return the report's fields that need a feature extractor; all None without one."""
    names = ("metric_name", "frechet_distance", "kernel_distance", "kernel_distance_sd", "kernel_subset_size")
    if extractor is None:
        return dict.fromkeys((*names, "extractor_sha256", "extractor_reference_sha256"))
    features = extract_features(extractor, to_uint8(samples))
    subset_size = min(MAX_KERNEL_SUBSET, len(features), len(extractor.reference_features))
    kernel, kernel_sd = kernel_distance(features, extractor.reference_features, subset_size=subset_size, seed=seed)
    statistics = feature_statistics(features)
    frechet = frechet_distance(*statistics, extractor.reference_mean, extractor.reference_covariance)
    return dict(zip(names, (extractor.name, frechet, kernel, kernel_sd, subset_size), strict=True)) | {
        "extractor_sha256": extractor.sha256,
        "extractor_reference_sha256": extractor.reference_sha256,
    }


def _latencies(
    run: tuple[Any, int], reference_run: tuple[Any, int], seed: int, batch_size: int, num_rounds: int
) -> tuple[Latency, Latency]:
    """Return the milliseconds per image of both runs, measured in turns on batches of `batch_size`."""

    def candidate(pipeline: Any, num_steps: int) -> Any:
        noise = _noise(pipeline.unet, seed=seed, start=0, count=batch_size)
        scheduler = copy.deepcopy(pipeline.scheduler)
        return lambda: generate(pipeline.unet, scheduler, noise, num_steps)

    with _eval_mode(run[0].unet), _eval_mode(reference_run[0].unet):
        candidates = {"pipeline": candidate(*run), "reference": candidate(*reference_run)}
        latencies = interleaved_latency(candidates, num_rounds=num_rounds)
    return latencies["pipeline"].scaled(1 / batch_size), latencies["reference"].scaled(1 / batch_size)


def _average_bits(model: nn.Module) -> tuple[float, float]:
    """Return the average bits over quantized and over all weights; a float model has its own width, twice."""
    bits = average_bits(model)
    if bits is not None:
        return bits
    parameters = list(model.parameters())
    stored = 8 * sum(p.numel() * p.element_size() for p in parameters) / sum(p.numel() for p in parameters)
    return stored, stored


def _noise(model: Any, *, seed: int, start: int, count: int) -> Tensor:
    # Drawn in fp32 on the CPU and then moved, so every device and dtype starts from the same noise.
    return initial_noise(sample_shape(model), seed=seed, start=start, count=count).to(model.device, model.dtype)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Run the body with `model` in eval mode (no dropout, frozen ranges), then restore each module's own mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1.")


def _jsonable(value: Any) -> Any:
    if isinstance(value, float) and isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, (tuple, list)):
        return [_jsonable(item) for item in value]
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return value
