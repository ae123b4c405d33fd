/* An image in numbers and in codes: its sizes, and where its rows of codes and what belongs to them lie in memory. */
#pragma once

#include <stdint.h>

#define CODE_MAX 255
#define DEPTH 4 /* inputs of a step: 4 codes are broadcast, and multiplied by 4 weights of each output */
#define TERMS 4 /* products that make a pair of pixels */
#define SPARE_EXCESSES 16 /* no fewer than the steps of a vector */
#define LINE 64 /* bytes of the cache */

/* A dense channels_last image, and the same in codes, with a border and with channels up to a multiple of DEPTH.

   With `pairs`, a row of codes is kept for as many pairs of neighbouring output pixels of a kernel three pixels wide, in
   the form of Winograd's minimal filtering F(2, 3) (Lavin and Gray 2016, arXiv:1509.09308): TERMS terms a pair, sums and
   differences of two codes, for which TERMS products make both outputs, where there would be six. A term has 9 bits. What
   8 of them hold is kept as a code; the rest, which few terms have, is the term's excess, and multiplied, too. */
typedef struct {
    int64_t images, height, width, channels, border_y, border_x, padded_channels, pairs;
} Image;

/* Of a term plus `offset`, 0 to 255 is kept. What is beyond, plus `bias`, is 0 to 255, too. `zero` is what is kept of codes
   that all stand for zero. */
typedef struct {
    int offset, bias, zero;
} Term;

/* Term `k`. A difference, of -255 to 255, is kept from -128 to 127, so that -127 to 128 is beyond. A sum, of 0 to 510, is
   kept from 0 or from 128 on: as that of zeros, near which most are, is farther from the ends. Codes of 7 bits all fit. */
static inline Term term_of(int k, int zero_point, int qmax)
{
    if (k != 1) return (Term){128, 127, 128};
    const int start = qmax > CODE_MAX / 2 && 2 * zero_point >= 192 ? 128 : 0;
    return (Term){-start, start, 2 * zero_point - start};
}

/* The excesses of DEPTH neighbouring channels of a term, plus its `bias`, in a byte each; `place` is TERMS * pair + term;
   `weights`, how far their weights are from the first ones of the same row of the kernel. */
typedef struct {
    int32_t bytes, place, weights;
} Excess;

/* The excesses of a row of codes. Those of pair p are list[starts[p]] to list[starts[p + 1]]; of all terms, they lie at
   `dense` as the codes do at the row's start, where starts[pairs] is DENSE because the list had no room for them. */
typedef struct {
    uint8_t *dense;
    int32_t *starts;
    Excess *list;
} Excesses;
#define DENSE -1

/* How many excesses a list has room for: an eighth of a row's steps. A listed step takes several times as long as one of
   codes, and the dense form doubles the products. */
static inline int64_t room_for_excesses(int64_t row_codes) { return row_codes / (8 * DEPTH) + SPARE_EXCESSES; }

/* Bytes of a row of codes, without and with its excesses. */
static inline int64_t bytes_of_codes(const Image *image)
{
    return image->padded_channels * (image->pairs ? TERMS * image->pairs : image->width + 2 * image->border_x);
}
static inline int64_t bytes_of_row(const Image *image)
{
    int64_t codes = bytes_of_codes(image), starts = (image->pairs + 1) * (int64_t)sizeof(int32_t);
    if (!image->pairs) return codes;
    return (2 * codes + starts + room_for_excesses(codes) * (int64_t)sizeof(Excess) + LINE - 1) / LINE * LINE;
}

/* Bytes of all rows of codes, the border's among them. */
static inline int64_t bytes_of_image(const Image *image)
{
    return image->images * (image->height + 2 * image->border_y) * bytes_of_row(image);
}

/* The excesses of the row of codes that starts at `row`. */
static inline Excesses excesses_of(const uint8_t *row, const Image *image)
{
    uint8_t *dense = (uint8_t *)row + bytes_of_codes(image);
    int32_t *starts = (int32_t *)(dense + bytes_of_codes(image));
    return (Excesses){dense, starts, (Excess *)(starts + image->pairs + 1)};
}

/* `out_height` x `out_width` output pixels, whose first inputs are `stride_y`, `stride_x` pixels apart. With `is_gated`,
   the weights have twice as many outputs: the GELU of the second half multiplies the first. Blocks are whole then. */
typedef struct {
    int64_t out_height, out_width, out_channels, stride_y, stride_x, is_gated;
} Output;
