"""Label units of work in one stream.

Threads render crops ahead of the teachers, and encode and write labels behind them.
Units follow each other without a gap, so the teachers wait only for a loader that is
slower than they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from cache import LabelStore
from cache.errors import BusyStore
from cache.format.crops import BoxesAndFlips, Crops
from cache.format.manifest import USABLE
from cache.writer import StoreWriter
from pipeline.images import reader
from pipeline.images.reader import Reader
from pipeline.labelling.inputs import Labelling
from pipeline.labelling.shares import Unit
from pipeline.models.model import ModelError, ensemble
from pipeline.render.mixing import paste_all
from pipeline.render.renderer import BLANK, CropRenderer
from pipeline.render.settings import RenderSettings
from pipeline.runtime.device_transfer import Returning, Sender, Sent
from pipeline.runtime.precision import fixed_shapes
from pipeline.runtime.progress import Progress, say
from pipeline.runtime.threads import ahead, behind, share_the_interpreter
from pipeline.sampling.crop_sampler import CropSampler
from pipeline.sampling.cutmix import GROUP

T = TypeVar("T")
AHEAD = 2  # batches that are rendered before the teachers want them
BEHIND = 4  # forward passes whose labels wait to be encoded
# Units in progress: one is rendered, one is labelled, one is written. Other workers
# can't label a claimed unit, so no more units are claimed.
UNITS = 3


@dataclass(eq=False)
class Job:
    """A unit of work whose shards this process has claimed."""

    unit: Unit
    rows: np.ndarray  # int64 [n], the rows of the shard
    usable: np.ndarray  # bool [n]
    crops: Crops  # [views, n]
    codes: np.ndarray  # [views, n, codec.columns]
    claims: ExitStack
    left: int  # labels still to encode, the blank labels of unusable images included
    unwritten: int  # views still to write
    writing: threading.Lock = field(default_factory=threading.Lock)
    dropped: bool = False  # if true, nothing more may be written

    def rendered_at(self, cut: slice) -> BoxesAndFlips:
        """Return boxes int [views, n, 4] and flips bool [views, n] of the rows at
        ``cut``. The box of an unusable image is a single pixel."""
        crops = self.crops.take(cut)
        return BoxesAndFlips(
            np.where(self.usable[cut][None, :, None], crops.boxes, np.array([0, 0, 1, 1])),
            crops.flips,
        )


@dataclass
class Piece:
    """The result of one forward pass: the labels of some rows in one view."""

    job: Job
    view: int  # the view's place among the unit's views
    cut: slice  # the rows' place in the shard
    pixels: dict[int, torch.Tensor]  # output size → uint8 [n, size, size, 3]
    # float32 [n, classes], the mean of the teachers' softmax; and bool [n], whether the
    # teachers' logits are finite
    found: Returning


class Labeller:
    """Labels units of work with the teachers.

    A batch holds one view of consecutive rows of a shard. Batches begin at multiples of
    the batch size, counted in the shard, or with CutMix in the group of rows that are
    mixed with each other. An unusable image keeps its place in the batch.
    """

    def __init__(self, work: Labelling, writer: StoreWriter, read: Reader) -> None:
        self.config, self.writer, self.store, self.read = work.config, writer, writer.store, read
        precision = work.config.store.precision
        self.teachers = (
            [t.compiled_teacher(precision) for t in work.teachers]
            if work.config.store.compile
            else work.teachers
        )
        self.sampler = CropSampler(work.config.crops, writer.store.images, writer.store.shard_rows)
        self.send, self.clock = Sender(work.device), work.execution.clock
        self.renderers: dict[int, CropRenderer] = {}  # by number of views
        self.open: list[Job] = []
        self.leaving = threading.Event()

    def __call__(self, units: Iterable[Unit], progress: Progress) -> int:
        """Label the units that no other process holds. Returns how many units were
        labelled here, at least in part."""
        mixed, batch_size = self.store.mixed, self.config.store.batch_size
        # A CutMix group is pasted at once but rendered in many batches. Queue a whole
        # group, so that rendering the next group overlaps with labelling this group.
        depth = max(AHEAD, GROUP // batch_size) if mixed else AHEAD
        done = 0
        share_the_interpreter()
        self.leaving.clear()
        self.room = threading.Semaphore(UNITS)
        try:
            with (
                fixed_shapes(),  # ensemble pads every batch to one size
                behind(
                    self._or_leave(self._write), self.config.store.views_per_decode
                ) as self.write,
                behind(self._or_leave(self._code), BEHIND) as code,
                ahead(self._batches(units), depth) as rendered,
                ahead(self._sent(rendered), 1) as batches,
                self._telling_the_renderer(),
            ):
                for job, cut, sent in self.clock.waits("wait for crops", batches):
                    for view, pixels in enumerate(sent.received()):
                        with self.clock.part("teachers", of_model=True):
                            p, logits = ensemble(
                                self.teachers,
                                pixels,
                                self.config.store.precision,
                                batch_size=batch_size,
                            )
                            found = Returning(p, torch.isfinite(logits).all(dim=1))
                        with self.clock.part("wait for the writer"):
                            code(Piece(job, view, cut, pixels, found))
                        progress.advance(int(job.usable[cut].sum()))
                    done += cut.start == 0
        except KeyboardInterrupt:
            self._tell_what_is_dropped()
            raise
        finally:
            for job in list(self.open):
                job.dropped = True
                # After a second signal to stop, a write may still be running. Its
                # claims are left to end with this process.
                if job.writing.acquire(blocking=False):
                    job.writing.release()
                    job.claims.close()
            self.open = []
            for renderer in self.renderers.values():
                renderer.close()
            self.renderers.clear()
        return done

    def _or_leave(self, deal_with: Callable[[T], None]) -> Callable[[T], None]:
        """Wrap a handler so that its failure stops the renderer too.

        The renderer may be waiting for a unit to end (``UNITS``), which can't happen
        after a failure.
        """

        def deal(item: T) -> None:
            try:
                deal_with(item)
            except BaseException:
                self.leaving.set()
                raise

        return deal

    @contextmanager
    def _telling_the_renderer(self) -> Iterator[None]:
        """Stop the renderer at the end of the context."""
        try:
            yield
        finally:
            self.leaving.set()

    def _tell_what_is_dropped(self) -> None:
        """Print which views and shards are dropped by a stop."""
        done, of = self.store.progress()
        places = [(view, job.unit.shard) for job in self.open for view in job.unit.views]
        dropped = [place for place in places if not self.store.is_finished(*place)]
        what = "; ".join(
            place_of(self.store, [v for v, s in dropped if s == shard], shard)
            for shard in dict.fromkeys(s for _, s in dropped)
        )
        say(
            f"{done} of {of} shards are done; "
            + (f"what was in flight is dropped ({what})" if dropped else "nothing is dropped")
        )

    # ---- in threads, ahead of the teachers

    def _batches(
        self, units: Iterable[Unit]
    ) -> Iterator[tuple[Job, slice, list[dict[int, torch.Tensor]]]]:
        """Render the crops of the units that can be claimed. Yields all views of some
        rows together, since the views share one decode."""
        waiting = iter(units)
        with self.send.beside():
            while True:
                while not self.room.acquire(timeout=0.1) and not self.leaving.is_set():
                    pass
                if self.leaving.is_set() or (unit := next(waiting, None)) is None:
                    return
                job = self._claimed(unit)
                if job is None:
                    self.room.release()
                else:
                    for cut, views in (
                        self._mixed(job)
                        if self.store.mixed
                        else self._rendered(job, range(len(job.rows)))
                    ):
                        yield job, cut, views

    def _sent(
        self, rendered: Iterable[tuple[Job, slice, list]]
    ) -> Iterator[tuple[Job, slice, Sent[list]]]:
        """Send rendered crops to the device shortly before the teachers want them. The
        device has room for a few batches, but not for a whole CutMix group."""
        with self.send.beside():
            for job, cut, views in rendered:
                with self.clock.part("send"):
                    sent = self.send(views)
                yield job, cut, sent

    def _claimed(self, unit: Unit) -> Job | None:
        claims = ExitStack()
        views = claims.enter_context(self.writer.claimed(unit.views, unit.shard))
        if not views:
            claims.close()
            return None
        store = self.store
        rows = np.arange(*store.shard_slice(unit.shard).indices(len(store.images)))
        codes = np.zeros(
            (len(views), len(rows), store.codec.columns(store.classes)), dtype=store.codec.dtype
        )
        with claims:  # released if drawing the crops fails
            crops = Crops.stack([self.sampler.whole_crops(view, rows) for view in views])
            claims = claims.pop_all()
        usable = store.images.status[rows] == USABLE
        job = Job(
            Unit(views, unit.shard),
            rows,
            usable,
            crops,
            codes,
            claims,
            len(views) * len(rows),
            len(views),
        )
        self.open.append(job)
        return job

    def _rendered(
        self, job: Job, part: range
    ) -> Iterator[tuple[slice, list[dict[int, torch.Tensor]]]]:
        batch_size = self.config.store.batch_size
        for start in range(part.start, part.stop, batch_size):
            if self.leaving.is_set():
                return
            cut = slice(start, min(start + batch_size, part.stop))
            usable = job.usable[cut]
            with self.clock.part("read"):
                blobs = iter(self.read(job.rows[cut][usable]))
            filled = [next(blobs) if good else BLANK for good in usable]
            with reader.naming(self.store.images, job.rows[cut]):
                views = self._renderer(len(job.unit.views))(filled, *job.rendered_at(cut))
            yield cut, views

    def _mixed(self, job: Job) -> Iterator[tuple[slice, list[dict[int, torch.Tensor]]]]:
        """Render each CutMix group of rows whole, then paste and yield its batches. A
        partner can be anywhere in the group."""
        for first in range(0, len(job.rows), GROUP):
            part = range(first, min(first + GROUP, len(job.rows)))
            group: list[dict[int, torch.Tensor]] = [{} for _ in job.unit.views]
            cuts = []
            for cut, views in self._rendered(job, part):
                cuts.append(cut)
                for whole, pixels in zip(group, views, strict=True):
                    for size, p in pixels.items():
                        if size not in whole:
                            whole[size] = p.new_empty(len(part), *p.shape[1:])
                        whole[size][cut.start - first : cut.stop - first] = p
            for cut in () if self.leaving.is_set() else cuts:
                with self.clock.part("mix"):
                    crops, here = job.crops.take(cut), slice(cut.start - first, cut.stop - first)
                    place = (
                        np.where(crops.partner < 0, job.rows[cut], crops.partner) - job.rows[first]
                    )
                    views = [
                        paste_all(pixels, here, place[view], crops.rectangle[view])
                        for view, pixels in enumerate(group)
                    ]
                yield cut, views

    def _renderer(self, views: int) -> CropRenderer:
        if views not in self.renderers:
            self.renderers[views] = CropRenderer(
                [t.image_size for t in self.teachers],
                views,
                self.config.store.batch_size,
                RenderSettings.of_config(self.config),
                # Pasting makes new tensors, so pinned tensors would be of no use.
                pinned=self.send.device.type == "cuda" and not self.store.mixed,
                clock=self.clock,
            )
        return self.renderers[views]

    # ---- in threads, behind the teachers

    def _code(self, piece: Piece) -> None:
        """Encode the labels of a piece. The last piece of a unit queues the unit for
        writing."""
        job, good = piece.job, piece.job.usable[piece.cut]
        p, finite = (tensor.numpy() for tensor in piece.found.arrived())  # waits for the GPU
        if not finite[good].all():
            self._blame(piece, good)
        with self.clock.part("code"):
            job.codes[piece.view, piece.cut][good] = self.store.codec.encode(p[good])
        job.left -= len(good)
        if not job.left:
            for view in range(len(job.unit.views)):
                self.write((job, view))

    def _write(self, place: tuple[Job, int]) -> None:
        """Write one view of a unit. The last view releases the unit's claims."""
        job, view = place
        with job.writing:
            if job.dropped:
                return
            try:
                with self.clock.part("write"):
                    self.writer.write(
                        job.unit.views[view], job.unit.shard, job.codes[view], job.crops.view(view)
                    )
            except BusyStore as taken:  # another process has taken the shard over
                say(str(taken))
        job.unwritten -= 1
        if not job.unwritten:
            job.claims.close()
            self.open.remove(job)
            self.room.release()

    def _blame(self, piece: Piece, good: np.ndarray) -> None:
        """Raise ModelError with the teacher and the image that gave an output that is
        not finite."""
        paths = self.store.images.path[piece.job.rows[piece.cut]]
        for teacher in self.teachers:
            with torch.inference_mode():
                finite = torch.isfinite(
                    teacher(piece.pixels[teacher.image_size], self.config.store.precision)
                ).all(dim=1)
            bad = ~finite.cpu().numpy() & good
            if bad.any():
                raise ModelError(
                    f"teacher {teacher.name} gives no finite output for {paths[np.argmax(bad)]} "
                    f"(precision {self.config.store.precision}); check its checkpoint, or use "
                    "store.precision: float32"
                )


def place_of(store: LabelStore, views: list[int], shard: int) -> str:
    """Return some views of a shard in words, for messages: "view 3, rows 0 to 99"."""
    rows = store.shard_slice(shard)
    return (
        f"view{'s' * (len(views) > 1)} {', '.join(map(str, views))}, rows {rows.start} to "
        f"{rows.stop - 1}"
    )
