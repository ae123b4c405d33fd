"""What loading without data should do: fidelity by average bits, and how the bits are shared out.

    python examples/experiments/widths.py

Packed layers with 8-bit activations and ranges of each call, as `from_pretrained(..., quantization_config=...)` gives.
Every row is a JSON of its own in --output_dir; a killed run goes on from there.
"""

import copy
import dataclasses
from typing import Any

import torch
from subjects import NUM_STEPS, cached, fidelity, file_name, parser_of, samples, teacher
from tqdm.auto import tqdm

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.loading.convert import decide_bits, match_modules, with_model_exemptions

# How bits are shared out: by the gain of a level (1: all layers count the same), or one width for all.
GAINS = (2, 4, 8, 16, 64)
ARMS = {"one width": None, "weight error": 1.0} | {f"gain {gain}": float(gain) for gain in GAINS}
BITS = (3.0, 4.0, 4.5, 5.0, 5.5, 6.0, 7.0, 8.0)


# The shortcuts at the output of a UNet: in floating point, as by default, or rounded like any layer.
SHORTCUTS = ("float", "rounded")


def decided(model: Any, arm: str, bits: float, activation_bits: int, shortcuts: str) -> PQCADConfig:
    """Return a config that says the bits of each layer for an average of `bits`."""
    gain = ARMS[arm]
    config = PQCADConfig(
        weight_bits=bits, activation_bits=activation_bits or None, method="fixed" if gain is None else "progressive"
    )
    searched = match_modules(model, with_model_exemptions(model, config) if shortcuts == "float" else config)
    by_module = dict.fromkeys(searched, int(bits)) if gain is None else decide_bits(searched, config, gain)
    return dataclasses.replace(config, weight_bits_by_module=by_module)


def row(
    subject: str, seed: int, arm: str, bits: float, activation_bits: int, shortcuts: str, context: dict[str, Any]
) -> dict[str, Any]:
    """Return what one allocation came to."""
    pipeline = context["pipeline"]
    model = quantize_(copy.deepcopy(pipeline.unet), decided(pipeline.unet, arm, bits, activation_bits, shortcuts))
    found = samples(model, pipeline.scheduler, len(context["wanted"]), NUM_STEPS, seed)
    about = {"subject": subject, "seed": seed, "arm": arm, "bits": bits, "activation_bits": activation_bits}
    return about | {"shortcuts": shortcuts} | fidelity(context["wanted"], found)


def main(arguments: list[str] | None = None) -> None:
    """Measure every row that is not there yet."""
    parser = parser_of(__doc__, "widths")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--bits", nargs="+", type=float, default=list(BITS))
    parser.add_argument("--activation_bits", nargs="+", type=int, default=[8], help="0: floating point")
    parser.add_argument("--shortcuts", nargs="+", choices=SHORTCUTS, default=list(SHORTCUTS))
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    for subject in args.subjects:
        for seed in args.seeds:
            pipeline = teacher(subject, seed)
            wanted = samples(pipeline.unet, pipeline.scheduler, args.num_images, NUM_STEPS, seed)
            context = {"pipeline": pipeline, "wanted": wanted}
            rows = [
                (arm, bits, activation_bits, shortcuts)
                for arm in args.arms
                for bits in args.bits
                for activation_bits in args.activation_bits
                for shortcuts in args.shortcuts
                if ARMS[arm] is not None or bits in PQCADConfig().bit_choices
            ]
            for arm, bits, activation_bits, shortcuts in tqdm(rows, desc=f"{subject}, seed {seed}", unit="row"):
                path = args.output_dir / file_name(subject, seed, arm, f"{bits:g}", activation_bits, shortcuts)
                cached(path, row, subject, seed, arm, bits, activation_bits, shortcuts, context)


if __name__ == "__main__":
    main()
