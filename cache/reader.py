"""Read a label store: finished shards, labels as codes or probabilities, crops, and the
store's attributes."""

from __future__ import annotations

import math
import os
import stat
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import zarr

from cache import errors
from cache.errors import DamagedStore, StoreError, UnreadableStore
from cache.format import codec as codecs
from cache.format import schema, validate
from cache.format.codec_bounds import max_error
from cache.format.crops import BoxesAndFlips, Content, Crops, Mixes
from cache.format.manifest import USABLE, Images
from cache.format.schema import FORMAT, LOOKS, RECORD, RECORD_MAGIC, SEALED, VERSIONS
from cache.format.seal import only_its_version_is_wrong, read_document, read_metadata, require_seal
from cache.hub.address import is_hub
from cache.hub.copy import Copy, here
from cache.system.local import require_local

Rows = np.ndarray | slice | Sequence[int]
# raised for a wrong checksum, a truncated file or a missing file
UNREADABLE = (KeyError, ValueError, RuntimeError, TypeError, OverflowError, OSError)
_short_of_memory = threading.Lock()


class Elsewhere(Protocol):
    """A place that holds shards which the store lacks, and gives them when they are
    read.

    remedy, absent: what to do about a damaged shard, and about one that it lacks too.
    """

    @property
    def remedy(self) -> str: ...

    @property
    def absent(self) -> str: ...

    def has(self, view: int, shard: int) -> bool:
        """Return whether it holds a shard."""
        ...

    def fetch(self, view: int, shard: int, *, anew: bool = False) -> None:
        """Put the files of a shard into the store, unless they are there. anew: replace
        them, since one is damaged."""
        ...


class LabelStore:
    """An open label store, which reads everything lazily. Reading the labels of a shard
    without a completion record raises StoreError."""

    def __init__(self, path: Path, attributes: dict[str, Any]) -> None:
        self.path = path
        self.attributes = attributes
        self.provenance: dict[str, Any] = self.attributes["provenance"]
        self.codec = codecs.from_description(self.attributes["codec"])
        self.class_names: list[str] = self.attributes["class_names"]
        self.crop_arrays = schema.crop_arrays(self.provenance)  # names of the arrays of a crop
        # names of all arrays with one file per shard, except records
        self.shard_arrays = schema.shard_arrays(attributes)
        self.chunk_rows: int = self.provenance["layout"]["chunk_rows"]
        self.shard_rows: int = self.provenance["layout"]["shard_rows"]
        self.group = zarr.open_group(str(path), mode="r", zarr_format=3, use_consolidated=False)
        self._arrays: dict[str, zarr.Array[Any]] = {}
        self._sound: set[tuple[int, int]] = set()  # (view, shard) with the right digest
        self.elsewhere: Elsewhere | None = Copy.of(path, self._files)
        shape = self.array("labels").shape
        # Stores from before the seal don't have the attribute views.
        self.views: int = attributes.get("views", self.array("records").shape[0])
        self.shards: int = self.array("records").shape[1]
        self.classes: int = shape[2]
        for name in (*self.shard_arrays, "records"):
            if self.array(name).shape[0] < self.views:
                raise errors.damaged(
                    path,
                    f"{name}/zarr.json",
                    f"it has {self.array(name).shape[0]} views, the store {self.views}",
                )

    @classmethod
    def open(cls, path: str | Path) -> LabelStore:
        """Open a store for reading: at a path, or on the Hugging Face hub at
        hf://ORG/NAME or hf://ORG/NAME@REVISION. Raises StoreError if there is no store,
        or a store that this version can't read; DamagedStore if the store's description
        is not what was written."""
        require_local(None if is_hub(path) else path)
        path = here(path)
        if not path.exists():
            raise StoreError(
                f"there is no label store at {path}; make one with generate-labels, or check the "
                f"path"
            )
        ours = (path / "records").is_dir() and (path / "labels").is_dir()
        try:
            whole = read_document(path / "zarr.json")
            attributes = whole["attributes"] if "attributes" in whole or ours else {}
            found, version = attributes.get("format"), attributes.get("format_version")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            if errors.momentary(error):
                raise errors.unreadable(path, "zarr.json", error) from None
            if ours:
                raise errors.damaged(path, "zarr.json", _one_line(error)) from None
            raise StoreError(
                f"{path} is not a label store (it holds no Zarr v3 group); check the path, or "
                f"choose a new one"
            ) from None
        if found != FORMAT and not (ours and "seal" in attributes):
            raise StoreError(
                f"{path} is a Zarr group but not a label store (its format is {found!r}); check "
                f"the path"
            )
        if (type(version) is not int or version not in VERSIONS) and not only_its_version_is_wrong(
            attributes, whole
        ):
            newer = isinstance(version, int) and version > VERSIONS[-1]
            raise StoreError(
                f"{path} has label store format {version}, this program reads {VERSIONS[0]} to "
                f"{VERSIONS[-1]}; "
                + (
                    "it was made by a newer version: update this program"
                    if newer
                    else "use the version of this program that made it"
                )
            )
        sealed = (
            type(version) is not int
            or version not in VERSIONS
            or version >= SEALED
            or "seal" in attributes
        )
        if sealed:
            require_seal(path, {"zarr.json": whole})
        # Keep the zarr.json that was checked: the store may have grown since.
        documents = read_metadata(path, schema.shard_arrays(attributes)[1:]) | {"zarr.json": whole}
        if sealed:
            require_seal(path, documents)
        try:
            validate.require_sense(path, attributes, documents)
            return cls(path, attributes)
        except KeyError as missing:
            raise DamagedStore(
                f"{path} is damaged: it has no {missing}; restore it from a copy or generate a new "
                f"store"
            ) from None
        except (ValueError, TypeError, OSError) as error:  # truncated metadata
            if errors.momentary(error):
                raise errors.unreadable(path, "its description", error) from None
            raise DamagedStore(
                f"{path} is damaged ({_one_line(error)}); restore it from a copy or generate a new "
                f"store"
            ) from None

    def reopened(self, images: Images | None = None) -> LabelStore:
        """Open the store once more, for another process or thread. What was checked
        isn't read again. images: the manifest in another form; None: as it is."""
        return _reopened(self.path, self.attributes, self.images if images is None else images)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopened, (self.path, self.attributes, self.images)

    def array(self, name: str) -> zarr.Array[Any]:
        """Return an array of the store, opened once."""
        if name not in self._arrays:
            self._arrays[name] = schema.array(self.group, name)
        return self._arrays[name]

    @cached_property
    def identity(self) -> bytes:
        """Return the sha256 of the provenance, except the entries of files that the
        teachers' weights were in. The digest in every completion record includes this
        value."""
        return schema.canonical_digest(schema.without_entries(self.provenance))

    @property
    def made_by(self) -> str:
        """Return the command that made the store. The same command finishes and repairs
        the store."""
        return (
            "merge"
            if "merged" in self.provenance
            else "import-labels"
            if "imported" in self.provenance
            else "generate-labels"
        )

    @cached_property
    def max_error(self) -> tuple[float | None, float]:
        """Return the error that no stored label exceeds: (KL in nats, total variation),
        relative to the mean softmax of the teachers. An average of stores also has the
        errors of these stores. Then there is no bound of KL (None)."""
        kl, _ = max_error(self.codec, self.classes)
        return (None if "merged" in self.provenance else kl), _lost(self.provenance, self.classes)

    @cached_property
    def images(self) -> Images:
        """Return the manifest, in row order. Raises StoreError if the manifest is not,
        as a whole, the one that the provenance names, or if a path leaves the data
        folder."""
        for file in self.manifest_files():  # Zarr reads a missing file as zeros or empty names
            if not (self.path / file).is_file():
                raise errors.damaged(self.path, file, "it is missing")
        try:
            images = Images(*(self._column(name) for name in Images.__dataclass_fields__))
        except UnreadableStore:
            raise
        except StoreError as error:
            raise errors.damaged(self.path, "images/", str(error)) from None
        wanted = self.provenance.get("data", {}).get("manifest")
        if wanted and images.manifest_digest() != wanted:
            raise errors.damaged(self.path, "images/", "the manifest has another digest")
        # Stores made before 0.3 have no row_order.
        if self.attributes.get("row_order") not in (None, images.order):
            raise errors.damaged(self.path, "images/", "the rows are in another order")
        for path in images.path:
            if path.startswith("/") or "\0" in path or ".." in path.split("/"):
                raise StoreError(
                    f"{self.path} names an image outside the data folder ({path!r}); don't use "
                    f"this store"
                )
        return images

    def consolidated_is_right(self) -> bool:
        """Return whether the store's consolidated metadata (zarr.consolidate_metadata)
        equals the other zarr.json files, or is absent. This program never reads
        consolidated metadata, but other programs do."""
        documents = read_metadata(self.path, self.shard_arrays[1:])
        consolidated = documents.pop("zarr.json").get("consolidated_metadata")
        if consolidated is None:
            return True

        def plain(document: object) -> object:
            """Return the document without the keys that Zarr adds to a copy or leaves
            out of it."""
            if not isinstance(document, dict):
                return document
            return {
                key: value
                for key, value in document.items()
                if key != "consolidated_metadata" and value not in (None, {}, [])
            }

        copies = consolidated.get("metadata") if isinstance(consolidated, dict) else None
        wanted = {
            file.removesuffix("/zarr.json"): plain(document) for file, document in documents.items()
        }
        return (
            isinstance(copies, dict)
            and {name: plain(copy) for name, copy in copies.items()} == wanted
        )

    def _column(self, name: str) -> np.ndarray:
        """Read a column of the manifest, with strings as Python objects. Columns are
        converted one at a time, because Zarr's strings and Python's together take more
        memory than anything else."""
        column = self._read(f"images/{name}", np.s_[:])
        return column.astype(object) if column.dtype.kind in "OUT" else column

    def manifest_files(self) -> list[str]:
        """Return the paths of the manifest's chunks, relative to the store."""
        files = []
        for name in Images.__dataclass_fields__:
            array = self.array(f"images/{name}")
            chunks = (
                -(-length // size) for length, size in zip(array.shape, array.chunks, strict=True)
            )
            files += [
                "/".join([f"images/{name}/c", *map(str, place)]) for place in np.ndindex(*chunks)
            ]
        return files

    @cached_property
    def usable(self) -> np.ndarray:
        """Return the rows that have labels: int64 [usable images]."""
        return self.images.usable

    def records(self) -> np.ndarray:
        """Read all completion records from the disk: RECORD [views, shards]. A record
        is all zeros where it is missing, damaged or of another place."""
        try:
            self._require_files(self.path / "records" / "c")
            raw = self._read("records", np.s_[: self.views])
        except UnreadableStore:
            raise
        except StoreError:  # a record is torn: read the records one by one
            raw = np.zeros((self.views, self.shards, RECORD.itemsize), "u1")
            for view, shard in np.ndindex(raw.shape[:2]):
                if not self.size("records", view, shard):
                    continue
                with suppress(ValueError):  # a wrong checksum
                    raw[view, shard] = self.array("records")[view, shard]
        return _records(raw, np.arange(self.views)[:, None], np.arange(self.shards))

    def _require_files(self, folder: Path) -> None:
        """Raise StoreError if anything below the folder is neither folder nor file.
        Reading a pipe would wait for ever."""
        for entry in os.scandir(folder) if folder.is_dir() else ():
            if entry.is_dir():
                self._require_files(Path(entry.path))
            elif not entry.is_file():
                raise StoreError(f"{entry.path} is no file; remove it")

    def record(self, view: int, shard: int) -> np.void:
        """Read one completion record from the disk, as ``records`` does."""
        raw = np.zeros(RECORD.itemsize, "u1")
        with suppress(*UNREADABLE):
            if self.size("records", view, shard):
                raw = self._take(
                    "records",
                    np.s_[view, shard],
                    str(self.file("records", view, shard).relative_to(self.path)),
                )
        return _records(raw[None, None], np.array([[view]]), np.array([shard]))[0, 0]

    def finished_records(self) -> np.ndarray:
        """Read the completion records of finished shards from the disk: RECORD
        [views, shards]. A record is all zeros where ``records`` has zeros, where a file
        of the shard is missing or empty, or where the file of labels hasn't the
        recorded size."""
        records = self.records()

        def look(view: int) -> None:
            for shard in np.flatnonzero(records["magic"][view] == RECORD_MAGIC).tolist():
                if not self._whole(view, shard, records[view, shard]):
                    records[view, shard] = np.zeros((), RECORD)

        with ThreadPoolExecutor(LOOKS) as pool:
            list(pool.map(look, range(self.views)))
        return records

    def finished(self) -> np.ndarray:
        """Return which shards are finished, as read from the disk: bool
        [views, shards]. A finished shard has its record and all its files, and the file
        of labels has the recorded size."""
        return self.finished_records()["magic"] == RECORD_MAGIC

    def is_finished(self, view: int, shard: int) -> bool:
        """Return whether one shard is finished, as ``finished`` does."""
        record = self.record(view, shard)
        return record["magic"] == RECORD_MAGIC and self._whole(view, shard, record)

    def _files(self, view: int, shard: int) -> list[Path]:
        """Return the paths of a shard's files, except its record."""
        return [self.file(name, view, shard) for name in self.shard_arrays]

    def _whole(self, view: int, shard: int, record: np.void) -> bool:
        if self.elsewhere and self.elsewhere.has(view, shard):
            return True
        sizes = [self.size(name, view, shard) for name in self.shard_arrays]
        return sizes[0] == record["stored_bytes"] and all(sizes)

    def has_record(self, view: int, shard: int) -> bool:
        """Return whether a shard has a completion record, even a damaged one."""
        return bool(self.size("records", view, shard))

    def size(self, name: str, view: int, shard: int) -> int:
        """Return the size of a shard's file in bytes, 0 if there is no file."""
        file = self.file(name, view, shard)
        try:
            found = file.stat()
        except OSError as error:
            if errors.momentary(error):
                raise errors.unreadable(self.path, file.relative_to(self.path), error) from None
            return 0
        return found.st_size if stat.S_ISREG(found.st_mode) else 0

    @cached_property
    def _finished(self) -> np.ndarray:
        return self.finished()

    def progress(self) -> tuple[int, int]:
        """Return (finished shards, total shards) over all views, as they are on disk
        now."""
        finished = self.finished()
        return int(finished.sum()), finished.size

    def require_finished(self, view: int, shards: np.ndarray | None = None) -> None:
        """Raise StoreError unless the given shards of a view are finished (None: all
        shards)."""
        if not 0 <= view < self.views:
            raise StoreError(
                f"{self.path} has views 0 to {self.views - 1}, not {view}; "
                + (
                    self.elsewhere.absent
                    if self.elsewhere
                    else f"extend it with {self.made_by} --views {view + 1}"
                )
            )
        shards = np.arange(self.shards) if shards is None else shards
        if not self._finished[view, shards].all():
            self.__dict__.pop("_finished")  # another process may have finished shards since
        missing = shards[~self._finished[view, shards]]
        if len(missing):
            raise StoreError(
                f"view {view} of {self.path} is not finished ({len(missing)} of {self.shards} "
                f"shards missing or damaged, the first is {missing[0]}); "
                + (
                    self.elsewhere.absent
                    if self.elsewhere
                    else f"run the same {self.made_by} command again to finish it"
                )
            )

    def require_sound(self, view: int, shard: int) -> None:
        """Read a finished shard whole, once per process. Raises StoreError if the shard
        is not what was written."""
        if (view, shard) not in self._sound and (fault := self.fault(view, shard)):
            raise StoreError(
                f"{self.place(view, shard)} of {self.path} are not what was written there: "
                f"{fault}; "
                + (
                    self.elsewhere.remedy
                    if self.elsewhere
                    else f"run the same {self.made_by} command again to make them anew"
                )
            )

    def fault(self, view: int, shard: int) -> str | None:
        """Read a finished shard from the disk, and return what is wrong with it, or
        None."""
        fault = self.content(view, shard)[1]
        (self._sound.discard if fault else self._sound.add)((view, shard))
        return fault

    def content(self, view: int, shard: int) -> tuple[Content | None, str | None]:
        """Read a finished shard whole, and compare it with the digest in its record.

        Returns (content, fault). The content is None if the shard can't be read. The
        fault says what is wrong; None if nothing is. Raises StoreError if the shard
        can't be judged, for want of memory, of permission, or of a disk that answers.

        Zarr's own checksums find flipped bits. They don't find a missing file, which
        reads as zeros, or a file of another place or store.

        A shard that is elsewhere is fetched first, and once more if it is damaged here.
        """
        if self.elsewhere:
            self.elsewhere.fetch(view, shard)
        found = self._content(view, shard)
        if found[1] and self.elsewhere and self.elsewhere.has(view, shard):
            self.elsewhere.fetch(view, shard, anew=True)
            found = self._content(view, shard)
        return found

    def _content(self, view: int, shard: int) -> tuple[Content | None, str | None]:
        """Read a finished shard whole from the disk, as ``content`` does."""
        arrays: list[np.ndarray] = []
        for name in self.shard_arrays:
            file = self.file(name, view, shard).relative_to(self.path)
            if not self.size(name, view, shard):
                return None, f"{file} is missing or empty"
            try:
                arrays.append(self._take(name, np.s_[view, self.shard_slice(shard)], str(file)))
            except UNREADABLE as error:
                return None, f"{file} can't be read ({_one_line(error)})"
        record = self.record(view, shard)
        digest = schema.shard_digest(self.identity, view, shard, *arrays)
        if "tail" in self.shard_arrays:
            tail = arrays.pop()
            arrays[0] = codecs.pack(arrays[0], tail)
        content = Content(arrays[0], Crops(*arrays[1:]))
        if record["magic"] != RECORD_MAGIC:
            return content, "its completion record is missing or damaged"
        if digest != record["digest"].tobytes():
            return (
                content,
                "another digest than in its completion record (files of another place, or changed "
                "by other hands)",
            )
        if fault := content.crops.fault(self.shard_slice(shard), self.images):
            return content, fault
        if not self.codec.possible(content.codes):
            return content, f"codes that codec {self.codec.name} doesn't have"
        return content, None

    def codes(self, view: int, rows: Rows) -> np.ndarray:
        """Read the stored codes of rows, in the order of ``rows``: [n, classes], as
        ``codec.decode`` takes them. A codec with a tail has one more column, the mass
        of the tail. Whole inner chunks are read, so ask for neighbouring rows
        together."""
        codes = self._rows("labels", view, rows)
        return (
            codecs.pack(codes, self._rows("tail", view, rows))
            if "tail" in self.shard_arrays
            else codes
        )

    def probabilities(self, view: int, rows: Rows) -> np.ndarray:
        """Read the labels of rows: float32 [n, classes], every value above zero, rows
        summing to one. Raises StoreError for a row that has no label."""
        rows = self._as_rows(rows)
        unusable = self.images.status[rows] != USABLE
        if unusable.any():
            row = rows[np.argmax(unusable)]
            raise StoreError(
                f"row {row} ({self.images.path[row]}) has no label: {self.images.reason[row]}; ask "
                f"for rows of store.usable"
            )
        return self.codec.decode(self.codes(view, rows))

    def crops(self, view: int, rows: Rows) -> BoxesAndFlips:
        """Read the boxes and flips of rows: (int32 [n, 4] top, left, height, width in
        pixels of the decoded image; bool [n] mirrored left-right after the crop)."""
        return BoxesAndFlips(self._rows("boxes", view, rows), self._rows("flips", view, rows))

    def whole_crops(self, view: int, rows: Rows) -> Crops:
        """Read the crops of rows: ``crops`` and, with CutMix, ``mixes``."""
        return Crops(*(self._rows(name, view, rows) for name in self.crop_arrays))

    @property
    def mixed(self) -> bool:
        """Return whether the teachers saw CutMix pictures, which ``mixes``
        describes."""
        return "mix_box" in self.crop_arrays

    def mixes(self, view: int, rows: Rows) -> Mixes:
        """Read the rectangles that were pasted into the crops of rows (CutMix): int32
        [n] rows of the partners, -1 for none, and float32 [n, 4] top, left, bottom,
        right as fractions of the output.

        The pasted pixels are from the partner's crop of the same view. ``how_to_read``
        says which pixels a rectangle covers. Raises StoreError if the store holds no
        CutMix.
        """
        if not self.mixed:
            raise StoreError(
                f"{self.path} holds no CutMix; ask store.mixed first, or make a store with "
                f"crops.cutmix"
            )
        return Mixes(self._rows("mix_partner", view, rows), self._rows("mix_box", view, rows))

    def shard_slice(self, shard: int) -> slice:
        """Return the rows of a shard as a slice."""
        return slice(
            shard * self.shard_rows,
            min((shard + 1) * self.shard_rows, self.array("labels").shape[1]),
        )

    def place(self, view: int, shard: int) -> str:
        """Return the view and the rows of a shard in words, for messages."""
        rows = self.shard_slice(shard)
        return f"view {view}, rows {rows.start} to {rows.stop - 1}"

    def file(self, name: str, view: int, shard: int) -> Path:
        """Return the path of the file in which Zarr keeps a shard of an array:
        ARRAY/c/VIEW/SHARD, and a 0 for every further axis, which is a single chunk."""
        return Path(
            self.path, name, "c", str(view), str(shard), *["0"] * (self.array(name).ndim - 2)
        )

    def _as_rows(self, rows: Rows) -> np.ndarray:
        n = self.array("labels").shape[1]
        if isinstance(rows, slice):
            return np.arange(*rows.indices(n))
        rows = np.atleast_1d(rows)
        if rows.size and rows.dtype.kind not in "iu":
            raise StoreError(
                f"rows must be whole numbers or a slice, not {rows.dtype}; of a mask take "
                f"np.flatnonzero(mask)"
            )
        rows = rows.astype(np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < n):
            raise StoreError(
                f"{self.path} has rows 0 to {n - 1}, asked for {rows.min()} to {rows.max()}"
            )
        return rows

    def _rows(self, name: str, view: int, rows: Rows) -> np.ndarray:
        """Read rows of one view, as runs of neighbouring chunks."""
        rows = self._as_rows(rows)
        self.require_finished(view, np.unique(rows // self.shard_rows))
        for shard in np.unique(rows // self.shard_rows):
            self.require_sound(view, int(shard))
        array = self.array(name)
        size = array.chunks[1]
        out = np.empty((len(rows), *array.shape[2:]), dtype=array.dtype)
        wanted = np.unique(rows // size)
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1):
            if len(run) == 0:
                continue
            first, last = run[0] * size, (run[-1] + 1) * size
            inside = (rows >= first) & (rows < last)
            block = self._read(name, np.s_[view, int(first) : int(min(last, array.shape[1]))])
            out[inside] = block[rows[inside] - first]
        return out

    def _take(self, name: str, selection: tuple[Any, ...] | slice, what: str) -> np.ndarray:
        """Read a part of an array. Raises UnreadableStore for an error that may pass,
        and one of ``UNREADABLE`` for a faulty file."""
        try:
            return np.asarray(self.array(name)[selection])
        except OSError as error:
            if errors.momentary(error):
                raise errors.unreadable(self.path, what, error) from None
            raise
        except MemoryError as error:
            # Either memory is short, or a broken file asks for a terabyte. If there is
            # room for a whole file, memory is not short.
            with _short_of_memory:
                for _ in range(3):
                    if _room(4 * _most(self.array(name))):
                        with suppress(MemoryError):
                            return np.asarray(self.array(name)[selection])
                        time.sleep(0.2)  # other threads may have taken the memory
                    else:
                        raise errors.unreadable(self.path, what, error) from None
            raise ValueError("it asks for more memory than it can hold") from None

    def _read(self, name: str, selection: tuple[Any, ...] | slice) -> np.ndarray:
        try:
            return self._take(name, selection, name)
        except UNREADABLE as error:  # a missing array, a wrong checksum, a truncated shard
            raise StoreError(
                f"{name} of {self.path} can't be read ({_one_line(error)}); restore the store from "
                f"a copy or generate a new one"
            ) from None


def _reopened(path: Path, attributes: dict[str, Any], images: Images) -> LabelStore:
    store = LabelStore(path, attributes)
    store.__dict__["images"] = images  # in place of the cached property's
    return store


def _most(array: zarr.Array[Any]) -> int:
    """Return the decoded size in bytes of one file of an array. A text of the manifest
    counts as 4 KiB, its greatest size."""
    size = 4096 if array.dtype.kind in "OUT" else array.dtype.itemsize
    return math.prod((*(array.shards or array.chunks), size))


def _room(size: int) -> bool:
    """Return whether this process can allocate that many bytes now."""
    try:
        return bool(np.empty(size, "u1").size)
    except MemoryError:
        return False


def _lost(provenance: dict[str, Any], classes: int) -> float:
    """Return the stated total variation of a store's labels, with the losses of the
    stores that were averaged into it."""
    parts = provenance.get("merged", [])
    teachers = sum(part["teachers"] for part in parts)
    before = sum(part["teachers"] / teachers * _lost(part, classes) for part in parts)
    return max_error(codecs.from_description(provenance["codec"]), classes)[1] + before


def _records(raw: np.ndarray, view: np.ndarray, shard: np.ndarray) -> np.ndarray:
    """Convert uint8 [views, shards, bytes] → RECORD [views, shards]. A record that is
    not of its view [views, 1] and shard [shards] becomes all zeros."""
    records = np.ascontiguousarray(raw).view(RECORD)[..., 0].copy()
    elsewhere = (
        (records["magic"] != RECORD_MAGIC) | (records["view"] != view) | (records["shard"] != shard)
    )
    records[elsewhere] = np.zeros((), RECORD)
    return records


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
