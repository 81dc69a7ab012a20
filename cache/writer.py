"""Writing a label store: whole shards only, the data first, the completion record last."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import zarr

from cache import codec as codecs
from cache import schema
from cache.claims import claim, claims_of
from cache.reader import LabelStore
from cache.schema import StoreError


class StoreWriter:
    """Writes shards of an existing store. Only the holder of a shard's claim may write it (``claimed``)."""

    def __init__(self, path: Path) -> None:
        self.store = LabelStore.open(path)
        self.path = path
        self.group = zarr.open_group(str(path), mode="r+", zarr_format=3)
        self.claims = claims_of(path)

    def grow(self, views: int) -> None:
        """Lengthen the view axis to ``views``; never shortens it. ``records`` grows last, and its length is what counts."""
        with claim(self.claims, "grow") as mine:
            if not mine:
                raise StoreError(f"{self.path} is being extended by another process right now; run this command again in a minute")
            for name in ("labels", *self.store.crop_arrays, "records"):
                array = schema.array(self.group, name)
                if array.shape[0] < views:
                    array.resize((views, *array.shape[1:]))
                    schema.sync_file(self.path / name / "zarr.json")
                    schema.sync_folder(self.path / name)
        self.store = LabelStore.open(self.path)

    @contextmanager
    def claimed(self, views: list[int], shard: int) -> Iterator[list[int]]:
        """Hold the shard in those of the views that nobody else holds and that are still unfinished; gives that list."""
        with claim(self.claims, *(f"{view}-{shard}" for view in views)) as mine:
            finished = self.store.finished(shard) if mine else ()
            yield [view for view in views if f"{view}-{shard}" in mine and not finished[view]]

    def write(self, view: int, shard: int, codes: np.ndarray, *kept: np.ndarray) -> None:
        """Store one whole shard of one view: codes [rows, classes], zeros where unusable, and the arrays of ``store.crop_arrays`` in their
        order: boxes int32 [rows, 4], flips bool [rows]; with CutMix also mix_partner int32 [rows] and mix_box float32 [rows, 4].

        The files are written, renamed and forced to the disk before the record is, so that a record never speaks of lost data.
        Raises StoreError if a usable row has no label, or an unusable one has.
        """
        rows = self.store.shard_slice(shard)
        images = self.store.images
        usable = images.status[rows] == schema.USABLE
        labelled = codes.any(axis=1)
        if not np.array_equal(labelled, usable):
            row = int(np.argmax(labelled != usable))
            raise StoreError(
                f"view {view}, {images.path[rows][row]}: {'no label for a usable' if usable[row] else 'a label for an unusable'} image"
            )
        names = ("labels", *self.store.crop_arrays)
        dtypes = (self.store.codec.dtype, *(schema.CROP_ARRAYS[name][0] for name in self.store.crop_arrays))
        codes, *kept = (block.astype(dtype, copy=False) for block, dtype in zip((codes, *kept), dtypes, strict=True))
        self._clear("records", view, shard)  # first: a record of what was there must not vouch for what is being written
        for name, block in zip(names, (codes, *kept), strict=True):
            self._clear(name, view, shard)
            schema.array(self.group, name)[view, rows] = block
            self._sync(name, view, shard)
        record = np.zeros(1, schema.RECORD)
        record["magic"], record["view"], record["shard"] = schema.RECORD_MAGIC, view, shard
        record["labelled"] = usable.sum()
        for first in range(0, len(codes), self.store.chunk_rows):  # by chunks: a decoded shard takes gigabytes
            part = slice(first, first + self.store.chunk_rows)
            probabilities = self.store.codec.decode(codes[part][usable[part]])
            record["entropy"] += codecs.entropy(probabilities).sum()
            record["agreeing"] += (probabilities.argmax(axis=1) == images.class_index[rows][part][usable[part]]).sum().astype("u4")
        record["stored_bytes"] = self.store.file("labels", view, shard).stat().st_size
        record["digest"] = np.frombuffer(schema.shard_digest(self.store.identity, view, shard, codes, *kept), "u1")
        schema.array(self.group, "records")[view, shard] = record.view("u1")
        self._sync("records", view, shard)

    def _clear(self, name: str, view: int, shard: int) -> None:
        """Remove what a crash left: Zarr reads a shard before it writes it, torn or not, and never cleans up its own unfinished files."""
        file = self.store.file(name, view, shard)
        for left in (file, *file.parent.glob(f"{file.name}.*.partial")):
            left.unlink(missing_ok=True)
        if file.parent.exists():
            schema.sync_folder(file.parent)

    def _sync(self, name: str, view: int, shard: int) -> None:
        file = self.store.file(name, view, shard)
        schema.sync_file(file)
        for folder in file.parents:  # up to the array's own folder, which exists since creation
            schema.sync_folder(folder)
            if folder == self.path / name:
                break


def stored_bytes(path: Path) -> int:
    """Bytes of all files of a store."""
    return sum(os.path.getsize(os.path.join(folder, name)) for folder, _, names in os.walk(path) for name in names)
