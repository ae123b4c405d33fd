"""Are the libraries that a wheel carries as fast as those that this computer's own compiler makes?

    taskset -c 1 python examples/benchmarks/shipped_library.py --num_threads 1 --json outputs/shipped_library.json

The first are for a kind of CPU, the second for this very one. Each computes the same int8 UNet in a process of its
own, and the processes take turns at steps (A B A B). In an editable checkout, which carries none, those for this CPU
are built as for a wheel. Only runs on idle, pinned cores count.
"""

import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import harness
import models
import torch
from torch import Tensor
from transformers import HfArgumentParser

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.evaluation.speed import interleaved_latency
from diffusers_pqcad.kernels import cpu, native
from diffusers_pqcad.kernels.native import variants
from diffusers_pqcad.kernels.x86.library import compiled

COMPILED, SHIPPED = "compiled here", "shipped"
OWN_FLAGS = "-O3"  # in CFLAGS, as any flags are, they ask for a compilation here; these change nothing


@dataclass
class Settings(harness.Settings):
    """Settings of one run."""

    weight_bits: int = 8
    batch_size: int = 2
    num_rounds: int = 15
    warmup_rounds: int = 2


def build_for_this_cpu(folder: Path) -> None:
    """Build in `folder` the library that a wheel has of each C file for this CPU; ValueError where it has none."""
    compiler = native.compiler()
    if compiler is None:
        raise ValueError("this benchmark compares with a C compiler, and none was found.")
    for file, names in variants.LIBRARIES.items():
        name = next((name for name in names if variants.VARIANTS[name].cpu_flags <= cpu.flags()), None)
        if name is None:
            raise ValueError(f"wheels carry nothing for this CPU: the least is {sorted(variants.AVX2.cpu_flags)}.")
        source = variants.CSRC / file
        variants.build_variant(compiler, source, variants.VARIANTS[name], folder / variants.file_name(source, name))


@torch.no_grad()
def serve(connection: Connection, settings: Settings, shipped: Path | None) -> None:
    """Send the library's name and an output, and then a line for each step that is asked for: a child process.

    The library is of the folder `shipped`, or compiled here.
    """
    os.environ[native.FLAGS_VARIABLE] = "" if shipped else OWN_FLAGS
    variants.SHIPPED = shipped or variants.SHIPPED
    torch.set_num_threads(settings.num_threads)
    unet = models.build(settings.model, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    inputs = models.draw_inputs(unet, settings.batch_size, None, generator)
    quantize_(unet, PQCADConfig(method="fixed", weight_bits=settings.weight_bits))
    output = unet(*inputs).sample
    connection.send((Path(compiled()._name).name, output.numpy()))
    while connection.recv():
        unet(*inputs)
        connection.send(True)


@contextmanager
def served(settings: Settings, shipped: Path | None) -> Iterator[Connection]:
    """Yield the connection to a process that runs `serve`."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, settings, shipped))
    process.start()
    there.close()
    try:
        yield here
        here.send(False)
    finally:
        here.close()
        process.join()


def ask(connection: Connection) -> None:
    """Have the process at the other end take a step, and wait for it."""
    connection.send(True)
    connection.recv()


def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances of the run and one row per library."""
    machine = harness.circumstances()
    with ExitStack() as stack:
        folder = variants.SHIPPED
        if not folder.is_dir():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            build_for_this_cpu(folder)
        connections = {
            name: stack.enter_context(served(settings, shipped))
            for name, shipped in ((COMPILED, None), (SHIPPED, folder))
        }
        found = {name: connection.recv() for name, connection in connections.items()}
        steps = {name: partial(ask, connection) for name, connection in connections.items()}
        latencies = interleaved_latency(steps, num_rounds=settings.num_rounds, warmup_rounds=settings.warmup_rounds)
    expected = torch.from_numpy(found[COMPILED][1])
    rows = [
        {
            "name": name,
            "library": library,
            **latencies[name]._asdict(),
            "ratio": latencies[name].median_ms / latencies[COMPILED].median_ms,
            "difference": relative(torch.from_numpy(output), expected),
        }
        for name, (library, output) in found.items()
    ]
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key != "json"},
        "environment": machine | {"num_threads": settings.num_threads},
        "num_parameters": models.build(settings.model, settings.seed).num_parameters(),
        "libraries": rows,
    }


def relative(output: Tensor, expected: Tensor) -> float:
    """Return ||output - expected|| / ||expected||."""
    return ((output - expected).norm() / expected.norm()).item()


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as a Markdown table with its circumstances above it."""
    settings = result["settings"]
    text = (
        f"One step, {harness.model_line(result)}, W{settings['weight_bits']}A8: medians of {settings['num_rounds']} "
        f"interleaved rounds after {settings['warmup_rounds']} to warm up, seed {settings['seed']}."
    )
    lines = [
        *harness.caption(text, result),
        "| library | file | ms | min to max | of the time compiled here | outputs differ by |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["libraries"]:
        lines.append(
            f"| {row['name']} | {row['library']} | {row['median_ms']:.1f} | {row['min_ms']:.1f} to "
            f"{row['max_ms']:.1f} | {row['ratio']:.2f} | {row['difference']:.1e} |"
        )
    return "\n".join(lines)


main = partial(harness.run, benchmark, markdown)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
