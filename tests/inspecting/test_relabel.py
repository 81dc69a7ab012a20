"""verify with images: the images are the labelled images, and the teachers give the
stored labels again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from support.small import CPU, changed, edit_store, write_teacher
from support.stages import generate, recheck

from cache import LabelStore, StoreError
from cache.writer import StoreWriter
from cli import main
from pipeline.config import Config
from pipeline.inspection import relabel
from pipeline.render import mixing


@pytest.fixture
def copy(store_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(store_path, tmp_path / "s.zarr"))


def looked_at(path: Path, photos: Path, recipe: Config, sample: int | None = 100) -> dict:
    return recheck(path, photos / "train", list(recipe.teachers), sample, device=CPU)


@pytest.mark.parametrize("codec", ["pow8", "float32"])
def test_labels_made_again_are_those_of_the_store_within_the_stated_error(
    photos, recipe, tmp_path, codec
):
    generate(changed(recipe, store={"codec": codec}), photos, tmp_path / "s.zarr", device=CPU)
    result = looked_at(tmp_path / "s.zarr", photos, recipe)
    sample = result["sample"]
    assert result["trusted"] and sample["agrees"] and sample["crops"] == 100
    assert (
        sample["kl_largest"] <= sample["kl_stated"] + 1e-6
        and sample["tv_largest"] <= sample["tv_stated"] + 1e-5
    )
    assert sample["equal_codes"] > (0.99 if codec == "pow8" else 0.0)


def test_every_labelled_crop_may_be_asked_for_once(photos, recipe, store_path):
    assert looked_at(store_path, photos, recipe, 10_000)["sample"]["crops"] == 180
    places = relabel._choose(LabelStore.open(store_path), 10_000, 0)
    assert len(np.unique(places, axis=0)) == 180
    few = [relabel._choose(LabelStore.open(store_path), 9, seed).tolist() for seed in (0, 0, 1)]
    assert few[0] == few[1] != few[2]


def test_mixed_pictures_are_mixed_again(photos, recipe, tmp_path, monkeypatch):
    generate(
        changed(recipe, crops={"cutmix": {"prob": 0.8}}), photos, tmp_path / "s.zarr", device=CPU
    )
    assert looked_at(tmp_path / "s.zarr", photos, recipe)["trusted"]
    monkeypatch.setattr(mixing, "paste", lambda pixels, others, place, box: pixels)
    assert not looked_at(tmp_path / "s.zarr", photos, recipe)["trusted"]


def test_labels_of_other_crops_are_noticed_though_every_digest_is_right(photos, recipe, copy):
    writer = StoreWriter(copy)
    here, there = (writer.store.content(view, 1)[0] for view in (0, 1))
    writer.write(1, 1, here.codes, there.crops)
    result = looked_at(copy, photos, recipe)
    assert result["sound"] and not result["trusted"]
    (problem,) = result["problems"]
    worst = result["sample"]["worst"][0]
    assert (
        worst["view"] == 1
        and 32 <= worst["row"] < 64
        and worst["path"] in problem
        and "\n" not in problem
    )


@pytest.mark.parametrize("codec", ["pow8", "tail40"])
@pytest.mark.parametrize("what", ["sharper", "softer", "of another image"])
def test_labels_that_nobody_said_are_noticed_however_coarse_the_codec(
    photos, recipe, tmp_path, codec, what
):
    """The changed labels fit every digest and sum, and with tail40 are well within the
    codec's error."""
    path = tmp_path / "s.zarr"
    generate(changed(recipe, store={"codec": codec}), photos, path, device=CPU)
    assert looked_at(path, photos, recipe, 180)["trusted"]
    writer = StoreWriter(path)
    fine = generate(
        changed(recipe, store={"codec": "float32"}), photos, tmp_path / "fine.zarr", device=CPU
    )
    said = fine.probabilities(0, slice(0, 32))
    other = (
        np.roll(said, 1, axis=0)
        if what == "of another image"
        else said ** (1.5 if what == "sharper" else 1 / 1.5)
    )
    other /= other.sum(axis=1, keepdims=True)
    writer.write(0, 0, writer.store.codec.encode(other), writer.store.content(0, 0)[0].crops)
    result = looked_at(path, photos, recipe, 180)
    assert result["sound"] and not result["trusted"] and result["sample"]["worst"][0]["row"] < 32
    assert result["sample"]["unexplained"] > 10 * result["sample"]["allowed"]


@pytest.mark.parametrize("name", ["local-dir:/etc", "hf-hub:somebody/some_model"])
def test_a_teacher_that_a_store_names_by_a_place_is_not_looked_up(photos, copy, name):
    edit_store(copy, lambda attributes: attributes["provenance"]["teachers"][0].update(model=name))
    writer = StoreWriter(copy)
    (writer.store.path / "records/c/0/0/0").unlink()  # shards don't matter to the refusal
    with pytest.raises(StoreError, match="names a teacher by a place .*; pass it with --teacher"):
        relabel._teachers(writer.store, [], CPU)


def test_other_teachers_are_noticed(photos, recipe, store_path, tmp_path):
    other = write_teacher(tmp_path / "x.safetensors", "test_resnet", 9)
    specs = [recipe.teachers[0].model_copy(update={"checkpoint": str(other)}), recipe.teachers[1]]
    result = recheck(store_path, photos / "train", specs, 10, device=CPU)
    assert not result["trusted"] and "pass the same checkpoints" in result["problems"][0]
    result = recheck(store_path, photos / "train", specs[1:], 10, device=CPU)
    assert "has 2 teachers" in result["problems"][0]


@pytest.mark.parametrize("sample", [None, 180])
def test_other_images_are_noticed(photos, recipe, store_path, tmp_path, sample):
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    assert looked_at(store_path, data, recipe, sample)["trusted"]
    victim = data / "train" / LabelStore.open(store_path).images.path[70]
    content = bytearray(victim.read_bytes())
    content[-5] ^= 1
    victim.write_bytes(content)
    result = looked_at(store_path, data, recipe, sample)
    assert not result["trusted"] and result["sound"]
    assert f"{victim.name} has changed since the manifest" in result["problems"][0]


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_the_command_says_what_it_found_and_its_status_says_whether_to_trust(photos, recipe, copy):
    teachers = [f"--teacher={t.model}={t.checkpoint}" for t in recipe.teachers]
    status, out, _ = run("verify", copy, "--data", photos, "--sample", 20, *teachers)
    assert (
        status == 0
        and "6 of 6 shards read, 180 labels; every digest is right" in out
        and "20 crops labelled again" in out
    )
    status, out, _ = run("verify", copy, "--data", photos)
    assert status == 0 and "all 90 are, byte for byte, those that were labelled" in out
    (copy / "records/c/0/2/0").unlink()
    status, out, _ = run("verify", copy)
    assert status == 1 and "missing  view 0, rows 64 to 89" in out and "NOT COMPLETE" in out
    file = LabelStore.open(copy).file("labels", 1, 1)
    file.write_bytes(file.read_bytes()[:-3] + b"abc")
    status, out, err = run("verify", copy, "--json")
    result = json.loads(out)
    assert status == 1 and not result["sound"] and not result["trusted"] and "Traceback" not in err
    assert [(f["view"], f["first_row"], f["last_row"]) for f in result["damaged"]] == [(1, 32, 63)]
    (copy / "zarr.json").write_text("{}")
    status, out, _ = run("verify", copy)
    assert status == 1 and out.startswith("damaged  zarr.json: ") and "NOT SOUND" in out


@pytest.mark.parametrize(
    "arguments", [("--sample", 5), ("--teacher", "resnet18"), ("--sample", 0, "--data", ".")]
)
def test_options_that_go_together_are_asked_for_together(store_path, arguments):
    assert run("verify", store_path, *arguments)[0] == 2
