"""Stores and runs that were begun with DALI's resize go on with it, new ones have
Pillow's pixels, and no two are mixed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import yaml
from support.label_files import CROPS, write_set
from support.small import CPU
from support.stages import crop_renderer, generate, import_labels, make_plan, recheck, train

from cache import LabelStore, StoreError
from cache.merge import merge
from pipeline.config import Config, ConfigError
from pipeline.config_file import validate
from pipeline.exchange import import_labels as imports
from pipeline.render.renderer import STEPS
from pipeline.runs.folder import RunError

# What versions up to 0.9 record of the renderer.
OLD = {"backend": "cpu", "steps": "slice, resize with anti-aliasing, flip"}


def resizing(recipe: Config, resize: str | None, **crops: int) -> Config:
    return recipe.model_copy(
        update={
            "render": recipe.render.model_copy(update={"resize": resize}),
            "crops": recipe.crops.model_copy(update=crops),
        }
    )


@pytest.fixture(scope="module")
def old_store(recipe: Config, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished store of two views, as version 0.9 makes it."""
    path = tmp_path_factory.mktemp("old") / "labels.zarr"
    generate(resizing(recipe, "dali"), photos, path, device=CPU)
    return path


def copied(store: Path, folder: Path) -> Path:
    return Path(shutil.copytree(store, folder / store.name))


def test_a_store_says_who_resized(store_path, old_store):
    old, new = LabelStore.open(old_store), LabelStore.open(store_path)
    assert old.provenance["renderer"] == OLD and old.attributes["format_version"] == 3
    assert new.provenance["renderer"] == {
        "backend": "cpu",
        "resize": "pillow",
        "steps": STEPS["pillow"],
    }
    assert new.attributes["format_version"] == 6
    assert "Pillow" in new.attributes["how_to_read"]
    assert "Pillow" not in old.attributes["how_to_read"]
    assert old.attributes["fingerprint"]["digests"] != new.attributes["fingerprint"]["digests"]
    assert not np.array_equal(old.codes(0, slice(None)), new.codes(0, slice(None)))


def test_an_old_store_is_extended_and_verified_with_its_own_resize(
    old_store, recipe, photos, tmp_path, capsys
):
    whole = tmp_path / "whole.zarr"
    generate(resizing(recipe, "dali", views=3), photos, whole, device=CPU)
    path = copied(old_store, tmp_path)
    assert make_plan(resizing(recipe, None), photos, path)["finished"] == 1
    generate(resizing(recipe, None, views=3), photos, path, device=CPU)
    ours, wanted = LabelStore.open(path), LabelStore.open(whole)
    for view in range(3):
        assert np.array_equal(ours.codes(view, slice(None)), wanted.codes(view, slice(None)))
    result = recheck(path, photos / "train", recipe.teachers, 20, device=CPU)
    assert result["trusted"] and result["sample"]["agrees"]
    assert "other pixels" not in capsys.readouterr().err


def test_an_old_store_whose_description_is_lost_is_mended_with_its_own_resize(
    old_store, recipe, photos, tmp_path
):
    path = copied(old_store, tmp_path)
    before = (path / "zarr.json").read_bytes()
    (path / "zarr.json").unlink()
    generate(resizing(recipe, None), photos, path, device=CPU)
    assert json.loads((path / "zarr.json").read_bytes()) == json.loads(before)


@pytest.mark.parametrize(("made", "asked"), [("dali", "pillow"), ("pillow", "dali")])
def test_another_resize_than_the_stores_is_refused(
    store_path, old_store, recipe, photos, tmp_path, made, asked
):
    path = copied(old_store if made == "dali" else store_path, tmp_path)
    line = f"was made with render.resize {made}, this is {asked}; leave render.resize out"
    with pytest.raises(StoreError, match=line):
        generate(resizing(recipe, asked), photos, path, device=CPU)
    with pytest.raises(ConfigError, match=f"render.resize is {asked}, .* with {made}; leave it"):
        train(resizing(recipe, asked), photos, tmp_path / "run", store=path)
    other = store_path if made == "dali" else old_store
    with pytest.raises(StoreError, match="renderer"):
        merge([path, other], tmp_path / "merged.zarr", say=print, progress=lambda n: None)


def test_a_student_of_an_old_store_sees_what_its_teachers_saw(old_store, recipe, photos, tmp_path):
    run = tmp_path / "run"
    train(recipe, photos, run, store=old_store)
    assert yaml.safe_load((run / "config.yaml").read_text())["render"]["resize"] == "dali"
    store = LabelStore.open(old_store)
    blobs = [(photos / "train" / path).read_bytes() for path in store.images.path[:20]]
    boxes, flips = store.crops(0, slice(0, 20))
    pixels = {
        resize: crop_renderer([64], 1, 20, resize=resize)(blobs, boxes[None], flips[None])[0][64]
        for resize in ("dali", "pillow")
    }
    assert not torch.equal(pixels["dali"], pixels["pillow"])


def forget_the_resize(run: Path) -> None:
    """Make a run's config what version 0.9 wrote."""
    document = yaml.safe_load((run / "config.yaml").read_text())
    assert document["render"].pop("resize") == "dali"
    (run / "config.yaml").write_text(yaml.safe_dump(document, sort_keys=False))


@pytest.mark.parametrize("labels", ["soft", "hard"])
def test_an_old_run_is_resumed_with_its_own_resize(old_store, recipe, photos, tmp_path, labels):
    """It ends with the weights that it would have had without a stop."""
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"labels": labels})})
    store = old_store if labels == "soft" else None
    short = recipe.model_copy(update={"train": recipe.train.model_copy(update={"epochs": 1})})
    train(resizing(recipe, "dali"), photos, tmp_path / "whole", store=store)
    train(resizing(short, "dali"), photos, tmp_path / "run", store=store)
    forget_the_resize(tmp_path / "run")
    with pytest.raises((RunError, ConfigError), match="pillow"):
        train(resizing(recipe, "pillow"), photos, tmp_path / "run", store=store)
    train(recipe, photos, tmp_path / "run", store=store)
    ours, wanted = (
        safetensors.torch.load_file(tmp_path / name / "last.safetensors")
        for name in ("run", "whole")
    )
    assert all(torch.equal(ours[key], wanted[key]) for key in wanted)


def test_a_new_run_records_pillows_resize(recipe, photos, tmp_path):
    hard = recipe.model_copy(
        update={"train": recipe.train.model_copy(update={"labels": "hard", "epochs": 1})}
    )
    train(hard, photos, tmp_path / "run")
    document = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert document["render"]["resize"] == "pillow"


def test_an_old_import_goes_on_as_it_was_begun(photos, tmp_path, monkeypatch):
    published = write_set(tmp_path / "labels" / "imagenet", photos / "train")
    path, lost = tmp_path / "old.zarr", tmp_path / "lost" / "old.zarr"
    with monkeypatch.context() as patch:
        patch.setattr(imports, "_resizes_of", lambda path: ["dali"])
        import_labels(published, photos, path, views=2)
    assert LabelStore.open(path).provenance["renderer"] == OLD
    shutil.copytree(path, lost)
    before = json.loads((lost / "zarr.json").read_bytes())
    (lost / "zarr.json").unlink()
    import_labels(published, photos, lost, views=2)
    assert json.loads((lost / "zarr.json").read_bytes()) == before
    assert import_labels(published, photos, path, views=CROPS).views == CROPS
    assert LabelStore.open(path).provenance["renderer"] == OLD
    new = import_labels(published, photos, tmp_path / "new.zarr")
    assert new.provenance["renderer"]["resize"] == "pillow"


def test_a_gpu_resizes_with_dali_alone():
    with pytest.raises(
        ConfigError, match=r"render.resize pillow needs render.backend cpu, got gpu"
    ):
        validate({"render": {"backend": "gpu", "resize": "pillow"}}, "test")
