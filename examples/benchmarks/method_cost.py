"""What do recording, a round of prices and a block's reconstruction take at the size of a real model?

    python examples/benchmarks/method_cost.py --model sd15 --json outputs/method_cost.json
    python examples/benchmarks/method_cost.py --model sd15 --price_layers 8       # a look: prices of a few layers

A text-to-image pipeline with random weights, guidance on: each image is two rows of a batch. Time of each part and the
most memory that the process had in it, then what a whole run of PQ would take by these times. Prices take one pass
over `price_batch_size` images for each layer; --price_batch_size and --price_share of examples/distill.py are the
choice where that is too long. Half precision and offloading are no part of it.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import harness
import memory
import models
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from tqdm.auto import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, HfArgumentParser

from diffusers_pqcad import PQCADConfig, ProgressiveConfig, collect_calibration_set
from diffusers_pqcad.compression.calibration import CalibrationSet
from diffusers_pqcad.compression.fake_quant import freeze_
from diffusers_pqcad.compression.progressive import (
    MIN_RECONSTRUCTION_SAMPLES,
    WEIGHT_BITS,
    ProgressiveQuantizer,
    passes_of,
    transition_prices,
)
from diffusers_pqcad.compression.reconstruction import capture_io, reconstruct

CLEAR = Path("/proc/self/clear_refs")  # "5" sets the peak back (Linux)
PROMPTS = ("a red cat", "an old house")


@dataclass
class Settings(harness.Settings):
    """Settings of one run; the defaults are SD-1.5 at a quarter of its usual pixels."""

    model: str = "sd15"
    sample_size: int = 32  # height and width of the latents
    num_inference_steps: int = 4
    price_layers: int = 0  # layers whose prices are measured, evenly spread; 0: all
    price_batch_size: int = 1  # images of each price
    block: str = "up_blocks.3.resnets.0"  # whose reconstruction is timed
    iterations: int = 2  # of that reconstruction
    reconstruction_samples: int = 8


@contextmanager
def measured(rows: list[dict[str, Any]], name: str) -> Iterator[None]:
    """Append to `rows` the time that the block takes, in seconds, and the most memory that the process has in it."""
    CLEAR.write_text("5")  # the peak starts from now
    started = time.perf_counter()
    yield
    rows.append({"name": name, "seconds": time.perf_counter() - started, "peak_bytes": memory.peak_bytes()})


def pipeline_of(unet: Any, sample_size: int) -> StableDiffusionPipeline:
    """Return a text-to-image pipeline around `unet`; its text encoder and its VAE are tiny, and run once an image."""
    letters = [*ascii_lowercase, *(f"{letter}</w>" for letter in ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    width = unet.config.cross_attention_dim
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=54,
            bos_token_id=52,
            eos_token_id=53,
            pad_token_id=53,
            hidden_size=width,
            intermediate_size=width,
            num_hidden_layers=1,
            num_attention_heads=8,
            max_position_embeddings=models.NUM_TEXT_TOKENS,
        )
    )
    pipeline = StableDiffusionPipeline(
        unet=unet,
        text_encoder=text_encoder.eval(),
        tokenizer=CLIPTokenizer(
            vocab={token: index for index, token in enumerate(letters)},
            merges=[],
            model_max_length=models.NUM_TEXT_TOKENS,
        ),
        vae=AutoencoderKL(latent_channels=4, norm_num_groups=8, block_out_channels=(8,)).eval(),
        scheduler=DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
            clip_sample=False,
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def spread(names: list[str], count: int) -> list[str]:
    """Return `count` of `names`, evenly spread; 0 gives all."""
    count = min(count or len(names), len(names))
    return [names[index * len(names) // count] for index in range(count)]


def whole_run(
    seconds: Callable[[str], float], settings: Settings, num_layers: int, num_units: int
) -> dict[str, float]:
    """Return what the parts of PQ at its defaults would take, in hours, from the times of the rows.

    Two stages of rounds, each with a price of every layer; each unit is reconstructed once in every stage, in the last
    one with all iterations. As if all units took as long as the block that was timed.
    """
    progressive = ProgressiveConfig()
    one_price = seconds("prices") / len(spread(["x"] * num_layers, settings.price_layers))
    rounds = 2 * progressive.rounds_per_stage + 1  # and the last moves of a stage
    iteration = seconds("reconstruction") / settings.iterations
    batches = progressive.reconstruction.batch_size / min(
        progressive.reconstruction.batch_size, settings.reconstruction_samples
    )
    iterations = math.ceil((1 + progressive.round_share) * progressive.reconstruction.iterations)
    return {
        "prices_of_a_round": one_price * num_layers / 3600,
        "prices": rounds * one_price * num_layers / 3600,
        "reconstruction": num_units * iterations * batches * iteration / 3600,
        "capture": 2
        * num_units
        * seconds("capture")
        * progressive.reconstruction_samples
        / settings.reconstruction_samples
        / 3600,
    }


def run_of(unet: Any, calibration: CalibrationSet) -> ProgressiveQuantizer:
    """Return a run of PQ at its defaults, before its first round."""
    return ProgressiveQuantizer(unet, calibration, PQCADConfig(weight_bits=WEIGHT_BITS), ProgressiveConfig())


def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances, the time and memory of each part, and the hours of a whole run."""
    torch.set_num_threads(settings.num_threads)
    unet = models.build(settings.model, settings.seed)
    machine = harness.circumstances()
    rows: list[dict[str, Any]] = []
    pixels = settings.sample_size
    pipeline = pipeline_of(unet, pixels)
    scale = pipeline.vae_scale_factor
    with measured(rows, "recording"):
        calibration = collect_calibration_set(
            pipeline,
            list(PROMPTS),
            num_trajectories=4,
            num_inference_steps=settings.num_inference_steps,
            seed=settings.seed,
            batch_size=1,
            height=pixels * scale,
            width=pixels * scale,
            guidance_scale=5.0,
        )
    with measured(rows, "preparation"):
        run = run_of(unet, calibration)
    names = spread(run.controller.movable(), settings.price_layers)
    calls = run.train_set.draw(settings.price_batch_size, settings.seed)
    with measured(rows, "prices"):
        frozen = run.calibration.denoiser(freeze_(copy.deepcopy(unet)))
        prices = transition_prices(unet, frozen, run.controller, calls, tqdm(names, desc="prices", unit="layer"))
    del frozen
    samples = run.train_set.draw(max(settings.reconstruction_samples, MIN_RECONSTRUCTION_SAMPLES), settings.seed)
    with measured(rows, "capture"):
        io = capture_io(unet, run.reference, settings.block, passes_of(run.denoiser, samples), samples.weight)
    with measured(rows, "reconstruction"):
        config = replace(run.settings.reconstruction, iterations=settings.iterations)
        result = reconstruct(run.units[settings.block], io, config, name=settings.block)
    times = {row["name"]: row["seconds"] for row in rows}
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key != "json"},
        "environment": machine,
        "num_parameters": unet.num_parameters(),
        "num_layers": len(run.controller.num_weights),
        "num_units": len(run.units),
        "num_prices": len(prices),
        "losses": [result.loss_before, result.loss_after],
        "rows": rows,
        "hours": whole_run(times.__getitem__, settings, len(run.controller.num_weights), len(run.units)),
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the table of a run."""
    settings, hours = result["settings"], result["hours"]
    text = (
        f"{harness.model_line(result)}, latents {settings['sample_size']}x{settings['sample_size']}, guidance on; "
        f"{result['num_layers']} layers in {result['num_units']} units. Recording: 4 trajectories of "
        f"{settings['num_inference_steps']} steps. Prices: {result['num_prices']} layers, "
        f"{settings['price_batch_size']} images each. Reconstruction: {settings['iterations']} iterations of "
        f"{settings['block']}."
    )
    lines = ["| part | seconds | most memory, GB |", "| --- | ---: | ---: |"]
    lines += [f"| {row['name']} | {row['seconds']:.1f} | {row['peak_bytes'] / 1e9:.1f} |" for row in result["rows"]]
    whole = ", ".join(f"{name.replace('_', ' ')} {value:.1f} h" for name, value in hours.items())
    return "\n".join([*harness.caption(text, result), *lines, "", f"A whole PQ at its defaults, by these: {whole}."])


main = partial(harness.run, benchmark, markdown)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
