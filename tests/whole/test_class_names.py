"""The class names that models know: where they come from, and what becomes of a head
whose classes are others than the data's."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import timm
import torch
from support.small import CLASSES, CPU, changed
from support.stages import train

from pipeline.config import ModelSpec
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
