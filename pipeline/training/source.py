"""Choose where a training run's images, crops and labels come from: a label store, or
an image folder."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from cache import LabelStore
from cache.errors import StoreError
from cache.format.codec import CODECS, Codec
from cache.format.crops import BoxesAndFlips, Mixes
from cache.format.manifest import Images
from cache.format.schema import canonical_digest
from pipeline.config import Config, ConfigError, CropPolicy, CutMix
from pipeline.images.class_names import map_classes
from pipeline.images.data_set import DataSet
from pipeline.images.patience import DataError
from pipeline.images.scan import scan_and_say
from pipeline.images.scan_cache import Scanned
from pipeline.models.classes import known_classes
from pipeline.models.model import Model
from pipeline.models.weights import load_teachers
from pipeline.provenance.description import layout_of, policy_of, recipe
from pipeline.provenance.refusals import (
    require_class_count,
    require_same_classes,
    require_same_images,
    require_same_pixels,
)
from pipeline.render.settings import RenderSettings, resize_of
from pipeline.runtime.execution import Execution
from pipeline.runtime.progress import say
from pipeline.runtime.wording import counted
from pipeline.sampling.crop_sampler import CropSampler
from pipeline.sampling.epoch_order import blocks_of


def choose_source(
    config: Config,
    data: DataSet,
    path: Path | None,
    execution: Execution,
    *,
    started_views: int | None = None,
    allow_renderer_difference: bool = False,
    before: Scanned | None = None,
) -> tuple[Config, Source, list[Model]]:
    """Choose the source of crops and labels, and check the source against the images.

    path: a label store, or None. started_views: the number of views that the run
    replays, if the run was begun before. allow_renderer_difference: warn where this
    machine renders other pixels than the teachers saw; False: raise StoreError. before:
    an earlier start's scan of the folder. Returns the config, completed with the values
    that the source decides; the source; and the live teachers, if there are any.
    """
    processes = execution.processes
    if path is not None:
        if config.train.online:
            raise ConfigError(
                "train.online asks live teachers and takes no --store; leave one of them out"
            )

        # One process is enough for the list of files, since every process compares the
        # contents of each file that it reads.
        places = processes.first(lambda: _same_images(config, data, path))

        def chosen() -> tuple[Config, Source]:
            store = LabelStore.open(path)
            own = replace(data.named(store.class_names), places=places)
            return _from_store(config, own, store, started_views, allow_renderer_difference)

        return *processes.together(chosen), []
    if config.train.labels == "soft" and not config.train.online:
        raise ConfigError(
            "soft labels need a --store; make one with generate-labels, ask live teachers with "
            "--online, or set train.labels=hard"
        )
    teachers = (
        processes.together(lambda: load_teachers(config.teachers, execution.device))
        if config.train.online
        else []
    )
    for teacher in teachers:
        for line in teacher.introduction("teacher"):
            say(line)
    if teachers:
        known = known_classes(teachers)
        data = map_classes(data, known, "the teachers", teachers[0].classes)
        require_class_count(data, teachers)
    elif not data.class_names:
        raise DataError(
            f"nothing tells the classes of {data.path}, and hard labels are classes; sort the "
            f"images into a folder per class, pass a list of paths and classes, or train from a "
            f"store of soft labels"
        )
    settings, seed = RenderSettings.of_config(config), config.crops.seed
    config = config.with_resize(settings.resize)
    found = processes.first(lambda: scan_and_say(data, settings, order_seed=seed, before=before))
    how: dict = {}  # everything beside the images that labels depend on
    layout, views = (max(1, len(found)),) * 2, config.train.views or config.train.epochs
    if teachers:
        layout = layout_of(config, len(found), len(data.class_names))
        how = recipe(config, CODECS[config.store.codec], teachers, execution.device) | {
            "layout": list(layout)
        }
    if config.train.crops_per_image > views:
        raise ConfigError(
            f"train.crops_per_image is {config.train.crops_per_image} and train.views {views}; "
            f"raise train.views, or lower train.crops_per_image"
        )
    _say_repeats(config, views)
    _require_classes(config, data, found)
    source: Source = DrawnCrops(data, found, config.crops, settings, views, layout, how)
    return config, source, teachers


def _same_images(config: Config, data: DataSet, path: Path) -> np.ndarray | None:
    """Refuse a store of other images, classes or crops than the command's. Returns the
    places of its files, where their names alone don't tell them."""
    store = LabelStore.open(path)
    require_same_classes(store, data, "leave it out, the store knows its classes")
    _require_same_policy(config, store)
    return require_same_images(store, data).places


def _from_store(
    config: Config,
    data: DataSet,
    store: LabelStore,
    started_views: int | None,
    allow_renderer_difference: bool,
) -> tuple[Config, Source]:
    """Complete the config with the values that the store decides, and check views and
    pixels."""
    path = store.path
    views = config.train.views or started_views or store.views
    _require_views(config, store, views)
    _require_classes(config, data, store.images)
    try:
        require_same_pixels(store, data, config.render.threads)
    except StoreError as difference:
        if not allow_renderer_difference:
            raise
        # Every process speaks: each machine may have another renderer.
        say(f"warning: {difference}", anyway=True)
    seen = sorted({t["image_size"] for t in store.provenance["teachers"] if t["image_size"]})
    if seen and config.train.image_size not in seen:
        say(
            f"the student trains at {config.train.image_size} px, a size that no teacher of {path} "
            f"saw ({', '.join(map(str, seen))} px)"
        )
    _say_repeats(config, views)
    filled = config.model_copy(
        update={
            "crops": policy_of(store),
            "train": config.train.model_copy(update={"views": views}),
            "render": config.render.model_copy(
                update={
                    "backend": store.provenance["renderer"]["backend"],
                    "resize": resize_of(store.provenance),
                }
            ),
        }
    )
    return filled, StoredLabels(
        store, data, RenderSettings.of_config(filled), views, hard=config.train.labels == "hard"
    )


def _require_views(config: Config, store: LabelStore, views: int) -> None:
    """Raise StoreError unless the store has ``views`` views, and the views that this
    run replays are finished."""
    path = store.path
    if views > store.views:
        raise StoreError(
            f"train.views is {views} but {path} has {store.views}; extend it with {store.made_by} "
            f"--views {views}, or lower train.views"
        )
    if config.train.crops_per_image > views:
        repair = (
            "raise train.views"
            if views < store.views
            else f"extend it with {store.made_by} --views {config.train.crops_per_image}"
        )
        raise StoreError(
            f"train.crops_per_image is {config.train.crops_per_image}, but the run replays "
            f"{views} of {path}'s views; {repair}, or lower train.crops_per_image"
        )
    for view in range(min(views, config.train.epochs)):
        store.require_finished(view)


def _require_classes(config: Config, data: DataSet, images: Images) -> None:
    """Raise DataError if the recipe needs hard labels, and nothing tells the class of
    an image."""
    untold = int((images.class_index[images.usable] < 0).sum())
    if untold and (config.train.labels == "hard" or config.train.hard_weight):
        which = "train.labels=hard" if config.train.labels == "hard" else "train.hard_weight"
        raise DataError(
            f"nothing tells the class of {counted(untold, 'image')} of {data.path}, and {which} "
            f"needs it; train with soft labels alone, or pass images whose classes are told"
        )


def _say_repeats(config: Config, views: int) -> None:
    """Print how often views repeat, if there are more epochs than views."""
    if config.train.epochs > views:
        say(
            f"{config.train.epochs} epochs replay {views} views: each comes up to "
            f"{math.ceil(config.train.epochs / views)} times"
        )


def _require_same_policy(config: Config, store: LabelStore) -> None:
    """Raise ConfigError if the config asks for other crops than the store holds."""
    kept = policy_of(store)
    for name in config.crops.model_fields_set - {"views"}:
        ours, theirs = getattr(config.crops, name), getattr(kept, name)
        # Imported labels don't tell how their crops were drawn.
        unknown = store.provenance["crops"].get(name, theirs) is None and name != "cutmix"
        if ours != theirs and not unknown:
            cheaper = (
                "; or mix by area with this one: train.cutmix" if name == "cutmix" and ours else ""
            )
            raise ConfigError(
                f"crops.{name} is {_plain(ours)}, {store.path} was made with {_plain(theirs)}; "
                f"set it so, leave it out, or generate another store{cheaper}"
            )
    if config.train.cutmix and store.mixed:
        raise ConfigError(
            f"train.cutmix would mix the pictures of {store.path} again, which its teachers saw "
            f"mixed; set train.cutmix=null"
        )
    made = {
        "backend": store.provenance["renderer"]["backend"],
        "resize": resize_of(store.provenance),
    }
    for name, theirs in made.items():
        ours = getattr(config.render, name)
        if name in config.render.model_fields_set and ours not in (None, theirs):
            raise ConfigError(
                f"render.{name} is {ours}, {store.path} was made with {theirs}; leave it out"
            )


def _plain(value: object) -> object:
    """Return a value as a config writes it."""
    return "null" if value is None else value.model_dump() if isinstance(value, CutMix) else value


class Source(Protocol):
    """The source of crops and labels: a label store, or an image folder alone."""

    data: DataSet
    images: Images
    views: int  # epoch e replays view e mod views
    block_rows: int  # rows that are read together
    window_blocks: int  # blocks that are shuffled together
    policy: CropPolicy
    settings: RenderSettings
    identity: str  # digest of images, classes and labels; a run resumes only with the same
    codec: Codec | None  # codec of ``labels``; None without stored labels
    how: dict  # everything beside images and classes that live teachers' labels depend on
    teachers: list[str]  # timm names with tags of the teachers; empty for hard labels
    imported: dict | None  # provenance of imported labels; None for labels made here

    def crops(self, view: int, rows: np.ndarray) -> BoxesAndFlips:
        """Return boxes int32 [n, 4] and flips bool [n] of some rows in a view."""
        ...

    def mixes(self, view: int, rows: np.ndarray) -> Mixes:
        """Return the CutMix partners and rectangles of some rows in a view. Called only
        if ``policy.cutmix`` is set."""
        ...

    def labels(self, view: int, rows: np.ndarray) -> np.ndarray | None:
        """Return the stored labels of some rows in a view as codes [n, classes].
        Returns None without stored labels: for hard labels and for live teachers."""
        ...


class StoredLabels:
    """The crops and soft labels of a store. With ``hard``, the crops alone, for a
    baseline with hard labels on the same pixels."""

    def __init__(
        self,
        store: LabelStore,
        data: DataSet,
        settings: RenderSettings,
        views: int,
        *,
        hard: bool = False,
    ) -> None:
        self.store, self.data, self.settings, self.views, self.hard = (
            store,
            data,
            settings,
            views,
            hard,
        )
        self.images = store.images
        self.policy = policy_of(store)
        self.block_rows, self.window_blocks = blocks_of(
            store.chunk_rows, store.shard_rows, self.policy
        )
        self.identity = store.identity.hex()
        self.codec = None if hard else store.codec
        self.how: dict = {}
        self.teachers = (
            [] if hard else [teacher["model"] for teacher in store.provenance["teachers"]]
        )
        self.imported = None if hard else store.provenance.get("imported")

    def crops(self, view: int, rows: np.ndarray) -> BoxesAndFlips:
        """Return boxes and flips of some rows in a view."""
        return self.store.crops(view, rows)

    def mixes(self, view: int, rows: np.ndarray) -> Mixes:
        """Return the CutMix partners and rectangles of some rows in a view."""
        return self.store.mixes(view, rows)

    def labels(self, view: int, rows: np.ndarray) -> np.ndarray | None:
        """Return codes [n, classes] of some rows in a view; None for hard labels."""
        return None if self.hard else self.store.codes(view, rows)


class DrawnCrops:
    """Crops that are drawn during training, without a store.

    The crops are exactly the crops that a store of the same policy and layout would
    hold. They serve training from class folders, which also makes own teachers, and
    online training with live teachers. layout: rows of a chunk and of a shard. how:
    everything beside images and classes that labels depend on.
    """

    def __init__(
        self,
        data: DataSet,
        images: Images,
        policy: CropPolicy,
        settings: RenderSettings,
        views: int,
        layout: tuple[int, int],
        how: dict,
    ) -> None:
        self.data, self.images, self.policy, self.settings, self.views = (
            data,
            images,
            policy,
            settings,
            views,
        )
        self.block_rows, self.window_blocks = blocks_of(*layout, policy)
        sampler = CropSampler(policy, images, layout[1])
        self.crops, self.mixes = sampler.crops, sampler.mixes
        self.identity = canonical_digest(
            {"manifest": images.manifest_digest(), "classes": list(data.class_names)}
        ).hex()
        self.codec: Codec | None = None
        self.how = how
        self.teachers = [teacher["model"] for teacher in how.get("teachers", ())]
        self.imported: dict | None = None

    def labels(self, view: int, rows: np.ndarray) -> None:
        """Return None, since nothing is stored."""
        return None
