"""Run each stage in one call, as most tests need it: from a folder, on the CPU, in one
process."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from cache import LabelStore
from cache.format.manifest import Images
from pipeline import evaluation
from pipeline.config import Config, CropPolicy, Render
from pipeline.exchange import import_labels as imports
from pipeline.images import scan as scans
from pipeline.images.data_set import DataSet
from pipeline.images.sources.class_folders import ClassFolders
from pipeline.inspection import relabel
from pipeline.inspection import store_facts as facts
from pipeline.labelling import generate as stage_one
from pipeline.labelling import plan
from pipeline.labelling.shares import Share
from pipeline.render.renderer import CentreRenderer, CropRenderer
from pipeline.render.settings import RenderSettings
from pipeline.runtime.distributed import Processes
from pipeline.runtime.execution import Execution
from pipeline.runtime.profiling import Clock
from pipeline.training import train as stage_two
from pipeline.training.batches import Batching, Replay
from pipeline.training.source import DrawnCrops, Source, StoredLabels
from pipeline.training.targets import Targets

CPU = torch.device("cpu")
SETTINGS = ("interpolation", "exif", "backend", "threads", "max_megapixels", "resize")


def _split(how: dict, *names: str) -> dict:
    """Take these keywords out of ``how``."""
    return {name: how.pop(name) for name in names if name in how}


def generate(
    recipe: Config,
    data: Path,
    path: Path,
    *,
    worker: tuple[int, int] = (0, 1),
    first_view: int = 0,
    **how: object,
) -> LabelStore:
    """Run stage one. how: split, classes (a class map), device, profile; strict and
    check, as ``pipeline.labelling.generate`` takes them."""
    images = DataSet.find(data, how.pop("split", "train"), how.pop("classes", None))
    execution = Execution.on(how.pop("device", CPU), profile=how.pop("profile", False))
    share = Share(*worker, first_view, recipe.store.views_per_decode)
    return stage_one.generate(recipe, images, path, execution, share=share, **how)


def make_plan(recipe: Config, data: Path | None, path: Path | None, **how: object) -> dict:
    """Plan stage one. how: split, classes, device; workers and first_view."""
    images = (
        DataSet.find(data, how.pop("split", "train"), how.pop("classes", None)) if data else None
    )
    share = Share(0, how.pop("workers", 1), how.pop("first_view", 0), recipe.store.views_per_decode)
    return asdict(
        plan.make_plan(recipe, images, path, device=how.pop("device", CPU), share=share, **how)
    )


def train(recipe: Config, data: Path, out: Path, **how: object) -> dict:
    """Run stage two. how: classes, device, processes, profile, track; the rest as
    ``pipeline.training.train`` takes it."""
    images = DataSet.find(data, "train", how.pop("classes", None))
    execution = Execution.on(
        how.pop("device", CPU),
        *_split(how, "processes").values(),
        profile=how.pop("profile", False),
        track=how.pop("track", ()),
    )
    return stage_two.train(recipe, images, out, execution=execution, **how)


def evaluate(models: Sequence, folder: Path, images: Images, classes: int, **how: object) -> dict:
    """Evaluate on a folder of so many classes. how: device, processes, teachers;
    batch_size, precision, what; the settings of the renderer."""
    execution = Execution(how.pop("device", CPU), **_split(how, "processes"))
    settings = evaluation.EvaluationSettings(
        RenderSettings(**_split(how, *SETTINGS)), **_split(how, "batch_size", "precision", "what")
    )
    data = class_folders(folder, [str(i) for i in range(classes)])
    result = evaluation.evaluate(
        models, data, images, settings=settings, execution=execution, **how
    )
    return result.document()


def class_folders(folder: Path, names: Sequence[str]) -> DataSet:
    """Take a folder of class folders, whose classes have these indices."""
    return DataSet(ClassFolders(folder), names)


def scan(folder: Path, classes: Sequence[str], **how: object) -> Images:
    """Scan a folder. how: the settings of the renderer; order_seed and before, as
    ``pipeline.images.scan`` takes them."""
    settings = RenderSettings(**_split(how, *SETTINGS))
    return scans.scan(class_folders(folder, classes).named(classes), settings, **how)


def recheck(path: Path, folder: Path, *how: object, **more: object) -> dict:
    """Check a store against the images of a folder."""
    data = folder and DataSet.find(folder, "train")
    return relabel.recheck(path, data, *how, **more)


def import_labels(directory: Path, data: Path, path: Path, **how: object) -> LabelStore:
    """Import label files. how: split, classes; teachers, image_size, interpolation,
    rest, form; views and codec."""
    images = DataSet.find(data, how.get("split", "train"), how.pop("classes", None))
    known = imports.Known(**_split(how, "teachers", "image_size", "interpolation", "rest", "form"))
    return imports.import_labels(directory, images, path, known=known, **how)


def crop_renderer(sizes: Sequence[int], views: int, batch_size: int, **how: object) -> CropRenderer:
    """Make a renderer of crops. how: the settings; pinned."""
    return CropRenderer(sizes, views, batch_size, RenderSettings(**_split(how, *SETTINGS)), **how)


def centre_renderer(
    looks: Sequence[tuple[int, str]], batch_size: int, **how: object
) -> CentreRenderer:
    """Make a renderer of central squares. how: the settings; pinned."""
    return CentreRenderer(looks, batch_size, RenderSettings(**_split(how, *SETTINGS)), **how)


def stored_labels(store: LabelStore, views: int, *, hard: bool = False) -> StoredLabels:
    """Take crops and labels from a store. ``make_replay`` sets the folder of images."""
    return StoredLabels(
        store,
        class_folders(Path(), store.class_names),
        RenderSettings.of_store(store),
        views,
        hard=hard,
    )


def drawn_crops(
    images: Images, names: Sequence[str], policy: CropPolicy, views: int, layout: tuple[int, int]
) -> DrawnCrops:
    """Draw crops on the CPU. ``make_replay`` sets the folder of images."""
    return DrawnCrops(
        class_folders(Path(), names),
        images,
        policy,
        RenderSettings.of(policy, Render()),
        views,
        layout,
        {},
    )


def make_replay(
    source: Source, folder: Path, *, sizes: Sequence[int], batch_size: int, seed: int, **how: object
) -> Replay:
    """Replay a source on the images of a folder. how: crops_per_image, mix; rendering,
    a config's section; device, clock; rank and world."""
    source.data = class_folders(folder, source.data.class_names)
    source.settings = replace(source.settings, threads=how.pop("rendering", Render()).threads)
    batching = Batching(batch_size, seed, **_split(how, "crops_per_image", "mix"))
    processes = Processes(**_split(how, "rank", "world"))
    return Replay(
        source,
        sizes,
        batching,
        Execution(how.pop("device", CPU), processes, how.pop("clock", None) or Clock()),
        **how,
    )


def make_targets(config: Config, source: Source, teachers: Sequence = ()) -> Targets:
    """Make the training targets of one process on the CPU."""
    return Targets(config, source, list(teachers), Execution())


def store_facts(path: Path) -> dict:
    """The facts of a store, as --json prints them."""
    return asdict(facts.store_facts(path))
