/* What is done to an input before it is rounded, and to gates: affine maps, SiLU, GELU. */
#pragma once

#include <immintrin.h>
#include <stdint.h>

#include "exp2.h"
#include "inline.h"

/* x times the normal distribution function (GELU, Hendrycks and Gimpel 2016), to 4e-7: erf is that of Abramowitz and
   Stegun, 7.1.26. A NaN stays. */
INLINE __m256 gelu_ps(__m256 x)
{
    const __m256 one = _mm256_set1_ps(1), sign = _mm256_set1_ps(-0.0f);
    __m256 z = _mm256_mul_ps(x, _mm256_set1_ps(0.707106781f)), size = _mm256_andnot_ps(sign, z);
    __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(_mm256_set1_ps(0.3275911f), size, one));
    __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(1.061405429f), t, _mm256_set1_ps(-1.453152027f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(1.421413741f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-0.284496736f));
    p = _mm256_mul_ps(_mm256_fmadd_ps(p, t, _mm256_set1_ps(0.254829592f)), t);
    __m256 tail = exp2_256(_mm256_mul_ps(_mm256_mul_ps(z, z), _mm256_set1_ps(-1.44269504f)));
    __m256 erf = _mm256_or_ps(_mm256_fnmadd_ps(p, tail, one), _mm256_and_ps(sign, z));
    __m256 half = _mm256_mul_ps(x, _mm256_set1_ps(0.5f));
    return _mm256_fmadd_ps(half, erf, half);
}

/* What is done to an input before it is rounded: x * gain + shift, then SiLU where `has_silu`. `gain` and `shift` are
   (images, channels), or NULL for no map; groups of channels that share a mean and a variance are in them (`normalize`).
   With `is_layer_norm` they are (channels), the same for all pixels, and x is first less the mean of its pixel, times the
   pixel's inverse deviation: `of_pixel` sets these. */
typedef struct {
    const float *gain, *shift;
    int64_t has_silu, is_layer_norm;
    float eps, mean, inverse_deviation;
} Affine;

/* The map of the image whose numbers start at `offset`. */
INLINE Affine of_image(Affine affine, int64_t offset)
{
    if (affine.gain && !affine.is_layer_norm) affine.gain += offset, affine.shift += offset;
    return affine;
}

/* Eight inputs from channel `c` on, after the affine map and SiLU where there are such. `count` of them are real, and zeros
   stand for the others; a constant 8 costs no mask. */
INLINE __m256 activate(const float *x, Affine affine, int64_t c, int64_t count)
{
    const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), numbers);
#define LOAD(numbers) (count == 8 ? _mm256_loadu_ps(numbers) : _mm256_maskload_ps(numbers, mask))
    __m256 value = LOAD(x + c);
    if (affine.is_layer_norm)
        value = _mm256_mul_ps(_mm256_sub_ps(value, _mm256_set1_ps(affine.mean)), _mm256_set1_ps(affine.inverse_deviation));
    if (affine.gain) value = _mm256_fmadd_ps(value, LOAD(affine.gain + c), LOAD(affine.shift + c));
#undef LOAD
    if (!affine.has_silu) return value;
    const __m256 minus_log2_e = _mm256_set1_ps(-1.44269504f), one = _mm256_set1_ps(1.0f);
    return _mm256_div_ps(value, _mm256_add_ps(one, exp2_256(_mm256_mul_ps(value, minus_log2_e))));
}
