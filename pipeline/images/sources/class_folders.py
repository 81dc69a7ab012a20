"""Read images from class folders: a folder per class, with the images in it."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from cache.format.manifest import printable_paths
from pipeline.images.names import as_text, is_hidden, is_system_path, on_disk
from pipeline.images.patience import DataError, is_folder, listed, status
from pipeline.images.sources import folder_checks
from pipeline.images.sources.files import FileSource
from pipeline.images.sources.folder_names import class_folders
from pipeline.images.sources.source import Classes, Listing
from pipeline.runtime.progress import Progress

# Threads that list folders on another machine's disk, where listing is mostly waiting.
# On a local disk they would only wait for each other.
LOOKERS = 16
# A disk counts as another machine's if listing takes more than FAR seconds a file,
# measured over the first TELLING files.
FAR, TELLING = 20e-6, 500


class ClassFolders(FileSource):
    """The images of class folders. A name is the path in ``path``, CLASS/…/FILE; every
    file below a class folder counts, except hidden files and files that a system
    left."""

    noun = "class folder"
    in_folders = True

    def describe(self) -> str:
        return "class folders"

    def classes(self, known: Collection[str] = ()) -> Classes:
        return Classes(class_folders(self.path, known))

    def list(self, classes: Classes, known: Container[str] = (), *, every: bool = False) -> Listing:
        found: list[tuple[str, int, int, int]] = []
        index = {name: i for i, name in enumerate(classes.names)}

        def look(name: str) -> list[tuple[str, int, int, int]]:
            return [
                (path, index[name], size, changed)
                for path, size, changed in _walk(self.path / on_disk(name), name)
                if every
                or not is_system_path(path.partition("/")[2])
                or printable_paths(path) in known
            ]

        left = iter(classes.names)
        with (
            Progress("looking for files", len(classes.names), "class folders") as progress,
            ThreadPoolExecutor(LOOKERS) as pool,
        ):
            begun = time.perf_counter()
            for name in left:
                found += look(name)
                progress.advance(1)
                if len(found) >= TELLING:
                    break
            far = time.perf_counter() - begun > FAR * len(found)
            try:
                for part in (pool.map if far else map)(look, left):
                    found += part
                    progress.advance(1)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
        if not found:
            raise DataError(f"the class folders of {self.path} hold no files")
        return Listing.of_files(found)

    def require_sound(self, split: str) -> None:
        folder_checks.require_class_folders(self.path, split)

    def say_depth(self, names: Collection[str]) -> None:
        folder_checks.say_depth(self.path, names)

    def require_images(self, names: Collection[str] | None = None, split: str = "train") -> None:
        folder_checks.require_images(self.path, split, names)


def _walk(folder: Path, relative: str) -> Iterator[tuple[str, int, int]]:
    """Yield (path, size, time of change) of every file below a folder. A link to a
    folder above itself is left out."""
    waiting: list[tuple[str, str, frozenset]] = [(str(folder), relative, frozenset())]
    while waiting:
        place, name, above = waiting.pop()
        about = status(place)
        if about is None:
            raise DataError(f"{place} is gone since it was listed; run the same command again")
        here = (about.st_dev, about.st_ino)
        if here in above:
            continue
        for entry in listed(place):
            if is_hidden(entry.name):
                continue
            path = f"{name}/{as_text(entry.name)}"
            if is_folder(entry):
                waiting.append((entry.path, path, above | {here}))
            elif (found := _status(entry)) is None:  # a symbolic link to nothing
                yield path, -1, 0
            else:
                yield path, found.st_size, found.st_mtime_ns


def _status(entry: os.DirEntry) -> os.stat_result | None:
    try:
        return entry.stat()
    except OSError:
        return status(entry.path)
