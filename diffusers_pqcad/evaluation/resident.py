"""Resident memory while a pipeline samples, in a process of its own: others keep pages that would be counted, too.

    python -m diffusers_pqcad.evaluation.resident JSON

makes the image of one `Sampling`, and prints what that took.
"""

import gc
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any, NamedTuple

import psutil
import torch
from diffusers import DiffusionPipeline

LOOKS_EVERY_SECONDS = 0.002


@dataclass(frozen=True)
class Sampling:
    """A pipeline that a process loads, and the call by which it makes one image.

    `inputs` and `arguments` are JSON values, as `generate_images` takes them. `lora` is the folder of a LoRA, and
    `loading` what else `from_pretrained` is told, such as a revision.
    """

    path: str
    num_inference_steps: int
    inputs: list[dict[str, Any]] | None
    arguments: dict[str, Any]
    dtype: str = "float32"
    lora: str | None = None
    loading: dict[str, Any] = field(default_factory=dict)
    num_threads: int = 1


class Resident(NamedTuple):
    """Bytes: the most that were resident while an image was made, and those before the pipeline was loaded."""

    peak_bytes: int
    before_bytes: int


def resident_while_sampling(sampling: Sampling) -> Resident:
    """Return what `sampling` takes in a process of its own; RuntimeError, with the reason, where it fails."""
    command = [sys.executable, "-m", __name__, json.dumps(asdict(sampling))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        said = next(iter(done.stderr.strip().splitlines()[-1:]), f"exit code {done.returncode}")
        raise RuntimeError(f"{sampling.path}: no image was made of it in a process of its own: {said}")
    return Resident(**json.loads(done.stdout.splitlines()[-1]))


def resident_here(sampling: Sampling) -> Resident:
    """Return what `sampling` takes in this process, which has held no pipeline before."""
    from diffusers_pqcad.evaluation.generate import generate_images

    torch.set_num_threads(sampling.num_threads)
    import_classes(sampling.path, sampling.loading)
    before = resident_bytes()
    dtype = getattr(torch, sampling.dtype)
    pipeline: Any = DiffusionPipeline.from_pretrained(sampling.path, torch_dtype=dtype, **sampling.loading)
    if sampling.lora is not None:
        pipeline.load_lora_weights(sampling.lora)
    gc.collect()
    peak = peak_bytes_during(
        lambda: generate_images(
            pipeline,
            sampling.inputs,
            num_images=1,
            num_inference_steps=sampling.num_inference_steps,
            seed=0,
            batch_size=1,
            progress=False,
            **sampling.arguments,
        )
    )
    return Resident(peak, before)


def import_classes(path: str, loading: dict[str, Any]) -> None:
    """Import the classes of a pipeline's parts, so that their code is no part of its memory."""
    index = DiffusionPipeline.load_config(path, **{key: loading[key] for key in loading if key != "variant"})
    for library, name in [("diffusers", index["_class_name"]), *(part for part in index.values() if is_part(part))]:
        with suppress(ImportError, AttributeError):  # a class of the pipeline's own; loading it tells
            getattr(import_module(library), name)


def is_part(entry: Any) -> bool:
    """Return whether an entry of a pipeline's index is a component, such as ["diffusers", "UNet2DModel"]."""
    return isinstance(entry, list | tuple) and len(entry) == 2 and all(isinstance(item, str) for item in entry)


def peak_bytes_during(work: Callable[[], Any]) -> int:
    """Return the most bytes that were resident in this process during `work`, looked at every few milliseconds."""
    peak, is_done = resident_bytes(), threading.Event()

    def look() -> None:
        nonlocal peak
        while not is_done.wait(LOOKS_EVERY_SECONDS):
            peak = max(peak, resident_bytes())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        work()
    finally:
        is_done.set()
        thread.join()
    return max(peak, resident_bytes())


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory now."""
    return psutil.Process().memory_info().rss


if __name__ == "__main__":
    # The package above this module, which is imported before it, has registered its format with diffusers.
    print(json.dumps(resident_here(Sampling(**json.loads(sys.argv[1])))._asdict()))
