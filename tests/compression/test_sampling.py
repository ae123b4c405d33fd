"""Specification of the DDIM arithmetic, against diffusers' own scheduler and pipeline."""

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    PNDMScheduler,
    UNet2DModel,
)
from torch import Tensor

from diffusers_pqcad.compression.sampling import (
    PREDICTION_TYPES,
    alpha_sigma,
    denoise,
    from_x_and_eps,
    generate,
    initial_noise,
    previous_timesteps,
    sample_shape,
    step_gain,
    timestep_grid,
    to_x_and_eps,
)

pytestmark = pytest.mark.fast


def ddim(prediction_type: str = "v_prediction", **settings) -> DDIMScheduler:
    """A trailing DDIM scheduler whose table is in float64, so that it is an oracle."""
    defaults = {"timestep_spacing": "trailing", "clip_sample": False}
    scheduler = DDIMScheduler(prediction_type=prediction_type, **defaults | settings)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return scheduler


def double_noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_a_ddim_step_is_that_of_diffusers(prediction_type: str, set_alpha_to_one: bool) -> None:
    scheduler = ddim(prediction_type, set_alpha_to_one=set_alpha_to_one)
    scheduler.set_timesteps(20)
    sample, output = double_noise(2, 1, 4, 4), double_noise(2, 1, 4, 4)
    for timestep in scheduler.timesteps:
        previous = previous_timesteps(scheduler, timestep, 20)
        (alpha_t, sigma_t), (alpha_u, sigma_u) = alpha_sigma(scheduler, timestep), alpha_sigma(scheduler, previous)
        x, eps = to_x_and_eps(output, sample, alpha_t, sigma_t, prediction_type)
        expected = scheduler.step(output, timestep, sample, eta=0.0)
        # rtol 1e-5: alpha and sigma are fp32 (6e-8), and 1 / alpha is up to 150 at t = 999.
        torch.testing.assert_close(alpha_u * x + sigma_u * eps, expected.prev_sample, rtol=1e-5, atol=2e-5)
        torch.testing.assert_close(x, expected.pred_original_sample, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("set_alpha_to_one", [True, False])
def test_alpha_and_sigma(set_alpha_to_one: bool) -> None:
    scheduler = ddim(set_alpha_to_one=set_alpha_to_one)
    betas = np.linspace(0.0001, 0.02, 1000, dtype=np.float64)
    alphas_cumprod = np.cumprod(1 - betas)
    timesteps = torch.tensor([[999, 500], [0, -1]])
    alpha, sigma = alpha_sigma(scheduler, timesteps)
    final = 1.0 if set_alpha_to_one else alphas_cumprod[0]
    expected = np.array([[alphas_cumprod[999], alphas_cumprod[500]], [alphas_cumprod[0], final]])
    assert alpha.dtype == sigma.dtype == torch.float32
    # diffusers' own table is an fp32 cumulative product: 1000 factors, each rounded (6e-8).
    np.testing.assert_allclose(alpha.numpy(), np.sqrt(expected), rtol=2e-5)
    np.testing.assert_allclose(sigma.numpy(), np.sqrt(1 - expected), rtol=5e-4)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_outputs_and_x_eps_are_inverse(prediction_type: str) -> None:
    scheduler = ddim(prediction_type)
    timesteps = torch.tensor([999, 500, 20])
    alpha, sigma = (value.double().view(-1, 1, 1, 1) for value in alpha_sigma(scheduler, timesteps))
    norm = (alpha**2 + sigma**2).sqrt()  # of fp32 values: 1 up to 6e-8
    alpha, sigma = alpha / norm, sigma / norm
    x, eps = double_noise(3, 1, 4, 4), double_noise(3, 1, 4, 4)
    sample = alpha * x + sigma * eps
    output = from_x_and_eps(x, eps, alpha, sigma, prediction_type)
    for actual, expected in zip(to_x_and_eps(output, sample, alpha, sigma, prediction_type), (x, eps), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_velocity_by_hand() -> None:
    """v = alpha eps - sigma x, with alpha = 0.6, sigma = 0.8, x = 1, eps = 2."""
    alpha, sigma, x, eps = (torch.tensor(value, dtype=torch.float64) for value in (0.6, 0.8, 1.0, 2.0))
    v = from_x_and_eps(x, eps, alpha, sigma, "v_prediction")
    assert v.item() == pytest.approx(0.4)
    assert [value.item() for value in to_x_and_eps(v, alpha * x + sigma * eps, alpha, sigma, "v_prediction")] == (
        pytest.approx([1.0, 2.0])
    )


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_step_gain_is_the_derivative_of_the_step(prediction_type: str) -> None:
    scheduler = ddim(prediction_type)
    timesteps = timestep_grid(scheduler, 20)
    scheduler.set_timesteps(20)
    gains = step_gain(scheduler, timesteps, previous_timesteps(scheduler, timesteps, 20))
    sample, output = double_noise(3), double_noise(3)
    for timestep, gain in zip(timesteps, gains, strict=True):
        low = scheduler.step(output, timestep, sample).prev_sample
        high = scheduler.step(output + 1, timestep, sample).prev_sample  # the step is affine in the output
        torch.testing.assert_close((high - low).abs(), gain.double().expand(3), rtol=1e-4, atol=1e-6)


def test_grids_nest_and_equal_those_of_diffusers() -> None:
    scheduler = ddim()
    for num_steps in (1, 2, 5, 10, 20, 40, 50, 1000):
        grid = timestep_grid(scheduler, num_steps)
        scheduler.set_timesteps(num_steps)
        assert grid.dtype == torch.int64
        assert torch.equal(grid, scheduler.timesteps)
        assert previous_timesteps(scheduler, grid, num_steps).tolist() == [*grid.tolist()[1:], -1]
        if num_steps % 2 == 0:
            assert torch.equal(grid[::2], timestep_grid(scheduler, num_steps // 2))


@pytest.mark.parametrize("num_steps", [0, -10, 3, 30, 1001, 2000])
def test_a_number_of_steps_that_leaves_the_grid_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps={num_steps} must divide num_train_timesteps=1000"):
        timestep_grid(ddim(), num_steps)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_grids_that_do_not_nest_are_refused(spacing: str) -> None:
    with pytest.raises(ValueError, match="timestep_spacing: expected 'trailing'"):
        timestep_grid(ddim(timestep_spacing=spacing), 20)


@pytest.mark.parametrize(
    "settings", [{"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}], ids=["cosine", "zero_snr"]
)
def test_an_epsilon_model_needs_signal_at_the_start(settings: dict) -> None:
    with pytest.raises(ValueError, match="an epsilon-prediction model cannot start at timestep 999"):
        timestep_grid(ddim("epsilon", **settings), 20)
    for prediction_type in ("v_prediction", "sample"):
        assert len(timestep_grid(ddim(prediction_type, **settings), 20)) == 20
    assert len(timestep_grid(ddim("epsilon"), 20)) == 20


@pytest.mark.parametrize("scheduler_type", [DDPMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, LCMScheduler])
def test_other_samplers_are_refused(scheduler_type: type) -> None:
    """PNDM and LCM have every attribute of DDIM, but their steps are not DDIM's."""
    with pytest.raises(ValueError, match=f"expected a DDIMScheduler, got {scheduler_type.__name__}"):
        timestep_grid(scheduler_type(timestep_spacing="trailing"), 20)


def test_unknown_prediction_types_are_refused() -> None:
    one = torch.ones(1)
    for function in (to_x_and_eps, from_x_and_eps):
        with pytest.raises(ValueError, match="prediction_type: expected one of"):
            function(one, one, one, one, "flow")
    scheduler = ddim()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type: expected one of"):
        timestep_grid(scheduler, 20)


def test_noise_does_not_depend_on_the_batches() -> None:
    whole = initial_noise((1, 8, 8), seed=3, start=0, count=7)
    assert whole.shape == (7, 1, 8, 8)
    assert whole.dtype == torch.float32
    parts = [initial_noise((1, 8, 8), seed=3, start=start, count=count) for start, count in ((0, 2), (2, 1), (3, 4))]
    assert torch.equal(torch.cat(parts), whole)
    torch.randn(5)  # the global generator plays no part
    assert torch.equal(initial_noise((1, 8, 8), seed=3, start=4, count=1), whole[4:5])
    assert not torch.equal(initial_noise((1, 8, 8), seed=4, start=0, count=7), whole)
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 7


def test_noise_is_standard_normal() -> None:
    noise = initial_noise((1, 16, 16), seed=0, start=0, count=64)
    assert abs(noise.mean().item()) < 4 / noise.numel() ** 0.5
    assert abs(noise.std().item() - 1) < 4 / (2 * noise.numel()) ** 0.5


def test_samples_are_those_of_the_pipeline(tiny_pipeline: DDIMPipeline) -> None:
    shape = sample_shape(tiny_pipeline.unet)
    assert shape == (1, 8, 8)
    noise = torch.randn(3, *shape, generator=torch.Generator().manual_seed(7))
    expected = tiny_pipeline(
        batch_size=3, generator=torch.Generator().manual_seed(7), num_inference_steps=10, output_type="np"
    ).images  # (3, 8, 8, 1) in [0, 1]
    samples = generate(tiny_pipeline.unet, tiny_pipeline.scheduler, noise, 10)
    assert np.array_equal((samples / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy(), expected)


def test_denoise_yields_every_step(tiny_unet: UNet2DModel, tiny_scheduler: DDIMScheduler) -> None:
    noise = initial_noise(sample_shape(tiny_unet), seed=0, start=0, count=2)
    steps = list(denoise(tiny_unet, tiny_scheduler, noise, 5))
    assert [step.timestep for step in steps] == [999, 799, 599, 399, 199, -1]
    assert torch.equal(steps[0].sample, noise)
    for step, following in zip(steps, steps[1:], strict=False):
        with torch.no_grad():
            assert torch.equal(step.model_output, tiny_unet(step.sample, step.timestep).sample)
        moved = tiny_scheduler.step(step.model_output, step.timestep, step.sample).prev_sample
        assert torch.equal(moved, following.sample)
    assert torch.equal(steps[-1].sample, generate(tiny_unet, tiny_scheduler, noise, 5))
    assert steps[-1].model_output.count_nonzero() == 0


def test_denoise_leaves_the_callers_gradients_on(tiny_unet: UNet2DModel, tiny_scheduler: DDIMScheduler) -> None:
    noise = initial_noise(sample_shape(tiny_unet), seed=0, start=0, count=1)
    for step in denoise(tiny_unet, tiny_scheduler, noise, 2):
        assert torch.is_grad_enabled()
        assert not step.sample.requires_grad
        assert not step.model_output.requires_grad
