"""Replay an epoch in batches: its images in the epoch's order, their crops rendered,
with their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from cache.format.crops import BoxesAndFlips, Crops, Mixes
from pipeline.config import CutMix, Train
from pipeline.images.reader import Reader, naming
from pipeline.render.mixing import paste_all
from pipeline.render.renderer import CropRenderer, Rendered
from pipeline.runtime.device_transfer import Sender, Sent
from pipeline.runtime.execution import Execution
from pipeline.runtime.threads import ahead
from pipeline.sampling import cutmix, philox
from pipeline.sampling.epoch_order import FEWEST_BLOCKS, batch_sizes, epoch_windows, side_by_side
from pipeline.training.source import Source


@dataclass
class Mixed:
    """The CutMix partners of a batch."""

    area: torch.Tensor  # float32 [n], the pasted share of each crop's area, 0 … 1
    class_index: torch.Tensor  # int64 [n], class indices of the partners
    # codes [n, classes] of the partners' labels, to be mixed by area; None where labels
    # were made for the mixed crops
    labels: torch.Tensor | None


@dataclass
class Batch:
    """A batch of crops. Crop j of image i is at index j · len(rows) + i."""

    rows: np.ndarray  # int64 [images], rows of the source
    pixels: dict[int, torch.Tensor]  # output size → uint8 [n, size, size, 3]
    labels: torch.Tensor | None  # codes [n, classes], or None without stored labels
    class_index: torch.Tensor  # int64 [n]
    mixed: Mixed | None
    total: int  # crops of the global batch; this batch is one process's part of them
    world: int = 1  # number of processes that get a part
    # number of processes that have each crop: all of them if the global batch is too
    # small to be divided
    copies: int = 1

    def __len__(self) -> int:
        return len(self.class_index)

    def parts(self, most: int) -> list[slice]:
        """Divide the crops into at most ``most`` parts of two crops or more. Every
        process has equally many parts: as many as the smallest share has room for."""
        views = len(self) // len(self.rows)
        least = len(self) if self.copies > 1 else self.total // views // self.world * views
        count = max(1, min(most, least // 2))
        ends = [len(self) * part // count for part in range(count + 1)]
        return [slice(first, end) for first, end in pairwise(ends)]

    @property
    def weight(self) -> float:
        """Return the weight of this part's mean.

        The mean over the processes of weight · mean is the mean over the global batch.
        """
        return len(self) * self.world / (self.total * self.copies)


@dataclass(frozen=True)
class Batching:
    """The division of an epoch into batches.

    batch_size: crops in a global batch. seed: seed of the order of images.
    crops_per_image: views of each image in a batch (FKD, arXiv 2112.01528); one pass
    over the images then shows that many views. mix: CutMix by area, between neighbours
    in the batch.
    """

    batch_size: int
    seed: int
    crops_per_image: int = 1
    mix: CutMix | None = None

    @classmethod
    def of(cls, recipe: Train) -> Batching:
        """Read the values from the ``train`` section of a config."""
        return cls(recipe.batch_size, recipe.seed, recipe.crops_per_image, recipe.cutmix)


@dataclass(frozen=True)
class Window:
    """Rows that are shuffled together, in the epoch's order, with the labels and crops
    that the source has for them."""

    rows: np.ndarray  # int64 [n]
    labels: np.ndarray | None  # codes [views, n, classes]
    crops: Crops  # [views, n]; partner: the row itself where nothing is pasted
    # [views, n], the partners' own crops; None where nothing is pasted
    theirs: BoxesAndFlips | None

    def take(self, places: np.ndarray | slice) -> Window:
        """Return the rows at these places."""
        labels = None if self.labels is None else self.labels[:, places]
        theirs = (
            None
            if self.theirs is None
            else BoxesAndFlips(*(column[:, places] for column in self.theirs))
        )
        return Window(self.rows[places], labels, self.crops.take(places), theirs)

    def join(self, other: Window) -> Window:
        """Return this window with the rows of another window behind its own."""
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
    """Replays the epochs of a source in batches.

    The sequence of global batches is the same for every number of processes. sizes:
    output sizes in pixels, the student's size first. execution: the device of the
    tensors, and the processes, each of which gets a part of every batch.
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
        # Sizes of the global batches, in images.
        self.sizes = batch_sizes(len(source.images.usable), batching.batch_size // self.views)
        self.class_index = source.images.class_index.astype(np.int64)
        self.read = Reader(source.data, source.images, source.settings.threads)
        mixed = bool(batching.mix or source.policy.cutmix)
        # At worst, each image has a partner outside the batch in each view.
        most = max(len(self._mine(size)) for size in self.sizes) * (1 + self.views * mixed)
        # Pasting makes new tensors, so pinned tensors would be of no use.
        pinned = execution.on_gpu and not mixed
        self.renderer = CropRenderer(
            sizes, self.views, most, source.settings, pinned=pinned, clock=self.clock
        )

    def close(self) -> None:
        """End all threads."""
        self.forget()
        self.read.__exit__()
        self.renderer.close()

    def _mine(self, size: int) -> range:
        """Return the places in a global batch of ``size`` images that are this
        process's part.

        Every process gets the whole batch if there are fewer than two images for each
        process: BatchNorm needs two images, and every process needs a gradient.
        """
        if self._is_small(size):
            return range(size)
        part = np.array_split(np.arange(size), self.world)[self.rank]
        return range(int(part[0]), int(part[-1]) + 1)

    def _is_small(self, size: int) -> bool:
        """Return whether a global batch has fewer than two images for each process."""
        return size < 2 * self.world

    @contextmanager
    def epoch(self, epoch: int) -> Iterator[Iterator[Batch]]:
        """Yield the batches of one pass over the images.

        Use: ``with replay.epoch(3) as batches: for batch in batches: …``. A thread
        renders the batches ahead; their tensors are on the device. The batches show the
        views epoch, epoch + 1, …, one view for each of ``crops_per_image``, modulo the
        source's number of views.
        """
        if self.begun is None or self.begun[0] != epoch:
            self.begin(epoch)
        (_, context, batches), self.begun = self.begun, None
        with context:
            yield (sent.received() for sent in batches)

    def begin(self, epoch: int) -> None:
        """Start to render an epoch that ``epoch`` will ask for later, for example while
        validation runs."""
        self.forget()
        context = ExitStack()
        self.begun = epoch, context, context.enter_context(ahead(self._batches(epoch)))

    def forget(self) -> None:
        """Drop the epoch that ``begin`` has started."""
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
        """Fetch labels and crops of some rows, in the epoch's order. With CutMix and
        one crop per image, partners are moved next to each other."""
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
        """Render this process's part of a global batch."""
        n = len(whole.rows)
        places = self._mine(n)
        mine = slice(places.start, places.stop)  # A slice copies nothing.
        total, copies = n * self.views, self.world if self._is_small(n) else 1
        by_area = None
        if self.batching.mix:
            whole, theirs = self._with_neighbours(epoch, whole)
            by_area = None if theirs is None else torch.from_numpy(_flat(theirs[:, mine]))
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
        """Pair neighbours in a global batch for CutMix by area. Neighbours are random,
        since the batch is in a random order.

        Returns the batch with its partners, and the codes [views, n, classes] of the
        partners' labels, or None without labels.
        """
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
        """Render a part of a batch with the partners, rows [views, n], of its crops,
        and paste. Returns output size → uint8 [views · n, size, size, 3]."""
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
        """Read and render some rows with boxes [views, n, 4] and flips [views, n].

        Returns for each view: output size → uint8 [n, size, size, 3].
        """
        with self.clock.part("read"):
            blobs = self.read(rows)
        with naming(self.source.images, rows):
            return self.renderer(blobs, boxes, flips)


def with_partners(
    rows: np.ndarray, crops: Crops, partner: np.ndarray, theirs: BoxesAndFlips
) -> tuple[np.ndarray, BoxesAndFlips, np.ndarray]:
    """List the images to render for a batch with CutMix: the batch's rows, then each
    partner that is not among them, once.

    rows: [n]. crops: [views, n]. partner: rows [views, n]. theirs: the partners' own
    crops [views, n]. Returns the rows to render, their boxes and flips in every view,
    and int64 [views, n], each partner's place among the rows to render.
    """
    absent, first = np.unique(partner, return_index=True)
    new = ~np.isin(absent, rows)
    absent, at_first = absent[new], np.divmod(first[new], partner.shape[1])
    shown = np.concatenate([rows, absent])
    sorter = np.argsort(shown)
    at = sorter[np.searchsorted(shown, partner, sorter=sorter)]
    # The renderer makes every view of every image. In a view that doesn't need a
    # partner, any crop of the partner will do.
    boxes, flips = (np.repeat(column[at_first][None], len(partner), axis=0) for column in theirs)
    for view, places in enumerate(at):
        outside = np.flatnonzero(places >= len(rows))
        boxes[view, places[outside] - len(rows)] = theirs.boxes[view, outside]
        flips[view, places[outside] - len(rows)] = theirs.flips[view, outside]
    whole = BoxesAndFlips(
        np.concatenate([crops.boxes, boxes], axis=1), np.concatenate([crops.flips, flips], axis=1)
    )
    return shown, whole, at


def _stacked(per_view: Sequence[np.ndarray]) -> np.ndarray:
    """Stack one array [n, …] per view to [views, n, …]. A single view is not copied."""
    return per_view[0][None] if len(per_view) == 1 else np.stack(per_view)


def _flat(column: np.ndarray) -> np.ndarray:
    """Flatten [views, images, …] to [views · images, …], the order of a batch."""
    return np.ascontiguousarray(column.reshape(-1, *column.shape[2:]))
