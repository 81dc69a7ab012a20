"""The store on disk: data that was never written, is broken, or is of another store or
place, never passes for a label."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import socket
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr
from support.small import tree
from support.stores import (
    SHARD,
    SHARDS,
    UNUSABLE,
    USABLE,
    N,
    blocks,
    create,
    dead_process,
    fill,
    manifest,
    one_line,
    truth,
    write,
)

from cache import LabelStore, StoreError
from cache.errors import DamagedStore
from cache.format import schema, seal
from cache.format.codec import CODECS
from cache.format.manifest import Images
from cache.format.schema import UNMIXED, VERSIONS
from cache.system import durable
from cache.system.claims import claim
from cache.verify import verify
from cache.writer import StoreWriter
from pipeline.inspection.store_facts import stored_bytes


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """An empty store of two views."""
    assert create(tmp_path / "s.zarr")
    return tmp_path / "s.zarr"


@pytest.fixture(scope="module")
def finished_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("finished") / "s.zarr"
    assert create(path)
    fill(path)
    return path


@pytest.fixture
def full(finished_path: Path, tmp_path: Path) -> Path:
    """A finished store that a test may damage."""
    return Path(shutil.copytree(finished_path, tmp_path / "s.zarr"))


# ---- what was written is what is read


@pytest.mark.parametrize("codec", CODECS)
def test_labels_and_crops_come_back_as_written_for_any_choice_of_rows(tmp_path, codec):
    assert create(tmp_path / "s.zarr", codec)
    store = fill(tmp_path / "s.zarr")
    rng = np.random.default_rng(1)
    for view in (0, 1):
        p, boxes, flips = truth(view)
        wanted = store.codec.decode(store.codec.encode(p))
        every_second = USABLE[::2]
        for rows in (
            slice(4, 16),
            slice(20, 39, 3),
            slice(64, None),
            slice(2, None, -1),
            np.array([65]),
            30,
            [69, 0, 33, 0],
            [],
            every_second,
        ):
            indices = (
                np.arange(N)[rows]
                if isinstance(rows, slice)
                else np.atleast_1d(np.array(rows, int))
            )
            assert np.array_equal(
                store.crops(view, rows)[0][indices != 3], boxes[indices[indices != 3]]
            )
            if not set(indices) & set(UNUSABLE):
                assert np.array_equal(store.probabilities(view, rows), wanted[indices])
                assert np.array_equal(store.crops(view, rows)[1], flips[indices])
        shuffled = rng.permutation(USABLE)  # over all shards
        assert np.array_equal(store.probabilities(view, shuffled), wanted[shuffled])
        assert np.array_equal(store.crops(view, shuffled)[0], boxes[shuffled])
        assert np.array_equal(store.crops(view, shuffled)[1], flips[shuffled])


def test_the_manifest_comes_back_as_it_was(path):
    for name in Images.__dataclass_fields__:
        assert np.array_equal(
            getattr(LabelStore.open(path).images, name), getattr(manifest(), name)
        )
    assert LabelStore.open(path).images.manifest_digest() == manifest().manifest_digest()
    assert np.array_equal(LabelStore.open(path).usable, USABLE)


@pytest.mark.parametrize("codec", CODECS)
def test_plain_zarr_and_numpy_read_the_same_probabilities(tmp_path, codec):
    assert create(tmp_path / "s.zarr", codec)
    store = fill(tmp_path / "s.zarr", (0, 0), (1, 0), (1, 2), (1, 4))

    group = zarr.open_group(str(tmp_path / "s.zarr"), mode="r")
    words = group.attrs["codec"]
    assert words["formula"] in group.attrs["how_to_read"]
    struct = np.dtype(
        [(name, kind, tuple(shape)) for name, kind, shape in group.attrs["record_fields"]]
    )
    records = group["records"][:].view(struct)[..., 0]
    believed = group["records"][:].any(axis=2)
    assert believed.tolist() == [
        [True, False, False, False, False],
        [True, False, True, False, True],
    ]
    shard_rows = group["labels"].shards[1]
    for view, shard in np.argwhere(believed):
        rows = np.arange(shard * shard_rows, min((shard + 1) * shard_rows, N))
        rows = rows[group["images/status"][:][rows] == 0]
        q = group["labels"][view, rows[0] : rows[-1] + 1][rows - rows[0]].astype("float64")
        if words["dtype"].startswith("float"):
            p = np.maximum(q, words["zero"])
        elif "tail" in words:
            zeros = (q == 0).sum(axis=1, keepdims=True)
            T = np.where(zeros > 0, (group["tail"][view][rows][:, None] / words["tail"]) ** 2, 0)
            p = (q / words["levels"]) ** (1 / words["exponent"])
            p = np.where(
                q > 0, p * (1 - T) / p.sum(axis=1, keepdims=True), T / np.maximum(zeros, 1)
            )
        else:
            p = np.where(q > 0, (q / words["levels"]) ** (1 / words["exponent"]), words["zero"])
        p /= p.sum(axis=1, keepdims=True)
        assert np.allclose(p, store.probabilities(view, rows), rtol=1e-5, atol=0)
        assert np.array_equal(group["boxes"][view][rows], store.crops(view, rows)[0])
        assert np.array_equal(group["flips"][view][rows], store.crops(view, rows)[1])
        record = records[view, shard]
        assert (record["view"], record["shard"], record["labelled"]) == (view, shard, len(rows))
        assert np.isclose(record["entropy"], -(p * np.log(p)).sum(), rtol=1e-4)
        assert (
            record["agreeing"] == (p.argmax(axis=1) == group["images/class_index"][:][rows]).sum()
        )
        assert (
            record["stored_bytes"]
            == (tmp_path / "s.zarr" / f"labels/c/{view}/{shard}/0").stat().st_size
        )


def test_a_records_digest_is_the_sha256_that_the_docstring_states(full):
    store = LabelStore.open(full)
    for view, shard in np.ndindex(2, SHARDS):
        rows = store.shard_slice(shard)
        parts = (store.codes(view, rows), *store.crops(view, rows))
        made = schema.shard_digest(store.identity, view, shard, *parts)
        assert store.records()["digest"][view, shard].tobytes() == made
        assert made != schema.shard_digest(bytes(32), view, shard, *parts)  # another store
        assert made != schema.shard_digest(store.identity, view + 1, shard, *parts)


def test_zeros_are_written_as_files_too(path):
    writer = StoreWriter(path)
    codes, boxes, flips = blocks(writer, 0, 4)
    write(writer, 0, 4, codes, np.zeros_like(boxes), np.zeros_like(flips))
    # No image of shard 3 is usable, so all its labels are zero.
    write(writer, 0, 3, *blocks(writer, 0, 3))
    for shard in (3, 4):
        for file in (
            f"labels/c/0/{shard}/0",
            f"boxes/c/0/{shard}/0",
            f"flips/c/0/{shard}",
            f"records/c/0/{shard}/0",
        ):
            assert (path / file).stat().st_size > 0, file
    assert LabelStore.open(path).progress() == (2, 10)
    assert stored_bytes(path) == sum(map(len, tree(path).values()))


# ---- what is unfinished does not exist


def test_a_shard_never_written_is_no_label_though_zarr_reads_zeros(path):
    store = fill(path, (0, 0), (0, 1))
    assert not zarr.open_group(str(path), mode="r")["labels"][1].any()
    for read in (store.probabilities, store.codes, store.crops):
        with pytest.raises(
            StoreError,
            match=r"view 1 of .* not finished \(1 of 5 shards missing or damaged, the first is "
            r"0\); run the same .* again",
        ) as error:
            read(1, slice(0, 2))
        assert one_line(error)
    assert len(store.probabilities(0, slice(4, 16))) == 12
    with pytest.raises(StoreError, match=r"view 0 .* the first is 2"):
        store.probabilities(0, [0, 1, 32])
    with pytest.raises(
        StoreError, match=r"view 0 .*\(3 of 5 shards missing or damaged, the first is 2\)"
    ):
        store.require_finished(0)
    for view in (2, -1):
        with pytest.raises(StoreError, match=f"has views 0 to 1, not {view}; extend it"):
            store.codes(view, slice(0, 2))


def test_data_without_its_record_does_not_count(full):
    wanted = LabelStore.open(full).codes(1, slice(32, 48))
    (full / "records/c/1/2/0").unlink()
    store = LabelStore.open(full)
    assert store.progress() == (9, 10)
    # The labels themselves are there.
    assert np.array_equal(zarr.open_group(str(full), mode="r")["labels"][1, 32:48], wanted)
    with pytest.raises(StoreError, match=r"view 1 .* the first is 2"):
        store.probabilities(1, slice(32, 40))


@pytest.mark.parametrize(("view", "shard"), [(0, 1), (1, 0), (1, 1)])
def test_a_record_copied_to_another_place_finishes_nothing(path, view, shard):
    fill(path, (0, 0))
    target = path / f"records/c/{view}/{shard}/0"
    target.parent.mkdir(parents=True)
    shutil.copy(path / "records/c/0/0/0", target)
    store = LabelStore.open(path)
    assert zarr.open_group(str(path), mode="r")["records"][view, shard].any()
    assert store.progress() == (1, 10) and not store.finished()[view, shard]
    with pytest.raises(StoreError, match="not finished"):
        store.codes(view, np.arange(shard * SHARD, shard * SHARD + 2))


def test_an_open_store_sees_what_is_finished_later(path):
    store = LabelStore.open(path)
    assert store.progress() == (0, 10)
    with pytest.raises(StoreError):
        store.probabilities(1, slice(20, 30))
    for done, shard in enumerate((1, 0, 4), start=1):
        fill(path, (1, shard))
        assert store.progress() == (done, 10)
        assert store.finished().sum() == done
    assert np.array_equal(
        store.probabilities(1, slice(20, 30)), LabelStore.open(path).probabilities(1, slice(20, 30))
    )


def test_rows_that_are_not_there_or_have_no_label_are_named(full):
    store = LabelStore.open(full)
    for rows in ([0, 70], [-1], np.array([1000])):
        for read in (store.probabilities, store.codes, store.crops):
            with pytest.raises(StoreError, match="has rows 0 to 69, asked for"):
                read(0, rows)
    for rows in ([0, 17, 20], slice(16, 20)):
        with pytest.raises(
            StoreError,
            match=r"row 17 \(c2/é017.jpg\) has no label: cut short; ask for rows of store.usable",
        ) as error:
            store.probabilities(0, rows)
        assert one_line(error)


@pytest.mark.parametrize("rows", [np.arange(N) > 60, np.array([1.7])], ids=["mask", "fraction"])
def test_rows_that_are_no_row_numbers_are_refused(full, rows):
    with pytest.raises(StoreError):
        LabelStore.open(full).codes(0, rows)


# ---- the order of writing


def test_data_is_on_the_disk_before_the_record_exists(path, monkeypatch):
    record = path / "records/c/1/4/0"
    log: list[tuple[Path, bool]] = []
    for name in ("sync_file", "sync_folder"):
        real = getattr(durable, name)
        monkeypatch.setattr(
            durable, name, lambda p, real=real: (log.append((Path(p), record.exists())), real(p))
        )
    fill(path, (1, 4))
    before = [synced for synced, recorded in log if not recorded]
    after = [synced for synced, recorded in log if recorded]
    for name, file in (("labels", "c/1/4/0"), ("boxes", "c/1/4/0"), ("flips", "c/1/4")):
        file = path / name / file
        assert before.index(file) < before.index(file.parent)  # the content before the name
        folders = [folder for folder in file.parents if path / name in (folder, *folder.parents)]
        assert set(folders) <= set(before)
    assert record in after and record.parent in after and path / "records" in after


@pytest.mark.parametrize("name", ["labels", "boxes", "flips"])
def test_a_shard_whose_data_can_not_be_forced_to_the_disk_is_not_finished(path, monkeypatch, name):
    real = durable.sync_file

    def failing(file: Path) -> None:
        if path / name in file.parents:
            raise OSError(5, "Input/output error")
        real(file)

    monkeypatch.setattr(durable, "sync_file", failing)
    with pytest.raises(OSError):
        fill(path, (0, 0))
    assert LabelStore.open(path).progress() == (0, 10)


@pytest.mark.parametrize("content", [b"", b"torn", bytes(1000)])
def test_what_a_crash_left_of_a_shard_is_written_over(path, finished_path, content):
    for shard in (1, 4):
        for file in (f"labels/c/0/{shard}/0", f"boxes/c/0/{shard}/0", f"flips/c/0/{shard}"):
            (path / file).parent.mkdir(parents=True, exist_ok=True)
            (path / file).write_bytes(content)  # named, but its content never reached the disk
    fill(path)
    assert tree(path) == tree(finished_path)


def test_what_a_kill_left_of_a_file_goes_when_the_shard_is_written(path, finished_path):
    for file in ("labels/c/0/1/0", "boxes/c/0/1/0", "flips/c/0/1", "records/c/0/1/0"):
        (path / file).parent.mkdir(parents=True, exist_ok=True)
        (path / f"{file}.0123abcd.partial").write_bytes(b"half")
    fill(path)
    assert tree(path) == tree(finished_path)


@pytest.mark.parametrize("content", [b"", b"torn"])
def test_a_torn_record_is_a_shard_to_write_again(full, content):
    (full / "records/c/1/2/0").write_bytes(content)
    assert LabelStore.open(full).progress() == (9, 10)
    assert fill(full, (1, 2)).progress() == (10, 10)


def test_a_writer_refuses_a_usable_row_without_label_and_an_unusable_one_with(path):
    writer = StoreWriter(path)
    codes, boxes, flips = blocks(writer, 0, 1)
    missing, surplus = codes.copy(), codes.copy()
    missing[5], surplus[1] = 0, codes[0]
    with pytest.raises(StoreError, match=r"view 0, c1/é021.jpg: no label for a usable image"):
        write(writer, 0, 1, missing, boxes, flips)
    with pytest.raises(StoreError, match=r"view 0, c2/é017.jpg: a label for an unusable image"):
        write(writer, 0, 1, surplus, boxes, flips)
    assert not (path / "labels/c").exists() and LabelStore.open(path).progress() == (0, 10)


# ---- damage


def test_a_flipped_bit_is_an_error_and_never_a_label(full):
    file = full / "labels/c/1/0/0"
    content = file.read_bytes()
    store = LabelStore.open(full)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(
            StoreError,
            match=r"view 1, rows 0 to 15 of .* labels/c/1/0/0 can't be read .*; run the same",
        ) as error:
            store.codes(1, slice(0, 16))
        assert one_line(error)
    assert len(store.codes(0, slice(0, 16))) == 16


@pytest.mark.parametrize("rows", [slice(0, 16), slice(4, 8)])
def test_a_label_file_cut_short_is_an_error_and_never_a_label(full, rows):
    file = full / "labels/c/1/0/0"
    content = file.read_bytes()
    store = LabelStore.open(full)
    for kept in range(1, len(content)):
        file.write_bytes(content[:kept])
        with pytest.raises(
            StoreError, match=r"view 1 .* not finished \(1 of 5 shards missing or damaged"
        ) as error:
            store.codes(1, rows)
        assert one_line(error)


@pytest.mark.parametrize("file", ["boxes/c/1/0/0", "flips/c/1/0"])
def test_a_damaged_crop_is_an_error_and_never_a_crop(full, file):
    content = bytearray((full / file).read_bytes())
    for damaged in (
        content[:-1],
        bytes([content[0] ^ 1]) + content[1:],
        content[:-1] + bytes([content[-1] ^ 1]),
        content[:3],
    ):
        (full / file).write_bytes(damaged)
        with pytest.raises(StoreError, match="can't be read") as error:
            LabelStore.open(full).crops(1, slice(0, 2))
        assert one_line(error)


@pytest.mark.parametrize(
    ("file", "left"),
    [
        ("labels/c/1/0/0", None),
        ("labels/c/1/0/0", b""),
        ("boxes/c/1/0/0", None),
        ("flips/c/1/0", None),
        ("boxes/c/1/0/0", b""),
        ("flips/c/1/0", b""),
    ],
)
def test_a_file_that_a_copy_left_out_or_empty_is_an_error_and_never_a_label(full, file, left):
    (full / file).unlink()
    if left is not None:
        (full / file).write_bytes(left)
    store = LabelStore.open(full)
    for rows in (slice(4, 8), slice(0, 16)):
        with pytest.raises(
            StoreError, match="not finished .1 of 5 shards missing or damaged, the first is 0"
        ) as error:
            store.codes(1, rows) if file.startswith("labels") else store.crops(1, rows)
        assert one_line(error)


@pytest.mark.parametrize("name", ["labels", "boxes", "flips"])
def test_a_file_that_is_lost_while_the_store_is_open_is_an_error(full, name):
    store = LabelStore.open(full)
    store.codes(0, slice(0, 2))  # the store has looked up its finished shards
    file = store.file(name, 1, 0)
    file.unlink()
    with pytest.raises(
        StoreError,
        match=f"view 1, rows 0 to 15 of .* {name}/c/1/0.* is missing or empty; run the same",
    ):
        store.codes(1, slice(0, 2))


def test_writing_a_shard_again_takes_its_record_away_first(full, monkeypatch):
    """Otherwise a kill in between would leave new boxes under the old record."""
    store = LabelStore.open(full)
    rows = store.shard_slice(0)
    codes, (boxes, flips) = store.codes(1, rows), store.crops(1, rows)
    writer = StoreWriter(full)

    def killed(name: str, view: int, shard: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(writer, "_sync", killed)
    with pytest.raises(KeyboardInterrupt):
        write(writer, 1, 0, codes, boxes, flips)
    assert not LabelStore.open(full).finished()[1, 0]
    monkeypatch.undo()
    write(writer, 1, 0, codes, boxes, flips)
    assert np.array_equal(LabelStore.open(full).codes(1, rows), codes)


@pytest.mark.parametrize("name", ["labels", "boxes", "flips"])
def test_a_shard_of_another_place_never_passes_for_this_one(full, name):
    """Zarr's checksums fit, and perhaps the recorded size. Only the record's digest
    tells the shards apart."""
    store = LabelStore.open(full)
    here, there = store.file(name, 0, 0), store.file(name, 1, 0)
    content = here.read_bytes()
    here.write_bytes(there.read_bytes())
    there.write_bytes(content)
    for view in (0, 1):
        with pytest.raises(StoreError, match=f"view {view}"):
            LabelStore.open(full).probabilities(view, [0, 1])


def test_labels_written_by_other_hands_are_refused(full):
    """Plain Zarr can't change a value unnoticed, even if the new value compresses to
    as many bytes."""
    store = LabelStore.open(full)
    block = store.array("boxes")[1, 0:SHARD]
    block[0, 0] += 1
    zarr.open_group(str(full), mode="r+")["boxes"][1, 0:SHARD] = block
    with pytest.raises(StoreError, match="rows 0 to 15 of .* are not what was written there"):
        LabelStore.open(full).crops(1, [5])


def test_what_is_no_label_store_of_this_version_is_refused_in_one_line(full, tmp_path):
    document = json.loads((full / "zarr.json").read_text())

    def variant(name: str, **changes: object) -> Path:
        """Make a store as another program would have: sealed."""
        place = Path(shutil.copytree(full, tmp_path / name))
        (place / "zarr.json").write_text(
            json.dumps(document | {"attributes": document["attributes"] | changes})
        )
        seal.write_seal(place, seal.read_metadata(place, UNMIXED))
        return place

    newer = variant("newer.zarr", format_version=VERSIONS[-1] + 1)
    older = variant("older.zarr", format_version=0)
    other = variant("other.zarr", format="something")
    (other / "records").rename(other / "somethings")
    zarr.create_group(str(tmp_path / "plain.zarr"))
    zarr.create_array(str(tmp_path / "array.zarr"), shape=(3,), dtype="uint8")
    zarr.create_group(str(tmp_path / "old.zarr"), zarr_format=2)
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("text")
    torn = variant("torn.zarr")
    (torn / "zarr.json").write_text(json.dumps(document)[:500])
    headless = variant("headless.zarr")
    (headless / "labels/zarr.json").unlink()
    for place, says in (
        (
            newer,
            f"has label store format {VERSIONS[-1] + 1}, this program reads 1 to {VERSIONS[-1]}; "
            "it was made by a newer version: update this program",
        ),
        (
            older,
            f"has label store format 0, this program reads 1 to {VERSIONS[-1]}; "
            "use the version of this program that made it",
        ),
        (other, "not a label store .*'something'"),
        (tmp_path / "plain.zarr", "not a label store .*None"),
        (tmp_path / "array.zarr", "not a label store"),
        (tmp_path / "old.zarr", "not a label store"),
        (tmp_path / "folder", "not a label store"),
        (tmp_path / "file", "not a label store"),
        (torn, "is damaged: zarr.json"),
        (headless, "is damaged: labels/zarr.json is not what was written there .it is missing"),
        (tmp_path / "nothing", "there is no label store at .*; make one with generate-labels"),
    ):
        with pytest.raises(StoreError, match=says) as error:
            LabelStore.open(place)
        assert one_line(error) and place.name in str(error.value)
    for key in ("codec", "provenance", "class_names"):
        attributes = {name: value for name, value in document["attributes"].items() if name != key}
        (full / "zarr.json").write_text(json.dumps(document | {"attributes": attributes}))
        with pytest.raises(
            DamagedStore, match="is damaged: zarr.json is not what was written there"
        ):
            LabelStore.open(full)


# ---- creation and growth


def test_a_second_creation_leaves_the_first_store(path):
    fill(path, (0, 0))
    before = tree(path)
    assert create(path, "float32", views=7) is False
    assert tree(path) == before
    assert [p.name for p in path.parent.iterdir()] == ["s.zarr"]


def test_a_creation_that_fails_leaves_nothing_whichever_file_it_was(tmp_path, monkeypatch):
    """Only the thread that removes the files writes them."""
    writers, left_to_write = set(), 0
    real = Path.write_bytes

    def write(self: Path, content: bytes) -> int:
        nonlocal left_to_write
        writers.add(threading.get_ident())
        left_to_write -= 1
        if not left_to_write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(self, content)

    monkeypatch.setattr(Path, "write_bytes", write)
    for number in itertools.count(1):
        left_to_write = number
        try:
            assert create(tmp_path / "s.zarr")
            break
        except OSError:
            assert not list(tmp_path.iterdir())
    files = [name for name in tree(tmp_path / "s.zarr") if "/c/" in name or "zarr.json" in name]
    assert writers == {threading.get_ident()} and number > len(files) > 15


def test_what_a_killed_creation_left_is_removed_and_that_of_others_kept(tmp_path):
    def scratch(host: str, process: int) -> Path:
        left = tmp_path / f".s.zarr.{host}.{process}.creating"
        (left / "labels").mkdir(parents=True)
        return left

    here = socket.gethostname()
    dead, parent, elsewhere = (
        scratch(here, dead_process()),
        scratch(here, os.getppid()),
        scratch("elsewhere", dead_process()),
    )
    assert create(tmp_path / "s.zarr")
    assert not dead.exists() and parent.exists() and elsewhere.exists()


def test_a_killed_creation_of_the_same_process_number_is_no_obstacle(tmp_path):
    # In a container every run may be process 1.
    left = tmp_path / f".s.zarr.{socket.gethostname()}.{os.getpid()}.creating"
    zarr.create_group(str(left))
    assert create(tmp_path / "s.zarr")
    assert not left.exists()


def test_growing_keeps_what_is_finished_and_never_shrinks(full):
    before = LabelStore.open(full)
    wanted = before.probabilities(1, USABLE)
    old = {name: content for name, content in tree(full).items() if not name.endswith("zarr.json")}
    writer = StoreWriter(full)
    for asked, views in ((1, 2), (2, 2), (5, 5), (3, 5)):
        writer.grow(asked)
        assert writer.store.views == LabelStore.open(full).views == views
    assert {
        name: content for name, content in tree(full).items() if not name.endswith("zarr.json")
    } == old
    store = fill(full, (4, 2))
    assert store.progress() == (11, 25)
    assert np.array_equal(store.probabilities(1, USABLE), wanted)
    assert store.identity == before.identity
    assert not writer.claims.exists()


@pytest.mark.parametrize("name", ["labels", "boxes", "flips"])
def test_a_growth_stopped_half_way_leaves_the_old_store_and_is_mended_by_the_next(
    full, monkeypatch, name
):
    def failing(folder: Path) -> None:
        if folder.name == name:
            raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(durable, "sync_folder", failing)
        StoreWriter(full).grow(4)
    assert zarr.open_group(str(full), mode="r")[name].shape[0] == 4
    store = LabelStore.open(full)
    assert store.views == 2 and store.progress() == (10, 10) and StoreWriter(full).uneven
    assert len(store.probabilities(1, USABLE)) == len(USABLE)
    with pytest.raises(StoreError, match="has views 0 to 1, not 2"):
        store.codes(2, slice(0, 2))
    StoreWriter(full).grow(3)
    store = fill(full, (2, 0))
    assert store.views == 3 and store.progress() == (11, 15) and not StoreWriter(full).uneven
    assert len(store.crops(2, slice(0, 3))[0]) == 3


def test_only_one_process_grows_a_store(path):
    with (
        claim(path.with_name("s.zarr.claims"), "grow"),
        pytest.raises(StoreError, match="being extended by another process") as error,
    ):
        StoreWriter(path).grow(3)
    assert one_line(error)
    assert LabelStore.open(path).views == 2


# ---- claims of shards


def test_claimed_gives_the_unfinished_views_that_nobody_holds(path):
    fill(path, (0, 1))
    writer = StoreWriter(path)
    writer.grow(4)
    with (
        claim(writer.claims, "2-1"),
        writer.claimed([0, 1, 2, 3], 1) as mine,
        StoreWriter(path).claimed([0, 1, 2, 3], 1) as others,
    ):
        assert (mine, others) == ([1, 3], [])
    with writer.claimed([2, 3], 1) as mine:
        assert mine == [2, 3]


def test_only_the_holder_of_a_shard_takes_its_record_away_and_only_of_a_damaged_one(full):
    writer = StoreWriter(full)
    record = writer.store.file("records", 1, 1)
    assert not writer.discard(1, 1) and record.exists()  # the shard is sound
    file = writer.store.file("labels", 1, 1)
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with claim(writer.claims, "1-1"):
        assert not writer.discard(1, 1) and record.exists()
    assert writer.discard(1, 1) and not record.exists()


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ESTALE, os.strerror(errno.ESTALE)),
        OSError(errno.EIO, os.strerror(errno.EIO)),
        MemoryError("no room"),
    ],
)
def test_what_can_not_be_read_for_a_moment_is_not_called_damaged(full, monkeypatch, error):
    """A network disk that doesn't answer, or a limit of memory, is no reason to throw
    away labels that took hours."""
    before, real = tree(full), zarr.Array.__getitem__
    # With room, a MemoryError would mean that the file asks for too much.
    monkeypatch.setattr("cache.reader._room", lambda size: False)

    def read(self: zarr.Array, selection: object) -> object:
        if self.path == "labels":
            raise error
        return real(self, selection)

    monkeypatch.setattr(zarr.Array, "__getitem__", read)
    writer = StoreWriter(full)
    for look in (
        lambda: writer.discard(1, 1),
        lambda: writer.store.fault(1, 1),
        lambda: LabelStore.open(full).codes(0, [1]),
    ):
        with pytest.raises(StoreError, match="labels/c/1/1/0 of|labels/c/0/0/0 of") as refusal:
            look()
        assert "can't be read now" in str(refusal.value) and one_line(refusal)
    verdict = verify(full)
    assert (
        not verdict.sound
        and not verdict.damaged
        and len(verdict.unread) == 10
        and verdict.checked == 0
        and "can't be read now" in str(verdict.unread[0])
    )
    assert tree(full) == before


def test_want_of_memory_that_passes_is_nobodys_fault(full, monkeypatch):
    """Another thread had the memory, and has given it back."""
    real, wants = zarr.Array.__getitem__, [MemoryError("no room")] * 2

    def read(self: zarr.Array, selection: object) -> object:
        if self.path == "labels" and wants:
            raise wants.pop()
        return real(self, selection)

    monkeypatch.setattr(zarr.Array, "__getitem__", read)
    assert LabelStore.open(full).fault(1, 1) is None and not wants


@pytest.mark.parametrize("file", ["zarr.json", "labels/zarr.json", "images/path/c/0"])
def test_a_description_that_can_not_be_read_for_a_moment_is_not_called_damaged(
    full, monkeypatch, file
):
    error = OSError(errno.EACCES, os.strerror(errno.EACCES))
    read_document, take = seal.read_document, zarr.Array.__getitem__

    def read(path: Path) -> object:
        if path == full / file:
            raise error
        return read_document(path)

    def column(self: zarr.Array, selection: object) -> object:
        if file.startswith(self.path):
            raise error
        return take(self, selection)

    monkeypatch.setattr(seal, "read_document", read)
    monkeypatch.setattr(zarr.Array, "__getitem__", column)
    with pytest.raises(StoreError, match="can't be read now") as refusal:
        _ = LabelStore.open(full).images
    assert not isinstance(refusal.value, DamagedStore) and one_line(refusal)


def test_what_a_killed_process_left_of_a_store_is_removed_whatever_the_name(tmp_path):
    host = socket.gethostname()
    ours = tmp_path / f".s[1].zarr.{host}.{2**22 + 1}.creating"
    theirs, old = (tmp_path / f".s[1].zarr.{name}.7.creating" for name in ("elsewhere", "long.ago"))
    for left in (ours, theirs, old):
        left.mkdir()
    os.utime(old, (0, 0))
    assert create(tmp_path / "s[1].zarr")
    assert not ours.exists() and not old.exists() and theirs.exists()
