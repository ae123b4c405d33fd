"""`PQCADConfig`: what a quantized model's numbers mean. It never says how a computer should run them."""

import copy
import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from enum import Enum
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any, Literal

from diffusers.quantizers.pipe_quant_config import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from diffusers_pqcad.layers.timesteps import checked_boundaries
from diffusers_pqcad.numerics.qparams import ACTIVATION_BITS, WEIGHT_BITS, WeightSpec

FORMAT_VERSION = 2
# The fewest bits at which, without data, the median image has 20 dB to full precision on four small models with 8-bit
# activations (examples/results/method.md); two of them predict epsilon, as SD-1.5 and SDXL do.
DEFAULT_WEIGHT_BITS: dict[str, float] = {"progressive": 5.0, "fixed": 8}
DENOISER_COMPONENTS = ("unet", "transformer", "transformer_2", "prior")
AUTOENCODER_COMPONENTS = ("vae", "vqvae", "movq")
TEXT_ENCODERS = "text_encoder"  # what their names begin with
ALL = "all"  # in the place of components: the denoiser, the text encoders and the autoencoder
# Modules kept in floating point by default: few weights, and in an epsilon model conv_out at 8 bits alone costs 16 dB,
# because the last layer's error is the step's error. Each kind of model has its own names for them.
EXEMPT_MODULES = (
    "conv_in",
    "conv_out",
    "time_embedding",
    "class_embedding",
    "add_embedding",
    "time_proj",
    "pos_embed",
    "proj_out",
    "norm_out",
    "proj_out_1",
    "proj_out_2",
    "time_text_embed",
    "context_embedder",
    "x_embedder",
    "adaln_single",
    "caption_projection",
    "controlnet_cond_embedding",
    "controlnet_down_blocks",
    "controlnet_mid_block",
    "encoder.conv_in",
    "encoder.conv_out",
    "quant_conv",
    "post_quant_conv",
    "decoder.conv_in",
    "decoder.conv_out",
)


class PQCADMethod(str, Enum):  # noqa: UP042 - StrEnum prints as its value; diffusers' own enum is this one's model
    """The method's name in saved configs; an Enum because the loader reads `.value`.

    It is the package's name: a loader that does not know the method prints it, and so says what to import.
    """

    PQCAD = "diffusers_pqcad"


SHORT_NAME = "pqcad"  # what users write, and what files of format version 1 say
METHOD_NAMES = (SHORT_NAME, PQCADMethod.PQCAD.value)


def matches(name: str, pattern: str) -> bool:
    """Return whether module `name` is `pattern`, lies below it, has it as one of its parts, or fits it as a glob."""
    parts = name.split(".")
    return name == pattern or name.startswith(f"{pattern}.") or pattern in parts or fnmatchcase(name, pattern)


def is_integer(value: Any) -> bool:
    """Return whether `value` is an integer; a bool is none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def check_format_version(version: Any) -> int:
    """Return `version`; raise ValueError for no version, or one that only a newer version of this package can read."""
    if not is_integer(version) or version < 1:
        raise ValueError(f"format_version: expected an integer from 1 to {FORMAT_VERSION}, got {version!r}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"format_version {version} is newer than this package can read ({FORMAT_VERSION}); upgrade "
            "diffusers-pqcad."
        )
    return int(version)


def positive_integer(setting: str, value: Any) -> int | None:
    """Return `value` as an int, or `None`; raise ValueError, naming `setting`, for anything else."""
    if value is not None and not (is_integer(value) and value >= 1):
        raise ValueError(f"{setting}: expected a positive integer or None, got {value!r}.")
    return None if value is None else int(value)


def list_of_names(setting: str, value: Any) -> list[str]:
    """Return `value` as a list; raise ValueError, naming `setting`, where it is no list of strings."""
    if isinstance(value, str):
        raise ValueError(f"{setting}: expected a list of names, got the string {value!r}.")
    if not isinstance(value, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{setting}: expected a list of names, got {value!r}.")
    return list(value)


def list_of_components(value: Any) -> list[str]:
    """Return `value` as a list, ["all"] for "all"; raise ValueError for others than "all" or a list of names."""
    if isinstance(value, str) and value != ALL:
        raise ValueError(
            f"components: expected {ALL!r} or a list of names, got the string {value!r}. One component is a list of "
            f"one: [{value!r}]."
        )
    names = [ALL] if value == ALL else list_of_names("components", value)
    if ALL in names and names != [ALL]:
        others = [name for name in names if name != ALL]
        raise ValueError(
            f"components: expected {ALL!r} or names of components, got both: {names}. {ALL!r} stands alone, and names "
            f"the denoiser, the text encoders and the VAE; leave it or {others} out."
        )
    return names


def is_width(value: Any) -> bool:
    """Return whether `value` is one of WEIGHT_BITS; whole floats are."""
    return isinstance(value, Real) and not isinstance(value, bool) and value in WEIGHT_BITS


def choices_of_bits(value: Any) -> tuple[int, ...]:
    """Return `value` as widths, each once, the largest first; raise ValueError for others than some of WEIGHT_BITS."""
    if not isinstance(value, list | tuple | set | frozenset) or not value or not all(map(is_width, value)):
        given = list(value) if isinstance(value, list | tuple | set | frozenset) else value
        raise ValueError(f"bit_choices: expected some of {WEIGHT_BITS}, got {given!r}.")
    return tuple(sorted({int(bits) for bits in value}, reverse=True))


def bits_by_name(value: Any) -> dict[str, int]:
    """Return `value` as widths by layer; raise ValueError for anything but a mapping of names to WEIGHT_BITS."""
    if not isinstance(value, Mapping):
        raise ValueError(f"weight_bits_by_module: expected a dict of layers' names to widths, got {value!r}.")
    wrong = {name: bits for name, bits in value.items() if not isinstance(name, str) or not is_width(bits)}
    if wrong:
        raise ValueError(f"weight_bits_by_module: expected widths out of {WEIGHT_BITS}, got {wrong}.")
    return {name: int(bits) for name, bits in value.items()}


@dataclass(kw_only=True, repr=False)
class PQCADConfig(QuantizationConfigMixin, PipelineQuantizationConfig):
    """Settings of a quantized model, accepted by a model's and by a pipeline's `from_pretrained` alike.

    Args:
        weight_bits: average bits over the weights of the searched layers, scales not counted; with method "fixed",
            the width. `None`: 5.0, or 8 with "fixed" (DEFAULT_WEIGHT_BITS).
        bit_choices: the widths that "progressive" may give a layer, out of 8, 6, 4, 3 and 2.
        activation_bits: 8 or 7 (asymmetric uint8 per tensor), or `None` to keep activations in floating point. With 7,
            at twice the rounding step, 3x3 convolutions are a little faster on CPUs with VNNI, and layers of 8 bits
            run as int8 also on CPUs that have neither VNNI nor a C compiler.
        group_size: inputs that share a weight scale in Linear layers; `None`: one scale per output channel.
        method: "progressive" (bits per layer, moved in two stages under a momentum) or "fixed" (round to nearest at
            one width).
        modules_to_not_convert: names, parts of names or globs of layers that stay in floating point, besides the
            default exemptions.
        search_all_modules: also quantize what is exempt by default (first and last convolution, time embedding, the
            shortcuts in a UNet's last up block).
        components: the names of the pipeline components to quantize, text encoders included, each by these settings;
            or "all", which is kept as ["all"]: the denoiser by these settings, and its text encoders and VAE at one
            width for all their layers, the largest of `bit_choices`, 8 bits unless that says otherwise, by
            `activation_bits` and `search_all_modules` alone (see `for_component`). `None`: the denoiser.
        weight_bits_by_module: bits of every quantized layer, as PQ decided; filled on quantization.
        timestep_boundaries: boundaries of the static activation ranges' timestep groups, increasing numbers: integers,
            or floats for models that are called with t / 1000; `None`: dynamic ranges.
        num_inference_steps: the number of sampling steps that a student was distilled for.
        guidance_folded: whether a student answers in one branch what guidance made of its teacher's two.
        packed_share: the packed weights as a share (0 to 1) of all weights of the model; filled on quantization.
        format_version: version of the stored format that a file has; what is saved has the newest.

    Raises ValueError for a value outside these.
    """

    # __post_init__ puts the method's default in the place of None.
    weight_bits: float = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "average bits over the weights of the quantized layers, scales not counted"},
    )
    bit_choices: tuple[int, ...] = field(
        default=(8, 6, 4, 3, 2), metadata={"help": "the widths that a layer may get, out of 8, 6, 4, 3 and 2"}
    )
    activation_bits: int | None = field(
        default=8, metadata={"help": "bits of the activations: 8, 7, or 0 to keep them in floating point"}
    )
    group_size: int | None = field(
        default=None,
        metadata={"help": "inputs that share a weight scale in Linear layers; None: one scale per output channel"},
    )
    method: Literal["progressive", "fixed"] = field(
        default="progressive",
        metadata={"help": "bits for each layer under an average budget, or one width for all, rounded to nearest"},
    )
    modules_to_not_convert: list[str] = field(
        default_factory=list,
        metadata={"help": "names, parts of names or globs of further layers that stay in floating point"},
    )
    search_all_modules: bool = field(
        default=False,
        metadata={"help": "also quantize what stays in floating point by default, as the last layers do"},
    )
    components: list[str] | None = field(
        default=None,
        metadata={
            "help": "parts of the pipeline to quantize, text encoders among them; all: its denoiser, and its text "
            "encoders and VAE at 8 bits; None: its denoiser"
        },
    )
    weight_bits_by_module: dict[str, int] = field(default_factory=dict)
    timestep_boundaries: list[int | float] | None = None
    num_inference_steps: int | None = None
    guidance_folded: bool = False
    packed_share: float | None = None
    format_version: int = FORMAT_VERSION
    quant_method: PQCADMethod = PQCADMethod.PQCAD

    def __post_init__(self) -> None:
        self.format_version = check_format_version(self.format_version)
        if self.quant_method not in METHOD_NAMES:
            raise ValueError(f"quant_method: expected one of {METHOD_NAMES}, got {self.quant_method!r}.")
        self.quant_method = PQCADMethod.PQCAD
        if self.method not in ("progressive", "fixed"):
            raise ValueError(f"method: expected 'progressive' or 'fixed', got {self.method!r}.")
        if self.weight_bits is None:
            self.weight_bits = DEFAULT_WEIGHT_BITS[self.method]
        for name in ("search_all_modules", "guidance_folded"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name}: expected True or False, got {getattr(self, name)!r}.")
        self.bit_choices = choices_of_bits(self.bit_choices)
        self._check_weight_bits()
        if not (self.activation_bits is None or is_integer(self.activation_bits)) or (
            self.activation_bits not in (*ACTIVATION_BITS, None)
        ):
            raise ValueError(
                f"activation_bits: expected one of {ACTIVATION_BITS} or None, got {self.activation_bits!r}."
            )
        self.group_size = positive_integer("group_size", self.group_size)
        self.num_inference_steps = positive_integer("num_inference_steps", self.num_inference_steps)
        skipped, bits = self.modules_to_not_convert, self.weight_bits_by_module
        self.modules_to_not_convert = [] if skipped is None else list_of_names("modules_to_not_convert", skipped)
        self.components = None if self.components is None else list_of_components(self.components)
        self.weight_bits_by_module = {} if bits is None else bits_by_name(bits)
        other = {name: width for name, width in self.weight_bits_by_module.items() if width != self.weight_bits}
        if self.method == "fixed" and other:
            raise ValueError(
                f"weight_bits_by_module: method 'fixed' gives every layer {self.weight_bits} bits, got {other}."
            )
        if self.timestep_boundaries is not None:
            self.timestep_boundaries = list(checked_boundaries(self.timestep_boundaries))
        share = self.packed_share
        if share is not None and (isinstance(share, bool) or not isinstance(share, Real) or not 0 <= share <= 1):
            raise ValueError(f"packed_share: expected a number from 0 to 1 or None, got {share!r}.")

    def _check_weight_bits(self) -> None:
        if not isinstance(self.weight_bits, Real) or isinstance(self.weight_bits, bool):
            raise ValueError(f"weight_bits: expected a number, got {self.weight_bits!r}.")
        if self.method == "fixed" and self.weight_bits not in WEIGHT_BITS:
            raise ValueError(
                f"weight_bits: method 'fixed' takes one width out of {WEIGHT_BITS}, got {self.weight_bits}. "
                "Use method='progressive' for an average."
            )
        low, high = min(self.bit_choices), max(self.bit_choices)
        if self.method == "progressive" and not low <= self.weight_bits <= high:
            raise ValueError(
                f"weight_bits: an average of {self.weight_bits} cannot be met with bit_choices "
                f"{list(self.bit_choices)}; expected {low} to {high}."
            )

    # What PipelineQuantizationConfig's own __init__ would set; class-level, so that none of it is saved.
    quant_mapping = None
    quant_backend = SHORT_NAME
    quant_kwargs = None
    is_granular = False

    @property
    def components_to_quantize(self) -> list[str] | None:
        """The components named by the user: diffusers warns about those that the pipeline lacks."""
        return None if self.components == [ALL] else self.components

    def for_component(self, name: str) -> "PQCADConfig | None":
        """Return the config of the pipeline component `name`, a new one; `None` for one that stays as it is.

        With `components="all"`, the denoiser's names no components, as others have configs of their own: text encoders
        and VAE, which run once an image, are small beside it, and lose more at fewer bits, get the largest width.
        """
        if self.components != [ALL]:
            chosen = DENOISER_COMPONENTS if self.components is None else self.components
            return copy.deepcopy(self) if name in chosen else None
        if name in DENOISER_COMPONENTS:
            return PQCADConfig(**self.to_dict() | {"components": None})
        if name not in AUTOENCODER_COMPONENTS and not name.startswith(TEXT_ENCODERS):
            return None
        return PQCADConfig(
            method="fixed",
            weight_bits=max(self.bit_choices),
            activation_bits=self.activation_bits,
            search_all_modules=self.search_all_modules,
        )

    def is_exempt(self, name: str) -> bool:
        """Return whether the module `name` stays in floating point."""
        by_default = not self.search_all_modules and f"{name}.".startswith(
            tuple(f"{part}." for part in EXEMPT_MODULES)
        )
        return by_default or any(matches(name, pattern) for pattern in self.modules_to_not_convert)

    def check_patterns(self, names: Iterable[str]) -> None:
        """Raise ValueError for a user's pattern that fits none of the quantizable layers `names`: a typo, likely."""
        names = list(names)
        for pattern in self.modules_to_not_convert:
            if not any(matches(name, pattern) for name in names):
                raise ValueError(
                    f"modules_to_not_convert: {pattern!r} matches none of the {len(names)} quantizable layers "
                    f"(such as {names[:3]}). Give a name, a part of a name, or a glob."
                )

    def weight_spec(self, name: str, *, is_linear: bool) -> WeightSpec:
        """Return the decided grid of the layer `name`; groups apply to Linear layers only."""
        bits = int(self.weight_bits) if self.method == "fixed" else self.weight_bits_by_module.get(name)
        if bits is None:
            raise ValueError(
                f"{name}: the config of this quantized model says nothing about it (weight_bits_by_module has "
                f"{len(self.weight_bits_by_module)} layers). The config was edited, or belongs to another model."
            )
        return WeightSpec(bits, self.group_size if is_linear else None)

    def to_dict(self) -> dict[str, Any]:
        """Return all settings as plain JSON values."""
        values = {item.name: copy.deepcopy(getattr(self, item.name)) for item in fields(self)}
        return values | {"quant_method": self.quant_method.value, "bit_choices": list(self.bit_choices)}

    def to_diff_dict(self) -> dict[str, Any]:
        """Return the settings that differ from the defaults, and `quant_method`."""
        values = self.to_dict()
        for item in fields(self):
            default = item.default_factory() if item.default_factory is not MISSING else item.default
            default = DEFAULT_WEIGHT_BITS[self.method] if item.name == "weight_bits" else default
            if item.name != "quant_method" and getattr(self, item.name) == default:
                del values[item.name]
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Return the config of `config_dict`; unknown keys are refused (ValueError), never dropped."""
        check_format_version(config_dict.get("format_version", FORMAT_VERSION))  # before its new keys are refused
        known = {item.name for item in fields(cls)}
        unknown = sorted(set(config_dict) - known)
        if unknown:
            raise ValueError(f"PQCADConfig: unknown settings {unknown}; expected some of {sorted(known)}.")
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({json.dumps(self.to_diff_dict(), sort_keys=True)})"

    def _resolve_quant_config(self, is_diffusers: bool = True, module_name: str | None = None) -> Any:
        """Answer diffusers' pipeline loader: `for_component`."""
        return None if module_name is None else self.for_component(module_name)
