"""Draw the part of an image that a view shows: RandomResizedCrop and a flip, as a pure
function of (seed, image, view).

The distribution is that of torchvision's ``RandomResizedCrop`` (Szegedy et al., arXiv
1409.4842): area uniform in ``scale``, log of the aspect ratio uniform in log ``ratio``,
ten tries, then the largest centred crop within the ratio. An image is known by its
relative path, so adding or removing an image changes no other crop.
"""

from __future__ import annotations

import numpy as np

from pipeline.config import CropPolicy
from pipeline.sampling import philox

TRIES = 10


def draw(
    policy: CropPolicy, identity: np.ndarray, height: np.ndarray, width: np.ndarray, view: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draw the crops of one view.

    identity: uint64 [n] (philox.identities of the paths). height, width: int [n],
    pixels of the decoded images, 1 or more. Returns int32 [n, 4] top, left, height,
    width in pixels, inside the image, and bool [n], True for a crop that is mirrored
    left-right.
    """
    n = len(identity)
    low, high = philox.split(identity)
    H, W = height.astype(np.int64), width.astype(np.int64)
    log_ratio = np.log(policy.ratio)
    boxes = np.zeros((n, 4), dtype=np.int32)
    open_ = np.arange(n)  # images whose crop isn't found yet
    for attempt in range(TRIES):
        if len(open_) == 0:
            break
        w = philox.words(policy.seed, low[open_], high[open_], view, attempt)
        area = (
            H[open_]
            * W[open_]
            * (policy.scale[0] + (policy.scale[1] - policy.scale[0]) * philox.uniform(w[:, 0]))
        )
        aspect = np.exp(log_ratio[0] + (log_ratio[1] - log_ratio[0]) * philox.uniform(w[:, 1]))
        cw = np.rint(np.sqrt(area * aspect)).astype(np.int64)
        ch = np.rint(np.sqrt(area / aspect)).astype(np.int64)
        fits = (cw > 0) & (cw <= W[open_]) & (ch > 0) & (ch <= H[open_])
        rows = open_[fits]
        ch, cw, w = ch[fits], cw[fits], w[fits]
        top = philox.below(w[:, 2], H[rows] - ch + 1)
        left = philox.below(w[:, 3], W[rows] - cw + 1)
        boxes[rows] = np.stack([top, left, ch, cw], axis=1)
        open_ = open_[~fits]
    boxes[open_] = _centre(H[open_], W[open_], policy.ratio)
    flips = philox.uniform(philox.words(policy.seed, low, high, view, TRIES)[:, 0]) < policy.flip
    return boxes, flips


def _centre(H: np.ndarray, W: np.ndarray, ratio: tuple[float, float]) -> np.ndarray:
    """Return the largest centred crop whose aspect ratio lies within ``ratio``."""
    h = np.where(ratio[0] > W / H, np.rint(W / ratio[0]), H).clip(1, H).astype(np.int64)
    w = np.where(ratio[1] < W / H, np.rint(H * ratio[1]), W).clip(1, W).astype(np.int64)
    return np.stack([(H - h) // 2, (W - w) // 2, h, w], axis=1)
