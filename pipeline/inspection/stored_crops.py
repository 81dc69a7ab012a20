"""Render single crops from anywhere in a store, as its teachers saw them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from cache import LabelStore
from cache.format.crops import Crops
from pipeline.images import reader
from pipeline.images.reader import Reader
from pipeline.render.mixing import paste_all
from pipeline.render.renderer import CropRenderer
from pipeline.render.settings import RenderSettings


def pixels_of(
    store: LabelStore, places: np.ndarray, read: Reader, sizes: set[int], backend: str | None = None
) -> dict[int, torch.Tensor]:
    """Render crops as the store's teachers saw them, mixed if the store has CutMix.

    places: int [n, 2], views and rows. backend: of the renderer, in place of the
    store's; another backend's pixels differ a little. Returns output size → uint8 [n,
    size, size, 3].
    """
    shown = [(int(view), int(row)) for view, row in places]
    crops = Crops.join([store.whole_crops(view, [row]) for view, row in shown])
    place = np.arange(len(shown))
    if store.mixed:
        pasted = np.flatnonzero(crops.partner >= 0)
        place[pasted] = len(shown) + np.arange(len(pasted))
        shown += [(shown[i][0], int(crops.partner[i])) for i in pasted]
    whole = [store.crops(view, [row]) for view, row in shown]
    rows = np.array([row for _, row in shown])
    settings = RenderSettings.of_store(store)
    renderer = CropRenderer(
        sorted(sizes), 1, len(shown), replace(settings, backend=backend or settings.backend)
    )
    with reader.naming(store.images, rows), renderer:
        boxes, flips = (np.concatenate(column)[None] for column in zip(*whole, strict=True))
        (pixels,) = renderer(read(rows), boxes, flips)
    return paste_all(pixels, slice(len(places)), place, crops.rectangle) if store.mixed else pixels
