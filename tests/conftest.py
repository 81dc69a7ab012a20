"""Real parts for tests: JPEGs cut from two real photographs, tiny timm models with
weights on disk, and a finished label store."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from cache.format import schema, seal
from cache.format.codec import Codec
from cache.format.manifest import Images
from pipeline import config_file
from pipeline.config import Config
from pipeline.runs.curves import Curves

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CPU = torch.device("cpu")
CLASSES = ("ant", "bee", "cat")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real ImageNet photographs and weights, which only the authors' workplace has."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared/data (ImageNet photographs and weights), which is not here")
    return SHARED


@pytest.fixture(autouse=True, scope="session")
def no_pictures() -> Iterator[Callable]:
    """Drawing its curves takes a third of a second at the end of every training. The
    tests of curves draw, and so does every process of its own."""
    draw = Curves._draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curves, "_draw", lambda self, metrics: None)
        yield draw


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For matrices that are too small for more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def write_photos(folder: Path, per_class: int, seed: int = 0) -> Path:
    """Tiles of scikit-learn's two sample photographs as JPEGs of many sizes, in class
    folders."""
    rng = np.random.default_rng(seed)
    photos = load_sample_images().images
    for c, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            photo = (
                photos[c] if c < 2 else photos[i % 2][..., ::-1]
            )  # the temple, the flower, and either in false colours
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
    """A tiny timm model with random weights and a head strong enough that its softmax
    isn't flat."""
    torch.manual_seed(seed)
    module = timm.create_model(model, num_classes=classes, **options)
    head = module.get_classifier()
    with torch.no_grad():
        head.weight.mul_(50)
    safetensors.torch.save_file(module.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """data/train with 3 × 30 photographs and data/val with 3 × 7."""
    data = tmp_path_factory.mktemp("photos")
    write_photos(data / "train", 30)
    write_photos(data / "val", 7, seed=1)
    return data


@pytest.fixture(scope="session")
def teachers(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """Two tiny teachers of different input size and normalisation, as a config lists
    them."""
    folder = tmp_path_factory.mktemp("teachers")
    return [
        {
            "model": "test_resnet",
            "checkpoint": str(write_teacher(folder / "a.safetensors", "test_resnet", 1)),
            "image_size": 64,
        },
        {
            "model": "test_efficientnet",
            "checkpoint": str(write_teacher(folder / "b.safetensors", "test_efficientnet", 2)),
            "image_size": 48,
        },
    ]


@pytest.fixture(scope="session")
def recipe(teachers: list[dict]) -> Config:
    """A small recipe: two views, shards of 32 rows, a student without BatchNorm."""
    return config_file.validate(
        {
            "teachers": teachers,
            "crops": {"views": 2},
            "store": {"shard_rows": 32, "batch_size": 16},
            "render": {"threads": 2},
            "student": {"model": "test_vit", "pretrained": False, "image_size": 32},
            "train": {
                "image_size": 32,
                "epochs": 2,
                "batch_size": 16,
                "lr": 0.01,
                "milestones": [1],
            },
        },
        "test",
    )


@pytest.fixture(scope="session")
def store_path(photos: Path, recipe: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of the photographs: two views, three shards each."""
    from support.stages import generate

    path = tmp_path_factory.mktemp("store") / "labels.zarr"
    generate(recipe, photos, path, device=CPU)
    return path


SHORT = (
    "--set=train.epochs=2",
    "--set=train.milestones=[]",
    "--set=crops.views=2",
)  # of the demo; in full it is a minute and a half


@pytest.fixture(scope="session")
def short_demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo's folder, and what it printed as JSON."""
    from test_cli import run

    folder = tmp_path_factory.mktemp("story") / "demo"
    status, out, err = run("demo", "--out", folder, "--json", "--device", "cpu", *SHORT)
    assert status == 0, err
    return folder, out


def changed(recipe: Config, **sections: dict) -> Config:
    """The recipe with some values of some sections replaced."""
    document = recipe.model_dump(mode="json", exclude_unset=True)
    for section, values in sections.items():
        document[section] = document.get(section, {}) | values
    return Config.model_validate(document)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {
        os.path.relpath(os.path.join(place, name), folder): Path(place, name).read_bytes()
        for place, _, names in os.walk(folder)
        for name in names
    }


def edit_store(path: Path, edit: Callable[[dict], object]) -> None:
    """Change a store's attributes as the program that made it would have written them:
    sealed."""
    document = json.loads((path / "zarr.json").read_text())
    edit(document["attributes"])
    (path / "zarr.json").write_text(json.dumps(document))
    seal.write_seal(path, seal.read_metadata(path, schema.shard_arrays(document["attributes"])[1:]))


def toy_provenance(codec: Codec, images: Images, layout: dict) -> dict:
    """As a real store's, for one that no teacher has labelled."""
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
