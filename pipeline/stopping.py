"""Stopping when a scheduler or a person asks for it: SIGTERM is Ctrl-C, and neither comes in the middle of what should be finished."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_finishing = 0  # how many ``finishing`` blocks the main thread is in
_pending: list[int] = []


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to stop. The message is its name."""


@contextmanager
def on_signals() -> Iterator[None]:
    """Raise Stopped in the main thread, which must be the caller's, on SIGTERM (what SLURM, Kubernetes and torchrun send first) and on SIGINT."""
    before = {number: signal.signal(number, _handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def finishing() -> Iterator[None]:
    """Let this block be finished first. It must take seconds at most. A second signal is obeyed at once."""
    global _finishing
    _finishing += 1
    try:
        yield
    finally:
        _finishing -= 1
        if _pending and not _finishing:
            raise Stopped(signal.Signals(_pending.pop()).name)


def _handle(number: int, frame: FrameType | None) -> None:
    if _finishing and not _pending:
        _pending.append(number)
    else:
        _pending.clear()
        raise Stopped(signal.Signals(number).name)
