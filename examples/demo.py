# /// script
# dependencies = ["diffusers-pqcad[demo]"]
# ///
"""See it: a teacher and its student side by side, on the same prompt and noise, with steps, seconds and memory.

    python examples/demo.py                                     # emoji, and the same quantized to 4 bits as it loads
    python examples/demo.py --student outputs/emoji             # emoji, and what distill.py made of it
    python examples/demo.py --teacher my/pipeline --student my/student

A page on this computer, http://127.0.0.1:7860, that nothing else can reach. It sends nothing, and loads nothing from
elsewhere: no statistics, no fonts.
"""

import inspect
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline
from distill import defaults_of
from PIL import Image
from transformers import HfArgumentParser

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.cli.calling import load_pipeline
from diffusers_pqcad.cli.sides import names_of, side_of
from diffusers_pqcad.compression.calling import quiet
from diffusers_pqcad.compression.denoiser import denoiser_name
from diffusers_pqcad.compression.extras import MissingExtraError, require
from diffusers_pqcad.evaluation.comparison import Side
from diffusers_pqcad.evaluation.speed import tensor_bytes
from diffusers_pqcad.layers.find import kernel_cache_bytes

EMOJI = Path(__file__).resolve().parent / "models" / "emoji"
SHOWN_PIXELS = 384  # the bundled teachers' pictures are small: they are shown several times as large
FIGURES = ("steps", "seconds", "denoiser in memory MB", "of it weights MB", "bits a parameter")


@dataclass(frozen=True)
class Settings:
    """Which pipelines, and how they are called at first."""

    teacher: str = field(default=str(EMOJI), metadata={"help": "a pipeline: a folder, or a repository of the Hub"})
    student: str | None = field(
        default=None, metadata={"help": "another; default: the teacher, quantized to weight_bits while it loads"}
    )
    weight_bits: float = field(default=4.0, metadata={"help": "average bits a weight where no student is given"})
    num_inference_steps: int = field(
        default=20, metadata={"help": "steps of a pipeline that was not distilled for fewer"}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "default: what suits a bundled teacher, or the pipeline's own"}
    )
    num_threads: int = field(default=0, metadata={"help": "threads of torch; 0: as many as torch takes by itself"})
    port: int | None = field(default=None, metadata={"help": "default: the first free one from 7860 on"})

    def __post_init__(self) -> None:
        for name in ("num_inference_steps", "port"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}.")


class Pair(NamedTuple):
    """Two pipelines that are called alike: both with a prompt, or none, and with the `arguments`."""

    sides: tuple[Side, Side]
    takes_prompt: bool
    arguments: dict[str, Any]


class Made(NamedTuple):
    """A picture, and what it took."""

    picture: Image.Image
    seconds: float
    steps: int


def pair_of(settings: Settings) -> Pair:
    """Return the pipelines of the settings, loaded; ValueError for those that cannot be called from this page."""
    teacher = load_pipeline(settings.teacher, "teacher")
    if settings.student is None:
        config = PQCADConfig(weight_bits=settings.weight_bits)
        student = DiffusionPipeline.from_pretrained(settings.teacher, quantization_config=config)
        names = Path(settings.teacher).name, f"quantized while it loaded, {settings.weight_bits:g} bits"
    else:
        student = load_pipeline(settings.student, "student")
        names = names_of(settings.teacher, settings.student)
    takes_prompt = [takes(pipeline, "prompt") for pipeline in (teacher, student)]
    if takes_prompt[0] != takes_prompt[1]:
        raise ValueError("student: expected a pipeline that takes a prompt where the teacher does, and only there.")
    for name in ("class_labels", "image"):
        if name in needed(teacher):
            raise ValueError(f"teacher: {type(teacher).__name__} needs {name}, for which this page has no field.")
    sides = tuple(
        side_of(pipeline, path, name, None, settings.num_inference_steps)
        for pipeline, path, name in zip(
            (teacher, student), (settings.teacher, settings.student or ""), names, strict=True
        )
    )
    return Pair((sides[0], sides[1]), takes_prompt[0], arguments_of(teacher, settings))


def takes(pipeline: Any, name: str) -> bool:
    """Return whether a call of `pipeline` takes the argument `name`."""
    return name in inspect.signature(type(pipeline).__call__).parameters


def needed(pipeline: Any) -> list[str]:
    """Return the arguments without which `pipeline` cannot be called."""
    parameters = inspect.signature(type(pipeline).__call__).parameters
    return [name for name, item in parameters.items() if item.default is item.empty and name != "self"]


def arguments_of(pipeline: Any, settings: Settings) -> dict[str, Any]:
    """Return what `pipeline` is called with beside prompt, seed and steps."""
    wanted = {name: value for name, value in defaults_of(settings.teacher).items() if takes(pipeline, name)}
    if takes(pipeline, "guidance_scale"):
        own = inspect.signature(type(pipeline).__call__).parameters["guidance_scale"].default
        chosen = settings.guidance_scale
        wanted["guidance_scale"] = wanted.get("guidance_scale", own) if chosen is None else chosen
    return wanted


def made(side: Side, steps: int, seed: int, arguments: dict[str, Any]) -> Made:
    """Return what one call of a pipeline makes; equal seeds are equal noise."""
    given = arguments | dict(side.arguments) | {"generator": torch.Generator().manual_seed(seed)}
    with quiet(side.pipeline):
        begun = time.perf_counter()
        picture = side.pipeline(num_inference_steps=steps, **given).images[0]
        seconds = time.perf_counter() - begun
    return Made(picture, seconds, steps)


def shown(picture: Image.Image) -> Image.Image:
    """Return a picture as large as it is shown, without smoothing what is small."""
    times = max(1, SHOWN_PIXELS // max(picture.size))
    return picture.convert("RGB").resize((times * picture.width, times * picture.height), Image.Resampling.NEAREST)


def figures_of(side: Side, result: Made) -> list[str]:
    """Return the column of a pipeline in the table, in the order of FIGURES."""
    model = getattr(side.pipeline, denoiser_name(side.pipeline))
    weights, copies = tensor_bytes(model), kernel_cache_bytes(model)
    megabytes = [f"{count / 1e6:.2f}" for count in (weights + copies, weights)]
    return [str(result.steps), f"{result.seconds:.2f}", *megabytes, f"{8 * weights / model.num_parameters():.2f}"]


def table(columns: list[list[str]]) -> list[list[str]]:
    """Return the rows of the table, of which some columns are still empty."""
    columns = columns + [[""] * len(FIGURES)] * (2 - len(columns))
    return [list(row) for row in zip(FIGURES, *columns, strict=True)]


def make_both(
    pair: Pair, prompt: str, seed: int | None, guidance_scale: float | None, *steps: int | None
) -> Iterator[tuple[Any, ...]]:
    """Yield the pictures and the table as they come: first the teacher's, then the student's."""
    if seed is None or None in steps:
        raise ValueError("seed and steps: expected whole numbers, got an empty field.")
    arguments = pair.arguments | ({"prompt": prompt} if pair.takes_prompt else {})
    if "guidance_scale" in arguments and guidance_scale is not None:
        arguments["guidance_scale"] = guidance_scale
    pictures: list[Any] = [None, None]
    columns = []
    for index, (side, count) in enumerate(zip(pair.sides, steps, strict=True)):
        result = made(side, int(count or 0), seed, arguments)
        pictures[index] = shown(result.picture)
        columns.append(figures_of(side, result))
        yield *pictures, table(columns)


def first_prompt(teacher: str) -> str:
    """Return a prompt that suits the teacher: the first in its folder that it was not trained on, or was."""
    for name in ("held_out_prompts.txt", "prompts.txt"):
        path = Path(teacher) / name
        if path.is_file():
            return path.read_text(encoding="utf-8").partition("\n")[0]
    return ""


def app_of(pair: Pair, prompt: str) -> Any:
    """Return the page, a Gradio app."""
    require("demo", "gradio")
    import gradio as gr

    names = [side.name for side in pair.sides]
    with gr.Blocks(title="Teacher against student", analytics_enabled=False) as app:
        gr.Markdown("# Teacher against student\nThe same prompt and the same noise for both.")
        with gr.Row():
            text = gr.Textbox(prompt, label="prompt", visible=pair.takes_prompt, scale=3)
            seed = gr.Number(0, label="seed", precision=0, minimum=0)
            guidance = pair.arguments.get("guidance_scale")
            scale = gr.Number(guidance, label="guidance scale", visible=guidance is not None)
            steps = [
                gr.Number(side.num_inference_steps, label=f"{role} steps", precision=0, minimum=1)
                for side, role in zip(pair.sides, ("teacher", "student"), strict=True)
            ]
        button = gr.Button("Make both", variant="primary")
        with gr.Row():
            pictures = [
                gr.Image(label=f"{role}: {name}", elem_id=role, format="png", interactive=False, buttons=["download"])
                for role, name in zip(("teacher", "student"), names, strict=True)
            ]
        figures = gr.Dataframe(table([]), headers=["", "teacher", "student"], label="what it took", interactive=False)
        gr.Markdown(
            f"One call each, one after the other, on {torch.get_num_threads()} of the CPU's threads. A student whose "
            "guidance is folded in takes no guidance scale. Memory is the denoiser's weights, and the int8 copies of "
            "them that the kernels hold."
        )
        button.click(
            partial(make_both, pair), [text, seed, scale, *steps], [*pictures, figures], api_visibility="private"
        )
    return app


def main(arguments: list[str] | None = None) -> None:
    """Load the pipelines, and show the page until Ctrl-C."""
    require("demo", "gradio")
    import gradio as gr

    parser = HfArgumentParser(Settings, description=(__doc__ or "").partition("\n")[0])  # type: ignore[arg-type]
    (settings,) = parser.parse_args_into_dataclasses(sys.argv[1:] if arguments is None else arguments)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    pair, prompt = pair_of(settings), first_prompt(settings.teacher)
    print("Both are called once, so that the times on the page are not those of a first call.", flush=True)
    list(make_both(pair, prompt, 0, None, *(side.num_inference_steps for side in pair.sides)))
    app = app_of(pair, prompt)
    own_fonts = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])
    _, url, _ = app.launch(
        server_name="127.0.0.1", server_port=settings.port, share=False, quiet=True, show_error=True,
        prevent_thread_lock=True, footer_links=[], ssr_mode=False, theme=own_fonts,
    )  # fmt: skip
    print(f"Open {url} in a browser. Ctrl-C ends it.", flush=True)
    app.block_thread()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, MissingExtraError) as error:
        sys.exit(f"demo.py: {error}")
