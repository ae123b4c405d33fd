# /// script
# dependencies = ["diffusers-pqcad[train]"]
# ///
"""Compress a diffusers pipeline with one denoiser: progressive quantization, then distillation to fewer steps.

    accelerate launch examples/distill.py                       # the bundled teacher
    accelerate launch examples/distill.py --pretrained_model_name_or_path my/pipeline --weight_bits 3
    accelerate launch examples/distill.py --pretrained_model_name_or_path my/text-to-image \\
        --prompts_file prompts.txt --guidance_scale 7.5 --num_halvings 2 --output_dir outputs/text-to-image

The command line of `diffusers_pqcad.publishing.compress`. Every stage leaves its result in `output_dir`; the same
command goes on after a kill and ends with the same weights. The output folder is a loadable pipeline with a card.
"""

import sys
from pathlib import Path
from typing import Any

from diffusers_pqcad.evaluation.extras import MissingExtraError
from diffusers_pqcad.publishing.compress import compress
from diffusers_pqcad.publishing.hub import results_table, student_call, table_notes
from diffusers_pqcad.publishing.pipelines import TeacherSource
from diffusers_pqcad.publishing.settings import parse_settings

MODELS = Path(__file__).resolve().parent / "models"
EXTRACTOR = MODELS / "fashion-mnist-features"
BUNDLED = TeacherSource(
    path=str(MODELS / "fashion-mnist"),
    name="fashion-mnist (bundled)",
    extractor=str(EXTRACTOR) if EXTRACTOR.exists() else None,
    license="mit",
)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Run the whole script and return its metrics."""
    settings = parse_settings(sys.argv[1:] if arguments is None else arguments, (__doc__ or "").split("\n\n")[0])
    metrics = compress(*settings, bundled=BUNDLED)
    folder = settings.run.output_dir
    print(f"\n{results_table(metrics)}\n\n{table_notes(metrics)}")
    print(
        f"\nSaved in {folder}. Load it: pipe = DiffusionPipeline.from_pretrained({folder!r}); it was distilled for "
        f"pipe({student_call(metrics)})"
    )
    return metrics


if __name__ == "__main__":
    try:
        main()
    except (ValueError, MissingExtraError) as error:
        sys.exit(f"distill.py: {error}")
