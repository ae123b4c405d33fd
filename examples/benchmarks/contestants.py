"""What takes part in the benchmarks: each a function from a float UNet and calibration inputs to a `Contestant`.

The library of a peer is imported where it is used; `PACKAGES` says what that takes, before anything runs.
"""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import openvino_recipes
import torch
from models import Inputs
from torch import Tensor, nn

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.layers.quantized import QuantizedLayer
from diffusers_pqcad.layers.timesteps import install_timestep_groups
from diffusers_pqcad.numerics.qparams import activation_qparams

Step = Callable[[Inputs], Tensor]
STOCK = "stock diffusers, fp32"
INPUT_NAMES = ("sample", "timestep", "encoder_hidden_states", "text_embeds", "time_ids")  # the last two: of SDXL


class Contestant(NamedTuple):
    """A step, and the model behind it where it is one of PyTorch: then its memory is known."""

    step: Step
    unet: nn.Module | None = None


Builder = Callable[[Any, list[Inputs]], Contestant]


def eager(unet: nn.Module, memory_format: torch.memory_format = torch.contiguous_format) -> Contestant:
    """Return a contestant that calls `unet`, its sample in `memory_format` and its inputs in its dtype."""
    dtype = next(unet.parameters()).dtype

    def step(inputs: Inputs) -> Tensor:
        sample, timestep, *context = inputs
        sample = sample.to(dtype, memory_format=memory_format)
        return unet(sample, timestep, *(tensor.to(dtype) for tensor in context), return_dict=False)[0]

    return Contestant(step, unet)


def floating(
    unet: Any, calibration: list[Inputs], *, dtype: torch.dtype = torch.float32, compiled: bool = False
) -> Contestant:
    """The float model in channels_last, also in another dtype or compiled by inductor."""
    unet = copy.deepcopy(unet).to(dtype).to(memory_format=torch.channels_last)
    if compiled:
        unet.compile(dynamic=False)  # the first step takes a minute or more
    return eager(unet, torch.channels_last)


def pqcad(
    unet: Any,
    calibration: list[Inputs],
    *,
    weight_bits: int,
    activation_bits: int = 8,
    static: bool = True,
    compiled: bool = False,
    kernel: str | None = None,
    memory: kernels.Memory = "normal",
) -> Contestant:
    """Ours: packed weights, int8 kernels or a forced one; `static` activation ranges come from `calibration`.

    With `memory="low"`, kernels unpack weights in each call, as they do where memory is short.
    """
    unet = copy.deepcopy(unet)
    quantize_(unet, PQCADConfig(method="fixed", weight_bits=weight_bits, activation_bits=activation_bits))
    for layer in packed_layers(unet).values():
        layer.is_memory_short = memory == "low"
    if kernel is not None:
        unet.forward = forced(unet.forward, kernel)
    contestant = eager(unet)
    if static:
        set_static_ranges_(contestant, calibration)
    if compiled:
        unet.compile(dynamic=False)
    return contestant


def forced(forward: Callable[..., Any], kernel: str) -> Callable[..., Any]:
    """Return `forward` with every quantized layer on `kernel`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        with kernels.use(kernel):
            return forward(*args, **kwargs)

    return run


def set_static_ranges_(contestant: Contestant, calibration: list[Inputs]) -> None:
    """Give the quantized layers of `contestant`, in place, the activation ranges that they see on `calibration`."""
    unet = contestant.unet
    assert unet is not None
    layers = packed_layers(unet)
    lows: dict[str, list[Tensor]] = {name: [] for name in layers}
    highs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def observe(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantizedLayer)
        lows[layer.name].append(args[0].amin())
        highs[layer.name].append(args[0].amax())

    hooks = [layer.register_forward_pre_hook(observe) for layer in layers.values()]
    for inputs in calibration:
        contestant.step(inputs)
    for hook in hooks:
        hook.remove()
    groups = install_timestep_groups(unet, ())  # one group: all timesteps share the ranges
    for name, layer in layers.items():
        low, high = torch.stack(lows[name]).amin().view(1), torch.stack(highs[name]).amax().view(1)
        assert layer.activation_bits is not None
        layer.set_input_qparams_(activation_qparams(low, high, layer.activation_bits), groups)


def torchao_int8(unet: Any, calibration: list[Inputs]) -> Contestant:
    """int8 weights and dynamic int8 activations of Linear layers; it has none for convolutions."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig
    from torchao.quantization import quantize_ as torchao_quantize_

    unet = copy.deepcopy(unet)
    torchao_quantize_(unet, Int8DynamicActivationInt8WeightConfig())
    return eager(unet)._replace(unet=None)


def quanto_int8(unet: Any, calibration: list[Inputs]) -> Contestant:
    """int8 weights and calibrated int8 activations, convolutions included."""
    from optimum.quanto import Calibration, freeze, qint8, quantize

    contestant = eager(copy.deepcopy(unet))
    quantize(contestant.unet, weights=qint8, activations=qint8)
    with Calibration(debug=False):
        for inputs in calibration:
            contestant.step(inputs)
    freeze(contestant.unet)
    return contestant._replace(unet=None)


def sdnq_int8(unet: Any, calibration: list[Inputs], *, matmul: bool) -> Contestant:
    """int8 weights, convolutions included; with `matmul`, dynamic int8 activations too."""
    from sdnq import sdnq_post_load_quant

    unet = sdnq_post_load_quant(
        copy.deepcopy(unet),
        weights_dtype="int8",
        quant_conv=True,
        use_quantized_matmul=matmul,
        use_quantized_matmul_conv=matmul,
    )
    return eager(unet)._replace(unet=None)


class Plain(nn.Module):
    """A UNet of tensors in, tensor out, for exporters."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | None = None,
        text_embeds: Tensor | None = None,
        time_ids: Tensor | None = None,
    ) -> Tensor:
        """Return the model's output."""
        context = () if encoder_hidden_states is None else (encoder_hidden_states,)
        added = {} if text_embeds is None else {"text_embeds": text_embeds, "time_ids": time_ids}
        options = {"added_cond_kwargs": added} if added else {}
        return self.unet(sample, timestep, *context, **options, return_dict=False)[0]


def as_numpy(inputs: Inputs) -> dict[str, np.ndarray]:
    """Return `inputs` as named numpy arrays."""
    return {name: tensor.numpy() for name, tensor in zip(INPUT_NAMES, inputs, strict=False)}


def openvino(
    unet: Any, calibration: list[Inputs], *, precision: str, recipe: openvino_recipes.Recipe | None = None
) -> Contestant:
    """OpenVINO on the CPU at an inference precision hint; with `recipe`, quantized by NNCF on `calibration`."""
    model = openvino_recipes.converted(Plain(unet), calibration[0])
    if recipe is not None:
        model = recipe(model, calibration)
    compute = openvino_recipes.compiled(model, precision)
    return Contestant(lambda inputs: compute(inputs)[0])


def pt2e(unet: Any, calibration: list[Inputs]) -> Contestant:
    """PyTorch's own int8 for x86: exported, static ranges of `calibration`, bf16 between, compiled by inductor."""
    from torch._inductor import config
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer().set_global(x86.get_default_x86_inductor_quantization_config())
    with torch.no_grad():
        prepared = prepare_pt2e(torch.export.export(Plain(unet), calibration[0]).module(), quantizer)
        for inputs in calibration:
            prepared(*inputs)
        compiled = torch.compile(convert_pt2e(prepared), dynamic=False)

    def step(inputs: Inputs) -> Tensor:
        # What is compiled, in the first call, is so with these settings: they are those of its documentation.
        with config.patch(freezing=True), torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            return compiled(*inputs)

    return Contestant(step)


def onnxruntime_int8(unet: Any, calibration: list[Inputs]) -> Contestant:
    """ONNX Runtime, statically quantized on `calibration` (QDQ, uint8 activations, int8 weights per channel)."""
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.inputs = map(as_numpy, calibration)

        def get_next(self) -> Any:
            return next(self.inputs, None)

    with tempfile.TemporaryDirectory() as directory:
        source, target = Path(directory, "float.onnx"), Path(directory, "int8.onnx")
        names = list(INPUT_NAMES[: len(calibration[0])])
        torch.onnx.export(Plain(unet), calibration[0], source, input_names=names, dynamo=True)
        quantize_static(
            source, target, Reader(), per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8
        )
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = ort.InferenceSession(target, options, providers=["CPUExecutionProvider"])
    return Contestant(lambda inputs: torch.from_numpy(session.run(None, as_numpy(inputs))[0]))


# They need nothing but diffusers, and no compilation.
QUICK: dict[str, Builder] = {
    STOCK: lambda unet, calibration: eager(unet),
    "fp32, channels_last": floating,
    "W8A8": partial(pqcad, weight_bits=8),
    "W8A7": partial(pqcad, weight_bits=8, activation_bits=7),
    "W4A8": partial(pqcad, weight_bits=4),
    "W4A7": partial(pqcad, weight_bits=4, activation_bits=7),
    "W4A8, dynamic ranges": partial(pqcad, weight_bits=4, static=False),
    "W4A8, no int8 copies": partial(pqcad, weight_bits=4, kernel="reference"),
    "W4A8, low memory": partial(pqcad, weight_bits=4, memory="low"),
}
CONTESTANTS: dict[str, Builder] = QUICK | {
    "bf16, channels_last": partial(floating, dtype=torch.bfloat16),
    "fp32, torch.compile": partial(floating, compiled=True),
    "W8A8, oneDNN's operators": partial(pqcad, weight_bits=8, kernel="onednn"),
    "W8A8, torch.compile": partial(pqcad, weight_bits=8, compiled=True),
    "W8A7, torch.compile": partial(pqcad, weight_bits=8, activation_bits=7, compiled=True),
    "W4A8, torch.compile": partial(pqcad, weight_bits=4, compiled=True),
    "torchao W8A8 (Linear only)": torchao_int8,
    "quanto W8A8": quanto_int8,
    "SDNQ W8": partial(sdnq_int8, matmul=False),
    "SDNQ W8A8, its matmul": partial(sdnq_int8, matmul=True),
    "PT2E X86 Inductor int8, bf16": pt2e,
    "OpenVINO fp32": partial(openvino, precision="f32"),
    "OpenVINO bf16": partial(openvino, precision="bf16"),
    "OpenVINO int8, transformer preset": partial(
        openvino, precision="bf16", recipe=openvino_recipes.transformer_preset
    ),
    "OpenVINO int8, hybrid": partial(openvino, precision="bf16", recipe=openvino_recipes.hybrid),
    "OpenVINO + NNCF int8": partial(openvino, precision="f32", recipe=openvino_recipes.default_preset),
    "OpenVINO + NNCF int8, bf16": partial(openvino, precision="bf16", recipe=openvino_recipes.default_preset),
    "ONNX Runtime int8": onnxruntime_int8,
}
# By name, as globs: the packages that those of others import, or that what they call imports.
PACKAGES: dict[str, tuple[str, ...]] = {
    "torchao *": ("torchao",),
    "quanto *": ("optimum.quanto",),
    "SDNQ *": ("sdnq",),
    "OpenVINO*": ("openvino",),
    "OpenVINO int8*": ("nncf",),
    "OpenVINO + NNCF *": ("nncf",),
    "PT2E *": ("torchao",),
    "ONNX Runtime *": ("onnx", "onnxruntime", "onnxscript"),
}
# By name, as globs: who stands below a table, beside whom alone (None: always), and why.
FOOTNOTES: dict[str, tuple[str | None, str]] = {
    "OpenVINO + NNCF int8*": ("OpenVINO int8, transformer preset", "as NNCF's default preset is not for such models"),
    "quanto *": (None, "as its library is deprecated"),
}
