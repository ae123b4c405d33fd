/* What overflows 8 bits in transformed input tiles (winograd.h): a list, or dense rows, and their products. */
#pragma once

#include <stdint.h>
#include <string.h>

#include "image.h"
#include "layer.h"
#include "products.h"
#include "vectors.h"

#if VNNI
/* List at `list` the overflow of a vector of channels from `channel` on, in `bytes` with its bias, of the steps of which
   `overflows` has the bits; return how many there are. `place` is their element's. */
INLINE int list_overflow(Vector bytes, unsigned overflows, int64_t place, int64_t channel, Overflow *list)
{
    int32_t steps[VECTOR_BYTES / DEPTH];
    int count = 0;
    store(steps, bytes);
    for (; overflows; overflows &= overflows - 1) {
        const int64_t step = __builtin_ctz(overflows);
        list[count++] = (Overflow){steps[step], (int32_t)place, (int32_t)((channel + step * DEPTH) * OUTPUTS)};
    }
    return count;
}

/* Bring the `listed` overflow of a row into its dense form, among zeros. */
static void spread_overflow(const RowOverflow *of_row, int64_t listed, const Image *image, const Element *elements)
{
    const int64_t size = elements_of(image), channels = image->padded_channels;
    for (int64_t place = 0; place < size * image->tiles; place++)
        memset(of_row->dense + place * channels, elements[place % size].bias, channels);
    for (const Overflow *one = of_row->list; one < of_row->list + listed; one++) {
        const int64_t place = one->place / TILE_SIZE * size + one->place % TILE_SIZE;
        memcpy(of_row->dense + place * channels + one->weights / OUTPUTS, &one->bytes, DEPTH);
    }
    of_row->starts[image->tiles] = DENSE;
}

/* Bring the overflow of all rows of `lines` codes into its dense form. */
static void make_dense(uint8_t *codes, int64_t lines, const Image *image, const Element *elements)
{
#pragma omp parallel for schedule(static)
    for (int64_t line = 0; line < lines; line++) {
        const RowOverflow of_row = overflow_of(codes + line * bytes_of_row(image), image);
        const int32_t listed = of_row.starts[image->tiles];
        if (listed != DENSE) spread_overflow(&of_row, listed, image, elements);
    }
}

/* Add the products of listed overflow to the sums of tiles side by side: those of `row` and all up to column `end` of its
   line, the first of which are those of row `i` of the micro-tile. `biases` are the elements', in each byte of an entry. */
INLINE void add_overflow_of_line(const Image *image, const Row *row, int64_t end, const Block *elements,
                                 const int32_t *biases, int i, int32_t sums[TILE_SIZE][ROWS][OUTPUTS])
{
    const uint8_t *line = row->codes - row->column * elements_of(image) * image->padded_channels;
    int64_t at = 0; /* of the weights of a row of the kernel, which is a window */
    for (const Window *window = elements->window; window < elements->end; window++) {
        const RowOverflow of_row = overflow_of(line + window->y * bytes_of_row(image), image);
        for (int32_t e = of_row.starts[row->column]; e < of_row.starts[end]; e++) {
            const Overflow one = of_row.list[e];
            const uint32_t place = (uint32_t)one.place, element = place % TILE_SIZE;
            const int8_t *weight = elements[element].weight + at + one.weights;
            int32_t *sum = sums[element][i + place / TILE_SIZE - row->column];
            const Vector overflow = OF_VECTORS(set1_epi32)(one.bytes), bias = OF_VECTORS(set1_epi32)(biases[element]);
            for (int j = 0; j < OUTPUTS; j += LANES) {
                const Vector levels = load(weight + DEPTH * j);
                Vector more = {0}, less = {0}; /* not the sum itself: the next overflow waits for it */
                ADD_PRODUCTS(more, overflow, levels);
                ADD_PRODUCTS(less, bias, levels);
                more = OF_VECTORS(add_epi32)(load(sum + j), OF_VECTORS(sub_epi32)(more, less));
                store(sum + j, more);
            }
        }
        at += (int64_t)window->steps * DEPTH * OUTPUTS;
    }
}

/* The same for `count` rows. */
INLINE void add_listed_overflow(const Image *image, const Row *row, int count, const Block *elements, const int32_t *biases,
                         int32_t sums[TILE_SIZE][ROWS][OUTPUTS])
{
    for (int i = 0, length; i < count; i += length) {
        int64_t left = image->tiles - row[i].column;
        length = left < count - i ? (int)left : count - i;
        add_overflow_of_line(image, row + i, row[i].column + length, elements, biases, i, sums);
    }
}

/* Add the products of all overflow of `count` rows to their sums; `codes` are the rows'. */
INLINE void add_dense_overflow(int count, const Image *image, const uint8_t *const *codes, const Block *elements,
                      int32_t sums[TILE_SIZE][ROWS][OUTPUTS])
{
    const uint8_t *dense[ROWS];
    for (int i = 0; i < ROWS; i++) dense[i] = codes[i] + bytes_of_codes(image);
    for (int k = 0; k < elements_of(image); k++) {
        int32_t more[ROWS][OUTPUTS] __attribute__((aligned(64)));
        multiply_micro_tile(count, 0, dense, bytes_of_row(image), elements[k].weight, elements[k].window, elements[k].end,
                            more);
        for (int i = 0; i < count; i++)
            for (int j = 0; j < OUTPUTS; j++) sums[k][i][j] += more[i][j];
    }
}
#else /* no Winograd tiles */
#define make_dense(...) ((void)0)
#define add_listed_overflow(...) ((void)0)
#define add_dense_overflow(...) ((void)0)
#endif
