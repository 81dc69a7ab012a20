"""List objects, and keep the listing, so that a start without the network goes on with
what is in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np

from pipeline.images.patience import DataError
from pipeline.images.sources import kept
from pipeline.images.sources.remote import store
from pipeline.images.sources.remote.persistence import persistently
from pipeline.images.sources.remote.store import Object, RemoteError
from pipeline.images.sources.remote.url import Url
from pipeline.runtime.progress import say
from pipeline.runtime.wording import counted

ASKERS = 32  # requests for single objects at once
BRIEF = 10.0  # seconds to try where a listing of an earlier start is kept

Found = tuple[list[Object], list[str]]


def listed(folder: Url) -> Found:
    """List the objects that lie directly in a folder of a bucket, and the names of the
    folders in it. Raises DataError."""
    file = kept.file_for("listing", "folder", folder.identity)
    return _or_kept(file, folder, lambda: store.listed(folder), lambda i, name: folder / name)


def found(urls: Sequence[Url]) -> list[Object]:
    """Ask for objects by name. In a bucket their folders are listed; a web server is
    asked for each, many at a time. Raises DataError if one isn't there."""
    folders = dict.fromkeys(url.parent for url in urls)
    if len(urls) > len(folders) and not any(url.is_web for url in urls):
        there = {one.url: one for folder in folders for one in listed(folder)[0]}
        if missing := [url for url in urls if url not in there]:
            raise DataError(
                f"there is no {missing[0]}, of {counted(len(urls), 'file')} that are named "
                f"({len(missing):,} of them aren't there); correct the pattern or the list"
            )
        return [there[url] for url in urls]
    file = kept.file_for("listing", "objects", *(url.identity for url in urls))
    return _or_kept(file, urls[0], lambda: (_heads(urls), []), lambda i, name: urls[i])[0]


def _heads(urls: Sequence[Url]) -> list[Object]:
    first = store.head(urls[0])  # a server that isn't there is found out once
    with ThreadPoolExecutor(ASKERS) as pool:
        try:
            several = pool.map(lambda url: persistently(partial(store.head, url), url), urls[1:])
            return [first, *several]
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _or_kept(
    file: Path, url: Url, ask: Callable[[], Found], named: Callable[[int, str], Url]
) -> Found:
    """Return what a store answers, and keep it. If nothing answers, return what was
    kept, and say so.

    named: makes the URL of the i-th kept name, since a URL may hold secrets and isn't
    kept.
    """
    columns = kept.kept(file)
    try:
        answer = persistently(ask, url, None if columns is None else BRIEF)
    except RemoteError as error:
        if columns is None or not error.unreachable:
            raise
        answer = _load(columns, named)
        say(
            f"{url} can't be reached ({error.why}); going on with its "
            f"{counted(len(answer[0]), 'file')} as listed before, as far as they are in the cache"
        )
        return answer
    kept.keep(file, _save(answer))
    return answer


def _save(answer: Found) -> dict[str, np.ndarray]:
    objects, folders = answer
    return {
        "name": kept.packed([one.url.name for one in objects]),
        "etag": kept.packed([one.etag for one in objects]),
        "about": np.array([(one.size, one.changed) for one in objects], np.int64).reshape(-1, 2),
        "folders": kept.packed(folders),
    }


def _load(columns: dict[str, np.ndarray], named: Callable[[int, str], Url]) -> Found:
    names, etags = (kept.unpacked(columns[key]).tolist() for key in ("name", "etag"))
    rows = zip(names, etags, columns["about"].tolist(), strict=True)
    objects = [
        Object(named(i, name), size, etag, changed)
        for i, (name, etag, (size, changed)) in enumerate(rows)
    ]
    return objects, kept.unpacked(columns["folders"]).tolist()
