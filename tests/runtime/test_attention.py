"""Specification of attention that the kernel computes at once: the same numbers, to the digits that bf16 has."""

import copy
import pickle
from unittest import mock

import families
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from fused_blocks import copy_of, counted, static
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.kernels.x86 import attention
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.runtime.attention import FusedAttention
from diffusers_pqcad.runtime.fusion import remove_fused_

needs_bf16 = pytest.mark.skipif(not attention.available(), reason=str(attention.library()))


def exact(query: Tensor, key: Tensor, value: Tensor, heads: int) -> Tensor:
    """The same in float64, by PyTorch."""
    q, k, v = (x.double().unflatten(2, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    heads=st.integers(1, 4),
    queries=st.integers(1, 40),
    keys=st.integers(1, 80),
    channels=st.integers(1, 70),
)
@settings(max_examples=100)
def test_it_is_attention(seed, batch, heads, queries, keys, channels) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(batch, length, heads * channels) for length in (queries, keys, keys))
    actual = attention.attention(q, k, v, heads)
    # 8 bits, three times rounded, where products are in bf16; of sums that cancel, the terms count.
    assert ((actual - exact(q, k, v, heads)).abs() <= 4e-2 * exact(q, k, v.abs(), heads)).all()


@needs_bf16
def test_threads_share_the_work_and_change_nothing() -> None:
    q, k, v = (torch.randn(2, length, 160) for length in (100, 77, 77))
    expected = attention.attention(q, k, v, 4)
    torch.set_num_threads(3)
    try:
        assert torch.equal(attention.attention(q, k, v, 4), expected)
    finally:
        torch.set_num_threads(1)


def test_of_one_key_the_value_is_the_output() -> None:
    v = torch.randint(-100, 100, (2, 1, 24)).float()  # bf16 holds them
    actual = attention.attention(torch.randn(2, 5, 24), torch.randn(2, 1, 24), v, 3)
    torch.testing.assert_close(actual, v.expand(2, 5, 24), rtol=1e-6, atol=0)


def test_large_scores_do_not_overflow() -> None:
    q, k, v = torch.full((1, 3, 8), 1e3), torch.full((1, 4, 8), 1e3), torch.randn(1, 4, 8)
    k[:, 2] *= 2  # this key wins all
    torch.testing.assert_close(attention.attention(q, k, v, 1), v[:, 2:3].expand(1, 3, 8), rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_a_nan_stays(name: str) -> None:
    tensors = {key: torch.randn(1, 40, 16) for key in ("query", "key", "value")}
    tensors[name][0, 20, 3] = torch.nan
    assert attention.attention(**tensors, heads=1)[0, 20].isnan().any()


def test_views_are_taken_as_they_are() -> None:
    q, k, v = (torch.randn(24, 9, 2).transpose(0, 2) for _ in range(3))
    expected = attention.attention(q.contiguous(), k.contiguous(), v.contiguous(), 2)
    torch.testing.assert_close(attention.attention(q, k, v, 2), expected)


@pytest.mark.parametrize(
    ("shapes", "heads"),
    [
        (((2, 5, 24), (2, 7, 24), (2, 8, 24)), 2),
        (((2, 5, 24), (3, 7, 24), (3, 7, 24)), 2),
        (((2, 5, 24), (2, 7, 16), (2, 7, 16)), 2),
        (((2, 5, 24), (2, 7, 24), (2, 7, 24)), 5),
        (((2, 5, 24), (2, 0, 24), (2, 0, 24)), 2),
    ],
)
def test_other_shapes_are_refused(shapes, heads: int) -> None:
    query, key, value = map(torch.zeros, shapes)
    with pytest.raises(ValueError, match="attention: expected queries"):
        attention.attention(query, key, value, heads)


# ---- blocks


def block_of(**settings) -> Attention:
    settings = {"query_dim": 16, "heads": 2, "dim_head": 8, "bias": True} | settings
    model = nn.ModuleList([Attention(**settings)]).eval().requires_grad_(False)
    return quantize_(model, PQCADConfig(method="fixed", weight_bits=8))[0]


KINDS = {
    "sequence": {},
    "image": {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
    "cross": {"cross_attention_dim": 12},
    "wide": {"cross_attention_dim": 12, "norm_num_groups": 4, "dim_head": 24},
}


def inputs_of(kind: str) -> tuple[Tensor, ...]:
    if kind == "image":
        return (torch.randn(2, 16, 5, 6).contiguous(memory_format=torch.channels_last),)
    return (torch.randn(2, 9, 16), torch.randn(2, 7, 12)) if kind in ("cross", "wide") else (torch.randn(2, 9, 16),)


@pytest.fixture
def block() -> FusedAttention:
    block = block_of(**KINDS["image"])
    if not isinstance(block, FusedAttention):
        pytest.skip("no kernel takes blocks on this computer")
    return block


@pytest.fixture
def image() -> Tensor:
    return inputs_of("image")[0]


@torch.no_grad()
def call_both(block: Attention, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Return what `block` returns, and what it returns as a plain `Attention`."""
    plain = copy_of(block)
    remove_fused_(plain)
    assert type(plain) is Attention
    return block(*args, **kwargs), plain(*args, **kwargs)


@pytest.mark.parametrize("ranges", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_at_once_is_the_plain_block(block: Attention, kind: str, ranges: str) -> None:
    block = block_of(**KINDS[kind])
    if ranges == "static":
        static(block, [500]).to_q.timestep_groups.select(torch.tensor(1))
    with counted("run_attention") as calls:
        actual, expected = call_both(block, *inputs_of(kind))
    assert len(calls) == 1
    assert actual.shape == expected.shape
    # The digits of bf16; without it, codes at ties of the group norm.
    assert relative_error(actual, expected) < (1.5e-2 if attention.available() else 1e-3)
    if kind == "image":
        assert actual.is_contiguous(memory_format=torch.channels_last)


@needs_bf16
def test_its_products_are_in_bf16(block: Attention) -> None:
    actual, expected = call_both(block_of(), torch.randn(2, 9, 16))
    assert relative_error(actual, expected) > 1e-5


def test_a_block_takes_the_range_of_the_timestep(block: Attention, image: Tensor) -> None:
    static(block, [500])
    outputs = []
    for group in (0, 1):
        block.to_q.timestep_groups.select(torch.tensor(group))
        outputs.append(call_both(block, image))
        assert relative_error(*outputs[-1]) < 1.5e-2
    assert not torch.equal(outputs[0][0], outputs[1][0])
    block.to_q.timestep_groups.select(torch.tensor([0, 1]))  # no kernel takes two ranges in a call
    with counted("run_attention") as calls:
        actual, expected = call_both(block, image)
    assert torch.equal(actual, expected)
    assert not calls


def test_any_layout_of_the_input_is_taken(block: Attention, image: Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(block(image.contiguous()), block(image))
        cross = block_of(**KINDS["cross"])
        x, context = torch.randn(16, 9, 2).transpose(0, 2), torch.randn(12, 7, 2).transpose(0, 2)
        assert torch.equal(cross(x, context), cross(x.contiguous(), context.contiguous()))


def test_a_replaced_parameter_is_seen(block: Attention, image: Tensor) -> None:
    before, _ = call_both(block, image)
    block.group_norm.bias = nn.Parameter(block.group_norm.bias + 1, requires_grad=False)
    block.to_out[0].bias = nn.Parameter(block.to_out[0].bias + 5, requires_grad=False)
    with counted("run_attention") as calls:
        actual, expected = call_both(block, image)
    assert len(calls) == 1
    assert relative_error(actual, expected) < 1.5e-2
    assert (actual - before).abs().mean() > 1


def look(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 2)


def replace_input(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def replace_forward(module: nn.Module) -> None:
    """As offloading does."""
    forward = module.forward
    module.forward = lambda *args: forward(*args) * 2  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [look, replace_input, replace_forward])
@pytest.mark.parametrize("name", ["group_norm", "to_q", "to_k", "to_v", "to_out.0", "to_out.1"])
def test_whoever_changes_a_module_is_not_passed_by(block: Attention, image: Tensor, name: str, change) -> None:
    plain, _ = call_both(block, image)
    change(block.get_submodule(name))
    with torch.no_grad():
        actual = block(image)
        remove_fused_(block)
        assert torch.equal(actual, block(image))
    assert not torch.equal(actual, plain)


def test_a_hook_on_all_modules_sees_them_all(block: Attention, image: Tensor) -> None:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *args: seen.append(module))
    try:
        call_both(block, image)
    finally:
        handle.remove()
    assert {block.to_q, block.group_norm, block.to_out[0]} <= set(seen)


def test_an_adapter_of_another_kind_is_not_passed_by(block: Attention, image: Tensor) -> None:
    for name in ("to_q", "to_v", "to_out.0"):
        other = copy.deepcopy(block)
        config = LoraConfig(r=2, target_modules=[name], init_lora_weights=False, use_dora=True)
        inject_adapter_in_model(config, nn.ModuleList([other]))
        with counted("run_attention") as calls:
            actual, expected = call_both(other, image)
        assert torch.equal(actual, expected)
        assert not calls


def mask(block: Attention) -> dict[str, Tensor]:
    return {"attention_mask": torch.zeros(2, 1, 9)}


def processor(block: Attention) -> dict[str, Tensor]:
    block.set_processor(AttnProcessor())
    return {}


def training(block: Attention) -> dict[str, Tensor]:
    block.train()
    return {}


def norm_of_queries(block: Attention) -> dict[str, Tensor]:
    block.norm_q = nn.LayerNorm(8)
    return {}


@pytest.mark.parametrize("change", [mask, processor, training, norm_of_queries])
def test_other_calls_do_as_before(block: Attention, change) -> None:
    other = block_of()
    kwargs = change(other)
    with counted("run_attention") as calls:
        actual, expected = call_both(other, torch.randn(2, 9, 16), **kwargs)
    assert torch.equal(actual, expected)
    assert not calls


def test_the_time_embedding_that_blocks_name_is_no_other_call(block: Attention, image: Tensor) -> None:
    with counted("run_attention") as calls:
        call_both(block, image, temb=torch.randn(2, 4))
    assert len(calls) == 1


def test_a_forced_kernel_is_taken(block: Attention, image: Tensor) -> None:
    with kernels.use("reference"), counted("run_attention") as calls:
        actual, expected = call_both(block, image)
    assert torch.equal(actual, expected)
    assert not calls


@pytest.mark.parametrize("name", ["group_norm.weight", "to_q.bias", "to_out.0.bias"])
def test_the_gradient_of_any_parameter_is_kept(block: Attention, image: Tensor, name: str) -> None:
    block.get_parameter(name).requires_grad_(True)
    # torch 2.13 crashes in the backward of a channels_last group norm whose weight alone asks for a gradient.
    block(image.requires_grad_("norm" in name)).sum().backward()
    assert block.get_parameter(name).grad is not None


def test_gradients_of_the_inputs_are_kept(block: Attention) -> None:
    x, context = (tensor.requires_grad_() for tensor in inputs_of("cross"))
    block_of(**KINDS["cross"])(x, context).sum().backward()
    assert x.grad is not None
    assert context.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_plain_path(block: Attention, image: Tensor, dtype: torch.dtype) -> None:
    block.to(dtype)
    with counted("run_attention") as calls:
        actual, expected = call_both(block, image.to(dtype))
    assert torch.equal(actual, expected)
    assert not calls


def break_norm(block: Attention) -> None:
    block.group_norm = nn.GroupNorm(4, 24).requires_grad_(False)


def break_keys(block: Attention) -> None:
    block.to_k = block_of(query_dim=24).to_k


def break_values(block: Attention) -> None:
    block.to_v = block_of(query_dim=24).to_v


def break_output(block: Attention) -> None:
    block.to_out = block_of(query_dim=24).to_out


@pytest.mark.parametrize("change", [break_norm, break_keys, break_values, break_output])
def test_parts_that_do_not_fit_are_refused(block: Attention, image: Tensor, change) -> None:
    """C would read beyond them."""
    change(block)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        block(image)
    remove_fused_(block)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        block(image)


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_block_is_one_operator(block: Attention, kind: str) -> None:
    torch._dynamo.reset()
    block, (x, *context) = static(block_of(**KINDS[kind]), [500]), inputs_of(kind)
    block.to_q.timestep_groups.select(torch.tensor(1))
    names: list[str] = []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        expected = block(x, *context)
        assert torch.equal(torch.compile(block, backend=backend, fullgraph=True)(x, *context), expected)
        assert [name for name in names if "pqcad" in name] == ["pqcad.attention_block.default"]
        arguments = (x, context[0] if context else None, torch.tensor(1), block.handle, 16)
        torch.library.opcheck(torch.ops.pqcad.attention_block.default, arguments)
        # The graph hands the range in: what another call selected since does not count.
        block.to_q.timestep_groups.select(torch.tensor(0))
        assert torch.equal(torch.ops.pqcad.attention_block(*arguments), expected)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["processor", "product"])
def test_who_follows_the_maps_of_attention_is_not_passed_by(block: Attention, image: Tensor, name: str) -> None:
    seen: list[Tensor] = []

    def follow(*args, **kwargs) -> Tensor:
        seen.append(args[-1])
        return original(*args, **kwargs)

    call_both(block, image)
    if name == "processor":
        original = AttnProcessor2_0.__call__
        patch = mock.patch.object(AttnProcessor2_0, "__call__", follow)
    else:
        original = F.scaled_dot_product_attention
        patch = mock.patch.object(F, "scaled_dot_product_attention", follow)
    with patch, torch.no_grad():
        block(image)
    assert len(seen) == 1


def test_an_output_that_is_no_image_is_the_error_that_it_was(block: Attention, image: Tensor) -> None:
    other = block_of(out_dim=32)
    with torch.no_grad(), pytest.raises(RuntimeError, match="invalid for input of size"):
        other(image)
    assert other(torch.randn(2, 9, 16)).shape == (2, 9, 32)


def test_errors_name_the_layer(block: Attention) -> None:
    block.heads = 3
    with torch.no_grad(), pytest.raises(ValueError, match="to_out.0: attention of its block: expected queries"):
        block(torch.randn(2, 16, 3, 3))
    cross = block_of(**KINDS["cross"])
    with torch.no_grad(), pytest.raises(ValueError, match="to_out.0: attention of its block: expected queries"):
        cross(torch.randn(2, 9, 16), torch.randn(1, 7, 12))


def test_its_name_is_the_one_that_libraries_look_for(block: Attention) -> None:
    assert type(block).__name__ == "Attention"
    other = pickle.loads(pickle.dumps(block))
    assert type(other) is FusedAttention
    assert int(other.handle) != int(block.handle)
    assert graph_ops.MODULES[int(other.handle)] is other


@torch.no_grad()
def test_a_whole_model_changes_by_less_than_its_rounding(block: Attention) -> None:
    model = families.sd15().eval()
    args = (families.noise(2, 4, families.SIZE, families.SIZE), 5, families.noise(2, 3, 8))
    stock = model(*args).sample
    quantize_(model, PQCADConfig(method="fixed", weight_bits=8))
    with counted("run_attention") as calls:
        ours = model(*args).sample
    assert len(calls) == sum(isinstance(module, FusedAttention) for module in model.modules()) > 0
    remove_fused_(model)
    plain = model(*args).sample
    assert relative_error(ours, plain) < relative_error(plain, stock)
    model.dequantize()
    assert not any(isinstance(module, FusedAttention) for module in model.modules())
