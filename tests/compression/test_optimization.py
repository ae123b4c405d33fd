"""Specification of the training loop's parts: rates, averaged weights, the best state, and their resume states."""

import copy
import math
from typing import Any, get_args

import pytest
import torch
from diffusers.optimization import get_scheduler
from torch import nn

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.compression import fake_quant
from diffusers_pqcad.compression.adapters import add_adapter_
from diffusers_pqcad.compression.checkpoint import clone_state, load_checkpoint, save_checkpoint
from diffusers_pqcad.compression.fake_quant import latent_weight, prepare_, weight_quantizer
from diffusers_pqcad.compression.optimization import (
    MIN_RMS,
    AveragedAdam,
    BestState,
    LrScheduler,
    adapter_groups,
    float_groups,
    moving_state,
    parameter_groups,
    rate_factor,
    rate_schedule,
    rounding_step,
    scale_groups,
    trained_alone,
    trained_groups,
)

pytestmark = pytest.mark.fast


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(3)
    network = nn.Sequential(nn.Linear(6, 5), nn.GroupNorm(1, 5), nn.Linear(5, 2))
    return prepare_(network, PQCADConfig(activation_bits=None), {"0": 4, "2": 8})


def adam_of(model: nn.Module, **settings: Any) -> AveragedAdam:
    groups = parameter_groups(model, 0.1, 1e-2)
    return AveragedAdam(groups, **{"num_steps": 10, "ema_decay": 0.9, "warmup_steps": 0} | settings)


def train(model: nn.Module, adam: AveragedAdam, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        adam.update(step)


def test_a_layer_is_trained_in_units_of_its_own_rounding_step(model: nn.Module) -> None:
    first, first_scale, second, second_scale, *others = parameter_groups(model, 0.3, 0.2)
    for index, latent, scale, bits in ((0, first, first_scale, 4), (2, second, second_scale, 8)):
        weight = latent_weight(model[index])
        step = (weight.abs().amax(dim=1) / (2 ** (bits - 1) - 1)).mean().item()
        assert latent["params"][0] is weight
        assert scale["params"][0] is weight_quantizer(model[index]).scale
        assert (latent["lr"], scale["lr"]) == (pytest.approx(0.3 * step), pytest.approx(0.03 * step))
    assert [group["lr"] for group in others] == [group["lr"] for group in float_groups(model, 0.2)]


def test_what_stays_in_floating_point_is_trained_in_units_of_its_own_size(model: nn.Module) -> None:
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([3.0, -3.0, 3.0, 3.0, -3.0]))
        model[0].bias.copy_(torch.tensor([0.3, 0.4, 0.0, 0.0, 0.0]))
    groups = float_groups(model, 0.2)
    expected = {
        id(model[0].bias): 0.2 * math.sqrt(0.25 / 5),
        id(model[1].weight): 0.2 * 3,
        id(model[1].bias): 0.2 * MIN_RMS,  # zeros, which would never move
        id(model[2].bias): 0.2 * model[2].bias.detach().norm().item() / math.sqrt(2),
    }
    assert {id(group["params"][0]): pytest.approx(group["lr"]) for group in groups} == expected
    assert all(len(group["params"]) == 1 for group in groups)


def test_the_rounding_step_of_two_bits_is_the_distance_of_its_levels() -> None:
    layer = nn.Linear(8, 4)
    prepare_(nn.Sequential(layer), PQCADConfig(activation_bits=None), {"0": 2})
    levels = [torch.unique(row) for row in layer.weight]
    distances = [levels_of_row.diff().min() for levels_of_row in levels]
    assert rounding_step(layer) == pytest.approx(torch.stack(distances).mean().item(), rel=1e-5)


def test_nothing_is_left_out_and_nothing_is_in_two_groups(model: nn.Module) -> None:
    together = [id(p) for group in parameter_groups(model, 0.3, 0.1) for p in group["params"]]
    assert sorted(together) == sorted(id(p) for p in model.parameters())


def names_in(model: nn.Module, groups: list[dict]) -> list[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(parameter)] for group in groups for parameter in group["params"]]


@pytest.fixture
def larger() -> nn.Module:
    """A fake-quantized convolution and Linear layer, a float one, a norm, and an embedding."""
    torch.manual_seed(3)
    parts = {
        "conv": nn.Conv2d(2, 4, 3), "norm": nn.GroupNorm(2, 4), "fc": nn.Linear(4, 4), "left": nn.Linear(4, 1),
        "table": nn.Embedding(3, 4),
    }  # fmt: skip
    config = PQCADConfig(activation_bits=None, modules_to_not_convert=["left"])
    return prepare_(nn.ModuleDict(parts), config, {"conv": 4, "fc": 4})


def test_scales_biases_and_norms_are_what_leaves_every_weight_where_it_is(larger: nn.Module) -> None:
    groups = scale_groups(larger, 0.3, 0.2)
    scale = "parametrizations.weight.0.scale"
    assert names_in(larger, groups) == [
        f"conv.{scale}", f"fc.{scale}", "conv.bias", "norm.weight", "norm.bias", "fc.bias", "left.bias",
    ]  # fmt: skip
    rates = {id(group["params"][0]): group["lr"] for group in parameter_groups(larger, 0.3, 0.2)}
    assert all(group["lr"] == rates[id(group["params"][0])] for group in groups)


def test_an_adapter_is_trained_alone_or_not_at_all(larger: nn.Module) -> None:
    before = [(names_in(larger, [group]), group["lr"]) for group in parameter_groups(larger, 0.3, 0.2)]
    add_adapter_(larger, rank=2, lora_alpha=None, target_modules=["fc", "conv"], seed=0)
    found = [
        ([name.replace(".base_layer", "") for name in names_in(larger, [group])], group["lr"])
        for group in parameter_groups(larger, 0.3, 0.2)
    ]
    assert found == before
    (group,) = adapter_groups(larger, 0.01)
    assert group["lr"] == 0.01
    assert names_in(larger, [group]) == [
        f"{layer}.lora_{part}.default.weight" for layer in ("conv", "fc") for part in "AB"
    ]


def test_what_is_trained_is_chosen_by_name(larger: nn.Module) -> None:
    add_adapter_(larger, rank=2, lora_alpha=None, target_modules=["fc"], seed=0)
    rates = {"step_rate": 0.3, "float_rate": 0.2, "lora_rate": 0.1}
    wanted = {
        "all": parameter_groups(larger, 0.3, 0.2),
        "scales": scale_groups(larger, 0.3, 0.2),
        "lora": adapter_groups(larger, 0.1),
    }
    assert all(trained_groups(larger, name, **rates) == groups for name, groups in wanted.items())


@pytest.mark.parametrize("trainable", ["all", "scales", "lora"])
def test_gradients_are_those_of_what_is_trained_inside_the_block(larger: nn.Module, trainable: str) -> None:
    add_adapter_(larger, rank=2, lora_alpha=None, target_modules=["fc"], seed=0)
    larger.fc.base_layer.bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in larger.named_parameters()}
    groups = trained_groups(larger, trainable, step_rate=0.3, float_rate=0.2, lora_rate=0.1)

    def leave_by_an_error() -> None:
        with trained_alone(larger, groups):
            moving = [name for name, parameter in larger.named_parameters() if parameter.requires_grad]
            assert sorted(moving) == sorted(names_in(larger, groups))
            assert sorted(moving_state(larger)) == sorted(moving)  # there are no buffers
            raise KeyError

    with pytest.raises(KeyError):
        leave_by_an_error()
    assert before == {name: parameter.requires_grad for name, parameter in larger.named_parameters()}


@pytest.mark.parametrize(("trainable", "times"), [("all", 6), ("scales", 6), ("lora", 2)])
def test_weights_that_nothing_moves_are_rounded_once(
    larger: nn.Module, monkeypatch: pytest.MonkeyPatch, trainable: str, times: int
) -> None:
    add_adapter_(larger, rank=2, lora_alpha=None, target_modules=["fc"], seed=0)
    groups = trained_groups(larger, trainable, step_rate=0.3, float_rate=0.2, lora_rate=0.1)
    expected, calls, rounded = larger.conv.weight.detach().clone(), [], fake_quant.fake_quantize_weight

    def watch(*args: object) -> torch.Tensor:
        calls.append(args)
        return rounded(*args)

    monkeypatch.setattr(fake_quant, "fake_quantize_weight", watch)
    with trained_alone(larger, groups):
        for _ in range(3):
            larger.fc(larger.conv(torch.ones(1, 2, 3, 3)).flatten(1)).sum()
        assert torch.equal(larger.conv.weight, expected)
    calls_inside = len(calls) - (trainable != "lora")  # the comparison's
    assert calls_inside == times
    with torch.no_grad():
        latent_weight(larger.conv).add_(1.0)
    assert not torch.equal(larger.conv.weight, expected)  # what comes after the block is rounded anew


def test_the_best_state_is_that_of_what_moves(larger: nn.Module) -> None:
    add_adapter_(larger, rank=2, lora_alpha=None, target_modules=["fc"], seed=0)
    with trained_alone(larger, adapter_groups(larger, 0.1)):
        best = BestState(larger, 3.0)
        assert set(best.state) == {f"fc.lora_{part}.default.weight" for part in "AB"}
        with torch.no_grad():
            larger.fc.lora_B["default"].weight.fill_(1.0)
        best.restore_(larger)
    assert not larger.fc.lora_B["default"].weight.any()


def test_rates_rise_and_then_fall_linearly_to_zero(model: nn.Module) -> None:
    adam = adam_of(model, warmup_steps=3)
    peaks = [group["lr"] for group in adam.optimizer.param_groups]
    factors = [0.25, 0.5 * 0.9, 0.75 * 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    for step, factor in enumerate(factors):
        train(model, adam, range(step, step + 1))
        assert [group["lr"] for group in adam.optimizer.param_groups] == pytest.approx([p * factor for p in peaks])
        assert rate_factor(step, 10, 3) == pytest.approx(factor)


@pytest.mark.parametrize("name", get_args(LrScheduler))
def test_schedules_by_diffusers_names_are_diffusers_schedules(name: str) -> None:
    """As its scripts take them: the rate of an update is what the steps before it have left in the optimizer."""
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=10)
    factor_of = rate_schedule(name, 10, 3)
    for step in range(10):
        assert factor_of(step) == pytest.approx(optimizer.param_groups[0]["lr"]), step
        optimizer.step()
        schedule.step()


def test_the_default_schedule_is_the_package_s_own(model: nn.Module) -> None:
    factor_of = rate_schedule(None, 10, 3)
    assert [factor_of(step) for step in range(10)] == [rate_factor(step, 10, 3) for step in range(10)]
    adam = adam_of(model, lr_scheduler="constant", warmup_steps=3)
    peaks = [group["lr"] for group in adam.optimizer.param_groups]
    train(model, adam, range(1))
    assert [group["lr"] for group in adam.optimizer.param_groups] == peaks


def test_the_first_update_of_adam_is_the_rate_against_the_sign_of_the_gradient(model: nn.Module) -> None:
    adam = adam_of(model)
    before = model[2].bias.detach().clone()
    model(torch.randn(4, 6)).sum().backward()
    sign, rate = model[2].bias.grad.sign(), 1e-2 * before.square().mean().sqrt()
    adam.update(0)
    torch.testing.assert_close(model[2].bias.detach(), before - rate * sign, rtol=0, atol=1e-6)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gradients_are_clipped_to_the_norm_of_all_of_them(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    adam = adam_of(model, max_grad_norm=0.5)
    norms = []

    def watch() -> None:
        gradients = [parameter.grad.double().flatten() for parameter in model.parameters()]
        norms.append(torch.cat(gradients).norm().item())

    monkeypatch.setattr(adam.optimizer, "step", watch)
    (1000 * model(torch.randn(4, 6)).square().mean()).backward()
    adam.update(0)
    (1e-6 * model(torch.randn(4, 6)).square().mean()).backward()
    adam.update(1)
    assert norms[0] == pytest.approx(0.5, rel=1e-3)
    assert norms[1] < 1e-3


def test_the_average_follows_its_recurrence(model: nn.Module) -> None:
    adam, expected = adam_of(model), model[2].bias.detach().double().clone()
    for step in range(6):
        train(model, adam, range(step, step + 1))
        decay = 0.0 if step == 0 else min(0.9, 1 - (1 + step) ** -0.75)  # diffusers' warm-up, gamma 1, power 3/4
        expected = decay * expected + (1 - decay) * model[2].bias.detach().double()
    with adam.averaged():
        torch.testing.assert_close(model[2].bias.detach().double(), expected, rtol=1e-5, atol=1e-7)


def test_averaged_weights_are_in_the_model_inside_the_block_only(model: nn.Module) -> None:
    adam = adam_of(model)
    train(model, adam, range(5))
    before, addresses = clone_state(model), [p.data_ptr() for p in model.parameters()]

    def leave_by_an_error() -> None:
        with adam.averaged():
            assert not torch.equal(model[0].bias, before["0.bias"])
            raise KeyError

    with pytest.raises(KeyError):
        leave_by_an_error()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_training_goes_on_from_a_file_as_if_it_had_never_stopped(model: nn.Module, tmp_path) -> None:
    twin = copy.deepcopy(model)
    adam = adam_of(model)
    train(model, adam, range(10))

    first = adam_of(twin)
    train(twin, first, range(4))
    save_checkpoint(tmp_path / "state", {"model": dict(twin.state_dict()), "adam": first.state_dict()})
    state = load_checkpoint(tmp_path / "state")
    second = adam_of(twin)
    twin.load_state_dict(state["model"])
    second.load_state_dict(state["adam"])
    train(twin, second, range(4, 10))

    assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())
    with adam.averaged(), second.averaged():
        assert all(torch.equal(value, twin.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_best_state_is_the_one_with_the_smallest_error(model: nn.Module) -> None:
    best = BestState(model, 3.0)
    start = clone_state(model)
    states = {}
    for step, error in ((1, 4.0), (2, 2.0), (3, 2.0), (4, float("nan")), (5, 2.5)):
        with torch.no_grad():
            model[2].bias.add_(1)
        states[step] = clone_state(model)
        best.offer(model, step, error)
        if step == 1:
            assert (best.step, best.error) == (0, 3.0)
            assert torch.equal(best.state["2.bias"], start["2.bias"])
    assert (best.step, best.error) == (2, 2.0)
    best.restore_(model)
    assert all(torch.equal(value, states[2][name]) for name, value in model.state_dict().items())


def test_the_best_state_survives_a_file(model: nn.Module, tmp_path) -> None:
    best = BestState(model, 3.0)
    best.offer(model, 7, 1.5)
    save_checkpoint(tmp_path / "best", best.state_dict())
    other = BestState(copy.deepcopy(model), 9.0)
    other.load_state_dict(load_checkpoint(tmp_path / "best"))
    assert (other.step, other.error) == (7, 1.5)
    assert all(torch.equal(value, other.state[name]) for name, value in best.state.items())
