"""Evaluation is exact: every image counts once, also in a last partial batch, and each
model has its own size and normalisation."""

from __future__ import annotations

import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from support.small import CPU
from support.stages import centre_renderer, evaluate, scan

from cache.errors import MealError
from pipeline.config import ModelSpec
from pipeline.images.sources.folder_names import class_folders
from pipeline.models.model import Model
from pipeline.models.weights import load


@pytest.fixture(scope="module")
def models(teachers: list[dict]) -> list[Model]:
    return [load(ModelSpec(**teacher)) for teacher in teachers]


def probabilities_one_by_one(models: list[Model], folder, manifest) -> np.ndarray:
    """Compute probabilities of each image alone: float [models, images, classes]."""
    rows = []
    for row in manifest.usable:
        blob = (folder / manifest.path[row]).read_bytes()
        per_model = []
        for model in models:
            look = (model.image_size, model.interpolation)
            pixels = centre_renderer([look], 1, exif="ignore", threads=1)(
                [blob], manifest.height[[row]], manifest.width[[row]]
            )[look]
            with torch.no_grad():
                per_model.append(model(pixels).softmax(dim=1)[0].numpy())
        rows.append(per_model)
    return np.array(rows).transpose(1, 0, 2)


@pytest.mark.parametrize("batch_size", [1, 8, 21, 64])  # of 21 images, 8 leaves a batch of 5
def test_top_1_and_ensemble_are_exact_for_every_batch_size(photos, models, batch_size):
    folder = photos / "val"
    manifest = scan(folder, class_folders(folder), exif="ignore")
    result = evaluate(
        models, folder, manifest, 3, device=CPU, teachers=models[:1], batch_size=batch_size
    )
    p = probabilities_one_by_one(models, folder, manifest)
    target = manifest.class_index[manifest.usable]
    assert result["images"] == len(target) == 21
    for entry, mine in zip(
        [*result["models"], result["ensemble"]], [*p, p.mean(axis=0)], strict=True
    ):
        assert entry["top1"] == pytest.approx(100 * np.mean(mine.argmax(1) == target))
        assert entry["top5"] == 100  # of three classes
        assert entry["loss"] == pytest.approx(-np.log(mine[np.arange(21), target]).mean(), rel=1e-4)
        assert entry["teacher_agreement"] == pytest.approx(
            100 * np.mean(mine.argmax(1) == p[0].argmax(1))
        )
        assert entry["teacher_kl"] == pytest.approx(
            (p[0] * np.log(p[0] / mine)).sum(1).mean(), rel=1e-3, abs=1e-6
        )
    assert result["teachers"]["top1"] == result["models"][0]["top1"]


def test_top_5_counts_the_five_first_of_more_classes():
    from pipeline.evaluation import Figures

    figures = Figures("x")
    p = torch.tensor([[0.3, 0.25, 0.15, 0.1, 0.08, 0.07, 0.05]])
    for target in range(7):
        figures.add(p, torch.tensor([target]), None)
    report = asdict(figures.score())
    assert (report["top1"], report["top5"]) == (pytest.approx(100 / 7), pytest.approx(500 / 7))


def test_an_unusable_image_is_left_out_and_counted(photos, models, tmp_path):
    shutil.copytree(photos / "val", tmp_path / "val")
    (tmp_path / "val" / "ant" / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 nothing")
    manifest = scan(tmp_path / "val", class_folders(tmp_path / "val"), exif="ignore")
    result = evaluate(models[:1], tmp_path / "val", manifest, 3, device=CPU)
    assert (result["images"], result["unusable"]) == (21, 1)


def test_models_of_other_classes_than_the_folder_are_refused(photos, models):
    folder = photos / "val"
    manifest = scan(folder, class_folders(folder), exif="ignore")
    with pytest.raises(MealError, match=r"has 3 classes, .* has 5; pass the --class-map"):
        evaluate(models, folder, manifest, 5, device=CPU)
