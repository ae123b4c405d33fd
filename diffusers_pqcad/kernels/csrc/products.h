/* Exact sums of products of 8-bit codes and int8 levels: a micro-tile of the output, one block of outputs at a time. */
#pragma once

#include <stdint.h>
#include <string.h>

#include "image.h"
#include "vectors.h"

/* A micro-tile of the output is ROWS pixels by OUTPUTS channels, two vectors of sums. These stay in registers, of which there
   are 32 with AVX-512 and else 16; images of 4x4 pixels and more are whole micro-tiles of 8. */
#define ROWS (VECTOR_BYTES == 64 ? 8 : 6)
#define OUTPUTS (2 * LANES)

/* `steps` inputs, times DEPTH, that are consecutive in memory, from row `y`, byte `x` of a pixel's receptive field on:
   without VNNI, their sums of products fit 16 bits, or single ones do. */
typedef struct {
    int32_t y, x, steps;
} Window;

#if VNNI
/* sum += codes * levels, four products each, in place: as an intrinsic, GCC 12 spills the sums to the stack. Assemblers take
   the encoding of AVX-512 unless they are told; tests, on a CPU that has only that one, do not tell them (-DVEX=). */
#ifdef __AVX512VNNI__
#define ADD_PRODUCTS(sum, codes, levels) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(levels))
#else
#ifndef VEX
#define VEX "%{vex%} "
#endif
#define ADD_PRODUCTS(sum, codes, levels)                                                                                   \
    __asm__ volatile(VEX "vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(levels))
#endif

/* sums[i][o] = the products of row i and output o, summed over all windows. Codes are unsigned. */
INLINE void multiply_rows(int rows, const uint8_t *const *codes, int64_t row_bytes, const int8_t *weight,
                          const Window *window, const Window *end, int32_t sums[ROWS][OUTPUTS])
{
    Vector wide[ROWS][2];
    for (int i = 0; i < rows; i++) wide[i][0] = wide[i][1] = (Vector){0};
    for (; window < end; window++) {
        int64_t at = window->y * row_bytes + window->x, stop = at + (int64_t)window->steps * DEPTH;
        for (; at < stop; at += DEPTH, weight += DEPTH * OUTPUTS) {
            Vector weight0 = load(weight), weight1 = load(weight + VECTOR_BYTES);
            UNROLL
            for (int i = 0; i < rows; i++) {
                Vector code = OF_VECTORS(set1_epi32)(*(const int32_t *)(codes[i] + at));
                ADD_PRODUCTS(wide[i][0], code, weight0);
                ADD_PRODUCTS(wide[i][1], code, weight1);
            }
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2; j++) store(sums[i] + LANES * j, wide[i][j]);
}

INLINE void multiply_micro_tile(int count, int is_signed, const uint8_t *const *codes, int64_t row_bytes,
                                const int8_t *weight, const Window *window, const Window *end, int32_t sums[ROWS][OUTPUTS])
{
    (void)is_signed;
    if (count <= 2) multiply_rows(2, codes, row_bytes, weight, window, end, sums);
    else multiply_rows(ROWS, codes, row_bytes, weight, window, end, sums);
}
#else
/* sum += x, in place: as plain intrinsics, GCC 12 spills the sums to the stack or moves each of them around. */
#define ADD_EPI16(sum, x) __asm__ volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x))
#define ADD_EPI32(sum, x) __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x))

/* sums[i][o] = the products of row i and output o, summed over all windows. Codes are unsigned, levels narrow. */
INLINE void multiply_narrow(int rows, const uint8_t *const *codes, int64_t row_bytes, const int8_t *weight,
                            const Window *window, const Window *end, int32_t sums[ROWS][OUTPUTS])
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i narrow[ROWS][2];
    memset(sums, 0, sizeof(int32_t) * ROWS * OUTPUTS);
    for (; window < end; window++) {
        int64_t at = window->y * row_bytes + window->x, stop = at + (int64_t)window->steps * DEPTH;
        for (int i = 0; i < rows; i++) narrow[i][0] = narrow[i][1] = _mm256_setzero_si256();
        for (; at < stop; at += DEPTH, weight += DEPTH * OUTPUTS) {
            __m256i weight0 = _mm256_load_si256((const __m256i *)weight);
            __m256i weight1 = _mm256_load_si256((const __m256i *)weight + 1);
            UNROLL
            for (int i = 0; i < rows; i++) {
                __m256i code = _mm256_set1_epi32(*(const int32_t *)(codes[i] + at));
                ADD_EPI16(narrow[i][0], _mm256_maddubs_epi16(code, weight0));
                ADD_EPI16(narrow[i][1], _mm256_maddubs_epi16(code, weight1));
            }
        }
        UNROLL
        for (int i = 0; i < rows; i++)
            UNROLL
            for (int j = 0; j < 2; j++) {
                __m256i *wide = (__m256i *)sums[i] + j;
                _mm256_store_si256(wide, _mm256_add_epi32(*wide, _mm256_madd_epi16(narrow[i][j], ones)));
            }
    }
}

/* The same for codes that are signed: the sign of a code moves to the level, as vpmaddubsw wants one factor unsigned. */
INLINE void multiply_wide(int rows, const uint8_t *const *codes, int64_t row_bytes, const int8_t *weight,
                          const Window *window, const Window *end, int32_t sums[ROWS][OUTPUTS])
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i wide[ROWS][2];
    for (int i = 0; i < rows; i++) wide[i][0] = wide[i][1] = _mm256_setzero_si256();
    for (; window < end; window++) {
        int64_t at = window->y * row_bytes + window->x, stop = at + (int64_t)window->steps * DEPTH;
        for (; at < stop; at += DEPTH, weight += DEPTH * OUTPUTS) {
            UNROLL
            for (int i = 0; i < rows; i++) {
                __m256i code = _mm256_set1_epi32(*(const int32_t *)(codes[i] + at)), size = _mm256_abs_epi8(code);
                UNROLL
                for (int j = 0; j < 2; j++) {
                    __m256i level = _mm256_sign_epi8(_mm256_load_si256((const __m256i *)weight + j), code);
                    ADD_EPI32(wide[i][j], _mm256_madd_epi16(_mm256_maddubs_epi16(size, level), ones));
                }
            }
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2; j++) _mm256_store_si256((__m256i *)sums[i] + j, wide[i][j]);
}

INLINE void multiply_micro_tile(int count, int is_signed, const uint8_t *const *codes, int64_t row_bytes,
                                const int8_t *weight, const Window *window, const Window *end, int32_t sums[ROWS][OUTPUTS])
{
    if (is_signed) multiply_wide(ROWS, codes, row_bytes, weight, window, end, sums);
    else if (count <= 2) multiply_narrow(2, codes, row_bytes, weight, window, end, sums);
    else multiply_narrow(ROWS, codes, row_bytes, weight, window, end, sums);
}
#endif
