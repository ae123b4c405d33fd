"""A pipeline's call, from what its user gives: inputs of one image each, and settings that are the same for all."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GIVEN_HERE = ("generator", "num_inference_steps", "output_type", "return_dict")  # arguments of every call

Inputs = list[dict[str, Any]]


def distinct_inputs(inputs: Any) -> Inputs:
    """Return one dictionary of the pipeline's arguments for each of `inputs`.

    `inputs`: prompts or such dictionaries, in any iterable; a text file (`Path`) with a prompt in each line; None for
    an unconditional pipeline, which has one that is empty.
    """
    if isinstance(inputs, str):
        raise ValueError(f"inputs: expected a list of prompts or a Path of a text file, got the text {inputs!r}.")
    if isinstance(inputs, Path):
        inputs = [line.strip() for line in inputs.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [{}] if inputs is None else [{"prompt": x} if isinstance(x, str) else dict(x) for x in inputs]


def inputs_of(inputs: Any, num_trajectories: int | None) -> Inputs:
    """Return one dictionary of the pipeline's arguments for each trajectory, from `inputs` as in `distinct_inputs`.

    `num_trajectories` defaults to one of each input; of more, the inputs start over.
    """
    found = distinct_inputs(inputs)
    if inputs is None and num_trajectories is None:
        raise ValueError("num_trajectories: how many to record? An unconditional pipeline has no inputs that tell.")
    count = len(found) if num_trajectories is None else num_trajectories
    if not found or count < 4:
        raise ValueError(f"expected at least 4 trajectories (2 are held out), got {count} of {len(found)} inputs.")
    return [found[index % len(found)] for index in range(count)]


def call_arguments_of(pipeline: Any, batch: Inputs, common: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of one call of `pipeline` for a `batch` of inputs: lists of what differs between them.

    Texts and images are lists in any case. Raises ValueError for an argument that the pipeline does not take, or that
    not all inputs have.
    """
    accepted = inspect.signature(type(pipeline).__call__).parameters
    names = {name: None for values in batch for name in values}
    for name in GIVEN_HERE:
        if name in names or name in common:
            raise ValueError(f"{name}: it is set for each call (by num_inference_steps, seed, decode); leave it out.")
    for name in names.keys() & common.keys():
        raise ValueError(f"{name}: it is given with the inputs, and for all of them; leave one out.")
    for name in (*names, *common):
        if name not in accepted:
            raise ValueError(f"{name}: {type(pipeline).__name__} does not take it; it takes {sorted(accepted)}.")
    arguments = dict(common)
    for name in names:
        if any(name not in values for values in batch):
            raise ValueError(f"{name}: some inputs have it and some do not; give it to all.")
        values = [values[name] for values in batch]
        is_shared = all(isinstance(v, int | float) and v == values[0] for v in values) and name != "class_labels"
        arguments[name] = values[0] if is_shared else values
    if not names and "batch_size" in accepted:
        arguments["batch_size"] = len(batch)
    return arguments


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Switch the progress bar of `pipeline` off inside the block."""
    before = getattr(pipeline, "_progress_bar_config", {})
    pipeline.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipeline._progress_bar_config = before


def check_positive(**values: int) -> None:
    """Raise ValueError, with its name, for a value below 1."""
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1.")
