"""Specification of forks: a forked process computes, whatever ran in its parent before, as gunicorn --preload needs.

GNU's OpenMP keeps threads for the next loop; in a forked process they are missing.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from forks import in_fork, in_fork_of
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from diffusers_pqcad import PQCADConfig, quantize_, requantize_
from diffusers_pqcad.kernels.native import weights

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork") or isinstance(weights.library(), str), reason="without compiled code, no thread is started"
)
W8, W4 = (PQCADConfig(method="fixed", weight_bits=bits) for bits in (8, 4))


@torch.no_grad()
def compute(model: UNet2DModel) -> Tensor:
    return model(torch.zeros(2, 1, 8, 8), 10).sample


def quantize(model: UNet2DModel, folder: Path) -> UNet2DModel:
    return quantize_(model, W8)


def requantize(model: UNet2DModel, folder: Path) -> UNet2DModel:
    return requantize_(quantize_(model, W8), W4)


def load(model: UNet2DModel, folder: Path) -> UNet2DModel:
    return UNet2DModel.from_pretrained(folder / "float", quantization_config=W8).eval()


def load_packed(model: UNet2DModel, folder: Path) -> UNet2DModel:
    return UNet2DModel.from_pretrained(folder / "packed").eval()


def call(model: UNet2DModel, folder: Path) -> UNet2DModel:
    compute(quantize_(model, W8))
    return model


def in_float(model: UNet2DModel, folder: Path) -> UNet2DModel:
    """PyTorch's own loops, after code of ours was loaded."""
    torch.randn(2**20).sin()
    return model


@pytest.mark.parametrize("act", [quantize, requantize, load, load_packed, call, in_float])
def test_a_forked_process_computes_what_its_parent_does(
    act: Callable[[UNet2DModel, Path], UNet2DModel], tiny_unet: UNet2DModel, tmp_path: Path
) -> None:
    tiny_unet.save_pretrained(tmp_path / "float")
    load(tiny_unet, tmp_path).save_pretrained(tmp_path / "packed")

    def parent() -> Callable[[], Tensor]:
        model = act(tiny_unet, tmp_path)
        return lambda: compute(model) + torch.randn(2**20).sin().sum() * 0  # sines on all threads, of PyTorch

    torch.testing.assert_close(*in_fork_of(parent))


def test_any_thread_may_fork(tiny_unet: UNet2DModel) -> None:
    """OpenMP keeps other threads for each; those of the first one are not waited for."""

    def parent() -> Callable[[], Tensor]:
        call(tiny_unet, Path())
        pool = ThreadPoolExecutor(1)

        def fork_in_a_thread() -> Tensor:
            compute(tiny_unet)
            return in_fork(lambda: compute(tiny_unet), seconds=40)

        return lambda: pool.submit(fork_in_a_thread).result(timeout=50)

    torch.testing.assert_close(*in_fork_of(parent))


def test_workers_of_a_data_loader_may_quantize(tiny_unet: UNet2DModel) -> None:
    def parent() -> Callable[[], Tensor]:
        quantize_(tiny_unet, W8)

        def images(batch: list[tuple[Tensor, ...]]) -> Tensor:
            torch.set_num_threads(2)
            return compute(tiny_unet)

        loader = DataLoader(TensorDataset(torch.zeros(2)), 1, num_workers=2, collate_fn=images, timeout=40)
        return lambda: torch.cat(list(loader))

    forked, own = in_fork_of(parent)
    torch.testing.assert_close(forked, own)
    torch.testing.assert_close(forked[:2], forked[2:])
