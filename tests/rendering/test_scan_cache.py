"""A scan is kept: a restart decodes only the files that have changed, a scan that was
stopped goes on, and a file that can't be read for a moment is never unusable."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import stages
from support.command import SMOKE
from support.paths import ROOT
from support.small import CLASSES, CPU, changed, write_teacher
from support.stages import train

from cache import LabelStore
from cache.format.manifest import UNUSABLE, Images
from pipeline.images import patience
from pipeline.images import scan as scan_module
from pipeline.images.patience import DataError
from pipeline.images.scan import _read_any
from pipeline.images.scan_cache import Scanned
from pipeline.images.sources.source import ImageSource, Listing


@pytest.fixture
def data(photos: Path, tmp_path: Path) -> Path:
    """A copy of the photographs that a test may change, and a file that is no image."""
    folder = Path(shutil.copytree(photos / "train", tmp_path / "data" / "train"))
    shutil.copytree(photos / "val", tmp_path / "data" / "val")
    (folder / "ant" / "notes.txt").write_text("no image at all")
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names, below their folders, of the files that scans have read."""
    seen = []
    whole = _read_any

    def noted(source: ImageSource, files: Listing, row: int) -> bytes | str:
        seen.append(files.name[row])
        return whole(source, files, row)

    monkeypatch.setattr(scan_module, "_read_any", noted)
    return seen


def scan(folder: Path, before: Scanned | None, **how: object) -> Images:
    return stages.scan(
        folder, CLASSES, **{"exif": "ignore", "threads": 2, "order_seed": 3, **how}, before=before
    )


@pytest.fixture
def kept(data: Path, tmp_path: Path) -> Path:
    """A kept scan of the data."""
    before = Scanned(tmp_path / "images.npz")
    scan(data, before)
    assert not before.file.exists()  # a command keeps it when it knows that it can begin
    before.keep()
    return before.file


def same(a: Images, b: Images) -> bool:
    return a.manifest_digest() == b.manifest_digest() and a.order == b.order


def test_only_what_has_no_pixels_is_read_again(data, kept, read):
    found = scan(data, Scanned(kept))
    assert read == ["ant/notes.txt"]
    assert same(found, scan(data, None))
    assert len(found.usable) == 90


def test_what_has_changed_is_read_again(data, kept, read):
    later, longer = data / "bee" / "003.jpg", data / "bee" / "005.jpg"
    content, about = (data / "ant" / "001.jpg").read_bytes(), later.stat()
    later.write_bytes(content.ljust(about.st_size, b"\0")[: about.st_size])  # of the same size
    os.utime(later, ns=(0, about.st_mtime_ns + 1))
    when = longer.stat().st_mtime_ns
    longer.write_bytes(longer.read_bytes() + b"\0")
    os.utime(longer, ns=(0, when))
    (data / "cat" / "new.jpg").write_bytes(content)
    (data / "cat" / "007.jpg").unlink()
    os.rename(data / "cat" / "008.jpg", data / "ant" / "moved.jpg")
    found = scan(data, Scanned(kept))
    assert sorted(read) == [
        "ant/moved.jpg",
        "ant/notes.txt",
        "bee/003.jpg",
        "bee/005.jpg",
        "cat/new.jpg",
    ]
    assert same(found, scan(data, None))


def test_another_limit_holds_for_what_is_known(data, kept, read):
    found = scan(data, Scanned(kept), max_megapixels=0.01)
    assert same(found, scan(data, None, max_megapixels=0.01))
    assert 0 < len(found.usable) < 90
    assert len(read) < 91 + 91


@pytest.mark.parametrize("cut", [0, 10, 500, -10, -1])
def test_what_is_not_whole_is_not_believed(data, kept, read, cut):
    kept.write_bytes(kept.read_bytes()[:cut])
    assert same(scan(data, Scanned(kept)), scan(data, None))
    assert len(read) == 2 * 91


@pytest.mark.parametrize("part", np.linspace(0.02, 0.98, 25))
def test_a_flipped_bit_is_noticed(data, kept, part):
    content = bytearray(kept.read_bytes())
    content[int(part * len(content))] ^= 4
    kept.write_bytes(content)
    assert same(scan(data, Scanned(kept)), scan(data, None))


def test_another_decoder_decodes_again(data, kept, read, monkeypatch):
    Image.open(data / "ant" / "000.jpg").save(data / "ant" / "000.jpg", exif=_turned())
    before = Scanned(kept)
    scan(data, before)
    before.keep()
    read.clear()
    assert same(scan(data, Scanned(kept), exif="apply"), scan(data, None, exif="apply"))
    assert len(read) == 2 * 91
    monkeypatch.setattr("pipeline.images.scan_cache.dali_version", "0.1")
    read.clear()
    scan(data, Scanned(kept))
    assert len(read) == 91


def _turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def test_a_folder_without_any_image_is_kept_too(tmp_path, read):
    for name in CLASSES:
        (tmp_path / name).mkdir()
    (tmp_path / "ant" / "notes.txt").write_text("no image at all")
    for _ in range(2):
        before = Scanned(tmp_path / "images.npz")
        assert scan(tmp_path, before).status.tolist() == [UNUSABLE]
        before.keep()
    assert read == ["ant/notes.txt"] * 2


def test_a_run_that_goes_on_reads_only_what_has_changed(data, recipe, tmp_path, read):
    hard = {"labels": "hard", "epochs": 1}
    train(changed(recipe, train=hard), data.parent, tmp_path / "run", device=CPU)
    assert len(read) == 91 + 21
    read.clear()
    shutil.copy(data / "ant" / "000.jpg", data.parent / "val" / "ant" / "added.jpg")
    train(changed(recipe, train=hard | {"epochs": 2}), data.parent, tmp_path / "run", device=CPU)
    assert sorted(read) == ["ant/added.jpg", "ant/notes.txt"]
    train(changed(recipe, train=hard | {"epochs": 2}), data.parent, tmp_path / "whole", device=CPU)
    assert (tmp_path / "run/last.safetensors").read_bytes() == (
        tmp_path / "whole/last.safetensors"
    ).read_bytes()


def test_with_a_store_the_validation_images_are_decoded_once(
    photos, recipe, store_path, tmp_path, read
):
    for epochs in (1, 2):
        train(
            changed(recipe, train={"epochs": epochs}),
            photos,
            tmp_path / "run",
            store=store_path,
            device=CPU,
        )
    assert len(read) == 21
    assert not (tmp_path / "run" / "training-images.npz").exists()


def test_an_image_that_changed_unnoticed_is_refused_when_it_is_read(data, recipe, tmp_path):
    """The image has its old size and time, as rsync may leave it, but a new digest."""
    hard = {"labels": "hard", "epochs": 1}
    train(changed(recipe, train=hard), data.parent, tmp_path / "run", device=CPU)
    victim = data / "bee" / "003.jpg"
    when = victim.stat().st_mtime_ns
    content = bytearray(victim.read_bytes())
    content[-30] ^= 1
    victim.write_bytes(content)
    os.utime(victim, ns=(when, when))
    with pytest.raises(
        DataError,
        match="bee/003.jpg has changed since .*; "
        "put the image back as it was, or begin anew, with another store or --out",
    ):
        train(
            changed(recipe, train=hard | {"epochs": 2}), data.parent, tmp_path / "run", device=CPU
        )


# ---- a scan that is stopped

STOPPED = """
import os, signal, sys, time
from pathlib import Path
sys.path[:0] = {paths!r}
from pipeline.images import scan, scan_cache
scan_cache.EVERY, scan_cache.SHARE = {every!r}, 0
read, seen = scan._read_any, []

def noted(source, files, row):
    path = files.name[row]
    seen.append(path)
    with open({log!r}, "a") as log:
        log.write(path + chr(10))
    if len(seen) == {at!r}:
        time.sleep(1)  # until the main thread has written what was read before
        os.kill(os.getpid(), signal.{signal})
        time.sleep(1)  # while the main thread stops
    return read(source, files, row)

scan._read_any = noted
sys.argv[1:] = {arguments!r}
from cli import main
main()
"""


class Stopped:
    """Runs commands whose scan is stopped by a signal, and notes the images that each
    scan reads."""

    def __init__(self, folder: Path, arguments: list[object]) -> None:
        self.folder, self.arguments = folder, [*map(str, arguments), "--set", "render.threads=1"]

    def run(self, at: int = 0, name: str = "SIGTERM", every: float = 1000.0) -> tuple[int, list]:
        log = self.folder / "log"
        log.write_text("")
        code = STOPPED.format(
            paths=[str(ROOT)],
            every=every,
            log=str(log),
            at=at,
            signal=name,
            arguments=self.arguments,
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=300
        )
        self.said = done.stderr
        return done.returncode, log.read_text().split()


@pytest.fixture(params=["store", "run"])
def stopped(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> Stopped:
    (data / "ant" / "notes.txt").unlink()
    shutil.rmtree(data.parent / "val")
    weights = write_teacher(tmp_path / "t.safetensors", "test_resnet", 0)
    if request.param == "store":
        return Stopped(
            tmp_path,
            [
                *("generate-labels", "--config", SMOKE, "--data", data, "--views", 1),
                *("--store", tmp_path / "s.zarr", "--teacher", f"test_resnet={weights}"),
            ],
        )
    return Stopped(
        tmp_path,
        [
            *("train-student", "--config", SMOKE, "--data", data, "--out", tmp_path / "run"),
            *("--student", f"test_resnet={weights}", "--set", "train.labels=hard"),
            *("--epochs", 1),
        ],
    )


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_a_scan_that_is_stopped_goes_on_where_it_was(stopped, data, name):
    """With SIGKILL nothing is written at the end: what was written before counts."""
    status, first = stopped.run(40, name, 0.0 if name == "SIGKILL" else 1000.0)
    assert status == (-9 if name == "SIGKILL" else 1) and len(first) == 40
    if name == "SIGTERM":
        assert "to go on from what is finished" in stopped.said
    status, second = stopped.run()
    assert status == 0, stopped.said
    assert len({*first, *second}) == 90
    # The image at which the signal came is read again, and with SIGKILL those that were
    # read since the last write.
    assert len(first) + len(second) <= 95
    left = {path.name for path in stopped.folder.iterdir()}
    assert left <= {"data", "log", "t.safetensors", "s.zarr", "run"}
    kept = stopped.folder / "run" / "training-images.npz"
    assert not list(stopped.folder.glob("run/.training-images*"))
    if kept.exists():
        assert same(scan(data, Scanned(kept), order_seed=0), scan(data, None, order_seed=0))
    else:
        images = LabelStore.open(stopped.folder / "s.zarr").images
        assert same(images, scan(data, None, order_seed=0))


def test_a_whole_scan_is_kept_though_the_next_one_is_refused(
    data, recipe, tmp_path, read, monkeypatch
):
    """Training images take hours to scan, and validation images are scanned next."""
    monkeypatch.setattr("pipeline.images.scan_cache.AT_END", 0.0)
    hard = changed(recipe, train={"labels": "hard", "epochs": 1})
    (data.parent / "val" / "dog").mkdir()
    with pytest.raises(DataError, match="dog"):
        train(hard, data.parent, tmp_path / "run", device=CPU)
    (data.parent / "val" / "dog").rmdir()
    read.clear()
    train(hard, data.parent, tmp_path / "run", device=CPU)
    assert len(read) == 1 + 21  # notes.txt, which has no pixels, and val/


def test_a_disk_without_room_for_what_was_scanned_is_named(data, tmp_path, capsys):
    before = Scanned(None, tmp_path / "file" / "s.scan")
    (tmp_path / "file").touch()  # no folder can be made there
    scan(data, before)
    before.keep_part()
    said = capsys.readouterr().err
    assert f"what was scanned can't be kept in {tmp_path}/file/s.scan (" in said


# ---- a disk that fails


class Disk:
    """Fails to read some files and to list some folders, some times."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.errors: dict[str, tuple[BaseException, int]] = {}
        self.seen: dict[str, int] = {}
        monkeypatch.setattr(patience, "WAITS", (0.0, 0.0, 0.0))
        scandir, whole = os.scandir, open

        def opened(path: str | Path, mode: str) -> Any:
            self.befall(str(path))
            return whole(path, mode)

        def scanned(path: str | Path) -> Any:
            self.befall(str(path))
            return scandir(path)

        monkeypatch.setattr(patience, "open", opened, raising=False)
        monkeypatch.setattr(patience.os, "scandir", scanned)

    def fail(self, end: str, error: BaseException, times: int) -> None:
        self.errors[end] = error, times

    def befall(self, path: str) -> None:
        for end, (error, times) in self.errors.items():
            if path.endswith(end):
                self.seen[end] = self.seen.get(end, 0) + 1
                if self.seen[end] <= times:
                    raise error


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


ERRORS = [
    *(OSError(code, os.strerror(code)) for code in (errno.ESTALE, errno.EIO, errno.EACCES)),
    *(OSError(code, os.strerror(code)) for code in (errno.ENOMEM, errno.ETIMEDOUT, errno.EINTR)),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("end", ["bee/003.jpg", "/bee"])
def test_a_disk_that_fails_for_a_moment_changes_nothing(data, tmp_path, disk, error, end):
    whole = scan(data, None)
    disk.fail(end, error, 2)
    assert same(scan(data, Scanned(tmp_path / "images.npz")), whole)
    assert disk.seen[end] > 2


@pytest.mark.parametrize("error", ERRORS, ids=repr)
@pytest.mark.parametrize("end", ["bee/003.jpg", "/bee"])
def test_what_cannot_be_read_is_never_unusable(data, tmp_path, disk, error, end):
    before = Scanned(tmp_path / "images.npz")
    disk.fail(end, error, 10**6)
    with pytest.raises(DataError, match=f"{end} can't be read now .*4 tries"):
        scan(data, before)
    assert disk.seen[end] == 4 and not before.file.exists()
    disk.errors.clear()
    assert same(scan(data, Scanned(tmp_path / "images.npz")), scan(data, None))


def test_a_file_that_comes_short_is_never_unusable(data, disk, monkeypatch):
    """Some network file systems end a read early, without an error."""
    about = os.fstat

    def longer(descriptor: int) -> os.stat_result:
        found = list(about(descriptor))
        found[stat.ST_SIZE] += 1
        return os.stat_result(found)

    monkeypatch.setattr(patience.os, "fstat", longer)
    with pytest.raises(DataError, match=r"can't be read now \(only .* bytes came; 4 tries\)"):
        scan(data, None)


def test_a_file_that_is_gone_since_the_list_stops_the_scan(data, monkeypatch):
    whole = _read_any

    def gone(source: ImageSource, files: Listing, row: int) -> bytes | str:
        if files.name[row] == "cat/005.jpg":
            (source.path / files.name[row]).unlink()
        return whole(source, files, row)

    monkeypatch.setattr(scan_module, "_read_any", gone)
    with pytest.raises(
        DataError, match="cat/005.jpg can't be read any more .* run the same command"
    ):
        scan(data, None)
    assert len(scan(data, None)) == 90


def test_a_disk_that_fails_while_training_is_tried_again(data, recipe, tmp_path, disk):
    hard = changed(recipe, train={"labels": "hard", "epochs": 1})
    train(hard, data.parent, tmp_path / "whole", device=CPU)
    disk.fail("train/bee/003.jpg", OSError(errno.ESTALE, "Stale file handle"), 1)
    train(hard, data.parent, tmp_path / "run", device=CPU)
    assert disk.seen["train/bee/003.jpg"] == 3  # the scan twice, the epoch once
    assert (tmp_path / "run/last.safetensors").read_bytes() == (
        tmp_path / "whole/last.safetensors"
    ).read_bytes()
