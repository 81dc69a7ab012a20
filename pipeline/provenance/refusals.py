"""Refuse to continue a store if the command or the machine differs from the store's."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from cache import LabelStore
from cache.errors import StoreError
from cache.format.codec import CODECS
from cache.format.crops import Crops, misplaced
from cache.format.schema import architecture, first_difference
from pipeline.config import Config
from pipeline.images.data_set import DataSet, plural
from pipeline.images.matching import require_same_files
from pipeline.images.patience import DataError
from pipeline.images.reader import Reader
from pipeline.models.model import Model
from pipeline.provenance.description import made_with, recipe
from pipeline.provenance.fingerprint import fingerprint
from pipeline.render.dali import GPU_BACKENDS
from pipeline.render.settings import RenderSettings, resize_of
from pipeline.runtime.precision import rounding
from pipeline.runtime.wording import counted, same, some, told_apart

# The decoder of versions up to 0.6, on a GPU.
OLD_DECODER = "DALI's own choice of decoder, which made an image's pixels depend on its batch"
_REPAIRS = {
    "teachers": "pass the same teachers and checkpoints, in the same order",
    "crops": "use the same crops section",
    "renderer": "use the same render.backend",
    "codec": "use the same store.codec",
    "compute": "use the same --batch-size, --device, store.precision and store.compile, since "
    "others move the labels' last bits",
}


def require_class_count(data: DataSet, teachers: list[Model]) -> None:
    """Raise DataError unless the teachers have one output for each class."""
    if len(data.class_names) != teachers[0].classes:
        if not data.mapped:
            data.source.require_images(split=data.split)
        raise DataError(
            f"{data.path} has {len(data.class_names)} classes, the teachers have "
            f"{teachers[0].classes}; pass --class-map imagenet-1k or a file that names "
            "the teachers' classes, or teachers of these classes"
        )


def changed_gpu(store: LabelStore, device: torch.device) -> str | None:
    """Return a message if labels are now made on another GPU than the store was begun
    on; None if the GPU is the same, or if labels are made on a CPU."""
    made, compute = store.attributes.get("made_with", {}), store.provenance["compute"]
    if device.type != "cuda" or made.get("gpu") == torch.cuda.get_device_name():
        return None
    begun = (
        f"on {made['gpu']}"
        if "gpu" in made
        else "by a version that recorded no GPU, and whose float32 was TF32 in convolutions"
    )
    apart = rounding(compute, made, device, compute["precision"])
    return (
        f"{store.path} was begun {begun}; labels of this {torch.cuda.get_device_name()} are the "
        f"same to rounding, {apart:.2g} in total variation at most"
    )


def require_same_recipe(
    store: LabelStore, config: Config, teachers: list[Model], device: torch.device
) -> None:
    """Raise StoreError if this command differs from the command that made the store.
    The message names the first difference."""
    now = recipe(config, CODECS[config.store.codec], teachers, device)
    resizes = resize_of(store.provenance), resize_of(now)
    if store.provenance["renderer"]["backend"] == config.render.backend and len(set(resizes)) > 1:
        raise StoreError(
            f"{store.path} was made with render.resize {resizes[0]}, this is {resizes[1]}; leave "
            f"render.resize out, or generate a new store"
        )
    for theirs, ours in zip(store.provenance["teachers"], now["teachers"], strict=False):
        if theirs["weights"] == ours["weights"] and architecture(theirs["model"]) == architecture(
            ours["model"]
        ):
            # If the weights are the same, a missing tag or another tag is no
            # difference.
            ours["model"] = theirs["model"]
    for section, wanted in now.items():
        difference = first_difference(section, store.provenance[section], wanted)
        if difference:
            where, theirs, ours = difference
            if where == "renderer.decoder":
                theirs = theirs or OLD_DECODER
            if where in ("renderer.steps", "renderer.decoder"):
                raise StoreError(
                    f"{store.path} was made with another way to render crops ({theirs}; this "
                    f"version: {ours}); use the version of this program that "
                    "made it, or generate a new store"
                )
            raise StoreError(
                f"{store.path} was made with {where} {theirs}, this is {ours}; "
                f"{_REPAIRS[section]}, or generate a new store"
            )


def require_same_classes(store: LabelStore, data: DataSet, repair: str) -> None:
    """Raise StoreError if a class map, or a model's classes, aren't the store's. Names
    that differ in Unicode normalisation only are the same. repair: the end of the
    message, which says what to do."""
    ours, theirs = list(data.class_names), store.class_names
    if not data.mapped or list(map(same, ours)) == list(map(same, theirs)):
        return
    if len(ours) != len(theirs):
        what = f"of {len(theirs)} classes, this one has {len(ours)}"
        in_both = set(map(same, ours)) & set(map(same, theirs))
        if more := [name for name in (*ours, *theirs) if same(name) not in in_both]:
            what += f" (in one only: {some(more)})"
    else:
        i, (a, b) = next(
            (i, pair)
            for i, pair in enumerate(zip(theirs, ours, strict=True))
            if same(pair[0]) != same(pair[1])
        )
        a, b = told_apart(a, b)
        what = f"whose class {i} is {a}, in this one it is {b}"
    raise StoreError(f"{store.path} was made with another list of classes, {what}; {repair}")


def require_same_images(store: LabelStore, data: DataSet) -> DataSet:
    """Return the data set with the store's classes and with the places of its files.
    Raises StoreError or DataError unless it holds the images of the store."""
    told, noun = data.source.classes(store.class_names), data.source.noun
    known = set(map(same, store.class_names))
    foreign = [name for name in told.names if same(name) not in known and not told.numbered]
    try:
        return require_same_files(data.named(store.class_names), store.images, str(store.path))
    except DataError:
        if not foreign:
            raise
        raise StoreError(
            f"{store.path} has labels for {store.classes} classes ({some(store.class_names)}), "
            f"{data.path} has {counted(len(told.names), noun, plural(noun))} of which "
            f"{len(foreign)} are not among them ({some(foreign)}); pass the images that the store "
            f"was made from, or generate a new store"
        ) from None


def require_same_pixels(
    store: LabelStore,
    data: DataSet,
    threads: int | None = None,
    digests: Callable[..., dict[str, str]] = fingerprint,
    repair: str = "train with --allow-renderer-difference",
) -> None:
    """Render the fingerprint's crops again. Raise StoreError if any pixel differs from
    the pixels that the teachers saw. digests: renders and digests them, as
    ``fingerprint`` does. repair: the end of the message."""
    kept = store.attributes.get("fingerprint")
    if kept is None:
        raise StoreError(
            f"{store.path} is damaged: it has no fingerprint; restore it from a copy or generate a "
            f"new store"
        )
    rows, boxes, flips = np.array(kept["rows"]), np.array(kept["boxes"]), np.array(kept["flips"])
    manifest = store.images
    if (
        not len(rows) == len(boxes) == len(flips)
        or (len(rows) and rows.max() >= len(manifest))
        or misplaced(boxes, manifest.height[rows], manifest.width[rows]).any()
    ):
        raise StoreError(
            f"{store.path} has a fingerprint of crops that are not inside its images; don't use "
            f"this store, or generate a new one"
        )
    settings = RenderSettings.of_store(store, threads)
    with Reader(data, manifest, threads) as read:
        now = digests(
            read(rows), Crops(boxes, flips), {int(size) for size in kept["digests"]}, settings
        )
    differing = [size for size in kept["digests"] if kept["digests"][size] != now[size]]
    if differing:
        made = store.attributes["made_with"]
        here = made_with(gpu=store.provenance["renderer"]["backend"] in GPU_BACKENDS)
        versions = [
            f"{name} {made.get(name)} then, {ours} now"
            for name, ours in here.items()
            if made.get(name) != ours
        ]
        raise StoreError(
            f"{store.path}: this machine renders other pixels than the teachers saw (at "
            f"{', '.join(differing)} px; {'; '.join(versions) or 'same versions'}); "
            f"install the versions it was made with, or {repair}"
        )
