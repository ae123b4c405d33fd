"""Specification of adapters: they change nothing at first, go on and off a model, and leave what is below as it is."""

import copy
import sys

import peft
import pytest
import torch
from conftest import build_tiny_scheduler, build_tiny_unet
from diffusers import DDIMPipeline, UNet2DModel
from families import FAMILIES
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.compression.adapters import (
    Adapter,
    adapter_facts,
    add_adapter_,
    below_adapter_,
    carries_adapter,
    put_adapter_,
    take_adapter_,
    targets_of,
)
from diffusers_pqcad.compression.checkpoint import clone_state, model_hash
from diffusers_pqcad.compression.extras import MissingExtraError
from diffusers_pqcad.compression.fake_quant import bits_by_module, convert_, fake_quant_layers
from diffusers_pqcad.compression.progressive import History, ProgressiveConfig, progressive_quantize
from diffusers_pqcad.compression.reconstruction import ReconstructionConfig
from diffusers_pqcad.compression.recording import collect_calibration_set
from diffusers_pqcad.layers.find import is_of_adapter, packed_layers
from diffusers_pqcad.loading.convert import quantizable_layers

TARGETS = ("to_q", "to_out.0", "conv1")  # Linear and convolution layers


def adapted(model: nn.Module, *, seed: int = 0, **settings: object) -> nn.Module:
    """Return `model` with an adapter of rank 2 that changes its output."""
    add_adapter_(model, **{"rank": 2, "lora_alpha": None, "target_modules": TARGETS, "seed": seed} | settings)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            parameter.data.normal_(std=0.1, generator=generator)
    return model


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if is_of_adapter(name)}


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(5))
    return model(noise, torch.tensor([999, 749]))[0]


@pytest.fixture(scope="module")
def pq_below() -> tuple[UNet2DModel, UNet2DModel, History]:
    """A float model with an adapter, the same after PQ to 4 bits, and the history. Read only."""
    model = adapted(build_tiny_unet())
    pipeline = DDIMPipeline(model, build_tiny_scheduler())
    calibration = collect_calibration_set(pipeline, num_trajectories=16, num_inference_steps=4, seed=1, progress=False)
    quantized = copy.deepcopy(model)
    little = {"rounds_per_stage": 1, "price_batch_size": 4, "reconstruction_samples": 16}
    settings = ProgressiveConfig(reconstruction=ReconstructionConfig(iterations=1, batch_size=4), **little)
    history = progressive_quantize(quantized, calibration, PQCADConfig(weight_bits=4), settings, progress=False)
    return model, quantized, history


def test_a_new_adapter_changes_nothing_and_the_seed_decides_it(tiny_unet: UNet2DModel) -> None:
    expected, drawn = outputs(tiny_unet), torch.get_rng_state()
    twin, other = copy.deepcopy(tiny_unet), copy.deepcopy(tiny_unet)
    settings = {"rank": 3, "lora_alpha": None, "target_modules": TARGETS}
    for model, seed in ((tiny_unet, 7), (twin, 7), (other, 8)):
        add_adapter_(model, **settings, seed=seed)
    assert torch.equal(outputs(tiny_unet), expected)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert model_hash(tiny_unet) == model_hash(twin) != model_hash(other)
    assert adapter_facts(tiny_unet) == {"rank": 3, "num_layers": 16}


def test_alpha_over_rank_is_how_often_the_output_counts(tiny_unet: UNet2DModel) -> None:
    model = adapted(tiny_unet, lora_alpha=8)
    layer = model.get_submodule("down_blocks.1.attentions.0.to_q")
    x = torch.randn(4, layer.in_features)
    lora = (x @ layer.lora_A["default"].weight.T) @ layer.lora_B["default"].weight.T
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 8 / 2 * lora)


@pytest.mark.parametrize("target", ["to_x", "attentions", "o_q", "norm1"])
def test_a_target_that_is_no_layer_is_refused(tiny_unet: UNet2DModel, target: str) -> None:
    before = clone_state(tiny_unet).keys()
    with pytest.raises(ValueError, match=f"target_modules: '{target}' is the end of no layer's name in UNet2DModel"):
        add_adapter_(tiny_unet, rank=2, lora_alpha=None, target_modules=["to_q", target], seed=0)
    assert tiny_unet.state_dict().keys() == before
    given = ["down_blocks.0.resnets.0.conv1", "to_out.0"]
    assert targets_of(tiny_unet, given) == given


def test_by_default_most_weights_are_adapted() -> None:
    one, two = ["to_q", "to_k", "to_v", "to_out.0"], ["add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    between, residual = ["net.0.proj", "net.2"], ["conv1", "conv2", "conv_shortcut"]
    ends = ["downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"]
    unet = FAMILIES["SD-1.5 UNet"].build()
    assert targets_of(unet, None) == [*one, "proj_in", "proj_out", *between, *residual, *ends]
    assert targets_of(FAMILIES["SD3"].build(), None) == [*one, *two, "proj_out", *between]
    add_adapter_(unet, rank=1, lora_alpha=None, target_modules=None, seed=0)
    adapted = {name.partition(".base_layer")[0] for name, _ in unet.named_modules() if name.endswith("base_layer")}
    left = set(quantizable_layers(unet)) - adapted
    assert left == {"conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out"}
    with pytest.raises(ValueError, match="target_modules: 'to_q' is the end of no layer's name in Sequential"):
        targets_of(nn.Sequential(nn.Linear(2, 2)), None)
    with pytest.raises(ValueError, match="target_modules: 'to_q' is"):
        targets_of(nn.Sequential(nn.Linear(2, 2)), [])


@pytest.mark.parametrize("state", ["float", "fake-quantized", "packed"])
def test_an_adapter_goes_off_and_on(tiny_unet: UNet2DModel, tiny_quantized: UNet2DModel, state: str) -> None:
    models = {
        "float": lambda: tiny_unet,
        "fake-quantized": lambda: tiny_quantized,
        "packed": lambda: convert_(tiny_quantized),
    }
    bare = models[state]()
    start, expected = clone_state(bare), outputs(bare)
    model = adapted(bare)
    changed = outputs(model)
    assert (changed - expected).abs().max() > 1e-3
    adapter = take_adapter_(model)
    assert not carries_adapter(model)
    assert adapter_facts(model) is None
    assert model.state_dict().keys() == start.keys()
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())
    assert torch.equal(outputs(model), expected)
    assert set(adapter.tensors) >= {"down_blocks.1.attentions.0.to_q.lora_A.weight"}  # no name of ours in a file
    for _ in range(2):  # it is a copy that goes on
        again = put_adapter_(copy.deepcopy(model), adapter)
        assert torch.equal(outputs(again), changed)
        for parameter in again.parameters():
            parameter.data.zero_()
    assert take_adapter_(model) is None


@pytest.mark.filterwarnings("ignore:Already found")
def test_two_adapters_are_refused(tiny_unet: UNet2DModel) -> None:
    model = adapted(tiny_unet)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["to_q"]), model, "second")
    with pytest.raises(ValueError, match=r"expected one adapter, got \['default', 'second'\]"):
        take_adapter_(model)


def test_without_peft_the_extra_is_named(tiny_unet: UNet2DModel, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(copy.deepcopy(tiny_unet))
    monkeypatch.setitem(sys.modules, "peft", None)
    for call in (
        lambda: adapted(tiny_unet),
        lambda: take_adapter_(model),
        lambda: put_adapter_(tiny_unet, Adapter(None, {})),
    ):
        with pytest.raises(MissingExtraError, match=r"^peft: not installed.*pip install \"diffusers-pqcad\[lora\]\""):
            call()
    assert take_adapter_(tiny_unet) is None  # nothing to ask for


def test_what_a_change_sees_below_an_adapter_is_the_bare_model(tiny_unet: UNet2DModel) -> None:
    bare = quantize_(copy.deepcopy(tiny_unet), PQCADConfig(method="fixed", weight_bits=4))
    model = adapted(tiny_unet)
    with pytest.raises(ValueError, match="carries adapters"):
        quantize_(model, PQCADConfig())
    adapter = adapter_state(model)
    model = below_adapter_(model, lambda part: quantize_(part, PQCADConfig(method="fixed", weight_bits=4)))
    assert all(torch.equal(value, adapter[name]) for name, value in adapter_state(model).items())
    assert len(adapter) == len(adapter_state(model))
    take_adapter_(model)
    assert model_hash(model) == model_hash(bare)


# PQ with the adapter on


def test_layers_below_an_adapter_go_by_their_own_names_and_its_own_are_none(pq_below, tiny_quantized) -> None:
    float_model, quantized, history = pq_below
    assert quantizable_layers(float_model).keys() == quantizable_layers(build_tiny_unet()).keys()
    assert fake_quant_layers(quantized).keys() == fake_quant_layers(tiny_quantized).keys()
    assert bits_by_module(quantized) == history.summary["bits"] == history.rounds[-1]["bits"]


def test_quantization_leaves_the_adapter_as_it_is(pq_below) -> None:
    float_model, quantized, _ = pq_below
    before, after = adapter_state(float_model), adapter_state(quantized)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_quantization_sees_the_adapter(pq_below) -> None:
    """Its targets are those of the model with the adapter: without it, the quantized model is further away."""
    float_model, quantized, _ = pq_below
    expected = outputs(float_model)
    bare = copy.deepcopy(quantized)
    take_adapter_(bare)
    assert (outputs(quantized) - expected).square().mean() < 0.25 * (outputs(bare) - expected).square().mean()


def test_packed_layers_below_an_adapter_compute_what_the_fake_quantized_ones_do(pq_below) -> None:
    quantized = copy.deepcopy(pq_below[1])
    expected = outputs(quantized)
    with pytest.raises(ValueError, match="carries adapters"):
        convert_(quantized)
    packed = below_adapter_(quantized, convert_)
    # An input between two codes may come to either, by the last bit of what is before it, which differs by the CPU.
    assert (outputs(packed) - expected).norm() < 1e-2 * expected.norm()
    assert len(packed_layers(packed)) == len(fake_quant_layers(pq_below[1]))
    assert "base_layer" not in str(packed.config.quantization_config.weight_bits_by_module)
