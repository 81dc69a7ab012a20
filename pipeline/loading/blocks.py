"""Keep the chunks of a store in memory that are being read."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from cache import LabelStore
from cache.format.crops import Crops
from pipeline.sampling.epoch_order import Layout

SPARE = 1.25  # chunks in memory for each of a window: the next window begins beside it


class Block(NamedTuple):
    """A chunk of one view: codes [n, columns] and crops [n]."""

    codes: np.ndarray
    crops: Crops


class Blocks:
    """Holds the most recently used chunks of a store, of about 1 MiB of codes each: as
    many as a window has, and some more."""

    def __init__(self, store: LabelStore, layout: Layout) -> None:
        self.store, self.rows = store, store.chunk_rows
        self.most = math.ceil(SPARE * layout.window_blocks * layout.block_rows / self.rows)
        self.held: OrderedDict[tuple[int, int], Block] = OrderedDict()

    def of(self, view: int, row: int) -> tuple[Block, int]:
        """Return the block of a row, and the row's place in it. Raises StoreError if
        the shard is not finished, or not what was written."""
        number, place = divmod(row, self.rows)
        key = (view, number)
        block = self.held.get(key)
        if block is None:
            block = self.held[key] = self._read(view, number)
            while len(self.held) > self.most:
                self.held.popitem(last=False)
        else:
            self.held.move_to_end(key)
        return block, place

    def _read(self, view: int, number: int) -> Block:
        rows = slice(number * self.rows, (number + 1) * self.rows)
        return Block(self.store.codes(view, rows), self.store.whole_crops(view, rows))
