"""Train a network so that a killed run goes on to the same weights: every draw is a function of (seed, step).

The loop of the training scripts: AdamW with a cosine schedule, averaged (EMA) weights, any number of processes, one
safetensors file of the whole state.
"""

import json
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from diffusers_pqcad.compression.checkpoint import check_request, load_checkpoint, save_checkpoint

STATE_FILE, LOG_FILE = "state.safetensors", "log.jsonl"
LOGGED_EVERY = 100  # updates


@dataclass(frozen=True)
class Place:
    """Which of `world` processes this is, of a run with `seed` and `batch_size` images an update and process."""

    seed: int
    batch_size: int
    rank: int = 0
    world: int = 1

    def updates_per_epoch(self, num_images: int) -> int:
        """Return how many updates see every image once; the images of an incomplete last one wait for the next."""
        return num_images // (self.batch_size * self.world)

    def rows(self, num_images: int, step: int) -> Tensor:
        """Return the images of update `step` of this process, (batch_size,) int64, in an order of each epoch's own.

        Raises ValueError for fewer images than one update takes.
        """
        per_epoch = self.updates_per_epoch(num_images)
        if not per_epoch:
            raise ValueError(
                f"batch_size={self.batch_size}: expected at most {num_images // self.world}, as there are "
                f"{num_images} images and {self.world} processes."
            )
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(self.seed * 100_003 + epoch))
        start = (position * self.world + self.rank) * self.batch_size
        return order[start : start + self.batch_size]

    def draws(self, step: int) -> torch.Generator:
        """Return the source of all other random numbers of update `step` of this process."""
        return torch.Generator().manual_seed((self.seed * 1_000_003 + step) * self.world + self.rank)


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: `num_steps` updates of `batch_size` images in each process."""

    num_steps: int
    batch_size: int
    learning_rate: float
    lr_warmup_steps: int
    max_grad_norm: float
    ema_decay: float
    checkpointing_steps: int
    weight_decay: float = 1e-4


def plain_attention(device: torch.device) -> AbstractContextManager[None]:
    """Return what takes attention apart on a CPU, where the fused one is several times slower backwards, in bf16."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()


def fit(
    model: nn.Module,
    loss_of: Callable[[nn.Module, int], Tensor],
    recipe: Recipe,
    accelerator: Accelerator,
    folder: Path,
    description: str,
) -> float:
    """Train `model` in place, to its averaged weights, and return the moving average of the loss.

    `loss_of(model, step)` is the loss of this process in update `step`, a function of the weights and of `step` alone;
    it is handed `model` as the accelerator prepared it. `folder` keeps the state, from which a killed run goes on, and
    a log: one line of JSON for every hundred updates. Raises ValueError for the state of another recipe.
    """
    # How often it is kept does not change what is learnt.
    request = {key: value for key, value in asdict(recipe).items() if key != "checkpointing_steps"}
    ema = EMAModel(model.parameters(), decay=recipe.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    ema.to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    lr_schedule = get_cosine_schedule_with_warmup(optimizer, recipe.lr_warmup_steps, recipe.num_steps)
    prepared, optimizer = accelerator.prepare(model, optimizer)

    checkpoint = folder / STATE_FILE
    folder.mkdir(parents=True, exist_ok=True)
    first_step, running_loss = 0, 0.0
    if checkpoint.exists():
        state = load_checkpoint(checkpoint)
        check_request(checkpoint, state, request)  # files of older versions have none
        accelerator.unwrap_model(prepared).load_state_dict(state["model"])
        ema.load_state_dict(state["ema"])
        ema.to(accelerator.device)
        optimizer.load_state_dict(state["optimizer"])
        lr_schedule.load_state_dict(state["lr_schedule"])
        first_step, running_loss = state["step"], state["running_loss"]

    images_per_step = recipe.batch_size * accelerator.num_processes
    bar = tqdm(
        initial=first_step * images_per_step,
        total=recipe.num_steps * images_per_step,
        desc=description,
        unit="image",
        disable=not accelerator.is_local_main_process,
    )
    started = time.perf_counter()
    for step in range(first_step, recipe.num_steps):
        with plain_attention(accelerator.device):
            loss = loss_of(prepared, step)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(prepared.parameters(), recipe.max_grad_norm)
        optimizer.step()
        lr_schedule.step()
        optimizer.zero_grad()
        ema.step(prepared.parameters())
        bar.update(images_per_step)
        if not accelerator.is_main_process:
            continue
        running_loss = loss.item() if step == 0 else 0.99 * running_loss + 0.01 * loss.item()
        if (step + 1) % LOGGED_EVERY == 0:
            bar.set_postfix(loss=f"{running_loss:.4f}")
            row = {"step": step + 1, "loss": running_loss, "seconds": time.perf_counter() - started}
            with (folder / LOG_FILE).open("a") as stream:
                stream.write(json.dumps(row) + "\n")
        if (step + 1) % recipe.checkpointing_steps == 0 or step + 1 == recipe.num_steps:
            state = {
                "model": accelerator.unwrap_model(prepared).state_dict(),
                "ema": ema.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_schedule": lr_schedule.state_dict(),
                "step": step + 1,
                "running_loss": running_loss,
                "request": json.dumps(request),
            }
            save_checkpoint(checkpoint, state)
    bar.close()

    accelerator.wait_for_everyone()
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # `model` computes in its own precision again
    ema.copy_to(model.parameters())
    return running_loss
