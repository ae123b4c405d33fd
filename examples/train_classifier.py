"""Train a bundled feature extractor, a small classifier of Fashion-MNIST or of emoji, and measure its noise floor.

    python examples/train_classifier.py
    python examples/train_classifier.py --subject emoji
    python examples/train_classifier.py --measure_noise_floor
    python examples/train_classifier.py --measure_teacher examples/models/fashion-mnist

The first two write weights, reference statistics, config.json and the card, noise floor included; the third measures
the floor of the stored extractor again, the fourth adds an unconditional teacher's distances. Every figure of the card
comes from config.json.
"""

import json
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from emoji import EMOJI_NOTICE, copy_emoji_licences, load_emoji, prompted_emoji
from fashion_mnist import CLASSES, LICENCE_NOTICE, load_split
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from diffusers_pqcad.compression.extras import require
from diffusers_pqcad.evaluation.features import (
    CONFIG_FILE,
    SmallClassifier,
    extract_features,
    load_extractor,
    save_extractor,
    split_logits,
)
from diffusers_pqcad.evaluation.metrics import feature_statistics, frechet_distance, kernel_distance

NUM_EMOJI_PICTURES = {"train": 40_960, "test": 10_240}
MAX_NOISE = 32.0  # standard deviation of 255 levels


@dataclass(frozen=True)
class Examples:
    """Images (N, C, H, W) uint8 and the `labels` (N, A) int64 of their A attributes, places in the lists of `names`.

    `in_reference` (N,) bool says which of them the distances are measured from.
    """

    images: Tensor
    labels: Tensor
    names: Mapping[str, Sequence[str]]
    in_reference: Tensor


def fashion_examples(split: str, data_dir: str | None) -> Examples:
    """Return a split of Fashion-MNIST."""
    images, labels = load_split(split, data_dir)
    return Examples(images, labels.unsqueeze(1), {"class": tuple(CLASSES)}, torch.ones(len(images), dtype=torch.bool))


def emoji_examples(split: str, data_dir: str | None) -> Examples:
    """Return random pictures of emoji, other ones for each split. Pairs that are held out are not in the reference."""
    data = prompted_emoji(load_emoji(data_dir), with_held_out=True)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    rows = order[: NUM_EMOJI_PICTURES["train"]] if split == "train" else order[-NUM_EMOJI_PICTURES["test"] :]
    places = {attribute: {name: place for place, name in enumerate(names)} for attribute, names in data.labels.items()}
    wanted = [data.wanted(prompt) for prompt in data.prompts]
    labels = torch.tensor([[places[attribute][name] for attribute, name in each.items()] for each in wanted])
    held_out = set(data.held_out_prompts)
    in_reference = torch.tensor([prompt not in held_out for prompt in data.prompts])
    prompts = data.choices[rows, 0]
    return Examples(data.draw(rows), labels[prompts], data.labels, in_reference[prompts])


def add_noise(images: Tensor, generator: torch.Generator, settings: "Settings") -> Tensor:
    """Return `images` (B, C, H, W) uint8 with noise of up to MAX_NOISE: a model's are not exact."""
    strength = MAX_NOISE * torch.rand(len(images), 1, 1, 1, generator=generator)
    noise = strength * torch.randn(images.shape, generator=generator)
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


def augment(images: Tensor, generator: torch.Generator, settings: "Settings") -> Tensor:
    """Return `images` (B, 1, H, W) uint8, shifted together by up to `max_shift` pixels, half of them mirrored."""
    height, width = images.shape[2:]
    max_shift = settings.max_shift
    padded = torch.nn.functional.pad(images, (max_shift,) * 4)
    top, left = torch.randint(0, 2 * max_shift + 1, (2,), generator=generator).tolist()
    shifted = padded[:, :, top : top + height, left : left + width]
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, shifted.flip(3), shifted)


@dataclass(frozen=True)
class Subject:
    """What is told apart: `load(split, train_data_dir)` has the images, `augment` varies those of a batch.

    `output_dir` and `name` are the extractor's, the others are for its config and card; `copy_licences` puts the texts
    of the data's licences into its folder.
    """

    load: Callable[[str, str | None], Examples]
    augment: Callable[[Tensor, torch.Generator, "Settings"], Tensor]
    output_dir: str
    name: str
    dataset: str
    title: str
    images: str
    classes: str
    licence: str
    notice: str
    copy_licences: Callable[[Path], None] = lambda folder: None


SUBJECTS = {
    "fashion-mnist": Subject(
        load=fashion_examples,
        augment=augment,
        output_dir="examples/models/fashion-mnist-features",
        name="FMNIST-classifier Frechet distance",
        dataset="Fashion-MNIST, training split, as it is (28x28, no padding)",
        title="Fashion-MNIST",
        images="28x28 grey images",
        classes="10 classes",
        licence="mit",
        notice=LICENCE_NOTICE,
    ),
    "emoji": Subject(
        load=emoji_examples,
        augment=add_noise,
        output_dir="examples/models/emoji-features",
        name="emoji-classifier Frechet distance",
        dataset="Noto Color Emoji on 8 colours, shifted and mirrored (32x32), without the pairs that are held out",
        title="emoji on coloured backgrounds",
        images="32x32 pictures of emoji",
        classes="256 emoji and 8 colours, both right",
        licence="ofl-1.1",
        notice=EMOJI_NOTICE,
        copy_licences=copy_emoji_licences,
    ),
}


@dataclass
class Settings:
    """Settings of one run; the defaults made `examples/models/fashion-mnist-features`."""

    subject: str = "fashion-mnist"  # or emoji
    output_dir: str = ""  # default: examples/models/, by the subject
    train_data_dir: str | None = None  # a folder of IDX files; default: the Debian package, else the Hub
    num_train_epochs: int = 5
    train_batch_size: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-2
    label_smoothing: float = 0.05
    max_shift: int = 2  # pixels, for augmentation
    num_reference_features: int = 5000  # stored for the kernel distance
    noise_floor_images: list[int] = field(default_factory=lambda: [1000, 2000, 10000])
    noise_floor_draws: int = 32  # with 8, a single unlucky draw made most of the standard deviation
    num_threads: int = 1
    seed: int = 42
    measure_noise_floor: bool = False  # measure the stored extractor instead of training
    measure_teacher: str | None = None  # a pipeline folder: measure it with the stored extractor instead of training
    num_inference_steps: int = 20  # of the measured teacher

    def __post_init__(self) -> None:
        if self.subject not in SUBJECTS:
            raise ValueError(f"subject: expected one of {tuple(SUBJECTS)}, got {self.subject!r}.")
        self.output_dir = self.output_dir or SUBJECTS[self.subject].output_dir


def train(settings: Settings, examples: Examples) -> SmallClassifier:
    """Return the classifier, in eval mode, after training on `examples`."""
    torch.manual_seed(settings.seed)
    images, labels = examples.images, examples.labels
    classifier = SmallClassifier(
        image_size=images.shape[-1],
        in_channels=images.shape[1],
        num_classes=sum(len(names) for names in examples.names.values()),
    )
    optimizer = torch.optim.AdamW(
        classifier.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay
    )
    batches_per_epoch = len(images) // settings.train_batch_size
    num_steps = settings.num_train_epochs * batches_per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, settings.learning_rate, total_steps=num_steps)
    draws = torch.Generator().manual_seed(settings.seed)
    bar = tqdm(total=num_steps, desc="train classifier", mininterval=5)
    for _ in range(settings.num_train_epochs):
        order = torch.randperm(len(images), generator=draws)[: batches_per_epoch * settings.train_batch_size]
        for rows in order.split(settings.train_batch_size):
            logits = classifier(SUBJECTS[settings.subject].augment(images[rows], draws, settings))
            loss = torch.stack(
                [
                    torch.nn.functional.cross_entropy(part, wanted, label_smoothing=settings.label_smoothing)
                    for part, wanted in zip(split_logits(logits, examples.names).values(), labels[rows].T, strict=True)
                ]
            ).sum()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: SmallClassifier, examples: Examples) -> float:
    """Return the share of `examples` in which `classifier` gets every attribute right, in [0, 1]."""
    correct = 0
    for batch, wanted in zip(examples.images.split(500), examples.labels.split(500), strict=True):
        parts = split_logits(classifier(batch), examples.names).values()
        found = torch.stack([part.argmax(dim=1) for part in parts], dim=1)  # (B, A)
        correct += int((found == wanted).all(dim=1).sum())
    return correct / len(examples.images)


def noise_floor(features: Tensor, num_images: int, settings: Settings) -> dict[str, Any]:
    """Return what perfect samples score: `num_images` training images against the rest, over several draws.

    `features` is (N, D) over the training set. The two parts of a draw are disjoint. Mean and standard deviation
    (over draws) of the Frechet and of the kernel distance.
    """
    frechet, kernel = [], []
    for draw in tqdm(range(settings.noise_floor_draws), desc=f"noise floor, n={num_images}", mininterval=5):
        order = torch.randperm(len(features), generator=torch.Generator().manual_seed(settings.seed * 1009 + draw))
        drawn, rest = features[order[:num_images]], features[order[num_images:]]
        frechet.append(frechet_distance(*feature_statistics(drawn), *feature_statistics(rest)))
        kernel.append(kernel_distance(drawn, rest, subset_size=min(1000, num_images), seed=draw)[0])
    frechet_mean, frechet_sd = mean_and_sd(frechet)
    kernel_mean, kernel_sd = mean_and_sd(kernel)
    return {
        "num_images": num_images,
        "num_draws": settings.noise_floor_draws,
        "frechet_distance": frechet_mean,
        "frechet_distance_sd": frechet_sd,
        "kernel_distance": kernel_mean,
        "kernel_distance_sd": kernel_sd,
    }


def mean_and_sd(values: list[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation of `values`."""
    tensor = torch.tensor(values, dtype=torch.float64)
    return tensor.mean().item(), tensor.std().item()


def build(settings: Settings) -> None:
    """Train the classifier and write the extractor folder."""
    subject = SUBJECTS[settings.subject]
    examples, others = (subject.load(split, settings.train_data_dir) for split in ("train", "test"))
    classifier = train(settings, examples)
    facts: dict[str, Any] = {"subject": settings.subject, "test_accuracy": accuracy(classifier, others)}
    facts["num_test_images"] = len(others.images)
    print(f"test accuracy {facts['test_accuracy']:.4f}")
    with torch.no_grad():
        features = extract_features(classifier.features, examples.images[examples.in_reference])  # (N, D)
        test_features = extract_features(classifier.features, others.images[others.in_reference])
    mean, covariance = feature_statistics(features)
    drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(settings.seed))
    test_distance = frechet_distance(*feature_statistics(test_features), mean, covariance)
    facts |= {
        "dataset": subject.dataset,
        "num_reference_images": len(features),
        "num_reference_features": settings.num_reference_features,
        "reference_features_seed": settings.seed,
        "training": {
            "num_train_epochs": settings.num_train_epochs,
            "train_batch_size": settings.train_batch_size,
            "learning_rate": settings.learning_rate,
            "weight_decay": settings.weight_decay,
            "label_smoothing": settings.label_smoothing,
            "max_shift": settings.max_shift,
            "seed": settings.seed,
            "torch": torch.__version__,
            "machine": f"{platform.machine()}, {settings.num_threads} of {os.cpu_count()} threads",
        },
        "test_split": {"num_images": len(test_features), "frechet_distance": test_distance},
    }
    save_extractor(
        settings.output_dir,
        classifier,
        name=f"{subject.name} (d={features.shape[1]})",
        mean=mean,
        covariance=covariance,
        features=features[drawn[: settings.num_reference_features]],
        facts=facts,
        labels=examples.names,
    )
    subject.copy_licences(Path(settings.output_dir))


def measure_noise_floor(settings: Settings) -> list[dict[str, Any]]:
    """Return the noise floor of the stored extractor, one row for each number of images."""
    examples = SUBJECTS[settings.subject].load("train", settings.train_data_dir)
    features = extract_features(load_extractor(settings.output_dir), examples.images[examples.in_reference])
    return [noise_floor(features, count, settings) for count in settings.noise_floor_images]


def measure_teacher(settings: Settings) -> dict[str, Any]:
    """Return the distances of the pipeline `settings.measure_teacher`, at the noise floor's numbers of images."""
    from diffusers import DiffusionPipeline

    from diffusers_pqcad.evaluation import generate_samples, to_uint8

    extractor = load_extractor(settings.output_dir)
    pipeline = DiffusionPipeline.from_pretrained(settings.measure_teacher)
    samples = generate_samples(
        pipeline,
        num_images=max(settings.noise_floor_images),
        num_inference_steps=settings.num_inference_steps,
        seed=settings.seed,
        description="teacher samples",
    )
    features = extract_features(extractor, to_uint8(samples))
    rows = []
    for count in settings.noise_floor_images:
        subset_size = min(1000, count, len(extractor.reference_features))
        kernel, _ = kernel_distance(features[:count], extractor.reference_features, subset_size=subset_size)
        statistics = feature_statistics(features[:count])
        distance = frechet_distance(*statistics, extractor.reference_mean, extractor.reference_covariance)
        rows.append({"num_images": count, "frechet_distance": distance, "kernel_distance": kernel})
    return {
        "scheduler": type(pipeline.scheduler).__name__,
        "num_inference_steps": settings.num_inference_steps,
        "seed": settings.seed,
        "distances": rows,
    }


def teachers_section(config: dict[str, Any]) -> str:
    """Return the card's section on the measured teachers, or nothing where none was measured."""
    if not config.get("teachers"):
        return ""
    rows = [
        f"| `{name}` | {teacher['num_inference_steps']} {teacher['scheduler']} | {teacher['seed']} "
        f"| {row['num_images']} | {row['frechet_distance']:.4f} | {row['kernel_distance']:.6f} |"
        for name, teacher in sorted(config["teachers"].items())
        for row in teacher["distances"]
    ]
    return "\n".join(
        [
            "\n## Teachers\n",
            f"Against all {config['num_reference_images']} training images.\n",
            "| pipeline | steps | seed | n | Frechet distance | kernel distance |",
            "|---|---|---|---|---|---|",
            *rows,
            "",
        ]
    )


def card(config: dict[str, Any]) -> str:
    """Return the README of the extractor folder; every figure is one of `config`."""
    table = ["| n | Frechet distance, floor ± sd | kernel distance, floor ± sd |", "|---|---|---|"]
    table += [
        f"| {row['num_images']} | {row['frechet_distance']:.4f} ± {row['frechet_distance_sd']:.4f} "
        f"| {row['kernel_distance']:.6f} ± {row['kernel_distance_sd']:.6f} |"
        for row in config["noise_floor"]
    ]
    subject = SUBJECTS[config.get("subject", "fashion-mnist")]  # the first extractor's config, of before, says none
    teachers = teachers_section(config)
    training, test_split = config["training"], config["test_split"]
    num_test_images = config.get("num_test_images", test_split["num_images"])
    newline = "\n"
    return f"""---
license: {subject.licence}
tags: [feature-extraction, {config.get("subject", "fashion-mnist")}]
---

# {config["name"]}

A three-convolution classifier of {subject.title}. The distance between the distributions of its penultimate features
ranks generative models of {subject.images}. It is **not FID**, which uses Inception-v3, and its numbers compare only
with numbers from this folder (weights SHA-256 `{config["sha256"][:16]}…`) at the same number of images n.

Test accuracy {100 * config["test_accuracy"]:.2f} % ({subject.classes}, {num_test_images} images) after
{training["num_train_epochs"]} epochs, seed {training["seed"]}, torch {training["torch"]}, {training["machine"]}.

## Noise floor

What perfect samples score: n training images against the statistics of the remaining, disjoint ones;
{config["noise_floor"][0]["num_draws"]} draws, mean ± standard deviation. A difference below the spread is no evidence.

{newline.join(table)}

The classifier has seen the training images: the {test_split["num_images"]} test images score
{test_split["frechet_distance"]:.4f} against all {config["num_reference_images"]} training images.
{teachers}
## Files

* `config.json`: name, SHA-256 of the two files below, sizes, and every figure above.
* `model.safetensors`: weights.
* `reference.safetensors`: mean and covariance (float64) over the {config["num_reference_images"]} training images, and
  the features (float16) of {config["num_reference_features"]} of them, for the kernel distance (drawn with seed
  {config["reference_features_seed"]}).

Load it with `diffusers_pqcad.evaluation.features.load_extractor(folder)`, which refuses an edited file. Made by
`examples/train_classifier.py`.

## Licence of the data

{subject.notice}"""


def main(settings: Settings) -> dict[str, Any]:
    """Run the job that `settings` asks for, then bring config.json and the card up to date; return the config."""
    require("eval", "torchmetrics")  # for the kernel distances, which come last
    torch.set_num_threads(settings.num_threads)
    folder = Path(settings.output_dir)
    if settings.measure_teacher:
        measured = {settings.measure_teacher: measure_teacher(settings)}
        config = json.loads((folder / CONFIG_FILE).read_text())
        config["teachers"] = config.get("teachers", {}) | measured
    else:
        if not settings.measure_noise_floor:
            build(settings)
        floor = measure_noise_floor(settings)
        config = json.loads((folder / CONFIG_FILE).read_text()) | {"noise_floor": floor}
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
    (folder / "README.md").write_text(card(config))
    return config


if __name__ == "__main__":
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    main(settings)
