"""Block reconstruction: train one unit's latent weights and scales to give the full-precision unit's output.

Inspired by BRECQ (Li et al. 2021, arXiv:2102.05426) and Q-Diffusion (arXiv:2302.04304), with straight-through latent
weights in the place of AdaRound: latents carry over when the bits change, which a rounding of the original cannot.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_pqcad.compression.fake_quant import fake_quant_layers
from diffusers_pqcad.compression.optimization import check_minimum, parameter_groups

# Whole blocks where diffusers has them; a layer outside all of these is a unit of its own.
RECONSTRUCTION_UNITS = ("ResnetBlock2D", "BasicTransformerBlock", "Attention", "Downsample2D", "Upsample2D")


@dataclass(frozen=True)
class ReconstructionConfig:
    """Settings of one unit's reconstruction."""

    iterations: int = 100
    batch_size: int = 32
    step_rate: float = 1e-2  # of each layer's rounding step; Adam, with a cosine decay
    float_rate: float = 1e-3  # of the size of each tensor in floating point: biases and norms
    input_mix: float = 0.5  # share of full-precision inputs mixed in elementwise (QDrop, arXiv:2203.05740)
    held_out_fraction: float = 0.125

    def __post_init__(self) -> None:
        check_minimum(self, iterations=0, batch_size=1, step_rate=0, float_rate=0)
        if not (0 <= self.input_mix <= 1 and 0 < self.held_out_fraction < 1):
            raise ValueError(
                f"input_mix={self.input_mix}, held_out_fraction={self.held_out_fraction}: expected shares, the second "
                "between 0 and 1."
            )


@dataclass(frozen=True)
class UnitIO:
    """What one unit saw: `inputs` of the quantized model and of the full-precision one, and the latter's `target`.

    Arguments as tuples, the last ones by the names `keywords`; tensors (n, ...). `weight` (n,) is each sample's
    squared gain.
    """

    inputs: tuple[Any, ...]
    float_inputs: tuple[Any, ...]
    keywords: tuple[str, ...]
    target: Tensor
    weight: Tensor


@dataclass(frozen=True)
class UnitResult:
    """Held-out loss of a unit before and after; `accepted` says whether the training was kept."""

    name: str
    loss_before: float
    loss_after: float
    accepted: bool


class _Captured(Exception):
    """Ends a forward pass early, once the unit has been seen."""


def find_units(model: nn.Module) -> dict[str, nn.Module]:
    """Return the units of a fake-quantized `model` that hold quantized layers, by name, outermost first."""
    units: dict[str, nn.Module] = {}
    layers = fake_quant_layers(model)
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{unit}.") for unit in units)
        holds = name in layers or (
            type(module).__name__ in RECONSTRUCTION_UNITS and any(layer.startswith(f"{name}.") for layer in layers)
        )
        if holds and not inside:
            units[name] = module
    return units


@torch.no_grad()
def execution_order(model: nn.Module, units: Mapping[str, nn.Module], sample: Tensor, timestep: Tensor) -> list[str]:
    """Return the names of `units` as one forward pass meets them: registration order is not execution order."""
    order: list[str] = []
    hooks = [
        unit.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
        for name, unit in units.items()
    ]
    try:
        model(sample, timestep)
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(order))


@contextmanager
def recording(unit: nn.Module, record: dict[str, Any]) -> Iterator[None]:
    """Keep the arguments and the output of `unit` in `record`, and stop the pass right after it."""

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record.update(args=args, kwargs=kwargs, output=output)
        raise _Captured

    hook = unit.register_forward_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def capture_io(
    model: nn.Module,
    reference: nn.Module,
    name: str,
    sample: Tensor,
    timestep: Tensor,
    weight: Tensor,
    *,
    batch_size: int = 64,
) -> UnitIO:
    """Return what the unit `name` sees and should give, for samples (n, C, H, W) at timesteps (n,)."""
    pieces: list[tuple[tuple[Any, ...], tuple[Any, ...], Tensor]] = []
    for start in range(0, len(sample), batch_size):
        rows = slice(start, start + batch_size)
        records = []
        for network in (model, reference):
            record: dict[str, Any] = {}
            with recording(network.get_submodule(name), record), suppress(_Captured):
                network(sample[rows], timestep[rows])
            records.append(record)
        seen, wanted = records
        names = list(seen["kwargs"])
        pieces.append(
            (
                (*seen["args"], *(seen["kwargs"][key] for key in names)),
                (*wanted["args"], *(wanted["kwargs"][key] for key in names)),
                wanted["output"][0] if isinstance(wanted["output"], tuple) else wanted["output"],
            )
        )
    return UnitIO(
        _concatenate([piece[0] for piece in pieces]),
        _concatenate([piece[1] for piece in pieces]),
        tuple(names),
        torch.cat([piece[2] for piece in pieces]),
        weight,
    )


def random_mask(shape: torch.Size, share: float, generator: torch.Generator) -> Tensor:
    """Return a bool tensor in which each element is true with probability `share`, to the nearest 1/256.

    Four elements from each random integer: drawn one by one, the masks would take a good part of a reconstruction.
    """
    threshold = round(256 * share)
    if threshold in (0, 256):
        return torch.full(shape, threshold == 256)  # 256 does not fit a byte
    count = -(-shape.numel() // 4)
    draws = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int32).view(torch.uint8)
    return (draws[: shape.numel()] < threshold).view(shape)


def _concatenate(calls: list[tuple[Any, ...]]) -> tuple[Any, ...]:
    return tuple(
        torch.cat(values) if isinstance(values[0], Tensor) else values[0] for values in zip(*calls, strict=True)
    )


def unit_loss(
    unit: nn.Module, arguments: tuple[Any, ...], keywords: tuple[str, ...], target: Tensor, weight: Tensor
) -> Tensor:
    """Return the gain-weighted mean squared error of the unit's output; the last arguments go by name."""
    num_positional = len(arguments) - len(keywords)
    output = unit(*arguments[:num_positional], **dict(zip(keywords, arguments[num_positional:], strict=True)))
    output = output[0] if isinstance(output, tuple) else output
    return ((output - target).square().flatten(1).mean(dim=1) * weight).mean()


def reconstruct(
    unit: nn.Module, io: UnitIO, config: ReconstructionConfig, *, name: str = "", seed: int = 0
) -> UnitResult:
    """Train `unit` (a block or a single layer) in place on `io`; kept only if the held-out loss improves."""
    num_held_out = max(1, int(len(io.target) * config.held_out_fraction))
    train, held_out = slice(0, len(io.target) - num_held_out), slice(len(io.target) - num_held_out, None)

    def rows_of(values: tuple[Any, ...], rows: Any) -> tuple[Any, ...]:
        return tuple(value[rows] if isinstance(value, Tensor) else value for value in values)

    @torch.no_grad()
    def held_out_loss() -> float:
        inputs = rows_of(io.inputs, held_out)
        return unit_loss(unit, inputs, io.keywords, io.target[held_out], io.weight[held_out]).item()

    loss_before = held_out_loss()
    before = {key: value.clone() for key, value in unit.state_dict().items()}
    optimizer = torch.optim.Adam(parameter_groups(unit, config.step_rate, config.float_rate))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(config.iterations, 1))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(config.iterations):
        rows = torch.randint(0, train.stop, (config.batch_size,), generator=generator)
        inputs, float_inputs = rows_of(io.inputs, rows), rows_of(io.float_inputs, rows)
        mixed = tuple(
            torch.where(random_mask(own.shape, config.input_mix, generator).to(own.device), full, own)
            if isinstance(own, Tensor)
            else own
            for own, full in zip(inputs, float_inputs, strict=True)
        )
        loss = unit_loss(unit, mixed, io.keywords, io.target[rows], io.weight[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    loss_after = held_out_loss()
    accepted = loss_after < loss_before
    if not accepted:
        unit.load_state_dict(before)
    return UnitResult(name, loss_before, loss_after, accepted)


def channel_mean(output: Tensor, layer: nn.Module) -> Tensor:
    """Return the mean of a layer's `output` for each output channel, (C_out,)."""
    if isinstance(layer, nn.Linear):
        return output.flatten(0, -2).mean(dim=0)
    return output.mean(dim=[axis for axis in range(output.dim()) if axis != 1])


@torch.no_grad()
def correct_biases_(
    model: nn.Module, reference: nn.Module, order: list[str], sample: Tensor, timestep: Tensor
) -> None:
    """Shift the bias of each quantized layer so that its output's mean is the full-precision one, in place.

    b += E[y_fp - y_q] for each output channel, in execution `order`, so that a layer sees the corrections before it
    (Nagel et al. 2019, arXiv:1906.04721, section 4.2; exact for the samples given). Layers without a bias are left.
    """
    names = [name for name in order if model.get_submodule(name).bias is not None]
    wanted: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda layer, args, output: wanted.update({name: channel_mean(output, layer)})

    hooks = [reference.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        reference(sample, timestep)
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        layer = model.get_submodule(name)
        record: dict[str, Any] = {}
        with recording(layer, record), suppress(_Captured):
            model(sample, timestep)
        model.get_parameter(f"{name}.bias").add_(wanted[name] - channel_mean(record["output"], layer))
