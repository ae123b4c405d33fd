/* What exceeds the 8 bits of a code in pairs: listed, or dense, and its products. */
#pragma once

#include <stdint.h>
#include <string.h>

#include "image.h"
#include "layer.h"
#include "products.h"
#include "vectors.h"

#if VNNI
/* List at `list` those of the excesses of a vector of channels from `channel` on, in `bytes` with their bias, that
   `exceeds` has the steps of; return how many. `place` is their term's. */
INLINE int list_excesses(Vector bytes, unsigned exceeds, int64_t place, int64_t channel, Excess *list)
{
    int32_t steps[VECTOR_BYTES / DEPTH];
    int count = 0;
    store(steps, bytes);
    for (; exceeds; exceeds &= exceeds - 1) {
        const int64_t step = __builtin_ctz(exceeds);
        list[count++] = (Excess){steps[step], (int32_t)place, (int32_t)((channel + step * DEPTH) * OUTPUTS)};
    }
    return count;
}

/* Bring the `listed` excesses of a row into their dense form, among zeros. */
static void spread_excesses(const Excesses *of_row, int64_t listed, const Image *image, const Term *terms)
{
    for (int64_t place = 0; place < TERMS * image->pairs; place++)
        memset(of_row->dense + place * image->padded_channels, terms[place % TERMS].bias, image->padded_channels);
    for (const Excess *one = of_row->list; one < of_row->list + listed; one++)
        memcpy(of_row->dense + one->place * image->padded_channels + one->weights / OUTPUTS, &one->bytes, DEPTH);
    of_row->starts[image->pairs] = DENSE;
}

/* Where the rows of `lines` codes have not all listed their excesses, bring them into the dense form. */
static void make_dense(uint8_t *codes, int64_t lines, const Image *image, const Term *terms)
{
#pragma omp parallel for schedule(static)
    for (int64_t line = 0; line < lines; line++) {
        const Excesses of_row = excesses_of(codes + line * bytes_of_row(image), image);
        const int32_t listed = of_row.starts[image->pairs];
        if (listed != DENSE) spread_excesses(&of_row, listed, image, terms);
    }
}

/* Add the products of listed excesses to the sums of pairs side by side: those of `row` and all up to column `end` of its
   line, the first of which are those of row `i` of the tile. `biases` are the terms', as often as an excess has bytes. */
INLINE void add_excesses_of_line(const Image *image, const Row *row, int64_t end, const Block *terms,
                                 const int32_t *biases, int i, int32_t sums[TERMS][ROWS][OUTPUTS])
{
    const uint8_t *line = row->codes - row->column * TERMS * image->padded_channels;
    int64_t at = 0; /* of the weights of a row of the kernel, which is a window */
    for (const Window *window = terms->window; window < terms->end; window++) {
        const Excesses of_row = excesses_of(line + window->y * bytes_of_row(image), image);
        for (int32_t e = of_row.starts[row->column]; e < of_row.starts[end]; e++) {
            const Excess one = of_row.list[e];
            const uint32_t place = (uint32_t)one.place, term = place % TERMS;
            const int8_t *weight = terms[term].weight + at + one.weights;
            int32_t *sum = sums[term][i + place / TERMS - row->column];
            const Vector excess = OF_VECTORS(set1_epi32)(one.bytes), bias = OF_VECTORS(set1_epi32)(biases[term]);
            for (int j = 0; j < OUTPUTS; j += LANES) {
                const Vector levels = load(weight + DEPTH * j);
                Vector more = {0}, less = {0}; /* not the sum itself: the next excess waits for it */
                ADD_PRODUCTS(more, excess, levels);
                ADD_PRODUCTS(less, bias, levels);
                more = OF_VECTORS(add_epi32)(load(sum + j), OF_VECTORS(sub_epi32)(more, less));
                store(sum + j, more);
            }
        }
        at += (int64_t)window->steps * DEPTH * OUTPUTS;
    }
}

/* The same for `count` rows. */
INLINE void add_excesses(const Image *image, const Row *row, int count, const Block *terms, const int32_t *biases,
                         int32_t sums[TERMS][ROWS][OUTPUTS])
{
    for (int i = 0, length; i < count; i += length) {
        int64_t left = image->pairs - row[i].column;
        length = left < count - i ? (int)left : count - i;
        add_excesses_of_line(image, row + i, row[i].column + length, terms, biases, i, sums);
    }
}

/* Add the products of all excesses of `count` rows to their sums; `codes` are the rows'. */
INLINE void add_dense(int count, const Image *image, const uint8_t *const *codes, const Block *terms,
                      int32_t sums[TERMS][ROWS][OUTPUTS])
{
    const uint8_t *dense[ROWS];
    for (int i = 0; i < ROWS; i++) dense[i] = codes[i] + bytes_of_codes(image);
    for (int k = 0; k < TERMS; k++) {
        int32_t more[ROWS][OUTPUTS] __attribute__((aligned(64)));
        multiply_tile(count, 0, dense, bytes_of_row(image), terms[k].weight, terms[k].window, terms[k].end, more);
        for (int i = 0; i < count; i++)
            for (int j = 0; j < OUTPUTS; j++) sums[k][i][j] += more[i][j];
    }
}
#else /* no pairs */
#define make_dense(...) ((void)0)
#define add_excesses(...) ((void)0)
#define add_dense(...) ((void)0)
#endif
