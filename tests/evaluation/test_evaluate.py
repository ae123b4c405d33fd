"""Specification of `evaluate`, `generate_samples` and `to_uint8`, on pipelines of a few hundred parameters."""

import copy
import json
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

from diffusers_pqcad import PQCADConfig, inspect, kernels, quantize_
from diffusers_pqcad.compression.fake_quant import prepare_
from diffusers_pqcad.compression.sampling import initial_noise
from diffusers_pqcad.evaluation import EvaluationReport, evaluate, generate_samples, to_uint8
from diffusers_pqcad.evaluation.features import FeatureExtractor
from diffusers_pqcad.evaluation.metrics import feature_statistics, frechet_distance
from diffusers_pqcad.layers.find import kernel_cache_bytes, packed_layers
from diffusers_pqcad.loading.convert import match_modules

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
        return images[:, 0, ::4, ::4].flatten(1).float() / 255


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
        noise = initial_noise((1, 8, 8), seed=3, start=0, count=2)
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
            ({"num_inference_steps": 7}, "num_inference_steps=7 must divide num_train_timesteps=1000"),
        ],
        ids=["no image", "empty batches", "steps"],
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
        shifted = evaluate(other, pipeline, reference_samples=samples + 1, **arguments)
        assert shifted.sqnr_db < report.sqnr_db

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
            ({"num_inference_steps": 7}, "num_inference_steps=7 must divide"),
            ({"reference_num_inference_steps": 3}, "num_inference_steps=3 must divide"),
            ({"batch_size": 0}, "batch_size=0"),
            ({"reference_samples": torch.zeros(1, 1, 8, 8)}, "expected at least 2 images"),
            ({"reference_samples": torch.zeros(2, 3, 8, 8)}, r"of shape \(1, 8, 8\), got shape \(2, 3, 8, 8\)"),
        ],
        ids=["one image", "steps", "reference steps", "batch size", "too few references", "other references"],
    )
    def test_refuses(self, pipeline, changes, message):
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
        with pytest.raises(ValueError, match="sample: expected finite values"):
            evaluate(broken, pipeline, num_images=2, num_inference_steps=5, seed=0, **FAST)


def test_importing_the_package_stays_light():
    heavy = ("diffusers_pqcad.evaluation", "torchmetrics")  # scipy is no witness: diffusers' schedulers import it
    code = f"import diffusers_pqcad, sys; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
