"""Keep the results of a scan in files, so that the next scan decodes only files that
have changed, and a scan that was stopped goes on where it was."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from cache.format.manifest import Images
from cache.system import durable
from pipeline.render.dali import dali_version
from pipeline.runtime.progress import say

COLUMNS = ("bytes", "digest", "height", "width")  # of Images
LISTING = 2  # the files that a scan lists: 2 without files that systems left
EVERY = 60.0  # seconds of scanning between two writes of what was scanned
AT_END = 10.0  # seconds of scanning that are worth a write at its end
SHARE = 50  # writing takes at most one part in SHARE of the time


class Scanned:
    """The usable images of earlier scans, known by path, size and time of change.

    If a file has changed but kept its size and time, training refuses it later by its
    digest. A file of results that is missing, damaged or of another decoder counts as
    empty. A scan writes ``part`` now and then, and when it is stopped (``keep_part``).
    Only ``keep`` writes ``file``, so that a command that is refused after its scan
    leaves the results of the run that is there.

    file: the results of a whole scan, beside a run; None where only a stopped scan is
    kept, as for a store. part: the results of a scan that is under way.
    """

    def __init__(self, file: Path | None, part: Path | None = None) -> None:
        self.file = file
        self.part = part or file.with_name(f".{file.name}.part")
        self._new: dict[str, Any] = {}
        # A run of a version up to 0.8 goes on with the files that systems left.
        self.lists_all = file is not None and _is_old(file)
        self._written, self._pause = time.monotonic(), EVERY

    @classmethod
    def beside(cls, store: Path) -> Scanned:
        """Keep a stopped scan for a store that is to be created."""
        return cls(None, store.with_name(f"{store.name}.scan"))

    def recall(
        self, exif: str, paths: np.ndarray, sizes: np.ndarray, changed: np.ndarray
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return int64 [known], the places of the known files, and their ``COLUMNS``,
        each [known, …]; no columns if nothing is kept.

        exif: as in RenderSettings. paths: str [n]. sizes: int64 [n], bytes. changed:
        int64 [n], time of the last change, ns since 1970.
        """
        files = [file for file in (self.file, self.part) if file]
        several = [kept for file in files if (kept := _read(file, exif))]
        if not several:
            return np.zeros(0, np.int64), {}
        row_of = {path: row for row, path in enumerate(p for kept in several for p in kept["path"])}
        kept = {
            name: np.concatenate([one[name] for one in several]) for name in (*COLUMNS, "changed")
        }
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
        if not self.lists_all:
            self._new["listing"] = np.array(LISTING)

    def keep(self) -> None:
        """Write the noted result, if there is one, in place of earlier results."""
        if self._new and self.file:
            durable.write(self.file, self._save)
            self.drop_part()

    def due(self, *, at_end: bool = False) -> bool:
        """Return whether a scan under way should be noted and written now. at_end: of a
        scan that has all images."""
        return time.monotonic() - self._written > (AT_END if at_end else self._pause)

    def keep_part(self) -> None:
        """Write the noted result of a scan that is under way, or was stopped. A disk
        that doesn't take it doesn't stop the scan, and that is said."""
        if self._new and len(self._new["bytes"]):
            begun = time.monotonic()
            try:
                durable.make_folder(self.part.parent)
                durable.write(self.part, self._save)
            except OSError as error:
                say(
                    f"what was scanned can't be kept in {self.part} ({error.strerror or error}); "
                    f"if the scan is stopped, it begins again"
                )
            self._written = time.monotonic()
            self._pause = max(EVERY, SHARE * (self._written - begun))

    def drop_part(self) -> None:
        """Remove the results of a scan under way: they are kept elsewhere now."""
        with suppress(OSError):  # a disk that may only be read
            self.part.unlink(missing_ok=True)

    def _save(self, scratch: Path) -> None:
        with open(scratch, "wb") as file:  # an open file, since numpy adds .npz to a name
            np.savez(file, **self._new)


def kept_paths(file: Path) -> list[str]:
    """Return the paths of the images in kept results, of whatever decoder; none if the
    file can't be read."""
    try:
        with np.load(file, allow_pickle=False) as columns:
            text = columns["path"].tobytes().decode()
    except Exception:  # no file, or a damaged file, which can raise anything
        return []
    return text.split("\0") if text else []


def _is_old(file: Path) -> bool:
    """Return whether a scan listed the files that systems left, too."""
    try:
        with np.load(file, allow_pickle=False) as columns:
            return "path" in columns and "listing" not in columns
    except Exception:  # no file, or a damaged file, which can raise anything
        return False


def _read(file: Path, exif: str) -> dict | None:
    """Read results; None if the file can't be read whole, or is of another decoder."""
    try:
        with np.load(file, allow_pickle=False) as columns:
            kept = {name: columns[name] for name in (*COLUMNS, "changed", "path", "decoder")}
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
