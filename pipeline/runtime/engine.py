"""Read from the environment which engine started this process (Kubernetes, SLURM,
SkyPilot, torchrun), and as which worker."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

from cache.system import claims
from pipeline.runtime.launch import Launch, number
from pipeline.runtime.progress import say
from pipeline.runtime.wording import counted

MPI = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
JOB = "OFFLINE_MEAL_JOB"  # names the job that an engine runs, for ``Worker.name``


@dataclass(frozen=True)
class Worker:
    """This process among the workers that an engine starts.

    number: of the worker, from 0. workers: the number of workers; None if the engine
    doesn't tell. name: a name that no other living worker has, and that a worker has
    again if the engine starts it anew; None if the engine gives no such name. engine:
    its name, for messages; empty if no engine started this process.
    """

    number: int = 0
    workers: int | None = 1
    name: str | None = None
    engine: str = ""

    @classmethod
    def here(cls) -> Worker:
        """Read the environment variables of SkyPilot, of SLURM, of a Kubernetes Indexed
        Job, and of torchrun within one of them. Raises LaunchError for a value that is
        no number."""
        engine = _of_skypilot() or _of_slurm() or _of_kubernetes() or _Engine("")
        launch = Launch.here()
        if launch.world == 1:
            return engine.worker()
        here = number("LOCAL_WORLD_SIZE", launch.world, "the number of processes here", least=1)
        by_hand = "LOCAL_WORLD_SIZE" not in os.environ
        if here < launch.world or (by_hand and (launch.rank, launch.world) == engine.node):
            # The ranks go over all nodes, so they count the engine's nodes already.
            engine = replace(engine, node=(0, 1))
        whole = engine.worker()
        return cls(
            whole.number * launch.world + launch.rank,
            whole.workers and whole.workers * launch.world,
            # By itself torchrun doesn't start one process again, but all of them.
            whole.name and f"{whole.name} rank {launch.rank}",
            whole.engine or "torchrun",
        )


NOBODY = Worker()


@dataclass(frozen=True)
class _Engine:
    """What an engine tells a process.

    task: the number of its job's task, and of how many; 0 if the engine doesn't tell.
    node: the number of the node or the process within the task, and of how many.
    """

    engine: str
    name: str | None = None
    task: tuple[int, int] = (0, 1)
    node: tuple[int, int] = (0, 1)

    def worker(self) -> Worker:
        (task, tasks), (node, nodes) = self.task, self.node
        return Worker(task * nodes + node, tasks * nodes or None, self.name, self.engine)


def _of_skypilot() -> _Engine | None:
    """Read SkyPilot's variables of a node. A managed job keeps its id when it
    recovers."""
    if "SKYPILOT_NODE_RANK" not in os.environ:
        return None
    rank = number("SKYPILOT_NODE_RANK", 0, "the number of this node, from 0")
    nodes = number("SKYPILOT_NUM_NODES", 1, "the number of nodes", least=1)
    job = os.environ.get("SKYPILOT_TASK_ID", "").strip()
    return _Engine("SkyPilot", f"skypilot {job} {rank}" if job else None, node=(rank, nodes))


def _of_slurm() -> _Engine | None:
    """Read SLURM's variables of a job array's task, and of a step that srun started."""
    if "SLURM_JOB_ID" not in os.environ:
        return None
    job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
    task, node = (0, 1), (0, 1)
    name = f"slurm {os.environ.get('SLURM_CLUSTER_NAME', '')} {job}"
    if "SLURM_ARRAY_TASK_ID" in os.environ:
        own = number("SLURM_ARRAY_TASK_ID", 0, "the number of this task of the array")
        first = number("SLURM_ARRAY_TASK_MIN", 0, "the first number of the array")
        last = number("SLURM_ARRAY_TASK_MAX", own, "the last number of the array")
        step = number("SLURM_ARRAY_TASK_STEP", 1, "the step between the array's numbers", least=1)
        count = number("SLURM_ARRAY_TASK_COUNT", 1, "the number of tasks of the array", least=1)
        name += f" {own}"
        regular = count == (last - first) // step + 1
        # SLURM doesn't tell a task's place in a list like 1,3,7.
        task = ((own - first) // step, count) if regular else (own - first, 0)
    if "SLURM_STEP_ID" in os.environ:  # otherwise the batch script runs this process itself
        several = number("SLURM_STEP_NUM_TASKS", 1, "the number of tasks of the step", least=1)
        node = (number("SLURM_PROCID", 0, "the number of this task of the step"), several)
        # Steps of one job may run at the same time.
        name += f" step {os.environ['SLURM_STEP_ID']} {node[0]}"
    # mpirun starts its processes by itself, without steps of SLURM.
    name += "".join(f" {key} {os.environ[key]}" for key in MPI if key in os.environ)
    return _Engine("SLURM", name, task, node)


def _of_kubernetes() -> _Engine | None:
    """Read the variable of an Indexed Job, which doesn't tell the number of its
    workers, and the job's name that its manifest gives."""
    if "JOB_COMPLETION_INDEX" not in os.environ:
        return None
    own = number("JOB_COMPLETION_INDEX", 0, "the index of this worker in the Job, from 0")
    job = os.environ.get(JOB, "").strip()
    return _Engine("Kubernetes", f"kubernetes {job} {own}" if job else None, node=(own, 0))


def take_over(path: Path, name: str | None) -> None:
    """Name this process in its claims on the store or run at ``path``, and release the
    claims of its lost predecessor. name: ``Worker.name``."""
    claims.known_as(name)
    if name and (released := claims.release(claims.claims_of(path), name)):
        say(
            f"this worker was started anew: released {counted(released, 'claim')} that its "
            f"predecessor left on {path}"
        )
