"""Specification of residual blocks that sum in their convolutions: the same numbers, fewer passes."""

import copy
import pickle

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.blocks import SummingResnetBlock2D, install_blocks_, remove_blocks_
from diffusers_pqcad.kernels import x86
from diffusers_pqcad.layers import PQCADConv2d, packed_layers
from diffusers_pqcad.pending import remove_pending_
from diffusers_pqcad.qparams import WeightSpec

needs_x86 = pytest.mark.skipif(isinstance(x86.library(), str), reason=str(x86.library()))


def block_of(**settings) -> ResnetBlock2D:
    settings = {"in_channels": 16, "out_channels": 16, "temb_channels": 12, "groups": 4} | settings
    model = nn.ModuleList([ResnetBlock2D(**settings)]).eval().requires_grad_(False)
    quantize_(model, PQCADConfig(method="fixed", weight_bits=8))
    remove_pending_(model)  # the codes of both are the same then
    return model[0]


def call_both(block: ResnetBlock2D, x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Return what `block` returns, and what it returns as a plain `ResnetBlock2D`."""
    plain = copy.deepcopy(block)
    remove_blocks_(plain)
    assert type(plain) is ResnetBlock2D
    with torch.no_grad():
        return block(x, *args, **kwargs), plain(x, *args, **kwargs)


def image(channels: int = 16) -> Tensor:
    return torch.randn(2, channels, 5, 6).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def block() -> ResnetBlock2D:
    block = block_of()
    if not isinstance(block, SummingResnetBlock2D):
        pytest.skip("no kernel sums on this computer")
    return block


def addends(block: ResnetBlock2D) -> list[Tensor | None]:
    """What the convolutions of `block` are given to add, from now on."""
    seen: list[Tensor | None] = []
    for conv in (block.conv1, block.conv2):
        conv.register_forward_pre_hook(lambda conv, args, kwargs: seen.append(kwargs.get("addend")), with_kwargs=True)
    return seen


@pytest.mark.parametrize(
    "settings", [{}, {"out_channels": 24}, {"skip_time_act": True}], ids=lambda s: next(iter(s), "")
)
def test_sums_are_those_of_the_plain_block(block: ResnetBlock2D, settings) -> None:
    block = block_of(**settings)
    seen = addends(block)
    actual, expected = call_both(block, image(), torch.randn(2, 12))
    assert [None if tensor is None else tuple(tensor.shape) for tensor in seen[:2]] == [
        (2, block.out_channels, 1, 1),
        (2, block.out_channels, 5, 6),
    ]
    # One code of conv2's input may differ at a tie: the sums are those of other roundings.
    assert (actual - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert (actual - expected).abs().mean() <= 1e-4 * expected.abs().mean()


@pytest.mark.parametrize(
    "settings",
    [
        {"output_scale_factor": 2.0},
        {"time_embedding_norm": "scale_shift"},
        {"up": True},
        {"down": True},
        {"temb_channels": None},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_other_blocks_do_as_before(block: ResnetBlock2D, settings) -> None:
    other = block_of(**settings)
    seen = addends(other)
    temb = None if settings.get("temb_channels", 12) is None else torch.randn(2, 12)
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    actual, expected = call_both(other, x, temb)
    assert torch.equal(actual, expected)
    assert seen == [None] * 4


def test_whoever_looks_at_a_convolution_sees_its_output_alone(block: ResnetBlock2D) -> None:
    outputs: list[Tensor] = []
    block.conv2.register_forward_hook(lambda conv, args, output: outputs.append(output))
    actual, expected = call_both(block, image(), torch.randn(2, 12))
    assert torch.equal(actual, expected)
    assert torch.equal(outputs[0], outputs[1])


def test_a_hook_that_replaces_the_input_does_not_lose_the_sum(block: ResnetBlock2D) -> None:
    for conv in (block.conv1, block.conv2):
        conv.register_forward_pre_hook(lambda conv, args: (args[0] * 0.5,))
    actual, expected = call_both(block, image(), torch.randn(2, 12))
    assert (actual - expected).abs().max() <= 2e-2 * expected.abs().max()


def test_a_hook_on_all_modules_sees_outputs_alone(block: ResnetBlock2D) -> None:
    outputs: list[Tensor] = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: outputs.append(output) if isinstance(module, PQCADConv2d) else None
    )
    try:
        actual, expected = call_both(block, image(), torch.randn(2, 12))
    finally:
        handle.remove()
    assert torch.equal(actual, expected)
    assert [torch.equal(mine, plain) for mine, plain in zip(outputs[:2], outputs[2:], strict=True)] == [True, True]


def test_its_name_is_the_one_that_libraries_look_for(block: ResnetBlock2D) -> None:
    """For instance in `_no_split_modules`, which keep a block on one device."""
    assert type(block).__name__ == "ResnetBlock2D"
    assert type(pickle.loads(pickle.dumps(block))) is SummingResnetBlock2D


def test_an_adapter_on_a_convolution_is_not_passed_by(block: ResnetBlock2D) -> None:
    holder = nn.ModuleList([block])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False), holder)
    actual, expected = call_both(block, image(), torch.randn(2, 12))
    assert torch.equal(actual, expected)


def test_training_keeps_its_dropout_and_gradients(block: ResnetBlock2D) -> None:
    block.train()
    x = image().requires_grad_()
    seen = addends(block)
    block(x, torch.randn(2, 12)).sum().backward()
    assert x.grad is not None
    assert seen == [None, None]


def test_the_gradient_of_an_addend_is_kept(block: ResnetBlock2D) -> None:
    """Where only the time embedding is trained, no other input of a convolution asks for a gradient."""
    temb = torch.randn(2, 12, requires_grad=True)
    block.conv1(torch.randn(2, 16, 5, 6), temb.sum() * torch.ones(2, 16, 1, 1)).sum().backward()
    assert temb.grad is not None
    temb.grad = None
    block(image(), temb).sum().backward()
    assert temb.grad is not None


def test_a_forced_kernel_sums_afterwards(block: ResnetBlock2D) -> None:
    with kernels.use("reference"):
        actual, expected = call_both(block, image(), torch.randn(2, 12))
    torch.testing.assert_close(actual, expected)


def test_a_block_changes_its_class_and_nothing_else(block: ResnetBlock2D, tiny_unet) -> None:
    names = [name for name, _ in tiny_unet.named_modules()]
    quantize_(tiny_unet, PQCADConfig())
    assert type(tiny_unet.mid_block.resnets[0]) is SummingResnetBlock2D
    assert type(copy.deepcopy(tiny_unet).mid_block.resnets[0]) is SummingResnetBlock2D
    assert [name for name, _ in tiny_unet.named_modules()] == names
    tiny_unet.dequantize()
    assert type(tiny_unet.mid_block.resnets[0]) is ResnetBlock2D


def test_blocks_of_float_convolutions_stay(block: ResnetBlock2D, tiny_unet) -> None:
    install_blocks_(tiny_unet)
    assert not any(isinstance(module, SummingResnetBlock2D) for module in tiny_unet.modules())
    quantize_(tiny_unet, PQCADConfig(modules_to_not_convert=["mid_block"]))
    assert type(tiny_unet.mid_block.resnets[0]) is ResnetBlock2D
    assert len(packed_layers(tiny_unet)) > 0


@needs_x86
@torch.no_grad()
@pytest.mark.parametrize(
    "addend",
    [
        lambda shape: torch.randn(shape).contiguous(memory_format=torch.channels_last),
        lambda shape: torch.randn(*shape[:2], 1, 1),
        lambda shape: torch.randn(shape),  # another layout: summed afterwards
        lambda shape: torch.randn(shape).double(),
        lambda shape: torch.randn(shape[1], 1, 1),
        lambda shape: torch.randn(()),
    ],
    ids=["residual", "per_image", "contiguous", "double", "per_channel", "number"],
)
@pytest.mark.parametrize("out_channels", [32, 21])
def test_any_addend_is_added(addend, out_channels: int) -> None:
    layer = PQCADConv2d(7, out_channels, 3, padding=1).requires_grad_(False)
    layer.pack_(WeightSpec(4), activation_bits=8)
    x = torch.randn(3, 7, 5, 3)
    with kernels.use("x86"):
        output = layer(x)
        added = addend(output.shape)
        torch.testing.assert_close(layer(x, added), output + added, rtol=1e-6, atol=1e-6)


@needs_x86
@torch.no_grad()
def test_an_addend_without_a_batch() -> None:
    layer = PQCADConv2d(7, 8, 3, padding=1).requires_grad_(False)
    layer.pack_(WeightSpec(4), activation_bits=8)
    x, added = torch.randn(7, 5, 3), torch.randn(8, 5, 3)
    with kernels.use("x86"):
        torch.testing.assert_close(layer(x, added), layer(x) + added, rtol=1e-6, atol=1e-6)
