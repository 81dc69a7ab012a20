"""Writing a label store: whole shards only, the data first, the completion record
last."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import zarr

from cache.errors import BusyStore, StoreError
from cache.format import codec as codecs
from cache.format import schema, seal
from cache.format.crops import Crops
from cache.format.manifest import USABLE
from cache.format.schema import CROP_ARRAYS, RECORD, RECORD_MAGIC
from cache.reader import LabelStore
from cache.system import durable
from cache.system.claims import Claims, claim, claims_of


class StoreWriter:
    """Writes shards of an existing store. Only the holder of a shard's claim may write
    it (``claimed``)."""

    def __init__(self, path: Path) -> None:
        self.store = LabelStore.open(path)
        self.path = path
        self.group = zarr.open_group(str(path), mode="r+", zarr_format=3, use_consolidated=False)
        self.claims = claims_of(path)
        self._held: dict[str, Claims] = {}  # by claim

    def grow(self, views: int) -> None:
        """Lengthen the view axis to ``views``; never shortens it. What was stopped half
        way before is put right too.

        The number of views that counts is an attribute, and changes last (in stores
        before format 3: the length of ``records``).
        """
        with claim(self.claims, "grow") as mine:
            if not mine:
                raise BusyStore(
                    f"{self.path} is being extended by another process right now; run this command "
                    f"again in a minute"
                )
            views = max(views, LabelStore.open(self.path).views)
            documents = seal.read_metadata(self.path, self.store.shard_arrays[1:])
            for left in (
                file for document in documents for file in self.path.glob(f"{document}.*.partial")
            ):
                left.unlink()
            for name in (*self.store.shard_arrays, "records"):
                file = f"{name}/zarr.json"
                if documents[file]["shape"][0] != views:
                    documents[file]["shape"][0] = views
                    durable.replace_file(
                        self.path / file, json.dumps(documents[file], indent=2).encode()
                    )
            attributes = documents["zarr.json"]["attributes"]
            if attributes.get("views", views) != views:
                attributes["views"] = views
                seal.write_seal(self.path, documents)
        self.store = LabelStore.open(self.path)
        self.group = zarr.open_group(
            str(self.path), mode="r+", zarr_format=3, use_consolidated=False
        )

    def tidy(self) -> None:
        """Remove what a killed process left half written of the store's own
        description, and wrong consolidated metadata, unless another is at it."""
        left = [
            file
            for pattern in ("*.partial", "*/*.partial", "images/**/*.partial")
            for file in self.path.glob(pattern)
        ]
        stale = not self.store.consolidated_is_right()
        if left or stale:
            with claim(self.claims, "create", "grow") as mine:
                for file in left if len(mine) == 2 else ():
                    file.unlink(missing_ok=True)
                if stale and len(mine) == 2:
                    seal.write_seal(
                        self.path, seal.read_metadata(self.path, self.store.shard_arrays[1:])
                    )

    @property
    def uneven(self) -> bool:
        """Whether an array has another length than the store's number of views: a
        growth was stopped half way, or a number flipped."""
        return any(
            self.store.array(name).shape[0] != self.store.views
            for name in (*self.store.shard_arrays, "records")
        )

    @contextmanager
    def claimed(self, views: list[int], shard: int) -> Iterator[list[int]]:
        """Hold the shard in those of the views that nobody else holds and that are
        still unfinished; gives that list."""
        with claim(self.claims, *(f"{view}-{shard}" for view in views)) as mine:
            self._held |= dict.fromkeys(mine, mine)
            try:
                yield [
                    view
                    for view in views
                    if f"{view}-{shard}" in mine and not self.store.is_finished(view, shard)
                ]
            finally:
                for name in mine:
                    self._held.pop(name, None)

    def discard(self, view: int, shard: int) -> bool:
        """Take the record of a shard away that is not what was written, so that it is
        written again. False if another process is at it already, or has made it
        anew."""
        with claim(self.claims, f"{view}-{shard}") as mine:
            if not mine or not self.store.fault(view, shard):
                return False
            self._clear("records", view, shard)
            return True

    def discard_damaged(self, shard: int, views: int, say: Callable[[str], None]) -> None:
        """Read a shard again in those of the first views in which it is finished, and
        take the record away where it is not what was written."""
        for view in range(views):
            if (
                self.store.is_finished(view, shard)
                and (fault := self.store.fault(view, shard))
                and self.discard(view, shard)
            ):
                say(f"{self.store.place(view, shard)}: damaged, and will be made anew: {fault}")

    def write(self, view: int, shard: int, codes: np.ndarray, crops: Crops) -> None:
        """Store one whole shard of one view: codes as ``codec.encode`` gives them,
        zeros where unusable, and the crops [rows].

        The files are written, renamed and forced to the disk before the record is, so
        that a record never speaks of lost data. Raises StoreError if a usable row has
        no label, or an unusable one has; BusyStore if another process has taken the
        shard's claim over.
        """
        held = self._held.get(f"{view}-{shard}")
        if held is not None and held.lost(f"{view}-{shard}"):
            raise BusyStore(
                f"view {view}, shard {shard} of {self.path} was taken over by another process "
                f"while this one slept; its labels are dropped"
            )
        rows = self.store.shard_slice(shard)
        images = self.store.images
        usable = images.status[rows] == USABLE
        labelled = codes.any(axis=1)
        if not np.array_equal(labelled, usable):
            row = int(np.argmax(labelled != usable))
            raise StoreError(
                f"view {view}, {images.path[rows][row]}: "
                f"{'no label for a usable' if usable[row] else 'a label for an unusable'} image"
            )
        names = self.store.shard_arrays
        dtypes = (self.store.codec.dtype, *(CROP_ARRAYS[name][0] for name in names[1:]))
        parts = [
            codes[:, : self.store.classes],
            *crops.arrays(),
            *([codes[:, -1]] if "tail" in names else []),
        ]
        content = [
            np.ascontiguousarray(part, dtype) for part, dtype in zip(parts, dtypes, strict=True)
        ]
        # first: a record of what was there must not vouch for what is being written
        self._clear("records", view, shard)
        for name, block in zip(names, content, strict=True):
            self._clear(name, view, shard)
            schema.array(self.group, name)[view, rows] = block
            self._sync(name, view, shard)
        record = np.zeros(1, RECORD)
        record["magic"], record["view"], record["shard"] = RECORD_MAGIC, view, shard
        record["labelled"] = usable.sum()
        # by chunks: a decoded shard takes gigabytes
        for first in range(0, len(codes), self.store.chunk_rows):
            part = slice(first, first + self.store.chunk_rows)
            probabilities = self.store.codec.decode(codes[part][usable[part]])
            record["entropy"] += codecs.entropy(probabilities).sum()
            record["agreeing"] += (
                (probabilities.argmax(axis=1) == images.class_index[rows][part][usable[part]])
                .sum()
                .astype("u4")
            )
        record["stored_bytes"] = self.store.file("labels", view, shard).stat().st_size
        record["digest"] = np.frombuffer(
            schema.shard_digest(self.store.identity, view, shard, *content), "u1"
        )
        schema.array(self.group, "records")[view, shard] = record.view("u1")
        self._sync("records", view, shard)

    def _clear(self, name: str, view: int, shard: int) -> None:
        """Remove what a crash left: Zarr reads a shard before it writes it, torn or
        not, and never cleans up its own unfinished files."""
        file = self.store.file(name, view, shard)
        for left in (file, *file.parent.glob(f"{file.name}.*.partial")):
            left.unlink(missing_ok=True)
        if file.parent.exists():
            durable.sync_folder(file.parent)

    def _sync(self, name: str, view: int, shard: int) -> None:
        file = self.store.file(name, view, shard)
        durable.sync_file(file)
        for folder in file.parents:  # up to the array's own folder, which exists since creation
            durable.sync_folder(folder)
            if folder == self.path / name:
                break
