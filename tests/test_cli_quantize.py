"""Specification of `pqcad quantize`: a folder, a single file or a repository, to a folder that loads."""

import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import ROOT, answer, contents
from diffusers import DDIMPipeline, DiffusionPipeline
from pipelines import PIPELINES
from safetensors.torch import load_file, save_file
from stub_hub import StubHub

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.loading.saved import saved_models

module = importlib.import_module("diffusers_pqcad.cli.quantize")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """The folder of a text-to-image pipeline in floating point."""
    folder = tmp_path_factory.mktemp("source") / "sd"
    PIPELINES["sd"].build().save_pretrained(folder)
    return folder


def packed(config: PQCADConfig) -> dict[str, torch.Tensor]:
    """The tensors that quantizing the pipeline's UNet in memory gives."""
    return quantize_(PIPELINES["sd"].build().unet, config).state_dict()


def assert_same(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(folder / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


def test_a_folder_becomes_one_that_loads_with_the_same_numbers_as_in_python(capsys, source, tmp_path):
    output, before = tmp_path / "deep" / "small", contents(source)
    flags = ("--weight_bits", "4", "--activation_bits", "0", "--modules_to_not_convert", "attn2", "--json")
    found = answer(capsys, "quantize", source, "-o", output, *flags)
    assert found.code == 0, found.err
    assert contents(source) == before
    assert [path.name for path in output.parent.iterdir()] == ["small"]  # and nothing half of it
    pipeline = DiffusionPipeline.from_pretrained(output)
    config = pipeline.unet.config.quantization_config
    assert (config.weight_bits, config.activation_bits) == (4, None)
    assert_same(output, packed(PQCADConfig(weight_bits=4, activation_bits=None, modules_to_not_convert=["attn2"])))
    document = found.document
    assert set(document["components"]) == {"unet"}
    assert document["components"]["unet"]["average_bits"] <= 4
    assert document["components"]["unet"]["packed_share"] == pytest.approx(config.packed_share, abs=1e-6)
    assert document["size_bytes"] == sum(map(len, contents(output).values()))


def test_the_text_says_sizes_the_call_that_loads_it_and_what_comes_next(capsys, source, tmp_path):
    found = answer(
        capsys, "quantize", source, "-o", tmp_path / "x", "--method", "fixed", "--components", "unet", "vae"
    )
    assert "unet: 8.00 bits a weight on average" in found.out
    assert "vae: 8.00 bits a weight on average" in found.out
    assert f"DiffusionPipeline.from_pretrained('{tmp_path / 'x'}')" in found.out
    assert f"pqcad compare {source} {tmp_path / 'x'} -o report.html" in found.out
    assert saved_models(tmp_path / "x")["vae"].quantization is not None


def test_all_components_get_their_widths(capsys, source, tmp_path):
    arguments = ("quantize", source, "-o", tmp_path / "x", "--weight_bits", "4", "--components", "all")
    planned = answer(capsys, *arguments, "--dry_run", "--json").document["components"]
    found = answer(capsys, *arguments, "--json").document["components"]
    assert found.keys() == planned.keys() == {"unet", "vae", "text_encoder"}
    assert found["unet"]["average_bits"] <= 4
    assert found["vae"]["average_bits"] == found["text_encoder"]["average_bits"] == 8


def test_the_folder_has_a_card_of_what_was_done(capsys, source, tmp_path):
    assert answer(capsys, "quantize", source, "-o", tmp_path / "x", "--weight_bits", "4").code == 0
    card = (tmp_path / "x" / "README.md").read_text()
    assert "# sd, its unet in W4A8\n" in card
    assert "by `pqcad quantize`, from its weights alone" in card
    assert 'from_pretrained("x")' in card
    assert str(source.parent) not in card
    flags = ("push", tmp_path / "x", "me/x", "--dry_run", "--json")
    assert {"README.md", "quantization.json"} <= set(answer(capsys, *flags).document["files"])


def test_what_stays_in_floating_point_has_the_dtype_that_was_asked_for(capsys, source, tmp_path):
    assert answer(capsys, "quantize", source, "-o", tmp_path / "x", "--torch_dtype", "bfloat16").code == 0
    tensors = load_file(tmp_path / "x" / WEIGHTS)
    assert tensors["conv_in.weight"].dtype == torch.bfloat16


# Trials


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_trial_writes_nothing_and_says_the_bytes_exactly_where_nothing_is_to_be_decided(
    capsys, source, tmp_path, dtype
):
    output = tmp_path / "x"
    flags = ("-o", output, "--method", "fixed", "--weight_bits", "3", "--group_size", "4", "--torch_dtype", dtype)
    found = answer(capsys, "quantize", source, *flags, "--dry_run", "--json")
    assert (found.code, output.exists()) == (0, False)
    (unet,) = found.document["components"].values()
    assert answer(capsys, "quantize", source, *flags).code == 0
    assert saved_models(output)["unet"].num_bytes == unet["num_bytes_after"]
    assert unet["is_exact"]
    assert unet["num_bytes"] == saved_models(source)["unet"].num_bytes
    by_name = {layer["name"]: layer for layer in unet["layers"]}
    loaded = DiffusionPipeline.from_pretrained(output).unet.config.quantization_config.weight_bits_by_module
    assert {name for name, layer in by_name.items() if layer["kernel"] is not None} == set(loaded)
    assert by_name["conv_in"]["becomes"] == "stays: by default"


def test_a_trial_of_shared_out_bits_comes_close_and_says_about(capsys, source, tmp_path):
    found = answer(capsys, "quantize", source, "-o", tmp_path / "x", "--weight_bits", "4", "--dry_run")
    assert "become about" in found.out
    assert "Nothing was written." in found.out


# Single files


def test_a_file_of_the_denoiser_and_the_pipeline_that_it_belongs_to(capsys, source, tmp_path):
    file = tmp_path / "finetuned.safetensors"
    tensors = {name: tensor + 0.01 for name, tensor in load_file(source / WEIGHTS).items()}
    save_file(tensors, file)
    flags = ("--pipeline", source, "-o", tmp_path / "x", "--weight_bits", "4")
    trial = answer(capsys, "quantize", file, *flags, "--dry_run")
    assert (trial.code, (tmp_path / "x").exists()) == (0, False)
    found = answer(capsys, "quantize", file, *flags)
    assert found.code == 0, found.err
    model = PIPELINES["sd"].build().unet
    model.load_state_dict(tensors)
    assert_same(tmp_path / "x", quantize_(model, PQCADConfig(weight_bits=4)).state_dict())
    assert DiffusionPipeline.from_pretrained(tmp_path / "x").text_encoder is not None


def test_a_file_of_unknown_parts_needs_its_pipeline(capsys, source, tmp_path):
    found = answer(capsys, "quantize", source / WEIGHTS, "-o", tmp_path / "x")
    assert found.code == 1
    assert "it holds one model" in found.reason
    assert "Say with --pipeline" in found.reason


def test_a_file_that_does_not_fit_its_pipeline_is_refused(capsys, source, tmp_path):
    save_file({"something.weight": torch.zeros(2)}, tmp_path / "other.safetensors")
    found = answer(capsys, "quantize", tmp_path / "other.safetensors", "--pipeline", source, "-o", tmp_path / "x")
    assert found.code == 1
    assert not (tmp_path / "x").exists()


# Bad input: one line, and files are as they were


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("weights.bin", b"x", "expected a .safetensors file, a folder, or a repository of the Hub, got another file."),
        ("weights.safetensors", b"no header", "expected a safetensors file, which this is not"),
    ],
)
def test_a_file_of_another_kind_is_refused(capsys, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    found = answer(capsys, "quantize", tmp_path / name, "-o", tmp_path / "x")
    assert (found.code, found.out) == (1, "")
    assert message in found.reason
    assert contents(tmp_path) == {name: content}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--components", "unet", "transformer"), "components: expected some of this pipeline's models"),
        (("--modules_to_not_convert", "nowhere"), "modules_to_not_convert: 'nowhere' matches none of"),
        (("--group_size", "7"), "group_size=7 must divide"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_the_trial_too(capsys, source, tmp_path, flags, message):
    before = contents(source)
    trial = answer(capsys, "quantize", source, "-o", tmp_path / "x", *flags, "--dry_run")
    assert trial.code == 1
    assert message in trial.reason
    found = answer(capsys, "quantize", source, "-o", tmp_path / "x", *flags)
    assert found.code == 1
    assert message in found.reason
    assert not list(tmp_path.iterdir())
    assert contents(source) == before


def test_an_output_folder_that_holds_something_is_refused(capsys, source, tmp_path):
    (tmp_path / "x").mkdir()
    assert answer(capsys, "quantize", source, "-o", tmp_path / "x", "--dry_run").code == 0  # an empty one will do
    (tmp_path / "x" / "mine.txt").write_text("mine")
    found = answer(capsys, "quantize", source, "-o", tmp_path / "x")
    assert found.code == 1
    assert "output_dir: expected a folder that is new or empty" in found.reason
    assert contents(tmp_path) == {"x/mine.txt": b"mine"}


@pytest.mark.parametrize("is_empty", [True, False])
def test_a_folder_that_is_no_pipeline_is_refused(capsys, source, tmp_path, is_empty):
    folder = tmp_path / "empty" if is_empty else source / "unet"
    folder.mkdir(exist_ok=True)
    found = answer(capsys, "quantize", folder, "-o", tmp_path / "x")
    assert found.code == 1
    assert "expected the folder of a pipeline, with model_index.json, got one without." in found.reason


def test_a_pipeline_with_nothing_to_quantize_is_refused(capsys, source, tmp_path):
    with pytest.warns(UserWarning, match="nothing to quantize"):
        found = answer(capsys, "quantize", source, "-o", tmp_path / "x", "--modules_to_not_convert", "*")
    assert found.code == 1
    assert "unet: nothing was quantized" in found.reason
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_stopped_while_it_saves_leaves_nothing(capsys, source, tmp_path, monkeypatch, error):
    def stop(pipeline: Any, folder: Path, **options: Any) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "half").write_text("half")
        raise error("no space left on device")

    monkeypatch.setattr(DiffusionPipeline, "save_pretrained", stop)
    found = answer(capsys, "quantize", source, "-o", tmp_path / "x")
    assert found.code == (130 if error is KeyboardInterrupt else 1)
    assert not list(tmp_path.iterdir())


# The Hub

SCRIPT = """
import json, sys
from diffusers_pqcad.cli.main import main
source, output = sys.argv[1:]
codes = [
    main(["push", source, "me/model", "--json"]),
    main(["inspect", "me/model", "--json"]),
    main(["quantize", "me/model", "--weight_bits", "4", "-o", output, "--json"]),
    main(["quantize", "me/nowhere", "-o", output + "2"]),
]
print(json.dumps(codes), file=sys.stderr)
"""


def test_a_repository_is_inspected_by_its_headers_and_quantized(tiny_pipeline: DDIMPipeline, tmp_path: Path) -> None:
    """In a new process: the Hub's client reads its settings when it is imported."""
    tiny_pipeline.save_pretrained(tmp_path / "float")
    with StubHub() as hub:
        others = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": hub.token,
            "HF_HOME": tempfile.mkdtemp(dir=tmp_path),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "float"), str(tmp_path / "small")]
        result = subprocess.run(command, env=others | settings, capture_output=True, text=True, timeout=300)
        whole = [r for r in hub.requests if "/storage/" in r.path and r.method == "GET"]
        size = (tmp_path / "float" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert result.stderr.splitlines()[-1] == "[0, 0, 0, 1]", result.stderr
    assert hub.token not in result.stdout + result.stderr
    decoder = json.JSONDecoder()
    pushed, end = decoder.raw_decode(result.stdout)
    inspected, _ = decoder.raw_decode(result.stdout[end:].lstrip())
    assert pushed["url"].endswith("/me/model")
    assert inspected["components"]["unet"]["num_bytes"] == saved_models(tmp_path / "float")["unet"].num_bytes
    assert size > 0
    assert whole, "the weights come from the Hub"
    unet = DiffusionPipeline.from_pretrained(tmp_path / "small").unet
    assert unet.config.quantization_config.weight_bits == 4
    assert "me/nowhere: no such folder or file, and not to be had from the Hub" in result.stderr
