"""Define what every source of images does: list them, and read their bytes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Container, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from cache.format.manifest import Images


@dataclass(frozen=True)
class Classes:
    """The classes that a source tells of.

    names: of the classes, in the order of their indices; empty if the source tells no
    image's class. numbered: the source tells numbers, and the names are those numbers
    as text, from 0 to the largest.
    """

    names: list[str]
    numbered: bool = False


@dataclass(frozen=True)
class Listing:
    """The files of a source, one a row, sorted by name. The first axis of every array
    is [n]."""

    # str, the file's name in the data set: its identity, on which its crops depend. As
    # ``names.as_text`` gives it.
    name: np.ndarray
    class_index: np.ndarray  # int32; -1 where nothing tells the class
    size: np.ndarray  # int64, bytes; -1 for a link to nothing
    changed: np.ndarray  # int64, time of the last change, ns since 1970
    # What ``ImageSource.read`` takes: str, the name again; or int64 [n, 3], the number
    # of a container, offset and length in bytes.
    address: np.ndarray
    reason: np.ndarray  # str, why the file can't be used; empty if it may be usable

    def __len__(self) -> int:
        return len(self.name)

    @classmethod
    def of_files(cls, found: Sequence[tuple[str, int, int, int]]) -> Listing:
        """Make the listing of files, each (name, class index, size, time of the last
        change), in any order."""
        names, indices, sizes, changed = zip(*sorted(found), strict=True)
        name = np.array(names, object)
        return cls(
            name,
            np.array(indices, np.int32),
            np.array(sizes, np.int64),
            np.array(changed, np.int64),
            address=name,
            reason=np.full(len(name), "", object),
        )

    def take(self, rows: np.ndarray) -> Listing:
        """Return the listing of these rows."""
        return Listing(*(getattr(self, field.name)[rows] for field in fields(self)))


class ImageSource(ABC):
    """Images under names, wherever their bytes lie.

    A name is part of a crop's identity, the place of the bytes is not: the same images
    under the same names are the same data set in every source.

    path: the file, folder or URL that the user named, for messages. noun: what tells a
    class here, for messages. in_folders: results may not be written in ``path``, where
    they would be taken for images.
    """

    noun = "class"
    in_folders = False

    def __init__(self, path: Any) -> None:
        self.path = path

    @property
    def divided(self) -> bool:
        """True if ``path`` holds several splits, and these are the images of one."""
        return False

    @abstractmethod
    def describe(self) -> str:
        """Return what this source is, in a few words: "1,024 tar files"."""

    @abstractmethod
    def classes(self, known: Collection[str] = ()) -> Classes:
        """Return the classes that the source tells of. known: names that are classes
        for sure. Raises DataError."""

    @abstractmethod
    def list(self, classes: Classes, known: Container[str] = (), *, every: bool = False) -> Listing:
        """List the files, with class indices into ``classes``.

        known: names of a manifest, which are listed whoever left them. every: list the
        files that a system left, too. Raises DataError.
        """

    @abstractmethod
    def read(self, address: Any) -> bytes:
        """Read a file whole. address: of the listing. Raises DataError for a disk that
        fails now, and OSError if there is no such file."""

    def again(self, address: Any) -> bytes | None:
        """Read a file from where it comes from, if ``read`` read a copy that may be
        damaged; otherwise return None. Raises as ``read`` does."""
        return None

    def readers(self, threads: int) -> int:
        """Return how many threads should read at once. threads: as many as this process
        has cores for."""
        return threads

    @abstractmethod
    def where(self, name: str, address: Any) -> str:
        """Return where a file lies, for messages. name, address: of the listing."""

    def addresses(self, images: Images) -> np.ndarray:
        """Return the addresses of a manifest's files, in its order. Raises DataError if
        there is no file of a usable image's name."""
        return images.path

    def readable(self, address: Any) -> str:
        """Return why a file can't be read at all, such as a pipe; empty if it can."""
        return ""

    def require_sound(self, split: str) -> None:
        """Require that the source is laid out as it should be, and print what a user
        should know. split: that the user asked for. Raises DataError."""
        return None

    def say_depth(self, names: Collection[str]) -> None:
        """Print what the names of the listed files tell that a user should know."""
        return None

    def require_images(self, names: Collection[str] | None = None, split: str = "train") -> None:
        """Raise DataError if what tells the classes holds no images. names: of the
        classes; None: all."""
        return None
