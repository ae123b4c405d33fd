"""The whole job with a LoRA: one that the pipeline came with, or a new one; beside a base that it does not change."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from pipelines import PIPELINES, PROMPTS, TOKENS
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffusers_pqcad.compression.adapters import add_adapter_, carries_adapter
from diffusers_pqcad.compression.extras import MissingExtraError
from diffusers_pqcad.evaluation.speed import directory_size_bytes
from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.publishing.pipelines import denoiser_of, load_adapter_, parted, save_adapter
from diffusers_pqcad.publishing.pushing import PUBLISHED_FILES
from diffusers_pqcad.publishing.settings import CompressConfig, settings_of

module = importlib.import_module("diffusers_pqcad.publishing.compress")
ROOT = Path(__file__).parents[2]
LORA = "pytorch_lora_weights.safetensors"
TARGETS = {"sd": ["to_q", "to_out.0", "conv1"], "sd3": ["to_q", "add_q_proj"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pipelines, a LoRA of each with an alpha of twice its rank, and prompts."""
    folder = tmp_path_factory.mktemp("teachers")
    for name in ("sd", "sd3"):
        pipeline = PIPELINES[name].build()
        pipeline.save_pretrained(folder / name)
        model = denoiser_of(pipeline)
        add_adapter_(model, rank=2, lora_alpha=4, target_modules=TARGETS[name], seed=1)
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                nn.init.normal_(parameter, std=0.2)
        save_adapter(*parted(pipeline), folder / f"{name}-lora")
    for name in ("ddim", "dit"):
        PIPELINES[name].build().save_pretrained(folder / name)
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    return folder


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        import distill
    return distill.main


def arguments(folder: Path, name: str, output: Path, *flags: str) -> list[str]:
    settings = {
        "preset": "smoke", "pretrained_model_name_or_path": folder / name, "prompts_file": folder / "prompts.txt",
        "output_dir": output, "num_threads": 1, "guidance_scale": 5.0, "height": 16, "width": 16, "num_images": 3,
        "num_trajectories": 6, "max_train_steps": 4, "evaluation_steps": 1, "reconstruction_iterations": 1,
        "trainable": "lora", "lora_rate": 0.001, "teacher": "none", "train_batch_size": 8,
    }  # fmt: skip
    of_kind = {"sd": (), "sd3": ("--max_sequence_length", str(TOKENS))}[name]
    return [*(text for key, value in settings.items() for text in (f"--{key}", str(value))), *of_kind, *flags]


class Run:
    """A finished run: its folder, and the student's pipeline as it was measured."""

    def __init__(self, main: Callable[[list[str]], dict[str, Any]], given: list[str], output: Path) -> None:
        self.given, self.output, save = given, output, module.save_results

        def keep(*args: Any) -> None:
            self.measured = next(row.pipeline for row in args[4] if row.key == "pq_cad")
            save(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "save_results", keep)
            self.metrics = main(given)


@pytest.fixture(scope="module", params=["sd", "sd3"])
def finished(
    request: pytest.FixtureRequest, folder: Path, main: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """A repair of SD's own LoRA, in as many steps; and SD3 in half the steps, by a new one."""
    output = tmp_path_factory.mktemp("runs") / request.param
    flags = {
        "sd": ("--lora_weights", str(folder / "sd-lora"), "--num_halvings", "0", "--max_train_steps", "12"),
        "sd3": ("--lora_rate", "0.02", "--rank", "3", "--lora_alpha", "6", "--target_modules", *TARGETS["sd3"]),
    }[request.param]
    return Run(main, arguments(folder, request.param, output, *flags), output)


def latents(pipeline: Any, **call: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    sizes = {"height": 16, "width": 16, "output_type": "latent", "generator": generator}
    return pipeline("red cat", **sizes, **call).images


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "diffusion_pytorch_model.safetensors")


def test_the_folder_and_its_lora_are_the_student_that_was_measured(finished: Run) -> None:
    assert finished.metrics["cad"]["best_step"] > 0
    call = finished.metrics["student_arguments"]
    if "transformer" in finished.measured.components:
        call = call | {"max_sequence_length": TOKENS}
    expected = latents(finished.measured, **call)
    pipeline = DiffusionPipeline.from_pretrained(finished.output)
    bare = latents(pipeline, **call)
    pipeline.load_lora_weights(finished.output)
    torch.testing.assert_close(latents(pipeline, **call), expected, rtol=1e-5, atol=1e-5)
    assert (bare - expected).abs().max() > 1e-3  # and it is the LoRA that makes the difference
    assert packed_layers(denoiser_of(pipeline))


def test_the_base_is_that_of_the_quantization(finished: Run) -> None:
    """Training an adapter changes no byte of the quantized pipeline; and PQ's alone is the same, without a LoRA."""
    component = finished.metrics["component"]
    student, quantized = weights(finished.output / component), weights(finished.output / "state" / "models" / "pq")
    added = {"time_embedding.cond_proj.weight"} if component == "unet" else set()  # the switch of folded guidance
    assert student.keys() - quantized.keys() == added
    assert all(torch.equal(value, student[name]) for name, value in quantized.items())
    assert not [name for name in student if "lora" in name or "base_layer" in name]
    assert (finished.output / "state" / "models" / "pq" / LORA).exists() == (component == "unet")


def test_a_given_lora_is_the_one_that_is_trained_and_a_new_one_is_as_was_asked(finished: Run, folder: Path) -> None:
    found = load_file(finished.output / LORA)
    if finished.metrics["component"] == "unet":
        given = load_file(folder / "sd-lora" / LORA)
        of_pq = load_file(finished.output / "state" / "models" / "pq" / LORA)
        assert given.keys() == of_pq.keys() == found.keys()
        assert all(torch.equal(value, of_pq[name]) for name, value in given.items())  # PQ leaves it
        assert all((value - given[name]).abs().max() < 0.02 for name, value in found.items())  # it began there
        assert not all(torch.equal(value, given[name]) for name, value in found.items())
        assert finished.metrics["adapter"] == {"rank": 2, "num_layers": len(given) // 2, "is_given": True}
    else:
        ranks = {min(value.shape) for value in found.values()}
        assert ranks == {3}
        ends = {name.split(".lora_")[0].rpartition(".")[2] for name in found}
        assert ends == set(TARGETS["sd3"])
        assert finished.metrics["adapter"] == {"rank": 3, "num_layers": len(found) // 2, "is_given": False}


def test_sizes_count_the_adapter(finished: Run) -> None:
    for row in finished.metrics["rows"]:
        saved = finished.output / "state" / "models" / row["key"]
        has_lora = row["key"] == "pq_cad" or finished.metrics["adapter"]["is_given"]
        assert (saved / LORA).exists() == has_lora, row["key"]
        assert row["size_bytes"] == directory_size_bytes(saved)


def test_the_card_loads_the_lora_and_says_what_was_trained(finished: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    card = (finished.output / "README.md").read_text()
    assert "Size: the denoiser's files, its LoRA in floating point among them." in card
    facts = finished.metrics["adapter"]
    assert f" updates of a LoRA of rank {facts['rank']} on {facts['num_layers']} layers" in card
    assert ("as `--lora_weights`" in card) == facts["is_given"]
    assert str(finished.output.parent) not in card + (finished.output / "recipe.yaml").read_text()
    code = card.split("```python\n")[1].split("\n```")[0]
    monkeypatch.chdir(finished.output.parent)
    names: dict[str, Any] = {}
    exec(code, names)
    assert carries_adapter(denoiser_of(names["pipe"]))
    assert np.asarray(names["image"]).shape == (16, 16, 3)
    assert LORA in PUBLISHED_FILES


def test_a_finished_run_trains_nothing_again(
    finished: Run, main: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = load_file(finished.output / LORA)
    for name in ("distill", "measure"):
        monkeypatch.setattr(module, name, lambda *args, **keywords: pytest.fail("it was made again"))
    again = main(finished.given)
    assert again | {"environment": None} == json.loads((finished.output / "metrics.json").read_text()) | {
        "environment": None
    }
    after = load_file(finished.output / LORA)
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_another_lora_is_refused_in_the_same_folder(
    folder: Path, main: Callable[..., Any], tmp_path: Path, finished: Run
) -> None:
    if finished.metrics["component"] != "unet":
        pytest.skip("it was given none")
    other = {name: value + 1 for name, value in load_file(folder / "sd-lora" / LORA).items()}
    save_file(other, tmp_path / "other.safetensors")
    flags = ("--num_halvings", "0", "--lora_weights")
    with pytest.raises(ValueError, match="begun with other settings.*lora_weights"):
        main(arguments(folder, "sd", finished.output, *flags, str(tmp_path / "other.safetensors")))


def of_text_encoder(folder: Path, target: Path) -> None:
    tensors = load_file(folder / "sd-lora" / LORA)
    for part, shape in (("A", (2, 8)), ("B", (8, 2))):
        key = f"text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{part}.weight"
        tensors[key] = torch.ones(shape)
    target.mkdir()
    save_file(tensors, target / LORA)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("ddim", {"trainable": "lora"}, "^trainable: expected a pipeline with load_lora_weights, got DDIMPipeline"),
        ("ddim", {"lora_weights": "sd-lora"}, "^lora_weights: expected a pipeline with load_lora_weights, got DDIM"),
        ("dit", {"trainable": "lora"}, "^trainable: expected a pipeline with load_lora_weights, got DiTPipeline"),
        ("sd", {"trainable": "lora", "target_modules": ["to_x"]}, "^target_modules: 'to_x' is the end of no layer"),
        ("sd", {"lora_weights": "nowhere"}, "^lora_weights: .*nowhere' cannot be loaded into StableDiffusionPipeline"),
        ("sd", {"lora_weights": "prompts.txt"}, "^lora_weights: expected a safetensors file or a folder with one"),
        ("sd", {"lora_weights": "pickled"}, "^lora_weights: .*pickled' cannot be loaded"),
        ("sd", {"lora_weights": "sd3-lora"}, "^lora_weights: "),
        (
            "sd",
            {"lora_weights": "text"},
            r"^lora_weights: expected a LoRA of the unet alone, got one of .*text_encoder",
        ),
    ],
)
def test_adapters_that_no_one_could_load_are_refused_before_anything_is_written(
    folder: Path, tmp_path: Path, name: str, flags: dict[str, Any], message: str
) -> None:
    of_text_encoder(folder, tmp_path / "text")
    (tmp_path / "pickled").mkdir()
    torch.save({}, tmp_path / "pickled" / "pytorch_lora_weights.bin")
    path = flags.get("lora_weights")
    if path is not None:
        place = folder if (folder / path).exists() else tmp_path
        flags = flags | {"lora_weights": str(place / path)}
    inputs = {"sd": {"prompts_file": str(folder / "prompts.txt")}, "dit": {"class_labels": [1, 2]}, "ddim": {}}[name]
    where = {"pretrained_model_name_or_path": str(folder / name), "output_dir": str(tmp_path / "out")}
    settings = settings_of(where | inputs | flags | {"num_threads": 1})
    with pytest.raises(ValueError, match=message):
        module.compress(*settings, progress=False)
    assert not (tmp_path / "out").exists()


def test_a_lora_in_half_precision_is_trained_in_full(folder: Path, tmp_path: Path) -> None:
    given = {name: value.half() for name, value in load_file(folder / "sd-lora" / LORA).items()}
    save_file(given, tmp_path / "half.safetensors")
    pipeline = DiffusionPipeline.from_pretrained(folder / "sd")
    load_adapter_(pipeline, CompressConfig(lora_weights=str(tmp_path / "half.safetensors")))
    assert {parameter.dtype for parameter in pipeline.unet.parameters()} == {torch.float32}
    adapter = parted(pipeline)[1]
    assert all(torch.equal(value, given[f"unet.{name}"].float()) for name, value in adapter.tensors.items())


@pytest.mark.parametrize("flags", [{"trainable": "lora"}, {"lora_weights": "anywhere"}])
def test_without_peft_nothing_begins(
    folder: Path, tmp_path: Path, flags: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(module, "load_teacher", lambda path: pytest.fail("the teacher was loaded"))
    where = {"pretrained_model_name_or_path": str(folder / "sd"), "output_dir": str(tmp_path / "out")}
    with pytest.raises(MissingExtraError, match=r'^peft: .*pip install "diffusers-pqcad\[lora\]"'):
        module.compress(*settings_of(where | flags), progress=False)
    assert not (tmp_path / "out").exists()
