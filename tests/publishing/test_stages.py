"""Specification of a run's plan: what would be done, counted without weights, against what a real run does."""

import functools
import importlib
import json
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import PNDMScheduler
from pipelines import PIPELINES, PROMPTS, SD_BETAS, TOKENS

from diffusers_pqcad.compression.denoiser import named_arguments
from diffusers_pqcad.loading.saved import saved_models
from diffusers_pqcad.numerics.allocation import BitController, stage_budgets
from diffusers_pqcad.publishing.compress import compress
from diffusers_pqcad.publishing.outline import Outline, outline_of
from diffusers_pqcad.publishing.rounds import Round, controller_of, expected_rounds
from diffusers_pqcad.publishing.settings import PRESETS, Settings, settings_of
from diffusers_pqcad.publishing.stages import Stage, quantizing, stages_of_run

module = importlib.import_module("diffusers_pqcad.publishing.compress")
SMALL = PRESETS["smoke"] | {
    "num_threads": 1, "num_images": 2, "num_trajectories": 5, "max_train_steps": 3, "evaluation_steps": 2,
    "reconstruction_iterations": 1, "bit_choices": [8, 4], "height": 16, "width": 16, "guidance_scale": 5.0,
}  # fmt: skip
UNCONDITIONAL = {"height": None, "width": None, "guidance_scale": None}
RUNS: dict[str, dict[str, Any]] = {
    "ddim": UNCONDITIONAL | {
        "modules_to_not_convert": ["down_blocks", "up_blocks"], "num_halvings": 2, "validation_steps": 2,
        "activation_bits": 0, "reconstruction_samples": 70, "rounds_per_stage": 2,
    },
    "sd": {
        "modules_to_not_convert": ["down_blocks", "up_blocks"], "ablations": True, "own_num_inference_steps": 3,
        "only_ablations": ["guidance", "teacher", "width"], "gradient_accumulation_steps": 2, "sampling_batch_size": 4,
    },
    "sd3": {
        "modules_to_not_convert": ["transformer_blocks.1"], "max_sequence_length": TOKENS, "num_halvings": 0,
        "float_steps": [3], "sampling_batch_size": 2, "weight_bits": 4.0,
    },
}  # fmt: skip


class Done(NamedTuple):
    """A run: its settings, its folder, and the rows that its denoiser was called for, of each stage."""

    settings: Settings
    folder: Path
    called: Counter[str]
    trained: Counter[str]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pipelines in folders, of which one has a scheduler that is replaced, and prompts."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in RUNS:
        pipeline: Any = PIPELINES[name].build()
        if name == "sd":
            pipeline.scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1, **SD_BETAS)
        pipeline.save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


def settings_for(teachers: Path, name: str, output: Path, **changes: Any) -> Settings:
    paths: dict[str, Any] = {"pretrained_model_name_or_path": str(teachers / name), "output_dir": str(output)}
    if name != "ddim":
        paths["prompts_file"] = str(teachers / "prompts.txt")
    values = SMALL | paths | RUNS[name] | changes
    return settings_of({key: value for key, value in values.items() if value is not None})


def outline(settings: Settings) -> Outline:
    path = str(settings.run.pretrained_model_name_or_path)
    return outline_of(settings, path, saved_models(path))


@pytest.fixture(scope="module", params=list(RUNS))
def done(request: pytest.FixtureRequest, teachers: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A whole run of each kind of pipeline."""
    name, folder = request.param, tmp_path_factory.mktemp("runs")
    settings = settings_for(teachers, name, folder / "out")
    called: Counter[str] = Counter()
    trained: Counter[str] = Counter()
    current = ["recording"]
    kind: Any = type(getattr(PIPELINES[name].build(), PIPELINES[name].denoiser))
    forward = kind.forward

    @functools.wraps(forward)
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        rows = len(next(iter(named_arguments(self, args, kwargs).values())))
        (trained if torch.is_grad_enabled() else called)[current[0]] += rows
        return forward(self, *args, **kwargs)

    def staged(original: Any, key_at: int | None, key: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            current[0] = key if key_at is None else args[key_at]
            return original(*args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "forward", counted)
        for function, key_at in (("quantized_model", 1), ("distilled_student", 1), ("measured_rows", None)):
            patch.setattr(module, function, staged(getattr(module, function), key_at, "rows"))
        compress(*settings, progress=False)
    return Done(settings, folder / "out", called, trained)


def rounds_of(history: dict[str, Any], controller: BitController, widest: int, budget: float) -> list[Round]:
    """What a history says of the rounds of a PQ."""
    found, budgets = [], stage_budgets(budget, widest)
    for entry in history["rounds"]:
        is_forced = entry["kind"] == "forced"
        measures = controller.over(budgets[entry["stage"]])
        priced = len(controller.movable()) if measures else 0
        found.append(Round(entry["stage"], priced, tuple(move["layer"] for move in entry["moves"]), is_forced))
        controller.bits = dict(entry["bits"])
    return found


def with_real_rounds(stage: Stage, done: Done, found: Outline) -> Stage:
    """A PQ with the rounds that it took."""
    settings = done.settings
    history = json.loads((done.folder / "history.json").read_text())
    weights = {layer: found.model.get_submodule(layer).weight.numel() for layer in history["summary"]["bits"]}
    controller = controller_of(weights, settings.quantization)
    rounds = rounds_of(history, controller, 8, settings.quantization.weight_bits)
    return quantizing(stage.key, "PQ", found, settings.quantization, settings.progressive, rounds)


def test_every_stage_is_counted_as_it_is_run(done: Done) -> None:
    found = outline(done.settings)
    stages = {stage.key: stage for stage in stages_of_run(done.settings, found)}
    assert stages["pq"].is_expected
    stages["pq"] = with_real_rounds(stages["pq"], done, found)
    assert list(stages) == list(done.called)
    for key, stage in stages.items():
        assert (key, stage.evaluations) == (key, done.called[key])
        assert (key, stage.trained_rows) == (key, done.trained[key])
    updates = {key: len(json.loads((done.folder / "state" / f"{key}-log.json").read_text())) for key in done.trained}
    assert all(stages[key].updates == 3 and logged == 2 for key, logged in updates.items())


def test_updates_of_units_are_those_of_the_history(done: Done) -> None:
    history = json.loads((done.folder / "history.json").read_text())
    found = outline(done.settings)
    stage = with_real_rounds(next(s for s in stages_of_run(done.settings, found) if s.key == "pq"), done, found)
    trained = [unit["name"] for unit in history["units"] if unit["name"] != "bias correction"]
    assert [part.unit for part in stage.reconstructions] == trained


def test_rounds_that_are_expected_meet_the_budget_and_end_each_stage() -> None:
    settings = settings_of({"weight_bits": 4.0})
    weights = {f"layer{index}": 100 + index for index in range(60)}
    rounds = expected_rounds(weights, settings.quantization, settings.progressive)
    assert [item.stage for item in rounds if item.is_forced] == [0, 1]
    assert rounds[0].priced == 60
    # As many as the bundled teachers took: those that are planned, up to as many again, and the end of each stage.
    assert all(3 <= len([item for item in rounds if item.stage == stage]) <= 5 for stage in (0, 1))
    assert rounds == expected_rounds(weights, settings.quantization, settings.progressive)
    weight_prices = settings_of({"signal": "weight"})
    assert {item.priced for item in expected_rounds(weights, settings.quantization, weight_prices.progressive)} == {0}
