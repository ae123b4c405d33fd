"""Specification of what a student warns of: other steps than its own, and two branches where guidance is folded in."""

import copy
import logging
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from diffusers import DDIMScheduler
from pipelines import PIPELINES

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.loading import coverage
from diffusers_pqcad.loading.convert import requantize_
from diffusers_pqcad.loading.student_calls import WatchedCalls

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def warnings(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    coverage.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        yield caplog


SD3 = "SD3"


def folded(family: str) -> Any:
    """A quantized model that says that guidance is folded into it."""
    return quantize_(families.build(family), PQCADConfig(guidance_folded=True, num_inference_steps=5))


def called_with(model: Any, *states: int) -> None:
    """Call a model with the states of these seeds."""
    inputs = families.inputs_of(SD3, batch=len(states))
    shape = inputs["hidden_states"].shape[1:]
    noises = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in states]
    with torch.no_grad():
        model(**inputs | {"hidden_states": torch.stack(noises)})


@pytest.mark.parametrize("saved", [False, True], ids=["in memory", "loaded"])
def test_a_folded_model_warns_of_two_branches(saved: bool, tmp_path: Path, warnings: pytest.LogCaptureFixture) -> None:
    model = folded(SD3)
    if saved:
        model.save_pretrained(tmp_path)
        model = type(model).from_pretrained(tmp_path)
    for states in ((0,), (0, 1), (0, 1, 0), (0, 0, 1, 1)):
        called_with(model, *states)
    assert warnings.text == ""
    called_with(model, 0, 1, 0, 1)
    assert "guidance is folded into this model" in warnings.text
    assert "Call its pipeline with guidance_scale=1, num_inference_steps=5." in warnings.text
    called_with(model, 2, 2)
    assert warnings.text.count("folded") == 1


def test_a_model_that_is_not_folded_or_no_longer_packed_does_not_warn(warnings: pytest.LogCaptureFixture) -> None:
    model = folded(SD3)
    requantize_(model, PQCADConfig(weight_bits=4))
    assert model.config.quantization_config.guidance_folded
    assert len(model._forward_pre_hooks) == 1
    called_with(model.dequantize(), 0, 0)
    called_with(quantize_(families.build(SD3), PQCADConfig()), 0, 0)
    assert warnings.text == ""


def test_where_diffusers_has_a_switch_no_warning_is_needed() -> None:
    unet = families.build("SD-1.5 UNet")
    unet.register_to_config(time_cond_proj_dim=4)
    assert not quantize_(unet, PQCADConfig(guidance_folded=True))._forward_pre_hooks


def test_a_compiled_model_is_traced_without_looking() -> None:
    """What is looked at would be a constant of the graph, or a break in it."""
    model = folded(SD3)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    called_with(compiled, 0, 1)


@pytest.mark.parametrize("family", ["SD-1.5 UNet", "SD3"])
def test_a_student_warns_of_other_steps_in_the_first_of_them(family: str, warnings: pytest.LogCaptureFixture) -> None:
    """By position or by name, and repeated for a batch: all of them are views of the scheduler's timesteps."""
    model = quantize_(families.build(family), PQCADConfig(num_inference_steps=5))
    scheduler, inputs = DDIMScheduler(timestep_spacing="trailing"), families.inputs_of(family, batch=2)
    inputs.pop("timestep", None)
    with torch.no_grad():
        model(**inputs, timestep=torch.tensor([999, 799]))
        model(**inputs, timestep=torch.tensor(999).expand(2))
        if family == "SD-1.5 UNet":
            model(inputs.pop("sample"), 999, **inputs)
            inputs = families.inputs_of(family, batch=2)
            inputs.pop("timestep", None)
        scheduler.set_timesteps(5)
        for timestep in scheduler.timesteps[2:]:  # image-to-image begins in the middle
            model(**inputs, timestep=timestep.expand(2))
        assert warnings.text == ""
        scheduler.set_timesteps(10)
        model(**inputs, timestep=scheduler.timesteps[0].expand(2))
    assert "distilled to 5 steps, and is called in 10: call its pipeline with num_inference_steps=5." in warnings.text


def test_a_model_that_knows_no_steps_does_not_warn_of_them(warnings: pytest.LogCaptureFixture) -> None:
    model = quantize_(families.build(SD3), PQCADConfig())
    inputs = families.inputs_of(SD3, batch=1)
    model(**inputs | {"timestep": torch.arange(50)[:1]})
    assert warnings.text == ""
    assert not model._forward_pre_hooks


def test_a_pipeline_that_calls_once_for_each_branch_is_told(warnings: pytest.LogCaptureFixture) -> None:
    """Wan's does; the same noise with another prompt, or a prompt again, is no second branch."""
    about = PIPELINES["wan"]
    pipeline = about.build()
    quantize_(pipeline.transformer, PQCADConfig(guidance_folded=True, num_inference_steps=2))

    def call(index: int, guidance_scale: float) -> None:
        settings = about.arguments | {"num_inference_steps": 2, "output_type": "latent"}
        noise = torch.Generator().manual_seed(0)
        pipeline(**settings | about.inputs[index] | {"guidance_scale": guidance_scale, "generator": noise})

    for index in (0, 0, 1):
        call(index, 1.0)
    assert warnings.text == ""
    call(0, 5.0)
    assert "WanTransformer3DModel: guidance is folded into this model" in warnings.text
    assert "Call its pipeline with guidance_scale=1, num_inference_steps=2." in warnings.text


def test_a_student_that_was_called_is_copied_and_pickled() -> None:
    model = folded(SD3)
    called_with(model, 0)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        (hook,) = again._forward_pre_hooks.values()
        assert isinstance(hook, WatchedCalls)
        assert (hook.num_inference_steps, hook.guidance_folded, hook.last) == (5, True, None)
