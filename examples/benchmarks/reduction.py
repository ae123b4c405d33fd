"""What would several GPUs do to a training, on paper: bytes that are reduced in a step against what is computed in it.

    python examples/benchmarks/reduction.py --json outputs/reduction.json

Nothing is measured. A forward pass is counted on tensors without memory; what a GPU computes in a second, and what a
link carries, are assumptions, flags of this script.

A ring adds P gradients of 4 bytes up over N processes by sending 2 (N - 1) / N 4 P bytes from each (Patarasuk & Yuan
2009, doi:10.1016/j.jpdc.2008.09.002). With F operations a forward pass of one image and branch, and twice as many in a
backward pass:

    CAD, one update of B images a term and process      (2 steps x 2 branches of the teacher + 2 terms x 3) B F
    reconstruction, one iteration of every unit once    3 I F / N, of I images

The speed-up is that over one process with the same images, nothing of the sending hidden behind the computing:
N / (1 + sending / computing).
"""

from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import harness
import models
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import HfArgumentParser

from diffusers_pqcad import DistillConfig
from diffusers_pqcad.compression.reconstruction import ReconstructionConfig

BYTES = 4  # of a gradient in fp32
TEACHER_STEPS, BRANCHES, TERMS, PASSES = 2, 2, 2, 3  # of a guided teacher, and a student with guidance folded in


@dataclass
class Settings(harness.Settings):
    """Settings; the assumed numbers are those of data sheets, taken down to what is usually reached of them."""

    model: str = "sd15"
    num_processes: int = 8
    teraflops: float = 10.0  # fp32 without TF32, half of an A100's peak
    gigabytes_per_second: list[float] = field(default_factory=lambda: [200.0, 20.0, 1.2])
    links: list[str] = field(default_factory=lambda: ["NVLink", "PCIe 4.0 x16", "10 Gbit Ethernet"])
    train_batch_size: int = DistillConfig().train_batch_size
    reconstruction_batch_size: int = ReconstructionConfig().batch_size


def forward_flops(model: torch.nn.Module) -> int:
    """Return the operations of a forward pass of one image and branch, two for each product that is added."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        model(*models.draw_inputs(model, 1, None, None))
    return counter.get_total_flops()


def sent_bytes(num_parameters: int, num_processes: int) -> float:
    """Return what each process sends in one sum of all gradients."""
    return 2 * (num_processes - 1) / num_processes * BYTES * num_parameters


def speed_up(computing: float, sending: float, num_processes: int) -> float:
    """Return how many times faster `num_processes` are, from the seconds of a step in each of them."""
    return num_processes / (1 + sending / computing)


def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the counts, and for each stage and link the seconds of computing and of sending."""
    with torch.device("meta"):
        model = models.build(settings.model)
    flops, count = forward_flops(model), settings.num_processes
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    sent = sent_bytes(num_parameters, count)
    stages = {
        "CAD, an update": (TEACHER_STEPS * BRANCHES + TERMS * PASSES) * settings.train_batch_size * flops,
        "reconstruction, an iteration of every unit": PASSES * settings.reconstruction_batch_size * flops / count,
    }
    rows = []
    for stage, work in stages.items():
        computing = work / (1e12 * settings.teraflops)
        for link, speed in zip(settings.links, settings.gigabytes_per_second, strict=True):
            sending = sent / (1e9 * speed)
            rows.append(
                {
                    "stage": stage,
                    "link": link,
                    "gigabytes_per_second": speed,
                    "teraflop": work / 1e12,
                    "computing_s": computing,
                    "sending_s": sending,
                    "speed_up": speed_up(computing, sending, count),
                }
            )
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key != "json"},
        "num_parameters": num_parameters,
        "forward_flops": flops,
        "sent_bytes": sent,
        "rows": rows,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the table."""
    chosen = result["settings"]
    lines = [
        f"{harness.model_line(result)}, {result['forward_flops'] / 1e12:.2f} teraflop a forward pass of one image and "
        f"branch; {chosen['num_processes']} processes, each of which sends {result['sent_bytes'] / 1e9:.2f} GB in a "
        f"step. Assumed: {chosen['teraflops']:g} teraflop a second, and the links below.",
        "",
        "| stage | teraflop a process | computing s | link, GB a second | sending s | times faster |",
        "| --- | ---: | ---: | --- | ---: | ---: |",
    ]
    lines += [
        f"| {row['stage']} | {row['teraflop']:.1f} | {row['computing_s']:.2f} | {row['link']}, "
        f"{row['gigabytes_per_second']:g} | {row['sending_s']:.2f} | {row['speed_up']:.1f} |"
        for row in result["rows"]
    ]
    return "\n".join(lines)


main = partial(harness.run, benchmark, markdown)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
