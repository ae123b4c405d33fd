"""Several processes as one: what each of them does of a list or a batch, and how that comes together.

A script that was started several times over (`accelerate launch`) calls the functions of this package in all of its
processes alike; they deal their work out here. Nothing is dealt out where there is one process, or inside `alone`.

Whatever is computed is a function of an item's place in the list or batch, not of the process, and everybody gets all
of it: results are those of one process, but for sums of gradients, whose order differs. An error of one process is
raised in all of them: every exchange is one of errors, too.
"""

import pickle
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from itertools import chain, islice, zip_longest
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    broadcast,
    gather_object,
    get_int_from_env,
    reduce,
    send_to_device,
)
from torch import Tensor, nn

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

# Others wait while one saves or measures times; one that died is noticed by its closed connections, not by this.
TIMEOUT = timedelta(hours=24)
WORLD_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as Accelerate reads them
SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
MISSING = object()

_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


class Place(NamedTuple):
    """Which of how many processes one is."""

    process_index: int = 0
    num_processes: int = 1


def place() -> Place:
    """Return the place of this process; that of a single one inside `alone`."""
    # Not by PartialState: where there is none yet, asking it would choose a device for the whole process.
    if _ALONE.get() or not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return Place()
    return Place(torch.distributed.get_rank(), torch.distributed.get_world_size())


def is_main() -> bool:
    """Return whether this process is the one that writes, and tells how it goes."""
    return place().process_index == 0


@contextmanager
def alone() -> Iterator[None]:
    """Let this process work for itself inside the block: nothing is dealt out, and nobody is waited for."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


# What is whose


def share(items: Iterable[T], mine: Place) -> Iterator[T]:
    """Give those of `items` that are a process's: one in `num_processes`, from its own place on."""
    return islice(items, mine.process_index, None, mine.num_processes)


def in_order(shares: Sequence[Sequence[T]]) -> list[T]:
    """Return the items of all processes' `shares` in the order in which they were dealt out."""
    turns = chain.from_iterable(zip_longest(*shares, fillvalue=MISSING))
    return [item for item in turns if item is not MISSING]  # type: ignore[misc]


def rows_of(count: int, mine: Place) -> slice:
    """Return a process's rows of a batch of `count`: consecutive ones, as many as others have, to within one."""
    first, last = (count * index // mine.num_processes for index in (mine.process_index, mine.process_index + 1))
    return slice(first, last)


# How it comes together


def divided(items: Iterable[T], make: Callable[[Iterable[T]], Iterable[R]], device: Any = "cpu") -> list[R]:
    """Return what `make` returns for `items`, a result for each, in their order; a process makes those of its share.

    Tensors from other processes come on `device`.
    """
    mine = place()
    if mine.num_processes == 1:
        return list(make(items))
    with together() as exchange:
        exchange.given = list(make(share(items, mine)))
    return send_to_device(in_order(exchange.found), device)


def each(items: Iterable[T], make: Callable[[T], R], device: Any = "cpu") -> list[R]:
    """Return `make(item)` of each of `items`, in order; otherwise as `divided`."""
    return divided(items, lambda mine: [make(item) for item in mine], device)


def in_turns(items: Sequence[T]) -> Iterator[list[T]]:
    """Give `items` in rounds, of as many as there are processes: nobody waits for more than one of another's."""
    count = place().num_processes
    return (list(items[first : first + count]) for first in range(0, len(items), count))


def on_main(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return what `function` returns where the main process alone calls it; the others wait for that."""
    mine = place()
    if mine.num_processes == 1:
        return function(*args, **kwargs)
    with together() as exchange:
        if mine.process_index == 0:
            with alone():
                exchange.given = function(*args, **kwargs)
    return exchange.found[0]


def everywhere(value: T) -> list[T]:
    """Return the `value` of every process, in their order."""
    with together() as exchange:
        exchange.given = value
    return exchange.found


def agreed(value: T) -> T:
    """Return the main process's `value`: what all of them decide by, where computers may round differently."""
    return on_main(lambda: value)


class Exchange:
    """What a process has for the others at the end of a `together` block, and then what each of them has, in order."""

    def __init__(self) -> None:
        self.given: Any = None
        self.found: list[Any] = []


@contextmanager
def together() -> Iterator[Exchange]:
    """Meet the other processes at the end of the block, and raise in all of them what one of them raises inside it.

    Of several that fail, the first one's. Each error that has been passed on says whose it was (`failed_elsewhere`).
    Tensors come on the CPU.
    """
    mine, exchange, error = place(), Exchange(), None
    try:
        yield exchange
    except Exception as raised:
        if mine.num_processes == 1 or hasattr(raised, "failed_process"):  # the others know
            raise
        error = raised
    if mine.num_processes == 1:
        exchange.found = [exchange.given]
        return
    told = None if error is None else _portable(error)
    everybody = gather_object([(send_to_device(exchange.given, "cpu"), told)])
    for failed, (_, other) in enumerate(everybody):
        if other is not None:
            told_of: Exception = error or other
            vars(told_of)["failed_process"] = failed
            told_of.add_note(f"Process {failed} of {mine.num_processes} failed, and the others stop, too.")
            raise told_of
    exchange.found = [given for given, _ in everybody]


def failed_elsewhere(error: BaseException) -> bool:
    """Return whether another process failed, which tells of it, and this one only knows."""
    return getattr(error, "failed_process", place().process_index) != place().process_index


def _portable(error: Exception) -> Exception:
    """Return `error`, or one that says the same where it cannot be sent: some cannot be made again."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")


def read_together(read: Callable[[], T], exists: Callable[[], bool]) -> T | None:
    """Return what `read` reads where the main process finds that it `exists`, else None.

    Nobody goes on before all have read: the main process may write to the same place next.
    """
    found = None
    if on_main(exists):
        with together():
            found = read()
    return found


def add_gradients_(parameters: Sequence[nn.Parameter], weight: float) -> None:
    """Make the gradients of `parameters` the sum of all processes', each times its `weight`; these add up to 1."""
    if place().num_processes == 1:
        return
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients]) * weight  # one message, in one order of addition
    summed: Tensor = reduce(flat, "sum")
    for parameter, gradient in zip(parameters, summed.split([p.numel() for p in parameters]), strict=True):
        parameter.grad = gradient.view_as(parameter)


@torch.no_grad()
def copy_from_main_(model: nn.Module) -> None:
    """Let `model` hold in all processes what it holds in the main one, to the last bit."""
    if place().num_processes > 1:
        broadcast([tensor for tensor in model.state_dict().values() if isinstance(tensor, Tensor)])


# How they are started


def accelerator_on(device_type: str, **options: Any) -> Accelerator:
    """Return the Accelerator of a training in fp32 on a kind of device, with further `options`: those of tracking.

    Several processes hold the whole model each, and their gradients are reduced. Raises ValueError where it would be
    otherwise, and where processes do not know of each other.
    """
    started = get_int_from_env(WORLD_SIZES, 1)
    accelerator = Accelerator(
        cpu=device_type == "cpu",
        # Rounded weights trained under autocast would be other weights than those that are packed.
        mixed_precision="no",
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=TIMEOUT),
            # Buckets stay as they are then: a resumed training adds the gradients up in the same order.
            DistributedDataParallelKwargs(broadcast_buffers=False, find_unused_parameters=True),
        ],
        **options,
    )
    if accelerator.num_processes != started:
        raise ValueError(
            f"{started} processes were started, and each believes to be one of {accelerator.num_processes}: all would "
            "write the same files. On CPUs, start them so: ACCELERATE_USE_CPU=true accelerate launch --multi_gpu "
            f"--num_processes {started} --num_machines 1 --mixed_precision no --dynamo_backend no SCRIPT, with "
            "train_device cpu."
        )
    check_whole(accelerator)
    return accelerator


def prepared(accelerator: Accelerator, model: nn.Module, optimizer: Any) -> tuple[nn.Module, Any]:
    """Return what `accelerator` makes of `model` and `optimizer`: of several processes, gradients are averaged."""
    with warnings.catch_warnings():
        # Older versions of torch know no other word. Buffers are alike; a second call would write into the first's.
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return accelerator.prepare(model, optimizer)


def check_whole(accelerator: Accelerator) -> None:
    """Raise ValueError where `accelerator` cuts models or their optimizers into pieces, of which each process has one.

    A resume file is written by one process, and held-out images are measured by any number of them.
    """
    if accelerator.distributed_type in SHARDED:
        raise ValueError(
            f"{accelerator.distributed_type.value}: expected processes that hold the whole model each, as with "
            "--multi_gpu; sharded weights and optimizers are not supported so far."
        )
