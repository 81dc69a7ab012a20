"""The same images are the same data set as class folders, tar files, parquet files and
lists; what --data is, is found out, and what is wrong with it is said in a line."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import random
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.command import SMOKE, run
from support.containers import (
    FORMS,
    PLAIN,
    SAME_NAMES,
    as_one_tar,
    as_plain_shards,
    as_shards,
    images_of,
    parquet,
    write_tar,
)
from support.small import CLASSES, CPU, changed, tree, write_photos
from support.stages import generate, recheck, train

from cache import LabelStore
from cache.format.manifest import UNUSABLE, Images
from pipeline.images.data_set import DataSet
from pipeline.images.patience import DataError
from pipeline.images.reader import Reader
from pipeline.images.scan import scan
from pipeline.images.sources import containers, kept, opening, tar_headers, tars
from pipeline.images.sources.class_folders import ClassFolders
from pipeline.images.sources.open_files import OpenFiles
from pipeline.render.settings import RenderSettings


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """train/ of three classes, eight photographs each."""
    write_photos(tmp_path / "data" / "train", 8)
    return tmp_path / "data" / "train"


@pytest.fixture
def small(recipe):
    """A recipe of one view."""
    return changed(recipe, crops={"views": 1})


def scanned(data: Path | str, split: str = "train", classes: list[str] | None = None) -> Images:
    return scan(DataSet.find(data, split, classes), RenderSettings(threads=2), order_seed=0)


def weights(run_folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(run_folder / "last.safetensors")


# ---- the same images


@pytest.mark.parametrize("form", SAME_NAMES)
def test_the_same_images_are_the_same_data_set_in_every_form(folder, tmp_path, form):
    whole = scanned(folder)
    found = scanned(FORMS[form](folder, tmp_path / "form"))
    assert len(whole.usable) == 24
    assert found.manifest_digest() == whole.manifest_digest() and found.order == whole.order


@pytest.mark.parametrize("form", [*FORMS, "no classes"])
def test_a_store_of_a_folder_is_trained_from_every_form(folder, tmp_path, small, form):
    short = changed(small, train={"epochs": 1})
    store = generate(small, folder, tmp_path / "s.zarr", device=CPU)
    train(short, folder, tmp_path / "run", store=store.path, device=CPU)
    other = FORMS.get(form, as_plain_shards)(folder, tmp_path / "form")
    if form != "list":
        folder.parent.rename(tmp_path / "gone")
    train(short, other, tmp_path / "other", store=store.path, device=CPU)
    first, second = weights(tmp_path / "run"), weights(tmp_path / "other")
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("form", ["shards", "snappy", "one tar"])
def test_a_store_is_the_same_whatever_its_images_came_from(folder, tmp_path, small, form):
    store = generate(small, folder, tmp_path / "a.zarr", device=CPU)
    data = FORMS[form](folder, tmp_path / "form")
    other = generate(small, data, tmp_path / "b.zarr", device=CPU)
    first, second = tree(store.path), tree(other.path)
    # The description says where the images lay, and that is all.
    said = [json.loads(files.pop("zarr.json"))["attributes"] for files in (first, second)]
    told = [about["made_with"].pop("images") for about in said]
    assert told[0] == "class folders" != told[1]
    assert all(about["seal"].pop("zarr.json") for about in said)
    assert first == second and said[0] == said[1]
    _, out, _ = run("inspect", other.path)
    assert f"from {DataSet.find(data, 'train').source.describe()}" in out
    assert recheck(other.path, folder, [], None)["trusted"]


def test_a_store_of_shards_is_trained_from_class_folders_of_other_names(folder, tmp_path, small):
    """Images without classes, under other names: only their contents tell them."""
    shards = as_plain_shards(folder, tmp_path / "shards")
    store = generate(small, shards, tmp_path / "s.zarr", device=CPU)
    assert set(store.images.class_index) == {-1}
    short = changed(small, train={"epochs": 1})
    train(short, shards, tmp_path / "run", store=store.path, device=CPU)
    train(short, folder, tmp_path / "other", store=store.path, device=CPU)
    first, second = weights(tmp_path / "run"), weights(tmp_path / "other")
    assert all(np.array_equal(first[name], second[name]) for name in first)
    victim = next(folder.glob("bee/*.jpg"))
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    with pytest.raises(Exception, match="pass the images that the store was made from"):
        train(short, folder, tmp_path / "third", store=store.path, device=CPU)


def test_what_was_found_by_contents_is_not_read_again(folder, tmp_path, small, monkeypatch):
    store = generate(small, folder, tmp_path / "s.zarr", device=CPU)
    shards = as_plain_shards(folder, tmp_path / "shards")
    assert recheck(store.path, shards, [], None)["trusted"]
    monkeypatch.setattr("pipeline.images.matching._digests", None)
    assert recheck(store.path, shards, [], None)["trusted"]


def test_classes_of_other_names_stop_no_distillation(folder, tmp_path, small, capsys):
    """Hugging Face's ImageNet names its classes in words, class folders by WordNet."""
    store = generate(small, folder, tmp_path / "s.zarr", device=CPU)
    other = tmp_path / "other" / "train"
    shutil.copytree(folder, other)
    for name in CLASSES:
        (other / name).rename(other / f"{name}, in words")
    form = parquet(**PLAIN)(other, tmp_path / "p")
    for file in sorted((form / "data").iterdir()):
        shutil.copy(file, form / "data" / file.name.replace("train", "validation"))
    short = changed(small, train={"epochs": 1})
    train(short, folder, tmp_path / "run", store=store.path, device=CPU)
    capsys.readouterr()
    figures = train(short, form, tmp_path / "other-run", store=store.path, device=CPU)
    said = capsys.readouterr().err
    assert "val_top1" not in figures and "have other names than those that the student" in said
    assert "they are known by their contents" in said
    first, second = weights(tmp_path / "run"), weights(tmp_path / "other-run")
    assert all(np.array_equal(first[name], second[name]) for name in first)
    with pytest.raises(DataError, match="of no known class"):
        train(
            short,
            form,
            tmp_path / "third",
            store=store.path,
            validation=other,
            device=CPU,
        )


# ---- every command


def test_every_command_takes_tar_files(folder, tmp_path, small):
    write_photos(tmp_path / "data" / "val", 2, seed=1)
    shards = as_shards(folder, tmp_path / "shards")
    val = as_shards(tmp_path / "data" / "val", tmp_path / "val")
    for file in val.iterdir():
        file.rename(shards / file.name.replace("train", "val"))
    store = generate(small, shards, tmp_path / "s.zarr", device=CPU)
    figures = train(
        changed(small, train={"epochs": 1}),
        shards,
        tmp_path / "run",
        store=store.path,
        device=CPU,
    )
    assert 0 <= figures["val_top1"] <= 100
    model = f"test_vit={tmp_path / 'run' / 'last.safetensors'}"
    for data in (shards, tmp_path / "data"):
        status, out, _ = run("eval", "--data", data, "--model", model, "--json")
        assert status == 0
        assert json.loads(out)["models"][0]["top1"] == pytest.approx(figures["val_top1"])
    report = tmp_path / "report.html"
    status, _, err = run("inspect", store.path, "--report", report, "--data", shards)
    assert status == 0, err
    assert report.read_text().count("data:image/") > 10
    wanted = ("--config", SMOKE, "--plan", "--data", shards, "--teacher", model)
    status, out, err = run("generate-labels", *wanted)
    assert status == 0 and "24 images" in err + out, err


# ---- what --data is


def test_patterns_lists_and_splits_name_tar_files(folder, tmp_path):
    shards = as_shards(folder, tmp_path / "s")
    whole = scanned(shards).order
    names = sorted(file.name for file in shards.iterdir())
    (shards / "all.txt").write_text("\n".join(names))
    for data in (
        f"{shards}/photos-train-{{000000..000002}}.tar",
        f"{shards}/*.tar",
        shards / "all.txt",
    ):
        assert scanned(data).order == whole
    shutil.copy(shards / names[0], shards / "photos-val-000000.tar")
    assert scanned(shards).order == whole and len(scanned(shards, "val")) == 8
    for data, says in (
        (f"{shards}/photos-train-{{000000..000003}}.tar", "no file .*000003.tar, of 4 that"),
        (f"{shards}/nothing-{{0..1}}.tgz", "name tar files alone"),
        (tmp_path / "nowhere", "there is no folder .*nowhere; --data must name"),
        (tmp_path / "nowhere.tar", "there is no file .*nowhere.tar; --data must name"),
    ):
        with pytest.raises(DataError, match=says):
            DataSet.find(data, "train")
    (shards / "photos-train-9.parquet").write_text("of another kind")
    with pytest.raises(DataError, match="name tar files alone, or parquet files alone"):
        DataSet.find(shards, "train")
    (shards / "photos-train-9.parquet").unlink()
    with pytest.raises(DataError, match="has train and val but no test"):
        DataSet.find(shards, "test")


def test_class_folders_are_what_they_were_whatever_lies_beside_them(folder, tmp_path, capsys):
    """People leave the archives that they unpacked, and lists of their own."""
    whole = scanned(folder).manifest_digest()
    as_one_tar(folder, tmp_path)
    for place in (folder, folder.parent):
        for name in ("ant.tar", "train.tar", "x-val-0.tar", "data.parquet"):
            shutil.copy(tmp_path / "photos.tar", place / name)
        for name in ("train.txt", "val.csv", "labels.txt"):
            (place / name).write_text("no list of images\nat all")
    DataSet.find(folder, "train")
    assert f"{folder}/train.txt is not used" in capsys.readouterr().err
    for data in (folder, folder.parent):
        assert isinstance(DataSet.find(data, "train").source, ClassFolders)
        assert scanned(data).manifest_digest() == whole


def test_results_beside_a_flat_split_are_no_classes(folder, tmp_path, small):
    flat = tmp_path / "flat"
    (flat / "train").mkdir(parents=True)
    for i, file in enumerate(images_of(folder)):
        shutil.copy(file, flat / "train" / f"{i}.jpg")
    store = generate(small, flat, flat / "labels.zarr", device=CPU)
    short = changed(small, train={"epochs": 1})
    train(short, flat, flat / "run", store=store.path, device=CPU)
    train(short, flat, flat / "run", store=store.path, device=CPU)  # and once more
    assert scanned(flat).order == store.images.order


@pytest.mark.parametrize(
    ("names", "shards"),
    [
        (("00000", "00001"), True),
        (("00000", "00007"), True),
        (("x-train-3", "x-train-9"), True),
        (("n01440764", "n01443537"), False),
        (("ant", "bee"), False),
        (("class1", "class2"), True),
        (("d_0_000", "d_0_001", "d_1_000", "d_1_001"), True),
    ],
)
def test_tar_files_are_classes_unless_their_names_are_numbers(names, shards):
    assert tars.numbered(names) is shards


def test_braces_are_expanded_as_a_shell_does():
    assert opening.braces("a-{08..11}.{tar,x}")[:3] == ["a-08.tar", "a-08.x", "a-09.tar"]
    assert opening.braces("{0..10}")[-1] == "10" and opening.braces("{a}") == ["{a}"]


def test_a_tar_file_of_several_splits_gives_the_split(folder, tmp_path):
    write_photos(tmp_path / "data" / "val", 2, seed=1)
    with tarfile.open(tmp_path / "all.tar", "w") as out:
        out.add(tmp_path / "data", "photos")
    whole = scanned(folder)
    assert scanned(tmp_path / "all.tar").manifest_digest() == whole.manifest_digest()
    assert len(scanned(tmp_path / "all.tar", "val")) == 6
    with pytest.raises(DataError, match="holds the folders train, val; name one"):
        scanned(tmp_path / "all.tar", "test")


def test_classes_told_by_number_are_places_among_known_classes(folder, tmp_path):
    members = []
    for file in images_of(folder):
        key = f"{file.parent.name}{file.stem}"
        number = str(CLASSES.index(file.parent.name)).encode()
        members += [(f"{key}.jpg", file.read_bytes()), (f"{key}.cls", number)]
    tar = write_tar(tmp_path / "t.tar", members)
    data = DataSet.find(tar, "train")
    assert data.class_names == ["0", "1", "2"]
    known = DataSet.find(tar, "train", list(CLASSES)).list()
    for name, index in zip(known.name, known.class_index, strict=True):
        assert name.startswith(CLASSES[index])
    with pytest.raises(DataError, match="class numbers up to 2, where 2 classes are known"):
        DataSet.find(tar, "train", ["ant", "bee"]).list()


# ---- tar files that are not as they should be


def wrong(tmp_path: Path, content: bytes, name: str = "a.tar") -> str:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as refused:
        scanned(tmp_path / name)
    assert "\n" not in str(refused.value) and str(tmp_path / name) in str(refused.value)
    return str(refused.value)


def test_broken_tar_files_are_refused_in_a_line(folder, tmp_path):
    import gzip

    good = as_one_tar(folder, tmp_path / "good").read_bytes()
    assert "is empty" in wrong(tmp_path, b"")
    assert "is no tar file" in wrong(tmp_path, b"no tar file at all" * 100)
    assert "is no tar file" in wrong(tmp_path, b"hello")
    assert "unpack it with gunzip" in wrong(tmp_path, gzip.compress(good))
    assert "unpack it into a folder" in wrong(tmp_path, gzip.compress(good), "a.tar.gz")
    end = len(good.rstrip(b"\0"))
    assert "is cut off in" in wrong(tmp_path, good[: end - 2000])
    assert "is cut off in the header" in wrong(tmp_path, good[:700])
    damaged = bytearray(good)
    second = good.index(b"train/", 512)
    damaged[second + 130] ^= 7
    assert "there is no header at byte" in wrong(tmp_path, bytes(damaged))
    boundary = -(-end // 512) * 512
    message = wrong(tmp_path, good[:boundary])
    assert "the blocks of zeros that end a tar file are missing" in message
    (tmp_path / "a.tar").write_bytes(good[:boundary] + bytes(1024))  # as the message says
    assert len(scanned(tmp_path / "a.tar")) == 24


def test_members_that_are_no_files_are_left_out_with_the_reason(folder, tmp_path):
    image = next(folder.glob("ant/*.jpg")).read_bytes()
    with tarfile.open(tmp_path / "t.tar", "w") as out:
        for name in ("ant/1.jpg", "bee/2.jpg", "../../etc/3.jpg", "/root/4.jpg", "bee/notes.txt"):
            info = tarfile.TarInfo(name)
            info.size = len(image)
            out.addfile(info, io.BytesIO(image))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"bee/odd{kind.decode()}.jpg")
            info.type, info.linkname = kind, "ant/1.jpg"
            out.addfile(info)
        hidden = tarfile.TarInfo("ant/._1.jpg")
        hidden.size = 3
        out.addfile(hidden, io.BytesIO(b"mac"))
    before = sorted(tmp_path.iterdir())
    found = scanned(tmp_path / "t.tar")
    reasons = dict(zip(found.path, found.reason, strict=True))
    assert sorted(found.path[found.usable]) == ["ant/1.jpg", "bee/2.jpg"]
    assert reasons["bee/odd1.jpg"] == "a link to ant/1.jpg, in a tar file"
    assert reasons["bee/odd2.jpg"].startswith("a link") and "regular" in reasons["bee/odd6.jpg"]
    assert sum("its name leads out of the data set" in why for why in reasons.values()) == 2
    assert all("._" not in path and "notes" not in path for path in found.path)
    assert sorted(tmp_path.iterdir()) == before


def test_a_file_with_holes_is_left_out(folder, tmp_path):
    import subprocess

    (tmp_path / "t" / "ant").mkdir(parents=True)
    shutil.copy(next(folder.glob("ant/*.jpg")), tmp_path / "t" / "ant" / "1.jpg")
    with open(tmp_path / "t" / "ant" / "holes.jpg", "wb") as file:
        file.write(b"x" * 5000)
        file.seek(5_000_000)
        file.write(b"y" * 5000)
    (tmp_path / "t" / "bee").mkdir()
    shutil.copy(next(folder.glob("bee/*.jpg")), tmp_path / "t" / "bee" / "2.jpg")
    for form in ("gnu", "posix"):
        tar = tmp_path / f"{form}.tar"
        made = subprocess.run(
            ["tar", f"--format={form}", "-S", "-cf", tar, "-C", tmp_path / "t", "."], check=False
        )
        assert made.returncode == 0
        found = scanned(tar)
        assert sorted(found.path[found.usable]) == ["ant/1.jpg", "bee/2.jpg"]
        reasons = dict(zip(found.path, found.reason, strict=True))
        assert "holes" in reasons["ant/holes.jpg"]


def test_names_that_several_tar_files_use_get_the_files_names(folder, tmp_path):
    files = images_of(folder)
    for i in range(2):
        members = [(f"{j}.jpg", files[2 * i + j].read_bytes()) for j in range(2)]
        write_tar(tmp_path / "t" / f"s-{i}.tar", [*members, (f"only{i}.jpg", b"x")])
    found = scanned(tmp_path / "t")
    names = {"only0.jpg", "only1.jpg", "s-0/0.jpg", "s-0/1.jpg", "s-1/0.jpg", "s-1/1.jpg"}
    assert set(found.path) == names and len(found.usable) == 4


def test_a_name_twice_in_a_tar_file_is_left_out_and_said(folder, tmp_path, capsys):
    files = images_of(folder)
    members = [
        ("a.jpg", files[0].read_bytes()),
        ("b.jpg", files[1].read_bytes()),
        ("a.jpg", files[2].read_bytes()),
    ]
    found = scanned(write_tar(tmp_path / "t.tar", members))
    assert sorted(found.path) == ["a.jpg", "b.jpg"]
    assert "left out 1 image whose name another image of the same file has" in (
        capsys.readouterr().err
    )
    row = found.path.tolist().index("a.jpg")
    assert found.bytes[row] == files[0].stat().st_size


def test_a_tar_file_that_changed_since_the_manifest_is_refused(folder, tmp_path, small):
    shards = as_shards(folder, tmp_path / "s")
    data = DataSet.find(shards, "train")
    found = scan(data, RenderSettings(threads=2), order_seed=0)
    victim = sorted(shards.iterdir())[1]
    content = bytearray(victim.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 500] ^= 1
    victim.write_bytes(content)
    with (
        Reader(data, found) as read,
        pytest.raises(DataError, match=f"{victim} .*has changed since the manifest"),
    ):
        read(found.usable)
    victim.write_bytes(content[: len(content) // 2])
    with Reader(data, found) as read, pytest.raises(DataError, match=f"{victim} can't be read"):
        read(found.usable)


@pytest.mark.parametrize(
    ("names", "asked", "taken", "says"),
    [
        (["train-000", "test-000", "extra-000"], "train", ["train-000"], "left out extra-000.tar"),
        (["train-000", "test-000", "extra-000"], "test", ["test-000"], "left out extra-000.tar"),
        (["train-000", "test-000", "extra-000"], "extra", ["extra-000"], ""),
        (["train-000", "x-train-001"], "train", ["train-000", "x-train-001"], ""),
    ],
)
def test_files_of_other_splits_are_never_taken(folder, tmp_path, capsys, names, asked, taken, says):
    """Like SVHN's train, test and extra."""
    files = images_of(folder)
    for i, name in enumerate(names):
        write_tar(tmp_path / "t" / f"{name}.tar", [(f"{name}.jpg", files[i].read_bytes())])
    wanted = {f"{name}.jpg" for name in taken}
    for data in (tmp_path / "t", f"{tmp_path}/t/*.tar"):
        assert set(scanned(data, asked).path) == wanted
        assert says in capsys.readouterr().err
    if len(names) == 3:
        for data in (tmp_path / "t", f"{tmp_path}/t/*.tar"):
            with pytest.raises(DataError, match="has (test and )?train but no val"):
                DataSet.find(data, "val")


def test_a_class_named_like_a_split_is_no_split(folder, tmp_path):
    files = images_of(folder)
    for i, name in enumerate(("bullet_train", "steam", "car")):
        write_tar(tmp_path / "t" / f"{name}.tar", [("a.jpg", files[i].read_bytes())])
    assert DataSet.find(tmp_path / "t", "train").class_names == ["bullet_train", "car", "steam"]
    members = [(f"{c}/1.jpg", files[i].read_bytes()) for i, c in enumerate(("train", "bus", "car"))]
    tar = write_tar(tmp_path / "c.tar", members)
    assert DataSet.find(tar, "train").class_names == ["bus", "car", "train"]


def test_splits_in_a_tar_file_are_kept_apart_whatever_lies_beside_them(folder, tmp_path, capsys):
    files = images_of(folder)
    places = ("im/sample.jpg", "im/train/cat/a.jpg", "im/train/dog/b.jpg", "im/val/cat/c.jpg")
    members = [(name, files[i].read_bytes()) for i, name in enumerate(places)]
    tar = write_tar(tmp_path / "t.tar", members)
    assert sorted(scanned(tar).path) == ["cat/a.jpg", "dog/b.jpg"]
    assert "left out 2 images that lie in no folder, val" in capsys.readouterr().err
    assert scanned(tar, "val").path.tolist() == ["cat/c.jpg"]
    beside = [("a/images/x.jpg", b"x"), ("a/masks/x.png", b"y")]
    with pytest.raises(DataError, match="named like splits or kinds of files, and tell no"):
        scanned(write_tar(tmp_path / "m.tar", beside))
    only = write_tar(tmp_path / "o.tar", [(f"train/{n[9:]}", b"x") for n in places[1:3]])
    with pytest.raises(DataError, match="holds the folders train; name one"):
        scanned(only, "val")


def test_a_val_inside_of_a_tar_file_or_list_is_validated_on(folder, tmp_path, small):
    write_photos(tmp_path / "data" / "val", 2, seed=1)
    with tarfile.open(tmp_path / "all.tar", "w") as out:
        out.add(tmp_path / "data", "photos")
    hard = changed(small, train={"labels": "hard", "epochs": 1})
    first = train(hard, tmp_path / "data", tmp_path / "run", device=CPU)
    second = train(hard, tmp_path / "all.tar", tmp_path / "other", device=CPU)
    assert first["val_top1"] == second["val_top1"] and first["val_loss"] == second["val_loss"]
    lines = ["path,labels,split"]
    for split in ("train", "val"):
        for file in sorted((tmp_path / "data" / split).glob("*/*")):
            name = f"{split}/{file.parent.name}/{file.name}"
            lines.append(f"{name},{CLASSES.index(file.parent.name)}.0,{split}")
    (tmp_path / "data" / "all.csv").write_text("\n".join(lines))
    third = train(hard, tmp_path / "data" / "all.csv", tmp_path / "third", device=CPU)
    assert "val_top1" in third
    assert len(scanned(tmp_path / "data" / "all.csv", "val")) == 6
    with pytest.raises(DataError, match="has no line of the split test .train, val."):
        DataSet.find(tmp_path / "data" / "all.csv", "test")


def test_images_of_one_name_are_never_lost(folder, tmp_path):
    files = images_of(folder)
    for i, place in enumerate(("cc3m", "cc12m")):
        members = [(f"{j}.jpg", files[2 * i + j].read_bytes()) for j in range(2)]
        write_tar(tmp_path / place / "00000.tar", members)
    (tmp_path / "l.txt").write_text("cc3m/00000.tar\ncc12m/00000.tar\n")
    assert set(scanned(tmp_path / "l.txt").path) == {
        f"{place}/00000/{j}.jpg" for place in ("cc3m", "cc12m") for j in range(2)
    }
    members = []
    for i in range(4):
        about = json.dumps({"filename": f"{i % 2}.jpg", "label": i // 2}).encode()
        members += [(f"{i:04}.jpg", files[i].read_bytes()), (f"{i:04}.json", about)]
    found = scanned(write_tar(tmp_path / "f.tar", members))
    assert len(found.usable) == 4
    told = dict(zip(found.path, found.class_index, strict=True))
    assert told == {"0000.jpg": 0, "0001.jpg": 0, "0002.jpg": 1, "0003.jpg": 1}


@pytest.mark.parametrize(
    ("about", "number", "name"),
    [
        ({"label": 10**20}, -1, str(10**20)),
        ({"label": 3.0}, 3, ""),
        ({"label": "2"}, 2, ""),
        ({"label": -1}, -1, ""),
        ({"label": [1, 2]}, -1, ""),
        ({"label": None}, -1, ""),
        ({"label": "AC/DC"}, -1, "AC%2FDC"),
        ({"filename": "\ud83d.jpg", "label": 0}, 0, ""),
    ],
)
def test_odd_labels_are_read_or_tell_no_class(folder, tmp_path, about, number, name):
    image = images_of(folder)[0].read_bytes()
    tar = write_tar(tmp_path / "t.tar", [("a.jpg", image), ("a.json", json.dumps(about).encode())])
    data = DataSet.find(tar, "train")
    names = [str(i) for i in range(number + 1)] if number >= 0 else [name] if name else []
    assert data.class_names == names
    assert len(scanned(tar).usable) == 1


def test_metadata_that_cant_be_read_tells_nothing(folder, tmp_path):
    image = images_of(folder)[0].read_bytes()
    for content in (b"[" * 100_000, b"{", b"\xff\xfe", b"3"):
        tar = write_tar(tmp_path / "t.tar", [("a.jpg", image), ("a.json", content)])
        assert len(scanned(tar).usable) == 1


# ---- headers


def test_a_size_that_leads_back_is_refused(tmp_path):
    """int(text, 8) would take the sign."""
    info = tarfile.TarInfo("a.jpg")
    block = bytearray(info.tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = b"-0000001000\0"
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    assert "is damaged" in wrong(tmp_path, bytes(block) + bytes(2048))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_lie_where_tarfile_finds_them(tmp_path, form):
    draw = random.Random(form)
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w", format=form, pax_headers={"comment": "x"}) as out:
        for i in range(200):
            name = draw.choice(
                [f"a{i}", f"d{i}/x", "l" * 120 + f"/{i}", f"é{i}/ü", "p/" * 60 + "q"]
            )
            info = tarfile.TarInfo(f"{name}.jpg")
            content = os.urandom(draw.choice([0, 1, 511, 512, 513, 5000, 20000]))
            info.size, info.mtime = len(content), draw.choice([7, 123.456])
            info.type = draw.choice([tarfile.REGTYPE] * 8 + [tarfile.DIRTYPE, tarfile.SYMTYPE])
            if not info.isreg():
                info.size, info.linkname = 0, "x" * draw.choice([3, 150])
            try:
                out.addfile(info, io.BytesIO(content) if info.isreg() else None)
            except ValueError:  # ustar has no long names
                continue
    descriptor = os.open(path, os.O_RDONLY)
    part = tar_headers.Part(descriptor, 0, path.stat().st_size)
    ours = [
        (member.name, member.size, bool(member.fault), b"" if member.fault else content())
        for member, content in tar_headers.members(part)
    ]
    os.close(descriptor)
    with tarfile.open(path) as file:
        theirs = [
            (m.name, m.size, not m.isreg(), file.extractfile(m).read() if m.isreg() else b"")
            for m in file
            if not m.isdir()
        ]
    assert len(ours) > 100 and ours == theirs


def test_a_size_beyond_octal_digits_is_read(tmp_path):
    info = tarfile.TarInfo("big.jpg")
    info.size = 9 * 2**30  # GNU's notation for more than 8 GiB
    header = info.tobuf(tarfile.GNU_FORMAT)
    path = tmp_path / "t.tar"
    path.write_bytes(header)
    with open(path, "r+b") as file:
        file.truncate(len(header) + info.size + 1024)
    descriptor = os.open(path, os.O_RDONLY)
    part = tar_headers.Part(descriptor, 0, path.stat().st_size)
    assert [m.size for m, _ in tar_headers.members(part)] == [info.size]
    os.close(descriptor)


# ---- what is kept


def test_headers_are_read_once_and_again_when_a_file_changes(folder, tmp_path, monkeypatch):
    shards = as_shards(folder, tmp_path / "s")
    read = []
    whole = containers.Containers._read_headers
    monkeypatch.setattr(
        containers.Containers, "_read_headers", lambda self: read.append(1) or whole(self)
    )
    for _ in range(2):
        DataSet.find(shards, "train").list()
    assert len(read) == 1
    os.utime(sorted(shards.iterdir())[0], (1, 1))
    DataSet.find(shards, "train").list()
    assert len(read) == 2
    for file in (kept.cache_folder() / "Tars").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    DataSet.find(shards, "train").list()
    assert len(read) == 3


def test_a_cache_that_cant_be_written_stops_nothing(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(kept.VARIABLE, str(tmp_path / "file" / "cache"))
    assert len(DataSet.find(as_shards(folder, tmp_path / "s"), "train").list()) == 24
    assert "nothing can be kept" in capsys.readouterr().err


def test_a_full_disk_stops_no_reading_of_headers(folder, tmp_path, monkeypatch, capsys):
    """A quota of the home folder, on a cluster."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    shards = as_shards(folder, tmp_path / "s")
    monkeypatch.setattr("pipeline.images.sources.kept.claim", full)
    assert len(DataSet.find(shards, "train").list()) == 24
    assert "nothing can be kept" in capsys.readouterr().err
    packed = parquet(compression="zstd")(folder, tmp_path / "p")
    monkeypatch.setattr("pipeline.images.sources.parquet._write_images", full)
    with pytest.raises(DataError, match=r"can't be unpacked into .* OFFLINE_MEAL_CACHE"):
        DataSet.find(packed, "train")


def test_a_class_that_a_link_names_follows_the_link(folder, tmp_path):
    files = images_of(folder)
    (tmp_path / "l").mkdir()
    for i, name in enumerate(("cat", "dog")):
        write_tar(tmp_path / "s" / f"{i}.tar", [("x.jpg", files[i].read_bytes())])
        (tmp_path / "l" / f"{name}.tar").symlink_to(tmp_path / "s" / f"{i}.tar")
    assert DataSet.find(tmp_path / "l", "train").class_names == ["cat", "dog"]
    (tmp_path / "l" / "cat.tar").rename(tmp_path / "l" / "bird.tar")
    assert DataSet.find(tmp_path / "l", "train").class_names == ["bird", "dog"]


def test_more_files_than_may_be_open_are_read(tmp_path):
    files = OpenFiles(most=4)
    for i in range(20):
        (tmp_path / str(i)).write_bytes(b"ab%02d" % i)
    for _ in range(2):
        for i in range(20):
            assert files.read(tmp_path / str(i), 2, 2) == b"%02d" % i
    assert len(files.held) == 4


# ---- parquet


def test_nulls_and_rows_without_a_path_have_names_and_reasons(folder, tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    images = [file.read_bytes() for file in images_of(folder)[:9]]
    cells = [{"bytes": content, "path": None} for content in images]
    cells[3], cells[5] = None, {"bytes": None, "path": "x.jpg"}
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.table({"image": pa.array(cells, kind), "label": pa.array(["ant", "bee", None] * 3)})
    for i, how in enumerate((PLAIN, PLAIN | {"data_page_version": "2.0"}, {})):
        pq.write_table(table, tmp_path / f"p{i}.parquet", **how)
        found = scanned(tmp_path / f"p{i}.parquet")
        names = dict(zip(found.path, found.reason, strict=True))
        assert len(found.usable) == 7 and names[f"bee/p{i}-000001"] == ""
        assert names[f"ant/p{i}-000003"] == "the row holds no image"
        for row in found.usable:
            at = int(found.path[row][-6:])
            assert found.bytes[row] == len(images[at])
        assert (found.class_index == -1).sum() == 3


@pytest.mark.parametrize("how", [PLAIN, {}], ids=["plain", "packed"])
@pytest.mark.parametrize(
    ("kind", "labels"),
    [
        ("binary", ["int8", "float32", "bool_"]),
        ("large_binary", ["int64"]),
        ("binary_view", ["int32"]),
    ],
)
def test_columns_of_any_type_that_holds_bytes_and_labels_are_read(
    folder, tmp_path, how, kind, labels
):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    images = [file.read_bytes() for file in images_of(folder)[:6]]
    for label in labels:
        told = [i % 2 for i in range(6)]
        cells = [bool(i) for i in told] if label == "bool_" else told
        columns = {
            "img": pa.array(images, getattr(pa, kind)()),
            "cls": pa.array(cells, getattr(pa, label)()),
        }
        pq.write_table(pa.table(columns), tmp_path / "p.parquet", row_group_size=4, **how)
        found = scanned(tmp_path / "p.parquet")
        assert len(found.usable) == 6
        for path, index, size in zip(found.path, found.class_index, found.bytes, strict=True):
            row = int(path[-6:])
            assert (index, size) == (told[row], len(images[row]))


@pytest.mark.parametrize(
    ("labels", "told", "indices"),
    [
        ([[1, 2], [], [3]], [], [-1, -1, -1]),
        ([{"a": 1}] * 3, [], [-1, -1, -1]),
        (["10", "2", "1"], [str(i) for i in range(11)], [10, 2, 1]),
        ([b"ant", b"bee", b"ant"], ["ant", "bee"], [0, 1, 0]),
        (["a/b", "a_b", None], ["a%2Fb", "a_b"], [0, 1, -1]),
    ],
)
def test_labels_of_any_kind_are_read_or_tell_no_class(folder, tmp_path, labels, told, indices):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    images = [file.read_bytes() for file in images_of(folder)[:3]]
    paths = [b"../x\0.jpg", b"b.jpg", b"b.jpg"]  # bytes, as some writers have them
    cells = [{"bytes": image, "path": path} for image, path in zip(images, paths, strict=True)]
    pq.write_table(pa.table({"image": cells, "label": labels}), tmp_path / "p.parquet")
    assert DataSet.find(tmp_path / "p.parquet", "train").class_names == told
    found = scanned(tmp_path / "p.parquet")
    row_of = {int(n): row for row, n in enumerate(map(images_index(images), found.digest))}
    assert [found.class_index[row_of[i]] for i in (1, 2)] == indices[1:]
    (refused,) = (row for row in range(3) if row not in row_of.values() or row_of.get(-1) == row)
    assert "leads out of the data set" in found.reason[refused]


def images_index(images: list[bytes]) -> Callable[[np.ndarray], int]:
    """Return a function that finds an image by its digest; -1 for none."""
    digests = [hashlib.sha256(image).digest() for image in images]
    return lambda digest: digests.index(d) if (d := digest.tobytes()) in digests else -1


def test_compressed_images_are_unpacked_once_and_that_is_said(folder, tmp_path, capsys):
    data = parquet(compression="zstd")(folder, tmp_path / "p")
    scanned(data)
    said = capsys.readouterr().err
    assert "the images of 2 of 2 parquet files" in said and "are unpacked once into" in said
    unpacked = sorted((kept.cache_folder() / "unpacked").glob("*.images"))
    before = [file.stat().st_mtime_ns for file in unpacked]
    scanned(data)
    assert "unpacked once" not in capsys.readouterr().err
    assert [file.stat().st_mtime_ns for file in unpacked] == before
    whole = scanned(data).manifest_digest()
    for file in unpacked:
        file.unlink()
    assert scanned(data).manifest_digest() == whole  # a cache may be cleared


def test_parquet_files_that_hold_no_images_are_refused_in_a_line(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no column of images .text, label."):
        scanned(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="can't be read as a parquet file"):
        scanned(tmp_path / "b.parquet")


# ---- lists, and folders without classes


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("l.csv", "ant/000.jpg,ant\nant/gone.jpg,ant\n", "1 file that is not there, .* line 2"),
        (
            "l.csv",
            "ant/000.jpg,ant\nant/000.jpg,bee\n",
            "names ant/000.jpg twice, in lines 1 and 2",
        ),
        ("l.csv", "../x.jpg,ant\n", "line 1 of .* leads out of the list's folder"),
        ("l.csv", "/etc/x.jpg,ant\n", "line 1 of .* leads out of the list's folder"),
        ("l.csv", "", "is empty"),
        ("l.csv", "photo,kind\nant/000.jpg,ant\n", "name the columns path and class"),
        ("l.csv", "path,class\n,ant\n", "line 2 of .* names no image"),
        ("l.csv", "path,class\n", "names no image"),
        ("l.txt", "ant/0\0.jpg ant\n", "line 1 of .* holds a NUL"),
        ("l.bin", "x", "is none of what --data can be"),
    ],
)
def test_lists_that_cant_be_followed_are_refused_in_a_line(folder, name, text, says):
    (folder / name).write_text(text)
    with pytest.raises(DataError, match=says) as refused:
        scanned(folder / name)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("l.csv", "{path},{name}"),
        ("l.tsv", "{path}\t{name}"),
        ("l.txt", "{path} {name}"),
        ("l.lst", "{path}\t{name}"),
        ("l.csv", "{absolute},{name}"),
    ],
)
def test_lists_are_read_as_people_write_them(folder, name, line):
    whole = scanned(folder)
    lines = [
        line.format(path=f"{f.parent.name}/{f.name}", absolute=f, name=f.parent.name)
        for f in images_of(folder)
    ]
    (folder / name).write_text("\n".join(lines) + "\n")
    assert scanned(folder / name).manifest_digest() == whole.manifest_digest()
    numbered = [
        line.format(path=f"{f.parent.name}/{f.name}", absolute=f, name=CLASSES.index(f.parent.name))
        for f in images_of(folder)
    ]
    (folder / name).write_text("\n".join(numbered))
    found = scanned(folder / name, classes=list(CLASSES))
    assert found.manifest_digest() == whole.manifest_digest()


def test_a_flat_val_with_a_list_beside_it_is_validated_on(folder, tmp_path, small):
    """ILSVRC's val/ and val.txt."""
    (tmp_path / "data" / "val").mkdir()
    lines = []
    for i, file in enumerate(images_of(folder)[:6]):
        shutil.copy(file, tmp_path / "data" / "val" / f"val_{i}.jpg")
        lines.append(f"val_{i}.jpg {CLASSES.index(file.parent.name)}")
    (tmp_path / "data" / "val.txt").write_text("\n".join(lines))
    hard = changed(small, train={"labels": "hard", "epochs": 1})
    assert "val_top1" in train(hard, tmp_path / "data", tmp_path / "run", device=CPU)


def test_images_without_classes_are_labelled_and_distilled(folder, tmp_path, small, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(images_of(folder)):
        shutil.copy(file, flat / f"{i}.jpg")
    store = generate(small, flat, tmp_path / "s.zarr", device=CPU)
    assert "in no class folder, so nothing tells classes" in capsys.readouterr().err
    assert set(store.images.class_index) == {-1} and len(store.images) == 24
    short = changed(small, train={"epochs": 1})
    assert train(short, flat, tmp_path / "run", store=store.path, device=CPU)["loss"] > 0
    status, out, _ = run("inspect", store.path, "--json")
    assert status == 0 and json.loads(out)["agreement"] is None
    for section in ({"labels": "hard"}, {"hard_weight": 0.5}):
        with pytest.raises(Exception, match="nothing tells the class") as refused:
            train(
                changed(short, train=section), flat, tmp_path / "hard", store=store.path, device=CPU
            )
        assert "\n" not in str(refused.value)
    with pytest.raises(DataError, match="hard labels are classes"):
        train(changed(short, train={"labels": "hard"}), flat, tmp_path / "hard", device=CPU)
    assert LabelStore.open(store.path).images.status.max() < UNUSABLE
