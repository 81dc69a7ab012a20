"""Several stores of the same crops as one: views and shards that were labelled apart are joined, labels of different teachers averaged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from cache import schema
from cache.codec import Codec
from cache.reader import LabelStore
from cache.schema import StoreError
from cache.writer import StoreWriter

ALIKE = ("crops", "renderer", "data")  # sections of the provenance that say which crops of which images, as which pixels


def merge(
    paths: Sequence[Path], out: Path, *, codec: Codec | None = None, say: Callable[[str], None], progress: Callable[[int], None]
) -> LabelStore:
    """Make ``out`` from the stores at ``paths``, or go on with what an earlier call made of the same ones.

    Stores of one recipe (one identity) are joined: a shard is taken from the first store in which it is finished and sound. Stores that differ in their
    teachers are averaged: p = Σ nᵢ·pᵢ / Σ nᵢ with nᵢ teachers in store i, which is the mean softmax (Eq. 1) of them all; where one of the stores has no
    label yet, neither has ``out``. codec: of the averaged labels; otherwise the first store's. progress: is told how many shards were looked at.

    Raises StoreError, before anything is written, if images, crops, pixels or classes differ, or a teacher would count twice.
    """
    if len(paths) < 2:
        raise StoreError("there is nothing to merge in fewer than two stores; name more")
    stores = [LabelStore.open(path) for path in paths]
    if out.resolve() in [path.resolve() for path in paths]:
        raise StoreError(f"{out} is one of the stores to merge; choose another --out")
    same = [a.identity == b.identity for a, b in combinations(stores, 2)]
    if any(same) and not all(same):
        raise StoreError(
            "some of the stores have the same teachers and recipe, and some have not; join the same ones first, then average the results"
        )
    joining = all(same)
    for other in stores[1:]:
        _require_alike(stores[0], other)
    if joining and codec is not None and codec != stores[0].codec:
        raise StoreError(f"stores of one recipe are joined as they are, with codec {stores[0].codec.name}; leave --codec out")
    views = max(store.views for store in stores) if joining else min(store.views for store in stores)
    attributes = dict(stores[0].attributes) if joining else _averaged(stores, codec or stores[0].codec)
    _make(out, stores[0], attributes, views)
    writer = StoreWriter(out)
    if writer.store.identity != schema.canonical_digest(attributes["provenance"]):
        raise StoreError(f"{out} is there already and was made from other stores; choose another --out, or remove it")
    if writer.store.views < views:
        writer.grow(views)
    say(f"{'joining' if joining else 'averaging'} {len(stores)} stores into {out}: {views} views, codec {writer.store.codec.name}")
    for shard in range(writer.store.shards):
        with writer.claimed(list(range(views)), shard) as missing:
            for view in missing:
                content = _first(stores, view, shard) if joining else _mean(stores, writer.store, view, shard)
                if content is not None:
                    writer.write(view, shard, *content)
            progress(views)
    return LabelStore.open(out)


def _require_alike(first: LabelStore, other: LabelStore) -> None:
    where = f"{first.path} and {other.path} can't be merged"
    for section in ALIKE:
        ours, theirs = first.provenance[section], other.provenance[section]
        for key in sorted({*ours, *theirs}):
            if ours.get(key) != theirs.get(key):
                raise StoreError(
                    f"{where}: {section}.{key} is {_short(ours.get(key))} in one and {_short(theirs.get(key))} in the other; labels are of the same "
                    "crops only if all of it is the same"
                )
    if first.class_names != other.class_names or not np.array_equal(first.images.path, other.images.path):
        raise StoreError(f"{where}: their classes or rows are in another order; make them from the same data and class map")
    ours, theirs = (store.attributes["fingerprint"] for store in (first, other))
    differing = [size for size in ours["digests"].keys() & theirs["digests"].keys() if ours["digests"][size] != theirs["digests"][size]]
    if differing:
        raise StoreError(f"{where}: they were made on machines that render other pixels (at {', '.join(sorted(differing))} px)")


def _short(value: object) -> object:
    return f"{value[:12]}…" if isinstance(value, str) and len(value) == 64 else value


def _averaged(stores: Sequence[LabelStore], codec: Codec) -> dict:
    """Attributes of the averaged store."""
    teachers = [teacher for store in stores for teacher in store.provenance["teachers"]]
    seen: dict[str, str] = {}
    for teacher in teachers:
        if teacher["weights"] in seen:
            raise StoreError(
                f"teachers {seen[teacher['weights']]} and {teacher['model']} of the stores have the same weights and would count twice; leave one store out"
            )
        seen[teacher["weights"]] = teacher["model"]
    first = stores[0]
    provenance = {
        **first.provenance,
        "teachers": teachers,
        "codec": codec.describe(),
        "merged": [
            {
                "identity": store.identity.hex(),
                "teachers": len(store.provenance["teachers"]),
                "codec": store.codec.describe(),
                "compute": store.provenance["compute"],
            }
            for store in stores
        ],
    }
    digests = {size: digest for store in stores for size, digest in store.attributes["fingerprint"]["digests"].items()}
    return {
        **first.attributes,
        "codec": codec.describe(),
        "provenance": provenance,
        "fingerprint": {**first.attributes["fingerprint"], "digests": digests},
    }


def _make(out: Path, like: LabelStore, attributes: dict, views: int) -> None:
    if out.exists():
        return
    described = {key: attributes[key] for key in ("codec", "class_names", "provenance", "fingerprint", "made_with")}
    schema.create(
        out,
        images=like.images,
        views=views,
        classes=like.classes,
        chunk_rows=like.chunk_rows,
        shard_rows=like.shard_rows,
        attributes=described,
    )


def _first(stores: Sequence[LabelStore], view: int, shard: int) -> list[np.ndarray] | None:
    """Content of a shard from the first store that has it, sound."""
    for store in stores:
        if view < store.views and store.record(view, shard)["magic"] == schema.RECORD_MAGIC:
            content, fault = store.content(view, shard)
            if fault is None:
                return content
    return None


def _mean(stores: Sequence[LabelStore], made: LabelStore, view: int, shard: int) -> list[np.ndarray] | None:
    """Averaged codes of a shard and its crops; None where a store has no label yet."""
    rows = made.shard_slice(shard)
    usable = made.images.status[rows] == schema.USABLE
    codes = np.zeros((len(usable), made.codec.columns(made.classes)), made.codec.dtype)
    crops = [_kept(store, view, rows) for store in stores]
    if any(kept is None for kept in crops):
        return None
    for store, kept in zip(stores[1:], crops[1:], strict=True):
        if not all(map(np.array_equal, crops[0], kept)):
            raise StoreError(
                f"{stores[0].path} and {store.path} have other crops in view {view}, rows {rows.start} to {rows.stop - 1}; they can't be averaged"
            )
    weights = [len(store.provenance["teachers"]) for store in stores]
    for first in range(0, len(usable), made.chunk_rows):
        part = slice(first, first + made.chunk_rows)
        here = np.arange(rows.start, rows.stop)[part][usable[part]]
        total = sum(
            np.float32(n / sum(weights)) * store.codec.decode(store.codes(view, here)) for n, store in zip(weights, stores, strict=True)
        )
        codes[part][usable[part]] = made.codec.encode(total)
    return [codes, *crops[0]]


def _kept(store: LabelStore, view: int, rows: slice) -> list[np.ndarray] | None:
    """The arrays of ``crop_arrays`` of some rows; None unless they are all labelled. Raises StoreError if they are damaged."""
    shards = np.unique(np.arange(rows.start, rows.stop) // store.shard_rows)
    if any(store.record(view, int(shard))["magic"] != schema.RECORD_MAGIC for shard in shards):
        return None
    return [*store.crops(view, rows), *(store.mixes(view, rows) if store.mixed else ())]
