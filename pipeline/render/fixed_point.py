"""Resize crops and central squares on the CPU to the pixels that Pillow makes
(resample.py).

DALI decodes, a pool of threads resizes. A batch is rendered in parts: while one part is
resized, the next is decoded, so that no core waits. Only the parts' pictures are in
memory, not the batch's.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch

from pipeline.render.dali import Decoded, Decoder
from pipeline.render.errors import NoMemory, RenderError
from pipeline.render.resample import SQUARE, resize_all
from pipeline.render.settings import RenderSettings
from pipeline.runtime.profiling import Clock
from pipeline.sampling.centre import centre

PART = 32  # images that are decoded at once, at least
TASKS = 2  # tasks for each thread that resizes a part: few wait for the last


@dataclass(frozen=True)
class Squares:
    """Squares to make of n images, some of each, at one output size.

    table: int64 [squares, n, 9], with the columns of ``resample.SQUARE``. cubic:
    bicubic, otherwise bilinear. made: uint8 [squares, images, size, size, 3], receives
    the squares, from the place ``first`` on.
    """

    table: np.ndarray
    cubic: bool
    made: np.ndarray
    first: int = 0

    def part(self, first: int, n: int) -> Squares:
        """Return the squares of n images from place ``first`` on, with a table of their
        own."""
        return replace(self, table=self.table[:, first : first + n].copy(), first=first)

    def outside(self, shapes: np.ndarray) -> np.ndarray:
        """Return which images, bool [n], have a box that is not inside the image.
        shapes: int64 [n, 2], heights and widths of the images."""
        corner, extent = self.table[..., :2], self.table[..., 2:4]
        bad = (corner < 0) | (extent < 1) | (corner + extent > shapes)
        return bad.any(axis=(0, 2))


class _FixedPoint:
    """Decodes images and resizes squares of them, part by part.

    regions: each image has one square, and only the square's box is decoded. clock:
    adds up the time of decoding and resizing.
    """

    gpu = False

    def __init__(
        self, batch_size: int, settings: RenderSettings, clock: Clock, *, regions: bool
    ) -> None:
        self.threads, self.clock = settings.decoder_threads, clock
        self.part = min(batch_size, max(PART, 2 * self.threads))
        self.regions, self.decode = regions, Decoder(self.part, settings, regions=regions)
        self.pool = ThreadPoolExecutor(self.threads, thread_name_prefix="resize")

    def close(self) -> None:
        """End the threads that resize."""
        self.pool.shutdown()

    def run(self, blobs: Sequence[bytes], several: Sequence[Squares]) -> None:
        """Make squares of n encoded images. Raises RenderError."""
        resizing: list[Future] = []
        try:
            for first in range(0, len(blobs), self.part):
                parts = [squares.part(first, self.part) for squares in several]
                try:
                    images = self._decoded(blobs[first : first + self.part], parts)
                except RenderError as error:
                    if error.place is not None:
                        error.place += first
                    raise
                for task in resizing:
                    task.result()
                resizing = [
                    self.pool.submit(self._resize, images, part, span)
                    for span in _spans(len(images.table), TASKS * self.threads)
                    for part in parts
                ]
            for task in resizing:
                task.result()
        finally:
            for task in resizing:
                task.exception()  # waits

    def _decoded(self, blobs: Sequence[bytes], parts: Sequence[Squares]) -> Decoded:
        """Decode the images of a part. Raises RenderError if an image doesn't hold all
        its boxes."""
        boxes = parts[0].table[0, :, :4].copy() if self.regions else None
        with self.clock.part("decode"):
            images = self.decode(blobs, boxes)
        if self.regions:  # the decoded image is the box
            for part in parts:
                part.table[..., :2] = 0
        outside = np.any([part.outside(images.table[:, 1:]) for part in parts], axis=0)
        if outside.any():
            raise RenderError("a crop lies outside of the image", int(outside.argmax()))
        return images

    def _resize(self, images: Decoded, part: Squares, span: tuple[int, int]) -> None:
        """Resize the squares of the images from place span[0] up to, without, span[1]
        of a part."""
        try:
            with self.clock.part("resize", among=self.threads):
                resize_all(images.table, part.table, part.cubic, (*span, part.first), part.made)
        except MemoryError:
            raise NoMemory("a crop could not be resized (out of memory)") from None


def _spans(n: int, parts: int) -> list[tuple[int, int]]:
    """Divide n items into at most ``parts`` spans of nearly equal length."""
    ends = [n * i // parts for i in range(parts + 1)]
    return [(a, b) for a, b in pairwise(ends) if a < b]


class FixedPointCrops(_FixedPoint):
    """Renders crops. Where only one crop of each image is needed, only the crop's
    region is decoded."""

    def __init__(self, views: int, batch_size: int, settings: RenderSettings, clock: Clock) -> None:
        super().__init__(batch_size, settings, clock, regions=views == 1)
        self.cubic = settings.interpolation == "bicubic"

    def render(
        self,
        made: dict[int, torch.Tensor],
        blobs: Sequence[bytes],
        boxes: np.ndarray,
        flips: np.ndarray,
    ) -> None:
        """Render as ``CropRenderer`` does, into ``made``: output size → uint8 [views,
        n, size, size, 3]."""
        several = []
        for size, pixels in made.items():
            table = np.zeros((*flips.shape, len(SQUARE)), np.int64)
            table[..., :4], table[..., 4:6], table[..., 8] = boxes, size, flips
            several.append(Squares(table, self.cubic, pixels.numpy()))
        self.run(blobs, several)


class FixedPointCentre(_FixedPoint):
    """Renders central squares. Only the square is resized, not the whole image."""

    def __init__(self, batch_size: int, settings: RenderSettings, clock: Clock) -> None:
        super().__init__(batch_size, settings, clock, regions=False)

    def render(
        self,
        made: dict[tuple[int, str], torch.Tensor],
        blobs: Sequence[bytes],
        height: np.ndarray,
        width: np.ndarray,
    ) -> None:
        """Render as ``CentreRenderer`` does, into ``made``: (size, interpolation) →
        uint8 [n, size, size, 3]."""
        shapes = np.stack([height, width], axis=1).astype(np.int64)
        several = []
        for (size, interpolation), pixels in made.items():
            table = np.zeros((1, len(shapes), len(SQUARE)), np.int64)
            table[0, :, 2:4] = shapes
            table[0, :, 4:6], table[0, :, 6:8] = centre(shapes, size)
            several.append(Squares(table, interpolation == "bicubic", pixels.numpy()[None]))
        self.run(blobs, several)
