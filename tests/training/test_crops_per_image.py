"""Several crops of each decoded image in a batch (FKD): crops and labels are those of
one crop at a time, and a run counts epochs in crops."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.small import CPU, changed
from support.stages import drawn_crops, generate, make_replay, scan, stored_labels, train

from cache import LabelStore, StoreError
from cache.errors import MealError
from pipeline import config as configs
from pipeline import config_file
from pipeline.config import Config, ConfigError, CropPolicy, CutMix, Render
from pipeline.images.sources.folder_names import class_folders as class_names
from pipeline.training import schedule
from pipeline.training.batches import Batch, Replay
from pipeline.training.loop import Run
from pipeline.training.source import Source

VIEWS = 3


@pytest.fixture(scope="module")
def path(
    photos: Path, recipe: Config, store_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The photographs' store, extended to three views."""
    path = tmp_path_factory.mktemp("three") / "labels.zarr"
    shutil.copytree(store_path, path)
    generate(changed(recipe, crops={"views": VIEWS}), photos, path, device=CPU)
    return path


@pytest.fixture(scope="module")
def sources(photos: Path, path: Path) -> dict[str, Source]:
    folder = photos / "train"
    names = class_names(folder)
    found = scan(folder, names, exif="ignore", threads=2, order_seed=0)
    mixed = drawn_crops(found, names, CropPolicy(cutmix=CutMix(prob=0.7)), VIEWS, (32, 32))
    return {"plain": stored_labels(LabelStore.open(path), VIEWS), "mixed": mixed}


def replay_of(source: Source, photos: Path, **how: object) -> Replay:
    return make_replay(
        source,
        photos / "train",
        **{"sizes": [32], "batch_size": 12, "seed": 5, "rendering": Render(threads=2)} | how,
    )


def batches(source: Source, photos: Path, epoch: int, **how: object) -> list[Batch]:
    with replay_of(source, photos, **how).epoch(epoch) as made:
        return list(made)


def by_view(batch: Batch, column: torch.Tensor, crops_per_image: int) -> torch.Tensor:
    """Split a batch's column by crop of an image: [crops, …] → [crops per image,
    images, …]. Crop j of image i is at j · images + i."""
    return column.unflatten(0, (crops_per_image, len(batch.rows)))


@pytest.mark.parametrize(("crops_per_image", "epoch"), [(2, 0), (2, 2), (2, 4), (3, 3)])
def test_a_pass_shows_every_image_once_with_labels_of_the_views_that_follow(
    sources, photos, crops_per_image, epoch
):
    source = sources["plain"]
    made = batches(source, photos, epoch, crops_per_image=crops_per_image)
    assert np.array_equal(
        np.sort(np.concatenate([batch.rows for batch in made])), source.images.usable
    )
    assert sum(map(len, made)) == 90 * crops_per_image  # as in so many epochs of one crop
    assert {len(batch) for batch in made[:-1]} == {12}
    for batch in made:
        assert len(batch) == batch.total == crops_per_image * len(batch.rows)
        labels, of_class = (
            by_view(batch, column, crops_per_image).numpy()
            for column in (batch.labels, batch.class_index)
        )
        for j in range(crops_per_image):
            assert np.array_equal(labels[j], source.store.codes((epoch + j) % VIEWS, batch.rows))
            assert np.array_equal(of_class[j], source.images.class_index[batch.rows])


@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_every_crop_has_the_pixels_that_it_has_alone(sources, photos, kind):
    source, alone = sources[kind], np.zeros((VIEWS, 90, 32, 32, 3), np.uint8)
    area, of_class = np.zeros((VIEWS, 90), np.float32), np.zeros((VIEWS, 90), np.int64)
    for view in range(VIEWS):
        for batch in batches(source, photos, view):
            alone[view, batch.rows] = batch.pixels[32].numpy()
            if kind == "mixed":
                area[view, batch.rows], of_class[view, batch.rows] = (
                    batch.mixed.area,
                    batch.mixed.class_index,
                )
    for crops_per_image, epoch, batch_size in ((2, 2, 12), (3, 0, 15), (2, 0, 180)):
        for batch in batches(
            source, photos, epoch, crops_per_image=crops_per_image, batch_size=batch_size
        ):
            views = [(epoch + j) % VIEWS for j in range(crops_per_image)]
            assert np.array_equal(
                by_view(batch, batch.pixels[32], crops_per_image), alone[views][:, batch.rows]
            )
            if kind == "mixed":
                assert np.array_equal(
                    by_view(batch, batch.mixed.area, crops_per_image), area[views][:, batch.rows]
                )
                assert np.array_equal(
                    by_view(batch, batch.mixed.class_index, crops_per_image),
                    of_class[views][:, batch.rows],
                )


@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_images_are_decoded_once_for_all_crops_of_a_batch(sources, photos, kind):
    source, asked = sources[kind], []
    replay = replay_of(source, photos, crops_per_image=3)
    read = replay.read
    replay.read = lambda rows: asked.append(rows) or read(rows)
    with replay.epoch(1) as made:
        shown = [batch.rows for batch in made]
    for rows, needed in zip(shown, asked, strict=True):
        if kind == "plain":
            assert np.array_equal(rows, needed)
        else:  # each partner is decoded once too, for all views in which it is pasted
            wanted = {row for view in range(3) for row in source.mixes(view, rows)[0].tolist()} - {
                -1
            } | set(rows.tolist())
            assert len(needed) == len(wanted) and set(needed.tolist()) == wanted
    assert np.array_equal(np.sort(np.concatenate(shown)), source.images.usable)


@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_every_number_of_processes_sees_the_same_global_batches(sources, photos, kind):
    alone = batches(sources[kind], photos, 1, crops_per_image=3)
    for world in (2, 3):
        ranks = [
            batches(sources[kind], photos, 1, crops_per_image=3, rank=rank, world=world)
            for rank in range(world)
        ]
        for whole, *parts in zip(alone, *ranks, strict=True):
            parts = parts[: world // parts[0].copies]
            assert np.array_equal(whole.rows, np.concatenate([part.rows for part in parts]))
            assert {part.total for part in parts} == {len(whole)}
            for column in (
                lambda batch: batch.pixels[32],
                lambda batch: batch.class_index if kind == "mixed" else batch.labels,
            ):
                got = torch.cat([by_view(part, column(part), 3) for part in parts], dim=1)
                assert torch.equal(by_view(whole, column(whole), 3), got)


# ---- training, which counts epochs in crops


def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Collect the learning rate of every step from now on."""
    seen, step = [], Run._step

    def noting(run: Run, batch: Batch) -> torch.Tensor:
        seen.append(run.optimizer.param_groups[0]["lr"])
        return step(run, batch)

    monkeypatch.setattr(Run, "_step", noting)
    return seen


def test_a_pass_trains_on_the_views_after_the_last_ones(
    photos, recipe, path, tmp_path, monkeypatch
):
    store, shown, step = LabelStore.open(path), [], Run._step

    def noting(run: Run, batch: Batch) -> torch.Tensor:
        labels = by_view(batch, batch.labels, 2).numpy()
        shown.append(
            [
                next(
                    v for v in range(VIEWS) if np.array_equal(labels[j], store.codes(v, batch.rows))
                )
                for j in range(2)
            ]
        )
        return step(run, batch)

    monkeypatch.setattr(Run, "_step", noting)
    how = {"epochs": 4, "crops_per_image": 2, "batch_size": 60}
    train(changed(recipe, train=how), photos, tmp_path / "run", store=path, device=CPU)
    assert shown == [[0, 1]] * 3 + [[2, 0]] * 3


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_epochs_and_milestones_are_counted_in_crops(photos, recipe, path, tmp_path, monkeypatch):
    seen = rates(monkeypatch)
    how = {
        "epochs": 4,
        "crops_per_image": 2,
        "batch_size": 20,
        "milestones": [1, 2, 3],
        "gamma": 0.5,
        "lr": 0.08,
    }
    train(changed(recipe, train=how), photos, tmp_path / "run", store=path, device=CPU)
    passes = lines(tmp_path / "run")
    assert [m["epoch"] for m in passes] == [1, 3]
    assert [m["view"] for m in passes] == [0, 2]
    assert [m["images"] for m in passes] == [180, 180]
    # A pass has nine steps of ten images. From the sixth step on, half of its crops are
    # done (5 · 20 of 180; 4 · 20 are not yet 90).
    assert seen == [0.08] * 5 + [0.04] * 4 + [0.02] * 5 + [0.01] * 4
    assert [m["lr"] for m in passes] == [0.04, 0.01]


def test_a_milestone_in_the_middle_of_a_pass_comes_after_exactly_so_many_crops(
    photos, recipe, path, tmp_path, monkeypatch
):
    seen = rates(monkeypatch)
    how = {
        "epochs": 3,
        "crops_per_image": 3,
        "batch_size": 30,
        "milestones": [1, 2],
        "gamma": 0.5,
        "lr": 0.08,
    }
    train(changed(recipe, train=how), photos, tmp_path / "run", store=path, device=CPU)
    assert seen == [0.08] * 3 + [0.04] * 3 + [0.02] * 3  # 90 crops an epoch, 30 a step


def test_a_run_resumed_between_passes_ends_with_the_same_bytes(photos, recipe, path, tmp_path):
    how = {"epochs": 4, "crops_per_image": 2, "milestones": [3]}
    train(changed(recipe, train=how), photos, tmp_path / "whole", store=path, device=CPU)
    for epochs in (2, 4):
        train(
            changed(recipe, train=how | {"epochs": epochs}),
            photos,
            tmp_path / "parts",
            store=path,
            device=CPU,
        )
    for name in ("last.safetensors", "best.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()
    timing = ("seconds", "images_per_second")
    whole, parts = (
        [{k: v for k, v in m.items() if k not in timing} for m in lines(tmp_path / run)]
        for run in ("whole", "parts")
    )
    assert whole == parts


# ---- refusals


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (
            {"batch_size": 15},
            r"train.batch_size counts crops and must be a multiple of train.crops_per_image \(2\), "
            r"twice it at least, got 15",
        ),
        (
            {"batch_size": 2},
            r"train.batch_size .* a multiple of train.crops_per_image \(2\), "
            r"twice it at least, got 2",
        ),
        (
            {"epochs": 3},
            r"train.epochs must be a multiple of train.crops_per_image \(2\), .*, got 3",
        ),
        ({"crops_per_image": 0}, "train.crops_per_image must be at least 1, got 0"),
    ],
)
def test_batches_and_epochs_that_crops_per_image_does_not_divide_are_refused(values, says):
    with pytest.raises(ConfigError, match=says) as refusal:
        config_file.validate(
            {"train": {"crops_per_image": 2, "batch_size": 16, "epochs": 4} | values}, "test"
        )
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("views", "there"), [(None, 3), (2, 2)])
def test_more_crops_of_an_image_than_views_are_refused(
    photos, recipe, path, tmp_path, views, there
):
    asks = changed(
        recipe,
        train={
            "crops_per_image": 4 if views is None else 3,
            "batch_size": 12,
            "epochs": 12,
            "views": views,
        },
    )
    repair = (
        f"extend it with generate-labels --views {there + 1}"
        if views is None
        else "raise train.views"
    )
    says = (
        rf"crops_per_image is {there + 1}, but the run replays {there} of .*'s views; "
        rf"{repair}, or lower train.crops_per_image$"
    )
    with pytest.raises(StoreError, match=says) as refusal:
        train(asks, photos, tmp_path / "run", store=path, device=CPU)
    assert "\n" not in str(refusal.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("how", [{"online": True}, {"labels": "hard"}])
def test_more_crops_of_an_image_than_views_are_refused_without_a_store_too(
    photos, recipe, tmp_path, how
):
    """Otherwise a batch would hold the same crop several times."""
    asks = changed(recipe, crops={"views": 1}, train={"crops_per_image": 2, "views": 1} | how)
    with pytest.raises(MealError, match="crops_per_image is 2"):
        train(asks, photos, tmp_path / "run", device=CPU)


# ---- the schedule


def recipe_of(**values: object) -> configs.Train:
    return config_file.validate({"epochs": 10} | values, "test", configs.Train)


def test_the_step_schedule_by_hand():
    step = recipe_of(milestones=[3, 6], gamma=0.1)
    for epoch, factor in (
        (0, 1),
        (2.99, 1),
        (3, 0.1),
        (3.5, 0.1),
        (5.99, 0.1),
        (6, 0.01),
        (9.9, 0.01),
    ):
        assert schedule.factor(step, epoch, epoch) == pytest.approx(factor)
    assert schedule.factor(recipe_of(milestones=[]), 9, 9) == 1


def test_the_cosine_schedule_by_hand():
    cosine = recipe_of(schedule="cosine", milestones=[3])
    for epoch, factor in (
        (0, 1),
        (2.5, (1 + math.sqrt(0.5)) / 2),
        (5, 0.5),
        (7.5, (1 - math.sqrt(0.5)) / 2),
        (10, 0),
    ):
        assert schedule.factor(cosine, epoch, epoch) == pytest.approx(factor, abs=1e-12)


def test_warming_up_is_a_straight_line_from_zero_on_top_of_either_schedule():
    for epoch, rise in ((0, 0), (0.5, 0.25), (1.5, 0.75), (2, 1), (4, 1)):
        for name in ("step", "cosine"):
            plain, warm = (
                recipe_of(schedule=name, milestones=[1], gamma=0.5, warmup_epochs=w) for w in (0, 2)
            )
            assert schedule.factor(warm, epoch, epoch) == pytest.approx(
                rise * schedule.factor(plain, epoch, epoch)
            )
    assert schedule.factor(
        recipe_of(milestones=[1], gamma=0.5, warmup_epochs=2), 1.5, 1.5
    ) == pytest.approx(0.375)
