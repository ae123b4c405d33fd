"""Specification of pending activations: one pass where a kernel takes them, a plain tensor for everything else."""

import copy
from collections.abc import Callable

import families
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.kernels import x86
from diffusers_pqcad.kernels.pending import (
    AT_ONCE,
    Norm,
    PendingActivation,
    PendingGroupNorm,
    PendingSiLU,
    install_pending_,
    remove_pending_,
)
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear, packed_layers
from diffusers_pqcad.layers.timesteps import TimestepGroups
from diffusers_pqcad.numerics.qparams import ScalarQParams, WeightSpec, activation_qparams, scalar_qparams

needs_x86 = pytest.mark.skipif(isinstance(x86.library(), str), reason=str(x86.library()))


def channels_last(*shape: int) -> Tensor:
    return (torch.randn(shape) * 3 + 1).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def norm() -> nn.GroupNorm:
    norm = nn.GroupNorm(4, 16).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


@pytest.fixture
def pending(norm: nn.GroupNorm) -> PendingActivation:
    return PendingActivation.of(channels_last(2, 16, 5, 6), Norm.of(norm), has_silu=True)


def expected(pending: PendingActivation) -> Tensor:
    norm = pending.group_norm
    return F.silu(F.group_norm(pending.source, 4, norm.weight, norm.bias, norm.eps))


def test_what_needs_no_value_computes_nothing(pending: PendingActivation) -> None:
    assert (pending.shape, pending.dim(), pending.ndim, pending.numel()) == ((2, 16, 5, 6), 4, 4, 960)
    assert (pending.dtype, pending.device.type, pending.requires_grad) == (torch.float32, "cpu", False)
    assert pending.size(1) == 16
    assert pending.is_contiguous(memory_format=torch.channels_last)
    assert pending.computed is None


@pytest.mark.parametrize(
    "move",
    [lambda x: x.to("cpu"), lambda x: x.to(torch.device("cpu"), non_blocking=True), lambda x: x.to(torch.float32)],
)
def test_where_it_is_already_it_may_be_sent(pending: PendingActivation, move: Callable) -> None:
    assert move(pending) is pending
    assert pending.computed is None


@pytest.mark.parametrize(
    "use",
    [
        lambda x: x.to(torch.float64),
        lambda x: x.to(torch.zeros(1)),
        lambda x: torch.zeros(1, dtype=torch.float64).to(x),
        lambda x: x.to("cpu", copy=True),
        lambda x: x.to(torch.float32, False, True),
        lambda x: x.to("cpu", memory_format=torch.contiguous_format),
        lambda x: x + 1,
        lambda x: 1 - x,
        lambda x: x[:, 1],
        lambda x: x.amax((1, 2)),
        lambda x: x.norm(),
        lambda x: torch.cat([x, x], 1),
        lambda x: torch.where(x > 0, input=x, other=0.0),
        lambda x: F.interpolate(x, scale_factor=2.0),
        lambda x: F.conv2d(x, torch.ones(1, 16, 1, 1)),
        lambda x: torch.chunk(x, 2, dim=1)[1],
        lambda x: F.dropout(x, 0.0, training=True),
        lambda x: torch.from_numpy(x.numpy()),
        lambda x: x.clone(),
        lambda x: copy.deepcopy(x) * 1,
    ],
)
def test_everything_else_sees_the_values_of_a_plain_tensor(pending: PendingActivation, use: Callable) -> None:
    output = use(pending)
    assert type(output) is Tensor
    assert torch.equal(output, use(expected(pending)))


def test_values_are_computed_once(pending: PendingActivation, monkeypatch: pytest.MonkeyPatch) -> None:
    first = pending.value()
    monkeypatch.setattr(F, "silu", None)
    assert pending.value() is first
    assert torch.equal(pending * 1, first)


def test_a_norm_that_loses_its_parameters_was_what_it_was(norm: nn.GroupNorm) -> None:
    """As the modules of an offloaded model do when they have been called."""
    norm.__class__, x = PendingGroupNorm, channels_last(2, 16, 5, 6)
    pending, exact = norm(x), F.group_norm(x, 4, norm.weight, norm.bias, norm.eps)
    norm.weight.data = torch.zeros(16)
    norm.bias = nn.Parameter(torch.empty(16, device="meta"), requires_grad=False)
    assert torch.equal(pending + 0, exact)


def test_parameters_may_lie_anywhere(norm: nn.GroupNorm) -> None:
    values = torch.randn(32)
    norm.weight, norm.bias = (nn.Parameter(values[start::2], requires_grad=False) for start in (0, 1))
    pending = PendingActivation.of(channels_last(2, 16, 5, 6), Norm.of(norm))
    assert pending.group_norm.weight.is_contiguous()
    assert pending.group_norm.bias.is_contiguous()
    assert torch.equal(pending + 0, F.group_norm(pending.source, 4, norm.weight, norm.bias, norm.eps))


def test_a_hook_may_keep_what_the_norm_returns(norm: nn.GroupNorm) -> None:
    norm.__class__, x = PendingGroupNorm, channels_last(2, 16, 5, 6)
    norm.register_forward_hook(lambda module, args, output: None)
    assert type(norm(x)) is Tensor


def test_a_norm_of_other_channels_is_refused_at_once(norm: nn.GroupNorm) -> None:
    norm.__class__ = PendingGroupNorm
    with pytest.raises(RuntimeError):
        norm(channels_last(2, 8, 5, 6))


def test_a_dropout_that_drops_nothing_passes_it_on(pending: PendingActivation) -> None:
    assert nn.Dropout(0.5).eval()(pending) is pending
    assert pending.computed is None


def test_the_modules_make_and_complete_it(norm: nn.GroupNorm) -> None:
    norm.__class__, silu, x = PendingGroupNorm, PendingSiLU(), channels_last(2, 16, 5, 6)
    half = norm(x)
    assert isinstance(half, PendingActivation)
    whole = silu(half)
    assert isinstance(whole, PendingActivation)
    assert whole.has_silu
    assert torch.equal(whole * 1, F.silu(nn.GroupNorm.forward(norm, x)))
    assert torch.equal(half * 1, nn.GroupNorm.forward(norm, x))
    assert torch.equal(silu(half), F.silu(half.value()))  # computed by now
    assert torch.equal(silu(whole) * 1, F.silu(whole.value()))  # twice
    assert type(silu(x)) is Tensor


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(2, 16, 5, 6),
        torch.randn(2, 16, 30),
        torch.randn(2, 30, 16).transpose(1, 2),
        channels_last(2, 16, 5, 6).double(),
        channels_last(2, 16, 5, 6).requires_grad_(),
        torch.empty(0, 16, 5, 6),
        channels_last(2, 16, 5, 6).to("meta"),
    ],
    ids=["contiguous", "3d_contiguous", "3d", "double", "gradient", "empty", "meta"],
)
def test_what_no_kernel_could_take_is_computed_at_once(norm: nn.GroupNorm, x: Tensor) -> None:
    norm.__class__ = PendingGroupNorm
    norm.to(dtype=x.dtype, device=x.device)
    assert type(norm(x)) is Tensor


@needs_x86
@torch.no_grad()
def test_a_layer_over_other_dimensions_sees_the_values(norm: nn.GroupNorm) -> None:
    """A matrix product over the columns of an image."""
    layer = PQCADLinear(16, 8).requires_grad_(False)
    pending = PendingActivation.of(channels_last(2, 16, 5, 16), Norm.of(norm))
    layer.pack_(WeightSpec(8), activation_bits=8)
    with kernels.use("x86"):
        output = layer(pending)
        assert torch.equal(output, layer(pending.value()))


def test_gradients_of_the_norm_are_kept(norm: nn.GroupNorm) -> None:
    norm.__class__ = PendingGroupNorm
    norm.requires_grad_(True)
    x = channels_last(2, 16, 5, 6)
    assert norm(x).grad_fn is not None
    with torch.no_grad():
        assert isinstance(norm(x), PendingActivation)


# ---- the kernel


def chosen_range(x: Tensor, image: x86.Image, affine: x86.Affine) -> ScalarQParams:
    """The qparams of 8 bits that the kernel takes for the range of `x`."""
    scale, zero_point = torch.empty(1), torch.empty(1, dtype=torch.int32)
    x86.compiled().choose_range(x.data_ptr(), image, affine, 255, scale.data_ptr(), zero_point.data_ptr())
    return ScalarQParams(scale.item(), int(zero_point))


@needs_x86
@given(
    least=st.floats(width=32, allow_infinity=False),
    largest=st.floats(width=32, allow_infinity=False),
)
@settings(max_examples=300)
def test_the_kernel_chooses_the_range_that_python_does(least: float, largest: float) -> None:
    x, image = torch.tensor([least, largest] + 6 * [0.0]), x86.Image(1, 1, 1, 8, 0, 0, 8)
    chosen = chosen_range(x, image, x86.Affine())
    expected = scalar_qparams(x.amin().item(), x.amax().item(), 8)
    assert chosen == expected or (np.isnan(chosen.scale) and np.isnan(expected.scale))


@needs_x86
@given(
    values=st.lists(
        st.floats(-60, 60, width=32) | st.floats(-2, 0, width=32) | st.floats(-1.375, -1.25, width=32), min_size=1
    ),
    special=st.sampled_from([0.0, float("nan"), float("-inf"), float("inf")]),
    at=st.integers(0, 99),
    in_lines=st.booleans(),
)
@settings(max_examples=300)
def test_the_range_of_silu_is_found_from_three_inputs(values, special: float, at: int, in_lines: bool) -> None:
    values[at % len(values)] = special or values[at % len(values)]
    x, count = torch.tensor(values), len(values)
    image = x86.Image(1, count, 1, 1, 0, 0, 1) if in_lines else x86.Image(1, 1, 1, count, 0, 0, count)
    torch.set_num_threads(3)  # which share lines
    try:
        chosen = chosen_range(x, image, x86.Affine(has_silu=True))
    finally:
        torch.set_num_threads(1)
    output = F.silu(x.double())
    expected = scalar_qparams(output.amin().item(), output.amax().item(), 8)
    if not np.isfinite(expected.scale):
        assert not np.isfinite(chosen.scale)
        return
    # SiLU is computed to six digits, so a zero point near the middle of two codes may be either.
    assert chosen.scale == pytest.approx(expected.scale, rel=1e-6)
    assert abs(chosen.zero_point - expected.zero_point) <= 1


@needs_x86
@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 6),
    size=st.integers(1, 12),
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    mean=st.sampled_from([0.0, 1.0, -300.0]),
)
@settings(max_examples=40)
def test_the_map_is_the_group_norm(seed, groups, size, height, width, mean) -> None:
    torch.manual_seed(seed)
    channels = groups * size
    norm = nn.GroupNorm(groups, channels, eps=1e-5).requires_grad_(False)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(2, channels, height, width) * 2 + mean).contiguous(memory_format=torch.channels_last)
    image = x86.Image(2, height, width, channels, 0, 0, x86.round_up(channels, 4))
    gain, shift = x86.normalization(x86.group_norm_of(Norm.of(norm)), x, image)
    actual = x.double() * gain.double()[:, :, None, None] + shift.double()[:, :, None, None]
    exact = F.group_norm(x.double(), groups, norm.weight.double(), norm.bias.double(), 1e-5)
    # A single pixel of a single channel: any deviation is a rounding error, and eps says how much it is magnified.
    tolerance = 1e-5 * (1 + abs(mean)) if size * height * width > 4 else 1e-3 * (1 + abs(mean))
    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=tolerance)


@needs_x86
@pytest.mark.parametrize("channels", [3, 8, 13])
def test_codes_and_range_after_silu_are_those_of_float64(channels: int) -> None:
    values = torch.cat([torch.linspace(-30, 30, 997 * channels - 2), torch.tensor([-200.0, 200.0])])
    x = values[torch.randperm(len(values))].view(1, 1, 997, channels).permute(0, 3, 1, 2)
    gain, shift = torch.full((channels,), 0.5), torch.full((channels,), -0.25)
    affine = x86.Affine(gain.data_ptr(), shift.data_ptr(), 1)
    image = x86.Image(1, 1, 997, channels, 0, 0, x86.round_up(channels, 4))
    exact = F.silu(x.double() * 0.5 - 0.25)
    qparams = chosen_range(x, image, affine)
    reference = activation_qparams(exact.amin(), exact.amax(), 8)
    assert qparams.scale == pytest.approx(reference.scale.item(), rel=1e-6)
    assert qparams.zero_point == reference.zero_point
    for scale, zero_point in ((qparams.scale, qparams.zero_point), (0.003, 100)):  # the second one clips
        codes = torch.empty(image.code_bytes(), dtype=torch.uint8)
        x86.compiled().quantize(x.data_ptr(), image, affine, 1 / scale, zero_point, 255, 0, codes.data_ptr())
        rows = codes.view(997, -1)[:, :channels].double()
        real = (exact.permute(0, 2, 3, 1).reshape(997, channels) / scale + zero_point).clamp(0, 255)
        assert (rows - real).abs().max() <= 0.5 + 1e-3


@needs_x86
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_range(bad: float) -> None:
    x = channels_last(1, 8, 3, 3)
    x[0, 5, 1, 1] = bad
    image = x86.Image(1, 3, 3, 8, 0, 0, 8)
    gain, shift = torch.ones(8), torch.zeros(8)
    addresses = gain.data_ptr(), shift.data_ptr()
    for affine in (x86.Affine(), x86.Affine(*addresses), x86.Affine(*addresses, 1)):
        assert not np.isfinite(chosen_range(x, image, affine).scale)


@needs_x86
@torch.no_grad()
@pytest.mark.parametrize("static", [True, False], ids=["static", "dynamic"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_convolution_of_it_is_that_of_its_values(pending: PendingActivation, bits: int, static: bool) -> None:
    layer = PQCADConv2d(16, 8, 3, padding=1, stride=2).requires_grad_(False)
    layer.pack_(WeightSpec(bits), activation_bits=8)
    if static:
        groups = TimestepGroups([])
        groups.select(torch.tensor(0))
        qparams = activation_qparams(torch.tensor([-0.3]), torch.tensor([4.0]), 8)
        layer.set_input_qparams_(qparams, groups)
    with kernels.use("x86"):
        output = layer(pending)
        assert pending.computed is None  # taken apart
        values = layer(expected(pending))
    # Values differ in the seventh digit, so a code may differ at a tie: by a step of the range times a level.
    step = layer.weight_scale.max() * layer.spec.level_max * (5.0 / 255)
    assert (output - values).abs().max() <= 2 * step
    assert (output - values).abs().mean() <= 1e-3 * values.abs().mean()
    for name in ("onednn", "reference"):
        if layer.refusal(name) is None:
            with kernels.use(name):
                assert torch.equal(layer(pending), layer(pending.value()))


# ---- models


def fusing_model(**settings) -> UNet2DModel:
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **settings,
    ).eval()
    return quantize_(model, PQCADConfig(method="fixed", weight_bits=4))


def waiting(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if type(module) in AT_ONCE]


@pytest.fixture
def fused() -> UNet2DModel:
    model = fusing_model()
    if not waiting(model):
        pytest.skip("no kernel fuses on this computer")
    return model


@torch.no_grad()
def test_a_model_computes_the_same_in_one_pass(fused: UNet2DModel) -> None:
    assert "mid_block.resnets.0.norm1" in waiting(fused)
    assert "mid_block.resnets.0.nonlinearity" in waiting(fused)
    assert "conv_norm_out" not in waiting(fused)  # before a float layer
    x = torch.randn(2, 1, 8, 8)
    seen: list[bool] = []
    for layer in packed_layers(fused).values():
        layer.register_forward_pre_hook(lambda layer, args: seen.append(isinstance(args[0], PendingActivation)))
    actual = fused(x, 5).sample
    residual_blocks = len([name for name in waiting(fused) if name.endswith("nonlinearity")])
    assert sum(seen) == 2 * residual_blocks
    remove_pending_(fused)
    assert waiting(fused) == []
    plain = fused(x, 5).sample
    assert (
        actual - plain
    ).abs().max() <= 5e-2 * plain.abs().max()  # codes at ties: up to 3.6e-2 with 200 other inputs


def test_dequantizing_and_copies(fused: UNet2DModel) -> None:
    assert waiting(copy.deepcopy(fused)) == waiting(fused)
    names = {name: type(module) for name, module in fused.dequantize().named_modules()}
    assert waiting(fused) == []
    assert names["mid_block.resnets.0.norm1"] is nn.GroupNorm
    assert names["mid_block.resnets.0.nonlinearity"] is nn.SiLU


def test_a_method_that_a_hook_kept_is_that_of_the_plain_module(fused: UNet2DModel) -> None:
    """Such as `_old_forward` of accelerate's hooks, after `dequantize()`."""
    modules = [module for module in fused.modules() if type(module) in (PendingGroupNorm, PendingSiLU)]
    kept = [(module, module.forward) for module in modules]
    remove_pending_(fused)
    for module, forward in kept:
        x = torch.randn(2, getattr(module, "num_channels", 4), 5, 6).contiguous(memory_format=torch.channels_last)
        output = forward(x)
        assert type(output) is Tensor
        assert torch.equal(output, module(x))


@torch.no_grad()
@pytest.mark.parametrize(
    "settings",
    [{"resnet_time_scale_shift": "scale_shift"}, {"downsample_type": "resnet", "upsample_type": "resnet"}],
    ids=["scale_shift", "resnet"],
)
def test_blocks_with_more_between_norm_and_convolution(fused: UNet2DModel, settings) -> None:
    model = fusing_model(**settings)
    assert ("mid_block.resnets.0.norm2" in waiting(model)) == ("resnet_time_scale_shift" not in settings)
    x = torch.randn(2, 1, 8, 8)
    actual = model(x, 5).sample
    remove_pending_(model)
    plain = model(x, 5).sample
    assert (actual - plain).abs().max() <= 2e-2 * plain.abs().max()


@torch.no_grad()
def test_hooks_on_norms_see_values_and_may_change_them(fused: UNet2DModel) -> None:
    """A hook's own result is a plain tensor, and the block goes on with that."""
    x = torch.randn(2, 1, 8, 8)
    handle = fused.mid_block.resnets[0].norm1.register_forward_hook(lambda module, args, output: output * 0)
    actual = fused(x, 5).sample
    remove_pending_(fused)
    assert (actual - fused(x, 5).sample).abs().max() <= 2e-2 * actual.abs().max()
    handle.remove()
    assert (actual - fused(x, 5).sample).abs().max() > 1e-3


@torch.no_grad()
def test_an_adapter_beside_the_convolution_sees_the_values(fused: UNet2DModel) -> None:
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False), fused)
    x = torch.randn(2, 1, 8, 8)
    actual = fused(x, 5).sample
    remove_pending_(fused)
    plain = fused(x, 5).sample
    assert (actual - plain).abs().max() <= 2e-2 * plain.abs().max()


@torch.no_grad()
def test_a_norm_waits_for_the_convolution_into_a_transformer(fused: UNet2DModel) -> None:
    model = quantize_(families.sd15().eval(), PQCADConfig(method="fixed", weight_bits=8))
    assert "mid_block.attentions.0.norm" in waiting(model)
    args = (families.noise(2, 4, families.SIZE, families.SIZE), 5, families.noise(2, 3, 8))
    seen: list[Tensor] = []
    model.mid_block.attentions[0].proj_in.register_forward_pre_hook(lambda layer, args: seen.append(args[0]))
    actual = model(*args).sample
    assert isinstance(seen[0], PendingActivation)
    assert seen[0].computed is None  # taken apart
    remove_pending_(model)
    plain = model(*args).sample
    assert type(seen[1]) is Tensor
    assert (actual - plain).abs().max() <= 2e-2 * plain.abs().max()
    model = quantize_(families.sd2().eval(), PQCADConfig(method="fixed", weight_bits=8))
    assert "mid_block.attentions.0.norm" not in waiting(model)  # its projection sees it reshaped


def test_only_blocks_of_the_given_convolutions_wait() -> None:
    model = fusing_model()
    remove_pending_(model)
    block = model.mid_block.resnets[0]
    install_pending_(model, {block.conv2})
    assert waiting(model) == ["mid_block.resnets.0.norm2", "mid_block.resnets.0.nonlinearity"]


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.no_grad()
def test_a_traced_model_has_no_constant_in_the_place_of_a_layer(fused: UNet2DModel) -> None:
    """`torch.jit.trace` sees operators only: what a kernel wrote to memory would be a constant to it."""
    layer = fused.mid_block.resnets[0].conv1
    shape = (2, layer.in_channels, 4, 4)
    traced = torch.jit.trace(layer, torch.randn(shape), check_trace=False)
    x = torch.randn(shape)
    with kernels.use("reference"):
        torch.testing.assert_close(traced(x), layer(x))
