"""Survey the labels of a store: which shards are finished, how certain the labels are,
how often they agree with the class folders, how much the views of an image differ."""

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

LABELS = 200_000  # labels surveyed of a larger store
VIEWS = 8  # views in which the same images are surveyed, at most
SPREAD = 1 << 25  # images × classes for which the mean label over the views is kept, at most
THREADS = 8  # each holds a shard in memory

DONE, MISSING, DAMAGED = range(3)  # a worse state has a larger number


@dataclass
class Survey:
    """Measurements of the surveyed labels. Arrays are [labels] unless their comment
    states another shape."""

    coverage: np.ndarray  # uint8 [views, shards]: DONE, MISSING or DAMAGED
    faults: list[tuple[int, int, str]]  # view, shard, fault
    checked: bool  # every finished shard was compared with its digest
    view: np.ndarray  # int32
    row: np.ndarray  # int64
    entropy: np.ndarray  # float32, nats
    first: np.ndarray  # int32, the class with the largest probability
    confidence: np.ndarray  # float32, the largest probability
    folder: np.ndarray  # float32, the probability of the image's class folder
    boxes: np.ndarray  # int32 [labels, 4]
    # float64 [images surveyed in several views]: the share of an image's views whose
    # first class is the most frequent first class of the image
    loyalty: np.ndarray
    # float64 [some of the images in loyalty]: the Jensen-Shannon divergence of the
    # labels of an image's views, nats
    divergence: np.ndarray


def survey(
    store: LabelStore, *, labels: int = LABELS, check: bool = True, threads: int | None = None
) -> Survey:
    """Survey ``labels`` labels of a store: the same images in at most VIEWS of its
    views. A store's rows are in random order, so the sample is fair.

    check: compare every finished shard with its digest, which reads the whole store;
    False: compare only the shards of the surveyed labels. Raises StoreError if there is
    no label yet, or if a label can't be read at the moment.
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
            with adding:  # in this thread, so that no labels pile up before they are added
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
    # In chunks: all means at once would take several times the memory of the sums.
    chunks = np.array_split(several, max(1, len(several) // store.chunk_rows))
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
    """Tabulate how well the labels agree with each surveyed class folder, the least
    agreeing folder first.

    folders: int [labels], the class folder of each label's image. Columns: ``class``;
    ``labels``, their number; ``agreeing``, the number of labels that put the folder's
    class first; ``mass``, the mean probability of the folder's class.
    """
    seen, place = np.unique(folders, return_inverse=True)
    table = np.zeros(
        len(seen), [("class", "i8"), ("labels", "i8"), ("agreeing", "i8"), ("mass", "f8")]
    )
    table["class"], table["labels"] = seen, np.bincount(place)
    table["agreeing"] = np.bincount(place, weights=found.first == folders)
    table["mass"] = np.bincount(place, weights=found.folder) / table["labels"]
    return table[np.lexsort((table["mass"], table["agreeing"] / table["labels"]))]


def confusions(found: Survey, folders: np.ndarray) -> np.ndarray:
    """Count the classes that the teachers put first in place of an image's folder, the
    most frequent pair first. Columns: ``folder``, ``first``, ``labels``, and ``share``
    of the folder's labels (0 … 1)."""
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
    """Choose at most ``most`` of n places, evenly spaced: int64."""
    return np.unique(np.linspace(0, n - 1, min(n, most)).astype(np.int64))


def _look(
    store: LabelStore, view: int, shard: int, rows: np.ndarray, spread: np.ndarray
) -> tuple[str | None, dict, np.ndarray]:
    """Survey those of ``rows`` that lie in a shard. Returns the shard's fault, if any;
    the survey's columns for these rows; and the labels of the first of these rows, as
    far as ``spread`` holds them."""
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
    """Return, for each row that occurs more than once, the share of its most frequent
    ``first``."""
    pairs, count = np.unique(np.stack([row, first]), axis=1, return_counts=True)
    starts = np.flatnonzero(np.diff(pairs[0], prepend=-1))
    most, total = np.maximum.reduceat(count, starts), np.add.reduceat(count, starts)
    return (most / total)[total > 1]
