/* Layer norms of pixels, and group norms of images, as affine maps. */
#pragma once

#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "activations.h"
#include "image.h"
#include "profile.h"
#include "vectors.h"

/* The map of the pixel `x`, whose numbers the cache has afterwards. */
INLINE Affine of_pixel(Affine affine, const float *x, int64_t channels)
{
    if (!affine.is_layer_norm) return affine;
    float sums[CHUNK] = {0}, squares[CHUNK] = {0};
    double sum = 0, square = 0;
    const int64_t whole = channels / CHUNK * CHUNK;
    for (int64_t c = 0; c < whole; c += CHUNK)
        for (int k = 0; k < CHUNK; k++) sums[k] += x[c + k];
    for (int k = 0; k < CHUNK; k++) sum += sums[k];
    for (int64_t c = whole; c < channels; c++) sum += x[c];
    const float mean = (float)(sum / (double)channels);
    for (int64_t c = 0; c < whole; c += CHUNK)
        for (int k = 0; k < CHUNK; k++) squares[k] += (x[c + k] - mean) * (x[c + k] - mean);
    for (int k = 0; k < CHUNK; k++) square += squares[k];
    for (int64_t c = whole; c < channels; c++) square += (x[c] - mean) * (x[c] - mean);
    affine.mean = mean;
    affine.inverse_deviation = (float)(1 / __builtin_sqrt(square / (double)channels + affine.eps));
    return affine;
}

/* Mean and sum of squared deviations of `count` channels, at most CHUNK, over all pixels of an image. Deviations from the
   first pixel are added up, so that a mean far from zero costs no digits; rows in fp32, their sums in fp64. */
INLINE void channel_moments(const float *x, int64_t height, int64_t width, int64_t channels, int64_t count, float *mean,
                            float *squares)
{
    float pivot[CHUNK] = {0};
    double sum[CHUNK] = {0}, square[CHUNK] = {0};
    memcpy(pivot, x, sizeof(float) * count);
    for (int64_t y = 0; y < height; y++) {
        float row_sum[CHUNK] = {0}, row_square[CHUNK] = {0};
        for (int64_t i = 0; i < width; i++, x += channels)
            for (int64_t c = 0; c < count; c++) {
                float deviation = x[c] - pivot[c];
                row_sum[c] += deviation, row_square[c] += deviation * deviation;
            }
        for (int64_t c = 0; c < count; c++) sum[c] += row_sum[c], square[c] += row_square[c];
    }
    double pixels = (double)(height * width);
    for (int64_t c = 0; c < count; c++) {
        mean[c] = (float)(pivot[c] + sum[c] / pixels);
        squares[c] = (float)(square[c] - sum[c] * sum[c] / pixels);
    }
}

/* The parameters of a group normalization; `weight` and `bias` are (channels). */
typedef struct {
    const float *weight, *bias;
    int64_t groups;
    double eps;
} GroupNorm;

/* Group normalization as an affine map: gain and shift, both (images, channels), with which x * gain + shift is x less its
   group's mean, over the group's standard deviation, times `weight`, plus `bias`. Variances are those of all values. */
void normalize(const float *x, Image image, GroupNorm norm, float *gain, float *shift)
{
    double started = omp_get_wtime();
    int64_t groups = norm.groups, chunks = (image.channels + CHUNK - 1) / CHUNK, size = image.channels / groups;
    double pixels = (double)(image.height * image.width);
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < image.images * chunks; task++) {
        int64_t n = task / chunks, c = task % chunks * CHUNK, at = n * image.channels + c;
        const float *first = x + n * image.height * image.width * image.channels + c;
        if (image.channels - c >= CHUNK) /* a constant count is vectorized */
            channel_moments(first, image.height, image.width, image.channels, CHUNK, gain + at, shift + at);
        else
            channel_moments(first, image.height, image.width, image.channels, image.channels - c, gain + at, shift + at);
    }
    for (int64_t group = 0; group < image.images * groups; group++) {
        int64_t at = group / groups * image.channels + group % groups * size, channel = group % groups * size;
        double mean = 0, squares = 0;
        for (int64_t c = 0; c < size; c++) mean += gain[at + c] / (double)size;
        for (int64_t c = 0; c < size; c++) squares += shift[at + c] + pixels * (gain[at + c] - mean) * (gain[at + c] - mean);
        double factor = 1 / __builtin_sqrt(squares / (pixels * (double)size) + norm.eps);
        for (int64_t c = 0; c < size; c++) {
            gain[at + c] = (float)(factor * norm.weight[channel + c]);
            shift[at + c] = (float)(norm.bias[channel + c] - mean * factor * norm.weight[channel + c]);
        }
    }
    clock_phase(NORMS, started);
}
