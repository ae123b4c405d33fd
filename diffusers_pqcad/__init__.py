"""Progressive quantization and calibration-assisted distillation for diffusers.

Importing this package registers the quantization method "pqcad" with diffusers. Everything else loads on first use.
"""

from importlib import import_module
from typing import Any

from diffusers.quantizers import auto as _auto

from diffusers_pqcad.config import PQCADConfig
from diffusers_pqcad.quantizer import PQCADQuantizer

__version__ = "0.1.0"

_LAZY = {
    "CalibrationSet": "calibration",
    "DistillConfig": "distillation",
    "PQCADConv2d": "layers",
    "PQCADLinear": "layers",
    "ProgressiveConfig": "progressive",
    "collect_calibration_set": "calibration",
    "convert_": "fake_quant",
    "distill": "distillation",
    "evaluate": "evaluation",
    "progressive_quantize": "progressive",
    "quantize_": "convert",
}
__all__ = ["PQCADConfig", "PQCADQuantizer", *_LAZY]

_auto.AUTO_QUANTIZER_MAPPING["pqcad"] = PQCADQuantizer
_auto.AUTO_QUANTIZATION_CONFIG_MAPPING["pqcad"] = PQCADConfig


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
