"""Which images an epoch shows in which order, and their stored crops and labels,
rendered and in batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import numpy as np
import torch

from cache.format.crops import BoxesAndFlips, Crops, Mixes
from pipeline.config import CutMix, Train
from pipeline.images.reader import Reader, naming
from pipeline.render.dali import CropRenderer, Rendered
from pipeline.render.mixing import paste_all
from pipeline.runtime.device_transfer import Sender, Sent
from pipeline.runtime.execution import Execution
from pipeline.runtime.threads import ahead
from pipeline.sampling import cutmix, philox
from pipeline.sampling.epoch_order import FEWEST_BLOCKS, batch_sizes, epoch_windows, side_by_side
from pipeline.training.source import Source


@dataclass
class Mixed:
    """What was pasted into the pictures of a batch."""

    area: torch.Tensor  # float32 [n], the share of each picture that is pasted
    class_index: torch.Tensor  # int64 [n], of the partners
    # codes [n, classes] of the partners, to be mixed by area; None where a label is of
    # the mixed picture
    labels: torch.Tensor | None


@dataclass
class Batch:
    """Crops of some images: crop j of image i is at j · len(rows) + i."""

    rows: np.ndarray  # int64 [images], rows of the source
    pixels: dict[int, torch.Tensor]  # output size → uint8 [n, size, size, 3]
    labels: torch.Tensor | None  # codes [n, classes], or None
    class_index: torch.Tensor  # int64 [n]
    mixed: Mixed | None
    total: int  # crops of the global batch, of which these are this process's part
    world: int = 1  # processes that have a part
    # how many processes have each crop: all of them, of a batch that is too small to be
    # divided
    copies: int = 1

    def __len__(self) -> int:
        return len(self.class_index)

    @property
    def weight(self) -> float:
        """What the mean over this part counts in a mean over the processes that is to
        be the one over the global batch."""
        return len(self) * self.world / (self.total * self.copies)


@dataclass(frozen=True)
class Batching:
    """How an epoch is cut into batches.

    batch_size: crops of a global batch. seed: of the order. crops_per_image: how many
    views of each image are in a batch (FKD, arXiv 2112.01528): an epoch's pass over the
    images then shows that many views. mix: CutMix by area, of neighbours in the batch.
    """

    batch_size: int
    seed: int
    crops_per_image: int = 1
    mix: CutMix | None = None

    @classmethod
    def of(cls, recipe: Train) -> Batching:
        """Take it from a config's section."""
        return cls(recipe.batch_size, recipe.seed, recipe.crops_per_image, recipe.cutmix)


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together, in the epoch's order, and all that the source
    knows of them."""

    rows: np.ndarray  # int64 [n]
    labels: np.ndarray | None  # codes [views, n, classes]
    crops: Crops  # [views, n]; partner: the row itself where nothing is pasted
    theirs: (
        BoxesAndFlips | None
    )  # [views, n], the partners' own crops; with the source's CutMix only

    def take(self, places: np.ndarray | slice) -> Window:
        labels = None if self.labels is None else self.labels[:, places]
        theirs = (
            None
            if self.theirs is None
            else BoxesAndFlips(*(column[:, places] for column in self.theirs))
        )
        return Window(self.rows[places], labels, self.crops.take(places), theirs)

    def join(self, other: Window) -> Window:
        labels = (
            None if self.labels is None else np.concatenate([self.labels, other.labels], axis=1)
        )
        theirs = None
        if self.theirs is not None:
            theirs = BoxesAndFlips(
                *(
                    np.concatenate(pair, axis=1)
                    for pair in zip(self.theirs, other.theirs, strict=True)
                )
            )
        return Window(
            np.concatenate([self.rows, other.rows]),
            labels,
            Crops.join([self.crops, other.crops]),
            theirs,
        )


class Replay:
    """Epochs of a source as batches: the same sequence of global batches for every
    number of processes.

    sizes: output sizes in pixels, the first one the student's. execution: where the
    tensors are to be, and the processes, each of which has a part of every batch.
    """

    def __init__(
        self,
        source: Source,
        sizes: Sequence[int],
        batching: Batching,
        execution: Execution | None = None,
    ) -> None:
        execution = execution or Execution()
        self.source, self.size, self.batching = source, sizes[0], batching
        self.rank, self.world = execution.processes.rank, execution.processes.world
        self.send, self.clock = Sender(execution.device), execution.clock
        self.views = batching.crops_per_image
        self.begun: tuple[int, ExitStack, Iterator[Sent[Batch]]] | None = None
        self.window_blocks = max(FEWEST_BLOCKS, source.window_blocks // self.views)
        self.sizes = batch_sizes(
            len(source.images.usable), batching.batch_size // self.views
        )  # in images
        self.class_index = source.images.class_index.astype(np.int64)
        self.read = Reader(source.data.path, source.images, source.settings.threads)
        mixed = bool(batching.mix or source.policy.cutmix)
        most = max(len(self._mine(size)) for size in self.sizes) * (
            1 + self.views * mixed
        )  # with partners, at worst
        pinned = execution.on_gpu and not mixed  # mixed pictures are new tensors
        self.renderer = CropRenderer(sizes, self.views, most, source.settings, pinned=pinned)

    def close(self) -> None:
        """End all threads."""
        self.forget()
        self.read.__exit__()

    def _mine(self, size: int) -> np.ndarray:
        """Places in a global batch of so many images that are this process's part: all,
        where there aren't two for each, since BatchNorm needs two and nobody may be
        without a gradient."""
        return (
            np.arange(size)
            if self._is_small(size)
            else np.array_split(np.arange(size), self.world)[self.rank]
        )

    def _is_small(self, size: int) -> bool:
        return size < 2 * self.world

    @contextmanager
    def epoch(self, epoch: int) -> Iterator[Iterator[Batch]]:
        """Batches of one pass over the images, rendered ahead in a thread, with tensors
        on the device: ``with replay.epoch(3) as batches: for batch in batches: …``.

        It replays the views epoch, epoch + 1, …, one for each of ``crops_per_image``,
        modulo the source's views.
        """
        if self.begun is None or self.begun[0] != epoch:
            self.begin(epoch)
        (_, context, batches), self.begun = self.begun, None
        with context:
            yield (sent.received() for sent in batches)

    def begin(self, epoch: int) -> None:
        """Start to render an epoch that is going to be asked for, while other things
        are done."""
        self.forget()
        context = ExitStack()
        self.begun = epoch, context, context.enter_context(ahead(self._batches(epoch)))

    def forget(self) -> None:
        """Drop what was begun."""
        if self.begun is not None:
            (_, context, _), self.begun = self.begun, None
            context.close()

    def _batches(self, epoch: int) -> Iterator[Sent[Batch]]:
        sizes = iter(self.sizes)
        size = next(sizes, 0)
        waiting: Window | None = None
        with ahead(self._windows(epoch), depth=1) as windows, self.send.beside():
            for fresh in windows:
                waiting = fresh if waiting is None else waiting.join(fresh)
                while size and len(waiting.rows) >= size:
                    batch = self._batch(epoch, waiting.take(slice(size)))
                    with self.clock.part("send"):
                        sent = self.send(batch)
                    yield sent
                    waiting = waiting.take(slice(size, None))
                    size = next(sizes, 0)

    def _windows(self, epoch: int) -> Iterator[Window]:
        source, seed = self.source, self.batching.seed
        for rows in epoch_windows(
            source.images.usable, source.block_rows, seed, epoch, self.window_blocks
        ):
            with self.clock.part("labels"):
                window = self._window(epoch, rows)
            yield window

    def _window(self, epoch: int, rows: np.ndarray) -> Window:
        """All that the source knows of some rows, in the epoch's order; with CutMix
        partners come next to each other."""
        source = self.source
        views = [(epoch + j) % source.views for j in range(self.views)]
        mixes = [source.mixes(view, rows) for view in views] if source.policy.cutmix else []
        if mixes and self.views == 1:
            order = side_by_side(rows, mixes[0].partner)
            rows, mixes = rows[order], [Mixes(*(column[order] for column in mixes[0]))]
        labels = [source.labels(view, rows) for view in views]
        crops = [source.crops(view, rows) for view in views]
        stacked = None if labels[0] is None else _stacked(labels)
        if not mixes:
            return Window(rows, stacked, Crops.stack([Crops(*crop) for crop in crops]), None)
        partners = [np.where(mix.partner < 0, rows, mix.partner) for mix in mixes]
        theirs = [
            source.crops(view, partner) for view, partner in zip(views, partners, strict=True)
        ]
        own = [
            Crops(*crop, partner, mix.rectangle)
            for crop, partner, mix in zip(crops, partners, mixes, strict=True)
        ]
        return Window(
            rows,
            stacked,
            Crops.stack(own),
            BoxesAndFlips(*(_stacked(column) for column in zip(*theirs, strict=True))),
        )

    def _batch(self, epoch: int, whole: Window) -> Batch:
        """This process's part of a global batch."""
        n = len(whole.rows)
        mine, total, copies = self._mine(n), n * self.views, self.world if self._is_small(n) else 1
        by_area = None
        if self.batching.mix:
            whole, by_area = self._with_neighbours(epoch, whole)
            by_area = None if by_area is None else torch.from_numpy(_flat(by_area[:, mine]))
        part = whole.take(mine)
        labels = None if part.labels is None else torch.from_numpy(_flat(part.labels))
        mixed = None
        if part.theirs is None:
            views = self._render(part.rows, part.crops.boxes, part.crops.flips).all_views
            pixels = {size: p.flatten(0, 1) for size, p in views.items()}
        else:
            rectangle = part.crops.rectangle
            partner = np.where(rectangle.any(axis=2), part.crops.partner, part.rows)
            pixels = self._mixed_pixels(part, partner)
            mixed = Mixed(
                torch.from_numpy(cutmix.area(_flat(rectangle), self.size)),
                torch.from_numpy(self.class_index[_flat(partner)]),
                by_area,
            )
        classes = torch.from_numpy(np.tile(self.class_index[part.rows], self.views))
        return Batch(part.rows, pixels, labels, classes, mixed, total, self.world, copies)

    def _with_neighbours(self, epoch: int, whole: Window) -> tuple[Window, np.ndarray | None]:
        """Pair neighbours in a global batch, which is in a random order, for CutMix by
        area: the batch with partners, and the partners' codes [views, n, classes], if
        there are labels."""
        rows, crops = whole.rows, whole.crops
        mate = cutmix.pairs(np.arange(len(rows)))
        identity = philox.identities(self.source.images.path[rows])
        batching = self.batching
        drawn = np.stack(
            [
                cutmix.boxes(batching.mix, batching.seed, identity, epoch + j)
                for j in range(self.views)
            ]
        )
        partner = np.repeat(rows[mate][None], self.views, axis=0)
        theirs = crops.take(mate)
        mixed = Window(
            rows,
            whole.labels,
            Crops(crops.boxes, crops.flips, partner, drawn),
            BoxesAndFlips(theirs.boxes, theirs.flips),
        )
        return mixed, None if whole.labels is None else whole.labels[:, mate]

    def _mixed_pixels(self, part: Window, partner: np.ndarray) -> dict[int, torch.Tensor]:
        """Render a part of a batch with the partners [views, n] of its crops, and
        paste: output size → uint8 [views · n, size, size, 3]."""
        shown, crops, at = with_partners(part.rows, part.crops, partner, part.theirs)
        views = self._render(shown, crops.boxes, crops.flips)
        own = slice(len(part.rows))
        with self.clock.part("mix"):
            mixed = [
                paste_all(view, own, at[j], part.crops.rectangle[j]) for j, view in enumerate(views)
            ]
        return {
            size: torch.cat([view[size] for view in mixed]) if len(mixed) > 1 else mixed[0][size]
            for size in mixed[0]
        }

    def _render(self, rows: np.ndarray, boxes: np.ndarray, flips: np.ndarray) -> Rendered:
        """Boxes [views, n, 4] and flips [views, n] of some rows → per view: output size
        → uint8 [n, size, size, 3]."""
        with self.clock.part("read"):
            blobs = self.read(rows)
        with self.clock.part("render"), naming(self.source.images, rows):
            return self.renderer(blobs, boxes, flips)


def with_partners(
    rows: np.ndarray, crops: Crops, partner: np.ndarray, theirs: BoxesAndFlips
) -> tuple[np.ndarray, BoxesAndFlips, np.ndarray]:
    """What to render for a batch with CutMix: its rows, and behind them those partners
    that aren't among them, each once.

    rows [n]; crops [views, n]; partner [views, n] rows, and ``theirs``, the partners'
    own crops [views, n]. Returns rows, boxes and flips of all that is needed, and int64
    [views, n]: at which of these places each partner is.
    """
    absent, first = np.unique(partner, return_index=True)
    new = ~np.isin(absent, rows)
    absent, first = absent[new], np.divmod(first[new], partner.shape[1])
    shown = np.concatenate([rows, absent])
    sorter = np.argsort(shown)
    at = sorter[np.searchsorted(shown, partner, sorter=sorter)]
    # In a view that doesn't need an image any of its crops will do.
    boxes, flips = (np.repeat(column[first][None], len(partner), axis=0) for column in theirs)
    for view, places in enumerate(at):
        outside = np.flatnonzero(places >= len(rows))
        boxes[view, places[outside] - len(rows)] = theirs.boxes[view, outside]
        flips[view, places[outside] - len(rows)] = theirs.flips[view, outside]
    whole = BoxesAndFlips(
        np.concatenate([crops.boxes, boxes], axis=1), np.concatenate([crops.flips, flips], axis=1)
    )
    return shown, whole, at


def _stacked(per_view: Sequence[np.ndarray]) -> np.ndarray:
    """[n, …] a view → [views, n, …]; of one view no copy is made."""
    return per_view[0][None] if len(per_view) == 1 else np.stack(per_view)


def _flat(column: np.ndarray) -> np.ndarray:
    """[views, images, …] → [views · images, …], the order of a batch."""
    return np.ascontiguousarray(column.reshape(-1, *column.shape[2:]))
