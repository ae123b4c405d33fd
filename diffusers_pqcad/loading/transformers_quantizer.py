"""`PQCADTransformersQuantizer`: transformers' hooks for loading and saving, for the text encoders of a pipeline."""

import copy
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.loading.convert import dequantize_, unmark_quantized_
from diffusers_pqcad.loading.placeholders import (
    complete_,
    holds_floats,
    placeholders,
    refuse_disk,
    refuse_misfit,
    refuse_missing,
    refuse_other_version,
    saved_tensors,
    swap_in_placeholders_,
)


class PQCADTransformersQuantizer(HfQuantizer):
    """As `PQCADQuantizer`, for a transformers model; see `with_model_exemptions` for what stays as it is."""

    requires_calibration = False
    quantization_config: PQCADConfig
    pre_quantized: bool

    def __init__(self, quantization_config: PQCADConfig, **kwargs: Any) -> None:
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.holds_floats = False  # the checkpoint, whatever its config says
        self.placeholders: dict[str, Tensor] = {}

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
        self,
        model: nn.Module,
        dtype: torch.dtype | None = None,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        if self.pre_quantized and checkpoint_files and checkpoint_files[0].endswith(".safetensors"):
            names = tensor_names(checkpoint_files)
            refuse_other_version(names, self.quantization_config)
            self.holds_floats = holds_floats(names, checkpoint_files[0], self.quantization_config)
        if self.holds_floats:
            return model
        self.quantization_config = swap_in_placeholders_(
            model,
            self.quantization_config,
            pre_quantized=self.pre_quantized,
            dtype=dtype or torch.get_default_dtype(),
            # As transformers does: the list names what overflows in fp16.
            keep_in_fp32_modules=getattr(model, "_keep_in_fp32_modules", None) if dtype == torch.float16 else None,
        )
        self.placeholders = placeholders(model)
        return model

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Return the dtype that a tensor of a file is cast to, `dtype`; raises ValueError for packed ones of others.

        The one place where transformers shows what a file holds: a tensor, or a slice of safetensors, not read yet.
        """
        name = converter.target_patterns[0]
        if name in self.placeholders:
            shape = param.get_shape() if hasattr(param, "get_shape") else param.shape
            found = param[:0].dtype if shape else param[...].dtype  # of no elements: a slice does not say it
            refuse_misfit(name, found, shape, self.placeholders[name])
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.holds_floats:
            self.remove_quantization_config(model)
            unmark_quantized_(model)
            return model
        if self.pre_quantized:
            # transformers fills what a checkpoint lacks with anything; what it has loaded or tied carries a mark.
            tensors = saved_tensors(model)
            refuse_missing([name for name in tensors if not getattr(tensors[name], "_is_hf_initialized", False)])
        self.quantization_config = complete_(model, self.quantization_config, pre_quantized=self.pre_quantized)
        self.pre_quantized, self.placeholders = True, {}
        model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        return dequantize_(model)


def tensor_names(files: list[str]) -> list[str]:
    """Return the names of the tensors in safetensors `files`."""
    names: list[str] = []
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            names += tensors.keys()
    return names
