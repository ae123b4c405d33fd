/* A quantized layer at one size of its input, and the blocks of outputs and the rows of pixels of which it is computed. */
#pragma once

#include <stdint.h>

#include "epilogue.h"
#include "image.h"
#include "panel.h"
#include "products.h"

/* What does not change from call to call. Per block of OUTPUTS channels: `weight` (steps, OUTPUTS, DEPTH), or NULL where calls
   unpack their blocks from `packed`, which is NULL otherwise; and windows from window_starts[block] to
   window_starts[block + 1]; `level_sum` and `scale` hold a number for every output of every block. With `is_signed`, codes
   are signed. For Winograd tiles, the blocks of all elements follow each other for the same channels; those of the first
   phase come before those of the second. */
typedef struct {
    const int8_t *weight;
    const Window *windows;
    const int32_t *window_starts, *level_sum;
    const float *scale;
    int64_t steps, is_signed;
    const Packed *packed;
} Weights;

/* What is added to the output: as large as that, channels_last, or one number for each channel of an image, the same for
   all its pixels. NULL for neither. Of gated outputs, it is added before the gates are applied: a pixel has the numbers for
   all channels, then those for all gates. */
typedef struct {
    const float *numbers;
    int64_t is_per_image;
} Addend;

/* A quantized layer at one size of its input. `bias` may be NULL. `scale`, `zero_point` and `qmax`, the largest code, are
   those of the input; a scale of zero asks for the ones of each input's own range. At most `threads` unpack blocks: so many
   have memory for them (`code_bytes`). */
typedef struct {
    const Weights *weights;
    const float *bias;
    Image image;
    Output output;
    float scale;
    int32_t zero_point, qmax;
    int64_t threads;
} Layer;

/* The codes that are kept at once, in bytes: those of larger images would not fit the cache, and their memory would be as
   large as the output's. A variable for tests. */
int64_t part_bytes = 1 << 23;

/* What is computed of the codes that are kept at once: `lines` of the output (of each phase) of some images. */
typedef struct {
    int64_t first_image, images, first_line, lines;
} Part;

/* Lines of the output of an image (of each phase), and the rows of codes that one of them is computed from. */
INLINE int64_t lines_of(const Layer *layer) { return layer->output.out_height / phases_of(&layer->image); }
INLINE int64_t height_of_kernel(const Layer *layer)
{
    return layer->image.height + 2 * layer->image.border_y - (lines_of(layer) - 1) * layer->output.stride_y;
}

/* The rows of codes of a part. */
INLINE Rows rows_of_part(const Layer *layer, const Part *part)
{
    const int64_t stride = layer->output.stride_y;
    return (Rows){part->first_image, part->images, part->first_line * stride,
                  (part->lines - 1) * stride + height_of_kernel(layer)};
}

/* The first part of a layer, and the largest: all images, or as many whole ones as may be kept, or as many lines of one. */
INLINE Part first_part(const Layer *layer)
{
    const int64_t row = bytes_of_row(&layer->image), rows = layer->image.height + 2 * layer->image.border_y;
    if (rows * row <= part_bytes) return (Part){0, min(layer->image.images, part_bytes / (rows * row)), 0, lines_of(layer)};
    const int64_t lines = (part_bytes / row - height_of_kernel(layer)) / layer->output.stride_y + 1;
    return (Part){0, 1, 0, min(max(lines, 1), lines_of(layer))};
}

/* Bytes that the codes of a layer take. */
INLINE int64_t bytes_of_part(const Layer *layer)
{
    const Part part = first_part(layer);
    return part.images * rows_of_part(layer, &part).rows * bytes_of_row(&layer->image);
}

/* Bytes of the blocks that a thread unpacks at once: with gates, those of both halves. */
INLINE int64_t bytes_of_panels(const Layer *layer)
{
    const Weights *weights = layer->weights;
    if (!weights->packed) return 0;
    return (layer->output.is_gated ? 2 : 1) * bytes_of_panel(weights->packed, weights->steps);
}

/* Bytes that the codes of a layer take, and after them the blocks that each thread unpacks. */
int64_t code_bytes(const Layer *layer)
{
    const int64_t codes = bytes_of_part(layer);
    return layer->weights->packed ? round_up(codes, LINE) + layer->threads * bytes_of_panels(layer) : codes;
}

/* What a block of OUTPUTS channels is multiplied by, and what becomes of its sums. */
typedef struct {
    const int8_t *weight;
    const Window *window, *end;
    Epilogue epilogue;
} Block;

INLINE Block block_of(const Weights *weights, int64_t index, float input_scale, int zero_point, const float *bias,
                      int64_t count)
{
    return (Block){weights->weight ? weights->weight + index * weights->steps * DEPTH * OUTPUTS : NULL,
                   weights->windows + weights->window_starts[index], weights->windows + weights->window_starts[index + 1],
                   epilogue_of(zero_point, weights->level_sum + index * OUTPUTS, input_scale,
                               weights->scale + index * OUTPUTS, bias, count)};
}

/* Write the blocks whose products make OUTPUTS channels from `channel` on, and return how many there are: one; with gates
   two; for Winograd tiles one for each element, of which the second has the bias: it is added to both outputs
   (`transform_output`). With `is_dense`, their sums include all overflow, with the elements' own biases. */
INLINE int blocks_of(const Layer *layer, int64_t phase, int64_t channel, float input_scale, int zero_point, int is_dense,
                     Block *blocks)
{
    const Weights *weights = layer->weights;
    const float *bias = layer->bias ? layer->bias + channel : NULL;
    int64_t index = channel / OUTPUTS, outputs = layer->output.out_channels, count = outputs - channel;
    if (layer->image.tiles) {
        const int elements = elements_of(&layer->image);
        index += phase * ((outputs + OUTPUTS - 1) / OUTPUTS);
        for (int k = 0; k < elements; k++) {
            const Element element = element_of(&layer->image, k, zero_point, layer->qmax);
            const int zero = is_dense ? element.zero + element.bias : element.zero;
            blocks[k] = block_of(weights, index * elements + k, input_scale, zero, k == 1 ? bias : NULL, count);
        }
        return elements;
    }
    blocks[0] = block_of(weights, index, input_scale, zero_point, bias, count);
    if (!layer->output.is_gated) return 1;
    blocks[1] = block_of(weights, index + outputs / OUTPUTS, input_scale, zero_point, bias ? bias + outputs : NULL, count);
    return 2;
}

/* Unpack to `panels` what `blocks_of` wrote of `phase` and `channel`, `count` blocks. */
INLINE void unpack_blocks(const Layer *layer, int64_t phase, int64_t channel, int count, int8_t *panels, Block *blocks)
{
    const Weights *weights = layer->weights;
    const int64_t outputs = layer->output.out_channels, index = channel / OUTPUTS + phase * ((outputs + OUTPUTS - 1) / OUTPUTS);
    const int64_t first = layer->image.tiles ? index * count : index, size = weights->steps * DEPTH * OUTPUTS;
    unpack_panel(weights->packed, phase, channel, first, weights->steps, panels);
    for (int k = 0; k < count; k++) blocks[k].weight = panels + k * size;
    if (!layer->output.is_gated) return;
    int8_t *other = panels + bytes_of_panel(weights->packed, weights->steps);
    unpack_panel(weights->packed, phase, channel + outputs, first + outputs / OUTPUTS, weights->steps, other);
    blocks[1].weight = other;
}

/* A row of a micro-tile: its codes, its image, its column, and the first pixel of its output. Of a Winograd tile, which has
   two outputs, only one is real where it `is_single`: the last one of an odd number of pixels. */
typedef struct {
    const uint8_t *codes;
    int64_t image, column, pixel;
    int is_single;
} Row;

/* Find `count` rows, the first of which is the `first` of all of a part and phase; `columns` are in a line of the output,
   and `codes` are the part's. */
INLINE void find_rows(const uint8_t *codes, const Layer *layer, const Part *part, int64_t phase, int64_t columns,
                      int64_t first, int count, Row rows[ROWS])
{
    const Image *image = &layer->image;
    const Output *output = &layer->output;
    const int64_t row_bytes = bytes_of_row(image), pixels = image->tiles ? 2 : 1;
    const int64_t image_bytes = rows_of_part(layer, part).rows * row_bytes;
    const int64_t column_bytes = image->padded_channels * (image->tiles ? elements_of(image) : output->stride_x);
    const int64_t phases = phases_of(image), lines = lines_of(layer);
    int64_t column = first % columns, n = first / columns / part->lines, y = first / columns % part->lines;
    for (int i = 0; i < ROWS; i++) { /* counted on: divisions for each row would take as long as a short product */
        const int64_t line = (part->first_image + n) * lines + part->first_line + y;
        rows[i] = (Row){codes + n * image_bytes + y * output->stride_y * row_bytes + column * column_bytes,
                        part->first_image + n, column,
                        (line * phases + phase) * output->out_width + column * pixels, column * pixels + 1 == output->out_width};
        if (i + 1 >= count || ++column < columns) continue;
        column = 0;
        if (++y == part->lines) y = 0, n++;
    }
}
