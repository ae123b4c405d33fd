"""Every script of `examples/experiments` runs, on an untrained model and as little work as it can do."""

import copy
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline
from pipelines import PIPELINES, PROMPTS

from diffusers_pqcad.compression.reconstruction import ReconstructionConfig
from diffusers_pqcad.publishing.settings import ABLATIONS

ROOT = Path(__file__).parents[1]


@pytest.fixture
def scripts(monkeypatch, tmp_path, tiny_unet):
    """Return a function that runs the script of a name and returns its rows; teachers are untrained."""
    for folder in ("examples", "examples/experiments"):
        monkeypatch.syspath_prepend(str(ROOT / folder))
    import train_teacher

    def teacher(subject: str, seed: int = 0) -> DDIMPipeline:
        prediction_type = "epsilon" if subject.endswith("epsilon") else "v_prediction"
        return DDIMPipeline(tiny_unet, train_teacher.build_scheduler(prediction_type))

    def run(name: str, *arguments: str) -> list[dict]:
        script = __import__(name)
        if hasattr(script, "teacher"):
            monkeypatch.setattr(script, "teacher", teacher)
        if hasattr(script, "calibration_set"):
            record = script.calibration_set
            monkeypatch.setattr(script, "calibration_set", lambda pipeline, seed: record(pipeline, seed, 4))
        if hasattr(script, "TEACHERS"):
            monkeypatch.setattr(script, "TEACHERS", tmp_path / "teachers")
        threads = torch.get_num_threads()
        common = ["--num_images", "2", "--output_dir", str(tmp_path / "rows")]
        try:
            script.main([*arguments, *common])
            paths = sorted((tmp_path / "rows").glob("*.json"))
            written = [path.stat().st_mtime_ns for path in paths]
            script.main([*arguments, *common])  # goes on from there: nothing is measured twice
        finally:
            torch.set_num_threads(threads)
        assert [path.stat().st_mtime_ns for path in paths] == written
        return [json.loads(path.read_text()) for path in paths]

    return run


def test_widths(scripts):
    rows = scripts("widths", "--subjects", "digits-epsilon", "--arms", "one width", "gain 16", "--bits", "4")
    assert [(row["subject"], row["arm"], row["bits"], row["shortcuts"]) for row in rows] == [
        ("digits-epsilon", "gain 16", 4.0, "float"),
        ("digits-epsilon", "gain 16", 4.0, "rounded"),
        ("digits-epsilon", "one width", 4.0, "float"),
        ("digits-epsilon", "one width", 4.0, "rounded"),
    ]
    assert len({row["mean"] for row in rows}) == 4
    assert all(len(row["images"]) == 2 for row in rows)


@pytest.mark.slow
def test_controller(scripts):
    arms = ["no momentum", "momentum", "momentum of logarithms", "sensitivity, momentum of logarithms"]
    arms += ["average of all rounds", "momentum, relative dispersion", "solver"]
    rows = scripts("controller", "--subjects", "digits", "--seeds", "0", "--images", "1", "--arms", *arms)
    assert sorted(row["arm"] for row in rows) == sorted(arms)
    for row in rows:
        assert row["average_bits"] <= 4
        assert row["evaluations"] > 0


@pytest.mark.parametrize("name", ["momentum of prices", "momentum of logarithms"])
def test_an_arm_of_pq_has_another_controller(scripts, name):
    import controller
    import parts

    from diffusers_pqcad.compression import progressive

    kinds = {"momentum of prices": controller.PriceController, "momentum of logarithms": controller.LogController}
    with parts.ARMS[name].context():
        made = progressive.SensitivityController({"a": 1}, (8, 4), 0.5, changes={}, beta=0.7)
    assert type(made) is kinds[name]
    assert (made.trust, made.beta) == (0.5, 0.7)


def test_the_solver_finds_the_smallest_sum_of_errors(scripts):
    import itertools

    import controller

    generator = torch.Generator().manual_seed(0)
    num_weights, widths = {"a": 30, "b": 20, "c": 50, "d": 7}, (8, 4, 2)
    for budget in (2.0, 3.1, 5.0, 8.0):
        errors = {
            (name, bits): torch.rand(1, generator=generator).item() * 1e-6 * 4.0**-bits
            for name in num_weights
            for bits in widths
        }
        solver = controller.Solver(num_weights, widths)
        solver.solve(errors, budget)
        allowed = [
            sum(errors[key] for key in zip(num_weights, bits, strict=True))
            for bits in itertools.product(widths, repeat=4)
            if sum(n * b for n, b in zip(num_weights.values(), bits, strict=True)) <= budget * 107 + 1e-9
        ]
        assert solver.average_bits() <= budget + 1e-9
        assert sum(errors[key] for key in solver.bits.items()) == pytest.approx(min(allowed))


@pytest.mark.slow
def test_rates(scripts, monkeypatch):
    import rates

    monkeypatch.setattr(rates, "RECOVERY", {"none": rates.Arm(0.0, updates=0), "step": rates.Arm(1e-3, updates=1)})
    students = {
        "latents": rates.Arm(1e-3, rates.without_scales, updates=1, weight="snr"),
        "floats": rates.Arm(1e-3, rates.float_groups, updates=1, num_trajectories=4, weight="huber"),
        "quantized": rates.Arm(1e-3, rates.quantized_and_others_at(1e-5), updates=1),
        "flat": rates.Arm(1e-5, rates.one_rate, updates=1, teacher="fp", weight="early"),
    }
    monkeypatch.setattr(rates, "ARMS", {"recovery": rates.RECOVERY, "distillation": students})
    monkeypatch.setattr(
        rates,
        "PQ",
        {
            "rounds_per_stage": 1,
            "reconstruction": rates.ReconstructionConfig(iterations=0),
            "reconstruction_samples": 8,
        },
    )
    rows = scripts("rates", "--subjects", "digits-epsilon", "--seeds", "0")
    assert sorted((row["task"], row["arm"]) for row in rows) == [
        ("distillation", "flat"), ("distillation", "floats"),
        ("distillation", "full precision, half the steps"), ("distillation", "latents"), ("distillation", "quantized"),
        ("recovery", "none"), ("recovery", "step"),
    ]  # fmt: skip
    assert all(row["error_after"] <= row["error_before"] for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "arms"), [("sd", ["float + LoRA", "quantized base, repaired", "lora"]), ("sd3", [])])
def test_lora(scripts, monkeypatch, tmp_path, name, arms):
    import lora

    quick = {"rounds_per_stage": 1, "reconstruction_samples": 8, "price_batch_size": 2}
    monkeypatch.setattr(lora, "PQ", quick | {"reconstruction": ReconstructionConfig(iterations=0)})
    monkeypatch.setattr(lora, "NUM_STEPS", 4)
    PIPELINES[name].build().save_pretrained(tmp_path / name)
    (tmp_path / name / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    given = {
        "max_train_steps": 2,
        "train_batch_size": 2,
        "lora_updates": 2,
        "num_trajectories": 6,
        "seeds": 3,
        "rank": 2,
    }
    arguments = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    arguments += ["--teacher", str(tmp_path / name), "--work_dir", str(tmp_path / "work")]
    rows = scripts("lora", *arguments, *(["--arms", *arms] if arms else []))
    assert {row["arm"] for row in rows} == set(arms or [*lora.REPAIR, "all", "scales", "lora"])
    for row in rows:
        assert row["num_steps"] == (1 if row["task"] == "repair" else 2)
        assert ("seconds" in row) == ("grown_bytes" in row) == (row["task"] == "trainable" or "repaired" in row["arm"])
        assert ("mean" in row) == (row["arm"] != "float + LoRA")
        assert ("teacher_mean" in row) == (row["task"] == "repair")
    found = [tuple(row["images"]) for row in rows if "images" in row]
    assert len(set(found)) > len(found) // 2  # rows are of other models
    assert all(len(images) == 2 for images in found)


@pytest.mark.slow
def test_parts(scripts, monkeypatch):
    import parts

    monkeypatch.setattr(parts, "RECONSTRUCTION", {"iterations": 1, "batch_size": 2})
    little = {"rounds_per_stage": 1, "reconstruction_samples": 8, "price_batch_size": 2}
    chosen = {
        name: dataclasses.replace(arm, progressive=arm.progressive | little)
        for name, arm in parts.ARMS.items()
        if name in ("PQ", "one width", "one stage", "reconstruction at 3e-4", "steps 11 to 15 double")
        or name in ("momentum of prices", "momentum of logarithms")
    }
    monkeypatch.setattr(parts, "ARMS", chosen)
    rows = {row["arm"]: row for row in scripts("parts", "--subjects", "digits-epsilon", "--seeds", "0")}
    assert set(rows) == set(chosen)
    assert rows["PQ"]["stages"] == 2
    assert rows["one stage"]["stages"] == rows["one width"]["stages"] == 1
    assert set(rows["PQ"]["activations"]) == set(parts.ACTIVATIONS) - {"static"}
    assert rows["PQ"]["activations"]["float"] != rows["PQ"]["activations"]["of each call"]
    assert not rows["one width"]["activations"]
    assert rows["steps 11 to 15 double"]["images"] != rows["PQ"]["images"]
    assert rows["steps 11 to 15 double"]["evaluations"] > 0
    assert rows["momentum of logarithms"]["rounds"] > 0


def test_the_third_quarter_of_the_steps_counts_double(scripts, tiny_pipeline):
    import parts
    import subjects

    calibration = subjects.calibration_set(tiny_pipeline, 0, 4)
    before = calibration.gains().square()
    with parts.third_quarter_counts_double():
        found = calibration.gains().square() / before
    torch.testing.assert_close(found, torch.tensor([1.0] * 10 + [2.0] * 5 + [1.0] * 5))
    assert torch.equal(calibration.gains().square(), before)


def test_evaluations_are_counted_by_images_and_gradients(scripts, tiny_unet):
    from subjects import counted_evaluations

    state = torch.randn(3, tiny_unet.config.in_channels, 8, 8)
    with counted_evaluations() as evaluations:
        copy.deepcopy(tiny_unet)(state, 5)
        assert evaluations() == 9  # there and back
        with torch.no_grad():
            tiny_unet(state[:2], 5)
    tiny_unet(state, 5)  # behind the block
    assert evaluations() == 11


def test_the_step_in_which_an_image_leaves(scripts):
    """Image 1 leaves in step 2 for good; image 3 is far off in step 0 and comes back."""
    import parts

    generator = torch.Generator().manual_seed(0)
    wanted = torch.randn(4, 5, 1, 8, 8, generator=generator)
    found = wanted + 1e-3
    found[2:, 1] += 1
    found[0, 3] += 1
    assert parts.steps_of_departure(wanted, found) == [2]


def test_a_row_says_how_many_images_ended_elsewhere(scripts):
    scripts("widths", "--subjects", "digits", "--arms", "one width", "--bits", "8")
    import subjects

    wanted = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = wanted.clone()
    found[0] = -found[0]
    found[1:] += 1e-3
    quality = subjects.fidelity(wanted, found)
    assert quality["below_15"] == 0.25
    assert quality["mean"] == pytest.approx(
        10 * torch.log10(wanted.var(correction=0) / (wanted - found).square().mean()).item(), abs=1e-3
    )
    assert quality["median"] == pytest.approx(sorted(quality["images"])[1], abs=0.01)  # the lower of two


@pytest.mark.slow
def test_sensitivity_and_the_tables_of_all(scripts, tmp_path):
    rows = scripts("sensitivity", "--subjects", "digits")
    (row,) = rows
    assert {"name", "num_weights", "W4", "W8", "A8"} == set(row["layers"][0])
    assert all(layer["W4"] > layer["W8"] for layer in row["layers"])
    import table

    results = table.RESULTS
    text = table.document(results)
    assert text == (results.parent / "method.md").read_text()  # written anew after each new row
    for title in ("Where rounding hurts", "Loading without data", "The controller"):
        assert f"## {title}" in text
    assert "| digits | outermost |" in table.sensitivity_table(rows)


def test_end_to_end_keeps_what_a_run_came_to(scripts, tiny_pipeline, tmp_path, monkeypatch):
    import end_to_end

    pieces = [end_to_end.command(f"emoji{piece}-w4a8", tmp_path) for piece in ("", "-widths")]
    asked = [command[command.index("--only_ablations") + 1 :] for command in pieces]
    assert sorted(name for names in asked for name in names) == sorted(ABLATIONS)  # each in one piece, none twice
    command = end_to_end.command("fashion-mnist-w3a8", tmp_path, ("--num_threads", "1"))
    assert command[-4:] == ["--weight_bits", "3", "--num_threads", "1"]
    assert Path(command[3]) == ROOT / "examples" / "models" / "fashion-mnist"

    tiny_pipeline.save_pretrained(tmp_path / "models" / "emoji")
    monkeypatch.setattr(end_to_end, "MODELS", tmp_path / "models")
    folders = ["--work_dir", str(tmp_path / "work"), "--results_dir", str(tmp_path / "results")]
    settings = ["--preset", "smoke", "--reconstruction_iterations", "0", "--num_threads", "1"]
    end_to_end.main(["--runs", "emoji-w3a8", *folders, *settings])
    kept = tmp_path / "results" / "emoji-w3a8"
    assert {str(path.relative_to(kept)) for path in kept.rglob("*.*")} == set(end_to_end.KEPT)
    assert json.loads((kept / "metrics.json").read_text())["settings"]["weight_bits"] == 3.0


def test_intervals_and_pairs(scripts):
    import table

    low, high = table.interval([1.0, 2.0, 3.0, 4.0])
    assert 1 <= low < 2.5 < high <= 4
    assert table.interval([2.0]) == (2.0, 2.0)
    base = {"subject": "digits", "budget": 4.0, "images_per_price": 2, "evaluations": 10}
    rows = [base | {"seed": seed, "arm": arm, "mean": mean, "median": mean} for seed, arm, mean in (
        (0, "no momentum", 10.0), (1, "no momentum", 20.0), (0, "momentum", 11.0), (1, "momentum", 21.0))]  # fmt: skip
    assert (
        "| momentum | 2 | 10 | 16.0 / 16.0 | +1.00 (+1.00 to +1.00) | +1.00 (+1.00 to +1.00) |"
        in table.controller_table(rows)
    )


def test_the_tables_of_adapters(scripts):
    import table

    start = {"subject": "emoji", "arm": "quantized base + same LoRA", "seed": 1, "num_steps": 5, "images": [9.0, 11.0]}
    start |= {"mean": 10.0, "median": 10.0, "teacher_mean": 8.0, "teacher_median": 9.0}
    better = start | {"arm": "quantized base, repaired", "images": [19.0, 21.0], "mean": 20.0, "median": 20.0}
    better |= {"seconds": 90.0, "grown_bytes": 5_000_000}
    whole = {key: value for key, value in start.items() if key not in ("images", "mean", "median")}
    text = table.repair_table([start, better, whole | {"arm": "float + LoRA"}])
    assert [line.split(" | ", 2)[1:] for line in text.splitlines()[2:]] == [
        ["float + LoRA", "1 | 5 | (reference) |  |  | 8.0 / 9.0 |  |  |"],
        ["quantized base + same LoRA", "1 | 5 | 10.0 / 10.0 |  |  | 8.0 / 9.0 |  |  |"],
        [
            "quantized base, repaired",
            "1 | 5 | 20.0 / 20.0 | +10.0 (+10.0 to +10.0) | 10 % | 8.0 / 9.0 | 1.5 | 5 MB |",
        ],
    ]
    rows = [
        better | {"arm": arm, "images": [value + by for value in (9.0, 11.0)]} for arm, by in (("all", 0), ("lora", 1))
    ]
    assert "| emoji | lora | 1 | 20.0 / 20.0 | +1.0 (+1.0 to +1.0) | +1.0 (+1.0 to +1.0) | 1.5 | 5 MB |" in (
        table.trainable_table(rows)
    )


def test_gains_are_paired_by_seed_and_image(scripts):
    """Other images, or other seeds, cancel: only what an arm changes counts."""
    import table

    def rows(arm: str, offset: float, seeds: tuple[int, ...]) -> list[dict]:
        images = {seed: (20 + 10 * torch.rand(101, generator=torch.Generator().manual_seed(seed))) for seed in seeds}
        return [
            {
                "subject": "digits", "arm": arm, "seed": seed, "images": (values + offset).tolist(), "seconds": 90.0,
                "evaluations": 2_400, "mean": 20.0 + offset, "median": 25.0 + offset, "below_15": 0.0,
            }
            for seed, values in images.items()
        ]  # fmt: skip

    base, better = rows("none", 0.0, (0, 1, 2)), rows("good", 2.0, (2, 1, 0))
    assert table.gains(better, base) == ("+2.0 (+2.0 to +2.0)", "+2.0 (+2.0 to +2.0)")
    assert table.gains(rows("good", 2.0, (1, 7)), base)[0].startswith("+2.0 ")  # seed 7 has no partner
    assert table.gains(rows("good", 2.0, (7,)), base) == ("", "")
    mixed = [row | {"images": [value + 4 * (row["seed"] == 1) for value in row["images"]]} for row in base]
    low, high = table.gains(mixed, base)[1].split("(")[1].rstrip(")").split(" to ")
    assert float(low) < 4 / 3 < float(high)
    text = table.arms_table(base + better, "none")
    assert (
        "| digits | good | 3 | 22.0 / 27.0 | +2.0 (+2.0 to +2.0) | +2.0 (+2.0 to +2.0) | 0.0 % |  | 2 k | 1.5 |"
        in text
    )
    assert text.index("| none |") < text.index("| good |")
