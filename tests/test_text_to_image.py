"""`examples/train_text_to_image.py` on a few pictures: what it writes, and that a killed run resumes exactly."""

import dataclasses
import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image
from torch import nn
from transformers import CLIPTokenizer

from diffusers_pqcad.compression.grid import grid_of
from diffusers_pqcad.compression.schedulers import deterministic_scheduler

ROOT = Path(__file__).parents[1]
FASHION_FEATURES = ROOT / "examples" / "models" / "fashion-mnist-features"
PROMPTS = ["a red apple on blue", "an ear of corn on white", "grapes on black"]
KINDS = {"emoji": StableDiffusionPipeline, "fashion-flow": StableDiffusion3Pipeline}


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """The example scripts as `accelerate launch` would find them, with emoji that are drawn here, at one place."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import emoji
    import train_classifier
    import train_text_to_image

    glyphs = {name: Image.new("RGBA", (136, 128)) for name in ("red apple", "ear of corn", "grapes")}
    for name, place in zip(glyphs, (20, 40, 60), strict=True):
        glyphs[name].paste((200, place, 100, 255), (place, place, place + 50, place + 50))
    monkeypatch.setattr(emoji, "MAX_SHIFT", 0)
    for script in (train_classifier, train_text_to_image):
        monkeypatch.setattr(script, "load_emoji", lambda folder: glyphs)
    return train_text_to_image


@pytest.fixture(scope="module")
def fashion_folder(tmp_path_factory):
    """A training split of 12 random images in the format of the Debian package."""
    folder = tmp_path_factory.mktemp("fashion")
    images = np.random.default_rng(0).integers(0, 256, (12, 28, 28), dtype=np.uint8)
    for name, array in (("images-idx3", images), ("labels-idx1", np.arange(12, dtype=np.uint8) % 10)):
        header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
        (folder / f"train-{name}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return folder


@pytest.fixture(scope="module")
def finished():
    """What `trained` made, by subject: each is trained once."""
    return {}


@pytest.fixture
def settings(scripts, fashion_folder, tmp_path_factory):
    """How to train a subject in a few updates, into a folder of its own."""

    def settings_of(subject, **changed):
        folder = tmp_path_factory.mktemp(subject)
        values = {
            "subject": subject, "output_dir": str(folder / "teacher"), "checkpoint_dir": str(folder / "checkpoint"),
            "train_data_dir": str(fashion_folder), "num_train_images": 8, "num_vae_images": 8, "train_batch_size": 2,
            "vae_batch_size": 2,
            "lr_warmup_steps": 1, "checkpointing_steps": 2, "mixed_precision": "no", "num_threads": 1,
            "num_inference_steps": 2, "num_measured_images": 4, "extractor": str(folder / "no-features"),
        }  # fmt: skip
        return scripts.Settings(**values | changed)

    return settings_of


@pytest.fixture
def trained(scripts, settings, finished):
    """The settings and the pipeline of a run of a subject that nothing stopped."""

    def train(subject):
        if subject not in finished:
            mine = settings(subject)
            finished[subject] = mine, scripts.train(mine)
        return finished[subject]

    return train


def weights(pipeline):
    return {
        f"{name}.{key}": tensor
        for name, component in pipeline.components.items()
        if isinstance(component, nn.Module)
        for key, tensor in component.state_dict().items()
    }


@pytest.mark.parametrize("subject", KINDS)
def test_killed_at_every_checkpoint_it_ends_with_the_same_weights(scripts, settings, trained, subject, monkeypatch):
    import training_loop

    class Killed(Exception):
        pass

    whole, save = weights(trained(subject)[1]), training_loop.save_checkpoint

    def save_then_die(path, state):
        save(path, state)
        raise Killed

    monkeypatch.setattr(training_loop, "save_checkpoint", save_then_die)
    mine, num_kills = settings(subject), 0
    while True:
        try:
            pipeline = scripts.train(mine)
            break
        except Killed:
            num_kills += 1
    assert num_kills == 4  # two checkpoints of the autoencoder, two of the denoiser
    resumed = weights(pipeline)
    assert resumed.keys() == whole.keys()
    assert [name for name, tensor in whole.items() if not torch.equal(resumed[name], tensor)] == []


@pytest.mark.parametrize("subject", KINDS)
def test_the_folder_is_a_pipeline_that_makes_pictures(trained, subject):
    mine, pipeline = trained(subject)
    loaded = DiffusionPipeline.from_pretrained(mine.output_dir)
    assert type(loaded) is KINDS[subject]
    assert all(component.dtype == torch.float32 for name, component in loaded.components.items() if "text_enc" in name
               and component is not None)  # fmt: skip
    for name, tensor in weights(loaded).items():
        assert torch.equal(tensor, weights(pipeline)[name].to(tensor.dtype)), name
    loaded.set_progress_bar_config(disable=True)
    prompt = (Path(mine.output_dir) / "prompts.txt").read_text().splitlines()[0]
    (image,) = loaded(prompt, num_inference_steps=2).images
    assert (image.size, image.mode) == {"emoji": ((32, 32), "RGB"), "fashion-flow": ((28, 28), "L")}[subject]


@pytest.mark.parametrize("subject", KINDS)
def test_the_folder_is_small_and_complete(trained, subject):
    folder = Path(trained(subject)[0].output_dir)
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    assert max(files.values()) <= 9e6
    assert sum(files.values()) <= 16e6
    assert {"README.md", "training.json", "prompts.txt", "assets/samples.png"} <= files.keys()
    assert not [name for name in files if not name.endswith((".json", ".safetensors", ".txt", ".md", ".png"))]
    card = (folder / "README.md").read_text()
    assert "Not measured: there was no folder" in card
    licence = {"emoji": "SIL Open Font License 1.1", "fashion-flow": "Zalando"}[subject]
    assert licence in card
    assert "Unicode, Inc." in card or subject != "emoji"
    assert {"noto-color-emoji.txt", "unicode-cldr.txt"} <= files.keys() or subject != "emoji"


@pytest.mark.parametrize(("subject", "denoiser"), [("emoji", "unet"), ("fashion-flow", "transformer")])
def test_the_networks_have_the_size_that_is_wanted(trained, subject, denoiser):
    facts = json.loads((Path(trained(subject)[0].output_dir) / "training.json").read_text())
    least, most = {"unet": (2.5e6, 4e6), "transformer": (1e6, 3e6)}[denoiser]
    assert least <= facts["num_parameters"][denoiser] <= most


def test_the_prompts_are_those_of_the_pictures_and_the_held_out_ones_stand_apart(trained):
    folder = Path(trained("emoji")[0].output_dir)
    prompts, held_out = ((folder / name).read_text().splitlines() for name in ("prompts.txt", "held_out_prompts.txt"))
    assert len(prompts) == 3 * 8 - 3
    assert sorted(held_out) == ["a red apple on red", "an ear of corn on orange", "grapes on yellow"]
    assert not set(prompts) & set(held_out)
    assert prompts != sorted(prompts)  # the first ones are to be like all
    fashion = (Path(trained("fashion-flow")[0].output_dir) / "prompts.txt").read_text().splitlines()
    assert len(set(fashion)) == 40
    assert "a photo of a sneaker" in fashion


def test_only_prompts_of_the_pictures_are_trained_on(scripts, settings, monkeypatch):
    seen = []
    whole = scripts.StableDiffusion.forward

    def forward(self, latents, tokens, draws):
        seen.extend(tokens.tolist())
        return whole(self, latents, tokens, draws)

    monkeypatch.setattr(scripts.StableDiffusion, "forward", forward)
    monkeypatch.setattr(scripts, "write_report", lambda folder, data: None)
    scripts.train(settings("emoji", num_train_images=256, train_batch_size=32))
    data = scripts.SUBJECTS["emoji"].load(None)
    tokenizer = scripts.build_tokenizer(data.prompts)
    texts = set(tokenizer.batch_decode(seen, skip_special_tokens=True))
    assert texts == {*data.prompts, ""}
    assert not texts & set(data.held_out_prompts)


def test_a_measured_teacher_has_its_figures_in_its_card(scripts, settings, tmp_path, monkeypatch):
    import train_classifier

    monkeypatch.setattr(train_classifier, "NUM_EMOJI_PICTURES", {"train": 32, "test": 8})
    features = tmp_path / "features"
    config = train_classifier.main(
        train_classifier.Settings(
            subject="emoji", output_dir=str(features), num_train_epochs=1, train_batch_size=8,
            num_reference_features=16, noise_floor_images=[4], noise_floor_draws=2,
        )
    )  # fmt: skip
    assert config["labels"]["emoji"] == ["red apple", "ear of corn", "grapes"]
    assert (features / "noto-color-emoji.txt").exists()
    assert "emoji on coloured backgrounds" in (features / "README.md").read_text()

    mine = settings("emoji", num_train_images=2, num_vae_images=2, extractor=str(features))
    scripts.train(mine)
    folder = Path(mine.output_dir)
    labels = json.loads((folder / "prompt_labels.json").read_text())
    assert labels["an ear of corn on red"] == {"emoji": "ear of corn", "colour": "red"}
    listed = [(folder / file).read_text().splitlines() for file in ("prompts.txt", "held_out_prompts.txt")]
    assert set(labels) == {*listed[0], *listed[1]}
    trained, held_out = json.loads((folder / "training.json").read_text())["measured"]
    assert (trained["prompts"], held_out["prompts"]) == ("trained", "held out")
    assert trained["num_images"] == held_out["num_images"] == 4
    card = (folder / "README.md").read_text()
    assert f"| trained | 4 | {100 * trained['prompt_accuracy']:.1f} % | {trained['frechet_distance']:.4f} |" in card
    assert f"| held out | 4 | {100 * held_out['prompt_accuracy']:.1f} % | - |" in card
    with Image.open(folder / "assets" / "samples.png") as grid:
        assert grid.width == 8 * (3 * 32 + 8)


def test_the_bundled_classifier_of_fashion_finds_what_prompts_name(scripts):
    from fashion_mnist import CLASSES, wanted

    from diffusers_pqcad.evaluation import load_extractor

    assert wanted("a photo of an ankle boot") == {"class": "Ankle boot"}
    assert wanted("trousers") == {"class": "Trouser"}
    with pytest.raises(ValueError, match="prompt: expected one of"):
        wanted("a hat")
    assert load_extractor(FASHION_FEATURES).labels == {"class": list(CLASSES)}


def test_another_subject_is_refused(scripts):
    with pytest.raises(ValueError, match="subject: expected one of .*, got 'cats'"):
        scripts.Settings(subject="cats")


# The parts


@pytest.fixture
def parts(scripts):
    import small_pipelines

    return small_pipelines


def test_each_word_is_one_token_and_comes_back(parts, tmp_path):
    tokenizer = parts.build_tokenizer(PROMPTS)
    tokenizer.save_pretrained(tmp_path)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for prompt in PROMPTS:
        tokens = parts.token_ids(tokenizer, [prompt])
        assert tokens.shape == (1, parts.MAX_TOKENS)
        assert torch.equal(tokens, parts.token_ids(again, [prompt]))
        assert (tokens != tokenizer.eos_token_id).sum() == 1 + len(prompt.split())
        assert tokenizer.batch_decode(tokens, skip_special_tokens=True) == [prompt]
    assert len(again) == len(tokenizer)


def test_the_schedulers_are_taken_as_they_are(parts):
    tokenizer = parts.build_tokenizer(PROMPTS)
    for denoiser in (parts.StableDiffusion, parts.StableDiffusion3):
        scheduler = denoiser(tokenizer, 8).scheduler
        assert deterministic_scheduler(scheduler) == (scheduler, None)
        assert len(grid_of(scheduler, 20)) == 20


def test_latents_come_to_a_mean_square_of_one(scripts, parts):
    vae = parts.build_vae(3, 8)
    latents = 3 + 2 * torch.randn(5000, 4, 4, 4)
    scripts.measure_latents_(vae, latents, shifts=True)
    found = parts.normalized(vae, latents)
    assert found.mean().item() == pytest.approx(0, abs=0.01)
    assert found.square().mean().item() == pytest.approx(1, rel=0.01)
    scripts.measure_latents_(vae, latents, shifts=False)
    assert vae.config.shift_factor is None
    assert parts.normalized(vae, latents).square().mean().item() == pytest.approx(1, rel=0.01)


def test_texts_are_encoded_as_the_pipeline_does(parts):
    tokenizer = parts.build_tokenizer(PROMPTS)
    denoiser = parts.StableDiffusion3(tokenizer, 4).eval()
    pipeline = denoiser.pipeline(parts.build_vae(1, 8), tokenizer)
    with torch.no_grad():
        texts, pooled = denoiser.encode(parts.token_ids(tokenizer, PROMPTS))
        expected, _, expected_pooled, _ = pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=3)
    torch.testing.assert_close(torch.nn.functional.pad(texts, (0, 0, 0, 3)), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(pooled, expected_pooled, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [0, 1, 7, 256])
def test_one_zero_stands_for_all_that_take_the_place_of_t5(parts, count):
    denoiser = parts.StableDiffusion3(parts.build_tokenizer(PROMPTS), 4)
    latents, texts, pooled = torch.randn(2, 4, 4, 4), torch.randn(2, 5, 256), torch.randn(2, 256)
    arguments = {"hidden_states": latents, "timestep": torch.tensor([10.0, 900.0]), "pooled_projections": pooled}
    with torch.no_grad():
        all_of_them = torch.nn.functional.pad(texts, (0, 0, 0, count))
        expected = denoiser.transformer(encoder_hidden_states=all_of_them, **arguments).sample
        with parts.repeated_last_key(count):
            one_of_them = torch.nn.functional.pad(texts, (0, 0, 0, 1))
            found = denoiser.transformer(encoder_hidden_states=one_of_them, **arguments).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_bundled_teachers_are_small_and_have_their_licences():
    models = ROOT / "examples" / "models"
    for folder in (path for path in models.iterdir() if (path / "prompts.txt").exists()):
        sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
        assert max(sizes) <= 9e6, folder
        assert sum(sizes) <= 16e6, folder
        assert "## Licence of the data" in (folder / "README.md").read_text(), folder


def test_rows_of_an_epoch_are_each_image_once(scripts):
    from training_loop import Place

    places = [Place(seed=3, batch_size=2, rank=rank, world=2) for rank in range(2)]
    for epoch in range(2):
        rows = torch.cat([place.rows(13, 3 * epoch + step) for step in range(3) for place in places])
        assert len(set(rows.tolist())) == 12
    with pytest.raises(ValueError, match="batch_size=2: expected at most 1, as there are 3 images and 2 processes"):
        places[0].rows(3, 0)
    draws = [dataclasses.replace(place, seed=4).draws(5).initial_seed() for place in places]
    assert draws[0] != draws[1]
