"""Specification of the layout: one conversion at the start of a quantized model, and none inside it."""

import copy

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from diffusers_pqcad import PQCADConfig, quantize_, requantize_
from diffusers_pqcad.layers.quantized import PQCADConv2d
from diffusers_pqcad.runtime.memory_format import channels_last_input

pytestmark = pytest.mark.fast
W4 = PQCADConfig(method="fixed", weight_bits=4)
NUM_FLOATS = 4  # convolutions of `unet`: conv_in, conv_out, and two shortcuts in the last up block


def unet(in_channels: int) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=in_channels,
        out_channels=in_channels,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()


def hooks(model: nn.Module) -> int:
    return sum(hook is channels_last_input for m in model.modules() for hook in m._forward_pre_hooks.values())


@pytest.mark.parametrize("in_channels", [1, 3])
def test_no_int8_convolution_has_to_copy_its_input(in_channels: int) -> None:
    model = quantize_(unet(in_channels), W4)
    strides = {}

    def keep(name):
        return lambda module, args: strides.update({name: args[0].is_contiguous(memory_format=torch.channels_last)})

    for name, module in model.named_modules():
        if isinstance(module, PQCADConv2d):
            module.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        model(torch.randn(2, in_channels, 8, 8), 5)
    assert len(strides) > 10
    assert all(strides.values()), strides


def test_values_are_those_of_the_other_layout() -> None:
    model = quantize_(unet(3), W4)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module._forward_pre_hooks.clear()
    sample = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(sample, 5).sample, plain(sample, 5).sample, rtol=0, atol=1e-5)


def test_weights_stay_contiguous_and_can_be_saved(tmp_path) -> None:
    model = quantize_(unet(3), W4)
    with torch.no_grad():
        model(torch.randn(1, 3, 8, 8), 5)
    assert all(tensor.is_contiguous() for tensor in model.state_dict().values())
    model.save_pretrained(tmp_path)
    assert hooks(UNet2DModel.from_pretrained(tmp_path)) == hooks(model) == NUM_FLOATS


def test_installed_once_and_removed_with_the_quantization() -> None:
    model = quantize_(unet(3), W4)
    requantize_(model, PQCADConfig(method="fixed", weight_bits=3))
    assert hooks(model) == NUM_FLOATS
    assert hooks(copy.deepcopy(model)) == NUM_FLOATS
    assert hooks(model.dequantize()) == 0


def test_without_int8_convolutions_the_layout_stays() -> None:
    assert hooks(quantize_(unet(3), PQCADConfig(method="fixed", weight_bits=4, activation_bits=None))) == 0


def test_a_model_without_quantized_convolutions_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(16, 16))
    quantize_(model, PQCADConfig(method="fixed", weight_bits=4, modules_to_not_convert=["0"]))
    assert hooks(model) == 0


@pytest.mark.parametrize("x", [torch.zeros(3, 4, 5), torch.zeros(1, 3, 4, 5, device="meta")])
def test_other_inputs_pass_as_they_are(x: torch.Tensor) -> None:
    assert channels_last_input(nn.Conv2d(3, 3, 1), (x,)) is None
    assert channels_last_input(nn.Conv2d(3, 3, 1), ()) is None


def test_a_channels_last_input_is_not_copied() -> None:
    x = torch.zeros(1, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert channels_last_input(nn.Conv2d(3, 3, 1), (x,)) is None
