"""Packing of 2-, 3-, 4-, 6- and 8-bit codes into uint8, row by row.

A row is cut into the shortest blocks that fill whole bytes (8 / gcd(bits, 8) codes in bits / gcd(bits, 8) bytes);
inside a block the codes form a little-endian bit stream. So 3 bits really take 3 bits: 8 codes in 3 bytes.
"""

from math import ceil, gcd

import torch
from torch import Tensor

from diffusers_pqcad.numerics.qparams import WEIGHT_BITS, WeightSpec, is_exported


def block_shape(bits: int) -> tuple[int, int]:
    """Return how many codes and how many bytes one block of `bits`-bit codes has.

    Raises ValueError for a width that weights do not have: the blocks of other widths are longer than a word.
    """
    if bits not in WEIGHT_BITS:
        raise ValueError(f"bits: expected one of {WEIGHT_BITS}, got {bits}.")
    common = gcd(bits, 8)
    return 8 // common, bits // common


def packed_row_bytes(row_length: int, bits: int) -> int:
    """Return the bytes that a row of `row_length` codes takes, the last block padded."""
    codes, num_bytes = block_shape(bits)
    return ceil(row_length / codes) * num_bytes


def word_dtype(num_bytes: int) -> torch.dtype:
    """Return the narrowest integers that hold a block: the fewer bytes are moved, the faster.

    What is exported takes int32: ONNX's exporter shifts uint8 as if it had a sign.
    """
    return torch.uint8 if num_bytes == 1 and not is_exported() else torch.int32


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return `codes` (R, K), integers in [0, 2^bits), as (R, packed_row_bytes) uint8.

    Raises ValueError for another width than `WEIGHT_BITS`, as all functions here do.
    """
    if bits == 8:
        return codes.to(torch.uint8)
    per_block, num_bytes = block_shape(bits)
    rows, length = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -length % per_block)).view(rows, -1, per_block)
    words = torch.zeros(padded.shape[:2], dtype=word_dtype(num_bytes), device=codes.device)
    for index in range(per_block):
        words |= padded[:, :, index].to(words.dtype) << bits * index
    packed = torch.empty(*words.shape, num_bytes, dtype=torch.uint8, device=codes.device)
    for index in range(num_bytes):
        packed[:, :, index] = words >> 8 * index  # the cast keeps the lowest byte
    return packed.view(rows, -1)


def unpack_codes(packed: Tensor, bits: int, row_length: int) -> Tensor:
    """Return the (R, row_length) uint8 codes of `packed` (R, packed_row_bytes): the inverse of `pack_codes`."""
    if bits == 8:
        return packed
    per_block, num_bytes = block_shape(bits)
    rows = packed.shape[0]
    blocks = packed.view(rows, -1, num_bytes)
    words = blocks[:, :, 0].to(word_dtype(num_bytes))
    for index in range(1, num_bytes):
        words = words + (blocks[:, :, index].to(words.dtype) << 8 * index)  # ONNX has no |= of integers
    codes = torch.empty(*words.shape, per_block, dtype=torch.uint8, device=packed.device)
    for index in range(per_block):
        codes[:, :, index] = (words >> bits * index) & (2**bits - 1)
    return codes.view(rows, -1)[:, :row_length]


def pack_levels(levels: Tensor, spec: WeightSpec) -> Tensor:
    """Return int8 `levels` (C_out, ...) of the grid `spec` as (C_out, packed_row_bytes) uint8."""
    wide = levels.flatten(1).to(torch.int16) if spec.bits == 8 else levels.flatten(1)  # elsewhere int8 holds the codes
    codes = wide + spec.level_max
    return pack_codes(codes if spec.level_step == 1 else codes // spec.level_step, spec.bits)


def unpack_levels(packed: Tensor, spec: WeightSpec, shape: torch.Size) -> Tensor:
    """Return the int8 levels, in `shape` (C_out, ...), of `packed` (C_out, packed_row_bytes) uint8."""
    codes = unpack_codes(packed, spec.bits, shape[1:].numel())
    levels = codes.to(torch.int16 if spec.bits == 8 else torch.int8)
    return levels.mul_(spec.level_step).sub_(spec.level_max).to(torch.int8).reshape(shape)
