"""Two pipelines side by side, image by image, on the same inputs and noise: what a report of them shows."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import inf, log10
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from diffusers_pqcad.compression.checkpoint import load_checkpoint, save_checkpoint
from diffusers_pqcad.compression.denoiser import denoiser_name
from diffusers_pqcad.compression.extras import require
from diffusers_pqcad.evaluation.generate import PipelineRun, Samples, Trajectories, run_of, sampled, to_uint8
from diffusers_pqcad.evaluation.metrics import (
    image_mse,
    picture_psnr_db,
    reference_variance,
    structural_similarity,
)
from diffusers_pqcad.evaluation.report import (
    Cost,
    Fidelity,
    Speed,
    check_shape,
    cost_of,
    fidelity_between,
    jsonable,
    speed_in_turns,
)
from diffusers_pqcad.loading.inspection import LayerInfo, inspect


@dataclass(frozen=True)
class Side:
    """A pipeline of a comparison: its name, how it alone is called, and where its saved denoiser is, if known."""

    name: str
    pipeline: Any
    num_inference_steps: int
    arguments: Mapping[str, Any]
    weights_path: Path | None = None


@dataclass(frozen=True)
class ImagePair:
    """How close image `index` of B comes to that of A, and the `inputs` of both.

    `sqnr_db` is that of the final latents, with the variance of all of A's; PSNR and SSIM are those of the pictures.
    """

    index: int
    inputs: dict[str, Any]
    sqnr_db: float
    psnr_db: float
    ssim: float


class Comparison(NamedTuple):
    """What a report shows: `sides` and their costs, the pairs in order, and pictures (n, C, H, W) uint8, of videos the
    first frames.
    """

    sides: tuple[Side, Side]
    seed: int
    call_arguments: dict[str, Any]
    pairs: list[ImagePair]
    pictures: tuple[Tensor, Tensor]
    fidelity: Fidelity
    costs: tuple[Cost, Cost]
    speed: Speed
    layers: tuple[list[LayerInfo], list[LayerInfo]]

    def worst_first(self) -> list[ImagePair]:
        """Return the pairs, the one that differs most first."""
        return sorted(self.pairs, key=lambda pair: pair.sqnr_db)

    def medians(self) -> dict[str, float]:
        """Return the median over images of each ratio."""
        names = ("sqnr_db", "psnr_db", "ssim")
        return {name: median(getattr(pair, name) for pair in self.pairs) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Return all but the pictures, as JSON values; an infinite ratio (equal images) is the string "inf"."""
        latencies = self.speed.reference_latency_ms, self.speed.latency_ms
        sides = [
            {
                "name": side.name,
                "num_inference_steps": side.num_inference_steps,
                "arguments": dict(side.arguments),
                "latency_ms": latency._asdict(),
                "layers": [asdict(layer) for layer in layers],
            }
            | asdict(cost)
            for side, cost, latency, layers in zip(self.sides, self.costs, latencies, self.layers, strict=True)
        ]
        found = {
            "a": sides[0],
            "b": sides[1],
            "num_images": len(self.pairs),
            "seed": self.seed,
            "call_arguments": self.call_arguments,
            "fidelity": asdict(self.fidelity),
            "medians": self.medians(),
            "images": [asdict(pair) for pair in self.pairs],
            "latency_batch_size": self.speed.latency_batch_size,
            "environment": self.speed.environment,
        }
        return jsonable(found)


def compare(
    a: Side,
    b: Side,
    inputs: Any = None,
    *,
    num_images: int,
    seed: int,
    batch_size: int = 8,
    num_latency_rounds: int = 3,
    latency_batch_size: int = 1,
    progress: bool = True,
    state: Path | None = None,
    **call_arguments: Any,
) -> Comparison:
    """Return how the images of pipeline `b` differ from those of `a`, for the same inputs and noise, and both costs.

    `inputs` and `call_arguments` are as in `evaluate`. In the folder `state`, what each pipeline made is kept as soon
    as it is there, so the same call goes on after it was stopped; whoever calls gives each call a folder of its own.

    Raises ValueError for fewer than two images, arguments that a pipeline does not take, and pipelines whose images
    differ in shape; MissingExtraError, before any sample, where a package that is needed later is missing.
    """
    require("eval", "scipy", "torchmetrics")
    if num_images < 2:
        raise ValueError(f"num_images={num_images}: expected at least 2, for a spread over images.")
    runs = [
        run_of(
            side.pipeline, inputs, side.num_inference_steps, seed, call_arguments | dict(side.arguments), decodes=True
        )
        for side in (a, b)
    ]
    made = []
    for side, run, letter in zip((a, b), runs, "ab", strict=True):
        path = None if state is None else state / f"{letter}.safetensors"
        made.append(made_or_read(run, num_images, batch_size, f"{letter.upper()}: {side.name}", progress, path))
    (wanted, steps_a), (found, steps_b) = made
    check_shape(tuple(found.latents.shape[1:]), tuple(wanted.latents.shape[1:]))
    pictures = pictures_of(wanted), pictures_of(found)
    check_shape(tuple(pictures[1].shape[1:]), tuple(pictures[0].shape[1:]))
    return Comparison(
        sides=(a, b),
        seed=seed,
        call_arguments=call_arguments,
        pairs=pairs_of(runs[0], wanted, found, pictures),
        pictures=pictures,
        fidelity=fidelity_between(runs[1], Samples(wanted.latents, pictures[0]), Samples(found.latents, pictures[1])),
        costs=(cost_of(runs[0], steps_a, a.weights_path), cost_of(runs[1], steps_b, b.weights_path)),
        speed=speed_in_turns((runs[1], steps_b), (runs[0], steps_a), latency_batch_size, num_latency_rounds),
        layers=(layers_of(a.pipeline), layers_of(b.pipeline)),
    )


def made_or_read(
    run: PipelineRun, num_images: int, batch_size: int, description: str, progress: bool, path: Path | None
) -> tuple[Samples, Trajectories]:
    """Return what `run` makes, and its timesteps without states; kept in the file `path`, and read back from there."""
    if path is not None and path.exists():
        saved = load_checkpoint(path)
        return Samples(saved["latents"], saved["images"]), Trajectories(tuple(saved["timesteps"]), torch.empty(0))
    samples, states = sampled(
        run, num_images, batch_size=batch_size, progress=progress, description=description, max_trajectories=1
    )
    assert states is not None  # of max_trajectories
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, samples._asdict() | {"timesteps": list(states.timesteps)})
    return samples, Trajectories(states.timesteps, torch.empty(0))


def pictures_of(samples: Samples) -> Tensor:
    """Return pictures (n, C, H, W) uint8, of videos the first frames; latents that nothing decodes are pictures."""
    images = to_uint8(samples.latents) if samples.images is None else samples.images
    return images[:, 0] if images.ndim == 5 else images


def pairs_of(run: PipelineRun, wanted: Samples, found: Samples, pictures: tuple[Tensor, Tensor]) -> list[ImagePair]:
    """Return the pairs of images, in order."""
    variance = reference_variance(wanted.latents.float())
    errors = image_mse(wanted.latents.float(), found.latents).tolist()
    return [
        ImagePair(
            index=index,
            inputs={key: value for key, value in run.inputs[index % len(run.inputs)].items() if is_plain(value)},
            sqnr_db=inf if error == 0 else 10 * log10(variance / error),
            psnr_db=picture_psnr_db(*(each[index : index + 1] for each in pictures)),
            ssim=structural_similarity(*(each[index : index + 1] for each in pictures)),
        )
        for index, error in enumerate(errors)
    ]


def is_plain(value: Any) -> bool:
    """Return whether an input is a number or a text, which a report can show."""
    return isinstance(value, str | int | float)


def layers_of(pipeline: Any) -> list[LayerInfo]:
    """Return the layers of the denoiser of a pipeline."""
    return list(inspect(getattr(pipeline, denoiser_name(pipeline))))
