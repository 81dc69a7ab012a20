"""Labels from others and to others: published FKD label sets become a store, so that stage one can be skipped, and a store becomes an FKD label set."""

from __future__ import annotations

import hashlib
import io
import json
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache import LabelStore, disk, mend, schema
from cache.codec import CODECS
from cache.schema import UNUSABLE, USABLE, Images, StoreError
from cache.sense import MOST_VIEWS
from cache.stopping import check, finishing
from cache.writer import StoreWriter
from pipeline import fkd, images, provenance, render
from pipeline.fkd import LabelFile, LabelFileError
from pipeline.progress import Progress, say

AT_ONCE = 1 << 30  # bytes of labels that are held at once
SIZE = 224  # pixels at which the fingerprint is rendered where the teachers' size isn't known
TELLING = 64  # label files by whose bytes a label set is known, beside all names and sizes
# What torchvision's ImageFolder, and so FKD's code, takes for images.
LISTED = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
SPLITS = {"train", "val", "test", "validation"}
REFUSED = {
    "tinyvit": "its crops follow from a seed and timm's augmentation code of that day, and its teachers saw RandAugment, erasing and mixing, which a store of "
    "crops can't replay",
    "ml-dr": "its teachers saw RandAugment, random erasing and mixing of pictures, which a store of crops can't replay",
}


def import_labels(
    directory: Path,
    data: Path,
    path: Path,
    *,
    split: str = "train",
    classes: list[str] | None = None,
    teachers: Sequence[str] = (),
    image_size: int | None = None,
    interpolation: str = "bicubic",
    views: int | None = None,
    codec: str = "pow8",
    seed: int = 0,
) -> LabelStore:
    """Make a store of a folder of FKD's label files (fkd.py), or finish or mend the one that is there; several may do so at once.

    directory: holds CLASS/NAME.tar, or one or two folders above that (IMAGENET/TRAIN/CLASS). data: the images that were labelled. Images without a label file
    are unusable. teachers, image_size: what the user knows of who made the labels, which no file says. interpolation: of the crops that were labelled; FKD's
    generator has bicubic. views: the first so many crops, otherwise all; more than the store has extend it. seed: of the row order. Raises MealError for what the user can mend: a damaged
    file, crops that are no whole pixels of these images, labels of another kind or number than the first file's.
    """
    _require_a_name(split)
    folder = images.split_folder(data, split)
    names = classes or images.class_names(folder)
    path = path.absolute()
    with fkd.reading():
        source = _Source(directory, split, folder, names, views)
        about = _about(source, teachers, image_size, interpolation, CODECS[codec].describe(), seed, len(names))
        writer = mend.opened(path, lambda at, least: _create(at, folder, names, source, about, least), say)
        store = writer.store
        if "imported" not in store.provenance:
            raise StoreError(f"{path} holds labels that were made here; choose another --store for imported ones")
        for section, wanted in about.items():
            if difference := schema.first_difference(section, store.provenance[section], wanted):
                where, theirs, ours = difference
                raise StoreError(f"{path} was imported with {where} {theirs}, this is {ours}; pass the same, or choose another --store")
        provenance.require_same_classes(store, classes, "pass that one again, or choose another --store")
        images.require_same_files(folder, store.images, store.class_names, str(path))
        source.show(max(source.views, store.views))
        if writer.uneven or source.views > store.views:
            writer.grow(source.views)
        _fill(writer, source)
        return LabelStore.open(path)


class _Source:
    """A folder of label files, and which of them belong to the images."""

    def __init__(self, directory: Path, split: str, folder: Path, classes: Sequence[str], views: int | None) -> None:
        paths, _, _, _ = images.list_files(folder, classes)
        self.places = _named(paths, split, fkd.generated)
        self.root, self.below = _root_of(directory, split, list(self.places))
        if self.root != directory:
            say(f"label files are looked for in {self.root}")
        self.split, self.files = split, {}
        self.sizes = {image: self._find(image) for image in self.places.values()}
        there = [image for image in sorted(self.files) if self.sizes[image] >= 0]
        if not there:
            raise LabelFileError(
                f"{directory} has no label file for any of the {len(paths):,} images of {folder}, like {fkd.generated(paths[0], split)}; "
                "name the folder that holds the class folders of label files, and the images that were labelled"
            )
        first = fkd.read(self.file(there[0]), len(classes))
        self.kind, self.crops, self.half, self.classes = first.kind, len(first.coords), first.coords.dtype == np.float16, len(classes)
        self.show(views or self.crops)
        digest = hashlib.sha256(json.dumps([[self.files[image], self.sizes[image]] for image in there]).encode())
        for image in there[:TELLING]:
            digest.update(self.file(image).read_bytes())
        self.digest = digest.hexdigest()

    def show(self, views: int) -> None:
        """Take so many crops of each image. Raises LabelFileError if there aren't as many."""
        if views > min(self.crops, MOST_VIEWS):
            raise LabelFileError(
                f"{views} views are wanted, and the label files have {self.crops} crops; lower --views, or leave it out for all"
            )
        self.views = views

    def _find(self, image: str) -> int:
        """Bytes of an image's label file, where the generator puts it or where training looks for it; -1 if there is none."""
        for place in dict.fromkeys((fkd.generated(image, self.split), fkd.place_of(image, self.split))):
            self.files[image] = place.split("/", self.below)[-1]
            if (size := _size(self.file(image))) >= 0:
                return size
        return -1

    def file(self, image: str) -> Path:
        return self.root / self.files[image]

    def read(self, image: str) -> LabelFile:
        """The first ``views`` crops of an image. Raises LabelFileError if they are of another kind or fewer than the first file's."""
        path = self.file(image)
        found = fkd.read(path, self.classes)
        if found.kind != self.kind or len(found.coords) < self.views:
            raise LabelFileError(
                f"{path} has {len(found.coords)} crops with labels of kind {found.kind}, others have {self.crops} of kind {self.kind}; "
                "get it anew, take fewer with --views, or leave its image out: remove the file, and take a new --store"
            )
        return replace(found, coords=found.coords[: self.views], flips=found.flips[: self.views], labels=found.labels[: self.views])


def _root_of(directory: Path, split: str, files: Sequence[str]) -> tuple[Path, int]:
    """The folder below which the label files are, which is ``directory`` or one in it; and 1 if it is the split's folder itself, otherwise 0. That of
    another split isn't: its images may have the same names."""
    if not directory.is_dir():
        raise LabelFileError(f"there is no folder {directory}; name the one that holds the label files")
    below = sorted(entry for entry in directory.iterdir() if entry.is_dir())
    some = files[:: max(1, len(files) // 1000)]
    for root in (directory, *below):
        for skipped in (0,) if root.name in SPLITS - {split} else (0, 1):
            if any((root / file.split("/", skipped)[-1]).is_file() for file in some):
                return root, skipped
    return directory, 0


def _named(paths: np.ndarray, split: str, place: Callable[[str, str], str]) -> dict[str, str]:
    """Label file → its image, of those files that FKD's code takes for images. Raises LabelFileError where two would have the same."""
    taken: dict[str, str] = {}
    for image in paths.tolist():
        if not image.lower().endswith(LISTED):
            continue
        file = place(image, split)
        if file in taken:
            raise LabelFileError(
                f"FKD keeps the labels of {taken[file]} and {image} in one file, {file}, so that those of one are lost; rename or remove one of the images"
            )
        taken[file] = image
    return taken


def _require_a_name(split: str) -> None:
    if not split or "/" in split or split in (".", ".."):
        raise LabelFileError(f"--split is {split!r}; it must be the name of a folder of --data, like train")


def _size(file: Path) -> int:
    try:
        found = file.stat()
    except OSError:
        return -1
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
        raise LabelFileError(f"{file} is no ordinary file; remove it")
    return found.st_size


def _about(
    source: _Source, teachers: Sequence[str], image_size: int | None, interpolation: str, codec: dict, seed: int, classes: int
) -> dict:
    """Provenance as far as known; what isn't is null."""
    one = {
        "weights": None,
        "files": source.digest,
        "classes": classes,
        "image_size": image_size,
        "mean": None,
        "std": None,
        "interpolation": None,
    }
    return {
        "imported": {"format": "fkd", "labels": source.kind, "half_precision": bool(source.half)},
        "teachers": [{"model": name, **one} for name in (teachers or ["unknown"])],
        "crops": {
            "policy": "as imported",
            **dict.fromkeys(("tries", "scale", "ratio", "flip")),
            "seed": seed,
            "interpolation": interpolation,
            "exif": "ignore",
        },
        "renderer": {"backend": "cpu", "steps": render.STEPS},
        "codec": codec,
        "compute": dict.fromkeys(("batch_size", "precision", "device")),
    }


def _create(path: Path, folder: Path, classes: list[str], source: _Source, about: dict, views: int) -> None:
    """Make an empty store, from a look at every image."""
    found = images.scan(folder, classes, exif=about["crops"]["exif"], order_seed=about["crops"]["seed"])
    unlabelled = np.array([source.sizes.get(image, -1) < 0 for image in found.path.tolist()]) & (found.status == USABLE)
    reason = np.where(unlabelled, "no label file", found.reason).astype(object)
    found = replace(found, status=np.where(unlabelled, UNUSABLE, found.status).astype(np.uint8), reason=reason)
    for line in images.unusable_summary(found):
        say(line)
    if len(found.usable) == 0:
        raise StoreError(f"no image of {folder} is usable and has labels; name the images that were labelled")
    chunk_rows, shard_rows = schema.shard_rows_for(len(found), len(classes), np.dtype(about["codec"]["dtype"]).itemsize)
    origin = about | {
        "data": {
            "images": len(found),
            "usable": len(found.usable),
            "manifest": found.manifest_digest(),
            "classes": schema.canonical_digest({"names": classes}).hex(),
        },
        "layout": {"chunk_rows": chunk_rows, "shard_rows": shard_rows},
    }
    rows = render.fingerprint_rows(found)
    boxes, flips = [], []
    for row in rows:
        box, flip, _ = _image(source, found, row)
        boxes.append(box[0])
        flips.append(flip[0])
    sizes = {teacher["image_size"] or SIZE for teacher in about["teachers"]}
    attributes = {
        "codec": about["codec"],
        "class_names": classes,
        "provenance": origin,
        "fingerprint": provenance.fingerprint(folder, found, rows, np.stack(boxes), np.array(flips), sizes, origin, None),
        "made_with": provenance.made_with(),
    }
    with finishing():
        schema.create(path, images=found, views=max(source.views, views), attributes=attributes)
    say(
        f"created {path}: {len(found.usable):,} images × {source.views} views × {len(classes):,} classes, labels {source.kind}"
        + (", in half precision, whose boxes may be a pixel off in images of more than 1,024" if source.half else "")
    )


def _image(source: _Source, manifest: Images, row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes, flips and labels, as they are stored in its file, of an image of the manifest."""
    image = str(manifest.path[row])
    found = source.read(image)
    try:
        return fkd.boxes_of(found.coords, int(manifest.height[row]), int(manifest.width[row])), found.flips, found.labels
    except ValueError as error:
        raise LabelFileError(
            f"{source.file(image)} doesn't fit {image}: {error}; pass the images that were labelled, in their size, or leave this one out: remove the file, and take a new --store"
        ) from None


def _fill(writer: StoreWriter, source: _Source) -> None:
    """Write whatever is missing or damaged, a shard's images read once for as many views as memory has room for; what another import is at is waited for,
    and done here if that one dies."""
    store = writer.store
    usable = store.images.status == USABLE
    total, waited = int(usable.sum()) * store.views, False
    with Progress("importing", total, "crops") as progress, ThreadPoolExecutor(render.threads_for(None)) as pool:
        for shard in range(store.shards):
            writer.discard_damaged(shard, store.views, say)
        while not (finished := store.finished()).all():
            for shard in np.flatnonzero(~finished.all(axis=0)).tolist():
                here = store.shard_slice(shard)
                rows = np.arange(here.start, here.stop)
                good = rows[usable[rows]]
                group = _group(source, store, good)
                for first in range(0, store.views, group):
                    with writer.claimed(list(range(first, min(first + group, store.views))), shard) as missing:
                        if missing:
                            _write(writer, source, shard, missing, good, pool)
                        progress.advance(len(missing) * len(good))
            if not store.finished().all():
                if not waited:
                    say(f"waiting for another import into {store.path}")
                waited = True
                time.sleep(0.5)
                check()
    _, of = store.progress()
    say(f"{store.path} is complete: {of} of {of} shards")


def _group(source: _Source, store: LabelStore, good: np.ndarray) -> int:
    """How many views of a shard's images are held at once."""
    if len(good) == 0:
        return store.views
    one = source.read(str(store.images.path[good[0]]))
    per_view = len(good) * (one.labels[0].nbytes + 32)
    return max(1, min(store.views, AT_ONCE // per_view))


def _write(writer: StoreWriter, source: _Source, shard: int, views: list[int], good: np.ndarray, pool: ThreadPoolExecutor) -> None:
    store = writer.store
    here = store.shard_slice(shard)
    n, at = here.stop - here.start, good - here.start
    boxes, flips = np.zeros((len(views), n, 4), np.int32), np.zeros((len(views), n), bool)
    labels: list[np.ndarray] = []

    def one(row: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        box, flip, label = _image(source, store.images, row)
        return box[views], flip[views], label[views]

    for place, (box, flip, label) in zip(at, pool.map(one, good), strict=True):
        check()
        boxes[:, place], flips[:, place] = box, flip
        labels.append(label)
    for i, view in enumerate(views):
        codes = np.zeros((n, store.codec.columns(store.classes)), store.codec.dtype)
        for start in range(0, len(good), store.chunk_rows):
            part = slice(start, start + store.chunk_rows)
            rows = np.stack([label[i] for label in labels[part]])
            codes[at[part]] = store.codec.encode(_dense(rows, source, store, good[part]))
        writer.write(view, shard, codes, boxes[i], flips[i])


def _dense(labels: np.ndarray, source: _Source, store: LabelStore, rows: np.ndarray) -> np.ndarray:
    try:
        return fkd.dense(labels, source.kind, store.classes)
    except ValueError:
        for label, row in zip(labels, rows, strict=True):  # whose is it?
            try:
                fkd.dense(label[None], source.kind, store.classes)
            except ValueError as error:
                raise LabelFileError(
                    f"{source.file(str(store.images.path[row]))} holds {error}; get it anew from where it came from"
                ) from None
        raise


def export_labels(path: Path, out: Path, *, labels: str = "top5", views: int | None = None, split: str = "train") -> int:
    """Write a store's labels as FKD's training code reads them (``--softlabel_path OUT``), a file an image; or go on with what is there. labels: full, top5
    or top10. views: the first so many; otherwise all. Returns how many files there are. Raises StoreError where FKD can't say what the store says."""
    _require_a_name(split)
    store = LabelStore.open(path)
    if store.provenance["crops"]["exif"] == "apply":
        raise StoreError(
            f"{path} has crops of photographs that were turned by their EXIF, and FKD's code doesn't turn them; make a store with crops.exif: ignore"
        )
    if store.mixed:
        raise StoreError(
            f"{path} holds labels of mixed pictures (CutMix), and FKD's files don't say what was mixed; make a store without crops.cutmix"
        )
    views, kept = views or store.views, fkd.KINDS[labels]
    if views > store.views:
        raise StoreError(f"--views is {views}, and {path} has {store.views}; lower it, or extend the store")
    if kept >= store.classes:
        raise StoreError(f"{path} has {store.classes} classes, no more than {labels} keeps; pass --labels full")
    for view in range(views):
        store.require_finished(view)
    manifest, total = store.images, len(store.usable)
    files = {image: file for file, image in _named(manifest.path[store.usable], split, fkd.place_of).items()}
    if len(files) < total:
        other = next(image for image in manifest.path[store.usable].tolist() if image not in files)
        raise StoreError(
            f"FKD's code takes no {Path(other).suffix or 'file without an ending'} for an image ({other}); rename or leave out such images"
        )
    _require_same_export(out, {"store": store.identity.hex(), "labels": labels, "views": views})
    if total < len(manifest):
        say(
            f"{len(manifest) - total} unusable images get no label file, and FKD's loader wants one for each image of its folder; take them away for it"
        )
    rows_at_once = max(1, AT_ONCE // (4 * store.classes * (views if kept == 0 else 1) + 41 * kept * views))

    def save(row: int, boxes: np.ndarray, flips: np.ndarray, rows: np.ndarray) -> None:
        file = out / files[str(manifest.path[row])]
        content = io.BytesIO()
        fkd.write(content, fkd.coords_of(boxes, int(manifest.height[row]), int(manifest.width[row])), flips, rows)
        disk.replace_file(file, content.getvalue())

    with Progress("exporting", total, "images") as progress, ThreadPoolExecutor(8) as pool:
        for part in _parts(store, rows_at_once):
            for folder in {(out / files[str(image)]).parent for image in manifest.path[part]}:
                folder.mkdir(parents=True, exist_ok=True)
            left = part[[not (out / files[str(image)]).exists() for image in manifest.path[part]]]
            if len(left):
                crops = [store.crops(view, left) for view in range(views)]
                boxes, flips = (np.stack(column, axis=1) for column in zip(*crops, strict=True))
                rows = np.stack([fkd.sparse(store.probabilities(view, left), kept) for view in range(views)], axis=1)
                with closing(pool.map(save, left, boxes, flips, rows)) as saved:
                    for _ in saved:
                        check()
            progress.advance(len(part))
    say(f"{out} has {total:,} label files of {views} crops ({labels}); train FKD's code with --softlabel_path {out}")
    return total


def _parts(store: LabelStore, most: int) -> Iterator[np.ndarray]:
    """Usable rows, in runs of the store's chunks."""
    step = max(1, min(most, store.chunk_rows))
    for start in range(0, len(store.images), step):
        rows = np.arange(start, min(start + step, len(store.images)))
        rows = rows[store.images.status[rows] == USABLE]
        if len(rows):
            yield rows


def _require_same_export(out: Path, about: dict) -> None:
    """Note in ``out`` what is exported there. Raises StoreError if something else is there."""
    note = out / "exported-from.json"
    if note.exists():
        try:
            before = json.loads(note.read_text())
        except (OSError, ValueError):
            before = {}
        if before != about:
            raise StoreError(f"{out} holds another export ({note.name} says {before}); choose another --out, or remove it")
    elif out.exists() and any(out.iterdir()):
        raise StoreError(f"{out} is not empty; choose another --out")
    else:
        disk.make_folder(out)
        disk.replace_file(note, json.dumps(about).encode())
