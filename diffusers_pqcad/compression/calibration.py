"""Calibration sets: full-precision trajectories, the only unbiased targets that a quantized model will see."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_pqcad.compression.checkpoint import load_checkpoint, model_hash, save_checkpoint
from diffusers_pqcad.compression.fake_quant import fake_quant_layers
from diffusers_pqcad.compression.grid import Grid, ddim_grid
from diffusers_pqcad.compression.sampling import denoise, initial_noise, sample_shape

HELD_OUT_FRACTION = 0.125
GAIN_LIMITS = (0.1, 10.0)
# What decides where a sample goes; names and versions of files do not.
SCHEDULER_KEYS = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "timestep_spacing",
    "clip_sample",
    "clip_sample_range",
    "thresholding",
    "set_alpha_to_one",
    "steps_offset",
    "rescale_betas_zero_snr",
)


@dataclass(frozen=True)
class CalibrationSet:
    """M whole full-precision trajectories on a grid of N steps.

    `trajectory` (M, N + 1, C, H, W) fp32: the sample before each step, and the final one. `timestep` (N,) int64.
    `model_output` (M, N, C, H, W) fp32. `conditioning`: named tensors (M, ...), empty for unconditional models.
    `manifest`: model hash, scheduler settings, seed, versions.
    """

    trajectory: Tensor
    timestep: Tensor
    model_output: Tensor
    manifest: dict[str, Any]
    conditioning: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.trajectory)

    @property
    def num_inference_steps(self) -> int:
        """N, the number of steps of the recorded trajectories."""
        return len(self.timestep)

    def scheduler(self) -> DDIMScheduler:
        """Return a scheduler with the settings of the recording."""
        return DDIMScheduler(**self.manifest["scheduler"])

    def grid(self) -> Grid:
        """Return the recorded steps; their timesteps are on the device of the set."""
        return replace(ddim_grid(self.scheduler(), self.num_inference_steps), timestep=self.timestep)

    def save(self, path: str | Path) -> None:
        """Write the set as one safetensors file."""
        save_checkpoint(path, {name: getattr(self, name) for name in self.__dataclass_fields__})

    @classmethod
    def load(cls, path: str | Path) -> "CalibrationSet":
        """Return the set of a file that `save` wrote; raises ValueError if it is damaged."""
        state = load_checkpoint(path)
        if "trajectory" not in state:
            raise ValueError(f"{path}: not a calibration set; it holds {sorted(state)}.")
        return cls(**state)

    def to(self, device: torch.device | str) -> "CalibrationSet":
        """Return the set with its tensors on `device`: the model's, while it is trained."""
        return CalibrationSet(
            self.trajectory.to(device),
            self.timestep.to(device),
            self.model_output.to(device),
            self.manifest,
            {name: values.to(device) for name, values in self.conditioning.items()},
        )

    def select(self, rows: slice) -> "CalibrationSet":
        """Return the set of the trajectories `rows`."""
        return CalibrationSet(
            self.trajectory[rows],
            self.timestep,
            self.model_output[rows],
            self.manifest,
            {name: values[rows] for name, values in self.conditioning.items()},
        )

    def split(self) -> tuple["CalibrationSet", "CalibrationSet"]:
        """Return the sets to train on and to decide by: the last 12.5 %, at least 2 trajectories, are held out."""
        num_held_out = max(2, round(HELD_OUT_FRACTION * len(self)))
        if len(self) < num_held_out + 2:
            raise ValueError(f"a calibration set needs at least 4 trajectories, 2 of them held out; got {len(self)}.")
        return self.select(slice(0, len(self) - num_held_out)), self.select(slice(len(self) - num_held_out, None))

    def gains(self, num_inference_steps: int | None = None) -> Tensor:
        """Return how much an output error at each step of the grid moves the sample: (N,), mean 1, clipped.

        The weight of a step's error throughout PQ and CAD. `num_inference_steps` defaults to the recorded N.
        """
        gain = ddim_grid(self.scheduler(), num_inference_steps or self.num_inference_steps).gain()
        return (gain / gain.mean()).clamp(*GAIN_LIMITS).float().to(self.timestep.device)

    def check(self, model: nn.Module, scheduler: Any | None = None) -> None:
        """Raise ValueError unless the set was recorded with the weights of `model` and the settings of `scheduler`."""
        found = model_hash(model)
        if found != self.manifest["model_hash"]:
            raise ValueError(
                f"this calibration set was recorded with another model (hash {self.manifest['model_hash'][:12]}, this "
                f"one has {found[:12]}). Record it again with collect_calibration_set."
            )
        if scheduler is not None:
            self.check_scheduler(scheduler)

    def check_scheduler(self, scheduler: Any) -> None:
        """Raise ValueError unless `scheduler` has the settings of the recording."""
        recorded, found = self.manifest["scheduler"], scheduler_settings(scheduler)
        pairs = {key: (recorded.get(key), found.get(key)) for key in SCHEDULER_KEYS}
        different = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if different:
            raise ValueError(
                f"this calibration set was recorded with another scheduler; (recorded, found): {different}. Record it "
                "again with collect_calibration_set."
            )

    def check_student_steps(self) -> int:
        """Return N / 2, the steps of a student; raises ValueError for a grid or a scheduler it cannot learn on."""
        steps = self.num_inference_steps
        if steps % 2:
            raise ValueError(
                f"num_inference_steps={steps} is odd; a student takes half the steps, so record an even number."
            )
        ddim_grid(self.scheduler(), steps // 2)
        clipping = [key for key in ("clip_sample", "thresholding") if self.manifest["scheduler"].get(key)]
        if clipping:
            raise ValueError(
                f"{clipping[0]}: a clipped trajectory does not follow the DDIM formula that a student's targets are "
                "computed by. Record with DDIMScheduler.from_config(scheduler.config, clip_sample=False, "
                "thresholding=False)."
            )
        return steps // 2


def scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """Return the settings of `scheduler` that decide where a sample goes."""
    return {key: scheduler.config[key] for key in SCHEDULER_KEYS if key in scheduler.config}


@torch.no_grad()
def collect_calibration_set(
    pipeline: Any,
    *,
    num_trajectories: int,
    num_inference_steps: int,
    seed: int,
    batch_size: int = 64,
    progress: bool = True,
) -> CalibrationSet:
    """Record `num_trajectories` deterministic trajectories of the full-precision `pipeline` (unconditional).

    Raises ValueError for a pipeline that is quantized or conditional, or a grid that cannot be used.
    """
    model, scheduler = pipeline.unet, pipeline.scheduler
    if getattr(model, "is_quantized", False) or fake_quant_layers(model):
        raise ValueError("the calibration set must come from the full-precision model, but this one is quantized.")
    check_unconditional(model)
    check_float32(model)
    timesteps = ddim_grid(scheduler, num_inference_steps).timestep
    if num_trajectories < 4:
        raise ValueError(f"num_trajectories: expected at least 4 (2 are held out), got {num_trajectories}.")
    shape = sample_shape(model)
    samples, outputs = [], []
    starts = range(0, num_trajectories, batch_size)
    for start in tqdm(starts, desc="calibration set", unit="batch", disable=not progress):
        noise = initial_noise(shape, seed=seed, start=start, count=min(batch_size, num_trajectories - start))
        steps = list(denoise(model, scheduler, noise.to(model.device), num_inference_steps))
        samples.append(torch.stack([step.sample for step in steps], dim=1).float().cpu())
        outputs.append(torch.stack([step.model_output for step in steps[:-1]], dim=1).float().cpu())
    if not all(torch.isfinite(sample).all() for sample in samples):
        raise ValueError("the trajectories hold a NaN or an infinity; check the model's weights and the scheduler.")
    manifest = {
        "model_hash": model_hash(model),
        "model_class": type(model).__name__,
        "scheduler": scheduler_settings(scheduler),
        "seed": seed,
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
    }
    return CalibrationSet(torch.cat(samples), timesteps, torch.cat(outputs), manifest)


def check_float32(model: nn.Module) -> None:
    """Raise ValueError for a model in half precision: its latents would be, too."""
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(
            f"expected a model in float32, got {sorted(map(str, dtypes))}. Load it with dtype=torch.float32."
        )


def check_unconditional(model: nn.Module) -> None:
    """Raise ValueError for a denoiser that is not an unconditional UNet of images with one output for each input."""
    if not isinstance(model, UNet2DModel):
        raise ValueError(
            f"expected an unconditional UNet2DModel, got {type(model).__name__}; no other is supported so far."
        )
    config = model.config
    if config.class_embed_type or config.num_class_embeds:
        raise ValueError("this UNet2DModel is conditional (on classes); only unconditional ones are supported so far.")
    if config.in_channels != config.out_channels:
        raise ValueError(
            f"out_channels: expected {config.in_channels} as in_channels, got {config.out_channels}; models that also "
            "predict a variance are not supported so far."
        )
    if config.sample_size is None:
        raise ValueError("sample_size: this UNet2DModel does not say how large its images are.")
