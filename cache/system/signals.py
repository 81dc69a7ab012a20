"""Stopping when a scheduler or a person asks for it: SIGTERM is Ctrl-C, and neither
comes in the middle of what should be finished.

A signal raises Stopped in the main thread at once, wherever that is, so that a long
wait or a forward pass ends. Where that would leave something half done, in
``finishing``, it is raised at the end of the block. Where it is lost, since Python only
prints what is raised in a destructor or in a callback of a weak reference and goes on,
the next ``check``, which long loops call, raises it again.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_finishing = 0  # how many ``finishing`` blocks the main thread is in
_asked: int | None = None  # the signal that asked to stop, from then on
_hurried = False  # whether another one came after it


class Stopped(KeyboardInterrupt):
    """A signal that asks the process to stop. The message is its name."""


@contextmanager
def on_signals() -> Iterator[None]:
    """Raise Stopped in the main thread, which must be the caller's, on SIGTERM (what
    SLURM, Kubernetes and torchrun send first) and on SIGINT."""
    global _asked, _hurried
    _asked, _hurried = None, False
    before = {number: signal.signal(number, _handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        _asked, _hurried = None, False


@contextmanager
def finishing() -> Iterator[None]:
    """Let this block be finished first. It must take seconds at most. A second signal
    is obeyed at once."""
    global _finishing
    if threading.current_thread() is not threading.main_thread():  # where no signal is raised
        yield
        return
    _finishing += 1
    try:
        yield
    finally:
        _finishing -= 1
        if not _finishing:
            check()


def check() -> None:
    """Raise Stopped if a signal asked for it and it isn't being obeyed. For loops of
    the main thread; elsewhere it does nothing."""
    if _asked is None or _finishing or threading.current_thread() is not threading.main_thread():
        return
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, Stopped):  # this is a clean-up on its way out
            return
        error = error.__context__
    raise Stopped(signal.Signals(_asked).name)


def hurried() -> bool:
    """Whether a second signal came: nothing is to be waited for any more."""
    return _hurried


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked, _hurried
    _hurried, _asked = _asked is not None, number
    if _finishing and not _hurried:
        return
    while frame is not None:
        if frame.f_code.co_name == "__del__":  # where it would only be printed
            return
        frame = frame.f_back
    raise Stopped(signal.Signals(number).name)
