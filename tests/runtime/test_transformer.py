"""Specification of transformers over images that the kernel computes at once: the same numbers, and no copies."""

from typing import Any
from unittest import mock

import families
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.embeddings import SinusoidalPositionalEmbedding
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from fused_blocks import copy_of, counted, static
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.kernels import x86
from diffusers_pqcad.kernels.native import scratch
from diffusers_pqcad.kernels.x86.calls import run_call, run_calls
from diffusers_pqcad.kernels.x86.library import DEPTH, compiled, library
from diffusers_pqcad.kernels.x86.packing import round_up
from diffusers_pqcad.kernels.x86.structs import Affine, Image, Rows
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.quantized import PQCADLinear
from diffusers_pqcad.numerics.qparams import ActivationQParams, WeightSpec, scalar_qparams
from diffusers_pqcad.runtime import fusion
from diffusers_pqcad.runtime.fusion import FusedBlock, remove_fused_
from diffusers_pqcad.runtime.transformer import FusedTransformer2DModel

needs_x86 = pytest.mark.skipif(isinstance(library(), str), reason="no kernel takes blocks on this computer")
pytestmark = needs_x86
W8 = PQCADConfig(method="fixed", weight_bits=8)
COMMON = {
    **{"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "norm_num_groups": 4},
    **{"activation_fn": "geglu", "cross_attention_dim": 12},
}


def transformer_of(**arguments: Any) -> Any:
    """A quantized transformer, its norms and biases not those of a new one."""
    model = nn.ModuleList([Transformer2DModel(**COMMON | arguments)]).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.1 * torch.randn_like(parameter) * parameter.abs().clamp(min=0.1)
    return quantize_(model, W8)[0]


def inputs_of(batch: int = 2, height: int = 5, width: int = 6, tokens: int = 7) -> tuple[Tensor, Tensor]:
    image = torch.randn(batch, 16, height, width).contiguous(memory_format=torch.channels_last)
    return image, torch.randn(batch, tokens, 12)


@pytest.fixture
def block() -> FusedTransformer2DModel:
    torch.manual_seed(0)
    return transformer_of()


@torch.no_grad()
def call_both(block: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor, int]:
    """What `block` returns, what it returns as a plain `Transformer2DModel`, and how often it was computed at once.

    The parts of the plain one stay as they are: attention has the same digits in both.
    """
    plain = copy_of(block)
    plain.__class__ = Transformer2DModel
    with counted("run_transformer") as calls:
        actual = block(*args, **kwargs, return_dict=False)[0]
        return actual, plain(*args, **kwargs, return_dict=False)[0], len(calls)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


KINDS: dict[str, dict[str, Any]] = {
    "convolutions around": {},
    "linear layers around": {"use_linear_projection": True},
    "self-attention alone": {"cross_attention_dim": None},
    "self-attention twice": {"cross_attention_dim": None, "double_self_attention": True},
    "several blocks": {"num_layers": 3},
    "biases of projections": {"attention_bias": True},
    "other inner channels": {"num_attention_heads": 3},
    "dropout": {"dropout": 0.3},
}


@pytest.mark.parametrize("ranges", ["dynamic", "static"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_transformer_at_once_is_the_plain_one(kind: str, ranges: str) -> None:
    torch.manual_seed(1)
    block, inputs = transformer_of(**KINDS[kind]), inputs_of()
    if ranges == "static":
        static(block, [500]).proj_in.timestep_groups.select(torch.tensor(1))
    if block.transformer_blocks[0].attn2 is None or block.transformer_blocks[0].attn2.to_k.in_features != 12:
        inputs = inputs[:1]
    actual, expected, count = call_both(block, *inputs)
    assert count == 1
    assert actual.shape == expected.shape
    assert actual.is_contiguous(memory_format=torch.channels_last)
    assert relative_error(actual, expected) < 1e-2  # codes at ties, on which all that follows depends


@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    height=st.integers(1, 7),
    width=st.integers(1, 7),
    tokens=st.integers(1, 9),
)
@settings(max_examples=30, deadline=None)
def test_images_of_all_sizes_are_taken(seed: int, batch: int, height: int, width: int, tokens: int) -> None:
    torch.manual_seed(seed)
    actual, expected, count = call_both(transformer_of(), *inputs_of(batch, height, width, tokens))
    assert count == 1
    assert relative_error(actual, expected) < 2e-2


def test_any_layout_of_the_inputs_is_taken(block: FusedTransformer2DModel) -> None:
    image, context = inputs_of()
    with torch.no_grad():
        expected = block(image, context).sample
        spread = context.transpose(0, 2).contiguous().transpose(0, 2)
        assert torch.equal(block(image.contiguous(), spread).sample, expected)


def test_nothing_is_copied_between(block: FusedTransformer2DModel) -> None:
    """Neither to another layout and back, nor for a norm or a sum."""
    inputs = inputs_of()
    call_both(block, *inputs)  # packs the layers
    with torch.no_grad(), torch.profiler.profile() as profile:
        block(*inputs)
    names = {event.key for event in profile.key_averages()}
    assert not names & {"aten::copy_", "aten::clone", "aten::add", "aten::layer_norm", "aten::group_norm"}


# ---- whoever changes it, or looks on


@pytest.mark.parametrize(
    "name",
    [
        *("norm", "proj_in", "proj_out", "transformer_blocks.0", "transformer_blocks.0.norm1"),
        *("transformer_blocks.0.attn1", "transformer_blocks.0.attn1.to_k", "transformer_blocks.0.norm2"),
        *("transformer_blocks.0.attn2", "transformer_blocks.0.attn2.to_out.0", "transformer_blocks.0.norm3"),
        *("transformer_blocks.0.ff", "transformer_blocks.0.ff.net.0", "transformer_blocks.0.ff.net.2"),
    ],
)
def test_whoever_looks_at_a_module_is_not_passed_by(block: FusedTransformer2DModel, name: str) -> None:
    inputs = inputs_of()
    before, _, _ = call_both(block, *inputs)
    block.get_submodule(name).register_forward_hook(lambda module, args, output: output * 2)
    actual, expected, count = call_both(block, *inputs)
    assert torch.equal(actual, expected)
    assert count == 0
    assert not torch.equal(actual, before)


def shift_layer_norm(block: Any) -> None:
    norm = block.transformer_blocks[0].norm2
    norm.bias.data = norm.bias.data + 1


def blunt_layer_norm(block: Any) -> None:
    block.transformer_blocks[0].norm3.eps = 10.0


def replace_layer_norm(block: Any) -> None:
    block.transformer_blocks[0].norm1 = nn.LayerNorm(16).requires_grad_(False)
    block.transformer_blocks[0].norm1.bias += torch.randn(16)


def share_heads_otherwise(block: Any) -> None:
    block.transformer_blocks[0].attn1.heads = 4


@pytest.mark.parametrize("change", [shift_layer_norm, blunt_layer_norm, replace_layer_norm, share_heads_otherwise])
def test_what_changes_is_seen(block: FusedTransformer2DModel, change: Any) -> None:
    inputs = inputs_of()
    before, _, _ = call_both(block, *inputs)
    change(block)
    actual, expected, count = call_both(block, *inputs)
    assert count == 1
    assert relative_error(actual, expected) < 1e-2
    assert relative_error(actual, before) > 1e-2


def scale_attention(block: Any) -> None:
    block.transformer_blocks[0].attn1.rescale_output_factor = 2.0


def add_input_of_attention(block: Any) -> None:
    block.transformer_blocks[0].attn2.residual_connection = True


def norm_without_bias(block: Any) -> None:
    block.transformer_blocks[0].norm2.bias = None


def norm_of_another_kind(block: Any) -> None:
    block.transformer_blocks[0].norm1 = nn.RMSNorm(16).requires_grad_(False)


def norm_over_more(block: Any) -> None:
    block.transformer_blocks[0].norm1 = nn.LayerNorm((30, 16)).requires_grad_(False)


def feed_in_chunks(block: Any) -> None:
    block.transformer_blocks[0].set_chunk_feed_forward(10, 1)


def other_gates(block: Any) -> None:
    block.transformer_blocks[0].ff.net[0].gelu = torch.relu


def other_processor(block: Any) -> None:
    block.transformer_blocks[0].attn2.set_processor(AttnProcessor())


def adapter(block: Any) -> None:
    config = LoraConfig(r=2, target_modules=["attn2.to_v"], init_lora_weights=False, use_dora=True)
    inject_adapter_in_model(config, nn.ModuleList([block]))


def training(block: Any) -> None:
    block.train()


def norm_of_attention(block: Any) -> None:
    block.transformer_blocks[0].attn1.group_norm = nn.GroupNorm(4, 16).requires_grad_(False)


def positions(block: Any) -> None:
    block.transformer_blocks[0].pos_embed = SinusoidalPositionalEmbedding(16, max_seq_length=30)


def norms_of_another_name(block: Any) -> None:
    block.transformer_blocks[0].norm_type = "layer_norm_i2vgen"


def plain_attention(block: Any) -> None:
    remove_fused_(block.transformer_blocks[0].attn2)


def plain_feed_forward(block: Any) -> None:
    remove_fused_(block.transformer_blocks[0].ff)


def compile_part(block: Any) -> None:
    """As `compile_repeated_blocks` does: whoever chose a backend gets it."""
    block.transformer_blocks[0].compile(backend="eager")


OTHERS = [
    scale_attention, add_input_of_attention, norm_without_bias, norm_of_another_kind, norm_over_more, feed_in_chunks,
    other_gates, other_processor, adapter, training, compile_part, norm_of_attention, positions, norms_of_another_name,
    plain_attention, plain_feed_forward,
]  # fmt: skip


@pytest.mark.parametrize("change", OTHERS)
@pytest.mark.parametrize("is_called_before", [False, True])
def test_other_kinds_do_as_before(block: FusedTransformer2DModel, change: Any, is_called_before: bool) -> None:
    inputs = inputs_of()
    if is_called_before:
        call_both(block, *inputs)
    change(block)
    actual, expected, count = call_both(block, *inputs)
    assert torch.equal(actual, expected)
    assert count == 0


@pytest.mark.parametrize(
    "arguments",
    [{"only_cross_attention": True}, {"norm_elementwise_affine": False}, {"activation_fn": "gelu"}],
    ids=str,
)
def test_other_kinds_of_diffusers_do_as_before(arguments: dict[str, Any]) -> None:
    actual, expected, count = call_both(transformer_of(**arguments), *inputs_of())
    assert torch.equal(actual, expected)
    assert count == 0


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.zeros(2, 30)},
        {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 2)},
        {"cross_attention_kwargs": {"ip_adapter_masks": None}},
    ],
    ids=["mask", "mask of the context", "arguments of the processor"],
)
def test_other_calls_do_as_before(block: FusedTransformer2DModel, arguments: dict[str, Any]) -> None:
    actual, expected, count = call_both(block, *inputs_of(), **arguments)
    assert torch.equal(actual, expected)
    assert count == 0


def test_arguments_that_say_nothing_are_no_other_call(block: FusedTransformer2DModel) -> None:
    """As the blocks of UNets have them."""
    arguments = {"cross_attention_kwargs": {}, "attention_mask": None, "encoder_attention_mask": None}
    assert call_both(block, *inputs_of(), **arguments)[2] == 1


def test_a_forced_kernel_and_a_hook_on_all_modules_are_not_passed_by(block: FusedTransformer2DModel) -> None:
    inputs = inputs_of()
    with kernels.use("reference"):
        assert call_both(block, *inputs)[2] == 0
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert call_both(block, *inputs)[2] == 0
    finally:
        handle.remove()


PATCHES = [
    (F, "scaled_dot_product_attention"),
    (AttnProcessor2_0, "__call__"),
    (BasicTransformerBlock, "forward"),
]


@pytest.mark.parametrize(("owner", "name"), PATCHES, ids=lambda value: getattr(value, "__name__", value))
def test_whoever_patches_a_part_for_all_is_not_passed_by(
    block: FusedTransformer2DModel, owner: Any, name: str
) -> None:
    inputs = inputs_of()
    call_both(block, *inputs)
    with mock.patch.object(owner, name, autospec=True, side_effect=getattr(owner, name)) as patched:
        actual, expected, count = call_both(block, *inputs)
    assert torch.equal(actual, expected)
    assert count == 0
    assert patched.called


def test_arguments_may_be_given_by_position(block: FusedTransformer2DModel) -> None:
    image, context = inputs_of()
    with torch.no_grad():
        expected = block(image, context).sample
        assert torch.equal(block(image, context, None, None, None, None, None, None, False)[0], expected)
        masked = block(image, context, None, None, None, None, None, torch.ones(2, 7), False)[0]
    assert relative_error(masked, expected) < 2e-2


def test_gradients_are_kept(block: FusedTransformer2DModel) -> None:
    image, context = (tensor.requires_grad_() for tensor in inputs_of())
    block(image, context).sample.sum().backward()
    assert image.grad is not None
    assert context.grad is not None


def break_first(block: Any) -> None:
    block.proj_in = transformer_of(in_channels=24).proj_in


def break_last(block: Any) -> None:
    block.proj_out = transformer_of(num_attention_heads=3).proj_out


def break_output(block: Any) -> None:
    block.proj_out = transformer_of(out_channels=24).proj_out


def break_output_of_attention(block: Any) -> None:
    block.transformer_blocks[0].attn1.to_out[0] = linear_of(16, 8)


def break_output_of_feed_forward(block: Any) -> None:
    block.transformer_blocks[0].ff.net[2] = linear_of(64, 8)


def linear_of(inputs: int, outputs: int) -> Any:
    return quantize_(nn.ModuleList([nn.Linear(inputs, outputs)]).requires_grad_(False), W8)[0]


def break_norm(block: Any) -> None:
    block.norm = nn.GroupNorm(4, 24).requires_grad_(False)


def break_layer_norm(block: Any) -> None:
    block.transformer_blocks[0].norm3 = nn.LayerNorm(8).requires_grad_(False)


def break_attention(block: Any) -> None:
    block.transformer_blocks[0].attn1 = transformer_of(num_attention_heads=3).transformer_blocks[0].attn1


def break_feed_forward(block: Any) -> None:
    block.transformer_blocks[0].ff = transformer_of(num_attention_heads=3).transformer_blocks[0].ff


@pytest.mark.parametrize(
    "change",
    [
        *(break_first, break_last, break_output, break_norm, break_layer_norm, break_attention, break_feed_forward),
        *(break_output_of_attention, break_output_of_feed_forward),
    ],
)
def test_parts_that_do_not_fit_are_an_error(block: FusedTransformer2DModel, change: Any) -> None:
    change(block)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        block(*inputs_of())


def test_threads_change_nothing(block: FusedTransformer2DModel) -> None:
    inputs = inputs_of(3, 9, 9)
    one, _, _ = call_both(block, *inputs)
    torch.set_num_threads(3)
    try:
        three, _, _ = call_both(block, *inputs)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, three)


def pointers_in(kept: Any) -> set[int]:
    """Where the numbers of all tensors in nested tuples are."""
    if isinstance(kept, Tensor):
        return {kept.data_ptr()}
    return set().union(*map(pointers_in, kept)) if isinstance(kept, tuple) else set()


def test_a_plan_holds_the_norms_that_it_points_to(block: FusedTransformer2DModel) -> None:
    image, context = inputs_of()
    plan = block.build_plan(block.proj_in.packed_for(x86.NAME), image.shape, context.shape)
    norms = [module for module in block.modules() if isinstance(module, nn.LayerNorm | nn.GroupNorm)]
    parameters = [parameter for norm in norms for parameter in norm.parameters()]
    assert len(parameters) == 8
    assert {parameter.data_ptr() for parameter in parameters} <= pointers_in(plan)


# ---- models


@pytest.mark.parametrize("family", ["SD-1.5 UNet", "SD-2 UNet", "SDXL UNet"])
def test_models_of_diffusers_take_it(family: str) -> None:
    model = quantize_(families.build(family), W8)
    plain = copy_of(model)
    remove_fused_(plain)
    blocks = [module for module in model.modules() if isinstance(module, FusedTransformer2DModel)]
    assert not any(isinstance(module, FusedBlock) for module in plain.modules())
    with torch.no_grad(), counted("run_transformer") as calls:
        actual = model(**families.inputs_of(family)).sample
        expected = plain(**families.inputs_of(family)).sample
    assert len(calls) == len(blocks) > 1
    assert relative_error(actual, expected) < 2e-2


def test_a_transformer_that_is_the_model_keeps_its_class() -> None:
    """A pipeline is saved with the class and the library of each model."""
    model = quantize_(Transformer2DModel(**COMMON).eval(), W8)
    assert type(model) is Transformer2DModel


def test_a_compiled_transformer_is_one_operator(block: FusedTransformer2DModel) -> None:
    torch._dynamo.reset()
    inputs, names = inputs_of(), []
    static(block, [500]).proj_in.timestep_groups.select(torch.tensor(1))

    def backend(graph, arguments):
        names.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    with torch.no_grad():
        expected = block(*inputs).sample
        assert torch.equal(torch.compile(block, backend=backend, fullgraph=True)(*inputs).sample, expected)
        assert [name for name in names if "pqcad" in name] == ["pqcad.transformer.default"]
        arguments = (*inputs, torch.tensor(1), block.handle)
        assert torch.Tag.pt2_compliant_tag in torch.ops.pqcad.transformer.default.tags
        torch.library.opcheck(torch.ops.pqcad.transformer.default, arguments)
        block.proj_in.timestep_groups.select(torch.tensor(0))
        assert torch.equal(torch.ops.pqcad.transformer(*arguments), expected)
    torch._dynamo.reset()


# ---- the kernel


def affine_of(norm: nn.LayerNorm) -> Affine:
    return Affine(norm.weight.data_ptr(), norm.bias.data_ptr(), 0, 1, norm.eps)


@given(
    seed=st.integers(0, 2**31),
    pixels=st.integers(1, 9),
    channels=st.integers(1, 140),
    mean=st.sampled_from([0.0, 3.0, -300.0]),
    deviation=st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
)
@settings(max_examples=200)
def test_a_layer_norm_is_rounded_as_that_of_float64(seed, pixels, channels, mean, deviation) -> None:
    torch.manual_seed(seed)
    x, norm = mean + deviation * torch.randn(pixels, channels), nn.LayerNorm(channels).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    padded = round_up(channels, DEPTH)
    image = Image(1, 1, pixels, channels, 0, 0, padded)
    exact = F.layer_norm(x.double(), (channels,), norm.weight.double(), norm.bias.double(), norm.eps)
    # A mean far from zero costs digits of the input itself: its distances are known to half of its last digit.
    distance = 2e-7 * (abs(mean) + 5 * deviation) / (deviation**2 + norm.eps) ** 0.5 * norm.weight.abs().max().item()
    scale, zero_point = torch.empty(1), torch.empty(1, dtype=torch.int32)
    compiled().choose_range(x.data_ptr(), image, affine_of(norm), 255, scale.data_ptr(), zero_point.data_ptr())
    expected = scalar_qparams(exact.amin().item(), exact.amax().item(), 8)
    assert scale.item() == pytest.approx(expected.scale, rel=1e-5, abs=2 * distance / 255)
    codes = torch.empty(pixels, padded, dtype=torch.uint8)
    inverse = 1 / scale.item()
    rows = Rows(0, 1, 0, 1)
    compiled().quantize(x.data_ptr(), image, rows, affine_of(norm), inverse, int(zero_point), 255, 0, codes.data_ptr())
    wanted = (exact / scale.item()).clamp(-int(zero_point), 255 - int(zero_point)) + int(zero_point)
    assert ((codes[:, :channels] - wanted).abs() <= 0.5 + 1e-4 + 2 * distance / scale.item()).all()
    assert (codes[:, channels:] == int(zero_point)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_the_range_of_a_pixel_that_has_no_norm_is_not_finite(value: float) -> None:
    x, norm = torch.randn(4, 20), nn.LayerNorm(20).requires_grad_(False)
    x[2, 7] = value
    scale, zero_point = torch.empty(1), torch.empty(1, dtype=torch.int32)
    image = Image(1, 1, 4, 20, 0, 0, 20)
    compiled().choose_range(x.data_ptr(), image, affine_of(norm), 255, scale.data_ptr(), zero_point.data_ptr())
    assert scale.isnan()


@pytest.mark.parametrize("static_ranges", [False, True])
def test_layers_share_the_codes_of_an_input_where_theirs_are_the_same(static_ranges: bool) -> None:
    """Whatever the layers before took: another range, fewer bits, and again the same."""
    torch.manual_seed(0)
    model = nn.ModuleList([nn.Linear(20, outputs) for outputs in (8, 40, 8, 12, 20, 8, 24)]).requires_grad_(False)
    quantize_(model, W8)
    layers = [layer for layer in model if isinstance(layer, PQCADLinear)]
    layers[3].activation_bits = 7
    layers[5].unpack_()
    layers[5].pack_(WeightSpec(4), activation_bits=8)  # without VNNI, its codes are unsigned
    if static_ranges:
        static(model, []).get_submodule("0").timestep_groups.select(torch.tensor(0))  # type: ignore[union-attr]
        scale, zero_point = layers[0].input_scale, layers[0].input_zero_point
        layers[2].set_input_qparams_(ActivationQParams(scale / 3, zero_point), layers[0].timestep_groups)
        layers[6].set_input_qparams_(ActivationQParams(scale, zero_point + 9), layers[0].timestep_groups)
    x = torch.randn(6, 20)
    calls = [fusion.plan_call(layer, x.shape) for layer in layers]
    outputs = run_calls(calls, x)
    assert len(packed_layers(model)) == len(outputs) == 7
    for call, output in zip(calls, outputs, strict=True):
        scratch.give_back(scratch.buffer(call.code_bytes).fill_(77))  # nothing is left of the codes before
        assert torch.equal(run_call(call, x), output)
