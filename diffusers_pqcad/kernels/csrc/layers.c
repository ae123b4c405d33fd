/* Products of 8-bit codes and int8 levels with exact sums, on x86 CPUs. Compiled as one unit, for
   one CPU or a kind of CPU (kernels/native): the headers hold the code, one idea each.

   With VNNI, of AVX-512 or AVX (laptops' CPUs), one instruction, vpdpbusd, multiplies bytes and adds four products in 32
   bits. With AVX2 alone, vpmaddubsw multiplies bytes and adds neighbours in 16 bits, vpmaddwd widens such sums to 32 bits.
   Then there are two ways to stay inside 16 bits (kernels/x86 chooses):
   - narrow levels: many steps are added in 16 bits before they are widened, in windows that cannot overflow. The time of
     vpmaddwd is saved: half of what the multiplier does.
   - levels of 8 bits: the codes are shifted to -128..127. Of two products of magnitudes up to 128 and 127, the sum fits;
     each is widened.

   What takes long is dealt out as threads ask for it, for cores may be busy, or of several kinds. */
#include <omp.h>

#include "filters.h"  /* what is done once to a layer's weights */
#include "layout.h"
#include "residual.h" /* what is done in each call, of one layer, some or a block */

/* For kernels/x86: what this code was compiled for. */
int has_vnni(void) { return VNNI; }
int block_outputs(void) { return OUTPUTS; }
int max_threads(void) { return omp_get_max_threads(); }

/* As in kernels/x86, and MIN_SCALE in qparams.py. */
EXPORT_LAYOUT(
    STRUCT(Image), FIELD(Image, images), FIELD(Image, height), FIELD(Image, width), FIELD(Image, channels),
    FIELD(Image, border_y), FIELD(Image, border_x), FIELD(Image, padded_channels), FIELD(Image, tiles), FIELD(Image, is_doubled),
    STRUCT(Rows), FIELD(Rows, first_image), FIELD(Rows, images), FIELD(Rows, first_row), FIELD(Rows, rows),
    STRUCT(Output), FIELD(Output, out_height), FIELD(Output, out_width), FIELD(Output, out_channels),
    FIELD(Output, stride_y), FIELD(Output, stride_x), FIELD(Output, is_gated),
    FIELD(Output, has_relu),
    STRUCT(Affine), FIELD(Affine, gain), FIELD(Affine, shift), FIELD(Affine, has_silu), FIELD(Affine, is_layer_norm),
    FIELD(Affine, eps), FIELD(Affine, mean), FIELD(Affine, inverse_deviation),
    STRUCT(Weights), FIELD(Weights, weight), FIELD(Weights, windows), FIELD(Weights, window_starts),
    FIELD(Weights, level_sum), FIELD(Weights, scale), FIELD(Weights, steps), FIELD(Weights, is_signed),
    FIELD(Weights, packed),
    STRUCT(Filters), FIELD(Filters, levels), FIELD(Filters, scale), FIELD(Filters, outputs), FIELD(Filters, channels),
    FIELD(Filters, height), FIELD(Filters, width), FIELD(Filters, padded_channels), FIELD(Filters, is_winograd),
    FIELD(Filters, is_doubled),
    STRUCT(Packed), FIELD(Packed, codes), FIELD(Packed, group_scale), FIELD(Packed, steps), FIELD(Packed, filters),
    FIELD(Packed, row_bytes), FIELD(Packed, bits), FIELD(Packed, groups), FIELD(Packed, may_overflow),
    STRUCT(Addend), FIELD(Addend, numbers), FIELD(Addend, is_per_image),
    STRUCT(Layer), FIELD(Layer, weights), FIELD(Layer, bias), FIELD(Layer, image), FIELD(Layer, output),
    FIELD(Layer, scale), FIELD(Layer, zero_point), FIELD(Layer, qmax), FIELD(Layer, threads),
    STRUCT(GroupNorm), FIELD(GroupNorm, weight), FIELD(GroupNorm, bias), FIELD(GroupNorm, groups), FIELD(GroupNorm, eps),
    STRUCT(ResidualBlock), FIELD(ResidualBlock, norm1), FIELD(ResidualBlock, norm2), FIELD(ResidualBlock, embedding),
    FIELD(ResidualBlock, conv1), FIELD(ResidualBlock, conv2), FIELD(ResidualBlock, shortcut),
    FIELD(ResidualBlock, embeds_silu),
    CONSTANT(DEPTH), CONSTANT(TILE_SIZE), CONSTANT(UNPACKED_WIDTHS), CONSTANT(MIN_SCALE))
