"""Specification of the gains by which rounding errors count before anything is measured."""

import pytest
import torch
from families import sd15, unet, vae

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.loading.convert import match_modules
from diffusers_pqcad.loading.depth import gains_by_depth

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


@pytest.mark.parametrize("build", [unet, sd15], ids=["UNet2DModel", "UNet2DConditionModel"])
def test_the_outermost_blocks_of_a_unet_get_more_bits(build) -> None:
    torch.manual_seed(0)
    bits = quantize_(build(), PQCADConfig()).config.quantization_config.weight_bits_by_module
    outermost = max(int(name.split(".")[1]) for name in bits if name.startswith("up_blocks"))
    outer = [width for name, width in bits.items() if name.startswith(("down_blocks.0.", f"up_blocks.{outermost}."))]
    inner = [width for name, width in bits.items() if name.startswith(("mid_block.", "up_blocks.0."))]
    assert min(outer) > sum(inner) / len(inner)
