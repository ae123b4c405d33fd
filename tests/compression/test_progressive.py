"""Specification of PQ: the budget is met, bad moves are undone, runs repeat and resume bit by bit."""

import copy
import dataclasses
import json
import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from pipelines import PIPELINES
from scipy.stats import gmean
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, ProgressiveConfig, convert_, progressive_quantize
from diffusers_pqcad.compression import progressive as progressive_module
from diffusers_pqcad.compression.calibration import CalibrationSet, unconditional_set
from diffusers_pqcad.compression.checkpoint import clone_state, load_checkpoint, model_hash, save_checkpoint
from diffusers_pqcad.compression.fake_quant import (
    at_bits,
    bits_by_module,
    calibrate_activations_,
    fake_quant_layers,
    freeze_,
    input_quantizers,
    prepare_,
    timestep_boundaries,
)
from diffusers_pqcad.compression.progressive import (
    WEIGHT_BITS,
    History,
    ProgressiveQuantizer,
    image_error,
    output_error,
    passes_of,
    trajectory_error,
    transition_prices,
    weight_changes,
    weight_prices,
    weighted_error,
)
from diffusers_pqcad.compression.reconstruction import ReconstructionConfig, UnitResult
from diffusers_pqcad.compression.recording import collect_calibration_set
from diffusers_pqcad.compression.schedulers import deterministic_scheduler
from diffusers_pqcad.kernels import use
from diffusers_pqcad.loading.convert import match_modules, with_model_exemptions
from diffusers_pqcad.numerics.allocation import BitController
from diffusers_pqcad.runtime.memory_format import remove_channels_last_

W4 = PQCADConfig(weight_bits=4)
PQ = tuple[UNet2DModel, History]


def quantize(
    model: nn.Module,
    calibration: CalibrationSet,
    settings: ProgressiveConfig,
    config: PQCADConfig = W4,
    **changes: object,
) -> History:
    settings = dataclasses.replace(settings, **{key: value for key, value in changes.items() if key != "checkpoint"})
    return progressive_quantize(
        model, calibration, config, settings, checkpoint=changes.get("checkpoint"), progress=False
    )


def as_recorded_with(model: nn.Module, calibration: CalibrationSet) -> CalibrationSet:
    """The set, claiming to be recorded with `model`."""
    other = copy.copy(calibration)
    other.manifest = calibration.manifest | {"model_hash": model_hash(model)}
    return other


def same_state(a: nn.Module, b: nn.Module) -> bool:
    first, second = a.state_dict(), b.state_dict()
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def average(model: nn.Module) -> float:
    sizes = {name: layer.weight.numel() for name, layer in fake_quant_layers(model).items()}
    bits = bits_by_module(model)
    return sum(sizes[name] * bits[name] for name in sizes) / sum(sizes.values())


# The measures


@pytest.mark.fast
def test_weighted_error_by_hand() -> None:
    output, target, weight = torch.randn(3, 1, 2, 2), torch.randn(3, 1, 2, 2), torch.tensor([1.0, 0.5, 2.0])
    difference = (output.double() - target.double()) ** 2
    expected = sum(difference[i].mean() * weight[i] for i in range(3)) / 3
    assert weighted_error(output, target, weight).item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.fast
def test_output_error_of_the_recorded_model_is_nothing(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    calls, denoiser = tiny_calibration_set.draw(20, 0), tiny_calibration_set.denoiser(tiny_unet)
    assert output_error(denoiser, calls, batch_size=7) < 1e-10
    with torch.no_grad():
        tiny_unet.conv_out.bias.add_(0.5)
    assert output_error(denoiser, calls, batch_size=7) == pytest.approx(0.25 * calls.weight.mean().item(), rel=1e-3)


@pytest.mark.fast
def test_one_lost_trajectory_does_not_decide_the_trajectory_error(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    """A state that is twice as close everywhere else stays the better one."""
    errors = []
    for scale, lost in ((0.02, False), (0.01, True)):
        trajectory = tiny_calibration_set.trajectory
        trajectory[:, 1:] *= 1 + scale
        if lost:
            trajectory[0, 1:] *= -1
        calibration = unconditional_set(trajectory, tiny_calibration_set.model_output, tiny_calibration_set.manifest)
        errors.append(trajectory_error(tiny_unet, calibration, 4))
    assert errors[1] < errors[0]


@pytest.mark.fast
def test_trajectory_error_compares_the_steps_that_both_grids_share(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    assert trajectory_error(tiny_unet, tiny_calibration_set, 4) < 1e-10
    scheduler = DDIMScheduler(**tiny_calibration_set.manifest["scheduler"])
    scheduler.set_timesteps(2)
    recorded = tiny_calibration_set.trajectory.double()
    sample, errors = tiny_calibration_set.trajectory[:, 0], []
    for index, timestep in enumerate(scheduler.timesteps):
        with torch.no_grad():
            sample = scheduler.step(tiny_unet(sample, timestep).sample, timestep, sample).prev_sample
        wanted = recorded[:, 2 * (index + 1)]
        errors.append(((sample - wanted) ** 2).sum((1, 2, 3)) / (wanted**2).sum((1, 2, 3)))
    expected = gmean(torch.stack(errors).mean(0).numpy())
    assert trajectory_error(tiny_unet, tiny_calibration_set, 2) == pytest.approx(expected, rel=1e-4)
    assert image_error(tiny_unet, tiny_calibration_set, 2) == pytest.approx(gmean(errors[-1].numpy()), rel=1e-4)


@pytest.mark.fast
def test_a_price_is_what_one_transition_does_to_the_output(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    config = PQCADConfig(bit_choices=(8, 4), weight_bits=4, modules_to_not_convert=["down_blocks", "up_blocks"])
    layers = match_modules(tiny_unet, config)
    controller = BitController({name: layer.weight.numel() for name, layer in layers.items()}, (8, 4))
    prepare_(tiny_unet, config, controller.bits)
    calls, state = tiny_calibration_set.draw(4, 0), clone_state(tiny_unet)
    frozen = tiny_calibration_set.denoiser(freeze_(copy.deepcopy(tiny_unet)))
    prices = transition_prices(tiny_unet, frozen, controller, calls)
    assert all(torch.equal(value, state[name]) for name, value in tiny_unet.state_dict().items())
    assert prices.keys() == layers.keys()
    name, sample, timestep, weight = "mid_block.resnets.0.conv2", calls.state, calls.timestep, calls.weight
    with torch.no_grad():
        before = tiny_unet(sample, timestep).sample
        with at_bits(fake_quant_layers(tiny_unet)[name], 4):
            after = tiny_unet(sample, timestep).sample
    expected = ((after.double() - before.double()).square().mean(dim=(1, 2, 3)) * weight).mean().item()
    assert prices[name] == pytest.approx(expected, rel=1e-4)


def torchs_rounding(weight: Tensor, bits: int) -> Tensor:
    """`weight` rounded by torch, symmetric, with one scale for each output channel."""
    level = 2 ** (bits - 1) - 1
    scale = weight.flatten(1).abs().amax(dim=1) / level
    zero_point = torch.zeros(len(scale), dtype=torch.int32)
    return torch.fake_quantize_per_channel_affine(weight, scale, zero_point, 0, -level, level)


def torchs_relative_error(weight: Tensor, bits: int) -> float:
    """The relative squared error of `weight` as torch rounds it."""
    return ((torchs_rounding(weight, bits) - weight).square().sum() / weight.square().sum()).item()


@pytest.mark.fast
@torch.no_grad()
def test_the_weight_signal_is_the_added_relative_error(tiny_unet: UNet2DModel) -> None:
    layers = match_modules(tiny_unet, W4)
    controller = BitController({name: layer.weight.numel() for name, layer in layers.items()}, (8, 4))
    prices = weight_prices(tiny_unet, controller)
    for name, layer in layers.items():
        after, before = (torchs_relative_error(layer.weight, bits) for bits in (4, 8))
        assert prices[name] == pytest.approx(after - before, rel=1e-3)


@pytest.mark.fast
@torch.no_grad()
def test_a_change_of_weights_is_between_what_torch_rounds(tiny_unet: UNet2DModel) -> None:
    layers, widths = match_modules(tiny_unet, W4), (3, 8, 6)
    changes = weight_changes(layers, widths)
    assert changes.keys() == {(name, bits) for name in layers for bits in (8, 6)}
    for name, layer in layers.items():
        rounded = {bits: torchs_rounding(layer.weight, bits) for bits in widths}
        for wide, narrow in ((8, 6), (6, 3)):
            expected = (rounded[narrow] - rounded[wide]).double().square().sum().item()
            assert changes[name, wide] == pytest.approx(expected, rel=1e-3)


# The run


def test_the_budget_is_met_in_two_stages(pq_run: PQ) -> None:
    model, history = pq_run
    assert average(model) <= 4
    assert average(model) > 3.9
    assert history.summary["average_bits"] == pytest.approx(average(model))
    assert history.summary["bits"] == bits_by_module(model)
    assert {entry["stage"]: entry["budget"] for entry in history.rounds} == {0: 6, 1: 4}
    for stage, budget in ((0, 6), (1, 4)):
        last = [entry for entry in history.rounds if entry["stage"] == stage][-1]
        assert last["kind"] == "forced"
        assert last["average_bits"] <= budget
    assert [entry["stage"] for entry in history.rounds] == sorted(entry["stage"] for entry in history.rounds)


def test_the_model_keeps_its_layers_and_its_static_ranges(pq_run: PQ, tiny_unet: UNet2DModel) -> None:
    model, _ = pq_run
    searched = match_modules(tiny_unet, with_model_exemptions(tiny_unet, W4))
    assert not any(name.startswith("up_blocks.1.") and name.endswith("conv_shortcut") for name in searched)
    assert fake_quant_layers(model).keys() == searched.keys()
    assert timestep_boundaries(model) == [374, 624, 874]
    assert all(quantizer.enabled and quantizer.scale is not None for quantizer in input_quantizers(model))


def test_the_history_tells_bits_prices_and_momenta_of_every_round(pq_run: PQ, tmp_path: Path) -> None:
    model, history = pq_run
    history.save(tmp_path / "history.json")
    assert History(**json.loads((tmp_path / "history.json").read_text())) == history
    names = set(fake_quant_layers(model))
    bits = dict.fromkeys(names, 8)
    for entry in history.rounds:
        assert set(entry["bits"]) == set(entry["momentum"]) == names
        for move in entry["moves"]:
            assert bits[move["layer"]] == move["from_bits"]
            assert move["predicted"] >= 0
            bits[move["layer"]] = move["to_bits"]
        assert bits == entry["bits"]  # the moves explain the bits
        assert entry["held_out_error"] > 0
    assert any(value > 0 for value in history.rounds[0]["momentum"].values())
    assert history.units
    assert all({"name", "loss_before", "loss_after", "accepted"} < set(unit) for unit in history.units)
    assert set(history.summary["latent_shift"]) == names


def test_latents_are_carried_and_move_away_from_the_original(pq_run: PQ) -> None:
    _, history = pq_run
    shift = history.summary["latent_shift"].values()
    assert max(shift) > 0
    assert max(shift) < 0.2


def test_pq_beats_one_fixed_width_of_the_same_bits(
    pq_run: PQ, tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    model, history = pq_run
    _, held_out = tiny_calibration_set.split()
    error = trajectory_error(model, held_out, 4)
    assert error == pytest.approx(history.summary["trajectory_error"])
    prepare_(tiny_unet, W4, dict.fromkeys(match_modules(tiny_unet, W4), 4))
    calibrate_activations_(
        tiny_unet,
        [
            (int(t), partial(tiny_unet, tiny_calibration_set.trajectory[:14, i], t))
            for i, t in enumerate(tiny_calibration_set.timestep)
        ],
    )
    assert average(tiny_unet) == 4 >= average(model)
    assert error < 0.8 * trajectory_error(tiny_unet, held_out, 4)


def test_the_packed_copy_makes_the_same_trajectories(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet
) -> None:
    packed = convert_(copy.deepcopy(tiny_quantized))
    # Sums in another memory format are taken in another order, and a code at a tie may fall to its neighbour.
    remove_channels_last_(packed)
    _, held_out = tiny_calibration_set.split()
    with use("reference"):
        error = trajectory_error(packed, held_out, 4)
    assert error == pytest.approx(trajectory_error(tiny_quantized, held_out, 4), rel=1e-6)


def test_one_reachable_width_needs_no_moves(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    config = PQCADConfig(weight_bits=8)
    history = quantize(tiny_unet, tiny_calibration_set, quick_progressive, config)
    assert set(history.summary["bits"].values()) == {8}
    assert [entry["moves"] for entry in history.rounds] == [[]]


# Roll-backs


def runner(model: UNet2DModel, calibration: CalibrationSet, settings: ProgressiveConfig) -> ProgressiveQuantizer:
    return ProgressiveQuantizer(model, calibration, W4, settings)


def test_a_round_may_measure_a_share_of_the_prices(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    run = runner(tiny_unet, tiny_calibration_set, dataclasses.replace(quick_progressive, price_share=0.25))
    every = list(run.controller.num_weights)
    assert run.priced_layers(0, 0) == every  # nothing is known yet
    run.observe(0, 0)
    assert list(run.perturbations) == every
    known = {name: run.controller.price(name, 8) for name in every}
    shares = [run.priced_layers(0, index) for index in (1, 2)]
    assert [len(share) for share in shares] == [math.ceil(len(every) / 4)] * 2
    assert shares[0] != shares[1]
    assert shares == [run.priced_layers(0, index) for index in (1, 2)]  # the same after a kill
    run.observe(0, 1)
    assert list(run.perturbations) == shares[0]
    for name in every:  # the others keep what they had
        assert (run.controller.price(name, 8) != known[name]) == (name in shares[0])


def test_the_budget_is_met_with_a_share_of_the_prices(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    history = quantize(tiny_unet, tiny_calibration_set, quick_progressive, price_share=0.25)
    assert history.summary["average_bits"] <= 4
    assert len(history.rounds[1]["price"]) < len(history.rounds[0]["price"])


@pytest.mark.parametrize("after", [2.0, 1.0, float("nan")])
def test_a_bias_correction_that_does_not_help_is_undone(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig,
    monkeypatch: pytest.MonkeyPatch, after: float,
) -> None:  # fmt: skip
    run = runner(tiny_unet, tiny_calibration_set, quick_progressive)
    before = clone_state(tiny_unet)
    errors = iter([1.0, after])
    monkeypatch.setattr(progressive_module, "output_error", lambda *_: next(errors))
    run.correct_biases(0)
    assert all(torch.equal(value, before[name]) for name, value in tiny_unet.state_dict().items())
    assert not run.history.units[-1]["accepted"]


# Models with conditions


def recorded_with(kind: str) -> tuple[Any, CalibrationSet]:
    """The denoiser of a tiny pipeline, and 6 trajectories of 2 steps of it."""
    pipeline, about = PIPELINES[kind].build(), PIPELINES[kind]
    pipeline.scheduler = deterministic_scheduler(pipeline.scheduler)[0]
    calibration = collect_calibration_set(
        pipeline, about.inputs[:6], num_inference_steps=2, seed=0, progress=False, **about.arguments
    )
    return getattr(pipeline, about.denoiser), calibration


@pytest.mark.parametrize("kind", ["sd", "flux", "wan", "dit"])
def test_models_with_conditions_are_quantized(kind: str, quick_progressive: ProgressiveConfig) -> None:
    model, calibration = recorded_with(kind)
    _, held_out = calibration.split()
    assert trajectory_error(model, held_out, 2) < 1e-9
    history = quantize(model, calibration, quick_progressive)
    assert 3.5 < average(model) <= 4
    assert history.summary["trajectory_error"] == pytest.approx(trajectory_error(model, held_out, 2))
    assert 1e-9 < history.summary["trajectory_error"] < 1
    assert any(unit["name"] != "bias correction" for unit in history.units)
    assert all(quantizer.enabled and quantizer.scale is not None for quantizer in input_quantizers(model))


@pytest.mark.fast
@torch.no_grad()
def test_prices_and_errors_are_those_of_the_guided_output() -> None:
    model, calibration = recorded_with("sd")
    calls, name = calibration.draw(5, 0), "mid_block.resnets.0.conv2"
    layers = match_modules(model, PQCADConfig(modules_to_not_convert=["down_blocks", "up_blocks"]))
    config = PQCADConfig(bit_choices=(8, 4), weight_bits=4, modules_to_not_convert=["down_blocks", "up_blocks"])
    controller = BitController({name: layer.weight.numel() for name, layer in layers.items()}, (8, 4))
    prepare_(model, config, controller.bits)

    def guided() -> Tensor:
        text, state = calls.condition["encoder_hidden_states"], calls.state
        without, prompted = (
            model(state, calls.timestep, encoder_hidden_states=text[:, index]).sample for index in (0, 1)
        )
        return without + 5 * (prompted - without)

    def error(output: Tensor, wanted: Tensor) -> float:
        return ((output.double() - wanted.double()).square().mean(dim=(1, 2, 3)) * calls.weight).mean().item()

    before = guided()
    assert output_error(calibration.denoiser(model), calls) == pytest.approx(error(before, calls.output), rel=1e-3)
    with at_bits(fake_quant_layers(model)[name], 4):
        after = guided()
    frozen = calibration.denoiser(freeze_(copy.deepcopy(model)))
    prices = transition_prices(model, frozen, controller, calls)
    assert prices[name] == pytest.approx(error(after, before), rel=1e-3)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["sd", "wan"])
@torch.no_grad()
def test_the_passes_of_a_step_are_its_calls(kind: str) -> None:
    """Guided in one call of two branches, and in two calls."""
    model, calibration = recorded_with(kind)
    calls, rows = calibration.draw(5, 0), torch.tensor([3, 0, 4])
    passes = passes_of(calibration.denoiser(model), calls)
    assert [one.branches for one in passes] == {"sd": [2], "wan": [1, 1]}[kind]
    parts = torch.cat([one.run(model, rows) for one in passes]).chunk(2)
    output = sum(weight * part for weight, part in zip(calibration.plan.weights, parts, strict=True))
    torch.testing.assert_close(output, calls.output[rows], rtol=1e-4, atol=1e-4)
    other = copy.deepcopy(model).requires_grad_(False)
    for parameter in other.parameters():
        parameter.mul_(0.5)
    assert not torch.allclose(passes[0].run(other, rows), passes[0].run(model, rows), atol=1e-3)


# Ablations


@pytest.mark.parametrize("changes", [{"beta": 0.0}, {"signal": "weight"}], ids=["no momentum", "weight"])
def test_ablations_meet_the_budget_on_other_ways(
    pq_run: PQ, tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig,
    changes: dict[str, object],
) -> None:  # fmt: skip
    light = {"reconstruction": ReconstructionConfig(iterations=0)}
    history = quantize(tiny_unet, tiny_calibration_set, quick_progressive, **light, **changes)
    assert 3.8 < average(tiny_unet) <= 4
    if "beta" in changes:  # a layer that has not moved yet has the price of this round as its momentum
        first = history.rounds[0]
        waiting = first["price"].keys() - {move["layer"] for move in first["moves"]}
        assert waiting
        assert all(first["momentum"][name] == pytest.approx(first["price"][name]) for name in waiting)
    else:
        assert history.summary["bits"] != pq_run[1].summary["bits"]


# Repeating and resuming


class Killed(BaseException):
    """Stands for a signal: no handler in the package may catch it."""


def test_a_run_that_is_killed_at_every_save_ends_in_the_same_bits(
    pq_run: PQ, tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "state" / "pq.safetensors"
    kills = 0

    def save_and_die(*args: object) -> None:
        nonlocal kills
        save_checkpoint(*args)
        kills += 1
        raise Killed

    monkeypatch.setattr(progressive_module, "save_checkpoint", save_and_die)
    for _ in range(100):
        model = copy.deepcopy(tiny_unet)
        torch.randn(kills + 1)  # whatever else the process draws
        try:
            history = quantize(model, tiny_calibration_set, quick_progressive, checkpoint=path)
            break
        except Killed:
            continue
    assert kills >= 4  # rounds, ends of stages
    assert same_state(model, pq_run[0])
    assert bits_by_module(model) == bits_by_module(pq_run[0])
    assert timestep_boundaries(model) == timestep_boundaries(pq_run[0])
    assert json.loads(json.dumps(dataclasses.asdict(history))) == json.loads(json.dumps(dataclasses.asdict(pq_run[1])))


def test_a_resume_file_of_other_settings_is_refused(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig, tmp_path: Path
) -> None:
    path, before = tmp_path / "pq.safetensors", clone_state(tiny_unet)
    quantize(copy.deepcopy(tiny_unet), tiny_calibration_set, quick_progressive, checkpoint=path)
    with pytest.raises(ValueError, match="pq.safetensors was begun with other settings.*weight_bits"):
        quantize(tiny_unet, tiny_calibration_set, quick_progressive, PQCADConfig(weight_bits=3), checkpoint=path)
    assert_untouched(tiny_unet, before)


def test_a_resume_file_of_other_layers_is_refused(
    tiny_unet: UNet2DModel,
    tiny_calibration_set: CalibrationSet,
    quick_progressive: ProgressiveConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As one from before the shortcuts at the output stayed in floating point."""
    path, before = tmp_path / "pq.safetensors", clone_state(tiny_unet)
    with monkeypatch.context() as patch:
        patch.setattr("diffusers_pqcad.loading.convert.shortcuts_at_the_output", lambda names: [])
        quantize(copy.deepcopy(tiny_unet), tiny_calibration_set, quick_progressive, checkpoint=path)
    with pytest.raises(ValueError, match="pq.safetensors was begun with other settings.*conv_shortcut"):
        quantize(tiny_unet, tiny_calibration_set, quick_progressive, checkpoint=path)
    assert_untouched(tiny_unet, before)


def test_a_fixed_width_is_reconstructed_too(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    config = PQCADConfig(method="fixed", weight_bits=3)
    history = quantize(tiny_unet, tiny_calibration_set, quick_progressive, config)
    assert set(bits_by_module(tiny_unet).values()) == {3}
    assert any(unit["name"] != "bias correction" for unit in history.units)
    assert {entry["stage"] for entry in history.rounds} == {0}  # there is nothing to move
    assert set(convert_(tiny_unet).config.quantization_config.weight_bits_by_module.values()) == {3}


def test_a_round_is_a_function_of_the_seed(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    rounds = []
    for seed in (0, 0, 5):
        settings = dataclasses.replace(quick_progressive, seed=seed)
        run = runner(copy.deepcopy(tiny_unet), tiny_calibration_set, settings)
        run.round(0, 0)
        rounds.append(run.history.rounds)
    assert rounds[0] == rounds[1]
    assert rounds[0][0]["momentum"] != rounds[2][0]["momentum"]


def test_a_truncated_resume_file_is_refused(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig, tmp_path: Path
) -> None:
    path = tmp_path / "pq.safetensors"
    save_checkpoint(path, {"weight": torch.ones(100)})
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match="pq.safetensors.*damaged"):
        quantize(tiny_unet, tiny_calibration_set, quick_progressive, checkpoint=path)


# What is refused, with the model unchanged


def assert_untouched(model: nn.Module, before: dict[str, Tensor]) -> None:
    assert model.state_dict().keys() == before.keys()
    assert all(
        torch.equal(value.nan_to_num(), before[name].nan_to_num()) for name, value in model.state_dict().items()
    )
    assert not any(hasattr(module, "parametrizations") for module in model.modules())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert not hasattr(model, "pqcad_config")


@pytest.mark.fast
def test_a_set_of_another_model_is_refused(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    with torch.no_grad():
        tiny_unet.conv_in.bias.add_(1e-3)
    before = clone_state(tiny_unet)
    with pytest.raises(ValueError, match="recorded with another model"):
        quantize(tiny_unet, tiny_calibration_set, quick_progressive)
    assert_untouched(tiny_unet, before)


@pytest.mark.fast
def test_a_budget_out_of_reach_is_refused(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    before = clone_state(tiny_unet)
    with pytest.raises(ValueError, match="cannot be met"):
        PQCADConfig(weight_bits=3, bit_choices=(8, 4))
    config = PQCADConfig(weight_bits=4, bit_choices=(8, 4))
    config.weight_bits = 2  # after its own checks
    with pytest.raises(ValueError, match="an average of 2 cannot be met"):
        quantize(tiny_unet, tiny_calibration_set, quick_progressive, config)
    assert_untouched(tiny_unet, before)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"signal": "weights"}, "signal: expected 'output' or 'weight', got 'weights'"),
        ({"beta": 1.0}, "beta: expected 0"),
        ({"rounds_per_stage": 0}, "rounds_per_stage: expected at least 1, got 0"),
        ({"reconstruction_samples": 3}, "reconstruction_samples: expected at least 8, got 3"),
        ({"trust": float("nan")}, "trust: expected at least 0, got nan"),
        ({"price_share": 0.0}, "price_share: expected a share above 0 and up to 1, got 0.0"),
        ({"round_share": 1.5}, "round_share: expected a share above 0 and up to 1, got 1.5"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ProgressiveConfig(**change)


@pytest.mark.fast
@pytest.mark.parametrize("change", [{"batch_size": 0}, {"input_mix": 1.5}, {"held_out_fraction": 0.0}])
def test_reconstruction_settings_out_of_range_are_refused(change: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        ReconstructionConfig(**change)


@pytest.mark.fast
def test_a_model_in_half_precision_is_refused(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    with pytest.raises(ValueError, match=r"expected a model in float32, got \['torch.bfloat16'\]"):
        quantize(tiny_unet.to(torch.bfloat16), tiny_calibration_set, quick_progressive)


def test_a_layer_that_is_never_called_is_refused_by_name(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    tiny_unet.mid_block.resnets[0].unused = nn.Linear(2, 2)
    calibration = as_recorded_with(tiny_unet, tiny_calibration_set)
    before = clone_state(tiny_unet)
    with pytest.raises(ValueError, match="mid_block.resnets.0.unused: the model never calls this layer"):
        quantize(tiny_unet, calibration, quick_progressive)
    assert_untouched(tiny_unet, before)
    skipped = PQCADConfig(weight_bits=4, modules_to_not_convert=["unused"])
    assert quantize(tiny_unet, calibration, quick_progressive, skipped).summary["average_bits"] <= 4


@pytest.mark.fast
def test_weights_that_are_not_finite_are_refused(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    model = tiny_unet
    with torch.no_grad():
        model.mid_block.resnets[0].conv2.weight[0] = float("nan")
    recorded = as_recorded_with(model, tiny_calibration_set)
    before = clone_state(model)
    with pytest.raises(ValueError, match="mid_block.resnets.0.conv2.*NaN"):
        quantize(model, recorded, quick_progressive)
    assert_untouched(model, before)


@pytest.mark.fast
def test_too_few_trajectories_are_refused(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    before = clone_state(tiny_unet)
    with pytest.raises(ValueError, match="at least 4 trajectories"):
        quantize(tiny_unet, tiny_calibration_set.select(slice(0, 3)), quick_progressive)
    assert_untouched(tiny_unet, before)


@pytest.mark.fast
def test_a_model_without_layers_to_search_is_refused(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    before = clone_state(tiny_unet)
    with (
        pytest.warns(UserWarning, match="nothing to quantize"),
        pytest.raises(ValueError, match="nothing to quantize"),
    ):
        quantize(tiny_unet, tiny_calibration_set, quick_progressive, PQCADConfig(modules_to_not_convert=["*"]))
    assert_untouched(tiny_unet, before)


def test_a_quantized_model_is_not_quantized_again(
    tiny_quantized: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    with pytest.raises(ValueError, match="another model"):
        quantize(tiny_quantized, tiny_calibration_set, quick_progressive)


def test_the_resume_file_holds_no_pickle(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig, tmp_path: Path
) -> None:
    config = PQCADConfig(weight_bits=8)
    path = tmp_path / "pq.safetensors"
    quantize(tiny_unet, tiny_calibration_set, quick_progressive, config, checkpoint=path)
    state = load_checkpoint(path)
    assert {"model", "controller", "history", "progress"} <= state.keys()
    assert [file.name for file in tmp_path.iterdir()] == ["pq.safetensors"]


def test_a_round_before_the_last_takes_its_share_of_the_reconstruction(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    seen = []

    def watch(unit, io, config, **position):
        seen.append((config.iterations, len(io.target)))
        return UnitResult(position["name"], 1.0, 0.0, accepted=True)

    monkeypatch.setattr(progressive_module, "reconstruct", watch)
    settings = dataclasses.replace(
        quick_progressive,
        reconstruction=ReconstructionConfig(iterations=6), reconstruction_samples=64, round_share=0.25,
    )  # fmt: skip
    run = runner(tiny_unet, tiny_calibration_set, settings)
    run.run(progress=False)
    assert set(seen) == {(2, 16), (6, 64)}
    assert seen[-len(run.units) :] == [(6, 64)] * len(run.units)  # all units once more at the final bits
    with pytest.raises(ValueError, match="round_share: expected a share above 0 and up to 1, got 0"):
        dataclasses.replace(quick_progressive, round_share=0)


def test_pq_has_a_default_of_fewer_bits_than_loading(
    tiny_unet: UNet2DModel, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> None:
    light = dataclasses.replace(quick_progressive, reconstruction=ReconstructionConfig(iterations=0))
    progressive_quantize(tiny_unet, tiny_calibration_set, progressive=light, progress=False)
    assert 3.8 < average(tiny_unet) <= WEIGHT_BITS == 4 < PQCADConfig().weight_bits
