"""Create a store for stage one, or rebuild the description of a damaged store."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from cache import repair
from cache.create import create
from cache.errors import StoreError
from cache.format.codec import CODECS
from cache.format.manifest import USABLE, Images
from cache.system.signals import finishing
from pipeline.config import ConfigError
from pipeline.images.data_set import DataSet
from pipeline.images.matching import has_system_files
from pipeline.images.patience import DataError
from pipeline.images.scan import scan, unusable_summary
from pipeline.images.scan_cache import Scanned
from pipeline.labelling.coordination import opened
from pipeline.labelling.inputs import Labelling
from pipeline.provenance import description
from pipeline.provenance.fingerprint import fingerprint_rows
from pipeline.provenance.refusals import require_class_count
from pipeline.render.settings import RenderSettings
from pipeline.runtime.progress import say
from pipeline.sampling.crop_sampler import CropSampler


def repair_store(work: Labelling, path: Path) -> None:
    """Rebuild the description of a damaged store.

    The store keeps its attributes if they are whole. Otherwise the attributes come from
    this command.
    """

    named, backend = work.config.render.resize, work.config.render.backend
    # Before version 0.10 DALI resized.
    resizes = [named] if named else ["pillow", "dali"] if backend == "cpu" else ["dali"]
    tries = [(r, every) for every in (False, True) for r in resizes]
    if not has_system_files(work.data):
        tries = tries[: len(resizes)]
    for resize, every in tries:
        tried = replace(
            work,
            config=work.config.with_resize(resize),
            data=replace(work.data, mapped=True),  # accepted once, by the store
        )

        def make(
            fresh: Path,
            kept: dict | None,
            views: int,
            tried: Labelling = tried,
            every: bool = every,
        ) -> None:
            create_store(
                tried, fresh, kept=kept, views=views, before=Scanned.beside(path), every=every
            )

        try:
            repair.remake(path, make, say)
            break
        except StoreError:
            if (resize, every) == tries[-1]:
                raise
    if left := opened(path)[1]:
        raise StoreError(left)


def create_store(
    work: Labelling,
    path: Path,
    *,
    strict: bool = False,
    kept: dict | None = None,
    views: int = 1,
    before: Scanned | None = None,
    every: bool = False,
) -> None:
    """Scan every image, and create an empty store.

    strict: an unusable file is an error. kept: attributes of a damaged store, to be
    reused for the new store. The images must be those that the attributes describe; the
    command then decides only where the images are. views: the least number of views.
    before: where a stopped scan is kept; None: beside the store. every: as in ``scan``.
    Raises DataError for unusable images, and StoreError for images that ``kept`` does
    not describe.
    """
    config, data, settings = work.config, work.data, RenderSettings.of_config(work.config)
    seed, views = config.crops.seed, max(views, config.crops.views)
    if kept is not None:
        crops = kept["provenance"]["crops"]
        settings = RenderSettings(
            exif=crops["exif"], threads=settings.threads, max_megapixels=settings.max_megapixels
        )
        data, seed = data.named(kept["class_names"]), crops["seed"]
    require_class_count(data, work.teachers)
    before = before or Scanned.beside(path)
    found = scan(data, settings, order_seed=seed, before=before, every=every)
    _require_usable(data, found, strict)
    if kept is None:
        attributes = _describe(work, found)
    elif found.manifest_digest() == kept["provenance"]["data"]["manifest"]:
        attributes = repair.described(kept)
    else:
        raise StoreError(
            f"{path.name} is damaged, and the images in {data.path} are others than those it was "
            f"made from; restore the images or the store from a copy"
        )
    with finishing():
        first = create(path, images=found, views=views, attributes=attributes)
        before.drop_part()
    if first and kept is None:
        codec = attributes["codec"]["name"]
        if config.render.backend == "gpu-hardware":
            say(
                "render.backend gpu-hardware is an experiment, which its authors have not seen on "
                "a card: prove it with make gpu"
            )
        say(
            f"created {path}: {len(found.usable):,} images × {views} views × "
            f"{len(data.class_names):,} classes, codec {codec}"
        )


def _require_usable(data: DataSet, found: Images, strict: bool) -> None:
    """Print which files are unusable. Raises DataError if no file is usable, and with
    ``strict`` if any file is unusable."""
    bad = unusable_summary(found)
    for line in bad:
        say(line)
    if strict and bad:
        raise DataError(
            f"{int((found.status != USABLE).sum())} of {len(found)} files are unusable ({bad[0]}); "
            f"remove them, or drop --strict to leave them out"
        )
    if len(found.usable) == 0:
        raise DataError(f"{data.path} holds no image that can be used ({bad[0]})")


def _describe(work: Labelling, found: Images) -> dict:
    """Assemble the attributes of a new store of these images."""
    config, teachers = work.config, work.teachers
    layout = description.layout_of(config, len(found), len(work.data.class_names))
    _, shard_rows = layout
    if config.crops.cutmix and min(shard_rows, len(found)) < 2:
        raise ConfigError(
            f"crops.cutmix mixes images of one shard, and store.shard_rows is {shard_rows}; leave "
            f"it out, or set it to 2 or more"
        )
    origin = description.recipe(config, CODECS[config.store.codec], teachers, work.device)
    first = CropSampler(config.crops, found, shard_rows).whole_crops(0, fingerprint_rows(found))
    sizes = {teacher.image_size for teacher in teachers}
    return description.describe_store(
        work.data, found, origin, layout, first, sizes, config.render.threads
    )
