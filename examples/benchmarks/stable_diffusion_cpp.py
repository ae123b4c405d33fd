"""stable-diffusion.cpp, where its program `sd-cli` is on the path: from a folder of diffusers to a picture.

It makes one image a process, so that its image is always a first one. What it took, it says itself.
"""

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import memory
import text_to_image
import torch
import turns
from image_contestants import Case

PROGRAM = "sd-cli"
POLL_SECONDS = 0.1
TYPES = {"stable-diffusion.cpp, f16": "f16", "stable-diffusion.cpp, q8_0": "q8_0"}  # of the weights
LOGGED = {
    "load": r"loading tensors completed, taking ([\d.]+)(s| ms)",
    "text": r"get_learned_condition completed, taking ([\d.]+)(s| ms)",
    "denoiser": r"sampling completed, taking ([\d.]+)(s| ms)",
    "vae": r"decode_first_stage completed, taking ([\d.]+)(s| ms)",
    "image": r"generate_image completed in ([\d.]+)(s| ms)",
}


def is_installed() -> bool:
    """Return whether the program is there."""
    return shutil.which(PROGRAM) is not None


def command(case: Case, kind: str, seed: int, output: Path) -> list[str]:
    """Return the command that makes the image of `case`, with weights of type `kind`."""
    options = {
        "-m": case.folder,
        "--type": kind,
        "-p": text_to_image.PROMPT,
        "-W": case.size,
        "-H": case.size,
        "--steps": case.num_inference_steps,
        "--cfg-scale": case.guidance_scale,
        "--sampling-method": "ddim_trailing",
        "-s": seed,
        "-t": torch.get_num_threads(),
        "-o": output,
    }
    if case.vae == "tiny":
        options["--taesd"] = case.folder / text_to_image.TINY_VAE / "diffusion_pytorch_model.safetensors"
    return [PROGRAM, *(str(each) for option in options.items() for each in option)]


def seconds_in(log: str) -> dict[str, float]:
    """Return what the program says that each part took; RuntimeError where it does not say that it made an image."""
    seconds = {}
    for name, pattern in LOGGED.items():
        found = re.findall(pattern, log)
        if found:
            seconds[name] = sum(float(number) / (1000 if unit == " ms" else 1) for number, unit in found)
    if "image" not in seconds:
        raise RuntimeError(f"{PROGRAM}: made no image: {log[-2000:]}")
    return seconds


def sample(case: Case, kind: str, seed: int) -> turns.Sample:
    """Return a row of `image.measure` for one run of the program."""
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory, "log")
        with log.open("w") as file:
            started = time.perf_counter()
            process = subprocess.Popen(
                command(case, kind, seed, Path(directory, "image.png")), stdout=file, stderr=subprocess.STDOUT
            )
            held, peak_bytes, waited = watch(process, log)
            whole = time.perf_counter() - started
        if process.returncode:
            raise RuntimeError(f"{PROGRAM}: exit status {process.returncode}: {log.read_text()[-2000:]}")
        seconds = seconds_in(log.read_text())
    waited_seconds = None if waited is None else sum(waited.values()) / 1e9
    return turns.Sample(whole, waited_seconds, row_of(seconds, whole, held) | {"peak_bytes": peak_bytes})


def watch(process: subprocess.Popen, log: Path) -> tuple[dict[str, Any], int, dict[str, int] | None]:
    """Wait for `process`; return what it held, loaded and stepping, its peak, and how long its threads waited."""
    held: dict[str, Any] = {"load": None, "first step": None, "stepping": None}
    peak_bytes, waited = 0, None
    while process.poll() is None:
        now, waited = memory.resident(process.pid), turns.waited_ns(process.pid) or waited
        peak_bytes = max(peak_bytes, memory.peak_bytes(process.pid))
        text = log.read_text()
        if not re.search(LOGGED["text"], text):
            held["load"] = now or held["load"]
        elif not re.search(LOGGED["denoiser"], text):
            held["stepping"] = memory.larger(held["stepping"], now)
        time.sleep(POLL_SECONDS)
    return held, peak_bytes, waited


def row_of(seconds: dict[str, float], whole: float, held: dict[str, Any]) -> dict[str, Any]:
    """Return the entries that `image.measure` returns; what is not image is loading, as a user waits for it."""
    parts = {name: seconds[name] for name in ("text", "denoiser", "vae") if name in seconds}
    return {
        "load_seconds": whole - seconds["image"],
        "first_seconds": seconds["image"],
        "image_seconds": seconds["image"],
        "parts": parts | {"rest": seconds["image"] - sum(parts.values())},
        "memory": held,
    }
