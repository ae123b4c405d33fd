"""What loading without data should do: fidelity by average bits, and how the bits are shared out.

    python examples/experiments/widths.py

Packed layers with 8-bit activations and ranges of each call, as `from_pretrained(..., quantization_config=...)` gives.
Every row is a JSON of its own in --output_dir; a killed run goes on from there.
"""

import copy
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


def allocated(model: Any, bits: float, gain: float) -> dict[str, int]:
    """Return the bits of each layer for an average of `bits`."""
    config = with_model_exemptions(model, PQCADConfig(weight_bits=bits))
    return decide_bits(match_modules(model, config), config, gain)


def row(
    subject: str, seed: int, arm: str, bits: float, activation_bits: int, context: dict[str, Any]
) -> dict[str, Any]:
    """Return what one allocation came to."""
    pipeline, gain = context["pipeline"], ARMS[arm]
    if gain is None:
        config = PQCADConfig(method="fixed", weight_bits=int(bits), activation_bits=activation_bits or None)
    else:
        config = PQCADConfig(
            weight_bits=bits,
            weight_bits_by_module=allocated(pipeline.unet, bits, gain),
            activation_bits=activation_bits or None,
        )
    model = quantize_(copy.deepcopy(pipeline.unet), config)
    found = samples(model, pipeline.scheduler, len(context["wanted"]), NUM_STEPS, seed)
    about = {"subject": subject, "seed": seed, "arm": arm, "bits": bits, "activation_bits": activation_bits}
    return about | fidelity(context["wanted"], found)


def main(arguments: list[str] | None = None) -> None:
    """Measure every row that is not there yet."""
    parser = parser_of(__doc__, "widths")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--bits", nargs="+", type=float, default=list(BITS))
    parser.add_argument("--activation_bits", nargs="+", type=int, default=[8], help="0: floating point")
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.num_threads)
    for subject in args.subjects:
        for seed in args.seeds:
            pipeline = teacher(subject, seed)
            wanted = samples(pipeline.unet, pipeline.scheduler, args.num_images, NUM_STEPS, seed)
            context = {"pipeline": pipeline, "wanted": wanted}
            rows = [
                (arm, bits, activation_bits)
                for arm in args.arms
                for bits in args.bits
                for activation_bits in args.activation_bits
                if ARMS[arm] is not None or bits in PQCADConfig().bit_choices
            ]
            for arm, bits, activation_bits in tqdm(rows, desc=f"{subject}, seed {seed}", unit="row"):
                path = args.output_dir / file_name(subject, seed, arm, f"{bits:g}", activation_bits)
                cached(path, row, subject, seed, arm, bits, activation_bits, context)


if __name__ == "__main__":
    main()
