"""Crops as a store keeps them, and what no stored crop can be."""

from __future__ import annotations

import numpy as np

from cache.format.manifest import USABLE, Images


def misplaced(boxes: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """bool [n]: which crops int [n, 4] (top, left, height, width) are not inside their images of height and width [n] pixels."""
    top, left, h, w = boxes.astype(np.int64).T
    return ~((top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (top + h <= height) & (left + w <= width))


def fault_of_crops(kept: dict[str, np.ndarray], rows: slice, images: Images) -> str | None:
    """What is wrong with the arrays of ``crop_arrays`` of some rows, or None."""
    usable = images.status[rows] == USABLE
    outside = misplaced(kept["boxes"], images.height[rows], images.width[rows]) & usable
    if outside.any():
        row = int(np.argmax(outside))
        place = rows.start + row
        return f"the crop {kept['boxes'][row].tolist()} of row {place} is not inside its image of {images.height[place]} × {images.width[place]} pixels"
    if "mix_partner" in kept:
        partner, (low, first, high, last) = kept["mix_partner"], kept["mix_box"].T
        good = (partner < len(images)) & (low >= 0) & (first >= 0) & (low < high) & (first < last) & (high <= 1) & (last <= 1)
        good &= images.status[partner.clip(0, len(images) - 1)] == USABLE
        wrong = (partner >= 0) & ~good
        if wrong.any():
            row = int(np.argmax(wrong))
            return f"what is pasted into row {rows.start + row} (row {partner[row]}, box {kept['mix_box'][row].tolist()}) is not there"
    return None
