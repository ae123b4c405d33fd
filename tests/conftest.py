"""Fixtures that several test files share: real diffusers classes at tiny size, one thread, one seed."""

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from hypothesis import settings

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


@pytest.fixture
def tiny_unet(seed: None) -> UNet2DModel:
    """A v-prediction UNet of 1x8x8 images with attention in its lowest resolution."""
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


@pytest.fixture
def tiny_scheduler() -> DDIMScheduler:
    """The scheduler that the samplers of this package expect."""
    return DDIMScheduler(
        num_train_timesteps=1000, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )


@pytest.fixture
def tiny_pipeline(tiny_unet: UNet2DModel, tiny_scheduler: DDIMScheduler) -> DDIMPipeline:
    """`tiny_unet` with its scheduler."""
    pipeline = DDIMPipeline(tiny_unet, tiny_scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
