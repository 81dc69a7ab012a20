"""Stage one: the label store, made, mended, extended, and filled with what is missing of it (label.py)."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch

from cache import LabelStore, mend, schema
from cache.claims import claim, claims_of, held, holders, sweep
from cache.codec import CODECS
from cache.schema import USABLE, DamagedStore, Images, StoreError, canonical_digest
from cache.stopping import check as check_signals
from cache.stopping import finishing
from cache.writer import BusyStore, StoreWriter
from pipeline import images, provenance, render
from pipeline.arithmetic import require_precision
from pipeline.config import Config, ConfigError
from pipeline.images import DataError
from pipeline.label import Labeller, Unit, place_of
from pipeline.models import Model, load_teachers
from pipeline.plan import Plan
from pipeline.progress import Progress, duration, say
from pipeline.timing import LABELLING, Clock, advice_on_labelling, report

PATIENCE = 600.0  # seconds that a worker waits for worker 0 to show up
CHECK_THREADS = 4  # each holds a shard, some 32 MiB of codes


def generate(
    config: Config,
    data: Path,
    path: Path,
    *,
    split: str = "train",
    classes: list[str] | None = None,
    device: torch.device,
    worker: tuple[int, int] = (0, 1),
    first_view: int = 0,
    strict: bool = False,
    check: bool = True,
    profile: bool = False,
) -> LabelStore:
    """Make a label store, or finish or extend the one that is there.

    classes: class folders in the order of the teachers' outputs (a class map); None: the folders' names, sorted.
    worker: (i, n), this process does every n-th unit of work from the i-th on. first_view: earlier views
    are left as they are. strict: an unusable file is an error.
    check: read the finished shards of this worker's share again, and make anew what isn't what was written; False: believe them.
    profile: say at the end where the time of labelling went, and what to change.
    Raises MealError for whatever the user can mend.
    """
    if first_view >= config.crops.views:
        raise ConfigError(f"--first-view {first_view} leaves nothing of {config.crops.views} views (the first is 0); raise --views")
    require_precision(config.store.precision, device, "store.precision")
    folder = images.split_folder(data, split)
    names = classes or images.class_names(folder)
    teachers = load_teachers(config.teachers, device)
    for teacher in teachers:
        for line in teacher.introduction("teacher"):
            say(line)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()
    with _naming(path):
        if any(part.is_file() for part in path.parents):
            raise StoreError(f"{path} can't be made, since a part of it is a file; choose another --store")
        leads = worker[0] == 0
        _once(path, "create", path.exists, lambda: _create(config, folder, path, names, teachers, device, strict), leads)
        if mend.folder_of(path).exists():  # left by a process that was killed, or in use now
            with claim(claims_of(path), "create") as mine:
                if mine:
                    shutil.rmtree(mend.folder_of(path), ignore_errors=True)
        writer, damage = _opened(path)
        if damage:
            say(damage)
            # Nobody may extend meanwhile what is being put right.
            _once(path, "create", lambda: not _opened(path)[1], lambda: _mend(config, folder, path, names, teachers, device), leads, "grow")
            writer = StoreWriter(path)
        if "imported" in writer.store.provenance:
            raise StoreError(
                f"{path} holds labels that others made, which no teacher here can go on with; finish or mend it with import-labels, or choose another --store"
            )
        provenance.require_same_recipe(writer.store, config, teachers, device)
        provenance.require_same_classes(writer.store, classes, "pass that one again, or generate a new store")
        images.require_same_files(folder, writer.store.images, writer.store.class_names, str(path))
        provenance.require_same_pixels(writer.store, folder, config.render.threads)
        if changed := provenance.changed_gpu(writer.store, device):
            say(changed)
        if config.crops.views < writer.store.views:
            say(f"{path} has {writer.store.views} views already; none is taken away")
        if config.store.shard_rows not in (None, writer.store.shard_rows):
            say(f"{path} keeps its shards of {writer.store.shard_rows} rows; store.shard_rows {config.store.shard_rows} is for a new store")
        writer = _grown(writer, config.crops.views, leads)
        doubtful = _discard_damaged(config, writer, worker, first_view) if check else []
        _fill(config, writer, folder, teachers, device, worker, first_view, doubtful, profile)
        return LabelStore.open(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Say which store it was that could not be written: a failed write has no file's name."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise StoreError(
            f"{path} can't be written ({error.strerror or error}); make room, or mend that, and run the same command again: what is finished stays"
        ) from None


def _opened(path: Path) -> tuple[StoreWriter | None, str | None]:
    """The store, or what is wrong with its description, which says nothing of its labels."""
    try:
        writer = StoreWriter(path)
        _ = writer.store.images
    except DamagedStore as damage:
        return None, str(damage)
    return writer, None


def _grown(writer: StoreWriter, views: int, leads: bool) -> StoreWriter:
    """The store with ``views`` views at least, and every array of that length."""

    def grown(writer: StoreWriter) -> bool:
        return views <= writer.store.views and not (leads and writer.uneven)

    path = writer.path
    while not grown(writer):
        if leads:
            if views > writer.store.views:
                say(f"extending {path} from {writer.store.views} to {views} views")
            with suppress(BusyStore), finishing():
                writer.grow(views)
        if not grown(writer):  # another process does it, or is to do it
            _wait(path, "grow", lambda: grown(StoreWriter(path)), leads)
            writer = StoreWriter(path)
    return writer


def _mend(config: Config, folder: Path, path: Path, classes: list[str], teachers: list[Model], device: torch.device) -> None:
    """Make the description of a damaged store anew: an empty store, from the same images, lends its files. Its attributes are the old ones if these are
    whole, otherwise this command's."""
    views = max(config.crops.views, mend.views_of(path))
    config = config.model_copy(update={"crops": config.crops.model_copy(update={"views": views})})
    kept, surely = mend.attributes_of(path)
    with mend.scratch(path) as fresh:
        for attributes in (kept,) if surely else (kept, None) if kept else (None,):
            try:
                _create(config, folder, fresh, classes, teachers, device, kept=attributes)
                for file in mend.mend(path, fresh):
                    say(f"made {file} of {path} anew")
                break
            except StoreError:
                if attributes is None or surely:
                    raise
                shutil.rmtree(fresh, ignore_errors=True)
    if left := _opened(path)[1]:
        raise StoreError(left)


def _create(
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
    found = images.scan(
        folder,
        classes,
        exif=looked["exif"],
        threads=config.render.threads,
        order_seed=looked["seed"],
        max_megapixels=config.render.max_megapixels,
    )
    bad = images.unusable_summary(found)
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
        attributes = mend.described(kept)
    else:
        raise StoreError(
            f"{path.name} is damaged, and the images in {folder} are others than those it was made from; restore the images or the store from a copy"
        )
    with finishing():
        first = schema.create(path, images=found, views=config.crops.views, attributes=attributes)
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
    rows = render.fingerprint_rows(found)
    boxes, flips = Plan(config.crops, found, shard_rows).crops(0, rows)
    return {
        "codec": codec.describe(),
        "class_names": classes,
        "provenance": origin,
        "fingerprint": provenance.fingerprint(
            folder, found, rows, boxes, flips, {t.image_size for t in teachers}, origin, config.render.threads
        ),
        "made_with": provenance.made_with(gpu=device.type == "cuda" or config.render.backend in render.GPU_BACKENDS),
    }


def _once(path: Path, what: str, done: Callable[[], bool], do: Callable[[], None], leads: bool, *besides: str) -> None:
    """Have one process do something that only one can do: this one, if it leads and nobody else is at it, or at what it must not meet (``besides``);
    otherwise wait for it."""
    while not done():
        if leads:
            with claim(claims_of(path), what, *besides) as mine:
                if len(mine) == 1 + len(besides) and not done():
                    do()
        if not done():
            _wait(path, what, done, leads, *besides)


def _wait(path: Path, what: str, done: Callable[[], bool], leads: bool, *besides: str) -> None:
    """Wait until another process has done what only one does, while it is alive. One that leads goes on when it is not, to do it itself; others give
    worker 0 some time to start."""
    patience = time.monotonic() + PATIENCE
    say(f"waiting for {'another process' if leads else 'worker 0'} to {what} {path}")
    while not done():
        time.sleep(0.5)
        check_signals()
        if any(held(claims_of(path), name) for name in (what, *besides)):
            patience = time.monotonic() + PATIENCE
        elif leads:
            return
        elif time.monotonic() > patience:
            raise StoreError(f"nobody has begun to {what} {path} in {duration(PATIENCE)}; start worker 0, or look at what it printed")


def _discard_damaged(config: Config, writer: StoreWriter, worker: tuple[int, int], first_view: int) -> list[tuple[int, int]]:
    """Read what is finished of this worker's share, and take the records of shards away that aren't what was written: they will be made anew.
    Returns (view, shard) of those that another process holds."""
    store, doubtful = writer.store, []
    places = _share(store.finished(), config.store.views_per_decode, worker, first_view)
    threads = min(render.threads_for(config.render.threads), CHECK_THREADS)
    with Progress("checking", len(places), "shards") as progress, ThreadPoolExecutor(threads) as pool:
        try:
            for (view, shard), fault in zip(places, pool.map(lambda place: store.fault(*place), places), strict=True):
                if fault:
                    if not writer.discard(view, shard):
                        doubtful.append((view, shard))
                    say(f"{place_of(store, [view], shard)}: damaged, and will be made anew: {fault}")
                progress.advance(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return doubtful


def _fill(
    config: Config,
    writer: StoreWriter,
    folder: Path,
    teachers: list[Model],
    device: torch.device,
    worker: tuple[int, int],
    first_view: int,
    doubtful: list[tuple[int, int]],
    profile: bool,
) -> None:
    """Label whatever this worker's share is missing. What others are at is waited for, and done here if they drop it or die. doubtful: damaged shards that
    others held when they were looked at."""
    store = writer.store
    size = [int((store.images.status[store.shard_slice(shard)] == USABLE).sum()) for shard in range(store.shards)]
    units = _units(store.finished(), config.store.views_per_decode, worker, first_view)
    if units and not os.access(store.path / "records", os.W_OK):
        raise StoreError(
            f"{store.path} is not finished and can't be written (Permission denied, or a read-only file system); mend that, and run the same command again"
        )
    total = sum(len(unit.views) * size[unit.shard] for unit in units)
    plan = Plan(config.crops, store.images, store.shard_rows)
    with Progress("labelling", total, "crops") as progress, images.Reader(folder, store.images, config.render.threads) as read:
        clock = Clock(device, exact=profile)
        label, waited = Labeller(config, writer, plan, read, teachers, device, clock), False
        while units or doubtful:
            labelled = label(units, progress)
            units = _units(store.finished(), config.store.views_per_decode, worker, first_view)
            left = doubtful + [(view, unit.shard) for unit in units for view in unit.views]
            if left and not waited:
                busy = ", ".join(sorted(set(holders(writer.claims)))) or "they have just ended"
                done, of = store.progress()
                say(f"{done} of {of} shards are done; waiting for others who are at work on {store.path} ({busy})")
                waited = True
            while left and all(held(writer.claims, f"{view}-{shard}") for view, shard in left):
                time.sleep(1.0)
                check_signals()
            if left and not labelled:
                time.sleep(1.0)
                check_signals()
            doubtful = [place for place in doubtful if store.fault(*place) and not writer.discard(*place)]
            units = _units(store.finished(), config.store.views_per_decode, worker, first_view) if waited else units
    if progress.done:
        say(f"labelled {progress.done:,} crops in {duration(progress.seconds)}, {progress.done / progress.seconds:,.1f} crops/s")
        if profile:
            for line in report(clock, LABELLING, advice_on_labelling(clock, config, device)):
                say(line)
    done, of = store.progress()
    if done == of:
        if os.access(store.path, os.W_OK):
            writer.tidy()
        sweep(writer.claims)
        say(f"{store.path} is complete: {of} of {of} shards")
    elif worker[1] > 1:
        say(f"this worker's share is done; {of - done} of {of} shards of {store.path} are left to the other workers")
    else:
        say(f"views {first_view} to {store.views - 1} are done; {of - done} of {of} shards of {store.path} are left")


def _units(finished: np.ndarray, views_per_decode: int, worker: tuple[int, int], first_view: int) -> list[Unit]:
    """This worker's share of the unfinished shards, the views that share its decodes together; early views first, so that they become
    trainable first. Whose share a unit is depends on its place alone, not on what is done already."""
    units: dict[tuple[int, int], Unit] = {}
    for view, shard in _share(~finished, views_per_decode, worker, first_view):
        units.setdefault((view // views_per_decode, shard), Unit([], shard)).views.append(view)
    return list(units.values())


def _share(wanted: np.ndarray, views_per_decode: int, worker: tuple[int, int], first_view: int) -> list[tuple[int, int]]:
    """(view, shard) of those places of ``wanted``, bool [views, shards], that are this worker's, in the order of the work."""
    views, shards = wanted.shape
    blocks = itertools.product(range(0, views, views_per_decode), range(shards))
    return [
        (view, shard)
        for place, (first, shard) in enumerate(blocks)
        if place % worker[1] == worker[0]
        for view in range(first, min(first + views_per_decode, views))
        if wanted[view, shard] and view >= first_view
    ]
