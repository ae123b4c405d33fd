/* CRC-32 of many bytes at the speed of the memory, by carry-less multiplication (V. Gopal et al., Intel 2009: "Fast CRC
   computation for generic polynomials using PCLMULQDQ instruction"). */
#include <stdint.h>
#include <string.h>
#if defined(__PCLMUL__) && defined(__SSE4_1__)
#include <immintrin.h>

#define LANES 4
#define LANE_BYTES 16

/* `x` times x^512 modulo the polynomial of zlib, in its order of bits: where these bytes count four lanes later. The
   constants are x^(512 + 32) and x^(512 - 32) modulo the polynomial. */
static inline __m128i four_lanes_on(__m128i x)
{
    const __m128i powers = _mm_set_epi64x(0x1c6e41596, 0x154442bd4);
    return _mm_xor_si128(_mm_clmulepi64_si128(x, powers, 0x00), _mm_clmulepi64_si128(x, powers, 0x11));
}
#endif

/* Fold `size` bytes, a positive multiple of 64, into 64 bytes with the same remainder; `state` is the CRC register before
   them. Returns 0, with nothing done, on a CPU that cannot. */
int fold(const uint8_t *bytes, int64_t size, uint32_t state, uint8_t *folded)
{
#if defined(__PCLMUL__) && defined(__SSE4_1__)
    __m128i lane[LANES];
    memcpy(lane, bytes, sizeof lane);
    lane[0] = _mm_xor_si128(lane[0], _mm_cvtsi32_si128((int32_t)state));
    for (int64_t i = sizeof lane; i < size; i += sizeof lane)
        for (int k = 0; k < LANES; k++)
            lane[k] = _mm_xor_si128(four_lanes_on(lane[k]),
                                    _mm_loadu_si128((const __m128i *)(bytes + i + k * LANE_BYTES)));
    memcpy(folded, lane, sizeof lane);
    return 1;
#else
    (void)bytes, (void)size, (void)state, (void)folded;
    return 0;
#endif
}
