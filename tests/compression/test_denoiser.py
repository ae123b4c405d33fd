"""Specification of denoisers: a recorded step is made again, and a tapped pipeline is left as it was."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler
from hypothesis import given
from hypothesis import strategies as st
from pipelines import PIPELINES, together
from torch import Tensor, nn

from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.denoiser import (
    Column,
    Denoiser,
    Repeated,
    StepPlan,
    Stop,
    TappedStep,
    denoiser_name,
    named_arguments,
    run_tapped,
    states_of,
)
from diffusers_pqcad.compression.recording import template_of, values_of
from diffusers_pqcad.compression.schedulers import deterministic_scheduler

pytestmark = pytest.mark.fast
SD = PIPELINES["sd"]

TABLE = torch.arange(6.0).view(3, 2)
NESTED = {
    "text": Column("text", 2),
    "more": {"ids": Column("more.ids", 1), "scale": 0.5, "options": {"on": True, "nothing": None}},
    "table": TABLE,
    "residuals": [Column("residuals.0", 2), [Column("residuals.1.0", 2), "word"]],
    "sizes": Repeated([1, 8, 8], 2),
    "pictures": Repeated(Column("pictures", 1), 1),
}


class Watching(nn.Module):
    """Keeps what it was called with; its outputs are `outputs` of it, in a tuple as diffusers' models have them."""

    def __init__(self, outputs: Any = lambda state, **arguments: state) -> None:
        super().__init__()
        self.outputs, self.seen = outputs, []

    def forward(self, sample: Tensor, timestep: Tensor, **arguments: Any) -> tuple[Tensor]:
        self.seen.append({"sample": sample, "timestep": timestep, **arguments})
        return (self.outputs(sample, **arguments),)


# Plans


def same(one: Any, other: Any) -> bool:
    """Whether two nestings have the same types and values, in the same places."""
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


def test_a_plan_survives_being_written() -> None:
    plan = StepPlan("hidden_states", (2, 1), (-1.5, 2.0, 0.5), (NESTED, {"text": Column("1.text", 1)}))
    written = plan.to_dict()
    assert same(vars(StepPlan.from_dict(written)), vars(plan))
    json.dumps(written, default=lambda tensor: tensor.tolist())  # plain but for its tensors
    assert same(vars(StepPlan.from_dict(StepPlan().to_dict())), vars(StepPlan()))


def test_names_that_plans_use_themselves_are_names_too() -> None:
    """Arguments may be called "column", "repeated" or "dict"."""
    plan = StepPlan(arguments=({"column": {"column": [1, 2]}, "dict": {"repeated": Column("a", 1)}},))
    assert same(StepPlan.from_dict(plan.to_dict()).arguments, plan.arguments)


SHARED = {
    "text": Column("text", 2),
    "more": {"ids": Column("more.ids", 4), "scale": 0.5},
    "residuals": [Column("residuals.0", 2), TABLE],
    "sizes": Repeated([1, 8, 8], 2),
}


@pytest.mark.parametrize(("weights", "branch"), [((-1.5, 2.5), 1), ((2.5, -1.5), 0)])
def test_a_folded_plan_is_called_with_the_branch_of_the_weight_g(weights: tuple[float, float], branch: int) -> None:
    plan = StepPlan("hidden_states", (2,), weights, (SHARED,)).folded()
    assert (plan.state_name, plan.branches, plan.weights) == ("hidden_states", (1,), (1.0,))
    assert same(StepPlan.from_dict(plan.to_dict()).arguments, plan.arguments)
    condition = {
        "text": torch.randn(3, 2, 5), "more.ids": torch.arange(12).view(3, 4), "residuals.0": torch.randn(3, 2, 4)
    }  # fmt: skip
    model, state = Watching(), torch.randn(3, 4, 2, 2)
    assert torch.equal(Denoiser(model, replace(plan, state_name="sample"))(state, torch.zeros(3), condition), state)
    (seen,) = model.seen
    assert len(seen["sample"]) == len(seen["timestep"]) == 3
    assert torch.equal(seen["text"], condition["text"][:, branch])
    of_branch = condition["more.ids"][:, 2 * branch : 2 * branch + 2]
    assert torch.equal(seen["more"]["ids"], torch.cat([of_branch[:, 0], of_branch[:, 1]]))
    assert torch.equal(seen["residuals"][0], condition["residuals.0"][:, branch])
    assert torch.equal(seen["residuals"][1], TABLE)
    assert seen["sizes"] == [[1, 8, 8]] * 3


def test_of_a_call_for_each_branch_a_folded_plan_keeps_the_conditional_one() -> None:
    calls = ({"text": Column("0.text", 1)}, {"text": Column("1.text", 1), "more": TABLE})
    assert StepPlan("sample", (1, 1), (-2.0, 3.0), calls).folded().arguments == (calls[1],)
    assert StepPlan("sample", (1, 1), (3.0, -2.0), calls).folded().arguments == (calls[0],)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (StepPlan(), r"fold_guidance: expected .* got weights \(1.0,\).* nothing to fold"),
        (StepPlan(branches=(2,), weights=(0.5, 0.5)), r"got weights \(0.5, 0.5\)"),
        (StepPlan(branches=(2,), weights=(-1.0, 3.0)), r"got weights \(-1.0, 3.0\)"),
        (StepPlan(branches=(3,), weights=(-1.0, 0.5, 1.5)), "fold_guidance: expected"),
        (
            StepPlan(branches=(2,), weights=(-1.0, 2.0), arguments=({"text": Column("text", 3)},)),
            "fold_guidance: text has 3 rows for each image, which 2 branches cannot share",
        ),
    ],
)
def test_a_plan_that_cannot_be_folded_says_why(plan: StepPlan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan.folded()


# Calls


def test_an_argument_is_filled_in_wherever_it_stands() -> None:
    model, state = Watching(), torch.randn(3, 4, 2, 2)
    condition = {
        "text": torch.randn(3, 2, 5),
        "more.ids": torch.arange(3).view(3, 1),
        "residuals.0": torch.randn(3, 2, 4),
        "residuals.1.0": torch.randn(3, 2, 1),
        "pictures": torch.randn(3, 1, 7),
    }
    denoiser = Denoiser(model, StepPlan(branches=(2,), weights=(0.0, 1.0), arguments=(NESTED,)))
    denoiser(state, torch.tensor([9, 8, 7]), condition)
    (seen,) = model.seen
    assert torch.equal(seen["sample"], torch.cat([state, state]))
    assert seen["timestep"].tolist() == [9, 8, 7, 9, 8, 7]
    # All images without the prompt, then all with it: as pipelines do it, and as the states are repeated.
    assert torch.equal(seen["text"], torch.cat([condition["text"][:, 0], condition["text"][:, 1]]))
    assert torch.equal(seen["more"]["ids"], torch.arange(3))
    assert seen["more"]["scale"] == 0.5
    assert seen["more"]["options"] == {"on": True, "nothing": None}
    assert torch.equal(seen["table"], TABLE)
    assert torch.equal(seen["residuals"][0], condition["residuals.0"].transpose(0, 1).reshape(6, 4))
    assert torch.equal(seen["residuals"][1][0], condition["residuals.1.0"].transpose(0, 1).reshape(6, 1))
    assert seen["residuals"][1][1] == "word"
    assert seen["sizes"] == [[1, 8, 8]] * 6
    assert len(seen["pictures"]) == 3
    assert all(torch.equal(item, condition["pictures"][:, 0]) for item in seen["pictures"])


@pytest.mark.parametrize("calls", ["one of two branches", "two of one"])
def test_the_output_is_classifier_free_guidance(calls: str) -> None:
    """eps = (1 - g) eps(z) + g eps(z | c): Ho & Salimans 2022, eq. 6, with w = g - 1."""
    scale, state, text = 3.5, torch.randn(5, 3, 4, 4), torch.randn(5, 2, 3)
    model = Watching(lambda state, text: torch.tanh(state * text[:, :, None, None]))
    if calls == "two of one":
        arguments = ({"text": Column("0.text", 1)}, {"text": Column("1.text", 1)})
        plan = StepPlan(branches=(1, 1), weights=(1 - scale, scale), arguments=arguments)
        condition = {"0.text": text[:, :1], "1.text": text[:, 1:]}
    else:
        plan = StepPlan(branches=(2,), weights=(1 - scale, scale), arguments=({"text": Column("text", 2)},))
        condition = {"text": text}
    found = Denoiser(model, plan)(state, torch.zeros(5), condition)
    without, prompted = (torch.tanh(state * text[:, index, :, None, None]) for index in (0, 1))
    torch.testing.assert_close(found, without + scale * (prompted - without))
    assert len(model.seen) == len(plan.branches)


def test_channels_beyond_the_state_are_cut() -> None:
    model = Watching(lambda state: torch.cat([state * 2, state * 100], dim=1))
    state = torch.randn(2, 3, 4, 4)
    assert torch.equal(Denoiser(model)(state, torch.zeros(2), {}), 2 * state)
    plan = StepPlan(branches=(2,), weights=(0.25, 0.75))
    torch.testing.assert_close(Denoiser(model, plan)(state, torch.zeros(2), {}), 2 * state)


def test_gradients_reach_the_model() -> None:
    layer = nn.Linear(4, 4)
    plan = StepPlan(branches=(2,), weights=(-1.0, 2.0))
    output = Denoiser(Watching(lambda state: layer(state)), plan)(torch.randn(2, 4), torch.zeros(2), {})
    output.square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0


def test_the_name_of_the_states_is_the_models() -> None:
    class Transformer(nn.Module):
        def forward(self, hidden_states: Tensor, timestep: Tensor) -> tuple[Tensor]:
            return (hidden_states + timestep[:, None],)

    found = Denoiser(Transformer(), StepPlan("hidden_states"))(torch.zeros(2, 3), torch.tensor([1.0, 2.0]), {})
    assert found.tolist() == [[1, 1, 1], [2, 2, 2]]


# States


@pytest.mark.parametrize("stride", [1, 2])
def test_states_are_those_of_the_scheduler(
    tiny_pipeline: DDIMPipeline, tiny_calibration_set: CalibrationSet, stride: int
) -> None:
    model, scheduler = tiny_pipeline.unet, DDIMScheduler.from_config(tiny_pipeline.scheduler.config)
    noise = torch.randn(3, 1, 8, 8)
    asked: list[int] = []

    def condition_at(k: int) -> dict[str, Tensor]:
        asked.append(k)
        return {}

    states = states_of(Denoiser(model), tiny_calibration_set.grid().every(stride), noise, condition_at)
    scheduler.set_timesteps(4 // stride)
    assert len(states) == 1 + len(scheduler.timesteps)
    assert asked == list(range(len(scheduler.timesteps)))
    sample = noise
    for timestep, state in zip(scheduler.timesteps, states, strict=False):
        torch.testing.assert_close(state, sample, rtol=0, atol=1e-5)
        with torch.no_grad():
            sample = scheduler.step(model(sample, timestep).sample, timestep, sample).prev_sample
    torch.testing.assert_close(states[-1], sample, rtol=0, atol=1e-5)
    assert not states[-1].requires_grad


# Pipelines


def test_the_denoiser_of_a_pipeline_is_found_by_its_name() -> None:
    def pipeline(**parts: object) -> Any:
        return SimpleNamespace(**parts)

    assert denoiser_name(pipeline(unet=1, vae=2)) == "unet"
    assert denoiser_name(pipeline(transformer=1, transformer_2=None)) == "transformer"
    for parts in ({"vae": 1}, {"unet": 1, "transformer": 2}, {"transformer": 1, "transformer_2": 2}):
        with pytest.raises(ValueError, match="expected one component that denoises, unet or transformer"):
            denoiser_name(pipeline(**parts))


def test_arguments_go_by_name_whatever_way_they_came() -> None:
    found = named_arguments(Watching(), (1, 2), {"text": 3})
    assert found == {"sample": 1, "timestep": 2, "text": 3}
    assert named_arguments(Watching(), (), {"sample": 1, "timestep": 2}) == {"sample": 1, "timestep": 2}


def run(pipeline: Any, on_step: Any, **changes: Any) -> Any:
    arguments = together(SD.inputs[:2]) | SD.arguments | {"num_inference_steps": 3, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    return run_tapped(pipeline, on_step, **arguments | {"generator": generators} | changes)


def test_a_tap_sees_the_calls_and_the_steps() -> None:
    pipeline, steps = PIPELINES["sd"].build(), []
    output = run(pipeline, steps.append)
    assert [int(step.timestep) for step in steps] == pipeline.scheduler.timesteps.tolist() == [999, 666, 332]
    assert torch.equal(output.images, steps[-1].next_state)
    for step, after in zip(steps, steps[1:], strict=False):
        assert torch.equal(step.next_state, after.state)
    for step in steps:
        (call,) = step.calls
        assert torch.equal(call.arguments["sample"], torch.cat([step.state] * 2))
        assert call.arguments["encoder_hidden_states"].shape == (4, 16, 8)
        without, prompted = call.output.chunk(2)
        torch.testing.assert_close(step.output, without + 5 * (prompted - without))


class Unforeseen(Exception):
    """Something that goes wrong in the middle of a call."""


@pytest.mark.parametrize("error", [None, Stop, Unforeseen])
def test_a_tap_leaves_the_pipeline_as_it_was(error: type[Exception] | None) -> None:
    pipeline = PIPELINES["sd"].build()
    hooks = [dict(module._forward_hooks) for module in pipeline.unet.modules()]
    attributes, settings = set(vars(pipeline.scheduler)), dict(pipeline.scheduler.config)
    state = copy.deepcopy(pipeline.unet.state_dict())
    before = run(pipeline, lambda step: None).images
    freed: list[None] = []
    pipeline.maybe_free_model_hooks = lambda: freed.append(None)
    seen: list[TappedStep] = []

    def on_step(step: TappedStep) -> None:
        seen.append(step)
        if error is not None and len(seen) == 2:
            raise error

    if error is Unforeseen:
        with pytest.raises(Unforeseen):
            run(pipeline, on_step)
    else:
        assert (run(pipeline, on_step) is None) == (error is Stop)
        assert freed == [None]  # once: offloaded models go back
    assert len(seen) == (3 if error is None else 2)
    assert [dict(module._forward_hooks) for module in pipeline.unet.modules()] == hooks
    assert "step" not in vars(pipeline.scheduler)
    assert pipeline.scheduler.step.__func__ is DDIMScheduler.step
    assert attributes <= set(vars(pipeline.scheduler))
    assert dict(pipeline.scheduler.config) == settings
    assert all(torch.equal(value, state[name]) for name, value in pipeline.unet.state_dict().items())
    assert torch.equal(run(pipeline, lambda step: None).images, before)


def test_a_wrapped_step_is_wrapped_afterwards() -> None:
    """Somebody else's wrapper around `step` of the same scheduler stays where it was."""
    pipeline, calls = PIPELINES["sd"].build(), []
    original = pipeline.scheduler.step

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    pipeline.scheduler.step = wrapper
    run(pipeline, lambda step: None)
    assert len(calls) == 3
    assert pipeline.scheduler.step is wrapper


# Templates


def leaves() -> st.SearchStrategy[Any]:
    """Kinds of arguments: with a batch axis and some rows an image, without one, plain, and lists of equal items."""
    shapes = st.lists(st.integers(1, 3), max_size=2)
    batched = st.tuples(st.just("batched"), st.integers(1, 3), shapes)
    plain = st.tuples(st.just("plain"), st.sampled_from([None, True, 2, 0.5, "word"]))
    fixed = st.tuples(st.just("fixed"), shapes)
    repeated = st.tuples(st.just("repeated"), st.integers(1, 3), st.sampled_from([1.5, "word"]))
    return st.one_of(batched, plain, fixed, repeated)


def nestings() -> st.SearchStrategy[Any]:
    return st.recursive(
        leaves(),
        lambda inner: st.one_of(
            st.tuples(st.just("dict"), st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)),
            st.tuples(st.just("list"), st.lists(inner, min_size=1, max_size=3)),
        ),
        max_leaves=6,
    )


def built(node: Any, images: Tensor) -> Any:
    """The argument that `node` describes in a call for `images` (n,): each has values of its own, row by row."""
    kind, *about = node
    if kind == "batched":
        rows, shape = about
        values = torch.arange(rows)[:, None] * 1000 + images[None]
        return (values.flatten().view(-1, *(1,) * len(shape)) + torch.zeros(rows * len(images), *shape)).float()
    if kind == "plain":
        return about[0]
    if kind == "fixed":
        return torch.ones(7, *about[0])
    if kind == "repeated":
        return [about[1]] * (about[0] * len(images))
    if kind == "dict":
        return {name: built(inner, images) for name, inner in about[0].items()}
    return [built(inner, images) for inner in about[0]]


@given(node=nestings(), count=st.integers(1, 5))
def test_a_template_filled_with_the_columns_is_the_argument(node: Any, count: int) -> None:
    template = template_of(built(node, torch.zeros(1)), built(node, torch.zeros(2)), "argument")
    wanted = built(node, torch.arange(1.0, count + 1))
    columns = values_of(template, wanted, "argument", count)
    assert all(len(values) == count for values in columns.values())
    model, plan = Watching(), StepPlan(arguments=({"argument": template},))
    Denoiser(model, StepPlan.from_dict(plan.to_dict()))(torch.zeros(count, 1), torch.zeros(count), columns)
    assert same(model.seen[0]["argument"], wanted)
    order = torch.arange(count).flip(0)  # and so it is for any images, in any order
    flipped = {name: values[order] for name, values in columns.items()}
    Denoiser(model, plan)(torch.zeros(count, 1), torch.zeros(count), flipped)
    assert same(model.seen[1]["argument"], built(node, torch.arange(1.0, count + 1)[order]))


@pytest.mark.parametrize(
    ("one", "two"),
    [
        (torch.ones(1, 3), torch.ones(2, 4)),
        (torch.ones(2, 3), torch.ones(3, 3)),
        (torch.zeros(3), torch.ones(3)),
        ([1, 2], [1, 2, 1, 2]),
        ({"a": 1}, {"b": 1}),
        (1, 2),
        ("1 image", "2 images"),
        (torch.ones(1), None),
        pytest.param(object(), object(), id="objects"),
    ],
    ids=str,
)
def test_an_argument_that_does_not_follow_the_images_is_refused_by_name(one: Any, two: Any) -> None:
    with pytest.raises(ValueError, match="options.text: the pipeline hands it to its denoiser in a way"):
        template_of({"text": one}, {"text": two}, "options")


def test_what_all_images_share_must_be_the_same_in_each_call() -> None:
    template = {"scale": 0.5, "table": TABLE}
    assert values_of(template, {"scale": 0.5, "table": TABLE.clone()}, "more", 2) == {}
    for name, value in (("scale", 0.6), ("table", TABLE + 1)):
        with pytest.raises(ValueError, match=f"more.{name}: it has no batch axis, and differs"):
            values_of(template, template | {name: value}, "more", 2)
    with pytest.raises(ValueError, match="text: expected 4 rows for 2 images, got shape"):
        values_of(Column("text", 2), torch.zeros(3, 5), "text", 2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_tapped_pipeline_makes_the_images_of_an_untapped_one(eta: float) -> None:
    """Pipelines look at the signature of `step` to see what to hand to it: `eta`, `generator`."""
    pipeline, seen = PIPELINES["sd"].build(), []
    tapped = run(pipeline, seen.append, eta=eta).images
    arguments = together(SD.inputs[:2]) | SD.arguments | {"num_inference_steps": 3, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    assert torch.equal(tapped, pipeline(**arguments, generator=generators, eta=eta).images)


@pytest.mark.parametrize("kind", ["sdxl", "flux", "wan"])
def test_pipelines_of_all_sorts_are_tapped(kind: str) -> None:
    pipeline, steps = PIPELINES[kind].build(), []
    pipeline.scheduler = deterministic_scheduler(pipeline.scheduler)[0]
    run_tapped(
        pipeline,
        steps.append,
        **together(PIPELINES[kind].inputs[:1]) | PIPELINES[kind].arguments,
        num_inference_steps=2,
        output_type="latent",
    )
    assert [len(step.calls) for step in steps] == [2, 2] if kind == "wan" else [1, 1]
