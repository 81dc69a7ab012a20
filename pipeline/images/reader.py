"""Read the image files of a manifest, and name the file that a renderer refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from cache.format.manifest import Images
from pipeline.images.data_set import DataSet
from pipeline.images.patience import DataError
from pipeline.render.errors import NoMemory, RenderError, lacks_memory
from pipeline.runtime.threads import threads_for

_REPAIR = "put the image back as it was, or begin anew, with another store or --out"
# For images whose manifest is made at each start.
LOOK_AGAIN = "run the same command again, which looks at the images anew"


class Reader:
    """Reads images of a manifest, several at a time. Raises DataError for a file whose
    bytes aren't the bytes that the manifest recorded, and for a file that can't be read
    now. data: where the images lie. repair: the advice to the user in such an error."""

    def __init__(
        self, data: DataSet, images: Images, threads: int | None = None, repair: str = _REPAIR
    ) -> None:
        self.source, self.images, self.repair = data.source, images, repair
        self.addresses = data.addresses(images)
        self.threads = data.source.readers(threads_for(threads))
        self.pool = ThreadPoolExecutor(self.threads)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __call__(self, rows: Sequence[int] | np.ndarray) -> list[bytes]:
        # A task for each file would cost a third as much as reading the file.
        parts = np.array_split(np.asarray(rows), min(len(rows), 4 * self.threads) or 1)
        return [blob for part in self.pool.map(self._several, parts) for blob in part]

    def _several(self, rows: np.ndarray) -> list[bytes]:
        return [self.one(row) for row in rows.tolist()]

    def _where(self, row: int) -> str:
        return self.source.where(self.images.path[row], self.addresses[row])

    def one(self, row: int) -> bytes:
        """Read the image of one row, in this thread."""
        address = self.addresses[row]
        try:
            blob = self.source.read(address)
        except OSError as error:
            raise DataError(
                f"{self._where(row)} can't be read any more ({error.strerror}); {self.repair}"
            ) from None
        if not self._is(row, blob):
            blob = self.source.again(address) or blob
        if not self._is(row, blob):
            raise DataError(
                f"{self._where(row)} has changed since the manifest was made (other "
                f"contents: {len(blob)} bytes now, {self.images.bytes[row]} then); {self.repair}"
            )
        return blob

    def _is(self, row: int, blob: bytes) -> bool:
        return hashlib.sha256(blob).digest() == self.images.digest[row].tobytes()


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
    several = len(rows) > 1
    who = f"a batch of {len(rows)} images needs" if several else "one image needs"
    return DataError(
        f"{error}; {who} more memory than there is, the largest "
        f"is {images.path[row]} ({images.height[row]:,} × {images.width[row]:,} pixels); free "
        f"memory, {'lower --batch-size, ' if several else ''}or leave large images out "
        f"(render.max_megapixels)"
    )
