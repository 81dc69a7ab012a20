"""Create a store for stage one, or make the description of a damaged store anew."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from cache import repair
from cache.create import create
from cache.errors import StoreError
from cache.format.codec import CODECS
from cache.format.manifest import USABLE, Images
from cache.format.schema import canonical_digest
from cache.system.signals import finishing
from pipeline import provenance
from pipeline.config import Config, ConfigError
from pipeline.images.folders import DataError
from pipeline.images.scan import scan, unusable_summary
from pipeline.labelling.coordination import opened
from pipeline.models.model import Model
from pipeline.render.dali import GPU_BACKENDS
from pipeline.runtime.progress import say
from pipeline.sampling.crop_sampler import CropSampler


def repair_store(config: Config, folder: Path, path: Path, classes: list[str], teachers: list[Model], device: torch.device) -> None:
    """Make the description of a damaged store anew: an empty store, from the same images, lends its files. Its attributes are the old ones if these are
    whole, otherwise this command's."""
    views = max(config.crops.views, repair.views_of(path))
    config = config.model_copy(update={"crops": config.crops.model_copy(update={"views": views})})
    kept, surely = repair.attributes_of(path)
    with repair.scratch(path) as fresh:
        for attributes in (kept,) if surely else (kept, None) if kept else (None,):
            try:
                create_store(config, folder, fresh, classes, teachers, device, kept=attributes)
                for file in repair.mend(path, fresh):
                    say(f"made {file} of {path} anew")
                break
            except StoreError:
                if attributes is None or surely:
                    raise
                shutil.rmtree(fresh, ignore_errors=True)
    if left := opened(path)[1]:
        raise StoreError(left)


def create_store(
    config: Config,
    folder: Path,
    path: Path,
    classes: list[str],
    teachers: list[Model],
    device: torch.device,
    strict: bool = False,
    kept: dict | None = None,
) -> None:
    """Make an empty store, from a look at every image. kept: attributes it is to have, if the images are those they speak of; of the command then
    counts only where the images are."""
    looked = {"exif": config.crops.exif, "seed": config.crops.seed}
    if kept is not None:
        looked, classes = kept["provenance"]["crops"], kept["class_names"]
    provenance.require_class_count(folder, classes, teachers)
    found = scan(
        folder,
        classes,
        exif=looked["exif"],
        threads=config.render.threads,
        order_seed=looked["seed"],
        max_megapixels=config.render.max_megapixels,
    )
    bad = unusable_summary(found)
    for line in bad:
        say(line)
    if strict and bad:
        raise DataError(
            f"{int((found.status != USABLE).sum())} of {len(found)} files are unusable ({bad[0]}); remove them, or drop --strict to leave them out"
        )
    if len(found.usable) == 0:
        raise DataError(f"{folder} holds no image that can be used ({bad[0]})")
    if kept is None:
        attributes = _describe(config, folder, found, classes, teachers, device)
    elif found.manifest_digest() == kept["provenance"]["data"]["manifest"]:
        attributes = repair.described(kept)
    else:
        raise StoreError(
            f"{path.name} is damaged, and the images in {folder} are others than those it was made from; restore the images or the store from a copy"
        )
    with finishing():
        first = create(path, images=found, views=config.crops.views, attributes=attributes)
    if first and kept is None:
        codec = attributes["codec"]["name"]
        if config.render.backend == "gpu-hardware":
            say("render.backend gpu-hardware is an experiment, which its authors have not seen on a card: prove it with make gpu")
        say(f"created {path}: {len(found.usable):,} images × {config.crops.views} views × {len(classes):,} classes, codec {codec}")


def _describe(config: Config, folder: Path, found: Images, classes: list[str], teachers: list[Model], device: torch.device) -> dict:
    """Attributes of a store of these images that this command makes."""
    codec = CODECS[config.store.codec]
    chunk_rows, shard_rows = provenance.layout_of(config, len(found), len(classes))
    if config.crops.cutmix and min(shard_rows, len(found)) < 2:
        raise ConfigError(
            f"crops.cutmix mixes images of one shard, and store.shard_rows is {shard_rows}; leave it out, or set it to 2 or more"
        )
    origin = provenance.recipe(config, codec, teachers, device) | {
        "data": {
            "images": len(found),
            "usable": len(found.usable),
            "manifest": found.manifest_digest(),
            "classes": canonical_digest({"names": classes}).hex(),
        },
        "layout": {"chunk_rows": chunk_rows, "shard_rows": shard_rows},
    }
    rows = provenance.fingerprint_rows(found)
    boxes, flips = CropSampler(config.crops, found, shard_rows).crops(0, rows)
    return {
        "codec": codec.describe(),
        "class_names": classes,
        "provenance": origin,
        "fingerprint": provenance.fingerprint(
            folder, found, rows, boxes, flips, {t.image_size for t in teachers}, origin, config.render.threads
        ),
        "made_with": provenance.made_with(gpu=device.type == "cuda" or config.render.backend in GPU_BACKENDS),
    }
