"""The four models that method work is judged by, and how close a compressed one comes to each."""

import json
import subprocess
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from diffusers import DDIMPipeline, UNet2DModel
from torch import Tensor, nn

from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.checkpoint import write_text
from diffusers_pqcad.compression.denoiser import Denoiser, states_of
from diffusers_pqcad.compression.grid import grid_of
from diffusers_pqcad.compression.recording import collect_calibration_set
from diffusers_pqcad.compression.sampling import initial_noise, sample_shape
from diffusers_pqcad.evaluation.metrics import image_mse, reference_variance
from diffusers_pqcad.evaluation.speed import environment

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "examples" / "results" / "method"
TEACHERS = ROOT / "outputs" / "teachers"
# The bundled ones have one seed; the others are trained here, one for each seed.
BUNDLED = {
    "fashion-mnist": ROOT / "examples" / "models" / "fashion-mnist",
    "fashion-mnist-epsilon": ROOT / "examples" / "models" / "fashion-mnist-epsilon",
}
TRAINED = {"digits": "v_prediction", "digits-epsilon": "epsilon"}
SUBJECTS = (*BUNDLED, *TRAINED)
NUM_STEPS = 20
NUM_TRAJECTORIES = 128
CALIBRATION_SEED = 1_000_000  # far from those of the images that are measured
BATCH_SIZE = 64


def parser_of(doc: str | None, folder: str) -> ArgumentParser:
    """Return the parser of an experiment's script, with what all of them take; `doc` is the script's docstring."""
    parser = ArgumentParser(description=(doc or "").split("\n\n")[0], formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--num_images", type=int, default=256)
    parser.add_argument("--num_threads", type=int, default=1)
    parser.add_argument("--output_dir", type=Path, default=RESULTS / folder)
    return parser


def file_name(*parts: Any) -> str:
    """Return the name of a row's file: its `parts`, without what a shell would mind."""
    return "-".join(str(part).replace(", ", "_").replace(" ", "-") for part in parts) + ".json"


def teacher(subject: str, seed: int = 0) -> DDIMPipeline:
    """Return the full-precision pipeline of `subject`; digits are trained for each new `seed`, in two minutes."""
    if subject in BUNDLED:
        return DDIMPipeline.from_pretrained(BUNDLED[subject])
    folder = TEACHERS / f"digits-{TRAINED[subject]}-{seed}"
    if not (folder / "model_index.json").exists():
        arguments = ["--dataset", "digits", "--prediction_type", TRAINED[subject], "--seed", str(seed)]
        arguments += ["--num_threads", str(torch.get_num_threads()), "--output_dir", str(folder)]
        subprocess.run([sys.executable, str(ROOT / "examples" / "train_teacher.py"), *arguments], check=True)
    return DDIMPipeline.from_pretrained(folder)


def calibration_set(pipeline: DDIMPipeline, seed: int, num_trajectories: int = NUM_TRAJECTORIES) -> CalibrationSet:
    """Return full-precision trajectories of `pipeline` at NUM_STEPS steps."""
    return collect_calibration_set(
        pipeline,
        num_trajectories=num_trajectories,
        num_inference_steps=NUM_STEPS,
        seed=seed + CALIBRATION_SEED,
        progress=False,
    )


@torch.no_grad()
def trajectories(model: nn.Module, scheduler: Any, num_images: int, num_steps: int, seed: int) -> Tensor:
    """Return the states of `model` after each step, (steps, num_images, C, H, W); the last are `samples`."""
    batches = []
    for start in range(0, num_images, BATCH_SIZE):
        noise = initial_noise(sample_shape(model), seed=seed, start=start, count=min(BATCH_SIZE, num_images - start))
        states = states_of(Denoiser(model), grid_of(scheduler, num_steps), noise, lambda step: {})
        batches.append(torch.stack(states[1:]))
    return torch.cat(batches, dim=1)


@torch.no_grad()
def samples(model: nn.Module, scheduler: Any, num_images: int, num_steps: int, seed: int) -> Tensor:
    """Return the final samples (num_images, C, H, W) of `model`."""
    return trajectories(model, scheduler, num_images, num_steps, seed)[-1]


def fidelity(wanted: Tensor, found: Tensor) -> dict[str, Any]:
    """Return the SQNR of `found` to `wanted` (n, C, H, W) in dB: of all, of the median image, of each image.

    And the share of images below 15 dB: those that ended in another picture.
    """
    variance, errors = reference_variance(wanted), image_mse(wanted, found)
    decibel = 10 * (variance / errors.clamp(min=1e-12)).log10()
    return {
        "mean": 10 * (variance / errors.mean()).log10().item(),
        "median": decibel.median().item(),
        "below_15": (decibel < 15).double().mean().item(),
        "images": [round(value, 2) for value in decibel.tolist()],
    }


@contextmanager
def counted_evaluations() -> Iterator[Callable[[], int]]:
    """Count the model evaluations inside the block, of an image each; what the block gets returns how many there were.

    One with gradients counts three times: its way back costs as much as two.
    """
    count, forward = 0, UNet2DModel.forward

    @wraps(forward)
    def counting(self: UNet2DModel, sample: Tensor, *arguments: Any, **others: Any) -> Any:
        nonlocal count
        count += len(sample) * (3 if torch.is_grad_enabled() else 1)
        return forward(self, sample, *arguments, **others)

    with mock.patch.object(UNet2DModel, "forward", counting):
        yield lambda: count


def cached(path: Path, make: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Return the JSON of `path`, of `make(*arguments)` where it is missing: a killed run goes on from there.

    A row that is made here says by which commit, versions and computer.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        row = make(*arguments)
        where = environment()
        row["environment"] = {key: where[key] for key in ("commit", "torch", "diffusers", "cpu", "num_threads")}
        write_text(path, json.dumps(row) + "\n")
    return json.loads(path.read_text())
