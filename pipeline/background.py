"""Work ahead: run an iterator in a thread, a bounded number of items before they are wanted."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
_END = object()


@contextmanager
def ahead(items: Iterable[T], depth: int = 2) -> Iterator[Iterator[T]]:
    """Iterate over ``items`` in a thread that stays at most ``depth`` items ahead.

    An error in the thread is raised where the item would have come. Leaving the context stops and joins the thread, whatever happened.
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
