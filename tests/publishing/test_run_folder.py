"""Specification of a run's folder: whose it is, what is kept in it, what a recipe says."""

import pytest
import yaml

from diffusers_pqcad.publishing.run_folder import (
    Site,
    cached,
    claim_folder,
    load_json,
    note_training,
    noted_trainings,
    recipe_of,
    save_json,
)
from diffusers_pqcad.publishing.settings import flat, settings_of

pytestmark = pytest.mark.fast

# What `settings.yaml` held when the script had fewer settings.
FIRST_SETTINGS = (
    "pretrained_model_name_or_path", "output_dir", "weight_bits", "activation_bits", "num_inference_steps",
    "num_trajectories", "rounds_per_stage", "price_batch_size", "reconstruction_iterations",
    "reconstruction_batch_size", "reconstruction_samples", "max_train_steps", "train_batch_size", "step_rate",
    "float_rate", "evaluation_steps", "num_images", "num_latency_rounds", "ablations", "extractor", "train_device",
    "num_threads", "seed", "push_to_hub", "hub_model_id", "hub_private_repo", "license",
)  # fmt: skip


def test_what_is_made_is_made_once_and_read_back(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"a": (1, 2)}

    path = tmp_path / "rows" / "x.json"
    assert cached(path, make, save_json, load_json) == {"a": [1, 2]}
    assert cached(path, make, save_json, load_json) == {"a": [1, 2]}
    assert made == [1]
    assert [each.name for each in path.parent.iterdir()] == ["x.json"]


def test_nothing_is_left_of_what_failed(tmp_path):
    with pytest.raises(ZeroDivisionError):
        cached(tmp_path / "x.json", lambda: 1 / 0, save_json, load_json)
    assert not (tmp_path / "x.json").exists()


def test_the_same_settings_go_on_and_others_are_refused_by_name(tmp_path):
    folder = tmp_path / "run"
    claim_folder(folder, settings_of({}))
    claim_folder(folder, settings_of({"num_threads": 3, "ablations": True}))
    assert yaml.safe_load((folder / "state" / "settings.yaml").read_text()) == flat(
        settings_of({"num_threads": 3, "ablations": True})
    )
    before = {path: path.read_text() for path in folder.rglob("*.yaml")}
    with pytest.raises(ValueError, match=r"other settings.*'beta': \(0\.9, 0\.5\)"):
        claim_folder(folder, settings_of({"beta": 0.5}))
    assert {path: path.read_text() for path in folder.rglob("*.yaml")} == before


def begun(folder, **changes):
    values = {name: value for name, value in flat(settings_of({})).items() if name in FIRST_SETTINGS}
    (folder / "state").mkdir(parents=True)
    (folder / "state" / "settings.yaml").write_text(yaml.safe_dump(values | changes))


def test_a_folder_that_was_begun_with_fewer_settings_has_the_defaults_of_the_others(tmp_path):
    assert set(FIRST_SETTINGS) < set(flat(settings_of({})))
    begun(tmp_path / "old")
    with pytest.raises(ValueError, match="ema_decay"):
        claim_folder(tmp_path / "old", settings_of({"ema_decay": 0.5}))
    claim_folder(tmp_path / "old", settings_of({}))


def test_a_folder_with_settings_that_are_gone_is_refused(tmp_path):
    begun(tmp_path / "old", recovery_steps=3)
    with pytest.raises(ValueError, match=r"'recovery_steps': \(3, None\)"):
        claim_folder(tmp_path / "old", settings_of({}))


def with_prompts(folder, name, *prompts):
    claim_folder(folder, settings_of({"prompts_file": str(folder.parent / name)}), prompts)


def test_a_folder_keeps_a_copy_of_its_prompts(tmp_path):
    folder = tmp_path / "run"
    with_prompts(folder, "a.txt", "a cat", "a dog")
    assert (folder / "prompts.txt").read_text() == "a cat\na dog\n"
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    assert not {"prompts_file", "prompts_sha256"} & set(recipe)
    (folder / "prompts.txt").unlink()
    with_prompts(folder, "b.txt", "a cat", "a dog")  # from another file
    assert (folder / "prompts.txt").exists()


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        (
            ("a cat", "a dog"),
            ("a dog", "a cat"),
            r"^prompts_file: .*begun with the prompts in .*run/prompts\.txt, .*others",
        ),
        (("a cat",), (), "^prompts_file: .*begun with the prompts in .*prompts.txt, and these are none"),
        ((), ("a cat",), "^prompts_file: .*begun with no prompts, and these are others"),
    ],
)
def test_other_prompts_are_refused_from_any_file(tmp_path, before, now, message):
    folder = tmp_path / "run"
    with_prompts(folder, "a.txt", *before)
    files = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        with_prompts(folder, "a.txt", *now)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == files


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="is not empty"):
        claim_folder(tmp_path, settings_of({}))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_recipe_names_a_teacher_of_the_hub_and_no_place_of_this_computer(tmp_path):
    places = {"output_dir": "out", "extractor": "x", "lora_weights": "y"}
    values = flat(settings_of(places | {"pretrained_model_name_or_path": str(tmp_path)}))
    recipe = recipe_of(values)
    assert recipe["num_images"] == values["num_images"]
    assert not {*places, "pretrained_model_name_or_path", "num_threads"} & set(recipe)
    assert recipe_of(values | {"pretrained_model_name_or_path": "some/one"})["pretrained_model_name_or_path"] == (
        "some/one"
    )


def test_trainings_are_noted_by_place(tmp_path):
    for device in ("cpu", "cpu", "cuda"):
        note_training(Site(tmp_path, device, False), "pq")
    found = noted_trainings(Site(tmp_path, "cpu", False))
    assert [place["device"] for place in found["pq"]] == ["cpu", "cuda"]


@pytest.mark.parametrize(("progress", "text"), [(True, "\n== saving\n"), (False, "")])
def test_headings_are_a_part_of_the_progress(tmp_path, capsys, progress, text):
    Site(tmp_path, "cpu", progress).say("saving")
    assert capsys.readouterr().out == text


def test_a_folder_of_an_older_version_is_refused(tmp_path):
    settings = settings_of({})
    claim_folder(tmp_path, settings)
    claim_folder(tmp_path, settings)  # the same run goes on
    (tmp_path / "state" / "calibration.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="begun by an older version"):
        claim_folder(tmp_path, settings)
