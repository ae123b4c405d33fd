"""Specification of the gains by which rounding errors count before anything is measured."""

import pytest
import torch
from families import sd15, unet, vae
from torch import nn

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.loading.convert import decide_bits, match_modules
from diffusers_pqcad.loading.depth import GAIN_PER_LEVEL, gains_by_depth

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
