"""How much faster is one int8 UNet step than stock fp32?

    python examples/benchmarks/unet_step.py --num_threads 1 --json outputs/unet_step.json
    python examples/benchmarks/unet_step.py --peers True      # beside other runtimes, of `pip install -e ".[bench]"`

The model has the shape of DDPM-CIFAR10 (35.7 M parameters) and random weights: time does not depend on their values,
and the error column only guards against a contestant that is fast because it is wrong. All contestants take turns in
one process; a peer that is not installed, or fails, is skipped by name. Only runs on idle, pinned cores count
(`taskset -c 0`): load slows fp32 more than int8.
"""

import copy
import json
import subprocess
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import peers
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn
from transformers import HfArgumentParser

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.evaluation.speed import environment, interleaved_latency, tensor_bytes
from diffusers_pqcad.kernels import onednn
from diffusers_pqcad.layers import QuantizedLayer, kernel_cache_bytes, packed_layers
from diffusers_pqcad.qparams import ActivationQParams, dynamic_activation_qparams
from diffusers_pqcad.timesteps import install_timestep_groups

STOCK = "stock diffusers, fp32"
TIMESTEP = 500
NUM_CALIBRATION_SAMPLES = 4


@dataclass
class Settings:
    """Settings of one run; the defaults are the model and the batch of the README's table."""

    batch_size: int = 2
    num_threads: int = 1
    num_rounds: int = 9
    warmup_rounds: int = 2
    seed: int = 0
    peers: bool = False  # also other runtimes, and ours compiled: minutes of compilation
    json: str | None = None  # file for everything that was measured
    sample_size: int = 32
    block_out_channels: list[int] = field(default_factory=lambda: [128, 256, 256, 256])


def build_unet(settings: Settings) -> UNet2DModel:
    """Return a UNet in the shape of google/ddpm-cifar10-32, in fp32, with random weights."""
    torch.manual_seed(settings.seed)
    unet = UNet2DModel(
        sample_size=settings.sample_size,
        block_out_channels=tuple(settings.block_out_channels),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
        attention_head_dim=None,  # one head
    )
    return unet.eval()


def quantized(unet: UNet2DModel, weight_bits: int) -> UNet2DModel:
    """Return a copy of `unet` with int8 activations, ranges chosen in each call."""
    unet = copy.deepcopy(unet)
    quantize_(unet, PQCADConfig(method="fixed", weight_bits=weight_bits))
    return unet.to(memory_format=torch.channels_last)  # for the few layers that stay in floating point


def with_static_ranges(unet: UNet2DModel, sample: Tensor) -> UNet2DModel:
    """Return a copy of quantized `unet` whose activation ranges are those of one call with `sample`."""
    unet = copy.deepcopy(unet)
    layers = packed_layers(unet)
    observed: dict[str, ActivationQParams] = {}

    def observe(layer: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, QuantizedLayer)
        observed[layer.name] = dynamic_activation_qparams(args[0])

    hooks = [layer.register_forward_pre_hook(observe) for layer in layers.values()]
    unet(sample, TIMESTEP)
    for hook in hooks:
        hook.remove()
    groups = install_timestep_groups(unet, ())  # one group: all timesteps share the ranges
    for name, layer in layers.items():
        qparams = observed[name]
        layer.set_input_qparams_(ActivationQParams(qparams.scale.view(1), qparams.zero_point.view(1)), groups)
    return unet


class Contestant(NamedTuple):
    """A step, its input, and the model behind it where that is one of diffusers."""

    step: peers.Step
    sample: Tensor
    unet: UNet2DModel | None


def samples_of(settings: Settings, count: int) -> list[Tensor]:
    """Return `count` inputs of the model; the first one is what is timed."""
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (settings.batch_size, 3, settings.sample_size, settings.sample_size)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


def build_contestants(settings: Settings, unet: UNet2DModel, sample: Tensor) -> dict[str, Contestant]:
    """Return the contestants that only need diffusers and us, the stock model first."""
    channels_last = sample.to(memory_format=torch.channels_last)
    w8a8 = quantized(unet, 8)
    models = {
        STOCK: (unet, sample),
        "fp32, channels_last": (copy.deepcopy(unet).to(memory_format=torch.channels_last), channels_last),
        "bf16, channels_last": (
            copy.deepcopy(unet).bfloat16().to(memory_format=torch.channels_last),
            channels_last.to(torch.bfloat16),
        ),
        "W8A8, dynamic ranges": (w8a8, channels_last),
        "W4A8, dynamic ranges": (quantized(unet, 4), channels_last),
        "W8A8, static ranges": (with_static_ranges(w8a8, channels_last), channels_last),
    }
    contestants = {name: Contestant(peers.eager(model), x, model) for name, (model, x) in models.items()}
    if settings.peers:
        for name in ("W8A8, static ranges", "W4A8, dynamic ranges"):
            model = models[name][0]
            step = peers.eager(torch.compile(model, dynamic=False))  # type: ignore[arg-type]
            contestants[f"{name}, torch.compile"] = Contestant(step, channels_last, model)
    return contestants


def build_peers(settings: Settings, unet: UNet2DModel) -> tuple[dict[str, Contestant], dict[str, str]]:
    """Return the peers that are installed and run, and why the others do not."""
    samples = samples_of(settings, NUM_CALIBRATION_SAMPLES)
    contestants, skipped = {}, {}
    for name, build in peers.PEERS.items():
        print(f"building: {name}", flush=True)
        try:
            step = build(unet, samples, TIMESTEP)
            step(samples[0], TIMESTEP)
        except Exception as error:  # a peer may fail in any way; the table says which did
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:120]
            print(f"skipped: {name}: {skipped[name]}", flush=True)
        else:
            contestants[name] = Contestant(step, samples[0], None)
    return contestants, skipped


def relative_error(output: Tensor, reference: Tensor) -> float:
    """Return ||output - reference|| / ||reference||; raises ValueError for an output that is not finite."""
    if not output.isfinite().all():
        raise ValueError("a contestant's output holds a NaN or an infinity: its time means nothing.")
    return ((output.float() - reference).norm() / reference.norm()).item()


def commit() -> str | None:
    """Return the commit of the source tree, with "-dirty" after local changes, or `None` outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    result = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    return result.stdout.strip() or None


@torch.no_grad()  # not inference mode: its tensors cannot be exported
def benchmark(settings: Settings) -> dict[str, Any]:
    """Return the circumstances of the run and one row per contestant."""
    torch.set_num_threads(settings.num_threads)
    unet = build_unet(settings)
    (sample,) = samples_of(settings, 1)
    contestants = build_contestants(settings, unet, sample)
    skipped: dict[str, str] = {}
    if settings.peers:
        others, skipped = build_peers(settings, unet)
        contestants |= others
    reference = unet(sample, TIMESTEP).sample
    # The outputs are checked before the clock starts; this also builds the kernels' copies of the weights.
    errors = {
        name: relative_error(contestant.step(contestant.sample, TIMESTEP), reference)
        for name, contestant in contestants.items()
    }

    def step_of(contestant: Contestant) -> Callable[[], None]:
        def step() -> None:
            contestant.step(contestant.sample, TIMESTEP)

        return step

    circumstances = environment() | {"vnni": onednn.available() and not onednn.saturates(), "commit": commit()}
    latencies = interleaved_latency(
        {name: step_of(contestant) for name, contestant in contestants.items()},
        num_rounds=settings.num_rounds,
        warmup_rounds=settings.warmup_rounds,
    )
    rows = [
        {
            "name": name,
            **latencies[name]._asdict(),
            "ratio": latencies[STOCK].median_ms / latencies[name].median_ms,
            "relative_error": errors[name],
            "weight_bytes": None if contestant.unet is None else tensor_bytes(contestant.unet),
            "kernel_cache_bytes": None if contestant.unet is None else kernel_cache_bytes(contestant.unet),
        }
        for name, contestant in contestants.items()
    ]
    return {
        "settings": {key: value for key, value in asdict(settings).items() if key != "json"},
        "environment": circumstances,
        "num_parameters": unet.num_parameters(),
        "contestants": rows,
        "skipped": skipped,
    }


def markdown(result: dict[str, Any]) -> str:
    """Return `result` as a Markdown table with its circumstances above it."""
    settings, machine = result["settings"], result["environment"]
    load = ", ".join(f"{average:.2f}" for average in machine["load_average"] or ()) or "unknown"
    lines = [
        f"One UNet step, {result['num_parameters'] / 1e6:.1f} M parameters, batch {settings['batch_size']}, "
        f"{settings['sample_size']}x{settings['sample_size']}: medians of {settings['num_rounds']} interleaved rounds "
        f"after {settings['warmup_rounds']} to warm up, seed {settings['seed']}.",
        "",
        f"{machine['cpu']}, {machine['cpu_capability']}, VNNI: {'yes' if machine['vnni'] else 'no'}, threads: "
        f"{machine['num_threads']} of {machine['num_cpus']} cores, load before the run (1, 5, 15 min): {load}; "
        f"torch {machine['torch']}, diffusers {machine['diffusers']}, commit {machine['commit']}.",
        "",
        "| contestant | ms | min to max | times faster | relative error | weights MB | int8 copies MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["contestants"]:
        lines.append(
            f"| {row['name']} | {row['median_ms']:.1f} | {row['min_ms']:.1f} to {row['max_ms']:.1f} "
            f"| {row['ratio']:.2f} | {row['relative_error']:.1e} | {megabytes(row['weight_bytes'])} "
            f"| {megabytes(row['kernel_cache_bytes'])} |"
        )
    lines += [f"\nSkipped: {name} ({reason})." for name, reason in result.get("skipped", {}).items()]
    return "\n".join(lines)


def megabytes(num_bytes: int | None) -> str:
    """Return a table's cell; the memory of other runtimes is not ours to know."""
    return "-" if num_bytes is None else f"{num_bytes / 1e6:.1f}"


def main(settings: Settings) -> dict[str, Any]:
    """Run the benchmark, print its table and write its JSON file."""
    result = benchmark(settings)
    print(markdown(result))
    if settings.json is not None:
        path = Path(settings.json)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    (settings,) = HfArgumentParser(Settings).parse_args_into_dataclasses()
    main(settings)
