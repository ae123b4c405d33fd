/* Weights rounded onto their grid, packed, and what that costs, in one pass; and levels of packed weights. Codes
   are those of qparams.py and packing.py, to the last; sums of errors are rounded otherwise. */
#include <math.h>
#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "inline.h"
#include "layout.h"

#define LANES 16

#define MIN_SCALE 1e-12f /* as in qparams.py */

/* For kernels/native/weights.py: how many threads take part. */
int max_threads(void) { return omp_get_max_threads(); }

/* The largest magnitude of `length` weights; not finite where a weight is not. */
INLINE float largest_magnitude(const float *weight, int64_t length)
{
    uint32_t most = 0; /* magnitudes are in the order of their bits, NaNs last */
    for (int64_t i = 0; i < length; i++) {
        uint32_t bits;
        memcpy(&bits, weight + i, sizeof bits);
        most = (bits & 0x7fffffff) > most ? bits & 0x7fffffff : most;
    }
    float found;
    memcpy(&found, &most, sizeof found);
    return found;
}

void largest_magnitudes(const float *weight, int64_t groups, int64_t length, float *largest)
{
#pragma omp parallel for schedule(static)
    for (int64_t group = 0; group < groups; group++)
        largest[group] = largest_magnitude(weight + group * length, length);
}

/* A grid of levels, as WeightSpec in qparams.py has it. */
typedef struct {
    int32_t bits, level_max, level_step;
} Grid;

/* All grids, and codes and bytes of their blocks, for a `switch` with a CASE of these: constant grids are vectorized.
   What has such a switch returns a negative number where `bits` is none of them, and has written nothing. */
#define GRIDS                                                                                                              \
    CASE(2, 3, 2, 4, 1) CASE(3, 3, 1, 8, 3) CASE(4, 7, 1, 2, 1) CASE(6, 31, 1, 4, 3) CASE(8, 127, 1, 1, 1)

INLINE int has_grid(int bits)
{
    switch (bits) {
#define CASE(BITS, LEVEL_MAX, LEVEL_STEP, CODES, BYTES)                                                                    \
    case BITS: return 1;
        GRIDS
#undef CASE
    default: return 0;
    }
}

INLINE float to_level(float weight, float scale, float level_max, int is_odd)
{
    float x = weight / scale;
    x = x < -level_max ? -level_max : x > level_max ? level_max : x;
    if (!is_odd) return rintf(x);
    x = rintf((x - 1) / 2) * 2 + 1; /* odd integers: to the nearest even number, shifted */
    return x < -level_max ? -level_max : x;
}

/* Codes of `count` weights, up to LANES, that share a scale; their squared errors, and their squares, in lanes. */
INLINE void round_lanes(const float *weight, int64_t count, float scale, Grid grid, uint8_t *codes, float *error,
                        float *power)
{
    float w[LANES] = {0};
    int32_t code[LANES];
    for (int64_t i = 0; i < count; i++) w[i] = weight[i];
    for (int i = 0; i < LANES; i++) {
        float level = to_level(w[i], scale, (float)grid.level_max, grid.level_step == 2), rest = level * scale - w[i];
        error[i] += i < count ? rest * rest : 0;
        power[i] += w[i] * w[i];
        code[i] = ((int32_t)level + grid.level_max) / grid.level_step;
    }
    for (int64_t i = 0; i < count; i++) codes[i] = (uint8_t)code[i];
}

INLINE void round_group(const float *weight, int64_t count, float scale, Grid grid, uint8_t *codes, double *errors)
{
    float error[LANES] = {0}, power[LANES] = {0};
    int64_t start = 0;
    for (; start + LANES <= count; start += LANES) /* a constant count is vectorized */
        round_lanes(weight + start, LANES, scale, grid, codes + start, error, power);
    if (start < count) round_lanes(weight + start, count - start, scale, grid, codes + start, error, power);
    for (int i = 0; i < LANES; i++) errors[0] += error[i], errors[1] += power[i];
}

/* Codes as a little-endian stream of bits, in the shortest blocks that fill whole bytes. */
INLINE void pack(const uint8_t *codes, int64_t count, int bits, int block_codes, int block_bytes, uint8_t *packed)
{
    for (int64_t i = 0; i < count; i += block_codes, packed += block_bytes) {
        uint32_t word = 0;
        for (int k = 0; k < block_codes; k++) word |= (uint32_t)codes[i + k] << bits * k;
        for (int k = 0; k < block_bytes; k++) packed[k] = (uint8_t)(word >> 8 * k);
    }
}

/* The min-max scale of a group, as `min_max_weight_scale` in qparams.py; not finite where a weight is not. */
INLINE float min_max_scale(const float *weight, int64_t length, Grid grid)
{
    float largest = largest_magnitude(weight, length), scale = largest / (float)grid.level_max;
    if (largest == 0) return grid.bits == 2 ? MIN_SCALE : 1;
    return scale < MIN_SCALE ? MIN_SCALE : scale;
}

INLINE void round_row(const float *weight, float *scale, int64_t groups, int64_t length, int finds_scale, Grid grid,
                      uint8_t *codes, double *errors)
{
    errors[0] = errors[1] = 0;
    for (int64_t group = 0; group < groups; group++, weight += length, codes += length) {
        if (finds_scale) scale[group] = min_max_scale(weight, length, grid); /* the cache has the weights then */
        round_group(weight, length, scale[group], grid, codes, errors);
    }
}

/* Round `rows` x `groups` x `length` weights at `scale` (rows, groups), which is written with `finds_scale`, to `packed`,
   the bits of `row_codes` codes a row, whole blocks. `room` has as many bytes for each of `threads`. `errors` (rows, 2) are
   sums of squared errors and of squared weights. */
int quantize_rows(const float *weight, float *scale, int64_t rows, int64_t groups, int64_t length, int finds_scale,
                  int bits, int64_t row_codes, int threads, uint8_t *room, uint8_t *packed, double *errors)
{
    if (!has_grid(bits)) return -1;
    memset(room, 0, threads * row_codes); /* beyond a row, too */
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < rows; row++) {
        uint8_t *target = packed + row * row_codes * bits / 8, *own = room + omp_get_thread_num() * row_codes;
        const float *from = weight + row * groups * length;
        float *scales = scale + row * groups;
        double *sums = errors + 2 * row;
        switch (bits) {
#define CASE(BITS, LEVEL_MAX, LEVEL_STEP, CODES, BYTES)                                                                    \
    case BITS:                                                                                                             \
        if (BITS == 8) own = target;                                                                                       \
        round_row(from, scales, groups, length, finds_scale, (Grid){BITS, LEVEL_MAX, LEVEL_STEP}, own, sums);              \
        if (BITS < 8) pack(own, row_codes, BITS, CODES, BYTES, target);                                                    \
        break;
            GRIDS
#undef CASE
        }
    }
    return 0;
}

/* Levels of `length` codes in packed blocks. */
INLINE void unpack(const uint8_t *packed, int64_t length, Grid grid, int block_codes, int block_bytes, int8_t *levels)
{
    const uint32_t mask = (1u << grid.bits) - 1;
    for (int64_t i = 0; i < length; i += block_codes, packed += block_bytes) {
        uint32_t word = 0;
        for (int k = 0; k < block_bytes; k++) word |= (uint32_t)packed[k] << 8 * k;
        int8_t block[8]; /* 8 codes at most */
        for (int k = 0; k < block_codes; k++)
            block[k] = (int8_t)((int32_t)(word >> grid.bits * k & mask) * grid.level_step - grid.level_max);
        if (length - i >= block_codes) memcpy(levels + i, block, block_codes);
        else memcpy(levels + i, block, length - i);
    }
}

/* Write the levels (rows, length) of `packed`, whole blocks for each row. */
int unpack_rows(const uint8_t *packed, int64_t rows, int64_t length, int bits, int8_t *levels)
{
    if (!has_grid(bits)) return -1;
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        int8_t *target = levels + row * length;
        switch (bits) {
#define CASE(BITS, LEVEL_MAX, LEVEL_STEP, CODES, BYTES)                                                                    \
    case BITS:                                                                                                             \
        unpack(packed + row * ((length + CODES - 1) / CODES * BYTES), length, (Grid){BITS, LEVEL_MAX, LEVEL_STEP}, CODES,   \
               BYTES, target);                                                                                             \
        break;
            GRIDS
#undef CASE
        }
    }
    return 0;
}

INLINE int highest(const uint8_t *packed, int64_t count, int bits, int block_codes, int block_bytes)
{
    uint32_t most = 0, mask = (1u << bits) - 1;
    for (int64_t i = 0; i < count; i += block_bytes) {
        uint32_t word = 0;
        for (int k = 0; k < block_bytes; k++) word |= (uint32_t)packed[i + k] << 8 * k;
        for (int k = 0; k < block_codes; k++) {
            uint32_t code = word >> bits * k & mask;
            most = code > most ? code : most;
        }
    }
    return (int)most;
}

/* The largest code in `count` packed bytes, whole blocks. */
int highest_code(const uint8_t *packed, int64_t count, int bits)
{
    switch (bits) {
#define CASE(BITS, LEVEL_MAX, LEVEL_STEP, CODES, BYTES)                                                                    \
    case BITS: return highest(packed, count, BITS, CODES, BYTES);
        GRIDS
#undef CASE
    default: return -1;
    }
}

/* As in qparams.py and packing.py. */
#define CASE(BITS, LEVEL_MAX, LEVEL_STEP, CODES, BYTES)                                                                    \
    {#BITS " bits: level_max", LEVEL_MAX}, {#BITS " bits: level_step", LEVEL_STEP},                                        \
    {#BITS " bits: codes of a block", CODES}, {#BITS " bits: bytes of a block", BYTES},
EXPORT_LAYOUT(GRIDS CONSTANT(MIN_SCALE))
#undef CASE
