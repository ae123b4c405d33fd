"""Specification of sampling as arithmetic, against the steps of diffusers' own schedulers."""

import copy
import functools
import inspect

import families
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LCMScheduler,
    PNDMScheduler,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from diffusers_pqcad.compression.grid import PREDICTION_TYPES, Grid, ddim_grid, grid_in_use, grid_of, sigmas_for

pytestmark = pytest.mark.fast

SHAPES = [(), (5,), (7, 3), (2, 4, 4), (2, 3, 4, 4)]  # tokens, images, videos
DYNAMIC = {"use_dynamic_shifting": True}
FLOWS = {
    "flow": ({}, None),
    "shift 3": ({"shift": 3.0}, None),
    "mu": (DYNAMIC, 0.7),
    "mu, linear": (DYNAMIC | {"time_shift_type": "linear"}, 1.3),
    "terminal": ({"shift_terminal": 0.1}, None),
    "karras": ({"use_karras_sigmas": True}, None),
}


def ddim(prediction_type: str = "v_prediction", **settings) -> DDIMScheduler:
    """A trailing DDIM scheduler whose table is in float64, so that it is an oracle."""
    defaults = {"timestep_spacing": "trailing", "clip_sample": False}
    scheduler = DDIMScheduler(prediction_type=prediction_type, **defaults | settings)
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def flow(**settings) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


def flow_grid_of(name: str, num_steps: int) -> Grid:
    settings, mu = FLOWS[name]
    return grid_of(flow(**settings), num_steps, mu=mu)


def double_noise(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def output_of(grid: Grid, k: Tensor, x: Tensor, e: Tensor) -> Tensor:
    """The output that stands for x and e: its definition."""
    a, b = (values[k].view(-1, *(1,) * (x.ndim - 1)) for values in (grid.a, grid.b))
    return a * x + b * e


def grid_by_name(name: str, num_steps: int) -> Grid:
    return flow_grid_of(name, num_steps) if name in FLOWS else grid_of(ddim(name), num_steps)


grids = st.builds(grid_by_name, st.sampled_from([*PREDICTION_TYPES, *FLOWS]), st.sampled_from([2, 4, 10, 20]))


@st.composite
def grids_and_rows(draw) -> tuple[Grid, Tensor, Tensor, Tensor]:
    """A grid, steps (B,), and two float64 tensors (B, *S)."""
    grid, shape = draw(grids), draw(st.sampled_from(SHAPES))
    k = torch.tensor(draw(st.lists(st.integers(0, len(grid) - 1), min_size=1, max_size=4)))
    torch.manual_seed(draw(st.integers(0, 2**32)))
    return grid, k, double_noise(len(k), *shape), double_noise(len(k), *shape)


# Steps are those of diffusers


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"set_alpha_to_one": False},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"rescale_betas_zero_snr": True},
        {"rescale_betas_zero_snr": True, "set_alpha_to_one": False},
    ],
    ids=["linear", "alpha_0", "scaled", "cosine", "zero_snr", "zero_snr, alpha_0"],
)
def test_a_step_is_that_of_ddim(prediction_type: str, settings: dict) -> None:
    if prediction_type == "epsilon" and ("rescale_betas_zero_snr" in settings or "squared" in str(settings)):
        pytest.skip("refused: there is no signal at the start")
    scheduler = ddim(prediction_type, **settings)
    for num_steps in (2, 4, 20, 1000):
        scheduler.set_timesteps(num_steps)
        grid = grid_of(scheduler, num_steps)
        assert grid.timestep.dtype == torch.int64
        assert torch.equal(grid.timestep, scheduler.timesteps)
        assert {values.dtype for values in (grid.alpha, grid.sigma, grid.a, grid.b)} == {torch.float64}
        for k in {0, num_steps // 2, num_steps - 1}:
            rows, state, output = torch.tensor([k, k]), double_noise(2, 1, 4, 4), double_noise(2, 1, 4, 4)
            expected = scheduler.step(output, scheduler.timesteps[k], state, eta=0.0)
            # Both in float64; the scheduler divides by an alpha of 6e-3 and multiplies it back.
            torch.testing.assert_close(grid.step(rows, state, output), expected.prev_sample, rtol=1e-9, atol=1e-11)
            x, _ = grid.solve(rows, state, output)
            torch.testing.assert_close(x, expected.pred_original_sample, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", FLOWS)
def test_a_step_is_that_of_flow_matching(name: str) -> None:
    settings, mu = FLOWS[name]
    scheduler = flow(**settings)
    for num_steps in (2, 7, 28) if name == "terminal" else (1, 2, 7, 28):
        scheduler.set_timesteps(num_steps, mu=mu)
        grid = grid_of(scheduler, num_steps, mu=mu)
        assert torch.equal(grid.timestep, scheduler.timesteps)
        state = torch.randn(2, 3, 5)
        for k, timestep in enumerate(scheduler.timesteps):
            output = torch.randn(2, 3, 5)
            found = grid.step(torch.tensor([k, k]), state, output)
            state = scheduler.step(output, timestep, state).prev_sample
            torch.testing.assert_close(found, state, rtol=1e-6, atol=1e-6)  # the scheduler's step is in fp32


def test_alpha_and_sigma_of_ddim() -> None:
    alphas_cumprod = np.cumprod(1 - np.linspace(0.0001, 0.02, 1000, dtype=np.float64))
    for set_alpha_to_one, final in ((True, 1.0), (False, alphas_cumprod[0])):
        grid = grid_of(ddim(set_alpha_to_one=set_alpha_to_one), 4)
        expected = np.array([*alphas_cumprod[[999, 749, 499, 249]], final])
        # diffusers' own table is an fp32 cumulative product: 1000 factors, each rounded (6e-8).
        np.testing.assert_allclose(grid.alpha.numpy(), np.sqrt(expected), rtol=2e-5)
        np.testing.assert_allclose(grid.sigma.numpy(), np.sqrt(1 - expected), rtol=5e-4)
        # float64 throughout: nothing of the signal or of the noise is lost between the two
        np.testing.assert_allclose(grid.alpha.square() + grid.sigma.square(), np.ones(5), rtol=1e-15)


def test_alpha_and_sigma_of_flow_matching() -> None:
    """Shift 3 takes sigma to 3 sigma / (1 + 2 sigma) (Esser et al. 2024, arXiv:2403.03206, eq. 23)."""
    grid = grid_of(flow(shift=3.0), 3)
    least = 3e-3 / (1 + 2e-3)  # the scheduler's own sigma_min is shifted already
    sigma = 3 * np.linspace(1, least, 3) / (1 + 2 * np.linspace(1, least, 3))
    np.testing.assert_allclose(grid.sigma.numpy(), [*sigma, 0], rtol=1e-6)
    np.testing.assert_allclose(grid.alpha.numpy(), [*(1 - sigma), 1], rtol=1e-6)
    np.testing.assert_allclose(grid.timestep.numpy(), 1000 * sigma, rtol=1e-6)


def test_velocity_by_hand() -> None:
    """v = alpha e - sigma x and z = alpha x + sigma e, with alpha = 0.6, sigma = 0.8, x = 1, e = 2."""
    alpha, sigma = torch.tensor([0.6, 1.0], dtype=torch.float64), torch.tensor([0.8, 0.0], dtype=torch.float64)
    grid, k = Grid(torch.tensor([500]), alpha, sigma, -sigma[:1], alpha[:1]), torch.tensor([0])
    x, e = grid.solve(k, torch.tensor([2.2]), torch.tensor([0.4]))
    assert (x.item(), e.item()) == pytest.approx((1.0, 2.0))
    assert grid.state(k, torch.tensor([1.0]), torch.tensor([2.0])).item() == pytest.approx(2.2)
    assert grid.step(k, torch.tensor([2.2]), torch.tensor([0.4])).item() == pytest.approx(1.0)
    assert grid.output_to(k, torch.tensor([2.2]), torch.tensor([1.0])).item() == pytest.approx(0.4)
    assert grid.gain().tolist() == pytest.approx([0.8])


# Properties


@given(grids_and_rows())
def test_solve_is_the_inverse_of_state_and_output(drawn: tuple[Grid, Tensor, Tensor, Tensor]) -> None:
    grid, k, x, e = drawn
    for found, expected in zip(grid.solve(k, grid.state(k, x, e), output_of(grid, k, x, e)), (x, e), strict=True):
        # An epsilon model's x is divided by alpha, 6e-3 at the least.
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


@given(grids_and_rows())
def test_a_step_keeps_x_and_e(drawn: tuple[Grid, Tensor, Tensor, Tensor]) -> None:
    grid, k, x, e = drawn
    after = grid.step(k, grid.state(k, x, e), output_of(grid, k, x, e))
    torch.testing.assert_close(after, grid.state(k + 1, x, e), rtol=1e-11, atol=1e-11)


@given(grids_and_rows())
def test_the_output_to_a_landing_lands_there(drawn: tuple[Grid, Tensor, Tensor, Tensor]) -> None:
    grid, k, state, landing = drawn
    found = grid.step(k, state, grid.output_to(k, state, landing))
    torch.testing.assert_close(found, landing, rtol=1e-10, atol=1e-10)
    output = landing  # any tensor will do
    torch.testing.assert_close(grid.output_to(k, state, grid.step(k, state, output)), output, rtol=1e-9, atol=1e-9)


@given(grids_and_rows())
def test_the_gain_is_the_derivative_of_the_step(drawn: tuple[Grid, Tensor, Tensor, Tensor]) -> None:
    grid, k, state, output = drawn
    moved = (grid.step(k, state, output + 1) - grid.step(k, state, output)).abs()  # a step is affine in the output
    expected = grid.gain()[k].view(-1, *(1,) * (state.ndim - 1)).expand_as(moved)
    torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-11)


@given(grids, st.sampled_from([1, 2, 4]))
def test_a_students_step_lands_where_two_exact_steps_do(grid: Grid, stride: int) -> None:
    assume(len(grid) % stride == 0)
    student, x, e = grid.every(stride), double_noise(1, 2), double_noise(1, 2)
    assert len(student) == len(grid) // stride
    for row in range(len(student)):
        k = torch.tensor([row])
        landing = student.step(k, student.state(k, x, e), output_of(student, k, x, e))
        torch.testing.assert_close(landing, grid.state((k + 1) * stride, x, e), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(student.timestep, grid.timestep[::stride], rtol=0, atol=0)


@given(
    st.sampled_from([2, 4, 8, 10, 20, 40, 50, 100, 200, 1000]),
    st.sampled_from(PREDICTION_TYPES),
    st.booleans(),
    st.sampled_from([2, 4, 5]),
)
def test_ddim_grids_nest(num_steps: int, prediction_type: str, set_alpha_to_one: bool, stride: int) -> None:
    assume(num_steps % stride == 0)
    assume(prediction_type != "epsilon" or num_steps > stride)  # one step from the noise would amplify its errors
    scheduler = ddim(prediction_type, set_alpha_to_one=set_alpha_to_one)
    student, expected = grid_of(scheduler, num_steps).every(stride), grid_of(scheduler, num_steps // stride)
    for name in ("timestep", "alpha", "sigma", "a", "b"):
        assert torch.equal(getattr(student, name), getattr(expected, name))


def test_flow_grids_do_not_nest() -> None:
    assert not torch.allclose(grid_of(flow(shift=3.0), 8).every(2).sigma, grid_of(flow(shift=3.0), 4).sigma, rtol=1e-3)


# Ends


@pytest.mark.parametrize("name", [*PREDICTION_TYPES, *FLOWS])
def test_the_last_step_ends_on_the_data(name: str) -> None:
    grid = grid_by_name(name, 10)
    assert (grid.alpha[-1].item(), grid.sigma[-1].item()) == (1.0, 0.0)
    k, state, output = torch.tensor([9, 9]), double_noise(2, 3), double_noise(2, 3)
    x, _ = grid.solve(k, state, output)
    torch.testing.assert_close(grid.step(k, state, output), x, rtol=1e-12, atol=1e-12)
    if name == "sample":
        assert torch.equal(grid.step(k, state, output), output)
        assert torch.equal(grid.output_to(k, state, state), state)


def test_the_last_step_without_set_alpha_to_one_keeps_noise() -> None:
    scheduler = ddim(set_alpha_to_one=False)
    grid = grid_of(scheduler, 10)
    assert grid.alpha[-1].item() == scheduler.alphas_cumprod[0].sqrt().item()
    assert grid.sigma[-1].item() == pytest.approx(0.01, rel=1e-3)  # sqrt(beta_start)
    # From timestep 0 the scheduler's last step goes nowhere, so no output moves the state.
    assert grid_of(scheduler, 1000).gain()[-1] == 0


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_a_start_without_signal_is_all_noise(prediction_type: str) -> None:
    grid = grid_of(ddim(prediction_type, rescale_betas_zero_snr=True), 10)
    assert (grid.alpha[0].item(), grid.sigma[0].item()) == (0.0, 1.0)
    for values in (grid.gain(), *grid.solve(torch.tensor([0]), double_noise(1, 3), double_noise(1, 3))):
        assert values.isfinite().all()


# Steps that a pipeline took, and those that it is asked to take


def run(scheduler, timesteps: Tensor, state: Tensor, outputs: Tensor) -> Tensor:
    """The state (1, 3) after the scheduler's own steps at `timesteps` with `outputs` (N, 3)."""
    for timestep, output in zip(timesteps, outputs, strict=True):
        state = scheduler.step(output[None], timestep, state).prev_sample
    return state


def walked(grid: Grid, state: Tensor, outputs: Tensor) -> Tensor:
    for k, output in enumerate(outputs):
        state = grid.step(torch.tensor([k]), state, output[None])
    return state


FLUX_SIGMAS = np.linspace(1.0, 1 / 8, 8).tolist()  # what FluxPipeline hands over for 8 steps
IN_USE = {
    "ddim": (lambda: ddim(), {"num_inference_steps": 8}),
    "ddim, epsilon": (lambda: ddim("epsilon", set_alpha_to_one=False), {"num_inference_steps": 8}),
    "flow": (lambda: flow(shift=3.0), {"num_inference_steps": 8}),
    "flow, sigmas": (lambda: flow(shift=3.0), {"sigmas": FLUX_SIGMAS}),
    "flow, sigmas and mu": (lambda: flow(**DYNAMIC), {"sigmas": FLUX_SIGMAS, "mu": 0.9}),
    "flow, mu": (lambda: flow(**DYNAMIC, shift_terminal=0.1), {"num_inference_steps": 8, "mu": 0.9}),
}


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.125])
@pytest.mark.parametrize("name", IN_USE)
def test_the_grid_in_use_takes_the_steps_that_the_pipeline_took(name: str, strength: float, as_list: bool) -> None:
    make, arguments = IN_USE[name]
    scheduler = make()
    scheduler.set_timesteps(**arguments)
    timesteps = scheduler.timesteps[-int(8 * strength) :]
    state, outputs = double_noise(1, 3), double_noise(len(timesteps), 3)
    expected = run(scheduler, timesteps, state, outputs)
    grid = grid_in_use(scheduler, timesteps.tolist() if as_list else timesteps)
    assert len(grid) == len(timesteps)
    assert torch.equal(grid.timestep, timesteps)
    # The steps of flow matching are in fp32, those of DDIM in float64.
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if "flow" in name else {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(walked(grid, state, outputs), expected.double(), **tolerance)


@pytest.mark.parametrize("name", IN_USE)
def test_the_grid_in_use_of_all_steps_is_the_grid(name: str) -> None:
    make, arguments = IN_USE[name]
    scheduler = make()
    scheduler.set_timesteps(**arguments)
    expected = grid_of(make(), 8, **{k: v for k, v in arguments.items() if k != "num_inference_steps"})
    found = grid_in_use(scheduler, scheduler.timesteps)
    for values, expected_values in zip(vars(found).values(), vars(expected).values(), strict=True):
        assert torch.equal(values, expected_values)


def recorded(monkeypatch, scheduler, name: str) -> list[dict]:
    """The arguments of each call of a method, by name; a pipeline reads the method's signature."""
    calls, method = [], getattr(scheduler, name)

    @functools.wraps(method)
    def recording(*args, **named):
        calls.append(inspect.signature(method).bind(*args, **named).arguments)
        return method(*args, **named)

    monkeypatch.setattr(scheduler, name, recording)
    return calls


def test_a_flux_pipeline_takes_every_second_step(monkeypatch) -> None:
    """It hands sigmas of its own to its scheduler, and a mu that it computes from the size of the image."""
    scheduler = flow(shift=3.0, **DYNAMIC)
    pipeline = FluxPipeline(scheduler, families.vae(), None, None, None, None, families.flux())
    pipeline.set_progress_bar_config(disable=True)
    steps, settings = (recorded(monkeypatch, scheduler, method) for method in ("step", "set_timesteps"))
    inputs = {"prompt_embeds": torch.randn(1, 5, 8), "pooled_prompt_embeds": torch.randn(1, 8)}
    inputs |= {"height": 32, "width": 32, "output_type": "latent"}
    pipeline(num_inference_steps=6, **inputs)
    grid = grid_in_use(scheduler, [call["timestep"] for call in steps])
    assert grid.timestep.tolist() == [call["timestep"].item() for call in steps]
    assert len(grid) == 6
    steps.clear()
    pipeline(num_inference_steps=3, sigmas=sigmas_for(scheduler, grid.every(2).sigma, mu=settings[0]["mu"]), **inputs)
    found = grid_in_use(scheduler, [call["timestep"] for call in steps])
    torch.testing.assert_close(found.sigma, grid.every(2).sigma, rtol=0, atol=1e-6)


def test_a_grid_of_sigmas_by_hand() -> None:
    """Shift 3 takes sigma 1/2 to 3/4: 3 / 2 / (1 + 2 / 2)."""
    grid = grid_of(flow(shift=3.0), 2, sigmas=[1.0, 0.5])
    assert grid.sigma.tolist() == [1.0, 0.75, 0.0]
    assert grid.timestep.tolist() == [1000.0, 750.0]


def test_a_model_without_signal_at_the_start_may_start_in_the_middle() -> None:
    scheduler = ddim("epsilon", beta_schedule="squaredcos_cap_v2")
    scheduler.set_timesteps(10)
    assert len(grid_in_use(scheduler, scheduler.timesteps[5:])) == 5
    with pytest.raises(ValueError, match="an epsilon-prediction model cannot start at timestep 999"):
        grid_in_use(scheduler, scheduler.timesteps)


SHIFTS = {
    "shift 1": ({}, None),
    "shift 3": ({"shift": 3.0}, None),
    "exponential": (DYNAMIC, 1.15),
    "exponential, mu 0": (DYNAMIC | {"shift": 3.0}, 0.0),
    "linear": (DYNAMIC | {"time_shift_type": "linear"}, 2.5),
}


@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("num_steps", [2, 8, 50])
def test_a_scheduler_ends_up_with_the_sigmas_of_a_student(name: str, num_steps: int) -> None:
    settings, mu = SHIFTS[name]
    wanted = grid_of(flow(**settings), num_steps, mu=mu).every(2)
    sigmas = sigmas_for(flow(**settings), wanted.sigma, mu=mu)
    assert len(sigmas) == num_steps // 2
    scheduler = flow(**settings)
    scheduler.set_timesteps(sigmas=sigmas, mu=mu)
    torch.testing.assert_close(scheduler.sigmas.double(), wanted.sigma, rtol=0, atol=1e-6)
    torch.testing.assert_close(scheduler.timesteps, wanted.timestep, rtol=0, atol=1e-3)
    found = grid_of(flow(**settings), num_steps // 2, sigmas=sigmas, mu=mu)
    torch.testing.assert_close(found.sigma, wanted.sigma, rtol=0, atol=1e-6)


@given(st.lists(st.floats(1e-3, 1.0), min_size=1, max_size=5), st.floats(0.3, 12.0))
def test_sigmas_for_takes_back_any_shift(values: list[float], shift: float) -> None:
    sigma = torch.tensor([*values, 0.0], dtype=torch.float64)
    scheduler = flow()
    scheduler.set_shift(shift)
    scheduler.set_timesteps(sigmas=sigmas_for(scheduler, sigma))
    torch.testing.assert_close(scheduler.sigmas.double(), sigma, rtol=0, atol=1e-6)


def test_sigmas_of_a_shift_of_one_are_the_sigmas() -> None:
    assert sigmas_for(flow(), torch.tensor([1.0, 0.5, 0.25, 0.0])) == [1.0, 0.5, 0.25]


# Dtypes, devices, the caller's scheduler


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", [*PREDICTION_TYPES, "shift 3"])
def test_results_have_the_states_dtype_and_are_rounded_once(name: str, dtype: torch.dtype) -> None:
    grid, k = grid_by_name(name, 20), torch.tensor([0, 7, 19])
    state, output = torch.randn(3, 2, 4).to(dtype), torch.randn(3, 2, 4).to(dtype)
    exact = state.double(), output.double()
    pairs = [
        (grid.step(k, state, output), grid.step(k, *exact)),
        (grid.state(k, state, output), grid.state(k, *exact)),
        (grid.output_to(k, state, output), grid.output_to(k, *exact)),
        *zip(grid.solve(k, state, output), grid.solve(k, *exact), strict=True),
    ]
    # A sum of two products in fp32 (float64 for float64), with rounded coefficients; then one rounding to `dtype`.
    in_the_sum, at_the_end = (1e-15, 0.0) if dtype == torch.float64 else (4e-7, torch.finfo(dtype).eps / 2)
    for found, expected in pairs:
        assert found.dtype == dtype
        largest = expected.abs().amax(dim=(1, 2), keepdim=True) + 1
        assert ((found.double() - expected).abs() <= in_the_sum * largest + at_the_end * expected.abs()).all()


def test_an_output_of_another_dtype_does_not_change_the_states() -> None:
    grid, k = grid_of(ddim(), 20), torch.tensor([3])
    assert grid.step(k, torch.randn(1, 2), torch.randn(1, 2).bfloat16()).dtype == torch.float32
    assert grid.step(k, torch.randn(1, 2).half(), torch.randn(1, 2)).dtype == torch.float16


def test_results_are_on_the_states_device() -> None:
    grid, k = grid_of(ddim(), 20), torch.tensor([3, 4])
    state = torch.empty(2, 3, device="meta")
    results = [grid.step(k, state, state), grid.output_to(k, state, state), *grid.solve(k, state, state)]
    assert {result.device.type for result in [*results, grid.state(k, state, state)]} == {"meta"}


def test_gradients_reach_the_output() -> None:
    grid, k, output = grid_of(ddim(), 20), torch.tensor([3]), torch.randn(1, 2, requires_grad=True)
    grid.step(k, torch.randn(1, 2), output).sum().backward()
    torch.testing.assert_close(output.grad.abs().double(), grid.gain()[k].expand(1, 2))


@pytest.mark.parametrize(("scheduler", "mu"), [(ddim(), None), (flow(shift=3.0), None), (flow(**DYNAMIC), 0.7)])
def test_the_callers_scheduler_stays_as_it_is(scheduler, mu: float | None) -> None:
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(7, **({} if mu is None else {"mu": 0.3}))
    before = copy.deepcopy(vars(scheduler))
    grid_of(scheduler, 20, mu=mu)
    assert vars(scheduler).keys() == before.keys()
    for name, value in vars(scheduler).items():
        assert torch.equal(value, before[name]) if isinstance(value, Tensor) else value == before[name]


# Refusals


@pytest.mark.parametrize("stride", [0, -1, 3, 40])
def test_a_stride_that_leaves_the_grid_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"stride={stride} must divide the number of steps, 20"):
        grid_of(ddim(), 20).every(stride)


@pytest.mark.parametrize("num_steps", [0, -10, 3, 30, 1001, 2000])
def test_a_number_of_steps_that_leaves_the_grid_is_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps={num_steps} must divide num_train_timesteps=1000"):
        grid_of(ddim(), num_steps)


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_spacings_whose_grids_do_not_nest_are_refused(spacing: str) -> None:
    with pytest.raises(ValueError, match="timestep_spacing: expected 'trailing'"):
        grid_of(ddim(timestep_spacing=spacing), 20)


@pytest.mark.parametrize(
    "settings", [{"beta_schedule": "squaredcos_cap_v2"}, {"rescale_betas_zero_snr": True}], ids=["cosine", "zero_snr"]
)
def test_an_epsilon_model_needs_signal_at_the_start(settings: dict) -> None:
    with pytest.raises(
        ValueError, match=r"an epsilon-prediction model cannot start at timestep 999.*rescale_betas_zero_snr=False"
    ):
        grid_of(ddim("epsilon", **settings), 20)
    for prediction_type in ("v_prediction", "sample"):
        assert len(grid_of(ddim(prediction_type, **settings), 20)) == 20
    assert len(grid_of(ddim("epsilon"), 20)) == 20
    assert len(grid_of(ddim("epsilon"), 2)) == 2
    with pytest.raises(ValueError, match="cannot start at timestep 999.*error by 157"):
        grid_of(ddim("epsilon"), 1)


@pytest.mark.parametrize(
    "scheduler_type",
    [DDPMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler, LCMScheduler, PNDMScheduler],
)
def test_other_samplers_are_refused(scheduler_type: type) -> None:
    """PNDM and LCM have every attribute of DDIM, but their steps are not DDIM's."""
    name = scheduler_type.__name__
    scheduler = scheduler_type(timestep_spacing="trailing")
    with pytest.raises(ValueError, match=f"DDIMScheduler or a FlowMatchEulerDiscreteScheduler, got {name}"):
        grid_of(scheduler, 20)
    with pytest.raises(ValueError, match=f"expected a DDIMScheduler, got {name}"):
        ddim_grid(scheduler, 20)


def test_unknown_prediction_types_are_refused() -> None:
    scheduler = ddim()
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="prediction_type: expected one of"):
        grid_of(scheduler, 20)


def test_mu_is_asked_for_where_it_is_needed_and_refused_elsewhere() -> None:
    with pytest.raises(ValueError, match=r"mu: .*use_dynamic_shifting.*calculate_shift.*use_dynamic_shifting=False"):
        grid_of(flow(**DYNAMIC), 20)
    for scheduler in (ddim(), flow(shift=3.0)):
        with pytest.raises(ValueError, match=r"mu=0.5: .*leave it out"):
            grid_of(scheduler, 20, mu=0.5)
    assert len(grid_of(flow(**DYNAMIC), 20, mu=0.0)) == 20  # a shift of 1, and not a missing one


@pytest.mark.parametrize("setting", ["stochastic_sampling", "invert_sigmas"])
def test_other_steps_of_flow_matching_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}: expected False"):
        grid_of(flow(**{setting: True}), 20)


def test_one_step_cannot_be_stretched_to_a_terminal_sigma() -> None:
    """The scheduler itself divides 0 by 0 there."""
    with pytest.raises(ValueError, match="num_inference_steps=1: .*shift_terminal"):
        grid_of(flow(shift_terminal=0.1), 1)
    assert grid_of(flow(shift_terminal=0.1), 2).sigma.tolist() == pytest.approx([1, 0.1, 0])


@pytest.mark.parametrize("num_steps", [0, -1])
def test_no_steps_of_flow_matching_are_refused(num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_inference_steps={num_steps}: expected at least 1"):
        grid_of(flow(), num_steps)


@pytest.mark.parametrize("name", IN_USE)
def test_steps_that_do_not_end_the_grid_are_refused(name: str) -> None:
    make, arguments = IN_USE[name]
    scheduler = make()
    with pytest.raises(ValueError, match="expected one after set_timesteps"):
        grid_in_use(scheduler, [999])
    scheduler.set_timesteps(**arguments)
    timesteps = scheduler.timesteps.tolist()
    for taken in ([], timesteps[:-1], timesteps[::2], timesteps[::-1], [*timesteps, 0], [timesteps[-1] + 1e-3]):
        with pytest.raises(ValueError, match="timesteps: expected the last of the scheduler's 8 timesteps in order"):
            grid_in_use(scheduler, taken)


@pytest.mark.parametrize("setting", ["stochastic_sampling", "invert_sigmas"])
def test_other_steps_of_flow_matching_are_refused_in_use(setting: str) -> None:
    scheduler = flow(**{setting: True})
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=f"{setting}: expected False"):
        grid_in_use(scheduler, scheduler.timesteps)
    with pytest.raises(ValueError, match=f"{setting}: expected False"):
        sigmas_for(scheduler, torch.tensor([1.0, 0.0]))


def test_other_samplers_and_spacings_are_refused_in_use() -> None:
    scheduler = PNDMScheduler(skip_prk_steps=True)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match=r"got PNDMScheduler.*deterministic_scheduler"):
        grid_in_use(scheduler, scheduler.timesteps)
    scheduler = ddim(timestep_spacing="leading")
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep_spacing: expected 'trailing'"):
        grid_in_use(scheduler, scheduler.timesteps)


def test_sigmas_are_refused_where_there_are_none() -> None:
    with pytest.raises(ValueError, match="sigmas: a DDIMScheduler"):
        grid_of(ddim(), 2, sigmas=[1.0, 0.5])
    with pytest.raises(ValueError, match="sigmas: expected one for each of the 3 steps, got 2"):
        grid_of(flow(), 3, sigmas=[1.0, 0.5])


@pytest.mark.parametrize(
    "settings",
    [
        {"shift_terminal": 0.1},
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
    ],
    ids=str,
)
def test_schedules_that_cannot_be_taken_back_are_refused(settings: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*Use a scheduler without"):
        sigmas_for(flow(**settings), torch.tensor([1.0, 0.5, 0.0]))


@pytest.mark.parametrize(
    "sigma", [[1.0, 0.5], [0.0], [], [1.5, 0.0], [0.5, 0.0, 0.0], [-0.1, 0.0], [float("nan"), 0.0]]
)
def test_sigmas_of_no_grid_are_refused(sigma: list[float]) -> None:
    with pytest.raises(ValueError, match=r"sigma: expected those of a flow-matching grid, in \(0, 1\]"):
        sigmas_for(flow(), torch.tensor(sigma))


def test_sigmas_for_asks_for_mu_as_grid_of_does() -> None:
    sigma = torch.tensor([1.0, 0.0])
    with pytest.raises(ValueError, match="mu: this scheduler shifts its steps by the size"):
        sigmas_for(flow(**DYNAMIC), sigma)
    with pytest.raises(ValueError, match=r"mu=0.5: .*leave it out"):
        sigmas_for(flow(), sigma, mu=0.5)
    with pytest.raises(ValueError, match="shift: expected a positive one, got 0"):
        sigmas_for(flow(**DYNAMIC, time_shift_type="linear"), sigma, mu=0.0)
