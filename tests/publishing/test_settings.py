"""Specification of the settings: one default for each, in the dataclass that it belongs to, and a flag with help."""

import dataclasses
import math
from typing import Any

import pytest
import yaml
from transformers import HfArgumentParser

from diffusers_pqcad import DistillConfig, PQCADConfig, ProgressiveConfig
from diffusers_pqcad.compression.progressive import WEIGHT_BITS
from diffusers_pqcad.compression.reconstruction import ReconstructionConfig
from diffusers_pqcad.publishing.settings import (
    PARTS,
    PRESETS,
    CompressConfig,
    complete,
    flags_of,
    flat,
    parse_settings,
    settings_of,
)

pytestmark = pytest.mark.fast

NO_FLAGS = {
    "seed": (ProgressiveConfig, DistillConfig),
    "mixed_precision": (ProgressiveConfig, DistillConfig),
    "reconstruction": (ProgressiveConfig,),
}


def test_every_field_is_a_flag_with_the_default_of_its_dataclass():
    values = flat(parse_settings([]))
    for kind, prefix in (
        (CompressConfig, ""),
        (ProgressiveConfig, ""),
        (ReconstructionConfig, "reconstruction_"),
        (DistillConfig, ""),
    ):
        for item in dataclasses.fields(kind):
            if kind not in NO_FLAGS.get(item.name, ()):
                assert values.pop(prefix + item.name) == item.default, item.name
    assert values.pop("weight_bits") == WEIGHT_BITS
    default = PQCADConfig()
    assert values == {
        "activation_bits": default.activation_bits,
        "bit_choices": list(default.bit_choices),
        "group_size": default.group_size,
        "modules_to_not_convert": default.modules_to_not_convert,
    }


def test_no_arguments_are_the_defaults_of_the_package():
    run, quantization, progressive, distillation = parse_settings([])
    assert (run, progressive, distillation) == (CompressConfig(), ProgressiveConfig(), DistillConfig())
    assert quantization == PQCADConfig(weight_bits=WEIGHT_BITS)
    assert parse_settings([]) == settings_of({}) == complete(CompressConfig())


def test_every_flag_has_a_help_text_that_says_its_default(capsys):
    for part in PARTS:
        parser = HfArgumentParser([flags_of(part)], prog=part.title)
        assert [action.dest for action in parser._actions if not action.help] == []
    with pytest.raises(SystemExit) as ended:
        parse_settings(["--help"], "What it does.")
    assert ended.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "What it does." in text
    assert "0: PQ without momentum (default: 0.9)" in text
    assert "--signal {output,weight}" in text
    assert "--no_calibration" in text
    assert "(default: 4.0)" in text
    assert text.count("--preset {default,full,smoke} set of defaults") == 1
    assert all(part.title in text for part in PARTS)


def test_the_seed_is_that_of_all_parts():
    settings = parse_settings(["--seed", "7"])
    assert (settings.run.seed, settings.progressive.seed, settings.distillation.seed) == (7, 7, 7)
    settings = complete(CompressConfig(seed=8), None, ProgressiveConfig(seed=9, beta=0.5))
    assert (settings.progressive.seed, settings.progressive.beta, settings.distillation.seed) == (8, 0.5, 8)


def test_the_precision_is_that_of_all_parts():
    settings = parse_settings(["--mixed_precision", "bf16"])
    assert {part.mixed_precision for part in (settings.run, settings.progressive, settings.distillation)} == {"bf16"}
    with pytest.raises(ValueError, match=r"mixed_precision: expected 'no' or 'bf16'"):
        CompressConfig(mixed_precision="fp16")


def test_names_that_two_dataclasses_have_are_two_flags():
    flags = ("--step_rate", "0.5", "--reconstruction_step_rate", "0.25", "--reconstruction_batch_size", "3")
    settings = parse_settings([*flags, "--train_batch_size", "5", "--reconstruction_iterations", "2"])
    assert settings.distillation == DistillConfig(step_rate=0.5, train_batch_size=5)
    assert settings.progressive.reconstruction == ReconstructionConfig(step_rate=0.25, batch_size=3, iterations=2)


@pytest.mark.parametrize(
    ("arguments", "part", "name", "value"),
    [
        (("--trust", "inf"), "progressive", "trust", math.inf),
        (("--perturbation-floor", "0.5"), "progressive", "perturbation_floor", 0.5),
        (("--signal", "weight"), "progressive", "signal", "weight"),
        (("--teacher", "fp"), "distillation", "teacher", "fp"),
        (("--calibration", "False"), "distillation", "calibration", False),
        (("--no_calibration",), "distillation", "calibration", False),
        (("--ablations",), "run", "ablations", True),
        (("--ablations", "False", "--preset", "full"), "run", "ablations", False),
        (("--weight_bits", "3.5"), "quantization", "weight_bits", 3.5),
        (("--activation_bits", "7"), "quantization", "activation_bits", 7),
        (("--activation_bits", "0"), "quantization", "activation_bits", None),
        (("--bit_choices", "4", "8"), "quantization", "bit_choices", (8, 4)),
        (("--modules_to_not_convert", "a", "b.*"), "quantization", "modules_to_not_convert", ["a", "b.*"]),
        (("--group_size", "16"), "quantization", "group_size", 16),
        (("--fold_guidance", "False"), "distillation", "fold_guidance", False),
        (("--fold_guidance", "true"), "distillation", "fold_guidance", True),
        (("--num_halvings", "0", "--num_inference_steps", "5"), "run", "num_inference_steps", 5),
        (("--trainable", "lora"), "distillation", "trainable", "lora"),
        (("--rank", "4"), "distillation", "rank", 4),
        (("--lora_alpha", "8"), "distillation", "lora_alpha", 8),
        (("--lora_rate", "0.5"), "distillation", "lora_rate", 0.5),
        (("--target_modules", "to_q", "conv1"), "distillation", "target_modules", ["to_q", "conv1"]),
        (("--lora_weights", "a/folder"), "run", "lora_weights", "a/folder"),
        (("--revision", "v2"), "run", "revision", "v2"),
        (("--allow_tf32",), "run", "allow_tf32", True),
        (("--report_to", "tensorboard"), "run", "report_to", "tensorboard"),
        (("--validation_prompts", "a cat", "a dog"), "run", "validation_prompts", ["a cat", "a dog"]),
        (("--validation_steps", "7"), "run", "validation_steps", 7),
        (("--resume_from_checkpoint", "latest"), "run", "resume_from_checkpoint", "latest"),
        (("--lr_scheduler", "cosine_with_restarts"), "distillation", "lr_scheduler", "cosine_with_restarts"),
        (("--lr_warmup_steps", "0"), "distillation", "lr_warmup_steps", 0),
    ],
)
def test_flags_of_every_type_are_parsed(arguments, part, name, value):
    settings = parse_settings(arguments)
    assert getattr(getattr(settings, part), name) == value
    assert settings_of(flat(settings)) == settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num_images", "1"), "^num_images: expected at least 2, got 1"),
        (("--num_trajectories", "3"), "^num_trajectories: expected at least 4"),
        (("--num_latency_rounds", "0"), "^num_latency_rounds: expected at least 1"),
        (("--num_inference_steps", "0"), "^num_inference_steps: expected at least 2"),
        (("--num_inference_steps", "5"), "^num_inference_steps=5 is odd"),
        (("--num_halvings", "-1"), "^num_halvings: expected at least 0"),
        (("--num_halvings", "3"), "^num_inference_steps=20 cannot be halved 3 times; take a multiple of 8"),
        (("--height", "0"), "^height: expected at least 1, got 0"),
        (("--own_num_inference_steps", "0"), "^own_num_inference_steps: expected at least 1, got 0"),
        (("--prompts_file", "x", "--dataset_name", "y"), "^dataset_name: prompts come from it or from prompts_file"),
        (("--dataset_config_name", "x"), "^dataset_config_name: of which data set"),
        (("--validation_steps", "0"), "^validation_steps: expected at least 1, got 0"),
        (("--checkpointing_steps", "0"), "^checkpointing_steps: expected at least 1, got 0"),
        (("--checkpoints_total_limit", "2"), "^checkpoints_total_limit: .*Give checkpointing_steps, too"),
        (("--lr_warmup_steps", "-1"), "^lr_warmup_steps: expected at least 0"),
        (("--float_steps", "4", "0"), "^float_steps: expected numbers of at least 1"),
        (("--dataset_name", "x", "--class_labels", "1"), "^class_labels: a pipeline takes prompts or classes"),
        (("--prompts_file", "x", "--class_labels", "1"), "^class_labels: a pipeline takes prompts or classes"),
        (("--num_threads", "-1"), "^num_threads: expected at least 0"),
        (("--seed", "-1"), "^seed: expected at least 0"),
        (("--push_to_hub",), "^push_to_hub needs a hub_model_id"),
        (("--rounds_per_stage", "0"), "^rounds_per_stage: expected at least 1"),
        (("--price_batch_size", "0"), "^price_batch_size: expected at least 1"),
        (("--reconstruction_samples", "7"), "^reconstruction_samples: expected at least 8"),
        (("--reconstruction_iterations", "-1"), "^reconstruction_iterations: expected at least 0"),
        (("--reconstruction_batch_size", "0"), "^reconstruction_batch_size: expected at least 1"),
        (("--reconstruction_input_mix", "2"), "^reconstruction_input_mix=2.0"),
        (("--max_train_steps", "0"), "^max_train_steps: expected at least 1"),
        (("--train_batch_size", "0"), "^train_batch_size: expected at least 1"),
        (("--evaluation_steps", "0"), "^evaluation_steps: expected at least 1"),
        (("--step_rate", "-1"), "^step_rate: expected at least 0"),
        (("--beta", "1"), "^beta: "),
        (("--weight_bits", "1"), "^weight_bits: "),
        (("--activation_bits", "5"), "^activation_bits: "),
        (("--bit_choices", "8", "5"), "^bit_choices: "),
        (("--teacher", "none", "--no_calibration"), "^teacher='none' with calibration=False"),
    ],
)
def test_errors_name_the_flag(arguments, message):
    with pytest.raises(ValueError, match=message):
        parse_settings(arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--teacher", "somebody"), "argument --teacher: invalid choice: 'somebody'"),
        (("--report_to", "somebody"), "argument --report_to/--report-to: invalid choice: 'somebody'"),
        (("--lr_scheduler", "steep"), "argument --lr_scheduler/--lr-scheduler: invalid choice: 'steep'"),
        (("--num_images", "many"), "argument --num_images/--num-images: invalid int value: 'many'"),
        (("--weight_bit", "4"), "unrecognized arguments: --weight_bit 4"),
        (("--preset", "none"), "argument --preset: invalid choice: 'none'"),
    ],
)
def test_what_is_no_value_of_a_flag_is_refused_by_the_parser(arguments, message, capsys):
    with pytest.raises(SystemExit):
        parse_settings(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_change_defaults_and_flags_come_last(preset):
    values = flat(parse_settings(["--preset", preset]))
    assert {name: values[name] for name in PRESETS[preset]} == PRESETS[preset]
    assert values == flat(settings_of(PRESETS[preset]))
    assert parse_settings(["--num_images", "11", "--preset", preset]).run.num_images == 11


def written(tmp_path: Any, text: str) -> list[str]:
    (tmp_path / "recipe.yaml").write_text(text)
    return ["--config", str(tmp_path / "recipe.yaml")]


def test_a_recipe_comes_after_the_preset_and_before_the_flags(tmp_path):
    config = written(tmp_path, "weight_bits: 3\nseed: 7\nnum_images: 9\n")
    settings = parse_settings([*config, "--seed", "8", "--preset", "smoke"])
    assert settings.quantization.weight_bits == 3
    assert (settings.run.seed, settings.run.num_images, settings.run.num_trajectories) == (8, 9, 8)
    assert parse_settings(written(tmp_path, "")) == parse_settings([])


def test_what_is_written_is_what_is_read(tmp_path):
    flags = ["--trust", "inf", "--no_calibration", "--activation_bits", "0", "--bit_choices", "8", "4"]
    settings = parse_settings([*flags, "--modules_to_not_convert", "mid_block", "--license", "mit"])
    assert parse_settings(written(tmp_path, yaml.safe_dump(flat(settings)))) == settings
    settings = parse_settings(written(tmp_path, "step_rate: 1e-2\nactivation_bits: null\ncalibration: off\n"))
    assert (settings.distillation.step_rate, settings.distillation.calibration) == (0.01, False)
    assert settings.quantization.activation_bits is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weight_bit: 3", r"recipe\.yaml: unknown settings \['weight_bit'\]"),
        ("reconstruction: {}", r"unknown settings \['reconstruction'\]"),
        ("1: 3", r"unknown settings \[1\]"),
        ("- weight_bits", "expected lines of `setting: value`, got list"),
        ("seed: null", "seed: expected a value, got null"),
        ("bit_choices: 8", "bit_choices: expected a list, got 8"),
        ("reconstruction_iterations: -1", "reconstruction_iterations: expected at least 0, got -1"),
        ("teacher: somebody", "teacher: expected 'quantized'"),
    ],
)
def test_a_recipe_with_anything_else_is_refused(text, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        parse_settings(written(tmp_path, text))


def test_a_recipe_with_a_value_of_another_type_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_settings(written(tmp_path, "seed: [1]"))
    assert "argument --seed: invalid int value: '[1]'" in capsys.readouterr().err


def test_a_recipe_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"--config: there is no file 'nowhere\.yaml'"):
        parse_settings(["--config", "nowhere.yaml"])


def test_settings_of_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"unknown settings \['weight_bit'\]"):
        settings_of({"weight_bit": 3})


@pytest.mark.parametrize("other", [{"method": "fixed"}, {"search_all_modules": True}, {"num_inference_steps": 4}])
def test_a_config_that_no_recipe_could_repeat_is_refused(other):
    with pytest.raises(ValueError, match=next(iter(other))):
        complete(CompressConfig(), PQCADConfig(weight_bits=4, **other))


def test_python_refuses_the_same_names():
    with pytest.raises(ValueError, match="^report_to: expected one of .*'trackio'.*got 'somebody'"):
        CompressConfig(report_to="somebody")
    with pytest.raises(ValueError, match="^lr_scheduler: expected one of .*'cosine'.*got 'steep'"):
        DistillConfig(lr_scheduler="steep")
