"""Fashion-MNIST as tensors, from a local IDX folder or from the Hub, and its prompts: "a photo of a sneaker"."""

import gzip
from pathlib import Path

import numpy as np
import torch
from datasets import load_dataset
from prompted_pictures import PromptedPictures
from torch import Tensor

HUB_ID = "zalando-datasets/fashion_mnist"
DEBIAN_DIR = "/usr/share/datasets/fashion-mnist"  # apt-get install dataset-fashion-mnist
LICENCE_NOTICE = """\
The weights and statistics were computed from Fashion-MNIST (https://github.com/zalandoresearch/fashion-mnist):

The MIT License (MIT). Copyright © 2017 Zalando SE, https://tech.zalando.com

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and associated
documentation files (the "Software"), to deal in the Software without restriction, including without limitation the
rights to use, copy, modify, merge, publish, distribute, sublicense, and/or sell copies of the Software, and to permit
persons to whom the Software is furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or substantial portions of the
Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT NOT LIMITED TO THE
WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR
COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR
OTHERWISE, ARISING FROM, OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""
CLASSES = {  # of the labels 0 to 9; the first is what the data set calls them
    "T-shirt/top": "a t-shirt",
    "Trouser": "trousers",
    "Pullover": "a pullover",
    "Dress": "a dress",
    "Coat": "a coat",
    "Sandal": "a sandal",
    "Shirt": "a shirt",
    "Sneaker": "a sneaker",
    "Bag": "a bag",
    "Ankle boot": "an ankle boot",
}
TEMPLATES = ("{}", "a photo of {}", "a picture of {}", "an image of {}")
IDX_PREFIX = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array stored in a gzipped IDX file (LeCun et al., the MNIST format)."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: expected an IDX file of uint8 values (magic 00 00 08), got {data[:3].hex(' ')}.")
    num_dims = data[3]
    shape = np.frombuffer(data, ">i4", count=num_dims, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def idx_folder(data_dir: str | None = None) -> str | None:
    """Return the folder of IDX files: `data_dir`, or the Debian package's; `None` where the Hub has to be asked."""
    return DEBIAN_DIR if data_dir is None and Path(DEBIAN_DIR).is_dir() else data_dir


def load_split(split: str, data_dir: str | None = None) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 28, 28) uint8 and labels (N,) int64 of `split` ("train" or "test").

    `data_dir` is a folder of IDX files; without one the Debian package's folder is used where it exists, and the Hub
    data set otherwise.
    """
    folder = idx_folder(data_dir)
    if folder is not None:
        prefix = Path(folder) / IDX_PREFIX[split]
        images = read_idx(prefix.with_name(f"{prefix.name}-images-idx3-ubyte.gz"))
        labels = read_idx(prefix.with_name(f"{prefix.name}-labels-idx1-ubyte.gz"))
    else:
        rows = load_dataset(HUB_ID, split=split).with_format("numpy")
        images, labels = np.asarray(rows["image"]), np.asarray(rows["label"])
    return torch.from_numpy(images.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))


def wanted(prompt: str) -> dict[str, str]:
    """Return what a picture of `prompt` has to show: {"class": "Sneaker"} for "a photo of a sneaker".

    Raises ValueError for a prompt that is none of this data set's.
    """
    for label, words in CLASSES.items():
        if prompt in [template.format(words) for template in TEMPLATES]:
            return {"class": label}
    raise ValueError(f"prompt: expected one of {TEMPLATES} with one of {tuple(CLASSES.values())}, got {prompt!r}.")


def prompted_fashion(data_dir: str | None = None) -> PromptedPictures:
    """Return the training split with four prompts for each picture; `data_dir` as in `load_split`."""
    images, labels = load_split("train", data_dir)
    return PromptedPictures(
        draw=lambda rows: images[rows],
        prompts=[template.format(words) for words in CLASSES.values() for template in TEMPLATES],
        choices=labels.unsqueeze(1) * len(TEMPLATES) + torch.arange(len(TEMPLATES)),
        held_out_prompts=(),
        labels={"class": tuple(CLASSES)},
        wanted=wanted,
    )
