"""What rounding one layer does to a model's output, layer by layer: its weights, or its input.

    python examples/experiments/sensitivity.py

One step at each of ten timesteps of full-precision trajectories; the error of the output is weighted by the squared
gain of its step and divided by the output's power. Simulated. One JSON row a model in --output_dir.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from subjects import cached, calibration_set, file_name, parser_of, teacher
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.loading.convert import match_modules
from diffusers_pqcad.numerics.qparams import (
    WeightSpec,
    dynamic_activation_qparams,
    fake_quantize_activation,
    fake_quantize_weight,
    min_max_weight_scale,
)

WEIGHT_BITS, ACTIVATION_BITS = (4, 8), 8
NUM_TRAJECTORIES, EVERY = 16, 2  # images, and steps of the grid


@contextmanager
def rounded_weight(layer: Any, bits: int) -> Iterator[None]:
    """Round the weight of `layer` to `bits` inside the block."""
    kept, spec = layer.weight.data, WeightSpec(bits)
    layer.weight.data = fake_quantize_weight(kept, min_max_weight_scale(kept, spec), spec)
    try:
        yield
    finally:
        layer.weight.data = kept


@contextmanager
def rounded_input(layer: nn.Module, bits: int) -> Iterator[None]:
    """Round the input of `layer` to `bits` inside the block, with the range of each call."""

    def rounding(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (fake_quantize_activation(args[0], dynamic_activation_qparams(args[0], bits), bits),)

    hook = layer.register_forward_pre_hook(rounding)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def output_error(model: nn.Module, calibration: CalibrationSet) -> float:
    """Return the relative squared error of the outputs; a call has one timestep, as in sampling."""
    rows, denoiser = torch.arange(min(len(calibration), NUM_TRAJECTORIES)), calibration.denoiser(model)
    error, power = 0.0, 0.0
    for index in range(0, calibration.num_inference_steps, EVERY):
        calls = calibration.calls(rows, torch.full_like(rows, index))
        found, weight = denoiser(calls.state, calls.timestep, calls.condition), calls.weight[0].item()
        error += weight * (found - calls.output).square().mean().item()
        power += weight * calls.output.square().mean().item()
    return error / power


def row(subject: str, seed: int) -> dict[str, Any]:
    """Return the error of each layer of one model, rounded alone, shortcuts that stay in floating point included."""
    pipeline = teacher(subject, seed)
    calibration = calibration_set(pipeline, seed)
    model, layers = copy.deepcopy(pipeline.unet), []
    for name, layer in tqdm(match_modules(model, PQCADConfig()).items(), desc=subject, unit="layer"):
        errors = {"name": name, "num_weights": layer.weight.numel()}
        for bits in WEIGHT_BITS:
            with rounded_weight(layer, bits):
                errors[f"W{bits}"] = output_error(model, calibration)
        with rounded_input(layer, ACTIVATION_BITS):
            errors[f"A{ACTIVATION_BITS}"] = output_error(model, calibration)
        layers.append(errors)
    return {"subject": subject, "seed": seed, "layers": layers}


def main(arguments: list[str] | None = None) -> None:
    """Measure every model that is not there yet."""
    parser = parser_of(__doc__, "sensitivity")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    for subject in args.subjects:
        for seed in args.seeds:
            cached(args.output_dir / file_name(subject, seed), row, subject, seed)


if __name__ == "__main__":
    main()
