"""Divide the shards of a store among workers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np

from pipeline.runtime.engine import Worker


@dataclass
class Unit:
    """A unit of work: some views of one shard, which share the decoding of the shard's
    images."""

    views: list[int]
    shard: int


@dataclass(frozen=True)
class Share:
    """A worker's share of a store: every n-th unit of work, from the worker's own
    number on; or, of an open share, every unit that no other worker holds.

    worker: the worker's number, from 0. workers: the number of workers, n. If nobody
    knows how many workers there are, the share is open, and workers is 1. first_view:
    earlier views are left as they are. views_per_decode: the number of views in a unit.
    open: workers may come and go, and each takes whatever is left. The part of the
    store that a unit belongs to depends on the unit's place alone, not on which shards
    are finished.
    """

    worker: int = 0
    workers: int = 1
    first_view: int = 0
    views_per_decode: int = 1
    open: bool = False

    @classmethod
    def open_to(cls, worker: Worker, first_view: int, views_per_decode: int) -> Share:
        """Return the open share of an engine's worker."""
        return cls(worker.number, worker.workers or 1, first_view, views_per_decode, open=True)

    @property
    def leads(self) -> bool:
        """Return whether this worker may create, extend and repair the store. Of all
        that may, one does (``coordination.once``)."""
        return self.open or self.worker == 0

    def units(self, finished: np.ndarray) -> list[Unit]:
        """Return this share's units, each with its unfinished views only.

        finished: bool [views, shards]. Units of early views come first, so that
        students can train on early views first.
        """
        whole = replace(self, worker=0, workers=1) if self.open else self
        units: dict[tuple[int, int], Unit] = {}
        for view, shard in whole.places(~finished):
            units.setdefault((view // self.views_per_decode, shard), Unit([], shard)).views.append(
                view
            )
        return list(units.values())

    def places(self, wanted: np.ndarray) -> list[tuple[int, int]]:
        """Return (view, shard) of the places in this worker's part of the store where
        ``wanted``, bool [views, shards], is true. The order is the order of the work.
        If the number of workers isn't known, worker 0's part is everything."""
        views, shards = wanted.shape
        blocks = itertools.product(range(0, views, self.views_per_decode), range(shards))
        return [
            (view, shard)
            for place, (first, shard) in enumerate(blocks)
            if place % self.workers == self.worker
            for view in range(first, min(first + self.views_per_decode, views))
            if wanted[view, shard] and view >= self.first_view
        ]
