# /// script
# dependencies = ["diffusers-pqcad[train]"]
# ///
"""Compress an unconditional diffusers pipeline: progressive quantization, then distillation to half the steps.

    accelerate launch examples/distill.py                       # the bundled teacher
    accelerate launch examples/distill.py --pretrained_model_name_or_path my/pipeline --weight_bits 3

Stages: calibration set, PQ, CAD, evaluation, saving. Every stage leaves its result in `output_dir`; the same command
goes on after a kill and ends with the same weights. The output folder is a loadable pipeline with a model card.
"""

import copy
import dataclasses
import json
import os
import sys
from argparse import ArgumentParser
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import DDIMScheduler, DiffusionPipeline
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from diffusers_pqcad import (
    CalibrationSet,
    DistillConfig,
    PQCADConfig,
    ProgressiveConfig,
    collect_calibration_set,
    convert_,
    distill,
    evaluate,
    progressive_quantize,
    quantize_,
)
from diffusers_pqcad.compression.calibration import check_unconditional
from diffusers_pqcad.compression.checkpoint import load_checkpoint, save_checkpoint, write_text
from diffusers_pqcad.compression.fake_quant import fake_quant_state, freeze_, load_fake_quant_state_
from diffusers_pqcad.compression.grid import ddim_grid
from diffusers_pqcad.compression.optimization import check_minimum
from diffusers_pqcad.compression.progressive import WEIGHT_BITS
from diffusers_pqcad.compression.reconstruction import ReconstructionConfig
from diffusers_pqcad.compression.sampling import generate, initial_noise, sample_shape
from diffusers_pqcad.evaluation import generate_samples, load_extractor, to_uint8
from diffusers_pqcad.evaluation.extras import MissingExtraError, require
from diffusers_pqcad.evaluation.speed import environment
from diffusers_pqcad.publishing import hub
from diffusers_pqcad.publishing.plots import plot_bits, plot_curves, plot_samples

HERE = Path(__file__).resolve().parent
BUNDLED_TEACHER = HERE / "models" / "fashion-mnist"
BUNDLED_EXTRACTOR = HERE / "models" / "fashion-mnist-features"
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
        "rounds_per_stage": 1,
        "price_batch_size": 4,
        "reconstruction_iterations": 2,
        "reconstruction_samples": 16,
        "max_train_steps": 4,
        "train_batch_size": 4,
        "evaluation_steps": 2,
        "num_latency_rounds": 1,
    },
}
# What may change between two runs in a folder: the rows there stay as they are.
NEUTRAL_SETTINGS = (
    "output_dir",
    "num_threads",
    "train_device",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "ablations",
)
LOCAL_SETTINGS = ("pretrained_model_name_or_path", "output_dir", "extractor")  # paths of one computer
MINIMUM = {
    "num_trajectories": 4,
    "rounds_per_stage": 1,
    "price_batch_size": 1,
    "reconstruction_iterations": 0,
    "reconstruction_batch_size": 1,
    "reconstruction_samples": 8,
    "max_train_steps": 1,
    "train_batch_size": 1,
    "evaluation_steps": 1,
    "num_images": 2,
    "num_latency_rounds": 1,
    "num_threads": 0,
    "seed": 0,
}
CALIBRATION_SEED_OFFSET = 1_000_000  # the images that are measured must not be those that were trained on


@dataclass
class Settings:
    """Settings of one run; a YAML file (`--config`) and `--preset` change the defaults, flags come last."""

    pretrained_model_name_or_path: str | None = None  # default: the bundled teacher
    output_dir: str = "outputs/distill"
    weight_bits: float = WEIGHT_BITS
    activation_bits: int = 8  # 0: floating point
    num_inference_steps: int = 20  # of the teacher; the student takes half
    num_trajectories: int = 128  # full-precision calibration set
    rounds_per_stage: int = 2
    price_batch_size: int = 16  # images of a round's price measurements
    reconstruction_iterations: int = 100
    reconstruction_batch_size: int = 16
    reconstruction_samples: int = 256
    max_train_steps: int = 320  # of the distillation
    train_batch_size: int = 32
    step_rate: float = 1e-3  # of the distillation, in rounding steps of each layer; Adam
    float_rate: float = 1e-3  # of the distillation, in sizes of each tensor in floating point
    evaluation_steps: int = 40  # updates between two measurements on the held-out trajectories
    num_images: int = 1_000  # per row of the table
    num_latency_rounds: int = 3
    ablations: bool = False
    extractor: str | None = None  # folder of a feature extractor; the bundled one for the bundled teacher
    train_device: str = "cpu"  # or "cuda": where PQ and CAD train; the table is measured on the CPU in any case
    num_threads: int = 0  # 0: all cores of this process (accelerate launch sets a single OpenMP thread)
    seed: int = 42
    push_to_hub: bool = False
    hub_model_id: str | None = None
    hub_private_repo: bool = False
    license: str | None = None  # of the teacher, for the card


def parse_settings(arguments: list[str]) -> Settings:
    """Return the settings of a command line: defaults, then preset, then YAML file, then flags."""

    first = ArgumentParser(add_help=False)
    first.add_argument("--config", help="YAML file of settings; flags override it")
    first.add_argument("--preset", choices=tuple(PRESETS), default="default")
    chosen, rest = first.parse_known_args(arguments)
    defaults = dict(PRESETS[chosen.preset])
    if chosen.config:
        if not Path(chosen.config).is_file():
            raise ValueError(f"--config: there is no file {chosen.config!r}.")
        defaults |= yaml.safe_load(Path(chosen.config).read_text()) or {}
    unknown = sorted(set(defaults) - {item.name for item in dataclasses.fields(Settings)})
    if unknown:
        raise ValueError(f"{chosen.config}: unknown settings {unknown}.")
    parser = HfArgumentParser(Settings, parents=[first], description=(__doc__ or "").split("\n\n")[0])
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(rest)[0]


def set_threads(num_threads: int) -> None:
    """Use `num_threads`, or every core this process may run on."""

    ours = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    torch.set_num_threads(num_threads or ours)


class Run:
    """One run: its folder, what is in it already, and the stages that fill it."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.folder = Path(settings.output_dir)
        self.state = self.folder / "state"
        self.teacher_path = settings.pretrained_model_name_or_path or BUNDLED_TEACHER
        self.is_bundled = Path(self.teacher_path).resolve() == BUNDLED_TEACHER

    def claim_folder(self) -> None:
        """Take the folder for these settings, or refuse one that was begun with others."""
        begun = self.state / "settings.yaml"
        mine = dataclasses.asdict(self.settings)
        if begun.exists():
            theirs = yaml.safe_load(begun.read_text())
            changed = {key: (theirs.get(key), value) for key, value in mine.items() if theirs.get(key) != value}
            changed = {key: values for key, values in changed.items() if key not in NEUTRAL_SETTINGS}
            if changed:
                raise ValueError(
                    f"{self.folder} was begun with other settings; (there, now): {changed}. Give another "
                    "--output_dir, or delete the folder to start over."
                )
        elif self.folder.exists() and any(self.folder.iterdir()):
            raise ValueError(
                f"{self.folder} is not empty and holds no state/settings.yaml; give another --output_dir."
            )
        self.state.mkdir(parents=True, exist_ok=True)
        write_text(begun, yaml.safe_dump(mine, sort_keys=False))
        write_text(self.folder / "recipe.yaml", yaml.safe_dump(self.recipe(), sort_keys=False))

    def recipe(self) -> dict[str, Any]:
        """Return the settings that repeat this run anywhere: nothing of this computer, or of whoever pushes it."""
        settings = dataclasses.asdict(self.settings)
        recipe = {key: value for key, value in settings.items() if key not in (*NEUTRAL_SETTINGS, *LOCAL_SETTINGS)}
        path = self.settings.pretrained_model_name_or_path
        if path is not None and not Path(path).exists():  # on the Hub
            recipe["pretrained_model_name_or_path"] = path
        return recipe

    def teacher_id(self) -> str:
        """Return the teacher's name for cards: its Hub id, or the last part of a local path."""
        if self.is_bundled:
            return "fashion-mnist (bundled)"
        path = Path(self.teacher_path)
        return path.resolve().name if path.exists() else str(self.teacher_path)

    def check_settings(self, scheduler: Any) -> None:
        """Raise ValueError for settings that cannot work, before anything is written."""
        settings = self.settings
        check_minimum(settings, **MINIMUM)
        self.quantization_config()
        ddim_grid(scheduler, settings.num_inference_steps)
        if settings.num_inference_steps % 2:
            raise ValueError(
                f"num_inference_steps={settings.num_inference_steps} is odd; a student takes half the steps."
            )
        ddim_grid(scheduler, settings.num_inference_steps // 2)

    def note_training(self, name: str) -> None:
        """Keep that the training `name` runs here: the table names its places, as the folder may go on elsewhere."""
        path = self.state / f"{name}-training.json"
        places = json.loads(path.read_text()) if path.exists() else []
        here = {"device": self.settings.train_device} | environment()
        keys = ("device", "cpu", "gpu", "torch")
        if not places or any(places[-1][key] != here[key] for key in keys):
            write_text(path, json.dumps([*places, here], indent=1) + "\n")

    def training(self) -> dict[str, Any]:
        """Return the places of each training of this folder, by name."""
        suffix = "-training.json"
        paths = sorted(self.state.glob(f"*{suffix}"))
        return {path.name.removesuffix(suffix): json.loads(path.read_text()) for path in paths}

    def load_teacher(self) -> Any:
        """Return the full-precision pipeline with a DDIM scheduler on a trailing grid."""

        path = str(self.teacher_path)
        try:
            pipeline = DiffusionPipeline.from_pretrained(path)
        except (OSError, ValueError) as error:
            where = "cannot be loaded" if Path(path).is_dir() else "no such folder, and not to be had from the Hub"
            raise ValueError(f"--pretrained_model_name_or_path {path!r}: {where}. {error}") from error
        if set(pipeline.components) != {"unet", "scheduler"}:
            raise ValueError(
                f"{type(pipeline).__name__}: expected an unconditional pipeline of a `unet` and a `scheduler`, got "
                f"{sorted(pipeline.components)}; no other is supported so far."
            )
        check_unconditional(pipeline.unet)
        config = pipeline.scheduler.config
        if "beta_schedule" not in config:
            raise ValueError(
                f"scheduler: expected one of DDPM or DDIM kind, got {type(pipeline.scheduler).__name__}, which has no "
                "`beta_schedule`."
            )
        wanted = {"timestep_spacing": "trailing", "clip_sample": False, "thresholding": False}
        changed = {key: value for key, value in wanted.items() if config.get(key, False) != value}
        if changed or not isinstance(pipeline.scheduler, DDIMScheduler):
            say(f"scheduler: {type(pipeline.scheduler).__name__} -> DDIMScheduler with {wanted}, which students need")
            pipeline.register_modules(scheduler=DDIMScheduler.from_config(config, **wanted))
        pipeline.unet.eval()
        return pipeline

    def extractor_folder(self) -> str | None:
        """Return the folder of the feature extractor, or `None`: then the table has no distance."""
        folder = self.settings.extractor
        if folder is None and self.is_bundled and BUNDLED_EXTRACTOR.exists():
            folder = str(BUNDLED_EXTRACTOR)
        return folder

    def load_extractor(self) -> Any:
        """Return the feature extractor of the settings, or `None`."""
        folder = self.extractor_folder()
        return None if folder is None else load_extractor(folder)

    def collect(self, pipeline: Any) -> Any:
        """Return the calibration set, recorded or loaded."""

        path = self.state / "calibration.safetensors"
        if not path.exists():
            collect_calibration_set(
                pipeline,
                num_trajectories=self.settings.num_trajectories,
                num_inference_steps=self.settings.num_inference_steps,
                seed=self.settings.seed + CALIBRATION_SEED_OFFSET,
            ).save(path)
        calibration = CalibrationSet.load(path)
        calibration.check(pipeline.unet, pipeline.scheduler)
        calibration.check_student_steps()
        return calibration

    def quantization_config(self, **overrides: Any) -> Any:
        """Return the PQCADConfig of the settings."""

        values = {"weight_bits": self.settings.weight_bits, "activation_bits": self.settings.activation_bits or None}
        return PQCADConfig(**values | overrides)

    def progressive(self, pipeline: Any, calibration: Any, name: str = "pq", **overrides: Any) -> tuple[Any, Any]:
        """Return the fake-quantized model of a PQ run and its history; `overrides` make the ablations."""

        settings, model = self.settings, copy.deepcopy(pipeline.unet).to(self.settings.train_device)
        path = self.state / f"{name}.safetensors"
        found = path.stat().st_mtime_ns if path.exists() else None
        if found is None:
            self.note_training(name)
        progressive = ProgressiveConfig(
            rounds_per_stage=settings.rounds_per_stage,
            price_batch_size=settings.price_batch_size,
            reconstruction=ReconstructionConfig(
                iterations=settings.reconstruction_iterations, batch_size=settings.reconstruction_batch_size
            ),
            reconstruction_samples=settings.reconstruction_samples,
            seed=settings.seed,
            beta=overrides.pop("beta", ProgressiveConfig.beta),
        )
        history = progressive_quantize(
            model,
            calibration,
            self.quantization_config(**overrides),
            progressive,
            checkpoint=path,
        )
        if path.stat().st_mtime_ns != found:  # it was not finished before
            self.note_training(name)
        return model.to("cpu"), history

    def distill(
        self, name: str, quantized: Any, teacher: Any, calibration: Any, /, **switches: Any
    ) -> tuple[Any, list[Any]]:
        """Return a distilled student and the statistics of its training; `switches` make the ablations."""

        settings, student = self.settings, copy.deepcopy(quantized)
        path = self.state / f"{name}.safetensors"
        config = DistillConfig(
            max_train_steps=settings.max_train_steps,
            train_batch_size=settings.train_batch_size,
            step_rate=settings.step_rate,
            float_rate=settings.float_rate,
            evaluation_steps=settings.evaluation_steps,
            seed=settings.seed,
            **switches,
        )
        if path.exists():
            saved = load_checkpoint(path)
            load_fake_quant_state_(student, saved["student"])
            return student, saved["stats"]
        student.to(settings.train_device)
        if teacher is not None:  # a copy: the table measures the full-precision one on the CPU
            teacher = copy.deepcopy(teacher).to(settings.train_device)
        self.note_training(name)
        log = self.state / f"{name}-log.json"
        entries = {entry["step"]: entry for entry in json.loads(log.read_text())} if log.exists() else {}
        stats = distill(student, teacher, calibration, config, checkpoint=self.state / f"{name}-resume.safetensors")
        with tqdm(total=settings.max_train_steps, desc=name, unit="update") as bar:
            for entry in stats:
                bar.update(entry.step - bar.n)
                if entry.held_out_error is not None:
                    bar.set_postfix(held_out=f"{entry.held_out_error:.2e}", best=f"{entry.best_error:.2e}")
                    entries[entry.step] = dataclasses.asdict(entry)
                    write_text(log, json.dumps(list(entries.values()), indent=1) + "\n")
        student.to("cpu")
        save_checkpoint(path, {"student": fake_quant_state(student), "stats": list(entries.values())})
        return student, list(entries.values())

    def pipeline_of(self, teacher: Any, model: Any) -> Any:
        """Return a pipeline like the teacher's around `model`."""
        return type(teacher)(unet=model, scheduler=teacher.scheduler)

    def measure(self, key: str, name: str, pipeline: Any, steps: int, context: dict[str, Any]) -> dict[str, Any]:
        """Return one row of the table, measured or read back."""

        path, weights = self.state / "rows" / f"{key}.json", self.state / "models" / key
        if not path.exists():
            pipeline.unet.save_pretrained(weights)
            report = evaluate(
                pipeline,
                context["teacher"],
                num_images=self.settings.num_images,
                num_inference_steps=steps,
                seed=self.settings.seed,
                extractor=context["extractor"],
                reference_num_inference_steps=self.settings.num_inference_steps,
                num_latency_rounds=self.settings.num_latency_rounds,
                reference_samples=context["reference_samples"],
                weights_path=weights / "diffusion_pytorch_model.safetensors",
            )
            path.parent.mkdir(exist_ok=True)
            write_text(path, json.dumps({"key": key, "name": name} | report.to_dict(), indent=1) + "\n")
        return json.loads(path.read_text())

    def reference_samples(self, teacher: Any) -> Any:
        """Return the teacher's samples at N steps, generated or read back."""

        path = self.state / "reference_samples.safetensors"
        if not path.exists():
            samples = generate_samples(
                teacher,
                num_images=self.settings.num_images,
                num_inference_steps=self.settings.num_inference_steps,
                seed=self.settings.seed,
                description="teacher's samples",
            )
            save_checkpoint(path, {"samples": samples})
        return load_checkpoint(path)["samples"]


def say(text: str) -> None:
    """Print a heading between the progress bars."""
    print(f"\n== {text}", flush=True)


def rows_to_measure(run: Run, teacher: Any, calibration: Any, quantized: Any) -> Iterator[tuple[str, str, Any, int]]:
    """Yield (key, name, pipeline, steps) of every row; students are distilled when their turn comes."""

    settings, steps = run.settings, run.settings.num_inference_steps
    half = steps // 2
    widths = [bits for bits in PQCADConfig().bit_choices if bits <= settings.weight_bits]
    fixed_bits = max(widths)
    fixed = quantize_(copy.deepcopy(teacher.unet), run.quantization_config(method="fixed", weight_bits=fixed_bits))
    yield "float", "full precision", teacher, steps
    yield "float_half", "full precision", teacher, half
    yield "fixed", f"fixed-bit ({fixed_bits}, round to nearest)", run.pipeline_of(teacher, fixed), steps
    if settings.ablations:
        load_time = quantize_(copy.deepcopy(teacher.unet), run.quantization_config())
        yield "load_time", "progressive, load time (weights alone)", run.pipeline_of(teacher, load_time), steps
    packed = run.pipeline_of(teacher, convert_(copy.deepcopy(quantized)))
    yield "pq", "PQ", packed, steps
    yield "pq_half", "PQ, not distilled", packed, half

    frozen = freeze_(copy.deepcopy(quantized))
    arms: list[tuple[str, str, Any, dict[str, Any]]] = [("pq_cad", "PQ + CAD", frozen, {})]
    if settings.ablations:
        arms += [
            ("cad_calibration_only", "CAD: calibration only", None, {"teacher": "none"}),
            ("cad_float_teacher", "CAD: full-precision teacher", teacher.unet, {"teacher": "fp"}),
            ("cad_no_gate", "CAD: gate off", frozen, {"gate": False}),
            ("cad_no_calibration", "CAD: no calibration, gate off", frozen, {"gate": False, "calibration": False}),
        ]
    for key, name, model, switches in arms:
        say(f"distillation: {name}")
        student, _ = run.distill(key, quantized, model, calibration, **switches)
        yield key, name, run.pipeline_of(teacher, convert_(student, num_inference_steps=half)), half
    if settings.ablations:
        say("PQ without momentum")
        plain, _ = run.progressive(teacher, calibration, "pq_no_momentum", beta=0.0)
        yield "pq_no_momentum", "PQ without momentum", run.pipeline_of(teacher, convert_(plain)), steps
        say("fixed bits with PQ's reconstruction")
        overrides = {"weight_bits": fixed_bits, "bit_choices": (fixed_bits,)}
        reconstructed, _ = run.progressive(teacher, calibration, "fixed_reconstructed", **overrides)
        yield (
            "fixed_reconstructed",
            f"fixed-bit ({fixed_bits}) + reconstruction",
            run.pipeline_of(teacher, convert_(reconstructed)),
            steps,
        )


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the whole script and return its metrics."""
    settings = parse_settings(sys.argv[1:] if arguments is None else arguments)
    run = Run(settings)
    require("train", "matplotlib", "scipy")  # for what comes last: the intervals and the pictures
    if run.extractor_folder() is not None:
        require("train", "torchmetrics")

    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "this script runs in one process so far; start it with `accelerate launch --num_processes 1`."
        )

    # In fp32 and where the settings say, whatever the user's Accelerate config does: the figures are for that.
    # NVIDIA's convolutions would round their inputs to 10 bits.
    torch.backends.cudnn.allow_tf32 = False
    accelerator = Accelerator(cpu=settings.train_device == "cpu", mixed_precision="no")
    if settings.train_device != accelerator.device.type:
        raise ValueError(
            f"--train_device {settings.train_device}: expected 'cpu' or the kind of accelerator that torch finds here "
            f"({accelerator.device.type})."
        )
    set_threads(settings.num_threads)
    set_seed(settings.seed)
    if settings.push_to_hub:
        if not settings.hub_model_id:
            raise ValueError("--push_to_hub needs --hub_model_id user/name.")
        hub.check_access()

    teacher = run.load_teacher()
    extractor = run.load_extractor()
    run.check_settings(teacher.scheduler)
    run.claim_folder()
    say(f"calibration set: {settings.num_trajectories} full-precision trajectories")
    calibration = run.collect(teacher)
    say(f"progressive quantization to {settings.weight_bits:g} bits")
    quantized, history = run.progressive(teacher, calibration)
    context = {"teacher": teacher, "extractor": extractor, "reference_samples": run.reference_samples(teacher)}

    rows, pipelines = [], {}
    for key, name, pipeline, steps in rows_to_measure(run, teacher, calibration, quantized):
        say(f"measuring: {name}, {steps} steps")
        rows.append(run.measure(key, name, pipeline, steps, context))
        pipelines[key] = pipeline, steps

    say("saving")
    final, half = pipelines["pq_cad"]
    stats = run.distill("pq_cad", quantized, None, calibration)[1]
    best = stats[-1]
    metrics = {
        "teacher_id": run.teacher_id(),
        "settings": {key: value for key, value in dataclasses.asdict(settings).items() if key not in LOCAL_SETTINGS},
        "calibration_seed": calibration.manifest["seed"],
        "pq": {
            "average_bits": history.summary["average_bits"],
            "num_rounds": len(history.rounds),
            "num_stages": len({entry["stage"] for entry in history.rounds}),
            "num_roll_backs": sum(len(entry["rolled_back"]) for entry in history.rounds),
            "bits": history.summary["bits"],
        },
        "cad": {"best_step": best["best_step"], "best_error": best["best_error"], "steps": settings.max_train_steps},
        "training": run.training(),
        "environment": environment(),
        "rows": rows,
    }
    final.save_pretrained(run.folder)
    write_text(run.folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    history.save(run.folder / "history.json")
    assets = run.folder / "assets"
    assets.mkdir(exist_ok=True)
    noise = initial_noise(sample_shape(teacher.unet), seed=settings.seed, start=0, count=min(12, settings.num_images))
    shown = {"teacher": "float", "PQ": "pq", "PQ + CAD": "pq_cad"}
    grid = {
        f"{name}, {pipelines[key][1]}": to_uint8(
            generate(pipelines[key][0].unet, teacher.scheduler, noise, pipelines[key][1])
        )
        for name, key in shown.items()
    }
    plot_samples(assets / "samples.png", grid)
    plot_bits(assets / "bits.png", history.rounds)
    logs = sorted(run.state.glob("*-log.json"))
    curves = {path.stem.removesuffix("-log"): json.loads(path.read_text()) for path in logs}
    plot_curves(assets / "curves.png", curves)
    repo = settings.hub_model_id or run.folder.name  # a local copy is loaded from where the reader put it
    license_id = settings.license or ("mit" if run.is_bundled else None)
    hub.write_card(run.folder, hub.model_card(metrics, repo=repo, license_id=license_id))
    print("\n" + hub.results_table(metrics) + "\n\n" + hub.table_notes(metrics))
    print(
        f"\nSaved in {run.folder}. Load it: pipe = DiffusionPipeline.from_pretrained({str(run.folder)!r}); it was "
        f"distilled for pipe(num_inference_steps={half})"
    )
    if settings.push_to_hub:
        say(f"pushed: {hub.push(run.folder, settings.hub_model_id or '', private=settings.hub_private_repo)}")
    return metrics


if __name__ == "__main__":
    try:
        main()
    except (ValueError, MissingExtraError) as error:
        sys.exit(f"distill.py: {error}")
