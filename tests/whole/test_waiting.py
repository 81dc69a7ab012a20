"""Torch's threads wait asleep while other processes want the cores. Results stay."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.paths import ROOT
from support.small import changed
from support.stages import CPU, evaluate, generate, scan, train

from pipeline.runtime import waiting
from pipeline.runtime.waiting import are_crowded, giving_way, others, work_on

PATIENCE = 120  # seconds
STAT = """cpu  700 0 300 9000 0 0 0 0 0 0
cpu0 500 20 100 4000 900 10 20 50 70 0
cpu1 200 0 200 5000 0 0 0 0
intr 12345 0 0
"""


@pytest.fixture(autouse=True)
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in waiting.SET_BY_USER:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def wait_until(name: str, there: bool) -> None:
    until = time.monotonic() + PATIENCE
    while (name in names()) is not there:
        assert time.monotonic() < until, names()
        time.sleep(0.01)


class Taken:
    """A number of cores that other processes seem to take; counts the looks at it."""

    def __init__(self, cores: float) -> None:
        self.cores, self.looks = cores, 0

    def __call__(self, before: tuple, now: tuple) -> float:
        self.looks += 1
        return self.cores


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Taken:
    found = Taken(0.0)
    monkeypatch.setattr(waiting, "others", found)
    monkeypatch.setattr(waiting, "LOOK", 0.01)
    return found


def test_work_of_the_cores_is_counted_as_the_kernel_tells_it():
    tick = waiting.os.sysconf("SC_CLK_TCK")
    # neither idle, nor waiting for a disk; guests are contained in user
    assert work_on([0], STAT) == 700 / tick
    assert work_on([0, 1], STAT) == 1100 / tick
    with pytest.raises(ValueError, match="cpu7"):
        work_on([0, 7], STAT)
    assert waiting._clocks(waiting.os.sched_getaffinity(0)) is not None


def test_others_take_what_this_process_does_not():
    assert others((0.0, 10.0, 1.0), (2.0, 13.0, 2.0)) == 1.0  # three worked, one was ours
    assert others((0.0, 10.0, 1.0), (2.0, 11.0, 2.1)) == 0.0  # clocks differ a little


@pytest.mark.parametrize(
    ("threads", "cores", "taken", "crowded"),
    [
        (2, 2, 0.1, False),  # a free machine
        (2, 2, 0.9, True),
        (4, 16, 11.0, False),  # others have cores of their own
        (4, 16, 13.0, True),
        (16, 16, 1.0, True),  # all wait for the one that shares its core
    ],
)
def test_cores_are_crowded_if_more_is_wanted_than_there_is(threads, cores, taken, crowded):
    assert are_crowded(threads, cores, taken) is crowded


def test_threads_that_wait_sleep_in_fact():
    """The time that cores work while torch's threads have nothing to do. A thread spins
    for a number of turns, however busy the machine is."""
    script = """
import os, time, torch
from pipeline.runtime.waiting import sleeping_threads
torch.set_num_threads(len(os.sched_getaffinity(0)))
numbers = torch.zeros(2**18)
def idle():
    numbers.add_(1)
    begun = time.process_time()
    for _ in range(50):
        numbers.add_(1)
        time.sleep(0.01)
    return time.process_time() - begun
spinning = idle()
with sleeping_threads(torch.get_num_threads(), torch.get_num_threads()):
    asleep = idle()
again = idle()
print(asleep / spinning, again / spinning)
"""
    if len(waiting.os.sched_getaffinity(0)) < 2 or "OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("needs two cores, and torch with OpenMP")
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=ROOT,
        env={k: v for k, v in waiting.os.environ.items() if "OMP" not in k},
        check=True,
    )
    asleep, again = map(float, done.stdout.split())
    assert asleep < 0.5 < again


def test_threads_sleep_while_others_want_the_cores_and_no_thread_outlives_the_context(taken):
    with giving_way(CPU):
        assert "giving way" in names() and "asleep" not in names()
        taken.cores = 100.0
        wait_until("asleep", True)
        taken.cores = 0.0
        wait_until("asleep", False)
        taken.cores = 100.0
        wait_until("asleep", True)
        with giving_way(CPU):
            assert names().count("giving way") == 1
        assert "giving way" in names()
    assert "giving way" not in names() and "asleep" not in names()
    with pytest.raises(KeyError), giving_way(CPU):
        raise KeyError
    assert "giving way" not in names()


def test_work_of_other_processes_is_noticed():
    cores = len(waiting.os.sched_getaffinity(0))
    torch.set_num_threads(max(2, cores))
    busy = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(max(2, cores))
    ]
    try:
        with giving_way(CPU):
            wait_until("asleep", True)
    finally:
        for process in busy:
            process.kill()
            process.wait()


@pytest.mark.parametrize("name", waiting.SET_BY_USER)
def test_what_a_user_sets_wins(monkeypatch, name):
    monkeypatch.setenv(name, "active" if "POLICY" in name else "7")
    with giving_way(CPU):
        assert "giving way" not in names()


def test_a_gpu_or_a_single_thread_needs_nothing():
    with giving_way(SimpleNamespace(type="cuda")):
        assert "giving way" not in names()
    torch.set_num_threads(1)
    with giving_way(CPU):
        assert "giving way" not in names()


def test_a_system_that_does_not_tell_is_left_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(waiting, "STAT", tmp_path / "missing")
    with giving_way(CPU):
        wait_until("giving way", False)


def test_the_kind_of_waiting_changes_no_bit_of_labels_or_student(photos, recipe, taken, tmp_path):
    """Both stages and an evaluation look at the cores, and give the same results
    however their threads wait."""
    short = changed(recipe, train={"epochs": 2, "milestones": []})
    kept = []
    for cores in (0.0, 100.0):
        taken.cores, taken.looks = cores, 0
        place = tmp_path / str(cores)
        store = generate(short, photos, place / "labels.zarr")
        assert taken.looks
        labels = [store.codes(view, range(len(store.images))).tobytes() for view in range(2)]
        taken.looks = 0
        train(short, photos, place / "run", store=place / "labels.zarr")
        assert taken.looks
        kept.append((labels, Path(place / "run" / "last.safetensors").read_bytes()))
    assert kept[0] == kept[1]


def test_an_evaluation_looks_at_the_cores(photos, recipe, taken):
    from pipeline.models.weights import load

    images = scan(photos / "val", ["ant", "bee", "cat"])
    evaluate([load(recipe.teachers[0])], photos / "val", images, 3)
    assert taken.looks
