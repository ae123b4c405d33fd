"""What the loaders of diffusers and transformers share: layers are swapped before the tensors come, packed after.

Swapped first, with float placeholders, because device hooks are attached before the post-processing; packed last,
because a bit budget needs all the weights.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from diffusers_pqcad.config import PQCADConfig, matches
from diffusers_pqcad.convert import (
    decide_config,
    finish_,
    match_modules,
    pack_layers_,
    quantizable_layers,
    swap_,
    with_model_exemptions,
)
from diffusers_pqcad.kernels import weights
from diffusers_pqcad.layers import SCALE_BUFFERS, FloatLayer, packed_layers, quantized_layers
from diffusers_pqcad.qparams import ACTIVATION_BITS, activation_qmax
from diffusers_pqcad.timesteps import TimestepGroups


def refuse_disk(device_map: Any) -> None:
    """Raise ValueError for a device map that puts weights on disk: the loaders write them before they are packed."""
    if device_map == "disk" or (isinstance(device_map, dict) and "disk" in device_map.values()):
        raise ValueError(
            "device_map: a PQCAD model cannot be offloaded to disk while loading. Load it on the CPU, or save it "
            "quantized first; it is several times smaller then."
        )


def prepare_(
    model: nn.Module,
    config: PQCADConfig,
    *,
    pre_quantized: bool,
    dtype: torch.dtype,
    keep_in_fp32_modules: Iterable[str] | None = None,
) -> PQCADConfig:
    """Swap the layers of the empty `model` that `config` quantizes; those of a saved model get packed placeholders.

    Returns the config to go on with, in which a model's own exemptions are added. `dtype` is that of the computed
    weights, fp32 for layers that have a part of their name in `keep_in_fp32_modules`.
    """
    if not pre_quantized:
        config = with_model_exemptions(model, config)
        swap_(model, match_modules(model, config))
        return config
    layers = swap_(model, saved_layers(model, config))
    groups = None if config.timestep_boundaries is None else TimestepGroups(config.timestep_boundaries)
    for name, layer in layers.items():
        spec = config.weight_spec(name, is_linear=isinstance(layer, nn.Linear))
        in_fp32 = not set(keep_in_fp32_modules or []).isdisjoint(name.split("."))
        layer.allocate_packed_(
            spec,
            activation_bits=config.activation_bits,
            timestep_groups=groups,
            compute_dtype=torch.float32 if in_fp32 else dtype,
        )
    return config


def saved_layers(model: nn.Module, config: PQCADConfig) -> dict[str, FloatLayer]:
    """Return the layers that a saved `config` says are packed.

    Their names, and not this version's choice of layers. A config without names is one of method "fixed" from before
    there were any in it, and packed plain Linear and Conv2d layers only.
    """
    named = config.weight_bits_by_module
    if not named:
        layers = match_modules(model, config)
        return {name: layer for name, layer in layers.items() if type(layer) in (nn.Linear, nn.Conv2d)}
    layers = quantizable_layers(model)
    config.check_patterns(layers)
    excluded = [pattern for pattern in config.modules_to_not_convert if any(matches(name, pattern) for name in named)]
    unknown = sorted(set(named) - set(layers))
    if excluded or unknown:
        reason = f"{excluded[0]!r} is excluded" if excluded else f"the model has no layer {unknown[0]!r}"
        raise ValueError(f"weight_bits_by_module: {reason}. The config was edited, or belongs to another model.")
    return {name: layers[name] for name in named}


def complete_(model: nn.Module, config: PQCADConfig, *, pre_quantized: bool) -> PQCADConfig:
    """Check the filled `model`, pack what is not packed yet, and return the config that says what was done.

    Raises ValueError for tensors that the checkpoint lacked or that no quantizer wrote.
    """
    check_loaded(model)
    if not pre_quantized:
        layers = {name: layer for name, layer in quantized_layers(model).items() if not layer.packed}
        config = decide_config(layers, config)
        pack_layers_(layers, config)
    finish_(model, config)
    return config


def check_loaded(model: nn.Module) -> None:
    """Raise ValueError for tensors that the checkpoint lacked (diffusers only warns), or that no quantizer wrote."""
    refuse_missing(
        [
            name
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if tensor.device.type == "meta" and not hasattr(model.get_submodule(name.rpartition(".")[0]), "_hf_hook")
        ]
    )
    for name, layer in packed_layers(model).items():
        if layer.qweight.dtype != torch.uint8:
            raise ValueError(f"{name}.qweight: expected uint8, got {layer.qweight.dtype}. The file was edited.")
        if layer.qweight.device.type != "meta":
            most = 2 * layer.spec.level_max // layer.spec.level_step
            if weights.highest_code(layer.qweight, layer.spec.bits) > most:
                raise ValueError(f"{name}.qweight: holds the code that no weight has. The file was edited.")
        for buffer in (*SCALE_BUFFERS, "input_zero_point"):
            values = layer._buffers[buffer]
            if values is None or values.device.type == "meta":
                continue
            if buffer in SCALE_BUFFERS and not bool(((values > 0) & values.isfinite()).all()):
                raise ValueError(f"{name}.{buffer}: scales must be positive and finite. The file was edited.")
            qmax = activation_qmax(layer.activation_bits or max(ACTIVATION_BITS))
            if buffer not in SCALE_BUFFERS and not bool(((values >= 0) & (values <= qmax)).all()):
                raise ValueError(f"{name}.{buffer}: expected 0 to {qmax}. The file was edited.")


def refuse_missing(missing: list[str]) -> None:
    """Raise ValueError for the tensors that a checkpoint lacks, if there are any."""
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors that its config asks for, such as {missing[:3]}. "
            "The file is incomplete, or belongs to another model."
        )
