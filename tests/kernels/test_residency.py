"""Specification of what of a layer's weights stays in memory: int8 copies, and nothing that a file has, too."""

import mmap
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusers_pqcad import PQCADConfig, kernels, quantize_
from diffusers_pqcad.kernels.native import residency
from diffusers_pqcad.kernels.x86 import library
from diffusers_pqcad.layers.find import packed_layers

LARGE = 3 * 2**20
gives_back = pytest.mark.skipif(not residency.PAGEMAP.exists(), reason="this system cannot say where a page is")


@pytest.fixture
def mapped(tmp_path: Path) -> Tensor:
    """A tensor that safetensors maps from a file, all of it read once."""
    save_file({"before": torch.ones(3), "codes": torch.arange(LARGE).to(torch.uint8)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        codes = file.get_tensor("codes")
    assert codes.sum() > 0
    return codes


def pages_in_memory(tensor: Tensor) -> int:
    """How many pages that lie in `tensor` as a whole are in memory now."""
    return count_pages(-(-tensor.data_ptr() // mmap.PAGESIZE), (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE)


def pages_between(first: Tensor, last: Tensor) -> int:
    """How many pages from the start of `first` to the end of `last` are in memory now."""
    return count_pages(first.data_ptr() // mmap.PAGESIZE, -(-(last.data_ptr() + last.nbytes) // mmap.PAGESIZE))


def count_pages(start: int, stop: int) -> int:
    """How many of the pages of these numbers are in memory now."""
    with residency.PAGEMAP.open("rb") as file:
        file.seek(8 * start)
        entries = file.read(8 * (stop - start))
    return sum(entries[8 * page + 7] >> 7 for page in range(stop - start))


@gives_back
def test_what_a_file_has_is_given_back_and_read_again(mapped: Tensor) -> None:
    assert pages_in_memory(mapped) > LARGE // mmap.PAGESIZE - 2
    given_back = residency.give_back_(mapped)
    assert LARGE - 2 * mmap.PAGESIZE <= given_back <= LARGE
    assert pages_in_memory(mapped) == 0
    assert torch.equal(mapped, torch.arange(LARGE).to(torch.uint8))
    assert pages_in_memory(mapped) > LARGE // mmap.PAGESIZE - 2


@gives_back
@pytest.mark.parametrize("place", [5000, LARGE // 2, LARGE - 5000])
def test_what_was_written_is_kept(mapped: Tensor, place: int) -> None:
    mapped[place] = 7
    assert residency.give_back_(mapped) == 0
    assert mapped[place] == 7
    assert pages_in_memory(mapped) > LARGE // mmap.PAGESIZE - 2


@gives_back
@pytest.mark.parametrize("num_bytes", [0, 1, mmap.PAGESIZE - 1, LARGE])
def test_what_is_in_no_file_is_kept(num_bytes: int) -> None:
    tensor = torch.arange(num_bytes).to(torch.uint8)
    assert residency.give_back_(tensor) == 0
    assert torch.equal(tensor, torch.arange(num_bytes).to(torch.uint8))


@gives_back
def test_the_rest_of_the_file_stays(tmp_path: Path) -> None:
    """Pages that hold a neighbour's bytes, too, are not touched."""
    save_file(
        {name: torch.full((LARGE,), value, dtype=torch.uint8) for value, name in enumerate("abc")}, tmp_path / "x"
    )
    with safe_open(tmp_path / "x", "pt") as file:
        first, middle, last = (file.get_tensor(name) for name in "abc")
    assert [int(each.max()) for each in (first, middle, last)] == [0, 1, 2]
    held, inside = pages_between(first, last), pages_in_memory(middle)
    residency.give_back_(middle)
    assert held - pages_between(first, last) == inside == LARGE // mmap.PAGESIZE - 1


def test_where_nothing_is_known_nothing_is_given_back(
    mapped: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency, "PAGEMAP", tmp_path / "nowhere")
    assert residency.give_back_(mapped) == 0
    (tmp_path / "short").write_bytes(b"")
    monkeypatch.setattr(residency, "PAGEMAP", tmp_path / "short")
    assert residency.give_back_(mapped) == 0


@pytest.mark.parametrize("size", [(3, 5), (2, 3, 64, 4096)], ids=str)
def test_copies_are_tensors_as_any(size: tuple[int, ...]) -> None:
    copies = residency.empty(size, torch.int8)
    assert (copies.shape, copies.dtype, copies.is_contiguous()) == (size, torch.int8, True)
    copies.copy_(torch.arange(copies.numel()).view(size))
    views = copies[1:].clone(), copies[1:]
    del copies
    assert torch.equal(*views)


@gives_back
def test_large_copies_have_pages_of_their_own() -> None:
    copies = residency.empty((LARGE,), torch.int8).fill_(1)
    assert copies.data_ptr() % mmap.PAGESIZE == 0
    assert pages_in_memory(copies) == LARGE // mmap.PAGESIZE


def convolutions(model: UNet2DModel) -> list[Tensor]:
    """The packed weights of the larger layers."""
    return [layer.qweight for layer in packed_layers(model).values() if layer.qweight.nbytes > 4 * mmap.PAGESIZE]


@gives_back
@pytest.mark.skipif(isinstance(library.library(), str), reason="the kernel is not here")
@torch.no_grad()
def test_a_loaded_model_keeps_its_copies_alone_and_can_be_saved_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    give_back_, given_back = residency.give_back_, []
    monkeypatch.setattr(residency, "give_back_", lambda tensor: given_back.append(give_back_(tensor)))
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(64, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    quantize_(unet, PQCADConfig(method="fixed", weight_bits=8))
    unet.save_pretrained(tmp_path / "packed")
    inputs = torch.randn(1, 1, 8, 8), torch.tensor(5)
    outputs = {}
    for memory in ("low", "normal"):
        loaded: Any = UNet2DModel.from_pretrained(tmp_path / "packed")
        assert len(convolutions(loaded)) > 5
        with kernels.use(memory=memory):
            outputs[memory] = loaded(*inputs).sample
            held = sum(map(pages_in_memory, convolutions(loaded)))
            assert (held == 0) == (sum(given_back) > 0) == (memory == "normal")
            assert torch.equal(loaded(*inputs).sample, outputs[memory])  # nor are they read again
            assert sum(map(pages_in_memory, convolutions(loaded))) == held
    assert torch.equal(outputs["normal"], outputs["low"])
    loaded.save_pretrained(tmp_path / "again")
    name = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "packed" / name).read_bytes()


def test_the_heap_is_trimmed_once_for_so_many_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    trims: list[int] = []
    monkeypatch.setattr(residency, "malloc_trim", lambda: trims.append)
    heap, share = residency.Heap(), residency.TRIMMED_BYTES // 4
    for _ in range(9):
        heap.grew(share)
    assert trims == [0, 0]
    monkeypatch.setattr(residency, "malloc_trim", lambda: None)  # another C library
    for _ in range(9):
        heap.grew(share)
    assert trims == [0, 0]


@pytest.mark.skipif(residency.malloc_trim() is None, reason="this C library keeps what is free")
def test_holes_between_what_stays_are_given_back() -> None:
    """Of blocks that are too small for pages of their own, each second one is let go of."""
    blocks = [torch.zeros(2**14) for _ in range(2048)]
    kept = blocks[::2]
    del blocks
    before = own_bytes()
    residency.Heap().grew(residency.TRIMMED_BYTES)
    assert before - own_bytes() > 2**14 * 4 * 1024 * 0.8
    assert all(int(block.sum()) == 0 for block in kept)


def own_bytes() -> int:
    """Memory of this process that no file has."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])
