"""Every recipe in configs/ loads, tells its purpose and cost in its head, has models
that exist, and runs one step of both stages."""

from __future__ import annotations

import copy
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import timm
import torch
from support.paths import ROOT
from support.small import CLASSES, CPU, write_photos
from support.stages import generate, train
from torch import nn

from cache import LabelStore
from pipeline import config_file
from pipeline.config import Config, Discriminator, Train
from pipeline.labelling import cost
from pipeline.models import weights
from pipeline.models.names import resolve
from pipeline.runs import checkpoint

RECIPES = sorted((ROOT / "configs").glob("meal_v2_*.yaml"))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Recipe → (student, published top-1 if there is one), from the paper and the authors'
# list of models.
PUBLISHED = {
    "meal_v2_resnet50": ("resnet50", "80.67"),
    "meal_v2_resnet50_380": ("resnet50", "81.72"),
    "meal_v2_resnet50_cutmix": ("resnet50", "80.98"),
    "meal_v2_resnet18": ("resnet18", "73.19"),
    "meal_v2_mobilenetv3_small_075": ("tf_mobilenetv3_small_075", "67.60"),
    "meal_v2_mobilenetv3_small_100": ("tf_mobilenetv3_small_100", "69.65"),
    "meal_v2_mobilenetv3_large_100": ("tf_mobilenetv3_large_100", "76.92"),
    "meal_v2_efficientnet_b0_tf": ("tf_efficientnet_b0", "78.29"),
    "meal_v2_efficientnet_b0": ("efficientnet_b0", "Sec. 3.4"),
    "meal_v2_resnext101_32x32d": ("resnext101_32x32d", "nearest"),
}
each_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def without_weights() -> pytest.MonkeyPatch:
    """The recipes' models with random weights in place of the hub's, each built
    once."""
    built: dict[str, nn.Module] = {}
    create = weights._create

    def random(name: str, *, pretrained: bool, **options: int) -> nn.Module:
        if name not in built:
            torch.manual_seed(len(built))
            built[name] = create(name, pretrained=False, **options)
        return copy.deepcopy(built[name])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_create", random)
        yield patch


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_photos(tmp_path_factory.mktemp("few") / "train", 2).parent


@pytest.fixture(scope="module")
def stores() -> dict:
    """The stores made so far, by teachers and crops, which several recipes share."""
    return {}


def head(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))


def test_every_row_of_the_paper_and_of_the_authors_list_has_a_recipe():
    assert {path.stem for path in RECIPES} == set(PUBLISHED)
    for path in RECIPES:
        student, figure = PUBLISHED[path.stem]
        assert config_file.load(path).student.model.partition(".")[0] == student
        assert figure in head(path)


@each_recipe
def test_a_recipes_head_names_figure_teachers_cost_and_commands(path):
    recipe, text = config_file.load(path), head(path)
    assert "2009.08453" in text and "Teachers: " in text
    for command in ("generate-labels", "train-student"):
        assert (
            f"python cli.py {command}" in text
            and f"--config configs/{path.name} --data IMAGENET --store labels.zarr" in text
        )
    words = " ".join(text.replace("#", " ").split())
    assert cost.sentence(cost.estimate(recipe)) in words


@each_recipe
def test_a_recipe_is_the_papers(path):
    recipe = config_file.load(path)
    for spec in (*recipe.teachers, recipe.student):
        # The name has a tag, and so doesn't depend on timm's default.
        assert resolve(spec.model) == spec.model and spec.model in timm.list_pretrained()
        assert (spec.mean, spec.std) == IMAGENET
    size = recipe.train.image_size
    paper = Train(image_size=size, precision="float32", discriminator=Discriminator())
    assert recipe.train == paper
    assert recipe.crops.views == recipe.train.epochs == 180
    assert (recipe.crops.cutmix is not None) == path.stem.endswith("cutmix")


def test_students_of_one_size_share_one_store():
    shared = [
        config_file.load(path) for path in RECIPES if "store made for one of these" in head(path)
    ] + [config_file.load(RECIPES[0].with_name("meal_v2_resnet50.yaml"))]
    assert len(shared) == 7
    assert len({(r.teachers, r.crops, r.store) for r in shared}) == 1


@pytest.fixture
def memory_given_back() -> Iterator[None]:
    """Give the memory of the largest models back to the system: ten gigabytes, which
    another process of the tests may need."""
    yield
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


@pytest.mark.usefixtures("memory_given_back")
@each_recipe
def test_one_step_of_both_stages_runs(path, few, stores, tmp_path, without_weights, monkeypatch):
    document = config_file.load(path).model_dump(mode="json")
    for spec in document["teachers"]:
        spec["image_size"] = 64
    document["crops"]["views"] = 1
    document["store"] |= {"batch_size": 8}
    document["train"] |= {"image_size": 64, "epochs": 1, "milestones": [], "batch_size": 6}
    tiny = Config.model_validate(document)
    classes = [*CLASSES, *(f"other{i:03d}" for i in range(1000 - len(CLASSES)))]
    labels = stores.setdefault((tiny.teachers, tiny.crops), tmp_path / "labels.zarr")
    if not labels.exists():
        generate(tiny, few, labels, classes=classes, device=CPU)
    store = LabelStore.open(labels)
    assert [t["model"] for t in store.provenance["teachers"]] == [
        spec.model for spec in tiny.teachers
    ]
    assert store.progress() == (1, 1) and store.mixed == path.stem.endswith("cutmix")
    saved = {}
    monkeypatch.setattr(checkpoint, "save_state", lambda path, state: None)  # gigabytes
    monkeypatch.setattr(
        checkpoint, "save_model", lambda path, model, facts: saved.update(model=model)
    )
    metrics = train(tiny, few, tmp_path / "run", store=labels, device=CPU)
    assert saved["model"].name == tiny.student.model and metrics["images"] == 6
    assert 0 < metrics["kl"] < metrics["loss"] and 0 < metrics["discriminator_loss"] < 2
