"""Read images from a folder that holds images and no class folders. Soft labels need no
classes."""

from __future__ import annotations

from collections.abc import Collection, Container

from cache.format.manifest import printable_paths
from pipeline.images.names import as_text, is_system_path, may_be_image
from pipeline.images.patience import DataError, is_folder, listed
from pipeline.images.sources.files import FileSource
from pipeline.images.sources.source import Classes, Listing
from pipeline.runtime.progress import say


class FlatFolder(FileSource):
    """The files of one folder, without those of folders in it. A name is the file's
    name."""

    in_folders = True

    def describe(self) -> str:
        return "a folder without classes"

    def classes(self, known: Collection[str] = ()) -> Classes:
        return Classes([])

    def list(self, classes: Classes, known: Container[str] = (), *, every: bool = False) -> Listing:
        names = [as_text(entry.name) for entry in listed(self.path) if not is_folder(entry)]
        wanted = [
            name
            for name in names
            if printable_paths(name) in known
            or (may_be_image(name) and (every or not is_system_path(name)))
        ]
        found, _ = self.listing([(name, -1) for name in wanted])
        if found is None:
            raise DataError(f"{self.path} holds no images")
        return found

    def require_sound(self, split: str) -> None:
        say(f"{self.path}: images in no class folder, so nothing tells classes")
