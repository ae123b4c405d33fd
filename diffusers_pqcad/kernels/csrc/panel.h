/* Blocks of a layer whose levels are not kept: unpacked in each call, to the same bytes that filters.h would have kept. */
#pragma once

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#include "filters.h"
#include "inline.h"

#define UNPACKED 32 /* codes that are unpacked at once, of any width in whole bytes */
#define SIDE 8      /* outputs whose levels are turned at once: the 32-bit numbers of a vector */
#define TAPS 9      /* of a kernel of 3 x 3 pixels */
#define UNPACKED_WIDTHS (1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 8) /* a bit for each width; as in qparams.py */

/* A layer's weights as they are stored: `codes` (outputs, row_bytes) of `bits` each. With several `groups`, a row has a
   `group_scale` for each, (outputs, groups), and its levels are rounded once more, onto 8 bits at the scale in `filters`,
   whose levels are NULL. `steps` are what `pack_output` divides by, for every output of every block; they are all 1 unless
   elements `may_overflow` 8 bits. */
typedef struct {
    const uint8_t *codes;
    const float *group_scale, *steps;
    Filters filters;
    int64_t row_bytes, bits, groups, may_overflow;
} Packed;

/* Bits 0 to 7, 8 to 15 ... of 32: the four codes of `bits` that a number holds side by side. */
INLINE __m256i spread(__m256i numbers, int bits)
{
    const __m256i mask = _mm256_set1_epi32((1 << bits) - 1);
    __m256i codes = _mm256_and_si256(numbers, mask);
    UNROLL
    for (int i = 1; i < DEPTH; i++) {
        const __m256i moved = _mm256_sll_epi32(numbers, _mm_cvtsi32_si128(i * (8 - bits)));
        const __m256i at = _mm256_sll_epi32(mask, _mm_cvtsi32_si128(8 * i));
        codes = _mm256_or_si256(codes, _mm256_and_si256(moved, at));
    }
    return codes;
}

/* 16 bytes, of which the last four are zeros. */
INLINE __m128i load_12(const uint8_t *from)
{
    int32_t last;
    memcpy(&last, from + 8, sizeof last);
    return _mm_insert_epi32(_mm_loadl_epi64((const __m128i *)from), last, 2);
}

/* UNPACKED codes of `bits`, a constant, in a byte each. No byte beyond them is read. */
INLINE __m256i unpack_codes(const uint8_t *from, int bits)
{
    if (bits == 8) return _mm256_loadu_si256((const __m256i *)from);
    if (bits == 4) {
        const __m256i bytes = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)from));
        return _mm256_and_si256(_mm256_or_si256(bytes, _mm256_slli_epi16(bytes, 4)), _mm256_set1_epi8(15));
    }
    if (bits == 2) return spread(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)from)), 2);
    if (bits == 3) { /* four codes in a byte and a half */
        const __m256i bytes = _mm256_broadcastsi128_si256(load_12(from));
        const __m256i places = _mm256_setr_epi8(0, 1, -1, -1, 1, 2, -1, -1, 3, 4, -1, -1, 4, 5, -1, -1, /* of 0 to 5 */
                                                6, 7, -1, -1, 7, 8, -1, -1, 9, 10, -1, -1, 10, 11, -1, -1);
        const __m256i halves = _mm256_setr_epi32(0, 4, 0, 4, 0, 4, 0, 4);
        return spread(_mm256_srlv_epi32(_mm256_shuffle_epi8(bytes, places), halves), 3);
    }
    const __m128i low = _mm_loadu_si128((const __m128i *)from), high = _mm_loadu_si128((const __m128i *)(from + 8));
    const __m256i places = _mm256_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1, /* four in three bytes */
                                            4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15, -1);
    return spread(_mm256_shuffle_epi8(_mm256_set_m128i(high, low), places), 6);
}

/* Levels of UNPACKED codes: as WeightSpec in qparams.py has them. */
INLINE __m256i unpack_levels(const uint8_t *from, int bits)
{
    const __m256i codes = unpack_codes(from, bits);
    if (bits == 2) return _mm256_sub_epi8(_mm256_add_epi8(codes, codes), _mm256_set1_epi8(3));
    return _mm256_sub_epi8(codes, _mm256_set1_epi8((char)((1 << (bits - 1)) - 1)));
}

INLINE void unpack_row_of(const uint8_t *from, int64_t count, int bits, int8_t *levels)
{
    int64_t i = 0;
    for (; i + UNPACKED <= count; i += UNPACKED, from += UNPACKED / 8 * bits)
        _mm256_storeu_si256((__m256i *)(levels + i), unpack_levels(from, bits));
    if (i == count) return;
    uint8_t rest[UNPACKED] = {0};
    memcpy(rest, from, ((count - i) * bits + 7) / 8);
    _mm256_storeu_si256((__m256i *)(levels + i), unpack_levels(rest, bits));
}

/* Round the levels of a row of several groups, from input `first` on, onto 8 bits at the scale of the whole row: as
   `channel_levels` in operation.py. */
INLINE void round_groups(const Packed *packed, int64_t output, int64_t first, int64_t count, int8_t *levels)
{
    const int64_t length = packed->filters.channels / packed->groups;
    const float scale = packed->filters.scale[output];
    for (int64_t i = 0, next; i < count; i = next) {
        const int64_t group = (first + i) / length;
        const float of_group = packed->group_scale[output * packed->groups + group];
        next = min((group + 1) * length - first, count);
        for (int64_t k = i; k < next; k++) {
            const float weight = (float)levels[k] * of_group;
            float level = weight / scale;
            level = level < -LEVEL_MAX ? -LEVEL_MAX : level > LEVEL_MAX ? LEVEL_MAX : level;
            levels[k] = (int8_t)__builtin_rintf(level);
        }
    }
}

/* Write `count` levels of `output` from input `first` on, a multiple of UNPACKED; up to UNPACKED - 1 bytes after them are
   written, too. */
static void unpack_levels_of(const Packed *packed, int64_t output, int64_t first, int64_t count, int8_t *levels)
{
    const uint8_t *from = packed->codes + output * packed->row_bytes + first / 8 * packed->bits;
    switch (packed->bits) { /* a constant width is compiled into a few instructions */
    case 2: unpack_row_of(from, count, 2, levels); break;
    case 3: unpack_row_of(from, count, 3, levels); break;
    case 4: unpack_row_of(from, count, 4, levels); break;
    case 6: unpack_row_of(from, count, 6, levels); break;
    default: unpack_row_of(from, count, 8, levels);
    }
    if (packed->groups > 1) round_groups(packed, output, first, count, levels);
}

/* Turn SIDE rows of as many 32-bit numbers into columns. */
INLINE void transpose(__m256i rows[SIDE])
{
    __m256i pairs[SIDE], fours[SIDE];
    UNROLL
    for (int i = 0; i < SIDE; i += 2) {
        pairs[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
        pairs[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    UNROLL
    for (int i = 0; i < SIDE; i += 4) {
        fours[i] = _mm256_unpacklo_epi64(pairs[i], pairs[i + 2]);
        fours[i + 1] = _mm256_unpackhi_epi64(pairs[i], pairs[i + 2]);
        fours[i + 2] = _mm256_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
        fours[i + 3] = _mm256_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
    }
    UNROLL
    for (int i = 0; i < SIDE / 2; i++) {
        rows[i] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x20);
        rows[i + 4] = _mm256_permute2x128_si256(fours[i], fours[i + 4], 0x31);
    }
}

/* DEPTH channels of all taps of SIDE outputs: a vector for each tap. `levels` are the outputs' rows, `stride` apart, tap after
   tap for each channel. */
INLINE void read_taps(const int8_t *levels, int64_t stride, __m256i taps[TAPS])
{
    int32_t last[SIDE];
    UNROLL
    for (int i = 0; i < SIDE; i++) {
        __m128i channel[DEPTH];
        for (int k = 0; k < DEPTH; k++) channel[k] = _mm_loadu_si128((const __m128i *)(levels + i * stride + k * TAPS));
        const __m128i a = _mm_unpacklo_epi8(channel[0], channel[1]), b = _mm_unpacklo_epi8(channel[2], channel[3]);
        const __m128i c = _mm_unpackhi_epi8(channel[0], channel[1]), d = _mm_unpackhi_epi8(channel[2], channel[3]);
        taps[i] = _mm256_set_m128i(_mm_unpackhi_epi16(a, b), _mm_unpacklo_epi16(a, b));
        last[i] = _mm_cvtsi128_si32(_mm_unpacklo_epi16(c, d));
    }
    transpose(taps);
    taps[TAPS - 1] = _mm256_loadu_si256((const __m256i *)last);
}

/* Channel `i` of DEPTH, of SIDE outputs, as 32-bit numbers. */
INLINE __m256i channel_of(__m256i levels, int i)
{
    return _mm256_srai_epi32(_mm256_sll_epi32(levels, _mm_cvtsi32_si128(24 - 8 * i)), 24);
}

/* What `transform_row_of_filter` and `pack_output` make of three taps in a row, `other` being what is added to them or NULL;
   `steps` are of SIDE outputs, OUTPUTS apart for each element. */
INLINE void transform_wide(const __m256i *row, const __m256i *other, int is_doubled, const float *steps, __m256i *elements)
{
    const int size = is_doubled ? TILE_SIZE - 1 : TILE_SIZE;
    for (int k = 0; k < size; k++) elements[k] = _mm256_setzero_si256();
    for (int i = 0; i < DEPTH; i++) {
        __m256i tap[3], sums[TILE_SIZE];
        for (int x = 0; x < 3; x++) {
            tap[x] = channel_of(row[x], i);
            if (other) tap[x] = _mm256_add_epi32(tap[x], channel_of(other[x], i));
        }
        const __m256i outer = _mm256_add_epi32(tap[0], tap[2]);
        sums[0] = tap[0], sums[1] = _mm256_add_epi32(outer, tap[1]);
        sums[2] = _mm256_sub_epi32(outer, tap[1]), sums[size - 1] = tap[2];
        for (int k = 0; k < size; k++) {
            const __m256 level = _mm256_div_ps(_mm256_cvtepi32_ps(sums[k]), _mm256_loadu_ps(steps + k * OUTPUTS));
            const __m256i byte = _mm256_and_si256(_mm256_cvtps_epi32(level), _mm256_set1_epi32(255));
            elements[k] = _mm256_or_si256(elements[k], _mm256_sll_epi32(byte, _mm_cvtsi32_si128(8 * i)));
        }
    }
}

/* The same of levels whose sums fit 8 bits. */
INLINE void transform_narrow(const __m256i *row, const __m256i *other, int is_doubled, __m256i *elements)
{
    __m256i tap[3];
    for (int x = 0; x < 3; x++) tap[x] = other ? _mm256_add_epi8(row[x], other[x]) : row[x];
    const __m256i outer = _mm256_add_epi8(tap[0], tap[2]);
    elements[0] = tap[0], elements[1] = _mm256_add_epi8(outer, tap[1]);
    elements[2] = _mm256_sub_epi8(outer, tap[1]), elements[is_doubled ? 2 : 3] = tap[2];
}

/* Write all taps of DEPTH channels of SIDE outputs to the blocks that start at `panel`, of `size` bytes each; `pixel` is
   how far those of the next pixel are. */
INLINE void write_taps(const Packed *packed, int64_t phase, const __m256i taps[TAPS], const float *steps, int8_t *panel,
                       int64_t size, int64_t pixel)
{
    const Filters *filters = &packed->filters;
    if (!filters->is_winograd) {
        for (int tap = 0; tap < TAPS; tap++) _mm256_storeu_si256((__m256i *)(panel + tap * pixel), taps[tap]);
        return;
    }
    for (int64_t row = 0; row < rows_of(filters); row++) { /* `read_row` says which rows these are */
        const int64_t first = filters->is_doubled ? row * (1 + phase) : row;
        const __m256i *other = filters->is_doubled && row != phase ? taps + 3 * (first + 1) : NULL;
        __m256i elements[TILE_SIZE];
        if (packed->may_overflow) transform_wide(taps + 3 * first, other, (int)filters->is_doubled, steps, elements);
        else transform_narrow(taps + 3 * first, other, (int)filters->is_doubled, elements);
        for (int k = 0; k < blocks_for(filters); k++)
            _mm256_storeu_si256((__m256i *)(panel + k * size + row * pixel), elements[k]);
    }
}

/* Blocks of kernels of one pixel, or of 3 x 3. */
static void unpack_turned(const Packed *packed, int64_t phase, int64_t first, const float *steps, int8_t *panel, int64_t size)
{
    const Filters *filters = &packed->filters;
    const int64_t pixels = filters->height * filters->width, pixel = filters->padded_channels * OUTPUTS;
    const int64_t chunk = pixels == 1 ? SIDE * CHUNK : CHUNK; /* long runs: to begin one takes as long as some vectors */
    int8_t levels[SIDE][CHUNK * TAPS + UNPACKED];
    for (int64_t o = 0; o < OUTPUTS; o += SIDE)
        for (int64_t c = 0; c < filters->padded_channels; c += chunk) {
            const int64_t count = min(chunk, filters->channels - c) * pixels, stop = min(chunk, filters->padded_channels - c);
            int8_t *target = panel + c * OUTPUTS + o * DEPTH;
            for (int i = 0; i < SIDE; i++) {
                const int64_t output = first + o + i, is_real = output < filters->outputs;
                if (is_real) unpack_levels_of(packed, output, c * pixels, count, levels[i]);
                const int64_t start = is_real ? count : 0;
                if (start < stop * pixels) memset(levels[i] + start, 0, stop * pixels - start);
            }
            for (int64_t i = 0; pixels == 1 && i < stop; i += CHUNK) {
                __m256i rows[SIDE];
                for (int k = 0; k < SIDE; k++) rows[k] = _mm256_loadu_si256((const __m256i *)(levels[k] + i));
                transpose(rows);
                for (int64_t k = 0; k < CHUNK && k < stop - i; k += DEPTH)
                    _mm256_storeu_si256((__m256i *)(target + (i + k) * OUTPUTS), rows[k / DEPTH]);
            }
            for (int64_t i = 0; pixels == TAPS && i < stop; i += DEPTH) {
                __m256i taps[TAPS];
                read_taps(levels[0] + i * TAPS, sizeof levels[0], taps);
                write_taps(packed, phase, taps, steps + o, target + i * OUTPUTS, size, pixel);
            }
        }
}

/* Blocks of any kernel, output by output; `room` has the levels of one, and UNPACKED bytes. */
static void unpack_any(const Packed *packed, int64_t phase, int64_t first, int8_t *panel, int64_t steps, int8_t *room)
{
    const float scale = 1;
    int32_t sums[TILE_SIZE * OUTPUTS];
    float scales[TILE_SIZE * OUTPUTS], divisors[TILE_SIZE * OUTPUTS];
    Filters one = packed->filters;
    one.levels = room, one.scale = &scale, one.outputs = 1;
    for (int64_t j = 0; j < OUTPUTS; j++) {
        const int64_t is_real = first + j < packed->filters.outputs;
        if (is_real) unpack_levels_of(packed, first + j, 0, one.channels * one.height * one.width, room);
        pack_output(&one, !is_real, phase, steps, panel + j * DEPTH, sums, scales, divisors);
    }
}

INLINE int is_turned(const Filters *filters)
{
    const int64_t height = filters->height, width = filters->width;
    return (height == 3 && width == 3) || (height == 1 && width == 1);
}

/* Write to `panel` the blocks for OUTPUTS outputs from `first` on in a `phase`: those that filters.h would have kept from block
   `index` on, of `steps` each. `panel` has `bytes_of_panel`. */
void unpack_panel(const Packed *packed, int64_t phase, int64_t first, int64_t index, int64_t steps, int8_t *panel)
{
    const int64_t size = steps * DEPTH * OUTPUTS;
    if (is_turned(&packed->filters)) unpack_turned(packed, phase, first, packed->steps + index * OUTPUTS, panel, size);
    else unpack_any(packed, phase, first, panel, steps, panel + blocks_for(&packed->filters) * size);
}

/* Bytes of the blocks that `unpack_panel` writes, and of what it needs beside them. */
int64_t bytes_of_panel(const Packed *packed, int64_t steps)
{
    const Filters *filters = &packed->filters;
    const int64_t room = is_turned(filters) ? 0 : filters->channels * filters->height * filters->width + UNPACKED;
    return round_up(blocks_for(filters) * steps * DEPTH * OUTPUTS + room, LINE);
}
