"""The structs that csrc/layers.c is passed, field by field as there; a library is compared when it is loaded."""

import ctypes


class Image(ctypes.Structure):
    """The input: as `Image` in the C file."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            *("images", "height", "width", "channels", "border_y", "border_x", "padded_channels", "tiles"),
            "is_doubled",
        )
    ]


class Rows(ctypes.Structure):
    """The rows of codes that are kept at once: as `Rows` in the C file."""

    _fields_ = [(name, ctypes.c_int64) for name in ("first_image", "images", "first_row", "rows")]


class Output(ctypes.Structure):
    """The output: as `Output` in the C file."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("out_height", "out_width", "out_channels", "stride_y", "stride_x", "is_gated", "has_relu")
    ]


class Affine(ctypes.Structure):
    """A map before rounding: as `Affine` in the C file; NULL where there is none."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("gain", "shift")),
        *((name, ctypes.c_int64) for name in ("has_silu", "is_layer_norm")),
        *((name, ctypes.c_float) for name in ("eps", "mean", "inverse_deviation")),
    ]


class Weights(ctypes.Structure):
    """What does not change from call to call: as `Weights` in the C file."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "windows", "window_starts", "level_sum", "scale")),
        ("steps", ctypes.c_int64),
        ("is_signed", ctypes.c_int64),
        ("packed", ctypes.c_void_p),
    ]


class Filters(ctypes.Structure):
    """Levels and scales as PyTorch has them: as `Filters` in the C file."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("levels", "scale")),
        *(
            (name, ctypes.c_int64)
            for name in ("outputs", "channels", "height", "width", "padded_channels", "is_winograd", "is_doubled")
        ),
    ]


class Packed(ctypes.Structure):
    """Weights as they are stored, that calls unpack: as `Packed` in the C file."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("codes", "group_scale", "steps")),
        ("filters", Filters),
        *((name, ctypes.c_int64) for name in ("row_bytes", "bits", "groups", "may_overflow")),
    ]


class Addend(ctypes.Structure):
    """What is added to the output: as `Addend` in the C file; NULL where there is none."""

    _fields_ = [("numbers", ctypes.c_void_p), ("is_per_image", ctypes.c_int64)]


class Layer(ctypes.Structure):
    """A layer at one size of its input and one activation range: as `Layer` in the C file."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weights", "bias")),
        ("image", Image),
        ("output", Output),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("zero_point", "qmax")),
        ("threads", ctypes.c_int64),
    ]


class GroupNorm(ctypes.Structure):
    """The parameters of a group norm: as `GroupNorm` in the C file."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias")),
        ("groups", ctypes.c_int64),
        ("eps", ctypes.c_double),
    ]


class ResidualBlock(ctypes.Structure):
    """A residual block: as `ResidualBlock` in the C file."""

    _fields_ = [
        *((name, GroupNorm) for name in ("norm1", "norm2")),
        *((name, ctypes.c_void_p) for name in ("embedding", "conv1", "conv2", "shortcut")),
        ("embeds_silu", ctypes.c_int64),
    ]


STRUCTS = (Image, Rows, Output, Affine, Weights, Filters, Packed, Addend, Layer, GroupNorm, ResidualBlock)
NO_AFFINE, NO_ADDEND = Affine(), Addend()
