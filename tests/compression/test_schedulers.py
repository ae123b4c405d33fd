"""Specification of the scheduler that replaces a pipeline's own, against the numbers of diffusers' classes."""

import inspect

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

from diffusers_pqcad.compression.grid import grid_of
from diffusers_pqcad.compression.schedulers import deterministic_scheduler

pytestmark = pytest.mark.fast

# scheduler/scheduler_config.json of Stable Diffusion 1.5
SD = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}
DDPM_LIKE = [
    "DDIMParallelScheduler",
    "DDIMScheduler",
    "DDPMParallelScheduler",
    "DDPMScheduler",
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
]


def reading(entry: str) -> list[str]:
    """The classes that read the config entry."""
    return [name for name in DDPM_LIKE if entry in inspect.signature(getattr(diffusers, name)).parameters]


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def sd_scheduler(name: str, **settings):
    """A scheduler as pipelines get it: by `from_config` from that of SD-1.5."""
    return getattr(diffusers, name).from_config(SD | settings)


def replaced(scheduler) -> DDIMScheduler:
    found, changed = deterministic_scheduler(scheduler)
    assert changed is not None
    assert type(found) is DDIMScheduler
    assert (found.config.timestep_spacing, found.config.clip_sample, found.config.thresholding) == (
        "trailing",
        False,
        False,
    )
    return found


# Models trained as DDPM is


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", DDPM_LIKE)
def test_noise_levels_and_prediction_type_are_kept(name: str, prediction_type: str) -> None:
    scheduler = sd_scheduler(name, prediction_type=prediction_type)
    found = replaced(scheduler)
    assert torch.equal(found.alphas_cumprod, scheduler.alphas_cumprod)
    assert found.config.prediction_type == scheduler.config.prediction_type == prediction_type
    assert found.alphas_cumprod[-1].item() == pytest.approx(0.00466, rel=1e-3)  # SD-1.5's
    # SD's last step goes to the table's first, whether the class reads the entry or not.
    assert found.final_alpha_cumprod == scheduler.alphas_cumprod[0]
    assert len(grid_of(found, 20)) == 20


@pytest.mark.parametrize("name", DDPM_LIKE)
def test_noise_levels_are_kept_where_they_are_the_classs_defaults(name: str) -> None:
    """`from_config` takes DDIM's defaults there: Heun's beta_start is 0.00085, DDIM's 0.0001."""
    scheduler = getattr(diffusers, name)()
    assert torch.equal(replaced(scheduler).alphas_cumprod, scheduler.alphas_cumprod)


def test_the_trap_of_from_config_is_still_there() -> None:
    heun, pndm = HeunDiscreteScheduler(), PNDMScheduler()
    assert DDIMScheduler.from_config(heun.config).config.beta_start != heun.config.beta_start
    assert DDIMScheduler.from_config(pndm.config).config.set_alpha_to_one != pndm.config.set_alpha_to_one
    assert replaced(pndm).final_alpha_cumprod == pndm.final_alpha_cumprod == pndm.alphas_cumprod[0]


def test_sample_prediction_is_kept() -> None:
    assert replaced(DDPMScheduler(prediction_type="sample")).config.prediction_type == "sample"


@pytest.mark.parametrize("name", reading("rescale_betas_zero_snr"))
def test_a_table_that_is_rescaled_to_zero_snr_is_kept(name: str) -> None:
    scheduler = sd_scheduler(name, rescale_betas_zero_snr=True, prediction_type="v_prediction")
    found = replaced(scheduler)
    assert found.config.rescale_betas_zero_snr
    # Others write 2**-24 for the last, which they divide by.
    torch.testing.assert_close(found.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-7)
    assert found.alphas_cumprod[-1] == 0


def test_an_entry_that_the_class_does_not_read_does_not_rescale_its_table() -> None:
    scheduler = sd_scheduler("PNDMScheduler", rescale_betas_zero_snr=True)
    assert scheduler.config.rescale_betas_zero_snr
    found = replaced(scheduler)
    assert not found.config.rescale_betas_zero_snr
    assert torch.equal(found.alphas_cumprod, scheduler.alphas_cumprod)


@pytest.mark.parametrize(
    ("scheduler", "rescale"),
    [
        (DDPMScheduler(beta_schedule="sigmoid"), False),
        (DDPMScheduler(beta_schedule="laplace"), False),
        (DDPMScheduler(beta_schedule="sigmoid", rescale_betas_zero_snr=True, prediction_type="v_prediction"), True),
        (HeunDiscreteScheduler(beta_schedule="exp"), False),
        (EulerDiscreteScheduler(trained_betas=np.linspace(0.001, 0.01, 500).tolist(), num_train_timesteps=500), False),
    ],
    ids=["sigmoid", "laplace", "sigmoid, rescaled", "exp", "trained"],
)
def test_tables_that_ddim_has_no_name_for_are_kept(scheduler, rescale: bool, tmp_path) -> None:
    found = replaced(scheduler)
    assert torch.equal(found.alphas_cumprod, scheduler.alphas_cumprod)
    found.save_pretrained(tmp_path)
    assert torch.equal(DDIMScheduler.from_pretrained(tmp_path).alphas_cumprod, found.alphas_cumprod)
    assert (found.alphas_cumprod[-1] == 0) == rescale


@pytest.mark.parametrize(("final", "to_one"), [("zero", True), ("sigma_min", False)])
def test_the_last_step_goes_where_the_sigmas_did(final: str, to_one: bool) -> None:
    scheduler = DPMSolverMultistepScheduler(final_sigmas_type=final)
    assert replaced(scheduler).config.set_alpha_to_one is to_one
    scheduler.set_timesteps(10)
    assert (scheduler.sigmas[-1] == 0) == to_one


def test_steps_offset_does_not_move_a_trailing_grid() -> None:
    with_offset, without = (replaced(sd_scheduler("PNDMScheduler", steps_offset=offset)) for offset in (1, 0))
    assert with_offset.config.steps_offset == 1
    for scheduler in (with_offset, without):
        scheduler.set_timesteps(20)
    assert torch.equal(with_offset.timesteps, without.timesteps)


def test_a_trailing_ddim_stays_as_it_is() -> None:
    scheduler = DDIMScheduler(timestep_spacing="trailing", clip_sample=False)
    assert deterministic_scheduler(scheduler) == (scheduler, None)
    assert deterministic_scheduler(scheduler)[0] is scheduler


@pytest.mark.parametrize("entry", [{"timestep_spacing": "leading"}, {"clip_sample": True}, {"thresholding": True}])
def test_a_ddim_of_other_steps_is_replaced(entry: dict) -> None:
    scheduler = DDIMScheduler(**{"timestep_spacing": "trailing", "clip_sample": False} | entry)
    found, changed = deterministic_scheduler(scheduler)
    assert found is not scheduler
    ((name, value),) = entry.items()
    assert changed == (
        "DDIMScheduler is replaced by a DDIMScheduler with the same noise levels and prediction type, without its "
        f"{name}={value!r}: other steps."
    )
    assert scheduler.config[name] == value
    assert deterministic_scheduler(found) == (found, None)


def test_the_line_names_what_is_given_up() -> None:
    scheduler = sd_scheduler("DPMSolverMultistepScheduler", use_karras_sigmas=True, thresholding=True)
    assert deterministic_scheduler(scheduler)[1] == (
        "DPMSolverMultistepScheduler is replaced by a DDIMScheduler with the same noise levels and prediction type, "
        "without its timestep_spacing='linspace', thresholding=True, use_karras_sigmas=True: other steps."
    )


# Flow matching


def shifted(shift: float, t: np.ndarray) -> np.ndarray:
    return shift * t / (1 + (shift - 1) * t)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_matching_heun_becomes_euler_at_the_same_sigmas(shift: float) -> None:
    scheduler = FlowMatchHeunDiscreteScheduler(shift=shift)
    found, changed = deterministic_scheduler(scheduler)
    assert type(found) is FlowMatchEulerDiscreteScheduler
    assert changed == (
        "FlowMatchHeunDiscreteScheduler is replaced by a FlowMatchEulerDiscreteScheduler with the same shift: other "
        "steps."
    )
    for num_steps in (2, 7, 28):
        scheduler.set_timesteps(num_steps)
        found.set_timesteps(num_steps)
        assert torch.equal(scheduler.sigmas.unique_consecutive(), found.sigmas)  # Heun has each inner one twice
        assert torch.equal(grid_of(found, num_steps).sigma, found.sigmas.double())


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("name", reading("use_flow_sigmas"))
def test_solvers_of_flow_matching_become_euler_with_their_shift(name: str, shift: float) -> None:
    """Their N steps go down to 1 / N, Euler's to the least of the training: the shift of the same t is the same."""
    scheduler = getattr(diffusers, name)(**FLOW, flow_shift=shift)
    found, changed = deterministic_scheduler(scheduler)
    assert type(found) is FlowMatchEulerDiscreteScheduler
    assert changed is not None
    scheduler.set_timesteps(10)
    t = np.linspace(1, 1e-3, 11)[:-1] if name == "UniPCMultistepScheduler" else 0.999 * np.linspace(1, 0, 11)[:-1]
    found.set_timesteps(sigmas=t.tolist())
    # UniPC moves a sigma of 1 down by 1e-6.
    torch.testing.assert_close(found.sigmas[:-1], scheduler.sigmas[:-1], rtol=0, atol=1.5e-6)
    np.testing.assert_allclose(found.sigmas[:-1].numpy(), shifted(shift, t), rtol=0, atol=1e-6)
    # DDPM-like tables of noise levels play no part.
    assert torch.equal(grid_of(found, 10).alpha, 1 - grid_of(found, 10).sigma)


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
def test_dynamic_shifting_is_carried_over(time_shift_type: str) -> None:
    ours = {"base_shift": 0.4, "max_shift": 1.3, "base_image_seq_len": 128, "max_image_seq_len": 2048}
    entries = FLOW | {"use_dynamic_shifting": True, "time_shift_type": time_shift_type, "shift_terminal": 0.02}
    scheduler = UniPCMultistepScheduler.from_config(entries | ours)
    found, _ = deterministic_scheduler(scheduler)
    assert {name: found.config[name] for name in ours} == ours
    t = np.linspace(1, 1e-3, 11)[:-1]  # UniPC says list, and divides by it
    for each in (scheduler, found):
        each.set_timesteps(sigmas=t, mu=0.8)
    torch.testing.assert_close(found.sigmas, scheduler.sigmas, rtol=0, atol=1.5e-6)


def test_an_entry_that_heun_does_not_read_does_not_shift_its_steps() -> None:
    flux = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    found, _ = deterministic_scheduler(FlowMatchHeunDiscreteScheduler.from_config(flux.config))
    assert not found.config.use_dynamic_shifting
    assert found.shift == 3.0


def test_other_numbers_of_training_timesteps_are_carried_over() -> None:
    found, _ = deterministic_scheduler(FlowMatchHeunDiscreteScheduler(num_train_timesteps=500))
    assert found.config.num_train_timesteps == 500


@pytest.mark.parametrize("settings", [{}, {"shift": 3.0}, {"use_dynamic_shifting": True}, {"shift_terminal": 0.1}])
def test_euler_of_flow_matching_stays_as_it_is(settings: dict) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(**settings)
    found, changed = deterministic_scheduler(scheduler)
    assert found is scheduler
    assert changed is None


# Refusals


@pytest.mark.parametrize("setting", ["stochastic_sampling", "invert_sigmas"])
def test_noise_and_the_other_direction_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}: expected False"):
        deterministic_scheduler(FlowMatchEulerDiscreteScheduler(**{setting: True}))


@pytest.mark.parametrize(
    "name", ["LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler", "FlowMapEulerDiscreteScheduler"]
)
def test_few_step_models_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"steps of a {name}: its model was distilled.*Use the model that it was"):
        deterministic_scheduler(getattr(diffusers, name)())


@pytest.mark.parametrize("name", ["DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"])
def test_inversion_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"steps of a {name}: it takes images to noise"):
        deterministic_scheduler(sd_scheduler(name))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("EDMEulerScheduler", {}),
        ("EDMDPMSolverMultistepScheduler", {}),
        ("CMStochasticIterativeScheduler", {}),
        ("ScoreSdeVeScheduler", {}),
        ("VQDiffusionScheduler", {"num_vec_classes": 8}),
        ("SCMScheduler", {}),
        ("UnCLIPScheduler", {}),
        ("DDPMWuerstchenScheduler", {}),
        ("RePaintScheduler", {}),
        ("IPNDMScheduler", {}),
    ],
)
def test_schedulers_that_no_grid_describes_are_refused(name: str, settings: dict) -> None:
    with pytest.raises(ValueError, match=rf"steps of a {name} with.*Expected one of.*beta_schedule.*PQCADConfig"):
        deterministic_scheduler(getattr(diffusers, name)(**settings))


@pytest.mark.parametrize(
    "settings",
    [{"prediction_type": "flow_prediction"}, {"use_flow_sigmas": True}, {"prediction_type": "v"}],
    ids=["only predicted", "only sigmas", "unknown"],
)
@pytest.mark.parametrize("scheduler_type", [DPMSolverMultistepScheduler, UniPCMultistepScheduler])
def test_half_of_flow_matching_is_refused(scheduler_type: type, settings: dict) -> None:
    with pytest.raises(ValueError, match=r"with prediction_type='.*' and use_flow_sigmas=(True|False)\. Expected"):
        deterministic_scheduler(scheduler_type(**settings))


@pytest.mark.parametrize("variance_type", ["learned", "learned_range"])
def test_learned_variances_are_refused(variance_type: str) -> None:
    with pytest.raises(ValueError, match=f"variance_type='{variance_type}': its model gives a variance too"):
        deterministic_scheduler(DDPMScheduler(variance_type=variance_type))


def test_continuous_timesteps_are_refused() -> None:
    """Those of Stable Video Diffusion."""
    scheduler = EulerDiscreteScheduler(
        prediction_type="v_prediction", timestep_type="continuous", use_karras_sigmas=True, sigma_max=700.0
    )
    with pytest.raises(ValueError, match="timestep_type='continuous': its model is called with logarithms of sigma"):
        deterministic_scheduler(scheduler)


def test_noise_levels_that_the_betas_do_not_give_are_refused() -> None:
    with pytest.raises(ValueError, match=r"CogVideoXDDIMScheduler: DDIM's noise levels \(alphas_cumprod\) would be"):
        deterministic_scheduler(diffusers.CogVideoXDDIMScheduler())
    scheduler = DDPMScheduler()
    scheduler.alphas_cumprod = scheduler.alphas_cumprod**1.01  # set by hand
    with pytest.raises(ValueError, match=r"DDPMScheduler: DDIM's noise levels"):
        deterministic_scheduler(scheduler)
