"""Specification of CAD: exact two-step targets, the ablation switches, and a best state that is kept."""

import copy
import dataclasses
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from pipelines import PIPELINES, together
from torch import Tensor, nn

from diffusers_pqcad import DistillConfig, PQCADConfig, distill
from diffusers_pqcad.compression import distillation as distillation_module
from diffusers_pqcad.compression import fake_quant as fake_quant_module
from diffusers_pqcad.compression.adapters import adapter_facts, add_adapter_, put_adapter_, take_adapter_
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.checkpoint import clone_state, save_checkpoint
from diffusers_pqcad.compression.denoiser import Condition, Denoiser, Stop, TappedStep, run_tapped
from diffusers_pqcad.compression.distillation import (
    TERMS,
    Distillation,
    Draw,
    StepStats,
    Term,
    landing_of,
)
from diffusers_pqcad.compression.fake_quant import (
    bits_by_module,
    convert_,
    fake_quant_layers,
    fake_quant_state,
    freeze_,
    input_quantizers,
    latent_weight,
    prepare_,
    timestep_boundaries,
)
from diffusers_pqcad.compression.grid import grid_of
from diffusers_pqcad.compression.progressive import trajectory_error, weighted_error
from diffusers_pqcad.compression.recording import collect_calibration_set
from diffusers_pqcad.compression.sampling import image_generator
from diffusers_pqcad.compression.schedulers import deterministic_scheduler
from diffusers_pqcad.loading.convert import match_modules
from diffusers_pqcad.loading.coverage import float_weights

PREDICTIONS = ["sample", "epsilon", "v_prediction"]
QUICK = DistillConfig(
    max_train_steps=6,
    train_batch_size=4,
    step_rate=1e-2,
    evaluation_steps=2,
)


def scheduler_of(prediction_type: str, **settings: object) -> DDIMScheduler:
    values = {"timestep_spacing": "trailing", "clip_sample": False, "prediction_type": prediction_type}
    return DDIMScheduler(num_train_timesteps=1000, **values | settings)


def coefficients(scheduler: DDIMScheduler, timestep: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma in float64, (B, 1, 1, 1); -1 is data."""
    table = torch.cat([scheduler.alphas_cumprod.double(), torch.ones(1, dtype=torch.float64)])
    alphas_cumprod = table[timestep].view(-1, 1, 1, 1)
    return alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()


class Perfect(nn.Module):
    """A model that knows the data: every image is `data`."""

    def __init__(self, scheduler: DDIMScheduler, data: Tensor) -> None:
        super().__init__()
        self.scheduler, self.data = scheduler, data

    def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor]:
        alpha, sigma = coefficients(self.scheduler, timestep)
        eps = (sample - alpha * self.data) / sigma
        outputs = {
            "sample": self.data.double().expand_as(eps),
            "epsilon": eps,
            "v_prediction": alpha * eps - sigma * self.data,
        }
        return (outputs[self.scheduler.config.prediction_type].float(),)


NOTHING: tuple[Condition, Condition] = ({}, {})  # the conditions of two steps of an unconditional model


def scheduler_in(calibration: CalibrationSet) -> DDIMScheduler:
    return DDIMScheduler(**calibration.manifest["scheduler"])


def run_of(student: nn.Module, given: nn.Module | None, data: CalibrationSet, /, **changes: object) -> Distillation:
    return Distillation(student, given, data, dataclasses.replace(QUICK, **changes))


def train(
    student: nn.Module,
    given: nn.Module | None,
    recorded: CalibrationSet,
    /,
    *,
    checkpoint: Path | None = None,
    data: Tensor | None = None,
    **changes: object,
) -> list[StepStats]:
    config = dataclasses.replace(QUICK, **changes)
    return list(distill(student, given, recorded, config, data=data, checkpoint=checkpoint))


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# Targets


def test_a_student_jumps_over_every_second_step_of_the_teacher(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    run = run_of(tiny_quantized, None, tiny_calibration_set, teacher="none")
    assert run.grid.timestep.tolist() == [999, 749, 499, 249]
    assert run.student_grid.timestep.tolist() == [999, 499]
    expected = grid_of(scheduler_in(tiny_calibration_set), 2)
    assert torch.equal(run.student_grid.alpha, expected.alpha)
    assert torch.equal(run.student_grid.sigma, expected.sigma)


@pytest.mark.fast
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("settings", [{}, {"set_alpha_to_one": False}], ids=["data", "alpha_0"])
def test_targets_agree_with_the_formula_in_float64(prediction: str, settings: dict[str, bool]) -> None:
    """x* = (z_u - r z_t) / (alpha_u - r alpha_t), r = sigma_u / sigma_t (Salimans & Ho 2022, appendix G)."""
    scheduler = scheduler_of(prediction, **settings)
    sample, landing = torch.randn(5, 2, 3, 3), torch.randn(5, 2, 3, 3)
    alpha, sigma = coefficients(scheduler, torch.tensor([999, 799, 599, 399, 199]))
    last = torch.tensor([-1 if scheduler.config.set_alpha_to_one else 0])
    alpha_end, sigma_end = coefficients(scheduler, torch.cat([torch.tensor([799, 599, 399, 199]), last]))
    ratio = sigma_end / sigma
    x = (landing.double() - ratio * sample) / (alpha_end - ratio * alpha)
    eps = (sample - alpha * x) / sigma
    expected = {"sample": x, "epsilon": eps, "v_prediction": alpha * eps - sigma * x}[prediction]
    target = grid_of(scheduler, 5).output_to(torch.arange(5), sample, landing)
    assert target.dtype == torch.float32
    torch.testing.assert_close(target.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.fast
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("settings", [{}, {"set_alpha_to_one": False}], ids=["data", "alpha_0"])
def test_a_scheduler_step_with_the_target_lands_on_the_landing(prediction: str, settings: dict[str, bool]) -> None:
    scheduler = scheduler_of(prediction, **settings)
    scheduler.set_timesteps(5)
    grid = grid_of(scheduler, 5)
    for step, timestep in enumerate(scheduler.timesteps):
        k, sample, landing = torch.full((3,), step), torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
        output = grid.output_to(k, sample, landing)
        stepped = scheduler.step(output, timestep, sample, eta=0.0).prev_sample
        torch.testing.assert_close(stepped, landing, rtol=0, atol=1e-5)


@pytest.mark.fast
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_two_steps_are_two_steps_of_the_scheduler(tiny_unet: UNet2DModel, prediction: str) -> None:
    scheduler = scheduler_of(prediction)
    scheduler.set_timesteps(4)
    sample, k = torch.randn(3, 1, 8, 8), torch.tensor([0, 2, 1])
    landing = landing_of(Denoiser(tiny_unet), grid_of(scheduler, 4), k, sample, NOTHING)
    assert not landing.requires_grad
    for i, first in enumerate(k.tolist()):
        state = sample[i : i + 1]
        for timestep in scheduler.timesteps[first : first + 2]:
            with torch.no_grad():
                state = scheduler.step(tiny_unet(state, timestep).sample, timestep, state, eta=0.0).prev_sample
        # fp32 on both sides, and the scheduler divides an epsilon model's x by alpha = 0.006 at t = 999.
        torch.testing.assert_close(landing[i : i + 1], state, rtol=0, atol=5e-5)


@pytest.mark.fast
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_for_a_perfect_model_two_steps_are_one(prediction: str) -> None:
    scheduler = scheduler_of(prediction)
    model = Perfect(scheduler, torch.randn(1, 1, 4, 4))
    grid, rows, sample = grid_of(scheduler, 4), torch.tensor([0, 1, 1]), torch.randn(3, 1, 4, 4)
    student = grid.every(2)
    landing = landing_of(Denoiser(model), grid, 2 * rows, sample, NOTHING)
    (output,) = model(sample, student.timestep[rows])
    torch.testing.assert_close(landing, student.step(rows, sample, output), rtol=0, atol=1e-5)
    torch.testing.assert_close(student.output_to(rows, sample, landing), output, rtol=1e-4, atol=1e-4)


def test_teacher_targets_land_where_two_steps_of_the_teacher_do(
    tiny_quantized: UNet2DModel, tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    run = run_of(tiny_quantized, tiny_unet, tiny_calibration_set, teacher="fp")
    few, many = scheduler_in(tiny_calibration_set), scheduler_in(tiny_calibration_set)
    few.set_timesteps(2)
    many.set_timesteps(4)
    for row in range(2):
        sample = torch.randn(1, 1, 8, 8)
        target = run.teacher_target(tiny_unet, run.train_set, torch.tensor([0]), torch.tensor([row]), sample)
        found = few.step(target, few.timesteps[row], sample).prev_sample
        for timestep in many.timesteps[2 * row : 2 * row + 2]:
            with torch.no_grad():
                sample = many.step(tiny_unet(sample, timestep).sample, timestep, sample).prev_sample
        torch.testing.assert_close(found, sample, rtol=0, atol=1e-5)


def test_calibration_targets_lead_along_the_recorded_trajectories(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    run = run_of(tiny_quantized, None, tiny_calibration_set, teacher="none")
    data, scheduler = tiny_calibration_set, scheduler_in(tiny_calibration_set)
    scheduler.set_timesteps(2)
    for row, timestep in enumerate((999, 499)):
        trajectories = torch.tensor([5, 2, 11])
        sample, target = run.recorded(data, trajectories, torch.full((3,), row))
        assert torch.equal(sample, data.trajectory[[5, 2, 11], 2 * row])
        landing = scheduler.step(target, timestep, sample, eta=0.0).prev_sample
        torch.testing.assert_close(landing, data.trajectory[[5, 2, 11], 2 * row + 2], rtol=0, atol=1e-5)


@torch.no_grad()
def errors_per_jump(run: Distillation, model: nn.Module, *, as_teacher: bool) -> torch.Tensor:
    """The mean squared output error on the held-out trajectories in each jump, in the student's or teacher's steps."""
    data, errors = run.held_out, []
    for index in range(len(run.student_grid)):
        trajectory = torch.arange(len(data))
        jump = torch.full_like(trajectory, index)
        state, target = run.recorded(data, trajectory, jump)
        if as_teacher:
            output = run.teacher_target(model, data, trajectory, jump, state)
        else:
            output = run.outputs(model, jump, state, data.condition(trajectory, run.stride * jump))
        errors.append((output - target).square().mean())
    return torch.stack(errors)


def test_the_recorded_model_has_no_held_out_error_as_a_teacher(
    tiny_quantized: UNet2DModel, tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    run = run_of(tiny_quantized, tiny_unet, tiny_calibration_set, teacher="fp")
    errors = errors_per_jump(run, tiny_unet, as_teacher=True)
    assert errors.shape == (2,)
    assert errors.max() < 1e-9
    errors = errors_per_jump(run, tiny_quantized, as_teacher=False)
    assert (errors > 1e-4).all()
    for row, timestep in enumerate((999, 499)):
        sample, target = run.recorded(run.held_out, torch.arange(2), torch.tensor([row, row]))
        with torch.no_grad():
            expected = (tiny_quantized(sample, timestep).sample - target).square().mean()
        torch.testing.assert_close(errors[row], expected)


def test_fresh_inputs_are_renoised_end_points_or_data(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    config, rows = dataclasses.replace(QUICK, teacher="none"), torch.tensor([0, 1, 1, 0])
    alpha, sigma = coefficients(scheduler_in(tiny_calibration_set), torch.tensor([999, 499, 499, 999]))
    for data in (None, torch.randn(9, 1, 8, 8)):
        run = Distillation(tiny_quantized, None, tiny_calibration_set, config, data)
        trajectory, sample = run.fresh_states(rows, torch.Generator().manual_seed(4))
        clean = tiny_calibration_set.trajectory[:14, -1] if data is None else data  # never a held-out one
        generator = torch.Generator().manual_seed(4)
        picked = torch.randint(0, len(clean), (4,), generator=generator)
        noise = torch.randn(4, 1, 8, 8, generator=generator)
        torch.testing.assert_close(sample, (alpha * clean[picked] + sigma * noise).float())
        assert torch.equal(trajectory, picked if data is None else torch.zeros(4, dtype=torch.long))


# The switches


@pytest.fixture
def calls(tiny_quantized: UNet2DModel) -> tuple[UNet2DModel, list[int]]:
    """A teacher, and the batch sizes of its calls."""
    teacher, sizes = copy.deepcopy(tiny_quantized), []
    teacher.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["sample"])), with_kwargs=True)
    return teacher, sizes


def test_the_loss_is_the_sum_of_its_terms(
    tiny_quantized: UNet2DModel, calls: tuple[UNet2DModel, list[int]], tiny_calibration_set: CalibrationSet
) -> None:
    run = run_of(tiny_quantized, calls[0], tiny_calibration_set, calibration_weight=3.0, seed=0)
    loss, terms = run.losses(tiny_quantized, 5, 0)
    assert list(terms) == ["teacher", "calibration"]
    assert loss.item() == pytest.approx(terms["teacher"].item() + 3 * terms["calibration"].item(), rel=1e-5)
    generator = torch.Generator().manual_seed(5 * 8191)
    rows = torch.randint(0, 2, (4,), generator=generator)
    trajectories, sample = run.fresh_states(rows, generator)
    with torch.no_grad():
        target = run.teacher_target(calls[0], run.train_set, trajectories, rows, sample)
        output = tiny_quantized(sample, run.student_grid.timestep[rows]).sample
        expected = weighted_error(output, target, run.weight[rows]).item()
        rows = torch.randint(0, 2, (4,), generator=generator)
        trajectories = torch.randint(0, 14, (4,), generator=generator)  # never a held-out one
        sample, target = run.recorded(tiny_calibration_set, trajectories, rows)
        output = tiny_quantized(sample, run.student_grid.timestep[rows]).sample
    assert terms["teacher"].item() == pytest.approx(expected, rel=1e-5)
    expected = weighted_error(output, target, run.weight[rows]).item()
    assert terms["calibration"].item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("switches", "terms"),
    [
        ({}, {"teacher", "calibration"}),
        ({"calibration": False}, {"teacher"}),
        ({"calibration_weight": 0.0}, {"teacher"}),
        ({"teacher": "none"}, {"calibration"}),
    ],
    ids=["all", "calibration off", "calibration of no weight", "no teacher"],
)
def test_every_switch_changes_what_is_learned_from(
    tiny_quantized: UNet2DModel, calls: tuple[UNet2DModel, list[int]], tiny_calibration_set: CalibrationSet,
    switches: dict[str, object], terms: set[str],
) -> None:  # fmt: skip
    teacher, sizes = calls
    start = copy.deepcopy(tiny_quantized)
    given = None if switches.get("teacher") == "none" else teacher
    (stats,) = train(tiny_quantized, given, tiny_calibration_set, max_train_steps=1, **switches)
    assert set(stats.losses) == terms
    assert bool(sizes) == (given is not None)
    assert stats.loss > 0
    assert bits_by_module(tiny_quantized) == bits_by_module(start)


# Models with conditions


def recorded_with(kind: str) -> tuple[nn.Module, nn.Module, CalibrationSet]:
    """The denoiser of a tiny pipeline, a copy with 4 bits, and 8 trajectories of 4 steps."""
    pipeline, about = PIPELINES[kind].build(), PIPELINES[kind]
    pipeline.scheduler = deterministic_scheduler(pipeline.scheduler)[0]
    calibration = collect_calibration_set(
        pipeline, about.inputs[:8], num_inference_steps=4, seed=0, progress=False, **about.arguments
    )
    model = getattr(pipeline, about.denoiser)
    config = PQCADConfig()
    student = prepare_(copy.deepcopy(model), config, dict.fromkeys(match_modules(model, config), 4))
    return model, student, calibration


@pytest.mark.parametrize("kind", ["sd", "sd_controlnet", "flux", "wan"])
def test_each_state_has_the_condition_of_its_trajectory_and_step(kind: str) -> None:
    """The model that recorded lands where it was recorded: with another prompt or step, it would not."""
    model, student, calibration = recorded_with(kind)
    run = run_of(student, model, calibration, teacher="fp", fold_guidance=False)
    errors = errors_per_jump(run, model, as_teacher=True)
    assert errors.max() < 1e-7 * run.held_out.model_output.square().mean()
    model.eval()
    run.student_grid, run.grid = run.grid, run.grid  # jumps of one step: the recorded outputs are the targets
    run.terms = {"calibration": TERMS["calibration"]._replace(draw=one_step_draw)}
    loss, _ = run.losses(model, 0, 0)
    assert loss < 1e-7 * run.train_set.model_output[:, 0].square().mean()


def one_step_draw(run: Distillation, generator: torch.Generator) -> Draw:
    """Recorded states and outputs of the first step of each jump."""
    jump, trajectory = torch.tensor([0, 0, 0]), torch.tensor([3, 0, 2])
    data = run.train_set
    return Draw(trajectory, jump, data.states(trajectory, jump), data.outputs(trajectory, jump), torch.ones(3))


def test_conditions_that_change_with_the_step_keep_their_states() -> None:
    """A ControlNet's residuals hold for the recorded states alone: the teacher starts from those."""
    model, student, calibration = recorded_with("sd_controlnet")
    run = run_of(student, model, calibration, teacher="fp")
    jump = torch.tensor([1, 0, 1, 1])
    trajectory, state = run.fresh_states(jump, torch.Generator().manual_seed(0))
    assert torch.equal(state, run.train_set.trajectory[trajectory, 2 * jump])
    draw = TERMS["teacher"].draw(run, torch.Generator().manual_seed(1))
    recorded = run.recorded(run.train_set, draw.trajectory, draw.jump)[1]
    assert (draw.target - recorded).norm() < 1e-3 * recorded.norm()  # where two of its own steps led


def test_data_of_a_model_with_conditions_are_refused() -> None:
    _, student, calibration = recorded_with("sd")
    with pytest.raises(ValueError, match="data: fresh inputs of a model with conditions need theirs"):
        train(student, None, calibration, teacher="none", data=torch.zeros(3, 4, 8, 8))


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_a_student_with_conditions_learns(kind: str) -> None:
    _, student, calibration = recorded_with(kind)
    teacher, (_, held_out) = copy.deepcopy(student), calibration.split()
    settings = {"max_train_steps": 8, "evaluation_steps": 4, "train_batch_size": 8, "fold_guidance": False}
    stats = train(student, teacher, calibration, **settings)
    assert set(stats[0].losses) == {"teacher", "calibration"}
    assert stats[-1].best_step > 0
    assert trajectory_error(student, held_out, 2) <= stats[-1].best_error
    assert all(quantizer.enabled and quantizer.scale is not None for quantizer in input_quantizers(student))


# Guidance in one branch


GUIDED = ["sd", "sd_img2img", "sd_controlnet", "sdxl", "sd3", "aura", "dit", "pixart", "wan"]


def steps_of_pipeline(kind: str, num_images: int, **arguments: float) -> list[TappedStep]:
    """The steps of a tiny pipeline, as its own guidance has them."""
    pipeline, about = PIPELINES[kind].build(), PIPELINES[kind]
    pipeline.scheduler = deterministic_scheduler(pipeline.scheduler)[0]
    steps: list[TappedStep] = []

    def keep(step: TappedStep) -> None:
        steps.append(step)
        if len(steps) == 4:
            raise Stop

    generators = [image_generator(0, index) for index in range(num_images)]
    given = about.arguments | together(about.inputs[:num_images]) | arguments
    run_tapped(pipeline, keep, num_inference_steps=4, generator=generators, **given)
    return steps


@pytest.mark.parametrize("kind", GUIDED)
def test_a_student_that_folds_is_called_as_its_pipeline_is_without_guidance(kind: str) -> None:
    model, student, calibration = recorded_with(kind)
    run = run_of(student, None, calibration, teacher="none")
    k = torch.zeros(2, dtype=torch.long)  # a ControlNet's condition is that of the recorded state, and so the first
    step = steps_of_pipeline(kind, 2, guidance_scale=1.0)[0]
    (call,) = step.calls
    assert len(call.output) == 2
    condition = run.calibration.condition(torch.arange(2), k)
    with torch.no_grad():
        found = run.calibration.denoiser(model)(step.state, call.arguments["timestep"].expand(2), condition)
    torch.testing.assert_close(found, step.output, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", GUIDED)
def test_a_student_that_folds_learns_what_the_guided_pipeline_does(kind: str) -> None:
    """Both terms' targets, from the pipeline's own guidance: from its states they lead two of its steps on."""
    model, student, calibration = recorded_with(kind)
    run = run_of(student, model, calibration, teacher="fp")
    first, second = steps_of_pipeline(kind, 2)[:2]
    jump, trajectory = torch.tensor([0, 0]), torch.arange(2)
    state = first.state[:2]
    of_teacher = run.teacher_target(model, run.train_set, trajectory, jump, state)
    recorded, of_recording = run.recorded(run.train_set, trajectory, jump)
    torch.testing.assert_close(recorded, state)
    for target in (of_teacher, of_recording):
        landing = run.student_grid.step(jump, state, target)
        torch.testing.assert_close(landing, second.next_state[:2], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_a_student_that_folds_comes_closer_in_one_branch(kind: str) -> None:
    _, student, calibration = recorded_with(kind)
    settings = {"max_train_steps": 16, "evaluation_steps": 4, "train_batch_size": 8, "float_rate": 3e-2}
    stats = train(student, freeze_(copy.deepcopy(student)), calibration, **settings)
    losses = [entry.losses["calibration"] for entry in stats]
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    if kind == "sd":  # what random weights make of six prompts says nothing of a seventh in SD3
        assert stats[-1].best_step > 0


def test_folding_is_the_default_of_guided_models_alone(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    plan = tiny_calibration_set.plan
    assert not DistillConfig().folds(plan)
    assert not DistillConfig(fold_guidance=False).folds(plan)
    with pytest.raises(ValueError, match=r"^fold_guidance: expected a model that is guided .* got weights \(1.0,\)"):
        run_of(tiny_quantized, None, tiny_calibration_set, teacher="none", fold_guidance=True)
    _, student, calibration = recorded_with("sd")
    for fold_guidance, branches in ((None, (1,)), (True, (1,)), (False, (2,))):
        run = run_of(student, None, calibration, teacher="none", fold_guidance=fold_guidance)
        assert run.calibration.plan.branches == branches
        assert run.teacher_plan.branches == (2,)


# Halvings


def test_a_student_of_as_many_steps_learns_what_was_recorded(
    tiny_quantized: UNet2DModel, tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    run = Distillation(
        tiny_quantized, tiny_unet, tiny_calibration_set, dataclasses.replace(QUICK, teacher="fp"), stride=1
    )
    assert run.num_steps == 4
    trajectory, jump = torch.tensor([3, 0, 2, 1]), torch.arange(4)
    state, target = run.recorded(run.train_set, trajectory, jump)
    wanted = run.train_set.outputs(trajectory, jump)
    torch.testing.assert_close(target, wanted, rtol=1e-4, atol=1e-4)
    found = run.teacher_target(tiny_unet, run.train_set, trajectory, jump, state)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_second_halving_learns_from_the_first_student_and_the_recording(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    halved = tiny_calibration_set.every(2)
    teacher, student = freeze_(copy.deepcopy(tiny_quantized)), tiny_quantized
    run = Distillation(student, teacher, halved, QUICK)
    assert (run.num_steps, run.grid.timestep.tolist(), run.student_grid.timestep.tolist()) == (1, [999, 499], [999])
    trajectory, jump = torch.tensor([5, 2]), torch.tensor([0, 0])
    state, target = run.recorded(run.train_set, trajectory, jump)
    landing = run.student_grid.step(jump, state, target)
    torch.testing.assert_close(landing, tiny_calibration_set.trajectory[[5, 2], 4], rtol=0, atol=1e-5)
    assert errors_per_jump(run, teacher, as_teacher=True).shape == (1,)
    stats = train(student, teacher, halved)
    assert timestep_boundaries(student) == []
    assert len(stats) == 6


# Training


def test_training_lowers_the_held_out_trajectory_error(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    teacher, (_, held_out) = copy.deepcopy(tiny_quantized), tiny_calibration_set.split()
    teacher_state = {name: value.clone() for name, value in teacher.state_dict().items()}
    start = trajectory_error(tiny_quantized, held_out, 2)
    stats = train(
        tiny_quantized, teacher, tiny_calibration_set, max_train_steps=10, train_batch_size=8, evaluation_steps=5
    )
    errors = {entry.step: entry.held_out_error for entry in stats if entry.held_out_error is not None}
    assert list(errors) == [5, 10]
    assert stats[-1].best_step in errors
    assert stats[-1].best_error == min(errors.values()) < start
    assert trajectory_error(tiny_quantized, held_out, 2) <= stats[-1].best_error
    assert timestep_boundaries(tiny_quantized) == [749]  # ranges of the student's own two steps
    assert all(torch.equal(value, teacher_state[name]) for name, value in teacher.state_dict().items())


def test_statistics_count_the_updates(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = SimpleNamespace(perf_counter=itertools.count(step=0.5).__next__)  # half a second between two looks at it
    monkeypatch.setattr(distillation_module, "time", clock)
    stats = train(tiny_quantized, None, tiny_calibration_set, teacher="none", max_train_steps=5)
    assert [entry.step for entry in stats] == [1, 2, 3, 4, 5]
    warm_up, decay = [1 / 11, 2 / 11, 3 / 11, 4 / 11, 5 / 11], [1, 0.8, 0.6, 0.4, 0.2]
    expected = [QUICK.step_rate * up * down for up, down in zip(warm_up, decay, strict=True)]
    assert [entry.step_rate for entry in stats] == pytest.approx(expected)
    assert [entry.step for entry in stats if entry.held_out_error is not None] == [2, 4, 5]  # and always the last
    assert [entry.images_per_second for entry in stats] == [QUICK.train_batch_size / 0.5] * 5


def test_the_undistilled_start_is_kept_when_training_only_harms(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    before = copy.deepcopy(tiny_quantized)
    stats = train(
        tiny_quantized,
        copy.deepcopy(tiny_quantized),
        tiny_calibration_set,
        step_rate=100.0,
        max_train_steps=2,
    )
    assert stats[-1].best_step == 0
    assert not stats[-1].held_out_error <= stats[-1].best_error
    reference, layers = dict(before.named_parameters()), dict(tiny_quantized.named_parameters())
    assert all(torch.equal(value, reference[name]) for name, value in layers.items())
    _, held_out = tiny_calibration_set.split()
    assert trajectory_error(tiny_quantized, held_out, 2) <= stats[-1].best_error


def test_end_points_are_the_default_data(tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet) -> None:
    teacher = copy.deepcopy(tiny_quantized)
    end_points = tiny_calibration_set.split()[0].trajectory[:, -1]
    losses = [
        train(copy.deepcopy(tiny_quantized), teacher, tiny_calibration_set, max_train_steps=1, data=data)[0].losses
        for data in (None, end_points, torch.zeros(5, 1, 8, 8))
    ]
    assert losses[0] == losses[1]
    assert losses[0]["teacher"] != losses[2]["teacher"]


def test_repeating_gives_the_same_bits_and_another_seed_others(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    teacher, students = copy.deepcopy(tiny_quantized), []
    for seed in (0, 0, 1):
        torch.randn(len(students) + 1)  # the global generator plays no part
        students.append(copy.deepcopy(tiny_quantized))
        stats = train(students[-1], teacher, tiny_calibration_set, seed=seed, max_train_steps=20)
        assert stats[-1].best_step > 0
    assert same_state(students[0], students[1])
    assert not same_state(students[0], students[2])


class Killed(BaseException):
    """Stands for a signal: no handler in the package may catch it."""


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_a_run_that_is_killed_at_every_save_ends_in_the_same_bits(
    tiny_quantized: UNet2DModel,
    tiny_calibration_set: CalibrationSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trainable: str,
) -> None:
    teacher, straight = copy.deepcopy(tiny_quantized), copy.deepcopy(tiny_quantized)
    config = dataclasses.replace(QUICK, trainable=trainable, rank=2)
    wanted = train(straight, teacher, tiny_calibration_set, trainable=trainable, rank=2)
    kills, seen = 0, []

    def save_and_die(*args: object) -> None:
        nonlocal kills
        save_checkpoint(*args)
        kills += 1
        raise Killed

    monkeypatch.setattr(distillation_module, "save_checkpoint", save_and_die)
    for _ in range(20):
        student = copy.deepcopy(tiny_quantized)
        try:
            for entry in distill(student, teacher, tiny_calibration_set, config, checkpoint=tmp_path / "cad"):
                seen.append(entry)
            break
        except Killed:
            continue
    assert kills == 3
    assert same_state(student, straight)
    assert [entry.step for entry in seen] == [1, 2, 3, 4, 5, 6]  # reported before it is saved: no log has a gap
    for entry, other in zip(seen, wanted, strict=True):
        for name in ("loss", "losses", "step_rate", "best_error"):
            assert getattr(entry, name) == getattr(other, name), name


def test_a_truncated_resume_file_is_refused(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, tmp_path: Path
) -> None:
    path = tmp_path / "cad.safetensors"
    save_checkpoint(path, {"weight": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="cad.safetensors.*damaged"):
        train(tiny_quantized, None, tiny_calibration_set, teacher="none", checkpoint=path)


def test_stopped_early_the_student_is_the_best_state_so_far(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    config = dataclasses.replace(QUICK, teacher="none", step_rate=10.0, evaluation_steps=1)  # training only harms
    start = copy.deepcopy(tiny_quantized)
    for entry in distill(tiny_quantized, None, tiny_calibration_set, config):
        if entry.step == 2:
            break
    assert entry.best_step == 0
    weights = {name: latent_weight(layer) for name, layer in fake_quant_layers(tiny_quantized).items()}
    assert all(torch.equal(weights[name], latent_weight(layer)) for name, layer in fake_quant_layers(start).items())


@pytest.mark.parametrize("after", [0.5, 1.0, float("nan")])
def test_new_ranges_are_kept_only_if_the_images_come_closer(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, monkeypatch: pytest.MonkeyPatch, after: float
) -> None:
    calibrated: list[dict[str, torch.Tensor]] = []
    calibrate, errors, falling = Distillation.calibrate_activations, iter([1.0, after]), iter(range(9, 0, -1))

    def watch(run: Distillation) -> None:
        calibrate(run)
        calibrated.append({q.name: q.scale.clone() for q in input_quantizers(run.student)})

    monkeypatch.setattr(Distillation, "calibrate_activations", watch)
    monkeypatch.setattr(Distillation, "image_error", lambda run: next(errors))
    monkeypatch.setattr(Distillation, "trajectory_error", lambda run: next(falling))
    train(tiny_quantized, None, tiny_calibration_set, teacher="none", step_rate=1.0, float_rate=0.1)
    first, last = calibrated
    found = {q.name: q.scale for q in input_quantizers(tiny_quantized)}
    assert any(not torch.equal(first[name], last[name]) for name in first)
    expected = last if after < 1 else first
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_resume_file_of_another_student_or_teacher_is_refused(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, tmp_path: Path
) -> None:
    path, start, teacher = tmp_path / "cad.safetensors", copy.deepcopy(tiny_quantized), copy.deepcopy(tiny_quantized)
    train(tiny_quantized, teacher, tiny_calibration_set, checkpoint=path)
    other = copy.deepcopy(start)
    with torch.no_grad():
        other.conv_in.bias.add_(0.1)
    with pytest.raises(ValueError, match="begun with other settings.*student"):
        train(copy.deepcopy(other), teacher, tiny_calibration_set, checkpoint=path)
    with pytest.raises(ValueError, match="begun with other settings.*teacher"):
        train(copy.deepcopy(start), other, tiny_calibration_set, checkpoint=path)
    with pytest.raises(ValueError, match="begun with other settings.*data"):
        train(copy.deepcopy(start), teacher, tiny_calibration_set, checkpoint=path, data=torch.zeros(2, 1, 8, 8))


def test_the_largest_seed_draws(tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet) -> None:
    train(tiny_quantized, None, tiny_calibration_set, teacher="none", seed=2**32 - 1, max_train_steps=1)


@pytest.mark.fast
@pytest.mark.parametrize("name", ["max_train_steps", "train_batch_size", "evaluation_steps", "rank", "lora_alpha"])
def test_settings_out_of_range_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected at least 1, got 0"):
        DistillConfig(**{name: 0})


def test_a_resume_file_of_other_settings_is_refused(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, tmp_path: Path
) -> None:
    path, start = tmp_path / "cad.safetensors", copy.deepcopy(tiny_quantized)
    train(tiny_quantized, None, tiny_calibration_set, teacher="none", checkpoint=path)
    with pytest.raises(ValueError, match="cad.safetensors was begun with other settings.*step_rate"):
        train(copy.deepcopy(start), None, tiny_calibration_set, teacher="none", step_rate=0.5, checkpoint=path)
    few = tiny_calibration_set.select(slice(0, 8))
    with pytest.raises(ValueError, match="num_trajectories"):
        train(copy.deepcopy(start), None, few, teacher="none", checkpoint=path)


# What is refused


@pytest.mark.fast
def test_settings_that_leave_nothing_to_learn_from_are_refused() -> None:
    with pytest.raises(ValueError, match="nothing to learn from"):
        DistillConfig(teacher="none", calibration=False)
    with pytest.raises(ValueError, match="calibration_weight=0.0 leaves nothing to learn from"):
        DistillConfig(teacher="none", calibration_weight=0.0)
    with pytest.raises(ValueError, match="expected 'quantized', 'fp' or 'none', got 'float'"):
        DistillConfig(teacher="float")


@pytest.mark.parametrize(("teacher", "given"), [("none", True), ("quantized", False), ("fp", False)])
def test_a_teacher_that_is_missing_or_not_wanted_is_refused(
    tiny_quantized: UNet2DModel,
    tiny_unet: UNet2DModel,
    tiny_calibration_set: CalibrationSet,
    teacher: str,
    given: bool,
) -> None:
    with pytest.raises(ValueError, match=f"teacher='{teacher}', but teacher is {'given' if given else 'missing'}"):
        train(tiny_quantized, tiny_unet if given else None, tiny_calibration_set, teacher=teacher)


def test_a_float_teacher_of_another_set_is_refused(
    tiny_quantized: UNet2DModel, tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    train(copy.deepcopy(tiny_quantized), tiny_unet, tiny_calibration_set, teacher="fp", max_train_steps=1)
    with torch.no_grad():
        tiny_unet.conv_out.bias.add_(1e-3)
    for teacher in (tiny_unet, tiny_quantized):
        with pytest.raises(ValueError, match="not the model that the calibration set was recorded with"):
            train(copy.deepcopy(tiny_quantized), teacher, tiny_calibration_set, teacher="fp")


def test_a_float_student_is_refused(
    tiny_unet: UNet2DModel, tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    with pytest.raises(ValueError, match="expected a fake-quantized model, as progressive_quantize leaves it"):
        train(tiny_unet, tiny_quantized, tiny_calibration_set)


# Scales or an adapter alone


def packed_state(model: nn.Module) -> dict[str, Tensor]:
    return clone_state(convert_(copy.deepcopy(model)))


@pytest.mark.parametrize("stride", [1, 2])
def test_below_an_adapter_everything_stays_as_it_is(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, stride: int
) -> None:
    """Packed integers, scales, biases, norms, float layers and activation ranges: other adapters may share them."""
    before, packed = fake_quant_state(copy.deepcopy(tiny_quantized)), packed_state(tiny_quantized)
    config = dataclasses.replace(QUICK, trainable="lora", rank=2, lora_rate=1e-2, teacher="none")
    stats = list(distill(tiny_quantized, None, tiny_calibration_set, config, stride=stride))
    assert stats[-1].best_step > 0
    adapter = take_adapter_(tiny_quantized)
    assert all(value.any() for value in adapter.tensors.values())
    after = fake_quant_state(tiny_quantized)
    assert after["bits"] == before["bits"]
    assert after["timestep_boundaries"] == before["timestep_boundaries"]
    assert after["tensors"].keys() == before["tensors"].keys()
    assert all(torch.equal(value, before["tensors"][name]) for name, value in after["tensors"].items())
    again = packed_state(tiny_quantized)
    assert all(torch.equal(value, again[name]) for name, value in packed.items())


def test_below_an_adapter_weights_are_rounded_once_and_have_no_gradients(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, rounded = [], fake_quant_module.fake_quantize_weight

    def watch(weight: Tensor, scale: Tensor, spec: object) -> Tensor:
        calls.append(weight.requires_grad or scale.requires_grad)
        return rounded(weight, scale, spec)

    monkeypatch.setattr(fake_quant_module, "fake_quantize_weight", watch)
    train(tiny_quantized, None, tiny_calibration_set, teacher="none", trainable="lora", rank=2)
    assert calls == [False] * len(fake_quant_layers(tiny_quantized))
    assert all(parameter.requires_grad for parameter in tiny_quantized.parameters())  # as before


def test_an_adapter_that_the_student_carries_is_the_one_that_is_trained(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    add_adapter_(tiny_quantized, rank=3, lora_alpha=6, target_modules=["conv1"], seed=1)
    first = clone_state(tiny_quantized)
    settings = {"trainable": "lora", "rank": 2, "lora_rate": 1e-2, "max_train_steps": 20}
    train(tiny_quantized, None, tiny_calibration_set, teacher="none", **settings)
    num_layers = sum(name.endswith("conv1.lora_A.default.weight") for name in first)
    assert adapter_facts(tiny_quantized) == {"rank": 3, "num_layers": num_layers}
    moved = {name for name, value in tiny_quantized.state_dict().items() if not torch.equal(value, first[name])}
    assert moved == {name for name in first if ".lora_" in name}


def test_an_adapter_is_left_alone_by_what_trains_all(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    add_adapter_(tiny_quantized, rank=3, lora_alpha=6, target_modules=["to_v"], seed=1)
    first = clone_state(tiny_quantized)
    train(tiny_quantized, None, tiny_calibration_set, teacher="none")
    moved = {name for name, value in tiny_quantized.state_dict().items() if not torch.equal(value, first[name])}
    assert moved
    assert not any(".lora_" in name for name in moved)


def test_scales_are_trained_without_any_weight(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    first = clone_state(tiny_quantized)
    stats = train(tiny_quantized, None, tiny_calibration_set, teacher="none", trainable="scales", max_train_steps=20)
    assert stats[-1].best_step > 0
    moved = {name for name, value in tiny_quantized.state_dict().items() if not torch.equal(value, first[name])}
    scales = {name for name in first if name.endswith("parametrizations.weight.0.scale")}
    assert scales <= moved
    weights = {weight.name for weight in float_weights(tiny_quantized)}
    assert {"conv_in.weight", "down_blocks.0.resnets.0.conv1.parametrizations.weight.original"} <= weights
    assert not moved & (weights - scales)


def test_an_adapter_from_elsewhere_is_repaired_on_a_base_that_was_quantized_without(
    tiny_pipeline: DDIMPipeline, tiny_quantized: UNet2DModel
) -> None:
    """By the recording of the float model with it, which is of another model than the base's."""
    model = add_adapter_(tiny_pipeline.unet, rank=2, lora_alpha=None, target_modules=["to_q", "conv1"], seed=1)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            nn.init.normal_(parameter, std=0.1)
    recorded = collect_calibration_set(
        tiny_pipeline, num_trajectories=16, num_inference_steps=2, seed=1, progress=False
    )
    with pytest.raises(ValueError, match="it was quantized from another model"):
        train(copy.deepcopy(tiny_quantized), None, recorded, teacher="none", trainable="lora")
    student = put_adapter_(tiny_quantized, take_adapter_(copy.deepcopy(model)))
    config = dataclasses.replace(QUICK, teacher="fp", trainable="lora", max_train_steps=80)
    before = trajectory_error(student, recorded.split()[1], 2)
    stats = list(distill(student, model, recorded, config, stride=1))
    assert stats[-1].best_error < before


def test_a_float_student_learns_fewer_steps_by_an_adapter_alone(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    start, before = copy.deepcopy(tiny_unet), clone_state(tiny_unet)
    for stride in (2, 4):  # the same adapter goes on
        config = dataclasses.replace(QUICK, teacher="fp", trainable="lora", rank=4, lora_rate=1e-2, max_train_steps=20)
        stats = list(distill(tiny_unet, start, tiny_calibration_set, config, stride=stride))
        assert stats[-1].best_error < trajectory_error(start, tiny_calibration_set.split()[1], 4 // stride)
    take_adapter_(tiny_unet)
    assert all(torch.equal(value, before[name]) for name, value in tiny_unet.state_dict().items())


def test_a_teacher_that_is_another_keeps_the_student_without_an_adapter(
    tiny_unet: UNet2DModel, tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    """What is refused is refused before the student changes."""
    for student, changes in ((tiny_unet, {"target_modules": ["nowhere"]}), (tiny_quantized, {"teacher": "none"})):
        before = student.state_dict().keys()
        with pytest.raises(ValueError, match="target_modules|teacher"):
            train(student, tiny_quantized, tiny_calibration_set, trainable="lora", **changes)
        assert student.state_dict().keys() == before


def test_an_odd_number_of_steps_is_refused(tiny_quantized: UNet2DModel, tiny_pipeline: DDIMPipeline) -> None:
    odd = collect_calibration_set(tiny_pipeline, num_trajectories=4, num_inference_steps=5, seed=0, progress=False)
    with pytest.raises(ValueError, match="num_inference_steps=5 is odd"):
        train(tiny_quantized, None, odd, teacher="none")


def test_too_few_trajectories_are_refused(tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet) -> None:
    with pytest.raises(ValueError, match="at least 4 trajectories"):
        train(tiny_quantized, None, tiny_calibration_set.select(slice(0, 3)), teacher="none")


def test_a_set_of_another_model_than_the_students_is_refused(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    other = copy.copy(tiny_calibration_set)
    other.manifest = tiny_calibration_set.manifest | {"model_hash": "0" * 64}
    with pytest.raises(ValueError, match="another model"):
        train(tiny_quantized, copy.deepcopy(tiny_quantized), other, max_train_steps=1)


def test_a_further_term_is_a_function_and_an_entry(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ends(run: Distillation, generator: torch.Generator) -> Draw:
        """The last jump of recorded trajectories, whose landing is the image."""
        trajectory = torch.randint(0, len(run.train_set), (3,), generator=generator)
        jump = torch.full((3,), len(run.student_grid) - 1)
        return Draw(trajectory, jump, *run.recorded(run.train_set, trajectory, jump), torch.ones(3))

    monkeypatch.setitem(TERMS, "ends", Term(lambda config: 2.0, ends))
    run = run_of(tiny_quantized, None, tiny_calibration_set, teacher="none")
    loss, terms = run.losses(tiny_quantized, 0, 0)
    assert list(terms) == ["calibration", "ends"]
    assert loss.item() == pytest.approx(terms["calibration"].item() + 2 * terms["ends"].item(), rel=1e-5)
    stats = list(train(tiny_quantized, None, tiny_calibration_set, teacher="none", max_train_steps=2))
    assert all(list(entry.losses) == ["calibration", "ends"] for entry in stats)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_grad_norm", 0.0, "max_grad_norm: expected more than 0"),
        ("max_grad_norm", float("nan"), "max_grad_norm: expected more than 0"),
        ("ema_decay", 1.0, "ema_decay: expected 0 to below 1"),
        ("ema_decay", -0.1, "ema_decay: expected 0 to below 1"),
        ("lora_rate", -0.1, "lora_rate: expected at least 0"),
        ("trainable", "none", "trainable: expected 'all', 'scales' or 'lora', got 'none'"),
    ],
)
def test_what_would_train_nothing_is_refused(name: str, value: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillConfig(**{name: value})
