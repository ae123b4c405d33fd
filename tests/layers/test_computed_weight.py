"""Specification of a packed layer's weight: facts at no cost, numbers when they are asked for, and no writes.

And of its state dicts: packed for the whole model, float for a part of it, refused where neither can be meant.
"""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.transformers.transformer_wan import WanAttention
from diffusers.models.transformers.transformer_z_image import TimestepEmbedder
from families import build
from torch import Tensor, nn
from transformers import (
    MT5Config,
    MT5EncoderModel,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.kernels import operation
from diffusers_pqcad.layers.computed_weight import ComputedWeight
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear, QuantizedLayer
from diffusers_pqcad.numerics.qparams import WeightSpec

pytestmark = pytest.mark.fast
W8 = PQCADConfig(method="fixed", weight_bits=8)
OTHERS = torch.arange(84.0).view(7, 12)


def packed(layer: nn.Module | None = None, bits: int = 4) -> QuantizedLayer:
    layer = nn.Linear(12, 7) if layer is None else layer
    kind = PQCADLinear if isinstance(layer, nn.Linear) else PQCADConv2d
    quantized = kind.from_float(layer, "block.layer")
    quantized.pack_(WeightSpec(bits), activation_bits=8)
    return quantized.requires_grad_(False)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of weights of each size that are dequantized."""
    sizes: list[int] = []
    dequantize = operation.dequantize_weight

    def counted(levels: Tensor, scale: Tensor) -> Tensor:
        sizes.append(levels.numel())
        return dequantize(levels, scale)

    monkeypatch.setattr("diffusers_pqcad.kernels.operation.dequantize_weight", counted)
    monkeypatch.setattr("diffusers_pqcad.layers.computed_weight.dequantize_weight", counted)
    return sizes


# ---- facts and numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.Linear(12, 7), nn.Conv2d(6, 4, (3, 1), groups=2, bias=False)])
def test_facts_about_a_weight_are_those_of_the_float_weight_and_cost_nothing(
    layer: nn.Module, dtype: torch.dtype, computed: list[int]
) -> None:
    quantized = packed(copy.deepcopy(layer)).to(dtype)
    weight, floats = quantized.weight, layer.weight.detach().to(dtype)
    for of in (weight, weight.data):
        assert (of.dtype, of.device, of.shape, of.stride()) == (dtype, floats.device, floats.shape, floats.stride())
        assert (of.size(0), of.dim(), of.numel(), len(of)) == (len(floats), floats.dim(), floats.numel(), len(floats))
        assert (of.nbytes, of.element_size(), of.itemsize) == (floats.nbytes, floats.itemsize, floats.itemsize)
        assert of.is_floating_point()
        assert of.is_contiguous()
        assert not of.requires_grad
        assert not of.is_meta
        assert vars(type(of))["_is_hf_initialized"]  # or transformers would initialize it
    assert isinstance(weight, Tensor)
    assert not isinstance(weight, nn.Parameter)
    assert not computed


def test_numbers_are_computed_once(computed: list[int]) -> None:
    weight = packed().weight
    first, second = weight + 0, weight.view(-1)[:12]
    assert computed == [84]
    assert torch.equal(first[0], second)


def test_a_weight_that_was_read_stays_as_it_was() -> None:
    layer = packed()
    expected, weight = layer.dequantized_weight(), layer.weight
    layer.unpack_()
    layer.weight.data.zero_()
    assert torch.equal(weight, expected)


def test_what_is_computed_from_the_weight_is_plain() -> None:
    layer = packed()
    weight, expected = layer.weight, layer.dequantized_weight()
    stream = io.BytesIO()
    torch.save(layer.weight, stream)
    stream.seek(0)
    copies = [
        copy.deepcopy(weight),
        pickle.loads(pickle.dumps(weight)),
        torch.zeros(7, 12).copy_(weight),
        weight.clone(),
        torch.load(stream, weights_only=True),
        safetensors.torch.load(safetensors.torch.save({"weight": layer.weight}))["weight"],
        torch.cat([weight[:3], weight[3:]]),
        weight.T.contiguous().T,
        torch.tensor(weight.tolist()),
    ]
    assert {type(tensor) for tensor in [weight + 1, weight.double(), torch.zeros_like(weight), *copies]} == {Tensor}
    assert all(torch.equal(twin, expected) for twin in copies)
    views = [weight.view(7, 12), weight.T.T, weight[:], weight.detach(), weight.data, *weight.split(7)]
    assert all(torch.equal(view, expected) for view in views)
    assert weight[1, 2].item() == float(weight[1, 2]) == expected[1, 2]
    assert (weight.numpy() == expected.numpy()).all()
    assert repr(weight) == repr(expected)
    assert weight.data_ptr() == weight.untyped_storage().data_ptr() == weight.data.data_ptr()


def test_a_weight_takes_part_in_autograd_autocast_and_functional_transforms() -> None:
    layer, x = packed(), torch.randn(3, 12, requires_grad=True)
    weight, bias = layer.dequantized_weight(), torch.randn(7, requires_grad=True)
    output = F.linear(x, layer.weight, bias)
    assert torch.equal(output, F.linear(x, weight, bias))
    gradients = torch.autograd.grad(output.square().sum(), (x, bias))
    expected = torch.autograd.grad(F.linear(x, weight, bias).square().sum(), (x, bias))
    assert all(torch.equal(*pair) for pair in zip(gradients, expected, strict=True))
    leaf = layer.weight.requires_grad_()
    (gradient,) = torch.autograd.grad(F.linear(x.detach(), leaf).sum(), leaf)
    assert torch.equal(gradient, x.detach().sum(0).expand(7, 12))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(F.linear(x, layer.weight), F.linear(x, weight))
    with torch.inference_mode():
        assert torch.equal(F.linear(x, layer.weight), F.linear(x, weight))
    x = x.detach()
    by_grad = torch.func.grad(lambda x: F.linear(x, layer.weight).square().sum())(x)
    torch.testing.assert_close(by_grad, 2 * F.linear(x, weight) @ weight)
    torch.testing.assert_close(torch.func.vmap(lambda row: layer.weight @ row)(x), F.linear(x, weight))


def test_a_weight_on_meta_has_no_numbers() -> None:
    weight = copy.deepcopy(packed()).to("meta").weight
    assert weight.is_meta
    assert (weight + 1).is_meta


class ReadsWeight(nn.Module):
    """Reads the dtype of one layer's weight, and the numbers of another's."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = packed(), packed()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.first.weight.dtype), self.second.weight) * self.first.weight.shape[0]


def test_a_graph_computes_the_weights_that_it_needs() -> None:
    model, x = ReadsWeight(), torch.randn(2, 12)
    expected = model(x)
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend, fullgraph=True)(x), expected)
    graph = graphs[0].graph
    graph.eliminate_dead_code()
    assert len(graphs) == 1
    assert not [node for node in graph.nodes if node.op != "placeholder" and "first" in str(node.name)]
    exported = torch.export.export(model, (x,)).module()
    torch.testing.assert_close(exported(x), expected)
    torch.testing.assert_close(torch.jit.trace(model, (x,))(x), expected)


# ---- writes


def write_data(weight: Tensor) -> None:
    weight.data = torch.zeros_like(weight)


def write_index(weight: Tensor) -> None:
    weight[0] = 1.0


def write_all(weight: Tensor) -> None:
    weight[...] = OTHERS


def write_augmented(weight: Tensor) -> None:
    weight.data += 1.0


WRITES: dict[str, Callable[[Tensor], object]] = {
    "data": write_data,
    "index": write_index,
    "all": write_all,
    "augmented": write_augmented,
    "add_": lambda weight: weight.add_(1.0),
    "copy_": lambda weight: weight.copy_(OTHERS),
    "data.copy_": lambda weight: weight.data.copy_(torch.zeros_like(weight)),
    "detach": lambda weight: weight.detach().mul_(2.0),
    "view": lambda weight: weight.view(-1).add_(1.0),
    "transposed": lambda weight: weight.T.mul_(2.0),
    "row": lambda weight: weight[0].fill_(1.0),
    "part of a split": lambda weight: weight.split(3)[1].zero_(),
    "same dtype": lambda weight: weight.float().zero_(),
    "as_subclass": lambda weight: weight.as_subclass(Tensor).zero_(),
    "out": lambda weight: torch.add(OTHERS, 1, out=weight),
    "foreach": lambda weight: torch._foreach_add_([weight], 1.0),
    "init": nn.init.zeros_,
    "apply_": lambda weight: weight.apply_(lambda x: x),
    "map_": lambda weight: weight.map_(OTHERS, lambda x, y: y),
    "unsqueeze_": lambda weight: weight.unsqueeze_(0),
    "set_": lambda weight: weight.set_(OTHERS),
    "resize_": lambda weight: weight.resize_(2, 2),
    "share_memory_": lambda weight: weight.share_memory_(),
    "parameters": lambda weight: nn.utils.vector_to_parameters(OTHERS.flatten(), [weight]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_writing_to_a_computed_weight_is_refused(write: Callable[[Tensor], object]) -> None:
    layer = packed()
    expected, weight = layer.dequantized_weight(), layer.weight
    with pytest.raises(ValueError, match=r"^block\.layer: .* cannot be written to.* call dequantize\(\)"):
        write(weight)
    assert torch.equal(weight, expected)
    write(packed().to_float().weight.detach())


def test_a_computed_weight_is_neither_a_parameter_nor_a_writable_array() -> None:
    layer = packed()
    with pytest.raises(ValueError, match=r"^block\.layer: .* cannot be written to"):
        nn.Parameter(layer.weight)
    with pytest.raises(ValueError, match="read-only"):
        layer.weight.numpy()[0] = 1.0


# ---- who reads them


TEXT = {"vocab_size": 20, "d_model": 16, "d_ff": 32, "num_layers": 2, "num_heads": 2, "d_kv": 8}


def text_encoder(config: type, model: type) -> nn.Module:
    return model(config(**TEXT, feed_forward_proj="gated-gelu")).eval()


READERS = {
    "T5": (lambda: text_encoder(T5Config, T5EncoderModel), (torch.arange(5)[None],)),
    "mT5": (lambda: text_encoder(MT5Config, MT5EncoderModel), (torch.arange(5)[None],)),
    "UMT5": (lambda: text_encoder(UMT5Config, UMT5EncoderModel), (torch.arange(5)[None],)),
    "Z-Image": (lambda: nn.Sequential(TimestepEmbedder(16, frequency_embedding_size=8)), (torch.tensor([0.5]),)),
}


@pytest.mark.parametrize("reader", READERS)
def test_models_that_ask_a_weight_for_its_dtype_do_not_dequantize_it(reader: str, computed: list[int]) -> None:
    make, inputs = READERS[reader]
    model = quantize_(make(), PQCADConfig(method="fixed", weight_bits=8))
    asked: list[str] = []
    of_packed = ComputedWeight.of_packed

    def noted(*args: object, layer_name: str, **kwargs: object) -> Tensor:
        asked.append(layer_name)
        return of_packed(*args, layer_name=layer_name, **kwargs)  # type: ignore[arg-type]

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        model(*inputs)  # the kernels make their copies of the weights
        computed.clear()
        patch.setattr(ComputedWeight, "of_packed", noted)
        model(*inputs)
    assert asked
    assert not computed


# ---- state dicts


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return quantize_(build("SD-1.5 UNet"), W8)


def test_the_state_dict_of_a_part_holds_float_weights(unet: UNet2DConditionModel, computed: list[int]) -> None:
    """... in the names of the float model, so that `ControlNetModel.from_unet` and others find what they expect."""
    part = unet.mid_block.state_dict()
    assert part.keys() == build("SD-1.5 UNet").mid_block.state_dict().keys()
    assert not computed  # lazily: the parts of a large model in floating point may not fit
    for name, layer in packed_layers(unet.mid_block).items():
        assert torch.equal(part[f"{name}.weight"], layer.dequantized_weight())
    whole = unet.state_dict()
    wrapped = nn.Sequential(unet).state_dict()
    assert wrapped.keys() == {f"0.{name}" for name in whole}
    for name, layer in packed_layers(unet).items():
        assert f"{name}.weight" not in whole
        assert whole[f"{name}.qweight"].data_ptr() == layer.qweight.data_ptr()
        assert layer.state_dict().keys() == {"weight"} | ({"bias"} if layer.bias is not None else set())


def test_a_part_is_loaded_into_float_layers_dequantized(unet: UNet2DConditionModel) -> None:
    plain, expected = build("SD-1.5 UNet"), copy.deepcopy(unet).dequantize()
    for strict in (True, False):
        nn.init.zeros_(plain.mid_block.resnets[0].conv1.weight)
        plain.mid_block.load_state_dict(unet.mid_block.state_dict(), strict=strict)
        for name, tensor in plain.mid_block.state_dict().items():
            assert type(tensor) is Tensor
            assert torch.equal(tensor, expected.mid_block.state_dict()[name]), name


def test_a_part_is_loaded_into_a_packed_part_bit_by_bit(unet: UNet2DConditionModel) -> None:
    other = build("SD-1.5 UNet")
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    quantize_(other, W8)
    expected = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    unet.mid_block.load_state_dict(unet.mid_block.state_dict())
    other.mid_block.load_state_dict(unet.mid_block.state_dict())
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, expected[name])
        assert torch.equal(other.state_dict()[name], tensor) == ("mid_block" in name or tensor.numel() == 0), name


@pytest.mark.parametrize("strict", [True, False])
def test_a_packed_layer_takes_no_float_weight_and_no_other_grid(unet: UNet2DConditionModel, strict: bool) -> None:
    name = next(iter(packed_layers(unet)))
    before = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    with pytest.raises(ValueError, match=rf"{name}: a packed layer .8 bits.* a float weight.* dequantize\(\)"):
        unet.load_state_dict(build("SD-1.5 UNet").state_dict(), strict=strict)
    coarser = quantize_(build("SD-1.5 UNet"), PQCADConfig(method="fixed", weight_bits=6))
    with pytest.raises(ValueError, match=r"a packed layer .8 bits.* another grid.* dequantize\(\)"):
        unet.mid_block.load_state_dict(coarser.mid_block.state_dict(), strict=strict)
    assert all(torch.equal(tensor, before[key]) for key, tensor in unet.state_dict().items() if "bias" not in key)


@pytest.mark.parametrize("strict", [True, False])
def test_the_whole_state_dict_is_no_float_models(unet: UNet2DConditionModel, strict: bool) -> None:
    plain = build("SD-1.5 UNet")
    for state in (unet.state_dict(), copy.deepcopy(unet.state_dict()), copy.copy(unet.state_dict())):
        with pytest.raises(ValueError, match=r"state dict holds the packed integers .* dequantize\(\)"):
            plain.load_state_dict(state, strict=strict)
    unet.load_state_dict(unet.state_dict(), strict=strict)
    plain.load_state_dict(unet.dequantize().state_dict(), strict=strict)


def test_the_whole_state_dict_is_saved_and_loaded_by_torch(unet: UNet2DConditionModel) -> None:
    other, stream = quantize_(build("SD-1.5 UNet"), W8), io.BytesIO()
    torch.save(unet.state_dict(), stream)
    stream.seek(0)
    state = torch.load(stream, weights_only=True)
    assert {type(metadata) for metadata in state._metadata.values()} <= {dict, type(state)}
    other.load_state_dict(state)
    for name, tensor in unet.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_projections_of_wan_are_fused_from_the_dequantized_weights() -> None:
    model = nn.ModuleDict({"attn": WanAttention(dim=16, heads=2, dim_head=8, added_kv_proj_dim=16)}).eval()
    weights = {
        name: layer.dequantized_weight()
        for name, layer in packed_layers(quantize_(model, PQCADConfig(method="fixed", weight_bits=8))).items()
    }
    attention = model["attn"]
    attention.fuse_projections()
    fused = {name: projection.weight for name, projection in attention.named_children() if name in ("to_qkv", "to_kv")}
    assert fused
    for name, weight in fused.items():
        parts = [weights[f"attn.to_{part}"] for part in name.removeprefix("to_")]
        assert type(weight) is nn.Parameter
        assert torch.equal(weight, torch.cat(parts))
