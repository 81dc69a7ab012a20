"""Make small real parts: photographs, teachers, changed recipes, edited stores."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from cache.format import schema, seal
from cache.format.codec import Codec
from cache.format.manifest import Images
from pipeline.config import Config

CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")


def write_photos(folder: Path, per_class: int, seed: int = 0) -> Path:
    """Write tiles of scikit-learn's two sample photographs as JPEGs of many sizes, in
    class folders."""
    rng = np.random.default_rng(seed)
    photos = load_sample_images().images
    for c, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            # the temple, the flower, and either in false colours
            photo = photos[c] if c < 2 else photos[i % 2][..., ::-1]
            height, width = rng.integers(40, 200, 2)
            top, left = (
                rng.integers(0, photo.shape[0] - height),
                rng.integers(0, photo.shape[1] - width),
            )
            Image.fromarray(photo[top : top + height, left : left + width]).save(
                folder / name / f"{i:03d}.jpg", quality=90
            )
    return folder


def write_teacher(
    path: Path, model: str, seed: int, classes: int = len(CLASSES), **options: int
) -> Path:
    """Save a tiny timm model with random weights and a head strong enough that its
    softmax isn't flat."""
    torch.manual_seed(seed)
    module = timm.create_model(model, num_classes=classes, **options)
    head = module.get_classifier()
    with torch.no_grad():
        head.weight.mul_(50)
    safetensors.torch.save_file(module.state_dict(), path)
    return path


# Options of a short demo. The full demo takes a minute and a half.
SHORT = ("--set=train.epochs=2", "--set=train.milestones=[]", "--set=crops.views=2")


def changed(recipe: Config, **sections: dict) -> Config:
    """Return the recipe with some values of some sections replaced."""
    document = recipe.model_dump(mode="json", exclude_unset=True)
    for section, values in sections.items():
        document[section] = document.get(section, {}) | values
    return Config.model_validate(document)


def tree(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder: relative path → content."""
    return {
        os.path.relpath(os.path.join(place, name), folder): Path(place, name).read_bytes()
        for place, _, names in os.walk(folder)
        for name in names
    }


def edit_store(path: Path, edit: Callable[[dict], object]) -> None:
    """Change a store's attributes and seal them, as the program that made the store
    would have."""
    document = json.loads((path / "zarr.json").read_text())
    edit(document["attributes"])
    (path / "zarr.json").write_text(json.dumps(document))
    seal.write_seal(path, seal.read_metadata(path, schema.shard_arrays(document["attributes"])[1:]))


def toy_provenance(codec: Codec, images: Images, layout: dict) -> dict:
    """Make up a provenance like a real store's, for a store without teachers."""
    return {
        "teachers": [
            {
                "model": "t",
                "weights": "0" * 64,
                "image_size": 32,
                "mean": [0.5] * 3,
                "std": [0.5] * 3,
            }
        ],
        "crops": {
            "scale": [0.08, 1],
            "ratio": [0.75, 1.33],
            "flip": 0.5,
            "seed": 0,
            "interpolation": "bilinear",
            "exif": "ignore",
        },
        "renderer": {"backend": "cpu"},
        "codec": codec.describe(),
        "compute": {"batch_size": 8, "precision": "float32", "device": "cpu"},
        "data": {"manifest": images.manifest_digest()},
        "layout": layout,
    }
