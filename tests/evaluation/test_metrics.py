"""Specification of `diffusers_pqcad.evaluation.metrics`."""

import itertools
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter
from torchmetrics.image.kid import KernelInceptionDistance
from torchmetrics.image.psnr import PeakSignalNoiseRatio

from diffusers_pqcad.evaluation.metrics import (
    bootstrap_interval,
    feature_statistics,
    frechet_distance,
    image_mse,
    kernel_distance,
    median_sqnr_db,
    paired_change_interval,
    picture_psnr_db,
    psnr_db,
    reference_variance,
    sqnr_db,
    structural_similarity,
    trajectory_error,
)


def features(num_images: int, width: int = 6, *, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    """Correlated, skewed features, like the penultimate activations of a classifier."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=torch.Generator().manual_seed(99)) / width**0.5
    return (torch.randn(num_images, width, generator=generator) @ mixing + shift).relu()


def images(seed: int, batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 1, 5, 5, generator=torch.Generator().manual_seed(seed))


class TestFeatureStatistics:
    def test_worked_example(self):
        # Means (2, 4); deviations (-1, -2), (1, 2); divided by N - 1 = 1.
        mean, covariance = feature_statistics(torch.tensor([[1.0, 2.0], [3.0, 6.0]]))
        assert mean.tolist() == [2.0, 4.0]
        assert covariance.tolist() == [[2.0, 4.0], [4.0, 8.0]]
        assert mean.dtype == covariance.dtype == torch.float64

    @pytest.mark.parametrize("num_images", [2, 5, 40], ids=["two", "fewer than D", "more than D"])
    def test_agrees_with_numpy(self, num_images):
        drawn = features(num_images)
        mean, covariance = feature_statistics(drawn)
        torch.testing.assert_close(mean, torch.from_numpy(drawn.double().numpy().mean(axis=0)), rtol=1e-12, atol=1e-14)
        expected = torch.from_numpy(np.cov(drawn.double().numpy(), rowvar=False))
        torch.testing.assert_close(covariance, expected, rtol=1e-12, atol=1e-14)

    def test_an_offset_costs_no_accuracy(self):
        drawn = features(50).double()
        torch.testing.assert_close(
            feature_statistics(drawn + 1e6)[1], feature_statistics(drawn)[1], rtol=1e-8, atol=1e-8
        )

    @pytest.mark.parametrize(
        ("bad", "message"),
        [
            (torch.zeros(3), "expected \\(N, D\\)"),
            (torch.zeros(1, 3), "N >= 2"),
            (torch.tensor([[1.0, math.nan], [0.0, 0.0]]), "got 1 NaN"),
        ],
        ids=["one axis", "one image", "nan"],
    )
    def test_refuses(self, bad, message):
        with pytest.raises(ValueError, match=message):
            feature_statistics(bad)


class TestFrechetDistance:
    def test_worked_example(self):
        # |(3, 4)|^2 = 25, and sum (sqrt(a_i) - sqrt(b_i))^2 = (1 - 2)^2 + (3 - 4)^2 = 2 for diagonal covariances.
        covariance_a, covariance_b = torch.diag(torch.tensor([1.0, 9.0])), torch.diag(torch.tensor([4.0, 16.0]))
        distance = frechet_distance(torch.zeros(2), covariance_a, torch.tensor([3.0, 4.0]), covariance_b)
        assert distance == pytest.approx(27.0, rel=1e-12)

    def test_agrees_with_scipy_sqrtm(self):
        mean_a, cov_a = feature_statistics(features(80))
        mean_b, cov_b = feature_statistics(features(60, seed=1, shift=0.4))
        root = scipy.linalg.sqrtm(cov_a.numpy() @ cov_b.numpy()).real
        expected = ((mean_a - mean_b) ** 2).sum() + cov_a.trace() + cov_b.trace() - 2 * np.trace(root)
        assert frechet_distance(mean_a, cov_a, mean_b, cov_b) == pytest.approx(float(expected), rel=1e-10)

    def test_agrees_with_torchmetrics(self):
        from torchmetrics.image.fid import _compute_fid

        a, b = feature_statistics(features(80)), feature_statistics(features(60, seed=1, shift=0.4))
        assert frechet_distance(*a, *b) == pytest.approx(_compute_fid(*a, *b).item(), rel=1e-10)

    def test_singular_covariances(self):
        # Two features that copy each other: the second is redundant, so the distance is twice that of one alone.
        one_a, one_b = features(30, 1), features(30, 1, seed=1, shift=1.0)
        alone = frechet_distance(*feature_statistics(one_a), *feature_statistics(one_b))
        doubled = frechet_distance(*feature_statistics(one_a.repeat(1, 2)), *feature_statistics(one_b.repeat(1, 2)))
        assert doubled == pytest.approx(2 * alone, rel=1e-9)

    @given(seed=st.integers(0, 10**6), num_images=st.integers(2, 30), shift=st.floats(-3, 3))
    @settings(max_examples=25, deadline=None)
    def test_is_a_symmetric_distance(self, seed, num_images, shift):
        a = feature_statistics(features(num_images, seed=seed))
        b = feature_statistics(features(20, seed=seed + 1, shift=shift))
        assert frechet_distance(*a, *a) <= 1e-9 * (1 + a[1].trace().item())
        assert frechet_distance(*a, *b) >= 0
        assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-7, abs=1e-9)

    def test_a_shift_adds_its_square(self):
        mean, covariance = feature_statistics(features(50))
        assert frechet_distance(mean, covariance, mean + 2, covariance) == pytest.approx(4 * len(mean), rel=1e-9)

    def test_refuses_bad_input(self):
        mean, covariance = feature_statistics(features(20))
        other = feature_statistics(features(20, 5))
        with pytest.raises(ValueError, match=r"mean_b: expected shape \(6,\).*got \(5,\)"):
            frechet_distance(mean, covariance, *other)
        with pytest.raises(ValueError, match="covariance_b: expected finite values"):
            frechet_distance(mean, covariance, mean, covariance * math.nan)
        with pytest.raises(ValueError, match="covariance_a: expected a covariance"):
            frechet_distance(mean, -covariance, mean, covariance)


def brute_force_mmd(a: torch.Tensor, b: torch.Tensor) -> float:
    """Unbiased MMD^2 with the cubic kernel, one pair at a time, in Python floats (Binkowski et al. 2018, eq. (4))."""
    a, b = a.double().tolist(), b.double().tolist()

    def kernel(x: list[float], y: list[float]) -> float:
        return (sum(u * v for u, v in zip(x, y, strict=True)) / len(x) + 1) ** 3

    within_a = sum(kernel(x, y) for x, y in itertools.permutations(a, 2)) / (len(a) * (len(a) - 1))
    within_b = sum(kernel(x, y) for x, y in itertools.permutations(b, 2)) / (len(b) * (len(b) - 1))
    between = sum(kernel(x, y) for x in a for y in b) / (len(a) * len(b))
    return within_a + within_b - 2 * between


class TestKernelDistance:
    def test_worked_example(self):
        # D = 1: k(x, y) = (xy + 1)^3. Within a = {1, 1}: 8. Within b = {0, 0}: 1. Between: 1. MMD^2 = 8 + 1 - 2.
        mean, spread = kernel_distance(torch.ones(2, 1), torch.zeros(2, 1), subset_size=2, num_subsets=3)
        assert mean == pytest.approx(7.0, rel=1e-12)
        assert spread == pytest.approx(0.0, abs=1e-12)

    def test_agrees_with_brute_force(self):
        a, b = features(17), features(17, seed=1, shift=0.3)
        mean, _ = kernel_distance(a, b, subset_size=17, num_subsets=1)  # one subset of everything
        assert mean == pytest.approx(brute_force_mmd(a, b), rel=1e-10)

    def test_agrees_with_torchmetrics(self):
        # With subsets of everything the random order does not matter.
        a, b = features(40), features(40, seed=1, shift=0.3)
        with pytest.warns(UserWarning, match="large memory footprint"):
            metric = KernelInceptionDistance(feature=torch.nn.Identity(), subsets=2, subset_size=40)
        metric.set_dtype(torch.float64)
        metric.update(a.double(), real=True)
        metric.update(b.double(), real=False)
        expected = metric.compute()[0].item()
        assert kernel_distance(a, b, subset_size=40, num_subsets=2)[0] == pytest.approx(expected, rel=1e-5)

    def test_is_unbiased(self):
        # The biased estimator keeps the diagonal and is positive for every draw; the mean of ours is 0 in 4 errors.
        pairs = [(features(30, seed=2 * i), features(30, seed=2 * i + 1)) for i in range(300)]
        estimates = torch.tensor([kernel_distance(a, b, subset_size=30, num_subsets=1)[0] for a, b in pairs])
        standard_error = estimates.std() / len(estimates) ** 0.5
        assert abs(estimates.mean()) < 4 * standard_error
        assert (estimates < 0).any()

    def test_sees_a_shift(self):
        same = kernel_distance(features(500), features(500, seed=1), subset_size=250)[0]
        shifted = kernel_distance(features(500), features(500, seed=1, shift=0.5), subset_size=250)[0]
        assert shifted > 10 * abs(same)

    def test_spread_is_the_population_deviation_over_subsets(self):
        # For two estimates it is half their difference, |mean - first|.
        a, b = features(60), features(50, seed=1)
        first, _ = kernel_distance(a, b, subset_size=20, num_subsets=1)
        mean, spread = kernel_distance(a, b, subset_size=20, num_subsets=2)
        assert spread == pytest.approx(abs(mean - first), rel=1e-9)

    def test_seed_decides(self):
        def run(seed: int) -> tuple[float, float]:
            return kernel_distance(features(60), features(50, seed=1), subset_size=20, num_subsets=5, seed=seed)

        assert run(3) == run(3)
        assert run(3) != run(4)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"subset_size": 51}, "expected 2 to 50"),
            ({"subset_size": 1}, "expected 2 to 50"),
            ({"subset_size": 10, "num_subsets": 0}, "num_subsets=0"),
        ],
        ids=["too few images", "one image", "no subset"],
    )
    def test_refuses_subsets(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            kernel_distance(features(60), features(50), **arguments)

    def test_refuses_other_width(self):
        with pytest.raises(ValueError, match="features_b: expected 6 columns"):
            kernel_distance(features(60), features(60, 5), subset_size=10)


class TestSqnrAndPsnr:
    def test_worked_example(self):
        # Variance of (-1, 1, -1, 1) is 1; errors of 0.1 give an MSE of 0.01: 20 dB, and 2^2 / 0.01 = 400: 26.02 dB.
        reference = torch.tensor([[-1.0, 1.0], [-1.0, 1.0]], dtype=torch.float64)
        sample = reference + 0.1
        assert sqnr_db(reference, sample) == pytest.approx(20.0, rel=1e-12)
        assert psnr_db(reference, sample) == pytest.approx(10 * math.log10(400), rel=1e-12)

    def test_psnr_agrees_with_torchmetrics(self):
        reference, sample = images(0).clamp(-1, 1), images(1).clamp(-1, 1)
        metric = PeakSignalNoiseRatio(data_range=2.0)
        assert psnr_db(reference, sample) == pytest.approx(metric(sample, reference).item(), rel=1e-5)

    def test_variance_is_over_the_whole_batch(self):
        # Each image is constant: only the difference between the images is signal, var (0, 2) = 1.
        reference = torch.tensor([[0.0, 0.0], [2.0, 2.0]])
        assert reference_variance(reference) == 1.0
        assert sqnr_db(reference, reference + 1) == pytest.approx(0.0, abs=1e-12)

    def test_the_median_image_does_not_see_one_that_is_lost(self):
        reference = torch.tensor([[-1.0, 1.0]] * 5, dtype=torch.float64)
        sample = reference + torch.tensor([[0.1], [0.1], [0.1], [0.01], [2.0]])
        assert median_sqnr_db(reference, sample) == pytest.approx(20.0, rel=1e-6)
        assert sqnr_db(reference, sample) < 2
        assert median_sqnr_db(reference, reference) == math.inf

    def test_equal_is_infinite(self):
        assert sqnr_db(images(0), images(0)) == psnr_db(images(0), images(0)) == math.inf

    @given(scale=st.floats(1e-3, 1e3), offset=st.floats(-10, 10))
    @settings(max_examples=25, deadline=None)
    def test_sqnr_ignores_the_unit(self, scale, offset):
        reference, sample = images(0).double(), images(1).double()
        changed = sqnr_db(scale * reference + offset, scale * sample + offset)
        assert changed == pytest.approx(sqnr_db(reference, sample), abs=1e-6)

    def test_half_the_error_is_six_decibel_more(self):
        reference, noise = images(0).double(), images(1).double()
        gain = sqnr_db(reference, reference + noise / 2) - sqnr_db(reference, reference + noise)
        assert gain == pytest.approx(20 * math.log10(2), abs=1e-9)

    def test_image_mse(self):
        reference = torch.zeros(2, 1, 2, 2)
        sample = torch.stack([torch.ones(1, 2, 2), torch.full((1, 2, 2), 3.0)])
        assert image_mse(reference, sample).tolist() == [1.0, 9.0]

    def test_refuses_bad_input(self):
        with pytest.raises(ValueError, match="sample: expected the shape of the reference"):
            sqnr_db(images(0), images(0)[:2])  # (2, ...) would not broadcast, (1, ...) would
        with pytest.raises(ValueError, match="sample: expected the shape of the reference"):
            sqnr_db(images(0), images(0)[:1])
        with pytest.raises(ValueError, match="sample: expected finite values, got 100"):
            sqnr_db(images(0), images(0) * math.nan)
        with pytest.raises(ValueError, match="constant"):
            sqnr_db(torch.ones(2, 3), torch.zeros(2, 3))
        with pytest.raises(ValueError, match="data_range=0"):
            psnr_db(images(0), images(1), data_range=0)


def pictures(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def near(picture: torch.Tensor) -> torch.Tensor:
    """`picture` with a tenth of another in it."""
    return (0.9 * picture + 0.1 * pictures(9, *picture.shape)).to(torch.uint8)


def ssim_by_definition(a: torch.Tensor, b: torch.Tensor, window: int) -> float:
    """Eq. (13) of Wang et al. for (n, C, H, W), by scipy's filters; borders are mirrored."""

    def mean(x: np.ndarray) -> np.ndarray:
        sigma = 1.5 * window / 11
        return gaussian_filter(x, (0, 0, sigma, sigma), mode="mirror", radius=(0, 0, window // 2, window // 2))

    x, y = a.double().numpy(), b.double().numpy()
    c_1, c_2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    covariance = mean(x * y) - mean(x) * mean(y)
    variances = mean(x * x) - mean(x) ** 2 + mean(y * y) - mean(y) ** 2
    top = (2 * mean(x) * mean(y) + c_1) * (2 * covariance + c_2)
    return float((top / ((mean(x) ** 2 + mean(y) ** 2 + c_1) * (variances + c_2))).mean())


class TestPictures:
    @pytest.mark.parametrize(("size", "window"), [((20, 17), 11), ((11, 30), 11), ((10, 9), 9), ((4, 20), 3)])
    def test_ssim_agrees_with_the_definition(self, size, window):
        a = pictures(0, 20, 3, *size)  # more than are computed at once
        expected = ssim_by_definition(a, near(a), window)
        assert 0.5 < expected < 0.999
        assert structural_similarity(a, near(a)) == pytest.approx(expected, abs=1e-9)

    def test_ssim_of_a_video_is_the_mean_over_frames(self):
        a = pictures(0, 3, 4, 3, 16, 16)
        assert structural_similarity(a, near(a)) == pytest.approx(ssim_by_definition(a[0], near(a)[0], 11), abs=0.05)
        flat = structural_similarity(a.flatten(0, 1), near(a).flatten(0, 1))
        assert structural_similarity(a, near(a)) == pytest.approx(flat, abs=1e-9)

    def test_psnr_agrees_with_torchmetrics(self):
        a = pictures(0, 20, 3, 8, 8)
        expected = PeakSignalNoiseRatio(data_range=255.0)(near(a).float(), a.float()).item()
        assert picture_psnr_db(a, near(a)) == pytest.approx(expected, rel=1e-5)

    def test_psnr_worked_example(self):
        # An error of 255 in one of 100 numbers: 100, or 20 dB.
        a = torch.zeros(25, 1, 2, 2, dtype=torch.uint8)
        b = a.clone()
        b[13, 0, 1, 1] = 255
        assert picture_psnr_db(a, b) == pytest.approx(20)

    def test_equal_ones(self):
        a = pictures(0, 9, 3, 16, 16)
        assert picture_psnr_db(a, a) == math.inf
        assert structural_similarity(a, a) == pytest.approx(1, abs=1e-12)

    @pytest.mark.parametrize("metric", [picture_psnr_db, structural_similarity])
    def test_refuses_other_shapes(self, metric):
        with pytest.raises(ValueError, match="expected the shape of the reference"):
            metric(pictures(0, 2, 3, 8, 8), pictures(0, 2, 1, 8, 8))


class TestBootstrapInterval:
    def test_equal_errors_have_no_spread(self):
        assert bootstrap_interval(torch.full((5,), 0.01), 1.0) == pytest.approx((20.0, 20.0), rel=1e-6)

    def test_an_exact_copy_is_infinite(self):
        assert bootstrap_interval(torch.zeros(5), 1.0) == (math.inf, math.inf)

    def test_agrees_with_own_resampling(self):
        errors = torch.rand(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 2
        draws = torch.randint(0, 200, (20_000, 200), generator=torch.Generator().manual_seed(1))
        means = errors[draws].mean(dim=1)
        ends = torch.quantile(means, torch.tensor([0.975, 0.025], dtype=torch.float64))
        expected = (10 * torch.log10(2.0 / ends)).tolist()
        interval = bootstrap_interval(errors, 2.0, num_resamples=20_000)
        assert interval == pytest.approx(expected, abs=0.02)

    def test_agrees_with_the_normal_approximation(self):
        errors = torch.rand(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        mean, margin = errors.mean(), 1.96 * errors.std() / 20
        expected = [10 * math.log10(1.0 / (mean + margin)), 10 * math.log10(1.0 / (mean - margin))]
        assert bootstrap_interval(errors, 1.0) == pytest.approx(expected, abs=0.02)

    @given(errors=st.lists(st.floats(1e-6, 1e3), min_size=2, max_size=20), seed=st.integers(0, 100))
    @settings(max_examples=20, deadline=None)
    def test_lies_between_best_and_worst_image(self, errors, seed):
        mse = torch.tensor(errors, dtype=torch.float64)
        low, high = bootstrap_interval(mse, 1.0, num_resamples=100, seed=seed)
        assert 10 * math.log10(1 / max(errors)) - 1e-6 <= low <= high <= 10 * math.log10(1 / min(errors)) + 1e-6

    def test_seed_decides(self):
        errors = torch.arange(1.0, 30.0)
        assert bootstrap_interval(errors, 1.0, seed=1) == bootstrap_interval(errors, 1.0, seed=1)
        assert bootstrap_interval(errors, 1.0, seed=1) != bootstrap_interval(errors, 1.0, seed=2)

    def test_a_higher_confidence_is_wider(self):
        errors = torch.arange(1.0, 30.0)
        narrow = bootstrap_interval(errors, 1.0, confidence_level=0.5)
        wide = bootstrap_interval(errors, 1.0)
        assert wide[0] < narrow[0] < narrow[1] < wide[1]

    @pytest.mark.parametrize(
        ("errors", "variance", "message"),
        [
            ([0.1], 1.0, "n >= 2 images"),
            ([0.1, -0.1], 1.0, "negative"),
            ([0.1, math.nan], 1.0, "finite"),
            ([0.1, 0.2], 0.0, "variance=0.0"),
        ],
        ids=["one image", "negative", "nan", "no signal"],
    )
    def test_refuses(self, errors, variance, message):
        with pytest.raises(ValueError, match=message):
            bootstrap_interval(torch.tensor(errors), variance)


class TestTrajectoryError:
    def test_worked_example(self):
        # Step 0 equal; step 1: error 1 + 1 over power 4 + 4, both images together.
        reference = torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1).expand(2, 2, 1, 1, 1)
        sample = reference.clone()
        sample[1] += 1
        assert trajectory_error(reference, sample).tolist() == [0.0, 0.25]

    def test_agrees_with_a_loop(self):
        reference, sample = torch.stack([images(i) for i in range(3)]), torch.stack([images(9 + i) for i in range(3)])
        expected = [
            float(np.linalg.norm(z - w) ** 2 / np.linalg.norm(w) ** 2)
            for z, w in zip(sample.double().numpy(), reference.double().numpy(), strict=True)
        ]
        assert trajectory_error(reference, sample).tolist() == pytest.approx(expected, rel=1e-12)

    def test_a_lost_sample_has_error_one(self):
        reference = torch.stack([images(0), images(1)])
        assert trajectory_error(reference, torch.zeros_like(reference)).tolist() == [1.0, 1.0]

    def test_refuses_bad_input(self):
        reference = torch.stack([images(0), images(1)])
        with pytest.raises(ValueError, match="step 1 is all zero"):
            trajectory_error(reference * torch.tensor([1.0, 0.0]).view(2, 1, 1, 1, 1), reference)
        with pytest.raises(ValueError, match="expected the shape of the reference"):
            trajectory_error(reference, reference[:1])


class TestPairedChange:
    def test_no_change_has_no_width(self):
        met = torch.tensor([True, False, True])
        assert paired_change_interval(met, met) == (0.0, 0.0)

    def test_the_interval_of_many_pairs_is_the_normal_one(self):
        generator = torch.Generator().manual_seed(0)
        before, after = torch.rand(2, 1000, generator=generator) < torch.tensor([[0.9], [0.8]])
        change = after.double() - before.double()
        centre, spread = change.mean().item(), 1.96 * change.std().item() / 1000**0.5
        expected = (centre - spread, centre + spread)
        assert paired_change_interval(before, after, num_resamples=20_000) == pytest.approx(expected, abs=1.5e-3)

    def test_what_the_images_share_cancels(self):
        shared = 100 * torch.randn(50, generator=torch.Generator().manual_seed(0))
        assert paired_change_interval(shared, shared + 1) == pytest.approx((1, 1), abs=1e-4)

    @pytest.mark.parametrize("shapes", [((1,), (1,)), ((3,), (4,)), ((2, 2), (2, 2))])
    def test_what_is_no_pair_is_refused(self, shapes):
        with pytest.raises(ValueError, match="before and after: expected"):
            paired_change_interval(*(torch.zeros(shape) for shape in shapes))
