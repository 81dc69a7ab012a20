"""What a training run starts from: images, crops and labels, validation, and whether what is in its folder may be gone on with."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from cache import LabelStore
from cache.codec import CODECS
from cache.schema import USABLE, Images, StoreError, first_difference
from pipeline import checkpoint, images
from pipeline.checkpoint import RunError
from pipeline.config import Config, ConfigError, CutMix, flat, validate
from pipeline.curves import EVENTS, PICTURE
from pipeline.models import Model, load_teachers
from pipeline.processes import ALONE, Processes
from pipeline.progress import say
from pipeline.provenance import layout_of, recipe, require_class_count, require_same_classes, require_same_pixels
from pipeline.replay import DrawnCrops, Source, StoredLabels, policy_of
from pipeline.scanned import Scanned

FREE_KEYS = (
    "train.epochs",
    "render.threads",
    "render.max_megapixels",
    "teachers",
    "store",
    "crops.views",
)  # may change when a run is gone on with
SCANS = ("training-images.npz", "validation-images.npz")  # files of a run: what was found in the two folders


@dataclass
class Validation:
    folder: Path
    images: Images


def views_of_run(out: Path) -> int | None:
    """How many views the run in ``out`` replays, if there is one: a store that has grown since must not change it."""
    if not (out / "state.pt").exists():
        return None
    try:
        return yaml.safe_load((out / "config.yaml").read_text())["train"]["views"]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


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
    names = classes or images.class_names(folder)
    teachers = processes.together(lambda: load_teachers(config.teachers, device)) if config.train.online else []
    for teacher in teachers:
        for line in teacher.introduction("teacher"):
            say(line)
    if teachers:
        require_class_count(folder, names, teachers)
    found = processes.first(lambda: _scan(folder, names, config, config.crops.exif, before, order_seed=config.crops.seed))
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
    folders = images.class_names(folder)
    foreign = sorted(set(folders) - set(store.class_names))
    if foreign:
        raise StoreError(
            f"{path} has labels for {store.classes} classes, {folder} has {len(folders)} class folders of which {len(foreign)} are not among them "
            f"(the first is {foreign[0]}); pass the images that the store was made from, or generate a new store"
        )
    if leads:
        images.require_same_files(folder, store.images, store.class_names, str(path))
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


def state_of_run(out: Path, config: Config, source: Source) -> dict | None:
    """What a run in ``out`` goes on from; None if it is a new one. Raises RunError unless what is there is a part of this very run."""
    state = checkpoint.load_state(out / "state.pt")
    if state is None:
        # A kill in the first epoch leaves these.
        ours = {"config.yaml", *SCANS, "last.safetensors", "best.safetensors", "metrics.jsonl", PICTURE}
        if out.exists() and any(p.name not in ours and not p.name.startswith((".", EVENTS)) for p in out.iterdir()):
            raise RunError(f"{out} is not empty and holds no run; choose another --out")
        if len(_lines(out / "metrics.jsonl")) > 1:
            raise RunError(f"{out} holds a run whose state.pt is gone, so it can't go on; choose another --out")
    else:
        before, now = flat(_started_config(out).model_dump(mode="json")), flat(config.model_dump(mode="json"))
        for key in [*now, *(before.keys() - now.keys())]:
            if not _free(key, config) and before.get(key) != now.get(key):
                raise RunError(
                    f"{out} was started with {key} {before.get(key)}, this is {now.get(key)}; pass the same to go on, or choose another --out"
                )
        _require_same_teachers(out, state.get("how", {}), source.how)
        if state["source"] != source.identity:
            what = "another label store" if isinstance(source, StoredLabels) else "other images or classes"
            raise RunError(f"{out} was started with {what}; pass the same to go on, or choose another --out")
    return state


def _require_same_teachers(out: Path, before: dict, now: dict) -> None:
    if difference := next((found for key in now if (found := first_difference(key, before.get(key), now[key]))), None):
        where, theirs, ours = difference
        raise RunError(f"{out} was started with {where} {theirs}, this is {ours}; pass the same to go on, or choose another --out")


def _started_config(out: Path) -> Config:
    """The config that a run was started with; what it says nothing of, since its program was older, has its default."""
    try:
        return validate(yaml.safe_load((out / "config.yaml").read_text()), str(out / "config.yaml"))
    except (OSError, yaml.YAMLError, ConfigError) as error:
        raise RunError(f"{out / 'config.yaml'} can't be used to go on ({error}); choose another --out") from None


def _free(key: str, config: Config) -> bool:
    """Whether a value may change when a run is gone on with."""
    if key == "train.epochs":
        return config.train.schedule != "cosine"  # whose every step depends on where the end is
    return key.startswith(FREE_KEYS)


def _lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def find_validation(
    data: Path, other: Path | None, source: Source, config: Config, processes: Processes = ALONE, before: Scanned | None = None
) -> Validation | None:
    """DATA/val, or the folder that the user named; None if there is neither. before: what an earlier start found there."""
    folder = processes.together(lambda: _validation_folder(data, other))
    if not processes.first(lambda: folder is not None):
        say("no validation: the data has no val/, and no --val-data was given")
        return None
    return Validation(
        processes.together(lambda: _required(folder, data)), processes.first(lambda: _to_validate_on(folder, source, config, before))
    )


def _validation_folder(data: Path, other: Path | None) -> Path | None:
    if other is not None:
        if not other.is_dir():
            raise images.DataError(f"--val-data {other} is no folder; it must hold class folders, or val/ with them")
        return images.split_folder(other, "val")
    return images.split_folder(data, "val") if images.is_split(data, "val") else None


def _required(folder: Path | None, data: Path) -> Path:
    if folder is None:
        raise images.DataError(f"{data} has no val/ here, and has one where the first process runs; put it on every machine")
    return folder


def _to_validate_on(folder: Path, source: Source, config: Config, before: Scanned | None) -> Images:
    found = _scan(folder, source.class_names, config, source.policy.exif, before)
    if not (found.status == USABLE).any():
        raise images.DataError(f"{folder} holds no image to validate on")
    return found


def _scan(folder: Path, names: list[str], config: Config, exif: str, before: Scanned | None, *, order_seed: int | None = None) -> Images:
    """What is in a folder of images of these classes; and say what of it can't be used, or is missing."""
    found = images.scan(
        folder,
        names,
        exif=exif,
        threads=config.render.threads,
        order_seed=order_seed,
        max_megapixels=config.render.max_megapixels,
        before=before,
    )
    for line in [*images.unusable_summary(found), *images.empty_classes(found, names, folder)]:
        say(line)
    return found
