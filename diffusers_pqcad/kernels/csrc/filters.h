/* A layer's levels in blocks, as the products read them, and the windows of these. */
#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "image.h"
#include "products.h"
#include "vectors.h"

#define LEVEL_MAX 127

/* A layer's levels, int8 (outputs, channels, height, width), and the scale of each output. */
typedef struct {
    const int8_t *levels;
    const float *scale;
    int64_t outputs, channels, height, width, padded_channels, is_winograd;
} Filters;

/* A chunk of channels of one row of an output's filter, from channel `c` on: zeros beyond the last one. */
typedef int8_t Levels[CHUNK];
INLINE void read_levels(const Filters *filters, int64_t o, int64_t y, int64_t x, int64_t c, Levels chunk)
{
    const int64_t pixels = filters->height * filters->width, left = filters->channels - c;
    const int8_t *from = filters->levels + (o * filters->channels + c) * pixels + y * filters->width + x;
    memset(chunk, 0, CHUNK);
    for (int64_t i = 0; i < CHUNK && i < left; i++) chunk[i] = from[i * pixels];
}

/* The transformed filter of F(2, 3), g0, g0 + g1 + g2, g0 - g1 + g2 and g2 (winograd.h): the scales have the halves. Where
   the sums of an output's filter exceed 8 bits, they are divided by `step` and rounded, an error of at most 0.75 of a level. */
INLINE void transform_filter(const Filters *filters, int64_t o, int64_t y, int64_t c, const float *step, Levels *elements)
{
    Levels middle;
    read_levels(filters, o, y, 0, c, elements[0]);
    read_levels(filters, o, y, 1, c, middle);
    read_levels(filters, o, y, 2, c, elements[3]);
    for (int i = 0; i < CHUNK; i++) {
        const int outer = elements[0][i] + elements[3][i];
        elements[1][i] = (int8_t)__builtin_rintf((float)(outer + middle[i]) / step[1]);
        elements[2][i] = (int8_t)__builtin_rintf((float)(outer - middle[i]) / step[2]);
    }
}

/* Find what brings the sums of an output's filter to 8 bits; 1 where they have no more. */
static void find_steps(const Filters *filters, int64_t o, float *step)
{
    int64_t sum = LEVEL_MAX, difference = LEVEL_MAX;
    for (int64_t y = 0; y < filters->height; y++)
        for (int64_t c = 0; c < filters->channels; c += CHUNK) {
            Levels row[3];
            for (int x = 0; x < 3; x++) read_levels(filters, o, y, x, c, row[x]);
            for (int i = 0; i < CHUNK; i++) {
                const int outer = row[0][i] + row[2][i], middle = row[1][i];
                sum = max(sum, abs(outer + middle)), difference = max(difference, abs(outer - middle));
            }
        }
    step[1] = (float)sum / LEVEL_MAX, step[2] = (float)difference / LEVEL_MAX;
}

/* Write the levels of output `o` to the blocks that start at `weight`, of `steps` each, and their sums and scales. Of what is
   beyond the last output, all are zeros. */
static void pack_output(const Filters *filters, int64_t o, int64_t steps, int8_t *weight, int32_t *level_sum, float *scale)
{
    const int elements = filters->is_winograd ? TILE_SIZE : 1, is_real = o < filters->outputs;
    const int64_t channels = filters->padded_channels;
    float step[TILE_SIZE] = {1, 1, 1, 1};
    int32_t sum[TILE_SIZE] = {0};
    if (is_real && filters->is_winograd) find_steps(filters, o, step);
    for (int64_t place = 0; place < steps * DEPTH / channels; place++) /* rows of a transformed filter, else its pixels */
        for (int64_t c = 0; c < channels; c += CHUNK) {
            Levels chunk[TILE_SIZE] = {0};
            if (is_real && filters->is_winograd) transform_filter(filters, o, place, c, step, chunk);
            else if (is_real) read_levels(filters, o, place / filters->width, place % filters->width, c, chunk[0]);
            for (int k = 0; k < elements; k++) {
                int8_t *target = weight + (k * steps + (place * channels + c) / DEPTH) * OUTPUTS * DEPTH;
                for (int64_t i = 0; i < CHUNK && i < channels - c; i += DEPTH)
                    memcpy(target + i * OUTPUTS, chunk[k] + i, DEPTH);
                for (int i = 0; i < CHUNK; i++) sum[k] += chunk[k][i];
            }
        }
    for (int k = 0; k < elements; k++) {
        level_sum[k * OUTPUTS] = sum[k];
        scale[k * OUTPUTS] = !is_real ? 0 : filters->scale[o] * step[k] * (k == 1 || k == 2 ? 0.5f : 1);
    }
}

/* Write `filters` in blocks, and for every output of every block the sum of its levels and its scale: as `Weights` has them. */
void pack_filters(const Filters *filters, int8_t *weight, int32_t *level_sum, float *scale)
{
    const int elements = filters->is_winograd ? TILE_SIZE : 1;
    const int64_t pixels = filters->height * (filters->is_winograd ? 1 : filters->width);
    const int64_t steps = pixels * filters->padded_channels / DEPTH, blocks = (filters->outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for schedule(dynamic)
    for (int64_t block = 0; block < blocks; block++)
        for (int j = 0; j < OUTPUTS; j++) {
            const int64_t first = block * elements * OUTPUTS;
            pack_output(filters, block * OUTPUTS + j, steps, weight + first * steps * DEPTH + j * DEPTH,
                        level_sum + first + j, scale + first + j);
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
