"""Read images that are files of their own, under paths relative to a folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipeline.images.names import as_text, on_disk
from pipeline.images.patience import listed, patiently, read_file, status
from pipeline.images.sources.source import ImageSource, Listing
from pipeline.runtime.progress import Progress
from pipeline.runtime.wording import same

LOOKERS = 16  # threads that ask for the sizes of files, which is mostly waiting


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

    def where(self, name: str, address: Any) -> str:
        return str(self.file(address))

    def listing(
        self, rows: Sequence[tuple[str, int]]
    ) -> tuple[Listing | None, list[tuple[str, int]]]:
        """Ask for the sizes of files, several at a time.

        rows: (name, class index) of each. Returns their listing, None if none is there,
        and the rows of the files that aren't. A link to nothing is there.
        """

        def look(row: tuple[str, int]) -> tuple[str, int, int, int] | None:
            file = self.file(row[0])
            if (found := status(file)) is not None:
                return *row, found.st_size, found.st_mtime_ns
            return (*row, -1, 0) if os.path.lexists(file) else None

        there: list[tuple[str, int, int, int]] = []
        missing = []
        with (
            Progress("looking for files", len(rows), "images") as progress,
            ThreadPoolExecutor(LOOKERS) as pool,
        ):
            for row, found in zip(rows, pool.map(look, rows), strict=True):
                there.append(found) if found else missing.append(row)
                progress.advance(1)
        return Listing.of_files(there) if there else None, missing

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
