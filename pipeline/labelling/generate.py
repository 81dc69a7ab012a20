"""Run stage one: create, repair or extend a label store, and label its missing shards
(stream.py)."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np

from cache import LabelStore, repair
from cache.errors import StoreError
from cache.format.manifest import USABLE
from cache.system.claims import claim, claims_of, holders, sweep
from cache.system.local import require_local
from cache.writer import StoreWriter
from pipeline.config import Config, ConfigError
from pipeline.images.class_names import map_classes
from pipeline.images.data_set import DataSet
from pipeline.images.matching import require_same_files
from pipeline.images.reader import Reader
from pipeline.images.result_places import require_no_split, require_outside
from pipeline.labelling.coordination import grown, naming, once, opened, require_place
from pipeline.labelling.create_store import create_store, repair_store
from pipeline.labelling.free_units import FreeUnits
from pipeline.labelling.inputs import Labelling
from pipeline.labelling.shares import Share
from pipeline.labelling.stream import Labeller, place_of
from pipeline.models.classes import known_classes
from pipeline.models.weights import load_teachers
from pipeline.provenance import refusals
from pipeline.provenance.description import as_begun
from pipeline.runtime.engine import take_over
from pipeline.runtime.execution import Execution
from pipeline.runtime.precision import require_precision
from pipeline.runtime.profiling import LABELLING, advice_on_labelling, report
from pipeline.runtime.progress import Progress, duration, say
from pipeline.runtime.threads import threads_for
from pipeline.runtime.waiting import giving_way

CHECK_THREADS = 4  # each holds the codes of one shard, some 32 MiB


def generate(
    config: Config,
    data: DataSet,
    path: Path,
    execution: Execution,
    *,
    share: Share | None = None,
    strict: bool = False,
    check: bool = True,
) -> LabelStore:
    """Create a label store, or finish, extend or repair the store that is there.

    share: this process's share of the work; None: all of it. strict: an unusable file
    is an error. check: verify the finished shards of this share first, and label
    damaged shards again; False: trust finished shards. Returns the store, open for
    reading. Raises MealError for every error that the user can fix.
    """
    require_local(path)
    share = share or Share(views_per_decode=config.store.views_per_decode)
    if share.first_view >= config.crops.views:
        raise ConfigError(
            f"--first-view {share.first_view} leaves nothing of {config.crops.views} views (the "
            f"first is 0); raise --views"
        )
    require_precision(config.store.precision, execution.device, "store.precision")
    require_outside("--store", path, data)
    require_no_split("--store", path, data)
    teachers = load_teachers(config.teachers, execution.device)
    for teacher in teachers:
        for line in teacher.introduction("teacher"):
            say(line)
    data = map_classes(data, known_classes(teachers), "the teachers", teachers[0].classes)
    work = Labelling(config, data, teachers, execution)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path.absolute()
    with naming(path):
        require_place(path)
        take_over(path, execution.worker.name)
        once(
            path,
            "create",
            path.exists,
            lambda: create_store(work, path, strict=strict),
            share.leads,
        )
        # A killed process leaves the scratch folder of its repair. A folder in use is
        # protected by the claim.
        if repair.folder_of(path).exists():
            with claim(claims_of(path), "create") as mine:
                if mine:
                    shutil.rmtree(repair.folder_of(path), ignore_errors=True)
        writer, damage = opened(path)
        if damage:
            say(damage)
            # No process may extend the store while it is repaired.
            once(
                path,
                "create",
                lambda: not opened(path)[1],
                lambda: repair_store(work, path),
                share.leads,
                "grow",
            )
            writer = StoreWriter(path)
        begun = as_begun(config, writer.store.provenance)
        work = replace(work, config=begun)
        work = replace(work, data=_require_same(work, writer.store))
        writer = grown(writer, config.crops.views, share.leads)
        doubtful = _discard_damaged(writer, share, config.render.threads) if check else []
        _fill(work, writer, share, doubtful)
        return LabelStore.open(path)


def _require_same(work: Labelling, store: LabelStore) -> DataSet:
    """Require that the store was made by the same recipe from the same images.

    Returns the images as the store has them. Prints a change of GPU, and options of the
    command that have no effect on the store. Raises StoreError or DataError.
    """
    config, path = work.config, store.path
    if "imported" in store.provenance:
        raise StoreError(
            f"{path} holds labels that others made, which no teacher here can go on with; finish "
            f"or mend it with import-labels, or choose another --store"
        )
    refusals.require_same_recipe(store, config, work.teachers, work.device)
    refusals.require_same_classes(store, work.data, "pass that one again, or generate a new store")
    data = work.data.named(store.class_names)
    data = require_same_files(data, store.images, str(path))
    refusals.require_same_pixels(store, data, config.render.threads)
    if changed := refusals.changed_gpu(store, work.device):
        say(changed)
    if config.crops.views < store.views:
        say(f"{path} has {store.views} views already; none is taken away")
    if config.store.shard_rows not in (None, store.shard_rows):
        say(
            f"{path} keeps its shards of {store.shard_rows} rows; store.shard_rows "
            f"{config.store.shard_rows} is for a new store"
        )
    return data


def _discard_damaged(
    writer: StoreWriter, share: Share, threads: int | None
) -> list[tuple[int, int]]:
    """Verify the finished shards of this share, and remove the records of damaged
    shards.

    A shard without a record counts as unfinished, so it is labelled again. Returns
    (view, shard) of each damaged shard whose record was not removed, because another
    process holds the shard.
    """
    store, doubtful = writer.store, []
    places = share.places(store.finished())
    with (
        Progress("checking", len(places), "shards") as progress,
        ThreadPoolExecutor(min(threads_for(threads), CHECK_THREADS)) as pool,
    ):
        try:
            for (view, shard), fault in zip(
                places, pool.map(lambda place: store.fault(*place), places), strict=True
            ):
                if fault:
                    if not writer.discard(view, shard):
                        doubtful.append((view, shard))
                    say(
                        f"{place_of(store, [view], shard)}: damaged, and will be made anew: {fault}"
                    )
                progress.advance(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return doubtful


def _fill(
    work: Labelling, writer: StoreWriter, share: Share, doubtful: list[tuple[int, int]]
) -> None:
    """Label every unfinished shard of this share.

    A shard that another process holds is waited for, and labelled here if that process
    drops the shard or dies. doubtful: (view, shard) of damaged shards that other
    processes held when they were verified.
    """
    store, clock = writer.store, work.execution.clock
    size = [
        int((store.images.status[store.shard_slice(shard)] == USABLE).sum())
        for shard in range(store.shards)
    ]
    finished = store.finished()
    units = share.units(finished)
    if units and not os.access(store.path / "records", os.W_OK):
        raise StoreError(
            f"{store.path} is not finished and can't be written (Permission denied, or a read-only "
            f"file system); mend that, and run the same command again"
        )
    total = sum(len(unit.views) * size[unit.shard] for unit in units)
    threads = work.config.render.threads
    with (
        Progress("labelling", total, "crops") as progress,
        Reader(work.data, store.images, threads) as read,
        giving_way(work.device),
    ):
        clock.begin()
        label, waited = Labeller(work, writer, read), False
        while units or doubtful:
            free = FreeUnits(writer, share, units, progress)
            while True:
                label(free, progress)
                if not (free.unfinished() or doubtful):
                    break
                if not waited:
                    _say_who_is_at_work(writer)
                    waited = True
                free.wait(doubtful)
                if doubtful:
                    doubtful = [
                        place
                        for place in doubtful
                        if store.fault(*place) and not writer.discard(*place)
                    ]
                    break  # what was discarded is unfinished now
            finished = store.finished()
            units = share.units(finished)
    if progress.done:
        say(
            f"labelled {progress.done:,} crops in {duration(progress.seconds)}, "
            f"{progress.done / progress.seconds:,.1f} crops/s"
        )
        if clock.exact:
            for line in report(
                clock, LABELLING, advice_on_labelling(clock, work.config, work.device)
            ):
                say(line)
    _say_what_is_left(writer, share, int(finished.sum()))


def _say_who_is_at_work(writer: StoreWriter) -> None:
    """Print who holds what is left of a store."""
    store, busy = writer.store, ", ".join(sorted(set(holders(writer.claims))))
    # Records are counted and not read: many workers may wait, all at the same moment.
    places = np.ndindex(store.views, store.shards)
    done = sum(store.has_record(view, shard) for view, shard in places)
    say(
        f"{done} of {store.views * store.shards} shards are done; waiting for others who are at "
        f"work on {store.path} ({busy or 'they have just ended'})"
    )


def _say_what_is_left(writer: StoreWriter, share: Share, done: int) -> None:
    """Print how complete the store is, and tidy up a complete store. done: number of
    finished shards."""
    store, of = writer.store, writer.store.views * writer.store.shards
    if done == of:
        if os.access(store.path, os.W_OK):
            writer.tidy()
        sweep(writer.claims)
        say(f"{store.path} is complete: {of} of {of} shards")
    elif share.workers > 1 and not share.open:
        say(
            f"this worker's share is done; {of - done} of {of} shards of {store.path} are left to "
            f"the other workers"
        )
    else:
        say(
            f"views {share.first_view} to {store.views - 1} are done; {of - done} of {of} shards "
            f"of {store.path} are left"
        )
