"""Define how rendering fails."""

from __future__ import annotations

import mmap

from cache.errors import MealError


class RenderError(MealError):
    """A failure to render, mostly of an image that decoded when the manifest was made
    and doesn't now.

    place: the image's place in the batch, if it could be found out. on_gpu: True if the
    GPU's decoder alone refuses the image.
    """

    def __init__(self, message: str, place: int | None = None, on_gpu: bool = False) -> None:
        super().__init__(message)
        self.place, self.on_gpu = place, on_gpu


class NoMemory(RenderError):
    """A failure to render for want of memory on the CPU."""


def lacks_memory(height: int, width: int) -> bool:
    """Return True if this process gets no memory now to decode an image of so many
    pixels. Some decoders say the same of a broken file and for want of memory."""
    try:
        # A progressive JPEG and a PNG take nearly 16 bytes a pixel.
        mmap.mmap(-1, 16 * max(0, height * width) + (64 << 20)).close()
    except OSError:
        return True
    return False
