/* Attention with products of bf16 numbers and sums in fp32, on x86 CPUs with AVX-512 BF16.

   One instruction, vdpbf16ps, multiplies 32 pairs and adds neighbours in 16 sums: twice the products of fp32. Queries are
   taken ROWS at a time, and all scores of these are kept, so that their softmax is one pass; nothing as large as queries
   times keys is written to memory. */
#include <stdint.h>

#ifdef __AVX512BF16__
#include <immintrin.h>
#include <stdlib.h>

#include "exp2.h"
#include "inline.h"
#include "layout.h"

int has_bf16(void) { return 1; }

/* A tile of a product is ROWS by COLUMNS, two vectors; its sums stay in registers. */
#define ROWS 8
#define COLUMNS 32

/* q, out (batch, queries, heads, channels); k, v (batch, keys, heads, channels); all fp32 and dense. */
typedef struct {
    int64_t batch, heads, queries, keys, channels;
} Shape;

EXPORT_LAYOUT(STRUCT(Shape), FIELD(Shape, batch), FIELD(Shape, heads), FIELD(Shape, queries), FIELD(Shape, keys),
              FIELD(Shape, channels))

/* Two bf16 numbers that one lane multiplies: of neighbouring channels, or of neighbouring keys. */
typedef uint32_t Pair;

/* Pairs of a row of channels; of a head's keys as panels (COLUMNS keys: channel pairs, COLUMNS); of its values as panels
   (COLUMNS channels: key pairs, COLUMNS). */
INLINE int64_t channel_pairs(const Shape *shape) { return round_up(shape->channels, 2) / 2; }
INLINE int64_t padded_keys(const Shape *shape) { return round_up(shape->keys, COLUMNS); }
INLINE int64_t key_panels_size(const Shape *shape) { return padded_keys(shape) * channel_pairs(shape); }
INLINE int64_t value_panels_size(const Shape *shape)
{
    return round_up(shape->channels, COLUMNS) * padded_keys(shape) / 2;
}

/* Bytes that `attend` needs beside its output. */
int64_t attention_bytes(const Shape *shape)
{
    return shape->batch * shape->heads * (key_panels_size(shape) + value_panels_size(shape)) * (int64_t)sizeof(Pair);
}

/* `count` of up to 16 numbers, zeros for the others. */
INLINE __m512 load(const float *x, int64_t count)
{
    return _mm512_maskz_loadu_ps(count >= 16 ? 0xffff : (__mmask16)((1u << count) - 1), x);
}

/* 16 numbers in bf16, each in the low half of 32 bits. */
INLINE __m512i to_bf16(__m512 x) { return _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(x)); }

/* A row of numbers times `factor`, as pairs. */
INLINE void to_pairs(const float *x, int64_t count, float factor, Pair *pairs)
{
    for (int64_t c = 0; c < count; c += 16) {
        __m256i row = (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(load(x + c, count - c), _mm512_set1_ps(factor)));
        _mm256_mask_storeu_epi32(pairs + c / 2, (__mmask8)((1u << min((count - c + 1) / 2, 8)) - 1), row);
    }
}

static void pack_keys(const float *k, const Shape *shape, Pair *row, Pair *panels)
{
    int64_t pairs = channel_pairs(shape), stride = shape->heads * shape->channels;
    for (int64_t key = 0; key < padded_keys(shape); key++) {
        Pair *column = panels + key / COLUMNS * COLUMNS * pairs + key % COLUMNS;
        if (key < shape->keys) to_pairs(k + key * stride, shape->channels, 1, row);
        for (int64_t i = 0; i < pairs; i++) column[i * COLUMNS] = key < shape->keys ? row[i] : 0;
    }
}

static void pack_values(const float *v, const Shape *shape, Pair *panels)
{
    int64_t stride = shape->heads * shape->channels;
    for (int64_t first = 0; first < shape->channels; first += COLUMNS)
        for (int64_t key = 0; key < padded_keys(shape); key += 2, panels += COLUMNS)
            for (int64_t c = 0; c < COLUMNS; c += 16) {
                int64_t left = shape->channels - first - c;
                __m512i halves[2];
                for (int64_t i = 0; i < 2; i++) {
                    int is_real = left > 0 && key + i < shape->keys;
                    halves[i] = is_real ? to_bf16(load(v + (key + i) * stride + first + c, left)) : _mm512_setzero_si512();
                }
                _mm512_storeu_si512(panels + c, _mm512_or_si512(halves[0], _mm512_slli_epi32(halves[1], 16)));
            }
}

/* sum += products of pairs, in place: as an intrinsic, GCC 12 spills sums to the stack. */
#define ADD_PRODUCTS(sum, row, panel) __asm__ volatile("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(row), "v"(panel))

/* The products of ROWS rows, `stride` pairs apart, and of the first `vectors` times 16 columns of a panel. */
INLINE void multiply(int vectors, const Pair *rows, int64_t stride, const Pair *panel, int64_t pairs, __m512 sums[ROWS][2])
{
    __m512 wide[ROWS][2];
    for (int i = 0; i < ROWS; i++) wide[i][0] = wide[i][1] = _mm512_setzero_ps();
    for (int64_t k = 0; k < pairs; k++, panel += COLUMNS) {
        __m512i panel0 = _mm512_loadu_si512(panel), panel1 = _mm512_loadu_si512(panel + 16);
        UNROLL
        for (int i = 0; i < ROWS; i++) {
            __m512i row = _mm512_set1_epi32((int)rows[i * stride + k]);
            ADD_PRODUCTS(wide[i][0], row, panel0);
            if (vectors == 2) ADD_PRODUCTS(wide[i][1], row, panel1);
        }
    }
    for (int i = 0; i < ROWS; i++) sums[i][0] = wide[i][0], sums[i][1] = wide[i][1];
}

/* Replace `keys` scores, powers of two, by pairs of 2^(score - largest) in bf16, padded by zeros; return their sum. */
INLINE float exponentials(const float *scores, int64_t keys, int64_t padded, Pair *pairs)
{
    __m512 most = _mm512_set1_ps(-__builtin_inff()), sum = _mm512_setzero_ps();
    for (int64_t c = 0; c < keys; c += 16) {
        __mmask16 real = keys - c >= 16 ? 0xffff : (__mmask16)((1u << (keys - c)) - 1);
        most = _mm512_mask_max_ps(most, real, most, _mm512_loadu_ps(scores + c));
    }
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(most));
    for (int64_t c = 0; c < padded; c += 16) {
        __mmask16 real = keys - c >= 16 ? 0xffff : keys > c ? (__mmask16)((1u << (keys - c)) - 1) : 0;
        __m512 value = _mm512_maskz_mov_ps(real, exp2_512(_mm512_sub_ps(_mm512_loadu_ps(scores + c), largest)));
        sum = _mm512_add_ps(sum, value);
        _mm256_storeu_si256((__m256i *)(pairs + c / 2), (__m256i)_mm512_cvtneps_pbh(value));
    }
    return _mm512_reduce_add_ps(sum);
}

/* One thread's buffers: the scores of ROWS queries, their exponentials as pairs, the queries as pairs, and a row of those. */
typedef struct {
    float *scores;
    Pair *weights, *queries, *row;
} Scratch;

static void attend_rows(const float *q, const Shape *shape, int64_t count, float factor, const Pair *keys,
                        const Pair *values, Scratch scratch, float *out)
{
    int64_t pairs = channel_pairs(shape), padded = padded_keys(shape), stride = shape->heads * shape->channels;
    __m512 sums[ROWS][2];
    float inverse[ROWS];
    for (int64_t i = 0; i < ROWS; i++) /* the last query stands for those that a tile lacks */
        to_pairs(q + min(i, count - 1) * stride, shape->channels, factor, scratch.queries + i * pairs);
    for (int64_t key = 0; key < padded; key += COLUMNS) {
        multiply(2, scratch.queries, pairs, keys + key * pairs, pairs, sums);
        for (int i = 0; i < ROWS; i++)
            for (int j = 0; j < 2; j++) _mm512_storeu_ps(scratch.scores + i * padded + key + 16 * j, sums[i][j]);
    }
    for (int i = 0; i < ROWS; i++)
        inverse[i] = 1 / exponentials(scratch.scores + i * padded, shape->keys, padded, scratch.weights + i * padded / 2);
    for (int64_t first = 0; first < shape->channels; first += COLUMNS) {
        const Pair *panel = values + first * padded / 2;
        int64_t left = shape->channels - first;
        if (left > 16) multiply(2, scratch.weights, padded / 2, panel, padded / 2, sums);
        else multiply(1, scratch.weights, padded / 2, panel, padded / 2, sums);
        for (int64_t i = 0; i < count; i++)
            for (int64_t j = 0; j < 2 && left > 16 * j; j++) {
                __mmask16 real = left - 16 * j >= 16 ? 0xffff : (__mmask16)((1u << (left - 16 * j)) - 1);
                __m512 value = _mm512_mul_ps(sums[i][j], _mm512_set1_ps(inverse[i]));
                _mm512_mask_storeu_ps(out + i * stride + first + 16 * j, real, value);
            }
    }
}

/* out = softmax(q k^T * scale) v for each head. `memory` has `attention_bytes`. Return 0 where a thread got no memory for its
   scores, and nothing was written that means anything. */
int attend(const float *q, const float *k, const float *v, const Shape *shape, float scale, Pair *memory, float *out)
{
    const float log2_e = 1.44269504f;
    const int64_t heads = shape->batch * shape->heads, tiles = (shape->queries + ROWS - 1) / ROWS;
    const int64_t channels = shape->channels, padded = padded_keys(shape), pairs = channel_pairs(shape);
    Pair *const keys = memory, *const values = memory + heads * key_panels_size(shape);
    int failed = 0;
#pragma omp parallel reduction(| : failed)
    {
        const int64_t sizes[4] = {ROWS * padded, ROWS * padded / 2, ROWS * (pairs + 8), pairs + 8};
        Pair *own = malloc(sizeof(Pair) * (size_t)(sizes[0] + sizes[1] + sizes[2] + sizes[3]));
        Scratch scratch = {(float *)own, own + sizes[0], own + sizes[0] + sizes[1], own + sizes[0] + sizes[1] + sizes[2]};
        failed = own == NULL;
#pragma omp for schedule(static)
        for (int64_t head = 0; head < heads; head++) {
            if (!own) continue;
            int64_t start = head / shape->heads * shape->keys * shape->heads * channels + head % shape->heads * channels;
            pack_keys(k + start, shape, scratch.row, keys + head * key_panels_size(shape));
            pack_values(v + start, shape, values + head * value_panels_size(shape));
        }
#pragma omp for schedule(dynamic) /* cores may be busy, or of several kinds */
        for (int64_t task = 0; task < heads * tiles; task++) {
            if (!own) continue;
            int64_t head = task / tiles, first = task % tiles * ROWS;
            int64_t start = (head / shape->heads * shape->queries + first) * shape->heads * channels
                            + head % shape->heads * channels;
            attend_rows(q + start, shape, min(shape->queries - first, ROWS), scale * log2_e,
                        keys + head * key_panels_size(shape), values + head * value_panels_size(shape), scratch, out + start);
        }
        free(own);
    }
    return !failed;
}
#else
int has_bf16(void) { return 0; }
#endif
