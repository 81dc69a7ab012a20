"""Read images that lie in larger files, such as tar files: find each image's place once
(the index, kept in the user's cache folder), then read it there."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Collection, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from cache.format.manifest import Images, printable_paths
from pipeline.images.names import split_of
from pipeline.images.patience import DataError
from pipeline.images.sources import kept
from pipeline.images.sources.container_files import ContainerFiles, read_at
from pipeline.images.sources.index import Contents, Index, make_index
from pipeline.images.sources.source import Classes, ImageSource, Listing
from pipeline.runtime.progress import Progress, say
from pipeline.runtime.wording import counted, same

READERS = 16  # threads that read headers, which is mostly waiting for the disk


class Containers(ImageSource):
    """Images in containers.

    files: the containers, by number. split: that the user asked for, which counts if
    the containers hold several splits. kind: of a container, for messages: "tar file".
    """

    kind = "container"

    def __init__(self, path: Any, files: ContainerFiles, split: str = "train") -> None:
        super().__init__(path)
        self.files, self.split = files, split
        self._index: Index | None = None

    @abstractmethod
    def contents_of(self, file: Path, name: Any) -> Contents:
        """Read the headers of a container. file: where it is read. name: of the
        container, for messages. Raises DataError."""

    def describe(self) -> str:
        return self.files.describe(counted(len(self.files), self.kind))

    def readers(self, threads: int) -> int:
        return self.files.readers(threads)

    def prepare(self) -> None:
        """Say what reading the headers takes, before they are read. Raises DataError if
        it can't be done."""
        return None

    def classes(self, known: Collection[str] = ()) -> Classes:
        return self.index().classes

    def list(self, classes: Classes, known: Container[str] = (), *, every: bool = False) -> Listing:
        index = self.index()
        changed = self._found[:, 1]
        return Listing(
            kept.unpacked(index.name),
            index.label,
            index.place[:, 2].copy(),
            changed[index.place[:, 0]],
            index.place,
            kept.unpacked(index.reason),
        )

    def read(self, address: Any) -> bytes:
        number, offset, size = address.tolist()
        if not size:
            return b""
        data = self.data_files[number]
        return read_at(data, offset, size) if data else self.files.read(number, offset, size)

    def again(self, address: Any) -> bytes | None:
        number, offset, size = address.tolist()
        return None if self.data_files[number] else self.files.again(number, offset, size)

    def where(self, name: str, address: Any) -> str:
        number, offset, size = address.tolist()
        return f"{self.files.names[number]} ({name}, bytes {offset:,} to {offset + size:,})"

    def addresses(self, images: Images) -> np.ndarray:
        index = self.index()
        names = kept.unpacked(index.name)
        row = {same(printable_paths(name)): i for i, name in enumerate(names.tolist())}
        there = np.array([row.get(same(path), -1) for path in images.path.tolist()], np.int64)
        if (missing := images.usable[there[images.usable] < 0]).size:
            raise DataError(
                f"{self.path} has no image {images.path[missing[0]]}; pass the images that the "
                f"manifest was made from"
            )
        return np.where((there < 0)[:, None], 0, index.place[there])

    @cached_property
    def data_files(self) -> Sequence[Path | None]:
        """Return the file in which each container's images lie, None for the container
        itself."""
        return [Path(one) if one else None for one in self.index().data]

    @property
    def divided(self) -> bool:
        return self.index().divided

    def require_sound(self, split: str) -> None:
        index = self.index()
        told = len(index.classes.names)
        classes = counted(told, "class", "classes") if told else "no classes"
        numbered = ", told by number" if index.classes.numbered else ""
        files = counted(len(self.files), self.kind)
        say(f"{self.path}: {files} with {len(index):,} images of {classes}{numbered}")
        for line in index.notes:
            say(f"{self.path}: {line}")

    def index(self) -> Index:
        """Return the index: as kept from an earlier start, if no container has changed
        since; otherwise it is read now, and kept."""
        if self._index is None:
            self._found = self.files.about()
            split = split_of(self.split) or self.split
            file = kept.file_for(type(self).__name__, split, *self.files.places())
            kept.once(file, lambda: self._recalled(file), lambda: self._made(file))
            self.files.ready()
        return self._index

    def _recalled(self, file: Path) -> bool:
        """Take the index that an earlier start has kept, if it is of these files."""
        columns = kept.kept(file)
        if columns is not None and np.array_equal(columns["found"], self._found):
            index = Index.load(columns)
            if all(os.path.exists(data) for data in index.data if data):
                self._index = index
        return self._index is not None

    def _made(self, file: Path) -> None:
        """Read the headers, and keep the index."""
        self.files.ready()
        self.prepare()
        self._index = self._read_headers()
        kept.keep(file, self._index.save() | {"found": self._found})

    def _read_headers(self) -> Index:
        with (
            Progress("reading headers", len(self.files), f"{self.kind}s") as progress,
            ThreadPoolExecutor(READERS) as pool,
        ):
            several = []
            try:
                for contents in pool.map(self._contents_of, range(len(self.files))):
                    several.append(contents)
                    progress.advance(1)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        return make_index(self.files.paths, several, self.path, self.split)

    def _contents_of(self, number: int) -> Contents:
        with self.files.whole(number) as file:
            return self.contents_of(file, self.files.names[number])
