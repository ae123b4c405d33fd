"""`examples/train_teacher.py` on a handful of images: what it writes, and that a killed run resumes exactly."""

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DModel

from diffusers_pqcad import PQCADConfig

ROOT = Path(__file__).parents[1]


@pytest.fixture
def scripts(monkeypatch):
    """Import the example scripts as `accelerate launch` would find them."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import fashion_mnist
    import train_teacher

    return train_teacher, fashion_mnist


@pytest.fixture
def idx_folder(tmp_path):
    """A training split of 12 random images in the format of the Debian package."""
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    labels = np.arange(12, dtype=np.uint8) % 10
    for name, array in (("images-idx3", images), ("labels-idx1", labels)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (tmp_path / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return tmp_path, images, labels


def test_the_idx_reader_returns_what_was_written(scripts, idx_folder):
    _, fashion_mnist = scripts
    folder, images, labels = idx_folder
    loaded, loaded_labels = fashion_mnist.load_split("train", str(folder))
    assert loaded.shape == (12, 1, 28, 28)
    assert np.array_equal(loaded[:, 0].numpy(), images)
    assert np.array_equal(loaded_labels.numpy(), labels)


def test_another_file_is_refused(scripts, tmp_path):
    _, fashion_mnist = scripts
    path = tmp_path / "file.gz"
    path.write_bytes(gzip.compress(b"not an IDX file"))
    with pytest.raises(ValueError, match=r"file\.gz: expected an IDX file"):
        fashion_mnist.read_idx(path)


def test_a_killed_training_ends_with_the_same_weights(scripts, idx_folder, tmp_path, monkeypatch):
    train_teacher, _ = scripts
    import training_loop

    def settings(name):
        return train_teacher.Settings(
            output_dir=str(tmp_path / name),
            checkpoint_dir=str(tmp_path / f"{name}-checkpoint"),
            train_data_dir=str(idx_folder[0]),
            num_train_epochs=2,
            train_batch_size=4,
            lr_warmup_steps=1,
            checkpointing_steps=2,
            mixed_precision="no",
            num_threads=1,
        )

    whole = train_teacher.train(settings("whole")).state_dict()

    class Killed(Exception):
        pass

    save = training_loop.save_checkpoint

    def save_then_die(path, state):
        save(path, state)
        raise Killed

    monkeypatch.setattr(training_loop, "save_checkpoint", save_then_die)
    with pytest.raises(Killed):
        train_teacher.train(settings("killed"))
    monkeypatch.setattr(training_loop, "save_checkpoint", save)
    resumed = train_teacher.train(settings("killed")).state_dict()
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())

    pipeline = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert pipeline.scheduler.config.timestep_spacing == "trailing"
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert json.loads((tmp_path / "whole" / "training.json").read_text())["num_steps"] == 6
    assert "Zalando" in (tmp_path / "whole" / "README.md").read_text()


def test_the_state_of_another_recipe_is_refused(scripts, tmp_path):
    """Also that of an older version, which does not say how it was made."""
    import training_loop
    from accelerate import Accelerator

    def fit(**changes):
        recipe = training_loop.Recipe(
            **{"num_steps": 2, "batch_size": 1, "learning_rate": 1e-3, "lr_warmup_steps": 1, "max_grad_norm": 1.0}
            | {"ema_decay": 0.9, "checkpointing_steps": 1}
            | changes
        )
        model = torch.nn.Linear(1, 1)
        loss_of = lambda model, step: model(torch.ones(1, 1)).square().mean()  # noqa: E731
        return training_loop.fit(model, loss_of, recipe, Accelerator(), tmp_path, "train")

    fit()
    fit(checkpointing_steps=2)
    with pytest.raises(ValueError, match=r"state.safetensors was begun with other settings.*learning_rate"):
        fit(learning_rate=1e-2)
    path = tmp_path / training_loop.STATE_FILE
    state = training_loop.load_checkpoint(path)
    training_loop.save_checkpoint(path, {key: value for key, value in state.items() if key != "request"})
    with pytest.raises(ValueError, match="was begun with other settings"):
        fit()


@pytest.mark.parametrize("prediction_type", ["v_prediction", "epsilon"])
def test_a_network_learns_what_its_scheduler_expects(scripts, prediction_type):
    """The scheduler takes the target back to the clean image."""
    train_teacher, _ = scripts
    settings = train_teacher.Settings(prediction_type=prediction_type)
    kind = {"v_prediction": "", "epsilon": "-epsilon"}[prediction_type]
    assert settings.output_dir == f"examples/models/fashion-mnist{kind}"
    assert settings.checkpoint_dir == f"outputs/teacher{kind}-checkpoint"
    scheduler = train_teacher.build_scheduler(prediction_type)
    clean, noise = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 4, 4)
    timesteps = torch.tensor([100, 100])
    output = train_teacher.TARGETS[prediction_type](scheduler, clean, noise, timesteps)
    scheduler.set_timesteps(10)
    found = scheduler.step(output, 100, scheduler.add_noise(clean, noise, timesteps)).pred_original_sample
    torch.testing.assert_close(found, clean, rtol=0, atol=1e-5)


def test_another_prediction_type_is_refused(scripts):
    with pytest.raises(ValueError, match="prediction_type: expected one of .*, got 'x0'"):
        scripts[0].Settings(prediction_type="x0")


def test_an_epsilon_teacher_says_so(scripts, idx_folder, tmp_path):
    train_teacher, _ = scripts
    train_teacher.train(
        train_teacher.Settings(
            output_dir=str(tmp_path / "teacher"), checkpoint_dir=str(tmp_path / "checkpoint"),
            train_data_dir=str(idx_folder[0]), prediction_type="epsilon", num_train_epochs=1, train_batch_size=4,
            mixed_precision="no", num_threads=1,
        )
    )  # fmt: skip
    assert DiffusionPipeline.from_pretrained(tmp_path / "teacher").scheduler.config.prediction_type == "epsilon"
    card = (tmp_path / "teacher" / "README.md").read_text()
    assert "epsilon prediction on a linear noise schedule" in card
    assert "--prediction_type epsilon" in card


def test_digits_come_as_tensors_and_make_a_teacher(scripts, tmp_path):
    train_teacher, _ = scripts
    import digits

    images = digits.load_digits()
    assert (images.shape, images.dtype, images.max().item()) == ((1797, 1, 8, 8), torch.uint8, 255)
    settings = train_teacher.Settings(dataset="digits")
    assert (settings.num_train_epochs, settings.output_dir) == (80, "outputs/teachers/digits")
    unet = train_teacher.train(
        train_teacher.Settings(
            dataset="digits", output_dir=str(tmp_path / "teacher"), checkpoint_dir=str(tmp_path / "checkpoint"),
            num_train_epochs=1, train_batch_size=1024, mixed_precision="no", num_threads=1,
        )
    )  # fmt: skip
    assert 0.4e6 < unet.num_parameters() < 0.5e6
    assert DiffusionPipeline.from_pretrained(tmp_path / "teacher").unet.config.sample_size == 8
    card = (tmp_path / "teacher" / "README.md").read_text()
    assert "8x8 grey images" in card
    assert "--dataset digits" in card
    assert "fashion" not in card.lower()


def test_another_data_set_is_refused(scripts):
    with pytest.raises(ValueError, match="dataset: expected one of .*, got 'mnist'"):
        scripts[0].Settings(dataset="mnist")


def test_the_distances_of_several_teachers_stand_beside_each_other(scripts, tmp_path, monkeypatch):
    import train_classifier

    folder = tmp_path / "features"
    shutil.copytree(ROOT / "examples" / "models" / "fashion-mnist-features", folder)
    before = json.loads((folder / "config.json").read_text())
    distances = [{"num_images": 7, "frechet_distance": 1.5, "kernel_distance": 0.25}]
    measured = {"scheduler": "DDIMScheduler", "num_inference_steps": 3, "seed": 1, "distances": distances}
    monkeypatch.setattr(train_classifier, "measure_teacher", lambda settings: measured)
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    train_classifier.main(train_classifier.Settings(output_dir=str(folder), measure_teacher="my/teacher"))
    after = json.loads((folder / "config.json").read_text())
    assert after == before | {"teachers": before["teachers"] | {"my/teacher": measured}}
    card = (folder / "README.md").read_text()
    assert "| `my/teacher` | 3 DDIMScheduler | 1 | 7 | 1.5000 | 0.250000 |" in card
    assert all(f"| `{name}` |" in card for name in before["teachers"])


def test_the_card_of_the_bundled_features_is_what_the_script_writes(scripts):
    import train_classifier

    folder = ROOT / "examples" / "models" / "fashion-mnist-features"
    config = json.loads((folder / "config.json").read_text())
    assert train_classifier.card(config) == (folder / "README.md").read_text()


def test_the_bundled_teacher_is_what_the_script_builds(scripts):
    train_teacher, _ = scripts
    bundled = DiffusionPipeline.from_pretrained(ROOT / "examples" / "models" / "fashion-mnist")
    built = train_teacher.build_unet()
    assert {name: tensor.shape for name, tensor in bundled.unet.state_dict().items()} == {
        name: tensor.shape for name, tensor in built.state_dict().items()
    }
    assert bundled.unet.num_parameters() < 1.2e6
    folder = ROOT / "examples" / "models" / "fashion-mnist"
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 8e6


def test_the_bundled_teacher_shrinks_to_a_sixth_and_comes_back_bit_for_bit(tmp_path):
    teacher = ROOT / "examples" / "models" / "fashion-mnist"
    unet = UNet2DModel.from_pretrained(
        teacher, subfolder="unet", quantization_config=PQCADConfig(weight_bits=4, activation_bits=8)
    )
    unet.save_pretrained(tmp_path)
    name = "diffusion_pytorch_model.safetensors"
    assert 6 * (tmp_path / name).stat().st_size <= (teacher / "unet" / name).stat().st_size
    state, again = unet.state_dict(), UNet2DModel.from_pretrained(tmp_path).state_dict()
    assert state.keys() == again.keys()
    assert all(state[key].dtype == again[key].dtype and torch.equal(state[key], again[key]) for key in state)
