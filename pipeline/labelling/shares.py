"""Divide the shards of a store among workers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np


@dataclass
class Unit:
    """A unit of work: some views of one shard, which share the decoding of the shard's
    images."""

    views: list[int]
    shard: int


@dataclass(frozen=True)
class Share:
    """A worker's share of a store: every n-th unit of work, from the worker's own
    number on.

    worker: the worker's number, from 0. workers: the number of workers, n. first_view:
    earlier views are left as they are. views_per_decode: the number of views in a unit.
    The share that a unit belongs to depends on the unit's place alone, not on which
    shards are finished.
    """

    worker: int = 0
    workers: int = 1
    first_view: int = 0
    views_per_decode: int = 1

    @property
    def leads(self) -> bool:
        """Return whether this worker creates, extends and repairs the store, which only
        one worker may do."""
        return self.worker == 0

    def units(self, finished: np.ndarray) -> list[Unit]:
        """Return this share's units, each with its unfinished views only.

        finished: bool [views, shards]. Units of early views come first, so that
        students can train on early views first.
        """
        units: dict[tuple[int, int], Unit] = {}
        for view, shard in self.places(~finished):
            units.setdefault((view // self.views_per_decode, shard), Unit([], shard)).views.append(
                view
            )
        return list(units.values())

    def places(self, wanted: np.ndarray) -> list[tuple[int, int]]:
        """Return (view, shard) of the places in this share where ``wanted``, bool
        [views, shards], is true. The order is the order of the work."""
        views, shards = wanted.shape
        blocks = itertools.product(range(0, views, self.views_per_decode), range(shards))
        return [
            (view, shard)
            for place, (first, shard) in enumerate(blocks)
            if place % self.workers == self.worker
            for view in range(first, min(first + self.views_per_decode, views))
            if wanted[view, shard] and view >= self.first_view
        ]
