"""What users of timm expect of a training loop: gradients of parts add up to those of
the batch, AdamW and its groups are torch's and timm's, the moving average is timm's,
and a run goes on with all of it as if it had never stopped. The defaults stay the
paper's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file
from support.paths import ROOT
from support.small import CPU, changed
from support.stages import make_replay, stored_labels, train
from timm.utils import ModelEmaV3

from cache import LabelStore
from cache.errors import MealError
from pipeline import config_file
from pipeline.config import Config, ModelSpec, Train
from pipeline.exchange.export_student import export
from pipeline.labelling import cost
from pipeline.models.model import METADATA, ModelError
from pipeline.models.weights import Drop, load
from pipeline.runs.compare import compare
from pipeline.runs.folder import RunFolder
from pipeline.runtime import precision
from pipeline.training.batches import Batch
from pipeline.training.optimizer import restore_optimizer

ONE = {"epochs": 1, "milestones": []}


def run(recipe: Config, photos: Path, store: Path | None, out: Path, **values: object) -> dict:
    """Train an epoch, or as many as ``values`` say, and return its metrics."""
    return train(changed(recipe, train=ONE | values), photos, out, store=store, device=CPU)


def require_same(one: Path, other: Path, name: str = "last", **tolerance: float) -> None:
    mine, theirs = (load_file(folder / f"{name}.safetensors") for folder in (one, other))
    assert mine.keys() == theirs.keys()
    for key, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[key], **({"rtol": 0, "atol": 0} | tolerance))


# Accumulated gradients.


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"cutmix": {"prob": 1.0}},
        {"crops_per_image": 2, "epochs": 2},
        {"discriminator": {"lr": 0.01}},
        {"hard_weight": 0.3, "batch_size": 14},
        {"online": True},
    ],
    ids=["plain", "cutmix", "crops", "discriminator", "hard", "online"],
)
def test_gradients_of_parts_are_those_of_the_batch(photos, recipe, store_path, tmp_path, values):
    store = None if "online" in values else store_path
    figures = [
        run(recipe, photos, store, tmp_path / str(parts), accumulate=parts, **values)
        for parts in (1, 3)
    ]
    require_same(tmp_path / "1", tmp_path / "3", rtol=1e-4, atol=2e-6)
    for key in ("loss", "agreement", "kl", "discriminator_loss", "discriminator_gradient"):
        if figures[0].get(key) is not None:
            assert figures[1][key] == pytest.approx(figures[0][key], rel=1e-4), key


def test_parts_are_what_the_student_sees_at_once(photos, recipe, store_path, tmp_path, monkeypatch):
    from pipeline.training.loop import Learner

    seen: list[int] = []
    forward = Learner.forward

    def noted(learner: Learner, pixels: torch.Tensor, goal: object) -> object:
        seen.append(len(pixels))
        return forward(learner, pixels, goal)

    monkeypatch.setattr(Learner, "forward", noted)
    run(recipe, photos, store_path, tmp_path / "run", accumulate=8)
    assert seen == [2] * 40 + [2] * 5  # five batches of 16, and a last one of 10
    assert sum(seen) == 90


@pytest.mark.parametrize(("total", "views"), [(15, 1), (16, 1), (9, 1), (90, 1), (18, 2), (30, 3)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_has_equally_many_parts(total, views, world):
    """With BatchNorm over all processes another number would wait for ever."""
    images = total // views
    counts = set()
    for share in np.array_split(np.arange(images), world):
        n = len(share) * views
        index = torch.zeros(n, dtype=torch.int64)
        batch = Batch(share, {}, None, index, None, total, world)
        parts = batch.parts(4)
        assert all(part.stop - part.start >= 2 for part in parts)
        assert np.array_equal(np.concatenate([np.arange(n)[part] for part in parts]), np.arange(n))
        counts.add(len(parts))
    assert len(counts) == 1


def test_a_batch_that_every_process_has_whole_is_divided_as_one():
    index = torch.zeros(7, dtype=torch.int64)
    batch = Batch(np.arange(7), {}, None, index, None, total=7, world=4, copies=4)
    assert batch.parts(3) == [slice(0, 2), slice(2, 4), slice(4, 7)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"accumulate": 9}, r"train.accumulate must leave two crops in each part .* \(16\), got 9"),
        ({"betas": [0.9, 1.0]}, r"train.betas must be two numbers from 0 to below 1, got"),
    ],
)
def test_impossible_values_are_refused(recipe, values, message):
    with pytest.raises(ValueError, match=message):
        changed(recipe, train=values)


# Optimizer, groups, clipping.


def by_hand(recipe: Config, photos: Path, store: Path) -> tuple[torch.nn.Module, ModelEmaV3, list]:
    """Train an epoch in plain torch and timm, with AdamW, clipping and an average."""
    module = load(recipe.student, classes=3, image_size=32, seed=0).module.train()
    groups = timm.optim.param_groups_weight_decay(
        module, 0.1, no_weight_decay_list=module.no_weight_decay()
    )
    optimizer = torch.optim.AdamW(groups, lr=0.01, betas=(0.8, 0.95))
    average, norms = ModelEmaV3(module, decay=0.9, use_warmup=True), []
    labels = LabelStore.open(store)
    replay = make_replay(
        stored_labels(labels, 2),
        photos / "train",
        sizes=[32],
        batch_size=16,
        seed=0,
        rendering=recipe.render,
    )
    with replay.epoch(0) as batches:
        for step, batch in enumerate(batches, 1):
            p = torch.from_numpy(labels.probabilities(0, batch.rows))
            x = (batch.pixels[32].permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(module(x), p).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(module.parameters(), 1.5).item())
            optimizer.step()
            average.update(module, step=step)
    return module, average, norms


def test_adamw_clipping_and_the_average_are_those_of_torch_and_timm_by_hand(
    photos, recipe, store_path, tmp_path
):
    how = {"optimizer": "adamw", "betas": [0.8, 0.95], "weight_decay": 0.1}
    how |= {"decay_norm_and_bias": False, "clip_norm": 1.5, "ema_decay": 0.9}
    figures = run(recipe, photos, store_path, tmp_path / "run", **how)
    module, average, norms = by_hand(recipe, photos, store_path)
    for name, wanted in (("last", module), ("ema", average.module)):
        made = load_file(tmp_path / "run" / f"{name}.safetensors")
        for key, tensor in wanted.state_dict().items():
            torch.testing.assert_close(made[key], tensor, rtol=2e-3, atol=2e-4, msg=f"{name} {key}")
    assert figures["gradient_norm"] == pytest.approx(sum(norms) / len(norms), rel=1e-3)
    clipped = sum(norm > 1.5 for norm in norms)
    assert 0 < clipped <= len(norms)
    assert figures["clipped"] == pytest.approx(100 * clipped / len(norms))


def test_norms_biases_and_what_the_model_names_do_not_decay(recipe):
    student = load(recipe.student, classes=3, image_size=32, seed=0)
    names = {id(p): name for name, p in student.module.named_parameters()}
    decaying, others = ({names[id(p)] for p in group} for group in student.by_decay())
    assert {"pos_embed", "norm.weight", "head.bias"} <= others
    assert {"head.weight", "blocks.0.attn.qkv.weight"} <= decaying
    assert decaying | others == set(names.values())
    assert not decaying & others


def test_a_short_gradient_is_not_clipped(photos, recipe, store_path, tmp_path):
    figures = run(recipe, photos, store_path, tmp_path / "wide", clip_norm=1e6)
    assert (figures["clipped"], figures["gradient_norm"] > 0) == (0, True)
    run(recipe, photos, store_path, tmp_path / "plain")
    require_same(tmp_path / "wide", tmp_path / "plain")


def test_the_discriminator_is_not_clipped_and_has_its_own_rate(
    photos, recipe, store_path, tmp_path
):
    judges = {}
    for name, rate in (("clipped", 0.05), ("still", 1e-12)):
        values = {"discriminator": {"lr": rate}, "clip_norm": 1e-9}
        run(recipe, photos, store_path, tmp_path / name, **values)
        judges[name] = torch.load(tmp_path / name / "state.pt")["discriminator"]
    begun = load(recipe.student, classes=3, image_size=32, seed=0).module.state_dict()
    last = load_file(tmp_path / "clipped" / "last.safetensors")
    for key, tensor in begun.items():  # the student stands still, the discriminator doesn't
        torch.testing.assert_close(last[key], tensor, rtol=0, atol=1e-6)
    for key, tensor in judges["still"].items():
        assert (judges["clipped"][key] - tensor).abs().max() > 1e-3, key


@pytest.mark.parametrize(("saved", "own"), [(True, None), (None, True)])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_a_state_is_restored_for_this_device(kind, saved, own):
    """GPUs fuse the optimizer, CPUs don't; a run may change the device."""
    made, other = (
        kind([torch.ones(3, requires_grad=True)], lr=0.1, fused=fused) for fused in (saved, own)
    )
    made.param_groups[0]["params"][0].grad = torch.ones(3)
    made.step()
    restore_optimizer(other, made.state_dict())
    assert other.param_groups[0]["fused"] is own
    other.param_groups[0]["params"][0].grad = torch.ones(3)
    other.step()


# The moving average.


def test_the_average_is_evaluated_and_saved_beside_the_weights(
    photos, recipe, store_path, tmp_path
):
    out = tmp_path / "run"
    run(recipe, photos, store_path, out, ema_decay=0.99, epochs=3)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for name, key in (("last", "val_top1"), ("ema", "val_top1_ema")):
        with safe_open(out / f"{name}.safetensors", "pt") as file:
            facts = json.loads(file.metadata()[METADATA])
        assert facts["val_top1"] == lines[-1][key]
        assert ("ema_decay" in facts) == (name == "ema")
    best = max(range(3), key=lambda i: (lines[i]["val_top1_ema"], i))
    with safe_open(out / "best_ema.safetensors", "pt") as file:
        assert json.loads(file.metadata()[METADATA])["epoch"] == best
    made = timm.create_model(
        "test_vit", num_classes=3, img_size=32, checkpoint_path=str(out / "ema.safetensors")
    )
    assert made.state_dict().keys() == load_file(out / "last.safetensors").keys()


def test_a_run_that_goes_on_is_the_undisturbed_run(photos, recipe, store_path, tmp_path):
    how = {"optimizer": "adamw", "decay_norm_and_bias": False, "ema_decay": 0.95}
    how |= {"clip_norm": 0.5, "accumulate": 2, "dropout": 0.2, "drop_path": 0.2}
    run(recipe, photos, store_path, tmp_path / "whole", epochs=3, **how)
    for epochs in (1, 3):
        run(recipe, photos, store_path, tmp_path / "parts", epochs=epochs, **how)
    for name in ("last", "best", "ema", "best_ema"):
        require_same(tmp_path / "whole", tmp_path / "parts", name)
    whole, parts = (
        (tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")
    )
    for one, other in zip(whole, parts, strict=True):
        for key in ("loss", "gradient_norm", "clipped", "val_loss_ema"):
            assert json.loads(one)[key] == json.loads(other)[key]


def test_without_the_keys_nothing_of_it_is_there(photos, recipe, store_path, tmp_path):
    figures = run(recipe, photos, store_path, tmp_path / "run")
    assert not {"gradient_norm", "clipped", "val_top1_ema"} & figures.keys()
    assert not list((tmp_path / "run").glob("*ema*"))


# Precision that is left open.


def test_the_papers_recipes_say_float32_and_others_leave_the_precision_open():
    for path in (ROOT / "configs").glob("*.yaml"):
        papers = path.name.startswith("meal_v2_")
        assert (config_file.load(path).train.precision == "float32") == papers, path
    assert Train().precision is None


def test_an_open_precision_is_bfloat16_on_gpus_that_have_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert precision.usual_precision(torch.device("cuda")) == "bfloat16"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert precision.usual_precision(torch.device("cuda")) == "float32"
    assert precision.usual_precision(CPU) == "float32"


def test_a_run_keeps_the_precision_that_it_began_with(photos, recipe, store_path, tmp_path, capfd):
    run(recipe, photos, store_path, tmp_path / "open")
    written = yaml.safe_load((tmp_path / "open" / "config.yaml").read_text())
    assert written["train"]["precision"] == "float32"
    assert "trained in" not in capfd.readouterr().err
    run(recipe, photos, store_path, tmp_path / "half", precision="bfloat16")
    run(recipe, photos, store_path, tmp_path / "half", epochs=2)  # leaves it open
    assert capfd.readouterr().err.count("trained in bfloat16") == 2
    written = yaml.safe_load((tmp_path / "half" / "config.yaml").read_text())
    assert written["train"]["precision"] == "bfloat16"
    del written["train"]["precision"]  # an older version, which always trained in float32
    (tmp_path / "half" / "config.yaml").write_text(yaml.safe_dump(written))
    assert RunFolder(tmp_path / "half").config().train.precision == "float32"


# Dropout and stochastic depth.


def test_dropout_and_drop_path_reach_the_model_and_change_no_evaluation(recipe):
    plain = load(recipe.student, classes=3, image_size=32, seed=0)
    dropping = load(
        recipe.student, classes=3, image_size=32, seed=0, drop=Drop(dropout=0.4, path=0.3)
    )
    assert dropping.module.head_drop.p == 0.4
    assert dropping.module.blocks[-1].drop_path1.drop_prob == pytest.approx(0.3)
    assert plain.digest() == dropping.digest()
    pixels = torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(plain(pixels), dropping(pixels))


def test_a_model_without_drop_path_is_refused_by_name():
    with pytest.raises(ModelError, match=r"vgg11 has no drop_path_rate, and train.drop_path is"):
        load(ModelSpec(model="vgg11", pretrained=False), classes=3, drop=Drop(path=0.1))


# Comparing and exporting.


def test_compare_and_export_know_the_average(photos, recipe, store_path, tmp_path):
    run(recipe, photos, store_path, tmp_path / "plain")
    run(recipe, photos, store_path, tmp_path / "averaged", ema_decay=0.9, optimizer="adamw")
    result = compare([tmp_path / "plain", tmp_path / "averaged"])
    assert result.differences["train.ema_decay"] == {"plain": None, "averaged": 0.9}
    assert result.differences["train.optimizer"] == {"plain": "sgd", "averaged": "adamw"}
    assert [one.best_ema_top1 is None for one in result.runs] == [True, False]
    told = export(tmp_path / "averaged", tmp_path / "out", weights="best_ema", onnx=False)
    assert told["val_top1"] == result.runs[1].best_ema_top1
    require_same_weights = load_file(tmp_path / "out" / "model.safetensors")
    kept = load_file(tmp_path / "averaged" / "best_ema.safetensors")
    assert all(torch.equal(require_same_weights[key], kept[key]) for key in kept)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "moving average of the student's, with decay 0.9" in card
    assert "| optimizer | `adamw` |" in card
    with pytest.raises(MealError, match="plain kept no moving average .* --weights best"):
        export(tmp_path / "plain", tmp_path / "none", weights="ema", onnx=False)


# The recipe of a ViT.


def test_the_vit_recipe_is_marked_as_ours_and_shares_the_papers_store(
    photos, recipe, store_path, tmp_path
):
    path = ROOT / "configs" / "deit_small.yaml"
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    own, papers = (
        config_file.load(path.with_name(name))
        for name in ("deit_small.yaml", "meal_v2_resnet50.yaml")
    )
    assert "OURS" in head[0]
    assert cost.sentence(cost.estimate(own)) in "\n".join(head)
    assert (own.teachers, own.crops, own.store) == (papers.teachers, papers.crops, papers.store)
    assert own.student.model in timm.list_pretrained()
    values = own.train.model_dump(mode="json", exclude_unset=True)
    values |= {"image_size": 32, "epochs": 2, "batch_size": 16, "warmup_epochs": 1}
    figures = run(recipe, photos, store_path, tmp_path / "run", **values)
    assert {"val_top1_ema", "gradient_norm"} <= figures.keys()
