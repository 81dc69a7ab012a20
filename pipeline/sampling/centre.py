"""Place evaluation's central square."""

from __future__ import annotations

import numpy as np

CROP_PCT = 224 / 256  # the square's share of the shorter side, as timm's configs name it


def centre(shapes: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Place the central square of each image: the shorter side is resized to size ·
    256 / 224 (rounded down, as timm does), then the square is cut out of the middle (He
    et al., arXiv 1512.03385, as in the paper).

    shapes: int64 [n, 2], heights and widths in pixels. size: of the square in pixels.
    Returns int64 [n, 2] twice: height and width of the whole resized image, and top and
    left of the square in it.
    """
    shorter = shapes.min(axis=1, keepdims=True)
    whole = size * 256 // 224 * shapes // shorter
    return whole, np.rint((whole - size) / 2).astype(np.int64)
