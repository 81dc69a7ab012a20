"""Render one crop at a time, for data loaders of other trainers. The pixels are the
renderer's, mostly without DALI.

Pillow decodes JPEG, PNG and WebP of 8 bits to DALI's pixels, bit for bit: both call
libjpeg-turbo, libpng and libwebp. DALI decodes everything else, and whatever Pillow
refuses. The resize is ``resample.py`` in both cases.
"""

from __future__ import annotations

import io
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from pipeline.render.errors import RenderError
from pipeline.render.resample import SQUARE, resize_all
from pipeline.render.settings import RenderSettings

if TYPE_CHECKING:
    from pipeline.render.dali import Decoder

# Pillow's formats and modes of which both decoders make the same RGB pixels.
JPEG = ("JPEG", "MPO")
FORMATS = (*JPEG, "PNG", "WEBP")
ORIENTATION = 0x0112  # the tag of EXIF
# EXIF's orientation → what turns the picture upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class OneCrop:
    """Renders single crops at one output size, in pixels. settings: ``resize`` counts
    for nothing, since the resize is always Pillow's arithmetic."""

    def __init__(self, size: int, settings: RenderSettings) -> None:
        self.size, self.cubic = size, settings.interpolation == "bicubic"
        self.upright = settings.exif == "apply"
        self.settings = replace(settings, backend="cpu", threads=1, resize="pillow")
        self.dali: Decoder | None = None

    def __call__(self, blob: bytes, box: np.ndarray, flip: bool) -> np.ndarray:
        """Render a crop of an encoded image.

        box: int [4] top, left, height, width in pixels of the decoded image. Returns
        uint8 [size, size, 3]. Raises RenderError.
        """
        square = np.zeros((1, 1, len(SQUARE)), np.int64)
        square[..., :4], square[..., 4:6], square[..., 8] = box, self.size, flip
        made = np.empty((1, 1, self.size, self.size, 3), np.uint8)
        pixels = pixels_of(blob, upright=self.upright)
        if pixels is not None:
            table = np.array([(pixels.ctypes.data, *pixels.shape[:2])], np.int64)
            self._resize(table, square, made)
        else:
            decoded = self._by_dali(blob)
            self._resize(decoded.table, square, made)
        return made[0, 0]

    def _resize(self, table: np.ndarray, square: np.ndarray, made: np.ndarray) -> None:
        top, left, height, width = square[0, 0, :4].tolist()
        _, tall, wide = table[0].tolist()
        if min(top, left, height - 1, width - 1) < 0 or top + height > tall or left + width > wide:
            raise RenderError("a crop lies outside of the image", 0)
        resize_all(table, square, self.cubic, (0, 1, 0), made)

    def _by_dali(self, blob: bytes):
        from pipeline.render.dali import Decoder

        if self.dali is None:
            self.dali = Decoder(1, self.settings, regions=False)
        return self.dali([blob])


def pixels_of(blob: bytes, *, upright: bool) -> np.ndarray | None:
    """Decode an image by Pillow: uint8 [height, width, 3]. upright: turn the picture by
    its EXIF orientation. Returns None where DALI's pixels may differ, or if Pillow
    can't decode the image."""
    try:
        with Image.open(io.BytesIO(blob)) as image:
            if image.format not in FORMATS or _deep_or_moving(image):
                return None
            turn = None
            if upright and "exif" in image.info:
                if image.format not in JPEG:
                    return None
                exif = Image.Exif()
                exif.load(image.info["exif"])
                turn = UPRIGHT.get(exif.get(ORIENTATION, 1))
            # Pillow warns of a palette with transparency unless it is asked for RGBA.
            clear = image.mode == "P" and "transparency" in image.info
            picture = (image.convert("RGBA") if clear else image).convert("RGB")
            return np.asarray(picture if turn is None else picture.transpose(turn))
    except Exception:  # a broken image fails in many ways; DALI decides
        return None


def _deep_or_moving(image: Image.Image) -> bool:
    """Return whether an image has 16 bits for each colour, or moves. An MPO file holds
    several JPEG images, of which the first one counts."""
    if image.format in JPEG:
        return False
    tiles = getattr(image, "tile", ())
    deep = any("16" in str(tile.args) for tile in tiles)
    return deep or bool(getattr(image, "is_animated", False))
