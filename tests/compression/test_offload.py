"""Specification of tensors that wait on disk: the same numbers, resident only while they are used."""

import copy
import mmap
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from diffusers_pqcad.compression import offload
from diffusers_pqcad.compression.checkpoint import clone_state, model_hash
from diffusers_pqcad.compression.offload import (
    Store,
    offload_,
    offloaded,
    release_,
    sharing_copy,
    store_in,
    waiting_copy,
)

pytestmark = pytest.mark.fast
SMAPS = Path("/proc/self/smaps")
needs_smaps = pytest.mark.skipif(not SMAPS.exists(), reason="Linux tells what is resident")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "waiting")


def resident_bytes(folder: Path) -> int:
    """What of the unnamed files in `folder` is in this process's memory."""
    total, is_ours = 0, False
    for line in SMAPS.read_text().splitlines():
        name, _, value = line.partition(":")
        if "-" in name:  # the first line of a mapping
            is_ours = str(folder) in line
        elif name == "Rss" and is_ours:
            total += 1024 * int(value.split()[0])
    return total


def outputs(model: UNet2DModel) -> Tensor:
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model(sample, torch.tensor([3, 700]))[0]


def is_mapped(module: nn.Module) -> bool:
    return all("pages" in vars(parameter) for parameter in module.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64])
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (3, 4, 5)])
def test_a_mapped_copy_has_the_same_numbers(store: Store, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    found = store.put(tensor)
    assert found.dtype == dtype
    assert torch.equal(found, tensor)
    found.zero_()
    assert not bool(release_(found).any())  # what was written is kept


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_mapped_tensor_is_laid_out_as_torchs(store: Store, layout: torch.memory_format) -> None:
    parts = [torch.rand(count, 4, 3, 2).contiguous(memory_format=layout) for count in (3, 5)]
    joined, order = torch.cat(parts), torch.randperm(8)
    for found, expected in (
        (store.put(parts[0]), parts[0]),
        (store.put(parts[0].transpose(1, 2)), parts[0].transpose(1, 2)),
        (store.put(parts[0][:, ::2]), parts[0][:, ::2].clone()),
        (store.cat(parts), joined),
        (store.cat([store.put(part) for part in parts]), joined),
        (store.rows(joined, order), joined[order]),
    ):
        assert torch.equal(found, expected)
        assert found.stride() == expected.stride()


def test_two_tensors_share_no_page_and_begin_as_fresh_ones_do(store: Store) -> None:
    pages = [vars(store.put(torch.ones(3)))["pages"] for _ in range(2)]
    assert pages[0].start + mmap.PAGESIZE == pages[1].start
    assert store.put(torch.ones(5)).data_ptr() % 64 == 0  # kernels take other paths, and round otherwise


def test_a_tensor_larger_than_a_file_gets_one_of_its_own(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "ARENA_BYTES", 2 * mmap.PAGESIZE)
    tensors = [torch.rand(count) for count in (100, 100, 5_000, 100)]
    mapped = list(map(store.put, tensors))
    assert all(map(torch.equal, mapped, tensors))
    assert len({id(vars(tensor)["pages"].file) for tensor in mapped}) == 3


def test_rows_and_joins_are_torchs(store: Store) -> None:
    parts = [torch.rand(count, 2, 3) for count in (5, 1, 4)]
    joined, order = store.cat(parts), torch.randperm(10)
    assert torch.equal(joined, torch.cat(parts))
    assert torch.equal(store.rows(joined, order, batch_size=3), joined[order])


def test_nothing_with_a_name_is_left(store: Store) -> None:
    kept = store.put(torch.ones(10))
    assert not list(store.folder.iterdir())
    assert kept.sum() == 10


@needs_smaps
def test_what_is_released_is_not_resident(store: Store) -> None:
    tensor = store.put(torch.ones(2**20))
    assert resident_bytes(store.folder) == 0
    assert tensor.sum() == 2**20
    assert resident_bytes(store.folder) == 2**22
    release_({"a": [tensor]})
    assert resident_bytes(store.folder) == 0
    assert tensor.sum() == 2**20


def test_an_offloaded_model_computes_the_same_bits(tiny_unet: UNet2DModel, store: Store) -> None:
    model = copy.deepcopy(tiny_unet)
    parameters = dict(model.named_parameters())
    assert offload_(model, store) is model
    assert is_mapped(model)
    assert torch.equal(outputs(model), outputs(tiny_unet))
    assert model_hash(model) == model_hash(tiny_unet)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())  # an optimizer has them


@needs_smaps
def test_an_offloaded_model_is_resident_in_its_parts_calls_alone(store: Store) -> None:
    model = nn.Sequential(*(nn.Linear(512, 512, bias=False) for _ in range(4)))
    offload_(model, store)
    seen: list[int] = []
    for layer in model:
        layer.register_forward_pre_hook(lambda *_: seen.append(resident_bytes(store.folder)))
    with torch.no_grad():
        model(torch.ones(1, 512))
    # A layer has 1 MiB. The kernel maps up to 16 pages around one that is read, those of the next layer among them.
    assert max(seen) < 2**16
    assert resident_bytes(store.folder) < 2**16


def test_a_copy_of_an_offloaded_model_is_in_memory(tiny_unet: UNet2DModel, store: Store) -> None:
    model = copy.deepcopy(offload_(copy.deepcopy(tiny_unet), store))
    assert not any("pages" in vars(parameter) for parameter in model.parameters())
    assert torch.equal(outputs(model), outputs(tiny_unet))


def test_inside_the_block_a_model_trains_as_in_memory_and_after_it_is_there(store: Store) -> None:
    def trained(where: Store | None) -> tuple[nn.Sequential, dict[str, Tensor]]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(6, 5), nn.GroupNorm(1, 5), nn.Linear(5, 2))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        with offloaded(model, where):
            assert is_mapped(model) == (where is not None)
            for _ in range(3):
                model(torch.ones(4, 6)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return model, clone_state(model)

    (model, found), (_, expected) = trained(store), trained(None)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not any(
        "pages" in vars(parameter) or part._forward_hooks for part in model for parameter in part.parameters()
    )


def test_a_waiting_copy_leaves_the_model_alone(tiny_unet: UNet2DModel, store: Store) -> None:
    copied = waiting_copy(tiny_unet, store)
    assert is_mapped(copied)
    assert not any("pages" in vars(parameter) for parameter in tiny_unet.parameters())
    assert torch.equal(outputs(copied), outputs(tiny_unet))
    with torch.no_grad():
        next(copied.parameters()).zero_()
    assert next(tiny_unet.parameters()).any()
    assert not any(module._forward_hooks for module in tiny_unet.modules())
    assert not is_mapped(waiting_copy(tiny_unet, None))


def test_a_sharing_copy_takes_no_memory_and_leaves_gradients_alone(tiny_unet: UNet2DModel) -> None:
    copied = sharing_copy(tiny_unet)
    ours, theirs = dict(copied.named_parameters()), dict(tiny_unet.named_parameters())
    assert {name: p.data_ptr() for name, p in ours.items()} == {name: p.data_ptr() for name, p in theirs.items()}
    assert not any(p.requires_grad for p in ours.values())
    assert copied.conv_in is not tiny_unet.conv_in


def test_without_a_folder_nothing_is_offloaded(tiny_unet: UNet2DModel) -> None:
    assert store_in(None) is None
    assert offload_(tiny_unet, None) is tiny_unet
    assert not any("pages" in vars(parameter) for parameter in tiny_unet.parameters())


@pytest.mark.skipif(not hasattr(offload.os, "posix_fallocate"), reason="POSIX reserves the space of a file")
def test_a_full_disk_is_an_error_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(offload.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        store.put(torch.ones(3))
