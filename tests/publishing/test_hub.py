"""Specification of tables and cards: every number is measured."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import filter_repo_objects
from pipelines import PIPELINES

from diffusers_pqcad.publishing.hub import (
    END,
    START,
    float_layers,
    input_notes,
    model_card,
    own_notes,
    plain,
    prompt_notes,
    results_table,
    shortest,
    student_call,
    table_notes,
    write_card,
)
from diffusers_pqcad.publishing.pushing import PUBLISHED_FILES

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
        "teacher_from": "hub",
        "schedulers": {"recorded": "DDIMScheduler", "own": None},
        "component": "unet",
        "other_models": [],
        "float_layers": ["conv_in", "conv_out"],
        "student_arguments": {"num_inference_steps": 14},
        "call_arguments": {},
        "inputs": None,
        "shown_inputs": [],
        "calibration_seed": 1_000_047,
        "num_held_out": 15,
        "pq": {"average_bits": 3.858, "num_rounds": 13, "num_stages": 2},
        "cad": {"best_step": 251, "best_error": 0.02},
        "rows": [
            teacher,
            row("pq", "PQ", sqnr_db=18.282, frechet_distance=6.262),
            row("pq_cad", "PQ + CAD", num_inference_steps=14),
        ],
    }


PROMPT = "a | `b` <!-- pqcad:end -->\n$1 [x](y) *z* &lt; \\"


@pytest.fixture
def conditional(metrics: dict[str, Any]) -> dict[str, Any]:
    """Metrics of a text-to-image pipeline."""
    for entry in metrics["rows"]:
        entry |= {"fidelity_of": "latents", "image_psnr_db": 33.313, "image_ssim": 0.98765}
    metrics["rows"][0] |= {"image_psnr_db": "inf", "image_ssim": 1.0}
    inputs = {"kind": "prompt", "num_recorded": 41, "num_measured": 37, "num_shared": 0, "negative_prompt": None}
    return metrics | {
        "component": "transformer",
        "other_models": ["text_encoder", "vae"],
        "call_arguments": {"guidance_scale": 7.5, "height": 512},
        "inputs": inputs,
        "shown_inputs": ["a cat", PROMPT],
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


def test_model_evaluations_are_a_column_where_they_were_counted(metrics: dict[str, Any]) -> None:
    assert "evaluations" not in card_of(metrics)
    for entry, count in zip(metrics["rows"], (53, 59, 7), strict=True):
        entry["model_evaluations"] = count
    header, _, *rows = cells(results_table(metrics))
    assert header[2:5] == ["steps", "model evaluations", "size MB"]
    assert [row[3] for row in rows] == ["53", "59", "7"]
    assert "- Model evaluations: of the denoiser, for an image: steps times branches of guidance." in card_of(metrics)


def test_a_student_with_folded_guidance_is_called_without(conditional: dict[str, Any]) -> None:
    conditional["inputs"]["negative_prompt"] = "dull"
    assert "negative_prompt='dull', num_inference_steps=14, guidance_scale=7.5" in student_call(conditional)
    conditional["student_arguments"] = {"num_inference_steps": 5, "guidance_scale": 1}
    conditional["guidance_folded"] = True
    assert student_call(conditional) == "'a cat', num_inference_steps=5, guidance_scale=1, height=512"
    card = card_of(conditional)
    assert "pipe('a cat', num_inference_steps=5, guidance_scale=1, height=512)" in card
    assert "3. CAD: 313 updates, guidance folded into one branch, " in card
    assert "called with `guidance_scale=1`, and takes no other scale and no negative prompt." in card
    for halvings, text in ((2, "313 updates in each of 2 halvings, "), (0, "313 updates, in as many steps, ")):
        conditional["settings"]["num_halvings"] = halvings
        assert text in card_of(conditional)


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
    "num_held_out": 14,
    "float_layers": ["conv_in"],
    "teacher_from": "folder",
    "student_arguments/num_inference_steps": 15,
    "pq/average_bits": 3.7,
    "pq/num_rounds": 14,
    "pq/num_stages": 3,
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


def test_the_sizes_are_in_the_card_where_they_were_measured(metrics: dict[str, Any]) -> None:
    assert "memory" not in card_of(metrics)  # of a run from before
    assert "Memory while sampling was not measured." in card_of(metrics | {"memory": None}).splitlines()
    row = {"name": "this model", "size_bytes": 3_210_000, "num_threads": 3, "peak_bytes": 9e8, "before_bytes": 2e8}
    assert "| this model | 3.21 | 700 |" in card_of(metrics | {"memory": [row]}).splitlines()


def test_every_number_of_the_card_is_measured(metrics: dict[str, Any]) -> None:
    numbers = set(re.findall(r"\d+(?:\.\d+)?", card_of(metrics).split("## Use")[0].split(START)[1]))
    numbers |= set(re.findall(r"\d+(?:\.\d+)?", card_of(metrics).split("## How it was made")[1]))
    measured = "1013 43 26 22 14 28 19 67 2.71 23.31 3.33 7.77 2.00 32.00 3.94 17.17 18.28 16.16 18.18 19.19 5.15 6.26"
    measured = {*measured.split(), "3.86", "128", "1000047", "15", "13", "2", "17", "211", "313", "251", "61"}
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
    found = front_matter(card_of(metrics))
    assert found.pop("model-index")
    assert found == {
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "base_model": "someone/some-model",
        "base_model_relation": "quantized",
        "tags": ["pqcad", "quantized", "distillation", "w4a8"],
        "license": "mit",
    }
    assert "license" not in front_matter(card_of(metrics, license_id=None))


def test_the_licence_is_that_of_the_base_unless_it_is_given(metrics: dict[str, Any]) -> None:
    metrics["base_license"] = {"license": "other", "license_name": "its-own", "license_link": "https://example.com"}
    found = front_matter(card_of(metrics, license_id=None))
    assert {key: found[key] for key in metrics["base_license"]} == metrics["base_license"]
    assert front_matter(card_of(metrics))["license"] == "mit"
    assert "license_name" not in front_matter(card_of(metrics))


def test_the_model_index_holds_what_was_measured_and_nothing_else(conditional: dict[str, Any]) -> None:
    """As the Hub's own class reads it."""
    conditional["rows"][-1] |= {"image_psnr_db": "inf", "lpips": 0.0625, "clip_score": None}
    data: Any = ModelCard(card_of(conditional)).data
    assert data.model_name == "me/my-model"
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "sqnr": 17.171,
        "ssim": 0.98765,
        "lpips": 0.0625,
        "frechet_distance": 5.151,
    }
    (about,) = {(result.task_type, result.dataset_type, result.dataset_name) for result in data.eval_results}
    assert about == ("text-to-image", "generated", "1013 images of 37 prompts, noise of seed 43")
    by_type = {result.metric_type: result for result in data.eval_results}
    assert by_type["frechet_distance"].metric_name == "tiny classifier distance (d=16)"
    assert by_type["ssim"].metric_args == {
        "num_images": 1013,
        "seed": 43,
        "num_inference_steps": 14,
        "reference_num_inference_steps": 26,
    }


def test_a_row_without_figures_makes_no_model_index(metrics: dict[str, Any]) -> None:
    metrics["rows"][-1] |= {"sqnr_db": "inf", "sqnr_interval_db": ["inf", "inf"], "frechet_distance": None}
    metrics["rows"][0]["metric_name"] = metrics["rows"][1]["metric_name"] = metrics["rows"][2]["metric_name"] = None
    assert "model-index" not in front_matter(card_of(metrics))


def test_the_card_says_where_and_by_which_code_each_stage_trained(metrics: dict[str, Any]) -> None:
    assert "trained on" not in card_of(metrics)  # of a run that did not note it
    here = {"device": "cpu", "gpu": None, "cpu": "Example CPU", "torch": "2.71", "commit": "abc", "num_processes": 2}
    there = {"device": "cuda", "gpu": "Example GPU", "cpu": "Other CPU", "torch": "2.72", "commit": None}
    metrics["training"] = {"pq": [here], "pq_no_momentum": [there], "pq_cad": [here], "pq_cad_7": [there]}
    lines = card_of(metrics).splitlines()
    at_home = "2 processes of Example CPU (torch 2.71, commit abc)"
    assert f"2. PQ: 13 rounds in 2 stages; trained on {at_home}." in lines
    (cad,) = [line for line in lines if line.startswith("3. CAD")]
    assert cad.endswith(f"; trained on {at_home}, then Example GPU (torch 2.72).")


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


@pytest.mark.parametrize(
    ("settings", "terms"),
    [
        ({}, "quantized teacher, full-precision calibration;"),
        (
            {"teacher": "fp"},
            "full-precision teacher, full-precision calibration;",
        ),
        ({"teacher": "none"}, "no teacher, full-precision calibration;"),
        ({"calibration": False}, "quantized teacher, no calibration;"),
    ],
)
def test_the_method_is_that_of_the_settings(metrics: dict[str, Any], settings: dict[str, Any], terms: str):
    metrics["settings"] |= settings
    assert terms in model_card(metrics, repo="someone/w4a8", license_id=None)


@pytest.mark.parametrize(
    ("trainable", "part"),
    [
        ("all", "313 updates, "),
        ("scales", "313 updates of scales, biases and norms, "),
        ("lora", "313 updates of a LoRA of rank 16 on 32 layers, "),
    ],
)
def test_the_method_says_what_was_trained(metrics: dict[str, Any], trainable: str, part: str):
    metrics["settings"]["trainable"] = trainable
    metrics["adapter"] = {"rank": 16, "num_layers": 32, "is_given": False} if trainable == "lora" else None
    assert f"3. CAD: {part}" in card_of(metrics)


def test_a_lora_is_loaded_counted_and_asked_for(metrics: dict[str, Any]):
    line = 'pipe.load_lora_weights("me/my-model")'
    assert line not in card_of(metrics)
    assert "LoRA" not in card_of(metrics | {"adapter": None})
    metrics["adapter"] = {"rank": 16, "num_layers": 32, "is_given": False}
    assert f'from_pretrained("me/my-model")\n{line}\nimage = pipe(' in card_of(metrics)
    assert "Size: the denoiser's files, its LoRA in floating point among them." in card_of(metrics)
    assert "--lora_weights" not in card_of(metrics)
    metrics["adapter"]["is_given"] = True
    assert ", with the LoRA that it came with as `--lora_weights`." in card_of(metrics)


def test_the_table_of_decoded_pictures_by_hand(conditional: dict[str, Any]) -> None:
    conditional["rows"][1] |= {"image_psnr_db": "inf", "sqnr_median_db": "inf", "sqnr_interval_db": [16.161, "inf"]}
    header, rule, teacher, pq, student = cells(results_table(conditional))
    assert header[6:] == ["SQNR dB", "median dB", "picture PSNR dB", "SSIM", "distance"]
    assert {len(line) for line in (header, rule, teacher, pq, student)} == {11}
    assert teacher[6:] == ["(reference)", "", "", "", "5.15"]
    assert pq[6:] == ["18.28 [16.16, inf]", "inf", "inf", "0.9877", "6.26"]
    assert student[6:] == ["17.17 [16.16, 18.18]", "19.19", "33.31", "0.9877", "5.15"]


def test_times_may_be_left_out(metrics: dict[str, Any]) -> None:
    header, rule, teacher, *_ = cells(results_table(metrics, times=False))
    assert header == ["model", "avg. bits", "steps", "size MB", "SQNR dB", "median dB", "distance"]
    assert len(rule) == len(teacher) == 7
    with_times, without = table_notes(metrics), table_notes(metrics, times=False)
    gone = [line for line in with_times.splitlines() if line not in without.splitlines()]
    assert [line[:13] for line in gone] == ["- ms an image"]


def test_the_columns_of_trained_networks_are_there_where_they_judged(conditional: dict[str, Any]) -> None:
    assert "LPIPS" not in card_of(conditional)
    assert "CLIP" not in card_of(conditional)
    for entry, distance, score in zip(conditional["rows"], (0.0, 0.0625, 0.125), (31.31, 30.3, 29.29), strict=True):
        entry |= {"lpips": distance, "lpips_network": "alex", "clip_score": score, "clip_model": "some/clip"}
    header, _, *rows = cells(results_table(conditional))
    assert header[-3:] == ["LPIPS", "CLIP score", "distance"]
    assert [row[-3:-1] for row in rows] == [["", "31.31"], ["0.0625", "30.30"], ["0.1250", "29.29"]]
    card = card_of(conditional)
    assert "by the network alex, lower is better; pictures below 64 pixels were enlarged to that." in card
    assert '- CLIP score: 100 times the mean cosine between pictures and prompts by "some/clip".' in card


def test_the_column_of_prompt_accuracy_by_hand(conditional: dict[str, Any]) -> None:
    header, *_ = cells(results_table(conditional))
    assert "prompt accuracy" not in header
    assert "Prompt accuracy" not in table_notes(conditional)
    figures = [(0.981, 0.0, (0.0, 0.0)), (0.9704, -0.0106, (-0.0191, 0.0)), (0.99, 0.009, (-0.0012, 0.02))]
    for entry, (share, change, interval) in zip(conditional["rows"], figures, strict=True):
        entry |= {"prompt_accuracy": share, "prompt_accuracy_change": change}
        entry |= {"prompt_accuracy_change_interval": list(interval)}
    header, rule, *found = cells(results_table(conditional))
    assert header[-2:] == ["distance", "prompt accuracy"]
    assert {len(line) for line in (header, rule, *found)} == {12}
    assert [line[-1] for line in found] == ["98.1 %", "97.0 % (-1.1 [-1.9, +0.0])", "99.0 % (+0.9 [-0.1, +2.0])"]
    assert "Prompt accuracy: share of the images in which" in table_notes(conditional)


def test_the_notes_say_of_what_the_fidelity_is(metrics: dict[str, Any], conditional: dict[str, Any]) -> None:
    notes = table_notes(conditional)
    assert "SQNR: of the final latents to full precision at 26 steps" in notes
    assert "Picture PSNR and SSIM: of the decoded pictures" in notes
    assert "batch 19, of the call without decoding. Speed-up" in notes
    for entry in metrics["rows"]:  # the same rows, of a pipeline of pixels
        entry |= {"fidelity_of": "images", "image_psnr_db": None, "image_ssim": None}
    notes = table_notes(metrics)
    assert "SQNR: of the final images to full precision" in notes
    assert "batch 19. Speed-up" in notes
    assert "decoded" not in notes


def test_how_much_faster_than_as_it_is_run_by_hand(metrics: dict[str, Any]) -> None:
    """A drifting computer: each row is measured against full precision in the same minutes."""
    own = row("as_you_run_it", "yours (XScheduler)", latency_ms={"median_ms": 30.0}, num_inference_steps=50,
              reference_latency_ms={"median_ms": 12.0})  # fmt: skip
    student = row("pq_cad", "PQ + CAD", latency_ms={"median_ms": 4.0}, reference_latency_ms={"median_ms": 8.0})
    (note,) = own_notes([own, student])
    assert note.startswith("Against yours (XScheduler), 50 steps, the student is 5.00 times faster.")  # 2.5 / 0.5
    assert own_notes(metrics["rows"]) == []
    metrics["rows"].insert(1, own)
    metrics["rows"][-1] = student
    assert note in table_notes(metrics)


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({}, "37 prompts, none of which the calibration set was recorded with; guidance_scale 7.5, height 512."),
        (
            {"num_shared": 37},
            "37 prompts, all of which the calibration set was recorded with, and that with other noise; "
            "guidance_scale 7.5, height 512.",
        ),
        (
            {"num_shared": 3, "num_measured": 4, "kind": "class_labels"},
            "4 classes, 3 of which the calibration set was recorded with, and that with other noise; guidance_scale "
            "7.5, height 512.",
        ),
        (
            {"num_measured": 1, "negative_prompt": "no `dog`"},
            "1 prompt, none of which the calibration set was recorded with; guidance_scale 7.5, height 512, negative "
            'prompt "no \\`dog\\`".',
        ),
    ],
)
def test_the_notes_say_what_was_measured_with(conditional: dict[str, Any], changes: dict[str, Any], note: str) -> None:
    conditional["inputs"] |= changes
    assert input_notes(conditional) == [f"Inputs: {note}"]
    assert f"- Inputs: {note}" in card_of(conditional).splitlines()


OF_DATASET = {"kind": "dataset", "dataset": "me/texts", "configuration": None, "column": "caption"}


@pytest.mark.parametrize(
    ("found", "note", "datasets"),
    [
        ({"kind": "file"}, "of a file.", None),
        ({"kind": "teacher"}, "those in the teacher's folder.", None),
        (OF_DATASET, 'a sample of the column "caption" of the data set "me/texts".', ["me/texts"]),
        (
            OF_DATASET | {"configuration": "fr", "column": "a_b"},
            'a sample of the column "a\\_b" of the data set "me/texts" (configuration "fr").',
            ["me/texts"],
        ),
        (OF_DATASET | {"dataset": None}, 'a sample of the column "caption" of a data set in a folder.', None),
        (OF_DATASET | {"dataset": "no: id"}, 'a sample of the column "caption" of the data set "no: id".', None),
    ],
)
def test_the_card_says_where_the_prompts_come_from(
    conditional: dict[str, Any], found: dict[str, Any], note: str, datasets: list[str] | None
) -> None:
    assert prompt_notes(conditional) == []  # of a run from before
    conditional["prompts_from"] = found
    card = card_of(conditional)
    assert f"- Prompts: {note}" in card.splitlines()
    assert front_matter(card).get("datasets") == datasets


def test_the_card_of_a_text_to_image_pipeline(conditional: dict[str, Any]) -> None:
    card = card_of(conditional)
    assert front_matter(card)["pipeline_tag"] == "text-to-image"
    assert "in W4A8, its transformer 7.0 times smaller, 14 steps" in card
    assert "That is its `transformer`; as in the original are `text_encoder`, `vae`." in card
    assert "image = pipe('a cat', num_inference_steps=14, guidance_scale=7.5, height=512).images[0]" in card
    assert "128 full-precision trajectories of 41 prompts, of 28 steps" in card
    assert "--config recipe.yaml --prompts_file prompts.txt` (the files are in this repository).\n" in card
    assert "15 held out.\n" in card
    conditional["schedulers"]["own"] = "PNDMScheduler"
    assert "15 held out, by a DDIMScheduler in the place of its PNDMScheduler.\n" in card_of(conditional)
    conditional["inputs"]["negative_prompt"] = "no dog"
    assert "pipe('a cat', negative_prompt='no dog', num_inference_steps=14," in card_of(conditional)


def test_the_card_of_a_class_conditional_pipeline(conditional: dict[str, Any]) -> None:
    conditional["inputs"]["kind"] = "class_labels"
    conditional["shown_inputs"] = [207, 3]
    card = card_of(conditional)
    assert "pipeline_tag" not in front_matter(card)  # the Hub has none for it
    assert front_matter(card)["tags"] == ["pqcad", "quantized", "distillation", "class-conditional", "w4a8"]
    assert "pipe(class_labels=[207], num_inference_steps=14, guidance_scale=7.5, height=512)" in card
    assert "\nFrom left to right, classes 207; 3.\n" in card
    assert "--config recipe.yaml` (the file is in this repository).\n" in card


def test_no_prompt_breaks_the_card(conditional: dict[str, Any], tmp_path: Path) -> None:
    conditional["shown_inputs"] = [PROMPT, "a cat"]
    conditional["inputs"]["negative_prompt"] = PROMPT
    write_card(tmp_path, card_of(conditional))
    card = write_card(tmp_path, card_of(conditional)).read_text()
    assert card == card_of(conditional)
    assert card.count(END) == card.count("<!-- pqcad:end") == 1
    (line,) = [line for line in card.splitlines() if line.startswith("From left to right")]
    assert line == (
        'From left to right, prompts "a \\| \\`b\\` &lt;!-- pqcad:end --&gt; \\$1 \\[x\\](y) \\*z\\* '
        '&amp;lt; \\\\"; "a cat".'
    )
    code = card.split("```python\n")[1].split("\n```")[0]
    called = {}
    call = re.search(r"^image = pipe(.*)\.images\[0\]$", code, re.MULTILINE).group(1)
    exec(f"image = pipe{call}", {"pipe": lambda *prompts, **others: called.update(others, prompt=prompts)})
    assert called["prompt"] == (PROMPT,)
    assert called["negative_prompt"] == PROMPT
    assert called["guidance_scale"] == 7.5


def test_plain_text_has_no_line_breaks() -> None:
    assert plain(" a\n\n# b\t_c_ ") == '"a # b \\_c\\_"'


def test_sigmas_are_short_and_lead_to_the_same_steps(conditional: dict[str, Any]) -> None:
    import numpy as np

    sigmas = [(index + 0.123) / 17 for index in range(17)]
    assert [np.float32(shortest(sigma)) for sigma in sigmas] == [np.float32(sigma) for sigma in sigmas]
    conditional["student_arguments"] = {"num_inference_steps": 2, "sigmas": [1.0, 0.9000000000000001]}
    assert student_call(conditional).startswith("'a cat', num_inference_steps=2, sigmas=[1.0, 0.9], guidance")
    assert conditional["student_arguments"]["sigmas"] == [1.0, 0.9000000000000001]  # metrics.json is as it was


def test_the_float_layers_of_repeated_blocks_are_one_name() -> None:
    assert float_layers([]) == "No Linear or convolution layer stays in floating point."
    assert float_layers(["conv_in", "up.0.a.1", "up.0.a.2", "up.1.a.1", "x1.b"]) == (
        "Linear and convolution layers that stay in floating point (5): `conv_in`, `up.*.a.*`, `x1.b`."
    )


def test_how_to_repeat_a_run_of_a_local_teacher(metrics: dict[str, Any]) -> None:
    assert "with the folder of the teacher" not in card_of(metrics)
    metrics["teacher_from"] = "folder"
    assert "(the file is in this repository), with the folder of the teacher as `--pretrained_" in card_of(metrics)
    assert "base_model" not in front_matter(card_of(metrics))  # its name is somebody's on the Hub


@pytest.mark.parametrize("name", PIPELINES)
def test_all_files_of_a_pipeline_are_published(tmp_path: Path, name: str) -> None:
    PIPELINES[name].build().save_pretrained(tmp_path)
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(filter_repo_objects(files, allow_patterns=list(PUBLISHED_FILES))) == sorted(files)
