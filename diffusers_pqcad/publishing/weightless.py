"""Training without weights: the same operators on tensors that have shapes and no numbers, whose bytes are counted.

torch's FakeTensorMode makes such tensors; what is alive of them at once is what a computation would take.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from diffusers_pqcad.compression.distillation import DistillConfig, checkpointed
from diffusers_pqcad.compression.fake_quant import WeightFakeQuantize, weights_at_rest
from diffusers_pqcad.compression.optimization import Trainable
from diffusers_pqcad.compression.precision import DTYPES, MixedPrecision, computed_in
from diffusers_pqcad.layers.find import layer_of
from diffusers_pqcad.loading.coverage import float_weights
from diffusers_pqcad.numerics.qparams import WeightSpec
from diffusers_pqcad.publishing.outline import Outline, calls_of_parts


class AliveBytes(TorchDispatchMode):
    """Inside the block, counts the bytes of tensors that operators make and that are alive; `peak` is the most."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.counted = self.peak = 0  # counted: at least what is alive

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and count what it makes."""
        given = {storage._cdata for storage in storages((args, kwargs))}
        found = func(*args, **(kwargs or {}))
        for storage in storages(found):
            key = storage._cdata
            if key in given or (key in self.alive and not self.alive[key][0].expired()):
                continue
            self.alive[key] = (StorageWeakRef(storage), storage.nbytes())
            self.counted += storage.nbytes()
        if self.counted > self.peak:  # only then it matters what is gone
            self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
            self.counted = sum(nbytes for _, nbytes in self.alive.values())
            self.peak = max(self.peak, self.counted)
        return found


def storages(tree: Any) -> list[torch.UntypedStorage]:
    """Return the memory of all tensors in `tree`."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@cache
def without_numbers() -> FakeTensorMode:
    """Return a mode in which tensors have shapes, dtypes and a device, the CPU, and no numbers.

    It is one for all, so that a model which is made in it can be called in it again.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


def remade(model: nn.Module, parameter: Callable[[Tensor], Tensor], buffer: Callable[[Tensor], Tensor]) -> nn.Module:
    """Return a copy of `model`, on meta, whose parameters and buffers are made anew by these; in eval mode."""
    found = copy.deepcopy(model)
    for module in found.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[name] = nn.Parameter(parameter(tensor))
        for name, held in module._buffers.items():
            if held is not None:
                module._buffers[name] = buffer(held)
    return found.eval()


def numberless(model: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Return a copy of `model`, on meta, that can be called inside `without_numbers`; fp32 tensors become `dtype`."""

    def like(tensor: Tensor) -> Tensor:
        return torch.empty(tensor.shape, dtype=dtype if tensor.dtype == torch.float32 else tensor.dtype)

    return remade(model, like, like).requires_grad_(False)


@cache
def rounding(outline: Outline, layers: tuple[str, ...], group_size: int | None) -> nn.Module:
    """Return a numberless model whose `layers` round their weights in each call, as under PQ and CAD.

    It is shared, as making it takes longer than a call: who trains it leaves it as it was (`training`).
    """
    model = numberless(outline.model)
    for name in layers:
        layer: Any = layer_of(model, name)
        groups = group_size if isinstance(layer, nn.Linear) else None
        parametrize.register_parametrization(
            layer, "weight", WeightFakeQuantize.blank(layer.weight, WeightSpec(4, groups))
        )
    return model.requires_grad_(False)


@contextmanager
def training(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Let gradients to `parameters` be computed inside the block, and let go of them after it."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.grad = None
            parameter.requires_grad_(False)


class Update(NamedTuple):
    """What a batch of CAD computes: terms, images of each, steps of the teacher (0: none), branches of both."""

    num_terms: int
    batch_size: int
    teacher_steps: int
    branches: int
    teacher_branches: int


def trained_parameters(student: nn.Module, trainable: Trainable) -> list[nn.Parameter]:
    """Return what is `trainable` of a numberless student; of an adapter, which is small, nothing."""
    if trainable == "lora":
        return []
    weights = {id(weight.parameter) for weight in float_weights(student)} if trainable == "scales" else set()
    return [parameter for parameter in student.parameters() if id(parameter) not in weights]


@cache
def backward_bytes(
    outline: Outline,
    layers: tuple[str, ...],
    group_size: int | None,
    update: Update,
    trainable: Trainable,
    mixed_precision: MixedPrecision,
    *,
    gradient_checkpointing: bool,
) -> int:
    """Return the most bytes that a batch of CAD takes beside models: activations, rounded weights, and gradients.

    What is kept from update to update is not among them (`trained_bytes`).
    """
    with without_numbers():
        student = rounding(outline, layers, group_size)
        teacher: Any = numberless(outline.model, DTYPES[mixed_precision])
        trained = trained_parameters(student, trainable)
        with training(trained), AliveBytes() as alive, ExitStack() as stack:
            stack.enter_context(weights_at_rest(student))
            stack.enter_context(checkpointed(student, enabled=gradient_checkpointing))
            with torch.no_grad():
                if update.teacher_steps:
                    outline.call(teacher, update.batch_size, branches=update.teacher_branches)
            with nullcontext() if trained else torch.no_grad(), computed_in(mixed_precision, "cpu"):
                output = outline.call(student, update.num_terms * update.batch_size, branches=update.branches)
            if trained:
                output.square().mean().backward()
        return alive.peak


def trained_bytes(
    outline: Outline, layers: Sequence[str], group_size: int | None, config: DistillConfig
) -> tuple[int, int]:
    """Return the bytes of what `config` trains, in fp32, and those of the optimizer's state."""
    with without_numbers():
        trained = trained_parameters(rounding(outline, tuple(layers), group_size), config.trainable)
        return sum(4 * parameter.numel() for parameter in trained), sum(state_bytes(p, config) for p in trained)


def state_bytes(parameter: Tensor, config: DistillConfig) -> int:
    """Return the bytes of the optimizer's state of a parameter."""
    if config.optimizer == "adafactor":
        rows = len(parameter) if parameter.dim() > 1 else 1
        return 4 * (rows + parameter.numel() // rows)
    return 2 * parameter.numel() * (1 if config.use_8bit_adam else 4)


@cache
def forward_bytes(outline: Outline, layers: tuple[str, ...], group_size: int | None, num_images: int) -> int:
    """Return the most bytes that a step without gradients takes beside a model whose `layers` round their weights."""
    with without_numbers(), torch.no_grad():
        model = rounding(outline, layers, group_size)
        with AliveBytes() as alive:
            outline.call(model, num_images)
        return alive.peak


class UnitBytes(NamedTuple):
    """Bytes of a unit of PQ: what it sees and gives, of a row of the batch, and what its updates take beside that."""

    seen: int
    given: int
    update: int

    @property
    def captured(self) -> int:
        """What is kept of a row: what the unit sees of the model and of its reference, and what it should give."""
        return 2 * self.seen + self.given


@cache
def unit_bytes(
    outline: Outline,
    layers: tuple[str, ...],
    group_size: int | None,
    units: tuple[str, ...],
    batch_size: int,
    mixed_precision: MixedPrecision,
) -> dict[str, UnitBytes]:
    """Return what each of `units` takes, trained in batches of `batch_size` rows."""
    with without_numbers():
        model = rounding(outline, layers, group_size)
        calls = calls_of_parts(outline, model, units)
        return {name: unit_bytes_of(model.get_submodule(name), *calls[name], batch_size, mixed_precision)
                for name in units}  # fmt: skip


def unit_bytes_of(
    unit: nn.Module, args: Any, kwargs: Any, output: Any, batch_size: int, mixed_precision: MixedPrecision
) -> UnitBytes:
    """Return what a numberless `unit` takes, which was called so for some rows."""
    rows = len(next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)))

    def of_a_row(tree: Any) -> int:
        leaves = [leaf for leaf in tree_leaves(tree) if is_batched(leaf, rows)]
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves) // rows

    def batch(tree: Any) -> Any:
        return tree_map(
            lambda leaf: leaf.new_empty((batch_size, *leaf.shape[1:])) if is_batched(leaf, rows) else leaf, tree
        )

    parameters = list(unit.parameters())
    with training(parameters), AliveBytes() as alive:
        before = [parameter.detach().clone() for parameter in parameters]
        state = [torch.empty_like(parameter, requires_grad=False) for parameter in parameters for _ in range(2)]
        # Inputs of both models, what is mixed of them, and what the unit should give.
        given = [batch(args), batch(kwargs), batch(args), batch(kwargs), batch(output)]
        inputs = batch(args), batch(kwargs)
        with computed_in(mixed_precision, "cpu"):
            found = unit(*inputs[0], **inputs[1])
        losses = [leaf.float().square().mean() for leaf in tree_leaves(found) if is_batched(leaf, batch_size)]
        torch.stack(losses).sum().backward()
        del before, state, given, inputs, found, losses
    return UnitBytes(of_a_row((args, kwargs)), of_a_row(output), alive.peak)


def is_batched(leaf: Any, rows: int) -> bool:
    """Return whether `leaf` is a tensor of floats of that many rows."""
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == rows and leaf.is_floating_point()


@cache
def decoding_bytes(decoder: Any, latents: tuple[int, ...]) -> int:
    """Return the most bytes that decoding `latents`, of this shape, takes beside the `decoder`, on meta."""
    with without_numbers(), torch.no_grad():
        model: Any = numberless(decoder)
        with AliveBytes() as alive:
            model.decode(torch.empty(latents), return_dict=False)
        return alive.peak
