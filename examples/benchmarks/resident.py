"""What does a process hold in memory while a UNet steps?

    python examples/benchmarks/resident.py --json examples/results/resident.json

The model has the shape of SD-1.5's UNet (860 M parameters) and random weights. Each contestant has a process of its
own, which loads it from its file, as users do, and takes some steps. Bytes do not depend on how busy the computer is.
Needs 7 GB of disk.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import harness
import memory
import models
import torch
from contestants import STOCK
from transformers import HfArgumentParser

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.layers.find import packed_layers

MOMENTS = ("libraries", "load", "first step", "stepping")


class Kind(NamedTuple):
    """A contestant: bits of packed weights, `None` for a float model in `dtype`; whether int8 copies are kept."""

    weight_bits: int | None = None
    dtype: torch.dtype = torch.float32
    keeps_copies: bool = True


CONTESTANTS = {
    STOCK: Kind(),
    "stock diffusers, bf16": Kind(dtype=torch.bfloat16),
    "W8A8": Kind(8),
    "W4A8": Kind(4),
    "W8A8, low memory": Kind(8, keeps_copies=False),
    "W4A8, low memory": Kind(4, keeps_copies=False),
}


@dataclass
class Settings(harness.Settings):
    """Settings of one run."""

    model: str = "sd15"
    batch_size: int = 2  # a guided step
    sample_size: int = 32  # height and width of the latents
    num_steps: int = 4
    contestants: list[str] = field(default_factory=lambda: ["*"])  # names or globs
    directory: str | None = None  # for the models' files; default: a temporary folder
    contestant: str | None = None  # only this one, here, and print what it held: a child process


def folder_of(kind: Kind, directory: Path) -> Path:
    """Return where the model of a contestant is."""
    return directory / (f"W{kind.weight_bits}" if kind.weight_bits else str(kind.dtype).partition(".")[2])


def save(settings: Settings, kind: Kind, directory: Path) -> None:
    """Write the model of a contestant, unless it is there."""
    folder = folder_of(kind, directory)
    if folder.exists():
        return
    unet = models.build(settings.model, settings.seed)
    if kind.weight_bits:
        quantize_(unet, PQCADConfig(method="fixed", weight_bits=kind.weight_bits))
    elif kind.dtype != torch.float32:
        unet.to(kind.dtype)
    unet.save_pretrained(folder)


@torch.no_grad()
def measure(settings: Settings, name: str, directory: Path) -> dict[str, Any]:
    """Return what a contestant holds here: own and mapped bytes at each moment, and the most of all."""
    torch.set_num_threads(settings.num_threads)
    kind, held = CONTESTANTS[name], {"libraries": memory.resident()}
    unet_class: Any = models.SHAPES[settings.model][0]
    unet = unet_class.from_pretrained(folder_of(kind, directory), torch_dtype=kind.dtype)
    for layer in packed_layers(unet).values():
        layer.is_memory_short = not kind.keeps_copies
    held["load"] = memory.resident()
    generator = torch.Generator().manual_seed(settings.seed)
    inputs = models.draw_inputs(unet, settings.batch_size, settings.sample_size, generator)
    inputs = tuple(each.to(kind.dtype) if each.is_floating_point() else each for each in inputs)
    unet(*inputs)
    held["first step"] = held["stepping"] = memory.resident()
    for _ in range(settings.num_steps - 1):
        unet(*inputs)
        held["stepping"] = memory.larger(held["stepping"], memory.resident())
    return {"name": name, "memory": held, "peak_bytes": memory.peak_bytes()}


def benchmark(settings: Settings, directory: Path) -> dict[str, Any]:
    """Return the circumstances of the run and one row per contestant."""
    machine = harness.circumstances()
    names = harness.chosen(settings.contestants, CONTESTANTS)
    names_of_flags = ("model", "num_threads", "seed", "batch_size", "sample_size", "num_steps")
    flags = {key: getattr(settings, key) for key in names_of_flags}
    rows = []
    for name in names:
        print(f"running: {name}", flush=True)
        save(settings, CONTESTANTS[name], directory)
        rows.append(harness.in_a_process(__file__, flags | {"contestant": name, "directory": directory}))
    own = ("contestant", "contestants", "directory")
    return {
        "settings": harness.settings_of(settings, without=own),
        "environment": machine,
        "contestants": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as a Markdown table, with the circumstances above it."""
    chosen = result["settings"]
    text = (
        f"A process that steps the UNet {chosen['model']}, batch {chosen['batch_size']}, "
        f"{chosen['sample_size']}x{chosen['sample_size']} latents: resident MB, own + mapped from files; "
        f"{chosen['num_steps']} steps, seed {chosen['seed']}."
    )
    lines = [
        *harness.caption(text, result),
        "| contestant | libraries | loaded | after the first step | stepping | together | peak |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["contestants"]:
        cells = [memory.text_of(row["memory"][moment]) for moment in MOMENTS]
        stepping = row["memory"]["stepping"]
        together = "-" if stepping is None else f"{sum(stepping) / 1e6:.0f}"
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {together} | {row['peak_bytes'] / 1e6:.0f} |")
    return "\n".join(lines)


def main(settings: Settings) -> dict[str, Any]:
    """Run the benchmark, print its table and write its JSON file; in a child process, one contestant."""
    if settings.contestant is None:
        return harness.run_in_folder(benchmark, markdown, settings)
    assert settings.directory is not None, "--contestant is for the child processes of this script"
    result = measure(settings, settings.contestant, Path(settings.directory))
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
