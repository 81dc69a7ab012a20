"""Images are read from buckets and web servers as from a disk: fetched once, within a
bound, whatever happens to the network, and a refusal is one line without secrets."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from support.bucket_server import BUCKET, KEY, SECRET, Bucket
from support.command import SMOKE, run
from support.containers import PLAIN, as_one_tar, as_plain_shards, as_shards, parquet
from support.paths import ROOT
from support.small import CPU, changed, tree, write_photos
from support.stages import generate, recheck, train
from support.web_server import WebServer, make_certificate

from cache.errors import MealError
from cache.format.manifest import Images
from cache.system.local import NotLocal
from pipeline.images.data_set import DataSet
from pipeline.images.patience import DataError
from pipeline.images.reader import Reader
from pipeline.images.scan import scan
from pipeline.images.sources.remote import digests, fetch, persistence, store
from pipeline.images.sources.remote.files import RemoteFiles
from pipeline.images.sources.remote.room import Room, bytes_of
from pipeline.images.sources.remote.store import Object, RemoteError
from pipeline.images.sources.remote.url import Url, is_url
from pipeline.render.settings import RenderSettings

NAMES = "photos-train-{000000..000002}.tar"


@pytest.fixture
def bucket(seaweed: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """A bucket whose credentials are in the variables."""
    for name, value in seaweed.variables.items():
        monkeypatch.setenv(name, value)
    store._made.cache_clear()
    return seaweed


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own, and little patience."""
    monkeypatch.setenv("OFFLINE_MEAL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(persistence, "PATIENCE", 20.0)
    monkeypatch.setattr(persistence, "_said", -100.0)
    monkeypatch.setattr(store, "CHUNK", 1 << 12)
    store._answered.clear()
    return tmp_path / "cache"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DATA/train of three classes, eight photographs each, and DATA/val."""
    folder = tmp_path_factory.mktemp("photos")
    write_photos(folder / "train", 8)
    write_photos(folder / "val", 2, seed=1)
    return folder


@pytest.fixture(scope="session")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return as_shards(photos / "train", tmp_path_factory.mktemp("shards"))


@pytest.fixture
def web(shards: Path) -> Iterator[WebServer]:
    """A web server with the shards in /data."""
    server = WebServer({f"/data/{file.name}": file.read_bytes() for file in shards.iterdir()})
    server.start()
    yield server
    server.stop()


@pytest.fixture
def small(recipe):
    """A recipe of one view."""
    return changed(recipe, crops={"views": 1})


def scanned(data: object, split: str = "train") -> Images:
    return scan(DataSet.find(data, split), RenderSettings(threads=2), order_seed=0)


def weights(run_folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run_folder / "last.safetensors")


def refused(data: object, *secrets: str) -> str:
    """Return the line in which a data set is refused."""
    with pytest.raises(MealError) as error:
        scanned(data)
    line = str(error.value)
    assert "\n" not in line and "Debug" not in line and len(line) < 700
    assert not any(secret in line for secret in secrets)
    return line


def whole_files(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "remote").glob("*/*") if path.suffix == ".tar")


# ---- the same images


def test_both_stages_from_a_bucket_are_those_from_local_folders(
    photos, shards, bucket, tmp_path, small
):
    url = bucket.put(shards, "same/train")
    store_of_folders = generate(small, photos, tmp_path / "a.zarr", device=CPU)
    store_of_bucket = generate(small, f"{url}/", tmp_path / "b.zarr", device=CPU)
    first, second = tree(store_of_folders.path), tree(store_of_bucket.path)
    said = [json.loads(files.pop("zarr.json"))["attributes"] for files in (first, second)]
    told = [about["made_with"].pop("images") for about in said]
    assert told == ["class folders", f"3 tar files in s3://{BUCKET}/same/train"]
    assert all(about["seal"].pop("zarr.json") for about in said)
    assert first == second and said[0] == said[1]
    _, out, _ = run("inspect", store_of_bucket.path)
    assert f"from 3 tar files in s3://{BUCKET}/same/train" in out
    short = changed(small, train={"epochs": 1})
    for data, name in ((photos, "run"), (f"s3://{BUCKET}/same", "other")):
        train(
            short,
            data,
            tmp_path / name,
            store=store_of_folders.path,
            validation=photos / "val",
            device=CPU,
        )
    first, second = weights(tmp_path / "run"), weights(tmp_path / "other")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)
    assert recheck(store_of_folders.path, url, [], None)["trusted"]


def test_every_command_takes_a_bucket(photos, shards, bucket, tmp_path, small):
    bucket.put(shards, "all/train")
    val = as_shards(photos / "val", tmp_path / "val")
    for file in val.iterdir():
        file.rename(val / file.name.replace("train", "val"))
    url = bucket.put(val, "all/val").removesuffix("/val")
    how = ("--config", SMOKE, "--data", url, "--set=crops.views=1", "--device", "cpu")
    smoke = ("--set=train.epochs=1", "--set=train.milestones=[]")
    teacher = tmp_path / "teacher"
    status, _, err = run("train-student", *how, *smoke, "--set=train.labels=hard", "--out", teacher)
    assert status == 0, err
    figures = json.loads((teacher / "metrics.jsonl").read_text().splitlines()[-1])
    model = f"{model_of(teacher)}={teacher / 'last.safetensors'}"
    named = ("--teacher", model, "--store", tmp_path / "s.zarr")
    status, _, err = run("generate-labels", *how, *named)
    assert status == 0, err
    status, out, err = run("generate-labels", *how[:4], "--plan", "--teacher", model)
    assert status == 0 and "24 images" in err + out, err
    status, out, err = run("eval", "--data", url, "--model", model, "--json")
    assert status == 0 and "val_top1" in figures, err
    assert json.loads(out)["models"][0]["top1"] == pytest.approx(figures["val_top1"])
    report = tmp_path / "report.html"
    status, _, err = run("inspect", tmp_path / "s.zarr", "--report", report, "--data", url)
    assert status == 0 and report.read_text().count("data:image/") > 10, err
    status, out, err = run("verify", tmp_path / "s.zarr", "--data", url)
    assert status == 0, err
    told = ("--val-data", f"{url}/val", "--store", tmp_path / "s.zarr", "--out", tmp_path / "run")
    status, _, err = run("train-student", *how, *smoke, *told)
    assert status == 0, err


def model_of(run_folder: Path) -> str:
    import yaml

    return yaml.safe_load((run_folder / "config.yaml").read_text())["student"]["model"]


def test_a_url_names_a_folder_a_split_a_pattern_a_file_or_a_list(
    photos, shards, bucket, tmp_path, capsys
):
    bucket.put(shards, "named/train")
    val = as_shards(photos / "val", tmp_path / "val")
    bucket.put(val, "named/val")
    whole, few = scanned(shards).order, scanned(val).order
    base = f"s3://{BUCKET}/named"
    lines = [f"{base}/train/{file.name}" for file in sorted(shards.iterdir())]
    (tmp_path / "list.txt").write_text("\n".join([*lines, ""]))
    for data in (
        base,
        f"{base}/",
        f"{base}/train",
        f"{base}/train/{NAMES}",
        f"{base}/train/photos-*-?????[0-9].tar",
        tmp_path / "list.txt",
    ):
        assert scanned(data).order == whole, data
    assert scanned(base, "val").order == few == scanned(f"{base}/val").order
    assert len(scanned(lines[1])) == 8
    both = {"x-train-0.tar": next(shards.iterdir()), "x-val-0.tar": next(val.iterdir())}
    for name, file in both.items():
        shutil.copy(file, tmp_path / name)
    for place in ("told", "told/data"):
        for name in both:
            (tmp_path / place).mkdir(exist_ok=True, parents=True)
            shutil.copy(tmp_path / name, tmp_path / place)
        bucket.put(tmp_path / place, "told-in-data/data")
    bucket.put(tmp_path / "told" / "data", "told")
    for place in ("told", "told-in-data"):
        assert len(scanned(f"s3://{BUCKET}/{place}")) == 8
        assert len(scanned(f"s3://{BUCKET}/{place}", "val")) == len(scanned(both["x-val-0.tar"]))
    for data, says in (
        (f"{base}/test", "is empty"),
        (f"s3://{BUCKET}/told", "has train and val but no test"),
        (base, "has train and val but no test"),
    ):
        with pytest.raises(DataError, match=says):
            DataSet.find(data, "test")
    capsys.readouterr()


@pytest.mark.parametrize("form", ["plain", "snappy"])
def test_parquet_files_of_a_bucket_are_read_too(photos, bucket, tmp_path, form, monkeypatch):
    how = PLAIN if form == "plain" else {"compression": "snappy", "use_dictionary": False}
    parquet(**how)(photos / "train", tmp_path / "p")
    url = bucket.put(tmp_path / "p", f"parquet-{form}")
    assert scanned(url).manifest_digest() == scanned(photos).manifest_digest()
    monkeypatch.setenv("OFFLINE_MEAL_CACHE", str(tmp_path / "little"))
    biggest = max(file.stat().st_size for file in (tmp_path / "p" / "data").iterdir())
    monkeypatch.setenv("OFFLINE_MEAL_CACHE_SIZE", str(biggest))
    assert scanned(url).manifest_digest() == scanned(photos).manifest_digest()


def test_https_braces_and_a_certificate_of_ones_own(shards, tmp_path, monkeypatch):
    server = WebServer({f"/a b/{file.name}": file.read_bytes() for file in shards.iterdir()})
    server.certificate = make_certificate(tmp_path)
    server.start()
    try:
        pattern = f"{server.url}/a%20b/{NAMES}"
        assert "its certificate isn't trusted; name the file" in refused(pattern)
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "cert.pem"))
        store._made.cache_clear()
        assert scanned(pattern).order == scanned(shards).order
    finally:
        server.stop()
        store._made.cache_clear()


# ---- fetched once


def test_a_file_is_fetched_once_and_later_starts_fetch_nothing(web, cache):
    data = f"{web.url}/data/{NAMES}"
    first = scanned(data)
    assert len(web.gets()) == 3 and len(whole_files(cache)) == 3
    assert scanned(data).order == first.order and len(web.gets()) == 3
    for path in whole_files(cache):
        assert hashlib.md5(path.read_bytes()).hexdigest() in map(web.tag, web.files)
        assert path.stat().st_mtime == web.modified
        path.unlink()
    # Fetched again, and the kept headers are still good.
    assert DataSet.find(data, "train").list().name.tolist() == sorted(first.path.tolist())
    assert len(web.gets()) == 6


def test_a_connection_that_is_cut_goes_on_where_it_was(web, capsys):
    web.cuts = [40_000, 30_000, 0, 20_000, 10_000]
    data = f"{web.url}/data/photos-train-000001.tar"
    assert len(scanned(data)) == 8
    size = len(web.files["/data/photos-train-000001.tar"])
    starts = [request.start for request in web.gets("/data/photos-train-000001.tar")]
    assert starts[0] == 0 and len(starts) == 6 and sorted(starts) == starts
    # What was in the pipe when it broke comes again, at most.
    assert web.sent["/data/photos-train-000001.tar"] <= size + 5 * store.CHUNK
    assert web.gets()[-1].headers["if-match"].strip('"') == web.tag(web.gets()[-1].path)


def test_a_run_that_was_stopped_goes_on_with_its_partial_file(web, cache, monkeypatch):
    path = "/data/photos-train-000001.tar"
    monkeypatch.setattr(persistence, "PATIENCE", 0.0)
    web.cuts = [50_000, *[0] * 9]
    line = refused(web.url + path)
    assert "the connection broke, for 0 s; mend the network" in line
    (part,) = (cache / "remote").glob("*/*.part")
    had = part.stat().st_size
    assert 0 < had < len(web.files[path])
    web.cuts, before = [], len(web.gets())
    assert len(scanned(web.url + path)) == 8
    assert [request.start for request in web.gets()[before:]] == [had]
    assert not list((cache / "remote").glob("*/*.part"))


def test_every_byte_renews_the_patience(web, monkeypatch):
    monkeypatch.setattr(persistence, "PATIENCE", 0.5)
    web.speed, web.cuts = 60_000.0, [20_000] * 5
    assert len(scanned(f"{web.url}/data/photos-train-000001.tar")) == 8


def test_servers_that_fail_for_a_moment_are_asked_again(web):
    web.statuses = [503, 500, 503, 503, 502, 500, 503]
    assert len(scanned(f"{web.url}/data/{NAMES}")) == 24


def test_a_server_that_restarts_is_waited_for(web, capsys):
    web.speed = 200_000.0
    restarted = threading.Timer(0.3, lambda: (web.stop(), time.sleep(1.0), web.start()))
    restarted.start()
    assert len(scanned(f"{web.url}/data/{NAMES}")) == 24
    restarted.join()
    assert "trying again for up to" in capsys.readouterr().err


# ---- never trusted


def test_a_damaged_body_is_fetched_again_and_never_trusted(web, cache, capsys):
    left = [1]

    def once(path: str, body: bytes, start: int) -> bytes:
        if left and len(body) > 1:
            left.pop()
            return body[:-600] + bytes([body[-600] ^ 1]) + body[-599:]
        return body

    web.spoil = once
    path = "/data/photos-train-000001.tar"
    assert len(scanned(web.url + path)) == 8
    assert "came damaged, and was fetched once more" in capsys.readouterr().err
    assert [file.read_bytes() for file in whole_files(cache)] == [web.files[path]]


def test_a_body_that_is_damaged_each_time_is_refused(web, cache):
    count = [0]

    def always(path: str, body: bytes, start: int) -> bytes:
        count[0] += 1
        return body if len(body) < 2 else body[:-600] + bytes([count[0] % 256]) + body[-599:]

    web.spoil = always
    line = refused(f"{web.url}/data/photos-train-000001.tar")
    assert "came twice, with other bytes each time" in line
    assert not whole_files(cache)
    web.spoil = None
    assert len(scanned(f"{web.url}/data/photos-train-000001.tar")) == 8


def test_a_tag_that_is_no_digest_is_accepted_and_remembered(web, monkeypatch):
    """Encrypted objects have tags that look like an MD5."""
    monkeypatch.setattr(WebServer, "tag", lambda self, path: hashlib.md5(path.encode()).hexdigest())
    assert len(scanned(f"{web.url}/data/photos-train-000000.tar")) == 8
    assert len(web.gets()) == 2
    assert len(scanned(f"{web.url}/data/photos-train-000001.tar")) == 8
    assert len(web.gets()) == 3


def test_the_tag_of_an_upload_in_parts_is_checked(bucket, tmp_path):
    import obstore

    content = np.random.default_rng(0).bytes(13 << 20)
    obstore.put(bucket.store, "parts/x.tar", content, chunk_size=5 << 20)
    one = store.head(Url.parse(f"s3://{BUCKET}/parts/x.tar"))
    assert one.etag.endswith("-3") and digests.kind_of(one.etag) == "parts"
    (tmp_path / "good").write_bytes(content)
    (tmp_path / "bad").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert digests.agrees(tmp_path / "good", one.etag) is True
    assert digests.agrees(tmp_path / "bad", one.etag) is False
    assert digests.agrees(tmp_path / "bad", "5f3c-19") is None
    assert digests.part_sizes(13 << 20, 3)[0] == 5 << 20
    fetch.Fetch(one, tmp_path / "p.part", tmp_path / "x.tar").run()
    assert (tmp_path / "x.tar").read_bytes() == content


def test_an_object_that_was_replaced_is_fetched_anew_at_the_next_start(web, shards, cache):
    path = "/data/photos-train-000001.tar"
    first = scanned(web.url + path)
    files = sorted(shards.iterdir())
    web.files[path] = files[0].read_bytes()
    second = scanned(web.url + path)
    assert second.order != first.order == scanned(files[1]).order
    assert second.order == scanned(files[0]).order


@pytest.mark.parametrize("heed", [True, False])
@pytest.mark.parametrize("tags", ["md5", "other", "date", "weak"])
def test_an_object_that_is_replaced_in_a_run_is_refused(web, monkeypatch, heed, tags):
    web.heed, web.tags = heed, tags
    monkeypatch.setenv("OFFLINE_MEAL_CACHE_SIZE", "130kB")
    path = "/data/photos-train-000001.tar"
    monkeypatch.setenv("OFFLINE_MEAL_CACHE_SIZE", str(len(web.files[path]) + 100))
    pattern = f"{web.url}/data/{NAMES}"
    data = DataSet.find(pattern, "train")
    images = scan(data, RenderSettings(threads=2))
    web.files = {name: content[::-1] for name, content in web.files.items()}
    web.modified += 60
    with Reader(data, images) as read, pytest.raises(RemoteError) as error:
        read(images.usable)
    assert "was replaced by another object since it was listed; run the same" in str(error.value)


@pytest.mark.parametrize("tags", ["other", "date", "none", "weak"])
def test_a_partial_file_is_gone_on_with_whatever_the_server_tells(web, cache, monkeypatch, tags):
    web.tags = tags
    path = "/data/photos-train-000001.tar"
    with monkeypatch.context() as patch:
        patch.setattr(persistence, "PATIENCE", 0.0)
        web.cuts = [50_000, *[0] * 9]
        refused(web.url + path)
    web.cuts, before = [], len(web.gets())
    assert len(scanned(web.url + path)) == 8
    assert max(request.start for request in web.gets()[before:]) > 0
    if tags == "none":  # other contents of the same size: known by the partial file's end
        part = cache / "remote" / "x.part"
        one = store.head(Url.parse(web.url + path))
        part.write_bytes(bytes(50_000))
        fetch.Fetch(one, part, part.with_suffix(".tar")).run()
        assert part.with_suffix(".tar").read_bytes() == web.files[path]


def test_a_server_without_parts_serves_whole_files(web, monkeypatch, tmp_path):
    web.ranges = False
    web.cuts = [0, 50_000, 60_000]
    assert len(scanned(f"{web.url}/data/{NAMES}")) == 24
    monkeypatch.setenv("OFFLINE_MEAL_CACHE", str(tmp_path / "little"))
    monkeypatch.setenv("OFFLINE_MEAL_CACHE_SIZE", "130kB")
    assert "gives no parts of a file, and the file isn't in the cache" in refused(
        f"{web.url}/data/{NAMES}"
    )


def test_a_damaged_file_of_the_cache_is_dropped_and_read_from_the_server(web, cache, capsys):
    """Where the tag is no digest, only an image's own digest tells."""
    web.tags = "other"
    data = DataSet.find(f"{web.url}/data/{NAMES}", "train")
    images = scan(data, RenderSettings(threads=2))
    victim = whole_files(cache)[0]
    size, times = victim.stat().st_size, victim.stat()
    victim.write_bytes(bytes(size))
    os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    data = DataSet.find(f"{web.url}/data/{NAMES}", "train")
    with Reader(data, images) as read:
        blobs = read(images.usable)
    digests_of = [hashlib.sha256(blob).digest() for blob in blobs]
    assert digests_of == [images.digest[row].tobytes() for row in images.usable]
    assert capsys.readouterr().err.count("is damaged in the cache, and was removed there") == 1
    assert not victim.exists()


@pytest.fixture
def damaged(web, cache) -> tuple[DataSet, Images]:
    """A data set all of whose files are damaged in the cache, and its manifest."""
    web.tags = "other"
    data = DataSet.find(f"{web.url}/data/{NAMES}", "train")
    images = scan(data, RenderSettings(threads=2))
    for victim in whole_files(cache):
        times = victim.stat()
        victim.write_bytes(bytes(times.st_size))
        os.utime(victim, ns=(times.st_atime_ns, times.st_mtime_ns))
    return DataSet.find(f"{web.url}/data/{NAMES}", "train"), images


def test_threads_that_find_one_damage_at_once_say_it_once(damaged, capsys, monkeypatch):
    data, images = damaged
    monkeypatch.setattr(RemoteFiles, "readers", lambda self, threads: threads)
    met, mine, really = threading.Barrier(8, timeout=60), threading.local(), RemoteFiles.read

    def read(*of_what):
        found, mine.calls = really(*of_what), getattr(mine, "calls", 0) + 1
        if mine.calls == 2:  # to compare with the bucket's bytes: all eight are damaged
            met.wait()
        return found

    monkeypatch.setattr(RemoteFiles, "read", read)
    rows = images.usable[:8]
    with Reader(data, images, threads=8) as reader:
        digests_of = [hashlib.sha256(blob).digest() for blob in reader(rows)]
    assert digests_of == [images.digest[row].tobytes() for row in rows]
    files = len({int(address[0]) for address in data.addresses(images)[rows]})
    said = capsys.readouterr().err.count("is damaged in the cache, and was removed there")
    assert said == files < 8


def test_an_image_read_before_another_thread_found_the_damage_is_read_again(damaged):
    data, images = damaged
    at = data.addresses(images)[images.usable]
    first, second = at[at[:, 0] == at[0, 0]][:2]
    blob = data.source.read(second)
    assert data.source.again(first) is not None  # the file is dropped
    right = data.source.again(second)
    assert right is not None and right != blob
    assert hashlib.sha256(right).digest() in {digest.tobytes() for digest in images.digest}


@pytest.mark.parametrize(
    "command",
    [
        ("verify",),
        ("inspect", "--report", "report.html"),
        ("train-student", "--config", SMOKE, "--out", "run", "--store"),
    ],
)
def test_a_store_that_is_not_there_is_refused_before_images_are_fetched(web, tmp_path, command):
    name, *options = command
    url = f"{web.url}/data/{NAMES}"
    status, _, err = run(name, *options, tmp_path / "nowhere.zarr", "--data", url)
    assert status == 1 and f"there is no label store at {tmp_path / 'nowhere.zarr'}" in err
    assert not web.answered


@pytest.mark.parametrize(
    "command",
    [
        ("generate-labels", "--config", SMOKE, "--store", "s.zarr", "--teacher", "resnet5"),
        ("train-student", "--config", SMOKE, "--out", "run", "--student", "resnet18=gone.pth"),
        ("eval", "--model", "resnet5"),
        ("eval", "--model", "resnet18", "--teacher", "resnet18=gone.pth"),
    ],
)
def test_a_model_that_is_not_there_is_refused_before_images_are_fetched(web, command):
    status, _, err = run(*command, "--data", f"{web.url}/data/{NAMES}")
    wanted = ("timm has no model resnet5", "there is no checkpoint gone.pth")
    assert status == 1 and any(line in err for line in wanted) and not web.answered


# ---- several processes

FETCHING = """
import sys
sys.path[:0] = [{root!r}]
from cache.system.signals import on_signals
from pipeline.images.data_set import DataSet
from pipeline.images.sources.remote import persistence, store
store.CHUNK = 4096
persistence.PATIENCE = 60.0
with on_signals():
    print("begun", flush=True)
    sys.stdin.readline()
    data = DataSet.find(sys.argv[1], "train")
    print(len(data.list()), flush=True)
"""


def fetching(data: str, code: str = FETCHING, *, go: bool = True) -> subprocess.Popen:
    """Start a process that opens a data set, and wait until it has imported all. go:
    let it begin."""
    command = [sys.executable, "-c", code.format(root=str(ROOT)), data]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    process = subprocess.Popen(command, text=True, env=dict(os.environ), **pipes)
    assert process.stdout.readline() == "begun\n"
    if go:
        start(process)
    return process


def start(process: subprocess.Popen) -> None:
    """Let a process begin."""
    process.stdin.write("\n")
    process.stdin.flush()


def test_several_processes_fetch_each_file_once(web, cache):
    web.speed = 300_000.0
    data = f"{web.url}/data/{NAMES}"
    processes = [fetching(data, go=False) for _ in range(3)]
    for process in processes:
        start(process)
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert out == "24\n", err
    assert len(web.gets()) == 3
    assert web.sent == {path: len(content) for path, content in web.files.items()}
    for path in whole_files(cache):  # the headers are kept, so nobody waits for those
        path.unlink()
    processes = [fetching(data, go=False) for _ in range(3)]
    for process in processes:
        start(process)
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert out == "24\n", err
    assert len(web.gets()) == 6 and len(whole_files(cache)) == 3


def test_another_process_goes_on_if_the_fetching_one_is_killed(web):
    web.speed = 40_000.0
    data = f"{web.url}/data/{NAMES}"
    first = fetching(data)
    until = time.monotonic() + 20
    while sum(web.sent.values()) < 90_000 and time.monotonic() < until:
        time.sleep(0.02)
    second = fetching(data)
    time.sleep(0.5)
    assert len(web.gets()) == 3
    first.send_signal(signal.SIGKILL)
    first.wait()
    web.speed = 0.0
    begun = time.monotonic()
    out, err = second.communicate(timeout=60)
    assert out == "24\n", err
    assert time.monotonic() - begun < 15
    later = web.gets()[3:]
    assert 2 <= len(later) <= 3 and all(request.start > 0 for request in later)
    for path, content in web.files.items():  # again: a chunk, and what was in the pipe
        assert web.sent[path] <= len(content) + 4096 + 3 * 8192


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_fetching_within_seconds(web, cache, number):
    web.speed = 10_000.0
    process = fetching(f"{web.url}/data/{NAMES}")
    until = time.monotonic() + 20
    while sum(web.sent.values()) < 60_000 and time.monotonic() < until:
        time.sleep(0.02)
    begun = time.monotonic()
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert time.monotonic() - begun < 4 and process.returncode != 0
    assert "Stopped" in err
    parts = list((cache / "remote").glob("*/*.part"))
    assert len(parts) == 3 and sum(part.stat().st_size for part in parts) > 10_000
    assert not any((cache / "remote").glob("claims/*"))


READING = """
import sys
sys.path[:0] = [{root!r}]
from concurrent.futures import ThreadPoolExecutor
from cache.system.signals import on_signals
from pipeline.images.data_set import DataSet
data = DataSet.find(sys.argv[1], "train")
with on_signals(), ThreadPoolExecutor(8) as pool:
    print("begun", flush=True)
    sys.stdin.readline()
    list(pool.map(data.source.read, data.list().address))
"""


def test_a_signal_ends_the_reading_of_parts_too(web, monkeypatch):
    monkeypatch.setenv("OFFLINE_MEAL_CACHE_SIZE", "130kB")
    data = f"{web.url}/data/{NAMES}"
    DataSet.find(data, "train")
    web.speed = 100.0
    process = fetching(data, READING)
    time.sleep(1.5)
    begun = time.monotonic()
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 4 and "Stopped" in err


# ---- the bound


class Watch(threading.Thread):
    """Looks all the time how many bytes the fetched files take."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.most, self.stopped = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.001):
            self.most = max(self.most, taken(self.folder))

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.join()


def taken(folder: Path) -> int:
    sizes = 0
    for place in folder.iterdir() if folder.exists() else ():
        for name in os.listdir(place) if place.name != "claims" else ():
            with suppress(FileNotFoundError):
                sizes += (place / name).stat().st_size
    return sizes


def test_what_does_not_fit_is_read_in_parts_and_the_bound_is_kept(
    web, shards, cache, monkeypatch, capsys
):
    bound = 230_000  # one file is kept, and room for another while its headers are read
    monkeypatch.setenv("OFFLINE_MEAL_CACHE_SIZE", str(bound))
    web.speed = 3_000_000.0
    data = f"{web.url}/data/{NAMES}"
    with Watch(cache / "remote") as watch:
        assert scanned(data).order == scanned(shards).order
    assert 100_000 < watch.most <= bound
    said = capsys.readouterr().err
    assert "3 files of 317.4 kB don't fit into the cache (230.0 kB for them in" in said
    assert "1 of them are kept there" in said and "raise OFFLINE_MEAL_CACHE_SIZE" in said
    found = DataSet.find(data, "train").source
    assert len(whole_files(cache)) == 1 and found.readers(2) == 64


def test_a_student_is_the_same_whatever_fits_into_the_cache(
    web, monkeypatch, photos, tmp_path, small
):
    monkeypatch.setenv("OFFLINE_MEAL_CACHE_SIZE", "230kB")
    data = f"{web.url}/data/{NAMES}"
    kept_store = generate(small, photos, tmp_path / "s.zarr", device=CPU)
    short = changed(small, train={"epochs": 1})
    for place, name in ((photos, "run"), (data, "other")):
        train(
            short,
            place,
            tmp_path / name,
            store=kept_store.path,
            validation=photos / "val",
            device=CPU,
        )
    first, second = weights(tmp_path / "run"), weights(tmp_path / "other")
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_files_of_other_data_sets_make_room_unless_they_are_used(web, cache, monkeypatch, capsys):
    for place in ("b", "c"):
        for path in [path for path in web.files if path.startswith("/data/")]:
            web.files[path.replace("/data/", f"/{place}/")] = web.files[path]
    monkeypatch.setenv("OFFLINE_MEAL_CACHE_SIZE", "640kB")  # two data sets of 317 kB
    used = DataSet.find(f"{web.url}/data/{NAMES}", "train")
    mine = set(whole_files(cache))
    DataSet.find(f"{web.url}/b/{NAMES}", "train")
    assert len(whole_files(cache)) == 6
    third = DataSet.find(f"{web.url}/c/{NAMES}", "train")
    now = set(whole_files(cache))
    assert len(now) == 6 and mine < now and not third.source.files.parts
    capsys.readouterr()
    fourth = DataSet.find(f"{web.url}/b/{NAMES}", "train")  # both others are used
    assert (
        "3 files of 317.4 kB don't fit into the cache (5.1 kB for them in"
        in capsys.readouterr().err
    )
    assert set(whole_files(cache)) == now and len(fourth.source.files.parts) == 3
    web.statuses = [503, 503, 500, 503]
    web.cuts = [0, 100, 0, 3]
    assert len(scan(fourth, RenderSettings(threads=2)).usable) == 24
    images = scan(used, RenderSettings(threads=2))
    for path in mine:  # somebody empties the cache under a running process
        path.unlink()
    with Reader(used, images) as read:
        blobs = read(images.usable)
    assert [len(blob) for blob in blobs] == images.bytes[images.usable].tolist()


def test_files_of_ones_own_make_no_room(web, cache, monkeypatch):
    monkeypatch.setenv("OFFLINE_MEAL_CACHE_SIZE", "250kB")
    objects = [store.head(Url.parse(web.url + path)) for path in sorted(web.files)]
    room = Room(objects)
    for i in range(2):
        room.paths[i].write_bytes(web.files[sorted(web.files)[i]])
    (room.paths[0].parent / "stale.tar").write_bytes(bytes(10_000))
    assert not room.admit(room.part(2, objects[2].size), objects[2].size)
    assert room.admit(room.part(2, 20_000), 20_000)
    assert [path.exists() for path in room.paths] == [True, True, False]
    assert not (room.paths[0].parent / "stale.tar").exists()


def test_a_cache_that_is_emptied_under_a_running_process_is_filled_again(web, shards, cache):
    images = scanned(shards)
    data = DataSet.find(f"{web.url}/data/{NAMES}", "train")
    shutil.rmtree(cache / "remote")
    with Reader(data, images) as read:
        blobs = read(images.usable)
    assert [hashlib.sha256(blob).digest() for blob in blobs] == [
        images.digest[row].tobytes() for row in images.usable
    ]


def test_a_file_that_fits_nowhere_is_refused(web, monkeypatch):
    monkeypatch.setenv("OFFLINE_MEAL_CACHE_SIZE", "100kB")
    monkeypatch.setattr("pipeline.images.sources.remote.files.ROOM_PATIENCE", 1.0)
    line = refused(f"{web.url}/data/{NAMES}")
    assert "takes 112.6 kB, and" in line and "raise OFFLINE_MEAL_CACHE_SIZE" in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said_and_the_rest_is_read_in_parts(
    web, shards, cache, monkeypatch, capsys, number
):
    pattern = f"{web.url}/data/{NAMES}"
    DataSet.find(pattern, "train")  # the headers are known
    for path in whole_files(cache):
        path.unlink()
    write, written = fetch._write, [0]

    def full(file: object, chunk: bytes) -> None:
        written[0] += len(chunk)
        if written[0] > 150_000:
            raise OSError(number, os.strerror(number))
        write(file, chunk)

    monkeypatch.setattr(fetch, "_write", full)
    capsys.readouterr()
    assert scanned(pattern).order == scanned(shards).order
    said = capsys.readouterr().err
    assert said.count("the disk is full (") == 1 and "are read from the store one by one" in said
    assert not list((cache / "remote").glob("*/*.part"))


@pytest.mark.parametrize(
    ("text", "size"),
    [("200GB", 200 * 10**9), ("1.5TiB", 3 << 39), ("5000", 5000), (" 3 mb ", 3 * 10**6)],
)
def test_a_size_is_read_as_people_write_it(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize("text", ["much", "-3GB", "3 XB", "GB", "1,5TB"])
def test_a_size_that_is_none_is_refused(web, monkeypatch, text):
    monkeypatch.setenv("OFFLINE_MEAL_CACHE_SIZE", text)
    assert "which is no size; write for example" in refused(f"{web.url}/data/{NAMES}")


def test_a_cache_that_cannot_be_written_is_said(web, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFLINE_MEAL_CACHE", str(tmp_path / "file"))
    assert "name another folder in the variable OFFLINE_MEAL_CACHE" in refused(
        f"{web.url}/data/{NAMES}"
    )


# ---- without the network


def test_a_later_start_needs_no_network_for_what_is_here(web, bucket, shards, capsys, monkeypatch):
    monkeypatch.setattr(persistence, "PATIENCE", 0.5)
    data = f"{web.url}/data/{NAMES}"
    first = scanned(data)
    web.stop()
    capsys.readouterr()
    assert scanned(data).order == first.order
    said = capsys.readouterr().err
    assert "can't be reached (the connection was refused); going on with its 3 files" in said
    line = refused(f"{web.url}/data/photos-train-000001.tar")
    assert "the connection was refused, for" in line and "run the same command again" in line
    web.start()
    url = bucket.put(shards, "offline/train")
    scanned(url)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{web.port + 1}")
    store._made.cache_clear()
    assert scanned(url).order == first.order


def test_what_is_not_here_is_waited_for_and_then_named(web, cache, monkeypatch):
    monkeypatch.setattr(persistence, "PATIENCE", 0.5)
    data = f"{web.url}/data/{NAMES}"
    scanned(data)
    whole_files(cache)[0].unlink()
    web.stop()
    line = refused(data)
    assert "photos-train-" in line and "mend the network or the server" in line
    web.start()


# ---- one line for each fault


def test_what_a_web_server_refuses_is_one_line(web):
    data = f"{web.url}/data/{NAMES}"
    for status, says in (
        (404, "there is no http"),
        (410, "answered 410 Gone"),
        (401, "can't be read (401 Unauthorized); write https://USER:PASSWORD@HOST"),
        (403, "can't be read (403 Forbidden); write https://USER:PASSWORD@HOST"),
        (400, "answered 400 Bad Request"),
    ):
        web.always = status
        begun = time.monotonic()
        assert says in refused(data)
        assert time.monotonic() - begun < 5  # lasting, and said at once
    web.always = 0
    for url, says in (
        (f"{web.url}/data/", "web servers don't list their files; name them"),
        (f"{web.url}/data/*.tar", "web servers don't list their files; write braces"),
        (f"{web.url}/data/photos-train-{{0..1}}.tar", "there is no http"),
        (f"{web.url}/x.tar.gz", "is compressed"),
        (f"{web.url}/x.txt", "lists are read from disks only"),
        (f"{web.url}/{{x.tar,y.parquet}}", "there is no"),
        ("http://no.such.host.invalid/x.tar", "its host isn't known; correct the URL"),
    ):
        assert says in refused(url)


def test_a_server_that_stays_silent_is_named_after_a_while(web, monkeypatch):
    monkeypatch.setattr(persistence, "PATIENCE", 1.0)
    web.always = 503
    line = refused(f"{web.url}/data/{NAMES}")
    assert "503 Service Unavailable, for" in line and "run the same command again" in line


def test_what_a_bucket_refuses_is_one_line(bucket, shards, monkeypatch, tmp_path):
    url = bucket.put(shards, "lines")
    bucket.put(write_photos(tmp_path / "folders", 1), "folders/train")
    for data, says in (
        ("s3://no-such-bucket/x", "there is no bucket no-such-bucket"),
        ("s3://no-such-bucket/x.tar", "there is no s3://no-such-bucket/x.tar; correct the URL"),
        (f"{url}/x.tar", "there is no s3://"),
        (f"{url}/photos-train-{{000000..000005}}.tar", "of 6 files that are named (3 of them"),
        (f"{url}/*/x.tar", "wildcards in the name of a folder"),
        (f"{url}/y-*.tar", "correct the pattern"),
        (f"s3://{BUCKET}/folders/train", "pack the images of class folders into tar files"),
        (f"s3://{BUCKET}/nothing", "it is empty"),
        ("s3://", "is followed by no bucket"),
    ):
        assert says in refused(data, SECRET), data
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "another")
    store._made.cache_clear()
    line = refused(url, SECRET)
    assert "SignatureDoesNotMatch" in line and "export-credentials --format env" in line
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SKIP_SIGNATURE", "true")
    store._made.cache_clear()
    assert "AccessDenied" in refused(url)
    store._made.cache_clear()


def test_without_obstore_one_line_says_what_to_install(web, monkeypatch):
    monkeypatch.setitem(sys.modules, "obstore", None)
    line = refused(f"{web.url}/data/{NAMES}")
    assert "pip install 'offline-meal-v2[remote]', or pip install obstore" in line


def test_only_data_may_be_a_url(tmp_path, web):
    for place in ("s3:/bucket/x", "ftp://host/x", "hf://datasets/x", "file:///x", "host:/x"):
        with pytest.raises(NotLocal):
            DataSet.find(place, "train")
    status, _, err = run("inspect", "s3://bucket/labels.zarr")
    assert status == 1 and "only local paths are read and written" in err
    how = ("--config", SMOKE, "--data", f"{web.url}/data/{NAMES}")
    for option in ("--store", "--out"):
        name = "generate-labels" if option == "--store" else "train-student"
        status, _, err = run(name, *how, option, "s3://bucket/x")
        assert status == 1 and "s3://bucket/x is a URL, and only local paths" in err


def test_one_file_knows_obstore():
    import ast

    knowing = set()
    for path in (ROOT / "pipeline").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "obstore" for name in names):
                knowing.add(path.name)
    assert knowing == {"store.py"}


# ---- secrets


def secrets_in(folder: Path, *secrets: str) -> list[Path]:
    """List the files that hold a secret, or have it in their names."""
    return [
        path
        for path in folder.rglob("*")
        if any(
            secret in str(path) or (path.is_file() and secret.encode() in path.read_bytes())
            for secret in secrets
        )
    ]


def test_a_password_is_used_and_never_shown_or_kept(web, cache, capsys, tmp_path, small):
    web.password = "me:hush/hush"
    data = f"http://me:hush%2Fhush@127.0.0.1:{web.port}/data/{NAMES}"
    made = generate(small, data, tmp_path / "s.zarr", device=CPU)
    web.always = 403
    line = refused(data, "hush", "me:")
    capture = capsys.readouterr()
    assert "hush" not in capture.err + capture.out + line + repr(DataSet.find)
    web.always = 0
    source = DataSet.find(data, "train").source
    assert "hush" not in f"{source.path}{source.path!r}{source.describe()}"
    assert not secrets_in(cache, "hush") and not secrets_in(made.path, "hush")
    assert "401" in refused(f"{web.url}/data/{NAMES}")


def test_a_signed_url_works_and_tomorrows_has_the_same_file(bucket, shards, cache, tmp_path):
    from datetime import timedelta

    import obstore

    bucket.put(shards, "signed")
    name = "signed/photos-train-000001.tar"
    urls = [obstore.sign(bucket.store, "GET", name, timedelta(hours=hours)) for hours in (1, 2)]
    signature = urls[0].partition("X-Amz-Signature=")[2][:20]
    assert signature and urls[0] != urls[1]
    assert len(scanned(urls[0])) == 8 and len(whole_files(cache)) == 1
    assert len(scanned(urls[1])) == 8 and len(whole_files(cache)) == 1
    names = sorted(file.name for file in shards.iterdir())
    signed = [obstore.sign(bucket.store, "GET", f"signed/{n}", timedelta(hours=1)) for n in names]
    (tmp_path / "list.txt").write_text("\n".join(signed))
    assert scanned(tmp_path / "list.txt").order == scanned(shards).order
    expired = urls[0].replace(signature, "0" * len(signature))
    line = refused(expired, "X-Amz", KEY)
    assert "a signed URL that hasn't expired" in line
    assert not secrets_in(cache, signature, "X-Amz-Signature")


def test_an_error_of_an_unknown_kind_shows_no_address():
    url = Url.parse("https://host/x.tar?X-Amz-Signature=hush")
    text = (
        "Generic HTTP error: Error performing HEAD https://host/x.tar?X-Amz-Signature=hush in 5ms "
        "- something strange at https://host/x.tar?X-Amz-Signature=hush\n\nDebug source:\nhush"
    )
    line = str(store._refusal(url, Exception(text)))
    assert "something strange at …" in line and "hush" not in line and "\n" not in line


# ---- URLs


def test_a_url_has_the_parts_of_a_path_and_hides_its_secrets():
    one = Url.parse("https://me:hush@host:8443/a/b%20c/x-000.tar?X-Amz-Signature=5&v=2#part")
    assert str(one) == "https://host:8443/a/b c/x-000.tar" and "hush" not in repr(one)
    assert (one.name, one.stem, one.suffix) == ("x-000.tar", "x-000", ".tar")
    assert str(one.parent / "y.tar") == "https://host:8443/a/b c/y.tar"
    other = Url.parse("https://host:8443/a/b c/x-000.tar?v=2&X-Amz-Signature=6")
    assert one.identity == other.identity and one != other
    assert other.identity != Url.parse("https://host:8443/a/b c/x-000.tar?v=3").identity
    assert str(Url.parse("S3://bucket//a//b/")) == "s3://bucket/a/b"
    assert str(Url.parse("s3://bucket/a?b=1")) == "s3://bucket/a?b=1"
    with pytest.raises(DataError) as error:
        Url.parse("s3://key:hush@bucket/x")
    assert "hush" not in str(error.value)
    assert is_url("gs://b/x") and is_url("HTTP://b")
    assert not any(map(is_url, ("s3:/b/x", "/s3://b", "b/x", "hf://x", Path("s3://b"))))


def test_an_empty_object_and_a_tar_of_folders_are_read(web, photos, tmp_path):
    whole = as_one_tar(photos / "train", tmp_path / "one").read_bytes()
    web.files |= {"/one.tar": whole, "/empty.tar": b""}
    assert scanned(f"{web.url}/one.tar").order == scanned(photos).order
    assert "is empty" in refused(f"{web.url}/empty.tar")
    plain = as_plain_shards(photos / "train", tmp_path / "plain")
    web.files |= {f"/p/{file.name}": file.read_bytes() for file in plain.iterdir()}
    assert len(scanned(f"{web.url}/p/{{00000..00002}}.tar")) == 24
    one = Object(Url.parse(f"{web.url}/one.tar"), len(whole) + 1)
    with pytest.raises(RemoteError, match="was replaced by another"):
        store.read(one, 0, 10)
