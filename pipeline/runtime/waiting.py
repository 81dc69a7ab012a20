"""Let torch's threads wait asleep while other processes want the same cores.

torch computes on a CPU with a team of OpenMP threads, which meet after every operation.
A thread that arrives early spins for milliseconds, so that the team goes on at once. If
another process holds the core of the last thread, spinning keeps that thread from its
work, and a small model becomes up to some thirty times slower. Sleeping threads give
way, but on a free machine a small model pays for each waking. So the kind of waiting
follows the machine. It never changes a result: the number of threads decides how sums
are rounded, and it stays as it is.
"""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch

LOOK = 0.5  # seconds between looks at the cores
MUCH = 0.25  # cores beyond the machine's that are wanted before threads go to sleep
SET_BY_USER = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
STAT = Path("/proc/stat")
_IDLE = (3, 4)  # columns of /proc/stat: idle, and waiting for a disk
_COLUMNS = 8  # the later columns, guests, are contained in the first two
_ONE_WATCH = threading.Lock()


@contextmanager
def giving_way(device: torch.device) -> Iterator[None]:
    """Let torch's threads wait asleep, inside this context, whenever other processes
    want the cores that the threads compute on.

    A thread looks at the cores twice a second. device: of the models; nothing is done
    for a GPU, for a single thread, and where the environment sets OMP_WAIT_POLICY or
    GOMP_SPINCOUNT. In a context inside another one only the outer one counts.
    """
    threads = torch.get_num_threads()
    useful = device.type == "cpu" and threads > 1 and not any(map(os.environ.get, SET_BY_USER))
    if not useful or not _ONE_WATCH.acquire(blocking=False):
        yield
        return
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(threads, stop), daemon=True, name="giving way")
    try:
        watch.start()
        yield
    finally:
        stop.set()
        if watch.ident is not None:
            watch.join()
        _ONE_WATCH.release()


def _watch(threads: int, stop: threading.Event) -> None:
    """Look at the cores until ``stop`` is set, and let a team of ``threads`` sleep or
    spin accordingly."""
    cores = os.sched_getaffinity(0)
    before = _clocks(cores)
    with ExitStack() as asleep:
        sleeping = False
        while before and not stop.wait(LOOK):
            now = _clocks(cores)
            if now is None:
                return
            crowded = are_crowded(threads, len(cores), others(before, now))
            before = now
            if crowded and not sleeping:
                asleep.enter_context(sleeping_threads(threads, len(cores)))
            elif sleeping and not crowded:
                asleep.close()
            sleeping = crowded


def are_crowded(threads: int, cores: int, taken: float) -> bool:
    """Return whether ``threads`` that never sleep want more than ``cores`` hold, beside
    other processes that take ``taken`` cores."""
    return threads + taken > cores + MUCH


def others(before: tuple[float, float, float], now: tuple[float, float, float]) -> float:
    """Return how many cores other processes took, on average, between two readings of
    the clocks (``_clocks``)."""
    wall, work, own = (late - early for early, late in zip(before, now, strict=True))
    return max(0.0, work - own) / max(wall, 1e-9)


def _clocks(cores: Iterable[int]) -> tuple[float, float, float] | None:
    """Return three clocks in seconds: time, work done on these cores by anyone, and
    work of this process; None where the system doesn't tell."""
    try:
        return time.monotonic(), work_on(cores, STAT.read_text()), time.process_time()
    except (OSError, ValueError):
        return None


def work_on(cores: Iterable[int], stat: str) -> float:
    """Return the seconds that these cores have worked since the start of the machine.

    stat: the text of /proc/stat. The time that a host took from this virtual machine
    counts as work. Raises ValueError if the text is another.
    """
    wanted = {f"cpu{core}" for core in cores}
    ticks = 0
    for line in stat.splitlines():
        name, *columns = line.split() or [""]
        if name in wanted:
            wanted.remove(name)
            counts = [int(column) for column in columns[:_COLUMNS]]
            ticks += sum(counts) - sum(counts[i] for i in _IDLE if i < len(counts))
    if wanted:
        raise ValueError(f"no {', '.join(sorted(wanted))} in /proc/stat")
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def sleeping_threads(threads: int, cores: int) -> Iterator[None]:
    """Let all OpenMP threads of this process go to sleep almost at once when they wait.

    GNU's OpenMP spins for 300,000 turns, but for 100 if it holds more threads than
    there are cores (GOMP_SPINCOUNT in its manual). So one more team is held here, which
    sleeps: it makes a team of ``threads`` too many for ``cores``. Other
    implementations are left as they are.
    """
    done, made = threading.Event(), threading.Event()

    def hold() -> None:
        library = ctypes.CDLL(None)  # torch loads its OpenMP for all to see
        with_team = getattr(library, "GOMP_parallel", None)
        if with_team is not None:
            # Each thread of the team calls a function that does nothing.
            nothing = ctypes.cast(library.getpid, ctypes.c_void_p)
            with_team(nothing, None, ctypes.c_uint(max(2, cores - threads + 2)), ctypes.c_uint(0))
        made.set()
        done.wait()

    # A team ends with the thread that made it.
    holder = threading.Thread(target=hold, daemon=True, name="asleep")
    holder.start()
    try:
        made.wait()
        yield
    finally:
        done.set()
        holder.join()
