"""What all benchmarks share: building the contestants, the circumstances of a run, and what is printed and written."""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import models
import torch
import turns
from contestants import CONTESTANTS, FOOTNOTES, PACKAGES, QUICK, STOCK, Contestant

from diffusers_pqcad.compression.checkpoint import write_text
from diffusers_pqcad.compression.extras import missing
from diffusers_pqcad.evaluation.speed import environment
from diffusers_pqcad.kernels import native, onednn

NUM_CALIBRATION_INPUTS = 4


@dataclass
class Settings:
    """Settings that every benchmark has."""

    model: str = "ddpm-cifar10"
    num_threads: int = 1
    seed: int = 0
    json: str | None = None  # file for everything that was measured


@dataclass
class FieldSettings(Settings):
    """Settings of a benchmark in which contestants take turns."""

    contestants: list[str] = field(default_factory=lambda: list(QUICK))  # names or globs


class Field(NamedTuple):
    """The float model, one input, the contestants that run, why others do not, and their seconds to a first output."""

    unet: Any
    inputs: models.Inputs
    contestants: dict[str, Contestant]
    skipped: dict[str, str]
    first_seconds: dict[str, float]


def chosen(patterns: list[str], known: Mapping[str, Any] | None = None) -> list[str]:
    """Return the names of the contestants that match `patterns`, and stock fp32; ValueError where one matches none."""
    known = CONTESTANTS if known is None else known
    unknown = [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in known)]
    if unknown:
        raise ValueError(f"contestants: {unknown} match none of {list(known)}.")
    return [name for name in known if name == STOCK or any(fnmatchcase(name, each) for each in patterns)]


def without_packages(names: list[str]) -> dict[str, str]:
    """Return those of the contestants `names` whose packages are not installed, and say so before anything runs."""
    skipped = {}
    for name in names:
        modules = [each for pattern, needed in PACKAGES.items() if fnmatchcase(name, pattern) for each in needed]
        if absent := missing(*dict.fromkeys(modules)):
            skipped[name] = f"not installed: {', '.join(absent)}"
            print(f'skipped: {name}: {skipped[name]}; pip install -e ".[bench]"', flush=True)
    return skipped


def try_out(name: str, run: Callable[[], Any], skipped: dict[str, str]) -> Any:
    """Return what `run` returns, or `None` with the reason in `skipped`: a peer may fail in any way."""
    try:
        return run()
    except Exception as error:
        if name == STOCK:
            raise
        skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
        print(f"skipped: {name}: {skipped[name]}", flush=True)


def prepare(settings: FieldSettings, batch_size: int, sample_size: int | None = None) -> Field:
    """Return the model of `settings`, an input, and the contestants of `settings` calibrated on others."""
    torch.set_num_threads(settings.num_threads)
    names = chosen(settings.contestants)
    skipped = without_packages(names)
    unet = models.build(settings.model, settings.seed)
    generator = torch.Generator().manual_seed(settings.seed)
    inputs, *calibration = (
        models.draw_inputs(unet, batch_size, sample_size, generator) for _ in range(1 + NUM_CALIBRATION_INPUTS)
    )
    taking_part = Field(unet, inputs, {}, skipped, {})

    def build(name: str) -> Contestant:
        contestant = CONTESTANTS[name](unet, calibration)
        contestant.step(calibration[0])  # what is compiled, is compiled now
        return contestant

    for name in [name for name in names if name not in skipped]:
        print(f"building: {name}", flush=True)
        started = time.perf_counter()
        contestant = try_out(name, partial(build, name), taking_part.skipped)
        if contestant is not None:
            taking_part.contestants[name] = contestant
            taking_part.first_seconds[name] = time.perf_counter() - started
    return taking_part


def in_turns(
    candidates: Mapping[str, Callable[[], turns.Sample]], settings: turns.TurnSettings, skipped: dict[str, str]
) -> dict[str, turns.Kept]:
    """Return the samples of each candidate that has any; of others, `skipped` says why.

    Raises ValueError where that is the first one, which the others are compared with.
    """
    taken = turns.take_turns(candidates, settings)
    first = next(iter(taken))
    for name in [name for name, kept in taken.items() if not kept.samples]:
        reason = f"waited for a core in all of {taken[name].num_waited} samples"
        if name == first:
            raise ValueError(f"{name}: {reason}. Run on idle cores (taskset -c 1), or raise --max_waiting.")
        skipped[name] = reason
        print(f"skipped: {name}: {reason}", flush=True)
    return {name: kept for name, kept in taken.items() if kept.samples}


def kept_entries(kept: turns.Kept) -> dict[str, Any]:
    """Return what a row says of the samples behind it."""
    return {
        "num_waited": kept.num_waited,
        "knows_waiting": all(sample.waited_seconds is not None for sample in kept.samples),
    }


def in_a_process(script: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the last line of JSON that `script` prints in a fresh process with `flags`; RuntimeError if it fails."""
    command = [sys.executable, script]
    command += [f"--{name}={value}" for name, value in flags.items() if value is not None]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise RuntimeError(f"{reason}\n{' '.join(command[1:])}: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def circumstances() -> dict[str, Any]:
    """Return what a time depends on beside the contestant; call it before anything is timed, for the load averages."""
    flags = os.environ.get(native.FLAGS_VARIABLE)
    return environment() | {
        "vnni": onednn.available() and not onednn.saturates(),
        native.FLAGS_VARIABLE: flags,
    }


def settings_of(settings: Settings, *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the settings that belong to a result: not its file, nor those named."""
    return {key: value for key, value in asdict(settings).items() if key not in ("json", *without)}


def result_of(settings: FieldSettings, taking_part: Field, machine: dict[str, Any], **measured: Any) -> dict[str, Any]:
    """Return everything about a run as JSON values."""
    return {
        "settings": settings_of(settings),
        "environment": machine,
        "num_parameters": taking_part.unet.num_parameters(),
        **measured,
        "skipped": taking_part.skipped,
    }


def model_line(result: dict[str, Any]) -> str:
    """Return the model of a run and its batch, to begin a table's caption with."""
    batch = result["settings"].get("batch_size")
    suffix = "" if batch is None else f", batch {batch}"
    return f"UNet {result['settings']['model']}, {result['num_parameters'] / 1e6:.1f} M parameters{suffix}"


def machine_line(machine: dict[str, Any]) -> str:
    """Return the circumstances of a run in one paragraph."""
    load = ", ".join(f"{average:.2f}" for average in machine["load_average"] or ()) or "unknown"
    flags = machine.get(native.FLAGS_VARIABLE)
    suffix = f", {native.FLAGS_VARIABLE}={flags}" if flags else ""
    return (
        f"{machine['cpu']}, {machine['cpu_capability']}, VNNI: {'yes' if machine['vnni'] else 'no'}, threads: "
        f"{machine['num_threads']} of {machine['num_cpus']} cores, load before the run (1, 5, 15 min): {load}; "
        f"torch {machine['torch']}, diffusers {machine['diffusers']}, commit {machine['commit']}{suffix}."
    )


def caption(text: str, result: dict[str, Any]) -> list[str]:
    """Return what stands above a table: `text`, and the circumstances of the run."""
    return [text, "", machine_line(result["environment"]), ""]


def with_footnotes(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the rows of a table, and those that are named below it only: `FOOTNOTES` says which, and beside whom."""
    names = [row["name"] for row in rows]

    def below(name: str) -> bool:
        return any(
            fnmatchcase(name, pattern) and (beside is None or any(fnmatchcase(each, beside) for each in names))
            for pattern, (beside, _) in FOOTNOTES.items()
        )

    return [row for row in rows if not below(row["name"])], [row for row in rows if below(row["name"])]


def footnote_lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line for each of the `rows` that stand below a table, with why."""
    reasons = {
        row["name"]: next(why for pattern, (_, why) in FOOTNOTES.items() if fnmatchcase(row["name"], pattern))
        for row in rows
    }
    return [
        f"\nNot in the table, {reasons[row['name']]}: {row['name']}, {row['median_ms']:.1f} ms "
        f"({row['min_ms']:.1f} to {row['max_ms']:.1f}), {row['ratio']:.2f} times faster, relative error "
        f"{row['relative_error']:.1e}."
        for row in rows
    ]


def skipped_lines(result: dict[str, Any]) -> list[str]:
    """Return who did not take part, and why, for below a table."""
    return [f"\nSkipped: {name} ({reason})." for name, reason in result["skipped"].items()]


def run_in_folder(
    benchmark: Callable[..., dict[str, Any]], markdown: Callable[[dict[str, Any]], str], settings: Any
) -> dict[str, Any]:
    """Return `run` of a benchmark whose files are in the folder `settings.directory`, or in a temporary one."""
    if settings.directory is not None:
        return run(partial(benchmark, directory=Path(settings.directory)), markdown, settings)
    with tempfile.TemporaryDirectory() as directory:
        return run(partial(benchmark, directory=Path(directory)), markdown, settings)


def run(
    benchmark: Callable[[Any], dict[str, Any]], markdown: Callable[[dict[str, Any]], str], settings: Settings
) -> dict[str, Any]:
    """Run `benchmark`, print its table, write its JSON file, and return what was measured."""
    result = benchmark(settings)
    print(markdown(result))
    if settings.json is not None:
        Path(settings.json).parent.mkdir(parents=True, exist_ok=True)
        write_text(settings.json, json.dumps(result, indent=2) + "\n")
    return result
