"""Models made of the parts of a quantized one hold its dequantized weights, also saved and loaded again."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    ControlNetXSAdapter,
    FluxControlNetModel,
    HunyuanDiT2DControlNetModel,
    HunyuanDiT2DModel,
    MotionAdapter,
    QwenImageControlNetModel,
    QwenImageTransformer2DModel,
    SD3ControlNetModel,
    SparseControlNetModel,
    UNet2DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from families import BLOCKS, build
from torch import nn

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.layers.find import packed_layers

pytestmark = pytest.mark.fast
W8 = PQCADConfig(method="fixed", weight_bits=8)
HINT = {"conditioning_embedding_out_channels": (4, 8)}


def sd15() -> UNet2DConditionModel:
    return build("SD-1.5 UNet")


def unet_with_lists() -> UNet2DConditionModel:
    """A UNet with the types of its blocks in a list, as a loaded config has them; SparseCtrl writes to it."""
    return UNet2DConditionModel(**BLOCKS | {"down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"]})


def qwen() -> QwenImageTransformer2DModel:
    return QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


def hunyuan() -> HunyuanDiT2DModel:
    return HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, patch_size=2, activation_fn="gelu-approximate",
        sample_size=8, hidden_size=16, num_layers=4, mlp_ratio=2, cross_attention_dim=8, cross_attention_dim_t5=8,
        pooled_projection_dim=1024, text_len=4, text_len_t5=4,
    )  # fmt: skip


def union(unet: UNet2DConditionModel) -> ControlNetUnionModel:
    return ControlNetUnionModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8))


def with_xs(unet: UNet2DConditionModel) -> UNetControlNetXSModel:
    adapter = ControlNetXSAdapter.from_unet(unet, size_ratio=0.5, conditioning_embedding_out_channels=(4, 8))
    return UNetControlNetXSModel.from_unet(unet, adapter)


def motion(unet: UNet2DConditionModel) -> UNetMotionModel:
    torch.manual_seed(1)
    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4,
        motion_mid_block_layers_per_block=1,
    )  # fmt: skip
    return UNetMotionModel.from_unet2d(unet, adapter)


def flux_controlnet(transformer: nn.Module) -> FluxControlNetModel:
    return FluxControlNetModel.from_transformer(
        transformer, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2
    )


def qwen_controlnet(transformer: nn.Module) -> QwenImageControlNetModel:
    return QwenImageControlNetModel.from_transformer(
        transformer, num_layers=1, attention_head_dim=16, num_attention_heads=2
    )


MADE_OF: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "ControlNet": (sd15, lambda unet: ControlNetModel.from_unet(unet, **HINT)),
    "ControlNetUnion": (lambda: build("SDXL UNet"), union),
    "ControlNet-XS": (lambda: UNet2DConditionModel(attention_head_dim=4, **BLOCKS | {"layers_per_block": 2}), with_xs),
    "SparseControlNet": (unet_with_lists, lambda unet: SparseControlNetModel.from_unet(unet, **HINT)),
    "UNetMotionModel": (sd15, motion),
    "FluxControlNet": (lambda: build("Flux"), flux_controlnet),
    "SD3ControlNet": (lambda: build("SD3"), lambda model: SD3ControlNetModel.from_transformer(model, num_layers=1)),
    "QwenImageControlNet": (qwen, qwen_controlnet),
}


def made(name: str, source: Any) -> Any:
    torch.manual_seed(2)  # for what is new in it
    return MADE_OF[name][1](source)


@pytest.mark.parametrize("name", MADE_OF)
@pytest.mark.filterwarnings("ignore:.*the config holds a quantization_config")
def test_what_is_made_of_a_quantized_model_holds_its_dequantized_weights(name: str, tmp_path: Path) -> None:
    plain = MADE_OF[name][0]()
    quantized = quantize_(copy.deepcopy(plain), W8)
    layers = packed_layers(quantized)
    of_floats, of_quantized = made(name, copy.deepcopy(plain)), made(name, quantized)
    of_dequantized = made(name, copy.deepcopy(quantized).dequantize())
    expected, state = of_dequantized.state_dict(), of_quantized.state_dict()
    assert state.keys() == expected.keys() == of_floats.state_dict().keys()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in state.items())
    assert packed_layers(of_quantized) == {}
    rounded = {
        key: ((tensor - of_floats.state_dict()[key]).norm() / tensor.norm()).item()
        for key, tensor in state.items()
        if not torch.equal(tensor, of_floats.state_dict()[key])
    }
    assert len(rounded) >= min(8, len(layers) // 2)
    assert max(rounded.values()) < 0.01
    of_quantized.save_pretrained(tmp_path)
    loaded = type(of_quantized).from_pretrained(tmp_path)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    assert "quantization_config" not in loaded.config
    assert not getattr(loaded, "is_quantized", False)


def test_a_controlnet_that_reads_the_whole_state_dict_is_refused() -> None:
    """Hunyuan-DiT's loads it with strict=False."""
    transformer = hunyuan()
    HunyuanDiT2DControlNetModel.from_transformer(transformer, transformer_num_layers=4)
    quantize_(transformer, W8)
    with pytest.raises(ValueError, match=r"^text_embedder.*packed integers of a quantized model.*dequantize\(\)"):
        HunyuanDiT2DControlNetModel.from_transformer(transformer, transformer_num_layers=4)
    HunyuanDiT2DControlNetModel.from_transformer(transformer.dequantize(), transformer_num_layers=4)


def test_motion_modules_that_are_packed_are_not_saved_as_a_float_adapter(tmp_path: Path) -> None:
    exempt = PQCADConfig(method="fixed", weight_bits=8, modules_to_not_convert=["motion_modules"])
    quantize_(motion(sd15()), exempt).save_motion_modules(tmp_path / "floats")
    expected = motion(sd15()).state_dict()
    for name, tensor in MotionAdapter.from_pretrained(tmp_path / "floats").state_dict().items():
        assert torch.equal(tensor, expected[name])
    model = quantize_(motion(sd15()), W8)
    with pytest.raises(ValueError, match=r"save_motion_modules: .*motion_modules.* dequantize\(\)"):
        model.save_motion_modules(tmp_path / "packed")
    model.dequantize().save_motion_modules(tmp_path / "dequantized")
    adapter = MotionAdapter.from_pretrained(tmp_path / "dequantized")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in adapter.state_dict().items())


def test_packed_motion_modules_are_loaded_dequantized() -> None:
    torch.manual_seed(3)
    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4,
        motion_mid_block_layers_per_block=1,
    )  # fmt: skip
    quantize_(adapter, W8)
    layers = packed_layers(adapter)
    model = motion(sd15())
    model.load_motion_modules(adapter)
    assert layers
    for name, layer in layers.items():
        assert torch.equal(model.get_parameter(f"{name}.weight"), layer.dequantized_weight())
