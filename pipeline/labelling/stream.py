"""Stage one's work as one stream: crops are rendered ahead of the teachers, labels
coded and written behind them, and units of work follow each other without a gap, so
that the teachers wait for nothing but a loader that is slower than they are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch

from cache.errors import BusyStore
from cache.format.crops import BoxesAndFlips, Crops
from cache.format.manifest import USABLE
from cache.writer import StoreWriter
from pipeline.images import reader
from pipeline.images.reader import Reader
from pipeline.labelling.labelling import Labelling
from pipeline.labelling.shares import Unit
from pipeline.models.model import ModelError, ensemble
from pipeline.render.dali import BLANK, CropRenderer
from pipeline.render.mixing import paste_all
from pipeline.render.settings import RenderSettings
from pipeline.runtime.device_transfer import Returning, Sender, Sent
from pipeline.runtime.precision import fixed_shapes
from pipeline.runtime.progress import Progress, say
from pipeline.runtime.threads import ahead, behind, share_the_interpreter
from pipeline.sampling.crop_sampler import CropSampler
from pipeline.sampling.cutmix import GROUP

T = TypeVar("T")
AHEAD = 2  # batches that are rendered before the teachers want them
BEHIND = 4  # forward passes whose labels wait to be coded
# at once: one that is rendered, one that is labelled, one that is written; what is
# claimed no other worker can do
UNITS = 3


@dataclass(eq=False)
class Job:
    """A unit whose claims this process holds."""

    unit: Unit
    rows: np.ndarray  # int64 [n], of the shard
    usable: np.ndarray  # bool [n]
    crops: Crops  # [views, n]
    codes: np.ndarray  # [views, n, codec.columns]
    claims: ExitStack
    left: int  # labels that are still to come, blank ones included
    unwritten: int  # views
    writing: threading.Lock = field(default_factory=threading.Lock)
    dropped: bool = False  # nothing of it may be written any more

    def rendered_at(self, cut: slice) -> BoxesAndFlips:
        """Boxes int [views, n, 4] and flips bool [views, n]; of an unusable image a
        pixel."""
        crops = self.crops.take(cut)
        return BoxesAndFlips(
            np.where(self.usable[cut][None, :, None], crops.boxes, np.array([0, 0, 1, 1])),
            crops.flips,
        )


@dataclass
class Piece:
    """What one forward pass found: of the crops of one view of some rows."""

    job: Job
    view: int  # its place among the unit's
    cut: slice  # the rows' place in the shard
    pixels: dict[int, torch.Tensor]  # output size → uint8 [n, size, size, 3]
    # float32 [n, classes], the mean of the teachers' softmax; bool [n], whether their
    # logits are finite
    found: Returning


class Labeller:
    """Labels units with the teachers. Batches are cut by place in the shard (with
    CutMix, in the group of rows that are mixed with each other), one view a batch, an
    unusable image keeping its place."""

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
        """Label what nobody else holds. Returns how many of the units were labelled
        here, at least in part."""
        mixed, batch_size = self.store.mixed, self.config.store.batch_size
        # A group is mixed in one go and rendered in many batches: let that wait which
        # hides the next group's rendering.
        depth = max(AHEAD, GROUP // batch_size) if mixed else AHEAD
        done = 0
        share_the_interpreter()
        self.leaving.clear()
        self.room = threading.Semaphore(UNITS)
        try:
            with (
                fixed_shapes(),  # ensemble fills batches up
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
                # Who asks twice to stop doesn't wait for a write, and its claims end
                # with this process.
                if job.writing.acquire(blocking=False):
                    job.writing.release()
                    job.claims.close()
            self.open = []
        return done

    def _or_leave(self, deal_with: Callable[[T], None]) -> Callable[[T], None]:
        """The same, but where it fails the renderer ends, which may be waiting for room
        that there will never be."""

        def deal(item: T) -> None:
            try:
                deal_with(item)
            except BaseException:
                self.leaving.set()
                raise

        return deal

    @contextmanager
    def _telling_the_renderer(self) -> Iterator[None]:
        """That nobody wants its crops any more."""
        try:
            yield
        finally:
            self.leaving.set()

    def _tell_what_is_dropped(self) -> None:
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
        """Rendered crops of those units that can be claimed; all views of some rows
        together, which share a decode."""
        with self.send.beside():
            for unit in units:
                while not self.room.acquire(timeout=0.1) and not self.leaving.is_set():
                    pass
                if self.leaving.is_set():
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
        """On the device there is room for a few batches, and not for all that is
        rendered ahead with CutMix."""
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
        with claims:  # let go of, should drawing the crops fail
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
            with self.clock.part("render"), reader.naming(self.store.images, job.rows[cut]):
                views = self._renderer(len(job.unit.views))(filled, *job.rendered_at(cut))
            yield cut, views

    def _mixed(self, job: Job) -> Iterator[tuple[slice, list[dict[int, torch.Tensor]]]]:
        """Groups of rows are rendered whole, since partners are anywhere in them."""
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
                pinned=self.send.device.type == "cuda"
                and not self.store.mixed,  # mixed pictures are new tensors
            )
        return self.renderers[views]

    # ---- in threads, behind the teachers

    def _code(self, piece: Piece) -> None:
        """Code the labels of a piece; with the last one of a unit, have the unit
        written."""
        job, good = piece.job, piece.job.usable[piece.cut]
        p, finite = (tensor.numpy() for tensor in piece.found.arrived())  # which waits for a GPU
        if not finite[good].all():
            self._blame(piece, good)
        with self.clock.part("code"):
            job.codes[piece.view, piece.cut][good] = self.store.codec.encode(p[good])
        job.left -= len(good)
        if not job.left:
            for view in range(len(job.unit.views)):
                self.write((job, view))

    def _write(self, place: tuple[Job, int]) -> None:
        """Write a view of a unit; with the last one let go of its claims."""
        job, view = place
        with job.writing:
            if job.dropped:
                return
            try:
                with self.clock.part("write"):
                    self.writer.write(
                        job.unit.views[view], job.unit.shard, job.codes[view], job.crops.view(view)
                    )
            except BusyStore as taken:  # its owner now does it, or did
                say(str(taken))
        job.unwritten -= 1
        if not job.unwritten:
            job.claims.close()
            self.open.remove(job)
            self.room.release()

    def _blame(self, piece: Piece, good: np.ndarray) -> None:
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


def place_of(store: object, views: list[int], shard: int) -> str:
    """Views of a shard, as a user is told of them."""
    rows = store.shard_slice(shard)
    return (
        f"view{'s' * (len(views) > 1)} {', '.join(map(str, views))}, rows {rows.start} to "
        f"{rows.stop - 1}"
    )
