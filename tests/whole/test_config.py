"""A config refuses senseless values when it is loaded, with one line that names the
value."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
from support.paths import RECIPES

from pipeline import config_file
from pipeline.config import Config, ConfigError, CropPolicy, ModelSpec, Render, Store, Train
from pipeline.models.names import ALIASES, resolve

CONFIGS = sorted(RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_loads_and_names_models_that_timm_has(path):
    recipe = config_file.load(path)
    for spec in [*recipe.teachers, recipe.student]:
        assert timm.is_model(resolve(spec.model).partition(".")[0])


def test_the_papers_recipe_is_the_papers():
    recipe = config_file.load(next(path for path in CONFIGS if path.stem == "meal_v2_resnet50"))
    train = recipe.train
    assert [t.model for t in recipe.teachers] == ["senet154.gluon_in1k", "resnet152s.gluon_in1k"]
    assert (recipe.student.model, recipe.student.pretrained) == ("resnet50.ram_in1k", True)
    assert (recipe.crops.views, train.epochs, train.batch_size, train.image_size) == (
        180,
        180,
        512,
        224,
    )
    assert (train.lr, train.milestones, train.gamma, train.momentum, train.weight_decay) == (
        0.01,
        (100,),
        0.1,
        0.9,
        0.0,
    )
    assert train.discriminator.lr == 1e-4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(
        "teachers: [{model: resnet18}, {model: resnet50}]\n"
        "crops: {views: 2}\ntrain: {lr: 1e-3, milestones: []}\n"
    )
    return file


def test_overrides_reach_every_depth_and_lists(path):
    settings = [
        "teachers.1.image_size=32",
        "train.lr=5e-4",
        "crops.scale=[0.2, 1]",
        "student.model=resnet10t",
    ]
    recipe = config_file.load(path, {"crops.views": 7}, settings)
    assert (recipe.teachers[1].image_size, recipe.train.lr, recipe.crops.scale) == (
        32,
        5e-4,
        (0.2, 1.0),
    )
    assert (recipe.crops.views, recipe.student.model) == (7, "resnet10t")


def test_1e_3_is_a_number(path):
    assert config_file.load(path).train.lr == 0.001


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("crops.view=2", "crops.view is not known; did you mean views?"),
        ("trian.lr=1", "trian is not known; did you mean train?"),
        ("crops.views=0", "crops.views must be at least 1, got 0"),
        ("crops.views=2.5", "crops.views must be a valid integer.*got 2.5"),
        ("crops.views=many", "crops.views must be a valid integer.*got 'many'"),
        ("crops.views=true", "crops.views must be a valid integer, got True"),
        ("crops.flip=1.5", "crops.flip must be at most 1, got 1.5"),
        (
            "crops.scale=[0.9, 0.1]",
            r"crops.scale must be two numbers above 0, the smaller first, got \[0.9, 0.1\]",
        ),
        ("crops.scale=[0.5, 2]", "crops.scale must not exceed 1"),
        ("crops.views=1000000000", "crops.views must be at most 100000"),
        ("student={model: resnet18, std: [0, 0, 0]}", "student.std must be three numbers above 0"),
        ("train.lr=-1", "train.lr must be above 0, got -1"),
        ("train.lr=.inf", "train.lr must be a finite number, got inf"),
        ("train.milestones=[9, 3]", "train.milestones must be rising epochs"),
        ("train.labels=firm", "train.labels must be 'soft' or 'hard', got 'firm'"),
        ("store.codec=pow9", "store.codec must be one of .* did you mean pow8?"),
        (
            "train.discriminator={learning_rate: 1}",
            "train.discriminator.learning_rate is not known; known are lr",
        ),
        (
            "student={model: resnet18, image_size: 64}",
            "student.image_size is 64; the student's size is train.image_size, 224",
        ),
        ("teachers.2.model=x", "'2' must be a number from 0 to 1"),
        ("train", "must be KEY=VALUE"),
        ("train.lr=[", "is no YAML value"),
        ("crops.views.x=1", "crops.views is a value, not a section"),
        ("teachers=[{modell: x}]", "teachers.0.modell is not known; did you mean model?"),
    ],
)
def test_nonsense_is_refused_by_name(path, setting, says):
    with pytest.raises(ConfigError, match=says) as refusal:
        config_file.load(path, None, [setting])
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_no_config_is_refused(tmp_path):
    for name, content, says in (
        ("a", b"[1, 2]", "must hold sections"),
        ("b", b"{", "is no YAML file"),
        ("c", b"\xff\xfe\x00", "is no YAML file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=says):
            config_file.load(tmp_path / name)
    with pytest.raises(ConfigError, match="can't be read"):
        config_file.load(tmp_path / "nothing.yaml")


def test_a_resolved_config_loads_to_itself(path, tmp_path):
    recipe = config_file.load(path)
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    assert config_file.load(tmp_path / "again.yaml") == recipe


def test_every_field_says_what_it_means():
    for section in (ModelSpec, CropPolicy, Store, Render, Train):
        undocumented = [
            name
            for name, field in section.model_fields.items()
            if not field.description and name not in ("epochs", "gamma", "momentum", "weight_decay")
        ]
        assert undocumented == [], section


def test_the_papers_names_resolve_to_tagged_weights():
    assert resolve("resnet152_v1s") == "resnet152s.gluon_in1k"
    assert resolve("senet154") == "senet154.gluon_in1k"
    assert resolve("resnet50") == "resnet50.ram_in1k"
    known = timm.list_pretrained()
    assert all(name in known for name in ALIASES.values())
    assert Config().store.codec == "pow8"
