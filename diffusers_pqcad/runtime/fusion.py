"""Blocks of diffusers' models that a kernel fuses, where no hooks are registered on the modules in them.

A block is fused where the kernel of its first layer names it in `FUSES`. Plans are made of calls of the x86 kernel: it
is the only one that fuses, so blocks take structs and calls from its modules, and this module alone asks for its name.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from diffusers_pqcad import kernels
from diffusers_pqcad.kernels import x86
from diffusers_pqcad.kernels.x86.calls import Call, call_of
from diffusers_pqcad.kernels.x86.norms import Norm
from diffusers_pqcad.kernels.x86.packing import PackedLayer
from diffusers_pqcad.kernels.x86.structs import Addend
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear, QuantizedLayer
from diffusers_pqcad.numerics.qparams import is_exported
from diffusers_pqcad.runtime.adapters import beside, factors_of, guards_of_adapters, is_adapted, layer_below
from diffusers_pqcad.runtime.changes import is_changed

# Attributes of modules that plans are built on.
GUARDED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.GroupNorm: ("num_groups", "eps", "affine"),
    nn.LayerNorm: ("normalized_shape", "eps"),
    nn.Dropout: ("p", "training"),
    PQCADLinear: ("in_features", "out_features", "packed", "activation_bits"),
    PQCADConv2d: (
        *("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
        *("in_channels", "out_channels", "packed", "activation_bits"),
    ),
}


class Plans(NamedTuple):
    """What a block computes for inputs of some sizes, as long as its modules have these `guards`: a plan `by_group`.

    All of its layers with static ranges have the same group; `static` is where the first one is among the modules.
    """

    guards: list[tuple[Any, ...]]
    static: int | None
    by_group: dict[int | None, Any]


class FusedBlock:
    """A block that changed its class from `plain` to this one, to be computed whole.

    A call is common where this class can compute it, told without a look at numbers, as tracing needs; the compiled
    graph holds one operator then. The rest is seen when it runs: hooks, or modules of another kind.
    """

    plain: ClassVar[type[nn.Module]]
    name: ClassVar[str]  # one of those that a kernel fuses
    attributes: ClassVar[tuple[str, ...]] = ()  # of the block, that plans of what it is a part of are built on
    parts: ClassVar[dict[type[nn.Module], tuple[str, ...]]] = {}  # the same of the modules in it, beyond GUARDED
    guarded: ClassVar[dict[type[nn.Module], tuple[str, ...]]]
    handle: Tensor  # names it for operators

    def __init_subclass__(cls) -> None:
        cls.__name__ = cls.plain.__name__  # what libraries look for: blocks that must stay on one device, for instance
        cls.guarded = GUARDED | cls.parts | {cast(Any, cls): cls.attributes}

    @staticmethod
    def first_layer(block: Any) -> Any:
        """Return the packed layer that is computed first; `None` where a block is not of the common kind.

        Of a layer with adapters, it is the one below.
        """
        raise NotImplementedError

    @classmethod
    def can_take(cls, block: Any) -> bool:
        """Return whether this computer's kernel has what `block` needs, whose first layer is packed."""
        return True

    def plan_of(
        self, inputs: list[Tensor], key: tuple[Any, ...], build: Callable[[PackedLayer], Any]
    ) -> tuple[PackedLayer | None, Any]:
        """Return what `build` returns for `key` and the activation ranges of this call, as long as no module changes.

        It is kept with the packed weights of the first layer, which are returned before it: hold them while it runs,
        for another thread may move the layer. The plan is `None` where no kernel can run that layer on `inputs`, where
        hooks are registered, or where images of the batch have ranges of their own, which no kernel takes.
        """
        owner = self.first_layer(self)
        if is_watched() or not all(x86.accepts(tensor) and tensor.numel() for tensor in inputs):
            return None, None
        modules = list(parts_of(cast(nn.Module, self)))
        guards = [guards_of(module, self.guarded) for module in modules]
        cache = owner._cache  # read once: another thread may move the layer
        is_current = cache is not None and cache[0][:2] == (x86.NAME, kernels.keeps_copies(owner.is_memory_short))
        packed: PackedLayer | None = cache[1] if is_current else None
        known = None if packed is None else packed.plans.get(key)
        if packed is None or known is None or known.guards != guards:
            if owner.kernel_name() != x86.NAME:
                return None, None
            packed = owner.packed_for(x86.NAME)
            static = next((i for i, module in enumerate(modules) if has_static_range(module)), None)
            known = Plans(guards, static, {})
        group = None if known.static is None else cast(QuantizedLayer, modules[known.static]).input_group()
        if isinstance(group, Tensor):
            return None, None
        if group not in known.by_group:
            groups = {id(module.timestep_groups) for module in modules if has_static_range(module)}
            plan = build(packed) if len(groups) < 2 else None
            guards = [guards_of(module, self.guarded) for module in modules]  # layers are packed by now
            by_group = {**known.by_group, group: plan} if guards == known.guards else {group: plan}
            known = packed.plans[key] = Plans(guards, known.static, by_group)
        return packed, known.by_group[group]

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]  # of the other base, a module
        self.handle = graph_ops.register(cast(nn.Module, self))  # a copy is a block of its own


def install_fused_(model: nn.Module, kinds: Iterable[type[FusedBlock]]) -> None:
    """Fuse the blocks of `model` where their kernel can; they change their class to one of `kinds`."""
    by_class = {kind.plain: kind for kind in kinds}
    for block in model.modules():
        if block is model and hasattr(model, "save_pretrained"):
            continue  # a pipeline is saved with the class of this model
        kind = by_class.get(type(block))
        layer: Any = None if kind is None else kind.first_layer(block)
        if kind is None or not is_packed(layer) or kind.name not in kernels.KERNELS[layer.kernel_name()].FUSES:
            continue
        if kind.can_take(block):
            block.__class__ = kind  # type: ignore[assignment]
            block.handle = graph_ops.register(block)


def remove_fused_(model: nn.Module) -> None:
    """Undo `install_fused_`."""
    for block in model.modules():
        if isinstance(block, FusedBlock):
            block.__class__ = block.plain  # type: ignore[assignment]
            del block.handle


def is_packed(layer: Any) -> bool:
    """Return whether `layer` is a packed one, or one below adapters, and of no other class than the package's."""
    layer = layer_below(layer)
    return type(layer) in (PQCADConv2d, PQCADLinear) and layer.packed


def is_inference(block: nn.Module, x: Any, *others: Any) -> bool:
    """Return whether `block` computes no gradient of any kind, in fp32 on a CPU; no number is looked at.

    Asked first of every call: `x`, and what else is not `None`, are tensors then, and not what another
    processor may take (an IP-Adapter's gets text and images in a tuple).
    """
    if is_exported():
        return False
    tensors = [x, *(other for other in others if other is not None)]
    if not all(isinstance(tensor, Tensor) for tensor in tensors):
        return False
    if block.training or any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in tensors):
        return False
    if torch.autograd.forward_ad._current_level >= 0:
        return False
    return not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in (*tensors, *block.parameters()))


def is_watched() -> bool:
    """Return whether another kernel was asked for, or hooks are registered for all modules."""
    return bool(kernels.forced() not in (None, x86.NAME) or _global_forward_hooks or _global_forward_pre_hooks)


def parts_of(block: nn.Module) -> Iterator[nn.Module]:
    """Yield the modules in `block`, on all levels, as `modules()` does, which keeps books on them.

    Of a layer with adapters, that one and the layer below: it is asked for the rest.
    """
    for module in block._modules.values():
        if module is not None:
            yield module
            if module._modules and is_adapted(module):
                yield layer_below(module)
            elif module._modules:
                yield from parts_of(module)


def guards_of(module: nn.Module, guarded: Mapping[type[nn.Module], tuple[str, ...]]) -> tuple[Any, ...]:
    """Return values that change with what a plan is built on of `module`, attributes in `guarded` among them."""
    if module._modules and is_adapted(module):
        return guards_of_adapters(module)
    state = module.__dict__
    parameters = [
        (tensor.data_ptr(), tensor.dtype, tensor.is_cpu, tensor.shape, tensor.is_contiguous())
        for tensor in state["_parameters"].values()
        if tensor is not None
    ]
    buffers, cache = state["_buffers"], state.get("_cache")
    packed = None if cache is None else id(cache[1])  # a plan keeps it, so that its number is not given again
    codes, groups = buffers.get("qweight"), state.get("timestep_groups")
    ranges = codes is None or codes.is_cpu, buffers.get("input_scale") is None, id(groups)
    values = map(state.get, guarded.get(type(module), ()))
    return (id(module), type(module), is_changed(module), packed, ranges, *values, *parameters)


def has_static_range(module: nn.Module) -> bool:
    """Return whether `module` is a layer whose activation range is static."""
    return isinstance(module, QuantizedLayer) and module.input_scale is not None


def drops_nothing(module: nn.Module) -> bool:
    """Return whether `module` is a dropout that passes on what it gets, and has no hooks."""
    return type(module) is nn.Dropout and not is_changed(module) and not (module.training and module.p > 0)


def is_plain(tensor: Tensor | None) -> bool:
    """Return whether the numbers of `tensor` are fp32 in the CPU's memory, side by side."""
    if tensor is None:
        return False
    return tensor.dtype == torch.float32 and tensor.device.type == "cpu" and tensor.is_contiguous()


def takes_kernel(layer: nn.Module) -> bool:
    """Return whether this call of `layer` is one for the kernel x86, with its adapters, and it has no hooks."""
    if not is_packed(layer) or (layer_below(layer) is not layer and factors_of(layer) is None):
        return False
    layer = layer_below(layer)
    if is_changed(layer):
        return False
    assert isinstance(layer, QuantizedLayer)
    if layer.kernel_name() != x86.NAME or isinstance(layer.input_group(), Tensor):
        return False
    return layer.bias is None or is_plain(layer.bias)


def plain_norm(module: nn.Module) -> Norm | None:
    """Return the group norm that `module` computes, or `None` where the kernel cannot take it, or it has hooks."""
    if type(module) is not nn.GroupNorm or is_changed(module):
        return None
    assert isinstance(module, nn.GroupNorm)
    if not is_plain(module.weight) or not is_plain(module.bias) or module.num_channels % module.num_groups:
        return None
    return Norm.of(module)


def plan_call(
    layer: nn.Module, size: torch.Size, packed: PackedLayer | None = None, *, is_doubled: bool = False
) -> Call:
    """Return the call of `layer` for an input of `size`, for a plan: other calls of the layer leave it as it is.

    `layer` is a packed one, or one with adapters that `takes_kernel` knows. The call keeps what the layer has packed,
    unless that is `packed`, which keeps the plan. `is_doubled` is as in `call_of`.
    """
    below: QuantizedLayer = layer_below(layer)
    own = below.packed_for(x86.NAME) if packed is None else packed  # once: another thread may pack the layer anew
    call = call_of(below.operation(below.input_group()), own, size, is_doubled=is_doubled)
    adapters = beside(layer, size, own, is_doubled=is_doubled)
    return call._replace(keeps=(call.keeps, own if packed is None else None), beside=adapters)


def empty_image(x: Tensor, channels: int, *, factor: int = 1) -> Tensor:
    """Return an empty image (B, channels, factor H, factor W), channels_last, for `x` (B, C, H, W)."""
    shape = (x.shape[0], channels, factor * x.shape[2], factor * x.shape[3])
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def addend_of(x: Tensor, *, adds_input: bool) -> Addend:
    """Return what is added to an output: `x` where a block `adds_input`."""
    return Addend(x.data_ptr() if adds_input else None, 0)
