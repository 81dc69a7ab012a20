"""Run requests in a thread of their own, so that a caller may stop waiting."""

from __future__ import annotations

import asyncio
import atexit
import os
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import TimeoutError as NotYet
from typing import Any, TypeVar

from cache.system.signals import Stopped, asked

T = TypeVar("T")
LOOK = 0.25  # seconds between two looks at whether a signal came
GRACE = 0.2  # seconds that Python's end waits for a request that has just ended

_lock = threading.Lock()
_latest = -1e9  # when a request ended
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a fork has no threads


def _loop() -> asyncio.AbstractEventLoop:
    """Return the loop in which all requests of this process run."""
    with _lock:
        if os.getpid() not in _loops:
            loop = asyncio.new_event_loop()
            thread = threading.Thread(target=loop.run_forever, daemon=True, name="network")
            thread.start()
            _loops[os.getpid()] = loop
            atexit.register(_end, loop, thread)
        return _loops[os.getpid()]


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    """Stop the loop before Python ends."""

    def stop() -> None:
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.call_soon(loop.stop)

    if thread.is_alive():
        loop.call_soon_threadsafe(stop)
        thread.join(LOOK)
    # A thread of obstore's that has just handed a result over lets go of it a moment
    # later. If Python ends before, the process aborts.
    if time.monotonic() - _latest < 1.0:
        time.sleep(GRACE)


def wait_for(request: Coroutine[Any, Any, T], halted: Callable[[], bool] = lambda: False) -> T:
    """Run a request and return its result.

    halted: says that the result isn't wanted any more. Then, and after a signal that
    asked to stop, the request is dropped and Stopped is raised, in any thread.
    """
    global _latest
    future = asyncio.run_coroutine_threadsafe(request, _loop())
    try:
        while True:
            if halted() or asked():
                raise Stopped("stopped while fetching")
            try:
                return future.result(LOOK)
            except NotYet:
                if future.done():  # an error of the request itself
                    raise
    except BaseException:
        future.cancel()
        raise
    finally:
        _latest = time.monotonic()
