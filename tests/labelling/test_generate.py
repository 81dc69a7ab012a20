"""Stage one: labels are the mean softmax of the teachers, and a store can be stopped,
continued, extended and shared."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from support.paths import ROOT
from support.small import CPU, edit_store, tree, write_photos, write_teacher
from support.stages import crop_renderer, generate

from cache import LabelStore, StoreError
from cache.errors import MealError
from cache.format.codec import divergence
from cache.format.codec_bounds import max_error
from cache.system.claims import claims_of
from cache.verify import verify
from pipeline.config import Config, ModelSpec
from pipeline.images.class_names import read_class_map
from pipeline.images.patience import DataError
from pipeline.models.model import ModelError


def by_hand(
    store: LabelStore, teachers: list[dict], folder: Path, view: int, rows: np.ndarray
) -> np.ndarray:
    """Compute the mean softmax by timm and torch alone, on crops that DALI rendered one
    at a time."""
    boxes, flips = store.crops(view, rows)
    total = 0
    for teacher in teachers:
        size = teacher["image_size"]
        module = timm.create_model(
            teacher["model"], num_classes=store.classes, checkpoint_path=teacher["checkpoint"]
        ).eval()
        mean, std = (
            torch.tensor(module.pretrained_cfg[key])[:, None, None] for key in ("mean", "std")
        )
        renderer = crop_renderer([size], 1, 1, interpolation="bilinear", exif="ignore", threads=1)
        crops = [
            renderer(
                [(folder / store.images.path[row]).read_bytes()],
                boxes[None, i : i + 1],
                flips[None, i : i + 1],
            )[0][size][0]
            for i, row in enumerate(rows)
        ]
        x = torch.stack([(crop.permute(2, 0, 1) / 255 - mean) / std for crop in crops])
        with torch.no_grad():
            total = total + module(x).softmax(dim=1)
    return (total / len(teachers)).numpy()


@pytest.mark.parametrize("codec", ["pow8", "float32"])
def test_a_stored_label_is_the_mean_softmax_of_the_teachers_within_the_stated_error(
    photos, recipe, teachers, tmp_path, codec
):
    changed = recipe.model_copy(update={"store": recipe.store.model_copy(update={"codec": codec})})
    store = generate(changed, photos, tmp_path / "s.zarr", device=CPU)
    rows = np.array([0, 1, 31, 32, 40, 89])
    kl, tv = divergence(
        by_hand(store, teachers, photos / "train", 1, rows), store.probabilities(1, rows)
    )
    most_kl, most_tv = max_error(store.codec, store.classes)
    assert kl.max() <= most_kl and tv.max() <= most_tv
    if codec == "float32":
        assert tv.max() < 1e-5  # only the order of float additions differs
    other, _ = divergence(store.probabilities(0, rows), store.probabilities(1, rows))
    assert other.max() > 10 * most_kl  # the comparison would notice labels of other crops


def test_running_again_touches_nothing_that_is_done(photos, recipe, store_path):
    before = {path: os.stat(store_path / path).st_mtime_ns for path in tree(store_path)}
    generate(recipe, photos, store_path, device=CPU)
    assert {path: os.stat(store_path / path).st_mtime_ns for path in tree(store_path)} == before


def test_more_views_extend_a_store_to_what_one_run_would_have_made(
    photos, recipe, store_path, tmp_path
):
    grown = tmp_path / "grown.zarr"
    shutil.copytree(store_path, grown)
    more = recipe.model_copy(update={"crops": recipe.crops.model_copy(update={"views": 5})})
    generate(more, photos, grown, device=CPU)
    generate(more, photos, tmp_path / "whole.zarr", device=CPU)
    assert tree(grown) == tree(tmp_path / "whole.zarr")
    assert LabelStore.open(grown).progress() == (15, 15)


def test_fewer_views_never_shrink_a_store(photos, recipe, store_path):
    fewer = recipe.model_copy(update={"crops": recipe.crops.model_copy(update={"views": 1})})
    assert generate(fewer, photos, store_path, device=CPU).views == 2


def test_two_workers_make_the_store_of_one(photos, recipe, store_path, tmp_path):
    path = tmp_path / "s.zarr"
    generate(recipe, photos, path, device=CPU, worker=(0, 2))
    done, total = LabelStore.open(path).progress()
    assert 0 < done < total
    with pytest.raises(StoreError, match="is not finished"):
        LabelStore.open(path).probabilities(1, slice(0, 90))
    generate(recipe, photos, path, device=CPU, worker=(1, 2))
    assert tree(path) == tree(store_path)
    assert not path.with_name("s.zarr.claims").exists()


def command(photos: Path, path: Path, teachers: list[dict], config: Path) -> list[str]:
    chosen = [f"--teacher={t['model']}={t['checkpoint']}" for t in teachers]
    sizes = [f"--set=teachers.{i}.image_size={t['image_size']}" for i, t in enumerate(teachers)]
    return [
        sys.executable,
        str(ROOT / "cli.py"),
        "generate-labels",
        f"--config={config}",
        f"--data={photos}",
        f"--store={path}",
        *chosen,
        *sizes,
    ]


def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(
    photos, recipe, teachers, store_path, tmp_path
):
    config = tmp_path / "recipe.yaml"
    config.write_text(recipe.to_yaml())
    run = command(photos, tmp_path / "s.zarr", teachers, config)
    killed_with = []
    for _ in range(40):
        process = subprocess.Popen(run, stderr=subprocess.PIPE)
        # Wait for one more finished shard than before, then kill: in the middle of the
        # next one, or right after a record.
        before = len(killed_with) and killed_with[-1]
        while process.poll() is None:
            try:
                if LabelStore.open(tmp_path / "s.zarr").progress()[0] > before:
                    break
            except StoreError:
                pass
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stderr.close()
        killed_with.append(LabelStore.open(tmp_path / "s.zarr").progress()[0])
        if killed_with[-1] == 6:
            break
    assert len(killed_with) > 1  # it was killed in between
    generate(recipe, photos, tmp_path / "s.zarr", device=CPU)
    made, wanted = tree(tmp_path / "s.zarr"), tree(store_path)
    assert made == {**wanted, "zarr.json": made["zarr.json"]}
    assert not claims_of(tmp_path / "s.zarr").exists()
    assert LabelStore.open(tmp_path / "s.zarr").provenance == LabelStore.open(store_path).provenance


def test_unusable_files_are_left_out_and_named_and_move_no_other_label(
    photos, recipe, store_path, tmp_path
):
    shutil.copytree(photos / "train", tmp_path / "data")
    good = (tmp_path / "data" / "ant" / "000.jpg").read_bytes()
    bad = {"cut.jpg": good[: len(good) * 9 // 10], "empty.jpg": b"", "notes.txt": b"no image"}
    for name, content in bad.items():
        (tmp_path / "data" / "ant" / name).write_bytes(content)
    with pytest.raises(DataError, match="3 of 93 files are unusable"):
        generate(recipe, tmp_path / "data", tmp_path / "strict.zarr", device=CPU, strict=True)
    assert not (tmp_path / "strict.zarr").exists()
    store = generate(recipe, tmp_path / "data", tmp_path / "s.zarr", device=CPU)
    rows = {path: row for row, path in enumerate(store.images.path)}
    for name in bad:
        assert store.images.reason[rows[f"ant/{name}"]]
        with pytest.raises(StoreError, match=f"ant/{name}.*has no label"):
            store.probabilities(0, [rows[f"ant/{name}"]])
    whole = LabelStore.open(store_path)
    for view in (0, 1):
        same = [rows[path] for path in whole.images.path]
        assert np.array_equal(store.crops(view, same)[0], whole.crops(view, slice(None))[0])
        assert (
            divergence(store.probabilities(view, same), whole.probabilities(view, slice(None)))[
                0
            ].max()
            < 1e-3
        )


def test_an_image_that_changes_later_is_named(photos, recipe, tmp_path):
    shutil.copytree(photos / "train", tmp_path / "data")
    generate(recipe, tmp_path / "data", tmp_path / "s.zarr", device=CPU, worker=(0, 3))
    # an image after the fingerprint's first rows
    victim = tmp_path / "data" / LabelStore.open(tmp_path / "s.zarr").images.path[80]
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    with pytest.raises(DataError, match=f"{victim.name} has changed"):
        generate(recipe, tmp_path / "data", tmp_path / "s.zarr", device=CPU, worker=(2, 3))


def changed(recipe: Config, **sections: dict) -> Config:
    document = recipe.model_dump(mode="json")
    for section, values in sections.items():
        document[section] |= values
    return Config.model_validate(document)


@pytest.mark.parametrize(
    ("sections", "says"),
    [
        ({"crops": {"seed": 1}}, "crops.seed 0, this is 1; use the same crops"),
        ({"crops": {"scale": [0.5, 1.0]}}, r"crops.scale.0 0.08, this is 0.5"),
        ({"store": {"codec": "cbrt8"}}, "codec.name pow8, this is cbrt8"),
        ({"store": {"batch_size": 8}}, "compute.batch_size 16, this is 8"),
        ({"store": {"precision": "bfloat16"}}, "compute.precision float32, this is bfloat16"),
    ],
)
def test_another_recipe_than_the_stores_is_refused(photos, recipe, store_path, sections, says):
    with pytest.raises(StoreError, match=says):
        generate(changed(recipe, **sections), photos, store_path, device=CPU)


def test_other_teachers_than_the_stores_are_refused(photos, recipe, store_path, tmp_path):
    def with_teachers(*specs: ModelSpec) -> Config:
        return recipe.model_copy(update={"teachers": specs})

    first, second = recipe.teachers
    with pytest.raises(
        StoreError, match=r"made with teachers \['test_resnet.*this is \['test_resnet"
    ):
        generate(with_teachers(first), photos, store_path, device=CPU)
    retrained = first.model_copy(
        update={"checkpoint": str(write_teacher(tmp_path / "c.safetensors", "test_resnet", 3))}
    )
    with pytest.raises(
        StoreError, match=r"teachers.0.weights .*…, this is .*…; pass the same teachers"
    ):
        generate(with_teachers(retrained, second), photos, store_path, device=CPU)
    with pytest.raises(StoreError, match="teachers.1.image_size 48, this is 64"):
        generate(
            with_teachers(first, second.model_copy(update={"image_size": 64})),
            photos,
            store_path,
            device=CPU,
        )
    with pytest.raises(ModelError, match="have the same weights"):
        generate(with_teachers(first, first), photos, store_path, device=CPU)
    four = first.model_copy(
        update={
            "checkpoint": str(
                write_teacher(tmp_path / "d.safetensors", "test_resnet", 3, classes=4)
            )
        }
    )
    with pytest.raises(ModelError, match="classes differ"):
        generate(with_teachers(four, second), photos, tmp_path / "s.zarr", device=CPU)
    with pytest.raises(DataError, match="has 3 classes, the teachers have 4; pass --class-map"):
        generate(with_teachers(four), photos, tmp_path / "s.zarr", device=CPU)


def test_another_data_set_than_the_stores_is_refused(photos, recipe, store_path, tmp_path):
    shutil.copytree(photos / "train", tmp_path / "data")
    (tmp_path / "data" / "ant" / "000.jpg").rename(tmp_path / "data" / "ant" / "renamed.jpg")
    with pytest.raises(DataError, match=r"1 of 90 images missing, the first is ant/000.jpg"):
        generate(recipe, tmp_path / "data", store_path, device=CPU)
    with pytest.raises(DataError, match="is not the data set"):
        generate(recipe, write_photos(tmp_path / "others", 30, seed=9), store_path, device=CPU)


def test_a_teacher_that_gives_nan_is_named_with_the_image(photos, recipe, tmp_path):
    weights = write_teacher(tmp_path / "nan.safetensors", "test_resnet", 1)
    from safetensors.torch import load_file, save_file

    tensors = load_file(weights)
    tensors["fc.bias"][0] = float("nan")
    save_file(tensors, weights)
    broken = recipe.model_copy(
        update={"teachers": (recipe.teachers[0].model_copy(update={"checkpoint": str(weights)}),)}
    )
    with pytest.raises(
        ModelError, match=r"teacher test_resnet.* gives no finite output for .*\.jpg"
    ):
        generate(broken, photos, tmp_path / "s.zarr", device=CPU)
    assert LabelStore.open(tmp_path / "s.zarr").progress()[0] == 0


def test_a_class_map_places_a_subset_of_the_classes(photos, recipe, tmp_path):
    weights = write_teacher(tmp_path / "five.safetensors", "test_resnet", 1, classes=5)
    five = recipe.model_copy(
        update={"teachers": (recipe.teachers[0].model_copy(update={"checkpoint": str(weights)}),)}
    )
    (tmp_path / "map.txt").write_text("zebra\nant\nbee\ncow\ncat\n")
    store = generate(
        five,
        photos,
        tmp_path / "s.zarr",
        device=CPU,
        classes=read_class_map(tmp_path / "map.txt"),
    )
    assert store.classes == 5 and set(store.images.class_index) == {1, 2, 4}
    (tmp_path / "map.txt").write_text("zebra\nant\nbee\ncow\ndog\n")
    with pytest.raises(MealError, match=r"1 class folder of no known class \(cat\)"):
        generate(
            five,
            photos,
            tmp_path / "t.zarr",
            device=CPU,
            classes=read_class_map(tmp_path / "map.txt"),
        )


@pytest.mark.parametrize("lost", ["labels/c/1/2/0", "boxes/c/0/0/0", "records/c/1/1/0"])
def test_a_lost_file_is_made_again_to_the_same_bytes_and_only_that_shard(
    photos, recipe, store_path, tmp_path, lost
):
    path = tmp_path / "s.zarr"
    shutil.copytree(store_path, path)
    (path / lost).unlink()
    _, view, shard = lost.replace("/c/", "/").split("/")[:3]
    untouched = {
        name: os.stat(path / name).st_mtime_ns
        for name in tree(path)
        if f"/c/{view}/{shard}" not in name
    }
    assert LabelStore.open(path).progress() == (5, 6)
    generate(recipe, photos, path, device=CPU)
    assert tree(path) == tree(store_path)
    assert {name: os.stat(path / name).st_mtime_ns for name in untouched} == untouched


@pytest.mark.parametrize(("version", "cutmix"), [(1, None), (2, {"prob": 1.0})])
def test_a_store_of_an_earlier_version_is_finished_and_extended(
    photos, recipe, tmp_path, version, cutmix
):
    """Before version 3 a store had no seal, and the length of ``records`` was the
    number of views."""
    path, mixed = tmp_path / "s.zarr", changed(recipe, crops={"cutmix": cutmix})
    generate(mixed, photos, path, device=CPU, worker=(0, 2))
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"]["format_version"] = version
    for later in ("seal", "views", "row_order"):
        del document["attributes"][later]
    (path / "zarr.json").write_text(json.dumps(document))
    generate(mixed, photos, path, device=CPU)
    assert LabelStore.open(path).progress() == (6, 6)
    generate(changed(mixed, crops={"views": 3}), photos, path, device=CPU)
    store = generate(changed(mixed, crops={"views": 3}), photos, tmp_path / "new.zarr", device=CPU)
    old = LabelStore.open(path)
    assert (
        old.progress() == (9, 9)
        and old.attributes["format_version"] == version
        and verify(path).sound
    )
    assert np.array_equal(old.codes(2, slice(None)), store.codes(2, slice(None)))


def test_a_store_without_a_fingerprint_is_refused(photos, recipe, store_path, tmp_path):
    shutil.copytree(store_path, tmp_path / "s.zarr")
    edit_store(tmp_path / "s.zarr", lambda attributes: attributes.pop("fingerprint"))
    with pytest.raises(StoreError, match="it has no fingerprint"):
        generate(recipe, photos, tmp_path / "s.zarr", device=CPU)


def test_a_worker_does_not_wait_for_ever_for_one_that_never_comes(
    photos, recipe, tmp_path, monkeypatch
):
    from pipeline.labelling import coordination as stage_one

    monkeypatch.setattr(stage_one, "PATIENCE", 1.0)
    with pytest.raises(StoreError, match="nobody has begun to create .* start worker 0"):
        generate(recipe, photos, tmp_path / "s.zarr", device=CPU, worker=(1, 2))


@pytest.mark.parametrize("place", ["/dev/null/s.zarr", "file/deeper/s.zarr"])
def test_a_place_below_a_file_is_refused(photos, recipe, tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(StoreError, match="a part of it is a file; choose another --store"):
        generate(recipe, photos, Path(place), device=CPU)
