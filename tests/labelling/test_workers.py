"""Many workers on one store, stopped by signals, a full disk or missing permissions.
Whatever happens, no shard is written by two workers at once, finished shards stay, an
error is told in one line, and the store ends as the store of a single undisturbed
process.

The workers are real processes that run the real command line. They are forked from a
server that has imported every module (see support/killing.py).
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.killing import HANGS
from support.paths import ROOT
from support.workers import (
    FILLER,
    ROWS,
    SLOW,
    SOON,
    VIEWS,
    House,
    Place,
    Run,
    When,
    require_no_trace,
    require_single_writers,
    tree,
)

from cache import LabelStore
from cache.system.claims import STALE, claims_of
from cache.verify import verify

# ---- sharing the work


def torchrun(rank: int, world: int) -> dict[str, str]:
    """Return the environment that torchrun gives a process."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
    }


def slurm_array(task: int, tasks: int) -> dict[str, str]:
    """Return the environment that SLURM gives a task of an array."""
    return {
        "SLURM_JOB_ID": str(70 + task),
        "SLURM_ARRAY_JOB_ID": "70",
        "SLURM_ARRAY_TASK_ID": str(task),
        "SLURM_ARRAY_TASK_MAX": str(tasks - 1),
        "SLURM_ARRAY_TASK_COUNT": str(tasks),
    }


def kubernetes(index: int, job: str = "3f6c") -> dict[str, str]:
    """Return the environment that an Indexed Job gives a worker, as the project's
    manifest has it."""
    return {"JOB_COMPLETION_INDEX": str(index), "OFFLINE_MEAL_JOB": job}


WAYS: dict[str, list[dict]] = {
    "torchrun": [{"environment": torchrun(rank, 3)} for rank in range(3)],
    "SLURM array": [{"worker": f"{i}/3"} for i in range(3)],
    "array of torchruns": [
        {"worker": f"{i}/2", "environment": torchrun(rank, 2)}
        for i in range(2)
        for rank in range(2)
    ],
    "by hand": [{}, {}, {}],
    "Kubernetes": [{"worker": "auto", "environment": kubernetes(i)} for i in range(3)],
    "SLURM, open": [{"worker": "auto", "environment": slurm_array(i, 3)} for i in range(3)],
    "auto by hand": [{"worker": "auto"}] * 3,
}


@pytest.mark.parametrize("way", WAYS)
def test_however_workers_share_a_store_it_is_that_of_one_process_and_no_shard_is_written_twice(
    place, way
):
    workers = [
        place.start(
            *([f"--worker={worker['worker']}"] if "worker" in worker else []),
            environment=worker.get("environment", {}),
            slow=SLOW,
        )
        for worker in WAYS[way]
    ]
    assert [worker.end() for worker in workers] == [0] * len(workers), "\n\n".join(
        worker.said() for worker in workers
    )
    place.require_whole()
    assert len({write.process for write in place.writes()}) > 1  # several workers shared the store
    said = [worker.said().splitlines()[-1] for worker in workers]
    ends = [
        re.search(r"is complete: 15 of 15 shards|this worker's share is done", line)
        for line in said
    ]
    assert all(ends), said
    assert any("is complete" in line for line in said), said
    if "by hand" in way or "auto" in str(WAYS[way]):  # without shares nobody waits for a share
        assert not any("this worker's share" in line for line in said), said


def test_a_second_run_on_a_store_shares_the_work_and_says_who_else_is_at_it(place):
    first = place.start(whens=(When("rename", r"s\.zarr/labels/c/0/1/0$", "hold"),))
    first.wait_held()
    second = place.start()
    second.wait_for(
        f"shards are done; waiting for others who are at work on {place.path} "
        f"({socket.gethostname()}:{first.process.pid})"
    )
    first.release()
    assert [first.end(), second.end()] == [0, 0]
    assert all("is complete: 15 of 15 shards" in run.said() for run in (first, second))
    before = tree(place.path)
    assert "is complete: 15 of 15 shards" in place.run()  # a run on a complete store
    assert tree(place.path) == before
    place.require_whole()


def test_what_a_run_passed_by_because_another_had_it_is_not_forgotten_when_that_one_dies(place):
    """Of two runs started by hand, the second passes by the first one's unit. When the
    first is killed, only the second is left to label the unit."""
    first = place.start(whens=(When("rename", r"s\.zarr/labels/c/0/1/0$", "hold"),))
    first.wait_held()
    second = place.start(whens=(When("rename", r"s\.zarr/records/c/2/4/0$", "hold"),))
    second.wait_held()
    first.kill()
    second.release()
    assert second.end() == 0, second.said()
    assert "is complete: 15 of 15 shards" in second.said()
    place.require_whole(first, second)


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOTSUP])
def test_on_a_file_system_without_hard_links_workers_share_a_store_and_survive_a_kill(
    place, number
):
    """Such as exFAT: no links, no permissions, no times, no fsync of a folder."""
    poor = {"slow": SLOW, "refuses": number}
    killed = place.start(whens=(When("write", r"labels/.*\.partial$", "SIGKILL", nth=2),), **poor)
    other = place.start(**poor)
    assert killed.end() == -signal.SIGKILL
    assert other.end() == 0, other.said()
    place.run(refuses=number)
    place.require_whole(killed)


@pytest.mark.parametrize("workers", [2, 5])
def test_a_dead_workers_share_is_finished_by_any_other_number_of_workers(place, workers):
    place.begin(VIEWS, labelled=0)
    dead = place.start(
        "--worker=1/3", whens=(When("rename", r"s\.zarr/(boxes|records)/", "SIGKILL", nth=4),)
    )
    others = [place.start(f"--worker={i}/3") for i in (0, 2)]
    assert dead.end() == -signal.SIGKILL
    assert [other.end() for other in others] == [0, 0]
    assert LabelStore.open(place.path).progress()[0] < 15
    kept = place.kept()
    again = [place.start(f"--worker={i}/{workers}") for i in range(workers)]
    assert [run.end() for run in again] == [0] * workers, "\n\n".join(run.said() for run in again)
    now = place.kept()
    assert {name: now[name] for name in kept} == kept  # no finished file was touched
    place.require_whole(dead)


def claimed_elsewhere(place: Place, name: str, worker: str | None = None) -> Path:
    """Leave a claim of another machine's process, with the host name and the process
    number of this process. worker: its name in its engine."""
    from cache.system.claims import _me

    claims_of(place.path).mkdir(exist_ok=True)
    theirs = claims_of(place.path) / name
    theirs.write_text(json.dumps(_me() | {"boot": "another", "worker": worker}))
    return theirs


def test_a_claim_from_another_machine_is_respected_while_it_beats_and_taken_over_once_it_is_stale(
    place,
):
    """A container elsewhere may have this host name and process number, and can't be
    asked whether it lives."""

    place.begin(VIEWS, labelled=0)
    theirs = claimed_elsewhere(place, "1-2")
    os.utime(theirs, (time.time() - STALE + 60,) * 2)
    run = place.start()
    run.wait_for("14 of 15 shards are done; waiting for others who are at work on")
    time.sleep(2.5)
    assert run.process.exitcode is None and f":{os.getpid()})" in run.said()
    assert (1, 2) not in {(write.view, write.shard) for write in place.writes()}
    assert os.listdir(claims_of(place.path)) == ["1-2"]
    os.utime(theirs, (time.time() - STALE - 60,) * 2)
    assert run.end() == 0 and "is complete: 15 of 15" in run.said()
    place.require_whole()


def test_a_worker_that_its_engine_starts_anew_has_its_predecessors_claims_at_once(place):
    """Kubernetes puts the pod of a lost node on another node, under the same index. The
    claims of other indices and of other jobs are respected."""
    place.begin(VIEWS, labelled=0)
    own = claimed_elsewhere(place, "1-2", "kubernetes 3f6c 4")
    index = claimed_elsewhere(place, "0-1", "kubernetes 3f6c 3")
    job = claimed_elsewhere(place, "2-0", "kubernetes ffff 4")
    run = place.start("--worker=auto", environment=kubernetes(4))
    run.wait_for("13 of 15 shards are done; waiting for others")
    assert "released 1 claim that its predecessor left" in run.said()
    assert not own.exists() and index.exists() and job.exists()
    assert (1, 2) in {(write.view, write.shard) for write in place.writes()}
    again = [place.start("--worker=auto", environment=kubernetes(3))]
    again += [place.start("--worker=auto", environment=kubernetes(4, "ffff"))]
    assert [one.end() for one in (run, *again)] == [0, 0, 0]
    place.require_whole()


def test_any_open_worker_creates_the_store(place):
    """Worker 0 may be waiting for a node."""
    place.run("--worker=auto", environment=kubernetes(5))
    place.require_whole()


def test_a_worker_never_takes_the_claims_of_a_living_process_of_its_own_name(place):
    """Two processes of one name on one machine: a batch script started two."""
    place.begin(VIEWS, labelled=0)
    slurm = {"SLURM_JOB_ID": "70"}
    when = When("rename", r"s\.zarr/labels/c/0/1/0$", "hold")
    first = place.start("--worker=auto", environment=slurm, whens=(when,))
    first.wait_held()
    second = place.start("--worker=auto", environment=slurm)
    second.wait_for("waiting for others who are at work on")
    assert "released" not in second.said()
    first.release()
    assert [first.end(), second.end()] == [0, 0]
    place.require_whole()


def test_a_container_of_this_machine_under_the_same_name_keeps_its_claims_while_its_heart_beats(
    place,
):
    """Two containers of one pod or of one batch script have one name and one machine,
    and can't look at each other's processes."""
    from cache.system.claims import _me

    place.begin(VIEWS, labelled=0)
    claims_of(place.path).mkdir()
    beating, silent = claims_of(place.path) / "1-2", claims_of(place.path) / "0-1"
    for theirs in (beating, silent):
        theirs.write_text(json.dumps(_me() | {"namespace": "x", "worker": "kubernetes 3f6c 4"}))
    os.utime(silent, (time.time() - 200,) * 2)
    # a heart that beats ten times as fast as others
    run = place.start("--worker=auto", environment=kubernetes(4), stale=10.0)
    for _ in range(6):
        os.utime(beating)
        time.sleep(0.5)
    run.wait_for("released 1 claim that")
    assert beating.exists() and not silent.exists()
    os.utime(beating, (time.time() - 20,) * 2)
    assert run.end() == 0, run.said()
    place.require_whole()


def test_a_claim_that_cannot_be_taken_over_yet_is_waited_for_without_haste(place):
    """A worker elsewhere was killed while it took a dead claim over: its right to do so
    is respected until it is stale."""
    place.begin(VIEWS, labelled=0)
    theirs = claimed_elsewhere(place, "1-2")
    os.utime(theirs, (time.time() - STALE - 60,) * 2)
    heir = claimed_elsewhere(place, "1-2.heir")
    run = place.start("--worker=auto", environment=kubernetes(4))
    run.wait_for("14 of 15 shards are done; waiting")

    def cpu() -> int:
        return sum(map(int, Path(f"/proc/{run.process.pid}/stat").read_text().split()[13:15]))

    time.sleep(1.0)
    before = cpu()
    time.sleep(4.0)
    assert cpu() - before < 0.5 * 4 * os.sysconf("SC_CLK_TCK")
    os.utime(heir, (time.time() - STALE - 60,) * 2)
    assert run.end() == 0, run.said()
    place.require_whole()


def test_a_lost_workers_units_are_taken_by_any_open_worker(place):
    place.begin(VIEWS, labelled=0)
    lost = place.start(
        "--worker=auto",
        environment=kubernetes(0),
        whens=(When("rename", r"s\.zarr/(boxes|records)/", "SIGKILL", nth=4),),
    )
    assert lost.end() == -signal.SIGKILL
    place.run("--worker=auto", environment=kubernetes(7))
    place.require_whole(lost)


def test_a_damaged_shard_is_found_by_one_of_the_open_workers(place):
    """Where the number of workers isn't known, worker 0 reads all finished shards."""
    place.begin(VIEWS)
    file = place.path / "labels" / "c" / "1" / "2" / "0"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert "is complete" in place.run("--worker=auto", environment=kubernetes(2))
    assert file.read_bytes() == bytes(content)
    assert "damaged, and will be made anew" in place.run("--worker=auto", environment=kubernetes(0))
    place.require_whole()


def test_a_living_worker_of_another_host_keeps_its_shards_and_a_killed_one_loses_them(place):
    """The worker's claims beat while it takes its time. When it is killed, other hosts
    notice once its claims are stale."""
    place.begin(VIEWS, labelled=0)
    stale = 2.0
    elsewhere = place.start(
        host="elsewhere", stale=stale, whens=(When("rename", r"s\.zarr/labels/c/0/1/0$", "hold"),)
    )
    elsewhere.wait_held()
    run = place.start(stale=stale)
    run.wait_for(
        f"shards are done; waiting for others who are at work on {place.path} "
        f"(elsewhere:{elsewhere.process.pid})"
    )
    done = LabelStore.open(place.path).progress()
    assert done < (15, 15)
    time.sleep(1.5 * stale)
    assert run.process.exitcode is None and LabelStore.open(place.path).progress() == done
    elsewhere.kill()
    assert run.end() == 0 and "is complete: 15 of 15" in run.said()
    place.require_whole(elsewhere)


def test_a_worker_that_waits_for_another_stops_at_once_when_it_is_asked_to(place):
    first = place.start(whens=(When("rename", r"s\.zarr/labels/c/0/1/0$", "hold"),))
    first.wait_held()
    second = place.start()
    second.wait_for("waiting for others")
    second.signal("SIGTERM")
    assert second.failed_with().startswith("stopped by SIGTERM") and second.stopped_after() < 3
    first.release()
    assert first.end() == 0
    place.require_whole(first, second)


def test_a_damaged_shard_that_another_holds_is_not_called_complete(place):
    """The claim is a dead container's. Until it is stale, it looks like a living
    container's."""
    place.begin(VIEWS)
    file = place.path / "labels/c/1/2/0"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    theirs = claimed_elsewhere(place, "1-2")
    run = place.start()
    run.wait_for("waiting for others")
    assert "is complete" not in run.said() and "damaged, and will be made anew" in run.said()
    os.utime(theirs, (time.time() - STALE - 60,) * 2)
    assert run.end() == 0 and "is complete: 15 of 15" in run.said()
    place.require_whole()


def test_a_sleeper_whose_shard_was_taken_over_drops_it(place):
    """The process is stopped for longer than its claim lives, as by a laptop's lid or a
    file system that hangs."""
    place.begin(VIEWS, labelled=13)
    stale = 2.0
    sleeper = place.start(
        host="elsewhere",
        stale=stale,
        whens=(When("read", r"data/train/.*jpg$", "hold", after=r"claims/2-4$"),),
    )
    sleeper.wait_held()
    os.kill(sleeper.process.pid, signal.SIGSTOP)
    try:
        place.run(stale=stale)
        before = place.kept()
    finally:
        os.kill(sleeper.process.pid, signal.SIGCONT)
    sleeper.release()
    assert (
        sleeper.end() == 0
        and "was taken over by another process while this one slept" in sleeper.said()
    )
    assert place.kept() == before
    assert tree(place.path) == tree(place.whole)


def test_a_store_that_is_called_by_two_names_has_one_set_of_claims(place, tmp_path):
    link = tmp_path / "home" / "mine.zarr"
    link.parent.mkdir()
    link.symlink_to(place.path)  # the store is not there yet
    arguments = [
        "generate-labels",
        f"--config={place.house.config}",
        f"--data={place.house.data}",
        f"--store={link}",
        "--device=cpu",
    ]
    one = place.house.start(
        *arguments, log=str(place.log), whens=(When("rename", r"s\.zarr/labels/c/0/1/0$", "hold"),)
    )
    one.wait_held()
    other = place.start()
    other.wait_for("waiting for others")
    one.release()
    assert [one.end(), other.end()] == [0, 0], one.said() + other.said()
    place.require_whole()
    assert len(place.writes()) == 15 and os.listdir(link.parent) == ["mine.zarr"]


def test_nobody_extends_a_store_that_is_being_mended(place):
    place.begin(VIEWS)
    (place.path / "flips/zarr.json").write_text("{}")
    mender = place.start(whens=(When("rename", r"s\.zarr/zarr\.json$", "hold"),))
    mender.wait_held()
    larger = place.start("--views=4")
    larger.wait_for("waiting for another process to grow")
    mender.release()
    assert [mender.end(), larger.end()] == [0, 0], mender.said() + larger.said()
    place.whole = place.whole.with_name("4.zarr")
    place.require_whole()


def test_what_a_killed_mender_left_is_in_nobodys_way(place):
    """The mender had another recipe, and was killed while its links to the labels were
    there."""
    place.begin(VIEWS)
    (place.path / "zarr.json").write_text("{}")
    mender = place.start(
        "--set", "crops.seed=7", whens=(When("read", r"mending/s\.zarr/records/c/", "hold"),)
    )
    mender.wait_held()
    other = place.start()
    other.wait_for("waiting for another process to create")
    mender.kill()
    assert other.end() == 0, other.said()
    place.require_whole(mender, other)


# ---- making and extending a store together


@pytest.mark.parametrize("shares", [("0/1", "0/1"), ("0/2", "1/2")])
def test_of_two_that_make_one_store_at_once_one_creates_it_and_both_fill_it(place, shares):
    """Both runs are held at the first claim, and released at once."""
    both = [
        place.start(
            f"--worker={share}", slow=SLOW, whens=(When("link", r"s\.zarr\.claims/", "hold"),)
        )
        for share in shares
    ]
    for run, share in zip(both, shares, strict=True):
        run.wait_held() if share.startswith("0/") else run.wait_for(
            "waiting for worker 0 to create"
        )
    for run in both:
        run.release()
    assert [run.end() for run in both] == [0, 0], "\n\n".join(run.said() for run in both)
    said = [run.said() for run in both]
    assert sum(f"created {place.path}" in text for text in said) == 1
    assert all(
        f"created {place.path}" in text or f"to create {place.path}" in text for text in said
    ), said
    place.require_whole()
    assert len({write.process for write in place.writes()}) == 2


def test_a_worker_waits_for_worker_0_and_goes_on_when_that_is_killed_and_started_again(
    place,
):
    reading = r"data/train/.*jpg$"
    zero = place.start("--worker=0/2", whens=(When("read", reading, "hold", nth=10),))
    zero.wait_held()
    one = place.start("--worker=1/2")
    one.wait_for(f"waiting for worker 0 to create {place.path}")
    zero.kill()
    zero = place.start(
        "--worker=0/2", whens=(When("write", r"creating/images/", "SIGKILL", nth=5),)
    )
    assert zero.end() == -signal.SIGKILL
    zero = place.start("--worker=0/2")
    assert [zero.end(), one.end()] == [0, 0], zero.said() + one.said()
    place.require_whole()


def test_a_run_that_waits_for_another_to_make_the_store_makes_it_itself_when_that_one_dies(place):
    """Started by hand, both runs are worker 0, and no other worker will come."""
    first = place.start(whens=(When("read", r"data/train/.*jpg$", "hold", nth=10),))
    first.wait_held()
    second = place.start(patience=3.0)
    second.wait_for(f"to create {place.path}")
    first.kill()
    assert second.end() == 0, second.said()
    place.require_whole()


def test_a_store_may_be_extended_while_another_run_still_labels_it(place):
    place.begin(2, labelled=3)
    first = place.start("--views=2", whens=(When("rename", r"s\.zarr/labels/c/1/1/0$", "hold"),))
    first.wait_held()
    larger = place.start("--views=4")
    larger.wait_for(
        f"waiting for others who are at work on {place.path} "
        f"({socket.gethostname()}:{first.process.pid})"
    )
    assert f"extending {place.path} from 2 to 4 views" in larger.said()
    first.release()
    assert [first.end(), larger.end()] == [0, 0], first.said() + larger.said()
    place.whole = place.whole.with_name("4.zarr")
    place.require_whole()


@pytest.mark.parametrize("views", [(4, 3), (3, 4)])
def test_two_that_extend_a_store_at_once_extend_it_once_and_to_the_larger_number(place, views):
    """The second run comes in the middle of the first run's growth. It waits, or
    refuses in a line that says when to run again."""
    place.begin(2)
    before = place.path / "labels" / "c" / "0" / "0" / "0"
    inode = before.stat().st_ino
    first = place.start(
        f"--views={views[0]}", whens=(When("rename", r"s\.zarr/boxes/zarr\.json$", "hold"),)
    )
    first.wait_held()
    second = place.start(f"--views={views[1]}")
    second.wait(
        lambda: "by another process" in second.said() or "waiting" in second.said(),
        "said that another is at it",
    )
    first.release()
    assert first.end() == 0, first.said()
    if second.end():
        assert (
            "is being extended by another process right now; run this command again"
            in second.failed_with()
        )
        place.run(f"--views={views[1]}")
    place.whole = place.whole.with_name("4.zarr")
    place.require_whole()
    assert before.stat().st_ino == inode


def test_a_worker_waits_while_worker_0_extends_the_store(place):
    place.begin(2)
    zero = place.start(
        "--worker=0/2", "--views=4", whens=(When("rename", r"s\.zarr/flips/zarr\.json$", "hold"),)
    )
    zero.wait_held()
    one = place.start("--worker=1/2", "--views=4")
    one.wait_for(f"waiting for worker 0 to grow {place.path}")
    zero.kill()  # half way
    zero = place.start("--worker=0/2", "--views=4")
    assert [zero.end(), one.end()] == [0, 0], zero.said() + one.said()
    place.whole = place.whole.with_name("4.zarr")
    place.require_whole()
    assert len({write.process for write in place.writes()}) == 2


def test_fewer_views_take_none_away_not_even_from_a_store_that_is_growing(place):
    place.begin(VIEWS)
    before = tree(place.path)
    assert f"{place.path} has {VIEWS} views already; none is taken away" in place.run("--views=1")
    assert "keeps its shards of" in place.run("--set", "store.shard_rows=3")
    assert tree(place.path) == before
    larger = place.start(
        "--views=4", whens=(When("rename", r"s\.zarr/records/zarr\.json$", "hold"),)
    )
    larger.wait_held()
    smaller = place.start("--views=1")
    time.sleep(0.5)
    larger.release()
    assert larger.end() == 0
    assert smaller.end() == 0 or "run this command again" in smaller.failed_with()
    place.whole = place.whole.with_name("4.zarr")
    place.require_whole()


# ---- asked to stop


MOMENTS: dict[str, When] = {
    "looking at the images": When("read", r"data/train/.*jpg$", "", nth=12),
    "making the empty store": When("write", r"creating/images/height/c", ""),
    "naming the store": When("rename", r"/s\.zarr$", ""),
    "claiming": When("link", r"claims/0-0$", ""),
    "having claimed": When("remove", r"claims/1-0\..*\.new$", ""),
    "labelling": When("read", r"data/train/.*jpg$", "", nth=2, after=r"claims/1-2$"),
    "writing a shard": When("write", r"s\.zarr/labels/c/1/1/.*partial$", ""),
    "between the shard and its record": When("write", r"s\.zarr/records/c/0/2/.*partial$", ""),
    "writing the last record of a unit": When("rename", r"s\.zarr/records/c/1/2/0$", ""),
    "letting go of claims": When("remove", r"claims/1-1$", ""),
    "ending": When("rename", r"s\.zarr/records/c/2/4/0$", ""),
}


def either(moments: dict[str, When], both: str) -> list[tuple[str, str]]:
    """Pair each moment with one of the signals, which are handled alike, and the moment
    ``both`` with both."""
    names = itertools.cycle(["SIGTERM", "SIGINT"])
    return sorted(
        {*zip(moments, names, strict=False), (both, "SIGTERM"), (both, "SIGINT")},
        key=lambda case: (list(moments).index(case[0]), case[1]),
    )


def require_stopped(run: Run, name: str) -> None:
    assert (
        run.failed_with()
        == f"stopped by {name}; run the same command again to go on from what is finished"
    )
    assert run.stopped_after() < SOON


@pytest.mark.parametrize(("moment", "name"), either(MOMENTS, both="writing a shard"))
def test_asked_to_stop_it_does_so_in_order_and_goes_on_to_the_same_bytes(place, moment, name):
    run = place.start(whens=(replace(MOMENTS[moment], then=name),))
    require_stopped(run, name)
    left, kept = place.left(), place.kept()
    require_single_writers(place.writes())
    finished = LabelStore.open(place.path).finished() if kept else np.zeros((VIEWS, 5), bool)
    place.run()
    now = place.kept()
    assert {file: now[file] for file in kept} == kept
    place.require_whole()
    scanned = {"s.zarr.scan"} if moment == "looking at the images" else set()
    assert left == scanned, "the stopped run left something"
    if moment in (
        "labelling",
        "writing a shard",
        "between the shard and its record",
        "writing the last record of a unit",
    ):
        said = re.search(r"(\d+) of 15 shards are done; (.*)$", run.said(), re.M)
        assert said and int(said[1]) == finished.sum(), run.said()
        dropped = re.search(r"views? ([\d, ]+), rows (\d+) to", said[2])
        for view in dropped[1].split(",") if dropped and "dropped" in said[2] else ():
            assert not finished[int(view), int(dropped[2]) // ROWS], (
                f"it says that view {view} is dropped, which is finished: {said[0]}"
            )


def test_asked_to_stop_from_outside_at_any_time_it_does_so_in_order(place):
    """The moments above are met on purpose, these by chance."""
    rng = np.random.default_rng()
    started = time.monotonic()
    place.run()
    seconds = time.monotonic() - started
    shutil.rmtree(place.path)
    place.log.write_text("")
    stopped = 0
    for _ in range(8):
        run = place.start()
        run.wait_for("teacher")
        time.sleep(rng.random() * seconds / 2)
        with suppress(ProcessLookupError):
            run.signal(str(rng.choice(["SIGTERM", "SIGINT"])))
        # The second condition: the run was stopped on its way out.
        if run.end() == 0 or "is complete" in run.said():
            break
        stopped += 1
        assert re.match(r"stopped by SIG(TERM|INT); run the same command again", run.failed_with())
        assert run.stopped_after() < SOON
        assert place.left() <= {"s.zarr.scan"}
    assert stopped
    place.run()
    place.require_whole()


def test_asked_to_stop_among_hundreds_of_files_it_does_not_look_at_the_rest_first(place):
    many = place.folder.with_name("many")
    for number, photo in itertools.product(
        range(20), sorted((place.house.data / "train").glob("*/*.jpg"))
    ):
        copy = many / photo.parent.name / f"{number}-{photo.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        os.link(photo, copy)
    for name in ("SIGTERM", "SIGINT"):
        run = place.start(
            data=many,
            whens=(
                When("read", r"many/.*jpg$", name, nth=100),
                When("read", r"many/.*jpg$", "SIGKILL", nth=300),
            ),
        )
        require_stopped(run, name)
        assert place.left() == {"s.zarr.scan"}


@pytest.mark.parametrize("waiting", ["create", "grow"])
def test_asked_to_stop_while_it_waits_for_worker_0_it_does_so(place, waiting):
    if waiting == "grow":
        place.begin(2)
    run = place.start("--worker=1/2", "--views=3")
    run.wait_for(f"waiting for worker 0 to {waiting}")
    run.signal("SIGTERM")
    require_stopped(run, "SIGTERM")
    assert not place.left()


@pytest.mark.parametrize(
    "moment",
    [
        ("write", r"/zarr\.json\..*partial$"),
        ("rename", r"s\.zarr/flips/zarr\.json$"),
        ("rename", r"s\.zarr/zarr\.json$"),
    ],
)
def test_asked_to_stop_while_it_extends_a_store_it_leaves_nothing_half(place, moment):
    place.begin(2)
    run = place.start("--views=3", whens=(When(*moment, "SIGTERM"),))
    require_stopped(run, "SIGTERM")
    assert not place.left()
    assert LabelStore.open(place.path).views in (2, 3)
    place.run("--views=3")
    place.require_whole()


def test_asked_to_stop_while_something_is_thrown_away_it_hears_it(place):
    """Python ignores an error in a destructor, also the error that a signal's handler
    raises there. DALI's destructors take their time."""
    run = place.start(whens=(When("forget", "pipeline", "SIGTERM"),))
    require_stopped(run, "SIGTERM")
    assert not place.left()
    place.run()
    place.require_whole()


def test_asked_to_stop_while_it_checks_what_is_finished_it_does_so(place):
    place.begin(VIEWS)
    run = place.start(whens=(When("read", r"s\.zarr/labels/c/1/", "SIGTERM"),))
    require_stopped(run, "SIGTERM")
    place.require_whole()


def test_a_job_of_several_workers_that_is_preempted_goes_on_with_another_number(place):
    """All workers get SIGTERM, as from SLURM and torchrun."""
    second = When("write", r"s\.zarr/labels/c/.*partial$", "SIGTERM", nth=2)
    workers = [place.start(environment=torchrun(rank, 3), whens=(second,)) for rank in range(3)]
    for worker in workers:
        require_stopped(worker, "SIGTERM")
    left, kept = place.left(), place.kept()
    again = [place.start(f"--worker={i}/2") for i in range(2)]
    assert [run.end() for run in again] == [0, 0]
    now = place.kept()
    assert kept and {file: now[file] for file in kept} == kept
    place.require_whole()
    assert not left, "the stopped runs left something"


def test_one_of_several_workers_is_stopped_and_the_others_go_on(place):
    moment = "write", r"s\.zarr/flips/c/1/.*partial$"
    stopped = place.start(whens=(When(*moment, "hold"), When(*moment, "SIGTERM")))
    stopped.wait_held()
    other = place.start(whens=(When("rename", r"s\.zarr/records/c/", "hold"),))
    other.wait_held()
    stopped.release()
    require_stopped(stopped, "SIGTERM")
    other.release()
    assert other.end() == 0, other.said()
    place.run()
    place.require_whole()


def test_asked_twice_to_stop_it_does_not_finish_the_shard(place):
    """A disk that hangs must not keep a process alive that is asked to stop again."""
    run = place.start(whens=(When("write", r"s\.zarr/labels/c/1/1/.*partial$", "hold"),))
    run.wait_held()
    run.signal("SIGTERM")
    time.sleep(0.3)
    assert run.process.exitcode is None and "stopped" not in run.said()
    run.signal("SIGTERM")
    time.sleep(0.3)
    run.release()
    require_stopped(run, "SIGTERM")
    assert not LabelStore.open(place.path).finished()[1, 1]
    place.run()
    place.require_whole(run)


def test_asked_to_stop_while_it_still_imports_a_real_process_ends_in_order(place):
    arguments = [
        "generate-labels",
        f"--config={place.house.config}",
        f"--data={place.house.data}",
        f"--store={place.path}",
    ]
    process = subprocess.Popen(
        [sys.executable, ROOT / "cli.py", *arguments], stderr=subprocess.PIPE, text=True
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=HANGS)
    assert said == "stopped by SIGTERM; run the same command again to go on from what is finished\n"
    assert process.returncode == 1


# ---- training


class Training:
    """The training of a student from the whole store."""

    def __init__(self, house: House, store: Path, out: Path) -> None:
        self.house, self.store, self.out = house, store, out

    def start(self, **how: Any) -> Run:
        arguments = [
            "train-student",
            f"--config={self.house.config}",
            f"--data={self.house.data}",
            f"--store={self.store}",
        ]
        return self.house.start(*arguments, f"--out={self.out}", "--device=cpu", **how)

    def files(self) -> set[str]:
        """List the names in the run's folder, without time and process in the names of
        event files."""
        return {name.partition("tfevents")[0] for name in os.listdir(self.out)}

    def result(self) -> tuple[bytes, bytes, list[dict]]:
        """Return both models, and the metrics without times."""
        timed = ("seconds", "images_per_second")
        metrics = [
            json.loads(line) for line in (self.out / "metrics.jsonl").read_text().splitlines()
        ]
        kept = [{key: value for key, value in line.items() if key not in timed} for line in metrics]
        return (
            (self.out / "last.safetensors").read_bytes(),
            (self.out / "best.safetensors").read_bytes(),
            kept,
        )


@pytest.fixture(scope="module")
def trained(house, whole) -> Training:
    training = Training(house, whole, house.folder / "uninterrupted" / "run")
    training.out.parent.mkdir()
    run = training.start()
    assert run.end() == 0, run.said()
    return training


TRAINING: dict[str, When] = {
    "at its start": When("read", r"3\.zarr/images/path/c/", ""),
    "the first epoch": When("read", r"data/train/.*jpg$", "", nth=10, after=r"run/config\.yaml$"),
    # An epoch has 18 pictures. The first epoch is validated at this moment.
    "the second epoch": When("read", r"data/train/.*jpg$", "", nth=28, after=r"run/config\.yaml$"),
    "writing the state": When("rename", r"run/state\.pt$", ""),
    "writing the metrics": When("write", r"run/\.metrics\.jsonl\.partial$", "", nth=2),
}


@pytest.mark.parametrize(("moment", "name"), either(TRAINING, both="the second epoch"))
def test_training_that_is_asked_to_stop_does_so_and_ends_as_if_it_had_not_been(
    house, whole, trained, tmp_path, moment, name
):
    training = Training(house, whole, tmp_path / "run")
    run = training.start(whens=(replace(TRAINING[moment], then=name),))
    require_stopped(run, name)
    left = {file.name for file in tmp_path.rglob("*")}
    assert not [file for file in left if file.endswith((".partial", ".claims"))]
    run = training.start()
    assert run.end() == 0, run.said()
    assert training.result() == trained.result()
    assert os.listdir(tmp_path) == ["run"] and training.files() == trained.files()


def test_training_that_its_engine_starts_anew_goes_on_at_once(house, whole, trained, tmp_path):
    """The machine that trained was lost: its claim is released, and no other's."""
    from cache.system.claims import _me

    training = Training(house, whole, tmp_path / "run")
    claims_of(training.out).mkdir(parents=True)
    theirs = claims_of(training.out) / "train"
    theirs.write_text(json.dumps(_me() | {"boot": "another", "worker": "kubernetes 3f6c 0"}))
    for environment in ({}, kubernetes(1)):
        line = training.start(environment=environment).failed_with()
        assert "another process is training" in line
    run = training.start(environment=kubernetes(0))
    assert run.end() == 0, run.said()
    assert training.result() == trained.result()


# ---- no room


@contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Mount something on a folder, or skip the test where that isn't allowed."""
    folder.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"can't mount a file system here: {made.stderr.splitlines()[0]}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def require_names_the_store(line: str, place: Place) -> None:
    assert line.startswith("error: ") and str(place.path) in line, line
    assert "space" in line and "again" in line, line


FULL: dict[str, When] = {
    "claiming the creation": When("write", r"claims/create\..*new$", "full"),
    "creation": When("write", r"creating/labels/zarr.json$", "full"),
    "the manifest": When("write", r"creating/images/path/c/", "full"),
    "claiming a shard": When("write", r"claims/1-1\..*new$", "full"),
    "a shard": When("write", r"s\.zarr/labels/c/1/1/.*partial$", "full"),
    "a record": When("write", r"s\.zarr/records/c/1/1/.*partial$", "full"),
    "growth": When("write", r"s\.zarr/boxes/zarr\.json.*partial$", "full"),
    "the end of growth": When("write", r"s\.zarr/zarr\.json.*partial$", "full"),
}


@pytest.mark.parametrize(
    ("phase", "disk"),
    [*((phase, "real") for phase in FULL), ("creation", "injected"), ("a record", "injected")],
)
def test_on_a_full_disk_nothing_is_lost_and_it_goes_on_once_there_is_room(
    house, whole, place, disk, phase
):
    with ExitStack() as stack:
        if disk == "real":
            with suppress(pytest.skip.Exception):  # without a mount, errors are injected
                stack.enter_context(
                    mounted(place.folder, "-t", "tmpfs", "-o", "size=4m", "workers")
                )
        if "growth" in phase:
            place.begin(2)
        before = place.kept()
        run = place.start(
            whens=(FULL[phase],), disk=str(place.folder) if place.folder.is_mount() else None
        )
        line, left, kept = run.failed_with(), place.left(), place.kept()
        assert {file: kept.get(file) for file in before} == before
        (place.folder / FILLER).unlink(missing_ok=True)
        place.run()
        now = place.kept()
        assert {file: now[file] for file in kept} == kept
        place.require_whole(run)
        assert not left, "the failed run left something"
        require_names_the_store(line, place)


def test_a_disk_that_is_full_again_and_again_loses_nothing(place):
    """The disk gets a few pages more each time, so that it is full at ever other
    moments."""
    with mounted(place.folder, "-t", "tmpfs", "-o", "size=32k", "workers"):
        kept: dict[str, tuple[int, int]] = {}
        lines, runs = [], []
        for size in itertools.count(32, 40):
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(place.folder)], check=True)
            run = place.start()
            runs.append(run)
            if run.end() == 0:
                break
            lines.append(run.failed_with())
            now = place.kept()
            assert {file: now.get(file) for file in kept} == kept
            kept = now
        assert len(lines) > 5
        place.require_whole(*runs)
        for line in lines:
            require_names_the_store(line, place)


# ---- no permission


@contextmanager
def read_only(place: Place, how: str) -> Iterator[dict]:
    """Make the store, or its whole folder, read-only. Yields the arguments that make a
    run obey permissions."""
    if how == "read-only file system":
        with mounted(place.folder, "--bind", str(place.folder)):
            subprocess.run(["mount", "-o", "remount,bind,ro", str(place.folder)], check=True)
            yield {}
        return
    files = [place.path, *place.path.rglob("*")] if place.path.exists() else []
    place.folder.chmod(0o555 if how == "a folder without permission" else 0o777)
    for file in files:
        file.chmod(0o555 if file.is_dir() else 0o444)
    try:
        yield {"obeys": True}
    finally:
        for file in (place.folder, *files):
            file.chmod(0o755 if file.is_dir() else 0o644)


READ_ONLY = ("a store without permission", "a folder without permission", "read-only file system")


@pytest.mark.parametrize("how", READ_ONLY)
@pytest.mark.parametrize("command", ["finish", "extend", "make"])
def test_what_a_read_only_store_is_missing_is_refused_in_one_line(place, how, command):
    if command == "make" and how == "a store without permission":
        pytest.skip("there is no store yet that could be read-only")
    if command != "make":
        place.begin(2, labelled=7 if command == "finish" else None)
    before = tree(place.folder)
    with read_only(place, how) as told:
        run = place.start("--views=3" if command == "extend" else "--views=2", **told)
        line = run.failed_with()
    left, after = place.left(), tree(place.folder)
    place.run()
    place.require_whole(run)
    assert after == before and not left
    assert line.startswith(f"error: {place.folder}") and re.search(
        "Permission denied|Read-only", line
    ), line


@pytest.mark.parametrize("how", READ_ONLY)
def test_a_finished_read_only_store_is_good_for_everything(house, whole, place, trained, how):
    place.begin(VIEWS)
    before = tree(place.folder)
    out = house.folder / f"out-{READ_ONLY.index(how)}"
    out.mkdir()
    out.chmod(0o777)
    with read_only(place, how) as told:
        runs = {
            "generate-labels": place.start(**told),
            "inspect": house.start("inspect", place.path, "--json", **told),
            "verify": house.start("verify", place.path, f"--data={house.data}", "--json", **told),
            "sample": house.start(
                "verify",
                place.path,
                f"--data={house.data}",
                "--sample=5",
                "--device=cpu",
                "--json",
                *house_teachers(house),
                **told,
            ),
        }
        training = Training(house, place.path, out / "run")
        runs["train-student"] = training.start(**told)
        for name, run in runs.items():
            assert run.end() == 0, f"{name}: {run.said()}"
            require_no_trace(run)
        student = f"test_vit={out / 'run' / 'best.safetensors'}"
        evaluation = house.start(
            "eval", f"--data={house.data}", f"--model={student}", "--device=cpu", "--json", **told
        )
        assert evaluation.end() == 0, evaluation.said()
    assert "is complete: 15 of 15 shards" in runs["generate-labels"].said()
    assert json.loads(runs["inspect"].text("stdout"))
    assert (
        json.loads(runs["verify"].text("stdout"))["trusted"]
        and json.loads(runs["sample"].text("stdout"))["trusted"]
    )
    assert training.result() == trained.result()
    assert json.loads(evaluation.text("stdout"))
    assert tree(place.folder) == before
    assert verify(place.path).sound
    shutil.rmtree(out)


def house_teachers(house: House) -> list[str]:
    import yaml

    return [
        f"--teacher={teacher['model']}={teacher['checkpoint']}"
        for teacher in yaml.safe_load(house.config.read_text())["teachers"]
    ]
