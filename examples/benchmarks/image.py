"""How long does a user wait from prompt to picture, and what does the process hold?

    taskset -c 1 python examples/benchmarks/image.py --size 512 --json outputs/image-sd15-512.json
    taskset -c 1 python examples/benchmarks/image.py --vae tiny                                 # AutoencoderTiny
    taskset -c 1 python examples/benchmarks/image.py --num_inference_steps 8 --guidance_scale 7.5
    taskset -c 1 python examples/benchmarks/image.py --model sdxl --size 512

The pipelines are diffusers' own, of SD-1.5's or SDXL's shape, with random weights (time does not depend on their
values). Files of all contestants are made once, outside of all times, and each has a trial. Then they take turns, each
time in a fresh process, which loads, makes a first image, one that is timed by parts, and one that shows its memory. A
process whose threads waited for a core is thrown away and counted (`turns.py`). The files stay in `--directory`, where
that is given: about 20 GB for SD-1.5, 60 GB for SDXL.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Any

import harness
import image_contestants
import memory
import numpy as np
import stable_diffusion_cpp
import text_to_image
import torch
import turns
from contestants import STOCK
from image_contestants import CONTESTANTS, TEXTS, Case
from transformers import HfArgumentParser

from diffusers_pqcad.evaluation.speed import Latency

PARTS = ("text", "denoiser", "vae", "rest")
MOMENTS = ("load", "first step", "stepping")
OTHERS = dict.fromkeys(stable_diffusion_cpp.TYPES)  # not of diffusers


@dataclass
class Settings(turns.TurnSettings, harness.Settings):
    """Settings of one run; the defaults are those of a student."""

    model: str = "sd15"  # or sdxl
    size: int = 256  # of the image, in pixels
    num_inference_steps: int = 4
    guidance_scale: float = 1.0  # none
    vae: str = "kl"  # or tiny: AutoencoderTiny
    warmup_rounds: int = 0  # all have had a trial, and a process warms up by its first image
    contestants: list[str] = field(default_factory=lambda: ["*"])  # names or globs
    directory: str | None = None  # for the files of all contestants; default: a temporary folder
    contestant: str | None = None  # only this one, here, and print what it took: a child process
    prepare: bool = False  # make the files of this one


def case_of(settings: Settings, directory: Path) -> Case:
    """Return what is asked for; ValueError for what no pipeline makes."""
    if settings.vae not in text_to_image.VAES:
        raise ValueError(f"vae: expected one of {text_to_image.VAES}, got {settings.vae!r}.")
    if settings.size < 8 or settings.size % 8:
        raise ValueError(f"size: expected a multiple of 8, got {settings.size}.")
    folder = directory / f"{settings.model}-seed{settings.seed}"
    return Case(folder, settings.size, settings.num_inference_steps, settings.guidance_scale, settings.vae)


# In a process of its own


def watch_(pipeline: Any) -> dict[str, float]:
    """Have the parts of `pipeline` add up their seconds, and return these sums."""
    seconds = dict.fromkeys(PARTS[:-1], 0.0)

    def timed(function: Callable[..., Any], part: str) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any, **options: Any) -> Any:
            started = time.perf_counter()
            output = function(*args, **options)
            seconds[part] += time.perf_counter() - started
            return output

        return run

    pipeline.unet.forward = timed(pipeline.unet.forward, "denoiser")
    pipeline.vae.decode = timed(pipeline.vae.decode, "vae")
    for name in TEXTS:
        encoder = getattr(pipeline, name, None)
        if encoder is not None:
            encoder.forward = timed(encoder.forward, "text")
    return seconds


def image_with_memory(
    pipeline: Any, case: Case, seed: int, last_step: int
) -> tuple[turns.Sample, memory.Resident | None]:
    """Return an image's sample, without the time of looking, and the most that was held at steps up to `last_step`."""
    most: memory.Resident | None = None
    looking = 0.0

    def look(pipeline: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal most, looking
        if step <= last_step:
            started = time.perf_counter()
            most = memory.larger(most, memory.resident())
            looking += time.perf_counter() - started
        return {}

    taken = turns.sample(partial(image_contestants.call, pipeline, case, seed, callback_on_step_end=look))
    return taken._replace(seconds=taken.seconds - looking), most


@torch.no_grad()
def measure(settings: Settings, name: str, case: Case) -> dict[str, Any]:
    """Return what one contestant takes and holds, here; its image is left in a file."""
    torch.set_num_threads(settings.num_threads)
    loading = turns.sample(partial(CONTESTANTS[name].load, case))
    pipeline, held = loading.result, {"load": memory.resident()}
    first, held["first step"] = image_with_memory(pipeline, case, settings.seed, last_step=0)
    seconds = watch_(pipeline)
    timed = turns.sample(partial(image_contestants.call, pipeline, case, settings.seed))
    parts = seconds | {"rest": timed.seconds - sum(seconds.values())}
    _, held["stepping"] = image_with_memory(pipeline, case, settings.seed, settings.num_inference_steps)
    np.save(image_file(case, name), timed.result)
    waits = [each.waited_seconds for each in (loading, first, timed)]
    return {
        "load_seconds": loading.seconds,
        "first_seconds": first.seconds,
        "image_seconds": timed.seconds,
        "parts": parts,
        "memory": held,
        "peak_bytes": memory.peak_bytes(),
        "waited_seconds": None if None in waits else sum(filter(None, waits)),
    }


def image_file(case: Case, name: str) -> Path:
    """Return where the image of a contestant is."""
    return case.folder.with_name(f"{case.folder.name}-{case.name()} {name}.npy")


# In the process that is started


def flags_of(settings: Settings, directory: Path, name: str) -> dict[str, Any]:
    """Return the flags of a child process."""
    names = ("model", "num_threads", "seed", "size", "num_inference_steps", "guidance_scale", "vae")
    return {key: getattr(settings, key) for key in names} | {"directory": directory, "contestant": name}


def sample_in_a_process(settings: Settings, directory: Path, name: str) -> turns.Sample:
    """Return what one contestant takes, in a fresh process, or as the program that it is."""
    if name in OTHERS:
        case = case_of(settings, directory)
        return stable_diffusion_cpp.sample(case, stable_diffusion_cpp.TYPES[name], settings.seed)
    row = harness.in_a_process(__file__, flags_of(settings, directory, name))
    seconds = sum(row[key] for key in ("load_seconds", "first_seconds", "image_seconds"))
    return turns.Sample(seconds, row.pop("waited_seconds"), row)


def absent(names: list[str]) -> dict[str, str]:
    """Return those of the contestants `names` that are not installed, and say so."""
    skipped = harness.without_packages([name for name in names if name not in OTHERS])
    for name in names:
        if name in OTHERS and not stable_diffusion_cpp.is_installed():
            skipped[name] = f"not installed: {stable_diffusion_cpp.PROGRAM}"
            print(f"skipped: {name}: {skipped[name]}", flush=True)
    return skipped


def make_files(settings: Settings, directory: Path, names: list[str], skipped: dict[str, str]) -> None:
    """Make the files of all contestants and try each out; those that fail go to `skipped`."""
    case = case_of(settings, directory)
    text_to_image.save(settings.model, case.folder, settings.seed)

    def build(name: str) -> None:
        if name not in OTHERS:
            harness.in_a_process(__file__, flags_of(settings, directory, name) | {"prepare": True})
        sample_in_a_process(settings, directory, name)
        relative_error(case, name)

    for name in names:
        if name not in skipped:
            print(f"building: {name}", flush=True)
            harness.try_out(name, partial(build, name), skipped)


def benchmark(settings: Settings, directory: Path) -> dict[str, Any]:
    """Return the circumstances of the run and one row per contestant."""
    torch.set_num_threads(settings.num_threads)
    case = case_of(settings, directory)
    names = harness.chosen(settings.contestants, CONTESTANTS | OTHERS)
    skipped = absent(names)
    make_files(settings, directory, names, skipped)
    machine = harness.circumstances()
    candidates = {
        name: partial(sample_in_a_process, settings, directory, name) for name in names if name not in skipped
    }
    taken = harness.in_turns(candidates, settings, skipped)
    own = ("contestant", "prepare", "directory")
    rows = [row_of(name, kept, case) for name, kept in taken.items()]
    for row in rows:
        row["ratio"] = rows[0]["median_ms"] / row["median_ms"]
    return {
        "settings": harness.settings_of(settings, without=own),
        "environment": machine,
        "contestants": rows,
        "skipped": skipped,
    }


def row_of(name: str, kept: turns.Kept, case: Case) -> dict[str, Any]:
    """Return the medians of a contestant's processes, and the most that one of them held."""
    runs = [sample.result for sample in kept.samples]

    def middle(values: Any) -> float:
        return statistics.median(values)

    times = tuple(1000 * run["image_seconds"] for run in runs)
    return {
        "name": name,
        **Latency(middle(times), min(times), max(times), times)._asdict(),
        **harness.kept_entries(kept),
        "load_seconds": middle(run["load_seconds"] for run in runs),
        "first_seconds": middle(run["first_seconds"] for run in runs),
        "parts": {part: middle(run["parts"][part] for run in runs) for part in PARTS if part in runs[0]["parts"]},
        "memory": {
            moment: max((run["memory"][moment] for run in runs if run["memory"][moment]), default=None)
            for moment in MOMENTS
        },
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "relative_error": relative_error(case, name),
    }


def relative_error(case: Case, name: str) -> float | None:
    """Return how far a contestant's image is from stock's, None for one from other noise; ValueError if not finite."""
    if name in OTHERS:
        return None
    image, stock = (np.load(image_file(case, each)) for each in (name, STOCK))
    if not np.isfinite(image).all():
        raise ValueError(f"{name}: its image holds a NaN or an infinity: its time means nothing.")
    return float(np.linalg.norm(image - stock) / np.linalg.norm(stock))


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as two Markdown tables, of times and of memory, with the circumstances above them."""
    chosen, rows = result["settings"], result["contestants"]
    vae = {"kl": "AutoencoderKL", "tiny": "AutoencoderTiny"}[chosen["vae"]]
    guidance = f"guidance {chosen['guidance_scale']}" if chosen["guidance_scale"] > 1 else "no guidance"
    text = (
        f"From prompt to picture, {chosen['model']}, {vae}, {chosen['size']}x{chosen['size']}, "
        f"{chosen['num_inference_steps']} steps, {guidance}: seconds, medians of {chosen['num_rounds']} rounds in "
        f"turns, a process for each, after its first image; seed {chosen['seed']}."
    )
    lines = [*harness.caption(text, result), *times_table(rows), "", *memory_table(rows)]
    return "\n".join(lines + turns.waited_line(rows, chosen) + harness.skipped_lines(result))


def times_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of seconds."""
    lines = [
        "| contestant | s an image | min to max | times faster | text | UNet | VAE | rest | load | first | error |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        parts = " | ".join(f"{row['parts'][part]:.2f}" if part in row["parts"] else "-" for part in PARTS)
        error = "-" if row["relative_error"] is None else f"{row['relative_error']:.1e}"
        lines.append(
            f"| {row['name']} | {row['median_ms'] / 1000:.2f} | {row['min_ms'] / 1000:.2f} to "
            f"{row['max_ms'] / 1000:.2f} | {row['ratio']:.2f} | {parts} | {row['load_seconds']:.2f} "
            f"| {row['first_seconds']:.2f} | {error} |"
        )
    return lines


def memory_table(rows: list[dict[str, Any]]) -> list[str]:
    """Return the table of memory."""
    lines = [
        "| resident MB, own + mapped from files | loaded | after the first step | stepping | peak |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [memory.text_of(row["memory"][moment]) for moment in MOMENTS]
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {row['peak_bytes'] / 1e6:.0f} |")
    return lines


def main(settings: Settings) -> dict[str, Any]:
    """Run the benchmark, print its tables and write its JSON file; in a child process, one contestant."""
    if settings.contestant is None:
        return harness.run_in_folder(benchmark, markdown, settings)
    assert settings.directory is not None, "--contestant is for the child processes of this script"
    torch.set_num_threads(settings.num_threads)
    case, name, result = case_of(settings, Path(settings.directory)), settings.contestant, {}
    if settings.prepare:
        with torch.no_grad():
            CONTESTANTS[name].prepare(case)
    else:
        result = measure(settings, name, case)
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
