"""Check that a store, its images and this machine fit together."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from cache import LabelStore
from cache.errors import StoreError
from cache.format.crops import Crops
from pipeline.images.data_set import DataSet
from pipeline.loading.options import Options
from pipeline.loading.packed_texts import PackedTexts
from pipeline.provenance.description import policy_of
from pipeline.provenance.refusals import require_same_images, require_same_pixels
from pipeline.render.one_crop import OneCrop
from pipeline.render.settings import RenderSettings
from pipeline.runtime.progress import say
from pipeline.sampling.epoch_order import Layout, blocks_of


def opened(
    path: str | Path, data: str | Path | DataSet, options: Options
) -> tuple[LabelStore, DataSet, Layout]:
    """Open a store and its images, and check them. Both are light enough to be handed
    to workers. Returns also which rows are read together. Raises MealError."""
    store = LabelStore.open(path)
    _require_interpolation(store, options.interpolation)
    _require_views(store, options.views)
    found = data if isinstance(data, DataSet) else DataSet.find(data, options.split)
    found = require_same_images(store, found)
    _check_pixels(store, found, allowed=options.allow_renderer_difference)
    images = store.images
    light = replace(images, path=_packed(images.path), reason=_packed(images.reason))
    places = found.places
    if places is not None and places.dtype == object:
        found = replace(found, places=_packed(places))
    blocks = blocks_of(store.chunk_rows, store.shard_rows, policy_of(store))
    return store.reopened(light), found, Layout(*blocks, store.shard_rows)


def _packed(texts: np.ndarray) -> Any:
    """Pack an array of texts, of which single texts will be read."""
    return PackedTexts(texts.tolist())


def _require_interpolation(store: LabelStore, asked: str | None) -> None:
    made = store.provenance["crops"]["interpolation"]
    if asked is not None and asked != made:
        raise StoreError(
            f"interpolation is {asked!r}, and the teachers of {store.path} saw {made!r}; leave it "
            f"out, or generate a store with crops.interpolation: {asked}"
        )


def _require_views(store: LabelStore, views: int | None) -> None:
    if views is not None and views > store.views:
        raise StoreError(
            f"views is {views} but {store.path} has {store.views}; extend it with "
            f"{store.made_by} --views {views}, or lower views"
        )
    for view in range(views or store.views):
        try:
            store.require_finished(view)
        except StoreError as unfinished:
            if not view:
                raise
            raise StoreError(f"{unfinished}, or pass views={view}") from None


def _check_pixels(store: LabelStore, data: DataSet, *, allowed: bool) -> None:
    """Render the fingerprint's crops one by one. Raises StoreError if the teachers saw
    other pixels, or prints it if that is allowed."""
    try:
        require_same_pixels(
            store, data, digests=_digests, repair="pass allow_renderer_difference=True"
        )
    except StoreError as difference:
        if not allowed:
            raise
        say(f"warning: {difference}", anyway=True)


def _digests(
    blobs: Sequence[bytes], crops: Crops, sizes: Iterable[int], settings: RenderSettings
) -> dict[str, str]:
    """Digest crops, as ``fingerprint`` does, that are rendered one by one."""
    made = {}
    for size in sizes:
        render, h = OneCrop(size, settings), hashlib.sha256()
        for blob, box, flip in zip(blobs, crops.boxes, crops.flips, strict=True):
            h.update(render(blob, box, bool(flip)).tobytes())
        made[str(size)] = h.hexdigest()
    return made
