"""`pqcad evaluate`: the table of a pipeline beside its reference: fidelity, distance, bytes, milliseconds, memory."""

import json
import tempfile
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusers_pqcad.cli.calling import (
    CALLS,
    inputs_of,
    load_pipeline,
    planned_calls,
    run_of,
    run_part,
    with_prompts,
)
from diffusers_pqcad.cli.command import TRIAL, Command, Outcome, Trial
from diffusers_pqcad.cli.sides import names_of, side_of
from diffusers_pqcad.evaluation import evaluate
from diffusers_pqcad.evaluation.comparison import Side
from diffusers_pqcad.evaluation.perceptual import Judges, load_judges
from diffusers_pqcad.evaluation.resident import Sampling
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.publishing.compress import set_threads
from diffusers_pqcad.publishing.hub import results_table, table_notes
from diffusers_pqcad.publishing.pipelines import (
    TeacherSource,
    call_arguments,
    denoiser_of,
    extractor_of,
    prompt_labels_of,
    sampling_batch_size,
)
from diffusers_pqcad.publishing.run_folder import cached, load_json, save_json
from diffusers_pqcad.publishing.settings import CompressConfig, Part, config_of
from diffusers_pqcad.publishing.sizes import memory_rows, memory_table

LATENCY_BATCH_SIZE = 8
NEUTRAL = ("num_threads", "output_dir", "measure_memory")


@dataclass(frozen=True)
class EvaluateConfig:
    """Which pipeline is measured, against which."""

    reference: str | None = field(
        default=None, metadata={"help": "the full-precision pipeline: a folder or a repository of the Hub"}
    )
    steps: int | None = field(
        default=None,
        metadata={"help": "steps of the pipeline; None: those it was distilled for, or num_inference_steps"},
    )
    output_dir: str | None = field(
        default=None,
        metadata={"help": "folder for metrics.json; a run that was stopped goes on there", "aliases": ["-o"]},
    )

    def __post_init__(self) -> None:
        if self.reference is None:
            raise ValueError("reference: compared with what? Give --reference, the pipeline in full precision.")
        if self.steps is not None and self.steps < 1:
            raise ValueError(f"steps: expected at least 1, got {self.steps}.")


class Settings(NamedTuple):
    """What `pqcad evaluate` takes."""

    evaluation: EvaluateConfig
    run: CompressConfig
    trial: Trial


EVALUATION = Part("evaluation", EvaluateConfig, ("reference", "steps", "output_dir"))
RUN = run_part(
    "calls",
    (
        "pretrained_model_name_or_path",
        "num_images",
        "num_latency_rounds",
        "measure_memory",
        "extractor",
        "lpips",
        "clip_model",
        *CALLS,
    ),
    {"num_images": 100},
)


def settings_of(values: dict[str, Any]) -> Settings:
    """Return the settings of the flags `values`."""
    return Settings(config_of(EVALUATION, values), run_of(RUN, values), config_of(TRIAL, values))


def run(settings: Settings) -> Outcome:
    """Return the rows of the reference and of the pipeline, and their memory; metrics.json holds both, too."""
    path, reference_path = str(settings.run.pretrained_model_name_or_path), str(settings.evaluation.reference)
    run = with_prompts(settings.run, reference_path)
    inputs = inputs_of(run)
    if settings.trial.dry_run:
        return planned(settings, inputs)
    set_threads(run)
    name_a, name_b = names_of(reference_path, path)
    a = side_of(load_pipeline(reference_path, "reference"), reference_path, name_a, None, run.num_inference_steps)
    b = side_of(load_pipeline(path, "MODEL"), path, name_b, settings.evaluation.steps, run.num_inference_steps)
    folder = None if settings.evaluation.output_dir is None else Path(settings.evaluation.output_dir)
    if folder is not None:
        claim(folder, settings, inputs)
    rows, judges = [], load_judges(run.lpips, run.clip_model)
    for key, side in (("reference", a), ("pipeline", b)):
        make = partial(row_of, key, side, a, run, inputs, judges)
        rows.append(make() if folder is None else cached(folder / "rows" / f"{key}.json", make, save_json, load_json))
    metrics: dict[str, Any] = {"rows": rows, "memory": None}
    if run.measure_memory and not packed_layers(denoiser_of(a.pipeline)):  # the table is against full precision
        measure = partial(memory_of, (reference_path, path), (a, b), rows, run, inputs)
        keep = (save_json, load_json)
        metrics["memory"] = measure() if folder is None else cached(folder / "memory.json", measure, *keep)
    if folder is not None:
        save_json(folder / "metrics.json", metrics)
    text = f"{results_table(metrics)}\n\n{table_notes(metrics)}\n\n{memory_table(metrics['memory'])}"
    return Outcome(metrics, text)


def claim(folder: Path, settings: Settings, inputs: Any) -> None:
    """Take the folder for this evaluation, or raise ValueError for one that holds another, or something else."""
    what = {name: value for name, value in vars(settings.run).items() if name not in NEUTRAL}
    what |= {"reference": settings.evaluation.reference, "steps": settings.evaluation.steps, "inputs": inputs}
    path = folder / "settings.json"
    if path.exists() and load_json(path) == json.loads(json.dumps(what)):
        return
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"output_dir: {folder} holds another evaluation, or something else. Give another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    save_json(path, what)


def row_of(key: str, side: Side, reference: Side, run: CompressConfig, inputs: Any, judges: Judges) -> dict[str, Any]:
    """Return the row of one side, as JSON values."""
    source = TeacherSource(run.pretrained_model_name_or_path or "", side.name, run.extractor)
    extractor = extractor_of(source)
    batch_size = sampling_batch_size(side.pipeline, run)
    report = evaluate(
        side.pipeline,
        reference.pipeline,
        inputs,
        num_images=run.num_images,
        num_inference_steps=side.num_inference_steps,
        reference_num_inference_steps=reference.num_inference_steps,
        seed=run.seed,
        extractor=extractor,
        prompt_labels=prompt_labels_of(source, extractor, inputs),
        judges=judges,
        batch_size=batch_size,
        num_latency_rounds=run.num_latency_rounds,
        latency_batch_size=min(LATENCY_BATCH_SIZE, batch_size),
        weights_path=side.weights_path,
        arguments=dict(side.arguments),
        reference_arguments=dict(reference.arguments),
        **call_arguments(run),
    )
    return {"key": key, "name": side.name} | report.to_dict()


def memory_of(
    paths: tuple[str, str], sides: tuple[Side, Side], rows: list[dict[str, Any]], run: CompressConfig, inputs: Any
) -> list[dict[str, Any]]:
    """Return what the reference and the pipeline take while they sample, in as many steps; see `memory_rows`."""
    samplings = [
        Sampling(
            path,
            num_inference_steps=sides[1].num_inference_steps,
            inputs=None if inputs is None else inputs[:1],
            arguments=call_arguments(run) | dict(side.arguments),
            num_threads=torch.get_num_threads(),
        )
        for path, side in zip(paths, sides, strict=True)
    ]
    sizes = rows[0]["size_bytes"], rows[1]["size_bytes"]
    with tempfile.TemporaryDirectory() as place:
        return memory_rows(samplings[0], samplings[1], denoiser_of(sides[0].pipeline), sizes, Path(place))


def planned(settings: Settings, inputs: Any) -> Outcome:
    """Return what would be measured."""
    path, reference = str(settings.run.pretrained_model_name_or_path), str(settings.evaluation.reference)
    document = planned_calls((reference, path), settings.run, inputs, output_dir=settings.evaluation.output_dir)
    text = (
        f"{settings.run.num_images} images of {path} would be compared with those of {reference}, with "
        f"{document['num_prompts']} prompts. Nothing was written."
    )
    return Outcome(document, text)


def kept(settings: Settings) -> str:
    """Return what a run that was stopped left."""
    folder = settings.evaluation.output_dir
    if folder is None:
        return "Nothing was written, as there is no --output_dir. To start over:"
    return f"Rows that were finished are in {folder}. To go on:"


COMMAND = Command(
    name="evaluate",
    summary="a pipeline beside its reference: fidelity, distance, bytes, milliseconds",
    description="Measure a pipeline against its reference in full precision, on the same prompts and noise: SQNR with "
    "its interval, PSNR and SSIM of pictures, the Frechet distance under an extractor, bytes, model evaluations and "
    "milliseconds, in turns with the reference.",
    example="pqcad evaluate outputs/small --reference my/pipeline --prompts_file prompts.txt --num_images 100",
    parts=(EVALUATION, RUN, TRIAL),
    operands={"pretrained_model_name_or_path": "MODEL"},
    settings=settings_of,
    run=run,
    kept=kept,
)
