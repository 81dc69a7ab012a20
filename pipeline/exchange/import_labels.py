"""Import label sets of FKD and of ml-dr into a store, in place of stage one."""

from __future__ import annotations

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
from cache.system.local import require_local
from cache.system.signals import check, finishing
from cache.writer import StoreWriter
from pipeline.exchange import fkd_format
from pipeline.exchange.fkd_format import require_a_name
from pipeline.exchange.fkd_labels import FkdLabels
from pipeline.exchange.label_files import LabelFileError
from pipeline.exchange.label_set import LabelSet
from pipeline.exchange.ml_dr_labels import MlDrLabels
from pipeline.images.data_set import DataSet
from pipeline.images.matching import has_system_files, require_same_files
from pipeline.images.result_places import require_no_split, require_outside
from pipeline.images.scan import scan, unusable_summary
from pipeline.images.scan_cache import Scanned
from pipeline.provenance.description import describe_store
from pipeline.provenance.fingerprint import fingerprint_rows
from pipeline.provenance.refusals import require_same_classes
from pipeline.render.renderer import record
from pipeline.render.settings import RenderSettings, resize_of
from pipeline.runtime import threads
from pipeline.runtime.progress import Progress, say

SEED = 0  # seed of the row order
AT_ONCE = 1 << 30  # bytes of labels that are held at once
SIZE = 224  # pixels of the fingerprint's crops if the teachers' size isn't known
FORMATS = ("fkd", "ml-dr")
REFUSED = {
    "tinyvit": "its teachers saw pictures after RandAugment and random erasing, which a store of "
    "crops can't replay",
}


@dataclass(frozen=True)
class Known:
    """The facts about published labels that a user knows and no label file holds.

    form: format of the files, one of FORMATS. teachers: names of the
    models that made the labels. image_size: the teachers' input size, in pixels.
    interpolation: interpolation of the labelled crops; None: that of the format's own
    generator. rest: what a top-k label says of the other classes, "even" (they share
    the remaining probability evenly) or "none" (they have none, and the named classes'
    probabilities are scaled to sum to one).
    """

    teachers: Sequence[str] = ()
    image_size: int | None = None
    interpolation: str | None = None
    rest: str = "even"
    form: str = "fkd"


def import_labels(
    directory: Path,
    data: DataSet,
    path: Path,
    *,
    split: str = "train",
    known: Known = Known(),
    views: int | None = None,
    codec: str = "pow8",
) -> LabelStore:
    """Make a store from a folder of label files, or finish, extend or mend the store
    that is there. Several processes may do so at once.

    directory: the folder that holds the files; for fkd the folder of CLASS/NAME.tar, or
    a folder one or two levels above (IMAGENET/TRAIN/CLASS). data: the images that were
    labelled; images without a label file are unusable. split: the images' folder in
    FKD's label files' paths. views: the number of crops of each image, from the first
    on; None: all. More views than the store has extend the store. Raises MealError for
    every error that the user can fix: a damaged file, crops that are no whole pixels of
    these images, labels of another kind or number than the first file's.
    """
    require_a_name(split)
    require_local(directory, path)
    require_outside("--store", path, data)
    require_no_split("--store", path, data)
    path = path.absolute()
    if not path.exists():
        data.require_sound()
    with fkd_format.reading():
        source: LabelSet = (
            MlDrLabels(directory, data, views, known.rest)
            if known.form == "ml-dr"
            else FkdLabels(directory, split, data, views, known.rest)
        )
        if not path.exists():
            if not data.mapped:
                source.require_classes(data)
            say(_introduction(source))
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
        require_same_files(data.named(store.class_names), store.images, str(path))
        source.show(max(source.views, store.views))
        if writer.uneven or source.views > store.views:
            writer.grow(source.views)
        _fill(writer, source)
        return LabelStore.open(path)


def _resizes_of(path: Path) -> list[str]:
    """Return who resizes a store's crops: as the store was begun, as far as its
    description can be read; otherwise the possible ones, the likely one first."""
    attributes, _ = repair.attributes_of(path)
    if attributes:
        return [resize_of(attributes["provenance"])]
    return ["pillow", "dali"] if path.exists() else ["pillow"]


def _introduction(source: LabelSet) -> str:
    """Say which labels were found, and what is assumed of them."""
    line = f"{source.crops} crops an image, labels of kind {source.kind}"
    if source.kind.startswith("marginal_renorm"):
        return f"{line}: the named classes alone have a probability"
    if source.kind in ("full", "hard"):
        return line
    line += ": the other classes share the rest evenly"
    if source.format != "fkd":
        return line
    return (
        f"{line} (no file tells; if these are labels of FKD's type marginal_renorm, pass "
        f"--rest none)"
    )


def _about(source: LabelSet, known: Known, codec: dict) -> dict:
    """Assemble the provenance of imported labels. Unknown values are null."""
    one = {
        "weights": None,
        "files": source.digest,
        "classes": source.classes,
        "image_size": known.image_size or source.image_size,
        "mean": source.mean,
        "std": source.std,
        "interpolation": None,
    }
    names = known.teachers or source.teachers or ["unknown"]
    return {
        "imported": {
            "format": source.format,
            "labels": source.kind,
            "half_precision": bool(source.half),
        },
        "teachers": [{"model": name, **one} for name in names],
        "crops": {
            "policy": "as imported",
            **dict.fromkeys(("tries", "scale", "ratio", "flip")),
            "seed": SEED,
            "interpolation": known.interpolation or source.interpolation,
            "exif": "ignore",
        },
        "renderer": record(RenderSettings()),
        "codec": codec,
        "compute": dict.fromkeys(("batch_size", "precision", "device")),
    }


def _opened(
    path: Path, data: DataSet, source: LabelSet, about: dict, before: Scanned
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
    path: Path, data: DataSet, source: LabelSet, about: dict, found: Images, views: int
) -> None:
    """Create an empty store of the images that a scan found, in which images without a
    label file are unusable."""
    unlabelled = np.array([not source.labelled(image) for image in found.path.tolist()]) & (
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
            ", in half precision, whose boxes may be a pixel off in images of 2,048 or more"
            if source.half
            else ""
        )
    )


def _image(
    source: LabelSet, manifest: Images, row: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Read the label file of an image of the manifest. Returns boxes, flips, and labels
    as the file stores them."""
    height, width = int(manifest.height[row]), int(manifest.width[row])
    return source.read(str(manifest.path[row]), height, width)


def _fill(writer: StoreWriter, source: LabelSet) -> None:
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


def _group(source: LabelSet, store: LabelStore, good: np.ndarray) -> int:
    """Return how many views of a shard's images are held in memory at once."""
    if len(good) == 0:
        return store.views
    _, _, labels = _image(source, store.images, good[0])
    per_view = len(good) * (labels[0].nbytes + 32)
    return max(1, min(store.views, AT_ONCE // per_view))


def _write(
    writer: StoreWriter,
    source: LabelSet,
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


def _dense(labels: np.ndarray, source: LabelSet, store: LabelStore, rows: np.ndarray) -> np.ndarray:
    """Expand labels to probabilities. Raises LabelFileError with the name of the file
    whose labels are no probabilities."""
    try:
        return source.dense(labels)
    except ValueError:
        for label, row in zip(labels, rows, strict=True):  # find the file
            try:
                source.dense(label[None])
            except ValueError as error:
                raise LabelFileError(
                    f"{source.file(str(store.images.path[row]))} holds {error}; get it anew from "
                    f"where it came from"
                ) from None
        raise
