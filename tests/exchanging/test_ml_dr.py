"""Label sets of ml-dr that hold crops and flips alone become a store: the same crops,
labels and pixels. All other sets are refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.command import run
from support.label_files import write_set
from support.peers import CROPFLIP, reinforce
from support.small import CPU, changed, tree
from support.stages import import_labels, make_replay, stored_labels, train

from cache import LabelStore
from cache.errors import MealError, StoreError
from pipeline.config import Render
from pipeline.exchange import ml_dr_format


@pytest.fixture(scope="module")
def reinforced(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A label set, and what is in it."""
    root = tmp_path_factory.mktemp("reinforced") / "reinforced_data"
    return root, reinforce(root, photos / "train")


@pytest.fixture(scope="module")
def imported(
    reinforced: tuple[Path, dict], photos: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    path = tmp_path_factory.mktemp("imported") / "rrc.zarr"
    import_labels(reinforced[0], photos, path, codec="float32", form="ml-dr")
    return path


def test_a_store_has_the_crops_and_labels_of_the_files(imported, reinforced):
    store, told = LabelStore.open(imported), reinforced[1]
    assert store.views == 3 and len(store.usable) == 90 and set(store.images.path) == set(told)
    for row in store.usable:
        for view, (box, flip, _, p) in enumerate(told[store.images.path[row]]):
            boxes, flips = store.crops(view, [row])
            assert tuple(boxes[0]) == box and flips[0] == flip
            # The third class has what the two likeliest leave.
            assert store.probabilities(view, [row])[0] == pytest.approx(p, abs=1e-6)


def test_a_student_sees_the_very_pixels_that_were_labelled(imported, reinforced, photos):
    """Pillow 13 resizes the columns of some tall crops first, as torchvision calls it;
    such pixels may be one level away."""
    store, told, seen, equal = LabelStore.open(imported), reinforced[1], 0, 0
    replay = make_replay(
        stored_labels(store, 3),
        photos / "train",
        sizes=[32],
        batch_size=30,
        seed=0,
        rendering=Render(),
    )
    for view in range(3):
        with replay.epoch(view) as batches:
            for batch in batches:
                for row, pixels in zip(batch.rows, batch.pixels[32], strict=True):
                    theirs = told[store.images.path[row]][view][2].permute(1, 2, 0)
                    apart = (pixels.int() - theirs.int()).abs().max()
                    assert apart <= 1
                    seen, equal = seen + 1, equal + int(apart == 0)
    assert seen == 270 and equal > 200


def test_what_the_set_tells_is_recorded_and_what_nobody_knows_is_said(imported, photos):
    provenance = json.loads((imported / "zarr.json").read_text())["attributes"]["provenance"]
    assert provenance["imported"] == {
        "format": "ml-dr",
        "labels": "marginal_smoothing_k2",
        "half_precision": False,
    }
    assert [teacher["model"] for teacher in provenance["teachers"]] == [
        "ig_resnext101_32x8d",
        "ig_resnext101_32x16d",
    ]
    for teacher in provenance["teachers"]:
        assert (teacher["image_size"], teacher["weights"]) == (32, None)
        assert teacher["mean"] == [0.485, 0.456, 0.406] and teacher["std"] == [0.229, 0.224, 0.225]
    assert provenance["crops"]["interpolation"] == "bilinear"
    out = run("inspect", imported)[1]
    assert "ml-dr label files, marginal_smoothing_k2" in out and "UNKNOWN: weights" in out
    assert run("verify", imported, "--data", photos)[0] == 0


def test_a_student_trains_from_it(imported, photos, recipe, tmp_path):
    short = changed(recipe, train={"epochs": 1, "milestones": []})
    metrics = train(short, photos, tmp_path / "run", store=imported, device=CPU)
    assert metrics["images"] == 90 and 0 < metrics["kl"] < 5


def test_the_command_finishes_extends_and_mends(imported, reinforced, photos, tmp_path):
    path = tmp_path / imported.name
    words = ["import-labels", reinforced[0].parent, "--format", "ml-dr", "--data", photos]
    words += ["--store", path, "--codec", "float32"]
    status, _, err = run(*words, "--views", 2)
    assert status == 0, err
    assert "3 crops an image, labels of kind marginal_smoothing_k2: the other classes share" in err
    (path / "labels" / "c" / "1" / "0" / "0").write_bytes(b"torn")
    status, _, err = run(*words)
    assert status == 0, err
    files, others = tree(path), tree(imported)
    assert {f: b for f, b in files.items() if f != "zarr.json"} == {
        f: b for f, b in others.items() if f != "zarr.json"
    }


def test_a_set_that_was_not_compressed_is_the_same(imported, photos, tmp_path):
    reinforce(tmp_path / "set", photos / "train", compress=False)
    store = import_labels(
        tmp_path / "set", photos, tmp_path / "s.zarr", codec="float32", form="ml-dr"
    )
    other = LabelStore.open(imported)
    for view in range(3):
        assert all(
            map(np.array_equal, store.crops(view, store.usable), other.crops(view, other.usable))
        )


def test_a_set_without_flips_has_none(photos, tmp_path):
    told = reinforce(tmp_path / "set", photos / "train", mirrored=False)
    store = import_labels(tmp_path / "set", photos, tmp_path / "s.zarr", form="ml-dr")
    boxes, flips = store.crops(1, store.usable)
    assert not flips.any()
    assert [tuple(box) for box in boxes] == [
        told[path][1][0] for path in store.images.path[store.usable]
    ]


def test_the_order_is_that_of_torchvisions_image_folder(photos, tmp_path):
    """Folders in class folders, and names that sort otherwise with their folder."""
    data = Path(shutil.copytree(photos / "train", tmp_path / "data"))
    for place in ("ant/z", "ant/z-1", "ant/Z"):
        (data / place).mkdir()
        for number in range(3):
            (data / f"ant/00{number}.jpg").rename(data / place / f"{number}.jpg")
        shutil.copytree(data / place, data / "bee" / place.partition("/")[2])
        for file in (data / place).iterdir():
            os.rename(file, data / "ant" / f"00{file.name}")
    told = reinforce(tmp_path / "set", data)
    store = import_labels(
        tmp_path / "set", data, tmp_path / "s.zarr", codec="float32", form="ml-dr"
    )
    boxes = {}
    for root, _, files in os.walk(data):
        for file in files:
            path = os.path.relpath(os.path.join(root, file), data)
            boxes[path] = told["/".join(os.path.join(root, file).split("/")[-2:])][0][0]
    for row in store.usable:
        assert tuple(store.crops(0, [row])[0][0]) == boxes[store.images.path[row]]


def with_augmentation(**more: dict) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        config = torch.load(root / "config.pth.tar")
        config["reinforce"]["image_augmentation"] = CROPFLIP | more
        torch.save(config, root / "config.pth.tar")

    return edit


def with_config(**more: object) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        torch.save(torch.load(root / "config.pth.tar") | more, root / "config.pth.tar")

    return edit


def crop_with(**more: object) -> Callable[[Path], None]:
    return with_augmentation(random_resized_crop={"size": 32} | more)


def normalised(**more: object) -> Callable[[Path], None]:
    return with_augmentation(normalize=CROPFLIP["normalize"] | more)


def rewritten(index: int, content: object) -> Callable[[Path], None]:
    return lambda root: torch.save(content, root / f"{index}.pth.tar", pickle_protocol=4)


def compressed(root: Path) -> None:
    with zipfile.ZipFile(root / "5.pth.tar", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("5/data.pkl", b"\x80\x02" + b"N0" * 10_000 + b"N.")


def sample(box: tuple = (0, 0, 9, 9), p: tuple = (0.5, 0.25), ids: tuple = (0, 1)) -> dict:
    return {"params": [box, True], "prob": (list(p), list(ids))}


class Program:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("run-by-a-pickle",)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (
            with_augmentation(rand_augment={"p": 1.0}, random_erase={"p": 0.25}),
            "saw RandAugment, random erasing, as its config.pth.tar says, and a store of crops and "
            "flips can't replay that; take a set",
        ),
        (with_augmentation(mixup={"enable": True}, cutmix={}), "saw mixup, CutMix,"),
        (with_augmentation(random_resized_crop={"enable": False}), "saw no random crop"),
        (crop_with(size=[32, 48]), r"resized to \[32, 48\] pixels, and a store's are square"),
        (crop_with(size="x"), "crops are resized to 'x' pixels"),
        (crop_with(size=0), "crops are resized to 0 pixels"),
        (crop_with(size=100_000), "crops are resized to 100000 pixels"),
        (crop_with(interpolation="lanczos"), "resized with 'lanczos', and a store's with bilinear"),
        (normalised(mean=0.5), "its mean is 0.5"),
        (normalised(mean=[0.5]), r"its mean is \[0.5\]"),
        (normalised(mean=[0.5, 0.5, float("nan")]), "its mean is"),
        (normalised(std="abc"), "its std is 'abc'"),
        (normalised(std=[0.5, 0.5, 0.0]), "its std is"),
        (with_config(teacher={"name": 7}), "its teachers are named 7"),
        (with_config(teacher=["a", None]), r"its teachers are named \['a', None\]"),
        (with_config(num_classes="many"), "labels of 'many' classes, and .* has 3"),
        (lambda root: (root / "config.pth.tar").unlink(), "has no config.pth.tar"),
        (lambda root: torch.save({"a": 1}, root / "config.pth.tar"), "doesn't say how crops were"),
        (lambda root: (root / "89.pth.tar").unlink(), "labels of 89 images, and .* holds 90"),
        (lambda root: (root / "7.pth.tar").unlink(), "7.pth.tar is missing; unpack the set anew"),
        (rewritten(5, (6, [sample()] * 3)), "it doesn't hold the labels of image 5"),
        (rewritten(5, (5, [sample()] * 2)), "has 2 crops with labels of kind top-2, others have 3"),
        (
            rewritten(5, (5, [sample((0, 0, 9999, 9))] * 3)),
            r"crop 0 is \[0, 0, 9999, 9\], not insi",
        ),
        (rewritten(5, (5, [sample((0, 0.5, 9, 9))] * 3)), "a crop isn't four whole pixels"),
        (rewritten(5, (5, [sample(ids=(0, 3))] * 3)), "class numbers that are not from 0 to 2"),
        (rewritten(5, (5, [sample(p=(0.9, 0.9))] * 3)), "whose sum is above one"),
        (rewritten(5, (5, [sample(p=(0.5,))] * 3)), "as many classes as probabilities"),
        (rewritten(5, (5, [{"params": []}] * 3)), "isn't a crop, a flip and as many classes"),
        (
            rewritten(5, (5, [{"params": [(0, 0, 9, 9), 2], "prob": ([0.5], [1])}] * 3)),
            "its flips are neither true nor false",
        ),
        (rewritten(5, (5, [sample(p=(), ids=())] * 3)), "its labels name no classes"),
        (rewritten(5, (5, [sample((0, 0, 9))] * 3)), "isn't a crop, a flip and as many"),
        (rewritten(5, (5, [sample(), *[sample(p=(0.5,), ids=(1,))] * 2])), "as many classes as"),
        (rewritten(5, ([[]] * 9, [sample()] * 3)), "it doesn't hold the labels of image 5"),
        (rewritten(5, (5, [sample(p=[0.0] * 9_000, ids=[1] * 9_000)] * 9_000)), "as many classes"),
        (rewritten(5, torch.zeros(3)), "which may be a program|it holds tensors"),
        (rewritten(5, (5, Program())), "asks for posix.mkdir, which may be a program"),
        (compressed, "it is compressed, as torch never writes it"),
        (lambda root: (root / "5.pth.tar").write_bytes(b"\x78\x9c"), "joblib's files can't be"),
        (
            lambda root: (root / "5.pth.tar").write_bytes((root / "6.pth.tar").read_bytes()[:99]),
            "5.pth.tar can't be read",
        ),
    ],
)
def test_what_cant_be_imported_is_told_in_one_line(
    reinforced, photos, tmp_path, monkeypatch, spoil, says
):
    monkeypatch.chdir(tmp_path)
    root = Path(shutil.copytree(reinforced[0], tmp_path / "set"))
    spoil(root)
    with pytest.raises(MealError, match=says) as error:
        import_labels(root, photos, tmp_path / "s.zarr", form="ml-dr")
    assert "\n" not in str(error.value) and not Path("run-by-a-pickle").exists()
    if (tmp_path / "s.zarr").exists():
        assert LabelStore.open(tmp_path / "s.zarr").progress()[0] == 0


def test_labels_of_other_classes_are_refused(reinforced, photos, tmp_path):
    with pytest.raises(MealError, match="labels of 3 classes, and .* has 4; pass all classes"):
        import_labels(
            reinforced[0],
            photos,
            tmp_path / "s.zarr",
            form="ml-dr",
            classes=["ant", "bee", "cat", "dog"],
        )


def test_a_file_of_few_bytes_takes_no_memory(tmp_path):
    """Its pickle asks for place 2^31 of a table of what it has read."""
    with zipfile.ZipFile(tmp_path / "5.pth.tar", "w") as packed:
        packed.writestr("5/data.pkl", b"\x80\x02K\x05r\x00\x00\x00\x80K\x06\x86.")
    resource = tracemalloc.start() or ml_dr_format.load(tmp_path / "5.pth.tar")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert resource == (5, 6) and most < 10**6


def test_no_images_and_no_labels_are_refused(reinforced, photos, tmp_path):
    (tmp_path / "set").mkdir()
    shutil.copy(reinforced[0] / "config.pth.tar", tmp_path / "set")
    for name in ("ant", "bee", "cat"):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "read.txt").touch()
    with pytest.raises(MealError, match="labels of 0 images, and .* holds 0"):
        import_labels(tmp_path / "set", tmp_path / "data", tmp_path / "s.zarr", form="ml-dr")


def test_the_sets_own_interpolation_counts(reinforced, photos, tmp_path):
    root = Path(shutil.copytree(reinforced[0], tmp_path / "set"))
    crop_with(interpolation=3)(root)
    store = import_labels(root, photos, tmp_path / "s.zarr", form="ml-dr")
    assert store.provenance["crops"]["interpolation"] == "bicubic"


def test_another_format_or_another_rest_into_the_same_store_is_refused(
    imported, reinforced, photos, tmp_path
):
    with pytest.raises(StoreError, match=r"imported with imported.labels marginal_smoothing_k2"):
        import_labels(reinforced[0], photos, imported, codec="float32", form="ml-dr", rest="none")
    fkd = write_set(tmp_path / "set" / "imagenet", photos / "train")
    with pytest.raises(StoreError, match=r"imported with imported.format ml-dr, this is fkd"):
        import_labels(fkd, photos, imported, codec="float32")
