"""Specification of the warning of a folded model: it sees two branches, and no other batch is one."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.loading import coverage
from diffusers_pqcad.loading.convert import requantize_

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
