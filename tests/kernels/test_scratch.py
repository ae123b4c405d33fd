"""Specification of the kernels' memory: given back it is used again, of all threads together only so much is kept."""

import threading
import weakref
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from diffusers_pqcad import PQCADConfig, quantize_
from diffusers_pqcad.kernels.native import scratch
from diffusers_pqcad.kernels.x86.library import library

pytestmark = pytest.mark.fast


@pytest.fixture(autouse=True)
def _nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "_free", deque())


def kept_bytes() -> int:
    return sum(room.numel() for room in scratch._free)


def test_it_is_kept_and_grows() -> None:
    first = scratch.buffer(100)
    assert (first.dtype, first.device.type) == (torch.uint8, "cpu")
    scratch.give_back(first)
    assert scratch.buffer(50) is first
    scratch.give_back(first)
    larger = scratch.buffer(101)
    assert larger.numel() >= 101
    scratch.give_back(larger)
    assert scratch.buffer(100) is larger
    assert kept_bytes() == 0


def test_nobody_gets_what_another_call_has() -> None:
    scratch.give_back(scratch.buffer(100))
    first, second = scratch.buffer(100), scratch.buffer(100)
    assert first.data_ptr() != second.data_ptr()


def test_what_is_very_large_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "KEPT_BYTES", 1000)
    kept = scratch.buffer(1000)
    scratch.give_back(kept)
    large = scratch.buffer(1001)
    scratch.give_back(large)
    seen = weakref.ref(large)
    del large
    assert seen() is None
    assert scratch.buffer(10) is kept


def test_all_together_keep_no_more_than_one_may_and_the_oldest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scratch, "KEPT_BYTES", 1000)
    rooms = [scratch.buffer(400) for _ in range(4)]
    for room in rooms:
        scratch.give_back(room)
        assert kept_bytes() <= 1000
    assert scratch.buffer(400) is rooms[3]
    assert scratch.buffer(400) is rooms[2]


def test_what_is_not_given_back_is_freed() -> None:
    """As after an error."""
    room = scratch.buffer(100)
    seen = weakref.ref(room)
    del room
    assert seen() is None


@pytest.mark.skipif(isinstance(library(), str), reason="needs the kernel x86")
@torch.no_grad()
def test_many_threads_that_called_once_leave_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of a server; all of them are alive, and each kept its own."""
    model = quantize_(torch.nn.Sequential(torch.nn.Linear(512, 512)), PQCADConfig(method="fixed", weight_bits=8))
    x, num_threads = torch.randn(64, 512), 64
    expected = model(x)
    one = kept_bytes()
    assert one > 0
    monkeypatch.setattr(scratch, "KEPT_BYTES", 4 * one)
    have_called = threading.Barrier(num_threads)

    def call(_: int) -> bool:
        with torch.no_grad():
            is_right = torch.equal(model(x), expected)
        have_called.wait()
        return is_right and kept_bytes() <= 4 * one

    with ThreadPoolExecutor(num_threads) as pool:
        assert all(pool.map(call, range(num_threads)))
