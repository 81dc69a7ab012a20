"""A claim is held by one process at a time, and no signal is swallowed."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
import weakref
from pathlib import Path

import pytest
from support.paths import ROOT

from cache.system import claims, signals
from cache.system.claims import STALE, claim
from cache.system.signals import Stopped

HOLD = """
import sys
from pathlib import Path
from cache.system.claims import claim
sys.stdin.readline()
with claim(Path(sys.argv[1]), *sys.argv[2:]) as held:
    print(*sorted(held), flush=True)
    sys.stdin.readline()
"""


# on a file system without hard links, permissions and times
POOR = """
import sys
sys.path.insert(0, "tests")
from support.workers import poor_disk
poor_disk({number})
"""
# where a process is killed that has created its claim, and not yet written its name
KILLED = """
import os
from pathlib import Path
real = Path.read_bytes
Path.read_bytes = lambda self: [real(self), killed.append(1)][0]
killed, opened = [], os.open
def open_and_die(*given, **named):
    descriptor = opened(*given, **named)
    if killed: os.kill(os.getpid(), 9)
    return descriptor
os.open = open_and_die
"""


class Holder:
    """Another process that tries to hold claims until it is told to end."""

    def __init__(self, folder: Path, *names: str, before: str = "") -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(
            [sys.executable, "-c", before + HOLD, str(folder), *names], text=True, cwd=ROOT, **pipes
        )

    def go(self) -> Holder:
        print(file=self.process.stdin, flush=True)
        return self

    def held(self) -> list[str]:
        return self.process.stdout.readline().split()

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


@pytest.fixture
def holder(tmp_path: Path):
    started: list[Holder] = []

    def start(*names: str, before: str = "") -> Holder:
        started.append(Holder(tmp_path / "claims", *names, before=before))
        return started[-1]

    yield start
    for one in started:
        one.end()


def test_one_of_many_processes_holds_a_claim(tmp_path, holder):
    rivals = [holder("a", "b", "c") for _ in range(3)]
    for rival in rivals:
        rival.go()
    assert sorted(name for rival in rivals for name in rival.held()) == ["a", "b", "c"]
    with claim(tmp_path / "claims", "a", "d") as mine:
        assert mine == {"d"}
        assert sorted(claims.holders(tmp_path / "claims"))[-1].startswith(
            socket.gethostname() + ":"
        )
        assert len(claims.holders(tmp_path / "claims")) == 4
    for rival in rivals:
        rival.go().process.wait()
    assert not (tmp_path / "claims").exists()


@pytest.mark.parametrize(
    "number", [errno.EPERM, errno.EACCES, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS]
)
def test_without_hard_links_too_one_of_many_processes_holds_a_claim(tmp_path, holder, number):
    rivals = [holder("a", "b", "c", before=POOR.format(number=number)) for _ in range(3)]
    for rival in rivals:
        rival.go()
    assert sorted(name for rival in rivals for name in rival.held()) == ["a", "b", "c"]
    with claim(tmp_path / "claims", "a", "d") as mine:  # from a machine with links
        assert mine == {"d"}
    rivals[0].process.kill()
    rivals[0].process.wait()
    for rival in rivals[1:]:
        rival.go().process.wait()
    with claim(tmp_path / "claims", "a", "b", "c") as mine:  # what the killed one held, too
        assert mine == {"a", "b", "c"}
    assert not (tmp_path / "claims").exists()


def test_without_hard_links_a_claim_beats_though_its_time_can_t_be_set(tmp_path, holder):
    quick = "\nfrom cache.system import claims\nclaims.BEAT = 0.01\n"
    one = holder("a", before=POOR.format(number=errno.EPERM) + quick).go()
    assert one.held() == ["a"]
    file = tmp_path / "claims/a"
    owner = file.read_text()
    os.utime(file, (0, 0))
    for _ in range(1000):
        if file.stat().st_mtime:
            break
        time.sleep(0.01)
    assert time.time() - file.stat().st_mtime < 60 and file.read_text() == owner


def test_without_hard_links_a_claim_without_its_owner_is_taken_over_once_it_is_stale(
    tmp_path, holder
):
    killed = holder("a", before=POOR.format(number=errno.EPERM) + KILLED).go()
    assert killed.held() == [] and killed.process.wait() == -signal.SIGKILL
    file = tmp_path / "claims/a"
    assert file.read_bytes() == b""
    with claim(tmp_path / "claims", "a") as mine:
        assert mine == set()  # its owner may be just about to write its name
    then = time.time() - STALE - 5
    os.utime(file, (then, then))
    with claim(tmp_path / "claims", "a") as mine:
        assert mine == {"a"}


def test_without_hard_links_a_full_disk_leaves_no_claim_without_its_owner(tmp_path, monkeypatch):
    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    def on_a_full_disk(path: Path, flags: int, mode: int = 0o777) -> int:
        if not flags & os.O_EXCL:
            return real(path, flags, mode)
        os.close(real(path, flags, mode))
        return real("/dev/full", os.O_WRONLY)

    real = os.open
    monkeypatch.setattr(os, "link", link)
    monkeypatch.setattr(os, "open", on_a_full_disk)
    with pytest.raises(OSError, match="No space left"), claim(tmp_path / "claims", "a"):
        pass
    assert not (tmp_path / "claims").exists()


@pytest.mark.parametrize("reaped", [True, False])
def test_the_claim_of_a_killed_process_is_taken_over(tmp_path, holder, reaped):
    killed = holder("a").go()
    assert killed.held() == ["a"]
    with claim(tmp_path / "claims", "a") as mine:
        assert mine == set()
    os.kill(killed.process.pid, signal.SIGKILL)
    if reaped:
        killed.process.wait()
    else:  # a zombie, as in a container whose first process collects no children
        while ") Z" not in Path(f"/proc/{killed.process.pid}/stat").read_text():
            time.sleep(0.001)
    assert (tmp_path / "claims/a").exists()
    with claim(tmp_path / "claims", "a") as mine:
        assert mine == {"a"}
        assert claims.holders(tmp_path / "claims") == [f"{socket.gethostname()}:{os.getpid()}"]
    assert not (tmp_path / "claims").exists()


def leave_claim(folder: Path, **owner: object) -> Path:
    folder.mkdir()
    (folder / "a").write_text(json.dumps(claims._me() | {"started": "1"} | owner))
    return folder / "a"


def test_a_process_number_used_again_does_not_keep_a_claim_alive(tmp_path):
    leave_claim(tmp_path / "claims")  # this very process, but one that started at boot
    with claim(tmp_path / "claims", "a") as mine:
        assert mine == {"a"}


@pytest.mark.parametrize(("age", "taken"), [(0, False), (STALE - 5, False), (STALE + 5, True)])
@pytest.mark.parametrize("content", ["claim", "empty"])
@pytest.mark.parametrize("place", ["host", "boot", "namespace"])
def test_the_claim_of_another_machine_is_taken_over_only_when_stale(
    tmp_path, age, taken, content, place
):
    """A container of the same host name, on another node or beside this container, may
    have a process of the same number."""
    file = leave_claim(tmp_path / "claims", **{place: "elsewhere"})
    if content == "empty":  # the owner has just created it, or died before writing its name
        file.write_text("")
    then = time.time() - age
    os.utime(file, (then, then))
    with claim(tmp_path / "claims", "a") as mine:
        assert bool(mine) is taken
    assert [p.name for p in tmp_path.glob("claims/*")] == ([] if taken else ["a"])


def test_a_held_claim_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    with claim(tmp_path / "claims", "a"):
        os.utime(tmp_path / "claims/a", (0, 0))
        for _ in range(500):
            if (tmp_path / "claims/a").stat().st_mtime:
                break
            time.sleep(0.01)
        assert time.time() - (tmp_path / "claims/a").stat().st_mtime < 60


def test_two_that_find_the_same_dead_claim_do_not_both_take_it(tmp_path, monkeypatch):
    leave_claim(tmp_path / "claims")
    real, rival = claims._dead, claim(tmp_path / "claims", "a")
    rivals: list[set[str]] = []

    def slow(file: Path) -> bool:
        dead = real(file)
        if not rivals:  # another worker takes the claim between the look and the taking
            rivals.append(set())
            rivals[0] = rival.__enter__()
        return dead

    monkeypatch.setattr(claims, "_dead", slow)
    with claim(tmp_path / "claims", "a") as mine:
        assert sorted([*mine, *rivals[0]]) == ["a"]
    rival.__exit__(None, None, None)


COME_AND_GO = """
import sys
from pathlib import Path
from cache.system.claims import claim, holders, sweep
folder, name = Path(sys.argv[1]), sys.argv[2]
sys.stdin.readline()
for _ in range(400):
    with claim(folder, name) as held:
        assert held == {name}, "nobody else asks for it"
    holders(folder)
    sweep(folder)
"""


def test_processes_that_come_and_go_meet_no_error_in_the_folder_that_comes_and_goes_with_them(
    tmp_path,
):
    """The process that lets go of the last claim removes the folder, while others make
    the folder."""
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", COME_AND_GO, str(tmp_path / "claims")]
    several = [subprocess.Popen([*command, name], text=True, cwd=ROOT, **pipes) for name in "abc"]
    for one in several:
        print(file=one.stdin, flush=True)
    said = [one.communicate()[1] for one in several]
    assert [one.returncode for one in several] == [0, 0, 0], said
    assert not (tmp_path / "claims").exists()


def test_a_folder_that_is_removed_while_a_claim_is_taken_is_made_again(tmp_path, monkeypatch):
    folder, real, removed = tmp_path / "claims", os.link, []

    def link(source: Path, target: Path) -> None:
        if not removed:
            removed.append(target)
            Path(source).unlink()
            folder.rmdir()
        real(source, target)

    monkeypatch.setattr(os, "link", link)
    with claim(folder, "a") as mine:
        assert mine == {"a"} and removed


def test_a_folder_that_vanishes_while_it_is_made_is_made_again(tmp_path, monkeypatch):
    """Path.mkdir raises FileExistsError if the folder is there at first, and gone when
    mkdir then asks whether it is a folder."""
    # First while the claims' folder is made, then while a claim is put into it.
    real, vanishes = (Path.mkdir, [True, False, True])

    def mkdir(self: Path, *more: object, **how: object) -> None:
        if vanishes and vanishes.pop(0):
            raise FileExistsError(self)
        real(self, *more, **how)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with claim(tmp_path / "claims", "a") as mine:
        assert mine == {"a"} and not vanishes


def test_a_claim_that_was_taken_over_is_neither_renewed_nor_let_go_of(tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "BEAT", 0.01)
    file = tmp_path / "claims/a"
    with claim(tmp_path / "claims", "a") as mine:
        assert not mine.lost("a")
        fresh = file.with_name("b")
        fresh.write_text(json.dumps(claims._me() | {"host": "elsewhere"}))
        os.utime(fresh, (5, 5))
        fresh.replace(file)
        assert mine.lost("a")
        time.sleep(0.3)
        assert file.stat().st_mtime == 5
    assert json.loads(file.read_text())["host"] == "elsewhere"


def test_sweeping_leaves_living_claims(tmp_path, holder):
    living = holder("a").go()
    assert living.held() == ["a"]
    dead = tmp_path / "claims/b"
    dead.write_text(json.dumps(claims._me() | {"started": "1"}))
    litter = tmp_path / f"claims/c.{claims._place_key()}.{2**22 + 1}.0.new"
    litter.write_text("")
    claims.sweep(tmp_path / "claims")
    assert os.listdir(tmp_path / "claims") == ["a"]


def test_a_claim_that_came_to_life_again_is_not_swept(tmp_path, holder, monkeypatch):
    """Between the look and the removal another process takes the dead claim over."""
    leave_claim(tmp_path / "claims")
    real, rivals = claims._dead, []

    def slow(file: Path) -> bool:
        dead = real(file)
        if not rivals:
            rivals.append(holder("a").go())
            assert rivals[0].held() == ["a"]
        return dead

    monkeypatch.setattr(claims, "_dead", slow)
    claims.sweep(tmp_path / "claims")
    assert claims._owner(tmp_path / "claims/a")["process"] == rivals[0].process.pid


@pytest.mark.parametrize("hidden", [FileNotFoundError, PermissionError])
def test_a_process_that_the_system_hides_keeps_its_claim(tmp_path, holder, monkeypatch, hidden):
    """/proc may be mounted with hidepid, which hides another user's processes."""
    theirs = holder("a").go()
    assert theirs.held() == ["a"]
    real = open

    def look(path: object, *more: object) -> object:
        if str(path).startswith("/proc/"):
            raise hidden(path)
        return real(path, *more)

    monkeypatch.setattr("builtins.open", look)
    with claim(tmp_path / "claims", "a") as mine:
        assert not mine
    theirs.process.kill()
    theirs.process.wait()
    with claim(tmp_path / "claims", "a") as mine:
        assert mine == {"a"}


def test_a_claim_that_could_not_be_let_go_of_is_in_nobodys_way(tmp_path, monkeypatch):
    """The disk doesn't answer when the claim should be let go of. The process goes on,
    and later doesn't wait for its own old claim."""
    with claim(tmp_path / "claims", "a") as mine:
        with monkeypatch.context() as patch:
            patch.setattr(
                Path,
                "read_text",
                lambda self: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")),
            )
            with pytest.raises(OSError):
                mine.lost("a")  # an owner that can't be read
        assert not mine.lost("a")
        monkeypatch.setattr(
            Path,
            "read_text",
            lambda self: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")),
        )
    monkeypatch.undo()
    assert (tmp_path / "claims/a").exists() and not claims.held(tmp_path / "claims", "a")
    with claim(tmp_path / "claims", "a") as mine:
        assert mine == {"a"} and claims.held(tmp_path / "claims", "a")


def test_a_name_that_is_a_link_to_itself_is_no_reason_for_a_trace(tmp_path):
    (tmp_path / "s.zarr").symlink_to("s.zarr")
    assert claims.claims_of(tmp_path / "s.zarr").name == "s.zarr.claims"


# ---- signals


def swallowed() -> None:
    """Send a signal in a callback of a weak reference, where Python only prints an
    exception and goes on."""
    thing = type("Thing", (), {})()
    _ = weakref.ref(thing, lambda gone: os.kill(os.getpid(), signal.SIGTERM))
    del thing


def test_a_signal_that_python_swallows_is_raised_by_the_next_check(monkeypatch):
    unraisable = []
    monkeypatch.setattr(sys, "unraisablehook", unraisable.append)
    with pytest.raises(Stopped, match="SIGTERM"), signals.on_signals():
        swallowed()
        assert [type(lost.exc_value) for lost in unraisable] == [Stopped]
        signals.check()
    signals.check()  # the signal was that command's, not a later one's


def test_a_clean_up_on_the_way_out_is_not_stopped_again():
    done = []
    with pytest.raises(Stopped), signals.on_signals():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            with signals.finishing():
                done.append("first")
            signals.check()
            done.append("second")
    assert done == ["first", "second"]


def test_what_is_being_finished_is_finished_and_a_second_signal_is_obeyed_at_once():
    done = []
    with pytest.raises(Stopped, match="SIGTERM"), signals.on_signals(), signals.finishing():
        os.kill(os.getpid(), signal.SIGTERM)
        done.append("finished")
    with pytest.raises(Stopped, match="SIGINT"), signals.on_signals(), signals.finishing():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        done.append("never")
    assert done == ["finished"]


def test_a_call_that_a_signal_interrupts_before_it_begins_leaves_no_warning():
    """Zarr's calls are coroutines: Python warns of a coroutine that nobody awaits."""
    code = """
import os, signal
from cache.system.signals import on_signals
async def read(): pass
def call(coroutine): os.kill(os.getpid(), signal.SIGINT)
try:
    with on_signals():
        call(read())
except KeyboardInterrupt as stop:
    print(stop)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("SIGINT\n", "")
