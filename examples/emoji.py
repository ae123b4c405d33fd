"""Emoji on coloured backgrounds, and their captions: "a red apple on blue".

The pictures are those of the font Noto Color Emoji, the names those of Unicode CLDR; both are packages of Debian.
"""

import itertools
import shutil
import xml.etree.ElementTree
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from prompted_pictures import PromptedPictures
from torch import Tensor

DEBIAN_FILES = {  # apt-get install fonts-noto-color-emoji unicode-cldr-core
    "NotoColorEmoji.ttf": Path("/usr/share/fonts/truetype/noto"),
    "en.xml": Path("/usr/share/unicode/cldr/common/annotations"),
}
FONT_FILE, NAMES_FILE = DEBIAN_FILES
FONT_SIZE, BITMAP_SIZE = 109, (136, 128)  # the only size that the font has bitmaps of

LICENCES = Path(__file__).resolve().parent / "licences"
EMOJI_LICENCES = ("noto-color-emoji.txt", "unicode-cldr.txt")
EMOJI_NOTICE = """\
The weights and statistics were computed from pictures of the font Noto Color Emoji
(https://github.com/googlefonts/noto-emoji, Copyright 2013-2022 Google Inc., SIL Open Font License 1.1, in
`noto-color-emoji.txt`), with their names in Unicode CLDR (https://cldr.unicode.org, Copyright © 1991-2022 Unicode,
Inc., Unicode licence, in `unicode-cldr.txt`). Noto is a trademark of Google Inc. Neither Google nor Unicode, Inc. has
anything to do with this work.
"""

ANIMALS = (
    "🐵🐒🦍🦧🐶🐕🐩🐺🦊🦝🐱🐈🦁🐯🐅🐆🐴🐎🦄🦓🦌🦬🐮🐂🐄🐷🐖🐗🐏🐑🐐🐪🦙🦒🐘🦣🦏🦛🐭🐁🐹🐰🐇🐿🦫🦔🦇🐻🐨🐼🦥🦦🦨🦘🦡"
    "🦃🐔🐓🐣🐤🐦🐧🕊🦅🦆🦢🦉🦤🦩🦚🦜🐸🐊🐢🦎🐍🐉🦕🐋🐬🦭🐟🐠🐡🦈🐙🐚🪸🐌🦋🐛🐜🐝🪲🐞🕷🦂🪱🦀🦞🦐🦑"
)
PLANTS = "💐🌸🪷🌹🥀🌺🌻🌼🌷🌱🪴🌲🌳🌴🌵🌾🌿🍀🍁🍂🍄🌰"
FOOD = (
    "🍇🍈🍉🍊🍋🍌🍍🥭🍎🍏🍐🍑🍒🍓🫐🥝🍅🫒🥥🥑🍆🥔🥕🌽🌶🫑🥒🥬🥦🧄🧅🥜🍞🥐🥖🥨🥯🥞🧇🧀🍖🍗🥩🥓🍔🍟🍕🌭🥪🌮🌯🥚🍳"
    "🍲🥣🥗🍿🧈🧂🥫🍱🍙🍛🍜🍝🍠🍣🍤🍡🥟🥠🥡🍦🍧🍨🍩🍪🎂🍰🧁🥧🍫🍬🍭🍮🍯🍼🥛☕🫖🍶🍷🍸🍹🍺🥤🧋🧃🧊"
)
VEHICLES = "🚂🚃🚅🚆🚇🚝🚌🚑🚒🚓🚕🚗🚙🛻🚚🚜🏎🏍🛵🛺🚲🛹⛵🛶🚤🚢⛴✈🚁🛰🚀🛸🛷"
CHARACTERS = ANIMALS + PLANTS + FOOD + VEHICLES

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 49),
    "orange": (243, 156, 57),
    "yellow": (250, 222, 89),
    "green": (70, 160, 73),
    "blue": (65, 105, 225),
    "purple": (142, 68, 173),
    "white": (245, 245, 245),
    "black": (24, 24, 24),
}
WITHOUT_ARTICLE = frozenset(
    "bacon|baguette bread|blueberries|bread|broccoli|bubble tea|butter|candy|canned food|cherries|coral|curry rice|"
    "french fries|garlic|grapes|ice|ice cream|meat on bone|pancakes|peanuts|popcorn|sake|salt|shaved ice|"
    "soft ice cream|spaghetti|sushi".split("|")
)  # plurals, and what is not counted

SIZE, GLYPH_WIDTH = 32, 28  # pixels of a picture, and of the emoji in it
MAX_SHIFT = 2  # pixels, from the middle, in both directions
HELD_OUT_EVERY = 16


def copy_emoji_licences(folder: Path) -> None:
    """Put the licences of the font and of the names into `folder`, beside what was computed from them."""
    for name in EMOJI_LICENCES:
        shutil.copyfile(LICENCES / name, folder / name)


# Names and captions


def read_names(path: Path) -> dict[str, str]:
    """Return the English name of each character, as an annotation file of CLDR has it for reading aloud."""
    annotations = xml.etree.ElementTree.parse(path).getroot().iter("annotation")
    return {entry.attrib["cp"]: entry.text or "" for entry in annotations if entry.get("type") == "tts"}


def caption(name: str, colour: str) -> str:
    """Return the prompt for an emoji on a background: "an ear of corn on red", "grapes on white"."""
    article = "" if name in WITHOUT_ARTICLE else "an " if name[0] in "aeio" else "a "
    return f"{article}{name} on {colour}"


def wanted(prompt: str) -> dict[str, str]:
    """Return what a picture of a `caption` has to show: {"emoji": "ear of corn", "colour": "red"}.

    Raises ValueError for a prompt that is no caption.
    """
    what, separator, colour = prompt.rpartition(" on ")
    if not separator or colour not in COLOURS:
        raise ValueError(f"prompt: expected 'a NAME on COLOUR' with one of {tuple(COLOURS)}, got {prompt!r}.")
    return {"emoji": what.removeprefix("an ").removeprefix("a "), "colour": colour}


def is_held_out(emoji: int, colour: int) -> bool:
    """Return whether a pair of places in the lists is never trained on: one pair in sixteen, by this rule alone."""
    return emoji % HELD_OUT_EVERY == colour


# Pictures


def load_emoji(folder: str | None = None) -> dict[str, Image.Image]:
    """Return the font's picture of each emoji of `CHARACTERS`, RGBA, by its name.

    `folder` holds NotoColorEmoji.ttf and CLDR's annotations, en.xml; without one those of Debian's packages are used.
    Raises FileNotFoundError where a file is missing.
    """
    paths = {name: Path(folder or debian) / name for name, debian in DEBIAN_FILES.items()}
    for path in paths.values():
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: not found. Install the packages fonts-noto-color-emoji and unicode-cldr-core of Debian, or "
                f"name a folder that holds {FONT_FILE} and {NAMES_FILE} with --train_data_dir."
            )
    font, names = ImageFont.truetype(paths[FONT_FILE], FONT_SIZE), read_names(paths[NAMES_FILE])
    pictures = {}
    for character in CHARACTERS:
        picture = Image.new("RGBA", BITMAP_SIZE)
        ImageDraw.Draw(picture).text((0, 0), character, font=font, embedded_color=True)
        pictures[names[character]] = picture
    return pictures


def glyphs_of(pictures: Mapping[str, Image.Image]) -> Tensor:
    """Return RGBA pictures in the middle of SIZE x SIZE pixels, MAX_SHIFT wider on each side: (E, 4, H, W) uint8."""
    size = SIZE + 2 * MAX_SHIFT
    glyphs = torch.zeros(len(pictures), 4, size, size, dtype=torch.uint8)
    for glyph, picture in zip(glyphs, pictures.values(), strict=True):
        height = min(GLYPH_WIDTH, round(GLYPH_WIDTH * picture.height / picture.width))
        small = picture.convert("RGBA").resize((GLYPH_WIDTH, height), Image.Resampling.LANCZOS)
        top, left = (size - height) // 2, (size - GLYPH_WIDTH) // 2
        glyph[:, top : top + height, left : left + GLYPH_WIDTH] = torch.from_numpy(np.array(small)).permute(2, 0, 1)
    return glyphs


def compose(glyphs: Tensor, colours: Tensor, top: Tensor, left: Tensor, mirrored: Tensor) -> Tensor:
    """Return the pictures (B, 3, SIZE, SIZE) uint8 of `glyphs` (B, 4, H, W) uint8 on `colours` (B, 3) uint8.

    `top` and `left` (B,), 0 to 2 MAX_SHIFT, say which part of a glyph is seen; `mirrored` (B,) bool, whether from
    behind.
    """
    corners = zip(glyphs, top.tolist(), left.tolist(), strict=True)
    seen = torch.stack([glyph[:, y : y + SIZE, x : x + SIZE] for glyph, y, x in corners]).float()
    seen = torch.where(mirrored[:, None, None, None], seen.flip(3), seen)
    alpha = seen[:, 3:] / 255
    return (alpha * seen[:, :3] + (1 - alpha) * colours.float()[:, :, None, None]).round().to(torch.uint8)


def prompted_emoji(pictures: Mapping[str, Image.Image], *, with_held_out: bool = False) -> PromptedPictures:
    """Return all pictures of the emoji: on each colour, at each shift, and mirrored.

    Pairs that are held out are not among them, unless `with_held_out`: for a classifier, which has to know them.
    """
    glyphs, names, colours = glyphs_of(pictures), tuple(pictures), tuple(COLOURS)
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)  # (8, 3)
    pairs = list(itertools.product(range(len(names)), range(len(colours))))
    drawn = torch.tensor([pair for pair in pairs if with_held_out or not is_held_out(*pair)])  # (P, 2)
    places = 2 * MAX_SHIFT + 1
    per_pair = 2 * places**2

    def draw(rows: Tensor) -> Tensor:
        emoji, colour = drawn[rows // per_pair].unbind(1)
        corner, mirrored = rows % per_pair // 2, rows % 2 == 1
        return compose(glyphs[emoji], palette[colour], corner // places, corner % places, mirrored)

    return PromptedPictures(
        draw=draw,
        prompts=[caption(names[emoji], colours[colour]) for emoji, colour in drawn.tolist()],
        choices=torch.arange(len(drawn) * per_pair).unsqueeze(1) // per_pair,
        held_out_prompts=[caption(names[e], colours[c]) for e, c in pairs if is_held_out(e, c)],
        labels={"emoji": names, "colour": colours},
        wanted=wanted,
    )
