/* Numbers in 8-bit codes: the range of an input, its scale and zero point, and its rounded image. */
#pragma once

#include <float.h>
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "activations.h"
#include "image.h"
#include "norms.h"
#include "vectors.h"
#include "winograd.h"

#define MIN_SCALE 1e-12f /* of activations: as in qparams.py */
#define SIGNED_OFFSET 128 /* what signed codes are less */

/* round(clamp(value, -zero_point, qmax - zero_point)) + zero_point in 32 bits, ties to even; a NaN becomes code 0. */
INLINE __m256i round_to_codes(__m256 value, int zero_point, int qmax)
{
    const __m256 low = _mm256_set1_ps((float)-zero_point), high = _mm256_set1_ps((float)(qmax - zero_point));
    value = _mm256_min_ps(_mm256_max_ps(value, low), high); /* of a NaN and a number, the second one */
    return _mm256_add_epi32(_mm256_cvtps_epi32(value), _mm256_set1_epi32(zero_point));
}

/* The codes of x * inverse_scale, after the affine map and SiLU where there are such; `flip` is added to all their bits. */
INLINE void quantize_pixel(const float *x, Affine affine, int64_t channels, float inverse_scale, int zero_point, int qmax,
                           uint8_t flip, uint8_t *codes)
{
    const __m256 factor = _mm256_set1_ps(inverse_scale);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), flips = _mm256_set1_epi8((char)flip);
    int64_t c = 0;
    for (; c + 32 <= channels; c += 32) {
        __m256i code[4];
        for (int k = 0; k < 4; k++)
            code[k] = round_to_codes(_mm256_mul_ps(activate(x, affine, c + 8 * k, 8), factor), zero_point, qmax);
        __m256i halves[2] = {_mm256_packus_epi32(code[0], code[1]), _mm256_packus_epi32(code[2], code[3])};
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(halves[0], halves[1]), order);
        _mm256_storeu_si256((__m256i *)(codes + c), _mm256_xor_si256(bytes, flips));
    }
    for (; c < channels; c += 8) {
        int32_t code[8];
        int64_t count = channels - c < 8 ? channels - c : 8;
        __m256 value = _mm256_mul_ps(activate(x, affine, c, count), factor);
        _mm256_storeu_si256((__m256i *)code, round_to_codes(value, zero_point, qmax));
        for (int64_t k = 0; k < count; k++) codes[c + k] = (uint8_t)code[k] ^ flip;
    }
}

/* Write `which` rows of `x`, after `affine` and SiLU where there is one, in codes, with border and surplus channels in the
   code of zero; return whether the overflow of tiles is dense, in all these rows. Codes that are to be signed are written less 128: a flip of
   the first bit. */
int quantize(const float *x, Image image, Rows which, Affine affine, float inverse_scale, int zero_point, int qmax, int is_signed,
             uint8_t *codes)
{
    const uint8_t flip = is_signed ? SIGNED_OFFSET : 0;
    const int code_of_zero = zero_point ^ flip;
    int64_t row_bytes = bytes_of_row(&image), channels = image.padded_channels;
    int64_t width = image.tiles ? pixels_of_tiles(&image) : image.width + 2 * image.border_x; /* as the kernel reads it */
    Element elements[TILE_SIZE];
    for (int k = 0; k < TILE_SIZE; k++) elements[k] = element_of(&image, k, zero_point, qmax);
    int is_dense = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : is_dense) if (which.images * which.rows > 1)
    for (int64_t line = 0; line < which.images * which.rows; line++) {
        const int64_t n = which.first_image + line / which.rows, before = image.border_x;
        const int64_t y = which.first_row + line % which.rows - image.border_y;
        Affine local = of_image(affine, n * image.channels);
        uint8_t *start = codes + line * row_bytes, *row = start + bytes_of_codes(&image) - width * channels;
        if (y < 0 || y >= image.height) {
            memset(row, code_of_zero, width * channels);
        } else {
            const float *source = x + (n * image.height + y) * image.width * image.channels;
            memset(row, code_of_zero, before * channels);
            row += before * channels;
            for (int64_t i = 0; i < image.width; i++, row += channels, source += image.channels) {
                const Affine here = of_pixel(local, source, image.channels);
                quantize_pixel(source, here, image.channels, inverse_scale, zero_point, qmax, flip, row);
                memset(row + image.channels, code_of_zero, channels - image.channels);
            }
            memset(row, code_of_zero, (width - before - image.width) * channels);
        }
        if (image.tiles) is_dense |= transform_input(start, &image, elements);
    }
    if (is_dense) make_dense(codes, which.images * which.rows, &image, elements);
    return is_dense;
}

/* The least and the largest value of `x` after `affine` and SiLU, and of zero; a NaN anywhere shows in both. SiLU falls up
   to its TROUGH and rises from there, so its ends are those of three inputs: the largest, and the nearest to the trough on
   both sides. All are on one side of a trough of minus infinity, where there is no SiLU. */
#define TROUGH -1.27846454f
static void find_range(const float *x, Image image, Affine affine, float *least, float *largest)
{
    const Affine silu = {.has_silu = affine.has_silu};
    affine.has_silu = 0;
    const __m256 lowest = _mm256_set1_ps(-__builtin_inff()), trough = silu.has_silu ? _mm256_set1_ps(TROUGH) : lowest;
    const __m256 bottom = silu.has_silu ? _mm256_set1_ps(-FLT_MAX) : lowest; /* the SiLU of -infinity is a NaN */
    float high = 0, above = 0, below = -__builtin_inff();
    int bad = 0;
#pragma omp parallel for schedule(static) reduction(max : high, below) reduction(min : above) reduction(| : bad)
    for (int64_t line = 0; line < image.images * image.height; line++) {
        Affine local = of_image(affine, line / image.height * image.channels);
        const float *source = x + line * image.width * image.channels;
        __m256 highs = _mm256_setzero_ps(), aboves = highs, bads = highs, belows = lowest;
        for (int64_t i = 0; i < image.width; i++, source += image.channels) {
            const Affine here = of_pixel(local, source, image.channels);
            for (int64_t c = 0; c < image.channels; c += 8) {
                int64_t count = image.channels - c < 8 ? image.channels - c : 8;
                __m256 value = count == 8 ? activate(source, here, c, 8) : activate(source, here, c, count);
                __m256 is_below = _mm256_cmp_ps(value, trough, _CMP_LT_OQ);
                highs = _mm256_max_ps(highs, value);
                aboves = _mm256_min_ps(aboves, _mm256_andnot_ps(is_below, value));
                belows = _mm256_max_ps(belows, _mm256_blendv_ps(lowest, value, is_below));
                bads = _mm256_or_ps(bads, _mm256_cmp_ps(value, bottom, _CMP_NGE_UQ));
            }
        }
        float ends[3][8];
        _mm256_storeu_ps(ends[0], highs), _mm256_storeu_ps(ends[1], aboves), _mm256_storeu_ps(ends[2], belows);
        for (int k = 0; k < 8; k++) {
            high = ends[0][k] > high ? ends[0][k] : high;
            above = ends[1][k] < above ? ends[1][k] : above;
            below = ends[2][k] > below ? ends[2][k] : below;
        }
        bad |= _mm256_movemask_ps(bads) != 0;
    }
    float ends[8] = {high, above, below <= -FLT_MAX ? 0 : below};
    _mm256_storeu_ps(ends, activate(ends, silu, 0, 8));
    *least = bad ? __builtin_nanf("") : ends[1] < ends[2] ? ends[1] : ends[2];
    *largest = bad ? __builtin_nanf("") : ends[0];
}

/* Scale and zero point of the range of `x` after `affine`, and of zero: as qparams.scalar_qparams, where a NaN stays. */
void choose_range(const float *x, Image image, Affine affine, int qmax, float *scale, int *zero_point)
{
    float least, largest;
    find_range(x, image, affine, &least, &largest);
    float low = 0 < least ? 0 : least, high = 0 > largest ? 0 : largest, span = high - low, step = span / (float)qmax;
    *scale = span == 0 ? 1 : MIN_SCALE > step ? MIN_SCALE : step;
    float quotient = -low / *scale;
    *zero_point = !__builtin_isfinite(quotient) ? 0 : quotient > (float)qmax ? qmax : (int)__builtin_rintf(quotient);
}
