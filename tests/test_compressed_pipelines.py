"""What PQ and CAD do with whole pipelines: recorded, quantized with data, distilled, saved, loaded and sampled.

Each test is a row of the table in examples/results/pipelines.md, which `python examples/results/update_pipelines.py`
writes from the outcomes and the figures.
"""

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import PIPELINES, Kind, together
from torch import Tensor, nn

from diffusers_pqcad import (
    CalibrationSet,
    DistillConfig,
    PQCADConfig,
    ProgressiveConfig,
    collect_calibration_set,
    convert_,
    distill,
    progressive_quantize,
)
from diffusers_pqcad.compression.denoiser import Stop, pipeline_with, run_tapped
from diffusers_pqcad.compression.distillation import Distillation
from diffusers_pqcad.compression.fake_quant import freeze_, prepare_
from diffusers_pqcad.compression.progressive import trajectory_error
from diffusers_pqcad.compression.reconstruction import ReconstructionConfig
from diffusers_pqcad.compression.recording import TOLERANCE, check_replay
from diffusers_pqcad.compression.sampling import image_generator
from diffusers_pqcad.compression.schedulers import deterministic_scheduler
from diffusers_pqcad.loading.convert import match_modules, with_model_exemptions

NUM_STEPS, NUM_TRAJECTORIES, BITS = 4, 12, 4
TAKEN = {"sd_img2img": 2 * NUM_STEPS}  # asked for: half of them are taken, at strength 0.5
PQ = ProgressiveConfig(
    rounds_per_stage=1,
    price_batch_size=4,
    reconstruction=ReconstructionConfig(iterations=6, batch_size=8),
    reconstruction_samples=16,
)
# With both branches of guidance: what random weights make of a few texts in two says nothing of others in one.
CAD = DistillConfig(
    max_train_steps=16, evaluation_steps=4, train_batch_size=8, step_rate=1e-2, float_rate=3e-3, fold_guidance=False
)
# It cannot be told a student's steps, so what is saved and sampled is the model that PQ leaves.
WITHOUT_STUDENTS = {"wan": "does not take `sigmas`"}

# Loads a folder and samples from it, in a process that has made nothing of what is in there.
LOAD = """
import json, sys
sys.path.insert(0, sys.argv[1])
import torch
from diffusers import DiffusionPipeline
import diffusers_pqcad
from pipelines import PIPELINES
from test_compressed_pipelines import final_states
torch.set_num_threads(1)
kind, folder, out = sys.argv[2:5]
states = final_states(PIPELINES[kind], DiffusionPipeline.from_pretrained(folder), **json.loads(sys.argv[5]))
torch.save(states, out)
"""


def final_states(kind: Kind, pipeline: Any, **arguments: Any) -> Tensor:
    """Return what two images of `pipeline` end in, before anything is decoded."""
    states: list[Tensor] = []

    def keep(step: Any) -> None:
        states[:] = [step.next_state]
        if float(step.timestep) == float(pipeline.scheduler.timesteps[-1]):
            raise Stop

    pipeline.set_progress_bar_config(disable=True)
    generators = [image_generator(7, index) for index in range(2)]
    given = kind.arguments | together(kind.inputs[:2]) | arguments
    run_tapped(pipeline, keep, generator=generators, **given)
    return states[0]


def rounded_to_nearest(model: nn.Module) -> nn.Module:
    """Return a copy of `model` with all layers that PQ would search at BITS, and nothing else done to it."""
    config = with_model_exemptions(model, PQCADConfig(weight_bits=BITS))
    model = copy.deepcopy(model)
    prepare_(model, config, dict.fromkeys(match_modules(model, config), BITS))
    return model


@torch.no_grad()
def calibration_loss(student: nn.Module, calibration: CalibrationSet) -> float:
    """Return CAD's calibration term over eight updates' draws, the same for every student."""
    run = Distillation(student, None, calibration, replace(CAD, teacher="none"))
    return sum(run.losses(student, step, 0)[0].item() for step in range(8))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_from_recording_to_a_student_in_another_process(
    name: str, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    kind = PIPELINES[name]
    pipeline = kind.build()
    pipeline.scheduler, line = deterministic_scheduler(pipeline.scheduler)
    record_property("scheduler", line or "as it is")
    model = getattr(pipeline, kind.denoiser)

    calibration = collect_calibration_set(
        pipeline,
        kind.inputs if any(kind.inputs) else None,
        num_trajectories=NUM_TRAJECTORIES,
        num_inference_steps=TAKEN.get(name, NUM_STEPS),
        seed=1,
        batch_size=5,
        output_dir=tmp_path / "calibration",
        progress=False,
        **kind.arguments,
    )
    assert calibration.num_inference_steps == NUM_STEPS
    record_property("weights", calibration.plan.weights)
    replay_error = check_replay(calibration, model)
    record_property("replay_error", replay_error)
    assert replay_error < TOLERANCE

    def quantized(settings: ProgressiveConfig) -> tuple[nn.Module, Any]:
        copied = copy.deepcopy(model)
        return copied, progressive_quantize(
            copied, calibration, PQCADConfig(weight_bits=BITS), settings, progress=False
        )

    held_out = calibration.split()[1]
    nearest = trajectory_error(rounded_to_nearest(model), held_out, NUM_STEPS)
    student, history = quantized(PQ)
    found = trajectory_error(student, held_out, NUM_STEPS)
    record_property("nearest_error", nearest)
    record_property("pq_error", found)
    assert found < nearest
    assert history.summary["average_bits"] <= BITS
    rounds = [entry for entry in history.rounds if entry["kind"] == "round"]
    assert len(rounds) >= 2
    for entry in rounds:
        assert sum(price > 0 for price in entry["price"].values()) > len(entry["price"]) / 2
    units = [unit for unit in history.units if unit["name"] != "bias correction"]
    lowered = [unit["loss_after"] / unit["loss_before"] for unit in units if unit["accepted"]]
    record_property("units", (len(lowered), len(units)))
    assert len(lowered) > len(units) / 2

    pq = convert_(copy.deepcopy(student))
    teacher = freeze_(copy.deepcopy(student))
    before = calibration_loss(student, calibration)
    *_, last = distill(student, teacher, calibration, CAD)
    after = calibration_loss(student, calibration)
    record_property("calibration_losses", (before, after))
    assert last.best_step > 0
    assert after < before

    if name in WITHOUT_STUDENTS:
        with pytest.raises(ValueError, match=WITHOUT_STUDENTS[name]):
            calibration.student_arguments(pipeline)
        packed, arguments = pq, {"num_inference_steps": NUM_STEPS}
    else:
        packed, arguments = convert_(student), calibration.student_arguments(pipeline)
    record_property("student", WITHOUT_STUDENTS.get(name, "sampled"))
    compressed = pipeline_with(pipeline, packed)
    compressed.save_pretrained(tmp_path / "compressed")
    states = final_states(kind, compressed, **arguments)
    program = [sys.executable, "-c", LOAD, str(Path(__file__).parent), name, str(tmp_path / "compressed")]
    subprocess.run([*program, str(tmp_path / "states.pt"), json.dumps(arguments)], check=True)
    torch.testing.assert_close(torch.load(tmp_path / "states.pt", weights_only=True), states)
    full = final_states(kind, pipeline, num_inference_steps=TAKEN.get(name, NUM_STEPS))
    error = ((states - full).norm() / full.norm()).item()
    record_property("student_error", error)
    assert 0 < error < 1
