"""Merge several stores of the same crops into one store.

Views and shards that were labelled apart are joined. Labels of different teachers are
averaged.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from cache import repair
from cache.create import create
from cache.errors import StoreError
from cache.format import schema
from cache.format.codec import Codec
from cache.format.crops import Content
from cache.format.manifest import USABLE
from cache.reader import LabelStore
from cache.system.local import require_local
from cache.writer import StoreWriter

# sections of the provenance that must be equal: they decide on images, crops and pixels
ALIKE = ("crops", "renderer", "data")


def merge(
    paths: Sequence[Path],
    out: Path,
    *,
    codec: Codec | None = None,
    say: Callable[[str], None],
    progress: Callable[[int], None],
) -> LabelStore:
    """Merge the stores at ``paths`` into ``out``, or continue an earlier call with the
    same stores.

    Stores of one recipe are joined: a shard is taken from the first store in which the
    shard is finished and sound. Stores that differ in their teachers are averaged:
    p = Σ nᵢ·pᵢ / Σ nᵢ with nᵢ teachers in store i, which is the mean softmax (Eq. 1) of
    all the teachers. Where one of the stores has no label yet, ``out`` has none either.
    Damaged parts of ``out`` are made anew.

    codec: of the averaged labels; by default the first store's. progress: called with
    the number of shards that were looked at since the last call.

    Raises StoreError, before anything is written, if images, crops, pixels or classes
    differ, or if a teacher would count twice. Raises StoreError at the end if shards of
    the stores were damaged.
    """
    if len(paths) < 2:
        raise StoreError("there is nothing to merge in fewer than two stores; name more")
    require_local(out)
    stores = [LabelStore.open(path) for path in paths]
    # also by a link, or in other letters on a file system that ignores case
    if any(out.exists() and os.path.samefile(out, path) for path in paths):
        raise StoreError(f"{out} is one of the stores to merge; choose another --out")
    same = [_recipe(a.provenance) == _recipe(b.provenance) for a, b in combinations(stores, 2)]
    if any(same) and not all(same):
        raise StoreError(
            "some of the stores have the same teachers and recipe, and some have not; join the "
            "same ones first, then average the results"
        )
    joining = all(same)
    for other in stores[1:]:
        _require_alike(stores[0], other)
    if joining and codec is not None and codec != stores[0].codec:
        raise StoreError(
            f"stores of one recipe are joined as they are, with codec {stores[0].codec.name}; "
            f"leave --codec out"
        )
    views = (
        max(store.views for store in stores) if joining else min(store.views for store in stores)
    )
    if not joining and (most := max(store.views for store in stores)) > views:
        say(f"views {views} to {most - 1} are not in all of the stores, and are left out")
    attributes = (
        dict(stores[0].attributes) if joining else _averaged(stores, codec or stores[0].codec)
    )
    writer = repair.opened(
        out, lambda at, least: _make(at, stores[0], attributes, max(views, least)), say
    )
    if _recipe(writer.store.provenance) != _recipe(attributes["provenance"]):
        raise StoreError(
            f"{out} is there already and was made from other stores; choose another --out, or "
            f"remove it"
        )
    if writer.store.views < views or writer.uneven:
        writer.grow(views)
    say(
        f"{'joining' if joining else 'averaging'} {len(stores)} stores into {out}: {views} views, "
        f"codec {writer.store.codec.name}"
    )
    lost = _fill(writer, stores, views, joining=joining, say=say, progress=progress)
    if lost:
        raise StoreError(
            f"{len(lost)} shards could not be merged, being damaged, the first is {lost[0]}; mend "
            f"that store with the command that made it, then merge again"
        )
    return LabelStore.open(out)


def _fill(
    writer: StoreWriter,
    stores: Sequence[LabelStore],
    views: int,
    *,
    joining: bool,
    say: Callable[[str], None],
    progress: Callable[[int], None],
) -> list[str]:
    """Write every shard that ``stores`` have and the merged store doesn't. Returns the
    places of shards that are damaged in the stores, and what is wrong with them."""
    made, lost = writer.store, []
    for shard in range(made.shards):
        writer.discard_damaged(shard, views, say)
        with writer.claimed(list(range(views)), shard) as missing:
            for view in missing:
                content, fault = (
                    _first(stores, view, shard) if joining else _mean(stores, made, view, shard)
                )
                if content is not None:
                    writer.write(view, shard, *content)
                elif fault is not None:
                    lost.append(f"{made.place(view, shard)} of {fault}")
            progress(views)
    return lost


def _recipe(provenance: dict[str, Any]) -> bytes:
    """Return a digest that is the same for all stores of one recipe. It covers the
    whole provenance except the tags of the teachers' names, and the entries that their
    weights had in a file, since the digests of the weights tell teachers apart
    better."""
    provenance = schema.without_entries(provenance)
    teachers = [
        {**teacher, "model": schema.architecture(teacher["model"])}
        for teacher in provenance["teachers"]
    ]
    return schema.canonical_digest({**provenance, "teachers": teachers})


def _require_alike(first: LabelStore, other: LabelStore) -> None:
    where = f"{first.path} and {other.path} can't be merged"
    for section in ALIKE:
        ours, theirs = first.provenance[section], other.provenance[section]
        if difference := schema.first_difference(section, ours, theirs):
            key, one, another = difference
            raise StoreError(
                f"{where}: {key} is {one} in one and {another} in the other; labels are of the "
                f"same crops only if all of it is the same"
            )
    if first.class_names != other.class_names or not np.array_equal(
        first.images.path, other.images.path
    ):
        raise StoreError(
            f"{where}: their classes or rows are in another order; make them from the same data "
            f"and class map"
        )
    for store in (first, other):
        if "fingerprint" not in store.attributes:
            raise StoreError(
                f"{where}: {store.path} has no fingerprint of its pixels; restore it from a copy "
                f"or generate a new store"
            )
    ours, theirs = (store.attributes["fingerprint"] for store in (first, other))
    if any(ours[key] != theirs[key] for key in ("rows", "boxes", "flips")):
        raise StoreError(
            f"{where}: their crops are others; labels are averaged only of the same ones"
        )
    differing = [
        size
        for size in ours["digests"].keys() & theirs["digests"].keys()
        if ours["digests"][size] != theirs["digests"][size]
    ]
    if differing:
        raise StoreError(
            f"{where}: they were made on machines that render other pixels (at "
            f"{', '.join(sorted(differing))} px)"
        )


def _known_by(teacher: dict[str, Any]) -> str:
    """Return the digest that identifies a teacher: of the weights, or, for labels that
    others made, of their files."""
    return teacher["weights"] or teacher["files"]


def _averaged(stores: Sequence[LabelStore], codec: Codec) -> dict[str, Any]:
    """Return the attributes of the averaged store. Raises StoreError if a teacher would
    count twice."""
    seen: dict[str, LabelStore] = {}
    for store in stores:
        for teacher in store.provenance["teachers"]:
            if other := seen.get(_known_by(teacher)):
                where, one, another = schema.first_difference(
                    "", other.provenance, store.provenance
                ) or ("nothing", "", "")
                raise StoreError(
                    f"{other.path} and {store.path} both have labels of {teacher['model']}, which "
                    f"would count twice; leave one of them out (they can't be "
                    f"joined either, since they differ in {where}: {one} and {another})"
                )
        seen |= {_known_by(teacher): store for teacher in store.provenance["teachers"]}
    first = stores[0]
    provenance = {
        **first.provenance,
        "teachers": [teacher for store in stores for teacher in store.provenance["teachers"]],
        "codec": codec.describe(),
        "merged": [
            {
                "identity": store.identity.hex(),
                "teachers": len(store.provenance["teachers"]),
                "codec": store.codec.describe(),
                "compute": store.provenance["compute"],
                **(
                    {"gpu": gpu}
                    if (gpu := store.attributes.get("made_with", {}).get("gpu"))
                    else {}
                ),
                **{
                    key: store.provenance[key]
                    for key in ("merged", "imported")
                    if key in store.provenance
                },
            }
            for store in stores
        ],
    }
    digests = {
        size: digest
        for store in stores
        for size, digest in store.attributes["fingerprint"]["digests"].items()
    }
    return {
        **first.attributes,
        "codec": codec.describe(),
        "provenance": provenance,
        "fingerprint": {**first.attributes["fingerprint"], "digests": digests},
    }


def _make(out: Path, like: LabelStore, attributes: dict[str, Any], views: int) -> None:
    create(out, images=like.images, views=views, attributes=repair.described(attributes))


def _first(
    stores: Sequence[LabelStore], view: int, shard: int
) -> tuple[Content | None, str | None]:
    """Return (content, fault) of a shard. The content comes from the first store in
    which the shard is sound. If there is no such store, the content is None, and the
    fault is that of the first store with a record of the shard (None if no store has a
    record)."""
    wrong = None
    for store in stores:
        if view < store.views and store.has_record(view, shard):
            content, fault = store.content(view, shard)
            if fault is None:
                return content, None
            wrong = wrong or f"{store.path}: {fault}"
    return None, wrong


def _mean(
    stores: Sequence[LabelStore], made: LabelStore, view: int, shard: int
) -> tuple[Content | None, str | None]:
    """Return (content, fault): the averaged codes of a shard, and its crops. The
    content is None if a store has no label yet, or if a store's shard is damaged. For a
    damaged shard the fault says which store, and what is wrong. Raises StoreError if
    the stores' crops differ."""
    rows = made.shard_slice(shard)
    usable = made.images.status[rows] == USABLE
    codes = np.zeros((len(usable), made.codec.columns(made.classes)), made.codec.dtype)
    for store in stores:
        for theirs in np.unique(np.arange(rows.start, rows.stop) // store.shard_rows).tolist():
            if not store.has_record(view, theirs):
                return None, None
            if fault := store.fault(view, theirs):
                return None, f"{store.path}: {fault}"
    crops = [store.whole_crops(view, rows) for store in stores]
    for store, theirs in zip(stores[1:], crops[1:], strict=True):
        if not crops[0].equals(theirs):
            raise StoreError(
                f"{stores[0].path} and {store.path} have other crops in {made.place(view, shard)}; "
                f"they can't be averaged"
            )
    weights = [len(store.provenance["teachers"]) for store in stores]
    for first in range(0, len(usable), made.chunk_rows):
        part = slice(first, first + made.chunk_rows)
        here = np.arange(rows.start, rows.stop)[part][usable[part]]
        total = np.zeros((len(here), made.classes), np.float32)
        for n, store in zip(weights, stores, strict=True):
            total += np.float32(n / sum(weights)) * store.codec.decode(store.codes(view, here))
        codes[part][usable[part]] = made.codec.encode(total)
    return Content(codes, crops[0]), None
