"""Reading a label store: what is finished, labels as codes or probabilities, crops, and what the store says of itself."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import zarr

from cache import codec as codecs
from cache import schema
from cache.schema import Images, StoreError


class LabelStore:
    """An open label store. Everything is read lazily; reading labels of a shard without a completion record raises StoreError."""

    def __init__(self, path: Path, group: zarr.Group) -> None:
        self.path = path
        self.group = group
        self.attributes = dict(group.attrs)
        self.provenance: dict = self.attributes["provenance"]
        self.codec = codecs.from_description(self.attributes["codec"])
        self.class_names: list[str] = self.attributes["class_names"]
        self.crop_arrays = schema.crop_arrays(self.provenance)  # names of what is kept per crop beside its label
        self.chunk_rows: int = self.provenance["layout"]["chunk_rows"]
        self.shard_rows: int = self.provenance["layout"]["shard_rows"]
        self._arrays: dict[str, zarr.Array] = {}
        self._sound: set[tuple[int, int]] = set()  # (view, shard) whose digests were compared

    @classmethod
    def open(cls, path: str | Path) -> LabelStore:
        """Open for reading. Raises StoreError if there is no store, or one that this version can't read."""
        path = Path(path)
        if not path.exists():
            raise StoreError(f"there is no label store at {path}; make one with generate-labels, or check the path")
        try:
            group = zarr.open_group(str(path), mode="r", zarr_format=3)
        except (OSError, ValueError, KeyError, TypeError):
            raise StoreError(f"{path} is not a label store (it holds no Zarr v3 group); check the path, or choose a new one") from None
        found, version = group.attrs.get("format"), group.attrs.get("format_version")
        if found != schema.FORMAT:
            raise StoreError(f"{path} is a Zarr group but not a label store (its format is {found!r}); check the path")
        if version not in schema.VERSIONS:
            raise StoreError(
                f"{path} has label store format {version}, this program reads {' and '.join(map(str, schema.VERSIONS))}; "
                "use the version of this program that made it"
            )
        try:
            store = cls(path, group)
            shape = store.array("labels").shape
            if any(store.array(name).shape[1] != shape[1] for name in store.crop_arrays) or store.array("records").shape[1] != -(
                -shape[1] // store.shard_rows
            ):
                raise KeyError("arrays of one size")
        except KeyError as missing:
            raise StoreError(f"{path} is damaged: it has no {missing}; restore it from a copy or generate a new store") from None
        except (ValueError, TypeError, OSError) as error:  # metadata cut short
            raise StoreError(f"{path} is damaged ({_one_line(error)}); restore it from a copy or generate a new store") from None
        return store

    def array(self, name: str) -> zarr.Array:
        if name not in self._arrays:
            self._arrays[name] = schema.array(self.group, name)
        return self._arrays[name]

    @property
    def views(self) -> int:
        return self.array("records").shape[0]

    @property
    def shards(self) -> int:
        return self.array("records").shape[1]

    @property
    def classes(self) -> int:
        return self.array("labels").shape[2]

    @cached_property
    def identity(self) -> bytes:
        """sha256 of the provenance, which every completion record is bound to."""
        return schema.canonical_digest(self.provenance)

    @cached_property
    def images(self) -> Images:
        """The manifest, in row order. Raises StoreError if it is not, whole, what the provenance says."""
        columns = {name: self._read(f"images/{name}", np.s_[:]) for name in Images.__dataclass_fields__}
        images = Images(**{name: c.astype(object) if c.dtype.kind in "OUT" else c for name, c in columns.items()})
        wanted = self.provenance.get("data", {}).get("manifest")
        if wanted and images.manifest_digest() != wanted:
            raise StoreError(f"the manifest (images/) of {self.path} is damaged; restore the store from a copy or generate a new one")
        return images

    @cached_property
    def usable(self) -> np.ndarray:
        """int64 [usable images]: the rows that have labels."""
        return self.images.usable

    def records(self, shard: int | None = None) -> np.ndarray:
        """RECORD [views, shards] or, of one shard, [views], read anew; where a record is missing, damaged or of another place, all zeros."""
        shards = np.arange(self.shards) if shard is None else np.array([shard])
        selection = np.s_[:] if shard is None else np.s_[:, shard : shard + 1]
        try:
            raw = self._read("records", selection)
        except StoreError:  # a torn record among them: leave out that one alone
            raw = np.zeros((self.views, len(shards), schema.RECORD.itemsize), "u1")
            for view, i in np.ndindex(raw.shape[:2]):
                with suppress(ValueError):  # its checksum
                    raw[view, i] = self.array("records")[view, shards[i]]
        records = np.ascontiguousarray(raw).view(schema.RECORD)[..., 0].copy()
        view = np.arange(len(records))[:, None]
        elsewhere = (records["magic"] != schema.RECORD_MAGIC) | (records["view"] != view) | (records["shard"] != shards)
        records[elsewhere] = np.zeros((), schema.RECORD)
        return records if shard is None else records[:, 0]

    def finished(self, shard: int | None = None) -> np.ndarray:
        """bool [views, shards] or, of one shard, [views], read anew: the record is there, and so are the files, of the recorded size."""
        records = self.records(shard).reshape(self.views, -1)
        finished = records["magic"] == schema.RECORD_MAGIC
        for view, i in zip(*np.nonzero(finished), strict=True):
            place = int(i if shard is None else shard)
            sizes = [self._size(name, int(view), place) for name in ("labels", *self.crop_arrays)]
            finished[view, i] = sizes[0] == records["stored_bytes"][view, i] and all(sizes)
        return finished if shard is None else finished[:, 0]

    def _size(self, name: str, view: int, shard: int) -> int:
        """Bytes of a shard's file, 0 if there is none."""
        try:
            return self.file(name, view, shard).stat().st_size
        except FileNotFoundError:
            return 0

    @cached_property
    def _finished(self) -> np.ndarray:
        return self.finished()

    def progress(self) -> tuple[int, int]:
        """(finished shards, total shards), over all views, as it is on disk now."""
        finished = self.finished()
        return int(finished.sum()), finished.size

    def require_finished(self, view: int, shards: np.ndarray | None = None) -> None:
        """Raises StoreError unless every shard of the view (or those given) is finished."""
        if not 0 <= view < self.views:
            raise StoreError(f"{self.path} has views 0 to {self.views - 1}, not {view}; extend it with generate-labels --views {view + 1}")
        shards = np.arange(self.shards) if shards is None else shards
        if not self._finished[view, shards].all():
            self.__dict__.pop("_finished")  # another process may have finished it since
        missing = shards[~self._finished[view, shards]]
        if len(missing):
            raise StoreError(
                f"view {view} of {self.path} is not finished ({len(missing)} of {self.shards} shards missing or damaged, the first is {missing[0]}); "
                "run the same generate-labels command again to finish it"
            )

    def require_sound(self, view: int, shard: int) -> None:
        """Read a finished shard whole, once per process, and raise StoreError unless it has the digest in its record.

        Zarr's own checksums find flipped bits. They don't find a missing file, which reads as zeros, or a file of another place or store.
        """
        if (view, shard) in self._sound:
            return
        rows = self.shard_slice(shard)
        for name in ("labels", *self.crop_arrays):
            if not self._size(name, view, shard):
                file = self.file(name, view, shard).relative_to(self.path)
                raise StoreError(f"{name} of {self.path} lacks {file}; run the same generate-labels command again to make it anew")
        content = (self._read(name, np.s_[view, rows]) for name in ("labels", *self.crop_arrays))
        digest = schema.shard_digest(self.identity, view, shard, *content)
        if digest != self.records(shard)["digest"][view].tobytes():
            raise StoreError(
                f"view {view}, rows {rows.start} to {rows.stop - 1} of {self.path} are not what was written there (another digest); "
                "restore the store from a copy or generate a new one"
            )
        self._sound.add((view, shard))

    def codes(self, view: int, rows: np.ndarray | slice) -> np.ndarray:
        """Stored codes [n, classes] of the rows, in their order. Whole inner chunks are read: ask for neighbours together."""
        return self._rows("labels", view, rows)

    def probabilities(self, view: int, rows: np.ndarray | slice) -> np.ndarray:
        """float32 [n, classes]: decoded labels, every value above zero, rows summing to one. StoreError for a row that has no label."""
        rows = self._as_rows(rows)
        unusable = self.images.status[rows] != schema.USABLE
        if unusable.any():
            row = rows[np.argmax(unusable)]
            raise StoreError(f"row {row} ({self.images.path[row]}) has no label: {self.images.reason[row]}; ask for rows of store.usable")
        return self.codec.decode(self.codes(view, rows))

    def crops(self, view: int, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """(int32 [n, 4] top, left, height, width in pixels of the decoded image; bool [n] mirrored left-right after the crop)."""
        return self._rows("boxes", view, rows), self._rows("flips", view, rows)

    @property
    def mixed(self) -> bool:
        """Whether the teachers saw CutMix pictures, and ``mixes`` says which."""
        return "mix_box" in self.crop_arrays

    def mixes(self, view: int, rows: np.ndarray | slice) -> tuple[np.ndarray, np.ndarray]:
        """What was pasted into the crops (CutMix): int32 [n] rows of the partners, -1 for none, and float32 [n, 4] top, left, bottom, right as
        fractions of the output. The partner's crop is the one of the same view; the rectangle's pixels follow from ``how_to_read``."""
        if not self.mixed:
            raise StoreError(f"{self.path} holds no CutMix; ask store.mixed first, or make a store with crops.cutmix")
        return self._rows("mix_partner", view, rows), self._rows("mix_box", view, rows)

    def shard_slice(self, shard: int) -> slice:
        return slice(shard * self.shard_rows, min((shard + 1) * self.shard_rows, self.array("labels").shape[1]))

    def file(self, name: str, view: int, shard: int) -> Path:
        """Where Zarr keeps a shard: its grid indices as folders, the last axes being one chunk."""
        return Path(self.path, name, "c", str(view), str(shard), *["0"] * (self.array(name).ndim - 2))

    def _as_rows(self, rows: np.ndarray | slice) -> np.ndarray:
        n = self.array("labels").shape[1]
        if isinstance(rows, slice):
            return np.arange(*rows.indices(n))
        rows = np.atleast_1d(rows)
        if rows.size and rows.dtype.kind not in "iu":
            raise StoreError(f"rows must be whole numbers or a slice, not {rows.dtype}; of a mask take np.flatnonzero(mask)")
        rows = rows.astype(np.int64)
        if len(rows) and not (rows.min() >= 0 and rows.max() < n):
            raise StoreError(f"{self.path} has rows 0 to {n - 1}, asked for {rows.min()} to {rows.max()}")
        return rows

    def _rows(self, name: str, view: int, rows: np.ndarray | slice) -> np.ndarray:
        """Rows of one view, read as runs of neighbouring chunks."""
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

    def _read(self, name: str, selection: tuple | slice) -> np.ndarray:
        try:
            return self.array(name)[selection]
        except (KeyError, ValueError, RuntimeError, OSError) as error:  # no such array, checksum, truncated shard, unreadable file
            raise StoreError(
                f"{name} of {self.path} can't be read ({_one_line(error)}); restore the store from a copy or generate a new one"
            ) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
