/* Vectors of bytes, of 32-bit integers and of numbers, as wide as this CPU's int8 products. */
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "inline.h"

#if defined __AVX512VNNI__ || defined __AVXVNNI__
#define VNNI 1
#else
#define VNNI 0
#endif
#ifdef __AVX512VNNI__
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif

#define LANES (VECTOR_BYTES / 4) /* sums of a vector */
#define CHUNK 32 /* channels whose sums are vectors side by side */

/* Vectors of bytes and of numbers. Those with a `count` read zeros beyond it, write nothing there, and take counts beyond the
   vector. Whole ones are moved by intrinsics: of memcpy, GCC keeps the vector on the stack where it is tuned for some CPUs.
   `differing_steps` are the bits of those steps in which two vectors differ. */
#if VECTOR_BYTES == 64
#define OF_VECTORS(name) _mm512_##name
typedef __m512i Vector;
typedef __m512 Numbers;

INLINE Vector load(const void *from) { return _mm512_loadu_si512(from); }
INLINE void store(void *to, Vector vector) { _mm512_storeu_si512(to, vector); }
INLINE uint64_t first_bits(int64_t count) { return count > 63 ? ~0ull : count > 0 ? (1ull << count) - 1 : 0; }
INLINE Vector load_bytes(const uint8_t *from, int64_t count) { return _mm512_maskz_loadu_epi8(first_bits(count), from); }
INLINE void store_bytes(uint8_t *to, Vector bytes, int64_t count)
{
    _mm512_mask_storeu_epi8(to, first_bits(count), bytes);
}
INLINE Numbers load_numbers(const float *from, int64_t count)
{
    return _mm512_maskz_loadu_ps((__mmask16)first_bits(count), from);
}
INLINE void store_numbers(float *to, Numbers numbers, int64_t count)
{
    _mm512_mask_storeu_ps(to, (__mmask16)first_bits(count), numbers);
}
INLINE unsigned differing_steps(Vector a, Vector b) { return _mm512_cmpneq_epi32_mask(a, b); }
#else
#define OF_VECTORS(name) _mm256_##name
typedef __m256i Vector;
typedef __m256 Numbers;

INLINE Vector load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE void store(void *to, Vector vector) { _mm256_storeu_si256((__m256i *)to, vector); }
INLINE Vector load_bytes(const uint8_t *from, int64_t count)
{
    if (count >= VECTOR_BYTES) return load(from);
    uint8_t bytes[VECTOR_BYTES] = {0};
    if (count > 0) memcpy(bytes, from, count);
    return load(bytes);
}
INLINE void store_bytes(uint8_t *to, Vector vector, int64_t count)
{
    uint8_t bytes[VECTOR_BYTES];
    if (count >= VECTOR_BYTES) return store(to, vector);
    store(bytes, vector);
    if (count > 0) memcpy(to, bytes, count);
}
INLINE Numbers load_numbers(const float *from, int64_t count)
{
    return _mm256_castsi256_ps(load_bytes((const uint8_t *)from, count * (int64_t)sizeof(float)));
}
INLINE void store_numbers(float *to, Numbers numbers, int64_t count)
{
    store_bytes((uint8_t *)to, _mm256_castps_si256(numbers), count * (int64_t)sizeof(float));
}
INLINE unsigned differing_steps(Vector a, Vector b)
{
    return 0xff & ~(unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)));
}
#endif
