"""What `compress` takes for a teacher, and what it makes of its scheduler."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, LCMScheduler, StableDiffusionPipeline
from pipelines import PIPELINES

from diffusers_pqcad import PQCADConfig
from diffusers_pqcad.compression import extras
from diffusers_pqcad.compression.calibration import scheduler_settings
from diffusers_pqcad.compression.extras import MissingExtraError
from diffusers_pqcad.compression.recording import plan_of, restored
from diffusers_pqcad.evaluation.features import ClassifierExtractor, SmallClassifier
from diffusers_pqcad.publishing.compress import compress
from diffusers_pqcad.publishing.pipelines import (
    TeacherSource,
    can_fold,
    check_teacher,
    extractor_of,
    inputs_of_run,
    load_teacher,
    loading_arguments,
    own_num_inference_steps,
    prompt_labels_of,
    prompts_from,
    prompts_of,
    source_of,
)
from diffusers_pqcad.publishing.settings import CompressConfig


def test_another_scheduler_of_the_kind_is_converted(tiny_unet, tmp_path, caplog):
    DDPMPipeline(tiny_unet, DDPMScheduler(prediction_type="v_prediction")).save_pretrained(tmp_path)
    teacher, as_you_run_it = load_teacher(str(tmp_path))
    scheduler = teacher.scheduler
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.config.prediction_type == "v_prediction"
    assert (scheduler.config.timestep_spacing, scheduler.config.clip_sample) == ("trailing", False)
    assert "DDPMScheduler is replaced by a DDIMScheduler" in caplog.text
    assert type(as_you_run_it.scheduler).__name__ == "DDPMScheduler"
    assert as_you_run_it.unet is teacher.unet
    assert own_num_inference_steps(as_you_run_it, CompressConfig()) == 50  # of the 1000 that its call has
    assert own_num_inference_steps(as_you_run_it, CompressConfig(own_num_inference_steps=7)) == 7


def test_a_teacher_that_fits_stays_as_it_is(tiny_pipeline, tmp_path, caplog):
    tiny_pipeline.save_pretrained(tmp_path)
    teacher, as_you_run_it = load_teacher(str(tmp_path))
    assert as_you_run_it is None
    assert scheduler_settings(teacher.scheduler) == scheduler_settings(tiny_pipeline.scheduler)
    assert "scheduler" not in caplog.text
    assert not teacher.unet.training


def test_what_a_pipeline_is_loaded_with_are_its_revision_variant_and_cache(tmp_path):
    assert loading_arguments(CompressConfig()) == {}
    run = CompressConfig("some/one", revision="v2", variant="fp16", cache_dir="here")
    assert loading_arguments(run) == {"revision": "v2", "variant": "fp16", "cache_dir": "here"}
    for path in (str(tmp_path), None):
        with pytest.raises(ValueError, match="^revision: expected a repository of the Hub"):
            loading_arguments(CompressConfig(path, revision="v2"))


def test_a_variant_in_half_precision_is_computed_with_in_float32(tiny_pipeline, tmp_path):
    tiny_pipeline.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(ValueError, match="pretrained_model_name_or_path: .*cannot be loaded"):
        load_teacher(str(tmp_path))
    arguments = loading_arguments(CompressConfig(str(tmp_path), variant="fp16"))
    teacher, _ = load_teacher(str(tmp_path), **arguments)
    assert {parameter.dtype for parameter in teacher.unet.parameters()} == {torch.float32}


def test_a_source_is_a_folder_or_a_repository_or_the_bundled_one(tmp_path, monkeypatch):
    ours = TeacherSource(str(tmp_path / "ours"), "ours (bundled)", "features", "mit")
    second = TeacherSource(str(tmp_path / "second"), "second (bundled)", defaults={"guidance_scale": 3.0})
    bundled = (ours, second)
    assert source_of(CompressConfig(), bundled) == ours
    assert source_of(CompressConfig(pretrained_model_name_or_path=f"{tmp_path}/second"), bundled) == second
    assert source_of(CompressConfig(pretrained_model_name_or_path="a/b"), bundled) == TeacherSource("a/b", "a/b")
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert source_of(CompressConfig(pretrained_model_name_or_path="ours"), bundled) == ours
    assert source_of(CompressConfig(pretrained_model_name_or_path="./mine")).name == "mine"
    source = source_of(CompressConfig(extractor="other", license="apache-2.0"), bundled)
    assert (source.path, source.extractor, source.license) == (ours.path, "other", "apache-2.0")
    with pytest.raises(ValueError, match="pretrained_model_name_or_path: expected a folder or a repository"):
        source_of(CompressConfig())


@pytest.mark.parametrize(
    ("num_inference_steps", "settings", "message"),
    [
        (6, {}, "divide"),
        (4, {"modules_to_not_convert": ["nowhere"]}, "modules_to_not_convert: 'nowhere' matches none"),
        (4, {"group_size": 7}, "group_size=7 must divide"),
    ],
)
def test_settings_that_do_not_fit_the_teacher_are_refused(tiny_pipeline, num_inference_steps, settings, message):
    check_teacher(tiny_pipeline, CompressConfig(num_inference_steps=4), PQCADConfig(weight_bits=4))
    run = CompressConfig(num_inference_steps=num_inference_steps)
    with pytest.raises(ValueError, match=message):
        check_teacher(tiny_pipeline, run, PQCADConfig(weight_bits=4, **settings))


class Guiding(StableDiffusionPipeline):
    """A pipeline that guides by two branches whatever its scale."""

    @property
    def do_classifier_free_guidance(self):
        return True


@pytest.mark.parametrize(("name", "folds"), [("sd", True), ("sd3", True), ("ddim", False), ("always", False)])
def test_a_model_is_folded_where_its_pipeline_would_call_it_so(tmp_path, name, folds):
    about = PIPELINES["sd" if name == "always" else name]
    pipeline = about.build()
    if name == "always":
        pipeline = Guiding(**pipeline.components, requires_safety_checker=False)
    run = run_with(tmp_path / "a.txt", ["a cat"], num_inference_steps=4) if about.inputs[0] else CompressConfig()
    run = replace(run, num_inference_steps=4, guidance_scale=5.0 if about.inputs[0] else None)
    with restored(pipeline.scheduler):
        plan = plan_of(pipeline, about.inputs[0], 0, 4, about.arguments)
    if plan.branches == (2,):
        plan = replace(plan, weights=(-4.0, 5.0))  # which recording finds
    assert can_fold(pipeline, run, plan) == folds


def test_a_folder_without_an_extractor_is_named_by_its_setting(tmp_path):
    assert extractor_of(TeacherSource("a/b", "a/b")) is None
    with pytest.raises(ValueError, match=r"^extractor: .*nothing.config\.json: not found"):
        extractor_of(TeacherSource("a/b", "a/b", extractor=str(tmp_path / "nothing")))


LABELS = {"a fig": {"fruit": "fig"}, "a plum": {"fruit": "plum"}}


def test_what_prompts_ask_for_is_in_the_folder_of_a_teacher(tmp_path, caplog):
    source, measured = TeacherSource(str(tmp_path), "teacher"), [{"prompt": "a fig"}, {"prompt": "a plum"}]
    extractor = classifier(labels={"fruit": ["fig", "plum"]})
    assert prompt_labels_of(source, extractor, measured) is None  # there is no file
    (tmp_path / "prompt_labels.json").write_text(json.dumps(LABELS))
    assert prompt_labels_of(source, extractor, measured) == LABELS
    assert prompt_labels_of(source, None, measured) is None
    assert prompt_labels_of(source, classifier(labels=None), measured) is None
    assert "not measured" not in caplog.text
    assert prompt_labels_of(source, extractor, [*measured, {"prompt": "a pear"}]) is None
    assert "Prompt accuracy is not measured" in caplog.text
    assert "no entry for 1 of the 3 prompts" in caplog.text


def classifier(labels):
    nothing = torch.zeros(0)
    reference = {"reference_mean": nothing, "reference_covariance": nothing, "reference_features": nothing}
    network = SmallClassifier(image_size=8, channels=(4, 4, 4), num_features=4, num_classes=2)
    return ClassifierExtractor(network, labels, name="fruit", sha256="", reference_sha256="", **reference)


def run_with(path, lines, **settings):
    path.write_text("\n".join(lines))
    return CompressConfig(prompts_file=str(path), **settings)


def test_the_first_prompts_are_recorded_and_the_others_measured(tmp_path):
    lines = ["a cat", "", "  a dog ", "a river", "a hat", "a boat"]
    run = run_with(tmp_path / "a.txt", lines, num_trajectories=4)
    assert prompts_of(run) == ["a cat", "a dog", "a river", "a hat", "a boat"]
    recorded, measured = inputs_of_run(run)
    assert [item["prompt"] for item in recorded] == prompts_of(run)[:4]
    assert measured == [{"prompt": "a boat"}]


def test_too_few_prompts_are_recorded_and_measured(tmp_path):
    run = run_with(tmp_path / "a.txt", ["a cat", "a dog"], num_trajectories=4, negative_prompt="blur")
    recorded, measured = inputs_of_run(run)
    assert recorded == measured == [{"prompt": p, "negative_prompt": "blur"} for p in ("a cat", "a dog")]
    recorded, measured = inputs_of_run(CompressConfig(class_labels=[3, 5]))
    assert recorded == measured == [{"class_labels": 3}, {"class_labels": 5}]
    assert inputs_of_run(CompressConfig()) == (None, None)
    assert prompts_of(CompressConfig()) == []


def data_set(folder, **columns):
    """Return the settings of a data set that `datasets` reads from a folder, with these columns."""
    folder.mkdir(exist_ok=True)
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    (folder / "train.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return {"dataset_name": str(folder), "prompt_column": next(iter(columns))}


def test_a_seeded_sample_of_a_data_set_is_recorded_and_measured(tmp_path):
    texts = [f"prompt {index}" for index in range(30)]
    of_set = data_set(tmp_path / "set", caption=texts, label=list(range(30)))
    run = CompressConfig(num_trajectories=4, num_images=5, **of_set)
    prompts = prompts_of(run)
    assert len(prompts) == len(set(prompts)) == 9
    assert set(prompts) < set(texts)
    assert prompts == prompts_of(run) != texts[:9]
    assert prompts != prompts_of(replace(run, seed=7))
    recorded, measured = inputs_of_run(run, prompts)
    assert [item["prompt"] for item in (*recorded, *measured)] == prompts
    assert len(recorded) == 4


def test_prompts_of_a_data_set_are_different_lines(tmp_path):
    texts = [" a\n cat ", "a cat", "", "a dog", None, "a dog"]
    run = CompressConfig(num_trajectories=4, **data_set(tmp_path / "set", text=texts))
    assert sorted(prompts_of(run)) == ["a cat", "a dog"]


@pytest.mark.parametrize(
    ("columns", "settings", "message"),
    [
        ({"text": ["", " "]}, {}, "^dataset_name: .* has no prompt in its column 'text'"),
        ({"text": ["a"]}, {"prompt_column": "prompt"}, r"^prompt_column: .*'prompt' .*none; there are \['text'\]"),
        ({"text": [["a", "b"]]}, {}, "^prompt_column: expected a column 'text' of texts in .*, got a list"),
        ({"text": ["a"]}, {"dataset_config_name": "fr"}, "^dataset_name: .* cannot be loaded .*fr"),
    ],
)
def test_a_data_set_without_prompts_is_refused(tmp_path, columns, settings, message):
    run = CompressConfig(**data_set(tmp_path / "set", **columns) | settings)
    with pytest.raises(ValueError, match=message):
        prompts_of(run)


def test_where_prompts_come_from_names_no_place_of_this_computer(tmp_path):
    assert prompts_from(CompressConfig()) == {"kind": "teacher"}
    assert prompts_from(CompressConfig(prompts_file=str(tmp_path / "a.txt"))) == {"kind": "file"}
    of_folder = CompressConfig(**data_set(tmp_path / "set", caption=["a cat"]))
    found = {"kind": "dataset", "dataset": None, "configuration": None, "column": "caption"}
    assert prompts_from(of_folder) == found
    of_hub = replace(of_folder, dataset_name="me/texts", dataset_config_name="fr")
    assert prompts_from(of_hub) == found | {"dataset": "me/texts", "configuration": "fr"}


def test_the_prompts_in_the_folder_of_a_teacher_are_used_where_a_run_names_none(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    assert prompts_of(CompressConfig(), str(tmp_path)) == ["a cat", "a dog"]
    assert prompts_of(run_with(tmp_path / "mine.txt", ["a boat"]), str(tmp_path)) == ["a boat"]
    assert prompts_of(CompressConfig(class_labels=[1]), str(tmp_path)) == []
    assert prompts_of(CompressConfig(), str(tmp_path / "elsewhere")) == []
    assert prompts_of(CompressConfig(), "a/repository") == []


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match=r"^prompts_file: .*a\.txt cannot be read as text"):
        prompts_of(CompressConfig(prompts_file=str(tmp_path / "a.txt")))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Pipelines by name, saved once."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name in ("ddim", "sd", "flux", "wan"):
        PIPELINES[name].build().save_pretrained(folder / name)
    PIPELINES["sd"].build().save_pretrained(folder / "lcm")
    DiffusionPipeline.from_pretrained(folder / "lcm", scheduler=LCMScheduler(steps_offset=1)).save_pretrained(
        folder / "lcm"
    )
    (folder / "prompts.txt").write_text("red cat\nblue dog\n")
    (folder / "empty.txt").write_text("\n \n")
    return folder


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("sd", {"prompts_file": "nowhere.txt"}, "^prompts_file: there is no file '.*nowhere.txt'"),
        ("sd", {"prompts_file": "empty.txt"}, "^prompts_file: .*empty.txt has no prompt"),
        ("ddim", {"prompts_file": "prompts.txt"}, "^prompt: DDIMPipeline does not take it"),
        ("sd", {}, "^StableDiffusionPipeline: what is it called with"),
        ("sd", {"class_labels": [1]}, "^class_labels: StableDiffusionPipeline does not take it"),
        ("sd", {"negative_prompt": "x"}, "^negative_prompt: it goes with prompts; give prompts_file or dataset_name"),
        ("sd", {"dataset_name": "/nowhere/at/all"}, "^dataset_name: '/nowhere/at/all' cannot be loaded"),
        ("ddim", {"guidance_scale": 5.0}, "^guidance_scale: DDIMPipeline does not take it"),
        ("flux", {"prompts_file": "prompts.txt", "negative_prompt": "x", "extractor": "no"}, "^extractor: no/"),
        ("wan", {"prompts_file": "prompts.txt"}, "^WanPipeline: it does not take `sigmas`"),
        ("lcm", {"prompts_file": "prompts.txt"}, "^scheduler: .*LCMScheduler: its model was distilled"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_before_anything_is_written(folders, tmp_path, name, settings, message):
    if "prompts_file" in settings:
        settings = settings | {"prompts_file": str(folders / settings["prompts_file"])}
    run = CompressConfig(str(folders / name), output_dir=str(tmp_path / "out"), num_threads=1, **settings)
    with pytest.raises(ValueError, match=message):
        compress(run, progress=False)
    assert not (tmp_path / "out").exists()


def test_without_the_package_for_pictures_nothing_begins(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(extras, "_is_installed", lambda name: name != "torchmetrics")
    run = CompressConfig(str(folders / "sd"), output_dir=str(tmp_path / "out"), num_threads=1)
    with pytest.raises(MissingExtraError, match="torchmetrics: not installed"):
        compress(replace(run, prompts_file=str(folders / "prompts.txt")), progress=False)
    assert not (tmp_path / "out").exists()
