"""Divide the shards of a store among workers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np


@dataclass
class Unit:
    """Work that is done or not: some views of one shard."""

    views: list[int]
    shard: int


@dataclass(frozen=True)
class Share:
    """A worker's share of a store's shards: every n-th unit of work, from the worker's
    own number on.

    worker: from 0. workers: how many there are. first_view: earlier views are left as
    they are. views_per_decode: views of a shard that make a unit, since they share the
    decoding of its images. Whose share a unit is depends on its place alone, not on
    what is done already.
    """

    worker: int = 0
    workers: int = 1
    first_view: int = 0
    views_per_decode: int = 1

    @property
    def leads(self) -> bool:
        """Whether this worker does what only one can do: create, extend and repair the
        store."""
        return self.worker == 0

    def units(self, finished: np.ndarray) -> list[Unit]:
        """Return the share's units of unfinished shards. finished: bool [views,
        shards]. Early views come first, so that they become trainable first."""
        units: dict[tuple[int, int], Unit] = {}
        for view, shard in self.places(~finished):
            units.setdefault((view // self.views_per_decode, shard), Unit([], shard)).views.append(
                view
            )
        return list(units.values())

    def places(self, wanted: np.ndarray) -> list[tuple[int, int]]:
        """Return (view, shard) of the share's places of ``wanted``, bool [views,
        shards], in the order of the work."""
        views, shards = wanted.shape
        blocks = itertools.product(range(0, views, self.views_per_decode), range(shards))
        return [
            (view, shard)
            for place, (first, shard) in enumerate(blocks)
            if place % self.workers == self.worker
            for view in range(first, min(first + self.views_per_decode, views))
            if wanted[view, shard] and view >= self.first_view
        ]
