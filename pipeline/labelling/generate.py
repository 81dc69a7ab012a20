"""Stage one: the label store, made, mended, extended, and filled with what is missing of it (stream.py)."""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from cache import LabelStore, repair
from cache.errors import StoreError
from cache.format.manifest import USABLE
from cache.system.claims import claim, claims_of, held, holders, sweep
from cache.system.signals import check as check_signals
from cache.writer import StoreWriter
from pipeline import provenance
from pipeline.config import Config, ConfigError
from pipeline.images import folders
from pipeline.images.reader import Reader
from pipeline.labelling.coordination import grown, naming, once, opened
from pipeline.labelling.create import create_store, repair_store
from pipeline.labelling.shares import places_of_share, unfinished_units
from pipeline.labelling.stream import Labeller, place_of
from pipeline.models.model import Model
from pipeline.models.weights import load_teachers
from pipeline.runtime.precision import require_precision
from pipeline.runtime.profiling import LABELLING, Clock, advice_on_labelling, report
from pipeline.runtime.progress import Progress, duration, say
from pipeline.runtime.threads import threads_for
from pipeline.sampling.crop_sampler import CropSampler

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
    folder = folders.split_folder(data, split)
    names = classes or folders.class_names(folder)
    teachers = load_teachers(config.teachers, device)
    for teacher in teachers:
        for line in teacher.introduction("teacher"):
            say(line)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()
    with naming(path):
        if any(part.is_file() for part in path.parents):
            raise StoreError(f"{path} can't be made, since a part of it is a file; choose another --store")
        leads = worker[0] == 0
        once(path, "create", path.exists, lambda: create_store(config, folder, path, names, teachers, device, strict), leads)
        if repair.folder_of(path).exists():  # left by a process that was killed, or in use now
            with claim(claims_of(path), "create") as mine:
                if mine:
                    shutil.rmtree(repair.folder_of(path), ignore_errors=True)
        writer, damage = opened(path)
        if damage:
            say(damage)
            # Nobody may extend meanwhile what is being put right.
            once(
                path,
                "create",
                lambda: not opened(path)[1],
                lambda: repair_store(config, folder, path, names, teachers, device),
                leads,
                "grow",
            )
            writer = StoreWriter(path)
        if "imported" in writer.store.provenance:
            raise StoreError(
                f"{path} holds labels that others made, which no teacher here can go on with; finish or mend it with import-labels, or choose another --store"
            )
        provenance.require_same_recipe(writer.store, config, teachers, device)
        provenance.require_same_classes(writer.store, classes, "pass that one again, or generate a new store")
        folders.require_same_files(folder, writer.store.images, writer.store.class_names, str(path))
        provenance.require_same_pixels(writer.store, folder, config.render.threads)
        if changed := provenance.changed_gpu(writer.store, device):
            say(changed)
        if config.crops.views < writer.store.views:
            say(f"{path} has {writer.store.views} views already; none is taken away")
        if config.store.shard_rows not in (None, writer.store.shard_rows):
            say(f"{path} keeps its shards of {writer.store.shard_rows} rows; store.shard_rows {config.store.shard_rows} is for a new store")
        writer = grown(writer, config.crops.views, leads)
        doubtful = _discard_damaged(config, writer, worker, first_view) if check else []
        _fill(config, writer, folder, teachers, device, worker, first_view, doubtful, profile)
        return LabelStore.open(path)


def _discard_damaged(config: Config, writer: StoreWriter, worker: tuple[int, int], first_view: int) -> list[tuple[int, int]]:
    """Read what is finished of this worker's share, and take the records of shards away that aren't what was written: they will be made anew.
    Returns (view, shard) of those that another process holds."""
    store, doubtful = writer.store, []
    places = places_of_share(store.finished(), config.store.views_per_decode, worker, first_view)
    threads = min(threads_for(config.render.threads), CHECK_THREADS)
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
    units = unfinished_units(store.finished(), config.store.views_per_decode, worker, first_view)
    if units and not os.access(store.path / "records", os.W_OK):
        raise StoreError(
            f"{store.path} is not finished and can't be written (Permission denied, or a read-only file system); mend that, and run the same command again"
        )
    total = sum(len(unit.views) * size[unit.shard] for unit in units)
    plan = CropSampler(config.crops, store.images, store.shard_rows)
    with Progress("labelling", total, "crops") as progress, Reader(folder, store.images, config.render.threads) as read:
        clock = Clock(device, exact=profile)
        label, waited = Labeller(config, writer, plan, read, teachers, device, clock), False
        while units or doubtful:
            labelled = label(units, progress)
            units = unfinished_units(store.finished(), config.store.views_per_decode, worker, first_view)
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
            units = unfinished_units(store.finished(), config.store.views_per_decode, worker, first_view) if waited else units
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
