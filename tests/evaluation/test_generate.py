"""Specification of generating samples: what a pipeline makes when its user calls it, one generator an image."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)
from diffusers.utils import BaseOutput
from pipelines import PIPELINES, together

from diffusers_pqcad.compression.denoiser import SchedulerStep, run_stepped
from diffusers_pqcad.compression.sampling import image_generator
from diffusers_pqcad.evaluation import generate_images, generate_samples, to_uint8
from diffusers_pqcad.evaluation.generate import pictures_of

STEPS = 2
WITHOUT_LATENTS = ("ddim", "ddpm", "dit")


def tiny_pipeline(sample_size: int = 8, dropout: float = 0.0) -> DDIMPipeline:
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=sample_size,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        dropout=dropout,
    ).eval()
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False
    )
    return DDIMPipeline(unet, scheduler)


@pytest.fixture(scope="module")
def pipeline() -> DDIMPipeline:
    return tiny_pipeline()


class TestToUint8:
    def test_worked_example(self):
        # -1 -> 0, 0 -> 127.5 -> 128 (round half to even), 1 -> 255; beyond the range is clamped.
        samples = torch.tensor([-7.0, -1.0, 0.0, 1.0, 7.0])
        assert to_uint8(samples).tolist() == [0, 0, 128, 255, 255]

    def test_inverts_the_scaling_of_the_data(self):
        levels = torch.arange(256, dtype=torch.uint8)
        assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)

    def test_refuses_nan(self):
        with pytest.raises(ValueError, match="got a NaN"):
            to_uint8(torch.tensor([0.0, math.nan]))


class TestGenerateSamples:
    def test_agrees_with_the_diffusers_pipeline(self, pipeline):
        noise = [torch.randn(1, 8, 8, generator=image_generator(3, index)) for index in range(2)]
        samples = generate_samples(pipeline, num_images=2, num_inference_steps=5, seed=3, progress=False)
        assert samples.dtype == torch.float32
        expected = torch.stack([_pipeline_image(pipeline, image, 5) for image in noise])
        torch.testing.assert_close((samples / 2 + 0.5).clamp(0, 1), expected, rtol=0, atol=1e-5)

    def test_batch_size_and_number_do_not_matter(self, pipeline):
        whole = generate_samples(pipeline, num_images=7, num_inference_steps=5, seed=0, progress=False)
        parts = generate_samples(pipeline, num_images=5, num_inference_steps=5, seed=0, batch_size=2, progress=False)
        assert whole.shape == (7, 1, 8, 8)
        torch.testing.assert_close(parts, whole[:5], rtol=0, atol=1e-5)

    def test_seed_decides(self, pipeline):
        first, again, other = (
            generate_samples(pipeline, num_images=2, num_inference_steps=5, seed=seed, progress=False)
            for seed in (0, 0, 1)
        )
        assert torch.equal(first, again)
        assert not torch.allclose(first, other)

    def test_changes_nothing_and_ignores_dropout(self):
        noisy, calm = tiny_pipeline(dropout=0.9), tiny_pipeline()
        noisy.unet.train()
        noisy.unet.mid_block.eval()  # a mixture of modes is restored as it was
        noisy.scheduler.set_timesteps(50)
        before = noisy.scheduler.timesteps.clone()
        arguments = {"num_images": 2, "num_inference_steps": 5, "seed": 0, "progress": False}
        torch.testing.assert_close(generate_samples(noisy, **arguments), generate_samples(calm, **arguments))
        assert noisy.unet.training
        assert not noisy.unet.mid_block.training
        assert torch.equal(noisy.scheduler.timesteps, before)

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_images": 0}, "num_images=0"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"num_inference_steps": 0}, "num_inference_steps=0"),
            ({"generator": None}, "generator: it is set for each call"),
            ({"inputs": [{"output_type": "pil"}]}, "output_type: it is set for each call"),
            ({"guidance_scale": 2.0}, "guidance_scale: DDIMPipeline does not take it"),
            ({"inputs": []}, "inputs: expected at least one"),
        ],
        ids=["no image", "empty batches", "no step", "own generator", "own output", "other argument", "no input"],
    )
    def test_refuses(self, pipeline, changes, message):
        arguments = {"num_images": 2, "num_inference_steps": 5, "seed": 0, "progress": False} | changes
        with pytest.raises(ValueError, match=message):
            generate_samples(pipeline, **arguments)


def _pipeline_image(pipeline: DDIMPipeline, noise: torch.Tensor, num_inference_steps: int) -> torch.Tensor:
    """What DDIMPipeline's own loop makes of `noise`, as floats in [0, 1]."""
    scheduler, sample = copy.deepcopy(pipeline.scheduler), noise.unsqueeze(0)
    scheduler.set_timesteps(num_inference_steps)
    with torch.no_grad():
        for t in scheduler.timesteps:
            sample = scheduler.step(pipeline.unet(sample, t).sample, t, sample, eta=0.0).prev_sample
    return (sample[0] / 2 + 0.5).clamp(0, 1)


def made(kind: str, pipeline: Any, function: Any = generate_images, **changes: Any) -> Any:
    """What `function` makes of a kind's first inputs."""
    inputs = PIPELINES[kind].inputs if any(PIPELINES[kind].inputs) else None
    settings = {"num_images": 2, "num_inference_steps": STEPS, "seed": 3, "progress": False}
    return function(pipeline, inputs, **settings | PIPELINES[kind].arguments | changes)


def own(kind: str, pipeline: Any, output_type: str, **changes: Any) -> Any:
    """What the pipeline makes of the same when it is called."""
    return pipeline(
        **together(PIPELINES[kind].inputs[:2]) | PIPELINES[kind].arguments | changes,
        num_inference_steps=STEPS,
        generator=[image_generator(3, index) for index in range(2)],
        output_type=output_type,
    )[0]


class TestKinds:
    @pytest.mark.parametrize("kind", PIPELINES)
    def test_latents_and_pictures_are_the_pipelines_own(self, kind):
        pipeline = PIPELINES[kind].build()
        samples = made(kind, pipeline)
        assert samples.latents.dtype == torch.float32
        assert samples.images.dtype == torch.uint8
        if kind not in WITHOUT_LATENTS:
            torch.testing.assert_close(samples.latents, own(kind, pipeline, "latent"))
        elif kind == "dit":
            with torch.no_grad():
                decoded = pipeline.vae.decode(samples.latents / pipeline.vae.config.scaling_factor).sample
            torch.testing.assert_close((decoded / 2 + 0.5).clamp(0, 1), own(kind, pipeline, "pt"))
        else:
            torch.testing.assert_close((samples.latents / 2 + 0.5).clamp(0, 1), own(kind, pipeline, "pt"))
        if kind not in ("ddim", "ddpm"):  # their four channels are no picture to PIL
            own_pictures = own(kind, pipeline, "pil")  # of a video, a list
            pictures = np.array([np.array([*map(np.array, x)] if kind == "wan" else x) for x in own_pictures])
            assert samples.images.shape == ((2, 3, 3, 16, 16) if kind == "wan" else (2, 3, 16, 16))
            np.testing.assert_array_equal(np.moveaxis(samples.images.numpy(), -3, -1), pictures)
        torch.testing.assert_close(made(kind, pipeline, generate_samples), samples.latents)

    @pytest.mark.parametrize("kind", PIPELINES)
    def test_batch_size_does_not_matter(self, kind):
        pipeline = PIPELINES[kind].build()
        whole, parts = made(kind, pipeline, num_images=3), made(kind, pipeline, num_images=3, batch_size=2)
        torch.testing.assert_close(parts.latents, whole.latents, rtol=1e-3, atol=1e-4)
        assert (parts.images.int() - whole.images.int()).abs().max() <= 1

    def test_of_more_images_than_inputs_these_start_over(self):
        pipeline, inputs = PIPELINES["sd"].build(), PIPELINES["sd"].inputs
        settings = {"num_inference_steps": STEPS, "seed": 3, "progress": False} | PIPELINES["sd"].arguments
        found = generate_samples(pipeline, inputs[:2], num_images=5, batch_size=3, **settings)
        wanted = generate_samples(pipeline, [*inputs[:2], *inputs[:2], inputs[0]], num_images=5, **settings)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("kind", ["ddpm", "sd"])
    def test_the_pipeline_stays_as_it_was(self, kind):
        pipeline = PIPELINES[kind].build()
        pipeline.unet.train()
        pipeline.scheduler.set_timesteps(7)
        before = dict(pipeline.components), pipeline.scheduler.timesteps.clone(), dict(pipeline.config)
        bar = dict(pipeline._progress_bar_config)
        made(kind, pipeline, generate_samples)
        assert dict(pipeline.components) == before[0]
        assert torch.equal(pipeline.scheduler.timesteps, before[1])
        assert dict(pipeline.config) == before[2]
        assert pipeline._progress_bar_config == bar
        assert pipeline.unet.training
        assert not pipeline.unet._forward_hooks
        assert "step" not in vars(pipeline.scheduler)


class TestSchedulers:
    def test_random_steps_repeat_image_by_image(self):
        pipeline = PIPELINES["sd"].build()
        pipeline.scheduler = EulerAncestralDiscreteScheduler.from_config(pipeline.scheduler.config)
        whole = made("sd", pipeline, generate_samples, num_images=3)
        # Rounding differs with the batch and grows on the way; other noise would differ by the latents' size.
        torch.testing.assert_close(whole[:2], own("sd", pipeline, "latent"), rtol=1e-3, atol=1e-4)
        torch.manual_seed(5)  # the global generator plays no part
        parts = made("sd", pipeline, generate_samples, num_images=3, batch_size=1)
        torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)

    def test_settings_of_the_steps_reach_the_scheduler(self):
        pipeline = PIPELINES["sd"].build()
        noisy = made("sd", pipeline, generate_samples, eta=1.0)
        torch.testing.assert_close(noisy, own("sd", pipeline, "latent", eta=1.0))
        assert not torch.allclose(noisy, made("sd", pipeline, generate_samples))

    def test_a_scheduler_that_takes_each_timestep_twice_is_run_to_its_end(self):
        pipeline = PIPELINES["sdxl"].build()
        pipeline.scheduler = HeunDiscreteScheduler.from_config(pipeline.scheduler.config)
        torch.testing.assert_close(made("sdxl", pipeline, generate_samples), own("sdxl", pipeline, "latent"))

    def test_a_pipeline_that_stops_before_the_last_timestep(self):
        pipeline = PIPELINES["sdxl"].build()
        found = made("sdxl", pipeline, generate_samples, denoising_end=0.5)
        torch.testing.assert_close(found, own("sdxl", pipeline, "latent", denoising_end=0.5))

    def test_a_step_may_be_called_by_name(self, pipeline):
        class ByName(DDIMPipeline):
            def __call__(self, **arguments: Any) -> None:
                self.scheduler.set_timesteps(2)
                self.scheduler.step(sample=torch.ones(1, 1), model_output=torch.zeros(1, 1), timestep=999)

        steps: list[SchedulerStep] = []
        run_stepped(ByName(pipeline.unet, pipeline.scheduler), steps.append)
        assert [(step.timestep, step.state.item(), step.output.item()) for step in steps] == [(999, 1.0, 0.0)]

    def test_another_precision_starts_from_the_same_noise(self):
        whole, half = PIPELINES["sd"].build(), PIPELINES["sd"].build().to(torch.bfloat16)
        wanted, found = (made("sd", each, generate_samples) for each in (whole, half))
        assert found.dtype == torch.float32
        assert (found - wanted).norm() < 0.1 * wanted.norm()


class TestPicturesOf:
    def test_an_array_has_its_channels_last(self):
        array = np.random.default_rng(0).random((2, 4, 5, 3), dtype=np.float32)
        found = pictures_of(BaseOutput(images=array), 2)
        np.testing.assert_array_equal(found.numpy(), (array * 255).round().astype(np.uint8).transpose(0, 3, 1, 2))

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            ((np.zeros((2, 100)),), r"got shape \(2, 100\)"),  # sound
            ((torch.zeros(4, 3, 8, 8),), r"of 2 images, got shape \(4, 3, 8, 8\)"),
            ((["a text"] * 2,), "got list"),
            ((torch.full((2, 3, 8, 8), math.nan),), "pictures: expected numbers, got a NaN"),
        ],
        ids=["sound", "another number", "texts", "nan"],
    )
    def test_refuses(self, output, message):
        with pytest.raises(ValueError, match=message):
            pictures_of(output, 2)
