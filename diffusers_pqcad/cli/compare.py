"""`pqcad compare`: two pipelines on the same prompts and noise, as one HTML file that needs no network."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
from diffusers_pqcad.evaluation.comparison import Comparison, compare
from diffusers_pqcad.publishing.comparison_page import decibel, save_comparison
from diffusers_pqcad.publishing.compress import set_threads
from diffusers_pqcad.publishing.pipelines import call_arguments, sampling_batch_size
from diffusers_pqcad.publishing.settings import CompressConfig, Part, config_of

NEUTRAL = ("num_threads", "num_latency_rounds")  # what changes no image


@dataclass(frozen=True)
class CompareConfig:
    """Which pipelines, and how each is called."""

    output: str = field(
        default="report.html", metadata={"help": "the HTML file; a PNG is written beside it", "aliases": ["-o"]}
    )
    a: str | None = field(default=None, metadata={"help": "pipeline A, the reference: a folder or a repository"})
    b: str | None = field(default=None, metadata={"help": "pipeline B, such as a quantized A"})
    a_steps: int | None = field(
        default=None, metadata={"help": "steps of A; None: those it was distilled for, or num_inference_steps"}
    )
    b_steps: int | None = field(
        default=None, metadata={"help": "steps of B; None: those it was distilled for, or num_inference_steps"}
    )

    def __post_init__(self) -> None:
        if Path(self.output).suffix != ".html":
            raise ValueError(f"output: expected a file that ends in .html, got {self.output!r}.")
        for name in ("a_steps", "b_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}.")


class Settings(NamedTuple):
    """What `pqcad compare` takes."""

    pair: CompareConfig
    run: CompressConfig
    trial: Trial


PAIR = Part("pipelines", CompareConfig, ("a", "b", "output", "a_steps", "b_steps"))
RUN = run_part("calls", ("num_images", "num_latency_rounds", *CALLS), {"num_images": 8})


def settings_of(values: dict[str, Any]) -> Settings:
    """Return the settings of the flags `values`."""
    return Settings(config_of(PAIR, values), run_of(RUN, values), config_of(TRIAL, values))


def run(settings: Settings) -> Outcome:
    """Return how the two compare; the page and its picture are written."""
    (path_a, path_b), output = paths_of(settings), Path(settings.pair.output)
    run = with_prompts(settings.run, path_a)
    inputs = inputs_of(run)
    if settings.trial.dry_run:
        return planned(settings, inputs)
    set_threads(run)
    name_a, name_b = names_of(path_a, path_b)
    a = side_of(load_pipeline(path_a, "A"), path_a, name_a, settings.pair.a_steps, run.num_inference_steps)
    b = side_of(load_pipeline(path_b, "B"), path_b, name_b, settings.pair.b_steps, run.num_inference_steps)
    state = state_of(settings, inputs)
    comparison = compare(
        a,
        b,
        inputs,
        num_images=run.num_images,
        seed=run.seed,
        batch_size=sampling_batch_size(a.pipeline, run),
        num_latency_rounds=run.num_latency_rounds,
        state=state,
        **call_arguments(run),
    )
    picture = save_comparison(comparison, output)
    shutil.rmtree(state.parent, ignore_errors=True)
    return Outcome(
        comparison.to_dict() | {"output": str(output), "picture": str(picture)}, summary(comparison, output, picture)
    )


def paths_of(settings: Settings) -> tuple[str, str]:
    """Return where the two pipelines are."""
    return str(settings.pair.a), str(settings.pair.b)


def state_of(settings: Settings, inputs: Any) -> Path:
    """Return the folder of what is finished of this comparison, and of no other."""
    what = asdict(settings.pair) | {k: v for k, v in asdict(settings.run).items() if k not in NEUTRAL}
    stamps = [newest(path) for path in paths_of(settings)]
    key = hashlib.sha256(json.dumps([what, inputs, stamps], sort_keys=True).encode()).hexdigest()[:16]
    return partial_folder(settings) / key


def newest(path: str) -> float:
    """Return when a folder's files changed last; 0 for a repository."""
    return max((file.stat().st_mtime for file in Path(path).rglob("*") if file.is_file()), default=0.0)


def partial_folder(settings: Settings) -> Path:
    """Return the folder beside the page in which a comparison keeps what is finished."""
    output = Path(settings.pair.output)
    return output.with_name(f"{output.name}.partial")


def summary(comparison: Comparison, output: Path, picture: Path) -> str:
    """Return what a reader of the terminal wants to know."""
    medians, (cost_a, cost_b) = comparison.medians(), comparison.costs
    times = comparison.speed.reference_latency_ms.median_ms, comparison.speed.latency_ms.median_ms
    sizes = [cost.tensor_bytes if cost.size_bytes is None else cost.size_bytes for cost in (cost_a, cost_b)]
    worst = comparison.worst_first()[0]
    return (
        f"{len(comparison.pairs)} images, seed {comparison.seed}. Median of B to A: SQNR "
        f"{decibel(medians['sqnr_db'])}, PSNR {decibel(medians['psnr_db'])}, SSIM {medians['ssim']:.4f}; "
        f"the worst is image {worst.index}, "
        f"{decibel(worst.sqnr_db)}.\n"
        f"Bytes of the denoiser: {sizes[0]} and {sizes[1]}. Model evaluations: {cost_a.model_evaluations} and "
        f"{cost_b.model_evaluations}. ms an image: {times[0]:.2f} and {times[1]:.2f}.\n"
        f"Open {output} in a browser; {picture} shows the worst."
    )


def planned(settings: Settings, inputs: Any) -> Outcome:
    """Return what would be run."""
    document = planned_calls(paths_of(settings), settings.run, inputs, output=settings.pair.output)
    text = (
        f"{document['num_images']} images of each of {' and '.join(document['models'])} would be made, with "
        f"{document['num_prompts']} prompts, and shown in {settings.pair.output}. Nothing was written."
    )
    return Outcome(document, text)


COMMAND = Command(
    name="compare",
    summary="two pipelines on the same prompts and noise, side by side in one HTML file",
    description="Compare two pipelines on the same prompts and noise. The report is one HTML file that needs no "
    "network: A and B under a slider, what differs, the worst five first, ratios, bytes, milliseconds, bits by layer. "
    "A picture is written beside it.",
    example="pqcad compare my/pipeline outputs/small --prompts_file prompts.txt -o report.html",
    parts=(PAIR, RUN, TRIAL),
    operands={"a": "A", "b": "B"},
    settings=settings_of,
    run=run,
    kept=lambda settings: f"The images that were finished are in {partial_folder(settings)}. To go on:",
)
