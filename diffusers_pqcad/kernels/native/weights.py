"""Weights rounded onto their grid and packed, and what that costs; and unpacked: in C where there is a compiler.

By PyTorch, these are a dozen passes; a model of 860 M weights spends most of its loading in them.
"""

import ctypes
from functools import cache

import torch
from torch import Tensor, nn

from diffusers_pqcad.kernels import native
from diffusers_pqcad.kernels.native import scratch
from diffusers_pqcad.kernels.native.layout import check_layout
from diffusers_pqcad.numerics.packing import block_shape, pack_levels, packed_row_bytes, unpack_codes, unpack_levels
from diffusers_pqcad.numerics.qparams import (
    MIN_SCALE,
    WEIGHT_BITS,
    WeightSpec,
    as_groups,
    min_max_weight_scale,
    perturbation,
    quantize_weight,
    refuse_not_finite,
    row_chunks,
)

SOURCE = native.CSRC / "weights.c"
CACHED_WEIGHTS = 2**20  # that a CPU still has in its cache when it reads them again, converted


def grids() -> dict[str, float]:
    """Return the levels and the blocks of codes of all bit-widths, by the names that C has for them."""
    found: dict[str, float] = {}
    for bits in WEIGHT_BITS:
        spec, (codes, num_bytes) = WeightSpec(bits), block_shape(bits)
        found |= {f"{bits} bits: level_max": spec.level_max, f"{bits} bits: level_step": spec.level_step}
        found |= {f"{bits} bits: codes of a block": codes, f"{bits} bits: bytes of a block": num_bytes}
    return found


@cache
def library() -> ctypes.CDLL | str:
    """Return the compiled C file, or why there is none on this computer."""
    loaded = native.library(SOURCE)
    if isinstance(loaded, str):
        return loaded
    check_layout(loaded, constants={"MIN_SCALE": ctypes.c_float(MIN_SCALE).value, **grids()})
    address, long, integer = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    loaded.quantize_rows.argtypes = [
        *(address, address, long, long, long, integer, integer, long, integer, address, address, address)
    ]
    loaded.largest_magnitudes.argtypes = [address, long, long, address]
    loaded.highest_code.argtypes = [address, long, integer]
    loaded.unpack_rows.argtypes = [address, long, long, integer, address]
    loaded.largest_magnitudes.restype = None
    return loaded


def refuse_width(result: int, bits: int) -> int:
    """Return what a C function returned; raises ValueError where that says that it knows no grid of `bits`."""
    if result < 0:
        raise ValueError(f"bits: expected one of {WEIGHT_BITS}, got {bits}.")
    return result


def compiled_for(weight: Tensor) -> ctypes.CDLL | None:
    """Return the compiled C file where it can read `weight`: numbers in the CPU's memory, and not of a subclass."""
    if weight.device.type != "cpu" or type(weight) not in (Tensor, nn.Parameter):
        return None
    loaded = library()
    return None if isinstance(loaded, str) else loaded


def largest_magnitudes(weight: Tensor, num_groups: int = 1) -> Tensor:
    """Return the largest magnitudes (R, G) of `weight` (R, ...), fp32; not finite where a weight is not."""
    loaded = compiled_for(weight)
    if loaded is None:
        return torch.linalg.vector_norm(as_groups(weight.detach().float(), num_groups), torch.inf, dim=-1)
    weight = weight.detach().float().contiguous()
    largest = torch.empty(len(weight), num_groups, dtype=torch.float32, device="cpu")
    length = weight[0].numel() // num_groups
    loaded.largest_magnitudes(weight.data_ptr(), largest.numel(), length, largest.data_ptr())
    return largest


def quantize(weight: Tensor, spec: WeightSpec, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed weights uint8 (R, packed_row_bytes), the scale fp32 (R, G), and the perturbation (2,) fp32.

    `weight` is (R, ...) in any floating dtype. The scale is min-max, `qparams.min_max_weight_scale`, unless given. A
    large weight is read once, row by row or by chunks that stay in the cache. Raises ValueError for weights that are
    not finite, and for scales of another shape, or not positive and finite.
    """
    num_groups, row_bytes = spec.num_groups(weight[0].numel()), packed_row_bytes(weight[0].numel(), spec.bits)
    packed = torch.empty(len(weight), row_bytes, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(len(weight), num_groups, dtype=torch.float32, device=weight.device)
    if scale is not None:
        refuse_scale(scale, scales.shape)
        refuse_not_finite(largest_magnitudes(weight, num_groups))
        scales.copy_(scale.detach())
    loaded, errors = compiled_for(weight), torch.zeros(2, device=weight.device)
    is_read_in_place = weight.dtype == torch.float32 and weight.is_contiguous() and loaded is not None
    for rows in row_chunks(weight, weight.numel() if is_read_in_place else CACHED_WEIGHTS):
        chunk = weight[rows].detach()
        if loaded is not None:
            errors += quantize_rows(loaded, chunk, spec, scales[rows], packed[rows], finds_scale=scale is None)
            continue
        if scale is None:
            scales[rows] = min_max_weight_scale(chunk, spec)
        levels = quantize_weight(chunk, scales[rows], spec)
        packed[rows] = pack_levels(levels, spec)
        errors += perturbation(chunk, levels, scales[rows])
    if scale is None:
        refuse_not_finite(scales)
    return packed, scales, errors


def refuse_scale(scale: Tensor, shape: torch.Size) -> None:
    """Raise ValueError for a scale of another shape, or not positive and finite."""
    if scale.shape != shape:
        raise ValueError(f"scale: expected a shape of {tuple(shape)}, got {tuple(scale.shape)}.")
    if not bool(((scale > 0) & scale.isfinite()).all()):
        low, high = scale.aminmax()
        raise ValueError(f"scale: expected positive and finite numbers, got {low.item()} to {high.item()}.")


def quantize_rows(
    loaded: ctypes.CDLL, weight: Tensor, spec: WeightSpec, scale: Tensor, packed: Tensor, *, finds_scale: bool
) -> Tensor:
    """Write to `packed` uint8 (R, packed_row_bytes), dense rows, and return the perturbation (2,) fp32.

    `scale` is fp32 (R, G), dense; it is written where `finds_scale`, not finite where a weight is not.
    """
    weight = weight.float().flatten(1).contiguous()
    (rows, length), groups = weight.shape, scale.shape[1]
    block_codes, _ = block_shape(spec.bits)
    row_codes, threads = -(-length // block_codes) * block_codes, loaded.max_threads()
    room = scratch.buffer(threads * row_codes)
    errors = torch.empty(rows, 2, dtype=torch.float64, device="cpu")
    result = loaded.quantize_rows(
        weight.data_ptr(), scale.data_ptr(), rows, groups, length // groups, finds_scale, spec.bits, row_codes,
        threads, room.data_ptr(), packed.data_ptr(), errors.data_ptr(),
    )  # fmt: skip
    scratch.give_back(room)
    refuse_width(result, spec.bits)
    return errors.sum(0).float()


def unpack(packed: Tensor, spec: WeightSpec, shape: torch.Size) -> Tensor:
    """Return the int8 levels, in `shape` (R, ...), of `packed` (R, packed_row_bytes) uint8: `packing.unpack_levels`.

    Numbers, and no part of a graph: what is traced takes the other function. Raises ValueError for rows of another
    length.
    """
    loaded, length = compiled_for(packed), shape[1:].numel()
    if loaded is None:
        return unpack_levels(packed, spec, shape)
    expected = (shape[0], packed_row_bytes(length, spec.bits))
    if packed.shape != expected:
        raise ValueError(
            f"packed weights: expected {expected} bytes for {tuple(shape)} weights of {spec.bits} bits, got "
            f"{tuple(packed.shape)}. They were replaced; load the model again."
        )
    packed = packed.contiguous()
    levels = torch.empty(shape, dtype=torch.int8, device="cpu")
    result = loaded.unpack_rows(packed.data_ptr(), shape[0], length, spec.bits, levels.data_ptr())
    refuse_width(result, spec.bits)
    return levels


def highest_code(packed: Tensor, bits: int) -> int:
    """Return the largest code in `packed` (R, packed_row_bytes) uint8; what pads a row counts."""
    loaded = compiled_for(packed)
    if loaded is None:
        codes, num_bytes = block_shape(bits)
        length = packed.shape[1] // num_bytes * codes
        return max(int(unpack_codes(packed[rows], bits, length).amax()) for rows in row_chunks(packed))
    packed = packed.contiguous()
    return refuse_width(loaded.highest_code(packed.data_ptr(), packed.numel(), bits), bits)
