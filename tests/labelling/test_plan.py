"""The cost of stage one: ``generate-labels --plan`` counts the crops to label, times
the parts of the work, and writes nothing."""

from __future__ import annotations

import os
import shutil

import pytest
from support import stages
from support.command import SMOKE, run
from support.small import CPU, changed, tree, write_teacher
from support.stages import store_facts

from cache import LabelStore
from pipeline.labelling import cost, plan
from pipeline.labelling.cost import BYTES_PER_CROP
from pipeline.labelling.plan import Plan
from pipeline.labelling.plan_page import plan_page
from pipeline.models.model import ModelError


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(plan, "SECONDS", 0.05)


def test_crops_hours_and_bytes_are_those_of_the_store(recipe, photos, store_path, tmp_path):
    told = stages.make_plan(recipe, photos, tmp_path / "s.zarr", device=CPU, workers=4)
    facts = store_facts(store_path)
    assert (
        told["images"] == 90
        and told["crops"] == facts["labelled_crops"] == 180
        and told["shards"] == facts["shards"] == 6
    )
    store = LabelStore.open(store_path)
    files = (
        file
        for name in (*store.shard_arrays, "records")
        for file in (store_path / name / "c").rglob("*")
        if file.is_file()
    )
    assert told["files"] == sum(1 for _ in files)
    assert (
        told["bytes_measured"]
        and 0.5 < told["bytes_per_crop"] / (facts["label_bytes_per_crop"] + 12) < 2
    )
    # On a CPU teachers and loader share the cores.
    assert told["teachers_per_second"] > told["crops_per_second"] < told["loader_per_second"]
    assert told["hours"] == pytest.approx(180 / told["crops_per_second"] / 3600)


def test_what_is_finished_is_not_counted_again(recipe, photos, store_path):
    told = stages.make_plan(changed(recipe, crops={"views": 2}), photos, store_path, device=CPU)
    assert told["finished"] == 1 and told["hours"] == 0


def test_an_extension_is_what_is_counted(recipe, photos, store_path, tmp_path):
    told = stages.make_plan(changed(recipe, crops={"views": 8}), photos, store_path, device=CPU)
    assert told["finished"] == pytest.approx(2 / 8) and told["crops"] == 720 and told["hours"] > 0
    assert told["bytes_left"] == pytest.approx(0.75 * told["store_bytes"])
    assert (
        stages.make_plan(
            changed(recipe, crops={"views": 8}), photos, store_path, device=CPU, first_view=2
        )["finished"]
        == 0
    )


def test_a_store_that_would_be_refused_counts_nothing(recipe, photos, store_path, capsys):
    told = stages.make_plan(
        changed(recipe, store={"codec": "float16"}), photos, store_path, device=CPU
    )
    assert told["finished"] == 0 and "is not counted" in capsys.readouterr().err


def test_bad_images_are_left_out_as_stage_one_leaves_them_out(recipe, photos, tmp_path):
    shutil.copytree(photos / "train", tmp_path / "train")
    good = (tmp_path / "train" / "ant" / "000.jpg").read_bytes()
    (tmp_path / "train" / "ant" / "001.jpg").write_bytes(good[: len(good) // 2])
    (tmp_path / "train" / "ant" / "002.jpg").unlink()
    (tmp_path / "train" / "ant" / "002.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "train" / "ant" / "003a.jpg")
    (tmp_path / "train" / "ant" / os.fsdecode(b"n\xff.jpg")).write_bytes(good)
    assert stages.make_plan(recipe, tmp_path, None, device=CPU)["images"] == 92


def test_own_teachers_count_at_their_own_size(recipe, photos, tmp_path):
    """A checkpoint of this tool holds the size, and the config doesn't."""
    from support.stages import train

    hard = {"labels": "hard", "epochs": 1, "milestones": []}
    train(
        changed(recipe, student={"model": "test_resnet", "image_size": 32}, train=hard),
        photos,
        tmp_path / "t",
        device=CPU,
    )
    told = _preview(recipe, tmp_path / "t" / "best.safetensors", photos)
    assert told["gflop_per_crop"] == pytest.approx(cost.flops("test_resnet", 32)[0] / 1e9)


def test_nothing_is_needed_and_nothing_is_written(tmp_path, monkeypatch, teachers):
    monkeypatch.chdir(tmp_path)
    chosen = [f"--teacher={t['model']}={t['checkpoint']}" for t in teachers]
    status, out, _ = run(
        "generate-labels",
        "--config",
        SMOKE,
        "--plan",
        *chosen,
        "--views",
        180,
        "--worker",
        "0/8",
        "--device",
        "cpu",
    )
    assert (
        status == 0
        and "1,281,167 images (ImageNet's; --data counts yours) × 180 views = 230,610,060" in out
        and "8 workers" in out
    )
    assert tree(tmp_path) == {}


def test_a_disk_that_is_too_small_is_told(recipe, photos, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(plan.shutil, "disk_usage", lambda place: usage._replace(free=100))
    told = stages.make_plan(recipe, photos, tmp_path / "deep" / "s.zarr", device=CPU)
    plan_page(Plan(**told))
    assert told["free_bytes"] == 100 and "NOT ENOUGH" in capsys.readouterr().out


def test_teachers_whose_weights_are_not_at_hand_are_timed_with_random_ones(monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, out, err = run(
        "generate-labels",
        "--config",
        SMOKE,
        "--plan",
        "--teacher",
        "test_resnet",
        "--device",
        "cpu",
    )
    assert (
        status == 0
        and "timed with random weights instead: "
        "the weights of test_resnet.r160_in1k can't be fetched"
        in err
    )
    assert (
        f"{BYTES_PER_CROP} bytes a crop "
        f"(pow8, of real labels of that many classes, not measured here)" in out
    )
    tail = run(
        "generate-labels",
        "--config",
        SMOKE,
        "--plan",
        "--teacher",
        "test_resnet",
        "--device",
        "cpu",
        "--set",
        "store.codec=tail40",
    )[1]
    assert "38 bytes a crop (tail40," in tail


def test_what_stage_one_would_refuse_is_refused(recipe, photos, tmp_path):
    other = write_teacher(tmp_path / "t.safetensors", "test_resnet", 3, classes=5)
    with pytest.raises(Exception, match="has 3 classes, the teachers have 5"):
        _preview(recipe, other, photos)
    with pytest.raises(ModelError, match=r"there is no checkpoint gone\.pth"):
        _preview(recipe, "gone.pth", photos)
    for left in (["--data", photos], ["--store", "s"]):
        status, _, err = run("generate-labels", "--config", SMOKE, *left)
        assert status == 2 and "only --plan does without it" in err


def _preview(recipe, checkpoint, photos):
    from pipeline.config import ModelSpec

    spec = ModelSpec(model="test_resnet", checkpoint=str(checkpoint))
    return stages.make_plan(
        recipe.model_copy(update={"teachers": (spec,)}), photos, None, device=CPU
    )
