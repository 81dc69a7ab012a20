"""The power may fail at any moment: the store then believes only what was written, and
still holds all that was done.

The disk of these tests (support/disk.py) keeps any part of the data that wasn't forced
to it. So it shows a missing fsync, which no kill does.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from support import stores
from support.disk import MEMORY, Disk, Moment
from support.small import CPU, changed, tree, write_photos
from support.stores import blocks, create, manifest

from cache import LabelStore, StoreError
from cache.repair import mend
from cache.system import claims
from cache.writer import StoreWriter

VIEWS = 3
# (view, shard): shard 3 has no usable image, shard 4 is the short last shard
FIRST, GROWN = (((0, 0), (1, 4)), ((2, 3), (0, 2)))

Place = tuple[int, int]
Blocks = tuple[np.ndarray, ...]


@dataclass
class Truth:
    """The manifest and the shards that may be read of a store."""

    manifest: str  # the manifest's digest
    written: dict[Place, list[Blocks]]


def make(path: Path, done: set) -> None:
    """Make a store of two views, and extend it. Existing parts are kept. Each finished
    step is added to ``done``."""
    if not path.exists():
        create(path)
    done.add("the store")
    writer = StoreWriter(path)
    write(writer, FIRST, done)
    writer.grow(VIEWS)
    done.add("the third view")
    write(writer, GROWN, done)


def write(writer: StoreWriter, places: tuple[Place, ...], done: set) -> None:
    for view, shard in places:
        with writer.claimed([view], shard) as mine:
            for view in mine:
                stores.write(writer, view, shard, *blocks(writer, view, shard))
                done.add((view, shard))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "s.zarr"
    make(path, set())
    return path


@pytest.fixture(scope="module")
def truth(whole) -> Truth:
    writer = StoreWriter(whole)
    return Truth(
        manifest().manifest_digest(),
        {place: [blocks(writer, *place)] for place in (*FIRST, *GROWN)},
    )


def wrong(path: Path, done: frozenset, truth: Truth) -> str | None:
    """Say what is wrong with a store after a crash, or return None."""
    if not path.exists():
        return "the store is lost" if done else None
    try:
        store = LabelStore.open(path)
        finished = store.finished()
        lost = [place for place in done if isinstance(place, tuple) and not finished[place]]
        if lost or ("the third view" in done and store.views < VIEWS):
            return f"lost: {lost or 'the third view'}"
        if store.images.manifest_digest() != truth.manifest:
            return "another manifest is believed"
        for view, shard in np.argwhere(finished).tolist():
            store.require_sound(view, shard)
            rows = store.shard_slice(shard)
            read = (store.codes(view, rows), *store.crops(view, rows))
            if not any(
                all(np.array_equal(a, b) for a, b in zip(read, true, strict=True))
                for true in truth.written[view, shard]
            ):
                return f"view {view}, shard {shard} is believed and wrong"
    except StoreError as error:  # half a store may not bear its name either
        return str(error)
    return None


LUCKS = ("none", "names", "late", "random")


def outcomes(
    disk: Disk, moments: list[Moment], folder: Path, lucks: tuple[str, ...] = LUCKS
) -> Iterator[tuple[Moment, Path]]:
    """Yield contents that the disk may have after a failure at one of the moments, in
    turn, each made as ``folder``."""
    rng = np.random.default_rng(0)
    for moment in moments:
        for luck in lucks:
            shutil.rmtree(folder, ignore_errors=True)
            disk.rebuild(moment, folder, rng, luck)
            switched_on_again(folder)
            yield moment, folder


def switched_on_again(folder: Path) -> None:
    """Make all claims old and their process dead, as after some time without power."""
    for file in folder.rglob("*.claims/*"):
        file.write_bytes(
            file.read_bytes().replace(b'"process": %d' % os.getpid(), b'"process": 99999999')
        )
        os.utime(file, (0, 0))


def first_fault(disk: Disk, store: str, folder: Path, truth: Truth) -> str | None:
    for moment, outcome in outcomes(disk, disk.moments, folder):
        if fault := wrong(outcome / store, moment.done, truth):
            return f"before {moment.call}: {fault}"
    return None


@pytest.fixture
def place() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@pytest.fixture
def root(place) -> Path:
    (place / "disk").mkdir()
    return place / "disk"


STORE = "new/deeper/s.zarr"  # folders that are made for the store must not be lost either


def test_whenever_the_power_fails_a_store_believes_what_was_written_and_keeps_what_was_done(
    root, place, truth
):
    with Disk(root).watch() as disk:
        make(root / STORE, disk.done)
    assert disk.moments[-1].done > set(truth.written)
    assert first_fault(disk, STORE, place / "after", truth) is None


def test_after_a_power_failure_it_goes_on_to_the_same_bytes(root, place, whole):
    with Disk(root).watch() as disk:
        make(root / STORE, disk.done)
    for _, outcome in outcomes(disk, disk.moments[::3], place / "after", ("random",)):
        make(outcome / STORE, set())
        claims.sweep(claims.claims_of(outcome / STORE))
        assert tree(outcome / STORE) == tree(whole)


def test_a_shard_that_is_written_again_is_the_old_one_or_the_new_one_or_none(root, place, truth):
    path = root / "s.zarr"
    create(path)
    writer = StoreWriter(path)
    (new,) = truth.written[1, 4]
    old = (new[0][:, ::-1], new[1][::-1], ~new[2])
    stores.write(writer, 1, 4, *old)
    with Disk(root).watch() as disk:
        disk.done.add("the store")
        stores.write(writer, 1, 4, *new)
    assert (
        first_fault(disk, "s.zarr", place / "after", Truth(truth.manifest, {(1, 4): [old, new]}))
        is None
    )
    last = disk.rebuild(disk.moments[-1], place / "last", luck="none")
    assert (
        wrong(last / "s.zarr", frozenset([(1, 4)]), Truth(truth.manifest, {(1, 4): [new]})) is None
    )


def test_a_mending_that_is_cut_short_can_be_gone_on_with(root, place, whole, truth):
    path, fresh = Path(shutil.copytree(whole, root / "s.zarr")), place / "fresh.zarr"
    create(fresh, views=VIEWS)
    for file in ("zarr.json", "labels/zarr.json", "images/height/c/0"):
        (path / file).write_bytes((path / file).read_bytes()[:-9])
    with Disk(root).watch() as disk:
        mend(path, fresh)
        disk.done |= {"the store", "the third view", *truth.written}
    for moment, outcome in outcomes(disk, disk.moments, place / "after"):
        if not moment.done:
            mend(outcome / "s.zarr", fresh)
        assert wrong(outcome / "s.zarr", disk.moments[-1].done, truth) is None
        assert tree(outcome / "s.zarr") == tree(whole)


def test_data_is_on_the_disk_before_its_record_and_the_record_before_the_claim_is_given_back(
    root, whole
):
    path = root / "s.zarr"
    create(path)
    writer = StoreWriter(path)
    with Disk(root).watch() as disk:
        write(writer, ((0, 0), (1, 3)), disk.done)
    for view, shard in ((0, 0), (1, 3)):
        files = [
            writer.store.file(name, view, shard).relative_to(root)
            for name in ("labels", "boxes", "flips", "records")
        ]
        calls = disk.calls
        named = [calls.index(("rename", str(file))) for file in files]
        claimed, released = (
            calls.index((what, f"s.zarr.claims/{view}-{shard}")) for what in ("link", "unlink")
        )
        assert claimed < min(named) and max(named) == named[-1] < released
        for file, start, end in zip(files, named, [named[-1]] * 3 + [released], strict=True):
            forced = [place for what, place in calls[start:end] if what == "fsync"]
            # the folders up to s.zarr/labels, which exists since creation
            folders = [folder for folder in file.parents if len(folder.parts) > 1]
            assert str(file) in forced and {*map(str, folders)} <= set(forced)


# ---- the disk itself: tests that can't fail prove nothing


@pytest.mark.parametrize("part", ["labels", "boxes", "flips", "records"])
@pytest.mark.parametrize("kind", ["files", "folders"])
def test_an_fsync_that_is_left_out_of_a_shard_is_noticed(root, place, truth, kind, part):
    create(root / "s.zarr")
    disk = Disk(
        root,
        forgets=lambda path: (
            f"/{part}/" in f"/{path}/" and (root / path).is_dir() == (kind == "folders")
        ),
    )
    with disk.watch():
        make(root / "s.zarr", disk.done)
    assert first_fault(disk, "s.zarr", place / "after", truth)


@pytest.mark.parametrize(
    "forgets",
    [
        lambda path: ".creating" in str(path) and path.name == "zarr.json",
        lambda path: ".creating" in str(path) and path.name == "labels",
        lambda path: ".creating" in str(path) and path.name == "0",
        lambda path: path.name == "new",
        lambda path: path.name == "deeper",
    ],
    ids=["files", "an array's names", "the manifest", "a new folder's name", "the store's name"],
)
def test_an_fsync_that_is_left_out_of_a_creation_is_noticed(root, place, truth, forgets):
    disk = Disk(root, forgets=forgets)
    with disk.watch():
        create(root / STORE)
        disk.done.add("the store")
    assert first_fault(disk, STORE, place / "after", truth)


@pytest.mark.parametrize("array", ["labels", "records"])
def test_an_fsync_that_is_left_out_of_an_extension_is_noticed(root, place, truth, array):
    create(root / "s.zarr")
    disk = Disk(root, forgets=lambda path: f"/{array}/zarr.json" in str(path))
    with disk.watch():
        make(root / "s.zarr", disk.done)
    assert first_fault(disk, "s.zarr", place / "after", truth)


def test_a_disk_keeps_what_was_forced_to_it_and_may_lose_the_rest(root, place):
    with Disk(root).watch() as disk:
        (root / "kept").mkdir()
        for name in ("sure", "kept/sure", "kept/torn"):
            (root / name).write_text(name)
        for path in (root / "sure", root / "kept/sure", root / "kept", root):
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
        (root / "late").write_text("late")
        os.rename(root / "sure", root / "renamed")
        disk.moment("now")
    found = []
    rng = np.random.default_rng(0)
    for number in range(200):
        outcome = tree(disk.rebuild(disk.moments[-2], place / str(number), rng))
        # The old name or the new name is there, with the whole content.
        assert (outcome.pop("sure", b"") + outcome.pop("renamed", b"")) == b"sure"
        assert outcome.pop("kept/sure") == b"kept/sure"
        assert len(outcome.pop("kept/torn")) <= len("kept/torn")
        found.append(outcome.get("late"))
        assert outcome.keys() <= {"late"}
    assert {None, b"", b"late", bytes(4), b"la"} <= set(found)


# ---- the same for all of stage one


def test_labels_that_were_made_survive_a_power_failure(
    root, place, recipe, one_thread, monkeypatch
):
    from support.stages import generate

    write_photos(place / "data", 5)
    (place / "data" / "bee" / "notes.txt").write_text("no image")
    small = changed(
        recipe, crops={"views": 2}, store={"shard_rows": 8, "batch_size": 8}, render={"threads": 1}
    )
    more = changed(small, crops={"views": VIEWS})
    whole = LabelStore.open(generate(more, place / "data", place / "whole.zarr", device=CPU).path)
    written = {}
    for view, shard in np.ndindex(VIEWS, whole.shards):
        rows = whole.shard_slice(shard)
        written[view, shard] = [(whole.codes(view, rows), *whole.crops(view, rows))]
    real = StoreWriter.write
    with Disk(root).watch() as disk, monkeypatch.context() as patch:

        def writing(self: StoreWriter, view: int, shard: int, *given: np.ndarray) -> None:
            disk.done.add("the store")
            real(self, view, shard, *given)
            disk.done.add((view, shard))

        patch.setattr(StoreWriter, "write", writing)
        generate(small, place / "data", root / STORE, device=CPU)
        generate(more, place / "data", root / STORE, device=CPU)
        disk.done.add("the third view")
    assert disk.done == {"the store", "the third view", *written}
    rng = np.random.default_rng(0)
    some = [
        disk.moments[i] for i in np.sort(rng.permutation(len(disk.moments) - 1)[:60])
    ] + disk.moments[-1:]
    for number, (moment, outcome) in enumerate(outcomes(disk, some, place / "after")):
        assert (
            wrong(outcome / STORE, moment.done, Truth(whole.images.manifest_digest(), written))
            is None
        ), moment.call
        if number % 40 == 3:
            generate(more, place / "data", outcome / STORE, device=CPU)
            assert tree(outcome / STORE) == tree(place / "whole.zarr"), moment.call
