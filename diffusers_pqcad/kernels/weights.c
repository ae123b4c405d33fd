/* Weights rounded onto their grid, packed, and what that costs, in one pass. Compiled on first use, by native.py. Codes
   are those of qparams.py and packing.py, to the last; sums of errors are rounded otherwise. */
#include <math.h>
#include <stdint.h>

#define LANES 16
#define INLINE static inline __attribute__((always_inline))

/* Largest magnitudes of `groups` of `length` weights; that of a NaN, or of an infinity, is not finite. */
void largest_magnitudes(const float *weight, int64_t groups, int64_t length, float *largest)
{
#pragma omp parallel for schedule(static)
    for (int64_t group = 0; group < groups; group++) {
        const float *own = weight + group * length;
        uint32_t most = 0; /* magnitudes are in the order of their bits, NaNs last */
        for (int64_t i = 0; i < length; i++) {
            union {
                float number;
                uint32_t bits;
            } w = {own[i]};
            uint32_t magnitude = w.bits & 0x7fffffff;
            most = magnitude > most ? magnitude : most;
        }
        union {
            uint32_t bits;
            float number;
        } found = {most};
        largest[group] = found.number;
    }
}

/* A grid of levels, as WeightSpec in qparams.py has it. */
typedef struct {
    int32_t bits, level_max, level_step;
} Grid;

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

INLINE void round_row(const float *weight, const float *scale, int64_t groups, int64_t length, Grid grid,
                      uint8_t *codes, double *errors)
{
    errors[0] = errors[1] = 0;
    for (int64_t group = 0; group < groups; group++)
        round_group(weight + group * length, length, scale[group], grid, codes + group * length, errors);
}

/* Round `rows` x `groups` x `length` weights at `scale` (rows, groups). `codes` is (rows, row_codes), with zeros beyond a
   row up to a whole block, and `packed` as many bits of each; for 8 bits, `codes` are what is packed. `errors` (rows, 2)
   are sums of squared errors and of squared weights. */
void quantize_rows(const float *weight, const float *scale, int64_t rows, int64_t groups, int64_t length, int bits,
                   int64_t row_codes, uint8_t *codes, uint8_t *packed, double *errors)
{
#pragma omp parallel for schedule(static)
    for (int64_t row = 0; row < rows; row++) {
        uint8_t *own = codes + row * row_codes, *target = packed + row * row_codes * bits / 8;
        const float *from = weight + row * groups * length;
        switch (bits) { /* constant grids are vectorized */
#define CASE(BITS, LEVEL_MAX, LEVEL_STEP, CODES, BYTES)                                                                    \
    case BITS:                                                                                                             \
        round_row(from, scale + row * groups, groups, length, (Grid){BITS, LEVEL_MAX, LEVEL_STEP}, own, errors + 2 * row); \
        if (BITS < 8) pack(own, row_codes, BITS, CODES, BYTES, target);                                                    \
        break;
            CASE(2, 3, 2, 4, 1)
            CASE(3, 3, 1, 8, 3)
            CASE(4, 7, 1, 2, 1)
            CASE(6, 31, 1, 4, 3)
            CASE(8, 127, 1, 1, 1)
        }
    }
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
    case 2: return highest(packed, count, 2, 4, 1);
    case 3: return highest(packed, count, 3, 8, 3);
    case 4: return highest(packed, count, 4, 2, 1);
    case 6: return highest(packed, count, 6, 4, 3);
    default: return highest(packed, count, 8, 1, 1);
    }
}
