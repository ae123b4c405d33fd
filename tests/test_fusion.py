"""Specification of plans of fused blocks: made once, anew when anything in the block changes, never in the way."""

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any, cast
from unittest import mock

import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.fusion import FusedBlock, remove_fused_
from diffusers_pqcad.layers import packed_layers
from diffusers_pqcad.qparams import WeightSpec

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: ResnetBlock2D(in_channels=16, out_channels=24, temb_channels=12, groups=4),
    "attention": lambda: Attention(16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True, bias=True),
}
FIRST = {"residual": "conv1", "attention": "to_q"}
NORM = {"residual": "norm2", "attention": "group_norm"}
LAST = {"residual": "conv2", "attention": "to_out.0"}


@pytest.fixture(params=BLOCKS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(kind: str) -> nn.ModuleList:
    model = nn.ModuleList([BLOCKS[kind]()]).eval().requires_grad_(False)
    quantize_(model, PQCADConfig(method="fixed", weight_bits=8))
    if not isinstance(model[0], FusedBlock):
        pytest.skip("no kernel takes blocks on this computer")
    return model


def inputs_of(kind: str, height: int = 5) -> tuple[Tensor, ...]:
    image = torch.randn(2, 16, height, 6).contiguous(memory_format=torch.channels_last)
    return (image, torch.randn(2, 12)) if kind == "residual" else (image,)


@torch.no_grad()
def builds(block: nn.Module, *inputs: Tensor) -> int:
    """How many plans a call makes; its output is that of a block without memory."""
    fresh, kind = copy.deepcopy(block), cast(Any, type(block))
    with mock.patch.object(kind, "build_plan", autospec=True, side_effect=kind.build_plan) as build:
        output = block(*inputs)
    expected = fresh(*inputs)
    # What is not fused in one of them (a copy lays numbers side by side) has another attention, in fp32.
    assert (output - expected).norm() <= 2e-2 * expected.norm()
    return build.call_count


def test_one_plan_for_each_size(model: nn.ModuleList, kind: str) -> None:
    small, large = inputs_of(kind), inputs_of(kind, height=7)
    assert [builds(model[0], *inputs) for inputs in (small, small, large, small, large)] == [1, 0, 1, 0, 0]
    assert builds(model[0], *inputs_of(kind)) == 0


def replace_parameter(model: nn.ModuleList, kind: str) -> None:
    norm = model[0].get_submodule(NORM[kind])
    norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)


def replace_numbers(model: nn.ModuleList, kind: str) -> None:
    """As `model.to` does: the parameter stays, its memory does not."""
    norm = model[0].get_submodule(NORM[kind])
    norm.bias.data = norm.bias.data + 1


def spread_numbers(model: nn.ModuleList, kind: str) -> None:
    """The same first number; C would read its neighbours."""
    norm = model[0].get_submodule(NORM[kind])
    room = torch.randn(2 * len(norm.weight))
    norm.weight.data = room[: len(norm.weight)]
    builds(model[0], *inputs_of(kind))
    norm.weight.data = room[::2]


def replace_bias(model: nn.ModuleList, kind: str) -> None:
    layer = model[0].get_submodule(LAST[kind])
    layer.bias = nn.Parameter(layer.bias + 3, requires_grad=False)


def drop_bias(model: nn.ModuleList, kind: str) -> None:
    model[0].get_submodule(LAST[kind]).bias = None


def change_eps(model: nn.ModuleList, kind: str) -> None:
    model[0].get_submodule(NORM[kind]).eps = 1.0


def change_groups(model: nn.ModuleList, kind: str) -> None:
    model[0].get_submodule(NORM[kind]).num_groups = 2


def lower_bits(model: nn.ModuleList, kind: str) -> None:
    layer = packed_layers(model)[f"0.{LAST[kind]}"]
    layer.unpack_()
    layer.pack_(WeightSpec(4), activation_bits=8)


def replace_layer(model: nn.ModuleList, kind: str) -> None:
    model[0].set_submodule(LAST[kind], copy.deepcopy(model[0].get_submodule(LAST[kind])))


def move_and_return(model: nn.ModuleList, kind: str) -> None:
    model.double().float()


def look(model: nn.ModuleList, kind: str) -> None:
    model[0].get_submodule(LAST[kind]).register_forward_hook(lambda module, args, output: output * 2)


CHANGES = [
    replace_parameter, replace_numbers, spread_numbers, replace_bias, drop_bias, change_eps, change_groups, lower_bits,
    replace_layer, move_and_return, look,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_asks_for_another_plan(model: nn.ModuleList, kind: str, change) -> None:
    inputs = inputs_of(kind)
    assert builds(model[0], *inputs) == 1
    change(model, kind)
    if isinstance(model[0], FusedBlock):
        assert builds(model[0], *inputs) == 1
        assert builds(model[0], *inputs) == 0


def test_what_the_block_itself_is_asked_for_counts(model: nn.ModuleList, kind: str) -> None:
    inputs = inputs_of(kind)
    assert builds(model[0], *inputs) == 1
    name, value = {"residual": ("skip_time_act", True), "attention": ("heads", 4)}[kind]
    setattr(model[0], name, value)
    assert builds(model[0], *inputs) == 1


def test_plans_go_with_the_weights(model: nn.ModuleList, kind: str) -> None:
    """No cycle keeps memory until the collector comes."""
    builds(model[0], *inputs_of(kind))
    kept = [weakref.ref(layer._cache[1].weight) for layer in packed_layers(model).values()]
    gc.collect()
    gc.disable()
    try:
        for layer in packed_layers(model).values():
            layer._cache = None
        assert [ref() for ref in kept] == [None] * len(kept)
    finally:
        gc.enable()


def test_another_call_of_a_layer_leaves_the_plan_as_it_is(model: nn.ModuleList, kind: str) -> None:
    inputs, layer = inputs_of(kind), model[0].get_submodule(FIRST[kind])
    bias = layer.bias.data.clone()
    with torch.no_grad():
        expected = model[0](*inputs)
        layer.bias.data = torch.randn(2 * len(bias))[::2]  # laid side by side for this call only
        layer(inputs[0] if kind == "residual" else inputs[0].flatten(2).transpose(1, 2))
        layer.bias.data = bias
        assert torch.equal(model[0](*inputs), expected)


def test_without_blocks_at_once_there_are_none(model: nn.ModuleList, kind: str) -> None:
    remove_fused_(model)
    assert type(model[0]).__name__ == type(model[0]).__qualname__
    assert not hasattr(model[0], "handle")
