"""Work beside other work: an iterator that a thread runs ahead of whoever wants its
items, and a thread that deals with items behind whoever makes them. Both are bounded,
and neither thread outlives its context, whatever fails."""

from __future__ import annotations

import os
import queue
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar

from cache.system.signals import finishing, hurried

SWITCH = 1e-3  # seconds after which a thread that wants the interpreter gets it
T = TypeVar("T")
_END = object()


def share_the_interpreter() -> None:
    """Let threads change places more often than Python does by itself (5 ms), since the
    one that feeds the device should not wait for the others."""
    sys.setswitchinterval(min(SWITCH, sys.getswitchinterval()))


@contextmanager
def ahead(items: Iterable[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """Iterate over ``items`` in a thread that stays at most ``depth`` items ahead.

    An error in the thread is raised where the item would have come. Leaving the context
    stops and joins the thread, whatever happened.
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
            except queue.Empty:  # not yet; or never, once the context has been left
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
    """Give items away to a thread that deals with them in their order; at most
    ``depth`` of them wait: ``with behind(write) as give: give(item)``.

    An error of the thread is raised where the next item is given away, or at the end;
    what waits then is dropped. Leaving the context waits until what was given away has
    been dealt with, also when an error elsewhere is the reason. When a signal is, it
    waits for the one item in hand, and after a second signal for nothing.
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
                except BaseException as error:  # handed to whoever gives, where it is raised
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
    """Decoder threads: as told, or as many as this process may use, at most 16;
    torchrun's processes of a machine share its cores."""
    return threads or max(
        1, min(16, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    )
