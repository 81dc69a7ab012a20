"""Find the units of work that are free: neither finished nor held by a worker."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from cache.format.manifest import USABLE
from cache.system.claims import held, held_names
from cache.writer import StoreWriter
from pipeline.labelling.shares import Share, Unit
from pipeline.runtime.progress import Progress


class FreeUnits:
    """Iterates over those of ``units`` that are free when their turn comes.

    Workers don't speak to each other. Each looks at the records and the claims on the
    disk whenever it has room for another unit, and takes the first free unit. So fast
    workers take more units than slow ones, and a unit is taken soon after the worker
    that held the unit is lost.

    Workers that begin at the same moment would all want the first unit, so the first
    look of worker i passes over i free units. Where fewer units are free than others
    are held, a unit is handed out view by view, so that no worker is idle while another
    labels several views.
    """

    def __init__(
        self, writer: StoreWriter, share: Share, units: Sequence[Unit], progress: Progress
    ) -> None:
        self.writer, self.progress = writer, progress
        self.left = {(unit.views[0], unit.shard): [*unit.views] for unit in units}
        self.skip = share.worker if share.open else 0
        self.views_per_decode = share.views_per_decode

    def __iter__(self) -> Iterator[Unit]:
        claims = self.writer.claims
        while self.left:
            busy = held_names(claims)
            unit = self._first(busy)
            if unit is None:  # claims of dead workers are looked for last, since that is dear
                unit = self._first({name for name in busy if held(claims, name)})
            if unit is None:
                return
            yield unit

    def _first(self, busy: set[str]) -> Unit | None:
        """Take the first unit of which some views are neither finished nor busy."""
        free = [
            (place, views)
            for place, several in self.left.items()
            if (views := [view for view in several if f"{view}-{place[1]}" not in busy])
        ]
        first = self.skip % len(free) if free else 0
        self.skip = 0
        for place, views in free[first:] + free[:first]:
            if views := self._unfinished(place, views):
                if len(free) * self.views_per_decode < len(busy - self.writer.held):
                    views = views[:1]
                self._drop(place, views)
                return Unit(views, place[1])
        return None

    def _unfinished(self, place: tuple[int, int], views: list[int]) -> list[int]:
        """Return those of a unit's views that are unfinished, and drop the others,
        which other workers have finished."""
        shard = place[1]
        finished = [view for view in views if self.writer.store.is_finished(view, shard)]
        if finished:
            images = self.writer.store.images.status[self.writer.store.shard_slice(shard)]
            self.progress.advance_elsewhere(len(finished) * int(np.sum(images == USABLE)))
            self._drop(place, finished)
        return [view for view in views if view not in finished]

    def _drop(self, place: tuple[int, int], views: list[int]) -> None:
        self.left[place] = [view for view in self.left[place] if view not in views]
        if not self.left[place]:
            del self.left[place]
