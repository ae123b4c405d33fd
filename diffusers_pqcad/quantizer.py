"""`PQCADQuantizer`: diffusers' hooks for loading and saving, and nothing else."""

import copy
from typing import Any

import torch
from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from diffusers_pqcad.config import PQCADConfig
from diffusers_pqcad.convert import decide_config, dequantize_, finish_, match_modules, pack_layers_, swap_
from diffusers_pqcad.layers import SCALE_BUFFERS, QuantizedLayer, packed_layers
from diffusers_pqcad.qparams import ACTIVATION_QMAX
from diffusers_pqcad.timesteps import TimestepGroups


class PQCADQuantizer(DiffusersQuantizer):
    """Swaps layers before loading, packs them after it; a saved quantized model is filled as it is.

    Layers are swapped first, with float placeholders, because device hooks are attached before the post-processing,
    and packed last, because a bit budget needs all the weights.
    """

    use_keep_in_fp32_modules = True
    requires_calibration = False
    required_packages = None
    quantization_config: PQCADConfig

    def __init__(self, quantization_config: PQCADConfig, **kwargs: Any) -> None:
        # A copy: diffusers hands over the user's own object, and would store it in the model.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.torch_dtype = torch.float32

    @property
    def is_serializable(self) -> bool:
        """Packed weights are ordinary tensors: `save_pretrained` writes them."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through the layers to adapters, on the reference kernel; packed weights have none."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a device map that would put packed weights on disk: the loader writes them before they are packed."""
        device_map = kwargs.get("device_map")
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map: a PQCAD model cannot be offloaded to disk while loading. Load it on the CPU, or save it "
                "quantized first; it is several times smaller then."
            )

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """Return the dtype of everything that stays in floating point: float32 unless asked otherwise."""
        self.torch_dtype = torch.float32 if torch_dtype is None else torch_dtype
        return self.torch_dtype

    def _process_model_before_weight_loading(
        self,
        model: nn.Module,
        state_dict: dict[str, Tensor] | None = None,
        keep_in_fp32_modules: list[str] | None = None,
        **kwargs: Any,
    ) -> nn.Module:
        if state_dict is not None:
            # from_single_file claims that everything is pre-quantized; the file itself knows.
            self.pre_quantized = any(key.endswith(".qweight") for key in state_dict)
        config = self.quantization_config
        layers = swap_(model, match_modules(model, config))
        if not self.pre_quantized:
            return model
        groups = None if config.timestep_boundaries is None else TimestepGroups(config.timestep_boundaries)
        for name, layer in layers.items():
            spec = config.weight_spec(name, is_linear=isinstance(layer, nn.Linear))
            layer.allocate_packed_(spec, activation_bits=config.activation_bits, timestep_groups=groups)
            in_fp32 = not set(keep_in_fp32_modules or []).isdisjoint(name.split("."))
            layer.weight_dtype = torch.float32 if in_fp32 else self.torch_dtype
        return model

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

    def check_quantized_param_shape(
        self, param_name: str, current_param: Tensor | torch.Size, loaded_param: Tensor
    ) -> bool:
        """Raise ValueError for a scale of the wrong shape."""
        expected = getattr(current_param, "shape", current_param)
        if tuple(expected) != tuple(loaded_param.shape):
            raise ValueError(
                f"{param_name}: expected shape {tuple(expected)}, got {tuple(loaded_param.shape)}. The file and the "
                "quantization_config of config.json do not belong together."
            )
        return True

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
        if self.pre_quantized:
            check_loaded(model)
        else:
            layers = {
                name: module
                for name, module in model.named_modules()
                if isinstance(module, QuantizedLayer) and not module.packed
            }
            check_loaded(model)
            self.quantization_config = decide_config(layers, self.quantization_config)
            pack_layers_(layers, self.quantization_config)
            self.pre_quantized = True
        finish_(model, self.quantization_config)
        # Not by attribute: only the registered entry is saved, and the single-file path has none.
        model.register_to_config(quantization_config=self.quantization_config)  # type: ignore[operator]
        return model

    def _dequantize(self, model: nn.Module) -> nn.Module:
        return dequantize_(model)


def check_loaded(model: nn.Module) -> None:
    """Raise ValueError for tensors that the checkpoint lacked (diffusers only warns), or that no quantizer wrote."""
    refuse_missing(
        [
            name
            for name, tensor in [*model.named_parameters(), *model.named_buffers()]
            if tensor.device.type == "meta" and not hasattr(model.get_submodule(name.rpartition(".")[0]), "_hf_hook")
        ]
    )
    for name, layer in packed_layers(model).items():
        if layer.qweight.dtype != torch.uint8:
            raise ValueError(f"{name}.qweight: expected uint8, got {layer.qweight.dtype}. The file was edited.")
        if layer.qweight.device.type != "meta":
            low, high = map(int, layer.levels().aminmax())  # at 8 bits the unused code comes out as -128
            if low < -layer.spec.level_max or high > layer.spec.level_max:
                raise ValueError(f"{name}.qweight: holds the code that no weight has. The file was edited.")
        for buffer in (*SCALE_BUFFERS, "input_zero_point"):
            values = layer._buffers[buffer]
            if values is None or values.device.type == "meta":
                continue
            if buffer in SCALE_BUFFERS and not bool(((values > 0) & values.isfinite()).all()):
                raise ValueError(f"{name}.{buffer}: scales must be positive and finite. The file was edited.")
            if buffer not in SCALE_BUFFERS and not bool(((values >= 0) & (values <= ACTIVATION_QMAX)).all()):
                raise ValueError(f"{name}.{buffer}: expected 0 to {ACTIVATION_QMAX}. The file was edited.")


def refuse_missing(missing: list[str]) -> None:
    """Raise ValueError for the tensors that a checkpoint lacks, if there are any."""
    if missing:
        raise ValueError(
            f"the checkpoint lacks {len(missing)} tensors that its config asks for, such as {missing[:3]}. "
            "The file is incomplete, or belongs to another model."
        )
