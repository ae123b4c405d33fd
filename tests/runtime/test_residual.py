"""Specification of residual blocks that the kernel computes at once: the same numbers, fewer passes."""

import copy
import pickle

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from fused_blocks import copy_of, counted, static
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.runtime.fusion import install_fused_, remove_fused_
from diffusers_pqcad.runtime.residual import FusedResnetBlock2D


def block_of(*, bits: int = 8, **settings) -> ResnetBlock2D:
    settings = {"in_channels": 16, "out_channels": 16, "temb_channels": 12, "groups": 4} | settings
    model = nn.ModuleList([ResnetBlock2D(**settings)]).eval().requires_grad_(False)
    quantize_(model, PQCADConfig(method="fixed", weight_bits=bits))
    return model[0]


def call_both(block: ResnetBlock2D, x: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
    """Return what `block` returns, and what it returns as a plain `ResnetBlock2D`."""
    plain = copy_of(block)
    remove_fused_(plain)
    assert type(plain) is ResnetBlock2D
    with torch.no_grad():
        return block(x, *args, **kwargs), plain(x, *args, **kwargs)


def image(channels: int = 16) -> Tensor:
    return torch.randn(2, channels, 5, 6).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def block() -> ResnetBlock2D:
    block = block_of()
    if not isinstance(block, FusedResnetBlock2D):
        pytest.skip("no kernel takes blocks on this computer")
    return block


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ranges", ["dynamic", "static"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"out_channels": 24},
        {"out_channels": 40},
        {"skip_time_act": True},
        {"temb_channels": None},
        {"temb_channels": None, "time_embedding_norm": "group"},
    ],
    ids=lambda s: "-".join(map(str, s.items())) or "plain",
)
def test_a_block_at_once_is_the_plain_block(block: ResnetBlock2D, settings, ranges: str, bits: int) -> None:
    block = block_of(bits=bits, **settings)
    if ranges == "static":
        static(block, [500]).conv1.timestep_groups.select(torch.tensor(1))
    temb = None if settings.get("temb_channels", 12) is None else torch.randn(2, 12)
    with counted("run_block") as calls:
        actual, expected = call_both(block, image(), temb)
    assert len(calls) == 1
    assert actual.is_contiguous(memory_format=torch.channels_last)
    # A code may differ at a tie: sums and activations are those of other roundings.
    assert (actual - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert (actual - expected).abs().mean() <= 1e-3 * expected.abs().mean()


def float_shortcut_block(**settings) -> ResnetBlock2D:
    settings = {"in_channels": 16, "out_channels": 24, "temb_channels": 12, "groups": 4} | settings
    model = nn.ModuleList([ResnetBlock2D(**settings)]).eval().requires_grad_(False)
    quantize_(model, PQCADConfig(method="fixed", weight_bits=8, modules_to_not_convert=["conv_shortcut"]))
    return model[0]


@pytest.mark.parametrize("ranges", ["dynamic", "static"])
def test_a_shortcut_in_floating_point_is_added(block: ResnetBlock2D, ranges: str) -> None:
    block = float_shortcut_block()
    assert type(block.conv_shortcut) is nn.Conv2d
    if ranges == "static":
        static(block, [500]).conv1.timestep_groups.select(torch.tensor(1))
    with counted("run_block") as calls:
        actual, expected = call_both(block, image(), torch.randn(2, 12))
    assert len(calls) == 1
    assert (actual - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert (actual - expected).abs().mean() <= 1e-3 * expected.abs().mean()
    block.conv_shortcut.weight.mul_(3)  # no plan holds it
    changed, expected = call_both(block, image(), torch.randn(2, 12))
    assert (changed - expected).abs().mean() <= 1e-3 * expected.abs().mean()


def test_what_replaces_a_shortcut_in_floating_point_is_computed(block: ResnetBlock2D) -> None:
    """As an adapter around it does: nothing is added by a plan that was made for a convolution."""
    block, x, temb = float_shortcut_block(), image(), torch.randn(2, 12)
    before, _ = call_both(block, x, temb)
    block.conv_shortcut = nn.Sequential(block.conv_shortcut, nn.Conv2d(24, 24, 1).requires_grad_(False))
    with counted("run_block") as calls:
        actual, expected = call_both(block, x, temb)
    assert not calls
    assert torch.equal(actual, expected)
    assert (actual - before).abs().mean() > 0.01


def test_hooks_of_a_shortcut_in_floating_point_are_called(block: ResnetBlock2D) -> None:
    block, seen = float_shortcut_block(), []

    def double(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(output)
        return output * 2

    block.conv_shortcut.register_forward_hook(double)
    x, temb = image(), torch.randn(2, 12)
    actual, expected = call_both(block, x, temb)
    assert len(seen) == 2
    assert (actual - expected).abs().mean() <= 1e-3 * expected.abs().mean()


@pytest.mark.parametrize(
    "change",
    [lambda output: output[:, :1], lambda output: output.double(), lambda output: output[..., :1]],
    ids=["channels", "dtype", "width"],
)
def test_what_c_could_not_read_is_not_handed_to_it(block: ResnetBlock2D, change) -> None:
    block = float_shortcut_block()
    block.conv_shortcut.register_forward_hook(lambda module, args, output: change(output))
    with counted("run_block") as calls:
        actual, expected = call_both(block, image(), torch.randn(2, 12))
    assert not calls
    assert torch.equal(actual, expected)


def test_a_block_takes_the_range_of_the_timestep(block: ResnetBlock2D) -> None:
    static(block, [500])
    x, temb, outputs = image(), torch.randn(2, 12), []
    for group in (0, 1):
        block.conv1.timestep_groups.select(torch.tensor(group))
        outputs.append(call_both(block, x, temb))
        assert (outputs[-1][0] - outputs[-1][1]).abs().mean() <= 1e-3 * outputs[-1][1].abs().mean()
    assert not torch.equal(outputs[0][0], outputs[1][0])
    block.conv1.timestep_groups.select(torch.tensor([0, 1]))  # no kernel takes two ranges in a call
    with counted("run_block") as calls:
        actual, expected = call_both(block, x, temb)
    assert torch.equal(actual, expected)
    assert not calls


def test_any_layout_of_the_input_is_taken(block: ResnetBlock2D) -> None:
    x, temb = image(), torch.randn(12, 2).T
    with torch.no_grad():
        assert torch.equal(block(x.contiguous(), temb), block(x, temb.contiguous()))


def test_a_replaced_parameter_is_seen(block: ResnetBlock2D) -> None:
    x, temb = image(), torch.randn(2, 12)
    before, _ = call_both(block, x, temb)
    block.norm2.weight = nn.Parameter(block.norm2.weight * 3, requires_grad=False)
    block.conv2.bias = nn.Parameter(block.conv2.bias + 5, requires_grad=False)
    with counted("run_block") as calls:
        actual, expected = call_both(block, x, temb)
    assert len(calls) == 1
    assert (actual - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert (actual - before).abs().mean() > 1


def test_threads_change_nothing(block: ResnetBlock2D) -> None:
    x, temb = image(), torch.randn(2, 12)
    one, _ = call_both(block, x, temb)
    torch.set_num_threads(3)
    try:
        three, _ = call_both(block, x, temb)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(one, three)


@pytest.mark.parametrize(
    "settings",
    [
        {"output_scale_factor": 2.0},
        {"time_embedding_norm": "scale_shift"},
        {"up": True},
        {"down": True},
    ],
    ids=lambda settings: "-".join(map(str, *settings.items())),
)
def test_other_blocks_do_as_before(block: ResnetBlock2D, settings) -> None:
    other = block_of(**settings)
    temb = None if settings.get("temb_channels", 12) is None else torch.randn(2, 12)
    x = torch.randn(2, 16, 6, 6).contiguous(memory_format=torch.channels_last)
    with counted("run_block") as calls:
        actual, expected = call_both(other, x, temb)
    assert torch.equal(actual, expected)
    assert not calls


def look(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: output * 2)


def replace_input(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))


def replace_forward(module: nn.Module) -> None:
    """As offloading does."""
    forward = module.forward
    module.forward = lambda *args: forward(*args) * 2  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [look, replace_input, replace_forward])
@pytest.mark.parametrize("name", ["conv1", "conv2", "norm1", "norm2", "time_emb_proj", "nonlinearity", "dropout"])
def test_whoever_changes_a_module_is_not_passed_by(block: ResnetBlock2D, name: str, change) -> None:
    x, temb = image(), torch.randn(2, 12)
    plain, _ = call_both(block, x, temb)
    change(block.get_submodule(name))
    with torch.no_grad():
        actual = block(x, temb)
        remove_fused_(block)
        assert torch.equal(actual, block(x, temb))
    assert not torch.equal(actual, plain)


@pytest.mark.parametrize("name", ["forward_hook", "forward_pre_hook"])
def test_a_hook_on_all_modules_sees_them_all(block: ResnetBlock2D, name: str) -> None:
    seen: list[nn.Module] = []
    register = getattr(torch.nn.modules.module, f"register_module_{name}")
    handle = register(lambda module, *args: seen.append(module))
    try:
        call_both(block, image(), torch.randn(2, 12))
    finally:
        handle.remove()
    assert {block.conv1, block.conv2, block.norm1, block.time_emb_proj} <= set(seen)


@pytest.mark.parametrize("replacement", [nn.ReLU, lambda: nn.Sequential(nn.SiLU())])
def test_another_activation_is_computed(block: ResnetBlock2D, replacement) -> None:
    block.nonlinearity = replacement()
    with counted("run_block") as calls:
        actual, expected = call_both(block, image(), torch.randn(2, 12))
    assert torch.equal(actual, expected)
    assert not calls


def test_errors_are_those_of_the_plain_block(block: ResnetBlock2D) -> None:
    plain = copy_of(block)
    remove_fused_(plain)
    for x, temb in ((image(15), torch.randn(2, 12)), (image(), torch.randn(2, 11)), (image(), torch.randn(3, 12))):
        with torch.no_grad(), pytest.raises((ValueError, RuntimeError)) as expected:
            plain(x, temb)
        with torch.no_grad(), pytest.raises(expected.type):
            block(x, temb)


def test_its_name_is_the_one_that_libraries_look_for(block: ResnetBlock2D) -> None:
    """For instance in `_no_split_modules`, which keep a block on one device."""
    assert type(block).__name__ == "ResnetBlock2D"
    assert type(pickle.loads(pickle.dumps(block))) is FusedResnetBlock2D


def test_an_adapter_of_another_kind_is_not_passed_by(block: ResnetBlock2D) -> None:
    holder = nn.ModuleList([block])
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False, use_dora=True), holder)
    actual, expected = call_both(block, image(), torch.randn(2, 12))
    assert torch.equal(actual, expected)


def break_stride(block: ResnetBlock2D) -> None:
    block.conv1.stride = (2, 2)


def break_shortcut(block: ResnetBlock2D) -> None:
    block.conv_shortcut = None


def break_norm(block: ResnetBlock2D) -> None:
    block.norm2 = nn.GroupNorm(4, 16).requires_grad_(False)


def break_embedding(block: ResnetBlock2D) -> None:
    block.time_emb_proj = block_of(out_channels=16).time_emb_proj


@pytest.mark.parametrize("change", [break_stride, break_shortcut, break_norm, break_embedding])
def test_parts_that_do_not_fit_are_refused(block: ResnetBlock2D, change) -> None:
    """C would read beyond them."""
    block = block_of(out_channels=24)
    change(block)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        block(image(), torch.randn(2, 12))
    remove_fused_(block)
    with torch.no_grad(), pytest.raises((ValueError, RuntimeError)):
        block(image(), torch.randn(2, 12))


def test_training_keeps_its_dropout_and_gradients(block: ResnetBlock2D) -> None:
    block.train()
    x = image().requires_grad_()
    with counted("run_block") as calls:
        block(x, torch.randn(2, 12)).sum().backward()
    assert x.grad is not None
    assert not calls


@pytest.mark.parametrize("name", ["norm1.weight", "norm2.bias", "conv2.bias", "time_emb_proj.bias"])
def test_the_gradient_of_any_parameter_is_kept(block: ResnetBlock2D, name: str) -> None:
    block.get_parameter(name).requires_grad_(True)
    # torch 2.13 crashes in the backward of a channels_last group norm whose weight alone asks for a gradient.
    x = image().requires_grad_("norm" in name)
    block(x, torch.randn(2, 12)).sum().backward()
    assert block.get_parameter(name).grad is not None


def test_the_gradient_of_the_time_embedding_is_kept(block: ResnetBlock2D) -> None:
    temb = torch.randn(2, 12, requires_grad=True)
    block(image(), temb).sum().backward()
    assert temb.grad is not None


def test_a_forced_kernel_is_taken(block: ResnetBlock2D) -> None:
    with kernels.use("reference"), counted("run_block") as calls:
        actual, expected = call_both(block, image(), torch.randn(2, 12))
    torch.testing.assert_close(actual, expected)
    assert not calls


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_take_the_plain_path(block: ResnetBlock2D, dtype: torch.dtype) -> None:
    block.to(dtype)
    with counted("run_block") as calls:
        actual, expected = call_both(block, image().to(dtype), torch.randn(2, 12).to(dtype))
    assert torch.equal(actual, expected)
    assert actual.dtype == dtype
    assert not calls


def test_an_empty_batch_has_an_empty_output(block: ResnetBlock2D) -> None:
    actual, expected = call_both(block, image()[:0], torch.randn(0, 12))
    assert actual.shape == expected.shape == (0, 16, 5, 6)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda block: pickle.loads(pickle.dumps(block))])
def test_a_copy_has_a_handle_of_its_own(block: ResnetBlock2D, duplicate) -> None:
    other = duplicate(block)
    assert int(other.handle) != int(block.handle)
    assert graph_ops.MODULES[int(other.handle)] is other


@pytest.mark.parametrize("settings", [{}, {"out_channels": 24}, {"temb_channels": None}], ids=str)
def test_a_compiled_block_is_one_operator(block: ResnetBlock2D, settings) -> None:
    torch._dynamo.reset()
    block = static(block_of(**settings), [500])
    block.conv1.timestep_groups.select(torch.tensor(1))
    temb = None if settings.get("temb_channels", 12) is None else torch.randn(2, 12)
    graphs = []

    def backend(graph, inputs):
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return graph.forward

    with torch.no_grad():
        x = image()
        expected = block(x, temb)
        assert torch.equal(torch.compile(block, backend=backend, fullgraph=True)(x, temb), expected)
    assert [name for name in graphs[0] if "pqcad" in name] == ["pqcad.residual_block.default"]
    arguments = (x, temb, torch.tensor(1), block.handle, block.out_channels)
    with torch.no_grad():
        torch.library.opcheck(torch.ops.pqcad.residual_block.default, arguments)
        # The graph hands the range in: what another call selected since does not count.
        block.conv1.timestep_groups.select(torch.tensor(0))
        assert torch.equal(torch.ops.pqcad.residual_block(*arguments), expected)
        block.conv1.timestep_groups.select(torch.tensor(0))
        assert not torch.equal(block(x, temb), expected)
    torch._dynamo.reset()


def test_a_block_changes_its_class_and_nothing_else(block: ResnetBlock2D, tiny_unet) -> None:
    names = [name for name, _ in tiny_unet.named_modules()]
    quantize_(tiny_unet, PQCADConfig())
    assert type(tiny_unet.mid_block.resnets[0]) is FusedResnetBlock2D
    assert type(copy.deepcopy(tiny_unet).mid_block.resnets[0]) is FusedResnetBlock2D
    assert [name for name, _ in tiny_unet.named_modules()] == names
    tiny_unet.dequantize()
    assert type(tiny_unet.mid_block.resnets[0]) is ResnetBlock2D


def test_blocks_of_float_convolutions_stay(block: ResnetBlock2D, tiny_unet) -> None:
    install_fused_(tiny_unet, [FusedResnetBlock2D])
    assert not any(isinstance(module, FusedResnetBlock2D) for module in tiny_unet.modules())
    quantize_(tiny_unet, PQCADConfig(modules_to_not_convert=["mid_block"]))
    assert type(tiny_unet.mid_block.resnets[0]) is ResnetBlock2D
    assert len(packed_layers(tiny_unet)) > 0
