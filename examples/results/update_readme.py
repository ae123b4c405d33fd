"""Write the tables of the READMEs and of end_to_end.md from the committed results in this folder.

    python examples/results/update_readme.py

`NAME/metrics.json` is a run of `examples/distill.py`, `results:NAME` its table, `quality:NAME` the same without times;
`SCRIPT.json` and `SCRIPT-WHICH.json` are runs of `examples/benchmarks/SCRIPT.py`. `summary:NAME` is a few rows of
either, for readers in a hurry. A test runs `render` and compares, so a table that was edited by hand, or left behind
by a new run, fails.
"""

import json
import re
import sys
from importlib import import_module
from pathlib import Path

from diffusers_pqcad.publishing.hub import prompt_accuracy, results_table, table_notes

HERE = Path(__file__).resolve().parent
READMES = (
    HERE.parents[1] / "README.md",
    HERE.parent / "benchmarks" / "README.md",
    HERE.parent / "guides" / "scale.md",
    HERE / "end_to_end.md",
)

# The rows of a summary: of a run by their keys, of a benchmark by the contestants' names.
ROWS_OF_RUN = ("float", "float_4", "fixed", "pq", "pq_cad")
ROWS_OF_STEP = (
    "stock diffusers, fp32",
    "fp32, torch.compile",
    "bf16, channels_last",
    "OpenVINO + NNCF int8, bf16",
    "W8A8",
    "W4A8",
)


def run_block(metrics: dict, *, times: bool) -> str:
    """Return the README's text for a run of `examples/distill.py`: its table and its notes."""
    return f"{results_table(metrics, times=times)}\n\n{table_notes(metrics, times=times)}"


def benchmark_block(script: str, result: dict) -> str:
    """Return the README's text for a run of `examples/benchmarks/SCRIPT.py`."""
    sys.path.insert(0, str(HERE.parent / "benchmarks"))
    return import_module(script).markdown(result)


def run_summary(metrics: dict) -> str:
    """Return a table of five rows of a run with prompts, and the circumstances in one paragraph."""
    rows = {row["key"]: row for row in metrics["rows"]}
    lines = [
        "| | UNet evaluations an image | file MB | SQNR dB, mean | median | prompts shown |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in (rows[key] for key in ROWS_OF_RUN):
        is_reference = row["key"] == "float"
        low, high = (0.0, 0.0) if is_reference else row["sqnr_interval_db"]
        cells = (
            f"{row['name']}, {row['num_inference_steps']} steps",
            str(row["model_evaluations"]),
            f"{row['size_bytes'] / 1e6:.1f}",
            "(reference)" if is_reference else f"{row['sqnr_db']:.1f} [{low:.1f}, {high:.1f}]",
            "" if is_reference else f"{row['sqnr_median_db']:.1f}",
            prompt_accuracy(row, exact=True),
        )
        lines.append(f"| {' | '.join(cells)} |")
    student = rows["pq_cad"]
    seen = student["environment"]
    return "\n".join(lines) + (
        f"\n\nn = {student['num_images']} prompts, seed {student['seed']}, one training seed; packed layers, not "
        f"simulated. SQNR: of the final {student['fidelity_of']} to the first row's from the same noise, with a 95 % "
        "bootstrap interval over images. Prompts shown: a classifier finds in the picture what the prompt says. "
        f"torch {seen['torch']}, diffusers {seen['diffusers']}, commit {seen['commit'][:7]}, {seen['cpu']}."
    )


def step_summary(result: dict) -> str:
    """Return a table of six contestants of `unet_step.py`, and the circumstances in one paragraph."""
    rows = {row["name"]: row for row in result["contestants"]}
    lines = [
        "| one UNet step | ms | times faster | relative error | weights MB | int8 copies MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for row in (rows[name] for name in ROWS_OF_STEP):
        sizes = (row["weight_bytes"], row["kernel_cache_bytes"])
        lines.append(
            f"| {row['name']} | {row['median_ms']:.0f} | {row['ratio']:.2f} | {row['relative_error']:.1e} "
            f"| {' | '.join('-' if size is None else f'{size / 1e6:.0f}' for size in sizes)} |"
        )
    settings, seen = result["settings"], result["environment"]
    return "\n".join(lines) + (
        f"\n\nThe shape of {settings['model']}, {result['num_parameters'] / 1e6:.1f} M random weights, batch "
        f"{settings['batch_size']}: medians of {settings['num_rounds']} interleaved rounds, seed {settings['seed']}. "
        f"{seen['cpu']}, {seen['cpu_capability']}, {seen['num_threads']} thread, torch {seen['torch']}, "
        f"commit {seen['commit'][:7]}."
    )


def summary(name: str) -> str:
    """Return the few rows of the results `name` that the README shows."""
    folder = HERE / name
    if folder.is_dir():
        return run_summary(json.loads((folder / "metrics.json").read_text()))
    return step_summary(json.loads((HERE / f"{name}.json").read_text()))


def block(name: str, *, times: bool) -> str:
    """Return the README's text for the results `name`."""
    folder = HERE / name
    if folder.is_dir():
        return run_block(json.loads((folder / "metrics.json").read_text()), times=times)
    return benchmark_block(name.partition("-")[0], json.loads((HERE / f"{name}.json").read_text()))


def render(text: str) -> str:
    """Return the README `text` with every block of results, quality and summary up to date."""

    def replace(match: re.Match[str]) -> str:
        kind, name = match[1], match[2]
        table = summary(name) if kind == "summary" else block(name, times=kind == "results")
        return f"<!-- {kind}:{name} -->\n{table}\n<!-- {kind}:end -->"

    blocks = r"<!-- (results|quality|summary):(?!end)(\S+) -->\n.*?<!-- \1:end -->"
    return re.sub(blocks, replace, text, flags=re.DOTALL)


if __name__ == "__main__":
    for readme in READMES:
        readme.write_text(render(readme.read_text()))
