"""The label store: soft labels of augmented crops, on disk, readable with plain zarr. Imports numpy and zarr, never torch."""

from cache.reader import LabelStore
from cache.schema import MealError, StoreError

__all__ = ["LabelStore", "MealError", "StoreError"]
