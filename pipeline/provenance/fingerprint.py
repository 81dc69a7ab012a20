"""Digest rendered crops, so that a machine can tell whether it renders the teachers'
pixels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from cache.format.crops import Crops
from cache.format.manifest import USABLE, Images
from pipeline.render.errors import RenderError
from pipeline.render.renderer import CropRenderer
from pipeline.render.settings import RenderSettings

FINGERPRINT_CROPS = 64
OTHER_BATCHES = 3  # number of batches in which the crops are rendered once more


def fingerprint(
    blobs: Sequence[bytes], crops: Crops, sizes: Iterable[int], settings: RenderSettings
) -> dict[str, str]:
    """Return digests of rendered crops, output size → hex sha256. A later run renders
    the same crops and compares the digests.

    blobs: n encoded images. crops: [n], of these images. sizes: output sizes in pixels.
    The crops are rendered twice: all in one batch, and in another order in several
    smaller batches. Raises RenderError if a crop's pixels depend on its batch.
    """
    n, sizes = len(crops), sorted(sizes)
    rendered: dict[int, torch.Tensor] = {}
    if n:
        with CropRenderer(sizes, 1, n, settings) as renderer:
            rendered = renderer(blobs, crops.boxes[None], crops.flips[None])[0]
        _require_the_same(rendered, blobs, crops, settings)
    return {
        str(size): hashlib.sha256(pixels.cpu().numpy().tobytes()).hexdigest()
        for size, pixels in rendered.items()
    }


def _require_the_same(
    rendered: dict[int, torch.Tensor],
    blobs: Sequence[bytes],
    crops: Crops,
    settings: RenderSettings,
) -> None:
    """Render the crops once more, in another order and in smaller batches. Raises
    RenderError if a pixel differs from ``rendered``, output size → uint8 [n, size,
    size, 3]."""
    places = np.array_split(np.arange(len(crops))[::-1], OTHER_BATCHES)
    parts = [part for part in places if len(part)]
    with CropRenderer([*rendered], 1, max(map(len, parts)), settings) as again:
        for part in parts:
            boxes, flips = crops.boxes[None, part], crops.flips[None, part]
            for size, pixels in again([blobs[i] for i in part], boxes, flips)[0].items():
                before = rendered[size][torch.from_numpy(part.copy())]
                differs = (before != pixels).flatten(1).any(dim=1)
                if differs.any():
                    backend = settings.backend
                    raise RenderError(
                        f"render.backend {backend} makes other pixels of an image when others are "
                        f"rendered with it ({int(differs.sum())} of {len(part)} crops "
                        f"differ at {size} px), so no student would see what the teachers saw; use "
                        f"render.backend: {'gpu' if backend == 'gpu-hardware' else 'cpu'}, "
                        "and a new store"
                    )


def fingerprint_rows(images: Images) -> np.ndarray:
    """Return the rows whose crops make the fingerprint: the first usable images, at
    most FINGERPRINT_CROPS."""
    return np.flatnonzero(images.status == USABLE)[:FINGERPRINT_CROPS]
