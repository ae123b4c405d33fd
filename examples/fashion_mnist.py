"""Fashion-MNIST as tensors, from a local IDX folder or from the Hub."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HUB_ID = "zalando-datasets/fashion_mnist"
DEBIAN_DIR = "/usr/share/datasets/fashion-mnist"  # apt-get install dataset-fashion-mnist
IDX_PREFIX = {"train": "train", "test": "t10k"}


def read_idx(path: Path) -> np.ndarray:
    """Return the uint8 array stored in a gzipped IDX file (LeCun et al., the MNIST format)."""
    data = gzip.decompress(path.read_bytes())
    if data[:3] != b"\x00\x00\x08":
        raise ValueError(f"{path}: expected an IDX file of uint8 values (magic 00 00 08), got {data[:3].hex(' ')}.")
    num_dims = data[3]
    shape = np.frombuffer(data, ">i4", count=num_dims, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * num_dims).reshape(shape)


def load_split(split: str, data_dir: str | None = None) -> tuple[Tensor, Tensor]:
    """Return images (N, 1, 28, 28) uint8 and labels (N,) int64 of `split` ("train" or "test").

    `data_dir` is a folder of IDX files; without one the Debian package's folder is used where it exists, and the Hub
    data set otherwise.
    """
    if data_dir is None and Path(DEBIAN_DIR).is_dir():
        data_dir = DEBIAN_DIR
    if data_dir is not None:
        prefix = Path(data_dir) / IDX_PREFIX[split]
        images = read_idx(prefix.with_name(f"{prefix.name}-images-idx3-ubyte.gz"))
        labels = read_idx(prefix.with_name(f"{prefix.name}-labels-idx1-ubyte.gz"))
    else:
        from datasets import load_dataset

        rows = load_dataset(HUB_ID, split=split).with_format("numpy")
        images, labels = np.asarray(rows["image"]), np.asarray(rows["label"])
    return torch.from_numpy(images.copy()).unsqueeze(1), torch.from_numpy(labels.astype(np.int64))
