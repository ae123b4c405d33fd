"""How a finished run ends: sizes and figures before and after, the folder, the address, the next commands."""

import json
import shlex
from pathlib import Path
from typing import Any

from diffusers_pqcad.cli import compare
from diffusers_pqcad.cli.compress import summary
from diffusers_pqcad.cli.flags import parse
from diffusers_pqcad.publishing.settings import CompressConfig

RESULTS = Path(__file__).parents[1] / "examples" / "results"


def metrics_of(run: str) -> dict[str, Any]:
    return json.loads((RESULTS / run / "metrics.json").read_text())


def lines_of(metrics: dict[str, Any], **settings: Any) -> list[str]:
    return summary(metrics, CompressConfig("my/teacher", output_dir="out/a b", **settings)).splitlines()


def test_before_and_after_are_the_figures_of_the_table():
    metrics = metrics_of("emoji-w4a8") | {"adapter": None}
    rows = {row["key"]: row for row in metrics["rows"]}
    lines = lines_of(metrics, guidance_scale=3.0, prompts_file="mine.txt")
    before, after = (rows[key]["size_bytes"] / 1e6 for key in ("float", "pq_cad"))
    assert (
        f"Size of the unet: {before:.2f} MB before, {after:.2f} MB after: {before / after:.1f} times smaller." in lines
    )
    assert "Evaluations of it for an image: 40 before, 5 after." in lines
    assert any(line.startswith("Time of an image: ") and line.endswith(" times as fast.") for line in lines)
    closeness = f"{float(rows['pq_cad']['sqnr_median_db']):.2f} dB; full precision in 10 steps:"
    assert f"Closeness to before, SQNR of the median image: {closeness}" in "\n".join(lines)
    assert lines[-3].startswith("Saved in out/a b. Load it: pipe = DiffusionPipeline.from_pretrained('out/a b');")
    assert lines[-2] == "Publish it: pqcad push 'out/a b' user/name"


def test_the_command_that_shows_both_is_one_that_pqcad_takes():
    metrics = metrics_of("emoji-w4a8") | {"adapter": None}
    shown = lines_of(metrics, guidance_scale=3.0, prompts_file="mine.txt")[-1].removeprefix("See it: ")
    program, name, *flags = shlex.split(shown)
    assert (program, name) == ("pqcad", "compare")
    settings = compare.settings_of(parse(compare.COMMAND, flags))
    assert (settings.pair.a, settings.pair.b, settings.pair.output) == ("my/teacher", "out/a b", "out/a b.html")
    assert (settings.run.prompts_file, settings.run.guidance_scale) == ("out/a b/prompts.txt", 3.0)
    assert settings.run.num_inference_steps == 20
    unconditional = lines_of(metrics_of("fashion-mnist-w4a8") | {"adapter": None})[-1]
    assert "--prompts_file" not in unconditional


def test_a_run_that_was_pushed_ends_with_its_address():
    metrics = metrics_of("fashion-mnist-w4a8") | {"adapter": None}
    lines = lines_of(metrics, push_to_hub=True, hub_model_id="me/small")
    assert lines[-2] == "Published: https://huggingface.co/me/small"
    assert not any(line.startswith("Publish it") for line in lines)
