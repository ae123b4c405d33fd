/* Products of 8-bit codes and int8 levels with exact sums, on CPUs that have AVX2 and no VNNI. Compiled on first use, by
   native.py.

   vpmaddubsw multiplies bytes and adds neighbours in 16 bits, vpmaddwd widens such sums to 32 bits. Two ways to stay
   inside 16 bits (avx2.py chooses):
   - narrow levels: many steps are added in 16 bits before they are widened, in windows that cannot overflow. The time of
     vpmaddwd is saved: half of what the multiplier does.
   - levels of 8 bits: the codes are shifted to -128..127. Of two products of magnitudes up to 128 and 127, the sum fits;
     each is widened. */
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#define ROWS 6      /* output pixels of a tile: with 2 vectors of 8 outputs, their 12 sums fill the 16 registers */
#define OUTPUTS 16  /* output channels of a tile, and of a block of weights */
#define DEPTH 4     /* inputs of a step: 4 codes are broadcast, and multiplied by 4 weights of each output */

/* A dense channels_last image, and the same in codes, with a border and with channels up to a multiple of DEPTH. */
typedef struct {
    int64_t images, height, width, channels, border_y, border_x, padded_channels;
} Image;

/* `out_height` x `out_width` output pixels, whose first inputs are `stride_y`, `stride_x` pixels apart. */
typedef struct {
    int64_t out_height, out_width, out_channels, stride_y, stride_x;
} Output;

/* `steps` inputs, times DEPTH, that are consecutive in memory, from row `y`, byte `x` of a pixel's receptive field on:
   their sums of products fit 16 bits. */
typedef struct {
    int32_t y, x, steps;
} Window;

#define INLINE static inline __attribute__((always_inline))

/* sum += x, in place: as plain intrinsics, GCC 12 spills the sums to the stack or moves each of them around. */
#define ADD_EPI16(sum, x) __asm__ volatile("vpaddw %1, %0, %0" : "+x"(sum) : "x"(x))
#define ADD_EPI32(sum, x) __asm__ volatile("vpaddd %1, %0, %0" : "+x"(sum) : "x"(x))

/* sums[i][o] = the products of row i and output o, summed over all windows. Codes are unsigned, levels narrow. */
INLINE void multiply_narrow(int rows, const uint8_t *const *codes, int64_t row_bytes, const int8_t *weight,
                            const Window *window, const Window *end, int32_t sums[ROWS][OUTPUTS])
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i narrow[ROWS][2];
    memset(sums, 0, sizeof(int32_t) * ROWS * OUTPUTS);
    for (; window < end; window++) {
        int64_t at = window->y * row_bytes + window->x, stop = at + (int64_t)window->steps * DEPTH;
        for (int i = 0; i < rows; i++) narrow[i][0] = narrow[i][1] = _mm256_setzero_si256();
        for (; at < stop; at += DEPTH, weight += DEPTH * OUTPUTS) {
            __m256i weight0 = _mm256_load_si256((const __m256i *)weight);
            __m256i weight1 = _mm256_load_si256((const __m256i *)weight + 1);
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++) {
                __m256i code = _mm256_set1_epi32(*(const int32_t *)(codes[i] + at));
                ADD_EPI16(narrow[i][0], _mm256_maddubs_epi16(code, weight0));
                ADD_EPI16(narrow[i][1], _mm256_maddubs_epi16(code, weight1));
            }
        }
#pragma GCC unroll 6
        for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
            for (int j = 0; j < 2; j++) {
                __m256i *wide = (__m256i *)sums[i] + j;
                _mm256_store_si256(wide, _mm256_add_epi32(*wide, _mm256_madd_epi16(narrow[i][j], ones)));
            }
    }
}

/* The same for codes that are signed: the sign of a code moves to the level, as vpmaddubsw wants one factor unsigned. */
INLINE void multiply_wide(int rows, const uint8_t *const *codes, int64_t row_bytes, const int8_t *weight,
                          const Window *window, const Window *end, int32_t sums[ROWS][OUTPUTS])
{
    const __m256i ones = _mm256_set1_epi16(1);
    __m256i wide[ROWS][2];
    for (int i = 0; i < rows; i++) wide[i][0] = wide[i][1] = _mm256_setzero_si256();
    for (; window < end; window++) {
        int64_t at = window->y * row_bytes + window->x, stop = at + (int64_t)window->steps * DEPTH;
        for (; at < stop; at += DEPTH, weight += DEPTH * OUTPUTS) {
#pragma GCC unroll 6
            for (int i = 0; i < rows; i++) {
                __m256i code = _mm256_set1_epi32(*(const int32_t *)(codes[i] + at)), size = _mm256_abs_epi8(code);
#pragma GCC unroll 2
                for (int j = 0; j < 2; j++) {
                    __m256i level = _mm256_sign_epi8(_mm256_load_si256((const __m256i *)weight + j), code);
                    ADD_EPI32(wide[i][j], _mm256_madd_epi16(_mm256_maddubs_epi16(size, level), ones));
                }
            }
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2; j++) _mm256_store_si256((__m256i *)sums[i] + j, wide[i][j]);
}

/* out = (sums - zero_point * level_sum) * input_scale * scale + bias, for `count` outputs of a row; `bias` may be NULL. */
INLINE void dequantize_row(const int32_t *sums, int zero_point, const int32_t *level_sum, float input_scale,
                           const float *scale, const float *bias, int64_t count, float *out)
{
    float row[OUTPUTS], row_bias[OUTPUTS] = {0};
    if (bias && count < OUTPUTS) memcpy(row_bias, bias, sizeof(float) * count);
    const float *added = bias && count == OUTPUTS ? bias : row_bias;
    float *target = count < OUTPUTS ? row : out;
    for (int j = 0; j < OUTPUTS; j += 8) {
        __m256i level = _mm256_loadu_si256((const __m256i *)(level_sum + j));
        __m256i zero = _mm256_mullo_epi32(_mm256_set1_epi32(zero_point), level);
        __m256i centred = _mm256_sub_epi32(_mm256_load_si256((const __m256i *)(sums + j)), zero);
        __m256 factor = _mm256_mul_ps(_mm256_set1_ps(input_scale), _mm256_loadu_ps(scale + j));
        _mm256_storeu_ps(target + j, _mm256_fmadd_ps(_mm256_cvtepi32_ps(centred), factor, _mm256_loadu_ps(added + j)));
    }
    if (count < OUTPUTS) memcpy(out, row, sizeof(float) * count);
}

/* Convolution, or matrix product where an image is one row of pixels. `codes` is what `quantize` wrote. Per block of
   OUTPUTS channels: `weight` (steps, OUTPUTS, DEPTH), windows from window_starts[block] to window_starts[block + 1];
   `level_sum` and `scale` hold a number for every output of every block. `out` is channels_last. */
void multiply(const uint8_t *codes, int is_signed, Image image, Output output, const int8_t *weight, int64_t steps,
              const Window *windows, const int32_t *window_starts, float input_scale, int zero_point,
              const int32_t *level_sum, const float *scale, const float *bias, float *out)
{
    int64_t row_bytes = (image.width + 2 * image.border_x) * image.padded_channels;
    int64_t image_bytes = (image.height + 2 * image.border_y) * row_bytes;
    int64_t pixels = image.images * output.out_height * output.out_width, tiles = (pixels + ROWS - 1) / ROWS;
    int64_t blocks = (output.out_channels + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for collapse(2) schedule(static)
    for (int64_t block = 0; block < blocks; block++)
        for (int64_t tile = 0; tile < tiles; tile++) {
            int32_t sums[ROWS][OUTPUTS] __attribute__((aligned(32)));
            const uint8_t *rows[ROWS];
            int64_t first = tile * ROWS, channel = block * OUTPUTS;
            int count = pixels - first < ROWS ? (int)(pixels - first) : ROWS;
            for (int i = 0; i < ROWS; i++) {
                int64_t pixel = first + (i < count ? i : count - 1), line = pixel / output.out_width;
                rows[i] = codes + line / output.out_height * image_bytes
                          + line % output.out_height * output.stride_y * row_bytes
                          + pixel % output.out_width * output.stride_x * image.padded_channels;
            }
            const int8_t *block_weight = weight + block * steps * DEPTH * OUTPUTS;
            const Window *window = windows + window_starts[block], *end = windows + window_starts[block + 1];
            if (is_signed) multiply_wide(ROWS, rows, row_bytes, block_weight, window, end, sums);
            else if (count <= 2) multiply_narrow(2, rows, row_bytes, block_weight, window, end, sums);
            else multiply_narrow(ROWS, rows, row_bytes, block_weight, window, end, sums);
            int64_t channels = output.out_channels - channel < OUTPUTS ? output.out_channels - channel : OUTPUTS;
            for (int i = 0; i < count; i++)
                dequantize_row(sums[i], zero_point, level_sum + channel, input_scale, scale + channel,
                               bias ? bias + channel : NULL, channels, out + (first + i) * output.out_channels + channel);
        }
}

/* codes = round(clamp(x * inverse_scale, -zero_point, qmax - zero_point)) + zero_point, ties to even; a NaN becomes 0. */
INLINE void quantize_pixel(const float *x, int64_t channels, float inverse_scale, int zero_point, int qmax,
                           int64_t flip, uint8_t *codes)
{
    const __m256 factor = _mm256_set1_ps(inverse_scale);
    const __m256 low = _mm256_set1_ps((float)-zero_point), high = _mm256_set1_ps((float)(qmax - zero_point));
    const __m256i shift = _mm256_set1_epi32(zero_point);
    for (int64_t c = 0; c < channels; c += 8) {
        float rest[8] = {0};
        int64_t count = channels - c < 8 ? channels - c : 8;
        if (count < 8) memcpy(rest, x + c, sizeof(float) * count);
        __m256 value = _mm256_mul_ps(_mm256_loadu_ps(count < 8 ? rest : x + c), factor);
        value = _mm256_min_ps(_mm256_max_ps(value, low), high); /* of a NaN and a number, the second one */
        __m256i code = _mm256_add_epi32(_mm256_cvtps_epi32(value), shift);
        __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
        int64_t bytes = _mm_cvtsi128_si64(_mm_packus_epi16(narrow, narrow)) ^ flip;
        memcpy(codes + c, &bytes, count);
    }
}

/* Write `x` in codes, its border in the code of zero; surplus channels have no weight, so any code will do. Codes that
   are to be signed are written less 128: a flip of the first bit. */
void quantize(const float *x, Image image, float inverse_scale, int zero_point, int qmax, int is_signed, uint8_t *codes)
{
    const int64_t flip = is_signed ? (int64_t)0x8080808080808080u : 0;
    const int code_of_zero = is_signed ? zero_point ^ 0x80 : zero_point;
    int64_t width = image.width + 2 * image.border_x, height = image.height + 2 * image.border_y;
    int64_t border = image.border_x * image.padded_channels;
#pragma omp parallel for schedule(static) if (image.images * height > 1)
    for (int64_t line = 0; line < image.images * height; line++) {
        int64_t y = line % height - image.border_y;
        uint8_t *row = codes + line * width * image.padded_channels;
        if (y < 0 || y >= image.height) {
            memset(row, code_of_zero, width * image.padded_channels);
            continue;
        }
        const float *source = x + (line / height * image.height + y) * image.width * image.channels;
        memset(row, code_of_zero, border);
        row += border;
        for (int64_t i = 0; i < image.width; i++, row += image.padded_channels, source += image.channels) {
            quantize_pixel(source, image.channels, inverse_scale, zero_point, qmax, flip, row);
            memset(row + image.channels, 0, image.padded_channels - image.channels);
        }
        memset(row, code_of_zero, border);
    }
}

/* Cut the steps of every block into windows that cannot overflow: of any 16-bit sum, neither the positive nor the
   negative levels add up to more than `limit`. A window also ends with a `segment`, the steps whose inputs are
   consecutive in memory; segment k starts at row `segments[k].y`, byte `segments[k].x`. Return how many windows were
   written; `windows` has room for one a step. A single step must fit the limit. */
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
