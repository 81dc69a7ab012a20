"""Write a label store: only whole shards, first the data, then the completion
record."""

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
    """Writes shards of an existing store. Only the holder of a shard's claim
    (``claimed``) may write the shard."""

    def __init__(self, path: Path) -> None:
        self.store = LabelStore.open(path)
        if self.store.elsewhere:
            raise StoreError(
                f"{path} is the local copy of a shared store, which is only read; name another "
                f"store"
            )
        self.path = path
        self.group = zarr.open_group(str(path), mode="r+", zarr_format=3, use_consolidated=False)
        self.claims = claims_of(path)
        self._held: dict[str, Claims] = {}  # held claims by their name

    def grow(self, views: int) -> None:
        """Lengthen the view axis to ``views``; never shorten it. A growth that was
        stopped half way is completed, too.

        The number of views that counts is the attribute ``views``, which is changed
        last. In stores before format 3 the number is the length of ``records``. Raises
        BusyStore if another process is extending the store.
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
        """Remove half-written files of the store's description, which a killed process
        left, and wrong consolidated metadata. Nothing is removed while another process
        creates or extends the store."""
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
        """Return whether the length of an array differs from the store's number of
        views. The cause is a growth that was stopped half way, or a flipped bit."""
        return any(
            self.store.array(name).shape[0] != self.store.views
            for name in (*self.store.shard_arrays, "records")
        )

    @contextmanager
    def claimed(self, views: list[int], shard: int) -> Iterator[list[int]]:
        """Claim the shard in each of the views. Give the views that are unfinished and
        that no other process holds; release the claims at the end."""
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
        """Remove the record of a damaged shard, so that the shard is written again.
        Returns False if another process holds the shard, or has written it anew."""
        with claim(self.claims, f"{view}-{shard}") as mine:
            if not mine or not self.store.fault(view, shard):
                return False
            self._clear("records", view, shard)
            return True

    def discard_damaged(self, shard: int, views: int, say: Callable[[str], None]) -> None:
        """Read a shard again in those of the first ``views`` views in which it is
        finished, and remove its record where the shard is damaged."""
        for view in range(views):
            if (
                self.store.is_finished(view, shard)
                and (fault := self.store.fault(view, shard))
                and self.discard(view, shard)
            ):
                say(f"{self.store.place(view, shard)}: damaged, and will be made anew: {fault}")

    def write(self, view: int, shard: int, codes: np.ndarray, crops: Crops) -> None:
        """Write one whole shard of one view.

        codes: as ``codec.encode`` returns them, zeros where the image is unusable.
        crops: [rows].

        The data files are written, renamed and forced to the disk before the record, so
        that a record never promises lost data. Raises StoreError if a usable row has no
        label, or an unusable row has a label; BusyStore if another process has taken
        over the shard's claim.
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
        # Remove the old record first: it must not vouch for the data written below.
        self._clear("records", view, shard)
        for name, block in zip(names, content, strict=True):
            self._clear(name, view, shard)
            schema.array(self.group, name)[view, rows] = block
            self._sync(name, view, shard)
        record = np.zeros(1, RECORD)
        record["magic"], record["view"], record["shard"] = RECORD_MAGIC, view, shard
        record["labelled"] = usable.sum()
        # chunk by chunk, since a whole decoded shard takes gigabytes
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
        """Remove a shard's file, and unfinished files that a crash left. Zarr reads a
        shard before writing it, even a torn one, and never removes its own unfinished
        files."""
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
