/* Calls of quantized layers: an input is rounded once, multiplied, and written. */
#pragma once

#include <omp.h>
#include <stdint.h>
#include <string.h>

#include "layer.h"
#include "overflow.h"
#include "profile.h"
#include "rounding.h"
#include "winograd.h"

#define MICRO_TILES 16          /* that follow each other in one block of outputs */
#define UNPACKED_MICRO_TILES 64 /* the same of a block that is unpacked for them: its products take several times as long */

/* Where the blocks that threads unpack lie: after `codes`. */
INLINE int8_t *panels_after(uint8_t *codes, const Layer *layer)
{
    return (int8_t *)codes + round_up(bytes_of_part(layer), LINE);
}

/* Write a part of a convolution, or of a matrix product where an image is one row of pixels, of `codes`, which `quantize`
   wrote with `scale` and `zero_point`, and for which it returned `is_dense`. `panels` is memory for the blocks of each of the
   layer's threads. `out` is channels_last, and whole. */
static void multiply(const uint8_t *codes, const Layer *layer, Part part, float input_scale, int zero_point, int is_dense,
                     int8_t *panels, Addend addend, float *out)
{
    const Image image = layer->image;
    const Output output = layer->output;
    const int is_signed = (int)layer->weights->is_signed;
    int64_t row_bytes = bytes_of_row(&image), columns = image.tiles ? image.tiles : output.out_width;
    const int64_t phases = phases_of(&image);
    int64_t rows = part.images * part.lines * columns, micro_tiles = (rows + ROWS - 1) / ROWS;
    const int64_t run_tiles = layer->weights->packed ? UNPACKED_MICRO_TILES : MICRO_TILES, panel_bytes = bytes_of_panels(layer);
    int64_t blocks = (output.out_channels + OUTPUTS - 1) / OUTPUTS, runs = (micro_tiles + run_tiles - 1) / run_tiles;
    const int threads = layer->weights->packed ? (int)min(layer->threads, omp_get_max_threads()) : omp_get_max_threads();
    int32_t biases[TILE_SIZE];
    for (int k = 0; k < TILE_SIZE; k++) memset(biases + k, element_of(&image, k, zero_point, layer->qmax).bias, sizeof(int32_t));
#pragma omp parallel for schedule(dynamic) if (phases * blocks * runs > 1) num_threads(threads)
    for (int64_t task = 0; task < phases * blocks * runs; task++) {
        /* All outputs of some pixels, then of the next: the codes of large images do not fit the cache, weights do. */
        const int64_t run = task / (blocks * phases), phase = task / blocks % phases;
        int64_t start = run * run_tiles, stop = min(start + run_tiles, micro_tiles);
        int64_t channel = task % blocks * OUTPUTS;
        int64_t channels = output.out_channels - channel < OUTPUTS ? output.out_channels - channel : OUTPUTS;
        Block block[TILE_SIZE];
        const int products = blocks_of(layer, phase, channel, input_scale, zero_point, is_dense, block);
        if (layer->weights->packed)
            unpack_blocks(layer, phase, channel, products, panels + omp_get_thread_num() * panel_bytes, block);
        for (int64_t micro_tile = start; micro_tile < stop; micro_tile++) {
            int32_t sums[TILE_SIZE][ROWS][OUTPUTS] __attribute__((aligned(64)));
            const uint8_t *sources[ROWS];
            Row row[ROWS];
            int count = rows - micro_tile * ROWS < ROWS ? (int)(rows - micro_tile * ROWS) : ROWS;
            find_rows(codes, layer, &part, phase, columns, micro_tile * ROWS, count, row);
            for (int i = 0; i < ROWS; i++) sources[i] = row[i].codes;
            for (int k = 0; k < products; k++)
                multiply_micro_tile(count, is_signed, sources, row_bytes, block[k].weight, block[k].window, block[k].end,
                                    sums[k]);
            if (is_dense) add_dense_overflow(count, &image, sources, block, sums);
            if (image.tiles && !is_dense) add_listed_overflow(&image, row, count, block, biases, sums);
            for (int i = 0; i < count; i++) {
                int64_t at = row[i].pixel * output.out_channels + channel;
                const int64_t width = output.is_gated ? 2 * output.out_channels : output.out_channels;
                int64_t added = (addend.is_per_image ? row[i].image : row[i].pixel) * width + channel;
                const Finish finish = {addend.numbers ? addend.numbers + added : NULL, output.has_relu};
                if (image.tiles) {
                    const int64_t step = addend.is_per_image ? 0 : output.out_channels;
                    const Finish other = {finish.numbers ? finish.numbers + step : NULL, output.has_relu};
                    float *second = row[i].is_single ? NULL : out + at + output.out_channels;
                    transform_output(sums, i, (int)image.is_doubled, block, finish, other, channels, out + at, second);
                    continue;
                }
                dequantize_row(sums[0][i], &block[0].epilogue, finish, channels, out + at);
                if (!output.is_gated) continue;
                const Finish gate = {addend.numbers ? finish.numbers + output.out_channels : NULL, 0};
                gate_row(sums[1][i], &block[1].epilogue, gate, out + at);
            }
        }
    }
}

/* Whether both layers take the same codes of the same input, part by part. */
INLINE int share_codes(const Layer *a, const Layer *b)
{
    return a->scale == b->scale && a->zero_point == b->zero_point && a->qmax == b->qmax
           && a->weights->is_signed == b->weights->is_signed && !memcmp(&a->image, &b->image, sizeof a->image)
           && a->output.stride_y == b->output.stride_y && a->output.out_height == b->output.out_height;
}

/* Write to `outs` what each of `count` layers that share codes makes of `x`, as `run_layers` does. */
static void run_alike(const float *x, Affine affine, int64_t count, const Layer *const *layers, const Addend *addends,
                      uint8_t *codes, float *const *outs)
{
    const Layer *layer = layers[0];
    const Part first = first_part(layer);
    const int is_signed = (int)layer->weights->is_signed;
    float scale = layer->scale;
    int zero_point = layer->zero_point;
    double started = omp_get_wtime();
    if (scale == 0) choose_range(x, layer->image, affine, layer->qmax, &scale, &zero_point);
    for (int64_t n = 0; n < layer->image.images; n += first.images)
        for (int64_t line = 0; line < lines_of(layer); line += first.lines) {
            const Part part = {n, min(first.images, layer->image.images - n), line, min(first.lines, lines_of(layer) - line)};
            const int is_dense = quantize(x, layer->image, rows_of_part(layer, &part), affine, 1 / scale, zero_point,
                                          layer->qmax, is_signed, codes);
            started = clock_phase(ROUNDING, started);
            for (int64_t i = 0; i < count; i++)
                multiply(codes, layers[i], part, scale, is_signed ? zero_point - SIGNED_OFFSET : zero_point, is_dense,
                         panels_after(codes, layer), addends[i], outs[i]);
            started = clock_phase(PRODUCTS, started);
        }
}

/* Write to `outs` what each of `layers` makes of `x`, dense and channels_last, after `affine`; plus its own of `addends`,
   which may be the output. `codes` holds those of any of the layers (`code_bytes`). */
void run_layers(const float *x, Affine affine, int64_t count, const Layer *const *layers, const Addend *addends,
                uint8_t *codes, float *const *outs)
{
    for (int64_t i = 0, end; i < count; i = end) {
        for (end = i + 1; end < count && share_codes(layers[i], layers[end]);) end++;
        run_alike(x, affine, end - i, layers + i, addends + i, codes, outs + i);
    }
}

static void run_layer(const float *x, Affine affine, const Layer *layer, Addend addend, uint8_t *codes, float *out)
{
    run_layers(x, affine, 1, &layer, &addend, codes, &out);
}
