"""Adapters of peft on the layers of a fused block: two products of low rank beside the packed one, of the same codes.

The first one, to R numbers a pixel, is packed as the layer below is: 8 bits, a scale for each of the R. It takes the
codes that the layer takes, after the same norm and activation, in the same activation range. The second one, back to
all channels, stays in fp32 and reads peft's own tensors. LoRAs of linear layers and of convolutions (Hu et al. 2021,
arXiv:2106.09685) are so:

    W x + scaling B (A x)

Of several adapters, the first products are one. What is computed in another way (DoRA, dropout that is active, biases,
other kinds of adapters) is left to peft, and the block to its parts.
"""

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffusers_pqcad.kernels import x86
from diffusers_pqcad.kernels.native import weights
from diffusers_pqcad.kernels.operation import Operation
from diffusers_pqcad.kernels.x86.calls import Beside, Up, call_of
from diffusers_pqcad.kernels.x86.packing import PackedLayer
from diffusers_pqcad.layers.quantized import QUANTIZED_LAYERS, QuantizedLayer
from diffusers_pqcad.numerics.qparams import WeightSpec
from diffusers_pqcad.runtime.changes import is_changed

DOWN_BITS = 8
SAMPLED_NUMBERS = 8  # of a tensor, in each call: enough to see a write that torch does not count
CONVOLUTION = ("stride", "padding", "dilation", "groups", "padding_mode")  # what two convolutions have in common
FACTORS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: nn.Linear,
    **{ours: plain for plain, ours in QUANTIZED_LAYERS.items()},
    nn.Conv2d: nn.Conv2d,
}


class Factors(NamedTuple):
    """An active adapter on a layer: `down` (r, C_in, ...) and `up` (C_out, r, ...), peft's own tensors."""

    down: Tensor
    up: Tensor
    scaling: float


def layer_below(layer: Any) -> Any:
    """Return the layer below the adapters of peft on `layer`, or `layer` itself."""
    return getattr(layer, "base_layer", layer)


def is_adapted(module: nn.Module) -> bool:
    """Return whether `module` is a layer of peft with LoRAs on a linear layer or a convolution below."""
    lora = sys.modules.get("peft.tuners.lora.layer")  # nobody has adapters without it
    return lora is not None and type(module) in (lora.Linear, lora.Conv2d)


def guards_of_adapters(module: Any) -> tuple[Any, ...]:
    """Return values that change with what the layer `module` of peft computes: adapters, scales, switches, numbers."""
    state, modules = module.__dict__, module._modules
    downs, ups, dropouts = (modules[name]._modules for name in ("lora_A", "lora_B", "lora_dropout"))
    factors = tuple(
        (
            *(name, state["scaling"][name], name in state["lora_variant"], drops_nothing(dropouts.get(name))),
            *(guards_of_factor(downs[name], is_rounded=True), guards_of_factor(ups[name], is_rounded=False)),
        )
        for name in module.active_adapters
        if name in downs
    )
    return (id(module), type(module), is_changed(module), state["_disable_adapters"], module.merged, factors)


def guards_of_factor(factor: nn.Module, *, is_rounded: bool) -> tuple[Any, ...]:
    """Return values that change with a factor of an adapter; where plans hold a copy of it, also with its numbers."""
    weight = factor._parameters.get("weight")
    if weight is None:  # a layer of another kind, which `factors_of` leaves to peft
        return (id(factor), type(factor))
    bias = factor._parameters.get("bias")
    numbers = numbers_of(weight) if is_rounded or weight.dtype != torch.float32 else ()
    place = (weight.data_ptr(), weight.dtype, weight.shape, weight.is_cpu, weight.is_contiguous())
    return (id(factor), type(factor), is_changed(factor), bias is None, place, numbers)


def numbers_of(weight: Tensor) -> tuple[Any, ...]:
    """Return how often `weight` was written to, and some of its numbers: a write through `.data` is not counted."""
    if not weight.is_cpu or not weight.is_contiguous():
        return ()
    written = 0 if weight.is_inference() else weight._version
    step = max(1, weight.numel() // SAMPLED_NUMBERS)
    return (written, *weight.detach().view(-1)[::step].tolist())


def drops_nothing(dropout: Any) -> bool:
    """Return whether `dropout` of an adapter passes on what it gets."""
    if type(dropout) is nn.Identity:
        return not is_changed(dropout)
    return type(dropout) is nn.Dropout and not is_changed(dropout) and not (dropout.training and dropout.p > 0)


def factors_of(module: Any) -> list[Factors] | None:
    """Return the active adapters of the layer `module` of peft, none where they are merged or switched off.

    `None` where they are computed in another way than by two products, or cannot be read here.
    """
    if not is_adapted(module) or is_changed(module) or (module.disable_adapters and module.merged):
        return None
    if module.disable_adapters or module.merged:  # then peft calls the layer below alone
        return []
    names = [name for name in module.active_adapters if name in module.lora_A]
    if any(name in module.lora_variant or not drops_nothing(module.lora_dropout[name]) for name in names):
        return None
    layer, factors = module.base_layer, []
    for name in names:
        down, up = module.lora_A[name], module.lora_B[name]
        if not (is_factor(down, layer) and is_factor(up, layer)) or down.bias is not None or up.bias is not None:
            return None
        if not is_down_of(down, layer) or not is_up_of(up, down, layer):
            return None
        factors.append(Factors(down.weight.detach(), up.weight.detach(), module.scaling[name]))
    return factors


def is_factor(factor: Any, layer: QuantizedLayer) -> bool:
    """Return whether `factor` is a float layer of the kind of the packed `layer`, its numbers dense on the CPU."""
    if FACTORS.get(type(factor)) is not FACTORS.get(type(layer)) or is_changed(factor):
        return False
    if getattr(factor, "packed", False):
        return False
    weight = factor.weight
    return weight.is_floating_point() and weight.is_cpu and weight.is_contiguous() and type(weight) is nn.Parameter


def is_down_of(down: Any, layer: Any) -> bool:
    """Return whether `down` moves over its input as the packed `layer` does, and has finite numbers."""
    if down.weight.shape[1:] != layer.weight_shape[1:] or not down.weight.isfinite().all():
        return False
    return all(getattr(down, name, None) == getattr(layer, name, None) for name in CONVOLUTION)


def is_up_of(up: Any, down: Any, layer: QuantizedLayer) -> bool:
    """Return whether `up` maps each pixel of what `down` gives to the outputs of `layer`."""
    if up.weight.shape[:2] != (layer.weight_shape[0], len(down.weight)) or up.weight.shape[2:].numel() != 1:
        return False
    if isinstance(up, nn.Linear):
        return True
    return (up.stride, up.padding, up.groups) == ((1, 1), (0, 0), 1)


def beside(module: Any, size: torch.Size, packed: PackedLayer, *, is_doubled: bool = False) -> Beside | None:
    """Return what the adapters on the layer `module` add to its output for an input of `size`; `None` for nothing.

    `packed` is of the packed layer below; `is_doubled` is as in `call_of`.
    """
    factors = factors_of(module) if layer_below(module) is not module else []
    assert factors is not None  # asked before
    if not factors:
        return None
    operation, own = packed_down(module.base_layer, factors, packed)
    call = call_of(operation, own, size, is_doubled=is_doubled)
    ups, stop = [], 0
    for _, up, scaling in factors:
        start, stop = stop, stop + up.shape[1]
        ups.append(Up(up.flatten(1).float(), scaling, start, stop))
    return Beside(call._replace(keeps=(call.keeps, own)), tuple(ups))


def packed_down(layer: QuantizedLayer, factors: list[Factors], packed: PackedLayer) -> tuple[Operation, PackedLayer]:
    """Return the first product of `factors` on `layer`, in this call's timestep group, and what is packed of it.

    The latest one is kept in `packed`, for inputs of other sizes, and as long as its numbers do not change.
    """
    key = [(down.data_ptr(), down.shape, numbers_of(down)) for down, _, _ in factors]
    known = packed.adapter  # read once: another thread may pack another one
    if known is None or known[0] != key:
        weight = torch.cat([down.float() for down, _, _ in factors])
        qweight, scale, _ = weights.quantize(weight, WeightSpec(DOWN_BITS))
        operation = layer.operation()._replace(
            spec=WeightSpec(DOWN_BITS), shape=weight.shape, qweight=qweight, weight_scale=scale, bias=None
        )
        known = packed.adapter = (key, (operation, x86.pack(operation)))
    operation, own = known[1]
    return operation._replace(group=layer.input_group()), own
