"""Progressive quantization and calibration-assisted distillation for diffusers.

Importing this package registers its quantization method with diffusers, and with transformers for the text encoders of
its pipelines: as "pqcad", and under the name in saved configs, "diffusers_pqcad"; and the schedulers of students, as
components of pipelines. `push_to_hub` of a quantized pipeline writes its card. Everything else loads on first use.
"""

import sys
from importlib import import_module
from typing import Any

from diffusers_pqcad.cli.help import is_asked_for

__version__ = "0.1.0"

_LAZY = {
    "CalibrationSet": "compression.calibration",
    "CompressConfig": "publishing.settings",
    "DistillConfig": "compression.distillation",
    "PQCADConv1d": "layers.quantized",
    "PQCADConv2d": "layers.quantized",
    "PQCADConv3d": "layers.quantized",
    "PQCADLinear": "layers.quantized",
    "ProgressiveConfig": "compression.progressive",
    "StudentDDIMScheduler": "loading.schedulers",
    "StudentFlowMatchEulerDiscreteScheduler": "loading.schedulers",
    "collect_calibration_set": "compression.recording",
    "compress": "publishing.compress",
    "convert_": "compression.fake_quant",
    "distill": "compression.distillation",
    "evaluate": "evaluation",
    "inspect": "loading.plan",
    "progressive_quantize": "compression.progressive",
    "quantize_": "loading.convert",
    "requantize_": "loading.convert",
}
__all__ = ["PQCADConfig", "PQCADQuantizer", *_LAZY]

if not is_asked_for(sys.orig_argv):  # `pqcad --help` answers at once; the imports below take seconds
    from diffusers_pqcad.loading.notices import quieten_torchao_

    quieten_torchao_()  # before diffusers imports it

    from diffusers import pipelines as _pipelines
    from diffusers.quantizers import auto as _diffusers
    from transformers.quantizers import auto as _transformers

    from diffusers_pqcad.loading.config import METHOD_NAMES, PQCADConfig
    from diffusers_pqcad.loading.quantizer import PQCADQuantizer
    from diffusers_pqcad.loading.transformers_quantizer import PQCADTransformersQuantizer
    from diffusers_pqcad.loading.upload import install_cards

    for _mappings, _quantizer in ((_diffusers, PQCADQuantizer), (_transformers, PQCADTransformersQuantizer)):
        for _name in METHOD_NAMES:
            _mappings.AUTO_QUANTIZER_MAPPING[_name] = _quantizer
            _mappings.AUTO_QUANTIZATION_CONFIG_MAPPING[_name] = PQCADConfig
    # Components of pipelines are looked up in the modules here. The table of libraries
    # beside them takes longer to import.
    setattr(_pipelines, __name__, sys.modules[__name__])
    # What writes cards takes long to import, too, so it waits for the first one.
    install_cards(lambda *saved: import_module(f"{__name__}.publishing.pipeline_push").add_card(*saved))


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
