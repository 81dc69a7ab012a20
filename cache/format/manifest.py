"""Hold the manifest of a store: every image of the data set, in row order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import numpy as np

USABLE, UNUSABLE = 0, 1  # values of images/status


@dataclass(frozen=True)
class Images:
    """The manifest: every file of the data set, in the store's row order. The first
    axis of every array is [images]."""

    path: np.ndarray  # str, relative to the data root, with forward slashes
    bytes: np.ndarray  # int64, size of the file
    digest: np.ndarray  # uint8 [images, 32], sha256 of the file
    height: np.ndarray  # int32, pixels of the decoded image; 0 where unusable
    width: np.ndarray  # int32
    class_index: np.ndarray  # int32; -1 where nothing tells the class
    status: np.ndarray  # uint8, USABLE or UNUSABLE
    reason: np.ndarray  # str, why the image is unusable; empty where usable

    def __len__(self) -> int:
        return len(self.path)

    @property
    def usable(self) -> np.ndarray:
        """Return the rows that have labels: int64 [usable images]."""
        return np.flatnonzero(self.status == USABLE)

    @property
    def by_path(self) -> np.ndarray:
        """Return the rows in the order of their paths: int64 [images]. Python sorts
        strings twice as fast as numpy does."""
        return np.array(sorted(range(len(self)), key=self.path.tolist().__getitem__), np.int64)

    @property
    def order(self) -> str:
        """Return the hex sha256 over the paths in row order. This digest tells which
        image each row belongs to."""
        return hashlib.sha256("\0".join(self.path.tolist()).encode()).hexdigest()

    def take(self, rows: np.ndarray) -> Images:
        """Return the manifest of these rows."""
        return Images(*(getattr(self, field.name)[rows] for field in fields(self)))

    def manifest_digest(self) -> str:
        """Return the hex sha256 over every field, independent of the row order."""
        order = self.by_path
        h = hashlib.sha256()
        for field in fields(self):
            column = getattr(self, field.name)[order]
            h.update(field.name.encode())
            h.update(
                "\0".join(column.tolist()).encode()
                if column.dtype.kind in "OUT"
                else np.ascontiguousarray(column).tobytes()
            )
        return h.hexdigest()


def printable_paths(path: str) -> str:
    """Return a path as UTF-8 text, in every locale. Bytes that are not UTF-8, which
    Python has as lone surrogates, are written as \\xNN."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
