"""Define the options of StoredCrops."""

from __future__ import annotations

from dataclasses import dataclass

from cache.errors import MealError

SIZES = range(8, 4097)  # as of train.image_size


class LoadingError(MealError):
    """Options of StoredCrops that are impossible."""


@dataclass(frozen=True)
class Options:
    """Options of ``StoredCrops``.

    image_size: of the pixels. views: replay the first so many views; None: all views of
    the store. split: of the data. interpolation: refused if it isn't the store's.
    codes: give the codes of a label instead of probabilities, for ``decoder``.
    allow_renderer_difference: go on, with a warning, where this machine renders other
    pixels than the teachers saw. Raises LoadingError for what is impossible.
    """

    image_size: int = 224
    views: int | None = None
    split: str = "train"
    interpolation: str | None = None
    codes: bool = False
    allow_renderer_difference: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.image_size, int) or self.image_size not in SIZES:
            raise LoadingError(
                f"image_size must be a number of pixels from {SIZES[0]} to {SIZES[-1]}, got "
                f"{self.image_size!r}"
            )
        if self.views is not None and self.views < 1:
            raise LoadingError(f"views must be 1 or more, got {self.views}; leave it out for all")
