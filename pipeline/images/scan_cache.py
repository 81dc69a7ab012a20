"""Keep the results of a scan in a file, so that the next scan decodes only files that
have changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from cache.format.manifest import Images
from cache.system import durable
from pipeline.render.dali import dali_version

COLUMNS = ("bytes", "digest", "height", "width")  # of Images


class Scanned:
    """The usable images of the last scan, known by path, size and time of change.

    If a file has changed but kept its size and time, training refuses it later by its
    digest. A file of results that is missing, damaged or of another decoder counts as
    empty. Only ``keep`` writes, so that a command that is refused after its scan leaves
    nothing behind.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._new: dict[str, Any] = {}

    def recall(
        self, exif: str, paths: np.ndarray, sizes: np.ndarray, changed: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return int64 [known], the places of the known files, and their ``COLUMNS``,
        each [known, …]; no columns if nothing is kept.

        exif: as in RenderSettings. paths: str [n]. sizes: int64 [n], bytes. changed:
        int64 [n], time of the last change, ns since 1970.
        """
        kept = self._read(exif)
        if kept is None:
            return np.zeros(0, np.int64), {}
        row_of = {path: row for row, path in enumerate(kept["path"])}
        there = np.array([row_of.get(path, -1) for path in paths], np.int64)
        rows = np.flatnonzero(there >= 0)
        same = (kept["bytes"][there[rows]] == sizes[rows]) & (
            kept["changed"][there[rows]] == changed[rows]
        )
        rows = rows[same]
        return rows, {name: kept[name][there[rows]] for name in COLUMNS}

    def note(self, exif: str, images: Images, changed: np.ndarray) -> None:
        """Remember a scan's result until ``keep``. changed: int64 [images], time of
        each file's last change, ns since 1970."""
        usable = images.take(images.usable)
        text = "\0".join(usable.path.tolist()).encode()
        self._new = {name: getattr(usable, name) for name in COLUMNS}
        self._new |= {
            "changed": changed[images.usable],
            "path": np.frombuffer(text, np.uint8),
            "decoder": np.array(_decoder(exif)),
        }

    def keep(self) -> None:
        """Write the noted result, if there is one."""
        if self._new:
            durable.write(self.file, self._save)

    def _save(self, scratch: Path) -> None:
        with open(scratch, "wb") as file:  # an open file, since numpy adds .npz to a name
            np.savez(file, **self._new)

    def _read(self, exif: str) -> dict | None:
        try:
            with np.load(self.file, allow_pickle=False) as file:
                kept = {name: file[name] for name in (*COLUMNS, "changed", "path", "decoder")}
            kept["path"] = kept["path"].tobytes().decode().split("\0")
        except Exception:  # no file, or a damaged file, which can raise anything
            return None
        same = (
            str(kept.pop("decoder")) == _decoder(exif)
            and len({len(column) for column in kept.values()}) == 1
        )
        return kept if same else None


def _decoder(exif: str) -> str:
    return f"DALI {dali_version}, exif {exif}"
