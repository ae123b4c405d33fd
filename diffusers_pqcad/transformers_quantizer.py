"""`PQCADTransformersQuantizer`: transformers' hooks for loading and saving, for the text encoders of a pipeline."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from diffusers_pqcad.config import PQCADConfig, matches
from diffusers_pqcad.convert import dequantize_, quantizable_layers
from diffusers_pqcad.layers import DTYPE_MARKER, quantized_layers
from diffusers_pqcad.loading import complete_, prepare_, refuse_disk, refuse_missing


class PQCADTransformersQuantizer(HfQuantizer):
    """As `PQCADQuantizer`, for a transformers model. Embeddings and output layers stay as they are."""

    requires_calibration = False
    quantization_config: PQCADConfig
    pre_quantized: bool

    def __init__(self, quantization_config: PQCADConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)

    def is_serializable(self) -> bool:
        """Packed weights are ordinary tensors: `save_pretrained` writes them."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the layers to adapters, on the reference kernel; packed weights have none."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Packed layers are one operator each in a graph of `torch.compile`."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work; see `refuse_disk`."""
        refuse_disk(kwargs.get("device_map"))

    def _process_model_before_weight_loading(
        self, model: nn.Module, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> nn.Module:
        config, keep_in_fp32 = self.quantization_config, getattr(model, "_keep_in_fp32_modules", None)
        if not self.pre_quantized:
            layers = quantizable_layers(model)
            exempt = self.get_modules_to_not_convert(model, None, keep_in_fp32)
            config.modules_to_not_convert += [
                pattern
                for pattern in sorted(exempt)
                if pattern not in config.modules_to_not_convert and any(matches(name, pattern) for name in layers)
            ]
        prepare_(
            model,
            config,
            pre_quantized=self.pre_quantized,
            dtype=dtype or torch.get_default_dtype(),
            keep_in_fp32_modules=keep_in_fp32,
        )
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        # transformers fills what a checkpoint lacks with anything; what it has loaded carries a mark.
        refuse_missing(
            [
                f"{name}.{tensor_name}"
                for name, layer in quantized_layers(model).items()
                for tensor_name, tensor in [*layer.named_parameters(), *layer.named_buffers()]
                if tensor_name != DTYPE_MARKER and not getattr(tensor, "_is_hf_initialized", False)
            ]
        )
        self.quantization_config = complete_(model, self.quantization_config, pre_quantized=self.pre_quantized)
        self.pre_quantized = True
        model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize_(model)
