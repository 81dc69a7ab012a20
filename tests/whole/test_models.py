"""Models by the paper's names, the authors' checkpoints, and the refusal of weights
that don't fit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import timm
import torch
from support.small import CLASSES, CPU, changed
from support.stages import generate, train
from torch import nn

from pipeline.config import Config, ModelSpec
from pipeline.models import weights as weights_module
from pipeline.models.model import ModelError
from pipeline.models.names import ALIASES, resolve
from pipeline.models.weights import _create, load, load_teachers


def authors_file(
    path: Path, architecture: str, classes: int = 1000, *, legacy: bool = False, **wrapped: object
) -> nn.Module:
    """Write a checkpoint as the authors publish it: the state dict of a model under
    DataParallel, in torch's own format."""
    torch.manual_seed(7)
    module = timm.create_model(architecture, num_classes=classes).eval()
    weights = nn.DataParallel(module).state_dict()
    assert all(name.startswith("module.") for name in weights)
    torch.save(
        {"state_dict": weights, **wrapped} if wrapped else weights,
        path,
        _use_new_zipfile_serialization=not legacy,
    )
    return module


@pytest.mark.parametrize(
    ("paper", "tagged"),
    [
        ("senet154", "senet154.gluon_in1k"),
        ("resnet152_v1s", "resnet152s.gluon_in1k"),
        ("efficientnet_b4_ns", "tf_efficientnet_b4.ns_jft_in1k"),
        ("efficientnet_b4", "tf_efficientnet_b4.aa_in1k"),
        # today's default of timm is the Noisy Student
        ("tf_efficientnet_b4", "tf_efficientnet_b4.aa_in1k"),
        ("gluon_senet154", "senet154.gluon_in1k"),
        ("resnet50", "resnet50.ram_in1k"),  # today's default of timm is a1
        ("tf_efficientnet_b0", "tf_efficientnet_b0.aa_in1k"),
    ],
)
def test_a_name_of_the_paper_is_a_tagged_name_of_timm(paper, tagged):
    assert resolve(paper) == tagged


def test_every_alias_names_weights_that_timm_has():
    assert set(ALIASES.values()) <= set(timm.list_pretrained())


def test_timms_own_names_stay_what_they_are():
    for name in ("resnet50.a1_in1k", "resnet34.a1_in1k", "tf_efficientnet_b4.ap_in1k"):
        assert resolve(name) == name
    assert (
        resolve("resnet34")
        == timm.get_pretrained_cfg("resnet34").architecture
        + "."
        + timm.get_pretrained_cfg("resnet34").tag
    )


def test_own_weights_keep_the_architecture_that_was_named():
    # the paper's model, from the hub or from a file
    assert resolve("efficientnet_b4", hub=False) == "tf_efficientnet_b4"
    # today's default of timm
    assert resolve("efficientnet_b4.ra2_in1k", hub=False) == "efficientnet_b4.ra2_in1k"
    # a tag also names a normalisation
    assert resolve("inception_v3.gluon_in1k", hub=False) == "inception_v3.gluon_in1k"
    # without a tag, which would name other weights
    assert resolve("resnet50", hub=False) == "resnet50"
    assert resolve("resnet152_v1s", hub=False) == "resnet152s"
    assert resolve("gluon_senet154", hub=False) == "senet154"


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_b7_ns", "gluon_resnet50_v1b", "ig_resnext101_32x32d", "swsl_resnet50"]
)
def test_a_name_that_timm_has_given_up_is_resolved_to_its_tag(name):
    assert resolve(name) in timm.list_pretrained()
    assert resolve("ig_resnext101_32x32d") == "resnext101_32x32d.fb_wsl_ig1b_ft_in1k"


@pytest.mark.parametrize("name", ["resnext101_32x48d", "ig_resnext101_32x48d"])
def test_the_papers_large_student_is_gone_and_the_nearest_is_named(name):
    with pytest.raises(
        ModelError,
        match=r"timm has no .*32x48d any more; the nearest is "
        r"resnext101_32x32d.fb_wsl_ig1b_ft_in1k",
    ):
        resolve(name)


def test_weights_that_fit_several_models_of_the_paper_name_them_all(tmp_path):
    authors_file(tmp_path / "b0.pth", "efficientnet_b0")
    with pytest.raises(ModelError, match=r"pass tf_efficientnet_b0=.* or efficientnet_b0="):
        load(ModelSpec(model="resnet18", checkpoint=str(tmp_path / "b0.pth")))


@pytest.mark.parametrize("content", [{"fc.weight": 1}, [1, 2], {}, {"state_dict": 3}])
def test_a_file_that_holds_no_named_tensors_is_refused_in_one_line(tmp_path, content):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(
        ModelError,
        match=r"odd.pth holds no weights that can be read .*; "
        r"pass a .safetensors, .pth or .pt file",
    ):
        load(ModelSpec(model="resnet18", checkpoint=str(tmp_path / "odd.pth")))


def test_a_tag_is_no_difference_where_the_weights_are_the_same(
    photos, recipe, store_path, tmp_path
):
    """Stores of version 0.1.0 name timm's default tag even for own weights."""
    document = recipe.model_dump(mode="json")
    document["teachers"][0]["model"] = "test_resnet.r160_in1k"
    shutil.copytree(store_path, tmp_path / "s.zarr")
    generate(Config.model_validate(document), photos, tmp_path / "s.zarr", device=CPU)


def test_what_an_alias_stands_for_is_said(monkeypatch):
    create = _create
    monkeypatch.setattr(
        weights_module,
        "_create",
        lambda name, *, pretrained, **options: create(name, pretrained=False, **options),
    )
    model = load(ModelSpec(model="resnet18"))
    assert model.name == "resnet18.tv_in1k"
    assert model.notes == [
        "resnet18 stands for resnet18.tv_in1k, as in the paper and in the timm of 2020"
    ]
    assert load(ModelSpec(model="resnet18.tv_in1k")).notes == []


@pytest.mark.parametrize(
    "wrapped", [{}, {"epoch": 3, "best_acc1": 80.67}], ids=["bare", "in a state_dict"]
)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_authors_checkpoints_load(tmp_path, wrapped, legacy):
    theirs = authors_file(
        tmp_path / "MEALV2.pth", "tf_mobilenetv3_small_075", legacy=legacy, **wrapped
    )
    spec = ModelSpec(
        model="tf_mobilenetv3_small_075",
        checkpoint=str(tmp_path / "MEALV2.pth"),
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    ours = load(spec)
    assert (ours.name, ours.classes, ours.image_size, ours.mean) == (
        "tf_mobilenetv3_small_075",
        1000,
        224,
        (0.485, 0.456, 0.406),
    )
    pixels = torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8)
    x = (pixels.permute(0, 3, 1, 2) / 255 - torch.tensor(spec.mean)[:, None, None]) / torch.tensor(
        spec.std
    )[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(ours(pixels), theirs(x), rtol=1e-4, atol=1e-4)


def test_a_student_starts_from_the_authors_checkpoint(photos, recipe, store_path, tmp_path, capsys):
    theirs = authors_file(tmp_path / "MEALV2.pth", "test_resnet", len(CLASSES))
    start = {"model": "test_resnet", "checkpoint": str(tmp_path / "MEALV2.pth"), "pretrained": True}
    still = changed(recipe, student=start, train={"epochs": 1, "lr": 1e-30})
    train(still, photos, tmp_path / "run", store=store_path, device=CPU)
    assert "random weights" not in capsys.readouterr().err
    ours = load(
        ModelSpec(model="test_resnet", checkpoint=str(tmp_path / "run" / "last.safetensors"))
    ).module.state_dict()
    assert all(
        torch.allclose(ours[name], weight, rtol=0, atol=1e-20)
        for name, weight in theirs.named_parameters()
    )


@pytest.mark.parametrize("named", ["resnet50", "tf_efficientnet_b0", "test_resnet"])
def test_a_checkpoint_of_another_architecture_is_refused_and_its_own_named(tmp_path, named):
    authors_file(tmp_path / "MEALV2.pth", "resnet18")
    with pytest.raises(
        ModelError,
        match=rf"its tensors are those of a model of the paper: pass "
        rf"resnet18={tmp_path}/MEALV2.pth$",
    ):
        load(ModelSpec(model=named, checkpoint=str(tmp_path / "MEALV2.pth")))


def test_a_checkpoint_of_an_unknown_architecture_is_refused_in_one_line(tmp_path):
    authors_file(tmp_path / "other.pth", "test_vit")
    with pytest.raises(ModelError, match=r"other.pth .*name its model before the =$") as error:
        load(ModelSpec(model="resnet18", checkpoint=str(tmp_path / "other.pth")))
    assert "\n" not in str(error.value)


def test_two_teachers_of_the_same_weights_are_refused_by_whatever_names(tmp_path):
    for name in ("a.pth", "b.pth"):
        authors_file(tmp_path / name, "test_resnet", 3)
    specs = [
        ModelSpec(model="test_resnet", checkpoint=str(tmp_path / name))
        for name in ("a.pth", "b.pth")
    ]
    with pytest.raises(
        ModelError, match="have the same weights; an ensemble needs different models"
    ):
        load_teachers(specs, CPU)
