"""Deterministic sampling as arithmetic: the one place that knows how a model's output moves a state.

A state is z_k = alpha_k x + sigma_k e of data x and noise e, and the model's output is a_k x + b_k e: (a, b) is (0, 1)
for epsilon, (1, 0) for sample, (-sigma, alpha) for v (Salimans & Ho 2022, arXiv:2202.00512, section 4) and (-1, 1)
for flow matching (Liu et al. 2023, arXiv:2209.03003). State and output are two equations for x and e. A step keeps x
and e and takes the next alpha and sigma: this is DDIM with eta = 0 (Song et al. 2021, arXiv:2010.02502, eq. 12), and
Euler of flow matching.
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
MAX_STEP_GAIN = 50.0  # a linear schedule starts at 2 to 3, a cosine one (no signal at t = T - 1) at 1500 and more


def _combined(k: Tensor, first: Tensor, state: Tensor, second: Tensor, other: Tensor) -> Tensor:
    """Return first_k state + second_k other, (B, *S), in the dtype and on the device of `state`.

    `first` and `second` are float64 coefficients by step. Half precision is combined in fp32 and rounded once.
    """
    dtype = torch.promote_types(state.dtype, torch.float32)
    shape = (-1, *(1,) * (state.ndim - 1))
    # Rounded before they move: not every accelerator has float64.
    on_state, on_other = (c[k.to(c.device)].to(dtype).to(state.device).view(shape) for c in (first, second))
    return (on_state * state + on_other * other).to(state.dtype)


@dataclass(frozen=True)
class Grid:
    """N steps of a deterministic sampler: z_k = alpha_k x + sigma_k e, and the model's output is a_k x + b_k e.

    `timestep` (N,): what the model is called with, of any dtype and on any device. `alpha` and `sigma` (N + 1,), the
    last of the final state, `a` and `b` (N,): float64. The methods take steps `k` (B,) int64, and states and outputs
    (B, *S) of any rank; they return the dtype and device of their first state.
    """

    timestep: Tensor
    alpha: Tensor
    sigma: Tensor
    a: Tensor
    b: Tensor

    def __len__(self) -> int:
        return len(self.timestep)

    def every(self, stride: int) -> "Grid":
        """Return the grid of every `stride`-th step: a student's, which lands where `stride` steps of this one do.

        Raises ValueError where `stride` does not divide N.
        """
        if stride < 1 or len(self) % stride:
            raise ValueError(
                f"stride={stride} must divide the number of steps, {len(self)}: else the last step would not end on "
                "the grid's final state."
            )
        return Grid(*(getattr(self, field.name)[::stride] for field in fields(self)))

    def state(self, k: Tensor, x: Tensor, e: Tensor) -> Tensor:
        """Return the state of data `x` and noise `e` (B, *S) before the steps `k`; k = N is the final state."""
        return _combined(k, self.alpha, x, self.sigma, e)

    def solve(self, k: Tensor, state: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Return data x and noise e, (B, *S), of `state` before the steps `k` and the model's `output` there."""
        alpha, sigma, det = self.alpha[:-1], self.sigma[:-1], self._determinant()
        x = _combined(k, self.b / det, state, -sigma / det, output)
        return x, _combined(k, -self.a / det, state, alpha / det, output)

    def step(self, k: Tensor, state: Tensor, output: Tensor) -> Tensor:
        """Return the state (B, *S) after the steps `k`: DDIM (eta = 0), or Euler of flow matching."""
        on_state, on_output = self._step_coefficients()
        return _combined(k, on_state, state, on_output, output)

    def output_to(self, k: Tensor, state: Tensor, landing: Tensor) -> Tensor:
        """Return the output (B, *S) whose steps `k` take `state` to `landing`: the inverse of `step`.

        Salimans & Ho 2022, appendix G, for any a and b. Not finite where the step's gain is 0: no output moves it.
        """
        on_state, on_output = self._step_coefficients()
        return _combined(k, -on_state / on_output, state, 1 / on_output, landing)

    def gain(self) -> Tensor:
        """Return |d z_{k+1} / d output_k|, (N,) float64: how much an error of each step's output moves the state."""
        return self._step_coefficients()[1].abs()

    def _determinant(self) -> Tensor:
        """Return alpha b - sigma a, (N,): 0 where state and output do not tell x from e."""
        return self.alpha[:-1] * self.b - self.sigma[:-1] * self.a

    def _step_coefficients(self) -> tuple[Tensor, Tensor]:
        """Return p and q, (N,) each, of the steps z_{k+1} = p_k z_k + q_k output_k.

        By way of x, the rounding of fp32 would be divided by an alpha near 0 and multiplied back.
        """
        alpha, sigma, det = self.alpha, self.sigma, self._determinant()
        on_state = (alpha[1:] * self.b - sigma[1:] * self.a) / det
        return on_state, (alpha[:-1] * sigma[1:] - sigma[:-1] * alpha[1:]) / det


def grid_of(
    scheduler: Any, num_inference_steps: int, *, sigmas: list[float] | None = None, mu: float | None = None
) -> Grid:
    """Return the steps that `scheduler` takes after `set_timesteps(num_inference_steps)`; it is not changed.

    `mu` is the shift of a flow-matching scheduler with `use_dynamic_shifting`, `sigmas` the list that a pipeline hands
    to a flow-matching scheduler (as Flux does): before its shift, one for each step. Every second step of DDIM's grid
    is the grid of half the steps; this does not hold for flow matching, where `sigmas_for` says what to hand over.

    Raises ValueError for another scheduler, and for one whose steps are not usable (`ddim_grid`, `flow_grid`).
    """
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        return flow_grid(scheduler, num_inference_steps, sigmas=sigmas, mu=mu)
    check_class(scheduler)
    if mu is not None:
        raise ValueError(f"mu={mu}: a DDIMScheduler has no shift; leave it out.")
    if sigmas is not None:
        raise ValueError("sigmas: a DDIMScheduler takes the steps of its own grid; leave them out.")
    return ddim_grid(scheduler, num_inference_steps)


def grid_in_use(scheduler: Any, timesteps: Iterable[Any]) -> Grid:
    """Return the steps that a pipeline took: from the first of `timesteps` to the final state.

    `scheduler` is as the pipeline left it after `set_timesteps`, with whatever `sigmas` and `mu`; `timesteps` are what
    its `step` was called with, in order. An image-to-image pipeline starts in the middle of the grid.

    Raises ValueError for a scheduler without `set_timesteps` before; where `timesteps` are not the last of its grid
    (SDXL's `denoising_end` stops before); and for one whose steps are not usable (`ddim_grid`, `flow_grid`).
    """
    check_class(scheduler)
    if getattr(scheduler, "num_inference_steps", None) is None:
        raise ValueError("scheduler: expected one after set_timesteps, got one before; run the pipeline first.")
    if isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
        check_flow(scheduler)
        grid = _flow_steps(scheduler)
    else:
        grid = _ddim_steps(scheduler, scheduler.num_inference_steps)
    taken = torch.tensor([float(timestep) for timestep in timesteps], dtype=torch.float64)
    start = len(grid) - len(taken)
    if not len(taken) or start < 0 or not torch.equal(grid.timestep[start:].cpu().double(), taken):
        raise ValueError(
            f"timesteps: expected the last of the scheduler's {len(grid)} timesteps in order, "
            f"{_listed(grid.timestep)}, got {_listed(taken)}. Run the pipeline to its end, with one call of step for "
            "each timestep, and read the scheduler before another set_timesteps."
        )
    grid = Grid(*(getattr(grid, field.name)[start:] for field in fields(grid)))
    _check_start(scheduler, grid)
    return grid


def check_class(scheduler: Any) -> None:
    """Raise ValueError unless `scheduler` is one whose steps a grid describes."""
    if not isinstance(scheduler, DDIMScheduler | FlowMatchEulerDiscreteScheduler):
        raise ValueError(
            "scheduler: expected a DDIMScheduler or a FlowMatchEulerDiscreteScheduler, got "
            f"{type(scheduler).__name__}. For a model that was trained as DDPM is, or by flow matching, use "
            "diffusers_pqcad.compression.schedulers.deterministic_scheduler(scheduler)."
        )


def ddim_grid(scheduler: Any, num_inference_steps: int) -> Grid:
    """Return the steps of a trailing DDIM grid, largest timestep (int64) first.

    Clipping of x (`clip_sample`, `thresholding`) is no part of it: the steps of a clipping scheduler are not affine.

    Raises ValueError for another scheduler; where N does not divide `num_train_timesteps` (DDIM's own step would leave
    the grid); where the spacing is not "trailing" (the grids of N and N/2 would not nest); and where the first step
    would amplify an epsilon model's error without bound, because the start has no signal.
    """
    grid = _ddim_steps(scheduler, num_inference_steps)
    _check_start(scheduler, grid)
    return grid


def _ddim_steps(scheduler: Any, num_inference_steps: int) -> Grid:
    """Return the steps of `ddim_grid`, whatever the signal at the start."""
    check_ddim(scheduler, num_inference_steps)
    num_train_timesteps = scheduler.config.num_train_timesteps
    timestep = torch.arange(num_train_timesteps - 1, -1, -(num_train_timesteps // num_inference_steps))
    final = torch.as_tensor(scheduler.final_alpha_cumprod).view(1)  # 1, or the table's first (set_alpha_to_one=False)
    alphas_cumprod = torch.cat([scheduler.alphas_cumprod.cpu().double()[timestep], final.cpu().double()])
    alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
    zeros, ones = torch.zeros_like(alpha[:-1]), torch.ones_like(alpha[:-1])
    a, b = {"epsilon": (zeros, ones), "sample": (ones, zeros), "v_prediction": (-sigma[:-1], alpha[:-1])}[
        scheduler.config.prediction_type
    ]
    return Grid(timestep, alpha, sigma, a, b)


def _check_start(scheduler: Any, grid: Grid) -> None:
    """Raise ValueError where the first step amplifies an epsilon model's error without bound."""
    gain = grid.gain()[0].item()
    if scheduler.config.get("prediction_type") == "epsilon" and not gain <= MAX_STEP_GAIN:
        raise ValueError(
            f"an epsilon-prediction model cannot start at timestep {grid.timestep[0].item()}: there is no signal left "
            f"there, and the first DDIM step multiplies the model's error by {gain:.0f} (limit {MAX_STEP_GAIN:.0f}). "
            "Use a v- or sample-prediction model, or a schedule that ends with some signal (linear betas, "
            "rescale_betas_zero_snr=False)."
        )


def check_ddim(scheduler: Any, num_inference_steps: int) -> None:
    """Raise ValueError unless `scheduler` is a DDIMScheduler whose grid of these steps holds that of every divisor."""
    if not isinstance(scheduler, DDIMScheduler):
        raise ValueError(
            f"scheduler: expected a DDIMScheduler, got {type(scheduler).__name__}. Use "
            "diffusers_pqcad.compression.schedulers.deterministic_scheduler(scheduler), if its model was trained as "
            "DDPM is."
        )
    config = scheduler.config
    if config.prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type: expected one of {PREDICTION_TYPES}, got {config.prediction_type!r}.")
    if num_inference_steps < 1 or config.num_train_timesteps % num_inference_steps:
        raise ValueError(
            f"num_inference_steps={num_inference_steps} must divide num_train_timesteps={config.num_train_timesteps}; "
            "take a divisor such as 10, 20, 40 or 50 of 1000."
        )
    if config.timestep_spacing != "trailing":
        raise ValueError(
            f"timestep_spacing: expected 'trailing', got {config.timestep_spacing!r}, whose grids of N and N/2 steps "
            "do not nest. Use DDIMScheduler.from_config(scheduler.config, timestep_spacing='trailing')."
        )


def flow_grid(
    scheduler: FlowMatchEulerDiscreteScheduler,
    num_inference_steps: int,
    *,
    sigmas: list[float] | None = None,
    mu: float | None = None,
) -> Grid:
    """Return the steps of flow matching: alpha = 1 - sigma, the output is e - x, `timestep` is fp32.

    Raises ValueError for fewer than one step, or than two with `shift_terminal`; for another number of `sigmas`; where
    `mu` is missing with `use_dynamic_shifting`, or given without; for `stochastic_sampling`, whose steps draw noise;
    and for `invert_sigmas`, where x and e change places.
    """
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps={num_inference_steps}: expected at least 1.")
    if num_inference_steps == 1 and scheduler.config.shift_terminal:
        raise ValueError("num_inference_steps=1: expected at least 2, between which shift_terminal stretches sigma.")
    if sigmas is not None and len(sigmas) != num_inference_steps:
        raise ValueError(f"sigmas: expected one for each of the {num_inference_steps} steps, got {len(sigmas)}.")
    check_mu(scheduler, mu)
    check_flow(scheduler)
    scheduler = copy.deepcopy(scheduler)  # the caller may be in the middle of its own steps
    scheduler.set_timesteps(num_inference_steps, sigmas=sigmas, mu=mu)
    return _flow_steps(scheduler)


def _flow_steps(scheduler: FlowMatchEulerDiscreteScheduler) -> Grid:
    """Return the steps that `scheduler` was set to."""
    sigma = scheduler.sigmas.cpu().double()
    ones = torch.ones_like(sigma[:-1])
    return Grid(scheduler.timesteps, 1 - sigma, sigma, -ones, ones)


def check_mu(scheduler: FlowMatchEulerDiscreteScheduler, mu: float | None) -> None:
    """Raise ValueError unless `mu` is given where, and only where, the size of the image shifts the steps."""
    if scheduler.config.use_dynamic_shifting and mu is None:
        raise ValueError(
            "mu: this scheduler shifts its steps by the size of the image (use_dynamic_shifting). Pass the mu that "
            "the pipeline computes from it (calculate_shift in its module), or use "
            "FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, use_dynamic_shifting=False, shift=3.0)."
        )
    if mu is not None and not scheduler.config.use_dynamic_shifting:
        raise ValueError(
            f"mu={mu}: this scheduler has one shift for all sizes (use_dynamic_shifting=False); leave it out."
        )


def check_flow(scheduler: FlowMatchEulerDiscreteScheduler) -> None:
    """Raise ValueError where the steps of `scheduler` draw noise, or go from sigma 0 to 1."""
    for setting in ("stochastic_sampling", "invert_sigmas"):
        if scheduler.config[setting]:
            raise ValueError(
                f"{setting}: expected False, as only deterministic steps from noise at sigma 1 to data at sigma 0 are "
                f"supported so far. Use a scheduler with {setting}=False, if the model was made for one."
            )


def sigmas_for(scheduler: FlowMatchEulerDiscreteScheduler, sigma: Tensor, *, mu: float | None = None) -> list[float]:
    """Return the N `sigmas` to hand to a pipeline or `set_timesteps` for steps at `sigma` (N + 1,), as in a `Grid`.

    A shift s takes t to s t / (1 + (s - 1) t) (Esser et al. 2024, arXiv:2403.03206, eq. 23), and this takes it back:
    t = sigma / (s - (s - 1) sigma). s is the scheduler's `shift`; with `use_dynamic_shifting` it is exp(mu), or mu
    where `time_shift_type` is "linear".

    Raises ValueError where no sigmas lead there: with `shift_terminal`, and with Karras, exponential or beta sigmas,
    which are drawn anew between the first and the last; for `sigma` that is not in (0, 1] with a 0 after it; for a
    shift that is not positive; and as `flow_grid` does.
    """
    check_mu(scheduler, mu)
    check_flow(scheduler)
    config = scheduler.config
    for setting in ("shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"):
        if config[setting]:
            raise ValueError(
                f"{setting}={config[setting]}: this scheduler moves what it is handed to a schedule of its own, so no "
                f"sigmas lead to given ones. Use a scheduler without {setting}, if the model was made for one."
            )
    sigma = sigma.cpu().double()
    if sigma.ndim != 1 or len(sigma) < 2 or sigma[-1] != 0 or not ((sigma[:-1] > 0) & (sigma[:-1] <= 1)).all():
        raise ValueError(
            f"sigma: expected those of a flow-matching grid, in (0, 1] before each step and 0 at the end, got "
            f"{_listed(sigma)}."
        )
    if mu is None:
        shift = scheduler.shift
    else:
        shift = math.exp(mu) if config.time_shift_type == "exponential" else mu
    if not shift > 0:
        raise ValueError(f"shift: expected a positive one, got {shift}, which takes every sigma to 0 or below.")
    return (sigma[:-1] / (shift - (shift - 1) * sigma[:-1])).tolist()


def _listed(values: Tensor) -> str:
    """Return the first and the last of `values`, as an error shows them."""
    shown = [f"{value:g}" for value in values.flatten().tolist()]
    return f"[{', '.join(shown if len(shown) <= 6 else [*shown[:3], '...', *shown[-2:]])}]"
