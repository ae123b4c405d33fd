"""Specification of the gains by which rounding errors count before anything is measured."""

import pytest
import torch
from families import sd15, unet, vae
from torch import nn

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.loading.convert import decide_bits, match_modules
from diffusers_pqcad.loading.depth import GAIN_PER_LEVEL, gains_by_depth, shortcuts_at_the_output

pytestmark = pytest.mark.fast


def test_a_level_further_out_counts_more_on_both_sides() -> None:
    names = ["down_blocks.0.a", "down_blocks.1.a", "mid_block.a", "up_blocks.0.a", "up_blocks.1.a", "conv_norm_out"]
    gains = gains_by_depth(names, 10.0)
    assert gains == {
        "down_blocks.0.a": 10.0, "down_blocks.1.a": 1.0, "mid_block.a": 1.0, "up_blocks.0.a": 1.0,
        "up_blocks.1.a": 10.0, "conv_norm_out": 1.0,
    }  # fmt: skip


def test_models_without_levels_have_no_gain() -> None:
    transformer = ["transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"]
    controlnet = ["down_blocks.0.resnets.0.conv1", "controlnet_down_blocks.0"]
    for names in (transformer, controlnet, []):
        assert gains_by_depth(names) == dict.fromkeys(names, 1.0)
    assert set(gains_by_depth(match_modules(vae(), PQCADConfig())).values()) == {1.0}


def test_of_equal_layers_the_outer_ones_get_more_bits() -> None:
    """They come first, so that without gains they would also move first."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 16)
    names = ["down_blocks.0.a", "up_blocks.1.a", "down_blocks.1.a", "up_blocks.0.a"]
    bits = decide_bits(dict.fromkeys(names, layer), PQCADConfig(weight_bits=6, bit_choices=(8, 4)))
    assert list(bits.values()) == [8, 8, 4, 4]


@pytest.mark.parametrize("build", [unet, sd15], ids=["UNet2DModel", "UNet2DConditionModel"])
def test_the_gains_keep_bits_in_the_outermost_blocks_of_a_unet(build) -> None:
    torch.manual_seed(0)
    layers, config = match_modules(build(), PQCADConfig()), PQCADConfig()
    gains = gains_by_depth(layers)
    outer = [name for name in layers if gains[name] == max(gains.values())]
    with_gains, without = (
        sum(decide_bits(layers, config, gain)[name] for name in outer) for gain in (GAIN_PER_LEVEL, 1.0)
    )
    assert with_gains > without


def test_the_shortcuts_at_the_output_are_those_of_the_last_up_block() -> None:
    names = [
        "down_blocks.1.resnets.0.conv_shortcut",
        "mid_block.resnets.0.conv_shortcut",
        "up_blocks.1.resnets.0.conv_shortcut",
        "up_blocks.10.resnets.0.conv1",
        "up_blocks.10.resnets.0.conv_shortcut",
        "up_blocks.10.resnets.1.conv_shortcut",
        "decoder.up_blocks.11.resnets.0.conv_shortcut",
    ]
    assert shortcuts_at_the_output(names) == names[4:6]
    assert shortcuts_at_the_output(["transformer_blocks.0.ff", "conv_shortcut"]) == []


@pytest.mark.parametrize("build", [unet, sd15], ids=["UNet2DModel", "UNet2DConditionModel"])
@pytest.mark.parametrize("method", ["progressive", "fixed"])
def test_they_stay_in_floating_point_unless_asked_for(build, method: str) -> None:
    shortcuts = shortcuts_at_the_output(match_modules(build(), PQCADConfig()))
    assert shortcuts == ["up_blocks.1.resnets.0.conv_shortcut", "up_blocks.1.resnets.1.conv_shortcut"]
    model, everything = build(), build()
    quantize_(model, PQCADConfig(method=method))
    assert not set(packed_layers(model)) & set(shortcuts)
    assert all(type(model.get_submodule(name)) is nn.Conv2d for name in shortcuts)
    quantize_(everything, PQCADConfig(method=method, search_all_modules=True))
    assert set(shortcuts) <= set(packed_layers(everything))


def test_bits_that_were_decided_for_them_are_kept() -> None:
    """As those of a model that was quantized before they stayed in floating point."""
    decided = dict.fromkeys(match_modules(unet(), PQCADConfig()), 8)
    model = quantize_(unet(), PQCADConfig(weight_bits_by_module=decided))
    assert set(packed_layers(model)) == set(decided)
