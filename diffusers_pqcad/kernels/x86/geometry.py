"""The image and the output of a layer for the size of an input, as csrc/layers.c takes them."""

import math
from typing import NamedTuple

import torch

from diffusers_pqcad.kernels.operation import ConvGeometry, Operation
from diffusers_pqcad.kernels.x86.library import DEPTH
from diffusers_pqcad.kernels.x86.packing import round_up
from diffusers_pqcad.kernels.x86.structs import Image, Output

MAX_LINE = 32  # pixels


class Geometry(NamedTuple):
    """What follows from the shape of an input: its image, and the size of the output as C and as PyTorch know it."""

    image: Image
    output: Output
    size: tuple[int, ...]


def geometry_of(operation: Operation, size: torch.Size, *, is_winograd: bool, is_doubled: bool = False) -> Geometry:
    """Return the geometry of `operation` for an input of `size`, of a convolution with a batch.

    With `is_winograd`, a convolution is packed for F(2, 3); with `is_doubled`, its image is one of twice the height
    and the width of the input, by nearest upsampling. Raises ValueError for a size that it cannot take: C would read
    beyond the input.
    """
    channels = operation.shape[1]
    if operation.geometry is None:
        if not size or size[-1] != channels:
            raise ValueError(f"{operation.name}: expected (..., {channels}), got an input of {tuple(size)}.")
        return linear_geometry(operation.shape, size)
    if len(size) != 4 or size[1] != channels:
        raise ValueError(f"{operation.name}: expected (N, {channels}, H, W), got an input of {tuple(size)}.")
    if is_doubled:
        return doubled_geometry(operation.shape, size)
    geometry = conv_geometry(operation.geometry, operation.shape, size, is_winograd=is_winograd)
    if min(geometry.size) < 1:
        raise ValueError(f"{operation.name}: an input of {tuple(size)}, padded, is smaller than the kernel.")
    return geometry


def conv_geometry(conv: ConvGeometry, weight: torch.Size, size: torch.Size, *, is_winograd: bool) -> Geometry:
    """Return the geometry of a convolution with a `weight` (O, C, KH, KW) of an input of `size` (N, C, H, W)."""
    assert not isinstance(conv.padding, str)  # refused
    outputs, channels, *kernel = weight
    height, width = (
        (size[axis + 2] + 2 * conv.padding[axis] - conv.dilation[axis] * (kernel[axis] - 1) - 1) // conv.stride[axis]
        + 1
        for axis in range(2)
    )
    tiles = round_up(width, 2) // 2 if is_winograd else 0
    image = Image(size[0], *size[2:], channels, *conv.padding, round_up(channels, DEPTH), tiles, 0)
    return Geometry(image, Output(height, width, outputs, *conv.stride, 0), (size[0], outputs, height, width))


def doubled_geometry(weight: torch.Size, size: torch.Size) -> Geometry:
    """Return the geometry of a padded 3x3 convolution after nearest upsampling of an input of `size` to its double."""
    (batch, channels, height, width), outputs = size, weight[0]
    image = Image(batch, height, width, channels, 1, 1, round_up(channels, DEPTH), width, 1)
    output = Output(2 * height, 2 * width, outputs, 1, 1, 0)
    return Geometry(image, output, (batch, outputs, 2 * height, 2 * width))


def linear_geometry(weight: torch.Size, size: torch.Size) -> Geometry:
    """Return the geometry of a matrix product with a `weight` (O, K), of an input of `size` (B, ..., K) as B images.

    Threads share lines, and sums over a line are short enough for fp32: they have up to 32 pixels.
    """
    outputs, channels = weight
    images, pixels = (size[0], size[1:-1].numel()) if len(size) > 1 else (1, 1)
    width = math.gcd(pixels, MAX_LINE)
    image = Image(images, pixels // width, width, channels, 0, 0, round_up(channels, DEPTH), 0, 0)
    return Geometry(image, Output(pixels // width, width, outputs, 1, 1, 0), (*size[:-1], outputs))
