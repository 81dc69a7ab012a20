"""Labels from others and for others: FKD's label files become a store, and a store
becomes FKD's label files, with the same crops and labels. No code in a file is run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.command import run
from support.killing import Moment, Run, Server
from support.label_files import CROPS, write_set
from support.peers import fkd_sample, recovered
from support.small import CPU, changed, edit_store, tree
from support.stages import import_labels, train
from torchvision.transforms import functional

from cache import LabelStore
from cache.errors import MealError, StoreError
from cache.format.manifest import USABLE
from cache.merge import merge
from pipeline.exchange import export_labels as export_labels_module
from pipeline.exchange import fkd_format, label_kinds
from pipeline.exchange import import_labels as import_labels_module
from pipeline.exchange.export_labels import export_labels
from pipeline.images import patience
from pipeline.images.patience import DataError


@pytest.fixture(scope="module")
def published(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A label set as FKD's generator saves it: NumPy arrays, two classes of three, and
    the remaining probability for the third class."""
    return write_set(tmp_path_factory.mktemp("published") / "labels" / "imagenet", photos / "train")


@pytest.fixture(scope="module")
def imported(published: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imported") / "fkd.zarr"
    import_labels(published, photos, path, codec="float32", teachers=["somebody's b4"])
    return path


def test_a_store_has_the_crops_and_labels_of_the_files(imported, published, photos):
    store = LabelStore.open(imported)
    assert store.views == CROPS and store.progress() == (3, 3) and len(store.usable) == 90
    for row in store.usable[::7]:
        path = store.images.path[row]
        # torch.load alone can't read these files without trusting them.
        with pytest.raises(Exception, match="weights_only"):
            torch.load(
                published / "imagenet" / "train" / path.replace(".jpg", ".tar"), weights_only=True
            )
        coords, flips, labels = torch.load(
            published / "imagenet" / "train" / path.replace(".jpg", ".tar"), weights_only=False
        )
        with Image.open(photos / "train" / path) as photo:
            scale = np.array([photo.height, photo.width] * 2)
        for view in range(CROPS):
            box, flip = store.crops(view, [row])
            assert np.array_equal(box[0], np.rint(coords[view] * scale)) and flip[0] == flips[view]
            p = store.probabilities(view, [row])[0]
            first, second = labels[view, 0].astype(int)
            assert p[[first, second]] == pytest.approx(
                labels[view, 1], abs=1e-6
            ) and p.sum() == pytest.approx(1)


def test_what_nobody_knows_is_said(imported, published, photos):
    document = json.loads((imported / "zarr.json").read_text())["attributes"]
    assert (
        document["format_version"] == 6
        and document["provenance"]["imported"]["labels"] == "marginal_smoothing_k2"
    )
    (teacher,) = document["provenance"]["teachers"]
    assert (
        teacher["model"] == "somebody's b4"
        and teacher["weights"] is teacher["image_size"] is teacher["mean"] is None
    )
    out = run("inspect", imported)[1]
    assert (
        "somebody's b4 at an unknown size, weights unknown" in out
        and "UNKNOWN: weights" in out
        and "as imported" in out
    )
    status, out, _ = run("verify", imported, "--data", photos)
    assert status == 0 and "every digest is right" in out
    status, out, _ = run("verify", imported, "--data", photos, "--sample", 3)
    assert status == 1 and "teachers whose weights aren't known" in out


def test_a_store_made_here_must_know_its_teachers(store_path, tmp_path):
    shutil.copytree(store_path, tmp_path / "s.zarr")
    edit_store(
        tmp_path / "s.zarr",
        lambda attributes: attributes["provenance"]["teachers"][0].update(weights=None),
    )
    with pytest.raises(StoreError, match=r"teachers.*weights is None"):
        LabelStore.open(tmp_path / "s.zarr")


def test_a_student_trains_from_imported_labels(imported, photos, recipe, tmp_path):
    metrics = train(
        changed(recipe, train={"epochs": 1, "milestones": []}),
        photos,
        tmp_path / "run",
        store=imported,
        device=CPU,
    )
    assert metrics["images"] == 90 and 0 < metrics["kl"] < 5


def test_the_report_of_imported_labels(imported, photos, tmp_path):
    status, _, err = run("inspect", imported, "--report", tmp_path / "r.html", "--data", photos)
    assert status == 0, err
    assert "UNKNOWN: weights" in (tmp_path / "r.html").read_text()


@pytest.mark.parametrize("below", ["labels", "labels/imagenet", "labels/imagenet/train"])
def test_the_files_are_found_wherever_the_folder_is_named(published, photos, tmp_path, below):
    store = import_labels(published.parent / below, photos, tmp_path / "s.zarr", views=1)
    assert store.views == 1 and store.progress() == (1, 1)


def test_an_import_that_was_stopped_goes_on_and_damage_is_mended(
    imported, published, photos, tmp_path
):
    path = tmp_path / imported.name
    shutil.copytree(imported, path)
    (path / "records" / "c" / "1" / "0" / "0").unlink()
    (path / "labels" / "c" / "2" / "0" / "0").write_bytes(b"torn")
    (path / "boxes" / "zarr.json").unlink()
    import_labels(published, photos, path, codec="float32", teachers=["somebody's b4"])
    assert tree(path) == tree(imported)


def test_killed_at_any_moment_an_import_goes_on_to_the_same_bytes(
    imported, published, photos, tmp_path
):
    server = Server(tmp_path, tmp_path, photos)
    command = ["import-labels", str(published), "--codec=float32", "--teacher=somebody's b4"]

    def start(path: Path, moment: Moment | None = None) -> Run:
        path.parent.mkdir(exist_ok=True)
        return server.command(path, command, moment)

    whole = start(tmp_path / "whole" / imported.name)
    assert whole.end() == 0, whole.said()
    assert tree(tmp_path / "whole" / imported.name) == tree(imported)
    events = whole.events()
    shards = next(
        i
        for i, event in enumerate(events)
        if "/c/" in event.path and event.path.startswith(f"{imported.name}/labels")
    )
    for number, event in enumerate(
        [*range(10, shards, shards // 3), *range(shards, len(events), (len(events) - shards) // 6)]
    ):
        path = tmp_path / f"killed{number}" / imported.name
        killed = start(path, Moment(event, part=0.5))
        assert killed.end() == -9, f"{events[event]}: {killed.said()}"
        again = start(path)
        assert again.end() == 0, again.said()
        assert tree(path) == tree(imported), events[event]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"codec": "pow8"}, "was imported with codec.name float32, this is pow8"),
        (
            {"interpolation": "bilinear"},
            "was imported with crops.interpolation bicubic, this is bilinear",
        ),
        (
            {"teachers": ["another"]},
            "was imported with teachers.0.model somebody's b4, this is another",
        ),
    ],
)
def test_another_import_into_the_same_store_is_refused(imported, published, photos, options, says):
    with pytest.raises(StoreError, match=says):
        import_labels(
            published,
            photos,
            imported,
            **{"codec": "float32", "teachers": ["somebody's b4"], **options},
        )


def test_an_imported_store_is_not_gone_on_with_by_teachers_nor_the_other_way_round(
    imported, published, photos, recipe, store_path
):
    from support.stages import generate

    with pytest.raises(StoreError, match="labels that others made"):
        generate(recipe, photos, imported, device=CPU)
    with pytest.raises(StoreError, match="labels that were made here; choose another --store"):
        import_labels(published, photos, store_path)


def test_label_sets_of_the_same_crops_are_averaged_and_none_counts_twice(
    imported, photos, tmp_path
):
    other = write_set(tmp_path / "set" / "imagenet", photos / "train", seed=1)
    import_labels(other, photos, tmp_path / "b.zarr", codec="float32")
    quiet = {"say": lambda line: None, "progress": lambda n: None}
    both = merge([imported, tmp_path / "b.zarr"], tmp_path / "both.zarr", **quiet)
    a, b = (LabelStore.open(path) for path in (imported, tmp_path / "b.zarr"))
    wanted = (a.probabilities(2, a.usable) + b.probabilities(2, b.usable)) / 2
    assert both.probabilities(2, both.usable) == pytest.approx(
        wanted, abs=1e-6
    ) and both.progress() == (3, 3)
    import_labels(
        other,
        photos,
        tmp_path / "c.zarr",
        codec="float32",
        teachers=["the same under another name"],
    )
    with pytest.raises(StoreError, match="would count twice"):
        merge([tmp_path / "b.zarr", tmp_path / "c.zarr"], tmp_path / "d.zarr", **quiet)
    assert (
        "import-labels" not in run("verify", tmp_path / "both.zarr")[1]
        and "marginal_smoothing_k2" in run("inspect", tmp_path / "both.zarr")[1]
    )
    turned = tmp_path / "set" / "imagenet" / "train" / "ant" / "000.tar"
    coords, flips, labels = torch.load(turned, weights_only=False)
    torch.save([coords, ~flips, labels], turned)
    import_labels(other, photos, tmp_path / "e.zarr", codec="float32")
    with pytest.raises(StoreError, match="their crops are others|have other crops"):
        merge([imported, tmp_path / "e.zarr"], tmp_path / "f.zarr", **quiet)


def test_more_views_extend_an_import_and_fewer_take_nothing_away(
    imported, published, photos, tmp_path
):
    path, how = tmp_path / imported.name, {"codec": "float32", "teachers": ["somebody's b4"]}
    assert import_labels(published, photos, path, views=1, **how).views == 1
    assert import_labels(published, photos, path, **how).progress() == (3, 3)
    (path / "records" / "c" / "2" / "0" / "0").unlink()
    assert import_labels(published, photos, path, views=2, **how).progress() == (3, 3)
    assert {file: content for file, content in tree(path).items() if file != "zarr.json"} == {
        file: content for file, content in tree(imported).items() if file != "zarr.json"
    }
    with pytest.raises(MealError, match="9 views are wanted, and the label files have 3 crops"):
        import_labels(published, photos, path, views=9, **how)


def test_an_image_without_labels_is_left_out_with_the_reason(published, photos, tmp_path):
    shutil.copytree(published, tmp_path / "labels")
    (tmp_path / "labels" / "imagenet" / "train" / "bee" / "004.tar").unlink()
    store = import_labels(tmp_path / "labels", photos, tmp_path / "s.zarr", views=1)
    row = store.images.path.tolist().index("bee/004.jpg")
    assert (
        store.images.status[row] != USABLE
        and store.images.reason[row] == "no label file"
        and len(store.usable) == 89
    )


def test_label_files_of_classes_that_the_images_lack_are_refused(published, photos, tmp_path):
    """Labels know their classes by number: without ant, 0 would be bee."""
    data = Path(shutil.copytree(photos / "train", tmp_path / "data"))
    (data / "ant").rename(data / "dog")
    with pytest.raises(MealError, match=r"label files of 1 class \(ant\) .* has no folder of"):
        import_labels(published, data, tmp_path / "s.zarr", views=1)
    assert not (tmp_path / "s.zarr").exists()
    shutil.rmtree(data / "dog")
    store = import_labels(
        published, data, tmp_path / "s.zarr", views=1, classes=["ant", "bee", "cat"]
    )
    assert store.class_names == ["ant", "bee", "cat"] and len(store.usable) == 60


def test_a_label_file_that_cannot_be_looked_at_is_not_missing(
    published, photos, tmp_path, monkeypatch
):
    """An image without labels is left out for ever, so a disk that fails must not make
    one."""
    about, seen = os.stat, []

    def fails(path: object, *given: object, **named: object) -> os.stat_result:
        if str(path).endswith("bee/003.tar"):
            seen.append(path)
            if len(seen) < most:
                raise OSError(errno.ESTALE, "Stale file handle")
        return about(path, *given, **named)

    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0, 0.0))
    monkeypatch.setattr(patience.os, "stat", fails)
    most = 10**6
    with pytest.raises(DataError, match=r"003\.tar can't be read now \(Stale file handle; 4 tries"):
        import_labels(published, photos, tmp_path / "s.zarr")
    assert not (tmp_path / "s.zarr").exists()
    seen, most = [], 3
    store = import_labels(published, photos, tmp_path / "s.zarr")
    assert len(store.usable) == 90 and len(seen) >= 3


def test_a_label_file_that_cannot_be_read_for_a_moment_is_read_again(published, monkeypatch):
    monkeypatch.setattr(patience, "WAITS", (0.0, 0.0))
    file, tries, load = min(published.parent.rglob("*.tar")), [], torch.load

    def failing(*given: object, **how: object) -> object:
        tries.append(given)
        if len(tries) in (1, 3, 4, 5):
            raise OSError(errno.ESTALE, "Stale file handle")
        return load(*given, **how)

    monkeypatch.setattr(torch, "load", failing)
    with fkd_format.reading():
        fkd_format.read(file, 3)
        with pytest.raises(DataError, match="tar can.t be read now .Stale file handle"):
            fkd_format.read(file, 3)


def broken(content: object) -> object:
    return lambda path: torch.save(content, path)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:300]), r"004.tar can't be read"),
        (
            broken([torch.rand(3, 4), torch.zeros(3, dtype=torch.bool)]),
            "doesn't hold coords, flips and labels",
        ),
        (
            broken([torch.rand(3, 4), torch.zeros(3, dtype=torch.bool), torch.rand(3, 5)]),
            "which no kind of label of 3 classes is",
        ),
        (
            broken([torch.rand(3, 4), torch.zeros(3, dtype=torch.bool), torch.rand(2, 2, 2)]),
            "its shapes are",
        ),
        (
            broken([torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool), torch.zeros(3, 2, 2)]),
            "004.tar doesn't fit bee/004.jpg: crop 0 is",
        ),
        (
            broken([np.array([[object()] * 4] * 3), np.zeros(3, bool), np.zeros((3, 2, 2))]),
            "004.tar",
        ),
        (
            broken(
                [
                    torch.full((3, 4), float("nan")),
                    torch.zeros(3, dtype=torch.bool),
                    torch.zeros(3, 2, 2),
                ]
            ),
            "a crop without numbers",
        ),
        (
            broken(
                [
                    torch.tensor([[0.0, 0, 1, 1]] * 3),
                    torch.zeros(3, dtype=torch.bool),
                    torch.tensor([[[0.0, 7], [0.5, 0.2]]] * 3),
                ]
            ),
            "class numbers that are not from 0 to 2",
        ),
        (
            broken(
                [
                    torch.tensor([[0.0, 0, 1, 1]] * 3),
                    torch.zeros(3, dtype=torch.bool),
                    torch.tensor([[[0.0, 1], [0.9, 0.8]]] * 3),
                ]
            ),
            "whose sum is above one",
        ),
        (
            broken(
                [
                    torch.tensor([[0.0, 0, 1, 1]] * 3),
                    torch.zeros(3, dtype=torch.bool),
                    torch.tensor([[[1.0, 1], [0.5, 0.2]]] * 3),
                ]
            ),
            "a class that is named twice",
        ),
        (
            broken(
                [
                    torch.tensor([[0.0, 0, 1, 1]] * 2),
                    torch.zeros(2, dtype=torch.bool),
                    torch.zeros(2, 2, 2),
                ]
            ),
            "has 2 crops",
        ),
        (
            broken(
                [
                    torch.tensor([[-3.0, 0, 1, 1]] * 3).half(),
                    torch.zeros(3, dtype=torch.bool),
                    torch.zeros(3, 2, 2),
                ]
            ),
            "doesn't fit bee/004.jpg",
        ),
    ],
)
def test_a_bad_label_file_is_named(published, photos, tmp_path, spoil, says):
    shutil.copytree(published, tmp_path / "labels")
    spoil(tmp_path / "labels" / "imagenet" / "train" / "bee" / "004.tar")
    with pytest.raises(MealError, match=says) as error:
        import_labels(tmp_path / "labels", photos, tmp_path / "s.zarr")
    assert "\n" not in str(error.value) and "004" in str(error.value)


def a_bomb(path: Path) -> None:
    """Write a label file that is small on the disk and large in memory."""
    torch.save(
        [
            torch.zeros(3, 4),
            torch.zeros(3, dtype=torch.bool),
            torch.zeros(3, 2, 2),
            torch.zeros(1 << 24),
        ],
        path,
    )
    with zipfile.ZipFile(path) as whole:
        content = {one.filename: whole.read(one) for one in whole.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for name, part in content.items():
            packed.writestr(name, part)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: os.mkfifo(path), "is no ordinary file; remove it"),
        (lambda path: path.symlink_to("/dev/zero"), "is no ordinary file; remove it"),
        (a_bomb, "it is compressed, as torch never writes it"),
        (lambda path: path.touch(), "can't be read"),
        (
            broken(
                [
                    torch.zeros(3, 4),
                    torch.zeros(1, dtype=torch.bool).expand(10**12),
                    torch.zeros(3, 2, 2),
                ]
            ),
            "elements in a file of",
        ),
        (
            broken([torch.zeros(3, 4), torch.zeros(3, dtype=torch.bool), torch.zeros(())]),
            "its shapes are",
        ),
        (
            broken([torch.zeros(3, 4), torch.full((3,), float("nan")), torch.zeros(3, 2, 2)]),
            "its flips are neither true nor false",
        ),
        (
            broken(
                [
                    torch.zeros(100_001, 4),
                    torch.zeros(100_001, dtype=torch.bool),
                    torch.zeros(100_001, 2, 2),
                ]
            ),
            "100001 views are wanted",
        ),
    ],
)
def test_a_hostile_label_file_neither_hangs_nor_fills_the_memory(
    published, photos, tmp_path, spoil, says
):
    shutil.copytree(published, tmp_path / "labels")
    file = tmp_path / "labels" / "imagenet" / "train" / "ant" / "000.tar"
    file.unlink()
    spoil(file)
    with pytest.raises(MealError, match=says) as error:
        import_labels(tmp_path / "labels", photos, tmp_path / "s.zarr")
    assert "\n" not in str(error.value) and not (tmp_path / "s.zarr").exists()


def test_labels_of_two_classes_are_not_guessed():
    """[0, 0.999] may mean the first class or the second, almost surely."""
    assert label_kinds.kind_of(np.array([[0.0, 0.999], [1.0, 0.8]], np.float32), 2) is None
    assert label_kinds.kind_of(np.array([[0.3, 0.7], [0.5, 0.5]], np.float32), 2) == "full"


def test_labels_of_another_split_are_not_taken(published, photos, tmp_path):
    """Images of both splits may have the same names and sizes."""
    for folder in (published, published / "imagenet", published / "imagenet" / "train"):
        with pytest.raises(MealError, match="has no label file for any of the 21 images"):
            import_labels(folder, photos, tmp_path / "s.zarr", split="val")
    for split in ("", "../train", "a/b"):
        with pytest.raises(MealError, match="must be the name of a folder of --data"):
            import_labels(published, photos, tmp_path / "s.zarr", split=split)
        with pytest.raises(MealError, match="must be the name of a folder of --data"):
            export_labels(tmp_path / "s.zarr", tmp_path / "out", split=split)


def test_files_that_fkd_takes_for_no_images_don_t_matter(published, photos, tmp_path):
    shutil.copytree(photos / "train", tmp_path / "data" / "train")
    (tmp_path / "data" / "train" / "ant" / "000.json").write_text("{}")
    assert (
        len(import_labels(published, tmp_path / "data", tmp_path / "s.zarr", views=1).usable) == 90
    )


def test_folders_with_dots_and_nested_ones_are_found_where_fkds_generator_puts_them(
    photos, tmp_path
):
    shutil.copytree(photos / "train", tmp_path / "data" / "train")
    (tmp_path / "data" / "train" / "ant").rename(tmp_path / "data" / "train" / "ant.v1")
    write_set(tmp_path / "set" / "imagenet", tmp_path / "data" / "train")
    assert (
        len(import_labels(tmp_path / "set", tmp_path / "data", tmp_path / "s.zarr", views=1).usable)
        == 90
    )
    nested = tmp_path / "data" / "train" / "bee" / "more"
    nested.mkdir()
    (tmp_path / "data" / "train" / "bee" / "007.jpg").rename(nested / "007.jpg")
    labels = tmp_path / "set" / "imagenet" / "train" / "bee"
    (labels / "more").mkdir()
    (labels / "007.tar").rename(labels / "more" / "007.tar")
    assert (
        len(import_labels(tmp_path / "set", tmp_path / "data", tmp_path / "n.zarr", views=1).usable)
        == 90
    )


def test_crops_of_turned_photographs_are_not_exported(photos, recipe, tmp_path):
    from support.stages import generate

    generate(
        changed(recipe, crops={"views": 1, "exif": "apply"}),
        photos,
        tmp_path / "t.zarr",
        device=CPU,
    )
    with pytest.raises(StoreError, match="turned by their EXIF, and FKD's code doesn't turn them"):
        export_labels(tmp_path / "t.zarr", tmp_path / "out", labels="full")


@pytest.mark.parametrize(
    "edit",
    [
        lambda provenance: provenance["teachers"][0].pop("files"),
        lambda provenance: provenance["crops"].update(scale=[0.1, 1]),
        lambda provenance: provenance["crops"].pop("policy"),
        lambda provenance: provenance["imported"].pop("labels"),
    ],
)
def test_an_imported_store_of_a_stranger_must_make_sense(imported, tmp_path, edit):
    shutil.copytree(imported, tmp_path / "s.zarr")
    edit_store(tmp_path / "s.zarr", lambda attributes: edit(attributes["provenance"]))
    with pytest.raises(StoreError, match="says of itself what can't be"):
        LabelStore.open(tmp_path / "s.zarr")


class Program:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize(
    "wrap",
    [lambda p: p, lambda p: [np.zeros((3, 4), "f4"), np.zeros(3, bool), np.array([p], object)]],
)
def test_a_program_in_a_label_file_is_not_run(published, photos, tmp_path, wrap):
    shutil.copytree(published, tmp_path / "labels")
    mark = tmp_path / "it ran"
    torch.save(wrap(Program(mark)), tmp_path / "labels" / "imagenet" / "train" / "ant" / "000.tar")
    with pytest.raises(MealError, match="holds more than tensors"):
        import_labels(tmp_path / "labels", photos, tmp_path / "s.zarr")
    assert not mark.exists() and not (tmp_path / "s.zarr").exists()
    torch.load(tmp_path / "labels" / "imagenet" / "train" / "ant" / "000.tar", weights_only=False)
    assert mark.exists()  # a trusting reader runs the program


def test_half_precision_and_old_files_are_read(photos, tmp_path):
    half = write_set(tmp_path / "half" / "imagenet", photos / "train", dtype=np.float16)
    whole = write_set(tmp_path / "whole" / "imagenet", photos / "train")
    for file in whole.glob("imagenet/train/*/*.tar"):  # as torch wrote before 1.6
        torch.save(torch.load(file, weights_only=False), file, _use_new_zipfile_serialization=False)
    a, b = (
        import_labels(folder, photos, tmp_path / f"{folder.name}.zarr", codec="float32")
        for folder in (half, whole)
    )
    assert (
        a.provenance["imported"]["half_precision"]
        and not b.provenance["imported"]["half_precision"]
    )
    assert np.array_equal(a.crops(1, a.usable)[0], b.crops(1, b.usable)[0])
    assert a.probabilities(1, a.usable) == pytest.approx(b.probabilities(1, b.usable), abs=2e-3)


def test_images_that_share_a_label_file_are_refused(photos, tmp_path):
    shutil.copytree(photos / "train", tmp_path / "data" / "train")
    shutil.copy(
        tmp_path / "data" / "train" / "ant" / "000.jpg",
        tmp_path / "data" / "train" / "ant" / "000.copy.jpg",
    )
    labels = write_set(tmp_path / "set" / "imagenet", photos / "train")
    with pytest.raises(
        MealError, match=r"ant/000\.copy\.jpg and ant/000\.jpg in one file, train/ant/000\.tar"
    ):
        import_labels(labels, tmp_path / "data", tmp_path / "s.zarr")


@pytest.mark.parametrize("kept", [5, 10])
def test_what_is_left_is_even_over_the_other_classes(kept):
    p = np.random.default_rng(0).dirichlet(np.full(1000, 0.05), 16).astype(np.float32)
    labels = label_kinds.sparse(p, kept)
    assert (
        labels.shape == (16, 2, kept)
        and label_kinds.kind_of(labels, 1000) == f"marginal_smoothing_k{kept}"
    )
    dense = label_kinds.dense(labels, label_kinds.kind_of(labels, 1000), 1000)
    for row, wanted in zip(dense, p, strict=True):
        top = np.argsort(-wanted)[:kept]
        assert (
            row[top] == pytest.approx(wanted[top], abs=1e-6)
            and (np.delete(row, top) == np.delete(row, top)[0]).all()
        )
    assert dense.sum(axis=1) == pytest.approx(np.ones(16))
    assert label_kinds.dense(p.argmax(axis=1), "hard", 1000)[3, p[3].argmax()] == 1
    one = label_kinds.dense(np.stack([p.argmax(axis=1), p.max(axis=1)], axis=1), "smoothing", 1000)
    assert one.max(axis=1) == pytest.approx(p.max(axis=1)) and one.sum(axis=1) == pytest.approx(
        np.ones(16)
    )


@pytest.fixture(scope="module")
def twelve(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of labels of 12 classes, of which 3 have images."""
    folder = tmp_path_factory.mktemp("twelve")
    names = ["ant", "bee", "cat", *(f"d{i}" for i in range(9))]
    for number, file in enumerate(sorted((photos / "train").glob("*/*.jpg"))):
        with Image.open(file) as photo:
            height, width = photo.height, photo.width
        state = [
            torch.tensor([[0, 0, 1, 1], [2 / height, 3 / width, 9 / height, 8 / width]]),
            torch.tensor([False, True]),
            torch.from_numpy(
                np.random.default_rng(number).dirichlet(np.full(12, 0.3), 2).astype(np.float32)
            ),
        ]
        place = folder / "set" / "train" / file.parent.name / f"{file.stem}.tar"
        place.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, place)
    import_labels(folder / "set", photos, folder / "s.zarr", codec="float32", classes=names)
    return folder / "s.zarr"


@pytest.mark.parametrize("labels", ["full", "top5", "top10"])
@pytest.mark.parametrize("program", ["fkd", "meal_v2"])
def test_an_exported_set_is_what_their_loaders_read(twelve, photos, tmp_path, program, labels):
    """Steps of FKD's and of MEAL V2's loader run on the files, with the options that
    the export told."""
    data = Path(shutil.copytree(photos, tmp_path / "imagenet"))
    store, out = LabelStore.open(twelve), tmp_path / "soft" / "imagenet"
    status, _, said = run("export-labels", twelve, "--out", out, "--labels", labels)
    assert status == 0
    (line,) = [
        line for line in said.splitlines() if {"fkd": "FKD's", "meal_v2": "MEAL"}[program] in line
    ]
    told = line.replace(",", "").split()
    path, label_type, classes = (
        told[told.index(option) + 1]
        for option in ("--softlabel_path", "--soft_label_type", "--num_classes")
    )
    assert Path(path) == {"fkd": out, "meal_v2": out.parent}[program] and classes == "12"
    for row in store.usable[::11]:
        image = data / "train" / store.images.path[row]
        pictures, output = fkd_sample(Path(path), str(image), program, 32)
        dense = recovered(output, label_type, 12)
        for view in range(2):
            (box,), (flip,) = store.crops(view, [row])
            with Image.open(image) as photo:
                cut = functional.resized_crop(photo, *box.tolist(), [32, 32])
            wanted = functional.hflip(cut) if flip else cut
            assert np.array_equal(pictures[view], wanted)
            p = store.probabilities(view, [row])[0]
            kept = np.argsort(-p)[: {"full": 12, "top5": 5, "top10": 10}[labels]]
            assert dense[view].numpy()[kept] == pytest.approx(p[kept], abs=1e-6)
            assert dense[view].sum().item() == pytest.approx(1, abs=1e-5)


def test_every_type_of_label_is_what_their_programs_make_of_it():
    """Recover_soft_label on stored labels, as the generator quantises them."""
    p = np.random.default_rng(0).dirichlet(np.full(12, 0.3), 20).astype(np.float32)
    best, top = p.argmax(axis=1), label_kinds.sparse(p, 5)
    one = np.stack([best, p.max(axis=1)], axis=1).astype(np.float32)
    for labels, rest, label_type in (
        (p, "even", "ori"),
        (best, "even", "hard"),
        (one, "even", "smoothing"),
        (top, "even", "marginal_smoothing_k5"),
        (label_kinds.sparse(p, 10), "even", "marginal_smoothing_k10"),
        (top, "none", "marginal_renorm"),
    ):
        kind = label_kinds.renamed(label_kinds.kind_of(labels, 12), rest)
        theirs = recovered(torch.from_numpy(labels), label_type, 12)
        assert label_kinds.dense(labels, kind, 12) == pytest.approx(theirs.numpy(), abs=1e-6)
    half = best.astype(np.float16)  # as --use_fp16 saves class numbers
    assert label_kinds.kind_of(half, 12) == "hard"
    assert np.array_equal(label_kinds.dense(half, "hard", 12), np.eye(12, dtype="f4")[best])
    assert label_kinds.kind_of(half + np.float16(0.5), 12) is None
    assert label_kinds.kind_of(best > 5, 12) is None


def test_labels_whose_rest_is_nothing_are_imported_and_recorded_so(published, photos, tmp_path):
    words = ["import-labels", published, "--data", photos, "--codec", "float32", "--views", 1]
    status, _, said = run(*words, "--store", tmp_path / "even.zarr")
    assert status == 0 and "share the rest evenly" in said and "pass --rest none" in said
    status, _, said = run(*words, "--store", tmp_path / "none.zarr", "--rest", "none")
    assert status == 0 and "named classes alone have a probability" in said
    even, none = (LabelStore.open(tmp_path / f"{name}.zarr") for name in ("even", "none"))
    assert none.provenance["imported"]["labels"] == "marginal_renorm_k2"
    assert "marginal_renorm_k2" in run("inspect", none.path)[1]
    p, q = (store.probabilities(0, store.usable) for store in (even, none))
    least = p.argmin(axis=1) == q.argmin(axis=1)
    assert (q.min(axis=1) < 1e-30).all() and least.mean() > 0.2
    np.put_along_axis(p, q.argmin(axis=1)[:, None], 0, axis=1)
    assert q == pytest.approx(p / p.sum(axis=1, keepdims=True), abs=1e-6)
    status, _, said = run(*words, "--store", tmp_path / "none.zarr")
    assert (
        status == 1 and "imported.labels marginal_renorm_k2, this is marginal_smoothing_k2" in said
    )


@pytest.mark.parametrize(
    ("side", "most"), [(2047, 0), (4000, 1), (6143, 1), (9000, 2), (12_000, 3)]
)
def test_half_precision_moves_a_crop_by_so_many_pixels(side, most):
    random = np.random.default_rng(side)
    extent = random.integers(1, side + 1, (20_000, 2))
    first = random.integers(0, side + 1 - extent)
    first[::2] = side - extent[::2]  # these crops touch the far edges
    boxes = np.concatenate([first, extent], axis=1)
    found = fkd_format.boxes_of((boxes / side).astype(np.float16), side, side)
    assert np.abs(found - boxes).max() == most
    assert (found[:, :2] >= 0).all() and (found[:, :2] + found[:, 2:] <= side).all()


def test_from_a_store_to_files_and_back(store_path, photos, tmp_path):
    export_labels(store_path, tmp_path / "out", labels="full")
    back, store = (
        import_labels(tmp_path / "out", photos, tmp_path / "back.zarr", codec="float32"),
        LabelStore.open(store_path),
    )
    assert np.array_equal(back.images.path, store.images.path)  # the same seed gives the same order
    for view in (0, 1):
        assert all(
            map(np.array_equal, back.crops(view, back.usable), store.crops(view, store.usable))
        )
        assert back.probabilities(view, back.usable) == pytest.approx(
            store.probabilities(view, store.usable), abs=1e-6
        )


def test_an_export_goes_on_where_it_was_stopped(store_path, tmp_path):
    export_labels(store_path, tmp_path / "out", labels="full", views=1)
    before = tree(tmp_path / "out")
    file = tmp_path / "out" / "train" / "cat" / "002.tar"
    file.unlink()
    other = (tmp_path / "out" / "train" / "cat" / "003.tar").stat().st_mtime_ns
    export_labels(store_path, tmp_path / "out", labels="full", views=1)
    assert (
        tree(tmp_path / "out").keys() == before.keys()
        and (tmp_path / "out" / "train" / "cat" / "003.tar").stat().st_mtime_ns == other
    )
    with pytest.raises(StoreError, match="holds another export"):
        export_labels(store_path, tmp_path / "out", labels="full")


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (
            ["export-labels", "STORE", "--out", "o"],
            1,
            "has 3 classes, no more than top5 keeps; pass --labels full",
        ),
        (
            ["export-labels", "STORE", "--out", "o", "--labels", "full", "--views", "9"],
            1,
            "--views is 9",
        ),
        (
            ["import-labels", "nowhere", "--data", "DATA", "--store", "s"],
            1,
            "there is no folder nowhere",
        ),
        (
            ["import-labels", "DATA", "--data", "DATA", "--store", "s"],
            1,
            "has no label file for any of the 90 images",
        ),
        (
            ["import-labels", "x", "--format", "tinyvit", "--data", "DATA", "--store", "s"],
            1,
            "its teachers saw pictures after RandAugment",
        ),
        (
            ["import-labels", "x", "--format", "relabel", "--data", "DATA", "--store", "s"],
            2,
            "must be fkd or ml-dr (tinyvit can't be replayed exactly)",
        ),
        (
            ["import-labels", "x", "--codec", "pow", "--data", "DATA", "--store", "s"],
            2,
            "did you mean pow8?",
        ),
    ],
)
def test_wrong_usage_is_one_line(
    store_path, photos, tmp_path, monkeypatch, arguments, status, says
):
    monkeypatch.chdir(tmp_path)
    got, _, err = run(
        *(str({"STORE": store_path, "DATA": photos}.get(word, word)) for word in arguments)
    )
    assert got == status and says in err


def test_files_that_a_disk_takes_for_one_are_refused(tmp_path):
    """The disk here tells upper from lower case, so the note is there in both."""
    files = {"a/One.jpg": "train/a/One.tar", "a/one.jpg": "train/a/one.tar"}
    export_labels_module._require_apart(tmp_path, files)
    (tmp_path / export_labels_module.NOTE.upper()).touch()
    with pytest.raises(StoreError, match="takes a/One.jpg and a/one.jpg for one"):
        export_labels_module._require_apart(tmp_path, files)
    export_labels_module._require_apart(tmp_path, {"a/x.jpg": "x.tar", "a/y.jpg": "y.tar"})


def test_mixed_pictures_are_not_exported(photos, recipe, tmp_path):
    from support.stages import generate

    mixed = changed(recipe, crops={"views": 1, "cutmix": {"prob": 1.0, "beta": 1.0}})
    generate(mixed, photos, tmp_path / "m.zarr", device=CPU)
    with pytest.raises(StoreError, match="don't say what was mixed"):
        export_labels(tmp_path / "m.zarr", tmp_path / "out", labels="full")


def test_memory_decides_how_many_views_are_held(imported, published, photos, tmp_path, monkeypatch):
    """The store is the same for any group of views."""
    monkeypatch.setattr(import_labels_module, "AT_ONCE", 1)
    import_labels(
        published, photos, tmp_path / imported.name, codec="float32", teachers=["somebody's b4"]
    )
    assert tree(tmp_path / imported.name) == tree(imported)
