"""Online training, with live teachers in the loop, is the measure of training from a
store: a float32 store makes the same student, bit for bit."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from support.small import CPU, changed
from support.stages import generate, train

from pipeline.config import Config
from pipeline.models.model import Model
from pipeline.runs.folder import RunError

# Teachers have batches of 16 in both ways, with the last batch of a shard or an epoch
# filled up. (At odd batch sizes a row's last bit depends on its place.)
CUT = {
    "store": {"codec": "float32", "shard_rows": 32, "batch_size": 16},
    "train": {"batch_size": 16, "epochs": 4, "milestones": [3], "views": 2},
}
VARIANTS = {
    "plain": {},
    "discriminator": {"train": {"discriminator": {"lr": 0.01}}},
    "reversed discriminator": {"train": {"discriminator": {"lr": 0.01, "reversal": True}}},
    "CutMix": {"crops": {"cutmix": {}}},
    "two crops per image": {"train": {"crops_per_image": 2, "batch_size": 32}},
    "CutMix, two crops per image": {
        "crops": {"cutmix": {"prob": 0.7, "beta": 0.5}},
        "train": {"crops_per_image": 2, "batch_size": 32},
    },
    "cosine, warm-up, temperatures, hard label": {
        "train": {
            "schedule": "cosine",
            "warmup_epochs": 1,
            "label_temperature": 2.0,
            "student_temperature": 1.5,
            "hard_weight": 0.25,
        }
    },
}


def merged(recipe: Config, *layers: dict) -> Config:
    for layer in layers:
        recipe = changed(recipe, **layer)
    return recipe


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_with_a_float32_store_the_offline_student_is_the_online_student_bit_for_bit(
    photos, recipe, tmp_path, variant
):
    offline = merged(recipe, CUT, variant)
    generate(offline, photos, tmp_path / "labels.zarr", device=CPU)
    from_store = train(
        offline, photos, tmp_path / "offline", store=tmp_path / "labels.zarr", device=CPU
    )
    live = train(changed(offline, train={"online": True}), photos, tmp_path / "online", device=CPU)
    ours, theirs = (load_file(tmp_path / run / "last.safetensors") for run in ("offline", "online"))
    assert (
        all(torch.equal(ours[name], theirs[name]) for name in theirs)
        and ours.keys() == theirs.keys()
    )
    timing = ("seconds", "images_per_second")
    assert {k: v for k, v in from_store.items() if k not in timing} == {
        k: v for k, v in live.items() if k not in timing
    }


def test_online_training_sees_a_fresh_crop_in_every_epoch_unless_told_otherwise(
    photos, recipe, tmp_path, capsys
):
    assert (
        train(
            changed(recipe, train={"online": True, "epochs": 3}),
            photos,
            tmp_path / "fresh",
            device=CPU,
        )["view"]
        == 2
    )
    assert "replay" not in capsys.readouterr().err
    assert (
        train(
            changed(recipe, train={"online": True, "epochs": 3, "views": 1}),
            photos,
            tmp_path / "one",
            device=CPU,
        )["view"]
        == 0
    )
    assert "3 epochs replay 1 views: each comes up to 3 times" in capsys.readouterr().err


def test_online_training_goes_on_with_the_same_teachers_alone(photos, recipe, tmp_path):
    online = changed(recipe, train={"online": True, "epochs": 1})
    train(changed(online, train={"epochs": 2}), photos, tmp_path / "whole", device=CPU)
    train(online, photos, tmp_path / "run", device=CPU)
    for other, says in (
        (
            {"store": {"batch_size": 8}},
            r"was started with compute.batch_size 16, this is 8; pass the same to go on",
        ),
        ({"store": {"codec": "float16"}}, r"was started with codec.name pow8, this is float16"),
        ({"crops": {"scale": [0.2, 1.0]}}, r"was started with crops.scale"),
    ):
        with pytest.raises(RunError, match=says):
            train(changed(online, **other), photos, tmp_path / "run", device=CPU)
    fewer = changed(online, train={"epochs": 2}).model_copy(
        update={"teachers": online.teachers[:1]}
    )
    with pytest.raises(
        RunError,
        match=r"was started with teachers \['test_resnet', "
        r"'test_efficientnet'\], this is \['test_resnet'\]",
    ):
        train(fewer, photos, tmp_path / "run", device=CPU)
    train(changed(online, train={"epochs": 2}), photos, tmp_path / "run", device=CPU)
    ours, theirs = (load_file(tmp_path / run / "last.safetensors") for run in ("run", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_teacher_is_given_no_more_than_a_small_batch_of_the_students(
    photos, recipe, tmp_path, monkeypatch
):
    """Only an epoch's last batch is filled up, for any batch size of the store."""
    seen = []
    forward = Model.__call__
    monkeypatch.setattr(
        Model,
        "__call__",
        lambda self, x, *how: (seen.append((self.name, len(x))), forward(self, x, *how))[1],
    )
    large = changed(recipe, store={"batch_size": 64}, train={"online": True, "epochs": 1})
    train(large, photos, tmp_path / "run", device=CPU)
    assert [n for name, n in seen if name == "test_efficientnet"] == [16] * 6  # 90 = 5 × 16 + 10
