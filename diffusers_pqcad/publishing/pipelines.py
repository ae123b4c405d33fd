"""What `compress` does with pipelines: every place that knows their denoiser or their scheduler."""

import copy
import inspect
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import load_dataset
from diffusers import DDIMScheduler, DiffusionPipeline
from torch import Tensor, nn

from diffusers_pqcad.compression.adapters import ADAPTER, Adapter, carries_adapter, take_adapter_, targets_of
from diffusers_pqcad.compression.calibration import CalibrationSet, check_takes_sigmas
from diffusers_pqcad.compression.calling import call_arguments_of, distinct_inputs
from diffusers_pqcad.compression.denoiser import StepPlan, denoiser_name, pipeline_with, with_components
from diffusers_pqcad.compression.distillation import DistillConfig
from diffusers_pqcad.compression.grid import ddim_grid
from diffusers_pqcad.compression.processes import on_main
from diffusers_pqcad.compression.recording import collect_calibration_set, plan_of, restored
from diffusers_pqcad.compression.schedulers import deterministic_scheduler
from diffusers_pqcad.evaluation import evaluate, generate_images, load_extractor
from diffusers_pqcad.evaluation.features import ClassifierExtractor
from diffusers_pqcad.evaluation.generate import Samples, makes_pixels
from diffusers_pqcad.evaluation.perceptual import Judges
from diffusers_pqcad.layers.find import is_of_adapter
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.loading.convert import match_modules, with_model_exemptions
from diffusers_pqcad.publishing.run_folder import PROMPTS_FILE
from diffusers_pqcad.publishing.settings import CompressConfig
from diffusers_pqcad.publishing.students import FOLDED_CALL

logger = logging.getLogger(__name__)

CALIBRATION_SEED_OFFSET = 1_000_000  # the images that are measured must not be those that were trained on
LATENCY_BATCH_SIZE = 8
PIXEL_BATCH_SIZE, LATENT_BATCH_SIZE = 64, 4  # images of a call, by default
MAX_OWN_STEPS = 50
SHUFFLED_ROWS = 10_000  # of a data set of prompts
# Beside the prompts of a teacher: what a picture of each has to show.
LABELS_FILE = "prompt_labels.json"


class Row(NamedTuple):
    """A row to measure: a pipeline in a number of steps, and what it alone is called with."""

    key: str
    name: str
    pipeline: Any
    num_inference_steps: int
    arguments: dict[str, Any] = {}


def row_of(key: str, name: str, pipeline: Any, arguments: dict[str, Any]) -> Row:
    """Return the row of a pipeline that is called with `arguments`, the number of steps among them."""
    others = {name: value for name, value in arguments.items() if name != "num_inference_steps"}
    return Row(key, name, pipeline, arguments["num_inference_steps"], others)


@dataclass(frozen=True)
class TeacherSource:
    """Where a teacher comes from, a folder or a repository, and what is known of it: its name, for the card, and more.

    `extractor` is the folder of a feature extractor for its images; `defaults` are settings of a run that suit it
    better than those of all, as a command line has them.
    """

    path: str
    name: str
    extractor: str | None = None
    license: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)


def bundled_source(path: str | None, bundled: Sequence[TeacherSource]) -> TeacherSource | None:
    """Return the one of the `bundled` teachers that is in the folder `path`, however that is written; None elsewhere.

    Without a path, the first of them.
    """
    if path is None:
        return next(iter(bundled), None)
    return next((source for source in bundled if Path(path).resolve() == Path(source.path).resolve()), None)


def source_of(run: CompressConfig, bundled: Sequence[TeacherSource] = ()) -> TeacherSource:
    """Return the source of the run's teacher: a `bundled` one by default and by any path; settings come first."""
    path = run.pretrained_model_name_or_path
    source = bundled_source(path, bundled)
    if source is None:
        if path is None:
            raise ValueError("pretrained_model_name_or_path: expected a folder or a repository of the Hub, got None.")
        source = TeacherSource(path, Path(path).resolve().name if Path(path).exists() else path)
    return replace(source, extractor=run.extractor or source.extractor, license=run.license or source.license)


def extractor_of(source: TeacherSource) -> Any | None:
    """Return the feature extractor for the teacher's images, or None; ValueError where its folder has none."""
    if source.extractor is None:
        return None
    try:
        return load_extractor(source.extractor)
    except FileNotFoundError as error:
        raise ValueError(f"extractor: {error}") from None


def prompt_labels_of(source: TeacherSource, extractor: Any, measured: Any) -> dict[str, dict[str, str]] | None:
    """Return what a picture of each prompt has to show, from the teacher's folder; None where nobody could say.

    That takes the file, an `extractor` that recognizes labels, and an entry of each of the `measured` prompts.
    """
    path = Path(source.path) / LABELS_FILE
    if not path.is_file() or not isinstance(extractor, ClassifierExtractor) or not extractor.labels:
        return None
    labels = json.loads(path.read_text(encoding="utf-8"))
    missing = sum(item.get("prompt") not in labels for item in measured or ())
    if missing:
        logger.warning(
            "Prompt accuracy is not measured: %s has no entry for %d of the %d prompts.", path, missing, len(measured)
        )
    return None if missing else labels


class Teacher(NamedTuple):
    """A full-precision pipeline to compress, and the same as its user runs it where the scheduler was replaced."""

    pipeline: Any
    as_you_run_it: Any | None


def loading_arguments(run: CompressConfig) -> dict[str, Any]:
    """Return what the run's pipeline is loaded with: where the Hub has it, which of its files, where they are kept.

    Raises ValueError for a revision of a folder, which has none.
    """
    path = run.pretrained_model_name_or_path
    if run.revision is not None and (path is None or Path(path).exists()):
        raise ValueError(
            f"revision: expected a repository of the Hub with it, got the folder {path or 'of the bundled pipeline'}; "
            "leave it out."
        )
    return {
        name: getattr(run, name) for name in ("revision", "variant", "cache_dir") if getattr(run, name) is not None
    }


def load_teacher(path: str, **arguments: Any) -> Teacher:
    """Return the full-precision pipeline of a folder or repository, with a scheduler to record trajectories by.

    `arguments` are those of `loading_arguments`; a variant's weights are made float32. Raises ValueError for one that
    cannot be loaded, one without a single denoiser, and a scheduler that has no such.
    """
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, **arguments)
    except (OSError, ValueError) as error:
        where = "cannot be loaded" if Path(path).is_dir() else "no such folder, and not to be had from the Hub"
        raise ValueError(f"pretrained_model_name_or_path: {path!r}: {where}. {error}") from error
    if "variant" in arguments:
        pipeline.to(torch.float32)
    return as_recorded(pipeline)


def as_recorded(pipeline: Any) -> Teacher:
    """Return a loaded `pipeline` with a scheduler to record trajectories by; ValueError as in `load_teacher`."""
    denoiser_of(pipeline).eval()
    scheduler, line = deterministic_scheduler(pipeline.scheduler)
    if line is None:
        return Teacher(pipeline, None)
    logger.warning("%s", line)
    return Teacher(with_components(pipeline, scheduler=scheduler), pipeline)


def denoiser_of(pipeline: Any) -> Any:
    """Return the model that is compressed."""
    return getattr(pipeline, denoiser_name(pipeline))


def has_adapter(run: CompressConfig, distillation: DistillConfig) -> bool:
    """Return whether the student of a run carries an adapter."""
    return run.lora_weights is not None or distillation.trainable == "lora"


def check_adapter(pipeline: Any, run: CompressConfig, distillation: DistillConfig) -> None:
    """Raise ValueError, naming the field, for an adapter that `pipeline` could not load, or has no layers for."""
    if not has_adapter(run, distillation):
        return
    setting = "trainable" if run.lora_weights is None else "lora_weights"
    if not hasattr(type(pipeline), "load_lora_weights"):
        raise ValueError(
            f"{setting}: expected a pipeline with load_lora_weights, got {type(pipeline).__name__}, whose users could "
            "not load the adapter. Train all or scales."
        )
    if run.lora_weights is None:
        targets_of(denoiser_of(pipeline), distillation.target_modules)


def load_adapter_(pipeline: Any, run: CompressConfig) -> None:
    """Load the run's LoRA, if it has one, into the denoiser of `pipeline`; peft casts it to float32, as that is.

    Raises ValueError for what cannot be loaded, and for a LoRA that is none of the denoiser, or not of it alone.
    """
    path, denoiser = run.lora_weights, denoiser_of(pipeline)
    if path is None:
        return
    if Path(path).is_file() and Path(path).suffix != ".safetensors":
        raise ValueError(f"lora_weights: expected a safetensors file or a folder with one, got {path!r}.")
    try:
        pipeline.load_lora_weights(path, adapter_name=ADAPTER, use_safetensors=True, cache_dir=run.cache_dir)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"lora_weights: {path!r} cannot be loaded into {type(pipeline).__name__}. {error}") from error
    models = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    adapted = [name for name, model in models.items() if carries_adapter(model)]
    if adapted != [denoiser_name(pipeline)]:
        raise ValueError(
            f"lora_weights: expected a LoRA of the {denoiser_name(pipeline)} alone, got one of "
            f"{adapted or 'no model'}. Fuse those of other models into them, and save the pipeline, first."
        )
    if not any(is_of_adapter(name) for name, _ in denoiser.named_parameters()):
        raise ValueError(f"lora_weights: {path!r} holds an adapter of another kind than LoRA.")


def parted(pipeline: Any) -> tuple[Any, Adapter | None]:
    """Return a pipeline like `pipeline` whose denoiser carries no adapter, and that adapter, if there is one."""
    model = denoiser_of(pipeline)
    if not carries_adapter(model):
        return pipeline, None
    bare = copy.deepcopy(model)
    adapter = take_adapter_(bare)
    return pipeline_with(pipeline, bare), adapter


def save_adapter(pipeline: Any, adapter: Adapter | None, folder: Path) -> None:
    """Write `adapter`, if there is one, to `folder`, so that a pipeline like `pipeline` loads it from there."""
    if adapter is None:
        return
    name, config = denoiser_name(pipeline), adapter.config.to_dict()
    config = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.items()
    }  # the same file
    type(pipeline).save_lora_weights(
        folder, **{f"{name}_lora_layers": adapter.tensors, f"{name}_lora_adapter_metadata": config}
    )


def own_num_inference_steps(pipeline: Any, run: CompressConfig) -> int:
    """Return the steps in which `pipeline` is measured as its user runs it: its own default, unless the run says.

    At most MAX_OWN_STEPS of them: DDPM's thousand would take longer than all the rest.
    """
    default = inspect.signature(type(pipeline).__call__).parameters["num_inference_steps"].default
    return run.own_num_inference_steps or min(default, MAX_OWN_STEPS)


def sampling_batch_size(pipeline: Any, run: CompressConfig) -> int:
    """Return how many images a call makes: what the run says, or few where the images are decoded from latents."""
    return run.sampling_batch_size or (PIXEL_BATCH_SIZE if makes_pixels(pipeline) else LATENT_BATCH_SIZE)


def call_arguments(run: CompressConfig) -> dict[str, Any]:
    """Return the arguments that every call of the run's pipelines gets."""
    values = {name: getattr(run, name) for name in ("guidance_scale", "height", "width", "max_sequence_length")}
    return {name: value for name, value in values.items() if value is not None}


def prompts_of(run: CompressConfig, teacher: str | None = None) -> list[str]:
    """Return the prompts of the run's file or data set, else those in the folder of its `teacher`; none without.

    Raises ValueError for a file or a data set that is missing, is no text, or has no prompt.
    """
    if run.dataset_name is not None:
        return prompts_of_dataset(run)
    if run.prompts_file is not None:
        return prompts_of_file(Path(run.prompts_file))
    beside = None if teacher is None else Path(teacher) / PROMPTS_FILE
    return prompts_of_file(beside) if beside is not None and beside.is_file() and not run.class_labels else []


def prompts_from(run: CompressConfig) -> dict[str, Any]:
    """Return where a run's prompts come from, as JSON values that name no place of this computer.

    `kind` is "dataset", "file" or "teacher" (the teacher's own folder). `dataset` is None for one in a folder.
    """
    if run.dataset_name is None:
        return {"kind": "teacher" if run.prompts_file is None else "file"}
    return {
        "kind": "dataset",
        "dataset": None if Path(run.dataset_name).exists() else run.dataset_name,
        "configuration": run.dataset_config_name,
        "column": run.prompt_column,
    }


def prompts_of_file(path: Path) -> list[str]:
    """Return the prompts of a text file, one of each line."""
    if not path.is_file():
        raise ValueError(f"prompts_file: there is no file {str(path)!r}.")
    try:
        prompts = [item["prompt"] for item in distinct_inputs(path)]
    except UnicodeDecodeError as error:
        raise ValueError(f"prompts_file: {path} cannot be read as text ({error}).") from None
    if not prompts:
        raise ValueError(f"prompts_file: {path} has no prompt; write one in each line.")
    return prompts


def prompts_of_dataset(run: CompressConfig) -> list[str]:
    """Return as many different prompts of the run's data set as it records and measures, in the order of its seed.

    The rows are streamed: of a large data set, only those of the shuffled buffer are read. White space becomes single
    spaces, as a prompt is a line of the copy.
    """
    name, column = run.dataset_name or "", run.prompt_column
    try:
        rows = load_dataset(name, run.dataset_config_name, split="train", streaming=True, cache_dir=run.cache_dir)
    except (OSError, ValueError) as error:
        raise ValueError(f"dataset_name: {name!r} cannot be loaded ({error}).") from error
    if column in (rows.column_names or []):
        rows = rows.select_columns([column])  # pictures beside it are not decoded
    found: dict[str, None] = {}
    for row in rows.shuffle(seed=run.seed, buffer_size=SHUFFLED_ROWS):
        text = row.get(column, ...)
        if not isinstance(text, str | None):
            arrived = f"none; there are {sorted(row)}" if text is ... else f"a {type(text).__name__}"
            raise ValueError(f"prompt_column: expected a column {column!r} of texts in {name!r}, got {arrived}.")
        prompt = " ".join((text or "").split())
        if prompt:
            found[prompt] = None
        if len(found) == run.num_trajectories + run.num_images:
            break
    if not found:
        raise ValueError(f"dataset_name: {name!r} has no prompt in its column {column!r}.")
    return list(found)


class RunInputs(NamedTuple):
    """What a run's pipelines are called with: the inputs that are recorded, and those that are measured."""

    recorded: list[Any] | None
    measured: list[Any] | None


def inputs_of_run(run: CompressConfig, prompts: Sequence[str] | None = None) -> RunInputs:
    """Return the run's inputs: of its `prompts` the first `num_trajectories` are recorded, the others measured.

    Where there are no more, those that were recorded are measured, with other noise. Class labels are recorded and
    measured alike. `prompts` are by default those of the run's file. Raises ValueError for a negative prompt alone.
    """
    if run.class_labels:
        labels = [{"class_labels": label} for label in run.class_labels]
        return RunInputs(labels, labels)
    prompts = prompts_of(run) if prompts is None else prompts
    if run.negative_prompt is not None and not prompts:
        raise ValueError("negative_prompt: it goes with prompts; give prompts_file or dataset_name, too.")
    if not prompts:
        return RunInputs(None, None)
    others = {} if run.negative_prompt is None else {"negative_prompt": run.negative_prompt}
    inputs = [{"prompt": prompt} | others for prompt in prompts]
    recorded = inputs[: run.num_trajectories]
    return RunInputs(recorded, inputs[run.num_trajectories :] or recorded)


def check_teacher(
    teacher: Any, run: CompressConfig, quantization: PQCADConfig, prompts: Sequence[str] | None = None
) -> None:
    """Raise ValueError for inputs that the teacher does not take, and for layers that cannot be quantized so."""
    inputs, model = inputs_of_run(run, prompts), denoiser_of(teacher)
    call_arguments_of(teacher, distinct_inputs(inputs.recorded), call_arguments(run))
    accepted = inspect.signature(type(teacher).__call__).parameters
    if inputs.recorded is None and "batch_size" not in accepted:
        raise ValueError(
            f"{type(teacher).__name__}: what is it called with? Give prompts_file or dataset_name (or class_labels)."
        )
    strides = strides_of(run)
    if isinstance(teacher.scheduler, DDIMScheduler):
        for stride in (1, *strides):
            ddim_grid(teacher.scheduler, run.num_inference_steps // stride)
    elif strides[-1] > 1:
        check_takes_sigmas(teacher)
    match_modules(model, with_model_exemptions(model, quantization))


def strides_of(run: CompressConfig) -> list[int]:
    """Return how many of the teacher's steps one of each student's is, in the order in which they are trained."""
    return [2**halving for halving in range(1, run.num_halvings + 1)] or [1]


def record(teacher: Any, run: CompressConfig, folder: Path, *, progress: bool) -> CalibrationSet:
    """Return the calibration set of the run, written to `folder` as it is recorded."""
    return collect_calibration_set(
        teacher,
        inputs_of_run(run).recorded,
        num_trajectories=run.num_trajectories,
        num_inference_steps=run.num_inference_steps,
        seed=run.seed + CALIBRATION_SEED_OFFSET,
        batch_size=sampling_batch_size(teacher, run),
        output_dir=folder,
        progress=progress,
        **call_arguments(run),
    )


def check_recording(calibration: CalibrationSet, teacher: Any, run: CompressConfig) -> None:
    """Raise ValueError for a calibration set of another teacher, or one that no student can learn on."""
    calibration.check(denoiser_of(teacher), teacher.scheduler)
    for stride in strides_of(run):
        calibration.check_student_steps(stride)
        calibration.student_arguments(teacher, stride)


def check_folding(teacher: Any, run: CompressConfig, plan: StepPlan, prompts: Sequence[str] | None = None) -> None:
    """Raise ValueError where the teacher's pipeline, without guidance, calls its denoiser otherwise than `plan`.

    `prompts` are by default those of the run's file.
    """
    example = distinct_inputs(inputs_of_run(run, prompts).recorded)[0]
    arguments = call_arguments(run) | FOLDED_CALL
    try:
        with restored(teacher.scheduler):
            found = plan_of(teacher, example, run.seed, run.num_inference_steps, arguments)
    except ValueError as error:
        raise ValueError(f"fold_guidance: {error} Set fold_guidance to False.") from error
    if found.branches != plan.branches or [*found.arguments[0]] != [*plan.arguments[0]]:
        raise ValueError(
            f"fold_guidance: with guidance_scale=1, {type(teacher).__name__} calls its denoiser with "
            f"{found.branches} branches and {[*found.arguments[0]]}, expected {plan.branches} and "
            f"{[*plan.arguments[0]]}: its students would not be called as they were distilled. Set fold_guidance to "
            "False."
        )


def can_fold(teacher: Any, run: CompressConfig, plan: StepPlan, prompts: Sequence[str] | None = None) -> bool:
    """Return whether a student could answer in one branch what the teacher gives by `plan`, and be called so."""
    try:
        check_folding(teacher, run, plan.folded(), prompts)
    except ValueError:
        return False
    return True


def reference_samples(teacher: Any, run: CompressConfig, *, progress: bool) -> Samples:
    """Return the teacher's final latents at all its steps, and its pictures: what every row is compared with."""
    return generate_images(
        teacher,
        inputs_of_run(run).measured,
        num_images=run.num_images,
        num_inference_steps=run.num_inference_steps,
        seed=run.seed,
        batch_size=sampling_batch_size(teacher, run),
        description="teacher's samples",
        progress=progress,
        **call_arguments(run),
    )


def measure(
    row: Row,
    teacher: Any,
    run: CompressConfig,
    *,
    samples: Samples,
    extractor: Any,
    prompt_labels: Mapping[str, Mapping[str, str]] | None = None,
    judges: Judges | None = None,
    weights: Path,
    progress: bool,
) -> dict[str, Any]:
    """Return what the table says of `row`, as JSON values; its denoiser is saved in `weights`, its adapter beside it.

    `samples` are the teacher's `reference_samples`, `prompt_labels` those of `prompt_labels_of`.
    """
    bare, adapter = parted(row.pipeline)
    on_main(denoiser_of(bare).save_pretrained, weights)
    on_main(save_adapter, bare, adapter, weights)
    report = evaluate(
        row.pipeline,
        teacher,
        inputs_of_run(run).measured,
        num_images=run.num_images,
        num_inference_steps=row.num_inference_steps,
        seed=run.seed,
        extractor=extractor,
        prompt_labels=prompt_labels,
        judges=judges,
        reference_num_inference_steps=run.num_inference_steps,
        batch_size=sampling_batch_size(teacher, run),
        num_latency_rounds=run.num_latency_rounds,
        latency_batch_size=min(LATENCY_BATCH_SIZE, sampling_batch_size(teacher, run)),
        reference_samples=samples,
        weights_path=weights,
        arguments=row.arguments,
        progress=progress,
        **call_arguments(run),
    )
    return report.to_dict()


def sample_images(row: Row, run: CompressConfig, inputs: list[Any] | None, *, count: int) -> Tensor:
    """Return the first `count` pictures of a row's pipeline for `inputs`, (count, C, H, W) uint8.

    Those of the inputs that are measured are the pictures that are measured.
    """
    images = generate_images(
        row.pipeline,
        inputs,
        num_images=count,
        num_inference_steps=row.num_inference_steps,
        seed=run.seed,
        batch_size=sampling_batch_size(row.pipeline, run),
        progress=False,
        **call_arguments(run) | row.arguments,
    ).images
    assert images is not None  # all that generate_images returns has pictures
    return images
