"""A calibration set that was recorded before a run: whether it is the one that the run itself would record."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers_pqcad.compression.calibration import CalibrationSet, input_text
from diffusers_pqcad.compression.calling import inputs_of
from diffusers_pqcad.publishing.pipelines import call_arguments, check_recording, inputs_of_run
from diffusers_pqcad.publishing.settings import CompressConfig

NOT_GIVEN = "the pipeline's own"


def given_set(teacher: Any, run: CompressConfig, prompts: Sequence[str]) -> CalibrationSet | None:
    """Return the set in the folder that `run` names, None for a run that names none.

    Raises ValueError, naming what differs, unless it was recorded with the `teacher` and its scheduler, called as the
    run calls it: steps, guidance, sizes, number of trajectories, and the inputs that are recorded of the `prompts`.
    Its noise must be other than that of the images that the run measures.
    """
    if run.calibration_set is None:
        return None
    path = Path(run.calibration_set)
    if not path.exists():
        raise ValueError(f"calibration_set: expected a folder that `pqcad calibrate` wrote, got {path}: not found.")
    try:
        calibration = CalibrationSet.load(path)
        check_recording(calibration, teacher, run)
    except (OSError, ValueError) as error:
        raise ValueError(f"calibration_set: {path}: {error}") from error
    others = differences(calibration, run, prompts)
    if others:
        listed = "; ".join(f"{name} {there} there, {here} here" for name, (there, here) in others.items())
        raise ValueError(
            f"calibration_set: {path} is not the set that this run would record: {listed}. Give the flags that it was "
            "recorded with, or record another."
        )
    if calibration.manifest["seed"] == run.seed:
        raise ValueError(
            f"calibration_set: {path} was recorded with the noise of seed {run.seed}, by which this run measures. "
            "Give another seed."
        )
    return calibration


def differences(
    calibration: CalibrationSet, run: CompressConfig, prompts: Sequence[str]
) -> dict[str, tuple[Any, Any]]:
    """Return what differs between a set and the one that `run` would record, by name: the value there, and here."""
    there = json.loads(calibration.manifest.get("call_arguments", "null"))
    if there is None:
        return {"call_arguments": ("not noted, as by an older version,", "noted")}
    here = call_arguments(run)
    pairs = {
        "num_inference_steps": (calibration.asked_steps, run.num_inference_steps),
        "num_trajectories": (len(calibration), run.num_trajectories),
        **{name: (there.get(name, NOT_GIVEN), here.get(name, NOT_GIVEN)) for name in dict.fromkeys([*there, *here])},
    }
    found = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if "num_trajectories" not in found:
        wanted = [input_text(item) for item in inputs_of(inputs_of_run(run, prompts).recorded, run.num_trajectories)]
        count = sum(one != other for one, other in zip(calibration.inputs(), wanted, strict=True))
        if count:
            found["inputs"] = (f"{count} of {len(wanted)} are others", "those of the first prompts or classes")
    return found
