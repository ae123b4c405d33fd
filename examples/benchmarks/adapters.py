"""What does an adapter beside the packed weights cost? One step of a UNet with none, and with each of several.

    python examples/benchmarks/adapters.py --json outputs/adapters.json

The UNet is quantized (8 bits for weights and activations by default), with random weights and random adapters: time
does not depend on their values. All take turns, and what is counted is the time of the processor (`process_time`), not
of the clock: a busy computer moves it less. *Parts*: how far the output is from that of the same model computed layer
by layer, the adapter in fp32 by peft, relative to its size; without an adapter it is what rounding at ties does.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import harness
import models
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import HfArgumentParser

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.runtime.fusion import remove_fused_

NONE = "no adapter"
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
# What diffusers' LCM-LoRA script adapts.
LCM = (
    *ATTENTION,
    *("proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
ADAPTERS: dict[str, tuple[int, tuple[str, ...]]] = {
    "rank 16 on attention": (16, ATTENTION),
    "rank 64 on attention": (64, ATTENTION),
    "rank 64 on LCM-LoRA's targets": (64, LCM),
}


@dataclass
class Settings(harness.Settings):
    """Settings of the benchmark."""

    model: str = "sd15"
    batch_size: int = 1
    sample_size: int = 32  # of the latents
    weight_bits: int = 8
    num_rounds: int = 5
    warmup_rounds: int = 1


def adapted(model: nn.Module, rank: int, targets: tuple[str, ...]) -> nn.Module:
    """Return a copy of the quantized `model` with a random adapter on the layers whose names end in `targets`."""
    config = LoraConfig(r=rank, target_modules=list(targets), init_lora_weights=False)
    return inject_adapter_in_model(config, copy.deepcopy(model)).requires_grad_(False)


def by_parts(model: nn.Module, inputs: models.Inputs) -> Tensor:
    """Return the output of `model` with all its blocks computed layer by layer, which they are from here on."""
    remove_fused_(model)
    return model(*inputs).sample


def process_seconds(run: Callable[[], Any]) -> float:
    """Return the processor's seconds that `run` takes, of all threads."""
    started = time.process_time()
    run()
    return time.process_time() - started


@torch.no_grad()
def benchmark(settings: Settings) -> dict[str, Any]:
    """Return each candidate's times and its ratio to the model without an adapter."""
    torch.set_num_threads(settings.num_threads)
    machine = harness.circumstances()
    model = models.build(settings.model, settings.seed).requires_grad_(False)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    generator = torch.Generator().manual_seed(settings.seed)
    inputs = models.draw_inputs(model, settings.batch_size, settings.sample_size, generator)
    quantize_(model, PQCADConfig(method="fixed", weight_bits=settings.weight_bits))
    candidates = {NONE: model, **{name: adapted(model, *adapter) for name, adapter in ADAPTERS.items()}}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in range(settings.warmup_rounds + settings.num_rounds):
        for name, candidate in candidates.items():
            taken = process_seconds(partial(candidate, *inputs))
            if turn >= settings.warmup_rounds:
                seconds[name].append(taken)
    rows = []
    for name, candidate in candidates.items():
        output = candidate(*inputs).sample
        parts = by_parts(candidate, inputs)
        rows.append(
            {
                "name": name,
                "median_ms": 1000 * median(seconds[name]),
                "min_ms": 1000 * min(seconds[name]),
                "max_ms": 1000 * max(seconds[name]),
                "ratio": median(mine / none for mine, none in zip(seconds[name], seconds[NONE], strict=True)),
                "relative_to_parts": ((output - parts).norm() / parts.norm()).item(),
            }
        )
    return {
        "settings": harness.settings_of(settings),
        "environment": machine,
        "num_parameters": num_parameters,
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the table."""
    settings = result["settings"]
    text = (
        f"{harness.model_line(result)}, latents {settings['sample_size']}x{settings['sample_size']}, weights of "
        f"{settings['weight_bits']} bits; processor's time, medians of {settings['num_rounds']}, in turns."
    )
    lines = harness.caption(text, result)
    lines += ["| adapter | ms | range | times no adapter | parts |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {row['name']} | {row['median_ms']:.1f} | {row['min_ms']:.1f} to {row['max_ms']:.1f} | "
        f"{row['ratio']:.2f} | {row['relative_to_parts']:.1e} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


main = partial(harness.run, benchmark, markdown)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
