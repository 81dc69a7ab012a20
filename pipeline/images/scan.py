"""Scan class folders into a manifest: list the files, decode them, and record their
contents, or the reason why they are unusable."""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from cache.errors import printable
from cache.format.manifest import UNUSABLE, USABLE, Images, printable_paths
from pipeline.images.folders import DataFolder, list_files
from pipeline.images.scan_cache import Scanned
from pipeline.render.dali import Header, WholeDecode, quiet_decoders
from pipeline.render.settings import MAX_MEGAPIXELS, RenderSettings
from pipeline.runtime.progress import Progress, say
from pipeline.runtime.threads import threads_for
from pipeline.sampling.epoch_order import row_order

SCAN_WINDOW = 4096  # files handed to the threads at a time


def scan(
    data: DataFolder,
    settings: RenderSettings,
    *,
    order_seed: int | None = None,
    before: Scanned | None = None,
) -> Images:
    """Read and decode every file whole, and return the manifest: size, digest,
    dimensions, and the reason if a file is unusable.

    settings: of the renderer. An image above its ``max_megapixels`` is never decoded:
    the size in the image's header decides, since a file of some kilobytes can hold a
    picture of gigabytes. order_seed: put the rows in a random order that depends on the
    seed and the paths, so that a run of rows is a fair sample of the classes; None:
    sort the rows by path. before: results of an earlier scan, which are used for files
    that haven't changed since; the new results are noted there.
    """
    paths, class_index, sizes, changed = list_files(data)
    n = len(paths)
    if order_seed is not None:
        order = row_order(order_seed, paths)
        paths, class_index, sizes, changed = (
            paths[order],
            class_index[order],
            sizes[order],
            changed[order],
        )
    digest = np.zeros((n, 32), np.uint8)
    height, width = np.zeros(n, np.int32), np.zeros(n, np.int32)
    reason = np.full(n, "", dtype=object)
    if before:
        known, kept = before.recall(settings.exif, paths, sizes, changed)
        columns = {"bytes": sizes, "digest": digest, "height": height, "width": width}
        for name, values in kept.items():
            columns[name][known] = values
    unknown = np.flatnonzero(
        (height == 0) | (height.astype(np.int64) * width > settings.max_megapixels * 1e6)
    )
    height[unknown] = width[unknown] = 0
    decoders = threading.local()

    def examine(row: int) -> None:
        """Fill in the columns of one file."""
        if not hasattr(decoders, "look"):
            decoders.look = Look(data.path, settings)
        blob, shape, reason[row] = decoders.look(paths[row])
        if blob is None:
            sizes[row] = max(sizes[row], 0)
            return
        sizes[row] = len(blob)
        digest[row] = np.frombuffer(hashlib.sha256(blob).digest(), np.uint8)
        height[row], width[row] = shape or (0, 0)

    with (
        quiet_decoders(),
        Progress("reading images", len(unknown), "images") as progress,
        ThreadPoolExecutor(threads_for(settings.threads)) as pool,
    ):
        try:
            for start in range(0, len(unknown), SCAN_WINDOW):
                for _ in pool.map(examine, unknown[start : start + SCAN_WINDOW]):
                    progress.advance(1)
        finally:
            # If the scan is stopped, thousands of files are still waiting.
            pool.shutdown(wait=False, cancel_futures=True)
    status = np.where(reason == "", USABLE, UNUSABLE).astype(np.uint8)
    found = Images(
        np.array([printable_paths(p) for p in paths], object),
        sizes,
        digest,
        height,
        width,
        class_index,
        status,
        reason,
    )
    if before:
        before.note(settings.exif, found, changed)
    return found


class Look:
    """Examines one file after the other, in one thread. A call returns the file's bytes
    (None if they can't be read), its height and width in pixels (None if the file is
    unusable), and the reason, empty if the file is usable."""

    def __init__(self, folder: Path, settings: RenderSettings) -> None:
        self.folder, self.max_megapixels = folder, settings.max_megapixels
        # Always on the CPU, which decides what is usable: a GPU may refuse more images.
        settings = replace(settings, backend="cpu")
        self.header, self.whole = Header(settings), WholeDecode(settings)

    def __call__(self, path: str) -> tuple[bytes | None, tuple[int, int] | None, str]:
        blob = _read_any(self.folder, path)
        if isinstance(blob, str):
            return None, None, blob
        shape = self.header(blob)
        if shape is not None and shape[0] * shape[1] > self.max_megapixels * 1e6:
            return blob, None, _too_large(*shape, self.max_megapixels)
        shape = shape and self.whole(blob)
        return blob, shape, "" if shape else why_undecodable(blob, self.max_megapixels)


def _read_any(folder: Path, path: str) -> bytes | str:
    """Return the file's bytes, or the reason why they can't be used."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return "the file's name is not UTF-8"
    try:
        if not stat.S_ISREG(os.stat(folder / path).st_mode):
            return "not a regular file"  # reading a pipe would wait for ever
        blob = (folder / path).read_bytes()
    except OSError as error:
        return f"unreadable: {error.strerror}"
    return blob or "empty file"


def _too_large(height: int, width: int, limit: float) -> str:
    return (
        f"too large: {height * width / 1e6:,.1f} megapixels, the limit is {limit:g} "
        f"(render.max_megapixels)"
    )


def why_undecodable(blob: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> str:
    """Return a readable reason why the renderer failed to decode these bytes."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(blob)) as image:
                kind = image.format
                if image.width * image.height > max_megapixels * 1e6:
                    return _too_large(image.height, image.width, max_megapixels)
                image.load()
    except Image.UnidentifiedImageError:
        return "not an image"
    except Image.DecompressionBombError as error:
        # Pillow's own limit, before Pillow tells the size
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        return _too_large(1, int(pixels[1]), max_megapixels) if pixels else f"too large: {error}"
    except Exception as error:
        # A damaged file can raise any error in Pillow's plugins. The file is unusable
        # in any case.
        return f"damaged: {' '.join(str(error).split())[:120] or type(error).__name__}"
    return f"DALI can't decode this {kind} file"


def empty_classes(images: Images, data: DataFolder) -> list[str]:
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
        kinds.setdefault(reason.split(":")[0], []).append(f"{path} ({reason})")
    for examples in kinds.values():
        lines.append(
            printable(
                f"{len(examples)} unusable: {examples[0]}" + (", …" if len(examples) > 1 else "")
            )
        )
    return lines


def scan_and_say(
    data: DataFolder,
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
