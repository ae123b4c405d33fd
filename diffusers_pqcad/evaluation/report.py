"""The report on a pipeline: how close it comes to a reference for the same inputs and noise, and what it costs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import isinf
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffusers_pqcad.compression.calling import distinct_inputs
from diffusers_pqcad.compression.denoiser import SchedulerStep, Stop, denoiser_name
from diffusers_pqcad.compression.extras import require
from diffusers_pqcad.compression.fake_quant import fake_quant_layers
from diffusers_pqcad.compression.processes import on_main
from diffusers_pqcad.evaluation.features import ClassifierExtractor, FeatureExtractor, extract_features
from diffusers_pqcad.evaluation.generate import (
    PipelineRun,
    Samples,
    Trajectories,
    call,
    check_positive,
    known_shape,
    makes_pixels,
    run_of,
    sampled,
    to_uint8,
    untouched,
)
from diffusers_pqcad.evaluation.metrics import (
    bootstrap_interval,
    feature_statistics,
    frechet_distance,
    image_mse,
    kernel_distance,
    median_sqnr_db,
    paired_change_interval,
    picture_psnr_db,
    psnr_db,
    reference_variance,
    sqnr_db,
    structural_similarity,
    trajectory_error,
)
from diffusers_pqcad.evaluation.perceptual import Judges, clip_score_of, lpips_distance
from diffusers_pqcad.evaluation.prompts import check_wanted, prompts_met
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

MAX_REFERENCE_ERROR = 0.01  # other noise or prompts are at 0.1 and more, other batch sizes at 0.0001 and less
MAX_TRAJECTORY_IMAGES = 16  # enough for a mean curve
MAX_KERNEL_SUBSET = 1000  # Binkowski et al. 2018
SAME_TIMESTEP = 0.01  # of about 1000: those of flow matching are rounded


@dataclass(frozen=True)
class Setting:
    """What was run."""

    num_images: int
    num_inference_steps: int
    reference_num_inference_steps: int
    seed: int


@dataclass(frozen=True)
class Fidelity:
    """How close the samples come to those of the reference, image by image; ratios in dB.

    SQNR and PSNR are those of the final latents, which `fidelity_of` calls images where no component decodes them; the
    PSNR is for a width of 2, the range of images in [-1, 1]. `sqnr_interval_db` is the 95 % bootstrap interval over
    images, `sqnr_median_db` the SQNR of the median image.

    `image_psnr_db` and `image_ssim` are those of the pictures, or of a video's frames, as uint8: None where they were
    left out. SSIM has a Gaussian window of 11 pixels; for pictures that are smaller, of the largest odd width that
    fits.
    """

    sqnr_db: float
    sqnr_interval_db: tuple[float, float]
    sqnr_median_db: float
    psnr_db: float
    fidelity_of: str  # "images" or "latents"
    image_psnr_db: float | None
    image_ssim: float | None


@dataclass(frozen=True)
class Trajectory:
    """The error on the way: `trajectory_error[k]` is the relative squared error of z at `trajectory_timesteps[k]`.

    Timestep -1 is the final state.
    """

    trajectory_timesteps: tuple[float, ...] | None
    trajectory_error: tuple[float, ...] | None
    trajectory_num_images: int | None


@dataclass(frozen=True)
class Distribution:
    """Distances to the reference set of an extractor, whose name is `metric_name`; comparable at equal `num_images`.

    Of videos, the images are the frames.
    """

    metric_name: str | None
    frechet_distance: float | None
    kernel_distance: float | None
    kernel_distance_sd: float | None
    kernel_subset_size: int | None
    extractor_sha256: str | None
    extractor_reference_sha256: str | None


@dataclass(frozen=True)
class PromptAccuracy:
    """How many of the pictures show what their prompts say, as the extractor's classifier sees it.

    `prompt_accuracy` is a share of the images. The change is against the reference's pictures of the same prompts and
    noise, in shares too, with its 95 % bootstrap interval over pairs of pictures.
    """

    prompt_accuracy: float | None
    prompt_accuracy_change: float | None
    prompt_accuracy_change_interval: tuple[float, float] | None


@dataclass(frozen=True)
class Perception:
    """What trained networks make of the pictures; None where there was no such network.

    `lpips` is the mean distance to the reference's pictures, `clip_score` 100 times the mean cosine to the prompts.
    """

    lpips: float | None
    lpips_network: str | None
    clip_score: float | None
    clip_model: str | None


@dataclass(frozen=True)
class Cost:
    """What the denoiser takes, in bytes and bits, and what computes it."""

    size_bytes: int | None  # on disk
    tensor_bytes: int  # in memory
    average_bits: float  # over the quantized weights, 32 for a float32 model
    average_bits_all: float  # over all weights
    packed_share: float  # of all weights
    kernel_cache_bytes: int  # int8 copies that kernels held in memory beside the packed weights
    kernels: dict[str, int]  # quantized layers by the kernel that computes them, in these times
    model_evaluations: int  # of the denoiser for an image: steps times branches


@dataclass(frozen=True)
class Speed:
    """Milliseconds an image of the whole call up to the last step of the scheduler, text encoders included.

    Decoding, the same for both, is not. The two pipelines take turns, on the same `latency_batch_size` inputs.
    """

    latency_ms: Latency
    reference_latency_ms: Latency
    latency_batch_size: int
    environment: dict[str, Any]


# Fields come in the order of the bases from last to first.
@dataclass(frozen=True)
class EvaluationReport(Speed, Cost, Perception, PromptAccuracy, Distribution, Trajectory, Fidelity, Setting):
    """What `evaluate` measured; a field that was not measured is None.

    Sample i of both pipelines starts from the same input and noise. Ratios are in dB, sizes in bytes, latencies in
    milliseconds per image. The fields are those of the parts: `Setting`, `Fidelity`, `Trajectory`, `Distribution`,
    `PromptAccuracy`, `Perception`, `Cost`, `Speed`.
    """

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; an infinite ratio (an exact copy) becomes the string "inf"."""
        latencies = {name: getattr(self, name)._asdict() for name in ("latency_ms", "reference_latency_ms")}
        return {name: jsonable(value) for name, value in (asdict(self) | latencies).items()}


def evaluate(
    pipeline: Any,
    reference: Any,
    inputs: Any = None,
    *,
    num_images: int,
    num_inference_steps: int,
    seed: int,
    extractor: FeatureExtractor | None = None,
    prompt_labels: Mapping[str, Mapping[str, str]] | None = None,
    judges: Judges | None = None,
    reference_num_inference_steps: int | None = None,
    batch_size: int = 8,
    num_latency_rounds: int = 3,
    latency_batch_size: int = 8,
    progress: bool = True,
    decode: bool = True,
    reference_samples: Tensor | Samples | None = None,
    weights_path: str | Path | None = None,
    arguments: dict[str, Any] | None = None,
    reference_arguments: dict[str, Any] | None = None,
    **call_arguments: Any,
) -> EvaluationReport:
    """Return how close `pipeline` comes to `reference` for the same inputs and noise, and what it costs.

    Both are diffusers pipelines with one denoiser, called as their user calls them (`generate_samples`): with `inputs`
    (prompts, or dictionaries of one image's arguments; None for unconditional pipelines), and `call_arguments`, the
    same for both. `arguments` are those of `pipeline` alone (a student's `sigmas`), `reference_arguments` those of the
    reference, which runs `reference_num_inference_steps` (default: as many as `pipeline`).

    `decode`: compare the pictures too, decoded where the latents are not the images. `extractor` adds the Frechet and
    the kernel distance of the pictures to its reference set; with `prompt_labels`, what a picture of each prompt has
    to show, {"a fig on red": {"fruit": "fig"}}, it adds the prompt accuracy; `judges`, from `load_judges`, add LPIPS
    and the CLIP score. `weights_path` is the saved denoiser, a file or folder, whose bytes are reported.
    `reference_samples`, from `generate_samples(reference, ...)`, or `generate_images` where pictures are decoded, with
    the same inputs and seed and the reference's steps, saves generating them again for every model; further images in
    it are not used.

    The error along the trajectory is that of the first MAX_TRAJECTORY_IMAGES images at the timesteps of both, where
    the scheduler of one is of the other's class, and the timesteps of one are among those of the other.

    Several processes share the sampling and the extractor's work; the main one does the rest, times among it, while
    the others wait, and all return its report.

    Raises ValueError for fewer than two images, too few or misshapen `reference_samples`, arguments that a pipeline
    does not take, `prompt_labels` that lack a prompt or that `extractor` does not know, and models whose samples
    differ in shape; MissingExtraError, before any sample, where a package of
    the extra "eval" that is needed later is not installed.
    """
    require("eval", "scipy")
    if extractor is not None:
        require("eval", "torchmetrics")
    if num_images < 2:
        raise ValueError(f"num_images={num_images}: expected at least 2, for a spread over images.")
    check_positive(batch_size=batch_size, num_latency_rounds=num_latency_rounds, latency_batch_size=latency_batch_size)
    _check_is_packed(pipeline)
    reference_steps = num_inference_steps if reference_num_inference_steps is None else reference_num_inference_steps
    inputs = distinct_inputs(inputs)
    wishes = None if prompt_labels is None else _wishes(inputs, num_images, prompt_labels, extractor)
    mine, theirs = call_arguments | (arguments or {}), call_arguments | (reference_arguments or {})
    run = run_of(pipeline, inputs, num_inference_steps, seed, mine, decodes=decode)
    reference_run = run_of(reference, inputs, reference_steps, seed, theirs, decodes=decode)
    if decode:
        require("eval", "torchmetrics")
    given = None if reference_samples is None else _given(reference_samples)
    _check_before(run, reference_run, given, num_images, extractor)

    sampling: dict[str, Any] = {"batch_size": batch_size, "progress": progress}
    wanted, wanted_states = _reference_samples(reference_run, given, num_images, extractor, **sampling)
    if _is_same(run, reference_run):
        found, states = wanted, wanted_states
    else:
        found, states = sampled(
            run,
            num_images,
            description="samples",
            max_trajectories=MAX_TRAJECTORY_IMAGES,
            check=lambda samples: _check_first(samples, wanted, extractor),
            **sampling,
        )
    assert states is not None  # of max_trajectories
    assert wanted_states is not None
    seen = [with_pictures(run, samples) if decode else samples for samples in (wanted, found)]
    parts = (
        Setting(num_images, num_inference_steps, reference_steps, seed),
        on_main(fidelity_between, run, *seen),
        on_main(_trajectory, run, reference_run, states, wanted_states),
        _distribution(extractor, found, seed),
        _prompt_accuracy(extractor, wishes, wanted, found, seed),
        on_main(_perception, run, judges or Judges(), *seen),
        on_main(cost_of, run, states, weights_path),
        on_main(speed_in_turns, (run, states), (reference_run, wanted_states), latency_batch_size, num_latency_rounds),
    )
    return EvaluationReport(**{name: value for part in parts for name, value in vars(part).items()})


def _check_is_packed(pipeline: Any) -> None:
    name = denoiser_name(pipeline)
    if fake_quant_layers(getattr(pipeline, name)):
        raise ValueError(
            "pipeline: its weights are only rounded in simulation, so its size and time would mean nothing. Measure "
            f"convert_(copy.deepcopy({name})) in its place."
        )


def _wishes(
    inputs: Sequence[Mapping[str, Any]],
    num_images: int,
    prompt_labels: Mapping[str, Mapping[str, str]],
    extractor: FeatureExtractor | None,
) -> list[Mapping[str, str]]:
    """Return what each of the images has to show; ValueError where that cannot be found out."""
    if not isinstance(extractor, ClassifierExtractor):
        found = "none" if extractor is None else f"a {type(extractor).__name__}"
        raise ValueError(f"prompt_labels: expected an extractor that recognizes them, got {found}.")
    prompts = [inputs[index % len(inputs)].get("prompt") for index in range(num_images)]
    missing = next((prompt for prompt in prompts if prompt not in prompt_labels), ...)
    if missing is not ...:
        raise ValueError(f"prompt_labels: expected an entry for each prompt, there is none for {missing!r}.")
    wishes = [prompt_labels[prompt] for prompt in prompts if prompt is not None]
    check_wanted(extractor, wishes)
    return wishes


def _given(reference_samples: Tensor | Samples) -> Samples:
    return Samples(reference_samples, None) if isinstance(reference_samples, Tensor) else Samples(*reference_samples)


def _check_before(
    run: PipelineRun,
    reference_run: PipelineRun,
    given: Samples | None,
    num_images: int,
    extractor: FeatureExtractor | None,
) -> None:
    """Raise ValueError for what can be seen before anything runs."""
    shape, reference_shape = known_shape(run), known_shape(reference_run)
    if shape is not None and reference_shape is not None:
        check_shape(shape, reference_shape)
    if run.decodes != reference_run.decodes:
        raise ValueError(
            "pipeline: expected latents that are decoded from both or from neither; compare with the pipeline that "
            "this one was made from, or pass decode=False."
        )
    if extractor is not None and not run.decodes and not makes_pixels(run.pipeline):
        raise ValueError("extractor: it needs pictures, which decode=False leaves out. Leave one of them out.")
    if given is None:
        return
    wanted = f"at least {num_images} images" + ("" if shape is None else f" of shape {shape}")
    make = (
        f"Make them with {'generate_images' if run.decodes else 'generate_samples'}(reference, num_images={num_images}"
        f", num_inference_steps={reference_run.num_inference_steps}, seed={run.seed}, ...)."
    )
    if len(given.latents) < num_images or (shape is not None and tuple(given.latents.shape[1:]) != shape):
        raise ValueError(f"reference_samples: expected {wanted}, got shape {tuple(given.latents.shape)}. {make}")
    if run.decodes and (given.images is None or len(given.images) < num_images):
        raise ValueError(
            f"reference_samples: expected {wanted} with their pictures, got "
            f"{'none' if given.images is None else len(given.images)}. {make} Or pass decode=False."
        )


def check_shape(shape: tuple[int, ...], reference_shape: tuple[int, ...]) -> None:
    """Raise ValueError for samples whose shape is not that of the reference's."""
    if shape != reference_shape:
        raise ValueError(
            f"pipeline: expected samples of shape {reference_shape} as the reference makes, got {shape}. Compare with "
            "the model that this one was made from, at the same size."
        )


def _check_first(samples: Samples, wanted: Samples | None, extractor: FeatureExtractor | None) -> None:
    """Raise ValueError after the first batch for what would fail after the last."""
    if wanted is not None:
        check_shape(tuple(samples.latents.shape[1:]), tuple(wanted.latents.shape[1:]))
    if extractor is not None:
        extractor(_pictures(samples)[:1])


def _reference_samples(
    run: PipelineRun, given: Samples | None, num_images: int, extractor: FeatureExtractor | None, **sampling: Any
) -> tuple[Samples, Trajectories | None]:
    """Return the reference's samples and first trajectories; with `given` samples only the latter are run."""
    if given is None:
        return sampled(
            run,
            num_images,
            description="reference samples",
            max_trajectories=MAX_TRAJECTORY_IMAGES,
            check=lambda samples: _check_first(samples, None, extractor),
            **sampling,
        )
    count = min(num_images, MAX_TRAJECTORY_IMAGES)
    _, states = sampled(
        replace(run, decodes=False), count, description="reference trajectories", max_trajectories=count, **sampling
    )
    assert states is not None  # of max_trajectories
    again, shown = states.states[-1].double(), given.latents[: states.states.shape[1]].double()
    error = ((shown - again).norm() / again.norm()).item()
    if not error < MAX_REFERENCE_ERROR:
        raise ValueError(
            f"reference_samples: they are {error:.2g} of their size away from what the reference makes now (limit "
            f"{MAX_REFERENCE_ERROR}). Make them with the same inputs, seed, steps and arguments."
        )
    images = given.images[:num_images] if run.decodes and given.images is not None else None
    return Samples(given.latents[:num_images], images), states


def _is_same(run: PipelineRun, other: PipelineRun) -> bool:
    """Return whether two runs are one: of the same models, scheduler and settings, with the same arguments."""
    one, two = run.pipeline, other.pipeline
    if type(one) is not type(two) or dict(one.config) != dict(two.config):
        return False
    mine, theirs = (each.pipeline.components | each.arguments for each in (run, other))
    are_same = mine.keys() == theirs.keys() and all(mine[name] is theirs[name] for name in mine)
    return are_same and run.num_inference_steps == other.num_inference_steps


def with_pictures(run: PipelineRun, samples: Samples) -> Samples:
    """Return the samples of `run` with their pictures, which the latents of some pipelines are."""
    is_there = samples.images is not None or not makes_pixels(run.pipeline)
    return samples if is_there else samples._replace(images=to_uint8(samples.latents))


def fidelity_between(run: PipelineRun, wanted: Samples, found: Samples) -> Fidelity:
    """Return how close the samples of `run` are to the `wanted` ones."""
    latents = wanted.latents.float(), found.latents
    pictures = None if wanted.images is None or found.images is None else (wanted.images, found.images)
    return Fidelity(
        sqnr_db=sqnr_db(*latents),
        sqnr_interval_db=bootstrap_interval(image_mse(*latents), reference_variance(latents[0]), seed=run.seed),
        sqnr_median_db=median_sqnr_db(*latents),
        psnr_db=psnr_db(*latents),
        fidelity_of="images" if makes_pixels(run.pipeline) else "latents",
        image_psnr_db=None if pictures is None else picture_psnr_db(*pictures),
        image_ssim=None if pictures is None else structural_similarity(*pictures),
    )


def _trajectory(
    run: PipelineRun, reference_run: PipelineRun, states: Trajectories, wanted: Trajectories
) -> Trajectory:
    """Return the error at the timesteps that both runs took; no fields where neither's grid holds the other's."""
    pairs = _common_steps(states.timesteps, wanted.timesteps)
    one, two = run.pipeline.scheduler, reference_run.pipeline.scheduler
    are_alike = isinstance(one, type(two)) or isinstance(two, type(one))  # a student's is derived from its teacher's
    if pairs is None or not are_alike:
        return Trajectory(None, None, None)
    count = min(states.states.shape[1], wanted.states.shape[1])
    rows, wanted_rows = ([*indices, -1] for indices in zip(*pairs, strict=True))
    error = trajectory_error(wanted.states[wanted_rows, :count], states.states[rows, :count])
    return Trajectory((*(wanted.timesteps[row] for row in wanted_rows[:-1]), -1), tuple(error.tolist()), count)


def _common_steps(timesteps: tuple[float, ...], others: tuple[float, ...]) -> list[tuple[int, int]] | None:
    """Return the indices in both of the timesteps that they share; None where neither holds all of the other's.

    Of a timestep that is taken twice (Heun), the first counts.
    """
    mine, theirs = ({float(t): index for index, t in reversed(list(enumerate(grid)))} for grid in (timesteps, others))
    pairs = [
        (index, other_index)
        for t, index in sorted(mine.items(), key=lambda item: item[1])
        for other, other_index in theirs.items()
        if abs(t - other) <= SAME_TIMESTEP
    ]
    return pairs if len(pairs) in (len(mine), len(theirs)) else None


def _prompt_accuracy(
    extractor: FeatureExtractor | None,
    wishes: Sequence[Mapping[str, str]] | None,
    wanted: Samples,
    found: Samples,
    seed: int,
) -> PromptAccuracy:
    """Return how many pictures show what their prompts say, and what that is beside those of the reference."""
    if wishes is None or not isinstance(extractor, ClassifierExtractor):
        return PromptAccuracy(None, None, None)
    before, after = (prompts_met(extractor, _pictures(samples), wishes) for samples in (wanted, found))
    accuracy = after.double().mean().item()
    interval = on_main(paired_change_interval, before, after, seed=seed)
    return PromptAccuracy(
        prompt_accuracy=accuracy,
        prompt_accuracy_change=accuracy - before.double().mean().item(),
        prompt_accuracy_change_interval=interval,
    )


def _perception(run: PipelineRun, judges: Judges, wanted: Samples, found: Samples) -> Perception:
    """Return what the networks of `judges` make of the pictures, where there are some, and prompts to them."""
    before, after = wanted.images, found.images
    if before is None or after is None:
        return Perception(None, None, None, None)
    prompts = [run.inputs[index % len(run.inputs)].get("prompt") for index in range(len(after))]
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    scores = judges.clip is not None and after.dim() == 4 and len(texts) == len(prompts)
    return Perception(
        lpips=None if judges.lpips is None else lpips_distance(judges.lpips, before, after),
        lpips_network=judges.lpips_network,
        clip_score=clip_score_of(judges.clip, after, texts) if scores else None,
        clip_model=judges.clip_model if scores else None,
    )


def _pictures(samples: Samples) -> Tensor:
    """Return all pictures (n, C, H, W) uint8, of videos their frames; latents that are not decoded are the images."""
    return to_uint8(samples.latents) if samples.images is None else samples.images.flatten(0, -4)


def _distribution(extractor: FeatureExtractor | None, samples: Samples, seed: int) -> Distribution:
    """Return the distances of the pictures to the reference set of `extractor`; no fields without one."""
    if extractor is None:
        return Distribution(None, None, None, None, None, None, None)
    features = extract_features(extractor, _pictures(samples))
    return on_main(_distances, extractor, features, seed)


def _distances(extractor: FeatureExtractor, features: Tensor, seed: int) -> Distribution:
    subset_size = min(MAX_KERNEL_SUBSET, len(features), len(extractor.reference_features))
    kernel, kernel_sd = kernel_distance(features, extractor.reference_features, subset_size=subset_size, seed=seed)
    statistics = feature_statistics(features)
    return Distribution(
        metric_name=extractor.name,
        frechet_distance=frechet_distance(*statistics, extractor.reference_mean, extractor.reference_covariance),
        kernel_distance=kernel,
        kernel_distance_sd=kernel_sd,
        kernel_subset_size=subset_size,
        extractor_sha256=extractor.sha256,
        extractor_reference_sha256=extractor.reference_sha256,
    )


def cost_of(run: PipelineRun, states: Trajectories, weights_path: str | Path | None) -> Cost:
    """Return what the denoiser of `run` takes; after it, as kernels make their copies in it."""
    model = getattr(run.pipeline, denoiser_name(run.pipeline))
    bits, bits_of_all = _average_bits(model)
    covered = coverage(model)
    return Cost(
        size_bytes=None if weights_path is None else directory_size_bytes(weights_path),
        tensor_bytes=tensor_bytes(model),
        average_bits=bits,
        average_bits_all=bits_of_all,
        packed_share=covered.share(covered.packed),
        kernel_cache_bytes=kernel_cache_bytes(model),
        kernels=layers_by_kernel(model),
        model_evaluations=_evaluations(run, model, len(states.timesteps)),
    )


def _evaluations(run: PipelineRun, model: nn.Module, num_steps: int) -> int:
    """Return for how many rows `model` is called for one image of `run`, in `num_steps` steps: counted."""
    rows = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal rows
        rows += len(output[0])

    hook = model.register_forward_hook(count)
    try:
        with untouched(run.pipeline):
            call(replace(run, decodes=False), 0, 1, stop_after(num_steps))
    finally:
        hook.remove()
    return rows


def _average_bits(model: nn.Module) -> tuple[float, float]:
    """Return the average bits over quantized and over all weights; a float model has its own width, twice."""
    bits = average_bits(model)
    if bits is not None:
        return bits
    parameters = list(model.parameters())
    stored = 8 * sum(p.numel() * p.element_size() for p in parameters) / sum(p.numel() for p in parameters)
    return stored, stored


def speed_in_turns(
    timed: tuple[PipelineRun, Trajectories],
    reference: tuple[PipelineRun, Trajectories],
    batch_size: int,
    num_rounds: int,
) -> Speed:
    """Return the milliseconds per image of two runs up to their last steps, counted before, measured in turns."""

    def candidate(run: PipelineRun, states: Trajectories) -> Callable[[], Any]:
        without_pictures = replace(run, decodes=False)
        return lambda: call(without_pictures, 0, batch_size, stop_after(len(states.timesteps)))

    with untouched(timed[0].pipeline), untouched(reference[0].pipeline):
        candidates = {"pipeline": candidate(*timed), "reference": candidate(*reference)}
        found = interleaved_latency(candidates, num_rounds=num_rounds)
    mine, theirs = (found[name].scaled(1 / batch_size) for name in ("pipeline", "reference"))
    return Speed(mine, theirs, batch_size, environment())


def stop_after(num_steps: int) -> Callable[[SchedulerStep], None]:
    """Return what ends a call at its step `num_steps`, for `run_stepped`."""
    taken = 0

    def on_step(step: SchedulerStep) -> None:
        nonlocal taken
        taken += 1
        if taken == num_steps:
            raise Stop

    return on_step


def jsonable(value: Any) -> Any:
    """Return `value` as JSON values; an infinite number becomes the string "inf"."""
    if isinstance(value, float) and isinf(value):
        return "inf" if value > 0 else "-inf"
    if isinstance(value, (tuple, list)):
        return [jsonable(item) for item in value]
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    return value
