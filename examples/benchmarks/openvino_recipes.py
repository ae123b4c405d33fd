"""OpenVINO and NNCF as their documentation says: conversion, three ways to int8, and compilation.

All take and return an OpenVINO model. Packages are imported where they are used: `harness` says who is absent.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Recipe = Callable[[Any, list[tuple[Tensor, ...]]], Any]


def converted(module: nn.Module, inputs: tuple[Tensor, ...]) -> Any:
    """Return `module` as an OpenVINO model of static shapes, those of `inputs`."""
    import openvino as ov

    model = ov.convert_model(module, example_input=inputs)
    model.reshape({number: list(tensor.shape) for number, tensor in enumerate(inputs)})
    return model


def dataset(model: Any, calibration: list[tuple[Tensor, ...]]) -> Any:
    """Return `calibration` as NNCF takes it, by the names of the model's inputs."""
    import nncf

    names = [port.any_name for port in model.inputs]
    return nncf.Dataset([dict(zip(names, map(as_array, inputs), strict=True)) for inputs in calibration])


def default_preset(model: Any, calibration: list[tuple[Tensor, ...]]) -> Any:
    """Return `model` quantized by NNCF without saying what it is."""
    import nncf

    return nncf.quantize(model, dataset(model, calibration), subset_size=len(calibration))


def transformer_preset(model: Any, calibration: list[tuple[Tensor, ...]]) -> Any:
    """Return `model` quantized as NNCF documents it for transformers: mixed preset, SmoothQuant at its default."""
    import nncf

    return nncf.quantize(
        model,
        dataset(model, calibration),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(calibration),
    )


def hybrid(model: Any, calibration: list[tuple[Tensor, ...]]) -> Any:
    """Return `model` quantized as optimum-intel does it for diffusion models.

    Products with constant weights and embeddings keep float activations, their weights in 8 bits; convolutions get
    int8 activations too, without SmoothQuant.
    """
    import nncf

    names = weight_operations(model)
    has_convolutions = any(node.get_type_name() == "Convolution" for node in model.get_ops())
    scope = nncf.IgnoredScope(types=["Convolution"]) if has_convolutions else nncf.IgnoredScope()
    compressed = nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_ASYM, ignored_scope=scope)
    smooth_quant = nncf.AdvancedSmoothQuantParameters(matmul=-1)
    return nncf.quantize(
        compressed,
        dataset(model, calibration),
        preset=nncf.QuantizationPreset.MIXED,
        model_type=nncf.ModelType.TRANSFORMER,
        ignored_scope=nncf.IgnoredScope(names=names),
        subset_size=len(calibration),
        advanced_parameters=nncf.AdvancedQuantizationParameters(smooth_quant_alphas=smooth_quant),
    )


def weight_operations(model: Any) -> list[str]:
    """Return the names of the products with constant weights, and of the lookups in constant tables."""
    names = []
    for node in model.get_ops():
        ports = {"MatMul": (0, 1), "Gather": (0,)}.get(node.get_type_name(), ())
        if any(is_constant_float(node.input_value(port).get_node()) for port in ports):
            names.append(node.get_friendly_name())
    return names


def is_constant_float(node: Any) -> bool:
    """Return whether `node` is a constant of floats, also one that is converted or reshaped."""
    while node.get_type_name() in ("Convert", "Reshape"):
        node = node.input_value(0).get_node()
    return node.get_type_name() == "Constant" and node.get_element_type().is_real()


def compiled(model: Any, precision: str) -> Callable[[tuple[Tensor, ...]], list[Tensor]]:
    """Return a function that computes `model` on the CPU in as many threads as PyTorch has, "f32" or "bf16"."""
    import openvino as ov

    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compute = ov.Core().compile_model(model, "CPU", options)

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        outputs = compute(dict(enumerate(map(as_array, inputs))))
        return [torch.from_numpy(outputs[number]) for number in range(len(compute.outputs))]

    return run


def as_array(tensor: Tensor) -> np.ndarray:
    """Return `tensor` as numpy has it."""
    return tensor.detach().numpy()
