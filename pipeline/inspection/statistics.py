"""What the labels of a store are like: where they are, how certain, whether they agree
with the class folders, and how much the views of an image differ."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cache import LabelStore
from cache.errors import StoreError
from cache.format.codec import entropy
from pipeline.runtime.progress import Progress
from pipeline.runtime.threads import threads_for

LABELS = 200_000  # that are looked at, of a larger store
VIEWS = 8  # in which the same images are looked at, at most
SPREAD = 1 << 25  # numbers: of so many images × classes the mean label over the views is kept
THREADS = 8  # each holds a shard

DONE, MISSING, DAMAGED = range(3)  # the worse the greater


@dataclass
class Survey:
    """Of each label that was looked at an entry; arrays are [labels] where nothing else
    is said."""

    coverage: np.ndarray  # uint8 [views, shards]: DONE, MISSING or DAMAGED
    faults: list[tuple[int, int, str]]  # view, shard, what is wrong
    checked: bool  # whether every finished shard was compared with its digest
    view: np.ndarray  # int32
    row: np.ndarray  # int64
    entropy: np.ndarray  # float32, nats
    first: np.ndarray  # int32, the class with the largest probability
    confidence: np.ndarray  # float32, that probability
    folder: np.ndarray  # float32, the probability of the image's class folder
    boxes: np.ndarray  # int32 [labels, 4]
    # float64 [images seen in several views]: the share of its views that put its most
    # frequent first class first
    loyalty: np.ndarray
    divergence: (
        np.ndarray
    )  # float64 [some of these images]: Jensen-Shannon divergence of the labels of its views, nats


def survey(
    store: LabelStore, *, labels: int = LABELS, check: bool = True, threads: int | None = None
) -> Survey:
    """Look at ``labels`` labels of a store, of the same images in some of its views;
    rows are in random order, so they are a fair sample.

    check: compare every finished shard with its digest, which reads the whole store;
    False: only those that labels are taken from. Raises StoreError if there is no label
    yet, or one can't be read for the moment.
    """
    finished = store.finished()
    begun = np.flatnonzero(finished.any(axis=1))
    if len(begun) == 0:
        raise StoreError(
            f"{store.path} has no label yet; run the same {store.made_by} command again"
        )
    views = begun[_evenly(len(begun), VIEWS)]
    rows = store.usable[finished[views].any(axis=0)[store.usable // store.shard_rows]]
    rows = rows[_evenly(len(rows), max(1, labels // len(views)))]
    spread = rows[: SPREAD // store.classes]
    wanted = np.zeros_like(finished)
    wanted[np.ix_(views, np.unique(rows // store.shard_rows))] = True
    places = [
        (int(view), int(shard))
        for view, shard in np.argwhere(finished if check else finished & wanted)
    ]

    sums, entropies, seen = (
        np.zeros((len(spread), store.classes), np.float32),
        np.zeros(len(spread)),
        np.zeros(len(spread), np.int64),
    )
    adding = threading.Lock()

    def look(place: tuple[int, int]) -> tuple[str | None, dict]:
        fault, part, means = _look(store, *place, rows if wanted[place] else rows[:0], spread)
        if part:
            at = np.searchsorted(spread, part["row"][: len(means)])
            with adding:  # here, so that no labels wait to be added
                sums[at] += means
                entropies[at] += part["entropy"][: len(means)]
                seen[at] += 1
        return fault, part

    coverage, faults, parts = np.where(finished, DONE, MISSING).astype(np.uint8), [], []
    threads = min(threads_for(threads), THREADS)
    with (
        Progress("looking at labels", len(places), "shards") as progress,
        ThreadPoolExecutor(threads) as pool,
    ):
        try:
            for (view, shard), (fault, part) in zip(places, pool.map(look, places), strict=True):
                if fault:
                    coverage[view, shard] = DAMAGED
                    faults.append((view, shard, fault))
                elif part:
                    parts.append(part)
                progress.advance(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    if not parts:
        raise StoreError(
            f"{store.path} has no sound label to look at; run the same {store.made_by} command "
            f"again, which makes damaged ones anew"
        )
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    several = np.flatnonzero(seen > 1)
    chunks = np.array_split(
        several, max(1, len(several) // store.chunk_rows)
    )  # all at once would take several times what the sums take
    of_means = np.concatenate([entropy(sums[chunk] / seen[chunk, None]) for chunk in chunks])
    divergence = np.maximum(0, of_means - entropies[several] / seen[several])
    return Survey(
        coverage,
        faults,
        check,
        **columns,
        loyalty=_loyalty(columns["row"], columns["first"]),
        divergence=divergence,
    )


def by_class(found: Survey, folders: np.ndarray) -> np.ndarray:
    """folders: int [labels], each image's class folder. Returns a row for each folder
    that was seen, the least agreeing first: ``class``, ``labels``, ``agreeing`` (those
    that put the folder's class first), ``mass`` (the mean probability of the folder's
    class)."""
    seen, place = np.unique(folders, return_inverse=True)
    table = np.zeros(
        len(seen), [("class", "i8"), ("labels", "i8"), ("agreeing", "i8"), ("mass", "f8")]
    )
    table["class"], table["labels"] = seen, np.bincount(place)
    table["agreeing"] = np.bincount(place, weights=found.first == folders)
    table["mass"] = np.bincount(place, weights=found.folder) / table["labels"]
    return table[np.lexsort((table["mass"], table["agreeing"] / table["labels"]))]


def confusions(found: Survey, folders: np.ndarray) -> np.ndarray:
    """Which classes the teachers put first in place of an image's folder, the most
    frequent first: ``folder``, ``first``, ``labels``, and ``share`` of the folder's
    labels (0 … 1)."""
    wrong = found.first != folders
    pairs, count = np.unique(
        np.stack([folders[wrong], found.first[wrong]]), axis=1, return_counts=True
    )
    table = np.zeros(
        len(count), [("folder", "i8"), ("first", "i8"), ("labels", "i8"), ("share", "f8")]
    )
    table["folder"], table["first"], table["labels"] = *pairs, count
    table["share"] = count / np.bincount(folders)[pairs[0]] if len(count) else 0
    return table[np.lexsort((-table["share"], -table["labels"]))]


def _evenly(n: int, most: int) -> np.ndarray:
    """int64: at most so many of n places, evenly spaced."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))


def _look(
    store: LabelStore, view: int, shard: int, rows: np.ndarray, spread: np.ndarray
) -> tuple[str | None, dict, np.ndarray]:
    """What is wrong with a shard; entries of those of the rows that are in it; and the
    labels of the first of these, which are in ``spread`` too."""
    content, fault = store.content(view, shard)
    here = store.shard_slice(shard)
    rows = rows[(rows >= here.start) & (rows < here.stop)]
    if fault or len(rows) == 0:
        return fault, {}, np.zeros((0, store.classes), np.float32)
    codes, boxes = content.codes[rows - here.start], content.crops.boxes[rows - here.start]
    entries: dict[str, list[np.ndarray]] = {
        "entropy": [],
        "first": [],
        "confidence": [],
        "folder": [],
    }
    kept, most = [], int(np.isin(rows, spread, assume_unique=True).sum())
    folders = store.images.class_index[rows]
    for start in range(0, len(rows), store.chunk_rows):  # a decoded shard may take gigabytes
        part = slice(start, start + store.chunk_rows)
        p = store.codec.decode(codes[part])
        first = p.argmax(axis=1)
        place = np.arange(len(p))
        entries["entropy"].append(entropy(p).astype(np.float32))
        entries["first"].append(first.astype(np.int32))
        entries["confidence"].append(p[place, first])
        entries["folder"].append(np.where(folders[part] < 0, 0, p[place, folders[part]]))
        if start < most:
            kept.append(p[: most - start])
    columns = {name: np.concatenate(values) for name, values in entries.items()}
    about = {"view": np.full(len(rows), view, np.int32), "row": rows, "boxes": boxes}
    return (
        None,
        about | columns,
        np.concatenate(kept) if kept else np.zeros((0, store.classes), np.float32),
    )


def _loyalty(row: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Of each row that is there more than once, the share of its most frequent
    ``first``."""
    pairs, count = np.unique(np.stack([row, first]), axis=1, return_counts=True)
    starts = np.flatnonzero(np.diff(pairs[0], prepend=-1))
    most, total = np.maximum.reduceat(count, starts), np.add.reduceat(count, starts)
    return (most / total)[total > 1]
