/* An image in numbers and in codes: its sizes, and where its rows of codes and what belongs to them lie in memory. */
#pragma once

#include <stdint.h>

#define CODE_MAX 255
#define DEPTH 4 /* inputs of a step: 4 codes are broadcast, and multiplied by 4 weights of each output */
#define TILE_SIZE 4 /* elements of a Winograd tile: 2 outputs + 3 weights - 1 */
#define SPARE_ENTRIES 16 /* of overflow: no fewer than the steps of a vector */
#define LINE 64 /* bytes of the cache */

/* A dense channels_last image, and the same in codes, with a border and with channels up to a multiple of DEPTH.

   With `tiles`, a row of codes is kept as so many transformed input tiles of Winograd's minimal filtering F(2, 3)
   (winograd.h): TILE_SIZE elements a tile, sums and differences of two codes. An element has 9 bits. What 8 of them hold is
   kept as a code; the rest, which few elements have, is its overflow, and multiplied, too.

   What `is_doubled` stands for one of twice the height and width, in which each pixel is there four times: nearest
   upsampling. It has a tile for each of its own pixels, whose third element, the difference of equals, is left out. */
typedef struct {
    int64_t images, height, width, channels, border_y, border_x, padded_channels, tiles, is_doubled;
} Image;

/* Elements of a tile, rows of pixels with a kernel of their own, and pixels of a row of codes as they are transformed. */
static inline int elements_of(const Image *image) { return image->is_doubled ? TILE_SIZE - 1 : TILE_SIZE; }
static inline int phases_of(const Image *image) { return image->is_doubled ? 2 : 1; }
static inline int64_t pixels_of_tiles(const Image *image) { return (image->is_doubled ? 1 : 2) * image->tiles + 2; }

/* Of an element plus `offset`, 0 to 255 is kept. The overflow, plus `bias`, is 0 to 255, too. `zero` is what is kept of codes
   that all stand for zero. */
typedef struct {
    int offset, bias, zero;
} Element;

/* Element `k`. A difference, of -255 to 255, is kept from -128 to 127, so that -127 to 128 overflows. A sum, of 0 to 510, is
   kept from 0 or from 128 on: as that of zeros, near which most are, is farther from the ends. Codes of 7 bits all fit. In
   place of the sum of equals, a doubled image has the code itself. */
static inline Element element_of(const Image *image, int k, int zero_point, int qmax)
{
    if (k != 1) return (Element){128, 127, 128};
    if (image->is_doubled) return (Element){0, 0, zero_point};
    const int start = qmax > CODE_MAX / 2 && 2 * zero_point >= 192 ? 128 : 0;
    return (Element){-start, start, 2 * zero_point - start};
}

/* The overflow of DEPTH neighbouring channels of an element, plus its `bias`, in a byte each; `place` is TILE_SIZE * tile +
   element; `weights`, how far their weights are from the first ones of the same row of the kernel. */
typedef struct {
    int32_t bytes, place, weights;
} Overflow;

/* The overflow of a row of codes. That of tile t is list[starts[t]] to list[starts[t + 1]]; that of all elements lies at
   `dense` as the codes do at the row's start, where starts[tiles] is DENSE because the list was too short. */
typedef struct {
    uint8_t *dense;
    int32_t *starts;
    Overflow *list;
} RowOverflow;
#define DENSE -1

/* Entries of a row's list: an eighth of its steps. A listed step takes several times as long as one of
   codes, and the dense form doubles the products. */
static inline int64_t overflow_capacity(int64_t row_codes) { return row_codes / (8 * DEPTH) + SPARE_ENTRIES; }

/* Bytes of a row of codes, without and with its overflow. */
static inline int64_t bytes_of_codes(const Image *image)
{
    return image->padded_channels * (image->tiles ? elements_of(image) * image->tiles : image->width + 2 * image->border_x);
}
static inline int64_t bytes_of_row(const Image *image)
{
    int64_t codes = bytes_of_codes(image), starts = (image->tiles + 1) * (int64_t)sizeof(int32_t);
    if (!image->tiles) return codes;
    return (2 * codes + starts + overflow_capacity(codes) * (int64_t)sizeof(Overflow) + LINE - 1) / LINE * LINE;
}

/* The rows of codes that are kept at once: so many of each of some images, the border's among them. */
typedef struct {
    int64_t first_image, images, first_row, rows;
} Rows;

/* The overflow of the row of codes that starts at `row`. */
static inline RowOverflow overflow_of(const uint8_t *row, const Image *image)
{
    uint8_t *dense = (uint8_t *)row + bytes_of_codes(image);
    int32_t *starts = (int32_t *)(dense + bytes_of_codes(image));
    return (RowOverflow){dense, starts, (Overflow *)(starts + image->tiles + 1)};
}

/* `out_height` x `out_width` output pixels, whose first inputs are `stride_y`, `stride_x` pixels apart. With `is_gated`,
   the weights have twice as many outputs: the GELU of the second half multiplies the first. Blocks are whole then. With
   `has_relu`, what is less than zero after bias and addend is written as zero. */
typedef struct {
    int64_t out_height, out_width, out_channels, stride_y, stride_x, is_gated, has_relu;
} Output;
