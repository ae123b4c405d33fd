"""Specification: a model quantized in memory is the one that `from_pretrained(quantization_config=...)` makes.

The same layers, bits, tensors and config, for diffusers' models and for transformers'; and what is saved comes back.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from families import FAMILIES, build, call
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, quantize_, requantize_
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.loading.convert import quantizable_layers
from diffusers_pqcad.loading.depth import shortcuts_at_the_output

CONFIGS = {
    "progressive": PQCADConfig(weight_bits=4),
    "fixed": PQCADConfig(method="fixed", weight_bits=4),
}
BLOCKS = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CLIP_TEXT = BLOCKS | {"vocab_size": 40, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 2}
VISION = BLOCKS | {"image_size": 8, "patch_size": 4}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
LANGUAGE = BLOCKS | {"vocab_size": 40, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
EXPERTS = LANGUAGE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
QWEN_VL = {
    "text_config": LANGUAGE | {"rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
    "vision_config": {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16,
        "patch_size": 4, "fullatt_block_indexes": [0],
    },
}  # fmt: skip
# By name: how to build the model, and which of its layers stay in floating point beside those of no kind of ours.
MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "CLIPTextModel": (lambda: hf.CLIPTextModel(hf.CLIPTextConfig(**CLIP_TEXT)), set()),
    "CLIPTextModelWithProjection": (
        lambda: hf.CLIPTextModelWithProjection(hf.CLIPTextConfig(**CLIP_TEXT, projection_dim=8)),
        {"text_projection"},
    ),
    "CLIPVisionModelWithProjection": (
        lambda: hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**VISION, projection_dim=8)),
        {"vision_model.embeddings.patch_embedding", "visual_projection"},
    ),
    "SiglipVisionModel": (
        lambda: hf.SiglipVisionModel(hf.SiglipVisionConfig(**VISION)),
        {"embeddings.patch_embedding", "head.attention.out_proj"},
    ),
    "T5EncoderModel": (lambda: hf.T5EncoderModel(hf.T5Config(**T5, feed_forward_proj="gated-gelu")), set()),
    "T5, tied": (lambda: hf.T5ForConditionalGeneration(hf.T5Config(**T5)), {"lm_head"}),
    "UMT5EncoderModel": (lambda: hf.UMT5EncoderModel(hf.UMT5Config(**T5)), set()),
    "Qwen2, tied": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LANGUAGE, tie_word_embeddings=True)), {"lm_head"}),
    "Qwen2": (lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**LANGUAGE, tie_word_embeddings=False)), {"lm_head"}),
    "Qwen3, tied": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LANGUAGE, tie_word_embeddings=True)), {"lm_head"}),
    "Qwen3": (lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**LANGUAGE, tie_word_embeddings=False)), {"lm_head"}),
    "Qwen3Model": (lambda: hf.Qwen3Model(hf.Qwen3Config(**LANGUAGE)), set()),
    "Llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LANGUAGE)), {"lm_head"}),
    "GPT2LMHeadModel": (lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2)), {"lm_head"}),
    "Qwen3Moe": (lambda: hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**EXPERTS)), {"lm_head"}),
    "Qwen2.5-VL": (
        lambda: hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(**QWEN_VL)),
        {"lm_head", "model.visual.patch_embed.proj"},
    ),
}
WITHOUT_LAYERS = ("GPT2LMHeadModel",)


@pytest.fixture(autouse=True)
def fewer_messages() -> None:
    hf.utils.logging.set_verbosity_error()


def language_model(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def assert_same(actual: Any, expected: Any) -> None:
    assert actual.config.quantization_config == expected.config.quantization_config
    assert packed_layers(actual).keys() == packed_layers(expected).keys()
    states = actual.state_dict(), expected.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[1].items():
        assert states[0][name].dtype == tensor.dtype, name
        assert torch.equal(states[0][name], tensor), name


@torch.no_grad()
def output_of(model: Any) -> Tensor:
    if isinstance(model, (hf.CLIPVisionModelWithProjection, hf.SiglipVisionModel)):
        return model(torch.linspace(-1, 1, 192).view(1, 3, 8, 8))[0]
    tokens = torch.arange(6).view(1, 6)
    decoder = {"decoder_input_ids": tokens} if isinstance(model, hf.T5ForConditionalGeneration) else {}
    return model(tokens, **decoder)[0]


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_diffusers_models(family: str, method: str, tmp_path: Path) -> None:
    build(family).save_pretrained(tmp_path / "float")
    model = quantize_(build(family), CONFIGS[method])
    assert_same(type(model).from_pretrained(tmp_path / "float", quantization_config=CONFIGS[method]), model)
    model.save_pretrained(tmp_path / "quantized")
    loaded = type(model).from_pretrained(tmp_path / "quantized")
    assert_same(loaded, model)
    torch.testing.assert_close(call(loaded, family), call(model, family))


@pytest.mark.filterwarnings("ignore:GPT2LMHeadModel has nothing to quantize")
@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_transformers_models(name: str, method: str, tmp_path: Path) -> None:
    language_model(name).save_pretrained(tmp_path / "float")
    model = quantize_(language_model(name), CONFIGS[method])
    layers = {key for key, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d, nn.Conv3d))}
    assert layers - packed_layers(model).keys() == MODELS[name][1]
    assert bool(packed_layers(model)) == (name not in WITHOUT_LAYERS)
    loaded = type(model).from_pretrained(tmp_path / "float", quantization_config=CONFIGS[method])
    assert_same(loaded, model)
    model.save_pretrained(tmp_path / "quantized")
    again = type(model).from_pretrained(tmp_path / "quantized")
    assert_same(again, model)
    torch.testing.assert_close(output_of(again), output_of(model))


@pytest.mark.parametrize("name", ["T5EncoderModel", "UMT5EncoderModel"])
def test_what_overflows_in_fp16_stays_in_fp32(name: str, tmp_path: Path) -> None:
    language_model(name).save_pretrained(tmp_path)
    kind, config, options = type(language_model(name)), CONFIGS["fixed"], {"dtype": torch.float16}
    loaded = kind.from_pretrained(tmp_path, quantization_config=config, **options)
    model = quantize_(kind.from_pretrained(tmp_path, **options), config)
    assert_same(loaded, model)
    dtypes = [{key: layer.weight_dtype for key, layer in packed_layers(each).items()} for each in (loaded, model)]
    assert dtypes[0] == dtypes[1]
    assert set(dtypes[0].values()) == {torch.float16, torch.float32}


def test_a_tied_head_stays_tied(tmp_path: Path) -> None:
    model = quantize_(language_model("Qwen3, tied"), CONFIGS["progressive"])
    requantize_(model, PQCADConfig(method="fixed", weight_bits=3))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    for each in (model, loaded):
        assert each.lm_head.weight is each.model.embed_tokens.weight
    torch.testing.assert_close(output_of(loaded), output_of(model))
    loaded.dequantize()
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


class OwnModel(hf.Qwen3ForCausalLM):
    """Of a user's own module, derived from one of transformers."""


def test_a_class_derived_from_one_of_transformers() -> None:
    torch.manual_seed(0)
    model = quantize_(OwnModel(hf.Qwen3Config(**LANGUAGE, tie_word_embeddings=True)), CONFIGS["fixed"])
    assert "lm_head" not in packed_layers(model)
    assert model.is_quantized
    assert model.config.quantization_config.modules_to_not_convert == ["lm_head"]


def test_the_config_that_was_given_stays_as_it_was() -> None:
    config = PQCADConfig(weight_bits=4)
    quantize_(language_model("Qwen3"), config)
    assert config == PQCADConfig(weight_bits=4)


def test_a_saved_model_whose_config_names_no_layers(tmp_path: Path) -> None:
    """As method "fixed" wrote it when only plain Linear and Conv2d layers were packed, shortcuts at the output too."""

    def video() -> Any:
        from diffusers import UNetSpatioTemporalConditionModel

        torch.manual_seed(0)
        return UNetSpatioTemporalConditionModel(
            sample_size=8, block_out_channels=(32, 32), cross_attention_dim=8, num_attention_heads=2,
            layers_per_block=1, addition_time_embed_dim=4, projection_class_embeddings_input_dim=12,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        )  # fmt: skip

    plain = {name for name, module in video().named_modules() if type(module) is nn.Conv3d}
    shortcuts = set(shortcuts_at_the_output(quantizable_layers(video())))
    assert plain
    assert shortcuts
    config = PQCADConfig(
        method="fixed",
        weight_bits=4,
        modules_to_not_convert=sorted(plain),
        weight_bits_by_module=dict.fromkeys(shortcuts, 4),
    )
    model = quantize_(video(), config)
    assert shortcuts <= packed_layers(model).keys()
    saved = PQCADConfig(method="fixed", weight_bits=4)
    saved.packed_share = model.config.quantization_config.packed_share
    model.register_to_config(quantization_config=saved)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert packed_layers(loaded).keys() == packed_layers(model).keys()
    assert not plain & packed_layers(loaded).keys()
    assert plain <= packed_layers(quantize_(video(), PQCADConfig(weight_bits=4))).keys()


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Llama", hf.LlamaModel),
        ("Qwen3, tied", hf.Qwen3Model),
        ("T5, tied", hf.T5EncoderModel),
    ],
)
def test_a_file_loads_into_the_class_of_a_part(name: str, part: Any, method: str, tmp_path: Path) -> None:
    model = quantize_(language_model(name), CONFIGS[method])
    model.save_pretrained(tmp_path)
    loaded = part.from_pretrained(tmp_path)
    own, theirs = packed_layers(loaded), packed_layers(model)
    assert own
    for key, layer in own.items():
        (found,) = [other for other in theirs if other == key or other.endswith(f".{key}")]
        assert torch.equal(layer.qweight, theirs[found].qweight), key
    loaded.save_pretrained(tmp_path / "again")
    assert packed_layers(part.from_pretrained(tmp_path / "again")).keys() == own.keys()
