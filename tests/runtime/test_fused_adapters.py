"""Specification of adapters in fused blocks: a block stays whole, and no change of an adapter goes unseen."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention import FeedForward
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.upsampling import Upsample2D
from fused_blocks import copy_of, counted, static
from peft import LoHaConfig, LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.kernels import x86
from diffusers_pqcad.kernels.x86.calls import run_call, run_calls
from diffusers_pqcad.kernels.x86.library import compiled, library
from diffusers_pqcad.kernels.x86.structs import NO_AFFINE, Addend
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.runtime import fusion
from diffusers_pqcad.runtime.adapters import packed_down
from diffusers_pqcad.runtime.fusion import FusedBlock, remove_fused_

needs_x86 = pytest.mark.skipif(isinstance(library(), str), reason="no kernel takes blocks on this computer")
pytestmark = needs_x86
Block = Callable[[], Any]


def residual(**options: Any) -> nn.Module:
    return ResnetBlock2D(**{"in_channels": 16, "out_channels": 24, "temb_channels": 12, "groups": 4} | options)


def attention(**options: Any) -> nn.Module:
    return Attention(16, heads=2, dim_head=8, bias=True, norm_num_groups=4, residual_connection=True, **options)


def transformer(**options: Any) -> nn.Module:
    arguments = {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 16, "norm_num_groups": 4}
    return Transformer2DModel(**arguments, activation_fn="geglu", cross_attention_dim=12, **options)


def feed_forward() -> nn.Module:
    return FeedForward(32, activation_fn="geglu")


IMAGE, TIME, CONTEXT = (2, 16, 6, 7), (2, 12), (2, 5, 12)
# A block, its inputs, what runs its plan, and the layers that adapters lie on.
KINDS: dict[str, tuple[Block, list[tuple[int, ...]], str, list[str]]] = {
    "residual": (residual, [IMAGE, TIME], "run_block", ["conv1", "conv2", "conv_shortcut", "time_emb_proj"]),
    "residual without shortcut": (lambda: residual(out_channels=16), [IMAGE, TIME], "run_block", ["conv1", "conv2"]),
    "attention": (attention, [IMAGE], "run_attention", ["to_q", "to_k", "to_v", "to_out.0"]),
    "feed forward": (feed_forward, [(2, 5, 32)], "run_feed_forward", ["net.0.proj", "net.2"]),
    "transformer": (
        *(transformer, [IMAGE, CONTEXT], "run_transformer"),
        ["to_q", "attn2.to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"],
    ),
    "transformer with linear layers around": (
        *(lambda: transformer(use_linear_projection=True), [IMAGE, CONTEXT], "run_transformer"),
        ["proj_in", "proj_out"],
    ),
}


def holder_of(kind: str, bits: int = 8) -> nn.ModuleList:
    """A quantized block, in a module that adapters can be injected into."""
    torch.manual_seed(0)
    holder = nn.ModuleList([KINDS[kind][0]()]).eval().requires_grad_(False)
    return quantize_(holder, PQCADConfig(method="fixed", weight_bits=bits))  # type: ignore[return-value]


def inputs_of(kind: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(size, generator=generator) for size in KINDS[kind][1]]


def add(holder: nn.Module, targets: list[str], name: str = "default", **options: Any) -> None:
    torch.manual_seed(3)
    config = LoraConfig(**{"r": 4, "target_modules": targets, "init_lora_weights": False} | options)
    inject_adapter_in_model(config, holder, name)
    holder.requires_grad_(False)


def adapted_layers(holder: nn.Module) -> list[Any]:
    return [module for module in holder.modules() if hasattr(module, "base_layer")]


@torch.no_grad()
def call(holder: Any, inputs: list[Tensor]) -> Tensor:
    output = holder[0](*inputs)
    return getattr(output, "sample", output)


def call_both(holder: Any, kind: str) -> tuple[Tensor, Tensor, int]:
    """What the block returns, what its layers return one by one, and how often it was computed at once."""
    plain, inputs = copy_of(holder), inputs_of(kind)
    remove_fused_(plain)
    with counted(KINDS[kind][2]) as calls:
        actual = call(holder, inputs)
    return actual, call(plain, inputs), len(calls)


def error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


# ---- the same numbers


@pytest.mark.parametrize("ranges", ["dynamic", "static"])
@pytest.mark.parametrize(
    ("kind", "targets"),
    [(kind, [target]) for kind, (*_, targets) in KINDS.items() for target in targets]
    + [(kind, targets) for kind, (*_, targets) in KINDS.items()],
    ids=lambda value: value if isinstance(value, str) else "+".join(value),
)
def test_a_block_with_adapters_is_computed_at_once(kind: str, targets: list[str], ranges: str) -> None:
    holder = holder_of(kind)
    if ranges == "static":
        groups = next(iter(packed_layers(static(holder, [500])).values())).timestep_groups
        assert groups is not None
        groups.select(torch.tensor(0))
    plain = call(holder, inputs_of(kind))
    add(holder, targets, lora_alpha=16)
    actual, expected, count = call_both(holder, kind)
    assert count == 1
    assert actual.shape == expected.shape
    moved = error(expected, plain)
    assert moved > 0.02
    # Codes at ties, on which all that follows depends; static ranges of a few numbers cut off what adapters see, too.
    share = 0.1 if ranges == "dynamic" else 0.25
    assert error(actual, expected) < max(share * moved, 1e-2)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_layers_of_few_bits_have_adapters_too(kind: str, bits: int) -> None:
    holder = holder_of(kind, bits)
    plain = call(holder, inputs_of(kind))
    add(holder, KINDS[kind][3], lora_alpha=16)
    actual, expected, count = call_both(holder, kind)
    assert count == 1
    assert error(actual, expected) < 0.1 * error(expected, plain)


@torch.no_grad()
@pytest.mark.parametrize("shape", [(3, 20), (2, 6, 7, 9)], ids=["linear", "conv"])
def test_products_are_exact_but_for_the_rounding_of_the_first(shape: tuple[int, ...]) -> None:
    """Two adapters with scales of their own; the first products are those of a layer with the same codes."""
    torch.manual_seed(0)
    layer = nn.Linear(20, 40) if len(shape) == 2 else nn.Conv2d(6, 40, 3, padding=1)
    holder = quantize_(nn.ModuleList([layer]).requires_grad_(False), PQCADConfig(method="fixed", weight_bits=8))
    x, base = torch.randn(shape), holder[0]
    if len(shape) == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    add(holder, ["0"])
    add(holder, ["0"], "other", r=5, lora_alpha=3)
    module = holder[0]
    module.set_adapter(["default", "other"])
    module.scaling["other"] = -0.7
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    actual = run_call(fusion.plan_call(module, x.shape), x, memory_format=layout)

    packed = base.packed_for(x86.NAME)
    downs = [module.lora_A[name].weight for name in ("default", "other")]
    operation, own = packed_down(base, [(down, down, 1.0) for down in downs], packed)  # type: ignore[list-item]
    hidden = x86.run(operation, own, x).movedim(1, -1).double()
    ups = [module.lora_B[name].weight.double().flatten(1) for name in ("default", "other")]
    scales = [module.scaling[name] for name in ("default", "other")]
    added = scales[0] * hidden[..., :4] @ ups[0].T + scales[1] * hidden[..., 4:] @ ups[1].T
    expected = base(x) + added.movedim(-1, 1)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)

    rounding = error((actual - base(x)).double(), (module(x) - base(x)).double())
    assert 0 < rounding < 0.02


@torch.no_grad()
def test_gates_are_applied_to_what_is_added_too() -> None:
    holder = holder_of("feed forward")
    add(holder, ["net.0.proj"], lora_alpha=64)
    block, (x,) = holder[0], inputs_of("feed forward")
    value, gate = block.net[0].proj(x).chunk(2, dim=-1)
    expected = block.net[2](value * nn.functional.gelu(gate))
    assert error(block(x), expected) < 0.05
    assert error(block(x), block.net[2](value * nn.functional.gelu(torch.zeros_like(gate)))) > 0.5


@pytest.mark.skipif(isinstance(library(), str) or not compiled().has_vnni(), reason="tiles need VNNI")
def test_upsampling_has_adapters() -> None:
    torch.manual_seed(0)
    holder = nn.ModuleList([Upsample2D(64, use_conv=True)]).eval().requires_grad_(False)
    quantize_(holder, PQCADConfig(method="fixed", weight_bits=8))
    x = torch.randn(2, 64, 5, 6)
    plain = call(holder, [x])
    add(holder, ["conv"], lora_alpha=16)
    other = copy.deepcopy(holder)
    remove_fused_(other)
    assert isinstance(holder[0], FusedBlock)
    expected = call(other, [x])
    assert error(call(holder, [x]), expected) < 0.1 * error(expected, plain)


def test_an_adapter_of_another_dtype_is_taken() -> None:
    holder = holder_of("attention")
    add(holder, ["to_q", "to_out.0"], lora_alpha=16)
    for module in adapted_layers(holder):
        for part in (module.lora_A, module.lora_B):
            part.to(torch.bfloat16)
    actual, expected, count = call_both(holder, "attention")
    assert count == 1
    assert error(actual, expected) < 0.02


# ---- whoever changes an adapter


def scale(holder: nn.Module) -> None:
    for module in adapted_layers(holder):
        module.scale_layer(0.3)


def switch(holder: nn.Module) -> None:
    for module in adapted_layers(holder):
        module.set_adapter(["other"])


def use_both(holder: nn.Module) -> None:
    for module in adapted_layers(holder):
        module.set_adapter(["default", "other"])


def add_third(holder: nn.Module) -> None:
    targets = KINDS["residual"][3] if isinstance(holder[0], ResnetBlock2D) else KINDS["transformer"][3]
    torch.manual_seed(9)
    add(holder, targets, "third", lora_alpha=32)
    for module in adapted_layers(holder):
        module.set_adapter(["default", "third"])


def disable(holder: nn.Module) -> None:
    for module in adapted_layers(holder):
        module.enable_adapters(False)


def remove(holder: nn.Module) -> None:
    for name, module in list(holder.named_modules()):
        if hasattr(module, "base_layer"):
            holder.set_submodule(name, module.base_layer)


def delete(holder: nn.Module) -> None:
    for module in adapted_layers(holder):
        module.delete_adapter("default")


def factors(holder: nn.Module, part: str) -> list[nn.Parameter]:
    return [getattr(module, part)["default"].weight for module in adapted_layers(holder)]


def train_down(holder: nn.Module) -> None:
    with torch.no_grad():
        for weight in factors(holder, "lora_A"):
            weight.mul_(-1.5)


def train_up(holder: nn.Module) -> None:
    with torch.no_grad():
        for weight in factors(holder, "lora_B"):
            weight.mul_(-1.5)


def write_uncounted(holder: nn.Module) -> None:
    """As `EMAModel.copy_to` does, which leaves torch's count of writes as it is."""
    for weight in factors(holder, "lora_A"):
        weight.data.copy_(-1.5 * weight.data)


def replace_data(holder: nn.Module) -> None:
    for weight in factors(holder, "lora_A"):
        weight.data = -1.5 * weight.data


def replace_parameter(holder: nn.Module) -> None:
    for module in adapted_layers(holder):
        layer = module.lora_A["default"]
        layer.weight = nn.Parameter(-1.5 * layer.weight.detach(), requires_grad=False)


CHANGES = [
    *(scale, switch, use_both, add_third, disable, remove, delete),
    *(train_down, train_up, write_uncounted, replace_data, replace_parameter),
]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_a_change_is_seen(kind: str, change: Callable[[Any], None]) -> None:
    holder = holder_of(kind)
    add(holder, KINDS[kind][3], lora_alpha=16)
    add(holder, KINDS[kind][3], "other", r=3, lora_alpha=9)
    for module in adapted_layers(holder):
        module.set_adapter(["default"])
    holder.requires_grad_(False)
    before, _, count = call_both(holder, kind)
    assert count == 1
    change(holder)
    holder.requires_grad_(False)
    actual, expected, count = call_both(holder, kind)
    assert count == 1
    moved = error(before, expected)
    assert moved > 0.1
    assert error(actual, expected) < max(0.1 * moved, 1e-2)


@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_adding_the_first_is_seen_and_the_packed_weights_stay(kind: str) -> None:
    holder = holder_of(kind)
    plain = call(holder, inputs_of(kind))
    caches = [layer._cache for layer in packed_layers(holder).values()]
    add(holder, KINDS[kind][3], lora_alpha=16)
    actual, expected, count = call_both(holder, kind)
    assert count == 1
    assert error(actual, expected) < 0.1 * error(plain, expected)
    assert all(layer._cache is cache for layer, cache in zip(packed_layers(holder).values(), caches, strict=True))
    remove(holder)
    assert torch.equal(call(holder, inputs_of(kind)), plain)


def test_a_first_product_is_packed_once_for_all_sizes_and_scales() -> None:
    holder = holder_of("attention")
    add(holder, ["to_q"])
    call(holder, inputs_of("attention"))
    (module,) = adapted_layers(holder)
    kept = module.base_layer.packed_for(x86.NAME).adapter
    assert kept is not None
    module.scale_layer(2.0)
    call(holder, [torch.randn(1, 16, 3, 3)])
    assert module.base_layer.packed_for(x86.NAME).adapter is kept


# ---- what is left to peft


def dora(holder: nn.Module, targets: list[str]) -> None:
    add(holder, targets, use_dora=True)


def biases(holder: nn.Module, targets: list[str]) -> None:
    add(holder, targets, lora_bias=True)


def dropout(holder: nn.Module, targets: list[str]) -> None:
    add(holder, targets, lora_dropout=0.5)
    for module in adapted_layers(holder):
        module.lora_dropout["default"].train()


def hook(holder: nn.Module, targets: list[str]) -> None:
    add(holder, targets)
    adapted_layers(holder)[0].lora_A["default"].register_forward_hook(lambda module, args, output: 2 * output)


def hook_around(holder: nn.Module, targets: list[str]) -> None:
    add(holder, targets)
    adapted_layers(holder)[0].register_forward_hook(lambda module, args, output: 2 * output)


def other_kind(holder: nn.Module, targets: list[str]) -> None:
    inject_adapter_in_model(LoHaConfig(r=4, target_modules=targets, init_weights=False), holder)
    holder.requires_grad_(False)


def not_finite(holder: nn.Module, targets: list[str]) -> None:
    add(holder, targets)
    adapted_layers(holder)[0].lora_A["default"].weight.data[0, 0] = torch.inf


@pytest.mark.parametrize("kind", ["residual", "attention", "feed forward"])
@pytest.mark.parametrize("put", [dora, biases, hook, hook_around, other_kind, not_finite])
def test_other_adapters_are_left_to_peft(kind: str, put: Callable[[Any, list[str]], None]) -> None:
    holder = holder_of(kind)
    put(holder, KINDS[kind][3][:1])
    actual, expected, count = call_both(holder, kind)
    assert count == 0
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def test_dropout_that_is_active_is_left_to_peft_and_one_that_is_not_is_nothing() -> None:
    holder = holder_of("attention")
    dropout(holder, ["to_q"])
    with counted("run_attention") as calls:
        call(holder, inputs_of("attention"))
        assert not calls
        for module in adapted_layers(holder):
            module.eval()
        call(holder, inputs_of("attention"))
    assert len(calls) == 1


def test_gradients_are_left_to_peft() -> None:
    holder = holder_of("attention")
    add(holder, ["to_q"])
    for weight in factors(holder, "lora_A"):
        weight.requires_grad_(True)
    with counted("run_attention") as calls:
        holder[0](*inputs_of("attention")).sum().backward()
    assert not calls
    assert all(weight.grad is not None for weight in factors(holder, "lora_A"))


@torch.no_grad()
def test_an_addend_is_of_its_own_layer_alone() -> None:
    """`run_calls` adds it to the outputs, and not to the first products beside them."""
    holder = holder_of("attention")
    add(holder, ["to_q"], lora_alpha=16)
    x, added = torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    queries = fusion.plan_call(holder[0].to_q, x.shape)
    keys = fusion.plan_call(holder[0].to_k, x.shape)
    plain = run_calls((queries, keys), x)
    outputs = run_calls((queries, keys), x, NO_AFFINE, Addend(added.data_ptr(), 0))
    for output, without in zip(outputs, plain, strict=True):
        torch.testing.assert_close(output, without + added)
