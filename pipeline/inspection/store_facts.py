"""Collect the known facts of a store, and of one image in it."""

from __future__ import annotations

import difflib
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cache import LabelStore
from cache.errors import StoreError
from cache.format.codec import entropy
from cache.format.manifest import USABLE
from cache.format.schema import LOOKS, RECORD_MAGIC


def stored_bytes(path: Path) -> int:
    """Add up the bytes of all files of a store."""
    total, folders = 0, [str(path)]
    with ThreadPoolExecutor(LOOKS) as pool:
        while folders:  # one level of folders at a time
            found = list(pool.map(_look, (folders[i::LOOKS] for i in range(LOOKS))))
            total += sum(size for size, _ in found)
            folders = [folder for _, below in found for folder in below]
    return total


def _look(folders: list[str]) -> tuple[int, list[str]]:
    """Return the bytes of the files in these folders, and the folders in them."""
    size, below = 0, []
    for folder in folders:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    below.append(entry.path)
                else:
                    with suppress(FileNotFoundError):  # a writer has just renamed the file
                        size += entry.stat().st_size
    return size, below


NAMES = 5000  # paths searched for the closest name, at most


PROVENANCE = ("teachers", "crops", "renderer", "compute", "data", "layout")


@dataclass(frozen=True)
class StoreFacts:
    """The facts of a store. Lists and dicts are as the store's attributes have them."""

    store: str
    format_version: int
    images: int
    usable: int
    unusable: list[dict]  # kinds of unusable files
    classes: int
    views: int
    complete_views: int
    finished_shards: int
    shards: int
    complete: bool
    labelled_crops: int
    label_bytes_per_crop: float | None
    store_bytes: int
    entropy: float | None  # mean of the labels, nats
    agreement: float | None  # % of the labels whose top-1 class is the class folder
    codec: dict
    teachers: list[dict]
    crops: dict
    renderer: dict
    compute: dict
    data: dict
    layout: dict
    merged: list[dict]
    imported: dict | None
    made_by: str
    made_with: dict
    identity: str


def store_facts(path: Path) -> StoreFacts:
    """Collect everything that ``inspect`` prints, from attributes, manifest and
    completion records. No label is read, however large the store is."""
    store = LabelStore.open(path)
    records = store.finished_records()
    finished = records["magic"] == RECORD_MAGIC
    status = store.images.status
    unusable = np.flatnonzero(status != USABLE)
    labelled = int(records["labelled"].sum())
    classified = bool((store.images.class_index >= 0).all())
    kl, tv = store.max_error
    label_bytes = int(records["stored_bytes"].sum())
    if "tail" in store.shard_arrays:
        label_bytes += sum(
            store.size("tail", int(view), int(shard)) for view, shard in np.argwhere(finished)
        )
    return StoreFacts(
        store=str(path),
        format_version=store.attributes["format_version"],
        images=len(status),
        usable=int((status == USABLE).sum()),
        unusable=_reasons(store, unusable),
        classes=store.classes,
        views=store.views,
        complete_views=int(finished.all(axis=1).sum()),
        finished_shards=int(finished.sum()),
        shards=finished.size,
        complete=bool(finished.all()),
        labelled_crops=labelled,
        label_bytes_per_crop=label_bytes / labelled if labelled else None,
        store_bytes=stored_bytes(path),
        entropy=float(records["entropy"].sum() / labelled) if labelled else None,
        agreement=float(100 * records["agreeing"].sum() / labelled)
        if labelled and classified
        else None,
        codec=store.attributes["codec"] | {"largest_kl": kl, "largest_tv": tv},
        **{key: store.provenance[key] for key in PROVENANCE},
        merged=store.provenance.get("merged", []),
        imported=store.provenance.get("imported"),
        made_by=store.made_by,
        made_with=store.attributes.get("made_with", {}),
        identity=store.identity.hex(),
    )


def _reasons(store: LabelStore, rows: np.ndarray) -> list[dict]:
    """Count unusable files by kind of reason, with one example of each."""
    if len(rows) == 0:
        return []
    reasons, paths = store.images.reason, store.images.path
    kinds = Counter(str(reasons[row]).split(":")[0] for row in rows)
    example = {str(reasons[row]).split(":")[0]: str(paths[row]) for row in rows[::-1]}
    return [
        {"reason": kind, "files": count, "example": example[kind]}
        for kind, count in kinds.most_common()
    ]


def store_lines(facts: StoreFacts) -> list[tuple[str, str]]:
    """Put the facts of ``store_facts`` into words: lines of (name, text). A line whose
    name is empty continues the line above."""
    state = "complete"
    if not facts.complete:
        state = f"NOT COMPLETE: run the same {facts.made_by} command again"
    shards = f"{facts.finished_shards} of {facts.shards} shards"
    views = f"{facts.complete_views} of {facts.views} views"
    versions = dict(facts.made_with)
    source = versions.pop("images", "")
    images = f"{facts.usable:,} usable of {facts.images:,} files, {facts.classes:,} classes"
    images += f", from {source}" if source else ""
    made_with = ", ".join(f"{name} {version}" for name, version in versions.items())
    return [
        ("store", facts.store),
        ("state", f"{state} ({shards}, {views})"),
        ("images", images),
        *(
            ("", f"{kind['files']:,} left out: {kind['reason']} ({kind['example']})")
            for kind in facts.unusable
        ),
        *(("" if i else "teachers", _teacher(teacher)) for i, teacher in enumerate(facts.teachers)),
        *_import_lines(facts),
        *_crop_lines(facts),
        *_label_lines(facts),
        ("made with", made_with),
        ("identity", facts.identity),
    ]


def _import_lines(facts: StoreFacts) -> list[tuple[str, str]]:
    if not facts.imported:
        return []
    parts = [part["imported"] for part in facts.merged if "imported" in part]
    kinds = [
        one["labels"] + (" in half precision" if one.get("half_precision") else "")
        for one in parts or [facts.imported]
    ]
    told = (
        f"{facts.imported['format']} label files, {', '.join(dict.fromkeys(kinds))}; the "
        "teachers are named as the user or the files told"
    )
    scaled = all(teacher.get("mean") for teacher in facts.teachers)
    unknown = (
        f"UNKNOWN: weights{'' if scaled else ', normalisation'} and precision of the teachers, "
        "how crops were drawn; pixels were rendered by other code"
    )
    return [("imported", told), ("", unknown)]


def _crop_lines(facts: StoreFacts) -> list[tuple[str, str]]:
    crops, drawn = facts.crops, ""
    if crops["scale"] is not None:
        drawn = (
            f"area {crops['scale'][0]:g} to {crops['scale'][1]:g}, ratio {crops['ratio'][0]:.3g} "
            f"to {crops['ratio'][1]:.3g}, flip {crops['flip']:g}, seed {crops['seed']}, "
        )
    views = f"{facts.views} views of {crops['policy']}"
    lines = [("crops", f"{views}, {drawn}{crops['interpolation']}, EXIF {crops['exif']}")]
    if mix := crops.get("cutmix"):
        share = f"on {100 * mix['prob']:g} % of the crops, Beta({mix['beta']:g}, {mix['beta']:g})"
        lines.append(("CutMix", f"{share}; the teachers saw the mixed pictures"))
    return lines


def _label_lines(facts: StoreFacts) -> list[tuple[str, str]]:
    codec, compute = facts.codec, facts.compute
    kl = "" if codec["largest_kl"] is None else f"KL {codec['largest_kl']:.2g}, "
    most = f"no label is off by more than {kl}TV {codec['largest_tv']:.2g}"
    lines = [("codec", f"{codec['name']} ({codec['dtype']}); {most}")]
    if parts := facts.merged:
        teachers = ", ".join(str(part["teachers"]) for part in parts)
        lines.append(("averaged", f"of {len(parts)} stores, of {teachers} teachers"))
    if facts.labelled_crops:
        whole = f"{facts.store_bytes / 2**20:,.1f} MiB in all"
        lines.append(("size", f"{facts.label_bytes_per_crop:.0f} bytes per crop, {whole}"))
        lines.append(("entropy", f"{facts.entropy:.3f} nats on average"))
    if facts.labelled_crops and facts.agreement is not None:
        agreement = f"{facts.agreement:.2f} % of the labels put the class folder first"
        lines.append(("agreement", agreement))
    if not facts.imported:
        how = f"{compute['precision']}, batches of {compute['batch_size']}"
        backend = facts.renderer["backend"]
        resized = "as Pillow does" if facts.renderer.get("resize") == "pillow" else "by DALI"
        rendered = f"rendered on {backend}, resized {resized}"
        lines.append(("made on", f"{compute['device']}, {how}, {rendered}"))
    return lines


def _teacher(teacher: dict) -> str:
    size = f"{teacher['image_size']} px" if teacher["image_size"] else "an unknown size"
    entry = f" ({teacher['entry']})" if "entry" in teacher else ""
    return f"{teacher['model']} at {size}, " + (
        f"weights {teacher['weights'][:12]}{entry}" if teacher["weights"] else "weights unknown"
    )


def image_facts(path: Path, name: str) -> dict:
    """Collect the facts of one image and of its finished views, each with crop and
    label. name: the image's path in the store, or the end of the path. Raises
    StoreError if no image, or several, have the name."""
    from pipeline.models.names import class_titles  # imports timm, which takes seconds

    store = LabelStore.open(path)
    row = _row_of(store, name)
    images, titles = store.images, class_titles(store.class_names)
    usable, own = bool(images.status[row] == USABLE), int(images.class_index[row])
    views = np.flatnonzero(store.finished()[:, row // store.shard_rows]).tolist() if usable else []
    return {
        "store": str(path),
        "path": str(images.path[row]),
        "row": row,
        "class": store.class_names[own] if own >= 0 else None,
        "title": titles[own] if own >= 0 else None,
        "bytes": int(images.bytes[row]),
        "height": int(images.height[row]),
        "width": int(images.width[row]),
        "sha256": images.digest[row].tobytes().hex(),
        "unusable": None if usable else str(images.reason[row]),
        "views": [_view_facts(store, view, row, titles) for view in views],
    }


def _view_facts(store: LabelStore, view: int, row: int, titles: list[str]) -> dict:
    if fault := store.fault(view, row // store.shard_rows):
        return {"view": view, "fault": fault}
    p = store.probabilities(view, [row])[0]
    box, flip = (column[0] for column in store.crops(view, [row]))
    partner = int(store.mixes(view, [row])[0][0]) if store.mixed else -1
    return {
        "view": view,
        "box": box.tolist(),  # top, left, height, width in pixels
        "flip": bool(flip),
        "pasted": str(store.images.path[partner]) if partner >= 0 else None,
        "entropy": float(entropy(p[None])[0]),
        "folder_probability": float(p[store.images.class_index[row]])
        if store.images.class_index[row] >= 0
        else None,
        "top5": [
            {"class": store.class_names[c], "title": titles[c], "probability": float(p[c])}
            for c in p.argsort()[::-1][:5].tolist()
        ],
    }


def _row_of(store: LabelStore, name: str) -> int:
    paths = store.images.path.tolist()
    if name in paths:
        return paths.index(name)
    tail = "/" + name.replace("\\", "/").lstrip("/")
    # An absolute path ends with the path in the store.
    found = [
        row for row, path in enumerate(paths) if path.endswith(name) or tail.endswith("/" + path)
    ]
    if len(found) == 1:
        return found[0]
    if found:
        raise StoreError(
            f"{len(found)} images of {store.path} end in {name}, like {paths[found[0]]} and "
            f"{paths[found[1]]}; name more of the path"
        )
    near = (
        [path for path in paths if path.startswith(name.rpartition("/")[0])]
        if len(paths) > NAMES
        else paths
    )
    close = difflib.get_close_matches(name, near[:NAMES], 1, 0.5)
    raise StoreError(
        f"{store.path} has no image {name}"
        + (f"; did you mean {close[0]}?" if close else f"; its paths look like {paths[0]}")
    )
