"""Verify that a whole store is what was written.

``verify`` compares every digest. It checks that every shard has labels, that labels sum
to one, that boxes lie inside their images, and that no file is foreign.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from cache.errors import DamagedStore, UnreadableStore
from cache.format import codec as codecs
from cache.format.codec_bounds import plausible
from cache.format.manifest import USABLE, Images
from cache.format.schema import RECORD_MAGIC
from cache.reader import LabelStore

# relative tolerance for a record's entropy, which another machine may have computed
STATISTICS = 1e-6


@dataclass
class Finding:
    """A fault that was found: in a shard, with the shard's place, or in another file,
    with the file's path in the store."""

    what: str
    view: int | None = None
    shard: int | None = None
    first_row: int | None = None
    last_row: int | None = None
    file: str | None = None

    def __str__(self) -> str:
        place = (
            self.file
            if self.view is None
            else f"view {self.view}, rows {self.first_row} to {self.last_row}"
        )
        return f"{place}: {self.what}"


@dataclass
class Verdict:
    """The result of ``verify``.

    missing: shards without a label yet, which no record promises. damaged: shards and
    files that are not what the store promises.
    """

    shards: int = 0
    checked: int = 0
    labelled: int = 0
    damaged: list[Finding] = field(default_factory=list)
    missing: list[Finding] = field(default_factory=list)
    unread: list[Finding] = field(default_factory=list)  # can't be read for the moment
    foreign: list[str] = field(default_factory=list)  # files that are no part of a store
    # unfinished files of a process that was killed, or is writing now
    left: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Return whether everything could be read, and nothing is damaged or foreign.
        Shards may be missing."""
        return not (self.damaged or self.unread or self.foreign)

    @property
    def complete(self) -> bool:
        """Return whether the shards were looked at, and none is missing."""
        return self.shards > 0 and not self.missing

    def document(self) -> dict[str, Any]:
        """Return the verdict as a document for JSON."""
        return {"sound": self.sound, "complete": self.complete, **asdict(self)}


def verify(
    path: Path, *, threads: int = 1, progress: Callable[[int], None] = lambda shards: None
) -> Verdict:
    """Read every file of a store, and compare it with what was written.

    threads: each needs the memory of one shard, some 32 MiB of codes. progress: called
    with the number of shards that were read since the last call. Raises StoreError if
    there is no store at ``path``, or a store of another version.
    """
    verdict = Verdict()
    try:
        store = LabelStore.open(path)
        images = store.images
    except DamagedStore as error:  # nothing else can be checked without the description
        verdict.damaged.append(Finding(error.fault, file=error.file))
        return verdict
    for name in (*store.shard_arrays, "records"):
        if (views := store.array(name).shape[0]) != store.views:
            verdict.damaged.append(
                Finding(
                    f"it says {views} views, the store has {store.views}", file=f"{name}/zarr.json"
                )
            )
    if not store.consolidated_is_right():
        verdict.damaged.append(
            Finding(
                "its consolidated metadata, which other programs may read, says something else "
                "than the arrays' own files; generate-labels takes it away, "
                "zarr.consolidate_metadata makes it anew",
                file="zarr.json",
            )
        )
    finished = store.finished()
    verdict.shards = finished.size
    verdict.foreign, verdict.left = _others(store)

    def look(place: tuple[int, int]) -> tuple[Finding | None, list[Finding], int]:
        view, shard = place
        kind, labelled = verdict.damaged, 0
        try:
            fault, labelled = (
                _shard(store, images, view, shard)
                if finished[place]
                else (_unfinished(store, view, shard), 0)
            )
        except UnreadableStore as error:
            kind, fault = verdict.unread, str(error)
        return _at(store, view, shard, fault) if fault else None, kind, labelled

    places = [(int(view), int(shard)) for view, shard in np.ndindex(finished.shape)]
    with ThreadPoolExecutor(threads) as pool:
        for place, (finding, kind, labelled) in zip(places, pool.map(look, places), strict=True):
            view, shard = place
            if finding is not None:
                kind.append(finding)
            elif not finished[place]:
                lost = store.file("labels", view, shard).exists()
                what = "without a completion record, so what is there doesn't count"
                what = what if lost else "not labelled yet"
                verdict.missing.append(_at(store, view, shard, what))
            verdict.checked += bool(finished[place]) and kind is not verdict.unread
            verdict.labelled += labelled
            progress(1)
    return verdict


def _at(store: LabelStore, view: int, shard: int, what: str) -> Finding:
    rows = store.shard_slice(shard)
    return Finding(what, view, shard, rows.start, rows.stop - 1)


def _unfinished(store: LabelStore, view: int, shard: int) -> str | None:
    """Return why a shard without a good record, or without the files of its record, is
    damaged and not just missing; None if the shard was never finished."""
    record = store.record(view, shard)
    if record["magic"] == RECORD_MAGIC:
        return "files that its completion record speaks of are missing, empty or of another size"
    file = store.file("records", view, shard)
    if store.has_record(view, shard):
        return (
            f"its completion record ({file.relative_to(store.path)}) is damaged, or of another "
            f"place"
        )
    return None


def _shard(store: LabelStore, images: Images, view: int, shard: int) -> tuple[str | None, int]:
    """Return (what is wrong with a finished shard or None, the number of its labelled
    rows)."""
    content, fault = store.content(view, shard)
    if fault or content is None:
        return fault, 0
    rows = store.shard_slice(shard)
    here = images.take(np.arange(rows.start, rows.stop))
    usable = here.status == USABLE
    codes = content.codes
    labelled, entropy, agreeing = 0, 0.0, 0
    # chunk by chunk, since a whole decoded shard takes gigabytes
    for first in range(0, len(codes), store.chunk_rows):
        part = slice(first, first + store.chunk_rows)
        given = np.asarray(codes[part].any(axis=1))
        if not np.array_equal(given, usable[part]):
            row = int(np.argmax(given != usable[part]))
            return (
                f"row {rows.start + first + row} "
                f"{'has a label and no usable image' if given[row] else 'has no label'}",
                0,
            )
        sound = plausible(store.codec, codes[part][given])
        if not sound.all():
            row = np.flatnonzero(given)[np.argmin(sound)]
            return f"the label of row {rows.start + first + row} does not sum to one", 0
        probabilities = store.codec.decode(codes[part][given])
        labelled += int(given.sum())
        entropy += codecs.entropy(probabilities).sum()
        agreeing += int((probabilities.argmax(axis=1) == here.class_index[part][given]).sum())
    record = store.record(view, shard)
    if (labelled, agreeing) != (record["labelled"], record["agreeing"]) or abs(
        entropy - record["entropy"]
    ) > STATISTICS * max(1, entropy):
        return "its completion record counts other labels than there are", 0
    return None, labelled


def _others(store: LabelStore) -> tuple[list[str], list[str]]:
    """Return (files that are no part of the store, unfinished files), as paths in the
    store."""
    names = (*store.shard_arrays, "records")
    fixed = {
        "zarr.json",
        "images/zarr.json",
        *(f"{name}/zarr.json" for name in names),
        *store.manifest_files(),
    }
    fixed |= {f"images/{column.name}/zarr.json" for column in fields(Images)}
    foreign: list[str] = []
    left: list[str] = []
    for folder, folders, files in os.walk(store.path):
        for file in files + [
            name for name in folders if os.path.islink(os.path.join(folder, name))
        ]:
            path = Path(folder, file).relative_to(store.path).as_posix()
            if path not in fixed and not _is_shard(store, path, names):
                (left if file.endswith(".partial") else foreign).append(path)
    return sorted(foreign), sorted(left)


def _is_shard(store: LabelStore, path: str, names: tuple[str, ...]) -> bool:
    name, *place = path.split("/")
    if name not in names or len(place) < 3 or not all(part.isdecimal() for part in place[1:3]):
        return False
    view, shard = int(place[1]), int(place[2])
    return (
        view < store.views
        and shard < store.shards
        and store.file(name, view, shard) == store.path / path
    )
