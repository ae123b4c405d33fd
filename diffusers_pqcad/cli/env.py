"""`pqcad env`: what a bug report needs of a computer. No token is read, let alone shown."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from diffusers_pqcad import __version__, kernels
from diffusers_pqcad.cli.command import Command, Outcome
from diffusers_pqcad.evaluation.speed import environment
from diffusers_pqcad.kernels import native
from diffusers_pqcad.layers.derived import quantized_type
from diffusers_pqcad.numerics.qparams import WeightSpec

PACKAGES = (
    "torch diffusers transformers accelerate huggingface-hub safetensors datasets tokenizers peft numpy pillow "
    "matplotlib scipy torchmetrics pyyaml"
).split()
# What kernels and threads depend on; nothing else of the environment is looked at.
VARIABLES = (
    "PQCAD_KERNEL PQCAD_CACHE CC CFLAGS OMP_NUM_THREADS MKL_NUM_THREADS ONEDNN_MAX_CPU_ISA ATEN_CPU_CAPABILITY "
    "XDG_CACHE_HOME HF_HUB_OFFLINE CUDA_VISIBLE_DEVICES"
).split()
FEATURES = ("sse4_2", "avx", "f16c", "fma", "avx2", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni",
            "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16")  # fmt: skip


class Kind(NamedTuple):
    """A kind of layer: a float layer of it, the bits of its weights and activations, inputs that share a scale."""

    layer: nn.Module
    bits: int = 4
    activation_bits: int | None = 8
    group_size: int | None = None


def kinds() -> dict[str, Kind]:
    """Return the kinds of layers that kernels tell apart, by what they are called."""
    convolution = nn.Conv2d(64, 64, 3, padding=1)
    return {
        "linear": Kind(nn.Linear(64, 64)),
        "linear, 8-bit weights": Kind(nn.Linear(64, 64), bits=8),
        "linear, scales of 32 inputs": Kind(nn.Linear(64, 64), group_size=32),
        "convolution 3x3": Kind(convolution),
        "convolution 3x3, 8-bit weights": Kind(convolution, bits=8),
        "convolution 1x1": Kind(nn.Conv2d(64, 64, 1)),
        "convolution in groups": Kind(nn.Conv2d(64, 64, 3, groups=64)),
        "convolution, padding that is not of zeros": Kind(nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect")),
        "convolution in three dimensions": Kind(nn.Conv3d(8, 8, 3)),
        "any layer, activations in floating point": Kind(nn.Linear(64, 64), activation_bits=None),
    }


def kernel_of(kind: Kind) -> dict[str, Any]:
    """Return which kernel a kind of layer takes here, and why none that would be faster."""
    quantized = quantized_type(type(kind.layer))
    assert quantized is not None  # of all kinds here
    layer = quantized.from_float(kind.layer, "layer")
    layer.pack_(WeightSpec(kind.bits, kind.group_size), activation_bits=kind.activation_bits)
    operation = layer.operation()
    why_not = {name: refusal.reason for name, refusal in kernels.refusals(operation).items()}
    return {"kernel": kernels.forced() or kernels.fastest(operation), "faster_ones": why_not}


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that matter; None for one that is not installed."""

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {"diffusers-pqcad": __version__} | {name: of(name) for name in PACKAGES}


def cpu_features() -> list[str] | None:
    """Return those of FEATURES that this CPU has; None where no file says it."""
    path = Path("/proc/cpuinfo")
    found = re.search(r"^flags\s*:(.*)$", path.read_text(), re.MULTILINE) if path.exists() else None
    return None if found is None else [name for name in FEATURES if name in found[1].split()]


def compiler() -> dict[str, Any] | None:
    """Return the C compiler and the first line that it says of its version; None without one."""
    program = native.compiler()
    if program is None:
        return None
    said = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout
    return {"path": program, "version": said.partition("\n")[0]}


def cache() -> dict[str, Any]:
    """Return the folder of compiled kernels and what is in it."""
    folder = native.cache_folder()
    files = sorted(folder.glob("*.so")) if folder.is_dir() else []
    return {"folder": str(folder), "files": {path.name: path.stat().st_size for path in files}}


def facts() -> dict[str, Any]:
    """Return all of it, as JSON values."""
    chosen = {name: kernel_of(kind) for name, kind in kinds().items()}  # compiles what is not in the cache yet
    return {
        "packages": package_versions(),
        "platform": platform.platform(),
        "computer": {key: value for key, value in environment().items() if key not in ("torch", "diffusers")}
        | {"cpu_features": cpu_features()},
        "compiler": compiler(),
        "cache": cache(),
        "absent_kernels": {name: why for name, kernel in kernels.KERNELS.items() if (why := kernel.absence())},
        "kernels": chosen,
        "variables": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def text_of(found: dict[str, Any]) -> str:
    """Return the facts as Markdown lists, to be pasted into a report."""
    computer = found["computer"]
    lines = [f"- {name}: {number or 'not installed'}" for name, number in found["packages"].items()]
    lines += [f"- platform: {found['platform']}"]
    lines += [f"- {name}: {_plain(value)}" for name, value in computer.items()]
    lines += [f"- compiler: {_plain(found['compiler'] and ', '.join(found['compiler'].values()))}"]
    files = found["cache"]["files"]
    lines += [f"- cache: {found['cache']['folder']}, {len(files)} compiled, {sum(files.values())} bytes"]
    lines += [f"- {name}={value}" for name, value in found["variables"].items()]
    lines += [f"- no kernel {name}: {why}" for name, why in found["absent_kernels"].items()]
    lines += ["", "Kernels, by kind of layer:"]
    for name, choice in found["kernels"].items():
        reasons = "".join(f"; not {other}: {why}" for other, why in choice["faster_ones"].items())
        lines.append(f"- {name}: {choice['kernel']}{reasons}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    return "none" if value is None else ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def run(settings: None) -> Outcome:
    """Return what a bug report needs."""
    with torch.no_grad():
        found = facts()
    return Outcome(found, text_of(found))


COMMAND = Command(
    name="env",
    summary="what a bug report needs: versions, CPU, kernels and why, compiler, cache",
    description="Say what a bug report needs of this computer: versions, the CPU's features, which kernel each kind "
    "of layer takes and why, the compiler and the cache of compiled kernels. Never tokens.",
    example="pqcad env",
    parts=(),
    settings=lambda values: None,
    run=run,
)
