"""Compare a data set with a manifest, by names and sizes, or by contents where the same
images have other names."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np

from cache.format.manifest import USABLE, Images, printable_paths
from pipeline.images.data_set import DataSet
from pipeline.images.names import is_system_path
from pipeline.images.patience import DataError
from pipeline.images.sources import kept
from pipeline.images.sources.source import Listing
from pipeline.runtime.progress import Progress, say
from pipeline.runtime.threads import threads_for
from pipeline.runtime.wording import same

WINDOW = 4096  # files handed to the threads at a time


def has_system_files(data: DataSet) -> bool:
    """Return whether systems left files among the images, which a manifest of a version
    up to 0.8 holds."""
    return len(data.list()) < len(data.list(every=True))


def require_same_files(data: DataSet, images: Images, made: str) -> DataSet:
    """Return the data set with the places of the manifest's files. Raises DataError
    unless it holds exactly the files of the manifest.

    Names that differ in Unicode normalisation only are the same. Files that a system
    left don't count, nor does an unusable file that isn't there. Where the names, the
    sizes and the classes are the manifest's, contents are compared when files are read.
    Where most names are others and the sizes are the manifest's, the same images may
    lie elsewhere under other names: then they are known by their contents. made: the
    store's name in the message.
    """
    listing, foreign = _listed(data, images)
    rows = np.flatnonzero(~_gone(images, listing, files=data.source.in_folders))
    wanted = images.take(rows)
    fault = _difference(listing, wanted, data, made)
    if fault is None:
        if foreign and data.source.noun != "class":
            raise foreign
        if foreign:
            say(
                f"the classes of {data.path} have other names than those of {made}, whose names "
                f"count: the images are the same"
            )
        # Places in containers are found once, for all processes and all readers.
        by_name = listing.address is listing.name
        return data if by_name else replace(data, places=data.source.addresses(images))
    found = _by_content(data, listing, images) if _renamed(listing, wanted) else None
    if found is None:
        raise foreign or fault
    say(
        f"{data.path} holds the images of {made} under other names: they are known by their "
        f"contents"
    )
    places = listing.address[np.maximum(found, 0)]
    return replace(data, places=places)


def _listed(data: DataSet, images: Images) -> tuple[Listing, DataError | None]:
    """List a data set. Returns the listing, and the error if its classes have other
    names; the listing then tells no classes."""
    known = set(images.path.tolist())
    try:
        return data.list(known), None
    except DataError as error:
        told = data.told()
        names = {same(name) for name in data.class_names}
        if told.numbered or {same(name) for name in told.names} <= names:
            raise
        listing = data.source.list(told, known)
        return replace(listing, class_index=np.full(len(listing), -1, np.int32)), error


def _difference(listing: Listing, images: Images, data: DataSet, made: str) -> DataError | None:
    """Return what differs between a listing and a manifest, or None."""
    paths = np.array([printable_paths(p) for p in listing.name], object)
    class_index, sizes, there = listing.class_index, listing.size, images.path
    if set(paths) != set(there):
        paths, there = (np.array([same(p) for p in several], object) for several in (paths, there))
    # Sorted again, since a name that isn't UTF-8 sorts elsewhere in its printable form.
    here, order = _order(paths), _order(there)
    paths, class_index, sizes = paths[here], class_index[here], sizes[here]
    if np.array_equal(paths, there[order]):
        then = images.class_index[order]
        changed = np.flatnonzero(
            (sizes != images.bytes[order]) & (images.status[order] == USABLE)
            | (class_index != then) & (class_index >= 0) & (then >= 0)
        )
        if len(changed) == 0:
            return None
        one = changed[0]
        first, count, what = paths[one], len(changed), "of another size or class"
        if sizes[one] != images.bytes[order][one]:
            first = f"{first} ({images.bytes[order][one]} bytes then, {sizes[one]} now)"
    else:
        now, then = set(paths), set(there)
        missing, added = sorted(then - now), sorted(now - then)
        first, count, what = (
            (missing[0], len(missing), "missing") if missing else (added[0], len(added), "added")
        )
    return DataError(
        f"{data.path} is not the data set that {made} was made from: {count} of {len(images)} "
        f"images {what}, the first is {first}; pass the folder it was made from, or generate a "
        "new store"
    )


def _gone(images: Images, listing: Listing, *, files: bool) -> np.ndarray:
    """Return the rows of unusable files that are gone: bool [images]. files: the source
    lists every file, so that only files that a system left may be gone."""
    here = set(map(printable_paths, listing.name.tolist()))
    return np.array(
        [
            status != USABLE
            and path not in here
            and (not files or is_system_path(path.partition("/")[2]))
            for path, status in zip(images.path, images.status, strict=True)
        ],
        bool,
    )


def _renamed(listing: Listing, images: Images) -> bool:
    """Return whether most of a manifest's names are missing in a listing. If fewer are,
    the data set is the manifest's, and was changed."""
    here = set(map(same, map(printable_paths, listing.name.tolist())))
    return 2 * sum(same(path) in here for path in images.path.tolist()) < len(images)


def _order(paths: np.ndarray) -> np.ndarray:
    """Return the rows in the order of their paths. Python sorts strings twice as fast
    as numpy does."""
    return np.array(sorted(range(len(paths)), key=paths.tolist().__getitem__), np.int64)


def _by_content(data: DataSet, listing: Listing, images: Images) -> np.ndarray | None:
    """Find the manifest's files by their contents. Returns the row of the listing for
    each row of the manifest, int64 [images], -1 for an unusable file; None if the
    listing doesn't hold exactly the usable images.

    Nothing is read unless the sizes are the manifest's. What was found is kept, so that
    the next start reads nothing.
    """
    usable = images.usable
    size, sizes = images.bytes[usable], listing.size
    if Counter(size.tolist()) - Counter(sizes.tolist()) or len(listing) > len(images):
        return None
    file = kept.file_for("contents", _digest_of(listing), images.manifest_digest(), images.order)
    columns = kept.kept(file)
    if columns is not None and columns["found"].shape == (len(images),):
        return columns["found"]
    read = _digests(data, listing, np.flatnonzero(np.isin(sizes, size)))
    by_digest: dict[bytes, list[int]] = defaultdict(list)
    for row in sorted(read, reverse=True):
        by_digest[read[row]].append(row)
    found = np.full(len(images), -1, np.int64)
    for row in usable.tolist():
        if not (same_content := by_digest.get(images.digest[row].tobytes())):
            return None
        # Rows of one content are alike, but for their classes.
        own = int(images.class_index[row])
        at = next((r for r in same_content if listing.class_index[r] == own), same_content[-1])
        same_content.remove(at)
        found[row] = at
    if any(by_digest.values()) and len(listing) - len(usable) > len(images) - len(usable):
        return None
    kept.keep(file, {"found": found})
    return found


def _digest_of(listing: Listing) -> str:
    """Return a digest of names, sizes and times of a listing."""
    h = hashlib.sha256("\0".join(listing.name.tolist()).encode("utf-8", "surrogateescape"))
    for column in (listing.size, listing.changed):
        h.update(np.ascontiguousarray(column).tobytes())
    return h.hexdigest()


def _digests(data: DataSet, listing: Listing, rows: np.ndarray) -> dict[int, bytes]:
    """Read files and return the sha256 of each: row → 32 bytes. A file that can't be
    used is left out."""

    def digest(row: int) -> bytes | None:
        address = listing.address[row]
        if listing.reason[row] or listing.size[row] < 0 or data.source.readable(address):
            return None
        try:
            return hashlib.sha256(data.source.read(address)).digest()
        except FileNotFoundError:
            return None

    found: dict[int, bytes] = {}
    with (
        Progress("looking for the images by their contents", len(rows), "images") as progress,
        ThreadPoolExecutor(data.source.readers(threads_for(None))) as pool,
    ):
        try:
            for start in range(0, len(rows), WINDOW):
                part = rows[start : start + WINDOW].tolist()
                for row, one in zip(part, pool.map(digest, part), strict=True):
                    if one is not None:
                        found[row] = one
                    progress.advance(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return found
