"""Weights rounded onto their grid and packed, and what that costs, in one pass of C where there is a compiler.

Apart, these are a dozen passes; a model of 860 M weights spends most of its loading in them.
"""

import ctypes
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusers_pqcad.kernels import native
from diffusers_pqcad.packing import block_shape, pack_levels, packed_row_bytes, unpack_codes
from diffusers_pqcad.qparams import (
    WeightSpec,
    as_groups,
    perturbation,
    quantize_weight,
    row_chunks,
    scale_of_largest,
)

SOURCE = Path(__file__).with_name("weights.c")
CACHED_WEIGHTS = 2**20  # that a CPU still has in its cache when it reads them again


@cache
def library() -> ctypes.CDLL | str:
    """Return the compiled C file, or why there is none on this computer."""
    loaded = native.library(SOURCE)
    if isinstance(loaded, str):
        return loaded
    address, long = ctypes.c_void_p, ctypes.c_int64
    loaded.quantize_rows.argtypes = [address, address, long, long, long, ctypes.c_int, long, address, address, address]
    loaded.largest_magnitudes.argtypes = [address, long, long, address]
    loaded.highest_code.argtypes = [address, long, ctypes.c_int]
    loaded.quantize_rows.restype = loaded.largest_magnitudes.restype = None
    return loaded


def compiled_for(weight: Tensor) -> ctypes.CDLL | None:
    """Return the compiled C file where it can read `weight`: numbers in the CPU's memory, and not of a subclass."""
    loaded = library()
    if isinstance(loaded, str) or weight.device.type != "cpu" or type(weight) not in (Tensor, nn.Parameter):
        return None
    return loaded


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


def min_max_scale(weight: Tensor, spec: WeightSpec) -> Tensor:
    """Return `qparams.min_max_weight_scale`, to the last bit; it raises ValueError for what is not finite, too."""
    return scale_of_largest(largest_magnitudes(weight, spec.num_groups(weight[0].numel())), spec)


def quantize(weight: Tensor, spec: WeightSpec, scale: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Return packed weights uint8 (R, packed_row_bytes), the scale fp32 (R, G), and the perturbation (2,) fp32.

    The scale is min-max unless given. A large weight is read once: rows are in the cache when they are rounded, as
    their scale was just found. Raises ValueError for weights that are not finite, and for scales of another shape, or
    not positive and finite.
    """
    num_groups = spec.num_groups(weight[0].numel())
    if scale is not None:
        if scale.shape != (len(weight), num_groups):
            raise ValueError(f"scale: expected a shape of {(len(weight), num_groups)}, got {tuple(scale.shape)}.")
        if not bool(((scale > 0) & scale.isfinite()).all()):
            low, high = scale.aminmax()
            raise ValueError(f"scale: expected positive and finite numbers, got {low.item()} to {high.item()}.")
    row_bytes, device = packed_row_bytes(weight[0].numel(), spec.bits), weight.device
    packed = torch.empty(len(weight), row_bytes, dtype=torch.uint8, device=device)
    scales = torch.empty(len(weight), num_groups, dtype=torch.float32, device=device)
    errors = torch.zeros(2, device=device)
    for rows in row_chunks(weight, CACHED_WEIGHTS):
        min_max = min_max_scale(weight[rows], spec)  # refuses weights that are not finite
        scales[rows] = min_max if scale is None else scale.detach()[rows]
        errors += quantize_rows(weight[rows], scales[rows], spec, packed[rows])[1]
    return packed, scales, errors


def quantize_rows(
    weight: Tensor, scale: Tensor, spec: WeightSpec, packed: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the packed weights uint8 (R, packed_row_bytes) and their perturbation (2,) fp32, as qparams.py has it.

    `weight` is (R, ...) in any floating dtype, `scale` fp32 (R, G), positive and finite, and so are the weights. They
    are written to `packed` where it is given, dense rows.
    """
    if len(scale) != len(weight) or scale.dim() != 2 or weight[0].numel() % scale.shape[1]:
        raise ValueError(f"scale: expected (R, G) for weights of {tuple(weight.shape)}, got {tuple(scale.shape)}.")
    loaded = compiled_for(weight)
    if loaded is None:
        levels = quantize_weight(weight, scale, spec)
        codes = pack_levels(levels, spec)
        return codes if packed is None else packed.copy_(codes), perturbation(weight, levels, scale)
    weight, scale = weight.detach().float().flatten(1).contiguous(), scale.to(weight.device).float().contiguous()
    (rows, length), groups = weight.shape, scale.shape[1]
    block_codes, _ = block_shape(spec.bits)
    row_codes = -(-length // block_codes) * block_codes
    size = (rows, packed_row_bytes(length, spec.bits))
    packed = torch.empty(size, dtype=torch.uint8, device="cpu") if packed is None else packed
    assert packed.shape == size
    assert packed.is_contiguous()
    assert packed.dtype == torch.uint8  # C writes there
    codes = packed
    if spec.bits < 8:
        codes = torch.empty(rows, row_codes, dtype=torch.uint8, device="cpu")
        codes[:, length:] = 0
    errors = torch.empty(rows, 2, dtype=torch.float64, device="cpu")
    loaded.quantize_rows(
        weight.data_ptr(), scale.data_ptr(), rows, groups, length // groups, spec.bits, row_codes, codes.data_ptr(),
        packed.data_ptr(), errors.data_ptr(),
    )  # fmt: skip
    return packed, errors.sum(0).float()


def highest_code(packed: Tensor, bits: int) -> int:
    """Return the largest code in `packed` (R, packed_row_bytes) uint8; what pads a row counts."""
    loaded = compiled_for(packed)
    if loaded is None:
        codes, num_bytes = block_shape(bits)
        length = packed.shape[1] // num_bytes * codes
        return max(int(unpack_codes(packed[rows], bits, length).amax()) for rows in row_chunks(packed))
    packed = packed.contiguous()
    return loaded.highest_code(packed.data_ptr(), packed.numel(), bits)
