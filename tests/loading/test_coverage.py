"""Specification of what share of a model is packed: counted over all weights, and told wherever a user looks."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import FAMILIES, build
from torch import nn

from diffusers_pqcad import PQCADConfig, inspect, quantize_
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.loading.convert import log_once
from diffusers_pqcad.loading.coverage import average_bits, coverage, float_weights, percent, warn_once

W4 = PQCADConfig(weight_bits=4)


class Model(nn.Module):
    """One of each kind of weight: 200 in a Linear layer, and what no quantizer handles."""

    def __init__(self, *, experts: int = 0) -> None:
        super().__init__()
        self.inner = nn.Linear(10, 20)
        self.proj_out = nn.Linear(20, 5)  # exempt by default
        self.table = nn.Embedding(6, 10)
        self.norm = nn.LayerNorm(20)
        self.gamma = nn.Parameter(torch.ones(20, 1, 1, 1))  # a norm's scale, that broadcasts
        self.position = nn.Parameter(torch.zeros(1, 3, 10))
        self.up = nn.ConvTranspose1d(2, 3, 4)
        if experts:
            self.experts = nn.Parameter(torch.randn(experts, 10, 20))
        self.tied = nn.Linear(10, 6, bias=False)
        self.tied.weight = self.table.weight


def quantized(**options: int) -> Model:
    return quantize_(Model(**options), PQCADConfig(method="fixed", weight_bits=4, modules_to_not_convert=["tied"]))


def test_the_count_by_hand() -> None:
    found = coverage(quantized())
    assert found.floats == {"Linear": 100, "Embedding": 60, "ConvTranspose1d": 24, "Model.position": 30}
    assert (found.packed, found.packed_bits, found.float_bits, found.total) == (200, 800, 214 * 32, 414)
    assert average_bits(quantized()) == (4.0, (800 + 214 * 32) / 414)


def test_a_float_model_has_nothing_packed() -> None:
    assert coverage(Model()).packed == 0
    assert average_bits(Model()) is None


def test_the_last_line_of_inspect() -> None:
    line = str(inspect(quantized())).splitlines()[-1]
    assert line.startswith("1 of 3 layers packed, ")
    assert line.endswith(
        "4.00 bits a packed weight on average, 18.47 over all weights, 48 % of the weights packed; in floating point: "
        "Linear 24 %, Embedding 14 %, Model.position 7 %, ConvTranspose1d 6 %"
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_is_counted_twice_or_left_out(family: str) -> None:
    """Of the packed model, the same weights as of the float one: all matrices, whatever holds them."""
    model = build(family)
    weights = sum(p.numel() for p in model.parameters() if sum(size > 1 for size in p.shape) > 1)
    assert coverage(model).total == weights
    quantize_(model, W4)
    found = coverage(model)
    assert found.total == weights
    assert found.packed == sum(layer.weight_shape.numel() for layer in packed_layers(model).values())
    assert model.config["quantization_config"].packed_share == pytest.approx(found.packed / weights, abs=1e-6)
    assert {id(weight.parameter) for weight in float_weights(model)} <= {id(p) for p in model.parameters()}


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Callable[[int], list[str]]:
    warn_once.cache_clear()
    log_once.cache_clear()
    caplog.set_level(logging.INFO, logger="diffusers_pqcad")

    def find(level: int) -> list[str]:
        return [record.getMessage() for record in caplog.records if record.levelno == level]

    return find


def test_a_large_kind_without_a_quantizer_is_warned_about_once(messages: Any) -> None:
    for _ in range(2):
        quantized(experts=3)
    (warning,) = [text for text in messages(logging.WARNING) if "quantizer" in text]
    assert warning.startswith("Model: 20 % of the weights are packed. There is no quantizer for Model.experts 59 %: ")


def test_what_was_excluded_is_not_warned_about(messages: Any) -> None:
    """Nor embeddings, default exemptions, and kinds of at most a tenth."""
    quantized()
    quantize_(Model(experts=3), PQCADConfig(modules_to_not_convert=["inner"], search_all_modules=True))
    model = nn.Sequential()
    model.pos_embed, model.embed, model.linear = nn.ConvTranspose1d(8, 8, 4), nn.Embedding(30, 8), nn.Linear(8, 8)
    quantize_(model, W4)
    assert [text for text in messages(logging.WARNING) if "quantizer" in text and not text.startswith("Model: ")] == []
    warned = [text for text in messages(logging.WARNING) if text.startswith("Model: ") and "quantizer" in text]
    assert len(warned) == 1  # of the second one's experts
    assert "Linear" not in warned[0]


def test_the_log_names_the_share(messages: Any) -> None:
    quantize_(build("DiT"), W4)
    assert any("% of the weights packed; in floating point: " in text for text in
               messages(logging.INFO) + messages(logging.WARNING))  # fmt: skip


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
def test_a_layer_with_a_weight_norm_stays_as_it_is_and_is_named(norm: Callable[[nn.Module], Any]) -> None:
    """Its weight is computed from two parameters, which a loaded model would look for."""
    model = nn.Sequential(nn.Conv1d(4, 4, 3, padding=1), nn.Conv1d(4, 4, 3, padding=1))
    norm(model[0])
    x = torch.randn(1, 4, 6)
    first = model[0](x)
    quantize_(model, W4)
    assert list(packed_layers(model)) == ["1"]
    assert torch.equal(model[0](x), first)
    (kind,) = coverage(model, W4).without_quantizer
    assert kind in ("Conv1d.weight_v", "ParametrizedConv1d")


def test_percent() -> None:
    shares = (0, 0.001, 0.5, 0.994, 1)
    assert list(map(percent, shares)) == ["0 %", "< 1 %", "50 %", "> 99 %", "100 %"]
