"""Specification of plans of fused blocks: made once, anew when anything in the block changes, never in the way."""

import copy
import gc
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast
from unittest import mock

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import UNet2DModel
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d_blocks import AutoencoderTinyBlock
from diffusers.models.upsampling import Upsample2D
from fused_blocks import copy_of
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_, runtime
from diffusers_pqcad.kernels.x86 import PackedLayer
from diffusers_pqcad.kernels.x86.packing import PackedWeights
from diffusers_pqcad.kernels.x86.recent import KEPT_SIZES
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.quantized import QuantizedLayer
from diffusers_pqcad.layers.timesteps import TimestepGroups
from diffusers_pqcad.numerics.qparams import ActivationQParams, WeightSpec
from diffusers_pqcad.runtime.attention import FusedAttention
from diffusers_pqcad.runtime.fusion import FusedBlock, remove_fused_
from diffusers_pqcad.runtime.upsampling import FusedUpsample2D

BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: ResnetBlock2D(in_channels=16, out_channels=24, temb_channels=12, groups=4),
    "attention": lambda: Attention(16, heads=2, dim_head=8, norm_num_groups=4, residual_connection=True, bias=True),
    "feed forward": lambda: FeedForward(16),
    "transformer": lambda: Transformer2DModel(2, 8, in_channels=16, norm_num_groups=4, activation_fn="geglu"),
    "upsampling": lambda: Upsample2D(16, use_conv=True),
    "tiny autoencoder": lambda: AutoencoderTinyBlock(16, 24, "relu"),
}
FIRST = {
    "residual": "conv1",
    "attention": "to_q",
    "feed forward": "net.0.proj",
    "transformer": "proj_in",
    "upsampling": "conv",
    "tiny autoencoder": "conv.0",
}
NORM = {"residual": "norm2", "attention": "group_norm", "transformer": "norm"}
LAST = {
    "residual": "conv2",
    "attention": "to_out.0",
    "feed forward": "net.2",
    "transformer": "proj_out",
    "upsampling": "conv",
    "tiny autoencoder": "conv.4",
}
DROPOUT = {
    "residual": "dropout",
    "attention": "to_out.1",
    "feed forward": "net.1",
    "transformer": "transformer_blocks.0.attn1.to_out.1",
}


@pytest.fixture(params=BLOCKS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def skip_without_kernel(model: nn.Module) -> None:
    if {layer.kernel_name() for layer in packed_layers(model).values()} != {"x86"}:
        pytest.skip("no kernel takes blocks on this computer")


@pytest.fixture
def model(kind: str) -> nn.ModuleList:
    model = nn.ModuleList([BLOCKS[kind]()]).eval().requires_grad_(False)
    quantize_(model, PQCADConfig(method="fixed", weight_bits=8))
    skip_without_kernel(model)
    if kind == "upsampling" and not FusedUpsample2D.can_take(model[0]):
        pytest.skip("tiles need VNNI")
    assert isinstance(model[0], FusedBlock)
    return model


def inputs_of(kind: str, height: int = 5) -> tuple[Tensor, ...]:
    image = torch.randn(2, 16, height, 6).contiguous(memory_format=torch.channels_last)
    if kind == "feed forward":
        return (torch.randn(2, height, 16),)
    return (image, torch.randn(2, 12)) if kind == "residual" else (image,)


def norm_of(model: nn.ModuleList, kind: str) -> nn.Module:
    if kind not in NORM:
        pytest.skip("it has no norm")
    return model[0].get_submodule(NORM[kind])


def call(block: nn.Module, *inputs: Tensor) -> Tensor:
    """The output of `block`, a tensor."""
    return block(*inputs, return_dict=False)[0] if isinstance(block, Transformer2DModel) else block(*inputs)


@torch.no_grad()
def builds(block: nn.Module, *inputs: Tensor) -> int:
    """How many plans a call makes; its output is that of a block without memory."""
    fresh, kind = copy_of(block), cast(Any, type(block))
    with mock.patch.object(kind, "build_plan", autospec=True, side_effect=kind.build_plan) as build:
        output = call(block, *inputs)
    expected = call(fresh, *inputs)
    # What is not fused in one of them (a copy lays numbers side by side) has another attention, in fp32.
    assert (output - expected).norm() <= 2e-2 * expected.norm()
    return build.call_count


ARGUMENTS = {"tuple": lambda x: (x, x), "list": lambda x: [x], "number": lambda x: 1.0, "absent": lambda x: None}


@torch.no_grad()
@pytest.mark.parametrize("value", ARGUMENTS)
@pytest.mark.parametrize("position", [0, 1, 2])
def test_arguments_that_are_no_tensors_do_as_in_the_plain_block(
    model: nn.ModuleList, kind: str, value: str, position: int
) -> None:
    """An IP-Adapter's context is a tuple; its processor is not the common one, and knows what to do with it."""
    if kind == "tiny autoencoder" and position > 0:
        pytest.skip("it takes one argument")
    block, plain = model[0], copy_of(model[0])
    remove_fused_(plain)
    arguments: list[Any] = list(inputs_of(kind))
    arguments += [None] * (position + 1 - len(arguments))
    arguments[position] = ARGUMENTS[value](arguments[0])

    def outcome(block: nn.Module) -> Any:
        try:
            return call(block, *arguments)
        except Exception as error:
            return type(error), str(error)

    expected, actual = outcome(plain), outcome(block)
    if isinstance(expected, Tensor):
        assert (actual - expected).norm() <= 2e-2 * expected.norm()
    else:
        assert actual == expected


def test_one_plan_for_each_size(model: nn.ModuleList, kind: str) -> None:
    small, large = inputs_of(kind), inputs_of(kind, height=7)
    assert [builds(model[0], *inputs) for inputs in (small, small, large, small, large)] == [1, 0, 1, 0, 0]
    assert builds(model[0], *inputs_of(kind)) == 0


@torch.no_grad()
def test_of_many_sizes_the_last_ones_are_kept(model: nn.ModuleList, kind: str) -> None:
    sizes = [*range(1, 2 * KEPT_SIZES + 10)]
    for height in sizes:
        call(model[0], *inputs_of(kind, height=height))
    for layer in packed_layers(model).values():
        packed = layer._cache[1]
        assert len(packed.sizes) <= 2 * KEPT_SIZES
        assert len(packed.plans) <= 2 * KEPT_SIZES
    assert builds(model[0], *inputs_of(kind, height=sizes[-KEPT_SIZES])) == 0
    assert builds(model[0], *inputs_of(kind, height=sizes[0])) == 1


@torch.no_grad()
def test_a_server_of_512_sizes_keeps_a_part_of_them_and_stays_right(tiny_unet: UNet2DModel) -> None:
    model = quantize_(tiny_unet, PQCADConfig(method="fixed", weight_bits=8))
    layers = list(packed_layers(model).values())
    skip_without_kernel(model)
    sizes = [
        (batch, 1, 4 * height, 4 * width) for batch in range(1, 9) for height in range(1, 9) for width in range(1, 9)
    ]
    for size in sizes:
        model(torch.zeros(size), 10)
    kept = [len(part) for layer in layers for part in (layer._cache[1].sizes, layer._cache[1].plans)]
    assert max(kept) <= 2 * KEPT_SIZES
    fresh = copy.deepcopy(model)  # without what this one keeps
    for size in (sizes[0], sizes[100], sizes[-1]):
        x = torch.randn(size)
        assert torch.equal(model(x, 10).sample, fresh(x, 10).sample)


@torch.no_grad()
def test_a_plan_that_is_forgotten_while_it_runs_is_right(model: nn.ModuleList, kind: str) -> None:
    """Threads of many sizes at once, of which one is kept."""
    for layer in packed_layers(model).values():
        packed = layer.packed_for("x86")
        packed.sizes.limit = packed.plans.limit = 1
    inputs = [inputs_of(kind, height=height) for height in range(1, 13)]
    expected = [call(model[0], *each) for each in inputs]

    def call_all(first: int) -> bool:
        with torch.no_grad():
            turns = [*range(first, len(inputs)), *range(first)] * 10
            return all(torch.equal(call(model[0], *inputs[turn]), expected[turn]) for turn in turns)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call_all, range(4)))


def set_static_ranges(layers: list[QuantizedLayer], groups: TimestepGroups) -> None:
    """Ranges of two groups of timesteps, the second one twice as wide."""
    for layer in layers:
        qparams = ActivationQParams(torch.tensor([0.03, 0.06]), torch.tensor([120, 120], dtype=torch.int32))
        layer.set_input_qparams_(qparams, groups)


def test_one_plan_for_each_group_of_timesteps(model: nn.ModuleList, kind: str) -> None:
    groups, inputs = TimestepGroups([500]), inputs_of(kind)
    set_static_ranges(list(packed_layers(model).values()), groups)
    for group, count in ((0, 1), (1, 1), (0, 0), (1, 0)):
        groups.select(torch.tensor(group))
        assert builds(model[0], *inputs) == count
    groups.select(torch.tensor([0, 1]))  # a range for each image: no plan
    assert builds(model[0], *inputs) == 0


def test_layers_whose_groups_are_not_the_same_have_no_plan(model: nn.ModuleList, kind: str) -> None:
    """One group would stand for all: a layer of another one would be computed at a wrong range."""
    layers, groups, inputs = list(packed_layers(model).values()), TimestepGroups([500]), inputs_of(kind)
    others = TimestepGroups([500])
    set_static_ranges(layers, groups)
    groups.select(torch.tensor(0))
    others.select(torch.tensor(1))
    with torch.no_grad():
        before = call(model[0], *inputs)
        layers[-1].timestep_groups = others
        assert not torch.equal(call(model[0], *inputs), before)
    assert builds(model[0], *inputs) == 0


def replace_parameter(model: nn.ModuleList, kind: str) -> None:
    norm = norm_of(model, kind)
    norm.weight = nn.Parameter(norm.weight * 2, requires_grad=False)


def replace_numbers(model: nn.ModuleList, kind: str) -> None:
    """As `model.to` does: the parameter stays, its memory does not."""
    norm = norm_of(model, kind)
    norm.bias.data = norm.bias.data + 1


def spread_numbers(model: nn.ModuleList, kind: str) -> None:
    """The same first number; C would read its neighbours."""
    norm = norm_of(model, kind)
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
    norm_of(model, kind).eps = 1.0


def change_groups(model: nn.ModuleList, kind: str) -> None:
    norm_of(model, kind).num_groups = 2


def lower_bits(model: nn.ModuleList, kind: str) -> None:
    layer = packed_layers(model)[f"0.{LAST[kind]}"]
    layer.unpack_()
    layer.pack_(WeightSpec(4), activation_bits=8)


def replace_layer(model: nn.ModuleList, kind: str) -> None:
    model[0].set_submodule(LAST[kind], copy.deepcopy(model[0].get_submodule(LAST[kind])))


def move_and_return(model: nn.ModuleList, kind: str) -> None:
    model.double().float()


def pad_in_circles(model: nn.ModuleList, kind: str) -> None:
    """As those do who make textures that can be tiled."""
    if kind != "residual":
        pytest.skip("it has no convolution after the first layer")
    model[0].conv2.padding_mode = "circular"


def look(model: nn.ModuleList, kind: str) -> None:
    model[0].get_submodule(LAST[kind]).register_forward_hook(lambda module, args, output: output * 2)


CHANGES = [
    replace_parameter, replace_numbers, spread_numbers, replace_bias, drop_bias, change_eps, change_groups, lower_bits,
    replace_layer, move_and_return, pad_in_circles, look,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_asks_for_another_plan(model: nn.ModuleList, kind: str, change) -> None:
    inputs = inputs_of(kind)
    assert builds(model[0], *inputs) == 1
    change(model, kind)
    assert isinstance(model[0], FusedBlock)
    assert [builds(model[0], *inputs) for _ in range(2)] == [1, 0]


def test_what_the_block_itself_is_asked_for_counts(model: nn.ModuleList, kind: str) -> None:
    inputs = inputs_of(kind)
    assert builds(model[0], *inputs) == 1
    if kind not in ("residual", "attention"):
        pytest.skip("it has no settings")
    name, value = {"residual": ("skip_time_act", True), "attention": ("heads", 4)}[kind]
    setattr(model[0], name, value)
    assert builds(model[0], *inputs) == 1


def weights_of(layer: QuantizedLayer) -> PackedWeights:
    """What the kernel has packed of `layer`, for the only kind of image that it met."""
    (weights,) = layer._cache[1].of_kind.values()
    return weights


def test_plans_go_with_the_weights(model: nn.ModuleList, kind: str) -> None:
    """No cycle keeps memory until the collector comes."""
    builds(model[0], *inputs_of(kind))
    kept = [weakref.ref(weights_of(layer).weight) for layer in packed_layers(model).values()]
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
        expected = call(model[0], *inputs)
        layer.bias.data = torch.randn(2 * len(bias))[::2]  # laid side by side for this call only
        layer(inputs[0].flatten(2).transpose(1, 2) if kind == "attention" else inputs[0])
        layer.bias.data = bias
        assert torch.equal(call(model[0], *inputs), expected)


def test_without_blocks_at_once_there_are_none(model: nn.ModuleList, kind: str) -> None:
    remove_fused_(model)
    assert type(model[0]).__name__ == type(model[0]).__qualname__
    assert not hasattr(model[0], "handle")


@torch.no_grad()
def test_a_dropout_that_drops_is_not_passed_by(model: nn.ModuleList, kind: str) -> None:
    """As in Monte Carlo dropout: the block is evaluated, one module in it is not."""
    if kind not in DROPOUT:
        pytest.skip("it has no dropout")
    inputs, dropout = inputs_of(kind), model[0].get_submodule(DROPOUT[kind])
    expected = call(model[0], *inputs)
    dropout.p = 0.5
    assert torch.equal(call(model[0], *inputs), expected)
    dropout.train()
    assert not torch.equal(call(model[0], *inputs), call(model[0], *inputs))
    dropout.eval()
    assert torch.equal(call(model[0], *inputs), expected)


@torch.no_grad()
def test_a_method_that_a_hook_kept_is_that_of_the_plain_block(model: nn.ModuleList, kind: str) -> None:
    add_hook_to_module(model[0], ModelHook())
    inputs = inputs_of(kind)
    expected = call(model[0], *inputs)
    remove_fused_(model)
    assert (call(model[0], *inputs) - expected).norm() <= 2e-2 * expected.norm()


@torch.no_grad()
@pytest.mark.parametrize("attribute", ["weight", "bias"])
def test_norms_without_all_parameters_do_as_before(model: nn.ModuleList, kind: str, attribute: str) -> None:
    setattr(norm_of(model, kind), attribute, None)
    assert builds(model[0], *inputs_of(kind)) == 1


@torch.no_grad()
def test_groups_that_do_not_fit_are_an_error(model: nn.ModuleList, kind: str) -> None:
    norm_of(model, kind).num_groups = 5
    with pytest.raises(RuntimeError):
        call(model[0], *inputs_of(kind))


@torch.no_grad()
def test_threads_may_call_a_block_at_once_and_move_it_meanwhile(model: nn.ModuleList, kind: str) -> None:
    """A plan points into memory that another thread may give back."""
    inputs, blocks = inputs_of(kind, height=24), [copy.deepcopy(model[0]) for _ in range(20)]
    layers = [layer for block in blocks for layer in packed_layers(nn.ModuleList([block])).values()]
    expected, starts = call(model[0], *inputs), threading.Barrier(4)

    def call_all() -> list[Tensor]:
        starts.wait()
        return [call(block, *inputs) for block in blocks for _ in range(3)]

    def move() -> None:
        starts.wait()
        for layer in layers * 5:
            layer._apply(torch.clone)

    with ThreadPoolExecutor(4) as pool:
        calls = [pool.submit(torch.no_grad()(call_all)) for _ in range(3)]
        pool.submit(move).result()
        outputs = [output for future in calls for output in future.result()]
    assert all(torch.equal(output, expected) for output in outputs)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_plans_after_a_cast_and_back_are_those_of_the_new_parameters(
    model: nn.ModuleList, kind: str, dtype: torch.dtype
) -> None:
    inputs, block = inputs_of(kind), model[0]
    expected = call(block, *inputs)
    model.to(dtype)
    rounded = call(block, *(tensor.to(dtype) for tensor in inputs))
    assert rounded.dtype == dtype
    torch.testing.assert_close(rounded.float(), expected, rtol=0.1, atol=0.1)
    model.float()
    filler = [torch.full_like(tensor, torch.nan) for tensor in model.parameters()]  # where the old ones were, perhaps
    actual = call(block, *inputs)
    del filler
    if dtype == torch.float64:  # where fp32 is not rounded
        assert torch.equal(actual, expected)
    for layer in packed_layers(model).values():
        layer._cache = None
    assert torch.equal(actual, call(block, *inputs))  # by plans that are made anew


@torch.no_grad()
def test_a_plan_holds_what_it_points_to(model: nn.ModuleList, kind: str) -> None:
    """Also where a layer is packed anew while the plan is made."""
    inputs = inputs_of(kind)
    expected, packed_for = call(model[0], *inputs), QuantizedLayer.packed_for
    for layer in packed_layers(model).values():
        layer._cache = None
    seen: list[weakref.ref] = []

    def pack_and_forget(layer: QuantizedLayer, name: str) -> PackedLayer:
        packed = packed_for(layer, name)
        layer._cache = None
        seen.append(weakref.ref(packed))
        return packed

    with mock.patch.object(QuantizedLayer, "packed_for", pack_and_forget):
        packed, plan = model[0].plan_of(list(inputs), ("a key",), lambda packed: planned(model[0], packed, inputs))
    gc.collect()
    assert packed is not None
    assert plan is not None
    alive = sum(ref() is not None for ref in seen)
    assert alive == len(packed_layers(model))  # the first by the caller, the others by the plan
    assert torch.equal(call(model[0], *inputs), expected)


def planned(block: nn.Module, packed: PackedLayer, inputs: tuple[Tensor, ...]) -> Any:
    """The plan of `block` for `inputs`."""
    image, *others = inputs
    sizes = tuple(tensor.shape for tensor in inputs)
    if type(block) is FusedAttention:
        sizes = (4, image.flatten(2).transpose(1, 2).shape)
    return cast(Any, block).build_plan(packed, *sizes)


class Doubling(nn.Module):
    """A block of somebody's own, with one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.layer(x)


def test_a_fused_block_is_a_class_and_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    class FusedDoubling(FusedBlock, Doubling):
        plain, name = Doubling, "residual"

        @staticmethod
        def first_layer(block: Any) -> Any:
            return block.layer

        def forward(self, x: Tensor) -> Tensor:
            packed, plan = self.plan_of([x], (x.shape,), lambda packed: "a plan")
            return super().forward(x) if plan is None else torch.full_like(x, 7)

    model = nn.ModuleList([Doubling()]).eval().requires_grad_(False)
    monkeypatch.setattr(runtime, "fused_blocks", lambda: (FusedDoubling,))
    quantize_(model, PQCADConfig(method="fixed", weight_bits=8))
    if model[0].layer.kernel_name() != "x86":
        pytest.skip("no kernel takes blocks on this computer")
    x = torch.ones(2, 16)
    assert model[0](x).unique().tolist() == [7]
    model[0].layer.register_forward_hook(lambda *_: None)  # the plan is made anew, and nobody else asks
    assert model[0](x).unique().tolist() == [7]
    runtime.remove_(model)
    assert type(model[0]) is Doubling
    assert model[0](x).unique().tolist() != [7]


def test_a_block_that_the_kernel_does_not_fuse_stays_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = kernels.KERNELS["x86"]
    monkeypatch.setattr(kernel, "FUSES", frozenset(("attention",)))
    model = nn.ModuleList([BLOCKS["residual"]()]).eval().requires_grad_(False)
    quantize_(model, PQCADConfig(method="fixed", weight_bits=8))
    assert type(model[0]) is ResnetBlock2D
