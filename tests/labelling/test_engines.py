"""What Kubernetes, SLURM and torchrun tell a worker of itself."""

from __future__ import annotations

import os

import pytest

from pipeline.labelling.shares import Share
from pipeline.runtime.engine import Worker
from pipeline.runtime.launch import LaunchError

ARRAY = {
    "SLURM_JOB_ID": "74",
    "SLURM_ARRAY_JOB_ID": "70",
    "SLURM_ARRAY_TASK_ID": "14",
    "SLURM_ARRAY_TASK_MIN": "10",
    "SLURM_ARRAY_TASK_MAX": "16",
    "SLURM_ARRAY_TASK_STEP": "2",
    "SLURM_ARRAY_TASK_COUNT": "4",
}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3"}
TORCHRUN = {"RANK": "1", "WORLD_SIZE": "2"}
INDEX = {"JOB_COMPLETION_INDEX": "5"}
TOLD: dict[str, tuple[dict[str, str], Worker]] = {
    "nothing": ({}, Worker(0, 1, None, "")),
    "torchrun": (TORCHRUN, Worker(1, 2, None, "torchrun")),
    "an index": (INDEX, Worker(5, None, None, "Kubernetes")),
    "an index of a named job": (
        INDEX | {"OFFLINE_MEAL_JOB": "3f6c"},
        Worker(5, None, "kubernetes 3f6c 5", "Kubernetes"),
    ),
    "torchrun in a pod": (
        INDEX | {"OFFLINE_MEAL_JOB": "3f6c"} | TORCHRUN,
        Worker(11, None, "kubernetes 3f6c 5 rank 1", "Kubernetes"),
    ),
    "an array": (ARRAY, Worker(2, 4, "slurm  70 14", "SLURM")),
    "an array that is a list": (
        ARRAY | {"SLURM_ARRAY_TASK_STEP": "1"},
        Worker(4, None, "slurm  70 14", "SLURM"),
    ),
    "srun": ({"SLURM_JOB_ID": "74"} | STEP, Worker(3, 8, "slurm  74 step 0 3", "SLURM")),
    "srun in an array": (ARRAY | STEP, Worker(19, 32, "slurm  70 14 step 0 3", "SLURM")),
    # Without srun these count what a batch script may start, not what it has started.
    "a batch script": (
        {"SLURM_JOB_ID": "74", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"},
        Worker(0, 1, "slurm  74", "SLURM"),
    ),
    "torchrun in an array": (ARRAY | TORCHRUN, Worker(5, 8, "slurm  70 14 rank 1", "SLURM")),
    "mpirun in a batch script": (
        {"SLURM_JOB_ID": "74", "OMPI_COMM_WORLD_RANK": "3"},
        Worker(0, 1, "slurm  74 OMPI_COMM_WORLD_RANK 3", "SLURM"),
    ),
    "SkyPilot": (
        {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "4", "SKYPILOT_TASK_ID": "sky-1_x"},
        Worker(1, 4, "skypilot sky-1_x 1", "SkyPilot"),
    ),
    "torchrun on SkyPilot on Kubernetes": (
        {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "4", "SKYPILOT_TASK_ID": "x"}
        | INDEX
        | TORCHRUN,
        Worker(3, 8, "skypilot x 1 rank 1", "SkyPilot"),
    ),
    # torchrun --nnodes: ranks go over all nodes
    "torchrun over nodes of srun": (
        {"SLURM_JOB_ID": "74", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
        | {"SLURM_PROCID": "1", "RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
        Worker(5, 8, "slurm  74 step 0 1 rank 5", "SLURM"),
    ),
    "torchrun over nodes of SkyPilot": (
        {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_TASK_ID": "x"}
        | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"},
        Worker(5, 8, "skypilot x 1 rank 5", "SkyPilot"),
    ),
    "torchrun over pods": (
        INDEX | {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "1"},
        Worker(5, 8, None, "Kubernetes"),
    ),
    "a torchrun on each of two nodes of SkyPilot": (
        {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "2", "SKYPILOT_TASK_ID": "x"}
        | {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"},
        Worker(3, 4, "skypilot x 1 rank 1", "SkyPilot"),
    ),
    "srun with ranks by hand": (
        {"SLURM_JOB_ID": "74"} | STEP | {"RANK": "3", "WORLD_SIZE": "8"},
        Worker(3, 8, "slurm  74 step 0 3 rank 3", "SLURM"),
    ),
    "SLURM on Kubernetes": (ARRAY | INDEX, Worker(2, 4, "slurm  70 14", "SLURM")),
}


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(
            ("SLURM_", "OMPI_", "PMI_", "SKYPILOT_", "JOB_COMPLETION", "OFFLINE_MEAL_JOB")
        ):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("told", TOLD)
def test_a_worker_knows_its_number_and_its_name(told, monkeypatch):
    environment, worker = TOLD[told]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Worker.here() == worker


@pytest.mark.parametrize("name", ["JOB_COMPLETION_INDEX", "SLURM_ARRAY_TASK_ID"])
@pytest.mark.parametrize("value", ["", "-1", "three"])
def test_a_number_that_is_none_is_refused_in_one_line(name, value, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1") if "SLURM" in name else None
    monkeypatch.setenv(name, value)
    with pytest.raises(LaunchError, match=f"{name} is .*; set it to the "):
        Worker.here()


def test_open_shares_are_everything_and_check_each_shard_once():
    import numpy as np

    finished = np.array([[True, False, True], [True, True, True], [False, True, True]])
    shares = [Share(i, 4, open=True) for i in range(4)]
    everything = Share().units(finished)
    assert all(share.units(finished) == everything and share.leads for share in shares)
    checked = [list(place) for share in shares for place in share.places(finished)]
    assert sorted(checked) == np.argwhere(finished).tolist()
    unknown = [Share(i, 1, open=True) for i in range(4)]  # the number of workers isn't told
    assert [len(share.places(finished)) for share in unknown] == [7, 0, 0, 0]
