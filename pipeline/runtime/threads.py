"""Run work in threads beside other work: an iterator ahead of its consumer (``ahead``),
or a function behind the producer of its items (``behind``).

Both queues are bounded. No thread outlives its context, whatever fails.
"""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from cache.system.signals import finishing, hurried
from pipeline.runtime.launch import number

SWITCH = 1e-3  # seconds after which a thread that wants the interpreter gets it
T = TypeVar("T")
_END = object()


def share_the_interpreter() -> None:
    """Let Python switch threads more often than by default (every 5 ms), so that the
    thread that feeds the device doesn't wait for the others."""
    sys.setswitchinterval(min(SWITCH, sys.getswitchinterval()))


@contextmanager
def ahead(items: Iterable[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """Iterate over ``items`` in a thread that stays at most ``depth`` items ahead.

    An error in the thread is raised in the consumer, in place of the next item. Leaving
    the context stops and joins the thread, whatever happened.
    """
    filled: queue.Queue = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(entry: tuple) -> bool:
        while not stop.is_set():
            try:
                filled.put(entry, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in items:
                if not put((item, None)):
                    break
            else:
                put((_END, None))
        except BaseException as error:  # handed to the consumer, which raises it
            put((_END, error))
        finally:
            close = getattr(items, "close", None)
            if close:
                close()

    def consume() -> Iterator[T]:
        while not stop.is_set():
            try:
                item, error = filled.get(timeout=1)
            except queue.Empty:  # not yet, or never if the context has been left
                continue
            if error is not None:
                raise error
            if item is _END:
                return
            yield item

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        yield consume()
    finally:
        stop.set()
        if thread.ident is not None:
            thread.join()


@contextmanager
def behind(deal_with: Callable[[T], object], depth: int = 2) -> Iterator[Callable[[T], None]]:
    """Handle items in a thread, in the order in which they are given::

        with behind(write) as give:
            give(item)

    At most ``depth`` items wait. If the thread fails, the next ``give`` or the end of
    the context raises the error, and items that still wait are dropped. Leaving the
    context waits until all given items are handled, also after an error in the context.
    After a signal it waits only for the item in hand, and after a second signal for no
    item.
    """
    waiting: queue.Queue = queue.Queue(maxsize=depth)
    failed: list[BaseException] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            try:
                item = waiting.get(timeout=0.1)
            except queue.Empty:
                continue
            if item is _END:
                return
            if not failed:
                try:
                    deal_with(item)
                except BaseException as error:  # handed to the producer, where give raises it
                    failed.append(error)

    def give(item: T | object) -> None:
        while not failed and not stop.is_set():
            try:
                return waiting.put(item, timeout=0.1)
            except queue.Full:
                continue
        if failed:
            raise failed[0]

    thread = threading.Thread(target=work, daemon=True)
    try:
        thread.start()
        try:
            yield give
        except KeyboardInterrupt:
            stop.set()
            raise
        finally:
            if not hurried():
                with finishing():
                    while thread.is_alive() and not stop.is_set():
                        with suppress(queue.Full):
                            waiting.put(_END, timeout=0.1)
                            break
                    thread.join()
    finally:
        stop.set()
    if failed:
        raise failed[0]


def threads_for(threads: int | None) -> int:
    """Return the number of decoder threads: ``threads``, or by default as many as this
    process may use, at most 16. torchrun's processes on a machine share its cores."""
    beside = number("LOCAL_WORLD_SIZE", 1, "the number of processes on this machine", least=1)
    return threads or max(1, min(16, len(os.sched_getaffinity(0)) // beside))
