"""The peers of `unet_step.py`: each a function from a float UNet to a step, its library imported where it is used.

A step is a function (sample, timestep) -> output. `samples` (a list of model inputs) calibrate those that need it.
"""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

Step = Callable[[Tensor, int], Tensor]
Builder = Callable[[UNet2DModel, list[Tensor], int], Step]


def eager(unet: nn.Module) -> Step:
    """Return a step of a diffusers model."""
    return lambda sample, timestep: unet(sample, timestep, return_dict=False)[0]


class Plain(nn.Module):
    """A UNet of tensors in, tensor out, for exporters."""

    def __init__(self, unet: UNet2DModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        """Return the model's output."""
        return self.unet(sample, timestep, return_dict=False)[0]


def inputs_of(samples: list[Tensor], timestep: int) -> list[dict[str, np.ndarray]]:
    """Return `samples` as named numpy inputs."""
    return [{"sample": sample.numpy(), "timestep": np.array(timestep, np.int64)} for sample in samples]


def torch_compile(unet: UNet2DModel, samples: list[Tensor], timestep: int) -> Step:
    """fp32, compiled by inductor."""
    unet = copy.deepcopy(unet).to(memory_format=torch.channels_last)
    return eager(torch.compile(unet, dynamic=False))  # type: ignore[arg-type]


def torchao_int8(unet: UNet2DModel, samples: list[Tensor], timestep: int) -> Step:
    """int8 weights and dynamic int8 activations of Linear layers; it has none for convolutions."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    unet = copy.deepcopy(unet)
    quantize_(unet, Int8DynamicActivationInt8WeightConfig())
    return eager(unet)


def quanto_int8(unet: UNet2DModel, samples: list[Tensor], timestep: int) -> Step:
    """int8 weights and calibrated int8 activations, convolutions included."""
    from optimum.quanto import Calibration, freeze, qint8, quantize

    unet = copy.deepcopy(unet)
    quantize(unet, weights=qint8, activations=qint8)
    with Calibration(debug=False):
        for sample in samples:
            unet(sample, timestep)
    freeze(unet)
    return eager(unet)


def sdnq_int8(unet: UNet2DModel, samples: list[Tensor], timestep: int, *, matmul: bool) -> Step:
    """int8 weights, convolutions included; with `matmul`, dynamic int8 activations too."""
    from sdnq import sdnq_post_load_quant

    return eager(
        sdnq_post_load_quant(
            copy.deepcopy(unet),
            weights_dtype="int8",
            quant_conv=True,
            use_quantized_matmul=matmul,
            use_quantized_matmul_conv=matmul,
        )
    )


def openvino(unet: UNet2DModel, samples: list[Tensor], timestep: int, *, precision: str, int8: bool) -> Step:
    """OpenVINO on the CPU at an inference precision hint; with `int8`, quantized by NNCF on `samples`."""
    import openvino as ov

    example = (samples[0], torch.tensor(timestep))
    model = ov.convert_model(Plain(unet), example_input=example, input=[list(samples[0].shape), []])
    names = [port.any_name for port in model.inputs]
    if int8:
        import nncf

        data = [dict(zip(names, inputs.values(), strict=True)) for inputs in inputs_of(samples, timestep)]
        model = nncf.quantize(model, nncf.Dataset(data), subset_size=len(data))
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = ov.Core().compile_model(model, "CPU", options)

    def step(sample: Tensor, timestep: int) -> Tensor:
        (inputs,) = inputs_of([sample], timestep)
        return torch.from_numpy(compiled(dict(zip(names, inputs.values(), strict=True)))[0])

    return step


def onnxruntime_int8(unet: UNet2DModel, samples: list[Tensor], timestep: int) -> Step:
    """ONNX Runtime, statically quantized on `samples` (QDQ, uint8 activations, int8 weights per channel)."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs = iter(inputs_of(samples, timestep))

        def get_next(self) -> Any:
            return next(self.inputs, None)

    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "float.onnx"), Path(directory, "int8.onnx")
        example = (samples[0], torch.tensor(timestep))
        torch.onnx.export(Plain(unet), example, source, input_names=["sample", "timestep"], dynamo=True)
        quantize_static(
            source, target, Reader(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    return lambda sample, timestep: torch.from_numpy(session.run(None, *inputs_of([sample], timestep))[0])


PEERS: dict[str, Builder] = {
    "fp32, torch.compile": torch_compile,
    "torchao W8A8 (Linear only)": torchao_int8,
    "quanto W8A8": quanto_int8,
    "SDNQ W8": partial(sdnq_int8, matmul=False),
    "SDNQ W8A8, its matmul": partial(sdnq_int8, matmul=True),
    "OpenVINO fp32": partial(openvino, precision="f32", int8=False),
    "OpenVINO bf16": partial(openvino, precision="bf16", int8=False),
    "OpenVINO + NNCF int8": partial(openvino, precision="f32", int8=True),
    "OpenVINO + NNCF int8, bf16": partial(openvino, precision="bf16", int8=True),
    "ONNX Runtime int8": onnxruntime_int8,
}
