"""Find out about hardware JPEG decoders, which some GPUs have: how many there are, and
which files they decode."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path

_NVJPEG_BACKEND_HARDWARE = 3  # nvjpeg.h


def is_baseline_jpeg(blob: bytes) -> bool:
    """Tell whether an encoded image is a baseline JPEG of one or three components with
    8 bits each, as hardware decoders need it.

    The marker segments are read up to the frame header (ITU-T T.81, Annex B): SOF0 is
    baseline, and any other frame, such as a progressive frame, is not.
    """
    place = 2
    while blob[:2] == b"\xff\xd8" and place + 10 <= len(blob) and blob[place] == 0xFF:
        marker = blob[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return marker == 0xC0 and blob[place + 4] == 8 and blob[place + 9] in (1, 3)
        else:
            place += 2 + int.from_bytes(blob[place + 2 : place + 4], "big")
    return False


@cache
def hardware_engines() -> int | None:
    """Ask nvJPEG how many JPEG decoders torch's current GPU has in hardware; None if
    nvJPEG can't be asked."""
    spec = importlib.util.find_spec("nvidia")
    libraries = [
        file
        for place in (spec and spec.submodule_search_locations) or ()
        for file in Path(place).glob("*/lib/libnvjpeg.so.*")
    ]
    try:
        nvjpeg, handle = ctypes.CDLL(str(libraries[0])), ctypes.c_void_p()
        if nvjpeg.nvjpegCreateEx(_NVJPEG_BACKEND_HARDWARE, None, None, 0, ctypes.byref(handle)):
            return 0
        engines, cores = ctypes.c_uint(), ctypes.c_uint()
        return (
            engines.value
            if nvjpeg.nvjpegGetHardwareDecoderInfo(
                handle, ctypes.byref(engines), ctypes.byref(cores)
            )
            == 0
            else None
        )
    except (IndexError, OSError, AttributeError):
        return None
