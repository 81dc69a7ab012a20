"""Workers of a real Ray cluster on this machine. Whatever is killed, the store ends as
the store of a single process, and no process lives on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from support.killing import HANGS
from support.paths import ROOT
from support.small import changed, tree, write_photos

from cache import LabelStore
from cache.errors import StoreError
from cache.system.claims import claims_of
from pipeline.labelling import ray_workers
from pipeline.runtime.engine import Worker

pytest.importorskip("ray")
VIEWS = 24
# Runs in every Python process of a slow command: no store is complete too early.
SLOW = """
import os, time

def fsync(descriptor, real=os.fsync):
    time.sleep(0.004)
    real(descriptor)

os.fsync = fsync
"""


def processes() -> dict[int, tuple[int, str]]:
    """Return the running processes: number → (parent, command line)."""
    found = {}
    for place in Path("/proc").iterdir():
        if place.name.isdecimal():
            with suppress(OSError, IndexError):
                state, parent = (place / "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    command = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    found[int(place.name)] = (int(parent), command)
    return found


def workers_of(every: dict[int, tuple[int, str]]) -> dict[int, int]:
    """Return the actors that label: number of the actor → number of its child."""
    actors = {p for p, (_, command) in every.items() if command.startswith("ray::RayWorker")}
    return {
        parent: p
        for p, (parent, command) in every.items()
        if parent in actors and "spawn_main" in command
    }


class Command:
    """generate-labels --ray local, as a process of its own."""

    def __init__(self, folder: Path, arguments: list[str], **variables: str) -> None:
        self.log = folder / "stderr"
        environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "cli.py"), "generate-labels", *arguments],
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=folder,
                env=environment,
            )

    def said(self) -> str:
        return self.log.read_text()

    def wait(self, done: Callable[[], object], what: str) -> None:
        patience = time.monotonic() + HANGS
        while not done():
            assert self.process.poll() is None, f"it ended and never {what}:\n{self.said()}"
            assert time.monotonic() < patience, f"it never {what}:\n{self.said()}"
            time.sleep(0.02)

    def end(self) -> int:
        try:
            return self.process.wait(HANGS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it hangs:\n{self.said()}") from None

    def below(self) -> dict[int, tuple[int, str]]:
        """Return the processes that the command started, and theirs."""
        every, mine = processes(), {self.process.pid}
        while more := {p for p, (parent, _) in every.items() if parent in mine} - mine:
            mine |= more
        return {p: every[p] for p in mine if p in every}

    def workers(self) -> dict[int, int]:
        """Return the actors that label, as ``workers_of`` does."""
        return workers_of(self.below())


@pytest.fixture(scope="module")
def recipe_file(recipe, teachers, tmp_path_factory) -> Path:
    """A recipe of many small shards, beside its images."""
    folder = tmp_path_factory.mktemp("ray")
    write_photos(folder / "data" / "train", 12)
    small = changed(
        recipe,
        crops={"views": VIEWS},
        store={"shard_rows": 4, "batch_size": 4, "views_per_decode": 2},
        render={"threads": 1},
    )
    document = small.model_dump(mode="json", exclude_unset=True) | {"teachers": teachers[:1]}
    (folder / "recipe.yaml").write_text(type(recipe).model_validate(document).to_yaml())
    return folder / "recipe.yaml"


def arguments(recipe_file: Path, store: str | Path) -> list[str]:
    return [
        f"--config={recipe_file}",
        f"--data={recipe_file.parent / 'data'}",
        f"--store={store}",
        "--device=cpu",
    ]


@pytest.fixture(scope="module")
def whole(recipe_file) -> Path:
    """The store of a single undisturbed process."""
    command = Command(recipe_file.parent, arguments(recipe_file, "whole.zarr"))
    assert command.end() == 0, command.said()
    return recipe_file.parent / "whole.zarr"


@pytest.fixture
def slow(tmp_path) -> dict[str, str]:
    """The environment of a slow command."""
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "sitecustomize.py").write_text(SLOW)
    return {"PYTHONPATH": str(tmp_path / "slow")}


@pytest.fixture
def start(recipe_file, tmp_path, slow) -> Iterator[Callable[..., Command]]:
    started = []

    def start(*more: str) -> Command:
        options = [*arguments(recipe_file, "s.zarr"), "--ray=local", *more]
        started.append(Command(tmp_path, options, **slow))
        return started[-1]

    yield start
    for command in started:
        for process in command.below():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        command.process.wait()


def require_same(store: Path, whole: Path) -> None:
    assert tree(store) == tree(whole)
    assert not claims_of(store).exists()


def finished(store: Path) -> int:
    return len(list((store / "records" / "c").glob("*/*/0")))


def gone(process: int) -> bool:
    return process not in processes()


def test_ray_workers_fill_a_store_and_killed_ones_are_started_again(start, whole, tmp_path):
    """An actor, then the child of another, are killed while they label."""
    store = tmp_path / "s.zarr"
    command = start("--ray-workers=2")
    command.wait(lambda: finished(store) > 10 and len(command.workers()) == 2, "labelled")
    actor, child = next(iter(command.workers().items()))
    os.kill(actor, signal.SIGKILL)
    command.wait(lambda: gone(child), "ended the killed actor's child")
    command.wait(lambda: "was lost" in command.said(), "noticed the loss")
    command.wait(lambda: len(command.workers()) == 2, "started another")
    os.kill(next(iter(command.workers().values())), signal.SIGKILL)
    command.wait(lambda: command.said().count("was lost") == 2, "noticed the second loss")
    assert "its process ended with status -9" in command.said()
    assert finished(store) < LabelStore.open(store).progress()[1]
    assert command.end() == 0, command.said()
    assert "is complete" in command.said() and re.search(r"labelled [\d,]+ crops", command.said())
    assert "Traceback" not in command.said()
    require_same(store, whole)


def test_a_signal_to_the_driver_stops_all_workers_in_order(start, whole, tmp_path):
    store = tmp_path / "s.zarr"
    command = start("--ray-workers=2", "--set=render.threads=null")  # workers divide the cores
    command.wait(lambda: finished(store) > 10 and len(command.workers()) == 2, "labelled")
    below = command.below()
    command.process.send_signal(signal.SIGTERM)
    assert command.end() == 1
    assert command.said().splitlines()[-1].startswith("stopped"), command.said()
    assert "Traceback" not in command.said()
    patience = time.monotonic() + 30
    while left := set(below) & set(processes()):
        assert time.monotonic() < patience, [below[p] for p in left]
        time.sleep(0.1)
    assert not claims_of(store).exists()  # given back, not left to die
    assert finished(store) < LabelStore.open(store).progress()[1]
    again = start("--ray-workers=1")
    assert again.end() == 0, again.said()
    require_same(store, whole)


def test_claims_of_a_lost_machine_are_released_as_soon_as_ray_tells_of_the_loss(
    start, whole, tmp_path
):
    """The worker that takes its place may have to wait for a machine."""
    store = tmp_path / "s.zarr"
    command = start("--ray-workers=1")
    command.wait(lambda: finished(store) > 10 and command.workers(), "labelled")
    command.process.send_signal(signal.SIGSTOP)  # it doesn't notice before claims are others'
    ((actor, child),) = command.workers().items()
    os.kill(actor, signal.SIGKILL)
    command.wait(lambda: gone(child), "ended the killed actor's child")
    left = [f for f in claims_of(store).iterdir() if re.fullmatch(r"\d+-\d+", f.name)]
    assert left
    for file in left:
        file.write_text(json.dumps(json.loads(file.read_text()) | {"host": "elsewhere"}))
    command.process.send_signal(signal.SIGCONT)
    command.wait(lambda: "was lost" in command.said(), "noticed the loss")
    assert not [file for file in left if file.exists() and "elsewhere" in file.read_text()]
    assert command.end() == 0, command.said()
    require_same(store, whole)


ORPHAN = """
import os, pathlib, sys, time
sys.path[:0] = [{root!r}]
from pipeline.labelling.ray_workers import RayWorker

class Task:
    def label(self, worker):
        pathlib.Path(sys.argv[1] + ".new").write_text(str(os.getpid()))
        os.rename(sys.argv[1] + ".new", sys.argv[1])
        time.sleep(600)

if __name__ == "__main__":
    RayWorker().label(Task(), None)
"""


def test_a_child_ends_with_its_actor_whoever_else_is_gone(tmp_path):
    """Ray's daemon ends the processes of a killed actor, unless the daemon is gone."""
    (tmp_path / "orphan.py").write_text(ORPHAN.format(root=str(ROOT)))
    actor = subprocess.Popen([sys.executable, tmp_path / "orphan.py", tmp_path / "child"])
    patience = time.monotonic() + HANGS
    while not (tmp_path / "child").exists():
        assert actor.poll() is None and time.monotonic() < patience
        time.sleep(0.1)
    child = int((tmp_path / "child").read_text())
    actor.kill()
    actor.wait()
    patience = time.monotonic() + 30
    while not gone(child):
        if time.monotonic() > patience:
            os.kill(child, signal.SIGKILL)
            raise AssertionError("the child lives on")
        time.sleep(0.1)


def test_a_killed_driver_leaves_no_worker(start, tmp_path):
    command = start("--ray-workers=2")
    command.wait(lambda: finished(tmp_path / "s.zarr") > 4 and command.workers(), "labelled")
    workers = command.workers()
    command.process.kill()
    patience = time.monotonic() + 60
    while left := {*workers, *workers.values()} & set(processes()):
        assert time.monotonic() < patience, left
        time.sleep(0.1)


def test_a_cluster_of_this_machine_that_ends_is_told_in_one_line(start, whole, tmp_path):
    store = tmp_path / "s.zarr"
    command = start("--ray-workers=1")
    command.wait(lambda: finished(store) > 4 and command.workers(), "labelled")
    (raylet,) = (p for p, (_, line) in command.below().items() if "raylet/raylet" in line)
    os.kill(raylet, signal.SIGKILL)
    assert command.end() == 1
    assert "error: the Ray cluster that was started on this machine has ended" in command.said()
    assert "Traceback" not in command.said()
    again = start("--ray-workers=1")
    assert again.end() == 0, again.said()
    require_same(store, whole)


def test_a_node_that_sees_another_disk_is_refused(recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_workers, "SHARED", 0.0)
    task = ray_workers.RayTask(
        recipe, Path("data"), "train", None, tmp_path / "s.zarr", token="ray.0"
    )
    with pytest.raises(StoreError, match="put --store on a disk that all nodes share"):
        task.label(Worker())


def test_what_a_worker_refuses_is_one_line_of_the_driver(start, tmp_path):
    command = start("--ray-workers=2", "--set=teachers.0.model=no_such_model")
    assert command.end() == 1
    assert command.said().splitlines()[-1].startswith("error: ") and "no_such_model" in (
        command.said()
    )
    assert "Traceback" not in command.said()


@pytest.mark.parametrize(
    ("options", "line"),
    {
        ("--ray=local", "--worker=0/2"): "--ray divides the work by itself",
        ("--ray=local", "--profile"): "leave out --worker and --profile",
        ("--ray-workers=2",): "--ray-workers goes with --ray",
    }.items(),
)
def test_options_that_make_no_sense_with_ray_are_refused(options, line, recipe_file, tmp_path):
    from support.command import run

    status, _, said = run("generate-labels", *arguments(recipe_file, tmp_path / "s"), *options)
    assert status == 2 and line in said


@pytest.mark.parametrize(
    ("address", "line"),
    {
        "127.0.0.1:1": "--ray 127.0.0.1:1: there is no Ray cluster to join (Connection refused)",
        "no-such-host.invalid:6379": "--ray no-such-host.invalid:6379: there is no Ray cluster",
        "everywhere": "--ray is 'everywhere'; it must be local, auto, or HOST:PORT",
        "ray://head:10001": "it must be local, auto, or HOST:PORT",
    }.items(),
)
def test_a_cluster_that_is_not_there_is_refused_in_one_line(address, line, recipe_file, tmp_path):
    command = Command(tmp_path, [*arguments(recipe_file, "s.zarr"), f"--ray={address}"])
    assert command.end() == 1
    assert command.said().startswith("error: ") and line in command.said()
    assert command.said().count("\n") == 1
    assert not list(tmp_path.glob("s.zarr*"))


def test_the_workers_grow_and_shrink_with_the_cluster(
    recipe_file, whole, tmp_path, slow, monkeypatch
):
    """A second node joins, then the first is lost as by a power cut."""
    from ray.cluster_utils import Cluster

    for name, value in slow.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    try:
        raylets = set()

        def add() -> Any:
            node = cluster.add_node(num_cpus=1)
            raylets.add(node.all_processes["raylet"][0].process.pid)
            return node

        first = add()
        store = tmp_path / "s.zarr"
        command = Command(tmp_path, [*arguments(recipe_file, store), f"--ray={cluster.address}"])

        def workers() -> dict[int, int]:
            """Return the workers of this cluster; other tests may have clusters of
            theirs."""
            every = processes()
            return {a: c for a, c in workers_of(every).items() if every[a][0] in raylets}

        command.wait(lambda: finished(store) > 4, "labelled")
        assert len(workers()) == 1
        add()
        command.wait(lambda: len(workers()) == 2, "grew")
        cluster.remove_node(first, allow_graceful=False)
        command.wait(lambda: "was lost" in command.said(), "noticed the loss")
        command.wait(lambda: len(workers()) == 1, "shrank")
        assert command.end() == 0, command.said()
        require_same(store, whole)
    finally:
        cluster.shutdown()
