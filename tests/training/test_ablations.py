"""The README's switches: each is one change of a command line, runs, and changes the
student."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.paths import ROOT
from support.small import CLASSES, CPU, changed
from support.stages import class_folders, make_targets, train

from pipeline import config_file
from pipeline.config import Config, ConfigError
from pipeline.training import losses
from pipeline.training.batches import Batch, Mixed
from pipeline.training.targets import Targets

README = ROOT / "configs" / "README.md"
SWITCHES = re.findall(
    r"^\|[^|]*\| `(--[^`]*)` \|$",
    README.read_text().split("### Ablations")[1].split("\n### ")[0],
    re.MULTILINE,
)


@pytest.fixture(scope="module")
def base(recipe: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file with a discriminator, as in the paper's recipes, and with a student
    that starts from a checkpoint."""
    document = yaml.safe_load(
        changed(recipe, train={"epochs": 2, "discriminator": {"lr": 0.01}}).to_yaml()
    )
    del document["train"]["cutmix"]
    document["student"] = document["teachers"][0] | {"image_size": None}
    path = tmp_path_factory.mktemp("base") / "base.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def trained(
    base: Path, switch: str, photos: Path, store_path: Path, out: Path
) -> dict[str, torch.Tensor]:
    words = switch.split()
    settings = [words[i + 1] for i, word in enumerate(words) if word == "--set"]
    overrides = {"train.online": True} if "--online" in words else {}
    if "student.pretrained=false" in settings:
        overrides["student"] = {"model": "test_resnet"}
    recipe = config_file.load(base, overrides, settings)
    train(recipe, photos, out, store=None if recipe.train.online else store_path, device=CPU)
    return load_file(out / "last.safetensors")


@pytest.fixture(scope="module")
def unchanged(base, photos, store_path, tmp_path_factory) -> dict[str, torch.Tensor]:
    return trained(base, "", photos, store_path, tmp_path_factory.mktemp("plain") / "run")


def test_the_readme_lists_the_switches():
    assert len(SWITCHES) == 24


@pytest.mark.parametrize("switch", SWITCHES)
def test_each_switch_runs_and_changes_what_is_learned(
    base, unchanged, photos, store_path, tmp_path, switch
):
    weights = trained(base, switch, photos, store_path, tmp_path / "run")
    assert all(torch.isfinite(w).all() for w in weights.values())
    assert any(not torch.equal(weights[name], unchanged[name]) for name in unchanged)


def targets(recipe: Config, **section: object) -> Targets:
    fake = type(
        "NoStore",
        (),
        {"policy": recipe.crops, "codec": None, "data": class_folders(Path(), CLASSES)},
    )()
    return make_targets(changed(recipe, train=section), fake)


def test_the_loss_with_temperatures_and_hard_label_by_hand(recipe):
    p = np.random.default_rng(0).dirichlet(np.ones(3), 4)
    z = np.random.default_rng(1).normal(0, 2, (4, 3))
    folder = np.array([0, 2, 1, 1])

    def log_softmax(x: np.ndarray) -> np.ndarray:
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    softer = p ** (1 / 2.0) / (p ** (1 / 2.0)).sum(axis=1, keepdims=True)
    by_hand = (
        0.7 * -(softer * log_softmax(z / 4.0)).sum(axis=1)
        + 0.3 * -log_softmax(z)[np.arange(4), folder]
    )
    aim = targets(recipe, label_temperature=2.0, student_temperature=4.0, hard_weight=0.3)
    aim.decode = lambda codes: codes
    batch = Batch(
        np.arange(4), {}, torch.tensor(p, dtype=torch.float32), torch.tensor(folder), None, 4
    )
    goal = aim(batch)
    np.testing.assert_allclose(
        aim.loss(torch.tensor(z, dtype=torch.float32), goal).numpy(), by_hand, rtol=1e-5
    )
    np.testing.assert_allclose(goal.soft.numpy(), p, rtol=1e-6)  # KL is reported against p
    np.testing.assert_allclose(losses.temper(torch.tensor(p), 2.0).numpy(), softer, rtol=1e-12)


def test_hard_labels_of_mixed_pictures_are_mixed_by_area(recipe):
    mixed = Mixed(torch.tensor([0.25, 0.0]), torch.tensor([2, 1]), None)
    goal = targets(recipe, labels="hard")(
        Batch(np.arange(2), {}, None, torch.tensor([0, 1]), mixed, 2)
    )
    assert goal.soft is None and goal.hard.tolist() == [[0.75, 0.0, 0.25], [0.0, 1.0, 0.0]]


def test_the_rate_of_every_step_follows_the_schedule(
    photos, recipe, store_path, tmp_path, monkeypatch
):
    seen = []
    step = torch.optim.SGD.step
    monkeypatch.setattr(
        torch.optim.SGD,
        "step",
        lambda self: (seen.append([g["lr"] for g in self.param_groups]), step(self))[1],
    )
    cosine = changed(
        recipe,
        train={
            "epochs": 2,
            "schedule": "cosine",
            "warmup_epochs": 1,
            "milestones": [],
            "discriminator": {"lr": 0.1},
        },
    )
    train(cosine, photos, tmp_path / "run", store=store_path, device=CPU)
    epoch = np.array([e + start / 90 for e in (0, 1) for start in range(0, 90, 16)])
    ends = np.append(epoch[1:], 2.0)
    # Warm-up takes the rate at the end of a step, so that no step is lost at rate zero.
    by_hand = (1 + np.cos(np.pi * epoch / 2)) / 2 * np.minimum(1, ends)
    np.testing.assert_allclose(np.array(seen), by_hand[:, None] * [0.01, 0.1], rtol=1e-12)


def test_a_cosine_run_is_not_prolonged(photos, recipe, store_path, tmp_path):
    from pipeline.runs.folder import RunError

    train(
        changed(recipe, train={"epochs": 1, "schedule": "cosine"}),
        photos,
        tmp_path / "run",
        store=store_path,
        device=CPU,
    )
    with pytest.raises(
        RunError, match=r"was started with train.epochs 1, this is 2; .*choose another --out"
    ):
        train(
            changed(recipe, train={"epochs": 2, "schedule": "cosine"}),
            photos,
            tmp_path / "run",
            store=store_path,
            device=CPU,
        )


def test_a_run_of_an_older_version_goes_on(photos, recipe, store_path, tmp_path):
    """An old config lacks later keys, which have their defaults."""
    train(
        changed(recipe, train={"epochs": 1}), photos, tmp_path / "run", store=store_path, device=CPU
    )
    path = tmp_path / "run" / "config.yaml"
    document = yaml.safe_load(path.read_text())
    for key in (
        "online",
        "crops_per_image",
        "schedule",
        "warmup_epochs",
        "label_temperature",
        "student_temperature",
        "hard_weight",
        "cutmix",
    ):
        del document["train"][key]
    del document["crops"]["cutmix"]
    path.write_text(yaml.safe_dump(document))
    assert (
        train(
            changed(recipe, train={"epochs": 2}),
            photos,
            tmp_path / "run",
            store=store_path,
            device=CPU,
        )["epoch"]
        == 1
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            ["train.discriminator.input=mean_logits"],
            "needs live teachers, since a store holds no logits; "
            "set it to log_mean, or train --online",
        ),
        (["train.labels=hard"], "train.discriminator needs soft labels"),
        (
            ["train.labels=hard", "train.discriminator=null", "train.hard_weight=0.5"],
            "leave it out, or set train.labels=soft",
        ),
        (
            ["train.online=true", "train.labels=hard", "train.discriminator=null"],
            "train.online asks teachers, whose labels are soft",
        ),
        (
            ["crops.cutmix.prob=1", "train.cutmix.prob=1"],
            "would mix every picture twice; set one of them to null",
        ),
        (
            ["train.cutmix.probability=1"],
            "train.cutmix.probability is not known; known are prob, beta",
        ),
        (["train.cutmix.prob=0"], "train.cutmix.prob must be above 0, got 0"),
        (["train.cutmix=true"], "train.cutmix must be a section with keys prob, beta, got True"),
        (["train.hard_weight=1"], "train.hard_weight must be below 1, got 1"),
        (
            ["train.warmup_epochs=3"],
            r"train.warmup_epochs must be at most train.epochs \(2\), got 3",
        ),
        (["train.schedule=cosin"], "train.schedule must be 'step' or 'cosine', got 'cosin'"),
        (["train.label_temperature=0"], "train.label_temperature must be above 0"),
    ],
)
def test_a_switch_that_makes_no_sense_is_refused_with_the_repair(base, settings, says):
    with pytest.raises(ConfigError, match=says) as error:
        config_file.load(base, None, settings)
    assert "\n" not in str(error.value)


def test_a_config_that_asks_for_what_the_store_does_not_hold_is_refused_with_the_repair(
    photos, recipe, store_path, tmp_path
):
    from cache import StoreError

    for section, values, says in (
        (
            "crops",
            {"cutmix": {}},
            r"crops.cutmix is {'prob': 1.0, 'beta': 1.0}, .* was made with null; set it so, leave "
            r"it out, or generate another store; or mix by area with this one: train.cutmix$",
        ),
        (
            "crops",
            {"scale": [0.5, 1.0]},
            r"crops.scale is .* was made with .*; "
            r"set it so, leave it out, or generate another store",
        ),
        ("train", {"views": 3}, "extend it with generate-labels --views 3, or lower train.views"),
        ("train", {"online": True}, "takes no --store; leave one of them out"),
    ):
        with pytest.raises((ConfigError, StoreError), match=says):
            train(
                changed(recipe, **{section: values}),
                photos,
                tmp_path / "run",
                store=store_path,
                device=CPU,
            )
    assert not (tmp_path / "run").exists()
