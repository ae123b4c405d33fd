"""Forked processes, for tests: what they compute, or that they hang."""

import io
import multiprocessing
from collections.abc import Callable

import torch
from torch import Tensor


def in_fork(compute: Callable[[], Tensor], *, seconds: float = 60) -> Tensor:
    """What `compute` returns in a forked process; AssertionError where that fails, or takes longer than `seconds`."""
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def send() -> None:
        buffer = io.BytesIO()
        torch.save(compute(), buffer)
        sender.send_bytes(buffer.getvalue())

    process = multiprocessing.get_context("fork").Process(target=send)
    process.start()
    sender.close()
    try:
        assert receiver.poll(seconds), f"the forked process hangs for {seconds} s"
        return torch.load(io.BytesIO(receiver.recv_bytes()))
    except EOFError:
        raise AssertionError("the forked process failed; its traceback is above") from None
    finally:
        process.kill()
        process.join()


def in_fork_of(parent: Callable[[], Callable[[], Tensor]]) -> tuple[Tensor, Tensor]:
    """What the function that `parent` returns makes of a fork, and afterwards of itself, with two threads each.

    `parent` runs in a forked process, too: OpenMP has no threads there yet, and gets those that `parent` asks for.
    """

    def run() -> Tensor:
        torch.set_num_threads(2)
        compute = parent()
        return torch.stack([in_fork(compute), compute()])

    forked, own = in_fork(run, seconds=150)
    return forked, own
