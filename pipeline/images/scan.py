"""Scan a data set into a manifest: list the files, decode them, and record their
contents, or the reason why they are unusable."""

from __future__ import annotations

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from cache.errors import printable
from cache.format.manifest import UNUSABLE, USABLE, Images, printable_paths
from cache.system.signals import finishing
from pipeline.images.data_set import DataSet
from pipeline.images.names import is_utf8
from pipeline.images.patience import DataError
from pipeline.images.reasons import shown, too_large, why_misread, why_undecodable
from pipeline.images.scan_cache import Scanned
from pipeline.images.sources.source import ImageSource, Listing
from pipeline.render.dali import Header, WholeDecode, quiet_decoders
from pipeline.render.errors import lacks_memory
from pipeline.render.settings import RenderSettings
from pipeline.runtime.progress import Progress, say
from pipeline.runtime.threads import threads_for
from pipeline.sampling.epoch_order import row_order

SCAN_WINDOW = 4096  # files handed to the threads at a time


def scan(
    data: DataSet,
    settings: RenderSettings,
    *,
    order_seed: int | None = None,
    before: Scanned | None = None,
    every: bool = False,
) -> Images:
    """Read and decode every file whole, and return the manifest: size, digest,
    dimensions, and the reason if a file is unusable.

    settings: of the renderer. An image above its ``max_megapixels`` is never decoded:
    the size in the image's header decides, since a file of some kilobytes can hold a
    picture of gigabytes. order_seed: put the rows in a random order that depends on the
    seed and the paths, so that a run of rows is a fair sample of the classes; None:
    sort the rows by path. before: results of an earlier scan, which are used for files
    that haven't changed since; the new results are noted there. A scan that is stopped
    keeps what it has read there. every: list the files that a system left, too, as
    versions up to 0.8 did. Raises DataError for a file that can't be read now:
    such a file is not unusable.
    """
    data.require_sound()
    every = every or (before is not None and before.lists_all)
    files = data.list(every=every)
    if not data.mapped:
        data.source.say_depth(files.name)
    table = _Table(files, order_seed)
    if before:
        table.fill(*before.recall(settings.exif, table.paths, table.sizes, table.changed))
    unknown = table.unknown(settings.max_megapixels)
    decoders = threading.local()

    def examine(row: int) -> None:
        if not hasattr(decoders, "look"):
            decoders.look = Look(data.source, settings)
        table.put(row, *decoders.look(table.files, row))

    def note() -> None:
        before.note(settings.exif, table.images(), table.changed)

    with (
        quiet_decoders(),
        Progress("reading images", len(unknown), "images") as progress,
        ThreadPoolExecutor(threads_for(settings.threads)) as pool,
    ):
        try:
            for start in range(0, len(unknown), SCAN_WINDOW):
                for _ in pool.map(examine, unknown[start : start + SCAN_WINDOW]):
                    progress.advance(1)
                    if before and before.due():
                        note()
                        before.keep_part()
        except BaseException:
            # If the scan is stopped, thousands of files are still waiting.
            pool.shutdown(wait=False, cancel_futures=True)
            if before and progress.done:
                with finishing():
                    note()
                    before.keep_part()
            raise
    if before:
        note()
        if before.file and before.due(at_end=True):
            before.keep_part()  # a run may be stopped while it scans its other images
    return table.images()


class _Table:
    """The rows of a manifest while they are filled in, by several threads.

    files: of the data set. order_seed: as in ``scan``.
    """

    def __init__(self, files: Listing, order_seed: int | None) -> None:
        if order_seed is not None:
            files = files.take(row_order(order_seed, files.name))
        self.files, self.paths, self.class_index = files, files.name, files.class_index
        self.sizes, self.changed = files.size.copy(), files.changed
        n = len(self.paths)
        self.digest = np.zeros((n, 32), np.uint8)
        self.height, self.width = np.zeros(n, np.int32), np.zeros(n, np.int32)
        self.reason: np.ndarray = np.full(n, "not looked at", dtype=object)

    def fill(self, rows: np.ndarray, kept: dict[str, np.ndarray]) -> None:
        """Fill in the rows that are known from an earlier scan, all usable."""
        for name in ("digest", "height", "width") if kept else ():
            getattr(self, name)[rows] = kept[name]
        self.reason[rows] = ""

    def unknown(self, max_megapixels: float) -> np.ndarray:
        """Return the rows that must be looked at, int64 [n]: those that aren't known,
        and those that are larger than the limit."""
        pixels = self.height.astype(np.int64) * self.width
        rows = np.flatnonzero((self.reason != "") | (pixels > max_megapixels * 1e6))
        self.height[rows] = self.width[rows] = 0
        self.reason[rows] = "not looked at"
        return rows

    def put(
        self, row: int, content: bytes | None, shape: tuple[int, int] | None, reason: str
    ) -> None:
        """Fill in a row. content: of the file; None if it can't be read."""
        self.sizes[row] = max(self.sizes[row], 0) if content is None else len(content)
        if content is not None:
            self.digest[row] = np.frombuffer(hashlib.sha256(content).digest(), np.uint8)
        self.height[row], self.width[row] = shape or (0, 0)
        self.reason[row] = reason  # last: other threads then believe the row

    def images(self) -> Images:
        """Return the manifest. Rows that weren't looked at are unusable."""
        return Images(
            np.array([printable_paths(p) for p in self.paths], object),
            self.sizes,
            self.digest,
            self.height,
            self.width,
            self.class_index,
            np.where(self.reason == "", USABLE, UNUSABLE).astype(np.uint8),
            self.reason,
        )


class Look:
    """Examines one file after the other, in one thread. A call returns the file's bytes
    (None if they can't be read), its height and width in pixels (None if the file is
    unusable), and the reason, empty if the file is usable."""

    def __init__(self, source: ImageSource, settings: RenderSettings) -> None:
        self.source, self.max_megapixels = source, settings.max_megapixels
        # Always on the CPU, which decides what is usable: a GPU may refuse more images.
        settings = replace(settings, backend="cpu")
        self.header, self.whole = Header(settings), WholeDecode(settings)

    def __call__(
        self, files: Listing, row: int
    ) -> tuple[bytes | None, tuple[int, int] | None, str]:
        """Examine one file of a listing. Raises DataError if the file can't be read
        now."""
        blob = _read_any(self.source, files, row)
        if isinstance(blob, str):
            return None, None, blob
        shape = self.header(blob)
        if shape is not None and shape[0] * shape[1] > self.max_megapixels * 1e6:
            return blob, None, too_large(*shape, self.max_megapixels)
        stated, shape = shape, shape and (self.whole(blob) or self.whole(blob))
        if shape:
            reason = why_misread(blob)
            return blob, None if reason else shape, reason
        if stated and lacks_memory(*stated):
            place = files.name[row], files.address[row]
            raise DataError(
                f"{self.source.where(*place)} can't be decoded for want of memory "
                f"({stated[0]:,} × {stated[1]:,} pixels); free memory, or lower render.threads or "
                f"render.max_megapixels"
            )
        return blob, None, why_undecodable(blob, self.max_megapixels)


def _read_any(source: ImageSource, files: Listing, row: int) -> bytes | str:
    """Return the file's bytes, or the reason why they can't be used."""
    if reason := str(files.reason[row]):
        return reason
    if not is_utf8(files.name[row]):
        return "the file's name is not UTF-8"
    address = files.address[row]
    try:
        if reason := source.readable(address):
            return reason
        blob = source.read(address)
    except OSError as error:
        if files.size[row] < 0:  # a link to nothing, now as when the folder was listed
            return f"unreadable: {error.strerror}"
        raise DataError(
            f"{source.where(files.name[row], address)} can't be read any more ({error.strerror}): "
            f"it is gone since the folder was listed; run the same command again when nobody "
            f"changes the folder"
        ) from None
    return blob or "empty file"


def empty_classes(images: Images, data: DataSet) -> list[str]:
    """Return one line if classes have no usable image, otherwise none. The data may be
    a subset on purpose, or a folder may be missing."""
    seen = set(images.class_index[images.usable].tolist())
    empty = [name for i, name in enumerate(data.class_names) if i not in seen]
    return (
        [
            f"{len(empty)} of {len(data.class_names)} classes have no usable image in {data.path}, "
            f"the first is {empty[0]}"
        ]
        if empty
        else []
    )


def unusable_summary(images: Images) -> list[str]:
    """Return one line per kind of unusable file: count, reason, first example."""
    lines = []
    bad = images.status != USABLE
    kinds: dict[str, list[str]] = {}
    for path, reason in zip(images.path[bad], images.reason[bad], strict=True):
        kinds.setdefault(shown(reason).split(":")[0], []).append(f"{path} ({shown(reason)})")
    for examples in kinds.values():
        lines.append(
            printable(
                f"{len(examples)} unusable: {examples[0]}" + (", …" if len(examples) > 1 else "")
            )
        )
    return lines


def scan_and_say(
    data: DataSet,
    settings: RenderSettings,
    *,
    order_seed: int | None = None,
    before: Scanned | None = None,
) -> Images:
    """Scan (``scan``), and print the unusable files and the classes without a usable
    image."""
    found = scan(data, settings, order_seed=order_seed, before=before)
    for line in [*unusable_summary(found), *empty_classes(found, data)]:
        say(line)
    return found
