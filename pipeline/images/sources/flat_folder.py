"""Read images from a folder that holds images and no class folders. Soft labels need no
classes."""

from __future__ import annotations

import os
from collections.abc import Collection, Container

from cache.format.manifest import printable_paths
from pipeline.images.names import as_text, is_hidden, is_system_path, may_be_image
from pipeline.images.patience import DataError, is_folder, listed, status
from pipeline.images.sources.files import FileSource
from pipeline.images.sources.source import Classes, Listing
from pipeline.runtime.progress import say
from pipeline.runtime.wording import counted


class FlatFolder(FileSource):
    """The files of one folder, without those of folders in it. A name is the file's
    name."""

    in_folders = True

    def describe(self) -> str:
        return "a folder without classes"

    def classes(self, known: Collection[str] = ()) -> Classes:
        return Classes([])

    def list(self, classes: Classes, known: Container[str] = (), *, every: bool = False) -> Listing:
        found = []
        for entry in listed(self.path):
            name = as_text(entry.name)
            if is_hidden(name) or is_folder(entry):
                continue
            if not may_be_image(name) and printable_paths(name) not in known:
                continue
            if every or not is_system_path(name) or printable_paths(name) in known:
                found.append((name, -1, *_status(entry)))
        if not found:
            raise DataError(f"{self.path} holds no images")
        return Listing.of_files(found)

    def require_sound(self, split: str) -> None:
        images = sum(may_be_image(e.name) and not is_folder(e) for e in listed(self.path))
        say(f"{self.path}: {counted(images, 'image')} in no class folder, so nothing tells classes")


def _status(entry: os.DirEntry) -> tuple[int, int]:
    """Return size in bytes and time of the last change in ns; (-1, 0) for a link to
    nothing."""
    found = status(entry.path)
    return (-1, 0) if found is None else (found.st_size, found.st_mtime_ns)
