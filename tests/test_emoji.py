"""`examples/emoji.py` on glyphs drawn here: a picture shows what its caption says, and held-out pairs are left out."""

from pathlib import Path

import pytest
import torch
from PIL import Image

ROOT = Path(__file__).parents[1]
SOLID = {"apple": (255, 0, 0), "pear": (0, 255, 0), "grapes": (120, 0, 120)}


@pytest.fixture
def emoji(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import emoji

    return emoji


@pytest.fixture
def glyphs():
    """Opaque squares of one colour each, in the middle of transparent pictures of the font's size."""
    pictures = {}
    for name, colour in SOLID.items():
        pictures[name] = Image.new("RGBA", (136, 128))
        pictures[name].paste((*colour, 255), (34, 32, 102, 96))
    return pictures


def test_captions_are_read_back(emoji):
    for name, text in {
        "red apple": "a red apple on blue",
        "ear of corn": "an ear of corn on blue",
        "grapes": "grapes on blue",
        "unicorn": "a unicorn on blue",
        "meat on bone": "meat on bone on blue",
    }.items():
        assert emoji.caption(name, "blue") == text
        assert emoji.wanted(text) == {"emoji": name, "colour": "blue"}


@pytest.mark.parametrize("prompt", ["a red apple", "a red apple on pink", ""])
def test_other_prompts_are_refused(emoji, prompt):
    with pytest.raises(ValueError, match="expected 'a NAME on COLOUR'"):
        emoji.wanted(prompt)


def test_a_picture_shows_what_its_caption_says(emoji, glyphs):
    data = emoji.prompted_emoji(glyphs)
    rows = torch.arange(len(data))
    pictures = data.draw(rows)
    assert pictures.shape == (len(data), 3, 32, 32)
    assert pictures.dtype == torch.uint8
    for picture, choice in zip(pictures, data.choices[:, 0].tolist(), strict=True):
        wanted = data.wanted(data.prompts[choice])
        assert tuple(picture[:, 0, 0].tolist()) == emoji.COLOURS[wanted["colour"]]
        assert tuple(picture[:, 16, 16].tolist()) == SOLID[wanted["emoji"]]


def test_pictures_are_at_all_places_and_each_is_always_the_same(emoji, glyphs):
    data = emoji.prompted_emoji(glyphs)
    assert len(data) == (3 * 8 - 3) * 25 * 2
    rows = torch.tensor([0, 7, 800])
    assert torch.equal(data.draw(rows)[1], data.draw(rows.flip(0))[1])
    per_pair = data.draw(torch.arange(50)).flatten(1)
    assert len(per_pair.unique(dim=0)) == 25  # a square is its own mirror image


def test_a_mirrored_picture_is_seen_from_behind(emoji):
    glyph = torch.zeros(1, 4, 36, 36, dtype=torch.uint8)
    glyph[:, :, :, 5] = 255
    zero, black = torch.zeros(1, dtype=torch.long), torch.zeros(1, 3, dtype=torch.uint8)
    seen = [emoji.compose(glyph, black, zero, zero, torch.tensor([mirrored])) for mirrored in (False, True)]
    assert seen[0][0, 0, 0].nonzero().item() == 5
    assert torch.equal(seen[1], seen[0].flip(3))


def test_a_half_transparent_pixel_is_half_background(emoji):
    glyph = torch.tensor([200, 100, 0, 128], dtype=torch.uint8).view(1, 4, 1, 1).expand(1, 4, 36, 36)
    colour, zero = torch.tensor([[0, 100, 250]], dtype=torch.uint8), torch.zeros(1, dtype=torch.long)
    picture = emoji.compose(glyph, colour, zero, zero, torch.tensor([False]))
    assert picture[0, :, 3, 3].tolist() == [100, 100, 125]  # 128 / 255 of one, 127 / 255 of the other, rounded


def test_held_out_pairs_are_never_drawn(emoji, glyphs):
    data = emoji.prompted_emoji(glyphs)
    assert data.held_out_prompts == ["an apple on red", "a pear on orange", "grapes on yellow"]
    assert not set(data.held_out_prompts) & set(data.prompts)
    whole = emoji.prompted_emoji(glyphs, with_held_out=True)
    assert set(whole.prompts) == set(data.prompts) | set(data.held_out_prompts)
    # Each colour and each emoji of a held-out pair is known from other pairs.
    for prompt in data.held_out_prompts:
        for attribute, label in data.wanted(prompt).items():
            assert any(data.wanted(other)[attribute] == label for other in data.prompts)


def test_one_pair_in_sixteen_of_the_list_is_held_out(emoji):
    assert len(set(emoji.CHARACTERS)) == len(emoji.CHARACTERS) == 256
    held_out = [emoji.is_held_out(e, c) for e in range(256) for c in range(8)]
    assert sum(held_out) == 256 * 8 / emoji.HELD_OUT_EVERY


def test_names_are_those_for_reading_aloud(emoji, tmp_path):
    (tmp_path / "en.xml").write_text(
        '<ldml><annotations><annotation cp="🍎">apple | fruit | red</annotation>'
        '<annotation cp="🍎" type="tts">red apple</annotation></annotations></ldml>'
    )
    assert emoji.read_names(tmp_path / "en.xml") == {"🍎": "red apple"}


def test_missing_files_are_named_with_their_packages(emoji, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"NotoColorEmoji\.ttf: not found\. Install the packages fonts-noto"):
        emoji.load_emoji(str(tmp_path))


def test_the_licences_come_along(emoji, tmp_path):
    emoji.copy_emoji_licences(tmp_path)
    assert "SIL OPEN FONT LICENSE Version 1.1" in (tmp_path / "noto-color-emoji.txt").read_text()
    assert "Unicode, Inc. All rights reserved" in (tmp_path / "unicode-cldr.txt").read_text()
    assert all(name in emoji.EMOJI_NOTICE for name in emoji.EMOJI_LICENCES)
