"""Specification of the kernels' memory: it stays with a thread, and grows; what is very large does not stay."""

import threading
import weakref

import pytest
import torch

from diffusers_pqcad.kernels import scratch

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_kept", threading.local())


def test_it_is_kept_and_grows() -> None:
    first = scratch.buffer(100)
    assert (first.dtype, first.device.type) == (torch.uint8, "cpu")
    assert scratch.buffer(50) is first
    assert scratch.buffer(101).numel() >= 101
    assert scratch.buffer(100) is scratch.buffer(101)


def test_what_is_very_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "KEPT_BYTES", 1000)
    kept = scratch.buffer(1000)
    large = weakref.ref(scratch.buffer(1001))
    assert large() is None
    assert scratch.buffer(10) is kept


def test_threads_have_their_own_until_they_end() -> None:
    mine, others = scratch.buffer(100), []

    def ask() -> None:
        buffer = scratch.buffer(100)
        others.append((buffer.data_ptr(), weakref.ref(buffer)))

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    [(address, buffer)] = others
    assert address != mine.data_ptr()
    assert buffer() is None
    assert scratch.buffer(100) is mine
