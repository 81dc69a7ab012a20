"""Reach the files of containers, on a disk or elsewhere, by their numbers."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from pipeline.images.patience import DataError, status
from pipeline.images.sources.open_files import OpenFiles

_files = OpenFiles()


class ContainerFiles(ABC):
    """The files of containers, wherever they lie, by number.

    names: how messages name each. A name has ``name``, ``stem`` and ``suffix``, as
    paths do.
    """

    names: Sequence[Any]

    def __len__(self) -> int:
        return len(self.names)

    def describe(self, counted: str) -> str:
        """Return what the files are, for people. counted: "3 tar files"."""
        return counted

    @property
    @abstractmethod
    def paths(self) -> list[PurePath]:
        """Return absolute paths, by whose ends the files are told apart."""

    @abstractmethod
    def places(self) -> list[str]:
        """Return the identity of each file, on which kept headers depend."""

    @abstractmethod
    def about(self) -> np.ndarray:
        """Ask for each file's size in bytes and time of change (ns since 1970): int64
        [n, 2]. Raises DataError."""

    @abstractmethod
    @contextmanager
    def whole(self, number: int) -> Iterator[Path]:
        """Give a path on this machine where a file can be read whole, within the
        context. Raises DataError."""

    @abstractmethod
    def read(self, number: int, offset: int, size: int) -> bytes:
        """Read bytes of a file. Raises DataError if they can't be read now, and OSError
        if there is no such file."""

    def again(self, number: int, offset: int, size: int) -> bytes | None:
        """Read bytes from where they come from, if ``read`` read a copy that may be
        damaged; otherwise return None. Raises as ``read`` does."""
        return None

    def ready(self) -> None:
        """Get everything that makes reading images quick. Raises DataError."""
        return None

    def readers(self, threads: int) -> int:
        """Return how many threads should read at once. threads: as many as this process
        has cores for."""
        return threads


class LocalFiles(ContainerFiles):
    """Files on a disk of this machine."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.names = [*files]

    @property
    def paths(self) -> list[PurePath]:
        return [file.absolute() for file in self.names]

    def places(self) -> list[str]:
        # A link's own name may be that of a class.
        return [f"{os.path.abspath(f)}\n{os.path.realpath(f)}" for f in self.names]

    def about(self) -> np.ndarray:
        return np.array([self._status(file) for file in self.names], np.int64)

    def _status(self, file: Path) -> tuple[int, int]:
        found = status(file)
        if found is None:
            raise DataError(f"{file} is gone since it was listed; run the same command again")
        return found.st_size, found.st_mtime_ns

    @contextmanager
    def whole(self, number: int) -> Iterator[Path]:
        yield self.names[number]

    def read(self, number: int, offset: int, size: int) -> bytes:
        return read_at(self.names[number], offset, size)


def read_at(file: Path, offset: int, size: int) -> bytes:
    """Read bytes of a file on a disk, which is held open. Raises as
    ``OpenFiles.read``."""
    return _files.read(file, offset, size)
