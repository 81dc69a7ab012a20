"""Stop when a scheduler or a person asks for it. SIGTERM and Ctrl-C have the same
effect, and neither interrupts work that should be finished.

A signal raises Stopped in the main thread at once, wherever the thread is, so that a
long wait or a forward pass ends. A ``finishing`` block would be left half done, so
there Stopped is raised at the end of the block.

Python obeys a signal only between two of its own steps. A main thread that waits within
a library, for a disk or a process that doesn't answer, is deaf. So a thread watches,
and ends the process after ``DEAF`` seconds, as a kill would.

Stopped can be lost: Python only prints an exception that is raised in a destructor or
in a callback of a weak reference, and goes on. Then the next ``check``, which long
loops call, raises Stopped again.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

DEAF = 20.0  # seconds that a signal may go unheard; schedulers kill after 30 or so
_finishing = 0  # number of ``finishing`` blocks that the main thread is in
_asked: int | None = None  # the signal that asked to stop; None before
_hurried = False  # whether another signal came after it


class Stopped(KeyboardInterrupt):
    """The exception for a signal that asks the process to stop. The message is the
    signal's name."""


@contextmanager
def on_signals(deaf: Callable[[str], object] = lambda name: None) -> Iterator[None]:
    """Raise Stopped on SIGTERM (which SLURM, Kubernetes and torchrun send first) and on
    SIGINT, in the main thread, which must be the caller's.

    deaf: called with the signal's name before a process ends that hasn't heard it for
    ``DEAF`` seconds; what is finished stays, as after a kill.
    """
    global _asked, _hurried
    _asked, _hurried = None, False
    before = {number: signal.signal(number, _handle) for number in (signal.SIGTERM, signal.SIGINT)}
    with _watched(deaf):
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            _asked, _hurried = None, False


@contextmanager
def _watched(deaf: Callable[[str], object]) -> Iterator[None]:
    """Watch that the main thread hears signals. The system writes a byte for every
    signal that arrives, even while Python can't run."""
    arriving, bell = os.pipe()
    os.set_blocking(bell, False)
    before = signal.set_wakeup_fd(bell, warn_on_full_buffer=False)
    left = threading.Event()

    def watch() -> None:
        arrived = 0
        with open(arriving, "rb", buffering=0) as signals:
            while number := signals.read(1):
                if number[0] not in (signal.SIGTERM, signal.SIGINT):
                    continue
                arrived += 1
                left.wait(DEAF)
                if not left.is_set() and not (_asked if arrived == 1 else _hurried):
                    deaf(signal.Signals(number[0]).name)
                    os._exit(1)

    thread = threading.Thread(target=watch, daemon=True)
    try:
        thread.start()
        yield
    finally:
        left.set()
        signal.set_wakeup_fd(before)
        os.close(bell)


def _leave_the_bell() -> None:
    """Keep a forked child from ringing the bell of its parent for signals of its
    own."""
    with suppress(ValueError):  # in another interpreter
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_leave_the_bell)


@contextmanager
def finishing() -> Iterator[None]:
    """Let the block finish before a signal raises Stopped. The block must take seconds
    at most. A second signal is obeyed at once."""
    global _finishing
    if threading.current_thread() is not threading.main_thread():  # no signal is raised there
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
    """Raise Stopped if a signal asked for it, and Stopped is not on its way already.
    Loops of the main thread call this function; in other threads it does nothing."""
    if _asked is None or _finishing or threading.current_thread() is not threading.main_thread():
        return
    error = sys.exc_info()[1]
    while error is not None:
        if isinstance(error, Stopped):  # this code is a clean-up after Stopped
            return
        error = error.__context__
    raise Stopped(signal.Signals(_asked).name)


def asked() -> bool:
    """Return whether a signal asked to stop, for threads, in which none is raised."""
    return _asked is not None


def hurried() -> bool:
    """Return whether a second signal came, after which nothing is waited for."""
    return _hurried


def _handle(number: int, frame: FrameType | None) -> None:
    global _asked, _hurried
    _hurried, _asked = _asked is not None, number
    if _finishing and not _hurried:
        return
    while frame is not None:
        if frame.f_code.co_name == "__del__":  # Python would only print Stopped here
            return
        frame = frame.f_back
    # A call of Zarr that the signal interrupts may leave a coroutine that never began.
    warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    raise Stopped(signal.Signals(number).name)
