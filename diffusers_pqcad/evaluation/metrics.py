"""Pure functions that compare a model's samples with a reference: no model, no file, no device is known here.

Feature metrics take feature matrices (N, D) of any extractor; the name of a number comes from its extractor, never
from this file. Variances of a batch are population variances (division by the number of values).
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from diffusers_pqcad.compression.extras import require

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels, Wang et al. 2004
PSD_TOLERANCE = 1e-6  # a covariance estimate may have eigenvalues this far below zero, relative to its largest one


def feature_statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean (D,) and the unbiased covariance (D, D) of `features` (N, D), both float64 on the CPU.

    The covariance divides by N - 1, as the FID literature and numpy.cov do; for N <= D it is singular, which
    `frechet_distance` accepts.

    Raises ValueError if `features` is not (N, D) with N >= 2, or holds a NaN or infinity.
    """
    _check_features(features, "features")
    values = features.detach().to("cpu", torch.float64)
    mean = values.mean(dim=0)
    centered = values - mean  # (N, D)
    return mean, centered.T @ centered / (len(values) - 1)


def frechet_distance(mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor) -> float:
    """Return |mean_a - mean_b|^2 + Tr(A + B - 2 (A B)^(1/2)), the squared 2-Wasserstein distance of two Gaussians.

    Means are (D,), covariances A and B (D, D); the arithmetic is float64, the result >= 0. The number falls with the
    number of images behind the statistics, so compare only at equal N. Singular covariances (N <= D) are fine.

    Tr (A B)^(1/2) is the sum of the singular values of A^(1/2) B^(1/2): only symmetric matrices are decomposed, and
    a zero eigenvalue costs no accuracy.

    Raises ValueError for a NaN or infinity, for sizes that differ, and for a matrix that is no covariance.
    Source: Heusel et al. 2017, arXiv:1706.08500, eq. (6).
    """
    num_features = mean_a.numel()
    for name, tensor, shape in (
        ("mean_a", mean_a, (num_features,)),
        ("covariance_a", covariance_a, (num_features, num_features)),
        ("mean_b", mean_b, (num_features,)),
        ("covariance_b", covariance_b, (num_features, num_features)),
    ):
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name}: expected shape {shape} (D = {num_features} from mean_a), got {tuple(tensor.shape)}. Both "
                "sides must come from the same feature extractor."
            )
        _check_finite(tensor, name)
    root_a = _symmetric_sqrt(covariance_a, "covariance_a")
    root_b = _symmetric_sqrt(covariance_b, "covariance_b")
    mean_term = (mean_a.double() - mean_b.double()).square().sum()
    trace_term = covariance_a.double().trace() + covariance_b.double().trace()
    cross_term = torch.linalg.matrix_norm(root_a @ root_b, ord="nuc")
    # Two equal arguments leave a rounding residue of either sign.
    return max(0.0, (mean_term + trace_term - 2 * cross_term).item())


def kernel_distance(
    features_a: Tensor, features_b: Tensor, *, subset_size: int = 1000, num_subsets: int = 50, seed: int = 0
) -> tuple[float, float]:
    """Return mean and standard deviation over subsets of the unbiased squared MMD of two feature sets (KID).

    `features_a` is (N_a, D), `features_b` (N_b, D); the kernel is k(x, y) = (x . y / D + 1)^3, in float64. Each of
    the `num_subsets` estimates takes `subset_size` rows of each side without replacement. The estimator is unbiased:
    two samples of one distribution give about 0, of either sign. The standard deviation (population) is that of one
    subset's estimate, not the error of the mean.

    Raises ValueError if a side has fewer rows than `subset_size`, if the widths differ, or for a NaN or infinity.
    Source: Binkowski et al. 2018, arXiv:1801.01401, eq. (4) and section 4.
    """
    require("eval", "torchmetrics")
    from torchmetrics.image.kid import poly_mmd  # here: only this metric needs torchmetrics

    _check_features(features_a, "features_a")
    _check_features(features_b, "features_b")
    if features_a.shape[1] != features_b.shape[1]:
        raise ValueError(
            f"features_b: expected {features_a.shape[1]} columns as in features_a, got {features_b.shape[1]}. Both "
            "sides must come from the same feature extractor."
        )
    smallest = min(len(features_a), len(features_b))
    if not 2 <= subset_size <= smallest:
        raise ValueError(
            f"subset_size={subset_size}: expected 2 to {smallest}, the rows of the smaller feature set. Pass more "
            "images or a smaller subset_size (and report it: the spread depends on it)."
        )
    if num_subsets < 1:
        raise ValueError(f"num_subsets={num_subsets}: expected at least 1.")
    sides = [features.detach().to("cpu", torch.float64) for features in (features_a, features_b)]
    generator = torch.Generator().manual_seed(seed)
    estimates = []
    for _ in range(num_subsets):
        rows_a, rows_b = (side[torch.randperm(len(side), generator=generator)[:subset_size]] for side in sides)
        estimates.append(poly_mmd(rows_a, rows_b, degree=3, gamma=None, coef=1.0))  # gamma None: 1 / D
    stacked = torch.stack(estimates)
    return stacked.mean().item(), stacked.std(correction=0).item()


def sqnr_db(reference: Tensor, sample: Tensor) -> float:
    """Return 10 log10(var(reference) / MSE) in dB: the signal-to-quantization-noise ratio of `sample`.

    Both are (B, ...) of equal shape, any range; the variance and the mean squared error run over the whole batch, in
    float64. Equal tensors give infinity; 0 dB means that the error is as strong as the signal.

    Raises ValueError if the shapes differ, for a NaN or infinity, and for a constant reference.
    """
    return _decibel(reference_variance(reference), image_mse(reference, sample).mean().item())


def median_sqnr_db(reference: Tensor, sample: Tensor) -> float:
    """Return the median over images of 10 log10(var(reference) / MSE of the image), in dB: what a typical image loses.

    The mean in `sqnr_db` is that of the few images which end somewhere else altogether; this does not see those.
    Shapes, arithmetic and errors as there.
    """
    return _decibel(reference_variance(reference), image_mse(reference, sample).quantile(0.5).item())


def psnr_db(reference: Tensor, sample: Tensor, data_range: float = 2.0) -> float:
    """Return 10 log10(data_range^2 / MSE) in dB; `data_range` is the width of the value range (2 for [-1, 1]).

    Shapes, arithmetic and errors as in `sqnr_db`; equal tensors give infinity. Values are not clipped.
    """
    if not data_range > 0:
        raise ValueError(f"data_range={data_range}: expected a positive width, such as 2.0 for samples in [-1, 1].")
    return _decibel(data_range**2, image_mse(reference, sample).mean().item())


def picture_psnr_db(reference: Tensor, sample: Tensor) -> float:
    """Return 10 log10(255^2 / MSE) in dB of pictures or videos (n, ..., C, H, W) uint8; equal ones give infinity.

    Raises ValueError if the shapes differ.
    """
    errors = [image_mse(*pair) for pair in _chunks(reference, sample)]
    return _decibel(255.0**2, torch.cat(errors).mean().item())


def structural_similarity(reference: Tensor, sample: Tensor) -> float:
    """Return the mean structural similarity (SSIM) of pictures (n, C, H, W) or videos (n, frames, C, H, W) uint8.

    Of a video it is the mean over frames. The window is Gaussian, 11 pixels wide with a standard deviation of 1.5; for
    pictures that are smaller, the largest odd width that fits, with the deviation in proportion. Equal ones give 1.

    Raises ValueError if the shapes differ.
    Source: Wang et al. 2004, Image Quality Assessment, eq. (13) and section III.C.
    """
    require("eval", "torchmetrics")
    from torchmetrics.functional.image import structural_similarity_index_measure

    window = min(SSIM_WINDOW, *reference.shape[-2:])
    window -= 1 - window % 2
    values = []
    for pair in _chunks(reference, sample):
        frames = [picture.flatten(0, -4).double() / 255 for picture in pair]  # (n * frames, C, H, W)
        # The window's width follows from sigma: torchmetrics cuts at 3.5 of it.
        found = structural_similarity_index_measure(
            frames[1], frames[0], sigma=SSIM_SIGMA * window / SSIM_WINDOW, data_range=1.0, reduction="none"
        )
        values.append(torch.as_tensor(found).flatten())
    return torch.cat(values).mean().item()


def _chunks(reference: Tensor, sample: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield pairs of a few images: in float64, all at once may not fit."""
    _check_pair(reference, sample)
    return zip(reference.split(8), sample.split(8), strict=True)


def image_mse(reference: Tensor, sample: Tensor) -> Tensor:
    """Return the (B,) float64 mean squared error of each image of `sample` (B, ...) to its image of `reference`.

    Raises ValueError if the shapes differ or are not (B, ...), and for a NaN or infinity.
    """
    _check_pair(reference, sample)
    difference = sample.detach().to("cpu", torch.float64) - reference.detach().to("cpu", torch.float64)
    return difference.flatten(1).square().mean(dim=1)


def reference_variance(reference: Tensor) -> float:
    """Return the population variance of all values of `reference`, in float64: the signal power of `sqnr_db`.

    Raises ValueError for a NaN or infinity, and where it is zero: a constant reference has no signal to compare with.
    """
    _check_finite(reference, "reference")
    variance = reference.detach().to("cpu", torch.float64).var(correction=0).item()
    if variance == 0:
        raise ValueError("reference: expected varying values, got a constant tensor, whose SQNR is undefined.")
    return variance


def bootstrap_interval(
    mse_per_image: Tensor,
    variance: float,
    *,
    confidence_level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the (low, high) percentile bootstrap interval, in dB, of the SQNR over images.

    `mse_per_image` is (n,) from `image_mse`, so each image is paired with the reference image of its seed;
    `variance` is `reference_variance` and is held fixed. Images are drawn n times with replacement, `num_resamples`
    times. The interval covers the choice of seeds, not the choice of model. An exact copy gives (inf, inf).

    Raises ValueError for fewer than two images, a negative or non-finite error, or a variance that is not positive.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    if mse_per_image.ndim != 1 or len(mse_per_image) < 2:
        raise ValueError(f"mse_per_image: expected (n,) with n >= 2 images, got shape {tuple(mse_per_image.shape)}.")
    _check_finite(mse_per_image, "mse_per_image")
    if (mse_per_image < 0).any():
        raise ValueError("mse_per_image: expected squared errors >= 0, got a negative one. Pass image_mse's result.")
    if not variance > 0:
        raise ValueError(f"variance={variance}: expected a positive number. Pass the result of reference_variance.")
    low_mse, high_mse = _interval_of_mean(mse_per_image, confidence_level, num_resamples, seed)
    # The SQNR falls with the MSE, so the upper end of one interval is the lower end of the other.
    return _decibel(variance, high_mse), _decibel(variance, low_mse)


def paired_change_interval(
    before: Tensor, after: Tensor, *, confidence_level: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Return the (low, high) percentile bootstrap interval of the mean of `after` - `before`, in their unit.

    Both are (n,), a value for each image of the same input and noise, booleans among them: the pairs are drawn anew,
    so what all images share cancels.

    Raises ValueError for other shapes than (n,) with n >= 2, the same in both.
    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    if before.ndim != 1 or before.shape != after.shape or len(before) < 2:
        raise ValueError(
            f"before and after: expected (n,) with n >= 2 images, the same in both, got {tuple(before.shape)} and "
            f"{tuple(after.shape)}."
        )
    return _interval_of_mean(after.double() - before.double(), confidence_level, num_resamples, seed)


def trajectory_error(reference: Tensor, sample: Tensor) -> Tensor:
    """Return the (N + 1,) float64 relative error of a trajectory: sum |z - z_ref|^2 / sum |z_ref|^2 at every step.

    Both are (N + 1, B, *S), the states z_t of N steps from the noise to the final one; the sums run over all
    but the first axis. Index 0 is 0 where both start from the same noise.

    Raises ValueError if the shapes differ, for a NaN or infinity, and where a reference step is all zero.
    """
    _check_pair(reference, sample)
    wanted = reference.detach().to("cpu", torch.float64).flatten(1)
    error = (sample.detach().to("cpu", torch.float64).flatten(1) - wanted).square().sum(dim=1)
    power = wanted.square().sum(dim=1)
    if (power == 0).any():
        raise ValueError(f"reference: step {int(power.argmin())} is all zero, so a relative error is undefined there.")
    return error / power


def _interval_of_mean(values: Tensor, confidence_level: float, num_resamples: int, seed: int) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values` (n,)."""
    require("eval", "scipy")
    import numpy as np
    from scipy.stats import bootstrap

    result = bootstrap(
        (values.detach().cpu().double().numpy(),),
        np.mean,
        n_resamples=num_resamples,
        batch=100,  # bounds the memory to 100 n values
        confidence_level=confidence_level,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    low, high = result.confidence_interval
    return float(low), float(high)


def _decibel(signal: float, noise: float) -> float:
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)


def _symmetric_sqrt(matrix: Tensor, name: str) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix.detach().to("cpu", torch.float64))
    if values[0] < -PSD_TOLERANCE * values[-1].abs():
        raise ValueError(
            f"{name}: expected a covariance (no negative eigenvalue), got an eigenvalue of {values[0].item():.3g} "
            f"beside {values[-1].item():.3g}. Pass the result of feature_statistics."
        )
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def _check_finite(tensor: Tensor, name: str) -> None:
    finite = torch.isfinite(tensor)
    if not finite.all():
        raise ValueError(
            f"{name}: expected finite values, got {int((~finite).sum())} NaN or infinite ones of {tensor.numel()}. "
            "Find the layer or step that made them before measuring."
        )


def _check_features(features: Tensor, name: str) -> None:
    if features.ndim != 2 or len(features) < 2:
        raise ValueError(f"{name}: expected (N, D) with N >= 2 images, got shape {tuple(features.shape)}.")
    _check_finite(features, name)


def _check_pair(reference: Tensor, sample: Tensor) -> None:
    if reference.shape != sample.shape or reference.ndim < 2:
        raise ValueError(
            f"sample: expected the shape of the reference, (B, ...) = {tuple(reference.shape)}, got "
            f"{tuple(sample.shape)}. Generate both from the same seeds, at the same size."
        )
    _check_finite(reference, "reference")
    _check_finite(sample, "sample")
