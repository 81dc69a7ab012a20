"""Read the image files of a manifest, and name the file that a renderer refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from cache.format.manifest import Images
from pipeline.images.names import as_text, on_disk
from pipeline.images.patience import DataError, listed, read_file
from pipeline.render.dali import NoMemory, RenderError, lacks_memory
from pipeline.runtime.threads import threads_for
from pipeline.runtime.wording import same

_REPAIR = "put the image back as it was, or begin anew, with another store or --out"
# For images whose manifest is made at each start.
LOOK_AGAIN = "run the same command again, which looks at the images anew"


class Reader:
    """Reads images of a manifest, several at a time. Raises DataError for a file whose
    bytes aren't the bytes that the manifest recorded, and for a file that can't be read
    now. repair: the advice to the user in such an error."""

    def __init__(
        self, folder: Path, images: Images, threads: int | None = None, repair: str = _REPAIR
    ) -> None:
        self.folder, self.images, self.repair = folder, images, repair
        self.threads = threads_for(threads)
        self.pool = ThreadPoolExecutor(self.threads)
        self._listed: dict[Path, dict[str, str]] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __call__(self, rows: Sequence[int] | np.ndarray) -> list[bytes]:
        # A task for each file would cost a third as much as reading the file.
        parts = np.array_split(np.asarray(rows), min(len(rows), 4 * self.threads) or 1)
        return [blob for part in self.pool.map(self._several, parts) for blob in part]

    def _several(self, rows: np.ndarray) -> list[bytes]:
        return [self._one(row) for row in rows.tolist()]

    def _one(self, row: int) -> bytes:
        name = self.images.path[row]
        path = self.folder / on_disk(name)
        try:
            try:
                blob = read_file(path)
            except FileNotFoundError:
                # macOS, and archives made there, write é as two characters.
                if name.isascii():
                    raise
                blob = read_file(self._of_same_name(name))
        except OSError as error:
            raise DataError(
                f"{path} can't be read any more ({error.strerror}); {self.repair}"
            ) from None
        if hashlib.sha256(blob).digest() != self.images.digest[row].tobytes():
            raise DataError(
                f"{path} has changed since the manifest was made (other contents: {len(blob)} "
                f"bytes now, {self.images.bytes[row]} then); {self.repair}"
            )
        return blob

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


@contextmanager
def naming(images: Images, rows: np.ndarray) -> Iterator[None]:
    """Turn a RenderError for a batch of these rows into a DataError that names the
    file. For want of memory it names the largest image of the batch."""
    try:
        yield
    except (NoMemory, torch.OutOfMemoryError) as error:
        raise _no_memory(error, images, rows) from None
    except RenderError as error:
        if error.place is None:
            raise
        row = rows[error.place]
        if not error.on_gpu and lacks_memory(int(images.height[row]), int(images.width[row])):
            raise _no_memory(error, images, rows) from None
        repair = "check renderer and memory"
        if error.on_gpu:
            repair = (
                "convert it or take it out of the folder, or decode on the CPU "
                "(render.backend: cpu), for a new store"
            )
        who = "the CPU decodes it" if error.on_gpu else "the manifest's pass could decode it"
        raise DataError(f"{images.path[row]}: {error}; {who}, so {repair}") from None


def _no_memory(error: Exception, images: Images, rows: np.ndarray) -> DataError:
    row = rows[(images.height[rows].astype(np.int64) * images.width[rows]).argmax()]
    return DataError(
        f"{error}; a batch of {len(rows)} images needs more memory than there is, the largest "
        f"is {images.path[row]} ({images.height[row]:,} × {images.width[row]:,} pixels); free "
        f"memory, lower --batch-size, or leave large images out (render.max_megapixels)"
    )
