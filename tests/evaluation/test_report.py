"""Specification of `evaluate`, on a pipeline of a few hundred parameters and on eleven kinds of pipelines."""

import copy
import json
import math
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from diffusers import (
    DDIMPipeline,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
)
from pipelines import PIPELINES
from test_generate import tiny_pipeline

from diffusers_pqcad import PQCADConfig, inspect, kernels, quantize_
from diffusers_pqcad.compression.denoiser import pipeline_with
from diffusers_pqcad.compression.fake_quant import prepare_
from diffusers_pqcad.compression.grid import grid_of, sigmas_for
from diffusers_pqcad.evaluation import (
    EvaluationReport,
    evaluate,
    generate,
    generate_images,
    generate_samples,
    to_uint8,
)
from diffusers_pqcad.evaluation import report as report_module
from diffusers_pqcad.evaluation.features import ClassifierExtractor, FeatureExtractor, SmallClassifier
from diffusers_pqcad.evaluation.generate import PipelineRun
from diffusers_pqcad.evaluation.metrics import feature_statistics, frechet_distance, sqnr_db, structural_similarity
from diffusers_pqcad.evaluation.report import MAX_TRAJECTORY_IMAGES
from diffusers_pqcad.evaluation.speed import Latency, tensor_bytes
from diffusers_pqcad.layers.find import kernel_cache_bytes, packed_layers
from diffusers_pqcad.loading.convert import match_modules
from diffusers_pqcad.loading.schedulers import StudentSteps, student_scheduler

FAST = {"num_latency_rounds": 1, "latency_batch_size": 2, "progress": False}
DISTANCE_FIELDS = (
    "metric_name",
    "frechet_distance",
    "kernel_distance",
    "kernel_distance_sd",
    "kernel_subset_size",
    "extractor_sha256",
    "extractor_reference_sha256",
)


def run_for(pipeline: Any) -> PipelineRun:
    return PipelineRun(pipeline, [{"prompt": "a cat"}], 2, 0, {})


def perturbed(pipeline: DDIMPipeline) -> DDIMPipeline:
    """The same pipeline with another output bias."""
    other = DDIMPipeline(copy.deepcopy(pipeline.unet), copy.deepcopy(pipeline.scheduler))
    with torch.no_grad():
        other.unet.conv_out.bias += 0.05
    return other


class PixelExtractor(FeatureExtractor):
    """Four pixels of the image as features."""

    def __init__(self) -> None:
        drawn = torch.rand(50, 4, generator=torch.Generator().manual_seed(5))
        mean, covariance = feature_statistics(drawn)
        super().__init__(
            name="four-pixel Frechet distance (d=4)",
            sha256="0" * 64,
            reference_sha256="1" * 64,
            reference_mean=mean,
            reference_covariance=covariance,
            reference_features=drawn,
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert images.dtype == torch.uint8
        return images[:, 0, :: images.shape[2] // 2, :: images.shape[3] // 2].flatten(1).float() / 255


@pytest.fixture(scope="module")
def pipeline() -> DDIMPipeline:
    return tiny_pipeline()


class TestEvaluate:
    def test_an_identical_pipeline_is_exact(self, pipeline):
        twin = DDIMPipeline(pipeline.unet, pipeline.scheduler)  # shares model and scheduler with the reference
        report = evaluate(twin, pipeline, num_images=3, num_inference_steps=5, seed=0, **FAST)
        assert report.sqnr_db == report.psnr_db == math.inf
        assert report.sqnr_interval_db == (math.inf, math.inf)
        assert report.trajectory_timesteps == (999, 799, 599, 399, 199, -1)
        assert report.trajectory_error == (0.0,) * 6

    def test_a_perturbed_pipeline_has_the_sqnr_computed_by_hand(self, pipeline):
        other = perturbed(pipeline)
        report = evaluate(other, pipeline, num_images=5, num_inference_steps=5, seed=0, batch_size=2, **FAST)
        wanted, sample = (
            generate_samples(p, num_images=5, num_inference_steps=5, seed=0, progress=False).double()
            for p in (pipeline, other)
        )
        mse = ((wanted - sample) ** 2).mean().item()
        assert report.sqnr_db == pytest.approx(10 * math.log10(wanted.var(correction=0).item() / mse), abs=1e-3)
        assert report.psnr_db == pytest.approx(10 * math.log10(4 / mse), abs=1e-3)
        errors = ((wanted - sample) ** 2).flatten(1).mean(1)
        expected = 10 * math.log10(wanted.var(correction=0).item() / errors.median().item())  # of five images
        assert report.sqnr_median_db == pytest.approx(expected, abs=1e-3)
        low, high = report.sqnr_interval_db
        assert low <= report.sqnr_db <= high
        # The trajectory starts at the same noise and ends at the final samples, whatever the batch size.
        assert report.trajectory_error[0] == 0
        final = (((wanted - sample) ** 2).sum() / (wanted**2).sum()).item()
        assert report.trajectory_error[-1] == pytest.approx(final, rel=1e-3)
        assert report.trajectory_num_images == 5

    @pytest.mark.parametrize(
        ("num_steps", "reference_steps", "timesteps"),
        [
            (2, 4, (999, 499, -1)),
            (4, 2, (999, 499, -1)),
            (4, 5, None),
        ],
        ids=["half the steps", "twice the steps", "grids that do not nest"],
    )
    def test_trajectories_at_common_timesteps(self, pipeline, num_steps, reference_steps, timesteps):
        report = evaluate(
            pipeline,
            pipeline,
            num_images=2,
            num_inference_steps=num_steps,
            reference_num_inference_steps=reference_steps,
            seed=0,
            **FAST,
        )
        assert (report.num_inference_steps, report.reference_num_inference_steps) == (num_steps, reference_steps)
        assert report.trajectory_timesteps == timesteps
        if timesteps is None:
            assert report.trajectory_error is report.trajectory_num_images is None
        else:
            assert len(report.trajectory_error) == len(timesteps)
            assert report.trajectory_error[0] == 0 < report.trajectory_error[-1]
        assert math.isfinite(report.sqnr_db)

    def test_without_extractor_the_fields_are_none(self, pipeline):
        report = evaluate(pipeline, pipeline, num_images=2, num_inference_steps=5, seed=0, **FAST)
        assert all(getattr(report, name) is None for name in DISTANCE_FIELDS)
        assert report.size_bytes is None

    def test_distances_with_an_extractor(self, pipeline):
        extractor = PixelExtractor()
        report = evaluate(pipeline, pipeline, num_images=9, num_inference_steps=5, seed=0, extractor=extractor, **FAST)
        samples = generate_samples(pipeline, num_images=9, num_inference_steps=5, seed=0, progress=False)
        statistics = feature_statistics(extractor(to_uint8(samples)))
        expected = frechet_distance(*statistics, extractor.reference_mean, extractor.reference_covariance)
        assert report.frechet_distance == pytest.approx(expected, rel=1e-6)
        assert math.isfinite(report.kernel_distance)
        assert report.kernel_subset_size == 9
        assert report.metric_name == extractor.name
        assert (report.extractor_sha256, report.extractor_reference_sha256) == ("0" * 64, "1" * 64)

    def test_reference_samples_replace_generating_them(self, pipeline):
        other = perturbed(pipeline)
        arguments = {"num_images": 3, "num_inference_steps": 5, "seed": 0, **FAST}
        samples = generate_samples(pipeline, num_images=4, num_inference_steps=5, seed=0, progress=False)
        report = evaluate(other, pipeline, reference_samples=samples, **arguments)
        assert report.sqnr_db == pytest.approx(evaluate(other, pipeline, **arguments).sqnr_db, abs=1e-3)
        rounded = samples + 1e-4 * torch.randn_like(samples)  # as of another batch size
        assert evaluate(other, pipeline, reference_samples=rounded, **arguments).sqnr_db != report.sqnr_db
        for wrong in (samples + 1, samples.flip(0), torch.full_like(samples, torch.nan)):
            with pytest.raises(ValueError, match="away from what the reference makes now"):
                evaluate(other, pipeline, reference_samples=wrong, **arguments)

    def test_another_setting_is_another_pipeline(self):
        pipeline = PIPELINES["sdxl"].build()
        other = pipeline_with(pipeline, pipeline.unet)
        assert report_module._is_same(run_for(pipeline), run_for(other))
        other.register_to_config(force_zeros_for_empty_prompt=False)
        assert not report_module._is_same(run_for(pipeline), run_for(other))

    def test_is_reproducible(self, pipeline):
        other = perturbed(pipeline)
        runs = [
            evaluate(other, pipeline, num_images=4, num_inference_steps=5, seed=1, extractor=PixelExtractor(), **FAST)
            for _ in range(2)
        ]
        first, second = (report.to_dict() for report in runs)
        measured_anew = {"latency_ms", "reference_latency_ms", "environment"}
        assert {k: v for k, v in first.items() if k not in measured_anew} == {
            k: v for k, v in second.items() if k not in measured_anew
        }

    def test_cost_and_circumstances(self, pipeline, tmp_path):
        pipeline.save_pretrained(tmp_path)
        report = evaluate(
            pipeline, pipeline, num_images=2, num_inference_steps=5, seed=4, weights_path=tmp_path / "unet", **FAST
        )
        assert report.size_bytes == sum(file.stat().st_size for file in (tmp_path / "unet").iterdir())
        assert report.tensor_bytes == 4 * sum(p.numel() for p in pipeline.unet.parameters())
        assert (report.average_bits, report.average_bits_all) == (32.0, 32.0)
        assert len(report.latency_ms.rounds_ms) == len(report.reference_latency_ms.rounds_ms) == 1
        assert report.latency_ms.median_ms > 0
        assert (report.seed, report.num_images, report.latency_batch_size) == (4, 2, 2)
        assert report.environment["torch"] == torch.__version__

    def test_report_is_frozen_and_strict_json(self, pipeline):
        report = evaluate(pipeline, pipeline, num_images=2, num_inference_steps=5, seed=0, **FAST)
        assert isinstance(report, EvaluationReport)
        with pytest.raises(AttributeError):
            report.seed = 1
        stored = json.loads(json.dumps(report.to_dict(), allow_nan=False))
        assert stored["sqnr_db"] == "inf"
        assert math.isinf(float(stored["sqnr_db"]))
        assert stored["trajectory_timesteps"][-1] == -1
        assert set(stored["latency_ms"]) == {"median_ms", "min_ms", "max_ms", "rounds_ms"}

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"num_images": 1}, "num_images=1: expected at least 2"),
            ({"num_inference_steps": 0}, "num_inference_steps=0"),
            ({"reference_num_inference_steps": 0}, "num_inference_steps=0"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"latency_batch_size": 0}, "latency_batch_size=0"),
            ({"arguments": {"sigmas": [1.0]}}, "sigmas: DDIMPipeline does not take it"),
            ({"reference_samples": torch.zeros(1, 1, 8, 8)}, "expected at least 2 images"),
            ({"reference_samples": torch.zeros(2, 3, 8, 8)}, r"of shape \(1, 8, 8\), got shape \(2, 3, 8, 8\)"),
        ],
        ids=[
            "one image", "steps", "reference steps", "batch size", "latency batch", "arguments", "too few references",
            "other references",
        ],
    )  # fmt: skip
    def test_refuses_before_anything_runs(self, pipeline, changes, message, monkeypatch):
        monkeypatch.setattr(pipeline.unet, "forward", lambda *_, **__: pytest.fail("it ran"))
        with pytest.raises(ValueError, match=message):
            evaluate(pipeline, pipeline, **({"num_images": 2, "num_inference_steps": 5, "seed": 0, **FAST} | changes))

    def test_refuses_models_of_different_shape(self, pipeline):
        with pytest.raises(ValueError, match=r"expected samples of shape \(1, 8, 8\)"):
            evaluate(tiny_pipeline(sample_size=16), pipeline, num_images=2, num_inference_steps=5, seed=0, **FAST)

    def test_refuses_simulated_weights(self, pipeline):
        simulated = DDIMPipeline(copy.deepcopy(pipeline.unet), pipeline.scheduler)
        config = PQCADConfig()
        prepare_(simulated.unet, config, dict.fromkeys(match_modules(simulated.unet, config), 4))
        with pytest.raises(ValueError, match="only rounded in simulation"):
            evaluate(simulated, pipeline, num_images=2, num_inference_steps=5, seed=0, **FAST)

    def test_counts_the_copies_of_the_kernels(self, pipeline):
        config = PQCADConfig(method="fixed", weight_bits=4)
        quantized = DDIMPipeline(quantize_(copy.deepcopy(pipeline.unet), config), pipeline.scheduler)
        report = evaluate(quantized, pipeline, num_images=2, num_inference_steps=5, seed=0, **FAST)
        assert report.kernel_cache_bytes == kernel_cache_bytes(quantized.unet)
        assert (
            evaluate(pipeline, pipeline, num_images=2, num_inference_steps=5, seed=0, **FAST).kernel_cache_bytes == 0
        )

    def test_counts_the_layers_of_each_kernel(self, pipeline):
        quantized = DDIMPipeline(quantize_(copy.deepcopy(pipeline.unet), PQCADConfig()), pipeline.scheduler)
        arguments = {"num_images": 2, "num_inference_steps": 5, "seed": 0, **FAST}
        chosen = Counter(row.kernel for row in inspect(quantized.unet) if row.kernel is not None)
        assert evaluate(quantized, pipeline, **arguments).kernels == chosen
        with kernels.use("reference"):
            report = evaluate(quantized, pipeline, **arguments)
        assert report.to_dict()["kernels"] == {"reference": chosen.total()}
        assert evaluate(pipeline, pipeline, **arguments).kernels == {}

    def test_counts_the_kernel_of_layers_without_int8_activations(self, pipeline):
        config = PQCADConfig(activation_bits=None)
        quantized = DDIMPipeline(quantize_(copy.deepcopy(pipeline.unet), config), pipeline.scheduler)
        report = evaluate(quantized, pipeline, num_images=2, num_inference_steps=5, seed=0, **FAST)
        assert report.kernels == {"reference": len(packed_layers(quantized.unet))}

    def test_names_the_cause_of_nan(self, pipeline):
        broken = perturbed(pipeline)
        with torch.no_grad():
            broken.unet.conv_out.bias.fill_(math.nan)
        with pytest.raises(ValueError, match="samples: expected numbers, got a NaN"):
            evaluate(broken, pipeline, num_images=2, num_inference_steps=5, seed=0, **FAST)


STEPS = 2
PIXEL_KINDS = ("ddim", "ddpm")


def quantized(kind: str) -> Any:
    """The pipeline of a kind with a quantized denoiser."""
    pipeline = PIPELINES[kind].build()
    quantize_(getattr(pipeline, PIPELINES[kind].denoiser), PQCADConfig(weight_bits=4))
    return pipeline


def evaluate_kind(kind: str, pipeline: Any, reference: Any, **changes: Any) -> EvaluationReport:
    """The report on two images of a kind's inputs."""
    inputs = PIPELINES[kind].inputs if any(PIPELINES[kind].inputs) else None
    settings = {"num_images": 2, "num_inference_steps": STEPS, "seed": 3, **FAST} | PIPELINES[kind].arguments
    return evaluate(pipeline, reference, inputs, **settings | changes)


def is_plum(images: torch.Tensor) -> torch.Tensor:
    return images.long().sum(dim=(1, 2, 3)) % 2 == 1


class Fruits(SmallClassifier):
    """Finds a plum where the sum of a picture's bytes is odd, else a fig: as good as a coin, and always the same."""

    def __init__(self):
        super().__init__(image_size=8, num_classes=2)

    def forward(self, images):
        return torch.nn.functional.one_hot(is_plum(images).long(), 2).float()

    def features(self, images):
        return images.float().flatten(1)[:, :4]


def fruits(labels: dict[str, list[str]] | None = None) -> ClassifierExtractor:
    reference = PixelExtractor()
    return ClassifierExtractor(
        Fruits(),
        {"fruit": ["fig", "plum"]} if labels is None else labels,
        name="fruits",
        sha256="",
        reference_sha256="",
        reference_mean=reference.reference_mean[:4],
        reference_covariance=reference.reference_covariance[:4, :4],
        reference_features=reference.reference_features[:, :4],
    )


class TestPromptAccuracy:
    def test_is_the_share_of_pictures_that_show_their_prompts(self):
        reference, other, prompts = PIPELINES["sd"].build(), quantized("sd"), ["a fig", "a plum", "some fig"]
        settings = {"num_images": 6, "num_inference_steps": STEPS, "seed": 3}
        labels = {prompt: {"fruit": prompt.split()[1]} for prompt in prompts}
        report = evaluate(
            other, reference, prompts, **settings, **FAST, extractor=fruits(), prompt_labels=labels
        )  # fmt: skip
        met = []
        for each in (reference, other):
            images = generate_images(each, prompts, **settings, progress=False).images
            met.append((is_plum(images) == torch.tensor([False, True, False] * 2)).double())
        assert report.prompt_accuracy == met[1].mean().item()
        assert report.prompt_accuracy_change == pytest.approx((met[1] - met[0]).mean().item(), abs=1e-12)
        low, high = report.prompt_accuracy_change_interval
        assert low <= report.prompt_accuracy_change <= high

    def test_is_not_measured_without_labels(self):
        report = evaluate_kind("sd", PIPELINES["sd"].build(), PIPELINES["sd"].build(), extractor=fruits())
        assert (
            report.prompt_accuracy is report.prompt_accuracy_change is report.prompt_accuracy_change_interval is None
        )

    @pytest.mark.parametrize(
        ("extractor", "labels", "message"),
        [
            (None, {}, "prompt_labels: expected an extractor that recognizes them, got none"),
            (PixelExtractor(), {}, "prompt_labels: .* got a PixelExtractor"),
            (fruits(), {"a fig": {"fruit": "fig"}}, "prompt_labels: .* there is none for 'a plum'"),
            (fruits(), {"a fig": {"fruit": "fig"}, "a plum": {"fruit": "plump"}}, "fruits knows no fruit 'plump'"),
        ],
        ids=["no extractor", "no classifier", "no entry", "no label"],
    )
    def test_what_nobody_could_judge_is_refused_before_any_sample(self, extractor, labels, message, monkeypatch):
        pipeline = PIPELINES["sd"].build()
        monkeypatch.setattr(type(pipeline), "__call__", None)
        with pytest.raises(ValueError, match=message):
            evaluate(
                pipeline, pipeline, ["a fig", "a plum"], num_images=2, num_inference_steps=STEPS, seed=0,
                extractor=extractor, prompt_labels=labels,
            )  # fmt: skip


class TestKinds:
    @pytest.mark.parametrize("kind", PIPELINES)
    def test_a_quantized_copy(self, kind):
        reference = PIPELINES[kind].build()
        report = evaluate_kind(kind, quantized(kind), reference)
        assert 0 < report.sqnr_db < 100
        assert all(map(math.isfinite, (*report.sqnr_interval_db, report.sqnr_median_db, report.psnr_db)))
        assert report.trajectory_error[0] == 0 < report.trajectory_error[-1] < 1
        assert report.trajectory_timesteps[-1] == -1
        assert len(report.trajectory_timesteps) == 1 + (1 if kind == "sd_img2img" else STEPS)
        assert report.fidelity_of == ("images" if kind in PIXEL_KINDS else "latents")
        assert 0 < report.image_psnr_db < 100
        assert 0 < report.image_ssim < 1
        assert report.lpips is report.lpips_network is report.clip_score is report.clip_model is None
        assert report.average_bits == pytest.approx(4, abs=0.3)
        assert sum(report.kernels.values()) > 0
        assert report.tensor_bytes < tensor_bytes(getattr(reference, PIPELINES[kind].denoiser))
        for latency in (report.latency_ms, report.reference_latency_ms):
            assert 0 < latency.min_ms <= latency.max_ms
        json.dumps(report.to_dict(), allow_nan=False)

    @pytest.mark.parametrize("kind", PIPELINES)
    def test_an_exact_copy(self, kind):
        report = evaluate_kind(kind, PIPELINES[kind].build(), PIPELINES[kind].build())
        assert report.sqnr_db == report.psnr_db == math.inf
        assert set(report.trajectory_error) == {0.0}
        assert report.image_psnr_db == math.inf
        assert report.image_ssim == pytest.approx(1, abs=1e-9)


class TestPictures:
    def test_figures_are_those_of_the_samples(self):
        reference, other = PIPELINES["sd"].build(), quantized("sd")
        report = evaluate_kind("sd", other, reference)
        wanted, found = (
            generate_images(
                each, PIPELINES["sd"].inputs, num_images=2, num_inference_steps=STEPS, seed=3, progress=False,
                **PIPELINES["sd"].arguments,
            )
            for each in (reference, other)
        )  # fmt: skip
        assert wanted.images.shape == (2, 3, 16, 16)
        assert report.sqnr_db == sqnr_db(wanted.latents, found.latents)
        error = (wanted.images.double() - found.images.double()).square().mean().item()
        assert report.image_psnr_db == pytest.approx(10 * math.log10(255**2 / error))
        assert report.image_ssim == structural_similarity(wanted.images, found.images)

    def test_those_of_a_pipeline_of_pixels_are_its_samples_in_8_bits(self, pipeline):
        other = perturbed(pipeline)
        report = evaluate(other, pipeline, num_images=3, num_inference_steps=2, seed=3, **FAST)
        wanted, found = (
            to_uint8(generate_samples(each, num_images=3, num_inference_steps=2, seed=3, progress=False))
            for each in (pipeline, other)
        )
        error = (wanted.double() - found.double()).square().mean().item()
        assert report.image_psnr_db == pytest.approx(10 * math.log10(255**2 / error))
        assert report.image_ssim == structural_similarity(wanted, found)
        left_out = evaluate(other, pipeline, num_images=3, num_inference_steps=2, seed=3, decode=False, **FAST)
        assert left_out.image_psnr_db is left_out.image_ssim is None

    def test_may_be_left_out(self, monkeypatch):
        pipeline = PIPELINES["sd"].build()
        monkeypatch.setattr(pipeline.vae, "decode", lambda *_, **__: pytest.fail("it decoded"))
        report = evaluate_kind("sd", pipeline, PIPELINES["sd"].build(), decode=False)
        assert report.sqnr_db == math.inf
        assert report.image_psnr_db is report.image_ssim is None

    def test_are_what_the_extractor_sees(self):
        extractor, pipeline = PixelExtractor(), PIPELINES["sd"].build()
        report = evaluate_kind("sd", pipeline, pipeline, extractor=extractor, num_images=3)
        images = generate_images(
            pipeline, PIPELINES["sd"].inputs, num_images=3, num_inference_steps=STEPS, seed=3, progress=False,
            **PIPELINES["sd"].arguments,
        ).images  # fmt: skip
        statistics = feature_statistics(extractor(images))
        expected = frechet_distance(*statistics, extractor.reference_mean, extractor.reference_covariance)
        assert report.frechet_distance == pytest.approx(expected, rel=1e-6)

    def test_an_extractor_sees_a_video_frame_by_frame(self):
        pipeline = PIPELINES["wan"].build()
        report = evaluate_kind("wan", pipeline, pipeline, extractor=PixelExtractor())
        assert report.kernel_subset_size == 2 * 3

    def test_an_extractor_of_others_refuses_after_the_first_batch(self):
        statistics = dict.fromkeys(("reference_mean", "reference_covariance", "reference_features"), torch.zeros(2))
        extractor = ClassifierExtractor(
            SmallClassifier(image_size=28), name="grey", sha256="", reference_sha256="", **statistics
        )
        pipeline = PIPELINES["sd"].build()
        calls = []
        pipeline.unet.register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(ValueError, match=r"expected uint8 of shape \(N, 1, 28, 28\), got .* \(1, 3, 16, 16\)"):
            evaluate_kind("sd", pipeline, pipeline, extractor=extractor, num_images=8, batch_size=1)
        assert len(calls) == STEPS

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            (
                {"reference_samples": torch.zeros(2, 4, 8, 8)},
                "with their pictures, got none. Make them with generate_i",
            ),
            ({"extractor": PixelExtractor(), "decode": False}, "extractor: it needs pictures"),
        ],
        ids=["latents alone", "no pictures"],
    )
    def test_what_lacks_them_is_refused_before_anything_runs(self, changes, message, monkeypatch):
        pipeline = PIPELINES["sd"].build()
        monkeypatch.setattr(pipeline.unet, "forward", lambda *_, **__: pytest.fail("it ran"))
        with pytest.raises(ValueError, match=message):
            evaluate_kind("sd", pipeline, pipeline, **changes)

    def test_reference_samples_bring_theirs(self):
        reference, other = PIPELINES["sd"].build(), quantized("sd")
        samples = generate_images(
            reference, PIPELINES["sd"].inputs, num_images=3, num_inference_steps=STEPS, seed=3, progress=False,
            **PIPELINES["sd"].arguments,
        )  # fmt: skip
        found, wanted = (
            evaluate_kind("sd", other, reference, reference_samples=samples),
            evaluate_kind("sd", other, reference),
        )
        assert found.image_ssim == pytest.approx(wanted.image_ssim, abs=1e-3)
        assert found.sqnr_db == pytest.approx(wanted.sqnr_db, abs=1e-2)
        assert found.trajectory_error == pytest.approx(wanted.trajectory_error, rel=1e-2)
        bare = evaluate_kind("sd", other, reference, reference_samples=samples.latents, decode=False)
        assert bare.sqnr_db == pytest.approx(wanted.sqnr_db, abs=1e-2)


class TestTrajectories:
    def test_a_student_of_flow_matching_lands_where_two_steps_do(self):
        pipeline = PIPELINES["sd3"].build()
        grid = grid_of(pipeline.scheduler, 6)
        sigmas = sigmas_for(pipeline.scheduler, grid.every(2).sigma)
        halves = {"num_inference_steps": 3, "reference_num_inference_steps": 6}
        report = evaluate_kind("sd3", pipeline, pipeline, arguments={"sigmas": sigmas}, **halves)
        assert report.trajectory_timesteps == pytest.approx([*grid.timestep[::2].tolist(), -1])
        assert report.trajectory_error[0] == 0 < report.trajectory_error[-1]
        assert evaluate_kind("sd3", pipeline, pipeline, **halves).trajectory_error is None  # its own grids do not nest
        swapped = evaluate_kind(
            "sd3", pipeline, pipeline, num_inference_steps=6, reference_num_inference_steps=3,
            reference_arguments={"sigmas": sigmas},
        )  # fmt: skip
        assert swapped.trajectory_timesteps == pytest.approx(report.trajectory_timesteps)

    def test_schedulers_of_two_kinds_have_no_common_states(self):
        other = PIPELINES["sd"].build()
        other.scheduler = EulerDiscreteScheduler.from_config(other.scheduler.config)
        report = evaluate_kind("sd", other, PIPELINES["sd"].build())
        assert report.trajectory_timesteps is report.trajectory_error is report.trajectory_num_images is None
        assert math.isfinite(report.sqnr_db)

    def test_a_students_scheduler_is_of_its_teachers_kind(self):
        reference, student = PIPELINES["sd"].build(), PIPELINES["sd"].build()
        student.scheduler = student_scheduler(reference.scheduler, StudentSteps(2, 50))
        for one, two in ((student, reference), (reference, student)):
            report = evaluate_kind("sd", one, two, num_inference_steps=2)
            assert report.trajectory_error == pytest.approx((0, 0, 0), abs=1e-6)

    def test_only_some_videos_are_kept(self, pipeline, monkeypatch):
        monkeypatch.setattr(generate, "MAX_STATE_BYTES", 2 * 6 * 8 * 8 * 4)
        report = evaluate(
            perturbed(pipeline), pipeline, num_images=5, num_inference_steps=5, seed=0, batch_size=1, **FAST
        )
        assert report.trajectory_num_images == 2

    def test_are_of_the_first_images(self, pipeline):
        report = evaluate(
            perturbed(pipeline), pipeline, num_images=18, num_inference_steps=5, seed=0, batch_size=5, **FAST
        )
        assert report.trajectory_num_images == MAX_TRAJECTORY_IMAGES == 16
        wanted, sample = (
            generate_samples(p, num_images=16, num_inference_steps=5, seed=0, progress=False).double()
            for p in (pipeline, perturbed(pipeline))
        )
        final = (((wanted - sample) ** 2).sum() / (wanted**2).sum()).item()
        assert report.trajectory_error[-1] == pytest.approx(final, rel=1e-3)


def test_each_pipeline_may_have_arguments_of_its_own():
    pipeline = PIPELINES["sd"].build()
    report = evaluate_kind("sd", pipeline, pipeline, reference_arguments={"guidance_scale": 2.0})
    assert report.sqnr_db < 100
    same = evaluate_kind(
        "sd", pipeline, pipeline, arguments={"guidance_scale": 2.0}, reference_arguments={"guidance_scale": 2.0}
    )
    assert same.sqnr_db == math.inf


@pytest.mark.parametrize(
    ("kind", "arguments", "evaluations"), [("sd3", {}, 6), ("sd3", {"guidance_scale": 1.0}, 3), ("wan", {}, 6)]
)
def test_model_evaluations_are_steps_times_branches(kind, arguments, evaluations):
    """Whether in one call or in one for each branch: of one image, whatever the batch."""
    pipeline = PIPELINES[kind].build()
    report = evaluate_kind(kind, pipeline, pipeline, arguments=arguments, num_inference_steps=3, decode=False)
    assert report.model_evaluations == evaluations


def test_random_steps_repeat():
    reference, other = PIPELINES["sd"].build(), PIPELINES["sd"].build()
    for each in (reference, other):
        each.scheduler = EulerAncestralDiscreteScheduler.from_config(each.scheduler.config)
    assert evaluate_kind("sd", other, reference).sqnr_db == math.inf


def test_the_time_ends_with_the_last_step(monkeypatch):
    pipeline, seen = PIPELINES["sd"].build(), []

    def note(of: str) -> Any:
        return lambda module, args, kwargs, output: seen.append((of, len(output[0])))

    def time(candidates: dict[str, Any], num_rounds: int) -> dict[str, Latency]:
        seen.clear()
        for run in candidates.values():
            run()
        return dict.fromkeys(candidates, Latency(3.0, 3.0, 3.0, (3.0,)))

    pipeline.text_encoder.register_forward_hook(note("text"), with_kwargs=True)
    pipeline.unet.register_forward_hook(note("step"), with_kwargs=True)
    pipeline.vae.decoder.register_forward_hook(note("decoded"), with_kwargs=True)
    monkeypatch.setattr(report_module, "interleaved_latency", time)
    report = evaluate_kind("sd", pipeline, pipeline, latency_batch_size=3)
    # Of 3 images, with the prompt and without.
    assert seen == 2 * [("text", 3), ("text", 3), *[("step", 2 * 3)] * STEPS]
    assert report.latency_ms.median_ms == report.reference_latency_ms.median_ms == 1.0


def test_importing_the_package_stays_light():
    heavy = ("diffusers_pqcad.evaluation", "torchmetrics")  # scipy is no witness: diffusers' schedulers import it
    code = f"import diffusers_pqcad, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
