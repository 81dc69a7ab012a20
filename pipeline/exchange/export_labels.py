"""Write a store's labels as files for FKD's training code."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from cache import LabelStore
from cache.errors import StoreError
from cache.format.manifest import USABLE
from cache.system import durable
from cache.system.local import require_local
from cache.system.signals import check
from pipeline.exchange import fkd_format
from pipeline.exchange.fkd_format import named, require_a_name
from pipeline.exchange.import_labels import AT_ONCE
from pipeline.exchange.label_kinds import KINDS, sparse
from pipeline.images.result_places import require_elsewhere
from pipeline.runtime.progress import Progress, say

# What FKD's and MEAL V2's training programs call each kind (--soft_label_type).
TYPES = {"full": "ori", "top5": "marginal_smoothing_k5", "top10": "marginal_smoothing_k10"}
NOTE = "exported-from.json"  # says which store and labels a folder holds


def export_labels(
    path: Path, out: Path, *, labels: str = "top5", views: int | None = None, split: str = "train"
) -> int:
    """Write a store's labels as FKD's and MEAL V2's training programs read them, one
    file per image.

    Files that ``out`` holds already are kept. labels: full, top5 or top10. views: the
    number of views, from the first on; None: all. split: the images' folder in the
    label files' paths. Returns the number of files. Raises StoreError for a store that
    FKD's files can't express.
    """
    require_a_name(split)
    require_local(out)
    store, kept = LabelStore.open(path), KINDS[labels]
    views = views or store.views
    _require_exportable(store, labels, views)
    manifest, total = store.images, len(store.usable)
    require_elsewhere("--out", out / split, manifest)
    files = _files(store, split)
    _require_same_export(out, {"store": store.identity.hex(), "labels": labels, "views": views})
    _require_apart(out, files)
    if total < len(manifest):
        say(
            f"{len(manifest) - total} unusable images get no label file, and FKD's loader wants "
            f"one for each image of its folder; take them away for it"
        )
    rows_at_once = max(
        1, AT_ONCE // (4 * store.classes * (views if kept == 0 else 1) + 41 * kept * views)
    )

    def save(row: int, boxes: np.ndarray, flips: np.ndarray, rows: np.ndarray) -> None:
        file = out / files[str(manifest.path[row])]
        content = io.BytesIO()
        fkd_format.write(
            content,
            fkd_format.coords_of(boxes, int(manifest.height[row]), int(manifest.width[row])),
            flips,
            rows,
        )
        durable.replace_file(file, content.getvalue())

    with Progress("exporting", total, "images") as progress, ThreadPoolExecutor(8) as pool:
        for part in _parts(store, rows_at_once):
            for folder in {(out / files[str(image)]).parent for image in manifest.path[part]}:
                folder.mkdir(parents=True, exist_ok=True)
            left = part[[not (out / files[str(image)]).exists() for image in manifest.path[part]]]
            if len(left):
                crops = [store.crops(view, left) for view in range(views)]
                boxes, flips = (np.stack(column, axis=1) for column in zip(*crops, strict=True))
                rows = np.stack(
                    [sparse(store.probabilities(view, left), kept) for view in range(views)],
                    axis=1,
                )
                results: Any = pool.map(save, left, boxes, flips, rows)
                with closing(results) as saved:
                    for _ in saved:
                        check()
            progress.advance(len(part))
    how = f"--soft_label_type {TYPES[labels]} --num_classes {store.classes}"
    say(f"{out} has {total:,} label files of {views} crops ({labels})")
    say(f"FKD's train_FKD.py takes --softlabel_path {shlex.quote(str(out))} {how}")
    place = out.absolute()
    say(
        f"MEAL V2's FKD_train.py looks one folder deeper: it takes --softlabel_path "
        f"{shlex.quote(str(place.parent))} {how}, if {place.name} is the name of its --imagenet "
        f"folder too, without a dot; otherwise rename both alike"
    )
    return total


def _require_exportable(store: LabelStore, labels: str, views: int) -> None:
    """Raises StoreError unless FKD's files can express so many views of a store, and
    these views are finished."""
    if store.provenance["crops"]["exif"] == "apply":
        raise StoreError(
            f"{store.path} has crops of photographs that were turned by their EXIF, and FKD's code "
            f"doesn't turn them; make a store with crops.exif: ignore"
        )
    if store.mixed:
        raise StoreError(
            f"{store.path} holds labels of mixed pictures (CutMix), and FKD's files don't say what "
            f"was mixed; make a store without crops.cutmix"
        )
    if views > store.views:
        raise StoreError(
            f"--views is {views}, and {store.path} has {store.views}; lower it, or extend the store"
        )
    if KINDS[labels] >= store.classes:
        raise StoreError(
            f"{store.path} has {store.classes} classes, no more than {labels} keeps; pass "
            f"--labels full"
        )
    for view in range(views):
        store.require_finished(view)


def _files(store: LabelStore, split: str) -> dict[str, str]:
    """Return the label file of each usable image, by the image's path. Raises
    StoreError for an image that FKD's code wouldn't find."""
    usable = store.images.path[store.usable]
    found = {image: file for file, image in named(usable, split, fkd_format.place_of).items()}
    if len(found) < len(usable):
        other = next(image for image in usable.tolist() if image not in found)
        raise StoreError(
            f"FKD's code takes no {Path(other).suffix or 'file without an ending'} for an image "
            f"({other}); rename or leave out such images"
        )
    return found


def _parts(store: LabelStore, most: int) -> Iterator[np.ndarray]:
    """Yield the usable rows in runs of at most a chunk and at most ``most`` rows."""
    step = max(1, min(most, store.chunk_rows))
    for start in range(0, len(store.images), step):
        rows = np.arange(start, min(start + step, len(store.images)))
        rows = rows[store.images.status[rows] == USABLE]
        if len(rows):
            yield rows


def _require_apart(out: Path, files: dict[str, str]) -> None:
    """Raise StoreError if two label files have one name on a disk that ignores case,
    such as exFAT: one of the files would be taken for the other."""
    if not (out / NOTE.upper()).exists():
        return
    seen: dict[str, str] = {}
    for image, file in files.items():
        if (other := seen.setdefault(file.casefold(), image)) != image:
            raise StoreError(
                f"{out} is on a disk that takes {other} and {image} for one; choose an --out on "
                f"another disk"
            )


def _require_same_export(out: Path, about: dict) -> None:
    """Note in ``out`` which export it holds. Raises StoreError if ``out`` holds
    anything else."""
    note = out / NOTE
    if note.exists():
        try:
            before = json.loads(note.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            before = {}
        if before != about:
            raise StoreError(
                f"{out} holds another export ({note.name} says {before}); choose another --out, or "
                f"remove it"
            )
    elif out.exists() and any(out.iterdir()):
        raise StoreError(f"{out} is not empty; choose another --out")
    else:
        durable.make_folder(out)
        durable.replace_file(note, json.dumps(about).encode())
