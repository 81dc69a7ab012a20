"""The label store: soft labels of augmented crops, on disk, readable with plain zarr.
Imports numpy and zarr, never torch."""

from cache.errors import MealError, StoreError
from cache.reader import LabelStore

__all__ = ["LabelStore", "MealError", "StoreError"]
