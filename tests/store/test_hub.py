"""A shared store is read from the hub as from a disk: what is needed is fetched, once,
compared and kept; whatever the network or a stranger does, no wrong label is read."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from support import stores
from support.command import run
from support.hub_server import Hub
from support.paths import ROOT
from support.stores import one_line

from cache import LabelStore, MealError
from cache.hub import client, packs
from cache.hub.address import Address, HubError, is_hub
from cache.hub.copy import opened
from cache.verify import verify
from cache.writer import StoreWriter
from pipeline.exchange.share import share
from pipeline.training.train import at_one_commit

AT = "hf://lab/labels"


@pytest.fixture
def local(tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> LabelStore:
    """A store, and the same store on the hub, in three packs a view."""
    stores.create(tmp_path / "own.zarr")
    store = stores.fill(tmp_path / "own.zarr")
    size = sum(store.size(name, 0, 0) for name in store.shard_arrays)
    monkeypatch.setattr(packs, "PACK_BYTES", 2 * size)
    share(store.path, "lab/labels")
    hub.seen.clear()
    hub.starts.clear()
    return store


def same(store: LabelStore, local: LabelStore) -> None:
    for view in range(local.views):
        every = slice(None)
        assert np.array_equal(store.codes(view, every), local.codes(view, every))
        for a, b in zip(store.crops(view, every), local.crops(view, every), strict=True):
            assert np.array_equal(a, b)


def pack_files(hub: Hub) -> list[str]:
    return [name for name in hub.files("lab/labels") if name.startswith("packs/")]


def fetched(hub: Hub) -> list[str]:
    return [file for file, _ in hub.starts if file.startswith("packs/")]


def test_opening_fetches_the_description_and_reading_what_is_read(hub, local):
    store = LabelStore.open(AT)
    assert [name.partition("-")[0] for name, _ in hub.starts] == ["packs.json", "description"]
    assert store.identity == local.identity and store.progress() == (10, 10)
    assert np.array_equal(store.finished_records(), local.finished_records())
    assert np.array_equal(store.images.path, local.images.path) and fetched(hub) == []
    assert len(pack_files(hub)) == 6
    assert np.array_equal(store.codes(1, [0, 1]), local.codes(1, [0, 1]))
    assert len(fetched(hub)) == 1 and "view-0001-000" in fetched(hub)[0]
    same(store, local)
    assert sorted(fetched(hub)) == sorted(pack_files(hub))  # each once
    same(LabelStore.open(AT), local)
    assert len(fetched(hub)) == 6
    assert not list(store.path.parent.glob("*.part")) and verify(store.path).complete


def test_the_next_view_is_fetched_ahead_and_no_other(hub, local):
    StoreWriter(local.path).grow(4)
    stores.fill(local.path, *((view, shard) for view in (2, 3) for shard in range(5)))
    share(local.path, "lab/labels")
    store = LabelStore.open(AT)
    store.codes(0, [0, 69])
    time.sleep(0.3)
    assert len(fetched(hub)) == 2 and not any("view-0001" in file for file in fetched(hub))
    store.codes(0, slice(None))
    until = time.monotonic() + 30
    while time.monotonic() < until and len(fetched(hub)) < 6:
        time.sleep(0.02)
    time.sleep(0.5)
    first = [name for name in pack_files(hub) if name < "packs/view-0002"]
    assert sorted(fetched(hub)) == sorted(first)
    same(store, LabelStore.open(local.path))
    assert sorted(fetched(hub)) == sorted(pack_files(hub))


def test_a_store_is_that_of_its_commit(hub, local, tmp_path):
    first = LabelStore.open(AT)
    StoreWriter(local.path).grow(3)
    grown = stores.fill(local.path, *((2, shard) for shard in range(5)))
    share(local.path, "lab/labels")
    assert first.views == 2 and LabelStore.open(AT).views == 3
    same(first, local)
    same(LabelStore.open(AT), grown)
    commit = first.path.parent.name
    assert LabelStore.open(f"{AT}@{commit}").views == 2
    asked = len(hub.seen)
    assert LabelStore.open(f"{AT}@{commit}").views == 2 and len(hub.seen) == asked
    with pytest.raises(HubError, match="@v9 doesn't exist there; check the revision") as error:
        LabelStore.open(f"{AT}@v9")
    assert one_line(error)
    with pytest.raises(MealError, match="has views 0 to 1, not 2; hf://lab/labels has no more at"):
        first.codes(2, [0])


def test_without_a_network_what_was_fetched_opens(hub, local, monkeypatch):
    same(LabelStore.open(AT), local)
    lines: list[str] = []
    monkeypatch.setattr(client, "tell", lines.append)
    hub.stop()
    same(LabelStore.open(AT), local)
    assert "can't be reached" in lines[-1] and "the last that was seen" in lines[-1]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    lines.clear()
    same(LabelStore.open(AT), local)
    assert lines == []
    with pytest.raises(HubError, match="hf://lab/other isn't here, and HF_HUB_OFFLINE forbids"):
        LabelStore.open("hf://lab/other")
    hub.start()


def test_offline_a_pack_that_is_not_here_is_named(hub, local, monkeypatch):
    store = LabelStore.open(AT)
    hub.stop()
    monkeypatch.setattr(client, "PATIENCE", 0.3)
    with pytest.raises(HubError, match=r"packs/view-0000.*can't be reached.*mend the network") as e:
        store.codes(0, [0])
    assert one_line(e)
    hub.start()


def test_cut_connections_and_busy_hubs_are_borne(hub, local):
    store = LabelStore.open(AT)
    hub.cuts = [3000, 3000, 1]
    hub.next = [("packs/view-0001", 429, {"Retry-After": "1"}), ("packs/view-0001", 503, {})]
    began = time.monotonic()
    same(store, local)
    assert 1 <= time.monotonic() - began < 30
    first = [start for file, start in hub.starts if "view-0000-000" in file]
    assert first[0] == 0 and 0 < first[1] < first[2]  # goes on where it was cut


def test_a_hub_that_stays_away_is_said_in_a_line(hub, local, monkeypatch):
    monkeypatch.setattr(client, "PATIENCE", 0.5)
    store = LabelStore.open(AT)
    hub.next = [("packs/", 503, {})] * 50
    with pytest.raises(HubError, match="can't be reached .the hub answers 503, for") as error:
        store.codes(0, [0])
    assert one_line(error)


READ = """
import sys
from cache import LabelStore
store = LabelStore.open("hf://lab/labels")
for view in range(store.views):
    store.codes(view, slice(None))
"""


def reader() -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", READ], cwd=ROOT, stderr=subprocess.PIPE)


def test_killed_and_read_again_a_fetch_goes_on(hub, local):
    size = min(map(len, (hub.files("lab/labels")[name] for name in pack_files(hub))))
    LabelStore.open(AT)
    hub.speed, hub.cuts = size / 1.0, []
    import support.hub_server as server

    before, server.PIECE = server.PIECE, 1000
    try:
        process, until = reader(), time.monotonic() + 60
        folder = opened(Address.parse(AT)).parent
        while time.monotonic() < until:
            parts = [p.stat().st_size for p in folder.glob("*.part") if p.exists()]
            if parts and parts[0] >= 2000:
                break
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    finally:
        hub.speed, server.PIECE = 0.0, before
    assert parts[0] >= 2000, process.stderr.read()
    hub.starts.clear()
    same(LabelStore.open(AT), local)
    assert [start for _, start in hub.starts if start] == [parts[0]] or hub.starts[1][1] >= 2000


def test_processes_and_threads_fetch_a_pack_once(hub, local):
    import support.hub_server as server

    hub.speed, before, server.PIECE = 200_000.0, server.PIECE, 4000
    try:
        several = [reader() for _ in range(3)]
        for process in several:
            assert process.wait(120) == 0, process.stderr.read()
    finally:
        server.PIECE = before
    assert sorted(fetched(hub)) == sorted(pack_files(hub))
    shutil.rmtree(opened(Address.parse(AT)).parent)
    hub.starts.clear()
    store = LabelStore.open(AT)
    threads = [threading.Thread(target=store.codes, args=(0, slice(None))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len([file for file in fetched(hub) if "view-0000" in file]) == 3
    same(store, local)


def test_a_pack_that_came_changed_is_never_read(hub, local):
    store = LabelStore.open(AT)
    hub.spoil = lambda file, body: (
        body[:700] + bytes([body[700] ^ 1]) + body[701:] if file.startswith("packs/") else body
    )
    with pytest.raises(HubError, match="came twice with other bytes than its index") as error:
        store.codes(0, [0])
    assert one_line(error) and not (store.path / "labels" / "c").exists()
    hub.spoil = None
    same(store, local)


def test_a_file_that_was_damaged_here_heals(hub, local):
    store = LabelStore.open(AT)
    same(store, local)
    file = store.file("labels", 1, 2)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    store.file("boxes", 0, 0).unlink()
    store.file("flips", 0, 1).write_bytes(b"")
    hub.starts.clear()
    same(LabelStore.open(AT), local)
    assert len(fetched(hub)) == 2  # one pack holds two of them


def rewritten(hub: Hub, change) -> None:
    """Let the owner change the index: ``change`` gets and changes the document."""
    document = json.loads(hub.files("lab/labels")["packs.json"])
    change(document)
    hub.put("lab/labels", "packs.json", json.dumps(document).encode())


def packed(members: dict[str, bytes], **about: object) -> bytes:
    made = BytesIO()
    with tarfile.open(fileobj=made, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            for key, value in about.items():
                setattr(info, key, value)
            tar.addfile(info, BytesIO(body))
    return made.getvalue()


def foisted(hub: Hub, body: bytes, which: str = "packs") -> None:
    """Put a pack of other bytes into the place of the first, with a right digest."""
    name = (
        f"packs/view-0000-000-{'0' * 16}.tar" if which == "packs" else f"description-{'0' * 16}.tar"
    )
    hub.put("lab/labels", name, body)

    def change(document: dict) -> None:
        entry = document["packs"][0] if which == "packs" else document["description"]
        entry.update(file=name, size=len(body), sha256=packs.hashlib.sha256(body).hexdigest())

    rewritten(hub, change)


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "zarr.json", "labels/c/1/0/0", "x"])
@pytest.mark.parametrize("which", ["packs", "description"])
def test_a_pack_with_a_file_of_another_place_is_refused(hub, local, tmp_path, name, which):
    name = "labels/zarr.json.x" if (which, name) == ("description", "zarr.json") else name
    foisted(hub, packed({name: b"evil"}), which)
    with pytest.raises(HubError, match="which is no file of this pack; don't use this") as error:
        LabelStore.open(AT).codes(0, [0])
    assert one_line(error) and not list(tmp_path.rglob("evil"))


def test_a_link_in_a_pack_is_refused(hub, local):
    body = packed({"labels/c/0/0/0": b""}, type=tarfile.SYMTYPE, linkname="/etc/passwd")
    foisted(hub, body)
    with pytest.raises(HubError, match="no file of this pack"):
        LabelStore.open(AT).codes(0, [0])
    foisted(hub, b"no tar at all" * 100)
    with pytest.raises(HubError, match="is no tar file; tell its owner"):
        LabelStore.open(AT).codes(0, [0])


def test_a_sparse_file_in_a_pack_is_refused(hub, local, tmp_path):
    """A sparse file of 2 kB may unpack to terabytes."""
    (tmp_path / "hole").write_bytes(b"")
    os.truncate(tmp_path / "hole", 1 << 28)
    subprocess.run(
        ["tar", "--sparse", "--format=gnu", "-cf", "holes.tar", "hole"], cwd=tmp_path, check=True
    )
    assert (tmp_path / "holes.tar").stat().st_size < 1 << 20
    with pytest.raises(HubError, match="'hole', which is no file of this pack"):
        packs.unpack(tmp_path / "holes.tar", tmp_path / "out", lambda name: True, where="x")


def test_a_file_longer_than_its_index_says_is_refused_at_once(hub, local):
    name = pack_files(hub)[0]
    index = json.loads(hub.files("lab/labels")["packs.json"])
    (pack,) = (pack for pack in index["packs"] if pack["file"] == name)
    pack["size"] = 600
    hub.put("lab/labels", "packs.json", json.dumps(index).encode())
    store = LabelStore.open(AT)
    with pytest.raises(HubError, match="is longer than its index says; tell its owner"):
        store.codes(pack["view"], store.shard_slice(pack["first"]))
    assert fetched(hub) == [name]


def test_an_address_of_a_hub_without_https_is_refused(hub, local, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "hub.example")
    with pytest.raises(HubError, match="HF_ENDPOINT is hub.example, no address of a hub; begin"):
        LabelStore.open("hf://lab/other")


def test_all_processes_of_a_training_read_the_commit_of_the_first(hub, local):
    class Two:
        """The second of two processes, beside which the owner shares more."""

        def first(self, call: Callable) -> object:
            found = call()
            StoreWriter(local.path).grow(3)
            stores.fill(local.path, *((2, shard) for shard in range(5)))
            share(local.path, "lab/labels")
            return found

        def together(self, call: Callable) -> object:
            return call()

    assert LabelStore.open(at_one_commit(AT, Two())).views == 2
    assert LabelStore.open(AT).views == 3
    assert at_one_commit(local.path, Two()) == local.path
    assert at_one_commit(None, Two()) is None


def test_labels_of_another_store_are_never_read(hub, local, tmp_path):
    """The pack's digest is right, but its labels are not those of the records."""

    def labels_of(view: int) -> dict[str, bytes]:
        return {
            local.file(name, 0, shard).relative_to(local.path).as_posix(): local.file(
                name, view, shard
            ).read_bytes()
            for shard in range(2)
            for name in local.shard_arrays
        }

    foisted(hub, packed(labels_of(1)))
    store = LabelStore.open(AT)
    with pytest.raises(MealError, match="another digest than in its .*tell its owner") as error:
        store.codes(0, [0])
    assert one_line(error)
    lacking = labels_of(0)
    del lacking["flips/c/0/1"]
    foisted(hub, packed(lacking))
    with pytest.raises(HubError, match="lacks flips/c/0/1"):
        LabelStore.open(AT).codes(0, [0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"file": "../../x.tar"}, "names a file that no pack can have"),
        ({"file": "/etc/passwd"}, "names a file that no pack can have"),
        ({"sha256": "../x"}, "names a file that no pack can have"),
        ({"size": -1}, "no index"),
        ({"size": "1"}, "no index"),
        ({"first": 1.5}, "no index"),
        ({"stop": 1 << 40}, "no index"),
        ({"more": 1}, "no index"),
    ],
)
def test_an_index_that_makes_no_sense_is_refused(hub, local, change, said):
    rewritten(hub, lambda document: document["packs"][0].update(change))
    with pytest.raises(HubError, match=said) as error:
        LabelStore.open(AT)
    assert one_line(error)


def test_what_is_no_store_is_said(hub, local):
    hub.put("lab/pictures", "a.txt", b"x")
    with pytest.raises(HubError, match=r"holds no label store .it has no packs.json.; check the"):
        LabelStore.open("hf://lab/pictures")
    hub.put("lab/pictures", "packs.json", b"[" * 100_000)
    with pytest.raises(HubError, match="packs.json is no index"):
        LabelStore.open("hf://lab/pictures")
    rewritten(hub, lambda document: document.update(format_version=2))
    with pytest.raises(HubError, match="has version 2 of shared stores, .*update this program"):
        LabelStore.open(AT)


def test_who_may_not_read_is_told_what_to_do(hub, local, monkeypatch):
    hub.repos["datasets", "lab/labels"].private = True
    for token, said in (
        ("", "there is no such repository, or this token may not see it; check the name, or log"),
        ("hf_unknown", "the hub doesn't know this token; log in with: hf auth login"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match=said) as error:
            LabelStore.open(AT)
        assert one_line(error)
    hub.tokens["hf_other"] = ("eve", (), "read")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(HubError, match="there is no such repository"):
        LabelStore.open(AT)
    hub.repos["datasets", "lab/labels"].private = False
    hub.repos["datasets", "lab/labels"].gated = True
    with pytest.raises(HubError, match="is gated, and this token was not let in; ask for access"):
        LabelStore.open(AT)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    same(LabelStore.open(AT), local)


@pytest.mark.parametrize(
    "text", ["hf://", "hf://labels", "hf://a/b/c", "hf://../b", "hf://a/b--c", "hf://a/" + "b" * 99]
)
def test_a_bad_name_is_refused_before_anything_is_asked(hub, text):
    with pytest.raises(HubError, match="is no name of a repository on the hub; write ORG/NAME"):
        LabelStore.open(text)
    assert hub.seen == []


def test_addresses():
    for text in ("hf://a/b", "hf:/a/b", "hf://datasets/a/b", "HF://a/b/"):
        assert is_hub(text) and Address.parse(text) == Address("a/b", "main")
    assert is_hub(Path("hf://a/b")) and Address.parse(Path("hf://a/b@v1")) == Address("a/b", "v1")
    for bad in ("hf://a/b@", "hf://a/b@../x", "hf://a/b@-x"):
        with pytest.raises(HubError, match="names no revision"):
            Address.parse(bad)
    assert not any(map(is_hub, ("a/b", "s3://a/b", "./hf:/a", None, 3)))


def test_a_cache_that_cannot_be_filled_is_named(hub, local, tmp_path, monkeypatch):
    store = LabelStore.open(AT)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(9, 9, 9))
    with pytest.raises(HubError, match="has 9 free; make room, or name a folder") as error:
        store.codes(0, [0])
    assert one_line(error)
    monkeypatch.undo()
    (tmp_path / "file").touch()
    monkeypatch.setenv("OFFLINE_MEAL_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", hub.url)
    with pytest.raises(HubError, match="nothing can be fetched into .*OFFLINE_MEAL_CACHE"):
        LabelStore.open(AT)


def test_a_full_disk_is_said_and_nothing_is_half_there(hub, local):
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))\n"
        "from cache import LabelStore, MealError\n"
        f"store = LabelStore.open({AT!r})\n"
        "try:\n    store.codes(0, [0])\nexcept MealError as error:\n    print(error)"
    )
    LabelStore.open(AT)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "nothing can be fetched into" in done.stdout, done.stderr
    same(LabelStore.open(AT), local)


def test_a_store_without_a_name_and_one_with_a_long_name_open(local, tmp_path, monkeypatch):
    monkeypatch.chdir(local.path)
    same(LabelStore.open("."), local)
    (local.path / "flips" / "zarr.json").rename(local.path / "gone")
    with pytest.raises(MealError, match=". is damaged: flips/zarr.json is not what"):
        LabelStore.open(".")
    (local.path / "gone").rename(local.path / "flips" / "zarr.json")
    long = Path(shutil.copytree(local.path, tmp_path / ("x" * 250)))
    same(LabelStore.open(long), local)


def test_a_copy_is_only_read(hub, local, tmp_path):
    store = LabelStore.open(AT)
    with pytest.raises(MealError, match="is the local copy of a shared store, which is only read"):
        StoreWriter(store.path)
    for words in (
        ("generate-labels", "--config", "smoke_cpu", "--data", tmp_path, "--store", AT),
        ("merge", local.path, "--out", AT),
        ("import-labels", tmp_path, "--data", tmp_path, "--store", AT),
    ):
        status, _, err = run(*words)
        assert status == 1 and "is on the hub, where label stores are only read; name" in err
        assert "share STORE --to ORG/NAME" in err and err.count("\n") == 1


def test_a_damaged_description_here_is_fetched_anew_after_its_removal(hub, local):
    store = LabelStore.open(AT)
    (store.path / "flips" / "zarr.json").write_text("{")
    with pytest.raises(MealError, match="remove the folder .*, which is fetched again") as error:
        LabelStore.open(AT)
    assert one_line(error)
    shutil.rmtree(store.path.parent)
    same(LabelStore.open(AT), local)


def test_every_reading_command_takes_the_address(hub, local, tmp_path):
    status, out, err = run("inspect", AT, "--json")
    assert status == 0 and json.loads(out)["finished_shards"] == 10, err
    assert "hf://lab/labels is read at commit" in err
    status, out, err = run("verify", AT)
    assert status == 0, out + err
    status, _, err = run("export-labels", AT, "--labels", "full", "--out", tmp_path / "files")
    assert status == 0 and len(list((tmp_path / "files").rglob("*.tar"))) == 51, err
    status, _, err = run("inspect", "hf://lab/nothing")
    assert status == 1 and "there is no such repository" in err and err.count("\n") == 1
    assert os.environ["OFFLINE_MEAL_CACHE"] in str(LabelStore.open(AT).path)
