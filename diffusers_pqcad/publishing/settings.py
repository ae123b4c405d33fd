"""Settings of `compress`: the package's own dataclasses, and their fields as flags, presets and YAML files."""

import dataclasses
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

import yaml
from transformers import HfArgumentParser

from diffusers_pqcad.compression.distillation import DistillConfig
from diffusers_pqcad.compression.optimization import check_minimum
from diffusers_pqcad.compression.precision import MixedPrecision, check_mixed_precision
from diffusers_pqcad.compression.progressive import WEIGHT_BITS, ProgressiveConfig
from diffusers_pqcad.compression.reconstruction import ReconstructionConfig
from diffusers_pqcad.evaluation.perceptual import LPIPSNetwork
from diffusers_pqcad.loading.config import PQCADConfig

# What an ablation takes away, or adds: PQ's momentum and several widths; CAD's teacher, its rounding, the calibration
# term, and folded guidance, the other way round; all data.
ABLATIONS = ("momentum", "width", "teacher", "float_teacher", "calibration", "guidance", "load_time")
PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "full": {
        "num_images": 10_000,
        "num_trajectories": 512,
        "rounds_per_stage": 3,
        "price_batch_size": 32,
        "reconstruction_iterations": 300,
        "reconstruction_batch_size": 32,
        "max_train_steps": 3_000,
        "evaluation_steps": 100,
        "ablations": True,
    },
    "smoke": {
        "num_images": 8,
        "num_trajectories": 8,
        "num_inference_steps": 4,
        "num_halvings": 1,
        "rounds_per_stage": 1,
        "price_batch_size": 4,
        "reconstruction_iterations": 2,
        "reconstruction_samples": 16,
        "max_train_steps": 4,
        "train_batch_size": 4,
        "evaluation_steps": 2,
        "num_latency_rounds": 1,
        "measure_memory": False,
    },
}


TrackerName = Literal["tensorboard", "trackio", "wandb"]
# What is at least 1 where it is given.
COUNTS = (
    "height",
    "width",
    "max_sequence_length",
    "own_num_inference_steps",
    "sampling_batch_size",
    "validation_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
)


@dataclass(frozen=True)
class CompressConfig:
    """Settings of a run of `compress` beside those of its methods: what it takes, measures, writes and pushes."""

    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "the pipeline: a folder, or a repository of the Hub; None: the bundled teacher"},
    )
    revision: str | None = field(
        default=None,
        metadata={"help": "branch, tag or commit of the pipeline's repository on the Hub; None: main"},
    )
    variant: str | None = field(
        default=None,
        metadata={"help": "variant of the pipeline's weight files, such as fp16; they are computed with in float32"},
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "folder where what is downloaded is kept; None: that of huggingface_hub and of datasets"},
    )
    lora_weights: str | None = field(
        default=None,
        metadata={
            "help": "LoRA of the pipeline's denoiser, such as a few-step one: a folder or a file of safetensors, as "
            "load_lora_weights takes it; it stays in floating point, and is saved beside the quantized pipeline"
        },
    )
    output_dir: str = field(
        default="outputs/distill",
        metadata={"help": "folder of the result; the same run goes on there after a kill", "aliases": ["-o"]},
    )
    num_inference_steps: int = field(
        default=20, metadata={"help": "steps of the teacher; the student takes half of them, num_halvings times"}
    )
    num_halvings: int = field(
        default=1,
        metadata={
            "help": "times that CAD halves the steps, each student the next one's teacher; 0: it keeps the steps, and "
            "learns what quantization took away"
        },
    )
    num_trajectories: int = field(
        default=128, metadata={"help": "full-precision trajectories of the calibration set; an eighth is held out"}
    )
    calibration_set: str | None = field(
        default=None,
        metadata={
            "help": "folder of a calibration set that `pqcad calibrate` recorded with these steps, prompts, guidance "
            "and sizes; None: one is recorded"
        },
    )
    prompts_file: str | None = field(
        default=None,
        metadata={
            "help": "text file with a prompt in each line, for text-to-image pipelines: the first num_trajectories "
            "are recorded, the others measured; a copy is kept in output_dir. None: those of dataset_name, or of "
            "prompts.txt in the pipeline's folder"
        },
    )
    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "data set with prompts, in the place of prompts_file: a repository of the Hub or a folder, of "
            "whose split 'train' as many rows are drawn as are recorded and measured"
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "configuration of that data set; None: its only one"}
    )
    prompt_column: str = field(default="text", metadata={"help": "column of that data set that holds the prompts"})
    negative_prompt: str | None = field(default=None, metadata={"help": "negative prompt of all prompts"})
    class_labels: list[int] | None = field(default=None, metadata={"help": "classes, for pipelines that take them"})
    guidance_scale: float | None = field(
        default=None, metadata={"help": "scale of the guidance; None: the pipeline's own"}
    )
    height: int | None = field(default=None, metadata={"help": "height of the images; None: the pipeline's own"})
    width: int | None = field(default=None, metadata={"help": "width of the images; None: the pipeline's own"})
    max_sequence_length: int | None = field(
        default=None, metadata={"help": "tokens of a prompt, where the pipeline takes it; None: the pipeline's own"}
    )
    own_num_inference_steps: int | None = field(
        default=None,
        metadata={
            "help": "steps of the row in which the pipeline runs by its own scheduler, where that was replaced; None: "
            "the pipeline's default"
        },
    )
    float_steps: list[int] | None = field(
        default=None,
        metadata={
            "help": "further numbers of steps in which full precision is measured: those that cost what the student "
            "costs, or what else it should be compared with"
        },
    )
    sampling_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "images of one call of the pipeline, in recording and measuring; None: 64 where it makes "
            "pixels, 4 where it decodes latents"
        },
    )
    validation_prompts: list[str] | None = field(
        default=None,
        metadata={
            "help": "prompts of which a student's pictures are drawn beside the teacher's while it trains, in "
            "output_dir/validation and for report_to; None: of what is measured, with validation_steps"
        },
    )
    validation_steps: int | None = field(
        default=None,
        metadata={
            "help": "updates of a student between two such grids, which are made on the CPU; None: 100 with "
            "validation_prompts, else there are none"
        },
    )
    num_images: int = field(default=1_000, metadata={"help": "images that are measured for each row of the table"})
    num_latency_rounds: int = field(
        default=3, metadata={"help": "rounds of the time measurements, in turns with full precision"}
    )
    measure_memory: bool = field(
        default=True,
        metadata={
            "help": "measure the memory while sampling, beside full precision in float32 and bfloat16, in three "
            "processes, one after the other"
        },
    )
    ablations: bool = field(
        default=False,
        metadata={"help": "add rows for what each part of the method is worth; takes several times as long"},
    )
    only_ablations: list[str] | None = field(
        default=None,
        metadata={
            "help": f"of the ablations only these, out of {', '.join(ABLATIONS)}; others can follow in the same folder"
        },
    )
    extractor: str | None = field(
        default=None,
        metadata={
            "help": "folder of a feature extractor, for the distance; None: the bundled teacher's, or no distance"
        },
    )
    lpips: LPIPSNetwork | None = field(
        default=None,
        metadata={
            "help": "network of LPIPS, by which the pictures are compared, too; needs the extra 'metrics', and "
            "downloads its weights. None: not measured"
        },
    )
    clip_model: str | None = field(
        default=None,
        metadata={
            "help": "CLIP model of the CLIP score, a repository of the Hub or a folder; needs the extra 'metrics'. "
            "None: not measured"
        },
    )
    train_device: str = field(
        default="cpu",
        metadata={"help": "where PQ and CAD train, 'cpu' or as 'cuda'; the table is measured on the CPU in any case"},
    )
    allow_tf32: bool = field(
        default=False,
        metadata={
            "help": "let NVIDIA's tensor cores round the inputs of float32 products to 10 bits (TF32) in PQ and CAD: "
            "faster, and other figures"
        },
    )
    mixed_precision: MixedPrecision = field(
        default="no",
        metadata={
            "help": "bf16: the reference of PQ and the teacher of CAD hold bf16 numbers, and what trains computes in "
            "bf16; its weights, and what is packed, are those of fp32"
        },
    )
    offload_to_disk: bool = field(
        default=False,
        metadata={
            "help": "keep what waits in unnamed files of output_dir: averages, the best state, captured inputs, and "
            "on a CPU the reference, the teacher and what is not trained; less memory, the same numbers"
        },
    )
    # accelerate launch sets a single OpenMP thread
    num_threads: int = field(default=0, metadata={"help": "threads of torch; 0: all cores that this process may use"})
    seed: int = field(default=42, metadata={"help": "seed of all draws"})
    report_to: TrackerName | None = field(
        default=None,
        metadata={
            "help": "tracker that is told each update's losses and rates, and shown the grids; None: none, and "
            "assets/curves.png in any case"
        },
    )
    logging_dir: str = field(default="logs", metadata={"help": "folder of tensorboard's files, in output_dir"})
    tracker_project_name: str = field(
        default="pqcad-compress", metadata={"help": "project of the tracker; a folder is one of its runs"}
    )
    checkpointing_steps: int | None = field(
        default=None,
        metadata={
            "help": "updates of a student between two checkpoints, output_dir/checkpoint-STEP, where STEP counts the "
            "updates of all students; None: one that is replaced at each measurement, in output_dir/state"
        },
    )
    checkpoints_total_limit: int | None = field(
        default=None, metadata={"help": "checkpoints of those that are kept, the last ones; None: all"}
    )
    resume_from_checkpoint: str = field(
        default="latest",
        metadata={
            "help": "what a run in its folder goes on from: latest, the last that the folder holds of any stage, or "
            "checkpoint-STEP, to go back to it in a training that is not finished"
        },
    )
    push_to_hub: bool = field(default=False, metadata={"help": "publish the folder on the Hub at the end"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository to publish in: user/name"})
    hub_private_repo: bool = field(default=False, metadata={"help": "create that repository as a private one"})
    license: str | None = field(default=None, metadata={"help": "license of the teacher, for the model card"})

    def __post_init__(self) -> None:
        check_minimum(self, num_inference_steps=2, num_trajectories=4, num_images=2, num_latency_rounds=1)
        check_minimum(self, num_threads=0, seed=0, num_halvings=0)
        if self.report_to is not None and self.report_to not in get_args(TrackerName):
            raise ValueError(f"report_to: expected one of {get_args(TrackerName)}, got {self.report_to!r}.")
        if self.checkpoints_total_limit is not None and self.checkpointing_steps is None:
            raise ValueError("checkpoints_total_limit: of which checkpoints? Give checkpointing_steps, too.")
        check_minimum(self, **{name: 1 for name in COUNTS if getattr(self, name) is not None})
        check_mixed_precision(self.mixed_precision)
        if any(count < 1 for count in self.float_steps or ()):
            raise ValueError(f"float_steps: expected numbers of at least 1, got {self.float_steps}.")
        networks = get_args(LPIPSNetwork)
        if self.lpips is not None and self.lpips not in networks:
            raise ValueError(f"lpips: expected one of {networks}, got {self.lpips!r}.")
        if self.prompts_file is not None and self.dataset_name is not None:
            raise ValueError("dataset_name: prompts come from it or from prompts_file; leave one out.")
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError("dataset_config_name: of which data set? Give dataset_name, too.")
        if self.class_labels and (self.prompts_file is not None or self.dataset_name is not None):
            raise ValueError("class_labels: a pipeline takes prompts or classes; leave one out.")
        if self.only_ablations is not None:
            unknown = sorted(set(self.only_ablations) - set(ABLATIONS))
            if unknown or not self.ablations:
                wrong = f"got {unknown}" if unknown else "and ablations=True with them"
                raise ValueError(f"only_ablations: expected some of {', '.join(ABLATIONS)}, {wrong}.")
        if self.num_halvings == 1 and self.num_inference_steps % 2:
            raise ValueError(f"num_inference_steps={self.num_inference_steps} is odd; a student takes half the steps.")
        if self.num_inference_steps % 2**self.num_halvings:
            raise ValueError(
                f"num_inference_steps={self.num_inference_steps} cannot be halved {self.num_halvings} times; take a "
                f"multiple of {2**self.num_halvings}, or fewer num_halvings."
            )
        if self.push_to_hub and not self.hub_model_id:
            raise ValueError("push_to_hub needs a hub_model_id: user/name.")

    def wanted_ablations(self) -> tuple[str, ...]:
        """Return the names of the ablations to run."""
        if not self.ablations:
            return ()
        return ABLATIONS if self.only_ablations is None else tuple(self.only_ablations)


class Settings(NamedTuple):
    """Everything that `compress` takes, in its order."""

    run: CompressConfig
    quantization: PQCADConfig
    progressive: ProgressiveConfig
    distillation: DistillConfig


class Part(NamedTuple):
    """A dataclass and those of its fields that are flags; `prefix` comes before each name.

    `defaults` and `helps` are those of flags that a command has in the place of the dataclass's own.
    """

    title: str
    kind: type
    names: tuple[str, ...]
    prefix: str = ""
    defaults: Mapping[str, Any] = {}
    helps: Mapping[str, str] = {}


def _names(kind: type, *, without: Sequence[str] = ()) -> tuple[str, ...]:
    return tuple(item.name for item in dataclasses.fields(kind) if item.name not in without)


OF_THE_RUN = ("seed", "mixed_precision")  # one flag, for all parts
RUN = Part("run", CompressConfig, _names(CompressConfig))
QUANTIZATION = Part(
    "quantized layers",
    PQCADConfig,
    ("weight_bits", "bit_choices", "activation_bits", "group_size", "modules_to_not_convert"),
    defaults={"weight_bits": WEIGHT_BITS},  # the config's own is for loading, without data
)
PROGRESSIVE = Part(
    "PQ, progressive quantization",
    ProgressiveConfig,
    _names(ProgressiveConfig, without=("reconstruction", *OF_THE_RUN)),
)
RECONSTRUCTION = Part("PQ's reconstruction", ReconstructionConfig, _names(ReconstructionConfig), "reconstruction_")
DISTILLATION = Part("CAD, distillation", DistillConfig, _names(DistillConfig, without=OF_THE_RUN))
PARTS = (RUN, QUANTIZATION, PROGRESSIVE, RECONSTRUCTION, DISTILLATION)


def complete(
    run: CompressConfig,
    quantization: PQCADConfig | None = None,
    progressive: ProgressiveConfig | None = None,
    distillation: DistillConfig | None = None,
) -> Settings:
    """Return the settings of a run, with defaults for what is missing; all parts have the run's seed and precision.

    Raises ValueError for a `quantization` that says more than its flags do: a recipe would not repeat the run.
    """
    quantization = PQCADConfig(weight_bits=WEIGHT_BITS) if quantization is None else quantization
    others = sorted(set(quantization.to_diff_dict()) - {*QUANTIZATION.names, "quant_method"})
    if others:
        raise ValueError(f"quantization: expected settings of {QUANTIZATION.names} alone, got {others}, too.")
    progressive, distillation = progressive or ProgressiveConfig(), distillation or DistillConfig()
    shared: dict[str, Any] = {name: getattr(run, name) for name in OF_THE_RUN}
    return Settings(
        run,
        quantization,
        dataclasses.replace(progressive, **shared),
        dataclasses.replace(distillation, **shared),
    )


def flat(settings: Settings) -> dict[str, Any]:
    """Return the value of every flag, as YAML has them; `settings_of` turns it back."""
    run, quantization, progressive, distillation = settings
    configs = (run, quantization, progressive, progressive.reconstruction, distillation)
    values = {
        part.prefix + name: getattr(config, name)
        for part, config in zip(PARTS, configs, strict=True)
        for name in part.names
    }
    # A flag cannot be None.
    return values | {
        "activation_bits": quantization.activation_bits or 0,
        "bit_choices": list(quantization.bit_choices),
        "modules_to_not_convert": list(quantization.modules_to_not_convert),
    }


def settings_of(values: dict[str, Any]) -> Settings:
    """Return the settings of the flags `values`; those that are missing have their defaults.

    Raises ValueError, naming the flag, for an unknown one or a value that cannot be.
    """
    check_known(values)
    values = {"weight_bits": WEIGHT_BITS} | values
    if values.get("activation_bits") == 0:
        values["activation_bits"] = None
    reconstruction = config_of(RECONSTRUCTION, values)
    return complete(
        config_of(RUN, values),
        config_of(QUANTIZATION, values),
        config_of(PROGRESSIVE, values, reconstruction=reconstruction),
        config_of(DISTILLATION, values),
    )


def config_of(part: Part, values: Mapping[str, Any], **others: Any) -> Any:
    """Return the dataclass of `part`, with those of the flags `values` that are its, and `others`.

    Raises ValueError, naming the flag, for a value that cannot be.
    """
    given = {name: values[part.prefix + name] for name in part.names if part.prefix + name in values}
    try:
        return part.kind(**given, **others)
    except ValueError as error:  # it names the field first
        raise ValueError(f"{part.prefix}{error}") from None


def flags_of(part: Part) -> type:
    """Return a dataclass of the flags of `part`, with types, defaults and help texts, as HfArgumentParser takes it."""
    types, flags = get_type_hints(part.kind), []
    for item in dataclasses.fields(part.kind):
        if item.name not in part.names:
            continue
        kind, default = types[item.name], item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        default = part.defaults.get(item.name, default)
        metadata = item.metadata if item.name not in part.helps else {**item.metadata, "help": part.helps[item.name]}
        flag: Any
        if get_origin(kind) in (list, tuple):
            kind = list[get_args(kind)[0]]  # type: ignore[misc]
            flag = field(default_factory=partial(list, default), metadata=metadata)
        else:
            flag = field(default=default, metadata=metadata)
        flags.append((part.prefix + item.name, kind, flag))
    return dataclasses.make_dataclass(part.kind.__name__, flags, namespace={"_argument_group_name": part.title})


def flag_types(parts: Sequence[Part] = PARTS) -> dict[str, Any]:
    """Return the type of every flag by its name."""
    return {item.name: item.type for part in parts for item in dataclasses.fields(flags_of(part))}


def check_known(values: dict[str, Any], where: str = "settings", parts: Sequence[Part] = PARTS) -> None:
    """Raise ValueError, naming them, for `values` that are no flags."""
    unknown = sorted(set(values) - set(flag_types(parts)), key=str)
    if unknown:
        raise ValueError(f"{where}: unknown settings {unknown}.")


def read_yaml(path: str | Path, parts: Sequence[Part] = PARTS) -> dict[str, Any]:
    """Return the settings of a YAML file as a command line would have them: words, which its parser converts.

    Raises ValueError for a file that is missing, is no mapping, or has unknown settings or a null where none can be.
    """
    if not Path(path).is_file():
        raise ValueError(f"--config: there is no file {str(path)!r}.")
    values = yaml.safe_load(Path(path).read_text())
    if not isinstance(values, dict | None):
        raise ValueError(f"{path}: expected lines of `setting: value`, got {type(values).__name__}.")
    values = values or {}
    check_known(values, str(path), parts)
    types = flag_types(parts)
    for name, value in values.items():
        if value is None and type(None) not in get_args(types[name]):
            raise ValueError(f"{path}: {name}: expected a value, got null.")
        is_list = get_origin(types[name]) is list
        if is_list and not isinstance(value, list):
            raise ValueError(f"{path}: {name}: expected a list, got {value!r}.")
        if value is not None and not is_list:
            values[name] = str(value)
    return values


def parse_settings(arguments: Sequence[str], description: str | None = None) -> Settings:
    """Return the settings of a command line: defaults, then `--preset`, then the YAML file `--config`, then flags."""
    return settings_of(parse_values(arguments, description))


def parse_values(
    arguments: Sequence[str],
    description: str | None = None,
    defaults_of: Callable[[str | None], Mapping[str, Any]] = lambda path: {},
    parts: Sequence[Part] = PARTS,
) -> dict[str, Any]:
    """Return the values of the flags of `parts` on a command line.

    Defaults come first, then `--preset`, then the YAML file `--config`, then flags.
    `defaults_of(pretrained_model_name_or_path)` are defaults of a pipeline, which come before the preset.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", help="YAML file of settings; flags override it")
    first.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        default="default",
        help="set of defaults: 'smoke' tries, 'full' takes hours",
    )
    chosen, rest = first.parse_known_args(arguments)
    given = read_yaml(chosen.config) if chosen.config else {}
    pipeline = ArgumentParser(add_help=False, allow_abbrev=False)
    pipeline.add_argument("--pretrained_model_name_or_path", default=given.get("pretrained_model_name_or_path"))
    path = pipeline.parse_known_args(rest)[0].pretrained_model_name_or_path
    defaults = {**defaults_of(path), **PRESETS[chosen.preset], **given}
    parser = HfArgumentParser(
        [flags_of(part) for part in parts], parents=[first], description=description, allow_abbrev=False
    )
    parser.set_defaults(**defaults)
    values = vars(parser.parse_args(rest))
    return {name: value for name, value in values.items() if name not in vars(chosen)}
