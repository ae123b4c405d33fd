"""From a full-precision pipeline to a packed student in fewer steps, with its table, card and pictures.

Stages: teacher, recording, PQ, CAD, rows. Each keeps its result in `output_dir`, so the same call goes on after a kill
and ends with the same weights.
"""

import copy
import logging
import math
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.utils import get_int_from_env, set_seed
from diffusers.utils import logging as diffusers_logging
from torch import nn
from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from diffusers_pqcad.compression.adapters import adapter_facts, below_adapter_
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.checkpoint import load_checkpoint, room_for, save_checkpoint
from diffusers_pqcad.compression.denoiser import denoiser_name, pipeline_with
from diffusers_pqcad.compression.distillation import DistillConfig, adapted_, distill
from diffusers_pqcad.compression.extras import require
from diffusers_pqcad.compression.fake_quant import convert_, fake_quant_state, freeze_, load_fake_quant_state_
from diffusers_pqcad.compression.offload import Store, offloaded, sharing_copy, store_in
from diffusers_pqcad.compression.optimizers import check_installed
from diffusers_pqcad.compression.processes import accelerator_on, is_main, on_main, place, together
from diffusers_pqcad.compression.progressive import History, ProgressiveConfig, progressive_quantize
from diffusers_pqcad.compression.stopping import stopping_at_checkpoints, stopping_at_once
from diffusers_pqcad.evaluation.generate import Samples
from diffusers_pqcad.evaluation.perceptual import Judges, load_judges
from diffusers_pqcad.evaluation.resident import Sampling
from diffusers_pqcad.evaluation.speed import environment
from diffusers_pqcad.loading.config import PQCADConfig
from diffusers_pqcad.loading.convert import quantizable_layers, quantize_
from diffusers_pqcad.publishing import hub, pushing
from diffusers_pqcad.publishing.front_matter import license_of, task_of
from diffusers_pqcad.publishing.given_set import given_set
from diffusers_pqcad.publishing.kept_checkpoints import checkpoint_named, go_back_, resume_file
from diffusers_pqcad.publishing.pipelines import (
    Row,
    Teacher,
    TeacherSource,
    call_arguments,
    can_fold,
    check_adapter,
    check_folding,
    check_recording,
    check_teacher,
    denoiser_of,
    extractor_of,
    has_adapter,
    inputs_of_run,
    load_adapter_,
    load_teacher,
    loading_arguments,
    measure,
    own_num_inference_steps,
    parted,
    prompt_labels_of,
    prompts_from,
    prompts_of,
    record,
    reference_samples,
    row_of,
    sample_images,
    save_adapter,
    source_of,
    strides_of,
)
from diffusers_pqcad.publishing.plots import plot_bits, plot_curves, plot_samples
from diffusers_pqcad.publishing.run_folder import (
    LOCAL_SETTINGS,
    PROMPT_SETTINGS,
    PROMPTS_FILE,
    Site,
    cached,
    claim_folder,
    load_json,
    note_training,
    noted_trainings,
    save_json,
)
from diffusers_pqcad.publishing.settings import CompressConfig, Settings, complete, flat
from diffusers_pqcad.publishing.sizes import memory_rows
from diffusers_pqcad.publishing.students import FOLDED_CALL, student_arguments, student_pipeline
from diffusers_pqcad.publishing.supervision import Supervision, Watcher, tell_of_round
from diffusers_pqcad.publishing.tracking import check_tracker, journal_of
from diffusers_pqcad.publishing.validation import check_validation

MAX_SHOWN_IMAGES = 12


class Arm(NamedTuple):
    """A student to distil: the key of its files and its row, the name in the table, its settings."""

    key: str
    name: str
    config: DistillConfig


class Stage(NamedTuple):
    """One student of an arm: the key of its files and its row, how many of the recorded steps one of its own is."""

    key: str
    stride: int


class Trained(NamedTuple):
    """A student after its training, fake-quantized and on the CPU, and the statistics of that."""

    student: nn.Module
    stats: list[dict[str, Any]]


class Judge(NamedTuple):
    """What judges pictures: an extractor, what it has to find for each prompt, if that is known, and networks."""

    extractor: Any | None
    prompt_labels: dict[str, dict[str, str]] | None
    judges: Judges


class Given(NamedTuple):
    """What a run has loaded: its teacher and where that came from, its prompts, and what judges pictures.

    `calibration` is a set that was recorded before, if there is one.
    """

    source: TeacherSource
    bundled: Sequence[TeacherSource]
    teacher: Teacher
    prompts: list[str]
    extractor: Any | None
    judges: Judges
    calibration: CalibrationSet | None


class Variant(NamedTuple):
    """A further PQ to run, for a row of the ablations."""

    key: str
    name: str
    quantization: PQCADConfig
    progressive: ProgressiveConfig


def compress(
    run: CompressConfig,
    quantization: PQCADConfig | None = None,
    progressive: ProgressiveConfig | None = None,
    distillation: DistillConfig | None = None,
    *,
    bundled: Sequence[TeacherSource] = (),
    progress: bool = True,
) -> dict[str, Any]:
    """Return the metrics of a compressed pipeline, which is saved in `run.output_dir` with its card and pictures.

    `quantization` defaults to an average of 4 bits; `run.seed` is the seed of all parts; the first of the `bundled`
    teachers is that of a run that names none. `progress` shows bars and headings. The folder holds a loadable
    pipeline, `metrics.json` (what this returns), `history.json` of PQ, `recipe.yaml` (the settings) and `state`, from
    which the same call goes on. Sets torch's threads, seeds and TF32 for this process. Several processes share
    the work: the main one writes and tells how it goes, and all return the metrics.

    Ctrl-C and SIGTERM end a training after it has written a checkpoint, and anything else at once, by Stopped: a
    KeyboardInterrupt. A second one does not wait.

    Raises, before anything is written, ValueError for settings that cannot work, a pipeline that is not supported, or
    a folder that was begun with other settings; MissingExtraError where a package that is needed later is missing.
    Later NotWrittenError for a full disk or a folder that is gone; what was written before is intact.
    """
    settings = complete(run, quantization, progressive, distillation)
    source = source_of(run, bundled)
    require("train", "matplotlib", "scipy", "torchmetrics")  # for what comes last: the figures and the pictures
    if has_adapter(run, settings.distillation):
        require("lora", "peft")
    if run.report_to == "trackio":  # imported here; the others are by Accelerate alone
        require("track", "trackio")
    check_tracker(run)
    check_installed(use_8bit_adam=settings.distillation.use_8bit_adam)
    prepare_process(run)

    folder = Path(run.output_dir)
    with together():
        prompts, extractor = on_main(prompts_of, run, source.path), extractor_of(source)
        teacher, as_you_run_it = load_teacher(source.path, **loading_arguments(run))
        check_adapter(teacher, run, settings.distillation)
        load_adapter_(teacher, run)
        check_teacher(teacher, run, settings.quantization, prompts)
        check_validation(teacher, run)
        calibration = given_set(teacher, run, prompts)
        judges = load_judges(run.lpips, run.clip_model) if is_main() else Judges()
        checkpoint = on_main(checkpoint_named, folder, run.resume_from_checkpoint)
        on_main(claim_folder, folder, settings, prompts)
        if checkpoint is not None:
            on_main(go_back_, folder, checkpoint)
        check_is_shared(folder)
    offload_folder = folder / "state" / "offload" if run.offload_to_disk else None
    site = Site(folder / "state", run.train_device, progress and is_main(), place().num_processes, offload_folder)
    with stopping_at_once(), room_for(site.state):
        loaded = Teacher(teacher, as_you_run_it)
        given = Given(source, bundled, loaded, prompts, extractor, judges, calibration)
        return all_stages(site, settings, given)


def all_stages(site: Site, settings: Settings, given: Given) -> dict[str, Any]:
    """Return the metrics of a run in its claimed folder, after all that is missing there was made."""
    (source, bundled, (teacher, as_you_run_it), prompts, extractor, judges, recorded), run = given, settings.run
    folder = site.state.parent
    if prompts:  # where they came from may change meanwhile
        copy_of_prompts = str(folder / PROMPTS_FILE)
        run = replace(run, prompts_file=copy_of_prompts, dataset_name=None, dataset_config_name=None)
    site.say(f"calibration set: {run.num_trajectories} full-precision trajectories")
    calibration = recording(site, teacher, run) if recorded is None else recorded
    folds = settings.distillation.folds(calibration.plan)
    if folds:
        check_folding(teacher, run, calibration.plan.folded())
    has_both_ways = "guidance" in run.wanted_ablations() and can_fold(teacher, run, calibration.plan)
    site.say(f"progressive quantization to {settings.quantization.weight_bits:g} bits")
    arms = arms_of(settings.distillation, run.wanted_ablations(), fold_otherwise=not folds if has_both_ways else None)
    trained: dict[str, Trained] = {}
    models = {}
    variants = variants_of(settings)
    keys = [key for arm in arms for key, _ in stages_of(arm, run)]
    first_updates = {key: index * settings.distillation.max_train_steps for index, key in enumerate(keys)}
    with ExitStack() as stack:
        with together():
            journal = stack.enter_context(journal_of(settings, site.state))
        quantized, history = quantized_model(
            site,
            "pq",
            teacher,
            calibration,
            settings.quantization,
            settings.progressive,
            partial(tell_of_round, journal, "pq", 0),
        )
        num_steps = len(history.rounds)  # of the trackers
        supervision = Supervision(run, folder, teacher, calibration, first_updates, journal, num_steps)
        for arm in arms:
            trained |= distilled_students(site, arm, run, teacher, calibration, quantized, supervision)
        num_steps += len(keys) * settings.distillation.max_train_steps
        for variant in variants:
            site.say(variant.name)
            models[variant.key], others = quantized_model(
                site,
                variant.key,
                teacher,
                calibration,
                variant.quantization,
                variant.progressive,
                partial(tell_of_round, journal, variant.key, num_steps),
            )
            num_steps += len(others.rounds)

    fewer = {stride: calibration.student_arguments(teacher, stride) for stride in strides_of(run) if stride > 1}
    rows = [
        *untrained_rows(teacher, as_you_run_it, settings, fewer),
        *(guidance_rows(teacher, calibration, strides_of(run)[-1], folded=folds) if has_both_ways else []),
        *quantized_rows(teacher, quantized, run.num_inference_steps, fewer),
        *student_rows(teacher, arms, run, trained, calibration),
        *variant_rows(teacher, variants, models, run.num_inference_steps),
    ]
    judge = Judge(extractor, prompt_labels_of(source, extractor, inputs_of_run(run).measured), judges)
    measured = measured_rows(site, rows, teacher, run, judge)

    def finished() -> dict[str, Any]:
        site.say("saving")
        arguments = student_arguments(teacher, calibration, strides_of(run)[-1], folded=folds)
        metrics = {
            **metrics_of(site, settings, source, calibration, history, trained, measured),
            **pipeline_facts(source, bundled, Teacher(teacher, as_you_run_it), trained["pq_cad"].student),
            "adapter": adapter_of_run(run, trained["pq_cad"].student),
            **call_facts(run, arguments, folded=folds),
            "prompts_from": prompts_from(settings.run) if prompts else None,
        }
        save_results(folder, site, metrics, history, rows, run)
        metrics["memory"] = memory_of_run(site, source, teacher, run, metrics) if run.measure_memory else None
        save_json(folder / "metrics.json", metrics)
        repo = run.hub_model_id or folder.name  # a local copy is loaded from where the reader put it
        card = hub.model_card(metrics, repo=repo, license_id=source.license)
        hub.write_card(folder, card, on_hub=pushing.card_on_hub(repo) if run.push_to_hub else None)
        if run.push_to_hub:
            site.say(f"pushed: {pushing.push(folder, repo, private=run.hub_private_repo)}")
        return metrics

    return on_main(finished)


def prepare_process(run: CompressConfig) -> None:
    """Set threads, seeds and precision of this process; ValueError where it cannot run as the settings say."""
    # In fp32 and where the settings say, whatever the user's Accelerate config does: the figures are for that.
    # By default NVIDIA's convolutions would round their inputs to 10 bits.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = run.allow_tf32
    accelerator = accelerator_on(run.train_device)
    if run.train_device != accelerator.device.type:
        raise ValueError(
            "train_device: expected 'cpu' or the kind of accelerator that torch finds here "
            f"({accelerator.device.type}), got {run.train_device!r}."
        )
    set_threads(run)
    set_seed(run.seed)
    if not is_main():
        quieten_()
    if run.push_to_hub:
        on_main(pushing.check_access)


def set_threads(run: CompressConfig) -> None:
    """Let torch take as many threads as `run` says; 0: this process's share of the cores that it may use."""
    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    here = get_int_from_env(["LOCAL_WORLD_SIZE"], 1)  # processes that share this computer
    torch.set_num_threads(run.num_threads or max(1, ours // here))


def quieten_() -> None:
    """Keep warnings and bars of this process to itself: the main one shows its own."""
    logging.getLogger("diffusers_pqcad").setLevel(logging.ERROR)
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def check_is_shared(folder: Path) -> None:
    """Raise ValueError where the folder that the main process has claimed is not to be seen from here."""
    if not (folder / "state").is_dir():
        raise ValueError(
            f"output_dir: {folder} is another folder on this computer than on that of the main process; give one that "
            "all of them share."
        )


# Recording and PQ


def recording(site: Site, teacher: Any, run: CompressConfig) -> CalibrationSet:
    """Return the run's own calibration set, recorded or read back."""
    path = site.state / "calibration"
    is_there = on_main(path.exists)
    calibration = CalibrationSet.load(path) if is_there else record(teacher, run, path, progress=site.progress)
    check_recording(calibration, teacher, run)
    return calibration


def quantized_model(
    site: Site,
    key: str,
    teacher: Any,
    calibration: CalibrationSet,
    quantization: PQCADConfig,
    progressive: ProgressiveConfig,
    on_round: Callable[[int, dict[str, Any]], None],
) -> tuple[nn.Module, History]:
    """Return the fake-quantized model of a PQ, on the CPU, and its history; its checkpoint is what is kept.

    `on_round` hears of each round that it takes now.
    """
    model = copy.deepcopy(denoiser_of(teacher)).to(site.device)
    path = site.state / f"{key}.safetensors"
    begun = on_main(time_of, path)
    if begun is None:
        on_main(note_training, site, key)
    with stopping_at_checkpoints(), offloaded(denoiser_of(teacher), store_in(site.offload_folder)):
        history = progressive_quantize(
            model,
            calibration,
            quantization,
            progressive,
            checkpoint=path,
            offload_folder=site.offload_folder,
            progress=site.progress,
            on_round=on_round,
        )
    if on_main(time_of, path) != begun:  # it was not finished before
        on_main(note_training, site, key)
    return model.to("cpu"), history


def time_of(path: Path) -> int | None:
    """Return when a file was last written, in ns; None where there is none."""
    return path.stat().st_mtime_ns if path.exists() else None


def variants_of(settings: Settings) -> list[Variant]:
    """Return the further PQs that the ablations ask for."""
    bits = fixed_bits(settings.quantization)
    plain = replace(settings.progressive, beta=0.0)
    one_width = replace(settings.quantization, weight_bits=bits, bit_choices=(bits,))
    variants = {
        "momentum": Variant("pq_no_momentum", "PQ without momentum", settings.quantization, plain),
        "width": Variant(
            "fixed_reconstructed", f"fixed-bit ({bits}) + reconstruction", one_width, settings.progressive
        ),
    }
    return [variant for name, variant in variants.items() if name in settings.run.wanted_ablations()]


def fixed_bits(quantization: PQCADConfig) -> int:
    """Return the widest single width within the budget: what PQ is compared with."""
    return max(bits for bits in quantization.bit_choices if bits <= quantization.weight_bits)


# CAD


def arms_of(config: DistillConfig, ablations: Sequence[str], *, fold_otherwise: bool | None = None) -> list[Arm]:
    """Return the student of a run, and those of its ablations, each with its part of CAD changed.

    `fold_otherwise`: whether guidance is folded in the arm that is the other way round; None: there is no such arm.
    """
    whole = replace(config, teacher="quantized", calibration=True)
    others = {
        "teacher": Arm("cad_calibration_only", "CAD: calibration only", replace(whole, teacher="none")),
        "float_teacher": Arm("cad_float_teacher", "CAD: full-precision teacher", replace(whole, teacher="fp")),
        "calibration": Arm("cad_no_calibration", "CAD: no calibration", replace(whole, calibration=False)),
    }
    if fold_otherwise is not None:
        key, way = ("cad_folded", "guidance folded") if fold_otherwise else ("cad_guided", "both branches of guidance")
        others["guidance"] = Arm(key, f"CAD: {way}", replace(whole, fold_guidance=fold_otherwise))
    return [Arm("pq_cad", "PQ + CAD", config), *(arm for name, arm in others.items() if name in ablations)]


def stages_of(arm: Arm, run: CompressConfig) -> list[Stage]:
    """Return the students of an arm in their order; the last has the arm's key, the others their steps in it, too."""
    *earlier, last = strides_of(run)
    named = [Stage(f"{arm.key}_{run.num_inference_steps // stride}", stride) for stride in earlier]
    return [*named, Stage(arm.key, last)]


class Lesson(NamedTuple):
    """What a student learns from: trajectories in its teacher's steps, how many of those one of its own is, settings.

    The trajectories' plan is that of the teacher's calls.
    """

    calibration: CalibrationSet
    stride: int
    config: DistillConfig


def lesson_of(config: DistillConfig, calibration: CalibrationSet, stride: int) -> Lesson:
    """Return how a student that takes every `stride`-th of the recorded steps learns.

    From the second halving on, a quantized teacher is the student before it: it takes twice as many steps, and has
    guidance folded in, if at all. A full-precision teacher takes all steps.
    """
    if stride <= 2 or config.teacher != "quantized":
        return Lesson(calibration, stride, config)
    halved = calibration.every(stride // 2)
    view = halved.folded() if config.folds(calibration.plan) else halved
    return Lesson(view, 2, replace(config, fold_guidance=False))


def distilled_students(
    site: Site,
    arm: Arm,
    run: CompressConfig,
    teacher: Any,
    calibration: CalibrationSet,
    quantized: nn.Module,
    supervision: Supervision,
) -> dict[str, Trained]:
    """Return the students of an arm by key, each of which begins as the one before, the first as PQ's model."""
    found: dict[str, Trained] = {}
    before = quantized
    for stage in stages_of(arm, run):
        site.say(f"distillation: {arm.name}, {run.num_inference_steps // stage.stride} steps")
        lesson = lesson_of(arm.config, calibration, stage.stride)
        watcher = supervision.of(stage.key, stage.stride, folded=arm.config.folds(calibration.plan))
        found[stage.key] = distilled_student(site, stage.key, lesson, teacher, before, watcher)
        before = found[stage.key].student
    return found


def distilled_student(
    site: Site, key: str, lesson: Lesson, teacher: Any, before: nn.Module, watcher: Watcher
) -> Trained:
    """Return the student that begins as the model `before`, trained or read back."""
    path = site.state / f"{key}.safetensors"
    folds = lesson.config.folds(lesson.calibration.plan)
    with stopping_at_checkpoints():
        saved = cached(
            path,
            lambda: trained_student(site, key, lesson, teacher, before, watcher) | {"folds": folds},
            save_checkpoint,
            load_checkpoint,
        )
    if saved.get("folds", False) != folds:  # older versions folded nothing
        raise ValueError(f"{path}: this student was trained with both branches of guidance; give another output_dir.")
    student = adapted_(copy.deepcopy(before), lesson.config)
    load_fake_quant_state_(student, saved["student"])
    return Trained(student, saved["stats"])


def trained_student(
    site: Site, key: str, lesson: Lesson, teacher: Any, before: nn.Module, watcher: Watcher
) -> dict[str, Any]:
    """Return the state of a student after its training, `student`, and what the training said of itself, `stats`."""
    calibration, stride, config = lesson
    student = copy.deepcopy(before).to(site.device)
    store = store_in(site.offload_folder)
    speaker = cad_teacher(config, teacher, before, store)
    if speaker is not None:
        speaker = speaker.to(site.device)
    on_main(note_training, site, key)
    log = site.state / f"{key}-log.json"
    entries = {entry["step"]: entry for entry in on_main(entries_of, log)}
    resume, watch = resume_file(site.state, key), watcher.watch(student)
    entries_of_training = distill(
        student,
        speaker,
        calibration,
        config,
        stride=stride,
        checkpoint=resume,
        watch=watch,
        offload_folder=site.offload_folder,
    )
    del speaker  # of which the training may have made a smaller copy
    description = f"CAD to {calibration.num_inference_steps // stride} steps"
    with (
        offloaded(denoiser_of(teacher), store),
        offloaded(before, store),
        tqdm(total=config.max_train_steps, desc=description, unit="update", disable=not site.progress) as bar,
    ):
        for entry in entries_of_training:
            watcher.tell(entry)
            bar.update(entry.step - bar.n)
            if entry.held_out_error is not None:
                entries[entry.step] = asdict(entry)
                first = next(iter(entries.values()))["held_out_error"]
                errors = {"first": first, "now": entry.held_out_error, "best": entry.best_error}
                bar.set_postfix({name: f"{error:.2e}" for name, error in errors.items()})
                on_main(save_json, log, list(entries.values()))
    return {"student": fake_quant_state(student.to("cpu")), "stats": list(entries.values())}


def entries_of(log: Path) -> list[dict[str, Any]]:
    """Return what a training said of itself before it was stopped."""
    return load_json(log) if log.exists() else []


def cad_teacher(
    config: DistillConfig, teacher: Any, quantized: nn.Module, store: Store | None = None
) -> nn.Module | None:
    """Return the model whose landing points a student learns, a copy: the table measures the teacher on the CPU.

    Rounded weights lie in the `store`, if there is one.
    """
    if config.teacher == "none":
        return None
    if config.teacher == "fp":
        return copy.deepcopy(denoiser_of(teacher))
    return freeze_(sharing_copy(quantized), store)


# The table


def untrained_rows(
    teacher: Any, as_you_run_it: Any | None, settings: Settings, fewer: dict[int, dict[str, Any]]
) -> list[Row]:
    """Return the rows of the teacher itself, and of what quantizing it without data gives.

    `as_you_run_it` is the teacher with its own scheduler, where that was replaced; `fewer` what to call a pipeline
    with for every n-th of its steps, by n.
    """
    steps, bits = settings.run.num_inference_steps, fixed_bits(settings.quantization)
    fixed = replace(settings.quantization, method="fixed", weight_bits=bits)
    rows = [
        Row("float", "full precision", teacher, steps),
        *rows_in_fewer_steps("float", "full precision", teacher, fewer),
    ]
    measured = {row.num_inference_steps for row in rows}
    others = [count for count in dict.fromkeys(settings.run.float_steps or ()) if count not in measured]
    rows += [Row(f"float_{count}", "full precision", teacher, count) for count in others]
    if as_you_run_it is not None:
        name = f"full precision, as you run it ({type(as_you_run_it.scheduler).__name__})"
        own_steps = own_num_inference_steps(as_you_run_it, settings.run)
        rows.append(Row("as_you_run_it", name, as_you_run_it, own_steps))
    rows.append(Row("fixed", f"fixed-bit ({bits}, round to nearest)", at_load_time(teacher, fixed), steps))
    if "load_time" in settings.run.wanted_ablations():
        name = "progressive, load time (weights alone)"
        rows.append(Row("load_time", name, at_load_time(teacher, settings.quantization), steps))
    return rows


def rows_in_fewer_steps(key: str, name: str, pipeline: Any, fewer: dict[int, dict[str, Any]]) -> list[Row]:
    """Return the rows of a pipeline in half the steps, and in as many fewer as there are further halvings."""
    return [
        row_of(
            f"{key}_half" if stride == 2 else f"{key}_{arguments['num_inference_steps']}", name, pipeline, arguments
        )
        for stride, arguments in fewer.items()
    ]


def guidance_rows(teacher: Any, calibration: CalibrationSet, stride: int, *, folded: bool) -> list[Row]:
    """Return the rows of the teacher without guidance, beside a student that takes every `stride`-th of its steps.

    In as many steps, and in as many model evaluations: that is one row where guidance is `folded` into the student.
    """
    rows = []
    for every in [stride] if folded or stride == 1 else [stride // 2, stride]:
        arguments = calibration.student_arguments(teacher, every) | FOLDED_CALL
        key = f"float_unguided_{arguments['num_inference_steps']}"
        rows.append(row_of(key, "full precision, guidance off", teacher, arguments))
    return rows


def at_load_time(teacher: Any, quantization: PQCADConfig) -> Any:
    """Return a pipeline like the teacher's, quantized as `from_pretrained` would."""
    model = copy.deepcopy(denoiser_of(teacher))
    return pipeline_with(teacher, below_adapter_(model, partial(quantize_, config=quantization)))


def quantized_rows(
    teacher: Any, quantized: nn.Module, num_inference_steps: int, fewer: dict[int, dict[str, Any]]
) -> list[Row]:
    """Return the rows of PQ without CAD, in all steps and in `fewer` of them."""
    packed = pipeline_with(teacher, below_adapter_(copy.deepcopy(quantized), convert_))
    return [
        Row("pq", "PQ", packed, num_inference_steps),
        *rows_in_fewer_steps("pq", "PQ, not distilled", packed, fewer),
    ]


def student_rows(
    teacher: Any, arms: list[Arm], run: CompressConfig, trained: dict[str, Trained], calibration: CalibrationSet
) -> list[Row]:
    """Return the rows of the students, which are packed in place."""
    rows = []
    for arm in arms:
        folded = arm.config.folds(calibration.plan)
        for key, stride in stages_of(arm, run):
            pipeline = student_pipeline(teacher, trained[key].student, calibration, stride, folded=folded)
            arguments = student_arguments(teacher, calibration, stride, folded=folded)
            rows.append(row_of(key, arm.name, pipeline, arguments))
    return rows


def variant_rows(
    teacher: Any, variants: list[Variant], models: dict[str, nn.Module], num_inference_steps: int
) -> list[Row]:
    """Return the rows of the further PQs, whose models are packed in place."""
    return [
        Row(
            variant.key,
            variant.name,
            pipeline_with(teacher, below_adapter_(models[variant.key], convert_)),
            num_inference_steps,
        )
        for variant in variants
    ]


def measured_rows(
    site: Site, rows: list[Row], teacher: Any, run: CompressConfig, judge: Judge
) -> list[dict[str, Any]]:
    """Return what the table says of each row, measured or read back."""
    samples = Samples(
        **cached(
            site.state / "reference_samples.safetensors",
            lambda: reference_samples(teacher, run, progress=site.progress)._asdict(),
            save_checkpoint,
            load_checkpoint,
        )
    )
    measured = []
    for index, row in enumerate(rows, start=1):
        site.say(f"measuring, row {index} of {len(rows)}: {row.name}, {row.num_inference_steps} steps")
        make = partial(measurement, site, row, teacher, run, samples, judge)
        measured.append(cached(site.state / "rows" / f"{row.key}.json", make, save_json, load_json))
    return measured


def measurement(
    site: Site, row: Row, teacher: Any, run: CompressConfig, samples: Samples, judge: Judge
) -> dict[str, Any]:
    """Return what the table says of one row; its model is saved in the folder of the state, and stays there."""
    report = measure(
        row,
        teacher,
        run,
        samples=samples,
        extractor=judge.extractor,
        prompt_labels=judge.prompt_labels,
        judges=judge.judges,
        weights=site.state / "models" / row.key,
        progress=site.progress,
    )
    return {"key": row.key, "name": row.name} | report


# The results


def metrics_of(
    site: Site,
    settings: Settings,
    source: TeacherSource,
    calibration: CalibrationSet,
    history: History,
    trained: dict[str, Trained],
    rows: list[dict[str, Any]],
) -> dict[str, Any]:
    """Return what `metrics.json` holds, from which tables and cards are written."""
    best, rounds = {key: stats[-1] for key, (_, stats) in trained.items()}, history.rounds
    infinite = {key: "inf" for key, value in flat(settings).items() if value == math.inf}  # JSON has none
    left_out = (*LOCAL_SETTINGS, *PROMPT_SETTINGS)
    values = {key: value for key, value in (flat(settings) | infinite).items() if key not in left_out}
    return {
        "teacher_id": source.name,
        "settings": values,
        "calibration_seed": calibration.manifest["seed"],
        "num_held_out": len(calibration.split()[1]),
        "pq": {
            "average_bits": history.summary["average_bits"],
            "num_rounds": len(rounds),
            "num_stages": len({entry["stage"] for entry in rounds}),
            "bits": history.summary["bits"],
        },
        "cad": {
            "best_step": best["pq_cad"]["best_step"],
            "best_error": best["pq_cad"]["best_error"],
            "best_steps": {key: last["best_step"] for key, last in best.items()},
            "steps": settings.distillation.max_train_steps,
        },
        "training": noted_trainings(site),
        "environment": environment(),
        "rows": rows,
    }


def pipeline_facts(
    source: TeacherSource, bundled: Sequence[TeacherSource], teacher: Teacher, student: nn.Module
) -> dict[str, Any]:
    """Return where the teacher comes from, which of its models the packed `student` is, and what is as it was."""
    pipeline, own = teacher
    is_bundled = any(source.path == other.path for other in bundled)
    component = denoiser_name(pipeline)
    models = [name for name, item in pipeline.components.items() if isinstance(item, nn.Module) and name != component]
    return {
        "teacher_from": "bundled" if is_bundled else "folder" if Path(source.path).exists() else "hub",
        "schedulers": {
            "recorded": type(pipeline.scheduler).__name__,
            "own": None if own is None else type(own.scheduler).__name__,
        },
        "component": component,
        "pipeline_tag": task_of(type(pipeline)),
        "base_license": {"license": source.license} if source.license else license_of(source.path),
        "other_models": models,
        "float_layers": list(quantizable_layers(student)),
    }


def adapter_of_run(run: CompressConfig, student: nn.Module) -> dict[str, Any] | None:
    """Return what a reader must know of the adapter of the packed `student`: None without one."""
    facts = adapter_facts(student)
    return None if facts is None else facts | {"is_given": run.lora_weights is not None}


def call_facts(run: CompressConfig, arguments: dict[str, Any], *, folded: bool) -> dict[str, Any]:
    """Return what a reader needs to call the student as it was measured, and which inputs that was with.

    `arguments` are those of the student alone; `folded`: guidance is folded into it.
    """
    facts: dict[str, Any] = {
        "student_arguments": arguments,
        "guidance_folded": folded,
        "call_arguments": call_arguments(run),
        "inputs": None,
        "shown_inputs": [],
    }
    recorded, measured = inputs_of_run(run)
    if recorded is None or measured is None:
        return facts
    kind = "prompt" if run.prompts_file is not None else "class_labels"
    seen = {item[kind] for item in recorded[: run.num_trajectories]}
    used = {item[kind] for item in measured[: run.num_images]}
    count = min(MAX_SHOWN_IMAGES, run.num_images)
    return facts | {
        "inputs": {
            "kind": kind,
            "num_recorded": len(seen),
            "num_measured": len(used),
            "num_shared": len(seen & used),
            "negative_prompt": run.negative_prompt,
        },
        "shown_inputs": [measured[index % len(measured)][kind] for index in range(count)],
    }


def memory_of_run(
    site: Site, source: TeacherSource, teacher: Any, run: CompressConfig, metrics: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return what the saved student of a run takes beside its `teacher`, measured or read back; see `memory_rows`."""
    site.say("memory while sampling, in three processes, one after the other")
    measured, mine = inputs_of_run(run).measured, metrics["student_arguments"]
    shared: dict[str, Any] = {"inputs": None if measured is None else measured[:1]}
    shared["num_threads"] = torch.get_num_threads()
    shared["num_inference_steps"] = mine["num_inference_steps"]
    others = {name: value for name, value in mine.items() if name != "num_inference_steps"}
    student = Sampling(
        run.output_dir,
        arguments=metrics["call_arguments"] | others,
        lora=None if metrics["adapter"] is None else run.output_dir,
        **shared,
    )
    loading = loading_arguments(run)
    whole = Sampling(
        source.path, arguments=metrics["call_arguments"], lora=run.lora_weights, loading=loading, **shared
    )
    by_key = {row["key"]: row["size_bytes"] for row in metrics["rows"]}
    make = partial(memory_rows, whole, student, denoiser_of(teacher), (by_key["float"], by_key["pq_cad"]), site.state)
    return cached(site.state / "memory.json", make, save_json, load_json)


def save_results(
    folder: Path,
    site: Site,
    metrics: dict[str, Any],
    history: History,
    rows: list[Row],
    run: CompressConfig,
) -> None:
    """Write the student's pipeline, the metrics, the history and the pictures."""
    by_key = {row.key: row for row in rows}
    student, adapter = parted(by_key["pq_cad"].pipeline)
    student.save_pretrained(folder)
    save_adapter(student, adapter, folder)
    save_json(folder / "metrics.json", metrics)
    history.save(folder / "history.json")
    assets = folder / "assets"
    assets.mkdir(exist_ok=True)
    shown = {"teacher": by_key["float"], "PQ": by_key["pq"], "PQ + CAD": by_key["pq_cad"]}
    count, inputs = min(MAX_SHOWN_IMAGES, run.num_images), inputs_of_run(run).measured
    grid = {
        f"{name}, {row.num_inference_steps}": sample_images(row, run, inputs, count=count)
        for name, row in shown.items()
    }
    plot_samples(assets / "samples.png", grid, [str(item) for item in metrics["shown_inputs"]])
    plot_bits(assets / "bits.png", history.rounds)
    logs = sorted(site.state.glob("*-log.json"))
    plot_curves(assets / "curves.png", {path.stem.removesuffix("-log"): load_json(path) for path in logs})
