"""Find the units of work that are free: neither finished nor held by a worker."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

import numpy as np

from cache.format.manifest import USABLE
from cache.system.claims import held_names, living
from cache.system.signals import check
from cache.writer import StoreWriter
from pipeline.labelling.shares import Share, Unit
from pipeline.runtime.progress import Progress

LOOK = 5.0  # seconds between two looks for dead holders, which are dear on a cluster's disk
Place = tuple[int, int]  # view, shard


class FreeUnits:
    """Iterates over those of ``units`` that are free when their turn comes.

    Workers don't speak to each other. Each looks at the records and the claims on the
    disk whenever it has room for another unit, and takes the first free unit. So fast
    workers take more units than slow ones, and a unit is taken soon after the worker
    that held the unit is lost.

    Workers that look at the same moment would all want the first free unit. So worker i
    passes over i free units. A worker without a number passes over a random number of
    free units, at most as many as others hold.

    Towards the end, where less than twice as many units are free as others hold, a
    worker takes a part of a unit's views only, down to a single one. So no worker is
    idle while a slow one labels several views.
    """

    def __init__(
        self, writer: StoreWriter, share: Share, units: Sequence[Unit], progress: Progress
    ) -> None:
        self.writer, self.share, self.progress = writer, share, progress
        self.left = {(unit.views[0], unit.shard): [*unit.views] for unit in units}
        self.taken: list[tuple[Place, int]] = []  # views that were handed out, with their units
        # Shards that aren't finished although there is a record: it promises lost data.
        self.lost = {
            (view, unit.shard)
            for unit in units
            for view in unit.views
            if writer.store.has_record(view, unit.shard)
        }

    def __iter__(self) -> Iterator[Unit]:
        while self.left:
            busy = held_names(self.writer.claims)
            unit = self._first(busy)
            if unit is None:
                unit = self._first(living(self.writer.claims, busy))
            if unit is None:
                return
            yield unit

    def unfinished(self) -> list[Place]:
        """Return (view, shard) of everything that isn't finished yet."""
        for unit, view in self.taken:
            if not self._is_done(view, unit[1]):
                self.left[unit] = sorted([*self.left.get(unit, []), view])
        self.taken, self.left = [], dict(sorted(self.left.items()))
        for unit in list(self.left):
            self._unfinished(unit, self.left[unit])
        return [(view, shard) for (_, shard), views in self.left.items() for view in views]

    def wait(self, doubtful: Sequence[Place]) -> None:
        """Wait until something unfinished, or one of the ``doubtful`` shards, is held
        by no living process; or until there is no such thing."""
        looked = time.monotonic()
        while places := [*self.unfinished(), *doubtful]:
            # Always once: what is free may be a claim that can't be taken just now.
            time.sleep(1.0)
            check()
            names = {f"{view}-{shard}" for view, shard in places}
            if names - held_names(self.writer.claims):
                return
            if time.monotonic() - looked >= LOOK:
                looked = time.monotonic()
                if names - living(self.writer.claims, names):
                    return

    def _first(self, busy: set[str]) -> Unit | None:
        """Take the first unit of which some views are neither finished nor busy."""
        free = [
            (unit, views)
            for unit, several in self.left.items()
            if (views := [view for view in several if f"{view}-{unit[1]}" not in busy])
        ]
        others = len(self.left) - len(free)  # units that other workers hold
        # Worker 0, and workers without a number, are many if they were started by hand.
        passed = self.share.worker if self.share.open else 0
        first = (passed or random.randint(0, others)) % max(1, len(free))
        for unit, views in free[first:] + free[:first]:
            if views := self._unfinished(unit, views):
                if len(free) < 2 * others:
                    views = views[: max(1, len(views) * len(free) // (2 * others))]
                self._drop(unit, views)
                self.taken += [(unit, view) for view in views]
                return Unit(views, unit[1])
        return None

    def _unfinished(self, unit: Place, views: list[int]) -> list[int]:
        """Return those of a unit's views that aren't finished, and drop the others,
        which other workers have finished."""
        store, shard = self.writer.store, unit[1]
        finished = [view for view in views if self._is_done(view, shard)]
        if finished:
            usable = store.images.status[store.shard_slice(shard)] == USABLE
            self.progress.advance_elsewhere(len(finished) * int(np.sum(usable)))
            self._drop(unit, finished)
        return [view for view in views if view not in finished]

    def _is_done(self, view: int, shard: int) -> bool:
        """Return whether a shard has been finished. To look for a record is a hundred
        times as fast as to read it."""
        store = self.writer.store
        if (view, shard) in self.lost:
            return store.is_finished(view, shard)
        return store.has_record(view, shard)

    def _drop(self, unit: Place, views: list[int]) -> None:
        self.left[unit] = [view for view in self.left[unit] if view not in views]
        if not self.left[unit]:
            del self.left[unit]
