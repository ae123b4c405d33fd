"""Specification of attention in bf16 products: what float64 gives, to bf16's digits, and only where nobody minds."""

import copy
import pickle

import families
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, AttnProcessor
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.attention import Bf16Attention, remove_attention_
from diffusers_pqcad.kernels import attention

pytestmark = pytest.mark.skipif(not attention.available(), reason=str(attention.library()))


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
    # 8 bits, three times rounded; of sums that cancel, the terms count.
    assert ((actual - exact(q, k, v, heads)).abs() <= 4e-2 * exact(q, k, v.abs(), heads)).all()


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_share_the_work_and_change_nothing(num_threads: int) -> None:
    q, k, v = (torch.randn(2, length, 160) for length in (100, 77, 77))
    expected = attention.attention(q, k, v, 4)
    torch.set_num_threads(num_threads)
    try:
        assert torch.equal(attention.attention(q, k, v, 4), expected)
    finally:
        torch.set_num_threads(1)


def test_numbers_that_bf16_holds_and_one_key_are_exact() -> None:
    v = torch.randint(-100, 100, (2, 1, 24)).float()
    assert torch.equal(attention.attention(torch.randn(2, 5, 24), torch.randn(2, 1, 24), v, 3), v.expand(2, 5, 24))


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
    assert torch.equal(attention.attention(q, k, v, 2), expected)


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
    with pytest.raises(ValueError, match="attention: expected queries"):
        attention.attention(*map(torch.zeros, shapes), heads)


# ---- in a model


def block_of(**arguments) -> Attention:
    arguments = {"query_dim": 16, "heads": 2, "dim_head": 8, "bias": True} | arguments
    model = nn.ModuleList([Attention(**arguments)]).eval().requires_grad_(False)
    quantize_(model, PQCADConfig(method="fixed", weight_bits=8))
    if type(model[0]) is not Bf16Attention:
        pytest.skip("no kernel for int8 layers here")
    return model[0]


@torch.no_grad()
def call_both(block: Attention, *args, **kwargs) -> tuple[Tensor, Tensor]:
    plain = copy.deepcopy(block)
    remove_attention_(plain)
    assert type(plain) is Attention
    return block(*args, **kwargs), plain(*args, **kwargs)


KINDS = {
    "sequence": {},
    "image": {"norm_num_groups": 4, "residual_connection": True, "rescale_output_factor": 2.0},
    "cross": {"cross_attention_dim": 12},
}


def arguments_of(kind: str) -> tuple[Tensor, ...]:
    if kind == "image":
        return (torch.randn(2, 16, 5, 6).contiguous(memory_format=torch.channels_last),)
    return (torch.randn(2, 9, 16), torch.randn(2, 7, 12)) if kind == "cross" else (torch.randn(2, 9, 16),)


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_is_the_plain_block_to_the_digits_of_bf16(kind: str) -> None:
    actual, expected = call_both(block_of(**KINDS[kind]), *arguments_of(kind))
    assert actual.shape == expected.shape
    assert 0 < relative_error(actual, expected) < 1.5e-2


@pytest.mark.parametrize("kind", KINDS)
def test_a_compiled_block_takes_the_same_products(kind: str) -> None:
    torch._dynamo.reset()
    block, args = block_of(**KINDS[kind]), arguments_of(kind)
    names: list[str] = []

    def backend(graph, inputs):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(block, backend=backend, fullgraph=True)(*args), block(*args))
        q, k, v = (torch.randn(2, 5, 16) for _ in range(3))
        torch.library.opcheck(torch.ops.pqcad.attention.default, (q, k, v, 2))
    assert names.count("pqcad.attention.default") == 1
    torch._dynamo.reset()


def mask(block: Attention) -> dict[str, Tensor]:
    return {"attention_mask": torch.zeros(2, 1, 9)}


def processor(block: Attention) -> dict[str, Tensor]:
    block.set_processor(AttnProcessor())
    return {}


def training(block: Attention) -> dict[str, Tensor]:
    block.train()
    return {}


@pytest.mark.parametrize("change", [mask, processor, training])
def test_other_calls_do_as_before(change) -> None:
    block = block_of()
    kwargs = change(block)
    actual, expected = call_both(block, torch.randn(2, 9, 16), **kwargs)
    assert torch.equal(actual, expected)


def test_a_forced_reference_is_exact() -> None:
    with kernels.use("reference"):
        actual, expected = call_both(block_of(), torch.randn(2, 9, 16))
    assert torch.equal(actual, expected)


def test_gradients_are_kept() -> None:
    x = torch.randn(2, 9, 16, requires_grad=True)
    block_of()(x).sum().backward()
    assert x.grad is not None


def test_its_name_is_the_one_that_libraries_look_for() -> None:
    block = block_of()
    assert type(block).__name__ == "Attention"
    assert type(pickle.loads(pickle.dumps(block))) is Bf16Attention


@torch.no_grad()
def test_a_whole_model_changes_by_less_than_its_rounding() -> None:
    model = families.sd15().eval()
    args = (families.noise(2, 4, families.SIZE, families.SIZE), 5, families.noise(2, 3, 8))
    stock = model(*args).sample
    quantize_(model, PQCADConfig(method="fixed", weight_bits=8))
    assert any(type(module) is Bf16Attention for module in model.modules())
    ours = model(*args).sample
    remove_attention_(model)
    plain = model(*args).sample
    assert 0 < relative_error(ours, plain) < relative_error(plain, stock)
    model.dequantize()
    assert not any(type(module) is Bf16Attention for module in model.modules())
