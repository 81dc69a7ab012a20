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
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLESPERPIXEL,
    ImageFileDirectory_v2,
)

from cache.errors import printable
from cache.format.manifest import UNUSABLE, USABLE, Images, printable_paths
from pipeline.images.folders import DataError, DataFolder, list_files
from pipeline.images.scan_cache import Scanned
from pipeline.render.dali import Header, WholeDecode, lacks_memory, quiet_decoders
from pipeline.render.settings import MAX_MEGAPIXELS, RenderSettings
from pipeline.runtime.progress import Progress, say
from pipeline.runtime.threads import threads_for
from pipeline.sampling.epoch_order import row_order

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
CMYK = 5  # TIFF 6.0, section 16
_BRANDS = {  # first brand of a file of boxes → format
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis"), "HEIC"),
    **dict.fromkeys((b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"),
    **dict.fromkeys((b"mif1", b"msf1"), "HEIF"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
}
_MARKER = re.compile(rb"\xff+[^\x00\xff]")  # of a JPEG, with fill bytes
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
        stated, shape = shape, shape and (self.whole(blob) or self.whole(blob))
        if shape:
            reason = why_misread(blob)
            return blob, None if reason else shape, reason
        if stated and lacks_memory(*stated):
            raise DataError(
                f"{self.folder / path} can't be decoded for want of memory ({stated[0]:,} × "
                f"{stated[1]:,} pixels); free memory, or lower render.threads or "
                f"render.max_megapixels"
            )
        return blob, None, why_undecodable(blob, self.max_megapixels)


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
    """Return a readable reason why the renderer failed to decode these bytes. The part
    before a colon is the kind of reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(blob)) as image:
                kind = image.format
                if image.width * image.height > max_megapixels * 1e6:
                    return _too_large(image.height, image.width, max_megapixels)
                image.load()
    except Image.UnidentifiedImageError:
        kind = _format_unknown_to_pillow(blob)
        if not kind:
            return "not an image"
    except Image.DecompressionBombError as error:
        # Pillow's own limit, before Pillow tells the size
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        return _too_large(1, int(pixels[1]), max_megapixels) if pixels else f"too large: {error}"
    except Exception as error:
        # A damaged file can raise any error in Pillow's plugins. The file is unusable
        # in any case.
        return f"damaged: {' '.join(str(error).split())[:120] or type(error).__name__}"
    repair = "save it again" if kind in ("JPEG", "PNG") else "convert it to JPEG or PNG"
    return _extraneous_bytes(blob) or f"DALI can't decode this {kind} file: {repair}"


def why_misread(blob: bytes) -> str:
    """Return the reason why the renderer's pixels of a file that it decodes are wrong;
    empty if they are right.

    DALI 2.4 takes the values of a TIFF in a wrong order if there are two for a pixel
    (grey with alpha), or if they lie in planes and have 16 bits or alpha. Of
    floating-point numbers it takes 1 for white.
    """
    if blob[:4] not in _TIFF:
        return ""
    try:
        with warnings.catch_warnings(), io.BytesIO(blob) as file:
            warnings.simplefilter("ignore")
            tags = ImageFileDirectory_v2(file.read(16 if blob[2] == 43 or blob[3] == 43 else 8))
            file.seek(tags.next)
            tags.load(file)
            samples, planes = tags.get(SAMPLESPERPIXEL, 1), tags.get(PLANAR_CONFIGURATION, 1) == 2
            right = samples == 3 or tags.get(PHOTOMETRIC_INTERPRETATION) == CMYK
            if samples == 2 or (planes and not (right and set(tags[BITSPERSAMPLE]) == {8})):
                return "DALI misreads this kind of TIFF file: convert it to PNG"
            with Image.open(file) as image:
                values = np.asarray(image) if image.mode == "F" else np.zeros(1)
    except Exception:  # DALI decodes TIFFs that Pillow doesn't know
        return ""
    if ((values >= 0) & (values <= 1)).all():
        return ""
    return (
        f"DALI misreads this TIFF file: its numbers go from {values.min():g} to "
        f"{values.max():g}, not from 0 to 1; convert it to PNG"
    )


def _format_unknown_to_pillow(blob: bytes) -> str:
    """Return the name of an image format that Pillow may not know; empty for others."""
    if blob.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL"
    if blob[4:8] == b"ftyp":  # ISO/IEC 14496-12, 4.3
        return _BRANDS.get(blob[8:12], "")
    return "SVG" if re.match(rb"\s*<(svg|\?xml[^<]*<svg)", blob[:1000]) else ""


def _extraneous_bytes(blob: bytes) -> str:
    """Return the reason if a JPEG has bytes between its marker segments (ITU-T T.81,
    B.1.1.2). Pillow's decoder skips them, DALI's parser doesn't."""
    place = 2
    while blob[:2] == b"\xff\xd8" and (marker := _MARKER.search(blob, place)):
        if between := marker.start() - place:
            return (
                f"extraneous bytes: {between:,} before the marker at byte {marker.start():,}, "
                f"which DALI doesn't skip; save it again, or without loss by jpegtran -copy all"
            )
        code = blob[marker.end() - 1]
        if code == 0xDA:  # the scan begins
            break
        alone = code == 0x01 or 0xD0 <= code <= 0xD9
        length = int.from_bytes(blob[marker.end() : marker.end() + 2], "big")
        place = marker.end() + (0 if alone else max(2, length))
    return ""


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
