"""What a training run starts from: images, crops and labels, validation, and whether what is in its folder may be gone on with."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from cache import LabelStore
from cache.errors import StoreError
from cache.format.codec import CODECS, Codec
from cache.format.manifest import Images
from cache.format.schema import canonical_digest
from pipeline.config import Config, ConfigError, Crops, CutMix
from pipeline.images.folders import class_names, require_same_files
from pipeline.images.scan import scan_for
from pipeline.images.scan_cache import Scanned
from pipeline.models.model import Model
from pipeline.models.weights import load_teachers
from pipeline.provenance import layout_of, policy_of, recipe, require_class_count, require_same_classes, require_same_pixels
from pipeline.runtime.distributed import ALONE, Processes
from pipeline.runtime.progress import say
from pipeline.sampling.crop_sampler import CropSampler
from pipeline.sampling.epoch_order import blocks_of


def choose_source(
    config: Config,
    folder: Path,
    path: Path | None,
    classes: list[str] | None,
    device: torch.device,
    *,
    started_views: int | None = None,
    allow_renderer_difference: bool = False,
    processes: Processes = ALONE,
    before: Scanned | None = None,
) -> tuple[Config, Source, list[Model]]:
    """The config with what the source decides filled in, the source, checked against the folder, and the teachers if they are to be live. before: what an earlier
    start found in the folder."""
    if path is not None:
        if config.train.online:
            raise ConfigError("train.online asks live teachers and takes no --store; leave one of them out")
        filled, source = processes.together(
            lambda: _from_store(config, folder, path, classes, started_views, allow_renderer_difference, processes.leads)
        )
        return filled, source, []
    if config.train.labels == "soft" and not config.train.online:
        raise ConfigError(
            "soft labels need a --store; make one with generate-labels, ask live teachers with --online, or set train.labels=hard"
        )
    names = classes or class_names(folder)
    teachers = processes.together(lambda: load_teachers(config.teachers, device)) if config.train.online else []
    for teacher in teachers:
        for line in teacher.introduction("teacher"):
            say(line)
    if teachers:
        require_class_count(folder, names, teachers)
    found = processes.first(lambda: scan_for(folder, names, config, config.crops.exif, before, order_seed=config.crops.seed))
    how: dict = {}  # what labels depend on, beside the images
    layout, views = (max(1, len(found)),) * 2, config.train.views or config.train.epochs
    if teachers:
        layout = layout_of(config, len(found), len(names))
        how = recipe(config, CODECS[config.store.codec], teachers, device) | {"layout": list(layout)}
    if config.train.crops_per_image > views:
        raise ConfigError(
            f"train.crops_per_image is {config.train.crops_per_image} and train.views {views}; raise train.views, or lower train.crops_per_image"
        )
    _say_repeats(config, views)
    return config, DrawnCrops(found, names, config.crops, config.render.backend, views, layout, how), teachers


def _from_store(
    config: Config,
    folder: Path,
    path: Path,
    classes: list[str] | None,
    started_views: int | None,
    allow_renderer_difference: bool,
    leads: bool,
) -> tuple[Config, Source]:
    """leads: whether to look which files are in the folder; one process is enough for that, and each compares what it reads."""
    store = LabelStore.open(path)
    require_same_classes(store, classes, "leave it out, the store knows its classes")
    folders = class_names(folder)
    foreign = sorted(set(folders) - set(store.class_names))
    if foreign:
        raise StoreError(
            f"{path} has labels for {store.classes} classes, {folder} has {len(folders)} class folders of which {len(foreign)} are not among them "
            f"(the first is {foreign[0]}); pass the images that the store was made from, or generate a new store"
        )
    if leads:
        require_same_files(folder, store.images, store.class_names, str(path))
    _require_same_policy(config, store)
    views = config.train.views or started_views or store.views
    if views > store.views:
        raise StoreError(
            f"train.views is {views} but {path} has {store.views}; extend it with {store.made_by} --views {views}, or lower train.views"
        )
    if config.train.crops_per_image > views:
        repair = "raise train.views" if views < store.views else f"extend it with {store.made_by} --views {config.train.crops_per_image}"
        raise StoreError(
            f"train.crops_per_image is {config.train.crops_per_image}, but the run replays {views} of {path}'s views; {repair}, or lower "
            "train.crops_per_image"
        )
    for view in range(min(views, config.train.epochs)):
        store.require_finished(view)
    try:
        require_same_pixels(store, folder, config.render.threads)
    except StoreError as difference:
        if not allow_renderer_difference:
            raise
        say(f"warning: {difference}", anyway=True)  # another machine's renderer may be another one
    seen = sorted({t["image_size"] for t in store.provenance["teachers"] if t["image_size"]})
    if seen and config.train.image_size not in seen:
        say(f"the student trains at {config.train.image_size} px, a size that no teacher of {path} saw ({', '.join(map(str, seen))} px)")
    _say_repeats(config, views)
    filled = config.model_copy(
        update={
            "crops": policy_of(store),
            "train": config.train.model_copy(update={"views": views}),
            "render": config.render.model_copy(update={"backend": store.provenance["renderer"]["backend"]}),
        }
    )
    return filled, StoredLabels(store, views, hard=config.train.labels == "hard")


def _say_repeats(config: Config, views: int) -> None:
    if config.train.epochs > views:
        say(f"{config.train.epochs} epochs replay {views} views: each comes up to {math.ceil(config.train.epochs / views)} times")


def _require_same_policy(config: Config, store: LabelStore) -> None:
    """A config that asks for other crops than the store holds can't have them."""
    kept = policy_of(store)
    for name in config.crops.model_fields_set - {"views"}:
        ours, theirs = getattr(config.crops, name), getattr(kept, name)
        unknown = store.provenance["crops"].get(name, theirs) is None and name != "cutmix"  # of labels that others made
        if ours != theirs and not unknown:
            cheaper = "; or mix by area with this one: train.cutmix" if name == "cutmix" and ours else ""
            raise ConfigError(
                f"crops.{name} is {_plain(ours)}, {store.path} was made with {_plain(theirs)}; set it so, leave it out, or generate another "
                f"store{cheaper}"
            )
    if config.train.cutmix and store.mixed:
        raise ConfigError(f"train.cutmix would mix the pictures of {store.path} again, which its teachers saw mixed; set train.cutmix=null")
    if "backend" in config.render.model_fields_set and config.render.backend != store.provenance["renderer"]["backend"]:
        raise ConfigError(
            f"render.backend is {config.render.backend}, {store.path} was made with {store.provenance['renderer']['backend']}; leave it out"
        )


def _plain(value: object) -> object:
    """As a config says it."""
    return "null" if value is None else value.model_dump() if isinstance(value, CutMix) else value


class Source(Protocol):
    """Where crops and labels come from: a label store, or an image folder alone."""

    images: Images
    class_names: list[str]
    views: int  # epoch e replays view e mod views
    block_rows: int  # rows that are read together
    window_blocks: int  # blocks that are shuffled together
    policy: Crops
    backend: str
    identity: str  # of images, classes and labels: what a run is bound to
    codec: Codec | None  # of ``labels``
    how: dict  # what live teachers' labels depend on, beside images and classes
    teachers: list[str]  # timm names with tags of who made the labels; empty if nobody did
    imported: dict | None  # what is known of labels that others made

    def crops(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...

    def mixes(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows of partners int32 [n], -1 for none, and rectangles float32 [n, 4]; asked for only if ``policy.cutmix`` is set."""
        ...

    def labels(self, view: int, rows: np.ndarray) -> np.ndarray | None:
        """Codes [n, classes]; None where nothing is stored: the class folders are the labels, or teachers are asked in training."""
        ...


class StoredLabels:
    """Crops and soft labels of a store; or its crops with hard labels, for a baseline on the same pixels."""

    def __init__(self, store: LabelStore, views: int, *, hard: bool = False) -> None:
        self.store, self.views, self.hard = store, views, hard
        self.images, self.class_names = store.images, store.class_names
        self.policy = policy_of(store)
        self.block_rows, self.window_blocks = blocks_of(store.chunk_rows, store.shard_rows, self.policy)
        self.backend: str = store.provenance["renderer"]["backend"]
        self.identity = store.identity.hex()
        self.codec, self.how = (None if hard else store.codec), {}
        self.teachers = [] if hard else [teacher["model"] for teacher in store.provenance["teachers"]]
        self.imported = None if hard else store.provenance.get("imported")

    def crops(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.store.crops(view, rows)

    def mixes(self, view: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return self.store.mixes(view, rows)

    def labels(self, view: int, rows: np.ndarray) -> np.ndarray | None:
        return None if self.hard else self.store.codes(view, rows)


class DrawnCrops:
    """Crops drawn as training goes, exactly those that a store of the same policy and layout would hold: for training from class folders,
    which is also how own teachers are made, and for online training, which asks live teachers.

    layout: rows of a chunk and of a shard. how: what labels depend on beside images and classes."""

    def __init__(
        self, images: Images, class_names: list[str], policy: Crops, backend: str, views: int, layout: tuple[int, int], how: dict
    ) -> None:
        self.images, self.class_names, self.policy, self.backend, self.views = images, class_names, policy, backend, views
        self.block_rows, self.window_blocks = blocks_of(*layout, policy)
        self.plan = CropSampler(policy, images, layout[1])
        self.crops, self.mixes = self.plan.crops, self.plan.mixes
        self.identity = canonical_digest({"manifest": images.manifest_digest(), "classes": class_names}).hex()
        self.codec, self.how = None, how
        self.teachers, self.imported = [teacher["model"] for teacher in how.get("teachers", ())], None

    def labels(self, view: int, rows: np.ndarray) -> None:
        return None
