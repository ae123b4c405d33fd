"""Train a teacher: a small unconditional UNet2DModel on Fashion-MNIST, or on scikit-learn's digits in two minutes.

    accelerate launch examples/train_teacher.py
    accelerate launch examples/train_teacher.py --prediction_type epsilon --num_train_epochs 12
    accelerate launch examples/train_teacher.py --dataset digits --prediction_type epsilon --output_dir outputs/digits

A linear noise schedule, EMA weights, any number of processes. Every random draw is a function of (seed, step), so a
run that was killed goes on from its last checkpoint to the same weights.
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
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from digits import DIGITS_NOTICE, SKLEARN_ID, load_digits
from fashion_mnist import HUB_ID, LICENCE_NOTICE, load_split
from torch import Tensor, nn
from training_loop import Place, Recipe, fit
from transformers import HfArgumentParser

# What the network learns to say, of (scheduler, clean images, noise, timesteps).
TARGETS: dict[str, Callable[[DDIMScheduler, Tensor, Tensor, Tensor], Tensor]] = {
    "v_prediction": DDIMScheduler.get_velocity,
    "epsilon": lambda scheduler, clean, noise, timesteps: noise,
}


@dataclass(frozen=True)
class Dataset:
    """What is learnt and by which network: images of `size` x `size`, from `load(train_data_dir)`, (N, 1, H, W) uint8.

    `blocks` are the output channels of the network's levels, the last of which has attention; `num_train_epochs` is
    the default; `folder` is where the teacher goes; the others are for its card, and `is_measured` says whether there
    is an extractor of features for it.
    """

    load: Callable[[str | None], Tensor]
    size: int
    blocks: tuple[int, ...]
    attention_head_dim: int
    num_train_epochs: int
    folder: str
    title: str
    hub_id: str
    notice: str
    licence: str
    is_measured: bool


DATASETS = {
    "fashion-mnist": Dataset(
        load=lambda folder: load_split("train", folder)[0],
        size=28,
        blocks=(32, 64, 64),
        attention_head_dim=32,
        num_train_epochs=7,
        folder="examples/models/fashion-mnist",
        title="Fashion-MNIST",
        hub_id=HUB_ID,
        notice=LICENCE_NOTICE,
        licence="mit",
        is_measured=True,
    ),
    "digits": Dataset(
        load=lambda folder: load_digits(),
        size=8,
        blocks=(16, 32, 48),
        attention_head_dim=16,
        num_train_epochs=80,
        folder="outputs/teachers/digits",
        title="digits",
        hub_id=SKLEARN_ID,
        notice=DIGITS_NOTICE,
        licence="cc-by-4.0",
        is_measured=False,
    ),
}


@dataclass
class Settings:
    """Settings of one run; `examples/models/fashion-mnist` was made with these but for what its card tells."""

    dataset: str = "fashion-mnist"  # or digits: 8x8, from scikit-learn, for experiments with many models
    output_dir: str = ""  # default: examples/models/fashion-mnist or outputs/teachers/digits, with -epsilon for that
    train_data_dir: str | None = None  # a folder of IDX files; default: the Debian package, else the Hub
    checkpoint_dir: str = ""  # default: in outputs/, by the name of the output folder
    prediction_type: str = "v_prediction"  # or epsilon, as SD-1.5, SDXL and every DDPM have it
    num_train_epochs: int = 0  # 0: 7 of Fashion-MNIST, 80 of digits
    train_batch_size: int = 64  # per process
    learning_rate: float = 8e-4
    lr_warmup_steps: int = 250
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999
    mixed_precision: str = "bf16"  # bf16 autocast: 1.4 times faster on a CPU with AVX512-BF16
    checkpointing_steps: int = 500
    num_threads: int = 0  # 0: leave torch's own choice
    seed: int = 42

    def __post_init__(self) -> None:
        for name, known in (("dataset", DATASETS), ("prediction_type", TARGETS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}: expected one of {tuple(known)}, got {getattr(self, name)!r}.")
        kind = "" if self.prediction_type == "v_prediction" else f"-{self.prediction_type}"
        self.output_dir = self.output_dir or f"{DATASETS[self.dataset].folder}{kind}"
        name = Path(self.output_dir).name.replace("fashion-mnist", "teacher")
        self.checkpoint_dir = self.checkpoint_dir or f"outputs/{name}-checkpoint"
        self.num_train_epochs = self.num_train_epochs or DATASETS[self.dataset].num_train_epochs


def build_unet(dataset: str = "fashion-mnist") -> UNet2DModel:
    """Return the untrained teacher of `dataset`: 1.11 M parameters for 28x28 images, 0.45 M for 8x8; one channel."""
    data = DATASETS[dataset]
    inner = len(data.blocks) - 1
    return UNet2DModel(
        sample_size=data.size,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=data.blocks,
        down_block_types=("DownBlock2D",) * inner + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * inner,
        norm_num_groups=8,
        attention_head_dim=data.attention_head_dim,
    )


def build_scheduler(prediction_type: str = "v_prediction") -> DDIMScheduler:
    """Return the scheduler of the pipeline; trailing spacing makes the grids of N and N/2 steps nest."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="linear",
        prediction_type=prediction_type,
        timestep_spacing="trailing",
        clip_sample=False,
    )


def batch_of(images: Tensor, step: int, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clean images in [-1, 1], the noise and the timesteps of one update of one process."""
    clean = images[place.rows(len(images), step)].float() / 127.5 - 1
    draws = place.draws(step)
    noise = torch.randn(clean.shape, generator=draws)
    return clean, noise, torch.randint(0, 1000, (len(clean),), generator=draws)


def train(settings: Settings) -> UNet2DModel:
    """Return the EMA model after training, resuming from the checkpoint folder where there is one."""
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    torch.manual_seed(settings.seed)
    images = DATASETS[settings.dataset].load(settings.train_data_dir)
    scheduler = build_scheduler(settings.prediction_type)
    unet = build_unet(settings.dataset)
    place = Place(settings.seed, settings.train_batch_size, accelerator.process_index, accelerator.num_processes)

    def loss_of(model: nn.Module, step: int) -> Tensor:
        clean, noise, timesteps = (tensor.to(accelerator.device) for tensor in batch_of(images, step, place))
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = TARGETS[settings.prediction_type](scheduler, clean, noise, timesteps)
        return torch.nn.functional.mse_loss(model(noisy, timesteps).sample.float(), target)

    num_steps = settings.num_train_epochs * place.updates_per_epoch(len(images))
    recipe = Recipe(
        num_steps=num_steps,
        batch_size=settings.train_batch_size,
        learning_rate=settings.learning_rate,
        lr_warmup_steps=settings.lr_warmup_steps,
        max_grad_norm=settings.max_grad_norm,
        ema_decay=settings.ema_decay,
        checkpointing_steps=settings.checkpointing_steps,
    )
    final_loss = fit(unet, loss_of, recipe, accelerator, Path(settings.checkpoint_dir), "train teacher")
    if accelerator.is_main_process:
        DDIMPipeline(unet, scheduler).save_pretrained(settings.output_dir)
        facts = dataclasses.asdict(settings) | {"num_steps": num_steps, "final_loss": final_loss}
        facts |= {"torch": torch.__version__, "machine": platform.machine()}
        Path(settings.output_dir, "training.json").write_text(json.dumps(facts, indent=2) + "\n")
        Path(settings.output_dir, "README.md").write_text(card(facts, sum(p.numel() for p in unet.parameters())))
    return unet


def card(recipe: dict[str, Any], num_parameters: int) -> str:
    """Return the teacher's model card."""
    # The recipe of the first teacher, of before there was a choice, says neither.
    data = DATASETS[recipe.get("dataset", "fashion-mnist")]
    prediction_type = recipe.get("prediction_type", "v_prediction")
    predicts = {"v_prediction": "v-prediction", "epsilon": "epsilon prediction"}[prediction_type]
    arguments = "" if data is DATASETS["fashion-mnist"] else f" --dataset {recipe['dataset']}"
    arguments += "" if prediction_type == "v_prediction" else f" --prediction_type {prediction_type}"
    if recipe["num_train_epochs"] != data.num_train_epochs:
        arguments += f" --num_train_epochs {recipe['num_train_epochs']}"
    size = data.size
    remark = f"\n{recipe['remark']}\n" if "remark" in recipe else ""
    measured = f"""
## How good it is

Its distance to the data, at three numbers of images and beside the noise floor, is in
`../fashion-mnist-features/README.md`, measured by
`examples/train_classifier.py --measure_teacher {recipe["output_dir"]}`.
"""
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: {data.licence}
datasets: [{data.hub_id}]
---
# A small {data.title} diffusion model

The teacher of the examples of diffusers-pqcad: an unconditional `UNet2DModel` of {num_parameters / 1e6:.2f} M
parameters for {size}x{size} grey images, {predicts} on a linear noise schedule, with a `DDIMScheduler` on trailing
timesteps.

```python
from diffusers import DiffusionPipeline

image = DiffusionPipeline.from_pretrained("{recipe["output_dir"]}")(num_inference_steps=20).images[0]
```

## How it was trained

`accelerate launch examples/train_teacher.py{arguments}`:
{recipe["num_train_epochs"]} epochs ({recipe["num_steps"]} updates of {recipe["train_batch_size"]} images), AdamW at
{recipe["learning_rate"]:g} with a cosine schedule, EMA {recipe["ema_decay"]}, {recipe["mixed_precision"]} autocast,
seed {recipe["seed"]}, torch {recipe["torch"]} on {recipe["machine"]} CPUs; final training loss (moving average)
{recipe["final_loss"]:.4f}. All settings:
`training.json`.
{remark}{measured if data.is_measured else ""}
## Licence of the data

{data.notice}"""


if __name__ == "__main__":
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    train(settings)
