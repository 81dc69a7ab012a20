"""Stopping when a scheduler or a person asks for it: SIGTERM is Ctrl-C, and neither comes in the middle of what should be finished.

A signal raises Stopped in the main thread at once, wherever that is, so that a long wait or a forward pass ends. Where that would be lost, in a destructor,
or would leave something half done, in ``finishing``, it is raised later: at the end of the block, or by the next ``check``, which long loops call.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_finishing = 0  # how many ``finishing`` blocks the main thread is in
_asked: int | None = None  # the signal that asked to stop


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to stop. The message is its name."""


@contextmanager
def on_signals() -> Iterator[None]:
    """Raise Stopped in the main thread, which must be the caller's, on SIGTERM (what SLURM, Kubernetes and torchrun send first) and on SIGINT."""
    global _asked
    _asked = None
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
    if threading.current_thread() is not threading.main_thread():  # where no signal is raised
        yield
        return
    _finishing += 1
    try:
        yield
    finally:
        _finishing -= 1
        check()


def check() -> None:
    """Raise Stopped if a signal asked for it and could not be obeyed then. For loops of the main thread; elsewhere it does nothing."""
    global _asked
    if _asked is not None and not _finishing and threading.current_thread() is threading.main_thread():
        number, _asked = _asked, None
        raise Stopped(signal.Signals(number).name)


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked
    later = bool(_finishing) and _asked is None
    while frame is not None and not later:
        later = frame.f_code.co_name == "__del__"  # Python prints what is raised there, and goes on
        frame = frame.f_back
    if later:
        _asked = number
    else:
        _asked = None
        raise Stopped(signal.Signals(number).name)
