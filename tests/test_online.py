"""Online training, teachers live in the loop, is what training from a store is measured against."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import CPU, changed, write_photos
from safetensors.torch import load_file

from pipeline.config import Config
from pipeline.generate import generate
from pipeline.student import train

# The same batch cut: 96 photographs, in shards of 32, in batches of 16. (At odd sizes a row's last bit depends on its place in the batch.)
CUT = {"store": {"codec": "float32", "shard_rows": 32, "batch_size": 16}, "train": {"batch_size": 16, "epochs": 4, "milestones": [3]}}
VARIANTS = {
    "plain": {},
    "discriminator": {"train": {"discriminator": {"lr": 0.01}}},
    "reversed discriminator": {"train": {"discriminator": {"lr": 0.01, "reversal": True}}},
    "CutMix": {"crops": {"cutmix": {}}},
    "two crops per image": {"train": {"crops_per_image": 2, "batch_size": 32}},
    "CutMix, two crops per image": {"crops": {"cutmix": {"prob": 0.7, "beta": 0.5}}, "train": {"crops_per_image": 2, "batch_size": 32}},
    "cosine, warm-up, temperatures, hard label": {
        "train": {"schedule": "cosine", "warmup_epochs": 1, "label_temperature": 2.0, "student_temperature": 1.5, "hard_weight": 0.25}
    },
}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = tmp_path_factory.mktemp("even")
    write_photos(data / "train", 32)
    write_photos(data / "val", 7, seed=1)
    return data


def merged(recipe: Config, *layers: dict) -> Config:
    for layer in layers:
        recipe = changed(recipe, **layer)
    return recipe


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_with_a_float32_store_the_offline_student_is_the_online_student_bit_for_bit(photos, recipe, tmp_path, variant):
    offline = merged(recipe, CUT, variant)
    generate(offline, photos, tmp_path / "labels.zarr", device=CPU)
    from_store = train(offline, photos, tmp_path / "offline", store=tmp_path / "labels.zarr", device=CPU)
    live = train(changed(offline, train={"online": True}), photos, tmp_path / "online", device=CPU)
    ours, theirs = (load_file(tmp_path / run / "last.safetensors") for run in ("offline", "online"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs) and ours.keys() == theirs.keys()
    timing = ("seconds", "images_per_second")
    assert {k: v for k, v in from_store.items() if k not in timing} == {k: v for k, v in live.items() if k not in timing}
