"""Say why a file can't be used as an image, and what to do."""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    SAMPLESPERPIXEL,
    ImageFileDirectory_v2,
)

from pipeline.render.settings import MAX_MEGAPIXELS

_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
CMYK = 5  # TIFF 6.0, section 16
_BRANDS = {  # first brand of a file of boxes → format
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis"), "HEIC"),
    **dict.fromkeys((b"hevc", b"hevx", b"hevm", b"hevs"), "HEIC"),
    **dict.fromkeys((b"mif1", b"msf1"), "HEIF"),
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
}
_MARKER = re.compile(rb"\xff+[^\x00\xff]")  # of a JPEG, with fill bytes
_CONVERT = "must be converted to JPEG or PNG"


class Reason(str):
    """A reason as the manifest records it, and a hint that only people are shown.

    The digest of the manifest covers the reasons, and decides whether a run may go on.
    So a reason keeps its words from version to version, and what is better said of it
    goes into the hint.
    """

    hint: str

    def __new__(cls, recorded: str, hint: str = "") -> Reason:
        """Make a reason of the recorded words and a hint, which may be empty."""
        made = super().__new__(cls, recorded)
        made.hint = hint
        return made


def shown(reason: str) -> str:
    """Return a reason with its hint, if it has one."""
    hint = getattr(reason, "hint", "")
    return f"{reason}: {hint}" if hint else reason


def too_large(height: int, width: int, limit: float) -> str:
    """Return the reason for an image of more pixels than the limit, in megapixels."""
    return (
        f"too large: {height * width / 1e6:,.1f} megapixels, the limit is {limit:g} "
        f"(render.max_megapixels)"
    )


def why_undecodable(blob: bytes, max_megapixels: float = MAX_MEGAPIXELS) -> str:
    """Return a readable reason why the renderer failed to decode these bytes, with a
    hint (``Reason``) where there is one. The part before a colon is the kind of
    reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(blob)) as image:
                kind = image.format
                if image.width * image.height > max_megapixels * 1e6:
                    return too_large(image.height, image.width, max_megapixels)
                image.load()
    except Image.UnidentifiedImageError:
        kind = _format_unknown_to_pillow(blob)
        return Reason("not an image", f"this {kind} file {_CONVERT}" if kind else "")
    except Image.DecompressionBombError as error:
        # Pillow's own limit, before Pillow tells the size
        pixels = re.search(r"\((\d+) pixels\)", str(error))
        return too_large(1, int(pixels[1]), max_megapixels) if pixels else f"too large: {error}"
    except Exception as error:
        # A damaged file can raise any error in Pillow's plugins. The file is unusable
        # in any case.
        return f"damaged: {' '.join(str(error).split())[:120] or type(error).__name__}"
    hint = _extraneous_bytes(blob) or (
        "save it again" if kind in ("JPEG", "PNG") else "convert it to JPEG or PNG"
    )
    return Reason(f"DALI can't decode this {kind} file", hint)


def why_misread(blob: bytes) -> str:
    """Return the reason why the renderer's pixels of a file that it decodes are wrong;
    empty if they are right.

    DALI 2.4 takes the values of a TIFF in a wrong order if there are two for a pixel
    (grey with alpha), or if they lie in planes and have 16 bits or alpha. Of
    floating-point numbers it takes 1 for white.
    """
    if blob[:4] not in _TIFF:
        return ""
    try:
        with warnings.catch_warnings(), io.BytesIO(blob) as file:
            warnings.simplefilter("ignore")
            tags = ImageFileDirectory_v2(file.read(16 if blob[2] == 43 or blob[3] == 43 else 8))
            file.seek(tags.next)
            tags.load(file)
            samples, planes = tags.get(SAMPLESPERPIXEL, 1), tags.get(PLANAR_CONFIGURATION, 1) == 2
            right = samples == 3 or tags.get(PHOTOMETRIC_INTERPRETATION) == CMYK
            if samples == 2 or (planes and not (right and set(tags[BITSPERSAMPLE]) == {8})):
                return "DALI misreads this kind of TIFF file: convert it to PNG"
            with Image.open(file) as image:
                values = np.asarray(image) if image.mode == "F" else np.zeros(1)
    except Exception:  # DALI decodes TIFFs that Pillow doesn't know
        return ""
    if ((values >= 0) & (values <= 1)).all():
        return ""
    return (
        f"DALI misreads this TIFF file: its numbers go from {values.min():g} to "
        f"{values.max():g}, not from 0 to 1; convert it to PNG"
    )


def _format_unknown_to_pillow(blob: bytes) -> str:
    """Return the name of an image format that Pillow may not know; empty for others."""
    if blob.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL ")):
        return "JPEG XL"
    if blob[4:8] == b"ftyp":  # ISO/IEC 14496-12, 4.3
        return _BRANDS.get(blob[8:12], "")
    return "SVG" if re.match(rb"\s*<(svg|\?xml[^<]*<svg)", blob[:1000]) else ""


def _extraneous_bytes(blob: bytes) -> str:
    """Return a hint if a JPEG has bytes between its marker segments (ITU-T T.81,
    B.1.1.2). Pillow's decoder skips them, DALI's parser doesn't."""
    place = 2
    while blob[:2] == b"\xff\xd8" and (marker := _MARKER.search(blob, place)):
        if between := marker.start() - place:
            return (
                f"{between:,} extraneous bytes before the marker at byte {marker.start():,}; save "
                f"it again, or without loss by jpegtran -copy all"
            )
        code = blob[marker.end() - 1]
        if code == 0xDA:  # the scan begins
            break
        alone = code == 0x01 or 0xD0 <= code <= 0xD9
        length = int.from_bytes(blob[marker.end() : marker.end() + 2], "big")
        place = marker.end() + (0 if alone else max(2, length))
    return ""
