"""The faster of the two int8 kernels for each kind of layer, on CPUs with AMX: measured once, and kept.

Elsewhere nothing is measured: `x86` is the faster one (examples/benchmarks). AMX multiplies tiles of 8-bit integers,
several times as many as VNNI; oneDNN's operators use it and `x86` does not, and no such CPU was at hand.
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from diffusers_pqcad.kernels import cpu, native, onednn, x86
from diffusers_pqcad.kernels.native import variants, weights
from diffusers_pqcad.kernels.operation import ConvGeometry, Operation, is_in_memory
from diffusers_pqcad.numerics.qparams import WeightSpec

NEEDED_GAIN = 1.1  # of time: what another kernel than x86 has to be ahead by, as x86 computes whole blocks, too
MEASURED_SECONDS = 0.25  # of a kind of layer, after a call to warm up
MAX_ROUNDS = 20


class Kind(NamedTuple):
    """A kind of layer as it is measured: the shapes of its weight and of its input."""

    weight: tuple[int, ...]
    input: tuple[int, ...]


KINDS = {
    "matrix products": Kind((640, 640), (1, 256, 640)),
    "1x1 convolutions": Kind((320, 320, 1, 1), (1, 320, 32, 32)),
    "other convolutions": Kind((320, 320, 3, 3), (1, 320, 32, 32)),
}


def kind_of(operation: Operation) -> str:
    """Return the name in KINDS of the kind of layer that `operation` is of."""
    if operation.geometry is None:
        return "matrix products"
    return "1x1 convolutions" if operation.shape[2:].numel() == 1 else "other convolutions"


def is_needed() -> bool:
    """Return whether this computer has AMX and both kernels."""
    return cpu.has_amx() and onednn.available() and not isinstance(x86.library.library(), str)


def fastest(operation: Operation) -> str:
    """Return the name of the int8 kernel that was measured as the faster one; `x86` where only one can run it."""
    if not is_in_memory(operation.qweight) or any(kernel.refusal(operation) for kernel in (x86, onednn)):
        return x86.NAME
    return choices()[kind_of(operation)]


@cache
def choices() -> dict[str, str]:
    """Return the name of the faster kernel for each of KINDS: measured now, or by a process before this one."""
    path, known = None, None
    try:
        path = native.cache_folder() / f"faster-{circumstances()}.json"
        native.open_private(path.parent)
        known = json.loads(path.read_text())
    except (OSError, RuntimeError, ValueError):  # no folder, no home; not there yet, or damaged
        pass
    names = {x86.NAME, onednn.NAME}
    if isinstance(known, dict) and known.keys() == KINDS.keys() and set(map(str, known.values())) <= names:
        return known
    found = {name: decide(seconds_of(kind)) for name, kind in KINDS.items()}
    if path is not None:
        keep(path, found)
    return found


def circumstances() -> str:
    """Return a name for all that the choice depends on: CPU, threads, PyTorch, and our code."""
    told = [sorted(cpu.flags()), torch.get_num_threads(), torch.__version__, os.environ.get(native.FLAGS_VARIABLE)]
    told += [os.environ.get("ONEDNN_MAX_CPU_ISA"), KINDS]
    return sha256(repr(told).encode() + variants.text_beside(x86.library.SOURCE)).hexdigest()[:16]


def keep(path: Path, found: dict[str, str]) -> None:
    """Write `found` to `path`, whole, if that is possible: else the next process measures again."""
    own = path.with_suffix(f".{os.getpid()}")
    try:
        own.write_text(json.dumps(found))
        own.replace(path)
    except OSError:
        own.unlink(missing_ok=True)


def decide(seconds: Mapping[str, list[float]]) -> str:
    """Return the name of the kernel to take, of those with their `seconds`: `x86` unless one is well ahead of it."""
    medians = {name: median(values) for name, values in seconds.items()}
    best = min(medians, key=lambda name: medians[name])
    return best if medians[best] * NEEDED_GAIN < medians[x86.NAME] else x86.NAME


def seconds_of(kind: Kind) -> dict[str, list[float]]:
    """Return the seconds of calls of a layer of `kind` by each int8 kernel, which take turns."""
    with torch.device("cpu"), torch.no_grad():  # whatever the caller builds models on
        operation, x = sample(kind)
        calls: dict[str, Callable[[], Tensor]] = {
            kernel.NAME: partial(kernel.run, operation, kernel.pack(operation), x) for kernel in (x86, onednn)
        }
        for call in calls.values():
            call()
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        started = time.perf_counter()
        for _ in range(MAX_ROUNDS):
            for name, call in calls.items():
                before = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - before)
            if time.perf_counter() - started > MEASURED_SECONDS:
                break
    return seconds


def sample(kind: Kind) -> tuple[Operation, Tensor]:
    """Return a layer of `kind` with weights and activations of 8 bits, and an input: random, of a generator apart."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=generator) for size in kind)
    spec = WeightSpec(8)
    qweight, scale, _ = weights.quantize(weight, spec)
    geometry = None
    if weight.dim() == 4:
        border = (weight.shape[2] // 2, weight.shape[3] // 2)
        geometry = ConvGeometry((1, 1), border, (1, 1), 1, "zeros", ())
        x = x.contiguous(memory_format=torch.channels_last)
    return Operation("a sample", spec, weight.shape, geometry, qweight, scale, None, 8, None, None), x


def report() -> str:
    """Return a clause of a sentence about AMX: which kernel was measured as the faster one for what."""
    if not is_needed():
        return "which oneDNN's operators use"
    return "and measured as faster were " + ", ".join(f"{name} for {kind}" for kind, name in choices().items())
