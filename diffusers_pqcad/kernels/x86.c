/* Products of 8-bit codes and int8 levels with exact sums, on x86 CPUs. Compiled on first use, by native.py, for the CPU
   that it runs on.

   With VNNI, of AVX-512 or AVX (laptops' CPUs), one instruction, vpdpbusd, multiplies bytes and adds four products in 32
   bits. With AVX2 alone, vpmaddubsw multiplies bytes and adds neighbours in 16 bits, vpmaddwd widens such sums to 32 bits.
   Then there are two ways to stay inside 16 bits (x86.py chooses):
   - narrow levels: many steps are added in 16 bits before they are widened, in windows that cannot overflow. The time of
     vpmaddwd is saved: half of what the multiplier does.
   - levels of 8 bits: the codes are shifted to -128..127. Of two products of magnitudes up to 128 and 127, the sum fits;
     each is widened.

   What takes long is dealt out as threads ask for it, for cores may be busy, or of several kinds. */
#include <float.h>
#include <immintrin.h>
#include <omp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined __AVX512VNNI__ || defined __AVXVNNI__
#define VNNI 1
#else
#define VNNI 0
#endif
#ifdef __AVX512VNNI__
#define VECTOR_BYTES 64
#else
#define VECTOR_BYTES 32
#endif

/* A tile of the output is ROWS pixels by OUTPUTS channels, two vectors of sums. These stay in registers, of which there are
   32 with AVX-512 and else 16; images of 4x4 pixels and more are whole tiles of 8. */
#define ROWS (VECTOR_BYTES == 64 ? 8 : 6)
#define LANES (VECTOR_BYTES / 4) /* sums of a vector */
#define OUTPUTS (2 * LANES)
#define TILES 16 /* that follow each other in one block of outputs */
#define MIN_SCALE 1e-12f /* of activations: as in qparams.py */
#define SIGNED_OFFSET 128 /* what signed codes are less */
#define CODE_MAX 255
#define LEVEL_MAX 127
#define DEPTH 4 /* inputs of a step: 4 codes are broadcast, and multiplied by 4 weights of each output */
#define TERMS 4 /* products that make a pair of pixels */
#define SPARE_EXCESSES 16 /* no fewer than the steps of a vector */
#define LINE 64 /* bytes of the cache */

/* For x86.py: what this code was compiled for. */
int has_vnni(void) { return VNNI; }
int block_outputs(void) { return OUTPUTS; }

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

/* `steps` inputs, times DEPTH, that are consecutive in memory, from row `y`, byte `x` of a pixel's receptive field on:
   without VNNI, their sums of products fit 16 bits, or single ones do. */
typedef struct {
    int32_t y, x, steps;
} Window;

#define INLINE static inline __attribute__((always_inline))

/* Vectors of bytes and of numbers. Those with a `count` read zeros beyond it, write nothing there, and take counts beyond the
   vector. Whole ones are moved by intrinsics: of memcpy, GCC keeps the vector on the stack where it is tuned for some CPUs.
   `differing_steps` are the bits of those steps in which two vectors differ. */
#if VECTOR_BYTES == 64
#define OF_VECTORS(name) _mm512_##name
typedef __m512i Vector;
typedef __m512 Numbers;

INLINE Vector load(const void *from) { return _mm512_loadu_si512(from); }
INLINE void store(void *to, Vector vector) { _mm512_storeu_si512(to, vector); }
INLINE uint64_t first_bits(int64_t count) { return count > 63 ? ~0ull : count > 0 ? (1ull << count) - 1 : 0; }
INLINE Vector load_bytes(const uint8_t *from, int64_t count) { return _mm512_maskz_loadu_epi8(first_bits(count), from); }
INLINE void store_bytes(uint8_t *to, Vector bytes, int64_t count)
{
    _mm512_mask_storeu_epi8(to, first_bits(count), bytes);
}
INLINE Numbers load_numbers(const float *from, int64_t count)
{
    return _mm512_maskz_loadu_ps((__mmask16)first_bits(count), from);
}
INLINE void store_numbers(float *to, Numbers numbers, int64_t count)
{
    _mm512_mask_storeu_ps(to, (__mmask16)first_bits(count), numbers);
}
INLINE unsigned differing_steps(Vector a, Vector b) { return _mm512_cmpneq_epi32_mask(a, b); }
#else
#define OF_VECTORS(name) _mm256_##name
typedef __m256i Vector;
typedef __m256 Numbers;

INLINE Vector load(const void *from) { return _mm256_loadu_si256((const __m256i *)from); }
INLINE void store(void *to, Vector vector) { _mm256_storeu_si256((__m256i *)to, vector); }
INLINE Vector load_bytes(const uint8_t *from, int64_t count)
{
    if (count >= VECTOR_BYTES) return load(from);
    uint8_t bytes[VECTOR_BYTES] = {0};
    if (count > 0) memcpy(bytes, from, count);
    return load(bytes);
}
INLINE void store_bytes(uint8_t *to, Vector vector, int64_t count)
{
    uint8_t bytes[VECTOR_BYTES];
    if (count >= VECTOR_BYTES) return store(to, vector);
    store(bytes, vector);
    if (count > 0) memcpy(to, bytes, count);
}
INLINE Numbers load_numbers(const float *from, int64_t count)
{
    return _mm256_castsi256_ps(load_bytes((const uint8_t *)from, count * (int64_t)sizeof(float)));
}
INLINE void store_numbers(float *to, Numbers numbers, int64_t count)
{
    store_bytes((uint8_t *)to, _mm256_castps_si256(numbers), count * (int64_t)sizeof(float));
}
INLINE unsigned differing_steps(Vector a, Vector b)
{
    return 0xff & ~(unsigned)_mm256_movemask_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(a, b)));
}
#endif

#if VNNI
/* sum += codes * levels, four products each, in place: as an intrinsic, GCC 12 spills the sums to the stack. Assemblers take
   the encoding of AVX-512 unless they are told; tests, on a CPU that has only that one, do not tell them (-DVEX=). */
#ifdef __AVX512VNNI__
#define ADD_PRODUCTS(sum, codes, levels) __asm__ volatile("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(levels))
#else
#ifndef VEX
#define VEX "%{vex%} "
#endif
#define ADD_PRODUCTS(sum, codes, levels)                                                                                   \
    __asm__ volatile(VEX "vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(levels))
#endif

/* sums[i][o] = the products of row i and output o, summed over all windows. Codes are unsigned. */
INLINE void multiply_rows(int rows, const uint8_t *const *codes, int64_t row_bytes, const int8_t *weight,
                          const Window *window, const Window *end, int32_t sums[ROWS][OUTPUTS])
{
    Vector wide[ROWS][2];
    for (int i = 0; i < rows; i++) wide[i][0] = wide[i][1] = (Vector){0};
    for (; window < end; window++) {
        int64_t at = window->y * row_bytes + window->x, stop = at + (int64_t)window->steps * DEPTH;
        for (; at < stop; at += DEPTH, weight += DEPTH * OUTPUTS) {
            Vector weight0 = load(weight), weight1 = load(weight + VECTOR_BYTES);
#pragma GCC unroll 8
            for (int i = 0; i < rows; i++) {
                Vector code = OF_VECTORS(set1_epi32)(*(const int32_t *)(codes[i] + at));
                ADD_PRODUCTS(wide[i][0], code, weight0);
                ADD_PRODUCTS(wide[i][1], code, weight1);
            }
        }
    }
    for (int i = 0; i < rows; i++)
        for (int j = 0; j < 2; j++) store(sums[i] + LANES * j, wide[i][j]);
}

INLINE void multiply_tile(int count, int is_signed, const uint8_t *const *codes, int64_t row_bytes, const int8_t *weight,
                          const Window *window, const Window *end, int32_t sums[ROWS][OUTPUTS])
{
    (void)is_signed;
    if (count <= 2) multiply_rows(2, codes, row_bytes, weight, window, end, sums);
    else multiply_rows(ROWS, codes, row_bytes, weight, window, end, sums);
}
#else
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

INLINE void multiply_tile(int count, int is_signed, const uint8_t *const *codes, int64_t row_bytes, const int8_t *weight,
                          const Window *window, const Window *end, int32_t sums[ROWS][OUTPUTS])
{
    if (is_signed) multiply_wide(ROWS, codes, row_bytes, weight, window, end, sums);
    else if (count <= 2) multiply_narrow(2, codes, row_bytes, weight, window, end, sums);
    else multiply_narrow(ROWS, codes, row_bytes, weight, window, end, sums);
}
#endif

/* 2^x, to 1e-6 of it for x of -64 to 64 and 1e-5 up to the ends of -126 and 126, whose values hold beyond: 2^n times a
   minimax polynomial on [-1/2, 1/2]. Its terms are added up in pairs, for their latency is what takes time. */
INLINE __m256 exp2_ps(__m256 x)
{
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-126.0f)), _mm256_set1_ps(126.0f));
    __m256 n = _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 f = _mm256_sub_ps(x, n), square = _mm256_mul_ps(f, f);
    __m256 low = _mm256_fmadd_ps(_mm256_set1_ps(6.93146967e-01f), f, _mm256_set1_ps(1.00000007e+00f));
    __m256 middle = _mm256_fmadd_ps(_mm256_set1_ps(5.55071330e-02f), f, _mm256_set1_ps(2.40221197e-01f));
    __m256 high = _mm256_fmadd_ps(_mm256_set1_ps(1.32764641e-03f), f, _mm256_set1_ps(9.67554127e-03f));
    __m256 p = _mm256_fmadd_ps(_mm256_fmadd_ps(high, square, middle), square, low);
    __m256i power = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23); /* added to the exponent: p is 0.7 to 1.42 */
    return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(p), power));
}

/* x times the normal distribution function (GELU, Hendrycks and Gimpel 2016), to 4e-7: erf is that of Abramowitz and
   Stegun, 7.1.26. A NaN stays. */
INLINE __m256 gelu_ps(__m256 x)
{
    const __m256 one = _mm256_set1_ps(1), sign = _mm256_set1_ps(-0.0f);
    __m256 z = _mm256_mul_ps(x, _mm256_set1_ps(0.707106781f)), size = _mm256_andnot_ps(sign, z);
    __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(_mm256_set1_ps(0.3275911f), size, one));
    __m256 p = _mm256_fmadd_ps(_mm256_set1_ps(1.061405429f), t, _mm256_set1_ps(-1.453152027f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(1.421413741f));
    p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-0.284496736f));
    p = _mm256_mul_ps(_mm256_fmadd_ps(p, t, _mm256_set1_ps(0.254829592f)), t);
    __m256 tail = exp2_ps(_mm256_mul_ps(_mm256_mul_ps(z, z), _mm256_set1_ps(-1.44269504f)));
    __m256 erf = _mm256_or_ps(_mm256_fnmadd_ps(p, tail, one), _mm256_and_ps(sign, z));
    __m256 half = _mm256_mul_ps(x, _mm256_set1_ps(0.5f));
    return _mm256_fmadd_ps(half, erf, half);
}

/* What is added to `count` outputs and what they are multiplied by: out = (sum - zero) * factor + bias. */
typedef struct {
    int32_t zero[OUTPUTS];
    float factor[OUTPUTS], bias[OUTPUTS];
} __attribute__((aligned(64))) Epilogue;

INLINE Epilogue epilogue_of(int zero_point, const int32_t *level_sum, float input_scale, const float *scale,
                            const float *bias, int64_t count)
{
    Epilogue epilogue;
    for (int j = 0; j < OUTPUTS; j++) {
        epilogue.zero[j] = zero_point * level_sum[j];
        epilogue.factor[j] = input_scale * scale[j];
        epilogue.bias[j] = bias && j < count ? bias[j] : 0;
    }
    return epilogue;
}

/* A vector of outputs from `j` on. */
INLINE Numbers dequantize(const int32_t *sums, const Epilogue *epilogue, int j)
{
    Vector centred = OF_VECTORS(sub_epi32)(load(sums + j), load(epilogue->zero + j));
    Numbers factor = OF_VECTORS(load_ps)(epilogue->factor + j), bias = OF_VECTORS(load_ps)(epilogue->bias + j);
    return OF_VECTORS(fmadd_ps)(OF_VECTORS(cvtepi32_ps)(centred), factor, bias);
}

/* Write those outputs from `j` on that are less than `count`, plus the addend's where there are such. */
INLINE void write_outputs(Numbers value, const float *addend, int j, int64_t count, float *out)
{
    if (addend) value = OF_VECTORS(add_ps)(value, load_numbers(addend + j, count - j));
    store_numbers(out + j, value, count - j);
}

INLINE void dequantize_row(const int32_t *sums, const Epilogue *epilogue, const float *addend, int64_t count, float *out)
{
    for (int j = 0; j < OUTPUTS; j += LANES) write_outputs(dequantize(sums, epilogue, j), addend, j, count, out);
}

/* What does not change from call to call. Per block of OUTPUTS channels: `weight` (steps, OUTPUTS, DEPTH) and windows from
   window_starts[block] to window_starts[block + 1]; `level_sum` and `scale` hold a number for every output of every
   block. With `is_signed`, codes are signed. For codes in pairs, TERMS blocks follow each other for the same channels. */
typedef struct {
    const int8_t *weight;
    const Window *windows;
    const int32_t *window_starts, *level_sum;
    const float *scale;
    int64_t steps, is_signed;
} Weights;

/* What is added to the output: as large as that, channels_last, or one number for each channel of an image, the same for
   all its pixels. NULL for neither. */
typedef struct {
    const float *numbers;
    int64_t is_per_image;
} Addend;

/* A quantized layer at one size of its input. `bias` may be NULL. `scale`, `zero_point` and `qmax`, the largest code, are
   those of the input; a scale of zero asks for the ones of each input's own range. */
typedef struct {
    const Weights *weights;
    const float *bias;
    Image image;
    Output output;
    float scale;
    int32_t zero_point, qmax;
} Layer;

/* What a block of OUTPUTS channels is multiplied by, and what becomes of its sums. */
typedef struct {
    const int8_t *weight;
    const Window *window, *end;
    Epilogue epilogue;
} Block;

INLINE Block block_of(const Weights *weights, int64_t index, float input_scale, int zero_point, const float *bias,
                      int64_t count)
{
    return (Block){weights->weight + index * weights->steps * DEPTH * OUTPUTS,
                   weights->windows + weights->window_starts[index], weights->windows + weights->window_starts[index + 1],
                   epilogue_of(zero_point, weights->level_sum + index * OUTPUTS, input_scale,
                               weights->scale + index * OUTPUTS, bias, count)};
}

/* Write the blocks whose products make OUTPUTS channels from `channel` on, and return how many there are: one; with gates
   two; for codes in pairs TERMS, of which the second has the bias: it is added to both pixels (`write_pair`). With `is_dense`,
   their sums include all excesses, with the terms' own biases. */
INLINE int blocks_of(const Layer *layer, int64_t channel, float input_scale, int zero_point, int is_dense, Block *blocks)
{
    const Weights *weights = layer->weights;
    const float *bias = layer->bias ? layer->bias + channel : NULL;
    int64_t index = channel / OUTPUTS, outputs = layer->output.out_channels, count = outputs - channel;
    if (layer->image.pairs) {
        for (int k = 0; k < TERMS; k++) {
            const Term term = term_of(k, zero_point, layer->qmax);
            const int zero = is_dense ? term.zero + term.bias : term.zero;
            blocks[k] = block_of(weights, index * TERMS + k, input_scale, zero, k == 1 ? bias : NULL, count);
        }
        return TERMS;
    }
    blocks[0] = block_of(weights, index, input_scale, zero_point, bias, count);
    if (!layer->output.is_gated) return 1;
    blocks[1] = block_of(weights, index + outputs / OUTPUTS, input_scale, zero_point, bias ? bias + outputs : NULL, count);
    return 2;
}

/* out *= GELU of a whole block of dequantized sums. */
INLINE void gate_row(const int32_t *sums, const Epilogue *epilogue, float *out)
{
    float gates[OUTPUTS];
    dequantize_row(sums, epilogue, NULL, OUTPUTS, gates);
    for (int j = 0; j < OUTPUTS; j += 8)
        _mm256_storeu_ps(out + j, _mm256_mul_ps(_mm256_loadu_ps(out + j), gelu_ps(_mm256_loadu_ps(gates + j))));
}

/* A row of a tile: its codes, its image, its column, and the first pixel of its output. A pair is `is_single` where it is
   the last one of an odd number of pixels. */
typedef struct {
    const uint8_t *codes;
    int64_t image, column, pixel;
    int is_single;
} Row;

/* Find `count` rows, the first of which is the `first` of all; `columns` are in a line of the output. */
INLINE void find_rows(const uint8_t *codes, const Layer *layer, int64_t columns, int64_t first, int count, Row rows[ROWS])
{
    const Image *image = &layer->image;
    const Output *output = &layer->output;
    const int64_t row_bytes = bytes_of_row(image), pixels = image->pairs ? 2 : 1;
    const int64_t image_bytes = (image->height + 2 * image->border_y) * row_bytes;
    const int64_t column_bytes = image->padded_channels * (image->pairs ? TERMS : output->stride_x);
    int64_t column = first % columns, line = first / columns, n = line / output->out_height, y = line % output->out_height;
    for (int i = 0; i < ROWS; i++) { /* counted on: divisions for each row would take as long as a short product */
        rows[i] = (Row){codes + n * image_bytes + y * output->stride_y * row_bytes + column * column_bytes, n, column,
                        line * output->out_width + column * pixels, column * pixels + 1 == output->out_width};
        if (i + 1 >= count || ++column < columns) continue;
        column = 0, line++;
        if (++y == output->out_height) y = 0, n++;
    }
}

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

#if VNNI
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
#define add_excesses(...) ((void)0)
#define add_dense(...) ((void)0)
#endif

/* Convolution, or matrix product where an image is one row of pixels, of `codes`, which `quantize` wrote with `scale` and
   `zero_point`, and for which it returned `is_dense`. `out` is channels_last. */
static void multiply(const uint8_t *codes, const Layer *layer, float input_scale, int zero_point, int is_dense,
                     Addend addend, float *out)
{
    const Image image = layer->image;
    const Output output = layer->output;
    const int is_signed = (int)layer->weights->is_signed;
    int64_t row_bytes = bytes_of_row(&image), columns = image.pairs ? image.pairs : output.out_width;
    int64_t rows = image.images * output.out_height * columns, tiles = (rows + ROWS - 1) / ROWS;
    int64_t blocks = (output.out_channels + OUTPUTS - 1) / OUTPUTS, runs = (tiles + TILES - 1) / TILES;
    int32_t biases[TERMS];
    for (int k = 0; k < TERMS; k++) memset(biases + k, term_of(k, zero_point, layer->qmax).bias, sizeof(int32_t));
#pragma omp parallel for schedule(dynamic) if (blocks * runs > 1)
    for (int64_t task = 0; task < blocks * runs; task++) {
        int64_t start = task % runs * TILES, stop = start + TILES < tiles ? start + TILES : tiles;
        int64_t channel = task / runs * OUTPUTS;
        int64_t channels = output.out_channels - channel < OUTPUTS ? output.out_channels - channel : OUTPUTS;
        Block block[TERMS];
        const int products = blocks_of(layer, channel, input_scale, zero_point, is_dense, block);
        for (int64_t tile = start; tile < stop; tile++) {
            int32_t sums[TERMS][ROWS][OUTPUTS] __attribute__((aligned(64)));
            const uint8_t *sources[ROWS];
            Row row[ROWS];
            int count = rows - tile * ROWS < ROWS ? (int)(rows - tile * ROWS) : ROWS;
            find_rows(codes, layer, columns, tile * ROWS, count, row);
            for (int i = 0; i < ROWS; i++) sources[i] = row[i].codes;
            for (int k = 0; k < products; k++)
                multiply_tile(count, is_signed, sources, row_bytes, block[k].weight, block[k].window, block[k].end, sums[k]);
            if (is_dense) add_dense(count, &image, sources, block, sums);
            if (image.pairs && !is_dense) add_excesses(&image, row, count, block, biases, sums);
            for (int i = 0; i < count; i++) {
                int64_t at = row[i].pixel * output.out_channels + channel;
                int64_t added = addend.is_per_image ? row[i].image * output.out_channels + channel : at;
                const float *numbers = addend.numbers ? addend.numbers + added : NULL;
                if (image.pairs) {
                    const float *others = numbers && !addend.is_per_image ? numbers + output.out_channels : numbers;
                    float *second = row[i].is_single ? NULL : out + at + output.out_channels;
                    write_pair(sums, i, block, numbers, others, channels, out + at, second);
                    continue;
                }
                dequantize_row(sums[0][i], &block[0].epilogue, numbers, channels, out + at);
                if (output.is_gated) gate_row(sums[1][i], &block[1].epilogue, out + at);
            }
        }
    }
}

/* What is done to an input before it is rounded: x * gain + shift, then SiLU where `has_silu`. `gain` and `shift` are
   (images, channels), or NULL for no map; groups of channels that share a mean and a variance are in them (`normalize`).
   With `is_layer_norm` they are (channels), the same for all pixels, and x is first less the mean of its pixel, times the
   pixel's inverse deviation: `of_pixel` sets these. */
typedef struct {
    const float *gain, *shift;
    int64_t has_silu, is_layer_norm;
    float eps, mean, inverse_deviation;
} Affine;

/* The map of the image whose numbers start at `offset`. */
INLINE Affine of_image(Affine affine, int64_t offset)
{
    if (affine.gain && !affine.is_layer_norm) affine.gain += offset, affine.shift += offset;
    return affine;
}

/* The map of the pixel `x`, whose numbers the cache has afterwards. */
#define CHUNK 32 /* channels whose sums are vectors side by side */
INLINE Affine of_pixel(Affine affine, const float *x, int64_t channels)
{
    if (!affine.is_layer_norm) return affine;
    float sums[CHUNK] = {0}, squares[CHUNK] = {0};
    double sum = 0, square = 0;
    const int64_t whole = channels / CHUNK * CHUNK;
    for (int64_t c = 0; c < whole; c += CHUNK)
        for (int k = 0; k < CHUNK; k++) sums[k] += x[c + k];
    for (int k = 0; k < CHUNK; k++) sum += sums[k];
    for (int64_t c = whole; c < channels; c++) sum += x[c];
    const float mean = (float)(sum / (double)channels);
    for (int64_t c = 0; c < whole; c += CHUNK)
        for (int k = 0; k < CHUNK; k++) squares[k] += (x[c + k] - mean) * (x[c + k] - mean);
    for (int k = 0; k < CHUNK; k++) square += squares[k];
    for (int64_t c = whole; c < channels; c++) square += (x[c] - mean) * (x[c] - mean);
    affine.mean = mean;
    affine.inverse_deviation = (float)(1 / __builtin_sqrt(square / (double)channels + affine.eps));
    return affine;
}

/* Eight inputs from channel `c` on, after the affine map and SiLU where there are such. `count` of them are real, and zeros
   stand for the others; a constant 8 costs no mask. */
INLINE __m256 activate(const float *x, Affine affine, int64_t c, int64_t count)
{
    const __m256i numbers = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i mask = _mm256_cmpgt_epi32(_mm256_set1_epi32((int)count), numbers);
#define LOAD(numbers) (count == 8 ? _mm256_loadu_ps(numbers) : _mm256_maskload_ps(numbers, mask))
    __m256 value = LOAD(x + c);
    if (affine.is_layer_norm)
        value = _mm256_mul_ps(_mm256_sub_ps(value, _mm256_set1_ps(affine.mean)), _mm256_set1_ps(affine.inverse_deviation));
    if (affine.gain) value = _mm256_fmadd_ps(value, LOAD(affine.gain + c), LOAD(affine.shift + c));
#undef LOAD
    if (!affine.has_silu) return value;
    const __m256 minus_log2_e = _mm256_set1_ps(-1.44269504f), one = _mm256_set1_ps(1.0f);
    return _mm256_div_ps(value, _mm256_add_ps(one, exp2_ps(_mm256_mul_ps(value, minus_log2_e))));
}

/* round(clamp(value, -zero_point, qmax - zero_point)) + zero_point in 32 bits, ties to even; a NaN becomes code 0. */
INLINE __m256i round_to_codes(__m256 value, int zero_point, int qmax)
{
    const __m256 low = _mm256_set1_ps((float)-zero_point), high = _mm256_set1_ps((float)(qmax - zero_point));
    value = _mm256_min_ps(_mm256_max_ps(value, low), high); /* of a NaN and a number, the second one */
    return _mm256_add_epi32(_mm256_cvtps_epi32(value), _mm256_set1_epi32(zero_point));
}

/* The codes of x * inverse_scale, after the affine map and SiLU where there are such; `flip` is added to all their bits. */
INLINE void quantize_pixel(const float *x, Affine affine, int64_t channels, float inverse_scale, int zero_point, int qmax,
                           uint8_t flip, uint8_t *codes)
{
    const __m256 factor = _mm256_set1_ps(inverse_scale);
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7), flips = _mm256_set1_epi8((char)flip);
    int64_t c = 0;
    for (; c + 32 <= channels; c += 32) {
        __m256i code[4];
        for (int k = 0; k < 4; k++)
            code[k] = round_to_codes(_mm256_mul_ps(activate(x, affine, c + 8 * k, 8), factor), zero_point, qmax);
        __m256i halves[2] = {_mm256_packus_epi32(code[0], code[1]), _mm256_packus_epi32(code[2], code[3])};
        __m256i bytes = _mm256_permutevar8x32_epi32(_mm256_packus_epi16(halves[0], halves[1]), order);
        _mm256_storeu_si256((__m256i *)(codes + c), _mm256_xor_si256(bytes, flips));
    }
    for (; c < channels; c += 8) {
        int32_t code[8];
        int64_t count = channels - c < 8 ? channels - c : 8;
        __m256 value = _mm256_mul_ps(activate(x, affine, c, count), factor);
        _mm256_storeu_si256((__m256i *)code, round_to_codes(value, zero_point, qmax));
        for (int64_t k = 0; k < count; k++) codes[c + k] = (uint8_t)code[k] ^ flip;
    }
}

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
#else /* no pairs */
#define transform_row(...) 0
#define make_dense(...) ((void)0)
#endif

/* Write `x`, after `affine` and SiLU where there is one, in codes, with its border and surplus channels in the code of zero;
   return whether the excesses of pairs are dense, in all rows. Codes that are to be signed are written less 128: a flip of
   the first bit. */
int quantize(const float *x, Image image, Affine affine, float inverse_scale, int zero_point, int qmax, int is_signed,
             uint8_t *codes)
{
    const uint8_t flip = is_signed ? SIGNED_OFFSET : 0;
    const int code_of_zero = zero_point ^ flip;
    int64_t height = image.height + 2 * image.border_y, row_bytes = bytes_of_row(&image), channels = image.padded_channels;
    int64_t width = image.pairs ? 2 * image.pairs + 2 : image.width + 2 * image.border_x; /* as the kernel reads it */
    Term terms[TERMS];
    for (int k = 0; k < TERMS; k++) terms[k] = term_of(k, zero_point, qmax);
    int is_dense = 0;
#pragma omp parallel for schedule(dynamic) reduction(| : is_dense) if (image.images * height > 1)
    for (int64_t line = 0; line < image.images * height; line++) {
        int64_t y = line % height - image.border_y, before = image.border_x;
        Affine local = of_image(affine, line / height * image.channels);
        uint8_t *start = codes + line * row_bytes, *row = start + bytes_of_codes(&image) - width * channels;
        if (y < 0 || y >= image.height) {
            memset(row, code_of_zero, width * channels);
        } else {
            const float *source = x + (line / height * image.height + y) * image.width * image.channels;
            memset(row, code_of_zero, before * channels);
            row += before * channels;
            for (int64_t i = 0; i < image.width; i++, row += channels, source += image.channels) {
                const Affine here = of_pixel(local, source, image.channels);
                quantize_pixel(source, here, image.channels, inverse_scale, zero_point, qmax, flip, row);
                memset(row + image.channels, code_of_zero, channels - image.channels);
            }
            memset(row, code_of_zero, (width - before - image.width) * channels);
        }
        if (image.pairs) is_dense |= transform_row(start, &image, terms);
    }
    if (is_dense) make_dense(codes, image.images * height, &image, terms);
    return is_dense;
}

/* The least and the largest value of `x` after `affine` and SiLU, and of zero; a NaN anywhere shows in both. SiLU falls up
   to its TROUGH and rises from there, so its ends are those of three inputs: the largest, and the nearest to the trough on
   both sides. All are on one side of a trough of minus infinity, where there is no SiLU. */
#define TROUGH -1.27846454f
static void find_range(const float *x, Image image, Affine affine, float *least, float *largest)
{
    const Affine silu = {.has_silu = affine.has_silu};
    affine.has_silu = 0;
    const __m256 lowest = _mm256_set1_ps(-__builtin_inff()), trough = silu.has_silu ? _mm256_set1_ps(TROUGH) : lowest;
    const __m256 bottom = silu.has_silu ? _mm256_set1_ps(-FLT_MAX) : lowest; /* the SiLU of -infinity is a NaN */
    float high = 0, above = 0, below = -__builtin_inff();
    int bad = 0;
#pragma omp parallel for schedule(static) reduction(max : high, below) reduction(min : above) reduction(| : bad)
    for (int64_t line = 0; line < image.images * image.height; line++) {
        Affine local = of_image(affine, line / image.height * image.channels);
        const float *source = x + line * image.width * image.channels;
        __m256 highs = _mm256_setzero_ps(), aboves = highs, bads = highs, belows = lowest;
        for (int64_t i = 0; i < image.width; i++, source += image.channels) {
            const Affine here = of_pixel(local, source, image.channels);
            for (int64_t c = 0; c < image.channels; c += 8) {
                int64_t count = image.channels - c < 8 ? image.channels - c : 8;
                __m256 value = count == 8 ? activate(source, here, c, 8) : activate(source, here, c, count);
                __m256 is_below = _mm256_cmp_ps(value, trough, _CMP_LT_OQ);
                highs = _mm256_max_ps(highs, value);
                aboves = _mm256_min_ps(aboves, _mm256_andnot_ps(is_below, value));
                belows = _mm256_max_ps(belows, _mm256_blendv_ps(lowest, value, is_below));
                bads = _mm256_or_ps(bads, _mm256_cmp_ps(value, bottom, _CMP_NGE_UQ));
            }
        }
        float ends[3][8];
        _mm256_storeu_ps(ends[0], highs), _mm256_storeu_ps(ends[1], aboves), _mm256_storeu_ps(ends[2], belows);
        for (int k = 0; k < 8; k++) {
            high = ends[0][k] > high ? ends[0][k] : high;
            above = ends[1][k] < above ? ends[1][k] : above;
            below = ends[2][k] > below ? ends[2][k] : below;
        }
        bad |= _mm256_movemask_ps(bads) != 0;
    }
    float ends[8] = {high, above, below <= -FLT_MAX ? 0 : below};
    _mm256_storeu_ps(ends, activate(ends, silu, 0, 8));
    *least = bad ? __builtin_nanf("") : ends[1] < ends[2] ? ends[1] : ends[2];
    *largest = bad ? __builtin_nanf("") : ends[0];
}

/* Mean and sum of squared deviations of `count` channels, at most CHUNK, over all pixels of an image. Deviations from the
   first pixel are added up, so that a mean far from zero costs no digits; rows in fp32, their sums in fp64. */
INLINE void channel_moments(const float *x, int64_t height, int64_t width, int64_t channels, int64_t count, float *mean,
                            float *squares)
{
    float pivot[CHUNK] = {0};
    double sum[CHUNK] = {0}, square[CHUNK] = {0};
    memcpy(pivot, x, sizeof(float) * count);
    for (int64_t y = 0; y < height; y++) {
        float row_sum[CHUNK] = {0}, row_square[CHUNK] = {0};
        for (int64_t i = 0; i < width; i++, x += channels)
            for (int64_t c = 0; c < count; c++) {
                float deviation = x[c] - pivot[c];
                row_sum[c] += deviation, row_square[c] += deviation * deviation;
            }
        for (int64_t c = 0; c < count; c++) sum[c] += row_sum[c], square[c] += row_square[c];
    }
    double pixels = (double)(height * width);
    for (int64_t c = 0; c < count; c++) {
        mean[c] = (float)(pivot[c] + sum[c] / pixels);
        squares[c] = (float)(square[c] - sum[c] * sum[c] / pixels);
    }
}

/* Seconds of the calling thread's calls so far, for profiles: rounding with all before it, products, norms. */
enum { ROUNDING, PRODUCTS, NORMS, PHASES };
static _Thread_local double seconds[PHASES];

void read_seconds(double *target) { memcpy(target, seconds, sizeof seconds); }

/* Add to `phase` the time since `started`; return now. */
static double clock_phase(int phase, double started)
{
    double now = omp_get_wtime();
    seconds[phase] += now - started;
    return now;
}

/* The parameters of a group normalization; `weight` and `bias` are (channels). */
typedef struct {
    const float *weight, *bias;
    int64_t groups;
    double eps;
} Norm;

/* Group normalization as an affine map: gain and shift, both (images, channels), with which x * gain + shift is x less its
   group's mean, over the group's standard deviation, times `weight`, plus `bias`. Variances are those of all values. */
void normalize(const float *x, Image image, Norm norm, float *gain, float *shift)
{
    double started = omp_get_wtime();
    int64_t groups = norm.groups, chunks = (image.channels + CHUNK - 1) / CHUNK, size = image.channels / groups;
    double pixels = (double)(image.height * image.width);
#pragma omp parallel for schedule(static)
    for (int64_t task = 0; task < image.images * chunks; task++) {
        int64_t n = task / chunks, c = task % chunks * CHUNK, at = n * image.channels + c;
        const float *first = x + n * image.height * image.width * image.channels + c;
        if (image.channels - c >= CHUNK) /* a constant count is vectorized */
            channel_moments(first, image.height, image.width, image.channels, CHUNK, gain + at, shift + at);
        else
            channel_moments(first, image.height, image.width, image.channels, image.channels - c, gain + at, shift + at);
    }
    for (int64_t group = 0; group < image.images * groups; group++) {
        int64_t at = group / groups * image.channels + group % groups * size, channel = group % groups * size;
        double mean = 0, squares = 0;
        for (int64_t c = 0; c < size; c++) mean += gain[at + c] / (double)size;
        for (int64_t c = 0; c < size; c++) squares += shift[at + c] + pixels * (gain[at + c] - mean) * (gain[at + c] - mean);
        double factor = 1 / __builtin_sqrt(squares / (pixels * (double)size) + norm.eps);
        for (int64_t c = 0; c < size; c++) {
            gain[at + c] = (float)(factor * norm.weight[channel + c]);
            shift[at + c] = (float)(norm.bias[channel + c] - mean * factor * norm.weight[channel + c]);
        }
    }
    clock_phase(NORMS, started);
}

/* Scale and zero point of the range of `x` after `affine`, and of zero: as qparams.scalar_qparams, where a NaN stays. */
void choose_range(const float *x, Image image, Affine affine, int qmax, float *scale, int *zero_point)
{
    float least, largest;
    find_range(x, image, affine, &least, &largest);
    float low = 0 < least ? 0 : least, high = 0 > largest ? 0 : largest, span = high - low, step = span / (float)qmax;
    *scale = span == 0 ? 1 : MIN_SCALE > step ? MIN_SCALE : step;
    float quotient = -low / *scale;
    *zero_point = !__builtin_isfinite(quotient) ? 0 : quotient > (float)qmax ? qmax : (int)__builtin_rintf(quotient);
}

/* Whether both layers take the same codes of the same input. */
INLINE int share_codes(const Layer *a, const Layer *b)
{
    return a->scale == b->scale && a->zero_point == b->zero_point && a->qmax == b->qmax
           && a->weights->is_signed == b->weights->is_signed && !memcmp(&a->image, &b->image, sizeof a->image);
}

/* Write to `outs` what each of `layers` makes of `x`, dense and channels_last, after `affine`; plus `addend`, which may be
   the output. `codes` has room for those of any of the layers' images. */
void run_layers(const float *x, Affine affine, int64_t count, const Layer *const *layers, Addend addend, uint8_t *codes,
                float *const *outs)
{
    float scale = 0;
    int zero_point = 0, is_dense = 0;
    for (int64_t i = 0; i < count; i++) {
        const Layer *layer = layers[i];
        const int is_signed = (int)layer->weights->is_signed;
        double started = omp_get_wtime();
        if (i == 0 || !share_codes(layers[i - 1], layer)) {
            scale = layer->scale, zero_point = layer->zero_point;
            if (scale == 0) choose_range(x, layer->image, affine, layer->qmax, &scale, &zero_point);
            is_dense = quantize(x, layer->image, affine, 1 / scale, zero_point, layer->qmax, is_signed, codes);
            started = clock_phase(ROUNDING, started);
        }
        multiply(codes, layer, scale, is_signed ? zero_point - SIGNED_OFFSET : zero_point, is_dense, addend, outs[i]);
        clock_phase(PRODUCTS, started);
    }
}

static void run_layer(const float *x, Affine affine, const Layer *layer, Addend addend, uint8_t *codes, float *out)
{
    run_layers(x, affine, 1, &layer, addend, codes, &out);
}

/* A residual block: conv2(SiLU(norm2(conv1(SiLU(norm1(x))) + embedding))) + shortcut(x), the embedding being that of a
   time vector, after a SiLU where `embeds_silu`. `embedding` and `shortcut` may be NULL: nothing and `x` in their place. */
typedef struct {
    Norm norm1, norm2;
    const Layer *embedding, *conv1, *conv2, *shortcut;
    int64_t embeds_silu;
} ResidualBlock;

INLINE int64_t code_bytes(const Layer *layer)
{
    const Image *image = &layer->image;
    return image->images * (image->height + 2 * image->border_y) * bytes_of_row(image);
}

INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

/* Where a block keeps what lies between its layers: `hidden` as large as its output, `embedding` (images, channels), the
   maps of a norm, and codes. */
typedef struct {
    int64_t hidden, embedding, gain, shift, codes, end;
} Scratch;

static Scratch scratch_of(const ResidualBlock *block)
{
    const Image *input = &block->conv1->image, *hidden = &block->conv2->image;
    int64_t maps = sizeof(float) * input->images * max(input->channels, hidden->channels);
    int64_t codes = max(code_bytes(block->conv1), code_bytes(block->conv2));
    if (block->embedding) codes = max(codes, code_bytes(block->embedding));
    if (block->shortcut) codes = max(codes, code_bytes(block->shortcut));
    Scratch at = {0};
    at.embedding = sizeof(float) * hidden->images * hidden->height * hidden->width * hidden->channels;
    at.gain = at.embedding + sizeof(float) * hidden->images * hidden->channels;
    at.shift = at.gain + maps;
    at.codes = (at.shift + maps + LINE - 1) / LINE * LINE;
    at.end = at.codes + codes;
    return at;
}

/* Bytes that `run_block` needs beside its output. */
int64_t block_bytes(const ResidualBlock *block) { return scratch_of(block).end; }

/* Write to `out` what the residual block makes of `x`, channels_last, and of `time` (images, its channels). */
void run_block(const float *x, const float *time, const ResidualBlock *block, char *memory, float *out)
{
    const Scratch at = scratch_of(block);
    float *hidden = (float *)(memory + at.hidden), *embedding = (float *)(memory + at.embedding);
    Affine affine = {(float *)(memory + at.gain), (float *)(memory + at.shift), .has_silu = 1}, none = {0};
    const Affine activation = {.has_silu = block->embeds_silu};
    uint8_t *codes = (uint8_t *)(memory + at.codes);
    const Addend nothing = {0}, embedded = {embedding, 1}, residual = {block->shortcut ? out : x, 0};

    if (block->embedding) run_layer(time, activation, block->embedding, nothing, codes, embedding);
    normalize(x, block->conv1->image, block->norm1, (float *)affine.gain, (float *)affine.shift);
    run_layer(x, affine, block->conv1, block->embedding ? embedded : nothing, codes, hidden);
    normalize(hidden, block->conv2->image, block->norm2, (float *)affine.gain, (float *)affine.shift);
    if (block->shortcut) run_layer(x, none, block->shortcut, nothing, codes, out);
    run_layer(hidden, affine, block->conv2, residual, codes, out);
}

/* A layer's levels, int8 (outputs, channels, height, width), and the scale of each output. */
typedef struct {
    const int8_t *levels;
    const float *scale;
    int64_t outputs, channels, height, width, padded_channels, in_pairs;
} Filters;

/* A chunk of channels of one row of an output's filter, from channel `c` on: zeros beyond the last one. */
typedef int8_t Levels[CHUNK];
INLINE void read_levels(const Filters *filters, int64_t o, int64_t y, int64_t x, int64_t c, Levels chunk)
{
    const int64_t pixels = filters->height * filters->width, left = filters->channels - c;
    const int8_t *from = filters->levels + (o * filters->channels + c) * pixels + y * filters->width + x;
    memset(chunk, 0, CHUNK);
    for (int64_t i = 0; i < CHUNK && i < left; i++) chunk[i] = from[i * pixels];
}

/* The filters of F(2, 3). With the inputs d of a pair and a filter g of three pixels, m = (d0 - d2) g0, (d1 + d2) (g0 + g1 +
   g2) / 2, (d2 - d1) (g0 - g1 + g2) / 2 and (d1 - d3) g2 make the outputs m0 + m1 + m2 and m1 - m2 - m3 (Lavin and Gray
   2016, 4.1). The scales have the halves. Where the sums of an output's filter exceed 8 bits, they are divided by `step` and
   rounded, an error of at most 0.75 of a level. */
INLINE void read_terms(const Filters *filters, int64_t o, int64_t y, int64_t c, const float *step, Levels *terms)
{
    Levels middle;
    read_levels(filters, o, y, 0, c, terms[0]);
    read_levels(filters, o, y, 1, c, middle);
    read_levels(filters, o, y, 2, c, terms[3]);
    for (int i = 0; i < CHUNK; i++) {
        const int outer = terms[0][i] + terms[3][i];
        terms[1][i] = (int8_t)__builtin_rintf((float)(outer + middle[i]) / step[1]);
        terms[2][i] = (int8_t)__builtin_rintf((float)(outer - middle[i]) / step[2]);
    }
}

/* Find what brings the sums of an output's filter to 8 bits; 1 where they have no more. */
static void find_steps(const Filters *filters, int64_t o, float *step)
{
    int64_t sum = LEVEL_MAX, difference = LEVEL_MAX;
    for (int64_t y = 0; y < filters->height; y++)
        for (int64_t c = 0; c < filters->channels; c += CHUNK) {
            Levels row[3];
            for (int x = 0; x < 3; x++) read_levels(filters, o, y, x, c, row[x]);
            for (int i = 0; i < CHUNK; i++) {
                const int outer = row[0][i] + row[2][i], middle = row[1][i];
                sum = max(sum, abs(outer + middle)), difference = max(difference, abs(outer - middle));
            }
        }
    step[1] = (float)sum / LEVEL_MAX, step[2] = (float)difference / LEVEL_MAX;
}

/* Write the levels of output `o` to the blocks that start at `weight`, of `steps` each, and their sums and scales. Of what is
   beyond the last output, all are zeros. */
static void pack_output(const Filters *filters, int64_t o, int64_t steps, int8_t *weight, int32_t *level_sum, float *scale)
{
    const int terms = filters->in_pairs ? TERMS : 1, is_real = o < filters->outputs;
    const int64_t channels = filters->padded_channels;
    float step[TERMS] = {1, 1, 1, 1};
    int32_t sum[TERMS] = {0};
    if (is_real && filters->in_pairs) find_steps(filters, o, step);
    for (int64_t place = 0; place < steps * DEPTH / channels; place++) /* rows of a filter in pairs, else its pixels */
        for (int64_t c = 0; c < channels; c += CHUNK) {
            Levels chunk[TERMS] = {0};
            if (is_real && filters->in_pairs) read_terms(filters, o, place, c, step, chunk);
            else if (is_real) read_levels(filters, o, place / filters->width, place % filters->width, c, chunk[0]);
            for (int k = 0; k < terms; k++) {
                int8_t *target = weight + (k * steps + (place * channels + c) / DEPTH) * OUTPUTS * DEPTH;
                for (int64_t i = 0; i < CHUNK && i < channels - c; i += DEPTH) memcpy(target + i * OUTPUTS, chunk[k] + i, DEPTH);
                for (int i = 0; i < CHUNK; i++) sum[k] += chunk[k][i];
            }
        }
    for (int k = 0; k < terms; k++) {
        level_sum[k * OUTPUTS] = sum[k];
        scale[k * OUTPUTS] = !is_real ? 0 : filters->scale[o] * step[k] * (k == 1 || k == 2 ? 0.5f : 1);
    }
}

/* Write `filters` in blocks, and for every output of every block the sum of its levels and its scale: as `Weights` has them. */
void pack_filters(const Filters *filters, int8_t *weight, int32_t *level_sum, float *scale)
{
    const int terms = filters->in_pairs ? TERMS : 1;
    const int64_t pixels = filters->height * (filters->in_pairs ? 1 : filters->width);
    const int64_t steps = pixels * filters->padded_channels / DEPTH, blocks = (filters->outputs + OUTPUTS - 1) / OUTPUTS;
#pragma omp parallel for schedule(dynamic)
    for (int64_t block = 0; block < blocks; block++)
        for (int j = 0; j < OUTPUTS; j++) {
            const int64_t first = block * terms * OUTPUTS;
            pack_output(filters, block * OUTPUTS + j, steps, weight + first * steps * DEPTH + j * DEPTH,
                        level_sum + first + j, scale + first + j);
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
