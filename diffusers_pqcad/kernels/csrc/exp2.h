/* 2^x of vectors of numbers, to 1e-6 of it for x of -64 to 64 and 1e-5 up to the ends: 2^n times a polynomial. */
#pragma once

#include <immintrin.h>

#include "inline.h"

/* 2^f for f of -1/2 to 1/2: a minimax polynomial. Its terms are added up in pairs, for their latency is what takes time. */
#define EXP2_OF_FRACTION(bits)                                                                                             \
    INLINE __m##bits exp2_of_fraction_##bits(__m##bits f)                                                                  \
    {                                                                                                                      \
        __m##bits square = _mm##bits##_mul_ps(f, f);                                                                       \
        __m##bits low = LINEAR(bits, 6.93146967e-01f, f, 1.00000007e+00f);                                                 \
        __m##bits middle = LINEAR(bits, 5.55071330e-02f, f, 2.40221197e-01f);                                              \
        __m##bits high = LINEAR(bits, 1.32764641e-03f, f, 9.67554127e-03f);                                                \
        return _mm##bits##_fmadd_ps(_mm##bits##_fmadd_ps(high, square, middle), square, low);                              \
    }
#define LINEAR(bits, a, f, b) _mm##bits##_fmadd_ps(_mm##bits##_set1_ps(a), f, _mm##bits##_set1_ps(b))

EXP2_OF_FRACTION(256)

/* The values at the ends of -126 and 126 hold beyond. */
INLINE __m256 exp2_256(__m256 x)
{
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-126.0f)), _mm256_set1_ps(126.0f));
    __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 p = exp2_of_fraction_256(_mm256_sub_ps(x, n));
    __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23); /* added to the exponent: p is 0.7 to 1.42 */
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}

#ifdef __AVX512F__
EXP2_OF_FRACTION(512)

/* For x up to 0: the value at the end of -126 holds beyond. A NaN stays. */
INLINE __m512 exp2_512(__m512 x)
{
    x = _mm512_max_ps(_mm512_set1_ps(-126.0f), x); /* in this order */
    __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm512_scalef_ps(exp2_of_fraction_512(_mm512_sub_ps(x, n)), n);
}
#endif
