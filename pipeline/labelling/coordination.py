"""Agree with the other workers of a store who creates, extends or repairs it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cache.errors import BusyStore, DamagedStore, StoreError
from cache.system.claims import claim, claims_of, held
from cache.system.signals import check as check_signals
from cache.system.signals import finishing
from cache.writer import StoreWriter
from pipeline.runtime.progress import duration, say

PATIENCE = 600.0  # seconds that a worker waits for worker 0 to show up


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which store it was that could not be written: a failed write has no file's
    name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise StoreError(
            f"{path} can't be written ({error.strerror or error}); make room, or mend that, and "
            f"run the same command again: what is finished stays"
        ) from None


def opened(path: Path) -> tuple[StoreWriter | None, str | None]:
    """The store, or what is wrong with its description, which says nothing of its
    labels."""
    try:
        writer = StoreWriter(path)
        _ = writer.store.images
    except DamagedStore as damage:
        return None, str(damage)
    return writer, None


def grown(writer: StoreWriter, views: int, leads: bool) -> StoreWriter:
    """The store with ``views`` views at least, and every array of that length."""

    def grown(writer: StoreWriter) -> bool:
        return views <= writer.store.views and not (leads and writer.uneven)

    path = writer.path
    while not grown(writer):
        if leads:
            if views > writer.store.views:
                say(f"extending {path} from {writer.store.views} to {views} views")
            with suppress(BusyStore), finishing():
                writer.grow(views)
        if not grown(writer):  # another process does it, or is to do it
            wait(path, "grow", lambda: grown(StoreWriter(path)), leads)
            writer = StoreWriter(path)
    return writer


def once(
    path: Path,
    what: str,
    done: Callable[[], bool],
    do: Callable[[], None],
    leads: bool,
    *besides: str,
) -> None:
    """Have one process do something that only one can do: this one, if it leads and
    nobody else is at it, or at what it must not meet (``besides``); otherwise wait for
    it."""
    while not done():
        if leads:
            with claim(claims_of(path), what, *besides) as mine:
                if len(mine) == 1 + len(besides) and not done():
                    do()
        if not done():
            wait(path, what, done, leads, *besides)


def wait(path: Path, what: str, done: Callable[[], bool], leads: bool, *besides: str) -> None:
    """Wait until another process has done what only one does, while it is alive. One
    that leads goes on when it is not, to do it itself; others give worker 0 some time
    to start."""
    patience = time.monotonic() + PATIENCE
    say(f"waiting for {'another process' if leads else 'worker 0'} to {what} {path}")
    while not done():
        time.sleep(0.5)
        check_signals()
        if any(held(claims_of(path), name) for name in (what, *besides)):
            patience = time.monotonic() + PATIENCE
        elif leads:
            return
        elif time.monotonic() > patience:
            raise StoreError(
                f"nobody has begun to {what} {path} in {duration(PATIENCE)}; start worker 0, or "
                f"look at what it printed"
            )
