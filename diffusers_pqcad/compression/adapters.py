"""Adapters: LoRAs of peft (Hu et al. 2021, arXiv:2106.09685) on a denoiser, which learn what quantization took away.

An adapter is in floating point throughout. The layers below it are quantized as all others are, under their own
names; the packed model is saved without it, and it in a file of its own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusers_pqcad.compression.extras import require
from diffusers_pqcad.compression.fake_quant import plain_layers

ADAPTER = "default"  # its name in peft; the file of a LoRA has none
# What diffusers' LCM-LoRA script adapts, and the second stream of joint attention. Rounding takes from all layers:
# those of a UNet's attention, which most scripts adapt alone, have few of its weights, and give little back.
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
    *("proj_in", "proj_out", "net.0.proj", "net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


class Adapter(NamedTuple):
    """A LoRA apart from its model: peft's `LoraConfig`, and its tensors, (rank, C_in, ...) and (C_out, rank, ...)."""

    config: Any
    tensors: dict[str, Tensor]


def carries_adapter(model: nn.Module) -> bool:
    """Return whether `model` carries adapters of peft."""
    return bool(getattr(model, "peft_config", None))


def adapter_facts(model: nn.Module) -> dict[str, Any] | None:
    """Return the largest rank of the adapter of `model` and how many layers it adapts; None where there is none."""
    ranks = [len(p) for name, p in model.named_parameters() if ".lora_A." in name and name.endswith(".weight")]
    return {"rank": max(ranks), "num_layers": len(ranks)} if ranks else None


def targets_of(model: nn.Module, target_modules: Sequence[str] | None) -> list[str]:
    """Return what a new adapter of `model` adapts: `target_modules`, by default those of TARGETS that it has.

    Raises ValueError for one that no Linear or convolution layer of `model` is called, and where there is none.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d)]
    wanted = TARGETS if target_modules is None else target_modules
    found = [target for target in wanted if any(f".{name}".endswith(f".{target}") for name in names)]
    missing = [] if target_modules is None else [target for target in target_modules if target not in found]
    if missing or not found:
        raise ValueError(
            f"target_modules: {(missing or TARGETS)[0]!r} is the end of no layer's name in "
            f"{type(model).__name__} (such as {names[:3]}). Give names, or their last parts, of Linear and "
            "convolution layers."
        )
    return found


def add_adapter_(
    model: nn.Module, *, rank: int, lora_alpha: int | None, target_modules: Sequence[str] | None, seed: int
) -> nn.Module:
    """Add an adapter that changes nothing yet to the float or fake-quantized `model`, in place, and return it.

    It adapts the Linear and convolution layers whose names end in one of `target_modules`, by default those of
    attention, feed-forward and residual blocks; `lora_alpha` is by default the `rank`, so that the adapter's output
    counts once. The same `seed` gives the same adapter. Raises ValueError for a target that fits no layer,
    MissingExtraError without peft.
    """
    require("lora", "peft")
    from peft import LoraConfig

    config = LoraConfig(r=rank, lora_alpha=lora_alpha or rank, target_modules=targets_of(model, target_modules))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return inject_(model, config)


def inject_(model: Any, config: Any, tensors: dict[str, Tensor] | None = None) -> nn.Module:
    """Build the layers of an adapter into `model` and return it; `tensors` name those of one that is there already."""
    require("lora", "peft")
    from peft import inject_adapter_in_model

    before = {parameter: parameter.requires_grad for parameter in model.parameters()}
    with plain_layers(model):
        inject_adapter_in_model(config, model, ADAPTER, state_dict=tensors)
    for parameter, required in before.items():
        parameter.requires_grad_(required)  # peft freezes them
    if hasattr(model, "_hf_peft_config_loaded"):  # what diffusers looks at
        model._hf_peft_config_loaded = True
    return model


def take_adapter_(model: Any) -> Adapter | None:
    """Take the adapter off `model`, which is as it was without, and return it; None where there is none.

    Raises ValueError for several.
    """
    if not carries_adapter(model):
        return None
    require("lora", "peft")
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft import get_peft_model_state_dict

    configs: dict[str, Any] = model.peft_config
    if len(configs) != 1:
        raise ValueError(f"{type(model).__name__}: expected one adapter, got {[*configs]}. Unload the others.")
    ((name, config),) = configs.items()
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    adapter = Adapter(config, {key: tensor.detach().clone() for key, tensor in tensors.items()})
    recurse_remove_peft_layers(model)
    del model.peft_config
    if hasattr(model, "_hf_peft_config_loaded"):
        model._hf_peft_config_loaded = False
    return adapter


def put_adapter_(model: nn.Module, adapter: Adapter) -> nn.Module:
    """Put a copy of `adapter` on the float, fake-quantized or packed `model`, in place, and return it.

    A fake-quantized model is no longer what it was quantized from: `distill` takes the recording of any other, such as
    that of the float model with the same adapter.
    """
    require("lora", "peft")
    from peft import set_peft_model_state_dict

    inject_(model, adapter.config, adapter.tensors)
    set_peft_model_state_dict(model, adapter.tensors, adapter_name=ADAPTER)
    model.__dict__.pop("pqcad_source_hash", None)
    return model


def below_adapter_(model: nn.Module, change_: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """Return what `change_` makes of `model`, in place, with its adapter off meanwhile, if it carries one."""
    adapter = take_adapter_(model)
    changed = change_(model)
    return changed if adapter is None else put_adapter_(changed, adapter)
