"""From a folder of class folders to a manifest: which files there are, which of them are images, and what exactly is in them."""

from __future__ import annotations

import hashlib
import io
import os
import re
import stat
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from cache.schema import UNUSABLE, USABLE, Images, MealError, printable
from pipeline import philox
from pipeline.progress import Progress
from pipeline.render import Header, RenderError, WholeDecode, quiet_decoders, threads_for
from pipeline.scanned import Scanned

MAX_MEGAPIXELS = 179.0  # what Pillow, too, takes for a decompression bomb; 0.5 GB decoded
LOOKERS = 16  # threads that list folders where that is mostly waiting; elsewhere they would only wait for each other
FAR, TELLING = 20e-6, 500  # seconds a file, from which on it is: the disk is another machine's; and how many files tell
SCAN_WINDOW = 4096  # files handed to the threads at a time
_REPAIR = "put the image back as it was, or begin anew, with another store or --out"
ROW_ORDER = 0xFFFFFFFF  # the counter of the row order's draws; no view has this number


class DataError(MealError):
    """A data set that isn't there, isn't laid out as expected, or isn't the one that a store was made from."""


def split_folder(data: str | Path, split: str) -> Path:
    """The folder that holds the class folders: DATA/SPLIT if there is one, or DATA itself if it isn't divided into splits."""
    data = Path(data)
    if not data.is_dir():
        raise DataError(f"there is no folder {data}; --data must name a folder of class folders, or one with train/ and val/")
    splits = [name for name in dict.fromkeys((split, "train", "val")) if is_split(data, name)]
    if split in splits:
        return data / split
    if splits:
        raise DataError(f"{data} has {' and '.join(splits)} but no {split}; name another --split, or add the folder")
    return data


def is_split(data: str | Path, name: str) -> bool:
    """Whether DATA/NAME is a split, which holds class folders, and not a class that happens to be called train, which holds pictures."""
    folder = Path(data, name)
    return folder.is_dir() and any(_is_folder(entry) for entry in os.scandir(folder))


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()  # costs no look at the disk where there is no symbolic link
    except OSError:  # a link to itself
        return False


def class_names(folder: Path) -> list[str]:
    """Names of the class folders, sorted; their places are the class indices."""
    names = sorted(entry.name for entry in os.scandir(folder) if _is_folder(entry) and not entry.name.startswith("."))
    if not names:
        raise DataError(f"{folder} has no class folders; it must hold one folder per class, with the images in them")
    return names


def read_class_map(path: str | Path) -> list[str]:
    """A class map: a text file with one class folder's name a line, whose line number from 0 is its class index."""
    try:
        names = [line.strip() for line in Path(path).read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"--class-map {path} can't be read ({error}); it must be imagenet-1k or a text file with one folder name a line"
        ) from None
    if len(set(names)) != len(names) or not names:
        raise DataError(f"--class-map {path} must hold every class folder's name once, one a line")
    return names


def list_files(folder: Path, classes: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every file below the class folders, hidden ones left out: str [n] paths relative to ``folder``, sorted; int32 [n] class index;
    int64 [n] size in bytes; int64 [n] when it was changed last, ns since 1970. A class folder that isn't among ``classes`` is an error."""
    index = {name: i for i, name in enumerate(classes)}
    names = class_names(folder)
    for name in names:
        if name not in index:
            raise DataError(
                f"class folder {name} of {folder} is not among the {len(classes)} classes ({classes[0]}, {classes[1 % len(classes)]}, …); "
                "pass the --class-map that names it, or take the folder away"
            )

    def look(name: str) -> list[tuple[str, int, int, int]]:
        return [(path, index[name], *about) for path, *about in _walk(folder / name, name)]

    found: list[tuple[str, int, int, int]] = []
    left = iter(names)
    with Progress("looking for files", len(names), "class folders") as progress, ThreadPoolExecutor(LOOKERS) as pool:
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
        raise DataError(f"the class folders of {folder} hold no files")
    found.sort()
    paths, indices, sizes, changed = zip(*found, strict=True)
    return np.array(paths, object), np.array(indices, np.int32), np.array(sizes, np.int64), np.array(changed, np.int64)


def _walk(folder: Path, relative: str) -> Iterator[tuple[str, int, int]]:
    """(path, size, time of change) of every file below; a folder that is reached through a link to one above it is left out."""
    waiting: list[tuple[str, str, frozenset]] = [(str(folder), relative, frozenset())]
    while waiting:
        place, name, above = waiting.pop()
        about = os.stat(place)
        here = (about.st_dev, about.st_ino)
        if here in above:
            continue
        for entry in os.scandir(place):
            if entry.name.startswith("."):
                continue
            path = f"{name}/{entry.name}"
            if _is_folder(entry):
                waiting.append((entry.path, path, above | {here}))
            else:
                try:
                    status = entry.stat()
                except OSError:  # a symbolic link to nothing
                    yield path, -1, 0
                else:
                    yield path, status.st_size, status.st_mtime_ns


def scan(
    folder: Path,
    classes: Sequence[str],
    *,
    exif: str,
    threads: int | None = None,
    order_seed: int | None = None,
    max_megapixels: float = MAX_MEGAPIXELS,
    before: Scanned | None = None,
) -> Images:
    """Read and decode every file whole, and note size, digest, dimensions, and why a file is unusable.

    exif: "ignore" or "apply", as the renderer will decode. order_seed: rows in a random order that depends on the seed and the paths
    (so that a run of rows is a fair sample of the classes); None: sorted by path. max_megapixels: a larger image is unusable, and never decoded: what
    it says of its size decides, since a file of some kilobytes can hold a picture of gigabytes. before: what an earlier scan found, which holds for files
    that haven't changed since; it notes what this one finds.
    """
    paths, class_index, sizes, changed = list_files(folder, classes)
    n = len(paths)
    if order_seed is not None:
        order = row_order(order_seed, paths)
        paths, class_index, sizes, changed = paths[order], class_index[order], sizes[order], changed[order]
    digest = np.zeros((n, 32), np.uint8)
    height, width = np.zeros(n, np.int32), np.zeros(n, np.int32)
    reason = np.full(n, "", dtype=object)
    if before:
        known, found = before.recall(exif, paths, sizes, changed)
        columns = {"bytes": sizes, "digest": digest, "height": height, "width": width}
        for name, values in found.items():
            columns[name][known] = values
    unknown = np.flatnonzero((height == 0) | (height.astype(np.int64) * width > max_megapixels * 1e6))
    height[unknown] = width[unknown] = 0
    threads = threads_for(threads)
    decoders = threading.local()

    def examine(row: int) -> None:
        """Fill in the columns of one file."""
        if not hasattr(decoders, "look"):
            decoders.look = Look(folder, exif, max_megapixels)
        blob, shape, reason[row] = decoders.look(paths[row])
        if blob is None:
            sizes[row] = max(sizes[row], 0)
            return
        sizes[row] = len(blob)
        digest[row] = np.frombuffer(hashlib.sha256(blob).digest(), np.uint8)
        height[row], width[row] = shape or (0, 0)

    with quiet_decoders(), Progress("reading images", len(unknown), "images") as progress, ThreadPoolExecutor(threads) as pool:
        try:
            for start in range(0, len(unknown), SCAN_WINDOW):
                for _ in pool.map(examine, unknown[start : start + SCAN_WINDOW]):
                    progress.advance(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # when it is stopped, thousands are still waiting
    status = np.where(reason == "", USABLE, UNUSABLE).astype(np.uint8)
    found = Images(np.array([_printable(p) for p in paths], object), sizes, digest, height, width, class_index, status, reason)
    if before:
        before.note(exif, found, changed)
    return found


class Look:
    """Looks at one file after the other, in one thread: bytes (None if they can't be read), height and width in pixels (None if it can't be used), and
    the reason, empty if there is none."""

    def __init__(self, folder: Path, exif: str, max_megapixels: float) -> None:
        self.folder, self.max_megapixels = folder, max_megapixels
        self.header, self.whole = Header(exif), WholeDecode(exif)

    def __call__(self, path: str) -> tuple[bytes | None, tuple[int, int] | None, str]:
        blob = _read_any(self.folder, path)
        if isinstance(blob, str):
            return None, None, blob
        shape = self.header(blob)
        if shape is not None and shape[0] * shape[1] > self.max_megapixels * 1e6:
            return blob, None, _too_large(*shape, self.max_megapixels)
        shape = shape and self.whole(blob)
        return blob, shape, "" if shape else why_undecodable(blob, self.max_megapixels)


def row_order(seed: int, paths: np.ndarray) -> np.ndarray:
    """int64 [n]: a random order of the rows that depends on the seed and on each path alone."""
    low, high = philox.split(philox.identities(np.array([_printable(p) for p in paths], object)))
    drawn = philox.words(seed, low, high, ROW_ORDER)
    return np.lexsort((drawn[:, 1], drawn[:, 0]))


def _printable(path: str) -> str:
    """A path as UTF-8 text; bytes that are none are written as \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _read_any(folder: Path, path: str) -> bytes | str:
    """The file's bytes, or the reason why they can't be used."""
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
    return f"too large: {height * width / 1e6:,.1f} megapixels, the limit is {limit:g} (render.max_megapixels)"


def why_undecodable(blob: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> str:
    """A reason for people, for bytes that the renderer failed to decode."""
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
    except Image.DecompressionBombError as error:  # Pillow's own limit, before it tells the size
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        return _too_large(1, int(pixels[1]), max_megapixels) if pixels else f"too large: {error}"
    except Exception as error:  # a damaged file can raise anything in Pillow's plugins; the file is unusable in any case
        return f"damaged: {' '.join(str(error).split())[:120] or type(error).__name__}"
    return f"DALI can't decode this {kind} file"


class Reader:
    """Reads images of a manifest, several at a time, and refuses any that is not, byte for byte, what the manifest saw."""

    def __init__(self, folder: Path, images: Images, threads: int | None = None) -> None:
        self.folder, self.images = folder, images
        self.pool = ThreadPoolExecutor(threads_for(threads))

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __call__(self, rows: Sequence[int] | np.ndarray) -> list[bytes]:
        return list(self.pool.map(self._one, rows))

    def _one(self, row: int) -> bytes:
        path = self.folder / self.images.path[row]
        try:
            blob = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} can't be read any more ({error.strerror}); {_REPAIR}") from None
        if hashlib.sha256(blob).digest() != self.images.digest[row].tobytes():
            raise DataError(
                f"{path} has changed since the manifest was made (other contents: {len(blob)} bytes now, {self.images.bytes[row]} then); {_REPAIR}"
            )
        return blob


@contextmanager
def naming(images: Images, rows: np.ndarray) -> Iterator[None]:
    """Say which file it was when rendering a batch of these rows fails."""
    try:
        yield
    except RenderError as error:
        if error.place is None:
            raise
        repair = "check renderer and memory"
        if error.on_gpu:
            repair = "convert it or take it out of the folder, or decode on the CPU (render.backend: cpu), for a new store"
        who = "the CPU decodes it" if error.on_gpu else "the manifest's pass could decode it"
        raise DataError(f"{images.path[rows[error.place]]}: {error}; {who}, so {repair}") from None


def require_same_files(folder: Path, images: Images, classes: Sequence[str], made: str) -> None:
    """Raises DataError unless the folder holds exactly the files of the manifest, with the same sizes (contents are compared when read)."""
    paths, class_index, sizes, _ = list_files(folder, classes)
    paths = np.array([_printable(p) for p in paths], object)
    here = np.argsort(paths, kind="stable")  # a name that isn't UTF-8 sorts elsewhere when it is printed
    paths, class_index, sizes = paths[here], class_index[here], sizes[here]
    order = images.by_path
    if np.array_equal(paths, images.path[order]):
        changed = np.flatnonzero(
            (sizes != images.bytes[order]) & (images.status[order] == USABLE) | (class_index != images.class_index[order])
        )
        if len(changed) == 0:
            return
        one = changed[0]
        first, count, what = paths[one], len(changed), "of another size or class"
        if sizes[one] != images.bytes[order][one]:
            first = f"{first} ({images.bytes[order][one]} bytes then, {sizes[one]} now)"
    else:
        now, then = set(paths), set(images.path)
        missing, added = sorted(then - now), sorted(now - then)
        first, count, what = (missing[0], len(missing), "missing") if missing else (added[0], len(added), "added")
    raise DataError(
        f"{folder} is not the data set that {made} was made from: {count} of {len(images)} images {what}, the first is {first}; "
        "pass the folder it was made from, or generate a new store"
    )


def empty_classes(images: Images, classes: Sequence[str], folder: Path) -> list[str]:
    """A line if classes have no usable image, which may be meant (a subset) or a folder forgotten."""
    seen = set(images.class_index[images.usable].tolist())
    empty = [name for i, name in enumerate(classes) if i not in seen]
    return [f"{len(empty)} of {len(classes)} classes have no usable image in {folder}, the first is {empty[0]}"] if empty else []


def unusable_summary(images: Images) -> list[str]:
    """One line per kind of unusable file: count, reason, first example."""
    lines = []
    bad = images.status != USABLE
    kinds: dict[str, list[str]] = {}
    for path, reason in zip(images.path[bad], images.reason[bad], strict=True):
        kinds.setdefault(reason.split(":")[0], []).append(f"{path} ({reason})")
    for examples in kinds.values():
        lines.append(printable(f"{len(examples)} unusable: {examples[0]}" + (", …" if len(examples) > 1 else "")))
    return lines
