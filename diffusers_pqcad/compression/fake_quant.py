"""Fake quantization: float layers that compute with rounded weights and activations, so that both can be trained.

A parametrization of `.weight` and a forward-pre-hook on the input leave every layer an `nn.Conv2d` or `nn.Linear`. The
float weight under the parametrization is the *latent* weight; it is carried along as the bits change. `convert_` turns
the result into packed layers with exactly the same levels.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from diffusers_pqcad.compression.offload import Store, offload_
from diffusers_pqcad.compression.processes import each
from diffusers_pqcad.kernels.operation import qparams_of_group
from diffusers_pqcad.layers.find import layer_name
from diffusers_pqcad.layers.quantized import FloatLayer
from diffusers_pqcad.layers.timesteps import TimestepGroups, install_timestep_groups
from diffusers_pqcad.loading.config import FORMAT_VERSION, PQCADConfig
from diffusers_pqcad.loading.convert import finish_, mark_quantized_, match_modules, refuse_adapters, swap_
from diffusers_pqcad.numerics.qparams import (
    ActivationQParams,
    WeightSpec,
    activation_qparams,
    dynamic_activation_qparams,
    fake_quantize_activation,
    fake_quantize_weight,
    min_max_weight_scale,
)

MAX_TIMESTEP_GROUPS = 8
RANGE_TRAJECTORIES = 32  # whose smallest and largest inputs make the static ranges


class WeightFakeQuantize(nn.Module):
    """Parametrization that rounds a latent weight onto a grid; `scale` (C_out, G) is learned (LSQ)."""

    def __init__(self, weight: Tensor, spec: WeightSpec) -> None:
        super().__init__()
        self.spec = spec
        self.scale = nn.Parameter(min_max_weight_scale(weight, spec))
        self.at_rest: Tensor | None = None  # the rounded weight, while nothing that it depends on moves

    @classmethod
    def blank(cls, weight: Tensor, spec: WeightSpec) -> "WeightFakeQuantize":
        """Return one for a `weight` without numbers, whose range cannot be looked at: its scales have none either."""
        found = cls.__new__(cls)
        nn.Module.__init__(found)
        found.spec, found.at_rest = spec, None
        found.scale = nn.Parameter(weight.new_empty(len(weight), spec.num_groups(weight[0].numel())))
        return found

    def forward(self, weight: Tensor) -> Tensor:
        """Return the rounded weight, differentiable in the latent weight and the scale unless they are at rest."""
        return fake_quantize_weight(weight, self.scale, self.spec) if self.at_rest is None else self.at_rest


class InputFakeQuantize(nn.Module):
    """Rounds a layer's input: dynamic until `scale` and `zero_point` (G,) are set, then by timestep group."""

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, name: str, bits: int) -> None:
        super().__init__()
        self.name, self.bits = name, bits
        self.enabled = False  # weights are decided with float activations; see progressive.py
        self.groups: TimestepGroups | None = None
        self.register_buffer("scale", None)
        self.register_buffer("zero_point", None)

    def set_qparams_(self, qparams: ActivationQParams, groups: TimestepGroups) -> None:
        """Make the range static: `qparams` has one entry per group."""
        self.scale, self.zero_point, self.groups = qparams.scale, qparams.zero_point, groups

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` rounded to its codes and back."""
        if not self.enabled:
            return x
        if self.scale is None or self.zero_point is None or self.groups is None:
            return fake_quantize_activation(x, dynamic_activation_qparams(x, self.bits), self.bits)
        group = self.groups.of_call(self.name)
        qparams = qparams_of_group(ActivationQParams(self.scale, self.zero_point), group, x, self.name)
        return fake_quantize_activation(x, qparams, self.bits)


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the input of a layer's call; motion modules name it."""
    return args[0] if args else kwargs["input"]


def round_input(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward-pre-hook: pass the layer's input through its `InputFakeQuantize`."""
    return (layer.input_fake_quantize(input_of(args, kwargs)),), {}  # type: ignore[operator]


def prepare_(model: nn.Module, config: PQCADConfig, bits: Mapping[str, int]) -> nn.Module:
    """Fake-quantize the layers of `model` that `config` searches, in place, at `bits` each (min-max scales).

    The config is kept as `model.pqcad_config` for `convert_`. Raises ValueError, model unchanged, for NaN weights.
    """
    layers = match_modules(model, config)
    specs = {
        name: WeightSpec(bits[name], config.group_size if isinstance(layer, nn.Linear) else None)
        for name, layer in layers.items()
    }
    quantizers = {}
    for name, layer in layers.items():
        try:
            quantizers[name] = WeightFakeQuantize(layer.weight, specs[name])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", quantizers[name])
        if config.activation_bits is not None:
            layer.input_fake_quantize = InputFakeQuantize(name, config.activation_bits)
            layer.register_forward_pre_hook(round_input, with_kwargs=True)
    model.pqcad_config = config
    return model.requires_grad_(True)  # latents are trained, also where the float model was frozen


def fake_quant_layers(model: nn.Module) -> dict[str, FloatLayer]:
    """Return the fake-quantized layers of `model` by name, in registration order; adapted ones by their own names."""
    return {layer_name(name): module for name, module in model.named_modules() if is_fake_quant(module)}


def is_fake_quant(module: nn.Module) -> TypeGuard[FloatLayer]:
    """Return whether `module` is a layer that `prepare_` changed."""
    return parametrize.is_parametrized(module, "weight") and isinstance(weight_quantizer(module), WeightFakeQuantize)


def weight_quantizer(layer: nn.Module) -> WeightFakeQuantize:
    """Return the parametrization of a fake-quantized layer."""
    return layer.parametrizations.weight[0]  # type: ignore[union-attr,index,return-value]


def latent_weight(layer: nn.Module) -> nn.Parameter:
    """Return the float weight under the parametrization of a fake-quantized layer."""
    return layer.parametrizations.weight.original  # type: ignore[union-attr,return-value]


@contextmanager
def weights_at_rest(model: nn.Module) -> Iterator[None]:
    """Round those weights of `model` once that nothing trains inside the block: latents and scales without gradients.

    torch's own `parametrize.cached` keeps tensors by the addresses of their modules, of all models in the process.
    """
    resting = []
    for layer in fake_quant_layers(model).values():
        quantizer = weight_quantizer(layer)
        if not (latent_weight(layer).requires_grad or quantizer.scale.requires_grad):
            quantizer.at_rest = layer.weight.detach()
            resting.append(quantizer)
    try:
        yield
    finally:
        for quantizer in resting:
            quantizer.at_rest = None


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Let fake-quantized layers be plain float layers inside the block, with their latent weights.

    peft builds the adapter of a convolution as `type(base_layer)(...)`: a parametrized one has no place for a weight.
    """
    classes = {layer: type(layer) for layer in fake_quant_layers(model).values()}
    for layer, kind in classes.items():
        layer.__class__ = kind.__bases__[0]
        layer.register_parameter("weight", latent_weight(layer))
    try:
        yield
    finally:
        for layer, kind in classes.items():
            del layer.weight
            layer.__class__ = kind


def bits_by_module(model: nn.Module) -> dict[str, int]:
    """Return the bits of every fake-quantized layer."""
    return {name: weight_quantizer(layer).spec.bits for name, layer in fake_quant_layers(model).items()}


@torch.no_grad()
def set_bits_(layer: nn.Module, bits: int) -> None:
    """Move a fake-quantized layer to `bits`, with a min-max scale of its latent weight."""
    quantizer = weight_quantizer(layer)
    quantizer.spec = WeightSpec(bits, quantizer.spec.group_size)
    quantizer.scale.copy_(min_max_weight_scale(latent_weight(layer), quantizer.spec))


@contextmanager
def at_bits(layer: nn.Module, bits: int) -> Iterator[None]:
    """Compute with `layer` at `bits` inside the block, and restore its bits and scale after it."""
    quantizer = weight_quantizer(layer)
    spec, scale = quantizer.spec, quantizer.scale.detach().clone()
    set_bits_(layer, bits)
    try:
        yield
    finally:
        quantizer.spec = spec
        with torch.no_grad():
            quantizer.scale.copy_(scale)


def input_quantizers(model: nn.Module) -> list[InputFakeQuantize]:
    """Return the input quantizers of `model`, in registration order."""
    return [module for module in model.modules() if isinstance(module, InputFakeQuantize)]


def enable_activations_(model: nn.Module, enabled: bool) -> None:
    """Switch the rounding of activations on or off in the whole model."""
    for quantizer in input_quantizers(model):
        quantizer.enabled = enabled


def segment_timesteps(log_ranges: Tensor, num_groups: int) -> list[int]:
    """Return the first index of each of `num_groups` contiguous groups that waste the least range.

    `log_ranges` is (N, layers): log of each layer's range at each step. A group's range is its largest, so the cost of
    a step is log(group range) - log(own range), summed over layers: the bits of precision lost, up to a factor.
    Optimal by dynamic programming (as 1-D segmentation; Jackson et al. 2005).
    """
    num_steps = len(log_ranges)
    num_groups = min(num_groups, num_steps)
    cost = torch.full((num_steps, num_steps + 1), torch.inf, dtype=torch.float64)
    for first in range(num_steps):
        for last in range(first + 1, num_steps + 1):
            segment = log_ranges[first:last].double()
            cost[first, last] = (segment.amax(dim=0) - segment).sum()
    best = torch.full((num_groups + 1, num_steps + 1), torch.inf, dtype=torch.float64)
    choice = torch.zeros(num_groups + 1, num_steps + 1, dtype=torch.long)
    best[0, 0] = 0
    for group in range(1, num_groups + 1):
        candidates = best[group - 1, :num_steps, None] + cost  # (first, last)
        best[group], choice[group] = candidates.min(dim=0)
    firsts, last = [], num_steps
    for group in range(num_groups, 0, -1):
        last = int(choice[group, last])
        firsts.append(last)
    return firsts[::-1]


@torch.no_grad()
def calibrate_activations_(
    model: nn.Module,
    steps: Iterable[tuple[int | float, Callable[[], Any]]],
    *,
    num_groups: int = MAX_TIMESTEP_GROUPS,
) -> list[int | float]:
    """Set static activation ranges per timestep group, from float activations of the quantized-weight model.

    `steps` yields, in any order, the timestep that the model is called with and a function that
    runs the model there. A range is the smallest and the largest input seen in its group. Returns the boundaries of
    the groups, and switches the rounding on. Several processes take turns with the steps, and get the ranges of all.
    """
    quantizers = input_quantizers(model)
    if not quantizers:
        return []
    layers = [
        layer
        for layer in model.modules()
        if isinstance(getattr(layer, "input_fake_quantize", None), InputFakeQuantize)
    ]
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    def watch(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        low, high = (x := input_of(args, kwargs)).amin(), x.amax()
        before = seen.get(id(layer))
        seen[id(layer)] = (low, high) if before is None else (before[0].minimum(low), before[1].maximum(high))

    def ranges(step: tuple[int | float, Callable[[], Any]]) -> tuple[int | float, Tensor, Tensor]:
        timestep, run = step
        seen.clear()
        run()
        missing = [layer.input_fake_quantize.name for layer in layers if id(layer) not in seen]  # type: ignore
        if missing:
            raise ValueError(f"{missing[0]}: the model never calls this layer, so it has no activation range.")
        low, high = (torch.stack([seen[id(layer)][end] for layer in layers]) for end in (0, 1))
        return timestep, low, high

    enable_activations_(model, False)
    hooks = [layer.register_forward_pre_hook(watch, with_kwargs=True) for layer in layers]
    try:
        observed = each(steps, ranges, next(model.parameters()).device)
    finally:
        for hook in hooks:
            hook.remove()
    # Some models' timesteps increase from noise to image (Lumina's).
    observed.sort(key=lambda entry: entry[0], reverse=True)
    timesteps, lows, highs = (list(values) for values in zip(*observed, strict=True))
    low, high = torch.stack(lows).clamp(max=0), torch.stack(highs).clamp(min=0)  # (N, layers)
    firsts = segment_timesteps((high - low).clamp(min=1e-12).log(), num_groups)
    # Half-way between the last timestep of a group and the first of the next; timesteps decrease along the grid.
    boundaries = sorted(half_way(timesteps[first - 1], timesteps[first]) for first in firsts[1:])
    groups = install_timestep_groups(model, boundaries)
    ends = [*firsts[1:], len(timesteps)]
    group_low = torch.stack([low[first:end].amin(dim=0) for first, end in zip(firsts, ends, strict=True)]).flip(0)
    group_high = torch.stack([high[first:end].amax(dim=0) for first, end in zip(firsts, ends, strict=True)]).flip(0)
    for index, layer in enumerate(layers):
        quantizer: InputFakeQuantize = layer.input_fake_quantize  # type: ignore[assignment]
        quantizer.set_qparams_(activation_qparams(group_low[:, index], group_high[:, index], quantizer.bits), groups)
    enable_activations_(model, True)
    return boundaries


def half_way(one: int | float, other: int | float) -> int | float:
    """Return the middle of two timesteps; of two integers the integer at or above it."""
    if isinstance(one, int) and isinstance(other, int):
        return (one + other + 1) // 2
    return (one + other) / 2


def timestep_boundaries(model: nn.Module) -> list[int | float] | None:
    """Return the boundaries of a fake-quantized model's static activation ranges; `None` while they are dynamic."""
    for quantizer in input_quantizers(model):
        if quantizer.groups is not None:
            return list(quantizer.groups.boundaries)
    return None


def fake_quant_state(model: nn.Module) -> dict[str, Any]:
    """Return everything that PQ and CAD change in `model`, for a resume file."""
    return {
        "tensors": dict(model.state_dict()),
        "bits": bits_by_module(model),
        "timestep_boundaries": timestep_boundaries(model),
        "activations_enabled": any(quantizer.enabled for quantizer in input_quantizers(model)),
    }


@torch.no_grad()
def load_fake_quant_state_(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Bring a prepared `model` into the state of `fake_quant_state`, on the model's device."""
    device = next(model.parameters()).device
    for name, layer in fake_quant_layers(model).items():
        quantizer = weight_quantizer(layer)
        quantizer.spec = WeightSpec(state["bits"][name], quantizer.spec.group_size)
    boundaries = state["timestep_boundaries"]
    groups = None if boundaries is None else install_timestep_groups(model, boundaries)
    for name, module in model.named_modules():
        if isinstance(module, InputFakeQuantize):
            if groups is None:
                module.scale = module.zero_point = module.groups = None
            else:
                scale, zero_point = (state["tensors"][f"{name}.{key}"] for key in ("scale", "zero_point"))
                module.set_qparams_(ActivationQParams(*(v.to(device, copy=True) for v in (scale, zero_point))), groups)
    enable_activations_(model, state["activations_enabled"])
    model.load_state_dict(state["tensors"], strict=True)


def unparametrize_(layer: nn.Module, weight: Tensor) -> None:
    """Make a fake-quantized `layer` a plain float layer again, with `weight`.

    torch's `remove_parametrizations` deletes the property from the layer's class, which copies of the layer share.
    """
    layer.__class__ = type(layer).__bases__[0]
    del layer.parametrizations
    layer.register_parameter("weight", nn.Parameter(weight.detach().clone()))


@torch.no_grad()
def freeze_(model: nn.Module, store: Store | None = None) -> nn.Module:
    """Replace the weight parametrizations by their rounded result, in place: a faster model that only infers.

    With a `store` the rounded weights lie there, each from when it is made (`offload_`).
    """
    for layer in fake_quant_layers(model).values():
        unparametrize_(layer, layer.weight)
        offload_(layer, store)
    return model.requires_grad_(False).eval()


@torch.no_grad()
def convert_(model: nn.Module, *, num_inference_steps: int | None = None, guidance_folded: bool = False) -> nn.Module:
    """Turn a fake-quantized `model` (a copy, if the latents are still needed) into packed layers, in place.

    Levels, scales and activation ranges are exactly those that fake quantization computed with.
    `num_inference_steps` is recorded in the config as the steps that a student was distilled for, `guidance_folded` as
    whether it answers in one branch.
    """
    layers = fake_quant_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no fake-quantized layer; call progressive_quantize first.")
    refuse_adapters(model)
    config: PQCADConfig = copy.deepcopy(model.pqcad_config)  # type: ignore[assignment]
    config.weight_bits_by_module = bits_by_module(model)
    config.method = "progressive"
    config.timestep_boundaries = timestep_boundaries(model)
    config.num_inference_steps, config.guidance_folded = num_inference_steps, guidance_folded
    config.format_version = FORMAT_VERSION
    specs = {name: weight_quantizer(layer).spec for name, layer in layers.items()}
    scales = {name: weight_quantizer(layer).scale.detach().clone().clamp(min=1e-12) for name, layer in layers.items()}
    inputs = {name: getattr(layer, "input_fake_quantize", None) for name, layer in layers.items()}
    for layer in layers.values():
        unparametrize_(layer, latent_weight(layer))
        if hasattr(layer, "input_fake_quantize"):
            del layer.input_fake_quantize
            for key, hook in list(layer._forward_pre_hooks.items()):
                if hook is round_input:
                    del layer._forward_pre_hooks[key], layer._forward_pre_hooks_with_kwargs[key]
    groups = None if config.timestep_boundaries is None else install_timestep_groups(model, config.timestep_boundaries)
    for name, layer in swap_(model, layers).items():
        layer.pack_(specs[name], activation_bits=config.activation_bits, scale=scales[name])
        quantizer = inputs[name]
        if groups is not None and quantizer is not None:
            layer.set_input_qparams_(ActivationQParams(quantizer.scale, quantizer.zero_point), groups)
    del model.pqcad_config
    model.__dict__.pop("pqcad_source_hash", None)
    finish_(model, config)
    mark_quantized_(model, config)
    return model
