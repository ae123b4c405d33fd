"""What does a step gain where a part of it is left out?

    python examples/benchmarks/bounds.py --json outputs/bounds.json

A quantized model takes turns with copies of itself that leave a part out, or repeat what it gave the first time. Their
outputs mean nothing; what they save is about what work on the part could bring. It is less than a profiler's share,
for the next part finds less in the cache: what is repeated was touched a step ago. Whole copies differ, too, by where
they lie in memory: a second one shows by how much.
"""

import copy
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any
from unittest import mock

import harness
import torch
from contestants import STOCK, eager
from diffusers.models.resnet import ResnetBlock2D
from models import Inputs
from torch import Tensor, nn
from transformers import HfArgumentParser

from diffusers_pqcad.evaluation.speed import Latency, interleaved_latency

WHOLE = "nothing"


@dataclass
class Settings(harness.FieldSettings):
    """Settings of one run."""

    batch_size: int = 2
    sample_size: int | None = None  # height and width of the input; default: the model's own
    num_rounds: int = 100
    warmup_rounds: int = 3
    contestants: list[str] = dataclasses.field(default_factory=lambda: ["W8A8"])  # names or globs, of ours


def without_joins(unet: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    """Return a step of `unet` in which tensors are not concatenated: the results are those of the first step."""
    step, concatenate = partial(eager(unet).step, inputs), torch.cat
    results: list[Tensor] = []

    def record(*args: Any, **kwargs: Any) -> Tensor:
        results.append(concatenate(*args, **kwargs))
        return results[-1]

    with mock.patch.object(torch, "cat", record):
        step()

    def run() -> Tensor:
        ready = iter(results)

        def repeat(*args: Any, **kwargs: Any) -> Tensor:
            return next(ready)

        with mock.patch.object(torch, "cat", repeat):
            return step()

    return run


def without_time(unet: Any, inputs: Inputs) -> Callable[[], Tensor]:
    """Return a step of `unet` without the timestep's embedding, and without its projection in each residual block."""
    repeat_(unet.time_proj, unet.time_embedding, unet=unet, inputs=inputs)
    for block in unet.modules():
        if isinstance(block, ResnetBlock2D) and block.time_emb_proj is not None:
            block.time_emb_proj = None
            block.forward = partial(call_without_time, block)
    return partial(eager(unet).step, inputs)


def call_without_time(block: nn.Module, x: Tensor, temb: Tensor) -> Tensor:
    """Return what `block` makes of `x` alone."""
    return type(block).forward(block, x, None)


def without_float_convolutions(unet: Any, inputs: Inputs) -> Callable[[], Tensor]:
    """Return a step of `unet` in which the first and the last convolution, which stay in fp32, repeat their output."""
    repeat_(unet.conv_in, unet.conv_out, unet=unet, inputs=inputs)
    return partial(eager(unet).step, inputs)


def repeat_(*modules: nn.Module, unet: nn.Module, inputs: Inputs) -> None:
    """Let each of `modules` return, in place, what it returns in a step of `unet`."""
    outputs = {}

    def keep(module: nn.Module, args: Any, output: Tensor) -> None:
        outputs[module] = output

    hooks = [module.register_forward_hook(keep) for module in modules]
    eager(unet).step(inputs)
    for hook in hooks:
        hook.remove()
    for module, output in outputs.items():
        module.forward = partial(constant, output)  # type: ignore[method-assign]


def constant(output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Return `output`, whatever else is given."""
    return output


def whole(unet: nn.Module, inputs: Inputs) -> Callable[[], Tensor]:
    """Return a step of `unet`."""
    return partial(eager(unet).step, inputs)


PARTS: dict[str, Callable[[Any, Inputs], Callable[[], Tensor]]] = {
    WHOLE: whole,
    "nothing, a second copy": whole,
    "concatenations (skips; embedding)": without_joins,
    "timestep's embedding and projections": without_time,
    "first and last convolution (fp32)": without_float_convolutions,
}


def less_than(whole: Latency, part: Latency) -> float:
    """Return the median of what `part` takes less than `whole` in the same round, in milliseconds."""
    return median(before - after for before, after in zip(whole.rounds_ms, part.rounds_ms, strict=True))


@torch.no_grad()
def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances of the run, and each contestant's times without each part."""
    field = harness.prepare(settings, settings.batch_size, settings.sample_size)
    machine = harness.circumstances()
    contestants = []
    for name, contestant in field.contestants.items():
        if name == STOCK:
            continue
        if contestant.unet is None or "forward" in contestant.unet.__dict__:  # bound to this model, not to a copy
            raise ValueError(f"contestants: {name!r} is not a model of PyTorch as it was built: it has no parts here.")
        steps = {part: leave_out(copy.deepcopy(contestant.unet), field.inputs) for part, leave_out in PARTS.items()}
        latencies = interleaved_latency(steps, num_rounds=settings.num_rounds, warmup_rounds=settings.warmup_rounds)
        parts = [
            {"part": part, **latencies[part]._asdict(), "less_ms": less_than(latencies[WHOLE], latencies[part])}
            for part in steps
        ]
        contestants.append({"name": name, "parts": parts})
    return harness.result_of(settings, field, machine, contestants=contestants)


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as a Markdown table for each contestant, with its circumstances above them."""
    settings = result["settings"]
    text = (
        f"One step, {harness.model_line(result)}: medians of {settings['num_rounds']} interleaved rounds after "
        f"{settings['warmup_rounds']} to warm up, and of what is less in the same round; seed {settings['seed']}."
    )
    lines = harness.caption(text, result)
    for contestant in result["contestants"]:
        lines += [f"| {contestant['name']} without | ms | min to max | ms less | of a step |", "|---|---|---|---|---|"]
        whole = contestant["parts"][0]["median_ms"]
        for row in contestant["parts"]:
            lines.append(
                f"| {row['part']} | {row['median_ms']:.1f} | {row['min_ms']:.1f} to {row['max_ms']:.1f} "
                f"| {row['less_ms']:.1f} | {row['less_ms'] / whole:.1%} |"
            )
        lines.append("")
    return "\n".join(lines + harness.skipped_lines(result)).rstrip()


main = partial(harness.run, benchmark, markdown)


if __name__ == "__main__":
    main(*HfArgumentParser(Settings).parse_args_into_dataclasses())
