"""Draw the crops of images from the crop policy: boxes, flips and mixes.

Stage one stores these draws beside the labels. Online training and training from class
folders draw them as they go.
"""

from __future__ import annotations

import numpy as np

from cache.format.crops import BoxesAndFlips, Crops, Mixes
from cache.format.manifest import USABLE, Images
from pipeline.config import CropPolicy
from pipeline.sampling import cutmix, philox, random_crop


class CropSampler:
    """Draws crops of a manifest's images, by row and view. shard_rows: rows of a shard,
    within which CutMix draws partners."""

    def __init__(self, policy: CropPolicy, images: Images, shard_rows: int) -> None:
        self.policy, self.images, self.shard_rows = policy, images, shard_rows
        self.identity = philox.identities(images.path)  # uint64 [images]

    def crops(self, view: int, rows: np.ndarray) -> BoxesAndFlips:
        """Draw crops of one view: int64 [n] rows → boxes int32 [n, 4] (top, left,
        height, width in pixels) and flips bool [n]. Unusable images get zeros."""
        boxes, flips = np.zeros((len(rows), 4), np.int32), np.zeros(len(rows), bool)
        good = np.flatnonzero(self.images.status[rows] == USABLE)
        of = rows[good]
        boxes[good], flips[good] = random_crop.draw(
            self.policy, self.identity[of], self.images.height[of], self.images.width[of], view
        )
        return BoxesAndFlips(boxes, flips)

    def mixes(self, view: int, rows: np.ndarray) -> Mixes:
        """Draw mixes of one view: int64 [n] rows → rows of the partners int32 [n], -1
        for none, and rectangles float32 [n, 4] (``cutmix.boxes``). The policy must have
        CutMix."""
        seed = self.policy.seed
        partner = np.empty(len(rows), np.int32)
        shard_of = rows // self.shard_rows
        for shard in np.unique(shard_of):
            first = int(shard) * self.shard_rows
            whole = slice(first, first + self.shard_rows)
            here = shard_of == shard
            drawn = first + cutmix.partners(
                seed, self.identity[whole], self.images.status[whole] == USABLE, view
            )
            partner[here] = drawn[rows[here] - first]
        box = cutmix.boxes(self.policy.cutmix, seed, self.identity[rows], view)
        partner[(partner == rows) | ~box.any(axis=1)] = -1
        box[partner < 0] = 0
        return Mixes(partner, box)

    def whole_crops(self, view: int, rows: np.ndarray) -> Crops:
        """Draw crops of one view, with their mixes if the policy has CutMix: int64 [n]
        rows → Crops [n]."""
        return Crops(
            *self.crops(view, rows), *(self.mixes(view, rows) if self.policy.cutmix else ())
        )
