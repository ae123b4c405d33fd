"""The example scripts as a user runs them: through `accelerate launch`, on a tiny teacher."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from diffusers_pqcad.layers.find import packed_layers
from diffusers_pqcad.loading.coverage import average_bits

ROOT = Path(__file__).parents[1]
LAUNCH = (
    *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no"),
)
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def command(teacher: Path, output: Path, *flags: str) -> list[str]:
    settings = ("--preset", "smoke", "--pretrained_model_name_or_path", str(teacher), "--output_dir", str(output))
    return [*LAUNCH, str(ROOT / "examples" / "distill.py"), *settings, "--num_threads", "1", *flags]


def launch(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=400, **options
    )


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher folder of the smallest useful kind, made once."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        add_attention=False,
    )
    scheduler = DDIMScheduler(prediction_type="v_prediction", timestep_spacing="trailing", clip_sample=False)
    folder = tmp_path_factory.mktemp("teacher")
    DDIMPipeline(unet, scheduler).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(teacher, tmp_path_factory):
    """The output folder of one uninterrupted smoke run."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    result = launch(teacher, output)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "| PQ + CAD |" in result.stdout
    return output


def weights(folder: Path) -> dict:
    return load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")


def test_the_folder_is_a_pipeline_with_everything_beside_it(finished):
    pipeline = DiffusionPipeline.from_pretrained(finished)
    assert packed_layers(pipeline.unet)
    assert average_bits(pipeline.unet)[0] <= 4.0
    assert pipeline.unet.config.quantization_config.num_inference_steps == 2
    for name in ("README.md", "metrics.json", "history.json", "recipe.yaml"):
        assert (finished / name).stat().st_size > 0
    for name in ("samples.png", "bits.png", "curves.png"):
        assert (finished / "assets" / name).read_bytes().startswith(b"\x89PNG")
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [row["key"] for row in metrics["rows"]] == [
        "float", "float_half", "fixed", "pq", "pq_half", "pq_cad",
    ]  # fmt: skip
    assert {key: [place["device"] for place in places] for key, places in metrics["training"].items()} == {
        "pq": ["cpu"],
        "pq_cad": ["cpu"],
    }
    assert all(row["metric_name"] is None for row in metrics["rows"])  # no extractor for somebody's own teacher
    card = (finished / "README.md").read_text()
    assert f"{metrics['rows'][-1]['sqnr_db']:.2f}" in card
    assert "distance" not in card.split("## Results")[1].split("\n|")[1]


def test_killed_and_resumed_it_ends_with_the_same_weights(teacher, finished, tmp_path):
    output = tmp_path / "killed"
    process = subprocess.Popen(
        command(teacher, output),
        env=ENVIRONMENT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    deadline = time.monotonic() + 300
    while not (output / "state" / "pq.safetensors").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (output / "model_index.json").exists(), "the run was over before it could be killed"

    result = launch(teacher, output)
    assert result.returncode == 0, result.stdout + result.stderr
    resumed, whole = weights(output), weights(finished)
    assert resumed.keys() == whole.keys()
    assert all((resumed[name] == whole[name]).all() for name in whole)


def test_changed_settings_on_an_old_folder_are_refused(teacher, finished):
    before = weights(finished)
    result = launch(teacher, finished, "--weight_bits", "3")
    assert result.returncode != 0
    assert "weight_bits" in result.stderr
    assert "Traceback" not in result.stderr.split("distill.py:")[0]
    assert all((weights(finished)[name] == before[name]).all() for name in before)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--num_images", "1"), "num_images: expected at least 2, got 1"),
        (("--max_train_steps", "0"), "max_train_steps: expected at least 1, got 0"),
        (("--evaluation_steps", "0"), "evaluation_steps"),
        (("--reconstruction_samples", "3"), "reconstruction_samples"),
        (("--num_trajectories", "3"), "num_trajectories"),
        (("--reconstruction_iterations", "-1"), "reconstruction_iterations: expected at least 0, got -1"),
        (("--modules_to_not_convert", "nowhere"), "modules_to_not_convert: 'nowhere' matches none"),
        (("--push_to_hub",), "push_to_hub needs a hub_model_id"),
        (("--config", "nowhere.yaml"), "no file 'nowhere.yaml'"),
        (("--num_inference_steps", "5"), "odd"),
        (("--num_inference_steps", "6"), "divide"),
        (("--weight_bits", "1"), "weight_bits"),
        (("--activation_bits", "5"), "activation_bits"),
        (("--train_device", "abacus"), "train_device: expected 'cpu' or the kind of accelerator .* got 'abacus'"),
        (("--pretrained_model_name_or_path", "./no"), "'./no': no such folder, and not to be had from the Hub"),
        (("--pretrained_model_name_or_path", "my/no"), "'my/no': no such folder, and not to be had from the Hub"),
    ],
)
def test_bad_settings_are_refused(teacher, tmp_path, monkeypatch, flags, message):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import distill

    folder = tmp_path / "bad"
    arguments = command(teacher, folder, *flags)
    with pytest.raises(ValueError, match=message):
        distill.main(arguments[arguments.index("--preset") :])
    assert not folder.exists()  # the corrected command may have it


def test_what_is_published_names_no_place_of_this_computer(finished):
    for name in ("recipe.yaml", "metrics.json", "README.md", "history.json"):
        assert str(finished.parent) not in (finished / name).read_text()
        assert "/tmp" not in (finished / name).read_text()
    recipe = yaml.safe_load((finished / "recipe.yaml").read_text())
    assert recipe["num_images"] == 8
    assert not {"output_dir", "pretrained_model_name_or_path", "push_to_hub", "num_threads"} & set(recipe)


def test_bundled_teachers_are_known_by_any_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import distill

    from diffusers_pqcad.publishing.pipelines import source_of
    from diffusers_pqcad.publishing.settings import CompressConfig

    monkeypatch.chdir(ROOT)
    assert source_of(CompressConfig(), distill.BUNDLED) == distill.BUNDLED[0]
    for bundled in distill.BUNDLED:
        for path in (bundled.path, str(Path(bundled.path).relative_to(ROOT)), f"{bundled.path}/"):
            assert source_of(CompressConfig(pretrained_model_name_or_path=path), distill.BUNDLED) == bundled
            assert Path(bundled.extractor).is_dir()


def test_bundled_teachers_have_their_own_defaults_which_flags_replace(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import distill

    monkeypatch.chdir(ROOT)

    def run_of(*arguments):
        return distill.job_of_command([*arguments]).settings.run

    emoji = ("--pretrained_model_name_or_path", "examples/models/emoji")
    assert (run_of(*emoji).guidance_scale, run_of(*emoji).num_halvings) == (3.0, 2)
    assert run_of(*emoji, "--guidance_scale", "5").guidance_scale == 5.0
    assert run_of(f"{emoji[0]}={emoji[1]}").num_halvings == 2
    assert run_of(*emoji, "--preset", "smoke").num_halvings == 1
    assert run_of("--pretrained_model_name_or_path", "examples/models/fashion-flow").max_sequence_length == 8
    for others in ((), ("--pretrained_model_name_or_path", "someone/emoji")):
        assert (run_of(*others).guidance_scale, run_of(*others).num_halvings) == (None, 1)


def test_distill_says_what_it_would_do(monkeypatch, capsys, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import distill

    flags = ("--preset", "smoke", "--output_dir", str(tmp_path / "out"), "--reconstruction_iterations", "0")
    plan = distill.main([*flags, "--dry_run", "--measure_time", "False"])  # of the first bundled teacher
    assert [stage["key"] for stage in plan["stages"]] == ["recording", "pq", "pq_cad", "rows"]
    assert "Nothing was written." in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_distill_runs_with_the_flags_that_a_limit_of_memory_chose(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import distill

    chosen = distill.job_of_command(["--offload_to_disk", "--seed", "3"]).settings
    asked, ran = [], []

    def compress(*settings, bundled):
        ran.append(settings)
        raise ValueError("this is where it would run")

    monkeypatch.setattr(distill, "affordable", lambda settings, bill, path: asked.append((bill, path)) or chosen)
    monkeypatch.setattr(distill, "compress", compress)
    with pytest.raises(ValueError, match="this is where"):
        distill.main(["--max_memory", "2GB", "--output_dir", str(tmp_path / "out")])
    assert [(bill.max_memory, path) for bill, path in asked] == [("2GB", distill.BUNDLED[0].path)]
    assert ran == [chosen]
    with pytest.raises(ValueError, match="max_memory: expected a number with its unit"):
        distill.main(["--max_memory", "much"])


def test_ablations_are_added_to_a_finished_run(teacher, finished):
    before, metrics = weights(finished), json.loads((finished / "metrics.json").read_text())
    result = launch(teacher, finished, "--ablations")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = {row["key"]: row for row in json.loads((finished / "metrics.json").read_text())["rows"]}
    assert [rows[row["key"]] for row in metrics["rows"]] == metrics["rows"]  # what was measured stays
    assert set(rows) - {row["key"] for row in metrics["rows"]} == {
        "cad_calibration_only", "cad_float_teacher", "cad_no_calibration",
        "pq_no_momentum", "fixed_reconstructed", "load_time",
    }  # fmt: skip
    assert all((weights(finished)[name] == before[name]).all() for name in before)
