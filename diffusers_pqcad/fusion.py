"""Blocks of diffusers' models that the int8 kernel computes at once, where nobody looks at the modules in them."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from diffusers_pqcad import graph_ops, kernels
from diffusers_pqcad.kernels import x86
from diffusers_pqcad.layers import PQCADConv2d, PQCADLinear, QuantizedLayer
from diffusers_pqcad.pending import Norm, PendingGroupNorm


class FusedBlock:
    """Part of a block of class `plain` that changed its class to compute at once what its modules would.

    A call is common where this class can compute it, told without a look at numbers, as tracing needs; the compiled
    graph holds one operator then. The rest is seen when it runs: hooks, or modules of another kind.
    """

    plain: ClassVar[type[nn.Module]]
    handle: Tensor  # names it for operators

    def __init_subclass__(cls) -> None:
        cls.__name__ = cls.plain.__name__  # what libraries look for: blocks that must stay on one device, for instance

    @classmethod
    def fits(cls, block: nn.Module) -> bool:
        """Return whether `block`, of class `plain`, holds layers for the kernel."""
        raise NotImplementedError

    def plan_of(self, owner: QuantizedLayer, key: tuple[Any, ...], build: Callable[[], Any]) -> Any:
        """Return what `build` returns for `key` and the activation ranges of this call, as long as no module changes.

        It is kept with the packed weights of `owner`, the first layer of this block. `None` where the kernel cannot
        run that, or where images of the batch have ranges of their own, which no kernel takes.
        """
        if owner.kernel_name() != x86.NAME:
            return None
        modules = list(parts_of(cast(nn.Module, self)))
        groups = [module.input_group() for module in modules if isinstance(module, QuantizedLayer)]
        if any(isinstance(group, Tensor) for group in groups):
            return None
        plans, key = owner.packed_for(x86.NAME).plans, (*key, *groups)
        known = plans.get(key)
        if known is None or known[0] != [marks_of(module) for module in modules]:
            plan = build()
            known = plans[key] = ([marks_of(module) for module in modules], plan)  # layers are packed by now
        return known[1]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # of the other base, a module
        self.handle = graph_ops.register(cast(nn.Module, self))  # a copy is a block of its own


def install_fused_(model: nn.Module, kinds: Iterable[type[FusedBlock]]) -> None:
    """Let the blocks of `model` compute at once where the kernel can; they change their class to one of `kinds`."""
    by_class = {kind.plain: kind for kind in kinds}
    for block in model.modules():
        kind = by_class.get(type(block))
        if kind is not None and kind.fits(block):
            block.__class__ = kind  # type: ignore[assignment]
            block.handle = graph_ops.register(block)


def remove_fused_(model: nn.Module) -> None:
    """Undo `install_fused_`."""
    for block in model.modules():
        if isinstance(block, FusedBlock):
            block.__class__ = block.plain  # type: ignore[assignment]
            del block.handle


def is_inference(block: nn.Module, *inputs: Tensor | None) -> bool:
    """Return whether `block` computes no gradient of any kind, in fp32 on a CPU; no number is looked at."""
    tensors = [tensor for tensor in inputs if tensor is not None]
    if block.training or any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    return not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (*tensors, *block.parameters()))


def is_watched() -> bool:
    """Return whether another kernel was asked for, or somebody looks at all modules."""
    return bool(kernels.forced() not in (None, x86.NAME) or _global_forward_hooks or _global_forward_pre_hooks)


def is_changed(module: nn.Module) -> bool:
    """Return whether somebody looks at what `module` takes and returns, or computes it in another way."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)


def parts_of(block: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules of `block`, and those in its lists."""
    for module in block._modules.values():
        if module is not None:
            yield module
            if isinstance(module, nn.ModuleList):
                yield from module


VALUES = ("num_groups", "eps", "affine", "stride", "padding", "packed", "activation_bits")  # that plans are built on


def marks_of(module: nn.Module) -> tuple[Any, ...]:
    """Return values that change with all of `module` that a plan is built on: a quarter of the time of a plan."""
    state = module.__dict__
    parameters = [
        (tensor.data_ptr(), tensor.dtype, tensor.is_cpu, tensor.shape, tensor.is_contiguous())
        for tensor in state["_parameters"].values()
        if tensor is not None
    ]
    cache = state.get("_cache")  # plans hold it, so that its number is not given again
    packed = None if cache is None else id(cache[1])
    return (id(module), type(module), is_changed(module), packed, *map(state.get, VALUES), *parameters)


def is_plain(tensor: Tensor) -> bool:
    """Return whether the numbers of `tensor` are fp32 in the CPU's memory, side by side."""
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def takes_kernel(layer: nn.Module) -> bool:
    """Return whether this call of `layer` is one for the kernel x86, and nobody looks at it."""
    if type(layer) not in (PQCADConv2d, PQCADLinear) or is_changed(layer):
        return False
    assert isinstance(layer, QuantizedLayer)
    if not layer.packed or layer.kernel_name() != x86.NAME or isinstance(layer.input_group(), Tensor):
        return False
    return layer.bias is None or is_plain(layer.bias)


def plain_norm(module: nn.Module) -> Norm | None:
    """Return the group norm that `module` computes, or `None` where the kernel cannot take it, or somebody looks."""
    if type(module) not in (nn.GroupNorm, PendingGroupNorm) or is_changed(module):
        return None
    assert isinstance(module, nn.GroupNorm)
    if not module.affine or not is_plain(module.weight) or not is_plain(module.bias):
        return None
    return Norm.of(module)
