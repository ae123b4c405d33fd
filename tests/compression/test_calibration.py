"""Specification of calibration sets: whole full-precision trajectories, and a manifest that must match later."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.compression.calibration import CalibrationSet, collect_calibration_set, scheduler_settings
from diffusers_pqcad.compression.checkpoint import model_hash
from diffusers_pqcad.compression.fake_quant import prepare_
from diffusers_pqcad.compression.sampling import initial_noise
from diffusers_pqcad.loading.convert import match_modules

pytestmark = pytest.mark.fast


def collect(pipeline: DDIMPipeline, **settings: object) -> CalibrationSet:
    return collect_calibration_set(
        pipeline, **{"num_trajectories": 4, "num_inference_steps": 4, "seed": 1, "progress": False} | settings
    )


def with_scheduler(pipeline: DDIMPipeline, **settings: object) -> DDIMPipeline:
    scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **settings)
    return DDIMPipeline(copy.deepcopy(pipeline.unet), scheduler)


def test_trajectories_are_those_of_the_scheduler(
    tiny_pipeline: DDIMPipeline, tiny_calibration_set: CalibrationSet
) -> None:
    model, scheduler = tiny_pipeline.unet, tiny_pipeline.scheduler
    assert tiny_calibration_set.trajectory.shape == (16, 5, 1, 8, 8)
    assert tiny_calibration_set.model_output.shape == (16, 4, 1, 8, 8)
    assert tiny_calibration_set.trajectory.dtype == tiny_calibration_set.model_output.dtype == torch.float32
    assert tiny_calibration_set.timestep.tolist() == [999, 749, 499, 249]
    assert tiny_calibration_set.conditioning == {}
    assert (len(tiny_calibration_set), tiny_calibration_set.num_inference_steps) == (16, 4)
    scheduler.set_timesteps(4)
    sample = initial_noise((1, 8, 8), seed=1, start=0, count=16)
    for index, timestep in enumerate(scheduler.timesteps):
        torch.testing.assert_close(tiny_calibration_set.trajectory[:, index], sample)
        with torch.no_grad():
            output = model(sample, timestep).sample
        torch.testing.assert_close(tiny_calibration_set.model_output[:, index], output)
        sample = scheduler.step(output, timestep, sample, eta=0.0).prev_sample
    torch.testing.assert_close(tiny_calibration_set.trajectory[:, 4], sample)


def test_a_set_is_a_function_of_the_seed_and_not_of_the_batch_size(tiny_pipeline: DDIMPipeline) -> None:
    once, again, other = collect(tiny_pipeline), collect(tiny_pipeline, batch_size=3), collect(tiny_pipeline, seed=2)
    assert torch.equal(once.trajectory[:, 0], again.trajectory[:, 0])
    torch.testing.assert_close(once.trajectory, again.trajectory)
    assert not torch.equal(once.trajectory, other.trajectory)
    more = collect(tiny_pipeline, num_trajectories=6)
    assert torch.equal(once.trajectory[:, 0], more.trajectory[:4, 0])


def test_the_manifest_names_model_scheduler_and_seed(
    tiny_pipeline: DDIMPipeline, tiny_calibration_set: CalibrationSet
) -> None:
    manifest = tiny_calibration_set.manifest
    assert manifest["model_hash"] == model_hash(tiny_pipeline.unet)
    assert manifest["model_class"] == "UNet2DModel"
    assert manifest["seed"] == 1
    assert manifest["scheduler"]["prediction_type"] == "v_prediction"
    assert json.loads(json.dumps(manifest)) == manifest
    assert scheduler_settings(tiny_calibration_set.scheduler()) == manifest["scheduler"]
    assert torch.equal(tiny_calibration_set.scheduler().alphas_cumprod, tiny_pipeline.scheduler.alphas_cumprod)


def test_a_saved_set_is_the_same_set(tmp_path: Path, tiny_calibration_set: CalibrationSet) -> None:
    tiny_calibration_set.save(tmp_path / "set.safetensors")
    loaded = CalibrationSet.load(tmp_path / "set.safetensors")
    for name in ("trajectory", "timestep", "model_output"):
        before, after = getattr(tiny_calibration_set, name), getattr(loaded, name)
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
    assert loaded.manifest == tiny_calibration_set.manifest


def test_matching_model_and_scheduler_pass(tiny_pipeline: DDIMPipeline, tiny_calibration_set: CalibrationSet) -> None:
    tiny_calibration_set.check(tiny_pipeline.unet, tiny_pipeline.scheduler)


def test_a_model_with_edited_weights_is_refused(tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet) -> None:
    with torch.no_grad():
        tiny_unet.conv_out.bias.add_(1e-4)
    with pytest.raises(ValueError, match="recorded with another model"):
        tiny_calibration_set.check(tiny_unet)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("num_train_timesteps", 2000),
        ("beta_start", 2e-4),
        ("beta_schedule", "scaled_linear"),
        ("prediction_type", "epsilon"),
        ("timestep_spacing", "leading"),
        ("clip_sample", True),
        ("set_alpha_to_one", False),
        ("rescale_betas_zero_snr", True),
    ],
)
def test_a_scheduler_with_other_settings_is_refused_by_name(
    tiny_pipeline: DDIMPipeline, tiny_calibration_set: CalibrationSet, setting: str, value: object
) -> None:
    other = with_scheduler(tiny_pipeline, **{setting: value})
    with pytest.raises(ValueError, match=f"another scheduler.*{setting}"):
        tiny_calibration_set.check(tiny_pipeline.unet, other.scheduler)


def test_the_last_eighth_and_at_least_two_are_held_out(tiny_calibration_set: CalibrationSet) -> None:
    def tiled(count: int) -> CalibrationSet:
        return tiny_calibration_set.select(torch.arange(count) % 16)

    for count, num_held_out in ((4, 2), (12, 2), (16, 2), (24, 3), (64, 8)):
        train, held_out = tiled(count).split()
        assert (len(train), len(held_out)) == (count - num_held_out, num_held_out)
    train, held_out = tiny_calibration_set.split()
    assert torch.equal(torch.cat([train.trajectory, held_out.trajectory]), tiny_calibration_set.trajectory)
    assert torch.equal(torch.cat([train.model_output, held_out.model_output]), tiny_calibration_set.model_output)
    with pytest.raises(ValueError, match="at least 4 trajectories.*got 3"):
        tiled(3).split()


def test_the_grid_is_that_of_the_recorded_steps(tiny_calibration_set: CalibrationSet) -> None:
    grid, rows = tiny_calibration_set.grid(), torch.arange(16)
    assert grid.timestep is tiny_calibration_set.timestep
    for step in range(4):
        k = torch.full((16,), step)
        outputs = tiny_calibration_set.model_output[rows, k]
        landing = grid.step(k, tiny_calibration_set.trajectory[rows, k], outputs)
        torch.testing.assert_close(landing, tiny_calibration_set.trajectory[rows, k + 1], rtol=1e-6, atol=1e-6)
    moved = tiny_calibration_set.to("meta").grid()
    assert (moved.timestep.device.type, moved.alpha.device.type) == ("meta", "cpu")


@pytest.mark.parametrize("steps", [4, 2])
def test_gains_are_the_derivative_of_the_step_with_mean_one(tiny_calibration_set: CalibrationSet, steps: int) -> None:
    alphas_cumprod = tiny_calibration_set.scheduler().alphas_cumprod.double()
    expected = []
    for index in range(steps):
        t, u = 999 - index * 1000 // steps, 999 - (index + 1) * 1000 // steps
        alpha_t, sigma_t = alphas_cumprod[t].sqrt(), (1 - alphas_cumprod[t]).sqrt()
        alpha_u, sigma_u = (alphas_cumprod[u].sqrt(), (1 - alphas_cumprod[u]).sqrt()) if u >= 0 else (1.0, 0.0)
        expected.append(abs(alpha_t * sigma_u - alpha_u * sigma_t))
    wanted = torch.stack(expected) / torch.stack(expected).mean()
    assert 0.1 < wanted.min() < wanted.max() < 10  # no clipping here
    gains = tiny_calibration_set.gains(steps)
    assert gains.dtype == torch.float32
    torch.testing.assert_close(gains.double(), wanted, rtol=1e-6, atol=0)


def test_gains_are_clipped(tiny_calibration_set: CalibrationSet) -> None:
    scheduler = tiny_calibration_set.manifest["scheduler"] | {"prediction_type": "sample"}
    manifest = tiny_calibration_set.manifest | {"scheduler": scheduler}
    gains = dataclasses.replace(tiny_calibration_set, manifest=manifest).gains(1000)
    assert gains.min() == pytest.approx(0.1)  # the steps near the noise hardly move
    assert gains.max() == 10  # the last step is the output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_trajectories": 3}, "num_trajectories: expected at least 4"),
        ({"num_inference_steps": 16}, "must divide num_train_timesteps"),
        ({"num_inference_steps": 0}, "must divide num_train_timesteps"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused(
    tiny_pipeline: DDIMPipeline, settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        collect(tiny_pipeline, **settings)


def test_an_odd_number_of_steps_records_but_has_no_student(tiny_pipeline: DDIMPipeline) -> None:
    with pytest.raises(ValueError, match="num_inference_steps=5 is odd"):
        collect(tiny_pipeline, num_inference_steps=5).check_student_steps()
    assert collect(tiny_pipeline, num_inference_steps=2).check_student_steps() == 1


def test_a_students_first_step_must_not_amplify_errors(tiny_pipeline: DDIMPipeline) -> None:
    """An epsilon model can start with a step to t = 499, but not with one to the data."""
    recorded = collect(with_scheduler(tiny_pipeline, prediction_type="epsilon"), num_inference_steps=2)
    with pytest.raises(ValueError, match="no signal left"):
        recorded.check_student_steps()


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_clipped_trajectories_record_but_have_no_student(tiny_pipeline: DDIMPipeline, setting: str) -> None:
    recorded = collect(with_scheduler(tiny_pipeline, **{setting: True}))
    with pytest.raises(ValueError, match=f"{setting}: a clipped trajectory"):
        recorded.check_student_steps()


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_grids_that_do_not_nest_are_refused(tiny_pipeline: DDIMPipeline, spacing: str) -> None:
    with pytest.raises(ValueError, match="timestep_spacing: expected 'trailing'"):
        collect(with_scheduler(tiny_pipeline, timestep_spacing=spacing))


def test_an_epsilon_model_without_signal_at_the_start_is_refused(tiny_pipeline: DDIMPipeline) -> None:
    cosine = with_scheduler(tiny_pipeline, prediction_type="epsilon", beta_schedule="squaredcos_cap_v2")
    with pytest.raises(ValueError, match="no signal left"):
        collect(cosine)


def test_a_packed_model_is_refused(tiny_pipeline: DDIMPipeline) -> None:
    quantize_(tiny_pipeline.unet, PQCADConfig(method="fixed", weight_bits=4))
    with pytest.raises(ValueError, match="full-precision model, but this one is quantized"):
        collect(tiny_pipeline)


def test_a_fake_quantized_model_is_refused(tiny_pipeline: DDIMPipeline) -> None:
    config = PQCADConfig()
    prepare_(tiny_pipeline.unet, config, dict.fromkeys(match_modules(tiny_pipeline.unet, config), 4))
    with pytest.raises(ValueError, match="full-precision model, but this one is quantized"):
        collect(tiny_pipeline)


def test_a_conditional_model_is_refused(tiny_pipeline: DDIMPipeline) -> None:
    settings = {"sample_size": 8, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4}
    text = UNet2DConditionModel(
        **settings,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    classes = UNet2DModel(
        **settings,
        num_class_embeds=10,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    for model, reason in ((text, "unconditional UNet2DModel, got UNet2DConditionModel"), (classes, "on classes")):
        with pytest.raises(ValueError, match=reason):
            collect(DDIMPipeline(model, tiny_pipeline.scheduler))


def test_models_that_cannot_be_recorded_are_refused(tiny_pipeline: DDIMPipeline) -> None:
    def pipeline(**settings: object) -> DDIMPipeline:
        config = dict(tiny_pipeline.unet.config) | settings
        return DDIMPipeline(UNet2DModel.from_config(config), tiny_pipeline.scheduler)

    with pytest.raises(ValueError, match="predict a variance"):
        collect(pipeline(out_channels=2))
    with pytest.raises(ValueError, match="sample_size"):
        collect(pipeline(sample_size=None))
    with pytest.raises(ValueError, match=r"expected a model in float32, got \['torch.float16'\]"):
        collect(DDIMPipeline(copy.deepcopy(tiny_pipeline.unet).half(), tiny_pipeline.scheduler))
    with torch.no_grad():
        tiny_pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="the trajectories hold a NaN"):
        collect(tiny_pipeline)


def test_damaged_and_edited_files_are_refused(tmp_path: Path, tiny_calibration_set: CalibrationSet) -> None:
    path = tmp_path / "set.safetensors"
    tiny_calibration_set.save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="set.safetensors.*damaged"):
        CalibrationSet.load(path)
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    largest = max(tensors, key=lambda name: tensors[name].numel())
    tensors[largest] = tensors[largest] * 1.5
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="set.safetensors.*damaged"):
        CalibrationSet.load(path)


def test_a_resume_file_is_not_a_calibration_set(tmp_path: Path) -> None:
    from diffusers_pqcad.compression.checkpoint import save_checkpoint

    save_checkpoint(tmp_path / "resume", {"step": 1})
    with pytest.raises(ValueError, match="not a calibration set"):
        CalibrationSet.load(tmp_path / "resume")
