"""What does quantizing while loading cost, in time and memory, beside a plain load?

    python examples/benchmarks/load.py --json outputs/load.json

The model has the shape of SD-1.5's UNet (860 M parameters) and random weights. Each contestant loads in processes of
its own, so that its peak memory is its own, and reads all that it loaded once. They take turns, and in a round each
loads twice: from the disk, as the first time after a computer starts, and again, from what the system kept of it in
memory. The disk may have a cache of its own, as those of virtual machines do. Needs 6 GB of disk.
"""

import json
import os
import shutil
import statistics
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import memory
import models
import psutil
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import HfArgumentParser

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.evaluation.speed import environment

PLAIN = "plain load, fp32"
PACKED, UNCHECKED = "W4 saved packed", "W4 saved packed, no checksums"
FROM_PACKED = {PACKED: "W4 fixed", UNCHECKED: UNCHECKED}  # and the folder
CONFIGS: dict[str, dict[str, Any] | None] = {
    PLAIN: None,
    "W4 fixed": {"method": "fixed", "weight_bits": 4},
    "W8 fixed": {"method": "fixed", "weight_bits": 8},
    "W4 on average (default)": {},
    **dict.fromkeys(FROM_PACKED),
}


@dataclass
class Settings(harness.Settings):
    """Settings of one run."""

    model: str = "sd15"  # a conditional one
    num_rounds: int = 3
    directory: str | None = None  # for the model's files; default: a temporary folder
    contestant: str | None = None  # load only this one, here, and print what it took: a child process


def source_of(name: str, directory: Path) -> Path:
    """Return the folder in `directory` that the contestant loads."""
    return directory / FROM_PACKED.get(name, "float")


def load(settings: Settings, name: str, directory: Path) -> dict[str, Any]:
    """Load one contestant in this process, save what it is, the first time; return seconds and bytes."""
    torch.set_num_threads(settings.num_threads)
    source = source_of(name, directory)
    values = CONFIGS[name]
    options = {} if values is None else {"quantization_config": PQCADConfig(**values)}
    before = psutil.Process().memory_info().rss  # PyTorch and its friends
    start = time.perf_counter()
    model = UNet2DConditionModel.from_pretrained(source, **options)
    # Files are mapped into memory: reading every byte once is part of loading them. Bytes of all alike: PyTorch sums
    # small integers by way of large ones, much slower than floats.
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.numel():
            tensor.detach().flatten().view(torch.uint8).max()
    seconds = time.perf_counter() - start
    result = {
        "seconds": seconds,
        "peak_bytes": max(memory.peak_bytes() - before, 1),
        "footprint_bytes": model.get_memory_footprint(),
    }
    saved = directory / ("float" if name == PLAIN else name)
    if not saved.exists():
        model.save_pretrained(saved)
    if name == PACKED and not (directory / UNCHECKED).exists():
        drop_checksums_(shutil.copytree(source, directory / UNCHECKED))
    return result | {"file_bytes": sum(file.stat().st_size for file in saved.glob("*.safetensors"))}


def drop_checksums_(folder: Path) -> None:
    """Make the packed model in `folder` one of format version 1, which has no checksums."""
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor for name, tensor in load_file(path).items() if not name.endswith(".checksum")}
        save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= {"format_version": 1, "quant_method": "pqcad"}
    (folder / "config.json").write_text(json.dumps(config))


def in_a_process(settings: Settings, name: str, directory: Path) -> dict[str, Any]:
    """Return `load` of one contestant, run in a fresh process."""
    flags = {key: getattr(settings, key) for key in ("model", "num_threads", "seed")}
    return harness.in_a_process(__file__, flags | {"contestant": name, "directory": directory})


def leave_memory(directory: Path) -> bool:
    """Have the system forget the files in `directory`, so that they are read from the disk; return whether it can."""
    if not hasattr(os, "posix_fadvise"):  # as on macOS and Windows
        return False
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file)  # what is not on the disk yet stays
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return True


def measure(settings: Settings, directory: Path) -> list[dict[str, Any]]:
    """Return one row per contestant: medians of the seconds, what else a load took, and the largest peak."""
    loads: dict[str, list[dict[str, Any]]] = {name: [] for name in CONFIGS}
    disk_seconds: dict[str, list[float]] = {name: [] for name in CONFIGS}
    for number in range(settings.num_rounds):
        for name in CONFIGS:
            print(f"round {number + 1} of {settings.num_rounds}: {name}", flush=True)
            if leave_memory(source_of(name, directory)):
                disk_seconds[name].append(in_a_process(settings, name, directory)["seconds"])
            loads[name].append(in_a_process(settings, name, directory))
    return [
        {
            **loads[name][-1],
            "name": name,
            "seconds": statistics.median(each["seconds"] for each in loads[name]),
            "disk_seconds": statistics.median(disk_seconds[name]) if disk_seconds[name] else None,
            "peak_bytes": max(each["peak_bytes"] for each in loads[name]),
        }
        for name in CONFIGS
    ]


def benchmark(settings: Settings, directory: Path) -> dict[str, Any]:
    """Return the circumstances of the run and one row per contestant."""
    model = models.build(settings.model, settings.seed)
    model.save_pretrained(directory / "float")
    num_parameters = model.num_parameters()
    del model
    chosen = {name: getattr(settings, name) for name in ("model", "num_threads", "num_rounds", "seed")}
    rows = measure(settings, directory)
    return {"settings": chosen, "environment": environment(), "num_parameters": num_parameters, "contestants": rows}


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as a Markdown table with its circumstances above it."""
    machine, plain, chosen = result["environment"], result["contestants"][0], result["settings"]
    lines = [
        f"Loading {result['num_parameters'] / 1e6:.0f} M parameters, each time in a process of its own: medians of "
        f"{chosen['num_rounds']} interleaved rounds, the largest peak; seed {chosen['seed']}.",
        "",
        f"{machine['cpu']}, {machine['cpu_capability']}, threads: {chosen['num_threads']} of "
        f"{machine['num_cpus']} cores; torch {machine['torch']}, diffusers {machine['diffusers']}.",
        "",
        "| contestant | s from disk | times plain | s from memory | times plain | peak memory MB | of plain "
        "| in memory MB | file MB | times smaller |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["contestants"]:
        seconds = [seconds_beside(row, plain, kind) for kind in ("disk_seconds", "seconds")]
        lines.append(
            f"| {row['name']} | {seconds[0]} | {seconds[1]} "
            f"| {row['peak_bytes'] / 1e6:.0f} | {row['peak_bytes'] / plain['peak_bytes']:.2f} "
            f"| {row['footprint_bytes'] / 1e6:.0f} | {row['file_bytes'] / 1e6:.0f} "
            f"| {plain['file_bytes'] / row['file_bytes']:.2f} |"
        )
    return "\n".join(lines)


def seconds_beside(row: dict[str, Any], plain: dict[str, Any], kind: str) -> str:
    """Return two cells: the seconds of `kind` in `row`, and how many times those of `plain` they are."""
    return "- | -" if row[kind] is None else f"{row[kind]:.2f} | {row[kind] / plain[kind]:.2f}"


def main(settings: Settings) -> dict[str, Any]:
    """Run the benchmark (or one contestant), print its table and write its JSON file."""
    if settings.contestant is not None:
        assert settings.directory is not None, "--contestant is for the child processes of this script"
        result = load(settings, settings.contestant, Path(settings.directory))
        print(json.dumps(result))
        return result
    with tempfile.TemporaryDirectory(dir=settings.directory) as directory:
        return harness.run(partial(benchmark, directory=Path(directory)), markdown, settings)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
