"""Train a text-to-image teacher: emoji, as a StableDiffusionPipeline, or Fashion-MNIST, as a StableDiffusion3Pipeline.

    accelerate launch examples/train_classifier.py --subject emoji
    accelerate launch examples/train_text_to_image.py --subject emoji
    accelerate launch examples/train_text_to_image.py --subject fashion-flow

First the autoencoder, then all latents, once, then the denoiser and its text encoders. Every random draw is a function
of (seed, step), so a run that was killed goes on from its last checkpoint to the same weights. At the end the saved
pipeline is measured with the features of its data, and the card is written; the same command does both again.
"""

import dataclasses
import json
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DiffusionPipeline
from emoji import load_emoji, prompted_emoji
from fashion_mnist import prompted_fashion
from prompted_pictures import PromptedPictures
from small_pipelines import (
    Reconstruction,
    StableDiffusion,
    StableDiffusion3,
    build_tokenizer,
    build_vae,
    latents_of,
    normalized,
    token_ids,
)
from teacher_report import HELD_OUT_FILE, PROMPTS_FILE, write_report
from torch import Tensor, nn
from tqdm.auto import tqdm
from training_loop import Place, Recipe, fit
from transformers import HfArgumentParser

from diffusers_pqcad.compression.checkpoint import load_checkpoint, save_checkpoint
from diffusers_pqcad.compression.extras import require
from diffusers_pqcad.publishing.pipelines import LABELS_FILE

LATENTS_FILE = "latents.safetensors"
NO_PROMPT = 0.1  # of the images, so that the network knows what guidance leads away from


@dataclass(frozen=True)
class Subject:
    """What is learnt, from `load(train_data_dir)`, and by which denoiser; `output_dir` is where the teacher goes.

    `guidance_scale` is the one to sample with; `extractor` the folder of the features that pictures are measured with.
    """

    load: Callable[[str | None], PromptedPictures]
    denoiser: type[StableDiffusion] | type[StableDiffusion3]
    num_train_images: int
    guidance_scale: float
    output_dir: str
    extractor: str


SUBJECTS = {
    "emoji": Subject(
        load=lambda folder: prompted_emoji(load_emoji(folder)),
        denoiser=StableDiffusion,
        num_train_images=480_000,
        guidance_scale=3.0,
        output_dir="examples/models/emoji",
        extractor="examples/models/emoji-features",
    ),
    "fashion-flow": Subject(
        load=prompted_fashion,
        denoiser=StableDiffusion3,
        num_train_images=480_000,
        guidance_scale=3.0,
        output_dir="examples/models/fashion-flow",
        extractor="examples/models/fashion-mnist-features",
    ),
}


@dataclass
class Settings:
    """Settings of one run; the bundled teachers were made with these but for what their cards tell."""

    subject: str = "emoji"  # or fashion-flow
    output_dir: str = ""  # default: examples/models/, by the subject
    train_data_dir: str | None = None  # a folder with the data; default: Debian's packages
    checkpoint_dir: str = ""  # default: in outputs/, by the name of the output folder
    num_train_images: int = 0  # seen by the denoiser, repetitions included; 0: the subject's own number
    num_vae_images: int = 128_000  # seen by the autoencoder
    train_batch_size: int = 64  # per process
    vae_batch_size: int = 32  # per process; smaller, as it is the number of updates that it lacks
    learning_rate: float = 1e-3
    vae_learning_rate: float = 2e-3
    lr_warmup_steps: int = 250
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "bf16"  # bf16 autocast: 1.4 times faster on a CPU with AVX512-BF16
    checkpointing_steps: int = 500
    num_threads: int = 0  # 0: leave torch's own choice
    seed: int = 42
    extractor: str = ""  # a folder of train_classifier.py; default: the subject's. Without it nothing is measured
    num_inference_steps: int = 20  # of the measured pictures
    guidance_scale: float = 0.0  # of the measured pictures; 0: the subject's own
    num_measured_images: int = 1024

    def __post_init__(self) -> None:
        if self.subject not in SUBJECTS:
            raise ValueError(f"subject: expected one of {tuple(SUBJECTS)}, got {self.subject!r}.")
        subject = SUBJECTS[self.subject]
        self.output_dir = self.output_dir or subject.output_dir
        self.checkpoint_dir = self.checkpoint_dir or f"outputs/{Path(self.output_dir).name}-checkpoint"
        self.extractor = self.extractor or subject.extractor
        self.num_train_images = self.num_train_images or subject.num_train_images
        self.guidance_scale = self.guidance_scale or subject.guidance_scale


@dataclass(frozen=True)
class Run:
    """A run under way: its settings, its data, and the processes that share its work."""

    settings: Settings
    data: PromptedPictures
    accelerator: Accelerator

    @property
    def folder(self) -> Path:
        return Path(self.settings.checkpoint_dir)

    def place(self, batch_size: int) -> Place:
        """Return this process's part of updates of `batch_size` images each."""
        return Place(self.settings.seed, batch_size, self.accelerator.process_index, self.accelerator.num_processes)

    def recipe(self, num_images: int, batch_size: int, learning_rate: float) -> Recipe:
        """Return how a network is trained on `num_images`, repetitions included."""
        settings = self.settings
        return Recipe(
            num_steps=num_images // (batch_size * self.accelerator.num_processes),
            batch_size=batch_size,
            learning_rate=learning_rate,
            lr_warmup_steps=settings.lr_warmup_steps,
            max_grad_norm=settings.max_grad_norm,
            ema_decay=settings.ema_decay,
            checkpointing_steps=settings.checkpointing_steps,
        )

    def pixels(self, rows: Tensor) -> Tensor:
        """Return the pictures `rows`, (B, C, H, W) in [-1, 1], on the device."""
        return self.data.draw(rows).to(self.accelerator.device).float() / 127.5 - 1


def train(settings: Settings) -> DiffusionPipeline:
    """Return the trained pipeline, as it is saved, after each stage was resumed where it had been left."""
    require("eval", "torchmetrics")  # for the report, which comes last
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    subject = SUBJECTS[settings.subject]
    run = Run(settings, subject.load(settings.train_data_dir), accelerator)

    vae, vae_loss = train_vae(run)
    latents = encode_all(run, vae)
    measure_latents_(vae, latents, shifts=subject.denoiser.shifts_latents)
    pipeline, loss = train_denoiser(run, vae, latents)
    if accelerator.is_main_process:
        facts = dataclasses.asdict(settings) | {"final_vae_loss": vae_loss, "final_loss": loss}
        facts |= {"torch": torch.__version__, "machine": platform.machine(), "num_pictures": len(run.data)}
        save(pipeline, run, facts)
        write_report(Path(settings.output_dir), run.data)
    return pipeline


def train_vae(run: Run) -> tuple[AutoencoderKL, float]:
    """Return the trained autoencoder, and its final loss."""
    settings = run.settings
    torch.manual_seed(settings.seed)
    _, num_channels, size, _ = run.data.draw(torch.arange(1)).shape
    vae, place = build_vae(num_channels, size), run.place(settings.vae_batch_size)

    def loss_of(model: nn.Module, step: int) -> Tensor:
        return model(run.pixels(place.rows(len(run.data), step)), place.draws(step))

    recipe = run.recipe(settings.num_vae_images, settings.vae_batch_size, settings.vae_learning_rate)
    loss = fit(Reconstruction(vae), loss_of, recipe, run.accelerator, run.folder / "vae", "train autoencoder")
    return vae.eval().requires_grad_(False), loss


def encode_all(run: Run, vae: AutoencoderKL, batch_size: int = 256) -> Tensor:
    """Return the latents of all pictures, (N, C, H, W) fp16: in fp32 they would take twice the memory.

    They are kept in the checkpoint folder, and read from there by a run that goes on.
    """
    path = run.folder / LATENTS_FILE
    if path.exists():
        return load_checkpoint(path)["latents"]
    found = []
    with tqdm(total=len(run.data), desc="encode pictures", unit="image") as bar:
        for rows in torch.arange(len(run.data)).split(batch_size):
            with run.accelerator.autocast():  # three times faster in bf16, at errors of -47 dB
                latents = latents_of(vae, run.pixels(rows))
            found.append(latents.half().cpu())
            bar.update(len(rows))
    latents = torch.cat(found)
    if run.accelerator.is_main_process:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(path, {"latents": latents})
    return latents


def measure_latents_(vae: AutoencoderKL, latents: Tensor, *, shifts: bool, at_most: int = 8192) -> None:
    """Set the factors of `vae` that give `latents` a mean square of one, which is the noise's.

    `shifts`: and a mean of zero, for a pipeline that knows a shift. `at_most` of the latents are looked at.
    """
    some = latents[:: -(-len(latents) // at_most)].double()
    shift = some.mean().item() if shifts else None
    power = (some - (shift or 0.0)).square().mean().item()
    vae.register_to_config(shift_factor=shift, scaling_factor=power**-0.5)


def train_denoiser(run: Run, vae: AutoencoderKL, latents: Tensor) -> tuple[DiffusionPipeline, float]:
    """Return the pipeline with the trained denoiser and text encoders, and its final loss."""
    settings = run.settings
    torch.manual_seed(settings.seed)
    tokenizer = build_tokenizer(run.data.prompts)
    model = SUBJECTS[settings.subject].denoiser(tokenizer, latents.shape[-1])
    place, tokens = run.place(settings.train_batch_size), token_ids(tokenizer, [*run.data.prompts, ""])

    def loss_of(prepared: nn.Module, step: int) -> Tensor:
        rows, draws = place.rows(len(latents), step), place.draws(step)
        prompts = prompts_of(run.data.choices[rows], draws)
        prompts[torch.rand(len(rows), generator=draws) < NO_PROMPT] = len(tokens) - 1
        clean = normalized(vae, latents[rows].float()).to(run.accelerator.device)
        return prepared(clean, tokens[prompts].to(run.accelerator.device), draws)

    recipe = run.recipe(settings.num_train_images, settings.train_batch_size, settings.learning_rate)
    loss = fit(model, loss_of, recipe, run.accelerator, run.folder / "denoiser", "train denoiser")
    return model.eval().pipeline(vae, tokenizer), loss


def prompts_of(choices: Tensor, draws: torch.Generator) -> Tensor:
    """Return one of the prompts of each picture, (B,) of `choices` (B, K)."""
    drawn = torch.randint(0, choices.shape[1], (len(choices), 1), generator=draws)
    return choices.gather(1, drawn).squeeze(1)


def save(pipeline: DiffusionPipeline, run: Run, facts: dict[str, Any]) -> None:
    """Write the pipeline, in half precision but for its text encoders, with its prompts and the recipe beside it.

    transformers computes in the precision of the file, which on a CPU should be fp32.
    """
    folder = Path(run.settings.output_dir)
    for name, component in pipeline.components.items():
        if isinstance(component, nn.Module) and not name.startswith("text_encoder"):
            component.half()
    pipeline.save_pretrained(folder)
    order = torch.randperm(len(run.data.prompts), generator=torch.Generator().manual_seed(run.settings.seed))
    write_lines(folder / PROMPTS_FILE, [run.data.prompts[place] for place in order.tolist()])
    if run.data.held_out_prompts:
        write_lines(folder / HELD_OUT_FILE, run.data.held_out_prompts)
    prompts = [*run.data.prompts, *run.data.held_out_prompts]
    labels = {prompt: run.data.wanted(prompt) for prompt in prompts}
    (folder / LABELS_FILE).write_text(json.dumps(labels, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    facts["num_parameters"] = {
        name: sum(parameter.numel() for parameter in component.parameters())
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module)
    }
    (folder / "training.json").write_text(json.dumps(facts, indent=2) + "\n")


def write_lines(path: Path, lines: Any) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    train(settings)
