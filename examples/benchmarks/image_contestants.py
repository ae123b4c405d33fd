"""What takes part in `image.py`: each makes its files once from those of the stock pipeline, and loads them.

A pipeline is one of diffusers throughout. Where another runtime computes a part, a stand-in of that part calls it.
"""

import gc
import types
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import contestants
import openvino_recipes
import text_to_image
import torch
from contestants import STOCK, Inputs, Plain
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTokenizer
from transformers.modeling_outputs import BaseModelOutput

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.layers.find import packed_layers

NUM_CALIBRATION_IMAGES = 2
TEXTS = ("text_encoder", "text_encoder_2")


class Case(NamedTuple):
    """What is asked for: the files of the stock pipeline, pixels, steps, guidance, and which autoencoder."""

    folder: Path
    size: int
    num_inference_steps: int
    guidance_scale: float
    vae: str  # "kl" or "tiny"

    def name(self) -> str:
        """Return a folder's name for what is made for this case alone."""
        return f"{self.size}-{self.num_inference_steps}-{self.guidance_scale}-{self.vae}"


class ImageContestant(NamedTuple):
    """Makes what it loads, once (outside of all times), and loads it."""

    prepare: Callable[[Case], None]
    load: Callable[[Case], Any]


def call(pipeline: Any, case: Case, seed: int, **options: Any) -> Any:
    """Return the image (H, W, 3) of `pipeline` from the noise of `seed`, in [0, 1]."""
    pipeline.set_progress_bar_config(disable=True)
    latents = text_to_image.draw_latents(case.size, seed).to(pipeline.unet.dtype)
    return pipeline(
        text_to_image.PROMPT,
        height=case.size,
        width=case.size,
        num_inference_steps=case.num_inference_steps,
        guidance_scale=case.guidance_scale,
        latents=latents,
        output_type="np",
        **options,
    ).images[0]


# Stock and ours


def load_floats(case: Case, dtype: torch.dtype) -> Any:
    """Return the stock pipeline in `dtype`."""
    return text_to_image.load(case.folder, case.vae, dtype)


def ours_folder(case: Case, weight_bits: int, activation_bits: int, components: tuple[str, ...]) -> Path:
    """Return where a quantized pipeline is; one with the tiny autoencoder has it as its own."""
    name = "-".join(("ours", f"w{weight_bits}a{activation_bits}", *components, case.vae))
    return case.folder.with_name(f"{case.folder.name}-{name}")


def save_ours(case: Case, weight_bits: int, activation_bits: int, components: tuple[str, ...]) -> None:
    """Write the pipeline with `components` quantized; ranges of activations come from each call."""
    folder = ours_folder(case, weight_bits, activation_bits, components)
    if (folder / "model_index.json").exists():
        return
    pipeline = load_floats(case, torch.float32)
    for name in components:
        for each in (name, f"{name}_2"):  # SDXL has a second text encoder
            if getattr(pipeline, each, None) is not None:
                config = PQCADConfig(method="fixed", weight_bits=weight_bits, activation_bits=activation_bits)
                quantize_(getattr(pipeline, each), config)
    pipeline.save_pretrained(folder)


def load_ours(case: Case, weight_bits: int, activation_bits: int, components: tuple[str, ...]) -> Any:
    """Return the quantized pipeline, as `from_pretrained` loads it."""
    folder = ours_folder(case, weight_bits, activation_bits, components)
    return text_to_image.pipeline_class(folder).from_pretrained(folder)


def load_ours_for_low_memory(case: Case, **options: Any) -> Any:
    """Return the pipeline of `load_ours`, whose kernels unpack weights in each call: no int8 copies are kept."""
    pipeline = load_ours(case, **options)
    for model in pipeline.components.values():
        if isinstance(model, nn.Module):
            for layer in packed_layers(model).values():
                layer.is_memory_short = True
    return pipeline


# Stand-ins


class StandIn(nn.Module):
    """A part of a pipeline that something else computes: what the pipeline asks of a model, and a function."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self, compute: Callable[[Inputs], Any], config: Any) -> None:
        super().__init__()
        self.compute, self.config = compute, config


class Denoiser(StandIn):
    """In place of a UNet2DConditionModel."""

    def __init__(self, compute: Callable[[Inputs], Any], config: Any) -> None:
        super().__init__(compute, config)
        width = config.get("projection_class_embeddings_input_dim")  # SDXL's pipeline compares it
        self.add_embedding = types.SimpleNamespace(linear_1=types.SimpleNamespace(in_features=width))

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **options: Any) -> Any:
        inputs = denoiser_inputs(sample, timestep, encoder_hidden_states, **options)
        inputs = tuple(tensor.float() if tensor.is_floating_point() else tensor for tensor in inputs)
        return (self.compute(inputs).to(self.dtype),)


class Decoder(StandIn):
    """In place of an autoencoder, of which a pipeline only decodes."""

    def decode(self, latents: Tensor, **options: Any) -> Any:
        return (self.compute((latents.float(),)),)


class TextEncoder(StandIn):
    """In place of a text encoder: its first output, and where SDXL asks for it the last hidden state but one."""

    def forward(self, input_ids: Tensor, **options: Any) -> Any:
        first, *hidden = self.compute((input_ids,))
        return BaseModelOutput(last_hidden_state=first, hidden_states=(*hidden, *hidden) or None)


def denoiser_inputs(
    sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: Any = None, **options: Any
) -> Inputs:
    """Return the tensors of a pipeline's call of its UNet, in the order of `contestants.INPUT_NAMES`."""
    added = added_cond_kwargs or {}
    return sample, timestep, encoder_hidden_states, *(added[name] for name in contestants.INPUT_NAMES[3:] if added)


@contextmanager
def recorded(module: Any, method: str, calls: list[Any]) -> Any:
    """Inside the block, what `module.method` is called with goes to `calls`, as arguments and options."""
    inner = getattr(module, method)

    def record(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return inner(*args, **options)

    setattr(module, method, record)
    yield
    delattr(module, method)


class Calibration(NamedTuple):
    """Inputs of each part, as the stock pipeline calls it while it makes a few images."""

    denoiser: list[Inputs]
    decoder: list[Inputs]
    texts: dict[str, Inputs]  # by the encoder's name


@torch.no_grad()
def record_calls(pipeline: Any, case: Case) -> Calibration:
    """Return what the parts of `pipeline` see, in images of other seeds than the one that is measured."""
    steps: list[Any] = []
    latents: list[Any] = []
    for number in range(NUM_CALIBRATION_IMAGES):
        with recorded(pipeline.unet, "forward", steps), recorded(pipeline.vae, "decode", latents):
            call(pipeline, case, seed=1000 + number)
    return Calibration(
        [denoiser_inputs(*args, **options) for args, options in steps],
        [args[:1] for args, _ in latents],
        {name: (token_ids(pipeline, name),) for name in TEXTS if getattr(pipeline, name, None) is not None},
    )


def token_ids(pipeline: Any, name: str) -> Tensor:
    """Return the prompt as the text encoder `name` sees it."""
    tokenizer = getattr(pipeline, name.replace("text_encoder", "tokenizer"))
    return tokenizer(text_to_image.PROMPT, padding="max_length", return_tensors="pt").input_ids


# Others


class Decode(nn.Module):
    """An autoencoder's decoding, for exporters."""

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]


class Encode(nn.Module):
    """A text encoder's outputs that a pipeline reads, for exporters: all of SD's, and SDXL's with hidden states."""

    def __init__(self, encoder: nn.Module, *, hidden: bool) -> None:
        super().__init__()
        self.encoder, self.hidden = encoder, hidden

    def forward(self, input_ids: Tensor) -> Any:
        output = self.encoder(input_ids, output_hidden_states=self.hidden)
        return (output[0], output.hidden_states[-2]) if self.hidden else output[0]


def openvino_folder(case: Case) -> Path:
    """Return where the files of OpenVINO for this case are: its shapes are static."""
    return case.folder.with_name(f"{case.folder.name}-openvino-{case.name()}")


def save_openvino(case: Case) -> None:
    """Write UNet and decoder quantized by the recipe for transformers, and the text encoders in floating point."""
    import openvino as ov

    folder = openvino_folder(case)
    if (folder / "done").exists():
        return
    pipeline = load_floats(case, torch.float32)
    calibration = record_calls(pipeline, case)
    hidden = len(calibration.texts) > 1
    with torch.no_grad():
        for name, inputs in calibration.texts.items():
            encode = Encode(getattr(pipeline, name), hidden=hidden)
            ov.save_model(openvino_recipes.converted(encode, inputs), folder / f"{name}.xml")
        parts = {
            "unet": (Plain(pipeline.unet), calibration.denoiser),
            "vae": (Decode(pipeline.vae), calibration.decoder),
        }
        del pipeline
        for name in list(parts):
            module, inputs = parts.pop(name)
            model = openvino_recipes.converted(module, inputs[0])
            del module  # large ones would be in memory three times
            gc.collect()
            ov.save_model(openvino_recipes.transformer_preset(model, inputs), folder / f"{name}.xml")
    (folder / "done").touch()


def load_openvino(case: Case) -> Any:
    """Return a pipeline whose models OpenVINO computes in bf16 and int8."""
    import openvino as ov

    def compute(name: str) -> Callable[[Inputs], list[Tensor]]:
        model = ov.Core().read_model(openvino_folder(case) / f"{name}.xml")
        return openvino_recipes.compiled(model, "bf16")

    texts = {
        name: TextEncoder(compute(name), CLIPTextConfig.from_pretrained(case.folder / name))
        for name in TEXTS
        if (case.folder / name).exists()
    }
    return assembled(case, first_of(compute("unet")), Decoder(first_of(compute("vae")), vae_config(case)), texts)


def first_of(compute: Callable[[Inputs], list[Tensor]]) -> Callable[[Inputs], Tensor]:
    """Return `compute` with its first output alone."""
    return lambda inputs: compute(inputs)[0]


def vae_config(case: Case) -> Any:
    """Return the config of the case's autoencoder, as a pipeline reads it."""
    kind, name = (AutoencoderTiny, text_to_image.TINY_VAE) if case.vae == "tiny" else (AutoencoderKL, "vae")
    with torch.device("meta"):
        return kind.from_config(kind.load_config(case.folder / name)).config


def assembled(case: Case, compute: Callable[[Inputs], Tensor], vae: Any, texts: dict[str, Any]) -> Any:
    """Return a pipeline of the case's class: a denoiser by `compute`, in the dtype of `vae`, and text encoders."""
    with torch.device("meta"):
        config = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(case.folder / "unet")).config
    names = {name: name.replace("text_encoder", "tokenizer") for name in texts}
    tokenizers = {name: CLIPTokenizer.from_pretrained(case.folder / name) for name in names.values()}
    denoiser = Denoiser(compute, config)
    denoiser.dtype = vae.dtype
    parts = {"unet": denoiser, "vae": vae, "scheduler": text_to_image.scheduler(), **texts, **tokenizers}
    kind = text_to_image.pipeline_class(case.folder)
    if len(texts) > 1:
        return kind(**parts, add_watermarker=False)
    return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def load_pt2e(case: Case) -> Any:
    """Return the bf16 pipeline with a UNet that is exported, calibrated and compiled here: none of it can be saved."""
    stock = load_floats(case, torch.float32)
    calibration = record_calls(stock, case).denoiser
    compute = contestants.pt2e(stock.unet, calibration).step
    compute(calibration[0])  # compiles
    del stock
    pipeline = load_floats(case, torch.bfloat16)
    texts = {name: getattr(pipeline, name) for name in TEXTS if getattr(pipeline, name, None) is not None}
    return assembled(case, compute, pipeline.vae, texts)


def ours(
    weight_bits: int, activation_bits: int, *components: str, load: Callable[..., Any] = load_ours
) -> ImageContestant:
    """Return our contestant of a width and of quantized components."""
    options = {"weight_bits": weight_bits, "activation_bits": activation_bits, "components": components}
    return ImageContestant(partial(save_ours, **options), partial(load, **options))  # type: ignore[arg-type]


def nothing(case: Case) -> None:
    """What has no files of its own."""


CONTESTANTS: dict[str, ImageContestant] = {
    STOCK: ImageContestant(nothing, partial(load_floats, dtype=torch.float32)),
    "stock diffusers, bf16": ImageContestant(nothing, partial(load_floats, dtype=torch.bfloat16)),
    "W8A8 UNet": ours(8, 8, "unet"),
    "W8A8 UNet, VAE": ours(8, 8, "unet", "vae"),
    "W8A8 UNet, VAE, text": ours(8, 8, "unet", "vae", "text_encoder"),
    "W8A7 UNet, VAE, text": ours(8, 7, "unet", "vae", "text_encoder"),
    "W4A8 UNet, VAE, text": ours(4, 8, "unet", "vae", "text_encoder"),
    "W4A8 UNet, VAE, text, low memory": ours(4, 8, "unet", "vae", "text_encoder", load=load_ours_for_low_memory),
    "W4A7 UNet, VAE, text": ours(4, 7, "unet", "vae", "text_encoder"),
    "OpenVINO int8, transformer preset": ImageContestant(save_openvino, load_openvino),
    "PT2E X86 Inductor int8, bf16": ImageContestant(nothing, load_pt2e),
}
