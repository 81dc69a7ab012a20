"""Which unit of work a worker takes next, where others hold and finish units."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from support import stores

from cache.system.claims import _me, claims_of
from cache.system.processes import started
from cache.writer import StoreWriter
from pipeline.labelling.free_units import FreeUnits
from pipeline.labelling.shares import Share
from pipeline.runtime.progress import Progress

VIEWS, DECODES = 4, 2
UNITS = [([v, v + 1], s) for v in (0, 2) for s in range(stores.SHARDS)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    stores.create(tmp_path / "s.zarr", views=VIEWS)
    return tmp_path / "s.zarr"


@pytest.fixture
def free(path: Path) -> Callable[..., FreeUnits]:
    def free(worker: int = 0, *, alone: bool = False) -> FreeUnits:
        share = Share(worker, 1, 0, DECODES, open=not alone)
        writer = StoreWriter(path)
        units = share.units(writer.store.finished())
        return FreeUnits(writer, share, units, Progress("labelling", 0, "crops"))

    return free


def taken(units: FreeUnits) -> list[tuple[list[int], int]]:
    return [(unit.views, unit.shard) for unit in units]


def places(units: list[tuple[list[int], int]]) -> list[tuple[int, int]]:
    return [(view, shard) for views, shard in units for view in views]


def hold(path: Path, *names: str, dead: bool = False) -> None:
    """Leave claims of a living process, or of a process that is gone."""
    process = stores.dead_process() if dead else os.getppid()
    claims_of(path).mkdir(exist_ok=True)
    for name in names:
        owner = _me() | {"process": process, "started": started(process) or "0"}
        (claims_of(path) / name).write_text(json.dumps(owner))


def test_a_worker_alone_takes_all_units_in_their_order(free):
    assert taken(free(alone=True)) == UNITS
    assert taken(free()) == UNITS


def test_workers_that_look_at_the_same_moment_take_different_units(free):
    first = [next(iter(free(worker))) for worker in range(10)]
    assert [(unit.views, unit.shard) for unit in first] == [*UNITS]
    assert next(iter(free(23))).shard == 3  # 23 is more than there are units


def test_what_others_hold_and_finish_is_passed_over_and_counted(free, path):
    units = free()
    hold(path, "0-1", "1-1", "2-0")
    stores.fill(path, (0, 0))
    busy = {(0, 0), (0, 1), (1, 1), (2, 0)}
    assert sorted(places(taken(units))) == sorted({*places(UNITS)} - busy)
    assert units.progress.elsewhere == 15  # usable images of shard 0
    assert sorted(units.unfinished()) == sorted({*places(UNITS)} - {(0, 0)})


def test_what_a_dead_worker_held_is_taken_last(free, path):
    hold(path, "0-0", "1-0", dead=True)
    hold(path, "0-1", "1-1")
    order = places(taken(free()))
    assert sorted(order[-2:]) == [(0, 0), (1, 0)]
    assert sorted(order) == sorted({*places(UNITS)} - {(0, 1), (1, 1)})


def test_where_fewer_units_are_free_than_held_they_are_handed_out_view_by_view(free, path):
    hold(path, *(f"{view}-{shard}" for view in (0, 1) for shard in range(stores.SHARDS)))
    hold(path, "2-0", "3-0")
    units = free()
    assert next(iter(units)).views == [2]
    assert next(iter(units)).views in ([2], [3])


def test_a_shard_whose_record_promises_lost_data_is_handed_out(free, path):
    stores.fill(path, (0, 0))
    for file in (path / "labels" / "c" / "0" / "0").rglob("*"):
        if file.is_file():
            file.unlink()
    assert taken(free())[0] == ([0, 1], 0)


def test_what_was_taken_and_not_finished_is_left(free):
    units = free()
    next(iter(units))
    assert (0, 0) in units.unfinished() and (1, 0) in units.unfinished()
    assert taken(units) == UNITS


def test_waiting_ends_when_a_holder_has_finished_or_is_gone(free, path):
    for view in range(VIEWS):
        for shard in range(1, stores.SHARDS):
            stores.fill(path, (view, shard))
    hold(path, *(f"{view}-0" for view in range(VIEWS)))
    units = free()
    assert taken(units) == []
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(units.wait, [])
        time.sleep(2.5)
        assert not waiting.done()
        hold(path, "3-0", dead=True)
        waiting.result(30)
        assert taken(units) == [([3], 0)]
        waiting = pool.submit(units.wait, [])
        time.sleep(1.5)
        assert not waiting.done()
        stores.fill(path, *((view, 0) for view in range(VIEWS)))
        waiting.result(30)
    assert units.unfinished() == []
