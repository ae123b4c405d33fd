"""SiLU(GroupNorm(x)) that waits for its consumer: an int8 layer computes it while it rounds, in one pass.

Norm, activation and rounding apart read and write the input of a convolution six times. In the residual blocks of a
quantized model the first two return a `PendingActivation`. A kernel that knows the class takes it apart; for all else
it is a tensor, whose values are computed once they are asked for.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

# What can be told of the result without computing it.
METADATA = {
    Tensor.dim,
    Tensor.is_contiguous,
    Tensor.numel,
    Tensor.size,
    *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "is_cpu", "ndim", "requires_grad", "shape")),
}


class Norm(NamedTuple):
    """What a group norm was when it was called: a module that is offloaded loses its parameters afterwards."""

    num_groups: int
    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.GroupNorm) -> "Norm":
        """Return the norm that `module` computes now."""
        return cls(
            module.num_groups, module.weight.detach().contiguous(), module.bias.detach().contiguous(), module.eps
        )


class PendingActivation(Tensor):
    """The group norm of `source` fp32 (B, C, H, W), channels_last, by `norm`; with `has_silu`, the SiLU of that.

    It shares the memory of `source` until it is computed, so `source` must not be written to before.
    """

    source: Tensor
    group_norm: Norm
    has_silu: bool
    computed: Tensor | None

    @classmethod
    def of(cls, source: Tensor, norm: Norm, *, has_silu: bool = False) -> "PendingActivation":
        """Return the pending activation of `source`."""
        pending = source.as_subclass(cls)
        pending.source, pending.group_norm, pending.has_silu, pending.computed = source, norm, has_silu, None
        return pending

    def value(self) -> Tensor:
        """Return the activation, a plain tensor."""
        if self.computed is None:
            output = F.group_norm(self.source, *self.group_norm)
            self.computed = F.silu(output) if self.has_silu else output
        return self.computed

    def can_be_fused(self, layer: nn.Module) -> bool:
        """Return whether `layer` can compute this: nobody did, and the channels are where it looks for them."""
        return self.computed is None and isinstance(layer, nn.Conv2d)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compute the pending arguments of `func`, but for what does not ask for values."""
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func is F.dropout and not kwargs.get("training", True):
            return args[0]
        x = args[0] if args and isinstance(args[0], PendingActivation) and args[0].computed is None else None
        if func is Tensor.to and x is not None and moves_nothing(x, *args[1:], **kwargs):
            return x  # what hooks of offloaded models do with every input
        args, kwargs = tree_map_only(PendingActivation, PendingActivation.value, (args, kwargs))
        return func(*args, **kwargs)


def moves_nothing(x: Tensor, *args: Any, **kwargs: Any) -> bool:
    """Return whether `x.to(*args, **kwargs)` keeps device and dtype, and asks for neither a copy nor a layout."""
    if kwargs.get("copy") or "memory_format" in kwargs or any(arg is True for arg in args[2:]):
        return False
    if any(isinstance(arg, Tensor) for arg in (*args, *kwargs.values())):
        return False
    moved = torch.empty(0, dtype=x.dtype, device=x.device).to(*args, **kwargs)
    return moved.dtype == x.dtype and moved.device == x.device


class PendingGroupNorm(nn.GroupNorm):
    """A group norm before a SiLU and an int8 convolution: its output waits for them where it can."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the group norm of `input`, pending where a kernel could take it apart."""
        # Of another type, where somebody kept this method, as hooks do, longer than it was there.
        can_wait = type(self) is PendingGroupNorm and self.can_wait(input)
        return PendingActivation.of(input, Norm.of(self)) if can_wait else nn.GroupNorm.forward(self, input)

    def can_wait(self, x: Tensor) -> bool:
        """Return whether a kernel could take the group norm of `x` apart: numbers in memory, and no gradient."""
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or type(x) is not Tensor or x.dim() != 4:
            return False
        if x.shape[1] != self.num_channels or self._forward_hooks:  # a hook may keep the output
            return False
        if self.weight is None or self.bias is None or self.num_channels % self.num_groups:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad or self.bias.requires_grad):
            return False
        numbers = (x, self.weight, self.bias)
        if not x.numel() or any(tensor.dtype != torch.float32 or tensor.device.type != "cpu" for tensor in numbers):
            return False
        return x.is_contiguous(memory_format=torch.channels_last)


class PendingSiLU(nn.SiLU):
    """A SiLU after a group norm that may wait."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the SiLU of `input`, pending where `input` is."""
        if isinstance(input, PendingActivation) and not input.has_silu and input.computed is None:
            return PendingActivation.of(input.source, input.group_norm, has_silu=True)
        return nn.SiLU.forward(self, input)


WAITING: dict[type[nn.Module], type[nn.Module]] = {nn.GroupNorm: PendingGroupNorm, nn.SiLU: PendingSiLU}
AT_ONCE = {waiting: plain for plain, waiting in WAITING.items()}


def install_pending_(model: nn.Module, consumers: set[nn.Module]) -> None:
    """Let norms, and the activations of residual blocks, wait for those layers that are `consumers`.

    The modules change their class and stay what they are: parameters, hooks and names.
    """
    for block in model.modules():
        for module in waiting_modules(block, consumers):
            if type(module) in WAITING and (type(module) is nn.SiLU or module.affine):
                module.__class__ = WAITING[type(module)]


def waiting_modules(block: nn.Module, consumers: set[nn.Module]) -> list[nn.Module]:
    """Return the modules of `block` whose outputs go to one of `consumers` and nowhere else."""
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    if isinstance(block, ResnetBlock2D) and type(block.nonlinearity) in (nn.SiLU, PendingSiLU):
        norms = [block.norm1] if block.conv1 in consumers else []
        # "scale_shift" has a product and a sum between the norm and the activation.
        norms += [block.norm2] if block.conv2 in consumers and block.time_embedding_norm == "default" else []
        return [*norms, block.nonlinearity] if norms else []
    if isinstance(block, Transformer2DModel) and getattr(block, "proj_in", None) in consumers:
        return [] if block.use_linear_projection else [block.norm]
    return []


def remove_pending_(model: nn.Module) -> None:
    """Undo `install_pending_`."""
    for module in model.modules():
        if type(module) in AT_ONCE:
            module.__class__ = AT_ONCE[type(module)]
