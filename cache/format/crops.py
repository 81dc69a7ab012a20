"""Hold crops as a store keeps them, and find crops that no store can have."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cache.format.manifest import USABLE, Images


class BoxesAndFlips(NamedTuple):
    """The boxes and flips of crops: int32 [n, 4] top, left, height, width in pixels of
    the decoded image; bool [n] mirrored left-right after the crop."""

    boxes: np.ndarray
    flips: np.ndarray


class Mixes(NamedTuple):
    """The rectangles that are pasted into crops (CutMix): int32 [n] rows of the
    partners, -1 for none; float32 [n, 4] top, left, bottom, right of the rectangle as
    fractions of the output's height and width. The pasted pixels are from the partner's
    crop of the same view."""

    partner: np.ndarray
    rectangle: np.ndarray


@dataclass(frozen=True)
class Crops:
    """The crops of n rows: all that a store keeps beside their labels. With several
    views, every array has one more axis in front.

    boxes: int32 [n, 4] or [views, n, 4]. flips: bool [n] or [views, n]. partner: int32,
    shaped like flips. rectangle: float32, shaped like boxes. partner and rectangle are
    None without CutMix. Units as in ``BoxesAndFlips`` and ``Mixes``.
    """

    boxes: np.ndarray
    flips: np.ndarray
    partner: np.ndarray | None = None
    rectangle: np.ndarray | None = None

    @classmethod
    def stack(cls, views: Sequence[Crops]) -> Crops:
        """Stack crops of one view each: [n] → [views, n]. One view isn't copied."""
        if len(views) == 1:
            return views[0]._each(lambda column: column[None])
        return cls._together(np.stack, views)

    @classmethod
    def join(cls, parts: Sequence[Crops]) -> Crops:
        """Concatenate crops along the axis of rows."""
        axis = parts[0].flips.ndim - 1
        return cls._together(lambda columns: np.concatenate(columns, axis=axis), parts)

    def __len__(self) -> int:
        return self.flips.shape[-1]

    def take(self, rows: np.ndarray | slice) -> Crops:
        """Select crops along the axis of rows."""
        several = self.flips.ndim == 2
        return self._each(lambda column: column[:, rows] if several else column[rows])

    def view(self, view: int) -> Crops:
        """Return one view of several: [views, n] → [n]."""
        return self._each(lambda column: column[view])

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Return the arrays in the order of ``schema.crop_arrays``."""
        columns = (self.boxes, self.flips, self.partner, self.rectangle)
        return tuple(column for column in columns if column is not None)

    def fault(self, rows: slice, images: Images) -> str | None:
        """Return what is wrong with the crops [n] of these rows of a manifest, or
        None."""
        usable = images.status[rows] == USABLE
        outside = misplaced(self.boxes, images.height[rows], images.width[rows]) & usable
        if outside.any():
            row = int(np.argmax(outside))
            place = rows.start + row
            image = f"{images.height[place]} × {images.width[place]} pixels"
            return (
                f"the crop {self.boxes[row].tolist()} of row {place} is not inside its image of "
                f"{image}"
            )
        if self.partner is not None and self.rectangle is not None:
            partner, (low, first, high, last) = self.partner, self.rectangle.T
            good = (
                (partner < len(images))
                & (low >= 0)
                & (first >= 0)
                & (low < high)
                & (first < last)
                & (high <= 1)
                & (last <= 1)
            )
            good &= images.status[partner.clip(0, len(images) - 1)] == USABLE
            wrong = (partner >= 0) & ~good
            if wrong.any():
                row = int(np.argmax(wrong))
                pasted = f"row {partner[row]}, box {self.rectangle[row].tolist()}"
                return f"what is pasted into row {rows.start + row} ({pasted}) is not there"
        return None

    def equals(self, other: Crops) -> bool:
        """Return whether all arrays are equal."""
        return len(self.arrays()) == len(other.arrays()) and all(
            map(np.array_equal, self.arrays(), other.arrays())
        )

    def _each(self, function: Callable[[np.ndarray], np.ndarray]) -> Crops:
        return Crops(*map(function, self.arrays()))

    @classmethod
    def _together(
        cls, function: Callable[[Sequence[np.ndarray]], np.ndarray], several: Sequence[Crops]
    ) -> Crops:
        return cls(*map(function, zip(*(one.arrays() for one in several), strict=True)))


class Content(NamedTuple):
    """The content of one shard of one view: codes [n, ``codec.columns``] as
    ``codec.encode`` returns them, zeros where the image is unusable, and the crops
    [n]."""

    codes: np.ndarray
    crops: Crops


def misplaced(boxes: np.ndarray, height: np.ndarray, width: np.ndarray) -> np.ndarray:
    """Find boxes int [n, 4] that are not inside their images of height and width [n]
    pixels: bool [n]."""
    top, left, h, w = boxes.astype(np.int64).T
    return ~(
        (top >= 0) & (left >= 0) & (h > 0) & (w > 0) & (top + h <= height) & (left + w <= width)
    )
