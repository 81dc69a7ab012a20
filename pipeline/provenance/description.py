"""Describe in a store's attributes all that its labels depend on: recipe, layout,
versions, GPU."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from cache import LabelStore
from cache.format.codec import CODECS, Codec
from cache.format.crops import Crops
from cache.format.manifest import Images
from cache.format.schema import canonical_digest, shard_rows_for
from pipeline.config import Config, CropPolicy
from pipeline.images.data_set import DataSet
from pipeline.images.reader import Reader
from pipeline.models.model import Model
from pipeline.provenance.fingerprint import fingerprint, fingerprint_rows
from pipeline.render.dali import GPU_BACKENDS, dali_version
from pipeline.render.renderer import record
from pipeline.render.settings import RenderSettings, resize_of
from pipeline.sampling.random_crop import TRIES


def recipe(config: Config, codec: Codec, teachers: list[Model], device: torch.device) -> dict:
    """Return the part of the provenance that a command line decides: all that labels
    depend on, except the images."""
    policy = config.crops.model_dump(mode="json", exclude={"views"})
    if config.crops.cutmix is None:
        del policy["cutmix"]  # as in stores that are older than CutMix
    compute = {
        "batch_size": config.store.batch_size,
        "precision": config.store.precision,
        "device": device.type,
    }
    if config.store.compile:
        compute["compile"] = True
    return {
        "teachers": [teacher.describe() for teacher in teachers],
        "crops": {"policy": "random-resized-crop", "tries": TRIES, **policy},
        "renderer": record(RenderSettings.of_config(config)),
        "codec": codec.describe(),
        "compute": compute,
    }


def layout_of(config: Config, images: int, classes: int) -> tuple[int, int]:
    """Return (rows of an inner chunk, rows of a shard) of a store with ``images``
    images."""
    chunk_rows, shard_rows = shard_rows_for(
        images, classes, np.dtype(CODECS[config.store.codec].dtype).itemsize
    )
    if config.store.shard_rows:
        shard_rows = config.store.shard_rows
        # shard_rows & -shard_rows: the largest power of two that divides shard_rows.
        chunk_rows = min(chunk_rows, shard_rows & -shard_rows)
    return chunk_rows, shard_rows


def describe_store(
    data: DataSet,
    found: Images,
    origin: dict,
    layout: tuple[int, int],
    first: Crops,
    sizes: set[int],
    threads: int | None = None,
) -> dict:
    """Assemble the attributes of a new store.

    found: the manifest. origin: the part of the provenance that doesn't follow from the
    images. layout: rows of a chunk and of a shard. first: the crops of
    ``fingerprint_rows``. sizes: input sizes of the teachers, in pixels. threads: number
    of threads that read and render.
    """
    chunk_rows, shard_rows = layout
    provenance = origin | {
        "data": {
            "images": len(found),
            "usable": len(found.usable),
            "manifest": found.manifest_digest(),
            "classes": canonical_digest({"names": list(data.class_names)}).hex(),
        },
        "layout": {"chunk_rows": chunk_rows, "shard_rows": shard_rows},
    }
    settings = RenderSettings.of_provenance(provenance, threads)
    with Reader(data, found, threads) as read:
        rows = fingerprint_rows(found)
        kept = {"rows": rows.tolist(), "boxes": first.boxes.tolist(), "flips": first.flips.tolist()}
        kept["digests"] = fingerprint(read(rows), first, sizes, settings)
    return {
        "codec": provenance["codec"],
        "class_names": list(data.class_names),
        "provenance": provenance,
        "fingerprint": kept,
        "made_with": made_with(
            gpu=provenance["compute"]["device"] == "cuda" or settings.backend in GPU_BACKENDS
        )
        | {"images": data.source.describe()},
    }


def as_begun(config: Config, provenance: dict) -> Config:
    """Complete a config with the resize that a store was begun with, unless the config
    names one."""
    if config.render.resize:
        return config
    return config.with_resize(resize_of(provenance))


def made_with(*, gpu: bool = False) -> dict[str, str]:
    """Return the versions of the software that makes a store and, with ``gpu``, also
    the GPU (``gpu_facts``). Fingerprints and digests decide whether another version
    matters."""
    versions = {"python": platform.python_version(), "dali": dali_version}
    for name in ("torch", "timm", "numpy", "numba", "scipy", "zarr"):
        versions[name] = version(name)
    return versions | (gpu_facts() if gpu else {})


def gpu_facts() -> dict[str, str]:
    """Return name and compute capability of torch's current GPU, and the versions of
    CUDA, cuDNN and the driver."""
    kernel = Path("/proc/driver/nvidia/version")
    driver = re.search(r"\s(\d+\.[\d.]+)\s", kernel.read_text()) if kernel.exists() else None
    return {
        "gpu": torch.cuda.get_device_name(),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "driver": driver[1] if driver else "unknown",
    }


def policy_of(store: LabelStore) -> CropPolicy:
    """Return the crop policy that a store was made with, as far as it is known, and the
    store's number of views."""
    kept = {
        key: value
        for key, value in store.provenance["crops"].items()
        if key in CropPolicy.model_fields and value is not None
    }
    return CropPolicy(**kept, views=store.views)
