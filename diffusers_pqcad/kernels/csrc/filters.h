/* A layer's levels in blocks, as the products read them, and the windows of these. */
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "image.h"
#include "products.h"
#include "vectors.h"

#define LEVEL_MAX 127

/* A layer's levels, int8 (outputs, channels, height, width), and the scale of each output. With `is_doubled`, they are
   packed for the doubled image of nearest upsampling, in tiles. */
typedef struct {
    const int8_t *levels;
    const float *scale;
    int64_t outputs, channels, height, width, padded_channels, is_winograd, is_doubled;
} Filters;

/* Blocks for the same outputs, and the rows and columns of a block's kernel. A row of a doubled image is there twice, so that
   two rows of a kernel add up: the last two of three for even rows of the output (phase 0), the first two for odd ones. */
INLINE int blocks_for(const Filters *filters) { return !filters->is_winograd ? 1 : filters->is_doubled ? 3 : TILE_SIZE; }
INLINE int64_t rows_of(const Filters *filters) { return filters->is_doubled ? 2 : filters->height; }
INLINE int64_t columns_of(const Filters *filters) { return filters->is_winograd ? 1 : filters->width; }

/* A chunk of channels of one pixel of an output's filter, from channel `c` on: zeros beyond the last one. */
typedef int16_t Levels[CHUNK];
INLINE void read_levels(const Filters *filters, int64_t o, int64_t y, int64_t x, int64_t c, Levels chunk)
{
    const int64_t pixels = filters->height * filters->width, left = filters->channels - c;
    const int8_t *from = filters->levels + (o * filters->channels + c) * pixels + y * filters->width + x;
    memset(chunk, 0, sizeof(Levels));
    for (int64_t i = 0; i < CHUNK && i < left; i++) chunk[i] = from[i * pixels];
}

/* The same of row `row` of a block of `phase`. */
INLINE void read_row(const Filters *filters, int64_t o, int64_t phase, int64_t row, int64_t x, int64_t c, Levels chunk)
{
    if (!filters->is_doubled) return read_levels(filters, o, row, x, c, chunk);
    const int64_t first = row * (1 + phase);
    read_levels(filters, o, first, x, c, chunk);
    if (row == phase) return; /* it stands alone */
    Levels second;
    read_levels(filters, o, first + 1, x, c, second);
    for (int i = 0; i < CHUNK; i++) chunk[i] = (int16_t)(chunk[i] + second[i]);
}

/* The elements of a row of a transformed filter: of F(2, 3) g0, g0 + g1 + g2, g0 - g1 + g2 and g2, whose scales have the
   halves; of a doubled image all but the third (winograd.h). */
INLINE void transform_row_of_filter(const Filters *filters, int64_t o, int64_t phase, int64_t row, int64_t c, Levels *elements)
{
    Levels middle, *last = elements + blocks_for(filters) - 1;
    read_row(filters, o, phase, row, 0, c, elements[0]);
    read_row(filters, o, phase, row, 1, c, middle);
    read_row(filters, o, phase, row, 2, c, *last);
    for (int i = 0; i < CHUNK; i++) {
        const int outer = elements[0][i] + (*last)[i];
        elements[1][i] = (int16_t)(outer + middle[i]);
        if (!filters->is_doubled) elements[2][i] = (int16_t)(outer - middle[i]);
    }
}

/* Find what brings the elements of an output's filter to 8 bits when they are divided by it: 1 where they have no more. */
static void find_steps(const Filters *filters, int64_t o, int64_t phase, float *step)
{
    const int size = blocks_for(filters);
    int largest[TILE_SIZE] = {LEVEL_MAX, LEVEL_MAX, LEVEL_MAX, LEVEL_MAX};
    for (int64_t row = 0; row < rows_of(filters); row++)
        for (int64_t c = 0; c < filters->channels; c += CHUNK) {
            Levels element[TILE_SIZE];
            transform_row_of_filter(filters, o, phase, row, c, element);
            for (int k = 0; k < size; k++)
                for (int i = 0; i < CHUNK; i++) largest[k] = (int)max(largest[k], abs(element[k][i]));
        }
    for (int k = 0; k < size; k++) step[k] = (float)largest[k] / LEVEL_MAX;
}

/* Write the levels of output `o` in a `phase` to the blocks that start at `weight`, of `steps` each, and their sums and
   scales. Of what is beyond the last output, all are zeros. Elements of more than 8 bits are rounded to them: an error of at
   most half of what they are divided by, in levels; of F(2, 3) at most 0.75 of a level after the halves. */
static void pack_output(const Filters *filters, int64_t o, int64_t phase, int64_t steps, int8_t *weight, int32_t *level_sum,
                        float *scale, float *divisor)
{
    const int elements = blocks_for(filters), is_real = o < filters->outputs;
    const int64_t channels = filters->padded_channels, columns = columns_of(filters);
    float step[TILE_SIZE] = {1, 1, 1, 1};
    int32_t sum[TILE_SIZE] = {0};
    if (is_real && filters->is_winograd) find_steps(filters, o, phase, step);
    for (int64_t place = 0; place < steps * DEPTH / channels; place++)
        for (int64_t c = 0; c < channels; c += CHUNK) {
            Levels element[TILE_SIZE] = {{0}};
            if (is_real && filters->is_winograd) transform_row_of_filter(filters, o, phase, place, c, element);
            else if (is_real) read_levels(filters, o, place / columns, place % columns, c, element[0]);
            for (int k = 0; k < elements; k++) {
                int8_t chunk[CHUNK], *target = weight + (k * steps + (place * channels + c) / DEPTH) * OUTPUTS * DEPTH;
                for (int i = 0; i < CHUNK; i++)
                    chunk[i] = (int8_t)(step[k] == 1 ? element[k][i] : __builtin_rintf((float)element[k][i] / step[k]));
                for (int64_t i = 0; i < CHUNK && i < channels - c; i += DEPTH)
                    memcpy(target + i * OUTPUTS, chunk + i, DEPTH);
                for (int i = 0; i < CHUNK; i++) sum[k] += chunk[i];
            }
        }
    const int has_halves = filters->is_winograd && !filters->is_doubled;
    for (int k = 0; k < elements; k++) {
        level_sum[k * OUTPUTS] = sum[k];
        divisor[k * OUTPUTS] = step[k];
        scale[k * OUTPUTS] = !is_real ? 0 : filters->scale[o] * step[k] * (has_halves && (k == 1 || k == 2) ? 0.5f : 1);
    }
}

/* Write `filters` in blocks, and for every output of every block the sum of its levels and its scale, as `Weights` has them,
   and what its elements were divided by. */
void pack_filters(const Filters *filters, int8_t *weight, int32_t *level_sum, float *scale, float *divisor)
{
    const int elements = blocks_for(filters);
    const int64_t phases = filters->is_doubled ? 2 : 1, blocks = (filters->outputs + OUTPUTS - 1) / OUTPUTS;
    const int64_t steps = rows_of(filters) * columns_of(filters) * filters->padded_channels / DEPTH;
#pragma omp parallel for schedule(dynamic)
    for (int64_t task = 0; task < phases * blocks; task++)
        for (int j = 0; j < OUTPUTS; j++) {
            const int64_t first = task * elements * OUTPUTS, output = task % blocks * OUTPUTS + j;
            pack_output(filters, output, task / blocks, steps, weight + first * steps * DEPTH + j * DEPTH,
                        level_sum + first + j, scale + first + j, divisor + first + j);
        }
}

/* Cut the steps of every block into windows that cannot overflow: of any 16-bit sum, neither the positive nor the
   negative levels add up to more than `limit`. A window also ends with a `segment`, the steps whose inputs are
   consecutive in memory; segment k starts at row `segments[k].y`, byte `segments[k].x`. Return how many windows were
   written; there are at most as many as steps. A single step must fit the limit. */
int64_t plan_windows(const int8_t *weight, int64_t blocks, int64_t steps, int64_t segment, const Window *segments,
                     int limit, Window *windows, int32_t *window_starts)
{
    enum { SUMS = OUTPUTS * DEPTH / 2 };
    int64_t count = 0;
    for (int64_t block = 0; block < blocks; block++) {
        int positive[SUMS], negative[SUMS];
        window_starts[block] = (int32_t)count;
        for (int64_t step = 0; step < steps; step++, weight += DEPTH * OUTPUTS) {
            int64_t k = step / segment, within = step % segment;
            int most = 0, starts = within == 0;
            for (int pass = starts; pass < 2; pass++) { /* second pass: the step did not fit, and starts a window */
                most = 0;
                for (int s = 0; s < SUMS; s++) {
                    int a = weight[2 * s], b = weight[2 * s + 1];
                    if (pass == 1) positive[s] = negative[s] = 0;
                    positive[s] += (a > 0 ? a : 0) + (b > 0 ? b : 0);
                    negative[s] -= (a < 0 ? a : 0) + (b < 0 ? b : 0);
                    most = positive[s] > most ? positive[s] : most;
                    most = negative[s] > most ? negative[s] : most;
                }
                starts = pass;
                if (most <= limit) break;
            }
            if (starts) windows[count++] = (Window){segments[k].y, segments[k].x + (int32_t)(within * DEPTH), 0};
            windows[count - 1].steps++;
        }
    }
    window_starts[blocks] = (int32_t)count;
    return count;
}
