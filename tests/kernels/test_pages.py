"""Specification of memory in large pages: asked for where tensors are large, inside of them, and nowhere else."""

import mmap

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_pqcad.kernels.native import pages

LARGE = pages.MAPPED_BYTES
asks = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no large pages to ask for")


@asks
def test_large_tensors_ask_and_small_ones_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int, int]] = []
    monkeypatch.setattr(pages, "madvise", lambda: lambda *args: calls.append(args))
    small = pages.empty((LARGE - 1,), dtype=torch.uint8)
    assert calls == []
    large = pages.empty((1, 8, 1024, LARGE // 2**15), dtype=torch.float32, memory_format=torch.channels_last)
    assert len(calls) == 1
    assert (small.shape, large.shape, large.dtype) == ((LARGE - 1,), (1, 8, 1024, LARGE // 2**15), torch.float32)
    assert large.is_contiguous(memory_format=torch.channels_last)


@asks
@given(address=st.integers(1, 2**40), num_bytes=st.integers(0, 2**30))
def test_whole_pages_inside_the_memory_are_asked_for(address: int, num_bytes: int) -> None:
    calls: list[tuple[int, int, int]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pages, "madvise", lambda: lambda *args: calls.append(args))
        pages.ask_for_large_pages(address, num_bytes)
    for start, length, advice in calls:
        assert start % pages.PAGE_BYTES == length % pages.PAGE_BYTES == 0 < length
        assert address <= start < start + length <= address + num_bytes
        assert advice == mmap.MADV_HUGEPAGE
    assert calls or num_bytes < 2 * pages.PAGE_BYTES


def test_without_large_pages_memory_is_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "madvise", lambda: None)
    assert pages.empty((LARGE,), dtype=torch.uint8).numel() == LARGE


def test_numbers_written_there_are_read_again() -> None:
    tensor = pages.empty((LARGE // 4 + 3,), dtype=torch.float32)
    tensor.copy_(torch.arange(len(tensor)))
    assert torch.equal(tensor, torch.arange(len(tensor), dtype=torch.float32))
