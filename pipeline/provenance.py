"""What a store was made from, and whether a command or a machine is still the same: recipe, versions, fingerprint of rendered pixels."""

from __future__ import annotations

import hashlib
import platform
import re
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from cache import LabelStore
from cache.errors import StoreError
from cache.format.codec import CODECS, Codec
from cache.format.crops import misplaced
from cache.format.manifest import USABLE, Images
from cache.format.schema import architecture, first_difference, shard_rows_for
from pipeline.config import Config, Crops
from pipeline.images.folders import DataError
from pipeline.images.reader import Reader
from pipeline.models.model import Model
from pipeline.render.dali import DECODERS, GPU_BACKENDS, STEPS, CropRenderer, RenderError, dali_version
from pipeline.runtime.precision import rounding
from pipeline.sampling.random_crop import TRIES


def recipe(config: Config, codec: Codec, teachers: list[Model], device: torch.device) -> dict:
    """What the labels depend on besides the images: the part of the provenance that a command line decides."""
    policy = config.crops.model_dump(mode="json", exclude={"views"})
    if config.crops.cutmix is None:
        del policy["cutmix"]  # as stores had it before there was CutMix
    compute = {"batch_size": config.store.batch_size, "precision": config.store.precision, "device": device.type}
    if config.store.compile:
        compute["compile"] = True
    return {
        "teachers": [teacher.describe() for teacher in teachers],
        "crops": {"policy": "random-resized-crop", "tries": TRIES, **policy},
        "renderer": {"backend": config.render.backend, "steps": STEPS, **DECODERS.get(config.render.backend, {})},
        "codec": codec.describe(),
        "compute": compute,
    }


def layout_of(config: Config, images: int, classes: int) -> tuple[int, int]:
    """(rows of an inner chunk, rows of a shard) of a store of so many images."""
    chunk_rows, shard_rows = shard_rows_for(images, classes, np.dtype(CODECS[config.store.codec].dtype).itemsize)
    if config.store.shard_rows:
        shard_rows = config.store.shard_rows
        chunk_rows = min(chunk_rows, shard_rows & -shard_rows)  # the largest power of two that divides it
    return chunk_rows, shard_rows


def require_class_count(folder: Path, classes: list[str], teachers: list[Model]) -> None:
    """Raises DataError unless the teachers have an output for each class."""
    if len(classes) != teachers[0].classes:
        raise DataError(
            f"{folder} has {len(classes)} classes, the teachers have {teachers[0].classes}; pass --class-map imagenet-1k or a file that names "
            "the teachers' classes, or teachers of these classes"
        )


def made_with(*, gpu: bool = False) -> dict[str, str]:
    """Return the versions of what makes a store, and with ``gpu`` also the GPU (``gpu_facts``). Fingerprints and digests decide whether they matter."""
    versions = {"python": platform.python_version(), "dali": dali_version}
    for name in ("torch", "timm", "numpy", "scipy", "zarr"):
        versions[name] = version(name)
    return versions | (gpu_facts() if gpu else {})


def gpu_facts() -> dict[str, str]:
    """Return name and compute capability of torch's current GPU, and the versions of CUDA, cuDNN and the driver."""
    kernel = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\s(\d+\.[\d.]+)\s", kernel.read_text()) if kernel.exists() else None
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "driver": driver[1] if driver else "unknown",
    }


OLD_DECODER = "DALI's own choice of decoder, which made an image's pixels depend on its batch"  # of versions up to 0.6, on a GPU
_REPAIRS = {
    "teachers": "pass the same teachers and checkpoints, in the same order",
    "crops": "use the same crops section",
    "renderer": "use the same render.backend",
    "codec": "use the same store.codec",
    "compute": "use the same --batch-size, --device, store.precision and store.compile, since others move the labels' last bits",
}


def changed_gpu(store: LabelStore, device: torch.device) -> str | None:
    """Say that labels are now made on another GPU than the store was begun on; None if the GPU is the same, or a CPU makes labels."""
    made, compute = store.attributes.get("made_with", {}), store.provenance["compute"]
    if device.type != "cuda" or made.get("gpu") == torch.cuda.get_device_name():
        return None
    begun = f"on {made['gpu']}" if "gpu" in made else "by a version that recorded no GPU, and whose float32 was TF32 in convolutions"
    apart = rounding(compute, made, device, compute["precision"])
    return f"{store.path} was begun {begun}; labels of this {torch.cuda.get_device_name()} are the same to rounding, {apart:.2g} in total variation at most"


def require_same_recipe(store: LabelStore, config: Config, teachers: list[Model], device: torch.device) -> None:
    """Raises StoreError with the first thing in which this command differs from the one that made the store."""
    now = recipe(config, CODECS[config.store.codec], teachers, device)
    for theirs, ours in zip(store.provenance["teachers"], now["teachers"], strict=False):
        if theirs["weights"] == ours["weights"] and architecture(theirs["model"]) == architecture(ours["model"]):
            ours["model"] = theirs["model"]  # a tag that was not named, or named otherwise, is no difference where the weights are the same
    for section, wanted in now.items():
        difference = first_difference(section, store.provenance[section], wanted)
        if difference:
            where, theirs, ours = difference
            if where == "renderer.decoder":
                theirs = theirs or OLD_DECODER
            if where in ("renderer.steps", "renderer.decoder"):
                raise StoreError(
                    f"{store.path} was made with another way to render crops ({theirs}; this version: {ours}); use the version of this program that "
                    "made it, or generate a new store"
                )
            raise StoreError(f"{store.path} was made with {where} {theirs}, this is {ours}; {_REPAIRS[section]}, or generate a new store")


def require_same_classes(store: LabelStore, classes: list[str] | None, repair: str) -> None:
    """Raises StoreError unless the class map, if one is given, is the store's."""
    if classes is None or classes == store.class_names:
        return
    if len(classes) != len(store.class_names):
        what = f"of {len(store.class_names)} classes, this one has {len(classes)}"
        if more := [name for name in classes if name not in store.class_names] or [
            name for name in store.class_names if name not in classes
        ]:
            what += f" ({more[0]} is in one only)"
    else:
        i = next(i for i, (a, b) in enumerate(zip(store.class_names, classes, strict=True)) if a != b)
        what = f"whose class {i} is {store.class_names[i]}, in this one it is {classes[i]}"
    raise StoreError(f"{store.path} was made with another --class-map, {what}; {repair}")


def fingerprint(
    folder: Path,
    found: Images,
    rows: np.ndarray,
    boxes: np.ndarray,
    flips: np.ndarray,
    sizes: set[int],
    provenance: dict,
    threads: int | None,
) -> dict:
    how = {
        "interpolation": provenance["crops"]["interpolation"],
        "exif": provenance["crops"]["exif"],
        "backend": provenance["renderer"]["backend"],
    }
    with Reader(folder, found, threads) as read:
        return fingerprint_of_pixels(read(rows), rows, boxes, flips, sorted(sizes), threads=threads, **how)


def require_same_pixels(store: LabelStore, folder: Path, threads: int | None) -> None:
    """Render the fingerprint's crops again. Raises StoreError if any pixel differs from what the teachers saw."""
    kept = store.attributes.get("fingerprint")
    if kept is None:
        raise StoreError(f"{store.path} is damaged: it has no fingerprint; restore it from a copy or generate a new store")
    rows, boxes, flips = np.array(kept["rows"]), np.array(kept["boxes"]), np.array(kept["flips"])
    manifest = store.images
    if (
        not len(rows) == len(boxes) == len(flips)
        or (len(rows) and rows.max() >= len(manifest))
        or misplaced(boxes, manifest.height[rows], manifest.width[rows]).any()
    ):
        raise StoreError(
            f"{store.path} has a fingerprint of crops that are not inside its images; don't use this store, or generate a new one"
        )
    now = fingerprint(folder, store.images, rows, boxes, flips, {int(s) for s in kept["digests"]}, store.provenance, threads)
    differing = [size for size in kept["digests"] if kept["digests"][size] != now["digests"][size]]
    if differing:
        made = store.attributes["made_with"]
        here = made_with(gpu=store.provenance["renderer"]["backend"] in GPU_BACKENDS)
        versions = [f"{name} {made.get(name)} then, {ours} now" for name, ours in here.items() if made.get(name) != ours]
        raise StoreError(
            f"{store.path}: this machine renders other pixels than the teachers saw (at {', '.join(differing)} px; {'; '.join(versions) or 'same versions'}); "
            "install the versions it was made with, or train with --allow-renderer-difference"
        )


FINGERPRINT_CROPS = 64
OTHER_BATCHES = 3  # in which the fingerprint's crops are rendered once more


def fingerprint_of_pixels(
    blobs: Sequence[bytes], rows: np.ndarray, boxes: np.ndarray, flips: np.ndarray, sizes: Sequence[int], **how
) -> dict:
    """Digests of rendered crops, by which a later run knows whether it renders the same pixels.

    rows [n], boxes [n, 4], flips [n], blobs: the first usable images and their crops of view 0. Returns what the store keeps. The crops are rendered in two
    ways: all in one batch, and in another order in several smaller ones. Raises RenderError if a crop's pixels depend on that.
    """
    rendered = CropRenderer(sizes, 1, max(1, len(rows)), **how)(blobs, boxes[None], flips[None])[0] if len(rows) else {}
    parts = [part for part in np.array_split(np.arange(len(rows))[::-1], OTHER_BATCHES) if len(part)]
    again = CropRenderer(sizes, 1, max(map(len, parts)), **how) if parts else None
    for part in parts:
        others = again([blobs[i] for i in part], boxes[None, part], flips[None, part])[0]
        for size, pixels in others.items():
            differs = (rendered[size][torch.from_numpy(part.copy())] != pixels).flatten(1).any(dim=1)
            if differs.any():
                backend = how.get("backend", "cpu")
                raise RenderError(
                    f"render.backend {backend} makes other pixels of an image when others are rendered with it ({int(differs.sum())} of {len(part)} crops "
                    f"differ at {size} px), so no student would see what the teachers saw; use render.backend: {'gpu' if backend == 'gpu-hardware' else 'cpu'}, "
                    "and a new store"
                )
    return {
        "rows": rows.tolist(),
        "boxes": boxes.tolist(),
        "flips": flips.tolist(),
        "digests": {str(size): hashlib.sha256(pixels.cpu().numpy().tobytes()).hexdigest() for size, pixels in rendered.items()},
    }


def fingerprint_rows(images: Images) -> np.ndarray:
    return np.flatnonzero(images.status == USABLE)[:FINGERPRINT_CROPS]


def policy_of(store: LabelStore) -> Crops:
    """The crop policy that a store was made with, as far as it is known, and its number of views."""
    kept = {key: value for key, value in store.provenance["crops"].items() if key in Crops.model_fields and value is not None}
    return Crops(**kept, views=store.views)
