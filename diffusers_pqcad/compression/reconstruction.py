"""Block reconstruction: train one unit's latent weights and scales to give the full-precision unit's output.

A unit's inputs are captured from the model as the units before it leave it, so no two units of a round can be trained
at once. Several processes share each unit: the passes that capture its inputs, and the images of every update.

Inspired by BRECQ (Li et al. 2021, arXiv:2102.05426) and Q-Diffusion (arXiv:2302.04304), with straight-through latent
weights in the place of AdaRound: latents carry over when the bits change, which a rounding of the original cannot.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from operator import getitem
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from torch.utils._pytree import keystr, tree_flatten, tree_flatten_with_path, tree_leaves, tree_unflatten

from diffusers_pqcad.compression.fake_quant import fake_quant_layers
from diffusers_pqcad.compression.offload import Store, release_
from diffusers_pqcad.compression.optimization import check_minimum, parameter_groups
from diffusers_pqcad.compression.precision import MixedPrecision, computed_in
from diffusers_pqcad.compression.processes import add_gradients_, each, on_main, place, rows_of
from diffusers_pqcad.layers.find import layer_of

# Whole blocks where diffusers has them, and below those the parts that also stand alone; a layer outside all of these
# is a unit of its own.
BLOCKS = (
    "ResnetBlock2D",
    "BasicTransformerBlock",
    "JointTransformerBlock",
    "FluxTransformerBlock",
    "FluxSingleTransformerBlock",
)
RECONSTRUCTION_UNITS = (*BLOCKS, "Attention", "Downsample2D", "Upsample2D")
CAPTURE_BATCH_SIZE = 64  # images of a pass that captures what a unit sees


@dataclass(frozen=True)
class ReconstructionConfig:
    """Settings of one unit's reconstruction."""

    iterations: int = field(default=100, metadata={"help": "updates of a unit; 0: none, only rounding"})
    batch_size: int = field(default=16, metadata={"help": "images of an update"})
    step_rate: float = field(
        default=1e-2, metadata={"help": "rate, in rounding steps of each layer; Adam, with a cosine decay"}
    )
    float_rate: float = field(
        default=1e-3, metadata={"help": "rate, in sizes of each tensor in floating point: biases and norms"}
    )
    # QDrop, arXiv:2203.05740
    input_mix: float = field(
        default=0.5, metadata={"help": "share (0 to 1) of full-precision inputs that are mixed in elementwise"}
    )
    held_out_fraction: float = field(
        default=0.125, metadata={"help": "share of the images that decide whether a unit's training is kept"}
    )

    def __post_init__(self) -> None:
        check_minimum(self, iterations=0, batch_size=1, step_rate=0, float_rate=0)
        if not (0 <= self.input_mix <= 1 and 0 < self.held_out_fraction < 1):
            raise ValueError(
                f"input_mix={self.input_mix}, held_out_fraction={self.held_out_fraction}: expected shares, the second "
                "between 0 and 1."
            )


@dataclass(frozen=True)
class UnitIO:
    """What one unit saw: `inputs` of the quantized model and of the full-precision one, and the latter's `target`.

    Arguments as tuples, the last ones by the names `keywords`; they may be nested, with tensors (n, ...). `shared` are
    the positions of those leaves that have no batch axis: all samples see the same. `target` is nested as the unit's
    output: tensors (n, ...) to compare, None in the place of anything else. `weight` (n,) is each sample's squared
    gain.
    """

    inputs: tuple[Any, ...]
    float_inputs: tuple[Any, ...]
    keywords: tuple[str, ...]
    target: Any
    weight: Tensor
    shared: frozenset[int] = frozenset()


@dataclass(frozen=True)
class UnitResult:
    """Held-out loss of a unit before and after; `accepted` says whether the training was kept."""

    name: str
    loss_before: float
    loss_after: float
    accepted: bool


class Pass(NamedTuple):
    """One call of a model in a step: `run(model, rows)` makes it for the samples `rows`, `branches` rows of each."""

    run: Callable[[nn.Module, Tensor], Any]
    branches: int = 1


class _Captured(Exception):
    """Ends a forward pass early, once the unit has been seen."""


def _is_unit(module: nn.Module, named_blocks: Collection[str]) -> bool:
    """Return whether `module` is of a known kind, or a block of `named_blocks` that holds no known block."""
    kind = type(module).__name__
    if kind in RECONSTRUCTION_UNITS:
        return True
    # UNets also name whole stages, CrossAttnUpBlock2D: too large to reconstruct at once.
    return kind in named_blocks and not any(type(part).__name__ in BLOCKS for part in module.modules())


def find_units(model: nn.Module) -> dict[str, nn.Module]:
    """Return the units of a fake-quantized `model` that hold quantized layers, by name, outermost first.

    Blocks that are not known here are those that the model's class wants on one device: `_no_split_modules`.
    """
    return units_holding(model, fake_quant_layers(model))


def units_holding(model: nn.Module, layers: Collection[str]) -> dict[str, nn.Module]:
    """Return the units of a `model` that hold some of `layers`, which are named, as `find_units` does."""
    units: dict[str, nn.Module] = {}
    named_blocks = getattr(type(model), "_no_split_modules", None) or ()
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{unit}.") for unit in units)
        holds = name in layers or (
            _is_unit(module, named_blocks) and any(layer.startswith(f"{name}.") for layer in layers)
        )
        if holds and not inside:
            units[name] = module
    return units


@torch.no_grad()
def execution_order(units: Mapping[str, nn.Module], run: Callable[[], Any]) -> list[str]:
    """Return the names of `units` as `run`, a pass of their model, meets them: not the order of registration."""
    order: list[str] = []
    hooks = [
        unit.register_forward_pre_hook(lambda module, args, name=name: order.append(name))
        for name, unit in units.items()
    ]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return list(dict.fromkeys(order))


@contextmanager
def recording(unit: nn.Module, record: dict[str, Any]) -> Iterator[None]:
    """Keep the arguments and the output of `unit` in `record`, and stop the pass right after it."""

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        record.update(args=args, kwargs=kwargs, output=output)
        raise _Captured

    hook = unit.register_forward_hook(keep, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _batches(count: int, batch_size: int) -> tuple[list[Tensor], list[Tensor]]:
    """Return the rows of each batch of `count` samples, and those of a probe where all batches are of one size.

    Two sizes of a call tell a tensor with a batch axis from one that has as many rows by accident.
    """
    batches = list(torch.arange(count).split(batch_size))
    sizes = {len(rows) for rows in batches}
    return batches, [torch.zeros(2 if sizes == {1} else 1, dtype=torch.long)] if len(sizes) == 1 else []


def _is_batched(value: Any, size: int) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == size


def _is_same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return one is other or (type(one) is type(other) and bool(one == other))


def _labels(arguments: tuple[Any, ...], keywords: tuple[str, ...]) -> list[str]:
    """Return what to call each of `arguments` in a message: `args[1]`, `image_rotary_emb`."""
    return [*(f"args[{index}]" for index in range(len(arguments) - len(keywords))), *keywords]


def _join_arguments(
    calls: list[tuple[Any, ...]],
    sizes: list[int],
    keywords: tuple[str, ...],
    num_batches: int,
    cat: Callable[..., Tensor],
) -> tuple[tuple[Any, ...], frozenset[int]]:
    """Return the first `num_batches` of the `calls` as one, and the positions of the leaves without a batch axis.

    A leaf has a batch axis if its first dimension is the call's number of samples in all calls, of whatever `sizes`:
    it is joined to (n, ...). Any other must be the same in all calls: ValueError with its name, `args[1][0]`.
    """
    names = []
    for label, values in zip(_labels(calls[0], keywords), zip(*calls, strict=True), strict=True):
        paths, spec = tree_flatten_with_path(values[0])
        if any(tree_flatten(value)[1] != spec for value in values):
            raise ValueError(f"{label} is nested differently from one call to another.")
        names += [label + keystr(path) for path, _ in paths]
    leaves: list[Any] = []
    shared = set()
    for index, values in enumerate(zip(*(tree_leaves(call) for call in calls), strict=True)):
        if all(map(_is_batched, values, sizes)):
            leaves.append(cat(values[:num_batches]))
            continue
        if not all(_is_same(values[0], value) for value in values):
            raise ValueError(f"{names[index]} has no batch axis, and differs from one call to another.")
        leaves.append(values[0])
        shared.add(index)
    return tree_unflatten(leaves, tree_flatten(calls[0])[1]), frozenset(shared)


def _join_outputs(outputs: list[Any], sizes: list[int], num_batches: int, cat: Callable[..., Tensor]) -> Any:
    """Return the first `num_batches` of the `outputs` as one, with None in the place of what is not compared.

    Compared are floating-point tensors with a batch axis, (n, ...).
    """
    leaves = [
        cat(values[:num_batches]) if all(map(_is_batched, values, sizes)) and values[0].is_floating_point() else None
        for values in zip(*map(tree_leaves, outputs), strict=True)
    ]
    if not any(isinstance(leaf, Tensor) for leaf in leaves):
        raise ValueError("it returns no tensor with a batch axis.")
    return tree_unflatten(leaves, tree_flatten(outputs[0])[1])


@torch.no_grad()
def capture_io(
    model: nn.Module,
    reference: nn.Module,
    name: str,
    passes: Sequence[Pass],
    weight: Tensor,
    *,
    batch_size: int = CAPTURE_BATCH_SIZE,
    store: Store | None = None,
) -> UnitIO:
    """Return what the unit `name` sees and should give, for as many samples as `weight` (n,) has.

    `passes` are the calls of a model in one step; all of them are captured, and the rows of a sample (its branches)
    stay together. With a `store` it lies there, on the CPU, and no more than one pass of it is ever in memory. Raises
    ValueError, with the unit's name, for an argument that is neither cut along the batch nor the same in all calls,
    and for a unit that returns nothing to compare.
    """
    batches, probe = _batches(len(weight), batch_size)
    calls = [(rows, one) for rows in (*batches, *probe) for one in passes]
    sizes = [one.branches * len(rows) for rows, one in calls]
    num_kept = len(batches) * len(passes)

    def captured(call: tuple[nn.Module, tuple[str, ...], Tensor, Pass]) -> dict[str, Any]:
        network, kept, rows, one = call
        record: dict[str, Any] = {}
        with recording(network.get_submodule(name), record), suppress(_Captured):
            one.run(network, rows)
        found = {key: record[key] for key in kept}
        return found if store is None else store.put_tree(found)

    networks = (model, ("args", "kwargs")), (reference, ("args", "kwargs", "output"))
    runs = ((*network, rows, one) for rows, one in calls for network in networks)
    records = each(runs, captured, weight.device if store is None else "cpu")
    cat: Callable[..., Tensor] = torch.cat if store is None else store.cat
    own, full = records[::2], records[1::2]
    keywords = tuple(own[0]["kwargs"])

    def arguments_of(records: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        return [(*record["args"], *(record["kwargs"][key] for key in keywords)) for record in records]

    try:
        inputs, shared = _join_arguments(arguments_of(own), sizes, keywords, num_kept, cat)
        float_inputs, _ = _join_arguments(arguments_of(full), sizes, keywords, num_kept, cat)
        target = _join_outputs([record["output"] for record in full], sizes, num_kept, cat)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    samples = torch.cat([rows.repeat(one.branches) for rows, one in calls[:num_kept]])
    order = samples.argsort(stable=True)  # branches of a sample side by side: none is held out without the others
    if not torch.equal(order, torch.arange(len(order))):
        take = None if store is None else store.rows
        inputs, float_inputs = (take_rows(values, order, shared, take) for values in (inputs, float_inputs))
        target = take_rows(target, order, (), take)
    return UnitIO(inputs, float_inputs, keywords, target, weight[samples[order].to(weight.device)], shared)


def random_mask(shape: torch.Size, share: float, generator: torch.Generator) -> Tensor:
    """Return a bool tensor in which each element is true with probability `share`, to the nearest 1/256.

    Four elements from each random integer: drawn one by one, the masks would take a good part of a reconstruction.
    """
    threshold = round(256 * share)
    if threshold in (0, 256):
        return torch.full(shape, threshold == 256)  # 256 does not fit a byte
    count = -(-shape.numel() // 4)
    draws = torch.randint(-(2**31), 2**31, (count,), generator=generator, dtype=torch.int32).view(torch.uint8)
    return (draws[: shape.numel()] < threshold).view(shape)


def take_rows(
    tree: Any,
    rows: Any,
    shared: Collection[int] = (),
    take: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Any:
    """Return `tree` with the tensors (n, ...) cut to `rows`; the leaves at the positions `shared` stay whole.

    `take(tensor, rows)` gives `tensor[rows]` in another way.
    """
    leaves, spec = tree_flatten(tree)
    take = take or getitem
    return tree_unflatten(
        [
            take(leaf, rows) if isinstance(leaf, Tensor) and index not in shared else leaf
            for index, leaf in enumerate(leaves)
        ],
        spec,
    )


def mix_inputs(own: Any, full: Any, share: float, generator: torch.Generator, shared: Collection[int] = ()) -> Any:
    """Return `own` with a random `share` of each tensor's elements from `full`; `shared` leaves are those of `own`."""
    leaves, spec = tree_flatten(own)
    mixed = [
        torch.where(random_mask(leaf.shape, share, generator).to(leaf.device), other, leaf)
        if isinstance(leaf, Tensor) and index not in shared
        else leaf
        for index, (leaf, other) in enumerate(zip(leaves, tree_leaves(full), strict=True))
    ]
    return tree_unflatten(mixed, spec)


def output_loss(output: Any, target: Any, weight: Tensor) -> Tensor:
    """Return the gain-weighted squared error of `output`, nested as `target`: tensors (n, ...), weight (n,).

    The mean over each tensor's elements, summed over the tensors: a stream of many tokens does not drown one of few.
    """
    errors = [
        (own - wanted).square().reshape(len(weight), -1).mean(dim=1)
        for own, wanted in zip(tree_leaves(output), tree_leaves(target), strict=True)
        if isinstance(wanted, Tensor)
    ]
    return (torch.stack(errors).sum(dim=0) * weight).mean()


def unit_loss(
    unit: nn.Module, arguments: tuple[Any, ...], keywords: tuple[str, ...], target: Any, weight: Tensor
) -> Tensor:
    """Return the gain-weighted mean squared error of the unit's outputs; the last arguments go by name."""
    num_positional = len(arguments) - len(keywords)
    output = unit(*arguments[:num_positional], **dict(zip(keywords, arguments[num_positional:], strict=True)))
    return output_loss(output, target, weight)


def reconstruct(
    unit: nn.Module,
    io: UnitIO,
    config: ReconstructionConfig,
    *,
    name: str = "",
    seed: int = 0,
    mixed_precision: MixedPrecision = "no",
) -> UnitResult:
    """Train `unit` (a block or a single layer) in place on `io`; kept only if the held-out loss improves.

    `mixed_precision` is that of the updates; losses that decide are in fp32. Of each update's images, processes take
    consecutive ones, and the gradients are added up.
    """
    num_samples = len(io.weight)
    num_train = num_samples - max(1, int(num_samples * config.held_out_fraction))
    device = io.weight.device

    def used(tree: Any) -> Any:
        """Return `tree`, cut from what was captured, on the unit's device, as the unit computes."""
        return send_to_device(tree, device)

    @torch.no_grad()
    def held_out_loss() -> float:
        rows = slice(num_train, None)
        inputs, target = used(take_rows(io.inputs, rows, io.shared)), used(take_rows(io.target, rows))
        loss = unit_loss(unit, inputs, io.keywords, target, io.weight[rows]).item()
        release_([io.inputs, io.target])
        return loss

    loss_before = on_main(held_out_loss)
    before = {key: value.clone() for key, value in unit.state_dict().items()}
    optimizer = torch.optim.Adam(parameter_groups(unit, config.step_rate, config.float_rate))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(config.iterations, 1))
    generator = torch.Generator().manual_seed(seed)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    mine = rows_of(config.batch_size, place())
    weight = (mine.stop - mine.start) / config.batch_size
    for _ in range(config.iterations):
        rows = torch.randint(0, num_train, (config.batch_size,), generator=generator)
        inputs, float_inputs = (take_rows(values, rows, io.shared) for values in (io.inputs, io.float_inputs))
        mixed = mix_inputs(inputs, float_inputs, config.input_mix, generator, io.shared)
        rows, mixed = rows[mine], used(take_rows(mixed, mine, io.shared))
        target = used(take_rows(io.target, rows))
        release_([io.inputs, io.float_inputs, io.target])
        optimizer.zero_grad()
        if weight:  # fewer images than processes leave some without
            with computed_in(mixed_precision, device):
                loss = unit_loss(unit, mixed, io.keywords, target, io.weight[rows])
            loss.backward()
        add_gradients_(parameters, weight)
        optimizer.step()
        schedule.step()
    optimizer.zero_grad()
    loss_after = on_main(held_out_loss)
    accepted = loss_after < loss_before
    if not accepted:
        unit.load_state_dict(before)
    return UnitResult(name, loss_before, loss_after, accepted)


def channel_mean(output: Tensor, layer: nn.Module) -> Tensor:
    """Return the mean of a layer's `output` for each output channel, (C_out,)."""
    if isinstance(layer, nn.Linear):
        return output.flatten(0, -2).mean(dim=0)
    return output.mean(dim=[axis for axis in range(output.dim()) if axis != 1])


@torch.no_grad()
def correct_biases_(model: nn.Module, reference: nn.Module, order: list[str], run: Callable[[nn.Module], Any]) -> None:
    """Shift the bias of each quantized layer so that its output's mean is the full-precision one, in place.

    b += E[y_fp - y_q] for each output channel, in execution `order`, so that a layer sees the corrections before it
    (Nagel et al. 2019, arXiv:1906.04721, section 4.2; exact for the samples of `run`, one call of the model that it is
    given). Layers without a bias are left.
    """
    names = [name for name in order if layer_of(model, name).bias is not None]
    wanted: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda layer, args, output: wanted.update({name: channel_mean(output, layer)})

    hooks = [layer_of(reference, name).register_forward_hook(keep(name)) for name in names]
    try:
        run(reference)
    finally:
        for hook in hooks:
            hook.remove()
    for name in names:
        layer = layer_of(model, name)
        record: dict[str, Any] = {}
        with recording(layer, record), suppress(_Captured):
            run(model)
        layer.get_parameter("bias").add_(wanted[name] - channel_mean(record["output"], layer))
