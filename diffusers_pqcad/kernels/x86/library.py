"""csrc/layers.c as a library, with the arguments of its functions and its structs checked."""

import ctypes
from functools import cache

from diffusers_pqcad.kernels import native
from diffusers_pqcad.kernels.native.layout import check_layout
from diffusers_pqcad.kernels.x86.structs import (
    STRUCTS,
    Affine,
    Filters,
    GroupNorm,
    Image,
    Layer,
    Packed,
    ResidualBlock,
    Rows,
)
from diffusers_pqcad.numerics.qparams import MIN_SCALE, WEIGHT_BITS

SOURCE = native.CSRC / "layers.c"
DEPTH = 4  # inputs of a step, as in the C file
TILE_SIZE = 4  # elements of a Winograd tile, as in the C file


@cache
def library() -> ctypes.CDLL | str:
    """Return the compiled C file, or why there is none on this computer."""
    loaded = native.library(SOURCE)
    if isinstance(loaded, str):
        return loaded
    constants = {"DEPTH": DEPTH, "TILE_SIZE": TILE_SIZE, "MIN_SCALE": ctypes.c_float(MIN_SCALE).value}
    widths = sum(1 << bits for bits in WEIGHT_BITS)  # a bit for each that panel.h unpacks
    check_layout(loaded, STRUCTS, constants | {"UNPACKED_WIDTHS": widths})
    address, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    loaded.code_bytes.argtypes, loaded.code_bytes.restype = [ctypes.POINTER(Layer)], long
    loaded.normalize.argtypes = [address, Image, GroupNorm, address, address]
    loaded.run_layers.argtypes = [address, Affine, long, address, address, address, address]
    loaded.block_bytes.argtypes = [ctypes.POINTER(ResidualBlock)]
    loaded.run_block.argtypes = [address, address, address, ctypes.POINTER(ResidualBlock), address, address]
    loaded.read_seconds.argtypes = [address]
    loaded.pack_filters.argtypes = [ctypes.POINTER(Filters), address, address, address, address]
    loaded.unpack_panel.argtypes = [ctypes.POINTER(Packed), long, long, long, long, address]  # for tests
    loaded.bytes_of_panel.argtypes, loaded.bytes_of_panel.restype = [ctypes.POINTER(Packed), long], long
    loaded.unpack_panel.restype = None
    # The next two are parts of `run_layers`, for tests.
    loaded.choose_range.argtypes = [address, Image, Affine, integer, address, address]
    loaded.quantize.argtypes = [address, Image, Rows, Affine, ctypes.c_float, integer, integer, integer, address]
    loaded.choose_range.restype = None
    loaded.pack_filters.restype = None
    loaded.normalize.restype = loaded.run_layers.restype = loaded.run_block.restype = None
    loaded.read_seconds.restype, loaded.block_bytes.restype = None, long
    loaded.plan_windows.argtypes = [address, long, long, long, address, integer, address, address]
    loaded.plan_windows.restype = long
    return loaded


def compiled() -> ctypes.CDLL:
    """Return the compiled C file, where `refusal` found it."""
    found = library()
    assert not isinstance(found, str)
    return found
