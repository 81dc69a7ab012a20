"""Killed at any moment, stage one loses no finished shard, believes no unfinished one,
and goes on to the same bytes.

A story is a store that is made, extended by two views, or mended, by a command that is
killed again and again, in every phase, and then left alone. ``KILLS=500 python -m
pytest tests/store/test_killed.py -s`` kills 500 times and counts the states in which
the kills left the store.
"""

from __future__ import annotations

import io
import itertools
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support.disk import MEMORY
from support.killing import Event, Moment, Run, Server
from support.small import changed, tree, write_photos
from support.stores import create

from cache import LabelStore
from cache.errors import DamagedStore
from cache.writer import StoreWriter

KILLS = int(os.environ.get("KILLS", "40"))
VIEWS = 3
ARRAYS = ("labels", "boxes", "flips", "records")
STATES = (
    "no store yet",
    "empty store half made",
    "empty store",
    "half-written file of a shard",
    "data without its record",
    "half-written record",
    "between shards",
    "before the extension",
    "extension half done",
    "damaged",
    "mending",
    "all shards there",
)


@dataclass
class Whole:
    """The stores that uninterrupted runs make, and the events of these runs."""

    path: Path  # three views
    empty: Path  # by a run that was killed when it had made the empty store
    one_view: Path  # the first view, by a command that asked for one view
    damaged: Path  # three views, with damage to the store's description and to a shard
    seconds: float  # seconds of a run
    making: list[Event]
    extending: list[Event]
    mending: list[Event]


@pytest.fixture(scope="module")
def server(recipe, tmp_path_factory) -> Server:
    """A server for runs of a small recipe: 15 photographs and a file that is no image,
    in two shards a view."""
    folder = tmp_path_factory.mktemp("killed")
    write_photos(folder / "data", 5)
    (folder / "data" / "bee" / "notes.txt").write_text("no image")
    small = changed(
        recipe,
        crops={"views": 1},
        store={"shard_rows": 8, "batch_size": 8, "views_per_decode": 2},
        render={"threads": 1},
    )
    (folder / "recipe.yaml").write_text(small.to_yaml())
    return Server(folder, folder / "recipe.yaml", folder / "data")


@pytest.fixture(scope="module")
def whole(server, tmp_path_factory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")

    def run(path: Path, views: int, moment: Moment | None = None) -> list[Event]:
        path.parent.mkdir(exist_ok=True)
        made = server.start(path, f"--views={views}", moment=moment)
        assert made.end() == (-9 if moment else 0), made.said()
        return made.events()

    started = time.monotonic()
    making = run(folder / "whole" / "s.zarr", VIEWS)
    seconds = time.monotonic() - started
    run(folder / "empty" / "s.zarr", VIEWS, Moment(making.index(Event("rename", "s.zarr")) + 2))
    run(folder / "one" / "s.zarr", 1)
    shutil.copytree(folder / "one", folder / "extended")
    extending = run(folder / "extended" / "s.zarr", VIEWS)
    shutil.copytree(folder / "whole", folder / "damaged")
    damage(folder / "damaged" / "s.zarr")
    shutil.copytree(folder / "damaged", folder / "mended")
    mending = run(folder / "mended" / "s.zarr", VIEWS)
    assert tree(folder / "mended") == tree(folder / "extended") == tree(folder / "whole")
    paths = (folder / name / "s.zarr" for name in ("whole", "empty", "one", "damaged"))
    return Whole(*paths, seconds, making, extending, mending)


DAMAGED = (1, 1)  # view and shard


def damage(path: Path) -> None:
    for file in (
        path / "boxes/zarr.json",
        next((path / "images/height/c").iterdir()),
        path / "flips/c/1/1",
    ):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def place(event: Event) -> str:
    """Name the part of the store that an event touches."""
    first, _, rest = event.path.partition("/")
    if event.path == "image":
        return "images"
    if first == "s.zarr.claims":
        return "claims"
    if ".mending" in first:
        return "mending"
    if first != "s.zarr" or not rest:
        return "creation"
    if "zarr.json" in rest or rest.startswith("images"):
        return "description"
    return "record" if rest.startswith("records/") else "shard"


def phases(events: list[Event]) -> dict[tuple[str, str], list[int]]:
    """Group the numbers of a run's events by phase and kind of call. Each group is one
    kind of moment for a kill."""
    places = [place(event) for event in events]
    # the change that a run makes to the description of an existing store
    changing = "mending" if "mending" in places else "extension"
    places = [changing if place == "description" else place for place in places]
    made = events.index(Event("rename", "s.zarr")) if Event("rename", "s.zarr") in events else -1
    labelled = places.index("shard")
    changed = places.index(changing) if changing in places else -1
    last = max(
        i for i, event in enumerate(events) if places[i] == "record" and event.what == "rename"
    )
    found: dict[tuple[str, str], list[int]] = {}
    for i, event in enumerate(events):
        if made < i < labelled and changed < 0:
            phase = "empty store"
        elif i < changed:
            phase = f"before the {changing}"
        elif i > last:
            phase = "the end"
        else:
            phase = "images, no store yet" if places[i] == "images" and i < made else places[i]
        what = event.what if event.what in ("open", "write", "fsync") else "names"
        if what == "write" and event.path.startswith("s.zarr/") and phase == changing:
            # Each of these few files is a kind of its own, since its remains may stay.
            what += f" {Path(event.path).parent}"
        found.setdefault((phase, what if phase == places[i] else ""), []).append(i)
    return found


def names(folder: Path) -> set[str]:
    """List all files and folders below a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def state(path: Path, before: set[str], views: int) -> str:
    """Name the state in which a kill has left the store. before: the names in and
    beside the store when the run began."""
    after = names(path.parent)
    fresh = after - before
    if not path.exists():
        return (
            "empty store half made"
            if any(name.endswith(".creating") for name in fresh)
            else "no store yet"
        )
    halves = [name for name in fresh if name.endswith(".partial")]
    try:
        store = LabelStore.open(path)
        _ = store.images
    except DamagedStore:
        return "mending" if halves or any(".mending" in name for name in fresh) else "damaged"
    if len({store.array(name).shape[0] for name in ARRAYS}) > 1 or any(
        "/c/" not in name for name in halves
    ):
        return "extension half done"
    if halves:
        return (
            "half-written record"
            if any("/records/" in name for name in halves)
            else "half-written file of a shard"
        )
    finished = store.finished()
    if any(
        f"s.zarr/labels/c/{view}/{shard}/0" in fresh and not finished[view, shard]
        for view, shard in np.ndindex(finished.shape)
    ):
        return "data without its record"
    if len(finished) < views:
        return "before the extension"
    return (
        "all shards there"
        if finished.all()
        else "between shards"
        if finished.any()
        else "empty store"
    )


def finished_files(
    path: Path, whole: Path, doubtful: Container[tuple[int, int]] = ()
) -> dict[str, tuple[int, int]]:
    """Return inode and time of every file of a finished shard, which may never change.
    Requires each finished shard to be the shard of an uninterrupted run, but for
    doubtful shards."""
    if not path.exists():
        return {}
    store = LabelStore.open(path)
    files = {}
    for view, shard in np.argwhere(store.finished()).tolist():
        ours = [store.file(name, view, shard) for name in ARRAYS]
        wrong = [
            file
            for file in ours
            if file.read_bytes() != (whole / file.relative_to(path)).read_bytes()
        ]
        if not wrong:
            files |= {
                str(file.relative_to(path)): (file.stat().st_ino, file.stat().st_mtime_ns)
                for file in ours
            }
        else:
            assert (view, shard) in doubtful, f"{wrong} is believed and wrong"
    return files


def records_made(run: Run) -> Counter[str]:
    """Count how often a run has finished each shard. The run's last event is left out,
    since it may not have happened."""
    return Counter(
        event.path
        for event in run.events()[:-1]
        if event.what == "rename" and event.path.startswith("s.zarr/records/c/")
    )


def require_whole(path: Path, whole: Path) -> None:
    """Require the store of an uninterrupted run, and no other file in or beside it."""
    left = names(path.parent) - {f"s.zarr/{name}" for name in names(whole)} - {"s.zarr"}
    assert not left, "left over"
    made, wanted = tree(path), tree(whole)
    assert sorted(made) == sorted(wanted)
    assert [name for name in wanted if made[name] != wanted[name]] == []


class Story:
    """One store from its start to its end. start: a store to copy, or None."""

    def __init__(self, server: Server, whole: Whole, start: Path | None, keep: Path) -> None:
        self.server, self.whole, self.keep = server, whole, keep
        self.folder = Path(tempfile.mkdtemp(dir=MEMORY))
        self.path = self.folder / "beside" / "s.zarr"
        self.damaged = start == whole.damaged
        if start:
            shutil.copytree(start.parent, self.path.parent)
        else:
            self.path.parent.mkdir()
        self.kept: dict[str, tuple[int, int]] = {}
        self.made: Counter[str] = Counter()
        self.told: list[str] = []
        self.look()

    def killed(self, views: int, *, moment: Moment | None = None, after: float = 0.0) -> str | None:
        """Start a run that is killed, at ``moment`` or from outside after some seconds.
        Returns the state that is left, or None if the run ended before the kill."""
        before = names(self.path.parent)
        run = self.server.start(self.path, f"--views={views}", moment=moment)
        if moment is None:
            time.sleep(after)
            run.kill()
        status = run.end()
        self.told.append(
            f"{views} views, {moment or 'from outside'}, ended {status} at "
            f"{(run.events() or [None])[-1]}"
        )
        assert status in (0, -9), run.said()
        self.look(run)
        return state(self.path, before, views) if status else None

    def look(self, *runs: Run) -> None:
        """Require every finished shard to be there, unchanged."""
        for run in runs:
            self.made += records_made(run)
        try:
            kept = finished_files(self.path, self.whole.path, [DAMAGED] if self.damaged else ())
        except DamagedStore:
            assert self.damaged
            return
        assert {name: kept.get(name) for name in self.kept} == self.kept, (
            "a finished shard is lost, or was made again"
        )
        self.kept = kept

    def finish(self, views: int) -> None:
        """Run without a kill, and compare with the store of an uninterrupted run."""
        run = self.server.start(self.path, f"--views={views}")
        self.told.append(f"{views} views, to the end")
        assert run.end() == 0, run.said()
        self.look(run)
        require_whole(
            self.path,
            self.whole.path if LabelStore.open(self.path).views == VIEWS else self.whole.one_view,
        )
        assert set(self.made.values()) <= {1}, "a shard was finished twice"

    def __enter__(self) -> Story:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if error:
            shutil.copytree(self.folder, self.keep)
            error.add_note("\n".join([f"The story, whose end is kept in {self.keep}:", *self.told]))
        shutil.rmtree(self.folder)


def seeded() -> np.random.Generator:
    """Make a generator with a new seed, which a failing test shows."""
    seed = int(np.random.default_rng().integers(1 << 32))
    print(f"\nseed {seed}")
    return np.random.default_rng(seed)


def test_killed_at_any_moment_nothing_is_lost_and_nothing_is_wrong(server, whole, tmp_path):
    rng = seeded()
    kinds: dict[tuple[str, str], tuple[Path | None, list[int]]] = {}
    for start, events in (
        (None, whole.making),
        (whole.one_view, whole.extending),
        (whole.damaged, whole.mending),
    ):
        for found, numbers in phases(events).items():
            kinds.setdefault(found, (start, numbers))
    seen: dict[str, Counter[str]] = {}
    for number in itertools.count():
        if number >= len(kinds) and sum(map(Counter.total, seen.values())) >= KILLS:
            break
        (phase, what), (start, events) = list(kinds.items())[number % len(kinds)]
        with Story(server, whole, start, tmp_path / str(number)) as story:
            for again in range(rng.geometric(0.6)):
                part, wait = rng.choice([0.0, 0.5]), rng.choice([None, rng.random() * 0.003])
                if again == 0:  # at the chosen event: at once, in the second round with a wait
                    cause, views = phase, VIEWS
                    left = story.killed(
                        views,
                        moment=Moment(
                            int(rng.choice(events)), wait if number >= len(kinds) else None, part
                        ),
                    )
                else:
                    # A store may be extended before it is finished.
                    views = VIEWS if rng.random() < 0.7 else 1
                    # Mostly early events, which recover from the kill before.
                    if rng.random() < 0.7:
                        cause = "any event"
                        left = story.killed(
                            views, moment=Moment(int(len(whole.making) ** rng.random()), wait, part)
                        )
                    else:
                        cause = "from outside"
                        left = story.killed(views, after=rng.random() * whole.seconds)
                if left:
                    seen.setdefault(cause, Counter())[left] += 1
            # A store may also do without the extension in which it was killed.
            story.finish(1 if "write " in what or number % 2 else VIEWS)
    print(table(seen))
    assert set(STATES) <= set(sum(seen.values(), Counter())), "a phase was never met"


def table(seen: dict[str, Counter[str]]) -> str:
    """Tabulate kills by the phase that was aimed at and the state that was left."""
    rows = {**seen, "all": sum(seen.values(), Counter())}
    lines = [" " * 22 + "".join(f"{i + 1:>5}" for i in range(len(STATES))) + "  all"]
    lines += [
        f"{cause:22}" + "".join(f"{row[left] or '':>5}" for left in STATES) + f"{row.total():>5}"
        for cause, row in rows.items()
    ]
    return "\n".join([*lines, *(f"{i + 1}: {left}" for i, left in enumerate(STATES))])


def test_a_kill_is_no_matter_to_another_worker(server, whole, tmp_path):
    """Two workers run at once, on one share or on two. One is killed, and the other
    goes on to its end."""
    rng = seeded()
    same, split, later = ("0/1", "0/1"), ("0/2", "1/2"), ("1/2", "0/2")
    pairs = [
        (whole.empty, same),
        (None, split),
        (whole.one_view, split),
        (whole.empty, later),
        (None, same),
        (whole.one_view, same),
    ]
    for number in range(max(6, KILLS // 8)):
        start, shares = pairs[number % 6]
        with Story(server, whole, start, tmp_path / str(number)) as story:
            moment = Moment(int(rng.integers(len(whole.making))), part=0.5)
            killed = server.start(
                story.path, f"--views={VIEWS}", f"--worker={shares[0]}", moment=moment
            )
            other = server.start(story.path, f"--views={VIEWS}", f"--worker={shares[1]}")
            story.told.append(f"shares {shares}, the first {moment}")
            for run, share in zip((killed, other), shares, strict=True):
                status = run.end()
                # Worker 0, which makes and extends a store, may have been killed early.
                nobody = share == "1/2" and "nobody has begun" in run.said()
                assert (
                    status == 0 or (status == 1 and nobody) or (status == -9 and run is killed)
                ), run.said()
            story.look(killed)
            story.look(other)
            story.finish(VIEWS)


def test_a_store_opens_while_another_worker_extends_it(tmp_path, monkeypatch):
    """The extension comes at each read of a reader in turn."""
    path = tmp_path / "s.zarr"
    create(path)
    writer, real = StoreWriter(path), io.open

    def opening(file: object, *given: object, **named: object) -> object:
        if str(file).endswith("zarr.json") and next(read) == moment:
            writer.grow(views)
        return real(file, *given, **named)

    moment, views = 0, writer.store.views
    while writer.store.views == views:
        read, views = itertools.count(), views + 1
        with monkeypatch.context() as patch:
            patch.setattr(io, "open", opening)
            store = LabelStore.open(path)
            assert store.views in (views - 1, views) and store.progress() == (
                0,
                store.views * store.shards,
            )
        moment += 1
    assert moment > 10  # the loop ends at a moment after the reader's last read
