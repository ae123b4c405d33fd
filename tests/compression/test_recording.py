"""Specification of recording: any pipeline's own steps and conditions, checked by number before they are kept."""

import copy
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch
from datasets import Dataset
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline, StableDiffusionPAGPipeline
from pipelines import PIPELINES, PROMPTS, SQUARE, picture, sd_parts, together
from pyarrow import Table
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.compression import recording
from diffusers_pqcad.compression.calibration import (
    STATE,
    CalibrationSet,
    ColumnShape,
    about_of,
    record_batch,
    write_set,
)
from diffusers_pqcad.compression.checkpoint import model_hash
from diffusers_pqcad.compression.denoiser import (
    Column,
    Denoiser,
    ModelCall,
    StepPlan,
    TappedStep,
    pipeline_with,
    states_of,
)
from diffusers_pqcad.compression.grid import ddim_grid
from diffusers_pqcad.compression.recording import (
    TOLERANCE,
    call_arguments_of,
    check_replay,
    collect_calibration_set,
    distance,
    fitted_weights,
    inputs_of,
)
from diffusers_pqcad.compression.sampling import image_generator
from diffusers_pqcad.compression.schedulers import deterministic_scheduler

# Guidance scale, and the order in which the pipeline asks: without the prompt first, except for some.
SCALES = {kind: PIPELINES[kind].arguments.get("guidance_scale") for kind in PIPELINES}
WEIGHTS = {kind: (1.0,) if scale is None else (1 - scale, scale) for kind, scale in SCALES.items()}
WEIGHTS |= {"flux": (1.0,), "dit": WEIGHTS["dit"][::-1], "wan": WEIGHTS["wan"][::-1]}
BRANCHES = {kind: (len(weights),) for kind, weights in WEIGHTS.items()} | {"wan": (1, 1)}
SD = PIPELINES["sd"]


def pipeline_of(kind: str) -> Any:
    """The pipeline with a scheduler that a grid describes."""
    pipeline = PIPELINES[kind].build()
    pipeline.scheduler = deterministic_scheduler(pipeline.scheduler)[0]
    return pipeline


def steps_of(kind: str, wanted: int) -> int:
    """What to ask for `wanted` steps: half of an image-to-image pipeline's are skipped."""
    return 2 * wanted if kind == "sd_img2img" else wanted


def record(pipeline: Any, inputs: Any = SD.inputs[:4], **changes: Any) -> CalibrationSet:
    settings = {"num_inference_steps": 2, "seed": 0, "progress": False} | SD.arguments
    return collect_calibration_set(pipeline, inputs, **settings | changes)


@pytest.fixture(scope="module")
def recorded(one_thread: None) -> dict[str, CalibrationSet]:
    """What `recorded_set` has recorded. Read only."""
    return {}


def recorded_set(recorded: dict[str, CalibrationSet], kind: str) -> CalibrationSet:
    """4 trajectories of 4 steps of a kind, 3 and 1 at a time."""
    if kind not in recorded:
        has_inputs = any(PIPELINES[kind].inputs)
        recorded[kind] = collect_calibration_set(
            pipeline_of(kind),
            PIPELINES[kind].inputs[:4] if has_inputs else None,
            num_trajectories=4,
            num_inference_steps=steps_of(kind, 4),
            seed=7,
            batch_size=3,
            progress=False,
            **PIPELINES[kind].arguments,
        )
    return recorded[kind]


def seen_states(pipeline: Any, kind: str, count: int) -> Tensor:
    """The states of a direct call, (count, 5, *S), in the way that a user would look at them."""
    states: list[Tensor] = []

    def on_step_end(_: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        states.append(values["latents"].clone())
        return {}

    model, first = getattr(pipeline, PIPELINES[kind].denoiser), []
    name = next(iter(inspect.signature(model.forward).parameters))
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: first.append((args[0] if args else kwargs[name])[:count].clone()), with_kwargs=True
    )
    pipeline(
        **together(PIPELINES[kind].inputs[:count]) | PIPELINES[kind].arguments,
        num_inference_steps=steps_of(kind, 4),
        generator=[image_generator(7, index) for index in range(count)],
        output_type="latent",
        callback_on_step_end=on_step_end,
    )
    hook.remove()
    return torch.stack([first[0], *states], dim=1)


# Every kind of pipeline


@pytest.mark.parametrize("kind", PIPELINES)
def test_every_kind_of_pipeline_is_recorded(recorded: dict[str, CalibrationSet], kind: str) -> None:
    calibration, pipeline = recorded_set(recorded, kind), pipeline_of(kind)
    model = getattr(pipeline, PIPELINES[kind].denoiser)
    assert (len(calibration), calibration.num_inference_steps) == (4, 4)
    assert calibration.plan.weights == WEIGHTS[kind]
    assert calibration.plan.branches == BRANCHES[kind]
    assert calibration.trajectory.isfinite().all()
    assert check_replay(calibration, model) < TOLERANCE
    calibration.check(model, pipeline.scheduler)
    for step in range(4):  # all outputs and states, not only those that recording looks at
        calls = calibration.calls(torch.arange(4), torch.full((4,), step))
        with torch.no_grad():
            output = calibration.denoiser(model)(calls.state, calls.timestep, calls.condition)
        assert distance(output, calls.output) < TOLERANCE
        assert torch.equal(output.isfinite(), torch.ones_like(output, dtype=torch.bool))
    assert calibration.varies == (kind == "sd_controlnet")


@pytest.mark.parametrize("kind", PIPELINES)
def test_its_trajectories_are_sampled_again_by_the_grid(recorded: dict[str, CalibrationSet], kind: str) -> None:
    calibration, pipeline = recorded_set(recorded, kind), pipeline_of(kind)
    model = getattr(pipeline, PIPELINES[kind].denoiser)
    reference = calibration.trajectory
    states = states_of(calibration.denoiser(model), calibration.grid(), reference[:, 0], calibration.condition_at())
    torch.testing.assert_close(torch.stack(states, dim=1), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [kind for kind in PIPELINES if kind not in ("ddim", "ddpm", "dit", "pixart")])
def test_recorded_states_are_those_of_a_direct_call(recorded: dict[str, CalibrationSet], kind: str) -> None:
    assert "callback_on_step_end" in inspect.signature(type(pipeline_of(kind)).__call__).parameters
    wanted = seen_states(pipeline_of(kind), kind, 4)
    assert distance(recorded_set(recorded, kind).trajectory, wanted) < TOLERANCE


@pytest.mark.parametrize("kind", ["ddim", "dit"])
def test_recorded_ends_become_the_images_of_a_direct_call(recorded: dict[str, CalibrationSet], kind: str) -> None:
    """Those have no callback."""
    pipeline = pipeline_of(kind)
    wanted = pipeline(
        **together(PIPELINES[kind].inputs[:4]) | PIPELINES[kind].arguments,
        num_inference_steps=4,
        generator=[image_generator(7, index) for index in range(4)],
        output_type="np",
    ).images
    ends = recorded_set(recorded, kind).trajectory[:, -1]
    if kind == "dit":
        with torch.no_grad():
            ends = pipeline.vae.decode(ends / pipeline.vae.config.scaling_factor).sample
    images = (ends / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    np.testing.assert_allclose(images, wanted, rtol=0, atol=1e-4)


def test_wrong_weights_do_not_replay(recorded: dict[str, CalibrationSet]) -> None:
    calibration, model = recorded_set(recorded, "sd"), pipeline_of("sd").unet
    plan = calibration.plan
    calls = calibration.calls(torch.arange(4), torch.arange(4))
    swapped = Denoiser(model, StepPlan(plan.state_name, plan.branches, plan.weights[::-1], plan.arguments))
    with torch.no_grad():
        assert distance(swapped(calls.state, calls.timestep, calls.condition), calls.output) > 1e-2
    other = copy.deepcopy(model)
    nn.init.normal_(other.conv_out.bias)
    with pytest.raises(ValueError, match="UNet2DConditionModel: called again with what was recorded, its outputs are"):
        check_replay(calibration, other)


def test_what_differs_between_images_is_kept_and_what_does_not_is_shared() -> None:
    calibration = record(pipeline_of("sdxl"), PIPELINES["sdxl"].inputs[:4])
    (template,) = calibration.plan.arguments
    assert template["encoder_hidden_states"] == Column("encoder_hidden_states", 2)
    assert template["added_cond_kwargs"]["text_embeds"] == Column("added_cond_kwargs.text_embeds", 2)
    shapes = {name: column.shape for name, column in calibration.columns.items()}
    assert shapes == {
        "state": (3, 4, 8, 8),
        "output": (2, 4, 8, 8),
        "encoder_hidden_states": (2, 16, 16),
        "added_cond_kwargs.text_embeds": (2, 8),
        "added_cond_kwargs.time_ids": (2, 6),
    }
    condition = calibration.condition(torch.tensor([2, 0]), torch.tensor([0, 1]))
    wanted = pipeline_of("sdxl").encode_prompt(prompt=[PROMPTS[2], PROMPTS[0]], device="cpu")[0]
    torch.testing.assert_close(condition["encoder_hidden_states"][:, 1], wanted)


def test_a_condition_of_each_step_is_that_of_the_step(recorded: dict[str, CalibrationSet]) -> None:
    """A ControlNet's residuals follow the state."""
    calibration, pipeline = recorded_set(recorded, "sd_controlnet"), pipeline_of("sd_controlnet")
    name = "mid_block_additional_residual"
    column, rows = calibration.columns[name], torch.tensor([3, 1])
    assert column.per_step
    assert column.shape[0] == 4
    assert not calibration.columns["encoder_hidden_states"].per_step
    seen: list[Tensor] = []
    pipeline.unet.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs[name].unflatten(0, (2, 4)).transpose(0, 1)), with_kwargs=True
    )
    kind = PIPELINES["sd_controlnet"]
    generators = [image_generator(7, index) for index in range(4)]
    pipeline(**together(kind.inputs[:4]) | kind.arguments, num_inference_steps=4, generator=generators)
    for step, residual in enumerate(seen):
        found = calibration.condition(rows, torch.full((2,), step))[name]
        torch.testing.assert_close(found, residual[rows], rtol=1e-4, atol=1e-5)
    mixed = calibration.condition(rows, torch.tensor([0, 2]))[name]
    torch.testing.assert_close(mixed, torch.stack([seen[0][3], seen[2][1]]), rtol=1e-4, atol=1e-5)
    at = calibration.condition_at(2)
    torch.testing.assert_close(at(1)[name], seen[2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "wan", "dit"])
def test_the_batch_size_is_rounding(recorded: dict[str, CalibrationSet], kind: str) -> None:
    one = recorded_set(recorded, kind)
    other = collect_calibration_set(
        pipeline_of(kind), PIPELINES[kind].inputs[:4], num_inference_steps=4, seed=7, batch_size=4, progress=False,
        **PIPELINES[kind].arguments,
    )  # fmt: skip
    assert torch.equal(one.trajectory[:, 0], other.trajectory[:, 0])
    torch.testing.assert_close(one.trajectory, other.trajectory, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(one.model_output, other.model_output, rtol=1e-4, atol=1e-4)
    assert one.plan.weights == other.plan.weights
    rows = torch.arange(4)
    for name, values in one.condition(rows, rows).items():
        torch.testing.assert_close(values, other.condition(rows, rows)[name], rtol=1e-5, atol=1e-5)


def test_a_pipeline_is_left_as_it_was() -> None:
    pipeline = pipeline_of("sd")
    before = model_hash(pipeline.unet)
    record(pipeline)
    assert model_hash(pipeline.unet) == before
    assert not any(module._forward_hooks for module in pipeline.unet.modules())
    assert "step" not in vars(pipeline.scheduler)
    assert pipeline._progress_bar_config == {"disable": True}


def test_inputs_start_over_with_other_noise(recorded: dict[str, CalibrationSet]) -> None:
    calibration = record(pipeline_of("sd"), list(PROMPTS[:2]), num_trajectories=5)
    assert calibration.inputs() == [json.dumps({"prompt": PROMPTS[index % 2]}) for index in range(5)]
    assert len(calibration.trajectory[:, 0].flatten(1).unique(dim=0)) == 5
    assert calibration.columns["encoder_hidden_states"].shape == (2, 16, 8)


def test_inputs_are_lists_data_sets_and_files(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("red cat\n\n  a river \nred cat\nnight\n")
    wanted = [{"prompt": prompt} for prompt in ("red cat", "a river", "red cat", "night")]
    prompts = [item["prompt"] for item in wanted]
    assert inputs_of(tmp_path / "prompts.txt", None) == wanted
    assert inputs_of(prompts, None) == inputs_of(wanted, None) == wanted
    assert inputs_of(Dataset.from_dict({"prompt": prompts})["prompt"], None) == wanted
    assert inputs_of(Dataset.from_dict({"prompt": prompts}), None) == wanted
    assert inputs_of(iter(prompts), 6) == [*wanted, *wanted[:2]]
    assert inputs_of(None, 4) == [{}] * 4


def test_arguments_of_a_call_are_lists_of_what_belongs_to_images() -> None:
    pipeline = PIPELINES["sd"].build()
    batch = [{"prompt": "a", "guidance_scale": 5.0}, {"prompt": "a", "guidance_scale": 5.0}]
    found = call_arguments_of(pipeline, batch, {"height": 16})
    assert found == {"prompt": ["a", "a"], "guidance_scale": 5.0, "height": 16}
    dit = call_arguments_of(PIPELINES["dit"].build(), [{"class_labels": 3}] * 2, {})
    assert dit == {"class_labels": [3, 3]}
    assert call_arguments_of(PIPELINES["ddim"].build(), [{}] * 3, {}) == {"batch_size": 3}


def test_the_manifest_tells_what_was_recorded(recorded: dict[str, CalibrationSet]) -> None:
    manifest, pipeline = recorded_set(recorded, "sd3").manifest, pipeline_of("sd3")
    assert manifest["model_hash"] == model_hash(pipeline.transformer)
    assert (manifest["component"], manifest["model_class"]) == ("transformer", "SD3Transformer2DModel")
    assert manifest["pipeline_class"] == "StableDiffusion3Pipeline"
    assert manifest["scheduler_class"] == "FlowMatchEulerDiscreteScheduler"
    assert manifest["scheduler"]["shift"] == 3.0
    assert manifest["seed"] == 7
    assert json.loads(manifest["call_arguments"])["guidance_scale"] == 4.0
    assert json.loads(json.dumps(manifest)) == manifest
    others = recorded_set(recorded, "sd").manifest
    assert others["inputs_sha256"] == manifest["inputs_sha256"]  # the same texts
    assert recorded_set(recorded, "sd_img2img").manifest["inputs_sha256"] != manifest["inputs_sha256"]


def test_pictures_are_told_apart_by_their_hash(recorded: dict[str, CalibrationSet]) -> None:
    texts = recorded_set(recorded, "sd_img2img").inputs()
    assert len(set(texts)) == 4
    assert all(set(json.loads(text)) == {"prompt", "negative_prompt", "image"} for text in texts)
    assert all(len(json.loads(text)["image"]["sha256"]) == 64 for text in texts)


# What is refused


@pytest.mark.parametrize(
    ("inputs", "changes", "message"),
    [
        ("a text", {}, "inputs: expected a list of prompts or a Path of a text file, got the text 'a text'"),
        (["a", "b", "c"], {}, "expected at least 4 trajectories"),
        ([], {"num_trajectories": 4}, "expected at least 4 trajectories .*, got 4 of 0 inputs"),
        (["a"] * 4, {"num_trajectories": 3}, "expected at least 4 trajectories"),
        (None, {}, "num_trajectories: how many to record"),
        (["a"] * 4, {"guidance": 3.0}, "guidance: StableDiffusionPipeline does not take it; .*guidance_scale"),
        ([{"promt": "a"}] * 4, {}, "promt: StableDiffusionPipeline does not take it"),
        ([{"prompt": "a", "eta": 0.0}, *[{"prompt": "a"}] * 3], {}, "eta: some inputs have it and some do not"),
        (["a"] * 4, {"guidance_rescale": 0.7}, r"does not combine its 2 branches in a weighted sum: .* misses .* by"),
        (["a", "b", "c", "d"], {"eta": 1.0}, r"step \d: the scheduler's next state .*no added noise \(eta=0\)"),
        (["a"] * 4, {"num_inference_steps": 3}, "must divide num_train_timesteps"),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_refused(inputs: Any, changes: dict[str, Any], message: str) -> None:
    pipeline = PIPELINES["sd"].build()
    with pytest.raises(ValueError, match=message):
        record(pipeline, inputs, **changes)
    assert "step" not in vars(pipeline.scheduler)
    assert not any(module._forward_hooks for module in pipeline.unet.modules())


def test_clipped_steps_are_refused() -> None:
    pipeline = PIPELINES["sd"].build()
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=True, clip_sample_range=0.1)
    with pytest.raises(ValueError, match=r"step \d: the scheduler's next state is .*clip_sample=False"):
        record(pipeline)


def test_schedulers_without_a_grid_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a DDIMScheduler or a FlowMatchEulerDiscreteScheduler, got Euler"):
        record(PIPELINES["sdxl"].build())


def test_quantized_models_and_half_precision_are_refused() -> None:
    pipeline = PIPELINES["sd"].build()
    quantized = PIPELINES["sd"].build()
    quantize_(quantized.unet, PQCADConfig(method="fixed", weight_bits=4))
    with pytest.raises(ValueError, match="full-precision model, but this one is quantized"):
        record(quantized)
    pipeline.unet.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"expected a model in float32, got \['torch.bfloat16'\]"):
        record(pipeline)


def test_dropout_is_refused_by_what_it_changes() -> None:
    pipeline = PIPELINES["ddim"].build()
    pipeline.unet = families.unet()
    for module in pipeline.unet.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    pipeline.unet.train()
    with pytest.raises(ValueError, match="UNet2DModel: called again with what was recorded.*dropout"):
        collect_calibration_set(pipeline, num_trajectories=4, num_inference_steps=2, seed=0, progress=False)


def test_prompts_of_other_shapes_are_refused_by_name() -> None:
    pipeline = PIPELINES["sd"].build()
    embeds = [{"prompt_embeds": torch.randn(length, 8)} for length in (16, 16, 16, 12)]
    arguments = SQUARE | {"guidance_scale": 1.0}

    class OneByOne(type(pipeline)):  # type: ignore[misc]
        """Takes a list of embeddings, as pipelines of newer models do."""

        def __call__(self, prompt_embeds: list[Tensor], **arguments: Any) -> Any:
            return super().__call__(prompt_embeds=torch.stack(prompt_embeds), **arguments)

    for name in inspect.signature(type(pipeline).__call__).parameters:
        OneByOne.__call__.__annotations__.setdefault(name, None)
    OneByOne.__call__.__signature__ = inspect.signature(type(pipeline).__call__)  # type: ignore[attr-defined]
    pipeline.__class__ = OneByOne
    with pytest.raises(ValueError, match=r"encoder_hidden_states: expected shape \(1, 16, 8\).*got \(1, 12, 8\)"):
        collect_calibration_set(
            pipeline, embeds, num_inference_steps=2, seed=0, batch_size=1, progress=False, **arguments
        )


def test_in_painting_is_refused_so_far() -> None:
    parts = sd_parts() | {"unet": type(families.sd15()).from_config(families.sd15().config, in_channels=9)}
    torch.manual_seed(0)
    pipeline = StableDiffusionInpaintPipeline(**parts)
    inputs = [{"prompt": prompt, "image": picture(0), "mask_image": picture(1)} for prompt in PROMPTS[:4]]
    with pytest.raises(ValueError, match="sample: the denoiser is called with another tensor.*in-painting"):
        record(pipeline, inputs)


def test_weights_are_fitted_and_rounded(recorded: dict[str, CalibrationSet]) -> None:
    torch.manual_seed(3)
    steps, weights = [], torch.tensor([-6.25, 7.5, -0.25])
    for _ in range(2):
        first, second = torch.randn(4, 6, 8, 8), torch.randn(2, 6, 8, 8)  # the last channels are a variance
        parts = torch.stack([*first[:, :3].chunk(2), second[:, :3]])
        output = torch.tensordot(weights, parts, dims=1)
        calls = [ModelCall({}, first), ModelCall({}, second)]
        steps.append(TappedStep(calls, 1, torch.randn(2, 3, 8, 8), output, torch.randn(2, 3, 8, 8)))
    assert fitted_weights(StepPlan(branches=(2, 1)), steps, 2) == ((-6.25, 7.5, -0.25), True)
    assert fitted_weights(StepPlan(), steps, 2) == ((1.0,), True)
    alike = [step._replace(calls=[ModelCall({}, step.calls[0].output[:2].repeat(2, 1, 1, 1))]) for step in steps]
    assert fitted_weights(StepPlan(branches=(2,)), alike, 2)[1] is False


# On disk, in parts, on the Hub


@pytest.mark.parametrize("kind", ["sd", "sd_controlnet", "flux"])
def test_a_set_written_as_it_comes_is_the_same_set(
    recorded: dict[str, CalibrationSet], kind: str, tmp_path: Path
) -> None:
    one = recorded_set(recorded, kind)
    written = collect_calibration_set(
        pipeline_of(kind), PIPELINES[kind].inputs[:4], num_inference_steps=4, seed=7, batch_size=3, progress=False,
        output_dir=tmp_path / "set", **PIPELINES[kind].arguments,
    )  # fmt: skip
    for other in (written, CalibrationSet.load(tmp_path / "set")):
        assert [len(chunk) for chunk in other.dataset.data["state"].chunks] == [3, 1]
        assert torch.equal(other.trajectory, one.trajectory)
        assert torch.equal(other.model_output, one.model_output)
        assert torch.equal(other.timestep, one.timestep)
        assert other.timestep.dtype == one.timestep.dtype
        assert (other.columns, other.manifest, other.inputs()) == (one.columns, one.manifest, one.inputs())
        rows = torch.arange(4)
        wanted, found = one.condition(rows, rows), other.condition(rows, rows)
        assert wanted.keys() == found.keys()
        assert all(torch.equal(found[name], values) for name, values in wanted.items())
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["calibration.safetensors", "data.arrow"]
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_conditions_of_all_dtypes_come_back_in_theirs() -> None:
    values = {
        "mask": torch.tensor([[True, False], [False, False]]),
        "half": torch.tensor([[1.5, 2.5], [1 / 3, 3]], dtype=torch.bfloat16),
        "fp16": torch.tensor([[1.5, 1 / 3], [1 / 3, 3]], dtype=torch.float16),
        "ids": torch.tensor([[2**40, 1], [0, -1]]),
    }
    state = {"state": torch.randn(2, 3, 4), "output": torch.randn(2, 2, 4)}
    columns = {name: ColumnShape(tuple(x.shape[1:]), x.dtype) for name, x in (state | values).items()}
    table = Table.from_batches([record_batch(columns, state | values, ["{}", "{}"])])
    grid = ddim_grid(DDIMScheduler(timestep_spacing="trailing", clip_sample=False), 2)
    calibration = CalibrationSet(Dataset(table), columns, grid, StepPlan(), {})
    found = calibration.condition(torch.arange(2), torch.zeros(2, dtype=torch.long))
    for name, wanted in values.items():
        assert found[name].dtype == wanted.dtype, name
        assert torch.equal(found[name], wanted), name


@pytest.mark.parametrize(("prompts", "each"), [(8, 1), (8, 2), (4, 3), (3, 5)])
def test_no_prompt_is_on_both_sides(recorded: dict[str, CalibrationSet], prompts: int, each: int) -> None:
    inputs = [{"prompt": PROMPTS[index]} for index in range(prompts)]
    calibration = record(pipeline_of("sd"), inputs, num_trajectories=prompts * each, num_inference_steps=2)
    train, held_out = calibration.split()
    assert len(train) + len(held_out) == len(calibration)
    assert len(held_out) >= max(2, round(len(calibration) / 8))
    assert not set(train.inputs()) & set(held_out.inputs())
    last = math.ceil(max(2, round(len(calibration) / 8)) / each)
    assert set(held_out.inputs()) == {json.dumps(text) for text in inputs[-last:]}
    assert sorted([*train.rows, *held_out.rows]) == list(range(len(calibration)))


def test_too_few_prompts_to_hold_any_out_are_refused() -> None:
    calibration = record(pipeline_of("sd"), [{"prompt": "a"}, {"prompt": "b"}], num_trajectories=4)
    train, held_out = calibration.split()
    assert (len(train), len(held_out)) == (2, 2)
    few = calibration.select([0, 1, 3, 3])
    with pytest.raises(ValueError, match="4 trajectories of 2 inputs leave 1. Record more inputs"):
        few.split()
    same = calibration.select([0, 2, 0, 2])  # one prompt: told apart by their noise
    assert [len(side) for side in same.split()] == [2, 2]


MEASURE = """
import sys, torch
from diffusers_pqcad.compression.calibration import CalibrationSet
def resident():
    lines = dict(line.split(":") for line in open("/proc/self/status").read().splitlines())
    return int(lines["VmRSS"].split()[0]) * 1024
data = CalibrationSet.load(sys.argv[1])
data.draw(4, 999)
before = resident()
for seed in range(60):
    data.draw(16, seed)
print(resident() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to measure memory")
def test_drawing_from_a_set_on_disk_leaves_none_of_it_in_memory(
    tmp_path: Path, tiny_calibration_set: CalibrationSet
) -> None:
    columns = {name: ColumnShape((count, 4, 128, 128), torch.float32) for name, count in ((STATE, 5), ("output", 4))}
    size = 4 * 9 * 4 * 128 * 128

    def batches() -> Any:
        for index in range(200_000_000 // size // 4 + 1):
            values = {name: torch.full((4, *column.shape), float(index)) for name, column in columns.items()}
            yield record_batch(columns, values, ["{}"] * 4)

    grid, plan = tiny_calibration_set.grid(), tiny_calibration_set.plan
    write_set(tmp_path / "set", batches(), lambda: about_of(columns, grid, plan, {}))
    assert (tmp_path / "set" / "data.arrow").stat().st_size > 200_000_000
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "set")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, env=dict(os.environ)).stdout)
    assert grown < 50_000_000  # the 960 draws see all of it


# What would have gone wrong without a word


def test_states_that_change_between_steps_are_refused() -> None:
    parts = sd_parts()
    pipeline = StableDiffusionInpaintPipeline(**parts)
    mask = np.zeros((SQUARE["height"], SQUARE["width"], 1), dtype=np.float32)
    mask[:, 4:] = 1
    inputs = [item | {"image": picture(i), "mask_image": mask} for i, item in enumerate(SD.inputs[:4])]
    with pytest.raises(ValueError, match="step 1: it starts from another state"):
        record(pipeline, inputs)


def test_a_folder_of_something_else_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ValueError, match="is no calibration set's folder"):
        record(pipeline_of("sd"), output_dir=tmp_path)
    with pytest.raises(ValueError, match="is no calibration set's folder"):
        record(pipeline_of("sd")).save(tmp_path)
    assert (tmp_path / "thesis.tex").read_text() == "precious"
    record(pipeline_of("sd")).save(tmp_path / "set")
    record(pipeline_of("sd"), seed=1).save(tmp_path / "set")  # a set takes the place of a set
    assert CalibrationSet.load(tmp_path / "set").manifest["seed"] == 1


def test_what_cannot_be_replayed_is_not_recorded_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = pipeline_of("sd")
    monkeypatch.setattr(recording, "TOLERANCE", 1e-9)
    with pytest.raises(ValueError, match=r"called again with what was recorded|weighted sum|deterministic formula"):
        record(pipeline, output_dir=tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_a_file_of_other_rows_is_refused(tmp_path: Path) -> None:
    for seed in (0, 1):
        record(pipeline_of("sd"), seed=seed).save(tmp_path / str(seed))
    shutil.copy(tmp_path / "0" / "data.arrow", tmp_path / "1" / "data.arrow")
    with pytest.raises(ValueError, match="damaged, or not the one that was written with"):
        CalibrationSet.load(tmp_path / "1")


def test_settings_of_a_pipeline_that_are_no_components_stay() -> None:
    pipeline = PIPELINES["sdxl"].build()
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    model = copy.deepcopy(pipeline.unet)
    other = pipeline_with(pipeline, model)
    assert other.unet is model
    assert pipeline.unet is not model
    assert other.config.force_zeros_for_empty_prompt is False
    assert other.text_encoder is pipeline.text_encoder


def test_attention_processors_and_the_scheduler_are_those_of_before() -> None:
    pipeline = StableDiffusionPAGPipeline(**sd_parts(), pag_applied_layers=["mid"])
    kinds = {name: type(processor) for name, processor in pipeline.unet.attn_processors.items()}
    with pytest.raises(
        ValueError, match="a step makes|another tensor|weighted sum|called again"
    ):  # what perturbed attention does is no argument of the denoiser
        record(pipeline, pag_scale=2.0)
    assert {name: type(processor) for name, processor in pipeline.unet.attn_processors.items()} == kinds
    pipeline = pipeline_of("sd")
    before = dict(vars(pipeline.scheduler))
    record(pipeline)
    assert vars(pipeline.scheduler).keys() == before.keys()
    assert all(vars(pipeline.scheduler)[name] is value for name, value in before.items())


def test_weights_wait_for_a_batch_that_tells_them() -> None:
    inputs = [{"prompt": "", "negative_prompt": ""}, *SD.inputs[:3]]
    calibration = record(pipeline_of("sd"), inputs, batch_size=1)
    assert calibration.plan.weights == WEIGHTS["sd"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"generator": None}, "generator: it is set for each call"),
        ({"prompt": "a cat"}, "prompt: it is given with the inputs, and for all of them"),
        ({"num_inference_steps": 0}, "num_inference_steps=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
    ],
)
def test_arguments_given_twice_or_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        record(pipeline_of("sd"), **changes)


def test_a_students_steps_are_not_told_where_a_strength_leaves_some_out() -> None:
    kind = PIPELINES["flux"]
    calibration = record(kind.build(), kind.inputs[:4], num_inference_steps=4, **kind.arguments)
    calibration.manifest["num_inference_steps"] = 8
    with pytest.raises(ValueError, match=r"took 4 of 8 steps \(strength\)"):
        calibration.student_arguments(kind.build())


def test_other_rows_are_another_set(recorded: dict[str, CalibrationSet]) -> None:
    whole = recorded["sd"]
    assert whole.identity() == whole.select(slice(None)).identity()
    assert whole.select([0, 1]).identity() != whole.select([0, 2]).identity()
    assert len(whole.select([])) == 0
