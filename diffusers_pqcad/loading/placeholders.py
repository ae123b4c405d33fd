"""What the loaders of diffusers and transformers share: layers are swapped before the tensors come, packed after.

Swapped first, with float placeholders, because device hooks are attached before the post-processing; packed last,
because a bit budget needs all the weights.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diffusers_pqcad.kernels.native import weights
from diffusers_pqcad.layers.checksums import CHECKSUM, PACKED_BUFFERS, names_by_number
from diffusers_pqcad.layers.find import packed_layers, quantized_layers
from diffusers_pqcad.layers.quantized import FloatLayer
from diffusers_pqcad.layers.stored_state import SCALE_BUFFERS
from diffusers_pqcad.layers.timesteps import TimestepGroups
from diffusers_pqcad.loading.config import FORMAT_VERSION, PQCADConfig, matches
from diffusers_pqcad.loading.convert import (
    decide_config,
    finish_,
    match_modules,
    pack_layers_,
    quantizable_layers,
    swap_,
    with_model_exemptions,
)
from diffusers_pqcad.numerics.qparams import ACTIVATION_BITS, activation_qmax


def refuse_disk(device_map: Any) -> None:
    """Raise ValueError for a device map that puts weights on disk: the loaders write them before they are packed."""
    if device_map == "disk" or (isinstance(device_map, dict) and "disk" in device_map.values()):
        raise ValueError(
            "device_map: a PQCAD model cannot be offloaded to disk while loading. Load it on the CPU, or save it "
            "quantized first; it is several times smaller then."
        )


def swap_in_placeholders_(
    model: nn.Module,
    config: PQCADConfig,
    *,
    pre_quantized: bool,
    dtype: torch.dtype,
    keep_in_fp32_modules: Iterable[str] | None = None,
) -> PQCADConfig:
    """Swap the layers of the empty `model` that `config` quantizes; those of a saved model get packed placeholders.

    Those of a file of format version 2 or later have a checksum. Returns the config to go on with, in which a model's
    own exemptions are added. `dtype` is that of the computed weights, fp32 for layers that have a part of their name
    in `keep_in_fp32_modules`.
    """
    if not pre_quantized:
        config = with_model_exemptions(model, config)
        swap_(model, match_modules(model, config))
        return config
    config = named_as_in(model, config)
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
        if config.format_version > 1:
            layer.allocate_checksum_()
    return config


def placeholders(model: nn.Module) -> dict[str, Tensor]:
    """Return the packed tensors and checksums that a prepared `model` waits for, empty, by their names in a file."""
    return {
        f"{name}.{buffer}": tensor
        for name, layer in packed_layers(model).items()
        for buffer in (*PACKED_BUFFERS, CHECKSUM)
        if (tensor := layer._buffers[buffer]) is not None
    }


def refuse_misfit(name: str, dtype: torch.dtype, shape: Iterable[int], expected: Tensor) -> None:
    """Raise ValueError for a tensor of a file that has not the `expected` one's dtype and shape.

    Asked before the loaders cast the file's tensors, which they do without a word.
    """
    for wanted, found in ((expected.dtype, dtype), (f"shape {tuple(expected.shape)}", f"shape {tuple(shape)}")):
        if wanted != found:
            raise ValueError(
                f"{name}: expected {wanted}, got {found}. The file was edited, or does not belong to the "
                "quantization_config of config.json."
            )


def named_as_in(model: nn.Module, config: PQCADConfig) -> PQCADConfig:
    """Return the saved `config` with the names that its layers have in `model`.

    transformers loads the file of a base model into one with a head, where names have a prefix, and the other way; and
    leaves out what the class names, such as the decoder in an encoder.
    """
    left_out = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    prefix, layers = getattr(model, "base_model_prefix", ""), quantizable_layers(model).keys()
    named = {
        name: bits
        for name, bits in config.weight_bits_by_module.items()
        if name in layers or not any(re.search(pattern, name) for pattern in left_out)
    }
    if not prefix or named.keys() <= layers:
        return PQCADConfig(**config.to_dict() | {"weight_bits_by_module": named})
    longer = {f"{prefix}.{name}": bits for name, bits in named.items()}
    shorter = {name.removeprefix(f"{prefix}."): bits for name, bits in named.items() if name.startswith(f"{prefix}.")}
    renamed = next((names for names in (longer, shorter) if names and names.keys() <= layers), named)
    return PQCADConfig(**config.to_dict() | {"weight_bits_by_module": renamed})


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
    excluded = [pattern for pattern in config.modules_to_not_convert if any(matches(name, pattern) for name in named)]
    unknown = sorted(set(named) - set(layers))
    if excluded or unknown:
        reason = f"{excluded[0]!r} is excluded" if excluded else f"the model has no layer {unknown[0]!r}"
        raise ValueError(f"weight_bits_by_module: {reason}. The config was edited, or belongs to another model.")
    return {name: layers[name] for name in named}


def complete_(model: nn.Module, config: PQCADConfig, *, pre_quantized: bool) -> PQCADConfig:
    """Check the filled `model`, pack what is not packed yet, and return the config that says what was done.

    Raises ValueError for tensors that the checkpoint lacked, that no quantizer wrote, or that changed since.
    """
    check_loaded(model)
    if pre_quantized:
        config = dataclasses.replace(config, format_version=FORMAT_VERSION)  # as the next file will have
    else:
        layers = {name: layer for name, layer in quantized_layers(model).items() if not layer.packed}
        config = decide_config(layers, config)
        pack_layers_(layers, config)
    finish_(model, config)
    return config


def refuse_other_version(names: Iterable[str], config: PQCADConfig) -> None:
    """Raise ValueError for a file of the tensors `names` that is newer than its `config` says."""
    newer = next((name for name in names if name.endswith(f".{CHECKSUM}")), None)
    if config.format_version == 1 and newer is not None:
        raise ValueError(
            f"format_version: 1, but {newer} is in the file, as of version 2. The quantization_config of config.json "
            "was edited, or belongs to another file."
        )


def holds_floats(names: Iterable[str], model_name: str, config: PQCADConfig) -> bool:
    """Return whether a checkpoint of the tensors `names` holds no packed layer where its `config` says that it does.

    Warns if so: a model made by `from_config` of a quantized model's config inherits the entry.
    """
    if config.packed_share == 0 or any(name.endswith(".qweight") for name in names):
        return False
    warnings.warn(
        f"{model_name}: the config holds a quantization_config, but the weights are in floating point, as those of a "
        "model that was made by from_config() of a quantized one. They are loaded as they are, without the entry, and "
        "also without a quantization_config that was passed. "
        "Save the model again to be rid of it, or call quantize_() to quantize it.",
        stacklevel=2,
    )
    return True


def check_loaded(model: nn.Module) -> None:
    """Raise ValueError for tensors that the checkpoint lacked (diffusers only warns) or that no quantizer wrote.

    Checksums are compared and dropped.
    """
    refuse_missing(
        [
            name
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if tensor.device.type == "meta" and not hasattr(model.get_submodule(name.rpartition(".")[0]), "_hf_hook")
        ]
    )
    layers = packed_layers(model)
    owners = names_by_number(layers)
    for name, layer in layers.items():
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
        layer.verify_(name, owners)


def saved_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and the persistent buffers of `model` by name, the objects themselves."""
    return {
        f"{prefix}.{name}".removeprefix("."): tensor
        for prefix, module in model.named_modules()
        for name, tensor in [*module._parameters.items(), *module._buffers.items()]
        if tensor is not None and name not in module._non_persistent_buffers_set
    }


def refuse_missing(missing: list[str]) -> None:
    """Raise ValueError for the tensors that a checkpoint lacks, if there are any."""
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors that its config asks for, such as {missing[:3]}. "
            "The file is incomplete, or belongs to another model."
        )
