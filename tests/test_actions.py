"""What people do with a diffusers model after loading it, on every family, when it is quantized.

Each test is one cell, or a row of cells, of the table in examples/results/actions.md, which
`python examples/results/update_actions.py` writes from the outcomes. "Refused" actions raise, with a reason.
"""

import copy
import json
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import accelerate
import diffusers.models.modeling_utils as modeling
import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    AutoModel,
    ControlNetModel,
    DDIMPipeline,
    DDIMScheduler,
    DiTPipeline,
    FluxControlNetModel,
    MotionAdapter,
    SD3ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNetMotionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from diffusers.models.modeling_utils import get_parameter_dtype
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.training_utils import EMAModel
from families import FAMILIES, SIZE, build, call, inputs_of, noise, output_of, text
from forks import in_fork_of
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from diffusers_pqcad import PQCADConfig, inspect, kernels, quantize_, requantize_
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.quantized import PQCADConv2d, PQCADLinear
from diffusers_pqcad.layers.timesteps import install_timestep_groups
from diffusers_pqcad.loading.convert import finish_, mark_quantized_
from diffusers_pqcad.loading.coverage import coverage
from diffusers_pqcad.numerics.qparams import ActivationQParams, dynamic_activation_qparams
from diffusers_pqcad.runtime.fusion import remove_fused_

CORE = ("UNet2DModel", "SD-1.5 UNet", "DiT")
DENOISERS = tuple(name for name, family in FAMILIES.items() if family.has_timestep)
FUSABLE = ("SD-1.5 UNet", "SD-2 UNet", "SDXL UNet", "ControlNet", "AutoencoderKL", "PixArt", "SD3", "Flux")
NO_AUTO = ("UNet2DModel", "ControlNet", "DiT")  # their classes name no modules that must stay whole
REPEATED_BLOCKS = ("SD-1.5 UNet", "SD-2 UNet", "SDXL UNet", "Flux")
SINGLE_FILE = ("SD-1.5 UNet", "SDXL UNet", "ControlNet", "AutoencoderKL", "SD3", "Flux")
WEIGHTS = "diffusion_pytorch_model.safetensors"
W4 = PQCADConfig(weight_bits=4)
W8 = PQCADConfig(method="fixed", weight_bits=8)


def action(
    label: str, families: Iterable[str] = FAMILIES, *, refused: bool = False, quick: Iterable[str] | None = None
) -> Callable:
    """Mark a test as the action `label`, run for each of `families`; those that are not `quick` are slow tests."""

    def decorate(test: Any) -> Any:
        slow = set() if quick is None else set(families) - set(quick)
        cells = [pytest.param(family, marks=[pytest.mark.slow] if family in slow else []) for family in families]
        return pytest.mark.action(label, refused=refused)(pytest.mark.parametrize("family", cells)(test))

    return decorate


def quantized(family: str, config: PQCADConfig = W4) -> Any:
    return quantize_(build(family), config)


def with_static_ranges(model: Any, family: str, boundaries: tuple[int, ...] = (500,)) -> Any:
    """Give a quantized `model` static ranges, each group's observed at a timestep of its own."""
    layers = packed_layers(model)
    ranges: dict[str, list[ActivationQParams]] = {name: [] for name in layers}

    def observe(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        ranges[layer.name].append(dynamic_activation_qparams(args[0], 8))

    hooks = [layer.register_forward_pre_hook(observe) for layer in layers.values()]
    counts = []
    for timestep in (10, 900)[: len(boundaries) + 1]:
        call(model, family, timestep=timestep)
        counts.append({name: len(found) for name, found in ranges.items()})
    for hook in hooks:
        hook.remove()
    config = copy.deepcopy(model.config["quantization_config"])
    config.timestep_boundaries = list(boundaries)
    groups = install_timestep_groups(model, config.timestep_boundaries)
    for name, layer in layers.items():
        chosen = [ranges[name][count[name] - 1] for count in counts]
        scale, zero_point = (torch.stack(list(values)) for values in zip(*chosen, strict=True))
        layer.set_input_qparams_(ActivationQParams(scale, zero_point), groups)
    finish_(model, config)
    mark_quantized_(model, config)
    return model


@pytest.fixture
def float_dir(family: str, tmp_path: Path) -> Path:
    build(family).save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def quantized_dir(family: str, tmp_path: Path) -> Path:
    quantized(family).save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


def load(family: str, directory: Path, config: Any = None, **options: Any) -> Any:
    return type(FAMILIES[family].build()).from_pretrained(directory, quantization_config=config, **options)


def assert_same_tensors(actual: Any, expected: Any) -> None:
    actual, expected = actual.state_dict(), expected.state_dict()
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_same_model(actual: Any, expected: Any, family: str) -> None:
    assert packed_layers(expected)
    assert_same_tensors(actual, expected)
    dtype = next(expected.parameters()).dtype
    torch.testing.assert_close(call(actual, family, dtype=dtype), call(expected, family, dtype=dtype))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


# ---- quantizing


@action("quantize_(model)")
def test_eight_bits_are_close_to_full_precision(family: str) -> None:
    model = build(family)
    expected = call(model, family)
    quantize_(model, W8)
    kinds = {type(layer) for layer in packed_layers(model).values()}
    assert kinds == ({PQCADLinear, PQCADConv2d} if FAMILIES[family].has_convs else {PQCADLinear})
    error = relative_error(call(model, family), expected)
    assert 0 < error < 0.1
    assert relative_error(call(quantized(family), family), expected) > error


@action("first and last layers stay in floating point")
def test_exempt_layers(family: str) -> None:
    """The exempt layers are few weights: what enters or leaves the model, the time embedding, the last shortcuts."""
    rows = inspect(quantized(family))
    floats = {row.name for row in rows if row.kernel is None}
    leaves = {
        "UNet2DModel": {"conv_in", "conv_out"},
        "SD-1.5 UNet": {"conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"},
        "SDXL UNet": {"conv_in", "conv_out", "add_embedding.linear_1", "time_embedding.linear_2"},
        "ControlNet": {"conv_in", "controlnet_mid_block", "controlnet_down_blocks.0"},
        "AutoencoderKL": {"encoder.conv_in", "encoder.conv_out", "decoder.conv_in", "decoder.conv_out", "quant_conv"},
        "DiT": {"pos_embed.proj", "proj_out_1", "proj_out_2"},
        "PixArt": {"pos_embed.proj", "proj_out", "adaln_single.linear", "caption_projection.linear_1"},
        "SD3": {"pos_embed.proj", "proj_out", "norm_out.linear", "context_embedder"},
        "Flux": {"x_embedder", "context_embedder", "proj_out", "norm_out.linear"},
    }.get(family, {"conv_in", "conv_out"})  # fmt: skip
    assert leaves <= floats
    inner = ("attentions", "resnets", "blocks.", "transformer_blocks", "attn")
    kept = {
        name
        for name in floats
        if any(f".{part}" in f".{name}" for part in inner) and not name.startswith("controlnet_")
    }
    last = {"up_blocks.1.resnets.0.conv_shortcut", "up_blocks.1.resnets.1.conv_shortcut"}
    assert kept == (last if "UNet" in family else set())


@action("inspect(model)")
def test_inspect(family: str) -> None:
    from peft import inject_adapter_in_model

    model = quantized(family, PQCADConfig(weight_bits=4, group_size=4))
    rows = inspect(model)
    layers = packed_layers(model)
    assert {row.name for row in rows if row.kernel} == set(layers)
    for row in rows:
        if row.name not in layers:
            assert (row.bits, row.activations, row.perturbation) == (32, "float", None)
            continue
        layer = layers[row.name]
        assert row.shape == tuple(layer.weight_shape)
        assert (row.bits, row.kernel) == (layer.spec.bits, layer.kernel_name())
        assert row.group_size == (4 if isinstance(layer, PQCADLinear) else None)
        assert row.activations == "8-bit dynamic"
    inject_adapter_in_model(lora(family), model)
    rows_with_adapters = inspect(model, reference=build(family))
    measured = {row.name.removesuffix(".base_layer"): row.perturbation for row in rows_with_adapters if row.kernel}
    assert measured == pytest.approx({row.name: row.perturbation for row in rows if row.kernel}, rel=1e-4)
    assert str(rows).count("\n") == len(rows) + 1


# ---- loading


@action("from_pretrained(quantization_config=PQCADConfig())")
def test_from_pretrained(family: str, float_dir: Path) -> None:
    assert_same_model(load(family, float_dir, W4), quantized(family), family)


@action("... a dict")
def test_from_pretrained_dict(family: str, float_dir: Path) -> None:
    config = {"quant_method": "pqcad", "weight_bits": 4}
    assert_same_model(load(family, float_dir, config), quantized(family), family)


@action("AutoModel")
def test_auto_model(family: str, float_dir: Path, quantized_dir: Path) -> None:
    expected = quantized(family)
    assert_same_model(AutoModel.from_pretrained(str(float_dir), quantization_config=W4), expected, family)
    assert_same_model(AutoModel.from_pretrained(str(quantized_dir)), expected, family)


def check_dtype(family: str, directory: Path, dtype: torch.dtype) -> None:
    model = load(family, directory, W8, torch_dtype=dtype)
    floats = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    kept = getattr(model, "_keep_in_fp32_modules", None) or []
    for name, found in floats.items():
        in_fp32 = name.endswith("weight_scale") or not set(kept).isdisjoint(name.split("."))
        assert found == (torch.float32 if in_fp32 else dtype), name
    output = call(model, family, dtype=dtype)
    assert output.dtype == dtype
    assert relative_error(output, call(build(family), family)) < 0.1


@action("torch_dtype=bfloat16")
def test_bf16(family: str, float_dir: Path) -> None:
    check_dtype(family, float_dir, torch.bfloat16)


@action("torch_dtype=float16", [name for name in FAMILIES if name != "Flux"])  # overflows, in floating point as well
def test_fp16(family: str, float_dir: Path) -> None:
    check_dtype(family, float_dir, torch.float16)


@action("a layer without bias names its compute dtype (trap 23)")
def test_trap_23_the_dtype_of_a_layer_is_the_compute_dtype(family: str, float_dir: Path) -> None:
    model = load(family, float_dir, W4, torch_dtype=torch.bfloat16)
    for name, layer in packed_layers(model).items():
        layer.bias = None
        assert get_parameter_dtype(layer) == torch.bfloat16, name
    assert not any("dtype_marker" in name for name in model.state_dict())


@action("variant, subfolder, use_safetensors=False")
def test_other_places_and_formats(family: str, tmp_path: Path) -> None:
    model = quantized(family)
    model.save_pretrained(tmp_path / "part", variant="w4")
    assert_same_model(load(family, tmp_path, subfolder="part", variant="w4"), model, family)
    model.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert_same_model(load(family, tmp_path / "bin", use_safetensors=False), model, family)
    build(family).save_pretrained(tmp_path / "float-bin", safe_serialization=False)
    assert_same_model(load(family, tmp_path / "float-bin", W4, use_safetensors=False), model, family)
    build(family).save_pretrained(tmp_path / "float" / "part", variant="fp32")
    assert_same_model(load(family, tmp_path / "float", W4, subfolder="part", variant="fp32"), model, family)


@action('device_map="cpu"')
def test_device_map_cpu(family: str, float_dir: Path, quantized_dir: Path) -> None:
    expected = quantized(family)
    assert_same_model(load(family, float_dir, W4, device_map="cpu"), expected, family)
    assert_same_model(load(family, quantized_dir, device_map="cpu"), expected, family)


@action('device_map="auto"', [name for name in FAMILIES if name not in NO_AUTO])
def test_device_map_auto(family: str, float_dir: Path, quantized_dir: Path) -> None:
    expected = quantized(family)
    assert_same_model(load(family, float_dir, W4, device_map="auto"), expected, family)
    assert_same_model(load(family, quantized_dir, device_map="auto"), expected, family)


@action('device_map="auto"', NO_AUTO, refused=True)
def test_trap_24_auto_is_refused_by_diffusers(family: str, float_dir: Path) -> None:
    for config in (None, W4):  # quantized or not
        with pytest.raises(ValueError, match="does not support `device_map='auto'`"):
            load(family, float_dir, config, device_map="auto")


@action("device_map onto the disk (trap 22)", refused=True)
def test_trap_22_disk(family: str, float_dir: Path, quantized_dir: Path, tmp_path: Path) -> None:
    for directory, config in ((float_dir, W4), (quantized_dir, None)):
        with pytest.raises(ValueError, match="device_map: a PQCAD model cannot be offloaded to disk"):
            load(family, directory, config, device_map={"": "disk"}, offload_folder=tmp_path / "offload")


@action("sharded checkpoints (16 KB), also in parallel")
def test_shards(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = quantized(family)
    build(family).save_pretrained(tmp_path / "float", max_shard_size="16KB")
    expected.save_pretrained(tmp_path / "quantized", max_shard_size="4KB")
    for directory in ("float", "quantized"):
        assert len(list((tmp_path / directory).glob("*.safetensors"))) > 1
    for parallel in (False, True):
        monkeypatch.setattr(modeling, "HF_ENABLE_PARALLEL_LOADING", parallel)
        assert_same_model(load(family, tmp_path / "float", W4), expected, family)
        assert_same_model(load(family, tmp_path / "quantized"), expected, family)


@action("fork after loading", CORE)
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks on this system")
def test_a_process_forked_after_loading_computes(family, float_dir):
    """As workers of a server that loads the model first, and of data loaders."""

    def parent() -> Callable[[], Tensor]:
        model = load(family, float_dir, W4)
        return lambda: call(model, family)

    torch.testing.assert_close(*in_fork_of(parent))


@action("from_single_file", SINGLE_FILE)
def test_single_file(family: str, float_dir: Path) -> None:
    model = type(build(family)).from_single_file(
        str(float_dir / WEIGHTS), config=str(float_dir), quantization_config=W4
    )
    assert_same_model(model, quantized(family), family)
    assert model.is_quantized
    model.save_pretrained(float_dir / "again")
    assert_same_model(load(family, float_dir / "again"), model, family)


# ---- saving


@action("save_pretrained, reload")
def test_save(family: str, tmp_path: Path) -> None:
    model = quantized(family)
    if FAMILIES[family].has_timestep:
        with_static_ranges(model, family)
    model.save_pretrained(tmp_path)
    loaded = load(family, tmp_path)
    assert_same_model(loaded, model, family)
    assert loaded.config["quantization_config"] == PQCADConfig.from_dict(
        json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    )
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["format_version"] == 2


@action("... in bf16, with fp32 scales")
def test_save_bf16(family: str, quantized_dir: Path, tmp_path: Path) -> None:
    before = load_file(quantized_dir / WEIGHTS)
    load(family, quantized_dir, torch_dtype=torch.bfloat16).save_pretrained(tmp_path / "bf16")
    after = load_file(tmp_path / "bf16" / WEIGHTS)
    for name, tensor in before.items():
        if name.endswith("weight_scale"):
            assert after[name].dtype == torch.float32
            assert torch.equal(after[name], tensor)


@action("dequantize(), save, reload")
def test_dequantize(family: str, tmp_path: Path) -> None:
    model = quantized(family)
    for layer in packed_layers(model).values():
        layer.activation_bits = None  # so that the float model computes the same
    expected = call(model, family)
    model.dequantize()
    torch.testing.assert_close(call(model, family), expected)
    model.save_pretrained(tmp_path)
    loaded = load(family, tmp_path)
    assert not packed_layers(loaded)
    assert not getattr(loaded, "is_quantized", False)
    assert_same_tensors(loaded, model)
    loaded.to(torch.float16)
    assert "enable_layerwise_casting" not in vars(loaded)


@action("a float student by from_config (trap 7)")
def test_trap_07_student(family: str, tmp_path: Path) -> None:
    teacher = quantized(family)
    config = {key: value for key, value in teacher.config.items() if key != "quantization_config"}
    student = type(teacher).from_config(config)
    student.save_pretrained(tmp_path)
    assert not packed_layers(load(family, tmp_path))
    student = type(teacher).from_config(teacher.config)
    student.save_pretrained(tmp_path / "inherited")
    with pytest.warns(UserWarning, match=r"the config holds a quantization_config, but .* in floating point"):
        loaded = load(family, tmp_path / "inherited")
    assert_same_tensors(loaded, student)
    assert "quantization_config" not in loaded.config


def controlnet_of(model: Any, family: str) -> Any:
    """Return the ControlNet of the first layers of `model`; what is new in it is the same each time."""
    torch.manual_seed(0)
    if family == "SD3":
        return SD3ControlNetModel.from_transformer(model, num_layers=1)
    if family == "Flux":
        sizes = {"attention_head_dim": 8, "num_attention_heads": 2}
        return FluxControlNetModel.from_transformer(model, num_layers=1, num_single_layers=1, **sizes)
    return ControlNetModel.from_unet(model, conditioning_embedding_out_channels=(4, 8))


@action("ControlNet from a quantized model", ("SD-1.5 UNet", "SD-2 UNet", "SDXL UNet", "SD3", "Flux"))
@pytest.mark.filterwarnings("ignore:.*the config holds a quantization_config")
def test_controlnet_from_a_quantized_model(family: str, tmp_path: Path) -> None:
    """It starts from the dequantized weights, and stays a float model when it is saved and loaded."""
    model = quantized(family, W8)
    controlnet = controlnet_of(model, family)
    assert_same_tensors(controlnet, controlnet_of(copy.deepcopy(model).dequantize(), family))
    floats = controlnet_of(build(family), family).state_dict()
    compared = [name for name in controlnet.state_dict() if f"{name.removesuffix('.weight')}" in packed_layers(model)]
    assert compared
    for name in compared:
        assert 0 < relative_error(controlnet.state_dict()[name], floats[name]) < 0.01
    controlnet.save_pretrained(tmp_path)
    loaded = type(controlnet).from_pretrained(tmp_path)
    assert_same_tensors(loaded, controlnet)
    assert not packed_layers(loaded)


@action("a W4 config for a W8 checkpoint: the checkpoint wins, with one warning")
def test_trap_25_the_checkpoint_wins(family: str, tmp_path: Path) -> None:
    model = quantized(family, W8)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = load(family, tmp_path, W4)
    assert sum("The `quantization_config` from the model will be used" in str(item.message) for item in caught) == 1
    assert_same_model(loaded, model, family)


@action("fewer bits for a loaded model: requantize_(model, ...)")
def test_lower_bits(family: str, tmp_path: Path) -> None:
    quantized(family, W8).save_pretrained(tmp_path)
    model = load(family, tmp_path)
    with pytest.raises(ValueError, match=r"quantized already. requantize_\(\) changes its bits"):
        quantize_(model, W4)
    expected = quantize_(load(family, tmp_path).dequantize(), W4)
    assert_same_model(requantize_(model, W4), expected, family)
    model.save_pretrained(tmp_path / "again")
    assert_same_model(load(family, tmp_path / "again"), expected, family)


@action("a checkpoint of a newer format", CORE, refused=True)
def test_newer_format(family: str, quantized_dir: Path) -> None:
    path = quantized_dir / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= {"format_version": 3, "a_new_key": 1}
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="format_version 3 is newer than this package can read"):
        load(family, quantized_dir)


# ---- bookkeeping


@action("num_parameters(), get_memory_footprint()")
def test_bookkeeping(family: str, quantized_dir: Path) -> None:
    plain, model = build(family), load(family, quantized_dir)
    assert model.num_parameters() == plain.num_parameters()
    stored = sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in load_file(quantized_dir / WEIGHTS).items()
        if not name.endswith(".checksum")  # compared, and dropped
    )
    extra = sum(  # what diffusers does not save, of the float model too
        buffer.numel() * buffer.element_size()
        for name, buffer in plain.named_buffers()
        if name not in plain.state_dict()
    )
    assert model.get_memory_footprint() == stored + extra
    assert model.get_memory_footprint() < plain.get_memory_footprint() * 0.75


@action("print(model) shows bits and kernel")
def test_repr(family: str) -> None:
    model = (
        with_static_ranges(quantized(family, W8), family) if FAMILIES[family].has_timestep else quantized(family, W8)
    )
    scheme = "static x2" if FAMILIES[family].has_timestep else "dynamic"
    kernel = next(iter(packed_layers(model).values())).kernel_name()
    assert f"bits=8, activations=8-bit {scheme}, kernel={kernel}" in repr(model)


@action("copy.deepcopy")
def test_deepcopy(family: str) -> None:
    model = quantized(family)
    expected = call(model, family)
    copied = copy.deepcopy(model)
    del model
    assert torch.equal(call(copied, family), expected)
    assert copied.num_parameters() == build(family).num_parameters()
    copied.dequantize()


@action("pickle of the config and of the model")
def test_pickle(family: str) -> None:
    model = quantized(family)
    config = model.config["quantization_config"]
    assert pickle.loads(pickle.dumps(config)) == config
    assert_same_model(pickle.loads(pickle.dumps(model)), model, family)


@action("torch.inference_mode")
def test_inference_mode(family: str) -> None:
    model = quantized(family)
    expected = call(model, family)
    model = quantized(family)  # without what the first call has cached
    with torch.inference_mode():
        assert torch.equal(output_of(model, inputs_of(family)), expected)
    assert torch.equal(call(model, family), expected)


CASTS: dict[str, tuple[Callable[[Any], Any], torch.dtype]] = {
    "to(dtype)": (lambda model: model.to(torch.bfloat16), torch.bfloat16),
    "half": (lambda model: model.half(), torch.float16),
    "float": (lambda model: model.float(), torch.float32),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16),
    "to(device, dtype)": (lambda model: model.to("cpu", torch.float32), torch.float32),
    "to(device=, dtype=)": (lambda model: model.to(device="cpu", dtype=torch.float64), torch.float64),
    "to(tensor)": (lambda model: model.to(torch.empty(0, dtype=torch.float16)), torch.float16),
    "to(device=, dtype=None)": (lambda model: model.to(device="cpu", dtype=None), torch.float16),
    "to(None, dtype)": (lambda model: model.to(None, torch.float32), torch.float32),  # as a pipeline does
}


@action(".to(dtype), .half(), .float(), .bfloat16() (trap 13)")
def test_trap_13_casts(family: str) -> None:
    plain, model = build(family), quantized(family, W8)
    packed = {name: value.clone() for name, value in model.state_dict().items() if name not in plain.state_dict()}
    exact = call(plain, family)
    for name, (cast, dtype) in CASTS.items():
        assert cast(model) is model
        cast(plain)
        assert model.dtype == plain.dtype == dtype, name
        assert model.is_quantized
        floats = plain.state_dict()
        for key, tensor in model.state_dict().items():
            expected = floats[key] if key not in packed else packed[key]
            assert tensor.dtype == expected.dtype, (name, key)
            assert torch.equal(tensor, expected), (name, key)
        assert {layer.weight_dtype for layer in packed_layers(model).values()} == {dtype}
        buffers = {key: value for key, value in plain.named_buffers() if key not in floats}
        extra = sum(value.numel() * value.element_size() for value in buffers.values())
        stored = sum(
            value.numel() * value.element_size()
            for key, value in model.state_dict().items()
            if not key.endswith(".checksum")  # made for each state dict
        )
        assert model.get_memory_footprint() == stored + extra
        if call(plain, family, dtype=dtype).isfinite().all():  # Flux overflows in fp16
            output = call(model, family, dtype=dtype)
            assert output.dtype == dtype
            assert relative_error(output, exact) < 0.1, name
    for kind in (torch.int8, torch.uint8):
        with pytest.raises(TypeError, match="floating point or complex dtypes"):
            model.to(kind)


@action("a cast, save_pretrained, reload")
def test_a_model_that_was_cast_is_saved_and_loaded(family: str, tmp_path: Path) -> None:
    plain, model = build(family).to(torch.bfloat16), quantized(family).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "quantized")
    plain.save_pretrained(tmp_path / "float")
    loaded = load(family, tmp_path / "quantized", torch_dtype=torch.bfloat16)
    assert_same_tensors(loaded, model)
    # A cast also rounds what is not saved, such as the position embeddings of DiT, where a loader computes it anew.
    assert_same_model(loaded.to(torch.bfloat16), model, family)
    again = load(family, tmp_path / "quantized")
    assert again.dtype == load(family, tmp_path / "float").dtype
    assert_same_tensors(again, model.to(again.dtype))


# ---- training and adapters


def lora(family: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=2, target_modules=list(FAMILIES[family].lora_targets), init_lora_weights=False, **options)


def adapters(model: Any) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


def adapted(family: str, config: PQCADConfig = W4) -> Any:
    torch.manual_seed(2)
    model = quantized(family, config).requires_grad_(False)
    model.add_adapter(lora(family))
    return model


NO_ADAPTER_METHODS = ("UNet2DModel", "ControlNet", "DiT", "PixArt")  # peft alone can adapt these classes
ADAPTABLE = tuple(name for name in FAMILIES if name not in NO_ADAPTER_METHODS)


@action("LoRA: load, train")
def test_lora_trains(family: str) -> None:
    from peft import inject_adapter_in_model

    model = quantized(family).requires_grad_(False)
    expected = call(model, family)
    inject_adapter_in_model(lora(family), model)
    assert {parameter.dim() for parameter in adapters(model).values()} == (
        {2, 4} if FAMILIES[family].has_convs else {2}
    )
    assert relative_error(call(model, family), expected) > 1e-3
    optimizer, losses = torch.optim.Adam(adapters(model).values(), lr=1e-3), []
    for _ in range(3):
        loss = (output_of(model, inputs_of(family)) - expected).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in adapters(model).values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


@action("... under autocast")
def test_lora_autocast(family: str) -> None:
    from peft import inject_adapter_in_model

    model = quantized(family).requires_grad_(False)
    inject_adapter_in_model(lora(family), model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = output_of(model, inputs_of(family)).float().square().mean()
    loss.backward()
    assert all(
        parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any()
        for parameter in adapters(model).values()
    )


@action("... with gradient checkpointing")
def test_gradient_checkpointing(family: str) -> None:
    from peft import inject_adapter_in_model

    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        model = quantized(family).requires_grad_(False)
        inject_adapter_in_model(lora(family), model)
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.train()
        torch.manual_seed(3)
        output_of(model, inputs_of(family)).square().mean().backward()
        gradients.append({name: parameter.grad for name, parameter in adapters(model).items()})
    torch.testing.assert_close(*gradients)


@action("... of two calls at other timesteps, static ranges", DENOISERS, quick=CORE)
@pytest.mark.parametrize("enable_first", [False, True])
def test_gradient_checkpointing_of_two_timesteps(family: str, enable_first: bool) -> None:
    from peft import inject_adapter_in_model

    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(2)
        model = quantized(family).requires_grad_(False)
        if checkpointing and enable_first:
            model.enable_gradient_checkpointing()
        with_static_ranges(model, family)
        inject_adapter_in_model(lora(family), model)
        if checkpointing and not enable_first:
            model.enable_gradient_checkpointing()
        model.train()
        loss = sum(output_of(model, inputs_of(family, timestep=timestep)).square().mean() for timestep in (10, 900))
        loss.backward()
        gradients.append({name: parameter.grad for name, parameter in adapters(model).items()})
    torch.testing.assert_close(*gradients)
    model.dequantize()
    function = next(m._gradient_checkpointing_func for m in model.modules() if getattr(m, "gradient_checkpointing", 0))
    assert type(function).__module__ == "builtins"


@action("save_lora_adapter, load_lora_adapter (trap 14), unload_lora", ADAPTABLE)
def test_trap_14_adapters_are_saved(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    expected, trained = call(model, family), {name: value.clone() for name, value in adapters(model).items()}
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert_same_model(model, quantized(family), family)
    model.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert {name: value.tolist() for name, value in adapters(model).items()} == {
        name.replace("default", "default_0"): value.tolist() for name, value in trained.items()
    }
    torch.testing.assert_close(call(model, family), expected)


@action("save_pretrained with adapters on (trap 17)", ADAPTABLE, refused=True)
def test_trap_17_adapters_are_not_saved_with_the_model(family: str, tmp_path: Path) -> None:
    model = adapted(family)
    with pytest.raises(ValueError, match=r"carries adapters .* call unload_lora\(\)"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    model.unload_lora()
    model.save_pretrained(tmp_path)
    assert_same_model(load(family, tmp_path), quantized(family), family)


@action("fuse_lora below 8 bits (trap 15)", ADAPTABLE, refused=True)
def test_trap_15_fusing_is_refused(family: str) -> None:
    model = adapted(family)
    expected = call(model, family)
    for safe in (False, True):
        with pytest.raises(
            ValueError, match=r"merged into layers of 8 bits, and this one has \d .* call fuse_lora\(\)"
        ):
            model.fuse_lora(0.5, safe_fusing=safe)
    assert torch.equal(call(model, family), expected)  # the adapter still works


@action("fuse_lora of 8 bits, unfuse_lora, unload_lora, save_pretrained", ADAPTABLE)
def test_adapters_are_fused_into_8_bits(family: str, tmp_path: Path) -> None:
    model = adapted(family, W8)
    beside = call(model, family)
    model.fuse_lora()
    fused = call(model, family)
    assert 0 < relative_error(fused, beside) < 0.05
    model.unfuse_lora()
    assert torch.equal(call(model, family), beside)
    model.fuse_lora()
    model.unload_lora()
    assert relative_error(call(model, family), fused) < 0.05  # codes at ties, where blocks are computed at once
    model.save_pretrained(tmp_path)
    assert_same_model(load(family, tmp_path), model, family)


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@action("DistributedDataParallel of adapters (trap 28)", CORE)
def test_trap_28_distributed_training(family: str, process_group: None) -> None:
    """With `broadcast_buffers=False`: the packed weights are buffers, and would be sent in every forward."""
    from peft import inject_adapter_in_model

    model = quantized(family).requires_grad_(False)
    inject_adapter_in_model(lora(family), model)
    gradients = []
    for trained in (model, nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)):
        for parameter in adapters(model).values():
            parameter.grad = None
        output_of(trained, inputs_of(family)).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in adapters(model).items()})
    torch.testing.assert_close(*gradients)


@action("quantize_ and requantize_ with adapters on", CORE, refused=True)
def test_adapters_are_not_quantized(family: str) -> None:
    from peft import inject_adapter_in_model

    for model, function in ((build(family), quantize_), (quantized(family, W8), requantize_)):
        inject_adapter_in_model(lora(family), model)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match=r"carries adapters .* Unload them first"):
            function(model, W4)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@action("EMAModel of adapters", CORE)
def test_ema_of_adapters(family: str) -> None:
    from peft import inject_adapter_in_model

    model = quantized(family).requires_grad_(False)
    inject_adapter_in_model(lora(family), model)
    before = {name: value.clone() for name, value in adapters(model).items()}
    ema = EMAModel(adapters(model).values(), decay=0.5, use_ema_warmup=False)
    ema.step(adapters(model).values())
    with torch.no_grad():
        for value in adapters(model).values():
            value.add_(1.0)
    ema.copy_to(adapters(model).values())
    for name, value in adapters(model).items():
        torch.testing.assert_close(value, before[name])


@action("EMAModel(model.parameters()).save_pretrained (trap 20)", CORE, refused=True)
def test_trap_20_ema_of_a_packed_model_is_not_saved(family: str, tmp_path: Path) -> None:
    """There are no float weights to average: diffusers fails on the shapes, before a file is written."""
    model = quantized(family)
    ema = EMAModel(model.parameters(), model_cls=type(model), model_config=model.config)
    with pytest.raises((RuntimeError, IndexError), match="size|index|shape"):
        ema.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


# ---- switches of a model


@action("enable_layerwise_casting (trap 19)", refused=True)
def test_trap_19_layerwise_casting(family: str) -> None:
    model = quantized(family)
    with pytest.raises(ValueError, match="enable_layerwise_casting: the weights are packed"):
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert_same_model(model, quantized(family), family)


@action("fuse_qkv_projections (trap 18)", FUSABLE, refused=True)
def test_trap_18_fused_projections(family: str) -> None:
    model = quantized(family)
    before = model.get_memory_footprint()
    with pytest.raises(ValueError, match="fused projections would be float copies"):
        model.fuse_qkv_projections()
    assert model.get_memory_footprint() == before


@action("fuse_qkv_projections before quantize_", ("SD-1.5 UNet", "AutoencoderKL", "SD3"))
def test_fused_before_quantizing(family: str) -> None:
    model = build(family)
    model.fuse_qkv_projections()
    expected = call(model, family)
    quantize_(model, W8)
    assert any(name.endswith(("to_qkv", "to_kv", "to_added_qkv")) for name in packed_layers(model))
    assert relative_error(call(model, family), expected) < 0.1


@action("attention processors, set_attention_slice", ("SD-1.5 UNet", "SD-2 UNet", "SDXL UNet"))
def test_attention_processors(family: str) -> None:
    model = quantized(family, W8)
    model.set_attn_processor(AttnProcessor2_0())
    expected = call(model, family)
    model.set_attn_processor(AttnProcessor())
    # The last bits of sums decide some roundings, and products in bf16 those after the default processor's.
    assert relative_error(call(model, family), expected) < 0.04
    model.set_attention_slice("max")
    assert relative_error(call(model, family), expected) < 0.04


@action("a batch of several timesteps, static ranges", DENOISERS)
def test_mixed_timesteps(family: str) -> None:
    model = with_static_ranges(quantized(family), family)
    timesteps = torch.tensor([10, 900])
    with kernels.use("reference"):
        mixed = call(model, family, timestep=timesteps)
        for index, timestep in enumerate(timesteps.tolist()):
            alone = call(model, family, timestep=timestep)  # the whole batch at one of the two
            torch.testing.assert_close(mixed[index], alone[index])


@action("another resolution, static ranges", DENOISERS)
def test_other_resolution(family: str) -> None:
    model = with_static_ranges(quantized(family, W8), family)
    error = relative_error(call(model, family, size=2 * SIZE), call(build(family), family, size=2 * SIZE))
    assert error < 0.2  # ranges of the small images still fit


# ---- offload


def is_output(actual: Tensor, family: str) -> bool:
    """Whether `actual` is what the model gives, its residual blocks at once or, where hooks watch, module by module.

    The two round at other ties, and small random models make much of one code.
    """
    model = quantized(family)
    outputs = [call(model, family)]
    remove_fused_(model)
    outputs.append(call(model, family))
    assert relative_error(*outputs) < 0.1
    return any(torch.equal(actual, output) for output in outputs)


@action("group offload (CPU to CPU)", ["DiT"], refused=True)
def test_group_offload_is_refused_by_diffusers(family: str) -> None:
    for model in (build(family), quantized(family)):
        with pytest.raises(ValueError, match="does not support group offloading"):
            model.enable_group_offload(torch.device("cpu"))


@action("group offload (CPU to CPU)", [name for name in FAMILIES if name != "DiT"])
def test_group_offload(family: str) -> None:
    try:
        build(family).enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    except AttributeError:
        pytest.skip("this diffusers (0.40) looks for an accelerator first, for any model")
    for offload_type in ("block_level", "leaf_level"):
        model = quantized(family)
        model.enable_group_offload(
            onload_device=torch.device("cpu"), offload_type=offload_type,
            num_blocks_per_group=1 if offload_type == "block_level" else None,
        )  # fmt: skip
        assert is_output(call(model, family), family)


@action("sequential offload: correct, but packed weights stay on the device (trap 21)")
def test_trap_21_sequential_offload(family: str) -> None:
    model = quantized(family)
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=False)  # as a pipeline does
    layer = next(layer for layer in packed_layers(model).values() if layer.bias is not None)
    assert layer.bias.device.type == "meta"
    assert layer.qweight.device.type == "cpu"
    assert is_output(call(model, family), family)


@action("model offload, and buffers too with accelerate.cpu_offload(offload_buffers=True)")
def test_offload_with_buffers(family: str) -> None:
    model = quantized(family)
    accelerate.cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    assert {layer.qweight.device.type for layer in packed_layers(model).values()} == {"meta"}
    assert is_output(call(model, family), family)
    model = quantized(family)
    _, hook = accelerate.cpu_offload_with_hook(model, torch.device("cpu"))
    assert is_output(call(model, family), family)
    hook.offload()


# ---- torch.compile


@pytest.fixture
def compile_counter() -> Iterator[Any]:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    yield CompileCounter()
    torch._dynamo.reset()


@action("torch.compile(fullgraph=True), one graph for all timesteps", DENOISERS, quick=CORE)
def test_compile(family: str, compile_counter: Any) -> None:
    model = with_static_ranges(quantized(family), family)
    compiled, counts = torch.compile(model, backend=compile_counter, fullgraph=True), []
    for timestep in (10, 499, 500, 900):
        expected = call(model, family, timestep=timestep)
        torch.testing.assert_close(call(compiled, family, timestep=timestep), expected)
        counts.append(compile_counter.frame_count)
    assert set(counts) == {1}


@action("two threads, one model with static ranges; compiled, too", DENOISERS, quick=CORE)
def test_threads(family: str, compile_counter: Any) -> None:
    model = with_static_ranges(quantized(family), family)
    calls = [model, torch.compile(model, backend=compile_counter, fullgraph=True)]
    expected = {timestep: [call(function, family, timestep=timestep) for function in calls] for timestep in (10, 900)}
    barrier = Barrier(2)

    def work(timestep: int) -> None:
        for _ in range(5):
            for function, output in zip(calls, expected[timestep], strict=True):
                barrier.wait()
                assert torch.equal(call(function, family, timestep=timestep), output)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, expected))
    assert compile_counter.frame_count == 1


@action("... of dynamic ranges, and of another resolution (dynamic=True)", quick=("UNet2DModel", "DiT"))
def test_compile_dynamic(family: str, compile_counter: Any) -> None:
    model = quantized(family)
    compiled = torch.compile(model, backend=compile_counter, fullgraph=True, dynamic=True)
    for size in (SIZE, 2 * SIZE):
        torch.testing.assert_close(call(compiled, family, size=size), call(model, family, size=size))


@action("compile_repeated_blocks", REPEATED_BLOCKS)
def test_compile_repeated_blocks(family: str, compile_counter: Any) -> None:
    model = with_static_ranges(quantized(family), family)
    expected = {timestep: call(model, family, timestep=timestep) for timestep in (10, 900)}
    model.compile_repeated_blocks(backend=compile_counter, fullgraph=True)
    counts = []
    for timestep, output in expected.items():
        torch.testing.assert_close(call(model, family, timestep=timestep), output)
        counts.append(compile_counter.frame_count)
    assert counts[0] == counts[1] > 0


@action("compile_repeated_blocks", [name for name in FAMILIES if name not in REPEATED_BLOCKS], refused=True)
def test_blocks_that_are_not_named_are_refused_by_diffusers(family: str) -> None:
    for model in (build(family), quantized(family)):
        with pytest.raises(ValueError, match="`_repeated_blocks` attribute is empty"):
            model.compile_repeated_blocks()


@action("training adapters in a compiled model", CORE, quick=["DiT"])
def test_compile_training(family: str, compile_counter: Any) -> None:
    from peft import inject_adapter_in_model

    model = quantized(family).requires_grad_(False)
    inject_adapter_in_model(lora(family), model)
    gradients = []
    for trained in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        for parameter in adapters(model).values():
            parameter.grad = None
        output_of(trained, inputs_of(family)).square().mean().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in adapters(model).items()})
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)


# ---- export: a graph of dequantize and float operations, as the reference kernel computes


class Positional(nn.Module):
    """A model that exporters can call: tensors by position, and one of them as output."""

    def __init__(self, model: Any, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *args: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, args, strict=True)), return_dict=False)[0]


def exportable(family: str, config: PQCADConfig) -> tuple[nn.Module, tuple[Tensor, ...], tuple[Tensor, ...], Tensor]:
    """Return a model of static ranges, inputs to trace it with, others in another group, and its output for those."""
    model = with_static_ranges(quantized(family, config), family)
    inputs, others = (
        {name: value for name, value in inputs_of(family, timestep=timestep).items() if isinstance(value, Tensor)}
        for timestep in (10, 900)
    )
    wrapped = Positional(model, list(inputs)).eval()
    with torch.no_grad(), kernels.use("reference"):
        expected = wrapped(*others.values())
        assert relative_error(wrapped(*inputs.values()), expected) > 1e-3  # the groups differ
    return wrapped, tuple(inputs.values()), tuple(others.values()), expected


ELSEWHERE = """
import sys, torch
program = torch.export.load(sys.argv[1])
torch.save(program.module()(*torch.load(sys.argv[2])), sys.argv[3])
assert "diffusers_pqcad" not in sys.modules
"""


@action("torch.export, save, load in another process", CORE, quick=["DiT"])
@torch.no_grad()
def test_export(family: str, tmp_path: Path) -> None:
    model, inputs, others, expected = exportable(family, W4)
    paths = [str(tmp_path / name) for name in ("model.pt2", "inputs.pt", "output.pt")]
    torch.export.save(torch.export.export(model, inputs), paths[0])
    torch.save(others, paths[1])
    subprocess.run([sys.executable, "-c", ELSEWHERE, *paths], check=True)
    torch.testing.assert_close(torch.load(paths[2]), expected, rtol=1e-4, atol=1e-5)


@action("torch.jit.trace, save, load", CORE, quick=["DiT"])
@torch.no_grad()
def test_torchscript(family: str, tmp_path: Path) -> None:
    model, inputs, others, expected = exportable(family, W4)
    torch.jit.trace(model, inputs, check_trace=False).save(tmp_path / "model.pt")
    torch.testing.assert_close(torch.jit.load(tmp_path / "model.pt")(*others), expected, rtol=1e-4, atol=1e-5)


@action("openvino.convert_model", CORE, quick=["DiT"])
@torch.no_grad()
def test_openvino(family: str) -> None:
    openvino = pytest.importorskip("openvino")
    model, inputs, others, expected = exportable(family, W8)
    compiled = openvino.compile_model(
        openvino.convert_model(model, example_input=inputs), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    (output,) = compiled([tensor.numpy() for tensor in others]).values()
    assert relative_error(torch.from_numpy(output), expected) < 1e-2  # a code may differ at a tie
    model.model = quantized(family, W8)  # of dynamic ranges
    openvino.convert_model(model, example_input=inputs)


# ---- pipelines


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(clip_sample=False, steps_offset=1)


def text_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=8,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=1,
            vocab_size=32,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )  # fmt: skip
    ).eval()


ABSENT = {"tokenizer": None, "feature_extractor": None, "safety_checker": None, "image_encoder": None}


def build_pipeline(family: str) -> Any:
    if family == "UNet2DModel":
        return DDIMPipeline(build(family), scheduler())
    if family == "DiT":
        return DiTPipeline(build(family), build("AutoencoderKL"), scheduler())
    return StableDiffusionPipeline(
        vae=build("AutoencoderKL"), text_encoder=text_encoder(), unet=build(family), scheduler=scheduler(),
        requires_safety_checker=False, **{key: None for key in ABSENT if key != "image_encoder"},
    )  # fmt: skip


def load_pipeline(family: str, directory: Path, **options: Any) -> Any:
    absent = ABSENT if family == "SD-1.5 UNet" else {}
    return type(build_pipeline(family)).from_pretrained(directory, **absent, **options)


def denoiser_of(pipeline: Any) -> Any:
    return pipeline.transformer if hasattr(pipeline, "transformer") else pipeline.unet


def images_of(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    if isinstance(pipeline, DiTPipeline):
        options |= {"class_labels": [1], "guidance_scale": 1.0}
    if isinstance(pipeline, StableDiffusionPipeline):
        options |= {
            "prompt_embeds": noise(1, 3, 8),
            "negative_prompt_embeds": noise(1, 3, 8),
            "height": 16,
            "width": 16,
        }
    return pipeline(**options, output_type="np").images


@pytest.fixture
def pipeline_dir(family: str, tmp_path: Path) -> Path:
    build_pipeline(family).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def quantized_parts(pipeline: Any) -> set[str]:
    return {name for name, part in pipeline.components.items() if isinstance(part, nn.Module) and packed_layers(part)}


@action("DiffusionPipeline.from_pretrained(quantization_config=PQCADConfig())", CORE)
def test_pipeline(family: str, pipeline_dir: Path, tmp_path: Path) -> None:
    pipeline = load_pipeline(family, pipeline_dir, quantization_config=W4)
    assert_same_tensors(denoiser_of(pipeline), quantized(family))
    assert len(quantized_parts(pipeline)) == 1
    assert "PQCAD" not in repr(pipeline)  # a pipeline prints its classes; it must print at all
    pipeline.save_pretrained(tmp_path / "saved")
    again = load_pipeline(family, tmp_path / "saved")
    assert abs(images_of(again) - images_of(pipeline)).max() < 1e-5  # where memory lies decides the last bits of sums


@action("PipelineQuantizationConfig(quant_mapping={...})", CORE)
def test_quant_mapping(family: str, pipeline_dir: Path) -> None:
    part = "transformer" if family == "DiT" else "unet"
    config = PipelineQuantizationConfig(quant_mapping={part: W4})
    pipeline = load_pipeline(family, pipeline_dir, quantization_config=config)
    assert quantized_parts(pipeline) == {part}
    assert_same_tensors(denoiser_of(pipeline), quantized(family))


@action('PipelineQuantizationConfig(quant_backend="pqcad", components_to_quantize=...)', CORE)
def test_quant_backend(family: str, pipeline_dir: Path) -> None:
    part = "transformer" if family == "DiT" else "unet"
    options = {"quant_backend": "pqcad", "quant_kwargs": {"weight_bits": 4.0}}
    config = PipelineQuantizationConfig(**options, components_to_quantize=[part])
    pipeline = load_pipeline(family, pipeline_dir, quantization_config=config)
    assert quantized_parts(pipeline) == {part}
    assert_same_tensors(denoiser_of(pipeline), quantized(family))


@action('PipelineQuantizationConfig(quant_backend="pqcad"): every part, text encoder included', CORE)
def test_quant_backend_everything(family: str, pipeline_dir: Path, tmp_path: Path) -> None:
    config = PipelineQuantizationConfig(quant_backend="pqcad", quant_kwargs={"weight_bits": 4.0})
    pipeline = load_pipeline(family, pipeline_dir, quantization_config=config)
    expected = {"UNet2DModel": {"unet"}, "DiT": {"transformer", "vae"}}.get(family, {"unet", "vae", "text_encoder"})
    assert quantized_parts(pipeline) == expected
    pipeline.save_pretrained(tmp_path / "saved")
    again = load_pipeline(family, tmp_path / "saved")
    for name in expected:
        assert_same_tensors(getattr(again, name), getattr(pipeline, name))
    assert abs(images_of(again) - images_of(pipeline)).max() < 1e-5  # where memory lies decides the last bits of sums


@action("two quantized components, each with its own config", CORE[1:])
def test_two_components(family: str, pipeline_dir: Path) -> None:
    part = "transformer" if family == "DiT" else "unet"
    config = PipelineQuantizationConfig(quant_mapping={part: W4, "vae": W8})
    pipeline = load_pipeline(family, pipeline_dir, quantization_config=config)
    assert quantized_parts(pipeline) == {part, "vae"}
    assert {layer.spec.bits for layer in packed_layers(pipeline.vae).values()} == {8}
    assert_same_tensors(denoiser_of(pipeline), quantized(family))
    assert images_of(pipeline).shape[0] == 1


@action("pipe.to(device), pipe.to(dtype)", CORE)
def test_pipeline_to(family: str, pipeline_dir: Path) -> None:
    pipeline = load_pipeline(family, pipeline_dir, quantization_config=W8)
    expected = images_of(pipeline)
    pipeline.to("cpu")
    assert abs(images_of(pipeline) - expected).max() < 1e-5
    for dtype in (torch.bfloat16, torch.float64, torch.float32):
        pipeline.to(dtype)
        parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
        assert {part.dtype for part in parts} == {pipeline.dtype} == {dtype}
    assert abs(images_of(pipeline) - expected).max() < 0.1  # what was not packed has been rounded to bf16


@action("from_pipe", ["SD-1.5 UNet"])
def test_another_pipeline_shares_the_parts(family: str, pipeline_dir: Path) -> None:
    pipeline = load_pipeline(family, pipeline_dir, quantization_config=W4)
    expected, before = images_of(pipeline), copy.deepcopy(pipeline.unet)
    layer = next(iter(packed_layers(pipeline.unet).values()))
    held = layer._cache
    again = StableDiffusionImg2ImgPipeline.from_pipe(pipeline)
    assert again.unet is pipeline.unet
    assert layer._cache is held  # what the kernel has packed: the cast changes nothing
    assert_same_tensors(again.unet, before)
    assert abs(images_of(StableDiffusionPipeline.from_pipe(again)) - expected).max() < 1e-5
    for dtype in (torch.bfloat16, torch.float32):
        assert StableDiffusionPipeline.from_pipe(pipeline, torch_dtype=dtype).unet.dtype == dtype


def sdxl_pipeline(vae: Any) -> StableDiffusionXLPipeline:
    parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(
        vae=vae, unet=build("SDXL UNet").half(), scheduler=scheduler(), force_zeros_for_empty_prompt=False,
        add_watermarker=False, **parts,
    )  # fmt: skip


def sdxl_images(pipeline: StableDiffusionXLPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": noise(1, 3, 8), "pooled_prompt_embeds": noise(1, 8)}
    return pipeline(
        **{name: value.half() for name, value in embeds.items()}, guidance_scale=1.0, num_inference_steps=2,
        height=16, width=16, output_type="pt", generator=torch.Generator().manual_seed(0),
    ).images  # fmt: skip


@action("an fp16 SDXL pipeline moves the VAE to fp32 to decode (force_upcast)", ["AutoencoderKL"])
def test_the_vae_is_upcast_to_decode(family: str, float_dir: Path) -> None:
    vaes = [load(family, float_dir, config, torch_dtype=torch.float16) for config in (None, W8)]
    assert vaes[1].config.force_upcast
    seen = []
    vaes[1].decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    before = {name: tensor.clone() for name, tensor in vaes[1].state_dict().items()}
    pipeline = sdxl_pipeline(vaes[1])
    first = sdxl_images(pipeline)
    assert 0 < relative_error(first, sdxl_images(sdxl_pipeline(vaes[0]))) < 0.1
    assert seen == [torch.float32]
    assert vaes[1].dtype == torch.float16
    assert all(torch.equal(tensor, before[name]) for name, tensor in vaes[1].state_dict().items())
    held = [layer._cache for layer in packed_layers(vaes[1].decoder).values()]
    assert torch.equal(sdxl_images(pipeline), first)
    assert all(
        layer._cache is cache for layer, cache in zip(packed_layers(vaes[1].decoder).values(), held, strict=True)
    )


@action("pipe.enable_model_cpu_offload", CORE)
def test_pipeline_offload(family: str, pipeline_dir: Path) -> None:
    """Sequential offload cannot take the CPU for the accelerator, in floating point neither; see trap 21."""
    pipeline = load_pipeline(family, pipeline_dir, quantization_config=W4)
    expected = images_of(pipeline)
    pipeline.enable_model_cpu_offload(device="cpu")
    for _ in range(2):  # the second call finds the hooks of the first
        assert abs(images_of(pipeline) - expected).max() < 1e-5


@action("pipe.load_lora_weights, unload_lora_weights; pipe.fuse_lora is refused at 4 bits", ["SD-1.5 UNet"])
def test_pipeline_lora(family: str, pipeline_dir: Path, tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    trained = adapted(family)
    StableDiffusionPipeline.save_lora_weights(tmp_path / "lora", unet_lora_layers=get_peft_model_state_dict(trained))
    pipeline = load_pipeline(family, pipeline_dir, quantization_config=W4)
    before = images_of(pipeline)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name="pytorch_lora_weights.safetensors")
    adapted_images = images_of(pipeline)
    assert abs(adapted_images - before).max() > 1e-3
    with pytest.raises(ValueError, match="adapters are merged into layers of 8 bits"):
        pipeline.fuse_lora()
    assert abs(images_of(pipeline) - adapted_images).max() < 1e-5
    pipeline.unload_lora_weights()
    assert abs(images_of(pipeline) - before).max() < 1e-5


UNETS = ("SD-1.5 UNet", "SD-2 UNet", "SDXL UNet")


def load_ip_adapter(model: Any, family: str) -> Any:
    """Load a random IP-Adapter onto `model`, the same each time, and return the pipeline around it."""
    generator = torch.Generator().manual_seed(3)
    image = {"proj.weight": torch.randn(32, 16, generator=generator), "proj.bias": torch.zeros(32)}
    image |= {"norm.weight": torch.ones(8), "norm.bias": torch.zeros(8)}
    layers = {
        f"{2 * index + 1}.to_{letter}_ip.weight": torch.randn(module.inner_dim, 8, generator=generator)
        for index, module in enumerate(module for name, module in model.named_modules() if name.endswith("attn2"))
        for letter in "kv"
    }
    pipeline = sdxl_pipeline(None) if family == "SDXL UNet" else build_pipeline(family)
    pipeline.unet = model
    adapter = {"image_proj": image, "ip_adapter": layers}
    pipeline.load_ip_adapter(adapter, subfolder="", weight_name="", image_encoder_folder=None)
    return pipeline


@torch.no_grad()
def call_with_image(model: Any, family: str) -> Tensor:
    inputs = inputs_of(family)
    inputs["added_cond_kwargs"] = {**inputs.get("added_cond_kwargs", {}), "image_embeds": [noise(2, 1, 16)]}
    return output_of(model, inputs)


@action("IP-Adapter: load, run, unload", UNETS)
def test_ip_adapter(family: str) -> None:
    plain, model = build(family), quantized(family, W8)
    without, before = call(plain, family), call(model, family)
    load_ip_adapter(plain, family)
    pipeline = load_ip_adapter(model, family)
    expected = call_with_image(plain, family)
    error = relative_error(call_with_image(model, family), expected)
    assert 0 < error < 0.1
    assert relative_error(expected, without) > 3 * error
    pipeline.unload_ip_adapter()
    assert_same_model(model, quantized(family, W8), family)
    assert torch.equal(call(model, family), before)


@action("IP-Adapter, then quantize_, requantize_, dequantize()", UNETS)
def test_ip_adapter_before_quantizing(family: str) -> None:
    model = build(family)
    without = call(model, family)
    load_ip_adapter(model, family)
    expected = call_with_image(model, family)
    for change in (
        lambda: quantize_(model, W8),
        lambda: requantize_(model, PQCADConfig(method="fixed", weight_bits=8, activation_bits=None)),
        lambda: model.dequantize(),
    ):
        change()
        assert model.config.encoder_hid_dim_type == "ip_image_proj"
        error = relative_error(call_with_image(model, family), expected)
        assert 0 < error < 0.1
        assert relative_error(expected, without) > 3 * error


@action("... save and reload without it", UNETS)
def test_ip_adapter_is_not_saved_with_the_model(family: str, tmp_path: Path) -> None:
    """As from a float model: its class does not build the layers, so they stay in floating point, and are left out."""
    model = build(family)
    pipeline = load_ip_adapter(model, family)
    quantize_(model, W4)
    assert not any("processor" in name or "image_projection" in name for name in packed_layers(model))
    model.save_pretrained(tmp_path)
    pipeline.unload_ip_adapter()
    assert_same_model(load(family, tmp_path), model, family)
    assert_same_model(model, quantized(family), family)


@action("AnimateDiff: motion modules around a UNet, quantized", ["SD-1.5 UNet"])
def test_animate_diff(family: str, tmp_path: Path) -> None:
    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    )
    model = UNetMotionModel.from_unet2d(build(family), adapter).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)  # motion modules start at zero
    inputs = {"sample": noise(1, 4, 2, SIZE, SIZE), "timestep": 10, "encoder_hidden_states": text(2)}
    with torch.no_grad():
        expected = output_of(model, inputs)
        quantize_(model, W8)
        assert any("motion_modules" in name for name in packed_layers(model))
        output = output_of(model, inputs)
        model.save_pretrained(tmp_path)
        loaded = UNetMotionModel.from_pretrained(tmp_path)
        assert_same_tensors(loaded, model)
        torch.testing.assert_close(output_of(loaded, inputs), output)
    assert 0 < relative_error(output, expected) < 0.1


@action("a quantized ControlNet with a float UNet", ["ControlNet"])
def test_quantized_controlnet(family: str) -> None:
    def pipeline(controlnet: Any) -> StableDiffusionControlNetPipeline:
        return StableDiffusionControlNetPipeline(
            vae=build("AutoencoderKL"), text_encoder=text_encoder(), tokenizer=None, unet=build("SD-1.5 UNet"),
            controlnet=controlnet, scheduler=scheduler(), safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip

    def images(pipeline: Any) -> Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return torch.from_numpy(
            pipeline(
                prompt_embeds=noise(1, 3, 8),
                negative_prompt_embeds=noise(1, 3, 8),
                image=noise(1, 3, 16, 16).clamp(0, 1),
                height=16,
                width=16,
                num_inference_steps=2,
                generator=torch.Generator().manual_seed(0),
                output_type="np",
            ).images  # fmt: skip
        )

    expected = images(pipeline(build(family)))
    assert 0 < relative_error(images(pipeline(quantized(family, W8))), expected) < 0.1


def wan() -> AutoencoderKLWan:
    torch.manual_seed(0)
    return AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    ).eval()  # fmt: skip


@action("a video autoencoder: quantize_, load, save, requantize_, dequantize", ["AutoencoderKLWan"])
@torch.no_grad()
def test_a_video_autoencoder(family: str, tmp_path: Path) -> None:
    """Its causal convolutions are classes of their own, and keep frames from chunk to chunk."""
    video = noise(1, 3, 5, 8, 8)
    model = wan()
    model.save_pretrained(tmp_path / "float")
    expected = model(video).sample
    quantize_(model, W8)
    output = model(video).sample
    assert 0 < relative_error(output, expected) < 0.05
    assert coverage(model).share(coverage(model).packed) > 0.9
    loaded = AutoencoderKLWan.from_pretrained(tmp_path / "float", quantization_config=W8)
    assert_same_tensors(loaded, model)
    requantize_(loaded, W4)
    assert relative_error(output, loaded(video).sample) > relative_error(output, expected)
    model.save_pretrained(tmp_path / "quantized")
    again = AutoModel.from_pretrained(str(tmp_path / "quantized"))
    assert_same_tensors(again, model)
    assert torch.equal(again.decode(again.encode(video).latent_dist.mode()).sample, output)
    for twin in (copy.deepcopy(again), pickle.loads(pickle.dumps(again))):
        assert torch.equal(twin(video).sample, output)
    again.dequantize()
    assert {type(module) for module in again.modules()} == {type(module) for module in wan().modules()}


@action("... adapters on its convolutions", ["AutoencoderKLWan"])
def test_adapters_of_a_video_autoencoder(family: str) -> None:
    """Of plain convolutions: adapters are built by the class of a layer, and Wan's own takes no `bias`."""
    from peft import inject_adapter_in_model

    model, video = quantize_(wan(), W8), noise(1, 3, 5, 8, 8)
    targets = [name for name, layer in packed_layers(model).items() if type(layer) is PQCADConv2d]
    assert targets
    before = model(video).sample.detach()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model)
    adapted = model(video).sample
    assert relative_error(adapted.detach(), before) > 1e-4
    adapted.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name and p.requires_grad)


def text_model(family: str) -> Any:
    torch.manual_seed(0)
    if family == "CLIP":
        return text_encoder()
    return T5EncoderModel(
        T5Config(d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, vocab_size=32, feed_forward_proj="gated-gelu")
    ).eval()


@action("a transformers text encoder: load, save, dequantize", ["CLIP", "T5"])
def test_text_encoders(family: str, tmp_path: Path) -> None:
    model = text_model(family)
    tokens = torch.arange(6).view(1, 6)
    model.save_pretrained(tmp_path / "float")
    with torch.no_grad():
        expected = model(tokens)[0]
    for dtype in (torch.float32, torch.bfloat16):
        loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=W8, dtype=dtype)
        assert {layer.weight_scale.dtype for layer in packed_layers(loaded).values()} == {torch.float32}
        assert loaded.num_parameters() == model.num_parameters()
        with torch.no_grad():
            output = loaded(tokens)[0]
        assert output.dtype == dtype
        assert 0 < relative_error(output, expected) < 0.1
        loaded.save_pretrained(tmp_path / "quantized")
        again = type(model).from_pretrained(tmp_path / "quantized", dtype=dtype)
        assert_same_tensors(again, loaded)
        assert again.is_quantized
    with torch.no_grad():
        before = again(tokens)[0]
    again.dequantize()
    assert not packed_layers(again)
    assert not hasattr(again.config, "quantization_config")
    with torch.no_grad():
        assert relative_error(again(tokens)[0], before) < 0.1


@action("... quantize_, requantize_, save, reload in memory", ["CLIP", "T5"])
def test_text_encoders_in_memory(family: str, tmp_path: Path) -> None:
    model = text_model(family)
    quantize_(model, W8)
    requantize_(model, W4)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.is_quantized
    assert packed_layers(loaded)
    assert_same_tensors(loaded, model)


@action("... a cast, save, reload", ["CLIP", "T5"])
def test_text_encoders_are_cast(family: str, tmp_path: Path) -> None:
    tokens = torch.tensor([[3, 4, 5, 1]])
    plain, model = text_model(family), quantize_(text_model(family), W8)
    packed = {name: value.clone() for name, value in model.state_dict().items() if name not in plain.state_dict()}
    with torch.no_grad():
        expected = plain(tokens)[0]
    for name, (cast, dtype) in CASTS.items():
        assert cast(model) is model
        cast(plain)
        assert model.dtype == plain.dtype == dtype, name
        floats = plain.state_dict()
        for key, tensor in model.state_dict().items():
            assert torch.equal(tensor, packed[key] if key in packed else floats[key]), (name, key)
        with torch.no_grad():
            output = model(tokens)[0]
        assert output.dtype == dtype
        assert relative_error(output, expected) < 0.1, name
    model.half().save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.dtype == torch.float16  # as transformers loads a float model
    assert_same_tensors(loaded, model)


@action("... a checkpoint that lacks a tensor", ["CLIP", "T5"], refused=True)
def test_an_incomplete_text_encoder_is_refused(family: str, tmp_path: Path) -> None:
    model = quantize_(text_model(family), W8)
    for name in [name for name in model.state_dict() if "norm" in name or name.endswith(("qweight", "weight_scale"))]:
        model.save_pretrained(tmp_path)
        stored = {key: tensor.clone() for key, tensor in load_file(tmp_path / "model.safetensors").items()}
        del stored[name]
        save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match="the checkpoint lacks"):
            type(model).from_pretrained(tmp_path)
