"""`pqcad inspect`: the layers of a quantized model, or what a config would make of one, without loading weights."""

from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import torch

from diffusers_pqcad.cli.command import Command, Outcome
from diffusers_pqcad.cli.quantization import AT_LOAD_TIME, chosen, config_for, quantization_of
from diffusers_pqcad.cli.saved_source import models_of
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.loading.inspection import Inspection
from diffusers_pqcad.loading.plan import Plan, inspect_skeleton, plan
from diffusers_pqcad.loading.saved import SavedModel, skeleton
from diffusers_pqcad.publishing.settings import Part, config_of


@dataclass(frozen=True)
class InspectConfig:
    """What is looked at."""

    pretrained_model_name_or_path: str | None = field(
        default=None, metadata={"help": "a pipeline or one of its models: a folder, or a repository of the Hub"}
    )


class Settings(NamedTuple):
    """What `pqcad inspect` takes."""

    path: str
    quantization: PQCADConfig


LOOK = Part("model", InspectConfig, ("pretrained_model_name_or_path",))


def settings_of(values: dict[str, Any]) -> Settings:
    """Return the settings of the flags `values`."""
    return Settings(config_of(LOOK, values).pretrained_model_name_or_path, quantization_of(values))


def run(settings: Settings) -> Outcome:
    """Return the table of each quantized model; of a pipeline without one, what the config would do with it."""
    models = models_of(settings.path)
    quantized = {name: model for name, model in models.items() if model.quantization is not None}
    if quantized:
        found: dict[str, Inspection | Plan] = {
            name: inspect_skeleton(skeleton(model)) for name, model in quantized.items()
        }
    else:
        found = dict(plans_of(models, settings.quantization))
    components = {}
    text = []
    for name, layers in found.items():
        asked = settings.quantization.for_component(name) or settings.quantization  # a model alone has any name
        config = quantized[name].quantization if quantized else asked
        components[name] = described(layers) | {"quantization_config": (config or PQCADConfig()).to_diff_dict()}
        text += [f"{name}: {title(models[name])}", str(layers), ""]
    others = sorted(set(models) - set(found))
    if others:
        text.append(f"In floating point, as they are: {', '.join(others)}.")
    if not quantized:
        text.append("Nothing was quantized: this is what `pqcad quantize` would do, with the same flags.")
    document = {"model": settings.path, "is_quantized": bool(quantized), "components": components}
    return Outcome(document, "\n".join(text).rstrip())


def plans_of(
    models: dict[str, SavedModel], config: PQCADConfig, dtype: torch.dtype = torch.float32
) -> dict[str, Plan]:
    """Return what `config` would do with those of a pipeline's models that it quantizes; with a model of its own.

    `dtype` is that of what stays in floating point.
    """
    if len(models) == 1 and config.components is None:
        return {name: plan(skeleton(model), config, dtype) for name, model in models.items()}
    names = chosen(list(models), config)
    return {name: plan(skeleton(models[name]), config_for(name, config), dtype) for name in names}


def title(model: SavedModel) -> str:
    """Return the class of a saved model and its size."""
    name = model.config.get("_class_name") or next(iter(model.config.get("architectures") or ["a model"]))
    return f"{name}, {model.num_bytes / 1e6:.2f} MB"


def described(layers: Inspection | Plan) -> dict[str, Any]:
    """Return the table of a model as JSON values."""
    found: dict[str, Any] = {"layers": [asdict(layer) for layer in layers]}
    if isinstance(layers, Plan):
        sizes = {"num_bytes": layers.num_bytes, "num_bytes_after": layers.num_bytes_after, "is_exact": layers.is_exact}
        return found | sizes
    bits = layers.coverage.average_bits()
    return found | {
        "num_bytes_of_layers": sum(layer.bytes for layer in layers),
        "average_bits": None if bits is None else bits[0],
        "average_bits_all": None if bits is None else bits[1],
        "packed_share": layers.coverage.share(layers.coverage.packed),
    }


COMMAND = Command(
    name="inspect",
    summary="the layers of a quantized model, or what quantizing would make of one; from headers",
    description="Show the layers of a quantized model: bits, activations, kernel, bytes. Of a model in floating "
    "point, show what quantizing it with these flags would do. Weights are not loaded, and not downloaded.",
    example="pqcad inspect outputs/small",
    parts=(LOOK, AT_LOAD_TIME),
    operands={"pretrained_model_name_or_path": "MODEL"},
    settings=settings_of,
    run=run,
)
