"""A scan is kept beside a run: a restart decodes only the files that have changed, and
finds the same as a scan of everything."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import stages
from support.small import CLASSES, CPU, changed
from support.stages import train

from cache.format.manifest import UNUSABLE, Images
from pipeline.images import scan as scan_module
from pipeline.images.patience import DataError
from pipeline.images.scan import _read_any
from pipeline.images.scan_cache import Scanned


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

    def noted(folder: Path, path: str, size: int) -> bytes | str:
        seen.append(path)
        return whole(folder, path, size)

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
    (tmp_path / "ant").mkdir()
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
