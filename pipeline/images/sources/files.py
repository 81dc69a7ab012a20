"""Read images that are files of their own, under paths relative to a folder."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from pipeline.images.names import as_text, on_disk
from pipeline.images.patience import listed, patiently, read_file
from pipeline.images.sources.source import ImageSource
from pipeline.runtime.wording import same


class FileSource(ImageSource):
    """Images that are files of their own. A name is the file's path relative to
    ``folder``, with forward slashes, and the address is the name."""

    def __init__(self, path: Path, folder: Path | None = None) -> None:
        super().__init__(path)
        self.folder = path if folder is None else folder
        self._listed: dict[Path, dict[str, str]] = {}

    def file(self, address: Any) -> Path:
        """Return the path of a file."""
        return self.folder / on_disk(str(address))

    def where(self, address: Any) -> str:
        return str(self.file(address))

    def read(self, address: Any) -> bytes:
        try:
            return read_file(self.file(address))
        except FileNotFoundError:
            # macOS, and archives made there, write é as two characters.
            if str(address).isascii():
                raise
            return read_file(self._of_same_name(str(address)))

    def readable(self, address: Any) -> str:
        file = self.file(address)
        found = patiently(file.stat, file)
        # Reading a pipe would wait for ever.
        return "" if stat.S_ISREG(found.st_mode) else "not a regular file"

    def _of_same_name(self, name: str) -> Path:
        """Return the file whose path differs from a manifest's path in Unicode
        normalisation only. Raises FileNotFoundError if there is none."""
        place = self.folder
        for part in name.split("/"):
            place /= self._names(place).get(same(part), on_disk(part))
        return place

    def _names(self, folder: Path) -> dict[str, str]:
        """Return the names in a folder by their normalised form, listed once."""
        if folder not in self._listed:
            self._listed[folder] = {same(as_text(e.name)): e.name for e in listed(folder)}
        return self._listed[folder]
