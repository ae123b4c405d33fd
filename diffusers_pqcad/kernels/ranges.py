"""Activation ranges as plain numbers, one a call: what the int8 kernels of a CPU take."""

from typing import TYPE_CHECKING

from diffusers_pqcad.numerics.qparams import ScalarQParams

if TYPE_CHECKING:
    from diffusers_pqcad.layers.quantized import QuantizedLayer


def static_ranges(layer: "QuantizedLayer") -> list[ScalarQParams] | None:
    """Return the static activation ranges of `layer`, one per timestep group; `None` where calls choose their own."""
    if layer.input_scale is None or layer.input_zero_point is None:
        return None
    return list(map(ScalarQParams, layer.input_scale.tolist(), layer.input_zero_point.tolist()))


def current_range(layer: "QuantizedLayer", ranges: list[ScalarQParams]) -> ScalarQParams:
    """Return the one of `ranges` that belongs to the timestep of this call."""
    group = layer.input_group()
    assert isinstance(group, int)  # `select_kernel` sends a batch of several groups elsewhere
    return ranges[group]
