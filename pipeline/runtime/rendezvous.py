"""Let the processes of a run find each other, as torch.distributed's env:// does, but
in steps that a signal ends at once, within a limit, and with a line that says who is
missing.

torch's own rendezvous waits in one long call of C++, in which Python obeys no signal.
Here torch is called only once the server answers, and in a thread; the main thread
waits in Python.
"""

from __future__ import annotations

import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from textwrap import shorten
from typing import TypeVar

from torch import distributed

from cache.errors import MealError
from cache.system.signals import check
from pipeline.runtime import progress
from pipeline.runtime.launch import Launch, MeetingPoint
from pipeline.runtime.progress import duration, say

LIMIT = 600.0  # seconds after which a process that hasn't come is missing
SAYS = 10.0  # seconds after which a line says who is waited for
ANSWERS = 20.0  # seconds in which a server that is there must answer
POLL = 0.1  # seconds between two looks
T = TypeVar("T")


class Missing(MealError):
    """Processes of a run that didn't meet, or couldn't."""


def meet(me: Launch, place: MeetingPoint, timeout: timedelta) -> distributed.Store:
    """Wait until every process of the run has come to ``place``, and return the store
    through which they speak, for ``init_process_group``.

    Process 0 serves the store, unless torchrun's agent does. A signal ends the wait at
    once. timeout: of the store from then on. Raises Missing, in one line, if a process
    hasn't come within ``LIMIT`` seconds, or if the place can't be used.
    """
    hosting = me.rank == 0 and not _agent_serves()
    wait = _Wait(me, place)
    wait.for_server(hosting)
    server = _attempt(lambda: _connect(me, place, hosting=hosting), me, place)
    if me.rank:
        progress.silence()  # process 0 says who is missing
    store = wait.for_all(server)
    store.set_timeout(timeout)
    return store


class _Wait:
    """A wait for other processes: what to say in its course and at its limit."""

    def __init__(self, me: Launch, place: MeetingPoint) -> None:
        self.me, self.place = me, place
        self.began, self.said = time.monotonic(), False

    def for_server(self, hosting: bool) -> None:
        """Wait until the name of the meeting point is known and, unless this process
        serves there, a connection succeeds."""
        while (why := _unreached(self.place, hosting)) is not None:
            self._pause("process 0", why)

    def for_all(self, server: distributed.Store) -> distributed.Store:
        """Say that this process is here, wait for all others, and return the store of
        this start of the run.

        torchrun's agent keeps one server over restarts, and with it what dead processes
        have written there. So process 0 draws a name for each start. It tells the name
        to every process that asks, and everything else is written under the name.
        """
        name = uuid.uuid4().hex if self.me.rank == 0 else self._told(server)
        store = distributed.PrefixStore(name, server)
        with _while_the_server_lives(self.place):
            first = store.add(f"here/{self.me.rank}", 1) == 1
            world = store.compare_set("world", "", str(self.me.world)).decode()
        self._require_alike(first, world)
        while True:
            with _while_the_server_lives(self.place):
                missing = [
                    rank for rank in range(self.me.world) if not store.check([f"here/{rank}"])
                ]
                for rank in range(1, self.me.world) if self.me.rank == 0 else ():
                    if server.check([_asks(rank)]):
                        server.set(server.get(_asks(rank)).decode(), name)
            if not missing:
                return store
            several = "processes" if len(missing) > 1 else "process"
            shown = ", ".join(map(str, missing[:8])) + (", …" if len(missing) > 8 else "")
            self._pause(f"{several} {shown}")

    def _told(self, server: distributed.Store) -> str:
        """Ask process 0 for the name of this start, and wait for the answer. The answer
        has a key of its own, so that it isn't one to a process that is dead."""
        answer = f"meal/answer/{uuid.uuid4().hex}"
        while True:
            with _while_the_server_lives(self.place):
                server.set(_asks(self.me.rank), answer)
                if server.check([answer]):
                    return server.get(answer).decode()
            self._pause("process 0")

    def _require_alike(self, first: bool, world: str) -> None:
        if world != str(self.me.world):
            raise Missing(
                f"WORLD_SIZE is {self.me.world} here, and {world} in another process at "
                f"{self.place}; give all processes the same, or another run another MASTER_PORT"
            )
        if not first:
            raise Missing(
                f"another process at {self.place} has RANK {self.me.rank} too; give every process "
                f"a number of its own, or another run another MASTER_PORT"
            )

    def _pause(self, who: str, why: str = "") -> None:
        """Wait a moment for ``who``. Says so once; raises Missing after the limit."""
        check()
        waited = time.monotonic() - self.began
        where = f"{who} of {self.me.world} at {self.place}{f' ({why})' if why else ''}"
        # Process 0 has the same limit, and says who is missing; wait for its end.
        if waited > LIMIT + (0 if progress.speaks() else 2 * ANSWERS):
            raise Missing(
                f"waited {duration(LIMIT)} in vain for {where}; start what is missing, look at "
                f"what it printed, or check MASTER_ADDR, MASTER_PORT, RANK and the firewall"
            )
        if waited > SAYS and not self.said:
            self.said = True
            say(f"waiting for {where}")
        time.sleep(POLL)


def _asks(rank: int) -> str:
    """Return the key under which a process writes where it looks for an answer."""
    return f"meal/asks/{rank}"


def _unreached(place: MeetingPoint, hosting: bool) -> str | None:
    """Return why nobody answers at the meeting point; None if somebody does. For the
    process that serves there, the name must be known only."""
    try:
        found = _in_a_thread(
            lambda: socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM), LIMIT
        )
    except UnicodeError:
        raise Missing(
            f"MASTER_ADDR {place.host!r} is no name of a machine; set it to the name or address "
            f"of the machine where process 0 runs"
        ) from None
    except socket.gaierror as error:  # a cluster may give the name only once process 0 runs
        return f"MASTER_ADDR is unknown here: {error.strerror}"
    why: str | None = None
    for family, kind, protocol, _, address in () if hosting else found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.settimeout(1.0)
                probe.connect(address)
            return None
        except OSError as error:
            why = error.strerror or "no answer"
    return why


def _connect(me: Launch, place: MeetingPoint, *, hosting: bool) -> distributed.Store:
    return distributed.TCPStore(
        place.host,
        place.port,
        me.world,
        is_master=hosting,
        timeout=timedelta(seconds=ANSWERS / 2),
        wait_for_workers=False,
        multi_tenant=True,
        use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
    )


def _attempt(connect: Callable[[], T], me: Launch, place: MeetingPoint) -> T:
    """Connect to the store's server, or say in one line why not."""
    try:
        with _torch_silent():
            return _in_a_thread(connect, ANSWERS)
    except (RuntimeError, TimeoutError) as error:
        check()
        if "start new thread" in str(error):
            raise
        text = " ".join(str(error).split())
        if re.search("EADDRINUSE|[Aa]ddress already in use", text):
            raise Missing(
                f"MASTER_PORT {place.port} is taken by another program on this machine, maybe "
                f"another run; choose another port, the same for all processes"
            ) from None
        if me.rank == 0 and not _agent_serves():
            raise Missing(
                f"process 0 runs here, and can't reach itself at {place}; set MASTER_ADDR to the "
                f"name or address of this machine, for all processes"
                if "listen" not in text
                else f"process 0 can't open port {place.port} ({shorten(text, 120)}); choose "
                f"another MASTER_PORT, the same for all processes"
            ) from None
        raise Missing(
            f"what answers at {place} is not process 0 of this run; another program may hold the "
            f"port there: choose another MASTER_PORT, the same for all processes"
        ) from None


@contextmanager
def _while_the_server_lives(place: MeetingPoint) -> Iterator[None]:
    try:
        yield
    except RuntimeError:
        check()  # raises Stopped: a signal to all processes ends process 0, too
        raise Missing(
            f"process 0 at {place} has ended before all processes were there; what it printed "
            f"says why"
            if progress.speaks()
            else ""
        ) from None


def _in_a_thread(do: Callable[[], T], seconds: float) -> T:
    """Call ``do`` in a thread, and return its result or raise its error. Signals are
    obeyed meanwhile. Raises TimeoutError if ``do`` takes longer than ``seconds``; then
    the thread is left to itself."""
    found: list[T] = []
    failed: list[BaseException] = []

    def work() -> None:
        try:
            found.append(do())
        except BaseException as error:  # raised in the caller
            failed.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    patience = time.monotonic() + seconds
    while thread.is_alive():
        thread.join(POLL)
        check()
        if time.monotonic() > patience:
            raise TimeoutError
    if failed:
        raise failed[0]
    return found[0]


@contextmanager
def _torch_silent() -> Iterator[None]:
    """Keep torch's C++ from printing its stack on stderr, for a moment in which nothing
    else is printed."""
    try:
        kept = os.dup(2)
    except OSError:  # stderr is closed
        yield
        return
    try:
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 2)
        os.close(nothing)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _agent_serves() -> bool:
    """Return whether torchrun's agent serves the store; it says so to the processes."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
