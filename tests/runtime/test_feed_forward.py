"""Specification of gated feed-forward blocks that the kernel computes at once: the same numbers, fewer passes."""

import copy
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import FeedForward
from fused_blocks import copy_of, counted, static
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.kernels.x86.calls import run_call
from diffusers_pqcad.kernels.x86.library import library
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.runtime import feed_forward
from diffusers_pqcad.runtime.feed_forward import FusedFeedForward
from diffusers_pqcad.runtime.fusion import remove_fused_


def block_of(width: int = 16, inner_dim: int = 64, **arguments) -> FeedForward:
    model = nn.ModuleList([FeedForward(width, inner_dim=inner_dim, **arguments)]).eval().requires_grad_(False)
    return quantize_(model, PQCADConfig(method="fixed", weight_bits=8))[0]


@pytest.fixture
def block() -> FusedFeedForward:
    block = block_of()
    if not isinstance(block, FusedFeedForward):
        pytest.skip("no kernel takes blocks on this computer")
    return block


@torch.no_grad()
def call_both(block: FeedForward, x: Tensor) -> tuple[Tensor, Tensor, int]:
    """What `block` returns, what it returns as a plain `FeedForward`, and how often it was computed at once."""
    plain = copy_of(block)
    remove_fused_(plain)
    assert type(plain) is FeedForward
    with counted("run_feed_forward") as calls:
        return block(x), plain(x), len(calls)


def in_second_group(block: FeedForward) -> FeedForward:
    """Give the layers of `block` static ranges, of another size in each of two groups; the second is chosen."""
    static(block, [500]).net[2].timestep_groups.select(torch.tensor(1))
    return block


@given(
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(1, 9), min_size=0, max_size=3),
    width=st.integers(1, 40),
    blocks=st.integers(1, 3),
    bias=st.booleans(),
)
@settings(max_examples=50, deadline=None)
def test_a_block_at_once_is_the_plain_block(seed, shape, width, blocks, bias) -> None:
    if isinstance(library(), str):
        pytest.skip("no kernel takes blocks on this computer")
    torch.manual_seed(seed)
    block = in_second_group(block_of(width, 32 * blocks, bias=bias))
    actual, expected, count = call_both(block, torch.randn(*shape, width))
    assert count == 1
    assert actual.shape == expected.shape
    # A code may differ at a tie: a GELU is known to 4e-7.
    step = 5 / 255 * block.net[2].weight_scale.max() * 127
    assert (actual - expected).abs().max() <= 2 * step
    assert (actual - expected).abs().mean() <= 2e-2 * step


def test_its_gelu_is_that_of_float64(block: FusedFeedForward) -> None:
    """Of a first layer that passes on its input: what the second sees is x GELU(x), of rounded x."""
    x = torch.linspace(-6, 6, 512).view(32, 16)
    weight = torch.eye(16).repeat(8, 1)
    block.net[0].proj.unpack_()
    block.net[0].proj.weight.data, block.net[0].proj.bias.data = weight, torch.zeros(128)
    block.net[0].proj.pack_(packed_layers(block)["net.2"].spec, activation_bits=8)
    seen: list[Tensor] = []

    def run(*args, **kwargs) -> Tensor:
        seen.append(run_call(*args, **kwargs))
        return seen[-1]

    with mock.patch.object(feed_forward, "run_call", run):
        block(x)
    rounded = block.net[0].proj(x)[:, :16].double()
    exact = rounded * F.gelu(rounded)
    assert ((seen[0][:, :16].double() - exact).abs() <= 6e-7 * (1 + rounded.abs())).all()


@pytest.mark.parametrize("ranges", ["dynamic", "static"])
@pytest.mark.parametrize("arguments", [{}, {"final_dropout": True}, {"dim_out": 24}], ids=str)
def test_the_kinds_of_diffusers_are_taken(block: FusedFeedForward, arguments, ranges: str) -> None:
    other = block_of(**arguments)
    actual, expected, count = call_both(in_second_group(other) if ranges == "static" else other, torch.randn(2, 9, 16))
    assert count == 1
    assert (actual - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("arguments", [{"activation_fn": "gelu"}, {"inner_dim": 40}], ids=str)
def test_other_kinds_do_as_before(block: FusedFeedForward, arguments) -> None:
    actual, expected, count = call_both(block_of(**arguments), torch.randn(2, 9, 16))
    assert torch.equal(actual, expected)
    assert count == 0


@pytest.mark.parametrize("name", ["net.0", "net.0.proj", "net.1", "net.2"])
def test_whoever_looks_at_a_module_is_not_passed_by(block: FusedFeedForward, name: str) -> None:
    x = torch.randn(2, 9, 16)
    before, _, _ = call_both(block, x)
    block.get_submodule(name).register_forward_hook(lambda module, args, output: output * 2)
    actual, expected, count = call_both(block, x)
    assert torch.equal(actual, expected)
    assert count == 0
    assert not torch.equal(actual, before)


def test_another_gelu_adapters_and_forced_kernels_are_not_passed_by(block: FusedFeedForward) -> None:
    x = torch.randn(2, 9, 16)
    other = copy.deepcopy(block)
    other.net[0].gelu = torch.relu
    adapted = copy.deepcopy(block)
    config = LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False, use_dora=True)
    inject_adapter_in_model(config, nn.ModuleList([adapted]))
    for changed in (other, adapted):
        actual, expected, count = call_both(changed, x)
        assert torch.equal(actual, expected)
        assert count == 0
    with kernels.use("reference"):
        assert call_both(block, x)[2] == 0


def test_gradients_are_kept(block: FusedFeedForward) -> None:
    x = torch.randn(2, 9, 16, requires_grad=True)
    block(x).sum().backward()
    assert x.grad is not None


def test_a_second_layer_that_does_not_fit_is_refused(block: FusedFeedForward) -> None:
    block.net[2] = block_of(inner_dim=128).net[2]
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match="expected"):
        block(torch.randn(2, 9, 16))


def test_threads_change_nothing(block: FusedFeedForward) -> None:
    x = torch.randn(3, 50, 16)
    one, _, _ = call_both(block, x)
    torch.set_num_threads(3)
    try:
        three, _, _ = call_both(block, x)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, three)


def test_a_compiled_block_is_one_operator(block: FusedFeedForward) -> None:
    torch._dynamo.reset()
    x, names = torch.randn(2, 9, 16), []
    in_second_group(block)

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        expected = block(x)
        assert torch.equal(torch.compile(block, backend=backend, fullgraph=True)(x), expected)
        assert [name for name in names if "pqcad" in name] == ["pqcad.feed_forward.default"]
        arguments = (x, torch.tensor(1), block.handle, 16)
        torch.library.opcheck(torch.ops.pqcad.feed_forward.default, arguments)
        block.net[0].proj.timestep_groups.select(torch.tensor(0))
        assert torch.equal(torch.ops.pqcad.feed_forward(*arguments), expected)
    torch._dynamo.reset()
