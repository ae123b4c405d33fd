"""The most memory that each stage of a run would take, by what it holds: weights, states, activations.

Weights are counted by the headers, activations on tensors without numbers (`weightless.py`): on each device, beside
what Python and its libraries take.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from diffusers_pqcad.compression.distillation import DistillConfig
from diffusers_pqcad.compression.progressive import BATCH_SIZE
from diffusers_pqcad.compression.reconstruction import CAPTURE_BATCH_SIZE
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.loading.plan import plan
from diffusers_pqcad.loading.saved import SavedModel
from diffusers_pqcad.publishing.outline import Outline
from diffusers_pqcad.publishing.pipelines import sampling_batch_size
from diffusers_pqcad.publishing.settings import Settings
from diffusers_pqcad.publishing.stages import (
    FROZEN,
    TRAINED,
    Search,
    Stage,
    checked_samples,
    reconstructed_samples,
    search_of,
)
from diffusers_pqcad.publishing.weightless import (
    Update,
    backward_bytes,
    decoding_bytes,
    forward_bytes,
    trained_bytes,
    unit_bytes,
)


@dataclass(frozen=True)
class Footprint:
    """The most bytes of a stage, by what they are of, of each device."""

    key: str
    parts: dict[str, dict[str, int]]

    def total(self, device: str) -> int:
        """Return the bytes on a device."""
        return sum(self.parts.get(device, {}).values())


class Sizes(NamedTuple):
    """Bytes of a run's models: all of the pipeline's, its denoiser, what of that is rounded; and packed."""

    pipeline: int
    denoiser: int
    searched: int
    packed: int


def sizes_of(outline: Outline, models: Mapping[str, SavedModel], search: Search, quantization: PQCADConfig) -> Sizes:
    """Return the bytes of the models of a run, in float32."""
    numel = {name: sum(header_numel(header) for header in saved.tensors.values()) for name, saved in models.items()}
    denoiser = sum(4 * tensor.numel() for tensor in outline.model.state_dict().values())
    return Sizes(
        4 * sum(numel.values()),
        denoiser,
        4 * sum(search.num_weights.values()),
        plan(outline.model, quantization).num_bytes_after,
    )


def header_numel(header: Any) -> int:
    """Return the numbers of a tensor by its header."""
    return header.num_bytes // header.dtype.itemsize


@dataclass(frozen=True)
class Frame:
    """What all stages of a run share: settings, outline, sizes, and the layers that are searched."""

    settings: Settings
    outline: Outline
    sizes: Sizes
    search: Search

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that are searched."""
        return tuple(self.search.num_weights)

    @property
    def is_offloaded(self) -> bool:
        """Whether what waits lies on disk."""
        return self.settings.run.offload_to_disk

    def waiting(self, num_bytes: int, *, trains: bool = False) -> int:
        """Return what of the bytes of a model is in memory while it waits, or `trains` nothing: on disk, nothing.

        On another device than the CPU, what computes stays.
        """
        stays = trains and self.settings.run.train_device != "cpu"
        return num_bytes if stays or not self.is_offloaded else 0

    def halved(self, num_bytes: int) -> int:
        """Return the bytes of a model that only infers, in the run's precision."""
        return num_bytes // 2 if self.settings.run.mixed_precision == "bf16" else num_bytes

    def forward(self, num_images: int) -> int:
        """Return what a step without gradients takes."""
        return forward_bytes(self.outline, self.layers, self.settings.quantization.group_size, num_images)

    def devices(self, cpu: dict[str, int], trained: dict[str, int]) -> dict[str, dict[str, int]]:
        """Return what is on the CPU, and what where it trains."""
        device = self.settings.run.train_device
        return {"cpu": cpu | trained} if device == "cpu" else {"cpu": cpu, device: trained}


def footprints(
    settings: Settings, outline: Outline, models: Mapping[str, SavedModel], stages: Sequence[Stage]
) -> list[Footprint]:
    """Return what each of `stages` takes."""
    search = search_of(outline, settings.quantization)
    frame = Frame(settings, outline, sizes_of(outline, models, search, settings.quantization), search)
    found: list[Footprint] = []
    students = [stage.key for stage in stages if stage.updates]
    for stage in stages:
        if stage.key == "recording":
            parts = {"cpu": in_recording(frame)}
        elif stage.key == "rows":
            parts = {"cpu": in_measuring(frame, len(students))}
        elif stage.updates:
            parts = in_distilling(frame, stage, students.index(stage.key))
        else:
            parts = in_quantizing(frame)
        found.append(Footprint(stage.key, parts))
    return found


def in_recording(frame: Frame) -> dict[str, int]:
    """Return what recording takes: the pipeline, and the activations of a batch."""
    batch_size = sampling_batch_size(frame.outline.teacher.pipeline, frame.settings.run)
    return {"pipeline": frame.sizes.pipeline, "activations": frame.forward(batch_size)}


def others(frame: Frame) -> int:
    """Return the bytes of the pipeline while a model of its own kind trains beside it."""
    return frame.sizes.pipeline - frame.sizes.denoiser + frame.waiting(frame.sizes.denoiser)


def in_quantizing(frame: Frame) -> dict[str, dict[str, int]]:
    """Return what PQ takes: the latents, their reference, and the most of prices, checks and a unit's training."""
    progressive, outline, sizes = frame.settings.progressive, frame.outline, frame.sizes
    num_checked = min(BATCH_SIZE, max(checked_samples(progressive), outline.num_held_out))
    prices = frame.waiting(sizes.searched, trains=True) + frame.forward(progressive.price_batch_size)
    trained = {
        "latents": frame.waiting(sizes.denoiser, trains=True),
        "reference": frame.waiting(frame.halved(sizes.denoiser), trains=True),
        "prices, or what a unit sees and its updates": max(prices, frame.forward(num_checked), *worst_unit(frame)),
        **mapped_pages(frame),
    }
    return frame.devices({"pipeline": others(frame)}, trained)


def mapped_pages(frame: Frame) -> dict[str, int]:
    """Return what is mapped at once of what lies on disk: no more than the largest layers in use."""
    largest = 4 * max(frame.search.num_weights.values())
    return {"mapped for a moment": 3 * largest} if frame.is_offloaded else {}


def worst_unit(frame: Frame) -> tuple[int, int]:
    """Return the most bytes of what a unit sees and gives while it is captured, and while it is trained."""
    settings = frame.settings
    progressive = settings.progressive
    if not progressive.reconstruction.iterations:
        return 0, 0
    units = unit_bytes(
        frame.outline,
        frame.layers,
        settings.quantization.group_size,
        tuple(frame.search.units),
        progressive.reconstruction.batch_size,
        settings.run.mixed_precision,
    )
    samples = reconstructed_samples(progressive, 1.0)
    passing = frame.forward(min(samples, CAPTURE_BATCH_SIZE))
    if frame.is_offloaded:
        return passing, max(unit.update for unit in units.values())
    captured = {name: samples * frame.outline.branches * unit.captured for name, unit in units.items()}
    # Records of all passes, and what is joined of them.
    return max(2 * max(captured.values()), max(captured.values()) + passing), max(
        captured[name] + unit.update for name, unit in units.items()
    )


def in_distilling(frame: Frame, stage: Stage, num_before: int) -> dict[str, dict[str, int]]:
    """Return what CAD takes: student, teacher, states, averages, activations; students before it wait on the CPU."""
    settings, sizes = frame.settings, frame.sizes
    config, update = settings.distillation, update_of(stage, settings.distillation, frame.outline)
    group_size = settings.quantization.group_size
    weights, state = trained_bytes(frame.outline, frame.layers, group_size, config)
    moving = min(weights, sizes.denoiser)
    backward = backward_bytes(
        frame.outline,
        frame.layers,
        group_size,
        update,
        config.trainable,
        settings.run.mixed_precision,
        gradient_checkpointing=config.gradient_checkpointing,
    )
    trained = {
        "student": moving + frame.waiting(sizes.denoiser - moving, trains=True),
        "teacher": frame.waiting(frame.halved(sizes.denoiser), trains=True) if update.teacher_steps else 0,
        "optimizer": state,
        "average and best state": frame.waiting(2 * weights),
        "gradients and activations": backward,
        **mapped_pages(frame),
    }
    before = frame.waiting(sizes.denoiser) + num_before * sizes.denoiser
    return frame.devices({"pipeline": others(frame), "models before": before}, trained)


def in_measuring(frame: Frame, num_students: int) -> dict[str, int]:
    """Return what the table takes: packed models, with their kernels' int8 copies, and the largest call."""
    outline, sizes = frame.outline, frame.sizes
    batch_size = sampling_batch_size(outline.teacher.pipeline, frame.settings.run)
    decoder = outline.teacher.pipeline.components.get("vae")
    decoded = 0 if decoder is None else decoding_bytes(decoder, (batch_size, *decoder_shape(outline)))
    return {
        "pipeline": sizes.pipeline,
        "PQ's model": sizes.denoiser,
        "packed models": (2 + num_students) * (sizes.packed + sizes.searched // 4),
        "activations": max(frame.forward(batch_size), decoded),
    }


def decoder_shape(outline: Outline) -> tuple[int, ...]:
    """Return the shape of an image's latents as a decoder takes them, and not packed into tokens."""
    shape = tuple(outline.state.shape[1:])
    if len(shape) > 2:
        return shape
    channels = outline.teacher.pipeline.components["vae"].config.latent_channels
    side = int((shape[0] * shape[1] / channels) ** 0.5)
    return channels, side, side


def update_of(stage: Stage, config: DistillConfig, outline: Outline) -> Update:
    """Return what a batch of a stage of CAD computes."""
    trained = next(part for part in stage.passes if part.model == TRAINED)
    frozen = next((part for part in stage.passes if part.model == FROZEN), None)
    num_terms = trained.images // config.train_batch_size
    if frozen is None:
        return Update(num_terms, config.train_batch_size, 0, trained.branches, trained.branches)
    steps = frozen.times // trained.times
    return Update(num_terms, config.train_batch_size, steps, trained.branches, frozen.branches)
