"""From float models to packed ones and back, in memory."""

import logging
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import torch
from torch import nn

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels import memory
from diffusers_pqcad.kernels.native import weights
from diffusers_pqcad.layers.derived import is_quantizable, quantized_type
from diffusers_pqcad.layers.find import is_of_adapter, layer_name, packed_layers
from diffusers_pqcad.layers.quantized import FloatLayer, QuantizedLayer
from diffusers_pqcad.layers.timesteps import TimestepGroups, install_timestep_groups, remove_timestep_groups
from diffusers_pqcad.loading.config import FORMAT_VERSION, PQCADConfig, matches
from diffusers_pqcad.loading.coverage import report
from diffusers_pqcad.loading.depth import GAIN_PER_LEVEL, gains_by_depth, shortcuts_at_the_output
from diffusers_pqcad.loading.student_calls import unwatch_calls_, watch_calls_
from diffusers_pqcad.numerics.allocation import allocate
from diffusers_pqcad.numerics.qparams import (
    WeightSpec,
    relative,
)
from diffusers_pqcad.runtime import install_, remove_

logger = logging.getLogger(__name__)
OUR_ENTRIES = ("quantization_config", "_pre_quantization_dtype")  # of a diffusers config
SAMPLED_WEIGHTS = 2**18
# Where IP-Adapters put layers of their own: at the root of SD3 and of UNets and Flux, and into attention processors.
OF_ADAPTERS = ("image_proj.", "encoder_hid_proj.image_projection_layers.")


def quantizable_layers(model: nn.Module) -> dict[str, FloatLayer]:
    """Return the layers of `model` that can be quantized and are not, by name, in registration order.

    Without those of an IP-Adapter: its class does not build them, so a saved model could not be loaded. And without
    those of a LoRA, which stays in floating point; the layers below it go by their own names.
    """
    return {
        layer_name(name): cast(FloatLayer, module)
        for name, module in model.named_modules()
        if (is_quantizable(module) or (isinstance(module, QuantizedLayer) and not module.packed))
        and not (name.startswith(OF_ADAPTERS) or ".processor." in name or is_of_adapter(name))
    }


def with_model_exemptions(model: nn.Module, config: PQCADConfig) -> PQCADConfig:
    """Return a copy of `config` that also excludes the layers which stay in floating point in a model of its kind.

    In transformers models: tied weights, output layers and the last module, by transformers' own choice for all
    methods; and convolutions, the first layers of vision and audio models. In UNets: `shortcuts_at_the_output`, unless
    `search_all_modules` or bits that were decided for them say otherwise.
    """
    layers = quantizable_layers(model)
    exempt: set[str] = set()
    if not config.search_all_modules:
        shortcuts = set(shortcuts_at_the_output(layers)) - set(config.weight_bits_by_module)
        exempt = {name for name in shortcuts if not config.is_exempt(name)}
    if is_transformers_model(model):
        from transformers.quantizers.base import get_keys_to_not_convert

        convolutions = [name for name, layer in layers.items() if not isinstance(layer, nn.Linear)]
        exempt = {*get_keys_to_not_convert(model), *convolutions} - set(config.modules_to_not_convert)
    added = [pattern for pattern in sorted(exempt) if any(matches(name, pattern) for name in layers)]
    return PQCADConfig(**config.to_dict() | {"modules_to_not_convert": [*config.modules_to_not_convert, *added]})


def is_transformers_model(model: nn.Module) -> bool:
    """Return whether `model` is one of transformers, or derived from one."""
    return any(
        kind.__name__ == "PreTrainedModel" and kind.__module__.startswith("transformers.")
        for kind in type(model).__mro__
    )


def match_modules(model: nn.Module, config: PQCADConfig) -> dict[str, FloatLayer]:
    """Return the layers of `model` that `config` quantizes ("searched"), by name, in registration order.

    Raises ValueError for a pattern that matches nothing or a group size that does not divide; warns if none is left.
    """
    layers = quantizable_layers(model)
    if "" in layers:
        raise ValueError(f"{type(model).__name__} is a single layer; wrap it, as in nn.Sequential(layer).")
    config.check_patterns(layers)
    searched = {name: module for name, module in layers.items() if not config.is_exempt(name)}
    if not searched:
        warnings.warn(
            f"{type(model).__name__} has nothing to quantize: {len(layers)} Linear and convolution layers, all of "
            "them exempt. It stays as it is. See modules_to_not_convert and search_all_modules.",
            stacklevel=3,
        )
    check_group_size(searched, config.group_size)
    return searched


def check_group_size(layers: Mapping[str, FloatLayer], group_size: int | None) -> None:
    """Raise ValueError for a Linear layer whose inputs `group_size` does not divide."""
    for name, layer in layers.items():
        if group_size is not None and isinstance(layer, nn.Linear) and layer.in_features % group_size:
            raise ValueError(
                f"{name}: group_size={group_size} must divide {layer.in_features}, its number of inputs. Use "
                "group_size=None or exclude the layer with modules_to_not_convert."
            )


def swap_(model: nn.Module, names: Mapping[str, nn.Module]) -> dict[str, QuantizedLayer]:
    """Replace the named float layers by unpacked quantized layers that share their parameters; return those."""
    swapped = {}
    for name, module in names.items():
        kind = quantized_type(type(module))
        layer = module if isinstance(module, QuantizedLayer) else kind.from_float(module, name)  # type: ignore[union-attr]
        model.set_submodule(name, layer)
        swapped[name] = layer
    return swapped


@torch.no_grad()
def relative_weight_error(weight: torch.Tensor, spec: WeightSpec) -> float:
    """Return ||Q(W) - W||^2 / ||W||^2 with min-max scales: the data-free perturbation of one layer.

    Of large layers, about SAMPLED_WEIGHTS weights in evenly spaced rows are looked at.
    """
    weight = weight.detach()[:: max(1, weight.numel() // SAMPLED_WEIGHTS)]
    return relative(weights.quantize(weight, spec)[2])


def decide_bits(
    layers: Mapping[str, FloatLayer], config: PQCADConfig, gain_per_level: float = GAIN_PER_LEVEL
) -> dict[str, int]:
    """Return bits per layer without data: the config's own decision, one width, or the controller.

    It moves a layer by its relative weight error, times the gain of the layer's depth (`gains_by_depth`).
    """
    if config.method == "fixed":
        return dict.fromkeys(layers, int(config.weight_bits))
    if config.weight_bits_by_module:
        missing = sorted(set(layers) - set(config.weight_bits_by_module))
        if missing:
            raise ValueError(f"weight_bits_by_module lacks {len(missing)} layers, such as {missing[:3]}.")
        unknown = sorted(set(config.weight_bits_by_module) - set(layers))
        if unknown:
            raise ValueError(
                f"weight_bits_by_module: {unknown[0]!r} is not a layer that this config quantizes. Remove the "
                "entry, or give the config that belongs to this model."
            )
        return {name: config.weight_bits_by_module[name] for name in layers}

    gains = gains_by_depth(layers, gain_per_level)

    @cache
    def error_of(name: str, bits: int) -> float:
        group_size = config.group_size if isinstance(layers[name], nn.Linear) else None
        try:
            return gains[name] * relative_weight_error(layers[name].weight, WeightSpec(bits, group_size))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None

    num_weights = {name: layer.weight.numel() for name, layer in layers.items()}
    return allocate(num_weights, error_of, budget=config.weight_bits, bit_choices=config.bit_choices)


def refuse_not_finite(layers: Mapping[str, FloatLayer]) -> None:
    """Raise ValueError for weights that are not finite."""
    for name, layer in layers.items():
        if not weights.largest_magnitudes(layer.weight).isfinite().all():
            raise ValueError(f"{name}: the weights hold a NaN or an infinity, and cannot be quantized.")


def decide_config(layers: Mapping[str, FloatLayer], config: PQCADConfig) -> PQCADConfig:
    """Return a copy of `config` that says what quantizing the float `layers` without data gives; changes nothing.

    Raises ValueError for bits that do not cover the layers. Weights that are not finite are found here or, some of
    them, when their layer is packed; `refuse_not_finite` finds all of them before anything changes.
    """
    bits = decide_bits(layers, config) if layers else {}
    # Static activation ranges need data; without, a saved model must not ask for them.
    decisions = {"weight_bits_by_module": bits, "timestep_boundaries": None, "format_version": FORMAT_VERSION}
    return PQCADConfig(**config.to_dict() | decisions)


def pack_layers_(layers: Mapping[str, QuantizedLayer], config: PQCADConfig) -> None:
    """Pack `layers` in place as `config` says; each float weight is dropped before the next layer is packed."""
    for name, layer in layers.items():
        spec = config.weight_spec(name, is_linear=isinstance(layer, nn.Linear))
        layer.pack_(spec, activation_bits=config.activation_bits)


def quantize_(model: nn.Module, config: PQCADConfig) -> nn.Module:
    """Quantize `model` in place, as `from_pretrained(..., quantization_config=config)` would, and return it.

    Needs no data: bits come from the weights alone, activation ranges from each call. `requantize_` lowers the bits of
    a quantized model. Raises ValueError, with the model unchanged, for settings that do not fit it.
    """
    if packed_layers(model):
        raise ValueError(
            f"{type(model).__name__} is quantized already. requantize_() changes its bits; dequantize() undoes it."
        )
    if hasattr(model, "pqcad_config"):
        raise ValueError(
            f"{type(model).__name__} has the fake-quantized weights of progressive_quantize. Call convert_ to pack "
            "them."
        )
    refuse_adapters(model)
    config = with_model_exemptions(model, config)
    searched = match_modules(model, config)
    refuse_not_finite(searched)
    decided = decide_config(searched, config)
    layers = swap_(model, searched)
    del searched  # or it would keep all float weights alive while the layers are packed
    pack_layers_(layers, decided)
    finish_(model, decided)
    mark_quantized_(model, decided)
    return model


def refuse_adapters(model: nn.Module) -> None:
    """Raise ValueError for a model with peft adapters: they rename the layers, and would be quantized themselves."""
    adapted = next((name for name, _ in model.named_modules() if name.endswith(".base_layer")), None)
    if adapted is not None:
        raise ValueError(
            f"{type(model).__name__} carries adapters (such as on {adapted.removesuffix('.base_layer')}). Unload them "
            "first, as with unload_lora(); afterwards they can be loaded again."
        )


def quantization_config_of(model: Any) -> PQCADConfig:
    """Return what a quantized `model` of diffusers or transformers says of itself; ValueError for other modules."""
    config = getattr(model, "config", None)
    found = config.get("quantization_config") if isinstance(config, Mapping) else None
    found = getattr(config, "quantization_config", None) if found is None else found
    if found is None:
        raise ValueError(
            f"{type(model).__name__} keeps no quantization_config, as diffusers and transformers models do. Quantize "
            "the float model anew with quantize_()."
        )
    return PQCADConfig.from_dict(found) if isinstance(found, dict) else found


def requantize_(model: Any, config: PQCADConfig) -> nn.Module:
    """Quantize the quantized `model` anew as `config` says, in place and layer by layer, and return it.

    The same as `quantize_(model.dequantize(), config)`, but only one weight at a time is in floating point. The layers
    and the steps of a student stay the same; activation ranges are dynamic afterwards. Raises ValueError, with the
    model unchanged, for more bits than it has, settings that do not fit it, or a model that is not quantized.
    """
    layers = packed_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} is not quantized; call quantize_().")
    refuse_adapters(model)
    before = quantization_config_of(model)
    asked = with_model_exemptions(model, config)  # as `quantize_` made `before` of what it was asked
    for setting in ("modules_to_not_convert", "search_all_modules"):
        allowed = getattr(before, setting), getattr(PQCADConfig(), setting)
        if getattr(config, setting) not in allowed and getattr(asked, setting) not in allowed:
            raise ValueError(
                f"{setting}: the layers of a quantized model stay the same; expected {getattr(before, setting)}, got "
                f"{getattr(config, setting)}. Leave it out, or quantize the float model."
            )
    if config.weight_bits > before.weight_bits:
        raise ValueError(
            f"weight_bits: expected at most {before.weight_bits}, those of this model, got {config.weight_bits}. What "
            "was rounded away does not come back: quantize the float model."
        )
    kept = {
        setting: getattr(before, setting)
        for setting in ("modules_to_not_convert", "search_all_modules", "num_inference_steps", "guidance_folded")
    }
    config = PQCADConfig(**config.to_dict() | kept)
    check_group_size(layers, config.group_size)
    refuse_not_finite(layers)
    decided = decide_config(layers, config)
    remove_timestep_groups(model)
    for name, layer in layers.items():
        layer.unpack_()
        pack_layers_({name: layer}, decided)
    finish_(model, decided)
    mark_quantized_(model, decided)
    return model


def finish_(model: nn.Module, config: PQCADConfig) -> None:
    """Do what every packed model needs once: share the timestep groups, count parameters right, log the kernels.

    `config.packed_share` becomes that of `model`.
    """
    layers = packed_layers(model)
    for name, layer in layers.items():
        layer.name = name
    if config.timestep_boundaries is not None:
        share_timestep_groups(model, install_timestep_groups(model, config.timestep_boundaries))
    watch_calls_(model, config)
    coverage = report(model, config)
    config.packed_share = round(coverage.share(coverage.packed), 6)
    install_(model)
    if layers:
        is_short = memory.is_short(layer.operation() for layer in layers.values())
        for layer in layers.values():
            layer.is_memory_short = is_short
        found = [layer.operation() for layer in layers.values()]
        summary = f"{coverage}; {kernels.summary(found)}"
        log_once(type(model).__name__, summary, slow=kernels.lacks_fast_kernel(found))


@cache
def log_once(name: str, summary: str, *, slow: bool) -> None:
    """Log which kernels the layers of a model will take: a warning where this computer has no fast one for some."""
    if slow:
        summary += ". On reference, weights are unpacked in each call and multiplied in floating point, which is slow"
    logger.log(logging.WARNING if slow else logging.INFO, "%s: %s", name, summary)


def share_timestep_groups(model: nn.Module, groups: TimestepGroups) -> None:
    """Let every packed layer of `model` with static ranges read `groups`."""
    for layer in packed_layers(model).values():
        if layer.input_scale is not None:
            layer.timestep_groups = groups


def replace_config_(model: Any, entries: Mapping[str, Any]) -> None:
    """Make `entries` the config of a diffusers `model`; what others set on it as an attribute stays.

    An IP-Adapter names its kind by `model.config.encoder_hid_dim_type = ...`, which is no entry, and which
    `register_to_config` loses.
    """
    before = model._internal_dict
    config = type(before)(entries)
    theirs = {
        name: value
        for name, value in vars(before).items()
        # As it writes a config, diffusers puts a dict in the place of our entry, and leaves the attribute as it was.
        if before.get(name, ...) is not value and name not in OUR_ENTRIES
    }
    vars(config).update(theirs)
    model._internal_dict = config


def mark_quantized_(model: Any, config: PQCADConfig) -> None:
    """Make a diffusers or transformers `model` that was quantized in memory look as if loaded so; else do nothing."""
    if hasattr(model, "register_to_config"):
        from diffusers.quantizers.auto import DiffusersAutoQuantizer as AutoQuantizer

        replace_config_(model, {**model.config, "quantization_config": config})
    elif is_transformers_model(model):
        from transformers.quantizers.auto import AutoHfQuantizer as AutoQuantizer

        model.config.quantization_config = config
    else:
        return
    model.is_quantized = True
    model.quantization_method = config.quant_method
    model.hf_quantizer = AutoQuantizer.from_config(config, pre_quantized=True)


def unmark_quantized_(model: Any) -> None:
    """Undo `mark_quantized_` and `finish_`."""
    remove_timestep_groups(model)
    unwatch_calls_(model)
    remove_(model)
    if hasattr(model, "_internal_dict"):
        # diffusers leaves the entry, so that a saved float model would say that it is quantized.
        kept = {key: value for key, value in model._internal_dict.items() if key not in OUR_ENTRIES}
        replace_config_(model, kept)
    model.__dict__.pop("quantization_method", None)
    model.is_quantized = False


def dequantize_(model: nn.Module) -> nn.Module:
    """Replace every packed layer by a plain float layer, in place, and remove every trace of the quantization."""
    for name, layer in packed_layers(model).items():
        model.set_submodule(name, layer.to_float())
    unmark_quantized_(model)
    return model
