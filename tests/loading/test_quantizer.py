"""Loading and saving through diffusers. Test names carry the numbers of the traps in CONTRIBUTING.md."""

import copy
import gc
import json
import sys
import threading
import warnings
import weakref

import diffusers.models.modeling_utils as modeling
import pytest
import torch
from accelerate import init_empty_weights
from diffusers import (
    AutoencoderKL,
    AutoModel,
    DDIMPipeline,
    DDIMScheduler,
    QwenImageTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, DiffusersAutoQuantizer
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_pqcad import PQCADConfig, PQCADQuantizer, kernels, quantize_, requantize_
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.quantized import PQCADConv2d, QuantizedLayer
from diffusers_pqcad.layers.timesteps import install_timestep_groups
from diffusers_pqcad.loading.convert import finish_, mark_quantized_
from diffusers_pqcad.loading.coverage import average_bits
from diffusers_pqcad.loading.placeholders import check_loaded
from diffusers_pqcad.numerics.qparams import ActivationQParams

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = "diffusion_pytorch_model.safetensors.index.json"
CONFIGS = {
    "progressive": PQCADConfig(weight_bits=4),
    "fixed": PQCADConfig(method="fixed", weight_bits=3),
    "groups": PQCADConfig(weight_bits=3.5, group_size=8),
    "everything": PQCADConfig(weight_bits=5, search_all_modules=True, activation_bits=None),
    "7-bit activations": PQCADConfig(method="fixed", weight_bits=8, activation_bits=7),
}


def tiny_cond_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(8, 16),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    ).eval()


@pytest.fixture
def float_dir(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def quantized(tiny_unet):
    """A quantized `tiny_unet` with static activation ranges for two timestep groups: every kind of tensor we save."""
    model = quantize_(copy.deepcopy(tiny_unet), PQCADConfig(weight_bits=4))
    config = copy.deepcopy(model.config["quantization_config"])
    config.timestep_boundaries = [500]
    groups = install_timestep_groups(model, config.timestep_boundaries)
    for layer in packed_layers(model).values():
        scale, zero_point = torch.rand(2) / 10 + 0.01, torch.randint(0, 256, (2,), dtype=torch.int32)
        layer.set_input_qparams_(ActivationQParams(scale, zero_point), groups)
    finish_(model, config)
    mark_quantized_(model, config)
    return model


@pytest.fixture
def quantized_dir(quantized, tmp_path):
    quantized.save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


def tensors(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert torch.equal(actual[name], tensor), name


def assert_same_model(actual, expected):
    """The same integers, scales, floats and layers, and the same output."""
    assert_same_tensors(actual.state_dict(), expected.state_dict())
    layers = packed_layers(expected)
    assert {name: layer.spec for name, layer in packed_layers(actual).items()} == {
        name: layer.spec for name, layer in layers.items()
    }
    assert as_config(actual) == as_config(expected)
    x = torch.randn(2, expected.config.in_channels, 8, 8, dtype=expected.dtype)
    with torch.no_grad():
        assert torch.equal(actual(x, 900).sample, expected(x, 900).sample)


def as_config(model):
    config = model.config["quantization_config"]
    return PQCADConfig.from_dict(config) if isinstance(config, dict) else config


def edit_file(directory, change):
    """Apply `change` to the tensors of the saved model, in place."""
    stored = {name: tensor.clone() for name, tensor in load_file(directory / WEIGHTS).items()}
    change(stored)
    save_file(stored, directory / WEIGHTS, metadata={"format": "pt"})


def edit_config(directory, change):
    values = json.loads((directory / "config.json").read_text())
    change(values["quantization_config"])
    (directory / "config.json").write_text(json.dumps(values))


# ---- registration and the ways to spell a config


@pytest.mark.fast
def test_the_method_is_registered_with_diffusers():
    assert AUTO_QUANTIZER_MAPPING["pqcad"] is PQCADQuantizer
    assert AUTO_QUANTIZATION_CONFIG_MAPPING["pqcad"] is PQCADConfig
    assert isinstance(DiffusersAutoQuantizer.from_config({"quant_method": "pqcad", "weight_bits": 3}), PQCADQuantizer)


@pytest.mark.fast
@pytest.mark.parametrize("name", CONFIGS)
def test_loading_finds_the_integers_that_quantizing_in_memory_finds(float_dir, tiny_unet, name):
    loaded = UNet2DModel.from_pretrained(float_dir, quantization_config=CONFIGS[name])
    assert_same_model(loaded, quantize_(tiny_unet, CONFIGS[name]))
    assert loaded.is_quantized
    assert isinstance(loaded.hf_quantizer, PQCADQuantizer)
    if name != "fixed":
        assert average_bits(loaded)[0] <= CONFIGS[name].weight_bits


def test_a_dict_is_a_config(float_dir, tiny_unet):
    loaded = UNet2DModel.from_pretrained(float_dir, quantization_config=PQCADConfig(weight_bits=3).to_dict())
    assert_same_model(loaded, quantize_(tiny_unet, PQCADConfig(weight_bits=3)))


def test_auto_model_loads_float_and_quantized_models(float_dir, quantized_dir, quantized):
    assert_same_model(AutoModel.from_pretrained(str(quantized_dir)), quantized)
    assert packed_layers(AutoModel.from_pretrained(str(float_dir), quantization_config=PQCADConfig()))


@pytest.mark.fast
@pytest.mark.parametrize(
    "config",
    [PQCADConfig(weight_bits=3), PipelineQuantizationConfig(quant_mapping={"unet": PQCADConfig(weight_bits=3)})],
    ids=["PQCADConfig", "quant_mapping"],
)
def test_a_pipeline_quantizes_its_denoiser_without_a_warning(tiny_pipeline, tmp_path, config):
    tiny_pipeline.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = DDIMPipeline.from_pretrained(tmp_path, quantization_config=config)
    assert_same_model(loaded.unet, quantize_(tiny_pipeline.unet, PQCADConfig(weight_bits=3)))


def test_a_quantized_pipeline_comes_back_with_its_integers(quantized, tiny_scheduler, tmp_path):
    pipeline = DDIMPipeline(quantized, tiny_scheduler)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.save_pretrained(tmp_path)
    loaded = DDIMPipeline.from_pretrained(tmp_path)
    assert_same_model(loaded.unet, quantized)
    loaded.set_progress_bar_config(disable=True)
    images = [
        each(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="np").images
        for each in (loaded, pipeline)
    ]
    assert (images[0] == images[1]).all()


@pytest.fixture
def text_to_image_dir(tmp_path):
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextConfig(
        hidden_size=8, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=32,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",)}
    StableDiffusionPipeline(
        vae=AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4, **blocks),
        text_encoder=CLIPTextModel(text),
        tokenizer=None,
        unet=tiny_cond_unet(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "pipeline")
    return tmp_path / "pipeline"


def load_text_to_image(directory, config):
    absent = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
    return StableDiffusionPipeline.from_pretrained(directory, quantization_config=config, **absent)


@pytest.mark.parametrize(
    ("components", "expected"),
    [(None, {"unet"}), (["vae"], {"vae"}), (["unet", "text_encoder"], {"unet", "text_encoder"})],
    ids=["default", "one", "two"],  # not those of sets, whose order differs between the processes of a run
)
def test_components_choose_the_parts_of_a_pipeline(text_to_image_dir, components, expected):
    pipeline = load_text_to_image(text_to_image_dir, PQCADConfig(components=components))
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    assert set(parts) == {"unet", "vae", "text_encoder"}
    assert {name for name, part in parts.items() if packed_layers(part)} == expected


# ---- saving and loading


@pytest.mark.fast
def test_a_saved_model_comes_back_bit_for_bit(quantized, quantized_dir):
    loaded = UNet2DModel.from_pretrained(quantized_dir)
    assert_same_model(loaded, quantized)
    assert not loaded.training
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():  # both timestep groups, and a batch that mixes them
        for timestep in (10, torch.tensor([10, 900])):
            assert torch.equal(loaded(x, timestep).sample, quantized(x, timestep).sample)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_quantized_in_memory_can_be_saved(tiny_unet, tmp_path, name):
    quantize_(tiny_unet, CONFIGS[name]).save_pretrained(tmp_path)
    assert_same_model(UNet2DModel.from_pretrained(tmp_path), tiny_unet)


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"variant": "w4a8"}], ids=["bin", "variant"])
def test_other_file_formats_come_back_too(quantized, tmp_path, options):
    quantized.save_pretrained(tmp_path, **options)
    assert_same_model(UNet2DModel.from_pretrained(tmp_path, variant=options.get("variant")), quantized)


def test_saving_over_the_loaded_file_keeps_it_whole(quantized, quantized_dir):
    loaded = UNet2DModel.from_pretrained(quantized_dir)
    loaded.save_pretrained(quantized_dir)
    assert_same_model(UNet2DModel.from_pretrained(quantized_dir), quantized)


def test_the_file_is_as_small_as_the_footprint(quantized, quantized_dir):
    header = 100 * len(quantized.state_dict())
    checksums = 6 * 8 * len(packed_layers(quantized))  # computed when they are saved
    assert quantized.get_memory_footprint() <= (quantized_dir / WEIGHTS).stat().st_size
    assert (quantized_dir / WEIGHTS).stat().st_size < quantized.get_memory_footprint() + checksums + header + 1000


def test_loading_information_names_no_key(quantized_dir, float_dir):
    for directory, options in ((quantized_dir, {}), (float_dir, {"quantization_config": PQCADConfig()})):
        _, information = UNet2DModel.from_pretrained(directory, output_loading_info=True, **options)
        assert {key: value for key, value in information.items() if value} == {}


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}], ids=str)
def test_a_device_map_for_the_cpu(quantized_dir, quantized, float_dir, device_map):
    assert_same_model(UNet2DModel.from_pretrained(quantized_dir, device_map=device_map), quantized)
    assert packed_layers(
        UNet2DModel.from_pretrained(float_dir, device_map=device_map, quantization_config=PQCADConfig())
    )


def test_a_device_map_onto_the_disk_is_refused(quantized_dir, tmp_path):
    with pytest.raises(ValueError, match="device_map: a PQCAD model cannot be offloaded to disk"):
        UNet2DModel.from_pretrained(
            quantized_dir, device_map={"": "cpu", "mid_block": "disk"}, offload_folder=tmp_path / "offload"
        )
    assert not (tmp_path / "offload").exists()


def test_no_float_weight_outlives_loading(float_dir, quantized_dir, quantized):
    shapes = {tuple(layer.weight_shape) for layer in packed_layers(quantized).values()}

    def float_weights():
        gc.collect()
        candidates = [item for item in gc.get_objects() if issubclass(type(item), torch.Tensor)]
        return [item for item in candidates if item.device.type != "meta" and item.is_floating_point()]

    before = float_weights()
    models = [
        UNet2DModel.from_pretrained(float_dir, quantization_config=PQCADConfig()),
        UNet2DModel.from_pretrained(quantized_dir),
    ]
    known = {id(item) for item in before} | {id(item) for model in models for item in model.parameters()}
    new = [tuple(item.shape) for item in float_weights() if id(item) not in known]
    assert [shape for shape in new if shape in shapes] == []


def test_loading_packs_layer_by_layer(float_dir, tiny_unet, tmp_path, monkeypatch):
    """From shards, as large models are, no more float weights are alive than layers are left to pack."""
    tiny_unet.save_pretrained(tmp_path / "shards", max_shard_size="16KB")
    alive, weights = [], []
    pack = QuantizedLayer.pack_

    def counting_pack(self, *args, **kwargs):
        if not weights:
            weights.extend(
                weakref.ref(layer.weight) for layer in models[0].modules() if isinstance(layer, QuantizedLayer)
            )
        alive.append(sum(weight() is not None for weight in weights))
        pack(self, *args, **kwargs)

    models = []
    before = PQCADQuantizer._process_model_after_weight_loading
    monkeypatch.setattr(QuantizedLayer, "pack_", counting_pack)
    monkeypatch.setattr(
        PQCADQuantizer,
        "_process_model_after_weight_loading",
        lambda self, model, **kwargs: (models.append(model), before(self, model, **kwargs))[1],
    )
    UNet2DModel.from_pretrained(tmp_path / "shards", quantization_config=PQCADConfig())
    assert alive == list(range(len(weights), 0, -1))


# ---- the traps


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, None], ids=str)
def test_trap_01_scales_stay_fp32_and_bit_exact_in_every_dtype(quantized, quantized_dir, dtype, tmp_path):
    expected = tensors(quantized)
    loaded = UNet2DModel.from_pretrained(quantized_dir, torch_dtype=dtype)
    for name, tensor in loaded.state_dict().items():
        if name.endswith(("qweight", "scale", "zero_point", "checksum")):
            assert tensor.dtype == expected[name].dtype, name
            assert torch.equal(tensor, expected[name]), name
        else:
            assert tensor.dtype == (dtype or torch.float32), name
    assert {layer.weight.dtype for layer in packed_layers(loaded).values()} == {dtype or torch.float32}
    loaded.save_pretrained(tmp_path / "again")
    again = UNet2DModel.from_pretrained(tmp_path / "again", torch_dtype=dtype)
    assert_same_tensors(again.state_dict(), loaded.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_trap_01_quantizing_in_low_precision_stores_fp32_scales(float_dir, dtype, tmp_path):
    loaded = UNet2DModel.from_pretrained(float_dir, torch_dtype=dtype, quantization_config=PQCADConfig())
    assert {layer.weight_scale.dtype for layer in packed_layers(loaded).values()} == {torch.float32}
    assert loaded.dtype == dtype
    loaded.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert_same_tensors(again.state_dict(), loaded.state_dict())


@pytest.fixture
def parallel_loading(monkeypatch):
    """Switch on what HF_ENABLE_PARALLEL_LOADING does at import; yield the names of the threads that load."""
    threads = set()
    check = PQCADQuantizer.check_if_quantized_param

    def spy(self, *args, **kwargs):
        threads.add(threading.current_thread().name)
        return check(self, *args, **kwargs)

    monkeypatch.setattr(modeling, "HF_ENABLE_PARALLEL_LOADING", True)
    monkeypatch.setattr(PQCADQuantizer, "check_if_quantized_param", spy)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # threads change places as often as they can: a race shows within a few loads
    yield threads
    sys.setswitchinterval(interval)


@pytest.mark.parametrize("kind", ["quantized", "float"])
def test_trap_02_parallel_loading_of_many_shards_is_exact(quantized, float_dir, tmp_path, parallel_loading, kind):
    options = {} if kind == "quantized" else {"quantization_config": PQCADConfig(weight_bits=4)}
    if kind == "float":
        UNet2DModel.from_pretrained(float_dir).save_pretrained(tmp_path / "shards", max_shard_size="4KB")
        expected = tensors(UNet2DModel.from_pretrained(float_dir, **options))
    else:
        quantized.save_pretrained(tmp_path / "shards", max_shard_size="2KB")
        expected = tensors(quantized)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) >= 16
    parallel_loading.clear()
    for _ in range(15):  # the naive loader failed in 3 of 15
        assert_same_tensors(UNet2DModel.from_pretrained(tmp_path / "shards", **options).state_dict(), expected)
    assert len(parallel_loading) > 1
    assert "MainThread" not in parallel_loading


@pytest.mark.fast
def test_trap_02_loading_overwrites_entries_and_never_removes_one(float_dir, quantized_dir):
    """The cause of the race, without chance: an entry deleted and added again would be the last of its dictionary."""
    fresh = PQCADConv2d(1, 1, 1)
    for directory, options in ((float_dir, {"quantization_config": PQCADConfig()}), (quantized_dir, {})):
        for layer in packed_layers(UNet2DModel.from_pretrained(directory, **options)).values():
            assert list(layer._buffers) == list(fresh._buffers)
            assert list(layer._parameters) == list(fresh._parameters)


@pytest.mark.fast
def test_trap_03_weights_and_scales_in_different_shards(quantized, tmp_path):
    quantized.save_pretrained(tmp_path, max_shard_size="7KB")
    shard_of = json.loads((tmp_path / INDEX).read_text())["weight_map"]
    apart = [
        name for name in packed_layers(quantized) if shard_of[f"{name}.qweight"] != shard_of[f"{name}.weight_scale"]
    ]
    assert apart, "the shards are too large for this test"
    assert_same_model(UNet2DModel.from_pretrained(tmp_path), quantized)


def test_trap_03_float_shards_are_quantized_as_one_file_is(tiny_unet, tmp_path):
    tiny_unet.save_pretrained(tmp_path, max_shard_size="16KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    loaded = UNet2DModel.from_pretrained(tmp_path, quantization_config=PQCADConfig())
    assert_same_model(loaded, quantize_(tiny_unet, PQCADConfig()))


@pytest.fixture
def single_file_dir(tmp_path):
    tiny_cond_unet().save_pretrained(tmp_path / "single")
    return tmp_path / "single"


def from_single_file(directory, config, **options):
    return UNet2DConditionModel.from_single_file(
        str(directory / WEIGHTS), config=str(directory), quantization_config=config, **options
    )


def test_trap_04_a_single_file_is_quantized_on_the_fly(single_file_dir):
    config = PQCADConfig(weight_bits=3.5)
    model = from_single_file(single_file_dir, config)
    assert_same_tensors(model.state_dict(), quantize_(tiny_cond_unet(), config).state_dict())
    assert model.is_quantized
    assert model.num_parameters() == tiny_cond_unet().num_parameters()


def test_trap_04_a_quantized_single_file_is_filled_as_it_is(tmp_path):
    torch.manual_seed(0)
    model = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    quantize_(model, PQCADConfig()).save_pretrained(tmp_path)
    config = as_config(model)
    before = copy.deepcopy(config)
    loaded = QwenImageTransformer2DModel.from_single_file(
        str(tmp_path / WEIGHTS), config=str(tmp_path), quantization_config=config, torch_dtype=torch.bfloat16
    )
    stored = tensors(model)
    for name, tensor in loaded.state_dict().items():
        quantized = name.endswith(("qweight", "weight_scale"))
        expected = stored[name] if quantized else stored[name].bfloat16()
        assert torch.equal(tensor, expected), name
    assert config == before
    assert loaded.config["quantization_config"] is not config


def test_trap_04_a_quantized_unet_file_is_refused_by_diffusers(single_file_dir, tmp_path):
    """diffusers takes the file for one of the original training code, as keys are missing from it."""
    model = from_single_file(single_file_dir, PQCADConfig())
    model.save_pretrained(tmp_path / "quantized")
    with pytest.raises(Exception, match="Failed to load UNet2DConditionModel. Weights .* missing in the checkpoint"):
        from_single_file(tmp_path / "quantized", as_config(model))


def test_trap_05_a_single_file_model_saves_its_config(single_file_dir, tmp_path):
    model = from_single_file(single_file_dir, PQCADConfig(weight_bits=3))
    assert model.config["quantization_config"].weight_bits == 3
    model.save_pretrained(tmp_path / "saved")
    loaded = UNet2DConditionModel.from_pretrained(tmp_path / "saved")
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    assert as_config(loaded) == as_config(model)


@pytest.mark.fast
@pytest.mark.parametrize("source", ["in memory", "loaded", "saved before"])
def test_trap_06_a_dequantized_model_is_saved_as_a_float_model(quantized, quantized_dir, tmp_path, source):
    model = UNet2DModel.from_pretrained(quantized_dir) if source == "loaded" else quantized
    if source == "saved before":
        model.save_pretrained(tmp_path / "before")
    model.dequantize()
    model.save_pretrained(tmp_path / "float_again")
    stored = json.loads((tmp_path / "float_again" / "config.json").read_text())
    assert not [key for key in stored if "quant" in key]
    loaded = UNet2DModel.from_pretrained(tmp_path / "float_again")
    assert not getattr(loaded, "is_quantized", False)
    assert not [module for module in loaded.modules() if isinstance(module, QuantizedLayer)]
    assert_same_tensors(loaded.state_dict(), model.state_dict())
    loaded.half()  # what diffusers refuses for quantized models
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.isfinite(model(x, 1).sample).all()  # no timestep hook is left behind


@pytest.mark.fast
def test_trap_07_a_student_of_a_dequantized_teacher_is_plain(quantized, tmp_path):
    student = UNet2DModel.from_config(copy.deepcopy(quantized).dequantize().config)
    student.save_pretrained(tmp_path)
    loaded = UNet2DModel.from_pretrained(tmp_path)
    assert_same_tensors(loaded.state_dict(), student.state_dict())


def test_trap_07_a_student_with_an_inherited_config_loads_as_the_float_model_that_it_is(quantized, tmp_path):
    student = UNet2DModel.from_config(quantized.config)
    assert "quantization_config" in student.config  # diffusers' doing; the config of this student lies
    student.save_pretrained(tmp_path / "student")
    student.save_pretrained(tmp_path / "sharded", max_shard_size="16KB")
    for directory in ("student", "sharded"):
        with pytest.warns(
            UserWarning, match="the config holds a quantization_config, but the weights are in floating"
        ):
            loaded = UNet2DModel.from_pretrained(tmp_path / directory)
        assert_same_tensors(loaded.state_dict(), student.state_dict())
        assert not loaded.is_quantized
    loaded.half().float().save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again" / "config.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert not packed_layers(UNet2DModel.from_pretrained(tmp_path / "again"))
    path = tmp_path / "student" / "diffusion_pytorch_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(path).items() if "conv1" not in name}, path)
    with pytest.warns(UserWarning, match="in floating"), pytest.raises(ValueError, match="the checkpoint lacks"):
        UNet2DModel.from_pretrained(tmp_path / "student")


def test_trap_07_a_text_encoder_with_an_inherited_config_loads_as_the_float_model_that_it_is(tmp_path):
    sizes = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    encoder = CLIPTextModel(CLIPTextConfig(**sizes, num_attention_heads=2, max_position_embeddings=8))
    student = CLIPTextModel(quantize_(encoder, PQCADConfig()).config)
    student.save_pretrained(tmp_path)
    assert "quantization_config" in json.loads((tmp_path / "config.json").read_text())
    with pytest.warns(UserWarning, match="the config holds a quantization_config, but the weights are in floating"):
        loaded = CLIPTextModel.from_pretrained(tmp_path)
    assert_same_tensors(loaded.state_dict(), student.state_dict())
    assert not hasattr(loaded.config, "quantization_config")
    assert not loaded.is_quantized
    loaded.half().save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_trap_08_the_config_may_be_a_dict_after_saving(quantized, tmp_path):
    assert isinstance(quantized.config["quantization_config"], PQCADConfig)
    expected = copy.deepcopy(quantized.config["quantization_config"])
    quantized.save_pretrained(tmp_path / "first")
    assert isinstance(quantized.config["quantization_config"], dict)  # diffusers' doing
    assert as_config(quantized) == expected
    quantized.save_pretrained(tmp_path / "second")
    for name in ("first", "second"):
        loaded = UNet2DModel.from_pretrained(tmp_path / name)
        assert as_config(loaded) == expected
        assert_same_tensors(loaded.state_dict(), quantized.state_dict())
    assert "quantization_config" not in copy.deepcopy(quantized).dequantize().config
    with pytest.raises(ValueError, match="is quantized already"):
        quantize_(quantized, PQCADConfig())


LAYER = "mid_block.resnets.0.conv1"


@pytest.mark.fast
@pytest.mark.parametrize(
    "name",
    [
        f"{LAYER}.qweight",
        f"{LAYER}.weight_scale",
        f"{LAYER}.input_scale",
        f"{LAYER}.input_zero_point",
        f"{LAYER}.bias",
        "conv_in.weight",
        "conv_norm_out.bias",
    ],
)
def test_trap_09_a_missing_tensor_is_an_error(quantized_dir, name):
    edit_file(quantized_dir, lambda stored: stored.pop(name))
    with pytest.raises(ValueError, match=rf"the checkpoint lacks 1 tensors .*{name}.*incomplete"):
        UNet2DModel.from_pretrained(quantized_dir)


@pytest.mark.parametrize("device_map", [None, "cpu"])
@pytest.mark.parametrize("name", [f"{LAYER}.weight", f"{LAYER}.bias", "conv_in.weight"])
def test_trap_09_a_missing_float_tensor_is_an_error(float_dir, name, device_map):
    edit_file(float_dir, lambda stored: stored.pop(name))
    with pytest.raises(ValueError, match=rf"the checkpoint lacks 1 tensors .*{name}"):
        UNet2DModel.from_pretrained(float_dir, quantization_config=PQCADConfig(), device_map=device_map)


def test_trap_09_a_missing_tensor_of_a_single_file_is_an_error(single_file_dir):
    edit_file(single_file_dir, lambda stored: stored.pop("mid_block.resnets.0.conv1.bias"))
    with pytest.raises(Exception, match=r"lacks 1 tensors .*mid_block.resnets.0.conv1.bias|missing in the checkpoint"):
        from_single_file(single_file_dir, PQCADConfig())


@pytest.mark.fast
def test_trap_10_the_users_config_is_neither_changed_nor_kept(float_dir, tiny_pipeline, tmp_path):
    config = PQCADConfig(modules_to_not_convert=["to_q"])
    before = copy.deepcopy(config)
    tiny_pipeline.save_pretrained(tmp_path / "pipeline")
    models = [
        UNet2DModel.from_pretrained(float_dir, quantization_config=config),
        DDIMPipeline.from_pretrained(tmp_path / "pipeline", quantization_config=config).unet,
        DDIMPipeline.from_pretrained(
            tmp_path / "pipeline", quantization_config=PipelineQuantizationConfig(quant_mapping={"unet": config})
        ).unet,
    ]
    assert config == before
    config.modules_to_not_convert.append("to_k")
    config.weight_bits_by_module["x"] = 8
    for model in models:
        for stored in (model.config["quantization_config"], model.hf_quantizer.quantization_config):
            assert stored is not config
            assert stored.modules_to_not_convert == [
                "to_q",
                "up_blocks.1.resnets.0.conv_shortcut",
                "up_blocks.1.resnets.1.conv_shortcut",
            ]
            assert "x" not in stored.weight_bits_by_module


@pytest.mark.parametrize("kind", ["float", "quantized", "single file"])
def test_trap_11_modules_kept_in_fp32_stay_there(float_dir, quantized_dir, single_file_dir, kind, monkeypatch):
    for cls in (UNet2DModel, UNet2DConditionModel):
        monkeypatch.setattr(cls, "_keep_in_fp32_modules", ["conv_norm_out", "time_emb_proj"])
    if kind == "float":
        model = UNet2DModel.from_pretrained(
            float_dir, torch_dtype=torch.bfloat16, quantization_config=PQCADConfig(method="fixed")
        )
    elif kind == "quantized":
        model = UNet2DModel.from_pretrained(quantized_dir, torch_dtype=torch.bfloat16)
    else:
        model = from_single_file(single_file_dir, PQCADConfig(method="fixed"), torch_dtype=torch.bfloat16)
    assert model.conv_norm_out.weight.dtype == torch.float32
    assert model.conv_in.weight.dtype == torch.bfloat16
    for name, layer in packed_layers(model).items():
        expected = torch.float32 if name.endswith("time_emb_proj") else torch.bfloat16
        assert layer.weight.dtype == expected, name
        assert layer.bias is None or layer.bias.dtype == expected, name


@pytest.mark.fast
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_trap_12_the_config_knows_a_real_dtype_and_does_not_save_it(float_dir, dtype, tmp_path):
    model = UNet2DModel.from_pretrained(float_dir, torch_dtype=dtype, quantization_config=PQCADConfig())
    assert model.config["_pre_quantization_dtype"] == (dtype or torch.float32)
    model.save_pretrained(tmp_path)
    assert "_pre_quantization_dtype" not in json.loads((tmp_path / "config.json").read_text())
    assert model.config.get("_pre_quantization_dtype") in (None, dtype or torch.float32)


def test_trap_12_a_default_dtype_is_not_taken_for_one(float_dir):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = UNet2DModel.from_pretrained(float_dir, quantization_config=PQCADConfig())
    finally:
        torch.set_default_dtype(before)
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float32, torch.uint8, torch.int64}


@pytest.fixture
def quantized_cond():
    return quantize_(tiny_cond_unet(), PQCADConfig())


def call_cond(model):
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 8)).sample


@pytest.mark.fast
def test_trap_16_peft_builds_conv_lora_on_packed_layers(quantized_cond):
    expected = call_cond(quantized_cond)
    with kernels.use("reference"):
        exact = call_cond(quantized_cond)
    count = len(packed_layers(quantized_cond))
    quantized_cond.add_adapter(LoraConfig(r=2, target_modules=["conv1", "to_q"]))
    adapters = [module for name, module in quantized_cond.named_modules() if name.endswith(".lora_A.default")]
    assert {PQCADConv2d, nn.Linear} == {type(module) for module in adapters}
    for module in adapters:
        assert module.weight.requires_grad
        assert not getattr(module, "packed", False)
    assert len(packed_layers(quantized_cond)) == count
    with kernels.use("reference"):  # others may take attention without adapters in bf16
        assert torch.equal(call_cond(quantized_cond), exact)  # lora_B starts at zero
    for name, parameter in quantized_cond.named_parameters():
        if "lora_B" in name:
            nn.init.ones_(parameter)
    assert not torch.allclose(call_cond(quantized_cond), expected)
    quantized_cond.unload_lora()
    assert torch.equal(call_cond(quantized_cond), expected)


def test_trap_17_a_model_whose_lora_was_unloaded_can_be_saved(quantized_cond, tmp_path):
    quantized_cond.add_adapter(LoraConfig(r=2, target_modules=["conv1", "to_q"]))
    quantized_cond.unload_lora()
    quantized_cond.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert_same_tensors(loaded.state_dict(), quantized_cond.state_dict())


@pytest.mark.fast
def test_trap_25_a_config_given_to_a_quantized_checkpoint_changes_nothing_but_warns(tiny_unet, tmp_path):
    quantize_(tiny_unet, PQCADConfig(method="fixed", weight_bits=8)).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="The `quantization_config` from the model will be used"):
        loaded = UNet2DModel.from_pretrained(tmp_path, quantization_config=PQCADConfig(method="fixed", weight_bits=4))
    assert_same_model(loaded, tiny_unet)
    assert {layer.spec.bits for layer in packed_layers(loaded).values()} == {8}


def test_trap_25_bits_are_lowered_through_dequantize(tiny_unet, tmp_path):
    quantize_(tiny_unet, PQCADConfig(method="fixed", weight_bits=8)).save_pretrained(tmp_path / "w8")
    model = UNet2DModel.from_pretrained(tmp_path / "w8")
    quantize_(model.dequantize(), PQCADConfig(method="fixed", weight_bits=4)).save_pretrained(tmp_path / "w4")
    loaded = UNet2DModel.from_pretrained(tmp_path / "w4")
    assert_same_model(loaded, model)
    assert {layer.spec.bits for layer in packed_layers(loaded).values()} == {4}


@pytest.mark.fast
def test_trap_26_a_loaded_model_counts_as_the_float_one(float_dir, quantized_dir):
    plain = UNet2DModel.from_pretrained(float_dir)
    for model in (
        UNet2DModel.from_pretrained(quantized_dir),
        UNet2DModel.from_pretrained(float_dir, quantization_config=PQCADConfig()),
    ):
        assert model.num_parameters() == plain.num_parameters()
        stored = [*model.parameters(), *model.buffers()]
        assert model.get_memory_footprint() == sum(tensor.numel() * tensor.element_size() for tensor in stored)
        assert model.get_memory_footprint() < plain.get_memory_footprint() / 2
        assert model.dequantize().num_parameters() == plain.num_parameters()


@pytest.mark.fast
def test_trap_27_low_cpu_mem_usage_cannot_be_switched_off(float_dir, quantized_dir):
    for directory, options in ((float_dir, {"quantization_config": PQCADConfig()}), (quantized_dir, {})):
        with pytest.raises(ValueError, match="`low_cpu_mem_usage` cannot be False or None when using quantization"):
            UNet2DModel.from_pretrained(directory, low_cpu_mem_usage=False, **options)


# ---- damaged and edited files, and configs that do not fit


def set_scale(value, name="weight_scale"):
    def change(stored):
        stored[f"{LAYER}.{name}"].view(-1)[0] = value

    return change


def replace(name, tensor):
    return lambda stored: stored.update({f"{LAYER}.{name}": tensor})


EDITS = {
    "NaN scale": (set_scale(float("nan")), rf"{LAYER}.weight_scale: scales must be positive and finite"),
    "zero scale": (set_scale(0.0), rf"{LAYER}.weight_scale: scales must be positive and finite"),
    "negative scale": (set_scale(-1.0), rf"{LAYER}.weight_scale: scales must be positive and finite"),
    "infinite scale": (set_scale(float("inf")), rf"{LAYER}.weight_scale: scales must be positive and finite"),
    "zero input scale": (set_scale(0.0, "input_scale"), rf"{LAYER}.input_scale: scales must be positive and finite"),
    "zero point": (set_scale(256, "input_zero_point"), rf"{LAYER}.input_zero_point: .* 0 to 255"),
    "a code that no weight has": (
        lambda stored: stored[f"{LAYER}.qweight"].fill_(255),
        rf"{LAYER}.qweight: holds the code that no weight has",
    ),
    "wrong scale shape": (
        replace("weight_scale", torch.ones(3, 1)),
        rf"{LAYER}.weight_scale: expected shape \(32, 1\)",
    ),
    "wrong weight shape": (
        replace("qweight", torch.zeros(32, 3, dtype=torch.uint8)),
        rf"{LAYER}.qweight: expected shape",
    ),
    "float weights": (lambda stored: stored.update({f"{LAYER}.qweight": stored[f"{LAYER}.qweight"].float()}), "uint8"),
    "wrong bias shape": (replace("bias", torch.zeros(3)), rf"{LAYER}.bias expected shape"),
}


@pytest.mark.parametrize("case", EDITS)
def test_an_edited_file_is_refused(quantized_dir, case):
    change, message = EDITS[case]
    edit_file(quantized_dir, change)
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_pretrained(quantized_dir)


@pytest.mark.parametrize("kept", [0.9, 0.1, 0.0005])
def test_a_truncated_file_is_refused(quantized_dir, kept):
    data = (quantized_dir / WEIGHTS).read_bytes()
    (quantized_dir / WEIGHTS).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(OSError, match="Unable to load weights from checkpoint file"):
        UNet2DModel.from_pretrained(quantized_dir)


def other_width(values):
    bits = values["weight_bits_by_module"]
    bits[LAYER] = 2 if bits[LAYER] != 2 else 8


CONFIG_EDITS = {
    "newer format": (lambda values: values.update(format_version=99), "format_version 99 is newer"),
    "newer format with new keys": (
        lambda values: values.update(format_version=99, new=1),
        "format_version 99 is newer",
    ),
    "unknown key": (lambda values: values.update(bits=4), r"unknown settings \['bits'\]"),
    "bits outside the palette": (lambda values: values["weight_bits_by_module"].update({LAYER: 5}), "expected widths"),
    "layer without bits": (
        lambda values: values["weight_bits_by_module"].pop(LAYER),
        rf"lacks 1 tensors .*{LAYER}.weight",
    ),
    "layer of another model": (
        lambda values: values["weight_bits_by_module"].update(typo=4),
        "the model has no layer 'typo'",
    ),
    "other width": (other_width, rf"{LAYER}.qweight: expected shape"),
    "other group size": (lambda values: values.update(group_size=8), "expected shape"),
    "group size that does not divide": (lambda values: values.update(group_size=7), "group_size=7 must divide"),
    "layer exempted later": (
        lambda values: values["modules_to_not_convert"].append(LAYER),
        rf"weight_bits_by_module: '{LAYER}' is excluded",
    ),
}


@pytest.mark.parametrize("case", CONFIG_EDITS)
def test_an_edited_config_is_refused(quantized_dir, case):
    change, message = CONFIG_EDITS[case]
    edit_config(quantized_dir, change)
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_pretrained(quantized_dir)


MISFITS = {
    "group size": (PQCADConfig(group_size=24), "group_size=24 must divide"),
    "pattern": (PQCADConfig(modules_to_not_convert=["typo"]), "'typo' matches none of the"),
    "bits": (PQCADConfig(weight_bits_by_module={LAYER: 4}), "weight_bits_by_module lacks"),
    "unknown key": ({"quant_method": "pqcad", "bits": 4}, "unknown settings"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_config_that_does_not_fit_the_model_is_refused(float_dir, case):
    config, message = MISFITS[case]
    with pytest.raises(ValueError, match=message):
        UNet2DModel.from_pretrained(float_dir, quantization_config=config)


@pytest.mark.parametrize("method", ["progressive", "fixed"])
def test_nan_weights_are_refused_with_the_name_of_the_layer(float_dir, method):
    edit_file(float_dir, lambda stored: stored[f"{LAYER}.weight"].view(-1)[0].fill_(float("nan")))
    with pytest.raises(ValueError, match=f"{LAYER}: the weights hold a NaN"):
        UNet2DModel.from_pretrained(float_dir, quantization_config=PQCADConfig(method=method))


def test_a_model_with_nothing_to_quantize_is_loaded_with_a_warning(float_dir, tiny_unet):
    config = PQCADConfig(modules_to_not_convert=["*"])
    with pytest.warns(UserWarning, match="UNet2DModel has nothing to quantize"):
        loaded = UNet2DModel.from_pretrained(float_dir, quantization_config=config)
    assert_same_tensors(loaded.state_dict(), tiny_unet.state_dict())


def test_the_quantizer_tells_the_truth_about_itself():
    quantizer = PQCADQuantizer(PQCADConfig())
    assert quantizer.is_serializable
    assert quantizer.is_trainable
    assert quantizer.supports_parallel_loading
    assert not quantizer.requires_calibration


def test_packed_layers_take_no_memory_before_they_are_filled(quantized_dir):
    """What a device map is computed from: the packed sizes, on the meta device."""
    quantizer = PQCADQuantizer(
        PQCADConfig.from_dict(json.loads((quantized_dir / "config.json").read_text())["quantization_config"])
    )
    with init_empty_weights():
        model = UNet2DModel.from_config(UNet2DModel.load_config(quantized_dir))
    quantizer.preprocess_model(model)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"meta"}
    stored = load_file(quantized_dir / WEIGHTS)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in stored.items()
    }


@pytest.mark.slow
@torch.no_grad()
def test_stable_diffusions_unet_at_full_size(tmp_path):
    """860 M parameters, random: quantized while loading, saved small, and the same when it comes back."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768).eval()
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 768)
    expected, num_parameters = unet(x, 500, text).sample, unet.num_parameters()
    assert num_parameters == 859_520_964
    unet.save_pretrained(tmp_path / "float")
    del unet
    model = UNet2DConditionModel.from_pretrained(
        tmp_path / "float", quantization_config=PQCADConfig(method="fixed", weight_bits=8)
    )
    output = model(x, 500, text).sample
    assert (output - expected).norm() / expected.norm() < 0.2
    assert model.num_parameters() == num_parameters
    model.save_pretrained(tmp_path / "quantized")
    del model
    again = UNet2DConditionModel.from_pretrained(tmp_path / "quantized")
    torch.testing.assert_close(again(x, 500, text).sample, output)
    del again
    w4 = UNet2DConditionModel.from_pretrained(tmp_path / "float", quantization_config=PQCADConfig(weight_bits=4))
    assert average_bits(w4)[0] <= 4
    w4.save_pretrained(tmp_path / "w4")
    sizes = {
        name: sum(file.stat().st_size for file in (tmp_path / name).glob("*.safetensors")) for name in ("float", "w4")
    }
    assert sizes["float"] > 6.5 * sizes["w4"]


def test_a_saved_model_is_what_its_config_says_whatever_is_exempt_by_default_today(tiny_unet, tmp_path, monkeypatch):
    quantize_(tiny_unet, PQCADConfig()).save_pretrained(tmp_path)
    monkeypatch.setattr("diffusers_pqcad.loading.config.EXEMPT_MODULES", ("mid_block",))
    assert_same_model(UNet2DModel.from_pretrained(tmp_path), tiny_unet)


def test_a_plain_module_cannot_be_requantized_without_a_config():
    model = quantize_(nn.Sequential(nn.Linear(8, 8)), PQCADConfig())
    with pytest.raises(ValueError, match="Sequential keeps no quantization_config"):
        requantize_(model, PQCADConfig(weight_bits=3))


def test_requantizing_keeps_what_a_student_was_distilled_for(quantized):
    quantized.config["quantization_config"].num_inference_steps = 10
    assert requantize_(quantized, PQCADConfig(weight_bits=3)).config["quantization_config"].num_inference_steps == 10


@pytest.mark.fast
def test_a_zero_point_that_seven_bits_have_not_is_refused() -> None:
    model = quantize_(tiny_cond_unet(), PQCADConfig(method="fixed", weight_bits=8, activation_bits=7))
    layer = next(iter(packed_layers(model).values()))
    qparams = ActivationQParams(torch.tensor([0.1]), torch.tensor([127]))
    layer.set_input_qparams_(qparams, install_timestep_groups(model, ()))
    check_loaded(model)
    layer.input_zero_point.fill_(128)
    with pytest.raises(ValueError, match=rf"{layer.name}.input_zero_point: expected 0 to 127. The file was edited."):
        check_loaded(model)
