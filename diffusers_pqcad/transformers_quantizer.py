"""`PQCADTransformersQuantizer`: transformers' hooks for loading and saving, for the text encoders of a pipeline."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer

from diffusers_pqcad.config import PQCADConfig
from diffusers_pqcad.convert import dequantize_
from diffusers_pqcad.loading import complete_, prepare_, refuse_disk, refuse_missing


class PQCADTransformersQuantizer(HfQuantizer):
    """As `PQCADQuantizer`, for a transformers model; see `with_model_exemptions` for what stays as it is."""

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
        self.quantization_config = prepare_(
            model,
            self.quantization_config,
            pre_quantized=self.pre_quantized,
            dtype=dtype or torch.get_default_dtype(),
            # As transformers does: the list names what overflows in fp16.
            keep_in_fp32_modules=getattr(model, "_keep_in_fp32_modules", None) if dtype == torch.float16 else None,
        )
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.pre_quantized:
            # transformers fills what a checkpoint lacks with anything; what it has loaded or tied carries a mark.
            tensors = model.state_dict(keep_vars=True)
            refuse_missing([name for name in tensors if not getattr(tensors[name], "_is_hf_initialized", False)])
        self.quantization_config = complete_(model, self.quantization_config, pre_quantized=self.pre_quantized)
        self.pre_quantized = True
        model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize_(model)
