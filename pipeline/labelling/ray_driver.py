"""Drive the workers of a Ray cluster: start them, start lost ones again, and show how
far all of them are (--ray)."""

from __future__ import annotations

import os
import signal
import socket
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from cache.errors import MealError
from cache.system.claims import claim, claims_of, release
from cache.system.signals import check
from pipeline.labelling.coordination import require_place
from pipeline.labelling.ray_workers import RayTask, RayWorker
from pipeline.runtime.engine import Worker
from pipeline.runtime.progress import Progress, duration, say
from pipeline.runtime.wording import counted

LABELLING = "labelling"  # the progress that workers share
LOST = 5  # times that a worker is lost in a row, without a label, before the run gives up
GRACE = 30.0  # seconds that workers have to finish their shards after a signal
LOOK = 10.0  # seconds between two looks at the cluster's size


@dataclass
class _Member:
    """A worker as the driver knows it."""

    actor: Any
    run: Any  # reference to what ``label`` will return
    report: Any  # reference to what ``report`` will return
    done: int = 0  # crops
    node: str = ""  # empty until the cluster has room for the worker
    begun: float = field(default_factory=time.monotonic)


def label_on_ray(task: RayTask, address: str, workers: int | None) -> None:
    """Fill a store with workers of a Ray cluster.

    address: HOST:PORT of the cluster; "auto" for the cluster of this machine; "local"
    starts a cluster on this machine. workers: number of workers, which start as the
    cluster has room for them; None: as many as the cluster has room for, now and later.
    A worker that is lost is started again. Raises MealError for every error that the
    user can fix.
    """
    require_place(task.store)
    with _cluster(address) as ray:
        # The dot tells the token from the claims of workers.
        token = f"ray.{uuid.uuid4().hex}"
        with claim(claims_of(task.store), token):
            crew = _Crew(ray, replace(task.anywhere(), token=token), workers, address == "local")
            try:
                crew.work()
            finally:
                crew.end()


@contextmanager
def _cluster(address: str) -> Iterator[Any]:
    """Join a Ray cluster, or start one."""
    try:
        import ray
    except ImportError:
        raise MealError(
            "--ray needs Ray; install it with: pip install 'offline-meal-v2[ray]', or pip install "
            "ray, on every node"
        ) from None
    _require_reachable(address)
    handler = signal.getsignal(signal.SIGTERM)
    own: dict[str, Any] = {}
    if address == "local":
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        own = {"include_dashboard": False, "num_cpus": len(os.sched_getaffinity(0))}
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(address, log_to_driver=False, logging_level="error", **own)
    except Exception as error:
        why = " ".join(str(error).split())[:160] or type(error).__name__
        raise _no_cluster(address, why) from None
    finally:
        signal.signal(signal.SIGTERM, handler)  # ray.init sets one of its own
    try:
        # Ray prints the deaths of its processes on stdout.
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            yield ray
    finally:
        ray.shutdown()


def _require_reachable(address: str) -> None:
    """Require that somebody listens at an address, since Ray tries for minutes."""
    if address in ("local", "auto"):
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise MealError(
            f"--ray is {address!r}; it must be local, auto, or HOST:PORT, like head:6379"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10.0).close()
    except (OSError, OverflowError) as error:
        raise _no_cluster(address, getattr(error, "strerror", None) or str(error)) from None


def _no_cluster(address: str, why: str) -> MealError:
    return MealError(
        f"--ray {address}: there is no Ray cluster to join ({why}); start one with ray start "
        f"--head, name its address, or take --ray local"
    )


class _Crew:
    """The workers of one run."""

    def __init__(self, ray: Any, task: RayTask, workers: int | None, local: bool) -> None:
        self.ray, self.task, self.workers, self.local = ray, task, workers, local
        self.job = uuid.uuid4().hex[:12]
        self.members: dict[int, _Member] = {}
        self.lost: dict[int, int] = {}  # times in a row, without a label, by worker
        self.earlier = 0  # crops that lost workers had labelled
        self.first: float | None = None  # the moment of the first crops
        self.told: set[str] = set()
        self.shown: Progress | None = None
        self.finished = False
        self.needs = self._needs()
        if task.config.render.threads is None:
            render = task.config.render.model_copy(update={"threads": self.needs["num_cpus"]})
            config = task.config.model_copy(update={"render": render})
            self.task = replace(self.task, config=config)
        self.task = replace(self.task, device="cuda" if self.needs["num_gpus"] else "cpu")

    def _needs(self) -> dict[str, int]:
        """Return what a worker needs of a node: a GPU and its part of the node's cores;
        without GPUs a whole node."""
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        gpus = [node for node in nodes if node.get("GPU")]
        if self.task.device == "cuda" and not gpus and self.workers is None:
            raise MealError(
                "--device cuda: the Ray cluster has no GPU now; name --ray-workers, and it may "
                "start nodes, or take --device cpu"
            )
        on_gpu = self.task.device == "cuda" or (self.task.device is None and bool(gpus))
        cores = [
            int(node.get("CPU", 0) // (node["GPU"] if on_gpu else 1))
            for node in (gpus if on_gpu else nodes)
        ]
        threads = min([c for c in cores if c] or [1])
        if not on_gpu and self.workers:  # several on a node, if there are fewer nodes
            threads = max(1, threads // max(1, -(-self.workers // max(1, len(nodes)))))
        return {"num_cpus": self.task.config.render.threads or threads, "num_gpus": int(on_gpu)}

    def _room(self) -> int:
        """Return for how many workers the cluster has room. Raises MealError if a
        cluster of this machine has ended."""
        cpus, gpus = self.needs["num_cpus"], self.needs["num_gpus"]
        nodes = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        if self.local and not nodes:
            raise MealError(
                "the Ray cluster that was started on this machine has ended; run the same command "
                "again, which goes on from what is finished"
            )
        return sum(
            int(min(node.get("CPU", 0) // cpus, node.get("GPU", 0) // gpus if gpus else 1e9))
            for node in nodes
        )

    def work(self) -> None:
        """Run workers until the store is complete."""
        looked, waiting = -LOOK, False
        while not self.finished or self.members:
            if not self.finished and time.monotonic() - looked >= LOOK:
                looked, room = time.monotonic(), self._room()
                wanted = self.workers or room
                while len(self.members) < wanted:
                    number = min(set(range(wanted)) - set(self.members))
                    self._start(number, max(1, min(room, wanted)))
            pending = [number for number, member in self.members.items() if not member.node]
            if self.finished:  # nothing is left for them
                for number in pending:
                    self.ray.kill(self.members.pop(number).actor)
            elif not waiting and self._waits(pending):
                waiting = True
                say(
                    f"{counted(len(self.members) - len(pending), 'worker')} of "
                    f"{max(1, len(self.members))} at work; each of the others needs "
                    f"{self._of_a_node()}, for which Ray has no room now"
                )
            runs = {member.run: number for number, member in self.members.items()}
            if runs:
                for ref in self.ray.wait(list(runs), num_returns=len(runs), timeout=1.0)[0]:
                    if self._ended(runs[ref]):
                        looked = -LOOK  # start it again now
            else:
                time.sleep(1.0)
            check()
            self._hear()
        if (crops := self._crops()) and self.first:
            seconds = time.monotonic() - self.first
            say(f"labelled {crops:,} crops in {duration(seconds)}, {crops / seconds:,.1f} crops/s")

    def _waits(self, pending: list[int]) -> bool:
        """Return whether a worker has waited for room for long, or there is room for
        none."""
        begun = [self.members[number].begun for number in pending]
        return not self.members or any(time.monotonic() - one > LOOK for one in begun)

    def _of_a_node(self) -> str:
        return counted(self.needs["num_cpus"], "CPU") + " and a GPU" * self.needs["num_gpus"]

    def _name(self, number: int) -> str:
        return f"ray {self.job} {number}"

    def _start(self, number: int, workers: int) -> None:
        actor = self.ray.remote(RayWorker).options(max_concurrency=3, **self.needs).remote()
        worker = Worker(number, workers, self._name(number), "Ray")
        self.members[number] = _Member(
            actor, actor.label.remote(self.task, worker), actor.report.remote()
        )

    def _ended(self, number: int) -> bool:
        """Take a worker off that has ended. Returns whether it was lost."""
        member = self.members[number]
        with suppress(Exception):
            self._take(member, self.ray.get(member.actor.report.remote(), timeout=1.0))
        try:
            how, why = self.ray.get(member.run)
        except self.ray.exceptions.RayError as error:
            how, why = "lost", " ".join(str(error).split())
            if "ModuleNotFoundError" in why:
                raise MealError(
                    f"a node of the Ray cluster lacks a package ({why[-160:]}); install "
                    f"offline-meal-v2 on every node"
                ) from None
        if how == "failed" and not self._crops():  # it will fail elsewhere, too
            if "\n" in why:  # a fault of this tool
                raise RuntimeError(f"worker {number} on {member.node} failed:\n{why}")
            raise MealError(why)
        why = why.strip().rpartition("\n")[2]
        self.ray.kill(member.actor)
        del self.members[number]
        self.earlier += member.done
        self.finished = self.finished or how == "done"
        if how == "done" or self.finished:
            return False
        self.lost[number] = 1 if member.done else self.lost.get(number, 0) + 1
        if self.lost[number] >= LOST:
            raise MealError(
                f"worker {number} was lost {LOST} times in a row without a label, the last time on "
                f"{member.node or 'no node'} ({why[:160]}); look at the node's memory and logs"
            )
        release(claims_of(self.task.store), self._name(number))
        why = why.partition(" class_name:")[0][:160].rstrip(".")
        say(f"worker {number} was lost ({why}); it starts again, on whatever node has room")
        return True

    def _hear(self) -> None:
        """Print what workers say, and how far all of them are."""
        for member in self.members.values():
            if self.ray.wait([member.report], timeout=0)[0]:
                with suppress(self.ray.exceptions.RayError):  # told by its run
                    self._take(member, self.ray.get(member.report))
                member.report = member.actor.report.remote()

    def _take(self, member: _Member, report: tuple) -> None:
        lines, (what, done, total, unit), member.node = report
        # Every worker says the same of images and teachers. The driver says what all
        # have labelled.
        for line in dict.fromkeys(lines):
            if line not in self.told and not line.startswith("labelled "):
                self.told.add(line)
                say(line)
        if what == LABELLING:
            member.done = done
            self.first = self.first or time.monotonic()
        if not what or (self.shown and self.shown.what == LABELLING != what):
            return
        if self.shown is None or self.shown.what != what:
            self._hide()
            self.shown = Progress(what, total, unit)
            self.shown.__enter__()
        all_done = min(total, self._crops()) if what == LABELLING else done
        self.shown.advance(max(0, all_done - self.shown.done))

    def _crops(self) -> int:
        """Return how many crops the workers have labelled."""
        return self.earlier + sum(member.done for member in self.members.values())

    def _hide(self) -> None:
        if self.shown is not None:
            self.shown.__exit__(None, None, None)

    def end(self) -> None:
        """End the workers that still run, in order if they have the time for it."""
        self._hide()
        with suppress(Exception):
            runs = [member.run for member in self.members.values() if member.node]
            for member in self.members.values():
                member.actor.stop.remote()
            self.ray.wait(runs, num_returns=len(runs), timeout=GRACE) if runs else None
        for member in self.members.values():
            with suppress(Exception):
                self.ray.kill(member.actor)
