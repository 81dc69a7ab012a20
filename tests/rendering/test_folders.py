"""Folders as people have them: splits of other names, nested folders, what systems
leave, names in other spellings, results put among the images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from safetensors import safe_open
from support.command import SMOKE, run
from support.paths import ROOT
from support.small import CLASSES, CPU, changed, tree, write_photos, write_teacher
from support.stages import class_folders, generate, recheck, train

from cache import LabelStore
from pipeline.images.class_names import map_classes, read_class_map
from pipeline.images.data_set import DataSet
from pipeline.images.matching import require_same_files
from pipeline.images.patience import DataError
from pipeline.images.result_places import (
    require_elsewhere,
    require_no_split,
    require_outside,
    require_outside_folders,
)
from pipeline.images.scan_cache import Scanned
from pipeline.images.sources import folder_checks, folder_names
from pipeline.runtime import wording


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """train/ and val/ of three classes, a few photographs each."""
    write_photos(tmp_path / "data" / "train", 4)
    write_photos(tmp_path / "data" / "val", 2, seed=1)
    return tmp_path / "data"


def moved(data: Path, **places: str) -> Path:
    """Move folders within the data set."""
    for old, new in places.items():
        (data / new).parent.mkdir(parents=True, exist_ok=True)
        (data / old).rename(data / new)
    return data


HARD = ("--set", "train.labels=hard", "--set", "train.epochs=1", "--student", "test_resnet")


def hard(data: Path, out: Path, *options: object) -> tuple[int, str]:
    status, _, err = run(
        *("train-student", "--config", SMOKE, "--data", data, "--out", out, *HARD),
        *("--set", "student.pretrained=false", *options),
    )
    return status, err


# ---- folders that are no classes


@pytest.mark.parametrize(
    ("places", "says"),
    [
        ({"train": "training", "val": "validation"}, "pass --data {d}/training (to validate"),
        ({"train": "Train", "val": "Val"}, "pass --data {d}/Train (to validate, --val-data {d}/Va"),
        ({"train": "train_images", "val": "test_images"}, "pass --data {d}/train_images"),
        ({"train": "ILSVRC/Data/CLS-LOC/train", "val": "ILSVRC/Data/CLS-LOC/val"}, "CLS-LOC"),
        ({"train": "photos/2024", "val": "photos/2025"}, "list the classes' names"),
        ({"train": "deep/deeper/classes", "val": ".hidden"}, "pass --data {d}/deep/deeper/classes"),
    ],
)
def test_folders_of_folders_are_no_classes(small, tmp_path, places, says):
    data = moved(small, **places)
    status, err = hard(data, tmp_path / "run")
    assert status == 1 and "no images" in err and "no class" in err, err
    assert says.format(d=data) in err and err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def test_what_the_refusal_says_works(small, tmp_path):
    data = moved(small, train="training", val="validation")
    _, err = hard(data, tmp_path / "run")
    line = err.partition("pass ")[2].rstrip(")\n").split()
    assert line[0] == "--data" and line[-2] == "--val-data"
    status, err = hard(Path(line[1]), tmp_path / "run", *line[-2:])
    assert status == 0 and "top-1" in err


def test_one_folder_of_images_inside_each_class_is_no_obstacle(tmp_path):
    """Tiny ImageNet is laid out so: CLASS/images/*.JPEG, and a text file beside."""
    for name in CLASSES:
        (tmp_path / name / "images").mkdir(parents=True)
        (tmp_path / name / "images" / "1.JPEG").write_bytes(b"x")
        (tmp_path / name / f"{name}_boxes.txt").write_text("1 2 3 4")
    DataSet.find(tmp_path, "train").require_sound()
    (tmp_path / "ant" / "more").mkdir()
    with pytest.raises(DataError, match=r"has 1 folder that holds folders and no images \(ant\)"):
        DataSet.find(tmp_path, "train").require_sound()


def test_a_split_of_one_class_beside_a_class_is_no_class(tmp_path):
    for place in ("training/ant", "bee"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.jpg").write_bytes(b"x")
    with pytest.raises(DataError, match=r"has 1 folder that holds folders .* \(training\)"):
        DataSet.find(tmp_path, "train").require_sound()


def test_folders_of_folders_that_a_class_map_names_are_classes(small, tmp_path):
    data = moved(small, train="animals/wild", val="animals/tame")
    (tmp_path / "map.txt").write_text("animals\nplants\n")
    assert hard(data, tmp_path / "run")[0] == 1
    status, err = hard(data, tmp_path / "run", "--class-map", tmp_path / "map.txt")
    assert status == 0, err


@pytest.mark.parametrize(
    "name", ["__MACOSX", "@eaDir", "lost+found", "System Volume Information", "$RECYCLE.BIN"]
)
def test_what_systems_leave_is_no_class_and_that_is_said(small, tmp_path, name):
    inside = small / "train" / "ant" / name / "001.jpg"
    for place in (small / "train" / name, inside):
        place.mkdir(parents=True)
        shutil.copy(small / "train" / "bee" / "000.jpg", place / "thumbnail.jpg")
    (small / "train" / "bee" / "Thumbs.db").write_bytes(b"x")
    data = DataSet.find(small, "train")
    assert list(data.class_names) == list(CLASSES)
    paths = data.list().name
    assert len(paths) == 12 and all(path.endswith(".jpg") for path in paths)
    status, err = hard(small, tmp_path / "run")
    assert status == 0 and f"left out {name}, which is hidden or made by a system" in err


def laid_out(folder: Path, *files: str) -> Path:
    """Make empty files: where they lie is all that counts."""
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


@pytest.mark.parametrize(
    ("files", "says"),
    [
        # Oxford Pets, whose README is no image
        (
            ("images/a_1.jpg", "annotations/README", "annotations/xmls/a.xml", "annotations/t/a.p"),
            "has 1 folder that holds folders and no images (annotations)",
        ),
        (("images/1.jpg", "masks/1.png"), "images, masks are named like splits or kinds"),
        (("images/1.jpg", "labels/1.txt"), "images is named like splits or kinds"),
        # Stanford Cars
        (
            ("cars_train/cars_train/1.jpg", "cars_test/cars_test/1.jpg", "devkit/devkit/a.mat"),
            "cars_test, cars_train are named like splits",
        ),
        (("train2017/1.jpg", "val2017/1.jpg", "annotations/a.json"), "train2017, val2017 are"),
        # Stanford Dogs, whose annotations have no suffix
        (
            ("Images/n1/1.jpg", "Images/n2/1.jpg", "Annotation/n1/n1_1", "Annotation/n2/n2_1"),
            "pass --data {d}/Images",
        ),
        (
            ("images/a/1.jpg", "images/b/1.jpg", "masks/a/1.png", "masks/b/1.png"),
            "pass --data {d}/images",
        ),
        # Tiny ImageNet within its own folder
        (
            ("tiny/train/n1/images/1.JPEG", "tiny/train/n2/images/1.JPEG", "tiny/val/images/1.jpg"),
            "pass --data {d}/tiny",
        ),
        # The Intel scenes
        (
            ("seg_train/seg_train/a/1.jpg", "seg_train/seg_train/b/1.jpg", "seg_test/t/a/1.jpg"),
            "pass --data {d}/seg_train/seg_train",
        ),
        (
            ("x/train/a/1.jpg", "x/train/b/1.jpg", "x/test/a/1.jpg", "x/__MACOSX/x/._a"),
            "pass --data {d}/x",
        ),
        (("only/1.jpg",), "has one class folder only (only)"),
    ],
)
def test_what_is_laid_out_otherwise_is_refused(tmp_path, files, says):
    data = laid_out(tmp_path / "d", *files)
    with pytest.raises(DataError) as error:
        DataSet.find(data, "train").require_sound()
    assert says.format(d=data) in str(error.value)


@pytest.mark.parametrize(
    "names",
    [
        ("bullet_train", "steam_train"),
        ("with_mask", "without_mask"),
        ("bus", "car", "train"),
        ("photo", "sketch"),
        ("test_tube", "bottle"),
        ("label", "box", "cup"),
    ],
)
def test_classes_may_have_such_names(tmp_path, names, capsys):
    data = laid_out(tmp_path / "d", *(f"{name}/{i}.jpg" for name in names for i in range(2)))
    DataSet.find(data, "train").require_sound()
    assert capsys.readouterr().err == ""


def test_what_may_be_a_mistake_is_said(tmp_path, capsys):
    data = laid_out(tmp_path / "d", "Cat/1.jpg", "cat/1.jpg", "cat/masks/1.png", ".git/x", "dog /1")
    find = DataSet.find(data, "train")
    find.require_sound()
    find.source.say_depth(find.list().name)
    said = capsys.readouterr().err
    assert "left out .git, which is hidden" in said and "'Cat' and 'cat' are two classes" in said
    assert "1 class with images in several folders, which all count (cat, cat/masks)" in said
    (tmp_path / "map.txt").write_text("Cat\ncat\ndog\n")
    with pytest.raises(DataError, match="of no known class \\('dog '\\)"):
        DataSet.find(data, "train", read_class_map(tmp_path / "map.txt")).list()


def test_a_class_folder_on_a_disk_that_is_gone_is_missed(small):
    (small / "train" / "dog").symlink_to("/nowhere/dog")
    with pytest.raises(DataError, match=r"train/dog is a link that leads nowhere"):
        DataSet.find(small, "train").require_sound()


def test_class_folders_are_looked_into_no_further_than_needed(tmp_path, monkeypatch):
    data = laid_out(tmp_path / "d", *(f"{c}/{i}.jpg" for c in "ab" for i in range(300)))
    looked = []
    monkeypatch.setattr(folder_checks, "is_named_image", lambda name: looked.append(name) or True)
    DataSet.find(data, "train").require_sound()
    assert len(looked) < 10


def test_names_that_a_model_knows_are_not_doubted(small):
    """A model of an older version may have been trained on folders of folders."""
    data = moved(small, train="animals/wild", val="animals/tame")
    (data / "plants").mkdir()
    find = DataSet.find(data, "train")
    with pytest.raises(DataError):
        find.require_sound()
    map_classes(find, ["animals", "plants"], "M", 2).require_sound()


def test_a_run_of_an_older_version_keeps_its_classes(small, tmp_path, recipe, monkeypatch):
    """Versions up to 0.8 took lost+found for a class, and folders of folders."""
    hard = changed(recipe, train={"labels": "hard", "epochs": 1})
    for split in ("train", "val"):
        (small / split / "lost+found").mkdir()
        for name in ("wild", "tame"):
            shutil.copytree(small / split / "ant", small / split / "deep" / name)
    with monkeypatch.context() as older:
        older.setattr(folder_names, "is_system_folder", lambda name: False)
        older.setattr(DataSet, "require_sound", lambda data: None)
        train(hard, small, tmp_path / "run", device=CPU)
    train(changed(hard, train={"epochs": 2}), small, tmp_path / "run", device=CPU)
    with safe_open(tmp_path / "run" / "last.safetensors", "pt") as file:
        assert "lost+found" in str(file.metadata())


def test_a_system_folder_that_a_store_knows_as_a_class_stays_one(small):
    (small / "train" / "lost+found").mkdir()
    shutil.copy(small / "train" / "ant" / "000.jpg", small / "train" / "lost+found" / "1.jpg")
    known = class_folders(small / "train", [*CLASSES, "lost+found"])
    assert "lost+found/1.jpg" in known.list().name


def test_files_that_systems_leave_later_are_not_missed_or_added(small, tmp_path, recipe):
    data = small / "train"
    (data / "ant" / "Thumbs.db").write_bytes(b"of an older version, which listed it")
    store = generate(recipe, data, tmp_path / "s.zarr", device=CPU)
    folder = class_folders(data, store.class_names)
    zone = "bee/001.jpg:Zone.Identifier"
    for name in ("bee/Thumbs.db", "bee/desktop.ini", "bee/@eaDir", zone):
        (data / name).mkdir() if "@" in name else (data / name).write_bytes(b"x")
    shutil.copy(data / "ant" / "000.jpg", data / "bee" / "@eaDir" / "1.jpg")
    (data / "ant" / "Thumbs.db").unlink()
    require_same_files(folder, store.images, "s.zarr")
    shutil.copy(data / "ant" / "000.jpg", data / "bee" / "new.jpg")
    with pytest.raises(DataError, match="1 of 12 images added, the first is bee/new.jpg"):
        require_same_files(folder, store.images, "s.zarr")


def test_a_run_that_listed_what_systems_left_goes_on(small, tmp_path, recipe, monkeypatch):
    """A run of a version up to 0.8 has these files in its manifest."""
    hard = changed(recipe, train={"labels": "hard", "epochs": 1})
    (small / "train" / "ant" / "Thumbs.db").write_bytes(b"x")
    with monkeypatch.context() as older:
        older.setattr("pipeline.images.sources.class_folders.is_system_path", lambda path: False)
        older.setattr("pipeline.images.scan_cache.LISTING", None)
        before = Scanned.note

        def note(self: Scanned, *given: object) -> None:
            before(self, *given)
            self._new.pop("listing", None)

        older.setattr(Scanned, "note", note)
        train(hard, small, tmp_path / "run", device=CPU)
    more = changed(hard, train={"epochs": 2})
    train(more, small, tmp_path / "run", device=CPU)
    train(more, small, tmp_path / "run", device=CPU)  # still the same list


def test_a_store_that_holds_what_systems_left_is_mended(small, tmp_path, recipe, monkeypatch):
    """A store of a version up to 0.8 has these files in its manifest."""
    (small / "train" / "ant" / "@eaDir").mkdir()
    for name in ("@eaDir/000.jpg", "Thumbs.db"):
        shutil.copy(small / "train" / "ant" / "000.jpg", small / "train" / "ant" / name)
    with monkeypatch.context() as older:
        older.setattr("pipeline.images.sources.class_folders.is_system_path", lambda path: False)
        store = generate(recipe, small, tmp_path / "s.zarr", device=CPU)
    assert len(store.images) == 14
    before = tree(store.path)
    for damaged in ("zarr.json", "images/path/zarr.json"):
        content = (store.path / damaged).read_bytes()
        (store.path / damaged).write_bytes(content[:-9])
        generate(recipe, small, store.path, device=CPU)
        assert tree(store.path) == before


def test_the_order_of_numbered_folders_is_said(tmp_path, capsys):
    for name in ("1", "2", "10"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jpg").write_bytes(b"x")
    data = DataSet.find(tmp_path, "train")
    data.require_sound()
    assert list(data.class_names) == ["1", "10", "2"]
    assert "so class 1 is 10 and not 2; for another order pass a --class-map" in (
        capsys.readouterr().err
    )
    (tmp_path / "10").rename(tmp_path / "3")
    for name in ("-1", "cat", "cat 7", "cat5"):
        laid_out(tmp_path, f"{name}/a.jpg")
    DataSet.find(tmp_path, "train").require_sound()
    assert capsys.readouterr().err == ""


def test_a_val_without_images_is_named_for_what_it_is(small, tmp_path):
    shutil.rmtree(small / "val")
    laid_out(small, "val/.hidden/1.jpg", "val/@eaDir/1.jpg", "val/notes.txt")
    status, err = hard(small, tmp_path / "run")
    assert status == 0 and f"no validation: {small}/val holds no class folders, and no" in err
    status, _, err = run("eval", "--data", small, "--model", "test_resnet")
    assert status == 1 and f"{small}/val holds no class folders; name another --split" in err


def test_a_flat_val_is_named_for_what_it_is(small, tmp_path):
    for file in sorted((small / "val").glob("*/*.jpg")):
        file.rename(small / "val" / f"{file.parent.name}-{file.name}")
    for name in CLASSES:
        (small / "val" / name).rmdir()
    status, err = hard(small, tmp_path / "run")
    assert status == 0
    assert f"no validation: nothing tells the classes of {small}/val" in err
    trained = f"test_resnet={tmp_path / 'run' / 'last.safetensors'}"
    status, _, err = run("eval", "--data", small, "--model", trained)
    assert status == 1 and f"nothing tells the classes of {small}/val, so there is no" in err
    status, out, err = run(
        "eval", "--data", small, "--model", trained, "--teacher", trained, "--json"
    )
    figures = json.loads(out)["models"][0]
    assert status == 0 and "no top-1" in err and "top1" not in figures
    assert figures["teacher_agreement"] == 100 and abs(figures["teacher_kl"]) < 1e-6


def test_a_val_of_another_spelling_is_named(small, tmp_path):
    moved(small, val="Validation")
    status, err = hard(small, tmp_path / "run")
    assert status == 0 and f"(it has Validation/, which --val-data {small}/Validation" in err
    status, _, err = run("eval", "--data", small, "--model", "test_resnet")
    assert status == 1 and "has train but no val; name another --split, for example" in err
    assert "--split Validation" in err


@pytest.mark.parametrize("splits", [("train", "val"), ("train",), ("training", "test")])
def test_flat_splits_are_no_classes(small, tmp_path, splits):
    data = tmp_path / "flat"
    for split in splits:
        (data / split).mkdir(parents=True)
        shutil.copy(small / "train" / "ant" / "000.jpg", data / split / "1.jpg")
        shutil.copy(small / "train" / "ant" / "001.jpg", data / split / "2.jpg")
    status, err = hard(data, tmp_path / "run")
    says = "hard labels are classes" if splits[0] == "train" else "has no class folders"
    assert status == 1 and says in err and splits[0] in err
    (data / "locomotives").mkdir()
    shutil.copy(small / "train" / "ant" / "000.jpg", data / "locomotives" / "1.jpg")
    assert hard(data, tmp_path / "run")[0] == 0


# ---- results among images


@pytest.mark.parametrize("place", ["train/x", "train/ant/x", "train", "link/x", "train/../train/x"])
def test_a_result_among_class_folders_is_refused_before_anything_is_made(small, tmp_path, place):
    (small / "link").symlink_to(small / "train")
    before = tree(small)
    write_teacher(tmp_path / "t.safetensors", "test_resnet", 0)
    status, err = hard(small, small / place)
    assert status == 1 and "among the class folders" in err and "--out" in err
    status, _, err = run(
        *("generate-labels", "--config", SMOKE, "--data", small, "--store", small / place),
        *("--teacher", f"test_resnet={tmp_path / 't.safetensors'}"),
    )
    assert status == 1 and "among the class folders" in err and "--store" in err
    assert tree(small) == before
    assert {p.name for p in (small / "train").iterdir()} == set(CLASSES)


@pytest.mark.parametrize("place", ["val/x", "val/ant"])
def test_a_run_among_the_validation_images_is_refused(small, place):
    before = tree(small)
    for options in ((), ("--val-data", small / "val")):
        status, err = hard(small, small / place, *options)
        assert status == 1 and "among the class folders" in err
    assert tree(small) == before


def test_a_result_is_refused_where_training_would_look_for_images(small, tmp_path):
    data, pool = DataSet.find(small, "train"), tmp_path / "pool"
    for place in ("val", "val/x", "train/../val/x"):
        shutil.rmtree(small / "val", ignore_errors=True)  # a store there would be val/
        with pytest.raises(DataError, match="among the class folders"):
            require_no_split("--store", small / place, data)
    require_no_split("--store", small / "x", data)
    (small / "val" / "old").mkdir(parents=True)
    require_no_split("--store", small / "val" / "old", data)  # made by an older version
    shutil.move(small / "train" / "ant", pool)
    (small / "train" / "ant").symlink_to(pool)
    with pytest.raises(DataError, match="among the class folders"):
        require_outside("--out", pool / "x", data)


def test_results_beside_class_folders_and_hidden_ones_are_allowed(small):
    for place in ("x", "train/.x", ".train"):
        require_outside_folders("--out", small / place, [small / "train", small / "val"])


def test_pages_and_pictures_among_images_are_refused(photos, store_path, tmp_path, recipe):
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    page = data / "train" / "ant" / "page.html"
    status, _, err = run("inspect", store_path, "--report", page)
    assert status == 1 and "--report" in err and "among the class folders" in err
    train(
        changed(recipe, train={"epochs": 1}), data, tmp_path / "run", store=store_path, device=CPU
    )
    picture = data / "val" / "bee" / "curves.png"
    status, _, err = run("compare", tmp_path / "run", "--figure", picture)
    assert status == 1 and "--figure" in err and "among the class folders" in err
    status, _, err = run("merge", store_path, "--out", data / "train" / "m.zarr")
    assert status == 1 and "--out" in err and "among the class folders" in err
    status, _, err = run("export", tmp_path / "run", "--out", data / "val" / "x", "--no-onnx")
    assert status == 1 and "--out" in err and "among the class folders" in err
    assert not page.exists() and not picture.exists() and not (data / "val" / "x").exists()
    require_elsewhere("--report", data / "page.html", LabelStore.open(store_path).images)


# ---- classes by name


def mapped(folder: Path, names: list[str] | None, class_map: list[str] | None = None) -> list[str]:
    return list(map_classes(DataSet.find(folder, "train", class_map), names, "M", 3).class_names)


def test_class_folders_are_mapped_by_name(small, capsys):
    data = small / "train"
    assert mapped(data, None) == mapped(data, list(CLASSES)) == list(CLASSES)
    assert capsys.readouterr().err == ""
    other = ["cat", "ant", "bee"]
    assert mapped(data, other) == other
    assert "the order of M, not that of their names" in capsys.readouterr().err
    more = ["zebra", *CLASSES]
    assert mapped(data, more) == more
    assert "has folders of 3 of the 4 classes of M" in capsys.readouterr().err


def test_class_folders_that_a_model_does_not_know_are_refused(small):
    with pytest.raises(DataError, match=r"has 1 class folder \(ant\) of no class of M") as e:
        mapped(small / "train", ["bee", "cat", "dog"])
    assert "3 classes are bee, cat, dog; pass" in str(e.value) and "--class-map" in str(e.value)


def test_a_class_map_may_rename_a_models_classes_and_not_move_them(small):
    data = small / "train"
    theirs = ["Ameise", "bee", "cat"]
    assert mapped(data, theirs, list(CLASSES)) == list(CLASSES)
    with pytest.raises(DataError, match="class 0 is cat, which is class 2 of M"):
        mapped(data, theirs, ["cat", "bee", "ant"])


# ---- names in other spellings

NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def spelled(data: Path, form: str) -> Path:
    """Rename a class and one of its files to names with é in a normal form."""
    (data / "ant").rename(data / unicodedata.normalize(form, "café"))
    folder = data / unicodedata.normalize(form, "café")
    (folder / "000.jpg").rename(folder / unicodedata.normalize(form, "é.jpg"))
    return data


def test_names_that_differ_in_normalisation_only_are_the_same(tmp_path, recipe):
    """A data set that was copied over a Mac has é as two characters."""
    here = spelled(write_photos(tmp_path / "here", 3), "NFC")
    there = spelled(write_photos(tmp_path / "there", 3), "NFD")
    assert NFC != NFD and not (there / NFC).exists()
    store = generate(recipe, here, tmp_path / "s.zarr", device=CPU)
    assert f"{NFC}/é.jpg" in set(store.images.path)
    assert generate(recipe, there, tmp_path / "s.zarr", device=CPU).progress() == store.progress()
    once = changed(recipe, train={"epochs": 1})
    for data in (here, there):
        train(once, data, tmp_path / f"of-{data.name}", store=store.path, device=CPU)
    assert (tmp_path / "of-here" / "last.safetensors").read_bytes() == (
        tmp_path / "of-there" / "last.safetensors"
    ).read_bytes()
    assert recheck(store.path, there, [], None)["trusted"]
    listed = [NFD, "bee", "cat"]
    train(once, here, tmp_path / "mapped", store=store.path, device=CPU, classes=sorted(listed))


def test_names_that_look_the_same_are_shown_apart(tmp_path):
    data = write_photos(tmp_path / "data", 2)
    (data / "ant").rename(data / NFC)
    shutil.copytree(data / NFC, data / NFD)
    with pytest.raises(DataError, match=r"'cafe\\u0301' and 'caf\\xe9'\); make them one"):
        DataSet.find(data, "train")
    (tmp_path / "map.txt").write_text(f"{NFC}\nbee\n{NFD}\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"it has 'caf\\xe9' and 'cafe\\u0301'"):
        read_class_map(tmp_path / "map.txt")


@pytest.mark.parametrize(
    ("several", "shown"),
    [
        (("a", "b"), ("a", "b")),
        (("cat", "cat "), ("'cat'", "'cat '")),
        ((NFC, NFD), ("'caf\\xe9'", "'cafe\\u0301'")),
        (("café", "cafe"), ("café", "cafe")),
    ],
)
def test_only_names_that_look_the_same_are_escaped(several, shown):
    assert wording.told_apart(*several) == shown


LOCALES = {
    "ASCII": {"LC_ALL": "POSIX", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    "UTF-8": {"LC_ALL": "C.UTF-8"},
}


def test_an_ascii_locale_finds_the_same_files(tmp_path):
    """Cron jobs and containers often have no locale."""
    data = spelled(write_photos(tmp_path / "data", 2), "NFC")
    write_teacher(tmp_path / "t.safetensors", "test_resnet", 0)
    for name, locale in LOCALES.items():
        done = subprocess.run(
            [
                *(sys.executable, ROOT / "cli.py", "generate-labels", "--config", SMOKE),
                *("--data", data, "--store", tmp_path / f"{name}.zarr", "--views", "1"),
                *("--teacher", f"test_resnet={tmp_path / 't.safetensors'}"),
            ],
            env=os.environ | locale,
            capture_output=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr.decode(errors="replace")
        assert b"unusable" not in done.stderr
    assert tree(tmp_path / "ASCII.zarr") == tree(tmp_path / "UTF-8.zarr")
    assert f"{NFC}/é.jpg" in set(LabelStore.open(tmp_path / "ASCII.zarr").images.path)
