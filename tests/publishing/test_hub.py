"""Specification of tables and cards: every number is measured."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffusers_pqcad.publishing.hub import END, START, model_card, results_table, table_notes, write_card

pytestmark = pytest.mark.fast


def row(key: str, name: str, **changes: Any) -> dict[str, Any]:
    """One row as `EvaluationReport.to_dict` writes it; all of its numbers are different."""
    return {
        "key": key,
        "name": name,
        "num_images": 1013,
        "num_inference_steps": 22,
        "reference_num_inference_steps": 26,
        "seed": 43,
        "sqnr_db": 17.171,
        "sqnr_interval_db": [16.161, 18.181],
        "sqnr_median_db": 19.191,
        "metric_name": "tiny classifier distance (d=16)",
        "frechet_distance": 5.151,
        "size_bytes": 3_330_000,
        "average_bits": 3.939,
        "kernels": {"x86": 61},
        "latency_ms": {"median_ms": 7.771},
        "reference_latency_ms": {"median_ms": 15.542},
        "latency_batch_size": 19,
        "environment": {"cpu": "Example CPU", "threads": 67, "torch": "2.71", "flags": ["avx2"]},
    } | changes


@pytest.fixture
def metrics() -> dict[str, Any]:
    teacher = row("float", "teacher", sqnr_db="inf", sqnr_interval_db=["inf", "inf"], average_bits=32.0,
                  kernels={}, size_bytes=23_310_000, num_inference_steps=26)  # fmt: skip
    return {
        "teacher_id": "someone/some-model",
        "settings": {
            "weight_bits": 4.0,
            "activation_bits": 8,
            "num_trajectories": 128,
            "num_inference_steps": 28,
            "max_train_steps": 313,
        },
        "calibration_seed": 1_000_047,
        "pq": {"average_bits": 3.858, "num_rounds": 13, "num_stages": 2, "num_roll_backs": 17},
        "cad": {"best_step": 251, "best_error": 0.02},
        "rows": [
            teacher,
            row("pq", "PQ", sqnr_db=18.282, frechet_distance=6.262),
            row("pq_cad", "PQ + CAD", num_inference_steps=14),
        ],
    }


def card_of(metrics: dict[str, Any], **changes: Any) -> str:
    return model_card(metrics, **{"repo": "me/my-model", "license_id": "mit"} | changes)


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    return yaml.safe_load(card.split("---\n")[1])


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


def test_the_table_by_hand(metrics: dict[str, Any]) -> None:
    header, rule, teacher, pq, student = cells(results_table(metrics))
    assert header == [
        "model",
        "avg. bits",
        "steps",
        "size MB",
        "ms an image",
        "speed-up",
        "SQNR dB",
        "median dB",
        "distance",
    ]
    assert len(rule) == 9
    assert teacher == ["teacher", "32.00", "26", "23.31", "7.77", "2.00", "(reference)", "", "5.15"]
    assert pq == ["PQ", "3.94", "22", "3.33", "7.77", "2.00", "18.28 [16.16, 18.18]", "19.19", "6.26"]
    assert student == ["PQ + CAD", "3.94", "14", "3.33", "7.77", "2.00", "17.17 [16.16, 18.18]", "19.19", "5.15"]


def test_a_distance_that_was_not_measured_leaves_no_column(metrics: dict[str, Any]) -> None:
    for entry in metrics["rows"]:
        entry["metric_name"] = entry["frechet_distance"] = None
    lines = cells(results_table(metrics))
    assert {len(line) for line in lines} == {8}
    assert "distance" not in lines[0]
    assert "distance" not in table_notes(metrics)
    assert "None" not in card_of(metrics)


def test_the_notes_say_what_share_of_the_weights_is_packed(metrics: dict[str, Any]) -> None:
    assert "scales not counted. Size" in table_notes(metrics)  # of a run from before it was measured
    metrics["rows"][0]["packed_share"] = 0.0
    for entry in metrics["rows"][1:]:
        entry["packed_share"] = 0.9371
    assert "scales not counted; they are 94 % of all weights. Size" in table_notes(metrics)
    assert "they are 94 % of all weights" in card_of(metrics)


def test_the_notes_name_the_rows_of_other_circumstances(metrics: dict[str, Any]) -> None:
    assert "But with" not in table_notes(metrics)
    for entry in metrics["rows"][1:]:
        entry["environment"] = entry["environment"] | {"threads": 66, "flags": ["avx3"]}
    assert table_notes(metrics).splitlines()[-1] == "- But with threads 66: PQ; PQ + CAD."


def test_the_notes_name_the_places_of_a_training_on_an_accelerator(metrics: dict[str, Any]) -> None:
    here = {"device": "cpu", "gpu": None, "cpu": "Example CPU", "torch": "2.71"}
    there = {"device": "cuda", "gpu": "Example GPU", "cpu": "Other CPU", "torch": "2.72"}
    metrics["training"] = {"pq": [here], "pq_cad": [there, here]}
    assert table_notes(metrics).splitlines()[-1] == (
        "- Trained on Example GPU (torch 2.72), then Example CPU (torch 2.71), and measured as the others: PQ + CAD."
    )
    metrics["training"]["pq_cad"] = [here]
    assert "Trained on" not in table_notes(metrics)


def test_the_notes_say_which_kernels_ran(metrics: dict[str, Any]) -> None:
    def lines() -> list[str]:
        return [line for line in table_notes(metrics).splitlines() if line.startswith("- Kernels")]

    assert lines() == ["- Kernels: int8 kernels in C: 61 of 61 layers."]
    metrics["rows"][2]["kernels"] = {"x86": 60, "reference": 1}
    assert lines() == [
        "- Kernels of PQ: int8 kernels in C: 61 of 61 layers.",
        "- Kernels of PQ + CAD: int8 kernels in C: 60 of 61 layers, floating point (reference): 1 of 61 layers.",
    ]
    metrics["rows"][1]["kernels"] = metrics["rows"][2]["kernels"] = {"onednn": 61}
    assert lines() == ["- Kernels: int8 kernels of oneDNN: 61 of 61 layers."]


def test_a_card_without_int8_kernels_claims_none(metrics: dict[str, Any]) -> None:
    metrics["settings"]["activation_bits"] = 0
    for entry in metrics["rows"][1:]:
        entry["kernels"] = {"reference": 61}
    (line,) = [line for line in card_of(metrics).splitlines() if "int8" in line]
    assert line == (
        "- Kernels: no int8 kernel ran, so times say nothing of int8; floating point (reference): 61 of 61 layers."
    )


def test_rows_of_older_runs_render_and_say_that_no_kernel_was_recorded(metrics: dict[str, Any]) -> None:
    for entry in metrics["rows"]:
        del entry["kernels"]
    assert "- Kernels: not recorded." in card_of(metrics).splitlines()
    assert "int8" not in card_of(metrics)


def test_the_notes_say_how_it_was_measured(metrics: dict[str, Any]) -> None:
    notes = table_notes(metrics)
    facts = ["n = 1013 images, seed 43", "at 26 steps", "batch 19", "tiny classifier distance (d=16), lower is better"]
    for fact in [*facts, "cpu Example CPU", "threads 67", "torch 2.71"]:
        assert fact in notes
    assert "avx2" not in notes


CHANGES = {
    "settings/weight_bits": 3.0,
    "settings/activation_bits": None,
    "settings/num_trajectories": 97,
    "settings/num_inference_steps": 34,
    "settings/max_train_steps": 314,
    "calibration_seed": 1_000_048,
    "pq/average_bits": 3.7,
    "pq/num_rounds": 14,
    "pq/num_stages": 3,
    "pq/num_roll_backs": 18,
    "cad/best_step": 252,
    "teacher_id": "someone/else",
    "rows/0/num_images": 1014,
    "rows/0/seed": 44,
    "rows/0/reference_num_inference_steps": 27,
    "rows/0/latency_batch_size": 20,
    "rows/0/size_bytes": 24_310_000,
    "rows/0/environment/threads": 68,
    "rows/1/sqnr_db": 18.5,
    "rows/1/sqnr_interval_db/0": 15.0,
    "rows/1/sqnr_interval_db/1": 19.0,
    "rows/1/frechet_distance": 6.5,
    "rows/1/average_bits": 3.5,
    "rows/1/latency_ms/median_ms": 8.8,
    "rows/2/reference_latency_ms/median_ms": 16.5,
    "rows/2/num_inference_steps": 12,
    "rows/2/size_bytes": 3_500_000,
    "rows/2/kernels/x86": 60,
}


@pytest.mark.parametrize("path", CHANGES)
def test_a_changed_measurement_changes_the_card(metrics: dict[str, Any], path: str) -> None:
    changed = copy.deepcopy(metrics)
    *folders, last = [int(part) if part.isdigit() else part for part in path.split("/")]
    place: Any = changed
    for part in folders:
        place = place[part]
    assert place[last] != CHANGES[path]
    place[last] = CHANGES[path]
    assert card_of(changed) != card_of(metrics)


def test_every_number_of_the_card_is_measured(metrics: dict[str, Any]) -> None:
    numbers = set(re.findall(r"\d+(?:\.\d+)?", card_of(metrics).split("## Use")[0].split(START)[1]))
    numbers |= set(re.findall(r"\d+(?:\.\d+)?", card_of(metrics).split("## How it was made")[1]))
    measured = "1013 43 26 22 14 28 19 67 2.71 23.31 3.33 7.77 2.00 32.00 3.94 17.17 18.28 16.16 18.18 19.19 5.15 6.26"
    measured = {*measured.split(), "3.86", "128", "1000047", "13", "2", "17", "211", "313", "251", "61"}
    measured |= {"7.0", "4", "8", "16"}  # times smaller; W4A8; d=16
    definitions = {"95", "8", "1", "2", "3", "4"}  # interval in per cent; int8; numbers of the list
    assert numbers <= measured | definitions
    assert "7.0 times smaller, 14 steps" in card_of(metrics)


def test_the_card_is_finished(metrics: dict[str, Any]) -> None:
    card = card_of(metrics)
    assert not re.search(r"TODO|FIXME|XXX|TBD|placeholder|\$\{?\w|<[a-z ]+>|None|nan\b", card)
    assert 'from_pretrained("me/my-model")' in card
    assert "num_inference_steps=14" in card
    assert all(f"assets/{name}.png" in card for name in ("samples", "bits", "curves"))


def test_the_front_matter_is_what_the_hub_reads(metrics: dict[str, Any]) -> None:
    assert front_matter(card_of(metrics)) == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "base_model": "someone/some-model",
        "base_model_relation": "quantized",
        "tags": ["pqcad", "quantized", "distillation", "w4a8"],
        "license": "mit",
    }
    assert "license" not in front_matter(card_of(metrics, license_id=None))


@pytest.mark.parametrize(
    "teacher", ["fashion-mnist (bundled)", "./models/teacher", "a/b/c", "C: here", "/tmp/teacher"]
)
def test_a_teacher_that_is_not_on_the_hub_is_no_base_model(metrics: dict[str, Any], teacher: str) -> None:
    """The Hub refuses the whole upload otherwise (huggingface/trl#1873)."""
    matter = front_matter(card_of(metrics | {"teacher_id": teacher}))
    assert "base_model" not in matter
    assert "base_model_relation" not in matter
    assert teacher in card_of(metrics | {"teacher_id": teacher})


def test_the_card_says_when_distillation_did_not_help(metrics: dict[str, Any]) -> None:
    assert "the state after 251 updates was the best" in card_of(metrics)
    metrics["cad"]["best_step"] = 0
    assert "no trained state beat the undistilled start" in card_of(metrics)


def test_a_written_card_keeps_what_others_wrote(metrics: dict[str, Any], tmp_path: Path) -> None:
    path = write_card(tmp_path, card_of(metrics))
    assert path.read_text() == card_of(metrics)
    before, after = path.read_text().split(START)
    path.write_text(f"{before}A note above.\n\n{START}{after}\nA note below.\n")
    metrics["pq"]["num_rounds"] = 99
    write_card(tmp_path, card_of(metrics))
    text = path.read_text()
    assert "A note above." in text
    assert text.endswith(f"{END}\n\nA note below.\n")
    assert text.index("A note above.") < text.index(START)
    assert "99 rounds" in text
    assert "13 rounds" not in text
    assert text.count(START) == text.count(END) == text.count("library_name") == 1
    write_card(tmp_path, card_of(metrics))
    assert path.read_text() == text  # writing twice is writing once


def test_new_front_matter_replaces_the_old(metrics: dict[str, Any], tmp_path: Path) -> None:
    write_card(tmp_path, card_of(metrics))
    metrics["settings"]["weight_bits"] = 3.0
    write_card(tmp_path, card_of(metrics))
    assert front_matter((tmp_path / "README.md").read_text())["tags"][-1] == "w3a8"


def test_metrics_of_a_file_make_the_same_card(metrics: dict[str, Any]) -> None:
    assert card_of(json.loads(json.dumps(metrics))) == card_of(metrics)
