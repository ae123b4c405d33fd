"""`PQCADQuantizer`: diffusers' hooks for loading and saving, and nothing else."""

import copy
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from diffusers_pqcad.layers.checksums import CHECKSUM
from diffusers_pqcad.layers.quantized import QuantizedLayer
from diffusers_pqcad.layers.stored_state import SCALE_BUFFERS
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.loading.convert import dequantize_, replace_config_, unmark_quantized_
from diffusers_pqcad.loading.placeholders import (
    check_loaded,
    complete_,
    holds_floats,
    placeholders,
    refuse_disk,
    refuse_misfit,
    refuse_missing,
    refuse_other_version,
    swap_in_placeholders_,
)


class PQCADQuantizer(DiffusersQuantizer):
    """Quantizes a float checkpoint while diffusers loads it; fills a saved quantized model as it is."""

    use_keep_in_fp32_modules = True
    requires_calibration = False
    required_packages = None
    quantization_config: PQCADConfig

    def __init__(self, quantization_config: PQCADConfig, **kwargs: Any) -> None:
        # A copy: diffusers hands over the user's own object, and would store it in the model.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.torch_dtype = torch.float32
        self.holds_floats = False  # the checkpoint, whatever its config says
        self.placeholders: dict[str, Tensor] = {}

    @property
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

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype of everything that stays in floating point: float32 unless asked otherwise."""
        self.torch_dtype = torch.float32 if torch_dtype is None else torch_dtype
        return self.torch_dtype

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Note whether the checkpoint of a model that says it is quantized holds floats; see `holds_floats`."""
        if self.pre_quantized:
            refuse_other_version(loaded_keys, self.quantization_config)
            self.holds_floats = holds_floats(loaded_keys, str(checkpoint_files[0]), self.quantization_config)
        return loaded_keys

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        state_dict: dict[str, Tensor] | None = None,
        keep_in_fp32_modules: list[str] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        if self.holds_floats:
            return model
        if state_dict is not None:
            # from_single_file claims that everything is pre-quantized; the file itself knows.
            self.pre_quantized = any(key.endswith(".qweight") for key in state_dict)
            if self.pre_quantized and not any(key.endswith(f".{CHECKSUM}") for key in state_dict):
                self.quantization_config.format_version = 1  # which the config of a user does not know
        self.quantization_config = swap_in_placeholders_(
            model,
            self.quantization_config,
            pre_quantized=self.pre_quantized,
            dtype=self.torch_dtype,
            keep_in_fp32_modules=keep_in_fp32_modules,
        )
        self.placeholders = placeholders(model)
        if state_dict is not None:  # of from_single_file, which asked before there was a model
            self.maybe_update_state_dict(state_dict)
        return model

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors of a file as they are; raises ValueError for packed ones of another dtype or shape."""
        for name in state_dict.keys() & self.placeholders.keys():
            refuse_misfit(name, state_dict[name].dtype, state_dict[name].shape, self.placeholders[name])
        return state_dict

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """Raise ValueError for tensors that the checkpoint lacks: with a device map, diffusers would crash on them."""
        expected = model.state_dict()
        refuse_missing(sorted(name for name in missing_keys if expected[name].device.type == "meta"))
        return missing_keys

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Any], **kwargs: Any
    ) -> bool:
        """Return whether `param_name` is a scale, which the loader would round to its dtype."""
        module_name, _, tensor_name = param_name.rpartition(".")
        return tensor_name in SCALE_BUFFERS and isinstance(model.get_submodule(module_name), QuantizedLayer)

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Store the scale as it stands in the file, in fp32: `param_value` was rounded to the loader's dtype."""
        module_name, _, tensor_name = param_name.rpartition(".")
        scale = state_dict[param_name].to(target_device, torch.float32)
        model.get_submodule(module_name)._buffers[tensor_name] = scale

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.holds_floats:
            check_loaded(model)
            unmark_quantized_(model)
            return model
        self.quantization_config = complete_(model, self.quantization_config, pre_quantized=self.pre_quantized)
        self.pre_quantized, self.placeholders = True, {}
        # Not by attribute: only the entry is saved, and the single-file path has none.
        replace_config_(model, {**model.config, "quantization_config": self.quantization_config})  # type: ignore[dict-item]
        return model

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Any], safe_serialization: bool = False
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """Return what `save_pretrained` writes; raises ValueError while peft adapters are on the layers.

        Their presence renames every adapted layer, and no loader would understand the file.
        """
        adapted = [name for name in state_dict if ".base_layer." in name]
        if adapted:
            raise ValueError(
                f"the model carries adapters (such as on {adapted[0].split('.base_layer.')[0]}), and would be saved "
                "under names that no loader knows. Save the adapters with save_lora_adapter() or save_lora_weights(), "
                "then call unload_lora() and save the model."
            )
        return state_dict, {}

    def _dequantize(self, model: nn.Module) -> nn.Module:
        return dequantize_(model)
