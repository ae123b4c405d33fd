"""Train a bundled teacher: a small unconditional UNet2DModel on Fashion-MNIST.

    accelerate launch examples/train_teacher.py
    accelerate launch examples/train_teacher.py --prediction_type epsilon --num_train_epochs 12

A linear noise schedule, EMA weights, any number of processes. Every random draw is a function of (seed, step), so a
run that was killed goes on from its last checkpoint to the same weights.
"""

import dataclasses
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from fashion_mnist import HUB_ID, LICENCE_NOTICE, load_split
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from diffusers_pqcad.compression.checkpoint import load_checkpoint, save_checkpoint

# What the network learns to say, of (scheduler, clean images, noise, timesteps).
TARGETS: dict[str, Callable[[DDIMScheduler, Tensor, Tensor, Tensor], Tensor]] = {
    "v_prediction": DDIMScheduler.get_velocity,
    "epsilon": lambda scheduler, clean, noise, timesteps: noise,
}


@dataclass
class Settings:
    """Settings of one run; `examples/models/fashion-mnist` was made with these but for what its card tells."""

    output_dir: str = ""  # default: examples/models/fashion-mnist, or fashion-mnist-epsilon
    train_data_dir: str | None = None  # a folder of IDX files; default: the Debian package, else the Hub
    checkpoint_dir: str = ""  # default: outputs/teacher-checkpoint, or teacher-epsilon-checkpoint
    prediction_type: str = "v_prediction"  # or epsilon, as SD-1.5, SDXL and every DDPM have it
    num_train_epochs: int = 7
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
        if self.prediction_type not in TARGETS:
            raise ValueError(f"prediction_type: expected one of {tuple(TARGETS)}, got {self.prediction_type!r}.")
        kind = "" if self.prediction_type == "v_prediction" else f"-{self.prediction_type}"
        self.output_dir = self.output_dir or f"examples/models/fashion-mnist{kind}"
        self.checkpoint_dir = self.checkpoint_dir or f"outputs/teacher{kind}-checkpoint"


def build_unet() -> UNet2DModel:
    """Return the untrained teacher: 28x28, one channel, 1.11 M parameters, attention at 7x7."""
    return UNet2DModel(
        sample_size=28,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=32,
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


def batch_of(images: Tensor, step: int, settings: Settings, rank: int, world: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the clean images in [-1, 1], the noise and the timesteps of one update of one process."""
    per_update = settings.train_batch_size * world
    updates_per_epoch = len(images) // per_update
    epoch, position = divmod(step, updates_per_epoch)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(settings.seed * 100_003 + epoch))
    start = position * per_update + rank * settings.train_batch_size
    clean = images[order[start : start + settings.train_batch_size]].float() / 127.5 - 1
    draws = torch.Generator().manual_seed((settings.seed * 1_000_003 + step) * world + rank)
    noise = torch.randn(clean.shape, generator=draws)
    return clean, noise, torch.randint(0, 1000, (len(clean),), generator=draws)


def train(settings: Settings) -> UNet2DModel:
    """Return the EMA model after training, resuming from the checkpoint folder where there is one."""
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    accelerator = Accelerator(mixed_precision=settings.mixed_precision)
    torch.manual_seed(settings.seed)
    images, _ = load_split("train", settings.train_data_dir)
    scheduler = build_scheduler(settings.prediction_type)
    unet = build_unet()
    ema = EMAModel(unet.parameters(), decay=settings.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(accelerator.device)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=settings.learning_rate, weight_decay=1e-4)
    world = accelerator.num_processes
    num_steps = settings.num_train_epochs * (len(images) // (settings.train_batch_size * world))
    lr_schedule = get_cosine_schedule_with_warmup(optimizer, settings.lr_warmup_steps, num_steps)
    unet, optimizer = accelerator.prepare(unet, optimizer)

    checkpoint = Path(settings.checkpoint_dir) / "state.safetensors"
    log = Path(settings.checkpoint_dir) / "log.jsonl"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    first_step, running_loss = 0, 0.0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        accelerator.unwrap_model(unet).load_state_dict(state["unet"])
        ema.load_state_dict(state["ema"])
        ema.to(accelerator.device)
        optimizer.load_state_dict(state["optimizer"])
        lr_schedule.load_state_dict(state["lr_schedule"])
        first_step, running_loss = state["step"], state["running_loss"]

    bar = tqdm(
        range(first_step, num_steps),
        initial=first_step,
        total=num_steps,
        desc="train teacher",
        disable=not accelerator.is_local_main_process,
    )
    started = time.perf_counter()
    for step in bar:
        clean, noise, timesteps = (
            tensor.to(accelerator.device)
            for tensor in batch_of(images, step, settings, accelerator.process_index, world)
        )
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = TARGETS[settings.prediction_type](scheduler, clean, noise, timesteps)
        with accelerator.autocast():
            prediction = unet(noisy, timesteps).sample
        loss = torch.nn.functional.mse_loss(prediction.float(), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), settings.max_grad_norm)
        optimizer.step()
        lr_schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        if not accelerator.is_main_process:
            continue
        running_loss = loss.item() if step == 0 else 0.99 * running_loss + 0.01 * loss.item()
        if (step + 1) % 100 == 0:
            bar.set_postfix(loss=f"{running_loss:.4f}")
            row = {"step": step + 1, "loss": running_loss, "seconds": time.perf_counter() - started}
            with log.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        if (step + 1) % settings.checkpointing_steps == 0 or step + 1 == num_steps:
            state = {
                "unet": accelerator.unwrap_model(unet).state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_schedule": lr_schedule.state_dict(),
                "step": step + 1,
                "running_loss": running_loss,
            }
            save_checkpoint(checkpoint, state)

    accelerator.wait_for_everyone()
    unet = accelerator.unwrap_model(unet)
    ema.copy_to(unet.parameters())
    if accelerator.is_main_process:
        DDIMPipeline(unet, scheduler).save_pretrained(settings.output_dir)
        recipe = dataclasses.asdict(settings) | {"num_steps": num_steps, "final_loss": running_loss}
        recipe |= {"torch": torch.__version__, "machine": platform.machine()}
        Path(settings.output_dir, "training.json").write_text(json.dumps(recipe, indent=2) + "\n")
        Path(settings.output_dir, "README.md").write_text(card(recipe, sum(p.numel() for p in unet.parameters())))
    return unet


def card(recipe: dict[str, Any], num_parameters: int) -> str:
    """Return the teacher's model card."""
    remark = f"\n{recipe['remark']}\n" if "remark" in recipe else ""
    # What the recipe of the first teacher, of before there was a choice, does not say.
    predicts = {"v_prediction": "v-prediction", "epsilon": "epsilon prediction"}[
        recipe.get("prediction_type", "v_prediction")
    ]
    arguments = "" if predicts == "v-prediction" else f" --prediction_type {recipe['prediction_type']}"
    return f"""---
library_name: diffusers
pipeline_tag: unconditional-image-generation
license: mit
datasets: [{HUB_ID}]
---
# A small Fashion-MNIST diffusion model

The teacher of the examples of diffusers-pqcad: an unconditional `UNet2DModel` of {num_parameters / 1e6:.2f} M
parameters for 28x28 grey images, {predicts} on a linear noise schedule, with a `DDIMScheduler` on trailing
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
{remark}
## How good it is

Its distance to the data, at three numbers of images and beside the noise floor, is in
`../fashion-mnist-features/README.md`, measured by
`examples/train_classifier.py --measure_teacher {recipe["output_dir"]}`.

## Licence of the data

{LICENCE_NOTICE}"""


if __name__ == "__main__":
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    train(settings)
