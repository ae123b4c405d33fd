"""Ctrl-C and SIGTERM: at once where little is lost, and after the next checkpoint where training would be.

`compress` puts its work into these blocks; a training of your own may, too. Without them signals do what they do
anywhere, and a kill loses what was done since the last checkpoint.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from diffusers_pqcad.compression.processes import everywhere

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SHELL = 128  # what a shell adds to the number of the signal that ended a process


class Stopped(KeyboardInterrupt):
    """A run was asked to stop by `signal_number`, and left files that it goes on from."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_code = SHELL + signal_number


_asked: list[int] = []  # the signals that arrived since a `stopping_at_checkpoints` began


@contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Let `handler` take Ctrl-C and SIGTERM inside the block; nothing in other threads than the main one."""
    if threading.current_thread() is not threading.main_thread():  # Python has no handlers there
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, signal.SIG_DFL if old is None else old)  # None: one that was not set by Python


def stop_now(signal_number: int, frame: Any = None) -> NoReturn:
    """Raise Stopped."""
    raise Stopped(signal_number)


def stopping_at_once() -> Any:
    """Let SIGTERM end what is inside the block as Ctrl-C does, by Stopped: files are written whole or not at all."""
    return handled(stop_now)


@contextmanager
def stopping_at_checkpoints() -> Iterator[None]:
    """Let trainings inside the block write a checkpoint when they are asked to stop; a second signal stops at once.

    Where they ended before they saw it, Stopped is raised at the end of the block.
    """

    def note(signal_number: int, frame: Any) -> None:
        if _asked:
            stop_now(signal_number)
        _asked.append(signal_number)
        logger.warning(
            "%s: stopping after the next checkpoint; a second one stops at once, and goes on from the one before.",
            signal.Signals(signal_number).name,
        )

    _asked.clear()
    try:
        with handled(note):
            yield
            stop_where_asked()
    finally:
        _asked.clear()


def asked_to_stop() -> int | None:
    """Return the signal that asked one of the processes to stop, None where none did; they have to ask together.

    To be asked once for each decision: a signal may arrive at any time.
    """
    return next((number for numbers in everywhere(list(_asked)) for number in numbers), None)


def stop_where_asked() -> None:
    """Raise Stopped in all processes where one of them was asked to stop."""
    signal_number = asked_to_stop()
    if signal_number is not None:
        stop_now(signal_number)
