"""The pixels of single crops of a store, wherever they are in it: what its teachers saw, for looking at labels again."""

from __future__ import annotations

import numpy as np
import torch

from cache import LabelStore
from pipeline.images import reader
from pipeline.images.reader import Reader
from pipeline.provenance import policy_of
from pipeline.render import mixing
from pipeline.render.dali import CropRenderer


def pixels_of(store: LabelStore, places: np.ndarray, read: Reader, sizes: set[int], backend: str | None = None) -> dict[int, torch.Tensor]:
    """places: int [n, 2] views and rows. Returns by output size uint8 [n, size, size, 3], what the teachers saw there, with CutMix the mixed pictures.
    backend: another than the store's, whose pixels differ a little."""
    policy = policy_of(store)
    shown = [(int(view), int(row)) for view, row in places]
    own, boxes = np.arange(len(shown)), None
    partner = own.copy()
    if store.mixed:
        mixes = [store.mixes(view, [row]) for view, row in shown]
        boxes = np.concatenate([box for _, box in mixes])
        for i, (theirs, _) in enumerate(mixes):
            if theirs[0] >= 0:
                partner[i] = len(shown)
                shown.append((shown[i][0], int(theirs[0])))
    crops = [store.crops(view, [row]) for view, row in shown]
    rows = np.array([row for _, row in shown])
    backend = backend or store.provenance["renderer"]["backend"]
    renderer = CropRenderer(sorted(sizes), 1, len(shown), interpolation=policy.interpolation, exif=policy.exif, backend=backend)
    with reader.naming(store.images, rows):
        (pixels,) = renderer(read(rows), np.concatenate([box for box, _ in crops])[None], np.concatenate([flip for _, flip in crops])[None])
    if boxes is None:
        return pixels
    return {size: mixing.paste(p[: len(places)], p, partner, boxes) for size, p in pixels.items()}
