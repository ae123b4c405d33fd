/* Winograd's minimal filtering F(2, 3) (Lavin and Gray 2016, arXiv:1509.09308, 4.1): two outputs of a kernel three pixels
   wide from four products, not six.

   A tile d of four inputs and a filter g of three weights make m = (d0 - d2) g0, (d1 + d2) (g0 + g1 + g2) / 2,
   (d2 - d1) (g0 - g1 + g2) / 2 and (d1 - d3) g2. The outputs are m0 + m1 + m2 and m1 - m2 - m3. The factors on the left are
   the transformed input tile, here; those on the right the transformed filter (filters.h).

   In an image that is doubled by nearest upsampling, d1 = d2 in the tile of a pixel and its neighbours x: three products,
   of (x0 - x1) g0, x1 (g0 + g1 + g2) and (x1 - x2) g2, make both outputs, m0 + m1 and m1 - m2. */
#pragma once

#include <stdint.h>

#include "image.h"
#include "layer.h"
#include "overflow.h"
#include "vectors.h"

#if VNNI
/* The first bit of each byte flipped: unsigned bytes less 128, signed. */
INLINE Vector flip(Vector bytes) { return bytes ^ OF_VECTORS(set1_epi8)((char)128); }

/* Two codes' difference plus 128, cut to 8 bits, and its last 8 bits. */
INLINE void subtract(Vector a, Vector b, Vector *kept, Vector *last)
{
    *kept = flip(OF_VECTORS(subs_epi8)(flip(a), flip(b)));
    *last = OF_VECTORS(sub_epi8)(a, b);
}

/* Two codes' sum less `start`, cut to 8 bits, and its last 8 bits. */
INLINE void add(Vector a, Vector b, int start, Vector *kept, Vector *last)
{
    *kept = start ? flip(OF_VECTORS(adds_epi8)(flip(a), flip(b))) : OF_VECTORS(adds_epu8)(a, b);
    *last = OF_VECTORS(add_epi8)(a, b);
}

/* The elements of a tile of codes: what is kept of each, and their last 8 bits. */
INLINE void transform_tile(const Vector *code, int is_doubled, int start, Vector *kept, Vector *last)
{
    if (is_doubled) {
        subtract(code[0], code[1], kept, last);
        kept[1] = last[1] = code[1];
        subtract(code[1], code[2], kept + 2, last + 2);
        return;
    }
    subtract(code[0], code[2], kept, last);
    add(code[1], code[2], start, kept + 1, last + 1);
    subtract(code[2], code[1], kept + 2, last + 2);
    subtract(code[1], code[3], kept + 3, last + 3);
}

/* `transform_input` of an image that is doubled, or not. */
INLINE int transform_row(uint8_t *row, const Image *image, const Element *elements, const int is_doubled)
{
    const int64_t channels = image->padded_channels, capacity = overflow_capacity(bytes_of_codes(image));
    const int size = elements_of(image);
    const uint8_t *codes = row + (size * image->tiles - pixels_of_tiles(image)) * channels;
    const RowOverflow of_row = overflow_of(row, image);
    int64_t listed = 0;
    int is_dense = 0;
    for (int64_t tile = 0; tile < image->tiles; tile++, codes += (is_doubled ? 1 : 2) * channels, row += size * channels) {
        if (!is_dense) of_row.starts[tile] = (int32_t)listed;
        for (int64_t c = 0; c < channels; c += VECTOR_BYTES) {
            const int64_t count = channels - c < VECTOR_BYTES ? channels - c : VECTOR_BYTES;
            const unsigned real = (1u << count / DEPTH) - 1;
            Vector code[TILE_SIZE], kept[TILE_SIZE], last[TILE_SIZE];
            for (int k = 0; k < size; k++) code[k] = load_bytes(codes + k * channels + c, count);
            transform_tile(code, is_doubled, elements[1].bias, kept, last);
            for (int k = 0; k < size; k++) {
                store_bytes(row + k * channels + c, kept[k], count);
                /* The element, plus its offset, less what is kept of it, plus its bias: 8 bits hold that. */
                const Vector more = OF_VECTORS(set1_epi8)((char)(elements[k].offset + elements[k].bias));
                const Vector bytes = OF_VECTORS(add_epi8)(OF_VECTORS(sub_epi8)(last[k], kept[k]), more);
                const Vector none = OF_VECTORS(set1_epi8)((char)elements[k].bias);
                const unsigned overflows = differing_steps(bytes, none) & real;
                if (!overflows) continue;
                if (!is_dense && listed + VECTOR_BYTES / DEPTH > capacity)
                    spread_overflow(&of_row, listed, image, elements), is_dense = 1;
                if (is_dense) store_bytes(of_row.dense + (size * tile + k) * channels + c, bytes, count);
                else listed += list_overflow(bytes, overflows, TILE_SIZE * tile + k, c, of_row.list + listed);
            }
        }
    }
    if (!is_dense) of_row.starts[image->tiles] = (int32_t)listed;
    return is_dense;
}

/* Put the transformed tiles of a row in place of the codes, which lie at the end of their bytes: of each channel, all codes
   are read before an element is written there. List the overflow, or return 1 where it is dense. */
static int transform_input(uint8_t *row, const Image *image, const Element *elements)
{
    return image->is_doubled ? transform_row(row, image, elements, 1) : transform_row(row, image, elements, 0);
}
#else /* no Winograd tiles */
#define transform_input(row, image, elements) ((void)(elements), 0)
#endif

/* Write both outputs of the tile in row `i` of all elements' sums, each finished; `second` is NULL for a single one. */
INLINE void transform_output(int32_t sums[TILE_SIZE][ROWS][OUTPUTS], int i, int is_doubled, const Block *elements,
                             Finish of_first, Finish of_second, int64_t count, float *first, float *second)
{
    for (int j = 0; j < OUTPUTS; j += LANES) {
        Numbers element[TILE_SIZE];
        for (int k = 0; k < TILE_SIZE - is_doubled; k++) element[k] = dequantize(sums[k][i], &elements[k].epilogue, j);
        Numbers sum = OF_VECTORS(add_ps)(element[0], element[1]), difference = OF_VECTORS(sub_ps)(element[1], element[2]);
        if (!is_doubled) {
            sum = OF_VECTORS(add_ps)(sum, element[2]);
            difference = OF_VECTORS(sub_ps)(difference, element[3]);
        }
        write_outputs(sum, of_first, j, count, first);
        if (second) write_outputs(difference, of_second, j, count, second);
    }
}
