"""Render crops: encoded images and crops → uint8 pixels. Teachers, student and
evaluation all see the pixels of this renderer.

A crop is cut out of the decoded image and then resized. DALI decodes always. The
settings decide who resizes: fixed_point.py, or DALI (dali_resize.py). Pixels depend
neither on the batch nor on the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch

from pipeline.render.dali import DECODERS
from pipeline.render.dali_resize import DaliCentre, DaliCrops
from pipeline.render.errors import NoMemory
from pipeline.render.fixed_point import FixedPointCentre, FixedPointCrops
from pipeline.render.settings import RenderSettings
from pipeline.runtime.profiling import Clock

# The steps from a decoded image to a crop, in order, as a store records them.
STEPS = {
    "dali": "slice, resize with anti-aliasing, flip",
    "pillow": "slice, resize rows then columns in integer arithmetic as Pillow does, flip",
}
# A black pixel (PPM). It is rendered in place of an unusable image, so that the other
# images keep their places in the batch.
BLANK = b"P6 1 1 255\n\0\0\0"


def record(settings: RenderSettings) -> dict[str, str]:
    """Return what a store records of its renderer: all that decides pixels beside the
    crops section of the config. Before version 0.10 DALI was the only one to resize,
    and it still isn't named."""
    return {
        "backend": settings.backend,
        **({"resize": settings.resize} if settings.resize != "dali" else {}),
        "steps": STEPS[settings.resize],
        **DECODERS.get(settings.backend, {}),
    }


class Rendered(list[dict[int, torch.Tensor]]):
    """Rendered crops, a list over views: output size → uint8 [n, size, size, 3].

    all_views: the same memory, output size → uint8 [views, n, size, size, 3].
    """

    def __init__(self, all_views: dict[int, torch.Tensor]) -> None:
        self.all_views = all_views
        views = len(next(iter(all_views.values())))
        super().__init__(
            {size: pixels[view] for size, pixels in all_views.items()} for view in range(views)
        )


class _Renderer:
    """Allocates memory for pictures, and ends the engine's threads at the end of a
    ``with`` block or by ``close()``.

    pinned: a renderer on the CPU puts its results into pinned memory, from where they
    go to a GPU without another copy.
    """

    def __init__(
        self, engine: DaliCrops | DaliCentre | FixedPointCrops | FixedPointCentre, pinned: bool
    ) -> None:
        self.gpu, self.close = engine.gpu, engine.close
        self.pinned = pinned and not self.gpu
        # Taken here, since torch's current device may differ in the thread that
        # renders.
        self.device = torch.cuda.current_device() if self.gpu else "cpu"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def empty(self, *shape: int) -> torch.Tensor:
        """Allocate memory for results, uint8, on the renderer's device."""
        try:
            if self.gpu or self.pinned:
                return torch.empty(
                    shape, dtype=torch.uint8, device=self.device, pin_memory=self.pinned
                )
            # Allocated by numpy, which asks for huge pages; torch doesn't.
            return torch.from_numpy(np.empty(shape, np.uint8))
        except torch.OutOfMemoryError:  # of a GPU
            raise
        except (RuntimeError, MemoryError, ValueError):
            # A stranger's store may ask for more memory than there is.
            raise NoMemory(
                f"pictures of {' × '.join(map(str, shape))} bytes don't fit into memory"
            ) from None


class CropRenderer(_Renderer):
    """Renders crops of images at one or several output sizes, from one decode per
    image. sizes: in pixels. views: crops of each image. clock: adds up the time of
    decoding and resizing."""

    def __init__(
        self,
        sizes: Sequence[int],
        views: int,
        batch_size: int,
        settings: RenderSettings,
        *,
        pinned: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self.sizes, self.views, clock = sorted(set(sizes)), views, clock or Clock()
        self.engine = (
            FixedPointCrops(views, batch_size, settings, clock)
            if settings.resize == "pillow"
            else DaliCrops(self.sizes, views, batch_size, settings, clock)
        )
        super().__init__(self.engine, pinned)

    def __call__(self, blobs: Sequence[bytes], boxes: np.ndarray, flips: np.ndarray) -> Rendered:
        """Render the crops of n images.

        blobs: n encoded images. boxes: int [views, n, 4] top, left, height, width in
        pixels. flips: bool [views, n]. Returns per view a dict: output size → uint8 [n,
        size, size, 3], on the renderer's device. Raises RenderError.
        """
        made = {size: self.empty(self.views, len(blobs), size, size, 3) for size in self.sizes}
        self.engine.render(made, blobs, boxes, flips)
        return Rendered(made)


class CentreRenderer(_Renderer):
    """Renders evaluation's view, the central square (``pipeline.sampling.centre``).

    looks: (output size in pixels, interpolation) of each model.
    """

    def __init__(
        self,
        looks: Sequence[tuple[int, str]],
        batch_size: int,
        settings: RenderSettings,
        *,
        pinned: bool = False,
    ) -> None:
        self.looks, clock = sorted(set(looks)), Clock()
        self.engine = (
            FixedPointCentre(batch_size, settings, clock)
            if settings.resize == "pillow"
            else DaliCentre(self.looks, batch_size, settings, clock)
        )
        super().__init__(self.engine, pinned)

    def __call__(
        self, blobs: Sequence[bytes], height: np.ndarray, width: np.ndarray
    ) -> dict[tuple[int, str], torch.Tensor]:
        """Render n encoded images with decoded heights and widths [n] in pixels: (size,
        interpolation) → uint8 [n, size, size, 3], on the renderer's device. Raises
        RenderError."""
        made = {look: self.empty(len(blobs), look[0], look[0], 3) for look in self.looks}
        self.engine.render(made, blobs, height, width)
        return made
