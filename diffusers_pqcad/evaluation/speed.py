"""Latency, sizes and the circumstances they were measured in."""

import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from diffusers_pqcad import kernels
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.quantized import QuantizedLayer


class Latency(NamedTuple):
    """Wall-clock times of one candidate in milliseconds: median, smallest, largest and every round in order."""

    median_ms: float
    min_ms: float
    max_ms: float
    rounds_ms: tuple[float, ...]

    def scaled(self, factor: float) -> "Latency":
        """Return this latency times `factor`, such as 1 / batch size for milliseconds per image."""
        return Latency(
            self.median_ms * factor,
            self.min_ms * factor,
            self.max_ms * factor,
            tuple(value * factor for value in self.rounds_ms),
        )


def interleaved_latency(
    candidates: Mapping[str, Callable[[], Any]], *, num_rounds: int = 5, warmup_rounds: int = 1
) -> dict[str, Latency]:
    """Return the latency of each candidate, measured in turns A B C A B C, so that a drifting machine slows all alike.

    Each candidate is called once per round and must do its work before it returns; on a GPU the clock stops only
    after the device is idle. The first `warmup_rounds` rounds are run and not counted.

    Raises ValueError where there is no candidate or no round to measure.
    """
    if not candidates:
        raise ValueError("candidates: expected at least one name with a function to call, got none.")
    if num_rounds < 1 or warmup_rounds < 0:
        raise ValueError(
            f"num_rounds={num_rounds}, warmup_rounds={warmup_rounds}: expected at least 1 and at least 0."
        )
    times_ms: dict[str, list[float]] = {name: [] for name in candidates}
    for round_index in range(warmup_rounds + num_rounds):
        for name, run in candidates.items():
            _synchronize()
            started = time.perf_counter()
            run()
            _synchronize()
            if round_index >= warmup_rounds:
                times_ms[name].append(1000 * (time.perf_counter() - started))
    return {
        name: Latency(median(values), min(values), max(values), tuple(values)) for name, values in times_ms.items()
    }


def directory_size_bytes(path: str | Path) -> int:
    """Return the bytes of the file `path`, or of all files below the directory `path`.

    Symbolic links count as the files they point to (the Hub cache links its blobs). Raises FileNotFoundError if
    `path` does not exist.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: not found. Expected a weights file or a folder written by save_pretrained.")
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def tensor_bytes(module: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of `module` as stored in memory; shared tensors count once.

    What a kernel holds beside them (a repacked copy of the weights) is not counted.
    """
    return sum(tensor.numel() * tensor.element_size() for tensor in (*module.parameters(), *module.buffers()))


def layers_by_kernel(model: nn.Module) -> dict[str, int]:
    """Return how many quantized layers of `model` each kernel computes, where they lie now and as kernels are forced.

    Called without gradients, as pipelines do. Empty for a model in floating point.
    """
    return dict(Counter(map(_kernel_of, packed_layers(model).values())))


def _kernel_of(layer: QuantizedLayer) -> str:
    return kernels.forced() or layer.kernel_name()


def environment() -> dict[str, Any]:
    """Return what a latency depends on beside the model, as JSON values: versions, threads, CPU, GPU, load averages.

    `commit` is that of the checkout which this package runs from, or None, where the version has to do. `load_average`
    holds the system's 1, 5 and 15 minute averages at the time of the call, None where there are none.
    """
    import diffusers

    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "diffusers_pqcad": _package_version(),
        "commit": commit(),
        "python": platform.python_version(),
        "num_threads": torch.get_num_threads(),
        "num_cpus": os.cpu_count(),
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def commit(file: str | Path = __file__) -> str | None:
    """Return the commit of the checkout that tracks `file`, with "-dirty" after local changes, else None."""
    folder = Path(file).parent
    try:
        tracked = _git(folder, "ls-files", "--error-unmatch", str(file))  # not: installed somewhere in a checkout
    except OSError:  # no git
        return None
    if not tracked:
        return None
    return _git(folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*") or None


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True).stdout.strip()


def _package_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("diffusers-pqcad")
    except PackageNotFoundError:  # a source tree on PYTHONPATH
        return "not installed"


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
