"""What a scan of a data folder found, kept in a file, so that the next one needn't
decode again what hasn't changed since."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from cache.format.manifest import Images
from cache.system import durable
from pipeline.render.dali import dali_version

COLUMNS = ("bytes", "digest", "height", "width")  # of Images


class Scanned:
    """The usable images of the last scan, by path, size and time of change. A file of
    these that was changed all the same is refused when it is trained on, since its
    digest is another. What is missing, damaged or of another decoder is as good as
    nothing known.

    Only ``keep`` writes, so that a command which is refused after its scan leaves
    nothing behind.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._new: dict[str, np.ndarray] = {}

    def recall(
        self, exif: str, paths: np.ndarray, sizes: np.ndarray, changed: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """int64 [known], which of these files are known; and, if any are, their
        ``COLUMNS``, each [known, …]. paths: str [n]. sizes: int64 [n], bytes. changed:
        int64 [n], ns."""
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
        """Remember a scan's result; changed: int64 [images], when each file was changed
        last, ns since 1970."""
        usable = images.take(images.usable)
        text = "\0".join(usable.path.tolist()).encode()
        self._new = {name: getattr(usable, name) for name in COLUMNS}
        self._new |= {
            "changed": changed[images.usable],
            "path": np.frombuffer(text, np.uint8),
            "decoder": np.array(_decoder(exif)),
        }

    def keep(self) -> None:
        """Write what was noted, if anything was."""
        if self._new:
            durable.write(self.file, self._save)

    def _save(self, scratch: Path) -> None:
        with open(scratch, "wb") as file:  # given a name, numpy would add .npz to it
            np.savez(file, **self._new)

    def _read(self, exif: str) -> dict | None:
        try:
            with np.load(self.file, allow_pickle=False) as file:
                kept = {name: file[name] for name in (*COLUMNS, "changed", "path", "decoder")}
            kept["path"] = kept["path"].tobytes().decode().split("\0")
        except Exception:  # there is none, or a damaged one, which can raise anything
            return None
        same = (
            str(kept.pop("decoder")) == _decoder(exif)
            and len({len(column) for column in kept.values()}) == 1
        )
        return kept if same else None


def _decoder(exif: str) -> str:
    return f"DALI {dali_version}, exif {exif}"
