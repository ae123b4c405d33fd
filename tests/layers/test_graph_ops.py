"""Specification of the operators that stand for packed layers in the graphs of `torch.compile`."""

import copy
import gc
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.attention import FeedForward
from families import build, call
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.layers import graph_ops
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.quantized import PQCADConv1d, PQCADConv2d, PQCADConv3d, PQCADLinear, QuantizedLayer
from diffusers_pqcad.layers.timesteps import TimestepGroups, install_timestep_groups
from diffusers_pqcad.numerics.qparams import ActivationQParams, WeightSpec

CONVS: dict[str, dict[str, Any]] = {
    "3x3": {"kernel_size": 3, "padding": 1},
    "1x1": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": 2},
    "dilated": {"kernel_size": (3, 2), "dilation": 2, "padding": (2, 1)},
    "same": {"kernel_size": (4, 3), "padding": "same"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
}


def pack(layer: QuantizedLayer) -> QuantizedLayer:
    layer.pack_(WeightSpec(4), activation_bits=8)
    return layer.eval()


def linear() -> QuantizedLayer:
    return pack(PQCADLinear(6, 4))


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@torch.no_grad()
def check(layer: QuantizedLayer, x: Tensor) -> None:
    """The compiled layer gives the eager one's values, and the shape and strides that the operator promised."""
    expected = layer(x)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    args = (x, torch.zeros((), dtype=torch.int64), layer.handle)
    if not isinstance(layer, nn.Linear):
        padding = layer._reversed_padding_repeated_twice
        sums = [padding[start] + padding[start + 1] for start in reversed(range(0, len(padding), 2))]
        geometry = (layer.out_channels, list(layer.kernel_size), sums, list(layer.dilation), list(layer.stride))
        torch.library.opcheck(torch.ops.pqcad.packed_conv.default, (*args, *geometry))
    else:
        torch.library.opcheck(torch.ops.pqcad.packed_linear.default, (*args, layer.out_features))


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6)], ids=str)
def test_linear(shape: tuple[int, ...]) -> None:
    check(linear(), torch.randn(shape))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")  # of the float layer, too
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "layer",
    [
        lambda: PQCADConv1d(3, 5, 3, stride=2, padding=1),
        lambda: PQCADConv1d(3, 6, 4, padding="same", groups=3),
        lambda: PQCADConv3d(3, 5, (1, 3, 2), stride=(1, 2, 1), padding=(0, 1, 2), dilation=(1, 1, 2)),
        lambda: PQCADConv3d(3, 5, 3, padding=1, padding_mode="replicate"),
    ],
)
def test_convolutions_of_one_and_three_dimensions(layer: Any, batched: bool) -> None:
    packed = pack(layer())
    size = (9, 8, 7)[: len(packed.kernel_size)]
    check(packed, torch.randn(2, 3, *size) if batched else torch.randn(3, *size))


@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("batched", [True, False])
def test_convolution(name: str, batched: bool) -> None:
    layer = pack(PQCADConv2d(3, 5, **CONVS[name]))
    check(layer, torch.randn(2, 3, 9, 8) if batched else torch.randn(3, 9, 8))


@pytest.mark.fast
@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_has_a_handle_of_its_own(duplicate: Any) -> None:
    layer = linear()
    other = duplicate(layer)
    assert graph_ops.MODULES[int(layer.handle)] is layer
    assert graph_ops.MODULES[int(other.handle)] is other


@pytest.mark.fast
def test_a_handle_keeps_no_layer_alive() -> None:
    layer = linear()
    number = int(layer.handle)
    del layer
    gc.collect()
    assert number not in graph_ops.MODULES


@pytest.mark.fast
def test_handles_are_numbers_even_while_a_model_is_built_without_memory() -> None:
    with torch.device("meta"):
        assert PQCADLinear(2, 2).handle.device.type == "cpu"


@torch.no_grad()
def test_the_group_of_a_compiled_call_is_an_input() -> None:
    """A layer alone, as in a block that is compiled for itself: the ranges follow the timestep without a new graph."""
    from torch._dynamo.testing import CompileCounter

    layer, groups, counter = linear(), TimestepGroups([500]), CompileCounter()
    layer.set_input_qparams_(ActivationQParams(torch.tensor([0.01, 0.1]), torch.tensor([0, 128])), groups)
    compiled, x = torch.compile(layer, backend=counter, fullgraph=True), torch.randn(2, 6)
    outputs = []
    for timestep in (10, 700, torch.tensor([10, 700])):
        groups.select(groups.index_of(timestep))
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], layer(x))
    assert counter.frame_count == 2  # one timestep, and a batch of them
    assert not torch.equal(outputs[0], outputs[1])
    torch.testing.assert_close(outputs[2], torch.stack([outputs[0][0], outputs[1][1]]))


@torch.no_grad()
def test_a_forced_kernel_is_taken_by_a_compiled_layer_too() -> None:
    layer = linear()
    compiled, x = torch.compile(layer, backend="eager", fullgraph=True), torch.randn(2, 6)
    with kernels.use("reference"):
        compiled(x)
    assert layer._cache is None
    compiled(x)
    assert (layer._cache is None) == (layer.kernel_name() == "reference")


def test_a_call_with_gradients_is_traced_through() -> None:
    layer = linear()
    gradients = []
    for function in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        x = torch.ones(2, 6, requires_grad=True)
        function(x).square().sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("is_block", [False, True])
def test_an_exported_graph_holds_the_weights_and_gives_the_same_gradients(is_block: bool) -> None:
    """An operator names its module by a number of this process, which means nothing, or another one, elsewhere."""
    model: nn.Module = nn.Sequential(FeedForward(6, inner_dim=32) if is_block else nn.Linear(6, 4))
    quantize_(model.eval().requires_grad_(False), PQCADConfig(method="fixed", weight_bits=4))
    x = torch.randn(2, 6, requires_grad=True)
    with torch.no_grad():
        program = torch.export.export(model, (x.detach(),))
    assert "pqcad" not in str(program.graph)
    outputs = []
    for function in (program.module(), model):
        x.grad = None
        with kernels.use("reference"):
            output = function(x)
        output.square().sum().backward()
        outputs.append((output, x.grad))
    torch.testing.assert_close(*outputs)


def test_a_compiled_graph_without_gradients_refuses_to_give_one() -> None:
    """It would be zero: whatever an operator computes is unknown to autograd."""
    layer, x = linear(), torch.randn(2, 6, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"pqcad::.* has no gradient, but an input asks for one"):
        torch.ops.pqcad.packed_linear(x, torch.zeros((), dtype=torch.int64), layer.handle, 4)


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@torch.no_grad()
def test_torchscript_of_every_width(bits: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 4, 1)).eval()
    quantize_(model, PQCADConfig(method="fixed", weight_bits=bits))
    torch.jit.trace(model, torch.randn(1, 4, 8, 8), check_trace=False).save(tmp_path / "model.pt")
    x = torch.randn(3, 4, 8, 8)  # another batch
    with kernels.use("reference"):
        torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(x), model(x))


@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@torch.no_grad()
def test_onnx_of_every_width(bits: int, dynamo: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript")
    onnx_reference = pytest.importorskip("onnx.reference")
    model, x = nn.Sequential(nn.Linear(6, 4)).eval(), torch.randn(3, 6)
    quantize_(model, PQCADConfig(method="fixed", weight_bits=bits))
    path, options = str(tmp_path / "model.onnx"), {"verbose": False} if dynamo else {}
    torch.onnx.export(model, (x,), path, dynamo=dynamo, input_names=["x"], **options)
    (output,) = onnx_reference.ReferenceEvaluator(path).run(None, {"x": x.numpy()})
    with kernels.use("reference"):
        torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-5)


def test_scripting_names_the_layer_and_the_way_out() -> None:
    model = quantize_(nn.Sequential(nn.Linear(6, 4)), PQCADConfig(method="fixed", weight_bits=4))
    with pytest.raises(ValueError, match=r"0: torch\.jit\.script .* dequantize\(\)"):
        torch.jit.script(model)
    model[0] = model[0].to_float()
    torch.jit.script(model)


@torch.no_grad()
def test_blocks_of_a_kind_share_one_graph() -> None:
    from torch._dynamo.testing import CompileCounter

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=4, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4),
    ).eval()  # fmt: skip
    counts = []
    for quantized in (False, True):
        if quantized:
            quantize_(model, PQCADConfig(method="fixed", weight_bits=4))
        assert bool(packed_layers(model)) is quantized
        blocks, counter = copy.deepcopy(model.single_transformer_blocks), CompileCounter()
        for block in blocks:
            block.compile(backend=counter, fullgraph=True)
        x, text, temb = torch.randn(2, 4, 16), torch.randn(2, 3, 16), torch.randn(2, 16)
        for block in blocks:
            text, x = (output.contiguous() for output in block(x, text, temb))
        counts.append(counter.frame_count)
        torch._dynamo.reset()
    assert counts[1] == counts[0] == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++ on a CPU")
@pytest.mark.parametrize("family", ["UNet2DModel", "DiT"])
@torch.no_grad()
def test_the_default_compiler_takes_the_operators(family: str) -> None:
    """Inductor checks the strides that the operators promise, and moves what lies between them."""
    torch.manual_seed(0)
    model = quantize_(build(family), PQCADConfig(method="fixed", weight_bits=8))
    compiled = torch.compile(model, fullgraph=True)
    for timestep in (10, 900):
        expected = call(model, family, timestep=timestep)
        torch.testing.assert_close(call(compiled, family, timestep=timestep), expected, rtol=1e-2, atol=1e-2)


@torch.no_grad()
def test_hooks_run_once_in_a_compiled_layer() -> None:
    layer, x = linear(), torch.randn(2, 6)
    layer.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


class Broken(nn.Module):
    """A model whose layer lies outside of the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = linear()

    def forward(self, sample: Tensor, timestep: Any) -> Tensor:
        torch._dynamo.graph_break()
        return self.outside(sample)

    @torch._dynamo.disable
    def outside(self, sample: Tensor) -> Tensor:
        return self.layer(sample)


@torch.no_grad()
def test_a_layer_behind_a_graph_break_takes_the_range_of_this_call() -> None:
    model, x = Broken(), torch.randn(2, 6)
    groups = install_timestep_groups(model, [500])
    model.layer.set_input_qparams_(ActivationQParams(torch.tensor([0.01, 0.1]), torch.tensor([0, 128])), groups)
    expected = {timestep: model(x, torch.tensor(timestep)) for timestep in (10, 900)}
    compiled = torch.compile(model, backend="eager")
    for timestep in (10, 900, 10):
        torch.testing.assert_close(compiled(x, torch.tensor(timestep)), expected[timestep])
    assert not torch.equal(expected[10], expected[900])


@torch.no_grad()
@pytest.mark.parametrize("kind", [int, float])
def test_timesteps_that_are_numbers_are_compiled_as_often_as_for_a_float_model(kind: type) -> None:
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    model = build("UNet2DModel")
    quantize_(model, PQCADConfig(method="fixed", weight_bits=8))
    groups = install_timestep_groups(model, [300, 600])
    for layer in packed_layers(model).values():
        layer.set_input_qparams_(ActivationQParams(torch.full((3,), 0.05), torch.full((3,), 128)), groups)
    compiled, counts = torch.compile(model, backend=counter, fullgraph=True), []
    for timestep in (999, 899, 650, 550, 350, 250, 50, 10, 1):
        torch.testing.assert_close(
            call(compiled, "UNet2DModel", timestep=[kind(timestep)]),
            call(model, "UNet2DModel", timestep=timestep),
        )
        counts.append(counter.frame_count)
    assert counts[-1] == counts[2]  # the first number is a constant, the second makes it a variable
