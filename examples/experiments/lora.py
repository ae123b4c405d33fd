"""What a LoRA gives back to a quantized pipeline, and what training scales or a LoRA alone costs beside training all.

    python examples/experiments/lora.py --teacher examples/models/emoji --seeds 0 1 2

A few-step LoRA is distilled in floating point first: guidance folded into one branch, the steps halved. "repair": how
far that LoRA's images move when the base below it is packed, and how much of it a short training of the LoRA alone
brings back. "trainable": CAD to half the steps from one PQ state, by what it trains. Packed models, by the kernels of
this computer. Every row is a JSON of its own in --output_dir; a killed run goes on from there.
"""

import copy
import ctypes
import gc
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from subjects import CALIBRATION_SEED, RESULTS, ROOT, cached, fidelity, file_name
from torch import Tensor, nn
from tqdm.auto import tqdm

from diffusers_pqcad import DistillConfig, PQCADConfig, ProgressiveConfig, distill, progressive_quantize
from diffusers_pqcad.compression.adapters import Adapter, below_adapter_, put_adapter_, take_adapter_
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.checkpoint import load_checkpoint, save_checkpoint
from diffusers_pqcad.compression.denoiser import pipeline_with
from diffusers_pqcad.compression.distillation import adapted_
from diffusers_pqcad.compression.fake_quant import convert_, fake_quant_state, freeze_, load_fake_quant_state_
from diffusers_pqcad.compression.recording import collect_calibration_set
from diffusers_pqcad.evaluation import generate_samples
from diffusers_pqcad.publishing.pipelines import denoiser_of, load_teacher, prompts_of_file
from diffusers_pqcad.publishing.students import student_arguments

NUM_STEPS = 20  # of the teacher, guided
HALVINGS = 2  # of the few-step LoRA: 5 steps
PQ: dict[str, Any] = {}  # what differs from PQ's defaults
Maker = Callable[["Repair", dict[str, Any]], nn.Module]  # of a row's model; it may write to the row
CLEAR = Path("/proc/self/clear_refs")  # "5" sets the peak back (Linux)


@dataclass(frozen=True)
class Context:
    """What all rows of a seed share: the teacher, its prompts, how it is called, and where work is kept.

    `config` is that of CAD and of the repair, `lora_updates` how long each halving of the few-step LoRA takes.
    """

    pipeline: Any
    recorded: list[str]
    measured: list[str]
    arguments: dict[str, Any]
    config: DistillConfig
    lora_updates: int
    bits: float
    num_images: int
    folder: Path

    @property
    def model(self) -> Any:
        """A copy of the teacher's denoiser."""
        return copy.deepcopy(denoiser_of(self.pipeline))

    def latents(self, model: nn.Module, **changes: Any) -> Tensor:
        """Return the final latents of `model` in the teacher's pipeline, (num_images, C, H, W)."""
        return generate_samples(
            pipeline_with(self.pipeline, model),
            self.measured,
            num_images=self.num_images,
            seed=self.config.seed,
            progress=False,
            **self.arguments | changes,
        )

    def recording(self, key: str, model: nn.Module, **changes: Any) -> CalibrationSet:
        """Return the trajectories of `model` for the prompts that are recorded; they are kept as `key`."""
        path = self.folder / key
        if not path.exists():
            collect_calibration_set(
                pipeline_with(self.pipeline, model),
                self.recorded,
                seed=self.config.seed + CALIBRATION_SEED,
                output_dir=path,
                progress=False,
                **self.arguments | changes,
            )
        return CalibrationSet.load(path)

    def kept(self, key: str, make: Callable[[], Tensor]) -> Tensor:
        """Return what `make` makes, which is kept as `key`."""
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            save_checkpoint(path, {"latents": make()})
        return load_checkpoint(path)["latents"]

    def quantized(self, key: str, model: nn.Module, calibration: CalibrationSet) -> nn.Module:
        """Return `model` after PQ, in place; its checkpoint is kept as `key`."""
        progressive_quantize(
            model,
            calibration,
            PQCADConfig(weight_bits=self.bits, activation_bits=8),
            ProgressiveConfig(seed=self.config.seed, **PQ),
            checkpoint=self.folder / f"{key}.safetensors",
            progress=False,
        )
        return model


def few_step_lora(context: Context, guided: CalibrationSet) -> Adapter:
    """Return a LoRA of the float denoiser for few steps without guidance: it learns one halving after the other."""
    config = replace(context.config, teacher="fp", trainable="lora", max_train_steps=context.lora_updates)
    student, path = adapted_(context.model, config), context.folder / "few-step.safetensors"
    if not path.exists():
        for halving in range(1, HALVINGS + 1):
            resume = context.folder / f"few-step-{halving}.safetensors"
            train(student, context.model, guided, config, stride=2**halving, checkpoint=resume)
        save_checkpoint(path, fake_quant_state(student))
    load_fake_quant_state_(student, load_checkpoint(path))
    adapter = take_adapter_(student)
    assert adapter is not None  # it was just trained
    return adapter


def train(
    student: nn.Module, teacher: nn.Module | None, calibration: CalibrationSet, config: DistillConfig, **options: Any
) -> nn.Module:
    """Return `student` after its training, in place."""
    for _ in distill(student, teacher, calibration, config, **options):
        pass
    return student


def memory(name: str) -> int:
    """Return this process's memory in bytes: "VmRSS" now, "VmHWM" at most since its peak was set back."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


@contextmanager
def costs(row: dict[str, Any]) -> Iterator[None]:
    """Write to `row` the seconds that the block takes, the process's most memory in it, and by how much it grew."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier rows freed would hide what this one takes
    CLEAR.write_text("5")
    before, started = memory("VmRSS"), time.perf_counter()
    yield
    peak = memory("VmHWM")
    row |= {"seconds": time.perf_counter() - started, "peak_bytes": peak, "grown_bytes": peak - before}


class Repair(NamedTuple):
    """What the rows of the repair share: the LoRA, the float denoiser with it, and how it is called and recorded."""

    context: Context
    adapter: Adapter
    adapted: nn.Module
    guided: CalibrationSet
    recorded: CalibrationSet
    few: dict[str, Any]


def repair_of(context: Context) -> Repair:
    """Return what the rows of the repair share, made or read back."""
    guided = context.recording("guided", context.model)
    adapter = few_step_lora(context, guided)
    adapted = put_adapter_(context.model, adapter)
    few = student_arguments(context.pipeline, guided, 2**HALVINGS, folded=True)
    return Repair(context, adapter, adapted, guided, context.recording("few-step", adapted, **few), few)


def unchanged(shared: Repair, row: dict[str, Any]) -> nn.Module:
    """Return the float denoiser with the LoRA."""
    return shared.adapted


def on_quantized_base(shared: Repair, row: dict[str, Any]) -> nn.Module:
    """Return the denoiser that was quantized without the LoRA, as the guided teacher is called, with it."""
    context = shared.context
    return put_adapter_(context.quantized("base", context.model, shared.guided), shared.adapter)


def quantized_below(shared: Repair, row: dict[str, Any]) -> nn.Module:
    """Return the denoiser that was quantized with the LoRA on, as it is called with it."""
    return shared.context.quantized("below", copy.deepcopy(shared.adapted), shared.recorded)


def merged(shared: Repair, row: dict[str, Any]) -> nn.Module:
    """Return the denoiser that was quantized with the LoRA in its weights."""
    context, model = shared.context, put_adapter_(shared.context.model, shared.adapter)
    model.fuse_lora()  # type: ignore[operator]
    take_adapter_(model)
    return context.quantized("merged", model, context.recording("few-step-merged", model, **shared.few))


def repaired(start: Maker, teacher: Any, shared: Repair, row: dict[str, Any]) -> nn.Module:
    """Return what `start` makes after a training of its LoRA on the float pipeline's few-step recording."""
    student, config = start(shared, row), replace(shared.context.config, trainable="lora", teacher=teacher)
    with costs(row):
        return train(student, shared.adapted if teacher == "fp" else None, shared.recorded, config, stride=1)


REPAIR: dict[str, Maker] = {
    "float + LoRA": unchanged,
    "quantized base + same LoRA": on_quantized_base,
    "quantized below the LoRA": quantized_below,
    "LoRA merged, then quantized": merged,
    "quantized base, repaired": partial(repaired, on_quantized_base, "fp"),
    "quantized base, repaired by the recording alone": partial(repaired, on_quantized_base, "none"),
    "quantized below the LoRA, repaired": partial(repaired, quantized_below, "fp"),
}


def repair_row(context: Context, name: str) -> dict[str, Any]:
    """Return what a row of the repair came to: against the float pipeline with the LoRA, and against the teacher."""
    shared = repair_of(context)
    row = {"num_steps": shared.few["num_inference_steps"]}
    model = REPAIR[name](shared, row)
    wanted = context.kept("few-step-latents", lambda: context.latents(shared.adapted, **shared.few))
    if name == "float + LoRA":
        return row | against_teacher(context, wanted)
    found = context.latents(below_adapter_(model, convert_), **shared.few)
    return row | against_teacher(context, found) | fidelity(wanted, found)


def against_teacher(context: Context, found: Tensor) -> dict[str, float]:
    """Return the SQNR of `found` (n, C, H, W) to the guided teacher in all its steps, in dB."""
    quality = fidelity(context.kept("teacher-latents", lambda: context.latents(context.model)), found)
    return {f"teacher_{name}": quality[name] for name in ("mean", "median")}


def trainable_row(context: Context, trainable: Any) -> dict[str, Any]:
    """Return what CAD to half the steps came to, and took, by what it trains."""
    guided = context.recording("guided", context.model)
    student = context.quantized("base", context.model, guided)
    few = student_arguments(context.pipeline, guided, 2, folded=True)
    row = {"num_steps": few["num_inference_steps"]}
    teacher = freeze_(copy.deepcopy(student))
    with costs(row):
        train(student, teacher, guided, replace(context.config, trainable=trainable))
    wanted = context.kept("teacher-latents", lambda: context.latents(context.model))
    return row | fidelity(wanted, context.latents(below_adapter_(student, convert_), **few))


TASKS: dict[str, tuple[Sequence[str], Callable[[Context, str], dict[str, Any]]]] = {
    "repair": (tuple(REPAIR), repair_row),
    "trainable": (("all", "scales", "lora"), trainable_row),
}


def context_of(args: Any, seed: int) -> Context:
    """Return what the rows of a seed share; prompts that are not recorded are measured."""
    prompts = prompts_of_file(args.prompts_file or args.teacher / "prompts.txt")
    pipeline = load_teacher(str(args.teacher)).pipeline
    pipeline.set_progress_bar_config(disable=True)
    arguments = {"num_inference_steps": NUM_STEPS, "guidance_scale": args.guidance_scale}
    return Context(
        pipeline=pipeline,
        recorded=prompts[: args.num_trajectories],
        measured=prompts[args.num_trajectories :] or prompts,
        arguments=arguments,
        config=DistillConfig(
            max_train_steps=args.max_train_steps, train_batch_size=args.train_batch_size, rank=args.rank, seed=seed
        ),
        lora_updates=args.lora_updates,
        bits=args.bits,
        num_images=args.num_images,
        folder=args.work_dir / f"{args.teacher.name}-{seed}-{args.bits:g}",
    )


def measured_row(about: dict[str, Any], make: Callable[[Context, str], dict[str, Any]], context: Context) -> Any:
    """Return a row: what it is `about`, and what it came to."""
    return about | make(context, about["arm"])


def main(arguments: list[str] | None = None) -> None:
    """Measure every row that is not there yet."""
    parser = ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--teacher", type=Path, default=ROOT / "examples" / "models" / "emoji")
    parser.add_argument("--prompts_file", type=Path, default=None, help="default: prompts.txt in the teacher's folder")
    parser.add_argument("--guidance_scale", type=float, default=3.0)
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--arms", nargs="+", default=None, help="default: all")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--bits", type=float, default=4.0)
    parser.add_argument("--rank", type=int, default=DistillConfig.rank)
    parser.add_argument("--max_train_steps", type=int, default=DistillConfig.max_train_steps)
    parser.add_argument("--train_batch_size", type=int, default=DistillConfig.train_batch_size)
    parser.add_argument("--lora_updates", type=int, default=1000, help="updates of each halving of the few-step LoRA")
    parser.add_argument("--num_trajectories", type=int, default=128)
    parser.add_argument("--num_images", type=int, default=128)
    parser.add_argument("--num_threads", type=int, default=1)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs" / "lora")
    parser.add_argument("--output_dir", type=Path, default=RESULTS / "lora")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    for seed in args.seeds:
        context = context_of(args, seed)
        about = {"subject": args.teacher.name, "seed": seed, "bits": args.bits}
        for task in args.tasks:
            arms, make = TASKS[task]
            chosen = [name for name in arms if args.arms is None or name in args.arms]
            for name in tqdm(chosen, desc=f"{args.teacher.name}, seed {seed}, {task}", unit="arm"):
                path = args.output_dir / file_name(args.teacher.name, seed, f"{args.bits:g}", task, name)
                cached(path, measured_row, about | {"task": task, "arm": name}, make, context)


if __name__ == "__main__":
    main()
