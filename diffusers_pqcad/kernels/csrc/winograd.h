/* Winograd's minimal filtering. */
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

/* Put the terms of each pair of a row in place of the codes, which lie at the end of their room: of each channel, all codes
   are read before a term is written there. List the excesses, or return 1 where they are dense. */
static int transform_row(uint8_t *row, const Image *image, const Term *terms)
{
    const int64_t channels = image->padded_channels, room = room_for_excesses(bytes_of_codes(image));
    const uint8_t *codes = row + (2 * image->pairs - 2) * channels;
    const Excesses of_row = excesses_of(row, image);
    int64_t listed = 0;
    int is_dense = 0;
    for (int64_t pair = 0; pair < image->pairs; pair++, codes += 2 * channels, row += TERMS * channels) {
        if (!is_dense) of_row.starts[pair] = (int32_t)listed;
        for (int64_t c = 0; c < channels; c += VECTOR_BYTES) {
            const int64_t count = channels - c < VECTOR_BYTES ? channels - c : VECTOR_BYTES;
            const unsigned real = (1u << count / DEPTH) - 1;
            Vector code[TERMS], kept[TERMS], last[TERMS];
            for (int k = 0; k < TERMS; k++) code[k] = load_bytes(codes + k * channels + c, count);
            subtract(code[0], code[2], kept, last);
            add(code[1], code[2], terms[1].bias, kept + 1, last + 1);
            subtract(code[2], code[1], kept + 2, last + 2);
            subtract(code[1], code[3], kept + 3, last + 3);
            for (int k = 0; k < TERMS; k++) {
                store_bytes(row + k * channels + c, kept[k], count);
                /* The term, plus its offset, less what is kept of it, plus its bias: 8 bits hold that. */
                const Vector more = OF_VECTORS(set1_epi8)((char)(terms[k].offset + terms[k].bias));
                const Vector bytes = OF_VECTORS(add_epi8)(OF_VECTORS(sub_epi8)(last[k], kept[k]), more);
                const Vector none = OF_VECTORS(set1_epi8)((char)terms[k].bias);
                const unsigned exceeds = differing_steps(bytes, none) & real;
                if (!exceeds) continue;
                if (!is_dense && listed + VECTOR_BYTES / DEPTH > room)
                    spread_excesses(&of_row, listed, image, terms), is_dense = 1;
                const int64_t place = TERMS * pair + k;
                if (is_dense) store_bytes(of_row.dense + place * channels + c, bytes, count);
                else listed += list_excesses(bytes, exceeds, place, c, of_row.list + listed);
            }
        }
    }
    if (!is_dense) of_row.starts[image->pairs] = (int32_t)listed;
    return is_dense;
}
#else /* no pairs */
#define transform_row(...) 0
#endif

/* Write both pixels of the pair in row `i` of all terms' sums, each with its addend; `second` is NULL for a single one. */
INLINE void write_pair(int32_t sums[TERMS][ROWS][OUTPUTS], int i, const Block *terms, const float *addend,
                       const float *second_addend, int64_t count, float *first, float *second)
{
    for (int j = 0; j < OUTPUTS; j += LANES) {
        Numbers term[TERMS];
        for (int k = 0; k < TERMS; k++) term[k] = dequantize(sums[k][i], &terms[k].epilogue, j);
        Numbers sum = OF_VECTORS(add_ps)(term[0], term[1]), difference = OF_VECTORS(sub_ps)(term[1], term[2]);
        write_outputs(OF_VECTORS(add_ps)(sum, term[2]), addend, j, count, first);
        if (second) write_outputs(OF_VECTORS(sub_ps)(difference, term[3]), second_addend, j, count, second);
    }
}
