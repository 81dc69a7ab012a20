"""Write, read, verify, repair and merge label stores: soft labels of augmented crops on
disk.

Plain zarr can read a store. This package imports numpy and zarr, never torch.
"""

from cache.errors import MealError, StoreError
from cache.reader import LabelStore

__all__ = ["LabelStore", "MealError", "StoreError"]
