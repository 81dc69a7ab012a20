"""Import published FKD label sets into a store, so that stage one can be skipped."""

from __future__ import annotations

import hashlib
import json
import stat
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from cache import LabelStore, repair
from cache.create import create
from cache.errors import BusyStore, StoreError
from cache.format import schema
from cache.format.codec import CODECS
from cache.format.crops import Crops
from cache.format.manifest import UNUSABLE, USABLE, Images
from cache.format.validate import MOST_VIEWS
from cache.system.local import require_local
from cache.system.signals import check, finishing
from cache.writer import StoreWriter
from pipeline.exchange import fkd_format
from pipeline.exchange.fkd_format import SPLITS, LabelFile, LabelFileError, named, require_a_name
from pipeline.images.folders import DataFolder
from pipeline.images.layout import require_class_folders, require_no_split, require_outside
from pipeline.images.listing import has_system_files, list_files, require_same_files
from pipeline.images.names import as_text, is_hidden, is_system_folder
from pipeline.images.patience import is_file, is_folder, is_there, listed, read_file, status
from pipeline.images.scan import scan, unusable_summary
from pipeline.images.scan_cache import Scanned
from pipeline.provenance.description import describe_store
from pipeline.provenance.fingerprint import fingerprint_rows
from pipeline.provenance.refusals import require_same_classes
from pipeline.render.renderer import record
from pipeline.render.settings import RenderSettings, resize_of
from pipeline.runtime import threads
from pipeline.runtime.progress import Progress, say
from pipeline.runtime.wording import counted, same, some

SEED = 0  # seed of the row order
AT_ONCE = 1 << 30  # bytes of labels that are held at once
SIZE = 224  # pixels of the fingerprint's crops if the teachers' size isn't known
TELLING = 64  # label files whose bytes identify a label set, beside all names and sizes


REFUSED = {
    "tinyvit": "its crops follow from a seed and timm's augmentation code of that day, and its "
    "teachers saw RandAugment, erasing and mixing, which a store of "
    "crops can't replay",
    "ml-dr": "its teachers saw RandAugment, random erasing and mixing of pictures, which a store "
    "of crops can't replay",
}


@dataclass(frozen=True)
class Known:
    """The facts about published labels that a user knows and no label file holds.

    teachers: names of the models that made the labels. image_size: the teachers' input
    size, in pixels. interpolation: interpolation of the labelled crops; FKD's generator
    has bicubic.
    """

    teachers: Sequence[str] = ()
    image_size: int | None = None
    interpolation: str = "bicubic"


def import_labels(
    directory: Path,
    data: DataFolder,
    path: Path,
    *,
    split: str = "train",
    known: Known = Known(),
    views: int | None = None,
    codec: str = "pow8",
) -> LabelStore:
    """Make a store from a folder of FKD's label files (fkd_format.py), or finish,
    extend or mend the store that is there. Several processes may do so at once.

    directory: the folder that holds CLASS/NAME.tar, or a folder one or two levels above
    (IMAGENET/TRAIN/CLASS). data: the images that were labelled; images without a label
    file are unusable. split: the images' folder in the label files' paths. views: the
    number of crops of each image, from the first on; None: all. More views than the
    store has extend the store. Raises MealError for every error that the user can fix:
    a damaged file, crops that are no whole pixels of these images, labels of another
    kind or number than the first file's.
    """
    require_a_name(split)
    require_local(directory, data.path, path)
    require_outside("--store", path, [data.path])
    require_no_split("--store", path, data)
    path = path.absolute()
    if not path.exists():
        require_class_folders(data)
    with fkd_format.reading():
        source = _Source(directory, split, data, views)
        if not path.exists() and not data.mapped:
            _require_labelled_classes(source, data)
        about = _about(source, known, CODECS[codec].describe())
        before = Scanned.beside(path)
        writer = _opened(path, data, source, about, before)
        before.drop_part()
        store = writer.store
        if "imported" not in store.provenance:
            raise StoreError(
                f"{path} holds labels that were made here; choose another --store for imported ones"
            )
        about["renderer"] = record(RenderSettings(resize=resize_of(store.provenance)))
        for section, wanted in about.items():
            if difference := schema.first_difference(section, store.provenance[section], wanted):
                where, theirs, ours = difference
                raise StoreError(
                    f"{path} was imported with {where} {theirs}, this is {ours}; pass the same, or "
                    f"choose another --store"
                )
        require_same_classes(store, data, "pass that one again, or choose another --store")
        require_same_files(DataFolder(data.path, store.class_names), store.images, str(path))
        source.show(max(source.views, store.views))
        if writer.uneven or source.views > store.views:
            writer.grow(source.views)
        _fill(writer, source)
        return LabelStore.open(path)


class _Source:
    """The label files of a folder that belong to the images."""

    def __init__(self, directory: Path, split: str, data: DataFolder, views: int | None) -> None:
        classes = len(data.class_names)
        paths, _, _, _ = list_files(data)
        self.places = named(paths, split, fkd_format.generated)
        self.root, self.below = _root_of(directory, split, list(self.places))
        if self.root != directory:
            say(f"label files are looked for in {self.root}")
        self.split = split
        self.files: dict[str, str] = {}
        self.sizes = {image: self._find(image) for image in self.places.values()}
        there = [image for image in sorted(self.files) if self.sizes[image] >= 0]
        if not there:
            raise LabelFileError(
                f"{directory} has no label file for any of the {len(paths):,} images of "
                f"{data.path}, like {fkd_format.generated(paths[0], split)}; "
                "name the folder that holds the class folders of label files, and the images that "
                "were labelled"
            )
        first = fkd_format.read(self.file(there[0]), classes)
        self.kind, self.crops, self.half, self.classes = (
            first.kind,
            len(first.coords),
            first.coords.dtype == np.float16,
            classes,
        )
        self.show(views or self.crops)
        digest = hashlib.sha256(
            json.dumps([[self.files[image], self.sizes[image]] for image in there]).encode()
        )
        for image in there[:TELLING]:
            digest.update(read_file(self.file(image)))
        self.digest = digest.hexdigest()

    def show(self, views: int) -> None:
        """Use the first ``views`` crops of each image. Raises LabelFileError if there
        are fewer crops."""
        if views > min(self.crops, MOST_VIEWS):
            raise LabelFileError(
                f"{views} views are wanted, and the label files have {self.crops} crops; lower "
                f"--views, or leave it out for all"
            )
        self.views = views

    def _find(self, image: str) -> int:
        """Find an image's label file, and return its size in bytes; -1 if there is
        none.

        The file is where FKD's generator puts it, or where FKD's training code looks
        for it.
        """
        for place in dict.fromkeys(
            (fkd_format.generated(image, self.split), fkd_format.place_of(image, self.split))
        ):
            self.files[image] = place.split("/", self.below)[-1]
            if (size := _size(self.file(image))) >= 0:
                return size
        return -1

    def file(self, image: str) -> Path:
        """Return the path of an image's label file."""
        return self.root / self.files[image]

    def read(self, image: str) -> LabelFile:
        """Read the first ``views`` crops of an image. Raises LabelFileError for fewer
        crops, or for labels of another kind than the first file's."""
        path = self.file(image)
        found = fkd_format.read(path, self.classes)
        if found.kind != self.kind or len(found.coords) < self.views:
            raise LabelFileError(
                f"{path} has {len(found.coords)} crops with labels of kind {found.kind}, others "
                f"have {self.crops} of kind {self.kind}; get it anew, take fewer with --views, or "
                "leave its image out: remove the file, and take a new --store"
            )
        return replace(
            found,
            coords=found.coords[: self.views],
            flips=found.flips[: self.views],
            labels=found.labels[: self.views],
        )


def _root_of(directory: Path, split: str, files: Sequence[str]) -> tuple[Path, int]:
    """Find the folder that holds the label files: ``directory``, or a folder in it.

    Returns the folder, and 1 if the folder is the split's own, otherwise 0. A folder
    named after another split is never taken for the split's own, since the images of
    both may have the same names.
    """
    if not directory.is_dir():
        raise LabelFileError(
            f"there is no folder {directory}; name the one that holds the label files"
        )
    below = sorted(entry for entry in directory.iterdir() if entry.is_dir())
    some = files[:: max(1, len(files) // 1000)]
    for root in (directory, *below):
        for skipped in (0,) if root.name in SPLITS - {split} else (0, 1):
            if any(is_file(root / file.split("/", skipped)[-1]) for file in some):
                return root, skipped
    return directory, 0


def _require_labelled_classes(source: _Source, data: DataFolder) -> None:
    """Raise LabelFileError if the label files have folders of classes that the images
    lack. Labels know their classes by number, so every number would mean another
    class."""
    folder = source.root if source.below else source.root / source.split
    if not is_there(folder):  # the label files lie as FKD's training code looks for them
        folder = source.root
    found = [source.files[image] for image, size in source.sizes.items() if size >= 0]
    used = {file.removeprefix(f"{source.split}/").partition("/")[0] for file in found}
    known = {same(name) for name in (*data.class_names, *used)}
    names = sorted(
        as_text(entry.name)
        for entry in listed(folder)
        if not (is_hidden(entry.name) or is_system_folder(entry.name)) and is_folder(entry)
    )
    if foreign := [n for n in names if same(n) not in known and n not in SPLITS]:
        raise LabelFileError(
            f"{folder} has label files of {counted(len(foreign), 'class', 'classes')} "
            f"({some(foreign)}) that {data.path} has no folder of, so the numbers of classes would "
            f"shift; pass all class folders' names, in the labels' order, as a --class-map"
        )


def _size(file: Path) -> int:
    """Return a label file's size in bytes; -1 if there is none. Raises DataError if the
    disk doesn't tell now: an image without labels is left out for ever."""
    found = status(file)
    if found is None:
        return -1
    if not stat.S_ISREG(found.st_mode):  # reading a pipe would wait for ever
        raise LabelFileError(f"{file} is no ordinary file; remove it")
    return found.st_size


def _resizes_of(path: Path) -> list[str]:
    """Return who resizes a store's crops: as the store was begun, as far as its
    description can be read; otherwise the possible ones, the likely one first."""
    attributes, _ = repair.attributes_of(path)
    if attributes:
        return [resize_of(attributes["provenance"])]
    return ["pillow", "dali"] if path.exists() else ["pillow"]


def _about(source: _Source, known: Known, codec: dict) -> dict:
    """Assemble the provenance of imported labels. Unknown values are null."""
    one = {
        "weights": None,
        "files": source.digest,
        "classes": source.classes,
        "image_size": known.image_size,
        "mean": None,
        "std": None,
        "interpolation": None,
    }
    return {
        "imported": {"format": "fkd", "labels": source.kind, "half_precision": bool(source.half)},
        "teachers": [{"model": name, **one} for name in (known.teachers or ["unknown"])],
        "crops": {
            "policy": "as imported",
            **dict.fromkeys(("tries", "scale", "ratio", "flip")),
            "seed": SEED,
            "interpolation": known.interpolation,
            "exif": "ignore",
        },
        "renderer": record(RenderSettings()),
        "codec": codec,
        "compute": dict.fromkeys(("batch_size", "precision", "device")),
    }


def _opened(
    path: Path, data: DataFolder, source: _Source, about: dict, before: Scanned
) -> StoreWriter:
    """Open the store, create it, or rebuild its description."""
    tries = [(every, resize) for every in (False, True) for resize in _resizes_of(path)]
    for every, resize in tries:

        def make(at: Path, views: int, every: bool = every, resize: str = resize) -> None:
            settings = RenderSettings(interpolation=about["crops"]["interpolation"], resize=resize)
            found = scan(
                replace(data, mapped=True),  # looked at before, unless a store is mended
                settings,
                order_seed=SEED,
                before=before,
                every=every,
            )
            origin = about | {"renderer": record(settings)}
            _create(at, data, source, origin, found, max(source.views, views))

        try:
            return repair.opened(path, make, say)
        except BusyStore:
            raise
        except StoreError:
            left = tries[tries.index((every, resize)) + 1 :]
            if not path.exists() or not left or (left[0][0] and not has_system_files(data)):
                raise
    raise AssertionError


def _create(
    path: Path, data: DataFolder, source: _Source, about: dict, found: Images, views: int
) -> None:
    """Create an empty store of the images that a scan found, in which images without a
    label file are unusable."""
    unlabelled = np.array([source.sizes.get(image, -1) < 0 for image in found.path.tolist()]) & (
        found.status == USABLE
    )
    reason = np.where(unlabelled, "no label file", found.reason).astype(object)
    found = replace(
        found, status=np.where(unlabelled, UNUSABLE, found.status).astype(np.uint8), reason=reason
    )
    for line in unusable_summary(found):
        say(line)
    if len(found.usable) == 0:
        raise StoreError(
            f"no image of {data.path} is usable and has labels; name the images that were labelled"
        )
    layout = schema.shard_rows_for(
        len(found), source.classes, np.dtype(about["codec"]["dtype"]).itemsize
    )
    images = [_image(source, found, row) for row in fingerprint_rows(found)]
    first = Crops(
        np.stack([boxes[0] for boxes, _, _ in images]),
        np.array([flips[0] for _, flips, _ in images]),
    )
    sizes = {teacher["image_size"] or SIZE for teacher in about["teachers"]}
    attributes = describe_store(data, found, about, layout, first, sizes)
    with finishing():
        create(path, images=found, views=views, attributes=attributes)
    say(
        f"created {path}: {len(found.usable):,} images × {source.views} views × {source.classes:,} "
        f"classes, labels {source.kind}"
        + (
            ", in half precision, whose boxes may be a pixel off in images of more than 1,024"
            if source.half
            else ""
        )
    )


def _image(
    source: _Source, manifest: Images, row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the label file of an image of the manifest. Returns boxes, flips, and labels
    as the file stores them."""
    image = str(manifest.path[row])
    found = source.read(image)
    try:
        return (
            fkd_format.boxes_of(found.coords, int(manifest.height[row]), int(manifest.width[row])),
            found.flips,
            found.labels,
        )
    except ValueError as error:
        raise LabelFileError(
            f"{source.file(image)} doesn't fit {image}: {error}; pass the images that were "
            f"labelled, in their size, or leave this one out: remove the file, and take a new "
            f"--store"
        ) from None


def _fill(writer: StoreWriter, source: _Source) -> None:
    """Write every missing or damaged shard.

    The label files of a shard are read once for as many views as memory has room for. A
    shard that another import holds is waited for, and written here if that import dies.
    """
    store = writer.store
    usable = store.images.status == USABLE
    total, waited = int(usable.sum()) * store.views, False
    with (
        Progress("importing", total, "crops") as progress,
        ThreadPoolExecutor(threads.threads_for(None)) as pool,
    ):
        for shard in range(store.shards):
            writer.discard_damaged(shard, store.views, say)
        while not (finished := store.finished()).all():
            for shard in np.flatnonzero(~finished.all(axis=0)).tolist():
                here = store.shard_slice(shard)
                rows = np.arange(here.start, here.stop)
                good = rows[usable[rows]]
                group = _group(source, store, good)
                for first in range(0, store.views, group):
                    with writer.claimed(
                        list(range(first, min(first + group, store.views))), shard
                    ) as missing:
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
    """Return how many views of a shard's images are held in memory at once."""
    if len(good) == 0:
        return store.views
    one = source.read(str(store.images.path[good[0]]))
    per_view = len(good) * (one.labels[0].nbytes + 32)
    return max(1, min(store.views, AT_ONCE // per_view))


def _write(
    writer: StoreWriter,
    source: _Source,
    shard: int,
    views: list[int],
    good: np.ndarray,
    pool: ThreadPoolExecutor,
) -> None:
    """Write some views of a shard."""
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
        writer.write(view, shard, codes, Crops(boxes[i], flips[i]))


def _dense(labels: np.ndarray, source: _Source, store: LabelStore, rows: np.ndarray) -> np.ndarray:
    """Expand labels to probabilities. Raises LabelFileError with the name of the file
    whose labels are no probabilities."""
    try:
        return fkd_format.dense(labels, source.kind, store.classes)
    except ValueError:
        for label, row in zip(labels, rows, strict=True):  # find the file
            try:
                fkd_format.dense(label[None], source.kind, store.classes)
            except ValueError as error:
                raise LabelFileError(
                    f"{source.file(str(store.images.path[row]))} holds {error}; get it anew from "
                    f"where it came from"
                ) from None
        raise
