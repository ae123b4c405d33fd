"""Packing of 2-, 3-, 4-, 6- and 8-bit codes into uint8, row by row.

A row is cut into the shortest blocks that fill whole bytes (8 / gcd(bits, 8) codes in bits / gcd(bits, 8) bytes);
inside a block the codes form a little-endian bit stream. So 3 bits really take 3 bits: 8 codes in 3 bytes.
"""

from math import ceil, gcd

import torch
from torch import Tensor

from diffusers_pqcad.qparams import WeightSpec


def block_shape(bits: int) -> tuple[int, int]:
    """Return how many codes and how many bytes one block of `bits`-bit codes has."""
    common = gcd(bits, 8)
    return 8 // common, bits // common


def packed_row_bytes(row_length: int, bits: int) -> int:
    """Return the bytes that a row of `row_length` codes takes, the last block padded."""
    codes, num_bytes = block_shape(bits)
    return ceil(row_length / codes) * num_bytes


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Return `codes` (R, K), integers in [0, 2^bits), as (R, packed_row_bytes) uint8."""
    per_block, num_bytes = block_shape(bits)
    rows, length = codes.shape
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -length % per_block))
    shifts = torch.arange(per_block, device=codes.device) * bits
    words = (padded.view(rows, -1, per_block) << shifts).sum(dim=-1)  # disjoint bits, so the sum is an "or"
    byte_shifts = torch.arange(num_bytes, device=codes.device) * 8
    return ((words.unsqueeze(-1) >> byte_shifts) & 0xFF).to(torch.uint8).view(rows, -1)


def unpack_codes(packed: Tensor, bits: int, row_length: int) -> Tensor:
    """Return the (R, row_length) uint8 codes of `packed` (R, packed_row_bytes): the inverse of `pack_codes`."""
    if bits == 8:
        return packed
    per_block, num_bytes = block_shape(bits)
    rows = packed.shape[0]
    byte_shifts = torch.arange(num_bytes, device=packed.device, dtype=torch.int32) * 8
    words = (packed.view(rows, -1, num_bytes).to(torch.int32) << byte_shifts).sum(dim=-1, dtype=torch.int32)
    shifts = torch.arange(per_block, device=packed.device, dtype=torch.int32) * bits
    codes = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return codes.to(torch.uint8).view(rows, -1)[:, :row_length]


def pack_levels(levels: Tensor, spec: WeightSpec) -> Tensor:
    """Return int8 `levels` (C_out, ...) of the grid `spec` as (C_out, packed_row_bytes) uint8."""
    codes = (levels.flatten(1).to(torch.int16) + spec.level_max) // spec.level_step
    return pack_codes(codes, spec.bits)


def unpack_levels(packed: Tensor, spec: WeightSpec, shape: torch.Size) -> Tensor:
    """Return the int8 levels, in `shape` (C_out, ...), of `packed` (C_out, packed_row_bytes) uint8."""
    codes = unpack_codes(packed, spec.bits, shape[1:].numel())
    return (codes.to(torch.int16) * spec.level_step - spec.level_max).to(torch.int8).reshape(shape)
