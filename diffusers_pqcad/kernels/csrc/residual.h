/* A residual block of quantized layers in one call. */
#pragma once

#include <stdint.h>

#include "norms.h"
#include "run.h"

/* A residual block: conv2(SiLU(norm2(conv1(SiLU(norm1(x))) + embedding))) + shortcut(x), the embedding being that of a
   time vector, after a SiLU where `embeds_silu`. `embedding` and `shortcut` may be NULL: nothing and `x` in their place. */
typedef struct {
    GroupNorm norm1, norm2;
    const Layer *embedding, *conv1, *conv2, *shortcut;
    int64_t embeds_silu;
} ResidualBlock;

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

/* Write to `out` what the residual block makes of `x`, channels_last, and of `time` (images, its channels). `residual`,
   where it is not NULL, is added in the place of `shortcut(x)`: what a shortcut in floating point gave. */
void run_block(const float *x, const float *time, const float *residual, const ResidualBlock *block, char *memory,
               float *out)
{
    const Scratch at = scratch_of(block);
    float *hidden = (float *)(memory + at.hidden), *embedding = (float *)(memory + at.embedding);
    Affine affine = {(float *)(memory + at.gain), (float *)(memory + at.shift), .has_silu = 1}, none = {0};
    const Affine activation = {.has_silu = block->embeds_silu};
    uint8_t *codes = (uint8_t *)(memory + at.codes);
    const Addend nothing = {0}, embedded = {embedding, 1}, added = {residual ? residual : block->shortcut ? out : x, 0};

    if (block->embedding) run_layer(time, activation, block->embedding, nothing, codes, embedding);
    normalize(x, block->conv1->image, block->norm1, (float *)affine.gain, (float *)affine.shift);
    run_layer(x, affine, block->conv1, block->embedding ? embedded : nothing, codes, hidden);
    normalize(hidden, block->conv2->image, block->norm2, (float *)affine.gain, (float *)affine.shift);
    if (block->shortcut) run_layer(x, none, block->shortcut, nothing, codes, out);
    run_layer(hidden, affine, block->conv2, added, codes, out);
}
