"""Labels and evaluation on real ImageNet photographs with real weights, where a machine
has them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from support.small import CPU
from support.stages import evaluate, generate, scan
from torchvision.transforms import functional as F

from cache.format.codec import divergence
from pipeline import config_file
from pipeline.config import ModelSpec
from pipeline.models import names, weights


def spec(shared: Path, i: int) -> ModelSpec:
    return ModelSpec(
        model=f"tf_efficientnet_lite{i}",
        checkpoint=str(shared / "weights" / f"tf_efficientnet_lite{i}.safetensors"),
    )


@pytest.fixture(scope="module")
def sample(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every tenth class of the sample: 50 photographs."""
    folder = tmp_path_factory.mktemp("imagenet")
    for place in sorted((shared / "imagenet_sample").iterdir())[::10]:
        shutil.copytree(place, folder / place.name)
    return folder


def test_labels_equal_pillow_timm_and_torch_by_hand(shared, sample, tmp_path):
    """Decoder, resizer and code are others, and the pixels are the same: labels differ
    by the rounding of float32 alone."""
    recipe = config_file.validate({"store": {"batch_size": 25, "codec": "float32"}}, "test")
    recipe = recipe.model_copy(update={"teachers": (spec(shared, 1), spec(shared, 2))})
    store = generate(
        recipe, sample, tmp_path / "s.zarr", classes=names.imagenet_classes(), device=CPU
    )
    rows = np.arange(12)
    total = 0
    for i, size in ((1, 240), (2, 260)):
        module = timm.create_model(
            f"tf_efficientnet_lite{i}", checkpoint_path=spec(shared, i).checkpoint
        ).eval()
        for_model = []
        for path, (top, left, height, width), flip in zip(
            store.images.path[rows], *store.crops(0, rows), strict=True
        ):
            picture = Image.open(sample / path).convert("RGB")
            crop = picture.crop((left, top, left + width, top + height))
            for shape in ((size, height), (size, size)):
                crop = crop.resize(shape, Image.Resampling.BILINEAR)
            for_model.append(
                F.normalize(F.to_tensor(F.hflip(crop) if flip else crop), [0.5] * 3, [0.5] * 3)
            )
        with torch.no_grad():
            total = total + module(torch.stack(for_model)).softmax(1).numpy() / 2
    kl, tv = divergence(total, store.probabilities(0, rows))
    assert kl.max() < 1e-6 and tv.max() < 1e-5


def test_top_1_is_what_timms_own_transform_gives(shared, sample):
    model = weights.load(spec(shared, 0))
    manifest = scan(sample, names.imagenet_classes(), exif="ignore")
    result = evaluate([model], sample, manifest, 1000, device=CPU, batch_size=16)["models"][0]
    transform = timm.data.create_transform(
        input_size=224, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=0.875
    )
    with torch.no_grad():
        logits = torch.cat(
            [
                model.module(transform(Image.open(sample / p).convert("RGB"))[None])
                for p in manifest.path
            ]
        )
    target = torch.from_numpy(manifest.class_index.astype(np.int64))
    theirs = 100 * (logits.argmax(1) == target).double().mean().item()
    assert result["top1"] == theirs > 75
    # Pillow 13 resizes the columns of some images first, which moves some pixels by a
    # level.
    assert result["loss"] == pytest.approx(
        torch.nn.functional.cross_entropy(logits, target).item(), abs=1e-3
    )
