"""Adapters of peft merged into packed layers of 8 bits: each weight is dequantized, added to, and rounded anew.

Below 8 bits the steps of a grid are as large as most of what an adapter adds, and rounding would take it away again.
"""

import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusers_pqcad.kernels.native import weights
from diffusers_pqcad.layers.quantized import QuantizedLayer

MERGED_BITS = 8  # of the layers that an adapter is merged into

logger = logging.getLogger(__name__)


class Packed(NamedTuple):
    """What a packed layer holds: `qweight` uint8 (C_out, bytes), `weight_scale` fp32 (C_out, G), `bias` (C_out,)."""

    qweight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    perturbation: float | None = None  # of the float weight, which a merged layer has no more

    @classmethod
    def of(cls, layer: QuantizedLayer) -> "Packed":
        """Return what `layer` holds now."""
        bias = None if layer.bias is None else layer.bias.detach().clone()
        return cls(layer.qweight, layer.weight_scale, bias, layer.perturbation)

    def put_into_(self, layer: QuantizedLayer) -> None:
        """Let `layer`, of the same size and grid, hold this, on the device where it is now."""
        layer.replace_packed_(self.qweight, self.weight_scale)
        layer.perturbation = self.perturbation
        if self.bias is not None and layer.bias is not None:
            layer.bias.data.copy_(self.bias)


class Merge(NamedTuple):
    """A layer with its adapter in it, not in place yet, and the squared norms of its weights, fp32 0-dim each.

    `rounding` is that of the error, `weight` that of the weights before they were rounded, `change` that of what the
    adapter added.
    """

    packed: Packed
    rounding: Tensor
    weight: Tensor
    change: Tensor


@torch.no_grad()
def fuse_lora(
    model: Any, lora_scale: float = 1.0, safe_fusing: bool = False, adapter_names: list[str] | None = None
) -> None:
    """Merge the adapters `adapter_names` of `model` (`None`: the active ones), times `lora_scale`, into its layers.

    Those of 8 bits are rounded anew, with new scales; a warning says how much that changes them. What they were is
    kept with the adapter until that is unloaded: `unfuse_lora()` puts it back, bit by bit. Raises ValueError, with
    nothing changed, for layers of fewer bits, and for weights that are not finite.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")  # nobody has adapters without it
    adapted: dict[str, Any] = {
        name: module
        for name, module in model.named_modules()
        if tuners is not None and isinstance(module, tuners.BaseTunerLayer) and names_to_merge(module, adapter_names)
    }
    packed = {name: module for name, module in adapted.items() if is_packed(module.get_base_layer())}
    refuse_few_bits(packed)
    refuse_chained_variants(packed)
    merges = {}
    with undone_on_errors(adapted):
        for name, module in adapted.items():
            if lora_scale != 1.0:
                module.scale_layer(lora_scale)
            if name in packed:
                merges[name] = merged(module, adapter_names)
            else:
                module.merge(safe_merge=safe_fusing, adapter_names=adapter_names)
    for name, merge in merges.items():
        module, layer = packed[name], packed[name].get_base_layer()
        if "unmerge" not in module.__dict__:  # else that is what undoes the first merge, and all after it
            module.unmerge = partial(unmerge_, module, Packed.of(layer))
        merge.packed.put_into_(layer)
    if merges:
        logger.warning("%s: %s", type(model).__name__, summary(list(merges.values())))


def is_packed(layer: Any) -> bool:
    """Return whether `layer`, below an adapter, is a packed one."""
    return isinstance(layer, QuantizedLayer) and layer.packed


def names_to_merge(module: Any, adapter_names: list[str] | None) -> list[str]:
    """Return which of `adapter_names` (`None`: the active ones) the layer `module` of peft has, and has not merged."""
    names = module.active_adapters if adapter_names is None else adapter_names
    return [name for name in names if name in module._get_available_adapters() and name not in module.merged_adapters]


def refuse_few_bits(packed: Mapping[str, Any]) -> None:
    """Raise ValueError where one of the `packed` layers of peft, by name, lies on one of fewer than 8 bits."""
    bits = {name: module.get_base_layer().spec.bits for name, module in packed.items()}
    few = {name: number for name, number in bits.items() if number < MERGED_BITS}
    if few:
        name, number = next(iter(few.items()))
        raise ValueError(
            f"{name}: adapters are merged into layers of {MERGED_BITS} bits, and this one has {number} ({len(few)} of "
            f"{len(bits)} adapted layers have fewer): rounding it anew would take away what the adapter adds. Leave "
            "the adapter beside the layers, or call fuse_lora() in full precision, then quantize."
        )


def refuse_chained_variants(packed: Mapping[str, Any]) -> None:
    """Raise ValueError for a variant such as DoRA on a layer with merged adapters: peft asks for its float weight."""
    for name, module in packed.items():
        if module.merged and getattr(module, "lora_variant", None):
            raise ValueError(
                f"{name}: it holds the merged adapters {module.merged_adapters}, and variants of LoRA, such as DoRA, "
                "depend on the weight before them. Call unfuse_lora(), then fuse all adapters in one call."
            )


@contextmanager
def undone_on_errors(adapted: Mapping[str, Any]) -> Iterator[None]:
    """Put back what merging changes of the layers of peft and of the float ones below them, if it raises an error."""
    lists = ("merged_adapters", "scaling", "_caches")
    before = {
        name: {key: module.__dict__[key].copy() for key in lists if key in module.__dict__}
        for name, module in adapted.items()
    }
    floats = [module.get_base_layer() for module in adapted.values() if not is_packed(module.get_base_layer())]
    kept = [(parameter, parameter.detach().clone()) for layer in floats for parameter in layer.parameters()]
    try:
        yield
    except BaseException:
        for name, state in before.items():
            adapted[name].__dict__.update(state)
        for parameter, numbers in kept:
            parameter.data = numbers
        raise


def merged(module: Any, adapter_names: list[str] | None) -> Merge:
    """Return the packed layer below `module` of peft with adapters in it; peft counts them as merged from here on.

    peft merges them itself, into a float layer that lies there meanwhile: so all kinds that it merges are taken.
    """
    layer = module.get_base_layer()
    weight = layer.dequantized_weight()
    stand_in = layer.blank_float()
    stand_in.weight = nn.Parameter(weight.clone(), requires_grad=False)
    bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)
    stand_in.register_parameter("bias", bias)
    module.base_layer = stand_in
    try:
        module.merge(adapter_names=adapter_names)
    finally:
        module.base_layer = layer
    result = stand_in.weight.detach().float()
    try:
        qweight, scale, (rounding, size) = weights.quantize(result, layer.spec)
    except ValueError as error:
        raise ValueError(
            f"{layer.name}: its weights cannot be rounded with the adapter in them: {error} Load the adapter again, "
            "or fuse it with a smaller lora_scale."
        ) from None
    bias = None if stand_in.bias is None else stand_in.bias.detach()
    return Merge(Packed(qweight, scale, bias), rounding, size, (result - weight).square().sum())


def unmerge_(module: Any, before: Packed) -> None:
    """Put back what the packed layer below `module` of peft held `before` adapters were merged into it."""
    if not module.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)  # as peft says it
        return
    del module.unmerge
    layer = module.get_base_layer()
    if not is_packed(layer):  # dequantized since: peft takes off what it put on
        module.unmerge()
        return
    before.put_into_(layer)
    module.merged_adapters.clear()
    module._caches.clear()  # of what peft would need to do it


def summary(merges: list[Merge]) -> str:
    """Return a line about what merging did to layers, errors as root mean squares over all of them."""
    rounding, weight, change = (
        sum(getattr(merge, name).item() for merge in merges) for name in ("rounding", "weight", "change")
    )
    return (
        f"{len(merges)} layers of {MERGED_BITS} bits hold the adapter now, and were rounded anew. That changes their "
        f"weights by {100 * (rounding / max(weight, 1e-30)) ** 0.5:.2g} %, which is "
        f"{100 * (rounding / max(change, 1e-30)) ** 0.5:.2g} % of what the adapter adds. unfuse_lora() puts the "
        "layers back as they were; unload_lora() forgets that."
    )
