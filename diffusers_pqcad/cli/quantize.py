"""`pqcad quantize`: a float pipeline to a packed one, from its weights alone."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from diffusers import DiffusionPipeline

from diffusers_pqcad.cli.command import TRIAL, Command, Outcome, Trial
from diffusers_pqcad.cli.inspect import described, plans_of
from diffusers_pqcad.cli.quantization import AT_LOAD_TIME, chosen, config_for, quantization_of
from diffusers_pqcad.cli.saved_source import models_of
from diffusers_pqcad.evaluation.speed import directory_size_bytes
from diffusers_pqcad.loading.config import DENOISER_COMPONENTS, PQCADConfig
from diffusers_pqcad.loading.convert import quantize_
from diffusers_pqcad.loading.coverage import coverage, percent
from diffusers_pqcad.loading.plan import Plan, plan
from diffusers_pqcad.loading.saved import INDEX_FILE, SavedModel, headers_of, saved_models, skeleton
from diffusers_pqcad.loading.single_file import check_single_file, is_single_file, load_single_file
from diffusers_pqcad.publishing.hub import write_card
from diffusers_pqcad.publishing.quantized_card import note_source, quantized_card
from diffusers_pqcad.publishing.settings import Part, config_of


@dataclass(frozen=True)
class QuantizeConfig:
    """What is quantized, and where it goes."""

    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={"help": "the pipeline: a folder, a repository of the Hub, or a single .safetensors file"},
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "folder of the quantized pipeline, which is not there yet", "aliases": ["-o"]}
    )
    pipeline: str | None = field(
        default=None,
        metadata={"help": "for a single file: the folder or repository of its config and its other parts"},
    )
    torch_dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "dtype of what stays in floating point; CPUs are fastest in float32"}
    )

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("output_dir: where shall the pipeline go? Give -o FOLDER.")


class Settings(NamedTuple):
    """What `pqcad quantize` takes."""

    run: QuantizeConfig
    quantization: PQCADConfig
    trial: Trial


RUN = Part("run", QuantizeConfig, ("pretrained_model_name_or_path", "output_dir", "pipeline", "torch_dtype"))


def settings_of(values: dict[str, Any]) -> Settings:
    """Return the settings of the flags `values`."""
    return Settings(config_of(RUN, values), quantization_of(values), config_of(TRIAL, values))


def run(settings: Settings) -> Outcome:
    """Return what was done, or with `--dry_run` would be: which models, how large before and after."""
    output, source = Path(settings.run.output_dir or ""), str(settings.run.pretrained_model_name_or_path)
    check_free(output)
    if is_single_file(source):
        check_single_file(source, settings.run.pipeline)
    if settings.trial.dry_run:
        return planned(settings)
    pipeline = load(settings)
    names = quantized_names(pipeline, settings.quantization)
    save(pipeline, output, source)
    components = {name: figures_of(getattr(pipeline, name), output / name) for name in names}
    size = directory_size_bytes(output)
    document = {"output_dir": str(output), "size_bytes": size, "components": components}
    lines = [
        f"{name}: {found['average_bits']:.2f} bits a weight on average, {percent(found['packed_share'])} of its "
        f"weights, {found['size_bytes'] / 1e6:.2f} MB"
        for name, found in components.items()
    ]
    load_it = f"import diffusers_pqcad; DiffusionPipeline.from_pretrained({str(output)!r})"
    lines += [f"Saved in {output}, {size / 1e6:.2f} MB in all. Load it: {load_it}"]
    lines += [f"See what it lost: pqcad compare {source} {output} -o report.html"]
    return Outcome(document, "\n".join(lines))


def figures_of(model: Any, folder: Path) -> dict[str, Any]:
    """Return how much of a `model` was packed to how many bits, and the bytes of its `folder`."""
    found = coverage(model)
    bits = found.average_bits()
    assert bits is not None  # something was packed
    return {
        "size_bytes": directory_size_bytes(folder),
        "average_bits": bits[0],
        "packed_share": found.share(found.packed),
    }


def check_free(folder: Path) -> None:
    """Raise ValueError for an output folder that holds something, or is a file."""
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise ValueError(
            f"output_dir: expected a folder that is new or empty, got {folder}, which is neither. Give another."
        )


def load(settings: Settings) -> Any:
    """Return the pipeline with its models quantized, while they are loaded where it is a folder or a repository."""
    path, dtype = str(settings.run.pretrained_model_name_or_path), settings.run.torch_dtype
    options = (
        {} if dtype == "float32" else {"torch_dtype": getattr(torch, dtype)}
    )  # float32 is what loaders take anyway
    if is_single_file(path):
        pipeline = load_single_file(path, settings.run.pipeline, **options)
        for name in names_of(pipeline, settings.quantization):
            quantize_(getattr(pipeline, name), config_for(name, settings.quantization))
        return pipeline
    if Path(path).exists() and not (Path(path) / INDEX_FILE).is_file():
        raise ValueError(f"{path}: expected the folder of a pipeline, with {INDEX_FILE}, got one without.")
    try:
        return DiffusionPipeline.from_pretrained(path, quantization_config=settings.quantization, **options)
    except OSError as error:
        where = (
            "it cannot be loaded" if Path(path).is_dir() else "no such folder or file, and not to be had from the Hub"
        )
        raise ValueError(f"{path}: {where}. {error}") from error


def names_of(pipeline: Any, config: PQCADConfig) -> list[str]:
    """Return the models of a pipeline that `config` quantizes; ValueError for none, and for one that is not there."""
    models = [name for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)]
    return chosen(models, config)


def quantized_names(pipeline: Any, config: PQCADConfig) -> list[str]:
    """Return the models of a pipeline that were quantized; raises ValueError where one had nothing to quantize."""
    names = names_of(pipeline, config)
    for name in names:
        if not coverage(getattr(pipeline, name)).packed:
            raise ValueError(f"{name}: nothing was quantized, as no layer of it can be, or all of them are excluded.")
    return names


def save(pipeline: Any, output: Path, source: str) -> None:
    """Save the pipeline in `output` with its card, as one made of `source`.

    The folder appears whole: what is stopped before leaves nothing.
    """
    partial = output.with_name(f"{output.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        pipeline.save_pretrained(partial)
        note_source(partial, source, is_file=is_single_file(source), made_by="pqcad quantize")
        write_card(partial, quantized_card(partial, repo=output.name))
        if output.is_dir():
            output.rmdir()  # it is empty
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def planned(settings: Settings) -> Outcome:
    """Return what would be done, from headers."""
    path, dtype = str(settings.run.pretrained_model_name_or_path), getattr(torch, settings.run.torch_dtype)
    config = settings.quantization
    plans = plan_of_file(settings) if is_single_file(path) else plans_of(models_of(path), config, dtype)
    lines = [f"{name}: {found.totals()}" for name, found in plans.items()]
    lines.append(
        f"Would be saved in {settings.run.output_dir}. Nothing was written. `pqcad inspect` shows the layers."
    )
    components = {name: described(found) for name, found in plans.items()}
    return Outcome(
        {"output_dir": settings.run.output_dir, "dry_run": True, "components": components}, "\n".join(lines)
    )


def plan_of_file(settings: Settings) -> dict[str, Plan]:
    """Return the plan of a single file's denoiser, as the pipeline that it belongs to describes it."""
    if settings.run.pipeline is None or not Path(settings.run.pipeline).is_dir():
        raise ValueError("dry_run: of a single file, it needs --pipeline FOLDER, which says what the tensors are.")
    beside = saved_models(settings.run.pipeline)
    names = chosen(list(beside), settings.quantization)
    name = next((name for name in names if name in DENOISER_COMPONENTS), names[0])
    tensors = headers_of(Path(str(settings.run.pretrained_model_name_or_path)))
    model = SavedModel(name, beside[name].config, tensors)
    return {
        name: plan(skeleton(model), config_for(name, settings.quantization), getattr(torch, settings.run.torch_dtype))
    }


COMMAND = Command(
    name="quantize",
    summary="a pipeline to fewer bits, from its weights alone, in seconds",
    description="Quantize a pipeline from its weights alone: no prompts, no training. The result is a folder with a "
    "card, which DiffusionPipeline.from_pretrained loads, after `import diffusers_pqcad`. `pqcad compress` takes "
    "longer, and comes closer to full precision at the same bits.",
    example="pqcad quantize my/pipeline --weight_bits 4 -o outputs/small",
    parts=(RUN, AT_LOAD_TIME, TRIAL),
    operands={"pretrained_model_name_or_path": "MODEL"},
    settings=settings_of,
    run=run,
)
