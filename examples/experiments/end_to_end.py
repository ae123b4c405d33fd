"""The bundled teachers, compressed from end to end: one run of `examples/distill.py` for each table.

    python examples/experiments/end_to_end.py --runs emoji-w4a8 fashion-flow-w4a8

A run goes on where it was killed; its figures, its history and its grid are kept in --results_dir, from where
`examples/results/update_readme.py` writes the tables. Its state stays in --work_dir.
"""

import shutil
import subprocess
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser
from collections.abc import Sequence
from pathlib import Path

from subjects import ROOT

KEPT = ("metrics.json", "history.json", "assets/samples.png", "assets/curves.png", "assets/bits.png")
MODELS = ROOT / "examples" / "models"
FLAGS_OF_WIDTH = {"w4a8": (), "w3a8": ("--weight_bits", "3")}
# The ablations take several times as long: once for each kind of text-to-image model. Those of the distillation come
# with the rows of the defaults, those of what is before it in a run of their own. What the parts are worth on the
# others is in parts.py and rates.py, on three seeds.
OF_DISTILLATION = ("--ablations", "--only_ablations", "teacher", "float_teacher", "calibration", "load_time")
OF_THE_REST = ("--ablations", "--only_ablations", "momentum", "width", "guidance")
FLAGS_OF_RUN: dict[str, tuple[str, ...]] = {
    "emoji-w4a8": OF_DISTILLATION,
    "fashion-flow-w4a8": OF_DISTILLATION,
    "emoji-widths-w4a8": OF_THE_REST,
    "fashion-flow-widths-w4a8": OF_THE_REST,
    "emoji-8-steps-w4a8": ("--num_inference_steps", "8"),
    "fashion-flow-16-steps-w4a8": ("--num_inference_steps", "16"),
}
TEACHERS = ("fashion-mnist", "fashion-mnist-epsilon", "emoji", "fashion-flow")
RUNS = {f"{teacher}-{width}": teacher for teacher in TEACHERS for width in FLAGS_OF_WIDTH} | {
    "emoji-widths-w4a8": "emoji",
    "fashion-flow-widths-w4a8": "fashion-flow",
    "emoji-8-steps-w4a8": "emoji",
    "fashion-flow-16-steps-w4a8": "fashion-flow",
}


def command(name: str, work_dir: Path, others: Sequence[str] = ()) -> list[str]:
    """Return the command of the run `name`; `others` are further flags."""
    flags = ["--pretrained_model_name_or_path", str(MODELS / RUNS[name]), "--output_dir", str(work_dir / name)]
    flags += [*FLAGS_OF_WIDTH[name.rpartition("-")[2]], *FLAGS_OF_RUN.get(name, ()), *others]
    return [sys.executable, str(ROOT / "examples" / "distill.py"), *flags]


def keep(folder: Path, results: Path) -> None:
    """Copy what a finished run in `folder` came to into `results`."""
    for file in KEPT:
        (results / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / file, results / file)


def main(arguments: list[str] | None = None) -> None:
    """Run what is asked for, and keep what it came to."""
    parser = ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0], formatter_class=ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    parser.add_argument("--work_dir", type=Path, default=ROOT / "outputs" / "end-to-end")
    parser.add_argument("--results_dir", type=Path, default=ROOT / "examples" / "results")
    args, others = parser.parse_known_args(arguments)  # the others are flags of distill.py: --num_threads 1
    for name in args.runs:
        subprocess.run(command(name, args.work_dir, others), check=True, cwd=ROOT)
        keep(args.work_dir / name, args.results_dir / name)


if __name__ == "__main__":
    main()
