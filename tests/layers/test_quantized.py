"""Specification of the quantized layers: what they store, how they copy, cast and stand in for float layers."""

import copy
import io
import pickle
from math import ceil

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from torch.nn.utils import prune

from diffusers_pqcad import PQCADConfig, kernels
from diffusers_pqcad.kernels.operation import per_sample
from diffusers_pqcad.layers.find import kernel_cache_bytes, packed_layers
from diffusers_pqcad.layers.quantized import PQCADConv1d, PQCADConv2d, PQCADConv3d, PQCADLinear, QuantizedLayer
from diffusers_pqcad.layers.timesteps import TimestepGroups, install_timestep_groups
from diffusers_pqcad.loading.convert import dequantize_, quantize_
from diffusers_pqcad.loading.coverage import average_bits
from diffusers_pqcad.numerics.packing import packed_row_bytes
from diffusers_pqcad.numerics.qparams import (
    WEIGHT_BITS,
    WeightSpec,
    activation_qparams,
    fake_quantize_weight,
    min_max_weight_scale,
)

pytestmark = pytest.mark.fast
FLOAT_LAYERS = {
    "linear": (lambda: nn.Linear(12, 7), (3, 12)),
    "linear_no_bias": (lambda: nn.Linear(12, 7, bias=False), (3, 12)),
    "conv": (lambda: nn.Conv2d(6, 5, 3, stride=2, padding=1), (2, 6, 7, 7)),
    "conv_groups": (
        lambda: nn.Conv2d(6, 4, (3, 1), padding=(1, 0), dilation=(1, 2), groups=2, bias=False),
        (2, 6, 5, 5),
    ),
    "conv_circular": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    "conv1d": (lambda: nn.Conv1d(6, 5, 3, stride=2, padding=1), (2, 6, 9)),
    "conv1d_groups": (lambda: nn.Conv1d(6, 4, 3, padding="same", dilation=2, groups=2, bias=False), (6, 7)),
    "conv1d_reflect": (lambda: nn.Conv1d(4, 4, 3, padding=1, padding_mode="reflect"), (2, 4, 5)),
    "conv3d": (lambda: nn.Conv3d(6, 5, 3, stride=(1, 2, 2), padding=1), (2, 6, 3, 7, 7)),
    "conv3d_groups": (
        lambda: nn.Conv3d(6, 4, (3, 1, 2), padding="valid", dilation=(1, 2, 1), groups=2, bias=False),
        (6, 3, 5, 5),
    ),
    "conv3d_replicate": (lambda: nn.Conv3d(4, 4, 3, padding=1, padding_mode="replicate"), (2, 4, 3, 5, 5)),
}


def quantized_type(layer: nn.Module) -> type[QuantizedLayer]:
    kinds = {nn.Linear: PQCADLinear, nn.Conv1d: PQCADConv1d, nn.Conv2d: PQCADConv2d, nn.Conv3d: PQCADConv3d}
    return kinds[type(layer)]


def packed(case: str, bits: int, *, activation_bits: int | None = 8, group_size: int | None = None) -> QuantizedLayer:
    layer = FLOAT_LAYERS[case][0]()
    quantized = quantized_type(layer).from_float(layer, "block.layer")
    quantized.pack_(WeightSpec(bits, group_size), activation_bits=activation_bits)
    return quantized.requires_grad_(False)


def stored(layer: QuantizedLayer) -> dict[str, Tensor]:
    """What the state dict of the whole model holds of `layer`."""
    prefix = f"{layer.name}."
    return {name.removeprefix(prefix): tensor for name, tensor in layer.state_dict(prefix=prefix).items()}


def input_of(case: str) -> Tensor:
    return torch.randn(FLOAT_LAYERS[case][1])


@pytest.mark.parametrize("case", FLOAT_LAYERS)
def test_an_unpacked_layer_is_the_float_layer(case: str) -> None:
    layer, x = FLOAT_LAYERS[case][0](), input_of(case)
    quantized = quantized_type(layer).from_float(layer.eval(), "block.layer")
    assert isinstance(quantized, type(layer))
    assert quantized.weight is layer.weight
    assert quantized.bias is layer.bias
    assert not quantized.training
    assert list(quantized.state_dict()) == list(layer.state_dict())
    assert quantized.extra_repr() == layer.extra_repr()
    assert torch.equal(quantized(x), layer(x))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
@pytest.mark.parametrize("case", FLOAT_LAYERS)
def test_a_packed_layer_computes_with_the_rounded_weight(case: str, bits: int) -> None:
    layer, x = FLOAT_LAYERS[case][0](), input_of(case)
    spec = WeightSpec(bits)
    quantized = quantized_type(layer).from_float(layer, "block.layer")
    quantized.pack_(spec, activation_bits=None)
    rounded = fake_quantize_weight(layer.weight, min_max_weight_scale(layer.weight, spec), spec)
    assert torch.equal(quantized.weight, rounded)
    with torch.no_grad():
        layer.weight.copy_(rounded)
    assert torch.equal(quantized(x), layer(x))


@pytest.mark.parametrize("case", [name for name in FLOAT_LAYERS if name.startswith(("conv1d", "conv3d"))])
def test_int8_kernels_refuse_convolutions_of_one_and_three_dimensions(case: str) -> None:
    layer, x = packed(case, 4), input_of(case)
    assert layer.kernel_name() == "reference"
    for name in ("x86", "onednn"):
        with (
            torch.no_grad(),
            kernels.use(name),
            pytest.raises(ValueError, match=f"{name!r} was forced, but it is a conv"),
        ):
            layer(x)
    qparams = layer.operation(layer.input_group()).input_qparams(x)
    rounded = torch.fake_quantize_per_tensor_affine(x, qparams.scale, qparams.zero_point, 0, 255)
    torch.testing.assert_close(layer(x), layer.to_float()(rounded))


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_what_a_packed_layer_stores(bits: int) -> None:
    layer = packed("linear", bits, group_size=4)
    state = stored(layer)
    assert {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in state.items()} == {
        "bias": (torch.float32, (7,)),
        "qweight": (torch.uint8, (7, packed_row_bytes(12, bits))),
        "weight_scale": (torch.float32, (7, 3)),
        "checksum": (torch.int64, (4,)),
    }
    assert state["qweight"].numel() == 7 * {2: 3, 3: 6, 4: 6, 6: 9, 8: 12}[bits]
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    conv = packed("conv_groups", bits)
    assert conv.qweight.shape == (4, packed_row_bytes(3 * 3 * 1, bits))
    assert conv.weight_scale.shape == (4, 1)
    assert conv.weight_shape == conv.weight.shape == (4, 3, 3, 1)


def test_a_given_scale_is_used_and_copied() -> None:
    layer = PQCADLinear(4, 2)
    scale = torch.tensor([[0.5], [0.25]])
    layer.pack_(WeightSpec(4), activation_bits=8, scale=scale)
    scale.zero_()
    assert layer.weight_scale.tolist() == [[0.5], [0.25]]


@pytest.mark.parametrize(("weight", "spec"), [(float("nan"), WeightSpec(4)), (1.0, WeightSpec(4, 5))])
def test_a_layer_that_cannot_be_packed_stays_as_it_is(weight: float, spec: WeightSpec) -> None:
    layer = PQCADLinear(4, 2)
    layer.name = "block.layer"
    nn.init.constant_(layer.weight, weight)
    with pytest.raises(ValueError, match=r"^block\.layer: "):
        layer.pack_(spec, activation_bits=8)
    assert not layer.packed
    assert isinstance(layer.weight, nn.Parameter)
    assert list(layer.state_dict()) == ["weight", "bias"]


@pytest.mark.parametrize(("weight", "scale"), [(float("nan"), 1.0), (1.0, float("nan")), (1.0, 0.0)])
def test_a_given_scale_hides_nothing(weight: float, scale: float) -> None:
    layer = PQCADLinear(4, 2)
    nn.init.constant_(layer.weight, weight)
    with pytest.raises(ValueError, match="finite|NaN"):
        layer.pack_(WeightSpec(4), activation_bits=8, scale=torch.full((2, 1), scale))
    assert not layer.packed


@pytest.mark.parametrize("case", FLOAT_LAYERS)
def test_to_float_and_back(case: str) -> None:
    layer, x = packed(case, 4, activation_bits=None).eval(), input_of(case)
    floats = layer.to_float()
    assert type(floats) is layer.float_type
    assert isinstance(floats.weight, nn.Parameter)
    assert floats.bias is layer.bias
    assert not floats.training
    assert torch.equal(floats(x), layer(x))
    again = type(layer).from_float(floats, "again")
    again.pack_(layer.spec, activation_bits=None, scale=layer.weight_scale)
    assert torch.equal(again.qweight, layer.qweight)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("case", ["linear", "conv"])
@pytest.mark.parametrize("duplicate", ["deepcopy", "pickle", "torch_save"])
def test_copies_after_a_forward(case: str, bits: int, duplicate: str) -> None:
    """oneDNN's packed weights can be neither copied nor pickled: the cache is left behind."""
    layer, x = packed(case, bits), input_of(case)
    expected = layer(x)
    if duplicate == "deepcopy":
        twin = copy.deepcopy(layer)
    elif duplicate == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        stream = io.BytesIO()
        torch.save(layer, stream)
        stream.seek(0)
        twin = torch.load(stream, weights_only=False)
    assert torch.equal(twin(x), expected)
    assert twin.qweight.data_ptr() != layer.qweight.data_ptr()
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("case", ["linear", "conv"])
def test_casts_leave_the_integers_and_scales(case: str, dtype: torch.dtype) -> None:
    layer = packed(case, 4)
    layer.set_input_qparams_(activation_qparams(torch.tensor([-1.0]), torch.tensor([1.23]), 8), TimestepGroups([]))
    layer.timestep_groups.select(torch.tensor(0))
    before = {name: tensor.clone() for name, tensor in stored(layer).items()}
    layer(input_of(case))
    held = layer._cache
    layer.to(dtype)
    assert layer._cache is held  # a cast is no reason to pack again
    for name in ("qweight", "weight_scale", "input_scale", "input_zero_point"):
        assert stored(layer)[name].dtype == before[name].dtype
        assert torch.equal(stored(layer)[name], before[name])
    assert layer.bias.dtype == layer.weight.dtype == layer.to_float().weight.dtype == dtype
    x = input_of(case).to(dtype)
    assert layer(x).dtype == dtype
    with kernels.use("reference"):
        reference = layer(x)
    tolerance = {torch.bfloat16: 2**-6, torch.float16: 2**-9, torch.float64: 1e-5}[dtype]
    torch.testing.assert_close(layer(x), reference, rtol=tolerance, atol=tolerance)
    layer.requires_grad_(False).type(torch.float32)  # which casts integers too, of other modules
    for name in ("qweight", "weight_scale", "input_scale", "input_zero_point"):
        assert stored(layer)[name].dtype == before[name].dtype
        assert torch.equal(stored(layer)[name], before[name])
    assert layer.weight.dtype == torch.float32


def test_a_layer_that_moves_is_packed_again() -> None:
    """Into other memory of the same device, too: what comes there is not known."""
    layer, x = packed("linear", 4), input_of("linear")
    layer(x)
    layer.to_empty(device="cpu")
    assert layer._cache is None


def test_loading_a_state_replaces_what_the_kernel_holds() -> None:
    first, second, x = packed("linear", 4), packed("linear", 4), input_of("linear")
    assert not torch.equal(first(x), second(x))
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))


@torch.no_grad()
def test_a_bias_may_be_no_parameter_of_the_layer() -> None:
    """Pruned, it is an attribute that a hook computes of other tensors."""
    layer, x = packed("linear", 4), input_of("linear")
    without = layer(x) - layer.bias
    prune.custom_from_mask(layer, "bias", torch.tensor([1.0, 0, 1, 1, 0, 1, 1]))
    assert "bias" not in layer._parameters
    torch.testing.assert_close(layer(x), without + layer.bias, rtol=0, atol=1e-6)
    assert layer.bias[1] == layer.bias[4] == 0


def test_hooks_move_along_and_can_still_be_removed() -> None:
    layer, calls = nn.Linear(3, 2), []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: calls.append("before")),
        layer.register_forward_pre_hook(lambda module, args, kwargs: calls.append("before+"), with_kwargs=True),
        layer.register_forward_hook(lambda module, args, output: calls.append("after")),
        layer.register_forward_hook(lambda module, args, kwargs, output: calls.append("after+"), with_kwargs=True),
    ]
    quantized = PQCADLinear.from_float(layer, "layer")
    quantized(torch.zeros(1, 3))
    assert calls == ["before", "before+", "after", "after+"]
    for handle in handles:
        handle.remove()
    quantized(torch.zeros(1, 3))
    assert len(calls) == 4


@pytest.mark.parametrize("activation_bits", [8, None])
def test_layers_built_from_the_type_are_plain_float_layers(activation_bits: int | None) -> None:
    """peft builds its adapters as `type(base_layer)(...)`."""
    base = packed("conv", 4, activation_bits=activation_bits)
    adapter = type(base)(6, 4, (3, 3), (2, 2), (1, 1), bias=False)
    twin = nn.Conv2d(6, 4, 3, 2, 1, bias=False)
    adapter.load_state_dict(twin.state_dict())
    x = input_of("conv")
    assert not adapter.packed
    assert torch.equal(adapter(x), twin(x))
    assert [name for name, _ in adapter.named_parameters()] == ["weight"]
    adapter.weight = nn.Parameter(torch.zeros_like(twin.weight))
    assert adapter(x).count_nonzero() == 0
    adapter(x).sum().backward()
    assert adapter.weight.grad is not None


@pytest.fixture
def quantized_unet(tiny_unet: UNet2DModel) -> UNet2DModel:
    return quantize_(tiny_unet, PQCADConfig(weight_bits=4.0))


def test_gradients_reach_the_adapters_of_peft(quantized_unet: UNet2DModel) -> None:
    """Real conv and linear LoRA: their gradients are those of adapters on the float model with the same weights."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_out.0", "conv1"], init_lora_weights=False)
    assert {type(layer) for layer in packed_layers(quantized_unet).values()} == {PQCADLinear, PQCADConv2d}
    for layer in packed_layers(quantized_unet).values():
        layer.activation_bits = None  # so that the float model is an exact reference
    floats = dequantize_(copy.deepcopy(quantized_unet))
    x, timesteps, gradients = torch.randn(2, 1, 8, 8), torch.tensor([10, 900]), []
    for model in (quantized_unet, floats):
        torch.manual_seed(1)
        peft.inject_adapter_in_model(config, model)
        output = model(x, timesteps).sample
        output.square().mean().backward()
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained
        assert all("lora_" in name for name in trained)
        assert {parameter.dim() for parameter in trained.values()} == {2, 4}
        assert all(parameter.grad.abs().max() > 0 for parameter in trained.values())
        gradients.append({name: parameter.grad for name, parameter in trained.items()})
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("weight_bits", [4.0, 8.0])
def test_adapters_train_through_int8_activations(quantized_unet: UNet2DModel, weight_bits: float) -> None:
    peft = pytest.importorskip("peft")
    peft.inject_adapter_in_model(
        peft.LoraConfig(r=2, target_modules=["to_v", "conv2"], init_lora_weights=False), quantized_unet
    )
    quantized_unet(torch.randn(2, 1, 8, 8), 500).sample.square().mean().backward()
    adapters = [parameter for name, parameter in quantized_unet.named_parameters() if "lora_" in name]
    assert adapters
    assert all(parameter.grad.isfinite().all() and parameter.grad.any() for parameter in adapters)
    with torch.no_grad():
        quantized_unet(torch.randn(2, 1, 8, 8), 500)


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_adapters_of_peft_cannot_be_fused(quantized_unet: UNet2DModel, dora: bool) -> None:
    """peft writes to `.weight.data`, which is computed: without an error, the adapter would silently be lost."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False, use_dora=dora)
    peft.inject_adapter_in_model(config, quantized_unet)
    adapted = [module for module in quantized_unet.modules() if isinstance(module, peft.tuners.lora.LoraLayer)]
    assert {type(module.base_layer) for module in adapted} == {PQCADLinear, PQCADConv2d}
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        before = quantized_unet(x, 5).sample
        for module in adapted:
            for safe_merge in (False, True):
                with pytest.raises(ValueError, match=r"\.(to_q|conv1): the weight of a packed layer .* unfused"):
                    module.merge(safe_merge=safe_merge)
            assert not module.merged
        assert torch.equal(quantized_unet(x, 5).sample, before)


@pytest.mark.parametrize("case", ["linear", "conv"])
@pytest.mark.parametrize("copies", [1, 2])
def test_mixed_timesteps_equal_the_calls_of_each_sample(case: str, copies: int) -> None:
    """Static ranges per timestep group; `copies` samples per timestep, as where frames are folded into the batch."""
    layer = packed(case, 4)
    groups = TimestepGroups([100, 500])
    layer.set_input_qparams_(
        activation_qparams(torch.tensor([-3.0, -1.0, -0.2]), torch.tensor([2.0, 1.0, 0.1]), 8), groups
    )
    timesteps = torch.tensor([700, 3, 200])
    x = torch.randn(3 * copies, *FLOAT_LAYERS[case][1][1:])
    groups.select(groups.index_of(timesteps))
    mixed = layer(x)
    with kernels.use("reference"):
        for index, sample in enumerate(x.split(copies)):
            groups.select(groups.index_of(timesteps[index]))
            torch.testing.assert_close(
                mixed[index * copies : (index + 1) * copies], layer(sample), rtol=1e-5, atol=1e-6
            )
            qparams = layer.operation(layer.input_group()).input_qparams(sample)
            assert qparams is not None
            scale, zero_point = qparams
            assert scale == layer.input_scale[[2, 0, 1][index]]
            assert zero_point == layer.input_zero_point[[2, 0, 1][index]]


def test_static_ranges_in_a_model(tiny_unet: UNet2DModel) -> None:
    """The model tells its layers; a copy of the model tells its own."""
    model = quantize_(tiny_unet, PQCADConfig())
    groups = install_timestep_groups(model, [500])
    for layer in packed_layers(model).values():
        layer.set_input_qparams_(activation_qparams(torch.tensor([-8.0, -2.0]), torch.tensor([8.0, 2.0]), 8), groups)
    model = copy.deepcopy(model)
    x, timesteps = torch.randn(2, 1, 8, 8), torch.tensor([900, 10])
    with torch.no_grad(), kernels.use("reference"):
        mixed = model(x, timesteps).sample
        # The same batch size, for its sums are in the same order: otherwise a code moves by one now and then.
        single = [model(x, int(timestep)).sample[index] for index, timestep in enumerate(timesteps)]
    assert groups.current is None
    torch.testing.assert_close(mixed, torch.stack(single), rtol=1e-5, atol=1e-6)
    assert (mixed[0] - model(x[:1], 10).sample[0]).abs().max() > 0.02 * mixed.abs().max()


def test_a_layer_that_saw_no_timestep_says_so() -> None:
    layer = packed("linear", 4)
    layer.set_input_qparams_(activation_qparams(torch.zeros(2), torch.ones(2), 8), TimestepGroups([500]))
    with pytest.raises(ValueError, match=r"block\.layer: .* no timestep was seen"):
        layer(input_of("linear"))


def test_a_batch_that_does_not_match_its_timesteps_is_refused() -> None:
    assert per_sample(torch.tensor([1, 2]), torch.zeros(4, 3, 2), "x").flatten().tolist() == [1, 1, 2, 2]
    assert per_sample(torch.tensor([1, 2]), torch.zeros(4, 3, 2), "x").shape == (4, 1, 1)
    with pytest.raises(ValueError, match=r"block\.layer: a batch of 3 cannot be matched with 2 timesteps"):
        per_sample(torch.tensor([1, 2]), torch.zeros(3, 4), "block.layer")


def test_average_bits_by_hand() -> None:
    model = nn.Sequential(
        PQCADLinear(10, 6), PQCADConv2d(2, 5, 2), nn.Linear(8, 5), nn.GroupNorm(1, 4), nn.Embedding(3, 4)
    )
    assert average_bits(model) is None
    model[0].pack_(WeightSpec(3), activation_bits=8)
    model[1].pack_(WeightSpec(8), activation_bits=8)
    over_packed = (60 * 3 + 40 * 8) / 100
    over_all = (60 * 3 + 40 * 8 + (40 + 12) * 32) / (100 + 40 + 12)
    assert average_bits(model) == (over_packed, over_all)
    model.to(torch.bfloat16)
    assert average_bits(model) == (5.0, (500 + 52 * 16) / 152)


def test_kernel_cache_bytes_counts_one_byte_per_cached_weight() -> None:
    model = nn.Sequential(packed("linear", 4), packed("linear", 8, activation_bits=None))
    assert kernel_cache_bytes(model) == 0
    model[0](input_of("linear"))
    model[1](input_of("linear"))
    assert kernel_cache_bytes(model) == (12 * 7 if model[0].kernel_name() != "reference" else 0)
    model.to("meta")
    assert kernel_cache_bytes(model) == 0


def test_the_description_names_bits_and_activations() -> None:
    layer = packed("linear", 3, group_size=4, activation_bits=None)
    assert repr(layer) == (
        "PQCADLinear(in_features=12, out_features=7, bias=True, "
        "bits=3, group_size=4, activations=float, kernel=reference)"
    )
    assert "activations=8-bit dynamic" in repr(packed("conv", 4))
    layer = packed("conv", 4)
    layer.set_input_qparams_(activation_qparams(torch.zeros(3), torch.ones(3), 8), TimestepGroups([1, 2]))
    assert "activations=8-bit static x3" in repr(layer)


@pytest.mark.parametrize("bits", WEIGHT_BITS)
def test_packed_layers_take_the_bits_they_claim(bits: int) -> None:
    layer = packed("linear", bits)
    assert packed_layers(nn.Sequential(layer)) == {"0": layer}
    assert layer.qweight.numel() <= ceil(12 * bits / 8 + 2) * 7
