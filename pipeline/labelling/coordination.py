"""Coordinate the workers of a store: one creates, extends or repairs the store while
the others wait."""

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

PATIENCE = 600.0  # seconds that a worker waits for worker 0 to begin


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the store in the error of a failed write.

    A failed write raises an OSError without a file name. Such an OSError becomes a
    StoreError that names the store; every other error passes unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise StoreError(
            f"{path} can't be written ({error.strerror or error}); make room, or mend that, and "
            f"run the same command again: what is finished stays"
        ) from None


def require_place(path: Path) -> None:
    """Raise StoreError for a path that can't be a store's."""
    if not path.name:
        raise StoreError(f"{path} has no name of its own; name a folder in it for --store")
    if any(part.exists() and not part.is_dir() for part in path.parents):
        raise StoreError(
            f"{path} can't be made, since a part of it is a file; choose another --store"
        )


def opened(path: Path) -> tuple[StoreWriter | None, str | None]:
    """Open the store, or return the fault of its description (zarr.json files,
    manifest).

    Returns (writer, None) or (None, fault). A fault of the description says nothing
    about the labels.
    """
    try:
        writer = StoreWriter(path)
        _ = writer.store.images
    except DamagedStore as damage:
        return None, str(damage)
    return writer, None


def grown(writer: StoreWriter, views: int, leads: bool) -> StoreWriter:
    """Extend the store to at least ``views`` views, and return its writer.

    The worker that leads extends the store, and lengthens arrays that an interrupted
    extension left too short. The other workers wait for the leading worker.
    """

    def grown(writer: StoreWriter) -> bool:
        return views <= writer.store.views and not (leads and writer.uneven)

    path = writer.path
    while not grown(writer):
        if leads:
            if views > writer.store.views:
                say(f"extending {path} from {writer.store.views} to {views} views")
            with suppress(BusyStore), finishing():
                writer.grow(views)
        if not grown(writer):  # another process extends the store, or still has to
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
    """Run ``do`` in one process only, and return when ``done()`` is true.

    A process runs ``do`` if it leads and can claim the step ``what`` together with the
    steps ``besides``, which must not run at the same time. Every other process waits.
    """
    while not done():
        if leads:
            with claim(claims_of(path), what, *besides) as mine:
                if len(mine) == 1 + len(besides) and not done():
                    do()
        if not done():
            wait(path, what, done, leads, *besides)


def wait(path: Path, what: str, done: Callable[[], bool], leads: bool, *besides: str) -> None:
    """Wait until another process has done the step ``what``.

    A leading process stops waiting when no living process holds a claim on the step or
    on ``besides``; the caller then does the step. Other processes give worker 0
    ``PATIENCE`` seconds to begin. Raises StoreError if no process has begun by then.
    """
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
