"""The flags of quantizing without data, which `quantize` and `inspect` share."""

from typing import Any

from diffusers_pqcad.loading.config import DEFAULT_WEIGHT_BITS, DENOISER_COMPONENTS, PQCADConfig
from diffusers_pqcad.publishing.settings import Part, config_of

AT_LOAD_TIME = Part(
    "quantized layers",
    PQCADConfig,
    (
        "weight_bits",
        "bit_choices",
        "activation_bits",
        "group_size",
        "method",
        "modules_to_not_convert",
        "search_all_modules",
        "components",
    ),
    helps={
        "weight_bits": "average bits over the weights of the quantized layers, scales not counted; with method fixed, "
        f"the width. None: {DEFAULT_WEIGHT_BITS['progressive']:g}, or {DEFAULT_WEIGHT_BITS['fixed']:g} with fixed"
    },
)


def quantization_of(values: dict[str, Any]) -> PQCADConfig:
    """Return the config of the flags `values`; raises ValueError, naming the flag, for one that cannot be."""
    bits = values["activation_bits"] or None  # a flag cannot be None
    return config_of(AT_LOAD_TIME, values | {"activation_bits": bits})


def chosen(names: list[str], config: PQCADConfig) -> list[str]:
    """Return those of a pipeline's models that `config` quantizes.

    Raises ValueError for a component that the pipeline does not have, and where there is none to quantize.
    """
    missing = sorted(set(config.components_to_quantize or ()) - set(names))
    found = [name for name in names if config.for_component(name) is not None]
    if missing or not found:
        raise ValueError(
            f"components: expected some of this pipeline's models, {names}, got "
            f"{missing or 'none of its own choice, as it has no ' + ' or '.join(DENOISER_COMPONENTS)}."
        )
    return found


def config_for(name: str, config: PQCADConfig) -> PQCADConfig:
    """Return what `config` says of the model `name`, which `chosen` named."""
    found = config.for_component(name)
    assert found is not None  # chosen
    return found
