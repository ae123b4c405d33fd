/* What becomes of a block's sums of products: numbers, with scales, bias, addend and gate. */
#pragma once

#include <stdint.h>

#include "activations.h"
#include "products.h"
#include "vectors.h"

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

/* What outputs are added to, where there are such numbers, and whether a ReLU comes after that, of which a NaN stays. */
typedef struct {
    const float *numbers;
    int64_t has_relu;
} Finish;

/* Write those outputs from `j` on that are less than `count`. */
INLINE void write_outputs(Numbers value, Finish finish, int j, int64_t count, float *out)
{
    if (finish.numbers) value = OF_VECTORS(add_ps)(value, load_numbers(finish.numbers + j, count - j));
    if (finish.has_relu) value = OF_VECTORS(max_ps)(OF_VECTORS(setzero_ps)(), value); /* of a NaN and a number, the second */
    store_numbers(out + j, value, count - j);
}

INLINE void dequantize_row(const int32_t *sums, const Epilogue *epilogue, Finish finish, int64_t count, float *out)
{
    for (int j = 0; j < OUTPUTS; j += LANES) write_outputs(dequantize(sums, epilogue, j), finish, j, count, out);
}

/* out *= GELU of a whole block of dequantized sums and what is added to them. */
INLINE void gate_row(const int32_t *sums, const Epilogue *epilogue, Finish finish, float *out)
{
    float gates[OUTPUTS];
    dequantize_row(sums, epilogue, finish, OUTPUTS, gates);
    for (int j = 0; j < OUTPUTS; j += 8)
        _mm256_storeu_ps(out + j, _mm256_mul_ps(_mm256_loadu_ps(out + j), gelu_ps(_mm256_loadu_ps(gates + j))));
}
