"""Fixtures that several test files share: real diffusers classes at tiny size, one thread, one seed."""

import copy

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from hypothesis import settings

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.progressive import History, ProgressiveConfig, progressive_quantize
from diffusers_pqcad.compression.reconstruction import ReconstructionConfig
from diffusers_pqcad.compression.recording import collect_calibration_set

# No deadline: a busy computer is not a failing test. Derandomized: a run in CI can be repeated anywhere.
settings.register_profile("pqcad", deadline=None, derandomize=True, database=None, max_examples=50)
settings.load_profile("pqcad")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors are fastest on one thread, and sums come out the same everywhere."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same seed, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def still_one_thread() -> None:
    """And on one thread: a test may leave torch on all cores."""
    torch.set_num_threads(1)


def build_tiny_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    ).eval()


def build_tiny_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )


@pytest.fixture
def tiny_unet(seed: None) -> UNet2DModel:
    """A v-prediction UNet of 1x8x8 images with attention in its lowest resolution."""
    return build_tiny_unet()


@pytest.fixture
def tiny_scheduler() -> DDIMScheduler:
    """The scheduler that the samplers of this package expect."""
    return build_tiny_scheduler()


@pytest.fixture
def tiny_pipeline(tiny_unet: UNet2DModel, tiny_scheduler: DDIMScheduler) -> DDIMPipeline:
    """`tiny_unet` with its scheduler."""
    pipeline = DDIMPipeline(tiny_unet, tiny_scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="session")
def tiny_calibration_set() -> CalibrationSet:
    """16 trajectories of 4 steps, recorded with the weights of `tiny_unet`; 2 are held out. Read only."""
    pipeline = DDIMPipeline(build_tiny_unet(), build_tiny_scheduler())
    return collect_calibration_set(pipeline, num_trajectories=16, num_inference_steps=4, seed=1, progress=False)


@pytest.fixture(scope="session")
def quick_progressive() -> ProgressiveConfig:
    """PQ with everything switched on, and little of each."""
    return ProgressiveConfig(
        rounds_per_stage=1,
        price_batch_size=4,
        reconstruction=ReconstructionConfig(iterations=1, batch_size=4),
        reconstruction_samples=16,
    )


@pytest.fixture(scope="session")
def pq_run(
    one_thread: None, tiny_calibration_set: CalibrationSet, quick_progressive: ProgressiveConfig
) -> tuple[UNet2DModel, History]:
    """`tiny_unet` after PQ to 4 bits, and the history. Read only: `tiny_quantized` is a copy."""
    model = build_tiny_unet()
    config = PQCADConfig(weight_bits=4)
    return model, progressive_quantize(model, tiny_calibration_set, config, quick_progressive, progress=False)


@pytest.fixture
def tiny_quantized(pq_run: tuple[UNet2DModel, History]) -> UNet2DModel:
    """The fake-quantized model of `pq_run`, a copy of one's own."""
    return copy.deepcopy(pq_run[0])
