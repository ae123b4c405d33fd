"""Specification of calibration sets: whole full-precision trajectories, and a manifest that must match later."""

import copy
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from pipelines import PIPELINES
from safetensors import safe_open
from safetensors.torch import save_file

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.checkpoint import model_hash, save_checkpoint
from diffusers_pqcad.compression.fake_quant import prepare_
from diffusers_pqcad.compression.grid import ddim_grid
from diffusers_pqcad.compression.recording import Recorder, collect_calibration_set
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
    assert tiny_calibration_set.condition(torch.arange(2), torch.tensor([0, 3])) == {}
    assert not tiny_calibration_set.varies
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
    assert (manifest["pipeline_class"], manifest["component"]) == ("DDIMPipeline", "unet")
    assert manifest["scheduler_class"] == "DDIMScheduler"
    assert json.loads(json.dumps(manifest)) == manifest
    again = DDIMScheduler(**manifest["scheduler"])
    assert torch.equal(again.alphas_cumprod, tiny_pipeline.scheduler.alphas_cumprod)


def assert_same(found: CalibrationSet, wanted: CalibrationSet) -> None:
    """Both have the same trajectories, bit by bit, on the same grid, of the same inputs."""
    for name in ("trajectory", "timestep", "model_output"):
        before, after = getattr(wanted, name), getattr(found, name)
        assert before.dtype == after.dtype
        assert torch.equal(before, after)
    for name in ("alpha", "sigma", "a", "b"):
        assert torch.equal(getattr(found.grid(), name), getattr(wanted.grid(), name))
    assert (found.columns, found.plan, found.manifest) == (wanted.columns, wanted.plan, wanted.manifest)
    assert found.inputs() == wanted.inputs()


def test_a_saved_set_is_the_same_set(tmp_path: Path, tiny_calibration_set: CalibrationSet) -> None:
    tiny_calibration_set.save(tmp_path / "set")
    assert_same(CalibrationSet.load(tmp_path / "set"), tiny_calibration_set)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]
    rows = Dataset.from_file(str(tmp_path / "set" / "data.arrow"))  # as anybody reads it
    assert sorted(rows.column_names) == ["input", "output", "state"]
    assert rows[3]["state"] == tiny_calibration_set.trajectory[3].flatten().tolist()


def test_a_part_of_a_set_is_saved_as_it_is_and_written_over(
    tmp_path: Path, tiny_calibration_set: CalibrationSet
) -> None:
    part = tiny_calibration_set.select([15, 2, 2, 7])
    for calibration in (tiny_calibration_set, part, part.select(slice(1, 3))):
        calibration.save(tmp_path / "set")
        assert_same(CalibrationSet.load(tmp_path / "set"), calibration)
    assert torch.equal(part.trajectory, tiny_calibration_set.trajectory[[15, 2, 2, 7]])


def test_rows_are_found_whatever_the_chunks_and_the_selection(
    tmp_path: Path, tiny_calibration_set: CalibrationSet
) -> None:
    """Chunks of 8 as recorded, of 16 as saved; steps of a trajectory, one for each row."""
    tiny_calibration_set.select([*range(16), *range(16), 0, 1, 2]).save(tmp_path / "set")
    long = CalibrationSet.load(tmp_path / "set")
    assert [len(chunk) for chunk in long.dataset.data["state"].chunks] == [16, 16, 3]
    assert [len(chunk) for chunk in tiny_calibration_set.dataset.data["state"].chunks] == [8, 8]
    rows, steps = torch.tensor([0, 15, 16, 31, 32, 34, 9]), torch.tensor([4, 0, 1, 2, 3, 0, 2])
    states, outputs = tiny_calibration_set.trajectory, tiny_calibration_set.model_output
    assert torch.equal(long.states(rows, steps), states[rows % 32 % 16, steps])
    assert torch.equal(long.outputs(rows, steps.clamp(max=3)), outputs[rows % 32 % 16, steps.clamp(max=3)])
    backwards = long.select(torch.arange(34, -1, -1)).select(slice(2, None, 2))
    wanted = states[torch.arange(34, -1, -1)[2::2] % 32 % 16]
    assert torch.equal(backwards.trajectory, wanted)
    assert torch.equal(backwards.states(torch.tensor([7, 0]), torch.tensor([1, 2])), wanted[[7, 0], [1, 2]])


def test_a_file_of_an_older_version_loads(tmp_path: Path, tiny_calibration_set: CalibrationSet) -> None:
    """One safetensors file with all trajectories; an unconditional model, and steps of DDIM."""
    names = ("trajectory", "timestep", "model_output", "manifest")
    state = {name: getattr(tiny_calibration_set, name) for name in names} | {"conditioning": {}}
    save_checkpoint(tmp_path / "old.safetensors", state)
    loaded = CalibrationSet.load(tmp_path / "old.safetensors")
    assert_same(loaded, tiny_calibration_set)
    assert torch.equal(loaded.draw(5, 0).state, tiny_calibration_set.draw(5, 0).state)
    loaded.save(tmp_path / "new")
    assert_same(CalibrationSet.load(tmp_path / "new"), tiny_calibration_set)


def test_drawn_calls_are_recorded_and_a_function_of_the_seed(tiny_calibration_set: CalibrationSet) -> None:
    calls = tiny_calibration_set.draw(50, 3)
    gains, grid = tiny_calibration_set.gains(), tiny_calibration_set.timestep.tolist()
    for i in range(50):
        step = grid.index(int(calls.timestep[i]))
        assert step == calls.step[i]
        same = (tiny_calibration_set.trajectory[:, step] == calls.state[i]).flatten(1).all(dim=1)
        assert same.nonzero().flatten().tolist() == [int(calls.trajectory[i])]
        assert torch.equal(calls.output[i], tiny_calibration_set.model_output[calls.trajectory[i], step])
        assert calls.weight[i] == gains[step] ** 2
    assert set(calls.timestep.tolist()) == set(grid)
    again = tiny_calibration_set.draw(50, 3)
    assert all(torch.equal(a, b) for a, b in zip(calls, again, strict=True) if isinstance(a, torch.Tensor))
    assert not torch.equal(calls.state, tiny_calibration_set.draw(50, 4).state)
    some = calls.rows(torch.tensor([4, 1]))
    assert torch.equal(some.state, calls.state[[4, 1]])
    assert torch.equal(some.step, calls.step[[4, 1]])


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
    moved = tiny_calibration_set.to("meta")
    assert (moved.grid().timestep.device.type, moved.grid().alpha.device.type) == ("meta", "cpu")
    calls = moved.draw(2, 0)
    assert {x.device.type for x in (calls.state, calls.timestep, calls.output, calls.weight)} == {"meta"}


@pytest.mark.parametrize("steps", [4, 2])
def test_gains_are_the_derivative_of_the_step_with_mean_one(tiny_calibration_set: CalibrationSet, steps: int) -> None:
    alphas_cumprod = DDIMScheduler(**tiny_calibration_set.manifest["scheduler"]).alphas_cumprod.double()
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
    scheduler = DDIMScheduler(**tiny_calibration_set.manifest["scheduler"] | {"prediction_type": "sample"})
    one = tiny_calibration_set
    gains = CalibrationSet(one.dataset, one.columns, ddim_grid(scheduler, 1000), one.plan, one.manifest).gains()
    assert gains.min() == pytest.approx(0.1)  # the steps near the noise hardly move
    assert gains.max() == 10  # the last step is the output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_trajectories": 3}, "expected at least 4 trajectories"),
        ({"num_inference_steps": 16}, "must divide num_train_timesteps"),
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
    with pytest.raises(ValueError, match="first step of a student.*multiplies an error of the model by 1[0-9][0-9] "):
        recorded.check_student_steps()


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_clipped_trajectories_are_refused_by_what_they_miss(tiny_pipeline: DDIMPipeline, setting: str) -> None:
    with pytest.raises(
        ValueError, match=r"step \d: the scheduler's next state is [0-9.e-]+ of its size away"
    ) as error:
        collect(with_scheduler(tiny_pipeline, **{setting: True}))
    assert f"{setting}=False" in str(error.value)


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


def test_a_model_of_classes_is_recorded_with_its_conditions(tiny_pipeline: DDIMPipeline) -> None:
    """What was refused as conditional: DiT's pipeline hands classes to its denoiser."""
    kind = PIPELINES["dit"]
    recorded = collect_calibration_set(
        kind.build(), kind.inputs[:4], num_inference_steps=2, seed=0, progress=False, **kind.arguments
    )
    rows = torch.arange(4)
    assert recorded.condition(rows, torch.zeros_like(rows))["class_labels"].tolist() == [[k, 1000] for k in range(4)]


def test_models_that_cannot_be_recorded_are_refused(tiny_pipeline: DDIMPipeline) -> None:
    with pytest.raises(ValueError, match=r"expected a model in float32, got \['torch.float16'\]"):
        collect(DDIMPipeline(copy.deepcopy(tiny_pipeline.unet).half(), tiny_pipeline.scheduler))
    with torch.no_grad():
        tiny_pipeline.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="the trajectories hold a NaN"):
        collect(tiny_pipeline)


def test_damaged_and_edited_files_are_refused(tmp_path: Path, tiny_calibration_set: CalibrationSet) -> None:
    path = tmp_path / "old.safetensors"
    names = ("trajectory", "timestep", "model_output", "manifest")
    save_checkpoint(path, {name: getattr(tiny_calibration_set, name) for name in names} | {"conditioning": {}})
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="old.safetensors.*damaged"):
        CalibrationSet.load(path)
    path.write_bytes(whole)
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    largest = max(tensors, key=lambda name: tensors[name].numel())
    tensors[largest] = tensors[largest] * 1.5
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="old.safetensors.*damaged"):
        CalibrationSet.load(path)


@pytest.mark.parametrize("cut", [-100, -3000, 100])
def test_folders_with_a_damaged_file_are_refused(
    tmp_path: Path, tiny_calibration_set: CalibrationSet, cut: int
) -> None:
    tiny_calibration_set.save(tmp_path / "set")
    for name in ("data.arrow", "calibration.safetensors"):
        path = tmp_path / "set" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=f"{name}.*(damaged|expected 16 trajectories)"):
            CalibrationSet.load(tmp_path / "set")
        path.write_bytes(whole)
    CalibrationSet.load(tmp_path / "set")


def test_a_recording_that_is_killed_leaves_no_set(
    tmp_path: Path, tiny_pipeline: DDIMPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    take, count = Recorder.take, itertools.count()

    def dying(self: Recorder, *args: Any) -> Any:
        if next(count) == 1:
            raise KeyboardInterrupt
        return take(self, *args)

    folder = tmp_path / "set"
    with monkeypatch.context() as patch:
        patch.setattr(Recorder, "take", dying)
        with pytest.raises(KeyboardInterrupt):
            collect(tiny_pipeline, batch_size=2, output_dir=folder)
    assert not folder.exists()
    collect(tiny_pipeline, batch_size=2, output_dir=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_a_resume_file_is_not_a_calibration_set(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "resume", {"step": 1})
    with pytest.raises(ValueError, match="not a calibration set"):
        CalibrationSet.load(tmp_path / "resume")


def test_a_students_pipeline_is_told_its_steps() -> None:
    kind = PIPELINES["sd3"]
    pipeline = kind.build()
    calibration = collect_calibration_set(
        pipeline, kind.inputs, num_inference_steps=4, seed=1, progress=False, **kind.arguments
    )
    arguments = calibration.student_arguments(pipeline)
    assert arguments["num_inference_steps"] == 2
    pipeline.scheduler.set_timesteps(sigmas=arguments["sigmas"])
    grid = calibration.grid()
    torch.testing.assert_close(pipeline.scheduler.sigmas.double(), grid.sigma[[0, 2, 4]], atol=1e-6, rtol=0)
    torch.testing.assert_close(pipeline.scheduler.timesteps, grid.timestep[::2], atol=1e-3, rtol=0)


def test_a_set_of_every_second_step_has_the_outputs_that_land_on_its_states(
    tiny_calibration_set: CalibrationSet, tmp_path: Path
) -> None:
    halved = tiny_calibration_set.split()[0].every(2)
    assert (halved.num_inference_steps, halved.timestep.tolist()) == (2, [999, 499])
    assert torch.equal(halved.trajectory, tiny_calibration_set.trajectory[:14, ::2])
    rows, k = torch.tensor([3, 0, 5]), torch.tensor([1, 0, 0])
    calls = halved.calls(rows, k)
    assert torch.equal(calls.state, tiny_calibration_set.trajectory[rows, 2 * k])
    found = halved.grid().step(k, calls.state, calls.output)
    torch.testing.assert_close(found, tiny_calibration_set.trajectory[rows, 2 * k + 2])
    torch.testing.assert_close(halved.model_output[rows, k], calls.output)
    assert torch.equal(halved.gains(), tiny_calibration_set.gains(2))
    once_more = halved.every(2).to("cpu")
    assert torch.equal(once_more.trajectory, tiny_calibration_set.trajectory[:14, [0, 4]])
    assert once_more.check_student_steps(1) == 1
    with pytest.raises(ValueError, match="a view of one in 2 steps of a set; save that set"):
        halved.save(tmp_path / "halved")


def test_students_of_more_halvings_take_fewer_of_the_steps(
    tiny_pipeline: DDIMPipeline, tiny_calibration_set: CalibrationSet
) -> None:
    assert [tiny_calibration_set.check_student_steps(stride) for stride in (1, 2, 4)] == [4, 2, 1]
    assert tiny_calibration_set.student_arguments(tiny_pipeline, 4) == {"num_inference_steps": 1}
    with pytest.raises(ValueError, match="num_inference_steps=4: a student takes one in 8 steps"):
        tiny_calibration_set.check_student_steps(8)
    of_epsilon = collect(with_scheduler(tiny_pipeline, prediction_type="epsilon"), num_inference_steps=4)
    assert of_epsilon.check_student_steps(2) == 2
    with pytest.raises(ValueError, match="first step of a student.*multiplies an error of the model by 1[0-9][0-9] "):
        of_epsilon.check_student_steps(4)


def test_the_grids_of_ddim_nest_and_a_pipeline_without_sigmas_has_no_students(
    tiny_pipeline: DDIMPipeline, tiny_calibration_set: CalibrationSet
) -> None:
    assert tiny_calibration_set.student_arguments(tiny_pipeline) == {"num_inference_steps": 2}
    with pytest.raises(ValueError, match="WanPipeline: it does not take `sigmas`"):
        tiny_calibration_set.student_arguments(PIPELINES["wan"].build())
