"""A store is shared with the hub in packs that the hub takes: only sound, whole views,
only what is new, and again after whatever stopped it. A student is pushed whole."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support import stores
from support.command import run
from support.hub_server import Hub, Refusal, require_limits
from support.paths import ROOT
from support.stages import train
from support.stores import one_line

from cache import LabelStore, MealError
from cache.hub import client, packs
from cache.hub.address import HubError
from cache.verify import verify
from cache.writer import StoreWriter
from pipeline.exchange import share as sharing
from pipeline.exchange.share import share
from pipeline.runs.folder import RunFolder

AT = "hf://lab/labels"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabelStore:
    """A finished store, of which two shards make a pack."""
    stores.create(tmp_path / "own.zarr")
    store = stores.fill(tmp_path / "own.zarr")
    size = sum(store.size(name, 0, 0) for name in store.shard_arrays)
    monkeypatch.setattr(packs, "PACK_BYTES", 2 * size)
    return store


def same(store: LabelStore, local: LabelStore, views: range) -> None:
    for view in views:
        assert np.array_equal(store.codes(view, slice(None)), local.codes(view, slice(None)))


def uploads(hub: Hub) -> int:
    return hub.count("^PUT /lfs/")


def test_a_shared_store_is_the_store_and_only_news_are_sent(hub, store):
    first = share(store.path, "lab/labels")
    assert (first.views, first.packs, first.sent, first.left) == (2, 6, 6, [])
    assert uploads(hub) == 7  # and the description
    before = hub.files("lab/labels")
    again = share(store.path, "lab/labels")
    assert (again.sent, again.bytes_sent, again.commit) == (0, 0, first.commit)
    assert uploads(hub) == 7 and hub.files("lab/labels") == before
    StoreWriter(store.path).grow(3)
    grown = stores.fill(store.path, *((2, shard) for shard in range(5)))
    third = share(store.path, "lab/labels")
    assert third.views == 3 and third.packs - 6 == third.sent > 1
    assert uploads(hub) == 7 + third.sent + 1
    after = hub.files("lab/labels")
    kept = [name for name in before if name.startswith("packs/")]
    assert all(after[name] == before[name] for name in kept)
    assert sum(name.startswith("description") for name in after) == 1
    same(LabelStore.open(AT), grown, range(3))
    assert any(f"hf://lab/labels@{first.commit[:12]}" in line for line in first.lines())


def test_packs_are_the_same_bytes_from_any_copy(hub, store, tmp_path):
    share(store.path, "lab/labels")
    shutil.copytree(store.path, tmp_path / "moved.zarr")
    for path in (tmp_path / "moved.zarr").rglob("*"):
        path.touch()
    share(tmp_path / "moved.zarr", "lab/other")
    one, other = hub.files("lab/labels"), hub.files("lab/other")
    assert {n: b for n, b in one.items() if n != "README.md"} == {
        n: b for n, b in other.items() if n != "README.md"
    }


def test_unpacked_by_hand_the_packs_are_a_store(hub, store, tmp_path):
    share(store.path, "lab/labels")
    (tmp_path / "by-hand").mkdir()
    for name, body in hub.files("lab/labels").items():
        if name.endswith(".tar"):
            subprocess.run(["tar", "x", "-C", tmp_path / "by-hand"], input=body, check=True)
    verdict = verify(tmp_path / "by-hand")
    assert verdict.sound and verdict.complete


def test_an_interrupted_upload_goes_on(hub, store, monkeypatch):
    monkeypatch.setattr(sharing, "AT_ONCE", 2)
    monkeypatch.setattr(client, "PATIENCE", 0.2)
    hub.next = [("nothing", 500, {})]
    sent = 0

    def spoiled(self, target, name, own=sharing._Sharing._send):
        nonlocal sent
        sent += 1
        if sent == 4:
            hub.next = [("", 503, {})] * 200
        own(self, target, name)

    monkeypatch.setattr(sharing._Sharing, "_send", spoiled)
    with pytest.raises(
        HubError, match="can't be reached .*503.*goes on from what is here"
    ) as error:
        share(store.path, "lab/labels")
    assert one_line(error) and "packs.json" not in hub.files("lab/labels")
    hub.next = []
    with pytest.raises(HubError, match="holds no label store .* finish its sharing: share STORE"):
        LabelStore.open(AT)
    before = uploads(hub)
    assert before == 3 and hub.commits == [2]
    result = share(store.path, "lab/labels")
    assert result.sent == 4 and result.packs == 6
    assert uploads(hub) == 7  # the third was sent before, though not committed
    same(LabelStore.open(AT), store, range(2))


def test_killed_and_run_again_sharing_goes_on(hub, store):
    code = (
        "import os, signal, sys; from pathlib import Path; from cache.hub import packs\n"
        f"packs.PACK_BYTES = {packs.PACK_BYTES}\n"
        "from pipeline.exchange import share\n"
        "share.AT_ONCE, sent, own = 2, [], share._Sharing._send\n"
        "def send(self, *what):\n"
        "    sent.append(1)\n"
        "    if len(sent) == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    own(self, *what)\n"
        "share._Sharing._send = send\n"
        "share.share(Path(sys.argv[1]), 'lab/labels')"
    )
    killed = subprocess.run([sys.executable, "-c", code, store.path], cwd=ROOT)
    assert killed.returncode == -9 and uploads(hub) == 3
    left = list(Path(sharing.cache_folder(), "hub").rglob("*.tar"))
    assert len(left) == 1
    result = share(store.path, "lab/labels")
    assert result.sent == 4 and uploads(hub) == 7
    assert not list(Path(sharing.cache_folder(), "hub").rglob("*.tar"))
    same(LabelStore.open(AT), store, range(2))


def test_the_disk_holds_one_pack_at_a_time(hub, store, monkeypatch):
    most = []

    def write(target, files, own=packs.write):
        done = own(target, files)
        most.append(len(list(target.parent.iterdir())))
        return done

    monkeypatch.setattr(packs, "write", write)
    share(store.path, "lab/labels")
    assert len(most) == 7 and set(most) == {1}


def test_a_damaged_shard_stops_sharing_by_name(hub, store):
    file = store.file("labels", 1, 3)
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(MealError, match="view 1, rows 48 to 63 of .* are not what was") as error:
        share(store.path, "lab/labels")
    assert one_line(error) and "packs.json" not in hub.files("lab/labels")


def test_views_that_are_not_finished_are_left_out(hub, tmp_path, capsys):
    stores.create(tmp_path / "part.zarr", views=3)
    part = stores.fill(tmp_path / "part.zarr", (0, 0))
    with pytest.raises(MealError, match="no view of .* is finished, and only whole views are"):
        share(part.path, "lab/labels")
    assert hub.seen == []
    part = stores.fill(part.path, *((view, shard) for view in (0, 2) for shard in range(5)), (1, 1))
    result = share(part.path, "lab/labels")
    assert result.left == [1] and result.views == 2
    assert "1 view of" in capsys.readouterr().err
    there = LabelStore.open(AT)
    same(there, part, range(0, 3, 2))
    with pytest.raises(MealError, match="view 1 of .* is not finished .*ask its owner to share"):
        there.codes(1, [0])
    stores.fill(part.path, *((1, shard) for shard in range(5)))
    assert share(part.path, "lab/labels").sent == 1
    shutil.rmtree(part.path / "records" / "c" / "2")
    with pytest.raises(HubError, match="has view 2, which is not finished in .*; merge the two"):
        share(part.path, "lab/labels")


def test_imagenet_with_180_views_keeps_the_limits_of_the_hub():
    """40 shards of 16 MB a view: 360 packs of 320 MB in commits of 20."""
    sizes = [16_000_000] * 39 + [15_000_000]
    made = packs.groups(sizes)
    assert made[0][0] == 0 and made[-1][1] == 40 and len(made) == 2
    assert all(a[1] == b[0] for a, b in pairwise(made))
    assert max(sum(sizes[a:b]) for a, b in made) <= packs.PACK_BYTES
    names = [
        packs.name_of(f"packs/view-{view:04d}-{first:03d}", bytes(32))
        for view in range(180)
        for first, _ in made
    ]
    assert all(packs.NAME.fullmatch(name) for name in names) and len(set(names)) == 360
    require_limits(sharing.AT_ONCE + sharing.GONE + 3, names)
    with pytest.raises(Refusal):
        require_limits(101, names)
    with pytest.raises(Refusal):  # the store's own files would be too many for a folder
        require_limits(1, [f"labels/{i}" for i in range(10_001)])
    assert packs.groups([9, 9, 9], 1) == [(0, 1), (1, 2), (2, 3)] and packs.groups([]) == [(0, 0)]


def test_what_cannot_be_shared_is_said_early(hub, store, tmp_path, monkeypatch):
    for name in ("labels", "lab/a/b", "lab/.x", "hf://lab", "lab/" + "x" * 99):
        with pytest.raises(HubError, match="is no name of a repository on the hub; write ORG/N"):
            share(store.path, name)
    with pytest.raises(HubError, match="is no licence as the hub names them; write for exam"):
        share(store.path, "lab/labels", licence="My own: licence")
    assert hub.seen == []
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(HubError, match="HF_HUB_OFFLINE forbids it; unset it"):
        share(store.path, "lab/labels")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.tokens |= {"hf_reader": ("ann", ("lab",), "read"), "hf_eve": ("eve", (), "write")}
    for token, said in (
        ("", "needs a token of the hub, and there is none; log in with: hf auth login"),
        ("hf_unknown", "the hub doesn't know this token"),
        ("hf_reader", "this token of ann may only read; make one that may write"),
        ("hf_eve", "this token may not do that .*; take a token that may write there"),
    ):
        monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(HubError, match=said) as error:
            share(store.path, "lab/labels")
        assert one_line(error) and hub.repos == {}
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    share(store.path, "lab/labels")
    monkeypatch.setenv("HF_TOKEN", "hf_eve")
    hub.seen.clear()
    hub.put("lab/labels", next(n for n in hub.files("lab/labels") if n[:5] == "packs"), None)
    with monkeypatch.context() as patch, pytest.raises(HubError, match="token may not do that"):
        patch.setattr(packs, "write", lambda *what: pytest.fail("a pack was made in vain"))
        share(store.path, "lab/labels")
    assert uploads(hub) == 0
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    with pytest.raises(HubError, match="is on the hub already; name a local store"):
        share(AT, "lab/labels")
    with pytest.raises(HubError, match="is a copy of a shared store, and has nothing new"):
        share(LabelStore.open(AT).path, "lab/copy")


def test_a_repository_of_something_else_is_left_alone(hub, store, tmp_path):
    hub.put("lab/pictures", "cats/1.jpg", b"x")
    with pytest.raises(HubError, match=r"holds other files .cats/1.jpg., which sharing must not"):
        share(store.path, "lab/pictures")
    share(store.path, "lab/labels")
    stores.create(tmp_path / "other.zarr", codec="cbrt8")
    other = stores.fill(tmp_path / "other.zarr")
    before = hub.files("lab/labels")
    with pytest.raises(HubError, match="holds another store .* choose another name") as error:
        share(other.path, "lab/labels")
    assert one_line(error) and hub.files("lab/labels") == before


def head_of(hub: Hub) -> dict:
    card = hub.files("lab/labels")["README.md"].decode()
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", card, re.S)[1])


def test_the_card_says_what_the_store_is_and_whose_licence(hub, store):
    share(store.path, "lab/labels")
    card = hub.files("lab/labels")["README.md"].decode()
    assert "license" not in head_of(hub) and "The sharer chose none" in card
    share(store.path, "lab/labels", licence="cc-by-nc-4.0")
    card = hub.files("lab/labels")["README.md"].decode()
    assert head_of(hub)["license"] == "cc-by-nc-4.0" and "soft-labels" in head_of(hub)["tags"]
    for told in (
        "No image is here",
        "the names of their files",
        'LabelStore.open("hf://lab/labels")',
        "--store hf://lab/labels --out run",
        store.identity.hex(),
        "`pow8`; no label is off by more than 0.0047 in total variation",
        "| views | 2 |",
        "The terms of the images and of the teachers' weights may bind",
    ):
        assert told in card, told
    share(store.path, "lab/labels")  # the licence stays
    assert head_of(hub)["license"] == "cc-by-nc-4.0"


def test_a_private_store_is_hidden(hub, store):
    share(store.path, "lab/labels", private=True)
    assert hub.repos["datasets", "lab/labels"].private
    share(store.path, "lab/open")
    assert not hub.repos["datasets", "lab/open"].private


def test_a_student_from_the_hub_is_the_student_from_the_disk(
    hub, store_path, photos, recipe, tmp_path
):
    status, out, err = run("share", store_path, "--to", "lab/labels", "--json")
    assert status == 0 and json.loads(out)["views"] == 2, err
    train(recipe, photos, tmp_path / "local", store=store_path)
    train(recipe, photos, tmp_path / "hub", store=AT)
    one, other = (load_file(tmp_path / name / "last.safetensors") for name in ("local", "hub"))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    header = RunFolder(tmp_path / "hub").header("last")
    assert header == RunFolder(tmp_path / "local").header("last")
    status, _, err = run("merge", AT, store_path, "--out", tmp_path / "merged.zarr")
    assert status == 0, err
    same(LabelStore.open(tmp_path / "merged.zarr"), LabelStore.open(store_path), range(2))


LOAD = """
import sys, timm, torch
torch.manual_seed(0)
x = torch.randn(2, 3, 32, 32)
a = timm.create_model("hf-hub:lab/student", pretrained=True).eval()
b = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
assert torch.equal(a(x), b(x)) and a.pretrained_cfg["label_names"]
"""


def test_a_pushed_student_is_loaded_from_the_hub(hub, store_path, photos, recipe, tmp_path):
    train(recipe, photos, tmp_path / "run", store=store_path)
    words = ("export", tmp_path / "run", "--no-onnx", "--push", "lab/student", "--private")
    status, out, err = run(*words, "--out", tmp_path / "out")
    assert status == 0, err
    assert f"{hub.url}/lab/student: pushed" in out
    assert 'timm.create_model("hf-hub:lab/student", pretrained=True) loads it' in out
    files = hub.files("lab/student", "models")
    made = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {name: files[name] for name in made} == made
    assert hub.repos["models", "lab/student"].private
    done = subprocess.run(
        [sys.executable, "-c", LOAD, tmp_path / "out"], capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stderr, hub.seen[-12:])
    status, out, err = run(*words, "--out", tmp_path / "again", "--json")
    assert status == 0 and json.loads(out)["pushed"]["repo"] == "lab/student", err


def test_a_push_writes_over_a_student_of_this_program_alone(
    hub, store_path, photos, recipe, tmp_path
):
    one = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
    train(one, photos, tmp_path / "run", store=store_path)
    words = ("export", tmp_path / "run", "--no-onnx", "--push", "lab/student", "--out")
    for number, content in enumerate((b'{"architecture": "resnet50"}', b"no JSON")):
        hub.put("lab/student", "config.json", content, "models")
        status, _, err = run(*words, tmp_path / str(number))
        assert status == 1 and "lab/student holds files of another program (config.json)" in err
        assert set(hub.files("lab/student", "models")) == {"config.json"}


def test_a_pack_that_the_hub_keeps_as_a_small_file_is_sent_again(hub, store, tmp_path):
    share(store.path, "lab/labels")
    held = hub.repos["datasets", "lab/labels"]
    files = dict(held.commits[held.refs["main"]])
    for name, body in hub.files("lab/labels").items():
        files[name] = ("", body)  # without large files, the hub tells no sha256
    held.commit(files)
    again = share(store.path, "lab/labels")
    assert again.sent == again.packs
    assert verify(LabelStore.open(AT).path).complete


def test_a_commit_whose_answer_was_lost_is_made_once(hub, store, monkeypatch):
    share(store.path, "lab/labels")
    old = [name for name in hub.files("lab/labels") if name.startswith("packs/")]
    monkeypatch.setattr(packs, "PACK_BYTES", 10 * packs.PACK_BYTES)  # other packs, so old ones go
    hub.forgotten.append("POST .*/commit/main")
    share(store.path, "lab/labels")
    assert not hub.forgotten and not set(old) & set(hub.files("lab/labels"))
    assert verify(LabelStore.open(AT).path).complete


def test_nothing_is_pushed_unless_all_was_exported(hub, store_path, photos, recipe, tmp_path):
    one = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
    train(one, photos, tmp_path / "run", store=store_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").touch()
    words = ("export", tmp_path / "run", "--no-onnx", "--out", tmp_path / "out")
    for push, token, said in (
        ("student", "hf_writer", "is no name of a repository on the hub"),
        ("lab/student", "", "needs a token of the hub"),
        ("lab/student", "hf_writer", "is not empty; choose another --out"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_TOKEN", token)
            status, _, err = run(*words, "--push", push)
        assert status == 1 and said in err and err.count("\n") == 1
        assert hub.repos == {}
    status, _, err = run(*words, "--private")
    assert status == 2 and "--private goes with --push" in err
