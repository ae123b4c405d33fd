"""Train the bundled feature extractor, a small Fashion-MNIST classifier, and measure its noise floor.

    python examples/train_classifier.py
    python examples/train_classifier.py --measure_noise_floor
    python examples/train_classifier.py --measure_teacher examples/models/fashion-mnist

The first writes weights, reference statistics, config.json and the card, noise floor included; the second measures
the floor of the stored extractor again, the third adds a teacher pipeline's distances. Every figure of the card
comes from config.json.
"""

import json
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from fashion_mnist import LICENCE_NOTICE, load_split
from torch import Tensor
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from diffusers_pqcad.evaluation.extras import require
from diffusers_pqcad.evaluation.features import (
    CONFIG_FILE,
    SmallClassifier,
    extract_features,
    load_extractor,
    save_extractor,
)
from diffusers_pqcad.evaluation.metrics import feature_statistics, frechet_distance, kernel_distance


@dataclass
class Settings:
    """Settings of one run; the defaults made `examples/models/fashion-mnist-features`."""

    output_dir: str = "examples/models/fashion-mnist-features"
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


def augment(images: Tensor, generator: torch.Generator, max_shift: int) -> Tensor:
    """Return `images` (B, 1, H, W) uint8, shifted together by up to `max_shift` pixels, half of them mirrored."""
    height, width = images.shape[2:]
    padded = torch.nn.functional.pad(images, (max_shift,) * 4)
    top, left = torch.randint(0, 2 * max_shift + 1, (2,), generator=generator).tolist()
    shifted = padded[:, :, top : top + height, left : left + width]
    mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
    return torch.where(mirrored, shifted.flip(3), shifted)


def train(settings: Settings, images: Tensor, labels: Tensor) -> SmallClassifier:
    """Return the classifier, in eval mode, after training on `images` (N, 1, 28, 28) uint8 and `labels` (N,)."""
    torch.manual_seed(settings.seed)
    classifier = SmallClassifier(image_size=images.shape[-1])
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
            batch = augment(images[rows], draws, settings.max_shift)
            logits = classifier(batch)
            loss = torch.nn.functional.cross_entropy(logits, labels[rows], label_smoothing=settings.label_smoothing)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    bar.close()
    return classifier.eval()


@torch.no_grad()
def accuracy(classifier: SmallClassifier, images: Tensor, labels: Tensor) -> float:
    """Return the share of `images` that `classifier` labels correctly, in [0, 1]."""
    correct = [
        (classifier(batch).argmax(dim=1) == wanted).sum()
        for batch, wanted in zip(images.split(500), labels.split(500), strict=True)
    ]
    return sum(correct).item() / len(images)


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
    images, labels = load_split("train", settings.train_data_dir)
    test_images, test_labels = load_split("test", settings.train_data_dir)
    classifier = train(settings, images, labels)
    facts: dict[str, Any] = {"test_accuracy": accuracy(classifier, test_images, test_labels)}
    print(f"test accuracy {facts['test_accuracy']:.4f}")
    with torch.no_grad():
        features = extract_features(classifier.features, images)  # (N, D)
        test_features = extract_features(classifier.features, test_images)
    mean, covariance = feature_statistics(features)
    drawn = torch.randperm(len(features), generator=torch.Generator().manual_seed(settings.seed))
    test_distance = frechet_distance(*feature_statistics(test_features), mean, covariance)
    facts |= {
        "dataset": "Fashion-MNIST, training split, as it is (28x28, no padding)",
        "num_reference_images": len(images),
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
        "test_split": {"num_images": len(test_images), "frechet_distance": test_distance},
    }
    save_extractor(
        settings.output_dir,
        classifier,
        name=f"FMNIST-classifier Frechet distance (d={features.shape[1]})",
        mean=mean,
        covariance=covariance,
        features=features[drawn[: settings.num_reference_features]],
        facts=facts,
    )


def measure_noise_floor(settings: Settings) -> list[dict[str, Any]]:
    """Return the noise floor of the stored extractor, one row for each number of images."""
    images, _ = load_split("train", settings.train_data_dir)
    features = extract_features(load_extractor(settings.output_dir), images)
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
    teachers = teachers_section(config)
    training, test_split = config["training"], config["test_split"]
    newline = "\n"
    return f"""---
license: mit
tags: [feature-extraction, fashion-mnist]
---

# {config["name"]}

A three-convolution classifier of Fashion-MNIST. The distance between the distributions of its penultimate features
ranks generative models of 28x28 grey images. It is **not FID**, which uses Inception-v3, and its numbers compare only
with numbers from this folder (weights SHA-256 `{config["sha256"][:16]}…`) at the same number of images n.

Test accuracy {100 * config["test_accuracy"]:.2f} % (10 classes, {test_split["num_images"]} images) after
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

{LICENCE_NOTICE}"""


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
