"""Files of weights that others wrote: which weights are taken, that nothing else in the
file is executed, and what is said of a file that holds none."""

from __future__ import annotations

import argparse
import collections
import datetime
import gzip
import io
import json
import os
import pathlib
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from support import command
from support.small import CPU, tree
from support.stages import generate
from torch import nn

from cache import LabelStore
from cache.merge import merge
from pipeline.config import Config, ModelSpec
from pipeline.models.model import ModelError
from pipeline.models.weights import load, load_teachers
from pipeline.runs.checkpoint import save_model

Tensors = dict[str, torch.Tensor]


def weights(model: str = "test_resnet", seed: int = 0, classes: int = 3, **options) -> Tensors:
    torch.manual_seed(seed)
    return timm.create_model(model, num_classes=classes, **options).state_dict()


def under(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def taken(path: object, model: str = "test_resnet", **spec) -> Tensors:
    return load(ModelSpec(model=model, checkpoint=str(path), **spec)).module.state_dict()


def equal(some: Tensors, others: Tensors) -> bool:
    return some.keys() == others.keys() and all(torch.equal(some[k], others[k]) for k in some)


def notes(path: object, model: str = "test_resnet", **spec) -> list[str]:
    return load(ModelSpec(model=model, checkpoint=str(path), **spec)).notes


def refusal(path: object, model: str = "test_resnet", **spec) -> str:
    with pytest.raises(ModelError) as error:
        load(ModelSpec(model=model, checkpoint=str(path), **spec))
    assert "\n" not in str(error.value)
    return str(error.value)


PLAIN, AVERAGED = weights(seed=0), weights(seed=1)


def timms_file(path: Path, **more: object) -> Path:
    """Write a checkpoint as timm's training script does."""
    content = {
        "epoch": 3,
        "arch": "test_resnet",
        "state_dict": PLAIN,
        "optimizer": optimizer(),
        "version": 2,
        "args": argparse.Namespace(model="test_resnet", lr=0.1),
        "amp_scaler": {"scale": 65536.0},
        "state_dict_ema": AVERAGED,
        "metric": 71.3,
    }
    torch.save(content | more, path)
    return path


def optimizer() -> dict:
    """Return the state of an optimizer with momentum: tensors that are no weights."""
    module = nn.Linear(2, 2)
    made = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    module(torch.ones(1, 2)).sum().backward()
    made.step()
    return made.state_dict()


# ---- several sets of weights in a file ----


def test_the_moving_average_is_taken_first_as_timm_does_and_that_is_said(tmp_path):
    path = timms_file(tmp_path / "last.pth.tar")
    theirs = timm.create_model("test_resnet", num_classes=3)
    timm.models.load_checkpoint(theirs, str(path))
    assert equal(taken(path), theirs.state_dict())
    assert equal(taken(path), AVERAGED)
    assert notes(path) == [
        f"{path} holds several sets of weights: state_dict_ema was taken, the moving average; "
        f"{path}#state_dict takes the other"
    ]


@pytest.mark.parametrize(
    ("entry", "which"),
    [("state_dict", PLAIN), ("state_dict_ema", AVERAGED), ("ema", AVERAGED)],
)
def test_an_entry_can_be_chosen(tmp_path, entry, which):
    path = timms_file(tmp_path / "last.pth")
    assert equal(taken(f"{path}#{entry}"), which)
    assert notes(f"{path}#{entry}") == []


@pytest.mark.parametrize(
    "name", ["state_dict_ema", "model_ema", "ema", "ema_state_dict", "EMA", "model.ema"]
)
def test_ema_is_short_for_any_entry_of_that_kind(tmp_path, name):
    torch.save({"model": PLAIN, name: AVERAGED, "schema": 3}, tmp_path / "x.pth")
    assert equal(taken(f"{tmp_path / 'x.pth'}#ema"), AVERAGED)
    assert equal(taken(f"{tmp_path / 'x.pth'}#model"), PLAIN)


def test_without_an_average_ema_is_refused_and_what_there_is_is_named(tmp_path):
    torch.save({"state_dict": PLAIN, "schema": {"schema": torch.ones(1)}}, tmp_path / "x.pth")
    assert refusal(f"{tmp_path}/x.pth#ema") == (
        f"{tmp_path}/x.pth has no entry 'ema'; its weights are in state_dict: pass "
        f"{tmp_path}/x.pth#state_dict"
    )


def test_an_unknown_entry_is_refused_with_the_entries_that_there_are(tmp_path):
    path = timms_file(tmp_path / "last.pth")
    assert refusal(f"{path}#sate_dict") == (
        f"{path} has no entry 'sate_dict'; its weights are in state_dict, state_dict_ema: pass "
        f"{path}#state_dict"
    )
    assert "names no entry after the #" in refusal(f"{path}#")
    assert f"there is no checkpoint {tmp_path}/gone.pth;" in refusal(f"{tmp_path}/gone.pth#ema")
    safetensors.torch.save_file(PLAIN, tmp_path / "flat.safetensors")
    assert "its weights are in no entry: pass" in refusal(f"{tmp_path}/flat.safetensors#ema")


def test_a_file_whose_name_holds_the_mark_is_that_file(tmp_path):
    torch.save({"model": PLAIN}, tmp_path / "run.pth")
    torch.save({"model": AVERAGED}, tmp_path / "run.pth#model")
    assert equal(taken(tmp_path / "run.pth#model"), AVERAGED)
    (tmp_path / "try #2").mkdir()
    timms_file(tmp_path / "try #2" / "last.pth")
    assert equal(taken(tmp_path / "try #2" / "last.pth"), AVERAGED)
    assert equal(taken(f"{tmp_path}/try #2/last.pth#state_dict"), PLAIN)
    torch.save({"step#1": PLAIN, "step#2": AVERAGED}, tmp_path / "steps.pth")
    assert equal(taken(f"{tmp_path}/steps.pth#step#2"), AVERAGED)


def test_an_average_that_does_not_fit_is_not_passed_over_in_silence(tmp_path):
    path = timms_file(tmp_path / "x.pth", state_dict_ema=weights("test_vit"))
    assert equal(taken(path), PLAIN)
    (note,) = notes(path)
    assert "state_dict was taken" in note and "its state_dict_ema has other tensors" in note


def test_the_entry_is_on_record_only_where_there_was_a_choice(tmp_path):
    path = timms_file(tmp_path / "two.pth")
    torch.save({"state_dict": PLAIN}, tmp_path / "one.pth")

    def described(where: object) -> dict:
        return load(ModelSpec(model="test_resnet", checkpoint=str(where))).describe()

    assert described(path)["entry"] == "state_dict_ema"
    assert described(f"{path}#ema")["entry"] == "state_dict_ema"
    assert described(f"{path}#state_dict")["entry"] == "state_dict"
    assert "entry" not in described(tmp_path / "one.pth")
    plain = described(f"{path}#state_dict")
    assert {k: v for k, v in plain.items() if k != "entry"} == described(tmp_path / "one.pth")


def with_first_teacher(recipe: Config, checkpoint: object) -> Config:
    document = recipe.model_dump(mode="json")
    document["teachers"][0]["checkpoint"] = str(checkpoint)
    return Config.model_validate(document)


def test_an_entry_of_the_same_weights_refuses_nothing(photos, recipe, store_path, tmp_path, capsys):
    """A store is gone on with, repaired, verified and joined by the weights, not by the
    name of what held them."""
    first = safetensors.torch.load_file(recipe.teachers[0].checkpoint)
    other = {name: tensor + 1 for name, tensor in first.items()}
    torch.save({"state_dict": other, "state_dict_ema": first}, tmp_path / "both.pth")
    chosen = with_first_teacher(recipe, f"{tmp_path}/both.pth#ema")

    shutil.copytree(store_path, tmp_path / "old.zarr")
    generate(chosen, photos, tmp_path / "old.zarr", device=CPU)
    assert tree(tmp_path / "old.zarr") == tree(store_path)

    made = generate(chosen, photos, tmp_path / "new.zarr", device=CPU)
    assert made.provenance["teachers"][0]["entry"] == "state_dict_ema"
    assert made.identity == LabelStore.open(store_path).identity
    generate(recipe, photos, tmp_path / "new.zarr", device=CPU)
    status, page, _ = command.run("inspect", tmp_path / "new.zarr")
    assert status == 0 and "(state_dict_ema)" in page

    joined = merge(
        [store_path, tmp_path / "new.zarr"], tmp_path / "joined.zarr", say=print, progress=id
    )
    assert joined.progress()[0] == joined.progress()[1]

    (tmp_path / "old.zarr" / "zarr.json").unlink()  # its description is made anew
    mended = generate(chosen, photos, tmp_path / "old.zarr", device=CPU)
    assert mended.progress()[0] == mended.progress()[1]

    refused = with_first_teacher(recipe, f"{tmp_path}/both.pth#state_dict")
    with pytest.raises(Exception, match=r"was made with teachers\.0\.weights"):
        generate(refused, photos, tmp_path / "new.zarr", device=CPU)


def test_evaluation_says_which_weights_it_took(photos, tmp_path):
    path = timms_file(tmp_path / "last.pth")
    asked = ("eval", "--data", photos, "--split", "train", "--json", "--model")
    status, result, said = command.run(*asked, f"test_resnet={path}")
    assert status == 0 and "state_dict_ema was taken, the moving average" in said
    assert json.loads(result)["models"][0]["checkpoint"] == str(path)
    status, result, said = command.run(*asked, f"test_resnet={path}#state_dict")
    assert status == 0 and "was taken" not in said
    assert json.loads(result)["models"][0]["checkpoint"] == f"{path}#state_dict"


# ---- files of others ----


class Callback:
    """An object of somebody's training code."""

    def __init__(self) -> None:
        self.best, self.path = torch.ones(1), pathlib.PurePosixPath("x")


class Settings(dict):
    """A kind of dict, as configs are."""


class History(collections.deque):
    """A kind of list."""


def lightnings(tensors: Tensors) -> dict:
    return {
        "epoch": 4,
        "global_step": 500,
        "pytorch-lightning_version": "2.1.0",
        "state_dict": tensors,
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{'monitor': 'val'}": {"best": torch.ones(1)}, Callback: 3},
        "optimizer_states": [optimizer()],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": Settings(lr=0.1, path=pathlib.PosixPath("data"), when=Callback()),
    }


def torchvisions() -> dict:
    """Return what torchvision's reference script saves, with its moving average."""
    module = timm.create_model("test_resnet", num_classes=3)
    module.load_state_dict(AVERAGED)
    averaged = torch.optim.swa_utils.AveragedModel(module)
    return {
        "model": PLAIN,
        "optimizer": optimizer(),
        "lr_scheduler": {"last_epoch": 3, "_last_lr": [0.1]},
        "epoch": 3,
        "args": argparse.Namespace(output_dir=pathlib.PosixPath("out"), opt="sgd"),
        "model_ema": averaged.state_dict(),
    }


FOREIGN = {
    "numpy's numbers": ({"model_state_dict": PLAIN, "best": np.float64(3), "rng": np.ones(3)}, ""),
    "Lightning": (lightnings(under("model.", PLAIN)), ""),
    "Lightning, compiled": (lightnings(under("model._orig_mod.", PLAIN)), ""),
    "Lightning with a criterion": (
        lightnings(under("net.model.", PLAIN) | {"criterion.weight": torch.ones(3)}),
        "1 of 93 tensors of FILE lie outside of net.model. and were left out, the first is "
        "criterion.weight",
    ),
    "torchvision's reference": (
        {**torchvisions(), "model_ema": None},
        "",
    ),
    "DataParallel, compiled": ({"net": under("module._orig_mod.", PLAIN)}, ""),
    "FSDP": ({"weights": under("_fsdp_wrapped_module.", PLAIN)}, ""),
    "DeepSpeed": ({"module": under("module.", PLAIN), "ds_config": {"a": 1}}, ""),
    "sections": ({"a": {"b": {"weights": PLAIN}}, "history": History([1, 2])}, ""),
    "half precision": ({"model": {k: t.half() for k, t in PLAIN.items()}}, ""),
    "parameters": ({"model": {k: nn.Parameter(t, False) for k, t in PLAIN.items()}}, ""),
    "an ordered dict": (collections.OrderedDict(PLAIN), ""),
    "dates and sets": (
        {
            "net": PLAIN,
            "when": datetime.datetime(2024, 1, 1),
            "kinds": {Callback, 3},
            "count": collections.Counter(a=2),
            "names": collections.defaultdict(list, a=[1]),
            "dtype": torch.float16,
            "range": range(3),
        },
        "",
    ),
    "this tool's state.pt": (
        {"model": PLAIN, "discriminator": {"0.weight": torch.ones(2, 2)}, "epoch": 1},
        "",
    ),
}


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_the_weights_in_files_of_others_are_found(tmp_path, kind, legacy):
    content, note = FOREIGN[kind]
    path = tmp_path / "theirs.ckpt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    wanted = PLAIN
    if kind == "half precision":
        wanted = {k: t.half().to(t.dtype) for k, t in PLAIN.items()}
    assert equal(taken(path), wanted)
    assert notes(path) == ([note.replace("FILE", str(path))] if note else [])


def test_torchvisions_average_is_taken_first(tmp_path):
    path = tmp_path / "model_3.pth"
    torch.save(torchvisions(), path)
    assert equal(taken(path), AVERAGED)
    said = notes(path)
    assert len(said) == 2 and f"{path}#model takes the other" in said[0]
    assert said[1].endswith("lie outside of module. and were left out, the first is n_averaged")
    assert equal(taken(f"{path}#model"), PLAIN)


def test_a_student_and_its_teacher_in_one_file_are_told_apart_by_the_user(tmp_path):
    path = tmp_path / "both.ckpt"
    both = under("student.", PLAIN) | under("teacher.", AVERAGED)
    torch.save(lightnings(both), path)
    assert refusal(path) == (
        f"{path} holds several sets of weights for test_resnet: state_dict.student, "
        f"state_dict.teacher; choose one, like {path}#state_dict.student"
    )
    for name in ("teacher", "teacher.", "state_dict.teacher"):
        assert equal(taken(f"{path}#{name}"), AVERAGED)
        assert notes(f"{path}#{name}") == []
    assert "several sets" in refusal(f"{path}#state_dict")
    torch.save({"student": PLAIN, "teacher": under("backbone.", AVERAGED)}, path)
    assert "student, teacher; choose one" in refusal(path)
    assert equal(taken(f"{path}#teacher.backbone"), AVERAGED)
    assert equal(taken(f"{path}#teacher"), AVERAGED)


def test_a_safetensors_file_is_known_by_its_content(tmp_path):
    safetensors.torch.save_file(under("module.", PLAIN), tmp_path / "weights.bin")
    assert equal(taken(tmp_path / "weights.bin"), PLAIN)
    torch.save(PLAIN, tmp_path / "weights.safetensors")
    assert equal(taken(tmp_path / "weights.safetensors"), PLAIN)


class Program:
    """Pickles as a call of a function."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_nothing_in_a_file_is_executed(tmp_path, legacy):
    mark = tmp_path / "mark"
    programs = [
        Program(exec, f"open({str(mark)!r}, 'w')"),
        Program(eval, f"open({str(mark)!r}, 'w')"),
        Program(open, str(mark), "w"),
        Program(shutil.copy, __file__, str(mark)),
        Program(getattr, pathlib.Path, "touch"),
    ]
    torch.save(
        {"model": PLAIN, "programs": programs},
        tmp_path / "x.pth",
        _use_new_zipfile_serialization=not legacy,
    )
    assert equal(taken(tmp_path / "x.pth"), PLAIN)
    assert not mark.exists()
    for program, name in (
        (Program(os.system, f"touch {mark}"), "posix.system"),
        (Program(pathlib.Path.touch, mark), "builtins.getattr"),
    ):
        torch.save(
            {"model": PLAIN, "program": program},
            tmp_path / "x.pth",
            _use_new_zipfile_serialization=not legacy,
        )
        assert f"it asks for {name}, which may be a program" in refusal(tmp_path / "x.pth")
        assert not mark.exists()


def test_names_allowed_for_one_file_are_not_allowed_afterwards(tmp_path):
    torch.save(lightnings(under("model.", PLAIN)), tmp_path / "x.ckpt")
    before = torch.serialization.get_safe_globals()
    taken(tmp_path / "x.ckpt")
    assert torch.serialization.get_safe_globals() == before


# ---- files without weights ----


def saved(content: object) -> bytes:
    torch.save(content, file := io.BytesIO())
    return file.getvalue()


class Pickled(nn.Module):
    """A model that is saved whole."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2)


OTHERS = {
    "empty": (b"", "it is empty); download or copy it again"),
    "zeros": (bytes(2000), "it begins with nothing but zeros); download or copy it again"),
    "cut": (saved(PLAIN)[:9000], "it is cut off); download or copy it again"),
    "cut safetensors": (
        safetensors.torch.save(PLAIN)[:9000],
        "it is not as long as its header says); download or copy it again",
    ),
    "cut in its header": (
        safetensors.torch.save(PLAIN)[:600],
        "it is cut off); download or copy it again",
    ),
    "page": (
        b"<!DOCTYPE html>\n<html><body>Quota exceeded</body></html>",
        "it is a web page: a download that failed); download it again",
    ),
    "pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "it is a pointer of Git LFS); run git lfs pull, or download the file itself",
    ),
    "index": (
        b'{"metadata": {"total_size": 1}, "weight_map": {"a": "model-00001-of-00002.bin"}}',
        "it is the index of weights in several files); join them, and pass the one file",
    ),
    "text": (b'{"error": "Not found"}', 'it is a text: {"error": "Not found"}); pass a .safe'),
    "gzip": (gzip.compress(saved(PLAIN)), "it is packed with gzip); unpack it first"),
    "pickle": (pickle.dumps({"a": 1}), "it is a pickle that torch.save didn't write); pass a"),
    "keras": (b"\x89HDF\r\n\x1a\n" + bytes(600), "it is an HDF5 file, as Keras writes it); pass"),
    "noise": (bytes(range(100, 256)) * 9, "it begins with b'defghijk', as no known format does"),
    "no weights": (
        saved({"epoch": 3, "optimizer": {"state": {}, "param_groups": []}, "args": Callback()}),
        "it holds epoch (a number), optimizer (2 entries), args (an object "
        "test_checkpoints.Callback)); pass a .safetensors, .pth or .pt file",
    ),
    "a whole model": (
        saved(Pickled()),
        "it holds a whole pickled model, test_checkpoints.Pickled); save its state_dict() with "
        "torch.save and pass that file",
    ),
    "a whole model in an entry": (
        saved({"model": Pickled(), "epoch": 3}),
        "it holds model (a whole pickled model, test_checkpoints.Pickled), epoch (a number)); "
        "save that model's state_dict() with torch.save and pass that file",
    ),
    "a list": (saved([PLAIN, 3]), "it holds 2 entries); pass a .safetensors"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_file_without_weights_is_refused_and_what_it_is_is_said(tmp_path, kind):
    content, said = OTHERS[kind]
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        assert refusal(tmp_path / name).startswith(
            f"{tmp_path / name} holds no weights that can be read ({said}"
        )


def test_other_things_than_files_are_refused(tmp_path):
    (tmp_path / "run").mkdir()
    assert "is a folder, not a file of weights; pass a .safetensors" in refusal(tmp_path / "run")
    torch.save(PLAIN, tmp_path / "run" / "best.pth")
    assert f"pass a file in it, like {tmp_path}/run/best.pth" in refusal(tmp_path / "run")
    os.mkfifo(tmp_path / "pipe.pth")
    assert "is no file; pass" in refusal(tmp_path / "pipe.pth")
    (tmp_path / "link.pth").symlink_to(tmp_path / "gone.pth")
    assert "there is no checkpoint" in refusal(tmp_path / "link.pth")


@pytest.mark.filterwarnings("ignore:.torch.jit:FutureWarning")
def test_a_torchscript_archive_and_an_archive_of_numpy_are_named(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "x.pt"))
    assert "it is a TorchScript archive); save the model's state_dict()" in refusal(
        tmp_path / "x.pt"
    )
    np.savez(tmp_path / "x.npz", a=np.ones(2))
    assert "it is an archive of NumPy); pass" in refusal(tmp_path / "x.npz")


def test_a_whole_model_in_torchs_format_of_old_is_named(tmp_path):
    torch.save(Pickled(), tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    assert "it holds a whole pickled model); save the model's state_dict()" in refusal(
        tmp_path / "x.pth"
    )


def test_another_protocol_of_pickle_is_named(tmp_path):
    torch.save({"model": PLAIN, "args": Callback()}, tmp_path / "x.pth", pickle_protocol=4)
    assert "pickled with another protocol than torch.save's own" in refusal(tmp_path / "x.pth")


def test_weights_of_another_model_are_refused_with_what_the_file_holds(tmp_path):
    torch.save({"net": weights("test_vit"), "epoch": 3}, tmp_path / "x.pth")
    assert refusal(tmp_path / "x.pth").endswith(
        "the file holds net (80 entries), epoch (a number); name its model before the ="
    )


@pytest.mark.parametrize(
    "header",
    [
        "[1]",
        "{",
        '{"classes": 3}',
        '{"model": 3}',
        '{"model": "test_resnet", "image_size": "big"}',
        '{"model": "test_resnet", "mean": [1, 2]}',
        '{"model": "test_resnet", "class_names": "abc"}',
        '{"model": "test_resnet", "interpolation": "none"}',
    ],
)
def test_a_damaged_header_is_refused_in_one_line(tmp_path, header):
    safetensors.torch.save_file(PLAIN, tmp_path / "x.safetensors", metadata={"meal_v2": header})
    assert "its header 'meal_v2' is damaged); restore it from a copy" in refusal(
        tmp_path / "x.safetensors"
    )


def test_a_student_a_teacher_and_verify_read_the_same_files(photos, recipe, tmp_path, capsys):
    path = tmp_path / "theirs.ckpt"
    torch.save(lightnings(under("model.", PLAIN)), path)
    (teacher,) = load_teachers([ModelSpec(model="test_resnet", checkpoint=str(path))], CPU)
    assert equal(teacher.module.state_dict(), PLAIN)
    chosen = with_first_teacher(recipe, timms_file(tmp_path / "both.pth"))
    generate(chosen, photos, tmp_path / "s.zarr", device=CPU)
    assert "state_dict_ema was taken" in capsys.readouterr().err
    named = [f"--teacher={spec.model}={spec.checkpoint}" for spec in chosen.teachers]
    asked = ("verify", tmp_path / "s.zarr", "--data", photos, "--sample", 3, "--device", "cpu")
    status, _, said = command.run(*asked, *named)
    assert status == 0 and "state_dict_ema was taken" in said
    wrong = [f"--teacher=test_resnet={tmp_path}/both.pth#state_dict", *named[1:]]
    status, page, _ = command.run(*asked, *wrong)
    assert status == 1 and "was made with test_resnet of weights" in page


def test_weights_under_their_authors_names_are_renamed_as_timm_does(tmp_path):
    """Swin's own files: the head under another name, downsampling in the stage before,
    and indices that timm computes."""
    name = "swin_tiny_patch4_window7_224"
    ours = weights(name)
    theirs = {}
    for key, tensor in ours.items():
        parts = key.replace("head.fc.", "head.").split(".")
        if parts[2:3] == ["downsample"]:
            parts[1] = str(int(parts[1]) - 1)
        theirs[".".join(parts)] = tensor
    theirs["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49).long()
    torch.save({"model": theirs, "optimizer": optimizer()}, tmp_path / "swin.pth")
    assert equal(taken(tmp_path / "swin.pth", name), ours)
    (note,) = notes(tmp_path / "swin.pth", name)
    assert "renamed as timm does" in note


@pytest.mark.parametrize(
    ("model", "other"),
    [
        ("resnet18", "seresnet18"),
        ("deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"),
    ],
)
def test_a_larger_models_weights_are_not_taken_for_a_smaller_ones(tmp_path, model, other):
    """Whose tensors are all there: what is left over says that it is another model."""
    torch.save(weights(other), tmp_path / "x.pth")
    assert f"doesn't fit {model}" in refusal(tmp_path / "x.pth", model)


def changed_head(**tensors: torch.Tensor) -> Tensors:
    return PLAIN | {f"fc.{name}": tensor for name, tensor in tensors.items()}


HEAD = PLAIN["fc.weight"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (changed_head(weight=torch.tensor(1.0)), "the first is fc.weight"),
        (changed_head(bias=torch.ones(4)), "the first is fc.bias"),
        (changed_head(weight=HEAD.to(torch.complex64)), "the first is fc.weight"),
        (changed_head(weight=HEAD.to(torch.int8)), "the first is fc.weight"),
        (changed_head(weight=HEAD.to_sparse()), "the first is fc.weight"),
        ({k: t.to("meta") for k, t in PLAIN.items()}, "holds no weights that can be read"),
        (weights(classes=0), "has no classifier 'fc', so it is no whole test_resnet"),
        ({0: PLAIN, 1: AVERAGED}, "it holds 0 (92 entries), 1 (92 entries)"),
        ({f"epoch{i}": PLAIN for i in range(40)}, "epoch7 and 32 more; choose one"),
        ({"ema_slow": PLAIN, "ema_fast": AVERAGED}, "ema_slow, ema_fast; choose one"),
        ({"model": {k: t.numpy() for k, t in PLAIN.items()}}, "it holds model (92 entries)"),
    ],
)
def test_odd_weights_are_refused_in_one_line(tmp_path, content, said):
    torch.save(content, tmp_path / "x.pth")
    assert said in refusal(tmp_path / "x.pth")


def test_weights_that_are_not_finite_are_taken_and_that_is_said(tmp_path):
    torch.save(changed_head(weight=HEAD * torch.nan), tmp_path / "x.pth")
    assert notes(tmp_path / "x.pth") == [
        f"1 of 92 tensors of {tmp_path}/x.pth hold values that aren't finite, the first is "
        "fc.weight"
    ]


def test_a_section_that_holds_itself_is_read_once(tmp_path):
    content = {"model": PLAIN}
    content["self"] = content
    torch.save(content, tmp_path / "x.pth")
    assert equal(taken(tmp_path / "x.pth"), PLAIN) and notes(tmp_path / "x.pth") == []


def test_weights_without_a_prefix_are_the_models_own(tmp_path):
    torch.save(PLAIN | under("teacher.", AVERAGED), tmp_path / "x.pth")
    assert equal(taken(tmp_path / "x.pth"), PLAIN)
    assert "#teacher takes the other" in notes(tmp_path / "x.pth")[0]
    assert equal(taken(f"{tmp_path}/x.pth#teacher"), AVERAGED)


@pytest.mark.parametrize("left", [60, 500, 3000, 0.5, -10])
def test_a_file_of_old_that_is_cut_off_is_named(tmp_path, left):
    torch.save(PLAIN, tmp_path / "x.pth", _use_new_zipfile_serialization=False)
    whole = (tmp_path / "x.pth").read_bytes()
    (tmp_path / "x.pth").write_bytes(whole[: int(left * len(whole)) if left == 0.5 else left])
    assert "it is cut off); download or copy it again" in refusal(tmp_path / "x.pth")


# ---- another input size ----


@pytest.mark.parametrize(
    ("model", "size"),
    [("test_vit", 96), ("test_vit", 224), ("test_vit2", 96), ("test_vit4", 128)],
)
def test_a_position_embedding_is_resampled_as_timm_does(tmp_path, model, size):
    module = weights(model)
    torch.save(module, tmp_path / "x.pth")
    theirs = timm.create_model(
        model,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "x.pth"), "num_classes": 3},
        num_classes=3,
        img_size=size,
    )
    assert not equal(theirs.state_dict(), module)
    ours = load(ModelSpec(model=model, checkpoint=str(tmp_path / "x.pth"), image_size=size))
    assert equal(ours.module.state_dict(), theirs.state_dict())
    assert ours.image_size == size
    assert ours.notes == [
        f"position embedding of {tmp_path}/x.pth resampled from 160 px to {size} px, as timm does"
    ]


def test_a_file_of_another_size_tells_its_size_where_nobody_asks_for_one(tmp_path):
    small = weights("test_vit", img_size=96)
    torch.save(small, tmp_path / "x.pth")
    ours = load(ModelSpec(model="test_vit", checkpoint=str(tmp_path / "x.pth")))
    assert ours.image_size == 96 and equal(ours.module.state_dict(), small)
    assert ours.notes == [f"{tmp_path}/x.pth was made for 96 px, not for test_vit's 160 px"]


def test_where_timm_cannot_resample_the_size_is_named(tmp_path, monkeypatch):
    torch.save(weights("test_vit"), tmp_path / "x.pth")
    monkeypatch.setattr("timm.models.vision_transformer.checkpoint_filter_fn", lambda w, m: w)
    assert refusal(tmp_path / "x.pth", "test_vit", image_size=96) == (
        f"{tmp_path}/x.pth was made for 160 px, and timm can't resample test_vit to 96 px; pass "
        f"--image-size 160, or set image_size: 160"
    )


def test_another_patch_is_another_model_and_not_another_size(tmp_path):
    other = weights("test_vit", patch_size=32)
    torch.save(other, tmp_path / "x.pth")
    assert "doesn't fit test_vit" in refusal(tmp_path / "x.pth", "test_vit", image_size=96)


def test_a_file_of_this_tool_is_resampled_for_eval_as_teacher_and_as_student(
    photos, recipe, tmp_path
):
    made = load(ModelSpec(model="test_vit", pretrained=False), classes=3, image_size=64)
    save_model(tmp_path / "x.safetensors", made, {"class_names": ["ant", "bee", "cat"]})
    own = str(tmp_path / "x.safetensors")
    assert load(ModelSpec(model="test_vit", checkpoint=own)).image_size == 64
    asked = ("eval", "--data", photos, "--split", "train", "--image-size", 96, "--json", "--model")
    status, _, said = command.run(*asked, f"test_vit={own}")
    assert status == 0 and f"position embedding of {own} resampled from 64 px to 96 px" in said
    spec = ModelSpec(model="test_vit", checkpoint=own, image_size=96)
    (teacher,) = load_teachers([spec], CPU)
    student = load(
        ModelSpec(model="test_vit", checkpoint=own),
        image_size=96,
        class_names=["ant", "bee", "cat"],
    )
    assert equal(teacher.module.state_dict(), student.module.state_dict())
    assert teacher.image_size == student.image_size == 96
