"""Specification of saved models: config and headers are enough for everything but the numbers of the weights."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from pipelines import PIPELINES
from safetensors.torch import load_file, save_file

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.loading.plan import plan
from diffusers_pqcad.loading.saved import SavedModel, TensorHeader, header_of, headers_of, saved_models, skeleton

WEIGHTS = "diffusion_pytorch_model.safetensors"
KINDS = ("sd", "sdxl", "sd3", "aura", "flux", "dit", "pixart", "wan")


@pytest.mark.parametrize("kind", KINDS)
def test_a_skeleton_has_the_layers_and_sizes_of_the_loaded_model(kind, tmp_path):
    pipeline = PIPELINES[kind].build()
    pipeline.save_pretrained(tmp_path)
    models = saved_models(tmp_path)
    assert set(models) == {name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    model = getattr(pipeline, PIPELINES[kind].denoiser)
    found = skeleton(models[PIPELINES[kind].denoiser])
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.state_dict().items()} == {
        name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in found.parameters())
    config = PQCADConfig(method="fixed", weight_bits=3)
    expected = plan(model, config)
    assert list(plan(found, config)) == list(expected)
    quantize_(model, config).save_pretrained(tmp_path / "quantized")
    assert saved_models(tmp_path / "quantized")["quantized"].num_bytes == expected.num_bytes_after


def test_headers_say_dtypes_shapes_and_bytes(tmp_path):
    tensors = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.zeros(0, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = headers_of(tmp_path / "x.safetensors")
    assert found == {"a": TensorHeader(torch.bfloat16, (2, 3)), "b": TensorHeader(torch.uint8, (0,))}
    assert [header.num_bytes for header in found.values()] == [12, 0]


def test_a_dtype_that_torch_does_not_have_is_named():
    with pytest.raises(ValueError, match="x: expected a dtype out of .*, got F4"):
        header_of("x", "F4", [2])


def test_shards_are_one_model(tiny_unet: UNet2DModel, tmp_path: Path):
    tiny_unet.save_pretrained(tmp_path / "whole")
    tiny_unet.save_pretrained(tmp_path / "shards", max_shard_size="16KB")
    whole, shards = (saved_models(tmp_path / name)[name] for name in ("whole", "shards"))
    assert whole.tensors == shards.tensors


def test_half_precision_is_seen(tiny_unet: UNet2DModel, tmp_path: Path):
    tiny_unet.half().save_pretrained(tmp_path / "unet")
    model = skeleton(saved_models(tmp_path / "unet")["unet"])
    assert model.conv_in.weight.dtype == torch.float16


def test_a_config_that_says_quantized_of_floats_is_one_of_a_float_model(tiny_unet: UNet2DModel, tmp_path: Path):
    quantize_(tiny_unet, PQCADConfig()).save_pretrained(tmp_path / "unet")
    saved = saved_models(tmp_path / "unet")["unet"]
    assert saved.quantization is not None
    floats = {name: header for name, header in saved.tensors.items() if not name.endswith(".qweight")}
    assert SavedModel("unet", saved.config, floats).quantization is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("conv_in.weight"), "the checkpoint lacks 1 tensors .*'conv_in.weight'"),
        (lambda tensors: tensors.update({"conv_in.weight": torch.zeros(1)}), "conv_in.weight: expected shape"),
    ],
)
def test_a_file_that_is_not_the_configs_is_refused(tiny_unet, tmp_path, change, message):
    tiny_unet.save_pretrained(tmp_path / "unet")
    tensors = load_file(tmp_path / "unet" / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / "unet" / WEIGHTS)
    with pytest.raises(ValueError, match=message):
        skeleton(saved_models(tmp_path / "unet")["unet"])


def test_a_packed_tensor_of_another_shape_is_refused(tiny_unet, tmp_path):
    quantize_(tiny_unet, PQCADConfig()).save_pretrained(tmp_path / "unet")
    tensors = load_file(tmp_path / "unet" / WEIGHTS)
    name = next(name for name in tensors if name.endswith(".qweight"))
    save_file(tensors | {name: torch.zeros(1, 1, dtype=torch.uint8)}, tmp_path / "unet" / WEIGHTS)
    with pytest.raises(ValueError, match=f"{name}: expected shape"):
        skeleton(saved_models(tmp_path / "unet")["unet"])


def test_a_class_that_no_library_has_is_refused(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path / "unet")
    path = tmp_path / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_name": "Nonsense"}))
    with pytest.raises(ValueError, match="got 'Nonsense', which diffusers does not have"):
        skeleton(saved_models(tmp_path / "unet")["unet"])


def test_a_file_that_was_cut_off_is_refused(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path / "unet")
    path = tmp_path / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="expected a safetensors file, which this is not, or not all of it"):
        saved_models(tmp_path / "unet")


def test_weights_of_one_variant_are_found(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path / "unet", variant="fp16")
    plain = shutil.copytree(tmp_path / "unet", tmp_path / "plain")
    (plain / "diffusion_pytorch_model.fp16.safetensors").rename(plain / WEIGHTS)
    assert saved_models(tmp_path / "unet")["unet"].tensors == saved_models(plain)["plain"].tensors
