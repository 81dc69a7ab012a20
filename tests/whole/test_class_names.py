"""The class names that models know: where they come from, and what becomes of a head
whose classes are others than the data's."""

from __future__ import annotations

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from support.command import SMOKE, run
from support.small import CLASSES, CPU, changed
from support.stages import centre_renderer, scan, train

from cache import LabelStore
from pipeline.config import ModelSpec
from pipeline.images.patience import DataError
from pipeline.models.classes import known_classes
from pipeline.models.model import Model, ModelError
from pipeline.models.timm_export import save_for_timm
from pipeline.models.weights import load
from pipeline.runs.checkpoint import save_model

CAFE = "café"
NFC, NFD = (unicodedata.normalize(form, CAFE) for form in ("NFC", "NFD"))


def own_file(
    path: Path, names: list[str] | None, model: str = "test_resnet", classes: int = 3, **facts
) -> Model:
    """Save a model of random weights as train-student does."""
    made = load(ModelSpec(model=model, pretrained=False), classes=classes, image_size=32, seed=3)
    save_model(path, made, ({"class_names": names} if names else {}) | facts)
    return made


def knowing(name: str, names: list[str] | None) -> Model:
    made = load(ModelSpec(model="test_resnet", pretrained=False), classes=3)
    made.name, made.class_names = name, names and tuple(names)
    return made


def test_a_checkpoint_of_this_tool_knows_its_classes(tmp_path):
    own_file(tmp_path / "x.safetensors", ["a", "b", "c"])
    own_file(tmp_path / "old.safetensors", None)  # before version 0.5
    for name, known in (("x", ("a", "b", "c")), ("old", None)):
        model = load(
            ModelSpec(model="test_resnet", checkpoint=str(tmp_path / f"{name}.safetensors"))
        )
        assert model.class_names == known
        assert model.to(CPU).class_names == known
        assert "class_names" not in model.describe() and model.notes == []


def test_names_of_another_number_than_the_outputs_are_no_names(tmp_path):
    own_file(tmp_path / "x.safetensors", ["a", "b"])
    spec = ModelSpec(model="test_resnet", checkpoint=str(tmp_path / "x.safetensors"))
    assert load(spec).class_names is None


def test_an_exported_folder_knows_its_classes(tmp_path):
    made = own_file(tmp_path / "x.safetensors", None)
    made.module.to(memory_format=torch.contiguous_format)
    (tmp_path / "out").mkdir()
    save_for_timm(made, tmp_path / "out", ["a", "b", NFC], {})
    spec = ModelSpec(model=f"local-dir:{tmp_path}/out")
    assert load(spec).class_names == ("a", "b", NFC)
    start = load(spec, class_names=["b", "a", NFC])
    assert torch.equal(
        start.module.get_classifier().weight, made.module.get_classifier().weight[[1, 0, 2]]
    )


def test_random_weights_know_no_classes():
    assert load(ModelSpec(model="test_resnet", pretrained=False), classes=3).class_names is None


def test_models_agree_on_their_classes_or_are_refused_by_name():
    one, same = knowing("one", ["a", "b", NFC]), knowing("same", ["a", "b", NFD])
    unknowing = knowing("unknowing", None)
    assert known_classes([]) is None and known_classes([unknowing]) is None
    assert known_classes([unknowing, one, same]) == ("a", "b", NFC)
    with pytest.raises(ModelError) as error:
        known_classes([one, unknowing, knowing("turned", ["b", "a", NFC])])
    assert str(error.value) == (
        "one and turned know other classes: class 0 is a in one and b in turned; take models of "
        "the same classes in the same order"
    )
    with pytest.raises(ModelError) as error:
        known_classes([one, knowing("one", ["b", "x", "y", "z", "v"])])
    assert str(error.value).startswith(
        f"one (number 1) and one (number 2) know other classes: only one (number 1) has a, {NFC}, "
        f"only one (number 2) has x, y, z and 1 more;"
    )


@pytest.mark.parametrize(
    "model", ["test_resnet", "test_vit", "levit_128s", "tnt_s_legacy_patch16_224"]
)
def test_a_students_head_is_put_in_the_order_of_the_data(tmp_path, model):
    """Every head of the model, so that each name keeps its output."""
    torch.manual_seed(5)
    own_file(tmp_path / "x.safetensors", ["a", "b", "c"], model) if model.startswith(
        "test"
    ) else save_model(
        tmp_path / "x.safetensors",
        load(ModelSpec(model=model, pretrained=False), classes=3),
        {"class_names": ["a", "b", "c"]},
    )
    spec = ModelSpec(model=model, checkpoint=str(tmp_path / "x.safetensors"))
    before, after = load(spec), load(spec, class_names=["c", "a", "b"])
    pixels = torch.randint(0, 256, (2, before.image_size, before.image_size, 3), dtype=torch.uint8)
    with torch.inference_mode():
        assert torch.equal(after(pixels), before(pixels)[:, [2, 0, 1]])
    assert after.class_names == ("c", "a", "b")
    assert after.notes == [
        f"{before.name} knows the classes in another order (class 0 is a in the model and c in "
        f"the data); its head was put in the data's order"
    ]


def test_the_same_classes_in_the_same_order_change_nothing(tmp_path):
    own_file(tmp_path / "x.safetensors", ["a", "b", NFD])
    spec = ModelSpec(model="test_resnet", checkpoint=str(tmp_path / "x.safetensors"))
    start = load(spec, class_names=["a", "b", NFC])
    assert start.digest() == load(spec).digest() and start.notes == []
    own_file(tmp_path / "x.safetensors", None)
    start = load(spec, class_names=["x", "y", "z"])  # a file that doesn't tell, as before
    assert start.digest() == load(spec).digest() and start.notes == []


def test_a_head_of_other_classes_is_replaced_and_the_names_are_said(tmp_path):
    own_file(tmp_path / "x.safetensors", ["a", "b", "c"])
    spec = ModelSpec(model="test_resnet", checkpoint=str(tmp_path / "x.safetensors"))
    start = load(spec, class_names=["b", "c", "d"], seed=1)
    assert start.notes == [
        "test_resnet had a head of other classes (only the model has a, only the data has d); it "
        "starts with a new one of 3"
    ]
    assert start.classes == 3 and start.class_names is None
    # the same new head as for another number of classes, and of the same seed
    other = load(spec, class_names=["b", "c", "d"], seed=1)
    assert start.digest() == other.digest() != load(spec, class_names=["b", "c", "d"]).digest()
    more = load(spec, class_names=["a", "b", "c", "d"])
    assert more.classes == 4 and more.class_names is None
    assert more.notes == ["test_resnet had a head of 3 classes; it starts with a new one of 4"]


def test_a_run_starts_with_the_rows_of_its_own_classes_and_goes_on(
    photos, recipe, store_path, tmp_path, capsys
):
    own_file(tmp_path / "x.safetensors", [CLASSES[i] for i in (2, 0, 1)], "test_vit")
    start = {"model": "test_vit", "checkpoint": str(tmp_path / "x.safetensors")}
    still = changed(recipe, student=start, train={"epochs": 1, "lr": 1e-30})
    train(still, photos, tmp_path / "run", store=store_path, device=CPU)
    assert "its head was put in the data's order" in capsys.readouterr().err
    before = load(ModelSpec(**start)).module.get_classifier().weight
    last = ModelSpec(model="test_vit", checkpoint=str(tmp_path / "run" / "last.safetensors"))
    torch.testing.assert_close(
        load(last).module.get_classifier().weight, before[[1, 2, 0]], rtol=0, atol=1e-20
    )
    assert load(last).class_names == CLASSES
    further = changed(recipe, student=start, train={"epochs": 2, "lr": 1e-30})
    train(further, photos, tmp_path / "run", store=store_path, device=CPU)
    assert load(last).class_names == CLASSES


def test_a_run_that_began_with_the_rows_of_other_classes_still_goes_on(
    photos, recipe, store_path, tmp_path
):
    """As runs of the versions that compared no names: the state decides all weights."""
    own_file(tmp_path / "x.safetensors", None, "test_vit")
    start = {"model": "test_vit", "checkpoint": str(tmp_path / "x.safetensors")}
    still = changed(recipe, student=start, train={"epochs": 1, "lr": 1e-30})
    train(still, photos, tmp_path / "run", store=store_path, device=CPU)
    last = ModelSpec(model="test_vit", checkpoint=str(tmp_path / "run" / "last.safetensors"))
    first = load(last).module.get_classifier().weight.clone()
    own_file(tmp_path / "x.safetensors", ["x", "y", "z"], "test_vit")
    further = changed(recipe, student=start, train={"epochs": 2, "lr": 1e-30})
    train(further, photos, tmp_path / "run", store=store_path, device=CPU)
    torch.testing.assert_close(load(last).module.get_classifier().weight, first, rtol=0, atol=1e-20)


def test_timm_reads_the_names_of_an_exported_folder(tmp_path):
    made = own_file(tmp_path / "x.safetensors", None)
    made.module.to(memory_format=torch.contiguous_format)
    (tmp_path / "out").mkdir()
    save_for_timm(made, tmp_path / "out", ["a", "b", "c"], {})
    theirs = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True)
    assert list(theirs.pretrained_cfg["label_names"]) == ["a", "b", "c"]


# ---- class folders, by name


@pytest.fixture
def trained(photos: Path, tmp_path: Path) -> Path:
    """A checkpoint whose classes are cat, ant, bee, in this order."""
    own_file(tmp_path / "cab.safetensors", ["cat", "ant", "bee"])
    return tmp_path / "cab.safetensors"


def evaluated(data: Path, *models: str) -> dict:
    given = [argument for model in models for argument in ("--model", model)]
    status, out, err = run("eval", "--data", data, *given, "--json")
    assert status == 0, err
    return json.loads(out)["models"][0]


def hits(folder: Path, checkpoint: Path, names: list[str]) -> float:
    """Count by hand the images of a folder that a model puts into their class, in
    per cent."""
    model = load(ModelSpec(model="test_resnet", checkpoint=str(checkpoint)))
    found = scan(folder, sorted(p.name for p in folder.iterdir()), exif="ignore")
    seen = centre_renderer([(32, model.interpolation)], 1, exif="ignore")
    right = 0
    for path, height, width in zip(found.path, found.height, found.width, strict=True):
        blob = (folder / path).read_bytes()
        (pixels,) = seen([blob], np.array([height]), np.array([width])).values()
        with torch.inference_mode():
            right += names[int(model(pixels).argmax())] == path.split("/")[0]
    return 100 * right / len(found)


def without(photos: Path, folder: Path, *classes: str, split: str = "val") -> Path:
    shutil.copytree(photos / split, folder / split)
    for name in classes:
        shutil.rmtree(folder / split / name)
    return folder


def test_eval_maps_class_folders_by_name(photos, trained, tmp_path):
    names = ["cat", "ant", "bee"]
    whole, some = photos, without(photos, tmp_path / "some", "ant")
    for data in (whole, some):
        score = evaluated(data, f"test_resnet={trained}")
        assert score["top1"] == pytest.approx(hits(data / "val", trained, names))
    # In alphabetical order the same model would be taken to be better or worse.
    assert hits(whole / "val", trained, names) != hits(whole / "val", trained, sorted(names))


def test_eval_refuses_class_folders_that_the_model_does_not_know(photos, trained, tmp_path):
    data = without(photos, tmp_path / "other", "cat")
    shutil.copytree(data / "val" / "ant", data / "val" / "dog")
    status, _, err = run("eval", "--data", data, "--model", f"test_resnet={trained}")
    assert status == 1 and err.count("\n") == 1
    assert "1 class folder (dog) of no class of test_resnet" in err
    assert "3 classes are cat, ant, bee; pass" in err and "--class-map" in err
    (tmp_path / "map.txt").write_text("dog\nant\nbee\n")  # dog is the model's name for cats
    status, _, err = run(
        *("eval", "--data", data, "--model", f"test_resnet={trained}"),
        *("--class-map", tmp_path / "map.txt"),
    )
    assert status == 0, err
    (tmp_path / "map.txt").write_text("ant\nbee\ndog\n")
    status, _, err = run(
        *("eval", "--data", data, "--model", f"test_resnet={trained}"),
        *("--class-map", tmp_path / "map.txt"),
    )
    assert status == 1 and "says that class 0 is ant, which is class 1 of test_resnet" in err


def labelled(data: Path, store: Path, teacher: str, *options: object) -> tuple[int, str]:
    status, _, err = run(
        *("generate-labels", "--config", SMOKE, "--data", data, "--store", store),
        *("--teacher", teacher, "--views", 1, *options),
    )
    return status, err


@pytest.mark.parametrize("kind", ["checkpoint", "exported folder"])
def test_a_teacher_gives_the_store_its_classes(photos, trained, tmp_path, kind):
    teacher = f"test_resnet={trained}"
    if kind == "exported folder":
        model = load(ModelSpec(model="test_resnet", checkpoint=str(trained)))
        (tmp_path / "out").mkdir()
        save_for_timm(model, tmp_path / "out", model.class_names, {})
        teacher = f"local-dir:{tmp_path / 'out'}"
    status, err = labelled(photos, tmp_path / "s.zarr", teacher)
    assert status == 0, err
    store = LabelStore.open(tmp_path / "s.zarr")
    assert store.class_names == ["cat", "ant", "bee"]
    for path, index in zip(store.images.path, store.images.class_index, strict=True):
        assert store.class_names[index] == path.split("/")[0]
    some = without(photos, tmp_path / "some", "bee", split="train")
    assert labelled(some, tmp_path / "some.zarr", teacher)[0] == 0
    assert LabelStore.open(tmp_path / "some.zarr").class_names == ["cat", "ant", "bee"]


def test_a_teacher_of_other_classes_is_refused_before_anything_is_made(photos, trained, tmp_path):
    data = without(photos, tmp_path / "other", "cat", split="train")
    shutil.copytree(data / "train" / "ant", data / "train" / "dog")
    status, err = labelled(data, tmp_path / "s.zarr", f"test_resnet={trained}")
    assert status == 1 and "1 class folder (dog) of no class of the teachers" in err
    assert not (tmp_path / "s.zarr").exists()
    # Neither does a store go on whose labels stand under wrong names.
    own_file(tmp_path / "plain.safetensors", None)
    assert (
        labelled(photos, tmp_path / "s.zarr", f"test_resnet={tmp_path}/plain.safetensors")[0] == 0
    )
    tensors = tmp_path / "abc.safetensors"
    own_file(tensors, ["cat", "ant", "bee"])
    status, err = labelled(photos, tmp_path / "s.zarr", f"test_resnet={tensors}")
    assert status == 1 and "class 0 is ant, in this one it is cat" in err


def test_live_teachers_give_a_run_their_classes(photos, trained, recipe, tmp_path):
    own = ModelSpec(model="test_resnet", checkpoint=str(trained))
    online = changed(recipe, train={"online": True, "epochs": 1})
    online = online.model_copy(update={"teachers": (own,)})
    train(online, photos, tmp_path / "run", device=CPU)
    kept = load(
        ModelSpec(model=recipe.student.model, checkpoint=str(tmp_path / "run/last.safetensors"))
    )
    assert kept.class_names == ("cat", "ant", "bee")


def test_validation_folders_are_mapped_by_name_and_refused(photos, recipe, tmp_path):
    data = Path(shutil.copytree(photos, tmp_path / "data"))
    shutil.rmtree(data / "val" / "ant")
    hard = changed(recipe, train={"labels": "hard", "epochs": 1})
    assert "val_top1" in train(hard, data, tmp_path / "some", device=CPU)
    (data / "val" / "bee").rename(data / "val" / "dog")
    with pytest.raises(DataError, match=r"1 class folder of no known class \(dog\)"):
        train(hard, data, tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()
