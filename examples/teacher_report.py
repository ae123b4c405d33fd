"""Measure a saved text-to-image teacher, and write its card: how it was trained, how good it is, what it makes."""

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from emoji import EMOJI_NOTICE, copy_emoji_licences
from fashion_mnist import HUB_ID, LICENCE_NOTICE
from PIL import Image, ImageDraw, ImageFont
from prompted_pictures import PromptedPictures
from torch import Tensor

from diffusers_pqcad.compression.extras import require
from diffusers_pqcad.evaluation import generate_images, load_extractor
from diffusers_pqcad.evaluation.features import CONFIG_FILE, ClassifierExtractor, extract_features
from diffusers_pqcad.evaluation.metrics import feature_statistics, frechet_distance, kernel_distance
from diffusers_pqcad.evaluation.prompts import prompts_met

PROMPTS_FILE, HELD_OUT_FILE, GRID_FILE = "prompts.txt", "held_out_prompts.txt", "samples.png"
RECIPE_FILE = "training.json"
BATCH_SIZE = 64  # pictures, on one core faster than one by one
GRID_COLUMNS, GRID_ROWS, GRID_SCALE = 8, 4, 3


@dataclass(frozen=True)
class About:
    """What a card says of a subject; `copy_licences` puts texts beside the card that its `notice` speaks of."""

    title: str
    pictures: str
    network: str
    licence: str
    datasets: str
    notice: str
    copy_licences: Callable[[Path], None] = lambda folder: None


ABOUT = {
    "emoji": About(
        title="emoji",
        pictures="32x32 pictures of 256 emoji on 8 colours",
        network=(
            "a `StableDiffusionPipeline` with a `UNet2DConditionModel` that predicts epsilon at the noise levels of "
            "SD-1.5, a `CLIPTextModel` trained along, and an `AutoencoderKL` of 16x16x4 latents"
        ),
        licence="ofl-1.1",
        datasets="",
        notice=EMOJI_NOTICE,
        copy_licences=copy_emoji_licences,
    ),
    "fashion-flow": About(
        title="Fashion-MNIST text-to-image",
        pictures="28x28 grey pictures of 10 kinds of clothes",
        network=(
            "a `StableDiffusion3Pipeline` with an `SD3Transformer2DModel` (an MMDiT, flow matching with a shift), two "
            "CLIP text encoders trained along, and an `AutoencoderKL` of 14x14x4 latents. There is no T5: one of 13 "
            "thousand weights, whose output is zero, is there because diffusers loads no such pipeline without one"
        ),
        licence="mit",
        datasets=f"\ndatasets: [{HUB_ID}]",
        notice=LICENCE_NOTICE,
    ),
}


def write_report(folder: Path, data: PromptedPictures) -> None:
    """Bring the figures in training.json, the grid and the card of the teacher in `folder` up to date.

    Without the folder of features that training.json names, there is a grid and nothing is measured.
    """
    require("eval", "torchmetrics")
    facts = json.loads((folder / RECIPE_FILE).read_text())
    pipeline = DiffusionPipeline.from_pretrained(folder)  # as its user has it, rounded to fp16
    extractor = load_extractor(facts["extractor"]) if Path(facts["extractor"]).is_dir() else None
    rows, shown = [], []
    for name, file in (("trained", PROMPTS_FILE), ("held out", HELD_OUT_FILE)):
        if not (folder / file).is_file():
            continue
        prompts = (folder / file).read_text(encoding="utf-8").splitlines()
        prompts = [prompts[index % len(prompts)] for index in range(facts["num_measured_images"])]
        pictures = generate(pipeline, prompts, facts, f"{name} prompts")
        shown.append((prompts, pictures))
        if extractor is not None:
            rows.append(
                {"prompts": name} | measured(extractor, pictures, prompts, data, has_distance=name == "trained")
            )
    facts["measured"] = rows
    (folder / RECIPE_FILE).write_text(json.dumps(facts, indent=2) + "\n")
    (folder / "assets").mkdir(exist_ok=True)
    draw_grid(folder / "assets" / GRID_FILE, *grid_of(shown))
    ABOUT[facts["subject"]].copy_licences(folder)
    (folder / "README.md").write_text(card(folder, facts, extractor_facts(facts)), encoding="utf-8")


def generate(pipeline: DiffusionPipeline, prompts: Sequence[str], facts: dict[str, Any], description: str) -> Tensor:
    """Return the pictures of `prompts`, uint8, with the guidance and the steps that `facts` name."""
    samples = generate_images(
        pipeline,
        prompts,
        num_images=len(prompts),
        num_inference_steps=facts["num_inference_steps"],
        seed=facts["seed"],
        batch_size=BATCH_SIZE,
        description=description,
        guidance_scale=facts["guidance_scale"],
    )
    assert samples.images is not None
    return samples.images


def measured(
    extractor: ClassifierExtractor,
    pictures: Tensor,
    prompts: Sequence[str],
    data: PromptedPictures,
    *,
    has_distance: bool,
) -> dict[str, Any]:
    """Return the prompt accuracy of `pictures` and, with `has_distance`, how far they are from the data."""
    found = prompts_met(extractor, pictures, [data.wanted(prompt) for prompt in prompts])
    row = {"num_images": len(pictures), "prompt_accuracy": found.double().mean().item()}
    if not has_distance:
        return row
    features = extract_features(extractor, pictures)
    reference = extractor.reference_mean, extractor.reference_covariance
    subset_size = min(1000, len(features), len(extractor.reference_features))
    kernel, _ = kernel_distance(features, extractor.reference_features, subset_size=subset_size)
    distance = frechet_distance(*feature_statistics(features), *reference)
    return row | {"frechet_distance": distance, "kernel_distance": kernel}


def grid_of(shown: Sequence[tuple[Sequence[str], Tensor]]) -> tuple[list[str], Tensor]:
    """Return the first prompts and pictures of each set, as many of each as fill the rows of a grid."""
    per_set = GRID_COLUMNS * GRID_ROWS // len(shown)
    prompts = [prompt for prompts, _ in shown for prompt in prompts[:per_set]]
    return prompts, torch.cat([pictures[:per_set] for _, pictures in shown])


def draw_grid(path: Path, prompts: Sequence[str], pictures: Tensor) -> None:
    """Write `pictures` (N, C, H, W) uint8 in rows of eight, each above its prompt."""
    side = GRID_SCALE * pictures.shape[-1]
    width, height = side + 8, side + 40
    num_rows = -(-len(prompts) // GRID_COLUMNS)
    grid = Image.new("RGB", (GRID_COLUMNS * width, num_rows * height), "white")
    pen, font = ImageDraw.Draw(grid), ImageFont.load_default(10)
    for index, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True)):
        left, top = index % GRID_COLUMNS * width + 4, index // GRID_COLUMNS * height + 4
        pixels = picture.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy()
        grid.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.NEAREST), (left, top))
        pen.text((left, top + side + 2), textwrap.fill(prompt, side // 6), fill="black", font=font, spacing=1)
    grid.save(path, optimize=True)


def extractor_facts(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the config of the features that a teacher was measured with; nothing where it was not."""
    path = Path(facts["extractor"]) / CONFIG_FILE
    return json.loads(path.read_text()) if facts["measured"] else {}


def results(facts: dict[str, Any], extractor: dict[str, Any]) -> str:
    """Return the card's section on how good the teacher is."""
    if not facts["measured"]:
        return f"Not measured: there was no folder `{facts['extractor']}` (`examples/train_classifier.py` makes it).\n"
    lines = [
        f"Guidance {facts['guidance_scale']:g}, {facts['num_inference_steps']} steps, seed {facts['seed']}. Prompt "
        "accuracy is the share of pictures in which a classifier finds what the prompt says: "
        f"{' and '.join(extractor['labels'])}.",
        f"The classifier (`{facts['extractor']}`) is right about {100 * extractor['test_accuracy']:.2f} % of real "
        "pictures.",
        "",
        f"| prompts | n | prompt accuracy | {extractor['name']} | kernel distance |",
        "|---|---|---|---|---|",
    ]
    for row in facts["measured"]:
        distances = (
            f"{row['frechet_distance']:.4f} | {row['kernel_distance']:.6f}" if "frechet_distance" in row else "- | -"
        )
        accuracy = f"{100 * row['prompt_accuracy']:.1f} %"
        lines.append(f"| {row['prompts']} | {row['num_images']} | {accuracy} | {distances} |")
    lines += ["", f"What perfect samples score in the distances is in the card of `{facts['extractor']}`."]
    return "\n".join(lines) + "\n"


def card(folder: Path, facts: dict[str, Any], extractor: dict[str, Any]) -> str:
    """Return the model card of the teacher in `folder`; its figures come from `facts` and those of `extractor`."""
    about = ABOUT[facts["subject"]]
    sizes = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in facts["num_parameters"].items())
    example = (folder / PROMPTS_FILE).read_text(encoding="utf-8").splitlines()[0]
    has_held_out = (folder / HELD_OUT_FILE).is_file()
    combined = f" The lower half is of pairs that it was never trained on (`{HELD_OUT_FILE}`)." if has_held_out else ""
    call = f"num_inference_steps={facts['num_inference_steps']}, guidance_scale={facts['guidance_scale']:g}"
    remark = f"\n{facts['remark']}\n" if "remark" in facts else ""
    return f"""---
library_name: diffusers
pipeline_tag: text-to-image
license: {about.licence}{about.datasets}
---
# A small {about.title} diffusion model

A teacher of the examples of diffusers-pqcad for {about.pictures}: {about.network}.
Parameters: {sizes}.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("{facts["output_dir"]}")
image = pipe({json.dumps(example)}, {call}).images[0]
```

![Pictures with their prompts](assets/{GRID_FILE})

Prompts that it knows are in `{PROMPTS_FILE}`.{combined}

## How good it is

{results(facts, extractor)}
## How it was trained

`accelerate launch examples/train_text_to_image.py --subject {facts["subject"]}`: the autoencoder on
{facts["num_vae_images"]} pictures in batches of {facts["vae_batch_size"]}, then the denoiser and its text encoders
together on {facts["num_train_images"]} in batches of {facts["train_batch_size"]}, one prompt in ten left out; of
{facts["num_pictures"]} different ones. AdamW at {facts["vae_learning_rate"]:g} and {facts["learning_rate"]:g} with a
cosine schedule, EMA {facts["ema_decay"]}, {facts["mixed_precision"]} autocast, seed {facts["seed"]}, torch
{facts["torch"]} on {facts["machine"]} CPUs; final training losses (moving averages) {facts["final_vae_loss"]:.5f} and
{facts["final_loss"]:.4f}. Saved in fp16, the text encoders in fp32. All settings: `{RECIPE_FILE}`.
{remark}
## Licence of the data

{about.notice}"""
