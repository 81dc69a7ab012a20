"""Check a store against its images and its teachers: the images are unchanged, and the
teachers reproduce the stored labels of a sample of crops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from cache import LabelStore
from cache.errors import DamagedStore, MealError, StoreError
from cache.format.codec import divergence
from cache.format.codec_bounds import distance, max_error
from cache.verify import verify
from pipeline.config import ModelSpec
from pipeline.images.data_set import DataSet
from pipeline.images.matching import require_same_files
from pipeline.images.reader import Reader
from pipeline.inspection.stored_crops import pixels_of
from pipeline.models.model import Model, ensemble
from pipeline.models.weights import load_teachers
from pipeline.provenance.refusals import require_same_pixels
from pipeline.runtime.precision import rounding
from pipeline.runtime.progress import Progress, say
from pipeline.runtime.threads import threads_for
from pipeline.runtime.waiting import giving_way

WORST = 5  # crops named in a result
THREADS = 8  # each holds a shard in memory, and a decoded chunk of the shard


def recheck(
    path: Path,
    data: DataSet | None,
    specs: Sequence[ModelSpec],
    sample: int | None,
    *,
    device: torch.device | None = None,
    seed: int = 0,
    threads: int | None = None,
) -> dict:
    """Verify a store's files (``cache.verify``) and, with ``data``, its images.

    Without ``sample``, every image is read (``require_same_images``). With ``sample``,
    the images of that many crops are read, and their labels are computed again
    (``relabel``). Returns the facts that ``verify`` prints. ``problems`` lists images
    and labels that aren't the store's, a line each. ``trusted`` is the verdict on
    everything: the store is sound and complete, and ``problems`` is empty. Raises
    StoreError if there is no store.
    """
    made_by = "generate-labels, merge or import-labels"
    try:
        store = LabelStore.open(path)
        total, made_by = store.views * store.shards, store.made_by
    except DamagedStore:
        total = 0
    with Progress("verifying", total, "shards") as progress:
        verdict = verify(
            path, threads=min(threads_for(threads), THREADS), progress=progress.advance
        )
    result = {
        "store": str(path),
        "made_by": made_by,
        **verdict.document(),
        "problems": [],
        "images": None,
        "sample": None,
    }
    if data is not None and not verdict.damaged:
        store = LabelStore.open(path)
        try:
            if sample:
                result["sample"] = relabel(store, data, specs, sample, device=device, seed=seed)
                if not result["sample"]["agrees"]:
                    result["problems"].append(_disagreement(result["sample"]))
            else:
                require_same_images(store, data, threads)
                result["images"] = len(store.usable)
        except MealError as error:
            result["problems"].append(str(error))
    result["trusted"] = verdict.sound and verdict.complete and not result["problems"]
    return result


def _disagreement(sample: dict) -> str:
    worst = sample["worst"][0]
    return (
        f"the teachers say of view {worst['view']}, row {worst['row']} ({worst['path']}) what is "
        f"{worst['unexplained']:.3g} in total variation from anything "
        f"that is stored like this label, where {sample['allowed']:.2g} can be explained; the "
        f"store's labels were made otherwise than it says"
    )


def require_same_images(store: LabelStore, data: DataSet, threads: int | None = None) -> None:
    """Require the manifest's files in a data set, byte for byte: every usable image is
    read. Raises DataError otherwise."""
    data = require_same_files(data.named(store.class_names), store.images, str(store.path))
    with (
        Reader(data, store.images, threads) as read,
        Progress("reading images", len(store.usable), "images") as progress,
    ):
        for rows in np.array_split(store.usable, max(1, len(store.usable) // 256)):
            read(rows)
            progress.advance(len(rows))


def relabel(
    store: LabelStore,
    data: DataSet,
    specs: Sequence[ModelSpec],
    sample: int,
    *,
    device: torch.device,
    seed: int = 0,
) -> dict:
    """Render ``sample`` random crops of the store again, run the teachers on them and
    compare the new labels p with the stored labels p̂.

    specs: the store's teachers, in its order; empty if their weights are timm's under
    the recorded names. seed: of the choice of crops. Returns mean and largest KL(p‖p̂)
    in nats and total variation beside the stated maxima, the share of equal codes (0 …
    1), the worst crops, and ``agrees``. Raises MealError if images, teachers or pixels
    aren't the store's.

    A crop's ``unexplained`` is a lower bound of the total variation between p and every
    label with the stored codes (``codec_bounds.distance``). ``allowed`` is the total
    variation that other arithmetic may cause; in an average of stores, also the error
    that the codecs of its parts may have caused. ``agrees``: no crop's ``unexplained``
    exceeds ``allowed``.
    """
    if "imported" in store.provenance:
        raise StoreError(
            f"{store.path} holds labels of teachers whose weights aren't known, so they can't be "
            f"made again; leave --sample out"
        )
    data = require_same_files(data.named(store.class_names), store.images, str(store.path))
    teachers = _teachers(store, specs, device)
    require_same_pixels(store, data)
    compute = store.provenance["compute"]
    places = _choose(store, sample, seed)
    kl, tv, equal, unexplained = np.zeros((4, len(places)))
    with (
        Reader(data, store.images) as read,
        Progress("labelling again", len(places), "crops") as progress,
        giving_way(device),
    ):
        for start in range(0, len(places), compute["batch_size"]):
            part = places[start : start + compute["batch_size"]]
            p = _labels_of(store, part, read, teachers, device)
            codes = np.concatenate([store.codes(int(view), [row]) for view, row in part])
            here = slice(start, start + len(part))
            kl[here], tv[here] = divergence(p, store.codec.decode(codes))
            equal[here] = (store.codec.encode(p) == codes).mean(axis=1)
            unexplained[here] = distance(store.codec, p, codes)
            progress.advance(len(part))
    most_kl, most_tv = store.max_error
    allowed = (
        _arithmetic(
            store.provenance, store.attributes.get("made_with", {}), device, compute["precision"]
        )
        + most_tv
        - max_error(store.codec, store.classes)[1]
    )
    worst = np.lexsort((-tv, -unexplained))[:WORST]
    return {
        "crops": len(places),
        "kl_mean": float(kl.mean()),
        "kl_largest": float(kl.max()),
        "kl_stated": most_kl,
        "tv_mean": float(tv.mean()),
        "tv_largest": float(tv.max()),
        "tv_stated": most_tv,
        "unexplained": float(unexplained.max()),
        "allowed": float(allowed),
        "equal_codes": float(equal.mean()),
        "agrees": bool(unexplained.max() <= allowed),
        "worst": [
            {
                "view": int(places[i, 0]),
                "row": int(places[i, 1]),
                "path": str(store.images.path[places[i, 1]]),
                "tv": float(tv[i]),
                "unexplained": float(unexplained[i]),
            }
            for i in worst
        ],
    }


def _labels_of(
    store: LabelStore,
    places: np.ndarray,
    read: Reader,
    teachers: Sequence[Model],
    device: torch.device,
) -> np.ndarray:
    """Return the teachers' labels float32 [n, classes] of the crops at these places of
    a store, int [n, 2] views and rows."""
    compute = store.provenance["compute"]
    sizes = {teacher.image_size for teacher in teachers}
    crops = pixels_of(store, places, read, sizes)
    pixels = {size: p.to(device) for size, p in crops.items()}
    p, _ = ensemble(teachers, pixels, compute["precision"], batch_size=compute["batch_size"])
    return p.cpu().numpy()


def _arithmetic(origin: dict, made_with: dict, device: torch.device, precision: str) -> float:
    """Bound the total variation that rounding alone adds to a label of this provenance
    when it is computed again in ``precision`` (``precision.rounding``). The bound of an
    average of stores is the mean of its parts' bounds, weighted by their numbers of
    teachers."""
    if parts := origin.get("merged"):
        each = [
            part["teachers"]
            * _arithmetic(part, {"gpu": part["gpu"]} if "gpu" in part else {}, device, precision)
            for part in parts
        ]
        return sum(each) / sum(part["teachers"] for part in parts)
    return rounding(origin["compute"], made_with, device, precision)


def _teachers(store: LabelStore, specs: Sequence[ModelSpec], device: torch.device) -> list[Model]:
    """Load the store's teachers as its provenance describes them. Raises StoreError if
    ``specs`` names another number of teachers, or if weights aren't the recorded ones.
    A teacher that is recorded by a place (hf-hub:…) is loaded only from ``specs``."""
    made = store.provenance["teachers"]
    if specs and len(specs) != len(made):
        raise StoreError(
            f"{store.path} has {len(made)} teachers ({', '.join(t['model'] for t in made)}), "
            f"--teacher names {len(specs)}; name them all, in this order"
        )
    wanted = (
        [spec.model_copy(update=_look(t)) for spec, t in zip(specs, made, strict=True)]
        if specs
        else [_spec(t) for t in made]
    )
    if places := [t["model"] for t in made if ":" in t["model"] and not specs]:
        raise StoreError(
            f"{store.path} names a teacher by a place ({places[0]}), which is not looked at on its "
            f"word; pass it with --teacher"
        )
    teachers = load_teachers(wanted, device)
    for teacher, theirs in zip(teachers, made, strict=True):
        ours = teacher.describe()
        if ours["weights"] != theirs["weights"]:
            raise StoreError(
                f"{store.path} was made with {theirs['model']} of weights "
                f"{theirs['weights'][:12]}…, this {teacher.name} has {ours['weights'][:12]}…; "
                "pass the same checkpoints, in the same order, with --teacher MODEL=CHECKPOINT"
            )
        say(
            f"teacher {theirs['model']}, {theirs['image_size']} px, weights "
            f"{theirs['weights'][:12]}"
        )
        for line in teacher.notes:
            say(line)
    return teachers


def _look(teacher: dict) -> dict:
    return {
        "image_size": teacher["image_size"],
        "mean": tuple(teacher["mean"]),
        "std": tuple(teacher["std"]),
    }


def _spec(teacher: dict) -> ModelSpec:
    return ModelSpec(model=teacher["model"], **_look(teacher))


def _choose(store: LabelStore, sample: int, seed: int) -> np.ndarray:
    """Choose random labelled crops, each at most once. Returns int64 [n, 2]: views and
    rows, in the order of the store."""
    views, shards = np.nonzero(store.finished())
    if len(views) == 0:
        raise StoreError(
            f"{store.path} has no label yet; run the same {store.made_by} command again"
        )
    usable = np.bincount(store.usable // store.shard_rows, minlength=store.shards)
    ends = np.cumsum(usable[shards])
    chosen = np.sort(
        np.random.default_rng(seed).choice(ends[-1], min(sample, ends[-1]), replace=False)
    )
    at = np.searchsorted(ends, chosen, side="right")
    first = np.searchsorted(store.usable, shards[at] * store.shard_rows)
    return np.stack(
        [views[at], store.usable[first + chosen - (ends[at] - usable[shards[at]])]], axis=1
    )
