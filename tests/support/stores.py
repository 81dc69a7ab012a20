"""Stores written by hand."""

from __future__ import annotations

import numpy as np

from cache.format.crops import Crops
from cache.writer import StoreWriter


def write(
    writer: StoreWriter, view: int, shard: int, codes: np.ndarray, *crops: np.ndarray
) -> None:
    """Write a shard: codes, and the arrays of ``schema.crop_arrays`` in their order."""
    writer.write(view, shard, codes, Crops(*crops))
